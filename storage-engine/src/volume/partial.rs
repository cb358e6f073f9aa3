//! Requests for parts of blocks: a guest addresses sectors of 512 bytes, a block is read and written whole.
//!
//! A write of a part is a read of the block, a change in memory and a write of the whole block. So a block is never torn:
//! the log has the old one or the new one. From the first such request on until its block is in the log the block is
//! *busy*, and what comes for it meanwhile waits in line; requests for other blocks do not.
//!
//! ```text
//!            earlier writes of the block are in the log          read, or known          appended
//! Blocked ──────────────────────────────────────────────► Reading ──────────► Writing ──────────► answered; who is next?
//! ```
//!
//! Reads never wait: a write that was answered is in the log, and one that was not may be seen or not. Parts that wait
//! together for one block become one write of it. What covers a whole block, alone or together, is not read first.

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::ops::Range;

use rustc_hash::FxHashMap;

use super::{Backing, Owner, Volume, Waiting};
use crate::buffer::{Buf, BufMut};
use crate::request::{Piece, Reply, RequestError, RequestId};
use crate::store::{ReadToken, WriteEntry};
use crate::types::{Lba, Version};

/// Requests that were taken to pieces, and blocks that are changed in part.
#[derive(Debug, Default)]
pub(super) struct Partials {
    busy: BTreeMap<Lba, Busy>,
    blocked: BTreeSet<Lba>,
    requests: FxHashMap<RequestId, Pieces>,
    /// Reads of parts: what of the blocks that were read was asked for, in bytes.
    cuts: FxHashMap<RequestId, Range<usize>>,
    /// Something happened that may let a blocked one go on.
    due: bool,
}

/// A request that was taken to pieces.
#[derive(Debug)]
struct Pieces {
    left: usize,
    fua: bool,
    /// The last write of those that are in the log.
    version: Version,
    failed: Option<RequestError>,
}

/// A block that is being changed in part.
#[derive(Debug)]
struct Busy {
    state: State,
    /// What this change is made of, in order.
    parts: Vec<Part>,
    /// What comes after it.
    behind: VecDeque<Behind>,
    /// What the block holds after the last change, if nothing else was written since.
    content: Option<Buf>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum State {
    /// Until earlier writes of the block are in the log.
    Blocked,
    /// `stale`: the volume is being reverted, and what is read has to be read again.
    Reading { stale: bool },
    /// The whole block waits for its place in the log, or is on its way there.
    Writing,
}

#[derive(Debug)]
struct Part {
    id: RequestId,
    /// Bytes of the block.
    at: Range<usize>,
    /// Zeros if there is none.
    data: Option<Buf>,
}

#[derive(Debug)]
enum Behind {
    Part(Part),
    /// A write of all of it.
    Whole(Waiting),
}

impl Pieces {
    fn new(left: usize, fua: bool) -> Pieces {
        Pieces {
            left,
            fua,
            version: Version::default(),
            failed: None,
        }
    }
}

impl Partials {
    pub fn is_idle(&self) -> bool {
        self.busy.is_empty() && self.requests.is_empty()
    }

    /// What was written may be what a blocked one waited for.
    pub fn look_again(&mut self) {
        self.due = !self.blocked.is_empty();
    }

    /// The volume is about to be reverted: nothing that was read of it counts any more.
    pub fn forget_contents(&mut self) {
        for busy in self.busy.values_mut() {
            busy.content = None;
            if let State::Reading { stale } = &mut busy.state {
                *stale = true;
            }
        }
    }

    /// A change that waited for its place in the log is to be made anew.
    pub fn make_anew(&mut self, lba: Lba) {
        let busy = self.busy.get_mut(&lba).expect("it was being changed");
        (busy.state, self.due) = (State::Blocked, true);
        self.blocked.insert(lba);
    }

    /// A read of whole blocks answers a request for so many bytes of them.
    pub fn cut_answer(&mut self, id: RequestId, bytes: Range<usize>) {
        self.cuts.insert(id, bytes);
    }

