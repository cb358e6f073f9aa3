//! Decisions about volumes and replicas, from plain values.

use galleonfs_api::{
    Compression, Condition, Device as DeviceStatus, GalleonReplica, GalleonReplicaStatus, GalleonVolume,
    GalleonVolumeSpec, MEMBER_FINALIZER, ReplicaPhase, VolumeConfig, WriteConcern, condition, condition_type, reason,
};
use galleonfs_storage_engine::compress::Codec;
use galleonfs_storage_engine::replication::{Concern, Copies};
use galleonfs_storage_engine::volume::WhenFull;
use kube::ResourceExt;
use uuid::Uuid;

use crate::disk::BlockSize;
use crate::engine::{EngineError, ErrorKind, Settings};
use crate::pool::Pool;
use crate::served::{Device, Trouble};

/// An epoch that a compare-and-swap granted to this process.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Grant {
    pub epoch: i64,
    pub incarnation: Uuid,
}

impl Grant {
    /// The epoch, as the engine counts.
    pub fn epoch(&self) -> u64 {
        u64::try_from(self.epoch).expect("an epoch is never negative: the API server sees to that")
    }
}

/// Whether the guest may only read.
pub fn is_read_only(volume: &GalleonVolume) -> bool {
    let attach_to = volume.spec.attach_to.as_ref();
    attach_to.is_some_and(|attach_to| attach_to.read_only)
}

/// The size of a block in bytes. The API server takes those that there are; a newer one may know more.
pub fn block_size(bytes: i32) -> Option<BlockSize> {
    BlockSize::try_from(u64::try_from(bytes).ok()?).ok()
}

/// What this process has of a volume.
#[derive(Debug, Clone, Default)]
pub struct Local {
    pub grant: Option<Grant>,
    pub device: Option<Device>,
    /// It is staged here, by the records.
    pub staged: bool,
    /// What is on record is mounted on the present device.
    pub restored: bool,
    /// What its engine wants a person to know.
    pub trouble: Option<Trouble>,
    /// It is known that no predecessor of ours is still its primary.
    pub settled: bool,
    /// Of a volume with several replicas: the grant has served for its one attempt.
    pub spent: bool,
}

/// The next step for a volume.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Step {
    /// Nothing of it is here.
    Forget,
    /// Not attached here: ask whether a predecessor of ours is still its primary, and clear that.
    Settle,
    /// Not attached here any more, but mounted: wait until it is unstaged.
    Hold,
    /// Close it, then clear the primary.
    Release,
    /// Wait until the controller says which replicas are complete.
    AwaitConfig,
    /// Become its primary, in a new epoch.
    TakeOver,
    /// Somebody else took it over: stop serving.
    Yield,
    /// Open it in the granted epoch, or lead its replicas.
    Attach,
    /// What was begun under the grant came to nothing, or is over: end it, and forget the grant.
    GiveUp,
    /// Make it as large as its replica may be.
    Grow(u64),
    /// Mount again what was mounted before this process came.
    Restore,
    /// Say that its device is ready.
    Report,
    Nothing,
}

/// Decides. `wanted` is the volume's object while it is to be attached to `node`.
pub fn next(node: &str, wanted: Option<&GalleonVolume>, replica: Option<&GalleonReplica>, local: &Local) -> Step {
    let Some(volume) = wanted else {
        return match (local.grant, local.staged) {
            (Some(_), true) => Step::Hold,
            (Some(_), false) => Step::Release,
            (None, _) if local.device.is_some() => Step::Yield,
            (None, true) if local.settled => Step::Hold,
            (None, false) if local.settled => Step::Forget,
            (None, _) => Step::Settle,
        };
    };
    let Some(config) = volume.config() else {
        return Step::AwaitConfig;
    };
    let Some(grant) = local.grant else {
        return if local.device.is_some() {
            Step::Yield
        } else if volume.spec.is_replicated() && observed_bytes(volume).is_none() {
            Step::AwaitConfig
        } else {
            Step::TakeOver
        };
    };
    if released(config, &grant) {
        return Step::GiveUp;
    }
    if !holds(node, config, &grant) {
        return Step::Yield;
    }
    let Some(device) = &local.device else {
        return if local.spent { Step::GiveUp } else { Step::Attach };
    };
    let size = target_bytes(volume, replica);
    if device.size_bytes < size {
        Step::Grow(size)
    } else if local.staged && !local.restored {
        Step::Restore
    } else if !reported(node, volume, device, local.trouble.as_ref()) {
        Step::Report
    } else {
        Step::Nothing
    }
}

/// Whether this process is still the primary, as far as a cache can tell that may lag behind our own writes.
pub fn holds(node: &str, config: &VolumeConfig, grant: &Grant) -> bool {
    let ours = || {
        config.primary.as_deref() == Some(node)
            && config.incarnation.as_deref() == Some(grant.incarnation.to_string().as_str())
    };
    config.epoch < grant.epoch || (config.epoch == grant.epoch && ours())
}

