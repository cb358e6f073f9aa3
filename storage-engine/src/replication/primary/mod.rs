//! The one that serves a volume: it orders the writes, has them on all copies, and decides who counts as one.
//!
//! ```text
//! Claiming ──► Promising ──► Trimming ──► Equalising ──► Settling ──► Serving ──► Releasing ──► Released
//!   epoch+1     all that are   nobody has    all have       where the    │
//!   by CAS      in sync, or    more than     the longest    old epochs   ├─ a member is late: drop it by CAS, go on without it
//!               dropped (CAS)  the longest   log            ended        └─ a replica is out: bring it up to date, let it join
//! ```
//!
//! From any state it is [`Phase::Deposed`] for good when somebody else has claimed an epoch. What always holds:
//! - A write is completed only when every replica that any configuration which may be the current one names as in sync
//!   has it (I4), so a member that missed it was recorded as out before (I6).
//! - A flush is answered only when all of them have everything that was completed before on stable storage (I5).
//! - A read is answered only when what it found is completed, and when after reading every member was still bound (I12).
//! - A change of the configuration whose outcome is unknown is repeated until it is known. It is never given up.

mod compare;
mod copier;
mod lag;
mod leave;
mod links;
mod look;
mod making;
mod member;
mod mend;
mod reads;
mod stream;
mod sync;
mod takeover;
#[cfg(test)]
mod tests;
mod waits;

use std::collections::{BTreeMap, VecDeque};
use std::sync::Arc;

use super::message::{Ask, Batch, FromReplica, Refusal, Reply, Stored, ToReplica};
use super::mutant::{Mutant, Mutants};
use super::timing::BEAT_MS;
use super::{Change, Concern, Config, Incarnation, ReplicaId, Stamp, Zones};
use crate::seal::KeyRow;
use crate::types::{Epoch, Seq, Version};
use compare::Comparison;
use copier::Copier;
pub use lag::Lag;
use look::Look;
pub use making::Decision;
use making::Making;
use member::{Member, Standing};
use mend::Mends;
use reads::Reads;
use sync::Sync;

/// What a primary is started with.
#[derive(Clone, Debug)]
pub struct PrimaryOptions {
    /// Whose.
    pub volume: [u8; 16],
    /// This start.
    pub incarnation: Incarnation,
    /// With so many in sync nobody else is brought up to date: one that was lost and comes back beside the one that was made
    /// in its place is for whoever made that to give up.
    pub replicas: usize,
    /// What must be true of a write before it is answered.
    pub concern: Concern,
    /// Reads go there while it is in sync: the copy on the own node.
    pub prefer: Option<ReplicaId>,
    /// Of a sealed volume: the salt of the epoch.
    pub row: Option<KeyRow>,
    /// Mistakes to be found.
    pub mutants: Mutants,
}

/// What a primary wants done.
#[derive(Debug)]
pub enum PrimaryOutput {
    /// Tell a replica. It may be lost.
    Send(ReplicaId, ToReplica),
    /// Write this configuration if the object is still as it was; ends as [`Primary::decided`].
    Propose { expected: Stamp, config: Config },
    /// Read the configuration, not from a cache; ends as [`Primary::config_read`].
    ReadConfig,
}

/// What a primary tells its volume.
#[derive(Clone, Debug)]
pub enum PrimaryEvent {
    /// It serves, from this write on.
    Serving(Epoch),
    /// Every write up to this one is completed.
    Written(Seq),
    /// Every write up to this one survives whatever the volume is to survive.
    Durable(Version),
    /// A read that was asked for with this token.
    Read(u64, Result<Vec<Stored>, String>),
    /// A comparison of the copies ended: in so many ranges of blocks a member had something older than another one, and was
    /// given that. None: it was broken off.
    Compared(Option<u64>),
    /// This replica alone has this write, and cannot read it: it and what came later are no part of the volume. A flush
    /// covered none of it.
    GivenUp(ReplicaId, Version),
    /// It ended in order.
    Released,
    /// Somebody else serves the volume, or nobody may: why. Nothing is completed any more.
    Deposed(String),
}

