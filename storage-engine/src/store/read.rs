//! Reads: find every block, read what lies together in one go, let nothing out that does not pass its check.

use std::collections::BTreeMap;

use slab::Slab;
use smallvec::SmallVec;

use super::map::Found;
use super::page::{Entry, Page, PageName};
use super::replica::{Stored, StoredBlock};
use super::{Event, Purpose, Store};
use crate::buffer::{Buf, BufMut};
use crate::io::{FileId, Io, IoFailure};
use crate::request::{Piece, RequestError};
use crate::types::{Check, Lba, Location, SnapshotId, Version};

/// Names a read until it is reported.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ReadToken {
    /// Somebody's request.
    Request(u64),
    /// One that the coordinator makes by itself.
    Own(u64),
}

/// Who reads, and so what he is told.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Asker {
    Reader(ReadToken),
    /// Somebody who wants what is stored, as it is: [`Event::Stored`].
    Stored(u64),
    /// Whether a block is to be mended: of this order, the one at this place in it.
    Repair(u64, usize),
}

/// Names a part of a read.
#[derive(Clone, Copy, Debug)]
pub struct ReadKey {
    read: usize,
    part: usize,
}

/// Reads under way, and pages being fetched for anybody.
#[derive(Debug, Default)]
pub struct Reads {
    under_way: Slab<Read>,
    fetching: BTreeMap<Location, Vec<Waiter>>,
}

/// A read of one block is one part of one entry, and needs no memory but its buffer.
#[derive(Debug)]
struct Read {
    asker: Asker,
    lba: Lba,
    blocks: u64,
    /// What the blocks were at this snapshot, not what they are.
    at: Option<SnapshotId>,
    parts: SmallVec<[Part; 1]>,
    outstanding: usize,
    failed: Option<RequestError>,
    /// Where the answer goes if somebody lent the memory; cut up as the parts are read.
    into: Option<BufMut>,
}

#[derive(Debug)]
enum Part {
    /// So many blocks, since this version if somebody asked for what is stored.
    Zeros(u64, Version),
    Stored {
        lba: Lba,
        entries: SmallVec<[Entry; 1]>,
        bytes: Option<BufMut>,
    },
}

impl Part {
    /// Some block of it is stored in fewer bytes than it has.
    fn is_shorter(&self, block_bytes: u64) -> bool {
        match self {
            Part::Zeros(..) => false,
            Part::Stored { entries, .. } => entries.iter().any(|entry| entry.location.len() < block_bytes),
        }
    }
}

/// What a read found that has to be opened or decompressed, in order.
#[derive(Debug)]
pub enum ReadPart {
    /// So many blocks of zeros.
    Zeros(u64),
    /// Blocks from `lba` on as they are stored, one behind the other, and what is known of each.
    Stored {
        lba: Lba,
        blocks: SmallVec<[ReadBlock; 1]>,
        bytes: BufMut,
    },
}

/// One block of those.
#[derive(Clone, Copy, Debug)]
pub struct ReadBlock {
    pub version: Version,
    pub check: Check,
    /// Bytes that it is stored in.
    pub len: usize,
}

impl ReadBlock {
    fn of(entry: &Entry) -> ReadBlock {
        ReadBlock {
            version: entry.version,
            check: entry.check,
            len: entry.location.len() as usize,
        }
    }
}

/// Who wants a page.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Waiter {
    Read(usize),
    Scan(u64),
    /// The checkpoint and the cleaner look again by themselves.
    Background,
    /// So does the scrub, which lives on without it.
    Scrub,
    Rows(u64),
    /// Copies are looked at again; the first ones fail without it.
    Copies,
}

impl Store {
    /// Reads `blocks` blocks from `lba`, both inside the volume; reported by `Event::Read` with `token`. The answer is put
    /// in `into` if there is such memory, of just that length.
    pub fn read(&mut self, token: ReadToken, lba: Lba, blocks: u64, into: Option<BufMut>) {
        debug_assert!(lba.0 + blocks <= self.size_blocks());
        self.start_read(Asker::Reader(token), lba, blocks, None, into);
    }

