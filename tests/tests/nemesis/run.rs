//! The nemesis: takes nodes and links away, one fault after the other, and gives them back.
//!
//! It never waits until a fault has been mended before the next one comes, so the next one often finds a replica that is
//! still behind. What it takes it gives back after seconds, so everything that waits must go on.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::thread;
use std::time::{Duration, Instant, SystemTime};

use anyhow::{Context, Result, anyhow, ensure};
use galleonfs_api::NodeIdentity;
use galleonfs_controller::certificates::Authority;
use galleonfs_node_plugin::disk::{BlockSize, FormatSpec, format_replica};
use galleonfs_node_plugin::engine::Engine;
use galleonfs_sim::history::check;
use galleonfs_tests::bench::several::certificate;
use galleonfs_tests::lab::network::{self, Network};
use galleonfs_tests::lab::run::wait_for;
use galleonfs_tests::lab::{Frozen, Partition};
use uuid::Uuid;

use super::guest::{Guests, look};
use super::node::{Identity, Node, Order, SIZE_BYTES};
use super::object::Object;
use super::record::{Generation, Record};

const NODES: usize = 3;
const LASTS: Duration = Duration::from_secs(30);
/// Everything has been given back by then, and so all must be well.
const MENDED: Duration = Duration::from_secs(60);
/// A node that leads needs the others; a frozen one is thawed if it takes longer.
const LEADS_ALONE: Duration = Duration::from_secs(6);
/// So few would say little.
const DONE_MIN: u64 = 1_000;
const LIFE: Duration = Duration::from_secs(24 * 3600);
/// Of bridges and networks on this machine.
const PREFIX: &str = "gfs-nem";

/// What is done to the cluster.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Fault {
    KillReplica,
    FreezeReplica,
    Split,
    OneWay,
    Flap,
    ObjectAway,
    /// The object is away, and a replica is killed.
    ObjectAwayAndKill,
    KillLeader,
    FreezeLeader,
    IsolateLeader,
    Move,
}

const FAULTS: [Fault; 11] = [
    Fault::KillReplica,
    Fault::FreezeReplica,
    Fault::Split,
    Fault::OneWay,
    Fault::Flap,
    Fault::ObjectAway,
    Fault::ObjectAwayAndKill,
    Fault::KillLeader,
    Fault::FreezeLeader,
    Fault::IsolateLeader,
    Fault::Move,
];

/// All faults, in an order by chance, again and again.
pub struct Deck {
    random: Random,
    left: Vec<Fault>,
}

impl Deck {
    pub fn new(seed: u64) -> Self {
        Self {
            random: Random::new(seed),
            left: Vec::new(),
        }
    }

    fn draw(&mut self) -> Fault {
        if self.left.is_empty() {
            self.left = FAULTS.to_vec();
        }
        let at = self.random.below(self.left.len() as u64);
        self.left.swap_remove(at as usize)
    }
}

/// Numbers by chance, from a seed.
#[derive(Clone, Debug)]
pub struct Random(u64);

impl Random {
    pub fn new(seed: u64) -> Self {
        Self(seed.wrapping_mul(0x9E37_79B9_7F4A_7C15) | 1)
    }

    pub fn below(&mut self, end: u64) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        (self.0 >> 11) % end
    }

    fn millis(&mut self, from: u64, to: u64) -> Duration {
        Duration::from_millis(from + self.below(to - from))
    }
}

