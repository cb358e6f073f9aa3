//! One copy of a volume, and whom it obeys.
//!
//! ```text
//!                    Promise(e)                   Trim, Copy, Settle
//!   no session ─────────────────► promised, for e ─────────────────► active: Write, Join, Flush
//!       ▲                              │    ▲                            │
//!       └───────── restart ────────────┘    └── Promise(e' > e) ◄────────┘   from here on e is refused
//! ```
//!
//! What always holds:
//! - From the moment it hears of a higher epoch it takes no order of a lower one; it answers only when that is on stable
//!   storage, and when no lease that it granted to a lower one runs any more (I2).
//! - It appends record behind record without a gap (I10), and says that it has one only when it is in its log.
//! - What lies behind the end of an epoch is cut off before it takes part in the next one (I11), and before it is given
//!   what it lacks: a log is cut with everything that came later.
//! - It says that it has everything before an epoch only with the beginning of that epoch in its log. That it knows where
//!   the epochs before ended does not mean that.

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::sync::Arc;

use super::limits::{DAMAGED_MAX, MENDED_AT_ONCE, REPLICA_QUEUE_MAX};
use super::message::{Ask, Batch, FromReplica, Refusal, Reply, ToReplica};
use super::mutant::{Mutant, Mutants};
use super::replica_store::{CopyMode, ReplicaEvent, ReplicaStore};
use super::timing::LEASE_GRANTED_MS;
use super::{Incarnation, ReplicaId};
use crate::seal::KeyRow;
use crate::store::Room;
use crate::store::layout::EpochEnd;
use crate::types::{Epoch, Lba, Seq, Version};

/// What a replica wants done.
#[derive(Debug)]
pub enum ReplicaOutput {
    /// Tell the primary that asked.
    Reply(FromReplica),
    /// Open the store again, cut off at these ends, and hand it over with [`Replica::reopened`]. Until then nothing is done.
    Reopen(Vec<EpochEnd>),
}

/// Whom it obeys.
#[derive(Clone, Copy, Debug)]
struct Session {
    to: Address,
    /// The ends of the epochs before are settled: records may come.
    active: bool,
}

/// A promise that is not answered yet.
#[derive(Clone, Copy, Debug)]
struct Promising {
    to: Address,
    row: Option<KeyRow>,
    durable: bool,
    /// The leases of lower epochs have run out.
    leases_over: bool,
}

/// How far the ends of the epochs before are written down.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Settling {
    /// The ends are being written. True: then the beginning of the epoch is to follow.
    Ends(bool),
    /// The beginning of the epoch is on its way to the log.
    Begin,
    /// It is there, and is being synced.
    Sync,
}

/// What an answer of the store is for.
#[derive(Clone, Copy, Debug)]
struct Asked {
    id: u64,
    to: Address,
}

/// Whom an answer is for.
#[derive(Clone, Copy, Debug)]
struct Address {
    epoch: Epoch,
    incarnation: Incarnation,
    round: u64,
}

impl Address {
    fn of(message: &ToReplica) -> Address {
        let (epoch, incarnation, round) = (message.epoch, message.incarnation, message.round);
        Address {
            epoch,
            incarnation,
            round,
        }
    }
}

/// A store without room is asked again after so long.
const WAIT_MS: u64 = 10;

/// See the module.
#[derive(Debug)]
pub struct Replica<S> {
    store: Option<S>,
    volume: [u8; 16],
    id: ReplicaId,
    boot: u64,
    now_ms: u64,
    mutants: Mutants,
    /// The highest epoch it heard of in a promise; as long as it runs that counts like a promise.
    fence: Epoch,
    session: Option<Session>,
    promising: Option<Promising>,
    /// Whoever was granted a lease may read until then.
    lease_until_ms: u64,
    /// Where the stream is to be taken up, and records behind it, without room in the store yet.
    joining: Option<Seq>,
    queue: VecDeque<Arc<Batch>>,
    /// The highest write that a flush was asked for, and the last order.
    flush: Option<(Version, u64)>,
    settling: Option<Settling>,
    /// Orders to write ends down that the store has not reported yet.
    settles_out: usize,
    asked: BTreeMap<u64, Asked>,
    /// Blocks that do not pass their check, until they are mended.
    damaged: BTreeSet<Lba>,
    /// What the primary was told last that a checkpoint waits for.
    wants: Version,
    next_token: u64,
    stopped: Option<String>,
    out: VecDeque<ReplicaOutput>,
}

