//! Checkpoints: what the log has since the last one becomes map pages, and the superblocks point to them.
//!
//! ```text
//! freeze ─► merge (new pages, leaf by leaf, up to a new root) ─► drop what zeroes cut off ─► deleted snapshots' tables
//!        ─► revert ─► what becomes free ─► segment table, catalog ─► sync pages and log ─► superblock 0, sync
//!        ─► superblock 1, sync ─► commit ─► wind up
//! ```
//!
//! All of it but the syncs is done in pieces, a [turn](super::turn) at a time, so that guest requests get their turns in
//! between: nothing here goes over all rows, all pages or all segments at once.
//!
//! Until the commit nothing in memory or on the disk points to the new pages, so a checkpoint that fails for want of
//! space is dropped and tried again later. The merge goes through the volume in ascending order and holds one path of
//! pages, whatever the size of the volume. What it takes from the head for snapshots is gathered, and written into
//! their tables whenever enough has come together.

mod commit;
mod give_back;
mod keep;
mod merge;
mod tables;
mod tree;
mod wind_up;

use std::collections::{BTreeMap, BTreeSet, VecDeque};

pub use keep::Relocated;
pub(super) use tables::listed_page;

use super::Store;
use super::memtable::Memtable;
use super::page::{Entry, PageName, TreeId, height_for};
use super::snapshot::{Catalog, SEALED_DUE};
use super::superblock::{LogPosition, StreamPosition, Superblock};
use crate::io::SegmentId;
use crate::types::{Lba, Location, SnapshotId, Version};
pub(super) use give_back::DELETED_PAGES_FULL;
use give_back::{DELETED_PAGES_MAX, Row};
use keep::Kept;
use tree::{Pages, Tree};

/// A guest that never pauses for long gets a checkpoint after so many of the pauses that would make one.
const MERGE_PAUSES_MAX: u64 = 3;

/// What a checkpoint makes pages of; kept when one has to be given up.
#[derive(Debug)]
pub struct Frozen {
    /// Cut at each snapshot, oldest first.
    pub tables: Vec<Memtable>,
    /// The snapshots at this position of the log.
    catalog: Catalog,
    revert: Option<SnapshotId>,
    /// Replay starts here once this is committed.
    position: LogPosition,
    /// Everything before this write to the log is in it, and the newest version of that.
    written: u64,
    highest: Version,
    /// Pages to be written anew because the cleaner wants their segment, by a block below each.
    touched: BTreeSet<(TreeId, Lba, u8)>,
    /// Blocks that the cleaner copied.
    relocated: BTreeMap<(TreeId, Lba), Relocated>,
    moved: Option<StreamPosition>,
    moved_dirty: BTreeSet<SegmentId>,
}

impl Frozen {
    pub fn rows(&self) -> usize {
        self.tables.iter().map(Memtable::len).sum()
    }

    /// The newest version of anything in it, or of what came a moment later.
    pub fn highest(&self) -> Version {
        self.highest
    }

    pub fn zeroed_blocks(&self) -> u64 {
        self.tables.iter().map(Memtable::zeroed_blocks).sum()
    }

    pub fn get(&self, lba: Lba) -> Option<Entry> {
        self.tables.iter().rev().find_map(|table| table.get(lba))
    }
}

#[derive(Debug)]
enum Phase {
    SortMoves,
    Merge,
    Drop,
    Delete,
    Revert,
    DropReverted,
    FindFree,
    Table,
    Sync {
        outstanding: usize,
    },
    Superblocks,
    /// Committed; what it counted is being put down, and what it held let go of.
    WindUp,
    /// Given up; its last writes are still out.
    Abandoned,
}

impl Phase {
    /// There is something to do that waits for nothing but its turn.
    fn is_working(&self) -> bool {
        match self {
            Phase::SortMoves
            | Phase::Merge
            | Phase::Drop
            | Phase::Delete
            | Phase::Revert
            | Phase::DropReverted
            | Phase::FindFree
            | Phase::Table
            | Phase::WindUp => true,
            Phase::Sync { .. } | Phase::Superblocks | Phase::Abandoned => false,
        }
    }
}

impl std::fmt::Display for Job {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{:?}", self.phase)?;
        let writes = self.out.writes_out;
        write!(f, ", pass {}, keeping {}, {writes} writes out", self.pass, self.keeping)
    }
}

