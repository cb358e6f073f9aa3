//! What this node has mounted, remembered across its own death.
//!
//! One small file per volume: where it is staged, how, and which targets it is bound to. The API objects say which
//! volumes are attached here; only the kubelet's calls said where their mounts belong, and it does not repeat them after
//! we restart. So each call's outcome is written down before it takes effect, and recovery does it all again.
//!
//! A file is replaced as a whole (write, sync, rename, sync the directory): after a crash it holds the old record or the
//! new one. A file that cannot be read is put aside, never deleted, and costs only its own volume its recovery.

mod record;

use std::collections::HashMap;
use std::io::{ErrorKind, Write};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};

pub use record::{Access, Kind, Record, Staged, Target};

use crate::mount::MountError;
use crate::mount::mounts::blocking;
use crate::mount::paths::is_object_name;

/// The records of all volumes, in memory and on disk. Cheap to clone.
///
/// Calls for one volume never overlap (each is made under the volume's guard), so a record has one writer at a time.
#[derive(Debug, Clone)]
pub struct Records {
    dir: Arc<PathBuf>,
    rows: Arc<Mutex<HashMap<String, Record>>>,
}

impl Records {
    /// Reads what is there. Makes the directory if it is missing.
    pub fn open(dir: PathBuf) -> Result<Records, MountError> {
        std::fs::create_dir_all(&dir).map_err(MountError::io(format!("making {}", dir.display())))?;
        let doing = || MountError::io(format!("reading {}", dir.display()));
        let mut rows = HashMap::new();
        for entry in std::fs::read_dir(&dir).map_err(doing())? {
            let path = entry.map_err(doing())?.path();
            let Some(volume) = path
                .file_name()
                .and_then(|name| name.to_str())
                .and_then(|n| n.strip_suffix(".json"))
            else {
                continue;
            };
            match read(&path, volume) {
                Ok(record) => drop(rows.insert(volume.to_owned(), record)),
                Err(why) => {
                    let aside = path.with_extension("unreadable");
                    tracing::error!(%volume, %why, kept = %aside.display(), "the record of a volume cannot be read");
                    std::fs::rename(&path, &aside).map_err(doing())?;
                }
            }
        }
        Ok(Records {
            dir: Arc::new(dir),
            rows: Arc::new(Mutex::new(rows)),
        })
    }

    pub fn get(&self, volume: &str) -> Option<Record> {
        self.rows
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .get(volume)
            .cloned()
    }

    /// How the volume is staged, if it is.
    pub fn staged(&self, volume: &str) -> Option<Staged> {
        self.get(volume)?.staged
    }

    /// The names of all volumes with a record.
    pub fn volumes(&self) -> Vec<String> {
        self.rows
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .keys()
            .cloned()
            .collect()
    }

    /// Changes a record, on disk first. A record with nothing left in it is removed.
    pub async fn change(&self, volume: &str, change: impl FnOnce(&mut Record)) -> Result<(), MountError> {
        assert!(
            is_object_name(volume),
            "a volume without an object's name is never recorded"
        );
        let before = self.get(volume);
        let mut record = before.clone().unwrap_or_default();
        change(&mut record);
        if before.as_ref() == Some(&record) || (before.is_none() && record.is_empty()) {
            return Ok(());
        }
        let (dir, path) = (self.dir.clone(), self.dir.join(format!("{volume}.json")));
        let kept = (!record.is_empty()).then(|| record.clone());
        let text = kept
            .as_ref()
            .map(|record| serde_json::to_vec_pretty(record).expect("a record is plain data"));
        blocking("recording a volume's mounts", move || {
            let stored = match &text {
                Some(text) => replace(&dir, &path, text),
                None => remove(&dir, &path),
            };
            stored.map_err(MountError::io(format!("recording mounts in {}", path.display())))
        })
        .await?;
        let mut rows = self.rows.lock().unwrap_or_else(PoisonError::into_inner);
        match kept {
            Some(record) => drop(rows.insert(volume.to_owned(), record)),
            None => drop(rows.remove(volume)),
        }
        Ok(())
    }
}