/// One run: a volume, its life, and the judgement.
pub fn run(seed: u64, deck: &mut Deck) -> Result<()> {
    let dir = Path::new(env!("CARGO_TARGET_TMPDIR")).join("nemesis");
    clean_up(&dir)?;
    let outcome = World::new(&dir, seed).and_then(|mut world| {
        let lived = world.live(deck);
        let history = world.record.history();
        let kept = dir.with_extension("history");
        fs::write(&kept, history.to_string())?;
        lived.with_context(|| format!("its history is in {}", kept.display()))?;
        let summary = check(&history).map_err(|wrong| anyhow!("{wrong}\nits history is in {}", kept.display()))?;
        ensure!(
            summary.operations as u64 >= DONE_MIN && world.record.done() >= DONE_MIN,
            "only {} operations were done",
            world.record.done()
        );
        let faults: Vec<String> = world
            .faults
            .iter()
            .map(|(fault, times)| format!("{fault:?} {times}"))
            .collect();
        println!(
            "    seed {seed}: {} operations, {} done, the longest took {:.1} s, nothing wrong; {}",
            summary.operations,
            world.record.done(),
            world.longest.as_secs_f64(),
            faults.join(", ")
        );
        Ok(())
    });
    let cleaned = clean_up(&dir);
    outcome.and(cleaned)
}

/// Removes what a run leaves, and what a killed one left: networks, devices, mounts, files.
fn clean_up(dir: &Path) -> Result<()> {
    network::remove(PREFIX);
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    for number in 1..=NODES {
        let run = dir.join(number.to_string()).join("run");
        if run.exists() {
            runtime.block_on(Engine::remove_stale(&run))?;
        }
    }
    match fs::remove_dir_all(dir) {
        Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
            Err(error).with_context(|| format!("removing {}", dir.display()))
        }
        _ => Ok(()),
    }
}

struct World {
    network: Network,
    object: Object,
    orders: Vec<Order>,
    nodes: Vec<Option<Node>>,
    leader: usize,
    device: PathBuf,
    guests: Option<Guests>,
    generation: Generation,
    record: Record,
    random: Random,
    longest: Duration,
    faults: BTreeMap<Fault, usize>,
}

impl World {
    /// Three nodes with an empty replica each, of which the first one leads.
    fn new(dir: &Path, seed: u64) -> Result<Self> {
        fs::create_dir_all(dir)?;
        let network = Network::choose(PREFIX)?;
        network.create(NODES)?;
        let at = dir.join("object");
        let orders = orders(dir, &network, &at)?;
        let replicas: Vec<Uuid> = orders.iter().map(|order| order.own.replica).collect();
        let object = Object::listen(&at, &replicas)?;
        let nodes = orders.iter().enumerate();
        let nodes = nodes.map(|(index, order)| Node::start(order, &network.namespace(index + 1)).map(Some));
        let mut world = Self {
            nodes: nodes.collect::<Result<_>>()?,
            network,
            object,
            orders,
            leader: 0,
            device: PathBuf::new(),
            guests: None,
            generation: 0,
            record: Record::default(),
            random: Random::new(seed + 1000),
            longest: Duration::ZERO,
            faults: BTreeMap::new(),
        };
        let (epoch, incarnation) = world.object.claim(world.orders[0].own.node);
        world.device = world.node(0)?.lead(epoch, incarnation, MENDED)?;
        world.begin_to_use()?;
        Ok(world)
    }

    fn node(&mut self, index: usize) -> Result<&mut Node> {
        self.nodes[index].as_mut().context("this node is down")
    }

    fn begin_to_use(&mut self) -> Result<()> {
        self.guests = Some(Guests::start(
            &self.device,
            self.generation,
            &self.record,
            self.random.below(1 << 32),
        )?);
        Ok(())
    }

    fn live(&mut self, deck: &mut Deck) -> Result<()> {
        let start = Instant::now();
        while start.elapsed() < LASTS {
            thread::sleep(self.random.millis(200, 1500));
            let fault = deck.draw();
            *self.faults.entry(fault).or_default() += 1;
            self.suffer(fault)
                .with_context(|| format!("{fault:?}, {:.1} s after the start", start.elapsed().as_secs_f64()))?;
            let guests = self.guests.as_ref().context("nobody uses the volume")?;
            ensure!(!guests.gone(), "{fault:?}: guests were told of an error");
        }
        self.compare()
    }

    /// One of the nodes that do not lead.
    fn other(&mut self) -> usize {
        (self.leader + 1 + self.random.below(NODES as u64 - 1) as usize) % NODES
    }

