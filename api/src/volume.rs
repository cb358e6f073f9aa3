//! GalleonVolume: one volume, what is wanted of it and who serves it.
//!
//! `status.config` is the single point of linearization of the whole system: which epoch it is, who may write, which
//! replicas are complete. It is changed only by PUT with the resourceVersion that was read, and the rules below refuse
//! what must never happen even if our own code asks for it: an epoch going back, two writers in one epoch, a replica
//! becoming in-sync by decree.

use std::collections::BTreeMap;

use kube::{CustomResource, KubeSchema};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::{Condition, MediaType};

/// Most replicas a volume may ever have, the one being added during a move included.
pub const REPLICAS_MAX: usize = 8;
/// Bytes per block of a volume for which nobody says otherwise.
pub const BLOCK_SIZE_DEFAULT: i32 = 4096;
/// Every block size there is, in bytes.
pub const BLOCK_SIZES: [i32; 4] = [4096, 8192, 16384, 65536];
/// Bytes per logical sector of a device for which nobody says otherwise.
pub const SECTOR_SIZE_DEFAULT: i32 = 4096;
/// Every sector size there is, in bytes.
pub const SECTOR_SIZES: [i32; 2] = [512, 4096];
/// The longest that writes may be asked to wait for room before they are refused, in seconds.
pub const NO_SPACE_TIMEOUT_SECONDS_MAX: i32 = 86_400;

/// What is wanted of a volume.
#[derive(CustomResource, KubeSchema, Clone, Debug, Deserialize, PartialEq, Serialize)]
#[kube(
    group = "galleonfs.io",
    version = "v1alpha1",
    kind = "GalleonVolume",
    plural = "galleonvolumes",
    shortname = "gvol",
    category = "galleonfs",
    namespaced,
    status = "GalleonVolumeStatus",
    derive = "PartialEq",
    doc = "A block volume of GalleonFS, made from replicas on the nodes' own disks. Made by the controller for a PersistentVolumeClaim.",
    selectable = ".spec.attachTo.nodeName",
    printcolumn(name = "Size", type_ = "integer", format = "int64", json_path = ".spec.sizeBytes"),
    printcolumn(name = "Replicas", type_ = "integer", json_path = ".spec.replicaCount"),
    printcolumn(name = "In Sync", type_ = "integer", json_path = ".status.inSyncCount"),
    printcolumn(name = "Attached To", type_ = "string", json_path = ".spec.attachTo.nodeName"),
    printcolumn(name = "Primary", type_ = "string", json_path = ".status.config.primary"),
    printcolumn(
        name = "Epoch",
        type_ = "integer",
        format = "int64",
        json_path = ".status.config.epoch",
        priority = 1
    ),
    printcolumn(
        name = "Ready",
        type_ = "string",
        json_path = ".status.conditions[?(@.type==\"Ready\")].status"
    ),
    printcolumn(
        name = "Reason",
        type_ = "string",
        json_path = ".status.conditions[?(@.type==\"Ready\")].reason"
    ),
    printcolumn(
        name = "Claim",
        type_ = "string",
        json_path = ".metadata.annotations.galleonfs\\.io/pvc-name",
        priority = 1
    ),
    printcolumn(name = "Age", type_ = "date", json_path = ".metadata.creationTimestamp")
)]
#[serde(rename_all = "camelCase")]
#[x_kube(
    validation = Rule::new("self.sizeBytes % self.blockSize == 0").message("sizeBytes must be a multiple of blockSize"),
    validation = Rule::new("!has(self.minInSync) || self.minInSync <= self.replicaCount")
        .message("minInSync must not be more than replicaCount"),
    validation = Rule::new("!has(self.attachTo) || !has(oldSelf.attachTo) || self.attachTo.nodeName == oldSelf.attachTo.nodeName")
        .message("attachTo must be cleared before it can name another node"),
    validation = Rule::new("has(self.pool) == has(oldSelf.pool) && (!has(self.pool) || self.pool == oldSelf.pool)")
        .message("pool is immutable"),
    validation = Rule::new("has(self.parameters) == has(oldSelf.parameters) && (!has(self.parameters) || self.parameters == oldSelf.parameters)")
        .message("parameters is immutable")
)]
pub struct GalleonVolumeSpec {
    /// Size in bytes, a multiple of the block size. May grow, never shrink.
    #[schemars(range(min = 1))]
    #[x_kube(validation = Rule::new("self >= oldSelf").message("sizeBytes must not shrink"))]
    pub size_bytes: i64,
    /// Bytes per block, the unit that is stored, checked and compressed: 4096, 8192, 16384 or 65536. Fixed for the life of
    /// the volume.
    #[serde(default = "block_size_default")]
    #[schemars(schema_with = "crate::schema::block_size")]
    #[x_kube(validation = Rule::new("self == oldSelf").message("blockSize is immutable"))]
    pub block_size: i32,
    /// Bytes per logical sector of the device, the smallest that a guest can write: 512 or 4096. Fixed for the life of the
    /// volume: partition tables and file systems are made for it.
    #[serde(default = "sector_size_default")]
    #[schemars(schema_with = "crate::schema::sector_size")]
    #[x_kube(validation = Rule::new("self == oldSelf").message("sectorSize is immutable"))]
    pub sector_size: i32,
    /// How blocks are compressed before they are stored; absent when they are not. Counts for what is written from the next
    /// attach on.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub compression: Option<Compression>,
    /// After how many seconds without room in the pool a write fails with ENOSPC; absent when it waits until there is room.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = 0, max = NO_SPACE_TIMEOUT_SECONDS_MAX))]
    pub no_space_timeout_seconds: Option<i32>,
    /// Number of copies on different nodes. Fixed for the life of the volume.
    #[schemars(range(min = 1, max = 7))]
    #[x_kube(validation = Rule::new("self == oldSelf").message("replicaCount is immutable"))]
    pub replica_count: i32,
    /// With fewer copies in sync no write completes; absent for half of them, rounded up. Counts from the next attach on.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = 1, max = 7))]
    pub min_in_sync: Option<i32>,
    /// Which pools may hold replicas. Empty: any.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub pool: Option<PoolSelector>,
    /// When a write of the guest counts as done.
    pub write_concern: WriteConcern,
    /// The name under which the CO asked for the volume.
    #[schemars(length(min = 1, max = 128))]
    #[x_kube(validation = Rule::new("self == oldSelf").message("csiName is immutable"))]
    pub csi_name: String,
    /// StorageClass parameters in their normal form, kept to recognise a repeated request.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    #[schemars(schema_with = "parameters_schema")]
    pub parameters: BTreeMap<String, String>,
    /// How the volume was asked to be used.
    #[x_kube(validation = Rule::new("self == oldSelf").message("capability is immutable"))]
    pub capability: Capability,
    /// Where the volume is to be attached; absent when nowhere. Written by the controller only.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub attach_to: Option<AttachTo>,
    /// The replica that is to leave as soon as another one is in sync in its place, because its disk is not to be trusted;
    /// absent when all may stay. Written by the controller only.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(min = 1, max = 253))]
    pub leaving: Option<String>,
}

