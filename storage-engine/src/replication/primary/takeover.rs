//! The beginning of an epoch: all that are in sync promise, are made equal, and learn where the epochs before ended.
//!
//! The set that begins is fixed first: whoever does not answer is recorded as out, and only then is it decided how far
//! the epochs before went: to the longest log among those that answered. Who has more, copied there by a takeover that
//! ended half way, cuts it off; then all get what they lack; then they note the end. Writes that no client was told of may
//! be kept or dropped, but only once, and before anything is read.
//!
//! What only one member has and cannot read ends its log for this purpose: it and what is behind it are dropped.

use std::collections::BTreeSet;

use super::super::message::Ask;
use super::super::mutant::Mutant;
use super::super::timing::{ASK_AGAIN_MS, MEMBER_TIMEOUT_MS, TAKEOVER_MS};
use super::super::{Change, ReplicaId};
use super::copier::{Copier, Progress};
use super::member::{Member, Standing};
use super::{Phase, Primary, PrimaryEvent};
use crate::store::layout::EpochEnd;
use crate::types::{Epoch, Seq, Version};

impl Primary {
    pub(super) fn claimed(&mut self) {
        let now_ms = self.now_ms;
        self.phase = Phase::Promising(now_ms);
        self.members = self
            .config
            .in_sync
            .iter()
            .map(|id| (*id, Member::new(now_ms)))
            .collect();
        for id in self.config.in_sync.clone() {
            self.ask_to_promise(id);
        }
    }

    pub(super) fn ask_to_promise(&mut self, id: ReplicaId) {
        let row = self.options.row;
        if let Some(member) = self.members.get_mut(&id) {
            member.asked_ms = self.now_ms;
            self.ask(id, Ask::Promise { row });
        }
    }

    pub(super) fn ask_to_settle(&mut self, id: ReplicaId, whole: bool) {
        let ends = self.epoch_ends();
        if let Some(member) = self.members.get_mut(&id) {
            member.standing = Standing::Settling;
            member.asked_ms = self.now_ms;
            self.ask(id, Ask::Settle { ends, whole });
        }
    }

    /// Asks whoever owes a step of the beginning once more.
    pub(super) fn ask_again(&mut self) {
        let late = self.now_ms.saturating_sub(ASK_AGAIN_MS);
        let owing: Vec<(ReplicaId, Standing)> = self
            .members
            .iter()
            .filter(|(_, member)| member.asked_ms <= late)
            .map(|(id, member)| (*id, member.standing))
            .collect();
        for (id, standing) in owing {
            match standing {
                Standing::Asked => self.ask_to_promise(id),
                Standing::Trimming => self.ask_to_trim(id),
                Standing::Settling => self.ask_to_settle(id, self.config.in_sync.contains(&id)),
                Standing::Promised | Standing::Trimmed | Standing::Settled | Standing::Streaming => {}
            }
        }
    }

    pub(super) fn promised(&mut self, id: ReplicaId, boot: u64, last: Version, ends: &[EpochEnd], agreed: Version) {
        let (epoch, now_ms) = (self.config.epoch, self.now_ms);
        let (forgets, serving, is_member) = (
            self.mutant(Mutant::ReplayForgotten),
            self.is_serving(),
            self.config.in_sync.contains(&id),
        );
        let written = self.written;
        let global = self.agreed;
        if !serving && is_member {
            self.agreed = self.agreed.max(agreed);
        }
        let member = self.members.get_mut(&id).expect("an answer is taken from members");
        if member.standing != Standing::Asked {
            return;
        }
        member.boot = Some(boot);
        member.standing = Standing::Promised;
        (member.last, member.ends) = (last, ends.to_vec());
        member.owes_session_ms = Some(now_ms);
        if !serving {
            return;
        }
        // It was started again in the middle of the epoch. What it has of the stream counts; the rest is sent again.
        member.acked = if last.epoch == epoch { last.seq } else { Seq(0) };
        if forgets {
            member.acked = member.acked.max(written);
        }
        member.sent = member.acked;
        if is_member && last < global && !forgets {
            member.failed = Some(lost(global, last));
        }
        if is_member {
            self.ask_to_settle(id, true);
        }
    }

