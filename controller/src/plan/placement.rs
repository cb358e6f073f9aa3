//! Where replicas go, and how much room a pool has left.
//!
//! Space is promised before it is used, so room is a matter of bookkeeping: what the pool can hold, minus what is
//! promised. Promises stand in two places, the pool's `status.reservations` and the replicas' `spec.reservedBytes`, and
//! the larger of the two counts for a volume that has both. The caller reads the pools first and the replicas after
//! them, then writes its reservation under the resourceVersion it read: whatever another controller promised meanwhile
//! either shows in the replicas or makes that write fail.

use std::collections::{BTreeMap, BTreeSet};

use galleonfs_api::{ANNOTATION_REPLACES, GalleonReplica, GalleonVolume, PoolSelector, Reservation, StoragePool, size};
use k8s_openapi::jiff::Timestamp;
use kube::ResourceExt;

use super::request::TopologyWish;
use crate::error::{Error, Kind, Result};

/// Replicas that a node is given at a time in the place of lost ones: each is written as fast as its primary can send.
const REPLACING_MAX: usize = 2;
/// Pools named in a refusal; a long list helps nobody.
const POOLS_NAMED_MAX: usize = 8;

/// What is to be placed.
#[derive(Clone, Copy, Debug)]
pub struct Wish<'a> {
    pub size_bytes: i64,
    pub selector: &'a PoolSelector,
    pub topology: &'a TopologyWish,
    /// The volume, once it has a uid: what it has reserved already does not stand in its own way.
    pub volume_uid: Option<&'a str>,
    /// Pools that were tried and failed, taken only if there is nothing else.
    pub avoid: &'a [String],
    /// How many replicas the volume is to have. One is placed where the volume is to be used, several anywhere: they are
    /// used from everywhere.
    pub replicas: usize,
    /// Nodes that have one already. No node gets two.
    pub taken: &'a [String],
    /// Nodes that cannot have one, because one is about to leave them.
    pub barred: &'a [String],
    /// In how many zones the volume's replicas must stand. A node that says nothing of its zone stands in none that counts.
    pub min_zones: usize,
    /// It is made in the place of another, and must be filled with data: a node gets few of these at a time.
    pub replacing: bool,
}

impl Wish<'_> {
    fn allows(&self, node: &str) -> bool {
        self.replicas > 1 || self.topology.allows(node)
    }
}

/// What counts of a node when replicas are placed.
#[derive(Clone, Debug, Default, Eq, PartialEq)]
pub struct Standing {
    /// Why it should not get new replicas.
    pub trouble: Option<String>,
    /// Since when, if that is known.
    pub since: Option<Timestamp>,
    /// Where it stands, by its label.
    pub zone: Option<String>,
}

/// Bytes promised in a pool to volumes other than `except`.
fn promised_bytes(pool: &StoragePool, replicas: &[GalleonReplica], except: Option<&str>) -> i64 {
    let pool_name = pool.name_any();
    let mut promises: BTreeMap<&str, i64> = BTreeMap::new();
    for replica in replicas.iter().filter(|replica| replica.spec.pool_name == pool_name) {
        *promises.entry(replica.spec.volume_uid.as_str()).or_default() += replica.spec.reserved_bytes;
    }
    for (uid, reservation) in reservations(pool) {
        let promise = promises.entry(uid.as_str()).or_default();
        *promise = (*promise).max(reservation.bytes);
    }
    promises
        .iter()
        .filter(|(uid, _)| Some(**uid) != except)
        .fold(0, |sum, (_, bytes)| sum.saturating_add(*bytes))
}

fn reservations(pool: &StoragePool) -> impl Iterator<Item = (&String, &Reservation)> {
    pool.status.iter().flat_map(|status| &status.reservations)
}

/// Bytes of a pool that are promised to nobody (or only to `except`); never less than nothing.
pub fn free_bytes(pool: &StoragePool, replicas: &[GalleonReplica], except: Option<&str>) -> i64 {
    let usable = pool.status.as_ref().and_then(|status| status.usable_bytes).unwrap_or(0);
    usable.saturating_sub(promised_bytes(pool, replicas, except)).max(0)
}

