//! The configuration of one volume, as the primary that leads it reads and changes it.
//!
//! ```text
//! primary: ids, stamps     ◄── translated ──►     volume's object: names of replicas, resourceVersion
//! ```
//!
//! Every change is a PUT of the whole status, as it was read, under the resourceVersion that was read: between the two
//! nobody changed anything, and nobody else's words are lost. What became of a PUT is told as it is known, and no better:
//! an answer that did not come, or says nothing, is [`Decision::Unknown`].
//!
//! One request after the other, so that what is told comes in the order in which it happened. Each has a deadline: an API
//! server that hangs must not look like one that thinks.

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use galleonfs_api::{GalleonReplica, GalleonVolume, OutReplica, VolumeConfig};
use galleonfs_storage_engine::replication::primary::Decision;
use galleonfs_storage_engine::replication::{Config, Incarnation, ReplicaId, Stamp, Zones};
use galleonfs_storage_engine::types::{Epoch, Seq, Version};
use kube::ResourceExt;
use tokio::runtime::Handle;
use tokio::time::{Duration, Instant};
use uuid::Uuid;

use super::objects::{ObjectError, Objects};
use super::plan;
use crate::engine::{Configs, ProposeDone, ReadDone};

/// How long one read or one change may take.
const DEADLINE: Duration = Duration::from_secs(5);

/// Bad news is not told faster than this: whoever hears it tries the same again at once.
const BAD_NEWS_AFTER: Duration = Duration::from_millis(500);

/// States of the object that a change may still be based on. The primary bases its changes on the last one that it took
/// notice of, and some are read in between.
const SEEN_MAX: usize = 8;

/// Where a replica of the volume is. None of it changes as long as the replica lives, and names are not used again.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Member {
    pub uid: Uuid,
    pub node: String,
    /// Object name of its pool.
    pub pool: String,
    /// Where its node stands, if that was known when it was made.
    pub zone: Option<String>,
}

/// The replicas that a configuration names.
#[derive(Debug, Default)]
pub struct Members {
    pub known: Vec<Member>,
    /// Names without an object.
    pub missing: Vec<String>,
}

/// The configuration of one volume. Cheap to clone; all clones are one.
#[derive(Clone)]
pub struct VolumeConfigs {
    inner: Arc<Inner>,
    runtime: Handle,
}

struct Inner {
    objects: Arc<dyn Objects>,
    node: String,
    volume: String,
    volume_uid: Uuid,
    deadline: Duration,
    turn: tokio::sync::Mutex<()>,
    known: Mutex<Known>,
}

#[derive(Default)]
struct Known {
    members: BTreeMap<String, Member>,
    /// The newest is the last.
    seen: VecDeque<Seen>,
    last_stamp: u64,
    /// Names that nobody knows, and that this was said of.
    told: BTreeSet<String>,
    /// The last read failed, and this was said.
    failing: bool,
}

/// A state of the object.
struct Seen {
    stamp: Stamp,
    object: GalleonVolume,
    /// Those of `out` that the primary was not told of.
    strangers: BTreeMap<String, OutReplica>,
}

impl VolumeConfigs {
    /// To be called on the runtime that shall do the requests.
    pub fn new(objects: Arc<dyn Objects>, node: &str, volume: &str, volume_uid: Uuid) -> VolumeConfigs {
        VolumeConfigs::with_deadline(objects, node, volume, volume_uid, DEADLINE)
    }

    pub(super) fn with_deadline(
        objects: Arc<dyn Objects>,
        node: &str,
        volume: &str,
        volume_uid: Uuid,
        deadline: Duration,
    ) -> VolumeConfigs {
        VolumeConfigs {
            inner: Arc::new(Inner {
                objects,
                node: node.to_owned(),
                volume: volume.to_owned(),
                volume_uid,
                deadline,
                turn: tokio::sync::Mutex::default(),
                known: Mutex::default(),
            }),
            runtime: Handle::current(),
        }
    }

    /// The configuration as the primary was told of it last.
    pub fn latest(&self) -> Option<VolumeConfig> {
        self.inner.known().seen.back()?.object.config().cloned()
    }

    /// The uid of a replica that this configuration names.
    pub async fn uid_of(&self, config: &VolumeConfig, name: &str) -> Result<Option<Uuid>, ObjectError> {
        if !plan::names(config).any(|member| member == name) {
            return Ok(None);
        }
        self.inner.learn(config).await?;
        Ok(self.inner.known().members.get(name).map(|member| member.uid))
    }

