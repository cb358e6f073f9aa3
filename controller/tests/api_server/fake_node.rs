//! A node plugin that does on the objects what the real one does, and nothing on disks.

use std::sync::{
    Arc,
    atomic::{AtomicBool, Ordering},
};

use futures::{StreamExt, TryStreamExt};
use galleonfs_api::{
    Condition, GalleonReplica, GalleonReplicaStatus, GalleonVolume, MEMBER_FINALIZER, ReplicaPhase, StoragePool,
    condition, condition_type, reason,
};
use kube::{
    Api, Resource, ResourceExt,
    api::PostParams,
    runtime::{WatchStreamExt, watcher},
};
use tokio::task::JoinSet;

use crate::lab::Lab;

/// How the node behaves.
#[derive(Clone, Copy, Debug, Default)]
pub struct Behaviour {
    /// Replicas fail instead of getting ready.
    pub fails: bool,
    /// Nothing is done for replicas and volumes until `wake` is called.
    pub sleeps: bool,
}

pub struct FakeNode {
    node: Node,
    tasks: JoinSet<()>,
}

#[derive(Clone)]
struct Node {
    name: String,
    usable_bytes: i64,
    fails: bool,
    asleep: Arc<AtomicBool>,
    pools: Api<StoragePool>,
    replicas: Api<GalleonReplica>,
    volumes: Api<GalleonVolume>,
}

impl FakeNode {
    pub fn start(lab: &Lab, name: &str, usable_bytes: i64, behaviour: Behaviour) -> Self {
        let node = Node {
            name: name.to_string(),
            usable_bytes,
            fails: behaviour.fails,
            asleep: Arc::new(AtomicBool::new(behaviour.sleeps)),
            pools: Api::namespaced(lab.client.clone(), &lab.namespace),
            replicas: Api::namespaced(lab.client.clone(), &lab.namespace),
            volumes: Api::namespaced(lab.client.clone(), &lab.namespace),
        };
        let mut fake = Self {
            node,
            tasks: JoinSet::new(),
        };
        let mine = watcher::Config::default().fields(&format!("spec.nodeName={name}"));
        let node = fake.node.clone();
        fake.tasks
            .spawn(each(fake.node.pools.clone(), mine.clone(), move |pool| {
                node.clone().tend_pool(pool)
            }));
        fake.watch_work();
        fake
    }

    /// Lets a sleeping node do what has piled up.
    pub fn wake(&mut self) {
        self.node.asleep.store(false, Ordering::SeqCst);
        self.watch_work();
    }

    fn watch_work(&mut self) {
        if self.node.asleep.load(Ordering::SeqCst) {
            return;
        }
        let mine = watcher::Config::default().fields(&format!("spec.nodeName={}", self.node.name));
        let node = self.node.clone();
        self.tasks.spawn(each(self.node.replicas.clone(), mine, move |replica| {
            node.clone().tend_replica(replica)
        }));
        let node = self.node.clone();
        let all = watcher::Config::default();
        self.tasks.spawn(each(self.node.volumes.clone(), all, move |volume| {
            node.clone().tend_volume(volume)
        }));
    }
}

async fn each<K, F>(api: Api<K>, config: watcher::Config, tend: impl Fn(K) -> F)
where
    K: Resource<DynamicType = ()> + Clone + std::fmt::Debug + Send + serde::de::DeserializeOwned + 'static,
    F: Future<Output = Result<(), kube::Error>>,
{
    let mut objects = watcher(api, config)
        .default_backoff()
        .applied_objects()
        .into_stream()
        .boxed();
    while let Ok(object) = objects.try_next().await {
        let Some(object) = object else { return };
        match tend(object).await {
            // Somebody else wrote first; the event of that write is on its way.
            Err(kube::Error::Api(status)) if status.code == 409 || status.code == 404 => {}
            Err(error) => panic!("the fake node: {error}"),
            Ok(()) => {}
        }
    }
}

impl Node {
    async fn tend_pool(self, mut pool: StoragePool) -> Result<(), kube::Error> {
        let status = pool.status.get_or_insert_default();
        if status.usable_bytes == Some(self.usable_bytes) {
            return Ok(());
        }
        status.usable_bytes = Some(self.usable_bytes);
        condition::set(
            &mut status.conditions,
            Condition::new(condition_type::READY, true, reason::READY, ""),
        );
        let written = self
            .pools
            .replace_status(&pool.name_any(), &PostParams::default(), &pool)
            .await;
        written.map(drop)
    }

    async fn tend_replica(self, mut replica: GalleonReplica) -> Result<(), kube::Error> {
        let name = replica.name_any();
        if replica.metadata.deletion_timestamp.is_some() {
            if replica
                .finalizers()
                .iter()
                .any(|finalizer| finalizer == MEMBER_FINALIZER)
            {
                return Ok(());
            }
            replica.finalizers_mut().clear();
            return self
                .replicas
                .replace(&name, &PostParams::default(), &replica)
                .await
                .map(drop);
        }
        let observed_size_bytes = Some(replica.spec.size_bytes);
        let status = match self.fails {
            false => GalleonReplicaStatus {
                phase: ReplicaPhase::Ready,
                observed_size_bytes,
                conditions: vec![],
            },
            true => GalleonReplicaStatus {
                phase: ReplicaPhase::Failed,
                observed_size_bytes: None,
                conditions: vec![Condition::new(
                    condition_type::READY,
                    false,
                    reason::READ_ONLY,
                    "mounted read-only",
                )],
            },
        };
        let before = replica.status.clone().unwrap_or_default();
        if (before.phase, before.observed_size_bytes) == (status.phase, status.observed_size_bytes) {
            return Ok(());
        }
        replica.status = Some(status);
        self.replicas
            .replace_status(&name, &PostParams::default(), &replica)
            .await
            .map(drop)
    }

    async fn tend_volume(self, mut volume: GalleonVolume) -> Result<(), kube::Error> {
        let wanted = volume.attached_node() == Some(self.name.as_str()) && !volume.is_deleting();
        let serving = volume.primary() == Some(self.name.as_str());
        let name = volume.name_any();
        let Some(config) = volume.status.as_mut().and_then(|status| status.config.as_mut()) else {
            return Ok(());
        };
        match (wanted, serving) {
            (true, false) => {
                config.epoch += 1;
                config.primary = Some(self.name.clone());
                config.incarnation = Some(format!("{}-{}", self.name, config.epoch));
            }
            (false, true) => (config.primary, config.incarnation) = (None, None),
            _ => return Ok(()),
        }
        self.volumes
            .replace_status(&name, &PostParams::default(), &volume)
            .await
            .map(drop)
    }
}
