//! Free segments: made ahead of need, kept for reuse, given back.
//!
//! A writer must never wait for a file to be made, and writes into a file that was filled before. Making one costs the
//! file system a commit of its journal or two, and then each write into a fresh file costs it metadata: 8 KiB at a time,
//! a direct write into blocks that were only set aside took 65 us and one over written blocks 40 us, and a sync behind
//! each of them 1130 to 1390 us against 890 us (ext4 on a busy disk). This engine on such a file: synced writes of one
//! block took 145 to 220 us while its segments were fresh, and 95 to 130 us once it had filled them, 20 ms each. So
//!
//! - what was written once is kept and used again first, as much as the log takes between checkpoints;
//! - some segments are made ahead, more after the log had to wait for one;
//! - fresh ones are filled with zeros in the background, while the log is written in pieces so small that it gains more
//!   than that costs. A long sequential writer would only lose half of the disk to it.
//!
//! All of that within what the replica may take of its [pool](super::share): free segments beyond it go back at once, and
//! all but a few once nobody writes any more.

use super::checkpoint::{DELETED_PAGES_FULL, Frozen};
use super::log::Log;
use super::page::FANOUT;
use super::segment::pages_per_segment;
use super::{Purpose, Store};
use crate::buffer::{Buf, BufMut};
use crate::io::{FileId, Io, SegmentId};
use crate::types::{BlockSize, PAGE_BYTES};

/// Segments kept beside those for the next checkpoint's pages: one for moved blocks, one for zeroes on a full disk,
/// one for the table of segments.
pub(super) const RESERVE_SEGMENTS: usize = 3;
/// Segments that guest writes may take beyond what the cleaner tries to keep to, before they wait for it.
pub(super) const LIMIT_SEGMENTS: usize = 6;
/// Files that are being made at a time: enough that the driver never waits for us.
const CREATING_MAX: usize = 4;
/// Free segments beyond the reserve, once a volume has filled its first segment.
const AHEAD_QUIET: usize = 2;
const AHEAD: usize = 4;
const AHEAD_MAX: u64 = 16;
const AHEAD_BYTES_MAX: u64 = 512 << 20;
/// Free segments kept beyond that, so that steady overwriting does not make and remove files all the time.
const SURPLUS_QUIET: usize = 2;
const SURPLUS_MIN: usize = 8;
const SURPLUS_MAX: usize = 256;
const SURPLUS_DIVISOR: u64 = 8;
/// What the cleaner gives back besides.
const CLEANED_AT_ONCE: u64 = 8;

/// Zeros written in one operation while a segment is filled: some hundred microseconds of a disk's time, which a guest's
/// operation may have to wait for.
const FILL_BYTES: u64 = 256 << 10;
const FILL_PART_BYTES: u64 = 64 << 10;
/// A record into a fresh segment costs about as much more as zeroing so many bytes, and a sync as so many records.
const RECORD_WORTH_BYTES: u64 = 32 << 10;
const SYNC_WORTH_RECORDS: u64 = 8;
/// Before so many records (or what they are worth) in a segment nothing is known about the writer.
const WORTH_MIN: u64 = 64;

/// What is under way to have segments ready.
#[derive(Debug)]
pub struct Supply {
    /// Segments that guest writes leave alone, when that was looked at last.
    pub(super) reserve: usize,
    /// Free segments wanted beyond the reserve.
    ahead: usize,
    /// The log waits for a segment.
    starving: bool,
    filling: Option<Filling>,
}

#[derive(Debug)]
struct Filling {
    segment: SegmentId,
    /// Next byte to write.
    at: u64,
    zeros: Buf,
}

impl Default for Supply {
    fn default() -> Supply {
        Supply {
            reserve: 0,
            ahead: 1,
            starving: false,
            filling: None,
        }
    }
}

/// Most pages that merging `rows` scattered rows writes, in a volume of so many blocks: on each level no more than there
/// are. Some for the segment table and the rest come on top. The leaves of a sealed volume take two blocks each.
fn pages_max(rows: u64, size_blocks: u64, leaf_pages: u64) -> u64 {
    let (mut pages, mut on_level, mut each) = (16, size_blocks, leaf_pages);
    while on_level > 1 {
        on_level = on_level.div_ceil(FANOUT as u64);
        pages += rows.min(on_level) * each;
        each = 1;
    }
    pages
}