/// How far it is.
#[derive(Debug)]
enum Phase {
    Claiming,
    /// Members are waited for since then.
    Promising(u64),
    /// Members cut off what is behind the end.
    Trimming(Version),
    /// Members are given what they lack.
    Equalising(Vec<Copier>),
    Settling,
    Serving,
    Releasing,
    Released,
    Deposed,
}

/// See the module.
#[derive(Debug)]
pub struct Primary {
    options: PrimaryOptions,
    now_ms: u64,
    stamp: Stamp,
    config: Config,
    making: Option<Making>,
    /// Somebody else may have changed the configuration.
    look: Option<Look>,
    phase: Phase,
    /// Attempts to begin the epoch.
    round: u64,
    members: BTreeMap<ReplicaId, Member>,
    /// Where replicas stand, as far as anybody told.
    zones: Zones,
    /// Where epochs ended, as far as anybody told.
    ends: BTreeMap<Epoch, Seq>,
    /// From which write on a member's log is of no use to the others, because they lack that one and it cannot read it.
    unreadable: BTreeMap<ReplicaId, Version>,
    /// The same of logs that were cut off there.
    given_up: BTreeMap<ReplicaId, Version>,
    /// Everything up to here is on stable storage of all that are in sync.
    agreed: Version,
    /// The last write that was taken.
    assigned: Seq,
    /// The last one that was completed.
    written: Seq,
    /// What may have to be sent again, in order.
    replay: VecDeque<Arc<Batch>>,
    replay_bytes: u64,
    /// Everything up to here is to be durable.
    flush_to: Version,
    /// A replica's checkpoint waits for this to be.
    wanted: Version,
    last_write_ms: u64,
    /// When the guest had a request last.
    guest_ms: u64,
    /// When a request was completed last, or none waited.
    moved_ms: u64,
    reads: Reads,
    mends: Mends,
    sync: Option<Sync>,
    comparison: Option<Comparison>,
    compare_wanted: bool,
    /// Who is to leave when there is another in its place.
    leaving: Option<ReplicaId>,
    /// It ends in order, when everything is durable.
    closing: bool,
    /// Not before that is the next one brought up to date.
    sync_again_ms: BTreeMap<ReplicaId, u64>,
    next_id: u64,
    out: VecDeque<PrimaryOutput>,
    events: VecDeque<PrimaryEvent>,
}

impl Primary {
    /// Claims the epoch after that of `config`, which was read with `stamp`; or, if the same incarnation has claimed the
    /// epoch of `config` already, begins that one.
    pub fn new(options: PrimaryOptions, stamp: Stamp, config: Config, now_ms: u64) -> Primary {
        let claim = Change::Claim(options.incarnation);
        let mut primary = Primary {
            options,
            now_ms,
            stamp,
            config,
            making: None,
            look: None,
            phase: Phase::Claiming,
            round: 1,
            members: BTreeMap::new(),
            zones: Zones::new(),
            ends: BTreeMap::new(),
            unreadable: BTreeMap::new(),
            given_up: BTreeMap::new(),
            agreed: Version::default(),
            assigned: Seq(0),
            written: Seq(0),
            replay: VecDeque::new(),
            replay_bytes: 0,
            flush_to: Version::default(),
            wanted: Version::default(),
            last_write_ms: now_ms,
            guest_ms: 0,
            moved_ms: now_ms,
            reads: Reads::default(),
            mends: Mends::default(),
            sync: None,
            comparison: None,
            compare_wanted: false,
            leaving: None,
            closing: false,
            sync_again_ms: BTreeMap::new(),
            next_id: 0,
            out: VecDeque::new(),
            events: VecDeque::new(),
        };
        if primary.config.has(&claim) {
            primary.claimed();
            // Since it was claimed for us somebody may have added a replica.
            primary.look();
        } else {
            primary.make(claim);
        }
        primary
    }