/// Why a pool is not one of those that the class means.
fn mismatch(pool: &StoragePool, selector: &PoolSelector) -> Option<String> {
    if let Some(media) = selector.media
        && media != pool.spec.media
    {
        return Some(format!("is {}, not {}", pool.spec.media.as_str(), media.as_str()));
    }
    if let Some(name) = &selector.name
        && *name != pool.spec.pool
    {
        return Some(format!("is not of pool {name}"));
    }
    None
}

/// Why a pool cannot take a replica whatever its size: it is not well, or its node is not.
fn obstacle(pool: &StoragePool, node_trouble: Option<&str>) -> Option<String> {
    if pool.metadata.deletion_timestamp.is_some() {
        return Some("is being deleted".to_string());
    }
    if !pool.is_ready() {
        return Some(match pool.ready() {
            Some(condition) => format!("is not ready ({}: {})", condition.reason, condition.message),
            None => format!("is not ready (node {} has not reported yet)", pool.spec.node_name),
        });
    }
    node_trouble.map(|trouble| format!("is on node {} which {trouble}", pool.spec.node_name))
}

/// Chooses pools for the replicas that a volume still lacks, all of them or none: each on a node of its own, in as many
/// zones as there are; then by preference of the request, then by room.
pub fn choose_all<'a>(
    pools: &'a [StoragePool],
    replicas: &[GalleonReplica],
    standing: impl Fn(&str) -> Standing,
    wish: &Wish<'_>,
) -> Result<Vec<&'a StoragePool>> {
    let mut taken = wish.taken.to_vec();
    let mut chosen: Vec<&StoragePool> = vec![];
    while taken.len() < wish.replicas {
        let next = Wish { taken: &taken, ..*wish };
        match best(pools, replicas, &standing, &next) {
            Ok(pool) => {
                chosen.push(pool);
                taken.push(pool.spec.node_name.clone());
            }
            Err(refused) => return Err(no_room(pools, refused, &taken, wish)),
        }
    }
    let zones: BTreeSet<String> = taken.iter().filter_map(|node| standing(node).zone).collect();
    if wish.min_zones > 1 && zones.len() < wish.min_zones {
        return Err(too_few_zones(&taken, &zones, wish));
    }
    Ok(chosen)
}

/// The best pool for one more replica, or why each one cannot have it.
fn best<'a>(
    pools: &'a [StoragePool],
    replicas: &[GalleonReplica],
    standing: impl Fn(&str) -> Standing,
    wish: &Wish<'_>,
) -> Result<&'a StoragePool, Vec<String>> {
    let needed = size::reserved_bytes(wish.size_bytes);
    let zones: Vec<Option<String>> = wish.taken.iter().map(|node| standing(node).zone).collect();
    let (mut refused, mut others) = (vec![], vec![]);
    let mut best: Option<(_, &StoragePool)> = None;
    let free_for_it = |pool: &&StoragePool| {
        let node = &pool.spec.node_name;
        wish.allows(node) && !wish.taken.contains(node) && !wish.barred.contains(node)
    };
    for pool in pools.iter().filter(free_for_it) {
        let name = pool.name_any();
        if let Some(mismatch) = mismatch(pool, wish.selector) {
            others.push(format!("{name} {mismatch}"));
            continue;
        }
        let Standing { trouble, zone, .. } = standing(&pool.spec.node_name);
        if let Some(obstacle) = obstacle(pool, trouble.as_deref()) {
            refused.push(format!("{name} {obstacle}"));
            continue;
        }
        if wish.replacing && being_filled(replicas, &pool.spec.node_name) >= REPLACING_MAX {
            refused.push(format!(
                "{name} is on a node that is given {REPLACING_MAX} other replicas at the moment"
            ));
            continue;
        }
        let free = free_bytes(pool, replicas, wish.volume_uid);
        if free < needed {
            let usable = pool.status.as_ref().and_then(|status| status.usable_bytes).unwrap_or(0);
            refused.push(format!(
                "{name} has {} free of {}",
                size::human(free),
                size::human(usable)
            ));
            continue;
        }
        let preference = wish
            .topology
            .preferred
            .iter()
            .position(|node| *node == pool.spec.node_name);
        let reserved = wish
            .volume_uid
            .is_some_and(|uid| reservations(pool).any(|(other, _)| other == uid));
        // A reservation of our own is where an earlier attempt left off: finish that one. Nodes without a zone count as
        // one zone.
        let rank = (
            wish.avoid.contains(&name),
            !reserved,
            wish.min_zones > 1 && zone.is_none(),
            zones.iter().filter(|taken| **taken == zone).count(),
            preference.unwrap_or(usize::MAX),
            std::cmp::Reverse(free),
            name,
        );
        if best.as_ref().is_none_or(|(best_rank, _)| rank < *best_rank) {
            best = Some((rank, pool));
        }
    }
    // What is wrong with the pools that were meant comes before the list of the others.
    refused.append(&mut others);
    best.map(|(_, pool)| pool).ok_or(refused)
}

