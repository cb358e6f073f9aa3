//! Three nodes of one API server, with real engines, disks, devices and connections: the objects alone bring a volume of
//! three up, move it and grow it.

use std::net::TcpListener;
use std::os::unix::fs::FileExt;

use galleonfs_api::ReplicaPhase;

use super::*;
use crate::engine::{EngineConfig, Network};
use crate::identity::Wallet;
use crate::served::{RealDisks, RealEngine};
use crate::transport::exchange::Exchange;
use crate::transport::tests::{authority, cluster, credentials};
use crate::transport::{Transport, TransportConfig};

const NODES: [(&str, &str); 3] = [("n1", "v-a"), ("n2", "v-b"), ("n3", "v-c")];

struct Node {
    name: &'static str,
    replica: &'static str,
    registry: Arc<Registry>,
    transport: Transport,
    dir: TempDir,
}

struct Nodes {
    api: Arc<FakeApi>,
    all: Vec<Node>,
}

impl Drop for Nodes {
    fn drop(&mut self) {
        for node in &self.all {
            node.transport.stop();
        }
    }
}

impl Nodes {
    /// The objects that a controller makes: a volume of three and its replicas. Where everybody is, nobody knows yet.
    fn new() -> Nodes {
        let bench = Bench::of_three();
        let api = bench.api.clone();
        let authority = authority();
        let mut all = Vec::new();
        for (name, replica) in NODES {
            let dir = temp_dir("several");
            let mut pool = api.with(|world| world.pools[POOL].clone());
            pool.metadata.name = Some(format!("default.{name}"));
            pool.spec.node_name = name.into();
            pool.spec.path = dir.path().join("pools/default").to_str().unwrap().into();
            pool.status = None;
            bench.add(pool, of_pools);

            let exchange = Exchange::default();
            let listener = TcpListener::bind("127.0.0.1:0").unwrap();
            let endpoint = Endpoint {
                address: listener.local_addr().unwrap().to_string(),
                node_uid: uid_of(name).to_string(),
            };
            let wallet = Wallet::default();
            wallet.put(credentials(&authority, authority.certificate(), uid_of(name)));
            let config = TransportConfig::new(cluster(), uid_of(name));
            let transport = Transport::start(config, wallet, Some(listener), Arc::new(exchange.clone())).unwrap();
            let config = EngineConfig {
                shards: 1,
                map_budget_bytes: 16 << 20,
                scrub: None,
                runtime_dir: dir.path().join("run"),
                network: Network {
                    exchange,
                    dial: Some(Arc::new(transport.clone())),
                },
            };
            std::fs::create_dir_all(&config.runtime_dir).unwrap();
            let records = Records::open(dir.path().join("kubelet/own/state")).unwrap();
            let kubelet = Kubelet::new(dir.path().join("kubelet"), dir.path().join("kubelet/own"));
            let registry = Registry::new(Parts {
                node: name.into(),
                cluster_id: cluster(),
                own_root: dir.path().into(),
                objects: api.clone(),
                engine: Arc::new(RealEngine::start(config).unwrap()),
                disks: Arc::new(RealDisks),
                stager: Stager::new(records, kubelet),
                guards: Guards::new(HungChildren::default()),
                served: Served::default(),
                pools: Pools::default(),
                endpoint: Arc::new(endpoint.into()),
            });
            all.push(Node {
                name,
                replica,
                registry,
                transport,
                dir,
            });
        }
        bench.edit("v", of_volumes, |volume| volume.status = None);
        Nodes { api, all }
    }

    fn edit_volume(&self, edit: impl FnOnce(&mut GalleonVolume)) {
        self.api.with(|world| {
            world.version += 1;
            let version = world.version.to_string();
            let volume = world.volumes.get_mut("v").unwrap();
            edit(volume);
            volume.metadata.resource_version = Some(version);
        });
    }

    fn volume(&self) -> GalleonVolume {
        self.api.with(|world| world.volumes["v"].clone())
    }

    /// What the controller says once all replicas are ready: who is in sync at first, and what size all have.
    fn control(&self) {
        let replicas = self.api.with(|world| world.replicas.clone());
        assert!(replicas.values().all(|replica| replica.phase() == ReplicaPhase::Ready));
        let sizes = replicas
            .values()
            .map(|replica| replica.status.as_ref().unwrap().observed_size_bytes);
        let least = sizes.min().unwrap();
        self.edit_volume(|volume| {
            let status = volume.status.get_or_insert_default();
            status.observed_size_bytes = least;
            status.config.get_or_insert_with(|| VolumeConfig {
                in_sync: replicas.keys().cloned().collect(),
                ..Default::default()
            });
        });
    }

