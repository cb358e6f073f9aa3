//! Copies on their way into the log: compared with what is here, and appended in the same turn.
//!
//! What the map has for a block is looked up first, and remembered until a checkpoint is committed: the pages of a whole
//! record need not be in memory at once. What memory and the log have is looked at last, when there is room for the
//! record, so nothing can come between the comparison and the record's place in the chain.

use std::collections::VecDeque;

use super::super::log::Then;
use super::super::page::{Entry, PageName};
use super::super::read::Waiter;
use super::super::record::{Body, COPIED_MAX, COPIED_ZEROS_MAX, CopiedZeros, MovedBlock, record_bytes};
use super::super::{Event, PAGES_MAX, Room, Store};
use super::copy::Copies;
use super::newer::{MapWalk, NeedPage, Sweep};
use super::repair::Repairs;
use super::stored::{Stored, StoredBlock};
use crate::buffer::Buf;
use crate::request::RequestError;
use crate::types::{Lba, Seq, Version};

/// Pages of the map that are read at a time for copies.
const PAGES_AT_ONCE: usize = 16;
/// Rows of the map that a zeroed range is compared with at a time.
const ROWS_AT_ONCE: usize = 2 * COPIED_ZEROS_MAX;
/// Records of copies that are on their way to the disk at a time: the writes of the stream go between them.
const RECORDS_MAX: usize = 2;

/// Orders to take copies, in their order.
#[derive(Debug, Default)]
pub struct Copying {
    next: u64,
    orders: VecDeque<Order>,
    records_out: usize,
    pub(super) repairs: Repairs,
}

#[derive(Debug)]
struct Order {
    id: u64,
    token: u64,
    left: VecDeque<Item>,
    bytes: usize,
    records_out: usize,
    copies: Copies,
    failed: Option<RequestError>,
}

#[derive(Debug)]
struct Item {
    copy: Stored,
    /// What is here in the same version is damaged.
    mends: bool,
    seen: Seen,
}

/// What the map has where the copy belongs.
#[derive(Debug)]
enum Seen {
    Unknown,
    /// For a block: the version in the map of this checkpoint.
    Block(u64, Version),
    /// For zeros: everything there that is not older.
    Rows(MapWalk),
}

impl Copying {
    /// Orders and bytes that wait.
    pub fn waiting(&self) -> (usize, usize) {
        let bytes: usize = self.orders.iter().map(|order| order.bytes).sum();
        let (orders, repaired) = self.repairs.waiting();
        (self.orders.len() + orders, bytes + repaired)
    }

    /// Nothing waits or is on its way.
    pub fn is_idle(&self) -> bool {
        self.orders.is_empty() && self.repairs.is_empty()
    }

    /// The tokens of all orders: nothing comes of them any more.
    pub fn take_all(&mut self) -> Vec<u64> {
        self.records_out = 0;
        let orders = self.orders.drain(..).map(|order| order.token);
        orders.chain(self.repairs.take_all()).collect()
    }
}

/// A record that is being put together.
#[derive(Default)]
struct Draft {
    blocks: Vec<MovedBlock>,
    zeros: Vec<CopiedZeros>,
    payload: Vec<Buf>,
    pages: usize,
    copies: Copies,
    /// How many of the items are dealt with whole, and where the next one goes on if it was begun.
    items: usize,
    cut: Option<Lba>,
}

impl Draft {
    fn takes(&self, block: &StoredBlock) -> bool {
        self.blocks.len() < COPIED_MAX && self.pages + usize::from(block.pages) <= PAGES_MAX
    }

    fn add(&mut self, block: &StoredBlock) {
        self.blocks.push(MovedBlock {
            lba: block.lba,
            version: block.version,
            check: block.check,
            pages: block.pages,
        });
        self.payload.push(block.bytes.clone());
        self.pages += usize::from(block.pages);
        self.copies.applied += 1;
    }
}

impl Store {
    /// `damaged`: those of the copies, by their places, that replace the same version.
    pub(super) fn order_copies(&mut self, token: u64, copies: Vec<Stored>, damaged: &[usize]) {
        let bytes = copies.iter().map(|copy| match copy {
            Stored::Block(block) => block.bytes.len(),
            Stored::Zeros { .. } => 0,
        });
        let (id, bytes) = (self.copying.next, bytes.sum());
        self.copying.next += 1;
        let items = copies.into_iter().enumerate().map(|(index, copy)| Item {
            copy,
            mends: damaged.contains(&index),
            seen: Seen::Unknown,
        });
        self.copying.orders.push_back(Order {
            id,
            token,
            left: items.collect(),
            bytes,
            records_out: 0,
            copies: Copies::default(),
            failed: None,
        });
        self.background_due = true;
    }

