//! One copy of a volume, and whom it obeys.
//!
//! ```text
//!                    Promise(e)                      Settle(ends)
//!   no session ─────────────────► promised, for e ─────────────────► active: Write, Join, Flush
//!       ▲                              │    ▲                            │
//!       └───────── restart ────────────┘    └── Promise(e' > e) ◄────────┘   from here on e is refused
//! ```
//!
//! What always holds:
//! - From the moment it hears of a higher epoch it takes no order of a lower one; it answers only when that is on stable
//!   storage, and when no lease that it granted to a lower one runs any more (I2).
//! - It appends record behind record without a gap (I10), and says that it has one only when it is in its log.
//! - What lies behind the end of an epoch is cut off before it takes part in the next one (I11).

use std::collections::{BTreeMap, VecDeque};
use std::sync::Arc;

use super::limits::REPLICA_QUEUE_MAX;
use super::message::{Ask, Batch, FromReplica, Refusal, Reply, ToReplica};
use super::mutant::{Mutant, Mutants};
use super::replica_store::{CopyMode, ReplicaEvent, ReplicaStore};
use super::timing::LEASE_GRANTED_MS;
use super::{Incarnation, ReplicaId};
use crate::seal::KeyRow;
use crate::store::Room;
use crate::store::layout::EpochEnd;
use crate::types::{Epoch, Seq, Version};

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
    epoch: Epoch,
    incarnation: Incarnation,
    /// The ends of the epochs before are settled: records may come.
    active: bool,
}

/// A promise that is not answered yet.
#[derive(Clone, Copy, Debug)]
struct Promising {
    epoch: Epoch,
    incarnation: Incarnation,
    row: Option<KeyRow>,
    durable: bool,
    /// The leases of lower epochs have run out.
    leases_over: bool,
}

