//! Loop devices, through the kernel's own calls.
//!
//! Opening, closing and asking about a loop device's backing file calls our own FUSE server, so nothing here may run on
//! a shard.

use std::fs::{self, File, OpenOptions};
use std::io;
use std::os::fd::{AsRawFd, RawFd};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use nix::sys::stat::{Mode, SFlag, makedev, mknod};

use super::Export;
use crate::engine::{EngineError, ErrorKind};

const LOOP_CLR_FD: libc::c_ulong = 0x4C01;
const LOOP_GET_STATUS64: libc::c_ulong = 0x4C05;
const LOOP_SET_CAPACITY: libc::c_ulong = 0x4C07;
const LOOP_CONFIGURE: libc::c_ulong = 0x4C0A;
const LOOP_CTL_GET_FREE: libc::c_ulong = 0x4C82;

const LO_FLAGS_READ_ONLY: u32 = 1;
const LO_FLAGS_DIRECT_IO: u32 = 16;

/// How often another process may take the free device from under us before we give up.
const RACES_MAX: usize = 64;

/// `struct loop_info64`
#[derive(Clone, Copy)]
#[repr(C)]
struct LoopInfo {
    device: u64,
    inode: u64,
    rdevice: u64,
    offset: u64,
    size_limit: u64,
    number: u32,
    encrypt_type: u32,
    encrypt_key_size: u32,
    flags: u32,
    file_name: [u8; 64],
    crypt_name: [u8; 64],
    encrypt_key: [u8; 32],
    init: [u64; 2],
}

/// `struct loop_config`
#[repr(C)]
struct LoopConfig {
    fd: u32,
    block_size: u32,
    info: LoopInfo,
    reserved: [u64; 8],
}

const _: () = {
    assert!(size_of::<LoopInfo>() == 232);
    assert!(size_of::<LoopConfig>() == 304);
};

/// A loop device, by the number in its name.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct LoopDevice(u32);

impl LoopDevice {
    /// The device behind a path such as `/dev/loop7`.
    pub fn from_path(path: &Path) -> Option<LoopDevice> {
        path.file_name()?
            .to_str()?
            .strip_prefix("loop")?
            .parse()
            .ok()
            .map(LoopDevice)
    }

    /// Its node in `/dev`.
    pub fn path(self) -> PathBuf {
        PathBuf::from(format!("/dev/loop{}", self.0))
    }

    /// Makes a block device of `backing`, for direct I/O in the sectors of `export`.
    pub fn attach(backing: &File, name: &str, export: &Export) -> Result<LoopDevice, EngineError> {
        let control = OpenOptions::new()
            .read(true)
            .write(true)
            .open("/dev/loop-control")
            .map_err(|error| {
                EngineError::os(
                    "open /dev/loop-control (is the loop driver there, is this container privileged?)",
                    error,
                )
            })?;
        let mut info = LoopInfo {
            device: 0,
            inode: 0,
            rdevice: 0,
            offset: 0,
            size_limit: 0,
            number: 0,
            encrypt_type: 0,
            encrypt_key_size: 0,
            flags: LO_FLAGS_DIRECT_IO | if export.read_only { LO_FLAGS_READ_ONLY } else { 0 },
            file_name: [0; 64],
            crypt_name: [0; 64],
            encrypt_key: [0; 32],
            init: [0; 2],
        };
        let known = name.len().min(info.file_name.len() - 1);
        info.file_name[..known].copy_from_slice(&name.as_bytes()[..known]);
        let config = LoopConfig {
            fd: backing.as_raw_fd() as u32,
            block_size: export.sector_bytes,
            info,
            reserved: [0; 8],
        };

        for _ in 0..RACES_MAX {
            let number = ioctl(control.as_raw_fd(), LOOP_CTL_GET_FREE, 0)
                .map_err(|error| EngineError::os("find a free loop device", error))?;
            let device = LoopDevice(number as u32);
            device
                .make_node()
                .map_err(|error| EngineError::os(format!("make {}", device.path().display()), error))?;
            let doing = || format!("configure {} for {name}", device.path().display());
            let file = device.open().map_err(|error| EngineError::os(doing(), error))?;
            match ioctl(file.as_raw_fd(), LOOP_CONFIGURE, &raw const config as usize) {
                Ok(_) => return device.verified(),
                // Somebody else was faster with this one.
                Err(error) if error.raw_os_error() == Some(libc::EBUSY) => {}
                Err(error) => return Err(EngineError::os(doing(), error)),
            }
        }
        Err(EngineError::new(
            ErrorKind::Retry,
            format!("find a free loop device for {name}: all attempts lost a race"),
        ))
    }

    /// A device that caches a second time, or that swallows discards, is not what we promise.
    fn verified(self) -> Result<LoopDevice, EngineError> {
        let direct = self.attribute("loop/dio").is_some_and(|value| value == "1");
        let discards = self
            .attribute("queue/discard_max_bytes")
            .is_some_and(|value| value != "0");
        if direct && discards {
            return Ok(self);
        }
        let what = if direct { "discards" } else { "direct I/O" };
        // The error below is the one to tell.
        let _ = self.clear(Duration::ZERO, |_| true);
        let path = self.path();
        Err(EngineError::new(
            ErrorKind::Failed,
            format!("the kernel gave {} without {what}", path.display()),
        ))
    }

