//! Scrubbing: reading everything that is needed from the disk, before somebody needs it, and saying what is damaged.
//!
//! A pass goes through the trees, the map first and then what each snapshot keeps, from the newest to the oldest: what is
//! replaced meanwhile goes from a tree that was gone through to one that was, or is still to come. Of each tree it takes
//! the pages in order, and of so many leaves the blocks in the order in which they lie on the disk, so that neighbours
//! are read in one go. No cache is asked: what counts is what is on the disk. No key is needed.
//!
//! Guests, checkpoints and the cleaner go on meanwhile. So what does not pass its check is looked up once more: only
//! what is still needed at that very place is damaged. A place is held while it is being read, and no longer.
//!
//! The pace is given in bytes per second. While many other operations are out the scrub waits, up to a bound: a busy
//! volume is scrubbed too, only slower.

mod finding;
mod walk;

use std::collections::VecDeque;
use std::num::NonZeroU64;

use finding::Findings;
pub use finding::{Damage, DamagedThing};
use walk::Walk;

use super::page::{Entry, Page, PageKind, PageName, TreeId};
use super::snapshot::Holder;
use super::{Event, Purpose, Store};
use crate::buffer::BufMut;
use crate::io::{FileId, Io, IoFailure, SegmentId};
use crate::types::{BLOCK_BYTES, Lba, Version};

/// Blocks that are put in order of their places before they are read: half a megabyte of memory.
const WINDOW_BLOCKS: usize = 8 << 10;
/// Bytes read in one operation.
const READ_BYTES_MAX: u64 = 128 << 10;
/// Bytes that nobody needs, and that are read so that one operation serves what lies around them.
const GAP_BYTES_MAX: u64 = 16 << 10;
/// Other operations that are out while the volume is busy.
const BUSY_OPERATIONS: usize = 16;
/// So late a read may be without the next ones being later for it.
const LATE_MS_MAX: u64 = 100;
/// A busy volume is scrubbed so many times slower.
const BUSY_PACES: u64 = 8;

/// What a scrub shall do.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ScrubOrder {
    /// Begin a pass, unless one is under way; in any case go on at this pace, 0 for as fast as the disk is.
    Start { bytes_per_second: u64 },
    /// Give the pass up. What it found is kept.
    Stop,
}

/// How far a scrub is, and what is known to be damaged.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct ScrubProgress {
    /// Counts passes since the start of the engine; 0 before the first.
    pub pass: u64,
    pub running: bool,
    /// When the pass began, by the clock of [`crate::BlockEngine::tick`].
    pub started_ms: u64,
    /// When the last whole pass ended.
    pub finished_ms: Option<u64>,
    /// Bytes that passed their checks in this pass.
    pub verified_bytes: u64,
    /// Bytes that were needed when it began.
    pub total_bytes: u64,
    /// What is damaged, as far as it is listed.
    pub damaged: Vec<Damage>,
    /// How many places are damaged.
    pub damaged_count: u64,
}

/// The scrub of a store.
#[derive(Debug, Default)]
pub(super) struct Scrub {
    run: Option<Box<Run>>,
    findings: Findings,
    pass: u64,
    started_ms: u64,
    finished_ms: Option<u64>,
    verified_bytes: u64,
    total_bytes: u64,
}

/// A pass.
#[derive(Debug)]
struct Run {
    /// None: as fast as the disk.
    bytes_per_second: Option<NonZeroU64>,
    /// Nothing is read before.
    due_ms: u64,
    /// Parts of a millisecond that were not waited for, in bytes times 1000.
    owed: u64,
    /// A checkpoint holds all that was written before the pass began.
    begun: bool,
    walk: Walk,
    /// What is to be read, in the order of the places.
    items: VecDeque<Item>,
    reading: bool,
    /// What did not pass, and is looked up once more.
    suspects: Vec<(Item, String)>,
}