impl<S: ReplicaStore> Replica<S> {
    /// Takes an open store into service. `boot` names this start.
    pub fn new(store: S, boot: u64, now_ms: u64, mutants: Mutants) -> Replica<S> {
        let (volume, id) = store.identity();
        let fence = store.promised();
        Replica {
            store: Some(store),
            volume,
            id: ReplicaId(id),
            boot,
            now_ms,
            mutants,
            fence,
            session: None,
            promising: None,
            // Nobody remembers what leases an earlier start granted.
            lease_until_ms: if fence > Epoch(0) { now_ms + LEASE_GRANTED_MS } else { 0 },
            joining: None,
            queue: VecDeque::new(),
            flush: None,
            settling: None,
            settles_out: 0,
            asked: BTreeMap::new(),
            damaged: BTreeSet::new(),
            wants: Version::default(),
            next_token: 0,
            stopped: None,
            out: VecDeque::new(),
        }
    }

    /// Its store, to be driven. None while it is being opened again.
    pub fn store_mut(&mut self) -> Option<&mut S> {
        self.store.as_mut()
    }

    /// Its store, to be looked at.
    pub fn store(&self) -> Option<&S> {
        self.store.as_ref()
    }

    /// Whose replica this is.
    pub fn id(&self) -> ReplicaId {
        self.id
    }

    /// The highest epoch that it heard of: orders of lower ones are refused.
    pub fn fence(&self) -> Epoch {
        self.fence
    }

    /// Takes the store to close it or to open it again.
    pub fn take_store(&mut self) -> Option<S> {
        self.store.take()
    }

    /// Goes on with a store that was opened again.
    pub fn reopened(&mut self, mut store: S) {
        assert!(self.store.is_none(), "the old store was given back first");
        if let Some(promising) = self.promising.as_mut().filter(|promising| !promising.durable) {
            // What was on its way to the old store may have been lost with it.
            promising.durable = store.promised() >= promising.to.epoch;
            if !promising.durable {
                store.promise(promising.to.epoch, promising.row);
            }
        } else {
            assert!(store.promised() >= self.fence, "I2: a promise is not forgotten");
        }
        self.store = Some(store);
        self.wants = Version::default();
        // The stream goes on only after it was settled again.
        if let Some(session) = &mut self.session {
            session.active = false;
        }
        self.settling = None;
        self.settles_out = 0;
        self.queue.clear();
        self.joining = None;
        self.flush = None;
        self.asked.clear();
        self.answer_promise();
    }

    /// The store could not be opened again: what it has cannot be brought in line.
    pub fn reopen_failed(&mut self, why: String) {
        if let Some(session) = self.session {
            let why = Refusal::Diverged;
            let promised = self.fence;
            self.reply(session.to, Reply::Refused { promised, why });
        }
        self.stopped = Some(why);
    }

    /// Tells the time.
    pub fn tick(&mut self, now_ms: u64) {
        self.now_ms = now_ms;
        self.answer_promise();
        self.append_queued();
    }

    /// When to tell it next.
    pub fn next_tick_ms(&self) -> Option<u64> {
        let promise = self.promising.filter(|promising| promising.durable);
        let lease = promise.map(|_| self.lease_until_ms);
        let waits = !self.queue.is_empty() || self.joining.is_some();
        let queue = waits.then_some(self.now_ms + WAIT_MS);
        [lease, queue].into_iter().flatten().min()
    }