    /// The epoch it serves, once it serves.
    pub fn epoch(&self) -> Epoch {
        self.config.epoch
    }

    /// The configuration as it was last known for sure.
    pub fn config(&self) -> &Config {
        &self.config
    }

    /// Tells where replicas stand.
    pub fn stand(&mut self, zones: Zones) {
        self.zones = zones;
    }

    /// True while requests are taken.
    pub fn is_serving(&self) -> bool {
        matches!(self.phase, Phase::Serving)
    }

    /// True when nothing will be completed any more.
    pub fn is_over(&self) -> bool {
        matches!(self.phase, Phase::Deposed | Phase::Released)
    }

    /// The next thing to do.
    pub fn poll(&mut self) -> Option<PrimaryOutput> {
        self.out.pop_front()
    }

    /// The next thing to tell the volume.
    pub fn poll_event(&mut self) -> Option<PrimaryEvent> {
        self.events.pop_front()
    }

    /// Tells the time: milliseconds of a clock that goes on while the machine sleeps.
    pub fn tick(&mut self, now_ms: u64) {
        self.now_ms = now_ms;
        self.make_again();
        self.go_on();
    }

    /// When to tell it next: soon while anything is under way, and otherwise when the next beat is due.
    pub fn next_tick_ms(&self) -> Option<u64> {
        if self.is_over() {
            return None;
        }
        let comparing = self.comparison.as_ref().map(|comparison| &comparison.copier);
        let copier = self.sync.as_ref().and_then(Sync::copier).or(comparing);
        let rested = copier.and_then(Copier::rests_until_ms);
        let soon = rested
            .filter(|at| *at > self.now_ms)
            .unwrap_or(u64::MAX)
            .min(self.now_ms + TICK_MS);
        let beats = self.members.values().map(|member| member.beat_ms + BEAT_MS);
        Some(if self.is_quiet() {
            beats.fold(u64::MAX, u64::min).max(soon)
        } else {
            soon
        })
    }

    /// True if it waits for nothing but the next request.
    fn is_quiet(&self) -> bool {
        let changes = !self.may_change() || self.sync.is_some() || self.closing || self.is_comparing();
        let written = self.version(self.written);
        let unflushed = self.written < self.assigned || self.written > Seq(0) && self.agreed < written;
        let missing = !self.config.out.is_empty() || self.members.len() > self.config.in_sync.len();
        let idle = |id: &ReplicaId| {
            self.members
                .get(id)
                .is_some_and(|member| member.streams() && member.owes_nothing())
        };
        self.is_serving()
            && !(changes || unflushed || missing || self.flush_to > self.agreed)
            && self.no_reads()
            && !self.members.is_empty()
            && self.config.in_sync.iter().all(idle)
    }

    /// Whatever has become possible.
    fn go_on(&mut self) {
        self.look_when_free();
        match self.phase {
            Phase::Claiming | Phase::Released | Phase::Deposed => {}
            Phase::Promising(_) => self.gather(),
            Phase::Trimming(_) => self.trim(),
            Phase::Equalising(_) => self.equalise(),
            Phase::Settling => self.settle(),
            Phase::Serving => {
                self.drop_late();
                self.let_leave();
                self.bring_up_to_date();
                self.run_comparison();
                self.keep_in_touch();
                self.complete();
                self.flush();
                self.serve_reads();
                self.release_when_idle();
                self.note_standstill();
            }
            Phase::Releasing => {}
        }
    }

    fn deposed(&mut self, why: String) {
        if self.is_over() {
            return;
        }
        self.phase = Phase::Deposed;
        self.making = None;
        self.look = None;
        (self.sync, self.comparison) = (None, None);
        self.replay.clear();
        self.reads = Reads::default();
        self.events.push_back(PrimaryEvent::Deposed(why));
    }

