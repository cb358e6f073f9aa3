//! A replica as its shard serves it: the machine between the messages of a primary and the operations of a disk.
//!
//! ```text
//! order ─► border ─► Replica ─► store ─► Io ─► disk queue ─► ended ─► store ─► Replica ─► answer
//!
//! Serving ── cut off a tail ──► Draining ── nothing is out ──► Reopening ──► Serving
//!    └────── unhost ──► Closing ── the store is closed ──► (dropped)
//! ```

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::mpsc::Sender;
use std::sync::{Arc, Mutex, PoisonError};

use galleonfs_storage_engine::io::{IoId, IoResult};
use galleonfs_storage_engine::replication::message::{Ask, FromReplica, Refusal, Reply, ToReplica};
use galleonfs_storage_engine::replication::mutant::Mutants;
use galleonfs_storage_engine::replication::replica::ReplicaOutput;
use galleonfs_storage_engine::replication::verify::{Unfit, verify};
use galleonfs_storage_engine::replication::{Incarnation, Replica, ReplicaId};
use galleonfs_storage_engine::store::layout::EpochEnd;
use galleonfs_storage_engine::store::{OpenOptions, ScrubOrder, Settle, Store, inspect, open_replica};
use galleonfs_storage_engine::types::{Identity, PAGE_BYTES};
use uuid::Uuid;

use super::border::{Border, Claimant, Verdict};
use super::disk_queue::DiskQueue;
use super::helper::{Outcome, Threads};
use super::inbox::Outbox;
use super::open::{Share, explain};
use super::reactor::Reactor;
use super::scrub::{Schedule, ScrubPlan, Scrubbed};
use super::shard::Message;
use super::spec::{HostSpec, Hosted, Leadership};
use super::{EngineError, StoreReport, clock};
use crate::disk::{FileDisk, ReplicaDir};
use crate::transport::Session;

/// Primaries whose way back is remembered: one serves, and one or two take over from it.
const ASKERS_MAX: usize = 4;

/// What anybody may look at.
pub(super) type Shown = Arc<Mutex<Hosted>>;

/// Whoever gave an order, and gets the answer.
#[derive(Clone, Debug)]
pub(super) enum Asker {
    /// The volume under this key, on the same shard.
    Here(u32),
    There(Session),
}

/// An answer, and where it goes.
#[derive(Debug)]
pub(super) struct Letter {
    pub to: Asker,
    pub answer: FromReplica,
}

/// A replica that was opened, for a shard.
pub(super) struct NewHosted {
    pub key: u32,
    pub spec: HostSpec,
    pub store: Store,
    pub dir: Arc<ReplicaDir>,
    pub shown: Shown,
    pub plan: Option<ScrubPlan>,
    pub share: Share,
    /// Counts orders of nodes that do not lead.
    pub refused: Arc<AtomicU64>,
}

#[derive(Debug)]
enum State {
    Serving,
    /// The store was taken; when the last of its operations has ended, the log is cut at these ends.
    Draining(Vec<EpochEnd>),
    /// A thread opens it.
    Reopening,
    /// It is closing; these want to know when it is gone.
    Closing(Vec<Sender<Threads>>),
}

pub(super) struct HostedReplica {
    key: u32,
    spec: HostSpec,
    /// Names this start of the machine.
    boot: u64,
    machine: Replica<Store>,
    border: Border<(ToReplica, Session)>,
    /// Answers of the border's own.
    answers: Vec<Letter>,
    refused: Arc<AtomicU64>,
    disk: DiskQueue,
    dir: Arc<ReplicaDir>,
    schedule: Schedule,
    askers: Vec<(Incarnation, Asker)>,
    growing: Vec<(u64, Sender<Result<u64, EngineError>>)>,
    state: State,
    shown: Shown,
    share: Share,
    outbox: Outbox<Message>,
    /// In the shard's list of what something happened to.
    pub touched: bool,
}

impl Scrubbed for Store {
    fn scrub(&mut self, order: ScrubOrder) {
        Store::scrub(self, order);
    }

    fn is_running(&self) -> bool {
        self.scrub_progress().running
    }
}

/// Recovers the replica on `disk`, with its log cut at these ends.
pub(super) fn open_hosted(
    spec: &HostSpec,
    disk: &mut FileDisk,
    share: &Share,
    ends: Vec<EpochEnd>,
) -> Result<Store, EngineError> {
    let refused = |error| explain("open", &spec.replica_dir, error);
    let identity = Identity {
        cluster: spec.cluster_id.into_bytes(),
        volume: spec.volume_uid.into_bytes(),
        replica: spec.replica_uid.into_bytes(),
    };
    let superblock = inspect(disk).map_err(refused)?;
    let options = OpenOptions {
        settle: Settle::Told(ends),
        cache_pages_max: share.bytes() / PAGE_BYTES as usize,
        ..OpenOptions::new(identity, superblock.epoch)
    };
    let (store, report) = open_replica(disk, options).map_err(refused)?;
    tracing::info!(
        volume = spec.volume,
        replica = spec.replica,
        ?report,
        "opened a replica"
    );
    Ok(store)
}

