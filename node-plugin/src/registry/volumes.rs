//! Volumes: taken over, opened, grown, mounted again, reported, released.

use std::sync::Arc;

use galleonfs_api::{GalleonReplica, GalleonVolume, reason};
use kube::ResourceExt;
use tokio::time::{Duration, Instant};
use uuid::Uuid;

use super::leading::KEEP_EVERY;
use super::objects::{Notice, ObjectError, Subject};
use super::patience::Patience;
use super::plan::{self, Grant, Local, Step};
use super::{Key, Next, Registry, Retry};
use crate::mount::MountError;
use crate::served::{Presence, Unguarded};

/// How often an attached volume is asked for trouble: a look at memory.
const TROUBLE_EVERY: Duration = Duration::from_secs(30);

/// How long one look waits for mounts to be made again. They go on by themselves after that.
const RESTORE_PATIENCE: Duration = Duration::from_secs(60);

impl From<ObjectError> for Retry {
    fn from(error: ObjectError) -> Retry {
        match error {
            ObjectError::Conflict => Retry::Soon(error.to_string()),
            ObjectError::NotFound | ObjectError::Refused(_) | ObjectError::Away(_) => Retry::Later(error.to_string()),
        }
    }
}

pub(super) fn about(volume: &str, object: Option<&GalleonVolume>) -> Subject {
    Subject {
        kind: "GalleonVolume",
        name: volume.to_owned(),
        uid: object.and_then(|object| object.uid()),
    }
}

pub(super) fn warning(reason: &'static str, action: &'static str, text: String) -> Notice {
    Notice {
        warning: true,
        reason,
        action,
        text,
    }
}

impl Registry {
    pub(super) async fn reconcile_volume(&self, name: &str) -> Result<Next, Retry> {
        let object = self
            .cache
            .volumes
            .get(name)
            .filter(|object| object.attached_node() == Some(&self.node));
        let replica = object.as_ref().and_then(|object| self.replica_of(object));
        let local = self.local(name);
        let step = plan::next(&self.node, object.as_deref(), replica.as_deref(), &local);
        if step != Step::Nothing {
            tracing::debug!(volume = name, ?step, "next step");
        }
        if let (Some(object), Some(_)) = (&object, &local.device) {
            self.keep(name, object).await;
        }
        match (step, object) {
            (Step::Forget, _) => {
                self.served.set(name, None);
                self.forget_notice(&about(name, None));
                self.own(|own| own.patience.remove(name));
                Ok(Next::Gone)
            }
            (Step::Hold, _) => {
                let at = self
                    .stager
                    .records()
                    .staged(name)
                    .map(|staged| staged.path.display().to_string());
                let text = format!(
                    "to be released, but still mounted at {}: waiting for its unstaging",
                    at.unwrap_or_default()
                );
                tracing::info!(volume = name, %text);
                let notice = Notice {
                    warning: false,
                    reason: reason::DETACHING,
                    action: "Detach",
                    text,
                };
                self.notice(about(name, None), notice).await;
                Ok(Next::Wait)
            }
            (Step::Settle, _) => self.settle(name).await,
            (Step::Release, _) => self.release(name).await,
            (Step::Yield, _) => self.yield_to_other(name).await,
            (Step::AwaitConfig, _) => {
                self.served.set(name, Some(Presence::Coming));
                Ok(Next::Wait)
            }
            (Step::GiveUp, _) => self.give_up(name).await,
            (Step::TakeOver, Some(_)) => match self.own(|own| own.patience.get(name).and_then(Patience::remaining)) {
                Some(left) => Ok(Next::Again(left)),
                None => self.take_over(name).await,
            },
            (Step::Attach, Some(object)) if object.spec.is_replicated() => self.lead(name, &object).await,
            (Step::Attach, Some(object)) => self.attach(name, &object, replica).await,
            (Step::Grow(size_bytes), Some(_)) => self.grow(name, size_bytes).await,
            (Step::Restore, Some(object)) => self.restore(name, &object).await,
            (Step::Report, Some(_)) => self.report(name).await,
            (Step::Nothing, Some(object)) => {
                match local.trouble {
                    None => self.forget_notice(&about(name, Some(&object))),
                    Some(trouble) => {
                        let (why, text) = trouble.told();
                        self.notice(about(name, Some(&object)), warning(why, "Serve", text))
                            .await;
                    }
                }
                Ok(Next::Again(if object.spec.is_replicated() {
                    KEEP_EVERY
                } else {
                    TROUBLE_EVERY
                }))
            }
            (Step::TakeOver | Step::Attach | Step::Grow(_) | Step::Restore | Step::Report | Step::Nothing, None) => {
                unreachable!("these steps are for volumes that are to be attached here")
            }
        }
    }

    fn local(&self, name: &str) -> Local {
        let device = self.engine.device(name);
        let staged = self.stager.records().staged(name).is_some();
        let trouble = self.engine.trouble(name);
        self.own(|own| Local {
            grant: own.grants.get(name).copied(),
            device,
            staged,
            trouble,
            restored: own.restored.contains(name),
            settled: own.settled.contains(name),
            spent: own.spent.contains(name),
        })
    }

