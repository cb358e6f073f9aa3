//! The real engine and the real replica directories behind this room's traits.

use std::path::{Path, PathBuf};

use futures::FutureExt;
use futures::future::BoxFuture;

use super::engine::{NodeEngine, ReplicaDisks, Trouble, VolumeMetrics};
use crate::disk::{self, FormatSpec};
use crate::engine::{
    self, AttachSpec, Device, Engine, EngineConfig, EngineError, HostSpec, Hosted, LeadSpec, Route, StoreReport,
};
use uuid::Uuid;

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

impl NodeEngine for RealEngine {
    fn remove_stale(&self) -> BoxFuture<'_, Result<(), EngineError>> {
        Engine::remove_stale(&self.runtime_dir).boxed()
    }

    fn attach(&self, spec: AttachSpec) -> BoxFuture<'_, Result<Device, EngineError>> {
        self.engine.attach(spec).boxed()
    }

    fn lead(&self, spec: LeadSpec) -> BoxFuture<'_, Result<Device, EngineError>> {
        self.engine.lead(spec).boxed()
    }

    fn host(&self, spec: HostSpec) -> BoxFuture<'_, Result<(), EngineError>> {
        self.engine.host(spec).boxed()
    }

    fn unhost(&self, replica: Uuid) -> BoxFuture<'_, Result<(), EngineError>> {
        self.engine.unhost(replica).boxed()
    }

    fn all_hosted(&self) -> Vec<Uuid> {
        self.engine.all_hosted()
    }

    fn grow_hosted(&self, replica: Uuid, size_bytes: u64) -> BoxFuture<'_, Result<u64, EngineError>> {
        self.engine.grow_hosted(replica, size_bytes).boxed()
    }

    fn hosted(&self, replica: Uuid) -> Option<Hosted> {
        self.engine.hosted(replica)
    }

    fn routes(&self, volume_uid: Uuid, routes: Vec<Route>) {
        self.engine.routes(volume_uid, routes);
    }

    fn look(&self, volume: &str) {
        self.engine.look(volume);
    }

    fn leave(&self, volume: &str, replica: Option<Uuid>) {
        self.engine.leave(volume, replica);
    }

    fn detach<'a>(&'a self, volume: &'a str) -> BoxFuture<'a, Result<(), EngineError>> {
        self.engine.detach(volume).boxed()
    }

    fn grow<'a>(&'a self, volume: &'a str, size_bytes: u64) -> BoxFuture<'a, Result<Device, EngineError>> {
        self.engine.grow(volume, size_bytes).boxed()
    }

    fn device(&self, volume: &str) -> Option<Device> {
        self.engine.device(volume)
    }

    fn trouble(&self, volume: &str) -> Option<Trouble> {
        let stats = self.engine.stats_of(volume)?;
        match stats.last_error.or(stats.damage) {
            Some(error) => Some(Trouble::Broken(error)),
            None if stats.waits_for_space => Some(Trouble::PoolFull(self.engine.pool(volume)?)),
            None => stats.waits_for.map(Trouble::Waiting),
        }
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
            lag: stats.lag,
            compared: stats.compared,
        };
        self.engine
            .stats()
            .into_iter()
            .map(|(volume, stats)| (volume, metrics(stats)))
            .collect()
    }

    fn stores(&self) -> Vec<(String, StoreReport)> {
        let mut stores = self.engine.stores();
        stores.extend(self.engine.hosted_stores());
        stores
    }

    fn refused_orders(&self) -> u64 {
        self.engine.refused_orders()
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
        disk::format_replica(dir, spec)
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
