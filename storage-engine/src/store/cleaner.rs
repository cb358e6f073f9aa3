//! Cleaning: what is still needed of a segment that is mostly dead moves elsewhere, and the next checkpoint frees it.
//!
//! A moved block keeps its bytes, version and check. Where its copy lies is noted, and the next checkpoint lets whoever
//! needs it, the map or the table of a snapshot, point there; until then the old place serves. A page does not move: it is
//! marked, and the next checkpoint writes it anew. The cleaner and a checkpoint never run at the same time, so who needs a
//! block does not change in between.

use std::collections::{BTreeMap, BTreeSet, VecDeque};

use super::checkpoint::Relocated;
use super::page::{Page, PageKind, PageName, TreeId};
use super::read::Waiter;
use super::record::{Body, HEADER_BYTES, HEADER_BYTES_MAX, Header, MOVED_MAX, MovedBlock, Seals, record_bytes};
use super::segment::{SEGMENT_HEADER_BYTES, SegmentHeader, SegmentKind, Used, blocks_per_segment};
use super::snapshot::Holder;
use super::superblock::StreamPosition;
use super::supply::LIMIT_SEGMENTS;
use super::{Purpose, Store};
use crate::buffer::{Buf, BufMut};
use crate::io::{FileId, Io, IoFailure, SegmentId};
use crate::types::{BLOCK_BYTES, Epoch, Lba, Location, Seq, Version};

/// Candidates looked at in one turn.
const CANDIDATES_PER_TURN: usize = 256;
/// Segments cleaned before a checkpoint is asked for, when nobody waits for space.
const SEGMENTS_PER_CHECKPOINT: usize = 8;

/// Pages to be written anew: their tree, a block below each, and their level.
pub type Touched = BTreeSet<(TreeId, Lba, u8)>;
/// Blocks that lie elsewhere now, by who needs them.
pub type Moves = BTreeMap<(TreeId, Lba), Relocated>;

/// The cleaner of a store.
#[derive(Debug, Default)]
pub struct Cleaner {
    stream: Option<StreamPosition>,
    dirty: BTreeSet<SegmentId>,
    touched: Touched,
    relocated: Moves,
    /// Something happened that may make a segment worth cleaning: a commit, a full pool. Looking costs a walk over all
    /// segments, too much to do it after every request.
    due: bool,
    work: Option<Work>,
    /// The last victim was given up because a full pool had no segment for what is needed of it: cleaning gives nothing
    /// back until a checkpoint does, or the pool.
    starved: bool,
    cleaned: usize,
    /// Cleaned, waiting for the checkpoint that frees them.
    skip: BTreeSet<SegmentId>,
    /// Cleaned, and still needed after the checkpoint: something in them is damaged.
    stuck: BTreeSet<SegmentId>,
}

#[derive(Debug)]
struct Work {
    victim: SegmentId,
    kind: SegmentKind,
    /// Next byte to read.
    at: u64,
    candidates: VecDeque<Candidate>,
    batch: Vec<Moving>,
    /// How many of the batch are being written.
    writing: usize,
    state: State,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum State {
    Reading,
    Sifting,
    WaitingForPage,
    WaitingForSegment,
    Writing,
}

/// A block on its way to another segment.
#[derive(Debug)]
struct Moving {
    block: MovedBlock,
    holder: TreeId,
    from: Location,
    bytes: Buf,
}

#[derive(Debug)]
enum Candidate {
    Block(MovedBlock, Location, Buf),
    Page(PageName, Location),
}

impl Cleaner {
    pub fn new(stream: Option<StreamPosition>) -> Cleaner {
        Cleaner {
            stream,
            due: true,
            ..Cleaner::default()
        }
    }

    pub fn is_busy(&self) -> bool {
        self.work.is_some()
    }

    /// Entries of the map that the next checkpoint changes for it.
    pub fn rows(&self) -> usize {
        self.touched.len() + self.relocated.len()
    }

    /// What the next checkpoint has to do for it: pages to write anew, and blocks that lie elsewhere.
    pub fn take_work(&mut self) -> (Touched, Moves) {
        (std::mem::take(&mut self.touched), std::mem::take(&mut self.relocated))
    }

