//! What a volume needs next, from what is there.
//!
//! Looked at again after every change, so each answer is small. What it refuses to do is guess: a volume without
//! replicas may be one whose creation is under way in another process, and is left to whoever creates or deletes it.

use std::collections::BTreeSet;

use galleonfs_api::{
    Condition, GalleonReplica, GalleonVolume, MEMBER_FINALIZER, ReplicaPhase, VolumeConfig, condition_type, reason,
    size,
};
use kube::ResourceExt;

use super::redundancy;

/// One thing to do for a volume.
#[derive(Debug, PartialEq)]
pub enum Step {
    /// Write the first configuration.
    WriteConfig(VolumeConfig),
    /// Tell the replicas that the volume has grown.
    GrowReplicas,
    /// Delete these replicas; their nodes free the space.
    DeleteReplicas(Vec<String>),
    /// Let the nodes remove what is marked as deleted and nobody names.
    LetGo,
    /// Let the volume go: nothing of it is left.
    DropFinalizer,
}

/// A number of replicas, as the spec has it.
pub fn count(replicas: i32) -> usize {
    usize::try_from(replicas).unwrap_or(0)
}

/// The replicas of a volume among all.
pub fn own<'a>(
    volume: &GalleonVolume,
    replicas: impl IntoIterator<Item = &'a GalleonReplica>,
) -> Vec<&'a GalleonReplica> {
    let uid = volume.uid().unwrap_or_default();
    replicas
        .into_iter()
        .filter(|replica| replica.spec.volume_uid == uid)
        .collect()
}

/// What to do now. Empty: nothing until something changes.
pub fn next(volume: &GalleonVolume, replicas: &[&GalleonReplica]) -> Option<Step> {
    if volume.is_deleting() {
        return deletion(volume, replicas);
    }
    if replicas.iter().any(|replica| is_let_go(volume, replica)) {
        return Some(Step::LetGo);
    }
    let Some(config) = volume.config() else {
        return first_config(volume, replicas).map(Step::WriteConfig);
    };
    // Of several replicas, `repair` says who is one too many.
    let surplus = surplus(volume, config, replicas);
    if !surplus.is_empty() && !volume.spec.is_replicated() {
        return Some(Step::DeleteReplicas(surplus));
    }
    let small = |replica: &&&GalleonReplica| replica.spec.size_bytes < volume.spec.size_bytes && !is_leaving(replica);
    replicas.iter().find(small).map(|_| Step::GrowReplicas)
}

fn deletion(volume: &GalleonVolume, replicas: &[&GalleonReplica]) -> Option<Step> {
    if holder(volume).is_some() {
        return None;
    }
    if replicas.is_empty() {
        return Some(Step::DropFinalizer);
    }
    let staying = replicas
        .iter()
        .filter(|replica| !is_leaving(replica))
        .map(|replica| replica.name_any());
    let staying: Vec<String> = staying.collect();
    if !staying.is_empty() {
        return Some(Step::DeleteReplicas(staying));
    }
    let kept = replicas.iter().any(|replica| is_let_go(volume, replica));
    kept.then_some(Step::LetGo)
}

/// The node that must release a volume before it may be taken apart. With several replicas it is enough that nobody is
/// ordered to serve it: a node that died as its primary never lets go, and all it could do is serve itself.
pub fn holder(volume: &GalleonVolume) -> Option<&str> {
    let serving = volume.primary().filter(|_| !volume.spec.is_replicated());
    volume.attached_node().or(serving)
}

/// Whether a replica is marked as deleted.
pub fn is_leaving(replica: &GalleonReplica) -> bool {
    replica.metadata.deletion_timestamp.is_some()
}

/// Whether the node of a replica is bound to keep its data.
pub fn is_kept(replica: &GalleonReplica) -> bool {
    replica
        .finalizers()
        .iter()
        .any(|finalizer| finalizer == MEMBER_FINALIZER)
}

/// Whether a volume that is there to stay has this replica in its configuration.
pub fn is_named(volume: &GalleonVolume, replica: &GalleonReplica) -> bool {
    let name = replica.name_any();
    !volume.is_deleting()
        && volume
            .config()
            .is_some_and(|config| members(config).any(|member| *member == name))
}

fn is_let_go(volume: &GalleonVolume, replica: &GalleonReplica) -> bool {
    is_leaving(replica) && is_kept(replica) && !is_named(volume, replica)
}

/// Every replica that a configuration names.
pub fn members(config: &VolumeConfig) -> impl Iterator<Item = &String> {
    // One that catches up is still on record as out.
    let syncing = config.syncing.iter().filter(|name| !config.out.contains_key(*name));
    config.in_sync.iter().chain(syncing).chain(config.out.keys())
}

/// The configuration of a volume of several replicas that can be repaired: it is settled and there to stay.
pub fn repairable(volume: &GalleonVolume) -> Option<&VolumeConfig> {
    let repairable = volume.spec.is_replicated() && !volume.is_deleting();
    volume.config().filter(|_| repairable)
}

