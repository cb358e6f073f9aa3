//! Snapshots: what they cost, what is refused, what becomes of their space.

use galleonfs_storage_engine::io::Io;
use galleonfs_storage_engine::request::{Control, Request, RequestError, Scan};
use galleonfs_storage_engine::types::{BLOCK_BYTES, SnapshotId};
use galleonfs_storage_engine::volume::WhenFull;

use crate::harness::{Change, Model, Rig, SEGMENT_BYTES, assert_check_passes, open, snapshot_id, write_request};
use crate::sim_disk::{Cut, Random};

fn refused(rig: &mut Rig, control: Control) -> String {
    match rig.control(control) {
        Err(RequestError::Invalid(text)) => text,
        other => panic!("{control:?} is refused, not {other:?}"),
    }
}

#[test]
fn what_makes_no_sense_is_refused_and_says_what_was_expected() {
    let mut rig = Rig::fresh(100);
    let (first, second, unknown) = (snapshot_id(1), snapshot_id(2), snapshot_id(9));
    assert!(refused(&mut rig, Control::Delete { id: unknown }).contains("it has none"));
    rig.snapshot(first);
    rig.write(1, 1, 5).unwrap();
    rig.snapshot(second);
    let time_ms = 0;
    assert!(refused(&mut rig, Control::Snapshot { id: first, time_ms }).contains("exists"));
    let zeros = SnapshotId([0; 16]);
    assert!(refused(&mut rig, Control::Snapshot { id: zeros, time_ms }).contains("name"));
    let text = refused(&mut rig, Control::Delete { id: unknown });
    assert!(
        text.contains(&unknown.to_string()) && text.contains(&second.to_string()),
        "{text}"
    );
    let discard_newer = false;
    let text = refused(
        &mut rig,
        Control::Revert {
            id: first,
            discard_newer,
        },
    );
    assert!(text.contains(&second.to_string()) && text.contains("consent"), "{text}");
    assert_eq!(rig.read(1, 1).unwrap(), [5], "nothing was reverted");
    let len = BLOCK_BYTES;
    rig.run(Request::Grow { len: 200 * len }).unwrap();
    let text = refused(
        &mut rig,
        Control::Read {
            id: first,
            offset: 100 * len,
            len,
        },
    );
    assert!(text.contains("which has 100"), "{text}");
    assert!(
        refused(
            &mut rig,
            Control::Read {
                id: unknown,
                offset: 0,
                len
            }
        )
        .contains("no snapshot")
    );
    assert!(
        refused(
            &mut rig,
            Control::Read {
                id: first,
                offset: 1,
                len
            }
        )
        .contains("multiples")
    );
    let list = |from, to| Control::List {
        scan: Scan::Changed { from, to },
        offset: 0,
        ranges_max: 9,
    };
    assert!(refused(&mut rig, list(second, Some(first))).contains("older"));
    assert!(refused(&mut rig, list(unknown, None)).contains("no snapshot"));
    rig.control(Control::Delete { id: first }).unwrap();
    assert!(
        refused(
            &mut rig,
            Control::Read {
                id: first,
                offset: 0,
                len
            }
        )
        .contains("no snapshot")
    );
}

#[test]
fn a_snapshot_holds_the_writes_before_it_and_none_behind() {
    let mut rig = Rig::fresh(100);
    let before: Vec<_> = (0..20).map(|n| rig.submit(write_request(n, 1, n + 1, false))).collect();
    let id = snapshot_id(1);
    let order = rig.order(Control::Snapshot { id, time_ms: 0 });
    let behind: Vec<_> = (0..20)
        .map(|n| rig.submit(write_request(n, 1, n + 100, false)))
        .collect();
    rig.settle();
    for request in before.into_iter().chain([order]).chain(behind) {
        rig.answers.remove(&request).unwrap().unwrap();
    }
    assert_eq!(rig.read_at(id, 0, 20).unwrap(), (1..21).collect::<Vec<_>>());
    assert_eq!(rig.read(0, 20).unwrap(), (100..120).collect::<Vec<_>>());
}

