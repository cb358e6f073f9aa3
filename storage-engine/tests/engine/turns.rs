//! While a guest keeps writing, background work comes in small pieces: what is done between two looks at the guest is
//! counted, not timed, over whole checkpoints and beside the cleaner.

use galleonfs_storage_engine::BlockEngine;
use galleonfs_storage_engine::io::{Io, Output};
use galleonfs_storage_engine::request::{Request, RequestId};
use galleonfs_storage_engine::types::BLOCK_BYTES;

use crate::harness::Pool;
use crate::steady::Guest;

const DEPTH: u64 = 32;
/// Pages that a turn may make: 32, and a path more; or in proportion to what a guest brings at a time.
const PAGES_MAX: u64 = 48;
/// Blocks that a turn may move, and what the cleaner reads at once: a record of them.
const MOVED_BYTES_MAX: u64 = 512 << 10;
const READ_BYTES_MAX: u64 = 129 * 4096;

/// The most that was done between two looks at the guest.
#[derive(Debug, Default)]
struct Most {
    pages: u64,
    meta_writes: u64,
    moved_bytes: u64,
    read_bytes: u64,
}

/// Keeps [`DEPTH`] writes with the engine until `done`, one operation of the disk at a time.
fn keep_writing(guest: &mut Guest, done: impl Fn(&Guest) -> bool) -> Most {
    let mut most = Most::default();
    let mut wanted = DEPTH;
    let mut number = u64::MAX / 2 + guest.now_ms;
    let mut looks = 0u64;
    while !done(guest) {
        for _ in 0..std::mem::take(&mut wanted) {
            number += 1;
            let offset = guest.random.below(guest.blocks) * BLOCK_BYTES;
            let data = guest.payload.slice(0..BLOCK_BYTES as usize);
            let write = Request::Write {
                offset,
                data,
                fua: false,
            };
            guest.engine.submit(RequestId(number), write);
        }
        looks += 1;
        guest.now_ms += u64::from(looks.is_multiple_of(16));
        guest.engine.tick(guest.now_ms);
        let before = guest.engine.store_stats();
        let (mut meta_writes, mut read_bytes) = (0, 0);
        while let Some(output) = guest.engine.poll() {
            match output {
                Output::Answer(_, answer) => {
                    answer.expect("the pool has room");
                    wanted += 1;
                }
                Output::Io(id, io) => {
                    match &io {
                        Io::Write { parts, .. } => {
                            let pages = parts.iter().all(|part| part.as_ref().starts_with(b"GFSP"));
                            meta_writes += u64::from(pages);
                        }
                        Io::Read { buf, .. } => read_bytes += buf.len() as u64,
                        Io::Sync { .. } | Io::Create { .. } | Io::Remove { .. } => {}
                    }
                    guest.outstanding.push_back((id, io));
                }
            }
        }
        let after = guest.engine.store_stats();
        most.pages = most.pages.max((after.map_bytes - before.map_bytes) / 4096);
        most.moved_bytes = most.moved_bytes.max(after.moved_bytes - before.moved_bytes);
        most.meta_writes = most.meta_writes.max(meta_writes);
        most.read_bytes = most.read_bytes.max(read_bytes);
        guest.complete_one();
    }
    most
}

#[test]
fn whole_checkpoints_are_made_in_pieces_between_the_writes_of_a_guest() {
    // 2,341 leaves, of which each checkpoint makes all.
    let blocks = 1536 << 8;
    let mut guest = Guest::new(blocks, Pool::Roomy);
    guest.fill();
    let before = guest.engine.store_stats();
    let most = keep_writing(&mut guest, |guest| {
        guest.engine.store_stats().checkpoints >= before.checkpoints + 3
    });
    let after = guest.engine.store_stats();
    let each = (after.map_bytes - before.map_bytes) / 4096 / 3;
    println!("{each} pages in a checkpoint; at most, between two looks at the guest: {most:?}");
    assert!(each > 1_000, "each checkpoint had something to do");
    assert!(most.pages <= PAGES_MAX && most.meta_writes <= 2, "{most:?}");
}

#[test]
fn the_cleaner_works_in_pieces_between_the_writes_of_a_guest() {
    let blocks = 192 << 8;
    let mut guest = Guest::new(blocks, Pool::Tight);
    guest.disk.capacity = Some((192 << 20) * 10 / 7);
    guest.fill();
    guest.overwrite(blocks, 1, 0);
    let before = guest.engine.store_stats();
    let most = keep_writing(&mut guest, |guest| {
        guest.engine.store_stats().written_bytes >= before.written_bytes + (192 << 20)
    });
    let moved = guest.engine.store_stats().moved_bytes - before.moved_bytes;
    println!(
        "{} MiB moved; at most, between two looks at the guest: {most:?}",
        moved >> 20
    );
    assert!(moved > 64 << 20, "the cleaner had to work");
    // While writes wait for space a turn is four times as long.
    assert!(most.pages <= 4 * PAGES_MAX, "{most:?}");
    assert!(
        most.moved_bytes <= MOVED_BYTES_MAX && most.read_bytes <= READ_BYTES_MAX,
        "{most:?}"
    );
}
