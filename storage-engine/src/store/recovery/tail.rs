//! Replaying the log behind the checkpoint, and telling a torn tail from damage.

use std::collections::{BTreeMap, BTreeSet};

use super::super::WriteEntry;
use super::super::log::Op;
use super::super::page::Entry;
use super::super::record::{Body, ControlOp, HEADER_BYTES, HEADER_BYTES_MAX, Header, Seals, record_bytes};
use super::super::segment::{SEGMENT_HEADER_BYTES, SegmentHeader, SegmentKind, Used};
use super::super::snapshot::Catalog;
use super::super::superblock::{EpochEnd, LogPosition, Superblock};
use super::{OpenError, OpenReport, disk};
use crate::buffer::BufMut;
use crate::io::{Disk, FileId, IoFailure, SegmentId};
use crate::types::{Lba, Location, Seq, SnapshotId, Version};

/// What replaying the log found.
pub(in super::super) struct Replay {
    pub ops: Vec<Op>,
    pub end: LogPosition,
    pub segments: Vec<(SegmentId, u64)>,
    pub report: OpenReport,
    /// The newest version of anything, copies too.
    pub highest: Version,
    /// Flushed blocks that do not pass their check, and where they lie. What came behind them may have replaced them.
    pub damaged: Vec<(Lba, Location)>,
}

/// Reads the records behind the checkpoint.
pub(in super::super) fn replay(
    on: &mut dyn Disk,
    superblock: &Superblock,
    files: &BTreeMap<SegmentId, u64>,
    used: &BTreeMap<SegmentId, Used>,
) -> Result<Replay, OpenError> {
    let seals = Seals::of(&superblock.geometry);
    let start = superblock.checkpoint.replay;
    // An earlier opening settled where its epochs ended, and synced what lies before: that was served. Where others settle
    // the ends, this log may never have gone so far.
    let own = |_: &&EpochEnd| !superblock.told;
    let settled = superblock.epoch_ends.iter().filter(own).filter(|end| end.end > Seq(0));
    let served = settled
        .map(|end| Version {
            epoch: end.last,
            seq: end.end,
        })
        .max()
        .unwrap_or_default();
    let flushed = start.last;
    let mut tail = Tail {
        on,
        superblock,
        seals,
        end: start,
        flushed,
        record_bytes: None,
    };
    let mut report = OpenReport::default();
    let mut ops = Vec::new();
    let mut segments = vec![(start.segment, start.log_index)];
    // Records with a bad payload: torn, unless something behind them says that they were flushed.
    let mut doubtful: Vec<Doubtful> = Vec::new();
    let hole = loop {
        if superblock.clean {
            break false;
        }
        let Some((header, check)) = tail.header_at(tail.end)? else {
            break true;
        };
        let header = match tail.continues(&header) {
            Next::Record => header,
            Next::Kept(kept) => {
                report.cut = true;
                tail.kept(header, kept)
            }
            Next::BehindEnd => {
                report.cut = true;
                tail.expect_no_later_epoch(&header, check)?;
                break true;
            }
            Next::None => break true,
        };
        if let Some(flushed) = tail.says_flushed(&header) {
            tail.flushed = tail.flushed.max(flushed);
        }
        match &header.body {
            Body::Data { .. } | Body::Copied { .. } => {
                let (at, ops_before) = (tail.end, ops.len());
                let last = match header.body.numbers() {
                    Some((_, seq)) => Version {
                        epoch: header.epoch,
                        seq,
                    },
                    None => tail.end.last,
                };
                let (bad, dropped) = tail.replay_record(&header, &mut ops)?;
                report.cut |= dropped;
                if !bad.is_empty() {
                    // Copies have no number. A later write that was flushed says that they were, too.
                    let proof = match header.body {
                        Body::Data { .. } => last,
                        _ => Version {
                            seq: last.seq.next(),
                            ..last
                        },
                    };
                    doubtful.push(Doubtful {
                        proof,
                        copies: !matches!(header.body, Body::Data { .. }),
                        marked: false,
                        at,
                        ops_before,
                        records_before: report.replayed_records,
                        bad,
                    });
                }
                report.replayed_records += 1;
                let (_, bytes) = tail.record_bytes.take().expect("the record was read");
                tail.end.offset += bytes;
                tail.end.last = last;
                tail.end.chain = check;
            }
            Body::Control { seq, op } => {
                let (seq, op) = (*seq, *op);
                let last = Version {
                    epoch: header.epoch,
                    seq,
                };
                ops.push(Op::Control(op, last));
                report.replayed_records += 1;
                tail.end.offset += HEADER_BYTES as u64;
                tail.end.last = last;
                tail.end.chain = check;
            }
            Body::Join { base } => {
                tail.end.offset += HEADER_BYTES as u64;
                tail.end.last = Version {
                    epoch: header.epoch,
                    seq: *base,
                };
                tail.end.chain = check;
            }
            Body::FlushMark => {
                // It was written when everything before it was on stable storage.
                doubtful.iter_mut().for_each(|record| record.marked = true);
                tail.end.offset += HEADER_BYTES as u64;
            }
            Body::Next { next } => {
                let next = SegmentId(*next);
                let log_index = tail.end.log_index + 1;
                if !tail.segment_is(next, log_index, files)? {
                    break true;
                }
                segments.push((next, log_index));
                tail.end = LogPosition {
                    segment: next,
                    offset: SEGMENT_HEADER_BYTES,
                    log_index,
                    ..tail.end
                };
            }
            Body::Moved { .. } => break true,
        }
    };
    if hole {
        tail.look_behind(files, used, &segments)?;
    }
    // What was served was there. Of copies that is not known: they have no number.
    let proven = tail.flushed;
    let flushed = proven.max(served);
    let mut end = tail.end;
    // The first doubtful record that no flush covers is where the tail is torn.
    if let Some(torn) = doubtful
        .iter()
        .position(|record| !record.marked && record.proof > if record.copies { proven } else { flushed })
    {
        let record = &doubtful[torn];
        report.replayed_records = record.records_before;
        ops.truncate(record.ops_before);
        segments.retain(|(_, log_index)| *log_index <= record.at.log_index);
        end = record.at;
        doubtful.truncate(torn);
    }
    let highest = ops.iter().map(Op::version).max().unwrap_or_default().max(end.last);
    if highest < flushed.min(served) {
        return Err(OpenError::Damaged(format!(
            "the log breaks off at segment {} offset {} after write {}, but it went on to write {served} when it was \
             opened before: data that was served is missing here; another copy or a backup is needed",
            end.segment.0, end.offset, end.last
        )));
    }
    if hole {
        report.torn_at = Some((end.segment.0, end.offset));
    }
    let damaged = doubtful.into_iter().flat_map(|record| record.bad).collect();
    Ok(Replay {
        ops,
        end,
        segments,
        report,
        highest,
        damaged,
    })
}

