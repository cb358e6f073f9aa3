//! One replica is lost for a while, in every way in which that happens; the guest goes on.

use std::fs::{self, OpenOptions};
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::thread;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use galleonfs_tests::lab::run::wait_for;
use serde_json::json;

use super::super::failures::start_again;
use super::super::world::{SOON, World, checksum};
use super::copies::compare;
use super::load::Load;
use super::volume::{Replica, Volume, freeze_plugin, node_without_controller};
use super::{MENDED, STALL_MAX};

/// What coming back may copy beyond one and a half times what was written meanwhile.
const RESYNC_SPARE: u64 = 4 << 20;

pub fn a_killed_replica_costs_a_pause_and_comes_back(world: &World) -> Result<()> {
    let volume = Volume::make(world, &world.lab.node("node1")?, "256Mi")?;
    let [replica, _] = volume.others()?;
    lost(&volume, &replica, Duration::from_secs(20), || {
        let away = world.kill_plugin(&replica.node)?;
        println!("    the node plugin was back after {:.1} s", away.as_secs_f64());
        Ok(())
    })
}

pub fn a_replica_that_stands_still_for_ten_seconds_costs_a_pause_and_comes_back(world: &World) -> Result<()> {
    let volume = Volume::make(world, &world.lab.node("node1")?, "256Mi")?;
    let [replica, _] = volume.others()?;
    lost(&volume, &replica, Duration::from_secs(25), || {
        let frozen = freeze_plugin(world, &replica.node)?;
        volume.wait_left_behind(&replica)?;
        // Long enough to be noticed by everybody, short enough for its probe.
        thread::sleep(Duration::from_secs(8));
        frozen.thaw();
        Ok(())
    })
}

pub fn a_replicas_machine_that_dies_costs_a_pause_and_comes_back(world: &World) -> Result<()> {
    let dies = node_without_controller(world)?;
    let mut nodes = world.lab.nodes().into_iter();
    let primary = nodes
        .find(|node| node.name() != dies.name())
        .context("there is one node")?;
    let volume = Volume::make(world, &primary, "256Mi")?;
    let replica = volume.replica_on(&dies)?;
    lost(&volume, &replica, Duration::from_secs(40), || {
        dies.crash()?;
        let left = volume.wait_left_behind(&replica)?;
        println!("    it was left behind after {:.1} s", left.as_secs_f64());
        start_again(world, &dies)
    })
}

/// Something happens to a replica under load: the guest sees a pause at most, and afterwards what the replica missed has
/// been copied to it and hardly more.
fn lost(volume: &Volume, replica: &Replica, lasts: Duration, fault: impl FnOnce() -> Result<()>) -> Result<()> {
    let load = Load::start(volume, lasts)?;
    let (written, before) = (volume.written()?, volume.copied_to(replica)?);
    fault()?;
    let took = volume.wait_in_sync()?;
    let (written, after) = (volume.written()? - written, volume.copied_to(replica)?);
    // Its node plugin counts from its own start.
    let resynced = after.checked_sub(before).unwrap_or(after);
    println!(
        "    in sync after {:.1} s; {} KiB were written, {} KiB copied",
        took.as_secs_f64(),
        written >> 10,
        resynced >> 10
    );
    ensure!(
        resynced <= written * 3 / 2 + RESYNC_SPARE,
        "{resynced} bytes were copied for {written} that were written"
    );
    let seen = load.end()?;
    ensure!(
        seen.longest <= STALL_MAX,
        "a request took {} ms",
        seen.longest.as_millis()
    );
    volume.wait_in_sync()?;
    volume.end_pod()?;
    compare(volume)
}

/// Where the small pools of this test are, and their size: two volumes would not fit.
const SMALL: &str = "/var/lib/galleonfs/small";
const SMALL_SIZE: &str = "640M";

pub fn a_replica_without_room_is_left_behind_until_there_is_some(world: &World) -> Result<()> {
    let outcome = small_pools(world).and_then(|class| {
        let primary = world.lab.node("node1")?;
        let volume = Volume::of_class(world, &class, &primary, "256Mi")?;
        let [replica, _] = volume.others()?;
        lost(&volume, &replica, Duration::from_secs(30), || {
            replica
                .node
                .shell(&format!("! cat /dev/zero > {SMALL}/filler 2>/dev/null"))?;
            volume.wait_left_behind(&replica)?;
            replica.node.shell(&format!("rm {SMALL}/filler"))?;
            Ok(())
        })?;
        world.kubectl.delete("pvc", super::volume::POD, SOON)?;
        world.wait_gone(&world.system, "galleonvolume", &volume.name)
    });
    let removed = remove_small_pools(world);
    outcome.and(removed)
}

/// A pool of its own on each node, on a file system that is soon full. Gives the class for it.
fn small_pools(world: &World) -> Result<String> {
    for node in world.lab.nodes() {
        node.shell(&format!(
            "truncate --size {SMALL_SIZE} {SMALL}.img && mkfs.ext4 -q {SMALL}.img && mkdir -p {SMALL} && mount -o loop {SMALL}.img {SMALL} && mkdir {SMALL}/pool"
        ))?;
        let name = format!("small.{}", node.name());
        let pool = json!({
            "apiVersion": "galleonfs.io/v1alpha1",
            "kind": "StoragePool",
            "metadata": {"name": name},
            "spec": {"pool": "small", "nodeName": node.name(), "path": format!("{SMALL}/pool"), "media": "ssd"},
        });
        world.system.apply(&pool.to_string())?;
        wait_for("the pool to be ready", SOON, || {
            let pool = world.system.json(&["get", "storagepool", &name])?;
            Ok(galleonfs_tests::lab::kubectl::condition(&pool, "Ready").then_some(()))
        })?;
    }
    let parameters = json!({"pool": "small", "replicaCount": "3"});
    world.class("small", "WaitForFirstConsumer", "Delete", parameters)
}