pub(crate) fn block_size_default() -> i32 {
    BLOCK_SIZE_DEFAULT
}

fn sector_size_default() -> i32 {
    SECTOR_SIZE_DEFAULT
}

// Bounded, because two CEL rules compare the whole map.
fn parameters_schema(_: &mut schemars::SchemaGenerator) -> schemars::Schema {
    schemars::json_schema!({
        "type": "object",
        "maxProperties": 32,
        "additionalProperties": {"type": "string", "maxLength": 256},
    })
}

/// Narrows down the pools that may hold replicas.
#[derive(Clone, Debug, Default, Deserialize, Eq, JsonSchema, PartialEq, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct PoolSelector {
    /// Only pools of this medium.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub media: Option<MediaType>,
    /// Only pools of this name (`StoragePool.spec.pool`).
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(min = 1, max = 63))]
    pub name: Option<String>,
}

/// How blocks are compressed before they are stored. One that does not shrink is stored as it is.
#[derive(Clone, Copy, Debug, Deserialize, Eq, JsonSchema, PartialEq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Compression {
    /// LZ4: fast.
    Lz4,
    /// Zstandard: smaller, at more CPU.
    Zstd,
}

/// When a write of the guest counts as done.
#[derive(Clone, Copy, Debug, Deserialize, Eq, JsonSchema, PartialEq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum WriteConcern {
    /// The first copy has it in its log; the others follow. A flush is answered when all that are in sync have it.
    Acknowledged,
    /// Every in-sync replica has it on stable storage.
    Durable,
    /// Every in-sync replica has it in its log.
    Replicated,
    /// As replicated, and the in-sync set spans at least two zones.
    Distributed,
}

impl WriteConcern {
    /// In how many zones a write must be before it is answered.
    pub fn min_zones(self) -> usize {
        match self {
            WriteConcern::Distributed => 2,
            WriteConcern::Acknowledged | WriteConcern::Durable | WriteConcern::Replicated => 1,
        }
    }
}

/// Whether the pod sees a block device or a mounted file system.
#[derive(Clone, Copy, Debug, Deserialize, Eq, JsonSchema, PartialEq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum VolumeMode {
    Block,
    Filesystem,
}

/// How the volume was asked to be used.
#[derive(Clone, Debug, Deserialize, Eq, JsonSchema, PartialEq, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct Capability {
    /// Block device or file system.
    pub mode: VolumeMode,
    /// The file system to make, for mode filesystem.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(min = 1, max = 16))]
    pub fs_type: Option<String>,
}

/// The controller's order to bring the volume up on one node.
#[derive(Clone, Debug, Deserialize, Eq, JsonSchema, PartialEq, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct AttachTo {
    /// The node.
    #[schemars(length(min = 1, max = 253))]
    pub node_name: String,
    /// Refuse writes.
    pub read_only: bool,
    /// CSI access mode, by its name in the specification.
    #[schemars(length(min = 1, max = 64))]
    pub access_mode: String,
    /// Block device or file system.
    pub mode: VolumeMode,
}

