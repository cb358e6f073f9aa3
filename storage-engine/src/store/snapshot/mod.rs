//! Snapshots: what the volume was like at a write, kept as a table of what was overwritten since.
//!
//! Every stored block has exactly one referrer. The map (the head) says what the volume is now; a snapshot has a table
//! of the entries that were replaced after it was taken and before the next one was. So
//!
//! ```text
//! head ◄── newest snapshot ◄── … ◄── older snapshot
//! what block b was at a snapshot: the first row for b in its own table, the next newer one's, …, else the head's
//! ```
//!
//! Taking one is a record in the log and nothing else: the table begins empty, whatever the size of the volume. The head
//! knows nothing of snapshots, so they cost a read nothing. A block that a checkpoint finds replaced goes to the newest
//! snapshot that is older than its replacement, if it existed then, and is dead otherwise.
//!
//! What always holds, for entries in versions:
//! - A row in a table is not newer than its snapshot, and newer than every older snapshot that has a row for the block.
//! - A snapshot has no row for a block exactly when the next newer one (in the end the head) has the same answer.
//! - Every replacement is recorded, also of zeros by zeros ([`Entry::hole`]), so whether a snapshot keeps something
//!   follows from two versions, without looking at its table.

mod catalog;
mod clone;
mod find;
mod scan;

pub use catalog::{Catalog, Origin, ROW_BYTES, ROWS_PER_PAGE, SNAPSHOTS_MAX, Snapshot};
pub use clone::{ClonePlan, Origins, plan_clone, write_clone, write_sealed_clone};
pub use find::Holder;
pub use scan::{Extents, Scans};

use super::memtable::Memtable;
use super::page::Entry;
use super::record::ControlOp;
use super::{Event, Store};
use crate::request::RequestError;
use crate::types::{Lba, PAGE_BYTES, SnapshotId, Version};

use super::log::Op;

/// Tables of writes between snapshots that wait for a checkpoint; more make one due.
pub const SEALED_DUE: usize = 4;
/// So many of them, and the next snapshot waits for the checkpoint: each is one more to look into for every read.
pub const SEALED_MAX: usize = 8;

/// What the guest did since the last checkpoint began, in the order of the log.
#[derive(Debug, Default)]
pub struct Recent {
    /// Writes since the newest snapshot.
    pub active: Memtable,
    /// Writes before it, cut at each snapshot, oldest first. None is empty.
    pub sealed: Vec<Memtable>,
    /// The snapshots there are.
    pub catalog: Catalog,
    /// The volume is to become what it was at this snapshot; nothing is written until it is.
    pub revert: Option<SnapshotId>,
}

impl Recent {
    pub fn new(catalog: Catalog) -> Recent {
        Recent {
            catalog,
            ..Recent::default()
        }
    }

    /// Takes one change, in the order of the log.
    pub fn apply(&mut self, op: &Op) {
        debug_assert!(self.revert.is_none(), "nothing is written while the volume is reverted");
        match *op {
            Op::Block(lba, entry) => self.active.insert(lba, entry),
            Op::Zero(start, end, version) => self.active.zero(start, end, version),
            Op::Control(op, version) => self.control(op, version),
        }
    }

    fn control(&mut self, op: ControlOp, version: Version) {
        match op {
            ControlOp::Snapshot {
                id,
                time_ms,
                size_blocks,
            } => {
                self.catalog.add(Snapshot::new(id, version, size_blocks, time_ms));
                if !self.active.is_empty() {
                    self.sealed.push(std::mem::take(&mut self.active));
                }
            }
            ControlOp::Delete { id } => self.catalog.let_go(id),
            ControlOp::Revert { id } => self.revert = Some(id),
        }
    }

    /// Nothing for a checkpoint to do.
    pub fn is_empty(&self) -> bool {
        self.active.is_empty() && self.sealed.is_empty() && self.revert.is_none()
    }

    pub fn rows(&self) -> usize {
        self.active.len() + self.sealed.iter().map(Memtable::len).sum::<usize>()
    }

    /// Leaves of the map that these are in, at most.
    pub fn leaves(&self) -> usize {
        self.tables().map(Memtable::leaves).sum()
    }

    /// Blocks in zeroed ranges.
    pub fn zeroed_blocks(&self) -> u64 {
        self.tables().map(Memtable::zeroed_blocks).sum()
    }

    /// What is known of `lba`.
    pub fn get(&self, lba: Lba) -> Option<Entry> {
        let entry = self.active.get(lba);
        if self.sealed.is_empty() {
            return entry;
        }
        entry.or_else(|| self.sealed.iter().rev().find_map(|table| table.get(lba)))
    }

    /// The tables, oldest first.
    pub fn tables(&self) -> impl DoubleEndedIterator<Item = &Memtable> {
        self.sealed.iter().chain(std::iter::once(&self.active))
    }
}

