//! The API server as the controller sees it: fresh reads for decisions, watched copies for waiting.
//!
//! Every decision is made on what a quorum read returned, and every write carries the resourceVersion it was made on, so
//! that a decision on old knowledge bounces off. The watched copies (`seen`) only tell when it is worth looking again.

mod seen;

use std::fmt::Debug;

use galleonfs_api::{GalleonReplica, GalleonVolume, StoragePool, name};
use k8s_openapi::api::{core::v1::Node, storage::v1::CSINode};
use kube::{
    Api, Client, Resource, ResourceExt,
    api::{DeleteParams, ListParams, PostParams, Preconditions},
};
use serde_json::Value;
use tokio::{sync::watch, time::Instant};

pub use seen::{Seen, SeenTask};

use crate::error::{Error, Kind, Result, is_conflict, is_object_missing};

/// Objects asked for in one request of a long list.
const LIST_CHUNK: u32 = 500;

/// Handles to everything the controller reads and writes.
#[derive(Clone)]
pub struct Cluster {
    pub namespace: String,
    pub volumes: Api<GalleonVolume>,
    pub replicas: Api<GalleonReplica>,
    pub pools: Api<StoragePool>,
    pub nodes: Api<Node>,
    pub csi_nodes: Api<CSINode>,
    pub seen: Seen,
}

impl Debug for Cluster {
    fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        formatter
            .debug_struct("Cluster")
            .field("namespace", &self.namespace)
            .finish_non_exhaustive()
    }
}

impl Cluster {
    /// Handles for one namespace, and the task that keeps the watched copies; nothing is seen until it runs.
    pub fn new(client: Client, namespace: &str) -> (Self, SeenTask) {
        let volumes = Api::namespaced(client.clone(), namespace);
        let replicas = Api::namespaced(client.clone(), namespace);
        let pools = Api::namespaced(client.clone(), namespace);
        let nodes = Api::all(client.clone());
        let (seen, task) = seen::watch(&volumes, &replicas, &pools, &nodes);
        let csi_nodes = Api::all(client);
        let namespace = namespace.to_string();
        (
            Self {
                namespace,
                volumes,
                replicas,
                pools,
                nodes,
                csi_nodes,
                seen,
            },
            task,
        )
    }

    /// The volume as it is now. An id that cannot be the name of an object is no volume of ours.
    pub async fn volume(&self, id: &str) -> Result<Option<GalleonVolume>> {
        if !name::is_dns_label(id) {
            return Ok(None);
        }
        get(&self.volumes, id).await
    }

    /// The volume, or NOT_FOUND.
    pub async fn existing_volume(&self, id: &str) -> Result<GalleonVolume> {
        let missing = || Error::new(Kind::NotFound, format!("there is no volume {id:?}"));
        self.volume(id).await?.ok_or_else(missing)
    }

    /// The replicas of exactly this volume, in order of their names.
    pub async fn replicas_of(&self, volume: &GalleonVolume) -> Result<Vec<GalleonReplica>> {
        let selector = ListParams::default().fields(&format!("spec.volumeName={}", volume.name_any()));
        let uid = volume.uid().unwrap_or_default();
        let mut replicas = list(&self.replicas, selector).await?;
        replicas.retain(|replica| replica.spec.volume_uid == uid);
        Ok(replicas)
    }

    /// The pools and then, in this order, the replicas: see `plan::placement`.
    pub async fn bookkeeping(&self) -> Result<(Vec<StoragePool>, Vec<GalleonReplica>)> {
        let pools = list(&self.pools, ListParams::default()).await?;
        let replicas = list(&self.replicas, ListParams::default()).await?;
        Ok((pools, replicas))
    }

    /// Whether the cluster has this node.
    pub async fn has_node(&self, node: &str) -> Result<bool> {
        if !name::is_dns_subdomain(node) {
            return Ok(false);
        }
        match self.nodes.get_metadata(node).await {
            Ok(_) => Ok(true),
            Err(error) if is_object_missing(&error) => Ok(false),
            Err(error) => Err(Error::api(format!("reading Node {node}"), error)),
        }
    }

    /// Whether the API server answers and serves our resources; else why not.
    pub async fn probe(&self) -> Result<(), String> {
        async fn one<K>(api: &Api<K>) -> Result<(), String>
        where
            K: Resource<DynamicType = ()> + Clone + Debug + serde::de::DeserializeOwned,
        {
            match api.list_metadata(&ListParams::default().limit(1)).await {
                Ok(_) => Ok(()),
                Err(kube::Error::Api(status)) if status.code == 404 => Err(format!(
                    "the API server does not serve {}.{}; install the CustomResourceDefinitions of this release",
                    K::plural(&()),
                    K::group(&())
                )),
                Err(error) => Err(Error::api(format!("listing {}", K::plural(&())), error).full_text()),
            }
        }
        one(&self.volumes).await?;
        one(&self.replicas).await?;
        one(&self.pools).await
    }

    /// Whether a pool says that its disk is not to be trusted, as last seen. An old view costs a copy too many at worst.
    pub fn is_failing(&self, pool: &str) -> bool {
        self.seen.is_failing(&self.namespace, pool)
    }

