//! Writes that the map on the disk does not hold yet: blocks and zeroed ranges, newest version wins.
//!
//! The log already holds them, so losing this table loses nothing: recovery fills it again. A checkpoint freezes it,
//! merges it into the map and drops it.

use std::collections::BTreeMap;
use std::collections::btree_map::Entry::{Occupied, Vacant};
use std::ops::Bound;

use super::page::Entry;
use crate::types::{Check, Lba, Location, Version};

/// The table. Invariant: zeroed ranges do not overlap, and every block in a zeroed range is newer than the range.
#[derive(Debug, Default)]
pub struct Memtable {
    blocks: BTreeMap<Lba, Entry>,
    /// Start → (end, version).
    zeros: BTreeMap<Lba, (Lba, Version)>,
    /// Blocks in them.
    zeroed: u64,
}

impl Memtable {
    /// Number of rows; memory is in proportion to it (about 64 bytes a row). A zeroed range counts twice: it changes a page
    /// at each of its ends.
    pub fn len(&self) -> usize {
        self.blocks.len() + 2 * self.zeros.len()
    }

    /// Blocks in zeroed ranges, whatever was written into them later.
    pub fn zeroed_blocks(&self) -> u64 {
        self.zeroed
    }

    pub fn is_empty(&self) -> bool {
        self.blocks.is_empty() && self.zeros.is_empty()
    }

    /// What is known of `lba`: a block, or a tombstone if it was zeroed later.
    pub fn get(&self, lba: Lba) -> Option<Entry> {
        if let Some(entry) = self.blocks.get(&lba) {
            return Some(*entry);
        }
        self.zero_at(lba).map(tombstone)
    }

    fn zero_at(&self, lba: Lba) -> Option<Version> {
        zero_at(&self.zeros, lba)
    }

    /// Takes a block, unless something newer is known. The same version again replaces it (a moved block).
    pub fn insert(&mut self, lba: Lba, entry: Entry) {
        match self.blocks.entry(lba) {
            Occupied(mut known) => {
                if known.get().version <= entry.version {
                    known.insert(entry);
                }
            }
            Vacant(place) => {
                if zero_at(&self.zeros, lba).is_none_or(|zeroed| zeroed <= entry.version) {
                    place.insert(entry);
                }
            }
        }
    }

    /// Zeroes `start..end` at `version`, which is newer than everything in the table (writes arrive in order).
    pub fn zero(&mut self, start: Lba, end: Lba, version: Version) {
        debug_assert!(start < end);
        let covered: Vec<Lba> = self.blocks.range(start..end).map(|(lba, _)| *lba).collect();
        for lba in covered {
            let entry = self.blocks.remove(&lba).expect("it was just listed");
            debug_assert!(entry.version < version, "writes are taken in order");
        }
        self.cut_zeros(start, end);
        self.add_zeros(start, end, version);
    }

    fn add_zeros(&mut self, start: Lba, end: Lba, version: Version) {
        self.zeros.insert(start, (end, version));
        self.zeroed += end.0 - start.0;
    }

    fn cut_zeros(&mut self, start: Lba, end: Lba) {
        let touched: Vec<(Lba, (Lba, Version))> = self
            .zeros
            .range(..end)
            .rev()
            .take_while(|(_, (range_end, _))| *range_end > start)
            .map(|(range_start, range)| (*range_start, *range))
            .collect();
        for (range_start, (range_end, version)) in touched {
            self.zeros.remove(&range_start);
            self.zeroed -= range_end.0 - range_start.0;
            if range_start < start {
                self.add_zeros(range_start, start, version);
            }
            if range_end > end {
                self.add_zeros(end, range_end, version);
            }
        }
    }

    /// The first block at or behind `from`.
    pub fn next_block(&self, from: Lba) -> Option<(Lba, Entry)> {
        self.blocks.range(from..).next().map(|(lba, entry)| (*lba, *entry))
    }

    /// The rest of the zeroed range that `from` lies in, or the first one behind it.
    pub fn next_zero(&self, from: Lba) -> Option<(Lba, Lba, Version)> {
        if let Some((_, (end, version))) = self.zeros.range(..=from).next_back()
            && from < *end
        {
            return Some((from, *end, *version));
        }
        let (start, (end, version)) = self.zeros.range((Bound::Excluded(from), Bound::Unbounded)).next()?;
        Some((*start, *end, *version))
    }
}

fn zero_at(zeros: &BTreeMap<Lba, (Lba, Version)>, lba: Lba) -> Option<Version> {
    if zeros.is_empty() {
        return None;
    }
    let (_, (end, version)) = zeros.range(..=lba).next_back()?;
    (lba < *end).then_some(*version)
}

/// The entry of a block that was zeroed at `version`.
pub fn tombstone(version: Version) -> Entry {
    Entry {
        location: Location::NONE,
        version,
        check: Check::default(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::io::SegmentId;
    use crate::types::{Epoch, Seq};

    fn version(seq: u64) -> Version {
        Version {
            epoch: Epoch(1),
            seq: Seq(seq),
        }
    }

    fn block(seq: u64) -> Entry {
        Entry {
            location: Location::page_at(SegmentId(1), seq * 4096),
            version: version(seq),
            check: Check::default(),
        }
    }

    #[test]
    fn the_newest_of_block_and_zero_wins() {
        let mut table = Memtable::default();
        table.insert(Lba(5), block(1));
        table.zero(Lba(0), Lba(10), version(2));
        assert_eq!(table.get(Lba(5)), Some(tombstone(version(2))));
        table.insert(Lba(5), block(3));
        assert_eq!(table.get(Lba(5)), Some(block(3)));
        table.insert(Lba(5), block(1));
        assert_eq!(table.get(Lba(5)), Some(block(3)), "an older block never comes back");
        assert_eq!(table.get(Lba(10)), None);
    }

    #[test]
    fn a_zero_cuts_the_ones_before_it() {
        let mut table = Memtable::default();
        table.zero(Lba(0), Lba(100), version(1));
        table.zero(Lba(40), Lba(60), version(2));
        table.zero(Lba(50), Lba(120), version(3));
        let at = |lba| table.get(Lba(lba)).map(|entry| entry.version.seq.0);
        assert_eq!(
            [at(0), at(39), at(40), at(49), at(50), at(119), at(120)],
            [Some(1), Some(1), Some(2), Some(2), Some(3), Some(3), None]
        );
        assert_eq!(table.next_zero(Lba(45)), Some((Lba(45), Lba(50), version(2))));
        assert_eq!(table.next_zero(Lba(120)), None);
    }

    #[test]
    fn a_zero_inside_another_leaves_both_sides() {
        let mut table = Memtable::default();
        table.zero(Lba(0), Lba(100), version(1));
        table.zero(Lba(10), Lba(20), version(2));
        let ranges: Vec<_> = table.zeros.iter().map(|(s, (e, v))| (s.0, e.0, v.seq.0)).collect();
        assert_eq!(ranges, [(0, 10, 1), (10, 20, 2), (20, 100, 1)]);
        assert_eq!(table.zeroed_blocks(), 100);
    }
}
