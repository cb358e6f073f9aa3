//! The map at scale: a volume of 1 TiB with 100 million mapped blocks is opened, looked up in, and opened after a crash
//! that left a full memtable's worth of writes behind the checkpoint.
//!
//! The goals: at most 64 MiB of memory for it, open within 2 seconds, and within 10 after a crash. The disk is memory, so
//! the figures are the engine's own time; what a real disk adds is in proportion to the reads that are shown.

#![expect(
    clippy::disallowed_methods,
    reason = "the engine has no clock, whoever measures it does"
)]

mod driven;
mod synthetic;

use std::time::Instant;

use driven::Driven;
use synthetic::Synthetic;

const SIZE_BLOCKS: u64 = 1 << 28;
const LOOKUPS: u64 = 200_000;
/// Just less than what makes a checkpoint due.
const TAIL_BLOCKS: u64 = 128_000;

/// Memory of this process, in KiB.
fn resident_kib() -> u64 {
    let status = std::fs::read_to_string("/proc/self/status").expect("this is Linux");
    let line = status
        .lines()
        .find(|line| line.starts_with("VmRSS"))
        .expect("it is there");
    let figure = line.split_whitespace().nth(1).expect("it has a figure");
    figure.parse().expect("it is a number")
}

fn main() {
    let start = Instant::now();
    let disk = Synthetic::new(SIZE_BLOCKS);
    println!(
        "{} million mapped blocks of a volume of 1 TiB in {} map pages, made in {:.1} s",
        disk.mapped_blocks() / 1_000_000,
        disk.map_pages(),
        start.elapsed().as_secs_f64()
    );
    let before = resident_kib();
    let start = Instant::now();
    let (mut driven, _) = Driven::open(disk, 2);
    println!(
        "opened after an orderly end in {:.3} s with {} reads",
        start.elapsed().as_secs_f64(),
        driven.disk.reads
    );
    let (start, reads) = (Instant::now(), driven.disk.reads);
    driven.look_up(LOOKUPS);
    let took = start.elapsed().as_secs_f64();
    println!(
        "{LOOKUPS} lookups all over it: {:.0} a second, {:.2} reads each; {:.1} MiB more memory than before it was opened",
        LOOKUPS as f64 / took,
        (driven.disk.reads - reads) as f64 / LOOKUPS as f64,
        resident_kib().saturating_sub(before) as f64 / 1024.0
    );
    driven.write(TAIL_BLOCKS);
    let Driven { mut disk, engine, .. } = driven;
    drop(engine); // nobody closed it
    (disk.reads, disk.read_bytes) = (0, 0);
    let start = Instant::now();
    let (driven, report) = Driven::open(disk, 3);
    println!(
        "opened after a crash in {:.3} s: {} records behind the checkpoint, {} MiB read in {} operations",
        start.elapsed().as_secs_f64(),
        report.replayed_records,
        driven.disk.read_bytes >> 20,
        driven.disk.reads
    );
}
