//! What a guest asks of its volume, and what it is answered.

use std::ops::Range;

use crate::buffer::Buf;
use crate::types::SnapshotId;

/// Names one guest request until it is answered. The driver chooses it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct RequestId(pub u64);

/// A guest request. Offsets and lengths are bytes, and whole sectors of 512. What is not whole blocks of the volume costs
/// more: a block is changed in part by writing it anew.
#[derive(Debug)]
pub enum Request {
    /// Read `len` bytes at `offset`.
    Read { offset: u64, len: u64 },
    /// Write `data` at `offset`; with `fua`, answer only when it is on stable storage.
    Write { offset: u64, data: Buf, fua: bool },
    /// Make every write that was answered before this request survive a power cut.
    Flush,
    /// Let `len` bytes at `offset` read as zeros from now on and give their space back (discard, write-zeroes).
    Zero { offset: u64, len: u64, fua: bool },
    /// Make the volume `len` bytes large, durably. It never shrinks; new blocks read as zeros.
    Grow { len: u64 },
}

/// An order about the snapshots of a volume. It is answered like a request.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Control {
    /// Keep the volume as it is: it holds every write that was answered before, and none that is submitted after the
    /// answer. Answered when a power cut cannot undo it.
    Snapshot {
        id: SnapshotId,
        /// When it is taken, in milliseconds since 1970.
        time_ms: u64,
    },
    /// Let go of a snapshot; the space that only it needed comes back in time.
    Delete { id: SnapshotId },
    /// Make the volume what it was at a snapshot. Writes wait meanwhile. Newer snapshots are deleted with it, which the
    /// caller has to say.
    Revert { id: SnapshotId, discard_newer: bool },
    /// Read `len` bytes at `offset` as they were at a snapshot.
    Read { id: SnapshotId, offset: u64, len: u64 },
    /// Keep every stored block where it is, so that this snapshot can be cloned (`store::plan_clone`). Answered when it can
    /// be.
    Hold { id: SnapshotId },
    /// End a hold: the clone is complete, or given up.
    LetGo,
    /// List blocks, from `offset` on and at most so many ranges. The answer is `Done`, and the list is taken with
    /// `Volume::take_ranges`.
    List { scan: Scan, offset: u64, ranges_max: usize },
}

/// Which blocks are listed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Scan {
    /// Those that were written or zeroed after snapshot `from` and before `to` (or now). A block may be among them that
    /// has the same bytes at both; one that is not has.
    Changed { from: SnapshotId, to: Option<SnapshotId> },
    /// Those that are stored at a snapshot (or now); all others read as zeros.
    Stored { at: Option<SnapshotId> },
}

/// What [`Control::List`] found: ranges of bytes in ascending order that do not touch.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Ranges {
    pub ranges: Vec<Range<u64>>,
    /// The offset to go on from; none at the end.
    pub next: Option<u64>,
}

/// A run of bytes in the answer to a read.
#[derive(Debug, Clone)]
pub enum Piece {
    /// These bytes.
    Bytes(Buf),
    /// So many zero bytes, which are stored nowhere.
    Zeros(usize),
}

/// The answer to a request.
pub type Answer = Result<Reply, RequestError>;

/// A successful answer.
#[derive(Debug, Clone)]
pub enum Reply {
    /// The bytes of a read, in order; their lengths add up to the length asked for.
    Data(Vec<Piece>),
    /// Any other request.
    Done,
}

/// Why a request failed: what the guest is told, and what a person reads in the log.
#[derive(Debug, Clone, thiserror::Error)]
pub enum RequestError {
    /// Not whole sectors, or outside the volume (`EINVAL`).
    #[error("request outside the volume or not aligned to its sectors: {0}")]
    Invalid(String),
    /// The pool is full (`ENOSPC`). Nothing was changed, except by a write that reaches over parts of several blocks.
    #[error("the pool has no space left")]
    NoSpace,
    /// What is stored does not pass its check; wrong bytes are never returned (`EIO`).
    #[error("stored data is damaged: {0}")]
    Corrupt(String),
    /// The disk failed, or the store stopped itself after a failed write or sync (`EIO`).
    #[error("the disk failed: {0}")]
    Failed(String),
    /// A newer epoch has taken over, or the volume is being closed (`EIO`).
    #[error("this engine no longer serves the volume")]
    Fenced,
}
