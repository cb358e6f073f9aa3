//! Making, opening and telling torn from corrupt.
//!
//! Opening takes the newer valid superblock and replays the records behind its checkpoint. The log of a crash ends in
//! a torn tail: records that were on their way and that no flush covered. It is cut off, and the superblock notes
//! where the epoch ended, so that what lies behind is never taken for valid again. Anything else that does not fit is
//! damage, and damage is never cut off: a record that is unreadable although a later one says that it was flushed
//! makes opening fail with the place, and a flushed block with a bad check stays in the map, so that reading it says so.

use std::collections::{BTreeMap, BTreeSet};

use super::log::{Log, Op};
use super::map::Map;
use super::memtable::Memtable;
use super::page::{Entry, FANOUT, Page, PageKind, PageName, height_for};
use super::read::Reads;
use super::record::{Body, HEADER_BYTES, Header, Seals, record_bytes};
use super::segment::{SEGMENT_HEADER_BYTES, SegmentHeader, SegmentKind, Segments, Used, from_row};
use super::superblock::{Checkpoint, ENDS_MAX, Geometry, LogPosition, SUPERBLOCK_BYTES, Superblock, SuperblockError};
use super::{RESERVE_SEGMENTS, Store, StoreStats};
use crate::buffer::BufMut;
use crate::io::{Disk, FileId, IoFailure, SegmentId};
use crate::types::{BLOCK_BYTES, Epoch, Identity, Lba, Location, SEGMENT_BYTES_MAX, Seq, Version};

/// What a new replica is like.
#[derive(Clone, Debug)]
pub struct FormatOptions {
    /// Whose it is.
    pub identity: Identity,
    /// Size of the volume in blocks.
    pub size_blocks: u64,
    /// Bytes in a segment, a multiple of 4096; `None` chooses by the size of the volume (4 to 64 MiB).
    pub segment_bytes: Option<u64>,
    /// A fresh random number, kept secret from the guest.
    pub salt: u64,
}

/// How to open a replica.
#[derive(Clone, Debug)]
pub struct OpenOptions {
    /// Whose it must be.
    pub identity: Identity,
    /// The epoch to serve in; higher than any before.
    pub epoch: Epoch,
    /// Map pages kept in memory (4 KiB each).
    pub cache_pages_max: usize,
    /// Rows of the memtable that make a checkpoint due.
    pub memtable_rows_max: usize,
    /// Log segments that make a checkpoint due.
    pub tail_segments_max: u64,
    /// Pause in the writes after which a completed flush is written down.
    pub mark_after_ms: u64,
    /// Pause in the writes after which a checkpoint is made.
    pub idle_checkpoint_ms: u64,
    /// Pause after the pool was found full.
    pub retry_create_ms: u64,
}

impl OpenOptions {
    /// The defaults: 16 MiB of cached map pages, a checkpoint after 128 Ki blocks or 16 segments.
    pub fn new(identity: Identity, epoch: Epoch) -> OpenOptions {
        OpenOptions {
            identity,
            epoch,
            cache_pages_max: 4096,
            memtable_rows_max: 128 << 10,
            tail_segments_max: 16,
            mark_after_ms: 50,
            idle_checkpoint_ms: 10_000,
            retry_create_ms: 1_000,
        }
    }
}

/// What opening found.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct OpenReport {
    /// Records replayed behind the checkpoint.
    pub replayed_records: u64,
    /// Where the log of an engine that was not closed in order ends; what was behind it was on its way and is cut off.
    pub torn_at: Option<(u32, u64)>,
    /// One of the superblocks was not valid and was written anew; what was wrong with it.
    pub superblock_repaired: Option<String>,
    /// Flushed blocks that do not pass their check. They stay in the map and fail when they are read.
    pub damaged_blocks: Vec<u64>,
}

/// Why a replica cannot be opened or made.
#[derive(Debug, thiserror::Error)]
pub enum OpenError {
    /// The directory holds no replica yet.
    #[error("there is no replica here")]
    NotFormatted,
    /// The directory holds something already.
    #[error("there is a replica here already")]
    AlreadyFormatted,
    /// Made by a newer version.
    #[error(
        "the replica has format version {0}, this program reads up to 1: run the version that wrote it, or a newer one"
    )]
    NewerFormat(u16),
    /// Another volume's, replica's or cluster's.
    #[error("the replica belongs to another {what}: found {found}, expected {expected}")]
    WrongIdentity {
        what: &'static str,
        found: String,
        expected: String,
    },
    /// What must be there is missing or does not pass its check.
    #[error("the replica is damaged: {0}")]
    Damaged(String),
    /// A higher epoch has been promised.
    #[error("the replica has promised epoch {promised} and refuses epoch {asked}")]
    Fenced { promised: u32, asked: u32 },
    /// Asked for something that cannot be.
    #[error("{0}")]
    Invalid(String),
    /// The pool is full.
    #[error("the pool has no space left")]
    NoSpace,
    /// The disk failed.
    #[error("{doing}: {cause}")]
    Disk { doing: String, cause: IoFailure },
}