    /// The same of what the blocks were at a snapshot.
    pub fn read_snapshot(
        &mut self,
        token: ReadToken,
        at: SnapshotId,
        lba: Lba,
        blocks: u64,
    ) -> Result<(), RequestError> {
        let size = self.known(at)?.size_blocks;
        if lba.0.checked_add(blocks).is_none_or(|end| end > size) {
            return Err(RequestError::Invalid(format!(
                "blocks {} to {} of snapshot {at}, which has {size}",
                lba.0,
                lba.0.saturating_add(blocks)
            )));
        }
        self.start_read(Asker::Reader(token), lba, blocks, Some(at), None);
        Ok(())
    }

    pub(super) fn start_read(
        &mut self,
        asker: Asker,
        lba: Lba,
        blocks: u64,
        at: Option<SnapshotId>,
        into: Option<BufMut>,
    ) {
        let id = self.reads.under_way.insert(Read {
            asker,
            lba,
            blocks,
            at,
            parts: SmallVec::new(),
            outstanding: 0,
            failed: None,
            into,
        });
        self.resolve(id);
    }

    fn resolve(&mut self, id: usize) {
        let read = &self.reads.under_way[id];
        let (first, blocks) = (read.lba, read.blocks);
        let apart = matches!(read.asker, Asker::Stored(_));
        let at = match read.at.map(|at| self.known(at).map(|snapshot| snapshot.version)) {
            None => None,
            Some(Ok(version)) => Some(version),
            Some(Err(error)) => {
                // It was deleted while its pages were read.
                self.reads.under_way[id].failed = Some(error);
                return self.finish_read(id);
            }
        };
        let mut parts = SmallVec::new();
        let mut missing: Vec<(PageName, Entry)> = Vec::new();
        for lba in (first.0..first.0 + blocks).map(Lba) {
            let found = match at {
                Some(version) => self.find_at(version, lba),
                None => match self.lookup_memory(lba) {
                    Some(entry) => Found::Entry(entry),
                    None => self.map.find(lba),
                },
            };
            match found {
                Found::NeedPage(name, pointer) => {
                    if missing.last() != Some(&(name, pointer)) {
                        missing.push((name, pointer));
                    }
                }
                Found::Entry(entry) if missing.is_empty() => add_block(&mut parts, lba, entry, apart),
                Found::Entry(_) => {}
            }
        }
        if !missing.is_empty() {
            // Looked up again from the start when the first of them comes: it may lead to further pages.
            self.reads.under_way[id].outstanding = missing.len();
            for (name, pointer) in missing {
                self.fetch(name, pointer, Waiter::Read(id));
            }
            return;
        }
        let stored = parts.iter().filter(|part| matches!(part, Part::Stored { .. })).count();
        let count = parts.len();
        let block_bytes = self.block_size().bytes();
        let shorter = parts.iter().any(|part| part.is_shorter(block_bytes));
        let read = &mut self.reads.under_way[id];
        // What has to grow first is not read in place.
        let mut into = read.into.take().filter(|_| !shorter);
        read.outstanding = stored;
        read.parts = parts;
        if stored == 0 {
            self.finish_read(id);
            return;
        }
        for part in 0..count {
            let (location, buf) = match &self.reads.under_way[id].parts[part] {
                Part::Stored { entries, .. } => {
                    let len: u64 = entries.iter().map(|entry| entry.location.len()).sum();
                    (entries[0].location, place(&mut into, len as usize))
                }
                Part::Zeros(blocks, _) => {
                    // Whoever lent the memory fills this part himself.
                    if into.is_some() {
                        drop(place(&mut into, (blocks * block_bytes) as usize));
                    }
                    continue;
                }
            };
            self.segments.pin(location.segment());
            let io = Io::Read {
                file: FileId::Segment(location.segment()),
                offset: location.offset(),
                buf,
            };
            self.issue(io, Purpose::BlockRead(ReadKey { read: id, part }));
        }
    }

    /// Reads a page of the map for somebody; one operation serves all who wait for it.
    pub(super) fn fetch(&mut self, name: PageName, pointer: Entry, waiter: Waiter) {
        let waiters = self.reads.fetching.entry(pointer.location).or_default();
        let first = waiters.is_empty();
        waiters.push(waiter);
        if first {
            let segment = pointer.location.segment();
            self.segments.pin(segment);
            let buf = BufMut::for_reading(pointer.location.len() as usize);
            let io = Io::Read {
                file: FileId::Segment(segment),
                offset: pointer.location.offset(),
                buf,
            };
            self.issue(io, Purpose::PageRead { key: name, pointer });
        }
    }