    /// What was asked for of what was read.
    pub fn cut(&mut self, id: RequestId, pieces: Vec<Piece>) -> Vec<Piece> {
        if self.cuts.is_empty() {
            return pieces;
        }
        let Some(wanted) = self.cuts.remove(&id) else {
            return pieces;
        };
        let mut at = 0;
        let cut = pieces.into_iter().filter_map(|piece| {
            let len = match &piece {
                Piece::Bytes(bytes) => bytes.len(),
                Piece::Zeros(len) => *len,
            };
            let (start, end) = (wanted.start.max(at), wanted.end.min(at + len));
            let inside = start.saturating_sub(at)..end.saturating_sub(at);
            at += len;
            (start < end).then(|| match piece {
                Piece::Bytes(bytes) => Piece::Bytes(bytes.slice(inside)),
                Piece::Zeros(_) => Piece::Zeros(inside.len()),
            })
        });
        cut.collect()
    }

    /// A read ended without an answer to cut.
    pub fn forget_cut(&mut self, id: RequestId) {
        self.cuts.remove(&id);
    }

    /// Everybody who waits for pieces.
    pub fn take_all(&mut self) -> Vec<RequestId> {
        self.busy.clear();
        self.blocked.clear();
        std::mem::take(&mut self.requests).into_keys().collect()
    }
}

impl<B: Backing> Volume<B> {
    /// Takes a write, or a zero if there is no `data`, of any sectors.
    pub(super) fn take_sectors(&mut self, id: RequestId, offset: u64, len: u64, data: Option<Buf>, fua: bool) {
        let block_bytes = self.block_size().bytes();
        let end = offset + len;
        let slice = |from: u64, to: u64| {
            let data = data.as_ref()?;
            Some(data.slice((from - offset) as usize..(to - offset) as usize))
        };
        let mut pieces = Pieces::new(0, fua);
        let (mut runs, mut parts) = (Vec::new(), Vec::new());
        let mut at = offset;
        while at < end {
            let (lba, inside) = (at / block_bytes, at % block_bytes);
            let whole = if inside == 0 { (end - at) / block_bytes } else { 0 };
            let stop = if whole > 0 {
                at + whole * block_bytes
            } else {
                end.min((lba + 1) * block_bytes)
            };
            pieces.left += 1;
            if whole > 0 {
                runs.push((lba, whole, slice(at, stop)));
            } else {
                let bytes = inside as usize..(inside + stop - at) as usize;
                let data = slice(at, stop);
                parts.push((Lba(lba), Part { id, at: bytes, data }));
            }
            at = stop;
        }
        drop(data);
        self.partials.requests.insert(id, pieces);
        for (lba, blocks, data) in runs {
            let zero = data.is_none();
            let entry = WriteEntry {
                lba: Lba(lba),
                blocks: blocks as u32,
                zero,
            };
            let owner = Owner::Piece(id);
            self.take_run(Waiting {
                owner,
                entry,
                data,
                fua: false,
            });
        }
        for (lba, part) in parts {
            self.take_part(lba, part);
        }
    }

