//! A replica that lives through everything at once: the stream, copies that come early, late and twice, epochs that end
//! where somebody decides, checkpoints that wait, and crashes at every boundary.
//!
//! The oracle is the log itself. The rig reads each record as it is written and holds every one against what is there:
//! what is put somewhere is newer. After a crash, the state must be that after the first k records, with k at least what
//! was reported as durable; cut where the epochs are said to have ended, whatever end is chosen that the gate leaves open.

use std::collections::BTreeMap;

use galleonfs_storage_engine::store::{EpochEnd, Event, OpenError, Stored, WriteEntry};
use galleonfs_storage_engine::types::{BlockSize, Lba, Seq, Version};

use crate::harness::options;
use crate::replica_rig::{Content, Logged, Replica, State, VACANT, assert_check_passes, end, format, told, version};
use crate::sim_disk::{Cut, Random, SimDisk};

const SIZE: u64 = 700;
const BOUNDARIES: usize = 70;

/// The others: what was written in each epoch, and what they decided.
struct World {
    random: Random,
    /// Epoch → its writes; number n is at n-1.
    written: BTreeMap<u32, Vec<WriteEntry>>,
    /// What the newest of them holds.
    newest: Vec<Content>,
    /// What it held some time ago: copies travel slowly.
    before: Vec<Content>,
    ends: BTreeMap<u32, u64>,
    /// Everything up to here is kept by all that count, whatever happens.
    gate: Version,
}

impl World {
    fn write(&mut self, epoch: u32) {
        let lba = self.random.below(SIZE);
        let zero = self.random.chance(20);
        let most = if zero { SIZE - lba } else { (SIZE - lba).min(6) };
        let entry = WriteEntry {
            lba: Lba(lba),
            blocks: 1 + self.random.below(most) as u32,
            zero,
        };
        let writes = self.written.entry(epoch).or_default();
        writes.push(entry);
        let at = version(epoch, writes.len() as u64);
        self.newest[lba as usize..entry.end().0 as usize].fill((at, zero));
        if self.random.chance(10) {
            self.before = self.newest.clone();
        }
    }

    /// What was decided never to have happened is nowhere among them.
    fn settle(&mut self, epoch: u32, last: u64) {
        self.ends.insert(epoch, last);
        if let Some(writes) = self.written.get_mut(&epoch) {
            writes.truncate(last as usize);
        }
        let mut newest = vec![VACANT; SIZE as usize];
        for (epoch, writes) in &self.written {
            for (seq, write) in (1..).zip(writes) {
                newest[write.lba.0 as usize..write.end().0 as usize].fill((version(*epoch, seq), write.zero));
            }
        }
        self.newest = newest.clone();
        self.before = newest;
    }

    fn ends(&self) -> Vec<EpochEnd> {
        self.ends.iter().map(|(epoch, last)| end(*epoch, *last)).collect()
    }

    fn count(&self, epoch: u32) -> u64 {
        self.written.get(&epoch).map_or(0, |writes| writes.len() as u64)
    }

    /// Runs of blocks that somebody has, in ascending order.
    fn some_rows(&mut self) -> Vec<(Lba, Lba, Content)> {
        let from = if self.random.chance(50) {
            &self.newest
        } else {
            &self.before
        };
        let mut rows: Vec<(Lba, Lba, Content)> = Vec::new();
        let (mut at, stop) = (self.random.below(SIZE), self.random.below(SIZE + 1));
        while at < stop {
            let content = from[at as usize];
            let mut behind = at + 1;
            while content.1 && behind < stop && from[behind as usize] == content {
                behind += 1;
            }
            if content != VACANT || self.random.chance(50) {
                rows.push((Lba(at), Lba(behind), content));
            }
            at = behind;
        }
        rows
    }
}

