//! A volume as its shard serves it: the engine between the session's requests and the disk's operations.
//!
//! ```text
//! session ─receive─► engine ─poll─► Io ─► disk queue ─completed─► engine ─poll─► Answer ─► session
//! ```
//!
//! A volume of several replicas has no disk of its own: what its engine asks of replicas, and of the configuration, the
//! shard takes from it after each pump.
//!
//! ```text
//! Serving ── close ──► Closing ── the engine is closed ──► Closed ── remove ──► (dropped, once the kernel let go)
//! ```

use std::sync::Arc;
use std::sync::mpsc::Sender;

use galleonfs_storage_engine::io::{IoId, IoResult, Output};
use galleonfs_storage_engine::request::{Answer, Request, RequestError, RequestId};
use galleonfs_storage_engine::volume::Led;
use slab::Slab;

use super::disk_queue::DiskQueue;
use super::helper::{Outcome, Threads};
use super::leading::{LOOK_EVERY_MS, Leading};
use super::limits::{INFLIGHT_BYTES_PER_VOLUME_MAX, REQUESTS_PER_TURN_MAX};
use super::reactor::{Reactor, Source};
use super::stats::{Counters, StoreReport};
use super::{ErrorKind, Finding, VolumeEngine};
use crate::engine::EngineError;
use crate::frontend::{Buffers, Received, RequestKind, Session, Ticket};

/// How far a volume's end has come.
#[derive(Debug)]
enum State {
    Serving,
    /// The engine is writing what is dirty; these want to know when it is done.
    Closing(Vec<Sender<Closed>>),
    Closed(Closed),
}

/// How an engine ended.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Closed {
    /// Everything is on stable storage.
    Clean,
    /// It had stopped itself before, for this reason; what was not flushed may be lost.
    Stopped(String),
}

/// Who asked for what is with the engine.
#[derive(Debug)]
enum Asked {
    /// The guest.
    Guest(Ticket),
    /// The node: to make the volume so large, and tell.
    Growth {
        size_bytes: u64,
        done: Sender<Result<u64, EngineError>>,
    },
}

pub(super) struct Served {
    key: u32,
    engine: Box<dyn VolumeEngine>,
    session: Box<dyn Session>,
    /// None of a volume of several replicas: each has its own.
    disk: Option<DiskQueue>,
    /// Only of such a volume.
    pub leading: Option<Leading>,
    counters: Arc<Counters>,
    /// Requests that are with the engine; the slot is the request's id.
    asked: Slab<Asked>,
    /// Payload and answer bytes of those requests.
    inflight_bytes: u64,
    /// The kernel watches the session's descriptor for us.
    watched: bool,
    /// The device is gone.
    ended: bool,
    /// The last turn had one request. Then the next one takes one, too, and does not look for another in vain: the
    /// watch that follows looks by itself.
    lone: bool,
    state: State,
    next_tick_ms: Option<u64>,
    told_ms: u64,
    /// In the shard's list of volumes that something happened to.
    pub touched: bool,
    /// Somebody waits for this volume to be let go.
    pub leaving: Option<Sender<Threads>>,
}

const HAS_A_DISK: &str = "only an engine on a replica of its own has disk operations";

impl std::fmt::Debug for Served {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Served")
            .field("key", &self.key)
            .field("state", &self.state)
            .finish_non_exhaustive()
    }
}

impl Served {
    pub fn new(
        key: u32,
        engine: Box<dyn VolumeEngine>,
        session: Box<dyn Session>,
        disk: Option<DiskQueue>,
        leading: Option<Leading>,
        counters: Arc<Counters>,
    ) -> Served {
        Served {
            key,
            engine,
            session,
            disk,
            leading,
            counters,
            asked: Slab::new(),
            inflight_bytes: 0,
            watched: false,
            ended: false,
            lone: false,
            state: State::Serving,
            next_tick_ms: None,
            told_ms: 0,
            touched: false,
            leaving: None,
        }
    }

    /// What its store says of itself, if it has one of its own.
    pub fn report(&self) -> Option<StoreReport> {
        self.leading.is_none().then(|| self.engine.store())
    }

    /// When the engine wants to be told the time.
    pub fn next_tick_ms(&self) -> Option<u64> {
        self.next_tick_ms
    }

    /// Tells the engine the time, once per millisecond at most, unless it asked for this moment.
    pub fn tick(&mut self, now_ms: u64) {
        if now_ms != self.told_ms || self.next_tick_ms.is_some_and(|due| due <= now_ms) {
            self.told_ms = now_ms;
            self.engine.tick(now_ms);
        }
    }

    /// Tells an engine that judges by it the time of this very moment.
    pub fn tick_now(&mut self, now_ms: u64) {
        self.told_ms = now_ms;
        self.engine.tick(now_ms);
    }

    /// The session's descriptor is readable.
    pub fn readable(&mut self) {
        self.watched = false;
        self.session.readable();
    }

    /// A command of the session has ended.
    pub fn commanded(&mut self, slot: u32, result: i32) {
        self.session.commanded(slot, result);
    }

