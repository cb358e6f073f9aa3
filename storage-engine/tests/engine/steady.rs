//! A guest that overwrites for ever, in a pool that has little more than it needs.

use std::collections::VecDeque;

use galleonfs_storage_engine::BlockEngine;
use galleonfs_storage_engine::buffer::{Buf, BufMut};
use galleonfs_storage_engine::io::{Io, IoDone, IoId, Output, perform};
use galleonfs_storage_engine::request::{Request, RequestId};
use galleonfs_storage_engine::store::{FormatOptions, OpenOptions, StoreStats, format_replica, open_replica};
use galleonfs_storage_engine::types::{BLOCK_BYTES, BlockSize, Epoch};
use galleonfs_storage_engine::volume::Volume;

use crate::harness::{IDENTITY, SEGMENT_BYTES};
use crate::lean_disk::LeanDisk;
use crate::sim_disk::Random;

const DEPTH: usize = 32;
/// Operations of the disk that end between two batches of the guest, beside its own.
const BACKGROUND_OPERATIONS: usize = 8;

pub struct Guest {
    pub disk: LeanDisk,
    pub engine: Volume,
    pub outstanding: VecDeque<(IoId, Io)>,
    pub payload: Buf,
    pub random: Random,
    next: u64,
    pub now_ms: u64,
    pub pool_tight: bool,
    pub blocks: u64,
}

impl Guest {
    pub fn new(blocks: u64, pool_tight: bool) -> Guest {
        let mut disk = LeanDisk::default();
        let format = FormatOptions {
            identity: IDENTITY,
            block_size: BlockSize::K4,
            size_blocks: blocks,
            segment_bytes: Some(SEGMENT_BYTES),
            salt: 7,
        };
        format_replica(&mut disk, &format).unwrap();
        let (store, _) = open_replica(&mut disk, OpenOptions::new(IDENTITY, Epoch(1))).unwrap();
        let mut payload = BufMut::zeroed(256 * BLOCK_BYTES as usize);
        payload.as_mut().fill(0x5a);
        Guest {
            disk,
            engine: Volume::new(store),
            outstanding: VecDeque::new(),
            payload: payload.freeze(),
            random: Random(11),
            next: 0,
            now_ms: 0,
            pool_tight,
            blocks,
        }
    }

    fn step(&mut self) -> usize {
        let mut answered = 0;
        while let Some(output) = self.engine.poll() {
            match output {
                Output::Io(id, io) => self.outstanding.push_back((id, io)),
                Output::Answer(_, answer) => {
                    answer.expect("the pool has room");
                    answered += 1;
                }
            }
        }
        answered
    }

    /// Ends the oldest operation of the disk, or tells the time if the engine waits for nothing but its next turn; false
    /// if there is neither.
    pub fn complete_one(&mut self) -> bool {
        let Some((id, io)) = self.outstanding.pop_front() else {
            let due = self.engine.next_tick_ms().is_some_and(|at| at <= self.now_ms);
            self.engine.tick(self.now_ms);
            return due;
        };
        let made = matches!(io, Io::Create { .. });
        let pool_tight = self.pool_tight;
        let result = perform(&mut self.disk, io).map(|done| if made { IoDone::Created { pool_tight } } else { done });
        self.engine.completed(id, result);
        true
    }

    /// Writes at these places, all at once, until all are answered.
    fn write(&mut self, places: impl Iterator<Item = (u64, u64)>) {
        let mut waiting = 0;
        for (lba, count) in places {
            self.next += 1;
            waiting += 1;
            let data = self.payload.slice(0..(count * BLOCK_BYTES) as usize);
            let offset = lba * BLOCK_BYTES;
            self.engine.submit(
                RequestId(self.next),
                Request::Write {
                    offset,
                    data,
                    fua: false,
                },
            );
        }
        self.now_ms += 1;
        self.engine.tick(self.now_ms);
        let mut turns = 0;
        while waiting > 0 {
            waiting -= self.step();
            if waiting > 0 && !self.complete_one() {
                self.now_ms += 100;
                self.engine.tick(self.now_ms);
                turns += 1;
                assert!(turns < 1_000, "the guest waits for ever: {:?}", self.engine);
            }
        }
        // The disk is not the guest's alone.
        for _ in 0..BACKGROUND_OPERATIONS {
            assert_eq!(self.step(), 0);
            if !self.complete_one() {
                break;
            }
        }
    }