fn disk<T>(result: Result<T, IoFailure>, doing: impl FnOnce() -> String) -> Result<T, OpenError> {
    result.map_err(|cause| match cause {
        IoFailure::NoSpace => OpenError::NoSpace,
        cause => OpenError::Disk { doing: doing(), cause },
    })
}

/// Bytes in a segment of a volume of so many blocks: about 256 segments, between 4 and 64 MiB.
pub fn segment_bytes_for(size_blocks: u64) -> u64 {
    (size_blocks * BLOCK_BYTES / 256)
        .next_power_of_two()
        .clamp(4 << 20, 64 << 20)
}

/// Makes a replica in an empty directory. What an interrupted attempt left behind is taken over.
pub fn format_replica(on: &mut dyn Disk, options: &FormatOptions) -> Result<(), OpenError> {
    let segment_bytes = options
        .segment_bytes
        .unwrap_or_else(|| segment_bytes_for(options.size_blocks));
    let smallest = record_bytes(super::BLOCKS_MAX) + SEGMENT_HEADER_BYTES + HEADER_BYTES as u64;
    if options.size_blocks == 0 || !segment_bytes.is_multiple_of(BLOCK_BYTES) {
        return Err(OpenError::Invalid(
            "a volume has at least one block, and segments are made of whole blocks".into(),
        ));
    }
    if !(smallest..=SEGMENT_BYTES_MAX).contains(&segment_bytes) {
        return Err(OpenError::Invalid(format!(
            "a segment has {smallest} to {SEGMENT_BYTES_MAX} bytes, not {segment_bytes}"
        )));
    }
    if !matches!(read_superblocks(on), Err(OpenError::NotFormatted)) {
        return Err(OpenError::AlreadyFormatted);
    }
    let first = SegmentId(0);
    for n in 0..=(RESERVE_SEGMENTS + 1) as u32 {
        disk(on.create(FileId::Segment(SegmentId(n)), segment_bytes), || {
            format!("making segment {n}")
        })?;
    }
    let header = SegmentHeader {
        kind: SegmentKind::Data,
        segment: first,
        log_index: 0,
        epoch: Epoch(0),
    };
    let bytes = header.encode(&options.identity);
    disk(on.write(FileId::Segment(first), 0, &[bytes]), || {
        "writing the first segment".into()
    })?;
    disk(on.sync(FileId::Segment(first)), || "syncing the first segment".into())?;
    let (segment, offset) = (first, SEGMENT_HEADER_BYTES);
    let superblock = Superblock {
        generation: 1,
        geometry: Geometry {
            identity: options.identity,
            segment_bytes,
            salt: options.salt,
        },
        epoch: Epoch(0),
        clean: true,
        checkpoint: Checkpoint {
            number: 0,
            size_blocks: options.size_blocks,
            height: height_for(options.size_blocks),
            root: Entry::default(),
            replay: LogPosition {
                segment,
                offset,
                log_index: 0,
                last: Version::default(),
                chain: 0,
            },
            table: Vec::new(),
            meta: None,
            moved: None,
        },
        epoch_ends: Vec::new(),
    };
    for slot in 0..2 {
        disk(on.create(FileId::Superblock(slot), SUPERBLOCK_BYTES as u64), || {
            format!("making superblock {slot}")
        })?;
    }
    write_superblocks(on, &superblock, 0)
}

/// Writes and syncs both, `first` first: the other one stays valid until the first is.
fn write_superblocks(on: &mut dyn Disk, superblock: &Superblock, first: u8) -> Result<(), OpenError> {
    for slot in [first, 1 - first] {
        let file = FileId::Superblock(slot);
        disk(on.write(file, 0, &[superblock.encode()]), || {
            format!("writing superblock {slot}")
        })?;
        disk(on.sync(file), || format!("syncing superblock {slot}"))?;
    }
    Ok(())
}

