//! What guests see of it, and which invariants that breaks.

use super::mutant::Mutant;
use super::state::{Phase, State, Version, bits};
use super::{Model, Set};

/// Of the invariants of `docs/replication.md`, those that a step can break.
pub fn breaks(state: &mut State, invariant: u8) {
    state.broken |= 1 << invariant;
}

/// A guest was told that its write is done.
pub fn completed(model: &Model, state: &mut State, primary: usize) {
    let me = state.primaries[primary];
    let write = state.write_of(primary, me.completed).expect("it was issued");
    state.completed |= 1 << write;
    let by = &mut state.completer[usize::from(me.epoch)];
    if *by != 0 && usize::from(*by) != primary + 1 {
        breaks(state, 3);
    } else {
        *by = primary as u8 + 1;
    }
    // Every configuration that may be current: the recorded one, and what its primary has asked for.
    let current = &state.primaries[usize::from(state.api.primary)];
    let configs: Vec<Set> = current.queued.iter().chain([state.api.in_sync]).collect();
    for config in configs {
        if !config.iter().all(|replica| has(state, replica, write)) {
            breaks(state, 4);
        }
        if config.len() < model.bounds.min_in_sync && usize::from(state.api.primary) == primary {
            breaks(state, 9);
        }
    }
}

/// A replica has a write, or lost it with its power.
fn has(state: &State, replica: usize, write: u8) -> bool {
    let it = &state.replicas[replica];
    it.cut || state.excused & 1 << write != 0 || state.holds(&it.log, it.log.len(), write)
}

/// The in-sync set is about to become this one.
pub fn applied(state: &mut State, in_sync: Set) {
    let mut added = in_sync.iter().filter(|&replica| !state.api.in_sync.contains(replica));
    let verified = |replica: usize| {
        let it = &state.replicas[replica];
        bits(state.flushed & !state.excused).all(|write| state.holds(&it.log, it.durable, write))
            && bits(state.completed).all(|write| has(state, replica, write))
    };
    if !added.all(verified) {
        breaks(state, 7);
    }
}

/// A new primary has settled what is kept of the epochs before its own.
pub fn decided(state: &mut State, primary: usize, members: Set) {
    let me = state.primaries[primary];
    let kept = |write: u8| {
        members
            .iter()
            .any(|replica| state.holds(&state.replicas[replica].log, state.replicas[replica].log.len(), write))
    };
    let lost = (0..state.issued).filter(|&write| state.version(write).epoch < me.epoch && !kept(write));
    let lost = lost.fold(0, |bits, write| bits | 1 << write);
    // Power cuts of all of them take what no flush has covered from a guest that starts from the disk.
    if !me.resumed && members.iter().all(|replica| state.replicas[replica].cut) {
        state.excused |= lost & !state.flushed;
        for block in 0..state.seen.len() {
            let gone = bits(state.excused)
                .any(|write| state.block(write) == block && state.version(write) == state.seen[block]);
            if gone {
                let newest = members.iter().filter_map(|replica| {
                    state.newest(&state.replicas[replica].log, state.replicas[replica].log.len(), block)
                });
                state.seen[block] = newest.map(|write| state.version(write)).max().unwrap_or_default();
            }
        }
    }
}

/// A new primary begins to serve.
pub fn serves(state: &mut State, primary: usize) {
    let me = &state.primaries[primary];
    if me.known.is_empty() || !me.known.is_subset(me.found) {
        breaks(state, 8);
    }
}

/// Every read that could be served right now. A guest may have asked for any of them, so what one of them shows must
/// never be taken back.
pub fn reads(model: &Model, state: &mut State) {
    for primary in 0..model.bounds.primaries {
        if state.primaries[primary].phase == Phase::Serving && leased(model, state, primary) {
            for block in 0..model.blocks() {
                read(model, state, primary, block);
            }
        }
    }
}

/// The leases of everybody who may be in sync are valid.
fn leased(model: &Model, state: &State, primary: usize) -> bool {
    let me = &state.primaries[primary];
    let members = if model.has(Mutant::LeaseOfKnownOnly) {
        me.known
    } else {
        me.members()
    };
    let valid = |replica: usize| state.replicas[replica].promised <= me.epoch || state.replicas[replica].lease_left;
    model.has(Mutant::LeaseCheckedEarly) || members.iter().all(valid)
}

fn read(model: &Model, state: &mut State, primary: usize, block: usize) {
    let me = state.primaries[primary];
    let waiting = (0..state.issued).any(|write| {
        let it = state.writes[usize::from(write)];
        usize::from(it.primary) == primary && usize::from(it.block) == block && it.version.seq > me.completed
    });
    if waiting && !model.has(Mutant::ReadBesideWrite) {
        return;
    }
    let mut from = me.known;
    if let Some(session) = me.session.filter(|_| model.has(Mutant::ReadWhileSyncing)) {
        from = from.with(usize::from(session.replica));
    }
    let answers = from.iter().filter(|&replica| answers(model, state, primary, replica));
    let answers: Vec<Option<u8>> = answers
        .map(|replica| &state.replicas[replica].log)
        .map(|log| state.newest(log, log.len(), block))
        .collect();
    let version = |write: &Option<u8>| write.map_or(Version::default(), |write| state.version(write));
    let acknowledged = bits(state.completed & !state.excused).filter(|&write| state.block(write) == block);
    let acknowledged = acknowledged.map(|write| state.version(write)).max().unwrap_or_default();
    // Two members must not show two versions, either: the guest's next read may go to the other one.
    let found = answers.iter().map(version).fold(state.seen[block], Version::max);
    let stale = answers
        .iter()
        .map(version)
        .any(|version| version < acknowledged || version < found);
    let older = answers
        .iter()
        .flatten()
        .filter(|&&write| state.version(write).epoch < me.epoch);
    let mut beyond = older
        .clone()
        .map(|&write| (state.version(write), me.ends[usize::from(state.version(write).epoch)]));
    let beyond = beyond.any(|(version, end)| end != 0 && version.seq >= end);
    let undecided = older.clone().any(|&write| me.kept & 1 << write == 0);
    for (broken, invariant) in [(stale, 12), (beyond, 11), (undecided, 13)] {
        if broken {
            breaks(state, invariant);
        }
    }
    state.seen[block] = found;
}

/// Whether a replica answers a read: it has promised to this primary and nobody later, and it has all that was completed.
/// The read says how much that is, for a member may have lost power without the primary knowing.
fn answers(model: &Model, state: &State, primary: usize, replica: usize) -> bool {
    let skips = model.has(Mutant::ReadBeforeReplay) || model.has(Mutant::ReadWhileSyncing);
    model.listens(state, primary, replica)
        && (state.replicas[replica].next > state.primaries[primary].completed || skips)
}
