//! Opening the only replica of a volume, and what follows when a volume has its device.

use std::sync::Arc;

use galleonfs_api::{GalleonReplica, GalleonVolume, reason};
use kube::ResourceExt;
use tokio::time::Duration;
use uuid::Uuid;

use super::volumes::{about, warning};
use super::{Key, Next, Registry, Retry, plan};
use crate::pool::{Pool, REPLICAS};
use crate::served::{AttachSpec, Device, Presence};

impl Registry {
    pub(super) async fn attach(
        &self,
        name: &str,
        object: &GalleonVolume,
        replica: Option<Arc<GalleonReplica>>,
    ) -> Result<Next, Retry> {
        if self.served.get(name).is_none() {
            self.served.set(name, Some(Presence::Coming));
        }
        if let Some(pool) = replica.as_ref().map(|replica| &replica.spec.pool_name)
            && self.pools.get(pool).is_none()
            && self.cache.pools.get(pool).is_some()
        {
            // Not looked at since our start. It will be, and wakes us.
            return Ok(Next::Wait);
        }
        let opened = match self.spec(name, object, replica.as_deref()) {
            Ok(spec) => self
                .engine
                .attach(spec)
                .await
                .map_err(|error| (plan::reason_of(&error), plan::text_of(&error))),
            Err(why) => Err(why),
        };
        match opened {
            Ok(device) => {
                self.trouble(replica.as_deref(), None);
                self.came_up(name, device);
                Ok(Next::Again(Duration::ZERO))
            }
            Err((why, text)) => {
                self.trouble(replica.as_deref(), Some((why, text.clone())));
                self.tell_failure(name, object, &text).await?;
                Err(Retry::Later(format!("attach of {name} failed: {text}")))
            }
        }
    }

    /// What to open, or a reason word and a sentence why nothing can be.
    fn spec(
        &self,
        name: &str,
        object: &GalleonVolume,
        replica: Option<&GalleonReplica>,
    ) -> Result<AttachSpec, (&'static str, String)> {
        let node = &self.node;
        let Some(replica) = replica else {
            return Err((
                reason::NO_REPLICA,
                format!("node {node} has no complete replica of volume {name}"),
            ));
        };
        let (pool_name, replica_name) = (&replica.spec.pool_name, replica.name_any());
        let path = match self.pools.get(pool_name) {
            Some(Pool::Ours { path }) => path,
            Some(Pool::Refused { reason: why, message }) => {
                return Err((
                    reason::POOL_NOT_READY,
                    format!("pool {pool_name} is not ready ({why}): {message}"),
                ));
            }
            None => {
                return Err((
                    reason::POOL_MISSING,
                    format!("pool {pool_name} is not known on node {node} yet"),
                ));
            }
        };
        let uuid = |what: &str, uid: Option<String>| {
            let uid = uid.unwrap_or_default();
            let bad = || (reason::IO_ERROR, format!("{what} has the uid {uid:?}, which is none"));
            Uuid::parse_str(&uid).map_err(|_| bad())
        };
        let grant = self
            .own(|own| own.grants.get(name).copied())
            .expect("an attach follows a grant");
        let replica_uid = uuid(&replica_name, replica.uid())?;
        Ok(AttachSpec {
            volume: name.to_owned(),
            volume_uid: uuid(name, object.uid())?,
            replica_uid,
            cluster_id: self.cluster_id,
            replica_dir: path.join(REPLICAS).join(replica_uid.to_string()),
            epoch: grant.epoch(),
            size_bytes: plan::target_bytes(object, Some(replica)),
            read_only: plan::is_read_only(object),
            settings: plan::settings(&object.spec),
            key: None,
        })
    }

    /// Remembers why a replica cannot be opened, for its own status.
    fn trouble(&self, replica: Option<&GalleonReplica>, trouble: Option<(&'static str, String)>) {
        let Some(replica) = replica else { return };
        let name = replica.name_any();
        let news = self.own(|own| match trouble.clone() {
            Some(trouble) => own.troubles.insert(name.clone(), trouble),
            None => own.troubles.remove(&name),
        }) != trouble;
        if news {
            self.queue.wake(Key::Replica(name));
        }
    }

    /// A volume has its device.
    pub(super) fn came_up(&self, name: &str, device: Device) {
        tracing::info!(volume = name, device = %device.path.display(), "attached");
        // What is staged from now on is mounted on this device; only what was staged before must be mounted again.
        let fresh = self.stager.records().staged(name).is_none();
        self.own(|own| {
            own.restored.remove(name);
            if fresh {
                own.restored.insert(name.to_owned());
            }
        });
        self.here(name, device);
    }

    /// Everybody who asks hears why a volume could not be brought up.
    pub(super) async fn tell_failure(&self, name: &str, object: &GalleonVolume, text: &str) -> Result<(), Retry> {
        self.served.set(name, Some(Presence::Failed(text.to_owned())));
        self.notice(
            about(name, Some(object)),
            warning(reason::ATTACH_FAILED, "Attach", text.to_owned()),
        )
        .await;
        self.report_failure(name, text).await
    }

    pub(super) fn here(&self, name: &str, device: Device) {
        self.served.set(name, Some(Presence::Here(device)));
        // Its replica reports the size.
        for replica in self.cache.replicas.list() {
            if replica.spec.volume_name == name {
                self.queue.wake(Key::Replica(replica.name_any()));
            }
        }
    }
}
