//! Bit flips: every flip in bytes that matter is noticed, and wrong data is never returned.

use galleonfs_storage_engine::io::FileId;
use galleonfs_storage_engine::store::check::check;
use galleonfs_storage_engine::types::BlockSize;

use crate::harness::{Model, Rig, Shape, open, snapshot_id};
use crate::sim_disk::{Random, SimDisk};

/// Bytes of a volume, in blocks of 4 KiB.
const SIZE_PAGES: u64 = 2_000;
const FLIPS: usize = 10_000;

/// A replica with a map of two levels, blocks in several segments, overwrites, zeroes, snapshots and a tail behind the
/// checkpoint.
fn replica(clean: bool, snapshots: bool, shape: Shape) -> (SimDisk, Model) {
    let size = shape.blocks(SIZE_PAGES);
    let mut rig = Rig::shaped(size, shape);
    let mut random = Random(7);
    let mut stamp = 1;
    for n in 0..150 {
        if snapshots && n % 40 == 30 {
            rig.snapshot(snapshot_id(n));
        }
        let lba = random.below(size - 16);
        let blocks = 1 + random.below(shape.most(16));
        rig.write(lba, blocks, stamp).unwrap();
        stamp += blocks;
    }
    rig.flush().unwrap();
    rig.pass_time(100);
    if clean {
        rig.close();
    } else {
        // The mark of the flush is in the log; power is cut now.
        rig.disk = rig.disk.cut(crate::sim_disk::Cut::All);
    }
    let mut disk = rig.disk.clone();
    let (engine, _) = open(&mut disk.clone(), 9).unwrap();
    let mut again = Rig::new(disk.clone(), engine);
    let state = again.view();
    disk = rig.disk;
    (disk, state)
}

/// Flips bits by chance; each must be noticed, or lie in a byte that nothing needs: then everything still reads right.
fn flip(clean: bool, snapshots: bool, shape: Shape, flips: usize) {
    let (disk, state) = replica(clean, snapshots, shape);
    let size = shape.blocks(SIZE_PAGES);
    let step = shape.most(100);
    let mut random = Random(if clean { 11 } else { 12 });
    let places: Vec<(FileId, u64)> = disk
        .file_ids()
        .into_iter()
        .flat_map(|file| disk.written_pages(file).into_iter().map(move |page| (file, page)))
        .collect();
    let (mut noticed, mut harmless) = (0, 0);
    for _ in 0..flips {
        let (file, page) = places[random.below(places.len() as u64) as usize];
        let (byte, bit) = (page * 4096 + random.below(4096), random.below(8) as u32);
        let mut damaged = disk.clone();
        damaged.flip(file, byte, bit);
        let what = format!("bit {bit} of byte {byte} of {file:?}");
        let seen = match check(&mut damaged.clone()) {
            Err(_) => true,
            Ok(report) => !report.problems.is_empty(),
        };
        match open(&mut damaged, 9) {
            Err(_) => assert!(seen, "{what}: the checker misses what opening notices"),
            Ok((engine, report)) => {
                let mut rig = Rig::new(damaged, engine);
                let repaired = report.superblock_repaired.is_some() || report.salts_repaired.is_some();
                let mut failed = repaired || !report.damaged_blocks.is_empty();
                for lba in (0..size).step_by(step as usize) {
                    let blocks = step.min(size - lba);
                    let range = lba as usize..(lba + blocks) as usize;
                    match rig.read(lba, blocks) {
                        Ok(stamps) => {
                            let expected = &state.head[range.clone()];
                            assert_eq!(stamps, expected, "{what}: wrong data was returned");
                        }
                        Err(_) => failed = true,
                    }
                    for (id, kept) in &state.snapshots {
                        match rig.read_at(*id, lba, blocks) {
                            Ok(stamps) => {
                                let expected = &kept[range.clone()];
                                assert_eq!(stamps, expected, "{what}: wrong data of {id:?} was returned");
                            }
                            Err(_) => failed = true,
                        }
                    }
                }
                assert_eq!(failed, seen, "{what}: the engine and the checker disagree");
            }
        }
        if seen { noticed += 1 } else { harmless += 1 }
    }
    println!("{noticed} flips noticed, {harmless} in bytes that nothing needs, wrong data returned 0 times");
    assert!(noticed > flips / 4, "most of what is written matters");
}

#[test]
fn a_flipped_bit_is_noticed_and_never_returned_after_an_orderly_end() {
    flip(true, false, Shape::PLAIN, FLIPS / 2);
}

#[test]
fn a_flipped_bit_is_noticed_and_never_returned_after_a_power_cut() {
    flip(false, false, Shape::PLAIN, FLIPS / 2);
}

#[test]
fn a_flipped_bit_in_what_snapshots_keep_is_noticed_and_never_returned() {
    flip(true, true, Shape::PLAIN, FLIPS / 20);
    flip(false, true, Shape::PLAIN, FLIPS / 20);
}

#[test]
fn a_flipped_bit_in_compressed_blocks_is_noticed_and_never_returned() {
    let of = |block_size| Shape {
        block_size,
        sealed: false,
    };
    flip(true, true, of(BlockSize::K16), FLIPS / 20);
    flip(false, true, of(BlockSize::K64), FLIPS / 20);
}

#[test]
fn a_flipped_bit_of_a_sealed_replica_is_noticed_and_never_returned() {
    flip(true, true, Shape::SEALED, FLIPS / 20);
    let block_size = BlockSize::K16;
    let compressed = Shape {
        block_size,
        sealed: true,
    };
    flip(false, false, compressed, FLIPS / 20);
}
