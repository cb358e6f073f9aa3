//! A volume of three replicas on one machine: this process leads it and hosts one, and two others host one each, as on
//! three nodes whose network is the loopback interface.

use std::io::{BufRead, BufReader, Write};
use std::net::{SocketAddr, TcpListener};
use std::path::PathBuf;
use std::process::{Child, ChildStdin, ChildStdout, Command, Stdio};
use std::sync::{Arc, Mutex, OnceLock, PoisonError};
use std::time::{Duration, SystemTime};

use anyhow::{Context, Result, bail};
use galleonfs_api::NodeIdentity;
use galleonfs_controller::certificates::Authority;
use galleonfs_node_plugin::disk::{BlockSize, format_replica};
use galleonfs_node_plugin::engine::{
    Configs, Device, Engine, EngineConfig, HostSpec, LeadSpec, Leader, Leaders, Leadership, LookUpDone, Network,
    ProposeDone, ReadDone, Route, Settings,
};
use galleonfs_node_plugin::identity::{Credentials, Wallet};
use galleonfs_node_plugin::transport::exchange::Exchange;
use galleonfs_node_plugin::transport::{HAS_PLAIN_WIRE, Transport, TransportConfig};
use galleonfs_storage_engine::replication::primary::Decision;
use galleonfs_storage_engine::replication::{Change, Concern, Config, Incarnation, ReplicaId, Stamp};
use galleonfs_storage_engine::types::Epoch;
use rcgen::{CertificateParams, KeyPair};
use serde::{Deserialize, Serialize};
use tokio::runtime::Runtime;
use uuid::Uuid;

use super::scratch::Scratch;
use super::server::{Serving, VOLUME};
use super::setup::Setup;

/// How long the certificates of a run are valid.
const LIFE: Duration = Duration::from_secs(24 * 3600);

/// What a hosting process is told.
#[derive(Debug, Deserialize, Serialize)]
struct Order {
    node: Uuid,
    cluster: Uuid,
    volume: Uuid,
    replica: Uuid,
    replica_dir: PathBuf,
    runtime_dir: PathBuf,
    map_budget_bytes: usize,
    /// Without TLS, for comparison.
    plain: bool,
    certificate: String,
    key: String,
    trusted: String,
    /// Who leads: the node, and this start of its engine.
    leader: (Uuid, Uuid),
}

/// What the volume's object says of who leads: in a run there is one epoch.
struct OneLeader(Uuid, Uuid);

impl Leaders for OneLeader {
    fn look_up(&self, _: Uuid, done: LookUpDone) {
        let OneLeader(node, incarnation) = *self;
        done(Some(Leadership {
            epoch: Epoch(1),
            leader: Some(Leader {
                incarnation: Incarnation(incarnation.into_bytes()),
                name: node.to_string(),
                node: Some(node),
            }),
        }));
    }
}

/// The volume's object: in this process nobody else changes it.
#[derive(Debug)]
struct Object(Mutex<(u64, Config)>);

impl Configs for Object {
    fn read(&self, done: ReadDone) {
        let (stamp, config) = self.0.lock().unwrap_or_else(PoisonError::into_inner).clone();
        done(Some((Stamp(stamp), config)));
    }

    fn propose(&self, expected: Stamp, config: Config, done: ProposeDone) {
        let mut object = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let made = expected == Stamp(object.0);
        if made {
            *object = (object.0 + 1, config);
        }
        let stamp = Stamp(object.0);
        drop(object);
        done(if made {
            Decision::Made(stamp)
        } else {
            Decision::Conflict
        });
    }
}

/// A process that hosts a replica. It ends when its input does.
#[derive(Debug)]
struct Hosting {
    child: Child,
    stdin: Option<ChildStdin>,
    stdout: BufReader<ChildStdout>,
    address: SocketAddr,
}

impl Hosting {
    fn start(order: &Order) -> Result<Hosting> {
        let program = std::env::current_exe().context("find this program")?;
        let mut child = Command::new(program)
            .arg("serve-replica")
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .context("start a process that hosts a replica")?;
        let mut stdin = child.stdin.take().context("it has no input")?;
        writeln!(stdin, "{}", serde_json::to_string(order)?)?;
        let mut stdout = BufReader::new(child.stdout.take().context("it has no output")?);
        let mut line = String::new();
        stdout.read_line(&mut line)?;
        let address = line
            .trim()
            .parse()
            .context("a hosting process did not say where it is")?;
        Ok(Hosting {
            child,
            stdin: Some(stdin),
            stdout,
            address,
        })
    }

