//! Replicas: their directories, made and removed, and how they fare.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use galleonfs_api::{GalleonReplica, GalleonReplicaStatus, ReplicaPhase, reason};
use kube::ResourceExt;
use uuid::Uuid;

use super::objects::{Notice, Subject};
use super::plan::{self, ReplicaStep};
use super::{Key, Next, Registry, Retry};
use crate::engine::EngineError;
use crate::pool::{Pool, REPLICAS};
use crate::served::{FormatSpec, ReplicaDisks, salt};

impl Registry {
    pub(super) async fn reconcile_replica(&self, name: &str) -> Result<Next, Retry> {
        let Some(replica) = self
            .cache
            .replicas
            .get(name)
            .filter(|replica| replica.spec.node_name == self.node)
        else {
            self.unhost(name).await?;
            self.own(|own| own.troubles.remove(name));
            return Ok(Next::Gone);
        };
        let volume = &replica.spec.volume_name;
        let replicated = replica.spec.replicated;
        // One of several may go while its volume is in use: it is no part of it any more, the controller saw to that.
        let open =
            !replicated && (self.engine.device(volume).is_some() || self.own(|own| own.grants.contains_key(volume)));
        let pool = self.pools.get(&replica.spec.pool_name);
        if pool.is_none() && self.cache.pools.get(&replica.spec.pool_name).is_some() {
            // Not looked at since our start. It will be, and wakes us.
            return Ok(Next::Wait);
        }
        let dir = match &pool {
            Some(Pool::Ours { path }) => Some(directory(path, &replica)?),
            Some(Pool::Refused { .. }) | None => None,
        };
        let there = match dir.clone() {
            Some(_) if replicated && self.is_hosted(&replica) => true,
            Some(dir) => on_thread("looking for a replica", move || Ok(dir.symlink_metadata().is_ok())).await?,
            None => false,
        };
        match (plan::next_replica(&replica, pool.as_ref(), there, open), dir) {
            (ReplicaStep::Fail(why, text), _) => self.replica_failed(&replica, why, text).await,
            (ReplicaStep::AwaitDetach, _) => {
                let text = format!("volume {volume} is still attached to node {}", self.node);
                let status = plan::replica_status(
                    replica.status.as_ref(),
                    ReplicaPhase::Removing,
                    None,
                    reason::ATTACHED,
                    text,
                );
                self.put_replica(&replica, status).await?;
                Ok(Next::Wait)
            }
            (ReplicaStep::Make, Some(dir)) => self.make(&replica, dir).await,
            (ReplicaStep::Ready, Some(dir)) => self.replica_there(&replica, dir).await,
            (ReplicaStep::Remove, Some(dir)) => self.remove(&replica, dir).await,
            (ReplicaStep::Make | ReplicaStep::Ready | ReplicaStep::Remove, None) => {
                unreachable!("these steps are for pools that are ours")
            }
        }
    }

    async fn make(&self, replica: &GalleonReplica, dir: PathBuf) -> Result<Next, Retry> {
        let block_bytes = replica.spec.block_size;
        let spec = FormatSpec {
            volume_uid: uid("its volume", &replica.spec.volume_uid)?,
            replica_uid: uid("it", &replica.uid().unwrap_or_default())?,
            cluster_id: self.cluster_id,
            block_size: plan::block_size(block_bytes).ok_or_else(|| {
                Retry::Later(format!(
                    "its blocks have {block_bytes} bytes, which this version cannot make"
                ))
            })?,
            size_bytes: u64::try_from(replica.spec.size_bytes).unwrap_or(0),
            salt: salt(),
            key: None,
        };
        let disks = self.disks.clone();
        let at = dir.clone();
        match on_disks("making a replica", disks, move |disks| disks.make(&at, &spec)).await? {
            Ok(()) => {
                tracing::info!(replica = %replica.name_any(), volume = %replica.spec.volume_name, "made");
                self.replica_there(replica, dir).await
            }
            Err(error) => {
                let text = format!("its directory could not be made: {}", plan::text_of(&error));
                self.replica_failed(replica, plan::reason_of(&error), text).await
            }
        }
    }

    /// Its directory is there.
    async fn replica_there(&self, replica: &GalleonReplica, dir: PathBuf) -> Result<Next, Retry> {
        if replica.spec.replicated {
            return self.host(replica, dir).await;
        }
        if let Some((why, text)) = self.own(|own| own.troubles.get(&replica.name_any()).cloned()) {
            let status = plan::replica_status(replica.status.as_ref(), ReplicaPhase::Failed, None, why, text);
            self.put_replica(replica, status).await?;
            // It is the volume that tries to open it again.
            return Ok(Next::Wait);
        }
        // A store takes the size it is opened with; while it is open, growing it is a step of its own.
        let device = self.engine.device(&replica.spec.volume_name);
        let size = device.map_or(replica.spec.size_bytes, |device| {
            i64::try_from(device.size_bytes)
                .unwrap_or(i64::MAX)
                .min(replica.spec.size_bytes)
        });
        self.ready(replica, size).await?;
        Ok(Next::Wait)
    }

