//! The volume: where guest requests come in, are put in order and answered.
//!
//! It coordinates; the store keeps. Every write gets the next sequence number of the epoch, writes that arrived
//! together share a record, and a write is answered when the store has appended it. A flush is answered when
//! everything that was answered before it is durable: flushes that wait together share one sync. When there are
//! several replicas, this is the place that sends each record to all of them.

mod control;
mod full;
mod sealed;

use std::collections::{BTreeMap, VecDeque};

pub use full::WhenFull;

use crate::BlockEngine;
use crate::buffer::{Buf, BufMut};
use crate::io::{IoId, IoResult, Output};
use crate::request::{Answer, Reply, Request, RequestError, RequestId};
use crate::seal::Sealer;
use crate::store::{
    BLOCKS_MAX, Body, Damage, Event, Header, Record, Room, ScrubOrder, ScrubProgress, Store, StoreStats, WRITES_MAX,
    WriteEntry,
};
use crate::types::{BLOCK_BYTES, Lba, Seq, Version};

/// Records that may be on their way to the disk at a time. More hides latency, fewer make larger records: writes that
/// arrive meanwhile gather in the next one. With 32 writes waiting, 1 record of 132 KiB to 8 of 20 KiB at a time gave the
/// same rate on a disk in a data centre, three times that of single blocks.
const RECORDS_INFLIGHT_MAX: usize = 4;
/// Largest write that is taken, in bytes; a front end splits larger ones.
pub const WRITE_BYTES_MAX: u64 = BLOCKS_MAX as u64 * BLOCK_BYTES;

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
}

/// One volume's engine, driven as [`BlockEngine`] says.
pub struct Volume {
    store: Store,
    sealer: Option<Box<Sealer>>,
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
    full: full::Full,
    now_ms: u64,
    counters: VolumeCounters,
    /// Found by the scrub, and told to nobody yet.
    new_damage: VecDeque<Damage>,
}

#[derive(Debug)]
struct Waiting {
    id: RequestId,
    entry: WriteEntry,
    data: Option<Buf>,
    fua: bool,
}

#[derive(Debug)]
struct Inflight {
    id: RequestId,
    seq: Seq,
    fua: bool,
}

impl std::fmt::Debug for Volume {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Volume")
            .field("store", &self.store)
            .field("next_seq", &self.next_seq)
            .finish_non_exhaustive()
    }
}

impl Volume {
    /// Serves `store`, which was opened for a new epoch.
    pub fn new(store: Store) -> Volume {
        assert!(!store.is_sealed(), "a sealed store is served with its keys");
        Volume::with(store, None)
    }

    fn with(store: Store, sealer: Option<Box<Sealer>>) -> Volume {
        let answered = store.durable();
        Volume {
            store,
            sealer,
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
            full: full::Full::default(),
            now_ms: 0,
            counters: VolumeCounters::default(),
            new_damage: VecDeque::new(),
        }
    }

