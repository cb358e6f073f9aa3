//! A page of the map: 168 entries under a header, 4 KiB. A leaf of a sealed volume has the tags behind it, in 4 KiB more.
//!
//! The map is a tree of fixed shape. A leaf (level 0) with index `i` holds the blocks `i*168 .. (i+1)*168`; a page of
//! level `n` points to 168 pages of level `n-1`. Leaves and inner pages have the same entries: where the block (or
//! the page below) lies, the highest version in it, and its check. An entry that points nowhere but has a version is
//! a tombstone: everything below it was zeroed at that version. Pages are never changed in place: a checkpoint writes
//! new ones up to a new root.
//!
//! What a snapshot keeps is a tree of the same pages under the snapshot's name. There an entry of zeros means that the
//! snapshot keeps nothing, and a block or a whole subtree that reads as zeros in it is a [`Entry::hole`].

mod changing;

pub use changing::PageMut;

use super::format::{FORMAT_VERSION, Get, Put, check_around};
use crate::buffer::{Buf, BufMut};
use crate::seal::{TAG_BYTES, Tag};
use crate::types::{Check, Epoch, Lba, Location, Seq, SnapshotId, Version};

/// Bytes in a page.
pub const PAGE_BYTES: usize = 4096;
const HEADER_BYTES: usize = 64;
const ENTRY_BYTES: usize = 24;
const CHECKPOINT_AT: usize = 32;
const COUNT_AT: usize = 40;
const TREE_AT: usize = 44;
const CHECK_AT: usize = 60;
const MAGIC: u32 = u32::from_le_bytes(*b"GFSP");
const KIND_AT: usize = 6;
/// The kind of a leaf with tags.
const TAGGED_LEAF: u8 = 5;

/// Bytes of a leaf with tags.
pub const TAGGED_LEAF_BYTES: usize = 2 * PAGE_BYTES;

/// Entries in a page.
pub const FANOUT: usize = (PAGE_BYTES - HEADER_BYTES) / ENTRY_BYTES;
const _: () = assert!(FANOUT == 168);
const _: () = assert!(PAGE_BYTES + FANOUT * TAG_BYTES <= TAGGED_LEAF_BYTES);

/// Where something lies, when it was written, and how to tell that it is what was written.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
pub struct Entry {
    /// The block or page; nowhere for zeros.
    pub location: Location,
    /// When it was written; for a page, the highest version below it.
    pub version: Version,
    /// Of a block with its address, or the check of a page.
    pub check: Check,
}

impl Entry {
    /// True if nothing was ever written here.
    pub fn is_vacant(self) -> bool {
        self == Entry::default()
    }

    /// False for one that nobody can have written where a page is: it leads neither to a page nor to nothing.
    pub fn may_lead_to_page(self) -> bool {
        let (offset, len) = (self.location.offset(), self.location.len());
        let page = [PAGE_BYTES, TAGGED_LEAF_BYTES].contains(&(len as usize));
        self.location.is_none() || (page && offset.is_multiple_of(PAGE_BYTES as u64))
    }

    /// The same where a block is.
    fn may_lead_to_block(self) -> bool {
        let page = PAGE_BYTES as u64;
        let (offset, len) = (self.location.offset(), self.location.len());
        self.location.is_none() || (len.is_multiple_of(page) && offset.is_multiple_of(page))
    }

    /// In the table of a snapshot: the block, or all below, was `self` then and lies nowhere.
    pub fn hole(self) -> Entry {
        debug_assert!(self.location.is_none());
        Entry {
            check: HOLE.into(),
            ..self
        }
    }

    /// In the map: what an entry of a snapshot's table was before it came there.
    pub fn unmarked(self) -> Entry {
        let check = if self.location.is_none() {
            Check::default()
        } else {
            self.check
        };
        Entry { check, ..self }
    }

    /// All but the tag.
    // Whole entries at a time: a checkpoint reads and writes millions of them.
    pub(super) fn put(self, put: &mut Put<'_>) {
        let mut bytes = [0; ENTRY_BYTES];
        bytes[..8].copy_from_slice(&self.location.bits().to_le_bytes());
        bytes[8..12].copy_from_slice(&self.version.epoch.0.to_le_bytes());
        bytes[12..20].copy_from_slice(&self.version.seq.0.to_le_bytes());
        bytes[20..].copy_from_slice(&self.check.crc.to_le_bytes());
        put.bytes(&bytes);
    }

