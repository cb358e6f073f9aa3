//! Pools: looked at every few seconds, written about when something changed.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use galleonfs_api::{
    ANNOTATION_DISK_TRUSTED_AT, Condition, GalleonReplica, StoragePool, condition, condition_type, reason,
};
use k8s_openapi::jiff::Timestamp;
use kube::ResourceExt;
use tokio::time::Instant;
use uuid::Uuid;

use super::objects::{Notice, Subject};
use super::replicas::on_thread;
use super::{Key, Next, Registry, Retry};
use crate::pool::{self, Label, Look, Pool, REPLICAS, Verdict, wear};

/// How often a pool is measured. A look is two system calls as long as nothing moves.
const MEASURE_EVERY: Duration = Duration::from_secs(10);

/// How often the stores are asked for damage: a disk that fails does so for longer than this.
const ASK_FOR_DAMAGE_EVERY: Duration = Duration::from_secs(60);

/// Our replicas are only counted anew when the file system's free space moved by more than this: counting looks at every
/// segment file.
const COUNT_AGAIN_BYTES: u64 = 16 << 20;

/// A pool is made, then labelled, then ours.
const STEPS_MAX: usize = 4;

impl Registry {
    pub(super) async fn reconcile_pool(&self, name: &str) -> Result<Next, Retry> {
        let Some(object) = self
            .cache
            .pools
            .get(name)
            .filter(|pool| pool.spec.node_name == self.node)
        else {
            self.note(name, None);
            // One that is made again under its name may be another disk.
            self.own(|own| own.wear.remove(name));
            return Ok(Next::Gone);
        };
        let path = PathBuf::from(&object.spec.path);
        let verdict = match self.judge(name, &object, &path).await {
            Ok(verdict) => verdict,
            Err(error) => Verdict::Refused {
                reason: reason::IO_ERROR,
                message: format!("{}: {error}", path.display()),
            },
        };
        let (known, ready, uid, usable) = match verdict {
            Verdict::Ours(found) => {
                let ready = match found.trouble {
                    None => Condition::new(
                        condition_type::READY,
                        true,
                        reason::READY,
                        format!("on node {}", self.node),
                    ),
                    Some((why, text)) => Condition::new(condition_type::READY, false, why, text),
                };
                (
                    Pool::Ours { path: path.clone() },
                    ready,
                    Some(found.uid),
                    Some(found.usable_bytes),
                )
            }
            Verdict::Refused { reason: why, message } => {
                let ready = Condition::new(condition_type::READY, false, why, message.clone());
                (
                    Pool::Refused {
                        reason: why.to_owned(),
                        message,
                    },
                    ready,
                    None,
                    None,
                )
            }
            Verdict::Make | Verdict::Label => {
                let text = format!("{} did not become a pool after {STEPS_MAX} steps", path.display());
                return Err(Retry::Later(text));
            }
        };
        if matches!(known, Pool::Ours { .. }) {
            self.sweep(name, &path).await?;
        }
        self.note(name, Some(known));
        self.count_damage().await;
        let failing = self.failing(&object);
        let ready = self.with_failing(&object, ready, failing.as_ref());
        self.tell(&object, ready, failing, uid, usable).await?;
        Ok(Next::Again(MEASURE_EVERY))
    }

    /// Looks, and makes and labels what may be made and labelled.
    async fn judge(&self, name: &str, object: &StoragePool, path: &Path) -> Result<Verdict, String> {
        let mut verdict = Verdict::Make;
        for _ in 0..STEPS_MAX {
            let at = path.to_owned();
            let look = io(move || pool::look(&at)).await?;
            let used = match &look {
                Look::Directory { space, .. } => self.used(name, path, space.available_bytes).await?,
                Look::Missing | Look::NotADirectory => 0,
            };
            verdict = pool::judge(object, self.cluster_id, &self.own_root, &look, used);
            let at = path.to_owned();
            match &verdict {
                Verdict::Make => io(move || pool::make_directory(&at)).await?,
                Verdict::Label => {
                    let cluster_id = self.cluster_id;
                    let label = Label {
                        format: 1,
                        cluster_id,
                        pool_uid: Uuid::new_v4(),
                    };
                    tracing::info!(pool = name, path = %path.display(), uid = %label.pool_uid, "labelled a new pool");
                    io(move || pool::write_label(&at, &label)).await?;
                }
                Verdict::Ours(_) | Verdict::Refused { .. } => break,
            }
        }
        Ok(verdict)
    }

