//! The volume: where guest requests come in, are put in order and answered.
//!
//! It coordinates; the store keeps. A guest addresses sectors; what is not whole blocks is made so ([`partial`]). Every write gets the next sequence number of the epoch, writes that arrived
//! together share a record, and a write is answered when the store has appended it. A flush is answered when
//! everything that was answered before it is durable: flushes that wait together share one sync. When there are
//! several replicas, what it stands on sends each record to all of them ([`Backing`]).

mod backing;
mod control;
mod form;
mod full;
mod led;
mod partial;

use std::collections::{BTreeMap, VecDeque};
use std::ops::Range;

pub use backing::Backing;
pub use full::WhenFull;
pub use led::{Compared, Led, LedOptions};

use crate::BlockEngine;
use crate::buffer::{Buf, BufMut};
use crate::io::{IoId, IoResult, Output};
use crate::request::{Answer, Piece, Reply, Request, RequestError, RequestId};
use crate::seal::Sealer;
use crate::store::{
    Batch, Damage, Event, PAGES_MAX, ReadToken, Room, ScrubOrder, ScrubProgress, Store, StoreStats, WRITES_MAX,
    WriteEntry,
};
use crate::types::{BlockSize, Lba, PAGE_BYTES, SECTOR_BYTES, Seq, Version};

/// Largest write that is taken, in bytes; a front end splits larger ones.
pub const WRITE_BYTES_MAX: u64 = PAGES_MAX as u64 * PAGE_BYTES;

/// Findings of the scrub that wait to be told; the list of what is damaged has more.
const NEW_DAMAGE_MAX: usize = 64;

/// Counts since the engine was started.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct VolumeCounters {
    pub reads: u64,
    pub writes: u64,
    pub flushes: u64,
    pub zeroes: u64,
    /// Requests that failed.
    pub errors: u64,
    /// Records that carried the writes.
    pub records: u64,
    /// Blocks that were written because a part of them was: one may answer several requests.
    pub changed_blocks: u64,
}

/// One volume's engine, driven as [`BlockEngine`] says. It stands on the store of its only replica, or on whoever leads
/// several.
pub struct Volume<B = Store> {
    store: B,
    form: form::Form,
    partials: partial::Partials,
    next_seq: Seq,
    /// Writes that wait for a place in a record.
    waiting: VecDeque<Waiting>,
    /// Writes in records that are on their way, in order.
    inflight: VecDeque<Inflight>,
    records_inflight: VecDeque<Seq>,
    /// Writes and flushes that wait for the store to be durable up to a version.
    undurable: BTreeMap<(Version, u64), RequestId>,
    undurable_next: u64,
    growing: Vec<(u64, RequestId)>,
    orders: control::Orders,
    out: VecDeque<Output>,
    answered: Version,
    closing: bool,
    /// Every write is answered only when it is on stable storage.
    writes_through: bool,
    full: full::Full,
    now_ms: u64,
    counters: VolumeCounters,
    /// Found by the scrub, and told to nobody yet.
    new_damage: VecDeque<Damage>,
}

#[derive(Debug)]
struct Waiting {
    owner: Owner,
    entry: WriteEntry,
    data: Option<Buf>,
    fua: bool,
}

#[derive(Debug)]
struct Inflight {
    owner: Owner,
    entry: WriteEntry,
    seq: Seq,
    fua: bool,
}

/// Whose write it is.
#[derive(Clone, Copy, Debug)]
enum Owner {
    /// All of this request.
    Request(RequestId),
    /// A piece of it.
    Piece(RequestId),
    /// Pieces of some requests that change a part of this block.
    Change(Lba),
}

impl Owner {
    /// The request that is answered with this write.
    fn request(self) -> Option<RequestId> {
        match self {
            Owner::Request(id) => Some(id),
            Owner::Piece(_) | Owner::Change(_) => None,
        }
    }
}

/// The blocks that some sectors are in.
struct Blocks {
    lba: Lba,
    count: u64,
    /// The bytes of them, if that is not all.
    cut: Option<Range<usize>>,
}

