//! Claims: made, used, shared, grown, deleted.

use std::fs;
use std::path::Path;
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};
use galleonfs_tests::lab::run::wait_for;
use galleonfs_tests::lab::{images, install};
use serde_json::json;

use super::world::{CLASS, SOON, World, checksum, pod};

pub fn an_ext4_claim_keeps_its_data_when_its_pod_is_replaced(world: &World) -> Result<()> {
    keeps_its_data(world, "ext4", CLASS)
}

pub fn an_xfs_claim_keeps_its_data_when_its_pod_is_replaced(world: &World) -> Result<()> {
    let parameters = json!({"csi.storage.k8s.io/fstype": "xfs"});
    let class = world.class("xfs", "WaitForFirstConsumer", "Delete", parameters)?;
    keeps_its_data(world, "xfs", &class)
}

fn keeps_its_data(world: &World, fs_type: &str, class: &str) -> Result<()> {
    world.claim("data", class, "512Mi", "Filesystem")?;
    world.pod("user", "data", images::BUSYBOX)?;
    world.kubectl.wait_ready("user", SOON)?;
    let mounts = world.kubectl.shell("user", "grep ' /data ' /proc/mounts")?;
    ensure!(
        mounts.split(' ').nth(2) == Some(fs_type),
        "/data is not {fs_type}: {mounts}"
    );
    let line = "head -c 33554432 /dev/urandom > /data/bytes && sync && sha256sum /data/bytes";
    let wrote = checksum(&world.kubectl.shell("user", line)?)?;

    world.replace_pod("user", "data", images::BUSYBOX)?;
    let read = checksum(&world.kubectl.shell("user", "sha256sum /data/bytes")?)?;
    ensure!(read == wrote, "the second pod read {read}, the first wrote {wrote}");
    Ok(())
}

pub fn a_block_claim_is_a_device_that_keeps_its_data(world: &World) -> Result<()> {
    world.claim("raw", CLASS, "256Mi", "Block")?;
    world.block_pod("user", "raw")?;
    world.kubectl.wait_ready("user", SOON)?;
    let size = world.kubectl.shell("user", "blockdev --getsize64 /dev/volume")?;
    ensure!(
        size.trim() == (256 << 20).to_string(),
        "the device has {} bytes",
        size.trim()
    );
    let line = "head -c 16777216 /dev/urandom > /tmp/b && dd if=/tmp/b of=/dev/volume bs=1M conv=fsync 2>/dev/null && sha256sum /tmp/b";
    let wrote = checksum(&world.kubectl.shell("user", line)?)?;

    world.kubectl.delete("pod", "user", SOON)?;
    world.block_pod("user", "raw")?;
    world.kubectl.wait_ready("user", SOON)?;
    let read = checksum(
        &world
            .kubectl
            .shell("user", "head -c 16777216 /dev/volume | sha256sum")?,
    )?;
    ensure!(read == wrote, "the second pod read {read}, the first wrote {wrote}");
    Ok(())
}

pub fn a_claim_is_placed_where_its_first_consumer_runs(world: &World) -> Result<()> {
    world.claim("data", CLASS, "64Mi", "Filesystem")?;
    wait_for("the claim to wait for a consumer", SOON, || {
        Ok(world
            .kubectl
            .events("data")?
            .contains("WaitForFirstConsumer")
            .then_some(()))
    })?;
    let claim = world.kubectl.json(&["get", "pvc", "data"])?;
    ensure!(
        claim["status"]["phase"] == "Pending",
        "the claim was bound before anybody used it"
    );

    let user = pod("user", &["data"], images::BUSYBOX, false, Some("node2"));
    world.kubectl.apply(&user.to_string())?;
    world.kubectl.wait_ready("user", SOON)?;
    let volume = world.volume_of("data")?;
    let affinity = volume["spec"]["nodeAffinity"].to_string();
    ensure!(
        affinity.contains("topology.galleonfs.io/node") && affinity.contains("node2"),
        "affinity: {affinity}"
    );
    let handle = volume["spec"]["csi"]["volumeHandle"].as_str().context("no handle")?;
    let replicas = world.replicas_of(handle)?;
    ensure!(
        replicas.len() == 1 && replicas[0]["spec"]["nodeName"] == "node2",
        "replicas: {replicas:?}"
    );
    Ok(())
}

pub fn an_immediate_claim_is_bound_without_a_pod(world: &World) -> Result<()> {
    let class = world.class("now", "Immediate", "Delete", json!({}))?;
    world.claim("data", &class, "64Mi", "Filesystem")?;
    world.wait_bound("data")?;
    Ok(())
}

