//! The memory of the process that serves volumes does not grow with them.
//!
//! A volume of one tebibyte is served by a process of its own, through a real device on a real file system: nothing of
//! it is there but what is written.

use std::fs::{self, File, OpenOptions};
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::Path;
use std::thread;

use galleonfs_tests::bench::scratch::Scratch;
use galleonfs_tests::bench::server::{Server, Serving};
use galleonfs_tests::bench::setup::Setup;

const SIZE_BYTES: u64 = 1 << 40;
/// Far less than the map of what is written below.
const MAP_BUDGET_BYTES: usize = 16 << 20;

const BLOCK: usize = 4096;
const WRITERS: u64 = 16;
const WRITES_EACH: u64 = 2500;
/// Blocks are this far apart, and so each has a map page of its own.
const STRIDE_BYTES: u64 = SIZE_BYTES / (WRITERS * WRITES_EACH) / BLOCK as u64 * BLOCK as u64;
const MAP_PAGE_BYTES: u64 = 4096;

/// Resident memory of a node plugin that has nothing to do.
const IDLE_MAX_BYTES: u64 = 40 << 20;
/// What requests under way may take beside that and the map: buffers of the guest's side and of the disk's.
const UNDER_WAY_MAX_BYTES: u64 = 16 << 20;

#[test]
fn a_volume_of_a_tebibyte_takes_little_memory_idle_and_a_bounded_amount_under_load() {
    const { assert!(WRITERS * WRITES_EACH * MAP_PAGE_BYTES > 8 * MAP_BUDGET_BYTES as u64) };
    let dir = Path::new(env!("CARGO_TARGET_TMPDIR")).join("memory");
    // As much as is written, and as much again for the map and for segments that are not full.
    let claim = Scratch::new(&dir)
        .unwrap()
        .claim(WRITERS * WRITES_EACH * MAP_PAGE_BYTES, &[Setup::OneReplica])
        .unwrap();
    let serving = Serving {
        setup: Setup::OneReplica,
        size_bytes: SIZE_BYTES,
        map_budget_bytes: MAP_BUDGET_BYTES,
    };
    let program = Path::new(env!("CARGO_BIN_EXE_galleonfs-bench"));
    let server = Server::start(program, claim.scratch(), serving).unwrap();
    let idle = memory(&server, "VmRSS");
    assert!(idle <= IDLE_MAX_BYTES, "{idle} bytes before anything was written");

    for_each_block(&server, |file, offset| {
        file.write_all_at(&content(offset).0, offset).unwrap();
    });
    File::open(server.device()).unwrap().sync_all().unwrap();
    for_each_block(&server, |file, offset| {
        let mut found = Aligned([0; BLOCK]);
        file.read_exact_at(&mut found.0, offset).unwrap();
        assert!(found.0 == content(offset).0, "other bytes at {offset}");
    });

    let (peak, rest) = (memory(&server, "VmHWM"), memory(&server, "VmRSS"));
    println!(
        "{} KiB idle, {} KiB at the peak, {} KiB after it",
        idle >> 10,
        peak >> 10,
        rest >> 10
    );
    let bound = idle + MAP_BUDGET_BYTES as u64 + UNDER_WAY_MAX_BYTES;
    assert!(peak <= bound, "{peak} bytes at the peak, and {bound} are allowed");
    server.stop().unwrap();
}

/// Each writer takes blocks from all over the volume.
fn for_each_block(server: &Server, act: impl Fn(&File, u64) + Sync) {
    thread::scope(|scope| {
        for writer in 0..WRITERS {
            let act = &act;
            scope.spawn(move || {
                let mut options = OpenOptions::new();
                let file = options.read(true).write(true).custom_flags(libc::O_DIRECT);
                let file = file.open(server.device()).unwrap();
                for index in 0..WRITES_EACH {
                    act(&file, (index * WRITERS + writer) * STRIDE_BYTES);
                }
            });
        }
    });
}

#[repr(align(4096))]
struct Aligned([u8; BLOCK]);

fn content(offset: u64) -> Box<Aligned> {
    let mut block = Box::new(Aligned([0; BLOCK]));
    for (index, word) in block.0.chunks_exact_mut(8).enumerate() {
        word.copy_from_slice(&(offset + index as u64).to_le_bytes());
    }
    block
}

/// A figure from the kernel's account of the process.
fn memory(server: &Server, figure: &str) -> u64 {
    let status = fs::read_to_string(format!("/proc/{}/status", server.pid())).unwrap();
    let line = status
        .lines()
        .find_map(|line| line.strip_prefix(figure)?.strip_prefix(':'));
    let kib = line.unwrap().trim().strip_suffix(" kB").unwrap();
    kib.parse::<u64>().unwrap() << 10
}
