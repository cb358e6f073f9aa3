//! Decisions about a pool, from plain values.

use std::path::Path;

use galleonfs_api::{StoragePool, reason};
use uuid::Uuid;

use super::directory::{FORMAT, LabelFound, Look, Space};

/// Left free when the pool does not say how much: a node whose root file system is full is a dead node. One part in
/// twenty is what ext4 keeps back by itself; on large disks that would be wasteful.
const RESERVE_PART: u64 = 20;
const RESERVE_BYTES_MAX: u64 = 10 << 30;

/// Below this nothing useful fits any more.
const FULL_BYTES: u64 = 64 << 20;

/// How far the usable space must move before it is worth a write to the API server: one percent, and never less than this.
const NEWS_BYTES_MIN: u64 = 64 << 20;

/// What to do about a pool.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Verdict {
    /// Make the directory, then look again.
    Make,
    /// Write our label into the empty directory, then look again.
    Label,
    /// It is ours.
    Ours(Found),
    /// Leave it alone.
    Refused { reason: &'static str, message: String },
}

/// A pool that is ours.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Found {
    pub uid: Uuid,
    pub usable_bytes: u64,
    /// Ours, but not good for new replicas now: a reason word and a sentence.
    pub trouble: Option<(&'static str, String)>,
}

/// Decides. `own_root` is where paths are made when they are missing; `used_bytes` is what our replicas take already.
pub fn judge(pool: &StoragePool, cluster_id: Uuid, own_root: &Path, look: &Look, used_bytes: u64) -> Verdict {
    let path = Path::new(&pool.spec.path);
    let known = pool.status.as_ref().and_then(|status| status.pool_uid.as_deref());
    let refuse = |reason, message: String| Verdict::Refused { reason, message };
    let shown = path.display();
    let (label, space) = match look {
        Look::Missing => {
            return match known {
                // The pool had a label once. An empty directory in its place would hide that its disk is gone.
                Some(uid) => refuse(
                    reason::PATH_MISSING,
                    format!(
                        "{shown} is gone; it held pool {uid}. Mount its disk again, or delete this StoragePool if its data is lost"
                    ),
                ),
                None if path.starts_with(own_root) => Verdict::Make,
                None => refuse(
                    reason::PATH_MISSING,
                    format!(
                        "{shown} does not exist: mount the disk there or make the directory. Only paths below {} are made",
                        own_root.display()
                    ),
                ),
            };
        }
        Look::NotADirectory => {
            return refuse(
                reason::NOT_A_DIRECTORY,
                format!("{shown} is not a directory: give the pool a directory"),
            );
        }
        Look::Directory { label, space } => (label, space),
    };
    let label = match label {
        LabelFound::None { empty } => {
            return match (known, empty) {
                (Some(uid), _) => refuse(
                    reason::PATH_MISSING,
                    format!(
                        "{shown} has no label, but it held pool {uid}: its disk is probably not mounted. Mount it, or delete this StoragePool if its data is lost"
                    ),
                ),
                (None, _) if space.read_only => refuse(reason::READ_ONLY, read_only(path)),
                (None, true) if space.available_bytes < FULL_BYTES => refuse(reason::DISK_FULL, full(path, space)),
                (None, true) => Verdict::Label,
                (None, false) => refuse(
                    reason::BAD_LABEL,
                    format!("{shown} is not empty and carries no label of GalleonFS: give the pool an empty directory"),
                ),
            };
        }
        LabelFound::Unreadable(why) => {
            return refuse(
                reason::BAD_LABEL,
                format!("the label {shown}/pool.json cannot be read: {why}"),
            );
        }
        LabelFound::Newer(format) => {
            return refuse(
                reason::NEWER_FORMAT,
                format!("{shown} has format {format}, and this release knows {FORMAT}: use the newer release here"),
            );
        }
        LabelFound::Label(label) => label,
    };
    if label.cluster_id != cluster_id {
        return refuse(
            reason::OTHER_CLUSTER,
            format!(
                "{shown} belongs to cluster {}, and this is {cluster_id}: use another directory, or empty this one",
                label.cluster_id
            ),
        );
    }
    if let Some(known) = known.filter(|known| *known != label.pool_uid.to_string()) {
        return refuse(
            reason::OTHER_POOL,
            format!(
                "{shown} holds pool {}, but this pool is {known}: another disk is mounted there",
                label.pool_uid
            ),
        );
    }
    let usable_bytes = usable(pool, space, used_bytes);
    let trouble = if space.read_only {
        Some((reason::READ_ONLY, read_only(path)))
    } else if space.available_bytes < FULL_BYTES {
        Some((reason::DISK_FULL, full(path, space)))
    } else {
        None
    };
    Verdict::Ours(Found {
        uid: label.pool_uid,
        usable_bytes,
        trouble,
    })
}

