//! The log of guest writes: appending in order, syncing in groups, going on in the next segment.

use std::collections::{BTreeSet, VecDeque};

use super::page::Entry;
use super::record::{
    Body, ControlOp, CopiedZeros, HEADER_BYTES, Header, MovedBlock, WRITES_MAX, WriteEntry, record_bytes,
};
use super::segment::{SEGMENT_HEADER_BYTES, SegmentHeader, SegmentKind};
use super::superblock::LogPosition;
use super::supply::RESERVE_SEGMENTS;
use super::{Event, Purpose, Room, Store};
use crate::buffer::Buf;
use crate::io::{FileId, Io, SegmentId};
use crate::types::{Check, Epoch, Lba, Location, PAGE_BYTES, Seq, Version};

/// One change of the map, in the order of the writes.
#[derive(Clone, Copy, Debug)]
pub enum Op {
    Block(Lba, Entry),
    Zero(Lba, Lba, Version),
    /// Something done to the snapshots.
    Control(ControlOp, Version),
}

/// Writes that become one record. Whoever orders the writes of the volume makes it; it is the same for every replica.
#[derive(Clone, Debug)]
pub struct Batch {
    /// Number of the first write; the others follow without a gap.
    pub first_seq: Seq,
    pub writes: Vec<WriteEntry>,
    /// One for each payload block, in order.
    pub checks: Vec<Check>,
    /// What each is stored in; empty where a block is one page.
    pub pages: Vec<u8>,
    /// The bytes of the blocks as they are stored, one after the other.
    pub payload: Vec<Buf>,
}

impl Batch {
    /// Number of the last write.
    pub fn last_seq(&self) -> Seq {
        Seq(self.first_seq.0 + self.writes.len() as u64 - 1)
    }

    /// Bytes of payload.
    pub fn payload_bytes(&self) -> u64 {
        self.payload.iter().map(|part| part.len() as u64).sum()
    }

    /// Pages of payload.
    pub fn payload_pages(&self) -> usize {
        (self.payload_bytes() / PAGE_BYTES) as usize
    }
}

/// What a record of the chain changes, with its payload at `at`.
fn ops_of(body: &Body, epoch: Epoch, segment: SegmentId, mut at: u64) -> Vec<Op> {
    let (first_seq, writes, checks, pages) = match body {
        Body::Data {
            first_seq,
            writes,
            checks,
            pages,
        } => (*first_seq, writes, checks, pages),
        Body::Control { seq, op } => return vec![Op::Control(*op, Version { epoch, seq: *seq })],
        Body::Copied { blocks, zeros } => return ops_of_copies(blocks, zeros, segment, at),
        _ => return Vec::new(),
    };
    let mut ops = Vec::with_capacity(checks.len().max(writes.len()));
    let (mut seq, mut checks_left) = (first_seq, checks.iter().enumerate());
    for write in writes {
        let version = Version { epoch, seq };
        if write.zero {
            ops.push(Op::Zero(write.lba, write.end(), version));
        } else {
            for n in 0..u64::from(write.blocks) {
                let (index, check) = checks_left.next().expect("the header has a check for each block");
                let location = Location::pages_at(segment, at, pages.get(index).copied().unwrap_or(1));
                let entry = Entry {
                    location,
                    version,
                    check: *check,
                };
                ops.push(Op::Block(Lba(write.lba.0 + n), entry));
                at += location.len();
            }
        }
        seq = seq.next();
    }
    ops
}

/// The same of copies.
pub(super) fn ops_of_copies(blocks: &[MovedBlock], zeros: &[CopiedZeros], segment: SegmentId, mut at: u64) -> Vec<Op> {
    let zeros = zeros
        .iter()
        .map(|range| Op::Zero(range.start, range.end, range.version));
    let mut ops: Vec<Op> = zeros.collect();
    for block in blocks {
        let location = Location::pages_at(segment, at, block.pages);
        let entry = Entry {
            location,
            version: block.version,
            check: block.check,
        };
        ops.push(Op::Block(block.lba, entry));
        at = location.end();
    }
    ops
}

impl Op {
    /// What becomes of a block by this, if anything.
    pub fn version_at(&self, lba: Lba) -> Option<Version> {
        match *self {
            Op::Block(at, entry) => (at == lba).then_some(entry.version),
            Op::Zero(start, end, version) => (start..end).contains(&lba).then_some(version),
            Op::Control(..) => None,
        }
    }

    /// The version of what it writes.
    pub fn version(&self) -> Version {
        match *self {
            Op::Block(_, entry) => entry.version,
            Op::Zero(_, _, version) | Op::Control(_, version) => version,
        }
    }
}

