//! The node process: what starts when, and how it ends.
//!
//! ```text
//! records ─► engine ─► remove stale devices ─► csi.sock listens ─► registration ─► health pages
//!                                                   └─► API server ─► watches ─► reconcile: recovery is its first round
//! ```
//!
//! The sockets come before the API server is reached: the kubelet may ask at once, and a call that needs a volume waits
//! for it. Recovery has no code of its own: every volume that is attached here and not served yet is taken over, opened
//! and mounted again, whether it was served before or not.

use std::net::{IpAddr, SocketAddr};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context, Result};
use tokio::net::TcpListener;
use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::watch;

use crate::csi::{Health, Identity, Node};
use crate::engine::{EngineConfig, ScrubPlan};
use crate::mount::{HungChildren, Kubelet};
use crate::peers::Peers;
use crate::pool::Pools;
use crate::registry::{Kubernetes, Parts, Registry};
use crate::served::{Guards, NodeEngine, RealDisks, RealEngine, Served, give_memory_back};
use crate::server::{Page, Registration, bind, register, render, serve_csi, serve_pages};
use crate::staging::Stager;
use crate::state::Records;

/// How long an orderly end may take; what is not closed by then is closed like in a crash, and recovered.
const END_PATIENCE: Duration = Duration::from_secs(20);

/// How long to wait before the API server is asked again who we are.
const API_AGAIN_AFTER: Duration = Duration::from_secs(2);

/// What the node process needs to know. The command line makes one.
#[derive(Debug, Clone)]
pub struct NodeConfig {
    /// This node's name in the cluster.
    pub node_name: String,
    /// The namespace in which our objects live.
    pub namespace: String,
    /// The CSI socket, as this process sees it. Its directory also holds our records.
    pub socket: PathBuf,
    /// The same socket, as the kubelet on the host sees it.
    pub socket_on_host: PathBuf,
    /// The folder in which the kubelet looks for drivers.
    pub registration_dir: PathBuf,
    /// The kubelet's directory: every path in a request lies below it.
    pub kubelet_dir: PathBuf,
    /// FUSE mount points live below.
    pub runtime_dir: PathBuf,
    /// Pool directories below here are made when they are missing.
    pub data_dir: PathBuf,
    /// Where the health and metrics pages are served.
    pub health_address: SocketAddr,
    /// Where connections of other nodes are taken.
    pub replication_address: SocketAddr,
    /// The address under which other nodes reach this one; `None`: it is not told to anybody.
    pub reached_at: Option<IpAddr>,
    /// Threads that serve volumes; 0 for the default.
    pub shards: usize,
    /// Memory that the maps of all volumes together may occupy.
    pub map_budget_bytes: usize,
    /// When what is stored is verified; `None` for never.
    pub scrub: Option<ScrubPlan>,
}

impl NodeConfig {
    /// The configuration of a node whose kubelet lives in `kubelet_dir`, with everything where it usually is.
    pub fn new(node_name: &str, namespace: &str, kubelet_dir: PathBuf) -> NodeConfig {
        let socket = kubelet_dir
            .join("plugins")
            .join(galleonfs_api::DRIVER_NAME)
            .join("csi.sock");
        NodeConfig {
            node_name: node_name.to_owned(),
            namespace: namespace.to_owned(),
            socket_on_host: socket.clone(),
            socket,
            registration_dir: kubelet_dir.join("plugins_registry"),
            kubelet_dir,
            runtime_dir: "/run/galleonfs".into(),
            data_dir: "/var/lib/galleonfs".into(),
            health_address: ([0, 0, 0, 0], 9810).into(),
            replication_address: ([0, 0, 0, 0], 9811).into(),
            reached_at: None,
            shards: 0,
            map_budget_bytes: 256 << 20,
            scrub: Some(ScrubPlan::default()),
        }
    }
}

impl NodeConfig {
    /// Where what this process remembers is kept.
    fn own_dir(&self) -> Result<&Path> {
        self.socket.parent().context("the CSI socket needs a directory")
    }
}

/// Runs the node process until it is told to end.
pub async fn run(config: NodeConfig) -> Result<()> {
    std::fs::create_dir_all(&config.runtime_dir).with_context(|| format!("making {}", config.runtime_dir.display()))?;
    let peers = Peers::new(config.reached_at, config.own_dir()?.join("identity.pem"));
    let engine = RealEngine::start(EngineConfig {
        shards: config.shards,
        map_budget_bytes: config.map_budget_bytes,
        scrub: config.scrub,
        runtime_dir: config.runtime_dir.clone(),
        network: peers.network(),
    })
    .context("starting the engine")?;
    let process = Process::start(&config, Arc::new(engine), peers).await?;
    let mut term = signal(SignalKind::terminate()).context("listening for SIGTERM")?;
    let mut int = signal(SignalKind::interrupt()).context("listening for SIGINT")?;
    let ended = tokio::select! {
        _ = term.recv() => Ok(()),
        _ = int.recv() => Ok(()),
        broken = process.broken() => broken,
    };
    process.stop().await;
    ended
}

