//! The node that leads a volume is gone, and the volume goes on elsewhere. Then the node comes back.

use std::fs;
use std::path::PathBuf;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use galleonfs_tests::lab::run::wait_for;
use galleonfs_tests::lab::{Kubectl, Node, images};

use super::super::world::{SOON, World, checksum, pod};
use super::copies::compare;
use super::volume::{POD, Volume, node_without_controller};

/// Kubernetes looks at silent nodes after 20 s here, and at pods to be given up every 20 s.
const MOVED: Duration = Duration::from_secs(180);

/// Writes its numbers, one page each, and notes in /tmp/acked each one that was flushed, until that fails.
const WRITER: &str = "i=0; while printf \"%4095s\\n\" $i | dd of=/data/log bs=4096 seek=$i conv=notrunc,fsync \
    2>>/tmp/error; do echo $i >> /tmp/acked; i=$((i+1)); done; touch /tmp/failed";
/// The file is there before, so that a flushed page needs nothing else.
const LOG_PAGES: usize = 16384;
const ACKED_MIN: usize = 50;

pub fn a_volume_moves_away_from_a_frozen_node_which_then_writes_nothing(world: &World) -> Result<()> {
    let old = node_without_controller(world)?;
    let mut nodes = world.lab.nodes().into_iter();
    let new = nodes
        .find(|node| node.name() != old.name())
        .context("there is one node")?;
    let volume = Volume::make(world, &old, "256Mi")?;
    let prepare = format!(
        "dd if=/dev/zero of=/data/log bs=4096 count={LOG_PAGES} 2>/dev/null && head -c 8388608 /dev/urandom > /data/a \
         && sync && sha256sum /data/a"
    );
    let wrote = checksum(&volume.shell(&prepare)?)?;
    volume.shell(&format!("setsid sh -c '{WRITER}' >/dev/null 2>&1 </dev/null &"))?;
    let writer = Writer::find(world, &old)?;
    wait_for("some pages to be written", SOON, || {
        Ok((writer.acked()? >= ACKED_MIN).then_some(()))
    })?;

    let frozen = old.freeze()?;
    let alone = world.lab.isolate(&old)?;
    let given_up = GivenUp::new(world, &old)?;
    let epoch = volume.config()?["epoch"].as_i64().context("there is no epoch")?;
    let here = pod(POD, &[POD], images::FIO, false, Some(new.name()));
    world.kubectl.apply(&here.to_string())?;
    world.kubectl.wait_ready(POD, MOVED)?;
    let found = checksum(&volume.shell("sha256sum /data/a")?)?;
    ensure!(found == wrote, "{found} was found, and {wrote} was written");
    let seen = pages(&volume)?;
    ensure!(
        seen >= writer.acked()?,
        "of {} flushed pages {seen} are there",
        writer.acked()?
    );
    // Not `sync`: the nodes share a kernel, and it would wait for the frozen one's file system, too.
    volume.shell("echo new | dd of=/data/b conv=fsync 2>/dev/null")?;
    let config = volume.config()?;
    ensure!(
        config["primary"] == new.name() && config["epoch"].as_i64() > Some(epoch),
        "the volume is led by {config}"
    );

    // Awake, among its replicas, and without anybody who tells it.
    let hidden = world.lab.hide_api_server(&old)?;
    alone.heal()?;
    frozen.thaw();
    wait_for("the writer on the old node to fail", SOON, || {
        Ok(writer.failed().then_some(()))
    })?;
    let acked = writer.acked()?;
    ensure!(
        acked <= seen,
        "{acked} pages were flushed on the old node, and the new one found {seen}"
    );
    println!(
        "    {seen} pages were found on {}, and {acked} had been flushed on {}",
        new.name(),
        old.name()
    );
    let found = checksum(&volume.shell("grep -q new /data/b && sha256sum /data/a")?)?;
    ensure!(
        found == wrote && pages(&volume)? == seen,
        "the new node's data has changed"
    );

    hidden.heal()?;
    given_up.remove()?;
    world.lab.wait_nodes_ready(SOON)?;
    volume.wait_in_sync()?;
    volume.end_pod()?;
    compare(&volume)
}

/// How many pages of the log are there, as the pod sees it.
fn pages(volume: &Volume) -> Result<usize> {
    let said = volume.shell("tr -d '\\000 ' < /data/log | wc -l")?;
    Ok(said.trim().parse()?)
}

/// What the writer notes, read without the API server.
struct Writer(PathBuf);

impl Writer {
    fn find(world: &World, node: &Node) -> Result<Self> {
        let pod = world.kubectl.json(&["get", "pod", POD])?;
        let uid = pod["metadata"]["uid"].as_str().context("the pod has no uid")?;
        wait_for("the writer to begin", SOON, || {
            let mut roots = node
                .processes_of(uid)
                .into_iter()
                .map(|process| PathBuf::from(format!("/proc/{}/root/tmp", process.pid)));
            Ok(roots.find(|root| root.join("acked").exists()).map(Self))
        })
    }

    fn acked(&self) -> Result<usize> {
        Ok(fs::read_to_string(self.0.join("acked"))?.lines().count())
    }

    fn failed(&self) -> bool {
        self.0.join("failed").exists()
    }
}

/// A person has said that the node is gone: Kubernetes gives up its pods and lets others have their volumes.
struct GivenUp {
    kubectl: Kubectl,
    node: String,
}

const TAINT: &str = "node.kubernetes.io/out-of-service";

impl GivenUp {
    fn new(world: &World, node: &Node) -> Result<Self> {
        let given_up = Self {
            kubectl: world.kubectl.clone(),
            node: node.name().to_string(),
        };
        given_up.taint(&format!("{TAINT}=nodeshutdown:NoExecute"))?;
        let delete = [
            "delete",
            "pod",
            POD,
            "--force",
            "--grace-period=0",
            "--ignore-not-found",
        ];
        given_up.kubectl.run(&delete)?;
        Ok(given_up)
    }

    fn taint(&self, taint: &str) -> Result<()> {
        self.kubectl
            .run(&["taint", "node", &self.node, taint, "--overwrite"])
            .map(drop)
    }

    fn remove(self) -> Result<()> {
        self.taint(&format!("{TAINT}-"))
    }
}

impl Drop for GivenUp {
    fn drop(&mut self) {
        // There may be none any more.
        let _ = self.taint(&format!("{TAINT}-"));
    }
}
