//! The registry room against an API server in memory, with a simple engine on real loop devices.

use std::collections::BTreeMap;
use std::path::Path;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use futures::FutureExt;
use futures::future::BoxFuture;
use galleonfs_api::{
    AttachTo, Capability, Condition, GalleonReplica, GalleonReplicaSpec, GalleonVolume, GalleonVolumeSpec, MediaType,
    REPLICA_FINALIZER, ReplicaPhase, Reservation, StoragePool, StoragePoolSpec, VolumeConfig, VolumeMode, WriteConcern,
    condition, condition_type, reason,
};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::Time;
use kube::{Resource, ResourceExt};
use uuid::Uuid;

use super::objects::{Notice, ObjectError, Objects, Subject};
use super::{Key, Next, Parts, Registry, Retry};
use crate::engine::EngineConfig;
use crate::mount::{HungChildren, Kubelet};
use crate::pool::{Pools, REPLICAS};
use crate::served::{
    Device, FakeDisks, FakeEngine, Guards, NodeEngine, Presence, RealDisks, RealEngine, ReplicaDisks, Served,
};
use crate::staging::Stager;
use crate::state::{Access, Kind, Records, Staged};
use crate::testing::{TempDir, temp_dir};

const MIB: i64 = 1 << 20;
const POOL: &str = "default.n1";
/// An attached volume with nothing to do is only asked for trouble.
const AT_REST: Next = Next::Again(Duration::from_secs(30));

#[derive(Default)]
struct World {
    volumes: BTreeMap<String, GalleonVolume>,
    replicas: BTreeMap<String, GalleonReplica>,
    pools: BTreeMap<String, StoragePool>,
    version: u64,
    writes: usize,
    notices: Vec<(String, Notice)>,
    /// Every request fails with this.
    failing: Option<ObjectError>,
    /// The next write is done, and its answer lost.
    lost: bool,
}

/// An API server in memory: resource versions, and the rules that the real one enforces on a configuration.
#[derive(Default)]
struct FakeApi(Mutex<World>);

impl FakeApi {
    fn with<T>(&self, with: impl FnOnce(&mut World) -> T) -> T {
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
            if let Some(error) = &world.failing {
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
    assert!(!new.in_sync.is_empty() && new.in_sync.iter().all(|name| old.in_sync.contains(name)));
}

impl Objects for FakeApi {
    fn volume<'a>(&'a self, name: &'a str) -> BoxFuture<'a, Result<Option<GalleonVolume>, ObjectError>> {
        let found = self.with(|world| match &world.failing {
            Some(error) => Err(error.clone()),
            None => Ok(world.volumes.get(name).cloned()),
        });
        async move { found }.boxed()
    }

    fn put_volume_status<'a>(&'a self, volume: &'a GalleonVolume) -> BoxFuture<'a, Result<GalleonVolume, ObjectError>> {
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

    fn drop_replica_finalizer<'a>(&'a self, replica: &'a GalleonReplica) -> BoxFuture<'a, Result<(), ObjectError>> {
        self.with(|world| world.replicas.remove(&replica.name_any()));
        async move { Ok(()) }.boxed()
    }

    fn notify<'a>(&'a self, subject: &'a Subject, notice: &'a Notice) -> BoxFuture<'a, ()> {
        self.with(|world| world.notices.push((subject.name.clone(), notice.clone())));
        async move {}.boxed()
    }
}

struct Bench<E = FakeEngine> {
    dir: TempDir,
    api: Arc<FakeApi>,
    engine: Arc<E>,
    disks: Arc<dyn ReplicaDisks>,
    cluster_id: Uuid,
    registry: Arc<Registry>,
}

impl<E> Drop for Bench<E> {
    fn drop(&mut self) {
        let at = self.dir.path().join("kubelet/staging");
        while nix::mount::umount2(&at, nix::mount::MntFlags::MNT_DETACH).is_ok() {}
    }
}

fn uid_of(name: &str) -> Uuid {
    let mut bytes = [7; 16];
    bytes.iter_mut().zip(name.bytes()).for_each(|(to, from)| *to = from);
    Uuid::from_bytes(bytes)
}

impl Bench {
    fn new() -> Bench {
        Bench::with(temp_dir("registry"), Arc::default(), Arc::new(FakeDisks))
    }