/// The superblock that counts.
pub(super) struct Found {
    pub superblock: Superblock,
    /// The slot it stands in.
    pub slot: u8,
    /// What is wrong with the other one, if anything.
    pub other: Option<String>,
}

/// Reads both superblocks; the newer valid one counts.
pub(super) fn read_superblocks(on: &mut dyn Disk) -> Result<Found, OpenError> {
    let mut good: Vec<(Superblock, u8)> = Vec::new();
    let mut bad = Vec::new();
    // Only what is missing or all zeros was never written: an interrupted format came no further than making the file.
    let mut written = false;
    for slot in 0..2 {
        let mut buf = BufMut::zeroed(SUPERBLOCK_BYTES);
        match on.read(FileId::Superblock(slot), 0, buf.as_mut()) {
            Err(IoFailure::NotFound) => bad.push(format!("superblock {slot} is missing")),
            Err(error) => {
                written = true;
                bad.push(format!("superblock {slot}: {error}"));
            }
            Ok(()) => match Superblock::decode(buf.as_ref()) {
                Ok(superblock) => good.push((superblock, slot)),
                Err(SuperblockError::Newer(version)) => return Err(OpenError::NewerFormat(version)),
                Err(error) => {
                    written |= buf.as_ref().iter().any(|byte| *byte != 0);
                    bad.push(format!("superblock {slot}: {error}"));
                }
            },
        }
    }
    match good.into_iter().max_by_key(|(superblock, _)| superblock.generation) {
        Some((superblock, slot)) => Ok(Found {
            superblock,
            slot,
            other: bad.pop(),
        }),
        None if !written => Err(OpenError::NotFormatted),
        None => Err(OpenError::Damaged(format!(
            "neither superblock is valid ({}): remove this replica if another copy exists, or restore from a backup",
            bad.join("; ")
        ))),
    }
}

/// Reads who a replica is, without opening it.
pub fn inspect(on: &mut dyn Disk) -> Result<Superblock, OpenError> {
    read_superblocks(on).map(|found| found.superblock)
}