    /// For waiting until the objects say something, at most until a deadline.
    pub fn waiter(&self, deadline: Instant) -> Waiter {
        Waiter {
            seen: self.seen.clone(),
            changes: self.seen.changes(),
            deadline,
        }
    }
}

/// Waits between looks. Arm it, look with a fresh read, and if that is not what you wait for, ask for the next look:
/// a change that comes after arming is not missed.
#[derive(Debug)]
pub struct Waiter {
    seen: Seen,
    changes: watch::Receiver<()>,
    deadline: Instant,
}

impl Waiter {
    /// Call this before each look.
    pub fn arm(&mut self) {
        self.changes.mark_unchanged();
    }

    /// Waits for a change after which `worth_a_look` says so of the watched copies. `false`: the deadline has passed.
    pub async fn again(&mut self, worth_a_look: impl Fn(&Seen) -> bool) -> bool {
        loop {
            match tokio::time::timeout_at(self.deadline, self.changes.changed()).await {
                Ok(Ok(())) if worth_a_look(&self.seen) => return true,
                Ok(Ok(())) => {}
                Ok(Err(_)) | Err(_) => return false,
            }
        }
    }
}

/// A fresh read of one object.
pub async fn get<K>(api: &Api<K>, name: &str) -> Result<Option<K>>
where
    K: Resource<DynamicType = ()> + Clone + Debug + serde::de::DeserializeOwned,
{
    match api.get(name).await {
        Ok(object) => Ok(Some(object)),
        Err(error) if is_object_missing(&error) => Ok(None),
        Err(error) => Err(Error::api(format!("reading {} {name}", K::kind(&())), error)),
    }
}

/// A fresh read of all objects that match, in order of their names.
pub async fn list<K>(api: &Api<K>, mut params: ListParams) -> Result<Vec<K>>
where
    K: Resource<DynamicType = ()> + Clone + Debug + serde::de::DeserializeOwned,
{
    params.limit = Some(LIST_CHUNK);
    let mut objects = vec![];
    loop {
        let chunk = api.list(&params).await;
        let chunk = chunk.map_err(|error| Error::api(format!("listing {}", K::plural(&())), error))?;
        objects.extend(chunk.items);
        match chunk.metadata.continue_ {
            Some(token) if !token.is_empty() => params = params.continue_token(&token),
            _ => break,
        }
    }
    objects.sort_by_key(|object| object.name_any());
    Ok(objects)
}

/// Writes an object's spec or metadata under its resourceVersion. `None`: somebody else wrote first, look again.
pub async fn replace<K>(api: &Api<K>, object: &K) -> Result<Option<K>>
where
    K: Resource<DynamicType = ()> + Clone + Debug + serde::de::DeserializeOwned + serde::Serialize,
{
    let name = object.name_any();
    let written = api.replace(&name, &PostParams::default(), object).await;
    settle(format!("writing {} {name}", K::kind(&())), written)
}

/// Writes an object's status under its resourceVersion. `None`: somebody else wrote first, look again.
pub async fn replace_status<K>(api: &Api<K>, object: &K) -> Result<Option<K>>
where
    K: Resource<DynamicType = ()> + Clone + Debug + serde::de::DeserializeOwned + serde::Serialize,
{
    let name = object.name_any();
    let written = api.replace_status(&name, &PostParams::default(), object).await;
    settle(format!("writing the status of {} {name}", K::kind(&())), written)
}

fn settle<K>(doing: String, written: Result<K, kube::Error>) -> Result<Option<K>> {
    match written {
        Ok(object) => Ok(Some(object)),
        Err(error) if is_conflict(&error) || is_object_missing(&error) => Ok(None),
        Err(error) => Err(Error::api(doing, error)),
    }
}

/// Deletes exactly this object; with `unchanged`, only if nobody has written it since it was read. `false`: somebody has.
pub async fn delete<K>(api: &Api<K>, object: &K, unchanged: bool) -> Result<bool>
where
    K: Resource<DynamicType = ()> + Clone + Debug + serde::de::DeserializeOwned,
{
    let name = object.name_any();
    let resource_version = object.resource_version().filter(|_| unchanged);
    let preconditions = Preconditions {
        uid: object.uid(),
        resource_version,
    };
    let params = DeleteParams {
        preconditions: Some(preconditions),
        ..DeleteParams::default()
    };
    match api.delete(&name, &params).await {
        Ok(_) => Ok(true),
        Err(error) if is_object_missing(&error) => Ok(true),
        // Another uid under this name: the object we meant is gone, too.
        Err(error) if is_conflict(&error) => Ok(!unchanged),
        Err(error) => Err(Error::api(format!("deleting {} {name}", K::kind(&())), error)),
    }
}

/// A server-side apply of the fields of a status that the controller owns.
pub fn status_patch<K: Resource<DynamicType = ()>>(name: &str, status: Value) -> Value {
    serde_json::json!({
        "apiVersion": K::api_version(&()),
        "kind": K::kind(&()),
        "metadata": {"name": name},
        "status": status,
    })
}
