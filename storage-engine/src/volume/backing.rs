//! What a volume stands on: the store of its only replica, or whoever leads several.
//!
//! A volume puts guest requests in order and gives each write its number; what is below makes the writes durable,
//! everywhere where they have to be, and says so with the events of a store. Static dispatch: a volume on a single
//! replica pays nothing for the choice.

use std::fmt::Debug;

use crate::buffer::BufMut;
use crate::io::{Io, IoId, IoResult};
use crate::request::{RequestError, Scan};
use crate::seal::KeyRow;
use crate::store::{
    Batch, ControlOp, Damage, Event, ReadToken, Room, ScrubOrder, ScrubProgress, Seals, SnapshotInfo, Store, StoreStats,
};
use crate::types::{BlockSize, Epoch, Identity, Lba, Seq, SnapshotId, Version};

/// Records that may be on their way to the disk at a time. More hides latency, fewer make larger records: writes that
/// arrive meanwhile gather in the next one. With 32 writes waiting, 1 record of 132 KiB to 8 of 20 KiB at a time gave the
/// same rate on a disk in a data centre, three times that of single blocks.
const RECORDS_INFLIGHT_MAX: usize = 4;

/// See the module. What each verb means is said at the same verb of [`Store`].
pub trait Backing: Debug {
    /// The epoch that is served; writes are numbered from 1 in it.
    fn epoch(&self) -> Epoch;
    /// Whose volume it is.
    fn identity(&self) -> Identity;
    /// Makes the checks of blocks: the same for every replica.
    fn seals(&self) -> Seals;
    /// True if what is stored is ciphertext.
    fn is_sealed(&self) -> bool;
    /// What the epochs' keys of a sealed volume are derived with.
    fn key_rows(&self) -> &[KeyRow];
    /// What a block is.
    fn block_size(&self) -> BlockSize;
    /// Blocks of the volume.
    fn size_blocks(&self) -> u64;
    /// Bytes of the volume.
    fn size_bytes(&self) -> u64 {
        self.size_blocks() * self.block_size().bytes()
    }
    /// Why nothing is written any more, if so.
    fn stopped(&self) -> Option<&str>;

    /// Records that may be on their way at a time.
    fn records_inflight_max(&self) -> usize {
        RECORDS_INFLIGHT_MAX
    }
    /// Whether the next record has a place, everywhere.
    fn room(&mut self, payload_pages: usize, zero_only: bool) -> Room;
    /// Appends writes: [`Event::Appended`] when the death of a process cannot lose them.
    fn append(&mut self, batch: Batch);
    /// Appends something about snapshots, like a write.
    fn append_control(&mut self, seq: Seq, op: ControlOp);
    /// Asks for everything appended so far to be made durable: [`Event::Durable`].
    fn sync(&mut self);
    /// Everything up to here is durable.
    fn durable(&self) -> Version;
    /// Reads blocks: [`Event::Read`] or [`Event::ReadStored`].
    fn read(&mut self, token: ReadToken, lba: Lba, blocks: u64, into: Option<BufMut>);
    /// The same of what they were at a snapshot.
    fn read_snapshot(&mut self, token: ReadToken, at: SnapshotId, lba: Lba, blocks: u64) -> Result<(), RequestError>;
    /// Makes the volume larger: [`Event::Grown`].
    fn grow(&mut self, size_blocks: u64);

    /// The snapshots, oldest first.
    fn snapshots(&self) -> Vec<SnapshotInfo>;
    /// Whether this may be done, and if so, whether now.
    fn allows(&self, op: &ControlOp, discard_newer: bool) -> Result<bool, RequestError>;
    /// The next snapshot waits for a checkpoint.
    fn want_checkpoint(&mut self);
    /// The volume is being reverted: nothing may be written.
    fn is_reverting(&self) -> bool;
    /// Keeps what a snapshot needs where it is: [`Event::Held`].
    fn hold(&mut self, token: u64, id: SnapshotId) -> Result<(), RequestError>;
    /// Ends a hold.
    fn let_go(&mut self) -> Result<(), RequestError>;
    /// Lists blocks: [`Event::Scanned`].
    fn scan(&mut self, token: u64, scan: Scan, from: Lba, extents_max: usize) -> Result<(), RequestError>;

    /// Starts, paces or ends verifying what is stored here: [`Event::Damaged`].
    fn scrub(&mut self, order: ScrubOrder);
    /// How far that is.
    fn scrub_progress(&self) -> ScrubProgress;
    /// What is known to be damaged here.
    fn damage(&self) -> Vec<Damage>;
    /// Space and work here.
    fn stats(&self) -> StoreStats;