    pub fn stream(&self) -> (Option<StreamPosition>, BTreeSet<SegmentId>) {
        (self.stream, self.dirty.clone())
    }

    /// A checkpoint that synced these segments is committed; `used` tells which segments it left in use.
    pub fn committed(&mut self, synced: &BTreeSet<SegmentId>, used: impl Fn(SegmentId) -> bool) {
        self.due = true;
        self.starved = false;
        self.dirty.retain(|segment| !synced.contains(segment));
        let cleaned = std::mem::take(&mut self.skip);
        self.stuck.retain(|segment| used(*segment));
        self.stuck.extend(cleaned.into_iter().filter(|segment| used(*segment)));
        self.cleaned = 0;
    }
}

impl Store {
    /// True if cleaning or a checkpoint can be expected to give space back.
    pub(super) fn reclaimable(&mut self) -> bool {
        if self.frozen.is_none() && !self.recent.is_empty() {
            self.checkpoint_wanted = true;
            self.background_due = true;
            return true;
        }
        if self.job.is_some() || self.cleaner.is_busy() {
            return true;
        }
        if self.cleaner.starved && self.segments.exhausted {
            return false;
        }
        self.cleaner.due = true;
        let some = self.frozen.is_none() && self.victim(10).is_some();
        self.background_due |= some;
        some
    }

    /// True while the log holds so much more than the volume that guest writes should wait for the cleaner: a replica
    /// stays within a fifth more than its volume and 80 MiB, which is what placement sets aside for it.
    pub(super) fn over_limit(&mut self) -> bool {
        if !self.pool_tight {
            return false;
        }
        let slack = (self.reserve_target() + LIMIT_SEGMENTS) as u64 * self.superblock.geometry.segment_bytes;
        self.own_bytes() > self.placed_blocks() * BLOCK_BYTES / 8 * 9 + slack && self.reclaimable()
    }

    /// Blocks that may be there with good reason: those of the volume, and what snapshots keep.
    pub(super) fn placed_blocks(&self) -> u64 {
        self.size_blocks() + self.recent.catalog.blocks()
    }

    /// Bytes of files that no other replica has.
    pub(super) fn own_bytes(&self) -> u64 {
        (self.segments.file_count() - self.segments.linked_count()) as u64 * self.superblock.geometry.segment_bytes
    }

    /// Takes the cleaner a step further; starts on a segment if space is worth winning.
    pub(super) fn run_cleaner(&mut self) {
        if self.job.is_some() || self.frozen.is_some() || self.closing && self.cleaner.work.is_none() {
            return;
        }
        if self.cleaner.work.is_none() {
            if self.cleaner.due && !(self.cleaner.starved && self.segments.exhausted) {
                self.start_cleaning();
            }
            return;
        }
        let work = self.cleaner.work.as_mut().expect("it is there");
        if matches!(work.state, State::WaitingForPage | State::WaitingForSegment) {
            work.state = State::Sifting;
        }
        if work.state == State::Sifting {
            self.sift();
        }
    }

    fn start_cleaning(&mut self) {
        let slack = (self.reserve_target() + 4) as u64 * self.superblock.geometry.segment_bytes;
        let large = self.pool_tight && self.own_bytes() > self.placed_blocks() * BLOCK_BYTES / 16 * 17 + slack;
        let urgent = self.segments.exhausted || large;
        // Half dead is the normal bar; when space is short, a tenth is enough.
        let Some(victim) = self.victim(if urgent { 10 } else { 50 }) else {
            self.cleaner.due = false;
            if self.cleaner.cleaned > 0 {
                self.cleaner.cleaned = 0;
                self.checkpoint_wanted = true;
                self.background_due = true;
            }
            return;
        };
        if self.cleaner.cleaned >= if urgent { 1 } else { SEGMENTS_PER_CHECKPOINT } {
            self.cleaner.cleaned = 0;
            self.checkpoint_wanted = true;
            self.background_due = true;
            return;
        }
        let kind = self.segments.get(victim).expect("a victim is used").kind;
        self.segments.pin(victim);
        let (candidates, batch) = (VecDeque::new(), Vec::new());
        let work = Work {
            victim,
            kind,
            at: SEGMENT_HEADER_BYTES,
            candidates,
            batch,
            writing: 0,
            state: State::Reading,
        };
        self.cleaner.work = Some(work);
        self.read_victim();
    }

