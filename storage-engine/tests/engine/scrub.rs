//! Scrubbing: what is damaged is found within a pass, and nothing else ever is.

use galleonfs_storage_engine::BlockEngine;
use galleonfs_storage_engine::io::{Disk, FileId};
use galleonfs_storage_engine::request::{Control, Request};
use galleonfs_storage_engine::store::check::check;
use galleonfs_storage_engine::store::{Damage, DamagedThing, ScrubOrder, ScrubProgress};
use galleonfs_storage_engine::types::{BLOCK_BYTES, Lba};

use crate::harness::{Rig, open, snapshot_id};
use crate::sim_disk::{Random, SimDisk};
use crate::snapshot_model::Run;

const SIZE_BLOCKS: u64 = 30_000;
const AT_ONCE: ScrubOrder = ScrubOrder::Start { bytes_per_second: 0 };

/// A replica with a map of three levels, overwrites, zeroes and snapshots, closed in order.
fn replica(sealed: bool) -> SimDisk {
    let mut rig = Rig::fresh_as(SIZE_BLOCKS, sealed);
    let mut random = Random(3);
    let mut stamp = 1;
    for n in 0..120 {
        if n % 40 == 30 {
            rig.snapshot(snapshot_id(n));
        }
        let (lba, blocks) = (random.below(SIZE_BLOCKS - 16), 1 + random.below(16));
        rig.write(lba, blocks, stamp).unwrap();
        stamp += blocks;
    }
    let (offset, len) = (40 * BLOCK_BYTES, 4_000 * BLOCK_BYTES);
    rig.run(Request::Zero {
        offset,
        len,
        fua: false,
    })
    .unwrap();
    rig.close();
    rig.disk
}

fn opened(disk: &SimDisk) -> Rig {
    let mut disk = disk.clone();
    let (engine, _) = open(&mut disk, 2).unwrap();
    let mut rig = Rig::new(disk, engine);
    rig.settle();
    rig
}

fn pass(rig: &mut Rig) -> ScrubProgress {
    rig.engine.scrub(AT_ONCE);
    rig.settle();
    let progress = rig.engine.scrub_progress();
    assert!(!progress.running, "a pass comes to an end: {:?}", rig.engine);
    progress
}

fn holds(damage: &Damage, file: FileId, byte: u64) -> bool {
    let len = match damage.thing {
        DamagedThing::Page { .. } => 2 * BLOCK_BYTES,
        DamagedThing::Block { .. } | DamagedThing::List => BLOCK_BYTES,
    };
    FileId::Segment(damage.segment) == file && (damage.offset..damage.offset + len).contains(&byte)
}

/// Flips bits by chance: a pass says just where, or finds nothing where the checker finds nothing.
fn flip(sealed: bool, flips: usize) {
    let disk = replica(sealed);
    let mut random = Random(5);
    let files = disk
        .file_ids()
        .into_iter()
        .filter(|file| matches!(file, FileId::Segment(_)));
    let all: Vec<(FileId, u64)> = files
        .flat_map(|file| disk.written_pages(file).into_iter().map(move |page| (file, page)))
        .collect();
    // Pages of the last checkpoint are few among what is written: half of the flips go there.
    let mut reader = disk.clone();
    let mut checkpoint_of = |(file, page): (FileId, u64)| {
        let mut bytes = [0; 4096];
        reader.read(file, page * 4096, &mut bytes).unwrap();
        let number = u64::from_le_bytes(bytes[32..40].try_into().unwrap());
        bytes.starts_with(b"GFSP").then_some(number)
    };
    let last = all.iter().filter_map(|place| checkpoint_of(*place)).max();
    let pages: Vec<(FileId, u64)> = all
        .iter()
        .copied()
        .filter(|place| checkpoint_of(*place) == last)
        .collect();
    let (mut blocks, mut kept, mut leaves, mut inner, mut lists, mut harmless) = (0, 0, 0, 0, 0, 0);
    for n in 0..flips {
        let among = if n % 2 == 0 { &all } else { &pages };
        let (file, page) = among[random.below(among.len() as u64) as usize];
        let (byte, bit) = (page * 4096 + random.below(4096), random.below(8) as u32);
        let what = format!("bit {bit} of byte {byte} of {file:?}");
        let mut rig = opened(&disk);
        rig.disk.flip(file, byte, bit);
        let seen = check(&mut rig.disk.clone()).map_or(true, |report| !report.problems.is_empty());
        let found = pass(&mut rig);
        assert_eq!(found.damaged_count, u64::from(seen), "{what}: {:?}", found.damaged);
        assert_eq!(found.damaged, rig.engine.take_new_damage(), "{what}");
        let Some(damage) = found.damaged.first() else {
            harmless += 1;
            continue;
        };
        assert!(holds(damage, file, byte), "{what}: {damage}");
        match damage.thing {
            DamagedThing::Block { snapshot: None, .. } => blocks += 1,
            DamagedThing::Block { .. } => kept += 1,
            DamagedThing::Page { level: 0, .. } => leaves += 1,
            DamagedThing::Page { .. } => inner += 1,
            DamagedThing::List => lists += 1,
        }
    }
    println!(
        "blocks {blocks}, of snapshots {kept}, leaves {leaves}, inner pages {inner}, lists {lists}, harmless {harmless}"
    );
    for (count, what) in [
        (blocks, "a block"),
        (kept, "a block of a snapshot"),
        (leaves, "a leaf"),
        (inner, "an inner page"),
        (lists, "a list"),
        (harmless, "nothing"),
    ] {
        assert!(count > 0, "no flip hit {what}");
    }
}

#[test]
fn a_flipped_bit_is_found_with_its_place_within_a_pass() {
    flip(false, 500);
}

