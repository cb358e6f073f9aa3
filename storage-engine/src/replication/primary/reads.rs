//! Reading from one of the copies.
//!
//! Any replica that has every completed write will do. What it has beyond that is not completed, and must not be seen
//! before it is: whoever reads next may be sent to another replica. So an answer waits until the writes that it saw are
//! completed; and until every member is known to have been bound to this epoch at a time after the read, because then
//! nobody else had begun to write.

use std::collections::{BTreeMap, BTreeSet};

use super::super::ReplicaId;
use super::super::message::{Ask, Stored};
use super::super::mutant::Mutant;
use super::super::timing::{ASK_AGAIN_MS, BEAT_MS};
use super::member::Member;
use super::{Primary, PrimaryEvent};
use crate::types::{Lba, Seq};

/// A read of the guest, or one that is to mend something.
#[derive(Debug)]
pub(super) struct Read {
    /// Whose it is; none: nobody waits for it.
    token: Option<u64>,
    lba: Lba,
    blocks: u64,
    source: Option<ReplicaId>,
    asked_ms: u64,
    /// Blocks that are read by themselves, because one among them is damaged somewhere, and where each is. The rest was
    /// found.
    apart: BTreeMap<Lba, BTreeSet<ReplicaId>>,
    found: Vec<Stored>,
    done: bool,
}

impl Read {
    fn new(token: Option<u64>, lba: Lba, blocks: u64) -> Read {
        Read {
            token,
            lba,
            blocks,
            source: None,
            asked_ms: 0,
            apart: BTreeMap::new(),
            found: Vec::new(),
            done: false,
        }
    }

    /// Of a block that is damaged there.
    pub fn to_mend(lba: Lba, damaged_at: ReplicaId) -> Read {
        let apart = [(lba, BTreeSet::from([damaged_at]))].into();
        Read {
            apart,
            ..Read::new(None, lba, 1)
        }
    }

    /// What is to be asked for next: everything, or the first of the blocks that were damaged elsewhere.
    fn wanted(&self) -> (Lba, u64) {
        match self.apart.first_key_value() {
            Some((lba, _)) => (*lba, 1),
            None => (self.lba, self.blocks),
        }
    }

    /// Replicas that do not have what is wanted.
    fn not_at(&self) -> Option<&BTreeSet<ReplicaId>> {
        self.apart.first_key_value().map(|(_, at)| at)
    }
}

/// Those under way, by the number of the message that asks.
#[derive(Debug, Default)]
pub(super) struct Reads {
    pub waiting: Vec<Read>,
    asked: BTreeMap<u64, Read>,
    turn: usize,
}

impl Primary {
    /// Reads blocks in their stored form; told by [`PrimaryEvent::Read`] with `token`.
    pub fn read(&mut self, token: u64, lba: Lba, blocks: u64) {
        self.guest_ms = self.now_ms;
        self.reads.waiting.push(Read::new(Some(token), lba, blocks));
        if self.is_serving() {
            self.serve_reads();
        }
    }

    /// A replica with every completed write that has not failed this read.
    fn source_for(&mut self, read: &Read) -> Option<ReplicaId> {
        let written = self.written;
        let fit = |member: &Member| member.streams() && member.acked >= written && member.failed.is_none();
        let syncing = self.mutant(Mutant::ReadFromSyncing);
        let sources: Vec<ReplicaId> = self
            .members
            .iter()
            .filter(|(id, member)| {
                let may = self.config.in_sync.contains(*id) || syncing;
                let damaged = read.not_at().is_some_and(|at| at.contains(*id));
                may && (fit(member) || syncing && member.streams()) && !damaged
            })
            .map(|(id, _)| *id)
            .collect();
        let preferred = self
            .options
            .prefer
            .filter(|id| sources.contains(id) && Some(*id) != read.source);
        self.reads.turn = self.reads.turn.wrapping_add(1);
        preferred.or_else(|| sources.get(self.reads.turn % sources.len().max(1)).copied())
    }

    /// Reads that were asked of this one are asked again, of another one if there is one.
    pub(super) fn reads_lost(&mut self, source: ReplicaId) {
        let lost = |read: &Read| !read.done && read.source == Some(source);
        let asked = std::mem::take(&mut self.reads.asked);
        let (lost, asked): (Vec<_>, Vec<_>) = asked.into_iter().partition(|(_, read)| lost(read));
        self.reads.asked.extend(asked);
        self.reads.waiting.extend(lost.into_iter().map(|(_, read)| read));
    }

