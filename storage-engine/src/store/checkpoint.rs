//! Checkpoints: the memtable becomes map pages, and the superblocks point to them.
//!
//! ```text
//! freeze ─► merge (new pages, leaf by leaf, up to a new root) ─► drop what zeroes cut off ─► segment table
//!        ─► sync pages and log ─► superblock 0, sync ─► superblock 1, sync ─► commit
//! ```
//!
//! Until the commit nothing in memory or on the disk points to the new pages, so a checkpoint that fails for want of
//! space is dropped and tried again later. The merge goes through the volume in ascending order and holds one path of
//! pages, whatever the size of the volume.

use std::collections::{BTreeMap, BTreeSet};

use super::map::Found;
use super::memtable::{Memtable, tombstone};
use super::page::{Entry, FANOUT, Page, PageKind, PageName, height_for, span};
use super::read::Waiter;
use super::segment::{SEGMENT_HEADER_BYTES, SegmentHeader, SegmentKind, Used, row};
use super::superblock::{Checkpoint, LogPosition, StreamPosition, Superblock};
use super::{Event, Purpose, Store};
use crate::buffer::Buf;
use crate::io::{FileId, Io, SegmentId};
use crate::types::{BLOCK_BYTES, Lba, Location, Version};

/// Rows merged in one turn, so that guest requests get their turns in between.
const ROWS_PER_TURN: usize = 512;
/// Leaves read ahead of the merge.
const READ_AHEAD: usize = 16;
/// Pages written in one operation: 256 KiB.
const PAGES_PER_WRITE: usize = 64;

/// A memtable that is being made into map pages; kept when a checkpoint has to be given up.
#[derive(Debug)]
pub struct Frozen {
    pub table: Memtable,
    /// Replay starts here once this is committed.
    position: LogPosition,
    /// Pages to be written anew because the cleaner wants their segment, by a block below each.
    touch: BTreeSet<(Lba, u8)>,
    /// Segments that no stream appended to any more: those that nothing needs then become free.
    closed: BTreeSet<SegmentId>,
    moved: Option<StreamPosition>,
    moved_dirty: BTreeSet<SegmentId>,
}

#[derive(Debug)]
enum Phase {
    Merge,
    Drop,
    Table,
    Sync {
        outstanding: usize,
    },
    Superblocks,
    /// Given up; its last writes are still out.
    Abandoned,
}

/// A checkpoint under way.
#[derive(Debug)]
pub struct Job {
    number: u64,
    size_blocks: u64,
    height: u8,
    root: Entry,
    phase: Phase,
    path: Vec<Dirty>,
    next_block: Lba,
    next_zero: Lba,
    touch: BTreeSet<(Lba, u8)>,
    read_ahead: Lba,
    /// Subtrees that a zero cut off; what they point to is no longer needed.
    dropped: Vec<(PageName, Entry)>,
    live: BTreeMap<SegmentId, i64>,
    meta: Option<StreamPosition>,
    taken: BTreeSet<SegmentId>,
    pages: Vec<Buf>,
    pages_at: Option<StreamPosition>,
    writes_out: usize,
    dirty: BTreeSet<SegmentId>,
    table_pages: Vec<Location>,
    next: Option<Superblock>,
}

/// A page of the path that the merge is on.
#[derive(Debug)]
struct Dirty {
    name: PageName,
    entries: Vec<Entry>,
    old: Entry,
    changed: bool,
}

