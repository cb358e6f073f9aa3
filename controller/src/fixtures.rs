//! Objects for tests, with everything that does not matter filled in.

use galleonfs_api::{
    AttachTo, Capability, Condition, GalleonReplica, GalleonReplicaSpec, GalleonReplicaStatus, GalleonVolume,
    GalleonVolumeSpec, MEMBER_FINALIZER, MediaType, PoolSelector, REPLICA_FINALIZER, ReplicaPhase, Reservation,
    StoragePool, StoragePoolSpec, StoragePoolStatus, VolumeConfig, VolumeMode, WriteConcern, condition_type, reason,
    size::{GIB, reserved_bytes},
};

/// A pool `default` on a node.
pub fn pool(node: &str, usable_bytes: i64) -> StoragePool {
    let spec = StoragePoolSpec {
        pool: "default".to_string(),
        node_name: node.to_string(),
        path: "/var/lib/pool".to_string(),
        media: MediaType::Ssd,
        reserve_bytes: None,
    };
    let mut pool = StoragePool::new(&StoragePool::object_name("default", node), spec);
    pool.status = Some(StoragePoolStatus {
        usable_bytes: Some(usable_bytes),
        conditions: vec![Condition::new(condition_type::READY, true, reason::READY, "")],
        ..StoragePoolStatus::default()
    });
    pool
}

pub fn reserved(mut pool: StoragePool, uid: &str, bytes: i64) -> StoragePool {
    let reservation = Reservation {
        volume_name: uid.to_string(),
        bytes,
    };
    pool.status
        .get_or_insert_default()
        .reservations
        .insert(uid.to_string(), reservation);
    pool
}

/// A replica of volume `uid` (named likewise) in the default pool of a node.
pub fn replica(uid: &str, node: &str, size_bytes: i64) -> GalleonReplica {
    let spec = GalleonReplicaSpec {
        volume_name: uid.to_string(),
        volume_uid: uid.to_string(),
        node_name: node.to_string(),
        pool_name: StoragePool::object_name("default", node),
        size_bytes,
        block_size: 4096,
        reserved_bytes: reserved_bytes(size_bytes),
        zone: None,
        replicated: false,
    };
    GalleonReplica::new(&format!("{uid}-{node}"), spec)
}

pub fn ready(mut replica: GalleonReplica) -> GalleonReplica {
    let observed_size_bytes = Some(replica.spec.size_bytes);
    replica.status = Some(GalleonReplicaStatus {
        phase: ReplicaPhase::Ready,
        observed_size_bytes,
        conditions: vec![],
    });
    replica
}

pub fn failed(mut replica: GalleonReplica, reason: &str, message: &str) -> GalleonReplica {
    let conditions = vec![Condition::new(condition_type::READY, false, reason, message)];
    replica.status = Some(GalleonReplicaStatus {
        phase: ReplicaPhase::Failed,
        observed_size_bytes: None,
        conditions,
    });
    replica
}

/// A volume of one GiB whose name, CSI name and uid are the same word.
pub fn volume(uid: &str) -> GalleonVolume {
    let spec = GalleonVolumeSpec {
        size_bytes: GIB,
        block_size: 4096,
        sector_size: 4096,
        compression: None,
        no_space_timeout_seconds: None,
        replica_count: 1,
        min_in_sync: None,
        pool: Some(PoolSelector::default()),
        write_concern: WriteConcern::Acknowledged,
        csi_name: uid.to_string(),
        parameters: Default::default(),
        capability: Capability {
            mode: VolumeMode::Filesystem,
            fs_type: Some("ext4".to_string()),
        },
        attach_to: None,
        leaving: None,
    };
    let mut volume = GalleonVolume::new(uid, spec);
    volume.metadata.uid = Some(uid.to_string());
    volume
}

/// A volume of several replicas, made with a class that says no more than that.
pub fn replicated(uid: &str, replica_count: i32) -> GalleonVolume {
    let mut volume = volume(uid);
    volume.spec.replica_count = replica_count;
    volume.spec.write_concern = WriteConcern::Replicated;
    volume
}

/// A replica of such a volume.
pub fn one_of_several(uid: &str, node: &str, size_bytes: i64) -> GalleonReplica {
    let mut replica = replica(uid, node, size_bytes);
    replica.spec.replicated = true;
    replica.metadata.finalizers = Some(vec![REPLICA_FINALIZER.to_string(), MEMBER_FINALIZER.to_string()]);
    replica
}

pub fn settled(mut volume: GalleonVolume, in_sync: &[&str]) -> GalleonVolume {
    let in_sync = in_sync.iter().map(|name| name.to_string()).collect();
    volume.status.get_or_insert_default().config = Some(VolumeConfig {
        in_sync,
        ..VolumeConfig::default()
    });
    volume
}

pub fn deleting<K: kube::Resource>(mut object: K) -> K {
    object.meta_mut().deletion_timestamp = Some(galleonfs_api::condition::now());
    object
}

pub fn attach_to(node: &str) -> AttachTo {
    AttachTo {
        node_name: node.to_string(),
        read_only: false,
        access_mode: "SINGLE_NODE_WRITER".to_string(),
        mode: VolumeMode::Filesystem,
    }
}