#[test]
fn taking_a_snapshot_costs_one_record_and_one_sync_whatever_the_size() {
    let mut costs = Vec::new();
    for blocks in [100, 20_000] {
        let mut rig = Rig::fresh(1 << 28);
        for n in 0..blocks / 50 {
            rig.write(n * 50, 50, n * 50 + 1).unwrap();
        }
        rig.flush().unwrap();
        rig.pass_time(20_000);
        rig.order(Control::Snapshot {
            id: snapshot_id(1),
            time_ms: 0,
        });
        let mut operations = 0;
        rig.poll();
        while !rig.outstanding.is_empty() {
            // A segment made ahead of need keeps nobody waiting.
            operations += u64::from(!matches!(rig.outstanding[0].1, Io::Create { .. }));
            rig.complete(0);
            rig.poll();
        }
        assert_eq!(rig.answers.len(), 1);
        costs.push(operations);
    }
    assert_eq!(costs, [2, 2], "operations");
}

#[test]
#[expect(
    clippy::disallowed_methods,
    reason = "the engine reads no clock; whoever measures it does"
)]
fn five_hundred_snapshots_cost_a_read_nothing() {
    // Thirty leaves: the whole map fits into the cache, so what is counted is not what happened to be in it.
    let blocks = 5_000;
    let cost = |snapshots: u64| {
        let mut rig = Rig::fresh(blocks);
        let mut random = Random(4);
        for n in 0..500 {
            rig.write(random.below(blocks), 1, n + 1).unwrap();
            if n < snapshots {
                rig.snapshot(snapshot_id(n + 1));
            }
        }
        rig.flush().unwrap();
        rig.pass_time(20_000);
        rig.pass_time(20_000);
        assert_eq!(rig.engine.snapshots().len() as u64, snapshots);
        rig.read_all(blocks);
        let started = std::time::Instant::now();
        for n in 0..20_000 {
            rig.submit(Request::Read {
                offset: (n * 37 % blocks) * BLOCK_BYTES,
                len: BLOCK_BYTES,
            });
            rig.poll();
            while !rig.outstanding.is_empty() {
                rig.complete(0);
                rig.poll();
            }
            rig.answers.clear();
        }
        println!(
            "{snapshots} snapshots: {} ns for a read",
            started.elapsed().as_nanos() / 20_000
        );
        let mut operations = 0;
        for n in 0..500 {
            rig.submit(Request::Read {
                offset: (n * 37 % blocks) * BLOCK_BYTES,
                len: BLOCK_BYTES,
            });
            rig.poll();
            while !rig.outstanding.is_empty() {
                operations += 1;
                rig.complete(0);
                rig.poll();
            }
        }
        if snapshots > 0 {
            let mut disk = rig.disk.cut(Cut::None);
            assert_check_passes(&mut disk);
            let (engine, _) = open(&mut disk, 2).unwrap();
            assert_eq!(engine.snapshots().len() as u64, snapshots);
        }
        operations
    };
    let without = cost(0);
    assert_eq!(cost(500), without, "disk operations for 500 reads");
}