/// Whether the epoch of this grant has ended in order: only the engine that it was granted to does that.
fn released(config: &VolumeConfig, grant: &Grant) -> bool {
    config.epoch == grant.epoch && config.primary.is_none()
}

/// The replicas that a configuration names; one may be named twice.
pub fn names(config: &VolumeConfig) -> impl Iterator<Item = &String> {
    config.in_sync.iter().chain(&config.syncing).chain(config.out.keys())
}

/// The configuration in which `node` is the primary. Whoever was catching up starts again from where it was known to be.
pub fn taken_over(node: &str, config: &VolumeConfig, incarnation: Uuid) -> (VolumeConfig, Grant) {
    let grant = Grant {
        epoch: config.epoch + 1,
        incarnation,
    };
    let mut new = VolumeConfig {
        epoch: grant.epoch,
        primary: Some(node.to_owned()),
        incarnation: Some(incarnation.to_string()),
        ..config.clone()
    };
    for name in std::mem::take(&mut new.syncing) {
        new.out.entry(name).or_default();
    }
    (new, grant)
}

/// The replica of a volume that can be opened here: one of this very volume, and complete.
pub fn complete<'a>(
    volume: &GalleonVolume,
    replicas: impl IntoIterator<Item = &'a GalleonReplica>,
) -> Option<&'a GalleonReplica> {
    let (uid, config) = (volume.uid()?, volume.config()?);
    replicas
        .into_iter()
        .find(|replica| replica.spec.volume_uid == uid && config.in_sync.contains(&replica.name_any()))
}

/// How large the volume may be here: the controller raises the volume first and its replicas when there is room. With
/// several replicas the device follows when all that are in sync have grown.
pub fn target_bytes(volume: &GalleonVolume, replica: Option<&GalleonReplica>) -> u64 {
    let wanted = volume.spec.size_bytes;
    let granted = if volume.spec.is_replicated() {
        observed_bytes(volume).unwrap_or(0)
    } else {
        replica.map_or(wanted, |replica| replica.spec.size_bytes)
    };
    u64::try_from(granted.min(wanted)).unwrap_or(0)
}

/// The size that every replica in sync has reached, once the controller has said so.
fn observed_bytes(volume: &GalleonVolume) -> Option<i64> {
    volume.status.as_ref()?.observed_size_bytes
}

fn device_status(node: &str, device: &Device) -> DeviceStatus {
    DeviceStatus {
        node_name: node.to_owned(),
        path: device.path.to_string_lossy().into_owned(),
        ready: true,
    }
}

/// What is said of a device that is there. One with trouble is still there: its pods may be reading what is whole.
fn attached(node: &str, device: &Device, trouble: Option<&Trouble>) -> Condition {
    let at = format!("{} on node {node}, through {}", device.path.display(), device.frontend);
    match trouble.map(Trouble::told) {
        None => Condition::new(condition_type::ATTACHED, true, reason::READY, at),
        Some((why, text)) => Condition::new(condition_type::ATTACHED, true, why, format!("{at}, but: {text}")),
    }
}

/// Whether the object says already how this device fares.
pub fn reported(node: &str, volume: &GalleonVolume, device: &Device, trouble: Option<&Trouble>) -> bool {
    let Some(status) = &volume.status else { return false };
    let wanted = attached(node, device, trouble);
    let said = condition::get(&status.conditions, condition_type::ATTACHED);
    status.device.as_ref() == Some(&device_status(node, device))
        && said.is_some_and(|said| said.is_true() && said.reason == wanted.reason && said.message == wanted.message)
}

/// Puts the device into the status. True when that changed anything.
pub fn report(node: &str, volume: &mut GalleonVolume, device: &Device, trouble: Option<&Trouble>) -> bool {
    let status = volume.status.get_or_insert_default();
    let wanted = Some(device_status(node, device));
    let said = condition::set(&mut status.conditions, attached(node, device, trouble));
    let moved = status.device != wanted;
    status.device = wanted;
    said || moved
}

/// Puts "not attached, because" into the status. True when that changed anything.
pub fn report_down(volume: &mut GalleonVolume, why: &str, text: String) -> bool {
    let status = volume.status.get_or_insert_default();
    let had = status.device.take().is_some();
    condition::set(
        &mut status.conditions,
        Condition::new(condition_type::ATTACHED, false, why, text),
    ) || had
}

/// Puts "not attached" into the status of a volume that `node` gave up; why it could not be attached is left there.
pub fn report_released(volume: &mut GalleonVolume, node: &str) {
    let status = volume.status.get_or_insert_default();
    let said = condition::get(&status.conditions, condition_type::ATTACHED);
    if said.is_some_and(|said| said.reason == reason::ATTACH_FAILED) {
        status.device = None;
    } else {
        report_down(volume, reason::DETACHED, format!("released by node {node}"));
    }
}