    /// The next thing to do.
    pub fn poll(&mut self) -> Option<ReplicaOutput> {
        while let Some(event) = self.store.as_mut().and_then(ReplicaStore::poll_event) {
            self.happened(event);
        }
        self.append_queued();
        self.want();
        self.out.pop_front()
    }

    /// Tells the primary as soon as a checkpoint waits for it: until then the log grows, and may have no room to. Beats say
    /// it again.
    fn want(&mut self) {
        let wanted = self.store.as_ref().and_then(ReplicaStore::gate_wanted);
        let Some(durable) = wanted.filter(|wanted| *wanted > self.wants) else {
            return;
        };
        if let Some(session) = self.session.filter(|session| session.active) {
            self.wants = durable;
            self.reply(session.to, Reply::Wants { durable });
        }
    }

    fn reply(&mut self, to: Address, reply: Reply) {
        self.out.push_back(ReplicaOutput::Reply(FromReplica {
            volume: self.volume,
            replica: self.id,
            epoch: to.epoch,
            incarnation: to.incarnation,
            round: to.round,
            boot: self.boot,
            reply,
        }));
    }

    fn refuse(&mut self, message: &ToReplica, why: Refusal) {
        let promised = self.fence;
        self.reply(Address::of(message), Reply::Refused { promised, why });
    }

    /// Takes an order.
    pub fn received(&mut self, message: ToReplica) {
        if (message.volume, message.replica) != (self.volume, self.id) {
            return self.refuse(&message, Refusal::Stranger);
        }
        if self.store.is_none() {
            return; // it is asked again
        }
        if message.epoch < self.fence {
            return self.refuse(&message, Refusal::Fenced);
        }
        if let Some(why) = self.stopped.clone() {
            return self.reply(Address::of(&message), Reply::Failed { why });
        }
        if let Ask::Promise { row } = message.ask {
            return self.promise(&message, row);
        }
        let session = match self.session {
            // An earlier start may have had what this one lost.
            _ if message.boot != self.boot && !self.mutants.has(Mutant::BootIgnored) => {
                return self.refuse(&message, Refusal::NoSession);
            }
            Some(session) if session.to.epoch == message.epoch => session,
            _ => return self.refuse(&message, Refusal::NoSession),
        };
        if session.to.incarnation != message.incarnation {
            return self.refuse(&message, Refusal::OtherIncarnation);
        }
        if session.to.round != message.round {
            return; // it comes late, and what it was meant for was decided anew
        }
        let to = Address::of(&message);
        let needs_active = matches!(
            message.ask,
            Ask::Join { .. } | Ask::Write(_) | Ask::Flush { .. } | Ask::Beat { .. }
        );
        if needs_active && !session.active {
            return self.refuse(&message, Refusal::NoSession);
        }
        match message.ask {
            Ask::Promise { .. } => unreachable!("it was taken care of"),
            Ask::Trim { ends } => {
                if self.trim(&ends) {
                    self.reply(to, Reply::Trimmed);
                }
            }
            Ask::Settle { ends, whole } => self.settle(&ends, whole),
            Ask::Join { base } => self.join(base),
            Ask::Write(batch) => self.write(batch),
            Ask::Flush { upto, id } => {
                let (before, order) = self.flush.unwrap_or_default();
                self.flush = Some((before.max(upto), order.max(id)));
                self.answer_flush();
            }
            Ask::Beat { sent_ms, durable } => {
                self.lease_until_ms = self.lease_until_ms.max(self.now_ms + LEASE_GRANTED_MS);
                if !self.mutants.has(Mutant::NoGate) {
                    self.open_store().agree(durable);
                }
                self.reply(to, Reply::Beaten { sent_ms });
                self.tell_needs(to);
            }
            Ask::Read { id, lba, blocks } => {
                let token = self.token(Asked { id, to });
                self.open_store().read_stored(token, lba, blocks);
            }
            Ask::Rows {
                id,
                from,
                after,
                rows_max,
            } => {
                let token = self.token(Asked { id, to });
                self.open_store().rows(token, from, after, rows_max);
            }
            Ask::Copy { id, repair, blocks } => {
                if repair {
                    // One that is not mended by this is found again.
                    let mended = |lba: &Lba| blocks.iter().any(|block| (block.start()..block.end()).contains(lba));
                    self.damaged.retain(|lba| !mended(lba));
                }
                let token = self.token(Asked { id, to });
                let mode = match repair {
                    _ if self.mutants.has(Mutant::CopyWithoutVersions) => CopyMode::Any,
                    true => CopyMode::Repair,
                    false => CopyMode::Newer,
                };
                self.open_store().copy_in(token, blocks, mode);
            }
            Ask::Release => {
                self.lease_until_ms = 0;
                self.session = None;
            }
        }
    }