/// What is reported once a write to the log is in the kernel's hands, and everything before it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Then {
    Nothing,
    Appended,
    /// Copies of this order are in.
    Copied(u64),
}

/// A write to the log that is out, or done but behind one that is out.
#[derive(Debug)]
struct Inflight {
    done: bool,
    ops: Vec<Op>,
    end: LogPosition,
    then: Then,
}

/// A sync that is running.
#[derive(Debug)]
struct Syncing {
    /// It will have covered every write up to this one, and everything in the log before write number `number`.
    covers: Version,
    number: u64,
    /// Its operations that are out.
    left: usize,
}

/// Where the log stands.
#[derive(Debug)]
pub struct Log {
    /// The next record goes here; `last` and `chain` are those of the last record handed out.
    pub position: LogPosition,
    /// Up to here everything is in the kernel's hands and in the memtable.
    pub appended: LogPosition,
    /// Every write up to this one is on stable storage.
    pub durable: Version,
    /// The highest version of anything in the log; copies may be newer than the last write.
    pub highest: Version,
    /// Everything in the log before this number is on stable storage.
    pub synced: u64,
    /// Behind the last record that has no number, and behind the last one that a mark covers.
    copies_end: u64,
    marked_end: u64,
    /// The highest `flushed` that a record in the log carries.
    marked: Version,
    inflight: VecDeque<Inflight>,
    first_inflight: u64,
    /// Segments with finished writes that no sync has covered.
    dirty: BTreeSet<SegmentId>,
    sync_wanted: bool,
    sync: Option<Syncing>,
    /// Records and syncs since the log went on to its segment.
    pub records: u64,
    pub syncs: u64,
}

impl Log {
    /// A log in which everything before `position` is durable.
    pub fn new(position: LogPosition) -> Log {
        Log {
            position,
            appended: position,
            durable: position.last,
            highest: position.last,
            synced: 0,
            copies_end: 0,
            marked_end: 0,
            marked: position.last,
            inflight: VecDeque::new(),
            first_inflight: 0,
            dirty: BTreeSet::new(),
            sync_wanted: false,
            sync: None,
            records: 0,
            syncs: 0,
        }
    }

    /// Number of writes that are out.
    pub fn inflight(&self) -> usize {
        self.inflight.len()
    }

    /// The number of the next write to the log: all with lower ones are in the kernel's hands and in the memtable.
    pub fn written(&self) -> u64 {
        self.first_inflight
    }

    /// True if every copy is on stable storage.
    pub fn copies_are_durable(&self) -> bool {
        self.synced >= self.copies_end
    }

    /// What the records that are on their way do, in their order.
    pub fn ops_inflight(&self) -> impl DoubleEndedIterator<Item = &Op> {
        self.inflight.iter().flat_map(|write| write.ops.iter())
    }

    /// True if a completed flush is not yet written down in the log. A mark says so of all that is before it.
    pub fn unmarked(&self) -> bool {
        let copies = self.copies_end > self.marked_end && self.copies_are_durable();
        let quiet = self.inflight.is_empty() && self.sync.is_none() && self.dirty.is_empty();
        quiet && (self.durable > self.marked || copies)
    }
}

impl Store {
    /// Makes a place for a record with so many pages of payload at most. `zero_only` records may use the reserve.
    pub fn room(&mut self, payload_pages: usize, zero_only: bool) -> Room {
        // There are at most as many blocks as pages.
        let bytes = record_bytes(self.seals.data_header_bytes(WRITES_MAX, payload_pages), payload_pages);
        self.room_for(bytes, zero_only)
    }

    /// The same for a record of so many bytes at most.
    pub(super) fn room_for(&mut self, bytes: u64, zero_only: bool) -> Room {
        if self.stopped.is_some() {
            return Room::Wait;
        }
        if self.fits(bytes) {
            return Room::Ready;
        }
        if !zero_only && self.over_limit() {
            self.background_due = true;
            return Room::Wait;
        }
        let reserve = if zero_only {
            RESERVE_SEGMENTS - 1
        } else {
            self.reserve_target()
        };
        if self.segments.free_count() > reserve {
            self.switch_segment();
            debug_assert!(self.fits(bytes), "the largest record fits into an empty segment");
            return Room::Ready;
        }
        if !self.segments.exhausted || self.segments.coming_count() > 0 {
            self.segment_missing();
            return Room::Wait;
        }
        if self.reclaimable() { Room::Wait } else { Room::NoSpace }
    }

