//! When the cleaner works, on what, and how fast.
//!
//! Cleaning is paid for by the guest's own writes: for each byte that goes into the log the cleaner may go through so
//! many bytes of old segments, and the fewer segments the log may still take, the more. So the work is spread evenly
//! over the writes that cause it, and settles where as much comes back as goes out:
//!
//! ```text
//! segments left   2 T      T       T/2     T/4     0
//! bytes per byte   0       2        6       14     as many as it takes: the guest waits
//! ```
//!
//! What is left is counted against two bounds: what the replica may take of its [pool](super::share), and, where there is
//! plenty, about as much that is dead as is needed. A segment that was cleaned comes back with the next checkpoint, which
//! is made when hardly any other is left: a checkpoint writes each page of the map at most once, so few large ones write
//! less than many small ones. `T` weighs that against the space that waits meanwhile.
//!
//! A volume that nobody writes to gives back what it does not need: every segment of which a quarter is dead is cleaned,
//! and free ones are removed. Then it waits for nothing.
//!
//! Segments are chosen as in a log-structured file system (Rosenblum and Ousterhout 1992): what comes back, times how
//! long what stays has been there, by what it costs. Old blocks live longer, so they are worth moving out of a segment
//! that is not quite empty; young ones are about to be overwritten where they are. Blocks that were moved have the age of
//! the segment that they came from, and a stream of their own, so that what is rarely written comes to lie together.

use super::Store;
use super::segment::{SegmentKind, Used, pages_per_segment};
use super::turn::ROW;
use crate::io::SegmentId;

/// Part of the volume that may wait for a checkpoint as dead or free segments.
const TARGET_DIVISOR: u64 = 20;
const TARGET_SEGMENTS_MIN: u64 = 3;
/// So many segments are left when those that were cleaned are wanted back.
const COMMIT_SEGMENTS: i64 = 1;
/// Segments that the log may take beyond twice what is needed, in a small volume.
const LOOSE_SEGMENTS: i64 = 8;
/// Bytes that the cleaner may go through for each byte that the log has taken, at most.
const BYTES_PER_BYTE_MAX: u64 = 32;
/// What it may have saved up while a checkpoint was made, as part of a segment.
const CREDIT_DIVISOR: i64 = 2;
/// The guest has written so much before its pace is looked at again.
const LOOK_AGAIN_BYTES: u64 = 256 << 10;
/// A segment is cleaned although little is left in the pool only if so many hundredths of it come back.
const DEAD_PERCENT_MIN: u64 = 5;
/// The same while nobody writes.
const DEAD_PERCENT_QUIET: u64 = 25;
/// Segments that are looked at at a time in search of one to clean.
const SEARCH_PIECE: usize = 64;
/// A volume is quiet while it writes less than this part of a segment within the pause that makes a checkpoint.
const QUIET_DIVISOR: u64 = 4;

/// What the cleaner may do, and why.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Pressure {
    /// There is nothing to win that anybody needs.
    None,
    /// Nobody writes: whatever is worth it, one operation after the other.
    Quiet,
    /// The replica has more than its share of the pool, and others want it: whatever is worth it, one operation after the
    /// other, whoever writes.
    Owing,
    /// As much as the guest's writes pay for: this many hundredths of a byte for each of them.
    Paced(u64),
    /// The guest waits for space.
    Waiting,
}

/// The accounts of the cleaner.
#[derive(Debug, Default)]
pub(super) struct Pace {
    /// Bytes of old segments that it may go through.
    credit: i64,
    /// What the guest had written when that was looked at last.
    seen_bytes: u64,
    /// The guest had written so much then, and hardly more since.
    quiet_bytes: u64,
    quiet_since_ms: u64,
    /// The pool was full when the replica had so many bytes of its own, and no segment was made since.
    pub full_at_bytes: Option<u64>,
    /// Nothing is left to be done for a volume that nobody writes to.
    pub settled: bool,
}

impl Store {
    /// Segments that the log may take before the guest has to wait, free ones included.
    fn room_left(&self) -> i64 {
        self.room_within(self.limit_bytes())
    }

    /// The same for a replica that may take so many bytes.
    fn room_within(&self, bytes: u64) -> i64 {
        let free = self.segments.free_count() as i64 - self.reserve_target() as i64;
        let most = self.pace.full_at_bytes.map_or(bytes, |full| full.min(bytes));
        let segment_bytes = self.superblock.geometry.segment_bytes;
        free + (most / segment_bytes) as i64 - (self.own_bytes() / segment_bytes) as i64
    }