    fn replica_of(&self, volume: &GalleonVolume) -> Option<Arc<GalleonReplica>> {
        let replicas = self.cache.replicas.list();
        let name = plan::complete(volume, replicas.iter().map(Arc::as_ref))?.name_any();
        self.cache.replicas.get(&name)
    }

    /// Reads the object itself, and only while it is still to be attached here.
    async fn fresh(&self, name: &str) -> Result<Option<GalleonVolume>, Retry> {
        let object = self.objects.volume(name).await?;
        Ok(object.filter(|object| object.attached_node() == Some(&self.node)))
    }

    /// Becomes the primary in a new epoch. What makes it safe is the resourceVersion: between the read and the write
    /// nobody released the volume, took it over or changed the in-sync set.
    async fn take_over(&self, name: &str) -> Result<Next, Retry> {
        self.served.set(name, Some(Presence::Coming));
        // The cache lags; whoever released the volume will wake us when the cache knows.
        let Some(mut object) = self.fresh(name).await? else {
            return Ok(Next::Wait);
        };
        let Some(config) = object.config() else {
            return Ok(Next::Wait);
        };
        let (config, grant) = plan::taken_over(&self.node, config, Uuid::new_v4());
        object.status.get_or_insert_default().config = Some(config);
        plan::report_down(
            &mut object,
            reason::ATTACHING,
            format!("node {} opens the volume", self.node),
        );
        // Before the write: if its answer is lost we may be the primary without knowing it, and must look again.
        self.own(|own| own.settled.remove(name));
        self.objects.put_volume_status(&object).await?;
        tracing::info!(volume = name, epoch = grant.epoch, incarnation = %grant.incarnation, "took the volume over");
        self.own(|own| {
            own.grants.insert(name.to_owned(), grant);
            own.spent.remove(name);
        });
        Ok(Next::Again(Duration::ZERO))
    }

    async fn grow(&self, name: &str, size_bytes: u64) -> Result<Next, Retry> {
        match self.engine.grow(name, size_bytes).await {
            Ok(device) if device.size_bytes < size_bytes => Err(Retry::Later(format!(
                "volume {name} has {} of {size_bytes} bytes",
                device.size_bytes
            ))),
            Ok(device) => {
                tracing::info!(volume = name, bytes = device.size_bytes, "grown");
                self.here(name, device);
                Ok(Next::Again(Duration::ZERO))
            }
            Err(error) => {
                let text = format!("growing to {size_bytes} bytes: {}", plan::text_of(&error));
                let object = self.cache.volumes.get(name);
                self.notice(
                    about(name, object.as_deref()),
                    warning(plan::reason_of(&error), "Grow", text.clone()),
                )
                .await;
                Err(Retry::Later(text))
            }
        }
    }

    /// Mounts again what this node's records say, on the device that there is now.
    async fn restore(&self, name: &str, object: &GalleonVolume) -> Result<Next, Retry> {
        let Some(device) = self.engine.device(name) else {
            return Ok(Next::Again(Duration::ZERO));
        };
        self.served.set(name, Some(Presence::Here(device.clone())));
        let recorded = self.stager.records().get(name).and_then(|record| record.volume_uid);
        if recorded.is_some() && recorded != object.uid() {
            let text = format!(
                "what is mounted here as {name} belongs to an earlier volume of that name (uid {})",
                recorded.unwrap_or_default()
            );
            self.notice(
                about(name, Some(object)),
                warning(reason::OTHER_VOLUME, "Recover", text.clone()),
            )
            .await;
            return Err(Retry::Later(text));
        }
        let (stager, tools) = (self.stager.clone(), self.guards.hung().tools(name));
        let work = async move { stager.restore(&tools, &device).await };
        let outcome = self
            .guards
            .run(name, "recovery", Instant::now() + RESTORE_PATIENCE, work)
            .await;
        let error = match outcome {
            Ok(Ok(())) => {
                tracing::info!(volume = name, "its mounts are in place");
                self.own(|own| own.restored.insert(name.to_owned()));
                return Ok(Next::Again(Duration::ZERO));
            }
            // The kubelet's own call is at work on it and does the same.
            Err(Unguarded::Busy(why) | Unguarded::GoesOn(why)) => return Err(Retry::Soon(why)),
            Err(Unguarded::Broke(why)) => MountError::Failed(why),
            Ok(Err(error)) => error,
        };
        let text = format!("its mounts could not be made again: {}", error.text());
        self.notice(
            about(name, Some(object)),
            warning("RecoveryFailed", "Recover", text.clone()),
        )
        .await;
        Err(Retry::Later(text))
    }

    async fn report(&self, name: &str) -> Result<Next, Retry> {
        let (Some(device), Some(mut object)) = (self.engine.device(name), self.fresh(name).await?) else {
            return Ok(Next::Wait);
        };
        self.served.set(name, Some(Presence::Here(device.clone())));
        let trouble = self.engine.trouble(name);
        if self.serves(name, &object) && plan::report(&self.node, &mut object, &device, trouble.as_ref()) {
            self.objects.put_volume_status(&object).await?;
        }
        Ok(Next::Wait)
    }

