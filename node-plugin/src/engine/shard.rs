//! A shard: one thread that serves some of the node's volumes, and waits for all of them in one place.
//!
//! A round goes: wait; take what happened (requests, ended operations, messages); tell the engines the time that they
//! asked for; let the engines that something happened to work. Nothing in a round blocks, so a volume whose disk hangs
//! just has nothing happen to it.

use std::sync::Arc;
use std::sync::mpsc::Sender;
use std::time::{Duration, Instant};

use rustc_hash::FxHashMap;

use super::files::FileBudget;
use super::helper::{Helper, Outcome, Threads};
use super::inbox::{Inbox, Outbox};
use super::limits::{DISK_THREADS_WITHOUT_RING, IDLE_BEFORE_TRIM_MS};
use super::memory::{give_back_freed_memory, never_wait_for_writeback};
use super::reactor::{Event, Reactor, Source};
use super::served::{Closed, Served};
use super::stats::{Counters, DiskPath, StoreReport};
use super::{EngineError, ErrorKind, Paths, VolumeEngine};
use crate::disk::ReplicaDir;
use crate::frontend::{Buffers, GuestPath, Session};

/// A volume for a shard.
pub(super) struct NewVolume {
    pub key: u32,
    pub name: String,
    pub engine: Box<dyn VolumeEngine>,
    pub session: Box<dyn Session>,
    pub dir: Arc<ReplicaDir>,
}

/// What other threads tell a shard.
pub(super) enum Message {
    Add(Box<NewVolume>, Sender<Result<Arc<Counters>, EngineError>>),
    Helped {
        volume: u32,
        outcome: Outcome,
    },
    Grow {
        volume: u32,
        size_bytes: u64,
        done: Sender<Result<u64, EngineError>>,
    },
    /// Say how its store is. No answer: it has gone.
    Report {
        volume: u32,
        done: Sender<StoreReport>,
    },
    /// End the volume's engine in an orderly way.
    Close {
        volume: u32,
        done: Sender<Closed>,
    },
    /// Let go of a closed volume; tells the threads to wait for.
    Remove {
        volume: u32,
        done: Sender<Threads>,
    },
    /// End the thread, whatever it has.
    Stop,
}

pub(super) struct Shard {
    inbox: Inbox<Message>,
    outbox: Outbox<Message>,
    reactor: Reactor,
    /// How the guests' requests come, where the reactor allows it.
    guest_path: GuestPath,
    buffers: Buffers,
    volumes: FxHashMap<u32, Served>,
    /// Volumes that something happened to in this round.
    touched: Vec<u32>,
    /// Volumes that have more requests than one round takes.
    unfinished: Vec<u32>,
    started: Instant,
    busy_ms: u64,
    stopping: bool,
    budget: FileBudget,
}

/// Runs a shard on the calling thread until it is told to stop.
pub(super) fn run(inbox: Inbox<Message>, outbox: Outbox<Message>, paths: Paths, budget: FileBudget) {
    never_wait_for_writeback();
    let mut shard = Shard {
        inbox,
        outbox,
        reactor: Reactor::new(paths.disk),
        guest_path: paths.guest,
        buffers: Buffers::default(),
        volumes: FxHashMap::default(),
        touched: Vec::new(),
        unfinished: Vec::new(),
        started: Instant::now(),
        busy_ms: 0,
        stopping: false,
        budget,
    };
    shard.reactor.watch(Source::Inbox, shard.inbox.descriptor());
    let mut events = Vec::new();
    while !shard.stopping {
        shard.reactor.wait(shard.timeout(), &mut events);
        shard.round(&mut events);
    }
}

impl Shard {
    fn round(&mut self, events: &mut Vec<Event>) {
        let now_ms = self.now_ms();
        if !events.is_empty() {
            self.busy_ms = now_ms;
            self.buffers.used();
        }
        for event in events.drain(..) {
            match event {
                Event::Readable(Source::Inbox) => {
                    self.inbox.woken();
                    while let Some(message) = self.inbox.next() {
                        self.message(message, now_ms);
                    }
                    self.reactor.watch(Source::Inbox, self.inbox.descriptor());
                }
                Event::Readable(Source::Volume(key)) => {
                    let Some(volume) = self.volumes.get_mut(&key) else {
                        continue;
                    };
                    if volume.leaving.is_some() {
                        volume.unwatched();
                    } else {
                        volume.tick(now_ms);
                        volume.readable();
                    }
                    touch(&mut self.touched, key, volume);
                }
                Event::Command {
                    volume: key,
                    slot,
                    result,
                } => {
                    let volume = self
                        .volumes
                        .get_mut(&key)
                        .expect("a volume stays until its commands have ended");
                    volume.tick(now_ms);
                    volume.commanded(slot, result);
                    touch(&mut self.touched, key, volume);
                }
                Event::Disk {
                    volume: key,
                    id,
                    result,
                } => {
                    let volume = self
                        .volumes
                        .get_mut(&key)
                        .expect("a volume stays until its operations have ended");
                    volume.tick(now_ms);
                    volume.completed(id, result);
                    touch(&mut self.touched, key, volume);
                }
            }
        }
        for (key, volume) in &mut self.volumes {
            if volume.next_tick_ms().is_some_and(|due| due <= now_ms) {
                volume.tick(now_ms);
                touch(&mut self.touched, *key, volume);
            }
        }
        for key in self.unfinished.drain(..) {
            if let Some(volume) = self.volumes.get_mut(&key) {
                touch(&mut self.touched, key, volume);
            }
        }
        while let Some(key) = self.touched.pop() {
            let Some(volume) = self.volumes.get_mut(&key) else {
                continue;
            };
            volume.touched = false;
            if volume.pump(&mut self.reactor, &mut self.buffers) {
                self.unfinished.push(key);
            }
            if volume.may_go()
                && let Some(volume) = self.volumes.remove(&key)
            {
                volume.go();
            }
        }
        if now_ms >= self.busy_ms + IDLE_BEFORE_TRIM_MS && self.is_warm() && !self.has_requests() {
            self.buffers.trim();
            self.volumes.values_mut().for_each(Served::trim);
            give_back_freed_memory();
        }
    }