/// A checkpoint under way.
#[derive(Debug)]
pub struct Job {
    number: u64,
    size_blocks: u64,
    phase: Phase,
    out: Pages,
    head: Tree,
    /// Which frozen table is being merged, and how far.
    pass: usize,
    next_block: Lba,
    next_zero: Lba,
    read_ahead: Lba,
    /// How far what the cleaner did in the tables of snapshots was handed to `kept`.
    next_move: (TreeId, Lba),
    /// How far what it did in the head was merged.
    next_touch: (Lba, u8),
    next_relocated: Lba,
    /// Subtrees of the head that were cut off.
    dropped: Vec<Dropped>,
    /// The snapshots as this checkpoint leaves them.
    catalog: Catalog,
    kept: Kept,
    /// `kept` is being written into the tables.
    keeping: bool,
    /// The table that is being written.
    table: Option<(usize, Tree)>,
    /// The table that is being taken apart.
    walk: Option<(usize, Tree)>,
    rows: VecDeque<Row>,
    delete_pages: usize,
    /// The head becomes what it was at this snapshot.
    revert: Option<Version>,
    /// Segments whose counts change, or that nothing needed before: those that are still to be looked at.
    unsettled: Option<Vec<SegmentId>>,
    /// Segments that this checkpoint leaves without anything needed in them.
    freed: BTreeSet<SegmentId>,
    listing: Option<tables::Listing>,
    table_pages: Vec<Location>,
    next: Option<Superblock>,
    /// What was frozen, once it is committed.
    leftover: Option<Frozen>,
}

/// A subtree of the head that was cut off.
#[derive(Clone, Copy, Debug)]
struct Dropped {
    name: PageName,
    pointer: Entry,
    /// The version of the zeroes that did it; a revert has none, and nobody needs what it cuts off.
    replaced_at: Option<Version>,
}

/// Whether a step got what it needed.
enum Step {
    Done,
    Wait,
    NoSpace,
}

impl Store {
    /// Starts a checkpoint when one is due, and takes the running one a step further.
    pub(super) fn run_checkpoint(&mut self) {
        if self.job.is_none() && self.checkpoint_due() {
            self.start_checkpoint();
        }
        let Some(mut job) = self.job.take() else { return };
        let outcome = loop {
            if job.kept.is_full() && !matches!(job.phase, Phase::Abandoned) {
                job.keeping = true;
            }
            let phase = std::mem::discriminant(&job.phase);
            let outcome = match job.phase {
                _ if job.keeping => self.keep_rows(&mut job),
                Phase::SortMoves => self.sort_moves(&mut job),
                Phase::Merge => self.merge(&mut job),
                Phase::Drop => self.drop_subtrees(&mut job, Phase::Delete),
                Phase::Delete => self.delete_tables(&mut job),
                Phase::Revert => self.revert_head(&mut job),
                Phase::DropReverted => self.drop_subtrees(&mut job, Phase::FindFree),
                Phase::FindFree => self.find_free(&mut job),
                Phase::Table => self.write_table(&mut job),
                Phase::WindUp => match self.wind_up(&mut job) {
                    true => return,
                    false => Step::Done,
                },
                Phase::Sync { .. } | Phase::Superblocks | Phase::Abandoned => Step::Wait,
            };
            // Tables are taken apart, reverted and listed only when everything that belongs into them is there.
            let entered = std::mem::discriminant(&job.phase) != phase;
            let whole = matches!(job.phase, Phase::Delete | Phase::Revert | Phase::FindFree);
            job.keeping |= entered && whole && !job.kept.is_empty();
            if !matches!(outcome, Step::Done) || !self.turn.goes_on() {
                break outcome;
            }
        };
        // Another turn, after the guest had one.
        self.background_due |= matches!(outcome, Step::Done);
        match outcome {
            Step::NoSpace => self.abandon(*job),
            Step::Done | Step::Wait => {
                self.job = Some(job);
                self.maybe_sync_checkpoint();
            }
        }
    }

    /// True while a checkpoint uses up its turns.
    pub(super) fn checkpoint_works(&self) -> bool {
        self.job.as_ref().is_some_and(|job| job.phase.is_working())
    }

    fn checkpoint_due(&self) -> bool {
        if self.cleaner.is_busy() || self.stopped.is_some() {
            return false;
        }
        if self.closing {
            // Once, also when the last one found no space a moment ago: nobody waits for a full pool at the end.
            let quiet = self.log.inflight() == 0;
            return quiet && !self.superblock.clean && !self.close_unclean;
        }
        if self.retry_create_ms.is_some() && self.frozen.is_some() {
            return false;
        }
        self.merge_is_due()
    }

