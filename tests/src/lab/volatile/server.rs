//! The smallest FUSE server that a loop device can stand on: one directory with one file of a fixed size.
//!
//! One thread, one request at a time. It waits for requests and for signals in one place, so that no request is begun
//! after the power went.

use std::fs::{File, OpenOptions};
use std::io::{self, Read, Write};
use std::os::fd::{AsFd, AsRawFd};
use std::path::Path;
use std::time::{SystemTime, UNIX_EPOCH};

use anyhow::{Context, Result};
use nix::errno::Errno;
use nix::mount::{MsFlags, mount};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::signal::{SigSet, Signal};
use nix::sys::signalfd::SignalFd;

use super::CUT;
use super::disk::{BLOCK, Disk};

/// The file's name.
pub const FILE: &str = "disk";

/// How the server begins to say what a power cut did.
pub const CUT_LINE: &str = "power cut: ";

const WRITE_MAX: usize = 1 << 20;
const ROOT_ID: u64 = 1;
const FILE_ID: u64 = 2;
/// Nothing but requests changes the file, so the kernel need not ask again.
const VALID_SECONDS: u64 = 3600;

/// Header of a request, and of a write.
const HEADER: usize = 40;
const WRITE_HEADER: usize = 40;

mod opcode {
    pub const LOOKUP: u32 = 1;
    pub const FORGET: u32 = 2;
    pub const GETATTR: u32 = 3;
    pub const SETATTR: u32 = 4;
    pub const OPEN: u32 = 14;
    pub const READ: u32 = 15;
    pub const WRITE: u32 = 16;
    pub const STATFS: u32 = 17;
    pub const RELEASE: u32 = 18;
    pub const FSYNC: u32 = 20;
    pub const FLUSH: u32 = 25;
    pub const INIT: u32 = 26;
    pub const INTERRUPT: u32 = 36;
    pub const BATCH_FORGET: u32 = 42;
    pub const FALLOCATE: u32 = 43;
}

/// Serves `image` as the file `at/disk` until it is unmounted, told to end, or cut off.
pub fn serve(image: &Path, at: &Path) -> Result<()> {
    let file = OpenOptions::new().read(true).write(true).open(image);
    let file = file.with_context(|| format!("could not open {}", image.display()))?;
    let mut disk = Disk::open(file)?;

    let mut signals = SigSet::empty();
    for signal in [CUT, Signal::SIGTERM, Signal::SIGINT] {
        signals.add(signal);
    }
    signals.thread_block()?;
    let signals = SignalFd::new(&signals)?;

    let channel = OpenOptions::new().read(true).write(true).open("/dev/fuse");
    let mut channel = channel.context("could not open /dev/fuse")?;
    let options = format!("fd={},rootmode=40000,user_id=0,group_id=0", channel.as_raw_fd());
    mount(
        Some("galleonfs-lab-disk"),
        at,
        Some("fuse"),
        MsFlags::MS_NOSUID | MsFlags::MS_NODEV,
        Some(options.as_str()),
    )
    .with_context(|| format!("could not mount on {}", at.display()))?;

    let mut buffer = vec![0; HEADER + WRITE_HEADER + WRITE_MAX];
    let mut failing = None::<Failing>;
    loop {
        let mut ready = [
            PollFd::new(signals.as_fd(), PollFlags::POLLIN),
            PollFd::new(channel.as_fd(), PollFlags::POLLIN),
        ];
        let patience = failing.as_ref().map_or(PollTimeout::NONE, |_| FAILING_MAX_MS.into());
        match poll(&mut ready, patience) {
            Err(Errno::EINTR) => continue,
            Ok(0) => return cut(disk, failing.unwrap_or_default()),
            other => other.context("could not wait for requests")?,
        };
        if ready[0].any().unwrap_or(true) {
            if signals.read_signal()?.is_some_and(|info| info.ssi_signo == CUT as u32) {
                failing = Some(Failing::begin()?);
                continue;
            }
            disk.sync();
            return Ok(disk.store()?);
        }
        let request = match channel.read(&mut buffer) {
            Ok(length) => &buffer[..length],
            // The request was taken back meanwhile.
            Err(error) if error.raw_os_error() == Some(libc::ENOENT) => continue,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
            Err(error) if error.raw_os_error() == Some(libc::ENODEV) => {
                disk.sync();
                return Ok(disk.store()?);
            }
            Err(error) => return Err(error).context("could not read a request"),
        };
        if let Some(failing) = &mut failing
            && failing.now(u32::try_from(number::<4>(request, 4))?, &disk)
        {
            return cut(disk, std::mem::take(failing));
        }
        answer(&mut disk, &mut channel, request)?;
    }
}

