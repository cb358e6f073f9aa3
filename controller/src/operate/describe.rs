//! What is there: volumes and room.

use std::collections::BTreeMap;

use galleonfs_api::GalleonVolume;
use kube::ResourceExt;

use super::World;
use crate::{
    cluster,
    error::{Error, Kind, Result},
    plan::{
        placement::{self, Room},
        request::{self, Capacity, Page},
    },
};

/// A volume and the nodes it can be used on.
#[derive(Clone, Debug)]
pub struct Described {
    pub volume: GalleonVolume,
    pub nodes: Vec<String>,
}

/// One volume.
pub async fn volume(world: &World, id: &str) -> Result<Described> {
    let volume = world.cluster.existing_volume(id).await?;
    let replicas = world.cluster.replicas_of(&volume).await?;
    let members = super::create::members(&volume, &replicas);
    let nodes = members.iter().map(|replica| replica.spec.node_name.clone()).collect();
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
    let node_of: BTreeMap<String, &str> = replicas
        .iter()
        .map(|replica| (replica.name_any(), replica.spec.node_name.as_str()))
        .collect();
    let described = entries.iter().map(|(_, volume)| {
        let in_sync = volume
            .config()
            .map(|config| config.in_sync.as_slice())
            .unwrap_or_default();
        let nodes = in_sync
            .iter()
            .filter_map(|name| node_of.get(name))
            .map(|node| node.to_string())
            .collect();
        Described {
            volume: volume.clone(),
            nodes,
        }
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
        |node| seen.node_trouble(node),
        &selector,
        asked.node.as_deref(),
    ))
}
