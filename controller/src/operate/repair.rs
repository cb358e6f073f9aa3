//! Performs what `plan::repair` decides.

use std::{
    collections::HashMap,
    sync::{Mutex, PoisonError},
    time::Duration,
};

use galleonfs_api::{
    ANNOTATION_OUT_SINCE, ANNOTATION_REPLACES, GalleonReplica, GalleonVolume, OutReplica, VolumeConfig, condition,
};
use k8s_openapi::jiff::Timestamp;
use kube::ResourceExt;

use super::{World, members, reserve};
use crate::{
    cluster::{self, replace, replace_status},
    error::{Error, Kind, Result},
    plan::{
        placement::Wish,
        repair::{self, Circumstances, Repair},
        request::TopologyWish,
        upkeep::{self, is_named},
    },
};

/// How often a volume that lacks a replica is looked at without a change of its objects: nodes come and go.
const LOOK_AGAIN: Duration = Duration::from_secs(60);

/// What a repair came to.
#[derive(Debug)]
pub enum Repaired {
    /// Something was written, or somebody else wrote.
    Acted,
    /// Nothing to do now.
    Idle {
        /// When to look again although nothing changed.
        again: Option<Duration>,
        /// Why a replica that should be replaced cannot be.
        stuck: Option<String>,
    },
}

/// Since when configurations are what they are. Forgotten with the process: then it is from its start.
#[derive(Debug, Default)]
pub struct Unchanged(Mutex<HashMap<String, (VolumeConfig, Timestamp)>>);

impl Unchanged {
    /// Since when this configuration of the volume has been seen.
    fn since(&self, uid: &str, config: &VolumeConfig, now: Timestamp) -> Timestamp {
        let mut seen = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        match seen.get(uid) {
            Some((before, since)) if before == config => *since,
            _ => {
                seen.insert(uid.to_string(), (config.clone(), now));
                now
            }
        }
    }

    /// The volume is gone.
    pub fn forget(&self, uid: &str) {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).remove(uid);
    }
}

