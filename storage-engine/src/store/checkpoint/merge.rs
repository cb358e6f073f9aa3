//! The head: frozen tables are merged into the map, oldest first, each in one pass in ascending order.
//!
//! What the merge finds replaced goes to the snapshot that needs it, or is dead. More than one table is there only after
//! a snapshot was taken; the pages that the next pass replaces again are then dead before they were ever needed.

use super::super::Store;
use super::super::map::Found;
use super::super::memtable::{Memtable, tombstone};
use super::super::page::{Entry, PageName, TreeId, span};
use super::{Dropped, Frozen, Job, Phase, ROWS_PER_TURN, Step};
use crate::types::{Lba, Version};

/// Leaves read ahead of the merge.
const READ_AHEAD: usize = 16;

impl Store {
    pub(super) fn merge(&mut self, job: &mut Job) -> Step {
        let Some(frozen) = self.frozen.take() else {
            unreachable!("a checkpoint has frozen tables")
        };
        let mut outcome = Step::Done;
        for _ in 0..ROWS_PER_TURN {
            outcome = self.merge_one(job, &frozen);
            if !matches!(outcome, Step::Done) || !matches!(job.phase, Phase::Merge) || job.kept.is_full() {
                break;
            }
        }
        if matches!(outcome, Step::Wait)
            && let Some(table) = frozen.tables.get(job.pass)
        {
            self.read_ahead(job, table);
        }
        self.frozen = Some(frozen);
        outcome
    }

    fn merge_one(&mut self, job: &mut Job, frozen: &Frozen) -> Step {
        match self.meta_room(&mut job.out, job.head.step_pages()) {
            Step::Done => {}
            other => return other,
        }
        let table = frozen.tables.get(job.pass);
        let block = table.and_then(|table| table.next_block(job.next_block));
        let zero = table.and_then(|table| table.next_zero(job.next_zero));
        let touch = job.touched.first().copied();
        let relocated = job
            .relocated
            .first_key_value()
            .map(|(lba, relocated)| (*lba, *relocated));
        let first = [
            block.map(|(lba, _)| lba),
            zero.map(|(lba, ..)| lba),
            touch.map(|(lba, _)| lba),
            relocated.map(|(lba, _)| lba),
        ];
        let Some(first) = first.into_iter().flatten().min() else {
            self.finish_path(&mut job.out, &mut job.head);
            (job.next_block, job.next_zero, job.read_ahead) = (Lba(0), Lba(0), Lba(0));
            job.pass += 1;
            if job.pass >= frozen.tables.len() {
                job.phase = Phase::Drop;
            }
            return Step::Done;
        };
        if let Some((lba, level)) = touch.filter(|(lba, _)| *lba == first) {
            if !self.descend(&mut job.out, &mut job.head, lba, level) {
                return Step::Wait;
            }
            let page = job.head.lowest();
            page.changed |= !page.old.location.is_none();
            job.touched.remove(&(lba, level));
            return Step::Done;
        }
        if let Some((lba, relocated)) = relocated.filter(|(lba, _)| *lba == first) {
            if !self.descend(&mut job.out, &mut job.head, lba, 0) {
                return Step::Wait;
            }
            job.relocated.remove(&lba);
            relocated.apply(&mut job.out, job.head.lowest(), lba);
            return Step::Done;
        }
        if let Some((start, end, version)) = zero.filter(|(lba, ..)| *lba == first) {
            // Blocks in between are newer and come in order, and what the cleaner moved is known before it is replaced.
            let next = [block.map(|(lba, _)| lba), relocated.map(|(lba, _)| lba)];
            return self.merge_zero(job, start, end, version, next.into_iter().flatten().min());
        }
        let (lba, entry) = block.expect("one of the four is first");
        if !self.descend(&mut job.out, &mut job.head, lba, 0) {
            return Step::Wait;
        }
        let page = job.head.lowest();
        let slot = page.name.slot(lba);
        let old = page.entries[slot];
        debug_assert!(
            entry.version > old.version,
            "a table is newer than what it is merged into"
        );
        page.entries[slot] = entry;
        page.changed = true;
        job.out.count(entry, 1);
        job.replaced(lba, 0, old, entry.version);
        job.next_block = Lba(lba.0 + 1);
        Step::Done
    }

