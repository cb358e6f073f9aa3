//! CreateVolume: the volume's object first, then room, then the replica, then the first configuration.
//!
//! ```text
//! (nothing) ──▶ GalleonVolume ──▶ reservation in a pool ──▶ GalleonReplica ──▶ Ready ──▶ status.config
//! ```
//!
//! A request that finds any of these goes on from there. Until there is a configuration the place is not settled: a
//! replica that failed, or lies where a repeated request does not allow it, is replaced by one elsewhere. Afterwards the
//! volume has a life of its own.

use std::collections::BTreeMap;

use galleonfs_api::{
    ANNOTATION_PV_NAME, ANNOTATION_PVC_NAME, ANNOTATION_PVC_NAMESPACE, GalleonReplica, GalleonReplicaSpec,
    GalleonVolume, GalleonVolumeSpec, LABEL_MANAGED_BY, LABEL_VOLUME, MANAGED_BY, REPLICA_FINALIZER, ReplicaPhase,
    StoragePool, VOLUME_FINALIZER, name, volume::REPLICAS_MAX,
};
use kube::{ResourceExt, api::PostParams};
use tokio::time::Instant;

use super::{World, reserve};
use crate::{
    cluster::{self, Seen, get, replace_status},
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
    /// The nodes it can be used on.
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
        volume = settle(world, volume, command, deadline).await?;
    }
    let replicas = world.cluster.replicas_of(&volume).await?;
    let members = members(&volume, &replicas);
    for replica in &members {
        same::place(&volume, replica, command)?;
    }
    let nodes = members.iter().map(|replica| replica.spec.node_name.clone()).collect();
    Ok(Created { volume, nodes })
}

/// The in-sync replicas of a settled volume.
pub fn members<'a>(volume: &GalleonVolume, replicas: &'a [GalleonReplica]) -> Vec<&'a GalleonReplica> {
    let in_sync = volume
        .config()
        .map(|config| config.in_sync.as_slice())
        .unwrap_or_default();
    replicas
        .iter()
        .filter(|replica| in_sync.contains(&replica.name_any()))
        .collect()
}

/// Makes the volume's object, unless it is clear already that there is no room: then nothing is left behind.
async fn make_volume(world: &World, command: &Create) -> Result<GalleonVolume> {
    let cluster = &world.cluster;
    let selector = command.class.pool_selector();
    let wish = wish(command, &selector, command.range.size_bytes, None, &[]);
    let (pools, replicas) = cluster.bookkeeping().await?;
    placement::choose(&pools, &replicas, |node| cluster.seen.node_trouble(node), &wish)?;

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
async fn again(world: &World, name: &str) -> Result<GalleonVolume> {
    let gone = || {
        Error::new(
            Kind::Busy,
            format!("volume {name} was deleted while it was being created"),
        )
    };
    world.cluster.volume(name).await?.ok_or_else(gone)
}

fn wish<'a>(
    command: &'a Create,
    selector: &'a galleonfs_api::PoolSelector,
    size_bytes: i64,
    volume_uid: Option<&'a str>,
    avoid: &'a [String],
) -> Wish<'a> {
    Wish {
        size_bytes,
        selector,
        topology: &command.topology,
        volume_uid,
        avoid,
    }
}

