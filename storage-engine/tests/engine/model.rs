//! The engine against a model: whatever happens in an orderly life, it reads like a plain array of blocks.

use galleonfs_storage_engine::BlockEngine;
use galleonfs_storage_engine::request::{Request, RequestError};
use galleonfs_storage_engine::types::BLOCK_BYTES;

use crate::harness::{Rig, SEGMENT_BYTES, Shape, assert_check_passes, open};
use crate::sim_disk::{Cut, Random};

#[test]
fn the_volume_reads_like_an_array_of_blocks() {
    for seed in 1..=12 {
        let mut random = Random(seed);
        // Sealed or not, compressed or not, and whatever its blocks: to a guest it is the same.
        let shape = Shape::of(seed);
        let mut size = shape.blocks(300 + random.below(3_000));
        let mut rig = Rig::shaped(size, shape);
        let block_bytes = rig.block();
        let mut model = vec![0; size as usize];
        let (mut stamp, mut epoch) = (1, 1);
        for _ in 0..400 {
            let lba = random.below(size);
            match random.below(20) {
                0..=11 => {
                    let most = shape.most(if random.chance(5) { 256 } else { 8 });
                    let blocks = 1 + random.below((size - lba).min(most));
                    rig.write(lba, blocks, stamp).unwrap();
                    for n in 0..blocks {
                        model[(lba + n) as usize] = stamp + n;
                    }
                    stamp += blocks;
                }
                12 | 13 => {
                    let blocks = 1 + random.below(size - lba);
                    let (offset, len) = (lba * block_bytes, blocks * block_bytes);
                    rig.run(Request::Zero {
                        offset,
                        len,
                        fua: random.chance(20),
                    })
                    .unwrap();
                    model[lba as usize..(lba + blocks) as usize].fill(0);
                }
                14 => drop(rig.flush().unwrap()),
                15 => rig.pass_time(random.below(20_000)),
                16 if random.chance(30) => {
                    rig.close();
                    epoch += 1;
                    assert_check_passes(&mut rig.disk);
                    let mut disk = rig.disk;
                    let (engine, report) = open(&mut disk, epoch).unwrap();
                    assert_eq!(report.replayed_records, 0, "nothing is replayed after an orderly end");
                    rig = Rig::new(disk, engine);
                }
                17 if random.chance(30) => {
                    size += random.below(2_000) / u64::from(shape.block_size.pages());
                    rig.run(Request::Grow {
                        len: size * block_bytes,
                    })
                    .unwrap();
                    model.resize(size as usize, 0);
                }
                _ => {
                    let blocks = 1 + random.below((size - lba).min(256));
                    assert_eq!(
                        rig.read(lba, blocks).unwrap(),
                        model[lba as usize..(lba + blocks) as usize],
                        "seed {seed}"
                    );
                }
            }
        }
        assert_eq!(rig.read_all(size), model, "seed {seed}");
        rig.close();
        assert_check_passes(&mut rig.disk);
    }
}

#[test]
fn requests_outside_the_volume_or_not_aligned_are_refused_and_change_nothing() {
    let mut rig = Rig::fresh(100);
    let end = 100 * BLOCK_BYTES;
    let bad = [
        (0, 511),
        (100, 512),
        (end, BLOCK_BYTES),
        (end - 512, 1024),
        (end - BLOCK_BYTES, 2 * BLOCK_BYTES),
        (u64::MAX - 4095, 4096),
        (0, 0),
    ];
    for (offset, len) in bad {
        let answer = rig.run(Request::Read { offset, len });
        assert!(
            matches!(answer, Err(RequestError::Invalid(_))),
            "read of {len} at {offset}: {answer:?}"
        );
        let answer = rig.run(Request::Zero {
            offset,
            len,
            fua: false,
        });
        assert!(
            matches!(answer, Err(RequestError::Invalid(_))),
            "zero of {len} at {offset}: {answer:?}"
        );
    }
    assert!(
        matches!(
            rig.run(Request::Grow { len: end - BLOCK_BYTES }),
            Err(RequestError::Invalid(_))
        ),
        "never smaller"
    );
}

