//! What a volume needs next, from what is there.
//!
//! Looked at again after every change, so each answer is small. What it refuses to do is guess: a volume without
//! replicas may be one whose creation is under way in another process, and is left to whoever creates or deletes it.

use galleonfs_api::{
    Condition, GalleonReplica, GalleonVolume, ReplicaPhase, VolumeConfig, condition_type, reason, size,
};
use kube::ResourceExt;

/// One thing to do for a volume.
#[derive(Debug, PartialEq)]
pub enum Step {
    /// Write the first configuration.
    WriteConfig(VolumeConfig),
    /// Tell the replicas that the volume has grown.
    GrowReplicas,
    /// Delete these replicas; their nodes free the space.
    DeleteReplicas(Vec<String>),
    /// Let the volume go: nothing of it is left.
    DropFinalizer,
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
    let Some(config) = volume.config() else {
        return first_config(volume, replicas).map(Step::WriteConfig);
    };
    let surplus = surplus(volume, config, replicas);
    if !surplus.is_empty() {
        return Some(Step::DeleteReplicas(surplus));
    }
    let small = |replica: &&&GalleonReplica| replica.spec.size_bytes < volume.spec.size_bytes && !is_leaving(replica);
    replicas.iter().find(small).map(|_| Step::GrowReplicas)
}

fn deletion(volume: &GalleonVolume, replicas: &[&GalleonReplica]) -> Option<Step> {
    if volume.attached_node().is_some() || volume.primary().is_some() {
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
    (!staying.is_empty()).then_some(Step::DeleteReplicas(staying))
}

fn is_leaving(replica: &GalleonReplica) -> bool {
    replica.metadata.deletion_timestamp.is_some()
}

/// The configuration a volume starts with, once enough replicas are ready. From then on its place is settled.
pub fn first_config(volume: &GalleonVolume, replicas: &[&GalleonReplica]) -> Option<VolumeConfig> {
    let wanted = usize::try_from(volume.spec.replica_count).ok()?;
    let ready = |replica: &&&GalleonReplica| replica.phase() == ReplicaPhase::Ready && !is_leaving(replica);
    let mut in_sync: Vec<String> = replicas
        .iter()
        .filter(ready)
        .map(|replica| replica.name_any())
        .collect();
    in_sync.sort();
    in_sync.truncate(wanted);
    (wanted > 0 && in_sync.len() == wanted).then(|| VolumeConfig {
        in_sync,
        ..VolumeConfig::default()
    })
}

/// Replicas that a settled volume does not name and does not lack: what a lost race between two creations left.
fn surplus(volume: &GalleonVolume, config: &VolumeConfig, replicas: &[&GalleonReplica]) -> Vec<String> {
    let members = || config.in_sync.iter().chain(&config.syncing).chain(config.out.keys());
    if members().count() < usize::try_from(volume.spec.replica_count).unwrap_or(usize::MAX) {
        return vec![];
    }
    let stranger =
        |replica: &&&GalleonReplica| !is_leaving(replica) && !members().any(|name| *name == replica.name_any());
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
        if let Some(node) = volume.attached_node().or(volume.primary()) {
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
    (true, reason::READY, "every replica is ready".to_string())
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
