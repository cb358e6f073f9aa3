//! Records of the log: one or more writes under one header, each block with its own check.
//!
//! A record is a header of whole pages followed by the written blocks, each in as many pages as it is stored in. Records
//! of an epoch form a chain: each names the check of the one before it, and their sequence numbers have no gap, so a
//! stale record left over in a recycled segment is never taken for a new one. A record about a snapshot is a link of the
//! chain like a write. So are two that only replicas of replicated volumes have: blocks that were copied from another
//! replica, which keep the versions that they have there, and the place where a replica joins the stream of an epoch.
//! Three smaller kinds live between them: the end of a segment with the name of the next, the mark of a completed flush,
//! and blocks that the cleaner moved.

mod seals;
#[cfg(test)]
mod tests;

pub use seals::Seals;

use crate::seal::TAG_BYTES;
use crate::types::{BlockSize, Check, Epoch, Lba, PAGE_BYTES, Seq, SnapshotId, Version};

/// Bytes of the header of a record, except where its tags do not fit.
pub const HEADER_BYTES: usize = 4096;
/// Bytes of the longest header: that of many sealed blocks.
pub const HEADER_BYTES_MAX: usize = 8192;
const FIXED_BYTES: usize = 96;
const WRITE_BYTES: usize = 16;
const CHECK_BYTES: usize = 4;
const MOVED_BYTES: usize = 24;
const ZEROS_BYTES: usize = 28;
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
/// Most blocks and most zeroed ranges in a record of copies.
pub const COPIED_MAX: usize = 128;
pub const COPIED_ZEROS_MAX: usize = 24;
const CHECK_ROW: usize = CHECK_BYTES + LENGTH_BYTES;
const MOVED_ROW: usize = MOVED_BYTES + LENGTH_BYTES;
const _: () = assert!(FIXED_BYTES + WRITES_MAX * WRITE_BYTES + PAGES_MAX * CHECK_ROW <= HEADER_BYTES);
const _: () = assert!(FIXED_BYTES + MOVED_MAX * MOVED_ROW <= HEADER_BYTES);
const COPIED_ROWS: usize = COPIED_ZEROS_MAX * ZEROS_BYTES + COPIED_MAX * MOVED_ROW;
const _: () = assert!(FIXED_BYTES + COPIED_ROWS <= HEADER_BYTES);
const _: () = assert!(FIXED_BYTES + COPIED_ROWS + COPIED_MAX * TAG_BYTES <= HEADER_BYTES_MAX);
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

/// Blocks that were zeroed at a version, on the replica that they were copied from.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct CopiedZeros {
    pub start: Lba,
    /// The block behind the last one.
    pub end: Lba,
    pub version: Version,
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
    /// Blocks and zeroed ranges copied from another replica, with the versions they have there. Each is newer than what this
    /// replica had when the record took its place in the chain. It has no number.
    Copied {
        blocks: Vec<MovedBlock>,
        zeros: Vec<CopiedZeros>,
    },
    /// The writes of the epoch go on behind `base`: this replica had no part in those before.
    Join { base: Seq },
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
            Body::Copied { .. } => 6,
            Body::Join { .. } => 7,
        }
    }

    /// Number of payload blocks that follow the header.
    pub fn payload_blocks(&self) -> usize {
        match self {
            Body::Data { checks, .. } => checks.len(),
            Body::Moved { blocks } | Body::Copied { blocks, .. } => blocks.len(),
            Body::Next { .. } | Body::FlushMark | Body::Control { .. } | Body::Join { .. } => 0,
        }
    }

    /// Pages of them together.
    pub fn payload_pages(&self) -> usize {
        match self {
            Body::Data { checks, pages, .. } if pages.is_empty() => checks.len(),
            Body::Data { pages, .. } => pages.iter().map(|pages| usize::from(*pages)).sum(),
            Body::Moved { blocks } | Body::Copied { blocks, .. } => {
                blocks.iter().map(|block| usize::from(block.pages)).sum()
            }
            Body::Next { .. } | Body::FlushMark | Body::Control { .. } | Body::Join { .. } => 0,
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
            Body::Next { .. } | Body::FlushMark | Body::Moved { .. } | Body::Copied { .. } | Body::Join { .. } => None,
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
                Body::Moved { blocks } | Body::Copied { blocks, .. } => blocks.clone(),
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
