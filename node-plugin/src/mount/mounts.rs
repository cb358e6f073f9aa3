//! Mounting and unmounting, by `mount` and `umount`.
//!
//! Always with `--no-canonicalize`: our paths were checked for links already, and resolving a path that lies on a dead
//! mount is what we want to avoid.

use std::io::ErrorKind;
use std::path::{Path, PathBuf};
use std::time::Duration;

use super::flags::MountFlags;
use super::table::MountTable;
use super::{FsType, MountError, Tools};

/// A mount may have to replay a journal, an unmount may have to write gigabytes of dirty pages.
const MOUNT_DEADLINE: Duration = Duration::from_secs(600);

/// Detaching from the tree waits for nothing.
const LAZY_DEADLINE: Duration = Duration::from_secs(30);

/// Flushing at a shutdown: what is not written by then stays the guest's business, as at any crash.
const SYNC_DEADLINE: Duration = Duration::from_secs(10);

/// What the statistics of a file system take when it answers at all.
const STAT_DEADLINE: Duration = Duration::from_secs(10);

/// How often a stack of mounts on one path is taken down before we give up on it.
const STACK_MAX: usize = 16;

/// Mounts the file system of `device` on the directory `target`.
pub async fn mount_device(
    tools: &Tools,
    device: &Path,
    target: &Path,
    fs: FsType,
    flags: &MountFlags,
    read_only: bool,
    device_read_only: bool,
) -> Result<(), MountError> {
    let option = flags.to_option(fs.default_options(device_read_only), read_only);
    let args = ["-n", "--no-canonicalize", "-t", fs.name(), "-o", &option].map(str::to_owned);
    let args = args
        .iter()
        .map(|arg| arg.as_ref())
        .chain([device.as_os_str(), target.as_os_str()]);
    tools.run("mount", args, MOUNT_DEADLINE).await?.success().map(drop)
}

/// Binds `source` (a directory or a device node) onto `target`.
pub async fn bind(tools: &Tools, source: &Path, target: &Path, read_only: bool) -> Result<(), MountError> {
    let args = ["-n", "--no-canonicalize", "--bind"].map(str::to_owned);
    let args = args
        .iter()
        .map(|arg| arg.as_ref())
        .chain([source.as_os_str(), target.as_os_str()]);
    tools.run("mount", args, MOUNT_DEADLINE).await?.success()?;
    if read_only {
        let args = ["-n", "--no-canonicalize", "-o", "remount,bind,ro"].map(str::to_owned);
        let args = args.iter().map(|arg| arg.as_ref()).chain([target.as_os_str()]);
        let done = match tools.run("mount", args, MOUNT_DEADLINE).await {
            Ok(finished) => finished.success(),
            Err(error) => Err(error),
        };
        if let Err(error) = done {
            // A writable mount where a read-only one was promised is worse than none.
            unmount(tools, target).await?;
            return Err(error);
        }
    }
    Ok(())
}

/// Unmounts everything at `target`, waiting for what is dirty to be written. Nothing mounted there is fine.
pub async fn unmount(tools: &Tools, target: &Path) -> Result<(), MountError> {
    unmount_with(tools, target, &["-n", "--no-canonicalize"], MOUNT_DEADLINE).await
}

/// Takes everything at `target` out of the tree without touching it: for mounts whose device is gone.
pub async fn unmount_lazily(tools: &Tools, target: &Path) -> Result<(), MountError> {
    unmount_with(tools, target, &["-n", "--no-canonicalize", "--lazy"], LAZY_DEADLINE).await
}

async fn unmount_with(tools: &Tools, target: &Path, args: &[&str], deadline: Duration) -> Result<(), MountError> {
    for _ in 0..STACK_MAX {
        if read_table().await?.at(target).is_none() {
            return Ok(());
        }
        let args = args.iter().map(|arg| arg.as_ref()).chain([target.as_os_str()]);
        let finished = tools.run("umount", args, deadline).await?;
        // Somebody else may have been faster; the table decides.
        if finished.code != 0 && read_table().await?.at(target).is_some() {
            return Err(finished.failure());
        }
    }
    Err(MountError::Failed(format!(
        "more than {STACK_MAX} mounts lie upon each other at {}",
        target.display()
    )))
}

