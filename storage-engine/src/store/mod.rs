//! The store of one replica: a log that is the storage.
//!
//! ```text
//! append ─► log (segments) ─► memtable ──checkpoint──► map pages (segments) ─► superblock
//!                 │                                          ▲
//!                 └── sync: group commit                     └── cleaner moves what is still needed
//! ```
//!
//! What always holds:
//! - A record is reported as appended only after it and all records before it are in the kernel's hands, so the death
//!   of this process loses nothing that was reported.
//! - A segment is used again only after a checkpoint that does not need it stands in both superblocks.
//! - Bytes leave the store only after they passed the check that is bound to their address and version.
//! - After a failed write or sync the store stops writing: nobody knows what is on the disk.
//!
//! The store knows nothing of guests and flush requests; `volume` does.

pub mod check;
mod checkpoint;
mod cleaner;
pub(crate) mod format;
mod keys;
mod log;
mod map;
mod memtable;
mod pace;
mod page;
mod read;
mod record;
mod recovery;
mod replica;
mod scrub;
mod segment;
mod share;
mod snapshot;
mod superblock;
mod supply;
mod turn;

use std::collections::{BTreeSet, VecDeque};

use slab::Slab;

pub use log::Batch;
pub use read::{ReadBlock, ReadPart, ReadToken};
pub use record::{Body, ControlOp, Header, PAGES_MAX, Seals, WRITES_MAX, WriteEntry};
pub use recovery::{
    FormatOptions, OpenError, OpenOptions, OpenReport, Settle, format_joining_replica, format_replica,
    format_sealed_replica, inspect, open_replica,
};
pub use replica::{Copies, Row, Rows, Stored, StoredBlock};
pub use scrub::{Damage, DamagedThing, ScrubOrder, ScrubProgress};
pub use share::promised_bytes;
pub use snapshot::{ClonePlan, Extents, SNAPSHOTS_MAX, SnapshotInfo, plan_clone, write_clone, write_sealed_clone};
pub use superblock::{EpochEnd, Superblock};

/// The structures on the disk and what they are made of, for tests and tools; `docs/disk-format.md` draws them.
pub mod layout {
    pub use super::keys::{KEY_ROW_BYTES, decode_row, encode_row};
    pub use super::page::{Entry, FANOUT, Page, PageKind, PageName, TreeId};
    pub use super::record::{CopiedZeros, MovedBlock};
    pub use super::segment::{SegmentHeader, SegmentKind, Used, from_row, row};
    pub use super::snapshot::{Catalog, Origin, Snapshot};
    pub use super::superblock::{Checkpoint, EpochEnd, Geometry, LogPosition, StreamPosition};
}

use crate::buffer::Buf;
use crate::io::{Disk, Io, IoDone, IoFailure, IoId, IoResult, SegmentId, perform};
use crate::request::{Piece, RequestError};
use crate::seal::KeyRow;
use crate::types::{BlockSize, Epoch, Identity, Lba, Location, PAGE_BYTES, Seq, Version};
use checkpoint::{Frozen, Job};
use cleaner::Cleaner;
use log::Log;
use map::Map;
use pace::Pace;
use read::{ReadKey, Reads};
use replica::{Amendments, Copying, RowScans};
use scrub::Scrub;
use segment::Segments;
use snapshot::{Origins, Recent, Scans};
use supply::{RESERVE_SEGMENTS, Supply};
use turn::{Turn, Work};

/// Whether the next record has a place.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Room {
    /// Append it now.
    Ready,
    /// A segment is on its way; ask again after the next completion.
    Wait,
    /// The pool is full and nothing that could be given back is in sight.
    NoSpace,
}

