//! What a guest feels while a replica that was away is brought up to date.
//!
//! The process of one replica is killed, some hundred MiB are overwritten, and it is started again. A job runs right before
//! that, and again while the replica catches up. What was changed is more than is copied within the job's time, so all of
//! it passes beside the copying.

use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};

use super::fio::{Fio, Measured};
use super::job::{BESIDE_A_RESYNC, Job};
use super::server::Server;

/// The replica is out, or back, after this time at most.
const PATIENCE: Duration = Duration::from_secs(300);
const LOOK: Duration = Duration::from_millis(20);
/// What is overwritten meanwhile, in parts of the volume.
const CHANGED_DIVISOR: u64 = 4;

/// How it went once.
#[derive(Clone, Copy, Debug)]
struct Round {
    before: Measured,
    beside: Measured,
    /// From the start of its process until the replica was in sync.
    took: Duration,
    /// Sent to it in that time: what was copied, and what the guest wrote.
    sent_bytes: u64,
}

/// Measures, and gives a line for each job.
pub fn run(name: &str, server: &mut Server, fio: &Fio<'_>, rounds: usize, time: Duration) -> Result<Vec<String>> {
    let changed = fio.size_bytes / CHANGED_DIVISOR;
    let lines = BESIDE_A_RESYNC.iter().map(|job| {
        let rounds: Result<Vec<Round>> = (0..rounds).map(|_| round(server, fio, job, changed, time)).collect();
        Ok(line(name, job, changed, &rounds?))
    });
    lines.collect()
}

fn round(server: &mut Server, fio: &Fio<'_>, job: &Job, changed: u64, time: Duration) -> Result<Round> {
    server.settle(Duration::from_secs(5))?;
    let before = fio.measure(job, time)?;
    let (replicas, _) = fares(server)?;
    server.ask("kill")?;
    fio.overwrite(changed)?;
    server.start_again()?;
    let start = Instant::now();
    thread::scope(|scope| {
        let watching = scope.spawn(move || {
            loop {
                let (in_sync, sent) = fares(server)?;
                if in_sync == replicas {
                    return Ok((start.elapsed(), sent));
                }
                if start.elapsed() > PATIENCE {
                    bail!("the replica is not in sync after {PATIENCE:?}");
                }
                thread::sleep(LOOK);
            }
        });
        let beside = fio.measure(job, time)?;
        let (took, sent_bytes) = watching.join().expect("it does not panic")?;
        Ok(Round {
            before,
            beside,
            took,
            sent_bytes,
        })
    })
}

/// How many replicas are in sync, and what was sent to the last since it was started.
fn fares(server: &mut Server) -> Result<(usize, u64)> {
    let answer = server.ask("fares")?;
    let (in_sync, sent) = answer.split_once(' ').context("half an answer")?;
    Ok((in_sync.parse()?, sent.parse()?))
}

fn line(name: &str, job: &Job, changed: u64, rounds: &[Round]) -> String {
    let median = |of: &dyn Fn(&Round) -> f64| {
        let mut all: Vec<f64> = rounds.iter().map(of).collect();
        all.sort_unstable_by(f64::total_cmp);
        all[all.len() / 2]
    };
    format!(
        "{name} {}: p50 {:.0} -> {:.0} us, p99 {:.0} -> {:.0} us ({:.2} of without), {:.2} of the operations; \
         {} MiB changed, in sync after {:.1} s and {:.0} MiB",
        job.name,
        median(&|round| round.before.p50_us),
        median(&|round| round.beside.p50_us),
        median(&|round| round.before.p99_us),
        median(&|round| round.beside.p99_us),
        median(&|round| round.beside.p99_us / round.before.p99_us),
        median(&|round| round.beside.iops / round.before.iops),
        changed >> 20,
        median(&|round| round.took.as_secs_f64()),
        median(&|round| round.sent_bytes as f64 / f64::from(1 << 20)),
    )
}
