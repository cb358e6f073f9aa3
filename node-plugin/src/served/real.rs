//! The real engine and the real replica directories behind this room's traits.

use std::path::{Path, PathBuf};

use futures::FutureExt;
use futures::future::BoxFuture;
use uuid::Uuid;

use super::engine::{AttachSpec, Device, FormatSpec, NodeEngine, ReplicaDisks, VolumeMetrics};
use crate::disk;
use crate::engine::{self, Engine, EngineConfig, EngineError};

/// A random number for one start of a store.
fn salt() -> u64 {
    Uuid::new_v4().as_u64_pair().1
}

/// The engine of this process.
#[derive(Debug)]
pub struct RealEngine {
    engine: Engine,
    runtime_dir: PathBuf,
}

impl RealEngine {
    /// Starts its threads.
    pub fn start(config: EngineConfig) -> Result<RealEngine, EngineError> {
        let runtime_dir = config.runtime_dir.clone();
        Ok(RealEngine {
            engine: Engine::start(config)?,
            runtime_dir,
        })
    }
}

fn device(device: engine::Device) -> Device {
    Device {
        path: device.path,
        size_bytes: device.size_bytes,
    }
}

impl NodeEngine for RealEngine {
    fn remove_stale(&self) -> BoxFuture<'_, Result<(), EngineError>> {
        Engine::remove_stale(&self.runtime_dir).boxed()
    }

    fn attach(&self, spec: AttachSpec) -> BoxFuture<'_, Result<Device, EngineError>> {
        let AttachSpec {
            volume,
            volume_uid,
            replica_uid,
            cluster_id,
            replica_dir,
            epoch,
            size_bytes,
            read_only,
        } = spec;
        let salt = salt();
        let spec = engine::AttachSpec {
            volume,
            volume_uid,
            replica_uid,
            cluster_id,
            replica_dir,
            epoch,
            size_bytes,
            read_only,
            salt,
        };
        async move { self.engine.attach(spec).await.map(device) }.boxed()
    }

    fn detach<'a>(&'a self, volume: &'a str) -> BoxFuture<'a, Result<(), EngineError>> {
        self.engine.detach(volume).boxed()
    }

    fn grow<'a>(&'a self, volume: &'a str, size_bytes: u64) -> BoxFuture<'a, Result<Device, EngineError>> {
        async move { self.engine.grow(volume, size_bytes).await.map(device) }.boxed()
    }

    fn device(&self, volume: &str) -> Option<Device> {
        self.engine.device(volume).map(device)
    }

    fn trouble(&self, volume: &str) -> Option<String> {
        let stats = self.engine.stats().into_iter().find(|(name, _)| name == volume);
        stats.and_then(|(_, stats)| stats.last_error)
    }

    fn metrics(&self) -> Vec<(String, VolumeMetrics)> {
        let metrics = |stats: engine::VolumeStats| VolumeMetrics {
            reads: stats.reads,
            writes: stats.writes,
            read_bytes: stats.read_bytes,
            written_bytes: stats.written_bytes,
            flushes: stats.flushes,
            errors: stats.errors,
            inflight: stats.inflight,
        };
        self.engine
            .stats()
            .into_iter()
            .map(|(volume, stats)| (volume, metrics(stats)))
            .collect()
    }

    /// A shard that panics takes the process with it, so an engine that can be asked runs.
    fn alive(&self) -> Result<(), String> {
        Ok(())
    }
}

/// Replica directories on the node's file systems.
#[derive(Debug, Default)]
pub struct RealDisks;

impl ReplicaDisks for RealDisks {
    fn make(&self, dir: &Path, spec: &FormatSpec) -> Result<(), EngineError> {
        let FormatSpec {
            volume_uid,
            replica_uid,
            cluster_id,
            size_bytes,
        } = *spec;
        let spec = disk::FormatSpec {
            volume_uid,
            replica_uid,
            cluster_id,
            size_bytes,
            salt: salt(),
        };
        disk::format_replica(dir, &spec)
    }

    fn remove(&self, dir: &Path) -> Result<(), EngineError> {
        disk::remove_replica(dir)
    }

    fn sweep(&self, replicas: &Path) -> Result<(), EngineError> {
        disk::sweep_leftovers(replicas)
    }

    fn used_bytes(&self, dir: &Path) -> std::io::Result<u64> {
        disk::used_bytes(dir)
    }
}
