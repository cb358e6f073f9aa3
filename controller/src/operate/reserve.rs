//! Winning room in a pool against everybody else who wants it.

use galleonfs_api::{ANNOTATION_REPLACES, GalleonReplica, GalleonVolume, StoragePool, size};
use kube::{ResourceExt, api::PostParams};

use super::{TRIES_MAX, World, contended};
use crate::{
    cluster::{self, get, replace_status},
    error::{Error, Kind, Result, is_already_exists},
    plan::placement::{self, Wish},
};

/// Chooses pools for the replicas that a volume lacks, reserves the room there, and then makes the replicas under the
/// first of `names`, which it returns. The name of a pool if one of `leaving` (pools the volume is just leaving) was the only choice.
pub async fn place(
    world: &World,
    volume: &GalleonVolume,
    names: &[String],
    wish: &Wish<'_>,
    leaving: &[String],
    replaces: Option<&str>,
) -> Result<Result<Vec<String>, String>> {
    let cluster = &world.cluster;
    let (uid, volume_name) = (volume.uid().unwrap_or_default(), volume.name_any());
    let bytes = size::reserved_bytes(wish.size_bytes);
    let _turn = world.placing.lock().await;
    'tries: for _ in 0..TRIES_MAX {
        let (pools, replicas) = cluster.bookkeeping().await?;
        let chosen = placement::choose_all(&pools, &replicas, |node| cluster.seen.standing(node), wish)?;
        if let Some(pool) = chosen.iter().find(|pool| leaving.contains(&pool.name_any())) {
            return Ok(Err(pool.name_any()));
        }
        // In order of their names: of two who want the same pools, the one that is first in the first wins them all.
        let mut in_order = chosen.clone();
        in_order.sort_by_key(|pool| pool.name_any());
        for pool in in_order {
            if let Some(reserved) = placement::reserve(pool, &replicas, &uid, &volume_name, bytes)
                && replace_status(&cluster.pools, &reserved).await?.is_none()
            {
                continue 'tries;
            }
        }
        let mut made = vec![];
        for (pool, name) in chosen.into_iter().zip(names) {
            let zone = cluster.seen.standing(&pool.spec.node_name).zone;
            let mut wanted = super::create::new_replica(volume, name, pool, bytes, zone);
            if let Some(replaces) = replaces {
                wanted
                    .annotations_mut()
                    .insert(ANNOTATION_REPLACES.to_string(), replaces.to_string());
            }
            make_replica(world, &wanted).await?;
            made.push(name.clone());
        }
        return Ok(Ok(made));
    }
    Err(contended("the StoragePool"))
}

/// One that is there already was made by another attempt for the same volume, maybe elsewhere: whoever asks looks again.
async fn make_replica(world: &World, wanted: &GalleonReplica) -> Result<()> {
    let (api, name) = (&world.cluster.replicas, wanted.name_any());
    match api.create(&PostParams::default(), wanted).await {
        Ok(_) => Ok(()),
        Err(error) if is_already_exists(&error) => match get(api, &name).await? {
            Some(other) if other.spec.volume_uid == wanted.spec.volume_uid => Ok(()),
            _ => Err(Error::new(
                Kind::Busy,
                format!("GalleonReplica {name} of an earlier volume is still being removed"),
            )),
        },
        Err(error) => Err(Error::api(format!("creating GalleonReplica {name}"), error)),
    }
}

/// Makes sure that a volume may hold `size_bytes` in all of these pools, where it has replicas. All or nothing: what was
/// reserved before one of them turned out to be full is given back.
pub async fn grow(world: &World, volume: &GalleonVolume, pool_names: &[&str], size_bytes: i64) -> Result<()> {
    let _turn = world.placing.lock().await;
    let mut reserved: Vec<&str> = vec![];
    let outcome = grow_each(world, volume, pool_names, size_bytes, &mut reserved).await;
    if outcome.as_ref().is_err_and(|error| error.kind == Kind::NoRoom) {
        let own = volume.uid().unwrap_or_default();
        for pool_name in reserved {
            // What a replica holds in the pool stands in its own object.
            release(world, pool_name, |uid| uid == own).await?;
        }
    }
    outcome
}

async fn grow_each<'a>(
    world: &World,
    volume: &GalleonVolume,
    pool_names: &[&'a str],
    size_bytes: i64,
    reserved: &mut Vec<&'a str>,
) -> Result<()> {
    let cluster = &world.cluster;
    let (uid, volume_name) = (volume.uid().unwrap_or_default(), volume.name_any());
    let bytes = size::reserved_bytes(size_bytes);
    'pools: for pool_name in pool_names {
        for _ in 0..TRIES_MAX {
            let missing = || {
                Error::new(
                    Kind::Precondition,
                    format!("StoragePool {pool_name} does not exist any more"),
                )
            };
            let pool = get(&cluster.pools, pool_name).await?.ok_or_else(missing)?;
            let replicas = cluster::list(&cluster.replicas, Default::default()).await?;
            let Some(changed) = placement::reserve(&pool, &replicas, &uid, &volume_name, bytes) else {
                continue 'pools;
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
            if replace_status(&cluster.pools, &changed).await?.is_some() {
                reserved.push(pool_name);
                continue 'pools;
            }
        }
        return Err(contended(&format!("StoragePool {pool_name}")));
    }
    Ok(())
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