impl HostedReplica {
    pub fn new(new: NewHosted, disk: DiskQueue, outbox: Outbox<Message>) -> HostedReplica {
        // Names this start: what only an earlier one knew is not asked of this one.
        let boot = Uuid::new_v4().as_u64_pair().1;
        HostedReplica {
            key: new.key,
            schedule: Schedule::new(new.plan, new.spec.replica_uid),
            machine: Replica::new(new.store, boot, clock::now_ms(), Mutants::default()),
            boot,
            border: Border::default(),
            answers: Vec::new(),
            refused: new.refused,
            spec: new.spec,
            disk,
            dir: new.dir,
            askers: Vec::new(),
            growing: Vec::new(),
            state: State::Serving,
            shown: new.shown,
            share: new.share,
            outbox,
            touched: false,
        }
    }

    pub fn id(&self) -> ReplicaId {
        self.machine.id()
    }

    pub fn volume(&self) -> Uuid {
        self.spec.volume_uid
    }

    /// What its store says of itself.
    pub fn report(&self) -> Option<StoreReport> {
        let store = self.machine.store()?;
        Some(StoreReport {
            stats: store.stats(),
            scrub: store.scrub_progress(),
        })
    }

    /// Takes an order of a volume that is led on the same shard.
    pub fn received_here(&mut self, message: ToReplica, from: u32) {
        if self.takes_orders() {
            self.obey(message, Asker::Here(from));
        }
    }

    /// Takes an order of another node: if it leads the volume, and if the order can be carried out.
    pub fn received(&mut self, message: ToReplica, from: Session) -> Result<(), Unfit> {
        if !self.takes_orders() {
            return Ok(());
        }
        if message.volume != *self.spec.volume_uid.as_bytes() {
            self.answer(&message, from, Refusal::Stranger);
            return Ok(());
        }
        let claimant = Claimant {
            peer: from.peer(),
            epoch: message.epoch,
            incarnation: message.incarnation,
        };
        // Small, whatever else messages are.
        let promise = matches!(message.ask, Ask::Promise { .. }).then(|| (message.clone(), from.clone()));
        match self
            .border
            .judge(claimant, promise, self.machine.fence(), clock::now_ms())
        {
            Verdict::Obey => return self.check_and_obey(message, from),
            Verdict::Answer(why) => self.answer(&message, from, why),
            Verdict::Wait(look_up) => {
                if look_up {
                    self.look_up(claimant.peer);
                }
            }
            Verdict::Refuse => self.refuse(&claimant, &from),
        }
        Ok(())
    }

    /// One that is being opened again will be asked again.
    fn takes_orders(&self) -> bool {
        !matches!(self.state, State::Closing(_)) && self.machine.store().is_some()
    }

    /// What came over the network is looked at first.
    fn check_and_obey(&mut self, message: ToReplica, from: Session) -> Result<(), Unfit> {
        if let Some(store) = self.machine.store() {
            verify(&message, &store.seals(), store.size_blocks())?;
            self.obey(message, Asker::There(from));
        }
        Ok(())
    }

    /// The time is taken after the order came: a lease that is granted by the time of before would end too early.
    fn obey(&mut self, message: ToReplica, from: Asker) {
        self.machine.tick(clock::now_ms());
        self.remember(message.incarnation, from);
        self.machine.received(message);
    }

    /// Answers without the machine, which would take whoever asks for somebody to remember.
    fn answer(&mut self, message: &ToReplica, from: Session, why: Refusal) {
        let promised = self.machine.fence();
        let answer = FromReplica {
            volume: message.volume,
            replica: self.machine.id(),
            epoch: message.epoch,
            incarnation: message.incarnation,
            round: message.round,
            boot: self.boot,
            reply: Reply::Refused { promised, why },
        };
        self.answers.push(Letter {
            to: Asker::There(from),
            answer,
        });
    }

    fn look_up(&self, peer: Uuid) {
        let (replica, outbox) = (self.key, self.outbox.clone());
        let tell = move |found| {
            // The process ends if nobody is there.
            let _ = outbox.send(Message::LookedUp { replica, found });
        };
        self.spec.leaders.look_up(peer, Box::new(tell));
    }

