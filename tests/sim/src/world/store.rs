//! A store in memory that keeps the promises of the real one, and no more than those.
//!
//! It has a log of entries of which a prefix is in the kernel's hands and a shorter one on stable storage, a checkpoint that
//! replaces what lies before it, and a superblock. Operations take time; a power cut keeps what was synced and a prefix of
//! the rest. It is much smaller than the real store, so a thousand runs take seconds; what the real one adds is its own
//! crash tests' business, and both are run under the same primary and replicas.

use std::collections::{BTreeMap, VecDeque};
use std::sync::Arc;

use galleonfs_storage_engine::buffer::Buf;
use galleonfs_storage_engine::replication::message::{Batch, Row, Rows, Stored, StoredBlock};
use galleonfs_storage_engine::replication::{CopyMode, ReplicaEvent, ReplicaStore};
use galleonfs_storage_engine::seal::KeyRow;
use galleonfs_storage_engine::store::Room;
use galleonfs_storage_engine::store::layout::EpochEnd;
use galleonfs_storage_engine::types::{Check, Epoch, Lba, Seq, Version};

use super::backend::{Backend, Contents};
use super::rng::Rng;

/// What a block is: since when, and its bytes; none: zeros.
type Block = (Version, Option<(Check, Buf)>);

/// The blocks that were ever written.
type Blocks = BTreeMap<Lba, Block>;

#[derive(Clone, Debug)]
enum Entry {
    Stream(Arc<Batch>, Epoch),
    Copied(Vec<Stored>),
    Join(Version),
}

impl Entry {
    /// True if this entry has anything behind the end of its epoch.
    fn is_behind(&self, ends: &[EpochEnd]) -> bool {
        match self {
            Entry::Stream(batch, epoch) => {
                let seq = batch.last_seq();
                behind(ends, Version { epoch: *epoch, seq })
            }
            Entry::Join(base) => behind(ends, *base),
            Entry::Copied(blocks) => blocks.iter().any(|stored| behind(ends, stored.version())),
        }
    }

    /// The place in the stream that it leads to.
    fn last(&self) -> Option<Version> {
        match self {
            Entry::Stream(batch, epoch) => Some(Version {
                epoch: *epoch,
                seq: batch.last_seq(),
            }),
            Entry::Join(base) => Some(*base),
            Entry::Copied(_) => None,
        }
    }

    fn apply(&self, blocks: &mut Blocks) {
        match self {
            Entry::Join(_) => {}
            Entry::Copied(copied) => {
                for stored in copied {
                    match stored {
                        Stored::Block(block) => {
                            let stored = Some((block.check, block.bytes.clone()));
                            blocks.insert(block.lba, (block.version, stored));
                        }
                        Stored::Zeros { start, end, version } => {
                            for lba in (start.0..end.0).map(Lba) {
                                blocks.insert(lba, (*version, None));
                            }
                        }
                    }
                }
            }
            Entry::Stream(batch, epoch) => {
                let mut payload = batch.payload.iter().flat_map(|part| {
                    let blocks = part.len() / BLOCK;
                    (0..blocks).map(|n| part.slice(n * BLOCK..(n + 1) * BLOCK))
                });
                let mut checks = batch.checks.iter();
                for (n, write) in batch.writes.iter().enumerate() {
                    let version = Version {
                        epoch: *epoch,
                        seq: Seq(batch.first_seq.0 + n as u64),
                    };
                    for lba in (write.lba.0..write.end().0).map(Lba) {
                        let stored = (!write.zero).then(|| {
                            let check = *checks.next().expect("a check for each block");
                            (check, payload.next().expect("bytes for each block"))
                        });
                        blocks.insert(lba, (version, stored));
                    }
                }
            }
        }
    }
}

const BLOCK: usize = 4096;

fn behind(ends: &[EpochEnd], version: Version) -> bool {
    let row = ends.iter().find(|row| row.covers(version.epoch));
    row.is_some_and(|row| version.seq > row.end)
}

/// What survives a power cut, apart from the log.
#[derive(Clone, Debug, Default)]
struct Superblock {
    promised: Epoch,
    ends: BTreeMap<Epoch, Seq>,
    /// The blocks as they were before the first entry of the log.
    blocks: Blocks,
    last: Version,
}

/// A replica's disk, without anybody who uses it.
#[derive(Clone, Debug)]
pub struct SimDisk {
    volume: [u8; 16],
    replica: [u8; 16],
    superblock: Superblock,
    log: VecDeque<Entry>,
    /// So many entries are in the kernel's hands.
    written: usize,
    /// So many are on stable storage.
    durable: usize,
    /// Blocks that do not pass their check, in this version.
    damaged: BTreeMap<Lba, Version>,
}