    /// What the primary can do for this replica.
    fn tell_needs(&mut self, to: Address) {
        if !self.damaged.is_empty() {
            let blocks = self.damaged.iter().take(MENDED_AT_ONCE).copied().collect();
            self.reply(to, Reply::Damaged { blocks });
        }
        if let Some(durable) = self.open_store().gate_wanted() {
            self.reply(to, Reply::Wants { durable });
        }
    }

    fn open_store(&mut self) -> &mut S {
        self.store.as_mut().expect("orders are taken only with an open store")
    }

    fn token(&mut self, asked: Asked) -> u64 {
        let token = self.next_token;
        self.next_token += 1;
        self.asked.insert(token, asked);
        token
    }

    fn promise(&mut self, message: &ToReplica, row: Option<KeyRow>) {
        let to = Address::of(message);
        let epoch = to.epoch;
        if epoch == self.fence {
            let known = self.session.map(|session| session.to);
            let pending = self.promising.map(|promising| promising.to);
            match known.filter(|known| known.epoch == epoch).or(pending) {
                Some(other) if other.incarnation != to.incarnation => {
                    return self.refuse(message, Refusal::OtherIncarnation);
                }
                // Asked again.
                Some(_) => return self.another_round(to.round),
                None => {}
            }
        }
        // An earlier start answered this promise, and so waited for the leases of lower epochs, if it was told how those ended.
        let again = epoch == self.fence && self.session.is_none() && self.promising.is_none();
        let ends = self.open_store().ends();
        let leases_over = again && (epoch.0 <= 1 || ends.iter().any(|row| row.covers(Epoch(epoch.0 - 1))));
        self.fence = epoch;
        self.session = None;
        self.settling = None;
        self.queue.clear();
        self.joining = None;
        self.flush = None;
        let pending = self.promising.is_some_and(|promising| !promising.durable);
        let durable = self.open_store().promised() >= epoch;
        self.promising = Some(Promising {
            to,
            row,
            durable,
            leases_over,
        });
        // One that is on its way is followed by this one when it ends.
        if !durable && !pending {
            self.open_store().promise(epoch, row);
        }
        self.answer_promise();
        self.tell_promising();
    }

    /// Tells that it is there, while an answer takes its time: so whoever is not there can be told apart.
    fn tell_promising(&mut self) {
        if let Some(promising) = self.promising {
            self.reply(promising.to, Reply::Promising);
        }
    }

    /// The same primary asks again, or begins anew.
    fn another_round(&mut self, round: u64) {
        if let Some(promising) = &mut self.promising {
            promising.to.round = promising.to.round.max(round);
            self.tell_promising();
        } else if let Some(session) = &mut self.session {
            if round < session.to.round {
                return;
            }
            if round > session.to.round {
                (session.to.round, session.active) = (round, false);
                self.settling = None;
                self.joining = None;
                self.queue.clear();
            }
            if let Some(session) = self.session {
                self.promised(session.to);
            }
        }
    }

