//! ControllerExpandVolume: room first, then the volume's size, then its replicas'.

use galleonfs_api::{GalleonReplica, GalleonVolume, VolumeConfig, size};
use kube::ResourceExt;

use super::{TRIES_MAX, World, contended, reserve};
use crate::{
    cluster::{get, replace},
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
            let pools = growing(world, &volume, &own).await?;
            reserve::grow(world, &volume, &pools, command.range.size_bytes).await?;
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

/// The pools in which a volume must have room to grow. Where a replica is out and its pool is not there any more, nothing
/// will grow: that replica is lost.
async fn growing<'a>(world: &World, volume: &GalleonVolume, replicas: &[&'a GalleonReplica]) -> Result<Vec<&'a str>> {
    let mut pools = vec![];
    for replica in replicas.iter().filter(|replica| !upkeep::is_leaving(replica)) {
        let pool_name = replica.spec.pool_name.as_str();
        let out = |config: &VolumeConfig| config.out.contains_key(&replica.name_any());
        let lost = volume.config().is_some_and(out) && get(&world.cluster.pools, pool_name).await?.is_none();
        if !lost {
            pools.push(pool_name);
        }
    }
    Ok(pools)
}

/// Tells replicas that are smaller than their volume to grow. A lost race is left to the next look. `false`: none can.
pub async fn grow_replicas(world: &World, volume: &GalleonVolume, replicas: &[&GalleonReplica]) -> Result<bool> {
    let size_bytes = volume.spec.size_bytes;
    let small: Vec<&GalleonReplica> = replicas
        .iter()
        .copied()
        .filter(|replica| replica.spec.size_bytes < size_bytes)
        .collect();
    let pools = growing(world, volume, &small).await?;
    reserve::grow(world, volume, &pools, size_bytes).await?;
    for replica in small {
        if !pools.contains(&replica.spec.pool_name.as_str()) {
            continue;
        }
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
    Ok(!pools.is_empty())
}
