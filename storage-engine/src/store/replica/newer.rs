//! What is newer than a version: the map, where whole subtrees that are older are passed over, and what the log has
//! beside it.
//!
//! An entry of an inner page has the highest version below it, so what changed since some version is found at the cost
//! of what changed. The map is walked first, page by page as they are read; what was found there counts as long as no
//! checkpoint is committed. Memory is looked at last, in one turn with whatever is done about it.

use super::super::Store;
use super::super::log::Op;
use super::super::map::Found;
use super::super::memtable::Memtable;
use super::super::page::{Entry, FANOUT, PageName, TreeId, span};
use crate::types::{Lba, Version};

/// A run of blocks with one version: a block, or a zeroed range.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Row {
    pub start: Lba,
    /// The block behind the last one.
    pub end: Lba,
    pub version: Version,
    /// They read as zeros, and are stored nowhere.
    pub zero: bool,
}

impl Row {
    /// It goes on in `next`.
    pub(super) fn joins(&self, next: &Row) -> bool {
        self.zero && next.zero && self.version == next.version && self.end == next.start
    }
}

/// A page of the map that has to be read first.
pub(super) type NeedPage = (PageName, Entry);

/// A walk through the map from `at` on, in as many turns as it takes.
#[derive(Debug)]
pub(super) struct MapWalk {
    /// The checkpoint whose map it is.
    checkpoint: u64,
    from: Lba,
    at: Lba,
    end: Lba,
    after: Version,
    found: Vec<Row>,
}

impl MapWalk {
    pub fn new(store: &Store, from: Lba, end: Lba, after: Version) -> MapWalk {
        MapWalk {
            checkpoint: store.superblock.checkpoint.number,
            from,
            at: from,
            end,
            after,
            found: Vec::new(),
        }
    }

    /// Goes on until the end, or until so many rows were found. What was found before a checkpoint in between is looked
    /// for again: what it merged is no longer in memory.
    pub fn run(&mut self, store: &mut Store, rows_max: usize) -> Result<(), NeedPage> {
        let current = store.superblock.checkpoint.number;
        if self.checkpoint != current {
            (self.checkpoint, self.at) = (current, self.from);
            self.found.clear();
        }
        while self.at < self.end {
            let next = store.next_newer(self.at, self.after)?;
            let Some(row) = next.filter(|row| row.start < self.end) else {
                self.at = self.end;
                return Ok(());
            };
            let end = row.end.min(self.end);
            // A zeroed range lies in many pages.
            if let Some(before) = self.found.last_mut().filter(|before| before.joins(&row)) {
                before.end = end;
            } else if self.found.len() == rows_max {
                self.at = row.start;
                return Ok(());
            } else {
                self.found.push(Row { end, ..row });
            }
            self.at = end;
        }
        Ok(())
    }

    /// How far it is.
    pub fn until(&self) -> Lba {
        self.at
    }

    /// What was found, in ascending order.
    pub fn found(&self) -> &[Row] {
        &self.found
    }

    /// What lies before `from` is dealt with.
    pub fn pass(&mut self, from: Lba) {
        self.from = from;
        self.at = self.at.max(from);
        self.found.retain(|row| row.end > from);
    }
}

impl Store {
    /// The first row of the map at or behind `from` that is newer than `after`.
    fn next_newer(&mut self, from: Lba, after: Version) -> Result<Option<Row>, NeedPage> {
        let name = PageName::of(TreeId::HEAD, self.map.height - 1, Lba(0));
        self.next_newer_below(name, self.map.root, from, after)
    }

    fn next_newer_below(
        &mut self,
        name: PageName,
        pointer: Entry,
        from: Lba,
        after: Version,
    ) -> Result<Option<Row>, NeedPage> {
        let end = Lba(name.first().0.saturating_add(span(name.level)));
        if from >= end || pointer.version <= after {
            return Ok(None);
        }
        if pointer.location.is_none() {
            let (start, version) = (name.first().max(from), pointer.version);
            return Ok(Some(Row {
                start,
                end,
                version,
                zero: true,
            }));
        }
        let Some(page) = self.map.cached(pointer) else {
            return Err((name, pointer));
        };
        let first = if from > name.first() { name.slot(from) } else { 0 };
        for slot in first..FANOUT {
            let entry = page.entry(slot);
            if name.level > 0 {
                let found = self.next_newer_below(name.child(slot), entry, from, after)?;
                if found.is_some() {
                    return Ok(found);
                }
            } else if entry.version > after {
                let start = name.lba_of(slot);
                return Ok(Some(Row {
                    start,
                    end: Lba(start.0 + 1),
                    version: entry.version,
                    zero: entry.location.is_none(),
                }));
            }
        }
        Ok(None)
    }

    /// The version of what the map has for a block.
    pub(super) fn version_in_map(&mut self, lba: Lba) -> Result<Version, NeedPage> {
        match self.map.find(lba) {
            Found::Entry(entry) => Ok(entry.version),
            Found::NeedPage(name, pointer) => Err((name, pointer)),
        }
    }