    /// Answers a promise that is on stable storage, once nobody who was granted a lease reads any more.
    fn answer_promise(&mut self) {
        let Some(promising) = self.promising else { return };
        let over = promising.leases_over || self.mutants.has(Mutant::LeaseIgnored);
        let leased = self.now_ms < self.lease_until_ms && !over;
        if !promising.durable || leased || self.store.is_none() {
            return;
        }
        self.promising = None;
        let session = Session {
            to: promising.to,
            active: false,
        };
        self.session = Some(session);
        self.promised(session.to);
    }

    fn promised(&mut self, to: Address) {
        let store = self.open_store();
        let (_, last) = store.last();
        let (ends, agreed) = (store.ends(), store.agreed());
        self.reply(to, Reply::Promised { last, ends, agreed });
    }

    /// Cuts off what is behind the ends; false if that takes a moment.
    fn trim(&mut self, ends: &[EpochEnd]) -> bool {
        if self.mutants.has(Mutant::EndNotSettled) || !self.open_store().is_behind(ends) {
            return true;
        }
        // What it has and nobody else: it is as if it had never been written.
        self.out.push_back(ReplicaOutput::Reopen(ends.to_vec()));
        false
    }

    fn settle(&mut self, ends: &[EpochEnd], whole: bool) {
        if self.settling.is_some() {
            return;
        }
        if self.mutants.has(Mutant::EndNotSettled) {
            self.settling = Some(Settling::Ends(whole));
            return self.ends_written();
        }
        // Whoever was given what it lacks may not be cut any more: then it would lack it again.
        assert!(
            !whole || !self.open_store().is_behind(ends),
            "I11: nothing is behind the ends of one that was trimmed"
        );
        if self.trim(ends) {
            self.settling = Some(Settling::Ends(whole));
            self.settles_out += 1;
            self.open_store().settle(ends);
        }
    }

    /// The ends are written down: the epoch begins, in the log of one that is whole.
    fn ends_written(&mut self) {
        let Some(Settling::Ends(whole)) = self.settling else {
            return;
        };
        let (handed, _) = self.open_store().last();
        if !whole {
            return self.settled();
        }
        if handed.epoch == self.fence {
            return self.sync_beginning();
        }
        self.settling = Some(Settling::Begin);
        self.joining = Some(Seq(0));
        self.append_queued();
    }

    /// What it was given, and that the epoch began, has to be on stable storage before it says that it has it.
    fn sync_beginning(&mut self) {
        self.settling = Some(Settling::Sync);
        self.open_store().sync();
    }

    fn settled(&mut self) {
        self.settling = None;
        if let Some(session) = &mut self.session {
            session.active = true;
            let to = session.to;
            self.reply(to, Reply::Settled);
        }
    }

    /// The last write of the session's epoch that was handed to the store, and the last one that is in the log.
    fn stream(&self) -> (Seq, Seq) {
        let (handed, written) = self.store.as_ref().map(ReplicaStore::last).unwrap_or_default();
        let of = |version: Version| {
            if version.epoch == self.fence {
                version.seq
            } else {
                Seq(0)
            }
        };
        let queued = self.queue.back().map_or(Seq(0), |batch| batch.last_seq());
        let joining = self.joining.unwrap_or_default();
        (of(handed).max(queued).max(joining), of(written))
    }

    fn join(&mut self, base: Seq) {
        let (handed, _) = self.stream();
        let has_stream = self.open_store().last().0.epoch == self.fence || self.joining.is_some();
        // An old one that comes late changes nothing: bases only grow.
        if base > handed || !has_stream {
            // What waited for room comes as copies.
            self.queue.clear();
            self.joining = Some(base);
            self.append_queued();
        } else {
            self.written();
        }
    }