    pub(super) fn get(get: &mut Get<'_>) -> Entry {
        let bytes: [u8; ENTRY_BYTES] = get.array();
        let u32_at = |at: usize| u32::from_le_bytes([bytes[at], bytes[at + 1], bytes[at + 2], bytes[at + 3]]);
        let u64_at = |at: usize| u64::from(u32_at(at)) | u64::from(u32_at(at + 4)) << 32;
        Entry {
            location: Location::from_bits(u64_at(0)),
            version: Version {
                epoch: Epoch(u32_at(8)),
                seq: Seq(u64_at(12)),
            },
            check: u32_at(20).into(),
        }
    }
}

/// Tells a kept hole from nothing kept: neither has a place, and a block that was never written has no version.
const HOLE: u32 = 1;

/// What a page is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum PageKind {
    /// A page of the map, or of what a snapshot keeps.
    Map,
    /// Rows of the segment table.
    Table,
    /// Pointers to table pages.
    TableIndex,
    /// The snapshots.
    Catalog,
}

impl PageKind {
    fn code(self) -> u8 {
        match self {
            PageKind::Map => 1,
            PageKind::Table => 2,
            PageKind::TableIndex => 3,
            PageKind::Catalog => 4,
        }
    }

    fn from_code(code: u8) -> Option<PageKind> {
        let all = [PageKind::Map, PageKind::Table, PageKind::TableIndex, PageKind::Catalog];
        all.into_iter().find(|kind| kind.code() == code)
    }
}

/// Which tree a page belongs to: the map, or what a snapshot keeps, by the snapshot's name.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct TreeId(pub [u8; 16]);

impl TreeId {
    /// The map.
    pub const HEAD: TreeId = TreeId([0; 16]);
}

impl From<SnapshotId> for TreeId {
    fn from(id: SnapshotId) -> TreeId {
        TreeId(id.0)
    }
}

/// Which page this is; the same place in the tree has the same name in every checkpoint.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct PageName {
    /// The map for pages that belong to no tree.
    pub tree: TreeId,
    /// 0 for a leaf.
    pub level: u8,
    /// Counted from 0 within the level.
    pub index: u64,
}

/// Blocks below one page of `level`; saturates at `u64::MAX`.
pub fn span(level: u8) -> u64 {
    SPANS[usize::from(level.min(HEIGHT_MAX))]
}

/// For each level; the last one stands for all above. Every step down the tree divides by one of them.
const SPANS: [u64; HEIGHT_MAX as usize + 1] = {
    let mut spans = [0; HEIGHT_MAX as usize + 1];
    let mut level = 0;
    while level < spans.len() {
        spans[level] = (FANOUT as u64).saturating_pow(level as u32 + 1);
        level += 1;
    }
    spans
};

/// Most levels that there can be: these reach over every number of a block.
pub const HEIGHT_MAX: u8 = 9;

/// Levels of a map over `blocks` blocks, at least 1.
pub fn height_for(blocks: u64) -> u8 {
    (1..).find(|height| span(height - 1) >= blocks).expect("spans saturate")
}

impl PageName {
    /// The page of `level` that `lba` belongs to.
    pub fn of(tree: TreeId, level: u8, lba: Lba) -> PageName {
        PageName {
            tree,
            level,
            index: lba.0 / span(level),
        }
    }

    /// The page below this one that `slot` leads to.
    pub fn child(self, slot: usize) -> PageName {
        PageName {
            level: self.level - 1,
            index: self.index * FANOUT as u64 + slot as u64,
            ..self
        }
    }

    /// The first block below `slot`.
    pub fn lba_of(self, slot: usize) -> Lba {
        let below = if self.level == 0 { 1 } else { span(self.level - 1) };
        Lba(self.first().0.saturating_add(below.saturating_mul(slot as u64)))
    }

    /// First block below this page.
    pub fn first(self) -> Lba {
        Lba(self.index.saturating_mul(span(self.level)))
    }