    /// True if nobody waits for a read.
    pub(super) fn no_reads(&self) -> bool {
        let mut reads = self.reads.waiting.iter().chain(self.reads.asked.values());
        reads.all(|read| read.token.is_none())
    }

    /// True if nobody can have begun to serve a later epoch: every member still keeps its word to us.
    pub(super) fn is_bound(&self) -> bool {
        let bound = |id| {
            self.members
                .get(&id)
                .is_some_and(|member| self.now_ms < member.lease_until_ms)
        };
        self.ack_set().all(bound)
    }

    pub(super) fn serve_reads(&mut self) {
        let late = self.now_ms.saturating_sub(ASK_AGAIN_MS);
        let slow: Vec<u64> = self
            .reads
            .asked
            .iter()
            .filter(|(_, read)| read.asked_ms <= late && !read.done)
            .map(|(id, _)| *id)
            .collect();
        for id in slow {
            let read = self.reads.asked.remove(&id).expect("it was just listed");
            self.reads.waiting.push(read);
        }
        for mut read in std::mem::take(&mut self.reads.waiting) {
            if let Some(at) = read.not_at()
                && self.config.in_sync.is_subset(at)
            {
                let text = format!("no copy of block {} passes its check", read.wanted().0.0);
                if let Some(token) = read.token {
                    self.events.push_back(PrimaryEvent::Read(token, Err(text)));
                }
                continue;
            }
            let Some(source) = self.source_for(&read) else {
                self.reads.waiting.push(read);
                continue;
            };
            read.source = Some(source);
            read.asked_ms = self.now_ms;
            let id = self.id();
            let (lba, blocks) = read.wanted();
            self.ask(source, Ask::Read { id, lba, blocks });
            self.reads.asked.insert(id, read);
        }
        self.answer_reads();
    }

    pub(super) fn blocks(&mut self, from: ReplicaId, id: u64, found: Result<Vec<Stored>, String>) {
        if self.copier_read(from, id, &found) {
            return;
        }
        if self.reads.asked.get(&id).is_none_or(|read| read.done) {
            return; // an answer comes twice
        }
        let mut read = self.reads.asked.remove(&id).expect("it was just looked at");
        let (first, blocks) = read.wanted();
        let Ok(found) = found else {
            // One that is damaged fails all that it is read with: from now on each is read by itself.
            for lba in (first.0..first.0 + blocks).map(Lba) {
                let damaged_at = read.apart.entry(lba).or_default();
                if blocks == 1 {
                    damaged_at.insert(from);
                }
            }
            self.reads.waiting.push(read);
            return;
        };
        for stored in found {
            if let Some(damaged_at) = read.apart.remove(&stored.start()) {
                self.mend(&stored, damaged_at);
            }
            read.found.push(stored);
        }
        if read.apart.is_empty() {
            read.found.sort_by_key(Stored::start);
            read.done = true;
            self.reads.asked.insert(id, read);
        } else {
            self.reads.waiting.push(read);
        }
    }

    /// Answers what may be answered.
    fn answer_reads(&mut self) {
        let bound = self.is_bound();
        let (unbound, beside) = (
            self.mutant(Mutant::LeaseNotLookedAt),
            self.mutant(Mutant::ReadBesideWrite),
        );
        let (epoch, written) = (self.config.epoch, self.written);
        let completed = |stored: &Stored| {
            let version = stored.version();
            beside || version.epoch < epoch || version.seq <= written
        };
        let ready: Vec<u64> = self
            .reads
            .asked
            .iter()
            .filter(|(_, read)| read.done && read.found.iter().all(completed) && (bound || unbound))
            .map(|(id, _)| *id)
            .collect();
        for id in ready {
            let read = self.reads.asked.remove(&id).expect("it was just listed");
            if let Some(token) = read.token {
                self.events.push_back(PrimaryEvent::Read(token, Ok(read.found)));
            }
            self.moved_ms = self.now_ms;
        }
        if !bound && !self.reads.asked.is_empty() {
            self.renew_leases();
        }
    }

    /// Asks for leases that ran out at once, and not with the next beat.
    pub(super) fn renew_leases(&mut self) {
        for member in self.members.values_mut() {
            if member.lease_until_ms <= self.now_ms && self.now_ms >= member.beat_ms + BEAT_MS / 10 {
                member.beat_ms = 0;
            }
        }
    }

    /// The highest write of this epoch; for tests.
    pub fn written(&self) -> Seq {
        self.written
    }
}