    fn write(&mut self, batch: Arc<Batch>) {
        let (handed, _) = self.stream();
        if batch.last_seq() <= handed {
            return self.written();
        }
        if batch.first_seq != handed.next() && !self.mutants.has(Mutant::GapAllowed) {
            return self.reply_session(Reply::Gap { last: handed });
        }
        if self.queue.len() >= REPLICA_QUEUE_MAX {
            return; // it is sent again
        }
        self.queue.push_back(batch);
        self.append_queued();
    }

    fn append_queued(&mut self) {
        let Some(store) = &mut self.store else { return };
        if let Some(base) = self.joining {
            if store.room(0) != Room::Ready {
                return;
            }
            self.joining = None;
            store.join(base);
        }
        while let Some(batch) = self.queue.front() {
            if store.room(batch.payload_pages()) != Room::Ready {
                return;
            }
            let batch = self.queue.pop_front().expect("it is there");
            store.append(batch);
        }
    }

    fn reply_session(&mut self, reply: Reply) {
        if let Some(session) = self.session {
            self.reply(session.to, reply);
        }
    }

    fn written(&mut self) {
        let (_, upto) = self.stream();
        self.reply_session(Reply::Written { upto });
        self.answer_flush();
    }

    fn answer_flush(&mut self) {
        let (_, written) = self.stream();
        let (Some((upto, id)), Some(store)) = (self.flush, &mut self.store) else {
            return;
        };
        // In an epoch without writes there may still be copies.
        let stream_durable = upto.seq == Seq(0) || store.durable() >= upto;
        if stream_durable && store.copies_durable() {
            let upto = upto.max(store.durable());
            self.flush = None;
            self.reply_session(Reply::Flushed { upto, id });
        } else if written >= upto.seq {
            store.sync();
        }
    }

    fn happened(&mut self, event: ReplicaEvent) {
        match event {
            ReplicaEvent::Promised(epoch) => {
                let Some(promising) = &mut self.promising else { return };
                if epoch >= promising.to.epoch {
                    promising.durable = true;
                } else {
                    let (epoch, row) = (promising.to.epoch, promising.row);
                    self.open_store().promise(epoch, row);
                }
                self.answer_promise();
            }
            ReplicaEvent::Settled => {
                self.settles_out -= 1;
                // Of several the last one counts.
                if self.settles_out == 0 {
                    self.ends_written();
                }
            }
            ReplicaEvent::Written(version) => {
                if self.settling == Some(Settling::Begin) && version.epoch == self.fence {
                    self.sync_beginning();
                }
                self.written();
            }
            ReplicaEvent::Durable(version) => {
                if self.settling == Some(Settling::Sync) {
                    let copies = self.open_store().copies_durable();
                    if copies && version.epoch == self.fence {
                        self.settled();
                    } else {
                        self.sync_beginning();
                    }
                }
                self.answer_flush();
            }
            ReplicaEvent::Read(token, found) => {
                self.answer(token, |id| Reply::Blocks { id, found });
            }
            ReplicaEvent::Rows(token, found) => self.answer(token, |id| Reply::Rows { id, found }),
            ReplicaEvent::Copied(token, done) => self.answer(token, |id| Reply::Copied { id, done }),
            ReplicaEvent::Damaged(lba) => {
                if self.damaged.len() < DAMAGED_MAX {
                    self.damaged.insert(lba);
                }
            }
            ReplicaEvent::Stopped(why) => {
                self.stopped = Some(why.clone());
                self.reply_session(Reply::Failed { why });
            }
        }
    }

    fn answer(&mut self, token: u64, reply: impl FnOnce(u64) -> Reply) {
        let Some(asked) = self.asked.remove(&token) else {
            return;
        };
        // Whoever asked may not be obeyed any more.
        if asked.to.epoch == self.fence {
            self.reply(asked.to, reply(asked.id));
        }
    }
}

#[cfg(test)]
mod tests;
