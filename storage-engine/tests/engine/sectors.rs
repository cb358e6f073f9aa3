//! Requests of any sectors: a block is written whole or not at all, and whoever asks for a part of it need not know.

use std::ops::Range;

use galleonfs_storage_engine::BlockEngine;
use galleonfs_storage_engine::buffer::BufMut;
use galleonfs_storage_engine::io::Io;
use galleonfs_storage_engine::request::{Control, Piece, Reply, Request, RequestError, RequestId};
use galleonfs_storage_engine::store::open_replica;
use galleonfs_storage_engine::types::{BlockSize, SECTOR_BYTES};
use galleonfs_storage_engine::volume::Volume;

use crate::harness::{
    IDENTITY, Rig, SEGMENT_BYTES, Shape, Stamp, assert_check_passes, fill, open, open_as, options, snapshot_id,
};
use crate::sim_disk::{Cut, Random, SimDisk};

const SECTOR: usize = SECTOR_BYTES as usize;

/// What a sector holds: noise, or one word over and over.
fn fill_sector(stamp: Stamp, sector: &mut [u8]) {
    if stamp > 0 && stamp.is_multiple_of(3) {
        return fill(stamp, sector);
    }
    let word = stamp.to_le_bytes();
    sector.chunks_mut(8).for_each(|place| place.copy_from_slice(&word));
}

fn sector_stamps(pieces: &[Piece]) -> Vec<Stamp> {
    let mut stamps = Vec::new();
    for piece in pieces {
        match piece {
            Piece::Zeros(len) => stamps.extend(vec![0; len / SECTOR]),
            Piece::Bytes(bytes) => stamps.extend(bytes.as_ref().chunks(SECTOR).map(|sector| {
                let stamp = u64::from_le_bytes(sector[..8].try_into().unwrap());
                let mut expected = [0; SECTOR];
                fill_sector(stamp, &mut expected);
                assert_eq!(sector, expected, "a read returns only what was written");
                stamp
            })),
        }
    }
    stamps
}

/// A write of sectors; the first has this stamp, the next one more.
fn write(sectors: Range<u64>, stamp: Stamp, fua: bool) -> Request {
    let len = (sectors.end - sectors.start) as usize * SECTOR;
    // The payload lies anywhere in its memory, as long as sectors lie between sectors.
    let skipped = (stamp as usize % 8) * SECTOR;
    let mut memory = BufMut::zeroed((skipped + len).next_multiple_of(4096));
    let places = memory.as_mut()[skipped..skipped + len].chunks_mut(SECTOR);
    for (n, sector) in (stamp..).zip(places) {
        fill_sector(n, sector);
    }
    Request::Write {
        offset: sectors.start * SECTOR_BYTES,
        data: memory.freeze().slice(skipped..skipped + len),
        fua,
    }
}

fn zero(sectors: Range<u64>) -> Request {
    Request::Zero {
        offset: sectors.start * SECTOR_BYTES,
        len: (sectors.end - sectors.start) * SECTOR_BYTES,
        fua: false,
    }
}

fn read(rig: &mut Rig, sectors: Range<u64>) -> Result<Vec<Stamp>, RequestError> {
    let (offset, len) = (
        sectors.start * SECTOR_BYTES,
        (sectors.end - sectors.start) * SECTOR_BYTES,
    );
    match rig.run(Request::Read { offset, len })? {
        Reply::Data(pieces) => Ok(sector_stamps(&pieces)),
        Reply::Done => panic!("a read gives data"),
    }
}

fn read_all(rig: &mut Rig) -> Vec<Stamp> {
    let all = rig.engine.size_bytes() / SECTOR_BYTES;
    let starts = (0..all).step_by(1000);
    starts
        .flat_map(|first| read(rig, first..(first + 1000).min(all)).unwrap())
        .collect()
}

/// Some sectors: often few, now and then many, sometimes whole blocks.
fn some(random: &mut Random, size: u64, block: u64, most: u64) -> Range<u64> {
    let first = random.below(size);
    match random.below(4) {
        0 => {
            let first = first / block * block;
            first..first + block * (1 + random.below((size - first) / block).min(3))
        }
        1 => first..first + 1 + random.below((size - first).min(most)),
        _ => first..first + 1 + random.below((size - first).min(12)),
    }
}

const SHAPES: [(BlockSize, bool); 6] = [
    (BlockSize::K4, false),
    (BlockSize::K16, false),
    (BlockSize::K64, false),
    (BlockSize::K8, true),
    (BlockSize::K16, true),
    (BlockSize::K64, true),
];