fn read_only(path: &Path) -> String {
    format!(
        "the file system of {} is read-only: look into the node's kernel log, then mount it writable",
        path.display()
    )
}

fn full(path: &Path, space: &Space) -> String {
    format!(
        "the file system of {} has {} bytes left: make room or grow it",
        path.display(),
        space.available_bytes
    )
}

/// What replicas may use altogether: what is free, and what they take already, without the reserve.
fn usable(pool: &StoragePool, space: &Space, used_bytes: u64) -> u64 {
    let reserve = match pool.spec.reserve_bytes {
        Some(bytes) => u64::try_from(bytes).unwrap_or(0),
        None => reserve_bytes_default(space.total_bytes),
    };
    (space.available_bytes + used_bytes).saturating_sub(reserve)
}

/// What is left free of a file system of so many bytes.
pub fn reserve_bytes_default(total_bytes: u64) -> u64 {
    (total_bytes / RESERVE_PART).min(RESERVE_BYTES_MAX)
}

/// Whether a change of the usable space should be told.
pub fn worth_writing(told: Option<i64>, now: u64) -> bool {
    let Some(told) = told.and_then(|told| u64::try_from(told).ok()) else {
        return true;
    };
    told.abs_diff(now) >= (told / 100).max(NEWS_BYTES_MIN)
}

#[cfg(test)]
mod tests {
    use galleonfs_api::{MediaType, StoragePoolSpec, StoragePoolStatus};

    use super::super::directory::Label;
    use super::*;

    const GIB: u64 = 1 << 30;

    fn pool(path: &str, uid: Option<Uuid>) -> StoragePool {
        let spec = StoragePoolSpec {
            pool: "p".into(),
            node_name: "n1".into(),
            path: path.into(),
            media: MediaType::Ssd,
            reserve_bytes: None,
        };
        let status = StoragePoolStatus {
            pool_uid: uid.map(|uid| uid.to_string()),
            ..Default::default()
        };
        StoragePool {
            status: Some(status),
            ..StoragePool::new("p.n1", spec)
        }
    }

    fn directory(label: LabelFound) -> Look {
        let space = Space {
            total_bytes: 100 * GIB,
            available_bytes: 50 * GIB,
            read_only: false,
        };
        Look::Directory { label, space }
    }