#[test]
fn the_space_of_deleted_snapshots_comes_back() {
    let blocks = 2_000;
    let mut rig = Rig::fresh(blocks);
    let fill = |rig: &mut Rig, round: u64| {
        for n in 0..blocks / 100 {
            rig.write(n * 100, 100, round * 10_000 + n * 100 + 1).unwrap();
        }
    };
    for round in 1..=5 {
        fill(&mut rig, round);
        rig.snapshot(snapshot_id(round));
    }
    fill(&mut rig, 6);
    rig.pass_time(20_000);
    let full = rig.engine.store_stats().live_bytes;
    assert_eq!(
        full,
        6 * blocks * BLOCK_BYTES,
        "five snapshots and the volume share nothing"
    );
    let infos = rig.engine.snapshots();
    assert!(
        infos.iter().all(|info| info.exclusive_bytes == blocks * BLOCK_BYTES),
        "{infos:?}"
    );
    for round in [3, 1, 5, 2, 4] {
        rig.control(Control::Delete { id: snapshot_id(round) }).unwrap();
        for _ in 0..5 {
            rig.pass_time(5_000);
        }
        for held in rig.engine.snapshots() {
            let round = u64::from_le_bytes(held.id.0[..8].try_into().unwrap());
            assert_eq!(rig.read_at(held.id, 0, 1).unwrap(), [round * 10_000 + 1]);
        }
    }
    assert_eq!(rig.engine.store_stats().live_bytes, blocks * BLOCK_BYTES);
    for _ in 0..20 {
        rig.pass_time(5_000);
    }
    let taken = rig.disk.allocated();
    assert!(
        taken < 3 * blocks * BLOCK_BYTES,
        "{} segments are still taken",
        taken / SEGMENT_BYTES
    );
    rig.close();
    assert_check_passes(&mut rig.disk);
}

#[test]
fn cleaning_moves_what_snapshots_need_and_nothing_is_lost() {
    let blocks = 3_000;
    let mut rig = Rig::fresh(blocks);
    rig.disk.capacity = Some(60 * SEGMENT_BYTES);
    let mut random = Random(21);
    let mut model = Model::new(blocks);
    let mut stamp = 1;
    for n in 0..4_000 {
        let lba = random.below(blocks - 4);
        rig.write(lba, 4, stamp).unwrap();
        model.apply(&Change::Write { lba, blocks: 4, stamp });
        stamp += 4;
        if n % 400 == 399 {
            let id = snapshot_id(n);
            rig.snapshot(id);
            model.apply(&Change::Snapshot(id));
        }
        if n % 400 == 200 && model.snapshots.len() > 3 {
            let id = model.pick(&mut random).unwrap();
            rig.control(Control::Delete { id }).unwrap();
            model.apply(&Change::Delete(id));
        }
        if n % 1_000 == 999 {
            assert!(rig.view() == model, "after {n} writes");
            assert_check_passes(&mut rig.disk.kill());
        }
    }
    let stats = rig.engine.store_stats();
    assert!(
        stats.moved_bytes > 1_000 * BLOCK_BYTES,
        "the cleaner had to work: {stats:?}"
    );
    rig.flush().unwrap();
    let mut disk = rig.disk.cut(Cut::None);
    assert_check_passes(&mut disk);
    let (engine, _) = open(&mut disk, 2).unwrap();
    let mut rig = Rig::new(disk, engine);
    assert!(rig.view() == model);
    rig.close();
    assert_check_passes(&mut rig.disk);
}

#[test]
fn snapshots_that_fill_the_pool_damage_nothing_and_deleting_them_makes_room() {
    let blocks = 3_000;
    let mut rig = Rig::fresh(blocks);
    rig.disk.capacity = Some(40 * SEGMENT_BYTES);
    let mut model = Model::new(blocks);
    let mut random = Random(22);
    let (mut stamp, mut refused) = (1, 0);
    for n in 0..6_000 {
        let lba = random.below(blocks - 8);
        match rig.write(lba, 8, stamp) {
            Ok(_) => model.apply(&Change::Write { lba, blocks: 8, stamp }),
            Err(RequestError::NoSpace) => refused += 1,
            Err(other) => panic!("a full pool is no other error: {other}"),
        }
        stamp += 8;
        if n % 200 == 0 && refused == 0 {
            let id = snapshot_id(n);
            rig.snapshot(id);
            model.apply(&Change::Snapshot(id));
        }
        if refused > 5 {
            break;
        }
    }
    assert!(refused > 5, "the pool is smaller than the snapshots");
    assert!(rig.view() == model, "what was written before is all there");
    let (offset, len) = (0, 500 * BLOCK_BYTES);
    rig.run(Request::Zero { offset, len, fua: true }).unwrap();
    model.apply(&Change::Write {
        lba: 0,
        blocks: 500,
        stamp: 0,
    });
    while model.snapshots.len() > 1 {
        let id = model.pick(&mut random).unwrap();
        rig.control(Control::Delete { id }).unwrap();
        model.apply(&Change::Delete(id));
        rig.pass_time(2_000);
    }
    for _ in 0..20 {
        rig.pass_time(2_000);
    }
    rig.write(5, 8, 900_000).unwrap();
    model.apply(&Change::Write {
        lba: 5,
        blocks: 8,
        stamp: 900_000,
    });
    assert!(rig.view() == model);
    rig.flush().unwrap();
    let mut disk = rig.disk.cut(Cut::None);
    assert_check_passes(&mut disk);
    let (engine, _) = open(&mut disk, 2).unwrap();
    assert!(Rig::new(disk, engine).view() == model, "and after a power cut");
}

