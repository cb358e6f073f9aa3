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
    sentences.extend(stuck.map(|why| format!("no other node can take a replica: {why}")));

    let few_zones = stands_too_close(volume, config, replicas);
    if few_zones {
        sentences.push("replicas in sync stand in too few zones: writes wait".to_string());
    }
    let redundant = nodes.len() >= wanted && !few_zones;
    let why = match redundant {
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
    let why = why.map(|why| format!("; {why}")).unwrap_or_default();
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
