//! Records of the log: one or more writes under one header, each block with its own check.
//!
//! A record is a header of whole pages followed by the written blocks, each in as many pages as it is stored in. Records
//! of an epoch form a chain: each names the check of the one before it, and their sequence numbers have no gap, so a
//! stale record left over in a recycled segment is never taken for a new one. A record about a snapshot is a link of the
//! chain like a write. Three smaller kinds live between them: the end of a segment with the name of the next, the mark of
//! a completed flush, and blocks that the cleaner moved.

use super::format::{FORMAT_VERSION, Get, Put, check_around, crc};
use super::superblock::Geometry;
use crate::buffer::{Buf, BufMut};
use crate::seal::{TAG_BYTES, Tag};
use crate::types::{BlockSize, Check, Epoch, Identity, Lba, PAGE_BYTES, Seq, SnapshotId, Version};

/// Bytes of the header of a record, except where its tags do not fit.
pub const HEADER_BYTES: usize = 4096;
/// Bytes of the longest header: that of many sealed blocks.
pub const HEADER_BYTES_MAX: usize = 8192;
const FIXED_BYTES: usize = 96;
const WRITE_BYTES: usize = 16;
const CHECK_BYTES: usize = 4;
const MOVED_BYTES: usize = 24;
const LENGTH_BYTES: usize = 1;
/// Flags of the header: behind the body are lengths, tags.
const HAS_TAGS: u8 = 1;
const HAS_LENGTHS: u8 = 2;
const CHECK_AT: usize = 8;
const MAGIC: u32 = u32::from_le_bytes(*b"GFSR");
/// A flush mark stands twice in its block, so that one damaged sector does not lose it.
const MARK_BYTES: usize = 512;

/// Most pages of payload in a record: 1 MiB. So there are no more blocks either.
pub const PAGES_MAX: usize = 256;
/// Most writes in a record.
pub const WRITES_MAX: usize = 128;
/// Most blocks in a record of moved blocks.
pub const MOVED_MAX: usize = 128;
const CHECK_ROW: usize = CHECK_BYTES + LENGTH_BYTES;
const MOVED_ROW: usize = MOVED_BYTES + LENGTH_BYTES;
const _: () = assert!(FIXED_BYTES + WRITES_MAX * WRITE_BYTES + PAGES_MAX * CHECK_ROW <= HEADER_BYTES);
const _: () = assert!(FIXED_BYTES + MOVED_MAX * MOVED_ROW <= HEADER_BYTES);
const _: () = assert!(FIXED_BYTES + WRITES_MAX * WRITE_BYTES + PAGES_MAX * (CHECK_ROW + TAG_BYTES) <= HEADER_BYTES_MAX);
const _: () = assert!(FIXED_BYTES + MOVED_MAX * (MOVED_ROW + TAG_BYTES) <= HEADER_BYTES_MAX);

/// One guest write in a record.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct WriteEntry {
    /// First block.
    pub lba: Lba,
    /// Number of blocks.
    pub blocks: u32,
    /// True for zeroes: there is no payload, the blocks read as zeros from this version on.
    pub zero: bool,
}

impl WriteEntry {
    /// The block behind the last one.
    pub fn end(&self) -> Lba {
        Lba(self.lba.0 + u64::from(self.blocks))
    }

    /// True if it writes this block.
    pub fn covers(&self, lba: Lba) -> bool {
        (self.lba..self.end()).contains(&lba)
    }
}

/// A stored block, with the version and check it always has wherever it is moved.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct MovedBlock {
    pub lba: Lba,
    pub version: Version,
    pub check: Check,
    /// What it is stored in.
    pub pages: u8,
}

/// What a record says.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Body {
    /// Guest writes, numbered from `first_seq`; `checks` has one check for each payload block, in order, and `pages` what
    /// each is stored in. Where a block is one page `pages` is empty.
    Data {
        first_seq: Seq,
        writes: Vec<WriteEntry>,
        checks: Vec<Check>,
        pages: Vec<u8>,
    },
    /// The log goes on in segment `next`.
    Next { next: u32 },
    /// Nothing but the header's `flushed`.
    FlushMark,
    /// Blocks moved by the cleaner. Not part of the chain.
    Moved { blocks: Vec<MovedBlock> },
    /// Something done to the volume's snapshots. It has a number of its own, like a write.
    Control { seq: Seq, op: ControlOp },
}

