//! How a settled volume of several replicas comes to have all of them in sync again.
//!
//! A replica that missed a write comes back by itself: the primary gives it what it lacks. One that stays away is
//! replaced after a while, so that the volume does not stay on fewer copies until somebody notices:
//!
//! ```text
//! out ──(its node is away, or it failed, for the replacement delay)──▶ lost
//! lost ──▶ another is made elsewhere ──▶ Ready ──▶ added to `out` ──(the primary)──▶ in sync ──▶ the lost one is given up
//! ```
//!
//! A replica in a pool whose disk is not to be trusted is replaced, too, without the delay: at once if it is out, and if it
//! is in sync it stays so until the other one is:
//!
//! ```text
//! in sync, in a failing pool ──▶ another is made elsewhere ──▶ Ready ──▶ added to `out` ──▶ `spec.leaving` names the old one
//!   ──(the primary)──▶ the other is in sync ──(the primary)──▶ the old one is out ──▶ it is given up
//! ```
//!
//! One at a time for each volume, so there is never more than one replica more than were asked for. If the lost one comes
//! back before the other is in sync, whoever is in sync first stays: the primary brings nobody up to date beyond what was
//! asked for. Only `out` is changed here: who is in sync is for the
//! primary to say.

use std::time::Duration;

use galleonfs_api::{
    ANNOTATION_OUT_SINCE, ANNOTATION_REPLACES, GalleonReplica, GalleonVolume, OutReplica, ReplicaPhase, VolumeConfig,
};
use k8s_openapi::jiff::Timestamp;
use kube::ResourceExt;

use super::{
    placement::Standing,
    upkeep::{count, is_leaving, is_named, members},
};

/// How long a new replica may take to be made before another node is tried.
const PENDING_MAX: Duration = Duration::from_secs(600);

/// What is true beside the objects.
pub struct Circumstances<'a> {
    pub now: Timestamp,
    /// How long a replica may stay away before it is replaced.
    pub delay: Duration,
    pub standing: &'a dyn Fn(&str) -> Standing,
    /// Whether the disk of a pool is not to be trusted.
    pub failing: &'a dyn Fn(&str) -> bool,
    /// Since when the configuration is what it is, as far as this process has seen.
    pub unchanged_since: Timestamp,
}

/// One thing to do.
#[derive(Clone, Debug, Eq, PartialEq)]
pub enum Repair {
    /// Write down on a replica that it is out from now on, or that it is not any more.
    Mark { replica: String, out: bool },
    /// Take this one out of `out`.
    GiveUp(String),
    /// Delete these: the volume neither names nor needs them.
    Delete(Vec<String>),
    /// Add this one to `out`; the primary does the rest.
    Add(String),
    /// Make another in the place of this one.
    Replace(String),
    /// Tell the primary that this one is to leave; or that all may stay.
    Leave(Option<String>),
    /// Nothing, before this time at least.
    Wait(Option<Timestamp>),
}

/// What to do now for a volume that has a configuration and is not being deleted.
pub fn next(
    volume: &GalleonVolume,
    config: &VolumeConfig,
    replicas: &[&GalleonReplica],
    circumstances: &Circumstances<'_>,
) -> Repair {
    if let Some(mark) = mark(config, replicas) {
        return mark;
    }
    let wanted = count(volume.spec.replica_count);
    let named = members(config).count();
    let (lost, next_due) = lost(volume, config, replicas, circumstances);
    let leaving = leaving(volume, config, replicas, circumstances);
    // Before anything else: whoever may stay must not be let go by mistake.
    let told = volume.spec.leaving.clone();
    if told.is_some() && told != leaving {
        return Repair::Leave(None);
    }
    if let Some(name) = given_up(config, wanted + usize::from(leaving.is_some()), named, &lost) {
        return Repair::GiveUp(name);
    }
    if leaving.is_some() && leaving != told && named > wanted {
        return Repair::Leave(leaving);
    }

    let missing = wanted.saturating_sub(named - lost.len() - usize::from(leaving.is_some()));
    let mut fresh: Vec<&GalleonReplica> = replicas
        .iter()
        .copied()
        .filter(|replica| is_fresh(volume, config, replicas, replica, circumstances))
        .collect();
    fresh.sort_by_key(|replica| (replica.phase() != ReplicaPhase::Ready, replica.name_any()));
    fresh.truncate(missing.min(1));
    let surplus: Vec<String> = replicas
        .iter()
        .filter(|replica| !is_leaving(replica) && !is_named(volume, replica))
        .map(|replica| replica.name_any())
        .filter(|name| !fresh.iter().any(|replica| replica.name_any() == *name))
        .collect();
    if !surplus.is_empty() {
        return Repair::Delete(surplus);
    }
    // One more than were asked for is on its way already.
    if missing == 0 || named > wanted {
        return Repair::Wait(next_due);
    }
    match fresh.first() {
        Some(replica) if replica.phase() == ReplicaPhase::Ready => Repair::Add(replica.name_any()),
        Some(_) => Repair::Wait(next_due),
        None => Repair::Replace(lost.first().cloned().or(leaving).unwrap_or_default()),
    }
}