/// Whether the merge got what it needed.
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
        let outcome = match job.phase {
            Phase::Merge => self.merge(&mut job),
            Phase::Drop => self.drop_subtrees(&mut job),
            Phase::Table => self.write_table(&mut job),
            Phase::Sync { .. } | Phase::Superblocks | Phase::Abandoned => Step::Wait,
        };
        // Another turn, after the guest had one.
        self.background_due |= matches!(outcome, Step::Done) && matches!(job.phase, Phase::Merge | Phase::Drop);
        match outcome {
            Step::NoSpace => self.abandon(*job),
            Step::Done | Step::Wait => {
                self.job = Some(job);
                self.maybe_sync_checkpoint();
            }
        }
    }

    fn checkpoint_due(&self) -> bool {
        if self.cleaner.is_busy() || self.stopped.is_some() || self.retry_create_ms.is_some() && self.frozen.is_some() {
            return false;
        }
        if self.closing {
            let quiet = self.log.inflight() == 0;
            return quiet && !self.superblock.clean;
        }
        let rows = self.active.len() + self.frozen.as_ref().map_or(0, |frozen| frozen.table.len());
        let tail = self.log.appended.log_index - self.superblock.checkpoint.replay.log_index;
        let idle = !self.active.is_empty() && self.now_ms >= self.last_write_ms + self.options.idle_checkpoint_ms;
        self.checkpoint_wanted
            || rows >= self.options.memtable_rows_max
            || tail >= self.options.tail_segments_max
            || idle
    }

    fn start_checkpoint(&mut self) {
        if self.frozen.is_none() {
            self.checkpoint_wanted = false;
            let position = self.log.appended;
            let closed = self
                .segments
                .used()
                .iter()
                .filter(|(_, used)| !used.open)
                .filter(|(_, used)| used.kind != SegmentKind::Data || used.log_index < position.log_index)
                .map(|(id, _)| *id)
                .collect();
            let table = std::mem::take(&mut self.active);
            let touch = self.cleaner.take_touched();
            let (moved, moved_dirty) = self.cleaner.stream();
            self.frozen = Some(Frozen {
                table,
                position,
                touch,
                closed,
                moved,
                moved_dirty,
            });
        }
        let frozen = self.frozen.as_ref().expect("it was just made");
        let size_blocks = self.grow_to.unwrap_or(0).max(self.size_blocks());
        let height = height_for(size_blocks).max(self.map.height);
        // A larger volume may need more levels: the old root becomes the first child of new pages above it.
        let (mut path, mut root) = (Vec::new(), self.map.root);
        if !root.is_vacant() && height > self.map.height {
            for level in (self.map.height..height).rev() {
                let entries = vec![Entry::default(); FANOUT];
                path.push(Dirty {
                    name: PageName { level, index: 0 },
                    entries,
                    old: Entry::default(),
                    changed: false,
                });
            }
            let lowest: &mut Dirty = path.last_mut().expect("there is at least one new level");
            lowest.entries[0] = std::mem::take(&mut root);
            lowest.changed = true;
        }
        let job = Job {
            number: self.superblock.checkpoint.number + 1,
            size_blocks,
            height,
            root,
            phase: Phase::Merge,
            path,
            next_block: Lba(0),
            next_zero: Lba(0),
            touch: frozen.touch.clone(),
            read_ahead: Lba(0),
            dropped: Vec::new(),
            live: BTreeMap::new(),
            meta: self.superblock.checkpoint.meta,
            taken: BTreeSet::new(),
            pages: Vec::new(),
            pages_at: None,
            writes_out: 0,
            dirty: BTreeSet::new(),
            table_pages: Vec::new(),
            next: None,
        };
        self.job = Some(Box::new(job));
        // What the checkpoint points to in the log must be durable before it is.
        self.sync();
    }

    /// Gives up a checkpoint that found no space. The frozen table stays, and so does the log behind it.
    fn abandon(&mut self, mut job: Job) {
        if job.writes_out > 0 {
            // Segments are let go only when nothing writes into them any more.
            job.phase = Phase::Abandoned;
            self.job = Some(Box::new(job));
            return;
        }
        self.close_unclean = self.closing;
        for segment in job.taken {
            self.map.forget(segment);
            self.segments.release(segment);
        }
        if let Some(meta) = self.superblock.checkpoint.meta {
            self.map.forget_behind(meta.segment, meta.offset);
        }
        self.retry_create_ms
            .get_or_insert(self.now_ms + self.options.retry_create_ms);
    }

    /// Makes sure that `pages` pages can be placed without waiting.
    fn meta_room(&mut self, job: &mut Job, pages: usize) -> Step {
        let segment_bytes = self.superblock.geometry.segment_bytes;
        let left = job.meta.map_or(0, |meta| (segment_bytes - meta.offset) / BLOCK_BYTES);
        if left >= pages as u64 {
            return Step::Done;
        }
        let Some(segment) = self.segments.take(SegmentKind::Meta, 0) else {
            return if self.segments.exhausted {
                Step::NoSpace
            } else {
                Step::Wait
            };
        };
        self.flush_pages(job);
        job.taken.insert(segment);
        let header = SegmentHeader {
            kind: SegmentKind::Meta,
            segment,
            log_index: 0,
            epoch: self.superblock.epoch,
        };
        let parts = vec![header.encode(&self.superblock.geometry.identity)];
        self.issue(
            Io::Write {
                file: FileId::Segment(segment),
                offset: 0,
                parts,
            },
            Purpose::MetaWrite,
        );
        job.writes_out += 1;
        job.dirty.insert(segment);
        job.meta = Some(StreamPosition {
            segment,
            offset: SEGMENT_HEADER_BYTES,
        });
        Step::Done
    }

    /// Places a page in the meta stream.
    fn place(&mut self, job: &mut Job, page: &Page) -> Location {
        let at = job.meta.as_mut().expect("meta_room was asked first");
        let location = Location::block(at.segment, at.offset);
        if job.pages.is_empty() {
            job.pages_at = Some(*at);
        }
        at.offset += BLOCK_BYTES;
        job.pages.push(page.bytes().clone());
        *job.live.entry(location.segment()).or_default() += 1;
        job.dirty.insert(location.segment());
        self.stats.map_bytes += BLOCK_BYTES;
        if job.pages.len() == PAGES_PER_WRITE {
            self.flush_pages(job);
        }
        location
    }

    fn flush_pages(&mut self, job: &mut Job) {
        if let Some(at) = job.pages_at.take() {
            let parts = std::mem::take(&mut job.pages);
            self.issue(
                Io::Write {
                    file: FileId::Segment(at.segment),
                    offset: at.offset,
                    parts,
                },
                Purpose::MetaWrite,
            );
            job.writes_out += 1;
        }
    }

    pub(super) fn meta_written(&mut self) {
        let job = self.job.as_mut().expect("pages belong to a checkpoint");
        job.writes_out -= 1;
        if job.writes_out == 0 && matches!(job.phase, Phase::Abandoned) {
            let job = self.job.take().expect("it is there");
            self.abandon(*job);
            return;
        }
        self.maybe_sync_checkpoint();
    }

    // ---- merge ----------------------------------------------------------------------------------------------------

    fn merge(&mut self, job: &mut Job) -> Step {
        let Some(frozen) = self.frozen.take() else {
            unreachable!("a checkpoint has a frozen table")
        };
        let mut outcome = Step::Done;
        for _ in 0..ROWS_PER_TURN {
            outcome = self.merge_one(job, &frozen);
            if !matches!(outcome, Step::Done) || !matches!(job.phase, Phase::Merge) {
                break;
            }
        }
        if matches!(outcome, Step::Wait) {
            self.read_ahead(job, &frozen);
        }
        self.frozen = Some(frozen);
        outcome
    }

    fn merge_one(&mut self, job: &mut Job, frozen: &Frozen) -> Step {
        // One item finishes at most a path of pages and starts another.
        match self.meta_room(job, 2 * usize::from(job.height) + 2) {
            Step::Done => {}
            other => return other,
        }
        let block = frozen.table.next_block(job.next_block);
        let zero = frozen.table.next_zero(job.next_zero);
        let touch = job.touch.first().copied();
        let first = [
            block.map(|(lba, _)| lba),
            zero.map(|(lba, ..)| lba),
            touch.map(|(lba, _)| lba),
        ];
        let Some(first) = first.into_iter().flatten().min() else {
            while !job.path.is_empty() {
                self.finish_page(job);
            }
            job.phase = Phase::Drop;
            return Step::Done;
        };
        if let Some((lba, level)) = touch.filter(|(lba, _)| *lba == first) {
            if !self.descend(job, lba, level) {
                return Step::Wait;
            }
            let page = job.path.last_mut().expect("descend leaves a path");
            page.changed |= !page.old.location.is_none();
            job.touch.remove(&(lba, level));
            return Step::Done;
        }
        if let Some((start, end, version)) = zero.filter(|(lba, ..)| *lba == first) {
            return self.merge_zero(job, start, end, version, block.map(|(lba, _)| lba));
        }
        let (lba, entry) = block.expect("one of the three is first");
        if !self.descend(job, lba, 0) {
            return Step::Wait;
        }
        let page = job.path.last_mut().expect("descend leaves a path");
        let slot = page.name.slot(lba);
        let old = page.entries[slot];
        if entry.version >= old.version {
            page.entries[slot] = entry;
            page.changed = true;
            count(&mut job.live, old, -1);
            count(&mut job.live, entry, 1);
        }
        job.next_block = Lba(lba.0 + 1);
        Step::Done
    }

    fn merge_zero(&mut self, job: &mut Job, start: Lba, end: Lba, version: Version, block: Option<Lba>) -> Step {
        let leaf = PageName::of(0, start);
        let leaf_end = Lba(leaf.first().0 + span(0));
        // Blocks in between are newer and come in order: go only as far as the leaf of the next one.
        let limit = match block {
            Some(block) if block < leaf_end => leaf_end,
            Some(block) => PageName::of(0, block).first(),
            None => end,
        };
        let chunk_end = end.min(limit);
        let whole = (0..job.height - 1).rev().find(|level| {
            let name = PageName::of(*level, start);
            let page_end = name.first().0.saturating_add(span(*level)).min(job.size_blocks);
            name.first() == start && page_end <= chunk_end.0
        });
        match whole {
            Some(level) => {
                if !self.descend(job, start, level + 1) {
                    return Step::Wait;
                }
                let page = job.path.last_mut().expect("descend leaves a path");
                let slot = page.name.slot(start);
                let old = std::mem::replace(&mut page.entries[slot], tombstone(version));
                page.changed = true;
                let name = PageName::of(level, start);
                if !old.location.is_none() {
                    job.dropped.push((name, old));
                }
                job.next_zero = Lba(start.0 + span(level));
            }
            None => {
                if !self.descend(job, start, 0) {
                    return Step::Wait;
                }
                let page = job.path.last_mut().expect("descend leaves a path");
                let stop = chunk_end.min(leaf_end);
                for lba in (start.0..stop.0).map(Lba) {
                    let slot = page.name.slot(lba);
                    if page.entries[slot].version < version {
                        count(&mut job.live, page.entries[slot], -1);
                        page.entries[slot] = tombstone(version);
                        page.changed = true;
                    }
                }
                job.next_zero = stop;
            }
        }
        Step::Done
    }

    /// Makes the path end in the page of `level` above `lba`; false if a page has to be read first.
    fn descend(&mut self, job: &mut Job, lba: Lba, level: u8) -> bool {
        while let Some(top) = job.path.last() {
            if top.name.level >= level && PageName::of(top.name.level, lba) == top.name {
                break;
            }
            self.finish_page(job);
        }
        loop {
            let (name, pointer) = match job.path.last() {
                Some(top) if top.name.level == level => return true,
                Some(top) => (PageName::of(top.name.level - 1, lba), top.entries[top.name.slot(lba)]),
                None => (
                    PageName {
                        level: job.height - 1,
                        index: 0,
                    },
                    job.root,
                ),
            };
            let entries = if pointer.location.is_none() {
                vec![tombstone(pointer.version); FANOUT]
            } else {
                match self.map.cached(pointer) {
                    Some(page) => page.entries(),
                    None => {
                        if !self.is_fetching(pointer) {
                            self.fetch(name, pointer, Waiter::Background);
                        }
                        return false;
                    }
                }
            };
            job.path.push(Dirty {
                name,
                entries,
                old: pointer,
                changed: false,
            });
        }
    }

    /// Takes the lowest page off the path; a changed one gets a place, and its parent points there.
    fn finish_page(&mut self, job: &mut Job) {
        let dirty = job.path.pop().expect("the caller saw a page");
        if !dirty.changed {
            return;
        }
        let version = dirty
            .entries
            .iter()
            .map(|entry| entry.version)
            .max()
            .unwrap_or_default();
        let uniform = dirty
            .entries
            .iter()
            .all(|entry| entry.location.is_none() && entry.version == version);
        let entry = if uniform {
            tombstone(version)
        } else {
            let replica = self.superblock.geometry.identity.replica;
            let page = Page::encode(PageKind::Map, dirty.name, replica, job.number, &dirty.entries);
            let location = self.place(job, &page);
            let check = page.check();
            self.map.add(location, page);
            Entry {
                location,
                version,
                check,
            }
        };
        count(&mut job.live, dirty.old, -1);
        match job.path.last_mut() {
            Some(parent) => {
                let slot = parent.name.slot(dirty.name.first());
                parent.entries[slot] = entry;
                parent.changed = true;
            }
            None => job.root = entry,
        }
    }

    /// Asks for the leaves that the merge will need next.
    fn read_ahead(&mut self, job: &mut Job, frozen: &Frozen) {
        let mut from = job.read_ahead.max(job.next_block);
        for _ in 0..READ_AHEAD {
            let Some((lba, _)) = frozen.table.next_block(from) else {
                break;
            };
            if let Found::NeedPage(name, pointer) = self.map.find(lba)
                && !self.is_fetching(pointer)
            {
                self.fetch(name, pointer, Waiter::Background);
            }
            from = Lba(PageName::of(0, lba).first().0 + span(0));
        }
        job.read_ahead = job.next_block;
    }

    // ---- drop -----------------------------------------------------------------------------------------------------

    /// Walks the subtrees that zeroes cut off: what they point to is no longer needed.
    fn drop_subtrees(&mut self, job: &mut Job) -> Step {
        for _ in 0..ROWS_PER_TURN / 8 {
            let Some((name, pointer)) = job.dropped.last().copied() else {
                job.phase = Phase::Table;
                return self.write_table(job);
            };
            let Some(page) = self.map.cached(pointer) else {
                // It may be one of this checkpoint's own pages, still on its way to the disk.
                self.flush_pages(job);
                if job.writes_out > 0 {
                    return Step::Wait;
                }
                if !self.is_fetching(pointer) {
                    self.fetch(name, pointer, Waiter::Background);
                }
                return Step::Wait;
            };
            job.dropped.pop();
            count(&mut job.live, pointer, -1);
            for (slot, entry) in page.entries().into_iter().enumerate() {
                if entry.location.is_none() {
                    continue;
                }
                if name.level == 0 {
                    count(&mut job.live, entry, -1);
                } else {
                    let index = name.index * FANOUT as u64 + slot as u64;
                    job.dropped.push((
                        PageName {
                            level: name.level - 1,
                            index,
                        },
                        entry,
                    ));
                }
            }
        }
        Step::Done
    }

    // ---- table ----------------------------------------------------------------------------------------------------

    fn write_table(&mut self, job: &mut Job) -> Step {
        if job.next.is_some() {
            return Step::Wait;
        }
        // One more than there are: the room for the table may take a segment.
        let most = (self.segments.used().len() + 1).div_ceil(FANOUT);
        match self.meta_room(job, most + most.div_ceil(FANOUT)) {
            Step::Done => {}
            other => return other,
        }
        for location in &self.superblock_table_pages {
            *job.live.entry(location.segment()).or_default() -= 1;
        }
        // The table counts its own pages too, and leaves out segments that this checkpoint frees. Those are closed
        // ones, so where its pages go does not change which they are.
        let home = job.meta.expect("there is room").segment;
        let freed = self.freed_by(job);
        let replay = self
            .frozen
            .as_ref()
            .expect("a checkpoint has a frozen table")
            .position
            .log_index;
        let listed: Vec<(SegmentId, Used)> = self
            .segments
            .used()
            .iter()
            .filter(|(id, _)| !freed.contains(id))
            // What the log took since the freeze is found by replaying it.
            .filter(|(_, used)| used.kind != SegmentKind::Data || used.log_index <= replay)
            .map(|(id, used)| (*id, *used))
            .collect();
        let pages = listed.len().div_ceil(FANOUT);
        let own = (pages + pages.div_ceil(FANOUT)) as i64;
        let rows: Vec<Entry> = listed
            .iter()
            .map(|(id, used)| {
                let delta = job.live.get(id).copied().unwrap_or(0) + if *id == home { own } else { 0 };
                let live = u32::try_from(i64::from(used.live) + delta).expect("a segment's live count stays in range");
                row(*id, &Used { live, ..*used })
            })
            .collect();
        let pointers = self.write_table_pages(job, PageKind::Table, &rows);
        let index = self.write_table_pages(job, PageKind::TableIndex, &pointers);
        debug_assert_eq!(job.table_pages.len() as i64, own);
        self.flush_pages(job);

        let frozen = self.frozen.as_ref().expect("a checkpoint has a frozen table");
        let mut next = self.superblock.clone();
        next.generation += 1;
        next.checkpoint = Checkpoint {
            number: job.number,
            size_blocks: job.size_blocks,
            height: job.height,
            root: job.root,
            replay: frozen.position,
            table: index,
            meta: job.meta,
            moved: frozen.moved,
        };
        // Replay starts behind the epochs that ended before this position.
        let replay_epoch = frozen.position.last.epoch;
        next.epoch_ends.retain(|end| end.last >= replay_epoch);
        next.clean = self.closing && self.active.is_empty() && frozen.position == self.log.position;
        job.next = Some(next);
        Step::Done
    }

    /// Writes entries as pages of the segment table; returns pointers to them.
    fn write_table_pages(&mut self, job: &mut Job, kind: PageKind, entries: &[Entry]) -> Vec<Entry> {
        let replica = self.superblock.geometry.identity.replica;
        let mut pointers = Vec::with_capacity(entries.len().div_ceil(FANOUT));
        for (index, chunk) in entries.chunks(FANOUT).enumerate() {
            let name = PageName {
                level: 0,
                index: index as u64,
            };
            let page = Page::encode(kind, name, replica, job.number, chunk);
            let location = self.place(job, &page);
            job.table_pages.push(location);
            pointers.push(Entry {
                location,
                version: Version::default(),
                check: page.check(),
            });
        }
        pointers
    }

    /// Segments that this checkpoint leaves without anything needed in them.
    fn freed_by(&self, job: &Job) -> BTreeSet<SegmentId> {
        let frozen = self.frozen.as_ref().expect("a checkpoint has a frozen table");
        let open = [job.meta, frozen.moved]
            .into_iter()
            .flatten()
            .map(|at| at.segment)
            .collect::<BTreeSet<_>>();
        let mut candidates: Vec<SegmentId> = frozen.closed.iter().copied().collect();
        // The meta segment that this checkpoint went past, and those it took and filled.
        candidates.extend(self.superblock.checkpoint.meta.map(|at| at.segment));
        candidates.retain(|id| !open.contains(id));
        candidates
            .into_iter()
            .filter(|id| {
                let live = self.segments.get(*id).map(|used| i64::from(used.live));
                live.is_some_and(|live| live + job.live.get(id).copied().unwrap_or(0) == 0)
            })
            .collect()
    }

    // ---- sync, superblocks, commit --------------------------------------------------------------------------------

    /// Once the pages are written and the log is durable up to the freeze: sync, then the superblocks.
    pub(super) fn maybe_sync_checkpoint(&mut self) {
        let durable = self.log.durable;
        let Some(job) = self.job.as_mut() else { return };
        let ready = matches!(job.phase, Phase::Table) && job.next.is_some() && job.writes_out == 0;
        let frozen = self.frozen.as_ref().expect("a checkpoint has a frozen table");
        if !ready || durable < frozen.position.last {
            return;
        }
        let files: BTreeSet<SegmentId> = job.dirty.iter().chain(&frozen.moved_dirty).copied().collect();
        job.phase = Phase::Sync {
            outstanding: files.len(),
        };
        for segment in files {
            self.issue(
                Io::Sync {
                    file: FileId::Segment(segment),
                },
                Purpose::CheckpointSync,
            );
        }
    }

    pub(super) fn checkpoint_synced(&mut self) {
        let job = self.job.as_mut().expect("a sync belongs to a checkpoint");
        let Phase::Sync { outstanding } = &mut job.phase else {
            unreachable!("syncs end in the sync phase")
        };
        *outstanding -= 1;
        if *outstanding == 0 {
            job.phase = Phase::Superblocks;
            self.write_superblock(0);
        }
    }

    fn write_superblock(&mut self, slot: u8) {
        let job = self.job.as_ref().expect("superblocks belong to a checkpoint");
        let bytes = job.next.as_ref().expect("it was made before the sync").encode();
        let io = Io::Write {
            file: FileId::Superblock(slot),
            offset: 0,
            parts: vec![bytes],
        };
        self.issue(io, Purpose::Superblock { slot, synced: false });
    }

    pub(super) fn superblock_done(&mut self, slot: u8, synced: bool) {
        match (slot, synced) {
            (slot, false) => {
                self.issue(
                    Io::Sync {
                        file: FileId::Superblock(slot),
                    },
                    Purpose::Superblock { slot, synced: true },
                );
            }
            (0, true) => self.write_superblock(1),
            (_, true) => self.commit(),
        }
    }

    fn commit(&mut self) {
        let job = *self.job.take().expect("a commit belongs to a checkpoint");
        let freed = self.freed_by(&job);
        let frozen = self.frozen.take().expect("a checkpoint has a frozen table");
        self.superblock = job.next.expect("it was written");
        self.superblock_table_pages = job.table_pages;
        self.map.root = job.root;
        self.map.height = job.height;
        for (id, delta) in job.live {
            self.segments.add_live(id, delta);
        }
        let meta_open = job.meta.map(|at| at.segment);
        let metas: Vec<SegmentId> = self
            .segments
            .used()
            .iter()
            .filter(|(id, used)| used.kind == SegmentKind::Meta && used.open && Some(**id) != meta_open)
            .map(|(id, _)| *id)
            .collect();
        for id in metas {
            self.segments.close(id);
        }
        for id in freed {
            self.map.forget(id);
            self.segments.release(id);
        }
        let segments = &self.segments;
        self.cleaner
            .committed(&frozen.moved_dirty, |id| segments.get(id).is_some());
        self.stats.checkpoints += 1;
        if let Some(size) = self.grow_to.filter(|size| *size <= self.size_blocks()) {
            self.grow_to = None;
            self.events.push_back(Event::Grown(size));
        } else if self.grow_to.is_some() {
            self.checkpoint_wanted = true;
        }
        self.background_due = true;
    }
}

/// Counts a block or page as needed once more or once less.
fn count(live: &mut BTreeMap<SegmentId, i64>, entry: Entry, delta: i64) {
    if !entry.location.is_none() {
        *live.entry(entry.location.segment()).or_default() += delta;
    }
}
