//! Segments: which there are, what they hold, how much of it is still needed, and which may be used again.
//!
//! A segment is free, or it is used by one of three streams: guest writes (the log proper), blocks that the cleaner
//! moved, and pages of the map. `live` counts the pages of 4 KiB in it that the map of the last committed checkpoint
//! points to; a closed segment without any is freed by the checkpoint that finds it so, after both superblocks hold it.

use std::collections::{BTreeMap, BTreeSet, VecDeque};

use rustc_hash::FxHashMap;

use super::format::{FORMAT_VERSION, Get, Put, check_around};
use super::page::Entry;
use crate::buffer::{Buf, BufMut};
use crate::io::SegmentId;
use crate::types::{Epoch, Identity, Location, PAGE_BYTES, Seq, Version};

/// Bytes of the header at the start of each used segment; the first record or page follows it.
pub const SEGMENT_HEADER_BYTES: u64 = 4096;
const MAGIC: u32 = u32::from_le_bytes(*b"GFSS");
const CHECK_AT: usize = 8;

/// Which stream uses a segment.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum SegmentKind {
    /// Guest writes, in order.
    Data,
    /// Blocks moved by the cleaner.
    Moved,
    /// Pages of the map and of the segment table.
    Meta,
    /// A file that belongs to another replica too: blocks that a clone shares with its source.
    Linked,
}

/// Numbers of linked segments begin here, so that one that nobody needs is known by its number.
pub const LINKED: u32 = 1 << 31;

impl SegmentKind {
    fn code(self) -> u8 {
        match self {
            SegmentKind::Data => 1,
            SegmentKind::Moved => 2,
            SegmentKind::Meta => 3,
            SegmentKind::Linked => 4,
        }
    }

    fn from_code(code: u8) -> Option<SegmentKind> {
        let all = [
            SegmentKind::Data,
            SegmentKind::Moved,
            SegmentKind::Meta,
            SegmentKind::Linked,
        ];
        all.into_iter().find(|kind| kind.code() == code)
    }
}

/// The header of a used segment.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct SegmentHeader {
    pub kind: SegmentKind,
    pub segment: SegmentId,
    /// Number in the order in which the log used its segments; 0 for the other streams.
    pub log_index: u64,
    pub epoch: Epoch,
}

impl SegmentHeader {
    pub fn encode(&self, identity: &Identity) -> Buf {
        let mut buf = BufMut::zeroed(SEGMENT_HEADER_BYTES as usize);
        let bytes = buf.as_mut();
        let mut put = Put::new(bytes);
        put.u32(MAGIC).u16(FORMAT_VERSION).u8(self.kind.code()).u8(0).u32(0);
        put.u32(self.segment.0).u64(self.log_index).u32(self.epoch.0);
        put.bytes(&identity.volume).bytes(&identity.replica);
        let check = check_around(0, bytes, CHECK_AT);
        bytes[CHECK_AT..CHECK_AT + 4].copy_from_slice(&check.to_le_bytes());
        buf.freeze()
    }

    /// `None` if the bytes are no valid header of a segment of this replica.
    pub fn decode(bytes: &[u8], identity: &Identity) -> Option<SegmentHeader> {
        let mut get = Get::new(bytes);
        if get.u32() != MAGIC || get.u16() != FORMAT_VERSION {
            return None;
        }
        let kind = SegmentKind::from_code(get.u8())?;
        get.u8();
        let check = get.u32();
        let header = SegmentHeader {
            kind,
            segment: SegmentId(get.u32()),
            log_index: get.u64(),
            epoch: Epoch(get.u32()),
        };
        let owner: ([u8; 16], [u8; 16]) = (get.array(), get.array());
        let ours = owner == (identity.volume, identity.replica);
        (ours && check_around(0, bytes, CHECK_AT) == check).then_some(header)
    }
}

/// A used segment.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Used {
    pub kind: SegmentKind,
    /// Pages of 4 KiB that the committed map points to.
    pub live: u32,
    /// For [`SegmentKind::Data`]; for [`SegmentKind::Moved`] that of the youngest segment that something in it comes from;
    /// for [`SegmentKind::Linked`] the number of the volume it comes from.
    pub log_index: u64,
    /// True while its stream still appends to it.
    pub open: bool,
}

