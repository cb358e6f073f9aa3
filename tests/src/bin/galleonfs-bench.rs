//! `galleonfs-bench`: the speed of a volume beside the speed of a file on the same disk.

use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::Duration;

use anyhow::{Context, Result};
use clap::builder::{PossibleValuesParser, TypedValueParser};
use clap::{Parser, Subcommand, value_parser};
use galleonfs_tests::bench::interrupt::Interrupt;
use galleonfs_tests::bench::job::{JOBS, Job};
use galleonfs_tests::bench::scratch::Scratch;
use galleonfs_tests::bench::setup::Setup;
use galleonfs_tests::bench::{self, server, several};

/// Measure a volume through its block device with fio, beside a raw file on the same disk. Needs root and fio.
#[derive(Parser)]
#[command(name = "galleonfs-bench", version)]
struct Arguments {
    /// A directory on the disk to measure [default: target/bench of the checkout].
    #[arg(long)]
    dir: Option<PathBuf>,
    /// How often each job runs; the results are medians.
    #[arg(long, default_value_t = 3, value_parser = value_parser!(u16).range(1..))]
    rounds: u16,
    /// Seconds of each run of a job, on the raw file and again on the volume.
    #[arg(long, default_value_t = 4, value_parser = value_parser!(u16).range(1..))]
    seconds: u16,
    /// Size of the volume and of the raw file.
    #[arg(long, default_value_t = 2048, value_parser = value_parser!(u32).range(16..))]
    size_mib: u32,
    /// Only these jobs, and write no results; may be given more than once.
    #[arg(long = "job", value_parser = PossibleValuesParser::new(JOBS.map(|job| job.name)).map(job))]
    jobs: Vec<Job>,
    /// Only what a guest feels while a replica is brought up to date.
    #[arg(long, conflicts_with = "jobs")]
    resync: bool,
    /// Only these setups; may be given more than once.
    #[arg(long = "setup", value_parser = PossibleValuesParser::new(Setup::ALL.map(Setup::name)).map(setup))]
    setups: Vec<Setup>,
    #[command(subcommand)]
    command: Option<Command>,
}

#[derive(Subcommand)]
enum Command {
    /// Serve a volume until the standard input ends: the process under test.
    #[command(hide = true)]
    Serve {
        #[arg(value_parser = PossibleValuesParser::new(Setup::ALL.map(Setup::name)).map(setup))]
        setup: Setup,
        size_bytes: u64,
        map_budget_bytes: usize,
    },
    /// Host a replica until the standard input ends; its first line says which.
    #[command(hide = true)]
    ServeReplica,
}

fn job(name: String) -> Job {
    *JOBS.iter().find(|job| job.name == name).expect("clap checked the name")
}

fn setup(name: String) -> Setup {
    Setup::find(&name).expect("clap checked the name")
}

fn main() -> ExitCode {
    match run(Arguments::parse()) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("galleonfs-bench: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn run(arguments: Arguments) -> Result<()> {
    let checkout = Path::new(env!("CARGO_MANIFEST_DIR"))
        .parent()
        .context("the crate has no parent directory")?;
    let own = checkout.join("target/bench");
    let dir = arguments.dir.unwrap_or_else(|| own.clone());
    if let Some(Command::Serve {
        setup,
        size_bytes,
        map_budget_bytes,
    }) = arguments.command
    {
        let serving = server::Serving {
            setup,
            size_bytes,
            map_budget_bytes,
        };
        return server::serve(&Scratch::new(&dir)?, serving);
    }
    if let Some(Command::ServeReplica) = arguments.command {
        return several::host();
    }
    let interrupt = Interrupt::install()?;
    // A part is somebody trying something: what is written stays comparable.
    let all = arguments.jobs.is_empty() && arguments.setups.is_empty() && !arguments.resync;
    let results = all.then(|| own.join("results.json"));
    let options = bench::Options {
        dir,
        size_bytes: u64::from(arguments.size_mib) << 20,
        rounds: arguments.rounds.into(),
        time: Duration::from_secs(arguments.seconds.into()),
        resync: arguments.jobs.is_empty(),
        jobs: if arguments.resync {
            Vec::new()
        } else if arguments.jobs.is_empty() {
            JOBS.to_vec()
        } else {
            arguments.jobs
        },
        setups: if arguments.setups.is_empty() {
            Setup::ALL.to_vec()
        } else {
            arguments.setups
        },
        results,
    };
    bench::run(&options, &interrupt)
}
