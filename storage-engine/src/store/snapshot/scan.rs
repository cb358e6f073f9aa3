//! Which blocks changed between two snapshots, and which are stored at one.
//!
//! What changed after a snapshot is what the tables from it on hold, up to the other one, and what the log has since the
//! last checkpoint. So a scan walks rows that are there because something changed, each table in ascending order, and
//! costs what changed, whatever the size of the volume. It is done in pieces: an answer has so many ranges at most, and
//! says where to go on. It looks everything up from the roots, so checkpoints and deleted snapshots in between do not
//! matter, as long as the two ends are there.

use std::collections::BTreeMap;

use super::super::map::Found;
use super::super::memtable::Memtable;
use super::super::page::{Entry, PageName, TreeId, span};
use super::super::read::Waiter;
use super::super::{Event, Store};
use crate::request::{RequestError, Scan};
use crate::types::{Lba, SnapshotId, Version};

/// Rows looked at for one answer, so that guests get their turn in between.
const ROWS_MAX: usize = 16 << 10;

/// Blocks that a scan found: first block and the one behind the last, in order, apart from each other.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Extents {
    pub extents: Vec<(Lba, Lba)>,
    /// Where the scan goes on; none at the end.
    pub next: Option<Lba>,
}

/// Scans under way.
#[derive(Debug, Default)]
pub struct Scans {
    next: u64,
    under_way: BTreeMap<u64, Running>,
}

#[derive(Debug)]
struct Running {
    token: u64,
    scan: Scan,
    at: Lba,
    extents: Vec<(Lba, Lba)>,
    extents_max: usize,
    rows: usize,
    sources: Vec<Source>,
}

/// Rows of one tree from the scan's place on.
#[derive(Clone, Copy, Debug)]
struct Source {
    tree: TreeId,
    next: Next,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Next {
    Unknown,
    Rows(Lba, Lba),
    End,
}

/// What a step of a scan came to.
enum Outcome {
    Done(Option<Lba>),
    NeedPage(PageName, Entry),
}

impl Running {
    fn add(&mut self, start: Lba, end: Lba) {
        match self.extents.last_mut() {
            Some((_, last)) if *last >= start => *last = end.max(*last),
            _ => self.extents.push((start, end)),
        }
    }
}

/// The versions between which a row of the log counts, and the blocks that are looked at.
struct Bounds {
    /// What was written at these versions, the first one not included.
    after: Version,
    until: Version,
    end: Lba,
}

impl Store {
    /// Looks for blocks from `from` on; reported by [`Event::Scanned`] with `token`.
    pub fn scan(&mut self, token: u64, scan: Scan, from: Lba, extents_max: usize) -> Result<(), RequestError> {
        let (_, sources) = self.bounds(scan)?;
        let id = self.scans.next;
        self.scans.next += 1;
        let running = Running {
            token,
            scan,
            at: from,
            extents: Vec::new(),
            extents_max: extents_max.max(1),
            rows: 0,
            sources,
        };
        self.scans.under_way.insert(id, running);
        self.run_scan(id, Ok(()));
        Ok(())
    }

    /// Goes on with a scan that waited for a page.
    pub(in super::super) fn run_scan(&mut self, id: u64, page: Result<(), RequestError>) {
        let mut running = self.scans.under_way.remove(&id).expect("it is under way");
        let outcome = page.and_then(|()| self.bounds(running.scan));
        let outcome = outcome.map(|(bounds, _)| self.step_scan(&mut running, &bounds));
        let result = match outcome {
            Ok(Outcome::NeedPage(name, pointer)) => {
                self.scans.under_way.insert(id, running);
                return self.fetch(name, pointer, Waiter::Scan(id));
            }
            Ok(Outcome::Done(next)) => Ok(Extents {
                extents: running.extents,
                next,
            }),
            Err(error) => Err(error),
        };
        self.events.push_back(Event::Scanned(running.token, result));
    }

    /// What a scan has to look at, if its ends are there.
    fn bounds(&self, scan: Scan) -> Result<(Bounds, Vec<Source>), RequestError> {
        let end_of = |id: Option<SnapshotId>| match id {
            Some(id) => self.known(id).map(|kept| (kept.version, Lba(kept.size_blocks))),
            None => Ok((Version::MAX, Lba(self.size_blocks()))),
        };
        let (after, (until, end), head) = match scan {
            Scan::Changed { from, to } => (self.known(from)?.version, end_of(to)?, false),
            Scan::Stored { at } => (Version::default(), end_of(at)?, true),
        };
        if after >= until {
            return Err(RequestError::Invalid(
                "changes are asked for from an older snapshot to a newer one".into(),
            ));
        }
        // What is stored at a snapshot is in its table, a newer one's, or the head; what changed is in the tables between.
        let tables = self.recent.catalog.all().iter().filter(|kept| match scan {
            Scan::Changed { .. } => kept.version >= after && kept.version < until,
            Scan::Stored { .. } => kept.version >= until,
        });
        let trees = tables.map(|kept| kept.id.into()).chain(head.then_some(TreeId::HEAD));
        let next = Next::Unknown;
        let sources = trees.map(|tree| Source { tree, next }).collect();
        Ok((Bounds { after, until, end }, sources))
    }