pub fn two_pods_on_one_node_share_a_claim(world: &World) -> Result<()> {
    let first = world.claim_and_pod("first", "128Mi")?;
    // The claim's only replica decides where the second pod runs.
    world.pod("second", "first", images::BUSYBOX)?;
    let second = world.kubectl.wait_ready("second", SOON)?;
    ensure!(
        first["spec"]["nodeName"] == second["spec"]["nodeName"],
        "the pods run on different nodes"
    );
    world.kubectl.shell("first", "echo from the first > /data/a && sync")?;
    world.kubectl.shell(
        "second",
        "grep -q first /data/a && echo from the second > /data/b && sync",
    )?;
    world.kubectl.shell("first", "grep -q second /data/b")?;
    // One of them leaving must not take the volume from the other.
    world.kubectl.delete("pod", "first", SOON)?;
    world
        .kubectl
        .shell("second", "echo still here > /data/c && sync && grep -q first /data/a")?;
    Ok(())
}

pub fn deleting_a_claim_frees_its_space(world: &World) -> Result<()> {
    let user = world.claim_and_pod("data", "1Gi")?;
    let node = world.node_of(&user)?;
    let pools = node.pool_directory()?;
    let handle = world.galleon_volume_of("data")?["metadata"]["name"]
        .as_str()
        .context("no name")?
        .to_string();
    let replicas = world.replicas_of(&handle)?;
    let uid = replicas[0]["metadata"]["uid"].as_str().context("no uid")?.to_string();
    let replica = format!("/var/lib/galleonfs/pools/default/replicas/{uid}");
    node.shell(&format!("test -d {replica}"))
        .context("the replica's directory is not where it should be")?;

    world
        .kubectl
        .shell("data", "head -c 314572800 /dev/urandom > /data/bytes && sync")?;
    let full = used_bytes(&pools)?;
    let volume = world.volume_of("data")?;
    let volume = volume["metadata"]["name"].as_str().context("no name")?;
    world.kubectl.delete("pod", "data", SOON)?;
    world.kubectl.delete("pvc", "data", SOON)?;
    world.wait_gone(&world.kubectl, "pv", volume)?;
    world.wait_gone(&world.system, "galleonvolume", &handle)?;
    node.shell(&format!("test ! -e {replica}"))
        .context("the replica's directory is still there")?;
    ensure!(
        world.replicas_of(&handle)?.is_empty(),
        "a replica object is still there"
    );
    // A file's blocks are given back a moment after its name.
    wait_for("the space to be free", Duration::from_secs(30), || {
        Ok((used_bytes(&pools)? + 300_000_000 <= full).then_some(()))
    })
}

/// What the file system that holds `directory` has in use.
fn used_bytes(directory: &Path) -> Result<u64> {
    let about = nix::sys::statvfs::statvfs(directory)?;
    Ok((about.blocks() - about.blocks_free()) * about.fragment_size())
}

pub fn a_retained_volume_outlives_its_claim(world: &World) -> Result<()> {
    let class = world.class("keep", "Immediate", "Retain", json!({}))?;
    world.claim("data", &class, "64Mi", "Filesystem")?;
    world.wait_bound("data")?;
    let volume = world.volume_of("data")?;
    let (name, handle) = (&volume["metadata"]["name"], &volume["spec"]["csi"]["volumeHandle"]);
    let (name, handle) = (name.as_str().context("no name")?, handle.as_str().context("no handle")?);
    world.kubectl.delete("pvc", "data", SOON)?;
    wait_for("the volume to be released", SOON, || {
        let volume = world.kubectl.json(&["get", "pv", name])?;
        Ok((volume["status"]["phase"] == "Released").then_some(()))
    })?;
    world
        .system
        .run(&["get", "galleonvolume", handle])
        .context("our volume went with the claim")?;
    // As a user does who no longer wants it.
    world.kubectl.run(&[
        "patch",
        "pv",
        name,
        "-p",
        r#"{"spec":{"persistentVolumeReclaimPolicy":"Delete"}}"#,
    ])?;
    world.wait_gone(&world.system, "galleonvolume", handle)
}

pub fn an_xfs_claim_grows_while_its_pod_runs(world: &World) -> Result<()> {
    let parameters = json!({"csi.storage.k8s.io/fstype": "xfs"});
    let class = world.class("xfs", "WaitForFirstConsumer", "Delete", parameters)?;
    world.claim("data", &class, "512Mi", "Filesystem")?;
    world.pod("user", "data", images::BUSYBOX)?;
    world.kubectl.wait_ready("user", SOON)?;
    world.kubectl.shell("user", "echo before > /data/a && sync")?;
    grow(world, "1Gi")?;
    wait_for("the claim to have grown", SOON, || {
        let claim = world.kubectl.json(&["get", "pvc", "data"])?;
        Ok((claim["status"]["capacity"]["storage"] == "1Gi").then_some(()))
    })?;
    fill_and_compare(world, "user", 700 << 20)
}

