//! The order of a pass: lists, then tree after tree, page after page, and the blocks of some leaves by their places.

use super::super::Store;
use super::super::checkpoint::listed_page;
use super::super::page::{Entry, FANOUT, Page, PageKind, PageName, TreeId, span};
use super::super::read::Waiter;
use super::{Item, NOT_YET, Run, Thing, WINDOW_BLOCKS};
use crate::types::{Lba, Version};

/// Where a pass is.
#[derive(Debug)]
pub(super) struct Walk {
    /// None: the map; else the snapshot whose table is gone through was taken at this version.
    tree: Option<Version>,
    ended: bool,
    /// The next leaf holds this block.
    at: Lba,
    /// On each level, the page that was verified last.
    above: Vec<Option<u64>>,
    /// Blocks of the leaves so far.
    blocks: Vec<Item>,
    /// A leaf is to be read before the walk goes on.
    leaf: Option<PageName>,
}

impl Default for Walk {
    fn default() -> Walk {
        Walk {
            tree: None,
            ended: false,
            at: Lba(0),
            above: Vec::new(),
            blocks: Vec::new(),
            leaf: None,
        }
    }
}

pub(super) enum Step {
    /// There is something to read.
    Items,
    /// A page of the way is on its way.
    Wait,
    End,
}

/// The next leaf of a tree.
enum Next {
    Leaf,
    NeedPage(PageName, Entry),
    End,
}

impl Walk {
    /// The blocks of a leaf that was read, and goes on behind it.
    pub fn take_leaf(&mut self, name: PageName, page: &Page) {
        self.leaf = None;
        for (slot, entry) in page.entries().into_iter().enumerate() {
            if !entry.location.is_none() {
                self.blocks.push(Item::block(name.tree, name.lba_of(slot), entry));
            }
        }
        self.pass_by(name);
    }

    fn pass_by(&mut self, name: PageName) {
        self.at = self.at.max(Lba(name.first().0.saturating_add(span(name.level))));
    }

    /// A leaf was replaced while it was read.
    pub fn again(&mut self, name: PageName) {
        self.leaf = None;
        self.at = name.first();
    }

    /// What is below this page cannot be reached.
    pub fn skip(&mut self, name: PageName) {
        self.pass_by(name);
    }
}

impl Store {
    /// Puts the pages of the lists among what is to be read: they come first.
    pub(super) fn list_listed(&mut self, run: &mut Run) {
        let checkpoint = &self.superblock.checkpoint;
        let lists = [
            (PageKind::TableIndex, &checkpoint.table),
            (PageKind::Catalog, &checkpoint.catalog),
        ];
        for (kind, pointers) in lists {
            for (index, pointer) in pointers.iter().enumerate() {
                let thing = Thing::Listed(kind, listed_page(index), checkpoint.number);
                run.items.push_back(Item { entry: *pointer, thing });
            }
        }
    }

    /// Puts the pages of the segment table that an index page points to among what is to be read.
    pub(super) fn list_below(&mut self, run: &mut Run, name: PageName, number: u64, page: &Page) {
        let pointers = page.entries().into_iter().enumerate();
        for (slot, entry) in pointers.filter(|(_, entry)| !entry.location.is_none()) {
            let name = listed_page(name.index as usize * FANOUT + slot);
            let thing = Thing::Listed(PageKind::Table, name, number);
            run.items.push_back(Item { entry, thing });
        }
    }

    /// Finds more to read.
    pub(super) fn walk_on(&mut self, run: &mut Run) -> Step {
        if let Some(name) = run.walk.leaf.take() {
            run.walk.pass_by(name); // it is damaged, and was reported
        }
        if run.walk.blocks.len() >= WINDOW_BLOCKS {
            return give_blocks(run);
        }
        if run.walk.ended {
            return if run.walk.blocks.is_empty() {
                Step::End
            } else {
                give_blocks(run)
            };
        }
        match self.next_leaf(run) {
            Next::Leaf => Step::Items,
            Next::NeedPage(name, pointer) => {
                if !self.is_fetching(pointer) {
                    self.fetch(name, pointer, Waiter::Scrub);
                }
                Step::Wait
            }
            Next::End => {
                // Rows go from newer tables to older ones.
                let before = run.walk.tree.unwrap_or(NOT_YET);
                let older = self.recent.catalog.held().filter(|kept| kept.version < before).last();
                run.walk.tree = older.map(|kept| kept.version);
                run.walk.ended = older.is_none();
                run.walk.at = Lba(0);
                run.walk.above.clear();
                // Blocks of the next tree may lie between these.
                if run.walk.ended { self.walk_on(run) } else { Step::Items }
            }
        }
    }

    /// Puts the next leaf among what is to be read, and the pages above it that were not read yet.
    fn next_leaf(&mut self, run: &mut Run) -> Next {
        let found = match run.walk.tree {
            None => Some((TreeId::HEAD, self.map.root, self.map.height)),
            Some(version) => {
                let mut held = self.recent.catalog.held();
                let kept = held.find(|kept| kept.version == version);
                kept.map(|kept| (kept.id.into(), kept.root, kept.height))
            }
        };
        // A snapshot that was deleted meanwhile has nothing that anybody needs.
        let Some((tree, root, height)) = found else {
            return Next::End;
        };
        run.walk.above.resize(usize::from(height), None);
        'from_root: while run.walk.at.0 < span(height - 1) {
            let at = run.walk.at;
            let mut pointer = root;
            for level in (0..height).rev() {
                let name = PageName::of(tree, level, at);
                if pointer.location.is_none() {
                    run.walk.at = Lba(name.first().0.saturating_add(span(level)));
                    continue 'from_root;
                }
                if level == 0 {
                    let thing = Thing::Leaf(name);
                    run.items.push_back(Item { entry: pointer, thing });
                    run.walk.leaf = Some(name);
                    return Next::Leaf;
                }
                if run.walk.above[usize::from(level)] != Some(name.index) {
                    run.walk.above[usize::from(level)] = Some(name.index);
                    let thing = Thing::Page(name);
                    run.items.push_back(Item { entry: pointer, thing });
                }
                match self.map.cached(pointer) {
                    Some(page) => pointer = page.entry(name.slot(at)),
                    None => return Next::NeedPage(name, pointer),
                }
            }
        }
        Next::End
    }
}

/// Puts the blocks that were gathered among what is to be read, in the order of their places.
fn give_blocks(run: &mut Run) -> Step {
    let mut blocks = std::mem::take(&mut run.walk.blocks);
    blocks.sort_unstable_by_key(|item| item.entry.location);
    run.items.extend(blocks);
    Step::Items
}
