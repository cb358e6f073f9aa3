//! From a volume's object to its first configuration.
//!
//! Until there is a configuration the places are not settled: a replica that failed, or lies where a repeated request
//! does not allow it, is replaced by one elsewhere. Afterwards the volume has a life of its own.

use galleonfs_api::{GalleonReplica, GalleonVolume, ReplicaPhase};
use kube::ResourceExt;
use tokio::time::Instant;

use super::{World, create::again, members, reserve};
use crate::{
    cluster::{self, Seen, replace_status},
    error::{Error, Kind, Result},
    plan::{placement::Wish, request::Create, upkeep},
};

/// Goes on until the volume has its first configuration.
pub async fn settle(
    world: &World,
    mut volume: GalleonVolume,
    command: &Create,
    deadline: Instant,
) -> Result<GalleonVolume> {
    let cluster = &world.cluster;
    loop {
        let replicas = cluster.replicas_of(&volume).await?;
        let (usable, unusable) = sort_out(world, &volume, &replicas, command);
        let mut names: Vec<String> = usable.iter().map(|replica| replica.name_any()).collect();
        if usable.len() < upkeep::count(volume.spec.replica_count) {
            match place_missing(world, &volume, &usable, &unusable, command, deadline).await? {
                Some(placed) => names.extend(placed),
                None => continue,
            }
        }
        match await_replicas(world, &volume, &names, deadline).await? {
            Awaited::Settled(settled) => return Ok(settled),
            Awaited::LookAgain(fresh) => volume = fresh,
            Awaited::Late => return Err(Error::new(Kind::Busy, awaited(world, &volume, &names).await)),
        }
    }
}

/// The replicas that this attempt goes on with, each on a node of its own, and the others.
fn sort_out(
    world: &World,
    volume: &GalleonVolume,
    replicas: &[GalleonReplica],
    command: &Create,
) -> (Vec<GalleonReplica>, Vec<GalleonReplica>) {
    let (mut usable, mut unusable): (Vec<GalleonReplica>, Vec<GalleonReplica>) = (vec![], vec![]);
    for replica in replicas {
        let node = &replica.spec.node_name;
        if !is_usable(world, volume, replica, command) {
            unusable.push(replica.clone());
        } else if !usable.iter().any(|other| other.spec.node_name == *node) {
            usable.push(replica.clone());
        }
        // A second one on a node is what a race left. It is surplus once the volume is settled, and in no one's way.
    }
    usable.truncate(upkeep::count(volume.spec.replica_count));
    (usable, unusable)
}

/// Whether this attempt goes on with a replica that an earlier one made. A ready one may become the volume's at any
/// moment by the hand of the reconcile loop, so it is never taken away.
fn is_usable(world: &World, volume: &GalleonVolume, replica: &GalleonReplica, command: &Create) -> bool {
    let node = &replica.spec.node_name;
    replica.metadata.deletion_timestamp.is_none()
        && match replica.phase() {
            ReplicaPhase::Ready => true,
            ReplicaPhase::Pending if volume.spec.is_replicated() => world.cluster.seen.standing(node).trouble.is_none(),
            ReplicaPhase::Pending => command.topology.allows(node),
            ReplicaPhase::Failed | ReplicaPhase::Removing => false,
        }
}

