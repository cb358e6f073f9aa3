//! The network between nodes loses packets: all of them, those of one direction, now and then.

use std::thread;
use std::time::Duration;

use anyhow::{Result, ensure};

use super::super::world::World;
use super::STALL_MAX;
use super::copies::compare;
use super::load::Load;
use super::volume::Volume;

/// Each half of it shorter than anybody waits for an answer.
const FLAPS: usize = 6;
const FLAP: Duration = Duration::from_millis(900);
/// A guest that has to wait has to wait for that long.
const QUIET: Duration = Duration::from_secs(5);

/// Each of the replicas without the primary is alone once.
pub fn a_replica_behind_a_split_costs_a_pause_and_comes_back(world: &World) -> Result<()> {
    let volume = Volume::make(world, &world.lab.node("node1")?, "256Mi")?;
    let [one, other] = volume.others()?;
    let load = Load::start(&volume, Duration::from_secs(35))?;
    for (alone, left) in [(&one, &other), (&other, &one)] {
        let split = world.lab.split(&[&alone.node], &[&volume.primary, &left.node])?;
        let behind = volume.wait_left_behind(alone)?;
        split.heal()?;
        let back = volume.wait_in_sync()?;
        println!(
            "    {} was left behind after {:.1} s and back after {:.1} s",
            alone.name,
            behind.as_secs_f64(),
            back.as_secs_f64()
        );
    }
    let seen = load.end()?;
    ensure!(
        seen.longest <= STALL_MAX,
        "a request took {} ms",
        seen.longest.as_millis()
    );
    volume.wait_in_sync()?;
    volume.end_pod()?;
    compare(&volume)
}

pub fn a_network_that_loses_one_direction_or_flaps_costs_no_write(world: &World) -> Result<()> {
    let volume = Volume::make(world, &world.lab.node("node2")?, "256Mi")?;
    let [one, other] = volume.others()?;
    let load = Load::start(&volume, Duration::from_secs(40))?;
    let towards = (&volume.primary, &one.node);
    let from = (&other.node, &volume.primary);
    for (way, replica) in [(towards, &one), (from, &other)] {
        let cut = world.lab.drop_from_to(&[way])?;
        volume.wait_left_behind(replica)?;
        cut.heal()?;
        volume.wait_in_sync()?;
    }
    for _ in 0..FLAPS {
        let split = world.lab.split(&[&one.node], &[&volume.primary])?;
        thread::sleep(FLAP);
        split.heal()?;
        thread::sleep(FLAP);
    }
    let seen = load.end()?;
    ensure!(
        seen.longest <= STALL_MAX,
        "a request took {} ms",
        seen.longest.as_millis()
    );
    volume.wait_in_sync()?;
    volume.end_pod()?;
    compare(&volume)
}

/// With its own replica alone it is below the minimum: the guest waits, and is told of no error.
pub fn a_primary_that_reaches_no_replica_waits_and_goes_on(world: &World) -> Result<()> {
    let volume = Volume::make(world, &world.lab.node("node3")?, "256Mi")?;
    let [one, other] = volume.others()?;
    let device = volume.device()?;
    let load = Load::start(&volume, Duration::from_secs(15))?;
    let split = world.lab.split(&[&volume.primary], &[&one.node, &other.node])?;
    device.wait_pause(QUIET)?;
    let config = volume.config()?;
    let in_sync = config["inSync"].as_array().map_or(0, Vec::len);
    ensure!(in_sync >= 2, "it went below the minimum: {config}");
    split.heal()?;
    load.end()?;
    volume.wait_in_sync()?;
    volume.end_pod()?;
    compare(&volume)
}
