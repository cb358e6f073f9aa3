//! Whether all replicas of a volume hold the same, told by `galleonfs check` from copies of their directories.

use std::process::Command;

use anyhow::{Context, Result, ensure};
use serde_json::Value;

use super::volume::{Replica, Volume, freeze_plugin};

/// On the replica's node.
const COPY: &str = "/var/lib/galleonfs/copy";

/// To be called when nobody uses the volume any more. Every block and its version must be the same in all replicas, and
/// pass its check.
pub fn compare(volume: &Volume) -> Result<()> {
    let replicas = volume.replicas()?;
    let found: Vec<Value> = replicas
        .iter()
        .map(|replica| verified(volume, replica).with_context(|| format!("replica {}", replica.name)))
        .collect::<Result<_>>()?;
    let digests: Vec<&Value> = found.iter().map(|found| &found["digest"]).collect();
    ensure!(
        digests.iter().all(|digest| digest.is_string() && *digest == digests[0]),
        "the replicas differ: {}",
        serde_json::to_string_pretty(&found)?
    );
    println!(
        "    {} replicas hold the same {} blocks",
        replicas.len(),
        found[0]["blocks"]
    );
    Ok(())
}

/// The node plugin has its replicas open for as long as they exist. So it stands still for a moment, and what is looked at
/// is a copy, as a crash in that moment would leave it.
fn verified(volume: &Volume, replica: &Replica) -> Result<Value> {
    let node = &replica.node;
    node.shell(&format!("rm -rf {COPY}"))?;
    let frozen = freeze_plugin(volume.world, node)?;
    node.shell(&format!("cp --archive --sparse=always {} {COPY}", replica.directory))?;
    frozen.thaw();
    let copy = node.pool_directory()?.join("copy");
    let output = Command::new(volume.world.program)
        .args(["check", "--json"])
        .arg(&copy)
        .output()
        .context("starting the check")?;
    node.shell(&format!("rm -rf {COPY}"))?;
    let said = String::from_utf8_lossy(&output.stderr);
    let found: Value = serde_json::from_slice(&output.stdout).with_context(|| format!("the check said: {said}"))?;
    ensure!(found["good"] == true, "it is not good: {found:#}");
    Ok(found)
}