    /// Which entry of this page `lba` belongs to.
    pub fn slot(self, lba: Lba) -> usize {
        let below = if self.level == 0 { 1 } else { span(self.level - 1) };
        ((lba.0 - self.first().0) / below) as usize
    }
}

/// A page as it is on the disk, checked once when it was taken in.
#[derive(Clone, Debug)]
pub struct Page {
    bytes: Buf,
}

/// Why bytes are not the page that was expected.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum PageError {
    #[error("check is {found:08x}, expected {expected:08x}")]
    Check { found: u32, expected: u32 },
    #[error("it is another page: {0}")]
    Other(String),
    #[error("its check holds, but entry {0} makes no sense")]
    Nonsense(usize),
}

impl Page {
    /// Makes a page out of `entries` (at most [`FANOUT`]).
    pub fn encode(kind: PageKind, name: PageName, replica: [u8; 16], checkpoint: u64, entries: &[Entry]) -> Page {
        Page::encode_with(kind, name, replica, checkpoint, entries.len(), |put| {
            entries.iter().for_each(|entry| entry.put(put));
        })
    }

    /// Makes a page of a tree whose blocks are sealed: its leaves have the tags, too.
    pub fn encode_tagged(name: PageName, replica: [u8; 16], checkpoint: u64, entries: &[Entry]) -> Page {
        if name.level > 0 {
            return Page::encode(PageKind::Map, name, replica, checkpoint, entries);
        }
        let buf = BufMut::zeroed(TAGGED_LEAF_BYTES);
        Page::encode_into(buf, TAGGED_LEAF, name, replica, checkpoint, entries.len(), |put| {
            entries.iter().for_each(|entry| entry.put(put));
            put.seek(PAGE_BYTES);
            entries.iter().for_each(|entry| {
                put.bytes(&entry.check.tag.0);
            });
        })
    }