/// A snapshot as its user sees it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct SnapshotInfo {
    /// Its name.
    pub id: SnapshotId,
    /// It holds every write up to this one.
    pub version: Version,
    /// Size of the volume then.
    pub size_bytes: u64,
    /// When it was taken, as its taker said.
    pub time_ms: u64,
    /// Bytes of blocks that only this snapshot and older ones need, as of the last checkpoint.
    pub exclusive_bytes: u64,
}

impl Store {
    /// The snapshots, oldest first.
    pub fn snapshots(&self) -> Vec<SnapshotInfo> {
        let held = self.recent.catalog.held();
        held.map(|snapshot| SnapshotInfo {
            id: snapshot.id,
            version: snapshot.version,
            size_bytes: snapshot.size_blocks * self.block_size().bytes(),
            time_ms: snapshot.time_ms,
            exclusive_bytes: snapshot.pages * PAGE_BYTES,
        })
        .collect()
    }

    /// Whether this may be done now, and if so, whether it has to wait.
    pub(crate) fn allows(&self, op: &ControlOp, discard_newer: bool) -> Result<bool, RequestError> {
        let catalog = &self.recent.catalog;
        match op {
            ControlOp::Snapshot { id, .. } => {
                if id.0 == [0; 16] {
                    return Err(RequestError::Invalid(
                        "a snapshot needs a name, not sixteen zero bytes".into(),
                    ));
                }
                if let Some(other) = catalog.find(*id) {
                    let what = if other.deleting {
                        "is still being deleted"
                    } else {
                        "exists"
                    };
                    return Err(RequestError::Invalid(format!(
                        "a snapshot {id} {what}; expected a name that is not in use"
                    )));
                }
                if catalog.len() >= SNAPSHOTS_MAX {
                    return Err(RequestError::Invalid(format!(
                        "the volume has {SNAPSHOTS_MAX} snapshots, the most there can be: delete one first"
                    )));
                }
                Ok(self.recent.sealed.len() < SEALED_MAX)
            }
            ControlOp::Delete { id } => self.known(*id).map(|_| true),
            ControlOp::Revert { id } => {
                let to = self.known(*id)?.version;
                let newer: Vec<String> = catalog
                    .held()
                    .filter(|snapshot| snapshot.version > to)
                    .map(|snapshot| snapshot.id.to_string())
                    .collect();
                if !newer.is_empty() && !discard_newer {
                    return Err(RequestError::Invalid(format!(
                        "reverting to snapshot {id} deletes the newer ones {}; expected consent to that",
                        newer.join(", ")
                    )));
                }
                Ok(true)
            }
        }
    }

    /// The snapshot of this name.
    pub(super) fn known(&self, id: SnapshotId) -> Result<&Snapshot, RequestError> {
        let found = self.recent.catalog.find(id).filter(|snapshot| !snapshot.deleting);
        found.ok_or_else(|| {
            let names: Vec<String> = self.recent.catalog.held().map(|held| held.id.to_string()).collect();
            let there = match names.len() {
                0 => "it has none".to_owned(),
                1..=8 => format!("expected one of {}", names.join(", ")),
                count => format!("expected one of its {count}"),
            };
            RequestError::Invalid(format!("this volume has no snapshot {id}; {there}"))
        })
    }

    /// Keeps every stored block where it is, so that a snapshot can be cloned; reported by [`Event::Held`] with `token` once
    /// a checkpoint holds the snapshot. Segments that nobody needs any more are not used again meanwhile.
    pub fn hold(&mut self, token: u64, id: SnapshotId) -> Result<(), RequestError> {
        let version = self.known(id)?.version;
        self.segments.hold();
        self.holds.push((token, version));
        self.report_holds();
        Ok(())
    }

    /// Ends a hold. Files may have got second names meanwhile.
    pub fn let_go(&mut self) -> Result<(), RequestError> {
        if !self.segments.let_go() {
            return Err(RequestError::Invalid("nothing is held; expected a hold before".into()));
        }
        self.background_due = true;
        Ok(())
    }

    /// Reports holds whose snapshots are in a checkpoint, and asks for one for the others.
    pub(super) fn report_holds(&mut self) {
        let merged = self.superblock.checkpoint.replay.last;
        let (ready, waiting): (Vec<_>, Vec<_>) = self.holds.drain(..).partition(|(_, version)| *version <= merged);
        self.holds = waiting;
        self.events
            .extend(ready.into_iter().map(|(token, _)| Event::Held(token, Ok(()))));
        if !self.holds.is_empty() {
            self.want_checkpoint();
        }
    }

    /// The volume is being reverted: nothing may be written.
    pub fn is_reverting(&self) -> bool {
        self.recent.revert.is_some()
    }

    /// More tables wait than a read should have to look into: the next snapshot waits for a checkpoint.
    pub(crate) fn want_checkpoint(&mut self) {
        self.checkpoint_wanted = true;
        self.background_due = true;
    }
}
