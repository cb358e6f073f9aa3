//! What this crate's upper rooms need of the engine and of replica directories.

use std::path::{Path, PathBuf};

use futures::future::BoxFuture;
use uuid::Uuid;

use crate::engine::EngineError;

/// Which replica to open, and as what.
#[derive(Debug, Clone)]
pub struct AttachSpec {
    /// Object name: the key of the volume on this node.
    pub volume: String,
    pub volume_uid: Uuid,
    pub replica_uid: Uuid,
    pub cluster_id: Uuid,
    pub replica_dir: PathBuf,
    /// Granted by a compare-and-swap on the volume's object before this call.
    pub epoch: u64,
    pub size_bytes: u64,
    pub read_only: bool,
}

/// The block device of an attached volume.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Device {
    pub path: PathBuf,
    pub size_bytes: u64,
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
}

/// Brings volumes up and down. Each verb may be repeated; calls for one volume never overlap.
pub trait NodeEngine: Send + Sync + 'static {
    /// Removes what a predecessor that died left behind. Called once, before the first attach.
    fn remove_stale(&self) -> BoxFuture<'_, Result<(), EngineError>>;
    /// Opens the replica and makes its device.
    fn attach(&self, spec: AttachSpec) -> BoxFuture<'_, Result<Device, EngineError>>;
    /// Takes the device down and closes the replica; one that is not attached is fine.
    fn detach<'a>(&'a self, volume: &'a str) -> BoxFuture<'a, Result<(), EngineError>>;
    /// Makes the volume and its device larger; a size that is already reached is fine.
    fn grow<'a>(&'a self, volume: &'a str, size_bytes: u64) -> BoxFuture<'a, Result<Device, EngineError>>;
    /// The device, while there is one that works.
    fn device(&self, volume: &str) -> Option<Device>;
    /// The last thing about an attached volume that a person should know: damage, a failed disk, an engine that stopped.
    fn trouble(&self, volume: &str) -> Option<String>;
    /// Counters of every attached volume, by name.
    fn metrics(&self) -> Vec<(String, VolumeMetrics)>;
    /// Whether the engine itself runs; the text says what is wrong with it.
    fn alive(&self) -> Result<(), String>;
}

/// What a new replica is made as.
#[derive(Debug, Clone)]
pub struct FormatSpec {
    pub volume_uid: Uuid,
    pub replica_uid: Uuid,
    pub cluster_id: Uuid,
    pub size_bytes: u64,
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