fn shape(n: u64) -> Shape {
    let (block_size, sealed) = SHAPES[n as usize % SHAPES.len()];
    Shape { block_size, sealed }
}

#[test]
fn the_volume_reads_like_an_array_of_sectors() {
    for seed in 0..12 {
        let mut random = Random(seed);
        let shape = shape(seed);
        let blocks = shape.blocks(600);
        let mut rig = Rig::shaped(blocks, shape);
        let block = rig.block() / SECTOR_BYTES;
        let size = blocks * block;
        let mut model = vec![0; size as usize];
        let mut kept = None;
        let (mut stamp, mut epoch) = (1, 1);
        for step in 0..500 {
            let sectors = some(&mut random, size, block, 500);
            let range = sectors.start as usize..sectors.end as usize;
            match random.below(20) {
                0..=9 => {
                    let len = sectors.end - sectors.start;
                    rig.run(write(sectors, stamp, random.chance(10))).unwrap();
                    model[range].iter_mut().zip(stamp..).for_each(|(at, stamp)| *at = stamp);
                    stamp += len;
                }
                10 | 11 => {
                    rig.run(zero(sectors)).unwrap();
                    model[range].fill(0);
                }
                12 => rig.pass_time(random.below(20_000)),
                13 if random.chance(20) => {
                    let cut = Cut::Random(random.next());
                    rig.flush().unwrap();
                    let mut disk = if random.chance(50) {
                        rig.close();
                        rig.disk
                    } else {
                        rig.disk.cut(cut)
                    };
                    assert_check_passes(&mut disk);
                    epoch += 1;
                    let (engine, _) = open(&mut disk, epoch).unwrap();
                    rig = Rig::new(disk, engine);
                }
                14 if kept.is_none() => {
                    rig.snapshot(snapshot_id(step));
                    kept = Some((snapshot_id(step), model.clone()));
                }
                15 => {
                    if let Some((id, old)) = &kept {
                        let (id, old) = (*id, old.clone());
                        let (offset, len) = (sectors.start * SECTOR_BYTES, range.len() as u64 * SECTOR_BYTES);
                        let Reply::Data(pieces) = rig.control(Control::Read { id, offset, len }).unwrap() else {
                            panic!("a read gives data")
                        };
                        assert_eq!(sector_stamps(&pieces), old[range], "seed {seed} step {step}");
                        if random.chance(20) {
                            let discard_newer = true;
                            rig.control(Control::Revert { id, discard_newer }).unwrap();
                            model.clone_from(&old);
                        } else if random.chance(30) {
                            rig.control(Control::Delete { id }).unwrap();
                            kept = None;
                        }
                    }
                }
                _ => assert_eq!(
                    read(&mut rig, sectors).unwrap(),
                    model[range],
                    "seed {seed} step {step}"
                ),
            }
        }
        assert_eq!(read_all(&mut rig), model, "seed {seed}");
        rig.close();
        assert_check_passes(&mut rig.disk);
    }
}

// ---- how it goes ------------------------------------------------------------------------------------------------

fn reads_out(rig: &Rig) -> usize {
    let reads = rig.outstanding.iter().filter(|(_, io)| matches!(io, Io::Read { .. }));
    reads.count()
}

/// A volume of blocks of 64 KiB, the first of which are written and in the log.
fn written() -> Rig {
    let mut rig = Rig::shaped(40, shape(2));
    for block in 0..8 {
        rig.run(write(block * 128..block * 128 + 128, 1 + block * 128, false))
            .unwrap();
    }
    rig
}

#[test]
fn parts_that_wait_together_for_a_block_become_one_write_of_it() {
    let mut rig = written();
    let before = rig.engine.counters();
    let ids: Vec<RequestId> = (0..10)
        .map(|n| rig.submit(write(n * 8..n * 8 + 4, 50_000 + n * 4, false)))
        .collect();
    rig.poll();
    assert_eq!(reads_out(&rig), 1, "the block is read once");
    rig.settle();
    assert!(ids.iter().all(|id| rig.answers[id].is_ok()));
    let after = rig.engine.counters();
    assert_eq!(after.changed_blocks - before.changed_blocks, 1);
    assert_eq!(after.records - before.records, 1);
    let found = read(&mut rig, 0..80).unwrap();
    for n in 0..80 {
        let expected = if n % 8 < 4 { 50_000 + n / 8 * 4 + n % 8 } else { n + 1 };
        assert_eq!(found[n as usize], expected, "sector {n}");
    }
}

