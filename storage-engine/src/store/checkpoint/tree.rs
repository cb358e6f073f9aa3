//! Writing trees: the pages that a checkpoint makes, and the path of pages that a walk in ascending order holds.

use std::collections::BTreeSet;

use rustc_hash::FxHashMap;

use super::super::page::{Entry, Page, PageMut, PageName, TreeId, span};
use super::super::read::Waiter;
use super::super::segment::{SEGMENT_HEADER_BYTES, SegmentHeader, SegmentKind};
use super::super::superblock::StreamPosition;
use super::super::turn::PAGE;
use super::super::{Purpose, Store};
use super::Step;
use crate::buffer::Buf;
use crate::io::{FileId, Io, SegmentId};
use crate::types::{Lba, Location, PAGE_BYTES};

/// Pages written in one operation: 128 KiB. What a turn makes is no more, so a guest's write waits for one of them at most.
const PAGES_PER_WRITE: usize = 32;

/// The pages that a checkpoint writes, and what it changes in the counts of needed blocks.
#[derive(Debug)]
pub(in super::super) struct Pages {
    /// The checkpoint.
    number: u64,
    /// The next page goes here.
    pub meta: Option<StreamPosition>,
    /// Segments taken for pages.
    pub taken: BTreeSet<SegmentId>,
    waiting: Vec<Buf>,
    waiting_at: Option<StreamPosition>,
    pub writes_out: usize,
    /// Segments to sync.
    pub dirty: BTreeSet<SegmentId>,
    pub live: FxHashMap<SegmentId, i64>,
}

impl Pages {
    pub fn new(number: u64, meta: Option<StreamPosition>) -> Pages {
        Pages {
            number,
            meta,
            taken: BTreeSet::new(),
            waiting: Vec::new(),
            waiting_at: None,
            writes_out: 0,
            dirty: BTreeSet::new(),
            live: FxHashMap::default(),
        }
    }

    /// Counts a block or page as needed once more or once less.
    pub fn count(&mut self, entry: Entry, delta: i64) {
        if !entry.location.is_none() {
            let pages = entry.location.pages() as i64;
            *self.live.entry(entry.location.segment()).or_default() += delta * pages;
        }
    }
}

/// A tree that is being changed, and the path of pages that the walk is on.
#[derive(Debug)]
pub(in super::super) struct Tree {
    id: TreeId,
    pub root: Entry,
    pub height: u8,
    pub path: Vec<Dirty>,
}

/// A page of the path.
#[derive(Debug)]
pub(in super::super) struct Dirty {
    pub name: PageName,
    /// The block behind the last one below it.
    end: Lba,
    pub page: PageMut,
    pub old: Entry,
    pub changed: bool,
}

impl Dirty {
    fn new(name: PageName, page: PageMut, old: Entry) -> Dirty {
        Dirty {
            name,
            end: Lba(name.first().0.saturating_add(span(name.level))),
            page,
            old,
            changed: false,
        }
    }

    fn covers(&self, lba: Lba) -> bool {
        (self.name.first()..self.end).contains(&lba)
    }

    /// Writes the entry for `lba` over; returns what it was.
    pub fn put(&mut self, lba: Lba, entry: Entry) -> Entry {
        self.changed = true;
        self.page.put(self.name.slot(lba), entry)
    }
}

impl Tree {
    /// The tree of `replica` at `root`, made `height` levels high: the old root becomes the first child of new pages above
    /// it.
    pub fn new(id: TreeId, replica: [u8; 16], root: Entry, old_height: u8, height: u8) -> Tree {
        let height = height.max(old_height);
        let mut tree = Tree {
            id,
            root,
            height,
            path: Vec::new(),
        };
        if !root.is_vacant() && height > old_height {
            for level in (old_height..height).rev() {
                let name = PageName {
                    tree: id,
                    level,
                    index: 0,
                };
                let page = PageMut::filled(name, replica, false, Entry::default());
                tree.path.push(Dirty::new(name, page, Entry::default()));
            }
            let lowest = tree.path.last_mut().expect("there is at least one new level");
            lowest.put(Lba(0), std::mem::take(&mut tree.root));
        }
        tree
    }

    /// The page that the path ends in.
    pub fn lowest(&mut self) -> &mut Dirty {
        self.path.last_mut().expect("descend leaves a path")
    }

    /// Blocks that one step on this tree may write: it finishes at most a path and starts another. The leaves of a sealed
    /// volume take two.
    pub fn step_pages(&self) -> usize {
        2 * usize::from(self.height) + 4
    }
}