/// A record whose header is good and whose payload is not.
struct Doubtful {
    /// If a write up to this one was flushed, so was the record.
    proof: Version,
    copies: bool,
    /// A mark behind it says that it was on stable storage.
    marked: bool,
    at: LogPosition,
    ops_before: usize,
    records_before: u64,
    /// The blocks that do not pass their check.
    bad: Vec<(Lba, Location)>,
}

/// Fails unless what the log did to snapshots can be done: a check tells that somebody wrote a record, not that it fits.
pub(in super::super) fn makes_sense(ops: &[Op], catalog: &Catalog) -> Result<(), OpenError> {
    let mut held: Vec<SnapshotId> = catalog.held().map(|snapshot| snapshot.id).collect();
    let mut gone: Vec<SnapshotId> = Vec::new();
    let mut reverted = false;
    for op in ops {
        let fits = match op {
            _ if reverted => false,
            Op::Block(..) | Op::Zero(..) => true,
            Op::Control(ControlOp::Snapshot { id, .. }, _) => {
                let new = catalog.takes(*id) && !held.contains(id) && !gone.contains(id);
                held.push(*id);
                new
            }
            Op::Control(ControlOp::Delete { id }, _) => {
                let before = held.len();
                held.retain(|other| other != id);
                gone.push(*id);
                held.len() < before
            }
            Op::Control(ControlOp::Revert { id }, _) => {
                reverted = true;
                held.contains(id)
            }
        };
        if !fits {
            return Err(OpenError::Damaged(format!(
                "the log has a record that cannot be: {op:?}"
            )));
        }
    }
    Ok(())
}

