//! Who leads a volume, looked up for the replicas on this node before they obey another one.
//!
//! ```text
//! certificate of the peer: uid of a Node ─┐
//!                                         ├─ the same node? ─► it leads
//! volume's object: name of the primary ───┘   in which epoch, by which start: the object says
//! ```
//!
//! The object names the node, and the admission policy lets a node plugin name none but its own; the certificate bears the
//! node's uid. The Node object is what ties the two together. It is read anew each time, because a node that is removed and
//! joins again under its name is another one; beside the volume, so that a takeover waits as long as for one read.

use std::collections::HashMap;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use galleonfs_api::VolumeConfig;
use galleonfs_storage_engine::replication::Incarnation;
use galleonfs_storage_engine::types::Epoch;
use kube::ResourceExt;
use tokio::runtime::Handle;
use tokio::sync::Semaphore;
use tokio::time::{Duration, Instant};
use uuid::Uuid;

use super::objects::{ObjectError, Objects};
use crate::engine::{Leader, Leaders, Leadership, LookUpDone};

/// How long one look-up may take: no longer than a primary waits for its members.
const DEADLINE: Duration = Duration::from_secs(5);

/// Bad news is not told faster than this: the next promise would be looked up at once.
const BAD_NEWS_AFTER: Duration = Duration::from_millis(500);

/// Look-ups that are out at a time, of all volumes on this node. A node that dies has all its volumes taken over at once.
const AT_ONCE_MAX: usize = 16;

/// For all volumes. Cheap to clone; all clones are one.
#[derive(Clone)]
pub struct LookUps(Arc<Inner>);

struct Inner {
    objects: Arc<dyn Objects>,
    permits: Semaphore,
    /// Names of nodes by uid, as they were last seen: a guess at what the object will say.
    names: Mutex<HashMap<Uuid, String>>,
    /// The last one failed, and this was said.
    failing: AtomicBool,
    deadline: Duration,
}

impl LookUps {
    pub fn new(objects: Arc<dyn Objects>) -> LookUps {
        LookUps::with_deadline(objects, DEADLINE)
    }

    pub(super) fn with_deadline(objects: Arc<dyn Objects>, deadline: Duration) -> LookUps {
        LookUps(Arc::new(Inner {
            objects,
            permits: Semaphore::new(AT_ONCE_MAX),
            names: Mutex::default(),
            failing: AtomicBool::new(false),
            deadline,
        }))
    }

    /// Of one volume. To be called on the runtime that shall do the requests.
    pub fn of(&self, volume: &str, volume_uid: Uuid) -> Arc<dyn Leaders> {
        Arc::new(VolumeLeaders {
            inner: self.0.clone(),
            volume: volume.to_owned(),
            volume_uid,
            runtime: Handle::current(),
        })
    }
}

struct VolumeLeaders {
    inner: Arc<Inner>,
    volume: String,
    volume_uid: Uuid,
    runtime: Handle,
}

impl Leaders for VolumeLeaders {
    fn look_up(&self, peer: Uuid, done: LookUpDone) {
        let (inner, volume, volume_uid) = (self.inner.clone(), self.volume.clone(), self.volume_uid);
        self.runtime.spawn(async move {
            let permit = inner.permits.acquire().await.expect("it is never closed");
            let asked = Instant::now();
            let found = tokio::time::timeout(inner.deadline, inner.read(&volume, volume_uid, peer)).await;
            drop(permit);
            let found = found.unwrap_or_else(|_| Err(format!("no answer within {:?}", inner.deadline)));
            inner.tell_failure(&volume, found.as_ref().err());
            if found.is_err() {
                tokio::time::sleep_until(asked + BAD_NEWS_AFTER).await;
            }
            done(found.ok());
        });
    }
}

impl Inner {
    /// Logs when looking up begins to fail, and when that is over.
    fn tell_failure(&self, volume: &str, why: Option<&String>) {
        let failed = self.failing.swap(why.is_some(), Ordering::Relaxed);
        match why {
            Some(why) if !failed => {
                tracing::warn!(volume, %why, "who leads a volume cannot be looked up: nothing is promised to new leaders");
            }
            None if failed => tracing::info!("who leads a volume can be looked up again"),
            Some(_) | None => {}
        }
    }

    async fn read(&self, volume: &str, volume_uid: Uuid, peer: Uuid) -> Result<Leadership, String> {
        let text = |error: ObjectError| error.to_string();
        let guess = self.names().get(&peer).cloned();
        let guessed = async {
            match &guess {
                Some(name) => Some(self.objects.node_uid(name).await),
                None => None,
            }
        };
        let (object, guessed) = tokio::join!(self.objects.volume(volume), guessed);
        let object = object.map_err(text)?;
        // One of another uid is another volume: nobody leads this one any more.
        let object = object.filter(|object| object.uid() == Some(volume_uid.to_string()));
        let config = object.as_ref().and_then(|object| object.config());
        let Some(VolumeConfig {
            epoch,
            primary,
            incarnation,
            ..
        }) = config
        else {
            let epoch = Epoch(0);
            return Ok(Leadership { epoch, leader: None });
        };
        let epoch = Epoch(u32::try_from(*epoch).map_err(|_| format!("epoch {epoch} is none"))?);
        let (Some(name), Some(incarnation)) = (primary, incarnation) else {
            return Ok(Leadership { epoch, leader: None });
        };
        let start = Uuid::parse_str(incarnation).map_err(|_| format!("its incarnation {incarnation:?} is none"))?;
        let node = match guessed {
            Some(node) if guess.as_ref() == Some(name) => node,
            _ => self.objects.node_uid(name).await,
        };
        let node = node.map_err(text)?;
        if let Some(node) = node {
            self.names().insert(node, name.clone());
        }
        let leader = Leader {
            incarnation: Incarnation(start.into_bytes()),
            name: name.clone(),
            node,
        };
        Ok(Leadership {
            epoch,
            leader: Some(leader),
        })
    }

    fn names(&self) -> std::sync::MutexGuard<'_, HashMap<Uuid, String>> {
        self.names.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
