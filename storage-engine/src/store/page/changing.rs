//! A page of a tree while it is changed: a copy of its bytes, of which single entries are written over.
//!
//! A checkpoint changes some twenty entries of a leaf. Taking all 168 of them apart, and putting them together again, was
//! most of what a page cost it.

use super::*;

/// See the module.
#[derive(Debug)]
pub struct PageMut {
    bytes: BufMut,
}

impl PageMut {
    /// A copy of `page`.
    pub fn of(page: &Page) -> PageMut {
        let mut bytes = BufMut::for_reading(page.bytes.len());
        bytes.as_mut().copy_from_slice(page.bytes.as_ref());
        PageMut { bytes }
    }

    /// A new page of a tree whose entries are all the same: what is below an entry that leads to no page.
    pub fn filled(name: PageName, replica: [u8; 16], tagged: bool, entry: Entry) -> PageMut {
        debug_assert!(entry.location.is_none());
        let tagged = tagged && name.level == 0;
        let mut bytes = BufMut::zeroed(if tagged { TAGGED_LEAF_BYTES } else { PAGE_BYTES });
        let kind = if tagged { TAGGED_LEAF } else { PageKind::Map.code() };
        put_header(bytes.as_mut(), kind, name, replica, 0, FANOUT);
        let mut page = PageMut { bytes };
        if !entry.is_vacant() {
            for slot in 0..FANOUT {
                page.put(slot, entry);
            }
        }
        page
    }

    /// The entry in `slot`.
    pub fn entry(&self, slot: usize) -> Entry {
        entry_of(self.bytes.as_ref(), slot)
    }

    /// Writes an entry over; returns what it was.
    pub fn put(&mut self, slot: usize, entry: Entry) -> Entry {
        let old = self.entry(slot);
        let bytes = self.bytes.as_mut();
        let at = HEADER_BYTES + slot * ENTRY_BYTES;
        entry.put(&mut Put::new(&mut bytes[at..at + ENTRY_BYTES]));
        if bytes.len() == TAGGED_LEAF_BYTES {
            let at = PAGE_BYTES + slot * TAG_BYTES;
            bytes[at..at + TAG_BYTES].copy_from_slice(&entry.check.tag.0);
        }
        old
    }

    fn slots(&self) -> impl Iterator<Item = &[u8; ENTRY_BYTES]> {
        let slots = &self.bytes.as_ref()[HEADER_BYTES..HEADER_BYTES + FANOUT * ENTRY_BYTES];
        slots.as_chunks().0.iter()
    }

    /// The entry that all are, if they are all the same and none leads anywhere: then the page need not be there.
    pub fn uniform(&self) -> Option<Entry> {
        let first = self.entry(0);
        let mut slots = self.slots();
        let bytes = slots.next()?;
        (first.location.is_none() && slots.all(|slot| slot == bytes)).then_some(first)
    }

    /// The highest version of an entry.
    pub fn version(&self) -> Version {
        self.slots().map(version_of).max().unwrap_or_default()
    }

    /// Ends changing it.
    pub fn seal(mut self, checkpoint: u64) -> Page {
        let bytes = self.bytes.as_mut();
        bytes[CHECKPOINT_AT..CHECKPOINT_AT + 8].copy_from_slice(&checkpoint.to_le_bytes());
        bytes[COUNT_AT..COUNT_AT + 4].copy_from_slice(&(FANOUT as u32).to_le_bytes());
        put_check(bytes);
        Page {
            bytes: self.bytes.freeze(),
        }
    }
}

fn version_of(slot: &[u8; ENTRY_BYTES]) -> Version {
    let word = |at: usize| u32::from_le_bytes([slot[at], slot[at + 1], slot[at + 2], slot[at + 3]]);
    Version {
        epoch: Epoch(word(8)),
        seq: Seq(u64::from(word(12)) | u64::from(word(16)) << 32),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::io::SegmentId;
    use crate::types::{Check, Location};

    const REPLICA: [u8; 16] = [9; 16];

    fn name(level: u8) -> PageName {
        PageName {
            tree: TreeId([6; 16]),
            level,
            index: 77,
        }
    }

    fn entry(n: u64) -> Entry {
        Entry {
            location: Location::page_at(SegmentId(n as u32), n * 4096),
            version: Version {
                epoch: Epoch(n as u32 % 3),
                seq: Seq(n << 31 | n),
            },
            check: Check {
                crc: n as u32 * 7,
                tag: Tag([n as u8; TAG_BYTES]),
            },
        }
    }

    fn plain(entry: Entry) -> Entry {
        Entry {
            check: entry.check.crc.into(),
            ..entry
        }
    }

    #[test]
    fn a_changed_page_is_the_one_that_its_entries_make() {
        for (tagged, level) in [(false, 0), (false, 1), (true, 0), (true, 1)] {
            let seen = |entry: Entry| if tagged && level == 0 { entry } else { plain(entry) };
            let mut entries = vec![Entry::default(); FANOUT];
            let mut page = PageMut::filled(name(level), REPLICA, tagged, Entry::default());
            for slot in [0, 3, 100, 167, 3] {
                let (before, new) = (entries[slot], seen(entry(slot as u64 + 5)));
                assert_eq!(page.put(slot, new), before);
                entries[slot] = new;
            }
            let encode = |entries: &[Entry], checkpoint| match tagged {
                true => Page::encode_tagged(name(level), REPLICA, checkpoint, entries),
                false => Page::encode(PageKind::Map, name(level), REPLICA, checkpoint, entries),
            };
            let sealed = page.seal(8);
            assert_eq!(sealed.bytes().as_ref(), encode(&entries, 8).bytes().as_ref());
            let mut again = PageMut::of(&sealed);
            assert_eq!(again.put(100, Entry::default()), entries[100]);
            entries[100] = Entry::default();
            assert_eq!(again.seal(9).bytes().as_ref(), encode(&entries, 9).bytes().as_ref());
        }
    }

    #[test]
    fn the_version_of_a_page_is_the_highest_in_it() {
        let mut page = PageMut::filled(name(0), REPLICA, false, Entry::default());
        assert_eq!(page.version(), Version::default());
        for n in 1..=100 {
            page.put(n as usize, plain(entry(n)));
        }
        let highest = (1..=100).map(|n| entry(n).version).max().unwrap();
        assert_eq!(page.version(), highest);
    }

    #[test]
    fn a_page_is_uniform_only_if_nothing_in_it_leads_anywhere_and_all_of_it_is_the_same() {
        let tombstone = Entry {
            location: Location::NONE,
            check: Check::default(),
            ..entry(4)
        };
        let mut page = PageMut::filled(name(1), REPLICA, false, tombstone);
        assert_eq!(page.uniform(), Some(tombstone));
        page.put(167, Entry::default());
        assert_eq!(page.uniform(), None);
        page.put(167, tombstone);
        assert_eq!(page.uniform(), Some(tombstone));
        for slot in 0..FANOUT {
            page.put(slot, plain(entry(4)));
        }
        assert_eq!(page.uniform(), None, "these lead somewhere");
    }
}
