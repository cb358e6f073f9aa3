//! The primary of several replicas as what a volume stands on.
//!
//! ```text
//! volume ─► Led ─► Primary ─► messages to replicas, changes of the configuration: the driver takes them with poll_output
//!              ◄──────────── received, decided, config_read
//! ```
//!
//! It has no disk of its own: the replica on the same node is one like the others. What it adds to the primary is what a
//! volume expects of a store: memory that was lent is copied before it is kept for whoever comes back, and what was read
//! is checked once more, because it came over a network.

use std::collections::VecDeque;

use slab::Slab;
use smallvec::SmallVec;

use super::Backing;
use crate::buffer::{Buf, BufMut};
use crate::io::{Io, IoId, IoResult};
use crate::replication::primary::{Decision, PrimaryEvent, PrimaryOptions, PrimaryOutput};
use crate::replication::{Config, FromReplica, Primary, ReplicaId, Stamp, Zones};
use crate::request::{Piece, RequestError, Scan};
use crate::seal::KeyRow;
use crate::store::{
    Batch, ControlOp, Damage, Event, ReadBlock, ReadPart, ReadToken, Room, ScrubOrder, ScrubProgress, Seals,
    SnapshotInfo, StoreStats, Stored,
};
use crate::types::{BlockSize, Epoch, Identity, Lba, Seq, SnapshotId, Version};

/// Records that may be on their way at a time. Each costs messages to every replica, so fewer and larger ones than on a
/// disk of one's own.
const RECORDS_INFLIGHT_MAX: usize = 2;

/// What a led volume is.
#[derive(Clone, Copy, Debug)]
pub struct LedOptions {
    /// The uid of the cluster, and of the volume.
    pub cluster: [u8; 16],
    pub volume: [u8; 16],
    pub block_size: BlockSize,
    pub size_blocks: u64,
}

/// See the module.
#[derive(Debug)]
pub struct Led {
    primary: Primary,
    options: LedOptions,
    seals: Seals,
    reads: Slab<Asked>,
    events: VecDeque<Event>,
    closing: bool,
    /// It was closed before it served: whatever it began is left as it is, like by a crash.
    given_up: bool,
    stopped: Option<String>,
    /// What a replica alone had and could not read when the epoch began, until somebody asks.
    given_up_writes: Option<(ReplicaId, Version)>,
    compared: Compared,
}

/// What came of comparing the copies with each other.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Compared {
    /// Passes that came to their end.
    pub passes: u64,
    /// Ranges of blocks in which a copy had something older than another one.
    pub differing: u64,
}

/// A read that a replica was asked for.
#[derive(Clone, Copy, Debug)]
struct Asked {
    token: ReadToken,
    lba: Lba,
    blocks: u64,
}

impl Led {
    /// Leads in the epoch that `config`, which was read with `stamp`, grants to the incarnation of `primary`.
    pub fn new(options: LedOptions, primary: PrimaryOptions, stamp: Stamp, config: Config, now_ms: u64) -> Led {
        let seals = Seals::shared(options.volume, options.block_size);
        Led {
            primary: Primary::new(primary, stamp, config, now_ms),
            options,
            seals,
            reads: Slab::new(),
            events: VecDeque::new(),
            closing: false,
            given_up: false,
            stopped: None,
            given_up_writes: None,
            compared: Compared::default(),
        }
    }

    /// The primary, to be asked how it is.
    pub fn primary(&self) -> &Primary {
        &self.primary
    }

    /// The next thing to do.
    pub fn poll_output(&mut self) -> Option<PrimaryOutput> {
        self.primary.poll().filter(|_| !self.given_up)
    }

    /// Tells where replicas stand.
    pub fn stand(&mut self, zones: Zones) {
        self.primary.stand(zones);
    }

    /// Orders a comparison of the copies.
    pub fn compare(&mut self) {
        self.primary.compare();
    }

    /// What came of comparing the copies since this volume was led.
    pub fn compared(&self) -> Compared {
        self.compared
    }

    /// The write that this replica alone had and could not read when the epoch began: it and what came later, none of it
    /// flushed, are no part of the volume. Told once.
    pub fn take_given_up(&mut self) -> Option<(ReplicaId, Version)> {
        self.given_up_writes.take()
    }

    /// Takes a replica's answer.
    pub fn received(&mut self, message: FromReplica) {
        self.primary.received(message);
    }

    /// Reports what became of a proposal.
    pub fn decided(&mut self, decision: Decision) {
        self.primary.decided(decision);
    }

    /// Reports what the volume's object says; none: it could not be read.
    pub fn config_read(&mut self, found: Option<(Stamp, Config)>) {
        self.primary.config_read(found);
    }

    /// There is a connection to a replica: what was asked of it and not answered may be asked again.
    pub fn connected(&mut self, replica: ReplicaId) {
        self.primary.connected(replica);
    }

    /// The connection to a replica has ended.
    pub fn connection_lost(&mut self, replica: ReplicaId) {
        self.primary.connection_lost(replica);
    }

