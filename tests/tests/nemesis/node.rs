//! A node: a process with the node plugin's engine and transport in a network of its own, which hosts one replica and
//! leads the volume when it is told to.
//!
//! It is told by lines of JSON, and answers each with one, not in their order: a lead that waits holds up nothing.

use std::collections::HashMap;
use std::io::{BufRead, BufReader, Write};
use std::net::{SocketAddr, TcpListener};
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdin, Command, Stdio};
use std::sync::mpsc::{Receiver, channel};
use std::sync::{Arc, Mutex, OnceLock, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use galleonfs_node_plugin::disk::BlockSize;
use galleonfs_node_plugin::engine::{
    Engine, EngineConfig, ErrorKind, HostSpec, LeadSpec, Network as Reach, Route, Settings,
};
use galleonfs_node_plugin::identity::{Credentials, Wallet};
use galleonfs_node_plugin::transport::exchange::Exchange;
use galleonfs_node_plugin::transport::{Transport, TransportConfig};
use galleonfs_storage_engine::replication::Concern;
use galleonfs_tests::lab::processes::Process;
use nix::sys::signal::Signal;
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};
use uuid::Uuid;

use super::object::Remote;

/// The argument that makes this program a node.
pub const ARGUMENT: &str = "be-a-node";

const VOLUME: &str = "volume";
const PORT: u16 = 9811;
pub const SIZE_BYTES: u64 = 32 << 20;
const WATCHED_EVERY: Duration = Duration::from_millis(300);
const MAP_BUDGET_BYTES: usize = 32 << 20;

/// Who a node is. All nodes know all.
#[derive(Clone, Debug, Deserialize, Serialize)]
pub struct Identity {
    pub node: Uuid,
    pub replica: Uuid,
    pub address: String,
}

/// What a node is told at its start.
#[derive(Clone, Debug, Deserialize, Serialize)]
pub struct Order {
    pub own: Identity,
    pub others: Vec<Identity>,
    pub cluster: Uuid,
    pub volume: Uuid,
    pub dir: PathBuf,
    /// Where the volume's object is.
    pub object: PathBuf,
    pub certificate: String,
    pub key: String,
    pub trusted: String,
}

impl Order {
    pub fn replica_dir(&self) -> PathBuf {
        self.dir.join("replicas").join(self.own.replica.to_string())
    }
}

/// A node, seen from the test. Killed when it goes out of sight.
pub struct Node {
    child: Child,
    stdin: ChildStdin,
    answers: Receiver<Value>,
    /// Those that came before somebody asked for them.
    early: HashMap<u64, Value>,
    asked: u64,
}

impl Node {
    /// Starts it in this network, and waits until it has its replica open.
    pub fn start(order: &Order, network: &Path) -> Result<Self> {
        let mut child = Command::new("nsenter")
            .arg(format!("--net={}", network.display()))
            .arg(std::env::current_exe()?)
            .arg(ARGUMENT)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .context("starting a node")?;
        let mut stdin = child.stdin.take().context("it has no input")?;
        let stdout = child.stdout.take().context("it has no output")?;
        let (sender, answers) = channel();
        thread::spawn(move || {
            let lines = BufReader::new(stdout).lines().map_while(Result::ok);
            let values = lines.filter_map(|line| serde_json::from_str(&line).ok());
            for value in values {
                if sender.send(value).is_err() {
                    return;
                }
            }
        });
        writeln!(stdin, "{}", serde_json::to_string(order)?)?;
        let mut node = Self {
            child,
            stdin,
            answers,
            early: HashMap::new(),
            asked: 0,
        };
        node.answer(0, Duration::from_secs(30)).context("opening its replica")?;
        Ok(node)
    }

    /// Asks it for something; [`Node::answer`] waits for what it says.
    pub fn ask(&mut self, what: &str, arguments: Value) -> Result<u64> {
        self.asked += 1;
        writeln!(
            self.stdin,
            "{}",
            json!({"id": self.asked, "what": what, "with": arguments})
        )?;
        Ok(self.asked)
    }

    pub fn answer(&mut self, id: u64, limit: Duration) -> Result<Value> {
        let deadline = Instant::now() + limit;
        loop {
            if let Some(answer) = self.early.remove(&id) {
                return match answer["error"].as_str() {
                    Some(error) => bail!("{error}"),
                    None => Ok(answer["ok"].clone()),
                };
            }
            let left = deadline.saturating_duration_since(Instant::now());
            let answer = self.answers.recv_timeout(left).context("it does not answer")?;
            self.early
                .insert(answer["id"].as_u64().context("an answer to what?")?, answer);
        }
    }

    /// Makes it lead, and gives its device.
    pub fn lead(&mut self, epoch: u64, incarnation: Uuid, limit: Duration) -> Result<PathBuf> {
        let id = self.ask("lead", json!([epoch, incarnation]))?;
        let device = self.answer(id, limit)?;
        Ok(device.as_str().context("no device")?.into())
    }

    pub fn detach(&mut self, limit: Duration) -> Result<()> {
        let id = self.ask("detach", Value::Null)?;
        self.answer(id, limit).map(drop)
    }

    pub fn process(&self) -> Result<Process> {
        Process::of(i32::try_from(self.child.id())?).context("the node has ended")
    }