/// What the store reports.
#[derive(Debug)]
pub enum Event {
    /// Every record up to this write is in the log.
    Appended(Seq),
    /// Every write up to this one is on stable storage.
    Durable(Version),
    /// A read that was asked for with this token.
    Read(ReadToken, Result<Vec<Piece>, RequestError>),
    /// Blocks stay where they are until they are let go of, for who asked with this token; or they cannot.
    Held(u64, Result<(), RequestError>),
    /// What a scan found that was asked for with this token.
    Scanned(u64, Result<Extents, RequestError>),
    /// The same, where what is stored is still to be opened or decompressed.
    ReadStored(ReadToken, Vec<ReadPart>),
    /// The volume has this many blocks now, also after a power cut.
    Grown(u64),
    /// The volume is what it was at the snapshot it was reverted to, also after a power cut.
    Reverted,
    /// This epoch is promised, also after a power cut: the next record is one of it.
    Promised(Epoch),
    /// The oldest ends that were to be settled are, also after a power cut.
    Settled,
    /// What became of the copies that were taken with this token. They are in the log, and durable with the next sync.
    CopiedIn(u64, Result<Copies, RequestError>),
    /// What changed here since a version, for who asked with this token.
    Rows(u64, Result<Rows, RequestError>),
    /// What is stored, for who asked with this token.
    Stored(u64, Result<Vec<Stored>, RequestError>),
    /// The scrub found something that does not pass its check, and that is needed. Whoever has another copy may write it.
    Damaged(Damage),
    /// The store writes no more; why.
    Stopped(String),
}

/// What became of the space.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct StoreStats {
    /// Bytes of all segment files.
    pub allocated_bytes: u64,
    /// Bytes of blocks that the last checkpoint needs.
    pub live_bytes: u64,
    /// Bytes of guest data written, before they were compressed.
    pub written_bytes: u64,
    /// Bytes that they are stored in.
    pub stored_bytes: u64,
    /// Of these, bytes that were copied from another replica.
    pub copied_bytes: u64,
    /// Bytes that the cleaner moved.
    pub moved_bytes: u64,
    /// Bytes of map pages written.
    pub map_bytes: u64,
    /// Bytes of headers written: of records, of segments, of the replica.
    pub header_bytes: u64,
    /// Bytes of zeros written into fresh segments.
    pub filled_bytes: u64,
    /// Checkpoints committed since the start.
    pub checkpoints: u64,
    /// Map pages in memory.
    pub cached_pages: u64,
    /// Blocks that failed their check since the start.
    pub damaged_blocks: u64,
    /// Places on the disk that failed their check, or could not be read, since the start: each once, however often it was
    /// read.
    pub damaged_places: u64,
}

impl StoreStats {
    /// All bytes written to the disk for each byte of guest data. None before the first.
    pub fn write_amplification(&self) -> Option<f64> {
        let written = self.stored_bytes + self.moved_bytes + self.map_bytes + self.header_bytes + self.filled_bytes;
        (self.written_bytes > 0).then(|| written as f64 / self.written_bytes as f64)
    }
}

/// Damaged places that are counted; with so many nobody asks for the exact number.
const DAMAGED_PLACES_MAX: usize = 1024;

/// What an operation that is out was for.
#[derive(Debug)]
enum Purpose {
    LogWrite {
        number: u64,
        segment: SegmentId,
    },
    LogSync,
    CreateSegment(SegmentId),
    RemoveSegment(SegmentId),
    FillWrite,
    FillSync,
    PageRead {
        key: page::PageName,
        pointer: page::Entry,
    },
    BlockRead(ReadKey),
    MetaWrite,
    CheckpointSync,
    Superblock {
        slot: u8,
        synced: bool,
    },
    CleanerRead,
    CleanerWrite,
    /// Something that a promise or an end needs; a superblock that has still to be synced.
    Amend,
    AmendWrite,
    ScrubRead {
        segment: SegmentId,
        start: u64,
        items: Vec<scrub::Item>,
    },
}

