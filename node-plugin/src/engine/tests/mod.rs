//! The whole way from a block device to an engine and back, on real FUSE and loop devices. Needs root, as the node
//! plugin does.

mod compared;
mod device;
mod fake;
mod guest_log;
mod impostors;
mod replica;
mod several;
mod stale;

use std::fs::{self, File, OpenOptions};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

use uuid::Uuid;

use super::*;
use crate::disk::make_replica_dir;
use fake::{Control, Mapped, Ram};

const MIB: u64 = 1 << 20;

/// Every way that requests and disk operations can take together.
const ALL_PATHS: [Paths; 3] = [
    Paths {
        disk: Some(DiskPath::Ring),
        guest: GuestPath::Ring,
    },
    Paths {
        disk: Some(DiskPath::Ring),
        guest: GuestPath::Device,
    },
    Paths {
        disk: Some(DiskPath::Threads),
        guest: GuestPath::Device,
    },
];

/// A node of one test: its directories, its engine, and what its fakes saw.
struct Node {
    dir: PathBuf,
    engine: Engine,
    /// Of volumes in memory; the others are files.
    control: Control,
}

impl Node {
    /// With the best paths there are.
    fn new(shards: usize) -> Node {
        Node::with(shards, Paths::BEST)
    }

    fn with(shards: usize, paths: Paths) -> Node {
        let dir = std::env::temp_dir().join(format!("galleonfs-node-{}", Uuid::new_v4()));
        Node::at(dir, shards, paths)
    }

    fn at(dir: PathBuf, shards: usize, paths: Paths) -> Node {
        fs::create_dir_all(&dir).expect("make a directory for the test");
        let control = Control::default();
        let (ram, file) = (control.clone(), Control::default());
        let open = move |spec: &AttachSpec, disk: FileDisk| -> Result<Box<dyn VolumeEngine>, EngineError> {
            if spec.volume.starts_with("ram") {
                Ok(Box::new(Ram::new(ram.clone(), spec.size_bytes)))
            } else {
                Ok(Box::new(Mapped::open(file.clone(), spec, disk)?))
            }
        };
        let config = EngineConfig {
            shards,
            map_budget_bytes: 0,
            scrub: None,
            runtime_dir: dir.join("run"),
            network: crate::engine::Network::default(),
        };
        let engine = Engine::start_with(&config, Box::new(open), paths).expect("start the engine");
        Node { dir, engine, control }
    }

    fn spec(&self, volume: &str, size_bytes: u64) -> AttachSpec {
        self.spec_in(volume, size_bytes, &self.dir)
    }

    /// With the replica below `pool`.
    fn spec_in(&self, volume: &str, size_bytes: u64, pool: &Path) -> AttachSpec {
        let replica_dir = pool.join("replicas").join(volume);
        make_replica_dir(&replica_dir, |_| Ok(())).expect("make a replica directory");
        AttachSpec {
            volume: volume.to_owned(),
            volume_uid: Uuid::new_v4(),
            replica_uid: Uuid::from_u128(1),
            cluster_id: Uuid::new_v4(),
            replica_dir,
            epoch: 1,
            size_bytes,
            read_only: false,
            settings: Settings::default(),
            key: None,
        }
    }

    async fn attach(&self, volume: &str, size_bytes: u64) -> PathBuf {
        self.engine
            .attach(self.spec(volume, size_bytes))
            .await
            .expect("attach")
            .path
    }

    fn stats(&self, volume: &str) -> VolumeStats {
        let found = self.engine.stats().into_iter().find(|(name, _)| name == volume);
        found.expect("the volume is attached").1
    }
}

impl Drop for Node {
    fn drop(&mut self) {
        clean_up(&self.dir);
    }
}

/// Removes the directory of a test, and what a failed test left attached below it.
fn clean_up(dir: &Path) {
    let runtime_dir = dir.join("run");
    for device in run("losetup", &["-n", "-O", "NAME,BACK-FILE"]).lines() {
        if let Some((device, backing)) = device.split_once(char::is_whitespace)
            && backing.trim().starts_with(&*runtime_dir.to_string_lossy())
        {
            drop(Command::new("losetup").args(["-d", device]).output());
        }
    }
    for volume in fs::read_dir(&runtime_dir).into_iter().flatten().flatten() {
        let _ = nix::mount::umount2(&volume.path(), nix::mount::MntFlags::MNT_DETACH);
    }
    let _ = fs::remove_dir_all(dir);
}

/// A file system of a test, unmounted in the end.
struct Mounted(PathBuf);

impl Mounted {
    fn ext4(device: &Path, target: PathBuf) -> Mounted {
        run("mkfs.ext4", &["-q", "-F", &text(device)]);
        fs::create_dir_all(&target).expect("make a mount point");
        run("mount", &[&text(device), &text(&target)]);
        Mounted(target)
    }
}

impl Drop for Mounted {
    fn drop(&mut self) {
        let _ = nix::mount::umount2(&self.0, nix::mount::MntFlags::MNT_DETACH);
    }
}

fn run(program: &str, arguments: &[&str]) -> String {
    let output = Command::new(program)
        .args(arguments)
        .output()
        .expect("the program is installed");
    assert!(
        output.status.success(),
        "{program} {arguments:?}: {}",
        String::from_utf8_lossy(&output.stderr)
    );
    String::from_utf8_lossy(&output.stdout).into_owned()
}

fn text(path: &Path) -> String {
    path.to_str().expect("test paths are UTF-8").to_owned()
}

/// A device opened past the page cache.
fn open_direct(device: &Path) -> File {
    OpenOptions::new()
        .read(true)
        .write(true)
        .custom_flags(libc::O_DIRECT)
        .open(device)
        .expect("open the device")
}

/// Waits for something that another thread does, up to a minute.
fn wait_until(what: &str, mut holds: impl FnMut() -> bool) {
    let deadline = Instant::now() + Duration::from_secs(60);
    while !holds() {
        assert!(Instant::now() < deadline, "not in a minute: {what}");
        std::thread::sleep(Duration::from_millis(2));
    }
}