    pub fn kill(&mut self) -> Result<()> {
        self.child.kill()?;
        self.child.wait()?;
        Ok(())
    }
}

impl Drop for Node {
    fn drop(&mut self) {
        if let Ok(process) = self.process() {
            process.signal(Signal::SIGCONT);
        }
        // It may have ended already.
        let _ = self.kill();
    }
}

/// The node itself: until its input ends.
pub fn be() -> Result<()> {
    let mut lines = std::io::stdin().lines();
    let first = lines.next().context("nobody says who this is")??;
    let order: Order = serde_json::from_str(&first)?;
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(2)
        .enable_all()
        .build()?;
    let answers = Arc::new(Mutex::new(std::io::stdout()));
    let say = move |answer: Value| {
        let mut stdout = answers.lock().unwrap_or_else(PoisonError::into_inner);
        // Nobody listens any more when the test has ended.
        let _ = writeln!(stdout, "{answer}").and_then(|()| stdout.flush());
    };
    let (engine, transport) = match runtime.block_on(start(&order)) {
        Ok(started) => started,
        Err(error) => {
            say(json!({"id": 0, "error": format!("{error:#}")}));
            return Ok(());
        }
    };
    say(json!({"id": 0, "ok": true}));
    let engine = Arc::new(engine);
    watch(engine.clone(), order.object.clone());
    for line in lines {
        let told: Value = serde_json::from_str(&line?)?;
        let (engine, order, say) = (engine.clone(), order.clone(), say.clone());
        runtime.spawn(async move {
            let answer = match perform(&engine, &order, &told).await {
                Ok(done) => json!({"id": told["id"], "ok": done}),
                Err(error) => json!({"id": told["id"], "error": format!("{error:#}")}),
            };
            say(answer);
        });
    }
    transport.stop();
    Ok(())
}

/// As the registry does: an object that was changed is looked at by whoever leads.
fn watch(engine: Arc<Engine>, object: PathBuf) {
    thread::spawn(move || {
        let mut seen = None;
        loop {
            let stamp = Remote::stamp(&object).ok();
            if stamp.is_some() && stamp != seen {
                seen = stamp;
                engine.look(VOLUME);
            }
            thread::sleep(WATCHED_EVERY);
        }
    });
}

async fn start(order: &Order) -> Result<(Engine, Transport)> {
    let runtime_dir = order.dir.join("run");
    std::fs::create_dir_all(&runtime_dir)?;
    Engine::remove_stale(&runtime_dir).await?;
    let wallet = Wallet::default();
    wallet.put(Credentials::new(&order.certificate, &order.key, &order.trusted)?);
    let exchange = Exchange::default();
    let dial = Arc::new(OnceLock::new());
    let engine = Engine::start(EngineConfig {
        shards: 1,
        map_budget_bytes: MAP_BUDGET_BYTES,
        scrub: None,
        runtime_dir,
        network: Reach {
            exchange: exchange.clone(),
            dial: Some(dial.clone()),
        },
    })?;
    let transport = Transport::start(
        TransportConfig::new(order.cluster, order.own.node),
        wallet,
        Some(TcpListener::bind((order.own.address.as_str(), PORT))?),
        Arc::new(exchange),
    )?;
    let transport = dial.get_or_init(|| transport).clone();
    let routes = order.others.iter().map(|other| {
        Ok(Route {
            replica: other.replica,
            node: other.node,
            addresses: vec![SocketAddr::new(other.address.parse()?, PORT)],
        })
    });
    engine.routes(order.volume, routes.collect::<Result<_>>()?);
    let spec = HostSpec {
        volume: VOLUME.to_owned(),
        volume_uid: order.volume,
        replica: order.own.replica.to_string(),
        replica_uid: order.own.replica,
        cluster_id: order.cluster,
        replica_dir: order.replica_dir(),
        leaders: Arc::new(Remote(order.object.clone())),
    };
    // The kernel may still hold the lock of a predecessor that was killed.
    let deadline = Instant::now() + Duration::from_secs(20);
    loop {
        match engine.host(spec.clone()).await {
            Err(error) if error.kind() == ErrorKind::Retry && Instant::now() < deadline => {
                tokio::time::sleep(Duration::from_millis(50)).await;
            }
            hosted => {
                hosted?;
                return Ok((engine, transport));
            }
        }
    }
}

async fn perform(engine: &Engine, order: &Order, told: &Value) -> Result<Value> {
    match told["what"].as_str() {
        Some("lead") => {
            let spec = LeadSpec {
                volume: VOLUME.to_owned(),
                volume_uid: order.volume,
                cluster_id: order.cluster,
                epoch: told["with"][0].as_u64().context("no epoch")?,
                incarnation: told["with"][1].as_str().context("no incarnation")?.parse()?,
                size_bytes: SIZE_BYTES,
                block_size: BlockSize::default(),
                read_only: false,
                settings: Settings::default(),
                replicas: order.others.len() + 1,
                concern: Concern::replicated(order.others.len().div_ceil(2)),
                prefer: Some(order.own.replica),
                configs: Arc::new(Remote(order.object.clone())),
            };
            let device = engine.lead(spec).await?;
            Ok(json!(device.path))
        }
        Some("detach") => {
            engine.detach(VOLUME).await?;
            Ok(Value::Null)
        }
        what => bail!("{what:?} is nothing that a node does"),
    }
}