    /// The segment with the least needed blocks, if cleaning is worth it: at least `dead_percent` of all closed
    /// segments of its kind, and two segments' worth, are dead.
    fn victim(&self, dead_percent: u64) -> Option<SegmentId> {
        let capacity = blocks_per_segment(self.superblock.geometry.segment_bytes);
        let replay = self.superblock.checkpoint.replay.log_index;
        let closed = |used: &Used| match used.kind {
            SegmentKind::Data => !used.open && used.log_index < replay,
            SegmentKind::Moved | SegmentKind::Meta | SegmentKind::Linked => !used.open,
        };
        // What was moved there since the last checkpoint is not counted yet.
        let counted = |id: &SegmentId| !self.cleaner.dirty.contains(id);
        [false, true]
            .into_iter()
            .filter_map(|meta| {
                let candidates = || {
                    let of_kind = move |used: &Used| (used.kind == SegmentKind::Meta) == meta;
                    self.segments
                        .used()
                        .iter()
                        .filter(move |(id, used)| of_kind(used) && closed(used) && counted(id))
                };
                let (total, dead) = candidates().fold((0, 0), |(total, dead), (_, used)| {
                    (total + capacity, dead + capacity - u64::from(used.live).min(capacity))
                });
                if dead * 100 < total * dead_percent || dead < 2 * capacity {
                    return None;
                }
                candidates()
                    .filter(|(id, _)| !self.cleaner.skip.contains(id) && !self.cleaner.stuck.contains(id))
                    .filter(|(_, used)| u64::from(used.live) * 100 <= capacity * (100 - dead_percent.min(10)))
                    .min_by_key(|(_, used)| used.live)
                    .map(|(id, used)| (used.live, *id))
            })
            .min()
            .map(|(_, id)| id)
    }

    fn read_victim(&mut self) {
        let work = self.cleaner.work.as_mut().expect("there is a victim");
        let left = self.superblock.geometry.segment_bytes - work.at;
        // The longest record fits, so every read makes progress.
        let len = left.min(record_bytes(HEADER_BYTES_MAX, super::BLOCKS_MAX));
        work.state = State::Reading;
        let (file, offset) = (FileId::Segment(work.victim), work.at);
        self.issue(
            Io::Read {
                file,
                offset,
                buf: BufMut::for_reading(len as usize),
            },
            Purpose::CleanerRead,
        );
    }

    pub(super) fn cleaner_read(&mut self, result: Result<Buf, IoFailure>) {
        let segment_bytes = self.superblock.geometry.segment_bytes;
        let work = self.cleaner.work.as_mut().expect("a read belongs to a victim");
        let seals = self.origins.seals(work.victim).unwrap_or(self.seals);
        work.state = State::Sifting;
        let Ok(buf) = result else {
            // Reads of its blocks will say so, too. Leave it alone.
            work.at = segment_bytes;
            return;
        };
        let mut at = 0;
        let total = buf.len();
        while at + HEADER_BYTES <= total {
            let place = work.at + at as u64;
            let there = total.min(at + HEADER_BYTES_MAX);
            let more = work.at + (total as u64) < segment_bytes;
            if there < at + HEADER_BYTES_MAX && more && at > 0 {
                break; // the next read brings it whole
            }
            if work.kind == SegmentKind::Meta {
                let len = Page::bytes_of(&buf.as_ref()[at..]).min(there - at);
                let found = Page::decode_unreferenced(buf.slice(at..at + len));
                if let Some((_, PageKind::Map, name)) = found {
                    let location = Location::new(work.victim, place, len as u64);
                    work.candidates.push_back(Candidate::Page(name, location));
                    at += len;
                } else {
                    at += BLOCK_BYTES as usize;
                }
                continue;
            }
            let Some((header, _)) = seals.decode(&buf.as_ref()[at..there]) else {
                at = (segment_bytes - work.at) as usize; // the end of what was written
                break;
            };
            let header_bytes = seals.header_bytes(&header.body);
            let end = at + record_bytes(header_bytes, header.body.payload_blocks()) as usize;
            if end > total && work.at + end as u64 <= segment_bytes {
                break; // the next read brings it whole
            }
            if end > total || matches!(header.body, Body::Next { .. }) {
                at = (segment_bytes - work.at) as usize;
                break;
            }
            let mut block_at = at + header_bytes;
            for block in blocks_of(&header) {
                let bytes = buf.slice(block_at..block_at + BLOCK_BYTES as usize);
                let location = Location::block(work.victim, work.at + block_at as u64);
                work.candidates.push_back(Candidate::Block(block, location, bytes));
                block_at += BLOCK_BYTES as usize;
            }
            at = end;
        }
        work.at += at as u64;
    }