#[test]
fn parts_that_cover_a_block_together_are_not_read_first() {
    let mut rig = written();
    for n in 0..16 {
        rig.submit(write(n * 8..n * 8 + 8, 50_000 + n * 8, false));
    }
    rig.poll();
    assert_eq!(reads_out(&rig), 0);
    rig.settle();
    assert_eq!(
        read(&mut rig, 0..129).unwrap()[..128],
        (50_000..50_128).collect::<Vec<_>>()
    );
    assert_eq!(rig.engine.counters().changed_blocks, 1);
}

#[test]
fn the_next_part_of_a_block_that_was_just_changed_needs_no_read() {
    let mut rig = written();
    rig.submit(write(0..1, 50_000, false));
    rig.poll();
    rig.complete(0);
    rig.poll();
    // It is on its way to the log.
    rig.submit(write(5..6, 60_000, false));
    rig.poll();
    assert_eq!(reads_out(&rig), 0, "it waits in line");
    rig.settle();
    assert_eq!(rig.engine.counters().changed_blocks, 2);
    assert_eq!(read(&mut rig, 0..6).unwrap(), [50_000, 2, 3, 4, 5, 60_000]);
}

#[test]
fn requests_for_other_blocks_are_not_held_up() {
    let mut rig = written();
    let part = rig.submit(write(3..4, 50_000, false));
    rig.poll();
    let out = rig.outstanding.len();
    assert_eq!(reads_out(&rig), 1);
    // The read stays out; a write of whole blocks and a read of the block itself come and are done.
    let whole = rig.submit(write(128..384, 60_000, false));
    let same = rig.submit(Request::Read { offset: 0, len: 2048 });
    rig.poll();
    while rig.outstanding.len() > out {
        rig.complete(out);
        rig.poll();
    }
    assert!(rig.answers[&whole].is_ok());
    let Ok(Reply::Data(pieces)) = &rig.answers[&same] else {
        panic!("a read never waits for a write")
    };
    assert_eq!(sector_stamps(pieces), [1, 2, 3, 4]);
    assert!(!rig.answers.contains_key(&part));
    rig.settle();
    assert_eq!(read(&mut rig, 2..5).unwrap(), [3, 50_000, 5]);
    assert_eq!(read(&mut rig, 127..129).unwrap(), [128, 60_000]);
}

#[test]
fn what_comes_for_a_busy_block_keeps_its_order() {
    let mut rig = written();
    rig.submit(write(3..4, 50_000, false));
    rig.poll();
    rig.submit(write(0..256, 60_000, false));
    rig.submit(write(7..8, 70_000, false));
    rig.submit(zero(8..9));
    rig.submit(zero(128..256));
    rig.submit(write(130..131, 80_000, false));
    rig.settle();
    assert!(rig.answers.values().all(|answer| answer.is_ok()) && rig.answers.len() > 5);
    let mut expected: Vec<u64> = (60_000..60_128).chain(vec![0; 128]).collect();
    (expected[7], expected[8], expected[130]) = (70_000, 0, 80_000);
    assert_eq!(read(&mut rig, 0..256).unwrap(), expected);
}

#[test]
fn a_part_with_fua_is_answered_when_its_block_is_durable() {
    let mut rig = written();
    rig.flush().unwrap();
    let id = rig.submit(write(3..130, 50_000, true));
    rig.poll();
    while let Some(index) = rig
        .outstanding
        .iter()
        .position(|(_, io)| !matches!(io, Io::Sync { .. }))
    {
        rig.complete(index);
        rig.poll();
    }
    assert!(
        !rig.answers.contains_key(&id),
        "two blocks are in the log, and nothing is synced"
    );
    rig.settle();
    assert!(rig.answers[&id].is_ok());
    let mut disk = rig.disk.cut(Cut::None);
    let (engine, _) = open(&mut disk, 2).unwrap();
    let mut rig = Rig::new(disk, engine);
    assert_eq!(read(&mut rig, 2..4).unwrap(), [3, 50_000]);
    assert_eq!(read(&mut rig, 129..131).unwrap(), [50_126, 131]);
}