#[test]
fn a_sealed_replica_is_scrubbed_by_its_checks_alone() {
    flip(true, 500);
}

#[test]
fn nothing_false_is_found_while_guests_snapshots_checkpoints_and_the_cleaner_go_on() {
    let mut passes = 0;
    for seed in 1..=12 {
        let mut run = Run::new(seed);
        for n in 0..250 {
            if n % 3 == 0 {
                let bytes_per_second = [0, 1 << 20, 20 << 20][run.random.below(3) as usize];
                run.rig.engine.scrub(ScrubOrder::Start { bytes_per_second });
            }
            if run.random.chance(3) {
                run.rig.engine.scrub(ScrubOrder::Stop);
            }
            run.step();
            if run.random.chance(30) {
                run.rig.pass_time(40);
            }
            let damaged = run.rig.engine.damage();
            assert!(damaged.is_empty(), "seed {seed}, step {n}: {damaged:?}");
        }
        passes += run.rig.engine.scrub_progress().pass;
        let last = pass(&mut run.rig);
        assert_eq!(last.damaged, [], "seed {seed}");
    }
    assert!(passes > 100, "{passes} passes");
}

#[test]
fn a_write_to_a_damaged_block_takes_it_off_the_list() {
    let mut rig = Rig::fresh(2_000);
    (0..20).for_each(|n| drop(rig.write(n * 50, 8, n * 50 + 1).unwrap()));
    pass(&mut rig);
    let place = |rig: &Rig, lba| {
        let places = rig
            .disk
            .file_ids()
            .into_iter()
            .filter(|file| matches!(file, FileId::Segment(_)));
        let mut found = None;
        for file in places {
            for page in rig.disk.written_pages(file) {
                let mut damaged = rig.disk.clone();
                damaged.flip(file, page * 4096, 0);
                let problems = check(&mut damaged).map_or(Vec::new(), |report| report.problems);
                if problems
                    .iter()
                    .any(|problem| problem.contains(&format!("block {lba} ")))
                {
                    found = Some((file, page));
                }
            }
        }
        found.expect("the block is stored")
    };
    let (file, page) = place(&rig, 100);
    rig.disk.flip(file, page * 4096, 0);
    let found = pass(&mut rig);
    assert!(matches!(
        &found.damaged[..],
        [Damage {
            thing: DamagedThing::Block {
                lba: Lba(100),
                snapshot: None
            },
            ..
        }]
    ));
    assert!(rig.read(100, 1).is_err());
    rig.write(100, 1, 9_000).unwrap();
    assert_eq!(rig.engine.damage(), []);
    assert_eq!(pass(&mut rig).damaged_count, 0);
    assert_eq!(rig.read(100, 1).unwrap(), [9_000]);
}

#[test]
fn a_scrub_keeps_its_pace_and_tells_how_far_it_is() {
    let mut rig = Rig::fresh(8_000);
    (0..31).for_each(|n| drop(rig.write(n * 256, 256, n * 256 + 1).unwrap()));
    rig.pass_time(30_000);
    rig.engine.scrub(ScrubOrder::Start {
        bytes_per_second: 4 << 20,
    });
    let mut last = 0;
    for second in 1..=6 {
        for _ in 0..100 {
            rig.pass_time(10);
        }
        let progress = rig.engine.scrub_progress();
        assert!(progress.running);
        assert!(progress.verified_bytes > last && progress.verified_bytes <= second * (4 << 20) + (256 << 10));
        assert!(
            progress.verified_bytes + (1 << 20) > second * (4 << 20),
            "second {second}: {progress:?}"
        );
        last = progress.verified_bytes;
    }
    for _ in 0..300 {
        rig.pass_time(10);
    }
    let progress = rig.engine.scrub_progress();
    assert!(!progress.running && progress.finished_ms.is_some());
    assert!(progress.verified_bytes >= 31 * 256 * BLOCK_BYTES && progress.total_bytes >= progress.verified_bytes);
    assert_eq!(rig.engine.next_tick_ms(), None, "and then it waits for nothing");
}

#[test]
fn a_pass_reads_neighbours_in_one_go() {
    let mut rig = Rig::fresh(8_000);
    (0..31).for_each(|n| drop(rig.write(n * 256, 256, n * 256 + 1).unwrap()));
    rig.pass_time(30_000);
    rig.engine.scrub(AT_ONCE);
    let mut reads = 0;
    loop {
        rig.poll();
        if rig.outstanding.is_empty() {
            if !rig.engine.scrub_progress().running {
                break;
            }
            rig.engine.tick(rig.now_ms);
            continue;
        }
        reads += 1;
        rig.complete(0);
    }
    // 7,936 blocks, 32 at a time, and 49 pages.
    assert!(reads < 250 + 49 + 40, "{reads} reads");
}

#[test]
fn a_snapshot_that_is_deleted_in_the_middle_of_a_pass_hides_nothing_and_invents_nothing() {
    let mut rig = Rig::fresh(4_000);
    (0..10).for_each(|n| drop(rig.write(n * 200, 100, n * 200 + 1).unwrap()));
    rig.snapshot(snapshot_id(1));
    (0..10).for_each(|n| drop(rig.write(n * 200, 50, 10_000 + n * 200).unwrap()));
    rig.snapshot(snapshot_id(2));
    (0..10).for_each(|n| drop(rig.write(n * 200, 25, 20_000 + n * 200).unwrap()));
    rig.engine.scrub(ScrubOrder::Start {
        bytes_per_second: 1 << 20,
    });
    rig.pass_time(500);
    rig.control(Control::Delete { id: snapshot_id(2) }).unwrap();
    for _ in 0..2_000 {
        rig.pass_time(10);
    }
    let progress = rig.engine.scrub_progress();
    assert!(!progress.running);
    assert_eq!(progress.damaged, []);
}
