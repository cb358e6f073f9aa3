//! A replica's store with a disk behind it and nobody in front: tests are the stream, the copies and the decisions.
//!
//! What a block holds follows from its address and version, as in every replica of a volume. The rig reads the records
//! that the store writes, so it knows the log in its order, and what is there after any part of it.

use std::collections::BTreeMap;

use galleonfs_storage_engine::buffer::{Buf, BufMut};
use galleonfs_storage_engine::io::{Disk, FileId, Io, IoId, perform};
use galleonfs_storage_engine::store::{
    Batch, Body, EpochEnd, Event, FormatOptions, OpenError, OpenOptions, OpenReport, Room, Seals, Settle, Store,
    Stored, StoredBlock, WriteEntry, format_joining_replica, open_replica,
};
use galleonfs_storage_engine::types::{BlockSize, Check, Epoch, Lba, Seq, Version};

use crate::harness::{IDENTITY, SEGMENT_BYTES, fill, options};
use crate::sim_disk::SimDisk;

pub fn version(epoch: u32, seq: u64) -> Version {
    Version {
        epoch: Epoch(epoch),
        seq: Seq(seq),
    }
}

pub fn end(epoch: u32, end: u64) -> EpochEnd {
    EpochEnd {
        first: Epoch(epoch),
        last: Epoch(epoch),
        end: Seq(end),
    }
}

/// A block of zeros, or one that was never written.
pub const VACANT: Content = (
    Version {
        epoch: Epoch(0),
        seq: Seq(0),
    },
    true,
);

/// What a block holds: since when, and whether that is zeros.
pub type Content = (Version, bool);

/// A record of the chain.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Logged {
    Data {
        epoch: Epoch,
        first: Seq,
        writes: Vec<WriteEntry>,
    },
    Copied {
        rows: Vec<(Lba, Lba, Content)>,
    },
    Join {
        epoch: Epoch,
        base: Seq,
    },
}

/// What is there after some records, if epochs end where they are said to.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct State {
    /// What blocks hold that were ever written.
    pub blocks: Vec<Content>,
    pub last: Version,
    /// The log was cut: nothing behind that counts.
    pub over: bool,
    /// Copies may also put a block over itself: it was damaged.
    pub mends: bool,
}

impl State {
    pub fn new(size: u64) -> State {
        State {
            blocks: vec![VACANT; size as usize],
            last: Version::default(),
            over: false,
            mends: false,
        }
    }

    fn put(&mut self, start: Lba, end: Lba, content: Content) -> Result<(), String> {
        for lba in start.0..end.0 {
            let block = &mut self.blocks[lba as usize];
            let same = self.mends && content == *block;
            if content.0 <= block.0 && !same {
                let (new, old) = (content.0, block.0);
                return Err(format!("I15: block {lba} has version {old}, and {new} was put over it"));
            }
            *block = content;
        }
        Ok(())
    }

    pub fn apply(&mut self, record: &Logged, ends: &BTreeMap<u32, u64>) {
        self.try_apply(record, ends).unwrap_or_else(|wrong| panic!("{wrong}"));
    }

    /// Fails if something would be put over what is not older.
    pub fn try_apply(&mut self, record: &Logged, ends: &BTreeMap<u32, u64>) -> Result<(), String> {
        let kept = |at: Version| ends.get(&at.epoch.0).is_none_or(|end| at.seq.0 <= *end);
        match record {
            _ if self.over => {}
            Logged::Data { epoch, first, writes } => {
                for (seq, write) in (first.0..).zip(writes) {
                    let at = version(epoch.0, seq);
                    if !kept(at) {
                        self.over = seq == first.0;
                        break;
                    }
                    self.put(write.lba, write.end(), (at, write.zero))?;
                    self.last = at;
                }
            }
            Logged::Copied { rows } => {
                for (start, end, content) in rows.iter().filter(|(_, _, content)| kept(content.0)) {
                    self.put(*start, *end, *content)?;
                }
            }
            Logged::Join { epoch, base } => {
                let at = version(epoch.0, base.0);
                self.over = !kept(at);
                if !self.over {
                    self.last = at;
                }
            }
        }
        Ok(())
    }
}

/// See the module.
pub struct Replica {
    pub disk: SimDisk,
    pub store: Store,
    pub outstanding: Vec<(IoId, Io)>,
    pub events: Vec<Event>,
    pub now_ms: u64,
    pub size: u64,
    /// The chain, in its order, and what is there when all of it is done.
    pub log: Vec<Logged>,
    pub now: State,
    /// Writes and reads of whole pages of the map count here.
    pub page_reads: usize,
    next_token: u64,
}

pub fn format(size: u64, block_size: BlockSize) -> SimDisk {
    format_as(size, block_size, 0x5a17)
}

