//! What the engine is told of volumes with several replicas: which replicas this node hosts, which volumes it leads, and
//! where the replicas on other nodes are.

use std::fmt;
use std::net::SocketAddr;
use std::path::PathBuf;
use std::sync::Arc;

use galleonfs_storage_engine::replication::primary::Decision;
use galleonfs_storage_engine::replication::{Concern, Config, Incarnation, Stamp, Zones};
use galleonfs_storage_engine::types::Epoch;
use uuid::Uuid;

use super::Settings;
use crate::disk::BlockSize;

/// A replica that takes part in a volume of several, wherever that is attached.
#[derive(Clone, Debug)]
pub struct HostSpec {
    /// Object name of the volume.
    pub volume: String,
    pub volume_uid: Uuid,
    /// Object name of the replica.
    pub replica: String,
    pub replica_uid: Uuid,
    pub cluster_id: Uuid,
    pub replica_dir: PathBuf,
    /// Asked before another node is obeyed.
    pub leaders: Arc<dyn Leaders>,
}

/// A volume of several replicas that this node was made the primary of.
#[derive(Clone, Debug)]
pub struct LeadSpec {
    /// Object name of the volume.
    pub volume: String,
    pub volume_uid: Uuid,
    pub cluster_id: Uuid,
    /// The epoch that this node was made primary in, and the one start that it was granted to. A grant serves for one
    /// attempt: whatever comes of it, the next one needs another.
    pub epoch: u64,
    pub incarnation: Uuid,
    pub size_bytes: u64,
    pub block_size: BlockSize,
    pub read_only: bool,
    pub settings: Settings,
    /// With so many in sync nobody else is brought up to date.
    pub replicas: usize,
    /// What must be true of a write before it is answered.
    pub concern: Concern,
    /// The replica on this node, if there is one: reads go there.
    pub prefer: Option<Uuid>,
    pub configs: Arc<dyn Configs>,
}

/// Reads and changes the configuration of one volume. Whoever asks must not be made to wait: the answer is given to
/// `done`, on any thread, exactly once.
pub trait Configs: Send + Sync {
    /// Reads it from the API server itself, not from a cache. `None`: it could not be read, or names a replica that is
    /// not known.
    fn read(&self, done: ReadDone);
    /// Writes `config` if the object is still as it was when it was read with this stamp.
    fn propose(&self, expected: Stamp, config: Config, done: ProposeDone);
    /// Where the replicas stand that were named when it was last read. From memory: it does not wait.
    fn zones(&self) -> Zones {
        Zones::new()
    }
}

pub type ReadDone = Box<dyn FnOnce(Option<(Stamp, Config)>) + Send>;
pub type ProposeDone = Box<dyn FnOnce(Decision) + Send>;

impl fmt::Debug for dyn Configs {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Configs")
    }
}

/// Says who leads one volume. Whoever asks must not be made to wait: the answer is given to `done`, on any thread, exactly
/// once.
pub trait Leaders: Send + Sync {
    /// Reads it from the API server itself, not from a cache. `peer` is the node that says it leads: whoever is asked may
    /// begin with that. `None`: it could not be read. That is not told at once, so that whoever asks again does not ask
    /// without a pause.
    fn look_up(&self, peer: Uuid, done: LookUpDone);
}

pub type LookUpDone = Box<dyn FnOnce(Option<Leadership>) + Send>;

impl fmt::Debug for dyn Leaders {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Leaders")
    }
}

/// Who leads a volume, as its object says.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Leadership {
    pub epoch: Epoch,
    /// Nobody before the first epoch, and after the orderly end of one.
    pub leader: Option<Leader>,
}

/// The one start of a primary that leads.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Leader {
    pub incarnation: Incarnation,
    /// Name of the node that the object names.
    pub name: String,
    /// Its uid, which its certificate bears. None: the cluster has no such node.
    pub node: Option<Uuid>,
}

/// Where a replica is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Route {
    pub replica: Uuid,
    /// The uid of the node, which its certificate bears.
    pub node: Uuid,
    pub addresses: Vec<SocketAddr>,
}

/// How a hosted replica fares.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Hosted {
    /// The size that also a power cut would leave.
    pub size_bytes: u64,
    /// Why it takes no more writes, if so.
    pub stopped: Option<String>,
}
