//! The log of guest writes: appending in order, syncing in groups, going on in the next segment.

use std::collections::{BTreeSet, VecDeque};

use super::page::Entry;
use super::record::{Body, ControlOp, HEADER_BYTES, Header, WRITES_MAX, record_bytes};
use super::segment::{SEGMENT_HEADER_BYTES, SegmentHeader, SegmentKind};
use super::superblock::LogPosition;
use super::supply::RESERVE_SEGMENTS;
use super::{Event, Purpose, Record, Room, Store};
use crate::buffer::Buf;
use crate::io::{FileId, Io, SegmentId};
use crate::types::{Lba, Location, Seq, Version};

/// One change of the map, in the order of the writes.
#[derive(Clone, Copy, Debug)]
pub enum Op {
    Block(Lba, Entry),
    Zero(Lba, Lba, Version),
    /// Something done to the snapshots.
    Control(ControlOp, Version),
}

/// A write to the log that is out, or done but behind one that is out.
#[derive(Debug)]
struct Inflight {
    done: bool,
    ops: Vec<Op>,
    end: LogPosition,
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
    /// The highest `flushed` that a record in the log carries.
    marked: Version,
    inflight: VecDeque<Inflight>,
    first_inflight: u64,
    /// Segments with finished writes that no sync has covered.
    dirty: BTreeSet<SegmentId>,
    sync_wanted: bool,
    /// What the running sync will have covered, and how many of its operations are out.
    sync: Option<(Version, usize)>,
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

    /// True if a completed flush is not yet written down in the log.
    pub fn unmarked(&self) -> bool {
        self.durable > self.marked && self.inflight.is_empty() && self.sync.is_none() && self.dirty.is_empty()
    }
}

impl Store {
    /// Makes a place for a record with so many pages of payload at most. `zero_only` records may use the reserve.
    pub fn room(&mut self, payload_pages: usize, zero_only: bool) -> Room {
        if self.stopped.is_some() {
            return Room::Wait;
        }
        if self.fits(payload_pages) {
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
            debug_assert!(
                self.fits(payload_pages),
                "the largest record fits into an empty segment"
            );
            return Room::Ready;
        }
        if !self.segments.exhausted || self.segments.coming_count() > 0 {
            self.segment_missing();
            return Room::Wait;
        }
        if self.reclaimable() { Room::Wait } else { Room::NoSpace }
    }

    fn fits(&self, payload_pages: usize) -> bool {
        // One page stays for the record that names the next segment. There are at most as many blocks as pages.
        let header = self.seals.data_header_bytes(WRITES_MAX, payload_pages);
        let end = self.log.position.offset + record_bytes(header, payload_pages) + HEADER_BYTES as u64;
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
        self.log_write(old, self.log.position.offset, vec![block], Vec::new());
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
        );
    }

    /// What records may say is durable: writes of this epoch only.
    pub fn flushed(&self) -> Seq {
        if self.log.durable.epoch == self.superblock.epoch {
            self.log.durable.seq
        } else {
            Seq(0)
        }
    }

    /// Appends a record, for which [`Store::room`] said ready.
    pub fn append(&mut self, record: Record) {
        let (first_seq, _) = record
            .header
            .body
            .numbers()
            .expect("only numbered records are appended from outside");
        let epoch = self.superblock.epoch;
        let last = self.log.position.last;
        let expected = if last.epoch == epoch { last.seq.next() } else { Seq(1) };
        assert_eq!(
            (record.header.epoch, first_seq),
            (epoch, expected),
            "I10: the log has no gap"
        );
        assert_eq!(
            record.header.chain, self.log.position.chain,
            "a record names the one before it"
        );
        let (writes, checks, pages) = match &record.header.body {
            Body::Data {
                writes, checks, pages, ..
            } => (&writes[..], &checks[..], &pages[..]),
            _ => (&[][..], &[][..], &[][..]),
        };
        let payload_pages = record.header.body.payload_pages();
        assert!(self.fits(payload_pages), "room() was asked first");

        let (segment, offset) = (self.log.position.segment, self.log.position.offset);
        let mut ops = Vec::with_capacity(checks.len().max(writes.len()));
        let (mut seq, mut checks_left) = (first_seq, checks.iter().enumerate());
        let mut at = offset + self.seals.header_bytes(&record.header.body) as u64;
        for write in writes {
            let version = Version { epoch, seq };
            if write.zero {
                ops.push(Op::Zero(write.lba, Lba(write.lba.0 + u64::from(write.blocks)), version));
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
        if let Body::Control { op, .. } = record.header.body {
            ops.push(Op::Control(op, Version { epoch, seq }));
            seq = seq.next();
        }
        self.stats.written_bytes += checks.len() as u64 * self.seals.block_size().bytes();
        self.stats.stored_bytes += record_bytes(0, payload_pages);
        self.log.position.offset = at;
        self.log.position.last = Version {
            epoch,
            seq: Seq(seq.0 - 1),
        };
        self.log.position.chain = record.check;
        self.log.marked = self.log.marked.max(Version {
            epoch,
            seq: record.header.flushed,
        });
        self.last_write_ms = self.now_ms;
        self.unmerged_since_ms.get_or_insert(self.now_ms);
        self.pace.settled = false;
        self.log.records += 1;
        self.log_write(segment, offset, record.parts, ops);
    }

    fn log_write(&mut self, segment: SegmentId, offset: u64, parts: Vec<Buf>, ops: Vec<Op>) {
        let number = self.log.first_inflight + self.log.inflight.len() as u64;
        self.log.inflight.push_back(Inflight {
            done: false,
            ops,
            end: self.log.position,
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
            moved |= !write.ops.is_empty();
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
        let covers = self.log.appended.last;
        let files = std::mem::take(&mut self.log.dirty);
        if files.is_empty() {
            self.log.durable = self.log.durable.max(covers);
            self.events.push_back(Event::Durable(self.log.durable));
            return;
        }
        self.log.sync = Some((covers, files.len()));
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
        let (covers, left) = self.log.sync.take().expect("a sync is running");
        if left > 1 {
            self.log.sync = Some((covers, left - 1));
            return;
        }
        self.log.durable = self.log.durable.max(covers);
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
            return;
        }
        let (block, _) = self.seals.encode(&Header {
            epoch: self.superblock.epoch,
            flushed: self.flushed(),
            chain: self.log.position.chain,
            body: Body::FlushMark,
        });
        let (segment, offset) = (self.log.position.segment, self.log.position.offset);
        self.log.position.offset += HEADER_BYTES as u64;
        self.log.marked = self.log.durable;
        self.log_write(segment, offset, vec![block], Vec::new());
    }
}
