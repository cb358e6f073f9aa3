//! What can happen next.

use super::Model;
use super::mutant::Mutant;
use super::set::Set;
use super::state::{Flush, Phase, Session, State, Version};
use super::step::Action;

impl Model {
    /// Everything that can happen next.
    pub(super) fn enabled(&self, state: &State, actions: &mut Vec<Action>) {
        for primary in 0..self.bounds.primaries {
            match state.primaries[primary].phase {
                Phase::Idle => self.starts(state, primary, actions),
                Phase::Promising | Phase::Equalising { .. } => self.promotion(state, primary, actions),
                Phase::Serving => self.service(state, primary, actions),
                Phase::Dead => {}
            }
            self.membership(state, primary, actions);
            self.appends(state, primary, actions);
        }
        if state.power_cuts < self.bounds.power_cuts {
            for replica in 0..self.bounds.replicas {
                let it = &state.replicas[replica];
                // A cut that takes nothing shows nothing, unless something was only in memory.
                let memory = self.has(Mutant::PromiseNotDurable) || self.has(Mutant::LeaseForgotten);
                let lens = it.durable..it.log.len() + u8::from(memory);
                actions.extend(lens.map(|kept| Action::PowerCut { replica, kept }));
            }
        }
    }

    fn starts(&self, state: &State, primary: usize, actions: &mut Vec<Action>) {
        let before = &state.primaries[..primary];
        if before.iter().any(|it| it.phase == Phase::Idle) {
            return;
        }
        actions.push(Action::Elect {
            primary,
            resumed: false,
        });
        actions.push(Action::Elect { primary, resumed: true });
        if self.has(Mutant::EpochUsedAgain) {
            actions.push(Action::UseEpochAgain { primary });
        }
    }

    fn promotion(&self, state: &State, primary: usize, actions: &mut Vec<Action>) {
        let me = &state.primaries[primary];
        let asked = if self.has(Mutant::LongestLogPromoted) {
            self.all()
        } else {
            me.members()
        };
        for replica in asked
            .iter()
            .filter(|&replica| state.replicas[replica].promised < me.epoch)
        {
            actions.push(Action::Promise { primary, replica });
        }
        let settled = me.maybe.is_empty();
        match me.phase {
            Phase::Promising => {
                if self.decided_by(state, primary).is_some() {
                    actions.push(Action::Decide { primary });
                }
                if self.has(Mutant::NotEqualised) && settled && me.known.is_subset(me.promised) {
                    actions.push(Action::Serve { primary });
                }
            }
            Phase::Equalising { end, level } => {
                let source = me
                    .known
                    .iter()
                    .any(|replica| state.position(&state.replicas[replica].log) >= end);
                for replica in me.known.iter().filter(|&replica| !level.contains(replica) && source) {
                    if state.replicas[replica].promised == me.epoch {
                        actions.push(Action::Level { primary, replica });
                    }
                }
                if !source {
                    actions.push(Action::DecideAgain { primary });
                }
                if settled && me.known.is_subset(level) {
                    actions.push(Action::Serve { primary });
                }
            }
            _ => unreachable!("only a primary on its way is promoted"),
        }
    }

    /// Whose logs decide where the older epochs end, if that can be said already.
    pub(super) fn decided_by(&self, state: &State, primary: usize) -> Option<Set> {
        let me = &state.primaries[primary];
        if self.has(Mutant::LongestLogPromoted) {
            let longest = me
                .promised
                .iter()
                .max_by_key(|&replica| state.position(&state.replicas[replica].log))?;
            return Some(Set::default().with(longest));
        }
        let left_out = self.has(Mutant::LeftOutBeforeCas) && me.maybe.len() == 1;
        let members = if left_out {
            me.maybe.iter().fold(me.known, Set::intersection)
        } else {
            me.known
        };
        let whole = members.iter().any(|replica| !state.replicas[replica].cut);
        let decided = (me.maybe.is_empty() || left_out)
            && members.is_subset(me.promised)
            && (!me.resumed || whole || self.has(Mutant::ResumedFromCut));
        decided.then_some(members)
    }