/// Replicas of one volume have different salts.
pub fn format_as(size: u64, block_size: BlockSize, salt: u64) -> SimDisk {
    let mut disk = SimDisk::default();
    let options = FormatOptions {
        identity: IDENTITY,
        block_size,
        size_blocks: size,
        segment_bytes: Some(SEGMENT_BYTES),
        salt,
    };
    format_joining_replica(&mut disk, &options, &[]).expect("an empty disk can be formatted");
    disk
}

pub fn told(epoch: u32, ends: &[EpochEnd]) -> OpenOptions {
    OpenOptions {
        settle: Settle::Told(ends.to_vec()),
        ..options(epoch)
    }
}

impl Replica {
    pub fn fresh(size: u64, epoch: u32) -> Replica {
        let (replica, _) = Replica::open(format(size, BlockSize::K4), told(epoch, &[])).unwrap();
        replica
    }

    pub fn open(mut disk: SimDisk, options: OpenOptions) -> Result<(Replica, OpenReport), OpenError> {
        let (store, report) = open_replica(&mut disk, options)?;
        let replica = Replica {
            disk,
            size: store.size_blocks(),
            now: State::new(store.size_blocks()),
            store,
            outstanding: Vec::new(),
            events: Vec::new(),
            now_ms: 0,
            log: Vec::new(),
            page_reads: 0,
            next_token: 1,
        };
        Ok((replica, report))
    }

    /// Takes what the store has to say.
    pub fn poll(&mut self) {
        loop {
            while let Some(event) = self.store.poll_event() {
                self.events.push(event);
            }
            let Some((id, io)) = self.store.poll_io() else {
                if self.store.has_events() {
                    continue;
                }
                break;
            };
            match &io {
                Io::Write {
                    file: FileId::Segment(_),
                    parts,
                    ..
                } => self.note(&parts[0]),
                Io::Read { buf, .. } if buf.len() == 4096 => self.page_reads += 1,
                _ => {}
            }
            self.outstanding.push((id, io));
        }
    }

    fn note(&mut self, first: &Buf) {
        let Some((header, _)) = self.store.seals().decode(first.as_ref()) else {
            return;
        };
        let epoch = header.epoch;
        let payload = header.payload();
        let record = match header.body {
            Body::Data { first_seq, writes, .. } => Logged::Data {
                epoch,
                first: first_seq,
                writes,
            },
            Body::Copied { zeros, .. } => {
                let blocks = payload
                    .iter()
                    .map(|block| (block.lba, Lba(block.lba.0 + 1), (block.version, false)));
                let zeros = zeros
                    .iter()
                    .map(|range| (range.start, range.end, (range.version, true)));
                Logged::Copied {
                    rows: blocks.chain(zeros).collect(),
                }
            }
            Body::Join { base } => Logged::Join { epoch, base },
            _ => return,
        };
        // Whatever the timing, what is put somewhere is newer than what is there.
        self.now.apply(&record, &BTreeMap::new());
        self.log.push(record);
    }

    /// What is there when everything that was handed out is done.
    pub fn state(&self, ends: &BTreeMap<u32, u64>) -> State {
        let mut state = State::new(self.size);
        self.log.iter().for_each(|record| state.apply(record, ends));
        state
    }

    pub fn complete(&mut self, index: usize) {
        let (id, io) = self.outstanding.swap_remove(index);
        let result = perform(&mut self.disk, io);
        self.store.completed(id, result);
        self.poll();
    }

    /// Until nothing is out.
    pub fn settle(&mut self) {
        loop {
            self.poll();
            if !self.outstanding.is_empty() {
                self.complete(0);
            } else if self.store.next_tick_ms().is_some_and(|at| at <= self.now_ms) {
                self.store.tick(self.now_ms);
            } else {
                return;
            }
        }
    }

    pub fn pass_time(&mut self, ms: u64) {
        self.now_ms += ms;
        self.store.tick(self.now_ms);
        self.settle();
    }

    pub fn token(&mut self) -> u64 {
        self.next_token += 1;
        self.next_token
    }

    /// Appends these writes as the next ones of the stream; false if there is no room yet.
    pub fn append(&mut self, first: u64, writes: &[WriteEntry]) -> bool {
        let pages = self.store.block_size().pages();
        let blocks: u32 = writes
            .iter()
            .filter(|write| !write.zero)
            .map(|write| write.blocks)
            .sum();
        if self.store.room(blocks as usize * usize::from(pages), blocks == 0) != Room::Ready {
            return false;
        }
        let (mut checks, mut lengths, mut payload) = (Vec::new(), Vec::new(), Vec::new());
        for (seq, write) in (first..).zip(writes).filter(|(_, write)| !write.zero) {
            for lba in write.lba.0..write.end().0 {
                let at = Version {
                    epoch: self.store.epoch(),
                    seq: Seq(seq),
                };
                let block = stored(self.store.seals(), Lba(lba), at);
                checks.push(block.check);
                if pages > 1 {
                    lengths.push(block.pages);
                }
                payload.push(block.bytes);
            }
        }
        self.store.append(Batch {
            first_seq: Seq(first),
            writes: writes.to_vec(),
            checks,
            pages: lengths,
            payload,
        });
        true
    }