    fn ask(&mut self, replica: ReplicaId, ask: Ask) {
        let boot = self.members.get(&replica).and_then(|member| member.boot);
        let message = ToReplica {
            volume: self.options.volume,
            round: self.round,
            boot: boot.unwrap_or(0),
            replica,
            epoch: self.config.epoch,
            incarnation: self.options.incarnation,
            ask,
        };
        self.out.push_back(PrimaryOutput::Send(replica, message));
    }

    fn id(&mut self) -> u64 {
        self.next_id += 1;
        self.next_id
    }

    fn mutant(&self, mutant: Mutant) -> bool {
        self.options.mutants.has(mutant)
    }

    /// Takes an answer.
    pub fn received(&mut self, message: FromReplica) {
        let mine = (message.volume, message.epoch, message.round)
            == (self.options.volume, self.config.epoch, self.round)
            && message.incarnation == self.options.incarnation;
        if !mine || self.is_over() || matches!(self.phase, Phase::Claiming) {
            return;
        }
        let id = message.replica;
        let Some(member) = self.members.get_mut(&id) else {
            return;
        };
        if let Reply::Refused { promised, why } = message.reply {
            return self.refused(id, promised, why);
        }
        // What another start of it answers says nothing about this one.
        let other = member.boot != Some(message.boot) && !self.options.mutants.has(Mutant::BootIgnored);
        if other && !matches!(message.reply, Reply::Promising | Reply::Promised { .. }) {
            return;
        }
        match message.reply {
            Reply::Promising => self.promising(id),
            Reply::Promised { last, ends, agreed } => self.promised(id, message.boot, last, &ends, agreed),
            Reply::Trimmed => self.trimmed(id),
            Reply::Settled => self.settled(id),
            Reply::Written { upto } => self.acked(id, upto),
            Reply::Gap { last } => self.gap(id, last),
            Reply::Flushed { upto, id: order } => self.flushed(id, upto, order),
            Reply::Beaten { sent_ms } => self.beaten(id, sent_ms),
            Reply::Blocks { id: read, found } => self.blocks(id, read, found),
            Reply::Rows { id: list, found } => self.rows(id, list, found),
            Reply::Copied { id: copy, done } => self.copied(id, copy, done),
            Reply::Damaged { blocks } => self.damaged(id, &blocks),
            Reply::Wants { durable } => self.wanted = self.wanted.max(durable),
            Reply::Failed { why } => self.failed(id, why),
            Reply::Refused { .. } => unreachable!("it was taken care of"),
        }
        self.go_on();
    }

    fn refused(&mut self, id: ReplicaId, promised: Epoch, why: Refusal) {
        match why {
            Refusal::Fenced => {
                if self.mutant(Mutant::NeverDeposed) {
                    return;
                }
                // Only a claim makes anybody ask for a promise, so there was one, whatever the object says now.
                self.deposed(format!(
                    "{id:?} has promised epoch {} and refuses epoch {}",
                    promised.0, self.config.epoch.0
                ));
            }
            Refusal::OtherIncarnation => self.deposed(format!(
                "I3: {id:?} has promised epoch {} to another incarnation",
                promised.0
            )),
            Refusal::NoSession => {
                if let Some(member) = self.members.get_mut(&id)
                    && member.standing != Standing::Asked
                {
                    member.lost_session(self.now_ms);
                    self.sync_lost(id);
                    self.members_changed();
                }
            }
            Refusal::Stranger | Refusal::Diverged => self.failed(id, format!("it refuses: {why:?}")),
        }
        self.go_on();
    }

    /// A member's store takes no more writes.
    fn failed(&mut self, id: ReplicaId, why: String) {
        if let Some(member) = self.members.get_mut(&id) {
            member.failed = Some(why);
        }
        self.sync_lost(id);
    }
}

/// How often it looks at the time while something is under way.
const TICK_MS: u64 = 50;