/// Removes the unusable replicas of an unsettled volume and makes those that it lacks; returns their names. `None`: look
/// again.
async fn place_missing(
    world: &World,
    volume: &GalleonVolume,
    usable: &[GalleonReplica],
    unusable: &[GalleonReplica],
    command: &Create,
    deadline: Instant,
) -> Result<Option<Vec<String>>> {
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
    let wanted = upkeep::count(volume.spec.replica_count);
    let all: Vec<&GalleonReplica> = usable.iter().chain(unusable).collect();
    let names = members::free_names(volume, &all);
    let leaving: Vec<String> = unusable.iter().map(|replica| replica.spec.pool_name.clone()).collect();
    let taken: Vec<String> = usable.iter().map(|replica| replica.spec.node_name.clone()).collect();
    let selector = volume.spec.pool.clone().unwrap_or_default();
    let wish = Wish {
        size_bytes: volume.spec.size_bytes,
        selector: &selector,
        topology: &command.topology,
        volume_uid: Some(&uid),
        avoid: &leaving,
        replicas: wanted,
        taken: &taken,
        barred: &[],
        min_zones: volume.spec.write_concern.min_zones(),
        replacing: false,
    };
    let placed = match names.len() < wanted - usable.len() {
        false => reserve::place(world, volume, &names, &wish, &leaving, None).await?,
        true => Err("every pool".to_string()),
    };
    match placed {
        Ok(placed) => Ok(Some(placed)),
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
        let there = cluster.replicas_of(volume).await?;
        let leaving: Vec<&GalleonReplica> = there
            .iter()
            .filter(|replica| names.contains(&replica.name_any()))
            .collect();
        if leaving.len() < names.len() || members::let_go(world, volume, &leaving).await? {
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
    /// The deadline has passed.
    Late,
}

/// Waits for replicas, and settles the volume on them once all are ready.
async fn await_replicas(world: &World, volume: &GalleonVolume, names: &[String], deadline: Instant) -> Result<Awaited> {
    let cluster = &world.cluster;
    let volume_name = volume.name_any();
    let phase = |seen: &Seen, name: &String| seen.replica(&cluster.namespace, name).map(|replica| replica.phase());
    let decided = |seen: &Seen| {
        let settled = seen
            .volume(&cluster.namespace, &volume_name)
            .is_some_and(|volume| volume.config().is_some());
        let ready = |name| phase(seen, name) == Some(ReplicaPhase::Ready);
        let hopeless = |name| !matches!(phase(seen, name), Some(ReplicaPhase::Ready | ReplicaPhase::Pending));
        settled || names.iter().all(ready) || names.iter().any(hopeless)
    };
    let mut waiter = cluster.waiter(deadline);
    loop {
        waiter.arm();
        if let Some(awaited) = look_at_replicas(world, volume, names).await? {
            return Ok(awaited);
        }
        if !waiter.again(decided).await {
            return Ok(Awaited::Late);
        }
    }
}

/// `None`: not all are ready yet.
async fn look_at_replicas(world: &World, volume: &GalleonVolume, names: &[String]) -> Result<Option<Awaited>> {
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
    let replicas = cluster.replicas_of(&fresh).await?;
    let mut all_ready = true;
    for name in names {
        let staying =
            |replica: &&GalleonReplica| replica.name_any() == *name && replica.metadata.deletion_timestamp.is_none();
        match replicas.iter().find(staying) {
            None => return Ok(Some(Awaited::LookAgain(fresh))),
            // Final for this attempt: a scheduler that hears this may choose another node.
            Some(replica) if replica.phase() == ReplicaPhase::Failed => {
                return Err(Error::new(Kind::NoRoom, upkeep::trouble(replica)));
            }
            Some(replica) => all_ready &= replica.phase() == ReplicaPhase::Ready,
        }
    }
    if !all_ready {
        return Ok(None);
    }
    let Some(config) = upkeep::first_config(&fresh, &upkeep::own(&fresh, &replicas)) else {
        // Two of them are on one node, which only a race makes.
        return Ok(Some(Awaited::LookAgain(fresh)));
    };
    fresh.status.get_or_insert_default().config = Some(config);
    match replace_status(&cluster.volumes, &fresh).await? {
        Some(settled) => Ok(Some(Awaited::Settled(settled))),
        None => Ok(Some(Awaited::LookAgain(again(world, &volume_name).await?))),
    }
}

/// What is waited for, in the words of a node that is not ready yet.
async fn awaited(world: &World, volume: &GalleonVolume, names: &[String]) -> String {
    let replicas = world.cluster.replicas_of(volume).await.unwrap_or_default();
    let awaited = |replica: &&GalleonReplica| names.contains(&replica.name_any());
    let slow = |replica: &&GalleonReplica| awaited(replica) && replica.phase() != ReplicaPhase::Ready;
    let one = replicas.iter().find(slow).or(replicas.iter().find(awaited));
    let name = volume.name_any();
    one.map_or_else(
        || format!("the replicas of volume {name} are being made"),
        upkeep::trouble,
    )
}
