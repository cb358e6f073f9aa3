//! What is there: volumes and room.

use galleonfs_api::GalleonVolume;
use kube::ResourceExt;

use super::World;
use crate::{
    cluster,
    error::{Error, Kind, Result},
    plan::{
        placement::{self, Room},
        request::{self, Capacity, Page},
        upkeep,
    },
};

/// A volume and the nodes it can be used on; none are named if it can be used on all.
#[derive(Clone, Debug)]
pub struct Described {
    pub volume: GalleonVolume,
    pub nodes: Vec<String>,
}

/// One volume.
pub async fn volume(world: &World, id: &str) -> Result<Described> {
    let volume = world.cluster.existing_volume(id).await?;
    let replicas = world.cluster.replicas_of(&volume).await?;
    let nodes = super::create::places(&volume, &replicas);
    Ok(Described { volume, nodes })
}

/// One page of the volumes whose creation is done, and the token of the next page.
pub async fn volumes(world: &World, page: &Page) -> Result<(Vec<Described>, String)> {
    let mut volumes = cluster::list(&world.cluster.volumes, Default::default()).await?;
    volumes.retain(|volume| volume.config().is_some() && !volume.is_deleting());
    let names: Vec<(String, GalleonVolume)> = volumes.into_iter().map(|volume| (volume.name_any(), volume)).collect();
    let (entries, next) = request::cut(page, &names, |(name, _)| name);

    let replicas = match entries.is_empty() {
        true => vec![],
        false => cluster::list(&world.cluster.replicas, Default::default()).await?,
    };
    let described = entries.iter().map(|(_, volume)| Described {
        volume: volume.clone(),
        nodes: super::create::places(volume, upkeep::own(volume, &replicas)),
    });
    Ok((described.collect(), next))
}

/// How much could still be created. A hint, so what was seen last is good enough.
pub fn room(world: &World, asked: &Capacity) -> Result<Room> {
    let seen = &world.cluster.seen;
    if !seen.is_complete() {
        return Err(Error::new(
            Kind::Unavailable,
            "the pools have not been seen yet; try again",
        ));
    }
    let pools: Vec<_> = seen.pools.state().iter().map(|pool| pool.as_ref().clone()).collect();
    let replicas: Vec<_> = seen
        .replicas
        .state()
        .iter()
        .map(|replica| replica.as_ref().clone())
        .collect();
    let selector = asked.class.pool_selector();
    Ok(placement::room(
        &pools,
        &replicas,
        |node| seen.standing(node),
        &selector,
        usize::try_from(asked.class.replica_count).unwrap_or(usize::MAX),
        asked.node.as_deref(),
    ))
}