/// The next step for a replica.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum ReplicaStep {
    /// Its pool's directory may not be touched: a reason word and a sentence.
    Fail(&'static str, String),
    /// Make its directory.
    Make,
    /// Its directory is there.
    Ready,
    /// Remove its directory, then our finalizer.
    Remove,
    /// It is being deleted, but still open here.
    AwaitDetach,
}

/// Decides about a replica. `there` says whether its directory exists; `open` whether its volume is attached here.
pub fn next_replica(replica: &GalleonReplica, pool: Option<&Pool>, there: bool, open: bool) -> ReplicaStep {
    let name = &replica.spec.pool_name;
    let deleting = may_go(replica);
    match pool {
        _ if deleting && open => ReplicaStep::AwaitDetach,
        None => ReplicaStep::Fail(
            reason::POOL_MISSING,
            format!("there is no StoragePool {name}: make it again, or delete this replica's volume"),
        ),
        Some(Pool::Refused { reason: why, message }) => ReplicaStep::Fail(
            reason::POOL_NOT_READY,
            format!("pool {name} is not ready ({why}): {message}"),
        ),
        Some(Pool::Ours { .. }) if deleting => ReplicaStep::Remove,
        Some(Pool::Ours { .. }) if there => ReplicaStep::Ready,
        // Once it held data. An empty one in its place would be a silent loss.
        Some(Pool::Ours { path }) if was_ready(replica) => {
            let uid = replica.uid().unwrap_or_default();
            let text = format!(
                "{}/replicas/{uid} is gone: restore it, or delete the volume if its data is lost",
                path.display()
            );
            ReplicaStep::Fail(reason::DATA_MISSING, text)
        }
        Some(Pool::Ours { .. }) => ReplicaStep::Make,
    }
}

/// Whether its data is to be removed. One that its volume may still name is kept, and goes on, whoever deletes the object.
fn may_go(replica: &GalleonReplica) -> bool {
    let kept = replica.finalizers().iter().any(|name| name == MEMBER_FINALIZER);
    replica.metadata.deletion_timestamp.is_some() && !kept
}

fn was_ready(replica: &GalleonReplica) -> bool {
    replica.phase() == ReplicaPhase::Ready
        || replica
            .status
            .as_ref()
            .is_some_and(|status| status.observed_size_bytes.is_some())
}

/// The status of a replica: what is seen becomes phase, size and condition.
pub fn replica_status(
    before: Option<&GalleonReplicaStatus>,
    phase: ReplicaPhase,
    size_bytes: Option<i64>,
    why: &str,
    text: String,
) -> GalleonReplicaStatus {
    let mut status = before.cloned().unwrap_or_default();
    status.phase = phase;
    // Once known, the size stays known: it is the proof that there was data here.
    status.observed_size_bytes = size_bytes.or(status.observed_size_bytes);
    let ready = phase == ReplicaPhase::Ready;
    condition::set(
        &mut status.conditions,
        Condition::new(condition_type::READY, ready, why, text),
    );
    status
}

/// The reason word for an error of the engine's.
pub fn reason_of(error: &EngineError) -> &'static str {
    match error.kind() {
        ErrorKind::NoSpace => reason::DISK_FULL,
        ErrorKind::Corrupt => reason::CORRUPT,
        ErrorKind::NotFound => reason::DATA_MISSING,
        ErrorKind::Unsupported => reason::NEWER_FORMAT,
        ErrorKind::WrongIdentity => reason::OTHER_VOLUME,
        ErrorKind::Retry | ErrorKind::Failed => reason::IO_ERROR,
    }
}

/// An error with its causes, in one line.
pub fn text_of(error: &EngineError) -> String {
    let mut text = error.to_string();
    let mut cause = std::error::Error::source(error);
    while let Some(error) = cause {
        text = format!("{text}: {error}");
        cause = error.source();
    }
    text
}

/// What must be true of a write before it is answered, as its class says. That `durable` writes are flushed besides is
/// among the [`settings`].
pub fn concern(spec: &GalleonVolumeSpec) -> Concern {
    Concern {
        min_in_sync: usize::try_from(spec.min_in_sync()).unwrap_or(1),
        min_zones: spec.write_concern.min_zones(),
        copies: match spec.write_concern {
            WriteConcern::Acknowledged => Copies::First,
            WriteConcern::Durable | WriteConcern::Replicated | WriteConcern::Distributed => Copies::All,
        },
    }
}

/// How a volume is served, as its class says.
pub fn settings(spec: &GalleonVolumeSpec) -> Settings {
    let seconds = spec
        .no_space_timeout_seconds
        .and_then(|seconds| u64::try_from(seconds).ok());
    Settings {
        compression: spec.compression.map(|compression| match compression {
            Compression::Lz4 => Codec::Lz4,
            Compression::Zstd => Codec::Zstd,
        }),
        sector_bytes: u32::try_from(spec.sector_size).expect("the API server takes 512 and 4096 only"),
        when_full: seconds.map_or(WhenFull::Wait, |seconds| WhenFull::RefuseAfter { ms: seconds * 1000 }),
        writes_through: spec.write_concern == WriteConcern::Durable,
    }
}