    fn service(&self, state: &State, primary: usize, actions: &mut Vec<Action>) {
        let me = &state.primaries[primary];
        if state.issued < self.bounds.writes {
            actions.push(Action::Issue { primary });
        }
        let everybody = if self.has(Mutant::AckBeforeCas) {
            me.maybe.iter().fold(me.known, Set::intersection)
        } else if self.has(Mutant::AckOfKnownOnly) {
            me.known
        } else {
            me.members()
        };
        let enough = |set: Set| set.len() >= self.bounds.min_in_sync;
        let enough = self.has(Mutant::MinimumIgnored) || enough(me.known) && me.maybe.iter().all(enough);
        if me.completed < me.issued && enough && everybody.iter().all(|replica| me.acked[replica] > me.completed) {
            actions.push(Action::Complete { primary });
        }
        match me.flush {
            None if me.completed == me.flushed || !self.bounds.flushes => {}
            Some(flush) if everybody.is_subset(flush.done) => actions.push(Action::FlushDone { primary }),
            flush => {
                let flush = flush.unwrap_or(Flush {
                    up_to: me.completed,
                    done: Set::default(),
                });
                let open = me.members().iter().filter(|&replica| !flush.done.contains(replica));
                let confirm = open.filter(|&replica| self.confirms(state, primary, replica, flush.up_to));
                actions.extend(confirm.map(|replica| Action::Flush { primary, replica }));
            }
        }
        match me.session {
            None if state.resyncs < self.bounds.resyncs => {
                let out = self.all().iter().filter(|&replica| !me.members().contains(replica));
                actions.extend(
                    out.filter(|&replica| self.may_promise(state, primary, replica))
                        .map(|replica| Action::Resync { primary, replica }),
                );
            }
            None => {}
            Some(session) => self.resync(state, primary, session, actions),
        }
    }

    fn may_promise(&self, state: &State, primary: usize, replica: usize) -> bool {
        let (me, it) = (&state.primaries[primary], &state.replicas[replica]);
        it.promised < me.epoch || it.promised == me.epoch && usize::from(it.promised_to) == primary
    }

    fn confirms(&self, state: &State, primary: usize, replica: usize, up_to: u8) -> bool {
        let it = &state.replicas[replica];
        self.listens(state, primary, replica) && (self.has(Mutant::FlushUnchecked) || it.next > up_to)
    }

    /// Whether a replica takes messages from this primary.
    pub(super) fn listens(&self, state: &State, primary: usize, replica: usize) -> bool {
        let (me, it) = (&state.primaries[primary], &state.replicas[replica]);
        let same = usize::from(it.promised_to) == primary || self.has(Mutant::EpochUsedAgain);
        let takes = it.promised == me.epoch && same || self.has(Mutant::OlderEpochTaken) && it.promised > me.epoch;
        it.next > 0 && takes
    }