    fn suffer(&mut self, fault: Fault) -> Result<()> {
        let (leader, other) = (self.leader + 1, self.other());
        match fault {
            Fault::KillReplica => self.kill_for_a_while(other),
            Fault::FreezeReplica => {
                let frozen = Frozen::new(vec![self.node(other)?.process()?]);
                thread::sleep(self.random.millis(500, 6000));
                frozen.thaw();
                Ok(())
            }
            Fault::Split => self.cut(&[(leader, other + 1), (other + 1, leader)]),
            Fault::OneWay => match self.random.below(2) {
                0 => self.cut(&[(leader, other + 1)]),
                _ => self.cut(&[(other + 1, leader)]),
            },
            Fault::Flap => {
                for _ in 0..4 {
                    let cut = Partition::of_ways(&self.network, &[(leader, other + 1), (other + 1, leader)])?;
                    thread::sleep(self.random.millis(100, 1500));
                    cut.heal()?;
                    thread::sleep(self.random.millis(100, 1000));
                }
                Ok(())
            }
            Fault::ObjectAway | Fault::ObjectAwayAndKill => {
                self.object.set_away(true);
                let suffered = if fault == Fault::ObjectAway {
                    thread::sleep(self.random.millis(500, 4000));
                    Ok(())
                } else {
                    self.kill_for_a_while(other)
                };
                self.object.set_away(false);
                suffered
            }
            Fault::KillLeader => {
                self.node(leader - 1)?.kill()?;
                self.nodes[leader - 1] = None;
                let guests = self.guests.take().context("nobody uses the volume")?;
                let id = self.ask_to_lead(other)?;
                let patience = self.random.millis(0, 4000);
                let early = self.node(other)?.answer(id, patience);
                self.restart(leader - 1)?;
                self.taken_over(other, id, early.ok())?;
                self.longest = self.longest.max(guests.join());
                Ok(())
            }
            Fault::FreezeLeader => {
                let frozen = Frozen::new(vec![self.node(leader - 1)?.process()?]);
                let guests = self.guests.take().context("nobody uses the volume")?;
                let id = self.ask_to_lead(other)?;
                let early = self.node(other)?.answer(id, LEADS_ALONE).ok();
                let awake = early.is_some();
                if awake {
                    self.taken_over(other, id, early.clone())?;
                    thread::sleep(self.random.millis(0, 1500));
                }
                frozen.thaw();
                if !awake {
                    self.taken_over(other, id, None)?;
                }
                self.deposed(leader - 1, guests)
            }
            Fault::IsolateLeader => {
                let ways: Vec<_> = (1..=NODES)
                    .filter(|node| *node != leader)
                    .flat_map(|node| [(leader, node), (node, leader)])
                    .collect();
                let cut = Partition::of_ways(&self.network, &ways)?;
                let guests = self.guests.take().context("nobody uses the volume")?;
                thread::sleep(self.random.millis(0, 1500));
                let id = self.ask_to_lead(other)?;
                let early = self.node(other)?.answer(id, LEADS_ALONE).ok();
                cut.heal()?;
                self.taken_over(other, id, early)?;
                self.deposed(leader - 1, guests)
            }
            Fault::Move => {
                let guests = self.guests.take().context("nobody uses the volume")?;
                self.longest = self.longest.max(guests.join());
                self.node(leader - 1)?.detach(MENDED)?;
                let id = self.ask_to_lead(other)?;
                self.taken_over(other, id, None)
            }
        }
    }

    fn cut(&mut self, ways: &[(usize, usize)]) -> Result<()> {
        let cut = Partition::of_ways(&self.network, ways)?;
        thread::sleep(self.random.millis(300, 5000));
        cut.heal()
    }

    fn kill_for_a_while(&mut self, index: usize) -> Result<()> {
        self.node(index)?.kill()?;
        self.nodes[index] = None;
        thread::sleep(self.random.millis(0, 4000));
        self.restart(index)
    }