    /// Where the replicas are that this configuration names.
    pub async fn members(&self, config: &VolumeConfig) -> Result<Members, ObjectError> {
        self.inner.learn(config).await?;
        let known = self.inner.known();
        let mut members = Members::default();
        for name in plan::names(config) {
            match known.members.get(name) {
                Some(member) => members.known.push(member.clone()),
                None => members.missing.push(name.to_owned()),
            }
        }
        Ok(members)
    }
}

impl Configs for VolumeConfigs {
    fn read(&self, done: ReadDone) {
        let inner = self.inner.clone();
        self.runtime.spawn(async move {
            let _turn = inner.turn.lock().await;
            let found = tokio::time::timeout(inner.deadline, inner.read()).await;
            let found = found.unwrap_or_else(|_| Err(format!("no answer within {:?}", inner.deadline)));
            inner.tell_failure(found.as_ref().err());
            done(found.ok());
        });
    }

    fn propose(&self, expected: Stamp, config: Config, done: ProposeDone) {
        let inner = self.inner.clone();
        self.runtime.spawn(async move {
            let _turn = inner.turn.lock().await;
            done(inner.propose(expected, &config).await);
        });
    }

    fn zones(&self) -> Zones {
        let known = self.inner.known();
        let zone = |member: &Member| Some((ReplicaId(member.uid.into_bytes()), member.zone.clone()?));
        known.members.values().filter_map(zone).collect()
    }
}

impl Inner {
    fn known(&self) -> MutexGuard<'_, Known> {
        self.known.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Logs when reading begins to fail, and when that is over.
    fn tell_failure(&self, why: Option<&String>) {
        let failed = std::mem::replace(&mut self.known().failing, why.is_some());
        match why {
            Some(why) if !failed => tracing::warn!(volume = %self.volume, %why, "its configuration cannot be read"),
            None if failed => tracing::info!(volume = %self.volume, "its configuration can be read again"),
            Some(_) | None => {}
        }
    }

    async fn read(&self) -> Result<(Stamp, Config), String> {
        let object = self.objects.volume(&self.volume).await;
        let object = object.map_err(|error| error.to_string())?;
        let object = object.filter(|object| object.uid() == Some(self.volume_uid.to_string()));
        let object = object.ok_or("its object does not exist any more")?;
        let found = object.config().ok_or("its object has no configuration")?;
        self.learn(found).await.map_err(|error| error.to_string())?;
        let mut known = self.known();
        let (config, strangers) = known.translate(found)?;
        for name in strangers.keys() {
            if known.told.insert(name.clone()) {
                tracing::warn!(volume = %self.volume, replica = %name, "is left out and has no object: it is passed over");
            }
        }
        Ok((known.remember(object, strangers), config))
    }

    /// Sees to it that the names of a configuration are known, as far as they can be.
    async fn learn(&self, config: &VolumeConfig) -> Result<(), ObjectError> {
        let all_known = {
            let known = self.known();
            plan::names(config).all(|name| known.members.contains_key(name))
        };
        if all_known {
            return Ok(());
        }
        let replicas = self.objects.replicas_of(&self.volume).await?;
        let of_ours = |replica: &&GalleonReplica| replica.spec.volume_uid == self.volume_uid.to_string();
        let mut known = self.known();
        for replica in replicas.iter().filter(of_ours) {
            let Some(uid) = replica.uid().and_then(|uid| Uuid::parse_str(&uid).ok()) else {
                continue;
            };
            let member = Member {
                uid,
                node: replica.spec.node_name.clone(),
                pool: replica.spec.pool_name.clone(),
                zone: replica.spec.zone.clone(),
            };
            known.members.insert(replica.name_any(), member);
        }
        Ok(())
    }

    async fn propose(&self, expected: Stamp, config: &Config) -> Decision {
        let Some((object, strangers)) = self.known().proposal(expected, config, &self.node) else {
            // So many newer states were read since: under that resourceVersion nothing can be written any more.
            return Decision::Conflict;
        };
        let asked = Instant::now();
        let done = tokio::time::timeout(self.deadline, self.objects.put_volume_status(&object)).await;
        let decision = match done {
            Ok(Ok(written)) => {
                tracing::info!(volume = %self.volume, config = ?written.config(), "its configuration was changed");
                return Decision::Made(self.known().remember(written, strangers));
            }
            Ok(Err(ObjectError::Conflict)) => return Decision::Conflict,
            // The server understood, and wrote nothing: its checks come before the write. It will refuse the same again,
            // so this goes on until a person, or a change of the object, ends it.
            Ok(Err(error @ (ObjectError::Refused(_) | ObjectError::NotFound))) => {
                tracing::error!(volume = %self.volume, %error, ?config, "a change of its configuration was refused");
                Decision::Conflict
            }
            Ok(Err(ObjectError::Away(why))) => {
                tracing::warn!(volume = %self.volume, %why, "whether its configuration was changed is not known");
                Decision::Unknown
            }
            Err(_) => {
                tracing::warn!(volume = %self.volume, "no answer: whether its configuration was changed is not known");
                Decision::Unknown
            }
        };
        tokio::time::sleep_until(asked + BAD_NEWS_AFTER).await;
        decision
    }
}

