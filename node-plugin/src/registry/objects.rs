//! What this room asks of the API server, as a trait, so that reconciles run in tests without one.

use futures::future::BoxFuture;
use galleonfs_api::{GalleonReplica, GalleonVolume, StoragePool};
use uuid::Uuid;

/// Why the API server did not do it, by what to do next.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum ObjectError {
    /// Somebody changed the object since it was read: look again.
    #[error("the object was changed meanwhile")]
    Conflict,
    #[error("the object does not exist")]
    NotFound,
    /// The server understood and refused; the same request will be refused again.
    #[error("the API server refused: {0}")]
    Refused(String),
    /// No answer, or none that says anything: it may have happened or not.
    #[error("the API server did not answer: {0}")]
    Away(String),
}

/// An object about which something is told.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct Subject {
    pub kind: &'static str,
    pub name: String,
    pub uid: Option<String>,
}

/// What is told: becomes an Event.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Notice {
    pub warning: bool,
    pub reason: &'static str,
    pub action: &'static str,
    pub text: String,
}

/// The API server. Every write carries the resourceVersion that was read.
pub trait Objects: Send + Sync + 'static {
    /// Reads a volume as it is now, not from a cache.
    fn volume<'a>(&'a self, name: &'a str) -> BoxFuture<'a, Result<Option<GalleonVolume>, ObjectError>>;
    fn put_volume_status<'a>(&'a self, volume: &'a GalleonVolume) -> BoxFuture<'a, Result<GalleonVolume, ObjectError>>;
    fn put_replica_status<'a>(
        &'a self,
        replica: &'a GalleonReplica,
    ) -> BoxFuture<'a, Result<GalleonReplica, ObjectError>>;
    fn put_pool_status<'a>(&'a self, pool: &'a StoragePool) -> BoxFuture<'a, Result<StoragePool, ObjectError>>;
    /// All replicas of a volume, as they are now.
    fn replicas_of<'a>(&'a self, volume: &'a str) -> BoxFuture<'a, Result<Vec<GalleonReplica>, ObjectError>>;
    /// Reads a pool as it is now.
    fn pool<'a>(&'a self, name: &'a str) -> BoxFuture<'a, Result<Option<StoragePool>, ObjectError>>;
    /// The uid of a Node, as it is now.
    fn node_uid<'a>(&'a self, name: &'a str) -> BoxFuture<'a, Result<Option<Uuid>, ObjectError>>;
    /// Removes our finalizer from a replica whose directory is gone.
    fn drop_replica_finalizer<'a>(&'a self, replica: &'a GalleonReplica) -> BoxFuture<'a, Result<(), ObjectError>>;
    /// Makes an Event. That it could not be made is logged, and is no reason to stop.
    fn notify<'a>(&'a self, subject: &'a Subject, notice: &'a Notice) -> BoxFuture<'a, ()>;
}