impl Blocks {
    /// `None` if that is nothing, or not whole sectors.
    fn of(size: BlockSize, offset: u64, len: u64) -> Option<Blocks> {
        let end = offset.checked_add(len)?;
        if len == 0 || !offset.is_multiple_of(SECTOR_BYTES) || !len.is_multiple_of(SECTOR_BYTES) {
            return None;
        }
        let (lba, inside) = (Lba(offset / size.bytes()), offset % size.bytes());
        let count = end.div_ceil(size.bytes()) - lba.0;
        let whole = inside == 0 && len == count * size.bytes();
        let cut = (!whole).then_some(inside as usize..(inside + len) as usize);
        Some(Blocks { lba, count, cut })
    }
}

impl<B: Backing> std::fmt::Debug for Volume<B> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Volume")
            .field("store", &self.store)
            .field("next_seq", &self.next_seq)
            .finish_non_exhaustive()
    }
}

impl<B: Backing> Volume<B> {
    /// Serves `store`, which was opened for a new epoch.
    pub fn new(store: B) -> Self {
        assert!(!store.is_sealed(), "a sealed store is served with its keys");
        Volume::with(store, None)
    }

    fn with(store: B, sealer: Option<Box<Sealer>>) -> Self {
        let answered = store.durable();
        Volume {
            form: form::Form::new(store.seals(), sealer),
            partials: partial::Partials::default(),
            store,
            next_seq: Seq(1),
            waiting: VecDeque::new(),
            inflight: VecDeque::new(),
            records_inflight: VecDeque::new(),
            undurable: BTreeMap::new(),
            undurable_next: 0,
            growing: Vec::new(),
            orders: control::Orders::default(),
            out: VecDeque::new(),
            answered,
            closing: false,
            writes_through: false,
            full: full::Full::default(),
            now_ms: 0,
            counters: VolumeCounters::default(),
            new_damage: VecDeque::new(),
        }
    }

    /// Has every write answered only when it is on stable storage, as if each asked for it.
    pub fn writes_through(mut self, through: bool) -> Self {
        self.writes_through = through;
        self
    }

    /// Size in bytes.
    pub fn size_bytes(&self) -> u64 {
        self.store.size_bytes()
    }

    /// What a block is. Requests of whole ones are the cheapest.
    pub fn block_size(&self) -> BlockSize {
        self.store.block_size()
    }

    /// What happened since the start.
    pub fn counters(&self) -> VolumeCounters {
        self.counters
    }

    /// Space and work of the store.
    pub fn store_stats(&self) -> StoreStats {
        self.store.stats()
    }

    /// Starts, paces or ends verifying everything that is stored.
    pub fn scrub(&mut self, order: ScrubOrder) {
        self.store.scrub(order);
    }

    /// How far that is.
    pub fn scrub_progress(&self) -> ScrubProgress {
        self.store.scrub_progress()
    }

    /// What is known to be damaged. A write to a damaged block takes it off the list.
    pub fn damage(&self) -> Vec<Damage> {
        self.store.damage()
    }

    /// What the scrub found since this was asked last: to tell somebody, and to be repaired from another copy.
    pub fn take_new_damage(&mut self) -> Vec<Damage> {
        self.new_damage.drain(..).collect()
    }

    /// What it stands on.
    pub fn backing(&mut self) -> &mut B {
        &mut self.store
    }

    /// Why the volume takes no more writes, if so.
    pub fn stopped(&self) -> Option<&str> {
        self.store.stopped()
    }

    fn answer(&mut self, id: RequestId, answer: Answer) {
        self.counters.errors += u64::from(answer.is_err());
        self.out.push_back(Output::Answer(id, answer));
    }

    /// The blocks that these sectors of the volume are in.
    fn blocks(&self, offset: u64, len: u64) -> Result<Blocks, RequestError> {
        let size = self.size_bytes();
        match Blocks::of(self.block_size(), offset, len) {
            Some(blocks) if offset + len <= size => Ok(blocks),
            _ => Err(RequestError::Invalid(format!(
                "{len} bytes at {offset} of a volume of {size}; expected whole sectors of {SECTOR_BYTES} inside of it"
            ))),
        }
    }