fn new_volume(command: &Create) -> GalleonVolume {
    let spec = GalleonVolumeSpec {
        size_bytes: command.range.size_bytes,
        block_size: command.class.block_size,
        sector_size: command.class.sector_size,
        compression: command.class.compression,
        no_space_timeout_seconds: command.class.no_space_timeout_seconds,
        replica_count: command.class.replica_count,
        pool: Some(command.class.pool_selector()),
        write_concern: command.class.write_concern(),
        csi_name: command.csi_name.clone(),
        parameters: command.class.normal().clone(),
        capability: command.capability.clone(),
        attach_to: None,
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

/// The object of a replica in a pool.
pub fn new_replica(volume: &GalleonVolume, name: &str, pool: &StoragePool, reserved_bytes: i64) -> GalleonReplica {
    let spec = GalleonReplicaSpec {
        volume_name: volume.name_any(),
        volume_uid: volume.uid().unwrap_or_default(),
        node_name: pool.spec.node_name.clone(),
        pool_name: pool.name_any(),
        size_bytes: volume.spec.size_bytes,
        block_size: volume.spec.block_size,
        reserved_bytes,
        replicated: false,
    };
    let mut replica = GalleonReplica::new(name, spec);
    replica.finalizers_mut().push(REPLICA_FINALIZER.to_string());
    *replica.labels_mut() = BTreeMap::from([
        (LABEL_MANAGED_BY.to_string(), MANAGED_BY.to_string()),
        (LABEL_VOLUME.to_string(), volume.name_any()),
    ]);
    replica
}

/// Goes on until the volume has its first configuration.
async fn settle(
    world: &World,
    mut volume: GalleonVolume,
    command: &Create,
    deadline: Instant,
) -> Result<GalleonVolume> {
    let cluster = &world.cluster;
    loop {
        let replicas = cluster.replicas_of(&volume).await?;
        let replica = match replicas.iter().find(|replica| is_usable(replica, command)) {
            Some(replica) => replica.clone(),
            None => match replace_replica(world, &volume, &replicas, command, deadline).await? {
                Some(replica) => replica,
                None => continue,
            },
        };
        match await_replica(world, &volume, &replica, deadline).await? {
            Some(Awaited::Settled(settled)) => return Ok(settled),
            Some(Awaited::LookAgain(fresh)) => volume = fresh,
            None => return Err(Error::new(Kind::Busy, upkeep::trouble(&latest(world, replica)))),
        }
    }
}

/// Whether this attempt goes on with a replica that an earlier one made. A ready one may become the volume's at any
/// moment by the hand of the reconcile loop, so it is never taken away.
fn is_usable(replica: &GalleonReplica, command: &Create) -> bool {
    replica.metadata.deletion_timestamp.is_none()
        && match replica.phase() {
            ReplicaPhase::Ready => true,
            ReplicaPhase::Pending => command.topology.allows(&replica.spec.node_name),
            ReplicaPhase::Failed | ReplicaPhase::Removing => false,
        }
}

/// Removes the unusable replicas of an unsettled volume and makes a new one. `None`: look again.
async fn replace_replica(
    world: &World,
    volume: &GalleonVolume,
    unusable: &[GalleonReplica],
    command: &Create,
    deadline: Instant,
) -> Result<Option<GalleonReplica>> {
    let cluster = &world.cluster;
    for replica in unusable
        .iter()
        .filter(|replica| replica.metadata.deletion_timestamp.is_none())
    {
        tracing::info!(
            replica = replica.name_any(),
            "{}; replacing it",
            upkeep::trouble(replica)
        );
        // Only as it was read: if it became ready meanwhile, the volume may have settled on it.
        if !cluster::delete(&cluster.replicas, replica, true).await? {
            return Ok(None);
        }
    }
    let uid = volume.uid().unwrap_or_default();
    let free_name = (0..REPLICAS_MAX as u32)
        .map(|slot| name::replica(&volume.name_any(), &uid, slot))
        .find(|name| unusable.iter().all(|replica| replica.name_any() != *name));
    let leaving: Vec<String> = unusable.iter().map(|replica| replica.spec.pool_name.clone()).collect();
    let selector = volume.spec.pool.clone().unwrap_or_default();
    let wish = wish(command, &selector, volume.spec.size_bytes, Some(&uid), &leaving);
    let placed = match &free_name {
        Some(name) => reserve::place(world, volume, name, &wish, &leaving).await?,
        None => Err("every pool".to_string()),
    };
    match placed {
        Ok(replica) => Ok(Some(replica)),
        Err(pool) => {
            // Two replicas of one volume would be counted twice in that pool: the old one goes first.
            await_removal(world, volume, unusable, &pool, deadline).await?;
            Ok(None)
        }
    }
}

/// Waits until one of these replicas is gone.
async fn await_removal(
    world: &World,
    volume: &GalleonVolume,
    of: &[GalleonReplica],
    pool: &str,
    deadline: Instant,
) -> Result<()> {
    let cluster = &world.cluster;
    let names: Vec<String> = of.iter().map(|replica| replica.name_any()).collect();
    let mut waiter = cluster.waiter(deadline);
    loop {
        waiter.arm();
        if cluster.replicas_of(volume).await?.len() < names.len() {
            return Ok(());
        }
        let gone = |seen: &Seen| {
            names
                .iter()
                .any(|name| seen.replica(&cluster.namespace, name).is_none())
        };
        if !waiter.again(gone).await {
            let text = format!(
                "an earlier replica of volume {} is still being removed from {pool}",
                volume.name_any()
            );
            return Err(Error::new(Kind::Busy, text));
        }
    }
}

enum Awaited {
    Settled(GalleonVolume),
    LookAgain(GalleonVolume),
}

/// Waits for a replica, and settles the volume on it once it is ready. `None`: the deadline has passed.
async fn await_replica(
    world: &World,
    volume: &GalleonVolume,
    replica: &GalleonReplica,
    deadline: Instant,
) -> Result<Option<Awaited>> {
    let cluster = &world.cluster;
    let (volume_name, replica_name) = (volume.name_any(), replica.name_any());
    let decided = |seen: &Seen| {
        let phase = seen
            .replica(&cluster.namespace, &replica_name)
            .map(|replica| replica.phase());
        let settled = seen
            .volume(&cluster.namespace, &volume_name)
            .is_some_and(|volume| volume.config().is_some());
        settled || phase != Some(ReplicaPhase::Pending)
    };
    let mut waiter = cluster.waiter(deadline);
    loop {
        waiter.arm();
        if let Some(awaited) = look_at_replica(world, volume, &replica_name).await? {
            return Ok(Some(awaited));
        }
        if !waiter.again(decided).await {
            return Ok(None);
        }
    }
}

/// `None`: not ready yet.
async fn look_at_replica(world: &World, volume: &GalleonVolume, replica_name: &str) -> Result<Option<Awaited>> {
    let cluster = &world.cluster;
    let volume_name = volume.name_any();
    let fresh = cluster
        .volume(&volume_name)
        .await?
        .filter(|fresh| fresh.uid() == volume.uid());
    let Some(mut fresh) = fresh.filter(|fresh| !fresh.is_deleting()) else {
        return Err(Error::new(
            Kind::Busy,
            format!("volume {volume_name} was deleted while it was being created"),
        ));
    };
    if fresh.config().is_some() {
        return Ok(Some(Awaited::Settled(fresh)));
    }
    let Some(replica) = get(&cluster.replicas, replica_name).await? else {
        return Ok(Some(Awaited::LookAgain(fresh)));
    };
    if replica.metadata.deletion_timestamp.is_some() {
        return Ok(Some(Awaited::LookAgain(fresh)));
    }
    match replica.phase() {
        // Final for this attempt: a scheduler that hears this may choose another node.
        ReplicaPhase::Failed => return Err(Error::new(Kind::NoRoom, upkeep::trouble(&replica))),
        ReplicaPhase::Pending | ReplicaPhase::Removing => return Ok(None),
        ReplicaPhase::Ready => {}
    }
    let replicas = cluster.replicas_of(&fresh).await?;
    let Some(config) = upkeep::first_config(&fresh, &upkeep::own(&fresh, &replicas)) else {
        return Ok(None);
    };
    fresh.status.get_or_insert_default().config = Some(config);
    match replace_status(&cluster.volumes, &fresh).await? {
        Some(settled) => Ok(Some(Awaited::Settled(settled))),
        None => Ok(Some(Awaited::LookAgain(again(world, &volume_name).await?))),
    }
}

fn latest(world: &World, replica: GalleonReplica) -> GalleonReplica {
    let seen = world
        .cluster
        .seen
        .replica(&world.cluster.namespace, &replica.name_any());
    seen.map_or(replica, |seen| seen.as_ref().clone())
}