/// How many replicas a node is being given in the place of others.
fn being_filled(replicas: &[GalleonReplica], node: &str) -> usize {
    let filled = |replica: &&GalleonReplica| {
        replica.spec.node_name == node
            && replica.metadata.deletion_timestamp.is_none()
            && replica.annotations().contains_key(ANNOTATION_REPLACES)
    };
    replicas.iter().filter(filled).count()
}

fn too_few_zones(taken: &[String], zones: &BTreeSet<String>, wish: &Wish<'_>) -> Error {
    let stand = match zones.first() {
        None => "none of them says in which zone it stands".to_string(),
        Some(zone) => format!("the only zone that any of them names is {zone}"),
    };
    let text = format!(
        "replicas must stand in {} zones (write concern \"distributed\"), and there is room on {} at best: {stand}. A node \
         names its zone with the label topology.kubernetes.io/zone",
        wish.min_zones,
        taken.join(", ")
    );
    Error::new(Kind::NoRoom, text)
}

fn no_room(pools: &[StoragePool], refused: Vec<String>, taken: &[String], wish: &Wish<'_>) -> Error {
    let sizes = format!(
        "{} ({} with the log's overhead)",
        size::human(wish.size_bytes),
        size::human(size::reserved_bytes(wish.size_bytes))
    );
    let asked = match (wish.replicas, taken) {
        _ if wish.replacing => format!("{sizes} are needed on a node that has none of the volume"),
        (0 | 1, _) => format!("no pool has room for a volume of {sizes}"),
        (count, []) => format!("{count} replicas need {count} nodes with room for {sizes} each, and there is none"),
        (count, taken) => format!(
            "{count} replicas need {count} nodes with room for {sizes} each, and beside {} there is no other",
            taken.join(", ")
        ),
    };
    let text = if pools.is_empty() {
        format!("{asked}: there is no StoragePool; see `kubectl get storagepools -A`, and the node plugin's pods")
    } else if refused.is_empty() && wish.replicas > 1 {
        format!("{asked}: all {} StoragePools are on these nodes", pools.len())
    } else if refused.is_empty() {
        let nodes = wish.topology.requisite.as_deref().unwrap_or_default().join(", ");
        format!("{asked}: none of the {} StoragePools is on node {nodes}", pools.len())
    } else {
        let more = match refused.len().saturating_sub(POOLS_NAMED_MAX) {
            0 => String::new(),
            more => format!("; and {more} more"),
        };
        let named = &refused[..refused.len().min(POOLS_NAMED_MAX)];
        format!("{asked}: {}{more}", named.join("; "))
    };
    Error::new(Kind::NoRoom, text)
}

/// The pool's object with `bytes` promised to a volume, or `None` if they are promised already. Promises that a replica
/// has taken over are dropped on the way.
pub fn reserve(
    pool: &StoragePool,
    replicas: &[GalleonReplica],
    volume_uid: &str,
    volume_name: &str,
    bytes: i64,
) -> Option<StoragePool> {
    let held = |uid: &str| held_bytes(pool, replicas, uid);
    let reserved = reservations(pool)
        .find(|(uid, _)| *uid == volume_uid)
        .map_or(0, |(_, reserved)| reserved.bytes);
    if held(volume_uid).max(reserved) >= bytes {
        return None;
    }
    let mut changed = pool.clone();
    let reservations = &mut changed.status.get_or_insert_default().reservations;
    reservations.retain(|uid, reservation| held(uid) < reservation.bytes);
    let reservation = Reservation {
        volume_name: volume_name.to_string(),
        bytes,
    };
    reservations.insert(volume_uid.to_string(), reservation);
    Some(changed)
}

