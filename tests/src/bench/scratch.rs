//! The directory the bench works in: the raw file and the replica side by side, so that both are on the same disk.

use std::fs::{self, File};
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail};
use galleonfs_node_plugin::pool::reserve_bytes_default;
use nix::fcntl::{Flock, FlockArg};
use nix::sys::statvfs::statvfs;

use super::setup::Setup;

/// What a replica may need at most, in sizes of the volume: a log that is not cleaned yet.
const LOG_FACTOR: u64 = 3;

#[derive(Debug)]
pub struct Scratch {
    dir: PathBuf,
}

/// The directory while a run has it to itself; what the run made in it goes when this is dropped.
#[derive(Debug)]
pub struct Claim {
    scratch: Scratch,
    /// Released by the kernel, however the run ends.
    _lock: Flock<File>,
}

impl Scratch {
    pub fn new(dir: &Path) -> Result<Scratch> {
        // The other process may have another working directory, and fio takes some relative names for its own.
        let dir = std::path::absolute(dir).with_context(|| format!("find {}", dir.display()))?;
        Ok(Scratch { dir })
    }

    /// Makes the directory, keeps other runs out, and removes what a killed one left.
    pub fn claim(self, size_bytes: u64, setups: &[Setup]) -> Result<Claim> {
        fs::create_dir_all(&self.dir).with_context(|| format!("create {}", self.dir.display()))?;
        let lock = File::create(self.dir.join("lock")).with_context(|| format!("write in {}", self.dir.display()))?;
        let Ok(lock) = Flock::lock(lock, FlockArg::LockExclusiveNonblock) else {
            bail!(
                "another run works in {}; wait for it, or give --dir",
                self.dir.display()
            );
        };
        self.clear()?;
        let found = statvfs(&self.dir)?;
        let replicas: u64 = setups.iter().map(|setup| setup.replicas()).sum();
        let (free, wanted) = (
            found.blocks_available() * found.fragment_size(),
            // The raw file is the one more.
            (1 + LOG_FACTOR * replicas) * size_bytes,
        );
        if free < wanted {
            bail!(
                "{} has {} MiB free, and the run may need {}; give --dir or --size-mib",
                self.dir.display(),
                free >> 20,
                wanted >> 20
            );
        }
        // Replicas leave half as much free as they have beyond what they were promised.
        let left = (free - wanted).saturating_sub(reserve_bytes_default(found.blocks() * found.fragment_size()));
        if left < replicas * size_bytes {
            eprintln!(
                "{} has hardly more free than the run needs: replicas clean what they would otherwise leave, and are measured \
                 with that",
                self.dir.display()
            );
        }
        Ok(Claim {
            scratch: self,
            _lock: lock,
        })
    }

    pub fn dir(&self) -> &Path {
        &self.dir
    }

    pub fn raw(&self) -> PathBuf {
        self.dir.join("raw")
    }

    pub fn replica(&self, setup: Setup) -> PathBuf {
        self.dir.join(format!("replica-{}", setup.name()))
    }

    /// Where the engine of a setup mounts.
    pub fn mounts(&self, setup: Setup) -> PathBuf {
        self.dir.join(format!("mounts-{}", setup.name()))
    }

    fn clear(&self) -> Result<()> {
        for made in Setup::ALL
            .map(|setup| self.replica(setup))
            .into_iter()
            .chain([self.raw()])
        {
            let removed = if made.is_dir() {
                fs::remove_dir_all(&made)
            } else {
                fs::remove_file(&made)
            };
            match removed {
                Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
                    return Err(error).with_context(|| format!("remove {}", made.display()));
                }
                _ => {}
            }
        }
        // Only if it is empty: a mount that is still there is the next run's to remove.
        for setup in Setup::ALL {
            let _ = fs::remove_dir(self.mounts(setup));
        }
        Ok(())
    }
}

impl Claim {
    pub fn scratch(&self) -> &Scratch {
        &self.scratch
    }
}

impl Drop for Claim {
    fn drop(&mut self) {
        if let Err(error) = self.scratch.clear() {
            eprintln!("galleonfs-bench: {error:#}");
        }
        let _ = fs::remove_file(self.scratch.dir.join("lock"));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_directory_is_one_runs_at_a_time_and_empty_after_it() {
        let dir = std::env::temp_dir().join(format!("galleonfs-bench-{}", std::process::id()));
        let claim = Scratch::new(&dir).unwrap().claim(1, &Setup::ALL).unwrap();
        assert!(Scratch::new(&dir).unwrap().claim(1, &Setup::ALL).is_err());
        fs::write(claim.scratch().raw(), "x").unwrap();
        let replica = claim.scratch().replica(Setup::Sealed);
        fs::create_dir_all(&replica).unwrap();
        fs::write(replica.join("superblock.0"), "x").unwrap();
        drop(claim);
        assert_eq!(fs::read_dir(&dir).unwrap().count(), 0);
        fs::remove_dir(&dir).unwrap();
    }
}
