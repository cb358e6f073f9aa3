//! How fast a volume is, beside a file on the same disk.
//!
//! Each round fills the volume from its start to its end, and then runs each job first on the raw file and right after
//! it on our devices, one for each setup, through everything that a pod's I/O goes through on its node. What counts is the ratio of such
//! neighbours: the disk below may be another one a minute later, and is the same for both. The second thing that counts
//! is the CPU time our process spends per operation, which a noisy machine changes least.
//!
//! `job` says what is measured, `setup` on what, `fio` measures, `server` is the process under test, `several` that of a
//! volume with several replicas, `resync` what is felt while one of these comes back, `scratch` the place, `report` the
//! outcome.

pub mod fio;
pub mod interrupt;
pub mod job;
pub mod report;
pub mod resync;
pub mod scratch;
pub mod server;
pub mod setup;
pub mod several;

use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};

use crate::lab::layout::write_file;
use fio::Fio;
use interrupt::Interrupt;
use job::Job;
use report::{Pair, Row};
use scratch::Scratch;
use server::{MAP_BUDGET_BYTES, Server, Serving};
use setup::Setup;

/// How long a job's background work is waited for before the next job.
const SETTLE_WAIT_MAX: Duration = Duration::from_secs(5);

/// What to measure, and where.
#[derive(Clone, Debug)]
pub struct Options {
    /// On the disk that is measured.
    pub dir: PathBuf,
    pub size_bytes: u64,
    pub rounds: usize,
    /// The time of each run of a job on the raw file, and of each on our device.
    pub time: Duration,
    pub jobs: Vec<Job>,
    pub setups: Vec<Setup>,
    /// Also what a guest feels while a replica is brought up to date.
    pub resync: bool,
    /// Where the results go, if anywhere.
    pub results: Option<PathBuf>,
}

/// Measures, prints the table, and writes the results if they are wanted.
pub fn run(options: &Options, interrupt: &Interrupt) -> Result<()> {
    if !nix::unistd::geteuid().is_root() {
        bail!("this needs root: it mounts a file system and makes a loop device");
    }
    fio::ensure()?;
    let claim = Scratch::new(&options.dir)?.claim(options.size_bytes, &options.setups)?;
    let scratch = claim.scratch();
    let raw = Fio {
        target: scratch.raw(),
        size_bytes: options.size_bytes,
        interrupt,
    };
    say(&format!("filling the raw file, {} MiB", options.size_bytes >> 20));
    raw.fill()?;
    let program = std::env::current_exe().context("find this program")?;
    let mut volumes = Vec::new();
    for setup in options.setups.iter().copied() {
        let serving = Serving {
            setup,
            size_bytes: options.size_bytes,
            map_budget_bytes: MAP_BUDGET_BYTES,
        };
        let server = Server::start(&program, scratch, serving)?;
        say(&format!(
            "measuring {} at {}, served by process {}",
            setup.name(),
            server.device().display(),
            server.pid()
        ));
        let fio = Fio {
            target: server.device().to_owned(),
            size_bytes: options.size_bytes,
            interrupt,
        };
        volumes.push(Volume { setup, server, fio });
    }
    let found = rounds(options, &raw, &volumes)?;
    let mut resyncs = Vec::new();
    for volume in volumes
        .iter_mut()
        .filter(|volume| options.resync && volume.setup.replicas() > 1)
    {
        let name = volume.setup.name();
        say(&format!("a replica of {name} goes away and comes back"));
        resyncs.extend(resync::run(
            name,
            &mut volume.server,
            &volume.fio,
            options.rounds,
            options.time,
        )?);
    }
    for volume in volumes {
        volume.server.stop()?;
    }
    let rows: Vec<Row> = options
        .jobs
        .iter()
        .zip(&found)
        .flat_map(|(job, pairs)| report::rows(job, &options.setups, pairs))
        .collect();
    print!("\n{}", report::table(&rows));
    println!(
        "medians of {} rounds of {:.0} s; latency of write-fsync is the write's and its sync's; CPU is that of all our processes",
        options.rounds,
        options.time.as_secs_f64()
    );
    if !resyncs.is_empty() {
        println!("\nwhile a replica is brought up to date, and right before:");
        resyncs.iter().for_each(|line| println!("{line}"));
    }
    if let Some(results) = &options.results {
        write_results(results, &rows)?;
        say(&format!("written to {}", results.display()));
    }
    Ok(())
}

/// A volume that is served for the bench.
struct Volume<'a> {
    setup: Setup,
    server: Server,
    fio: Fio<'a>,
}

/// For each job and each of the volumes, the pairs of all rounds.
fn rounds(options: &Options, raw: &Fio<'_>, volumes: &[Volume<'_>]) -> Result<Vec<Vec<Vec<Pair>>>> {
    let start = Instant::now();
    let mut found = vec![vec![Vec::new(); volumes.len()]; options.jobs.len()];
    for round in 1..=options.rounds {
        say(&format!(
            "[{:4.0} s] filling the volumes",
            start.elapsed().as_secs_f64()
        ));
        for volume in volumes {
            volume.fio.fill()?;
        }
        for (job, found) in options.jobs.iter().zip(&mut found) {
            if job.aged {
                say(&format!(
                    "[{:4.0} s] overwriting the volumes",
                    start.elapsed().as_secs_f64()
                ));
                volumes.iter().try_for_each(|volume| volume.fio.age())?;
            }
            for volume in volumes {
                volume.server.settle(SETTLE_WAIT_MAX)?;
            }
            let raw = raw.measure(job, options.time)?;
            for (volume, pairs) in volumes.iter().zip(found) {
                let before = volume.server.cpu()?;
                let ours = volume.fio.measure(job, options.time)?;
                let spent = volume.server.cpu()?.saturating_sub(before);
                let cpu_us = spent.as_secs_f64() * 1e6 / ours.count as f64;
                say(&format!(
                    "[{:4.0} s] round {round} of {}: {:<22} {:<20} {:.2} of raw",
                    start.elapsed().as_secs_f64(),
                    options.rounds,
                    job.name,
                    volume.setup.name(),
                    ours.iops / raw.iops
                ));
                pairs.push(Pair { raw, ours, cpu_us });
            }
        }
    }
    Ok(found)
}

fn write_results(path: &Path, rows: &[Row]) -> Result<()> {
    let text = serde_json::to_string_pretty(rows).context("write the results as JSON")?;
    write_file(path, text + "\n")
}

/// Progress, apart from the table.
fn say(text: &str) {
    eprintln!("{text}");
}