/// What is done to the snapshots of a volume; every replica does it at the same place of the log.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ControlOp {
    /// Keep the volume as it is now.
    Snapshot {
        id: SnapshotId,
        /// When it was taken, as the caller says.
        time_ms: u64,
        /// Blocks of the volume then.
        size_blocks: u64,
    },
    /// Let go of a snapshot.
    Delete { id: SnapshotId },
    /// Make the volume what it was at a snapshot; later snapshots are let go of.
    Revert { id: SnapshotId },
}

/// The header of a record.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Header {
    /// The engine start that wrote it.
    pub epoch: Epoch,
    /// Every write of this epoch up to this one was on stable storage when the record was made.
    pub flushed: Seq,
    /// The check of the data record before this one.
    pub chain: u32,
    /// The rest.
    pub body: Body,
}

impl Body {
    fn code(&self) -> u8 {
        match self {
            Body::Data { .. } => 1,
            Body::Next { .. } => 2,
            Body::FlushMark => 3,
            Body::Moved { .. } => 4,
            Body::Control { .. } => 5,
        }
    }

    /// Number of payload blocks that follow the header.
    pub fn payload_blocks(&self) -> usize {
        match self {
            Body::Data { checks, .. } => checks.len(),
            Body::Moved { blocks } => blocks.len(),
            Body::Next { .. } | Body::FlushMark | Body::Control { .. } => 0,
        }
    }

    /// Pages of them together.
    pub fn payload_pages(&self) -> usize {
        match self {
            Body::Data { checks, pages, .. } if pages.is_empty() => checks.len(),
            Body::Data { pages, .. } => pages.iter().map(|pages| usize::from(*pages)).sum(),
            Body::Moved { blocks } => blocks.iter().map(|block| usize::from(block.pages)).sum(),
            Body::Next { .. } | Body::FlushMark | Body::Control { .. } => 0,
        }
    }

    /// The first and the last write that the record numbers, if it numbers any.
    pub fn numbers(&self) -> Option<(Seq, Seq)> {
        match self {
            Body::Data { first_seq, writes, .. } => {
                let behind = first_seq.0.saturating_add(writes.len() as u64);
                Some((*first_seq, Seq(behind.saturating_sub(1))))
            }
            Body::Control { seq, .. } => Some((*seq, *seq)),
            Body::Next { .. } | Body::FlushMark | Body::Moved { .. } => None,
        }
    }
}

impl Header {
    /// The payload blocks, in order.
    pub fn payload(&self) -> Vec<MovedBlock> {
        let Body::Data {
            first_seq,
            writes,
            checks,
            pages,
        } = &self.body
        else {
            return match &self.body {
                Body::Moved { blocks } => blocks.clone(),
                _ => Vec::new(),
            };
        };
        let mut stored = checks.iter().enumerate();
        let mut blocks = Vec::with_capacity(checks.len());
        for (n, write) in writes.iter().enumerate().filter(|(_, write)| !write.zero) {
            let version = Version {
                epoch: self.epoch,
                seq: Seq(first_seq.0 + n as u64),
            };
            for lba in (write.lba.0..).take(write.blocks as usize).map(Lba) {
                let (index, check) = stored.next().expect("a header has a check for each block");
                blocks.push(MovedBlock {
                    lba,
                    version,
                    check: *check,
                    pages: pages.get(index).copied().unwrap_or(1),
                });
            }
        }
        blocks
    }
}

/// Bytes in the log of a record with so many pages of payload behind a header of so many bytes.
pub fn record_bytes(header_bytes: usize, payload_pages: usize) -> u64 {
    header_bytes as u64 + payload_pages as u64 * PAGE_BYTES
}

/// What ties checks to one volume (and, for headers, to a number the guest cannot know: a guest that writes bytes
/// looking like a header does not fool the recovery).
#[derive(Clone, Copy, Debug)]
pub struct Seals {
    header: u32,
    block: u32,
    volume: [u8; 16],
    /// Blocks are sealed, and each check comes with a tag.
    tagged: bool,
    block_size: BlockSize,
}

impl Seals {
    /// Those of a volume with blocks of one page that are not sealed. `salt` is drawn once when the replica is made.
    pub fn new(identity: &Identity, salt: u64) -> Seals {
        Seals::plain(identity.volume, salt)
    }

