//! GalleonReplica: one copy of a volume on one node.
//!
//! The controller makes it and says where; the node it names makes the directory, reports, and takes the directory away
//! before the object may go. `spec.nodeName` is selectable so that a node watches its own replicas and no others.

use kube::{CustomResource, KubeSchema};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::{Condition, condition, words::condition_type};

/// Where one copy lives and how large it is.
#[derive(CustomResource, KubeSchema, Clone, Debug, Deserialize, PartialEq, Serialize)]
#[kube(
    group = "galleonfs.io",
    version = "v1alpha1",
    kind = "GalleonReplica",
    plural = "galleonreplicas",
    shortname = "grep",
    category = "galleonfs",
    namespaced,
    status = "GalleonReplicaStatus",
    derive = "PartialEq",
    doc = "One copy of a GalleonVolume in one StoragePool of one node.",
    selectable = ".spec.nodeName",
    selectable = ".spec.volumeName",
    printcolumn(name = "Volume", type_ = "string", json_path = ".spec.volumeName"),
    printcolumn(name = "Node", type_ = "string", json_path = ".spec.nodeName"),
    printcolumn(name = "Pool", type_ = "string", json_path = ".spec.poolName"),
    printcolumn(name = "Zone", type_ = "string", json_path = ".spec.zone", priority = 1),
    printcolumn(name = "Size", type_ = "integer", format = "int64", json_path = ".spec.sizeBytes"),
    printcolumn(name = "Phase", type_ = "string", json_path = ".status.phase"),
    printcolumn(
        name = "Reason",
        type_ = "string",
        json_path = ".status.conditions[?(@.type==\"Ready\")].reason"
    ),
    printcolumn(name = "Age", type_ = "date", json_path = ".metadata.creationTimestamp")
)]
#[serde(rename_all = "camelCase")]
pub struct GalleonReplicaSpec {
    /// The GalleonVolume this is a copy of.
    #[schemars(length(min = 1, max = 253))]
    #[x_kube(validation = Rule::new("self == oldSelf").message("volumeName is immutable"))]
    pub volume_name: String,
    /// Its uid: a volume of the same name that came later is another volume.
    #[schemars(length(min = 1, max = 64))]
    #[x_kube(validation = Rule::new("self == oldSelf").message("volumeUid is immutable"))]
    pub volume_uid: String,
    /// The node that holds the copy.
    #[schemars(length(min = 1, max = 253))]
    #[x_kube(validation = Rule::new("self == oldSelf").message("nodeName is immutable"))]
    pub node_name: String,
    /// The StoragePool object that holds the copy.
    #[schemars(length(min = 1, max = 253))]
    #[x_kube(validation = Rule::new("self == oldSelf").message("poolName is immutable"))]
    pub pool_name: String,
    /// The zone that the node stood in when the replica was made, by its label `topology.kubernetes.io/zone`; absent if it
    /// had none. Counts for volumes whose writes must be in two zones.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(min = 1, max = 63))]
    #[x_kube(validation = Rule::new("self == oldSelf").message("zone is immutable"))]
    pub zone: Option<String>,
    /// Size of the volume in bytes. May grow, never shrink.
    #[schemars(range(min = 1))]
    #[x_kube(validation = Rule::new("self >= oldSelf").message("sizeBytes must not shrink"))]
    pub size_bytes: i64,
    /// Bytes per block of the volume.
    #[serde(default = "crate::volume::block_size_default")]
    #[schemars(schema_with = "crate::schema::block_size")]
    #[x_kube(validation = Rule::new("self == oldSelf").message("blockSize is immutable"))]
    pub block_size: i32,
    /// What placement counts against the pool: the size and the log's overhead.
    #[schemars(range(min = 1))]
    pub reserved_bytes: i64,
    /// Whether the volume has several replicas. One of these takes part in its volume from the time it is made, wherever the
    /// volume is attached; the only replica of a volume is opened by the node that serves it.
    #[serde(default)]
    #[x_kube(validation = Rule::new("self == oldSelf").message("replicated is immutable"))]
    pub replicated: bool,
}

/// How a replica fares, as its node sees it.
#[derive(KubeSchema, Clone, Debug, Default, Deserialize, PartialEq, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct GalleonReplicaStatus {
    /// Where in its life the replica is.
    #[serde(default)]
    pub phase: ReplicaPhase,
    /// The size the store has reached.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub observed_size_bytes: Option<i64>,
    /// What a person should know. A failed replica says here what was found and what to do.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    #[x_kube(merge_strategy = ListMerge::Map(vec!["type".into()]))]
    pub conditions: Vec<Condition>,
}

/// Where in its life a replica is.
///
/// ```text
/// Pending ──▶ Ready ──▶ Removing
///    └──▶ Failed ◀─┘       ▲
///           └──────────────┘
/// ```
#[derive(Clone, Copy, Debug, Default, Deserialize, Eq, JsonSchema, PartialEq, Serialize)]
pub enum ReplicaPhase {
    /// Its directory is not there yet.
    #[default]
    Pending,
    /// It can serve.
    Ready,
    /// It cannot serve; the Ready condition says why.
    Failed,
    /// Its directory is being taken away.
    Removing,
}

impl GalleonReplica {
    /// Where in its life the replica is; a replica nobody has looked at is pending.
    pub fn phase(&self) -> ReplicaPhase {
        self.status.as_ref().map(|status| status.phase).unwrap_or_default()
    }

    /// Why the replica is not ready, in the node's words.
    pub fn trouble(&self) -> Option<&Condition> {
        let conditions = &self.status.as_ref()?.conditions;
        condition::get(conditions, condition_type::READY).filter(|ready| !ready.is_true())
    }
}
