//! A volume of three replicas, attached to one node for one pod.

use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use galleonfs_tests::lab::run::wait_for;
use galleonfs_tests::lab::{Frozen, Node, images};
use serde_json::{Value, json};

use super::super::world::{SOON, World, claim, pod};
use super::{CLASS, MENDED};

/// Name of the claim, and of the pod that uses it.
pub const POD: &str = "user";

pub struct Volume<'a> {
    pub world: &'a World<'a>,
    /// Object name of our volume.
    pub name: String,
    /// Where the pod runs, and the engine that leads.
    pub primary: Node,
}

/// One of its replicas.
pub struct Replica {
    pub name: String,
    pub node: Node,
    /// On that node.
    pub directory: String,
}

impl<'a> Volume<'a> {
    /// A claim with ext4 on it and a pod with fio, on this node.
    pub fn make(world: &'a World, node: &Node, size: &str) -> Result<Self> {
        Self::of_class(world, CLASS, node, size)
    }

    pub fn of_class(world: &'a World, class: &str, node: &Node, size: &str) -> Result<Self> {
        world
            .kubectl
            .apply(&claim(POD, class, size, "Filesystem").to_string())?;
        start_pod(world, node)?;
        let object = world.galleon_volume_of(POD)?;
        let name = object["metadata"]["name"].as_str().context("no name")?.to_string();
        let volume = Self {
            world,
            name,
            primary: node.clone(),
        };
        volume.wait_in_sync()?;
        let replicas = volume.replicas()?;
        let mut nodes: Vec<&str> = replicas.iter().map(|replica| replica.node.name()).collect();
        nodes.sort_unstable();
        nodes.dedup();
        ensure!(nodes.len() == 3, "the replicas are on {nodes:?}");
        Ok(volume)
    }

    pub fn object(&self) -> Result<Value> {
        self.world.system.json(&["get", "galleonvolume", &self.name])
    }

    pub fn config(&self) -> Result<Value> {
        Ok(self.object()?["status"]["config"].clone())
    }

    pub fn replicas(&self) -> Result<Vec<Replica>> {
        let objects = self.world.replicas_of(&self.name)?;
        let replica = |object: &Value| -> Result<Replica> {
            let text = |value: &Value| value.as_str().map(str::to_string).context("a replica lacks a field");
            let pool = text(&object["spec"]["poolName"])?;
            let pool = self.world.system.json(&["get", "storagepool", &pool])?;
            let (path, uid) = (text(&pool["spec"]["path"])?, text(&object["metadata"]["uid"])?);
            Ok(Replica {
                name: text(&object["metadata"]["name"])?,
                node: self.world.lab.node(&text(&object["spec"]["nodeName"])?)?,
                directory: format!("{path}/replicas/{uid}"),
            })
        };
        objects.iter().map(replica).collect()
    }

    pub fn replica_on(&self, node: &Node) -> Result<Replica> {
        let mut replicas = self.replicas()?.into_iter();
        replicas
            .find(|replica| replica.node.name() == node.name())
            .with_context(|| format!("there is no replica on {}", node.name()))
    }

    /// The replicas on the nodes where the pod is not.
    pub fn others(&self) -> Result<[Replica; 2]> {
        let others = self.replicas()?.into_iter();
        let others: Vec<Replica> = others
            .filter(|replica| replica.node.name() != self.primary.name())
            .collect();
        others.try_into().ok().context("there are not two replicas elsewhere")
    }

    /// All three have every write. Gives how long that took.
    pub fn wait_in_sync(&self) -> Result<Duration> {
        let start = Instant::now();
        let all = wait_for("all three replicas to be in sync", MENDED, || {
            let config = self.config()?;
            let none = |field: &Value| field.as_array().is_none_or(Vec::is_empty);
            let all = config["inSync"].as_array().is_some_and(|names| names.len() == 3);
            let nobody_out = config["out"].as_object().is_none_or(|out| out.is_empty());
            Ok((all && none(&config["syncing"]) && nobody_out).then_some(()))
        });
        all.with_context(|| format!("it is {}", self.object().unwrap_or_default()["status"]))?;
        Ok(start.elapsed())
    }

    /// The volume goes on without this one.
    pub fn wait_left_behind(&self, replica: &Replica) -> Result<Duration> {
        let start = Instant::now();
        let out = wait_for(&format!("{} to be left behind", replica.name), SOON, || {
            Ok((self.config()?["out"].get(&replica.name).is_some()).then_some(()))
        });
        out.with_context(|| format!("it is {}", self.object().unwrap_or_default()["status"]))?;
        Ok(start.elapsed())
    }

