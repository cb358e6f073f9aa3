//! A disk that loses power: what was written to it and not synced is gone afterwards, or half of it is.
//!
//! A lab's node can have its pools on such a disk. It is a file served by FUSE, with the usual loop device on it, so that
//! everything above it is real: the node's file system, our segment files, the guest's own file system.
//!
//! ```text
//!   pool's ext4 → /dev/loopN → <node>/volatile/disk (FUSE) → server: memory ── sync, cut ──► <node>/disk.img
//! ```
//!
//! Power is cut from outside, with a signal to the server. The server decides block by block which of the unsynced
//! writes made it to the disk, as a disk with a cache and sectors of 4 KiB would, and is gone. Whatever the node's
//! kernel still holds has nowhere to go then.

mod disk;
mod server;

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use nix::mount::{MntFlags, umount2};
use nix::sys::signal::Signal;

use super::processes::Processes;
use super::run::wait_for;

pub use server::{FILE, serve};

/// The signal that cuts the power. Any other end of the server keeps everything.
pub const CUT: Signal = Signal::SIGUSR1;

/// Writing what survived to the image takes a moment.
const CUT_MAX: Duration = Duration::from_secs(60);

/// The volatile disk of one node, seen from the lab.
#[derive(Clone, Debug)]
pub struct VolatileDisk {
    /// Where FUSE is mounted. The directory is there if the node has such a disk, whether it has power or not.
    at: PathBuf,
    image: PathBuf,
    record: String,
    processes: Processes,
}

impl VolatileDisk {
    pub fn new(node: &str, directory: &Path, image: &Path, processes: &Processes) -> Self {
        Self {
            at: directory.join("volatile"),
            image: image.to_path_buf(),
            record: format!("{node}-disk"),
            processes: processes.clone(),
        }
    }

    /// Whether the node uses it.
    pub fn chosen(&self) -> bool {
        self.program_file().exists()
    }

    /// From its next start on the node uses it, served by `program` (which is `galleonfs-lab`).
    pub fn choose(&self, program: &Path) -> Result<()> {
        if !self.chosen() {
            fs::create_dir_all(&self.at)?;
        }
        fs::write(self.program_file(), program.as_os_str().as_encoded_bytes())?;
        Ok(())
    }

    fn program_file(&self) -> PathBuf {
        self.at.with_extension("program")
    }

    /// The file that stands for the disk.
    pub fn file(&self) -> PathBuf {
        self.at.join(FILE)
    }

    /// Gives it power.
    pub fn start(&self) -> Result<()> {
        // What a server leaves that was cut off.
        while umount2(&self.at, MntFlags::MNT_DETACH).is_ok() {}
        let program = fs::read_to_string(self.program_file()).context("nobody has said who serves the disk")?;
        let mut command = Command::new(program);
        command.arg("disk").arg(&self.image).arg(&self.at);
        self.processes.start(&self.record, &mut command)?;
        wait_for(&self.record, Duration::from_secs(20), || {
            self.processes.check(&self.record)?;
            Ok(self.file().exists().then_some(()))
        })
    }

    /// Ends it in order: nothing is lost. Fine when it has no power.
    pub fn stop(&self) {
        self.processes.stop(&self.record, CUT_MAX);
    }

    /// Cuts the power, and says how it went.
    pub fn cut(&self) -> Result<String> {
        let server = self
            .processes
            .find(&self.record)
            .with_context(|| format!("{} has no power", self.record))?;
        server.signal(CUT);
        ensure!(server.wait_gone(CUT_MAX), "{} does not end", self.record);
        let log = fs::read_to_string(self.processes.log(&self.record))?;
        let told = log.lines().rev().find(|line| line.starts_with(server::CUT_LINE));
        Ok(told.context("the disk did not say what it lost")?.to_string())
    }
}

/// Whether a loop device still stands on this file. Asks nothing of the file itself, whose server may be gone.
pub fn has_loop_device(file: &Path) -> Result<bool> {
    let devices = fs::read_dir("/sys/block").context("could not list the block devices")?;
    for device in devices {
        let backing = device?.path().join("loop/backing_file");
        if let Ok(backing) = fs::read_to_string(backing)
            && Path::new(backing.trim_end()) == file
        {
            return Ok(true);
        }
    }
    Ok(false)
}
