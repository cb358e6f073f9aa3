//! Cleaning: what is still needed of a segment that is mostly dead moves elsewhere, and the next checkpoint frees it.
//!
//! A moved block keeps its bytes, version and check. Where its copy lies is noted, and the next checkpoint lets whoever
//! needs it, the map or the table of a snapshot, point there; until then the old place serves. A page does not move: it is
//! marked, and the next checkpoint writes it anew. The cleaner and a checkpoint never run at the same time, so who needs a
//! block does not change in between.

use std::collections::{BTreeMap, BTreeSet, VecDeque};

use super::checkpoint::Relocated;
use super::pace::{Pressure, Search};
use super::page::{Page, PageKind, PageName, TreeId};
use super::read::Waiter;
use super::record::{
    Body, HEADER_BYTES, HEADER_BYTES_MAX, Header, MOVED_MAX, MovedBlock, PAGES_MAX, Seals, record_bytes,
};
use super::segment::{SEGMENT_HEADER_BYTES, SegmentHeader, SegmentKind};
use super::snapshot::Holder;
use super::superblock::StreamPosition;
use super::turn::{PAGE, ROW};
use super::{Purpose, Store};
use crate::buffer::{Buf, BufMut};
use crate::io::{FileId, Io, IoFailure, SegmentId};
use crate::types::{Lba, Location, PAGE_BYTES, Seq};

/// Bytes read at a time, unless a record is longer.
const READ_BYTES: u64 = 256 << 10;

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
    /// Looking for the next segment to clean takes more than a turn.
    pub(super) search: Option<Search>,
    work: Option<Work>,
    /// The last victim was given up because a full pool had no segment for what is needed of it: cleaning gives nothing
    /// back until a checkpoint does, or the pool.
    starved: bool,
    /// Cleaned, waiting for the checkpoint that frees them.
    skip: BTreeSet<SegmentId>,
    /// Cleaned, and still needed after the checkpoint: something in them is damaged.
    stuck: BTreeSet<SegmentId>,
}

#[derive(Debug)]
struct Work {
    victim: SegmentId,
    kind: SegmentKind,
    /// Next byte to read, and how many at once: the record there may be longer than what is read else.
    at: u64,
    read_bytes: u64,
    candidates: VecDeque<Candidate>,
    batch: Vec<Moving>,
    /// Pages in it.
    batch_pages: usize,
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
    /// The guest's writes have not paid for the next read yet.
    WaitingForCredit,
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

impl Work {
    /// The batch makes a record.
    fn is_batch_full(&self) -> bool {
        self.batch.len() == MOVED_MAX || self.batch_pages >= PAGES_MAX
    }
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

    /// A checkpoint has to wait. It need not while the cleaner itself waits between two reads and has nothing in its hands:
    /// who needs what it found is as of the last checkpoint.
    pub fn is_busy(&self) -> bool {
        let waits = |work: &Work| work.state == State::WaitingForCredit && work.batch.is_empty();
        self.work.as_ref().is_some_and(|work| !waits(work))
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
    }

    /// Looks for something to clean when it is asked next.
    pub fn look(&mut self) {
        self.due = true;
    }

    /// Segments that the next checkpoint frees.
    pub fn cleaned_count(&self) -> usize {
        self.skip.len()
    }

    /// True while it uses up its turns.
    pub fn works(&self) -> bool {
        let sifts = |work: &Work| work.state == State::Sifting;
        self.search.is_some() || self.work.as_ref().is_some_and(sifts)
    }

