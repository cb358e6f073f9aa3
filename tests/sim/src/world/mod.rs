//! A small cluster in one thread: the real primaries and replicas, and everything around them that misbehaves.
//!
//! There is one queue of events in virtual time, and all chance comes from one seed, so a run can be repeated exactly.
//! Messages are lost, doubled, late and out of order; links break in one or both directions; processes are killed and
//! paused, nodes lose power, disks are slow and blocks rot; clocks differ in rate by up to a tenth; the API server is
//! away, answers late, and leaves changes undecided. Faults stay within what the protocol promises to survive, so any
//! violation is the protocol's.
//!
//! Safety is checked on every step. In the end the faults stop, and everything has to become well again within a bound.

mod admin;
mod api;
mod attach;
mod backend;
mod carry;
mod changes;
mod faults;
mod guest;
mod judge;
mod net;
pub mod oracle;
mod real;
pub mod rng;
pub mod store;
pub mod swarm;

use std::cmp::Reverse;
use std::collections::{BTreeMap, BinaryHeap};
use std::hash::{Hash, Hasher};

use galleonfs_storage_engine::replication::primary::Decision;
use galleonfs_storage_engine::replication::{
    Concern, Config, Copies, FromReplica, Incarnation, Mutant, Mutants, Primary, Replica, ReplicaId, Stamp, ToReplica,
    Zones,
};
use galleonfs_storage_engine::store::layout::EpochEnd;
use galleonfs_storage_engine::types::Lba;

use api::Api;
use backend::Backend;
use faults::{AfterLag, Fault};
use guest::{Guest, Moment};
use net::Net;
use oracle::Oracle;
use real::RealStore;
use rng::Rng;
use store::SimStore;
use swarm::Swarm;

/// How a run is to be.
#[derive(Clone, Debug)]
pub struct Setup {
    pub seed: u64,
    /// The time of faults, in milliseconds.
    pub faults_ms: u64,
    pub mutants: Mutants,
    /// Which store is under the replicas.
    pub store: StoreKind,
}

/// A store to run on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum StoreKind {
    /// One in memory that keeps the promises of the real one, and no more.
    Small,
    /// The real one.
    Real,
}

/// What a run came to.
#[derive(Debug, Default)]
pub struct Outcome {
    /// What was violated, if anything.
    pub violation: Option<String>,
    /// Tells two runs apart.
    pub trace: u64,
    pub events: u64,
    pub virtual_ms: u64,
    pub reads: u64,
    pub writes: u64,
    pub flushes: u64,
    pub faults: u64,
    /// How often rare things happened.
    pub sometimes: BTreeMap<&'static str, u64>,
}

/// Everything that has to have happened in a run of many seeds: a simulator that never gets there proves nothing about it.
pub const SOMETIMES: [&str; 32] = [
    "a block is copied beside new writes",
    "a block is copied to make members equal",
    "a block rots",
    "a change that nobody heard of was made",
    "a comparison is broken off",
    "a damaged block is mended from another copy",
    "a member is lost while another replica is brought up to date",
    "a member is recorded as out",
    "a new replica is added",
    "a new replica joins",
    "a node is cut off while answers are on their way to it",
    "a node loses power while its answers are on their way",
    faults::LOST,
    faults::ALL_LOST,
    "a primary ends in order",
    "a primary is deposed",
    "a primary is deposed with a write under way",
    "a primary serves",
    "a record does not come in its turn",
    "a replica is given up",
    "a replica is given up while it is brought up to date",
    "a replica joins",
    "a replica names a damaged block",
    "a replica that has just joined loses power",
    "a replica was started again in the middle of an epoch",
    "a tail that nobody else has is cut off",
    "a write completes before all members have it",
    "all copies are compared, and are the same",
    "all nodes lose power at once",
    "an old primary is refused",
    "what only the first copy had is given up",
    "writes are given up that one replica had and could not read",
];

const MS: u64 = 1_000;
/// Everything has to be well again so long after the faults stopped.
const WELL_AFTER_MS: u64 = 60_000;