    pub(super) async fn ready(&self, replica: &GalleonReplica, size_bytes: i64) -> Result<(), Retry> {
        let text = format!("on node {}", self.node);
        let status = plan::replica_status(
            replica.status.as_ref(),
            ReplicaPhase::Ready,
            Some(size_bytes),
            reason::READY,
            text,
        );
        self.forget_notice(&about(replica));
        self.put_replica(replica, status).await
    }

    pub(super) async fn replica_failed(
        &self,
        replica: &GalleonReplica,
        why: &'static str,
        text: String,
    ) -> Result<Next, Retry> {
        let notice = Notice {
            warning: true,
            reason: why,
            action: "Serve",
            text: text.clone(),
        };
        self.notice(about(replica), notice).await;
        let status = plan::replica_status(replica.status.as_ref(), ReplicaPhase::Failed, None, why, text.clone());
        self.put_replica(replica, status).await?;
        Err(Retry::Later(format!("replica {}: {text}", replica.name_any())))
    }

    async fn remove(&self, replica: &GalleonReplica, dir: PathBuf) -> Result<Next, Retry> {
        self.unhost(&replica.name_any()).await?;
        let disks = self.disks.clone();
        if let Err(error) = on_disks("removing a replica", disks, move |disks| disks.remove(&dir)).await? {
            let text = format!("its directory could not be removed: {}", plan::text_of(&error));
            return self.replica_failed(replica, plan::reason_of(&error), text).await;
        }
        let volume = &replica.spec.volume_name;
        let records = self.stager.records();
        let in_use = self.own(|own| own.grants.contains_key(volume));
        let of_volume = records
            .get(volume)
            .is_some_and(|record| record.volume_uid.as_ref() == Some(&replica.spec.volume_uid));
        if of_volume && !in_use {
            // What this node remembered of it dies with its data.
            let forgotten = records.change(volume, |record| record.formatting = None).await;
            forgotten.map_err(|error| Retry::Later(error.text()))?;
        }
        tracing::info!(replica = %replica.name_any(), %volume, "removed");
        self.objects.drop_replica_finalizer(replica).await?;
        Ok(Next::Wait)
    }

    async fn put_replica(&self, replica: &GalleonReplica, status: GalleonReplicaStatus) -> Result<(), Retry> {
        if replica.status.as_ref() == Some(&status) {
            return Ok(());
        }
        let wanted = GalleonReplica {
            status: Some(status),
            ..replica.clone()
        };
        self.objects.put_replica_status(&wanted).await?;
        // Whether its volume can be opened may depend on it.
        self.queue.wake(Key::Volume(replica.spec.volume_name.clone()));
        Ok(())
    }
}

pub(super) fn about(replica: &GalleonReplica) -> Subject {
    Subject {
        kind: "GalleonReplica",
        name: replica.name_any(),
        uid: replica.uid(),
    }
}

pub(super) fn uid(what: &str, uid: &str) -> Result<Uuid, Retry> {
    Uuid::parse_str(uid).map_err(|_| Retry::Later(format!("{what} has the uid {uid:?}, which is none")))
}

/// Where a replica lives. Its uid is checked: it becomes part of a path that is removed with all that is in it.
fn directory(pool: &Path, replica: &GalleonReplica) -> Result<PathBuf, Retry> {
    Ok(pool
        .join(REPLICAS)
        .join(uid("it", &replica.uid().unwrap_or_default())?.to_string()))
}

async fn on_disks<T: Send + 'static>(
    what: &str,
    disks: Arc<dyn ReplicaDisks>,
    work: impl FnOnce(&dyn ReplicaDisks) -> Result<T, EngineError> + Send + 'static,
) -> Result<Result<T, EngineError>, Retry> {
    on_thread(what, move || Ok(work(disks.as_ref()))).await
}

/// Runs something that may block on a thread for that. A disk that hangs holds up this one object.
pub(super) async fn on_thread<T: Send + 'static>(
    what: &str,
    work: impl FnOnce() -> Result<T, Retry> + Send + 'static,
) -> Result<T, Retry> {
    match tokio::task::spawn_blocking(work).await {
        Ok(outcome) => outcome,
        Err(join) => Err(Retry::Later(format!("{what} broke off: {join}"))),
    }
}