/// The replica in sync that is to be replaced because of its disk: one at a time, and only while nobody is missing.
pub fn leaving(
    volume: &GalleonVolume,
    config: &VolumeConfig,
    replicas: &[&GalleonReplica],
    circumstances: &Circumstances<'_>,
) -> Option<String> {
    let wanted = count(volume.spec.replica_count);
    if config.in_sync.len() < wanted {
        return None;
    }
    let told = volume.spec.leaving.as_ref();
    let told = told.filter(|told| config.in_sync.contains(told));
    let mut untrusted: Vec<String> = replicas
        .iter()
        .filter(|replica| config.in_sync.contains(&replica.name_any()))
        .filter(|replica| (circumstances.failing)(&replica.spec.pool_name))
        .map(|replica| replica.name_any())
        .collect();
    untrusted.sort();
    // Where another one is on its way already it is gone through with, although the disk may be trusted again: that one
    // would be one too many.
    let under_way = !config.syncing.is_empty() || config.in_sync.len() > wanted;
    // One that does not come back would be waited for as the one in its place.
    let nobody_lost = lost(volume, config, replicas, circumstances).0.is_empty();
    match told {
        Some(told) if under_way || (nobody_lost && untrusted.contains(told)) => Some(told.clone()),
        _ => untrusted.into_iter().next().filter(|_| nobody_lost),
    }
}

/// Which replica's annotations do not say what the configuration says.
fn mark(config: &VolumeConfig, replicas: &[&GalleonReplica]) -> Option<Repair> {
    let staying = || replicas.iter().filter(|replica| !is_leaving(replica));
    let back = staying().find(|replica| {
        let marks = replica.annotations();
        let marked = marks.contains_key(ANNOTATION_OUT_SINCE) || marks.contains_key(ANNOTATION_REPLACES);
        marked && config.in_sync.contains(&replica.name_any())
    });
    let away = staying().find(|replica| {
        config.out.contains_key(&replica.name_any()) && !replica.annotations().contains_key(ANNOTATION_OUT_SINCE)
    });
    let mark = |replica: &&&GalleonReplica, out| Repair::Mark {
        replica: replica.name_any(),
        out,
    };
    away.as_ref()
        .map(|replica| mark(replica, true))
        .or(back.as_ref().map(|replica| mark(replica, false)))
}

/// Since when a replica is out, by its annotation.
pub fn out_since(replica: &GalleonReplica) -> Option<Timestamp> {
    replica.annotations().get(ANNOTATION_OUT_SINCE)?.parse().ok()
}

/// Replicas that are out and catch up on nothing.
fn away(config: &VolumeConfig) -> impl Iterator<Item = (&String, &OutReplica)> {
    config.out.iter().filter(|(name, _)| !config.syncing.contains(name))
}