/// Something that is to happen.
#[derive(Debug)]
enum Event {
    ToReplica(usize, ToReplica),
    FromReplica(usize, FromReplica),
    /// An operation of this start of a replica's store ends.
    Disk(usize, u64, u64),
    TickReplica(usize, u64),
    TickPrimary(usize, Incarnation),
    GuestThinks(usize, Incarnation),
    /// A proposal reaches the object.
    Put(usize, Incarnation, Stamp, Box<Config>, bool),
    Decided(usize, Incarnation, Decision),
    ConfigRead(usize, Incarnation, Option<(Stamp, Box<Config>)>),
    /// A node begins an epoch that was claimed for it.
    Lead(usize, Incarnation, Stamp, Box<Config>),
    /// A node is told that the object changed.
    Look(usize, Incarnation),
    /// Messages to and from a node take no longer than others from now on.
    LagEnds(usize, AfterLag),
    /// A replica that joined loses power.
    CutJoined(usize),
    /// A replica that was given up is removed.
    Remove(usize),
    Reopen(usize, u64, Vec<EpochEnd>),
    Boot(usize),
    Fault(Fault),
    Heal(u64),
    Control,
    Checkpoint(usize),
}

struct Queued {
    at_us: u64,
    order: u64,
    event: Event,
}

impl PartialEq for Queued {
    fn eq(&self, other: &Queued) -> bool {
        self.order == other.order
    }
}
impl Eq for Queued {}
impl PartialOrd for Queued {
    fn partial_cmp(&self, other: &Queued) -> Option<std::cmp::Ordering> {
        Some(self.cmp(other))
    }
}
impl Ord for Queued {
    fn cmp(&self, other: &Queued) -> std::cmp::Ordering {
        (self.at_us, self.order).cmp(&(other.at_us, other.order))
    }
}

/// A primary and its guest.
struct Serving {
    incarnation: Incarnation,
    primary: Primary,
    guest: Guest,
}

struct Node<B: Backend> {
    id: ReplicaId,
    /// In thousandths: 1000 goes right.
    rate: u64,
    offset_ms: u64,
    boot: u64,
    /// The replica's store while nobody has it open.
    disk: Option<B::Disk>,
    replica: Option<Replica<B>>,
    serving: Option<Serving>,
    paused_until_us: u64,
    disk_slow_until_us: u64,
    /// Its power was cut since an epoch last began with it: of what no flush covered it may have lost anything.
    was_cut: bool,
    /// Its replica is not one of the volume's any more. The volume may still be attached here.
    given_up: bool,
}

impl<B: Backend> Node<B> {
    /// An empty replica, on a node of its own.
    fn new(rng: &mut Rng, swarm: &Swarm, volume: [u8; 16], blocks: u64) -> Node<B> {
        let id = ReplicaId(rng.uid());
        Node {
            id,
            rate: if rng.percent(50) {
                *rng.pick(&[1000 - swarm.skew, 1000 + swarm.skew])
            } else {
                rng.between(1000 - swarm.skew, 1000 + swarm.skew)
            },
            offset_ms: rng.below(1_000_000),
            boot: 0,
            disk: Some(B::blank(volume, id.0, blocks)),
            replica: None,
            serving: None,
            paused_until_us: 0,
            disk_slow_until_us: 0,
            was_cut: false,
            given_up: false,
        }
    }

    fn now_ms(&self, now_us: u64) -> u64 {
        self.offset_ms + now_us * self.rate / 1000 / MS
    }
}

/// See the module.
struct World<B: Backend> {
    setup: Setup,
    swarm: Swarm,
    rng: Rng,
    now_us: u64,
    order: u64,
    queue: BinaryHeap<Reverse<Queued>>,
    nodes: Vec<Node<B>>,
    /// As many as there may ever be.
    nodes_max: usize,
    net: Net,
    api: Api,
    api_out_until_us: u64,
    volume: [u8; 16],
    blocks: u64,
    concern: Concern,
    zones: Zones,
    /// A member was left out, or lost power, since an epoch began: it may have been the only one with the last writes.
    tail_at_risk: bool,
    /// A block rotted, since an epoch began, that was not on stable storage everywhere.
    tail_rots: bool,
    oracle: Oracle,
    calm: bool,
    /// Which node lost a block: no two ever lose the same one.
    damaged: BTreeMap<Lba, usize>,
    /// When it was last looked whether everything was mended.
    looked_us: u64,
    outcome: Outcome,
    hasher: rustc_hash::FxHasher,
}