/// Bytes without which a replica that has what it was promised, and no more, does badly, with so many rows between two
/// checkpoints: the cleaner needs some space to win space in, a fifth of the volume, and the reserve comes on top.
pub(super) fn bytes_min(size: u64, block_size: BlockSize, segment_bytes: u64, rows: u64, leaf_pages: u64) -> u64 {
    let size_blocks = size.div_ceil(block_size.bytes());
    let capacity = pages_per_segment(segment_bytes);
    let reserve = RESERVE_SEGMENTS as u64 + pages_max(rows + 2 * capacity, size_blocks, leaf_pages).div_ceil(capacity);
    // A checkpoint and the cleaner each may hold one more while the reserve is made anew.
    size / 5 * 6 + (reserve + LIMIT_SEGMENTS as u64 + 3) * segment_bytes
}

impl Store {
    /// Segments that guest writes leave alone: for the pages of the next checkpoint, for the cleaner, and one for
    /// zeroes, so that trimming works on a full disk.
    ///
    /// The log fills its segment without asking again, so what still fits into that counts as written, and so does what
    /// the cleaner may move out of its next victim.
    pub(super) fn reserve_target(&self) -> usize {
        let rows = self.recent.rows() + self.frozen.as_ref().map_or(0, Frozen::rows) + self.cleaner.rows();
        let segment_bytes = self.superblock.geometry.segment_bytes;
        let victim = pages_per_segment(segment_bytes);
        let to_come = (segment_bytes - self.log.position.offset) / PAGE_BYTES + victim;
        let size_blocks = self.size_blocks().max(self.grow_to.unwrap_or(0));
        let leaf_pages = self.seals.leaf_pages();
        let mut pages = pages_max(rows as u64 + to_come, size_blocks, leaf_pages);
        if !self.recent.catalog.is_empty() {
            // What is replaced goes into the table of a snapshot, leaf by leaf; zeroes may move whole subtrees there, at
            // most as many pages as there are.
            let zeroed = self.recent.zeroed_blocks() + self.frozen.as_ref().map_or(0, Frozen::zeroed_blocks);
            let moved = (zeroed / FANOUT as u64 * leaf_pages).min(self.segments.live_pages());
            let snapshots = self.recent.catalog.page_count() as u64;
            pages += pages + moved + snapshots + DELETED_PAGES_FULL as u64;
        }
        RESERVE_SEGMENTS + pages.div_ceil(pages_per_segment(segment_bytes)) as usize
    }

    /// Makes segments ahead of need, fills them, and gives surplus ones back to the pool.
    pub(super) fn keep_segments(&mut self) {
        self.supply.reserve = self.reserve_target();
        let target = self.supply.reserve + self.ahead();
        while self.segments.free_count() + self.segments.coming_count() < target
            && !self.segments.exhausted
            && self.segments.creating_count() < CREATING_MAX
            && (!self.closing || self.job.is_some())
        {
            let id = self.segments.begin_create();
            self.create_segment(id);
        }
        while let Some(id) = self.segments.begin_unlink() {
            let file = FileId::Segment(id);
            self.issue(Io::Remove { file }, Purpose::RemoveSegment(id));
        }
        let kept = (target + self.surplus()).min(self.free_max().max(target));
        while self.segments.free_count() > kept {
            let id = self.segments.begin_remove().expect("there are free ones");
            let file = FileId::Segment(id);
            self.issue(Io::Remove { file }, Purpose::RemoveSegment(id));
        }
        self.fill();
    }

    pub(super) fn create_segment(&mut self, id: SegmentId) {
        let (file, len) = (FileId::Segment(id), self.superblock.geometry.segment_bytes);
        self.issue(Io::Create { file, len }, Purpose::CreateSegment(id));
    }

    /// Free segments wanted beyond the reserve: no more than may be there.
    fn ahead(&self) -> usize {
        let ahead = if self.is_quiet() {
            self.supply.ahead.min(AHEAD_QUIET)
        } else {
            self.supply.ahead
        };
        ahead.min(self.free_max().saturating_sub(self.supply.reserve))
    }

    /// Free segments that there may be beside those that are in use.
    fn free_max(&self) -> usize {
        let segment_bytes = self.superblock.geometry.segment_bytes;
        let in_use = self.own_bytes() - self.segments.free_count() as u64 * segment_bytes;
        (self.limit_bytes().saturating_sub(in_use) / segment_bytes) as usize
    }

    fn surplus(&self) -> usize {
        if self.is_quiet() {
            return SURPLUS_QUIET;
        }
        // A checkpoint frees about what the log took since the last one, all at once.
        let cycle = self.options.tail_segments_max + CLEANED_AT_ONCE;
        let volume = self.size_bytes() / self.superblock.geometry.segment_bytes;
        let segments = cycle.min(volume / 2).max(volume / SURPLUS_DIVISOR);
        (segments as usize).clamp(SURPLUS_MIN, SURPLUS_MAX)
    }

