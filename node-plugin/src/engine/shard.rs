//! A shard: one thread that serves some of the node's volumes, and waits for all of them in one place.
//!
//! A round goes: wait; take what happened (requests, ended operations, messages); tell the engines the time that they
//! asked for; let the engines that something happened to work. Nothing in a round blocks, so a volume whose disk hangs
//! just has nothing happen to it.

use std::sync::Arc;
use std::sync::mpsc::Sender;
use std::time::{Duration, Instant};

use galleonfs_storage_engine::store::Store;
use rustc_hash::FxHashMap;
use uuid::Uuid;

use super::clock;
use super::disk_queue::DiskQueue;
use super::files::FileBudget;
use super::helper::{Helper, Outcome, Threads};
use super::hosted::NewHosted;
use super::inbox::{Inbox, Outbox};
use super::leading::{ConfigNews, Leading};
use super::limits::{DISK_THREADS_WITHOUT_RING, IDLE_BEFORE_TRIM_MS};
use super::memory::{give_back_freed_memory, never_wait_for_writeback};
use super::post::Post;
use super::reactor::{Event, Reactor, Source};
use super::served::{Closed, Served};
use super::several::Several;
use super::spec::{Leadership, Route};
use super::stats::{Counters, DiskPath, StoreReport};
use super::{EngineError, ErrorKind, Paths, VolumeEngine};
use crate::disk::ReplicaDir;
use crate::frontend::{Buffers, GuestPath, Session};
use crate::transport::Work;

const STAYS: &str = "a volume or a replica stays until its operations have ended";

/// A volume for a shard.
pub(super) struct NewVolume {
    pub key: u32,
    pub name: String,
    pub engine: Box<dyn VolumeEngine>,
    pub session: Box<dyn Session>,
    /// Where its replica is; none of a volume that is led.
    pub dir: Option<Arc<ReplicaDir>>,
    /// Only of such a volume.
    pub leading: Option<Leading>,
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
    /// Take a replica into service.
    Host(Box<NewHosted>, Sender<Result<(), EngineError>>),
    /// Close it, and tell the threads to wait for. No answer: it has gone.
    Unhost {
        replica: u32,
        done: Sender<Threads>,
    },
    GrowHosted {
        replica: u32,
        size_bytes: u64,
        done: Sender<Result<u64, EngineError>>,
    },
    /// Say how a replica's store is. No answer: it has gone, or is being opened.
    ReportHosted {
        replica: u32,
        done: Sender<StoreReport>,
    },
    /// A replica's store was opened again, or could not be.
    Reopened {
        replica: u32,
        opened: Result<Box<Store>, EngineError>,
    },
    /// Who leads the volume of a replica; `None`: it could not be read.
    LookedUp {
        replica: u32,
        found: Option<Leadership>,
    },
    /// From other nodes, about a volume.
    Wire {
        volume: Uuid,
        events: Vec<crate::transport::Event>,
    },
    /// Do the transport's work from now on.
    Work(Box<Work>),
    /// Where the replicas of a volume are.
    Routes {
        volume: Uuid,
        routes: Vec<Route>,
    },
    /// About the configuration of the volume under this key.
    Config(u32, ConfigNews),
    /// End the thread, whatever it has.
    Stop,
}

pub(super) struct Shard {
    inbox: Inbox<Message>,
    /// The transport's work, if this shard does it.
    work: Option<Box<Work>>,
    pub(super) outbox: Outbox<Message>,
    pub(super) reactor: Reactor,
    /// How the guests' requests come, where the reactor allows it.
    guest_path: GuestPath,
    buffers: Buffers,
    pub(super) volumes: FxHashMap<u32, Served>,
    pub(super) several: Several,
    /// Volumes and replicas that something happened to in this round.
    pub(super) touched: Vec<u32>,
    /// Volumes that have more requests than one round takes.
    unfinished: Vec<u32>,
    busy_ms: u64,
    stopping: bool,
    pub(super) budget: FileBudget,
}