    /// Enough has come together for a checkpoint, or somebody wants one.
    pub(super) fn merge_is_due(&self) -> bool {
        let rows = self.recent.rows() + self.frozen.as_ref().map_or(0, Frozen::rows);
        let tail = self.log.appended.log_index - self.superblock.checkpoint.replay.log_index;
        let idle = !self.recent.is_empty() && self.now_ms >= self.merge_at_ms();
        let snapshots =
            self.recent.sealed.len() >= SEALED_DUE || self.recent.revert.is_some() || self.recent.catalog.has_deleted();
        self.checkpoint_wanted
            || self.closing
            || rows >= self.options.memtable_rows_max
            || tail >= self.options.tail_segments_max
            || idle
            || snapshots
    }

    /// When what was written is to be merged although it is little: space that it gave back is in use until then.
    pub(super) fn merge_at_ms(&self) -> u64 {
        let pause = self.last_write_ms + self.options.idle_checkpoint_ms;
        let oldest = self.unmerged_since_ms.unwrap_or(0);
        pause.min(oldest + MERGE_PAUSES_MAX * self.options.idle_checkpoint_ms)
    }

    fn start_checkpoint(&mut self) {
        if self.frozen.is_none() {
            self.freeze();
        }
        let frozen = self.frozen.as_ref().expect("it was just made");
        let size_blocks = self.grow_to.unwrap_or(0).max(self.size_blocks());
        let number = self.superblock.checkpoint.number + 1;
        let mut job = Job {
            number,
            size_blocks,
            phase: Phase::SortMoves,
            out: Pages::new(number, self.superblock.checkpoint.meta),
            head: Tree::new(
                TreeId::HEAD,
                self.superblock.geometry.identity.replica,
                self.map.root,
                self.map.height,
                height_for(size_blocks),
            ),
            pass: 0,
            next_block: Lba(0),
            next_zero: Lba(0),
            read_ahead: Lba(0),
            next_move: (TreeId::HEAD, Lba(0)),
            next_touch: (Lba(0), 0),
            next_relocated: Lba(0),
            dropped: Vec::new(),
            catalog: frozen.catalog.clone(),
            kept: Kept::default(),
            keeping: false,
            table: None,
            walk: None,
            rows: VecDeque::new(),
            delete_pages: if self.segments.exhausted {
                DELETED_PAGES_FULL
            } else {
                DELETED_PAGES_MAX
            },
            revert: frozen
                .revert
                .and_then(|id| frozen.catalog.find(id))
                .map(|to| to.version),
            unsettled: None,
            freed: BTreeSet::new(),
            listing: None,
            table_pages: Vec::new(),
            next: None,
            leftover: None,
        };
        if job.revert.is_some() {
            job.delete_pages = 0; // one thing at a time: reverting empties the tables of later ones anyway
        }
        self.job = Some(Box::new(job));
        // What the checkpoint points to in the log must be durable before it is.
        self.sync();
    }

    /// Takes what happened until now out of the way of what comes.
    fn freeze(&mut self) {
        self.checkpoint_wanted = false;
        self.unmerged_since_ms = None;
        let position = self.log.appended;
        let mut tables = std::mem::take(&mut self.recent.sealed);
        if !self.recent.active.is_empty() {
            tables.push(std::mem::take(&mut self.recent.active));
        }
        let (touched, relocated) = self.cleaner.take_work();
        let (moved, moved_dirty) = self.cleaner.stream();
        self.frozen = Some(Frozen {
            tables,
            catalog: self.recent.catalog.clone(),
            revert: self.recent.revert,
            position,
            written: self.log.written(),
            highest: self.log.highest,
            touched,
            relocated,
            moved,
            moved_dirty,
        });
    }

    /// Gives up a checkpoint that found no space. What was frozen stays, and so does the log behind it.
    fn abandon(&mut self, mut job: Job) {
        if job.out.writes_out > 0 {
            // Segments are let go only when nothing writes into them any more.
            (job.phase, job.keeping) = (Phase::Abandoned, false);
            self.job = Some(Box::new(job));
            return;
        }
        self.close_unclean = self.closing;
        self.map.forget(&job.out.taken);
        for segment in job.out.taken {
            self.segments.release(segment);
        }
        if let Some(meta) = self.superblock.checkpoint.meta {
            self.map.forget_behind(meta.segment, meta.offset);
        }
        self.retry_create_ms
            .get_or_insert(self.now_ms + self.options.retry_create_ms);
    }

    pub(super) fn meta_written(&mut self) {
        let job = self.job.as_mut().expect("pages belong to a checkpoint");
        job.out.writes_out -= 1;
        if job.out.writes_out == 0 && matches!(job.phase, Phase::Abandoned) {
            let job = self.job.take().expect("it is there");
            self.abandon(*job);
            return;
        }
        self.maybe_sync_checkpoint();
    }
}