    /// Makes a page whose `count` rows are written by `rows`.
    pub(super) fn encode_with(
        kind: PageKind,
        name: PageName,
        replica: [u8; 16],
        checkpoint: u64,
        count: usize,
        rows: impl FnOnce(&mut Put<'_>),
    ) -> Page {
        let buf = BufMut::zeroed(PAGE_BYTES);
        Page::encode_into(buf, kind.code(), name, replica, checkpoint, count, rows)
    }

    fn encode_into(
        mut buf: BufMut,
        kind: u8,
        name: PageName,
        replica: [u8; 16],
        checkpoint: u64,
        count: usize,
        rows: impl FnOnce(&mut Put<'_>),
    ) -> Page {
        let bytes = buf.as_mut();
        put_header(bytes, kind, name, replica, checkpoint, count);
        rows(Put::new(bytes).seek(HEADER_BYTES));
        put_check(bytes);
        Page { bytes: buf.freeze() }
    }

    /// Takes bytes read from the disk; `check` is what the entry that led here says.
    pub fn decode(
        bytes: Buf,
        kind: PageKind,
        name: PageName,
        replica: [u8; 16],
        check: Check,
    ) -> Result<Page, PageError> {
        let page = Page { bytes };
        let check = check.crc;
        let found = check_around(0, page.bytes.as_ref(), CHECK_AT);
        if found != check || page.check().crc != check {
            return Err(PageError::Check { found, expected: check });
        }
        match page.identity() {
            Some((k, n, r)) if k == kind && n == name && r == replica => Ok(page),
            other => Err(PageError::Other(format!("expected {kind:?} {name:?}, found {other:?}"))),
        }
    }

    /// Takes bytes of a page of a tree that `pointer` led to. What it says can be: whoever follows its entries asks the disk
    /// for whole pages, and finds nothing that is newer than the pointer says.
    pub fn decode_below(bytes: Buf, name: PageName, replica: [u8; 16], pointer: Entry) -> Result<Page, PageError> {
        let page = Page::decode(bytes, PageKind::Map, name, replica, pointer.check)?;
        let sensible = |entry: Entry| {
            let leads = if name.level == 0 {
                entry.may_lead_to_block()
            } else {
                entry.may_lead_to_page()
            };
            leads && entry.version <= pointer.version
        };
        match (0..FANOUT).find(|slot| !sensible(page.entry(*slot))) {
            Some(slot) => Err(PageError::Nonsense(slot)),
            None => Ok(page),
        }
    }

    /// Takes bytes that no entry led to: the page's own check must hold.
    pub fn decode_unreferenced(bytes: Buf) -> Option<(Page, PageKind, PageName)> {
        let page = Page { bytes };
        let (kind, name, _) = page.identity()?;
        (check_around(0, page.bytes.as_ref(), CHECK_AT) == page.check().crc).then_some((page, kind, name))
    }

    /// How many bytes the page has that begins with this block, if it is one.
    pub fn bytes_of(first: &[u8]) -> usize {
        match first[KIND_AT] {
            TAGGED_LEAF => TAGGED_LEAF_BYTES,
            _ => PAGE_BYTES,
        }
    }

    fn has_tags(&self) -> bool {
        self.bytes.len() == TAGGED_LEAF_BYTES
    }

    fn identity(&self) -> Option<(PageKind, PageName, [u8; 16])> {
        let mut get = Get::new(self.bytes.as_ref());
        if get.u32() != MAGIC || get.u16() != FORMAT_VERSION {
            return None;
        }
        let kind = match (get.u8(), self.has_tags()) {
            (TAGGED_LEAF, true) => PageKind::Map,
            (code, false) => PageKind::from_code(code)?,
            _ => return None,
        };
        let (level, index, replica) = (get.u8(), get.u64(), get.array());
        let tree = TreeId(get.seek(TREE_AT).array());
        Some((kind, PageName { tree, level, index }, replica))
    }

    /// The check that an entry pointing here holds.
    pub fn check(&self) -> Check {
        Get::new(self.bytes.as_ref()).seek(CHECK_AT).u32().into()
    }

    /// The entry in `slot`.
    pub fn entry(&self, slot: usize) -> Entry {
        entry_of(self.bytes.as_ref(), slot)
    }

    /// All entries.
    pub fn entries(&self) -> Vec<Entry> {
        (0..FANOUT).map(|slot| self.entry(slot)).collect()
    }

    /// Reads the rows of a page that was made by [`Page::encode_with`], and how many there are.
    pub(super) fn rows(&self) -> (usize, Get<'_>) {
        let count = Get::new(self.bytes.as_ref()).seek(COUNT_AT).u32() as usize;
        let mut rows = Get::new(self.bytes.as_ref());
        rows.seek(HEADER_BYTES);
        (count, rows)
    }

    /// The bytes to write.
    pub fn bytes(&self) -> &Buf {
        &self.bytes
    }
}

fn entry_of(bytes: &[u8], slot: usize) -> Entry {
    debug_assert!(slot < FANOUT);
    let at = HEADER_BYTES + slot * ENTRY_BYTES;
    let mut entry = Entry::get(&mut Get::new(&bytes[at..at + ENTRY_BYTES]));
    if bytes.len() == TAGGED_LEAF_BYTES {
        entry.check.tag = Tag(Get::new(bytes).seek(PAGE_BYTES + slot * TAG_BYTES).array());
    }
    entry
}

fn put_header(bytes: &mut [u8], kind: u8, name: PageName, replica: [u8; 16], checkpoint: u64, count: usize) {
    let mut put = Put::new(bytes);
    put.u32(MAGIC)
        .u16(FORMAT_VERSION)
        .u8(kind)
        .u8(name.level)
        .u64(name.index);
    put.bytes(&replica)
        .u64(checkpoint)
        .u32(count as u32)
        .bytes(&name.tree.0);
}

fn put_check(bytes: &mut [u8]) {
    let check = check_around(0, bytes, CHECK_AT);
    bytes[CHECK_AT..CHECK_AT + 4].copy_from_slice(&check.to_le_bytes());
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::io::SegmentId;

    fn sample() -> (Page, PageName) {
        let name = PageName {
            tree: TreeId([6; 16]),
            level: 2,
            index: 77,
        };
        let entries: Vec<Entry> = (0..FANOUT as u64)
            .map(|i| Entry {
                location: Location::page_at(SegmentId(i as u32), i * 4096),
                version: Version {
                    epoch: Epoch(i as u32),
                    seq: Seq(i * 3),
                },
                check: (i as u32 * 7).into(),
            })
            .collect();
        (Page::encode(PageKind::Map, name, [9; 16], 5, &entries), name)
    }

    #[test]
    fn a_page_gives_back_its_entries() {
        let (page, name) = sample();
        let again = Page::decode(page.bytes().clone(), PageKind::Map, name, [9; 16], page.check()).unwrap();
        assert_eq!(again.entries(), page.entries());
        assert_eq!(again.entry(167).version.seq, Seq(501));
    }

    #[test]
    fn every_flipped_bit_of_a_page_is_noticed() {
        let (page, name) = sample();
        for bit in 0..PAGE_BYTES * 8 {
            let mut bytes = BufMut::copy_of(page.bytes().as_ref());
            bytes.as_mut()[bit / 8] ^= 1 << (bit % 8);
            assert!(
                Page::decode(bytes.freeze(), PageKind::Map, name, [9; 16], page.check()).is_err(),
                "bit {bit}"
            );
        }
    }

    #[test]
    fn a_page_of_another_place_or_replica_is_refused() {
        let (page, name) = sample();
        let other = PageName { index: 78, ..name };
        assert!(Page::decode(page.bytes().clone(), PageKind::Map, other, [9; 16], page.check()).is_err());
        let other = PageName {
            tree: TreeId::HEAD,
            ..name
        };
        assert!(Page::decode(page.bytes().clone(), PageKind::Map, other, [9; 16], page.check()).is_err());
        assert!(Page::decode(page.bytes().clone(), PageKind::Map, name, [8; 16], page.check()).is_err());
        assert!(Page::decode(page.bytes().clone(), PageKind::Table, name, [9; 16], page.check()).is_err());
    }

    #[test]
    fn the_tree_grows_with_the_volume() {
        assert_eq!(height_for(1), 1);
        assert_eq!(height_for(168), 1);
        assert_eq!(height_for(169), 2);
        assert_eq!(height_for(1 << 28), 4, "1 TiB");
        assert_eq!(height_for(1 << 32), 5, "16 TiB");
        let name = PageName::of(TreeId::HEAD, 1, Lba(168 * 168 + 5));
        assert_eq!(
            (name.index, name.first(), name.slot(Lba(168 * 168 + 169))),
            (1, Lba(168 * 168), 1)
        );
    }

    fn tagged() -> (Page, PageName) {
        let (page, _) = sample();
        let name = PageName {
            tree: TreeId([6; 16]),
            level: 0,
            index: 77,
        };
        let entries: Vec<Entry> = page
            .entries()
            .into_iter()
            .enumerate()
            .map(|(n, entry)| Entry {
                check: Check {
                    tag: Tag([n as u8 + 1; TAG_BYTES]),
                    ..entry.check
                },
                ..entry
            })
            .collect();
        (Page::encode_tagged(name, [9; 16], 5, &entries), name)
    }

    #[test]
    fn a_leaf_of_a_sealed_volume_gives_back_its_tags_and_no_other_page_has_any() {
        let (page, name) = tagged();
        assert_eq!(page.bytes().len(), TAGGED_LEAF_BYTES);
        assert_eq!(Page::bytes_of(&page.bytes().as_ref()[..PAGE_BYTES]), TAGGED_LEAF_BYTES);
        let again = Page::decode(page.bytes().clone(), PageKind::Map, name, [9; 16], page.check()).unwrap();
        assert_eq!(again.entry(3).check.tag, Tag([4; TAG_BYTES]));
        assert_eq!(again.entries(), page.entries());
        let above = Page::encode_tagged(PageName { level: 1, ..name }, [9; 16], 5, &page.entries());
        assert_eq!(above.bytes().len(), PAGE_BYTES);
        let half = page.bytes().slice(0..PAGE_BYTES);
        assert!(Page::decode(half, PageKind::Map, name, [9; 16], page.check()).is_err());
    }

    #[test]
    fn every_flipped_bit_of_a_leaf_with_tags_is_noticed() {
        let (page, name) = tagged();
        for bit in 0..TAGGED_LEAF_BYTES * 8 {
            let mut bytes = BufMut::copy_of(page.bytes().as_ref());
            bytes.as_mut()[bit / 8] ^= 1 << (bit % 8);
            let found = Page::decode(bytes.freeze(), PageKind::Map, name, [9; 16], page.check());
            assert!(found.is_err(), "bit {bit}");
        }
    }
}