    fn sift(&mut self) {
        let mut work = self.cleaner.work.take().expect("there is a victim");
        for _ in 0..CANDIDATES_PER_TURN {
            if work.batch.len() == MOVED_MAX {
                break;
            }
            let Some(candidate) = work.candidates.pop_front() else {
                break;
            };
            let holder = match &candidate {
                Candidate::Block(block, location, _) => self.holder(block.lba, block.version, *location),
                Candidate::Page(name, location) => self.page_holder(*name, *location),
            };
            let holder = match holder {
                Holder::Tree(holder) => holder,
                Holder::Nobody => continue,
                Holder::NeedPage(name, pointer) => {
                    work.candidates.push_front(candidate);
                    work.state = State::WaitingForPage;
                    if !self.is_fetching(pointer) {
                        self.fetch(name, pointer, Waiter::Background);
                    }
                    break;
                }
            };
            match candidate {
                Candidate::Page(name, _) => {
                    self.cleaner.touched.insert((holder, name.first(), name.level));
                }
                Candidate::Block(mut block, from, bytes) => {
                    let check = |seals: Seals| seals.block(block.lba, block.version, bytes.as_ref());
                    if check(self.seals_of(work.victim)) == block.check.crc {
                        if work.kind == SegmentKind::Linked {
                            block.check.crc = check(self.seals); // from now on it is our own
                        }
                        work.batch.push(Moving {
                            block,
                            holder,
                            from,
                            bytes,
                        });
                    } else {
                        // Damaged: it stays where it is, for another copy to heal.
                        self.stats.damaged_blocks += 1;
                    }
                }
            }
        }
        let sifted = work.candidates.is_empty();
        let flush = work.batch.len() == MOVED_MAX || sifted && !work.batch.is_empty();
        let read_all = work.at >= self.superblock.geometry.segment_bytes;
        self.cleaner.work = Some(work);
        if flush {
            self.write_moved();
        } else if sifted && !read_all {
            self.read_victim();
        } else if !sifted {
            self.background_due |= self
                .cleaner
                .work
                .as_ref()
                .is_some_and(|work| work.state == State::Sifting);
        } else {
            self.background_due = true;
            let work = self.cleaner.work.take().expect("it was just put there");
            self.segments.unpin(work.victim);
            self.cleaner.skip.insert(work.victim);
            self.cleaner.cleaned += 1;
        }
    }