    /// The process dies and starts again: only the disk and the API server remember.
    fn restart(&mut self) -> Arc<FakeEngine> {
        let dead = std::mem::take(&mut self.engine);
        self.registry = Self::start(&self.dir, &self.api, &self.engine, &self.disks, self.cluster_id);
        dead
    }
}

impl<E: NodeEngine> Bench<E> {
    /// A node with a pool, and a volume `v` with its replica `v-a` on it.
    fn with(dir: TempDir, engine: Arc<E>, disks: Arc<dyn ReplicaDisks>) -> Bench<E> {
        let api = Arc::<FakeApi>::default();
        let cluster_id = Uuid::new_v4();
        let registry = Self::start(&dir, &api, &engine, &disks, cluster_id);
        let bench = Bench {
            dir,
            api,
            engine,
            disks,
            cluster_id,
            registry,
        };
        let spec = StoragePoolSpec {
            pool: "default".into(),
            node_name: "n1".into(),
            path: bench.pool_path().to_str().unwrap().into(),
            media: MediaType::Ssd,
            reserve_bytes: Some(0),
        };
        bench.add(StoragePool::new(POOL, spec), |world| &mut world.pools);
        let spec = GalleonReplicaSpec {
            volume_name: "v".into(),
            volume_uid: uid_of("v").to_string(),
            node_name: "n1".into(),
            pool_name: POOL.into(),
            size_bytes: 16 * MIB,
            reserved_bytes: 20 * MIB,
        };
        let mut replica = GalleonReplica::new("v-a", spec);
        replica.finalizers_mut().push(REPLICA_FINALIZER.into());
        bench.add(replica, |world| &mut world.replicas);
        let spec = GalleonVolumeSpec {
            size_bytes: 16 * MIB,
            block_size: 4096,
            replica_count: 1,
            pool: None,
            write_concern: WriteConcern::Durable,
            csi_name: "v".into(),
            parameters: BTreeMap::new(),
            capability: Capability {
                mode: VolumeMode::Filesystem,
                fs_type: None,
            },
            attach_to: None,
        };
        let mut volume = GalleonVolume::new("v", spec);
        let config = VolumeConfig {
            in_sync: vec!["v-a".into()],
            ..Default::default()
        };
        volume.status.get_or_insert_default().config = Some(config);
        bench.add(volume, |world| &mut world.volumes);
        bench
    }

    fn start(
        dir: &TempDir,
        api: &Arc<FakeApi>,
        engine: &Arc<E>,
        disks: &Arc<dyn ReplicaDisks>,
        cluster_id: Uuid,
    ) -> Arc<Registry> {
        let records = Records::open(dir.path().join("kubelet/own/state")).unwrap();
        let kubelet = Kubelet::new(dir.path().join("kubelet"), dir.path().join("kubelet/own"));
        Registry::new(Parts {
            node: "n1".into(),
            cluster_id,
            own_root: dir.path().into(),
            objects: api.clone(),
            engine: engine.clone(),
            disks: disks.clone(),
            stager: Stager::new(records, kubelet),
            guards: Guards::new(HungChildren::default()),
            served: Served::default(),
            pools: Pools::default(),
        })
    }

    fn pool_path(&self) -> std::path::PathBuf {
        self.dir.path().join("pools/default")
    }

    fn replica_path(&self) -> std::path::PathBuf {
        self.pool_path().join(REPLICAS).join(uid_of("v-a").to_string())
    }

    fn add<K: ResourceExt>(&self, mut object: K, rows: fn(&mut World) -> &mut BTreeMap<String, K>) {
        let name = object.name_any();
        object.meta_mut().uid = Some(uid_of(&name).to_string());
        object.meta_mut().resource_version = Some("0".into());
        self.api.with(|world| rows(world).insert(name, object));
    }