    fn plain(volume: [u8; 16], salt: u64) -> Seals {
        Seals {
            header: crc(0, &[&volume, &salt.to_le_bytes()]),
            block: crc(0, &[&volume]),
            volume,
            tagged: false,
            block_size: BlockSize::K4,
        }
    }

    /// Those of a replica.
    pub fn of(geometry: &Geometry) -> Seals {
        Seals::of_origin(geometry, geometry.identity.volume, geometry.salt)
    }

    /// Those of another volume, whose blocks a replica shares: they are made like its own.
    pub fn of_origin(geometry: &Geometry, volume: [u8; 16], salt: u64) -> Seals {
        Seals {
            tagged: geometry.sealed,
            block_size: geometry.block_size,
            ..Seals::plain(volume, salt)
        }
    }

    /// What a block is.
    pub fn block_size(&self) -> BlockSize {
        self.block_size
    }

    /// True if blocks are sealed.
    pub fn tagged(&self) -> bool {
        self.tagged
    }

    /// Pages of 4 KiB that a leaf of the map takes.
    pub fn leaf_pages(&self) -> u64 {
        if self.tagged { 2 } else { 1 }
    }

    /// Bytes of the header of a record with this body.
    pub fn header_bytes(&self, body: &Body) -> usize {
        let writes = if let Body::Data { writes, .. } = body {
            writes.len()
        } else {
            0
        };
        let row = if let Body::Moved { .. } = body {
            MOVED_BYTES
        } else {
            CHECK_BYTES
        };
        self.header_bytes_for(writes * WRITE_BYTES, row, body.payload_blocks())
    }

    /// Bytes of the header of a data record with so many writes and blocks.
    pub fn data_header_bytes(&self, writes: usize, blocks: usize) -> usize {
        self.header_bytes_for(writes * WRITE_BYTES, CHECK_BYTES, blocks)
    }

    /// Bytes of the header of a record of so many moved blocks.
    pub fn moved_header_bytes(&self, blocks: usize) -> usize {
        self.header_bytes_for(0, MOVED_BYTES, blocks)
    }

    fn header_bytes_for(&self, writes_bytes: usize, row_bytes: usize, blocks: usize) -> usize {
        let tag_bytes = if self.tagged { TAG_BYTES } else { 0 };
        let length_bytes = if self.has_lengths() { LENGTH_BYTES } else { 0 };
        (FIXED_BYTES + writes_bytes + blocks * (row_bytes + length_bytes + tag_bytes)).next_multiple_of(HEADER_BYTES)
    }

    /// Blocks may be stored in different numbers of pages.
    fn has_lengths(&self) -> bool {
        self.block_size != BlockSize::K4
    }

    fn flags(&self, payload: usize) -> u8 {
        let flag = |there: bool, flag: u8| if there && payload > 0 { flag } else { 0 };
        flag(self.tagged, HAS_TAGS) | flag(self.has_lengths(), HAS_LENGTHS)
    }

    /// The check of a block: over its bytes, its address and its version, so that a block in the wrong place or of
    /// another time is noticed.
    pub fn block(&self, lba: Lba, version: Version, bytes: &[u8]) -> u32 {
        let mut address = [0; 20];
        Put::new(&mut address)
            .u64(lba.0)
            .u32(version.epoch.0)
            .u64(version.seq.0);
        crc(self.block, &[&address, bytes])
    }