/// See the module.
pub struct Store {
    superblock: Superblock,
    superblock_table_pages: Vec<Location>,
    seals: Seals,
    key_rows: Vec<KeyRow>,
    /// Of blocks that a clone shares.
    origins: Origins,
    /// Who waits for a checkpoint to hold a snapshot.
    holds: Vec<(u64, Version)>,
    options: OpenOptions,
    segments: Segments,
    supply: Supply,
    turn: Turn,
    pace: Pace,
    scrub: Scrub,
    map: Map,
    recent: Recent,
    frozen: Option<Frozen>,
    log: Log,
    reads: Reads,
    scans: Scans,
    job: Option<Box<Job>>,
    cleaner: Cleaner,
    /// What is kept whatever others decide. None: this is the only replica.
    gate: Option<Version>,
    amendments: Amendments,
    copying: Copying,
    row_scans: RowScans,
    /// Asked for by growth, by the cleaner, or by closing.
    checkpoint_wanted: bool,
    grow_to: Option<u64>,
    closing: bool,
    /// The pool had no room for the last checkpoint: the log keeps what it would have held.
    close_unclean: bool,
    /// Why the store writes no more.
    stopped: Option<String>,
    now_ms: u64,
    last_write_ms: u64,
    /// When the oldest write was made that no checkpoint has begun to merge.
    unmerged_since_ms: Option<u64>,
    /// Background work may take another step before the next poll is empty.
    background_due: bool,
    retry_create_ms: Option<u64>,
    share: share::Share,
    /// Operations that are out, by their [`IoId`].
    pending: Slab<Purpose>,
    /// Those that are to be performed: what a guest waits for goes first.
    out: VecDeque<(IoId, Io)>,
    out_behind: VecDeque<(IoId, Io)>,
    events: VecDeque<Event>,
    stats: StoreStats,
    /// What is counted in `damaged_places`.
    damaged_places: BTreeSet<(SegmentId, u64)>,
    /// Bytes of everything that was written to the disk.
    disk_bytes: u64,
}

impl std::fmt::Debug for Store {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Store")
            .field("checkpoint", &self.superblock.checkpoint.number)
            .field("job", &self.job.as_ref().map(ToString::to_string))
            .field("recent_rows", &self.recent.rows())
            .field("frozen_rows", &self.frozen.as_ref().map(Frozen::rows))
            .field("cleaning", &self.cleaner.is_busy())
            .field("free_segments", &self.segments.free_count())
            .field("pool_exhausted", &self.segments.exhausted)
            .field("pending", &self.pending.len())
            .field("stopped", &self.stopped)
            .finish_non_exhaustive()
    }
}

impl Store {
    /// The epoch that this store was opened for.
    pub fn epoch(&self) -> Epoch {
        self.superblock.epoch
    }

    /// Makes and verifies checks of this replica.
    pub fn seals(&self) -> Seals {
        self.seals
    }

    /// True if what is stored is ciphertext.
    pub fn is_sealed(&self) -> bool {
        self.seals.tagged()
    }

    /// What the epochs' keys of a sealed replica are derived with.
    pub fn key_rows(&self) -> &[KeyRow] {
        &self.key_rows
    }

    /// Whose replica this is.
    pub fn identity(&self) -> Identity {
        self.superblock.geometry.identity
    }

    /// Verifies the blocks in a segment.
    fn seals_of(&self, segment: SegmentId) -> Seals {
        self.origins.seals(segment).unwrap_or(self.seals)
    }

    /// What a block is.
    pub fn block_size(&self) -> BlockSize {
        self.superblock.geometry.block_size
    }

    /// Blocks of the volume.
    pub fn size_blocks(&self) -> u64 {
        self.superblock.checkpoint.size_blocks
    }

    /// Bytes of the volume.
    pub fn size_bytes(&self) -> u64 {
        self.superblock.size_bytes()
    }

    /// Why the store writes no more, if so.
    pub fn stopped(&self) -> Option<&str> {
        self.stopped.as_deref()
    }

