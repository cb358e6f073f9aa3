//! Space: a full pool damages nothing, overwriting does not grow without bound, trimming gives back.

use galleonfs_storage_engine::BlockEngine;
use galleonfs_storage_engine::io::FileId;
use galleonfs_storage_engine::request::{Control, Request, RequestError};
use galleonfs_storage_engine::store::{OpenOptions, open_replica};
use galleonfs_storage_engine::types::BLOCK_BYTES;
use galleonfs_storage_engine::volume::{Volume, WhenFull};

use crate::harness::{
    Pool, Rig, SEGMENT_BYTES, Shape, assert_check_passes, format, open, options, snapshot_id, write_request,
};
use crate::sim_disk::{Cut, Random, SimDisk};

#[test]
fn a_full_pool_refuses_writes_and_damages_nothing() {
    let blocks = 8_000;
    let mut rig = Rig::fresh(blocks);
    rig.disk.capacity = Some(14 * SEGMENT_BYTES);
    let mut model = vec![0; blocks as usize];
    let mut refused = 0;
    for n in 0..blocks / 8 {
        match rig.write(n * 8, 8, n * 8 + 1) {
            Ok(_) => (0..8).for_each(|i| model[(n * 8 + i) as usize] = n * 8 + 1 + i),
            Err(RequestError::NoSpace) => refused += 1,
            Err(other) => panic!("a full pool is no other error: {other}"),
        }
    }
    assert!(refused > 0, "the pool is smaller than the volume");
    assert_eq!(rig.read_all(blocks), model, "what was written before is all there");
    rig.flush().unwrap();

    // Trimming works on a full pool, and makes room by itself.
    rig.run(Request::Zero {
        offset: 0,
        len: blocks / 2 * BLOCK_BYTES,
        fua: true,
    })
    .unwrap();
    model[..blocks as usize / 2].fill(0);
    for _ in 0..20 {
        rig.pass_time(2_000);
    }
    rig.write(1, 4, 900_000).unwrap();
    (0..4).for_each(|i| model[1 + i] = 900_000 + i as u64);
    assert_eq!(rig.read_all(blocks), model);

    rig.flush().unwrap();
    let mut disk = rig.disk.cut(Cut::None);
    assert_check_passes(&mut disk);
    let (engine, _) = open(&mut disk, 2).unwrap();
    let mut rig = Rig::new(disk, engine);
    assert_eq!(rig.read_all(blocks), model, "and after a power cut");
}

/// A little more than the time between two tries to make a segment.
const STEP_MS: u64 = 1_100;
/// How many of them without room make a pool full.
const FILL_WAIT_STEPS: u64 = 20;

/// A volume that waits, on a pool with less room than it has blocks; and how many blocks were written until it was full.
fn filled(policy: WhenFull) -> (Rig, u64) {
    let blocks = 8_000;
    let mut disk = SimDisk::default();
    format(&mut disk, blocks);
    let (store, _) = open_replica(&mut disk, options(1)).unwrap();
    let mut rig = Rig::new(disk, Volume::new(store).when_full(policy));
    rig.disk.capacity = Some(14 * SEGMENT_BYTES);
    for n in 0..blocks / 8 {
        let id = rig.submit(write_request(n * 8, 8, n * 8 + 1, false));
        rig.settle();
        // The first to wait only wait for a checkpoint, which needs less room afterwards.
        for _ in 0..FILL_WAIT_STEPS {
            if rig.answers.contains_key(&id) {
                break;
            }
            assert!(rig.engine.waits_for_space());
            rig.pass_time(STEP_MS);
        }
        if rig.answers.remove(&id).is_none() {
            return (rig, n * 8);
        }
        assert!(!rig.engine.waits_for_space());
    }
    panic!("the pool is smaller than the volume");
}