    /// Size in bytes.
    pub fn size_bytes(&self) -> u64 {
        self.store.size_blocks() * BLOCK_BYTES
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

    /// Why the volume takes no more writes, if so.
    pub fn stopped(&self) -> Option<&str> {
        self.store.stopped()
    }

    fn answer(&mut self, id: RequestId, answer: Answer) {
        self.counters.errors += u64::from(answer.is_err());
        self.out.push_back(Output::Answer(id, answer));
    }

    fn blocks(&self, offset: u64, len: u64) -> Result<(Lba, u64), RequestError> {
        let size = self.size_bytes();
        let aligned = offset.is_multiple_of(BLOCK_BYTES) && len.is_multiple_of(BLOCK_BYTES);
        match offset.checked_add(len) {
            Some(end) if aligned && len > 0 && end <= size => Ok((Lba(offset / BLOCK_BYTES), len / BLOCK_BYTES)),
            _ => Err(RequestError::Invalid(format!(
                "{len} bytes at {offset} of a volume of {size}"
            ))),
        }
    }

    fn take(&mut self, id: RequestId, request: Request) -> Result<(), RequestError> {
        match request {
            Request::Read { offset, len } => {
                self.counters.reads += 1;
                let (lba, blocks) = self.blocks(offset, len)?;
                self.store.read(id.0, lba, blocks, None);
            }
            Request::Write { offset, data, fua } => {
                self.counters.writes += 1;
                let len = data.len() as u64;
                let (lba, blocks) = self.blocks(offset, len)?;
                if len > WRITE_BYTES_MAX {
                    return Err(RequestError::Invalid(format!(
                        "a write of {len} bytes; at most {WRITE_BYTES_MAX}"
                    )));
                }
                self.check_writable()?;
                let entry = WriteEntry {
                    lba,
                    blocks: blocks as u32,
                    zero: false,
                };
                self.waiting.push_back(Waiting {
                    id,
                    entry,
                    data: Some(data),
                    fua,
                });
            }
            Request::Zero { offset, len, fua } => {
                self.counters.zeroes += 1;
                let (lba, blocks) = self.blocks(offset, len)?;
                self.check_writable()?;
                let blocks =
                    u32::try_from(blocks).map_err(|_| RequestError::Invalid(format!("zeroing {len} bytes at once")))?;
                let entry = WriteEntry {
                    lba,
                    blocks,
                    zero: true,
                };
                self.waiting.push_back(Waiting {
                    id,
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
                if !len.is_multiple_of(BLOCK_BYTES) || len < self.size_bytes() {
                    let text = format!(
                        "growing a volume of {} bytes to {len}; a volume never shrinks",
                        self.size_bytes()
                    );
                    return Err(RequestError::Invalid(text));
                }
                self.growing.push((len / BLOCK_BYTES, id));
                self.store.grow(len / BLOCK_BYTES);
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
        while !self.waiting.is_empty() && self.records_inflight.len() < RECORDS_INFLIGHT_MAX {
            let (mut writes, mut blocks) = (0, 0);
            for write in self.waiting.iter().take(WRITES_MAX) {
                let more = if write.entry.zero {
                    0
                } else {
                    write.entry.blocks as usize
                };
                if blocks + more > BLOCKS_MAX {
                    break;
                }
                blocks += more;
                writes += 1;
            }
            match self.store.room(blocks, blocks == 0) {
                Room::Ready => {
                    self.found_room();
                    self.send_record(writes, blocks);
                }
                Room::Wait => return,
                Room::NoSpace => return self.no_room(),
            }
        }
    }

    /// Sends the first `count` of the waiting writes, which have `blocks` blocks of payload.
    fn send_record(&mut self, count: usize, blocks: usize) {
        let (seals, epoch, first_seq) = (self.store.seals(), self.store.epoch(), self.next_seq);
        let (mut writes, mut checks) = (Vec::with_capacity(count), Vec::with_capacity(blocks));
        for write in self.waiting.iter_mut().take(count) {
            let version = Version {
                epoch,
                seq: self.next_seq,
            };
            if let Some(data) = &mut write.data {
                let (sealer, lba) = (self.sealer.as_deref_mut(), write.entry.lba);
                sealed::store_form(sealer, &seals, lba, version, data, &mut checks);
            }
            writes.push(write.entry);
            self.next_seq = self.next_seq.next();
        }
        let body = Body::Data {
            first_seq,
            writes,
            checks,
        };
        let header = Header {
            epoch,
            flushed: self.store.flushed(),
            chain: self.store.chain(),
            body,
        };
        let (header_bytes, check) = seals.encode(&header);
        let mut parts = Vec::with_capacity(count + 1);
        parts.push(header_bytes);
        let mut seq = first_seq;
        for write in self.waiting.drain(..count) {
            parts.extend(write.data);
            self.inflight.push_back(Inflight {
                id: write.id,
                seq,
                fua: write.fua,
            });
            seq = seq.next();
        }
        self.counters.records += 1;
        self.records_inflight.push_back(Seq(self.next_seq.0 - 1));
        self.store.append(Record { header, check, parts });
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
                    if write.fua {
                        self.when_durable(Version { epoch, seq: write.seq }, write.id);
                    } else {
                        self.answer(write.id, Ok(Reply::Done));
                    }
                }
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
            Event::ReadSealed(token, parts) => {
                let answer = self.open_parts(parts);
                self.answer(RequestId(token), answer);
            }
            Event::Read(token, result) => self.answer(RequestId(token), result.map(Reply::Data)),
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
                let answer = result.map(|found| self.orders.listed(id, found));
                self.answer(id, answer.map(|()| Reply::Done));
            }
            Event::Damaged(damage) => {
                if self.new_damage.len() < NEW_DAMAGE_MAX {
                    self.new_damage.push_back(damage);
                }
            }
            Event::Stopped(why) => {
                let waiting = std::mem::take(&mut self.waiting).into_iter().map(|write| write.id);
                let inflight = std::mem::take(&mut self.inflight).into_iter().map(|write| write.id);
                let undurable = std::mem::take(&mut self.undurable).into_values();
                let growing = std::mem::take(&mut self.growing).into_iter().map(|(_, id)| id);
                let orders = self.orders.take_all();
                let ids: Vec<RequestId> = waiting
                    .chain(inflight)
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

    fn idle(&self) -> bool {
        self.waiting.is_empty() && self.inflight.is_empty() && self.undurable.is_empty() && self.orders.is_idle()
    }
}

impl BlockEngine for Volume {
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
            self.counters.reads += 1;
            self.blocks(offset, into.len() as u64)
        };
        match taken {
            Ok((lba, blocks)) => self.store.read(id.0, lba, blocks, Some(into)),
            Err(error) => self.answer(id, Err(error)),
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