#[test]
fn a_list_of_changes_costs_what_changed() {
    let mut costs = Vec::new();
    for size in [20_000, 1 << 28] {
        let mut rig = Rig::fresh(size);
        for n in 0..150 {
            rig.write(n * 100, 8, n * 100 + 1).unwrap();
        }
        rig.pass_time(20_000);
        let from = snapshot_id(1);
        rig.snapshot(from);
        for lba in [3, 7_000, 14_000] {
            rig.write(lba, 2, 900_000 + lba).unwrap();
        }
        rig.pass_time(20_000);
        rig.close();
        let mut disk = rig.disk;
        let (engine, _) = open(&mut disk, 2).unwrap();
        let mut rig = Rig::new(disk, engine);
        let id = rig.order(Control::List {
            scan: Scan::Changed { from, to: None },
            offset: 0,
            ranges_max: 100,
        });
        let mut reads = 0;
        rig.poll();
        while !rig.answers.contains_key(&id) {
            reads += usize::from(matches!(rig.outstanding[0].1, Io::Read { .. }));
            rig.complete(0);
            rig.poll();
        }
        let ranges = rig.engine.take_ranges(id).unwrap().ranges;
        let block = |n: u64| n * BLOCK_BYTES..(n + 2) * BLOCK_BYTES;
        assert_eq!(ranges, [block(3), block(7_000), block(14_000)]);
        costs.push(reads);
    }
    assert!(costs[0] <= 4 + 4 && costs[1] <= costs[0] + 4, "pages read: {costs:?}");
}

#[test]
fn deleting_a_snapshot_lets_writes_go_on_that_wait_for_a_full_pool() {
    let blocks = 2_000;
    let Rig { disk, engine, .. } = Rig::fresh(blocks);
    let mut rig = Rig::new(disk, engine.when_full(WhenFull::Wait));
    rig.disk.capacity = Some(24 * SEGMENT_BYTES);
    let mut stamp = 1;
    let mut taken = 0;
    let waiting = loop {
        assert!(stamp < 100_000, "the pool is smaller than the snapshots");
        if stamp % 2_000 == 1 {
            taken += 1;
            rig.snapshot(snapshot_id(taken));
        }
        let id = rig.submit(write_request(stamp % (blocks - 100), 100, stamp, false));
        rig.settle();
        stamp += 100;
        match rig.answers.remove(&id) {
            Some(answer) => drop(answer.unwrap()),
            None => {
                rig.pass_time(5_000);
                if !rig.answers.contains_key(&id) {
                    break id;
                }
            }
        }
    };
    assert!(rig.engine.waits_for_space());
    // What makes room is not held up by what waits for it.
    rig.control(Control::Delete { id: snapshot_id(1) }).unwrap();
    for id in 2..=taken {
        rig.control(Control::Delete { id: snapshot_id(id) }).unwrap();
    }
    for _ in 0..10 {
        rig.pass_time(2_000);
    }
    rig.answers.remove(&waiting).expect("the write went on").unwrap();
    assert!(!rig.engine.waits_for_space());
    rig.flush().unwrap();
    rig.close();
    assert_check_passes(&mut rig.disk);
}
