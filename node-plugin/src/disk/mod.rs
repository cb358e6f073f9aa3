//! A replica directory on a file system of this node: the files behind the engine's disk operations.
//!
//! ```text
//! <pool>/replicas/<replica uid>/
//!     lock            held (flock) by the one process that has the replica open
//!     superblock.0    superblock.1
//!     segments/00000000 …
//! ```
//!
//! [`ReplicaDir`] knows the crash rules of each operation on names (what is synced, in which order); [`FileDisk`] is
//! the blocking [`Disk`] for recovery, formatting and the offline checker. The shards use the same [`ReplicaDir`] for
//! names and io_uring for the bytes. Files are opened for direct I/O where the file system allows it.

mod replica;
#[cfg(test)]
mod tests;

use std::collections::HashMap;
use std::fs::{self, File, OpenOptions};
use std::io::{self, IoSlice};
use std::os::fd::AsFd;
use std::os::unix::fs::{FileExt, MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use galleonfs_storage_engine::buffer::{Buf, BufMut, PAGE_BYTES};
use galleonfs_storage_engine::io::{Disk, FileId, IoFailure};
use nix::fcntl::{FallocateFlags, Flock, FlockArg, fallocate};

use crate::engine::{EngineError, ErrorKind};
use crate::pool::reserve_bytes_default;
pub use galleonfs_storage_engine::types::BlockSize;
pub use replica::{FormatSpec, format_replica, make_replica_dir, remove_replica, sweep_leftovers, used_bytes};

/// The directory of the log segments below a replica directory.
const SEGMENTS: &str = "segments";

/// Files a blocking disk keeps open. Recovery reads each segment from end to end, so a few are plenty.
const OPEN_FILES_MAX: usize = 64;

/// The most parts one `pwritev` takes (`IOV_MAX`).
const PARTS_PER_CALL_MAX: usize = 1024;

/// A replica directory that this process, and no other, has open.
#[derive(Debug)]
pub struct ReplicaDir {
    path: PathBuf,
    /// Released by the kernel when this is dropped or the process dies.
    _lock: Flock<File>,
}

impl ReplicaDir {
    /// Takes the lock of the directory at `path`.
    pub fn lock(path: &Path) -> Result<ReplicaDir, EngineError> {
        let doing = || format!("open replica directory {}", path.display());
        match fs::metadata(path) {
            Ok(found) if found.is_dir() => {}
            Ok(_) => {
                return Err(EngineError::new(
                    ErrorKind::NotFound,
                    format!("{}: it is not a directory", doing()),
                ));
            }
            Err(error) => return Err(EngineError::os(doing(), error)),
        }
        let file = OpenOptions::new()
            .create(true)
            .truncate(false)
            .write(true)
            .open(path.join("lock"))
            .map_err(|error| EngineError::os(format!("{}: its lock file", doing()), error))?;
        match Flock::lock(file, FlockArg::LockExclusiveNonblock) {
            Ok(lock) => Ok(ReplicaDir {
                path: path.to_owned(),
                _lock: lock,
            }),
            Err((_, nix::errno::Errno::EWOULDBLOCK)) => Err(EngineError::new(
                ErrorKind::Retry,
                format!("{}: another process has it open; end that one first", doing()),
            )),
            Err((_, errno)) => Err(EngineError::os(format!("{}: its lock", doing()), errno.into())),
        }
    }

    /// Where it is.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Opens a file that exists.
    pub fn open_file(&self, file: FileId) -> Result<File, IoFailure> {
        open_direct(OpenOptions::new().read(true).write(true), &self.path.join(file.path()))
            .map_err(|error| failure("open", file, error))
    }

    /// Bytes of the pool's file system that are available beyond what a pool leaves free; none if nobody can tell.
    pub fn pool_free_bytes(&self) -> u64 {
        nix::sys::statvfs::statvfs(&self.path).map_or(0, |stat| {
            let unit = stat.fragment_size();
            free_bytes(stat.blocks() * unit, stat.blocks_available() * unit)
        })
    }

    /// Performs `Io::Create` and hands the open file back.
    ///
    /// Sync order: the file first, so that no name ever points at a file whose blocks are not there; then the
    /// directory that holds the name.
    pub fn create_file(&self, file: FileId, len: u64) -> Result<File, IoFailure> {
        let path = self.path.join(file.path());
        let fail = |error| failure("create", file, error);
        let created = open_direct(OpenOptions::new().read(true).write(true).create_new(true), &path);
        let (handle, len_before) = match created {
            Ok(handle) => (handle, None),
            Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {
                let handle = open_direct(OpenOptions::new().read(true).write(true), &path).map_err(fail)?;
                let len = handle.metadata().map_err(fail)?.len();
                (handle, Some(len))
            }
            Err(error) => return Err(fail(error)),
        };
        if let Err(error) = allocate(&handle, len) {
            // Best effort: the error that is reported is the first one, and a file left behind is found by `list`.
            match len_before {
                None => drop(fs::remove_file(&path)),
                Some(before) => drop(handle.set_len(before)),
            }
            return Err(fail(error));
        }
        handle.sync_all().map_err(fail)?;
        // The name of the directory for segments is as durable as the replica's own: both were synced before the replica
        // got its name. A sync of it here would cost every new segment another flush of the disk.
        sync_dir(path.parent().expect("a replica's file has a parent")).map_err(fail)?;
        Ok(handle)
    }

    /// Performs `Io::Remove`.
    pub fn remove_file(&self, file: FileId) -> Result<(), IoFailure> {
        fs::remove_file(self.path.join(file.path())).map_err(|error| failure("remove", file, error))
    }

    /// Every file of the replica with its length.
    pub fn list(&self) -> Result<Vec<(FileId, u64)>, IoFailure> {
        let mut files = Vec::new();
        for (dir, prefix) in [(self.path.clone(), ""), (self.path.join(SEGMENTS), "segments/")] {
            let fail = |error: io::Error| IoFailure::Failed(format!("list {}: {error}", dir.display()));
            let entries = match fs::read_dir(&dir) {
                Ok(entries) => entries,
                Err(error) if error.kind() == io::ErrorKind::NotFound => return Err(IoFailure::NotFound),
                Err(error) => return Err(fail(error)),
            };
            for entry in entries {
                let entry = entry.map_err(fail)?;
                let name = entry.file_name();
                let Some(file) = name
                    .to_str()
                    .and_then(|name| FileId::from_path(&format!("{prefix}{name}")))
                else {
                    continue;
                };
                files.push((file, entry.metadata().map_err(fail)?.len()));
            }
        }
        Ok(files)
    }
}

/// The blocking disk: one operation at a time, each waited for.
#[derive(Debug)]
pub struct FileDisk {
    dir: Arc<ReplicaDir>,
    files: HashMap<FileId, File>,
}

impl FileDisk {
    /// Opens the replica directory at `path`, which must not be open anywhere else.
    pub fn open(path: &Path) -> Result<FileDisk, EngineError> {
        Ok(FileDisk::new(Arc::new(ReplicaDir::lock(path)?)))
    }

    /// A disk on a directory that is already locked.
    pub fn new(dir: Arc<ReplicaDir>) -> FileDisk {
        FileDisk {
            dir,
            files: HashMap::new(),
        }
    }

    /// The directory, to keep it locked or to drive its files in another way.
    pub fn dir(&self) -> Arc<ReplicaDir> {
        self.dir.clone()
    }

    fn file(&mut self, file: FileId) -> Result<&File, IoFailure> {
        if !self.files.contains_key(&file) {
            if self.files.len() >= OPEN_FILES_MAX {
                self.files.clear();
            }
            let handle = self.dir.open_file(file)?;
            self.files.insert(file, handle);
        }
        Ok(&self.files[&file])
    }
}

impl Disk for FileDisk {
    fn read(&mut self, file: FileId, offset: u64, buf: &mut [u8]) -> Result<(), IoFailure> {
        let handle = self.file(file)?;
        let aligned = (buf.as_ptr() as usize).is_multiple_of(PAGE_BYTES) && buf.len().is_multiple_of(PAGE_BYTES);
        let outcome = if aligned {
            handle.read_exact_at(buf, offset)
        } else {
            // Direct I/O wants whole aligned pages.
            let mut pages = BufMut::zeroed(buf.len().next_multiple_of(PAGE_BYTES));
            handle
                .read_exact_at(pages.as_mut(), offset)
                .map(|()| buf.copy_from_slice(&pages.as_ref()[..buf.len()]))
        };
        outcome.map_err(|error| failure("read", file, error))
    }

    fn write(&mut self, file: FileId, offset: u64, parts: &[Buf]) -> Result<(), IoFailure> {
        let handle = self.file(file)?;
        write_parts(handle, offset, parts).map_err(|error| failure("write", file, error))
    }

    fn sync(&mut self, file: FileId) -> Result<(), IoFailure> {
        self.file(file)?
            .sync_data()
            .map_err(|error| failure("sync", file, error))
    }

    fn create(&mut self, file: FileId, len: u64) -> Result<(), IoFailure> {
        self.files.remove(&file);
        let handle = self.dir.create_file(file, len)?;
        self.files.insert(file, handle);
        Ok(())
    }

    fn remove(&mut self, file: FileId) -> Result<(), IoFailure> {
        self.files.remove(&file);
        self.dir.remove_file(file)
    }

    fn names(&mut self, file: FileId) -> Result<u64, IoFailure> {
        let found = fs::metadata(self.dir.path().join(file.path()));
        found
            .map(|found| found.nlink())
            .map_err(|error| failure("look at", file, error))
    }

    fn list(&mut self) -> Result<Vec<(FileId, u64)>, IoFailure> {
        self.dir.list()
    }
}

/// Writes all of `parts` at `offset`, however many calls that takes.
pub(crate) fn write_parts(file: &File, mut offset: u64, parts: &[Buf]) -> io::Result<()> {
    for parts in parts.chunks(PARTS_PER_CALL_MAX) {
        let mut slices: Vec<IoSlice<'_>> = parts.iter().map(|part| IoSlice::new(part.as_ref())).collect();
        let mut rest = &mut slices[..];
        while !rest.is_empty() {
            let at = i64::try_from(offset).map_err(|_| io::Error::from_raw_os_error(libc::EFBIG))?;
            let written = match nix::sys::uio::pwritev(file.as_fd(), rest, at) {
                Ok(0) => return Err(io::ErrorKind::WriteZero.into()),
                Ok(written) => written,
                Err(nix::errno::Errno::EINTR) => continue,
                Err(errno) => return Err(errno.into()),
            };
            offset += written as u64;
            IoSlice::advance_slices(&mut rest, written);
        }
    }
    Ok(())
}

/// Says what failed, in the engine's terms.
pub(crate) fn failure(doing: &str, file: FileId, error: io::Error) -> IoFailure {
    match error.raw_os_error() {
        Some(libc::ENOSPC | libc::EDQUOT) => IoFailure::NoSpace,
        Some(libc::ENOENT) => IoFailure::NotFound,
        _ => IoFailure::Failed(format!("{doing} {}: {error}", file.path())),
    }
}

/// What replicas share among themselves beyond what they were promised. A pool whose object asks for more to be left free
/// than is usual promises less; what they have beyond their promise they give back to whoever needs it.
fn free_bytes(total: u64, available: u64) -> u64 {
    available.saturating_sub(reserve_bytes_default(total))
}

/// Opens for direct I/O; a file system without it (some network and memory file systems) gets buffered I/O.
fn open_direct(options: &mut OpenOptions, path: &Path) -> io::Result<File> {
    // Nobody asks when a segment was read, and keeping note of it costs a percent of each read.
    let opened = match options.custom_flags(libc::O_DIRECT | libc::O_NOATIME).open(path) {
        // The file belongs to somebody else, and we are not root.
        Err(error) if error.raw_os_error() == Some(libc::EPERM) => options.custom_flags(libc::O_DIRECT).open(path),
        outcome => outcome,
    };
    match opened {
        // Some file systems make the file before they refuse the flag: it is ours then.
        Err(error) if error.raw_os_error() == Some(libc::EINVAL) => {
            options.custom_flags(0).create_new(false).create(false);
            match options.open(path) {
                Err(error) if error.kind() == io::ErrorKind::NotFound => options.create_new(true).open(path),
                outcome => outcome,
            }
        }
        outcome => outcome,
    }
}

/// Gives the file `len` bytes with blocks behind them, keeping what it holds.
fn allocate(file: &File, len: u64) -> io::Result<()> {
    let len = i64::try_from(len).map_err(|_| io::Error::from_raw_os_error(libc::EFBIG))?;
    loop {
        match fallocate(file.as_fd(), FallocateFlags::empty(), 0, len) {
            Ok(()) => return Ok(()),
            Err(nix::errno::Errno::EINTR) => {}
            Err(errno) => return Err(errno.into()),
        }
    }
}

/// Makes the names in a directory survive a power cut.
pub(crate) fn sync_dir(path: &Path) -> io::Result<()> {
    File::open(path)?.sync_all()
}