    fn read(&mut self, id: RequestId, offset: u64, len: u64, into: Option<BufMut>) -> Result<(), RequestError> {
        self.counters.reads += 1;
        let Blocks { lba, count, cut } = self.blocks(offset, len)?;
        let into = into.filter(|_| cut.is_none());
        if let Some(cut) = cut {
            self.partials.cut_answer(id, cut);
        }
        self.store.read(ReadToken::Request(id.0), lba, count, into);
        Ok(())
    }

    fn take(&mut self, id: RequestId, request: Request) -> Result<(), RequestError> {
        match request {
            Request::Read { offset, len } => self.read(id, offset, len, None)?,
            Request::Write { offset, data, fua } => {
                self.counters.writes += 1;
                let fua = fua || self.writes_through;
                let len = data.len() as u64;
                let Blocks { lba, count, cut } = self.blocks(offset, len)?;
                if len > WRITE_BYTES_MAX {
                    return Err(RequestError::Invalid(format!(
                        "a write of {len} bytes; at most {WRITE_BYTES_MAX}"
                    )));
                }
                self.check_writable()?;
                if cut.is_some() {
                    self.take_sectors(id, offset, len, Some(data), fua);
                    return Ok(());
                }
                let entry = WriteEntry {
                    lba,
                    blocks: count as u32,
                    zero: false,
                };
                self.take_run(Waiting {
                    owner: Owner::Request(id),
                    entry,
                    data: Some(data),
                    fua,
                });
            }
            Request::Zero { offset, len, fua } => {
                self.counters.zeroes += 1;
                let fua = fua || self.writes_through;
                let Blocks { lba, count, cut } = self.blocks(offset, len)?;
                self.check_writable()?;
                let blocks =
                    u32::try_from(count).map_err(|_| RequestError::Invalid(format!("zeroing {len} bytes at once")))?;
                if cut.is_some() {
                    self.take_sectors(id, offset, len, None, fua);
                    return Ok(());
                }
                let entry = WriteEntry {
                    lba,
                    blocks,
                    zero: true,
                };
                self.take_run(Waiting {
                    owner: Owner::Request(id),
                    entry,
                    data: None,
                    fua,
                });
            }
            Request::Flush => {
                self.counters.flushes += 1;
                self.check_writable()?;
                self.when_durable(self.answered, id);
            }
            Request::Grow { len } => {
                self.check_writable()?;
                let block_bytes = self.block_size().bytes();
                if !len.is_multiple_of(block_bytes) || len < self.size_bytes() {
                    let text = format!(
                        "growing a volume of {} bytes to {len}; a volume has whole blocks of {block_bytes} and never \
                         shrinks",
                        self.size_bytes()
                    );
                    return Err(RequestError::Invalid(text));
                }
                self.growing.push((len / block_bytes, id));
                self.store.grow(len / block_bytes);
            }
        }
        Ok(())
    }

    fn check_writable(&self) -> Result<(), RequestError> {
        match self.store.stopped() {
            Some(why) => Err(RequestError::Failed(why.to_owned())),
            None => Ok(()),
        }
    }

    /// Answers `id` once everything up to `version` is durable.
    fn when_durable(&mut self, version: Version, id: RequestId) {
        if self.store.durable() >= version {
            self.answer(id, Ok(Reply::Done));
            return;
        }
        self.undurable.insert((version, self.undurable_next), id);
        self.undurable_next += 1;
        self.store.sync();
    }

