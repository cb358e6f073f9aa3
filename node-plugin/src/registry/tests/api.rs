//! An API server in memory, which keeps resource versions: lost races and lost answers are shown without a cluster.

use std::collections::BTreeMap;
use std::sync::Mutex;

use futures::FutureExt;
use futures::future::BoxFuture;
use galleonfs_api::{GalleonReplica, GalleonVolume, StoragePool};
use kube::ResourceExt;
use uuid::Uuid;

use crate::registry::objects::{Notice, ObjectError, Objects, Subject};

#[derive(Default)]
pub(super) struct World {
    pub(super) volumes: BTreeMap<String, GalleonVolume>,
    pub(super) replicas: BTreeMap<String, GalleonReplica>,
    pub(super) pools: BTreeMap<String, StoragePool>,
    /// Uids of nodes that are not what everybody takes them for; None of those that there are not.
    pub(super) nodes: BTreeMap<String, Option<Uuid>>,
    pub(super) node_reads: usize,
    pub(super) version: u64,
    pub(super) writes: usize,
    pub(super) notices: Vec<(String, Notice)>,
    /// Every request fails with this.
    pub(super) failing: Option<ObjectError>,
    /// Every write fails with this.
    pub(super) refusing: Option<ObjectError>,
    /// The next write is done, and its answer lost.
    pub(super) lost: bool,
    /// Volumes are neither read nor written: nobody answers.
    pub(super) hanging: bool,
}

/// An API server in memory: resource versions, and the rules that the real one enforces on a configuration.
#[derive(Default)]
pub(super) struct FakeApi(Mutex<World>);

impl FakeApi {
    pub(super) fn with<T>(&self, with: impl FnOnce(&mut World) -> T) -> T {
        with(&mut self.0.lock().unwrap())
    }

    fn put<K: ResourceExt + Clone>(
        &self,
        object: &K,
        rows: fn(&mut World) -> &mut BTreeMap<String, K>,
        check: impl FnOnce(&K, &K),
        take: impl FnOnce(&mut K, &K),
    ) -> Result<K, ObjectError> {
        self.with(|world| {
            if let Some(error) = world.failing.as_ref().or(world.refusing.as_ref()) {
                return Err(error.clone());
            }
            world.version += 1;
            world.writes += 1;
            let version = world.version.to_string();
            let old = rows(world).get_mut(&object.name_any()).ok_or(ObjectError::NotFound)?;
            if old.resource_version() != object.resource_version() {
                return Err(ObjectError::Conflict);
            }
            check(old, object);
            take(old, object);
            old.meta_mut().resource_version = Some(version);
            let new = old.clone();
            if std::mem::take(&mut world.lost) {
                Err(ObjectError::Away("the answer was lost".into()))
            } else {
                Ok(new)
            }
        })
    }
}

fn check_config(old: &GalleonVolume, new: &GalleonVolume) {
    let (Some(old), Some(new)) = (old.config(), new.config()) else {
        return;
    };
    assert!(new.epoch >= old.epoch, "an epoch went back");
    if new.epoch == old.epoch && new.primary.is_some() && old.primary.is_some() {
        assert_eq!(
            (&new.primary, &new.incarnation),
            (&old.primary, &old.incarnation),
            "two primaries in one epoch"
        );
    }
    assert!(!new.in_sync.is_empty());
    assert!(
        new.epoch == old.epoch || new.in_sync.iter().all(|name| old.in_sync.contains(name)),
        "a replica became in sync by decree"
    );
}

impl Objects for FakeApi {
    fn volume<'a>(&'a self, name: &'a str) -> BoxFuture<'a, Result<Option<GalleonVolume>, ObjectError>> {
        let found = self.with(|world| match &world.failing {
            Some(error) => Err(error.clone()),
            None => Ok(world.volumes.get(name).cloned()),
        });
        if self.with(|world| world.hanging) {
            return std::future::pending().boxed();
        }
        async move { found }.boxed()
    }

    fn put_volume_status<'a>(&'a self, volume: &'a GalleonVolume) -> BoxFuture<'a, Result<GalleonVolume, ObjectError>> {
        if self.with(|world| world.hanging) {
            return std::future::pending().boxed();
        }
        let take = |old: &mut GalleonVolume, new: &GalleonVolume| old.status = new.status.clone();
        let done = self.put(volume, |world| &mut world.volumes, check_config, take);
        async move { done }.boxed()
    }

    fn put_replica_status<'a>(
        &'a self,
        replica: &'a GalleonReplica,
    ) -> BoxFuture<'a, Result<GalleonReplica, ObjectError>> {
        let take = |old: &mut GalleonReplica, new: &GalleonReplica| old.status = new.status.clone();
        let done = self.put(replica, |world| &mut world.replicas, |_, _| {}, take);
        async move { done }.boxed()
    }

    fn put_pool_status<'a>(&'a self, pool: &'a StoragePool) -> BoxFuture<'a, Result<StoragePool, ObjectError>> {
        let take = |old: &mut StoragePool, new: &StoragePool| old.status = new.status.clone();
        let done = self.put(pool, |world| &mut world.pools, |_, _| {}, take);
        async move { done }.boxed()
    }

    fn replicas_of<'a>(&'a self, volume: &'a str) -> BoxFuture<'a, Result<Vec<GalleonReplica>, ObjectError>> {
        let found = self.with(|world| match &world.failing {
            Some(error) => Err(error.clone()),
            None => {
                let of_volume = |replica: &&GalleonReplica| replica.spec.volume_name == volume;
                Ok(world.replicas.values().filter(of_volume).cloned().collect())
            }
        });
        async move { found }.boxed()
    }

    fn pool<'a>(&'a self, name: &'a str) -> BoxFuture<'a, Result<Option<StoragePool>, ObjectError>> {
        let found = self.with(|world| match &world.failing {
            Some(error) => Err(error.clone()),
            None => Ok(world.pools.get(name).cloned()),
        });
        async move { found }.boxed()
    }

    fn node_uid<'a>(&'a self, name: &'a str) -> BoxFuture<'a, Result<Option<Uuid>, ObjectError>> {
        let found = self.with(|world| match &world.failing {
            Some(error) => Err(error.clone()),
            None => {
                world.node_reads += 1;
                let uid = world.nodes.get(name).copied();
                Ok(uid.unwrap_or_else(|| Some(super::uid_of(name))))
            }
        });
        async move { found }.boxed()
    }

    fn drop_replica_finalizer<'a>(&'a self, replica: &'a GalleonReplica) -> BoxFuture<'a, Result<(), ObjectError>> {
        self.with(|world| world.replicas.remove(&replica.name_any()));
        async move { Ok(()) }.boxed()
    }

    fn notify<'a>(&'a self, subject: &'a Subject, notice: &'a Notice) -> BoxFuture<'a, ()> {
        self.with(|world| world.notices.push((subject.name.clone(), notice.clone())));
        async move {}.boxed()
    }
}