fn hex(bytes: &[u8; 16]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

fn check_identity(found: &Identity, expected: &Identity) -> Result<(), OpenError> {
    let parts = [
        ("cluster", found.cluster, expected.cluster),
        ("volume", found.volume, expected.volume),
        ("replica", found.replica, expected.replica),
    ];
    for (what, found, expected) in parts {
        if found != expected {
            return Err(OpenError::WrongIdentity {
                what,
                found: hex(&found),
                expected: hex(&expected),
            });
        }
    }
    Ok(())
}

/// The segment files that are there, with their lengths in bytes.
pub(super) fn segment_files(on: &mut dyn Disk) -> Result<BTreeMap<SegmentId, u64>, OpenError> {
    let files = disk(on.list(), || "listing the replica directory".into())?;
    Ok(files
        .into_iter()
        .filter_map(|(file, len)| match file {
            FileId::Segment(id) => Some((id, len)),
            FileId::Superblock(_) => None,
        })
        .collect())
}

/// The segment table of a checkpoint, and where its own pages lie.
pub(super) fn read_table(
    on: &mut dyn Disk,
    superblock: &Superblock,
) -> Result<(BTreeMap<SegmentId, Used>, Vec<Location>), OpenError> {
    let mut used = BTreeMap::new();
    let mut pages = Vec::new();
    let mut read = |pointer: Entry, kind: PageKind, index: u64| -> Result<Page, OpenError> {
        pages.push(pointer.location);
        read_page(on, superblock, pointer, kind, PageName { level: 0, index })
    };
    for (n, pointer) in superblock.checkpoint.table.iter().enumerate() {
        let index = read(*pointer, PageKind::TableIndex, n as u64)?;
        for (slot, pointer) in index
            .entries()
            .into_iter()
            .enumerate()
            .filter(|(_, entry)| !entry.location.is_none())
        {
            let table = read(pointer, PageKind::Table, (n * FANOUT + slot) as u64)?;
            used.extend(table.entries().into_iter().filter_map(from_row));
        }
    }
    let replay = &superblock.checkpoint.replay;
    let log = Used {
        kind: SegmentKind::Data,
        live: 0,
        log_index: replay.log_index,
        open: false,
    };
    used.entry(replay.segment).or_insert(log);
    Ok((used, pages))
}

/// Reads and checks one page.
pub(super) fn read_page(
    on: &mut dyn Disk,
    superblock: &Superblock,
    pointer: Entry,
    kind: PageKind,
    name: PageName,
) -> Result<Page, OpenError> {
    let mut buf = BufMut::zeroed(BLOCK_BYTES as usize);
    let (segment, offset) = (pointer.location.segment(), pointer.location.offset());
    let doing = || format!("reading a {kind:?} page at segment {} offset {offset}", segment.0);
    match on.read(FileId::Segment(segment), offset, buf.as_mut()) {
        Err(IoFailure::NotFound) => return Err(OpenError::Damaged(format!("{}: the segment is missing", doing()))),
        result => disk(result, doing)?,
    }
    let replica = superblock.geometry.identity.replica;
    Page::decode(buf.freeze(), kind, name, replica, pointer.check)
        .map_err(|error| OpenError::Damaged(format!("{}: {error}", doing())))
}

/// What replaying the log found.
pub(super) struct Replay {
    pub ops: Vec<Op>,
    pub end: LogPosition,
    pub segments: Vec<(SegmentId, u64)>,
    pub report: OpenReport,
}

/// Reads the records behind the checkpoint.
pub(super) fn replay(
    on: &mut dyn Disk,
    superblock: &Superblock,
    files: &BTreeMap<SegmentId, u64>,
    used: &BTreeMap<SegmentId, Used>,
) -> Result<Replay, OpenError> {
    let seals = Seals::new(&superblock.geometry.identity, superblock.geometry.salt);
    let start = superblock.checkpoint.replay;
    // An earlier opening settled where its epochs ended, and synced what lies before: that was served.
    let settled = superblock.epoch_ends.iter().filter(|end| end.end > Seq(0));
    let served = settled
        .map(|end| Version {
            epoch: end.last,
            seq: end.end,
        })
        .max()
        .unwrap_or_default();
    let flushed = start.last.max(served);
    let mut tail = Tail {
        on,
        superblock,
        seals,
        end: start,
        flushed,
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
        if !tail.continues(&header) {
            break true;
        }
        match header.body.clone() {
            Body::Data {
                first_seq,
                writes,
                checks,
            } => {
                let at = tail.end;
                let last = Version {
                    epoch: header.epoch,
                    seq: Seq(first_seq.0 + writes.len() as u64 - 1),
                };
                if header.flushed.0 > 0 {
                    tail.flushed = tail.flushed.max(Version {
                        epoch: header.epoch,
                        seq: header.flushed,
                    });
                }
                let bad = tail.replay_record(&header, first_seq, &writes, &checks, &mut ops)?;
                if !bad.is_empty() {
                    let ops_before = ops.len() - ops_of(&writes);
                    doubtful.push(Doubtful {
                        last,
                        at,
                        ops_before,
                        records_before: report.replayed_records,
                        bad,
                    });
                }
                report.replayed_records += 1;
                tail.end.offset += record_bytes(checks.len());
                tail.end.last = last;
                tail.end.chain = check;
            }
            Body::FlushMark => {
                tail.flushed = tail.flushed.max(Version {
                    epoch: header.epoch,
                    seq: header.flushed,
                });
                tail.end.offset += HEADER_BYTES as u64;
            }
            Body::Next { next } => {
                tail.flushed = tail.flushed.max(Version {
                    epoch: header.epoch,
                    seq: header.flushed,
                });
                let next = SegmentId(next);
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
    let flushed = tail.flushed;
    let mut end = tail.end;
    // The first doubtful record that no flush covers is where the tail is torn.
    if let Some(torn) = doubtful.iter().position(|record| record.last > flushed) {
        let record = &doubtful[torn];
        report.replayed_records = record.records_before;
        ops.truncate(record.ops_before);
        segments.retain(|(_, log_index)| *log_index <= record.at.log_index);
        end = record.at;
        doubtful.truncate(torn);
    }
    if end.last < flushed.min(served) {
        return Err(OpenError::Damaged(format!(
            "the log breaks off at segment {} offset {} after write {}, but it went on to write {served} when it was \
             opened before: data that was served is missing here; another copy or a backup is needed",
            end.segment.0, end.offset, end.last
        )));
    }
    if hole {
        report.torn_at = Some((end.segment.0, end.offset));
    }
    report.damaged_blocks = doubtful.into_iter().flat_map(|record| record.bad).collect();
    Ok(Replay {
        ops,
        end,
        segments,
        report,
    })
}

/// A record whose header is good and whose payload is not.
struct Doubtful {
    last: Version,
    at: LogPosition,
    ops_before: usize,
    records_before: u64,
    /// The blocks that do not pass their check.
    bad: Vec<u64>,
}

/// Changes of the map that these writes make.
fn ops_of(writes: &[super::WriteEntry]) -> usize {
    writes
        .iter()
        .map(|write| if write.zero { 1 } else { write.blocks as usize })
        .sum()
}

struct Tail<'a> {
    on: &'a mut dyn Disk,
    superblock: &'a Superblock,
    seals: Seals,
    end: LogPosition,
    flushed: Version,
}

impl Tail<'_> {
    fn header_at(&mut self, at: LogPosition) -> Result<Option<(Header, u32)>, OpenError> {
        if at.offset + HEADER_BYTES as u64 > self.superblock.geometry.segment_bytes {
            return Ok(None);
        }
        let mut buf = BufMut::zeroed(HEADER_BYTES);
        let doing = || format!("reading the log at segment {} offset {}", at.segment.0, at.offset);
        match self.on.read(FileId::Segment(at.segment), at.offset, buf.as_mut()) {
            Err(IoFailure::NotFound) => Err(OpenError::Damaged(format!("{}: the segment is missing", doing()))),
            result => disk(result, doing).map(|()| self.seals.decode(buf.as_ref())),
        }
    }

    /// True if the record is the next one of the log, and not a stale one.
    fn continues(&self, header: &Header) -> bool {
        let last = self.end.last;
        if header.chain != self.end.chain || header.epoch > self.superblock.epoch || header.epoch < last.epoch {
            return false;
        }
        match &header.body {
            Body::Data { first_seq, writes, .. } => {
                let expected = if header.epoch == last.epoch {
                    last.seq.next()
                } else {
                    Seq(1)
                };
                let last_seq = first_seq.0 + writes.len() as u64 - 1;
                let settled = self.superblock.end_of(header.epoch);
                *first_seq == expected && !writes.is_empty() && settled.is_none_or(|end| last_seq <= end.0)
            }
            Body::Next { .. } | Body::FlushMark => true,
            Body::Moved { .. } => false,
        }
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

    /// Adds the changes of a record; returns the blocks whose payload does not pass its check.
    fn replay_record(
        &mut self,
        header: &Header,
        first_seq: Seq,
        writes: &[super::WriteEntry],
        checks: &[u32],
        ops: &mut Vec<Op>,
    ) -> Result<Vec<u64>, OpenError> {
        let at = self.end;
        let mut payload = BufMut::zeroed(checks.len() * BLOCK_BYTES as usize);
        if !checks.is_empty() {
            let offset = at.offset + HEADER_BYTES as u64;
            if offset + payload.len() as u64 > self.superblock.geometry.segment_bytes {
                return Err(OpenError::Damaged(format!(
                    "segment {} has a record that reaches over its end",
                    at.segment.0
                )));
            }
            let read = self.on.read(FileId::Segment(at.segment), offset, payload.as_mut());
            disk(read, || {
                format!("reading the log at segment {} offset {offset}", at.segment.0)
            })?;
        }
        let mut blocks = payload.as_ref().chunks(BLOCK_BYTES as usize).zip(checks).enumerate();
        let mut bad = Vec::new();
        for (n, write) in writes.iter().enumerate() {
            let version = super::cleaner::version_of(header.epoch, first_seq, n);
            if write.zero {
                ops.push(Op::Zero(write.lba, Lba(write.lba.0 + u64::from(write.blocks)), version));
                continue;
            }
            for block in 0..u64::from(write.blocks) {
                let (index, (bytes, check)) = blocks.next().expect("a header has a check for each block");
                let lba = Lba(write.lba.0 + block);
                if self.seals.block(lba, version, bytes) != *check {
                    bad.push(lba.0);
                }
                let offset = at.offset + HEADER_BYTES as u64 + index as u64 * BLOCK_BYTES;
                let location = Location::block(at.segment, offset);
                ops.push(Op::Block(
                    lba,
                    Entry {
                        location,
                        version,
                        check: *check,
                    },
                ));
            }
        }
        Ok(bad)
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
            let len = CHUNK.min(segment_bytes - offset);
            let mut buf = BufMut::zeroed(len as usize);
            let read = self.on.read(FileId::Segment(segment), offset, buf.as_mut());
            disk(read, || {
                format!("reading the log at segment {} offset {offset}", segment.0)
            })?;
            for block in buf.as_ref().chunks(HEADER_BYTES) {
                if let Some((header, _)) = self.seals.decode(block) {
                    self.weigh(&header)?;
                }
            }
            offset += len;
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

/// Opens a replica for `options.epoch`. The promise of that epoch is durable when this returns.
pub fn open_replica(on: &mut dyn Disk, options: OpenOptions) -> Result<(Store, OpenReport), OpenError> {
    let Found {
        mut superblock,
        slot: in_use,
        other: repaired,
    } = read_superblocks(on)?;
    check_identity(&superblock.geometry.identity, &options.identity)?;
    if options.epoch <= superblock.epoch {
        return Err(OpenError::Fenced {
            promised: superblock.epoch.0,
            asked: options.epoch.0,
        });
    }
    let files = segment_files(on)?;
    let (used, table_pages) = read_table(on, &superblock)?;
    let segment_bytes = superblock.geometry.segment_bytes;
    for id in used.keys() {
        match files.get(id) {
            None => return Err(OpenError::Damaged(format!("segment {} is missing", id.0))),
            Some(len) if *len < segment_bytes => {
                return Err(OpenError::Damaged(format!(
                    "segment {} has {len} bytes instead of {segment_bytes}",
                    id.0
                )));
            }
            Some(_) => {}
        }
    }
    let Replay {
        ops,
        end,
        segments: replayed,
        mut report,
        ..
    } = replay(on, &superblock, &files, &used)?;
    report.superblock_repaired = repaired;

    let mut segments = Segments::default();
    let replayed: BTreeMap<SegmentId, u64> = replayed.into_iter().collect();
    for (id, row) in &used {
        segments.load(*id, *row);
    }
    for (id, log_index) in &replayed {
        let live = used.get(id).map_or(0, |row| row.live);
        segments.load(
            *id,
            Used {
                kind: SegmentKind::Data,
                live,
                log_index: *log_index,
                open: *id == end.segment,
            },
        );
    }
    for (id, len) in &files {
        if segments.get(*id).is_some() {
            continue;
        }
        if *len == segment_bytes {
            segments.load_free(*id);
        } else {
            // Left half made by a crash; nothing uses it.
            disk(on.remove(FileId::Segment(*id)), || {
                format!("removing the unfinished segment {}", id.0)
            })?;
        }
    }
    for stream in [superblock.checkpoint.meta, superblock.checkpoint.moved]
        .into_iter()
        .flatten()
    {
        segments.reopen(stream.segment);
    }
    let mut active = Memtable::default();
    for op in &ops {
        match *op {
            Op::Block(lba, entry) => active.insert(lba, entry),
            Op::Zero(start, stop, version) => active.zero(start, stop, version),
        }
    }
    // What is served after this must still be there after the next power cut.
    for id in replayed.keys() {
        disk(on.sync(FileId::Segment(*id)), || format!("syncing segment {}", id.0))?;
    }
    if superblock.epoch > Epoch(0) {
        let ended = end.last.epoch;
        let promised = superblock.epoch;
        if superblock.end_of(ended).is_none() && ended > Epoch(0) {
            superblock.settle(ended, ended, end.last.seq);
        }
        if promised > ended && superblock.end_of(promised).is_none() {
            superblock.settle(promised, promised, Seq(0));
        }
    }
    superblock.generation += 1;
    superblock.epoch = options.epoch;
    superblock.clean = false;
    let crowded = superblock.epoch_ends.len() > ENDS_MAX - 4;
    // The one that is not in use goes first: a power cut in the middle must leave a valid one.
    write_superblocks(on, &superblock, 1 - in_use)?;

    let seals = Seals::new(&superblock.geometry.identity, superblock.geometry.salt);
    let checkpoint = &superblock.checkpoint;
    let map = Map::new(checkpoint.root, checkpoint.height, options.cache_pages_max.max(64));
    let cleaner = super::cleaner::Cleaner::new(checkpoint.moved);
    let mut store = Store {
        seals,
        segments,
        map,
        active,
        frozen: None,
        log: Log::new(end),
        reads: Reads::default(),
        job: None,
        cleaner,
        checkpoint_wanted: crowded,
        grow_to: None,
        closing: false,
        close_unclean: false,
        stopped: None,
        now_ms: 0,
        last_write_ms: 0,
        background_due: true,
        retry_create_ms: None,
        pool_tight: true,
        next_io: 0,
        pending: Default::default(),
        out: Default::default(),
        events: Default::default(),
        stats: StoreStats::default(),
        superblock_table_pages: table_pages,
        options,
        superblock,
    };
    if crowded {
        // The history of epochs must not overflow in a loop of crashes.
        store.drive(on);
        if store.superblock.epoch_ends.len() > ENDS_MAX - 4 {
            return Err(OpenError::NoSpace);
        }
    }
    Ok((store, report))
}