    /// Bytes that our replicas take in this pool.
    async fn used(&self, name: &str, path: &Path, available: u64) -> Result<u64, String> {
        let last = self.own(|own| own.measured.get(name).copied());
        if let Some((_, used)) = last.filter(|(before, _)| before.abs_diff(available) < COUNT_AGAIN_BYTES) {
            return Ok(used);
        }
        let (disks, replicas) = (self.disks.clone(), path.join(REPLICAS));
        let used = io(move || disks.used_bytes(&replicas)).await?;
        self.own(|own| own.measured.insert(name.to_owned(), (available, used)));
        Ok(used)
    }

    async fn sweep(&self, name: &str, path: &Path) -> Result<(), Retry> {
        if self.own(|own| own.swept.contains(name)) {
            return Ok(());
        }
        let (disks, replicas) = (self.disks.clone(), path.join(REPLICAS));
        let swept = on_thread("sweeping a pool", move || Ok(disks.sweep(&replicas))).await?;
        if let Err(error) = swept {
            // Leftovers cost space and nothing else.
            tracing::warn!(pool = name, ?error, "leftovers of a crash could not be removed");
        }
        self.own(|own| own.swept.insert(name.to_owned()));
        Ok(())
    }

    /// Lets the rest of the node know, and wakes whoever waited for it.
    fn note(&self, name: &str, pool: Option<Pool>) {
        if !self.pools.set(name, pool) {
            return;
        }
        for replica in self
            .cache
            .replicas
            .list()
            .iter()
            .filter(|replica| replica.spec.pool_name == name)
        {
            self.queue.wake(Key::Replica(replica.name_any()));
            self.queue.wake(Key::Volume(replica.spec.volume_name.clone()));
        }
    }

    /// Asks the stores what they found damaged, for all pools, now and then.
    async fn count_damage(&self) {
        let now = Instant::now();
        let due = self.own(|own| {
            let due = own
                .asked_for_damage
                .is_none_or(|asked| now - asked >= ASK_FOR_DAMAGE_EVERY);
            if due {
                own.asked_for_damage = Some(now);
            }
            due
        });
        if !due {
            return;
        }
        let engine = self.engine.clone();
        let Ok(stores) = tokio::task::spawn_blocking(move || engine.stores()).await else {
            return;
        };
        let replicas = self.cache.replicas.list();
        // By the replica's name, or the volume's if it has only the one.
        let find = |store: &str| {
            let mine = |replica: &&Arc<GalleonReplica>| {
                let alone = !replica.spec.replicated && replica.spec.volume_name == store;
                replica.spec.node_name == self.node && (replica.name_any() == store || alone)
            };
            replicas.iter().find(mine)
        };
        let mut pools: BTreeMap<&str, Vec<(String, u64)>> = BTreeMap::new();
        for (store, report) in &stores {
            if let Some(replica) = find(store) {
                let places = report.stats.damaged_places;
                let pool = pools.entry(&replica.spec.pool_name).or_default();
                pool.push((replica.name_any(), places));
            }
        }
        self.own(|own| {
            for (pool, counted) in pools {
                own.wear.entry(pool.to_owned()).or_default().count(&counted, now);
            }
        });
    }

    /// The condition Failing, if it is to change.
    fn failing(&self, object: &StoragePool) -> Option<Condition> {
        let name = object.name_any();
        let said = object.annotations().get(ANNOTATION_DISK_TRUSTED_AT);
        let trusted: Option<Timestamp> = said.and_then(|said| said.parse().ok());
        if let Some(said) = said.filter(|_| trusted.is_none()) {
            tracing::warn!(pool = %name, %said, "{ANNOTATION_DISK_TRUSTED_AT} says no time as 2026-01-31T12:00:00Z is one");
        }
        let conditions = object.status.as_ref().map(|status| status.conditions.as_slice());
        let known = conditions.and_then(|conditions| condition::get(conditions, condition_type::FAILING));
        self.own(|own| wear::judge(known, trusted, own.wear.entry(name).or_default()))
    }

