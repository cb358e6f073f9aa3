//! DeleteVolume: mark the volume, then take it apart until nothing is left.

use kube::ResourceExt;
use tokio::time::Instant;

use super::{
    TRIES_MAX, World, contended,
    upkeep::{self, Progress},
};
use crate::{
    cluster,
    error::{Error, Kind, Result},
    plan,
};

/// Deletes a volume and waits until its space is free. A volume that is not there is fine.
pub async fn delete(world: &World, id: &str, deadline: Instant) -> Result<()> {
    if !mark(world, id).await? {
        return Ok(());
    }
    let cluster = &world.cluster;
    let uid = match cluster.volume(id).await? {
        Some(volume) => volume.uid(),
        None => return Ok(()),
    };
    let finished = |seen: &cluster::Seen| {
        let ours = |replica: &galleonfs_api::GalleonReplica| Some(&replica.spec.volume_uid) == uid.as_ref();
        seen.replicas.find(ours).is_none()
    };
    let mut waiter = cluster.waiter(deadline);
    loop {
        waiter.arm();
        match cluster.volume(id).await? {
            Some(volume) if volume.uid() == uid => {}
            // Gone; what has this name now is another volume.
            _ => return Ok(()),
        }
        match upkeep::step(world, id).await? {
            Progress::Gone => return Ok(()),
            Progress::Acted => {}
            Progress::Idle(_) if waiter.again(finished).await => {}
            Progress::Idle(_) => return Err(Error::new(Kind::Busy, waiting_text(world, id).await)),
        }
    }
}

/// Sets the deletion timestamp, unless the volume is in use. `false`: there is no such volume.
async fn mark(world: &World, id: &str) -> Result<bool> {
    let cluster = &world.cluster;
    for _ in 0..TRIES_MAX {
        let Some(volume) = cluster.volume(id).await? else {
            return Ok(false);
        };
        if volume.is_deleting() {
            return Ok(true);
        }
        if let Some(node) = volume.attached_node() {
            let text = format!("volume {id} is published on node {node}; unpublish it before deleting it");
            return Err(Error::new(Kind::Precondition, text));
        }
        if let Some(node) = plan::upkeep::holder(&volume) {
            let text = format!("volume {id} is still being released by node {node}");
            return Err(Error::new(Kind::Precondition, text));
        }
        // Only as it was read: somebody may be publishing it at this moment.
        if cluster::delete(&cluster.volumes, &volume, true).await? {
            return Ok(true);
        }
    }
    Err(contended(&format!("volume {id}")))
}

async fn waiting_text(world: &World, id: &str) -> String {
    let replicas = match world.cluster.volume(id).await {
        Ok(Some(volume)) => world.cluster.replicas_of(&volume).await.unwrap_or_default(),
        _ => vec![],
    };
    let left: Vec<String> = replicas
        .iter()
        .map(|replica| format!("{} on node {}", replica.name_any(), replica.spec.node_name))
        .collect();
    format!(
        "volume {id} is being deleted; its replicas are still being removed by their nodes: {}",
        left.join(", ")
    )
}