#[test]
fn a_part_of_a_block_that_is_damaged_is_refused_and_heals_nothing() {
    let mut rig = written();
    rig.flush().unwrap();
    rig.close();
    let mut disk = rig.disk;
    // A place in the first block's bytes: behind the segment's header and the record's.
    disk.flip(crate::harness::segment(0), 3 * 4096 + 77, 3);
    let (engine, _) = open(&mut disk, 2).unwrap();
    let mut rig = Rig::new(disk, engine);
    assert!(matches!(
        rig.run(write(100..101, 50_000, false)),
        Err(RequestError::Corrupt(_))
    ));
    assert!(matches!(read(&mut rig, 0..1), Err(RequestError::Corrupt(_))));
    rig.run(write(0..128, 60_000, false)).unwrap();
    assert_eq!(read(&mut rig, 100..101).unwrap(), [60_100], "a whole one heals it");
    rig.run(write(100..101, 50_000, false)).unwrap();
    assert_eq!(read(&mut rig, 99..102).unwrap(), [60_099, 50_000, 60_101]);
}

#[test]
fn a_block_that_is_trimmed_bit_by_bit_gives_its_space_back() {
    let mut rig = written();
    for n in 0..16 {
        rig.run(zero(n * 8..n * 8 + 8)).unwrap();
    }
    rig.pass_time(20_000);
    assert_eq!(read(&mut rig, 0..129).unwrap()[..128], [0; 128]);
    let stats = rig.engine.store_stats();
    assert_eq!(stats.live_bytes % 4096, 0);
    for block in 1..8 {
        rig.run(zero(block * 128..block * 128 + 128)).unwrap();
    }
    rig.close();
    assert_eq!(rig.engine.store_stats().live_bytes, 0);
    assert_check_passes(&mut rig.disk);
}

#[test]
fn closing_waits_for_parts_that_were_taken() {
    let mut rig = written();
    let id = rig.submit(write(3..4, 50_000, false));
    rig.close();
    assert!(rig.answers[&id].is_ok());
    let (engine, report) = open(&mut rig.disk, 2).unwrap();
    assert_eq!(report.replayed_records, 0);
    assert_eq!(read(&mut Rig::new(rig.disk, engine), 3..4).unwrap(), [50_000]);
}

#[test]
fn a_snapshot_holds_the_parts_that_came_before_it_and_none_that_came_after() {
    let mut rig = written();
    rig.submit(write(3..4, 50_000, false));
    let id = snapshot_id(1);
    rig.order(Control::Snapshot { id, time_ms: 1 });
    rig.submit(write(4..5, 60_000, false));
    rig.settle();
    let (offset, len) = (2 * SECTOR_BYTES, 4 * SECTOR_BYTES);
    let Reply::Data(pieces) = rig.control(Control::Read { id, offset, len }).unwrap() else {
        panic!("a read gives data")
    };
    assert_eq!(sector_stamps(&pieces), [3, 50_000, 5, 6]);
    assert_eq!(read(&mut rig, 2..6).unwrap(), [3, 50_000, 60_000, 6]);
}

#[test]
fn a_part_that_waits_for_room_while_the_volume_is_reverted_changes_what_it_was_reverted_to() {
    let shape = shape(1);
    let mut disk = SimDisk::default();
    shape.format(&mut disk, 2_000);
    let (store, _) = open_replica(&mut disk, options(1)).unwrap();
    let mut rig = Rig::new(disk, Volume::new(store));
    let block = rig.block() / SECTOR_BYTES;
    rig.run(write(0..block, 1, false)).unwrap();
    let id = snapshot_id(1);
    rig.snapshot(id);
    rig.run(write(0..block, 5_000, false)).unwrap();
    rig.disk.capacity = Some(14 * SEGMENT_BYTES);
    // Until the pool is full.
    let mut first = block;
    let full = loop {
        let last = rig.submit(write(first..first + 8 * block, 10_000 + first, false));
        first += 8 * block;
        rig.settle();
        (0..20).for_each(|_| rig.pass_time(1_100));
        if rig.answers.remove(&last).is_none() {
            break last;
        }
    };
    assert!(rig.engine.waits_for_space());
    // A part of the block of the snapshot is merged with what the block is now, and waits behind it.
    let part = rig.submit(write(3..4, 900_000, false));
    rig.settle();
    assert!(!rig.answers.contains_key(&part));
    let revert = rig.order(Control::Revert {
        id,
        discard_newer: true,
    });
    rig.settle();
    rig.disk.capacity = None;
    (0..5).for_each(|_| rig.pass_time(1_100));
    for request in [full, part, revert] {
        assert!(rig.answers[&request].is_ok(), "{request:?}");
    }
    let mut expected: Vec<u64> = (1..=block).collect();
    expected[3] = 900_000;
    assert_eq!(read(&mut rig, 0..block).unwrap(), expected);
    rig.close();
    assert_check_passes(&mut rig.disk);
}