/// One life of a replica.
struct Life {
    world: World,
    replica: Replica,
    /// Records that are durable, by what the store reported.
    durable: usize,
    /// Copies that are out.
    copies: usize,
    /// What crashes in this epoch left without its beginning. An epoch that goes on may write the very same record there again,
    /// and then what followed it follows again: writes of the epoch all the same.
    ghosts: Vec<Vec<Logged>>,
    block_size: BlockSize,
}

/// The number behind the last record that ends at or before this version, and everything before it.
fn records_until(log: &[Logged], until: Version) -> usize {
    let covered = |record: &Logged| match record {
        Logged::Data { epoch, first, writes } => version(epoch.0, first.0 + writes.len() as u64 - 1) <= until,
        Logged::Join { epoch, base } => version(epoch.0, base.0) <= until,
        Logged::Copied { .. } => false,
    };
    log.iter().rposition(covered).map_or(0, |last| last + 1)
}

impl Life {
    fn new(seed: u64) -> Life {
        let block_size = if seed.is_multiple_of(3) {
            BlockSize::K16
        } else {
            BlockSize::K4
        };
        let mut random = Random(seed);
        let first = 1 + random.below(4) as u32;
        let (replica, _) = Replica::open(format(SIZE, block_size), told(first, &[])).unwrap();
        let mut world = World {
            random,
            written: BTreeMap::new(),
            newest: vec![VACANT; SIZE as usize],
            before: vec![VACANT; SIZE as usize],
            ends: BTreeMap::new(),
            gate: Version::default(),
        };
        // It was not there from the beginning.
        for epoch in 1..first {
            (0..30).for_each(|_| world.write(epoch));
            let last = world.count(epoch);
            world.settle(epoch, last);
        }
        (0..20).for_each(|_| world.write(first));
        Life {
            world,
            replica,
            durable: 0,
            copies: 0,
            ghosts: Vec::new(),
            block_size,
        }
    }

    fn epoch(&self) -> u32 {
        self.replica.store.epoch().0
    }

    /// The stream as far as this replica has it: its next number, or none before it was taken up.
    fn next(&self) -> Option<u64> {
        let last = self.replica.now.last;
        (last.epoch.0 == self.epoch()).then_some(last.seq.0 + 1)
    }

    fn stream(&mut self) {
        let epoch = self.epoch();
        let Some(next) = self.next() else {
            return self.take_up();
        };
        if self.replica.store.is_promising() {
            return;
        }
        let count = self.world.count(epoch);
        if next > count || self.world.random.chance(30) {
            self.world.write(epoch);
            return;
        }
        let many = 1 + self.world.random.below(3.min(count - next + 1));
        let writes = &self.world.written[&epoch][next as usize - 1..(next - 1 + many) as usize];
        let writes = writes.to_vec();
        self.replica.append(next, &writes);
    }

    /// Takes up the stream of the epoch: from its beginning, or somewhere.
    fn take_up(&mut self) {
        let epoch = self.epoch();
        let last = self.replica.store.highest();
        let ends = self.replica.store.epoch_ends();
        let settled = ends.iter().any(|row| (row.first..=row.last).contains(&last.epoch));
        let settled = settled || last == Version::default() || last.epoch.0 == epoch;
        if self.replica.store.is_promising() || !settled {
            return;
        }
        let count = self.world.count(epoch);
        let base = if self.world.random.chance(50) {
            self.world.random.below(count + 1)
        } else {
            0
        };
        if self.replica.store.room(0, true) == galleonfs_storage_engine::store::Room::Ready {
            self.replica.store.join(Seq(base));
        }
    }

    fn copy(&mut self) {
        let store = &self.replica.store;
        if self.next().is_none() || store.is_promising() || !store.takes_copies() {
            return;
        }
        let rows = self.world.some_rows();
        let copies: Vec<Stored> = self.replica.copies(&rows);
        let token = self.replica.token();
        self.replica.store.copy_in(token, copies);
        self.copies += 1;
    }