#[test]
fn writes_wait_for_room_and_go_on_by_themselves() {
    let (mut rig, full_at) = filled(WhenFull::Wait);
    let waiting: Vec<_> = (0..3)
        .map(|n| rig.submit(write_request(n * 4, 4, 500_000 + n * 4, false)))
        .collect();
    for _ in 0..50 {
        rig.pass_time(1_100);
    }
    assert!(
        rig.answers.is_empty() && rig.engine.waits_for_space(),
        "nobody was told no"
    );
    // Everything that needs no room works meanwhile.
    assert_eq!(rig.read(full_at - 8, 8).unwrap()[0], full_at - 7);
    rig.flush().unwrap();
    rig.disk.capacity = None;
    rig.pass_time(1_100);
    assert!(
        waiting
            .iter()
            .all(|id| rig.answers.remove(id).is_some_and(|answer| answer.is_ok()))
    );
    assert!(!rig.engine.waits_for_space());
    assert_eq!(rig.read(0, 4).unwrap()[0], 500_000);
    assert_eq!(
        rig.read(full_at, 1).unwrap(),
        [full_at + 1],
        "the first that waited, too"
    );
}

#[test]
fn a_trim_goes_ahead_of_waiting_writes_and_makes_room_for_them() {
    let (mut rig, full_at) = filled(WhenFull::Wait);
    rig.run(Request::Zero {
        offset: 0,
        len: full_at / 2 * BLOCK_BYTES,
        fua: true,
    })
    .unwrap();
    for _ in 0..40 {
        rig.pass_time(1_100);
    }
    assert!(!rig.engine.waits_for_space());
    assert_eq!(rig.read(full_at, 1).unwrap(), [full_at + 1]);
    assert_eq!(rig.read(0, 1).unwrap(), [0]);
}

#[test]
fn a_volume_that_may_refuse_does_so_only_after_its_time() {
    let ms = (FILL_WAIT_STEPS + 5) * STEP_MS;
    let (mut rig, _) = filled(WhenFull::RefuseAfter { ms });
    rig.pass_time(STEP_MS);
    assert!(rig.answers.is_empty());
    for _ in 0..8 {
        rig.pass_time(STEP_MS);
    }
    let answers: Vec<_> = std::mem::take(&mut rig.answers).into_values().collect();
    assert!(matches!(answers[..], [Err(RequestError::NoSpace)]), "{answers:?}");
}

#[test]
fn a_volume_is_closed_although_writes_wait_for_room() {
    let (mut rig, full_at) = filled(WhenFull::Wait);
    rig.engine.close();
    for _ in 0..5 {
        rig.pass_time(1_100);
    }
    let answers: Vec<_> = std::mem::take(&mut rig.answers).into_values().collect();
    assert!(matches!(answers[..], [Err(RequestError::NoSpace)]), "{answers:?}");
    assert!(rig.engine.is_closed());
    let mut disk = rig.disk.cut(Cut::None);
    assert_check_passes(&mut disk);
    let (engine, _) = open(&mut disk, 3).unwrap();
    assert_eq!(Rig::new(disk, engine).read(full_at - 8, 1).unwrap(), [full_at - 7]);
}

#[test]
fn overwriting_for_ever_takes_bounded_space() {
    let blocks = 4_000;
    let mut rig = Rig::fresh(blocks);
    let mut random = Random(9);
    let mut model = vec![0; blocks as usize];
    let mut most = 0;
    for n in 0..12_000 {
        let lba = random.below(blocks - 4);
        rig.write(lba, 4, n * 4 + 1).unwrap();
        (0..4).for_each(|i| model[(lba + i) as usize] = n * 4 + 1 + i);
        most = most.max(rig.disk.allocated());
    }
    let volume = blocks * BLOCK_BYTES;
    assert!(
        most < volume / 4 * 5 + 26 * SEGMENT_BYTES,
        "{} segments for a volume of {}",
        most / SEGMENT_BYTES,
        volume / SEGMENT_BYTES
    );
    let stats = rig.engine.store_stats();
    assert!(stats.moved_bytes > 0, "the cleaner had to work");
    println!(
        "write amplification {:.2}",
        1.0 + (stats.moved_bytes + stats.map_bytes) as f64 / stats.written_bytes as f64
    );
    assert_eq!(rig.read_all(blocks), model);
    rig.close();
    assert_check_passes(&mut rig.disk);
}