    /// The next disk operation. Before it is `None`, background work has a [turn](turn).
    pub fn poll_io(&mut self) -> Option<(IoId, Io)> {
        if self.out.is_empty() && self.out_behind.is_empty() {
            self.upkeep();
        }
        if let Some(guests) = self.out.pop_front() {
            self.turn.guest_goes_first();
            return Some(guests);
        }
        let next = self.out_behind.pop_front();
        if next.is_none() {
            self.turn.end();
        }
        next
    }

    /// The next event.
    pub fn poll_event(&mut self) -> Option<Event> {
        self.events.pop_front()
    }

    /// Tells the time in milliseconds.
    pub fn tick(&mut self, now_ms: u64) {
        self.now_ms = now_ms;
        self.background_due = true;
        if self.retry_create_ms.is_some_and(|at| at <= now_ms) {
            self.retry_create_ms = None;
            self.segments.exhausted = false;
        }
    }

    /// When the next tick is due.
    pub fn next_tick_ms(&self) -> Option<u64> {
        if self.stopped.is_some() {
            return None;
        }
        let background = self.background_due.then_some(self.now_ms);
        if self.closing {
            return background;
        }
        let mark = self
            .log
            .unmarked()
            .then_some(self.last_write_ms + self.options.mark_after_ms);
        let still = self.job.is_none() && self.frozen.is_none() && !self.cleaner.is_busy();
        let merge = (still && !self.recent.is_empty()).then(|| self.merge_at_ms());
        [
            background,
            mark,
            merge,
            self.quiet_tick_ms(),
            self.scrub_tick_ms(),
            self.retry_create_ms,
        ]
        .into_iter()
        .flatten()
        .min()
    }

    /// Makes the volume larger; reported by [`Event::Grown`].
    pub fn grow(&mut self, size_blocks: u64) {
        self.grow_to = Some(size_blocks.max(self.size_blocks()).max(self.grow_to.unwrap_or(0)));
        self.checkpoint_wanted = true;
        self.background_due = true;
    }

    /// Starts an orderly end. No more appends may come.
    pub fn close(&mut self) {
        self.closing = true;
        self.checkpoint_wanted = true;
        self.background_due = true;
    }

    /// True once an orderly end was started.
    pub fn is_closing(&self) -> bool {
        self.closing
    }

    /// True if [`Store::poll_event`] has something.
    pub fn has_events(&self) -> bool {
        !self.events.is_empty()
    }

    /// True when an orderly end is complete, or nothing more can be done.
    pub fn is_closed(&self) -> bool {
        let done = || self.amendments.is_empty() && self.copying.is_idle();
        self.closing
            && self.pending.is_empty()
            && (done() && (self.superblock.clean || self.close_unclean) || self.stopped.is_some())
    }

    /// What lies there cannot be read, or is not what was written. A disk that fails is known by how many these are.
    fn count_damaged(&mut self, segment: SegmentId, offset: u64) {
        if self.damaged_places.len() < DAMAGED_PLACES_MAX && self.damaged_places.insert((segment, offset)) {
            self.stats.damaged_places += 1;
        }
    }

    /// Space and work figures.
    pub fn stats(&self) -> StoreStats {
        let segment = self.superblock.geometry.segment_bytes;
        let others = self.stats;
        let named = others.stored_bytes + others.moved_bytes + others.map_bytes + others.filled_bytes;
        StoreStats {
            // Pages are counted when they are made, a moment before they are written.
            header_bytes: self.disk_bytes.saturating_sub(named),
            allocated_bytes: self.segments.file_count() as u64 * segment,
            live_bytes: self.segments.live_stored_pages() * PAGE_BYTES,
            cached_pages: self.map.cached_pages() as u64,
            ..self.stats
        }
    }

    /// Performs everything that is due on a blocking disk, until nothing is left to do: recovery, tests, the checker.
    pub fn drive(&mut self, disk: &mut dyn Disk) {
        loop {
            match self.poll_io() {
                Some((id, io)) => {
                    let result = perform(disk, io);
                    self.completed(id, result);
                }
                None if self.background_due && self.stopped.is_none() => {}
                None => return,
            }
        }
    }