    fn step_scan(&mut self, running: &mut Running, bounds: &Bounds) -> Outcome {
        let stored = matches!(running.scan, Scan::Stored { .. });
        loop {
            if running.at >= bounds.end {
                return Outcome::Done(None);
            }
            for n in 0..running.sources.len() {
                let Source { tree, next } = running.sources[n];
                if !matches!(next, Next::End) && !matches!(next, Next::Rows(_, end) if end > running.at) {
                    running.sources[n].next = match self.next_row(tree, running.at, stored) {
                        Ok(Some((start, end))) => Next::Rows(start, end),
                        Ok(None) => Next::End,
                        Err((name, pointer)) => return Outcome::NeedPage(name, pointer),
                    };
                }
            }
            let trees = running.sources.iter().filter_map(|source| match source.next {
                Next::Rows(start, end) => Some((start.max(running.at), end)),
                Next::Unknown | Next::End => None,
            });
            let memory = self.next_recent(running.at, bounds, stored);
            let Some((start, end)) = trees.chain(memory).min() else {
                return Outcome::Done(None);
            };
            let end = end.min(bounds.end);
            if start >= end {
                return Outcome::Done(None);
            }
            if running.rows >= ROWS_MAX {
                return Outcome::Done(Some(start));
            }
            // What is stored is found block by block: each may be what it was at the snapshot, or not.
            let end = if stored { Lba(start.0 + 1) } else { end };
            let wanted = !stored || {
                let found = match bounds.until {
                    Version::MAX => match self.lookup_memory(start) {
                        Some(entry) => Found::Entry(entry),
                        None => self.map.find(start),
                    },
                    at => self.find_at(at, start),
                };
                match found {
                    Found::Entry(entry) => !entry.location.is_none(),
                    Found::NeedPage(name, pointer) => return Outcome::NeedPage(name, pointer),
                }
            };
            running.rows += 1;
            if wanted {
                let joins = running.extents.last().is_some_and(|(_, last)| *last >= start);
                if !joins && running.extents.len() == running.extents_max {
                    return Outcome::Done(Some(start));
                }
                running.add(start, end);
            }
            running.at = end;
        }
    }

    /// The first rows at or behind `from` that the log has and no checkpoint.
    fn next_recent(&self, from: Lba, bounds: &Bounds, stored: bool) -> Option<(Lba, Lba)> {
        let counts = |version: Version| version > bounds.after && version <= bounds.until;
        let in_table = |table: &Memtable| {
            // A table is cut at each snapshot: all of its rows count, or none.
            let block = table.next_block(from).filter(|(_, entry)| counts(entry.version));
            let zero = table
                .next_zero(from)
                .filter(|(.., version)| !stored && counts(*version));
            let block = block.map(|(lba, _)| (lba, Lba(lba.0 + 1)));
            block.into_iter().chain(zero.map(|(start, end, _)| (start, end))).min()
        };
        let frozen = self.frozen.iter().flat_map(|frozen| frozen.tables.iter());
        self.recent.tables().chain(frozen).filter_map(in_table).min()
    }

    /// The first rows of a tree at or behind `from`; or the page that has to be read first. A tree that is gone has none.
    fn next_row(&mut self, tree: TreeId, from: Lba, stored: bool) -> Result<Option<(Lba, Lba)>, (PageName, Entry)> {
        let (root, height) = if tree == TreeId::HEAD {
            (self.map.root, self.map.height)
        } else {
            let kept = self.recent.catalog.all().iter().find(|kept| tree == kept.id.into());
            let Some(kept) = kept else { return Ok(None) };
            (kept.root, kept.height)
        };
        self.next_below(PageName::of(tree, height - 1, Lba(0)), root, from, stored)
    }

    fn next_below(
        &mut self,
        name: PageName,
        pointer: Entry,
        from: Lba,
        stored: bool,
    ) -> Result<Option<(Lba, Lba)>, (PageName, Entry)> {
        let counts = |entry: Entry| !(entry.is_vacant() || stored && entry.location.is_none());
        let end = Lba(name.first().0.saturating_add(span(name.level)));
        if from >= end || !counts(pointer) {
            return Ok(None);
        }
        if pointer.location.is_none() {
            return Ok(Some((name.first().max(from), end)));
        }
        let Some(page) = self.map.cached(pointer) else {
            return Err((name, pointer));
        };
        let first = if from > name.first() { name.slot(from) } else { 0 };
        for slot in first..super::super::page::FANOUT {
            let entry = page.entry(slot);
            if name.level > 0 {
                let found = self.next_below(name.child(slot), entry, from, stored)?;
                if found.is_some() {
                    return Ok(found);
                }
            } else if counts(entry) {
                let lba = name.lba_of(slot);
                return Ok(Some((lba, Lba(lba.0 + 1))));
            }
        }
        Ok(None)
    }
}