    /// True while a page is on its way.
    pub(super) fn is_fetching(&self, pointer: Entry) -> bool {
        self.reads.fetching.contains_key(&pointer.location)
    }

    pub(super) fn page_read(&mut self, name: PageName, pointer: Entry, result: Result<Buf, IoFailure>) {
        self.segments.unpin(pointer.location.segment());
        let waiters = self
            .reads
            .fetching
            .remove(&pointer.location)
            .expect("somebody waits for each page");
        let replica = self.superblock.geometry.identity.replica;
        let page = match result {
            Ok(bytes) => Page::decode_below(bytes, name, replica, pointer).map_err(|error| {
                self.stats.damaged_blocks += 1;
                self.count_damaged(pointer.location.segment(), pointer.location.offset());
                let text = format!(
                    "map page {} of level {} at {:?}: {error}",
                    name.index, name.level, pointer.location
                );
                RequestError::Corrupt(text)
            }),
            Err(error) => {
                self.count_damaged(pointer.location.segment(), pointer.location.offset());
                Err(RequestError::Failed(format!(
                    "reading the map at {:?}: {error}",
                    pointer.location
                )))
            }
        };
        let failed = match page {
            Ok(page) => {
                // A checkpoint may have let go of the segment meanwhile; its places will hold something else.
                if self.segments.get(pointer.location.segment()).is_some() {
                    self.map.add(pointer.location, page);
                }
                None
            }
            Err(error) => Some(error),
        };
        for waiter in waiters {
            match (waiter, &failed) {
                (Waiter::Read(id), failed) => {
                    let read = &mut self.reads.under_way[id];
                    read.outstanding -= 1;
                    read.failed = read.failed.take().or_else(|| failed.clone());
                    if read.outstanding == 0 {
                        if read.failed.is_some() {
                            self.finish_read(id)
                        } else {
                            self.resolve(id)
                        }
                    }
                }
                (Waiter::Scan(id), failed) => self.run_scan(id, failed.clone().map_or(Ok(()), Err)),
                (Waiter::Scrub, Some(error)) => self.scrub_page_failed(name, pointer, error.to_string()),
                (Waiter::Scrub | Waiter::Copies, None) => {}
                (Waiter::Rows(id), failed) => self.run_rows(id, failed.clone().map_or(Ok(()), Err)),
                (Waiter::Copies, Some(error)) => self.copies_failed(error),
                (Waiter::Background, Some(error)) => self.stop(format!("the map cannot be kept: {error}")),
                (Waiter::Background, None) => {}
            }
        }
    }

    pub(super) fn block_read(&mut self, key: ReadKey, result: Result<BufMut, IoFailure>) {
        let read = &mut self.reads.under_way[key.read];
        read.outstanding -= 1;
        let Part::Stored { lba, entries, bytes } = &mut read.parts[key.part] else {
            unreachable!("only stored blocks are read")
        };
        let segment = entries[0].location.segment();
        let seals = self.origins.seals(segment).unwrap_or(self.seals);
        let block_bytes = seals.block_size().bytes();
        let mut damaged: Vec<u64> = Vec::new();
        match result {
            Ok(buf) => {
                let mut stored = buf.as_ref();
                for (entry, at) in entries.iter().zip((lba.0..).map(Lba)) {
                    let (block, rest) = stored.split_at(entry.location.len() as usize);
                    stored = rest;
                    let fits = entry.location.len() <= block_bytes;
                    if !fits || seals.block(at, entry.version, block) != entry.check.crc {
                        self.stats.damaged_blocks += 1;
                        damaged.push(entry.location.offset());
                        let text = format!("block {} version {} at {:?}", at.0, entry.version, entry.location);
                        read.failed.get_or_insert(RequestError::Corrupt(text));
                    }
                }
                *bytes = Some(buf);
            }
            Err(error) => {
                // Which of them it was nobody knows.
                damaged.push(entries[0].location.offset());
                let text = format!("reading block {} at {:?}: {error}", lba.0, entries[0].location);
                read.failed.get_or_insert(RequestError::Failed(text));
            }
        }
        let done = read.outstanding == 0;
        for offset in damaged {
            self.count_damaged(segment, offset);
        }
        self.segments.unpin(segment);
        if done {
            self.finish_read(key.read);
        }
    }