struct Tail<'a> {
    on: &'a mut dyn Disk,
    superblock: &'a Superblock,
    seals: Seals,
    end: LogPosition,
    flushed: Version,
    /// Bytes of the header of the record that is being replayed, and of all of it.
    record_bytes: Option<(usize, u64)>,
}

/// Whether a record is the next one of the log.
enum Next {
    /// It is.
    Record,
    /// It is, and only so many of its writes lie before the end of their epoch.
    Kept(usize),
    /// It would be, but it lies behind the end of its epoch.
    BehindEnd,
    /// It is a stale one, or none.
    None,
}

impl Tail<'_> {
    fn header_at(&mut self, at: LogPosition) -> Result<Option<(Header, u32)>, OpenError> {
        if at.offset + HEADER_BYTES as u64 > self.superblock.geometry.segment_bytes {
            return Ok(None);
        }
        let left = self.superblock.geometry.segment_bytes - at.offset;
        let mut buf = BufMut::zeroed(left.min(HEADER_BYTES_MAX as u64) as usize);
        let doing = || format!("reading the log at segment {} offset {}", at.segment.0, at.offset);
        match self.on.read(FileId::Segment(at.segment), at.offset, buf.as_mut()) {
            Err(IoFailure::NotFound) => Err(OpenError::Damaged(format!("{}: the segment is missing", doing()))),
            result => disk(result, doing).map(|()| self.seals.decode(buf.as_ref())),
        }
    }

    /// Whether the record is the next one of the log, and not a stale one.
    fn continues(&self, header: &Header) -> Next {
        let last = self.end.last;
        if header.chain != self.end.chain || header.epoch > self.superblock.epoch || header.epoch < last.epoch {
            return Next::None;
        }
        let settled = self.superblock.end_of(header.epoch);
        let is_next = match &header.body {
            // It is no record of this volume.
            Body::Data { writes, .. } if writes.is_empty() || !writes.iter().all(|write| self.is_inside(write)) => {
                false
            }
            Body::Data { .. } | Body::Control { .. } => {
                let expected = if header.epoch == last.epoch {
                    last.seq.next()
                } else {
                    Seq(1)
                };
                let numbers = header.body.numbers();
                numbers.is_some_and(|(first, last)| first == expected && last >= first)
            }
            Body::Copied { blocks, zeros } => {
                let size = self.superblock.checkpoint.size_blocks;
                // What is of this epoch was before the last write; everything else is of an older one.
                let bound = Version {
                    epoch: header.epoch,
                    seq: Seq(0),
                };
                let can_be = |at: Version| {
                    at > Version::default()
                        && at
                            < bound.max(Version {
                                seq: last.seq.next(),
                                ..last
                            })
                };
                let mut blocks = blocks.iter();
                let mut zeros = zeros.iter();
                blocks.all(|block| block.lba.0 < size && can_be(block.version))
                    && zeros.all(|range| range.start < range.end && range.end.0 <= size && can_be(range.version))
            }
            Body::Join { base } => header.epoch > last.epoch || *base >= last.seq,
            Body::Next { .. } | Body::FlushMark => true,
            Body::Moved { .. } => false,
        };
        if !is_next {
            return Next::None;
        }
        let (first, last) = match (&header.body, header.body.numbers()) {
            (Body::Join { base }, _) => (*base, *base),
            (_, Some(numbers)) => numbers,
            (_, None) => return Next::Record,
        };
        match settled {
            Some(end) if first > end => Next::BehindEnd,
            Some(end) if last > end => Next::Kept((end.0 - first.0 + 1) as usize),
            _ => Next::Record,
        }
    }

    fn bytes_of(&self, header: &Header) -> (usize, u64) {
        let header_bytes = self.seals.header_bytes(&header.body);
        (header_bytes, record_bytes(header_bytes, header.body.payload_pages()))
    }

    /// A record of which only the first writes lie before the end of their epoch.
    fn kept(&mut self, mut header: Header, kept: usize) -> Header {
        self.record_bytes = Some(self.bytes_of(&header));
        if let Body::Data {
            writes, checks, pages, ..
        } = &mut header.body
        {
            writes.truncate(kept);
            let stored = writes.iter().filter(|write| !write.zero);
            let blocks: usize = stored.map(|write| write.blocks as usize).sum();
            checks.truncate(blocks);
            pages.truncate(blocks);
        }
        header
    }

    /// What is behind an end that was settled is dropped, and that is only right if nothing of a later epoch follows.
    fn expect_no_later_epoch(&mut self, behind: &Header, check: u32) -> Result<(), OpenError> {
        let epoch = behind.epoch;
        let (mut at, mut chain) = (self.end, check);
        at.offset += self.bytes_of(behind).1;
        while let Some((header, check)) = self.header_at(at)? {
            let follows = header.chain == chain && header.epoch >= epoch && header.epoch <= self.superblock.epoch;
            let chained = match header.body {
                Body::Data { .. } | Body::Control { .. } | Body::Join { .. } => true,
                // Members are made equal before an epoch begins, and it may never have.
                Body::Copied { .. } => {
                    chain = check;
                    false
                }
                Body::FlushMark => false,
                Body::Next { .. } | Body::Moved { .. } => return Ok(()),
            };
            if !follows {
                return Ok(());
            }
            if chained && header.epoch > epoch {
                return Err(OpenError::Diverged(format!(
                    "the log went on with epoch {} behind writes of epoch {} that were decided to be dropped",
                    header.epoch.0, epoch.0
                )));
            }
            if chained {
                chain = check;
            }
            at.offset += self.bytes_of(&header).1;
        }
        Ok(())
    }

    /// What the record says was on stable storage when it was made.
    fn says_flushed(&self, header: &Header) -> Option<Version> {
        let end = self.superblock.end_of(header.epoch).unwrap_or(header.flushed);
        let seq = header.flushed.min(end);
        (seq > Seq(0)).then_some(Version {
            epoch: header.epoch,
            seq,
        })
    }

    /// A volume never shrinks, and has a size before anybody writes there.
    fn is_inside(&self, write: &WriteEntry) -> bool {
        let end = write.lba.0.checked_add(u64::from(write.blocks));
        end.is_some_and(|end| end <= self.superblock.checkpoint.size_blocks)
    }

    fn segment_is(
        &mut self,
        segment: SegmentId,
        log_index: u64,
        files: &BTreeMap<SegmentId, u64>,
    ) -> Result<bool, OpenError> {
        if !files.contains_key(&segment) {
            return Ok(false);
        }
        Ok(self.segment_header(segment)?.is_some_and(|header| {
            header.kind == SegmentKind::Data && header.segment == segment && header.log_index == log_index
        }))
    }

    fn segment_header(&mut self, segment: SegmentId) -> Result<Option<SegmentHeader>, OpenError> {
        let mut buf = BufMut::zeroed(SEGMENT_HEADER_BYTES as usize);
        let read = self.on.read(FileId::Segment(segment), 0, buf.as_mut());
        disk(read, || format!("reading the header of segment {}", segment.0))?;
        Ok(SegmentHeader::decode(buf.as_ref(), &self.superblock.geometry.identity))
    }

    /// Adds the changes of a record; returns the blocks whose payload does not pass its check, and whether copies were
    /// dropped because they lie behind the end of their epoch.
    fn replay_record(&mut self, header: &Header, ops: &mut Vec<Op>) -> Result<(Vec<(Lba, Location)>, bool), OpenError> {
        let segment = self.end.segment;
        let bytes = self.bytes_of(header);
        let (header_bytes, whole) = *self.record_bytes.get_or_insert(bytes);
        let mut offset = self.end.offset + header_bytes as u64;
        let mut payload = BufMut::zeroed(record_bytes(0, header.body.payload_pages()) as usize);
        if payload.len() > 0 {
            if self.end.offset + whole > self.superblock.geometry.segment_bytes {
                return Err(OpenError::Damaged(format!(
                    "segment {} has a record that reaches over its end",
                    segment.0
                )));
            }
            let read = self.on.read(FileId::Segment(segment), offset, payload.as_mut());
            disk(read, || {
                format!("reading the log at segment {} offset {offset}", segment.0)
            })?;
        }
        let before = ops.len();
        match &header.body {
            Body::Data { first_seq, writes, .. } => {
                let zeroes = writes.iter().zip(first_seq.0..).filter(|(write, _)| write.zero);
                let epoch = header.epoch;
                ops.extend(
                    zeroes.map(|(write, seq)| Op::Zero(write.lba, write.end(), Version { epoch, seq: Seq(seq) })),
                );
            }
            Body::Copied { zeros, .. } => {
                ops.extend(
                    zeros
                        .iter()
                        .map(|range| Op::Zero(range.start, range.end, range.version)),
                );
            }
            _ => unreachable!("only writes and copies have a payload"),
        }
        let mut payload = payload.as_ref();
        let mut bad = Vec::new();
        for block in header.payload() {
            let location = Location::pages_at(segment, offset, block.pages);
            let (bytes, rest) = payload.split_at(location.len() as usize);
            let passes = self.seals.block(block.lba, block.version, bytes) == block.check.crc;
            if !passes && self.is_before_end(block.version) {
                bad.push((block.lba, location));
            }
            let entry = Entry {
                location,
                version: block.version,
                check: block.check,
            };
            ops.push(Op::Block(block.lba, entry));
            (offset, payload) = (location.end(), rest);
        }
        if matches!(header.body, Body::Data { .. }) {
            // In the order in which they were made.
            ops[before..].sort_by_key(Op::version);
            return Ok((bad, false));
        }
        let mut copies = ops.split_off(before);
        let all = copies.len();
        copies.retain(|op| self.is_before_end(op.version()));
        let dropped = copies.len() < all;
        ops.extend(copies);
        Ok((bad, dropped))
    }

    /// Nobody decided that this never happened.
    fn is_before_end(&self, version: Version) -> bool {
        let settled = self.superblock.end_of(version.epoch);
        settled.is_none_or(|end| version.seq <= end)
    }

    /// Looks for records behind the end of the log that say it should not end here.
    fn look_behind(
        &mut self,
        files: &BTreeMap<SegmentId, u64>,
        used: &BTreeMap<SegmentId, Used>,
        replayed: &[(SegmentId, u64)],
    ) -> Result<(), OpenError> {
        self.scan(self.end.segment, self.end.offset)?;
        let replayed: BTreeSet<SegmentId> = replayed.iter().map(|(id, _)| *id).collect();
        for segment in files
            .keys()
            .filter(|id| !used.contains_key(id) && !replayed.contains(id))
        {
            let later = self.segment_header(*segment)?.is_some_and(|header| {
                header.kind == SegmentKind::Data
                    && header.log_index > self.end.log_index
                    && header.epoch >= self.end.last.epoch
            });
            if later {
                self.scan(*segment, SEGMENT_HEADER_BYTES)?;
            }
        }
        Ok(())
    }

    fn scan(&mut self, segment: SegmentId, from: u64) -> Result<(), OpenError> {
        const CHUNK: u64 = 1 << 20;
        let mut offset = from;
        let segment_bytes = self.superblock.geometry.segment_bytes;
        while offset < segment_bytes {
            // A header of two blocks may begin in the last block of a chunk.
            let len = (CHUNK + HEADER_BYTES as u64).min(segment_bytes - offset);
            let mut buf = BufMut::zeroed(len as usize);
            let read = self.on.read(FileId::Segment(segment), offset, buf.as_mut());
            disk(read, || {
                format!("reading the log at segment {} offset {offset}", segment.0)
            })?;
            for at in (0..len.min(CHUNK) as usize).step_by(HEADER_BYTES) {
                let there = buf.len().min(at + HEADER_BYTES_MAX);
                if let Some((header, _)) = self.seals.decode(&buf.as_ref()[at..there]) {
                    self.weigh(&header)?;
                }
            }
            offset += CHUNK;
        }
        Ok(())
    }

    /// A record behind the end: stale ones say nothing, a valid one may prove that flushed records are missing.
    fn weigh(&mut self, header: &Header) -> Result<(), OpenError> {
        let last = self.end.last;
        let current = header.epoch >= last.epoch && header.epoch <= self.superblock.epoch;
        if !current || matches!(header.body, Body::Moved { .. }) {
            return Ok(());
        }
        let flushed = Version {
            epoch: header.epoch,
            seq: header.flushed,
        };
        let settled = self.superblock.end_of(header.epoch);
        if settled.is_some_and(|end| header.flushed > end) {
            return Ok(());
        }
        if header.flushed.0 > 0 && flushed > last {
            return Err(OpenError::Damaged(format!(
                "the log breaks off at segment {} offset {} after write {last}, but write {flushed} was flushed: \
                 flushed data is missing here; another copy or a backup is needed",
                self.end.segment.0, self.end.offset
            )));
        }
        Ok(())
    }
}