#[test]
fn trimmed_space_goes_back_to_the_pool() {
    let blocks = 8_000;
    let mut rig = Rig::fresh(blocks);
    for n in 0..blocks / 100 {
        rig.write(n * 100, 100, n * 100 + 1).unwrap();
    }
    let full = rig.disk.allocated();
    rig.run(Request::Zero {
        offset: 0,
        len: blocks * BLOCK_BYTES,
        fua: true,
    })
    .unwrap();
    for _ in 0..6 {
        rig.pass_time(11_000);
    }
    let after = rig.disk.allocated();
    assert!(
        after < full / 2,
        "{} of {} segments are still taken",
        after / SEGMENT_BYTES,
        full / SEGMENT_BYTES
    );
}

#[test]
fn in_a_roomy_pool_steady_overwriting_makes_no_more_files() {
    let blocks = 4_000;
    let mut rig = Rig::fresh(blocks);
    rig.pool = Pool::Roomy;
    let mut stamp = 1;
    let mut made = Vec::new();
    for _ in 0..12 {
        for lba in (0..blocks).step_by(16) {
            rig.write(lba, 16.min(blocks - lba), stamp).unwrap();
            stamp += 16;
        }
        made.push(std::mem::take(&mut rig.created));
    }
    assert_eq!(made[6..], [0; 6], "files made in each round: {made:?}");
}

fn full_pages(rig: &Rig) -> Vec<FileId> {
    let whole = (SEGMENT_BYTES / 4096) as usize;
    let files = rig.disk.file_ids().into_iter();
    files
        .filter(|file| rig.disk.written_pages(*file).len() == whole)
        .collect()
}

#[test]
fn small_synced_writes_find_segments_that_were_filled_before() {
    let mut rig = Rig::fresh(20_000);
    rig.pool = Pool::Roomy;
    let mut random = Random(4);
    let mut filled = Vec::new();
    for n in 0..600 {
        rig.run(write_request(random.below(20_000), 1, n + 1, true)).unwrap();
        if n == 200 {
            filled = full_pages(&rig);
        }
    }
    assert!(
        !filled.is_empty(),
        "before the first segment was full, the next ones were"
    );
    assert_check_passes(&mut rig.disk);
    // An end in the middle of filling.
    rig.close();
    let mut disk = rig.disk;
    open(&mut disk, 2).unwrap();
}

#[test]
fn a_long_sequential_writer_does_not_pay_for_filling() {
    let blocks = 4_096;
    let mut rig = Rig::fresh(blocks);
    rig.pool = Pool::Roomy;
    for lba in (0..blocks).step_by(256) {
        rig.write(lba, 256, lba + 1).unwrap();
    }
    let written: usize = rig
        .disk
        .file_ids()
        .iter()
        .map(|file| rig.disk.written_pages(*file).len())
        .sum();
    assert!(written < blocks as usize + 300, "{written} pages for {blocks} blocks");
}

/// Writes single blocks all over a volume until the pool is full, and a while longer; returns what was written.
fn fill_the_pool(rig: &mut Rig, blocks: u64) -> Vec<(u64, u64)> {
    let capacity = 24 * SEGMENT_BYTES;
    rig.disk.capacity = Some(capacity);
    let mut random = Random(6);
    let (mut written, mut behind) = (Vec::new(), 0);
    for stamp in 1.. {
        let lba = random.below(blocks);
        if behind == 200 || rig.run_patiently(write_request(lba, 1, stamp, false)).is_err() {
            break;
        }
        written.push((lba, stamp));
        behind += u64::from(rig.disk.allocated() + SEGMENT_BYTES > capacity);
    }
    assert!(
        rig.disk.allocated() + SEGMENT_BYTES > capacity,
        "after {} writes",
        written.len()
    );
    written
}

