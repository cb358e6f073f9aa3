//! This node's own objects: what the API server wants of it, done and reported.
//!
//! Three watches (volumes attached to this node, its replicas, its pools) feed a cache and a queue; for each object that
//! moved, one reconcile looks at the object, at the engine and at the disk, and takes the next step. Each step is level
//! triggered: it may be repeated, and what it needs it looks at, so a crash between any two steps costs nothing but time.
//!
//! What always holds:
//!
//! - An engine is started only under an epoch that a compare-and-swap on the volume's object granted to this process.
//! - A volume is closed only when nothing of it is mounted here; the primary is cleared only after it is closed.
//! - A replica of a volume of several takes part in it from the time it is made until it is removed, wherever the volume is
//!   attached; it is called ready only while it does.
//! - Data is removed only for a replica whose object is there and says that it is being deleted, never because an object
//!   is missing. A replica that was ready once is never made a second time.
//! - Status is written when it changed.

mod cache;
mod configs;
mod hosting;
mod kubernetes;
mod leaders;
mod leading;
mod objects;
mod opening;
mod patience;
mod plan;
mod pools;
mod queue;
mod replicas;
#[cfg(test)]
mod tests;
mod volumes;
mod watch;

use std::collections::{HashMap, HashSet};
use std::path::PathBuf;
use std::sync::{Arc, Mutex, PoisonError};

use futures::FutureExt;
use futures::future::BoxFuture;
use galleonfs_api::Endpoint;
use tokio::time::Instant;
use uuid::Uuid;

pub use cache::Cache;
pub use kubernetes::Kubernetes;
pub use objects::{Notice, ObjectError, Objects, Subject};
pub use queue::{Next, Queue, Retry};
pub use watch::watch;

use crate::csi::{Directory, Found};
use crate::pool::Pools;
use crate::pool::wear::Wear;
use crate::served::{Guards, NodeEngine, ReplicaDisks, Served};
use crate::staging::Stager;
use hosting::Hosting;
use leaders::LookUps;
use leading::Led;
use patience::Patience;
use plan::Grant;

/// One thing to reconcile.
#[derive(Debug, Clone, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Key {
    Volume(String),
    Replica(String),
    Pool(String),
}

/// Everything a reconcile needs. One per process.
pub struct Registry {
    pub node: String,
    pub cluster_id: Uuid,
    /// Pool paths below here are made when they are missing.
    pub own_root: PathBuf,
    pub objects: Arc<dyn Objects>,
    pub cache: Cache,
    pub engine: Arc<dyn NodeEngine>,
    pub disks: Arc<dyn ReplicaDisks>,
    pub stager: Stager,
    pub guards: Guards,
    pub served: Served,
    pub pools: Pools,
    pub endpoint: OwnEndpoint,
    pub queue: Queue<Key>,
    leaders: LookUps,
    own: Mutex<Own>,
}

/// What this process alone knows.
#[derive(Debug, Default)]
struct Own {
    /// The epochs that were granted to this process, by volume.
    grants: HashMap<String, Grant>,
    /// Volumes whose mounts are in place on their present device.
    restored: HashSet<String>,
    /// Volumes that are not attached here, and whose objects were asked whether a predecessor of ours still holds them.
    settled: HashSet<String>,
    /// Grants to lead volumes of several replicas that have served for their one attempt.
    spent: HashSet<String>,
    /// Volumes of several replicas that are led here, or are about to be.
    led: HashMap<String, Led>,
    /// When a volume of several replicas may be led again after that failed.
    patience: HashMap<String, Patience>,
    /// Replicas that take part in volumes of several.
    hosting: HashMap<String, Hosting>,
    /// Where other nodes' pools are, and when that was read.
    reached: HashMap<String, (Instant, Option<Endpoint>)>,
    /// Why a replica could not be opened: a reason word and a sentence.
    troubles: HashMap<String, (&'static str, String)>,
    /// The last notice about each object, so that nobody is told the same thing twice in a row.
    notices: HashMap<Subject, Notice>,
    /// Pools whose leftovers were swept.
    swept: HashSet<String>,
    /// What was found damaged, by pool, and when the stores were asked last.
    wear: HashMap<String, Wear>,
    asked_for_damage: Option<Instant>,
    /// What was measured last: available bytes of the file system, bytes of our replicas.
    measured: HashMap<String, (u64, u64)>,
}

impl std::fmt::Debug for Registry {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Registry")
            .field("node", &self.node)
            .finish_non_exhaustive()
    }
}