/// How long the power may take to go when nothing is written any more.
const FAILING_MAX_MS: u16 = 3000;

/// The power is going. Not at once: whatever takes longest would be hit always (the end of a sync, mostly, with nothing
/// left to lose). It goes when there is something to lose, within a few writes or before the next sync.
#[derive(Default)]
struct Failing {
    writes_left: u64,
    random: Random,
}

impl Failing {
    fn begin() -> Result<Self> {
        let now = SystemTime::now().duration_since(UNIX_EPOCH)?;
        let mut random = Random(u64::from(now.subsec_nanos()) | 1);
        Ok(Self {
            writes_left: random.next() % WRITES_LEFT_MAX,
            random,
        })
    }

    /// Whether it goes before this request.
    fn now(&mut self, opcode: u32, disk: &Disk) -> bool {
        if disk.unsynced_blocks() < UNSYNCED_MIN {
            return false;
        }
        match opcode {
            opcode::WRITE => {
                let last = self.writes_left == 0;
                self.writes_left = self.writes_left.saturating_sub(1);
                last
            }
            opcode::FSYNC => true,
            _ => false,
        }
    }
}

const UNSYNCED_MIN: usize = 8;
const WRITES_LEFT_MAX: u64 = 32;

/// xorshift64.
#[derive(Default)]
struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0
    }
}

/// Half of what was not synced survives, by chance.
fn cut(disk: Disk, mut failing: Failing) -> Result<()> {
    let loss = disk.cut(|| failing.random.next().is_multiple_of(2))?;
    println!("{CUT_LINE}{} unsynced blocks lost, {} kept", loss.lost, loss.kept);
    Ok(())
}

fn answer(disk: &mut Disk, channel: &mut File, request: &[u8]) -> Result<()> {
    let unique = number::<8>(request, 8);
    let outcome = match u32::try_from(number::<4>(request, 4))? {
        // Nobody waits for an answer to these.
        opcode::FORGET | opcode::BATCH_FORGET | opcode::INTERRUPT => return Ok(()),
        opcode => perform(disk, opcode, number::<8>(request, 16), &request[HEADER..]),
    };
    let (error, body) = match outcome {
        Ok(body) => (0, body),
        Err(error) => (-error.raw_os_error().unwrap_or(libc::EIO), Vec::new()),
    };
    let mut reply = Vec::with_capacity(16 + body.len());
    reply.extend(u32::try_from(16 + body.len())?.to_le_bytes());
    reply.extend(error.to_le_bytes());
    reply.extend(unique.to_le_bytes());
    reply.extend(body);
    match channel.write_all(&reply) {
        // Whoever asked is gone.
        Err(error) if error.raw_os_error() == Some(libc::ENOENT) => Ok(()),
        other => other.context("could not answer a request"),
    }
}

