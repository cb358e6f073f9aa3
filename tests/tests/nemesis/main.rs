//! Real engines, devices, connections and processes on three nodes, and somebody who takes them away: the histories of
//! their guests are judged as those of the simulator are.
//!
//! A node is a process in a network of its own (`node`); the volume's object is a value in this process (`object`). `run`
//! is the nemesis; `guest` uses the devices and `record` writes down what happened. Four runs of thirty seconds take all
//! faults in turn, in an order that a seed shuffles.
//!
//! ```text
//! cargo test -p galleonfs-tests --test nemesis
//!   FIRST=seed RUNS=n   n runs from this seed on, instead of 4 from 1; threads and the kernel have their part in each
//! ```

mod guest;
mod node;
mod object;
mod record;
mod run;

use std::process::ExitCode;
use std::time::Instant;

use anyhow::{Context, Result};

const RUNS: u64 = 4;

fn main() -> ExitCode {
    if std::env::args().nth(1).as_deref() == Some(node::ARGUMENT) {
        return told(node::be());
    }
    // What the standard harness understands.
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    if arguments.iter().any(|argument| argument == "--list") {
        println!("histories_of_real_processes_under_a_nemesis_are_those_of_a_disk: test");
        return ExitCode::SUCCESS;
    }
    let filters: Vec<&String> = arguments.iter().filter(|argument| !argument.starts_with('-')).collect();
    let name = "histories_of_real_processes_under_a_nemesis_are_those_of_a_disk";
    if !filters.is_empty() && !filters.iter().any(|filter| name.contains(filter.as_str())) {
        println!("\ntest result: ok. 0 passed; 0 failed; 1 filtered out; finished in 0.00s\n");
        return ExitCode::SUCCESS;
    }
    println!("test {name} ...");
    let start = Instant::now();
    let outcome = all();
    let (verdict, passed) = if outcome.is_ok() { ("ok", 1) } else { ("FAILED", 0) };
    println!(
        "\ntest result: {verdict}. {passed} passed; {} failed; 0 filtered out; finished in {:.2}s\n",
        1 - passed,
        start.elapsed().as_secs_f64()
    );
    told(outcome)
}

fn told(outcome: Result<()>) -> ExitCode {
    match outcome {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("nemesis: {error:?}");
            ExitCode::FAILURE
        }
    }
}

fn all() -> Result<()> {
    let number = |name: &str, default: u64| std::env::var(name).map_or(Ok(default), |text| text.parse());
    let (first, runs) = (number("FIRST", 1)?, number("RUNS", RUNS)?);
    let mut deck = run::Deck::new(first);
    for seed in first..first + runs {
        run::run(seed, &mut deck).with_context(|| format!("seed {seed}: FIRST={seed} RUNS=1 begins alike"))?;
    }
    Ok(())
}
