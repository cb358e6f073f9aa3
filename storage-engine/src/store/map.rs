//! Finding a block: the tree of pages on the disk through a cache of bounded size.

use std::collections::{BTreeSet, VecDeque};

use rustc_hash::FxHashMap;

use super::page::{Entry, Page, PageName, TreeId, span};
use crate::io::SegmentId;
use crate::types::{Lba, Location};

/// The committed map.
#[derive(Debug)]
pub struct Map {
    /// Points to the root page.
    pub root: Entry,
    /// Levels.
    pub height: u8,
    cache: Cache,
}

/// The outcome of a step down the tree.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Found {
    /// What the map says of the block.
    Entry(Entry),
    /// This page has to be read first.
    NeedPage(PageName, Entry),
}

impl Map {
    pub fn new(root: Entry, height: u8, cache_pages_max: usize) -> Map {
        Map {
            root,
            height,
            cache: Cache::new(cache_pages_max),
        }
    }

    /// Looks up one block.
    pub fn find(&mut self, lba: Lba) -> Found {
        self.find_in(TreeId::HEAD, self.root, self.height, lba)
    }

    /// Looks up one block in a tree.
    pub fn find_in(&mut self, tree: TreeId, root: Entry, height: u8, lba: Lba) -> Found {
        let mut pointer = root;
        if lba.0 >= span(height - 1) {
            return Found::Entry(Entry::default());
        }
        for level in (0..height).rev() {
            if pointer.location.is_none() {
                return Found::Entry(pointer);
            }
            let name = PageName::of(tree, level, lba);
            match self.cache.get(pointer) {
                Some(page) => pointer = page.entry(name.slot(lba)),
                None => return Found::NeedPage(name, pointer),
            }
        }
        Found::Entry(pointer)
    }

    /// Looks up the entry that points to page `name` in the tree that has this root.
    pub fn find_page(&mut self, name: PageName, root: Entry, height: u8) -> Found {
        let mut pointer = root;
        for level in (name.level + 1..height).rev() {
            if pointer.location.is_none() {
                return Found::Entry(pointer);
            }
            let above = PageName::of(name.tree, level, name.first());
            match self.cache.get(pointer) {
                Some(page) => pointer = page.entry(above.slot(name.first())),
                None => return Found::NeedPage(above, pointer),
            }
        }
        Found::Entry(pointer)
    }

    /// The cached page that `pointer` leads to.
    pub fn cached(&mut self, pointer: Entry) -> Option<Page> {
        self.cache.get(pointer).cloned()
    }

    /// Adds a page that was read or written.
    pub fn add(&mut self, location: Location, page: Page) {
        self.cache.insert(location, page);
    }

    /// Forgets the pages of segments that are about to hold something else.
    pub fn forget(&mut self, segments: &BTreeSet<SegmentId>) {
        if !segments.is_empty() {
            self.cache.forget(|location| segments.contains(&location.segment()));
        }
    }

    /// Forgets the pages of a segment from `offset` on: they were never committed, others will take their places.
    pub fn forget_behind(&mut self, segment: SegmentId, offset: u64) {
        self.cache
            .forget(|location| location.segment() == segment && location.offset() >= offset);
    }

    /// Pages in the cache.
    pub fn cached_pages(&self) -> usize {
        self.cache.pages.len()
    }
}

/// Second-chance (clock) cache of pages by their location.
#[derive(Debug)]
struct Cache {
    pages: FxHashMap<Location, Cached>,
    clock: VecDeque<Location>,
    pages_max: usize,
}

#[derive(Debug)]
struct Cached {
    page: Page,
    used: bool,
}

impl Cache {
    fn new(pages_max: usize) -> Cache {
        Cache {
            pages: FxHashMap::default(),
            clock: VecDeque::new(),
            pages_max,
        }
    }

    fn get(&mut self, pointer: Entry) -> Option<&Page> {
        let cached = self.pages.get_mut(&pointer.location)?;
        debug_assert_eq!(cached.page.check(), pointer.check, "a reused place was not forgotten");
        cached.used = true;
        Some(&cached.page)
    }

    fn insert(&mut self, location: Location, page: Page) {
        // It comes in as used: what was asked for outlives the next round of the clock, so its reader gets on.
        if self.pages.insert(location, Cached { page, used: true }).is_none() {
            self.clock.push_back(location);
        }
        while self.pages.len() > self.pages_max {
            let oldest = self.clock.pop_front().expect("the clock holds every cached page");
            match self.pages.get_mut(&oldest) {
                Some(cached) if cached.used => {
                    cached.used = false;
                    self.clock.push_back(oldest);
                }
                _ => {
                    self.pages.remove(&oldest);
                }
            }
        }
    }

    fn forget(&mut self, which: impl Fn(&Location) -> bool) {
        self.pages.retain(|location, _| !which(location));
        self.clock.retain(|location| !which(location));
    }
}
