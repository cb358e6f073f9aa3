//! The registry room against an API server in memory, with a simple engine on real loop devices.

mod api;
mod configs;
mod hosting;
mod leaders;
mod leading;
mod pools;
mod replicas;
mod several;
mod volumes;

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use galleonfs_api::{
    AttachTo, Capability, Condition, Endpoint, GalleonReplica, GalleonReplicaSpec, GalleonVolume, GalleonVolumeSpec,
    MediaType, REPLICA_FINALIZER, StoragePool, StoragePoolSpec, VolumeConfig, VolumeMode, WriteConcern, condition,
    condition_type,
};
use kube::ResourceExt;
use uuid::Uuid;

use self::api::{FakeApi, World};
use super::{Key, Next, OwnEndpoint, Parts, Registry, Retry};
use crate::mount::{HungChildren, Kubelet};
use crate::pool::{Pools, REPLICAS};
use crate::served::{Device, FakeDisks, FakeEngine, Guards, NodeEngine, ReplicaDisks, Served};
use crate::staging::Stager;
use crate::state::{Access, Kind, Records, Staged};
use crate::testing::{TempDir, temp_dir};

const MIB: i64 = 1 << 20;
const POOL: &str = "default.n1";
/// An attached volume with nothing to do is only asked for trouble.
const AT_REST: Next = Next::Again(Duration::from_secs(30));

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

    /// As [`Bench::new`], but the volume has two more replicas: `v-b` on the node `n2` and `v-c` on `n3`.
    fn of_three() -> Bench {
        let bench = Bench::new();
        for (replica, node, address) in [("v-b", "n2", "10.0.0.2:9811"), ("v-c", "n3", "10.0.0.3:9811")] {
            bench.add_replica(replica, node, address);
        }
        bench.edit("v-a", of_replicas, |replica| replica.spec.replicated = true);
        bench.edit("v", of_volumes, |volume| {
            volume.spec.replica_count = 3;
            let status = volume.status.get_or_insert_default();
            status.config.get_or_insert_default().in_sync = vec!["v-a".into(), "v-b".into(), "v-c".into()];
            status.observed_size_bytes = Some(16 * MIB);
        });
        bench
    }

    /// One more replica of the volume, in the pool of another node that is reached at `address`.
    fn add_replica(&self, name: &str, node: &str, address: &str) {
        let mut pool = self.api.with(|world| world.pools[POOL].clone());
        pool.metadata.name = Some(format!("default.{node}"));
        pool.spec.node_name = node.into();
        pool.status.get_or_insert_default().endpoint = Some(Endpoint {
            address: address.into(),
            node_uid: uid_of(node).to_string(),
        });
        self.add(pool, of_pools);
        let mut replica = self.replica();
        replica.metadata.name = Some(name.into());
        replica.spec.node_name = node.into();
        replica.spec.pool_name = format!("default.{node}");
        replica.spec.replicated = true;
        self.add(replica, of_replicas);
    }

    fn edit_config(&self, edit: impl FnOnce(&mut VolumeConfig)) {
        self.edit("v", of_volumes, |volume| {
            edit(volume.status.as_mut().unwrap().config.as_mut().unwrap());
        });
    }

    fn config(&self) -> VolumeConfig {
        self.volume().config().unwrap().clone()
    }

    /// Whatever failed may be tried again.
    fn lose_patience(&self) {
        self.registry.own(|own| {
            own.patience.clear();
            own.hosting.values_mut().for_each(|hosting| hosting.forgive());
        });
    }

    /// What was read of other nodes' pools is old.
    fn forget_reached(&self) {
        self.registry.own(|own| {
            own.reached.clear();
            own.led.values_mut().for_each(|led| led.doubt());
        });
    }
}

fn of_volumes(world: &mut World) -> &mut BTreeMap<String, GalleonVolume> {
    &mut world.volumes
}

fn of_replicas(world: &mut World) -> &mut BTreeMap<String, GalleonReplica> {
    &mut world.replicas
}

fn of_pools(world: &mut World) -> &mut BTreeMap<String, StoragePool> {
    &mut world.pools
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
            block_size: 4096,
            reserved_bytes: 20 * MIB,
            zone: None,
            replicated: false,
        };
        let mut replica = GalleonReplica::new("v-a", spec);
        replica.finalizers_mut().push(REPLICA_FINALIZER.into());
        bench.add(replica, |world| &mut world.replicas);
        let spec = GalleonVolumeSpec {
            size_bytes: 16 * MIB,
            block_size: 4096,
            sector_size: 4096,
            compression: None,
            no_space_timeout_seconds: None,
            replica_count: 1,
            min_in_sync: None,
            pool: None,
            write_concern: WriteConcern::Durable,
            csi_name: "v".into(),
            parameters: BTreeMap::new(),
            capability: Capability {
                mode: VolumeMode::Filesystem,
                fs_type: None,
            },
            attach_to: None,
            leaving: None,
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
            endpoint: OwnEndpoint::default(),
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
            let here = |replica: &&GalleonReplica| replica.spec.node_name == "n1";
            cache
                .replicas
                .replace(world.replicas.values().filter(here).cloned().collect());
            let here = |pool: &&StoragePool| pool.spec.node_name == "n1";
            cache
                .pools
                .replace(world.pools.values().filter(here).cloned().collect());
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