    fn edit<K: ResourceExt>(
        &self,
        name: &str,
        rows: fn(&mut World) -> &mut BTreeMap<String, K>,
        edit: impl FnOnce(&mut K),
    ) {
        self.api.with(|world| {
            world.version += 1;
            let version = world.version.to_string();
            let object = rows(world).get_mut(name).unwrap();
            edit(object);
            object.meta_mut().resource_version = Some(version);
        });
    }

    fn attach_to(&self, node: Option<&str>) {
        self.edit(
            "v",
            |world| &mut world.volumes,
            |volume| {
                volume.spec.attach_to = node.map(|node| AttachTo {
                    node_name: node.into(),
                    read_only: false,
                    access_mode: "SINGLE_NODE_WRITER".into(),
                    mode: VolumeMode::Filesystem,
                });
            },
        );
    }

    /// What the watches would do.
    fn see(&self) {
        self.api.with(|world| {
            let cache = &self.registry.cache;
            let attached = |volume: &&GalleonVolume| volume.attached_node() == Some("n1");
            cache
                .volumes
                .replace(world.volumes.values().filter(attached).cloned().collect());
            cache.replicas.replace(world.replicas.values().cloned().collect());
            cache.pools.replace(world.pools.values().cloned().collect());
        });
    }

    /// Looks at everything until nothing moves any more, and returns the last look at the volume.
    async fn run(&self) -> Result<Next, Retry> {
        let mut last = Ok(Next::Wait);
        for _ in 0..20 {
            let before = self.api.with(|world| world.version);
            let mut still = true;
            for key in [
                Key::Pool(POOL.into()),
                Key::Replica("v-a".into()),
                Key::Volume("v".into()),
            ] {
                self.see();
                let outcome = self.registry.reconcile(&key).await;
                still &= !matches!(outcome, Ok(Next::Again(Duration::ZERO)) | Err(Retry::Soon(_)));
                if matches!(key, Key::Volume(_)) {
                    last = outcome;
                }
            }
            if still && self.api.with(|world| world.version) == before {
                return last;
            }
        }
        panic!("it does not come to rest: {last:?}");
    }

    fn volume(&self) -> GalleonVolume {
        self.api.with(|world| world.volumes["v"].clone())
    }

    fn replica(&self) -> GalleonReplica {
        self.api.with(|world| world.replicas["v-a"].clone())
    }

    fn attached(&self) -> Condition {
        let status = self.volume().status.unwrap();
        condition::get(&status.conditions, condition_type::ATTACHED)
            .unwrap()
            .clone()
    }

    fn device(&self) -> Option<Device> {
        self.engine.device("v")
    }

    fn staged(&self) -> Staged {
        Staged {
            path: self.dir.path().join("kubelet/staging"),
            kind: Kind::Filesystem {
                fs: crate::mount::FsType::Ext4,
                flags: Default::default(),
            },
            access: Access::MultiWriter,
            read_only: false,
            targets: Default::default(),
        }
    }

    async fn stage(&self) {
        let tools = self.registry.guards.hung().tools("v");
        let uid = uid_of("v").to_string();
        self.registry
            .stager
            .stage(&tools, &uid, self.staged(), &self.device().unwrap())
            .await
            .unwrap();
    }

