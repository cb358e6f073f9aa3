//! The stream of writes: to all members in one order, completed when all have them, flushed when all did.

use std::collections::BTreeSet;
use std::sync::Arc;

use super::super::limits::{REPLAY_BYTES_MAX, REPLAY_FLUSH_BYTES, REPLAY_RECORDS_MAX};
use super::super::message::{Ask, Batch};
use super::super::mutant::Mutant;
use super::super::timing::{ASK_AGAIN_MS, BEAT_MS, FLUSH_IDLE_MS, LEASE_MS};
use super::super::{Change, Copies, ReplicaId};
use super::member::{Member, Standing};
use super::{Phase, Primary, PrimaryEvent};
use crate::types::{Seq, Version};

/// Records that may be on their way to one member.
const WINDOW_RECORDS: usize = 16;

/// What is missing is sent again so long after it was, if the member still lacks it: a round on a slow line.
const GAP_AGAIN_MS: u64 = 100;

impl Primary {
    /// The last write that was taken: the next record begins behind it.
    pub fn assigned(&self) -> Seq {
        self.assigned
    }

    /// Everything up to here is on stable storage of all that are in sync.
    pub fn durable(&self) -> Version {
        self.agreed
    }

    /// True if a record may come. Otherwise after the next event.
    pub fn has_room(&self) -> bool {
        self.is_serving() && self.replay.len() < 2 * REPLAY_RECORDS_MAX && self.replay_bytes < REPLAY_BYTES_MAX
    }

    /// Takes the next record of the epoch. Its payload must not change any more, and is kept until it is durable.
    pub fn append(&mut self, batch: Batch) {
        assert!(self.is_serving(), "writes are taken while serving");
        assert_eq!(batch.first_seq, self.assigned.next(), "I10: the stream has no gap");
        self.assigned = batch.last_seq();
        self.last_write_ms = self.now_ms;
        self.guest_ms = self.now_ms;
        self.replay_bytes += batch.payload_bytes();
        self.replay.push_back(Arc::new(batch));
        for id in self.streaming() {
            self.pump(id);
        }
        if self.replay.len() > REPLAY_RECORDS_MAX || self.replay_bytes > REPLAY_FLUSH_BYTES {
            self.flush_now();
        }
    }

    /// Makes everything that was completed until now durable; told by [`PrimaryEvent::Durable`].
    pub fn sync(&mut self) {
        self.flush_now();
        self.flush();
    }

    fn flush_now(&mut self) {
        let written = self.version(self.written);
        self.flush_to = self.flush_to.max(written);
    }

    pub(super) fn version(&self, seq: Seq) -> Version {
        let epoch = self.config.epoch;
        Version { epoch, seq }
    }

    pub(super) fn streaming(&self) -> Vec<ReplicaId> {
        let streaming = self.members.iter().filter(|(_, member)| member.streams());
        streaming.map(|(id, _)| *id).collect()
    }

    /// Records go to this member from now on, behind what it has.
    pub(super) fn stream_to(&mut self, id: ReplicaId) {
        let Some(member) = self.members.get_mut(&id) else {
            return;
        };
        member.standing = Standing::Streaming;
        (member.sent, member.base) = (member.acked, Seq(0));
        (member.owes_write_ms, member.owes_flush_ms, member.owes_beat_ms) = (None, None, None);
        (member.flush_asked, member.gap) = (Version::default(), None);
        member.beat_ms = 0;
        self.pump(id);
    }

    /// Sends what it may have by now.
    pub(super) fn pump(&mut self, id: ReplicaId) {
        let ready = |member: &&mut Member| member.streams() && member.acked >= member.base;
        let Some(member) = self.members.get_mut(&id).filter(ready) else {
            return;
        };
        // Records have their numbers in order.
        let from = self.replay.partition_point(|batch| batch.first_seq <= member.sent);
        let out = from - self.replay.partition_point(|batch| batch.last_seq() <= member.acked);
        let room = WINDOW_RECORDS.saturating_sub(out);
        let batches: Vec<Arc<Batch>> = self.replay.range(from..).take(room).cloned().collect();
        if let Some(last) = batches.last() {
            member.sent = last.last_seq();
            member.owes_write_ms.get_or_insert(self.now_ms);
            member.asked_ms = self.now_ms;
        }
        for batch in batches {
            self.ask(id, Ask::Write(batch));
        }
    }

    pub(super) fn acked(&mut self, id: ReplicaId, upto: Seq) {
        let (now_ms, assigned) = (self.now_ms, self.assigned);
        let member = self.members.get_mut(&id).expect("an answer is taken from members");
        if !member.streams() {
            return;
        }
        member.has_stream = true;
        assert!(upto <= assigned, "I10: {id:?} has write {upto:?} of {assigned:?}");
        if upto > member.acked {
            member.acked = upto;
            // What is behind is on its way, and not lost.
            member.asked_ms = now_ms;
            member.sent = member.sent.max(upto);
            member.owes_write_ms = (member.acked < member.sent).then_some(now_ms);
        }
        self.pump(id);
    }