/// Calls `then` with what is true at this moment.
pub fn at_this_moment<T>(
    world: &World,
    volume: &GalleonVolume,
    config: &VolumeConfig,
    then: impl FnOnce(&Circumstances<'_>) -> T,
) -> T {
    let now = condition::now().0;
    then(&Circumstances {
        now,
        delay: world.replacement_delay,
        standing: &|node| world.cluster.seen.standing(node),
        failing: &|pool| world.cluster.is_failing(pool),
        unchanged_since: world.unchanged.since(&volume.uid().unwrap_or_default(), config, now),
    })
}

/// Does the next thing that a settled volume of several replicas needs.
pub async fn step(
    world: &World,
    volume: &GalleonVolume,
    config: &VolumeConfig,
    own: &[&GalleonReplica],
) -> Result<Repaired> {
    let cluster = &world.cluster;
    let name = volume.name_any();
    let find = |name: &str| own.iter().copied().find(|replica| replica.name_any() == name);
    let (now, next) = at_this_moment(world, volume, config, |circumstances| {
        (circumstances.now, repair::next(volume, config, own, circumstances))
    });
    match next {
        Repair::Mark { replica, out } => {
            let mut marked = find(&replica)
                .cloned()
                .unwrap_or_else(|| unreachable!("a plan names what it was given"));
            match out {
                true => drop(
                    marked
                        .annotations_mut()
                        .insert(ANNOTATION_OUT_SINCE.to_string(), now.to_string()),
                ),
                false => marked
                    .annotations_mut()
                    .retain(|key, _| key != ANNOTATION_OUT_SINCE && key != ANNOTATION_REPLACES),
            }
            replace(&cluster.replicas, &marked).await?;
        }
        Repair::GiveUp(replica) => {
            tracing::info!(volume = name, replica, in_sync = ?config.in_sync, "giving the replica up");
            change(world, volume, |config| {
                config.out.remove(&replica);
            })
            .await?;
        }
        Repair::Add(replica) => {
            tracing::info!(volume = name, replica, "adding the replica");
            change(world, volume, |config| {
                config.out.insert(replica, OutReplica::default());
            })
            .await?;
        }
        Repair::Delete(names) => {
            for replica in names.iter().filter_map(|name| find(name)) {
                tracing::info!(
                    volume = name,
                    replica = replica.name_any(),
                    "deleting a replica that nobody needs"
                );
                cluster::delete(&cluster.replicas, replica, false).await?;
            }
        }
        Repair::Leave(replica) => {
            tracing::info!(volume = name, leaving = ?replica, "who is to leave");
            let mut told = volume.clone();
            told.spec.leaving = replica;
            cluster::replace(&cluster.volumes, &told).await?;
        }
        Repair::Replace(lost) => match make(world, volume, config, own, &lost).await {
            Ok(()) => tracing::info!(volume = name, lost, "making another replica"),
            Err(error) if error.kind == Kind::NoRoom => {
                return Ok(Repaired::Idle {
                    again: Some(LOOK_AGAIN),
                    stuck: Some(error.text),
                });
            }
            Err(error) => return Err(error),
        },
        Repair::Wait(due) => {
            let due = due.map(|due| Duration::try_from(due.duration_since(now)).unwrap_or(Duration::ZERO));
            let lacking =
                config.in_sync.len() < upkeep::count(volume.spec.replica_count) || volume.spec.leaving.is_some();
            return Ok(Repaired::Idle {
                again: lacking.then(|| due.map_or(LOOK_AGAIN, |due| due.clamp(Duration::from_secs(1), LOOK_AGAIN))),
                stuck: None,
            });
        }
    }
    Ok(Repaired::Acted)
}

/// Changes the configuration, if it is still the one that was read. Otherwise the next look sees the other one.
async fn change(world: &World, volume: &GalleonVolume, change: impl FnOnce(&mut VolumeConfig)) -> Result<()> {
    let mut changed = volume.clone();
    change(changed.status.get_or_insert_default().config.get_or_insert_default());
    replace_status(&world.cluster.volumes, &changed).await?;
    Ok(())
}

/// Reserves room on another node, and makes a replica there.
async fn make(
    world: &World,
    volume: &GalleonVolume,
    config: &VolumeConfig,
    own: &[&GalleonReplica],
    lost: &str,
) -> Result<()> {
    let uid = volume.uid().unwrap_or_default();
    let named = |name: &String| upkeep::members(config).any(|member| member == name);
    let names: Vec<String> = members::free_names(volume, own)
        .into_iter()
        .filter(|name| !named(name))
        .collect();
    if names.is_empty() {
        return Err(Error::new(Kind::Busy, "earlier replicas are still being let go"));
    }
    // Where the others stand counts for zones; where the lost one stood, or one that is leaving, does not.
    let (staying, going): (Vec<&GalleonReplica>, Vec<&GalleonReplica>) = own
        .iter()
        .copied()
        .partition(|replica| is_named(volume, replica) && replica.name_any() != lost);
    let nodes = |replicas: Vec<&GalleonReplica>| -> Vec<String> {
        replicas
            .into_iter()
            .map(|replica| replica.spec.node_name.clone())
            .collect()
    };
    let (taken, barred) = (nodes(staying), nodes(going));
    let selector = volume.spec.pool.clone().unwrap_or_default();
    let wish = Wish {
        size_bytes: volume.spec.size_bytes,
        selector: &selector,
        topology: &TopologyWish::default(),
        volume_uid: Some(&uid),
        avoid: &[],
        replicas: taken.len() + 1,
        taken: &taken,
        barred: &barred,
        min_zones: volume.spec.write_concern.min_zones(),
        replacing: true,
    };
    reserve::place(world, volume, &names, &wish, &[], Some(lost))
        .await
        .map(drop)
}