/// Runs a shard on the calling thread until it is told to stop.
pub(super) fn run(inbox: Inbox<Message>, outbox: Outbox<Message>, paths: Paths, budget: FileBudget, post: Post) {
    never_wait_for_writeback();
    let mut shard = Shard {
        inbox,
        work: None,
        outbox,
        reactor: Reactor::new(paths.disk),
        guest_path: paths.guest,
        buffers: Buffers::default(),
        volumes: FxHashMap::default(),
        several: Several::new(post),
        touched: Vec::new(),
        unfinished: Vec::new(),
        busy_ms: 0,
        stopping: false,
        budget,
    };
    shard.reactor.watch(Source::Inbox, shard.inbox.descriptor());
    let mut events = Vec::new();
    while !shard.stopping {
        let timeout = if shard.inbox.sleep() {
            shard.timeout()
        } else {
            Some(Duration::ZERO)
        };
        shard.reactor.wait(timeout, &mut events);
        shard.inbox.awake();
        shard.round(&mut events);
    }
}

impl Shard {
    fn round(&mut self, events: &mut Vec<Event>) {
        let now_ms = clock::now_ms();
        if !events.is_empty() {
            self.busy_ms = now_ms;
            self.buffers.used();
        }
        for event in events.drain(..) {
            match event {
                Event::Readable(Source::Inbox) => {
                    self.inbox.silence();
                    self.reactor.watch(Source::Inbox, self.inbox.descriptor());
                }
                Event::Readable(Source::Wire) => self.work(true),
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
                    self.touch(key);
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
                    self.touch(key);
                }
                Event::Disk {
                    volume: key,
                    id,
                    result,
                } => {
                    if let Some(volume) = self.volumes.get_mut(&key) {
                        volume.tick(now_ms);
                        volume.completed(id, result);
                    } else {
                        let replica = self.several.replicas.get_mut(&key).expect(STAYS);
                        replica.tick(now_ms);
                        replica.completed(id, result);
                    }
                    self.touch(key);
                }
            }
        }
        if self.work.as_ref().is_some_and(|work| work.due() <= Instant::now()) {
            self.work(false);
        }
        // Behind the work, which brings messages.
        while let Some(message) = self.inbox.next() {
            self.message(message, now_ms);
        }
        self.tell_the_time(now_ms);
        for key in self.unfinished.drain(..).collect::<Vec<_>>() {
            self.touch(key);
        }
        while let Some(key) = self.touched.pop() {
            if self.pump_replica(key) {
                continue;
            }
            let Some(volume) = self.volumes.get_mut(&key) else {
                continue;
            };
            volume.touched = false;
            if volume.pump(&mut self.reactor, &mut self.buffers) {
                self.unfinished.push(key);
            }
            let (leads, may_go) = (volume.leading.is_some(), volume.may_go());
            if leads {
                self.follow(key);
            }
            if may_go {
                self.let_go(key);
            }
        }
        self.several.post.flush();
        if now_ms >= self.busy_ms + IDLE_BEFORE_TRIM_MS && self.is_warm() && !self.has_requests() {
            self.buffers.trim();
            self.volumes.values_mut().for_each(Served::trim);
            give_back_freed_memory();
        }
    }

    /// Does the transport's work. What arrives comes by the inboxes, of this shard and of others.
    fn work(&mut self, watch_ended: bool) {
        let Some(work) = &mut self.work else { return };
        if !work.turn() {
            self.work = None;
        } else if watch_ended {
            self.reactor.watch(Source::Wire, work.descriptor());
        }
    }

    /// Whoever asked for this moment, or an earlier one, is told.
    fn tell_the_time(&mut self, now_ms: u64) {
        let is_due = |due: Option<u64>| due.is_some_and(|due| due <= now_ms);
        let volumes = self.volumes.iter().filter(|(_, volume)| is_due(volume.next_tick_ms()));
        let replicas = self.several.replicas.iter();
        let replicas = replicas.filter(|(_, replica)| is_due(replica.next_tick_ms()));
        let due: Vec<u32> = volumes
            .map(|(key, _)| *key)
            .chain(replicas.map(|(key, _)| *key))
            .collect();
        for key in due {
            if let Some(volume) = self.volumes.get_mut(&key) {
                volume.tick(now_ms);
            } else if let Some(replica) = self.several.replicas.get_mut(&key) {
                replica.tick(now_ms);
            }
            self.touch(key);
        }
    }

    /// Lets a volume go that nobody refers to any more.
    fn let_go(&mut self, key: u32) {
        let volume = self.volumes.remove(&key).expect("it was just looked at");
        if let Some(leading) = &volume.leading {
            self.several.left(leading.volume);
        }
        volume.go();
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
                if let Some(volume) = self.volumes.get_mut(&key) {
                    volume.tick(now_ms);
                    volume.helped(outcome, &mut self.reactor);
                } else {
                    let replica = self.several.replicas.get_mut(&key).expect(STAYS);
                    replica.tick(now_ms);
                    replica.helped(outcome, &mut self.reactor);
                }
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
                if let Some(report) = self.volumes.get(&key).and_then(Served::report) {
                    // Whoever asked has given up if this fails.
                    let _ = done.send(report);
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
            Message::Host(new, done) => return self.host(*new, &done),
            Message::Unhost { replica: key, done } => {
                if let Some(replica) = self.several.replicas.get_mut(&key) {
                    replica.close(done);
                }
                key
            }
            Message::GrowHosted {
                replica: key,
                size_bytes,
                done,
            } => {
                if let Some(replica) = self.several.replicas.get_mut(&key) {
                    replica.tick(now_ms);
                    replica.grow(size_bytes, done);
                }
                key
            }
            Message::ReportHosted { replica: key, done } => {
                if let Some(report) = self.several.replicas.get(&key).and_then(|replica| replica.report()) {
                    // Whoever asked has given up if this fails.
                    let _ = done.send(report);
                }
                return;
            }
            Message::Reopened { replica: key, opened } => {
                if let Some(replica) = self.several.replicas.get_mut(&key) {
                    replica.reopened(opened);
                }
                key
            }
            Message::LookedUp { replica: key, found } => {
                if let Some(replica) = self.several.replicas.get_mut(&key) {
                    replica.looked_up(found);
                }
                key
            }
            Message::Wire { volume, events } => return self.wire(volume, events),
            Message::Work(work) => {
                self.reactor.watch(Source::Wire, work.descriptor());
                self.work = Some(work);
                return;
            }
            Message::Routes { volume, routes } => return self.several.post.route(volume, routes),
            Message::Config(key, news) => {
                self.config(key, news);
                key
            }
            Message::Stop => {
                self.stopping = true;
                return;
            }
        };
        self.touch(key);
    }

    fn add(&mut self, mut new: NewVolume) -> Result<Arc<Counters>, EngineError> {
        let disk = match new.dir {
            Some(dir) => {
                let helper = self.helper(new.key, &new.name, dir)?;
                Some(DiskQueue::new(new.key, helper, self.budget.clone()))
            }
            None => None,
        };
        if self.guest_path == GuestPath::Ring && self.reactor.path() == DiskPath::Ring {
            new.session.allow_ring();
        }
        let counters = Arc::new(Counters::new(self.reactor.path()));
        if let Some(leading) = &new.leading {
            self.several.led(leading.volume, new.key);
        }
        let served = Served::new(new.key, new.engine, new.session, disk, new.leading, counters.clone());
        self.volumes.insert(new.key, served);
        Ok(counters)
    }

    /// The threads that may block, of a volume or a replica.
    pub(super) fn helper(&self, key: u32, name: &str, dir: Arc<ReplicaDir>) -> Result<Helper, EngineError> {
        let threads = match self.reactor.path() {
            DiskPath::Ring => 1,
            DiskPath::Threads => DISK_THREADS_WITHOUT_RING,
        };
        Helper::start(key, name, threads, dir, self.outbox.clone()).map_err(|error| {
            EngineError::new(ErrorKind::Retry, format!("start the disk threads of {name}")).because(error)
        })
    }

    /// How long there is nothing to do unless something happens; `None` for ever.
    fn timeout(&self) -> Option<Duration> {
        if !self.unfinished.is_empty() {
            return Some(Duration::ZERO);
        }
        let volumes = self.volumes.values().filter_map(Served::next_tick_ms);
        let replicas = self.several.replicas.values();
        let mut due = volumes
            .chain(replicas.filter_map(|replica| replica.next_tick_ms()))
            .min();
        if !self.has_requests() && self.is_warm() {
            let trim = self.busy_ms + IDLE_BEFORE_TRIM_MS;
            due = Some(due.map_or(trim, |due| due.min(trim)));
        }
        let due = due.map(|due| Duration::from_millis(due.saturating_sub(clock::now_ms())));
        let work = self.work.as_ref();
        let work = work.map(|work| work.due().saturating_duration_since(Instant::now()));
        [due, work].into_iter().flatten().min()
    }

    fn has_requests(&self) -> bool {
        self.volumes.values().any(Served::has_requests)
    }
}
