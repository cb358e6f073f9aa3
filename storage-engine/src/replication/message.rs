//! What a primary and its replicas tell each other.
//!
//! Messages may be lost, come twice, late, or in another order; each says whom it is for and in which epoch it was
//! meant, and everything in it may be repeated. The bytes on the wire are `wire`'s.

use std::sync::Arc;

use super::{Incarnation, ReplicaId};
use crate::seal::KeyRow;
use crate::store::layout::EpochEnd;
use crate::types::{Epoch, Lba, Seq, Version};

pub use crate::store::{Batch, Row, Rows, Stored, StoredBlock};

/// From a primary to one replica.
#[derive(Clone, Debug)]
pub struct ToReplica {
    /// Whose replica it must be (I14, and a port that was used again by somebody else).
    pub volume: [u8; 16],
    pub replica: ReplicaId,
    /// The epoch it is said in.
    pub epoch: Epoch,
    pub incarnation: Incarnation,
    /// Which attempt it is to begin the epoch: members may be lost before it has begun, and then all is decided anew.
    pub round: u64,
    /// The start of the replica that it is meant for; a promise is asked of any.
    pub boot: u64,
    pub ask: Ask,
}

/// What a primary wants.
#[derive(Clone, Debug)]
pub enum Ask {
    /// Take part in this epoch and refuse every lower one, on stable storage, from now on. Answered when no lease to an
    /// older epoch runs any more.
    Promise {
        /// Of a sealed volume: the salt of the epoch.
        row: Option<KeyRow>,
    },
    /// The epochs before ended here: what is behind is cut off. It says nothing of what is before.
    Trim { ends: Vec<EpochEnd> },
    /// Write down that the epochs before ended here. If it is `whole`, everything before is here, too, and from now on it
    /// says so.
    Settle { ends: Vec<EpochEnd>, whole: bool },
    /// The stream of this epoch is taken up behind this write.
    Join { base: Seq },
    /// The next record.
    Write(Arc<Batch>),
    /// Everything up to this write, on stable storage.
    Flush { upto: Version, id: u64 },
    /// Are you there? Grants a lease. Everything up to `durable` is on stable storage of all that are in sync.
    Beat { sent_ms: u64, durable: Version },
    /// The stored form of blocks, verified.
    Read { id: u64, lba: Lba, blocks: u64 },
    /// What is there with a version behind `after`, from block `from` on.
    Rows {
        id: u64,
        from: Lba,
        after: Version,
        rows_max: usize,
    },
    /// Take what is newer than what is there; to repair: what is as old.
    Copy { id: u64, repair: bool, blocks: Vec<Stored> },
    /// The epoch ends in order: the lease is given back.
    Release,
}

/// From a replica to the primary that asked.
#[derive(Clone, Debug)]
pub struct FromReplica {
    pub volume: [u8; 16],
    pub replica: ReplicaId,
    /// The epoch and the incarnation that it was asked in.
    pub epoch: Epoch,
    pub incarnation: Incarnation,
    pub round: u64,
    /// This start of the replica: what was only in its memory is gone with it.
    pub boot: u64,
    pub reply: Reply,
}

/// What a replica answers.
#[derive(Clone, Debug)]
pub enum Reply {
    /// It has heard, and will promise: when it is on stable storage, and when its leases have run out.
    Promising,
    /// It promised.
    Promised {
        /// Every write up to here is in its log, if it is in sync. A write 0 of an epoch is its beginning.
        last: Version,
        /// Where the epochs before ended, as far as it was told.
        ends: Vec<EpochEnd>,
        /// Everything up to here is on stable storage of all that were in sync.
        agreed: Version,
    },
    /// It does not take orders of this epoch.
    Refused { promised: Epoch, why: Refusal },
    /// Nothing is behind the ends.
    Trimmed,
    /// The ends are on stable storage, and so is everything before them.
    Settled,
    /// Every record up to this write is in the log.
    Written { upto: Seq },
    /// A record came that is not the next one.
    Gap { last: Seq },
    /// Everything up to this write is on stable storage.
    Flushed {
        upto: Version,
        /// The last order to flush that it had by then: copies that were there before that order are, too.
        id: u64,
    },
    /// It is there.
    Beaten { sent_ms: u64 },
    /// What was read.
    Blocks {
        id: u64,
        found: Result<Vec<Stored>, String>,
    },
    /// What was listed.
    Rows { id: u64, found: Result<Rows, String> },
    /// What was copied is in the log.
    Copied { id: u64, done: Result<(), String> },
    /// These blocks do not pass their check here. Said with every beat until they are mended.
    Damaged { blocks: Vec<Lba> },
    /// A checkpoint waits until everything up to here is on stable storage everywhere; without it the log only grows.
    Wants { durable: Version },
    /// Its store takes no more writes.
    Failed { why: String },
}

/// Why an order was refused.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Refusal {
    /// A higher epoch was promised.
    Fenced,
    /// Another incarnation of the same epoch was promised.
    OtherIncarnation,
    /// This start of the replica was not promised yet in this epoch: promise and settle first.
    NoSession,
    /// The order is for another volume or replica.
    Stranger,
    /// What it has cannot be brought in line: it has to be made anew.
    Diverged,
}
