//! What can happen, and what it does.
//!
//! There are no messages in the state. Whatever was once sent may arrive, as often and as late as it likes, so it is
//! enough to say when a receiver would take it: a write that was issued is on its way to everybody for ever; an answer
//! counts from when it is given, because hearing of it later is the same as acting on it later. Silence is an event that
//! does not happen: a member that does not answer, a primary that died, one that has heard that it is deposed. Leases are not there either: a lease can only run out, and the worst moment for that is the last one,
//! which is when the replica that gave it promises to a newer primary.

use super::mutant::Mutant;
use super::set::{REPLICAS, Set};
use super::state::{Flush, Phase, Primary, Replica, Session, State, Version, Write};
use super::{Model, observe};

/// An event.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Action {
    /// The API raises the epoch for a new engine.
    Elect {
        primary: usize,
        resumed: bool,
    },
    /// A replica promises.
    Promise {
        primary: usize,
        replica: usize,
    },
    /// All members have promised: the end of the older epochs is what the longest log of theirs has.
    Decide {
        primary: usize,
    },
    /// A member gets what it lacks, syncs it, and records the ends.
    Level {
        primary: usize,
        replica: usize,
    },
    /// Nobody has any more what was decided on: it is decided again.
    DecideAgain {
        primary: usize,
    },
    Serve {
        primary: usize,
    },
    /// A guest asks for a write.
    Issue {
        primary: usize,
    },
    /// A write arrives at a replica, which appends and acknowledges it.
    Append {
        primary: usize,
        replica: usize,
        seq: u8,
    },
    /// The oldest write that is not completed yet is reported to the guest.
    Complete {
        primary: usize,
    },
    /// A replica confirms a flush of what was completed when the guest asked for it, which is when the first one confirms.
    Flush {
        primary: usize,
        replica: usize,
    },
    FlushDone {
        primary: usize,
    },
    /// A primary asks the API for another in-sync set.
    Request {
        primary: usize,
        in_sync: Set,
    },
    /// The API does that.
    Apply {
        primary: usize,
        in_sync: Set,
    },
    /// The primary hears of it.
    Learn {
        primary: usize,
    },
    /// A replica loses power, keeps this many records, and comes back.
    PowerCut {
        replica: usize,
        kept: u8,
    },
    /// A replica that is out begins a resync.
    Resync {
        primary: usize,
        replica: usize,
    },
    /// The copy of a block arrives: as it is now, or as it was when the resync began.
    Copy {
        primary: usize,
        from: usize,
        block: usize,
        early: bool,
    },
    /// The replica has all copies, and flushes.
    FlushCopies {
        primary: usize,
    },
    /// The primary gives the resync up.
    GiveUp {
        primary: usize,
    },
    /// Only in mutants: what is not known is guessed.
    Guess {
        primary: usize,
        in_sync: Set,
    },
    /// Only in a mutant: the successor of a dead process takes over its epoch.
    UseEpochAgain {
        primary: usize,
    },
}