    /// The log went on to its next segment.
    pub(super) fn segment_taken(&mut self) {
        let supply = &mut self.supply;
        supply.starving = false;
        supply.ahead = supply.ahead.max(AHEAD);
    }

    /// The log has to wait for a segment. If the pool has them, it shall not happen to this writer again.
    pub(super) fn segment_missing(&mut self) {
        if !std::mem::replace(&mut self.supply.starving, true) {
            let most = (AHEAD_BYTES_MAX / self.superblock.geometry.segment_bytes).min(AHEAD_MAX);
            self.supply.ahead = (self.supply.ahead * 2).min(most as usize);
        }
        self.keep_segments();
    }

    /// Fills fresh segments while that pays, one at a time, and never one that somebody may need before it is done.
    fn fill(&mut self) {
        let spare = self.segments.free_count() > self.supply.reserve + 1 && !self.segments.exhausted;
        if self.supply.filling.is_some() || !spare || self.closing || !self.log.gains_from_filling() {
            return;
        }
        let Some(segment) = self.segments.begin_fill() else {
            return;
        };
        self.supply.filling = Some(Filling {
            segment,
            at: 0,
            zeros: BufMut::zeroed(FILL_PART_BYTES as usize).freeze(),
        });
        self.fill_on();
    }

    fn fill_on(&mut self) {
        let segment_bytes = self.superblock.geometry.segment_bytes;
        let filling = self.supply.filling.as_mut().expect("a segment is being filled");
        let (file, offset) = (FileId::Segment(filling.segment), filling.at);
        if offset == segment_bytes {
            // Its metadata is not to be paid for by the guest's next sync.
            self.issue(Io::Sync { file }, Purpose::FillSync);
            return;
        }
        let end = segment_bytes.min(offset + FILL_BYTES);
        let mut parts = Vec::with_capacity((FILL_BYTES / FILL_PART_BYTES) as usize);
        while filling.at < end {
            let len = (end - filling.at).min(FILL_PART_BYTES);
            parts.push(filling.zeros.slice(0..len as usize));
            filling.at += len;
        }
        self.issue(Io::Write { file, offset, parts }, Purpose::FillWrite);
    }

    pub(super) fn fill_written(&mut self) {
        // Somebody may need it more than it needs to be full.
        if self.closing || self.supply.starving || self.segments.free_count() < self.supply.reserve {
            self.end_fill(false);
        } else {
            self.fill_on();
        }
    }

    pub(super) fn end_fill(&mut self, whole: bool) {
        self.supply.filling = None;
        self.segments.end_fill(whole);
    }
}

impl Log {
    /// True while the log is written in pieces that would gain more from written segments than filling those costs.
    fn gains_from_filling(&self) -> bool {
        let worth = self.records + self.syncs * SYNC_WORTH_RECORDS;
        worth >= WORTH_MIN && worth * RECORD_WORTH_BYTES > self.position.offset
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::store::recovery::segment_bytes_for;
    use crate::store::share::promised_bytes;

    #[test]
    fn what_placement_sets_aside_is_enough_to_clean_in() {
        let (rows, leaf_pages) = (128 << 10, 2);
        for mib in (16..=4096).step_by(16).chain((4096..=16 << 20).step_by(4096)) {
            let size = mib << 20;
            for block_size in BlockSize::ALL {
                let segment_bytes = segment_bytes_for(size, block_size);
                let least = bytes_min(size, block_size, segment_bytes, rows, leaf_pages);
                assert!(
                    least <= promised_bytes(size),
                    "{mib} MiB of {block_size:?} in segments of {segment_bytes}: {least} > {}",
                    promised_bytes(size)
                );
            }
        }
    }

    #[test]
    fn larger_volumes_have_larger_segments() {
        let at = |mib: u64| segment_bytes_for(mib << 20, BlockSize::K4) >> 20;
        assert_eq!(
            [at(16), at(1 << 10), at(2 << 10), at(64 << 10), at(16 << 20)],
            [4, 8, 8, 64, 64]
        );
    }

    #[test]
    fn scattered_rows_change_at_most_every_page_of_each_level() {
        assert_eq!(pages_max(1_000_000, 168 * 168, 1), 16 + 168 + 1);
        assert_eq!(pages_max(10, 1 << 28, 1), 16 + 10 + 10 + 10 + 1);
    }
}