    fn fits(&self, bytes: u64) -> bool {
        // One page stays for the record that names the next segment.
        let end = self.log.position.offset + bytes + HEADER_BYTES as u64;
        end <= self.superblock.geometry.segment_bytes
    }

    fn switch_segment(&mut self) {
        let old = self.log.position.segment;
        let log_index = self.log.position.log_index + 1;
        let next = self
            .segments
            .take(SegmentKind::Data, log_index)
            .expect("the caller saw a free segment");
        self.segments.close(old);
        let (block, _) = self.seals.encode(&Header {
            epoch: self.superblock.epoch,
            flushed: self.flushed(),
            chain: self.log.position.chain,
            body: Body::Next { next: next.0 },
        });
        self.log_write(old, self.log.position.offset, vec![block], Vec::new(), Then::Nothing);
        let header = SegmentHeader {
            kind: SegmentKind::Data,
            segment: next,
            log_index,
            epoch: self.superblock.epoch,
        };
        self.log.position.segment = next;
        self.log.position.offset = SEGMENT_HEADER_BYTES;
        self.log.position.log_index = log_index;
        (self.log.records, self.log.syncs) = (0, 0);
        self.segment_taken();
        self.log_write(
            next,
            0,
            vec![header.encode(&self.superblock.geometry.identity)],
            Vec::new(),
            Then::Nothing,
        );
    }

    /// What records may say is durable: writes of this epoch only.
    fn flushed(&self) -> Seq {
        if self.log.durable.epoch == self.superblock.epoch {
            self.log.durable.seq
        } else {
            Seq(0)
        }
    }

    /// Appends writes as one record, for which [`Store::room`] said ready. The header is this replica's own: its chain, and
    /// what it has made durable.
    pub fn append(&mut self, batch: Batch) {
        let Batch {
            first_seq,
            writes,
            checks,
            pages,
            payload,
        } = batch;
        let body = Body::Data {
            first_seq,
            writes,
            checks,
            pages,
        };
        self.append_numbered(body, payload);
    }

    /// Appends something about snapshots, for which [`Store::room`] said ready. It takes a number like a write.
    pub fn append_control(&mut self, seq: Seq, op: ControlOp) {
        self.append_numbered(Body::Control { seq, op }, Vec::new());
    }

    fn append_numbered(&mut self, body: Body, payload: Vec<Buf>) {
        let (first_seq, last_seq) = body.numbers().expect("writes and controls have numbers");
        let epoch = self.superblock.epoch;
        let last = self.log.position.last;
        let expected = if last.epoch == epoch { last.seq.next() } else { Seq(1) };
        assert_eq!(first_seq, expected, "I10: the log has no gap");
        self.assert_may_begin(epoch);
        self.log.position.last = Version { epoch, seq: last_seq };
        self.append_to_chain(body, payload, Then::Appended);
    }

    /// Appends the next record of the chain.
    pub(super) fn append_to_chain(&mut self, body: Body, payload: Vec<Buf>, then: Then) {
        assert!(
            !self.is_promising(),
            "I2: the epoch is being raised, the old one is over"
        );
        let epoch = self.superblock.epoch;
        let header_bytes = self.seals.header_bytes(&body) as u64;
        let payload_bytes: usize = payload.iter().map(Buf::len).sum();
        assert_eq!(
            payload_bytes as u64,
            record_bytes(0, body.payload_pages()),
            "every block has its bytes"
        );
        assert!(self.fits(header_bytes + payload_bytes as u64), "room() was asked first");

        let (segment, offset) = (self.log.position.segment, self.log.position.offset);
        let ops = ops_of(&body, epoch, segment, offset + header_bytes);
        self.stats.written_bytes += body.payload_blocks() as u64 * self.seals.block_size().bytes();
        self.stats.stored_bytes += payload_bytes as u64;
        if matches!(body, Body::Copied { .. }) {
            self.stats.copied_bytes += payload_bytes as u64;
        }
        let flushed = self.flushed();
        let (header, check) = self.seals.encode(&Header {
            epoch,
            flushed,
            chain: self.log.position.chain,
            body,
        });
        let mut parts = Vec::with_capacity(1 + payload.len());
        parts.push(header);
        parts.extend(payload);
        self.log.position.offset += header_bytes + payload_bytes as u64;
        self.log.position.chain = check;
        self.log.highest = self.log.highest.max(self.log.position.last);
        self.log.marked = self.log.marked.max(Version { epoch, seq: flushed });
        self.last_write_ms = self.now_ms;
        self.unmerged_since_ms.get_or_insert(self.now_ms);
        self.pace.settled = false;
        self.log.records += 1;
        self.log_write(segment, offset, parts, ops, then);
        if then != Then::Appended {
            self.log.copies_end = self.log.first_inflight + self.log.inflight.len() as u64;
        }
    }

