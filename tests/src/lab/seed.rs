//! A containerd that has imported and unpacked the lab's images once, for every node to start as a copy of.
//!
//! Importing costs a node ten seconds and more. What it makes is never changed afterwards except for containerd's own
//! databases: so a node's store is a tree of hard links to the seed, with copies of the databases.

use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context, Result};
use nix::fcntl::{Flock, FlockArg};

use super::binaries::Binaries;
use super::images::Image;
use super::layout::{Layout, sha256, write_file};
use super::node::{containerd_config, snapshotter};
use super::processes::{Process, Processes};
use super::run::{self, step, wait_for};

/// A store of containerd, complete and at rest.
#[derive(Clone, Debug)]
pub struct Seed {
    store: PathBuf,
    images: Vec<Image>,
}

impl Seed {
    /// Gives the seed of exactly these images, making it if need be. Seeds of other images are removed.
    pub fn ensure(layout: &Layout, binaries: &Binaries, images: &[Image]) -> Result<Self> {
        let versions: Vec<&[u8]> = images.iter().map(|image| image.version.as_bytes()).collect();
        let seeds = layout.seeds();
        let store = seeds.join(&sha256(&versions)[..16]);
        fs::create_dir_all(&seeds).with_context(|| format!("could not create {}", seeds.display()))?;
        // Two labs of one checkout may start at the same time.
        let lock = File::create(seeds.with_extension("lock"))?;
        let _lock = Flock::lock(lock, FlockArg::LockExclusive).map_err(|(_, error)| error)?;
        let seed = Self {
            store,
            images: images.to_vec(),
        };
        if !seed.store.exists() {
            let _ = fs::remove_dir_all(&seeds);
            let unfinished = seeds.join("unfinished");
            fs::create_dir_all(&unfinished).with_context(|| format!("could not create {}", unfinished.display()))?;
            step("Unpacking the images (once)", || {
                let processes = Processes::new(layout);
                let imported = import(&processes, binaries, &unfinished, images);
                processes.stop(RECORD, Duration::from_secs(20));
                imported
            })?;
            fs::rename(&unfinished, &seed.store)?;
        }
        Ok(seed)
    }

    pub fn images(&self) -> &[Image] {
        &self.images
    }

    /// Fills the empty directory of a node's containerd.
    pub fn plant(&self, directory: &Path) -> Result<()> {
        let mut command = run::command("cp", ["--archive", "--link"]);
        run::output(command.arg(self.store.join(".")).arg(directory))?;
        copy_databases(directory)
    }
}

const RECORD: &str = "seed-containerd";

fn import(processes: &Processes, binaries: &Binaries, store: &Path, images: &[Image]) -> Result<()> {
    let config = store.with_file_name("seed.toml");
    write_file(
        &config,
        containerd_config(store, snapshotter(store)?, Path::new("/nonexistent"))?,
    )?;
    // A mount namespace of its own: the socket's short path, and no mounts left behind.
    let script = format!(
        "set -e\nmount -t tmpfs -o mode=755 tmpfs /run\nexec '{}' --config '{}' --log-level warn\n",
        binaries.path("containerd").display(),
        config.display()
    );
    let mut command = run::command("unshare", ["--mount", "--propagation", "private", "sh", "-c", &script]);
    let process = processes.start(RECORD, command.env("PATH", binaries.path_variable()))?;
    wait_for("containerd", Duration::from_secs(60), || {
        processes.check(RECORD)?;
        ctr(binaries, process, &["version"]).map(Some)
    })?;
    for image in images {
        ctr(
            binaries,
            process,
            &["images", "import", "--local", &image.archive.to_string_lossy()],
        )?;
    }
    Ok(())
}

fn ctr(binaries: &Binaries, process: Process, arguments: &[&str]) -> Result<String> {
    let mut command = run::command("nsenter", ["--mount", "--target", &process.pid.to_string(), "--"]);
    run::output(
        command
            .arg(binaries.path("ctr"))
            .args(["--namespace", "k8s.io"])
            .args(arguments),
    )
}

/// Gives every database below `directory` an inode of its own.
fn copy_databases(directory: &Path) -> Result<()> {
    for plugin in fs::read_dir(directory)? {
        for entry in fs::read_dir(plugin?.path())? {
            let path = entry?.path();
            if path.extension().is_some_and(|extension| extension == "db") {
                let copy = path.with_extension("copy");
                fs::copy(&path, &copy)?;
                fs::rename(&copy, &path)?;
            }
        }
    }
    Ok(())
}