    /// Waits for promises; goes on without those that do not come.
    pub(super) fn gather(&mut self) {
        let Phase::Promising(since_ms) = self.phase else { return };
        self.ask_again();
        if !self.may_change() {
            return;
        }
        let now_ms = self.now_ms;
        let member = |id: &&ReplicaId| self.members.get(*id).filter(|member| member.failed.is_none());
        let has_promised = |id: &&ReplicaId| member(id).is_some_and(|member| member.standing == Standing::Promised);
        if self.config.in_sync.iter().all(|id| has_promised(&id)) {
            if self.refuse_rolled_back() {
                return;
            }
            return self.begin_trimming();
        }
        // Whoever is there may have to wait for a lease to run out; whoever is not is not waited for as long.
        let is_there = |id: &&ReplicaId| {
            let heard_ms = member(id).and_then(|member| member.promising_ms);
            let patient = now_ms < since_ms + TAKEOVER_MS;
            has_promised(id) || patient && heard_ms.is_some_and(|heard| now_ms < heard + MEMBER_TIMEOUT_MS)
        };
        let missing = self.config.in_sync.iter().filter(|id| !is_there(id));
        let missing: BTreeSet<ReplicaId> = missing.copied().collect();
        let due = !missing.is_empty() && now_ms >= since_ms + MEMBER_TIMEOUT_MS;
        if due && self.enough_without(&missing) {
            let agreed = self.agreed;
            self.make(Change::Drop(missing, agreed));
        }
    }

    /// A member in sync lacks what all that were in sync had on stable storage: its directory was put back to an older copy,
    /// or its disk lost what it had confirmed. What else it lacks nobody knows, so it does not count until it was brought up
    /// to date. True if there is one.
    fn refuse_rolled_back(&mut self) -> bool {
        let told = self.config.out.values().copied().max().unwrap_or_default();
        let known = self.agreed.max(told);
        let mut any = false;
        if known.seq == Seq(0) {
            return false; // the beginning of an epoch without writes: there is nothing to be lost, and a trim may cut it off
        }
        for id in self.config.in_sync.clone() {
            let member = self.members.get_mut(&id).expect("all have promised");
            if member.last < known {
                member.failed = Some(lost(known, member.last));
                any = true;
            }
        }
        any
    }

    pub(super) fn promising(&mut self, id: ReplicaId) {
        let now_ms = self.now_ms;
        let member = self.members.get_mut(&id).expect("an answer is taken from members");
        member.promising_ms = Some(now_ms);
    }

    /// How far the log of each member goes, as far as it can be read where nobody else has it.
    fn lasts(&self) -> Vec<(ReplicaId, Version)> {
        let last = |id: &ReplicaId| {
            let last = self.members.get(id)?.last;
            let unreadable = self.unreadable.get(id).map(|version| Version {
                seq: Seq(version.seq.0.saturating_sub(1)),
                ..*version
            });
            Some((*id, unreadable.map_or(last, |before| last.min(before))))
        };
        self.config.in_sync.iter().filter_map(last).collect()
    }

    fn begin_trimming(&mut self) {
        let members = &self.members;
        let is_cut = |id: &ReplicaId, version: &Version| members.get(id).is_some_and(|member| member.last < *version);
        self.given_up
            .extend(self.unreadable.extract_if(.., |id, version| is_cut(id, version)));
        let lasts = self.lasts();
        assert!(
            lasts.len() == self.config.in_sync.len(),
            "I8: an epoch begins with all members of its configuration"
        );
        let (longest, end) = lasts
            .iter()
            .copied()
            .max_by_key(|(_, last)| *last)
            .expect("I8: there is one");
        let epoch = self.config.epoch;
        assert!(
            end.epoch < epoch || (end.epoch == epoch && end.seq == Seq(0)),
            "I3: nobody wrote in this epoch before it began"
        );
        // What the longest was told of older epochs counts: it took part in the one behind them. What others were told
        // of epochs that they did not get beyond may come from a takeover that ended half way.
        self.ends.clear();
        let told = std::mem::take(&mut self.members.get_mut(&longest).expect("it answered").ends);
        for row in &told {
            for epoch in row.epochs().filter(|epoch| *epoch < end.epoch) {
                self.ends.insert(epoch, row.end);
            }
        }
        if end.epoch > Epoch(0) && end.epoch < epoch {
            self.ends.insert(end.epoch, end.seq);
        }
        // In the epochs behind it nobody wrote anything that counts.
        for epoch in (end.epoch.0 + 1..self.config.epoch.0).map(Epoch) {
            self.ends.insert(epoch, Seq(0));
        }
        self.phase = Phase::Trimming(end);
        for id in self.config.in_sync.clone() {
            self.ask_to_trim(id);
        }
    }

