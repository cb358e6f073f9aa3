//! What this crate's upper rooms need of the engine and of replica directories.

use std::path::{Path, PathBuf};

use futures::future::BoxFuture;
use galleonfs_api::reason;
use galleonfs_storage_engine::replication::primary::Lag;
use galleonfs_storage_engine::volume::Compared;
use uuid::Uuid;

use crate::disk::FormatSpec;
use crate::engine::{AttachSpec, Device, EngineError, HostSpec, Hosted, LeadSpec, Route, StoreReport};

/// A random number for one start of a store.
pub fn salt() -> u64 {
    Uuid::new_v4().as_u64_pair().1
}

/// Counters of one volume, since its attach.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct VolumeMetrics {
    pub reads: u64,
    pub writes: u64,
    pub read_bytes: u64,
    pub written_bytes: u64,
    pub flushes: u64,
    pub errors: u64,
    /// Requests that are not answered yet.
    pub inflight: u64,
    /// How far the replica is behind that is furthest behind.
    pub lag: Lag,
    /// What came of comparing the replicas with each other.
    pub compared: Compared,
}

/// What is the matter with a volume that is attached.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Trouble {
    /// Damage, a failed disk, an engine that stopped: the last of these, in words.
    Broken(String),
    /// Its writes wait for room in the pool of this path.
    PoolFull(PathBuf),
    /// A volume of several replicas does not go on until something else does: what, in words.
    Waiting(String),
}

impl Trouble {
    /// The reason for a condition or an Event, and the text.
    pub fn told(&self) -> (&'static str, String) {
        match self {
            Trouble::Broken(text) => (reason::IO_ERROR, text.clone()),
            Trouble::PoolFull(pool) => {
                let text = format!(
                    "the pool at {} is full: writes wait, and go on by themselves when there is room; delete or trim \
                     data, or give the pool more",
                    pool.display()
                );
                (reason::POOL_FULL, text)
            }
            Trouble::Waiting(text) => (reason::WAITING_FOR_REPLICAS, text.clone()),
        }
    }
}

/// Brings volumes up and down. Each verb may be repeated; calls for one volume never overlap.
pub trait NodeEngine: Send + Sync + 'static {
    /// Removes what a predecessor that died left behind. Called once, before the first attach.
    fn remove_stale(&self) -> BoxFuture<'_, Result<(), EngineError>>;
    /// Opens the replica and makes its device.
    fn attach(&self, spec: AttachSpec) -> BoxFuture<'_, Result<Device, EngineError>>;
    /// Leads the replicas of a volume, and makes its device once they are ready to serve. Afterwards it is an attached
    /// volume like any other.
    fn lead(&self, spec: LeadSpec) -> BoxFuture<'_, Result<Device, EngineError>>;
    /// Takes the device down and closes the replica, or ends the epoch in order and gives up being the primary; one that
    /// is not attached is fine.
    fn detach<'a>(&'a self, volume: &'a str) -> BoxFuture<'a, Result<(), EngineError>>;
    /// Makes the volume and its device larger; a size that is already reached is fine.
    fn grow<'a>(&'a self, volume: &'a str, size_bytes: u64) -> BoxFuture<'a, Result<Device, EngineError>>;
    /// The device, while there is one that works.
    fn device(&self, volume: &str) -> Option<Device>;
    /// Opens a replica and has it take part in its volume. One that is hosted already is fine.
    fn host(&self, spec: HostSpec) -> BoxFuture<'_, Result<(), EngineError>>;
    /// Closes a hosted replica; one that is not hosted is fine.
    fn unhost(&self, replica: Uuid) -> BoxFuture<'_, Result<(), EngineError>>;
    /// Every replica that is hosted.
    fn all_hosted(&self) -> Vec<Uuid>;
    /// Makes a hosted replica larger, durably; gives the size that it has then.
    fn grow_hosted(&self, replica: Uuid, size_bytes: u64) -> BoxFuture<'_, Result<u64, EngineError>>;
    /// How a hosted replica fares.
    fn hosted(&self, replica: Uuid) -> Option<Hosted>;
    /// Says where the replicas of a volume are. What was said before of this volume counts no longer.
    fn routes(&self, volume_uid: Uuid, routes: Vec<Route>);
    /// Somebody else may have changed the configuration of an attached volume: a replica was added, or given up.
    fn look(&self, volume: &str);
    /// A replica of an attached volume is to leave as soon as another one is in sync in its place; `None`: all may stay.
    fn leave(&self, volume: &str, replica: Option<Uuid>);
    /// What a person should know about an attached volume.
    fn trouble(&self, volume: &str) -> Option<Trouble>;
    /// Counters of every attached volume, by name.
    fn metrics(&self) -> Vec<(String, VolumeMetrics)>;
    /// What the store of every attached volume says of itself, by name. May wait for a moment.
    fn stores(&self) -> Vec<(String, StoreReport)>;
    /// Orders to replicas here that were refused, because they came from nodes that do not lead the volume.
    fn refused_orders(&self) -> u64;
    /// Whether the engine itself runs; the text says what is wrong with it.
    fn alive(&self) -> Result<(), String>;
}

/// Replica directories. Blocking: called on threads for that.
pub trait ReplicaDisks: Send + Sync + 'static {
    /// Makes the directory; it appears under its name only when complete. One that is there must be this replica.
    fn make(&self, dir: &Path, spec: &FormatSpec) -> Result<(), EngineError>;
    /// Removes the directory and all in it; one that is not there is fine.
    fn remove(&self, dir: &Path) -> Result<(), EngineError>;
    /// Removes what a crash left half made or half removed. Called once per pool, before any other verb.
    fn sweep(&self, replicas: &Path) -> Result<(), EngineError>;
    /// Bytes that the directory occupies on its file system.
    fn used_bytes(&self, dir: &Path) -> std::io::Result<u64>;
}