    fn resync(&self, state: &State, primary: usize, session: Session, actions: &mut Vec<Action>) {
        let me = &state.primaries[primary];
        let replica = usize::from(session.replica);
        let it = &state.replicas[replica];
        let connected = self.listens(state, primary, replica);
        let blocks = (0..self.blocks()).filter(|block| session.copied & 1 << block == 0);
        for block in blocks.filter(|_| connected) {
            for from in me.known.without(replica).iter() {
                let behind = state.replicas[from].next < session.base && !self.has(Mutant::CopiedFromBehind);
                if behind || !self.listens(state, primary, from) {
                    continue;
                }
                actions.push(Action::Copy {
                    primary,
                    from,
                    block,
                    early: false,
                });
                if self.copy(state, primary, from, block, true) != self.copy(state, primary, from, block, false) {
                    actions.push(Action::Copy {
                        primary,
                        from,
                        block,
                        early: true,
                    });
                }
            }
        }
        let copied = usize::from(session.copied) == (1 << self.blocks()) - 1;
        let caught_up = it.next > session.carried || self.has(Mutant::AdmittedBehindCopies);
        if copied && connected && caught_up && session.flushed.is_none_or(|flushed| flushed < it.next - 1) {
            actions.push(Action::FlushCopies { primary });
        }
        if !me.members().contains(replica) {
            actions.push(Action::GiveUp { primary });
            let lags = me.acked[replica] < me.completed && !self.has(Mutant::AdmittedLagging);
            if let Some(flushed) = session.flushed
                && !lags
                && (flushed >= me.flushed || self.has(Mutant::AdmittedFlushedEarly))
                && self.is_current(state, primary)
                && me.maybe.len() < self.bounds.requests
            {
                actions.push(Action::Request {
                    primary,
                    in_sync: me.known.with(replica),
                });
            }
        }
    }

    /// What the copy of a block brings from this member.
    pub(super) fn copy(&self, state: &State, primary: usize, from: usize, block: usize, early: bool) -> Option<u8> {
        let me = &state.primaries[primary];
        let base = Version {
            epoch: me.epoch,
            seq: me.session.map_or(0, |session| session.base),
        };
        let log = &state.replicas[from].log;
        let there = log
            .as_slice()
            .iter()
            .copied()
            .filter(|&write| state.block(write) == block);
        there
            .filter(|&write| !early || state.version(write) < base)
            .max_by_key(|&write| state.version(write))
    }

    fn membership(&self, state: &State, primary: usize, actions: &mut Vec<Action>) {
        let me = &state.primaries[primary];
        actions.extend(me.queued.iter().map(|in_sync| Action::Apply { primary, in_sync }));
        if !me.is_alive() {
            return;
        }
        if me.won.is_some() {
            actions.push(Action::Learn { primary });
        }
        let guesses = [Mutant::UnknownIsSuccess, Mutant::UnknownIsFailure]
            .iter()
            .any(|&mutant| self.has(mutant));
        if guesses || self.has(Mutant::SettledByReading) && self.is_current(state, primary) {
            actions.extend(me.maybe.iter().map(|in_sync| Action::Guess { primary, in_sync }));
        }
        // Otherwise its requests carry a version of the object that is gone, and it might have made them before.
        if !self.is_current(state, primary) {
            return;
        }
        let least = if self.has(Mutant::MinimumIgnored) {
            1
        } else {
            self.bounds.min_in_sync.max(1)
        };
        let smaller = me
            .known
            .iter()
            .map(|replica| me.known.without(replica))
            .filter(|set| set.len() >= least);
        // A change of nothing settles what was asked for before, because the object carries a count of its changes.
        let same = Some(me.known).filter(|_| !me.maybe.is_empty());
        for in_sync in smaller.chain(same).filter(|&set| !me.maybe.contains(set)) {
            if me.maybe.len() < self.bounds.requests {
                actions.push(Action::Request { primary, in_sync });
            }
        }
    }

    /// The object is as this primary last saw it.
    fn is_current(&self, state: &State, primary: usize) -> bool {
        usize::from(state.api.primary) == primary && state.primaries[primary].won.is_none()
    }

    fn appends(&self, state: &State, primary: usize, actions: &mut Vec<Action>) {
        for replica in 0..self.bounds.replicas {
            if !self.listens(state, primary, replica) {
                continue;
            }
            let next = state.replicas[replica].next;
            let last = state.primaries[primary].issued;
            let takes = match () {
                () if self.has(Mutant::EpochUsedAgain) => 1..=last,
                () if self.has(Mutant::GapTaken) => next..=last,
                () => next..=last.min(next),
            };
            actions.extend(takes.map(|seq| Action::Append { primary, replica, seq }));
        }
    }
}
