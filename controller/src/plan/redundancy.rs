//! What a person is told of the copies of a volume: what a completed write is on right now, who is missing and since when,
//! and what happens next.

use std::collections::BTreeSet;

use galleonfs_api::{
    ANNOTATION_REPLACES, Condition, GalleonReplica, GalleonVolume, OutReplica, VolumeConfig, WriteConcern,
    condition_type, reason,
};
use k8s_openapi::jiff::Timestamp;
use kube::ResourceExt;

use super::{
    repair::{self, Circumstances},
    upkeep::{count, is_leaving, is_named, members},
};

/// The condition Redundant. `stuck` says why a replica that should be replaced cannot be.
pub fn condition(
    volume: &GalleonVolume,
    config: &VolumeConfig,
    replicas: &[&GalleonReplica],
    circumstances: &Circumstances<'_>,
    stuck: Option<&str>,
) -> Condition {
    let wanted = count(volume.spec.replica_count);
    let find = |name: &String| replicas.iter().copied().find(|replica| replica.name_any() == *name);
    let node_of = |name: &String| find(name).map_or_else(|| name.clone(), |replica| replica.spec.node_name.clone());
    let at = |name: &String| match find(name) {
        Some(replica) => format!("replica {name} on node {}", replica.spec.node_name),
        None => format!("replica {name}, whose object is gone,"),
    };

    let nodes: Vec<String> = config.in_sync.iter().map(node_of).collect();
    let zones = zones(config, replicas);
    let mut sentences = vec![promise(volume, &nodes, &zones)];
    sentences.extend(config.syncing.iter().map(|name| format!("{} is catching up", at(name))));
    for (name, had) in config.out.iter().filter(|(name, _)| !config.syncing.contains(name)) {
        let told = story(volume, config, find(name), had, circumstances);
        sentences.push(format!("{} {told}", at(name)));
    }
    let made = |replica: &&&GalleonReplica| !is_leaving(replica) && !is_named(volume, replica);
    let made: Vec<&&GalleonReplica> = replicas.iter().filter(made).collect();
    for replica in &made {
        let instead = replica.annotations().get(ANNOTATION_REPLACES);
        let instead = instead.map_or(String::new(), |lost| format!(" in the place of {lost}"));
        sentences.push(format!("{} is being made{instead}", at(&replica.name_any())));
    }
    for replica in replicas.iter().filter(|replica| is_leaving(replica)) {
        let name = replica.name_any();
        if config.in_sync.contains(&name) {
            sentences.push(format!(
                "{} was deleted by somebody; it stays as long as it is in sync",
                at(&name)
            ));
        }
    }
    let untrusted = |replica: &&&GalleonReplica| {
        config.in_sync.contains(&replica.name_any()) && (circumstances.failing)(&replica.spec.pool_name)
    };
    let untrusted: Vec<&&GalleonReplica> = replicas.iter().filter(untrusted).collect();
    let leaving = repair::leaving(volume, config, replicas, circumstances);
    for replica in &untrusted {
        let name = replica.name_any();
        let next = match (&leaving, stuck) {
            (Some(leaving), None) if *leaving == name && volume.primary().is_none() => {
                "it leaves when another one is in sync, for which the volume must be attached"
            }
            (Some(leaving), None) if *leaving == name => "it leaves when another one is in sync",
            (_, Some(_)) => "it stays, because there is nowhere to go",
            _ => "it stays until its turn comes",
        };
        sentences.push(format!(
            "{} is on a disk that is not to be trusted (StoragePool {}); {next}",
            at(&name),
            replica.spec.pool_name
        ));
    }
    sentences.extend(stuck.map(|why| format!("no other node can take a replica: {why}")));

    let few_zones = stands_too_close(volume, config, replicas);
    if few_zones {
        sentences.push("replicas in sync stand in too few zones: writes wait".to_string());
    }
    let redundant = nodes.len() >= wanted && !few_zones;
    let why = match redundant {
        true if stuck.is_some() => reason::NO_OTHER_NODE,
        true if !untrusted.is_empty() => reason::POOL_FAILING,
        true => reason::ALL_IN_SYNC,
        false if nodes.len() >= wanted => reason::TOO_FEW_ZONES,
        false if stuck.is_some() => reason::NO_OTHER_NODE,
        false if !config.syncing.is_empty() => reason::SYNCING,
        false if !made.is_empty() || members(config).count() > wanted => reason::REPLACING,
        false => reason::REPLICA_OUT,
    };
    Condition::new(condition_type::REDUNDANT, redundant, why, sentences.join("; "))
}

/// The zones that replicas in sync stand in, as far as these are known.
pub fn zones<'a>(config: &VolumeConfig, replicas: &[&'a GalleonReplica]) -> BTreeSet<&'a str> {
    let in_sync = |replica: &&&GalleonReplica| config.in_sync.contains(&replica.name_any());
    let zone = |replica: &&'a GalleonReplica| replica.spec.zone.as_deref();
    replicas.iter().filter(in_sync).filter_map(zone).collect()
}

/// Whether the replicas in sync stand in fewer zones than a write needs.
pub fn stands_too_close(volume: &GalleonVolume, config: &VolumeConfig, replicas: &[&GalleonReplica]) -> bool {
    let least = volume.spec.write_concern.min_zones();
    least > 1 && zones(config, replicas).len() < least
}

