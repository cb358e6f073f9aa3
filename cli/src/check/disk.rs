//! A replica directory that is only looked at.
//!
//! The node plugin's disk opens files for writing and makes a lock file; a check must work on a copy, on a file system
//! mounted read-only, and in a directory that turns out to be something else. So this one reads and refuses the rest.

use std::{
    collections::HashMap,
    fs::{self, File, TryLockError},
    io,
    os::unix::fs::FileExt,
    path::{Path, PathBuf},
};

use anyhow::{Context, Result, bail};
use galleonfs_storage_engine::{
    buffer::Buf,
    io::{Disk, FileId, IoFailure},
};

/// Segments kept open: a check walks the map, which jumps between them. Well below any limit of open files.
const OPEN_FILES_MAX: usize = 256;

#[derive(Debug)]
pub(super) struct ReadOnlyDisk {
    directory: PathBuf,
    files: HashMap<FileId, File>,
    /// Held while the check runs, where there is one: a node plugin that starts meanwhile waits.
    _lock: Option<File>,
}

impl ReadOnlyDisk {
    pub(super) fn open(directory: &Path) -> Result<Self> {
        let found = fs::metadata(directory).with_context(|| format!("looking at {}", directory.display()))?;
        if !found.is_dir() {
            bail!(
                "{} is not a directory: name the replica's directory, <pool>/replicas/<uid>",
                directory.display()
            );
        }
        let lock = match File::open(directory.join("lock")) {
            Ok(file) => match file.try_lock() {
                Ok(()) => Some(file),
                Err(TryLockError::WouldBlock) => bail!(
                    "{} is in use by a node plugin, and what is being written cannot be checked: end the pods that \
                     use the volume, wait until it is detached, and check then",
                    directory.display()
                ),
                Err(TryLockError::Error(error)) => {
                    return Err(error).with_context(|| format!("locking {}", directory.display()));
                }
            },
            Err(error) if error.kind() == io::ErrorKind::NotFound => None,
            Err(error) => return Err(error).with_context(|| format!("opening the lock in {}", directory.display())),
        };
        Ok(Self {
            directory: directory.to_owned(),
            files: HashMap::new(),
            _lock: lock,
        })
    }

    fn file(&mut self, file: FileId) -> Result<&File, IoFailure> {
        if !self.files.contains_key(&file) {
            if self.files.len() >= OPEN_FILES_MAX {
                self.files.clear();
            }
            let opened =
                File::open(self.directory.join(file.path())).map_err(|error| failure("opening", file, &error))?;
            self.files.insert(file, opened);
        }
        Ok(&self.files[&file])
    }
}

impl Disk for ReadOnlyDisk {
    fn read(&mut self, file: FileId, offset: u64, buf: &mut [u8]) -> Result<(), IoFailure> {
        self.file(file)?
            .read_exact_at(buf, offset)
            .map_err(|error| failure("reading", file, &error))
    }

    fn write(&mut self, file: FileId, _: u64, _: &[Buf]) -> Result<(), IoFailure> {
        Err(refused("written", file))
    }

    fn sync(&mut self, file: FileId) -> Result<(), IoFailure> {
        Err(refused("synced", file))
    }

    fn create(&mut self, file: FileId, _: u64) -> Result<(), IoFailure> {
        Err(refused("made", file))
    }

    fn remove(&mut self, file: FileId) -> Result<(), IoFailure> {
        Err(refused("removed", file))
    }

    fn list(&mut self) -> Result<Vec<(FileId, u64)>, IoFailure> {
        let mut files = Vec::new();
        for (folder, prefix) in [
            (self.directory.clone(), ""),
            (self.directory.join("segments"), "segments/"),
        ] {
            let fail = |error: io::Error| IoFailure::Failed(format!("listing {}: {error}", folder.display()));
            let entries = match fs::read_dir(&folder) {
                Ok(entries) => entries,
                Err(error) if error.kind() == io::ErrorKind::NotFound => continue,
                Err(error) => return Err(fail(error)),
            };
            for entry in entries {
                let entry = entry.map_err(fail)?;
                let name = entry.file_name();
                if let Some(file) = name
                    .to_str()
                    .and_then(|name| FileId::from_path(&format!("{prefix}{name}")))
                {
                    files.push((file, entry.metadata().map_err(fail)?.len()));
                }
            }
        }
        Ok(files)
    }
}

fn failure(doing: &str, file: FileId, error: &io::Error) -> IoFailure {
    match error.kind() {
        io::ErrorKind::NotFound => IoFailure::NotFound,
        _ => IoFailure::Failed(format!("{doing} {}: {error}", file.path())),
    }
}

fn refused(what: &str, file: FileId) -> IoFailure {
    IoFailure::Failed(format!("{} would be {what}, and a check only reads", file.path()))
}