    pub fn fill(&mut self) {
        for lba in (0..self.blocks).step_by(256) {
            self.write([(lba, 256.min(self.blocks - lba))].into_iter());
        }
    }

    /// Overwrites `blocks` blocks, `each` at a time, and tells what that cost.
    pub fn overwrite(&mut self, blocks: u64, each: u64, hot_percent: u64) -> StoreStats {
        let before = self.engine.store_stats();
        for _ in 0..blocks / each / DEPTH as u64 {
            let mut random = self.random.clone();
            let slots = self.blocks / each;
            let places: Vec<_> = (0..DEPTH)
                .map(|_| {
                    // So much of the writes goes to the rest of the volume.
                    let slot = if hot_percent > 0 && random.chance(hot_percent) {
                        random.below(slots * (100 - hot_percent) / 100)
                    } else {
                        random.below(slots)
                    };
                    (slot * each, each)
                })
                .collect();
            self.random = random;
            self.write(places.into_iter());
        }
        let after = self.engine.store_stats();
        StoreStats {
            written_bytes: after.written_bytes - before.written_bytes,
            stored_bytes: after.stored_bytes - before.stored_bytes,
            moved_bytes: after.moved_bytes - before.moved_bytes,
            map_bytes: after.map_bytes - before.map_bytes,
            header_bytes: after.header_bytes - before.header_bytes,
            filled_bytes: after.filled_bytes - before.filled_bytes,
            checkpoints: after.checkpoints - before.checkpoints,
            ..after
        }
    }
}

/// Bytes written to the disk for each byte that the guest overwrites, `each` blocks at a time, in a pool of which so many
/// hundredths are needed.
fn amplification(mib: u64, percent: u64, each: u64, hot_percent: u64) -> f64 {
    let blocks = mib << 8;
    let mut guest = Guest::new(blocks, true);
    guest.disk.capacity = Some((mib << 20) * 100 / percent);
    guest.fill();
    guest.overwrite(blocks * 2, each, hot_percent);
    let stats = guest.overwrite(blocks * 2, each, hot_percent);
    let per = |bytes: u64| bytes as f64 / stats.written_bytes as f64;
    let all = stats.write_amplification().expect("it wrote");
    println!(
        "{each} blocks at a time, {percent} of 100 needed, {hot_percent} hot: {all:.2} (moved {:.2}, map {:.2}, headers {:.2}, \
         filled {:.2}), {} checkpoints",
        per(stats.moved_bytes),
        per(stats.map_bytes),
        per(stats.header_bytes),
        per(stats.filled_bytes),
        stats.checkpoints
    );
    all
}

#[test]
fn overwriting_single_blocks_of_a_pool_that_is_seventy_percent_needed_writes_less_than_three_times() {
    assert!(amplification(256, 70, 1, 0) < 3.0);
}

#[test]
fn overwriting_in_larger_pieces_does_so_in_a_pool_that_is_eighty_percent_needed() {
    assert!(amplification(192, 80, 64, 0) < 3.0);
}

#[test]
fn a_replica_that_grew_in_a_roomy_pool_shrinks_to_what_it_was_promised() {
    let blocks = 200 << 8;
    let mut guest = Guest::new(blocks, false);
    guest.fill();
    guest.overwrite(blocks * 2, 16, 0);
    let promised = blocks * BLOCK_BYTES / 4 * 5 + (80 << 20);
    let roomy = guest.disk.allocated();
    assert!(roomy > promised + 4 * SEGMENT_BYTES, "{roomy} bytes in a roomy pool");
    guest.pool_tight = true;
    guest.overwrite(blocks, 16, 0);
    let mut most = 0;
    for _ in 0..20 {
        guest.overwrite(blocks / 20, 16, 0);
        most = most.max(guest.disk.allocated());
    }
    assert!(most <= promised, "{most} bytes in a tight pool, {promised} promised");
}