/// The parts of a running node process.
struct Process {
    engine: Arc<dyn NodeEngine>,
    stager: Stager,
    guards: Guards,
    directory: Arc<late::Late>,
    peers: Peers,
    stop: watch::Sender<bool>,
    servers: tokio::sync::Mutex<tokio::task::JoinSet<Result<()>>>,
}

impl Process {
    async fn start(config: &NodeConfig, engine: Arc<dyn NodeEngine>, peers: Peers) -> Result<Process> {
        let own = config.own_dir()?.to_owned();
        // First of all: it proves that no other process serves this node.
        let listener = bind(&config.socket)?;
        peers.bind(config.replication_address)?;
        let records = Records::open(own.join("state")).map_err(|error| anyhow::anyhow!(error.text()))?;
        engine
            .remove_stale()
            .await
            .context("removing the devices of a dead predecessor")?;
        let stager = Stager::new(records, Kubelet::new(config.kubelet_dir.clone(), own));
        let (guards, served) = (Guards::new(HungChildren::default()), Served::default());
        let health = Health::new(engine.clone());
        let directory = Arc::new(late::Late::default());
        let known = directory.clone();
        let node = Node {
            name: config.node_name.clone(),
            volumes_max: volumes_max(),
            stager: stager.clone(),
            guards: guards.clone(),
            served: served.clone(),
            directory: directory.clone(),
        };
        let (stop, stopped) = watch::channel(false);
        let mut servers = tokio::task::JoinSet::new();
        let mut csi_stop = stopped.clone();
        let identity = Identity::new(health.clone());
        servers.spawn(serve_csi(listener, identity, node, async move {
            let _ = csi_stop.wait_for(|stop| *stop).await;
        }));
        let registration_socket = config
            .registration_dir
            .join(format!("{}-reg.sock", galleonfs_api::DRIVER_NAME));
        let registration = Registration::new(config.socket_on_host.clone());
        let registration_stop = stopped.clone();
        servers.spawn(async move { register(&registration_socket, registration, registration_stop).await });
        let pages = TcpListener::bind(config.health_address)
            .await
            .with_context(|| format!("listening on {} for probes", config.health_address))?;
        let (shown, page_engine) = (health.clone(), engine.clone());
        let (page_served, hung, page_peers) = (served.clone(), guards.hung().clone(), peers.clone());
        servers.spawn(async move {
            serve_pages(pages, move |path| {
                page(path, &shown, page_engine.as_ref(), &page_served, &hung, &page_peers)
            })
            .await;
            Ok(())
        });
        let at_rest = engine.clone();
        servers.spawn(async move {
            give_memory_back(at_rest).await;
            Ok(())
        });
        let parts = {
            let (node, data_dir) = (config.node_name.clone(), config.data_dir.clone());
            let (engine, stager, guards) = (engine.clone(), stager.clone(), guards.clone());
            let endpoint = peers.endpoint().clone();
            move |kubernetes: Kubernetes, cluster_id| Parts {
                node,
                cluster_id,
                own_root: data_dir,
                objects: Arc::new(kubernetes),
                engine,
                disks: Arc::new(RealDisks),
                stager,
                guards,
                served,
                pools: Pools::default(),
                endpoint,
            }
        };
        let (namespace, node) = (config.namespace.clone(), config.node_name.clone());
        let talking = peers.clone();
        servers.spawn(async move {
            let client = kube::Client::try_default().await.context("finding the API server")?;
            let kubernetes = Kubernetes::new(client.clone(), &namespace, &node);
            let cluster_id = loop {
                match kubernetes.cluster_id().await {
                    Ok(cluster_id) => break cluster_id,
                    Err(error) => tracing::warn!(%error, "which cluster this is cannot be told yet"),
                }
                tokio::time::sleep(API_AGAIN_AFTER).await;
            };
            let registry = Registry::new(parts(kubernetes.clone(), cluster_id));
            let (watches, seen) = crate::registry::watch(&registry, &kubernetes);
            seen.await.context("the watches ended before they began")?;
            registry.start();
            known.set(registry);
            health.saw_api();
            tracing::info!(%node, %cluster_id, "this node's objects are known");
            // They end with the process.
            tokio::select! {
                _ = futures::future::join_all(watches) => Ok(()),
                talked = talking.run(client, namespace, cluster_id) => talked,
            }
        });
        Ok(Process {
            engine,
            stager,
            guards,
            directory,
            peers,
            stop,
            servers: servers.into(),
        })
    }

    /// Waits until one of the servers ends, which none should.
    async fn broken(&self) -> Result<()> {
        match self.servers.lock().await.join_next().await {
            Some(Ok(ended)) => ended.and_then(|()| anyhow::bail!("a server ended by itself")),
            Some(Err(join)) => Err(join).context("a server broke off"),
            None => anyhow::bail!("nothing is being served"),
        }
    }