/// A row of the segment table, in the shape of a page entry.
pub fn row(id: SegmentId, used: &Used) -> Entry {
    Entry {
        location: Location::from_bits(u64::from(id.0) << 32 | u64::from(used.kind.code())),
        version: Version {
            epoch: Epoch(used.live),
            seq: Seq(used.log_index),
        },
        check: 1.into(),
    }
}

/// The opposite of [`row`]; `None` for an empty row.
pub fn from_row(entry: Entry) -> Option<(SegmentId, Used)> {
    let kind = SegmentKind::from_code(entry.location.bits() as u8)?;
    let (live, log_index) = (entry.version.epoch.0, entry.version.seq.0);
    (entry.check.crc == 1).then_some((
        entry.location.segment(),
        Used {
            kind,
            live,
            log_index,
            open: false,
        },
    ))
}

/// Every segment of a replica. Invariant: a segment is in exactly one of used, free, making, leaving, removing.
///
/// Free ones come in two kinds. The file system only notes that it set the blocks of a *fresh* file aside; the first
/// write to each makes it change, and with the next sync commit, its own metadata. A *written* one was filled before
/// and is just overwritten, so the log takes these first.
#[derive(Debug, Default)]
pub struct Segments {
    used: BTreeMap<SegmentId, Used>,
    /// Used ones of which nothing was needed at the last checkpoint.
    idle: BTreeSet<SegmentId>,
    written: VecDeque<SegmentId>,
    fresh: VecDeque<SegmentId>,
    /// Files that are being made, or asked about.
    creating: BTreeMap<SegmentId, Made>,
    /// A fresh one that is being filled with zeros.
    filling: Option<SegmentId>,
    /// Used ones that were fresh, and that their stream has not filled yet.
    patchy: BTreeSet<SegmentId>,
    /// Freed, but still being read; and those whose file is being removed.
    leaving: BTreeSet<SegmentId>,
    removing: BTreeSet<SegmentId>,
    /// How many reads of each are out. A damaged pointer may name any number, so this is no array.
    pins: FxHashMap<SegmentId, u32>,
    /// Used ones whose numbers say that they are linked.
    linked: usize,
    /// Their files have, or may have, a second name in another replica: nobody writes into them any more.
    shared: BTreeSet<SegmentId>,
    /// Shared ones that nobody here needs: their names go.
    doomed: Vec<SegmentId>,
    /// While a clone is made nothing is used again.
    holds: usize,
    /// Live counts of [`SegmentKind::Meta`] together, and of all others.
    live_pages: u64,
    live_stored: u64,
    /// The last attempt to make a segment found the pool full.
    pub exhausted: bool,
}

/// What there was before a file was asked for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Made {
    New,
    Fresh,
    Written,
}

impl Segments {
    /// Takes what recovery found.
    pub fn load(&mut self, id: SegmentId, used: Used) {
        let before = self.used.insert(id, used);
        self.note_idle(id, used.live);
        self.linked += usize::from(id.0 >= LINKED && before.is_none());
        for (used, sign) in before.iter().map(|used| (used, -1)).chain([(&used, 1)]) {
            let sum = self.sum_of(used.kind);
            *sum = sum.strict_add_signed(sign * i64::from(used.live));
        }
    }

    /// Adds a segment file that nothing uses; `written` if a stream filled it once.
    pub fn load_free(&mut self, id: SegmentId, written: bool) {
        if written {
            self.written.push_back(id);
        } else {
            self.fresh.push_back(id);
        }
    }

    pub fn used(&self) -> &BTreeMap<SegmentId, Used> {
        &self.used
    }

    pub fn get(&self, id: SegmentId) -> Option<&Used> {
        self.used.get(&id)
    }

    /// Used ones of which nothing was needed at the last checkpoint.
    pub fn idle(&self) -> &BTreeSet<SegmentId> {
        &self.idle
    }

    fn note_idle(&mut self, id: SegmentId, live: u32) {
        if live == 0 {
            self.idle.insert(id);
        } else {
            self.idle.remove(&id);
        }
    }

    /// Segments that a stream may take now.
    pub fn free_count(&self) -> usize {
        self.written.len() + self.fresh.len()
    }

    /// Segments that will be free soon.
    pub fn coming_count(&self) -> usize {
        self.creating.len() + usize::from(self.filling.is_some())
    }