impl Model {
    /// The state after it.
    pub(super) fn after(&self, state: &State, action: Action) -> State {
        let mut next = *state;
        match action {
            Action::Elect { primary, resumed } => {
                next.api.epoch += 1;
                next.api.primary = primary as u8;
                // A guest lives on only on its node, where the next engine waits for the end of the one before.
                if resumed {
                    next.primaries[..primary].iter_mut().for_each(Primary::die);
                }
                let me = &mut next.primaries[primary];
                (me.phase, me.epoch, me.resumed) = (Phase::Promising, next.api.epoch, resumed);
                (me.found, me.known) = (next.api.in_sync, next.api.in_sync);
                // The object has changed: whatever was asked for against its old version will be refused.
                next.primaries.iter_mut().for_each(|it| it.queued = Default::default());
            }
            Action::UseEpochAgain { primary } => {
                let in_sync = next.api.in_sync;
                next.primaries[..primary].iter_mut().for_each(Primary::die);
                let me = &mut next.primaries[primary];
                (me.phase, me.epoch) = (Phase::Serving, next.api.epoch);
                (me.found, me.known) = (in_sync, in_sync);
            }
            Action::Promise { primary, replica } => self.promise(&mut next, primary, replica),
            Action::Decide { primary } => self.decide(&mut next, primary),
            Action::DecideAgain { primary } => next.primaries[primary].phase = Phase::Promising,
            Action::Level { primary, replica } => level(&mut next, primary, replica),
            Action::Serve { primary } => serve(&mut next, primary),
            Action::Issue { primary } => {
                let me = &mut next.primaries[primary];
                me.issued += 1;
                let version = Version {
                    epoch: me.epoch,
                    seq: me.issued,
                };
                let at = usize::from(next.issued);
                next.writes[at] = Write {
                    version,
                    primary: primary as u8,
                    block: self.bounds.blocks[at],
                };
                next.issued += 1;
            }
            Action::Append { primary, replica, seq } => append(&mut next, primary, replica, seq),
            Action::Complete { primary } => {
                next.primaries[primary].completed += 1;
                observe::completed(self, &mut next, primary);
            }
            Action::Flush { primary, replica } => {
                let it = &mut next.replicas[replica];
                it.durable = it.log.len();
                let me = &mut next.primaries[primary];
                reconnected(me, it, replica);
                let flush = me.flush.get_or_insert(Flush {
                    up_to: me.completed,
                    done: Set::default(),
                });
                flush.done = flush.done.with(replica);
            }
            Action::FlushDone { primary } => {
                let me = &mut next.primaries[primary];
                let flush = me.flush.take().expect("it is done");
                me.flushed = if self.has(Mutant::FlushTakenLate) {
                    me.completed
                } else {
                    flush.up_to
                };
                let covered = me.flushed;
                next.flushed |= (1..=covered)
                    .filter_map(|seq| state.write_of(primary, seq))
                    .fold(0, |bits, write| bits | 1 << write);
            }
            Action::Request { primary, in_sync } => {
                let me = &mut next.primaries[primary];
                (me.maybe, me.queued) = (me.maybe.with(in_sync), me.queued.with(in_sync));
            }
            Action::Apply { primary, in_sync } => {
                observe::applied(&mut next, in_sync);
                next.api.in_sync = in_sync;
                let me = &mut next.primaries[primary];
                me.queued = Default::default();
                if me.is_alive() {
                    me.won = Some(in_sync);
                }
            }
            Action::Learn { primary } => {
                let in_sync = next.primaries[primary].won.expect("there is something to learn");
                learn(&mut next, primary, in_sync);
            }
            Action::PowerCut { replica, kept } => self.cut(&mut next, replica, kept),
            Action::Resync { primary, replica } => self.begin_resync(&mut next, primary, replica),
            Action::Copy {
                primary,
                from,
                block,
                early,
            } => {
                let copy = self.copy(state, primary, from, block, early);
                self.take_copy(&mut next, primary, block, copy);
            }
            Action::FlushCopies { primary } => {
                let me = &mut next.primaries[primary];
                let session = me.session.as_mut().expect("it is a resync that ends");
                let replica = usize::from(session.replica);
                let it = &mut next.replicas[replica];
                if !self.has(Mutant::AdmittedUnflushed) {
                    it.durable = it.log.len();
                }
                it.complete = true;
                session.flushed = Some(it.next - 1);
                reconnected(me, it, replica);
            }
            Action::GiveUp { primary } => {
                let me = &mut next.primaries[primary];
                let session = me.session.take().expect("it is a resync that is given up");
                me.acked[usize::from(session.replica)] = 0;
            }
            Action::Guess { primary, in_sync } => {
                let known = next.primaries[primary].known;
                let success = self.has(Mutant::UnknownIsSuccess);
                learn(&mut next, primary, if success { in_sync } else { known });
            }
        }
        observe::reads(self, &mut next);
        next.canonical(self.bounds.replicas)
    }

