//! What GalleonFS costs a cluster in which nothing happens.

use std::fs;
use std::thread;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use galleonfs_tests::lab::{Node, images, install};
use serde_json::Value;

use super::world::{CLASS, SOON, World, pod};

const VOLUMES_PER_NODE: usize = 17;
const MINUTE: Duration = Duration::from_secs(60);

/// Memory of an idle node plugin that is its own. With the pages of the released program, which are the kernel's to take
/// back, it holds less than 40 MiB; those of a debug build are several times as many.
const MEMORY_MAX_BYTES: u64 = 28 << 20;
/// "No measurable CPU": less than a percent of one core for a debug program on a busy machine, which takes some times what
/// a released one does on a quiet one.
const CPU_MAX_PER_MINUTE: Duration = Duration::from_millis(600);

pub fn an_idle_cluster_with_fifty_volumes_writes_nothing_for_a_minute(world: &World) -> Result<()> {
    let nodes = world.lab.nodes();
    for node in &nodes {
        let names: Vec<String> = (0..VOLUMES_PER_NODE)
            .map(|index| format!("{}-{index}", node.name()))
            .collect();
        for name in &names {
            world.claim(name, CLASS, "16Mi", "Filesystem")?;
        }
        let claims: Vec<&str> = names.iter().map(String::as_str).collect();
        let user = pod(node.name(), &claims, images::BUSYBOX, false, Some(node.name()));
        world.kubectl.apply(&user.to_string())?;
    }
    for node in &nodes {
        world.kubectl.wait_ready(node.name(), 2 * SOON)?;
    }
    // The last attachments and capacities are still being written down.
    thread::sleep(Duration::from_secs(30));

    let log = world.lab.audit_log();
    let before = fs::metadata(&log).context("the API server keeps no audit log")?.len();
    let used: Vec<Usage> = nodes.iter().map(|node| usage(world, node)).collect::<Result<_>>()?;
    thread::sleep(MINUTE);
    let after = nodes
        .iter()
        .map(|node| usage(world, node))
        .collect::<Result<Vec<_>>>()?;
    let text = fs::read(&log)?;
    let text = String::from_utf8_lossy(&text[usize::try_from(before)?..]).into_owned();

    let writes: Vec<String> = text
        .lines()
        .filter_map(|line| serde_json::from_str(line).ok())
        .filter_map(|e| our_write(&e))
        .collect();
    ensure!(
        writes.is_empty(),
        "{} writes in an idle minute:\n{}",
        writes.len(),
        writes.join("\n")
    );
    for ((node, before), after) in nodes.iter().zip(used).zip(after) {
        let cpu = after.cpu.saturating_sub(before.cpu);
        println!(
            "    {}: {} KiB of its own, {} ms of CPU in a minute",
            node.name(),
            after.memory >> 10,
            cpu.as_millis()
        );
        ensure!(
            after.memory <= MEMORY_MAX_BYTES,
            "the plugin of {} holds {} bytes",
            node.name(),
            after.memory
        );
        ensure!(
            cpu <= CPU_MAX_PER_MINUTE,
            "the idle plugin of {} used {cpu:?} of CPU",
            node.name()
        );
    }
    Ok(())
}

/// A line about the write if it is ours. Leases are left out: whoever elects a leader renews them, by their nature.
fn our_write(event: &Value) -> Option<String> {
    let user = event["user"]["username"].as_str()?;
    let object = &event["objectRef"];
    let by_us = user.starts_with(&format!("system:serviceaccount:{}:", install::NAMESPACE));
    let to_us = object["apiGroup"] == "galleonfs.io";
    let lease = object["resource"] == "leases";
    let line = format!(
        "{user} {} {}/{} {}",
        event["verb"].as_str()?,
        object["resource"].as_str().unwrap_or_default(),
        object["name"].as_str().unwrap_or_default(),
        object["subresource"].as_str().unwrap_or_default(),
    );
    ((by_us || to_us) && !lease).then_some(line)
}

struct Usage {
    memory: u64,
    cpu: Duration,
}

fn usage(world: &World, node: &Node) -> Result<Usage> {
    let plugin = world.plugin_on(node)?;
    let id = plugin["status"]["containerStatuses"][0]["containerID"]
        .as_str()
        .context("the plugin does not run")?;
    let mut usage = Usage {
        memory: 0,
        cpu: Duration::ZERO,
    };
    for process in node.processes_of(id.trim_start_matches("containerd://")) {
        let status = fs::read_to_string(format!("/proc/{}/status", process.pid))?;
        usage.memory += (kib(&status, "RssAnon:")? + kib(&status, "RssShmem:")?) << 10;
        let stat = fs::read_to_string(format!("/proc/{}/stat", process.pid))?;
        let fields: Vec<&str> = stat[stat.rfind(')').context("odd stat")? + 2..].split(' ').collect();
        // User and system time, in ticks of a hundredth of a second.
        let ticks: u64 = fields[11].parse::<u64>()? + fields[12].parse::<u64>()?;
        usage.cpu += Duration::from_millis(ticks * 10);
    }
    ensure!(usage.memory > 0, "the plugin of {} has no process", node.name());
    Ok(usage)
}

/// A line of a process's status.
fn kib(status: &str, name: &str) -> Result<u64> {
    let line = status.lines().find_map(|line| line.strip_prefix(name));
    let value = line.with_context(|| format!("a process has no {name}"))?;
    Ok(value.trim().trim_end_matches(" kB").parse()?)
}