    fn attach_to(&self, node: Option<&str>) {
        self.edit_volume(|volume| {
            volume.spec.attach_to = node.map(|node| AttachTo {
                node_name: node.into(),
                read_only: false,
                access_mode: "SINGLE_NODE_WRITER".into(),
                mode: VolumeMode::Block,
            });
        });
    }

    /// Every node looks at everything until nothing moves any more.
    async fn run(&self) {
        for _ in 0..40 {
            let before = self.api.with(|world| world.version);
            let mut still = true;
            for node in &self.all {
                let pool = format!("default.{}", node.name);
                for key in [
                    Key::Pool(pool),
                    Key::Replica(node.replica.into()),
                    Key::Volume("v".into()),
                ] {
                    self.see(node);
                    let looked = node.registry.reconcile(&key).await;
                    assert!(!matches!(looked, Err(Retry::Later(_))), "{key:?}: {looked:?}");
                    still &= !matches!(looked, Ok(Next::Again(Duration::ZERO)) | Err(Retry::Soon(_)));
                }
            }
            if still && self.api.with(|world| world.version) == before {
                return;
            }
        }
        panic!("it does not come to rest");
    }

    fn see(&self, node: &Node) {
        self.api.with(|world| {
            let cache = &node.registry.cache;
            let volumes = world.volumes.values();
            let volumes = volumes.filter(|volume| volume.attached_node() == Some(node.name));
            cache.volumes.replace(volumes.cloned().collect());
            let replicas = world.replicas.values();
            let replicas = replicas.filter(|replica| replica.spec.node_name == node.name);
            cache.replicas.replace(replicas.cloned().collect());
            let pools = world.pools.values();
            let pools = pools.filter(|pool| pool.spec.node_name == node.name);
            cache.pools.replace(pools.cloned().collect());
        });
    }

    fn device(&self, node: usize) -> Option<Device> {
        self.all[node].registry.served.device("v")
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn the_objects_alone_bring_a_volume_of_three_up_move_it_and_grow_it() {
    let nodes = Nodes::new();
    nodes.run().await;
    nodes.control();
    nodes.attach_to(Some("n1"));
    nodes.run().await;
    let config = nodes.volume().config().unwrap().clone();
    assert_eq!((config.epoch, config.primary.as_deref()), (1, Some("n1")));
    let device = nodes.device(0).unwrap();
    let bytes: Vec<u8> = (0..3 << 20).map(|at: u32| (at / 511) as u8).collect();
    let file = std::fs::File::options().write(true).open(&device.path).unwrap();
    file.write_all_at(&bytes, 1 << 20).unwrap();
    file.sync_all().unwrap();
    drop(file);

    nodes.attach_to(None);
    nodes.run().await;
    assert_eq!((nodes.device(0), nodes.volume().primary()), (None, None));
    nodes.attach_to(Some("n3"));
    nodes.run().await;
    let config = nodes.volume().config().unwrap().clone();
    assert_eq!((config.epoch, config.primary.as_deref()), (2, Some("n3")));
    assert_eq!(config.in_sync, ["v-a", "v-b", "v-c"]);
    let read = |device: &Device| {
        let mut read = vec![0; bytes.len()];
        let file = std::fs::File::open(&device.path).unwrap();
        file.read_exact_at(&mut read, 1 << 20).unwrap();
        read
    };
    assert!(read(&nodes.device(2).unwrap()) == bytes, "the bytes came along");

    nodes.edit_volume(|volume| volume.spec.size_bytes = 64 * MIB);
    nodes.api.with(|world| {
        for replica in world.replicas.values_mut() {
            replica.spec.size_bytes = 64 * MIB;
        }
    });
    nodes.run().await;
    assert_eq!(nodes.device(2).unwrap().size_bytes, 16 << 20);
    nodes.control();
    nodes.run().await;
    assert_eq!(nodes.device(2).unwrap().size_bytes, 64 << 20);
    assert!(read(&nodes.device(2).unwrap()) == bytes);
    nodes.attach_to(None);
    nodes.run().await;
    for node in &nodes.all {
        let pool = node.dir.path().join("pools/default").join(REPLICAS);
        assert_eq!(std::fs::read_dir(pool).unwrap().count(), 1);
    }
}