/// Something that is needed.
#[derive(Clone, Copy, Debug)]
pub(super) struct Item {
    entry: Entry,
    thing: Thing,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Thing {
    Block(TreeId, Lba),
    Page(PageName),
    /// A leaf whose blocks are to be read after it.
    Leaf(PageName),
    /// A page of the list of segments or snapshots, and its place in it. As of this checkpoint.
    Listed(PageKind, PageName, u64),
}

impl Store {
    /// Starts, paces or ends scrubbing.
    pub fn scrub(&mut self, order: ScrubOrder) {
        match (order, &mut self.scrub.run) {
            (ScrubOrder::Stop, run) => *run = None,
            (ScrubOrder::Start { bytes_per_second }, Some(run)) => {
                run.bytes_per_second = NonZeroU64::new(bytes_per_second);
                run.due_ms = self.now_ms;
            }
            (ScrubOrder::Start { bytes_per_second }, None) => {
                self.scrub.pass += 1;
                self.scrub.started_ms = self.now_ms;
                self.scrub.verified_bytes = 0;
                self.scrub.total_bytes = self.segments.live_bytes();
                self.scrub.run = Some(Box::new(Run {
                    bytes_per_second: NonZeroU64::new(bytes_per_second),
                    due_ms: self.now_ms,
                    owed: 0,
                    begun: false,
                    walk: Walk::default(),
                    items: VecDeque::new(),
                    reading: false,
                    suspects: Vec::new(),
                }));
                // What only the log holds is verified with the rest.
                if !self.recent.is_empty() {
                    self.want_checkpoint();
                }
            }
        }
        self.background_due = true;
    }

    /// How far it is, and what it found.
    pub fn scrub_progress(&self) -> ScrubProgress {
        let scrub = &self.scrub;
        ScrubProgress {
            pass: scrub.pass,
            running: scrub.run.is_some(),
            started_ms: scrub.started_ms,
            finished_ms: scrub.finished_ms,
            verified_bytes: scrub.verified_bytes,
            total_bytes: scrub.total_bytes.max(scrub.verified_bytes),
            damaged: self.damage(),
            damaged_count: scrub.findings.count(),
        }
    }

    /// What is known to be damaged, as far as it is listed.
    pub fn damage(&self) -> Vec<Damage> {
        self.scrub.findings.list()
    }

    /// When the scrub goes on.
    pub(super) fn scrub_tick_ms(&self) -> Option<u64> {
        let run = self.scrub.run.as_ref()?;
        (run.begun && !run.reading && run.due_ms > self.now_ms).then_some(run.due_ms)
    }

    /// Blocks were written or zeroed: what was damaged there is nobody's any more.
    pub(super) fn scrub_overwritten(&mut self, start: Lba, end: Lba) {
        if !self.scrub.findings.is_empty() {
            self.scrub.findings.replaced(start, end);
        }
    }

    /// Takes the scrub a step further: one read at a time.
    pub(super) fn run_scrub(&mut self) {
        if self.closing {
            self.scrub.run = None;
        }
        let Some(mut run) = self.scrub.run.take() else { return };
        if !run.begun {
            // The log's part is in a checkpoint that began after the pass did.
            run.begun = !self.checkpoint_wanted && self.job.is_none() && self.frozen.is_none();
            if run.begun {
                self.scrub.total_bytes = self.segments.live_bytes();
                self.list_listed(&mut run);
            }
        }
        let ended = run.begun && !run.reading && self.now_ms >= run.due_ms && !self.scrub_step(&mut run);
        if ended {
            self.scrub.findings.end_pass(self.scrub.pass);
            self.scrub.finished_ms = Some(self.now_ms);
        } else {
            self.scrub.run = Some(run);
        }
    }

    /// Reads what is next; false at the end of the pass.
    fn scrub_step(&mut self, run: &mut Run) -> bool {
        if !self.judge(run) {
            return true;
        }
        while run.items.is_empty() {
            match self.walk_on(run) {
                walk::Step::Items => {}
                walk::Step::Wait => return true,
                walk::Step::End => return run.reading || !run.suspects.is_empty(),
            }
        }
        let busy = self.pending.len() > BUSY_OPERATIONS;
        if busy && self.now_ms < run.due_ms + BUSY_PACES * run.interval_ms(READ_BYTES_MAX) {
            return true; // a completion, or the next tick, looks again
        }
        self.scrub_read(run);
        true
    }