    fn finish_read(&mut self, id: usize) {
        let read = self.reads.under_way.remove(id);
        let block_bytes = self.block_size().bytes();
        let token = match read.asker {
            Asker::Reader(token) => token,
            Asker::Stored(token) => {
                let found = match read.failed {
                    Some(error) => Err(error),
                    None => Ok(self.as_stored(read.lba, read.parts)),
                };
                return self.events.push_back(Event::Stored(token, found));
            }
            Asker::Repair(order, index) => return self.repair_looked_at(order, index, read.failed.is_some()),
        };
        let as_stored = self.seals.tagged() || read.parts.iter().any(|part| part.is_shorter(block_bytes));
        if read.failed.is_none() && as_stored {
            let parts = read.parts.into_iter().map(|part| match part {
                Part::Zeros(blocks, _) => ReadPart::Zeros(blocks),
                Part::Stored { lba, entries, bytes } => ReadPart::Stored {
                    lba,
                    blocks: entries.iter().map(ReadBlock::of).collect(),
                    bytes: bytes.expect("every part was read"),
                },
            });
            self.events.push_back(Event::ReadStored(token, parts.collect()));
            return;
        }
        let answer = match read.failed {
            Some(error) => Err(error),
            None => Ok(read
                .parts
                .into_iter()
                .map(|part| match part {
                    Part::Zeros(blocks, _) => Piece::Zeros((blocks * block_bytes) as usize),
                    Part::Stored { bytes, .. } => Piece::Bytes(bytes.expect("every part was read").freeze()),
                })
                .collect()),
        };
        self.events.push_back(Event::Read(token, answer));
    }

    /// What a read from `lba` on found, with the check that a block has in every replica of this volume.
    fn as_stored(&self, lba: Lba, parts: SmallVec<[Part; 1]>) -> Vec<Stored> {
        let mut stored = Vec::new();
        let mut at = lba;
        for part in parts {
            match part {
                Part::Zeros(blocks, version) => {
                    let (start, end) = (at, Lba(at.0 + blocks));
                    stored.push(Stored::Zeros { start, end, version });
                    at = end;
                }
                Part::Stored { lba, entries, bytes } => {
                    let all = bytes.expect("every part was read").freeze();
                    let mut from = 0;
                    for (entry, lba) in entries.iter().zip((lba.0..).map(Lba)) {
                        let to = from + entry.location.len() as usize;
                        let (version, mut check, bytes) = (entry.version, entry.check, all.slice(from..to));
                        if self.origins.seals(entry.location.segment()).is_some() {
                            // A block that a clone shares: what travels is the clone's own.
                            check.crc = self.seals.block(lba, version, bytes.as_ref());
                        }
                        let pages = entry.location.pages() as u8;
                        stored.push(Stored::Block(StoredBlock {
                            lba,
                            version,
                            check,
                            pages,
                            bytes,
                        }));
                        (from, at) = (to, Lba(lba.0 + 1));
                    }
                }
            }
        }
        stored
    }
}

/// The next `len` bytes of what was lent for the answer, or memory of our own.
fn place(into: &mut Option<BufMut>, len: usize) -> BufMut {
    match into {
        Some(rest) if rest.len() > len => rest.split_front(len),
        _ => into.take().unwrap_or_else(|| BufMut::for_reading(len)),
    }
}

/// `apart`: zeros of different versions are not one part.
fn add_block(parts: &mut SmallVec<[Part; 1]>, lba: Lba, entry: Entry, apart: bool) {
    if entry.location.is_none() {
        match parts.last_mut() {
            Some(Part::Zeros(blocks, version)) if !apart || *version == entry.version => *blocks += 1,
            _ => parts.push(Part::Zeros(1, entry.version)),
        }
        return;
    }
    if let Some(Part::Stored { entries, .. }) = parts.last_mut() {
        let last = entries.last().expect("a part has a block").location;
        if last.segment() == entry.location.segment() && last.end() == entry.location.offset() {
            entries.push(entry);
            return;
        }
    }
    parts.push(Part::Stored {
        lba,
        entries: SmallVec::from_buf([entry]),
        bytes: None,
    });
}