/// An operation that takes time.
#[derive(Debug)]
enum Operation {
    Write,
    /// Up to this entry, counted from the first there ever was.
    Sync(u64),
    Promise(Epoch),
    Settle(Vec<EpochEnd>),
    Checkpoint(Box<Superblock>, usize),
    Read {
        token: u64,
        lba: Lba,
        blocks: u64,
    },
    Rows {
        token: u64,
        from: Lba,
        after: Version,
        max: usize,
    },
}

/// See the module.
#[derive(Debug)]
pub struct SimStore {
    disk: SimDisk,
    /// The blocks as of what is written, and as of what was handed to the log.
    applied: Blocks,
    head: Blocks,
    /// The last write that was handed to the log, and the last one that is in it.
    handed: Version,
    last: Version,
    durable: Version,
    agreed: Version,
    operations: BTreeMap<u64, Operation>,
    /// Writes end in any order, and count in theirs.
    done: BTreeMap<u64, bool>,
    tokens: VecDeque<(u64, Option<u64>)>,
    next: u64,
    started: Vec<u64>,
    /// A superblock is written one at a time.
    superblocks: VecDeque<Operation>,
    writing_superblock: bool,
    syncing: bool,
    sync_again: bool,
    /// Entries that checkpoints replaced.
    replaced: u64,
    copies: u64,
    copies_durable: u64,
    events: VecDeque<ReplicaEvent>,
}

impl SimStore {
    /// A superblock that was being written may be there or not.
    fn end_superblock(&mut self, rng: &mut Rng) {
        let running = self.operations.values().find(|operation| {
            matches!(
                operation,
                Operation::Promise(_) | Operation::Settle(_) | Operation::Checkpoint(..)
            )
        });
        if running.is_some() && rng.percent(50) {
            let key = self.operations.iter().find(|(_, operation)| {
                matches!(
                    operation,
                    Operation::Promise(_) | Operation::Settle(_) | Operation::Checkpoint(..)
                )
            });
            let key = *key.expect("it was just seen").0;
            let operation = self.operations.remove(&key).expect("it is there");
            self.superblock_written(operation);
        }
    }

    fn start(&mut self, operation: Operation) -> u64 {
        let id = self.next;
        self.next += 1;
        self.operations.insert(id, operation);
        self.started.push(id);
        id
    }

    fn write_ended(&mut self) {
        while let Some((id, token)) = self.tokens.front().copied() {
            if self.done.get(&id) != Some(&true) {
                break;
            }
            self.tokens.pop_front();
            self.done.remove(&id);
            let entry = self.disk.log[self.disk.written].clone();
            entry.apply(&mut self.applied);
            self.disk.written += 1;
            if let Some(last) = entry.last() {
                self.last = last;
                self.events.push_back(ReplicaEvent::Written(last));
            }
            if let Some(token) = token {
                self.events.push_back(ReplicaEvent::Copied(token, Ok(())));
            }
        }
        self.next_superblock();
    }

    fn append_entry(&mut self, entry: Entry, token: Option<u64>) {
        entry.apply(&mut self.head);
        if let Some(last) = entry.last() {
            self.handed = last;
        }
        if let Entry::Copied(_) = entry {
            self.copies += 1;
        }
        self.disk.log.push_back(entry);
        let id = self.start(Operation::Write);
        self.done.insert(id, false);
        self.tokens.push_back((id, token));
    }

    fn note_durable(&mut self) {
        let durable = self.disk.log.iter().take(self.disk.durable);
        let last = durable.clone().filter_map(Entry::last).next_back();
        let last = last.unwrap_or(self.disk.superblock.last);
        let left = self.disk.log.iter().skip(self.disk.durable);
        let left = left.filter(|entry| matches!(entry, Entry::Copied(_))).count() as u64;
        self.copies_durable = self.copies - left;
        self.durable = self.durable.max(last);
        self.events.push_back(ReplicaEvent::Durable(self.durable));
    }

    fn start_sync(&mut self) {
        self.syncing = true;
        let upto = self.replaced + self.disk.written as u64;
        self.start(Operation::Sync(upto));
    }

    fn queue_superblock(&mut self, operation: Operation) {
        self.superblocks.push_back(operation);
        self.next_superblock();
    }