    fn merge_zero(&mut self, job: &mut Job, start: Lba, end: Lba, version: Version, next: Option<Lba>) -> Step {
        let leaf_end = Lba(PageName::of(TreeId::HEAD, 0, start).first().0 + span(0));
        // Go only as far as the leaf of the next item, or within it up to the item.
        let limit = match next {
            Some(next) if next < leaf_end => next.max(Lba(start.0 + 1)),
            Some(next) => PageName::of(TreeId::HEAD, 0, next).first(),
            None => end,
        };
        let chunk_end = end.min(limit);
        let whole = (0..job.head.height - 1).rev().find(|level| {
            let name = PageName::of(TreeId::HEAD, *level, start);
            let page_end = name.first().0.saturating_add(span(*level)).min(job.size_blocks);
            name.first() == start && page_end <= chunk_end.0
        });
        match whole {
            Some(level) => {
                if !self.descend(&mut job.out, &mut job.head, start, level + 1) {
                    return Step::Wait;
                }
                let page = job.head.lowest();
                let slot = page.name.slot(start);
                let name = page.name.child(slot);
                let old = std::mem::replace(&mut page.entries[slot], tombstone(version));
                page.changed = true;
                if old.location.is_none() {
                    job.replaced(start, level + 1, old, version);
                } else {
                    let replaced_at = Some(version);
                    job.dropped.push(Dropped {
                        name,
                        pointer: old,
                        replaced_at,
                    });
                }
                job.next_zero = Lba(start.0 + span(level));
            }
            None => {
                if !self.descend(&mut job.out, &mut job.head, start, 0) {
                    return Step::Wait;
                }
                let stop = chunk_end.min(leaf_end);
                for lba in (start.0..stop.0).map(Lba) {
                    let page = job.head.lowest();
                    let slot = page.name.slot(lba);
                    let old = page.entries[slot];
                    if old.version < version {
                        page.entries[slot] = tombstone(version);
                        page.changed = true;
                        job.replaced(lba, 0, old, version);
                    }
                }
                job.next_zero = stop;
            }
        }
        Step::Done
    }

    /// Asks for the leaves that the merge will need next.
    fn read_ahead(&mut self, job: &mut Job, table: &Memtable) {
        let mut from = job.read_ahead.max(job.next_block);
        for _ in 0..READ_AHEAD {
            let Some((lba, _)) = table.next_block(from) else {
                break;
            };
            if let Found::NeedPage(name, pointer) = self.map.find(lba)
                && !self.is_fetching(pointer)
            {
                self.fetch(name, pointer, super::super::read::Waiter::Background);
            }
            from = Lba(PageName::of(TreeId::HEAD, 0, lba).first().0 + span(0));
        }
        job.read_ahead = job.next_block;
    }

    /// Walks the subtrees that were cut off: each block in them goes to the snapshot that needs it, or is dead.
    pub(super) fn drop_subtrees(&mut self, job: &mut Job, then: Phase) -> Step {
        for _ in 0..ROWS_PER_TURN / 8 {
            let Some(dropped) = job.dropped.last().copied() else {
                job.phase = then;
                return Step::Done;
            };
            let Some(page) = self.page_at(&mut job.out, dropped.name, dropped.pointer) else {
                return Step::Wait;
            };
            job.dropped.pop();
            job.out.count(dropped.pointer, -1);
            for (slot, entry) in page.entries().into_iter().enumerate() {
                if dropped.name.level > 0 && !entry.location.is_none() {
                    job.dropped.push(Dropped {
                        name: dropped.name.child(slot),
                        pointer: entry,
                        ..dropped
                    });
                    continue;
                }
                match dropped.replaced_at {
                    Some(version) => job.replaced(dropped.name.lba_of(slot), dropped.name.level, entry, version),
                    None => job.out.count(entry, -1),
                }
            }
            if job.kept.is_full() {
                break;
            }
        }
        Step::Done
    }
}

impl Job {
    /// An entry of the head was replaced at `version`: the snapshot that needs it takes it, else it is dead. `level` is that
    /// of the page that held it.
    pub(super) fn replaced(&mut self, lba: Lba, level: u8, old: Entry, version: Version) {
        match self.catalog.keeper(old.version, version) {
            Some(index) => self.kept.put(index, lba, level, old),
            None => self.out.count(old, -1),
        }
    }
}
