//! The API server is not there for a while.

use std::thread;
use std::time::Duration;

use anyhow::{Result, ensure};

use super::super::world::World;
use super::copies::compare;
use super::load::Load;
use super::volume::Volume;

const MINUTE: Duration = Duration::from_secs(60);
/// Nobody needs the API server for a write, so nothing may take longer for it. What is left is the noise of a machine on
/// which a whole Kubernetes looks for its API server. Whoever waited for somebody waited longer: a replica that says nothing
/// is late after two seconds, and only the API server could let a write complete without it.
const NOT_NOTICED: Duration = Duration::from_secs(2);
/// A guest that has to wait has to wait for that long.
const QUIET: Duration = Duration::from_secs(5);

pub fn a_minute_without_the_api_server_is_not_noticed(world: &World) -> Result<()> {
    let volume = Volume::make(world, &world.lab.node("node1")?, "256Mi")?;
    let load = Load::start(&volume, MINUTE)?;
    let outage = world.lab.stop_api_server()?;
    thread::sleep(MINUTE);
    outage.end()?;
    let seen = load.end()?;
    ensure!(
        seen.longest <= NOT_NOTICED,
        "a request took {} ms",
        seen.longest.as_millis()
    );
    volume.wait_in_sync()?;
    volume.end_pod()?;
    compare(&volume)
}

/// Without the API server nobody can be left behind, so the guest waits.
pub fn a_replica_that_dies_without_the_api_server_costs_a_pause_and_no_write(world: &World) -> Result<()> {
    let volume = Volume::make(world, &world.lab.node("node2")?, "256Mi")?;
    let [replica, _] = volume.others()?;
    let (device, plugin) = (volume.device()?, world.plugin_container(&replica.node)?);
    let load = Load::start(&volume, Duration::from_secs(20))?;
    let outage = world.lab.stop_api_server()?;
    replica.node.kill_container(&plugin)?;
    device.wait_pause(QUIET)?;
    outage.end()?;
    let seen = load.end()?;
    ensure!(
        seen.longest >= QUIET,
        "no request took longer than {} ms: was the guest told that a write was done?",
        seen.longest.as_millis()
    );
    volume.wait_in_sync()?;
    volume.end_pod()?;
    compare(&volume)
}