    /// The epoch ends where nothing of this replica is behind it, and the next one begins.
    fn promise(&mut self) {
        let epoch = self.epoch();
        if self.replica.store.is_promising() {
            return;
        }
        let have = self.replica.now.last;
        let have = if have.epoch.0 == epoch { have.seq.0 } else { 0 };
        let highest = self.replica.store.highest();
        let highest = if highest.epoch.0 == epoch { highest.seq.0 } else { 0 };
        let gate = if self.world.gate.epoch.0 == epoch {
            self.world.gate.seq.0
        } else {
            0
        };
        let least = have.max(gate).max(highest);
        let count = self.world.count(epoch).max(least);
        let last = least + self.world.random.below(count - least + 1);
        let next = epoch + 1 + self.world.random.below(2) as u32;
        self.replica
            .store
            .promise(galleonfs_storage_engine::types::Epoch(next), &[]);
        self.world.settle(epoch, last);
        for skipped in epoch + 1..next {
            self.world.settle(skipped, 0);
        }
        self.replica.store.settle(&self.world.ends());
        (0..self.world.random.below(20)).for_each(|_| self.world.write(next));
    }

    fn raise_gate(&mut self) {
        let durable = self.replica.store.durable();
        let wanted = self.replica.store.gate_wanted();
        let epoch = self.epoch();
        let gate = wanted.filter(|_| self.world.random.chance(70)).unwrap_or(durable);
        if gate.epoch.0 == epoch && gate > self.world.gate {
            self.world.gate = gate;
            self.replica.store.gate(Some(gate));
        }
    }

    fn act(&mut self) {
        match self.world.random.below(20) {
            0..=8 => self.stream(),
            9..=12 => self.copy(),
            13 => self.raise_gate(),
            14 => self.replica.store.sync(),
            15 if self.world.random.chance(30) => self.promise(),
            16 | 17 => {
                self.replica.now_ms += self.world.random.below(8_000);
                self.replica.store.tick(self.replica.now_ms);
            }
            _ => {}
        }
    }

    fn listen(&mut self) {
        for event in std::mem::take(&mut self.replica.events) {
            match event {
                Event::Durable(until) => {
                    self.durable = self.durable.max(records_until(&self.replica.log, until));
                }
                Event::CopiedIn(_, result) => {
                    result.expect("copies of what is somewhere are right");
                    self.copies -= 1;
                }
                Event::Stopped(why) => panic!("{why}"),
                _ => {}
            }
        }
        if self.copies == 0 && self.replica.outstanding.is_empty() && self.replica.store.copies_are_durable() {
            let copy = |record: &Logged| matches!(record, Logged::Copied { .. });
            let copies = self.replica.log.iter().rposition(copy).map_or(0, |last| last + 1);
            self.durable = self.durable.max(copies);
        }
    }

    /// An end that the others may choose for the epoch that was not settled: they have all that the gate lets pass.
    fn choose_ends(&mut self) -> BTreeMap<u32, u64> {
        let mut ends = self.world.ends.clone();
        let running = self.replica.now.last.max(self.replica.store.highest()).epoch.0;
        if !ends.contains_key(&running) && running > 0 && self.world.random.chance(60) {
            let least = if self.world.gate.epoch.0 == running {
                self.world.gate.seq.0
            } else {
                0
            };
            let most = self.world.count(running).max(least);
            ends.insert(running, least + self.world.random.below(most - least + 1));
        }
        ends
    }