    /// Bytes that were sent to it since it was started.
    fn received_bytes(&mut self) -> Result<u64> {
        writeln!(self.stdin.as_mut().context("it was told to end")?, "received")?;
        let mut line = String::new();
        self.stdout.read_line(&mut line)?;
        line.trim()
            .parse()
            .context("a hosting process did not say what it received")
    }

    /// Ends it in the middle of whatever it does.
    fn kill(mut self) -> Result<()> {
        self.child.kill().context("kill a hosting process")
    }
}

impl Drop for Hosting {
    fn drop(&mut self) {
        self.stdin.take();
        if let Err(error) = self.child.wait() {
            eprintln!("galleonfs-bench: waiting for a hosting process: {error}");
        }
    }
}

/// The volume while it is led.
#[derive(Debug)]
pub struct Led {
    device: Device,
    // In this order: the volume ends before those that have its replicas.
    engine: Engine,
    transport: Transport,
    hosting: Vec<Hosting>,
    /// What the others were told, to start them again.
    orders: Vec<Order>,
    object: Arc<Object>,
}

impl Led {
    /// Makes the replicas, starts who hosts them, and leads them.
    pub fn start(runtime: &Runtime, scratch: &Scratch, serving: Serving) -> Result<Led> {
        let mut format = serving.format(None);
        let authority = Authority::make(format.cluster_id, SystemTime::now(), LIFE)?;
        let mut orders = Vec::new();
        // The first leads.
        let (leader, incarnation) = (Uuid::new_v4(), Uuid::new_v4());
        for number in 0..serving.setup.replicas() {
            format.replica_uid = Uuid::new_v4();
            format.salt = Uuid::new_v4().as_u64_pair().0;
            let dir = scratch.replica(serving.setup).join(number.to_string());
            format_replica(&dir, &format)?;
            let node = if number == 0 { leader } else { Uuid::new_v4() };
            let identity = NodeIdentity {
                cluster: format.cluster_id,
                node,
            };
            let (certificate, key) = certificate(&authority, identity)?;
            orders.push(Order {
                node,
                cluster: format.cluster_id,
                volume: format.volume_uid,
                replica: format.replica_uid,
                replica_dir: dir,
                runtime_dir: scratch.mounts(serving.setup),
                map_budget_bytes: serving.map_budget_bytes,
                plain: serving.setup == Setup::ThreeReplicasPlain,
                certificate,
                key,
                trusted: authority.certificate().to_owned(),
                leader: (leader, incarnation),
            });
        }
        let (own, others) = orders.split_first().context("there are replicas")?;
        let hosting = others.iter().map(Hosting::start).collect::<Result<Vec<_>>>()?;
        let (engine, transport) = take_part(runtime, own)?;
        engine.routes(own.volume, routes(others, &hosting));
        let ids = orders.iter().map(|order| ReplicaId(order.replica.into_bytes()));
        let claimed = Config::new(ids).with(&Change::Claim(Incarnation(incarnation.into_bytes())));
        let object = Arc::new(Object(Mutex::new((1, claimed.clone()))));
        let spec = LeadSpec {
            volume: VOLUME.to_owned(),
            volume_uid: own.volume,
            cluster_id: own.cluster,
            epoch: u64::from(claimed.epoch.0),
            incarnation,
            size_bytes: serving.size_bytes,
            block_size: BlockSize::default(),
            read_only: false,
            settings: Settings::default(),
            replicas: orders.len(),
            concern: Concern::replicated(2),
            prefer: Some(own.replica),
            configs: object.clone(),
        };
        let device = runtime.block_on(engine.lead(spec))?;
        Ok(Led {
            device,
            engine,
            transport,
            hosting,
            orders: orders.split_off(1),
            object,
        })
    }

    /// Does what it is asked in a line, and answers in one: `kill` the last replica's process, `start` it again (who takes
    /// part now), or say how the volume `fares` (how many replicas are in sync, and how many bytes were sent to the last).
    pub fn obey(&mut self, line: &str) -> Result<String> {
        match line {
            "kill" => {
                self.hosting.pop().context("a process hosts a replica")?.kill()?;
                Ok(String::new())
            }
            "start" => {
                let last = self.orders.last().context("there are others")?;
                self.hosting.push(Hosting::start(last)?);
                self.engine.routes(last.volume, routes(&self.orders, &self.hosting));
                let pids: Vec<String> = self.pids().iter().map(u32::to_string).collect();
                Ok(pids.join(" "))
            }
            "fares" => {
                let in_sync = self
                    .object
                    .0
                    .lock()
                    .unwrap_or_else(PoisonError::into_inner)
                    .1
                    .in_sync
                    .len();
                let last = self.hosting.last_mut().context("a process hosts a replica")?;
                Ok(format!("{in_sync} {}", last.received_bytes()?))
            }
            other => bail!("nobody knows what `{other}` means"),
        }
    }