impl Store {
    /// Makes sure that `pages` pages can be placed without waiting.
    pub(super) fn meta_room(&mut self, out: &mut Pages, pages: usize) -> Step {
        let segment_bytes = self.superblock.geometry.segment_bytes;
        let left = out.meta.map_or(0, |meta| (segment_bytes - meta.offset) / PAGE_BYTES);
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
        self.flush_pages(out);
        out.taken.insert(segment);
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
        out.writes_out += 1;
        out.dirty.insert(segment);
        out.meta = Some(StreamPosition {
            segment,
            offset: SEGMENT_HEADER_BYTES,
        });
        Step::Done
    }

    /// Places a page in the meta stream; returns the entry that points to it.
    pub(super) fn place(&mut self, out: &mut Pages, page: &Page) -> Entry {
        let at = out.meta.as_mut().expect("meta_room was asked first");
        let location = Location::new(at.segment, at.offset, page.bytes().len() as u64);
        if out.waiting.is_empty() {
            out.waiting_at = Some(*at);
        }
        at.offset += location.len();
        out.waiting.push(page.bytes().clone());
        self.turn.spend(PAGE * location.pages() as u32);
        *out.live.entry(location.segment()).or_default() += location.pages() as i64;
        out.dirty.insert(location.segment());
        self.stats.map_bytes += location.len();
        if out.waiting.len() == PAGES_PER_WRITE {
            self.flush_pages(out);
        }
        Entry {
            location,
            check: page.check(),
            ..Entry::default()
        }
    }

    pub(super) fn flush_pages(&mut self, out: &mut Pages) {
        if let Some(at) = out.waiting_at.take() {
            let parts = std::mem::take(&mut out.waiting);
            self.issue(
                Io::Write {
                    file: FileId::Segment(at.segment),
                    offset: at.offset,
                    parts,
                },
                Purpose::MetaWrite,
            );
            out.writes_out += 1;
        }
    }

    /// The page that `pointer` leads to, or a word to wait.
    pub(super) fn page_at(&mut self, out: &mut Pages, name: PageName, pointer: Entry) -> Option<Page> {
        if let Some(page) = self.map.cached(pointer) {
            return Some(page);
        }
        if out.dirty.contains(&pointer.location.segment()) {
            // It may be one of this checkpoint's own pages, still on its way to the disk.
            self.flush_pages(out);
            if out.writes_out > 0 {
                return None;
            }
        }
        if !self.is_fetching(pointer) {
            self.fetch(name, pointer, Waiter::Background);
        }
        None
    }

    /// Makes the path end in the page of `level` above `lba`; false if a page has to be read first.
    pub(super) fn descend(&mut self, out: &mut Pages, tree: &mut Tree, lba: Lba, level: u8) -> bool {
        while let Some(top) = tree.path.last() {
            if top.name.level >= level && top.covers(lba) {
                break;
            }
            self.finish_page(out, tree);
        }
        loop {
            let (name, pointer) = match tree.path.last() {
                Some(top) if top.name.level == level => return true,
                Some(top) => {
                    let slot = top.name.slot(lba);
                    (top.name.child(slot), top.page.entry(slot))
                }
                None => (PageName::of(tree.id, tree.height - 1, lba), tree.root),
            };
            debug_assert!(
                name.level + 1 < tree.height || name.index == 0,
                "the tree reaches block {}",
                lba.0
            );
            let page = if pointer.location.is_none() {
                let replica = self.superblock.geometry.identity.replica;
                PageMut::filled(name, replica, self.seals.tagged(), pointer)
            } else {
                match self.page_at(out, name, pointer) {
                    Some(page) => PageMut::of(&page),
                    None => return false,
                }
            };
            self.turn.spend(1);
            tree.path.push(Dirty::new(name, page, pointer));
        }
    }

    /// Takes the lowest page off the path; a changed one gets a place, and its parent points there.
    pub(super) fn finish_page(&mut self, out: &mut Pages, tree: &mut Tree) {
        let dirty = tree.path.pop().expect("the caller saw a page");
        if !dirty.changed {
            return;
        }
        let entry = match dirty.page.uniform() {
            Some(entry) => entry,
            None => {
                let version = dirty.page.version();
                let page = dirty.page.seal(out.number);
                let entry = Entry {
                    version,
                    ..self.place(out, &page)
                };
                self.map.add(entry.location, page);
                entry
            }
        };
        out.count(dirty.old, -1);
        match tree.path.last_mut() {
            Some(parent) => {
                parent.put(dirty.name.first(), entry);
            }
            None => tree.root = entry,
        }
    }

    /// Takes all pages off the path.
    pub(super) fn finish_path(&mut self, out: &mut Pages, tree: &mut Tree) {
        while !tree.path.is_empty() {
            self.finish_page(out, tree);
        }
    }
}
