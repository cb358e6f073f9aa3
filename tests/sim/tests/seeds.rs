//! Seeds of the simulator, what they must have seen, and that they would see mistakes.
//!
//! `SEEDS=… FIRST=…` say how many and from which on; `make sim` runs as many as asked, with progress.

use std::collections::BTreeMap;
use std::sync::Mutex;
use std::sync::atomic::{AtomicU64, Ordering};

use galleonfs_sim::world::{Outcome, SOMETIMES, Setup, StoreKind, run};
use galleonfs_storage_engine::replication::{Mutant, Mutants};

const FAULTS_MS: u64 = 60_000;

fn number(name: &str, otherwise: u64) -> u64 {
    let value = std::env::var(name).ok();
    value.map_or(otherwise, |value| {
        value
            .parse()
            .unwrap_or_else(|_| panic!("{name} is a number, not {value:?}"))
    })
}

fn run_seed(seed: u64, mutants: Mutants, store: StoreKind) -> Outcome {
    let faults_ms = FAULTS_MS;
    run(Setup {
        seed,
        faults_ms,
        mutants,
        store,
    })
}

/// Runs seeds on both cores; each is one thread's from its beginning to its end.
fn run_seeds(first: u64, seeds: u64, store: StoreKind, look: impl Fn(u64, Outcome) + Sync) {
    let next = AtomicU64::new(first);
    std::thread::scope(|scope| {
        for _ in 0..2 {
            scope.spawn(|| {
                loop {
                    let seed = next.fetch_add(1, Ordering::Relaxed);
                    if seed >= first + seeds {
                        return;
                    }
                    look(seed, run_seed(seed, Mutants::NONE, store));
                }
            });
        }
    });
}

#[test]
fn no_seed_finds_a_violation_and_every_rare_situation_occurs() {
    let (first, seeds) = (number("FIRST", 1), number("SEEDS", 1_000));
    let violations = Mutex::new(Vec::new());
    let sometimes: Mutex<BTreeMap<&'static str, u64>> = Mutex::default();
    let totals = Mutex::new((0, 0, 0));
    run_seeds(first, seeds, StoreKind::Small, |seed, outcome| {
        if let Some(violation) = outcome.violation {
            violations.lock().expect("no thread panics").push((seed, violation));
        }
        let mut sometimes = sometimes.lock().expect("no thread panics");
        for (what, times) in outcome.sometimes {
            *sometimes.entry(what).or_default() += times;
        }
        let mut totals = totals.lock().expect("no thread panics");
        totals.0 += outcome.virtual_ms;
        totals.1 += outcome.faults;
        totals.2 += outcome.reads + outcome.writes;
    });
    let violations = violations.into_inner().expect("no thread panics");
    let again: Vec<String> = violations
        .iter()
        .map(|(seed, violation)| format!("{violation}\n  again: make sim SEEDS=1 FIRST={seed}"))
        .collect();
    assert!(again.is_empty(), "{}", again.join("\n"));
    let (virtual_ms, faults, checked) = totals.into_inner().expect("no thread panics");
    let hours = virtual_ms as f64 / 3_600_000.0;
    println!(
        "{seeds} seeds: {hours:.1} h of virtual time, {faults} faults, {checked} reads and writes of blocks checked"
    );
    if seeds >= 1_000 {
        let sometimes = sometimes.into_inner().expect("no thread panics");
        let never: Vec<_> = SOMETIMES.iter().filter(|what| !sometimes.contains_key(*what)).collect();
        assert!(never.is_empty(), "never seen: {never:?}");
    }
}

#[test]
fn no_seed_finds_a_violation_on_the_real_store() {
    let (first, seeds) = (number("FIRST", 1), number("REAL_SEEDS", 100));
    let violations = Mutex::new(Vec::new());
    let (cuts, cuts_of_all) = (AtomicU64::new(0), AtomicU64::new(0));
    run_seeds(first, seeds, StoreKind::Real, |seed, outcome| {
        let times = |what| outcome.sometimes.get(what).copied().unwrap_or_default();
        cuts.fetch_add(
            times("a power cut takes writes that were not synced"),
            Ordering::Relaxed,
        );
        cuts_of_all.fetch_add(
            times("a power cut takes writes that were not synced from all replicas"),
            Ordering::Relaxed,
        );
        if let Some(violation) = outcome.violation {
            let text = format!("{violation}\n  again: make sim SEEDS=1 FIRST={seed} REAL=1");
            violations.lock().expect("no thread panics").push(text);
        }
    });
    let violations = violations.into_inner().expect("no thread panics");
    assert!(violations.is_empty(), "{}", violations.join("\n"));
    let (cuts, cuts_of_all) = (cuts.into_inner(), cuts_of_all.into_inner());
    println!("{seeds} seeds: {cuts} power cuts took unsynced writes of a replica, {cuts_of_all} those of all at once");
    if seeds >= 100 {
        assert!(cuts >= 100, "only {cuts} power cuts took writes that were not synced");
        assert!(
            cuts_of_all >= 1,
            "no power cut took such writes from all replicas at once"
        );
    }
}

#[test]
fn the_same_seed_does_the_same_twice() {
    for seed in 1..=10 {
        let run = |seed| run_seed(seed, Mutants::NONE, StoreKind::Small);
        let (one, other) = (run(seed), run(seed));
        assert_eq!((one.trace, one.events), (other.trace, other.events), "seed {seed}");
    }
}

/// Some of the mistakes, each with a seed that finds it soon; `make mutants` tries all of them from the first seed on.
#[test]
fn a_mistake_in_the_protocol_is_found() {
    let found = [
        (Mutant::GapAllowed, 1),
        (Mutant::NotEqualised, 1),
        (Mutant::ReadBesideWrite, 1),
        (Mutant::ReadFromSyncing, 1),
        (Mutant::NoGate, 1),
        (Mutant::NeverDeposed, 1),
        (Mutant::ZeroesNotCopied, 1),
        (Mutant::UnknownIsMade, 1),
        (Mutant::UnknownIsNotMade, 1),
        (Mutant::LeaseNotLookedAt, 1),
        (Mutant::ReplayForgotten, 1),
        (Mutant::FirstUnbound, 180),
        (Mutant::JoinBeforeFlush, 4_500),
        (Mutant::LeaseFromAnswer, 190),
        (Mutant::BootIgnored, 1_000),
    ];
    for (mutant, first) in found {
        let finds = |seed| {
            run_seed(seed, Mutants::only(mutant), StoreKind::Small)
                .violation
                .is_some()
        };
        assert!(
            (first..first + 100).any(finds),
            "{mutant:?} is not found by 100 seeds from {first} on"
        );
    }
}
