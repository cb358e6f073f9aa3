//! The bytes of a record's header, and the checks that tie them, and blocks, to one volume.

use super::super::format::{FORMAT_VERSION, Get, Put, check_around, crc};
use super::super::superblock::Geometry;
use super::*;
use crate::buffer::{Buf, BufMut};
use crate::seal::Tag;
use crate::types::Identity;

/// What ties checks to one volume (and, for headers, to a number the guest cannot know: a guest that writes bytes
/// looking like a header does not fool the recovery).
#[derive(Clone, Copy, Debug)]
pub struct Seals {
    pub(super) header: u32,
    pub(super) block: u32,
    pub(super) volume: [u8; 16],
    /// Blocks are sealed, and each check comes with a tag.
    pub(super) tagged: bool,
    pub(super) block_size: BlockSize,
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

    /// What all replicas of a volume that is not sealed have in common: the checks of its blocks.
    pub fn shared(volume: [u8; 16], block_size: BlockSize) -> Seals {
        Seals {
            block_size,
            ..Seals::plain(volume, 0)
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
        let (first_bytes, row) = match body {
            Body::Data { writes, .. } => (writes.len() * WRITE_BYTES, CHECK_BYTES),
            Body::Copied { zeros, .. } => (zeros.len() * ZEROS_BYTES, MOVED_BYTES),
            _ => (0, MOVED_BYTES),
        };
        self.header_bytes_for(first_bytes, row, body.payload_blocks())
    }

    /// Bytes of the header of a data record with so many writes and blocks.
    pub fn data_header_bytes(&self, writes: usize, blocks: usize) -> usize {
        self.header_bytes_for(writes * WRITE_BYTES, CHECK_BYTES, blocks)
    }

    /// Bytes of the header of a record of so many moved blocks.
    pub fn moved_header_bytes(&self, blocks: usize) -> usize {
        self.header_bytes_for(0, MOVED_BYTES, blocks)
    }

    /// Bytes of the header of a record of copies, with so many zeroed ranges and blocks.
    pub fn copied_header_bytes(&self, zeros: usize, blocks: usize) -> usize {
        self.header_bytes_for(zeros * ZEROS_BYTES, MOVED_BYTES, blocks)
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
            Body::Copied { zeros, .. } => (Seq(0), zeros.len(), 0),
            Body::Join { base } => (*base, 0, 0),
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
                self.put_blocks(&mut put, blocks);
            }
            Body::Copied { blocks, zeros } => {
                assert!(blocks.len() <= COPIED_MAX && header.body.payload_pages() <= PAGES_MAX);
                assert!(zeros.len() <= COPIED_ZEROS_MAX);
                for range in zeros {
                    put.u64(range.start.0)
                        .u64(range.end.0)
                        .u32(range.version.epoch.0)
                        .u64(range.version.seq.0);
                }
                self.put_blocks(&mut put, blocks);
            }
            Body::Control { op, .. } => put_control(&mut put, op),
            Body::Next { .. } | Body::FlushMark | Body::Join { .. } => {}
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

    /// Blocks that come with their versions, what each is stored in, and their tags.
    fn put_blocks(&self, put: &mut Put<'_>, blocks: &[MovedBlock]) {
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
        self.put_tags(put, blocks.iter().map(|block| block.check.tag));
    }

    /// The opposite of [`Seals::put_blocks`]; `None` if what they are stored in cannot be.
    fn get_blocks(&self, get: &mut Get<'_>, count: usize) -> Option<Vec<MovedBlock>> {
        let mut blocks: Vec<MovedBlock> = (0..count)
            .map(|_| MovedBlock {
                lba: Lba(get.u64()),
                version: get_version(get),
                check: get.u32().into(),
                pages: 1,
            })
            .collect();
        let pages = self.get_lengths(get, count)?;
        for (block, pages) in blocks.iter_mut().zip(pages) {
            block.pages = pages;
        }
        self.get_tags(get, blocks.iter_mut().map(|block| &mut block.check));
        Some(blocks)
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
        let writes_bytes = match code {
            6 => writes.min(COPIED_ZEROS_MAX) * ZEROS_BYTES,
            _ => writes.min(WRITES_MAX) * WRITE_BYTES,
        };
        let row_bytes = if matches!(code, 4 | 6) {
            MOVED_BYTES
        } else {
            CHECK_BYTES
        };
        if header_bytes != self.header_bytes_for(writes_bytes, row_bytes, payload.min(PAGES_MAX)) {
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
            4 if payload <= MOVED_MAX => Body::Moved {
                blocks: self.get_blocks(&mut get, payload)?,
            },
            5 => Body::Control {
                seq: first_seq,
                op: get_control(&mut get)?,
            },
            6 if payload <= COPIED_MAX && writes <= COPIED_ZEROS_MAX => {
                let zeros = (0..writes).map(|_| CopiedZeros {
                    start: Lba(get.u64()),
                    end: Lba(get.u64()),
                    version: get_version(&mut get),
                });
                let zeros = zeros.collect();
                Body::Copied {
                    blocks: self.get_blocks(&mut get, payload)?,
                    zeros,
                }
            }
            7 => Body::Join { base: first_seq },
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

fn get_version(get: &mut Get<'_>) -> Version {
    Version {
        epoch: Epoch(get.u32()),
        seq: Seq(get.u64()),
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