    /// Takes a write of whole blocks. What it has of busy ones waits in line there, the rest goes right on.
    pub(super) fn take_run(&mut self, mut run: Waiting) {
        if let Some(data) = run.data.take() {
            // The disk takes whole pages; the rest of a request may begin anywhere.
            let fits = data.is_whole_pages();
            run.data = Some(if fits {
                data
            } else {
                BufMut::copy_of(data.as_ref()).freeze()
            });
        }
        let (first, end) = (run.entry.lba, run.entry.end());
        let busy: Vec<Lba> = self.partials.busy.range(first..end).map(|(lba, _)| *lba).collect();
        if busy.is_empty() {
            return self.waiting.push_back(run);
        }
        let id = match run.owner {
            Owner::Request(id) => {
                self.partials.requests.insert(id, Pieces::new(1, run.fua));
                id
            }
            Owner::Piece(id) => id,
            Owner::Change(lba) => unreachable!("block {} is changed by nobody else", lba.0),
        };
        let block_bytes = self.block_size().bytes();
        let piece = |from: Lba, to: Lba| {
            let byte = |lba: Lba| ((lba.0 - first.0) * block_bytes) as usize;
            Waiting {
                owner: Owner::Piece(id),
                entry: WriteEntry {
                    lba: from,
                    blocks: (to.0 - from.0) as u32,
                    zero: run.entry.zero,
                },
                data: run.data.as_ref().map(|data| data.slice(byte(from)..byte(to))),
                fua: false,
            }
        };
        let (mut at, mut count) = (first, 0);
        for lba in busy {
            if at < lba {
                self.waiting.push_back(piece(at, lba));
                count += 1;
            }
            at = Lba(lba.0 + 1);
            let busy = self.partials.busy.get_mut(&lba).expect("it was just listed");
            busy.behind.push_back(Behind::Whole(piece(lba, at)));
            count += 1;
        }
        if at < end {
            self.waiting.push_back(piece(at, end));
            count += 1;
        }
        let pieces = self.partials.requests.get_mut(&id).expect("it has pieces");
        pieces.left += count - 1;
    }

    fn take_part(&mut self, lba: Lba, part: Part) {
        let partials = &mut self.partials;
        let Some(busy) = partials.busy.get_mut(&lba) else {
            let busy = Busy {
                state: State::Blocked,
                parts: vec![part],
                behind: VecDeque::new(),
                content: None,
            };
            partials.busy.insert(lba, busy);
            partials.blocked.insert(lba);
            partials.due = true;
            return;
        };
        if busy.state == State::Writing || !busy.behind.is_empty() {
            busy.behind.push_back(Behind::Part(part));
        } else {
            busy.parts.push(part);
        }
    }

    /// Lets blocked ones go on whose turn has come.
    pub(super) fn run_partials(&mut self) {
        if !self.partials.due || self.is_reverting() {
            return;
        }
        self.partials.due = false;
        let block_bytes = self.block_size().bytes() as usize;
        for lba in self.partials.blocked.clone() {
            let waiting = self.waiting.iter().map(|write| &write.entry);
            let mut earlier = waiting.chain(self.inflight.iter().map(|write| &write.entry));
            if earlier.any(|write| write.covers(lba)) {
                continue;
            }
            self.partials.blocked.remove(&lba);
            let busy = self.partials.busy.get_mut(&lba).expect("it is blocked");
            if busy.covers(block_bytes) {
                self.change(lba, &[]);
            } else if let Some(content) = busy.content.take() {
                self.change(lba, &[Piece::Bytes(content)]);
            } else {
                busy.state = State::Reading { stale: false };
                self.store.read(ReadToken::Own(lba.0), lba, 1, None);
            }
        }
    }

    /// A block was read to be changed.
    pub(super) fn read_to_change(&mut self, lba: Lba, found: Result<Vec<Piece>, RequestError>) {
        let Some(busy) = self.partials.busy.get(&lba) else {
            return; // the store stopped, and nobody waits any more
        };
        match (busy.state, found) {
            (State::Reading { stale: true }, _) => self.partials.make_anew(lba),
            (State::Reading { stale: false }, Ok(pieces)) => self.change(lba, &pieces),
            (State::Reading { stale: false }, Err(error)) => self.change_failed(lba, &error),
            (state, _) => unreachable!("a block that was read is being read, not {state:?}"),
        }
    }