    /// True while there is memory that a shard without work does not need.
    fn is_warm(&self) -> bool {
        self.buffers.is_warm() || self.volumes.values().any(Served::is_warm)
    }

    fn message(&mut self, message: Message, now_ms: u64) {
        let key = match message {
            Message::Add(volume, done) => {
                let key = volume.key;
                let added = self.add(*volume);
                // Whoever asked waits without a limit.
                let _ = done.send(added);
                key
            }
            Message::Helped { volume: key, outcome } => {
                let volume = self
                    .volumes
                    .get_mut(&key)
                    .expect("a volume stays until its operations have ended");
                volume.tick(now_ms);
                volume.helped(outcome, &mut self.reactor);
                key
            }
            Message::Grow {
                volume: key,
                size_bytes,
                done,
            } => {
                if let Some(volume) = self.volumes.get_mut(&key) {
                    volume.tick(now_ms);
                    volume.grow(size_bytes, done);
                }
                key
            }
            Message::Report { volume: key, done } => {
                if let Some(volume) = self.volumes.get(&key) {
                    // Whoever asked has given up if this fails.
                    let _ = done.send(volume.report());
                }
                key
            }
            Message::Close { volume: key, done } => {
                if let Some(volume) = self.volumes.get_mut(&key) {
                    volume.close(now_ms, done);
                }
                key
            }
            Message::Remove { volume: key, done } => {
                if let Some(volume) = self.volumes.get_mut(&key) {
                    volume.leave(done, &mut self.reactor);
                }
                key
            }
            Message::Stop => {
                self.stopping = true;
                return;
            }
        };
        if let Some(volume) = self.volumes.get_mut(&key) {
            touch(&mut self.touched, key, volume);
        }
    }

    fn add(&mut self, mut new: NewVolume) -> Result<Arc<Counters>, EngineError> {
        let threads = match self.reactor.path() {
            DiskPath::Ring => 1,
            DiskPath::Threads => DISK_THREADS_WITHOUT_RING,
        };
        let helper = Helper::start(new.key, &new.name, threads, new.dir, self.outbox.clone()).map_err(|error| {
            EngineError::new(
                ErrorKind::Retry,
                format!("start the disk threads of volume {}", new.name),
            )
            .because(error)
        })?;
        if self.guest_path == GuestPath::Ring && self.reactor.path() == DiskPath::Ring {
            new.session.allow_ring();
        }
        let counters = Arc::new(Counters::new(self.reactor.path()));
        let served = Served::new(
            new.key,
            new.engine,
            new.session,
            helper,
            counters.clone(),
            self.budget.clone(),
        );
        self.volumes.insert(new.key, served);
        Ok(counters)
    }

    /// How long there is nothing to do unless something happens; `None` for ever.
    fn timeout(&self) -> Option<Duration> {
        if !self.unfinished.is_empty() {
            return Some(Duration::ZERO);
        }
        let mut due = self.volumes.values().filter_map(Served::next_tick_ms).min();
        if !self.has_requests() && self.is_warm() {
            let trim = self.busy_ms + IDLE_BEFORE_TRIM_MS;
            due = Some(due.map_or(trim, |due| due.min(trim)));
        }
        due.map(|due| Duration::from_millis(due).saturating_sub(self.started.elapsed()))
    }

    fn has_requests(&self) -> bool {
        self.volumes.values().any(Served::has_requests)
    }

    fn now_ms(&self) -> u64 {
        self.started.elapsed().as_millis() as u64
    }
}

fn touch(touched: &mut Vec<u32>, key: u32, volume: &mut Served) {
    if !volume.touched {
        volume.touched = true;
        touched.push(key);
    }
}
