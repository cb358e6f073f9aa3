//! ControllerPublishVolume and ControllerUnpublishVolume: the order to a node to bring a volume up, and its withdrawal.
//!
//! Publishing is done when the order stands; the node's own calls wait for the device. Unpublishing is done only when the
//! node has let go, because "unpublished" is what allows another node to take over.

use galleonfs_api::ReplicaPhase;
use kube::ResourceExt;
use tokio::time::Instant;

use super::{TRIES_MAX, World, contended, create::members};
use crate::{
    cluster::{self, replace},
    error::{Error, Kind, Result},
    plan::{
        request::{Publish, Unpublish},
        same::{self, Attach},
        upkeep,
    },
};

/// Orders a volume to a node.
pub async fn publish(world: &World, command: &Publish) -> Result<()> {
    let cluster = &world.cluster;
    let (id, node) = (&command.volume_id, &command.attach_to.node_name);
    for _ in 0..TRIES_MAX {
        let mut volume = cluster.existing_volume(id).await?;
        if same::attachment(&volume, &command.attach_to)? == Attach::Already {
            return Ok(());
        }
        if !cluster.has_node(node).await? {
            return Err(Error::new(Kind::NotFound, format!("there is no node {node:?}")));
        }
        let replicas = cluster.replicas_of(&volume).await?;
        let members = members(&volume, &replicas);
        match members.iter().find(|replica| replica.spec.node_name == *node) {
            Some(replica) if replica.phase() == ReplicaPhase::Ready => {}
            Some(replica) => return Err(Error::new(Kind::Precondition, upkeep::trouble(replica))),
            None => {
                let nodes: Vec<&str> = members.iter().map(|replica| replica.spec.node_name.as_str()).collect();
                let text = match nodes.is_empty() {
                    true => format!("volume {id} has no ready replica yet"),
                    false => format!(
                        "volume {id} has its replica on node {}, and this release uses a volume only there",
                        nodes.join(", ")
                    ),
                };
                return Err(Error::new(Kind::Precondition, text));
            }
        }
        volume.spec.attach_to = Some(command.attach_to.clone());
        if replace(&cluster.volumes, &volume).await?.is_some() {
            return Ok(());
        }
    }
    Err(contended(&format!("volume {id}")))
}

/// Withdraws a volume from a node and waits until the node has let go.
pub async fn unpublish(world: &World, command: &Unpublish, deadline: Instant) -> Result<()> {
    let cluster = &world.cluster;
    let id = &command.volume_id;
    let concerns = |node: &str| command.node_id.as_deref().is_none_or(|asked| asked == node);
    let uid = match withdraw(world, id, concerns).await? {
        Some(uid) => uid,
        None => return Ok(()),
    };
    let released = |seen: &cluster::Seen| {
        let volume = seen.volume(&cluster.namespace, id);
        volume.is_none_or(|volume| !volume.primary().is_some_and(concerns))
    };
    let mut waiter = cluster.waiter(deadline);
    loop {
        waiter.arm();
        // What was seen may be older than the attachment itself, so the last word is a fresh read.
        let volume = cluster.volume(id).await?.filter(|volume| volume.uid() == uid);
        match volume.as_ref().and_then(|volume| volume.primary()) {
            Some(primary) if concerns(primary) => {
                if !waiter.again(released).await {
                    let text =
                        format!("volume {id} is not released by node {primary} yet; waiting for its node plugin");
                    return Err(Error::new(Kind::Busy, text));
                }
            }
            _ => return Ok(()),
        }
    }
}

/// Clears the order. `None`: there is no such volume, so nobody has it.
async fn withdraw(world: &World, id: &str, concerns: impl Fn(&str) -> bool) -> Result<Option<Option<String>>> {
    for _ in 0..TRIES_MAX {
        let Some(mut volume) = world.cluster.volume(id).await? else {
            return Ok(None);
        };
        let uid = volume.uid();
        if !volume.attached_node().is_some_and(&concerns) {
            return Ok(Some(uid));
        }
        volume.spec.attach_to = None;
        if replace(&world.cluster.volumes, &volume).await?.is_some() {
            return Ok(Some(uid));
        }
    }
    Err(contended(&format!("volume {id}")))
}