    pub fn engine(&self) -> &Engine {
        &self.engine
    }

    pub fn device(&self) -> &Device {
        &self.device
    }

    /// Every process that takes part.
    pub fn pids(&self) -> Vec<u32> {
        let others = self.hosting.iter().map(|hosting| hosting.child.id());
        [std::process::id()].into_iter().chain(others).collect()
    }
}

impl Drop for Led {
    fn drop(&mut self) {
        self.transport.stop();
    }
}

/// Where the replicas of others are reached.
fn routes(orders: &[Order], hosting: &[Hosting]) -> Vec<Route> {
    let routes = orders.iter().zip(hosting).map(|(order, hosting)| Route {
        replica: order.replica,
        node: order.node,
        addresses: vec![hosting.address],
    });
    routes.collect()
}

/// What a node proves itself with: its certificate and its key.
pub fn certificate(authority: &Authority, identity: NodeIdentity) -> Result<(String, String)> {
    let key = KeyPair::generate()?;
    let request = CertificateParams::default().serialize_request(&key)?;
    let request = rcgen::CertificateSigningRequestParams::from_der(request.der())?;
    let signed = authority.sign(identity, &request.public_key, SystemTime::now(), LIFE)?;
    Ok((signed, key.serialize_pem()))
}

/// How this node talks to the others.
#[cfg_attr(
    not(feature = "plain-wire"),
    expect(unused_mut, reason = "only with that feature is there something to choose")
)]
fn wire(order: &Order) -> Result<TransportConfig> {
    let mut config = TransportConfig::new(order.cluster, order.node);
    #[cfg(feature = "plain-wire")]
    {
        config.plain = order.plain;
    }
    if order.plain && !HAS_PLAIN_WIRE {
        bail!("without TLS nobody talks in this build: `make bench` makes one that can");
    }
    Ok(config)
}

/// Starts an engine that hosts a replica, and listens.
fn take_part(runtime: &Runtime, order: &Order) -> Result<(Engine, Transport)> {
    let wallet = Wallet::default();
    wallet.put(Credentials::new(&order.certificate, &order.key, &order.trusted)?);
    let exchange = Exchange::default();
    let dial = Arc::new(OnceLock::new());
    let engine = Engine::start(EngineConfig {
        shards: 0,
        map_budget_bytes: order.map_budget_bytes,
        scrub: None,
        runtime_dir: order.runtime_dir.clone(),
        network: Network {
            exchange: exchange.clone(),
            dial: Some(dial.clone()),
        },
    })?;
    let transport = Transport::start(
        wire(order)?,
        wallet,
        Some(TcpListener::bind("127.0.0.1:0")?),
        Arc::new(exchange),
    )?;
    let transport = dial.get_or_init(|| transport).clone();
    runtime.block_on(engine.host(HostSpec {
        volume: VOLUME.to_owned(),
        volume_uid: order.volume,
        replica: order.replica.to_string(),
        replica_uid: order.replica,
        cluster_id: order.cluster,
        replica_dir: order.replica_dir.clone(),
        leaders: Arc::new(OneLeader(order.leader.0, order.leader.1)),
    }))?;
    Ok((engine, transport))
}

/// The hosting process itself: until its standard input ends.
pub fn host() -> Result<()> {
    let mut line = String::new();
    std::io::stdin().read_line(&mut line)?;
    let order: Order = serde_json::from_str(&line).context("read which replica to host")?;
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .context("start a runtime")?;
    let (engine, transport) = take_part(&runtime, &order)?;
    let Some(address) = transport.address() else {
        bail!("a hosting process listens")
    };
    println!("{address}");
    std::io::stdout().flush()?;
    for line in std::io::stdin().lines() {
        if line? == "received" {
            println!("{}", transport.counts().bytes_received);
            std::io::stdout().flush()?;
        }
    }
    runtime.block_on(engine.unhost(order.replica))?;
    transport.stop();
    Ok(())
}