    fn ask_to_trim(&mut self, id: ReplicaId) {
        let ends = self.epoch_ends();
        if let Some(member) = self.members.get_mut(&id) {
            member.standing = Standing::Trimming;
            member.asked_ms = self.now_ms;
            self.ask(id, Ask::Trim { ends });
        }
    }

    pub(super) fn trimmed(&mut self, id: ReplicaId) {
        let member = self.members.get_mut(&id).expect("an answer is taken from members");
        if member.standing == Standing::Trimming {
            member.standing = Standing::Trimmed;
        }
    }

    pub(super) fn trim(&mut self) {
        self.ask_again();
        let Phase::Trimming(end) = self.phase else { return };
        if self.give_up_on(Standing::Trimming) || self.begin_again() {
            return;
        }
        if !self.all_stand(Standing::Trimmed) {
            return;
        }
        if self.unreadable.values().any(|version| *version > end) {
            // Logs are cut between records, so they may be shorter than that now.
            return self.start_over();
        }
        let lasts = self.lasts();
        let source = lasts.iter().find(|(_, last)| *last == end);
        let source = source.expect("it is the last of one of them").0;
        let mut copiers = Vec::new();
        if !self.mutant(Mutant::NotEqualised) {
            let behind = lasts.iter().filter(|(_, last)| *last < end);
            copiers.extend(behind.map(|(target, last)| Copier::new(source, *target, *last, end)));
        }
        self.phase = Phase::Equalising(copiers);
        self.equalise();
    }

    fn all_stand(&self, standing: Standing) -> bool {
        let stands = |id| self.members.get(id).is_some_and(|member| member.standing == standing);
        self.config.in_sync.iter().all(stands)
    }

    /// Gives up on members that stand there for too long: cutting off a log and opening it again takes its time.
    fn give_up_on(&mut self, standing: Standing) -> bool {
        let patience = self.now_ms.saturating_sub(TAKEOVER_MS);
        let mut any = false;
        for member in self.members.values_mut() {
            if member.standing == standing && member.owes_session_ms.is_some_and(|since| since < patience) {
                (member.given_up, any) = (true, true);
            }
        }
        any && self.begin_again()
    }

    pub(super) fn equalise(&mut self) {
        if self.begin_again() {
            return;
        }
        let Phase::Equalising(mut copiers) = std::mem::replace(&mut self.phase, Phase::Settling) else {
            unreachable!("it is called in this phase")
        };
        let (mut failed, mut damaged) = (BTreeSet::new(), Vec::new());
        copiers.retain_mut(|copier| match self.run_copier(copier) {
            Progress::Going => true,
            Progress::Done => false,
            Progress::TargetFailed => {
                failed.insert(copier.target);
                true
            }
            Progress::SourceFailed => {
                failed.insert(copier.source);
                true
            }
            Progress::SourceDamaged(version) => {
                damaged.push((copier.source, version));
                true
            }
        });
        if !damaged.is_empty() {
            self.phase = Phase::Equalising(copiers);
            return self.shorten(damaged);
        }
        for id in &failed {
            if let Some(member) = self.members.get_mut(id) {
                member.given_up = true;
            }
        }
        if !copiers.is_empty() {
            self.phase = Phase::Equalising(copiers);
            if !failed.is_empty() {
                self.begin_again();
            }
            return;
        }
        for id in self.config.in_sync.clone() {
            self.ask_to_settle(id, true);
        }
    }