/// What a volume's replicas in this pool hold by themselves.
fn held_bytes(pool: &StoragePool, replicas: &[GalleonReplica], volume_uid: &str) -> i64 {
    let pool_name = pool.name_any();
    let own = replicas.iter().filter(|replica| replica.spec.volume_uid == volume_uid);
    own.filter(|replica| replica.spec.pool_name == pool_name)
        .map(|replica| replica.spec.reserved_bytes)
        .sum()
}

/// Whether a reservation serves nobody any more: its volume is gone, or has all its replicas elsewhere.
pub fn is_stale(pool: &StoragePool, uid: &str, volume: Option<&GalleonVolume>, replicas: &[GalleonReplica]) -> bool {
    let Some(volume) = volume.filter(|volume| volume.uid().as_deref() == Some(uid)) else {
        return true;
    };
    let own = || replicas.iter().filter(|replica| replica.spec.volume_uid == uid);
    let pool_name = pool.name_any();
    let complete = own().count() >= usize::try_from(volume.spec.replica_count).unwrap_or(usize::MAX);
    complete && own().all(|replica| replica.spec.pool_name != pool_name)
}

/// What GetCapacity reports.
#[derive(Clone, Copy, Debug, Default, Eq, PartialEq)]
pub struct Room {
    /// What volumes could have altogether.
    pub available_bytes: i64,
    /// The largest single volume.
    pub largest_bytes: i64,
}

/// How much could still be created in pools that fit. A volume of one replica is used on its node, so room counts where
/// it is asked for; one of several is used everywhere, so all room counts for every node.
pub fn room(
    pools: &[StoragePool],
    replicas: &[GalleonReplica],
    standing: impl Fn(&str) -> Standing,
    selector: &PoolSelector,
    replica_count: usize,
    node: Option<&str>,
) -> Room {
    let mut nodes: BTreeMap<&str, Room> = BTreeMap::new();
    let counts = |pool: &&StoragePool| replica_count > 1 || node.is_none_or(|node| pool.spec.node_name == node);
    for pool in pools.iter().filter(counts) {
        let fits = mismatch(pool, selector).is_none();
        if fits && obstacle(pool, standing(&pool.spec.node_name).trouble.as_deref()).is_none() {
            let largest = size::largest_volume(free_bytes(pool, replicas, None));
            let room = nodes.entry(&pool.spec.node_name).or_default();
            room.available_bytes = room.available_bytes.saturating_add(largest);
            room.largest_bytes = room.largest_bytes.max(largest);
        }
    }
    spread(&nodes.into_values().collect::<Vec<_>>(), replica_count.max(1))
}

/// What `count` replicas on as many nodes leave of the room that each node has.
fn spread(nodes: &[Room], count: usize) -> Room {
    let descending = |bytes: fn(&Room) -> i64| {
        let mut all: Vec<i64> = nodes.iter().map(bytes).collect();
        all.sort_unstable_by_key(|bytes| std::cmp::Reverse(*bytes));
        all
    };
    let largest_bytes = descending(|room| room.largest_bytes)
        .get(count - 1)
        .copied()
        .unwrap_or(0);
    // A node holds each volume once. Of the `full` largest nodes every volume takes one replica, so the others bear the
    // rest; whichever number of them is the bottleneck decides.
    let all = descending(|room| room.available_bytes);
    let rest = |full: usize| {
        let sum = all
            .iter()
            .skip(full)
            .fold(0, |sum: i64, bytes| sum.saturating_add(*bytes));
        sum / i64::try_from(count - full).unwrap_or(i64::MAX)
    };
    Room {
        available_bytes: (0..count).map(rest).min().unwrap_or(0),
        largest_bytes,
    }
}

#[cfg(test)]
#[path = "placement_tests.rs"]
mod tests;