/// A mounted ext4 grows only by the hand of a process with CAP_SYS_RESOURCE, which some machines give to nobody. At the
/// latest it follows its device when it is mounted the next time.
pub fn an_ext4_claim_has_grown_when_its_next_pod_runs(world: &World) -> Result<()> {
    world.claim_and_pod("data", "128Mi")?;
    world.kubectl.shell("data", "echo before > /data/a && sync")?;
    grow(world, "512Mi")?;
    wait_for("the volume to have grown", SOON, || {
        let volume = world.galleon_volume_of("data")?;
        Ok((volume["status"]["observedSizeBytes"] == 512 << 20).then_some(()))
    })?;
    world.replace_pod("data", "data", images::BUSYBOX)?;
    fill_and_compare(world, "data", 350 << 20)
}

fn grow(world: &World, size: &str) -> Result<()> {
    let wish = json!({"spec": {"resources": {"requests": {"storage": size}}}});
    world
        .kubectl
        .run(&["patch", "pvc", "data", "-p", &wish.to_string()])
        .map(drop)
}

/// What was there before is still there, and there is room for so much more.
fn fill_and_compare(world: &World, pod: &str, bytes: u64) -> Result<()> {
    let line = format!("head -c {bytes} /dev/zero > /data/b && sync && grep -q before /data/a && df -k /data");
    world
        .kubectl
        .shell(pod, &line)
        .context("the file system has not grown")
        .map(drop)
}

pub fn a_claim_with_an_unknown_parameter_says_which_ones_exist(world: &World) -> Result<()> {
    let class = world.class("odd", "Immediate", "Delete", json!({"colour": "green"}))?;
    world.claim("data", &class, "64Mi", "Filesystem")?;
    wait_for("the claim's event", SOON, || {
        let events = world.kubectl.events("data")?;
        Ok((events.contains("colour") && events.contains("mediaType")).then_some(()))
    })
}

pub fn a_class_decides_on_blocks_sectors_and_compression(world: &World) -> Result<()> {
    let parameters = json!({"compression": "lz4", "sectorSize": "512", "noSpaceTimeoutSeconds": "60"});
    let class = world.class("packed", "WaitForFirstConsumer", "Delete", parameters)?;
    world.claim("data", &class, "512Mi", "Filesystem")?;
    world.pod("user", "data", images::BUSYBOX)?;
    let user = world.kubectl.wait_ready("user", SOON)?;
    let volume = world.galleon_volume_of("data")?;
    let (name, spec) = (&volume["metadata"]["name"], &volume["spec"]);
    ensure!(
        spec["compression"] == "lz4" && spec["blockSize"] == 16384 && spec["noSpaceTimeoutSeconds"] == 60,
        "the volume is not what its class says: {spec}"
    );
    let node = world.node_of(&user)?;
    let device = volume["status"]["device"]["path"].as_str().context("no device")?;
    let sectors = node.shell(&format!("blockdev --getss {device}"))?;
    ensure!(sectors.trim() == "512", "sectors of {sectors} bytes");

    let line = "yes 'a line of text that is the same each time' | head -c 268435456 > /data/text && sync && sha256sum /data/text";
    let wrote = checksum(&world.kubectl.shell("user", line)?)?;
    let replicas = world.replicas_of(name.as_str().context("no name")?)?;
    let uid = replicas[0]["metadata"]["uid"].as_str().context("no uid")?;
    let used = node.shell(&format!("du -sm /var/lib/galleonfs/pools/default/replicas/{uid}"))?;
    let used: u64 = used.split_whitespace().next().context("no figure")?.parse()?;
    ensure!(used < 160, "256 MiB of text take {used} MiB");

    world.replace_pod("user", "data", images::BUSYBOX)?;
    let read = checksum(&world.kubectl.shell("user", "sha256sum /data/text")?)?;
    ensure!(read == wrote, "the second pod read {read}, the first wrote {wrote}");
    Ok(())
}

pub fn the_examples_and_the_charts_own_test_work(world: &World) -> Result<()> {
    let examples = world.lab.layout().checkout().join("deploy/examples");
    for entry in fs::read_dir(&examples)? {
        world.kubectl.apply_file(&entry?.path())?;
    }
    world.stray("storageclass", "galleonfs-xfs");
    wait_for("the example pods", Duration::from_secs(180), || {
        let pods = world.kubectl.json(&["get", "pods"])?;
        let pods = pods["items"].as_array().cloned().unwrap_or_default();
        let ready = |pod: &serde_json::Value| galleonfs_tests::lab::kubectl::condition(pod, "Ready");
        Ok((pods.len() >= 4 && pods.iter().all(ready)).then_some(()))
    })?;
    let kubeconfig = world.kubectl.kubeconfig();
    let test = [
        "test",
        install::RELEASE,
        "--namespace",
        install::NAMESPACE,
        "--timeout",
        "180s",
    ];
    let said = install::helm(world.lab.binaries(), kubeconfig, &test)?;
    if !said.contains("Succeeded") {
        bail!("helm test did not succeed:\n{said}");
    }
    world
        .kubectl
        .run(&["delete", "statefulset", "--all", "--timeout=120s"])
        .map(drop)
}