    /// Puts waiting writes into records, as many together as fit.
    fn send(&mut self) {
        if self.is_reverting() {
            return;
        }
        let block_pages = usize::from(self.block_size().pages());
        while !self.waiting.is_empty() && self.records_inflight.len() < self.store.records_inflight_max() {
            // As if nothing were compressed: what becomes of it shows when it has its place.
            let (mut writes, mut pages) = (0, 0);
            for write in self.waiting.iter().take(WRITES_MAX) {
                let more = if write.entry.zero {
                    0
                } else {
                    write.entry.blocks as usize * block_pages
                };
                if pages + more > PAGES_MAX {
                    break;
                }
                pages += more;
                writes += 1;
            }
            match self.store.room(pages, pages == 0) {
                Room::Ready => {
                    self.found_room();
                    self.send_record(writes, pages / block_pages);
                }
                Room::Wait => return,
                Room::NoSpace => return self.no_room(),
            }
        }
    }

    /// Sends the first `count` of the waiting writes, which have `blocks` blocks of payload.
    fn send_record(&mut self, count: usize, blocks: usize) {
        let (epoch, first_seq) = (self.store.epoch(), self.next_seq);
        let (mut writes, mut checks) = (Vec::with_capacity(count), Vec::with_capacity(blocks));
        let mut pages = Vec::new();
        for write in self.waiting.iter_mut().take(count) {
            let version = Version {
                epoch,
                seq: self.next_seq,
            };
            if let Some(data) = write.data.take() {
                let lba = write.entry.lba;
                write.data = Some(self.form.store(lba, version, data, &mut checks, &mut pages));
            }
            writes.push(write.entry);
            self.next_seq = self.next_seq.next();
        }
        let mut payload = Vec::with_capacity(count);
        let mut seq = first_seq;
        for write in self.waiting.drain(..count) {
            payload.extend(write.data);
            self.inflight.push_back(Inflight {
                owner: write.owner,
                entry: write.entry,
                seq,
                fua: write.fua,
            });
            seq = seq.next();
        }
        self.counters.records += 1;
        self.records_inflight.push_back(Seq(self.next_seq.0 - 1));
        self.store.append(Batch {
            first_seq,
            writes,
            checks,
            pages,
            payload,
        });
    }

    fn handle(&mut self, event: Event) {
        let epoch = self.store.epoch();
        match event {
            Event::Appended(seq) => {
                while self.records_inflight.front().is_some_and(|last| *last <= seq) {
                    self.records_inflight.pop_front();
                }
                self.answered = self.answered.max(Version { epoch, seq });
                while self.inflight.front().is_some_and(|write| write.seq <= seq) {
                    let write = self.inflight.pop_front().expect("it is there");
                    let version = Version { epoch, seq: write.seq };
                    match write.owner {
                        Owner::Request(id) if write.fua => self.when_durable(version, id),
                        Owner::Request(id) => self.answer(id, Ok(Reply::Done)),
                        Owner::Piece(id) => self.piece_done(id, Ok(version)),
                        Owner::Change(lba) => self.changed(lba, version),
                    }
                }
                self.partials.look_again();
            }
            Event::Durable(version) => {
                let still = self.undurable.split_off(&(version, u64::MAX));
                for id in std::mem::replace(&mut self.undurable, still).into_values() {
                    self.answer(id, Ok(Reply::Done));
                }
                if !self.undurable.is_empty() {
                    self.store.sync();
                }
            }
            Event::ReadStored(token, parts) => {
                let found = self.form.open(parts);
                self.found(token, found);
            }
            Event::Read(token, found) => self.found(token, found),
            Event::Grown(blocks) => {
                let (done, still) = std::mem::take(&mut self.growing)
                    .into_iter()
                    .partition(|(size, _)| *size <= blocks);
                self.growing = still;
                let done: Vec<(u64, RequestId)> = done;
                for (_, id) in done {
                    self.answer(id, Ok(Reply::Done));
                }
            }
            Event::Reverted => self.reverted(),
            Event::Held(token, result) => self.answer(RequestId(token), result.map(|()| Reply::Done)),
            Event::Scanned(token, result) => {
                let id = RequestId(token);
                let size = self.block_size();
                let answer = result.map(|found| self.orders.listed(id, size, found));
                self.answer(id, answer.map(|()| Reply::Done));
            }
            // Answers to whoever keeps replicas alike.
            Event::Promised(_) | Event::Settled | Event::CopiedIn(..) | Event::Rows(..) | Event::Stored(..) => {}
            Event::Damaged(damage) => {
                if self.new_damage.len() < NEW_DAMAGE_MAX {
                    self.new_damage.push_back(damage);
                }
            }
            Event::Stopped(why) => {
                let waiting = std::mem::take(&mut self.waiting).into_iter().map(|write| write.owner);
                let inflight = std::mem::take(&mut self.inflight).into_iter().map(|write| write.owner);
                let writes = waiting.chain(inflight).filter_map(Owner::request);
                let undurable = std::mem::take(&mut self.undurable).into_values();
                let growing = std::mem::take(&mut self.growing).into_iter().map(|(_, id)| id);
                let orders = self.orders.take_all();
                let ids: Vec<RequestId> = writes
                    .chain(self.partials.take_all())
                    .chain(undurable)
                    .chain(growing)
                    .chain(orders)
                    .collect();
                for id in ids {
                    self.answer(id, Err(RequestError::Failed(why.clone())));
                }
            }
        }
    }