    /// Somebody else may have changed the configuration.
    pub fn look(&mut self) {
        self.primary.look();
    }

    /// This replica is to leave when another one is in sync in its place; `None`: all may stay.
    pub fn leave(&mut self, replica: Option<ReplicaId>) {
        self.primary.leave(replica);
    }

    /// Has what the primary says in the order of the volume's events.
    fn listen(&mut self) {
        while let Some(event) = self.primary.poll_event() {
            self.told(event);
        }
    }

    fn told(&mut self, event: PrimaryEvent) {
        match event {
            PrimaryEvent::Serving(_) => {}
            PrimaryEvent::Written(seq) => self.events.push_back(Event::Appended(seq)),
            PrimaryEvent::Durable(version) => self.events.push_back(Event::Durable(version)),
            PrimaryEvent::Read(read, found) => {
                let asked = self.reads.remove(read as usize);
                let event = self.found(asked, found);
                self.events.push_back(event);
            }
            PrimaryEvent::Compared(outcome) => {
                self.compared.passes += u64::from(outcome.is_some());
                self.compared.differing += outcome.unwrap_or(0);
            }
            PrimaryEvent::GivenUp(replica, version) => self.given_up_writes = Some((replica, version)),
            PrimaryEvent::Released => {}
            PrimaryEvent::Deposed(why) => {
                for asked in std::mem::take(&mut self.reads).drain() {
                    let fenced = Err(RequestError::Fenced);
                    self.events.push_back(Event::Read(asked.token, fenced));
                }
                self.stopped = Some(why.clone());
                self.events.push_back(Event::Stopped(why));
            }
        }
    }

    /// What a replica found, if it is what was asked for.
    fn found(&self, asked: Asked, found: Result<Vec<Stored>, String>) -> Event {
        let Asked { token, lba, blocks } = asked;
        let found = found.map_err(RequestError::Corrupt);
        match found.and_then(|found| self.check(lba, blocks, &found).map(|()| found)) {
            Err(error) => Event::Read(token, Err(error)),
            Ok(found) if self.seals.tagged() || found.iter().any(|part| self.is_shorter(part)) => {
                Event::ReadStored(token, found.into_iter().map(|part| self.part(part)).collect())
            }
            Ok(found) => {
                let block_bytes = self.options.block_size.bytes() as usize;
                let pieces = found.into_iter().map(|part| match part {
                    Stored::Block(block) => Piece::Bytes(block.bytes),
                    Stored::Zeros { start, end, .. } => Piece::Zeros((end.0 - start.0) as usize * block_bytes),
                });
                Event::Read(token, Ok(pieces.collect()))
            }
        }
    }

    /// Whether it is these blocks, all of them, in order, and each is what was written.
    fn check(&self, lba: Lba, blocks: u64, found: &[Stored]) -> Result<(), RequestError> {
        let mut at = lba;
        for part in found {
            if part.start() != at || part.end() <= at {
                return Err(RequestError::Corrupt(format!(
                    "a replica was asked for {blocks} blocks from {} on, and answered with {} to {} where {} was next",
                    lba.0,
                    part.start().0,
                    part.end().0,
                    at.0
                )));
            }
            if let Stored::Block(block) = part
                && self.seals.block(block.lba, block.version, block.bytes.as_ref()) != block.check.crc
            {
                return Err(RequestError::Corrupt(format!(
                    "block {} version {} was damaged on its way here",
                    block.lba.0, block.version
                )));
            }
            at = part.end();
        }
        if at.0 != lba.0 + blocks {
            return Err(RequestError::Corrupt(format!(
                "a replica was asked for {blocks} blocks from {} on, and answered with {}",
                lba.0,
                at.0 - lba.0
            )));
        }
        Ok(())
    }

    fn is_shorter(&self, part: &Stored) -> bool {
        match part {
            Stored::Block(block) => (block.bytes.len() as u64) < self.options.block_size.bytes(),
            Stored::Zeros { .. } => false,
        }
    }

    /// As a store gives what has still to be opened.
    fn part(&self, part: Stored) -> ReadPart {
        match part {
            Stored::Zeros { start, end, .. } => ReadPart::Zeros(end.0 - start.0),
            Stored::Block(block) => ReadPart::Stored {
                lba: block.lba,
                blocks: SmallVec::from_buf([ReadBlock {
                    version: block.version,
                    check: block.check,
                    len: block.bytes.len(),
                }]),
                bytes: BufMut::copy_of(block.bytes.as_ref()),
            },
        }
    }
}

/// The same bytes in memory of our own: what was lent goes back when the write is answered, and the record is kept until it
/// is durable everywhere.
fn own(payload: Vec<Buf>) -> Vec<Buf> {
    if !payload.iter().any(Buf::is_lent) {
        return payload;
    }
    let mut copy = BufMut::for_reading(payload.iter().map(Buf::len).sum());
    let mut rest = copy.as_mut();
    for part in &payload {
        let (front, behind) = rest.split_at_mut(part.len());
        front.copy_from_slice(part.as_ref());
        rest = behind;
    }
    vec![copy.freeze()]
}