    fn issue(&mut self, io: Io, purpose: Purpose) {
        if let Io::Write { parts, .. } = &io {
            let bytes: usize = parts.iter().map(Buf::len).sum();
            self.disk_bytes += bytes as u64;
            if matches!(purpose, Purpose::FillWrite) {
                self.stats.filled_bytes += bytes as u64;
            }
        }
        // No operation relies on an earlier one that has not ended, so those that a guest waits for may overtake the rest.
        let out = if purpose.is_guests() {
            &mut self.out
        } else {
            &mut self.out_behind
        };
        let id = IoId(self.pending.insert(purpose) as u64);
        out.push_back((id, io));
    }

    /// Reports how a disk operation ended.
    pub fn completed(&mut self, id: IoId, result: IoResult) {
        let purpose = self
            .pending
            .try_remove(id.0 as usize)
            .expect("an operation is completed once");
        self.background_due = true;
        let reads = matches!(
            purpose,
            Purpose::PageRead { .. } | Purpose::BlockRead(_) | Purpose::ScrubRead { .. }
        );
        if self.stopped.is_some() && !reads {
            return; // nothing is written any more, so nothing goes on from here
        }
        match (purpose, result) {
            (Purpose::LogWrite { number, segment }, Ok(_)) => self.log_written(number, segment),
            (Purpose::LogSync, Ok(_)) => self.log_synced(),
            (Purpose::CreateSegment(segment), Ok(done)) => {
                self.segments.created(segment);
                if let IoDone::Created { pool_free_bytes } = done {
                    self.pool_has(pool_free_bytes);
                }
                if self.pace.full_at_bytes.is_some_and(|full| self.own_bytes() > full) {
                    self.pace.full_at_bytes = None;
                }
            }
            (Purpose::CreateSegment(segment), Err(IoFailure::NoSpace)) => {
                self.segments.create_failed(segment);
                self.pace.full_at_bytes = Some(self.own_bytes());
                self.pool_has(0);
                self.retry_create_ms = Some(self.now_ms + self.options.retry_create_ms);
            }
            (Purpose::RemoveSegment(segment), Ok(_)) => self.segments.removed(segment),
            (Purpose::FillWrite, Ok(_)) => self.fill_written(),
            (Purpose::FillSync, Ok(_)) => self.end_fill(true),
            (Purpose::PageRead { key, pointer }, Ok(IoDone::Read(buf))) => {
                self.page_read(key, pointer, Ok(buf.freeze()))
            }
            (Purpose::PageRead { key, pointer }, Err(error)) => self.page_read(key, pointer, Err(error)),
            (Purpose::BlockRead(key), Ok(IoDone::Read(buf))) => self.block_read(key, Ok(buf)),
            (Purpose::BlockRead(key), Err(error)) => self.block_read(key, Err(error)),
            (Purpose::MetaWrite, Ok(_)) => self.meta_written(),
            (Purpose::CheckpointSync, Ok(_)) => self.checkpoint_synced(),
            (Purpose::Superblock { slot, synced }, Ok(_)) => self.superblock_done(slot, synced),
            (Purpose::CleanerRead, Ok(IoDone::Read(buf))) => self.cleaner_read(Ok(buf.freeze())),
            (Purpose::CleanerRead, Err(error)) => self.cleaner_read(Err(error)),
            (Purpose::CleanerWrite, Ok(_)) => self.cleaner_written(),
            (Purpose::Amend, Ok(_)) => self.amend_done(),
            (Purpose::AmendWrite, Ok(_)) => self.amend_written(),
            (Purpose::ScrubRead { segment, start, items }, Ok(IoDone::Read(buf))) => {
                self.scrub_was_read(segment, start, items, Ok(buf));
            }
            (Purpose::ScrubRead { segment, start, items }, Err(error)) => {
                self.scrub_was_read(segment, start, items, Err(error));
            }
            (purpose, Err(error)) => self.stop(format!("{}: {error}", purpose.doing())),
            (purpose, Ok(IoDone::Done | IoDone::Created { .. })) => {
                unreachable!("a read gives bytes back ({purpose:?})")
            }
        }
    }