    pub fn creating_count(&self) -> usize {
        self.creating.len()
    }

    /// Files in the directory, whatever their state.
    pub fn file_count(&self) -> usize {
        let asked = self.creating.values().filter(|made| **made != Made::New).count();
        let idle = self.free_count() + usize::from(self.filling.is_some()) + asked;
        self.used.len() + idle + self.leaving.len() + self.doomed.len() + self.removing.len()
    }

    /// Used ones that belong to another replica too.
    pub fn linked_count(&self) -> usize {
        self.linked
    }

    /// Gives a free segment to a stream: the log gets one that is cheap to sync, if there is one.
    pub fn take(&mut self, kind: SegmentKind, log_index: u64) -> Option<SegmentId> {
        let filled = match kind {
            SegmentKind::Data => self.written.pop_front(),
            SegmentKind::Moved | SegmentKind::Meta | SegmentKind::Linked => None,
        };
        let id = match (filled, self.fresh.front().copied()) {
            (Some(id), _) => id,
            (None, Some(id)) => {
                self.fresh.pop_front();
                self.patchy.insert(id);
                id
            }
            (None, None) => self.written.pop_front()?,
        };
        let before = self.used.insert(
            id,
            Used {
                kind,
                live: 0,
                log_index,
                open: true,
            },
        );
        assert!(before.is_none(), "segment {} was free and used", id.0);
        self.idle.insert(id);
        Some(id)
    }

    /// Its stream has filled it and appends no more.
    pub fn close(&mut self, id: SegmentId) {
        self.used.get_mut(&id).expect("only a used segment is closed").open = false;
        self.patchy.remove(&id);
    }

    /// Opens again a segment that its stream goes on with after a restart.
    pub fn reopen(&mut self, id: SegmentId) {
        self.used
            .get_mut(&id)
            .expect("only a used segment is opened again")
            .open = true;
    }

    fn give_free(&mut self, id: SegmentId) {
        let patchy = self.patchy.remove(&id);
        self.load_free(id, !patchy);
        self.exhausted = false;
    }

    /// A number for a new segment; it counts as being created until [`Segments::created`].
    pub fn begin_create(&mut self) -> SegmentId {
        let taken = |id: &SegmentId| {
            self.used.contains_key(id)
                || self.written.contains(id)
                || self.fresh.contains(id)
                || self.creating.contains_key(id)
                || self.filling == Some(*id)
                || self.leaving.contains(id)
                || self.doomed.contains(id)
                || self.removing.contains(id)
        };
        let highest = [
            self.used.range(..SegmentId(LINKED)).next_back().map(|(id, _)| id),
            self.creating.keys().next_back(),
            self.leaving.range(..SegmentId(LINKED)).next_back(),
            self.removing.range(..SegmentId(LINKED)).next_back(),
        ]
        .into_iter()
        .flatten()
        .chain(&self.written)
        .chain(&self.fresh)
        .chain(&self.filling)
        .chain(self.doomed.iter().filter(|id| id.0 < LINKED))
        .max()
        .map_or(0, |id| id.0 + 1);
        // A low number that was given back is used first, so that numbers stay small.
        let low = (0..highest).take(64).map(SegmentId).find(|id| !taken(id));
        let id = low.unwrap_or(SegmentId(highest));
        self.creating.insert(id, Made::New);
        id
    }

    /// Takes a free segment out to make its file once more, which changes nothing and tells how the pool is.
    pub fn begin_ask(&mut self) -> Option<SegmentId> {
        let (id, made) = match self.fresh.pop_back() {
            Some(id) => (id, Made::Fresh),
            None => (self.written.pop_back()?, Made::Written),
        };
        self.creating.insert(id, made);
        Some(id)
    }

    pub fn created(&mut self, id: SegmentId) {
        let made = self.creating.remove(&id).expect("it was being created");
        self.load_free(id, made == Made::Written);
        self.exhausted = false;
    }

    pub fn create_failed(&mut self, id: SegmentId) {
        match self.creating.remove(&id).expect("it was being created") {
            Made::New => {}
            made => self.load_free(id, made == Made::Written),
        }
        self.exhausted = true;
    }