    /// A read is done.
    fn found(&mut self, token: ReadToken, found: Result<Vec<Piece>, RequestError>) {
        match token {
            ReadToken::Own(lba) => self.read_to_change(Lba(lba), found),
            ReadToken::Request(id) => {
                let id = RequestId(id);
                let answer = match found {
                    Ok(pieces) => Ok(Reply::Data(self.partials.cut(id, pieces))),
                    Err(error) => {
                        self.partials.forget_cut(id);
                        Err(error)
                    }
                };
                self.answer(id, answer);
            }
        }
    }

    /// A write will never be in the log.
    fn refuse(&mut self, owner: Owner, error: RequestError) {
        match owner {
            Owner::Request(id) => self.answer(id, Err(error)),
            Owner::Piece(id) => self.piece_done(id, Err(error)),
            Owner::Change(lba) => self.change_failed(lba, &error),
        }
        self.partials.look_again();
    }

    fn idle(&self) -> bool {
        let none_waits = self.waiting.is_empty() && self.partials.is_idle();
        none_waits && self.inflight.is_empty() && self.undurable.is_empty() && self.orders.is_idle()
    }
}

impl<B: Backing> BlockEngine for Volume<B> {
    fn submit(&mut self, id: RequestId, request: Request) {
        if self.closing {
            return self.answer(id, Err(RequestError::Fenced));
        }
        if let Some(request) = self.hold(id, request)
            && let Err(error) = self.take(id, request)
        {
            self.answer(id, Err(error));
        }
    }

    fn read_into(&mut self, id: RequestId, offset: u64, into: BufMut) {
        let taken = if self.closing {
            Err(RequestError::Fenced)
        } else {
            self.read(id, offset, into.len() as u64, Some(into))
        };
        if let Err(error) = taken {
            self.answer(id, Err(error));
        }
    }

    fn completed(&mut self, id: IoId, result: IoResult) {
        self.store.completed(id, result);
    }

    fn tick(&mut self, now_ms: u64) {
        self.now_ms = now_ms;
        self.store.tick(now_ms);
    }

    fn next_tick_ms(&self) -> Option<u64> {
        self.store.next_tick_ms()
    }

    fn poll(&mut self) -> Option<Output> {
        loop {
            while let Some(event) = self.store.poll_event() {
                self.handle(event);
            }
            if let Some(output) = self.out.pop_front() {
                return Some(output);
            }
            if self.store.stopped().is_none() {
                self.run_partials();
                self.send();
                self.run_orders();
                self.send();
            }
            if self.closing && self.idle() && !self.store.is_closing() {
                self.store.close();
            }
            if let Some((id, io)) = self.store.poll_io() {
                return Some(Output::Io(id, io));
            }
            if !self.store.has_events() && self.out.is_empty() {
                return None;
            }
        }
    }

    fn close(&mut self) {
        self.closing = true;
    }

    fn is_closed(&self) -> bool {
        self.closing && self.idle() && self.store.is_closed()
    }
}
