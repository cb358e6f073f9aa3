//! A block device out of what every kernel has: a FUSE file system of one file, and a loop device on that file.
//!
//! ```text
//! guest ─► /dev/loopN ─► <runtime_dir>/<volume>/galleonfs-<volume> (FUSE, direct I/O) ─► /dev/fuse ─► FuseSession
//! ```
//!
//! One mount, and so one connection, per volume: a volume that hangs holds up nobody else's requests. The file's name
//! says whose it is, because that is all that is left in a loop device's status when the mount has gone with its
//! container.

use std::fs::{self, OpenOptions};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::sync::mpsc;
use std::time::Duration;

use super::fuse::FuseSession;
use super::loop_device::LoopDevice;
use super::{Device, Export, Frontend, GuestPath, Session, mounts};
use crate::engine::{EngineError, ErrorKind};

const FILE_PREFIX: &str = "galleonfs-";

/// How long the last user of a device may take to go: a probe, or an unmount that is under way.
const CLEAR_WAIT_MAX: Duration = Duration::from_secs(5);

/// How long the server of a backing file that looks like ours may take to answer before it counts as alive but slow.
const DEAD_CHECK_MAX: Duration = Duration::from_secs(2);

/// The frontend; see the module.
#[derive(Debug)]
pub struct FuseLoop {
    runtime_dir: PathBuf,
}

impl FuseLoop {
    /// Mounts below `runtime_dir`.
    pub fn new(runtime_dir: &Path) -> FuseLoop {
        FuseLoop {
            runtime_dir: runtime_dir.to_owned(),
        }
    }

    fn mount_point(&self, volume: &str) -> PathBuf {
        self.runtime_dir.join(volume)
    }

    fn file(&self, volume: &str) -> PathBuf {
        self.mount_point(volume).join(file_name(volume))
    }
}

fn file_name(volume: &str) -> String {
    format!("{FILE_PREFIX}{volume}")
}

impl Frontend for FuseLoop {
    fn open(&self, export: &Export) -> Result<Box<dyn Session>, EngineError> {
        let target = self.mount_point(&export.volume);
        let doing = || {
            format!(
                "mount the FUSE file of volume {} at {}",
                export.volume,
                target.display()
            )
        };
        // A mount that a dead predecessor left must go first: even looking at the directory would fail.
        let stale = mounts::fuse_mounts_below(&target).map_err(|error| EngineError::os(doing(), error))?;
        stale.iter().for_each(|target| mounts::unmount(target));
        fs::create_dir_all(&target).map_err(|error| EngineError::os(doing(), error))?;
        let dev = mounts::mount_fuse(&target, &format!("galleonfs:{}", export.volume), export.read_only)
            .map_err(|error| EngineError::os(doing(), error))?;
        let session = FuseSession::new(dev, file_name(&export.volume), export);
        Ok(Box::new(session))
    }

    fn connect(&self, export: &Export) -> Result<Device, EngineError> {
        let path = self.file(&export.volume);
        let backing = OpenOptions::new()
            .read(true)
            .write(!export.read_only)
            .open(&path)
            .map_err(|error| EngineError::os(format!("open {}", path.display()), error))?;
        let device = LoopDevice::attach(&backing, &file_name(&export.volume), export)?;
        Ok(Device {
            path: device.path(),
            size_bytes: export.size_bytes,
            frontend: GuestPath::Device.frontend(),
        })
    }

    fn resize(&self, export: &Export, device: &Device) -> Result<Device, EngineError> {
        let doing = || format!("grow {} to {} bytes", device.path.display(), export.size_bytes);
        let path = self.file(&export.volume);
        // Older kernels take the size that was last seen, so have a look.
        let seen = fs::metadata(&path)
            .map_err(|error| EngineError::os(doing(), error))?
            .size();
        let found = LoopDevice::from_path(&device.path)
            .ok_or_else(|| EngineError::new(ErrorKind::NotFound, format!("{}: it is no loop device", doing())))?;
        found.refresh_size().map_err(|error| EngineError::os(doing(), error))?;
        if found.size_bytes() != Some(export.size_bytes) {
            let text = format!(
                "{}: the file has {seen} bytes, the device {:?}",
                doing(),
                found.size_bytes()
            );
            return Err(EngineError::new(ErrorKind::Retry, text));
        }
        Ok(Device {
            size_bytes: export.size_bytes,
            ..device.clone()
        })
    }

    fn disconnect(&self, export: &Export, device: &Device) -> Result<(), EngineError> {
        let doing = || format!("detach {} of volume {}", device.path.display(), export.volume);
        let Some(found) = LoopDevice::from_path(&device.path) else {
            return Ok(());
        };
        let name = file_name(&export.volume);
        let ours = |backing: &Path| backing.file_name().is_some_and(|found| *found == *name);
        match found.clear(CLEAR_WAIT_MAX, ours) {
            Ok(true) => Ok(()),
            Ok(false) => {
                let text = format!("{}: it is still in use; unmount or close it first", doing());
                Err(EngineError::new(ErrorKind::Retry, text))
            }
            Err(error) => Err(EngineError::os(doing(), error)),
        }
    }

    fn close(&self, volume: &str) {
        let target = self.mount_point(volume);
        mounts::end(&target);
        // Only an empty directory goes; anything else is not ours.
        let _ = fs::remove_dir(&target);
    }

    fn remove_stale(&self) -> Result<(), EngineError> {
        let doing = || format!("remove what a predecessor left below {}", self.runtime_dir.display());
        let devices = LoopDevice::all().map_err(|error| EngineError::os(doing(), error))?;
        for (device, backing) in devices {
            let named_by_us = backing
                .file_name()
                .is_some_and(|name| name.to_string_lossy().starts_with(FILE_PREFIX));
            // The path is below the mount point, or just the name if the mount went with its container; in both cases
            // a node plugin that lives (another one on this kernel) keeps its devices.
            let path_is_ours = backing.starts_with(&self.runtime_dir) || backing.parent() == Some(Path::new("/"));
            if !named_by_us || !path_is_ours || !told_in_time(move || device.backing_is_dead()) {
                continue;
            }
            match device.clear(Duration::ZERO, |found| found == backing) {
                Ok(true) => tracing::info!(device = %device.path().display(), "removed a stale loop device"),
                Ok(false) => tracing::warn!(
                    device = %device.path().display(),
                    "a stale loop device is still in use; it goes when its last user does"
                ),
                Err(error) => {
                    tracing::warn!(device = %device.path().display(), %error, "could not remove a stale loop device");
                }
            }
        }
        let targets = mounts::fuse_mounts_below(&self.runtime_dir).map_err(|error| EngineError::os(doing(), error))?;
        for target in targets {
            let looked_at = target.clone();
            if !told_in_time(move || mounts::is_dead(&looked_at)) {
                continue;
            }
            mounts::unmount(&target);
            let _ = fs::remove_dir(&target);
        }
        Ok(())
    }
}

/// Asks on a thread of its own, since a server that hangs would hold the question up for ever. No answer is a no.
fn told_in_time(question: impl FnOnce() -> bool + Send + 'static) -> bool {
    let (told, asked) = mpsc::channel();
    std::thread::spawn(move || {
        // Nobody listens any more when the answer came too late.
        let _ = told.send(question());
    });
    asked.recv_timeout(DEAD_CHECK_MAX).unwrap_or(false)
}