#[test]
fn after_a_failed_write_every_part_is_told() {
    let mut rig = written();
    rig.submit(write(3..4, 50_000, false));
    rig.submit(write(0..200, 60_000, false));
    rig.submit(write(5..6, 70_000, false));
    rig.poll();
    rig.complete(0);
    rig.disk.fail_next = true;
    rig.settle();
    assert_eq!(rig.answers.len(), 3, "{:?}", rig.answers);
    assert!(
        rig.answers
            .values()
            .all(|answer| matches!(answer, Err(RequestError::Failed(_))))
    );
    assert_eq!(read(&mut rig, 3..4).unwrap(), [4]);
}

// ---- power cuts -------------------------------------------------------------------------------------------------

struct Write {
    id: RequestId,
    sectors: Range<u64>,
    /// 0 for zeroes.
    stamp: Stamp,
    fua: bool,
    /// Moments of the run.
    submitted: usize,
    answered: Option<usize>,
    flushed: bool,
}

/// A guest that has many requests out at a time, and never two for one sector.
struct Guest {
    random: Random,
    writes: Vec<Write>,
    /// What was written to each sector, in order.
    history: Vec<Vec<usize>>,
    flushes: Vec<(RequestId, usize)>,
    block: u64,
    stamp: Stamp,
    now: usize,
}

impl Guest {
    fn act(&mut self, rig: &mut Rig) {
        self.now += 1;
        let size = self.history.len() as u64;
        if self.random.chance(12) {
            self.flushes.push((rig.submit(Request::Flush), self.now));
            return;
        }
        let sectors = some(&mut self.random, size, self.block, 300);
        let out = self.writes.iter().filter(|write| write.answered.is_none());
        let meets = |other: &Range<u64>| other.start < sectors.end && sectors.start < other.end;
        if out.map(|write| &write.sectors).any(meets) {
            return;
        }
        let (fua, zeroes) = (self.random.chance(10), self.random.chance(15));
        let (stamp, request) = if zeroes {
            (0, zero(sectors.clone()))
        } else {
            let stamp = self.stamp;
            self.stamp += sectors.end - sectors.start;
            (stamp, write(sectors.clone(), stamp, fua))
        };
        let index = self.writes.len();
        for sector in sectors.clone() {
            self.history[sector as usize].push(index);
        }
        self.writes.push(Write {
            id: rig.submit(request),
            sectors,
            stamp,
            fua: fua && !zeroes,
            submitted: self.now,
            answered: None,
            flushed: false,
        });
    }

    fn listen(&mut self, rig: &mut Rig) {
        self.now += 1;
        for write in self.writes.iter_mut().filter(|write| write.answered.is_none()) {
            if let Some(answer) = rig.answers.remove(&write.id) {
                answer.expect("a healthy disk with room serves every write");
                (write.answered, write.flushed) = (Some(self.now), write.fua);
            }
        }
        for (id, asked) in std::mem::take(&mut self.flushes) {
            match rig.answers.remove(&id) {
                None => self.flushes.push((id, asked)),
                Some(answer) => {
                    answer.expect("a healthy disk serves every flush");
                    let covered = self
                        .writes
                        .iter_mut()
                        .filter(|write| write.answered.is_some_and(|at| at < asked));
                    covered.for_each(|write| write.flushed = true);
                }
            }
        }
    }

    /// How far each sector is at most, as places in its history; 0 is before the first write.
    fn places(&self, state: &[Stamp]) -> Vec<usize> {
        let place = |(sector, stamp): (usize, &Stamp)| {
            let history = &self.history[sector];
            let here = |index: &usize| {
                let write = &self.writes[*index];
                let its = if write.stamp == 0 {
                    0
                } else {
                    write.stamp + sector as u64 - write.sectors.start
                };
                its == *stamp
            };
            match history.iter().rposition(here) {
                Some(place) => place + 1,
                None if *stamp == 0 => 0,
                None => panic!("sector {sector} holds {stamp}, which nobody wrote there"),
            }
        };
        state.iter().enumerate().map(place).collect()
    }

