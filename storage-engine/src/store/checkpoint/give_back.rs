//! Rows leave the tables of snapshots: deleting gives them to an older snapshot or lets them die, reverting gives them
//! back to the head.
//!
//! Both take a table apart from its left end, so a table that is half gone is a table, and the next checkpoint, or the
//! next engine after a crash, goes on where this one stopped.

use super::super::Store;
use super::super::page::{Entry, FANOUT, PageName};
use super::super::turn::ROW;
use super::tree::{Pages, Tree};
use super::{Dropped, Job, Phase, Step};
use crate::types::{Lba, Version};

/// Pages of deleted tables that one checkpoint takes apart, so that it stays short and needs little space.
pub const DELETED_PAGES_MAX: usize = 2048;
/// The same when the pool is full: what it gives back pays for the next round.
pub const DELETED_PAGES_FULL: usize = 128;

/// A row that was taken out of a table.
#[derive(Clone, Copy, Debug)]
pub(in super::super) struct Row {
    lba: Lba,
    /// Of the page that held it: 0 for one block, else a whole subtree that reads as zeros.
    level: u8,
    entry: Entry,
}

enum Taken {
    Rows(Vec<Row>),
    Wait,
    Empty,
}

impl Store {
    /// Takes the rows out of the leftmost page of a table that has any.
    fn take_rows(&mut self, out: &mut Pages, tree: &mut Tree, id: super::super::page::TreeId) -> Taken {
        loop {
            let Some(top) = tree.path.last_mut() else {
                if tree.root.is_vacant() {
                    return Taken::Empty;
                }
                if !self.descend(out, tree, Lba(0), tree.height - 1) {
                    return Taken::Wait;
                }
                continue;
            };
            let Some(slot) = (0..FANOUT).find(|slot| !top.page.entry(*slot).is_vacant()) else {
                self.finish_page(out, tree);
                continue;
            };
            let (name, pointer) = (top.name, top.page.entry(slot));
            if name.level > 0 && !pointer.location.is_none() {
                let first = name.lba_of(slot);
                debug_assert_eq!(PageName::of(id, name.level, first), name);
                if !self.descend(out, tree, first, name.level - 1) {
                    return Taken::Wait;
                }
                continue;
            }
            let is_row = |entry: &Entry| !entry.is_vacant() && (name.level == 0 || entry.location.is_none());
            let mut rows = Vec::new();
            for slot in slot..FANOUT {
                let entry = top.page.entry(slot);
                if is_row(&entry) {
                    top.page.put(slot, Entry::default());
                    rows.push(Row {
                        lba: name.lba_of(slot),
                        level: name.level,
                        entry,
                    });
                }
            }
            top.changed = true;
            self.turn.spend(3 * ROW * rows.len() as u32);
            return Taken::Rows(rows);
        }
    }

    /// Fills `job.rows` from the table at `index`; false when the table is empty.
    fn next_rows(&mut self, job: &mut Job, index: usize) -> Result<bool, Step> {
        let replica = self.superblock.geometry.identity.replica;
        let (_, tree) = job.walk.get_or_insert_with(|| job.catalog.open(index, replica, 0));
        match self.meta_room(&mut job.out, tree.step_pages()) {
            Step::Done => {}
            other => return Err(other),
        }
        let id = job.catalog.all()[index].id.into();
        match self.take_rows(&mut job.out, tree, id) {
            Taken::Wait => Err(Step::Wait),
            Taken::Empty => {
                self.close_walk(job);
                Ok(false)
            }
            Taken::Rows(rows) => {
                let pages: u64 = rows.iter().map(|row| row.entry.location.pages()).sum();
                job.catalog.get_mut(index).pages -= pages;
                job.rows.extend(rows);
                Ok(true)
            }
        }
    }

    fn close_walk(&mut self, job: &mut Job) {
        if let Some((index, mut tree)) = job.walk.take() {
            self.finish_path(&mut job.out, &mut tree);
            job.catalog.close(index, &tree);
        }
    }

    /// Takes the tables of deleted snapshots apart: what an older one still needs goes there, the rest is dead.
    pub(super) fn delete_tables(&mut self, job: &mut Job) -> Step {
        while self.turn.goes_on() {
            if job.kept.is_full() {
                return Step::Done;
            }
            let walking = job.walk.as_ref().map(|(index, _)| *index);
            let deleted = job.catalog.all().iter().position(|s| s.deleting && !s.root.is_vacant());
            let Some(index) = walking.or(deleted).filter(|_| job.delete_pages > 0) else {
                self.close_walk(job);
                job.phase = Phase::Revert;
                return Step::Done;
            };
            match self.next_rows(job, index) {
                Ok(_) => {}
                Err(step) => return step,
            }
            job.delete_pages -= 1;
            let older = job.catalog.held_before(index);
            let oldest = older.map_or(Version::default(), |older| job.catalog.all()[older].version);
            for row in std::mem::take(&mut job.rows) {
                match older {
                    // It existed then, and the older snapshot has no row for it: this one had the answer.
                    Some(older) if row.entry.version <= oldest => {
                        job.kept.put(older, row.lba, row.level, row.entry);
                    }
                    _ => job.out.count(row.entry, -1),
                }
            }
        }
        Step::Done
    }

    /// Gives the rows of a snapshot and of all newer ones back to the head, the newest snapshot's first: what stays is the
    /// oldest row of each block, and that is what it was at the snapshot.
    pub(super) fn revert_head(&mut self, job: &mut Job) -> Step {
        let Some(to) = job.revert else {
            job.phase = Phase::FindFree;
            return Step::Done;
        };
        while self.turn.goes_on() {
            self.turn.spend(ROW);
            let Some(row) = job.rows.front().copied() else {
                let mut tables = job.catalog.all().iter();
                let newest = tables.rposition(|kept| kept.version >= to && !kept.root.is_vacant());
                let walking = job.walk.as_ref().map(|(index, _)| *index);
                let Some(index) = walking.or(newest) else {
                    match self.meta_room(&mut job.out, job.head.step_pages()) {
                        Step::Done => {}
                        other => return other,
                    }
                    self.finish_path(&mut job.out, &mut job.head);
                    job.phase = Phase::DropReverted;
                    return Step::Done;
                };
                match self.next_rows(job, index) {
                    Ok(_) => continue,
                    Err(step) => return step,
                }
            };
            match self.meta_room(&mut job.out, job.head.step_pages()) {
                Step::Done => {}
                other => return other,
            }
            if !self.descend(&mut job.out, &mut job.head, row.lba, row.level) {
                return Step::Wait;
            }
            job.rows.pop_front();
            let page = job.head.lowest();
            let slot = page.name.slot(row.lba);
            let name = page.name;
            let old = page.put(row.lba, row.entry.unmarked());
            if row.level > 0 && !old.location.is_none() {
                job.dropped.push(Dropped {
                    name: name.child(slot),
                    pointer: old,
                    replaced_at: None,
                });
            } else {
                job.out.count(old, -1);
            }
        }
        Step::Done
    }
}
