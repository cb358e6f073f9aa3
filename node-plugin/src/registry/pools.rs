//! Pools: looked at every few seconds, written about when something changed.

use std::path::{Path, PathBuf};
use std::time::Duration;

use galleonfs_api::{Condition, StoragePool, condition, condition_type, reason};
use kube::ResourceExt;
use uuid::Uuid;

use super::objects::{Notice, Subject};
use super::replicas::on_thread;
use super::{Key, Next, Registry, Retry};
use crate::pool::{self, Label, Look, Pool, REPLICAS, Verdict};

/// How often a pool is measured. A look is two system calls as long as nothing moves.
const MEASURE_EVERY: Duration = Duration::from_secs(10);

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
        self.tell(&object, ready, uid, usable).await?;
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

    async fn tell(
        &self,
        object: &StoragePool,
        ready: Condition,
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
        if same && !moved && !named && !moved_house {
            return Ok(());
        }
        let mut object = object.clone();
        let status = object.status.get_or_insert_default();
        condition::set(&mut status.conditions, ready);
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
    const WORDS: [&str; 9] = [
        reason::PATH_MISSING,
        reason::NOT_A_DIRECTORY,
        reason::READ_ONLY,
        reason::DISK_FULL,
        reason::OTHER_CLUSTER,
        reason::OTHER_POOL,
        reason::NEWER_FORMAT,
        reason::BAD_LABEL,
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
