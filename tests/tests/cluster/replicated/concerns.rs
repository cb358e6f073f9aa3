//! When a write counts as done: on the first copy, on all, on their stable storage, in two zones.

use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use galleonfs_tests::lab::Node;
use galleonfs_tests::lab::run::wait_for;
use serde_json::{Value, json};

use super::super::world::{SOON, World};
use super::copies::compare;
use super::load::Load;
use super::volume::{Volume, freeze_plugin};

/// A guest that waits has waited for so long.
const QUIET: Duration = Duration::from_secs(5);
/// Long enough to be told from a hiccup of a busy machine.
const FROZEN: Duration = Duration::from_millis(1_700);
/// What a write may take that waits for nobody who stands still.
const WRITE_MAX: Duration = Duration::from_millis(1_000);

fn class(world: &World, concern: &str) -> Result<String> {
    let parameters = json!({"replicaCount": "3", "writeConcern": concern});
    world.class(concern, "Immediate", "Delete", parameters)
}

/// The condition of the volume that tells what a completed write is on.
fn wait_told(volume: &Volume, words: &str) -> Result<()> {
    wait_for(&format!("the volume to say {words:?}"), SOON, || {
        let object = volume.object()?;
        Ok(says(&object, "Redundant", words).then_some(()))
    })
    .with_context(|| {
        format!(
            "it says {}",
            volume.object().unwrap_or_default()["status"]["conditions"]
        )
    })
}

fn says(object: &Value, kind: &str, words: &str) -> bool {
    let mut conditions = object["status"]["conditions"].as_array().into_iter().flatten();
    conditions.any(|condition| {
        let message = condition["message"].as_str().unwrap_or_default();
        condition["type"] == kind && message.contains(words)
    })
}

/// A replica stands still, for less than it takes to leave it behind: writes go on without it, a flush waits for it.
pub fn the_first_copy_answers_writes_while_another_stands_still(world: &World) -> Result<()> {
    let class = class(world, "acknowledged")?;
    let volume = Volume::of_class(world, &class, &world.lab.node("node1")?, "256Mi")?;
    wait_told(&volume, "on the first replica that has it")?;
    let file = "--name=w --filename=/data/w --size=32M --bs=4k --direct=1 --ioengine=libaio --verify=crc32c";
    volume.shell(&format!("fio {file} --rw=write --do_verify=0 --end_fsync=1 >/dev/null"))?;
    let write = format!(
        "fio --output=/tmp/w.json --output-format=json {file} --rw=randwrite --do_verify=0 --rate_iops=200 --iodepth=1 \
         --time_based --runtime=8"
    );
    volume.shell(&format!(
        "setsid sh -c '{write}; echo $? >/tmp/w.rc' >/dev/null 2>&1 </dev/null &"
    ))?;
    volume.device()?.wait_writes(200)?;

    let [one, _] = volume.others()?;
    let frozen = freeze_plugin(world, &one.node)?;
    let since = Instant::now();
    // The page itself says how far the slowest is behind; it is looked at twice a second.
    wait_for("the lag to be told", FROZEN, || Ok((volume.lag()? > 0).then_some(())))?;
    std::thread::sleep(FROZEN.saturating_sub(since.elapsed()));
    frozen.thaw();

    wait_for("fio to end", SOON, || {
        Ok(volume
            .shell("cat /tmp/w.rc 2>/dev/null || true")?
            .trim()
            .parse::<i32>()
            .ok())
    })
    .and_then(|code| ensure_ok(code, &volume))?;
    let told: Value = serde_json::from_str(&volume.shell("cat /tmp/w.json")?)?;
    let longest = told["jobs"][0]["write"]["lat_ns"]["max"]
        .as_u64()
        .context("no latency")?;
    let longest = Duration::from_nanos(longest);
    println!("    the longest write took {} ms", longest.as_millis());
    ensure!(longest <= WRITE_MAX, "a write took {} ms", longest.as_millis());
    volume.wait_in_sync()?;
    wait_for("nobody to lag", SOON, || Ok((volume.lag()? == 0).then_some(())))?;
    volume.end_pod()?;
    compare(&volume)
}