#[test]
fn a_full_pool_keeps_room_for_the_checkpoint_of_what_it_took() {
    // Each write changes a leaf of its own.
    let blocks = 1 << 22;
    let mut disk = SimDisk::default();
    format(&mut disk, blocks);
    let late = OpenOptions {
        memtable_rows_max: 100_000,
        tail_segments_max: 1_000,
        ..options(1)
    };
    let (store, _) = open_replica(&mut disk, late).unwrap();
    let mut rig = Rig::new(disk, Volume::new(store));
    fill_the_pool(&mut rig, blocks);
    rig.close();
    let (_, report) = open(&mut rig.disk, 2).unwrap();
    assert_eq!(report.replayed_records, 0, "the last checkpoint found its place");
}

#[test]
fn closing_comes_to_an_end_although_the_last_checkpoint_finds_no_space() {
    // A map of four levels, which grows faster than the data.
    let blocks = 1 << 28;
    let mut rig = Rig::fresh(blocks);
    let written = fill_the_pool(&mut rig, blocks);
    rig.close();
    let mut disk = rig.disk;
    let (engine, _) = open(&mut disk, 2).unwrap();
    let mut rig = Rig::new(disk, engine);
    for (lba, stamp) in written.into_iter().step_by(7) {
        assert_eq!(rig.read(lba, 1).unwrap(), [stamp]);
    }
}

#[test]
fn a_full_pool_answers_every_request() {
    for seed in 1..=8 {
        let mut random = Random(seed);
        let shape = Shape::of(seed);
        let blocks = shape.blocks(500 + random.below(6_000));
        let mut rig = Rig::shaped(blocks, shape);
        let block_bytes = rig.block();
        rig.disk.capacity = Some((6 + random.below(14)) * SEGMENT_BYTES + 8192);
        let mut model = vec![0; blocks as usize];
        let mut stamp = 1;
        for _ in 0..700 {
            let lba = random.below(blocks);
            let most = shape.most([1, 8, 256][random.below(3) as usize]);
            let count = 1 + random.below((blocks - lba).min(most));
            let range = lba as usize..(lba + count) as usize;
            if random.chance(60) {
                let mut small = rig.disk.capacity;
                // Others take from the pool, too, and give back.
                if random.chance(5) {
                    std::mem::swap(&mut rig.disk.capacity, &mut small);
                    rig.disk.capacity = Some(rig.disk.allocated());
                }
                match rig.run_patiently(rig.write_request(lba, count, stamp, random.chance(20))) {
                    Ok(_) => model[range]
                        .iter_mut()
                        .zip(stamp..)
                        .for_each(|(block, stamp)| *block = stamp),
                    Err(RequestError::NoSpace) => {}
                    Err(other) => panic!("seed {seed}: {other}"),
                }
                stamp += count;
                rig.disk.capacity = small;
            } else {
                let (offset, len) = (lba * block_bytes, count * block_bytes);
                let zero = Request::Zero {
                    offset,
                    len,
                    fua: false,
                };
                match rig.run_patiently(zero) {
                    Ok(_) => model[range].fill(0),
                    Err(RequestError::NoSpace) => {}
                    Err(other) => panic!("seed {seed}: {other}"),
                }
            }
        }
        assert_eq!(rig.read_all(blocks), model, "seed {seed}");
        rig.flush().unwrap();
        let mut disk = rig.disk.cut(Cut::None);
        assert_check_passes(&mut disk);
    }
}

/// What a volume may hold that nobody writes to: a third more than is needed, and the segments at hand: open ones, the
/// reserve, and a few free ones.
fn quiet_bytes_max(rig: &Rig) -> u64 {
    let needed = rig.engine.store_stats().live_bytes;
    needed / 3 * 4 + 14 * SEGMENT_BYTES
}

