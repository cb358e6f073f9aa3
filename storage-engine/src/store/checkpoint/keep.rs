//! The tables of snapshots: rows that the merge handed over go in, rows of deleted snapshots go out.

use std::collections::BTreeMap;

use super::super::Store;
use super::super::page::Entry;
use super::super::turn::ROW;
use super::tree::{Dirty, Pages, Tree};
use super::{Job, Step};
use crate::types::{Check, Lba, Location};

/// Rows gathered for the tables of snapshots before they are written into them.
const KEPT_MAX: usize = 32 << 10;

/// A block that the cleaner copied elsewhere.
#[derive(Clone, Copy, Debug)]
pub struct Relocated {
    pub from: Location,
    pub to: Location,
    /// A block of another volume becomes this one's own.
    pub check: Check,
}

impl Relocated {
    /// Lets the leaf point to the copy, unless the block was replaced meanwhile.
    pub(super) fn apply(self, out: &mut Pages, leaf: &mut Dirty, lba: Lba) {
        let old = leaf.page.entry(leaf.name.slot(lba));
        if old.location == self.from {
            let new = Entry {
                location: self.to,
                check: self.check,
                ..old
            };
            leaf.put(lba, new);
            out.count(old, -1);
            out.count(new, 1);
        }
    }
}

/// What is to be done in the tables of snapshots: in order of the table, then of the block, so that it is one pass.
#[derive(Debug, Default)]
pub(in super::super) struct Kept {
    rows: BTreeMap<(usize, Lba, Slot), Change>,
}

/// Tells changes at one block apart.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Slot {
    Page(u8),
    Entry(u8),
}

#[derive(Clone, Copy, Debug)]
enum Change {
    Touch,
    Relocate(Relocated),
    Put(Entry),
}

impl Kept {
    /// The snapshot takes an entry that was in a page of `level`.
    pub fn put(&mut self, index: usize, lba: Lba, level: u8, entry: Entry) {
        let entry = if entry.location.is_none() { entry.hole() } else { entry };
        let before = self.rows.insert((index, lba, Slot::Entry(level)), Change::Put(entry));
        debug_assert!(before.is_none(), "a snapshot keeps a block once");
    }

    /// A block of the table lies elsewhere now.
    pub fn relocate(&mut self, index: usize, lba: Lba, relocated: Relocated) {
        let slot = Slot::Entry(0);
        self.rows.insert((index, lba, slot), Change::Relocate(relocated));
    }

    /// A page of the table is to be written anew.
    pub fn touch(&mut self, index: usize, lba: Lba, level: u8) {
        self.rows.insert((index, lba, Slot::Page(level)), Change::Touch);
    }

    pub fn is_full(&self) -> bool {
        self.rows.len() >= KEPT_MAX
    }

    pub fn is_empty(&self) -> bool {
        self.rows.is_empty()
    }
}

impl Store {
    /// Takes the gathered rows a step further into their tables.
    pub(super) fn keep_rows(&mut self, job: &mut Job) -> Step {
        while self.turn.goes_on() {
            self.turn.spend(3 * ROW);
            let next = job.kept.rows.first_key_value();
            let Some((index, lba, slot, change)) =
                next.map(|(&(index, lba, slot), &change)| (index, lba, slot, change))
            else {
                self.close_table(job);
                job.keeping = false;
                return Step::Done;
            };
            if job.table.as_ref().is_some_and(|(open, _)| *open != index) {
                self.close_table(job);
            }
            let replica = self.superblock.geometry.identity.replica;
            let (_, table) = job
                .table
                .get_or_insert_with(|| job.catalog.open(index, replica, job.head.height));
            match self.meta_room(&mut job.out, table.step_pages()) {
                Step::Done => {}
                other => return other,
            }
            let (Slot::Page(level) | Slot::Entry(level)) = slot;
            if !self.descend(&mut job.out, table, lba, level) {
                return Step::Wait;
            }
            job.kept.rows.remove(&(index, lba, slot));
            let page = table.lowest();
            match change {
                Change::Touch => page.changed |= !page.old.location.is_none(),
                Change::Relocate(relocated) => relocated.apply(&mut job.out, page, lba),
                Change::Put(entry) => {
                    let before = page.put(lba, entry);
                    assert!(before.is_vacant(), "a snapshot keeps a block once");
                    job.catalog.get_mut(index).pages += entry.location.pages();
                }
            }
        }
        Step::Done
    }

    fn close_table(&mut self, job: &mut Job) {
        if let Some((index, mut table)) = job.table.take() {
            self.finish_path(&mut job.out, &mut table);
            job.catalog.close(index, &table);
        }
    }
}

impl super::super::snapshot::Catalog {
    /// The table of a snapshot, at least as high as the map.
    pub(super) fn open(&self, index: usize, replica: [u8; 16], height: u8) -> (usize, Tree) {
        let snapshot = &self.all()[index];
        let tree = Tree::new(snapshot.id.into(), replica, snapshot.root, snapshot.height, height);
        (index, tree)
    }

    /// Takes back what [`Catalog::open`] gave out.
    pub(super) fn close(&mut self, index: usize, tree: &Tree) {
        debug_assert!(tree.path.is_empty());
        let snapshot = self.get_mut(index);
        (snapshot.root, snapshot.height) = (tree.root, tree.height);
    }
}