    /// False for segments that were cleaned, and for those that were written to since the last checkpoint: what was
    /// moved there is not counted yet.
    pub fn may_take(&self, segment: SegmentId) -> bool {
        !(self.dirty.contains(&segment) || self.skip.contains(&segment) || self.stuck.contains(&segment))
    }
}

impl Store {
    /// True if cleaning or a checkpoint can be expected to give space back. The cleaner goes first: a checkpoint frees what
    /// it has cleaned by then, and costs the same for one segment as for many.
    pub(super) fn reclaimable(&mut self) -> bool {
        if self.job.is_some() {
            return true;
        }
        let starved = self.cleaner.starved && self.segments.exhausted;
        if self.frozen.is_none() && !starved {
            self.cleaner.due = true;
            if self.cleaner.work.is_some() || self.cleaner.cleaned_count() > 0 || self.has_victim(Pressure::Waiting) {
                self.background_due = true;
                return true;
            }
        }
        if self.frozen.is_none() && !self.recent.is_empty() {
            self.checkpoint_wanted = true;
            self.background_due = true;
            return true;
        }
        self.cleaner.is_busy()
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
        match work.state {
            State::Sifting => self.sift(),
            State::WaitingForCredit => {
                let in_the_way = !work.batch.is_empty() && self.merge_is_due();
                let pressure = self.pressure();
                if in_the_way {
                    self.write_moved();
                } else if self.may_clean(pressure) || pressure == Pressure::None {
                    self.read_victim();
                }
            }
            _ => {}
        }
    }

    fn start_cleaning(&mut self) {
        let pressure = self.pressure();
        let victim = match pressure {
            Pressure::None => None,
            _ => match self.look_for_victim(pressure) {
                Some(victim) => victim,
                None => {
                    self.background_due = true; // the next turn looks on
                    return;
                }
            },
        };
        let waiting = self.cleaner.cleaned_count() > 0;
        if waiting && (victim.is_none() || self.commit_is_due()) {
            self.cleaner.due = false; // a commit sets it again
            self.checkpoint_wanted = true;
            self.background_due = true;
            return;
        }
        let Some(victim) = victim else {
            self.cleaner.due = false;
            self.pace.settled |= self.is_quiet();
            return;
        };
        if !self.may_clean(pressure) {
            return;
        }
        let kind = self.segments.get(victim).expect("a victim is used").kind;
        self.segments.pin(victim);
        let (candidates, batch) = (VecDeque::new(), Vec::new());
        let work = Work {
            victim,
            kind,
            at: SEGMENT_HEADER_BYTES,
            read_bytes: READ_BYTES,
            candidates,
            batch,
            batch_pages: 0,
            writing: 0,
            state: State::Reading,
        };
        self.cleaner.work = Some(work);
        self.read_victim();
    }