    fn promise(&self, state: &mut State, primary: usize, replica: usize) {
        let me = &mut state.primaries[primary];
        let it = &mut state.replicas[replica];
        me.promised = me.promised.with(replica);
        (it.promised, it.promised_to) = (me.epoch, primary as u8);
        if !self.has(Mutant::OlderEpochTaken) {
            it.next = 0;
        }
        if !self.has(Mutant::PromiseNotDurable) {
            it.promised_durable = me.epoch;
        }
        it.lease_left |= self.has(Mutant::LeaseNotAwaited);
        if self.has(Mutant::NotEqualised) {
            it.next = 1;
        }
    }

    /// The longest log of the members decides. It has whatever any guest was told, unless they all lost it.
    fn decide(&self, state: &mut State, primary: usize) {
        let members = self.decided_by(state, primary).expect("it can be decided");
        let epoch = state.primaries[primary].epoch;
        let longest = members
            .iter()
            .max_by_key(|&replica| state.position(&state.replicas[replica].log))
            .expect("there are members");
        let log = state.replicas[longest].log;
        let mut ends = state.replicas[longest].ends;
        for older in 1..epoch {
            let end = &mut ends[usize::from(older)];
            if *end == 0 {
                *end = state.last_seq(&log, older) + 1;
            }
        }
        observe::decided(state, primary, members);
        let me = &mut state.primaries[primary];
        if self.has(Mutant::LongestLogPromoted) {
            (me.known, state.api.in_sync) = (members, members);
        }
        if self.has(Mutant::LeftOutBeforeCas) {
            (me.known, me.maybe) = (members, Default::default());
        }
        me.ends = ends;
        let end = state.position(&log);
        state.primaries[primary].phase = Phase::Equalising {
            end,
            level: Set::default(),
        };
    }

    fn cut(&self, state: &mut State, replica: usize, kept: u8) {
        state.power_cuts += 1;
        let it = &mut state.replicas[replica];
        it.log.truncate(kept);
        it.durable = kept;
        it.promised = it.promised_durable;
        it.cut = true;
        it.lease_left |= self.has(Mutant::LeaseForgotten);
        let (log, epoch, connected) = (it.log, it.promised, it.complete && it.next > 0);
        state.replicas[replica].next = if connected { state.last_seq(&log, epoch) + 1 } else { 0 };
    }

    fn begin_resync(&self, state: &mut State, primary: usize, replica: usize) {
        state.resyncs += 1;
        let me = &mut state.primaries[primary];
        let it = &mut state.replicas[replica];
        let base = me.issued + 1;
        me.acked[replica] = base - 1;
        me.session = Some(Session {
            replica: replica as u8,
            base,
            copied: 0,
            carried: 0,
            flushed: None,
        });
        if it.promised < me.epoch {
            it.lease_left |= self.has(Mutant::LeaseNotAwaited);
        }
        (it.promised, it.promised_durable, it.promised_to) = (me.epoch, me.epoch, primary as u8);
        (it.next, it.complete, it.ends) = (base, false, me.ends);
        if self.has(Mutant::DivergentKept) {
            return;
        }
        let (ends, log, durable) = (me.ends, it.log, it.durable);
        let counts = |write: &u8| {
            let version = state.writes[usize::from(*write)].version;
            let end = ends[usize::from(version.epoch)];
            end == 0 || version.seq < end
        };
        let it = &mut state.replicas[replica];
        it.durable = log.as_slice()[..usize::from(durable)]
            .iter()
            .filter(|&write| counts(write))
            .count() as u8;
        it.log.truncate(0);
        log.as_slice()
            .iter()
            .copied()
            .filter(|write| counts(write))
            .for_each(|write| it.log.push(write));
    }

