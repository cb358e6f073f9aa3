//! Pools that cannot be used: each says why, in its own words, and takes no replicas.

use std::time::Duration;

use anyhow::{Context, Result, ensure};
use galleonfs_tests::lab::Node;
use galleonfs_tests::lab::run::wait_for;
use serde_json::{Value, json};

use super::world::{SOON, World};

/// Nodes look at their pools every ten seconds.
const LOOKED_AT: Duration = Duration::from_secs(60);

/// Where the node keeps pools, and where the directories of this test are.
const OWN: &str = "/var/lib/galleonfs";
const HERE: &str = "/var/lib/galleonfs/bad";

struct Bad {
    name: &'static str,
    path: String,
    /// Run on the node to make it so.
    prepare: String,
    /// What its condition must say: the reason, and words of the text.
    reason: &'static str,
    says: &'static str,
}

pub fn a_pool_that_cannot_be_used_says_why_and_takes_no_replicas(world: &World) -> Result<()> {
    let node = world.lab.node("node1")?;
    let bad = bad_pools();
    let outcome = prepared(world, &node, &bad).and_then(|()| {
        for bad in &bad {
            refused(world, &node, bad).with_context(|| format!("the pool `{}`", bad.name))?;
        }
        Ok(())
    });
    for Bad { name, .. } in &bad {
        let name = format!("{name}.{}", node.name());
        world.system.delete("storagepool", &name, SOON)?;
    }
    node.shell(&format!("umount {HERE}/* 2>/dev/null; rm -rf {HERE}"))
        .context("the test's mounts were not removed")?;
    outcome
}

/// Makes all of them at once: the node looks at them side by side.
fn prepared(world: &World, node: &Node, bad: &[Bad]) -> Result<()> {
    for Bad {
        name, path, prepare, ..
    } in bad
    {
        node.shell(prepare)
            .with_context(|| format!("could not prepare the pool `{name}`"))?;
        let pool = json!({
            "apiVersion": "galleonfs.io/v1alpha1",
            "kind": "StoragePool",
            "metadata": {"name": format!("{name}.{}", node.name())},
            "spec": {"pool": name, "nodeName": node.name(), "path": path, "media": "ssd"},
        });
        world.system.apply(&pool.to_string())?;
        let class = world.class(name, "Immediate", "Delete", json!({"pool": name}))?;
        world.claim(name, &class, "64Mi", "Filesystem")?;
    }
    Ok(())
}

fn refused(world: &World, node: &Node, bad: &Bad) -> Result<()> {
    let name = format!("{}.{}", bad.name, node.name());
    let condition = wait_for("the pool to be looked at", LOOKED_AT, || {
        let pool = world.system.json(&["get", "storagepool", &name])?;
        let conditions = pool["status"]["conditions"].as_array().cloned().unwrap_or_default();
        Ok(conditions.into_iter().find(|condition| condition["type"] == "Ready"))
    })?;
    let says = condition["message"].as_str().unwrap_or_default();
    ensure!(
        condition["status"] == "False" && condition["reason"] == bad.reason && says.contains(bad.says),
        "it says {condition}, and not {} with {:?}",
        bad.reason,
        bad.says
    );
    // Who made the claim reads the same there.
    wait_for("the claim to say so", SOON, || {
        Ok(world.kubectl.events(bad.name)?.contains(bad.says).then_some(()))
    })?;
    let replicas = world.system.json(&["get", "galleonreplicas"])?;
    let here = |replica: &Value| replica["spec"]["poolName"] == *name;
    ensure!(
        !replicas["items"].as_array().into_iter().flatten().any(here),
        "a replica was placed there"
    );
    Ok(())
}

fn bad_pools() -> [Bad; 6] {
    let at = |name: &str| format!("{HERE}/{name}");
    let disk = |name: &str| format!("mkdir -p {HERE}/{name} && mount -t tmpfs -o size=96m tmpfs {HERE}/{name}");
    [
        Bad {
            name: "missing",
            path: "/mnt/no-such-disk".to_string(),
            prepare: "test ! -e /mnt/no-such-disk".to_string(),
            reason: "PathMissing",
            says: "mount the disk there or make the directory",
        },
        Bad {
            name: "file",
            path: at("file"),
            prepare: format!("mkdir -p {HERE} && touch {HERE}/file"),
            reason: "NotADirectory",
            says: "is not a directory",
        },
        Bad {
            name: "full",
            path: at("full/pool"),
            // Until nothing fits any more, not even our label.
            prepare: format!(
                "{} && mkdir {HERE}/full/pool && ! cat /dev/zero > {HERE}/full/filler 2>/dev/null",
                disk("full")
            ),
            reason: "DiskFull",
            says: "make room or grow it",
        },
        Bad {
            name: "readonly",
            path: at("readonly"),
            prepare: format!("{} && mount -o remount,ro {HERE}/readonly", disk("readonly")),
            reason: "ReadOnly",
            says: "mount it writable",
        },
        Bad {
            name: "foreign",
            path: at("foreign"),
            prepare: format!(
                "{} && sed 's/\"clusterId\": *\"[^\"]*\"/\"clusterId\":\"{OTHER_CLUSTER}\"/' {OWN}/pools/default/pool.json > {HERE}/foreign/pool.json",
                disk("foreign")
            ),
            reason: "OtherCluster",
            says: OTHER_CLUSTER,
        },
        Bad {
            name: "used",
            path: at("used"),
            prepare: format!("{} && echo mine > {HERE}/used/letter", disk("used")),
            reason: "BadLabel",
            says: "give the pool an empty directory",
        },
    ]
}

const OTHER_CLUSTER: &str = "11111111-2222-4333-8444-555555555555";
