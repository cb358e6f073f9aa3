//! Watched copies of what the controller waits for and counts roughly.
//!
//! They lag behind by nature. Nothing is decided on them that could do harm if they are old: they wake up who waits, and
//! they answer GetCapacity, which is a hint by its own definition.

use std::fmt::Debug;

use futures::{Stream, StreamExt, future::BoxFuture, stream::BoxStream};
use galleonfs_api::{GalleonReplica, GalleonVolume, StoragePool};
use k8s_openapi::api::core::v1::Node;
use kube::{
    Api, Resource, ResourceExt,
    runtime::{
        WatchStreamExt,
        reflector::{self, ObjectRef, Store},
        watcher,
    },
};
use tokio::sync::watch;

/// The watched copies.
#[derive(Clone)]
pub struct Seen {
    pub volumes: Store<GalleonVolume>,
    pub replicas: Store<GalleonReplica>,
    pub pools: Store<StoragePool>,
    nodes: Store<Node>,
    changes: watch::Receiver<()>,
}

impl Debug for Seen {
    fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        formatter.write_str("Seen")
    }
}

/// Keeps the copies. Runs until it is dropped.
pub type SeenTask = BoxFuture<'static, ()>;

/// Starts nothing by itself: the copies are kept while the task runs.
pub fn watch(
    volumes: &Api<GalleonVolume>,
    replicas: &Api<GalleonReplica>,
    pools: &Api<StoragePool>,
    nodes: &Api<Node>,
) -> (Seen, SeenTask) {
    let (changed, changes) = watch::channel(());
    let (volumes, volume_events) = copy(volumes, |_| {});
    let (replicas, replica_events) = copy(replicas, |_| {});
    let (pools, pool_events) = copy(pools, |_| {});
    // Of a node only its readiness counts here; a large cluster's image lists would be megabytes.
    let (nodes, node_events) = copy(nodes, |node: &mut Node| {
        node.spec = None;
        if let Some(status) = &mut node.status {
            let conditions = status.conditions.take();
            *status = k8s_openapi::api::core::v1::NodeStatus {
                conditions,
                ..Default::default()
            };
        }
    });
    let task = async move {
        let mut events = futures::stream::select_all([volume_events, replica_events, pool_events, node_events]);
        while events.next().await.is_some() {
            changed.send_replace(());
        }
    };
    (
        Seen {
            volumes,
            replicas,
            pools,
            nodes,
            changes,
        },
        Box::pin(task),
    )
}

fn copy<K>(api: &Api<K>, mut trim: impl FnMut(&mut K) + Send + 'static) -> (Store<K>, BoxStream<'static, ()>)
where
    K: Resource<DynamicType = ()> + Clone + Debug + Send + Sync + serde::de::DeserializeOwned + 'static,
{
    let (store, writer) = reflector::store();
    let events = watcher(api.clone(), watcher::Config::default())
        .default_backoff()
        .modify(move |object| {
            object.managed_fields_mut().clear();
            trim(object);
        });
    (store, report(reflector::reflector(writer, events)).boxed())
}

fn report<T, K>(events: T) -> impl Stream<Item = ()>
where
    T: Stream<Item = watcher::Result<watcher::Event<K>>>,
    K: Resource<DynamicType = ()>,
{
    events.map(|event| {
        if let Err(error) = event {
            tracing::warn!(kind = %K::kind(&()), %error, "watching failed; trying again");
        }
    })
}

impl Seen {
    /// Changes when any copy may have changed.
    pub fn changes(&self) -> watch::Receiver<()> {
        self.changes.clone()
    }

    /// The volume of this name, as last seen.
    pub fn volume(&self, namespace: &str, name: &str) -> Option<std::sync::Arc<GalleonVolume>> {
        self.volumes.get(&ObjectRef::new(name).within(namespace))
    }

    /// The replica of this name, as last seen.
    pub fn replica(&self, namespace: &str, name: &str) -> Option<std::sync::Arc<GalleonReplica>> {
        self.replicas.get(&ObjectRef::new(name).within(namespace))
    }

    /// Whether the copies are complete.
    pub fn is_complete(&self) -> bool {
        ready(&self.volumes) && ready(&self.replicas) && ready(&self.pools) && ready(&self.nodes)
    }

    /// Why a node should not get new replicas. While the nodes have not been seen, nothing is held against any.
    pub fn node_trouble(&self, node: &str) -> Option<String> {
        if !ready(&self.nodes) {
            return None;
        }
        let Some(node) = self.nodes.get(&ObjectRef::new(node)) else {
            return Some("is not in the cluster any more".to_string());
        };
        let conditions = node
            .status
            .as_ref()
            .and_then(|status| status.conditions.as_deref())
            .unwrap_or_default();
        let readiness = conditions.iter().find(|condition| condition.type_ == "Ready");
        match readiness.map(|condition| condition.status.as_str()) {
            Some("True") => None,
            _ => Some("is not ready".to_string()),
        }
    }
}

fn ready<K>(store: &Store<K>) -> bool
where
    K: Resource<DynamicType = ()> + Clone + 'static,
{
    use futures::FutureExt;
    matches!(store.wait_until_ready().now_or_never(), Some(Ok(())))
}