    /// Says in the object's status that the attach failed, if it does not say so already.
    pub(super) async fn report_failure(&self, name: &str, text: &str) -> Result<(), Retry> {
        let Some(mut object) = self.fresh(name).await? else {
            return Ok(());
        };
        if self.serves(name, &object) && plan::report_down(&mut object, reason::ATTACH_FAILED, text.to_owned()) {
            self.objects.put_volume_status(&object).await?;
        }
        Ok(())
    }

    fn serves(&self, name: &str, object: &GalleonVolume) -> bool {
        let grant = self.own(|own| own.grants.get(name).copied());
        grant
            .zip(object.config())
            .is_some_and(|(grant, config)| plan::holds(&self.node, config, &grant))
    }

    /// Closes the volume and, when it is closed, gives the primary up.
    async fn release(&self, name: &str) -> Result<Next, Retry> {
        let grant = self.own(|own| own.grants.get(name).copied());
        {
            // From here to the closing nobody may stage it.
            let _guard = self.guards.enter(name, "release").map_err(Retry::Soon)?;
            if self.stager.records().staged(name).is_some() {
                return Ok(Next::Wait);
            }
            self.served.set(name, None);
            self.engine.detach(name).await.map_err(|error| {
                let text = plan::text_of(&error);
                tracing::warn!(volume = name, why = %text, "cannot be closed yet");
                Retry::Later(text)
            })?;
        }
        self.clear_primary(name, |config_is| {
            grant.is_some_and(|grant| plan::holds(&self.node, config_is, &grant))
        })
        .await?;
        tracing::info!(volume = name, "released");
        self.forget_grant(name);
        self.own(|own| own.settled.insert(name.to_owned()));
        self.wake_replicas_of(name);
        Ok(Next::Again(Duration::ZERO))
    }

    /// A volume that is not attached here, at the first look since our start: a predecessor may still be its primary.
    async fn settle(&self, name: &str) -> Result<Next, Retry> {
        self.clear_primary(name, |_| true).await?;
        self.own(|own| own.settled.insert(name.to_owned()));
        Ok(Next::Again(Duration::ZERO))
    }

    /// Clears the primary if it is this node and `ours` agrees, and the volume is to be attached here no longer.
    async fn clear_primary(
        &self,
        name: &str,
        ours: impl Fn(&galleonfs_api::VolumeConfig) -> bool,
    ) -> Result<(), Retry> {
        let Some(mut object) = self.objects.volume(name).await? else {
            return Ok(());
        };
        if object.attached_node() == Some(&self.node) && self.cache.volumes.get(name).is_none() {
            // The watch will tell; it is no business of a release then.
            return Err(Retry::Soon(format!("volume {name} is attached here again")));
        }
        let ours = object
            .config()
            .is_some_and(|config| config.primary.as_deref() == Some(&self.node) && ours(config));
        if !ours {
            return Ok(());
        }
        if let Some(staged) = self.stager.records().staged(name)
            && self.own(|own| !own.grants.contains_key(name))
        {
            tracing::info!(volume = name, at = %staged.path.display(), "was released while it was mounted here");
        }
        let status = object.status.get_or_insert_default();
        let config = status.config.as_mut().expect("it was just looked at");
        (config.primary, config.incarnation) = (None, None);
        plan::report_down(&mut object, reason::DETACHED, format!("released by node {}", self.node));
        self.objects.put_volume_status(&object).await?;
        Ok(())
    }

    /// Somebody else is the primary: whatever is written here now would be lost or worse.
    async fn yield_to_other(&self, name: &str) -> Result<Next, Retry> {
        let text = "another start of a node plugin took this volume over: it is closed here".to_owned();
        tracing::error!(volume = name, %text);
        self.served.set(name, Some(Presence::Failed(text.clone())));
        let object = self.cache.volumes.get(name);
        self.notice(about(name, object.as_deref()), warning("Fenced", "Detach", text))
            .await;
        self.engine
            .detach(name)
            .await
            .map_err(|error| Retry::Later(plan::text_of(&error)))?;
        self.forget_grant(name);
        Ok(Next::Again(Duration::ZERO))
    }

    /// To be called when the engine has nothing of the volume any more.
    pub(super) fn forget_grant(&self, name: &str) {
        self.own(|own| {
            own.grants.remove(name);
            own.spent.remove(name);
            own.restored.remove(name);
        });
        self.forget_led(name);
    }

    pub(super) fn wake_replicas_of(&self, volume: &str) {
        for replica in self.cache.replicas.list() {
            if replica.spec.volume_name == volume {
                self.queue.wake(Key::Replica(replica.name_any()));
            }
        }
    }

    /// The epochs of the volumes that this process serves: a metric, and what a shutdown must close.
    pub fn granted(&self) -> Vec<(String, Grant)> {
        self.own(|own| own.grants.iter().map(|(name, grant)| (name.clone(), *grant)).collect())
    }
}