    /// True while the replica has more than it should, and free segments alone do not make up for it.
    fn owes(&self) -> bool {
        self.room_within(self.fair_limit_bytes()) <= 0
    }

    /// Segments that the log may take before as much is dead as is needed. What it took since the last checkpoint is not
    /// counted yet.
    fn loose_left(&self) -> i64 {
        let needed = self.segments.live_bytes() / self.superblock.geometry.segment_bytes;
        let uncounted = self.log.position.log_index - self.superblock.checkpoint.replay.log_index + 1;
        2 * needed as i64 + LOOSE_SEGMENTS + uncounted as i64 - self.segments.used().len() as i64
    }

    /// Segments that should be left, cleaned ones included, so that a checkpoint now and then suffices.
    pub(super) fn target(&self) -> i64 {
        let volume = self.segments.live_bytes() / self.superblock.geometry.segment_bytes;
        (volume / TARGET_DIVISOR).max(TARGET_SEGMENTS_MIN) as i64
    }

    /// True while the log holds so much more than the volume that guest writes should wait for the cleaner.
    pub(super) fn over_limit(&mut self) -> bool {
        !self.segments.exhausted && self.room_left() <= 0 && self.reclaimable()
    }

    /// Why there is something to clean, if there is.
    pub(super) fn pressure(&self) -> Pressure {
        let room = self.room_left();
        if room <= 0 {
            return Pressure::Waiting;
        }
        if self.is_quiet() {
            return Pressure::Quiet;
        }
        if self.owes() {
            return Pressure::Owing;
        }
        let left = room.min(self.loose_left()) + self.cleaner.cleaned_count() as i64;
        let target = self.target();
        if left >= 2 * target {
            return Pressure::None;
        }
        let percent = 400 * target as u64 / left.max(1) as u64;
        Pressure::Paced(percent.saturating_sub(200).min(BYTES_PER_BYTE_MAX * 100))
    }

    /// Hardly any segment is left but those that were cleaned: they are wanted back. While there are few of these, the
    /// cleaner rather takes from the reserve: a checkpoint costs the same for one segment as for many, and one that costs
    /// more space than it gives back is the first of an endless row.
    pub(super) fn commit_is_due(&self) -> bool {
        let cleaned = self.cleaner.cleaned_count() as i64;
        let reserved = self.segments.free_count() + 1 >= self.reserve_target();
        if reserved && cleaned < self.target() / 2 {
            return false;
        }
        self.cleaner.rows() >= self.options.memtable_rows_max
            || self.owes()
            || self.room_left().min(self.loose_left()) <= COMMIT_SEGMENTS
    }

    /// Lets the guest's writes pay for the cleaner's next step; true if they do.
    pub(super) fn may_clean(&mut self, pressure: Pressure) -> bool {
        let written = self.stats.written_bytes;
        let fresh = written - self.pace.seen_bytes;
        match pressure {
            Pressure::None => {
                self.pace.seen_bytes = written;
                false
            }
            Pressure::Quiet | Pressure::Owing | Pressure::Waiting => {
                self.pace.seen_bytes = written;
                true
            }
            Pressure::Paced(percent) => {
                if fresh >= LOOK_AGAIN_BYTES {
                    self.pace.seen_bytes = written;
                    let most = self.superblock.geometry.segment_bytes as i64 / CREDIT_DIVISOR;
                    self.pace.credit = self.pace.credit.min(most) + (fresh / 100 * percent) as i64;
                }
                self.pace.credit > 0
            }
        }
    }

    /// The cleaner went through so many bytes.
    pub(super) fn cleaner_spent(&mut self, bytes: u64) {
        let least = -(self.superblock.geometry.segment_bytes as i64);
        self.pace.credit = (self.pace.credit - bytes as i64).max(least);
    }

    /// True while nobody writes, or hardly anybody.
    pub(super) fn is_quiet(&self) -> bool {
        self.now_ms >= self.quiet_at_ms() && !self.is_busy_writing()
    }

    fn is_busy_writing(&self) -> bool {
        let written = self.stats.written_bytes - self.pace.quiet_bytes;
        written >= self.superblock.geometry.segment_bytes / QUIET_DIVISOR
    }

    fn quiet_at_ms(&self) -> u64 {
        self.pace.quiet_since_ms + self.options.idle_checkpoint_ms
    }

