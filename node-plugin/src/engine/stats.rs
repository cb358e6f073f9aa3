//! What a volume counts. Its shard writes, anybody reads.

use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use galleonfs_storage_engine::replication::primary::Lag;
use galleonfs_storage_engine::store::{ScrubProgress, StoreStats};
use galleonfs_storage_engine::volume::Compared;

use crate::frontend::{GuestPath, RequestKind};

/// How a volume's disk operations are carried out.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum DiskPath {
    /// By io_uring.
    Ring,
    /// By threads, because this kernel or this sandbox forbids io_uring.
    Threads,
}

/// A volume's counters since it was attached.
#[derive(Clone, Debug)]
pub struct VolumeStats {
    pub reads: u64,
    pub writes: u64,
    pub flushes: u64,
    /// Discards and write-zeroes.
    pub zeroes: u64,
    pub read_bytes: u64,
    pub written_bytes: u64,
    pub zeroed_bytes: u64,
    /// Requests that were answered with an error.
    pub errors: u64,
    /// Requests that are with the engine.
    pub inflight: u64,
    /// Writes wait because the pool is full.
    pub waits_for_space: bool,
    pub path: DiskPath,
    /// The way that the guest's requests take; [`GuestPath::Device`] until the first one came the other way.
    pub guest_path: GuestPath,
    /// What the last failed request was told, if it tells of damage, of a failed disk or of an engine that stopped.
    pub last_error: Option<String>,
    /// What the scrub told last of damage that is still there.
    pub damage: Option<String>,
    /// What requests of a volume with several replicas wait for, if they do for long.
    pub waits_for: Option<String>,
    /// How far the replica is behind that is furthest behind, where writes are answered before all have them.
    pub lag: Lag,
    /// What came of comparing the replicas with each other.
    pub compared: Compared,
}

/// What the store of a volume says of itself.
#[derive(Clone, Debug, Default)]
pub struct StoreReport {
    /// Since the attach, but for what is there now: files, live blocks, cached pages.
    pub stats: StoreStats,
    /// What the scrub has done and found.
    pub scrub: ScrubProgress,
}

#[derive(Debug)]
pub(super) struct Counters {
    path: DiskPath,
    guest_ring: AtomicBool,
    waits_for_space: AtomicBool,
    reads: AtomicU64,
    writes: AtomicU64,
    flushes: AtomicU64,
    zeroes: AtomicU64,
    read_bytes: AtomicU64,
    written_bytes: AtomicU64,
    zeroed_bytes: AtomicU64,
    errors: AtomicU64,
    inflight: AtomicU64,
    last_error: Mutex<Option<String>>,
    damage: Mutex<Option<String>>,
    waits_for: Mutex<Option<String>>,
    lag: Mutex<Lag>,
    compared: Mutex<Compared>,
}

impl Counters {
    pub fn new(path: DiskPath) -> Counters {
        Counters {
            path,
            guest_ring: AtomicBool::new(false),
            waits_for_space: AtomicBool::new(false),
            reads: AtomicU64::new(0),
            writes: AtomicU64::new(0),
            flushes: AtomicU64::new(0),
            zeroes: AtomicU64::new(0),
            read_bytes: AtomicU64::new(0),
            written_bytes: AtomicU64::new(0),
            zeroed_bytes: AtomicU64::new(0),
            errors: AtomicU64::new(0),
            inflight: AtomicU64::new(0),
            last_error: Mutex::new(None),
            damage: Mutex::new(None),
            waits_for: Mutex::new(None),
            lag: Mutex::default(),
            compared: Mutex::default(),
        }
    }

    /// The way that requests take now.
    pub fn take_path(&self, path: GuestPath) {
        self.guest_ring.store(path == GuestPath::Ring, Ordering::Relaxed);
    }

    /// Whether writes wait for room in the pool.
    pub fn wait_for_space(&self, waits: bool) {
        self.waits_for_space.store(waits, Ordering::Relaxed);
    }

    /// A request was handed to the engine.
    pub fn started(&self, kind: RequestKind, bytes: u64) {
        let (count, sum) = match kind {
            RequestKind::Read => (&self.reads, Some(&self.read_bytes)),
            RequestKind::Write => (&self.writes, Some(&self.written_bytes)),
            RequestKind::Flush => (&self.flushes, None),
            RequestKind::Zero => (&self.zeroes, Some(&self.zeroed_bytes)),
        };
        add(count, 1);
        if let Some(sum) = sum {
            add(sum, bytes);
        }
        add(&self.inflight, 1);
    }

    /// A request was answered.
    pub fn ended(&self) {
        // Only the shard writes, so a load and a store do not race.
        self.inflight.store(
            self.inflight.load(Ordering::Relaxed).saturating_sub(1),
            Ordering::Relaxed,
        );
    }

    /// A request was answered with an error.
    pub fn failed(&self) {
        add(&self.errors, 1);
    }

    /// Something happened that a person should know of.
    pub fn tell(&self, error: String) {
        *self.last_error.lock().expect("nobody panics while holding it") = Some(error);
    }

    /// What requests wait for, in words.
    pub fn wait_for(&self, what: Option<String>) {
        *self.waits_for.lock().expect("nobody panics while holding it") = what;
    }

    /// How far the slowest replica is behind.
    pub fn lags(&self, lag: Lag) {
        *self.lag.lock().expect("nobody panics while holding it") = lag;
    }

    /// What came of comparing replicas; says so when they differ.
    pub fn compared(&self, compared: Compared) {
        let mut known = self.compared.lock().expect("nobody panics while holding it");
        let before = std::mem::replace(&mut *known, compared);
        drop(known);
        if compared.differing > before.differing {
            let more = compared.differing - before.differing;
            let text = format!(
                "replicas were compared: in {more} ranges of blocks one of them had lost a write that its disk had \
                 confirmed; it was given that again"
            );
            tracing::error!(%text, "damage was found");
            self.damaged(Some(text));
        }
    }

    /// What is damaged, in words.
    pub fn damaged(&self, damage: Option<String>) {
        *self.damage.lock().expect("nobody panics while holding it") = damage;
    }

    pub fn read(&self) -> VolumeStats {
        let get = |count: &AtomicU64| count.load(Ordering::Relaxed);
        VolumeStats {
            reads: get(&self.reads),
            writes: get(&self.writes),
            flushes: get(&self.flushes),
            zeroes: get(&self.zeroes),
            read_bytes: get(&self.read_bytes),
            written_bytes: get(&self.written_bytes),
            zeroed_bytes: get(&self.zeroed_bytes),
            errors: get(&self.errors),
            inflight: get(&self.inflight),
            waits_for_space: self.waits_for_space.load(Ordering::Relaxed),
            path: self.path,
            guest_path: if self.guest_ring.load(Ordering::Relaxed) {
                GuestPath::Ring
            } else {
                GuestPath::Device
            },
            last_error: self.last_error.lock().expect("nobody panics while holding it").clone(),
            damage: self.damage.lock().expect("nobody panics while holding it").clone(),
            waits_for: self.waits_for.lock().expect("nobody panics while holding it").clone(),
            lag: *self.lag.lock().expect("nobody panics while holding it"),
            compared: *self.compared.lock().expect("nobody panics while holding it"),
        }
    }
}

/// Only the shard writes, so a load and a store do not race, and cost less than an atomic addition.
fn add(count: &AtomicU64, by: u64) {
    count.store(count.load(Ordering::Relaxed) + by, Ordering::Relaxed);
}
