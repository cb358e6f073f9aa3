//! CreateVolume: the volume's object first, then room, then the replicas, then the first configuration.
//!
//! ```text
//! (nothing) ──▶ GalleonVolume ──▶ reservations in pools ──▶ GalleonReplicas ──▶ all Ready ──▶ status.config
//! ```
//!
//! A request that finds any of these goes on from there ([`super::settle`]).

use std::collections::BTreeMap;

use galleonfs_api::{
    ANNOTATION_PV_NAME, ANNOTATION_PVC_NAME, ANNOTATION_PVC_NAMESPACE, GalleonReplica, GalleonReplicaSpec,
    GalleonVolume, GalleonVolumeSpec, LABEL_MANAGED_BY, LABEL_VOLUME, MANAGED_BY, MEMBER_FINALIZER, REPLICA_FINALIZER,
    StoragePool, VOLUME_FINALIZER,
};
use kube::{ResourceExt, api::PostParams};
use tokio::time::Instant;

use super::{World, settle};
use crate::{
    error::{Error, Kind, Result, is_already_exists},
    plan::{
        placement::{self, Wish},
        request::Create,
        same, upkeep,
    },
};

/// A volume that is ready for use.
#[derive(Debug)]
pub struct Created {
    pub volume: GalleonVolume,
    /// The nodes it can be used on; none are named if it can be used on all.
    pub nodes: Vec<String>,
}

/// Makes the volume or finds it, and waits until it can be used.
pub async fn create(world: &World, command: &Create, deadline: Instant) -> Result<Created> {
    let mut volume = match world.cluster.volume(&command.volume_name).await? {
        Some(volume) => volume,
        None => make_volume(world, command).await?,
    };
    same::volume(&volume, command)?;
    if volume.is_deleting() {
        let text = format!(
            "an earlier volume {} is still being deleted; try again when it is gone",
            volume.name_any()
        );
        return Err(Error::new(Kind::Busy, text));
    }
    if volume.config().is_none() {
        volume = settle::settle(world, volume, command, deadline).await?;
    }
    let replicas = world.cluster.replicas_of(&volume).await?;
    let members = members(&volume, &replicas);
    if !volume.spec.is_replicated() {
        for replica in &members {
            same::place(&volume, replica, command)?;
        }
    }
    let nodes = places(&volume, &replicas);
    Ok(Created { volume, nodes })
}

/// The nodes that a volume can be used on. None are named for one of several replicas: it can be used on all.
pub fn places<'a>(volume: &GalleonVolume, replicas: impl IntoIterator<Item = &'a GalleonReplica>) -> Vec<String> {
    if volume.spec.is_replicated() {
        return vec![];
    }
    let members = members(volume, replicas);
    members.iter().map(|replica| replica.spec.node_name.clone()).collect()
}

/// The in-sync replicas of a settled volume.
pub fn members<'a>(
    volume: &GalleonVolume,
    replicas: impl IntoIterator<Item = &'a GalleonReplica>,
) -> Vec<&'a GalleonReplica> {
    let in_sync = volume
        .config()
        .map(|config| config.in_sync.as_slice())
        .unwrap_or_default();
    replicas
        .into_iter()
        .filter(|replica| in_sync.contains(&replica.name_any()))
        .collect()
}

/// Makes the volume's object, unless it is clear already that there is no room: then nothing is left behind.
async fn make_volume(world: &World, command: &Create) -> Result<GalleonVolume> {
    let cluster = &world.cluster;
    let selector = command.class.pool_selector();
    let wish = Wish {
        size_bytes: command.range.size_bytes,
        selector: &selector,
        topology: &command.topology,
        volume_uid: None,
        avoid: &[],
        replicas: upkeep::count(command.class.replica_count),
        taken: &[],
        barred: &[],
        min_zones: command.class.write_concern().min_zones(),
        replacing: false,
    };
    let (pools, replicas) = cluster.bookkeeping().await?;
    placement::choose_all(&pools, &replicas, |node| cluster.seen.standing(node), &wish)?;

    let volume = new_volume(command);
    match cluster.volumes.create(&PostParams::default(), &volume).await {
        Ok(made) => Ok(made),
        Err(error) if is_already_exists(&error) => again(world, &command.volume_name).await,
        Err(error) => Err(Error::api(
            format!("creating GalleonVolume {}", command.volume_name),
            error,
        )),
    }
}

/// A volume that was there a moment ago. That it is not there now is no answer to a request to create it.
pub(super) async fn again(world: &World, name: &str) -> Result<GalleonVolume> {
    let gone = || {
        Error::new(
            Kind::Busy,
            format!("volume {name} was deleted while it was being created"),
        )
    };
    world.cluster.volume(name).await?.ok_or_else(gone)
}

fn new_volume(command: &Create) -> GalleonVolume {
    let spec = GalleonVolumeSpec {
        size_bytes: command.range.size_bytes,
        block_size: command.class.block_size,
        sector_size: command.class.sector_size,
        compression: command.class.compression,
        no_space_timeout_seconds: command.class.no_space_timeout_seconds,
        replica_count: command.class.replica_count,
        min_in_sync: command.class.min_in_sync,
        pool: Some(command.class.pool_selector()),
        write_concern: command.class.write_concern(),
        csi_name: command.csi_name.clone(),
        parameters: command.class.normal().clone(),
        capability: command.capability.clone(),
        attach_to: None,
        leaving: None,
    };
    let mut volume = GalleonVolume::new(&command.volume_name, spec);
    volume.finalizers_mut().push(VOLUME_FINALIZER.to_string());
    volume
        .labels_mut()
        .insert(LABEL_MANAGED_BY.to_string(), MANAGED_BY.to_string());
    let owner = &command.class.owner;
    for (key, value) in [
        (ANNOTATION_PVC_NAME, &owner.pvc_name),
        (ANNOTATION_PVC_NAMESPACE, &owner.pvc_namespace),
        (ANNOTATION_PV_NAME, &owner.pv_name),
    ] {
        if let Some(value) = value {
            volume.annotations_mut().insert(key.to_string(), value.clone());
        }
    }
    volume
}

/// The object of a replica in a pool, whose node stands in this zone.
pub fn new_replica(
    volume: &GalleonVolume,
    name: &str,
    pool: &StoragePool,
    reserved_bytes: i64,
    zone: Option<String>,
) -> GalleonReplica {
    let spec = GalleonReplicaSpec {
        volume_name: volume.name_any(),
        volume_uid: volume.uid().unwrap_or_default(),
        node_name: pool.spec.node_name.clone(),
        pool_name: pool.name_any(),
        size_bytes: volume.spec.size_bytes,
        block_size: volume.spec.block_size,
        reserved_bytes,
        zone,
        replicated: volume.spec.is_replicated(),
    };
    let mut replica = GalleonReplica::new(name, spec);
    replica.finalizers_mut().push(REPLICA_FINALIZER.to_string());
    if volume.spec.is_replicated() {
        replica.finalizers_mut().push(MEMBER_FINALIZER.to_string());
    }
    *replica.labels_mut() = BTreeMap::from([
        (LABEL_MANAGED_BY.to_string(), MANAGED_BY.to_string()),
        (LABEL_VOLUME.to_string(), volume.name_any()),
    ]);
    replica
}
