//! Our processes and whole nodes die at a bad moment; what was promised is still there.

use std::path::Path;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use galleonfs_tests::lab::run::wait_for;
use galleonfs_tests::lab::{Node, images};
use serde_json::{Value, json};

use super::world::{CLASS, SOON, World, pod};

/// Writes 64 KiB files, each flushed before its number goes to /tmp/acked, until a write fails. What file N holds
/// follows from N.
const WRITER: &str = "i=0; while :; do i=$((i+1)); \
    yes $i | head -c 65536 | dd of=/data/r$i bs=65536 iflag=fullblock conv=fsync 2>/dev/null || exit; \
    echo $i >> /tmp/acked; done";

/// A file that is written and flushed before anything is killed, and one that is being written when it happens.
const BASE: &str = "--name=base --directory=/data --size=48M --rw=randwrite --bs=4k --verify=crc32c --ioengine=libaio \
    --iodepth=16 --direct=1 --end_fsync=1";
const LOAD: &str = "--name=load --directory=/data --size=48M --rw=randwrite --bs=4k --verify=crc32c --ioengine=libaio \
    --iodepth=16 --direct=1 --fsync=64 --time_based --runtime=120 --do_verify=0";

/// How many files must be written before the kill, to have something to lose.
const ACKED_MIN: usize = 30;

pub fn what_was_fsynced_survives_a_killed_node_plugin(world: &World) -> Result<()> {
    world.claim("data", CLASS, "512Mi", "Filesystem")?;
    world.pod("user", "data", images::FIO)?;
    let user = world.kubectl.wait_ready("user", SOON)?;
    let node = world.node_of(&user)?;
    start_writers(world)?;

    let pause = world.kill_plugin(&node)?;
    println!("    the node plugin was back after {:.1} s", pause.as_secs_f64());
    survived(world, &node)
}

pub fn a_restarted_node_serves_its_volumes_again(world: &World) -> Result<()> {
    world.claim("data", CLASS, "512Mi", "Filesystem")?;
    world.pod("user", "data", images::FIO)?;
    let user = world.kubectl.wait_ready("user", SOON)?;
    let node = world.node_of(&user)?;
    start_writers(world)?;
    let acked = acked(world)?;

    node.crash()?;
    start_again(world, &node)?;
    check_files(world, &node, &acked)
}

/// The node's pools move to a disk that forgets, by a crash and a start, and stay there.
pub fn what_was_fsynced_survives_a_power_cut(world: &World) -> Result<()> {
    let node = world.lab.node("node3")?;
    node.use_volatile_disk(Path::new(env!("CARGO_BIN_EXE_galleonfs-lab")))?;
    node.crash()?;
    start_again(world, &node)?;

    world.claim("data", CLASS, "512Mi", "Filesystem")?;
    let user = pod("user", &["data"], images::FIO, false, Some(node.name()));
    world.kubectl.apply(&user.to_string())?;
    world.kubectl.wait_ready("user", SOON)?;
    start_writers(world)?;
    let acked = acked(world)?;

    println!("    {}", node.cut_power()?);
    start_again(world, &node)?;
    check_files(world, &node, &acked)
}

pub fn start_again(world: &World, node: &Node) -> Result<()> {
    node.start()?;
    world.lab.wait_nodes_ready(SOON)?;
    wait_for("the node plugin to be back", SOON, || {
        let plugin = world.plugin_on(node)?;
        Ok(galleonfs_tests::lab::kubectl::condition(&plugin, "Ready").then_some(()))
    })
}

fn start_writers(world: &World) -> Result<()> {
    world.kubectl.shell("user", &format!("fio {BASE} --do_verify=0"))?;
    let background = |line: &str| {
        world
            .kubectl
            .shell("user", &format!("setsid sh -c '{line}' >/tmp/log 2>&1 </dev/null &"))
    };
    background(&format!("fio {LOAD}"))?;
    background(WRITER)?;
    wait_for("some files to be written", SOON, || {
        Ok((acked(world)?.len() >= ACKED_MIN).then_some(()))
    })
}

fn acked(world: &World) -> Result<Vec<u32>> {
    let text = world.kubectl.shell("user", "cat /tmp/acked 2>/dev/null || true")?;
    // The last line may be half written.
    Ok(text.lines().filter_map(|line| line.parse().ok()).collect())
}