    /// Encodes a header; returns the block to write and its check, the next record's `chain`.
    pub fn encode(&self, header: &Header) -> (Buf, u32) {
        let header_bytes = self.header_bytes(&header.body);
        let mut buf = BufMut::zeroed(header_bytes);
        let bytes = buf.as_mut();
        let (first_seq, writes, next) = match &header.body {
            Body::Data { first_seq, writes, .. } => (*first_seq, writes.len(), 0),
            Body::Next { next } => (Seq(0), 0, *next),
            Body::FlushMark => (Seq(0), 0, 0),
            Body::Moved { .. } => (Seq(0), 0, 0),
            Body::Control { seq, .. } => (*seq, 0, 0),
        };
        let payload = header.body.payload_blocks();
        let mut put = Put::new(bytes);
        put.u32(MAGIC)
            .u16(FORMAT_VERSION)
            .u8(header.body.code())
            .u8(self.flags(payload))
            .u32(0);
        put.u32(header_bytes as u32).u32(payload as u32).u32(writes as u32);
        put.bytes(&self.volume)
            .u32(header.epoch.0)
            .u64(first_seq.0)
            .u64(header.flushed.0);
        put.u32(header.chain).u32(next).seek(FIXED_BYTES);
        match &header.body {
            Body::Data {
                writes, checks, pages, ..
            } => {
                assert!(writes.len() <= WRITES_MAX && header.body.payload_pages() <= PAGES_MAX);
                let lengths = if self.has_lengths() { checks.len() } else { 0 };
                assert_eq!(
                    pages.len(),
                    lengths,
                    "a length for each block that may have different ones"
                );
                for write in writes {
                    put.u64(write.lba.0).u32(write.blocks).u32(u32::from(write.zero));
                }
                checks.iter().for_each(|check| {
                    put.u32(check.crc);
                });
                put.bytes(pages);
                self.put_tags(&mut put, checks.iter().map(|check| check.tag));
            }
            Body::Moved { blocks } => {
                assert!(blocks.len() <= MOVED_MAX && header.body.payload_pages() <= PAGES_MAX);
                for block in blocks {
                    put.u64(block.lba.0)
                        .u32(block.version.epoch.0)
                        .u64(block.version.seq.0)
                        .u32(block.check.crc);
                }
                if self.has_lengths() {
                    blocks.iter().for_each(|block| {
                        put.u8(block.pages);
                    });
                }
                self.put_tags(&mut put, blocks.iter().map(|block| block.check.tag));
            }
            Body::Control { op, .. } => put_control(&mut put, op),
            Body::Next { .. } | Body::FlushMark => {}
        }
        let covered = if header.body == Body::FlushMark {
            MARK_BYTES
        } else {
            header_bytes
        };
        let check = check_around(self.header, &bytes[..covered], CHECK_AT);
        bytes[CHECK_AT..CHECK_AT + 4].copy_from_slice(&check.to_le_bytes());
        if header.body == Body::FlushMark {
            let (mark, rest) = bytes.split_at_mut(MARK_BYTES);
            rest[..MARK_BYTES].copy_from_slice(mark);
        }
        (buf.freeze(), check)
    }

    fn put_tags(&self, put: &mut Put<'_>, tags: impl Iterator<Item = Tag>) {
        if self.tagged {
            tags.for_each(|tag| {
                put.bytes(&tag.0);
            });
        }
    }

    /// What each of so many blocks is stored in; `None` if that cannot be.
    fn get_lengths(&self, get: &mut Get<'_>, blocks: usize) -> Option<Vec<u8>> {
        if !self.has_lengths() {
            return Some(Vec::new());
        }
        let pages: Vec<u8> = (0..blocks).map(|_| get.u8()).collect();
        let total: usize = pages.iter().map(|pages| usize::from(*pages)).sum();
        let fit = pages.iter().all(|pages| (1..=self.block_size.pages()).contains(pages));
        (fit && total <= PAGES_MAX).then_some(pages)
    }