    fn restart(&mut self, index: usize) -> Result<()> {
        self.nodes[index] = Some(Node::start(&self.orders[index], &self.network.namespace(index + 1))?);
        Ok(())
    }

    fn ask_to_lead(&mut self, index: usize) -> Result<u64> {
        let (epoch, incarnation) = self.object.claim(self.orders[index].own.node);
        self.node(index)?.ask("lead", serde_json::json!([epoch, incarnation]))
    }

    /// Another node leads: `answer` is its device if it has said so.
    fn taken_over(&mut self, by: usize, id: u64, answer: Option<serde_json::Value>) -> Result<()> {
        let answer = match answer {
            Some(answer) => answer,
            None => self.node(by)?.answer(id, MENDED).context("taking over")?,
        };
        self.device = answer.as_str().context("no device")?.into();
        self.leader = by;
        self.generation = self.record.epoch();
        self.begin_to_use()
    }

    /// The guests of the node that led before are told of an error, and then its device can go.
    fn deposed(&mut self, old: usize, guests: Guests) -> Result<()> {
        wait_for("the guests of the old device to be told of an error", MENDED, || {
            Ok(guests.gone().then_some(()))
        })?;
        self.longest = self.longest.max(guests.join());
        self.node(old)?.detach(MENDED)
    }

    /// All is well again: everybody is in sync, and has the same.
    fn compare(&mut self) -> Result<()> {
        wait_for("all replicas to be in sync", MENDED, || {
            Ok((self.object.config().in_sync.len() == NODES).then_some(()))
        })
        .with_context(|| format!("the object is {:?}", self.object.config()))?;
        let guests = self.guests.take().context("nobody uses the volume")?;
        ensure!(!guests.gone(), "guests were told of an error");
        self.longest = self.longest.max(guests.join());
        let leader = self.leader;
        self.node(leader)?.detach(MENDED)?;
        for index in 0..NODES {
            let replica = self.orders[index].own.replica;
            self.object.leave_only(replica);
            let (epoch, incarnation) = self.object.claim(self.orders[index].own.node);
            let node = self.node(index)?;
            let device = node
                .lead(epoch, incarnation, MENDED)
                .context("looking at one replica")?;
            let found = look(&device)?;
            node.detach(MENDED)?;
            for (block, value) in (0..).zip(found) {
                self.record.copy(index as u64, block, value);
            }
        }
        Ok(())
    }
}

/// Makes the replicas, and says to each node who it is.
fn orders(dir: &Path, network: &Network, object: &Path) -> Result<Vec<Order>> {
    let (cluster, volume) = (Uuid::new_v4(), Uuid::new_v4());
    let authority = Authority::make(cluster, SystemTime::now(), LIFE)?;
    let identities: Vec<Identity> = (1..=NODES)
        .map(|number| Identity {
            node: Uuid::new_v4(),
            replica: Uuid::new_v4(),
            address: network.node_address(number),
        })
        .collect();
    let order = |(index, own): (usize, &Identity)| -> Result<Order> {
        let (certificate, key) = certificate(
            &authority,
            NodeIdentity {
                cluster,
                node: own.node,
            },
        )?;
        let others = identities.iter().filter(|other| other.node != own.node);
        let order = Order {
            own: own.clone(),
            others: others.cloned().collect(),
            cluster,
            volume,
            dir: dir.join((index + 1).to_string()),
            object: object.to_path_buf(),
            certificate,
            key,
            trusted: authority.certificate().to_owned(),
        };
        let format = FormatSpec {
            volume_uid: volume,
            replica_uid: own.replica,
            cluster_id: cluster,
            block_size: BlockSize::default(),
            size_bytes: SIZE_BYTES,
            salt: own.replica.as_u64_pair().1,
            key: None,
        };
        format_replica(&order.replica_dir(), &format)?;
        Ok(order)
    };
    identities.iter().enumerate().map(order).collect()
}