    /// Makes the changed block out of the old one, and sends it on.
    fn change(&mut self, lba: Lba, old: &[Piece]) {
        let busy = self.partials.busy.get_mut(&lba).expect("it is being changed");
        let mut block = BufMut::zeroed(self.store.block_size().bytes() as usize);
        let mut rest = block.as_mut();
        for piece in old {
            match piece {
                Piece::Bytes(bytes) => {
                    let (here, behind) = rest.split_at_mut(bytes.len());
                    here.copy_from_slice(bytes.as_ref());
                    rest = behind;
                }
                Piece::Zeros(len) => rest = &mut rest[*len..],
            }
        }
        for part in &busy.parts {
            let place = &mut block.as_mut()[part.at.clone()];
            match &part.data {
                Some(data) => place.copy_from_slice(data.as_ref()),
                None => place.fill(0),
            }
        }
        let block = block.freeze();
        // What was trimmed bit by bit gives its space back in the end.
        let zero = busy.parts.iter().any(|part| part.data.is_none()) && block.as_ref().iter().all(|byte| *byte == 0);
        busy.state = State::Writing;
        busy.content = Some(block.clone());
        self.counters.changed_blocks += 1;
        let entry = WriteEntry { lba, blocks: 1, zero };
        self.waiting.push_back(Waiting {
            owner: Owner::Change(lba),
            entry,
            data: (!zero).then_some(block),
            fua: false,
        });
    }

    /// A changed block is in the log.
    pub(super) fn changed(&mut self, lba: Lba, version: Version) {
        let busy = self.partials.busy.get_mut(&lba).expect("it was being changed");
        for part in std::mem::take(&mut busy.parts) {
            self.piece_done(part.id, Ok(version));
        }
        self.next_change(lba);
    }

    /// A change cannot be made: nothing of the block is written.
    pub(super) fn change_failed(&mut self, lba: Lba, error: &RequestError) {
        let busy = self.partials.busy.get_mut(&lba).expect("it was being changed");
        busy.content = None;
        for part in std::mem::take(&mut busy.parts) {
            self.piece_done(part.id, Err(error.clone()));
        }
        self.next_change(lba);
    }

    /// Whoever comes next in line for the block.
    fn next_change(&mut self, lba: Lba) {
        let mut busy = self.partials.busy.remove(&lba).expect("it was being changed");
        while let Some(next) = busy.behind.pop_front() {
            match next {
                Behind::Whole(write) if busy.parts.is_empty() => {
                    busy.content = None;
                    self.waiting.push_back(write);
                }
                Behind::Part(part) => busy.parts.push(part),
                Behind::Whole(write) => {
                    busy.behind.push_front(Behind::Whole(write));
                    break;
                }
            }
        }
        if !busy.parts.is_empty() {
            busy.state = State::Blocked;
            self.partials.busy.insert(lba, busy);
            self.partials.blocked.insert(lba);
            self.partials.due = true;
        }
    }

    /// A piece of a request is in the log, or will never be; the last one brings the answer.
    pub(super) fn piece_done(&mut self, id: RequestId, outcome: Result<Version, RequestError>) {
        let pieces = self.partials.requests.get_mut(&id).expect("it has pieces left");
        pieces.left -= 1;
        match outcome {
            Ok(version) => pieces.version = pieces.version.max(version),
            Err(error) => drop(pieces.failed.get_or_insert(error)),
        }
        if pieces.left > 0 {
            return;
        }
        let pieces = self.partials.requests.remove(&id).expect("it is there");
        match pieces.failed {
            Some(error) => self.answer(id, Err(error)),
            None if pieces.fua => self.when_durable(pieces.version, id),
            None => self.answer(id, Ok(Reply::Done)),
        }
    }

    /// The volume is about to be reverted while writes wait for space: those that change a part of a block do it once it is.
    pub(super) fn change_after_revert(&mut self) {
        self.partials.forget_contents();
        let partials = &mut self.partials;
        self.waiting.retain(|write| match write.owner {
            Owner::Change(lba) => {
                partials.make_anew(lba);
                false
            }
            Owner::Request(_) | Owner::Piece(_) => true,
        });
    }
}

impl Busy {
    /// The parts cover the whole block.
    fn covers(&self, block_bytes: usize) -> bool {
        let mut ranges: Vec<&Range<usize>> = self.parts.iter().map(|part| &part.at).collect();
        ranges.sort_by_key(|range| range.start);
        let end = ranges.into_iter().try_fold(0, |end, range| {
            // A gap ends it.
            (range.start <= end).then_some(end.max(range.end))
        });
        end == Some(block_bytes)
    }
}