/// The configuration a volume starts with, once enough replicas are ready, each on another node. From then on its places
/// are settled.
pub fn first_config(volume: &GalleonVolume, replicas: &[&GalleonReplica]) -> Option<VolumeConfig> {
    let wanted = count(volume.spec.replica_count);
    let ready = |replica: &&&GalleonReplica| replica.phase() == ReplicaPhase::Ready && !is_leaving(replica);
    let mut ready: Vec<&&GalleonReplica> = replicas.iter().filter(ready).collect();
    ready.sort_by_key(|replica| replica.name_any());
    let mut nodes = BTreeSet::new();
    ready.retain(|replica| nodes.insert(&replica.spec.node_name));
    ready.truncate(wanted);
    (wanted > 0 && ready.len() == wanted).then(|| VolumeConfig {
        in_sync: ready.into_iter().map(|replica| replica.name_any()).collect(),
        ..VolumeConfig::default()
    })
}

/// Replicas that a settled volume does not name and does not lack: what a lost race between two creations left.
fn surplus(volume: &GalleonVolume, config: &VolumeConfig, replicas: &[&GalleonReplica]) -> Vec<String> {
    if members(config).count() < count(volume.spec.replica_count) {
        return vec![];
    }
    let stranger = |replica: &&&GalleonReplica| !is_leaving(replica) && !is_named(volume, replica);
    replicas
        .iter()
        .filter(stranger)
        .map(|replica| replica.name_any())
        .collect()
}

/// The size every in-sync replica has reached.
pub fn observed_size_bytes(volume: &GalleonVolume, replicas: &[&GalleonReplica]) -> Option<i64> {
    let observed = |name: &String| {
        let replica = replicas.iter().find(|replica| replica.name_any() == *name)?;
        replica.status.as_ref()?.observed_size_bytes
    };
    volume
        .config()?
        .in_sync
        .iter()
        .map(observed)
        .collect::<Option<Vec<i64>>>()?
        .into_iter()
        .min()
}

/// What the controller says of a volume: Ready, and Sized.
pub fn conditions(volume: &GalleonVolume, replicas: &[&GalleonReplica]) -> Vec<Condition> {
    let (ready, why, message) = readiness(volume, replicas);
    let mut conditions = vec![Condition::new(condition_type::READY, ready, why, message)];
    if volume.config().is_some() {
        let wanted = volume.spec.size_bytes;
        conditions.push(match observed_size_bytes(volume, replicas) {
            Some(observed) if observed >= wanted => {
                let message = format!("{} everywhere", size::human(wanted));
                Condition::new(condition_type::SIZED, true, reason::READY, message)
            }
            observed => Condition::new(
                condition_type::SIZED,
                false,
                reason::RESIZING,
                format!("growing to {wanted} bytes; the replicas have {}", observed.unwrap_or(0)),
            ),
        });
    }
    conditions
}

fn readiness(volume: &GalleonVolume, replicas: &[&GalleonReplica]) -> (bool, &'static str, String) {
    if volume.is_deleting() {
        if let Some(node) = holder(volume) {
            return (
                false,
                reason::ATTACHED,
                format!("deletion waits until node {node} has released the volume"),
            );
        }
        let nodes: Vec<&str> = replicas.iter().map(|replica| replica.spec.node_name.as_str()).collect();
        return (
            false,
            reason::REMOVING,
            format!("replicas are being removed on: {}", nodes.join(", ")),
        );
    }
    let Some(config) = volume.config() else {
        return match replicas.first() {
            None => (
                false,
                reason::NO_REPLICA,
                "creation has not come to a replica yet; it goes on when the claim is tried again".to_string(),
            ),
            Some(replica) => (false, reason::PENDING, trouble(replica)),
        };
    };
    let least = count(volume.spec.min_in_sync());
    if config.in_sync.len() < least {
        return (
            false,
            reason::TOO_FEW_IN_SYNC,
            format!(
                "writes wait: {} replicas are in sync, and {least} are needed",
                config.in_sync.len()
            ),
        );
    }
    if redundancy::stands_too_close(volume, config, replicas) {
        let zones = redundancy::zones(config, replicas).len();
        let least = volume.spec.write_concern.min_zones();
        let text = format!("writes wait: replicas in sync stand in {zones} zones, and {least} are needed");
        return (false, reason::TOO_FEW_ZONES, text);
    }
    for name in &config.in_sync {
        match replicas.iter().find(|replica| replica.name_any() == *name) {
            None => {
                return (
                    false,
                    reason::REPLICA_NOT_READY,
                    format!("GalleonReplica {name} does not exist any more"),
                );
            }
            Some(replica) if replica.phase() != ReplicaPhase::Ready => {
                return (false, reason::REPLICA_NOT_READY, trouble(replica));
            }
            Some(_) => {}
        }
    }
    let text = match volume.spec.is_replicated() {
        true => "every replica in sync is ready",
        false => "every replica is ready",
    };
    (true, reason::READY, text.to_string())
}

/// How a replica that is not ready fares, in its node's words.
pub fn trouble(replica: &GalleonReplica) -> String {
    let (name, node) = (replica.name_any(), &replica.spec.node_name);
    match replica.trouble() {
        Some(why) => format!(
            "replica {name} on node {node} is not ready: {}: {}",
            why.reason, why.message
        ),
        None => format!(
            "replica {name} on node {node} is {:?}; waiting for the node plugin there",
            replica.phase()
        ),
    }
}

#[cfg(test)]
#[path = "upkeep_tests.rs"]
mod tests;