/// The mount table, read off the threads that serve requests: a stuck unmount can hold a lock of the kernel's.
pub async fn read_table() -> Result<MountTable, MountError> {
    blocking("reading the mount table", MountTable::read).await
}

/// Runs a short look at the node's own file system on a thread for that, with a deadline.
pub async fn blocking<T: Send + 'static>(
    what: &str,
    look: impl FnOnce() -> Result<T, MountError> + Send + 'static,
) -> Result<T, MountError> {
    match tokio::time::timeout(STAT_DEADLINE, tokio::task::spawn_blocking(look)).await {
        Ok(Ok(result)) => result,
        Ok(Err(join)) => Err(MountError::Failed(format!("{what} stopped: {join}"))),
        Err(_) => Err(MountError::TimedOut {
            what: what.to_owned(),
            after: STAT_DEADLINE,
        }),
    }
}

/// Writes out everything dirty of the file system mounted at `path`.
pub async fn sync(tools: &Tools, path: &Path) -> Result<(), MountError> {
    let args = ["-f".as_ref(), path.as_os_str()];
    tools.run("sync", args, SYNC_DEADLINE).await?.success().map(drop)
}

/// Space and inodes of a file system.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Usage {
    pub total_bytes: u64,
    pub available_bytes: u64,
    pub used_bytes: u64,
    pub inodes: u64,
    pub inodes_free: u64,
}

/// Asks the file system mounted at `path`.
pub async fn usage(tools: &Tools, path: &Path) -> Result<Usage, MountError> {
    let args = ["-f", "-c", "%S %b %f %a %c %d"].map(str::to_owned);
    let args = args.iter().map(|arg| arg.as_ref()).chain([path.as_os_str()]);
    let said = tools.run("stat", args, STAT_DEADLINE).await?.success()?;
    let said = String::from_utf8_lossy(&said);
    let numbers: Vec<u64> = said
        .split_whitespace()
        .filter_map(|number| number.parse().ok())
        .collect();
    let [block, blocks, free, available, inodes, inodes_free] = numbers[..] else {
        return Err(MountError::Failed(format!(
            "stat -f said {said:?} about {}",
            path.display()
        )));
    };
    Ok(Usage {
        total_bytes: blocks * block,
        available_bytes: available * block,
        used_bytes: (blocks - free) * block,
        inodes,
        inodes_free,
    })
}

/// Makes the directory `path`; its parents exist (the caller of CSI sees to that) or are made too.
pub async fn make_directory(path: &Path) -> Result<(), MountError> {
    let path = path.to_owned();
    blocking("making a directory", move || {
        std::fs::create_dir_all(&path).map_err(MountError::io(format!("making the directory {}", path.display())))
    })
    .await
}

/// Makes the empty file `path`, on which a device node is bound.
pub async fn make_file(path: &Path) -> Result<(), MountError> {
    let path = path.to_owned();
    blocking("making a file", move || {
        use std::os::unix::fs::OpenOptionsExt;
        let doing = || format!("making the file {}", path.display());
        if let Some(parent) = path.parent() {
            std::fs::create_dir_all(parent).map_err(MountError::io(doing()))?;
        }
        let mut options = std::fs::OpenOptions::new();
        options
            .write(true)
            .create(true)
            .mode(0o600)
            .custom_flags(nix::libc::O_NOFOLLOW);
        options.open(&path).map(drop).map_err(MountError::io(doing()))
    })
    .await
}

/// Removes the mount point itself: an empty directory or an empty file. Something in it is somebody's data and stays.
pub async fn remove_mount_point(path: &Path) -> Result<(), MountError> {
    let path: PathBuf = path.to_owned();
    blocking("removing a mount point", move || {
        let gone = match std::fs::symlink_metadata(&path) {
            Ok(meta) if meta.is_dir() => std::fs::remove_dir(&path),
            Ok(meta) if meta.is_file() && meta.len() == 0 => std::fs::remove_file(&path),
            Ok(_) => {
                let what = format!("{} is neither an empty file nor a directory: it stays", path.display());
                return Err(MountError::Refused(what));
            }
            Err(error) => Err(error),
        };
        match gone {
            Err(error) if error.kind() != ErrorKind::NotFound => Err(MountError::io(format!(
                "removing the mount point {}",
                path.display()
            ))(error)),
            _ => Ok(()),
        }
    })
    .await
}
