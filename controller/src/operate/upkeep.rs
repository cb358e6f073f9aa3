//! One step towards what a volume should be.

use std::time::Duration;

use galleonfs_api::{Condition, GalleonVolume, GalleonVolumeStatus, VOLUME_FINALIZER, condition};
use kube::{
    ResourceExt,
    api::{Patch, PatchParams},
};

use super::{
    World, expand, members,
    repair::{self, Repaired},
    reserve,
};
use crate::{
    cluster::{self, replace, replace_status},
    error::{Error, Result, is_object_missing},
    metrics::Metrics,
    plan::{
        redundancy,
        upkeep::{self, Step},
    },
};

/// Owner of the fields that the controller applies.
const FIELD_MANAGER: &str = "galleonfs-controller";

/// What a step came to.
#[derive(Clone, Debug, Eq, PartialEq)]
pub enum Progress {
    /// The volume is gone.
    Gone,
    /// Something was written, or somebody else wrote: look again.
    Acted,
    /// Nothing to do until something changes.
    Idle(Outlook),
}

/// What there is to say of a volume for which nothing can be done now.
#[derive(Clone, Debug, Default, Eq, PartialEq)]
pub struct Outlook {
    /// When to look again although nothing changed.
    pub again: Option<Duration>,
    /// Why a replica that should be replaced cannot be.
    pub stuck: Option<String>,
}

/// Looks at a volume and does the next thing it needs.
pub async fn step(world: &World, name: &str) -> Result<Progress> {
    let cluster = &world.cluster;
    // The volume before its replicas: a configuration decided on these replicas is written under this volume's version.
    let Some(mut volume) = cluster.volume(name).await? else {
        return Ok(Progress::Gone);
    };
    let replicas = cluster.replicas_of(&volume).await?;
    let own = upkeep::own(&volume, &replicas);
    let next = upkeep::next(&volume, &own);
    let mut outlook = Outlook::default();
    if matches!(next, None | Some(Step::GrowReplicas))
        && let Some(config) = upkeep::repairable(&volume)
    {
        match repair::step(world, &volume, config, &own).await? {
            Repaired::Acted => return Ok(Progress::Acted),
            Repaired::Idle { again, stuck } => outlook = Outlook { again, stuck },
        }
    }
    match next {
        None => return Ok(Progress::Idle(outlook)),
        Some(Step::WriteConfig(config)) => {
            tracing::info!(volume = name, in_sync = ?config.in_sync, "the volume is settled");
            volume.status.get_or_insert_default().config = Some(config);
            replace_status(&cluster.volumes, &volume).await?;
        }
        Some(Step::GrowReplicas) if expand::grow_replicas(world, &volume, &own).await? => {}
        Some(Step::GrowReplicas) => return Ok(Progress::Idle(outlook)),
        Some(Step::DeleteReplicas(names)) => {
            for replica in own.iter().filter(|replica| names.contains(&replica.name_any())) {
                tracing::info!(volume = name, replica = replica.name_any(), "deleting the replica");
                cluster::delete(&cluster.replicas, *replica, false).await?;
            }
        }
        Some(Step::LetGo) => {
            members::let_go(world, &volume, &own).await?;
        }
        Some(Step::DropFinalizer) => {
            reserve::release_all(world, &volume.uid().unwrap_or_default()).await?;
            volume
                .finalizers_mut()
                .retain(|finalizer| finalizer != VOLUME_FINALIZER);
            replace(&cluster.volumes, &volume).await?;
            world.unchanged.forget(&volume.uid().unwrap_or_default());
            tracing::info!(volume = name, "the volume is gone");
        }
    }
    Ok(Progress::Acted)
}