    fn take_copy(&self, state: &mut State, primary: usize, block: usize, copy: Option<u8>) {
        let session = state.primaries[primary].session.expect("it is a resync that copies");
        let replica = usize::from(session.replica);
        let log = state.replicas[replica].log;
        let there = state.newest(&log, log.len(), block);
        let version = |write: Option<u8>| write.map_or(Version::default(), |write| state.version(write));
        let (old, new) = (version(there), version(copy));
        let epoch = state.primaries[primary].epoch;
        let session = state.primaries[primary].session.as_mut().expect("it is there");
        session.copied |= 1 << block;
        if new.epoch == epoch {
            session.carried = session.carried.max(new.seq);
        }
        if new > old {
            state.replicas[replica].log.push(copy.expect("it has a version"));
        } else if new < old && self.has(Mutant::CopyUnguarded) {
            let newer = log
                .as_slice()
                .iter()
                .copied()
                .filter(|&write| state.block(write) == block && state.version(write) > new);
            let newer: Vec<u8> = newer.collect();
            let it = &mut state.replicas[replica];
            it.log.truncate(0);
            log.as_slice()
                .iter()
                .copied()
                .filter(|write| !newer.contains(write))
                .chain(copy)
                .for_each(|write| it.log.push(write));
            it.durable = it.durable.min(it.log.len());
        }
    }
}

fn level(state: &mut State, primary: usize, replica: usize) {
    let me = state.primaries[primary];
    let Phase::Equalising { end, level } = me.phase else {
        unreachable!("only then are members made level")
    };
    let source = me
        .known
        .iter()
        .find(|&from| state.position(&state.replicas[from].log) >= end);
    let source = state.replicas[source.expect("somebody has it")].log;
    let it = &mut state.replicas[replica];
    source.as_slice().iter().for_each(|&write| it.log.push(write));
    it.durable = it.log.len();
    (it.ends, it.next) = (me.ends, 1);
    it.promised_durable = it.promised;
    (it.complete, it.cut) = (true, false);
    state.primaries[primary].phase = Phase::Equalising {
        end,
        level: level.with(replica),
    };
}

fn serve(state: &mut State, primary: usize) {
    let member = state.primaries[primary]
        .known
        .iter()
        .next()
        .expect("an in-sync set is never empty");
    let log = state.replicas[member].log;
    let kept = (0..state.issued)
        .filter(|&write| log.contains(write))
        .fold(0, |bits, write| bits | 1 << write);
    let me = &mut state.primaries[primary];
    me.kept = kept;
    me.phase = Phase::Serving;
    observe::serves(state, primary);
}

fn append(state: &mut State, primary: usize, replica: usize, seq: u8) {
    let write = state.write_of(primary, seq).expect("it was issued");
    let me = &mut state.primaries[primary];
    let it = &mut state.replicas[replica];
    if seq >= it.next {
        it.log.push(write);
        it.next = seq + 1;
    }
    let serves = me.phase == Phase::Serving;
    if serves {
        reconnected(me, it, replica);
    }
    if serves && (me.members().contains(replica) || me.is_syncing(replica)) {
        me.acked[replica] = me.acked[replica].max(seq);
    }
}

/// A primary hears from a replica that lost power since it last did. What the replica acknowledged before counts no more,
/// and it is whole again as soon as it has everything that was completed.
fn reconnected(me: &mut Primary, it: &mut Replica, replica: usize) {
    if it.cut {
        me.acked[replica] = me.acked[replica].min(it.next - 1);
        it.cut = it.next <= me.completed;
    }
}

/// The in-sync set is known, and nothing else can come of what was asked for.
fn learn(state: &mut State, primary: usize, in_sync: Set) {
    let me = &mut state.primaries[primary];
    (me.known, me.maybe, me.won) = (in_sync, Default::default(), None);
    match me.phase {
        Phase::Equalising { .. } => me.phase = Phase::Promising,
        Phase::Serving => {
            me.session = me
                .session
                .filter(|session| !in_sync.contains(usize::from(session.replica)));
            for replica in 0..REPLICAS {
                if !in_sync.contains(replica) && !me.is_syncing(replica) {
                    me.acked[replica] = 0;
                }
            }
            if let Some(flush) = &mut me.flush {
                flush.done = flush.done.intersection(in_sync);
            }
        }
        _ => {}
    }
}