impl Known {
    /// In the primary's words. Whoever is out and has no object cannot be brought back, so the primary need not know.
    fn translate(&self, found: &VolumeConfig) -> Result<(Config, BTreeMap<String, OutReplica>), String> {
        let id = |name: &String| {
            let member = self.members.get(name);
            let member = member.ok_or_else(|| format!("it names the replica {name}, which has no object"))?;
            Ok(ReplicaId(member.uid.into_bytes()))
        };
        let incarnation = match &found.incarnation {
            Some(text) => {
                let uuid = Uuid::parse_str(text).map_err(|_| format!("its incarnation {text:?} is none"))?;
                Some(Incarnation(uuid.into_bytes()))
            }
            None => None,
        };
        let mut config = Config {
            epoch: epoch(found.epoch)?,
            incarnation,
            in_sync: found.in_sync.iter().map(id).collect::<Result<_, String>>()?,
            syncing: found.syncing.iter().map(id).collect::<Result<_, String>>()?,
            out: BTreeMap::new(),
        };
        let mut strangers = BTreeMap::new();
        for (name, had) in &found.out {
            match id(name) {
                Ok(id) => {
                    let seq = u64::try_from(had.flushed_seq).map_err(|_| "a sequence number is negative".to_owned())?;
                    let version = Version {
                        epoch: epoch(had.epoch)?,
                        seq: Seq(seq),
                    };
                    config.out.insert(id, version);
                }
                Err(_) => drop(strangers.insert(name.clone(), *had)),
            }
        }
        Ok((config, strangers))
    }

    fn remember(&mut self, object: GalleonVolume, strangers: BTreeMap<String, OutReplica>) -> Stamp {
        if let Some(last) = self.seen.back()
            && last.object.resource_version() == object.resource_version()
            && last.strangers == strangers
        {
            return last.stamp;
        }
        self.last_stamp += 1;
        let stamp = Stamp(self.last_stamp);
        self.seen.push_back(Seen {
            stamp,
            object,
            strangers,
        });
        if self.seen.len() > SEEN_MAX {
            self.seen.pop_front();
        }
        stamp
    }

    /// The object that was seen under this stamp, with this configuration.
    fn proposal(
        &self,
        expected: Stamp,
        wanted: &Config,
        node: &str,
    ) -> Option<(GalleonVolume, BTreeMap<String, OutReplica>)> {
        let seen = self.seen.iter().find(|seen| seen.stamp == expected)?;
        let names: BTreeMap<ReplicaId, &String> = self
            .members
            .iter()
            .map(|(name, member)| (ReplicaId(member.uid.into_bytes()), name))
            .collect();
        let name = |id: &ReplicaId| {
            let name = names
                .get(id)
                .expect("a primary knows replicas from what it was told here");
            (*name).clone()
        };
        let sorted = |ids: &BTreeSet<ReplicaId>| {
            let mut sorted: Vec<String> = ids.iter().map(name).collect();
            sorted.sort();
            sorted
        };
        let mut object = seen.object.clone();
        let config = object.status.get_or_insert_default().config.get_or_insert_default();
        config.epoch = i64::from(wanted.epoch.0);
        config.incarnation = wanted.incarnation.map(|start| Uuid::from_bytes(start.0).to_string());
        config.primary = wanted.incarnation.map(|_| node.to_owned());
        config.in_sync = sorted(&wanted.in_sync);
        config.syncing = sorted(&wanted.syncing);
        config.out = seen.strangers.clone();
        config.out.extend(wanted.out.iter().map(|(id, had)| {
            let had = OutReplica {
                epoch: i64::from(had.epoch.0),
                flushed_seq: i64::try_from(had.seq.0).unwrap_or(i64::MAX),
            };
            (name(id), had)
        }));
        if wanted.incarnation.is_none() {
            plan::report_released(&mut object, node);
        }
        Some((object, seen.strangers.clone()))
    }
}

fn epoch(number: i64) -> Result<Epoch, String> {
    let epoch = u32::try_from(number).map_err(|_| format!("epoch {number} is none"))?;
    Ok(Epoch(epoch))
}