    /// Who leads the volume, as its object says; `None`: it could not be read.
    pub fn looked_up(&mut self, found: Option<Leadership>) {
        let judged = self.border.looked_up(found, clock::now_ms());
        for (claimant, (_, from)) in judged.refused {
            self.refuse(&claimant, &from);
        }
        for (claimant, (message, from)) in judged.obeyed {
            tracing::info!(
                volume = self.spec.volume,
                replica = self.spec.replica,
                leader = self.leader(),
                epoch = claimant.epoch.0,
                "obeys"
            );
            // One that is being opened again will be asked again.
            if self.takes_orders() {
                let taken = self.check_and_obey(message, from);
                debug_assert!(taken.is_ok(), "a promise asks for nothing that could be unfit");
            }
        }
        if let Some(peer) = judged.look_up {
            self.look_up(peer);
        }
    }

    /// Who leads the volume, in words.
    fn leader(&self) -> String {
        let Some(known) = self.border.known() else {
            return "nobody that is known here".to_owned();
        };
        match &known.leader {
            Some(leader) => {
                let uid = leader.node.map(|uid| format!(" ({uid})")).unwrap_or_default();
                format!("node {}{uid}, in epoch {}", leader.name, known.epoch.0)
            }
            None => format!("nobody, after epoch {}", known.epoch.0),
        }
    }

    fn refuse(&mut self, claimant: &Claimant, from: &Session) {
        self.refused.fetch_add(1, Ordering::Relaxed);
        if let Some(orders) = self.border.tells(clock::now_ms()) {
            tracing::warn!(
                volume = self.spec.volume,
                replica = self.spec.replica,
                orders,
                "refused: node {} at {} gives orders as the one that leads the volume in epoch {}; by the volume's object \
                 it is led by {}",
                claimant.peer,
                from.address(),
                claimant.epoch.0,
                self.leader()
            );
        }
    }

    fn remember(&mut self, incarnation: Incarnation, from: Asker) {
        if let Some(known) = self.askers.iter_mut().find(|(known, _)| *known == incarnation) {
            known.1 = from;
            return;
        }
        if self.askers.len() == ASKERS_MAX {
            self.askers.remove(0);
        }
        self.askers.push((incarnation, from));
    }

    /// Tells the time.
    pub fn tick(&mut self, now_ms: u64) {
        self.machine.tick(now_ms);
        if let Some(store) = self.machine.store_mut() {
            store.tick(now_ms);
            self.schedule.tick(now_ms, store);
        }
    }

    /// When it wants to be told the time.
    pub fn next_tick_ms(&self) -> Option<u64> {
        let store = self.machine.store()?;
        [
            store.next_tick_ms(),
            self.machine.next_tick_ms(),
            self.schedule.next_tick_ms(),
        ]
        .into_iter()
        .flatten()
        .min()
    }

    /// A disk operation of the ring's ended.
    pub fn completed(&mut self, id: IoId, result: IoResult) {
        self.disk.ended();
        self.done(id, result);
    }

    /// The helper has done something.
    pub fn helped(&mut self, outcome: Outcome, reactor: &mut Reactor) {
        for (id, result) in self.disk.helped(outcome, reactor) {
            self.done(id, result);
        }
    }

    fn done(&mut self, id: IoId, result: IoResult) {
        // Of a store that was let go nobody asks any more.
        if let Some(store) = self.machine.store_mut() {
            store.completed(id, result);
        }
    }

    /// Makes the replica at least so large, and tells `done` its size when it has it.
    pub fn grow(&mut self, size_bytes: u64, done: Sender<Result<u64, EngineError>>) {
        if let Some(store) = self.machine.store_mut() {
            let blocks = size_bytes.div_ceil(store.block_size().bytes());
            if blocks > store.size_blocks() {
                store.grow(blocks);
            }
        }
        self.growing.push((size_bytes, done));
    }

    /// Lets the machine work until it has nothing more to say.
    pub fn pump(&mut self, reactor: &mut Reactor, letters: &mut Vec<Letter>) {
        letters.append(&mut self.answers);
        loop {
            let mut idle = true;
            while let Some(output) = self.machine.poll() {
                idle = false;
                match output {
                    ReplicaOutput::Reply(answer) => {
                        let known = |(incarnation, _): &&(Incarnation, Asker)| *incarnation == answer.incarnation;
                        if let Some((_, to)) = self.askers.iter().find(known) {
                            let to = to.clone();
                            letters.push(Letter { to, answer });
                        }
                    }
                    ReplicaOutput::Reopen(ends) => self.let_go_of_store(ends),
                }
            }
            while let Some((id, io)) = self.machine.store_mut().and_then(Store::poll_io) {
                idle = false;
                self.disk.start(id, io, reactor);
            }
            if idle {
                break;
            }
        }
        self.disk.refill(reactor);
        self.reopen_when_drained();
        self.show();
    }