    /// The newest version of a block in the log and in memory, also of records that are on their way.
    pub(super) fn version_in_memory(&self, lba: Lba) -> Option<Version> {
        let inflight = self.version_on_its_way(lba);
        inflight.or_else(|| self.lookup_memory(lba).map(|entry| entry.version))
    }

    /// The newest version of a block in records that are on their way.
    pub(super) fn version_on_its_way(&self, lba: Lba) -> Option<Version> {
        self.log.ops_inflight().rev().find_map(|op| op.version_at(lba))
    }

    /// The tables in memory.
    pub(super) fn tables(&self) -> impl Iterator<Item = &Memtable> {
        let frozen = self.frozen.iter().flat_map(|frozen| frozen.tables.iter());
        self.recent.tables().chain(frozen)
    }

    /// What the records on their way write, in ascending order.
    pub(super) fn rows_inflight(&self) -> Vec<Row> {
        let rows = self.log.ops_inflight().filter_map(|op| match *op {
            Op::Block(lba, entry) => Some(Row {
                start: lba,
                end: Lba(lba.0 + 1),
                version: entry.version,
                zero: false,
            }),
            Op::Zero(start, end, version) => Some(Row {
                start,
                end,
                version,
                zero: true,
            }),
            Op::Control(..) => None,
        });
        let mut rows: Vec<Row> = rows.collect();
        rows.sort_by_key(|row| row.start);
        rows
    }
}

/// Goes through several sources at once, in ascending order: where they overlap, the newest counts.
pub(super) struct Sweep<'a> {
    after: Version,
    sources: Vec<(Source<'a>, Next)>,
}

#[derive(Clone, Copy)]
enum Next {
    Unknown,
    Row(Row),
    End,
}

enum Source<'a> {
    Blocks(&'a Memtable),
    Zeros(&'a Memtable),
    /// Rows in ascending order that may overlap.
    Overlapping(&'a [Row]),
    /// Rows in ascending order that do not.
    Apart(&'a [Row]),
}

impl Source<'_> {
    fn next(&self, from: Lba, after: Version) -> Option<Row> {
        match self {
            Source::Blocks(table) => {
                let mut at = from;
                loop {
                    let (lba, entry) = table.next_block(at)?;
                    let end = Lba(lba.0 + 1);
                    if entry.version > after {
                        return Some(Row {
                            start: lba,
                            end,
                            version: entry.version,
                            zero: entry.location.is_none(),
                        });
                    }
                    at = end;
                }
            }
            Source::Zeros(table) => {
                let mut at = from;
                loop {
                    let (start, end, version) = table.next_zero(at)?;
                    if version > after {
                        return Some(Row {
                            start,
                            end,
                            version,
                            zero: true,
                        });
                    }
                    at = end;
                }
            }
            Source::Overlapping(rows) => {
                let ahead = rows.iter().filter(|row| row.end > from && row.version > after);
                let start = ahead.clone().map(|row| row.start.max(from)).min()?;
                let there = ahead.clone().filter(|row| row.start <= start);
                let newest = *there.max_by_key(|row| row.version)?;
                // Another one may begin before this one ends.
                let next = ahead.map(|row| row.start).filter(|at| *at > start).min();
                let end = next.map_or(newest.end, |next| next.min(newest.end));
                Some(Row { start, end, ..newest })
            }
            Source::Apart(rows) => {
                let first = rows.partition_point(|row| row.end <= from);
                let row = rows[first..].iter().find(|row| row.version > after)?;
                let start = row.start.max(from);
                Some(Row { start, ..*row })
            }
        }
    }
}

impl<'a> Sweep<'a> {
    /// `map` is what a walk found.
    pub fn new(tables: impl Iterator<Item = &'a Memtable>, map: &'a [Row], after: Version) -> Sweep<'a> {
        let memory = tables.flat_map(|table| [Source::Blocks(table), Source::Zeros(table)]);
        let sources = memory.chain([Source::Apart(map)]).map(|source| (source, Next::Unknown));
        Sweep {
            after,
            sources: sources.collect(),
        }
    }

    /// The records that are on their way count, too.
    pub fn with_inflight(mut self, rows: &'a [Row]) -> Sweep<'a> {
        self.sources.push((Source::Overlapping(rows), Next::Unknown));
        self
    }

    /// The first row at or behind `at`. Blocks that follow each other with one version may come in several.
    pub fn next(&mut self, at: Lba) -> Option<Row> {
        for (source, next) in &mut self.sources {
            let known = match next {
                Next::Unknown => false,
                Next::Row(row) => row.end > at,
                Next::End => true,
            };
            if !known {
                *next = source.next(at, self.after).map_or(Next::End, Next::Row);
            }
        }
        let rows = || {
            self.sources.iter().filter_map(|(_, next)| match next {
                Next::Row(row) => Some(*row),
                Next::Unknown | Next::End => None,
            })
        };
        let start = rows().map(|row| row.start.max(at)).min()?;
        let newest = rows().filter(|row| row.start <= start).max_by_key(|row| row.version)?;
        let ends = rows().filter(|row| row.start <= start).map(|row| row.end);
        let starts = rows().map(|row| row.start).filter(|next| *next > start);
        let end = ends.chain(starts).min().expect("the newest has an end");
        Some(Row { start, end, ..newest })
    }
}
