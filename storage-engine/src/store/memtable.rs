//! Writes that the map on the disk does not hold yet: blocks and zeroed ranges, newest version wins.
//!
//! The log already holds them, so losing this table loses nothing: recovery fills it again. A checkpoint freezes it,
//! merges it into the map and drops it.

use std::collections::BTreeMap;
use std::ops::Bound;

use smallvec::SmallVec;

use super::page::{Entry, FANOUT};
use crate::types::{Check, Lba, Location, Version};

/// The blocks of one leaf of the map: slot and entry, in order. The merge takes them together, and in a volume that is not
/// large against the table they are found and kept much faster than one by one.
type Leaf = SmallVec<[(u8, Entry); 1]>;

/// The table. Invariant: zeroed ranges do not overlap, and every block in a zeroed range is newer than the range.
#[derive(Debug, Default)]
pub struct Memtable {
    /// By number of the leaf. None is empty.
    leaves: BTreeMap<u64, Leaf>,
    /// In all of them.
    blocks: usize,
    /// Start → (end, version).
    zeros: BTreeMap<Lba, (Lba, Version)>,
    /// Blocks in them.
    zeroed: u64,
}

fn leaf_of(lba: Lba) -> (u64, u8) {
    (lba.0 / FANOUT as u64, (lba.0 % FANOUT as u64) as u8)
}

fn lba_of(leaf: u64, slot: u8) -> Lba {
    Lba(leaf * FANOUT as u64 + u64::from(slot))
}

/// Where `slot` is in a leaf, or would be.
fn place_of(leaf: &Leaf, slot: u8) -> Result<usize, usize> {
    leaf.binary_search_by_key(&slot, |(slot, _)| *slot)
}

impl Memtable {
    /// Number of rows; memory is in proportion to it (60 to 120 bytes a row). A zeroed range counts twice: it changes a page
    /// at each of its ends.
    pub fn len(&self) -> usize {
        self.blocks + 2 * self.zeros.len()
    }

    /// Leaves of the map that its blocks and the ends of zeroed ranges are in, at most.
    pub fn leaves(&self) -> usize {
        self.leaves.len() + 2 * self.zeros.len()
    }

    /// Blocks in zeroed ranges, whatever was written into them later.
    pub fn zeroed_blocks(&self) -> u64 {
        self.zeroed
    }

    pub fn is_empty(&self) -> bool {
        self.leaves.is_empty() && self.zeros.is_empty()
    }

    /// What is known of `lba`: a block, or a tombstone if it was zeroed later.
    pub fn get(&self, lba: Lba) -> Option<Entry> {
        let (number, slot) = leaf_of(lba);
        let leaf = self.leaves.get(&number);
        if let Some((leaf, Ok(place))) = leaf.map(|leaf| (leaf, place_of(leaf, slot))) {
            return Some(leaf[place].1);
        }
        self.zero_at(lba).map(tombstone)
    }

    fn zero_at(&self, lba: Lba) -> Option<Version> {
        zero_at(&self.zeros, lba)
    }

    /// Takes a block, unless something newer is known. The same version again replaces it (a moved block).
    pub fn insert(&mut self, lba: Lba, entry: Entry) {
        if zero_at(&self.zeros, lba).is_some_and(|zeroed| zeroed > entry.version) {
            return; // and so is every block that is known there
        }
        let (number, slot) = leaf_of(lba);
        let leaf = self.leaves.entry(number).or_default();
        match place_of(leaf, slot) {
            Ok(place) if leaf[place].1.version <= entry.version => leaf[place].1 = entry,
            Ok(_) => {}
            Err(place) => {
                leaf.insert(place, (slot, entry));
                self.blocks += 1;
            }
        }
    }

    /// Zeroes `start..end` at `version`, which is newer than everything in the table (writes arrive in order).
    pub fn zero(&mut self, start: Lba, end: Lba, version: Version) {
        debug_assert!(start < end);
        let last = leaf_of(Lba(end.0 - 1)).0;
        let mut from = leaf_of(start).0;
        while from <= last
            && let Some((&number, leaf)) = self.leaves.range_mut(from..=last).next()
        {
            let before = leaf.len();
            leaf.retain(|(slot, entry)| {
                let covered = (start..end).contains(&lba_of(number, *slot));
                debug_assert!(!covered || entry.version < version, "writes are taken in order");
                !covered
            });
            self.blocks -= before - leaf.len();
            if leaf.is_empty() {
                self.leaves.remove(&number);
            }
            from = number + 1;
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
        let (number, slot) = leaf_of(from);
        for (leaf_number, leaf) in self.leaves.range(number..).take(2) {
            let from = if *leaf_number == number { slot } else { 0 };
            let place = leaf.partition_point(|(slot, _)| *slot < from);
            if let Some((slot, entry)) = leaf.get(place) {
                return Some((lba_of(*leaf_number, *slot), *entry));
            }
        }
        None
    }

    /// The blocks at or behind `from` that are in the same leaf of the map.
    pub fn blocks_in_leaf(&self, from: Lba) -> impl Iterator<Item = (Lba, Entry)> {
        let (number, slot) = leaf_of(from);
        let leaf = self.leaves.get(&number).map_or(&[][..], |leaf| &leaf[..]);
        let rest = &leaf[leaf.partition_point(|(other, _)| *other < slot)..];
        rest.iter().map(move |(slot, entry)| (lba_of(number, *slot), *entry))
    }

    /// Forgets the first leaf; false if there is none. A large table takes milliseconds to let go of at once.
    pub fn forget_leaf(&mut self) -> bool {
        self.leaves.pop_first().is_some()
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
    fn it_says_what_a_map_of_single_blocks_says() {
        let mut random = 7u64;
        let mut next = |below: u64| {
            random = random
                .wrapping_mul(6_364_136_223_846_793_005)
                .wrapping_add(1_442_695_040_888_963_407);
            (random >> 33) % below
        };
        let (mut table, mut model) = (Memtable::default(), BTreeMap::new());
        for seq in 1..4_000 {
            let start = next(2_000);
            if next(20) == 0 {
                let end = start + 1 + next(500);
                table.zero(Lba(start), Lba(end), version(seq));
                model.extend((start..end).map(|lba| (lba, tombstone(version(seq)))));
            } else {
                table.insert(Lba(start), block(seq));
                model.insert(start, block(seq));
            }
        }
        (0..3_000).for_each(|lba| assert_eq!(table.get(Lba(lba)), model.get(&lba).copied(), "block {lba}"));
        let stored: Vec<(Lba, Entry)> = model
            .iter()
            .filter(|(_, entry)| !entry.location.is_none())
            .map(|(lba, entry)| (Lba(*lba), *entry))
            .collect();
        assert_eq!(table.blocks, stored.len());
        let (mut from, mut walked, mut by_leaf) = (Lba(0), Vec::new(), Vec::new());
        while let Some((lba, entry)) = table.next_block(from) {
            walked.push((lba, entry));
            from = Lba(lba.0 + 1);
        }
        from = Lba(0);
        while let Some((lba, _)) = table.next_block(from) {
            by_leaf.extend(table.blocks_in_leaf(lba));
            from = Lba((lba.0 / FANOUT as u64 + 1) * FANOUT as u64);
        }
        assert_eq!(walked, stored);
        assert_eq!(by_leaf, stored);
        while table.forget_leaf() {}
        assert_eq!(table.next_block(Lba(0)), None);
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