fn remove_small_pools(world: &World) -> Result<()> {
    for node in world.lab.nodes() {
        world
            .system
            .delete("storagepool", &format!("small.{}", node.name()), SOON)?;
        node.shell(&format!("umount {SMALL}; rm -rf {SMALL} {SMALL}.img"))
            .context("the test's mounts were not removed")?;
    }
    Ok(())
}

/// Stands at the beginning of each page of the file, so that blocks of it are found in segments.
const MARK: &str = "a page to be damaged";
const PAGES: usize = 256;
const DAMAGED: usize = 40;

pub fn damaged_blocks_of_one_replica_are_read_from_another_and_mended(world: &World) -> Result<()> {
    let volume = Volume::make(world, &world.lab.node("node1")?, "128Mi")?;
    let make = format!(
        "for i in $(seq {PAGES}); do printf '%s %s' '{MARK}' $i | dd bs=4096 conv=sync 2>/dev/null; done > /data/a && sync && sha256sum /data/a"
    );
    let wrote = checksum(&volume.shell(&make)?)?;
    let own = volume.replica_on(&volume.primary)?;
    let damaged = damage(&own, DAMAGED)?;
    ensure!(
        damaged == DAMAGED,
        "only {damaged} pages were found in the replica's files"
    );
    // Past the guest's own cache.
    let read = volume.shell("dd if=/data/a bs=4096 iflag=direct 2>/dev/null | sha256sum")?;
    let read = checksum(&read)?;
    ensure!(read == wrote, "{read} was read, and {wrote} was written");
    wait_for("the replica to be mended", MENDED, || {
        Ok((marked(&own)?.len() >= PAGES + DAMAGED).then_some(()))
    })?;
    volume.wait_in_sync()?;
    a_disk_with_so_much_damage_is_not_trusted_until_a_person_says_so(&volume, &own)?;
    volume.end_pod()?;
    compare(&volume)
}

/// There is no fourth node, so the replica stays where it is, and the volume says why.
fn a_disk_with_so_much_damage_is_not_trusted_until_a_person_says_so(volume: &Volume, own: &Replica) -> Result<()> {
    let system = &volume.world.system;
    let replica = system.json(&["get", "galleonreplica", &own.name])?;
    let pool = replica["spec"]["poolName"].as_str().context("it is in no pool")?;
    let ready = |wanted: &'static str| {
        move || -> Result<Option<()>> {
            let object = system.json(&["get", "storagepool", pool])?;
            let mut conditions = object["status"]["conditions"].as_array().into_iter().flatten();
            let ready = conditions.find(|condition| condition["type"] == "Ready");
            Ok(ready.filter(|ready| ready["reason"] == wanted).map(drop))
        }
    };
    wait_for("the pool to be failing", SOON, ready("TooManyRepairs"))?;
    wait_for("the volume to say that there is nowhere to go", SOON, || {
        let object = volume.object()?;
        let mut conditions = object["status"]["conditions"].as_array().into_iter().flatten();
        Ok(conditions
            .any(|condition| condition["type"] == "Redundant" && condition["reason"] == "NoOtherNode")
            .then_some(()))
    })?;
    let now = system.run(&[
        "get",
        "storagepool",
        pool,
        "-o",
        "jsonpath={.status.conditions[?(@.type==\"Failing\")].lastTransitionTime}",
    ])?;
    let trusted = format!("galleonfs.io/disk-trusted-at={now}");
    system.run(&["annotate", "storagepool", pool, &trusted, "--overwrite"])?;
    wait_for("the pool to be ready again", SOON, ready("Ready"))
}

/// Places of pages with the mark: file and offset.
fn marked(replica: &Replica) -> Result<Vec<(std::path::PathBuf, u64)>> {
    let root = replica.node.pool_directory()?;
    let below = Path::new(&replica.directory).strip_prefix("/var/lib/galleonfs")?;
    let mut found = Vec::new();
    for entry in fs::read_dir(root.join(below).join("segments"))? {
        let path = entry?.path();
        let bytes = fs::read(&path)?;
        let pages = bytes.chunks(4096).enumerate();
        found.extend(
            pages
                .filter(|(_, page)| page.starts_with(MARK.as_bytes()))
                .map(|(index, _)| (path.clone(), index as u64 * 4096)),
        );
    }
    Ok(found)
}

/// Turns one bit in each of so many pages. Gives how many there were.
fn damage(replica: &Replica, most: usize) -> Result<usize> {
    let places = marked(replica)?;
    for (path, offset) in places.iter().take(most) {
        let file = OpenOptions::new().read(true).write(true).open(path)?;
        let at = offset + 1000;
        let mut byte = [0];
        file.read_exact_at(&mut byte, at)?;
        file.write_all_at(&[byte[0] ^ 4], at)?;
        file.sync_all()?;
    }
    Ok(places.len().min(most))
}