    /// Appends one write and waits for it.
    pub fn write(&mut self, seq: u64, lba: u64, blocks: u32, zero: bool) {
        let lba = Lba(lba);
        assert!(self.append(seq, &[WriteEntry { lba, blocks, zero }]), "there is room");
        self.settle();
    }

    /// Copies of these contents, in ascending order.
    pub fn copies(&self, rows: &[(Lba, Lba, Content)]) -> Vec<Stored> {
        let copy = |(start, end, (version, zero)): &(Lba, Lba, Content)| -> Vec<Stored> {
            if *zero {
                return vec![Stored::Zeros {
                    start: *start,
                    end: *end,
                    version: *version,
                }];
            }
            let blocks = (start.0..end.0).map(Lba);
            blocks
                .map(|lba| Stored::Block(stored(self.store.seals(), lba, *version)))
                .collect()
        };
        rows.iter().flat_map(copy).collect()
    }

    /// Reads everything back, and makes sure that each block is what its version says.
    pub fn contents(&mut self) -> Vec<Content> {
        let mut blocks = Vec::new();
        for lba in (0..self.size).step_by(64) {
            let token = self.token();
            self.store.read_stored(token, Lba(lba), 64.min(self.size - lba));
            self.settle();
            let found = self.take(|event| match event {
                Event::Stored(found, result) if *found == token => {
                    Some(result.clone().expect("what is stored is right"))
                }
                _ => None,
            });
            for part in found {
                assert_eq!(part.start().0, blocks.len() as u64, "one after the other");
                match part {
                    Stored::Zeros { start, end, version } => {
                        blocks.extend((start.0..end.0).map(|_| (version, true)));
                    }
                    Stored::Block(block) => {
                        let expected = stored(self.store.seals(), block.lba, block.version);
                        assert_eq!(block.bytes.as_ref(), expected.bytes.as_ref(), "block {}", block.lba.0);
                        assert_eq!((block.check, block.pages), (expected.check, expected.pages));
                        blocks.push((block.version, false));
                    }
                }
            }
        }
        blocks
    }

    /// The first event that is wanted; it is taken.
    pub fn take<T>(&mut self, wanted: impl Fn(&Event) -> Option<T>) -> T {
        let found = self
            .events
            .iter()
            .enumerate()
            .find_map(|(n, event)| Some((n, wanted(event)?)));
        let (n, found) = found.unwrap_or_else(|| panic!("it is not among {:?}", self.events));
        self.events.remove(n);
        found
    }

    /// The disk as it is, with the writes that are out on their way.
    pub fn disk_in_flight(&self) -> SimDisk {
        let mut disk = self.disk.clone();
        for (_, io) in &self.outstanding {
            if let Io::Write { file, offset, parts } = io {
                disk.write_in_flight(*file, *offset, parts);
            }
        }
        disk
    }

    /// Makes everything that was appended durable.
    pub fn sync(&mut self) {
        self.store.sync();
        self.settle();
    }

    pub fn promise(&mut self, epoch: u32) {
        self.store.promise(Epoch(epoch), &[]);
        self.settle();
        self.take(|event| matches!(event, Event::Promised(found) if *found == Epoch(epoch)).then_some(()));
    }

    pub fn settle_ends(&mut self, ends: &[EpochEnd]) {
        self.store.settle(ends);
        self.settle();
        self.take(|event| matches!(event, Event::Settled).then_some(()));
    }
}

/// What this block of this version is stored as, in every replica of the volume.
pub fn stored(seals: Seals, lba: Lba, at: Version) -> StoredBlock {
    let stamp = (u64::from(at.epoch.0) << 48 | at.seq.0 << 24 | lba.0) + 1;
    let most = seals.block_size().pages();
    let pages = 1 + (stamp % u64::from(most)) as u8;
    let mut bytes = BufMut::zeroed(usize::from(pages) * 4096);
    fill(stamp, bytes.as_mut());
    let check = Check::from(seals.block(lba, at, bytes.as_ref()));
    StoredBlock {
        lba,
        version: at,
        check,
        pages,
        bytes: bytes.freeze(),
    }
}

/// The offline checker finds nothing.
pub fn assert_check_passes(disk: &SimDisk) {
    let report = galleonfs_storage_engine::store::check::check(&mut disk.clone() as &mut dyn Disk);
    assert_eq!(report.expect("the replica can be read").problems, Vec::<String>::new());
}