/// The parts that [`Registry::new`] puts together.
pub struct Parts {
    pub node: String,
    pub cluster_id: Uuid,
    pub own_root: PathBuf,
    pub objects: Arc<dyn Objects>,
    pub engine: Arc<dyn NodeEngine>,
    pub disks: Arc<dyn ReplicaDisks>,
    pub stager: Stager,
    pub guards: Guards,
    pub served: Served,
    pub pools: Pools,
    pub endpoint: OwnEndpoint,
}

/// Where this node is reached by others, as soon as it is known: pools say so. Cheap to clone; all clones are one.
pub type OwnEndpoint = Arc<std::sync::OnceLock<Endpoint>>;

impl std::fmt::Debug for Parts {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Parts")
            .field("node", &self.node)
            .finish_non_exhaustive()
    }
}

impl Registry {
    pub fn new(parts: Parts) -> Arc<Registry> {
        Arc::new(Registry {
            node: parts.node,
            cluster_id: parts.cluster_id,
            own_root: parts.own_root,
            leaders: LookUps::new(parts.objects.clone()),
            objects: parts.objects,
            cache: Cache::default(),
            engine: parts.engine,
            disks: parts.disks,
            stager: parts.stager,
            guards: parts.guards,
            served: parts.served,
            pools: parts.pools,
            endpoint: parts.endpoint,
            queue: Queue::default(),
            own: Mutex::default(),
        })
    }

    /// Starts to work off the queue. Nothing is reconciled before all three watches have seen everything once: an object
    /// that was not listed yet would look like one that is gone.
    pub fn start(self: &Arc<Registry>) {
        let registry = Arc::downgrade(self);
        self.queue.start(move |key| {
            let registry = registry.upgrade();
            async move {
                match registry {
                    Some(registry) => registry.reconcile(&key).await,
                    None => Ok(Next::Gone),
                }
            }
            .boxed()
        });
        let volumes = self
            .cache
            .volumes
            .names()
            .into_iter()
            .chain(self.stager.records().volumes());
        // The replicas here tell of volumes that a predecessor of ours may have left as their primary.
        let of_replicas = self
            .cache
            .replicas
            .list()
            .into_iter()
            .map(|replica| replica.spec.volume_name.clone());
        for volume in volumes.chain(of_replicas) {
            self.queue.wake(Key::Volume(volume));
        }
        self.cache
            .replicas
            .names()
            .into_iter()
            .for_each(|name| self.queue.wake(Key::Replica(name)));
        self.cache
            .pools
            .names()
            .into_iter()
            .for_each(|name| self.queue.wake(Key::Pool(name)));
    }

    /// Takes the next step for one object.
    pub async fn reconcile(&self, key: &Key) -> Result<Next, Retry> {
        match key {
            Key::Volume(name) => self.reconcile_volume(name).await,
            Key::Replica(name) => self.reconcile_replica(name).await,
            Key::Pool(name) => self.reconcile_pool(name).await,
        }
    }

    /// To be called when the cache changed: whoever looks at this object is woken.
    pub fn changed(&self, key: Key) {
        match &key {
            Key::Volume(_) => {}
            Key::Replica(name) => {
                if let Some(replica) = self.cache.replicas.get(name) {
                    self.queue.wake(Key::Volume(replica.spec.volume_name.clone()));
                }
            }
            Key::Pool(_) => {}
        }
        self.queue.wake(key);
    }

    fn own<T>(&self, with: impl FnOnce(&mut Own) -> T) -> T {
        with(&mut self.own.lock().unwrap_or_else(PoisonError::into_inner))
    }

    /// Tells a person, unless it was the last thing we told about this object.
    async fn notice(&self, subject: Subject, notice: Notice) {
        let news = self.own(|own| own.notices.insert(subject.clone(), notice.clone()).as_ref() != Some(&notice));
        if news {
            self.objects.notify(&subject, &notice).await;
        }
    }

    fn forget_notice(&self, subject: &Subject) {
        self.own(|own| own.notices.remove(subject));
    }
}

/// The node service asks the cache first: volumes that are attached here are known without the API server.
impl Directory for Registry {
    fn find<'a>(&'a self, volume: &'a str) -> BoxFuture<'a, Result<Option<Found>, String>> {
        async move {
            let object = match self.cache.volumes.get(volume) {
                Some(object) => Some(object),
                None => self
                    .objects
                    .volume(volume)
                    .await
                    .map_err(|error| error.to_string())?
                    .map(Arc::new),
            };
            Ok(object.map(|object| Found {
                uid: object.metadata.uid.clone().unwrap_or_default(),
                attach_to: object.attached_node().map(str::to_owned),
                fs_type: object.spec.capability.fs_type.clone(),
            }))
        }
        .boxed()
    }

    fn unstaged(&self, volume: &str) {
        self.queue.wake(Key::Volume(volume.to_owned()));
    }
}