    fn get_tags<'a>(&self, get: &mut Get<'_>, checks: impl Iterator<Item = &'a mut Check>) {
        if self.tagged {
            checks.for_each(|check| check.tag = Tag(get.array()));
        }
    }

    /// Decodes the bytes at the start of a record, as many as there are up to [`HEADER_BYTES_MAX`]; `None` if it is no valid header of this replica.
    /// Also gives the header's check.
    pub fn decode(&self, block: &[u8]) -> Option<(Header, u32)> {
        debug_assert!(block.len() >= HEADER_BYTES);
        self.decode_one(block).or_else(|| {
            // The second copy counts only for a flush mark, the one kind that has it.
            let mut copy = vec![0; HEADER_BYTES];
            copy[..MARK_BYTES].copy_from_slice(&block[MARK_BYTES..2 * MARK_BYTES]);
            self.decode_one(&copy)
                .filter(|(header, _)| header.body == Body::FlushMark)
        })
    }

    fn decode_one(&self, block: &[u8]) -> Option<(Header, u32)> {
        let mut get = Get::new(block);
        if get.u32() != MAGIC || get.u16() != FORMAT_VERSION {
            return None;
        }
        let (code, flags, check) = (get.u8(), get.u8(), get.u32());
        let (header_bytes, payload, writes) = (get.u32() as usize, get.u32() as usize, get.u32() as usize);
        let volume: [u8; 16] = get.array();
        let epoch = Epoch(get.u32());
        let (first_seq, flushed) = (Seq(get.u64()), Seq(get.u64()));
        let (chain, next) = (get.u32(), get.u32());
        let covered = if code == 3 { MARK_BYTES } else { header_bytes };
        if volume != self.volume
            || header_bytes < HEADER_BYTES
            || header_bytes > block.len()
            || flags != self.flags(payload)
            || check_around(self.header, &block[..covered], CHECK_AT) != check
        {
            return None;
        }
        let row_bytes = if code == 4 { MOVED_BYTES } else { CHECK_BYTES };
        if header_bytes
            != self.header_bytes_for(writes.min(WRITES_MAX) * WRITE_BYTES, row_bytes, payload.min(PAGES_MAX))
        {
            return None;
        }
        get.seek(FIXED_BYTES);
        let body = match code {
            1 if writes <= WRITES_MAX && payload <= PAGES_MAX => {
                let writes: Vec<WriteEntry> = (0..writes)
                    .map(|_| WriteEntry {
                        lba: Lba(get.u64()),
                        blocks: get.u32(),
                        zero: get.u32() == 1,
                    })
                    .collect();
                let blocks: u64 = writes.iter().filter(|w| !w.zero).map(|w| u64::from(w.blocks)).sum();
                if blocks != payload as u64 {
                    return None;
                }
                let mut checks: Vec<Check> = (0..payload).map(|_| get.u32().into()).collect();
                let pages = self.get_lengths(&mut get, payload)?;
                self.get_tags(&mut get, checks.iter_mut());
                Body::Data {
                    first_seq,
                    writes,
                    checks,
                    pages,
                }
            }
            2 => Body::Next { next },
            3 => Body::FlushMark,
            4 if payload <= MOVED_MAX => {
                let mut blocks: Vec<MovedBlock> = (0..payload)
                    .map(|_| MovedBlock {
                        lba: Lba(get.u64()),
                        version: Version {
                            epoch: Epoch(get.u32()),
                            seq: Seq(get.u64()),
                        },
                        check: get.u32().into(),
                        pages: 1,
                    })
                    .collect();
                let pages = self.get_lengths(&mut get, payload)?;
                for (block, pages) in blocks.iter_mut().zip(pages) {
                    block.pages = pages;
                }
                self.get_tags(&mut get, blocks.iter_mut().map(|block| &mut block.check));
                Body::Moved { blocks }
            }
            5 => Body::Control {
                seq: first_seq,
                op: get_control(&mut get)?,
            },
            _ => return None,
        };
        Some((
            Header {
                epoch,
                flushed,
                chain,
                body,
            },
            check,
        ))
    }
}

fn put_control(put: &mut Put<'_>, op: &ControlOp) {
    let (code, id, time_ms, size_blocks) = match *op {
        ControlOp::Snapshot {
            id,
            time_ms,
            size_blocks,
        } => (1, id, time_ms, size_blocks),
        ControlOp::Delete { id } => (2, id, 0, 0),
        ControlOp::Revert { id } => (3, id, 0, 0),
    };
    put.u32(code).bytes(&id.0).u64(time_ms).u64(size_blocks);
}