/// Where the node of this number stands.
fn zone(node: usize) -> String {
    ["a", "b"][node % 2].to_owned()
}

/// Runs a seed to its end, or to the first violation. An assertion that fails is one.
pub fn run(setup: Setup) -> Outcome {
    let outcome = std::panic::catch_unwind(|| match setup.store {
        StoreKind::Small => World::<SimStore>::new(setup).run(),
        StoreKind::Real => World::<RealStore>::new(setup).run(),
    });
    outcome.unwrap_or_else(|panic| {
        let text = panic.downcast_ref::<String>().cloned();
        let text = text.or_else(|| panic.downcast_ref::<&str>().map(|text| (*text).to_owned()));
        Outcome {
            violation: Some(text.unwrap_or_else(|| "an assertion failed".into())),
            ..Outcome::default()
        }
    })
}

impl<B: Backend> World<B> {
    fn new(mut setup: Setup) -> World<B> {
        let mut rng = Rng::new(setup.seed);
        let mut swarm = Swarm::draw(&mut rng);
        setup.faults_ms /= B::SLOWER;
        if B::SLOWER > 1 {
            // A store that affords less time for faults is there for power cuts: most of its runs have several.
            swarm.power_ms = if rng.percent(75) { rng.between(500, 5_000) } else { 0 };
        }
        let blocks = *rng.pick(&[4, 16, 64, 256]);
        let replicas = *rng.pick(&[1, 2, 2, 3, 3, 3, 3, 3, 4, 5]);
        // A volume of two may choose to go on with one.
        let min_in_sync = match replicas {
            1 => 1,
            2 => *rng.pick(&[1, 1, 2]),
            n => n / 2 + 1,
        };
        let concern = swarm::concern(setup.seed, setup.mutants, replicas, min_in_sync);
        let volume = rng.uid();
        let nodes = (0..replicas).map(|_| Node::new(&mut rng, &swarm, volume, blocks));
        let nodes: Vec<Node<B>> = nodes.collect();
        let zones = nodes.iter().enumerate().map(|(n, node)| (node.id, zone(n))).collect();
        let ids: Vec<ReplicaId> = nodes.iter().map(|node| node.id).collect();
        World {
            net: Net::new(nodes.len() + admin::ADDED_MAX),
            nodes_max: nodes.len() + admin::ADDED_MAX,
            api: Api::new(Config::new(ids)),
            blocks,
            swarm,
            now_us: 0,
            order: 0,
            queue: BinaryHeap::new(),
            nodes,
            api_out_until_us: 0,
            volume,
            zones,
            oracle: Oracle::new(concern.copies == Copies::First),
            concern,
            tail_at_risk: false,
            tail_rots: false,
            calm: false,
            damaged: BTreeMap::new(),
            looked_us: 0,
            outcome: Outcome::default(),
            hasher: rustc_hash::FxHasher::default(),
            rng,
            setup,
        }
    }

    fn run(mut self) -> Outcome {
        for node in 0..self.nodes.len() {
            self.boot(node);
            self.at(self.swarm.checkpoint_ms * MS, Event::Checkpoint(node));
        }
        self.at(0, Event::Control);
        let pauses = [
            (Fault::Partition, self.swarm.partition_ms),
            (Fault::Kill, self.swarm.kill_ms),
            (Fault::Power, self.swarm.power_ms),
            (Fault::Pause, self.swarm.pause_ms),
            (Fault::ApiOut, self.swarm.api_out_ms),
            (Fault::ApiTouch, self.swarm.api_touch_ms),
            (Fault::Move, self.swarm.move_ms),
            (Fault::Rot, self.swarm.rot_ms),
            (Fault::SlowDisk, self.swarm.slow_disk_ms),
            (Fault::Administer, self.swarm.administer_ms),
            (Fault::Lag, self.swarm.lag_ms),
        ];
        for (fault, pause_ms) in pauses {
            if pause_ms > 0 {
                let at = self.rng.below(2 * pause_ms * MS);
                self.at(at, Event::Fault(fault));
            }
        }
        let calm_at = self.setup.faults_ms * MS;
        while let Some(Reverse(queued)) = self.queue.pop() {
            self.now_us = queued.at_us;
            if !self.calm && self.now_us >= calm_at {
                self.calm_down();
            }
            if self.calm && (self.is_well() || self.now_us > calm_at + WELL_AFTER_MS * MS) {
                break;
            }
            self.outcome.events += 1;
            self.note(&queued);
            self.happens(queued.event);
            if self.outcome.violation.is_some() {
                break;
            }
        }
        if self.outcome.violation.is_none() {
            self.judge();
        }
        self.outcome.virtual_ms = self.now_us / MS;
        self.outcome.trace = self.hasher.finish();
        (self.outcome.reads, self.outcome.writes, self.outcome.flushes) =
            (self.oracle.reads, self.oracle.writes, self.oracle.flushes);
        self.outcome
    }