    async fn unstage(&self) {
        let tools = self.registry.guards.hung().tools("v");
        let path = self
            .registry
            .stager
            .kubelet()
            .check("p", self.staged().path.to_str().unwrap())
            .unwrap();
        self.registry
            .stager
            .unstage(&tools, &path, self.device().as_ref())
            .await
            .unwrap();
    }
}

#[tokio::test]
async fn an_attached_volume_comes_up_under_a_new_epoch_and_then_nothing_is_written_any_more() {
    let bench = Bench::new();
    bench.attach_to(Some("n1"));
    assert_eq!(bench.run().await, Ok(AT_REST));

    let pool = bench.api.with(|world| world.pools[POOL].clone());
    assert!(pool.is_ready() && pool.status.unwrap().usable_bytes.unwrap() > 0);
    let replica = bench.replica();
    assert_eq!(replica.phase(), ReplicaPhase::Ready);
    assert_eq!(replica.status.unwrap().observed_size_bytes, Some(16 * MIB));
    let volume = bench.volume();
    let config = volume.config().unwrap();
    assert_eq!((config.epoch, config.primary.as_deref()), (1, Some("n1")));
    let device = bench.device().unwrap();
    let told = volume.status.as_ref().unwrap().device.clone().unwrap();
    assert_eq!(
        (told.node_name.as_str(), Path::new(&told.path), told.ready),
        ("n1", device.path.as_path(), true)
    );
    assert!(bench.attached().is_true());
    assert_eq!(bench.registry.served.device("v"), Some(device));
    let spec = bench.engine.attached().pop().unwrap();
    assert_eq!(
        (spec.epoch, spec.replica_dir, spec.volume_uid),
        (1, bench.replica_path(), uid_of("v"))
    );

    let writes = bench.api.with(|world| world.writes);
    for _ in 0..3 {
        bench.run().await.unwrap();
    }
    assert_eq!(
        bench.api.with(|world| world.writes),
        writes,
        "an idle node writes nothing"
    );
    assert_eq!(bench.api.with(|world| world.notices.len()), 0);
}

#[tokio::test]
async fn a_volume_is_released_only_when_it_is_not_mounted_and_closed() {
    let bench = Bench::new();
    bench.attach_to(Some("n1"));
    bench.run().await.unwrap();
    bench.stage().await;
    bench.attach_to(None);
    assert_eq!(bench.run().await, Ok(Next::Wait));
    assert!(bench.device().is_some());
    assert_eq!(bench.volume().primary(), Some("n1"));

    bench.unstage().await;
    assert_eq!(bench.run().await, Ok(Next::Gone));
    assert_eq!(bench.device(), None);
    let volume = bench.volume();
    let config = volume.config().unwrap();
    assert_eq!((config.epoch, &config.primary, &config.incarnation), (1, &None, &None));
    assert_eq!(volume.status.as_ref().unwrap().device, None);
    assert_eq!(bench.attached().reason, reason::DETACHED);
    assert!(bench.replica_path().exists());

    bench.attach_to(Some("n1"));
    bench.run().await.unwrap();
    assert_eq!(bench.volume().config().unwrap().epoch, 2);
}

#[tokio::test]
async fn after_a_restart_the_epoch_rises_and_the_mounts_are_made_again() {
    let mut bench = Bench::new();
    bench.attach_to(Some("n1"));
    bench.run().await.unwrap();
    bench.stage().await;
    let file = bench.staged().path.join("file");
    std::fs::write(&file, b"bytes").unwrap();
    assert!(
        std::process::Command::new("sync")
            .arg("-f")
            .arg(&file)
            .status()
            .unwrap()
            .success()
    );

    let dead = bench.restart();
    assert_eq!(bench.run().await, Ok(AT_REST));
    assert_eq!(bench.volume().config().unwrap().epoch, 2);
    assert_eq!(std::fs::read(&file).unwrap(), b"bytes");
    std::fs::write(&file, b"more").unwrap();
    let table = crate::mount::mounts::read_table().await.unwrap();
    let number = crate::mount::table::device_number(&bench.device().unwrap().path).unwrap();
    assert_eq!(table.at(&bench.staged().path).unwrap().device, number);
    drop(dead);
}

#[tokio::test]
async fn a_volume_released_while_we_were_down_gets_its_primary_cleared() {
    let mut bench = Bench::new();
    bench.attach_to(Some("n1"));
    bench.run().await.unwrap();
    bench.attach_to(None);
    let _dead = bench.restart();
    assert_eq!(bench.run().await, Ok(Next::Gone));
    assert_eq!(bench.volume().primary(), None);
    assert_eq!(bench.device(), None);
}

#[tokio::test]
async fn without_the_api_server_no_engine_is_started_and_none_is_stopped() {
    let bench = Bench::new();
    bench.run().await.unwrap();
    bench.attach_to(Some("n1"));
    bench.see();
    let away = ObjectError::Away("no route".into());
    bench.api.with(|world| world.failing = Some(away.clone()));
    let key = Key::Volume("v".into());
    assert!(matches!(bench.registry.reconcile(&key).await, Err(Retry::Later(_))));
    assert_eq!(bench.engine.attached().len(), 0);

    bench.api.with(|world| world.failing = None);
    bench.run().await.unwrap();
    bench.api.with(|world| world.failing = Some(away));
    assert_eq!(bench.registry.reconcile(&key).await, Ok(AT_REST));
    assert!(bench.device().is_some());
    // It is closed when it is released, and the primary is cleared when that can be said again.
    bench.registry.cache.volumes.replace(vec![]);
    assert!(matches!(bench.registry.reconcile(&key).await, Err(Retry::Later(_))));
    assert_eq!(bench.device(), None);
    bench.api.with(|world| world.failing = None);
    bench.attach_to(None);
    bench.run().await.unwrap();
    assert_eq!(bench.volume().primary(), None);
}

#[tokio::test]
async fn a_node_that_was_superseded_stops_serving() {
    let bench = Bench::new();
    bench.attach_to(Some("n1"));
    bench.run().await.unwrap();
    bench.edit(
        "v",
        |world| &mut world.volumes,
        |volume| {
            let config = volume.status.as_mut().unwrap().config.as_mut().unwrap();
            config.epoch = 5;
            config.incarnation = Some(Uuid::new_v4().to_string());
        },
    );
    bench.see();
    assert_eq!(
        bench.registry.reconcile(&Key::Volume("v".into())).await,
        Ok(Next::Again(Duration::ZERO))
    );
    assert_eq!(bench.device(), None);
    assert!(matches!(bench.registry.served.get("v"), Some(Presence::Failed(_))));
    bench.run().await.unwrap();
    assert_eq!(bench.volume().config().unwrap().epoch, 6);
}

#[tokio::test]
async fn a_failed_attach_says_why_once_and_heals() {
    let bench = Bench::new();
    bench.engine.fail_attach("v", Some("superblock 0 and 1 are damaged"));
    bench.attach_to(Some("n1"));
    for _ in 0..3 {
        assert!(matches!(bench.run().await, Err(Retry::Later(_))));
    }
    assert_eq!(bench.attached().reason, reason::ATTACH_FAILED);
    assert!(bench.attached().message.contains("superblock"));
    assert_eq!(bench.replica().phase(), ReplicaPhase::Failed);
    let told = bench.api.with(|world| world.notices.clone());
    assert_eq!(told.iter().filter(|(name, _)| name == "v").count(), 1, "{told:?}");
    assert_eq!(bench.volume().config().unwrap().epoch, 1, "a retry needs no new epoch");

    bench.engine.fail_attach("v", None);
    bench.run().await.unwrap();
    assert!(bench.attached().is_true());
    assert_eq!(bench.replica().phase(), ReplicaPhase::Ready);
}

#[tokio::test]
async fn a_take_over_whose_answer_was_lost_is_undone_when_the_volume_is_wanted_no_longer() {
    let bench = Bench::new();
    bench.run().await.unwrap();
    bench.attach_to(Some("n1"));
    bench.see();
    bench.api.with(|world| world.lost = true);
    let key = Key::Volume("v".into());
    assert!(matches!(bench.registry.reconcile(&key).await, Err(Retry::Later(_))));
    assert_eq!(bench.volume().primary(), Some("n1"));
    assert_eq!(
        bench.engine.attached().len(),
        0,
        "an epoch that was not confirmed opens nothing"
    );
    bench.attach_to(None);
    bench.run().await.unwrap();
    assert_eq!(bench.volume().primary(), None);
}

#[tokio::test]
async fn trouble_of_the_engine_is_told_once_and_stands_in_the_status() {
    let bench = Bench::new();
    bench.attach_to(Some("n1"));
    bench.run().await.unwrap();
    bench.engine.tell_trouble("v", "block 7 is damaged");
    for _ in 0..3 {
        bench.run().await.unwrap();
    }
    let attached = bench.attached();
    assert!(attached.is_true() && attached.reason == reason::IO_ERROR);
    assert!(attached.message.contains("block 7 is damaged"), "{}", attached.message);
    let told = bench.api.with(|world| world.notices.clone());
    assert_eq!(
        told.iter()
            .filter(|(_, notice)| notice.text.contains("block 7"))
            .count(),
        1,
        "{told:?}"
    );
}

#[tokio::test]
async fn a_replica_that_held_data_is_never_made_a_second_time() {
    let bench = Bench::new();
    bench.run().await.unwrap();
    std::fs::remove_dir_all(bench.replica_path()).unwrap();
    bench.run().await.unwrap();
    let replica = bench.replica();
    assert_eq!(replica.phase(), ReplicaPhase::Failed);
    assert_eq!(replica.trouble().unwrap().reason, reason::DATA_MISSING);
    assert!(!bench.replica_path().exists());
}

#[tokio::test]
async fn a_pool_whose_disk_is_gone_fails_its_replicas_and_makes_nothing_in_its_place() {
    let bench = Bench::new();
    bench.run().await.unwrap();
    std::fs::rename(bench.pool_path(), bench.dir.path().join("unplugged")).unwrap();
    bench.run().await.unwrap();
    assert!(!bench.pool_path().exists());
    assert_eq!(bench.replica().trouble().unwrap().reason, reason::POOL_NOT_READY);
    std::fs::create_dir(bench.pool_path()).unwrap();
    bench.run().await.unwrap();
    assert_eq!(std::fs::read_dir(bench.pool_path()).unwrap().count(), 0);
    std::fs::remove_dir(bench.pool_path()).unwrap();
    std::fs::rename(bench.dir.path().join("unplugged"), bench.pool_path()).unwrap();
    bench.run().await.unwrap();
    assert_eq!(bench.replica().phase(), ReplicaPhase::Ready);
}

#[tokio::test]
async fn a_deleted_replica_is_removed_after_its_volume_is_closed_and_not_before() {
    let bench = Bench::new();
    bench.attach_to(Some("n1"));
    bench.run().await.unwrap();
    bench.edit(
        "v-a",
        |world| &mut world.replicas,
        |replica| {
            let now = k8s_openapi::jiff::Timestamp::now();
            replica.meta_mut().deletion_timestamp = Some(Time(now));
        },
    );
    bench.run().await.unwrap();
    assert!(bench.replica_path().exists());
    assert_eq!(bench.replica().phase(), ReplicaPhase::Removing);
    bench.attach_to(None);
    bench.run().await.unwrap();
    assert!(!bench.replica_path().exists());
    assert!(bench.api.with(|world| world.replicas.is_empty()));
}

#[tokio::test]
async fn an_object_that_is_missing_costs_no_data() {
    let bench = Bench::new();
    bench.run().await.unwrap();
    bench.api.with(|world| {
        world.volumes.clear();
        world.replicas.clear();
    });
    bench.run().await.unwrap();
    assert!(bench.replica_path().exists());
}

#[tokio::test]
async fn a_volume_grows_when_its_replica_may() {
    let bench = Bench::new();
    bench.attach_to(Some("n1"));
    bench.run().await.unwrap();
    bench.edit(
        "v",
        |world| &mut world.volumes,
        |volume| volume.spec.size_bytes = 32 * MIB,
    );
    bench.run().await.unwrap();
    assert_eq!(
        bench.device().unwrap().size_bytes,
        16 << 20,
        "the replica has no room yet"
    );
    bench.edit(
        "v-a",
        |world| &mut world.replicas,
        |replica| replica.spec.size_bytes = 32 * MIB,
    );
    bench.run().await.unwrap();
    assert_eq!(bench.registry.served.device("v").unwrap().size_bytes, 32 << 20);
    assert_eq!(bench.replica().status.unwrap().observed_size_bytes, Some(32 * MIB));
}

#[tokio::test]
async fn a_pool_of_another_cluster_is_left_alone() {
    let bench = Bench::new();
    let label = crate::pool::Label {
        format: 1,
        cluster_id: Uuid::new_v4(),
        pool_uid: Uuid::new_v4(),
    };
    std::fs::create_dir_all(bench.pool_path()).unwrap();
    crate::pool::write_label(&bench.pool_path(), &label).unwrap();
    bench.attach_to(Some("n1"));
    let outcome = bench.run().await;
    assert!(matches!(outcome, Err(Retry::Later(text)) if text.contains("cluster")));
    let pool = bench.api.with(|world| world.pools[POOL].clone());
    assert_eq!(pool.ready().unwrap().reason, reason::OTHER_CLUSTER);
    assert!(
        bench
            .api
            .with(|world| world.notices.iter().any(|(name, _)| name == POOL))
    );
    assert!(!bench.pool_path().join(REPLICAS).exists());
}

#[tokio::test]
async fn the_controllers_reservations_in_a_pool_survive_our_writes() {
    let bench = Bench::new();
    bench.edit(
        "default.n1",
        |world| &mut world.pools,
        |pool| {
            let reservation = Reservation {
                volume_name: "w".into(),
                bytes: 1,
            };
            pool.status
                .get_or_insert_default()
                .reservations
                .insert("uid".into(), reservation);
        },
    );
    bench.run().await.unwrap();
    let status = bench.api.with(|world| world.pools[POOL].status.clone()).unwrap();
    assert!(status.pool_uid.is_some());
    assert_eq!(status.reservations["uid"].volume_name, "w");
}

#[tokio::test(flavor = "multi_thread")]
async fn on_the_real_engine_a_file_is_found_again_after_release_growth_and_a_new_attach() {
    let dir = temp_dir("registry");
    let config = EngineConfig {
        shards: 1,
        map_budget_bytes: 16 << 20,
        runtime_dir: dir.path().join("run"),
    };
    std::fs::create_dir_all(&config.runtime_dir).unwrap();
    let bench = Bench::with(dir, Arc::new(RealEngine::start(config).unwrap()), Arc::new(RealDisks));
    bench.attach_to(Some("n1"));
    assert_eq!(bench.run().await, Ok(AT_REST));
    bench.stage().await;
    let file = bench.staged().path.join("file");
    std::fs::write(&file, vec![7; 3 << 20]).unwrap();
    bench.edit(
        "v",
        |world| &mut world.volumes,
        |volume| volume.spec.size_bytes = 64 * MIB,
    );
    bench.edit(
        "v-a",
        |world| &mut world.replicas,
        |replica| replica.spec.size_bytes = 64 * MIB,
    );
    assert_eq!(bench.run().await, Ok(AT_REST));
    assert_eq!(bench.device().unwrap().size_bytes, 64 << 20);
    bench.unstage().await;
    bench.attach_to(None);
    assert_eq!(bench.run().await, Ok(Next::Gone));
    assert_eq!((bench.device(), bench.volume().primary()), (None, None));

    bench.attach_to(Some("n1"));
    bench.run().await.unwrap();
    assert_eq!(bench.device().unwrap().size_bytes, 64 << 20);
    bench.stage().await;
    assert_eq!(std::fs::read(&file).unwrap(), vec![7; 3 << 20]);
    bench.unstage().await;
    bench.attach_to(None);
    bench.run().await.unwrap();
    bench.edit(
        "v-a",
        |world| &mut world.replicas,
        |replica| {
            replica.meta_mut().deletion_timestamp = Some(Time(k8s_openapi::jiff::Timestamp::now()));
        },
    );
    bench.run().await.unwrap();
    assert_eq!(std::fs::read_dir(bench.pool_path().join(REPLICAS)).unwrap().count(), 0);
}
