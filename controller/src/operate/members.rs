//! Who belongs to a replicated volume: names for new replicas, and letting go of old ones.
//!
//! The configuration names replicas, and a replica that it names must keep its data. Both are objects of their own, so
//! without care one controller could add a replica to the configuration while another, a moment behind, lets the node
//! remove it. Therefore each replica bears a finalizer that makes its node keep the data, and letting go goes like this:
//!
//! 1. The replica is marked as deleted. From then on nobody who looks adds it.
//! 2. The volume's object is changed under the version in which its configuration did not name the replica. Whoever looked
//!    before step 1 and has not written yet is refused from then on.
//! 3. The finalizer goes.
//!
//! The change in step 2 counts a generation, and names are made of it. So no name comes twice.

use galleonfs_api::{
    ANNOTATION_REPLICA_GENERATION, GalleonReplica, GalleonVolume, MEMBER_FINALIZER, name, volume::REPLICAS_MAX,
};
use kube::ResourceExt;

use super::World;
use crate::{
    cluster::replace,
    error::Result,
    plan::upkeep::{self, is_kept},
};

/// Names for new replicas that no replica of this volume has, nor ever had if it is replicated.
pub fn free_names(volume: &GalleonVolume, replicas: &[&GalleonReplica]) -> Vec<String> {
    let uid = volume.uid().unwrap_or_default();
    let slots = REPLICAS_MAX as u32;
    let first = generation(volume).saturating_mul(slots);
    (first..first.saturating_add(slots))
        .map(|slot| name::replica(&volume.name_any(), &uid, slot))
        .filter(|name| !replicas.iter().any(|replica| replica.name_any() == *name))
        .collect()
}

fn generation(volume: &GalleonVolume) -> u32 {
    let written = volume.annotations().get(ANNOTATION_REPLICA_GENERATION);
    written.and_then(|number| number.parse().ok()).unwrap_or(0)
}

/// Lets the nodes remove those of these replicas that are marked as deleted and that the configuration, as it was read
/// with `volume`, does not name. `true`: something was written, or somebody else wrote; look again.
pub async fn let_go(world: &World, volume: &GalleonVolume, replicas: &[&GalleonReplica]) -> Result<bool> {
    let going: Vec<&&GalleonReplica> = replicas
        .iter()
        .filter(|replica| is_kept(replica) && upkeep::is_leaving(replica) && !upkeep::is_named(volume, replica))
        .collect();
    if going.is_empty() {
        return Ok(false);
    }
    let mut counted = volume.clone();
    let generation = generation(volume).saturating_add(1).to_string();
    counted
        .annotations_mut()
        .insert(ANNOTATION_REPLICA_GENERATION.to_string(), generation);
    if replace(&world.cluster.volumes, &counted).await?.is_none() {
        return Ok(true);
    }
    for replica in going {
        tracing::info!(
            volume = volume.name_any(),
            replica = replica.name_any(),
            "letting go of the replica"
        );
        let mut free = GalleonReplica::clone(replica);
        free.finalizers_mut().retain(|finalizer| finalizer != MEMBER_FINALIZER);
        // A lost race is left to the next look.
        replace(&world.cluster.replicas, &free).await?;
    }
    Ok(true)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::fixtures::{one_of_several, replicated, volume};
    use galleonfs_api::size::GIB;

    #[test]
    fn a_name_is_free_once_and_never_again() {
        let mut volume = replicated("v", 3);
        let first = free_names(&volume, &[]);
        assert_eq!(first.len(), REPLICAS_MAX);
        let mut replica = one_of_several("v", "a", GIB);
        replica.metadata.name = Some(first[0].clone());
        assert_eq!(free_names(&volume, &[&replica]), first[1..]);
        volume
            .annotations_mut()
            .insert(ANNOTATION_REPLICA_GENERATION.to_string(), "1".to_string());
        let second = free_names(&volume, &[&replica]);
        assert!(
            second.iter().all(|name| !first.contains(name)),
            "{second:?} and {first:?}"
        );
    }

    #[test]
    fn a_volume_of_one_replica_names_it_as_ever() {
        assert_eq!(free_names(&volume("v"), &[])[0], name::replica("v", "v", 0));
    }
}