    /// Members have writes that others lack, and cannot read them. What nobody can read counts as never written, with all
    /// that came later: a log has no holes. That is no more than is lost with such a member altogether, and no flush
    /// covered it, because then the others would have it. Without this the epoch would never begin.
    fn shorten(&mut self, damaged: Vec<(ReplicaId, Version)>) {
        for (id, version) in damaged {
            let first = self.unreadable.entry(id).or_insert(version);
            *first = version.min(*first);
        }
        self.start_over();
    }

    /// A member was lost before the epoch began: everything is decided anew without it.
    fn begin_again(&mut self) -> bool {
        let now_ms = self.now_ms;
        let late = |id: &ReplicaId| {
            self.members.get(id).is_none_or(|member| {
                let asked = matches!(member.standing, Standing::Asked);
                member.failed.is_some() || member.given_up || asked && member.is_late(now_ms)
            })
        };
        if !self.config.in_sync.iter().any(late) {
            return false;
        }
        self.start_over();
        true
    }

    /// Asks all members again what they have.
    pub(super) fn start_over(&mut self) {
        self.round += 1;
        for member in self.members.values_mut() {
            member.standing = Standing::Asked;
            (member.asked_ms, member.given_up, member.promising_ms) = (0, false, None);
        }
        self.phase = Phase::Promising(self.now_ms);
        self.gather();
    }

    pub(super) fn settle(&mut self) {
        self.ask_again();
        if self.all_stand(Standing::Settled) {
            return self.serve();
        }
        let _ = self.give_up_on(Standing::Settling) || self.begin_again();
    }

    pub(super) fn settled(&mut self, id: ReplicaId) {
        let serving = self.is_serving();
        let member = self.members.get_mut(&id).expect("an answer is taken from members");
        if member.standing != Standing::Settling {
            return;
        }
        member.standing = Standing::Settled;
        member.owes_session_ms = None;
        if serving && self.config.in_sync.contains(&id) {
            self.stream_to(id);
        }
    }

    fn serve(&mut self) {
        // Whoever settled has the beginning of the epoch on stable storage, and everything before it.
        let begun = self.version(Seq(0));
        self.agreed = self.agreed.max(begun);
        self.unreadable.clear();
        let given_up = std::mem::take(&mut self.given_up).into_iter();
        self.events
            .extend(given_up.map(|(id, version)| PrimaryEvent::GivenUp(id, version)));
        self.phase = Phase::Serving;
        for id in self.config.in_sync.clone() {
            self.stream_to(id);
            self.members.get_mut(&id).expect("it just settled").flushed = begun;
        }
        self.events.push_back(PrimaryEvent::Serving(self.config.epoch));
        self.go_on();
    }

    /// True if this write of an older epoch is part of the volume: it is not behind the end of its epoch.
    pub fn counts(&self, version: Version) -> bool {
        let end = self.ends.get(&version.epoch);
        end.is_some_and(|end| version.seq <= *end)
    }

    /// Where epochs ended, in as few rows as say it.
    fn epoch_ends(&self) -> Vec<EpochEnd> {
        let mut rows: Vec<EpochEnd> = Vec::new();
        for (epoch, end) in &self.ends {
            match rows.last_mut() {
                Some(row) if row.end == *end && *end == Seq(0) && row.last.0 + 1 == epoch.0 => row.last = *epoch,
                _ => rows.push(EpochEnd {
                    first: *epoch,
                    last: *epoch,
                    end: *end,
                }),
            }
        }
        rows
    }

    /// A member is gone, or was started again and may have lost what it was given: the beginning is decided anew.
    pub(super) fn members_changed(&mut self) {
        if let Phase::Trimming(_) | Phase::Equalising(_) | Phase::Settling = self.phase {
            self.start_over();
        }
    }
}

/// What is said of a member whose log ends before what it had on stable storage.
fn lost(had: Version, has: Version) -> String {
    format!(
        "it had every write up to {had} on stable storage, and has those up to {has}: its files are an older copy, or its disk lost writes"
    )
}