    /// Takes a fresh segment out, to fill it with zeros; one at a time.
    pub fn begin_fill(&mut self) -> Option<SegmentId> {
        assert!(self.filling.is_none(), "one segment is filled at a time");
        self.filling = Some(self.fresh.pop_front()?);
        self.filling
    }

    /// The end of filling; `whole` if it came to its end.
    pub fn end_fill(&mut self, whole: bool) {
        let id = self.filling.take().expect("a segment was being filled");
        self.load_free(id, whole);
    }

    /// Changes the count of needed pages of a segment.
    pub fn add_live(&mut self, id: SegmentId, delta: i64) {
        let used = self.used.get_mut(&id).expect("the map points only into used segments");
        used.live = u32::try_from(i64::from(used.live) + delta).expect("a segment's live count stays in range");
        let (kind, live) = (used.kind, used.live);
        self.note_idle(id, live);
        let sum = self.sum_of(kind);
        *sum = sum.strict_add_signed(delta);
    }

    fn sum_of(&mut self, kind: SegmentKind) -> &mut u64 {
        match kind {
            SegmentKind::Meta => &mut self.live_pages,
            SegmentKind::Data | SegmentKind::Moved | SegmentKind::Linked => &mut self.live_stored,
        }
    }

    /// Something was moved into a segment that was written when the log was at `log_index`: it is no older than that.
    pub fn hold_younger(&mut self, id: SegmentId, log_index: u64) {
        let used = self.used.get_mut(&id).expect("a stream uses its segment");
        used.log_index = used.log_index.max(log_index);
    }

    /// Nothing needs what is in it any more.
    pub fn release(&mut self, id: SegmentId) {
        let used = self.used.remove(&id).expect("only a used segment is released");
        debug_assert_eq!(used.live, 0, "nobody needs anything in segment {}", id.0);
        self.idle.remove(&id);
        self.linked -= usize::from(id.0 >= LINKED);
        if self.is_pinned(id) || self.holds > 0 {
            self.leaving.insert(id);
        } else {
            self.give_back(id);
        }
    }

    fn give_back(&mut self, id: SegmentId) {
        if self.shared.remove(&id) {
            self.patchy.remove(&id);
            self.doomed.push(id);
            self.exhausted = false;
        } else {
            self.give_free(id);
        }
    }

    /// The file of a used segment has a second name.
    pub fn share(&mut self, id: SegmentId) {
        self.shared.insert(id);
    }

    /// Takes a segment out whose file belongs to others too, to remove its name here.
    pub fn begin_unlink(&mut self) -> Option<SegmentId> {
        let id = self.doomed.pop()?;
        self.removing.insert(id);
        Some(id)
    }

    /// From now on nothing is used again that was used.
    pub fn hold(&mut self) {
        self.holds += 1;
    }

    /// Ends a hold; false if there is none. What was used meanwhile may have got a second name.
    pub fn let_go(&mut self) -> bool {
        if self.holds == 0 {
            return false;
        }
        self.holds -= 1;
        let stored = self.used.iter().filter(|(_, used)| used.kind != SegmentKind::Meta);
        self.shared
            .extend(stored.map(|(id, _)| *id).chain(self.leaving.iter().copied()));
        if self.holds == 0 {
            let leaving = self.leaving.iter().copied();
            let free: Vec<SegmentId> = leaving.filter(|id| !self.is_pinned(*id)).collect();
            for id in free {
                self.leaving.remove(&id);
                self.give_back(id);
            }
        }
        true
    }

    /// Takes a free segment out, to remove its file; a fresh one is the least loss.
    pub fn begin_remove(&mut self) -> Option<SegmentId> {
        let id = self.fresh.pop_back().or_else(|| self.written.pop_back())?;
        self.removing.insert(id);
        Some(id)
    }

    pub fn removed(&mut self, id: SegmentId) {
        assert!(self.removing.remove(&id));
        self.exhausted = false;
    }

    /// A read of this segment is out: it must not be written anew.
    pub fn pin(&mut self, id: SegmentId) {
        *self.pins.entry(id).or_default() += 1;
    }

    pub fn unpin(&mut self, id: SegmentId) {
        let pins = self.pins.get_mut(&id).expect("an unpin follows a pin");
        *pins -= 1;
        if *pins > 0 {
            return;
        }
        self.pins.remove(&id);
        if self.holds == 0 && self.leaving.remove(&id) {
            self.give_back(id);
        }
    }

