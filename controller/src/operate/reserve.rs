//! Winning room in a pool against everybody else who wants it.

use galleonfs_api::{GalleonReplica, GalleonVolume, StoragePool, size};
use kube::{ResourceExt, api::PostParams};

use super::{TRIES_MAX, World, contended};
use crate::{
    cluster::{self, get, replace_status},
    error::{Error, Kind, Result, is_already_exists},
    plan::placement::{self, Wish},
};

/// Chooses a pool for a volume, reserves the room there and makes the replica `replica_name`. Returns the replica, or the
/// chosen pool's name if one of `leaving` (pools the volume is just leaving) was the only choice.
pub async fn place(
    world: &World,
    volume: &GalleonVolume,
    replica_name: &str,
    wish: &Wish<'_>,
    leaving: &[String],
) -> Result<Result<GalleonReplica, String>> {
    let cluster = &world.cluster;
    let (uid, volume_name) = (volume.uid().unwrap_or_default(), volume.name_any());
    let bytes = size::reserved_bytes(wish.size_bytes);
    let _turn = world.placing.lock().await;
    for _ in 0..TRIES_MAX {
        let (pools, replicas) = cluster.bookkeeping().await?;
        let pool = placement::choose(&pools, &replicas, |node| cluster.seen.node_trouble(node), wish)?;
        if leaving.contains(&pool.name_any()) {
            return Ok(Err(pool.name_any()));
        }
        if let Some(reserved) = placement::reserve(pool, &replicas, &uid, &volume_name, bytes)
            && replace_status(&cluster.pools, &reserved).await?.is_none()
        {
            continue;
        }
        return make_replica(world, volume, replica_name, pool, bytes).await.map(Ok);
    }
    Err(contended("the StoragePool"))
}

async fn make_replica(
    world: &World,
    volume: &GalleonVolume,
    name: &str,
    pool: &StoragePool,
    reserved_bytes: i64,
) -> Result<GalleonReplica> {
    let api = &world.cluster.replicas;
    let wanted = super::create::new_replica(volume, name, pool, reserved_bytes);
    match api.create(&PostParams::default(), &wanted).await {
        Ok(made) => Ok(made),
        Err(error) if is_already_exists(&error) => match get(api, name).await? {
            Some(other) if other.spec.volume_uid == wanted.spec.volume_uid => Ok(other),
            _ => Err(Error::new(
                Kind::Busy,
                format!("GalleonReplica {name} of an earlier volume is still being removed"),
            )),
        },
        Err(error) => Err(Error::api(format!("creating GalleonReplica {name}"), error)),
    }
}

/// Makes sure that a volume may hold `bytes` in a pool where it has a replica.
pub async fn grow(world: &World, volume: &GalleonVolume, pool_name: &str, size_bytes: i64) -> Result<()> {
    let cluster = &world.cluster;
    let (uid, volume_name) = (volume.uid().unwrap_or_default(), volume.name_any());
    let bytes = size::reserved_bytes(size_bytes);
    let _turn = world.placing.lock().await;
    for _ in 0..TRIES_MAX {
        let missing = || {
            Error::new(
                Kind::Precondition,
                format!("StoragePool {pool_name} does not exist any more"),
            )
        };
        let pool = get(&cluster.pools, pool_name).await?.ok_or_else(missing)?;
        let replicas = cluster::list(&cluster.replicas, Default::default()).await?;
        let Some(reserved) = placement::reserve(&pool, &replicas, &uid, &volume_name, bytes) else {
            return Ok(());
        };
        let free = placement::free_bytes(&pool, &replicas, Some(&uid));
        if free < bytes {
            return Err(Error::new(
                Kind::NoRoom,
                format!(
                    "volume {volume_name} cannot grow to {}: it would take {} in {pool_name}, which has {} for it",
                    size::human(size_bytes),
                    size::human(bytes),
                    size::human(free)
                ),
            ));
        }
        if replace_status(&cluster.pools, &reserved).await?.is_some() {
            return Ok(());
        }
    }
    Err(contended(&format!("StoragePool {pool_name}")))
}

/// Takes reservations back that `unwanted` picks, in one pool.
pub async fn release(world: &World, pool_name: &str, unwanted: impl Fn(&str) -> bool) -> Result<()> {
    let api = &world.cluster.pools;
    for _ in 0..TRIES_MAX {
        let Some(mut pool) = get(api, pool_name).await? else {
            return Ok(());
        };
        let Some(status) = &mut pool.status else { return Ok(()) };
        let before = status.reservations.len();
        status.reservations.retain(|uid, _| !unwanted(uid));
        if status.reservations.len() == before || replace_status(api, &pool).await?.is_some() {
            return Ok(());
        }
    }
    Err(contended(&format!("StoragePool {pool_name}")))
}

/// Takes all reservations of a volume back, wherever they are.
pub async fn release_all(world: &World, volume_uid: &str) -> Result<()> {
    for pool in cluster::list(&world.cluster.pools, Default::default()).await? {
        let holds = |pool: &StoragePool| {
            pool.status
                .iter()
                .any(|status| status.reservations.contains_key(volume_uid))
        };
        if holds(&pool) {
            release(world, &pool.name_any(), |uid| uid == volume_uid).await?;
        }
    }
    Ok(())
}