    fn note(&mut self, queued: &Queued) {
        queued.at_us.hash(&mut self.hasher);
        queued.order.hash(&mut self.hasher);
        std::mem::discriminant(&queued.event).hash(&mut self.hasher);
    }

    fn at(&mut self, in_us: u64, event: Event) {
        let at_us = self.now_us + in_us;
        self.push(at_us, event);
    }

    fn push(&mut self, at_us: u64, event: Event) {
        self.order += 1;
        let order = self.order;
        self.queue.push(Reverse(Queued { at_us, order, event }));
    }

    fn sometimes(&mut self, what: &'static str) {
        *self.outcome.sometimes.entry(what).or_default() += 1;
    }

    fn violated(&mut self, what: String) {
        self.outcome.violation.get_or_insert(what);
    }

    /// The node that an event happens on, if it is one that a pause of the node holds up.
    fn place(event: &Event) -> Option<usize> {
        match event {
            Event::ToReplica(node, _)
            | Event::FromReplica(node, _)
            | Event::TickReplica(node, _)
            | Event::TickPrimary(node, _)
            | Event::GuestThinks(node, _)
            | Event::Decided(node, ..)
            | Event::ConfigRead(node, ..)
            | Event::Lead(node, ..)
            | Event::Look(node, ..)
            | Event::Reopen(node, ..) => Some(*node),
            _ => None,
        }
    }

    fn happens(&mut self, event: Event) {
        if let Some(node) = Self::place(&event)
            && self.nodes[node].paused_until_us > self.now_us
        {
            let until = self.nodes[node].paused_until_us;
            return self.push(until, event);
        }
        match event {
            Event::ToReplica(node, message) => {
                let now_ms = self.nodes[node].now_ms(self.now_us);
                if let Some(replica) = &mut self.nodes[node].replica {
                    replica.tick(now_ms);
                    replica.received(message);
                    self.drain_replica(node);
                }
            }
            Event::FromReplica(node, message) => {
                let now_ms = self.nodes[node].now_ms(self.now_us);
                if let Some(serving) = &mut self.nodes[node].serving
                    && serving.incarnation == message.incarnation
                {
                    serving.primary.tick(now_ms);
                    serving.primary.received(message);
                    self.drain_primary(node);
                }
            }
            Event::Disk(node, boot, operation) => {
                if self.nodes[node].boot == boot
                    && let Some(store) = self.nodes[node].replica.as_mut().and_then(Replica::store_mut)
                {
                    store.finish(operation);
                    self.drain_replica(node);
                }
            }
            Event::TickReplica(node, boot) => {
                let now_ms = self.nodes[node].now_ms(self.now_us);
                if self.nodes[node].boot == boot
                    && let Some(replica) = &mut self.nodes[node].replica
                {
                    if let Some(store) = replica.store_mut() {
                        store.tick(now_ms);
                    }
                    replica.tick(now_ms);
                    self.drain_replica(node);
                    self.at(50 * MS, Event::TickReplica(node, boot));
                }
            }
            Event::TickPrimary(node, incarnation) => {
                let now_ms = self.nodes[node].now_ms(self.now_us);
                if let Some(serving) = self.serving_mut(node, incarnation) {
                    serving.primary.tick(now_ms);
                    self.drain_primary(node);
                    self.at(50 * MS, Event::TickPrimary(node, incarnation));
                }
            }
            Event::GuestThinks(node, incarnation) => self.guest_thinks(node, incarnation),
            Event::Put(node, incarnation, stamp, config, heard) => self.put(node, incarnation, stamp, *config, heard),
            Event::Decided(node, incarnation, decision) => {
                if let Some(serving) = self.serving_mut(node, incarnation) {
                    serving.primary.decided(decision);
                    self.drain_primary(node);
                }
            }
            Event::ConfigRead(node, incarnation, found) => {
                let zones = self.zones.clone();
                if let Some(serving) = self.serving_mut(node, incarnation) {
                    serving.primary.stand(zones);
                    serving
                        .primary
                        .config_read(found.map(|(stamp, config)| (stamp, *config)));
                    self.drain_primary(node);
                }
            }
            Event::Lead(node, incarnation, stamp, config) => self.lead(node, incarnation, stamp, *config),
            Event::Look(node, incarnation) => self.look(node, incarnation),
            Event::LagEnds(node, then) => self.lag_ends(node, then),
            Event::CutJoined(node) => self.cut_joined(node),
            Event::Remove(node) => self.nodes[node].replica = None,
            Event::Reopen(node, boot, ends) => self.reopen(node, boot, &ends),
            Event::Boot(node) => self.boot(node),
            Event::Fault(fault) => self.strike(fault),
            Event::Heal(partition) => self.heal(partition),
            Event::Control => self.control(),
            Event::Checkpoint(node) => {
                let gated = !self.setup.mutants.has(Mutant::NoGate);
                if let Some(store) = self.nodes[node].replica.as_mut().and_then(Replica::store_mut) {
                    store.checkpoint(gated);
                    self.drain_replica(node);
                }
                if self.calm || self.swarm.rot_ms > 0 && self.rng.percent(5) {
                    self.scrub(node);
                    self.compare(node);
                }
                let pause = self.rng.between(1, 2 * self.swarm.checkpoint_ms);
                self.at(pause * MS, Event::Checkpoint(node));
            }
        }
    }