fn perform(disk: &mut Disk, opcode: u32, node: u64, body: &[u8]) -> io::Result<Vec<u8>> {
    let mut reply = Reply::default();
    match opcode {
        opcode::INIT => {
            const FLAGS: u32 = 1 | 1 << 5 | 1 << 22; // asynchronous reads, big writes, max_pages
            let flags = FLAGS & number::<4>(body, 12) as u32;
            reply.u32(7).u32(31).u32(WRITE_MAX as u32).u32(flags);
            reply.u16(64).u16(48).u32(WRITE_MAX as u32).u32(1);
            reply.u16((WRITE_MAX / 4096) as u16).u16(0).zeroes(32);
        }
        opcode::LOOKUP => {
            if node != ROOT_ID || body.strip_suffix(b"\0") != Some(FILE.as_bytes()) {
                return Err(io::Error::from_raw_os_error(libc::ENOENT));
            }
            reply
                .u64(FILE_ID)
                .u64(0)
                .u64(VALID_SECONDS)
                .u64(VALID_SECONDS)
                .zeroes(8);
            reply.attributes(FILE_ID, disk.size_bytes());
        }
        // Times and modes may be set, and are not remembered.
        opcode::GETATTR | opcode::SETATTR => {
            reply.u64(VALID_SECONDS).zeroes(8);
            reply.attributes(node, disk.size_bytes());
        }
        opcode::OPEN => {
            reply.zeroes(16);
        }
        opcode::READ => reply.0 = disk.read(number::<8>(body, 8), number::<4>(body, 16) as usize)?,
        opcode::WRITE => {
            let length = number::<4>(body, 16);
            let data = &body[WRITE_HEADER..];
            if data.len() as u64 != length {
                return Err(io::Error::from_raw_os_error(libc::EINVAL));
            }
            disk.write(number::<8>(body, 8), data)?;
            reply.u32(length as u32).zeroes(4);
        }
        opcode::FSYNC => disk.sync(),
        opcode::FALLOCATE => {
            let mode = number::<4>(body, 24) as i32;
            if mode & (libc::FALLOC_FL_PUNCH_HOLE | libc::FALLOC_FL_ZERO_RANGE) == 0 {
                return Err(io::Error::from_raw_os_error(libc::EOPNOTSUPP));
            }
            disk.discard(number::<8>(body, 8), number::<8>(body, 16))?;
        }
        opcode::STATFS => {
            let blocks = disk.size_bytes() / BLOCK as u64;
            reply
                .u64(blocks)
                .zeroes(32)
                .u32(BLOCK as u32)
                .u32(255)
                .u32(BLOCK as u32)
                .zeroes(28);
        }
        opcode::RELEASE | opcode::FLUSH => {}
        _ => return Err(io::Error::from_raw_os_error(libc::ENOSYS)),
    }
    Ok(reply.0)
}

/// A little-endian number of `N` bytes.
fn number<const N: usize>(bytes: &[u8], at: usize) -> u64 {
    let mut wide = [0; 8];
    wide[..N].copy_from_slice(&bytes[at..at + N]);
    u64::from_le_bytes(wide)
}

#[derive(Default)]
struct Reply(Vec<u8>);

impl Reply {
    fn u16(&mut self, value: u16) -> &mut Self {
        self.0.extend(value.to_le_bytes());
        self
    }

    fn u32(&mut self, value: u32) -> &mut Self {
        self.0.extend(value.to_le_bytes());
        self
    }

    fn u64(&mut self, value: u64) -> &mut Self {
        self.0.extend(value.to_le_bytes());
        self
    }

    fn zeroes(&mut self, count: usize) -> &mut Self {
        self.0.resize(self.0.len() + count, 0);
        self
    }

    /// `struct fuse_attr`.
    fn attributes(&mut self, node: u64, size_bytes: u64) {
        let (mode, links, size) = match node {
            ROOT_ID => (libc::S_IFDIR | 0o700, 2, 0),
            _ => (libc::S_IFREG | 0o600, 1, size_bytes),
        };
        self.u64(node).u64(size).u64(size / 512).zeroes(36);
        self.u32(mode).u32(links).zeroes(12).u32(BLOCK as u32).zeroes(4);
    }
}

#[cfg(test)]
mod tests {
    use nix::sys::memfd::{MFdFlags, memfd_create};

    use super::*;

    #[test]
    fn the_kernels_structures_have_their_sizes() {
        let file = File::from(memfd_create(c"disk", MFdFlags::empty()).unwrap());
        file.set_len(1 << 20).unwrap();
        let mut disk = Disk::open(file).unwrap();
        let init = [0; 64];
        let mut sizes = |opcode, body: &[u8]| perform(&mut disk, opcode, ROOT_ID, body).unwrap().len();
        assert_eq!(sizes(opcode::INIT, &init), 64);
        assert_eq!(sizes(opcode::LOOKUP, b"disk\0"), 128);
        assert_eq!(sizes(opcode::GETATTR, &[]), 104);
        assert_eq!(sizes(opcode::OPEN, &[]), 16);
        assert_eq!(sizes(opcode::STATFS, &[]), 80);
    }
}