    /// Takes a turn's worth of requests.
    fn take_requests(&mut self, buffers: &mut Buffers) {
        let lone = std::mem::replace(&mut self.lone, false);
        for taken in 0..REQUESTS_PER_TURN_MAX {
            self.lone = taken == 1;
            if self.ended || self.is_full() || lone && taken == 1 && !self.session.has_arrived() {
                return;
            }
            match self.session.receive(buffers) {
                Received::Request(ticket, request) => {
                    let id = self.started(ticket);
                    self.engine.submit(id, request);
                }
                Received::Read(ticket, offset, into) => {
                    let id = self.started(ticket);
                    self.engine.read_into(id, offset, into);
                }
                Received::Served => {}
                Received::Empty => return,
                Received::Ended(why) => {
                    self.ended = true;
                    if matches!(self.state, State::Serving) {
                        tracing::error!(why, "the device of a volume in use is gone");
                        self.counters.tell(format!("the device is gone: {why}"));
                    }
                    return;
                }
            }
        }
    }

    /// Counts a request that goes to the engine, and names it.
    fn started(&mut self, ticket: Ticket) -> RequestId {
        self.counters.started(ticket.kind, ticket.bytes);
        self.inflight_bytes += occupied_bytes(&ticket);
        RequestId(self.asked.insert(Asked::Guest(ticket)) as u64)
    }

    /// A disk operation ended.
    pub fn completed(&mut self, id: IoId, result: IoResult) {
        self.disk.as_mut().expect(HAS_A_DISK).ended();
        self.engine.completed(id, result);
    }

    /// The helper has done something.
    pub fn helped(&mut self, outcome: Outcome, reactor: &mut Reactor) {
        for (id, result) in self.disk.as_mut().expect(HAS_A_DISK).helped(outcome, reactor) {
            self.engine.completed(id, result);
        }
    }

    /// Its engine, if it leads several replicas.
    pub fn led(&mut self) -> Option<&mut Led> {
        self.engine.led()
    }

    /// Lets the engine work until it has nothing more to say, and looks after what follows from that.
    ///
    /// True if it is to be called again soon: requests are waiting, and others on the shard have their turn first.
    pub fn pump(&mut self, reactor: &mut Reactor, buffers: &mut Buffers) -> bool {
        if self.leaving.is_none() && (!self.watched || self.session.has_arrived()) {
            self.take_requests(buffers);
        }
        loop {
            match self.engine.poll() {
                Some(Output::Io(id, io)) => self.disk.as_mut().expect(HAS_A_DISK).start(id, io, reactor),
                Some(Output::Answer(id, answer)) => {
                    self.answer(id, answer, buffers);
                    self.give_commands(reactor);
                }
                None => break,
            }
        }
        if let Some(disk) = &mut self.disk {
            disk.refill(reactor);
        }
        self.next_tick_ms = self.engine.next_tick_ms();
        self.tell_of_replicas();
        self.settle_close();
        self.give_commands(reactor);
        if !self.watched && !self.ended && self.leaving.is_none() && !self.is_full() {
            self.watched = true;
            reactor.watch(Source::Volume(self.key), self.session.descriptor());
        }
        self.counters.take_path(self.session.path());
        self.counters.wait_for_space(self.engine.waits_for_space());
        match self.engine.finding() {
            Some(Finding::Damaged(text)) => {
                tracing::error!(%text, "damage was found");
                self.counters.damaged(Some(text));
            }
            Some(Finding::Mended) => self.counters.damaged(None),
            None => {}
        }
        self.session.has_arrived() && !self.ended && !self.is_full() && self.leaving.is_none()
    }

    /// Tells whoever wants to know whether the replicas of a volume that is led let it serve.
    fn tell_of_replicas(&mut self) {
        let Some(leading) = &mut self.leading else { return };
        if let Some(ready) = leading.ready.take() {
            match self.engine.stopped() {
                // Whoever asked has given up if sending fails.
                Some(why) => drop(ready.send(Err(why))),
                None if self.engine.led().is_some_and(|led| led.primary().is_serving()) => drop(ready.send(Ok(()))),
                None => leading.ready = Some(ready),
            }
        }
        if self.told_ms >= leading.look_ms {
            leading.look_ms = self.told_ms + LOOK_EVERY_MS;
            if let Some(led) = self.engine.led() {
                leading.compares.tick(self.told_ms, led);
                self.counters.wait_for(led.primary().waits_for());
                self.counters.lags(led.primary().lag());
                self.counters.compared(led.compared());
            }
        }
    }

    fn give_commands(&mut self, reactor: &mut Reactor) {
        while let Some(command) = self.session.command() {
            reactor.command(self.key, &command);
        }
    }

