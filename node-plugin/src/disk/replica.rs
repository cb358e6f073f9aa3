//! Making and removing whole replica directories, so that a crash leaves either all of one or nothing that counts.
//!
//! A directory is made under a name that starts with `.new-` and renamed when it is complete; it is renamed to
//! `.trash-…` before it is emptied. Both kinds of leftover are swept when the node plugin starts.

use std::fs;
use std::io;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use galleonfs_storage_engine::store::{self, FormatOptions};
use galleonfs_storage_engine::types::{BlockSize, Epoch, Identity};
use uuid::Uuid;

use super::{FileDisk, ReplicaDir, SEGMENTS, sync_dir};
use crate::engine::{EngineError, ErrorKind, VolumeKey, explain};

const NEW: &str = ".new-";
const TRASH: &str = ".trash-";

/// What a new replica is to be.
#[derive(Clone, Debug)]
pub struct FormatSpec {
    pub volume_uid: Uuid,
    pub replica_uid: Uuid,
    pub cluster_id: Uuid,
    pub block_size: BlockSize,
    /// A multiple of the block size.
    pub size_bytes: u64,
    /// A fresh random number, kept secret from the guest.
    pub salt: u64,
    /// Seals everything that is stored, with this key first.
    pub key: Option<VolumeKey>,
}

/// Makes an empty replica in the directory `dir`, which appears when the replica is complete. One that is there already
/// is left as it is.
pub fn format_replica(dir: &Path, spec: &FormatSpec) -> Result<(), EngineError> {
    make_replica_dir(dir, |disk| {
        let options = FormatOptions {
            identity: Identity {
                cluster: spec.cluster_id.into_bytes(),
                volume: spec.volume_uid.into_bytes(),
                replica: spec.replica_uid.into_bytes(),
            },
            block_size: spec.block_size,
            size_blocks: spec.size_bytes / spec.block_size.bytes(),
            segment_bytes: None,
            salt: spec.salt,
        };
        match &spec.key {
            None => store::format_replica(disk, &options),
            Some(key) => store::format_sealed_replica(disk, &options, &key.prove(spec.volume_uid, Epoch(0))),
        }
        .map_err(|error| explain("format", dir, error))
    })
}

/// Makes the replica directory `dir` and fills it with `fill`; it appears under its name only when `fill` succeeded.
///
/// A directory that is there already is left as it is: its content was complete when it got its name.
pub fn make_replica_dir(
    dir: &Path,
    fill: impl FnOnce(&mut FileDisk) -> Result<(), EngineError>,
) -> Result<(), EngineError> {
    if dir.exists() {
        return Ok(());
    }
    let doing = || format!("make replica directory {}", dir.display());
    let (parent, new) = sibling(dir, NEW)?;
    fs::create_dir_all(&parent).map_err(|error| EngineError::os(doing(), error))?;
    if new.exists() {
        let _mine = ReplicaDir::lock(&new)?;
        fs::remove_dir_all(&new).map_err(|error| EngineError::os(doing(), error))?;
    }
    let made = fs::create_dir_all(new.join(SEGMENTS))
        .map_err(|error| EngineError::os(doing(), error))
        .and_then(|()| {
            let mut disk = FileDisk::open(&new)?;
            fill(&mut disk)?;
            sync_dir(&new.join(SEGMENTS))
                .and_then(|()| sync_dir(&new))
                .and_then(|()| fs::rename(&new, dir))
                .and_then(|()| sync_dir(&parent))
                .map_err(|error| EngineError::os(doing(), error))
        });
    if made.is_err() && !dir.exists() {
        // The space of a half-made directory is wanted back now, not at the next start; the first error is the one to tell.
        let _ = fs::remove_dir_all(&new);
    }
    made
}

/// Removes a replica directory and everything in it. One that is not there is removed already.
pub fn remove_replica(dir: &Path) -> Result<(), EngineError> {
    let doing = || format!("remove replica directory {}", dir.display());
    let (parent, trash) = sibling(dir, TRASH)?;
    match fs::symlink_metadata(dir) {
        Ok(_) => {
            // Whoever has it open must let it go first.
            let _lock = ReplicaDir::lock(dir)?;
            if trash.exists() {
                fs::remove_dir_all(&trash).map_err(|error| EngineError::os(doing(), error))?;
            }
            fs::rename(dir, &trash)
                .and_then(|()| sync_dir(&parent))
                .map_err(|error| EngineError::os(doing(), error))?;
        }
        Err(error) if error.kind() == io::ErrorKind::NotFound => {}
        Err(error) => return Err(EngineError::os(doing(), error)),
    }
    match fs::remove_dir_all(&trash) {
        Ok(()) => sync_dir(&parent).map_err(|error| EngineError::os(doing(), error)),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
        Err(error) => Err(EngineError::os(doing(), error)),
    }
}

/// Removes what a crash in the middle of making or removing left in `replicas`. To be called once, at start.
pub fn sweep_leftovers(replicas: &Path) -> Result<(), EngineError> {
    let doing = || format!("sweep {}", replicas.display());
    let entries = match fs::read_dir(replicas) {
        Ok(entries) => entries,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
        Err(error) => return Err(EngineError::os(doing(), error)),
    };
    for entry in entries {
        let entry = entry.map_err(|error| EngineError::os(doing(), error))?;
        let name = entry.file_name();
        let name = name.to_string_lossy();
        if !name.starts_with(NEW) && !name.starts_with(TRASH) {
            continue;
        }
        match ReplicaDir::lock(&entry.path()) {
            Ok(_lock) => fs::remove_dir_all(entry.path()).map_err(|error| EngineError::os(doing(), error))?,
            // Somebody is at work in it.
            Err(error) if error.kind() == ErrorKind::Retry => {}
            Err(error) => return Err(error),
        }
    }
    Ok(())
}

/// Bytes that a replica directory occupies on its file system.
pub fn used_bytes(dir: &Path) -> io::Result<u64> {
    let mut used = 0;
    let mut dirs = vec![dir.to_owned()];
    while let Some(dir) = dirs.pop() {
        let entries = match fs::read_dir(&dir) {
            Ok(entries) => entries,
            // Removed while we looked.
            Err(error) if error.kind() == io::ErrorKind::NotFound => continue,
            Err(error) => return Err(error),
        };
        for entry in entries {
            let entry = entry?;
            match entry.metadata() {
                Ok(found) if found.is_dir() => dirs.push(entry.path()),
                Ok(found) => used += found.blocks() * 512,
                Err(error) if error.kind() == io::ErrorKind::NotFound => {}
                Err(error) => return Err(error),
            }
        }
    }
    Ok(used)
}

fn sibling(dir: &Path, prefix: &str) -> Result<(PathBuf, PathBuf), EngineError> {
    let (Some(parent), Some(name)) = (dir.parent(), dir.file_name()) else {
        let text = format!("{} cannot be a replica directory: it has no parent", dir.display());
        return Err(EngineError::new(ErrorKind::Failed, text));
    };
    Ok((
        parent.to_owned(),
        parent.join(format!("{prefix}{}", name.to_string_lossy())),
    ))
}