    /// What the guest has written, in bytes, since its node plugin leads.
    pub fn written(&self) -> Result<u64> {
        self.figure(&self.primary, "galleonfs_volume_written_bytes_total", &self.name)
    }

    /// How many writes the slowest replica is behind what was answered.
    pub fn lag(&self) -> Result<u64> {
        self.figure(&self.primary, "galleonfs_volume_lag_writes", &self.name)
    }

    /// What was copied to a replica from others, in bytes, since its node plugin started.
    pub fn copied_to(&self, replica: &Replica) -> Result<u64> {
        self.figure(&replica.node, "galleonfs_store_copied_bytes_total", &replica.name)
    }

    /// A figure on the metrics page of a node.
    fn figure(&self, node: &Node, name: &str, of: &str) -> Result<u64> {
        let all = self.world.metrics_of(node)?;
        let figure = all.get(&format!("{name}{{volume=\"{of}\"}}"));
        Ok(*figure.with_context(|| format!("{} does not count {name} of {of}", node.name()))? as u64)
    }

    /// Requests that the device has done and those that wait in it: reads, writes, waiting. As the kernel counts, so the
    /// API server need not be there.
    pub fn device(&self) -> Result<Device> {
        let object = self.object()?;
        let path = object["status"]["device"]["path"]
            .as_str()
            .context("there is no device")?;
        let name = path.trim_start_matches("/dev/");
        Ok(Device(format!("/sys/block/{name}/stat")))
    }

    /// The pod ends, another one uses the volume on this node.
    pub fn move_to(&mut self, node: &Node) -> Result<()> {
        self.end_pod()?;
        start_pod(self.world, node)?;
        self.primary = node.clone();
        Ok(())
    }

    /// The pod ends, and nobody leads the volume any more.
    pub fn end_pod(&self) -> Result<()> {
        self.world.kubectl.delete("pod", POD, SOON)?;
        wait_for("the volume to be detached", SOON, || {
            Ok(self.config()?["primary"].is_null().then_some(()))
        })
    }

    pub fn shell(&self, line: &str) -> Result<String> {
        self.world.kubectl.shell(POD, line)
    }
}

fn start_pod(world: &World, node: &Node) -> Result<()> {
    let user = pod(POD, &[POD], images::FIO, false, Some(node.name()));
    world.kubectl.apply(&user.to_string())?;
    world.kubectl.wait_ready(POD, SOON).map(drop)
}

/// Where the kernel counts what a block device does.
pub struct Device(String);

impl Device {
    /// Writes that are done.
    pub fn writes(&self) -> Result<u64> {
        let text = std::fs::read_to_string(&self.0).with_context(|| format!("reading {}", self.0))?;
        let fifth = text.split_whitespace().nth(4).context("it has fewer fields")?;
        Ok(fifth.parse()?)
    }

    /// Until so many more writes are done.
    pub fn wait_writes(&self, more: u64) -> Result<()> {
        let from = self.writes()?;
        wait_for(&format!("{more} more writes"), SOON, || {
            Ok((self.writes()? >= from + more).then_some(()))
        })
    }

    /// Until no write is done for this long.
    pub fn wait_pause(&self, quiet: Duration) -> Result<()> {
        let (mut last, mut since) = (self.writes()?, Instant::now());
        wait_for("the writes to pause", SOON, || {
            let now = self.writes()?;
            if now != last {
                (last, since) = (now, Instant::now());
            }
            Ok((since.elapsed() >= quiet).then_some(()))
        })
    }
}

/// The node plugin stands still.
pub fn freeze_plugin(world: &World, node: &Node) -> Result<Frozen> {
    let processes = node.processes_of(&world.plugin_container(node)?);
    ensure!(!processes.is_empty(), "the plugin of {} has no process", node.name());
    Ok(Frozen::new(processes))
}

/// A node where our controller does not run, so that it can be taken away.
pub fn node_without_controller(world: &World) -> Result<Node> {
    let label = "app.kubernetes.io/component=controller";
    let pods = world.system.json(&["get", "pods", "-l", label])?;
    let used = |node: &Node| {
        let mut pods = pods["items"].as_array().into_iter().flatten();
        pods.any(|pod| pod["spec"]["nodeName"] == json!(node.name()))
    };
    let mut nodes = world.lab.nodes().into_iter();
    nodes.find(|node| !used(node)).context("a controller runs on each node")
}
