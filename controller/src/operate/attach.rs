//! ControllerPublishVolume and ControllerUnpublishVolume: the order to a node to bring a volume up, and its withdrawal.
//!
//! Publishing is done when the order stands; the node's own calls wait for the device. Unpublishing is done only when the
//! node has let go, because "unpublished" is what allows another node to take over; for a volume of several replicas, also
//! when the node is lost, because the epoch keeps it from writing.

use std::time::Duration;

use galleonfs_api::{GalleonVolume, ReplicaPhase};
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

/// How long a node that seems to be well gets to end a volume of several replicas in order: a checkpoint takes a fraction.
const PATIENCE: Duration = Duration::from_secs(30);

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
            // Its primary may be anywhere, and waits by itself for replicas that are not there.
            _ if volume.spec.is_replicated() && volume.config().is_some() => {}
            Some(replica) if replica.phase() == ReplicaPhase::Ready => {}
            Some(replica) => return Err(Error::new(Kind::Precondition, upkeep::trouble(replica))),
            None => {
                let nodes: Vec<&str> = members.iter().map(|replica| replica.spec.node_name.as_str()).collect();
                let text = match nodes.is_empty() {
                    true => format!("volume {id} has no ready replica yet"),
                    false => format!(
                        "volume {id} has its one replica on node {}, and can be used only there",
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
///
/// One of several replicas is not waited for where nobody may be left to let go: the next epoch shuts the node out, so all
/// that the wait is for is an orderly end.
pub async fn unpublish(world: &World, command: &Unpublish, deadline: Instant) -> Result<()> {
    let cluster = &world.cluster;
    let id = &command.volume_id;
    let concerns = |node: &str| command.node_id.as_deref().is_none_or(|asked| asked == node);
    let Some(withdrawn) = withdraw(world, id, concerns).await? else {
        return Ok(());
    };
    let replicated = withdrawn.spec.is_replicated();
    let lost = |node: &str| replicated && cluster.seen.standing(node).trouble.is_some();
    let released = |seen: &cluster::Seen| {
        let volume = seen.volume(&cluster.namespace, id);
        volume.is_none_or(|volume| !volume.primary().is_some_and(|node| concerns(node) && !lost(node)))
    };
    let mut waiter = cluster.waiter(match replicated {
        true => deadline.min(Instant::now() + PATIENCE),
        false => deadline,
    });
    loop {
        waiter.arm();
        // What was seen may be older than the attachment itself, so the last word is a fresh read.
        let volume = cluster
            .volume(id)
            .await?
            .filter(|volume| volume.uid() == withdrawn.uid());
        match volume.as_ref().and_then(|volume| volume.primary()) {
            Some(primary) if concerns(primary) => {
                if !lost(primary) && waiter.again(released).await {
                    continue;
                }
                if replicated {
                    tracing::warn!(
                        volume = id,
                        node = primary,
                        "not released in order; the next epoch shuts it out"
                    );
                    return Ok(());
                }
                let text = format!("volume {id} is not released by node {primary} yet; waiting for its node plugin");
                return Err(Error::new(Kind::Busy, text));
            }
            _ => return Ok(()),
        }
    }
}

/// Clears the order and returns the volume. `None`: there is no such volume, so nobody has it.
async fn withdraw(world: &World, id: &str, concerns: impl Fn(&str) -> bool) -> Result<Option<GalleonVolume>> {
    for _ in 0..TRIES_MAX {
        let Some(mut volume) = world.cluster.volume(id).await? else {
            return Ok(None);
        };
        if !volume.attached_node().is_some_and(&concerns) {
            return Ok(Some(volume));
        }
        volume.spec.attach_to = None;
        if replace(&world.cluster.volumes, &volume).await?.is_some() {
            return Ok(Some(volume));
        }
    }
    Err(contended(&format!("volume {id}")))
}
