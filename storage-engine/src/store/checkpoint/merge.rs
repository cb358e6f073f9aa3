//! The head: frozen tables are merged into the map, oldest first, each in one pass in ascending order.
//!
//! What the merge finds replaced goes to the snapshot that needs it, or is dead. More than one table is there only after
//! a snapshot was taken; the pages that the next pass replaces again are then dead before they were ever needed.

use super::super::Store;
use super::super::map::Found;
use super::super::memtable::{Memtable, tombstone};
use super::super::page::{Entry, FANOUT, PageName, TreeId, span};
use super::super::turn::ROW;
use super::{Dropped, Frozen, Job, Phase, Step};
use crate::types::{Lba, Version};

/// Leaves read ahead of the merge.
const READ_AHEAD: usize = 16;

impl Store {
    /// Hands what the cleaner did in the tables of snapshots over to where rows for them are gathered.
    pub(super) fn sort_moves(&mut self, job: &mut Job) -> Step {
        let frozen = self.frozen.as_ref().expect("a checkpoint has frozen tables");
        if job.next_move == (TreeId::HEAD, Lba(0)) {
            // Pages are few: the cleaner waits for a segment of them to be mostly dead.
            let of_tables = |(tree, ..): &&(TreeId, Lba, u8)| *tree != TreeId::HEAD;
            for (tree, lba, level) in frozen.touched.iter().filter(of_tables) {
                let index = job.catalog.of_tree(*tree).expect("the head was left out");
                job.kept.touch(index, *lba, *level);
            }
            job.next_move = (TreeId::HEAD, Lba(u64::MAX));
        }
        let mut table = None;
        for (&(tree, lba), relocated) in frozen.relocated.range(job.next_move..) {
            if tree == TreeId::HEAD {
                continue; // the very last block that there can be
            }
            job.next_move = (tree, lba);
            if !self.turn.goes_on() || job.kept.is_full() {
                return Step::Done;
            }
            let index = match table {
                Some((of, index)) if of == tree => index,
                _ => job.catalog.of_tree(tree).expect("the head was left out"),
            };
            table = Some((tree, index));
            job.kept.relocate(index, lba, *relocated);
            job.next_move = (tree, Lba(lba.0 + 1));
            self.turn.spend(2 * ROW);
        }
        job.phase = Phase::Merge;
        Step::Done
    }

    pub(super) fn merge(&mut self, job: &mut Job) -> Step {
        let Some(frozen) = self.frozen.take() else {
            unreachable!("a checkpoint has frozen tables")
        };
        let mut outcome = Step::Done;
        while self.turn.goes_on() {
            outcome = self.merge_some(job, &frozen);
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

    /// Merges what comes next: a page to be written anew, rows of one leaf, or a piece of a zeroed range.
    fn merge_some(&mut self, job: &mut Job, frozen: &Frozen) -> Step {
        match self.meta_room(&mut job.out, job.head.step_pages()) {
            Step::Done => {}
            other => return other,
        }
        self.turn.spend(2 * ROW);
        let table = frozen.tables.get(job.pass);
        let block = table.and_then(|table| table.next_block(job.next_block));
        let block = block.map(|(lba, _)| lba);
        let zero = table.and_then(|table| table.next_zero(job.next_zero));
        let zero_at = zero.map(|(lba, ..)| lba);
        let (touched, level) = job.next_touch;
        let mut touches = frozen.touched.range((TreeId::HEAD, touched, level)..);
        let touch = touches.next().filter(|(tree, ..)| *tree == TreeId::HEAD);
        let touch = touch.map(|(_, lba, level)| (*lba, *level));
        let touch_at = touch.map(|(lba, _)| lba);
        let mut moves = frozen.relocated.range((TreeId::HEAD, job.next_relocated)..);
        let relocated = moves.next().filter(|((tree, _), _)| *tree == TreeId::HEAD);
        let relocated = relocated.map(|((_, lba), relocated)| (*lba, *relocated));
        let relocated_at = relocated.map(|(lba, _)| lba);
        let Some(first) = [block, zero_at, touch_at, relocated_at].into_iter().flatten().min() else {
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
            job.next_touch = (lba, level + 1);
            return Step::Done;
        }
        if zero_at == Some(first) && relocated_at != Some(first) {
            let (start, end, version) = zero.expect("it is the first");
            // Blocks in between are newer and come in order, and what the cleaner moved is known before it is replaced.
            let next = block.into_iter().chain(relocated_at).min();
            return self.merge_zero(job, start, end, version, next);
        }
        if !self.descend(&mut job.out, &mut job.head, first, 0) {
            return Step::Wait;
        }
        // The rest of the leaf at once, up to what comes in between.
        let leaf_end = Lba(PageName::of(TreeId::HEAD, 0, first).first().0 + span(0));
        let bound = [touch_at, zero_at].into_iter().flatten().fold(leaf_end, Lba::min);
        let mut rows = 0;
        if relocated_at == Some(first) {
            // At one and the same block they come before the others.
            let bound = block.map_or(bound, |block| bound.min(Lba(block.0 + 1)));
            let bound = if zero_at == Some(first) {
                Lba(first.0 + 1)
            } else {
                bound
            };
            let rest = moves.take_while(|((tree, _), _)| *tree == TreeId::HEAD);
            let rest = rest.map(|((_, lba), relocated)| (*lba, *relocated));
            let page = job.head.path.last_mut().expect("descend leaves a path");
            for (lba, relocated) in relocated.into_iter().chain(rest).take_while(|(lba, _)| *lba < bound) {
                relocated.apply(&mut job.out, page, lba);
                job.next_relocated = Lba(lba.0 + 1);
                rows += ROW;
            }
        } else {
            let bound = relocated_at.map_or(bound, |relocated| bound.min(relocated));
            let table = table.expect("a block comes from a table");
            for (lba, entry) in table.blocks_in_leaf(first).take_while(|(lba, _)| *lba < bound) {
                let old = job.head.lowest().put(lba, entry);
                debug_assert!(
                    entry.version >= old.version,
                    "a table is newer than what it is merged into, but for what was damaged and is written anew"
                );
                job.out.count(entry, 1);
                job.replaced(lba, 0, old, entry.version);
                job.next_block = Lba(lba.0 + 1);
                rows += ROW;
            }
        }
        debug_assert!(rows > 0, "the first row was merged");
        self.turn.spend(rows);
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
                let name = page.name.child(page.name.slot(start));
                let old = page.put(start, tombstone(version));
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
                    let old = page.page.entry(page.name.slot(lba));
                    if old.version < version {
                        page.put(lba, tombstone(version));
                        job.replaced(lba, 0, old, version);
                    }
                }
                self.turn.spend(ROW * (stop.0 - start.0) as u32);
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
        while self.turn.goes_on() {
            let Some(dropped) = job.dropped.last().copied() else {
                job.phase = then;
                return Step::Done;
            };
            let Some(page) = self.page_at(&mut job.out, dropped.name, dropped.pointer) else {
                return Step::Wait;
            };
            job.dropped.pop();
            job.out.count(dropped.pointer, -1);
            self.turn.spend(2 * ROW * FANOUT as u32);
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