    /// An orderly end: no new calls, everything written, and every volume closed that is not in use. What is in use
    /// cannot be closed under its pods; it is flushed, and the next start finds it as after a crash, only cleaner.
    async fn stop(&self) {
        tracing::info!("ending");
        self.stop.send_replace(true);
        // What is closed below must not be opened again.
        self.directory.stop();
        let volumes: Vec<String> = self.engine.metrics().into_iter().map(|(volume, _)| volume).collect();
        let closing = volumes.iter().map(|volume| async move {
            if self.stager.records().staged(volume).is_some() {
                let flushed = self.stager.sync(&self.guards.hung().tools(volume)).await;
                if let Err(error) = flushed {
                    tracing::warn!(%volume, why = %error.text(), "could not be flushed");
                }
            }
            if let Err(error) = self.engine.detach(volume).await {
                tracing::info!(%volume, why = %error, "stays in use: its next start recovers it");
            }
        });
        let replicas = async {
            futures::future::join_all(closing).await;
            // Behind the volumes: one that is led here ends by way of its replica. While one stays in use its replica does,
            // too: without it the volume would record it as out, with it both are found as after a crash.
            let in_use = !self.engine.metrics().is_empty();
            let hosted = if in_use { Vec::new() } else { self.engine.all_hosted() };
            let closing = hosted.into_iter().map(|replica| async move {
                if let Err(error) = self.engine.unhost(replica).await {
                    tracing::warn!(%replica, why = %error, "is not closed: its next start recovers it");
                }
            });
            futures::future::join_all(closing).await;
        };
        if tokio::time::timeout(END_PATIENCE, replicas).await.is_err() {
            tracing::warn!("not everything was closed in time: the next start recovers it");
        }
        // Behind the volumes: closing one may have a word for its replicas.
        self.peers.stop();
        tracing::info!("ended");
    }
}

fn page(
    path: &str,
    health: &Health,
    engine: &dyn NodeEngine,
    served: &Served,
    hung: &HungChildren,
    peers: &Peers,
) -> Option<Page> {
    let well = |text: &str| Page {
        status: 200,
        text: format!("{text}\n"),
    };
    let ill = |text: String| Page {
        status: 503,
        text: format!("{text}\n"),
    };
    Some(match path {
        "/healthz" => health.alive().map_or_else(ill, |()| well("alive")),
        "/readyz" => match health.ready() {
            Ok(true) => well("ready"),
            Ok(false) => ill("the API server was not seen yet".into()),
            Err(why) => ill(why),
        },
        "/metrics" => match render(engine, served, hung).and_then(|text| Ok(text + &peers.metrics()?)) {
            Ok(text) => Page { status: 200, text },
            Err(error) => ill(error.to_string()),
        },
        _ => return None,
    })
}

/// How many volumes this process can serve, by the files it may have open.
fn volumes_max() -> i64 {
    /// Segments and superblocks of a busy volume, its FUSE channel, its loop device.
    const FILES_PER_VOLUME: u64 = 64;
    /// Sockets, watches, pools.
    const FILES_OF_OUR_OWN: u64 = 256;
    /// More volumes than anybody has tried on one node is no promise to make.
    const TRIED: u64 = 256;
    let files =
        nix::sys::resource::getrlimit(nix::sys::resource::Resource::RLIMIT_NOFILE).map_or(1024, |(soft, _)| soft);
    let volumes = (files.saturating_sub(FILES_OF_OUR_OWN) / FILES_PER_VOLUME).clamp(1, TRIED);
    i64::try_from(volumes).expect("a number up to 256")
}

mod late {
    //! The node service starts before the API server is reached; until then nobody can say which volumes exist.

    use std::sync::{Arc, OnceLock};

    use futures::FutureExt;
    use futures::future::BoxFuture;

    use crate::csi::{Directory, Found};
    use crate::registry::Registry;

    #[derive(Debug, Default)]
    pub struct Late(OnceLock<Arc<Registry>>);

    impl Late {
        pub fn set(&self, registry: Arc<Registry>) {
            assert!(self.0.set(registry).is_ok(), "there is one registry");
        }

        /// No further reconcile begins.
        pub fn stop(&self) {
            if let Some(registry) = self.0.get() {
                registry.queue.stop();
            }
        }
    }

    impl Directory for Late {
        fn find<'a>(&'a self, volume: &'a str) -> BoxFuture<'a, Result<Option<Found>, String>> {
            match self.0.get() {
                Some(registry) => registry.find(volume),
                None => {
                    async { Err("this node plugin has just started and not seen the API server yet".into()) }.boxed()
                }
            }
        }

        fn unstaged(&self, volume: &str) {
            if let Some(registry) = self.0.get() {
                registry.unstaged(volume);
            }
        }
    }
}