/// Writes what the controller says of a volume, if it is not what stands there.
pub async fn report(world: &World, name: &str, outlook: &Outlook, metrics: &Metrics) -> Result<()> {
    let cluster = &world.cluster;
    let Some(volume) = cluster.volume(name).await? else {
        return Ok(());
    };
    let replicas = cluster.replicas_of(&volume).await?;
    let own = upkeep::own(&volume, &replicas);
    let observed = upkeep::observed_size_bytes(&volume, &own);
    let in_sync = volume.config().map(|config| config.in_sync.len());
    let mut said = upkeep::conditions(&volume, &own);
    if let Some(config) = upkeep::repairable(&volume) {
        let wanted = upkeep::count(volume.spec.replica_count);
        let whole = config.in_sync.len() >= wanted && !redundancy::stands_too_close(&volume, config, &own);
        metrics.redundancy(name, config.in_sync.len(), wanted, whole);
        said.push(repair::at_this_moment(world, &volume, config, |circumstances| {
            redundancy::condition(&volume, config, &own, circumstances, outlook.stuck.as_deref())
        }));
    }
    if !volume.spec.is_replicated() {
        said.extend(redundancy::of_one(&volume, &own, |pool| cluster.is_failing(pool)));
    }
    let in_sync_count = in_sync.and_then(|count| i32::try_from(count).ok());
    let Some(conditions) = news(&volume, said, observed, in_sync_count) else {
        return Ok(());
    };

    let mut status = serde_json::json!({"conditions": conditions});
    if let Some(observed) = observed {
        status["observedSizeBytes"] = observed.into();
    }
    if let Some(count) = in_sync_count {
        status["inSyncCount"] = count.into();
    }
    let mut patch = cluster::status_patch::<GalleonVolume>(name, status);
    // Without this an apply would bring a deleted volume's name back as somebody else.
    patch["metadata"]["uid"] = volume.uid().into();
    let params = PatchParams::apply(FIELD_MANAGER).force();
    match cluster.volumes.patch_status(name, &params, &Patch::Apply(&patch)).await {
        Ok(_) => Ok(()),
        Err(error) if is_object_missing(&error) => Ok(()),
        Err(error) => Err(Error::api(format!("reporting on GalleonVolume {name}"), error)),
    }
}

/// The conditions to write, with their right transition times; `None` if all of it stands there already.
fn news(
    volume: &GalleonVolume,
    said: Vec<Condition>,
    observed: Option<i64>,
    in_sync_count: Option<i32>,
) -> Option<Vec<Condition>> {
    let nothing = GalleonVolumeStatus::default();
    let status = volume.status.as_ref().unwrap_or(&nothing);
    let mut conditions = status.conditions.clone();
    let mut changed = status.observed_size_bytes != observed || status.in_sync_count != in_sync_count;
    for condition in &said {
        changed |= condition::set(&mut conditions, condition.clone());
    }
    // Only our own: the others belong to the node.
    conditions.retain(|condition| said.iter().any(|ours| ours.type_ == condition.type_));
    changed.then_some(conditions)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::fixtures::{ready, replica, settled, volume};
    use galleonfs_api::{condition_type, size::GIB};

    #[test]
    fn what_stands_there_already_is_not_written_again() {
        let replica = ready(replica("v", "a", GIB));
        let mut volume = settled(volume("v"), &["v-a"]);
        let said = |volume: &GalleonVolume| upkeep::conditions(volume, &[&replica]);
        let written = news(&volume, said(&volume), Some(GIB), Some(1)).expect("all of it is new");
        let status = volume.status.as_mut().expect("it has a configuration");
        status.conditions = written;
        status.conditions.push(Condition::new(
            condition_type::ATTACHED,
            true,
            "Ready",
            "the node's own words",
        ));
        status.observed_size_bytes = Some(GIB);
        status.in_sync_count = Some(1);
        assert_eq!(news(&volume, said(&volume), Some(GIB), Some(1)), None);
        assert!(news(&volume, said(&volume), Some(GIB), Some(2)).is_some());
    }

    #[test]
    fn only_our_own_conditions_are_written() {
        let mut volume = settled(volume("v"), &["v-a"]);
        let attached = Condition::new(condition_type::ATTACHED, true, "Ready", "the node's own words");
        volume
            .status
            .as_mut()
            .expect("it has a configuration")
            .conditions
            .push(attached);
        let written = news(&volume, upkeep::conditions(&volume, &[]), None, None).expect("all of it is new");
        assert!(condition::get(&written, condition_type::ATTACHED).is_none());
        assert!(condition::get(&written, condition_type::READY).is_some());
    }
}