    /// Reads the first of the items, and those that lie so near behind it that one operation serves all.
    fn scrub_read(&mut self, run: &mut Run) {
        let first = run.items[0].entry.location;
        let (segment, start) = (first.segment(), first.offset());
        let mut end = start + first.len();
        let near = |item: &Item, end: u64| {
            let at = item.entry.location;
            let apart = at.segment() == segment && at.offset() >= end && at.offset() <= end + GAP_BYTES_MAX;
            apart && at.offset() + at.len() - start <= READ_BYTES_MAX
        };
        let mut count = 1;
        while let Some(item) = run.items.get(count)
            && near(item, end)
        {
            end = item.entry.location.offset() + item.entry.location.len();
            count += 1;
        }
        let items: Vec<Item> = run.items.drain(..count).collect();
        run.reading = true;
        run.pace(end - start, self.now_ms);
        if self.segments.get(segment).is_none() {
            // Nobody needs the segment any more, so nobody needs these.
            run.reading = false;
            return;
        }
        self.segments.pin(segment);
        let io = Io::Read {
            file: FileId::Segment(segment),
            offset: start,
            buf: BufMut::for_reading((end - start) as usize),
        };
        self.issue(io, Purpose::ScrubRead { segment, start, items });
    }

    pub(super) fn scrub_was_read(
        &mut self,
        segment: SegmentId,
        start: u64,
        items: Vec<Item>,
        result: Result<BufMut, IoFailure>,
    ) {
        self.segments.unpin(segment);
        let Some(mut run) = self.scrub.run.take() else { return };
        run.reading = false;
        match result {
            Ok(buf) => {
                let bytes = buf.freeze();
                for item in items {
                    let from = (item.entry.location.offset() - start) as usize;
                    let part = bytes.slice(from..from + item.entry.location.len() as usize);
                    match self.verify(&mut run, &item, part) {
                        Ok(()) => {
                            self.scrub.verified_bytes += item.entry.location.len();
                            if let Some(thing) = item.damaged_thing() {
                                self.scrub.findings.sound(thing, item.entry.location);
                            }
                        }
                        Err(why) => run.suspects.push((item, why)),
                    }
                }
            }
            Err(error) => {
                let failed = items.into_iter().map(|item| (item, error.to_string()));
                run.suspects.extend(failed);
            }
        }
        self.scrub.run = Some(run);
    }

    fn verify(&mut self, run: &mut Run, item: &Item, bytes: crate::buffer::Buf) -> Result<(), String> {
        let replica = self.superblock.geometry.identity.replica;
        let (kind, name) = match item.thing {
            Thing::Block(_, lba) => {
                let seals = self.seals_of(item.entry.location.segment());
                let found = seals.block(lba, item.entry.version, bytes.as_ref());
                return if found == item.entry.check.crc {
                    Ok(())
                } else {
                    Err(format!("check is {found:08x}, expected {:08x}", item.entry.check.crc))
                };
            }
            Thing::Page(name) | Thing::Leaf(name) => (PageKind::Map, name),
            Thing::Listed(kind, name, _) => (kind, name),
        };
        let page = Page::decode(bytes, kind, name, replica, item.entry.check).map_err(|error| error.to_string())?;
        match item.thing {
            Thing::Leaf(name) => run.walk.take_leaf(name, &page),
            Thing::Listed(PageKind::TableIndex, name, number) => {
                self.list_below(run, name, number, &page);
            }
            Thing::Block(..) | Thing::Page(_) | Thing::Listed(..) => {}
        }
        Ok(())
    }