    /// A pool that is failing takes no new replicas; it says how many are left.
    fn with_failing(&self, object: &StoragePool, ready: Condition, now: Option<&Condition>) -> Condition {
        let failing = match now {
            Some(now) => Some(now).filter(|now| now.is_true()),
            None => object.failing(),
        };
        let Some(failing) = failing.filter(|_| ready.is_true()) else {
            return ready;
        };
        let name = object.name_any();
        let here = self.cache.replicas.list();
        let left = here.iter().filter(|replica| replica.spec.pool_name == name).count();
        let text = match left {
            0 => format!("no replica is left here. {}", failing.message),
            1 => format!("one replica is still here. {}", failing.message),
            _ => format!("{left} replicas are still here. {}", failing.message),
        };
        Condition::new(condition_type::READY, false, reason::TOO_MANY_REPAIRS, text)
    }

    async fn tell(
        &self,
        object: &StoragePool,
        ready: Condition,
        failing: Option<Condition>,
        uid: Option<Uuid>,
        usable: Option<u64>,
    ) -> Result<(), Retry> {
        let subject = Subject {
            kind: "StoragePool",
            name: object.name_any(),
            uid: object.uid(),
        };
        if ready.is_true() {
            self.forget_notice(&subject);
        } else {
            let why = reason_constant(&ready.reason);
            let notice = Notice {
                warning: true,
                reason: why,
                action: "Measure",
                text: ready.message.clone(),
            };
            self.notice(subject, notice).await;
        }
        // The free bytes in the text of a full disk move all the time; the reason does not.
        let before = object.ready();
        let same = before.is_some_and(|before| {
            before.status == ready.status
                && before.reason == ready.reason
                && (before.message == ready.message || ready.reason == reason::DISK_FULL)
        });
        let told = object.status.as_ref().and_then(|status| status.usable_bytes);
        let moved = usable.is_some_and(|now| pool::worth_writing(told, now));
        let uid = uid.map(|uid| uid.to_string());
        let named = uid.is_some() && object.status.as_ref().and_then(|status| status.pool_uid.as_ref()) != uid.as_ref();
        let reached = self.endpoint.get();
        let moved_house =
            reached.is_some() && object.status.as_ref().and_then(|status| status.endpoint.as_ref()) != reached;
        if same && failing.is_none() && !moved && !named && !moved_house {
            return Ok(());
        }
        let mut object = object.clone();
        let name = object.name_any();
        let status = object.status.get_or_insert_default();
        condition::set(&mut status.conditions, ready);
        if let Some(failing) = failing {
            tracing::warn!(pool = %name, failing = failing.is_true(), text = %failing.message, "the pool's disk");
            condition::set(&mut status.conditions, failing);
        }
        status.pool_uid = uid.or(status.pool_uid.take());
        status.endpoint = reached.cloned().or(status.endpoint.take());
        if let Some(usable) = usable {
            status.usable_bytes = Some(i64::try_from(usable).unwrap_or(i64::MAX));
        }
        self.objects.put_pool_status(&object).await?;
        Ok(())
    }
}

/// The constant of a reason word: Events name the same ones.
fn reason_constant(word: &str) -> &'static str {
    const WORDS: [&str; 10] = [
        reason::PATH_MISSING,
        reason::NOT_A_DIRECTORY,
        reason::READ_ONLY,
        reason::DISK_FULL,
        reason::OTHER_CLUSTER,
        reason::OTHER_POOL,
        reason::NEWER_FORMAT,
        reason::BAD_LABEL,
        reason::TOO_MANY_REPAIRS,
        reason::IO_ERROR,
    ];
    WORDS
        .into_iter()
        .find(|known| *known == word)
        .unwrap_or(reason::IO_ERROR)
}

async fn io<T: Send + 'static>(work: impl FnOnce() -> std::io::Result<T> + Send + 'static) -> Result<T, String> {
    match tokio::task::spawn_blocking(work).await {
        Ok(outcome) => outcome.map_err(|error| error.to_string()),
        Err(join) => Err(join.to_string()),
    }
}