    fn next_superblock(&mut self) {
        if self.writing_superblock {
            return;
        }
        // A promise waits for the writes that are out: what it reports as the last one is that.
        let waits = matches!(
            self.superblocks.front(),
            Some(Operation::Promise(_) | Operation::Settle(_))
        );
        if waits && self.disk.written < self.disk.log.len() {
            return;
        }
        if let Some(operation) = self.superblocks.pop_front() {
            self.writing_superblock = true;
            self.start(operation);
        }
    }

    fn superblock_written(&mut self, operation: Operation) {
        match operation {
            Operation::Promise(epoch) => {
                self.disk.superblock.promised = self.disk.superblock.promised.max(epoch);
                self.disk.durable = self.disk.written;
                self.note_durable();
            }
            Operation::Settle(ends) => {
                self.disk.durable = self.disk.written;
                self.note_durable();
                for row in ends {
                    for epoch in row.epochs() {
                        self.disk.superblock.ends.insert(epoch, row.end);
                    }
                }
            }
            Operation::Checkpoint(superblock, entries) => {
                self.disk.superblock.blocks = superblock.blocks;
                self.disk.superblock.last = superblock.last;
                self.disk.log.drain(..entries);
                self.replaced += entries as u64;
                self.disk.written -= entries;
                self.disk.durable = self.disk.durable.saturating_sub(entries);
            }
            _ => unreachable!("it is no superblock"),
        }
    }

    fn look(&self, lba: Lba, blocks: u64) -> Result<Vec<Stored>, String> {
        let look_at = |lba: Lba| match self.applied.get(&lba) {
            Some((version, _)) if self.disk.damaged.get(&lba) == Some(version) => {
                Err(format!("block {} does not pass its check", lba.0))
            }
            Some((version, Some((check, bytes)))) => Ok(Stored::Block(StoredBlock {
                lba,
                version: *version,
                check: *check,
                pages: 1,
                bytes: bytes.clone(),
            })),
            other => Ok(Stored::Zeros {
                start: lba,
                end: Lba(lba.0 + 1),
                version: other.map_or(Version::default(), |(version, _)| *version),
            }),
        };
        (lba.0..lba.0 + blocks).map(Lba).map(look_at).collect()
    }

    fn list(&self, from: Lba, after: Version, max: usize) -> Rows {
        let mut rows: Vec<Row> = Vec::new();
        for (lba, (version, block)) in self.applied.range(from..) {
            if *version <= after {
                continue;
            }
            let zero = block.is_none();
            let joins = |row: &&mut Row| row.zero && zero && row.version == *version && row.end == *lba;
            if let Some(row) = rows.last_mut().filter(joins) {
                row.end = Lba(lba.0 + 1);
            } else if rows.len() == max {
                let next = Some(*lba);
                return Rows { rows, next };
            } else {
                rows.push(Row {
                    start: *lba,
                    end: Lba(lba.0 + 1),
                    version: *version,
                    zero,
                });
            }
        }
        Rows { rows, next: None }
    }
}

/// The write that these bytes are of.
pub fn write_id(bytes: &Buf) -> u64 {
    let bytes = bytes.as_ref();
    let id = u64::from_le_bytes(bytes[..8].try_into().expect("eight bytes"));
    assert_eq!(bytes[4088..], id.to_le_bytes(), "a torn block passed for a whole one");
    id
}

impl Backend for SimStore {
    type Disk = SimDisk;
    const SLOWER: u64 = 1;

    fn blank(volume: [u8; 16], replica: [u8; 16], _blocks: u64) -> SimDisk {
        SimDisk {
            volume,
            replica,
            superblock: Superblock::default(),
            log: VecDeque::new(),
            written: 0,
            durable: 0,
            damaged: BTreeMap::new(),
        }
    }