    /// The next disk operation.
    fn poll_io(&mut self) -> Option<(IoId, Io)>;
    /// Reports how one ended.
    fn completed(&mut self, id: IoId, result: IoResult);
    /// The next event.
    fn poll_event(&mut self) -> Option<Event>;
    /// True if there is one.
    fn has_events(&self) -> bool;
    /// Tells the time in milliseconds.
    fn tick(&mut self, now_ms: u64);
    /// When the next tick is due.
    fn next_tick_ms(&self) -> Option<u64>;
    /// Starts an orderly end. No more appends will come.
    fn close(&mut self);
    /// True once that was started.
    fn is_closing(&self) -> bool;
    /// True when it is complete, or nothing more can be done.
    fn is_closed(&self) -> bool;
}

impl Backing for Store {
    fn epoch(&self) -> Epoch {
        Store::epoch(self)
    }

    fn identity(&self) -> Identity {
        Store::identity(self)
    }

    fn seals(&self) -> Seals {
        Store::seals(self)
    }

    fn is_sealed(&self) -> bool {
        Store::is_sealed(self)
    }

    fn key_rows(&self) -> &[KeyRow] {
        Store::key_rows(self)
    }

    fn block_size(&self) -> BlockSize {
        Store::block_size(self)
    }

    fn size_blocks(&self) -> u64 {
        Store::size_blocks(self)
    }

    fn stopped(&self) -> Option<&str> {
        Store::stopped(self)
    }

    fn room(&mut self, payload_pages: usize, zero_only: bool) -> Room {
        Store::room(self, payload_pages, zero_only)
    }

    fn append(&mut self, batch: Batch) {
        Store::append(self, batch);
    }

    fn append_control(&mut self, seq: Seq, op: ControlOp) {
        Store::append_control(self, seq, op);
    }

    fn sync(&mut self) {
        Store::sync(self);
    }

    fn durable(&self) -> Version {
        Store::durable(self)
    }

    fn read(&mut self, token: ReadToken, lba: Lba, blocks: u64, into: Option<BufMut>) {
        Store::read(self, token, lba, blocks, into);
    }

    fn read_snapshot(&mut self, token: ReadToken, at: SnapshotId, lba: Lba, blocks: u64) -> Result<(), RequestError> {
        Store::read_snapshot(self, token, at, lba, blocks)
    }

    fn grow(&mut self, size_blocks: u64) {
        Store::grow(self, size_blocks);
    }

    fn snapshots(&self) -> Vec<SnapshotInfo> {
        Store::snapshots(self)
    }

    fn allows(&self, op: &ControlOp, discard_newer: bool) -> Result<bool, RequestError> {
        Store::allows(self, op, discard_newer)
    }

    fn want_checkpoint(&mut self) {
        Store::want_checkpoint(self);
    }

    fn is_reverting(&self) -> bool {
        Store::is_reverting(self)
    }

    fn hold(&mut self, token: u64, id: SnapshotId) -> Result<(), RequestError> {
        Store::hold(self, token, id)
    }

    fn let_go(&mut self) -> Result<(), RequestError> {
        Store::let_go(self)
    }

    fn scan(&mut self, token: u64, scan: Scan, from: Lba, extents_max: usize) -> Result<(), RequestError> {
        Store::scan(self, token, scan, from, extents_max)
    }

    fn scrub(&mut self, order: ScrubOrder) {
        Store::scrub(self, order);
    }

    fn scrub_progress(&self) -> ScrubProgress {
        Store::scrub_progress(self)
    }

    fn damage(&self) -> Vec<Damage> {
        Store::damage(self)
    }

    fn stats(&self) -> StoreStats {
        Store::stats(self)
    }

    fn poll_io(&mut self) -> Option<(IoId, Io)> {
        Store::poll_io(self)
    }

    fn completed(&mut self, id: IoId, result: IoResult) {
        Store::completed(self, id, result);
    }

    fn poll_event(&mut self) -> Option<Event> {
        Store::poll_event(self)
    }

    fn has_events(&self) -> bool {
        Store::has_events(self)
    }

    fn tick(&mut self, now_ms: u64) {
        Store::tick(self, now_ms);
    }

    fn next_tick_ms(&self) -> Option<u64> {
        Store::next_tick_ms(self)
    }

    fn close(&mut self) {
        Store::close(self);
    }

    fn is_closing(&self) -> bool {
        Store::is_closing(self)
    }

    fn is_closed(&self) -> bool {
        Store::is_closed(self)
    }
}