#[test]
fn a_map_of_four_levels_works_like_one_of_two() {
    let blocks = 1 << 28; // 1 TiB
    let mut rig = Rig::fresh(blocks);
    let mut random = Random(3);
    let mut written = Vec::new();
    for n in 0..300 {
        let lba = random.below(blocks);
        rig.write(lba, 1, n + 1).unwrap();
        written.push((lba, n + 1));
    }
    rig.run(Request::Zero {
        offset: 0,
        len: blocks / 2 * BLOCK_BYTES,
        fua: true,
    })
    .unwrap();
    rig.pass_time(20_000);
    for (lba, stamp) in &written {
        let expected = if *lba < blocks / 2 { 0 } else { *stamp };
        assert_eq!(rig.read(*lba, 1).unwrap(), [expected], "block {lba}");
    }
    rig.run(Request::Zero {
        offset: 0,
        len: blocks * BLOCK_BYTES,
        fua: true,
    })
    .unwrap();
    rig.close();
    assert_check_passes(&mut rig.disk);
    assert_eq!(
        rig.engine.store_stats().live_bytes,
        0,
        "a volume that was zeroed whole needs nothing"
    );
}

#[test]
fn memory_is_bounded_by_the_budget_and_not_by_the_volume() {
    let blocks = 1 << 28;
    let mut rig = Rig::fresh(blocks);
    let mut random = Random(5);
    for n in 0..2_000 {
        rig.write(random.below(blocks), 1, n + 1).unwrap();
    }
    for _ in 0..2_000 {
        rig.read(random.below(blocks), 1).unwrap();
    }
    let stats = rig.engine.store_stats();
    assert!(
        stats.cached_pages <= 64,
        "{} map pages in memory, the budget is 64",
        stats.cached_pages
    );
    assert!(
        rig.disk.allocated() < 120 * SEGMENT_BYTES,
        "a thin volume takes what was written, not 1 TiB"
    );
}

#[test]
fn flushes_that_wait_together_share_one_sync() {
    let mut rig = Rig::fresh(1_000);
    for n in 0..32 {
        rig.submit(crate::harness::write_request(n, 1, n + 1, false));
    }
    rig.settle();
    let ids: Vec<_> = (0..32).map(|_| rig.submit(Request::Flush)).collect();
    rig.poll();
    let syncs = rig.outstanding.len();
    rig.settle();
    assert_eq!(syncs, 1, "32 flushes, one sync");
    assert!(ids.iter().all(|id| rig.answers[id].is_ok()));
}

#[test]
fn a_flush_is_not_answered_before_the_disk_synced() {
    let mut rig = Rig::fresh(1_000);
    rig.write(1, 1, 1).unwrap();
    let id = rig.submit(Request::Flush);
    rig.poll();
    assert!(!rig.answers.contains_key(&id));
    assert_eq!(rig.outstanding.len(), 1);
    rig.settle();
    assert!(rig.answers[&id].is_ok());
}

#[test]
fn an_idle_volume_waits_for_nothing() {
    let mut rig = Rig::fresh(1_000);
    rig.write(1, 1, 1).unwrap();
    rig.flush().unwrap();
    rig.pass_time(60_000);
    rig.pass_time(60_000);
    assert_eq!(rig.engine.next_tick_ms(), None);
    assert!(rig.outstanding.is_empty());
}

#[test]
fn a_failed_write_stops_the_store_and_is_never_retried() {
    let mut rig = Rig::fresh(1_000);
    rig.write(1, 1, 1).unwrap();
    rig.flush().unwrap();
    rig.disk.fail_next = true;
    assert!(matches!(rig.write(2, 1, 2), Err(RequestError::Failed(_))));
    assert!(
        matches!(rig.write(3, 1, 3), Err(RequestError::Failed(_))),
        "nothing is written after a failed write"
    );
    assert!(matches!(rig.flush(), Err(RequestError::Failed(_))));
    assert_eq!(rig.read(1, 1).unwrap(), [1], "what is there can still be read");
}

#[test]
fn a_failed_sync_stops_the_store_and_is_never_retried() {
    let mut rig = Rig::fresh(1_000);
    rig.write(1, 1, 1).unwrap();
    rig.disk.fail_next = true;
    assert!(matches!(rig.flush(), Err(RequestError::Failed(_))));
    assert!(matches!(rig.flush(), Err(RequestError::Failed(_))));
}

#[test]
fn a_volume_that_writes_through_has_each_write_after_a_power_cut_without_a_flush() {
    for through in [false, true] {
        let mut rig = Rig::fresh(64);
        rig.engine = rig.engine.writes_through(through);
        rig.write(0, 4, 7).unwrap();
        rig.run(Request::Zero {
            offset: 0,
            len: BLOCK_BYTES,
            fua: false,
        })
        .unwrap();
        let mut disk = rig.disk.cut(Cut::None);
        let (engine, _) = open(&mut disk, 2).unwrap();
        let mut rig = Rig::new(disk, engine);
        let expected = if through { [0, 8, 9, 10] } else { [0; 4] };
        assert_eq!(rig.read(0, 4).unwrap(), expected, "writes through: {through}");
    }
}