    fn why(pool: &StoragePool, look: &Look) -> &'static str {
        match judge(pool, Uuid::nil(), Path::new("/own"), look, 0) {
            Verdict::Refused { reason, message } => {
                assert!(message.contains(&pool.spec.path), "{message}");
                reason
            }
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn only_paths_of_our_own_are_made() {
        let root = Path::new("/own");
        assert_eq!(
            judge(&pool("/own/p", None), Uuid::nil(), root, &Look::Missing, 0),
            Verdict::Make
        );
        assert_eq!(why(&pool("/mnt/disk", None), &Look::Missing), reason::PATH_MISSING);
        assert_eq!(why(&pool("/ownership", None), &Look::Missing), reason::PATH_MISSING);
    }

    #[test]
    fn a_disk_that_is_not_mounted_is_not_mistaken_for_a_new_one() {
        let once = pool("/own/p", Some(Uuid::new_v4()));
        assert_eq!(why(&once, &Look::Missing), reason::PATH_MISSING);
        assert_eq!(
            why(&once, &directory(LabelFound::None { empty: true })),
            reason::PATH_MISSING
        );
    }

    #[test]
    fn a_new_pool_takes_an_empty_directory_and_nothing_else() {
        let new = pool("/mnt/disk", None);
        let judged = judge(
            &new,
            Uuid::nil(),
            Path::new("/own"),
            &directory(LabelFound::None { empty: true }),
            0,
        );
        assert_eq!(judged, Verdict::Label);
        assert_eq!(
            why(&new, &directory(LabelFound::None { empty: false })),
            reason::BAD_LABEL
        );
        assert_eq!(why(&new, &Look::NotADirectory), reason::NOT_A_DIRECTORY);
        let space = Space {
            total_bytes: GIB,
            available_bytes: GIB,
            read_only: true,
        };
        assert_eq!(
            why(
                &new,
                &Look::Directory {
                    label: LabelFound::None { empty: true },
                    space
                }
            ),
            reason::READ_ONLY
        );
        let space = Space {
            available_bytes: 4096,
            read_only: false,
            ..space
        };
        let label = LabelFound::None { empty: true };
        assert_eq!(why(&new, &Look::Directory { label, space }), reason::DISK_FULL);
    }

    #[test]
    fn labels_of_others_are_refused_by_name() {
        let (uid, other) = (Uuid::new_v4(), Uuid::new_v4());
        let label = |cluster_id, pool_uid| {
            directory(LabelFound::Label(Label {
                format: FORMAT,
                cluster_id,
                pool_uid,
            }))
        };
        assert_eq!(why(&pool("/p", None), &label(other, uid)), reason::OTHER_CLUSTER);
        assert_eq!(
            why(&pool("/p", Some(uid)), &label(Uuid::nil(), other)),
            reason::OTHER_POOL
        );
        assert_eq!(
            why(&pool("/p", None), &directory(LabelFound::Newer(2))),
            reason::NEWER_FORMAT
        );
        assert_eq!(
            why(&pool("/p", None), &directory(LabelFound::Unreadable("torn".into()))),
            reason::BAD_LABEL
        );
    }

    #[test]
    fn usable_space_counts_our_replicas_and_leaves_the_reserve() {
        let uid = Uuid::new_v4();
        let label = LabelFound::Label(Label {
            format: FORMAT,
            cluster_id: Uuid::nil(),
            pool_uid: uid,
        });
        let judged = judge(
            &pool("/p", Some(uid)),
            Uuid::nil(),
            Path::new("/own"),
            &directory(label.clone()),
            10 * GIB,
        );
        assert_eq!(
            judged,
            Verdict::Ours(Found {
                uid,
                usable_bytes: 55 * GIB,
                trouble: None
            })
        );
        let space = Space {
            total_bytes: 100 * GIB,
            available_bytes: 1 << 20,
            read_only: false,
        };
        let full = judge(
            &pool("/p", Some(uid)),
            Uuid::nil(),
            Path::new("/own"),
            &Look::Directory { label, space },
            0,
        );
        assert!(matches!(
            full,
            Verdict::Ours(Found {
                usable_bytes: 0,
                trouble: Some((reason::DISK_FULL, _)),
                ..
            })
        ));
    }

    #[test]
    fn small_moves_of_the_usable_space_are_not_written() {
        assert!(worth_writing(None, 0));
        assert!(!worth_writing(Some(GIB as i64), GIB + (63 << 20)));
        assert!(worth_writing(Some(GIB as i64), GIB - (64 << 20)));
        assert!(!worth_writing(Some(100 * GIB as i64), 100 * GIB + (512 << 20)));
        assert!(worth_writing(Some(100 * GIB as i64), 102 * GIB));
    }
}