    /// Opens what is left and compares; returns the records that survived.
    fn verify(&self, disk: &SimDisk, ends: &BTreeMap<u32, u64>, at_least: usize, what: &str) -> (Vec<Logged>, Replica) {
        let list: Vec<EpochEnd> = ends.iter().map(|(epoch, last)| end(*epoch, *last)).collect();
        let promised = self.promised(disk);
        let (mut again, _) = Replica::open(disk.clone(), told(promised, &list))
            .unwrap_or_else(|error| panic!("{what}, told {ends:?}: {error}"));
        let (found, last) = (again.contents(), again.store.last());
        let mut state = State::new(SIZE);
        let log = &self.replica.log;
        log[..at_least].iter().for_each(|record| state.apply(record, ends));
        let is_found = |state: &State| state.blocks == found && state.last == last;
        let mut kept = None;
        for count in at_least..=log.len() {
            if count > at_least {
                state.apply(&log[count - 1], ends);
            }
            kept = kept.or_else(|| is_found(&state).then(|| log[..count].to_vec()));
            let same = |record: &Logged| count > 0 && *record == log[count - 1];
            let behind = |ghost: &'_ Vec<Logged>| ghost.iter().position(same).map(|at| at + 1);
            let ghosts = self.ghosts.iter().filter_map(|ghost| Some(&ghost[behind(ghost)?..]));
            for ghost in ghosts {
                let (mut state, mut records) = (state.clone(), log[..count].to_vec());
                for record in ghost {
                    if state.try_apply(record, ends).is_err() {
                        break; // something else came before it, so it follows nothing
                    }
                    records.push(record.clone());
                    kept = kept.or_else(|| is_found(&state).then(|| records.clone()));
                }
            }
        }
        let kept = kept.unwrap_or_else(|| {
            let both = found.iter().zip(&state.blocks).enumerate();
            let others: Vec<_> = both.filter(|(_, (found, all))| found != all).take(4).collect();
            panic!(
                "{what}, told {ends:?}: up to {last}, not what is there after {at_least} to {} records, up to {}: \
                 (block, (found, all)) {others:?}",
                log.len(),
                state.last
            )
        });
        (kept, again)
    }

    fn promised(&self, disk: &SimDisk) -> u32 {
        let superblock = galleonfs_storage_engine::store::inspect(&mut disk.clone()).expect("one superblock is valid");
        superblock.epoch.0
    }

    /// Goes on with what a crash left.
    fn go_on(&mut self, disk: SimDisk, ends: BTreeMap<u32, u64>, kept: &[Logged]) {
        let promised = self.promised(&disk);
        for (epoch, last) in &ends {
            if !self.world.ends.contains_key(epoch) {
                self.world.settle(*epoch, *last);
            }
        }
        // Of an epoch that ended nothing more is written.
        let next = (promised..)
            .find(|epoch| !self.world.ends.contains_key(epoch))
            .expect("epochs go on");
        let (mut replica, _) = Replica::open(disk, told(next, &self.world.ends())).unwrap();
        let mut state = State::new(SIZE);
        if next == promised {
            let lost = self.replica.log.get(kept.len()..).filter(|lost| !lost.is_empty());
            self.ghosts.extend(lost.map(<[Logged]>::to_vec));
        } else {
            self.ghosts.clear();
        }
        for record in kept {
            let before = state.clone();
            state.apply(record, &ends);
            if !state.over && (state != before || matches!(record, Logged::Join { .. })) {
                replica.log.push(record.clone());
            }
        }
        // What was dropped of a record stays dropped: its epoch has an end.
        state.over = false;
        replica.now = state;
        replica.store.gate(Some(self.world.gate));
        self.durable = replica.log.len();
        self.copies = 0;
        self.replica = replica;
    }