/// What a completed write is on right now.
fn promise(volume: &GalleonVolume, nodes: &[String], zones: &BTreeSet<&str>) -> String {
    let wanted = count(volume.spec.replica_count);
    let copies = match nodes.len() <= wanted {
        true => format!("{} of {wanted} replicas", nodes.len()),
        false => format!("{} replicas, {wanted} were asked for", nodes.len()),
    };
    let (on, at) = (nodes.join(", "), zones.iter().copied().collect::<Vec<_>>().join(", "));
    match volume.spec.write_concern {
        WriteConcern::Acknowledged => format!(
            "a completed write is on the first replica that has it, and the others follow; what was flushed is on {copies}: {on}"
        ),
        WriteConcern::Durable => format!("a completed write is on stable storage of {copies}: {on}"),
        WriteConcern::Replicated => format!("a completed write is on {copies}: {on}"),
        WriteConcern::Distributed => format!("a completed write is on {copies}: {on}, in {} zones: {at}", zones.len()),
    }
}

/// Whether it was said of a volume that no other node can take a replica of it.
pub fn is_stuck(volume: &GalleonVolume) -> bool {
    let conditions = volume.status.iter().flat_map(|status| &status.conditions);
    let mut said = conditions.filter(|said| said.type_ == condition_type::REDUNDANT);
    said.any(|said| said.reason == reason::NO_OTHER_NODE)
}

/// Whether a volume has been told of a disk that is not to be trusted: it is looked at when that changes.
pub fn is_on_failing(volume: &GalleonVolume) -> bool {
    let conditions = volume.status.iter().flat_map(|status| &status.conditions);
    let mut said = conditions.filter(|said| said.type_ == condition_type::REDUNDANT);
    volume.spec.leaving.is_some() || said.any(|said| said.reason == reason::POOL_FAILING)
}

/// The condition Redundant of a volume that has one replica, if there is something to say: nothing can be done for it
/// without a person.
pub fn of_one(
    volume: &GalleonVolume,
    replicas: &[&GalleonReplica],
    failing: impl Fn(&str) -> bool,
) -> Option<Condition> {
    let untrusted = replicas.iter().find(|replica| failing(&replica.spec.pool_name));
    if let Some(replica) = untrusted {
        let text = format!(
            "the only copy of the volume is replica {} on node {}, on a disk that is not to be trusted (StoragePool {}). \
             Nobody can replace it by itself: copy the data into another volume",
            replica.name_any(),
            replica.spec.node_name,
            replica.spec.pool_name
        );
        return Some(Condition::new(
            condition_type::REDUNDANT,
            false,
            reason::POOL_FAILING,
            text,
        ));
    }
    let text = "nothing is known against the disk of its only copy";
    is_said(volume).then(|| Condition::new(condition_type::REDUNDANT, true, reason::ALL_IN_SYNC, text))
}

/// Whether the condition Redundant is there.
fn is_said(volume: &GalleonVolume) -> bool {
    let mut conditions = volume.status.iter().flat_map(|status| &status.conditions);
    conditions.any(|said| said.type_ == condition_type::REDUNDANT)
}

/// Of one replica that is out: since when, with what, and what happens next.
fn story(
    volume: &GalleonVolume,
    config: &VolumeConfig,
    replica: Option<&GalleonReplica>,
    had: &OutReplica,
    circumstances: &Circumstances<'_>,
) -> String {
    let since = replica.and_then(repair::out_since).unwrap_or(circumstances.now);
    let has = match (had.epoch, had.flushed_seq) {
        (0, 0) => "counts on nothing that it may have".to_string(),
        (epoch, seq) => format!("surely has every write up to {epoch}.{seq}"),
    };
    let why = replica.and_then(|replica| {
        let node = &replica.spec.node_name;
        let trouble = (circumstances.standing)(node).trouble;
        let trouble = trouble.map(|trouble| format!("its node {trouble}"));
        trouble.or_else(|| {
            replica
                .trouble()
                .map(|why| format!("it failed ({}: {})", why.reason, why.message))
        })
    });
    let pool = replica.map(|replica| &replica.spec.pool_name);
    let untrusted = pool.filter(|pool| (circumstances.failing)(pool));
    let untrusted = untrusted.map(|pool| format!("its disk is not to be trusted (StoragePool {pool})"));
    let why = why.or(untrusted).map(|why| format!("; {why}")).unwrap_or_default();
    let next = match repair::due(volume, config, replica, circumstances) {
        Some(due) if due <= circumstances.now => "it is being replaced".to_string(),
        Some(due) => format!("it is replaced from {} on if it stays away", seconds(due)),
        None if volume.primary().is_none() => "it catches up when the volume is attached".to_string(),
        None => "it comes back by itself".to_string(),
    };
    format!("is out since {} and {has}{why}; {next}", seconds(since))
}

fn seconds(time: Timestamp) -> Timestamp {
    Timestamp::from_second(time.as_second()).unwrap_or(time)
}

#[cfg(test)]
#[path = "redundancy_tests.rs"]
mod tests;