/// A minute passes, seen by a driver that calls when it was asked to.
fn a_minute(rig: &mut Rig) {
    let end = rig.now_ms + 60_000;
    while let Some(at) = rig.engine.next_tick_ms().filter(|at| *at <= end) {
        rig.pass_time(at.saturating_sub(rig.now_ms).max(1));
    }
    rig.now_ms = end;
}

fn written(blocks: u64, pool: Pool) -> Rig {
    let mut rig = Rig::fresh(blocks);
    rig.pool = pool;
    for n in 0..blocks / 16 {
        rig.write(n * 16, 16, n * 16 + 1).unwrap();
    }
    rig
}

#[test]
fn scattered_trims_give_their_space_back_within_a_minute() {
    for pool in [Pool::Tight, Pool::Roomy] {
        let blocks = 16_000;
        let mut rig = written(blocks, pool);
        let full = rig.disk.allocated();
        // Half of each segment, here and there.
        for n in (0..blocks / 16).step_by(2) {
            let (offset, len) = (n * 16 * BLOCK_BYTES, 16 * BLOCK_BYTES);
            rig.run(Request::Zero {
                offset,
                len,
                fua: false,
            })
            .unwrap();
        }
        a_minute(&mut rig);
        let (left, most) = (rig.disk.allocated(), quiet_bytes_max(&rig));
        assert!(
            left <= most && left < full / 4 * 3,
            "{left} of {full} bytes; at most {most}"
        );
        assert_eq!(rig.engine.next_tick_ms(), None, "and then it waits for nothing");
        assert_eq!(rig.read(16, 16).unwrap()[3], 20);
        assert_check_passes(&mut rig.disk.cut(Cut::None));
    }
}

#[test]
fn what_only_a_snapshot_needed_comes_back_within_a_minute() {
    let blocks = 8_000;
    let mut rig = written(blocks, Pool::Roomy);
    rig.snapshot(snapshot_id(1));
    for n in 0..blocks / 16 {
        rig.write(n * 16, 16, 100_000 + n * 16).unwrap();
    }
    a_minute(&mut rig);
    let before = rig.disk.allocated();
    assert!(before > 2 * blocks * BLOCK_BYTES, "the snapshot keeps what was there");
    rig.control(Control::Delete { id: snapshot_id(1) }).unwrap();
    a_minute(&mut rig);
    let (left, most) = (rig.disk.allocated(), quiet_bytes_max(&rig));
    assert!(left <= most, "{left} of {before} bytes; at most {most}");
    assert_eq!(rig.engine.next_tick_ms(), None);
}

#[test]
fn a_guest_that_writes_now_and_then_does_not_hold_the_space_up() {
    let blocks = 8_000;
    let mut rig = written(blocks, Pool::Roomy);
    for n in (0..blocks / 16).filter(|n| n % 4 != 0) {
        let (offset, len) = (n * 16 * BLOCK_BYTES, 16 * BLOCK_BYTES);
        rig.run(Request::Zero {
            offset,
            len,
            fua: false,
        })
        .unwrap();
    }
    for n in 0..30 {
        rig.pass_time(2_000);
        rig.write(n, 1, 200_000 + n).unwrap();
    }
    let (left, most) = (rig.disk.allocated(), quiet_bytes_max(&rig));
    assert!(left <= most, "{left} bytes; at most {most}");
}

#[test]
fn a_volume_that_was_busy_in_a_roomy_pool_gives_its_spare_segments_back() {
    let blocks = 4_000;
    let mut rig = written(blocks, Pool::Roomy);
    let mut random = Random(8);
    for n in 0..3_000 {
        rig.write(random.below(blocks - 4), 4, n * 4 + 1).unwrap();
    }
    let busy = rig.disk.allocated();
    a_minute(&mut rig);
    let (left, most) = (rig.disk.allocated(), quiet_bytes_max(&rig));
    assert!(left <= most && left < busy, "{left} of {busy} bytes; at most {most}");
    assert_eq!(rig.engine.next_tick_ms(), None);
}