    fn read_victim(&mut self) {
        let work = self.cleaner.work.as_mut().expect("there is a victim");
        let left = self.superblock.geometry.segment_bytes - work.at;
        let len = left.min(work.read_bytes);
        work.state = State::Reading;
        let (file, offset) = (FileId::Segment(work.victim), work.at);
        self.cleaner_spent(len);
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
        let mut longer = 0;
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
                    at += PAGE_BYTES as usize;
                }
                continue;
            }
            let Some((header, _)) = seals.decode(&buf.as_ref()[at..there]) else {
                at = (segment_bytes - work.at) as usize; // the end of what was written
                break;
            };
            let header_bytes = seals.header_bytes(&header.body);
            let end = at + record_bytes(header_bytes, header.body.payload_pages()) as usize;
            if end > total && work.at + end as u64 <= segment_bytes {
                longer = (end - at) as u64;
                break; // the next read brings it whole
            }
            if end > total || matches!(header.body, Body::Next { .. }) {
                at = (segment_bytes - work.at) as usize;
                break;
            }
            let mut block_at = at + header_bytes;
            for block in header.payload() {
                let location = Location::pages_at(work.victim, work.at + block_at as u64, block.pages);
                let bytes = buf.slice(block_at..block_at + location.len() as usize);
                work.candidates.push_back(Candidate::Block(block, location, bytes));
                block_at += location.len() as usize;
            }
            at = end;
        }
        work.at += at as u64;
        work.read_bytes = READ_BYTES.max(longer);
        debug_assert!(
            at > 0 || work.read_bytes > total as u64,
            "the next read brings more than this one"
        );
    }

    fn sift(&mut self) {
        let mut work = self.cleaner.work.take().expect("there is a victim");
        while self.turn.goes_on() {
            if work.is_batch_full() {
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
                Holder::Nobody => {
                    self.turn.spend(2 * ROW);
                    continue;
                }
                Holder::NeedPage(name, pointer) => {
                    work.candidates.push_front(candidate);
                    work.state = State::WaitingForPage;
                    if !self.is_fetching(pointer) {
                        self.fetch(name, pointer, Waiter::Background);
                    }
                    break;
                }
            };
            self.turn.spend(PAGE);
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
                        work.batch_pages += usize::from(block.pages);
                        work.batch.push(Moving {
                            block,
                            holder,
                            from,
                            bytes,
                        });
                    } else {
                        // Damaged: it stays where it is, for another copy to heal.
                        self.stats.damaged_blocks += 1;
                        self.count_damaged(from.segment(), from.offset());
                    }
                }
            }
        }
        let sifted = work.candidates.is_empty();
        // Records are filled: each header of a few blocks is a page that the cleaner loses to itself.
        let read_all = work.at >= self.superblock.geometry.segment_bytes;
        let flush = work.is_batch_full() || sifted && read_all && !work.batch.is_empty();
        self.cleaner.work = Some(work);
        if flush {
            self.write_moved();
        } else if sifted && !read_all {
            let pressure = self.pressure();
            if self.may_clean(pressure) || pressure == Pressure::None {
                self.read_victim();
            } else if let Some(work) = &mut self.cleaner.work {
                work.state = State::WaitingForCredit;
                // What it holds is in the way of a checkpoint that was asked for meanwhile: the next turn writes it.
                self.background_due |= self.cleaner.is_busy() && self.merge_is_due();
            }
        } else if !sifted {
            self.background_due |= self
                .cleaner
                .work
                .as_ref()
                .is_some_and(|work| work.state == State::Sifting);
        } else {
            self.background_due = true;
            let work = self.cleaner.work.take().expect("it was just put there");
            // A checkpoint in between may have found that nobody needs it any more.
            if self.segments.get(work.victim).is_some() {
                self.cleaner.skip.insert(work.victim);
            }
            self.segments.unpin(work.victim);
        }
    }

    fn write_moved(&mut self) {
        let work = self.cleaner.work.as_mut().expect("there is a batch");
        let segment_bytes = self.superblock.geometry.segment_bytes;
        let age = self.segments.get(work.victim).map_or(0, |used| match used.kind {
            SegmentKind::Data | SegmentKind::Moved => used.log_index,
            SegmentKind::Meta | SegmentKind::Linked => 0,
        });
        let seals = self.seals;
        // How many of the batch a record takes that has its place there. A segment is filled to its end: half-empty ones
        // would be the next to clean.
        let fit = |batch: &[Moving], at: StreamPosition| {
            let left = segment_bytes - at.offset.max(SEGMENT_HEADER_BYTES);
            let mut pages = 0;
            let lengths = batch.iter().enumerate().map(|(n, moving)| {
                pages += usize::from(moving.block.pages);
                (pages, record_bytes(seals.moved_header_bytes(n + 1), pages))
            });
            let fitting = lengths.take_while(|(pages, bytes)| *pages <= PAGES_MAX && *bytes <= left);
            fitting
                .zip(1..)
                .last()
                .map(|((pages, bytes), count)| (count, pages, bytes))
        };
        if self.cleaner.stream.is_none_or(|at| fit(&work.batch, at).is_none()) {
            let Some(segment) = self.segments.take(SegmentKind::Moved, age) else {
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
        self.segments.hold_younger(at.segment, age);
        let (count, pages, len) = fit(&work.batch, *at).expect("a block fits into an empty segment");
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
        (work.writing, work.batch_pages) = (count, work.batch_pages - pages);
        at.offset += len;
        work.state = State::Writing;
        self.stats.moved_bytes += pages as u64 * PAGE_BYTES;
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
        let mut at = end.offset - batch.iter().map(|moving| moving.from.len()).sum::<u64>();
        work.state = State::Sifting;
        for moving in batch {
            let to = Location::pages_at(end.segment, at, moving.block.pages);
            at += to.len();
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