    /// Starts an orderly end and tells `done` when it has come.
    pub fn close(&mut self, now_ms: u64, done: Sender<Closed>) {
        match &mut self.state {
            State::Serving => {
                self.session.refuse();
                self.engine.close();
                // Also within the same millisecond: the last checkpoint is background work, which a tick lets go on.
                self.engine.tick(now_ms);
                self.state = State::Closing(vec![done]);
            }
            State::Closing(waiting) => waiting.push(done),
            // Whoever asked has given up if this fails.
            State::Closed(how) => drop(done.send(how.clone())),
        }
    }

    /// Makes the volume at least so large, and tells `done` its size when it has it.
    pub fn grow(&mut self, size_bytes: u64, done: Sender<Result<u64, EngineError>>) {
        let present_bytes = self.engine.size_bytes();
        if size_bytes <= present_bytes {
            // Whoever asked has given up if this fails.
            let _ = done.send(Ok(present_bytes));
            return;
        }
        let id = RequestId(self.asked.insert(Asked::Growth { size_bytes, done }) as u64);
        self.engine.submit(id, Request::Grow { len: size_bytes });
    }

    /// Starts letting go of a volume that is closed.
    pub fn leave(&mut self, done: Sender<Threads>, reactor: &mut Reactor) {
        assert!(
            matches!(self.state, State::Closed(_)),
            "an engine is closed before its volume is removed"
        );
        self.leaving = Some(done);
        if self.watched && reactor.unwatch(Source::Volume(self.key)) {
            self.watched = false;
        }
    }

    /// The kernel refers to nothing of this volume any more.
    pub fn may_go(&self) -> bool {
        let none_out = self.disk.as_ref().is_none_or(|disk| disk.out() == 0);
        self.leaving.is_some() && !self.watched && none_out && self.session.commands_out() == 0
    }

    /// Lets go of everything: closes the connection, and has the helper close the files.
    pub fn go(self) {
        drop((self.session, self.engine));
        let threads = self.disk.map_or_else(Threads::new, DiskQueue::end);
        if let Some(done) = self.leaving {
            // Whoever asked waits without a limit.
            let _ = done.send(threads);
        }
    }

    /// A watch has ended, and nobody wants to read.
    pub fn unwatched(&mut self) {
        self.watched = false;
    }

    /// True while there is memory that [`Served::trim`] would free.
    pub fn is_warm(&self) -> bool {
        self.session.is_warm()
    }

    /// Frees memory that is not in use.
    pub fn trim(&mut self) {
        self.session.trim();
    }

    pub fn has_requests(&self) -> bool {
        !self.asked.is_empty()
    }

    fn is_full(&self) -> bool {
        self.inflight_bytes >= INFLIGHT_BYTES_PER_VOLUME_MAX
    }

    fn answer(&mut self, id: RequestId, answer: Answer, buffers: &mut Buffers) {
        let ticket = match self
            .asked
            .try_remove(id.0 as usize)
            .expect("a request is answered once")
        {
            Asked::Guest(ticket) => ticket,
            Asked::Growth { size_bytes, done } => {
                let outcome = answer.map(|_| size_bytes).map_err(|error| {
                    let kind = match error {
                        RequestError::NoSpace => ErrorKind::NoSpace,
                        RequestError::Corrupt(_) => ErrorKind::Corrupt,
                        RequestError::Fenced => ErrorKind::Retry,
                        RequestError::Invalid(_) | RequestError::Failed(_) => ErrorKind::Failed,
                    };
                    EngineError::new(kind, format!("grow the volume to {size_bytes} bytes")).because(error)
                });
                if outcome.is_ok() {
                    self.session.resize(size_bytes);
                }
                // Whoever asked has given up if this fails.
                let _ = done.send(outcome);
                return;
            }
        };
        self.inflight_bytes -= occupied_bytes(&ticket);
        // Counted before the guest can know of it.
        self.counters.ended();
        if let Err(error) = &answer {
            self.counters.failed();
            match error {
                RequestError::Corrupt(_) | RequestError::Failed(_) => self.counters.tell(error.to_string()),
                RequestError::Invalid(_) | RequestError::NoSpace | RequestError::Fenced => {}
            }
        }
        self.session.answer(ticket, answer);
        if ticket.handed_over {
            buffers.answered();
        }
    }

    fn settle_close(&mut self) {
        let State::Closing(waiting) = &mut self.state else {
            return;
        };
        let how = match self.engine.stopped() {
            _ if self.engine.is_closed() => self.engine.stopped().map_or(Closed::Clean, Closed::Stopped),
            // It writes no more, and nothing that it started is left to wait for.
            Some(why) if self.disk.as_ref().is_none_or(DiskQueue::is_idle) => Closed::Stopped(why),
            _ => return,
        };
        for done in waiting.drain(..) {
            let _ = done.send(how.clone());
        }
        self.state = State::Closed(how);
    }
}

/// What a request occupies in memory while it is out: the payload of a write, the answer of a read.
fn occupied_bytes(ticket: &Ticket) -> u64 {
    match ticket.kind {
        RequestKind::Read | RequestKind::Write => ticket.bytes,
        RequestKind::Flush | RequestKind::Zero => 0,
    }
}
