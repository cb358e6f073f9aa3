//! Bit flips: every flip in bytes that matter is noticed, and wrong data is never returned.

use galleonfs_storage_engine::io::FileId;
use galleonfs_storage_engine::store::check::check;

use crate::harness::{Model, Rig, open, snapshot_id};
use crate::sim_disk::{Random, SimDisk};

const SIZE_BLOCKS: u64 = 2_000;
const FLIPS: usize = 10_000;

/// A replica with a map of two levels, blocks in several segments, overwrites, zeroes, snapshots and a tail behind the
/// checkpoint.
fn replica(clean: bool, snapshots: bool, sealed: bool) -> (SimDisk, Model) {
    let mut rig = Rig::fresh_as(SIZE_BLOCKS, sealed);
    let mut random = Random(7);
    let mut stamp = 1;
    for n in 0..150 {
        if snapshots && n % 40 == 30 {
            rig.snapshot(snapshot_id(n));
        }
        let lba = random.below(SIZE_BLOCKS - 16);
        let blocks = 1 + random.below(16);
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
fn flip(clean: bool, snapshots: bool, sealed: bool, flips: usize) {
    let (disk, state) = replica(clean, snapshots, sealed);
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
                for lba in (0..SIZE_BLOCKS).step_by(100) {
                    match rig.read(lba, 100) {
                        Ok(stamps) => {
                            let expected = &state.head[lba as usize..lba as usize + 100];
                            assert_eq!(stamps, expected, "{what}: wrong data was returned");
                        }
                        Err(_) => failed = true,
                    }
                    for (id, kept) in &state.snapshots {
                        match rig.read_at(*id, lba, 100) {
                            Ok(stamps) => {
                                let expected = &kept[lba as usize..lba as usize + 100];
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
    flip(true, false, false, FLIPS / 2);
}

#[test]
fn a_flipped_bit_is_noticed_and_never_returned_after_a_power_cut() {
    flip(false, false, false, FLIPS / 2);
}

#[test]
fn a_flipped_bit_in_what_snapshots_keep_is_noticed_and_never_returned() {
    flip(true, true, false, FLIPS / 10);
    flip(false, true, false, FLIPS / 10);
}

#[test]
fn a_flipped_bit_of_a_sealed_replica_is_noticed_and_never_returned() {
    flip(true, true, true, FLIPS / 20);
    flip(false, false, true, FLIPS / 20);
}