    /// Makes the device see the present size of its backing file.
    pub fn refresh_size(self) -> io::Result<()> {
        ioctl(self.open()?.as_raw_fd(), LOOP_SET_CAPACITY, 0).map(drop)
    }

    /// Its capacity.
    pub fn size_bytes(self) -> Option<u64> {
        self.attribute("size")?.parse::<u64>().ok().map(|sectors| sectors * 512)
    }

    /// Takes the backing file away, if `ours` says yes to it, and waits up to `patience` for the device to be free. One
    /// that is in use is cleared by its last user; until then, false.
    ///
    /// A device that is free may be somebody else's a moment later, so it is asked to go once only, and while we have
    /// it open: nobody can clear and reuse it between our look and our request.
    pub fn clear(self, patience: Duration, ours: impl Fn(&Path) -> bool) -> io::Result<bool> {
        let is_ours = || self.backing_file().is_some_and(|backing| ours(&backing));
        let file = match self.open() {
            Ok(file) => file,
            Err(error) if matches!(error.raw_os_error(), Some(libc::ENOENT | libc::ENXIO)) => return Ok(true),
            Err(error) => return Err(error),
        };
        if !is_ours() {
            return Ok(true);
        }
        match ioctl(file.as_raw_fd(), LOOP_CLR_FD, 0) {
            Ok(_) => {}
            Err(error) if matches!(error.raw_os_error(), Some(libc::ENXIO | libc::EBUSY)) => {}
            Err(error) => return Err(error),
        }
        // Present kernels clear the device when its last user closes it, and that may be us.
        drop(file);
        let deadline = Instant::now() + patience;
        while is_ours() {
            if Instant::now() >= deadline {
                return Ok(false);
            }
            std::thread::sleep(Duration::from_millis(5));
        }
        Ok(true)
    }

    /// The path of the backing file as the kernel tells it, and without asking the file's server.
    pub fn backing_file(self) -> Option<PathBuf> {
        let path = fs::read(format!("/sys/block/loop{}/loop/backing_file", self.0)).ok()?;
        let path = path.strip_suffix(b"\n").unwrap_or(&path);
        let path = path.strip_suffix(b" (deleted)").unwrap_or(path);
        Some(PathBuf::from(std::ffi::OsStr::from_bytes(path)))
    }

    /// Whether the server of the backing file is dead. Asks the file's server, so it may take as long as that likes.
    pub fn backing_is_dead(self) -> bool {
        let Ok(file) = self.open() else { return false };
        // SAFETY: all zeros is a valid LoopInfo, which is made of integers.
        let mut info: LoopInfo = unsafe { std::mem::zeroed() };
        match ioctl(file.as_raw_fd(), LOOP_GET_STATUS64, &raw mut info as usize) {
            Ok(_) => false,
            Err(error) => matches!(error.raw_os_error(), Some(libc::ENOTCONN | libc::ECONNABORTED)),
        }
    }

    /// All loop devices that have a backing file, with its path.
    pub fn all() -> io::Result<Vec<(LoopDevice, PathBuf)>> {
        let mut devices = Vec::new();
        for entry in fs::read_dir("/sys/block")? {
            let Some(device) = LoopDevice::from_path(Path::new(&entry?.file_name())) else {
                continue;
            };
            if let Some(backing) = device.backing_file() {
                devices.push((device, backing));
            }
        }
        Ok(devices)
    }

    fn open(self) -> io::Result<File> {
        match OpenOptions::new()
            .read(true)
            .write(true)
            .custom_flags(libc::O_CLOEXEC)
            .open(self.path())
        {
            // A read-only device.
            Err(error) if matches!(error.raw_os_error(), Some(libc::EROFS | libc::EACCES)) => File::open(self.path()),
            outcome => outcome,
        }
    }

    /// In a container nobody makes the node of a device that the kernel has just invented.
    fn make_node(self) -> io::Result<()> {
        if self.path().exists() {
            return Ok(());
        }
        let number = self.attribute("dev").and_then(|dev| {
            let (major, minor) = dev.split_once(':')?;
            Some(makedev(major.parse().ok()?, minor.parse().ok()?))
        });
        let number = number.ok_or_else(|| io::Error::from_raw_os_error(libc::ENODEV))?;
        match mknod(&self.path(), SFlag::S_IFBLK, Mode::S_IRUSR | Mode::S_IWUSR, number) {
            Ok(()) | Err(nix::errno::Errno::EEXIST) => Ok(()),
            Err(errno) => Err(errno.into()),
        }
    }

    fn attribute(self, name: &str) -> Option<String> {
        fs::read_to_string(format!("/sys/block/loop{}/{name}", self.0))
            .ok()
            .map(|value| value.trim().to_owned())
    }
}

fn ioctl(fd: RawFd, request: libc::c_ulong, argument: usize) -> io::Result<i32> {
    // SAFETY: `fd` is open for the duration of the call, and each caller passes the argument that the request wants:
    // nothing, or the address of a live structure of the kernel's layout (asserted above).
    let result = unsafe { libc::ioctl(fd, request as _, argument) };
    if result < 0 {
        Err(io::Error::last_os_error())
    } else {
        Ok(result)
    }
}