    /// Notices that the guest writes, or that it has stopped.
    pub(super) fn watch_guest(&mut self) {
        if self.is_busy_writing() {
            self.pace.quiet_bytes = self.stats.written_bytes;
            self.pace.quiet_since_ms = self.now_ms;
        } else if self.is_quiet() && !self.pace.settled {
            self.cleaner.look();
        }
    }

    /// When a volume that nobody writes to has to be looked at.
    pub(super) fn quiet_tick_ms(&self) -> Option<u64> {
        (!self.pace.settled && !self.is_quiet()).then(|| self.quiet_at_ms())
    }

    /// What cleaning a segment is worth, if it is.
    fn worth(&self, id: SegmentId, used: &Used, pressure: Pressure) -> Option<f64> {
        let closed = match used.kind {
            SegmentKind::Data => !used.open && used.log_index < self.superblock.checkpoint.replay.log_index,
            SegmentKind::Moved | SegmentKind::Meta | SegmentKind::Linked => !used.open,
        };
        if !closed || !self.cleaner.may_take(id) {
            return None;
        }
        let capacity = pages_per_segment(self.superblock.geometry.segment_bytes);
        let live = u64::from(used.live).min(capacity);
        let dead = capacity - live;
        // Pages are written anew all the time: what is left of them is soon dead by itself.
        let patient = used.kind == SegmentKind::Meta && pressure != Pressure::Waiting;
        let percent = match pressure {
            _ if patient => 50,
            Pressure::Quiet => DEAD_PERCENT_QUIET,
            Pressure::None | Pressure::Owing | Pressure::Paced(_) | Pressure::Waiting => DEAD_PERCENT_MIN,
        };
        if dead < (capacity * percent / 100).max(1) {
            return None;
        }
        let now = self.log.position.log_index;
        let age = match used.kind {
            SegmentKind::Data | SegmentKind::Moved => now.saturating_sub(used.log_index) + 1,
            SegmentKind::Meta => 1,
            SegmentKind::Linked => now + 1,
        };
        Some(score(dead, live, age))
    }

    /// True if there is a segment that is worth cleaning.
    pub(super) fn has_victim(&self, pressure: Pressure) -> bool {
        let mut used = self.segments.used().iter();
        used.any(|(id, used)| self.worth(*id, used, pressure).is_some())
    }

    /// Looks for the segment to clean next as long as the turn goes on; `None` while it has not looked at all of them.
    pub(super) fn look_for_victim(&mut self, pressure: Pressure) -> Option<Option<SegmentId>> {
        let mut search = self.cleaner.search.take().unwrap_or_else(|| Search::new(pressure));
        loop {
            let mut last = None;
            for (id, used) in self.segments.used().range(search.next..).take(SEARCH_PIECE) {
                let worth = self.worth(*id, used, search.pressure).map(|worth| (worth, *id));
                // Of equals the lowest number.
                let best = [search.best, worth].into_iter().flatten();
                search.best = best.max_by(|(one, a), (other, b)| one.total_cmp(other).then(b.cmp(a)));
                last = Some(*id);
            }
            let Some(last) = last else { break };
            search.next = SegmentId(last.0.saturating_add(1));
            self.turn.spend(SEARCH_PIECE as u32 / 4 * ROW);
            if !self.turn.goes_on() {
                self.cleaner.search = Some(search);
                return None;
            }
        }
        // A checkpoint may have come in between.
        let is_worth = |id: &SegmentId| {
            let used = self.segments.get(*id);
            used.is_some_and(|used| self.worth(*id, used, search.pressure).is_some())
        };
        match search.best.map(|(_, id)| id) {
            Some(id) if !is_worth(&id) => None,
            best => Some(best),
        }
    }
}

/// Looking for the segment to clean next: a piece at a time, because there may be a great many.
#[derive(Debug)]
pub(super) struct Search {
    pressure: Pressure,
    next: SegmentId,
    best: Option<(f64, SegmentId)>,
}

impl Search {
    fn new(pressure: Pressure) -> Search {
        Search {
            pressure,
            next: SegmentId(0),
            best: None,
        }
    }
}

/// What cleaning a segment gives by what it costs: reading it, and writing what is needed.
fn score(dead: u64, live: u64, age: u64) -> f64 {
    let capacity = (dead + live) as f64;
    // With the age itself, old segments that are nearly full go before young ones that are nearly empty. Uniform writes
    // then cost 3.5 bytes moved for each byte where this costs 2.9; writes of which four fifths go to a fifth of the
    // volume cost no less.
    dead as f64 * (age as f64).cbrt() / (capacity + live as f64)
}
