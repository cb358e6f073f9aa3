//! Several copies of one volume, kept the same by one primary at a time.
//!
//! ```text
//!              ┌────────────► replica ─► store     each a machine of its own, on its own node
//! volume ─► primary ────────► replica ─► store     the local one is no exception
//!              │    └───────► replica ─► store
//!              ▼
//!        configuration (epoch, primary, in-sync set): changed by compare-and-swap only
//! ```
//!
//! A write is completed when every replica that may count as in sync has it in its log. A replica that misses one is
//! first recorded as out, and only then does the write complete without it. A replica refuses everything from an epoch
//! lower than the one it promised, and it promises on stable storage. So whoever takes over, starting with all that is
//! recorded as in sync, has every completed write, and whoever was taken over from completes none any more.
//!
//! What a crash may leave undecided is decided once, when an epoch begins ([`primary`]): the members are made equal, and
//! the end of the epochs before is settled on all of them before anything is read. Until then nothing in a replica is
//! irrevocable: its checkpoints wait until what they hold is durable on all that are in sync.
//!
//! Everything is a state machine without clock, network or chance, like the rest of the engine; `docs/replication.md`
//! tells the protocol from its reasons, and names the invariants I1 to I23 that are asserted here.

pub mod concern;
pub mod config;
pub mod message;
pub mod mutant;
pub mod primary;
pub mod replica;
mod replica_store;
pub mod verify;
pub mod wire;

use std::fmt::{self, Display};

pub use concern::{Concern, Copies, Zones};
pub use config::{Change, Config, ConfigError};
pub use message::{Ask, FromReplica, Reply, ToReplica};
pub use mutant::{Mutant, Mutants};
pub use primary::Primary;
pub use replica::Replica;
pub use replica_store::{CopyMode, ReplicaEvent, ReplicaStore};

use crate::types::Hex;

/// Names a replica: the uid of its object.
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct ReplicaId(pub [u8; 16]);

/// Names one start of a primary; drawn at random for each.
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Incarnation(pub [u8; 16]);

/// Names the state of the object that a configuration was read from: a change counts only if nothing changed since.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Stamp(pub u64);

impl Display for ReplicaId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        Hex(&self.0).fmt(f)
    }
}

impl fmt::Debug for ReplicaId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "replica {self}")
    }
}

impl fmt::Debug for Incarnation {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        Hex(&self.0).fmt(f)
    }
}

/// How long things may take, in milliseconds of the clock of whoever waits. Both ends of a lease have their own: the
/// replica's is longer by more than clocks may differ in rate (10 %), and starts later.
pub mod timing {
    /// A member that owes an answer for so long is left behind.
    pub const MEMBER_TIMEOUT_MS: u64 = 2_000;
    /// The primary reads so long after it sent the beat that a member answered.
    pub const LEASE_MS: u64 = 4_000;
    /// The member promises nobody else anything for so long after it received the beat.
    pub const LEASE_GRANTED_MS: u64 = 5_000;
    /// A beat every so often while there are requests.
    pub const BEAT_MS: u64 = 500;
    /// What was not answered is asked again.
    pub const ASK_AGAIN_MS: u64 = 500;
    /// Members are waited for so long when an epoch begins: they may have to wait for a lease to run out.
    pub const TAKEOVER_MS: u64 = LEASE_GRANTED_MS + 2 * MEMBER_TIMEOUT_MS;
    /// Whoever had no request for so long does not mind what else the replicas do.
    pub const GUEST_ACTIVE_MS: u64 = 100;
    /// While the guest has requests, a copy is followed by a rest that takes as long as it did, but not longer than this.
    pub const COPY_REST_MS_MAX: u64 = 100;
    /// What nobody flushed is flushed by the primary so long after the last write.
    pub const FLUSH_IDLE_MS: u64 = 1_000;

    const _: () = assert!(LEASE_MS * 11 / 10 < LEASE_GRANTED_MS * 9 / 10);
    const _: () = assert!(BEAT_MS * 3 < LEASE_MS && ASK_AGAIN_MS * 2 < MEMBER_TIMEOUT_MS);
}

/// Bounds of what is held in memory.
pub mod limits {
    /// Writes that are not durable everywhere are kept so that a member which comes back can have them again. With more than
    /// so many bytes the primary has them flushed: memory that comes back soon is used again while it is warm.
    pub const REPLAY_FLUSH_BYTES: u64 = 16 << 20;
    /// With so many no more are taken: the guest waits for the flush.
    pub const REPLAY_BYTES_MAX: u64 = 64 << 20;
    /// The same in records.
    pub const REPLAY_RECORDS_MAX: usize = 1_000;
    /// Rows compared at a time when a replica is brought up to date.
    pub const ROWS_MAX: usize = 1_024;
    /// Blocks copied in one message: 2 MiB of the largest.
    pub const COPY_BLOCKS_MAX: usize = 32;
    /// Damaged blocks that a replica remembers; more are found again by the next scrub.
    pub const DAMAGED_MAX: usize = 1_024;
    /// Damaged blocks that are named, and mended, at a time.
    pub const MENDED_AT_ONCE: usize = 16;
    /// Records that a replica holds which its store has no room for yet.
    pub const REPLICA_QUEUE_MAX: usize = 64;
}