fn not_for_several() -> RequestError {
    RequestError::Invalid("volumes of several replicas have no snapshots yet".into())
}

impl Backing for Led {
    fn epoch(&self) -> Epoch {
        self.primary.epoch()
    }

    fn identity(&self) -> Identity {
        Identity {
            cluster: self.options.cluster,
            volume: self.options.volume,
            // None of them.
            replica: [0; 16],
        }
    }

    fn seals(&self) -> Seals {
        self.seals
    }

    fn is_sealed(&self) -> bool {
        self.seals.tagged()
    }

    fn key_rows(&self) -> &[KeyRow] {
        &[]
    }

    fn block_size(&self) -> BlockSize {
        self.options.block_size
    }

    fn size_blocks(&self) -> u64 {
        self.options.size_blocks
    }

    fn stopped(&self) -> Option<&str> {
        self.stopped.as_deref()
    }

    fn records_inflight_max(&self) -> usize {
        RECORDS_INFLIGHT_MAX
    }

    fn room(&mut self, _payload_pages: usize, _zero_only: bool) -> Room {
        // A replica without room keeps the record until it has some: the guest waits, or the others go on without it.
        if self.primary.has_room() {
            Room::Ready
        } else {
            Room::Wait
        }
    }

    fn append(&mut self, batch: Batch) {
        self.primary.append(Batch {
            payload: own(batch.payload),
            ..batch
        });
        self.listen();
    }

    fn append_control(&mut self, _seq: Seq, op: ControlOp) {
        unreachable!("{op:?} is not allowed");
    }

    fn sync(&mut self) {
        self.primary.sync();
        self.listen();
    }

    fn durable(&self) -> Version {
        self.primary.durable()
    }

    /// Memory that was lent for the answer is let go: the bytes come from a replica in memory of their own.
    fn read(&mut self, token: ReadToken, lba: Lba, blocks: u64, _into: Option<BufMut>) {
        if self.stopped.is_some() {
            // Nobody is asked any more, and so nobody would answer.
            let fenced = Err(RequestError::Fenced);
            return self.events.push_back(Event::Read(token, fenced));
        }
        let read = self.reads.insert(Asked { token, lba, blocks });
        self.primary.read(read as u64, lba, blocks);
        self.listen();
    }

    fn read_snapshot(&mut self, _: ReadToken, _: SnapshotId, _: Lba, _: u64) -> Result<(), RequestError> {
        Err(not_for_several())
    }

    /// Every replica has this size already: whoever asks sees to that.
    fn grow(&mut self, size_blocks: u64) {
        self.options.size_blocks = self.options.size_blocks.max(size_blocks);
        self.events.push_back(Event::Grown(self.options.size_blocks));
    }

    fn snapshots(&self) -> Vec<SnapshotInfo> {
        Vec::new()
    }

    fn allows(&self, _: &ControlOp, _: bool) -> Result<bool, RequestError> {
        Err(not_for_several())
    }

    fn want_checkpoint(&mut self) {}

    fn is_reverting(&self) -> bool {
        false
    }

    fn hold(&mut self, _: u64, _: SnapshotId) -> Result<(), RequestError> {
        Err(not_for_several())
    }

    fn let_go(&mut self) -> Result<(), RequestError> {
        Err(not_for_several())
    }

    fn scan(&mut self, _: u64, _: Scan, _: Lba, _: usize) -> Result<(), RequestError> {
        Err(not_for_several())
    }

    /// Each replica verifies what it has by itself.
    fn scrub(&mut self, _: ScrubOrder) {}

    fn scrub_progress(&self) -> ScrubProgress {
        ScrubProgress::default()
    }

    fn damage(&self) -> Vec<Damage> {
        Vec::new()
    }

    fn stats(&self) -> StoreStats {
        StoreStats::default()
    }

    fn poll_io(&mut self) -> Option<(IoId, Io)> {
        None
    }

    fn completed(&mut self, id: IoId, _: IoResult) {
        unreachable!("{id:?}: there is no disk here");
    }

    fn poll_event(&mut self) -> Option<Event> {
        self.listen();
        self.events.pop_front()
    }

    fn has_events(&self) -> bool {
        !self.events.is_empty()
    }

    fn tick(&mut self, now_ms: u64) {
        self.primary.tick(now_ms);
    }

    fn next_tick_ms(&self) -> Option<u64> {
        self.primary.next_tick_ms().filter(|_| !self.given_up)
    }

    fn close(&mut self) {
        self.closing = true;
        if self.primary.is_serving() {
            self.primary.release();
        } else {
            self.given_up = !self.primary.is_over();
        }
    }

    fn is_closing(&self) -> bool {
        self.closing
    }

    fn is_closed(&self) -> bool {
        self.closing && (self.given_up || self.primary.is_over())
    }
}