    /// A record was lost on its way: everything behind what it has is sent again. Once, and not for each of the records
    /// that came in its place: what is sent for each of them would bring as many answers, and so on.
    pub(super) fn gap(&mut self, id: ReplicaId, last: Seq) {
        let now_ms = self.now_ms;
        let member = self.members.get_mut(&id).expect("an answer is taken from members");
        let sent_again = member.gap == Some(last) && now_ms < member.gap_ms + GAP_AGAIN_MS;
        if member.streams() && last < member.sent && last >= member.acked.max(member.base) && !sent_again {
            (member.gap, member.gap_ms) = (Some(last), now_ms);
            member.sent = last;
            self.pump(id);
        }
    }

    /// Asks for what was not answered once more, and for leases.
    pub(super) fn keep_in_touch(&mut self) {
        self.ask_again();
        // A member that was started again while it joined.
        for id in self.config.in_sync.clone() {
            let standing = self.members.get(&id).map(|member| member.standing);
            match standing {
                Some(Standing::Promised) => self.ask_to_settle(id, true),
                Some(Standing::Settled) => self.stream_to(id),
                _ => {}
            }
        }
        let (now_ms, durable) = (self.now_ms, self.agreed);
        for id in self.streaming() {
            let member = self.members.get_mut(&id).expect("it streams");
            if member.acked < member.sent && member.acked >= member.base && now_ms >= member.asked_ms + ASK_AGAIN_MS {
                member.sent = member.acked;
                self.pump(id);
            }
            let member = self.members.get_mut(&id).expect("it streams");
            if now_ms >= member.beat_ms + BEAT_MS {
                member.beat_ms = now_ms;
                member.owes_beat_ms.get_or_insert(now_ms);
                self.ask(
                    id,
                    Ask::Beat {
                        sent_ms: now_ms,
                        durable,
                    },
                );
            }
        }
        let unflushed = self.written > Seq(0) && self.version(self.written) > self.agreed;
        if unflushed && now_ms >= self.last_write_ms + FLUSH_IDLE_MS {
            self.flush_now();
        }
    }

    pub(super) fn beaten(&mut self, id: ReplicaId, sent_ms: u64) {
        let now_ms = self.now_ms;
        let late = self.mutant(Mutant::LeaseFromAnswer);
        let member = self.members.get_mut(&id).expect("an answer is taken from members");
        if !member.streams() {
            return;
        }
        // From when it was sent: the member granted it later than that.
        let from_ms = if late { now_ms } else { sent_ms };
        member.lease_until_ms = member.lease_until_ms.max(from_ms + LEASE_MS);
        if sent_ms >= member.owes_beat_ms.unwrap_or(u64::MAX) {
            member.owes_beat_ms = None;
        }
    }

    /// Completes what all that count have.
    pub(super) fn complete(&mut self) {
        if !self.is_serving() {
            return;
        }
        let early = self.mutant(Mutant::CompleteBeforeRecord);
        let lacks = self.options.concern.lacks(&self.config.in_sync, &self.zones);
        if lacks.is_some() && !self.mutant(Mutant::BelowMinimum) {
            return;
        }
        let acked = |id: ReplicaId| self.members.get(&id).map_or(Seq(0), |member| member.acked);
        let written = match self.options.concern.copies {
            Copies::All => {
                let late = |id: &ReplicaId| self.members.get(id).is_none_or(|member| member.is_late(self.now_ms));
                let count = self.ack_set().filter(|id| !(early && late(id)));
                count.map(acked).min()
            }
            Copies::First => self.config.in_sync.iter().copied().map(acked).max(),
        };
        let Some(written) = written.filter(|written| *written > self.written) else {
            return;
        };
        // With all copies a successor's promise is enough to stop us: one of them refuses. The first copy alone would go
        // on for ever.
        let alone = self.options.concern.copies == Copies::First && !self.mutant(Mutant::FirstUnbound);
        if alone && !self.is_bound() {
            self.renew_leases();
            return;
        }
        self.written = written;
        self.moved_ms = self.now_ms;
        self.events.push_back(PrimaryEvent::Written(written));
        if self.mutant(Mutant::ReplayForgotten) {
            let upto = self.version(written);
            self.forget(upto);
        }
    }