/// What an answer of the store is for.
#[derive(Clone, Copy, Debug)]
struct Asked {
    id: u64,
    epoch: Epoch,
    incarnation: Incarnation,
}

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
    /// Records without room in the store.
    queue: VecDeque<Arc<Batch>>,
    /// The highest write that a flush was asked for.
    flush: Option<Version>,
    settling: bool,
    asked: BTreeMap<u64, Asked>,
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
            queue: VecDeque::new(),
            flush: None,
            settling: false,
            asked: BTreeMap::new(),
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

    /// Takes the store to close it or to open it again.
    pub fn take_store(&mut self) -> Option<S> {
        self.store.take()
    }

    /// Goes on with a store that was opened again.
    pub fn reopened(&mut self, store: S) {
        assert!(self.store.is_none(), "the old store was given back first");
        assert!(store.promised() >= self.fence, "I2: a promise is not forgotten");
        self.store = Some(store);
        // The stream goes on only after it was settled again.
        if let Some(session) = &mut self.session {
            session.active = false;
        }
        self.settling = false;
        self.queue.clear();
        self.flush = None;
        self.asked.clear();
    }

    /// The store could not be opened again: what it has cannot be brought in line.
    pub fn reopen_failed(&mut self, why: String) {
        if let Some(session) = self.session {
            let why = Refusal::Diverged;
            let promised = self.fence;
            self.reply(session.epoch, session.incarnation, Reply::Refused { promised, why });
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
        let queue = (!self.queue.is_empty()).then_some(self.now_ms + 10);
        [lease, queue].into_iter().flatten().min()
    }

    /// The next thing to do.
    pub fn poll(&mut self) -> Option<ReplicaOutput> {
        while let Some(event) = self.store.as_mut().and_then(ReplicaStore::poll_event) {
            self.happened(event);
        }
        self.append_queued();
        self.out.pop_front()
    }

    fn reply(&mut self, epoch: Epoch, incarnation: Incarnation, reply: Reply) {
        self.out.push_back(ReplicaOutput::Reply(FromReplica {
            volume: self.volume,
            replica: self.id,
            epoch,
            incarnation,
            boot: self.boot,
            reply,
        }));
    }

    fn refuse(&mut self, message: &ToReplica, why: Refusal) {
        let promised = self.fence;
        self.reply(message.epoch, message.incarnation, Reply::Refused { promised, why });
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
            return self.reply(message.epoch, message.incarnation, Reply::Failed { why });
        }
        if let Ask::Promise { row } = message.ask {
            return self.promise(&message, row);
        }
        let session = match self.session {
            // An earlier start may have had what this one lost.
            _ if message.boot != self.boot && !self.mutants.has(Mutant::BootIgnored) => {
                return self.refuse(&message, Refusal::NoSession);
            }
            Some(session) if session.epoch == message.epoch => session,
            _ => return self.refuse(&message, Refusal::NoSession),
        };
        if session.incarnation != message.incarnation {
            return self.refuse(&message, Refusal::OtherIncarnation);
        }
        let asked = Asked {
            id: 0,
            epoch: message.epoch,
            incarnation: message.incarnation,
        };
        let needs_active = matches!(
            message.ask,
            Ask::Join { .. } | Ask::Write(_) | Ask::Flush { .. } | Ask::Beat { .. }
        );
        if needs_active && !session.active {
            return self.refuse(&message, Refusal::NoSession);
        }
        match message.ask {
            Ask::Promise { .. } => unreachable!("it was taken care of"),
            Ask::Settle { ends } => self.settle(&ends),
            Ask::Join { base } => self.join(base),
            Ask::Write(batch) => self.write(batch),
            Ask::Flush { upto } => {
                self.flush = self.flush.max(Some(upto));
                self.answer_flush();
            }
            Ask::Beat { sent_ms, durable } => {
                self.lease_until_ms = self.lease_until_ms.max(self.now_ms + LEASE_GRANTED_MS);
                if !self.mutants.has(Mutant::NoGate) {
                    self.open_store().agree(durable);
                }
                self.reply(asked.epoch, asked.incarnation, Reply::Beaten { sent_ms });
            }
            Ask::Read { id, lba, blocks } => {
                let token = self.token(Asked { id, ..asked });
                self.open_store().read_stored(token, lba, blocks);
            }
            Ask::Rows {
                id,
                from,
                after,
                rows_max,
            } => {
                let token = self.token(Asked { id, ..asked });
                self.open_store().rows(token, from, after, rows_max);
            }
            Ask::Copy { id, repair, blocks } => {
                let token = self.token(Asked { id, ..asked });
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
        let (epoch, incarnation) = (message.epoch, message.incarnation);
        if epoch == self.fence {
            let known = self.session.map(|session| (session.epoch, session.incarnation));
            let pending = self.promising.map(|promising| (promising.epoch, promising.incarnation));
            match known.filter(|(known, _)| *known == epoch).or(pending) {
                Some((_, other)) if other != incarnation => {
                    return self.refuse(message, Refusal::OtherIncarnation);
                }
                // Asked again.
                Some(_) if self.promising.is_some() => return,
                Some(_) => return self.promised(epoch, incarnation),
                None => {}
            }
        }
        // An earlier start answered this promise, and so waited for the leases of lower epochs, if it was told how those ended.
        let again = epoch == self.fence && self.session.is_none() && self.promising.is_none();
        let ends = self.open_store().ends();
        let leases_over = again && (epoch.0 <= 1 || end_of(&ends, Epoch(epoch.0 - 1)).is_some());
        self.fence = epoch;
        self.session = None;
        self.settling = false;
        self.queue.clear();
        self.flush = None;
        let pending = self.promising.is_some_and(|promising| !promising.durable);
        let durable = self.open_store().promised() >= epoch;
        self.promising = Some(Promising {
            epoch,
            incarnation,
            row,
            durable,
            leases_over,
        });
        // One that is on its way is followed by this one when it ends.
        if !durable && !pending {
            self.open_store().promise(epoch, row);
        }
        self.answer_promise();
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
        self.session = Some(Session {
            epoch: promising.epoch,
            incarnation: promising.incarnation,
            active: false,
        });
        self.promised(promising.epoch, promising.incarnation);
    }

    fn promised(&mut self, epoch: Epoch, incarnation: Incarnation) {
        let last = self.complete();
        let store = self.open_store();
        let (ends, agreed) = (store.ends(), store.agreed());
        self.reply(epoch, incarnation, Reply::Promised { last, ends, agreed });
    }

    /// Every write up to here is here, if this replica is in sync. What was copied in when an epoch began is not in the
    /// stream, and the end that was settled then says that it is there.
    fn complete(&self) -> Version {
        let store = self.store.as_ref().expect("it is open");
        let settled = store
            .ends()
            .into_iter()
            .filter(|end| end.end > Seq(0))
            .map(|end| Version {
                epoch: end.last,
                seq: end.end,
            });
        settled.chain([store.last().1]).max().unwrap_or_default()
    }

    fn settle(&mut self, ends: &[EpochEnd]) {
        if self.settling {
            return;
        }
        if self.mutants.has(Mutant::EndNotSettled) {
            return self.settled();
        }
        let store = self.store.as_mut().expect("it is open");
        if store.is_behind(ends) {
            // What it has and nobody else: it is as if it had never been written.
            self.out.push_back(ReplicaOutput::Reopen(ends.to_vec()));
            return;
        }
        self.settling = true;
        store.settle(ends);
    }

    fn settled(&mut self) {
        if let Some(session) = &mut self.session {
            session.active = true;
            let (epoch, incarnation) = (session.epoch, session.incarnation);
            self.reply(epoch, incarnation, Reply::Settled);
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
        (of(handed).max(queued), of(written))
    }

    fn join(&mut self, base: Seq) {
        let (handed, _) = self.stream();
        // An old one that comes late changes nothing: bases only grow.
        if base > handed {
            self.open_store().join(base);
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
        while let Some(batch) = self.queue.front() {
            if store.room(batch) != Room::Ready {
                return;
            }
            let batch = self.queue.pop_front().expect("it is there");
            store.append(batch);
        }
    }

    fn reply_session(&mut self, reply: Reply) {
        if let Some(session) = self.session {
            self.reply(session.epoch, session.incarnation, reply);
        }
    }

    fn written(&mut self) {
        let (_, upto) = self.stream();
        self.reply_session(Reply::Written { upto });
        self.answer_flush();
    }

    fn answer_flush(&mut self) {
        let (_, written) = self.stream();
        let (Some(upto), Some(store)) = (self.flush, &mut self.store) else {
            return;
        };
        // In an epoch without writes there may still be copies.
        let stream_durable = upto.seq == Seq(0) || store.durable() >= upto;
        if stream_durable && store.copies_durable() {
            let upto = upto.max(store.durable());
            self.flush = None;
            self.reply_session(Reply::Flushed { upto });
        } else if written >= upto.seq {
            store.sync();
        }
    }

    fn happened(&mut self, event: ReplicaEvent) {
        match event {
            ReplicaEvent::Promised(epoch) => {
                let Some(promising) = &mut self.promising else { return };
                if epoch >= promising.epoch {
                    promising.durable = true;
                } else {
                    let (epoch, row) = (promising.epoch, promising.row);
                    self.open_store().promise(epoch, row);
                }
                self.answer_promise();
            }
            ReplicaEvent::Settled => {
                if std::mem::take(&mut self.settling) {
                    self.settled();
                }
            }
            ReplicaEvent::Written(_) => self.written(),
            ReplicaEvent::Durable(_) => self.answer_flush(),
            ReplicaEvent::Read(token, found) => {
                self.answer(token, |id| Reply::Blocks { id, found });
            }
            ReplicaEvent::Rows(token, found) => self.answer(token, |id| Reply::Rows { id, found }),
            ReplicaEvent::Copied(token, done) => self.answer(token, |id| Reply::Copied { id, done }),
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
        if asked.epoch == self.fence {
            self.reply(asked.epoch, asked.incarnation, reply(asked.id));
        }
    }
}

/// Where an epoch ended, if that is known.
pub(super) fn end_of(ends: &[EpochEnd], epoch: Epoch) -> Option<Seq> {
    let row = ends.iter().find(|row| (row.first..=row.last).contains(&epoch));
    row.map(|row| row.end)
}