    /// Looks up what did not pass: what is still needed where it was is damaged. False if a page has to be read first.
    fn judge(&mut self, run: &mut Run) -> bool {
        while let Some((item, why)) = run.suspects.last().cloned() {
            let location = item.entry.location;
            let needed = match item.thing {
                Thing::Listed(_, _, number) => Holder::of(number == self.superblock.checkpoint.number),
                Thing::Page(name) | Thing::Leaf(name) => self.page_holder(name, location),
                Thing::Block(tree, lba) => self.block_holder(tree, lba, item.entry),
            };
            match needed {
                Holder::NeedPage(name, pointer) => {
                    if !self.is_fetching(pointer) {
                        self.fetch(name, pointer, super::read::Waiter::Scrub);
                    }
                    return false;
                }
                Holder::Nobody => {
                    // It was replaced while it was read. What a leaf says now is asked for again.
                    if let Thing::Leaf(name) = item.thing {
                        run.walk.again(name);
                    }
                }
                Holder::Tree(_) => {
                    let thing = item.damaged_thing().expect("everything that is read has a name");
                    self.found_damage(Damage {
                        thing,
                        version: item.entry.version,
                        segment: location.segment(),
                        offset: location.offset(),
                        why,
                    });
                }
            }
            run.suspects.pop();
        }
        true
    }

    fn block_holder(&mut self, tree: TreeId, lba: Lba, entry: Entry) -> Holder {
        if tree == TreeId::HEAD
            && let Some(newer) = self.frozen.as_ref().and_then(|frozen| frozen.get(lba))
            && newer.version >= entry.version
            && newer.location != entry.location
            && self.recent.catalog.keeper(entry.version, newer.version).is_none()
        {
            return Holder::Nobody; // a checkpoint is letting go of it
        }
        self.holder(lba, entry.version, entry.location)
    }

    pub(super) fn found_damage(&mut self, damage: Damage) {
        self.count_damaged(damage.segment, damage.offset);
        // A replica asks for it to be mended until it is.
        if self.scrub.findings.add(damage.clone(), self.scrub.pass) || self.is_led() {
            self.events.push_back(Event::Damaged(damage));
        }
    }

    /// A page on the way to others could not be read: what is below it is not reached.
    pub(super) fn scrub_page_failed(&mut self, name: PageName, pointer: Entry, why: String) {
        if let Some(mut run) = self.scrub.run.take() {
            let thing = Thing::Page(name);
            run.suspects.retain(|(item, _)| item.thing != thing);
            run.walk.skip(name);
            let item = Item { entry: pointer, thing };
            run.suspects.push((item, why));
            self.scrub.run = Some(run);
        }
    }
}

impl Holder {
    fn of(needed: bool) -> Holder {
        if needed {
            Holder::Tree(TreeId::HEAD)
        } else {
            Holder::Nobody
        }
    }
}

impl Run {
    fn interval_ms(&self, bytes: u64) -> u64 {
        self.bytes_per_second.map_or(0, |pace| bytes * 1000 / pace)
    }

    /// Lets the next read wait until these bytes were due.
    fn pace(&mut self, bytes: u64, now_ms: u64) {
        if let Some(pace) = self.bytes_per_second {
            self.owed += bytes * 1000;
            let ms = self.owed / pace;
            self.owed %= pace;
            // A clock that ticks now and then costs nothing; what was missed because of a guest is not made up for.
            self.due_ms = self.due_ms.max(now_ms.saturating_sub(LATE_MS_MAX)) + ms;
        }
    }
}

impl Item {
    fn damaged_thing(&self) -> Option<DamagedThing> {
        Some(match self.thing {
            Thing::Block(tree, lba) => DamagedThing::Block {
                lba,
                snapshot: finding::snapshot_of(tree),
            },
            Thing::Page(name) | Thing::Leaf(name) => DamagedThing::Page {
                first: name.first(),
                level: name.level,
                snapshot: finding::snapshot_of(name.tree),
            },
            Thing::Listed(..) => DamagedThing::List,
        })
    }

    fn block(tree: TreeId, lba: Lba, entry: Entry) -> Item {
        Item {
            entry,
            thing: Thing::Block(tree, lba),
        }
    }
}

/// The oldest version there is: what nobody has walked yet lies before it.
const NOT_YET: Version = Version::MAX;

/// Bytes of a block that is read with others.
const _: () = assert!(READ_BYTES_MAX.is_multiple_of(BLOCK_BYTES));