    fn serving_mut(&mut self, node: usize, incarnation: Incarnation) -> Option<&mut Serving> {
        let serving = self.nodes[node].serving.as_mut();
        serving.filter(|serving| serving.incarnation == incarnation)
    }

    /// Opens a node's replica, if it is down.
    fn boot(&mut self, node: usize) {
        let now_us = self.now_us;
        let it = &mut self.nodes[node];
        let Some(disk) = it.disk.take() else { return };
        it.boot += 1;
        let store = B::open(disk, None).expect("without ends to be told nothing is cut off");
        let now_ms = it.now_ms(now_us);
        let boot = it.boot;
        it.replica = Some(Replica::new(store, boot, now_ms, self.setup.mutants));
        self.at(0, Event::TickReplica(node, boot));
        self.drain_replica(node);
    }

    fn reopen(&mut self, node: usize, boot: u64, ends: &[EpochEnd]) {
        if self.nodes[node].boot != boot {
            return;
        }
        let Some(replica) = &mut self.nodes[node].replica else {
            return;
        };
        let Some(store) = replica.take_store() else { return };
        let mut rng = self.rng.fork();
        match B::open(store.into_disk(&mut rng), Some(ends)) {
            Ok(store) => {
                replica.reopened(store);
                self.sometimes("a tail that nobody else has is cut off");
                self.drain_replica(node);
            }
            Err(why) => self.violated(format!("I11: {why}")),
        }
    }

    fn guest_thinks(&mut self, node: usize, incarnation: Incarnation) {
        let moment = Moment {
            volume: self.volume,
            blocks: self.blocks,
            calm: self.calm,
            now_us: self.now_us,
        };
        let (swarm, oracle, rng) = (&self.swarm, &mut self.oracle, &mut self.rng);
        let serving = self.nodes[node].serving.as_mut();
        let Some(serving) = serving.filter(|serving| serving.incarnation == incarnation) else {
            return;
        };
        serving
            .guest
            .think::<B>(&mut serving.primary, oracle, rng, swarm, moment);
        self.drain_primary(node);
        let pause = self.rng.between(1, 2 * self.swarm.think_us);
        self.at(pause, Event::GuestThinks(node, incarnation));
    }
}