    fn let_go_of_store(&mut self, ends: Vec<EpochEnd>) {
        if let State::Serving = self.state {
            drop(self.machine.take_store());
            self.disk.give_up_waiting();
            self.state = State::Draining(ends);
        }
    }

    fn reopen_when_drained(&mut self) {
        if !self.disk.is_idle() {
            return;
        }
        let State::Draining(ends) = &mut self.state else {
            return;
        };
        let ends = std::mem::take(ends);
        // Files that recovery removes or makes anew.
        self.disk.close_files();
        let (key, spec, dir, share) = (self.key, self.spec.clone(), self.dir.clone(), self.share.clone());
        let outbox = self.outbox.clone();
        let reopen = move || {
            let opened = open_hosted(&spec, &mut FileDisk::new(dir), &share, ends);
            // The shard has ended if this fails, and the replica is opened at the next start.
            let _ = outbox.send(Message::Reopened {
                replica: key,
                opened: opened.map(Box::new),
            });
        };
        let started = std::thread::Builder::new()
            .name(format!("open {}", self.spec.replica))
            .spawn(reopen);
        match started {
            Ok(_) => self.state = State::Reopening,
            // Tried again with the next thing that happens: a primary asks every half second.
            Err(error) => tracing::error!(replica = self.spec.replica, %error, "no thread to open a replica on"),
        }
    }

    /// The store was opened again, or could not be.
    pub fn reopened(&mut self, opened: Result<Box<Store>, EngineError>) {
        match opened {
            Ok(store) => {
                self.machine.tick(clock::now_ms());
                self.machine.reopened(*store);
            }
            Err(error) => {
                tracing::error!(
                    replica = self.spec.replica,
                    ?error,
                    "a replica could not be opened again"
                );
                self.machine.reopen_failed(format!("{error:?}"));
                self.show_stopped(format!("it could not be opened again: {error:?}"));
            }
        }
        match &mut self.state {
            State::Closing(_) => self.close_store(),
            state => *state = State::Serving,
        }
    }

    /// Starts an orderly end.
    pub fn close(&mut self, done: Sender<Threads>) {
        match &mut self.state {
            State::Closing(waiting) => waiting.push(done),
            State::Serving | State::Draining(_) | State::Reopening => {
                self.state = State::Closing(vec![done]);
                self.close_store();
            }
        }
    }

    fn close_store(&mut self) {
        if let Some(store) = self.machine.store_mut() {
            store.close();
            // The last checkpoint is background work, which a tick lets go on.
            store.tick(clock::now_ms());
        }
    }

    /// True when it was closed and nothing of it is out.
    pub fn may_go(&self) -> bool {
        let closed = self.machine.store().is_none_or(Store::is_closed);
        matches!(self.state, State::Closing(_)) && closed && self.disk.is_idle()
    }

    /// Lets go of everything.
    pub fn go(self) {
        drop((self.machine, self.dir));
        let mut threads = Some(self.disk.end());
        if let State::Closing(waiting) = self.state {
            for done in waiting {
                // Whoever asked has given up if this fails.
                let _ = done.send(threads.take().unwrap_or_default());
            }
        }
    }

    /// Puts what is known where anybody can look at it.
    fn show(&mut self) {
        let Some(store) = self.machine.store() else { return };
        let (size_bytes, stopped) = (store.size_bytes(), store.stopped());
        let mut shown = self.shown.lock().unwrap_or_else(PoisonError::into_inner);
        if shown.size_bytes != size_bytes {
            shown.size_bytes = size_bytes;
        }
        if stopped.is_some() && shown.stopped.is_none() {
            shown.stopped = stopped.map(str::to_owned);
        }
        drop(shown);
        if self.growing.is_empty() {
            return;
        }
        let stopped = stopped.map(str::to_owned);
        for (wanted, done) in std::mem::take(&mut self.growing) {
            match &stopped {
                // Whoever asked has given up if this fails.
                _ if size_bytes >= wanted => drop(done.send(Ok(size_bytes))),
                Some(why) => {
                    let text = format!("grow replica {} to {wanted} bytes: {why}", self.spec.replica);
                    drop(done.send(Err(EngineError::new(super::ErrorKind::Failed, text))));
                }
                None => self.growing.push((wanted, done)),
            }
        }
    }

    fn show_stopped(&self, why: String) {
        let mut shown = self.shown.lock().unwrap_or_else(PoisonError::into_inner);
        shown.stopped.get_or_insert(why);
    }
}