fn survived(world: &World, node: &Node) -> Result<()> {
    let acked = acked(world)?;
    check_files(world, node, &acked)
}

/// A new pod finds every acknowledged file whole, fio finds what it wrote, and the file system has no errors.
fn check_files(world: &World, node: &Node, acked: &[u32]) -> Result<()> {
    ensure!(acked.len() >= ACKED_MIN, "only {} files were acknowledged", acked.len());
    let user = world.replace_pod("user", "data", images::FIO)?;
    let last = acked.iter().max().context("no file was acknowledged")?;
    let compare = format!(
        "for i in $(seq 1 {last}); do yes $i | head -c 65536 | cmp -s - /data/r$i || echo r$i is damaged; done"
    );
    let damaged = world.kubectl.shell("user", &compare)?;
    ensure!(
        damaged.trim().is_empty(),
        "of {last} files that were fsynced:\n{damaged}"
    );
    world
        .kubectl
        .shell("user", &format!("fio {BASE} --verify_only"))
        .context("fio found other data than it wrote")?;
    println!("    {last} fsynced files are whole, fio verified, now fsck");
    fsck(node, &user)
}

/// Checks a copy of the device that is taken while the file system is frozen, i.e. as it is on the disk.
fn fsck(node: &Node, pod: &Value) -> Result<()> {
    let uid = pod["metadata"]["uid"].as_str().context("the pod has no uid")?;
    let script = format!(
        "set -e
        set -- $(grep '/pods/{uid}/volumes/kubernetes.io~csi/' /proc/mounts | head -n 1)
        trap 'fsfreeze --unfreeze $2; rm -f /var/lib/galleonfs/copy' EXIT
        fsfreeze --freeze $2
        cp --sparse=always $1 /var/lib/galleonfs/copy
        e2fsck -f -n /var/lib/galleonfs/copy 2>&1"
    );
    node.shell(&script).context("fsck has found errors").map(drop)
}

pub fn a_killed_controller_finishes_what_it_began(world: &World) -> Result<()> {
    let class = world.class("now", "Immediate", "Delete", json!({}))?;
    let names: Vec<String> = (0..8).map(|index| format!("data{index}")).collect();
    for name in &names {
        world.claim(name, &class, "32Mi", "Filesystem")?;
    }
    let pods = world
        .system
        .json(&["get", "pods", "-l", "app.kubernetes.io/component=controller"])?;
    let pod = pods["items"]
        .as_array()
        .and_then(|pods| pods.first())
        .context("there is no controller")?;
    let statuses = pod["status"]["containerStatuses"]
        .as_array()
        .context("the controller has no containers")?;
    let ours = statuses
        .iter()
        .find(|status| status["name"] == "controller")
        .context("no container `controller`")?;
    world
        .node_of(pod)?
        .kill_container(ours["containerID"].as_str().context("no container id")?)?;
    for name in &names {
        world.wait_bound(name)?;
    }
    // One volume for each claim: what was begun twice was made once.
    let claims = world.kubectl.json(&["get", "pvc"])?;
    let mut volumes: Vec<_> = claims["items"]
        .as_array()
        .into_iter()
        .flatten()
        .map(|claim| claim["spec"]["volumeName"].to_string())
        .collect();
    volumes.sort();
    volumes.dedup();
    ensure!(
        volumes.len() == names.len(),
        "{} volumes for {} claims",
        volumes.len(),
        names.len()
    );
    Ok(())
}

pub fn a_restarted_kubelet_finds_its_volumes_in_use(world: &World) -> Result<()> {
    let user = world.claim_and_pod("data", "64Mi")?;
    let node = world.node_of(&user)?;
    world.kubectl.shell("data", "echo before > /data/a && sync")?;
    node.restart_kubelet()?;
    world.lab.wait_nodes_ready(Duration::from_secs(60))?;
    wait_for("exec through the new kubelet", SOON, || {
        world
            .kubectl
            .shell("data", "grep -q before /data/a && echo after > /data/b && sync")
            .map(Some)
    })?;
    world.replace_pod("data", "data", images::BUSYBOX)?;
    world
        .kubectl
        .shell("data", "grep -q before /data/a && grep -q after /data/b")
        .map(drop)
}