/// The replicas that have stayed away for too long, the one with the least first; and when the next one will have.
fn lost(
    volume: &GalleonVolume,
    config: &VolumeConfig,
    replicas: &[&GalleonReplica],
    circumstances: &Circumstances<'_>,
) -> (Vec<String>, Option<Timestamp>) {
    let (mut lost, mut next_due) = (vec![], None::<Timestamp>);
    for (name, had) in away(config) {
        let replica = replicas.iter().find(|replica| replica.name_any() == *name);
        match due(volume, config, replica.copied(), circumstances) {
            Some(due) if due <= circumstances.now => lost.push(((had.epoch, had.flushed_seq, due), name.clone())),
            Some(due) => next_due = Some(next_due.map_or(due, |earlier| earlier.min(due))),
            None => {}
        }
    }
    lost.sort();
    (lost.into_iter().map(|(_, name)| name).collect(), next_due)
}

/// From when on a replica that is out counts as lost; `None`: nothing says that it will not come back.
pub fn due(
    volume: &GalleonVolume,
    config: &VolumeConfig,
    replica: Option<&GalleonReplica>,
    circumstances: &Circumstances<'_>,
) -> Option<Timestamp> {
    let Some(replica) = replica.filter(|replica| !is_leaving(replica)) else {
        // A person took it away, and it holds nothing that others do not have.
        return Some(Timestamp::MIN);
    };
    if (circumstances.failing)(&replica.spec.pool_name) {
        return Some(Timestamp::MIN);
    }
    let out = out_since(replica).unwrap_or(circumstances.now);
    let standing = (circumstances.standing)(&replica.spec.node_name);
    let node = standing.trouble.map(|_| standing.since.unwrap_or(out));
    let failed = (replica.phase() == ReplicaPhase::Failed)
        .then(|| replica.trouble().map_or(out, |why| why.last_transition_time.0));
    // A primary gives everyone it can reach what they lack, one after the other. If it is at it with nobody, and the
    // configuration stays as it is, it does not reach this one.
    let unreached = (volume.primary().is_some() && config.syncing.is_empty()).then_some(circumstances.unchanged_since);
    let since = [node, failed, unreached].into_iter().flatten().min()?.max(out);
    Some(since.checked_add(circumstances.delay).unwrap_or(Timestamp::MAX))
}

/// Who is taken out of `out`: whoever is there although enough are in sync; or one that is lost, when another was added in
/// its place and all that are not lost are in sync.
fn given_up(config: &VolumeConfig, wanted: usize, named: usize, lost: &[String]) -> Option<String> {
    let enough = config.in_sync.len() >= wanted;
    let replaced = named > wanted && config.in_sync.len() + lost.len() == named;
    match (enough, replaced) {
        (true, _) => lost
            .first()
            .or_else(|| away(config).map(|(name, _)| name).next())
            .cloned(),
        (false, true) => lost.first().cloned(),
        (false, false) => None,
    }
}

/// Whether a replica that the configuration does not name could be added: it was never part of it, and it is well.
fn is_fresh(
    volume: &GalleonVolume,
    config: &VolumeConfig,
    replicas: &[&GalleonReplica],
    replica: &GalleonReplica,
    circumstances: &Circumstances<'_>,
) -> bool {
    let node = &replica.spec.node_name;
    // The node of one that is still on record as out may be used again only after that one was given up.
    let shared = replicas
        .iter()
        .any(|other| other.spec.node_name == *node && members(config).any(|name| *name == other.name_any()));
    !is_leaving(replica)
        && !is_named(volume, replica)
        && !shared
        && !(circumstances.failing)(&replica.spec.pool_name)
        && !replica.annotations().contains_key(ANNOTATION_OUT_SINCE)
        && match replica.phase() {
            ReplicaPhase::Ready => true,
            // Its node is well and does nothing about it.
            ReplicaPhase::Pending => !replica.creation_timestamp().is_some_and(|made| {
                made.0
                    .checked_add(PENDING_MAX)
                    .is_ok_and(|late| late <= circumstances.now)
            }),
            ReplicaPhase::Failed | ReplicaPhase::Removing => false,
        }
        && (circumstances.standing)(node).trouble.is_none()
}

#[cfg(test)]
#[path = "repair_tests.rs"]
mod tests;