    /// Has what is to be durable flushed by those that did not yet.
    pub(super) fn flush(&mut self) {
        if !self.is_serving() {
            return;
        }
        if self.wanted > self.agreed {
            let upto = self.wanted.min(self.version(self.written));
            self.flush_to = self.flush_to.max(upto);
        }
        let (now_ms, upto, early) = (self.now_ms, self.flush_to, self.mutant(Mutant::FlushTooEarly));
        let mut to_ask = Vec::new();
        for id in self.streaming() {
            let member = self.members.get_mut(&id).expect("it streams");
            let asked = member.flush_asked > member.flushed && now_ms < member.flush_asked_ms + ASK_AGAIN_MS;
            let has = Version {
                epoch: upto.epoch,
                seq: member.acked,
            };
            if member.flushed < upto && has >= upto && !asked && !early {
                member.owes_flush_ms.get_or_insert(now_ms);
                (member.flush_asked, member.flush_asked_ms) = (upto, now_ms);
                to_ask.push(id);
            }
        }
        for id in to_ask {
            self.ask_to_flush(id, upto);
        }
        let flushed = self.ack_set().map(|id| {
            self.members
                .get(&id)
                .map_or(Version::default(), |member| member.flushed)
        });
        let flushed = flushed.min();
        let durable = if early { Some(upto) } else { flushed };
        if let Some(durable) = durable.filter(|durable| *durable > self.agreed) {
            // What is on stable storage everywhere is completed, or will be.
            self.agreed = durable;
            self.moved_ms = now_ms;
            self.events.push_back(PrimaryEvent::Durable(durable));
            self.forget(durable);
            if self.wanted > Version::default() && self.wanted <= durable {
                // Whoever waits for it is told at once.
                self.wanted = Version::default();
                for member in self.members.values_mut().filter(|member| member.streams()) {
                    member.beat_ms = 0;
                }
            }
        }
    }

    /// Gives the number of the order.
    pub(super) fn ask_to_flush(&mut self, replica: ReplicaId, upto: Version) -> u64 {
        let id = self.id();
        self.ask(replica, Ask::Flush { upto, id });
        id
    }

    pub(super) fn flushed(&mut self, id: ReplicaId, upto: Version, order: u64) {
        let member = self.members.get_mut(&id).expect("an answer is taken from members");
        if !member.streams() {
            return;
        }
        member.flushed = member.flushed.max(upto);
        member.flush_done = member.flush_done.max(order);
        // It did what it was asked for. What is wanted by now may be more, and is asked for next.
        if member.flushed >= member.flush_asked {
            member.owes_flush_ms = None;
        }
    }

    /// Lets go of records that nobody will need again.
    fn forget(&mut self, durable: Version) {
        let needed = self.members.values().filter(|member| member.streams());
        let needed = needed
            .map(|member| member.acked.max(member.base))
            .min()
            .unwrap_or(Seq(u64::MAX));
        let forgets = self.mutant(Mutant::ReplayForgotten);
        while let Some(batch) = self.replay.front() {
            let last = batch.last_seq();
            if self.version(last) > durable || (last > needed && !forgets) {
                return;
            }
            self.replay_bytes -= batch.payload_bytes();
            self.replay.pop_front();
        }
    }

    /// Records as out whoever owes an answer for too long, if enough others are left.
    pub(super) fn drop_late(&mut self) {
        let now_ms = self.now_ms;
        if let Some(id) = self.sync.as_ref().map(|sync| sync.id)
            && self.members.get(&id).is_none_or(|member| member.is_late(now_ms))
            && self.making.is_none()
        {
            self.sync_lost(id);
        }
        if !self.may_change() {
            return;
        }
        let gone = self.late();
        if !gone.is_empty() && self.enough_without(&gone) {
            let have = self.agreed;
            self.make(Change::Drop(gone, have));
        }
    }

    /// True if enough members are left without these.
    pub(super) fn enough_without(&self, gone: &BTreeSet<ReplicaId>) -> bool {
        let left: BTreeSet<ReplicaId> = self.config.in_sync.difference(gone).copied().collect();
        if self.mutant(Mutant::BelowMinimum) && self.is_serving() {
            return !left.is_empty();
        }
        self.options.concern.lacks(&left, &self.zones).is_none()
    }

    /// Members that owe an answer for too long.
    pub(super) fn late(&self) -> BTreeSet<ReplicaId> {
        let late = |id: &&ReplicaId| self.members.get(*id).is_none_or(|member| member.is_late(self.now_ms));
        self.config.in_sync.iter().filter(late).copied().collect()
    }

    /// Ends the epoch in order, once everything that was taken is completed: it is flushed, the leases are given back, and
    /// nobody serves.
    pub fn release(&mut self) {
        self.closing = true;
        self.go_on();
    }

    pub(super) fn release_when_idle(&mut self) {
        if !self.closing || !self.may_change() || self.written < self.assigned {
            return;
        }
        self.flush_now();
        if self.written > Seq(0) && self.agreed < self.version(self.written) {
            return;
        }
        self.sync = None;
        self.phase = Phase::Releasing;
        self.make(Change::Release);
    }

    pub(super) fn released(&mut self) {
        for id in self.config.in_sync.clone() {
            self.ask(id, Ask::Release);
        }
        self.phase = Phase::Released;
        self.events.push_back(PrimaryEvent::Released);
    }
}