    fn log_write(&mut self, segment: SegmentId, offset: u64, parts: Vec<Buf>, ops: Vec<Op>, then: Then) {
        let number = self.log.first_inflight + self.log.inflight.len() as u64;
        self.log.inflight.push_back(Inflight {
            done: false,
            ops,
            end: self.log.position,
            then,
        });
        let io = Io::Write {
            file: FileId::Segment(segment),
            offset,
            parts,
        };
        self.issue(io, Purpose::LogWrite { number, segment });
    }

    pub(super) fn log_written(&mut self, number: u64, segment: SegmentId) {
        self.log.dirty.insert(segment);
        let index = (number - self.log.first_inflight) as usize;
        self.log.inflight[index].done = true;
        let mut moved = false;
        while self.log.inflight.front().is_some_and(|write| write.done) {
            let write = self.log.inflight.pop_front().expect("it is there");
            self.log.first_inflight += 1;
            self.log.appended = write.end;
            self.apply(&write.ops);
            match write.then {
                Then::Nothing => {}
                Then::Appended => moved = true,
                Then::Copied(order) => self.copied(order),
            }
        }
        if moved {
            self.events.push_back(Event::Appended(self.log.appended.last.seq));
        }
    }

    pub(super) fn apply(&mut self, ops: &[Op]) {
        for op in ops {
            self.recent.apply(op);
            match *op {
                Op::Block(lba, _) => self.scrub_overwritten(lba, Lba(lba.0 + 1)),
                Op::Zero(start, end, _) => self.scrub_overwritten(start, end),
                Op::Control(..) => {}
            }
        }
    }

    /// Asks for everything appended so far to be made durable; reported by [`Event::Durable`].
    pub fn sync(&mut self) {
        self.log.sync_wanted = true;
    }

    /// Everything up to here is on stable storage.
    pub fn durable(&self) -> Version {
        self.log.durable
    }

    /// Starts the next sync if one is wanted and none is running: all who asked meanwhile share it.
    pub(super) fn start_sync(&mut self) {
        if !self.log.sync_wanted || self.log.sync.is_some() {
            return;
        }
        self.log.sync_wanted = false;
        let (covers, number) = (self.log.appended.last, self.log.first_inflight);
        let files = std::mem::take(&mut self.log.dirty);
        if files.is_empty() {
            self.log.durable = self.log.durable.max(covers);
            self.log.synced = number;
            self.events.push_back(Event::Durable(self.log.durable));
            return;
        }
        let left = files.len();
        self.log.sync = Some(Syncing { covers, number, left });
        self.log.syncs += 1;
        for segment in files {
            self.issue(
                Io::Sync {
                    file: FileId::Segment(segment),
                },
                Purpose::LogSync,
            );
        }
    }

    pub(super) fn log_synced(&mut self) {
        let sync = self.log.sync.as_mut().expect("a sync is running");
        sync.left -= 1;
        if sync.left > 0 {
            return;
        }
        let Syncing { covers, number, .. } = self.log.sync.take().expect("it is there");
        self.log.durable = self.log.durable.max(covers);
        self.log.synced = number;
        self.events.push_back(Event::Durable(self.log.durable));
        self.start_sync();
    }

    /// Writes down that a flush was completed, once writes have paused: a later record would say it in passing.
    /// Without it, damage to the last flushed record would look like the torn end of a crash.
    pub(super) fn mark_flush(&mut self) {
        if !self.log.unmarked() || self.closing || self.now_ms < self.last_write_ms + self.options.mark_after_ms {
            return;
        }
        if self.room(0, true) != Room::Ready {
            // A mark is worth less than the space it would take on a full disk.
            self.log.marked = self.log.durable;
            self.log.marked_end = self.log.copies_end;
            return;
        }
        self.write_mark();
    }

    /// Appends a mark, for which there is room.
    pub(super) fn write_mark(&mut self) {
        let (block, _) = self.seals.encode(&Header {
            epoch: self.superblock.epoch,
            flushed: self.flushed(),
            chain: self.log.position.chain,
            body: Body::FlushMark,
        });
        let (segment, offset) = (self.log.position.segment, self.log.position.offset);
        self.log.position.offset += HEADER_BYTES as u64;
        self.log.marked = self.log.durable;
        self.log.marked_end = self.log.copies_end;
        self.log_write(segment, offset, vec![block], Vec::new(), Then::Nothing);
    }
}