    fn open(mut disk: SimDisk, told: Option<&[EpochEnd]>) -> Result<SimStore, String> {
        if let Some(ends) = told {
            let versions = disk.superblock.blocks.values().map(|(version, _)| *version);
            if let Some(version) = versions
                .chain([disk.superblock.last])
                .find(|version| behind(ends, *version))
            {
                return Err(format!(
                    "write {version} is in the checkpoint, and its epoch ended before"
                ));
            }
            if let Some(cut) = disk.log.iter().position(|entry| entry.is_behind(ends)) {
                disk.log.truncate(cut);
            }
            for row in ends {
                for epoch in row.epochs() {
                    disk.superblock.ends.insert(epoch, row.end);
                }
            }
        }
        let mut applied = disk.superblock.blocks.clone();
        let mut last = disk.superblock.last;
        for entry in &disk.log {
            entry.apply(&mut applied);
            last = entry.last().unwrap_or(last);
        }
        // Whoever opens a store syncs what it found.
        (disk.written, disk.durable) = (disk.log.len(), disk.log.len());
        Ok(SimStore {
            agreed: disk.superblock.last,
            disk,
            head: applied.clone(),
            applied,
            handed: last,
            last,
            durable: last,
            operations: BTreeMap::new(),
            done: BTreeMap::new(),
            tokens: VecDeque::new(),
            next: 0,
            started: Vec::new(),
            superblocks: VecDeque::new(),
            writing_superblock: false,
            syncing: false,
            sync_again: false,
            replaced: 0,
            copies: 0,
            copies_durable: 0,
            events: VecDeque::new(),
        })
    }

    fn kill(mut self, rng: &mut Rng) -> SimDisk {
        self.end_superblock(rng);
        let keep = rng.between(self.disk.written as u64, self.disk.log.len() as u64) as usize;
        self.disk.log.truncate(keep);
        (self.disk.written, self.disk.durable) = (keep, self.disk.durable.min(keep));
        self.disk
    }

    fn cut_power(mut self, rng: &mut Rng) -> (SimDisk, bool) {
        self.end_superblock(rng);
        let keep = rng.between(self.disk.durable as u64, self.disk.log.len() as u64) as usize;
        let loses = keep < self.disk.written;
        self.disk.log.truncate(keep);
        (self.disk.written, self.disk.durable) = (keep, keep);
        (self.disk, loses)
    }

    fn into_disk(self, _rng: &mut Rng) -> SimDisk {
        let mut disk = self.disk;
        disk.log.truncate(disk.written);
        disk
    }

    fn take_started(&mut self) -> Vec<u64> {
        std::mem::take(&mut self.started)
    }

    fn finish(&mut self, id: u64) {
        let Some(operation) = self.operations.remove(&id) else {
            return;
        };
        match operation {
            Operation::Write => {
                self.done.insert(id, true);
                self.write_ended();
            }
            Operation::Sync(upto) => {
                let upto = upto.saturating_sub(self.replaced) as usize;
                self.disk.durable = self.disk.durable.max(upto);
                self.note_durable();
                self.syncing = false;
                if std::mem::take(&mut self.sync_again) {
                    self.start_sync();
                }
            }
            Operation::Promise(_) | Operation::Settle(_) | Operation::Checkpoint(..) => {
                self.writing_superblock = false;
                let event = match &operation {
                    Operation::Promise(epoch) => Some(ReplicaEvent::Promised(*epoch)),
                    Operation::Settle(_) => Some(ReplicaEvent::Settled),
                    _ => None,
                };
                self.superblock_written(operation);
                self.events.extend(event);
                self.next_superblock();
            }
            Operation::Read { token, lba, blocks } => {
                let found = self.look(lba, blocks);
                self.events.push_back(ReplicaEvent::Read(token, found));
            }
            Operation::Rows {
                token,
                from,
                after,
                max,
            } => {
                let found = self.list(from, after, max);
                self.events.push_back(ReplicaEvent::Rows(token, Ok(found)));
            }
        }
    }

    fn checkpoint(&mut self, gated: bool) {
        if self.writing_superblock || !self.superblocks.is_empty() {
            return;
        }
        let mut superblock = self.disk.superblock.clone();
        let mut entries = 0;
        for entry in self.disk.log.iter().take(self.disk.durable) {
            let last = entry.last().unwrap_or(superblock.last);
            if gated && last > self.agreed {
                break;
            }
            entry.apply(&mut superblock.blocks);
            superblock.last = last;
            entries += 1;
        }
        if entries > 0 {
            self.queue_superblock(Operation::Checkpoint(Box::new(superblock), entries));
        }
    }

    fn contents(&self) -> Contents {
        let id = |block: &Block| (block.0, block.1.as_ref().map(|(_, bytes)| write_id(bytes)));
        self.applied.iter().map(|(lba, block)| (*lba, id(block))).collect()
    }

    fn damage(&mut self, lba: Lba, version: Version, _write: u64) -> bool {
        match self.applied.get(&lba) {
            Some((here, Some(_))) if *here == version => {
                self.disk.damaged.insert(lba, version);
                true
            }
            _ => false,
        }
    }

    fn scrub(&mut self) {
        let found = self.damaged().into_iter().map(ReplicaEvent::Damaged);
        self.events.extend(found);
    }

