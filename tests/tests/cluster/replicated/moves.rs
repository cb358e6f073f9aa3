//! Claims of three replicas: made, used, moved from node to node, deleted.

use anyhow::{Context, Result, ensure};
use galleonfs_tests::lab::{Node, images};

use super::super::world::{SOON, World, checksum, claim, pod};
use super::CLASS;
use super::copies::compare;
use super::volume::{POD, Volume};

pub fn a_claim_of_three_replicas_moves_between_nodes_with_its_data(world: &World) -> Result<()> {
    let [first, second, third] = nodes(world)?;
    let mut volume = Volume::make(world, &first, "256Mi")?;
    let pv = world.volume_of(POD)?;
    ensure!(
        pv["spec"]["nodeAffinity"].is_null(),
        "it may be used only on {}",
        pv["spec"]["nodeAffinity"]
    );
    let line = "head -c 33554432 /dev/urandom > /data/a && sync && sha256sum /data/a";
    let wrote = checksum(&volume.shell(line)?)?;
    for node in [&second, &third, &first] {
        volume.move_to(node)?;
        let read = checksum(&volume.shell("sha256sum /data/a")?)?;
        ensure!(read == wrote, "{} read {read}, and {wrote} was written", node.name());
        // Each node writes, too.
        volume.shell(&format!("echo {0} > /data/{0} && sync", node.name()))?;
    }
    volume.shell("ls /data/node1 /data/node2 /data/node3")?;
    volume.end_pod()?;
    compare(&volume)?;
    deleted(world, &volume)
}

/// The claim goes, and with it all that its replicas had taken.
fn deleted(world: &World, volume: &Volume) -> Result<()> {
    let replicas = volume.replicas()?;
    for replica in &replicas {
        replica.node.shell(&format!("test -d {}", replica.directory))?;
    }
    world.kubectl.delete("pvc", POD, SOON)?;
    world.wait_gone(&world.system, "galleonvolume", &volume.name)?;
    for replica in &replicas {
        world.wait_gone(&world.system, "galleonreplica", &replica.name)?;
        let gone = replica.node.shell(&format!("test ! -e {}", replica.directory));
        gone.with_context(|| format!("the data of {} is still there", replica.name))?;
    }
    let pools = world.system.run(&["get", "storagepools", "-o", "yaml"])?;
    ensure!(
        !replicas.iter().any(|replica| pools.contains(&replica.name)),
        "there is still space reserved for a replica:\n{pools}"
    );
    Ok(())
}

pub fn a_block_claim_of_three_replicas_moves_between_nodes_with_its_data(world: &World) -> Result<()> {
    let [first, second, third] = nodes(world)?;
    world.kubectl.apply(&claim(POD, CLASS, "128Mi", "Block").to_string())?;
    let start = |node: &Node| -> Result<()> {
        let user = pod(POD, &[POD], images::BUSYBOX, true, Some(node.name()));
        world.kubectl.apply(&user.to_string())?;
        world.kubectl.wait_ready(POD, SOON).map(drop)
    };
    start(&first)?;
    // The whole device: what nobody wrote must be zeros on every node.
    let line = "head -c 16777216 /dev/urandom > /tmp/b && dd if=/tmp/b of=/dev/volume bs=1M seek=32 conv=fsync 2>/dev/null && sha256sum /dev/volume";
    let wrote = checksum(&world.kubectl.shell(POD, line)?)?;
    for node in [&second, &third] {
        world.kubectl.delete("pod", POD, SOON)?;
        start(node)?;
        let read = checksum(&world.kubectl.shell(POD, "sha256sum /dev/volume")?)?;
        ensure!(read == wrote, "{} read {read}, and {wrote} was written", node.name());
    }
    Ok(())
}

fn nodes(world: &World) -> Result<[Node; 3]> {
    world.lab.nodes().try_into().ok().context("the lab has not three nodes")
}
