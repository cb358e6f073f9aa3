//! Snapshots against a model: whatever happens, each reads as the volume was when it was taken.

use std::collections::BTreeMap;

use galleonfs_storage_engine::request::{Control, Request, Scan};
use galleonfs_storage_engine::types::{BLOCK_BYTES, Identity, SnapshotId};

use crate::harness::{Change, IDENTITY, Model, Rig, Shape, assert_check_passes, open_as, snapshot_id};
use crate::sim_disk::{Cut, Random};

/// A run by chance: the engine does what the model does.
pub struct Run {
    pub rig: Rig,
    pub model: Model,
    pub random: Random,
    pub seed: u64,
    pub identity: Identity,
    pub epoch: u32,
    pub stamp: u64,
    taken: u64,
    /// Every write and zero that no revert undid: first block and number.
    touched: Vec<(u64, u64)>,
    /// How many there were when a snapshot was taken.
    at_snapshot: BTreeMap<SnapshotId, usize>,
}

impl Run {
    pub fn new(seed: u64) -> Run {
        let mut random = Random(seed);
        let shape = Shape::of(seed);
        let size = shape.blocks(200 + random.below(3_000));
        Run {
            rig: Rig::shaped(size, shape),
            model: Model::new(size),
            random,
            seed,
            identity: IDENTITY,
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

    /// A run that goes on with a replica that holds what `model` says.
    pub fn with(rig: Rig, model: Model, identity: Identity, epoch: u32, seed: u64) -> Run {
        Run {
            rig,
            model,
            random: Random(seed),
            seed,
            identity,
            epoch,
            stamp: 1_000_000 * (1 + u64::from(identity.volume[0])),
            taken: 0,
            touched: Vec::new(),
            at_snapshot: BTreeMap::new(),
        }
    }

    pub fn step(&mut self) {
        let size = self.size();
        let lba = self.random.below(size);
        match self.random.below(30) {
            0..=11 => {
                let pages = self.rig.block() / BLOCK_BYTES;
                let most = if self.random.chance(5) { 256 / pages } else { 8 };
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
                let block = self.rig.block();
                let (offset, len) = (lba * block, blocks * block);
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
                let block = self.rig.block();
                let size = size + self.random.below(2_000) * BLOCK_BYTES / block;
                let len = size * block;
                self.rig.run(Request::Grow { len }).unwrap();
                self.model.head.resize(size as usize, 0);
            }
            18..=20 => {
                self.taken += 1;
                self.take(snapshot_id(self.taken));
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

    pub fn take(&mut self, id: SnapshotId) {
        self.rig.snapshot(id);
        self.at_snapshot.insert(id, self.touched.len());
        self.model.apply(&Change::Snapshot(id));
    }

    /// Closed in order, killed, or without power.
    pub fn end(&mut self) {
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
        let (engine, _) = open_as(&mut disk, self.identity, self.epoch).unwrap();
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

    pub fn compare(&mut self) {
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
