//! The store as a replica's: the verbs of [`ReplicaStore`], as replication wants them.

use std::sync::Arc;

use super::super::scrub::DamagedThing;
use super::super::{Batch, Event, Room, Store};
use super::{Rows, Stored};
use crate::replication::{CopyMode, ReplicaEvent, ReplicaStore};
use crate::request::RequestError;
use crate::seal::KeyRow;
use crate::store::layout::EpochEnd;
use crate::types::{Epoch, Lba, Seq, Version};

impl ReplicaStore for Store {
    fn identity(&self) -> ([u8; 16], [u8; 16]) {
        let identity = Store::identity(self);
        (identity.volume, identity.replica)
    }

    fn promised(&self) -> Epoch {
        self.epoch()
    }

    fn last(&self) -> (Version, Version) {
        (self.handed(), Store::last(self))
    }

    fn durable(&self) -> Version {
        Store::durable(self)
    }

    fn copies_durable(&self) -> bool {
        self.copies_are_durable()
    }

    fn ends(&self) -> Vec<EpochEnd> {
        self.epoch_ends()
    }

    fn agreed(&self) -> Version {
        self.kept()
    }

    fn agree(&mut self, upto: Version) {
        let upto = upto.max(self.kept());
        self.gate(Some(upto));
    }

    fn promise(&mut self, epoch: Epoch, row: Option<KeyRow>) {
        let rows: Vec<KeyRow> = row.into_iter().collect();
        Store::promise(self, epoch, &rows);
    }

    fn settle(&mut self, ends: &[EpochEnd]) {
        Store::settle(self, ends);
    }

    fn is_behind(&self, ends: &[EpochEnd]) -> bool {
        let other = |row: &EpochEnd| !self.superblock.agrees_with(row);
        self.beyond(ends).is_some() || ends.iter().any(other)
    }

    fn join(&mut self, base: Seq) {
        Store::join(self, base);
    }

    fn room(&mut self, pages: usize) -> Room {
        Store::room(self, pages, pages == 0)
    }

    fn append(&mut self, batch: Arc<Batch>) {
        // The bytes are shared.
        Store::append(self, Arc::unwrap_or_clone(batch));
    }

    fn sync(&mut self) {
        Store::sync(self);
    }

    fn read_stored(&mut self, token: u64, lba: Lba, blocks: u64) {
        // Whoever asks may believe that this replica has grown.
        if lba.0.checked_add(blocks).is_none_or(|end| end > self.size_blocks()) {
            let error = format!(
                "the replica has {} blocks, and {blocks} from {} on were asked for",
                self.size_blocks(),
                lba.0
            );
            return self
                .events
                .push_back(Event::Stored(token, Err(RequestError::Invalid(error))));
        }
        Store::read_stored(self, token, lba, blocks);
    }

    fn rows(&mut self, token: u64, from: Lba, after: Version, rows_max: usize) {
        Store::rows(self, token, from, after, rows_max);
    }

    fn copy_in(&mut self, token: u64, blocks: Vec<Stored>, mode: CopyMode) {
        match mode {
            CopyMode::Newer | CopyMode::Any => Store::copy_in(self, token, blocks),
            CopyMode::Repair => Store::repair_in(self, token, blocks),
        }
    }

    fn gate_wanted(&self) -> Option<Version> {
        Store::gate_wanted(self)
    }

    fn poll_event(&mut self) -> Option<ReplicaEvent> {
        loop {
            let event = match Store::poll_event(self)? {
                Event::Promised(epoch) => ReplicaEvent::Promised(epoch),
                Event::Settled => ReplicaEvent::Settled,
                Event::Appended(_) => ReplicaEvent::Written(Store::last(self)),
                Event::Durable(version) => ReplicaEvent::Durable(version),
                Event::Stored(token, found) => ReplicaEvent::Read(token, found.map_err(|error| error.to_string())),
                Event::Rows(token, found) => {
                    let found: Result<Rows, String> = found.map_err(|error| error.to_string());
                    ReplicaEvent::Rows(token, found)
                }
                Event::CopiedIn(token, done) => {
                    let done = done.map(|_| ()).map_err(|error| error.to_string());
                    ReplicaEvent::Copied(token, done)
                }
                Event::Damaged(damage) => match damage.thing {
                    DamagedThing::Block { lba, snapshot: None } => ReplicaEvent::Damaged(lba),
                    _ => continue,
                },
                Event::Stopped(why) => ReplicaEvent::Stopped(why),
                // Of guests and their snapshots: nobody asks a replica for them.
                _ => continue,
            };
            return Some(event);
        }
    }
}