    /// Appends the next record of copies, if there are any and there is room.
    pub(in super::super) fn run_copies(&mut self) {
        // A revert takes everything in the log to the snapshot; what comes behind it waits. So do copies for an end that
        // is being settled: some of them may lie behind it.
        let waits = !self.amendments.is_empty() || self.is_reverting();
        if waits || self.copying.records_out >= RECORDS_MAX {
            return;
        }
        let Some(index) = self.copying.orders.iter().position(|order| !order.left.is_empty()) else {
            return self.report_copies();
        };
        let mut left = std::mem::take(&mut self.copying.orders[index].left);
        let missing = self.look_up_copies(&mut left);
        if missing.is_empty() {
            let draft = self.draft(&mut left);
            self.append_copies(index, &mut left, draft);
        }
        let order = &mut self.copying.orders[index];
        if order.failed.is_none() {
            order.left = left;
        }
        for (name, pointer) in missing {
            if !self.is_fetching(pointer) {
                self.fetch(name, pointer, Waiter::Copies);
            }
        }
        self.report_copies();
    }

    /// Looks up what the map has for the items of the next record; returns the pages that have to be read for that.
    fn look_up_copies(&mut self, left: &mut VecDeque<Item>) -> Vec<(PageName, Entry)> {
        let checkpoint = self.superblock.checkpoint.number;
        let mut missing: Vec<NeedPage> = Vec::new();
        for item in left.iter_mut().take(COPIED_MAX) {
            let found = match &item.copy {
                Stored::Block(block) => match item.seen {
                    Seen::Block(at, _) if at == checkpoint => Ok(()),
                    _ if self.is_superseded_in_memory(block.lba, block.version, item.mends) => Ok(()),
                    _ => self.version_in_map(block.lba).map(|version| {
                        item.seen = Seen::Block(checkpoint, version);
                    }),
                },
                Stored::Zeros { version, .. } if *version == Version::default() => Ok(()),
                Stored::Zeros { start, end, version } => {
                    if !matches!(item.seen, Seen::Rows(_)) {
                        item.seen = Seen::Rows(MapWalk::new(self, *start, *end, before(*version)));
                    }
                    let Seen::Rows(walk) = &mut item.seen else {
                        unreachable!("it was just put there")
                    };
                    walk.run(self, ROWS_AT_ONCE)
                }
            };
            if let Err(page) = found
                && !missing.contains(&page)
            {
                missing.push(page);
                if missing.len() == PAGES_AT_ONCE {
                    break;
                }
            }
        }
        missing
    }

    /// It is not wanted, or the log and memory have something that is not older; if that is damaged, something newer.
    fn is_superseded_in_memory(&self, lba: Lba, version: Version, mends: bool) -> bool {
        if self.is_unwanted(version) {
            return true;
        }
        if !mends {
            return self.version_in_memory(lba).is_some_and(|have| have >= version);
        }
        // What is on its way was not looked at: it is no older, and nobody says that it is damaged.
        let on_its_way = self.version_on_its_way(lba).is_some_and(|have| have >= version);
        on_its_way || self.lookup_memory(lba).is_some_and(|entry| entry.version > version)
    }

    /// The stream brings it, or it was decided never to have happened.
    fn is_unwanted(&self, version: Version) -> bool {
        let end = self.superblock.end_of(version.epoch);
        let ahead = version.epoch == self.superblock.epoch && version > self.log.position.last;
        ahead || end.is_some_and(|end| version.seq > end)
    }

    /// What of the first items is newer than all that is here, as much as a record takes.
    fn draft(&self, left: &mut VecDeque<Item>) -> Draft {
        let inflight = self.rows_inflight();
        let mut draft = Draft::default();
        for item in left.iter_mut().take(COPIED_MAX) {
            match &item.copy {
                Stored::Block(block) => {
                    let in_map = match item.seen {
                        Seen::Block(_, version) => version,
                        _ => Version::default(), // then it is superseded in memory
                    };
                    let in_map_counts = in_map > block.version || in_map == block.version && !item.mends;
                    if in_map_counts || self.is_superseded_in_memory(block.lba, block.version, item.mends) {
                        draft.copies.superseded += 1;
                    } else if draft.takes(block) {
                        draft.add(block);
                    } else {
                        break;
                    }
                }
                Stored::Zeros { start, end, version } => {
                    if *version == Version::default() || self.is_unwanted(*version) {
                        draft.copies.superseded += end.0 - start.0;
                    } else {
                        let Seen::Rows(walk) = &item.seen else {
                            unreachable!("it was looked up")
                        };
                        let tables = Sweep::new(self.tables(), walk.found(), before(*version));
                        let mut sweep = tables.with_inflight(&inflight);
                        let stop = draft.add_zeros(*start, walk.until(), *version, &mut sweep);
                        if stop < *end {
                            draft.cut = Some(stop);
                            break;
                        }
                    }
                }
            }
            draft.items += 1;
        }
        draft
    }

