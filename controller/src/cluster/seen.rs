//! Watched copies of what the controller waits for and counts roughly.
//!
//! They lag behind by nature. Nothing is decided on them that could do harm if they are old: they wake up who waits, and
//! they answer GetCapacity, which is a hint by its own definition.

use std::{collections::BTreeSet, fmt::Debug};

use futures::{Stream, StreamExt, future::BoxFuture, stream::BoxStream};
use galleonfs_api::{GalleonReplica, GalleonVolume, StoragePool};
use k8s_openapi::api::core::v1::{Node, NodeCondition};
use kube::{
    Api, Resource, ResourceExt,
    runtime::{
        WatchStreamExt,
        reflector::{self, ObjectRef, Store},
        watcher,
    },
};
use tokio::sync::watch;

use crate::plan::placement::Standing;

/// Where a node says in which zone it stands.
const ZONE_LABEL: &str = "topology.kubernetes.io/zone";

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
    // Of a node only its readiness and its labels count here; a large cluster's image lists would be megabytes.
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

    /// The volumes of which this is true, as last seen.
    pub fn volumes_where(&self, wanted: impl Fn(&GalleonVolume) -> bool) -> Vec<ObjectRef<GalleonVolume>> {
        let volumes = self.volumes.state();
        let found = volumes.iter().filter(|volume| wanted(volume));
        found.map(|volume| ObjectRef::from_obj(volume.as_ref())).collect()
    }

    /// Names of the volumes that have a replica in this pool, as last seen.
    pub fn volumes_in(&self, pool: &str) -> BTreeSet<String> {
        let replicas = self.replicas.state();
        let here = replicas.iter().filter(|replica| replica.spec.pool_name == pool);
        here.map(|replica| replica.spec.volume_name.clone()).collect()
    }

    /// Whether a pool says that its disk is not to be trusted, as last seen.
    pub fn is_failing(&self, namespace: &str, pool: &str) -> bool {
        let pool = self.pools.get(&ObjectRef::new(pool).within(namespace));
        pool.is_some_and(|pool| pool.failing().is_some())
    }

    /// The replica of this name, as last seen.
    pub fn replica(&self, namespace: &str, name: &str) -> Option<std::sync::Arc<GalleonReplica>> {
        self.replicas.get(&ObjectRef::new(name).within(namespace))
    }

    /// Whether the copies are complete.
    pub fn is_complete(&self) -> bool {
        ready(&self.volumes) && ready(&self.replicas) && ready(&self.pools) && ready(&self.nodes)
    }

    /// What counts of a node when replicas are placed. While the nodes have not been seen, nothing is held against any.
    pub fn standing(&self, node: &str) -> Standing {
        if !ready(&self.nodes) {
            return Standing::default();
        }
        let Some(node) = self.nodes.get(&ObjectRef::new(node)) else {
            return Standing {
                trouble: Some("is not in the cluster any more".to_string()),
                since: None,
                zone: None,
            };
        };
        let readiness = readiness(&node);
        let well = readiness.is_some_and(|condition| condition.status == "True");
        let since = readiness.and_then(|condition| Some(condition.last_transition_time.as_ref()?.0));
        Standing {
            trouble: (!well).then(|| "is not ready".to_string()),
            since: since.filter(|_| !well),
            zone: node.labels().get(ZONE_LABEL).cloned(),
        }
    }
}

fn readiness(node: &Node) -> Option<&NodeCondition> {
    let conditions = node.status.as_ref()?.conditions.as_deref()?;
    conditions.iter().find(|condition| condition.type_ == "Ready")
}

fn ready<K>(store: &Store<K>) -> bool
where
    K: Resource<DynamicType = ()> + Clone + 'static,
{
    use futures::FutureExt;
    matches!(store.wait_until_ready().now_or_never(), Some(Ok(())))
}