fn get_control(get: &mut Get<'_>) -> Option<ControlOp> {
    let (code, id) = (get.u32(), SnapshotId(get.array()));
    match code {
        1 => Some(ControlOp::Snapshot {
            id,
            time_ms: get.u64(),
            size_blocks: get.u64(),
        }),
        2 => Some(ControlOp::Delete { id }),
        3 => Some(ControlOp::Revert { id }),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn seals() -> Seals {
        Seals::new(
            &Identity {
                cluster: [1; 16],
                volume: [2; 16],
                replica: [3; 16],
            },
            99,
        )
    }

    fn sample(body: Body) -> Header {
        Header {
            epoch: Epoch(7),
            flushed: Seq(40),
            chain: 0xdead_beef,
            body,
        }
    }

    fn bodies() -> [Body; 7] {
        let write = |lba, blocks, zero| WriteEntry {
            lba: Lba(lba),
            blocks,
            zero,
        };
        let moved = MovedBlock {
            lba: Lba(4),
            version: Version {
                epoch: Epoch(2),
                seq: Seq(9),
            },
            check: 77.into(),
            pages: 1,
        };
        [
            Body::Data {
                first_seq: Seq(41),
                writes: vec![write(5, 2, false), write(9, 900, true)],
                checks: vec![1.into(), 2.into()],
                pages: Vec::new(),
            },
            Body::Next { next: 12 },
            Body::FlushMark,
            Body::Moved { blocks: vec![moved; 3] },
            Body::Control {
                seq: Seq(41),
                op: ControlOp::Snapshot {
                    id: SnapshotId([7; 16]),
                    time_ms: 1_700_000_000_000,
                    size_blocks: 1 << 28,
                },
            },
            Body::Control {
                seq: Seq(42),
                op: ControlOp::Delete {
                    id: SnapshotId([8; 16]),
                },
            },
            Body::Control {
                seq: Seq(43),
                op: ControlOp::Revert {
                    id: SnapshotId([9; 16]),
                },
            },
        ]
    }

    #[test]
    fn a_header_gives_back_what_it_was_made_of() {
        for body in bodies() {
            let header = sample(body);
            let (block, check) = seals().encode(&header);
            assert_eq!(seals().decode(block.as_ref()), Some((header, check)));
        }
    }

    #[test]
    fn every_flipped_bit_of_a_header_is_noticed() {
        for body in bodies() {
            let header = sample(body);
            let (block, check) = seals().encode(&header);
            for bit in 0..HEADER_BYTES * 8 {
                let mut bytes = block.as_ref().to_vec();
                bytes[bit / 8] ^= 1 << (bit % 8);
                match seals().decode(&bytes) {
                    None => {}
                    // A flush mark is whole as long as one of its copies is.
                    Some(found) => assert_eq!(found, (sample(Body::FlushMark), check), "bit {bit}"),
                }
            }
        }
    }

    #[test]
    fn a_header_made_without_the_salt_is_no_header() {
        let (block, _) = seals().encode(&sample(Body::FlushMark));
        let other = Seals::new(
            &Identity {
                cluster: [1; 16],
                volume: [2; 16],
                replica: [3; 16],
            },
            98,
        );
        assert_eq!(other.decode(block.as_ref()), None);
    }

    #[test]
    fn the_check_of_a_block_depends_on_its_address_and_version() {
        let version = Version {
            epoch: Epoch(1),
            seq: Seq(1),
        };
        let bytes = [5; 4096];
        let check = seals().block(Lba(1), version, &bytes);
        assert_ne!(check, seals().block(Lba(2), version, &bytes));
        assert_ne!(check, seals().block(Lba(1), Version { seq: Seq(2), ..version }, &bytes));
    }

    fn tagged() -> Seals {
        Seals {
            tagged: true,
            ..seals()
        }
    }

    /// Records of sealed blocks: whose header is one block, and whose is two.
    fn sealed_bodies() -> Vec<Body> {
        let check = |n: usize| Check {
            crc: n as u32,
            tag: Tag([n as u8; TAG_BYTES]),
        };
        let data = |blocks: usize| Body::Data {
            first_seq: Seq(41),
            writes: vec![WriteEntry {
                lba: Lba(5),
                blocks: blocks as u32,
                zero: false,
            }],
            checks: (1..=blocks).map(check).collect(),
            pages: Vec::new(),
        };
        let moved = |blocks: usize| Body::Moved {
            blocks: (1..=blocks)
                .map(|n| MovedBlock {
                    lba: Lba(n as u64),
                    version: Version {
                        epoch: Epoch(2),
                        seq: Seq(9),
                    },
                    check: check(n),
                    pages: 1,
                })
                .collect(),
        };
        vec![data(1), data(PAGES_MAX), moved(1), moved(MOVED_MAX), Body::FlushMark]
    }

    #[test]
    fn a_header_of_sealed_blocks_gives_back_their_tags() {
        let lengths: Vec<usize> = sealed_bodies()
            .into_iter()
            .map(|body| {
                let header = sample(body);
                let (bytes, check) = tagged().encode(&header);
                assert_eq!(bytes.len(), tagged().header_bytes(&header.body));
                assert_eq!(tagged().decode(bytes.as_ref()), Some((header.clone(), check)));
                // Whatever follows a header does not matter.
                let mut longer = bytes.as_ref().to_vec();
                longer.resize(HEADER_BYTES_MAX, 0xee);
                assert_eq!(tagged().decode(&longer), Some((header, check)));
                bytes.len()
            })
            .collect();
        assert_eq!(lengths, [4096, 8192, 4096, 8192, 4096]);
    }

    #[test]
    fn a_record_with_tags_is_none_where_nothing_is_sealed_and_the_other_way_round() {
        let sealed = sample(sealed_bodies().remove(0));
        assert_eq!(seals().decode(tagged().encode(&sealed).0.as_ref()), None);
        assert_eq!(tagged().decode(seals().encode(&sealed).0.as_ref()), None);
    }

    fn large(tagged: bool) -> Seals {
        Seals {
            tagged,
            block_size: BlockSize::K16,
            ..seals()
        }
    }

    /// Records of blocks of 16 KiB, stored in so many pages each.
    fn large_bodies(tagged: bool, pages: &[u8]) -> [Body; 2] {
        let check = |n: usize| Check {
            crc: n as u32,
            tag: Tag([if tagged { n as u8 } else { 0 }; TAG_BYTES]),
        };
        let data = Body::Data {
            first_seq: Seq(41),
            writes: vec![WriteEntry {
                lba: Lba(5),
                blocks: pages.len() as u32,
                zero: false,
            }],
            checks: (1..=pages.len()).map(check).collect(),
            pages: pages.to_vec(),
        };
        let blocks = sample(data.clone()).payload();
        let blocks = blocks.into_iter().take(MOVED_MAX).collect();
        [data, Body::Moved { blocks }]
    }

    #[test]
    fn a_header_gives_back_what_each_block_is_stored_in() {
        for tagged in [false, true] {
            for pages in [vec![4], vec![1, 4, 2, 3], vec![1; PAGES_MAX], vec![4; PAGES_MAX / 4]] {
                for body in large_bodies(tagged, &pages) {
                    let taken = pages.iter().take(body.payload_blocks());
                    let total: usize = taken.map(|pages| usize::from(*pages)).sum();
                    assert_eq!(body.payload_pages(), total);
                    let header = sample(body);
                    let (bytes, check) = large(tagged).encode(&header);
                    assert_eq!(bytes.len(), large(tagged).header_bytes(&header.body));
                    assert_eq!(large(tagged).decode(bytes.as_ref()), Some((header, check)));
                }
            }
        }
    }

    #[test]
    fn a_length_that_no_block_has_makes_no_header() {
        let [data, moved] = large_bodies(false, &[4, 2]);
        for (body, at) in [
            (data, FIXED_BYTES + WRITE_BYTES + 2 * CHECK_BYTES),
            (moved, FIXED_BYTES + 2 * MOVED_BYTES),
        ] {
            let (bytes, _) = large(false).encode(&sample(body));
            for wrong in [0, 5, 255] {
                let mut other = bytes.as_ref().to_vec();
                assert_eq!(other[at..at + 2], [4, 2]);
                other[at] = wrong;
                let check = check_around(large(false).header, &other, CHECK_AT);
                other[CHECK_AT..CHECK_AT + 4].copy_from_slice(&check.to_le_bytes());
                assert_eq!(large(false).decode(&other), None, "{wrong} pages");
            }
        }
    }

    #[test]
    fn a_record_of_another_block_size_is_none() {
        let [data, _] = large_bodies(false, &[1, 1]);
        assert_eq!(seals().decode(large(false).encode(&sample(data)).0.as_ref()), None);
        let [small, ..] = bodies();
        assert_eq!(large(false).decode(seals().encode(&sample(small)).0.as_ref()), None);
    }

    #[test]
    fn every_flipped_bit_of_a_long_header_is_noticed() {
        let (bytes, _) = tagged().encode(&sample(sealed_bodies().remove(1)));
        for bit in 0..HEADER_BYTES_MAX * 8 {
            let mut flipped = bytes.as_ref().to_vec();
            flipped[bit / 8] ^= 1 << (bit % 8);
            assert_eq!(tagged().decode(&flipped), None, "bit {bit}");
        }
        assert_eq!(
            tagged().decode(&bytes.as_ref()[..HEADER_BYTES]),
            None,
            "half of it is none"
        );
    }
}