    fn is_pinned(&self, id: SegmentId) -> bool {
        self.pins.contains_key(&id)
    }

    /// Pages of the map, of the tables of snapshots and of lists that the last checkpoint needs.
    pub fn live_pages(&self) -> u64 {
        self.live_pages
    }

    /// Pages of blocks that the committed map needs.
    pub fn live_stored_pages(&self) -> u64 {
        self.live_stored
    }

    /// Bytes of everything that the last checkpoint needs.
    pub fn live_bytes(&self) -> u64 {
        (self.live_stored + self.live_pages) * PAGE_BYTES
    }
}

/// Pages that fit into a segment behind its header.
pub fn pages_per_segment(segment_bytes: u64) -> u64 {
    (segment_bytes - SEGMENT_HEADER_BYTES) / PAGE_BYTES
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_segment_header_gives_back_what_it_was_made_of_and_knows_its_owner() {
        let identity = Identity {
            cluster: [1; 16],
            volume: [2; 16],
            replica: [3; 16],
        };
        let header = SegmentHeader {
            kind: SegmentKind::Moved,
            segment: SegmentId(9),
            log_index: 4,
            epoch: Epoch(2),
        };
        let bytes = header.encode(&identity);
        assert_eq!(SegmentHeader::decode(bytes.as_ref(), &identity), Some(header));
        let other = Identity {
            replica: [4; 16],
            ..identity
        };
        assert_eq!(SegmentHeader::decode(bytes.as_ref(), &other), None);
    }

    #[test]
    fn a_row_gives_back_the_segment() {
        let used = Used {
            kind: SegmentKind::Data,
            live: 1023,
            log_index: 1 << 40,
            open: false,
        };
        assert_eq!(from_row(row(SegmentId(77), &used)), Some((SegmentId(77), used)));
        assert_eq!(from_row(Entry::default()), None);
    }

    #[test]
    fn a_released_segment_is_not_free_while_it_is_being_read() {
        let mut segments = Segments::default();
        segments.load_free(SegmentId(0), false);
        let id = segments.take(SegmentKind::Data, 1).unwrap();
        segments.pin(id);
        segments.release(id);
        assert_eq!(segments.free_count(), 0);
        segments.unpin(id);
        assert_eq!(segments.free_count(), 1);
    }

    #[test]
    fn a_number_is_given_again_only_after_its_file_is_gone() {
        let mut segments = Segments::default();
        segments.load_free(SegmentId(0), false);
        let removing = segments.begin_remove().unwrap();
        assert_eq!(segments.begin_create(), SegmentId(1));
        segments.removed(removing);
        assert_eq!(segments.begin_create(), SegmentId(0));
    }

    #[test]
    fn the_log_takes_what_was_filled_before_and_the_others_take_fresh_ones() {
        let mut segments = Segments::default();
        (0..3).for_each(|n| segments.load_free(SegmentId(n), n == 1));
        assert_eq!(segments.take(SegmentKind::Meta, 0), Some(SegmentId(0)));
        assert_eq!(segments.take(SegmentKind::Data, 1), Some(SegmentId(1)));
        assert_eq!(segments.take(SegmentKind::Data, 2), Some(SegmentId(2)));
        // Filled to its end, it is worth keeping; given up before, it is as good as fresh.
        segments.close(SegmentId(2));
        segments.release(SegmentId(2));
        segments.release(SegmentId(0));
        assert_eq!(segments.begin_remove(), Some(SegmentId(0)));
        assert_eq!(segments.take(SegmentKind::Data, 3), Some(SegmentId(2)));
    }

    #[test]
    fn a_segment_that_is_being_filled_is_nobodys() {
        let mut segments = Segments::default();
        (0..2).for_each(|n| segments.load_free(SegmentId(n), false));
        assert_eq!(segments.begin_fill(), Some(SegmentId(0)));
        assert_eq!((segments.free_count(), segments.file_count()), (1, 2));
        assert_eq!(segments.begin_create(), SegmentId(2));
        segments.end_fill(true);
        assert_eq!(segments.take(SegmentKind::Data, 1), Some(SegmentId(0)));
    }
}
