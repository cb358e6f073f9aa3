//! Snapshots against a model: whatever happens, each reads as the volume was when it was taken.

use std::collections::BTreeMap;

use galleonfs_storage_engine::io::Io;
use galleonfs_storage_engine::request::{Control, Request, RequestError, Scan};
use galleonfs_storage_engine::types::{BLOCK_BYTES, SnapshotId};

use crate::harness::{Change, Model, Rig, SEGMENT_BYTES, assert_check_passes, open, snapshot_id, write_request};
use crate::sim_disk::{Cut, Random};

/// A run by chance: the engine does what the model does.
struct Run {
    rig: Rig,
    model: Model,
    random: Random,
    seed: u64,
    epoch: u32,
    stamp: u64,
    taken: u64,
    /// Every write and zero that no revert undid: first block and number.
    touched: Vec<(u64, u64)>,
    /// How many there were when a snapshot was taken.
    at_snapshot: BTreeMap<SnapshotId, usize>,
}

impl Run {
    fn new(seed: u64) -> Run {
        let mut random = Random(seed);
        let size = 200 + random.below(3_000);
        Run {
            rig: Rig::fresh_as(size, seed % 3 == 0),
            model: Model::new(size),
            random,
            seed,
            epoch: 1,
            stamp: 1,
            taken: 0,
            touched: Vec::new(),
            at_snapshot: BTreeMap::new(),
        }
    }

    fn size(&self) -> u64 {
        self.model.head.len() as u64
    }

    fn step(&mut self) {
        let size = self.size();
        let lba = self.random.below(size);
        match self.random.below(30) {
            0..=11 => {
                let most = if self.random.chance(5) { 256 } else { 8 };
                let blocks = 1 + self.random.below((size - lba).min(most));
                let stamp = self.stamp;
                self.stamp += blocks;
                self.rig.write(lba, blocks, stamp).unwrap();
                self.touched.push((lba, blocks));
                self.model.apply(&Change::Write { lba, blocks, stamp });
            }
            12 | 13 => {
                let most = if self.random.chance(50) { 20 } else { size };
                let blocks = 1 + self.random.below((size - lba).min(most));
                let (offset, len) = (lba * BLOCK_BYTES, blocks * BLOCK_BYTES);
                let fua = self.random.chance(20);
                self.rig.run(Request::Zero { offset, len, fua }).unwrap();
                self.touched.push((lba, blocks));
                self.model.apply(&Change::Write { lba, blocks, stamp: 0 });
            }
            14 => drop(self.rig.flush().unwrap()),
            15 => {
                let ms = self.random.below(20_000);
                self.rig.pass_time(ms);
            }
            16 if self.random.chance(30) => self.end(),
            17 if self.random.chance(20) => {
                let size = size + self.random.below(2_000);
                let len = size * BLOCK_BYTES;
                self.rig.run(Request::Grow { len }).unwrap();
                self.model.head.resize(size as usize, 0);
            }
            18..=20 => {
                self.taken += 1;
                let id = snapshot_id(self.taken);
                self.rig.snapshot(id);
                self.at_snapshot.insert(id, self.touched.len());
                self.model.apply(&Change::Snapshot(id));
            }
            21 | 22 => {
                if let Some(id) = self.model.pick(&mut self.random) {
                    self.rig.control(Control::Delete { id }).unwrap();
                    self.model.apply(&Change::Delete(id));
                }
            }
            23 if self.random.chance(30) => {
                if let Some(id) = self.model.pick(&mut self.random) {
                    let discard_newer = true;
                    self.rig.control(Control::Revert { id, discard_newer }).unwrap();
                    self.touched.truncate(self.at_snapshot[&id]);
                    self.model.apply(&Change::Revert(id));
                }
            }
            24..=26 => {
                if let Some(id) = self.model.pick(&mut self.random) {
                    let held = self.model.snapshots.iter().find(|(other, _)| *other == id).unwrap();
                    let size = held.1.len() as u64;
                    let lba = self.random.below(size);
                    let blocks = 1 + self.random.below((size - lba).min(256));
                    let expected = &held.1[lba as usize..(lba + blocks) as usize];
                    let found = self.rig.read_at(id, lba, blocks).unwrap();
                    assert_eq!(found, expected, "seed {} {id:?} block {lba}", self.seed);
                }
            }
            _ => {
                let blocks = 1 + self.random.below((size - lba).min(256));
                let expected = &self.model.head[lba as usize..(lba + blocks) as usize];
                assert_eq!(self.rig.read(lba, blocks).unwrap(), expected, "seed {}", self.seed);
            }
        }
    }