    fn write_moved(&mut self) {
        let work = self.cleaner.work.as_mut().expect("there is a batch");
        let segment_bytes = self.superblock.geometry.segment_bytes;
        // A segment is filled to its end: half-empty ones would be the next to clean.
        let room = |at: StreamPosition| ((segment_bytes - at.offset) / BLOCK_BYTES).saturating_sub(1) as usize;
        if self.cleaner.stream.is_none_or(|at| room(at) == 0) {
            let Some(segment) = self.segments.take(SegmentKind::Moved, 0) else {
                work.state = State::WaitingForSegment;
                if self.segments.exhausted {
                    self.give_up_victim();
                }
                return;
            };
            if let Some(full) = self.cleaner.stream.take() {
                self.segments.close(full.segment);
            }
            self.cleaner.stream = Some(StreamPosition { segment, offset: 0 });
        }
        let work = self.cleaner.work.as_mut().expect("there is a batch");
        let at = self.cleaner.stream.as_mut().expect("it was just made");
        let header_blocks = usize::from(at.offset == 0);
        let mut count = work.batch.len().min(room(*at) - header_blocks);
        let left = segment_bytes - at.offset - header_blocks as u64 * SEGMENT_HEADER_BYTES;
        let record = |count| record_bytes(self.seals.moved_header_bytes(count), count);
        if record(count) > left {
            count -= 1; // the tags of so many need a block more
        }
        let len = record(count);
        let blocks = work.batch[..count].iter().map(|moving| moving.block).collect();
        let header = Header {
            epoch: self.superblock.epoch,
            flushed: Seq(0),
            chain: 0,
            body: Body::Moved { blocks },
        };
        let mut parts = Vec::with_capacity(count + 2);
        let offset = at.offset;
        if offset == 0 {
            let (segment, epoch) = (at.segment, self.superblock.epoch);
            let header = SegmentHeader {
                kind: SegmentKind::Moved,
                segment,
                log_index: 0,
                epoch,
            };
            parts.push(header.encode(&self.superblock.geometry.identity));
            at.offset = SEGMENT_HEADER_BYTES;
        }
        parts.push(self.seals.encode(&header).0);
        parts.extend(work.batch[..count].iter().map(|moving| moving.bytes.clone()));
        work.writing = count;
        at.offset += len;
        work.state = State::Writing;
        self.stats.moved_bytes += count as u64 * BLOCK_BYTES;
        let file = FileId::Segment(at.segment);
        self.issue(Io::Write { file, offset, parts }, Purpose::CleanerWrite);
    }

    /// Checkpoints wait for the cleaner, and guest writes for both: it must not wait for space that only they can win.
    fn give_up_victim(&mut self) {
        let work = self.cleaner.work.take().expect("there is a victim");
        self.segments.unpin(work.victim);
        self.cleaner.starved = true;
        self.checkpoint_wanted |= !self.cleaner.relocated.is_empty() || !self.cleaner.touched.is_empty();
        self.background_due = true;
    }

    pub(super) fn cleaner_written(&mut self) {
        let work = self.cleaner.work.as_mut().expect("a write belongs to a victim");
        let end = self.cleaner.stream.expect("it was written to");
        self.cleaner.dirty.insert(end.segment);
        let rest = work.batch.split_off(work.writing);
        let batch = std::mem::replace(&mut work.batch, rest);
        let mut at = end.offset - batch.len() as u64 * BLOCK_BYTES;
        work.state = State::Sifting;
        for moving in batch {
            let to = Location::block(end.segment, at);
            at += BLOCK_BYTES;
            let relocated = Relocated {
                from: moving.from,
                to,
                check: moving.block.check,
            };
            self.cleaner
                .relocated
                .insert((moving.holder, moving.block.lba), relocated);
        }
    }
}

/// The payload blocks of a record, in order.
fn blocks_of(header: &Header) -> Vec<MovedBlock> {
    match &header.body {
        Body::Moved { blocks } => blocks.clone(),
        Body::Data {
            first_seq,
            writes,
            checks,
        } => {
            let mut checks = checks.iter();
            let mut blocks = Vec::with_capacity(checks.len());
            for (n, write) in writes.iter().enumerate().filter(|(_, write)| !write.zero) {
                let version = version_of(header.epoch, *first_seq, n);
                for block in 0..u64::from(write.blocks) {
                    let check = *checks.next().expect("a header has a check for each block");
                    blocks.push(MovedBlock {
                        lba: Lba(write.lba.0 + block),
                        version,
                        check,
                    });
                }
            }
            blocks
        }
        Body::Next { .. } | Body::FlushMark | Body::Control { .. } => Vec::new(),
    }
}

/// The version of the write in place `n` of a record.
pub fn version_of(epoch: Epoch, first_seq: Seq, n: usize) -> Version {
    Version {
        epoch,
        seq: Seq(first_seq.0 + n as u64),
    }
}