    fn damaged(&self) -> Vec<Lba> {
        let here = |(lba, damaged): (&Lba, &Version)| {
            let version = self.applied.get(lba).map(|(version, _)| version);
            (version == Some(damaged)).then_some(*lba)
        };
        self.disk.damaged.iter().filter_map(here).collect()
    }

    fn check(_volume: [u8; 16], _lba: Lba, _version: Version, _bytes: &Buf) -> Check {
        Check::default()
    }
}

impl ReplicaStore for SimStore {
    fn identity(&self) -> ([u8; 16], [u8; 16]) {
        (self.disk.volume, self.disk.replica)
    }

    fn promised(&self) -> Epoch {
        self.disk.superblock.promised
    }

    fn last(&self) -> (Version, Version) {
        (self.handed, self.last)
    }

    fn durable(&self) -> Version {
        self.durable
    }

    fn copies_durable(&self) -> bool {
        self.copies == self.copies_durable
    }

    fn ends(&self) -> Vec<EpochEnd> {
        let ends = self.disk.superblock.ends.iter();
        ends.map(|(epoch, end)| EpochEnd {
            first: *epoch,
            last: *epoch,
            end: *end,
        })
        .collect()
    }

    fn agreed(&self) -> Version {
        self.agreed
    }

    fn agree(&mut self, upto: Version) {
        self.agreed = self.agreed.max(upto);
    }

    fn promise(&mut self, epoch: Epoch, _row: Option<KeyRow>) {
        self.queue_superblock(Operation::Promise(epoch));
    }

    fn settle(&mut self, ends: &[EpochEnd]) {
        self.queue_superblock(Operation::Settle(ends.to_vec()));
    }

    fn is_behind(&self, ends: &[EpochEnd]) -> bool {
        let known = self.ends();
        let shrunk = known.iter().any(|row| {
            behind(
                ends,
                Version {
                    epoch: row.last,
                    seq: row.end,
                },
            )
        });
        shrunk || self.disk.log.iter().any(|entry| entry.is_behind(ends)) || behind(ends, self.last)
    }

    fn join(&mut self, base: Seq) {
        let epoch = self.disk.superblock.promised;
        self.append_entry(Entry::Join(Version { epoch, seq: base }), None);
    }

    fn room(&mut self, _pages: usize) -> Room {
        Room::Ready
    }

    fn append(&mut self, batch: Arc<Batch>) {
        let epoch = self.disk.superblock.promised;
        self.append_entry(Entry::Stream(batch, epoch), None);
    }

    fn sync(&mut self) {
        if self.syncing {
            self.sync_again = true;
        } else {
            self.start_sync();
        }
    }

    fn read_stored(&mut self, token: u64, lba: Lba, blocks: u64) {
        self.start(Operation::Read { token, lba, blocks });
    }

    fn rows(&mut self, token: u64, from: Lba, after: Version, max: usize) {
        self.start(Operation::Rows {
            token,
            from,
            after,
            max,
        });
    }

    fn copy_in(&mut self, token: u64, blocks: Vec<Stored>, mode: CopyMode) {
        let damaged = self.disk.damaged.clone();
        let takes = |lba: Lba, version: Version, head: &Blocks| {
            let known = head.get(&lba).map_or(Version::default(), |(version, _)| *version);
            match mode {
                CopyMode::Newer => version > known,
                // What is sound is not written again.
                CopyMode::Repair => version > known || version == known && damaged.get(&lba) == Some(&version),
                CopyMode::Any => true,
            }
        };
        let mut taken = Vec::new();
        for stored in blocks {
            match stored {
                Stored::Block(block) if takes(block.lba, block.version, &self.head) => {
                    if self.disk.damaged.get(&block.lba) == Some(&block.version) {
                        self.disk.damaged.remove(&block.lba);
                    }
                    taken.push(Stored::Block(block));
                }
                Stored::Zeros { start, end, version } => {
                    for lba in (start.0..end.0).map(Lba).filter(|lba| takes(*lba, version, &self.head)) {
                        let end = Lba(lba.0 + 1);
                        let start = lba;
                        taken.push(Stored::Zeros { start, end, version });
                    }
                }
                Stored::Block(_) => {}
            }
        }
        if taken.is_empty() {
            self.events.push_back(ReplicaEvent::Copied(token, Ok(())));
        } else {
            self.append_entry(Entry::Copied(taken), Some(token));
        }
    }

    fn poll_event(&mut self) -> Option<ReplicaEvent> {
        self.events.pop_front()
    }
}