fn read(path: &Path, volume: &str) -> Result<Record, String> {
    if !is_object_name(volume) {
        return Err("its name is not that of a volume".into());
    }
    let bytes = std::fs::read(path).map_err(|error| error.to_string())?;
    let record: Record = serde_json::from_slice(&bytes).map_err(|error| error.to_string())?;
    record.check_version()?;
    Ok(record)
}

fn replace(dir: &Path, path: &Path, text: &[u8]) -> std::io::Result<()> {
    let new = path.with_extension("new");
    let mut file = std::fs::File::create(&new)?;
    file.write_all(text)?;
    file.sync_all()?;
    std::fs::rename(&new, path)?;
    std::fs::File::open(dir)?.sync_all()
}

fn remove(dir: &Path, path: &Path) -> std::io::Result<()> {
    match std::fs::remove_file(path) {
        Err(error) if error.kind() != ErrorKind::NotFound => Err(error),
        _ => std::fs::File::open(dir)?.sync_all(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::mount::FsType;

    fn staged() -> Staged {
        Staged {
            path: "/var/lib/kubelet/staging".into(),
            kind: Kind::Filesystem {
                fs: FsType::Ext4,
                flags: Default::default(),
            },
            access: Access::SingleWriter,
            read_only: false,
            targets: [("/var/lib/kubelet/pods/a".into(), Target { read_only: true })].into(),
        }
    }

    #[tokio::test]
    async fn a_record_survives_a_restart_and_goes_when_it_is_empty() {
        let dir = crate::testing::temp_dir("state");
        let records = Records::open(dir.path().join("state")).unwrap();
        records
            .change("pvc-1", |record| record.staged = Some(staged()))
            .await
            .unwrap();
        records
            .change("pvc-2", |record| record.formatting = Some(FsType::Xfs))
            .await
            .unwrap();

        let again = Records::open(dir.path().join("state")).unwrap();
        assert_eq!(again.staged("pvc-1"), Some(staged()));
        assert_eq!(again.get("pvc-2").unwrap().formatting, Some(FsType::Xfs));

        again.change("pvc-1", |record| record.staged = None).await.unwrap();
        assert_eq!(Records::open(dir.path().join("state")).unwrap().volumes(), ["pvc-2"]);
    }

    #[tokio::test]
    async fn an_unreadable_record_is_kept_aside_and_costs_no_other_volume() {
        let dir = crate::testing::temp_dir("state");
        let records = Records::open(dir.path().into()).unwrap();
        records
            .change("good", |record| record.staged = Some(staged()))
            .await
            .unwrap();
        std::fs::write(dir.path().join("bad.json"), b"{ torn").unwrap();
        std::fs::write(dir.path().join("newer.json"), br#"{"version":2}"#).unwrap();
        std::fs::write(dir.path().join("left.new"), b"{").unwrap();

        let again = Records::open(dir.path().into()).unwrap();
        assert_eq!(again.volumes(), ["good"]);
        assert_eq!(std::fs::read(dir.path().join("bad.unreadable")).unwrap(), b"{ torn");
        assert!(dir.path().join("newer.unreadable").exists());
    }

    #[tokio::test]
    async fn a_change_that_changes_nothing_writes_nothing() {
        let dir = crate::testing::temp_dir("state");
        let records = Records::open(dir.path().into()).unwrap();
        records.change("v", |_| {}).await.unwrap();
        assert!(!dir.path().join("v.json").exists());
        records
            .change("v", |record| record.staged = Some(staged()))
            .await
            .unwrap();
        std::fs::remove_file(dir.path().join("v.json")).unwrap();
        records
            .change("v", |record| record.staged = Some(staged()))
            .await
            .unwrap();
        assert!(!dir.path().join("v.json").exists());
    }
}