    /// After a failed write or sync nobody knows what is on the disk: write no more, say why.
    fn stop(&mut self, why: String) {
        if self.stopped.is_none() {
            for (token, _) in self.holds.drain(..) {
                self.events
                    .push_back(Event::Held(token, Err(RequestError::Failed(why.clone()))));
            }
            for token in self.copying.take_all() {
                let error = RequestError::Failed(why.clone());
                self.events.push_back(Event::CopiedIn(token, Err(error)));
            }
            self.events.push_back(Event::Stopped(why.clone()));
            self.stopped = Some(why);
        }
    }

    /// Keeps the house in order after every event: cheap when there is nothing to do.
    fn upkeep(&mut self) {
        if self.stopped.is_some() {
            return;
        }
        self.start_sync();
        if !self.background_due {
            return;
        }
        let works = self.checkpoint_works() || self.cleaner.works();
        let pace = match works {
            false => Work::Short,
            true if self.pressure() == pace::Pressure::Waiting => Work::Awaited,
            true => Work::Long,
        };
        if self.turn.begin(pace, self.merge_cost()) {
            self.background_due = false;
            self.mark_flush();
            self.run_amendments();
            self.run_copies();
            self.watch_guest();
            self.run_cleaner();
            self.run_checkpoint();
            self.run_scrub();
            self.keep_segments();
            self.keep_to_share();
        }
    }

    /// What merging the memtable into the map will cost, in units of a turn.
    fn merge_cost(&self) -> u64 {
        let once =
            self.recent.rows() as u64 * u64::from(turn::ROW) + self.recent.leaves() as u64 * u64::from(turn::LEAF);
        // What is replaced goes into the tables of snapshots.
        if self.recent.catalog.is_empty() { once } else { 3 * once }
    }

    fn lookup_memory(&self, lba: Lba) -> Option<page::Entry> {
        self.recent
            .get(lba)
            .or_else(|| self.frozen.as_ref().and_then(|frozen| frozen.get(lba)))
    }
}

impl Purpose {
    /// True if a guest may wait for it.
    fn is_guests(&self) -> bool {
        match self {
            Purpose::LogWrite { .. } | Purpose::LogSync | Purpose::BlockRead(_) | Purpose::PageRead { .. } => true,
            Purpose::CreateSegment(_)
            | Purpose::RemoveSegment(_)
            | Purpose::FillWrite
            | Purpose::FillSync
            | Purpose::MetaWrite
            | Purpose::CheckpointSync
            | Purpose::Superblock { .. }
            | Purpose::Amend
            | Purpose::AmendWrite
            | Purpose::CleanerRead
            | Purpose::CleanerWrite
            | Purpose::ScrubRead { .. } => false,
        }
    }

    fn doing(&self) -> &'static str {
        match self {
            Purpose::LogWrite { .. } => "writing the log",
            Purpose::LogSync => "syncing the log",
            Purpose::CreateSegment(_) => "making a segment",
            Purpose::RemoveSegment(_) => "removing a segment",
            Purpose::FillWrite | Purpose::FillSync => "filling a segment",
            Purpose::PageRead { .. } => "reading the map",
            Purpose::BlockRead(_) => "reading a block",
            Purpose::MetaWrite => "writing the map",
            Purpose::CheckpointSync => "syncing the map",
            Purpose::Superblock { .. } => "writing a superblock",
            Purpose::CleanerRead => "reading a segment to clean",
            Purpose::CleanerWrite => "moving blocks",
            Purpose::Amend | Purpose::AmendWrite => "writing down a promise",
            Purpose::ScrubRead { .. } => "scrubbing",
        }
    }
}