fn ensure_ok(code: i32, volume: &Volume) -> Result<()> {
    let told = || volume.shell("cat /tmp/w.json").unwrap_or_default();
    ensure!(code == 0, "fio ended with {code}: {}", told());
    Ok(())
}

/// Nodes are in two zones. With the one zone alone writes wait, as they do below the minimum, and go on by themselves.
pub fn writes_wait_while_replicas_are_in_one_zone(world: &World) -> Result<()> {
    let class = class(world, "distributed")?;
    let zones = Zones::of(world, &["x", "x", "x"])?;
    world.claim("early", &class, "64Mi", "Filesystem")?;
    wait_for("the claim's event", SOON, || {
        let events = world.kubectl.events("early")?;
        Ok(events.contains("topology.kubernetes.io/zone").then_some(()))
    })?;
    zones.set(&["x", "x", "y"])?;
    world.wait_bound("early")?;

    let volume = Volume::of_class(world, &class, &world.lab.node("node1")?, "256Mi")?;
    wait_told(&volume, "in 2 zones: x, y")?;
    let far = world.lab.node("node3")?;
    let near = world.lab.node("node2")?;
    let device = volume.device()?;
    let load = Load::start(&volume, Duration::from_secs(20))?;
    let split = world.lab.split(&[&far], &[&volume.primary, &near])?;
    device.wait_pause(QUIET)?;
    wait_for("the volume to say what it waits for", SOON, || {
        Ok(says(&volume.object()?, "Attached", "fewer than 2 zones").then_some(()))
    })?;
    let in_sync = volume.config()?["inSync"].as_array().map_or(0, Vec::len);
    ensure!(in_sync == 3, "{in_sync} replicas are in sync");
    split.heal()?;
    load.end()?;
    volume.wait_in_sync()?;

    // One of the two that stand together may go.
    let load = Load::start(&volume, Duration::from_secs(15))?;
    let beside = volume.replica_on(&near)?;
    let split = world.lab.split(&[&near], &[&volume.primary, &far])?;
    volume.wait_left_behind(&beside)?;
    split.heal()?;
    load.end()?;
    volume.wait_in_sync()?;
    volume.end_pod()?;
    drop(zones);
    compare(&volume)
}

/// Each write is on the disks of all when it is answered, so a guest that never flushes loses nothing.
pub fn a_durable_write_is_on_all_disks_without_a_flush(world: &World) -> Result<()> {
    let class = class(world, "durable")?;
    let mut volume = Volume::of_class(world, &class, &world.lab.node("node2")?, "128Mi")?;
    wait_told(&volume, "on stable storage of 3 of 3 replicas")?;
    let file = "--name=w --filename=/data/w --size=16M --bs=4k --direct=1 --ioengine=libaio --verify=crc32c";
    volume.shell(&format!(
        "fio {file} --rw=randwrite --do_verify=0 --iodepth=16 >/dev/null"
    ))?;
    volume.move_to(&world.lab.node("node3")?)?;
    volume.shell(&format!("fio {file} --rw=randread --verify_only >/dev/null"))?;
    volume.end_pod()?;
    compare(&volume)
}

/// Nodes stand in other zones than usual, while this lives.
struct Zones<'a> {
    world: &'a World<'a>,
    nodes: Vec<Node>,
}

impl<'a> Zones<'a> {
    fn of(world: &'a World<'a>, zones: &[&str]) -> Result<Self> {
        let nodes = world.lab.nodes();
        let these = Self { world, nodes };
        these.set(zones)?;
        Ok(these)
    }

    fn set(&self, zones: &[&str]) -> Result<()> {
        let mut nodes = self.nodes.iter().zip(zones);
        nodes.try_for_each(|(node, zone)| label(self.world, node, zone))
    }
}

impl Drop for Zones<'_> {
    fn drop(&mut self) {
        for node in &self.nodes {
            // Other tests care for nodes in different zones only, and these are that.
            let _ = label(self.world, node, &format!("zone{}", node.index()));
        }
    }
}

fn label(world: &World, node: &Node, zone: &str) -> Result<()> {
    let label = format!("topology.kubernetes.io/zone={zone}");
    let told = world
        .kubectl
        .run(&["label", "node", node.name(), &label, "--overwrite"]);
    told.map(drop)
}
