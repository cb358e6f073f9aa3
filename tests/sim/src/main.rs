//! `make sim`: as many seeds of the simulator as asked.

use std::collections::BTreeMap;
use std::io::Write as _;
use std::process::ExitCode;
use std::time::Instant;

use clap::Parser;
use galleonfs_sim::world::{Setup, StoreKind, run};
use galleonfs_storage_engine::replication::{Mutant, Mutants};

/// Run the replication protocol on simulated nodes that misbehave.
#[derive(Debug, Parser)]
struct Args {
    /// The first seed.
    #[arg(long, default_value_t = 1)]
    first: u64,
    /// How many.
    #[arg(long, default_value_t = 1_000)]
    seeds: u64,
    /// The time of faults of each, in virtual milliseconds.
    #[arg(long, default_value_t = 60_000)]
    faults_ms: u64,
    /// The real store under the replicas: slower, so each seed has fewer faults.
    #[arg(long)]
    real: bool,
    /// Go on after a violation.
    #[arg(long)]
    go_on: bool,
    /// Switch a mistake on, by its name.
    #[arg(long)]
    mutant: Option<String>,
    /// Switch on one mistake after the other: each has to be found by one of the seeds.
    #[arg(long)]
    mutants: bool,
}

fn store_of(args: &Args) -> StoreKind {
    if args.real { StoreKind::Real } else { StoreKind::Small }
}

/// Looks for a seed that finds each mistake.
fn hunt(args: &Args) -> ExitCode {
    let mut missed = Vec::new();
    for mutant in Mutant::ALL {
        let started = Instant::now();
        let mutants = Mutants::only(mutant);
        let faults_ms = args.faults_ms;
        let mut seeds = args.first..args.first + args.seeds;
        let found = seeds.find_map(|seed| {
            let outcome = run(Setup {
                seed,
                faults_ms,
                mutants,
                store: store_of(args),
            });
            outcome.violation.map(|violation| (seed, violation))
        });
        match found {
            Some((seed, violation)) => {
                let first_line: String = violation.chars().take(120).collect();
                println!("{mutant:?}: seed {seed}, {:.0?}: {first_line}", started.elapsed());
            }
            None => {
                println!("{mutant:?}: not found by {} seeds", args.seeds);
                missed.push(mutant);
            }
        }
        let _ = std::io::stdout().flush();
    }
    println!("{} of {} found", Mutant::ALL.len() - missed.len(), Mutant::ALL.len());
    if missed.is_empty() {
        ExitCode::SUCCESS
    } else {
        ExitCode::FAILURE
    }
}

fn main() -> ExitCode {
    let args = Args::parse();
    if args.mutants {
        // An assertion that finds a mistake says so below.
        std::panic::set_hook(Box::new(|_| {}));
        return hunt(&args);
    }
    let mutants = match &args.mutant {
        None => Mutants::NONE,
        Some(name) => match Mutant::ALL.iter().find(|mutant| format!("{mutant:?}") == *name) {
            Some(mutant) => Mutants::only(*mutant),
            None => {
                eprintln!("there is no mutant {name}; there are {:?}", Mutant::ALL);
                return ExitCode::FAILURE;
            }
        },
    };
    let started = Instant::now();
    let mut shown = started;
    let mut sometimes: BTreeMap<&'static str, u64> = BTreeMap::new();
    let (mut events, mut virtual_ms, mut reads, mut writes, mut flushes, mut faults, mut violations) =
        (0, 0, 0, 0, 0, 0, 0);
    for n in 0..args.seeds {
        let seed = args.first + n;
        let (faults_ms, mutants) = (args.faults_ms, mutants);
        let outcome = run(Setup {
            seed,
            faults_ms,
            mutants,
            store: store_of(&args),
        });
        events += outcome.events;
        virtual_ms += outcome.virtual_ms;
        reads += outcome.reads;
        writes += outcome.writes;
        flushes += outcome.flushes;
        faults += outcome.faults;
        for (what, times) in outcome.sometimes {
            *sometimes.entry(what).or_default() += times;
        }
        if let Some(violation) = outcome.violation {
            violations += 1;
            eprintln!("seed {seed}: {violation}");
            let real = if args.real { " REAL=1" } else { "" };
            eprintln!("  again: make sim SEEDS=1 FIRST={seed}{real}");
            if !args.go_on {
                return ExitCode::FAILURE;
            }
        }
        if shown.elapsed().as_secs() >= 5 {
            shown = Instant::now();
            let rate = (n + 1) as f64 / started.elapsed().as_secs_f64();
            println!("{} of {} seeds, {rate:.0} a second", n + 1, args.seeds);
            let _ = std::io::stdout().flush();
        }
    }
    let rate = args.seeds as f64 / started.elapsed().as_secs_f64();
    println!(
        "{} seeds, {rate:.0} a second, {:.1} h of virtual time, {events} events, {faults} faults; {writes} writes, {reads} \
         reads and {flushes} flushes checked; {violations} violations",
        args.seeds,
        virtual_ms as f64 / 3_600_000.0
    );
    for (what, times) in &sometimes {
        println!("{times:>10}  {what}");
    }
    if violations > 0 {
        ExitCode::FAILURE
    } else {
        ExitCode::SUCCESS
    }
}
