//! ControllerExpandVolume: room first, then the volume's size, then its replicas'.

use galleonfs_api::{GalleonReplica, GalleonVolume, size};
use kube::ResourceExt;

use super::{TRIES_MAX, World, contended, reserve};
use crate::{
    cluster::replace,
    error::{Error, Kind, Result},
    plan::{request::Expand, upkeep},
};

/// Makes a volume larger and returns its size. The stores grow on their nodes, which NodeExpandVolume waits for.
pub async fn expand(world: &World, command: &Expand) -> Result<i64> {
    let cluster = &world.cluster;
    let id = &command.volume_id;
    for _ in 0..TRIES_MAX {
        let mut volume = cluster.existing_volume(id).await?;
        if volume.is_deleting() {
            return Err(Error::new(Kind::Precondition, format!("volume {id} is being deleted")));
        }
        let now = volume.spec.size_bytes;
        let limit = command.range.limit_bytes;
        if limit > 0 && now > limit {
            let text = format!("volume {id} has {now} bytes already and {limit} are allowed; volumes do not shrink");
            return Err(Error::new(Kind::OutOfRange, text));
        }
        let replicas = cluster.replicas_of(&volume).await?;
        let own = upkeep::own(&volume, &replicas);
        if command.range.required_bytes > now {
            for replica in &own {
                reserve::grow(world, &volume, &replica.spec.pool_name, command.range.size_bytes).await?;
            }
            volume.spec.size_bytes = command.range.size_bytes;
            match replace(&cluster.volumes, &volume).await? {
                Some(grown) => volume = grown,
                None => continue,
            }
        }
        // An earlier attempt may have come this far only.
        grow_replicas(world, &volume, &own).await?;
        return Ok(volume.spec.size_bytes);
    }
    Err(contended(&format!("volume {id}")))
}

/// Tells replicas that are smaller than their volume to grow. A lost race is left to the next look.
pub async fn grow_replicas(world: &World, volume: &GalleonVolume, replicas: &[&GalleonReplica]) -> Result<()> {
    let size_bytes = volume.spec.size_bytes;
    for replica in replicas {
        if replica.spec.size_bytes >= size_bytes || replica.metadata.deletion_timestamp.is_some() {
            continue;
        }
        reserve::grow(world, volume, &replica.spec.pool_name, size_bytes).await?;
        tracing::info!(
            volume = volume.name_any(),
            replica = replica.name_any(),
            size_bytes,
            "growing the replica"
        );
        let mut grown = GalleonReplica::clone(replica);
        grown.spec.size_bytes = size_bytes;
        grown.spec.reserved_bytes = size::reserved_bytes(size_bytes);
        replace(&world.cluster.replicas, &grown).await?;
    }
    Ok(())
}