    fn verify(&self, disk: &SimDisk, epoch: u32, killed: bool, what: &str) {
        let mut disk = disk.clone();
        let (engine, report) = open_as(&mut disk, IDENTITY, epoch).unwrap_or_else(|error| panic!("{what}: {error}"));
        assert_eq!(report.damaged_blocks, Vec::<u64>::new(), "{what}");
        let state = read_all(&mut Rig::new(disk, engine));
        let places = self.places(&state);
        let shown = |write: &usize, sector: u64| {
            let place = self.history[sector as usize].iter().position(|other| other == write);
            places[sector as usize] > place.expect("it is in the history of its sectors")
        };
        // The last moment at which something was submitted that is there.
        let tops = places.iter().enumerate().filter(|(_, place)| **place > 0);
        let tops = tops.filter(|(sector, _)| state[*sector] != 0);
        let tops = tops.map(|(sector, place)| self.writes[self.history[sector][place - 1]].submitted);
        let latest = tops.max().unwrap_or(0);
        for (index, write) in self.writes.iter().enumerate() {
            let answered_before = write.answered.is_some_and(|at| at < latest);
            if write.flushed || answered_before || killed && write.answered.is_some() {
                let lost = write.sectors.clone().find(|sector| !shown(&index, *sector));
                assert_eq!(lost, None, "{what}: of a write of {:?} a sector is lost", write.sectors);
            }
            if write.stamp == 0 {
                continue; // zeros do not say who wrote them
            }
            for block in write.sectors.start / self.block..write.sectors.end.div_ceil(self.block) {
                let here = write.sectors.start.max(block * self.block)..write.sectors.end.min((block + 1) * self.block);
                // Zeros do not say whether they are those before it or those after.
                let after = |sector: u64| {
                    let history = &self.history[sector as usize];
                    let later = history.iter().skip_while(|other| **other != index);
                    later.into_iter().any(|other| self.writes[*other].stamp == 0)
                };
                let told = here
                    .clone()
                    .filter(|sector| state[*sector as usize] != 0 || !after(*sector));
                let (new, old): (Vec<u64>, Vec<u64>) = told.partition(|sector| shown(&index, *sector));
                assert!(
                    new.is_empty() || old.is_empty(),
                    "{what}: block {block} is torn: {new:?} are new, {old:?} are not"
                );
            }
        }
    }
}

fn run(seed: u64, boundaries: usize) -> usize {
    let shape = shape(seed);
    let blocks = shape.blocks(160);
    let mut disk = SimDisk::default();
    shape.format(&mut disk, blocks);
    let (engine, _) = open(&mut disk, 1).unwrap();
    let mut rig = Rig::new(disk, engine);
    let block = rig.block() / SECTOR_BYTES;
    let mut guest = Guest {
        random: Random(seed),
        writes: Vec::new(),
        history: vec![Vec::new(); (blocks * block) as usize],
        flushes: Vec::new(),
        block,
        stamp: 1,
        now: 0,
    };
    let (mut boundary, mut states) = (0, 0);
    while boundary < boundaries {
        for _ in 0..guest.random.below(3) {
            guest.act(&mut rig);
        }
        rig.now_ms += guest.random.below(3);
        rig.engine.tick(rig.now_ms);
        rig.poll();
        guest.listen(&mut rig);
        if rig.outstanding.is_empty() {
            continue;
        }
        let index = guest.random.below(rig.outstanding.len() as u64) as usize;
        rig.complete(index);
        rig.poll();
        guest.listen(&mut rig);
        boundary += 1;
        if boundary % 4 != 0 {
            continue;
        }
        let in_flight = rig.disk_in_flight();
        for cut in [Cut::None, Cut::All, Cut::Random(guest.random.next())] {
            let what = format!("seed {seed} boundary {boundary} {cut:?}");
            guest.verify(&in_flight.cut(cut), 2, false, &what);
        }
        guest.verify(
            &rig.disk.kill(),
            2,
            true,
            &format!("seed {seed} boundary {boundary} kill"),
        );
        states += 4;
    }
    rig.settle();
    guest.listen(&mut rig);
    assert!(
        guest.writes.iter().all(|write| write.answered.is_some()),
        "seed {seed}: everybody is answered"
    );
    rig.close();
    assert_check_passes(&mut rig.disk);
    guest.verify(&rig.disk.cut(Cut::None), 2, true, &format!("seed {seed} closed"));
    states
}

/// `SEEDS=n FIRST=m` runs seeds m to m+n-1.
#[test]
fn a_write_of_sectors_that_meets_a_crash_leaves_each_block_old_or_new() {
    let number = |name| std::env::var(name).ok().and_then(|text| text.parse::<u64>().ok());
    let (first, seeds) = (number("FIRST").unwrap_or(0), number("SEEDS").unwrap_or(12));
    let states: usize = (first..first + seeds).map(|seed| run(seed, 400)).sum();
    println!("{states} crash states recovered");
}
