//! Replicas of volumes with several: open from the time they are made, wherever their volume is attached.
//!
//! ```text
//! directory made ──► hosted ──► Ready
//!                      ▲  │ it stops: a failed disk, damage
//!                waited│  ▼
//!                     Failed
//! ```
//!
//! Whether it is in sync is no business of its node's: the volume's primary finds that out.

use std::path::PathBuf;

use galleonfs_api::{GalleonReplica, reason};
use kube::ResourceExt;
use tokio::time::{Duration, Instant};
use uuid::Uuid;

use super::objects::Notice;
use super::patience::Patience;
use super::replicas::{about, uid};
use super::{Next, Registry, Retry, plan};
use crate::engine::{EngineError, HostSpec, Hosted};

/// How often a hosted replica is looked at: a look at memory.
const LOOK_EVERY: Duration = Duration::from_secs(10);

/// One that ran this long before it stopped is opened again as if it had never stopped before.
const RAN_WELL: Duration = Duration::from_secs(600);

/// A replica that was hosted by this process.
#[derive(Debug, Clone, Copy)]
pub struct Hosting {
    uid: Uuid,
    since: Instant,
    /// It stopped, or could not be opened.
    patience: Option<Patience>,
}

impl Hosting {
    /// It may be tried again at once.
    #[cfg(test)]
    pub(super) fn forgive(&mut self) {
        self.patience = None;
    }
}

impl Registry {
    /// Whether a replica is hosted and works: then its directory is there.
    pub(super) fn is_hosted(&self, replica: &GalleonReplica) -> bool {
        let uid = replica.uid().and_then(|uid| Uuid::parse_str(&uid).ok());
        let hosted = uid.and_then(|uid| self.engine.hosted(uid));
        hosted.is_some_and(|hosted| hosted.stopped.is_none())
    }

    /// Has a replica whose directory is there take part in its volume, and says so.
    pub(super) async fn host(&self, replica: &GalleonReplica, dir: PathBuf) -> Result<Next, Retry> {
        let name = replica.name_any();
        let own_uid = uid("it", &replica.uid().unwrap_or_default())?;
        let before = self.own(|own| own.hosting.get(&name).copied());
        if before.is_some_and(|before| before.uid != own_uid) {
            self.unhost(&name).await?;
        }
        match self.engine.hosted(own_uid) {
            Some(Hosted { stopped: Some(why), .. }) => {
                if let Err(error) = self.engine.unhost(own_uid).await {
                    tracing::warn!(replica = %name, why = %plan::text_of(&error), "a replica that stopped cannot be closed");
                }
                let text = format!("it stopped and is opened again: {why}");
                self.stopped(replica, own_uid, reason::IO_ERROR, text).await
            }
            Some(hosted) => self.hosted(replica, own_uid, hosted).await,
            None => {
                let patience = before.and_then(|before| before.patience);
                if let Some(left) = patience.as_ref().and_then(Patience::remaining) {
                    return Ok(Next::Again(left));
                }
                let volume_uid = uid("its volume", &replica.spec.volume_uid)?;
                let spec = HostSpec {
                    volume: replica.spec.volume_name.clone(),
                    volume_uid,
                    replica: name.clone(),
                    replica_uid: own_uid,
                    cluster_id: self.cluster_id,
                    replica_dir: dir,
                    leaders: self.leaders.of(&replica.spec.volume_name, volume_uid),
                };
                let since = Instant::now();
                // Before it is opened: whatever comes of that is closed when its object is gone.
                self.own(|own| {
                    let hosting = Hosting {
                        uid: own_uid,
                        since,
                        patience,
                    };
                    own.hosting.insert(name.clone(), hosting)
                });
                if let Err(error) = self.engine.host(spec).await {
                    let text = format!("it could not be opened: {}", plan::text_of(&error));
                    return self.stopped(replica, own_uid, plan::reason_of(&error), text).await;
                }
                tracing::info!(replica = %name, volume = %replica.spec.volume_name, "takes part in its volume");
                match self.engine.hosted(own_uid) {
                    Some(hosted) => self.hosted(replica, own_uid, hosted).await,
                    None => Err(Retry::Soon(format!("replica {name} was opened and is closed again"))),
                }
            }
        }
    }

    /// It takes part: grows if it shall, and says how large it is.
    async fn hosted(&self, replica: &GalleonReplica, own_uid: Uuid, hosted: Hosted) -> Result<Next, Retry> {
        let wanted = u64::try_from(replica.spec.size_bytes).unwrap_or(0);
        let mut size_bytes = hosted.size_bytes;
        let mut trouble = None;
        if size_bytes < wanted {
            match self.engine.grow_hosted(own_uid, wanted).await {
                Ok(grown) => {
                    tracing::info!(replica = %replica.name_any(), bytes = grown, "grown");
                    size_bytes = grown;
                }
                Err(error) => trouble = Some(error),
            }
        }
        self.ready(replica, i64::try_from(size_bytes).unwrap_or(i64::MAX))
            .await?;
        match trouble {
            Some(error) => self.cannot_grow(replica, wanted, &error).await,
            None if size_bytes < wanted => Err(Retry::Later(format!(
                "replica {} has {size_bytes} of {wanted} bytes",
                replica.name_any()
            ))),
            None => Ok(Next::Again(LOOK_EVERY)),
        }
    }

    async fn cannot_grow(&self, replica: &GalleonReplica, wanted: u64, error: &EngineError) -> Result<Next, Retry> {
        let text = format!("growing to {wanted} bytes: {}", plan::text_of(error));
        let notice = Notice {
            warning: true,
            reason: plan::reason_of(error),
            action: "Grow",
            text: text.clone(),
        };
        self.notice(about(replica), notice).await;
        Err(Retry::Later(format!("replica {}: {text}", replica.name_any())))
    }

    /// It does not take part: says so, and tries again later.
    async fn stopped(
        &self,
        replica: &GalleonReplica,
        own_uid: Uuid,
        why: &'static str,
        text: String,
    ) -> Result<Next, Retry> {
        let patience = self.own(|own| {
            let hosting = own.hosting.entry(replica.name_any()).or_insert(Hosting {
                uid: own_uid,
                since: Instant::now(),
                patience: None,
            });
            let earlier = hosting.patience.filter(|_| hosting.since.elapsed() < RAN_WELL);
            let patience = Patience::after_failure(earlier);
            hosting.patience = Some(patience);
            patience
        });
        tracing::warn!(replica = %replica.name_any(), volume = %replica.spec.volume_name, %text, "does not take part");
        match self.replica_failed(replica, why, text).await {
            // That is told; when it is tried again is decided here.
            Err(Retry::Later(_)) | Ok(_) => Ok(Next::Again(patience.remaining().unwrap_or_default())),
            Err(soon) => Err(soon),
        }
    }

    /// Closes what was hosted under this name.
    pub(super) async fn unhost(&self, name: &str) -> Result<(), Retry> {
        let Some(hosting) = self.own(|own| own.hosting.get(name).copied()) else {
            return Ok(());
        };
        let closed = self.engine.unhost(hosting.uid).await;
        closed.map_err(|error| Retry::Later(format!("closing replica {name}: {}", plan::text_of(&error))))?;
        self.own(|own| own.hosting.remove(name));
        Ok(())
    }
}
