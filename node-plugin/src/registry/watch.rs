//! The watches: they keep the cache and wake the queue.

use std::sync::Arc;

use futures::StreamExt;
use kube::runtime::WatchStreamExt;
use kube::runtime::watcher::{Config, Event, watcher};
use kube::{Api, ResourceExt};
use serde::de::DeserializeOwned;
use tokio::sync::oneshot;
use tokio::task::JoinHandle;

use super::cache::{Cache, Store};
use super::{Key, Kubernetes, Registry};

/// Watches this node's objects for ever. The receiver hears when everything was seen once.
pub fn watch(registry: &Arc<Registry>, kubernetes: &Kubernetes) -> (Vec<JoinHandle<()>>, oneshot::Receiver<()>) {
    let node = &registry.node;
    let of_node = Config::default().fields(&format!("spec.nodeName={node}"));
    let attached = Config::default().fields(&format!("spec.attachTo.nodeName={node}"));
    let (volumes, seen_volumes) = oneshot::channel();
    let (replicas, seen_replicas) = oneshot::channel();
    let (pools, seen_pools) = oneshot::channel();
    let (seen, all) = oneshot::channel();
    let tasks = vec![
        tokio::spawn(one(
            registry.clone(),
            kubernetes.api(),
            attached,
            |cache| &cache.volumes,
            Key::Volume,
            volumes,
        )),
        tokio::spawn(one(
            registry.clone(),
            kubernetes.api(),
            of_node.clone(),
            |cache| &cache.replicas,
            Key::Replica,
            replicas,
        )),
        tokio::spawn(one(
            registry.clone(),
            kubernetes.api(),
            of_node,
            |cache| &cache.pools,
            Key::Pool,
            pools,
        )),
        tokio::spawn(async move {
            // A watch ends only with the process, and then nobody listens.
            if let (Ok(()), Ok(()), Ok(())) = tokio::join!(seen_volumes, seen_replicas, seen_pools) {
                let _ = seen.send(());
            }
        }),
    ];
    (tasks, all)
}

async fn one<K>(
    registry: Arc<Registry>,
    api: Api<K>,
    config: Config,
    store: fn(&Cache) -> &Store<K>,
    key: fn(String) -> Key,
    seen: oneshot::Sender<()>,
) where
    K: kube::Resource<DynamicType = ()> + Clone + std::fmt::Debug + DeserializeOwned + Send + Sync + 'static,
{
    let mut seen = Some(seen);
    let mut listing = Vec::new();
    let mut events = watcher(api, config)
        .default_backoff()
        .modify(|object| {
            // The largest part of an object, and no business of ours.
            object.meta_mut().managed_fields = None;
        })
        .boxed();
    while let Some(event) = events.next().await {
        let store = store(&registry.cache);
        match event {
            Ok(Event::Init) => listing.clear(),
            Ok(Event::InitApply(object)) => listing.push(object),
            Ok(Event::InitDone) => {
                let changed = store.replace(std::mem::take(&mut listing));
                if let Some(seen) = seen.take() {
                    let _ = seen.send(());
                }
                changed.into_iter().for_each(|name| registry.changed(key(name)));
            }
            Ok(Event::Apply(object)) => registry.changed(key(store.put(object))),
            Ok(Event::Delete(object)) => {
                let name = object.name_any();
                store.remove(&name);
                registry.changed(key(name));
            }
            Err(error) => {
                tracing::warn!(kind = %K::kind(&()), %error, "watching this node's objects failed; trying again")
            }
        }
    }
}