    fn run(mut self, seed: u64, boundaries: usize) -> usize {
        let (mut states, mut boundary, mut idle) = (0, 0, 0);
        while boundary < boundaries {
            self.act();
            self.replica.poll();
            if self
                .replica
                .store
                .next_tick_ms()
                .is_some_and(|at| at <= self.replica.now_ms)
            {
                self.replica.store.tick(self.replica.now_ms);
                self.replica.poll();
            }
            self.listen();
            if self.replica.outstanding.is_empty() {
                idle += 1;
                assert!(idle < 10_000, "it goes on: {:?}", self.replica.store);
                continue;
            }
            idle = 0;
            if self.world.random.chance(40) {
                continue;
            }
            let index = self.world.random.below(self.replica.outstanding.len() as u64) as usize;
            self.replica.complete(index);
            self.listen();
            boundary += 1;

            let ends = self.choose_ends();
            let what = format!("seed {seed} boundary {boundary}");
            let in_flight = self.replica.disk_in_flight();
            let cut = in_flight.cut(Cut::Random(self.world.random.next()));
            let (kept, _) = self.verify(&cut, &ends, self.durable.min(self.replica.log.len()), &what);
            let killed = self.replica.disk.kill();
            let (_, mut again) = self.verify(&killed, &ends, self.durable, &format!("{what} kill"));
            states += 2;
            if self.world.random.chance(10) {
                // Whoever is alone from now on finds the same.
                let contents = again.contents();
                let epoch = again.store.epoch().0 + 1;
                let (mut own, _) = Replica::open(again.disk.kill(), options(epoch)).unwrap();
                assert_eq!(own.contents(), contents, "{what}");
                assert_check_passes(&own.disk.kill());
            }
            if self.world.random.chance(4) {
                self.go_on(cut, ends, &kept);
            }
        }
        self.finish(seed);
        states
    }

    fn assert_alike(&mut self, what: &str) {
        let found = self.replica.contents();
        let both = found.iter().zip(&self.world.newest).enumerate();
        let others: Vec<_> = both.filter(|(_, (here, there))| here != there).take(4).collect();
        assert_eq!(others, [], "{what}: (block, (here, there)), told {:?}", self.world.ends);
    }

    /// In the end it takes all that the others have, and is like them.
    fn finish(&mut self, seed: u64) {
        self.replica.settle();
        self.listen();
        let epoch = self.epoch();
        if self.next().is_none() {
            assert_eq!(self.replica.store.beyond(&self.world.ends()), None);
            self.replica.store.settle(&self.world.ends());
            self.replica.settle();
            let count = self.world.count(epoch);
            self.replica.store.join(Seq(count));
            self.replica.settle();
        }
        while let Some(next) = self.next().filter(|next| *next <= self.world.count(epoch)) {
            let write = self.world.written[&epoch][next as usize - 1];
            assert!(self.replica.append(next, &[write]), "there is room");
            self.replica.settle();
        }
        let rows: Vec<_> = (0..SIZE)
            .map(|lba| (Lba(lba), Lba(lba + 1), self.world.newest[lba as usize]))
            .collect();
        for rows in rows.chunks(90) {
            let (token, copies) = (self.replica.token(), self.replica.copies(rows));
            self.replica.store.copy_in(token, copies);
            self.replica.settle();
        }
        self.assert_alike(&format!("seed {seed}"));
        self.replica.store.gate(Some(Version::MAX));
        self.replica.pass_time(100_000);
        self.assert_alike(&format!("seed {seed}, merged"));
        assert_check_passes(&self.replica.disk.kill());
        self.replica.store.close();
        self.replica.settle();
        assert!(self.replica.store.is_closed(), "seed {seed}: {:?}", self.replica.store);
        let ends = self.world.ends();
        let again = Replica::open(self.replica.disk.cut(Cut::None), told(epoch, &ends));
        let (mut again, report) = again.unwrap_or_else(|error: OpenError| panic!("seed {seed}: {error}"));
        assert_eq!((report.replayed_records, report.cut), (0, false));
        assert_eq!(
            again.contents(),
            self.world.newest,
            "seed {seed}, closed {:?}",
            self.block_size
        );
    }
}

/// `SEEDS=n FIRST=m` runs seeds m to m+n-1.
#[test]
fn a_replica_holds_the_writes_that_remain_after_any_crash_and_any_decision() {
    let number = |name| std::env::var(name).ok().and_then(|text| text.parse::<u64>().ok());
    let (first, seeds) = (number("FIRST").unwrap_or(1), number("SEEDS").unwrap_or(12));
    let states: usize = (first..first + seeds)
        .map(|seed| Life::new(seed).run(seed, BOUNDARIES))
        .sum();
    println!("{states} crash states of replicas");
}