    /// Closed in order, killed, or without power.
    fn end(&mut self) {
        let mut disk = match self.random.below(3) {
            0 => {
                self.rig.close();
                self.rig.disk.clone()
            }
            1 => self.rig.disk.kill(),
            _ => {
                self.rig.flush().unwrap();
                self.rig.disk.cut(Cut::Random(self.random.next()))
            }
        };
        assert_check_passes(&mut disk);
        self.epoch += 1;
        let (engine, _) = open(&mut disk, self.epoch).unwrap();
        self.rig = Rig::new(disk, engine);
    }

    /// What differs is listed as changed, what was not touched is not; what is stored is what is no zeros.
    fn compare_lists(&mut self) {
        let ranges_max = 1 + self.random.below(50) as usize;
        let mut views: Vec<(Option<SnapshotId>, &Vec<u64>)> = Vec::new();
        views.extend(self.model.snapshots.iter().map(|(id, blocks)| (Some(*id), blocks)));
        views.push((None, &self.model.head));
        let pick = self.random.below(views.len() as u64) as usize;
        let (to, new) = views[pick];
        for (from, old) in &views[..pick] {
            let from = from.expect("the head comes last");
            let listed = self.rig.list(Scan::Changed { from, to }, ranges_max);
            for block in 0..new.len() {
                let differs = old.get(block).copied().unwrap_or(0) != new[block];
                assert!(listed[block] || !differs, "seed {} {from:?} block {block}", self.seed);
            }
            let (first, end) = (self.at_snapshot[&from], to.map(|to| self.at_snapshot[&to]));
            let mut touched = vec![false; listed.len()];
            for (lba, blocks) in &self.touched[first..end.unwrap_or(self.touched.len())] {
                touched[*lba as usize..(lba + blocks) as usize].fill(true);
            }
            for block in (0..listed.len()).filter(|block| listed[*block]) {
                assert!(
                    touched[block],
                    "seed {} {from:?} block {block} was not touched",
                    self.seed
                );
            }
        }
        let listed = self.rig.list(Scan::Stored { at: to }, ranges_max);
        for (block, stamp) in new.iter().enumerate() {
            assert_eq!(listed[block], *stamp != 0, "seed {} block {block} of {to:?}", self.seed);
        }
    }

    fn compare(&mut self) {
        let view = self.rig.view();
        assert!(view.head == self.model.head, "seed {}: the volume", self.seed);
        let names = |model: &Model| model.snapshots.iter().map(|(id, _)| *id).collect::<Vec<_>>();
        assert_eq!(names(&view), names(&self.model), "seed {}", self.seed);
        for ((id, found), (_, expected)) in view.snapshots.iter().zip(&self.model.snapshots) {
            let wrong: Vec<usize> = (0..found.len()).filter(|n| found[*n] != expected[*n]).collect();
            assert!(wrong.is_empty(), "seed {}: {id:?} differs at {wrong:?}", self.seed);
        }
    }
}

/// `SEEDS=n FIRST=m` runs seeds m to m+n-1.
#[test]
fn snapshots_read_as_the_volume_was() {
    let number = |name| std::env::var(name).ok().and_then(|text| text.parse::<u64>().ok());
    let (first, seeds) = (number("FIRST").unwrap_or(1), number("SEEDS").unwrap_or(12));
    for seed in first..first + seeds {
        let mut run = Run::new(seed);
        for step in 0..500 {
            run.step();
            if step % 100 == 99 {
                run.compare();
            }
            if step % 25 == 24 {
                run.compare_lists();
            }
        }
        run.end();
        run.compare();
        run.rig.close();
        assert_check_passes(&mut run.rig.disk);
    }
}

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
    assert_eq!(cost(500), cost(0), "disk operations for 500 reads");
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