    fn append_copies(&mut self, index: usize, left: &mut VecDeque<Item>, draft: Draft) {
        let count = draft.blocks.len();
        if count + draft.zeros.len() > 0 {
            let header = self.seals.copied_header_bytes(draft.zeros.len(), count);
            match self.room_for(record_bytes(header, draft.pages), count == 0) {
                Room::Ready => {}
                Room::Wait => return,
                Room::NoSpace => return self.fail_copies(index, RequestError::NoSpace),
            }
        }
        let Draft {
            blocks,
            zeros,
            payload,
            copies,
            items,
            cut,
            ..
        } = draft;
        for item in left.drain(..items) {
            if let Stored::Block(block) = &item.copy {
                self.copying.orders[index].bytes -= block.bytes.len();
            }
        }
        if let (Some(cut), Some(first)) = (cut, left.front_mut()) {
            if let Stored::Zeros { start, .. } = &mut first.copy {
                *start = cut;
            }
            if let Seen::Rows(walk) = &mut first.seen {
                walk.pass(cut);
            }
        }
        let order = &mut self.copying.orders[index];
        order.copies.applied += copies.applied;
        order.copies.superseded += copies.superseded;
        self.background_due = true;
        if count + zeros.len() > 0 {
            order.records_out += 1;
            self.copying.records_out += 1;
            let then = Then::Copied(order.id);
            let versions = blocks.iter().map(|block| block.version);
            let newest = versions.chain(zeros.iter().map(|range| range.version)).max();
            self.log.highest = self.log.highest.max(newest.unwrap_or_default());
            self.append_to_chain(Body::Copied { blocks, zeros }, payload, then);
        }
    }

    /// A record of copies is in the log.
    pub(in super::super) fn copied(&mut self, id: u64) {
        let order = self.copying.orders.iter_mut().find(|order| order.id == id);
        order.expect("an order waits for its records").records_out -= 1;
        self.copying.records_out -= 1;
        self.background_due = true;
        self.report_copies();
    }

    /// A page of the map that the first copies are to be compared with cannot be read.
    pub(in super::super) fn copies_failed(&mut self, error: &RequestError) {
        if let Some(index) = self.copying.orders.iter().position(|order| !order.left.is_empty()) {
            self.fail_copies(index, error.clone());
            self.report_copies();
        }
    }

    fn fail_copies(&mut self, index: usize, error: RequestError) {
        let order = &mut self.copying.orders[index];
        order.left.clear();
        order.bytes = 0;
        order.failed = Some(error);
    }

    fn report_copies(&mut self) {
        let done = |order: &Order| order.left.is_empty() && order.records_out == 0;
        while let Some(order) = self.copying.orders.pop_front_if(|order| done(order)) {
            let result = order.failed.map_or(Ok(order.copies), Err);
            self.events.push_back(Event::CopiedIn(order.token, result));
        }
    }
}

impl Draft {
    /// Adds what of the blocks from `start` to `until` is older than the zeros; returns where it stopped.
    fn add_zeros(&mut self, start: Lba, until: Lba, version: Version, newer: &mut Sweep<'_>) -> Lba {
        let mut at = start;
        while at < until {
            let next = newer.next(at).filter(|row| row.start < until);
            let free = next.map_or(until, |row| row.start);
            if free > at {
                if self.zeros.len() == COPIED_ZEROS_MAX {
                    return at;
                }
                self.copies.applied += free.0 - at.0;
                self.zeros.push(CopiedZeros {
                    start: at,
                    end: free,
                    version,
                });
            }
            at = free;
            if let Some(row) = next {
                let end = row.end.min(until);
                self.copies.superseded += end.0 - row.start.0;
                at = end;
            }
        }
        at
    }
}

/// The version before this one: what is newer than that is not older than this.
fn before(version: Version) -> Version {
    let seq = Seq(version.seq.0.saturating_sub(1));
    Version { seq, ..version }
}