/// What is known of a volume.
#[derive(KubeSchema, Clone, Debug, Default, Deserialize, PartialEq, Serialize)]
#[serde(rename_all = "camelCase")]
#[x_kube(validation = Rule::new("!has(oldSelf.config) || has(self.config)").message("config must not be removed"))]
pub struct GalleonVolumeStatus {
    /// Who serves the volume and which replicas are complete. Changed by compare-and-swap only.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub config: Option<VolumeConfig>,
    /// The size that every replica has reached.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub observed_size_bytes: Option<i64>,
    /// How many replicas have every acknowledged write: as many as `config.inSync` names, for whoever lists volumes.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = 0))]
    pub in_sync_count: Option<i32>,
    /// The block device, while there is one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub device: Option<Device>,
    /// What a person should know.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    #[x_kube(merge_strategy = ListMerge::Map(vec!["type".into()]))]
    pub conditions: Vec<Condition>,
}

/// The linearized part of the status.
#[derive(KubeSchema, Clone, Debug, Default, Deserialize, Eq, PartialEq, Serialize)]
#[serde(rename_all = "camelCase")]
#[x_kube(
    validation = Rule::new("self.epoch >= oldSelf.epoch").message("epoch must not go back"),
    validation = Rule::new("self.epoch != oldSelf.epoch || !has(self.primary) || !has(oldSelf.primary) || (self.primary == oldSelf.primary && has(self.incarnation) == has(oldSelf.incarnation) && (!has(self.incarnation) || self.incarnation == oldSelf.incarnation))")
        .message("an epoch has one primary and one incarnation: raise the epoch to change them"),
    validation = Rule::new("self.epoch <= oldSelf.epoch || self.inSync.all(replica, replica in oldSelf.inSync)")
        .message("a new epoch may only keep replicas that were in sync in the old one"),
    validation = Rule::new("size(self.inSync) > 0").message("inSync must name at least one replica")
)]
pub struct VolumeConfig {
    /// Raised each time a primary takes over. Writes of an older epoch bounce off every replica.
    #[schemars(range(min = 0))]
    pub epoch: i64,
    /// Name of the node that serves the volume; absent when nobody does.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(min = 1, max = 253))]
    pub primary: Option<String>,
    /// The one start of the engine that serves this epoch.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(min = 1, max = 64))]
    pub incarnation: Option<String>,
    /// Replicas that hold every acknowledged write.
    #[schemars(schema_with = "crate::schema::replica_names")]
    pub in_sync: Vec<String>,
    /// Replicas that receive all new writes and are catching up on old ones.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    #[schemars(schema_with = "crate::schema::replica_names")]
    pub syncing: Vec<String>,
    /// Replicas that missed a write, and since when.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    #[schemars(extend("maxProperties" = REPLICAS_MAX))]
    pub out: BTreeMap<String, OutReplica>,
}

/// How far a replica got before it was left behind.
#[derive(Clone, Copy, Debug, Default, Deserialize, Eq, JsonSchema, PartialEq, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct OutReplica {
    /// The epoch in which it was dropped.
    #[schemars(range(min = 0))]
    pub epoch: i64,
    /// The last sequence number it had on stable storage.
    #[schemars(range(min = 0))]
    pub flushed_seq: i64,
}

/// The block device of an attached volume.
#[derive(Clone, Debug, Deserialize, Eq, JsonSchema, PartialEq, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct Device {
    /// The node it is on.
    #[schemars(length(min = 1, max = 253))]
    pub node_name: String,
    /// Its path there.
    #[schemars(length(max = 4096))]
    pub path: String,
    /// Whether it takes I/O.
    pub ready: bool,
}

impl GalleonVolumeSpec {
    /// With fewer replicas in sync no write completes: half of them, rounded up, unless it was asked for otherwise. So a
    /// volume of three survives a node and still has two copies, and a volume of two survives one.
    pub fn min_in_sync(&self) -> i32 {
        let half = self.replica_count.div_euclid(2) + self.replica_count.rem_euclid(2);
        self.min_in_sync.unwrap_or(half)
    }

    /// Whether it has copies that are kept alike, or just the one.
    pub fn is_replicated(&self) -> bool {
        self.replica_count > 1
    }
}

impl GalleonVolume {
    /// The node the controller wants the volume on.
    pub fn attached_node(&self) -> Option<&str> {
        self.spec
            .attach_to
            .as_ref()
            .map(|attach_to| attach_to.node_name.as_str())
    }

    /// The node that serves the volume, or still does.
    pub fn primary(&self) -> Option<&str> {
        self.config()?.primary.as_deref()
    }

    /// The linearized part of the status, once the controller has written it.
    pub fn config(&self) -> Option<&VolumeConfig> {
        self.status.as_ref()?.config.as_ref()
    }

    /// Whether the object has been deleted and waits for its finalizers.
    pub fn is_deleting(&self) -> bool {
        self.metadata.deletion_timestamp.is_some()
    }
}
