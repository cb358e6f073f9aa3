//! What a replica needs of a store: the verbs of [`Store`](crate::store::Store), and nothing about how it does them, so
//! that the simulator can also run a simpler one many times faster.

use std::sync::Arc;

use super::message::{Batch, Rows, Stored};
use crate::seal::KeyRow;
use crate::store::Room;
use crate::store::layout::EpochEnd;
use crate::types::{Epoch, Lba, Seq, Version};

/// Which blocks a copy takes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum CopyMode {
    /// Those that are newer than what is there.
    Newer,
    /// Those that are as new as what is there, too: the same bytes, where they were damaged.
    Repair,
    /// All of them: a mistake for the simulator to find.
    Any,
}

/// One copy of a volume.
pub trait ReplicaStore {
    /// Whose it is: the uid of the volume and of the replica.
    fn identity(&self) -> ([u8; 16], [u8; 16]);
    /// The highest epoch promised, on stable storage.
    fn promised(&self) -> Epoch;
    /// The last write that was handed to the log, and the last one that is in it.
    fn last(&self) -> (Version, Version);
    /// Everything up to here is on stable storage.
    fn durable(&self) -> Version;
    /// Everything that was copied in is on stable storage.
    fn copies_durable(&self) -> bool;
    /// Where epochs ended.
    fn ends(&self) -> Vec<EpochEnd>;
    /// Everything up to here is known to be on stable storage of all replicas that are in sync.
    fn agreed(&self) -> Version;
    /// Says how far that is. No checkpoint is committed that holds more.
    fn agree(&mut self, upto: Version);
    /// Raises the promised epoch; ends as [`ReplicaEvent::Promised`]. Appending in a lower one is over.
    fn promise(&mut self, epoch: Epoch, row: Option<KeyRow>);
    /// Writes down where epochs ended, and everything before; ends as [`ReplicaEvent::Settled`].
    fn settle(&mut self, ends: &[EpochEnd]);
    /// True if something is here that is behind one of these ends.
    fn is_behind(&self, ends: &[EpochEnd]) -> bool;
    /// The next record of the promised epoch is the one behind `base`; needs room without payload. In the log when [`ReplicaEvent::Written`] says so.
    fn join(&mut self, base: Seq);
    /// Whether the next record has a place, with so many pages of payload.
    fn room(&mut self, pages: usize) -> Room;
    /// Appends a record; ends as [`ReplicaEvent::Written`].
    fn append(&mut self, batch: Arc<Batch>);
    /// Everything in the log, on stable storage; ends as [`ReplicaEvent::Durable`].
    fn sync(&mut self);
    /// The stored form of blocks; ends as [`ReplicaEvent::Read`].
    fn read_stored(&mut self, token: u64, lba: Lba, blocks: u64);
    /// What is here with a version behind `after`; ends as [`ReplicaEvent::Rows`].
    fn rows(&mut self, token: u64, from: Lba, after: Version, rows_max: usize);
    /// Takes what is newer than what is here, in the order of the log; ends as [`ReplicaEvent::Copied`].
    fn copy_in(&mut self, token: u64, blocks: Vec<Stored>, mode: CopyMode);
    /// What [`ReplicaStore::agree`] has to reach so that a checkpoint can go on which waits for it.
    fn gate_wanted(&self) -> Option<Version> {
        None
    }
    /// What happened.
    fn poll_event(&mut self) -> Option<ReplicaEvent>;
}

/// What a store reports to its replica.
#[derive(Debug)]
pub enum ReplicaEvent {
    /// The epoch is promised on stable storage.
    Promised(Epoch),
    /// The ends are on stable storage.
    Settled,
    /// Every record up to this write is in the log.
    Written(Version),
    /// Every write up to this one is on stable storage.
    Durable(Version),
    /// A read ended.
    Read(u64, Result<Vec<Stored>, String>),
    /// A list ended.
    Rows(u64, Result<Rows, String>),
    /// A copy is in the log, or was refused.
    Copied(u64, Result<(), String>),
    /// This block does not pass its check. Told again when it is found again.
    Damaged(Lba),
    /// The store takes no more writes; why.
    Stopped(String),
}
