//! StoragePool: a directory on one node that holds replicas.
//!
//! One object per pool and node. The node reports how much it can hold; the controller decides what goes there. What is
//! promised is counted in two places that are always read in this order: `status.reservations` of the pool, then the
//! replicas in it. A placement is won by changing `status.reservations` under the resourceVersion that was read before
//! the replicas were counted, so two controllers cannot both win the last gigabyte.

use std::collections::BTreeMap;

use kube::{CustomResource, KubeSchema};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::{Condition, condition, words::condition_type};

/// A directory on one node.
#[derive(CustomResource, KubeSchema, Clone, Debug, Deserialize, PartialEq, Serialize)]
#[kube(
    group = "galleonfs.io",
    version = "v1alpha1",
    kind = "StoragePool",
    plural = "storagepools",
    shortname = "gpool",
    category = "galleonfs",
    namespaced,
    status = "StoragePoolStatus",
    derive = "PartialEq",
    doc = "A directory on one node in which replicas live. Named <pool>.<node>.",
    selectable = ".spec.nodeName",
    validation = Rule::new("self.metadata.name == self.spec.pool + '.' + self.spec.nodeName")
        .message("a StoragePool is named <spec.pool>.<spec.nodeName>"),
    printcolumn(name = "Pool", type_ = "string", json_path = ".spec.pool"),
    printcolumn(name = "Node", type_ = "string", json_path = ".spec.nodeName"),
    printcolumn(name = "Media", type_ = "string", json_path = ".spec.media"),
    printcolumn(name = "Path", type_ = "string", json_path = ".spec.path", priority = 1),
    printcolumn(name = "Usable", type_ = "integer", format = "int64", json_path = ".status.usableBytes"),
    printcolumn(name = "Ready", type_ = "string", json_path = ".status.conditions[?(@.type==\"Ready\")].status"),
    printcolumn(name = "Reason", type_ = "string", json_path = ".status.conditions[?(@.type==\"Ready\")].reason"),
    printcolumn(name = "Age", type_ = "date", json_path = ".metadata.creationTimestamp")
)]
#[serde(rename_all = "camelCase")]
pub struct StoragePoolSpec {
    /// Name of the pool; pools of the same name on different nodes belong together.
    #[schemars(length(min = 1, max = 63), regex(pattern = r"^[a-z0-9]([-a-z0-9]*[a-z0-9])?$"))]
    #[x_kube(validation = Rule::new("self == oldSelf").message("pool is immutable"))]
    pub pool: String,
    /// The node the directory is on.
    #[schemars(length(min = 1, max = 253))]
    #[x_kube(validation = Rule::new("self == oldSelf").message("nodeName is immutable"))]
    pub node_name: String,
    /// Absolute path of the directory.
    #[schemars(length(min = 2, max = 1024))]
    #[x_kube(
        validation = Rule::new("self == oldSelf").message("path is immutable: replicas live there"),
        validation = Rule::new("self.startsWith('/') && !self.contains('/../') && !self.endsWith('/..')")
            .message("path must be absolute and must not contain '..'")
    )]
    pub path: String,
    /// The medium behind it, as StorageClasses ask for it.
    pub media: MediaType,
    /// Bytes of the file system that GalleonFS leaves free.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = 0))]
    pub reserve_bytes: Option<i64>,
}

/// What is behind a pool.
#[derive(Clone, Copy, Debug, Deserialize, Eq, JsonSchema, Ord, PartialEq, PartialOrd, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum MediaType {
    Ssd,
    Hdd,
    Nvme,
}

impl MediaType {
    /// The word used in parameters, flags and objects.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Ssd => "ssd",
            Self::Hdd => "hdd",
            Self::Nvme => "nvme",
        }
    }
}

impl std::str::FromStr for MediaType {
    type Err = String;

    fn from_str(word: &str) -> Result<Self, String> {
        match word {
            "ssd" => Ok(Self::Ssd),
            "hdd" => Ok(Self::Hdd),
            "nvme" => Ok(Self::Nvme),
            other => Err(format!("{other:?} is no medium; there are: hdd, nvme, ssd")),
        }
    }
}

/// How a pool fares. The node writes all of it but `reservations`, and must carry that over when it writes the rest.
#[derive(KubeSchema, Clone, Debug, Default, Deserialize, PartialEq, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct StoragePoolStatus {
    /// Identity in the label file of the directory.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub pool_uid: Option<String>,
    /// What replicas may use altogether: the file system's available bytes, plus what our replicas already take, minus
    /// the reserve.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub usable_bytes: Option<i64>,
    /// Space promised to volumes (by uid) whose replica here does not exist yet or is about to grow. Written by the
    /// controller only, under the resourceVersion it read.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub reservations: BTreeMap<String, Reservation>,
    /// Where the node plugin that serves this pool takes connections of other nodes.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub endpoint: Option<Endpoint>,
    /// What a person should know.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    #[x_kube(merge_strategy = ListMerge::Map(vec!["type".into()]))]
    pub conditions: Vec<Condition>,
}

/// Where a node plugin is reached by others, and who they find there. What counts is the certificate that it shows: this
/// only says where to knock.
#[derive(Clone, Debug, Deserialize, Eq, JsonSchema, PartialEq, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct Endpoint {
    /// Address and port.
    #[schemars(length(min = 1, max = 64))]
    pub address: String,
    /// The uid of the Node.
    #[schemars(length(min = 1, max = 64))]
    pub node_uid: String,
}

/// Space promised to one volume.
#[derive(Clone, Debug, Deserialize, Eq, JsonSchema, PartialEq, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct Reservation {
    /// Name of the GalleonVolume.
    pub volume_name: String,
    /// All that the volume will hold in this pool, what its replica has now included.
    pub bytes: i64,
}

impl StoragePool {
    /// Name of the object for a pool on a node.
    pub fn object_name(pool: &str, node_name: &str) -> String {
        format!("{pool}.{node_name}")
    }

    /// The Ready condition, if the node has reported one.
    pub fn ready(&self) -> Option<&Condition> {
        condition::get(&self.status.as_ref()?.conditions, condition_type::READY)
    }

    /// Why the disk is not to be trusted, if the node has said so.
    pub fn failing(&self) -> Option<&Condition> {
        let failing = condition::get(&self.status.as_ref()?.conditions, condition_type::FAILING)?;
        failing.is_true().then_some(failing)
    }

    /// Whether the node says that replicas can be made here.
    pub fn is_ready(&self) -> bool {
        self.ready().is_some_and(Condition::is_true)
    }
}
