//! Every order of events that the bounds allow, for the protocol and for what is not quite the protocol.

use std::time::Instant;

use galleonfs_sim::model::{Bounds, Model, Mutant};
use stateright::{Checker, HasDiscoveries, Model as _};

/// A primary and its successor, three replicas, two writes and flushes, and one power cut.
const TAKEOVER: Bounds = Bounds {
    replicas: 3,
    primaries: 2,
    writes: 2,
    blocks: [0, 1, 0],
    power_cuts: 1,
    resyncs: 0,
    requests: 1,
    flushes: true,
    min_in_sync: 1,
};

/// One primary, and a replica that leaves, comes back and is let in, with every answer of the API lost or late.
const RESYNC: Bounds = Bounds {
    primaries: 1,
    resyncs: 1,
    requests: 2,
    ..TAKEOVER
};

/// A resync before, during and after a takeover.
const BOTH: Bounds = Bounds {
    resyncs: 1,
    power_cuts: 0,
    flushes: false,
    ..TAKEOVER
};

fn explore(name: &str, bounds: Bounds) {
    let begun = Instant::now();
    let checker = Model { bounds, mutant: None }.checker().threads(1).spawn_bfs().join();
    println!(
        "{name}: {} states, {} steps between them, {} deep, in {:.1?}",
        checker.unique_state_count(),
        checker.state_count(),
        checker.max_depth(),
        begun.elapsed()
    );
    checker.assert_properties();
}

#[test]
fn a_takeover_keeps_the_invariants() {
    explore("takeover", TAKEOVER);
}

#[test]
fn a_takeover_with_a_minimum_keeps_the_invariants() {
    explore(
        "takeover with a minimum of two",
        Bounds {
            min_in_sync: 2,
            writes: 1,
            ..TAKEOVER
        },
    );
}

#[test]
fn a_resync_beside_live_writes_keeps_the_invariants() {
    explore("resync", RESYNC);
    explore(
        "resync of one block",
        Bounds {
            blocks: [0, 0, 0],
            power_cuts: 0,
            ..RESYNC
        },
    );
}

#[test]
fn a_resync_around_a_takeover_keeps_the_invariants() {
    explore("resync and takeover", BOTH);
    explore(
        "resync and takeover, changes unknown",
        Bounds {
            replicas: 2,
            writes: 1,
            requests: 2,
            ..BOTH
        },
    );
}

#[test]
fn a_takeover_of_a_takeover_keeps_the_invariants() {
    explore(
        "two takeovers",
        Bounds {
            primaries: 3,
            replicas: 2,
            flushes: false,
            ..TAKEOVER
        },
    );
}

/// Minutes each, and gigabytes: `make model`.
#[test]
#[ignore = "takes minutes: make model"]
fn larger_two_takeovers_keep_the_invariants() {
    explore(
        "two takeovers",
        Bounds {
            primaries: 3,
            writes: 1,
            ..TAKEOVER
        },
    );
}

#[test]
#[ignore = "takes minutes: make model"]
fn larger_two_resyncs_keep_the_invariants() {
    explore("two resyncs", Bounds { resyncs: 2, ..RESYNC });
}

#[test]
#[ignore = "takes minutes: make model"]
fn larger_resync_and_takeover_with_unknown_changes_keep_the_invariants() {
    let both = Bounds { requests: 2, ..BOTH };
    explore("one write", Bounds { writes: 1, ..both });
    explore(
        "two writes to one block",
        Bounds {
            blocks: [0, 0, 0],
            ..both
        },
    );
    explore("two writes", both);
}

/// Everything at once. More than a hundred million states, for a machine of its own.
#[test]
#[ignore = "takes an hour and tens of gigabytes"]
fn everything_at_once_keeps_the_invariants() {
    explore(
        "everything",
        Bounds {
            resyncs: 1,
            requests: 2,
            ..TAKEOVER
        },
    );
}

/// Small bounds in which a mutant shows, and the invariant that it breaks there.
fn mutant(mutant: Mutant) -> (Bounds, &'static str) {
    use Mutant::*;
    let resync = Bounds {
        power_cuts: 0,
        ..RESYNC
    };
    let one_write = Bounds { writes: 1, ..resync };
    let one_block = [0, 0, 0];
    match mutant {
        AckBeforeCas => (TAKEOVER, "I6"),
        UnknownIsSuccess => (TAKEOVER, "I6"),
        UnknownIsFailure => (one_write, "I4"),
        SettledByReading => (one_write, "I4"),
        AckOfKnownOnly => (one_write, "I4"),
        LeaseOfKnownOnly => (
            Bounds {
                primaries: 2,
                replicas: 2,
                flushes: false,
                ..one_write
            },
            "I12",
        ),
        PromiseNotDurable => (TAKEOVER, "I2"),
        OlderEpochTaken => (TAKEOVER, "I13"),
        EpochUsedAgain => (TAKEOVER, "I10"),
        GapTaken => (TAKEOVER, "I4"),
        FlushUnchecked => (TAKEOVER, "I5"),
        FlushTakenLate => (TAKEOVER, "I5"),
        MinimumIgnored => (
            Bounds {
                min_in_sync: 2,
                ..TAKEOVER
            },
            "I9",
        ),
        NotEqualised => (TAKEOVER, "I12"),
        LongestLogPromoted => (TAKEOVER, "I8"),
        LeftOutBeforeCas => (TAKEOVER, "I6"),
        ResumedFromCut => (Bounds { writes: 1, ..TAKEOVER }, "I6"),
        LeaseNotAwaited => (TAKEOVER, "I12"),
        LeaseForgotten => (Bounds { writes: 1, ..TAKEOVER }, "I12"),
        LeaseCheckedEarly => (TAKEOVER, "I12"),
        ReadBesideWrite => (
            Bounds {
                blocks: one_block,
                ..TAKEOVER
            },
            "I12",
        ),
        ReadBeforeReplay => (TAKEOVER, "I12"),
        ReadWhileSyncing => (resync, "I12"),
        DivergentKept => (Bounds { writes: 1, ..BOTH }, "I11"),
        CopyUnguarded => (
            Bounds {
                blocks: one_block,
                ..resync
            },
            "I4",
        ),
        CopiedFromBehind => (resync, "I10"),
        AdmittedBehindCopies => (Bounds { replicas: 2, ..resync }, "I10"),
        AdmittedUnflushed => (RESYNC, "I10"),
        AdmittedFlushedEarly => (resync, "I5"),
        AdmittedLagging => (resync, "I6"),
    }
}

#[test]
fn each_mutant_breaks_an_invariant() {
    for &it in Mutant::ALL {
        let begun = Instant::now();
        let (bounds, expected) = mutant(it);
        let model = Model {
            bounds,
            mutant: Some(it),
        };
        let checker = model
            .checker()
            .threads(1)
            .finish_when(HasDiscoveries::AnyFailures)
            .spawn_bfs()
            .join();
        let found = checker.discoveries();
        let broken: Vec<&str> = found.keys().filter_map(|property| property.split(' ').next()).collect();
        println!(
            "{it:?}: {broken:?} among {} states, in {:.1?}",
            checker.unique_state_count(),
            begun.elapsed()
        );
        for action in found
            .into_values()
            .next()
            .map(|path| path.into_actions())
            .unwrap_or_default()
        {
            println!("    {action:?}");
        }
        assert!(broken.contains(&expected), "{it:?} breaks {broken:?}, not {expected}");
    }
}
