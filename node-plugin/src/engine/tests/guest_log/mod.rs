//! Whole file systems after a power cut: everything that a guest asks of its device is logged, and the disk that a cut
//! would leave is computed for moments from all over the log.
//!
//! ```text
//! file system ─► loop ─► FUSE ─► (faulty) ─► recorder ─► volume and store
//!                                               │
//!                                  log ─► cut ─► image ─► mount, compare files, unmount, fsck
//! ```
//!
//! The image has what was answered before the last completed flush was asked for, and of everything else each sector
//! by chance. That is all that a block device promises, and less than our engine keeps. So what is tried here is that a
//! flush of the guest arrives as one, behind the writes that it covers, and that nothing else is lost on the way. What
//! the engine makes of a flush is tried in the crash states of its own.

mod cut;
mod faulty;
mod guest;
mod recorder;

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use super::*;
use crate::disk::{BlockSize, FormatSpec, format_replica};
use crate::engine::open::{MapBudget, open_volume};
use cut::Cut;
use faulty::{Fault, Faulty};
use guest::Guest;
use recorder::{Log, Recorder, SharedLog};

/// Writers at a time: so flushes meet writes of others that are on their way.
const GUESTS: u64 = 3;

/// SplitMix64: everything follows from the seed.
#[derive(Debug)]
struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut word = self.0;
        word = (word ^ (word >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        word = (word ^ (word >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        word ^ (word >> 31)
    }

    fn below(&mut self, end: u64) -> u64 {
        self.next() % end
    }
}

/// How a file system is made, mounted and looked over.
struct Kind {
    name: &'static str,
    size_bytes: u64,
    /// Of the device: what a write of the guest is made of, and what a power cut leaves whole.
    sector_bytes: u32,
    make: &'static [&'static str],
    mount: &'static str,
    /// Says whether it is whole, and changes nothing.
    verify: &'static [&'static str],
}

const EXT4: Kind = Kind {
    name: "ext4",
    size_bytes: 64 * MIB,
    sector_bytes: 4096,
    make: &["mkfs.ext4", "-q", "-F"],
    mount: "discard",
    verify: &["e2fsck", "-fn"],
};
/// 300 MiB: mkfs makes none smaller.
const XFS: Kind = Kind {
    name: "xfs",
    size_bytes: 300 * MIB,
    sector_bytes: 4096,
    make: &["mkfs.xfs", "-q", "-f"],
    mount: "discard",
    verify: &["xfs_repair", "-n"],
};
const BTRFS: Kind = Kind {
    name: "btrfs",
    size_bytes: 128 * MIB,
    sector_bytes: 4096,
    make: &["mkfs.btrfs", "-q", "-f"],
    mount: "discard=sync",
    verify: &["btrfs", "check", "--readonly"],
};

/// A recorded life of a file system.
struct Recorded {
    kind: &'static Kind,
    log: Log,
    /// The file system was there from this moment on.
    mounted: usize,
    guests: Vec<Guest>,
    /// Where images are made and mounted.
    dir: PathBuf,
}

impl Drop for Recorded {
    fn drop(&mut self) {
        let _ = nix::mount::umount2(&self.dir.join("mnt"), nix::mount::MntFlags::MNT_DETACH);
        let _ = fs::remove_dir_all(&self.dir);
    }
}

/// Runs the guests in a file system on a real volume, each doing `count` things.
async fn record(kind: &'static Kind, fault: Option<Fault>, seed: u64, count: usize) -> Recorded {
    let dir = std::env::temp_dir().join(format!("galleonfs-node-{}", Uuid::new_v4()));
    let log = SharedLog::default();
    let armed = Arc::new(AtomicBool::new(false));
    let engine = {
        let (log, armed, budget) = (log.clone(), armed.clone(), MapBudget::new(32 << 20));
        let open = move |spec: &AttachSpec, disk: FileDisk| -> Result<Box<dyn VolumeEngine>, EngineError> {
            let recorder = Recorder::new(open_volume(spec, disk, &budget, None)?, log.clone());
            Ok(match fault {
                Some(fault) => Box::new(Faulty::new(recorder, fault, armed.clone())),
                None => Box::new(recorder),
            })
        };
        let config = EngineConfig {
            shards: 1,
            map_budget_bytes: 0,
            scrub: None,
            runtime_dir: dir.join("run"),
            network: crate::engine::Network::default(),
        };
        Engine::start_with(&config, Box::new(open), Paths::BEST).expect("start the engine")
    };
    let node = Node {
        dir: dir.clone(),
        engine,
        control: Control::default(),
    };
    let format = FormatSpec {
        volume_uid: Uuid::from_u128(2),
        replica_uid: Uuid::from_u128(3),
        cluster_id: Uuid::from_u128(4),
        block_size: BlockSize::default(),
        size_bytes: kind.size_bytes,
        salt: 5,
        key: None,
    };
    let spec = AttachSpec {
        volume: "volume".to_owned(),
        volume_uid: format.volume_uid,
        replica_uid: format.replica_uid,
        cluster_id: format.cluster_id,
        replica_dir: dir.join("replicas/volume"),
        epoch: 1,
        size_bytes: kind.size_bytes,
        read_only: false,
        settings: Settings {
            sector_bytes: kind.sector_bytes,
            ..Settings::default()
        },
        key: None,
    };
    format_replica(&spec.replica_dir, &format).expect("format");
    let device = node.engine.attach(spec).await.expect("attach").path;

    run(kind.make[0], &[&kind.make[1..], &[&*text(&device)]].concat());
    let mounted = Mounted(dir.join("mnt"));
    fs::create_dir_all(&mounted.0).expect("make a mount point");
    run("mount", &["-o", kind.mount, &text(&device), &text(&mounted.0)]);
    run("sync", &["-f", &text(&mounted.0)]);
    let began = log.moment();
    armed.store(true, Ordering::Relaxed);
    let mut guests: Vec<Guest> = (0..GUESTS)
        .map(|index| Guest::new(&format!("guest{index}"), (seed << 8) + index))
        .collect();
    std::thread::scope(|scope| {
        for guest in &mut guests {
            let (root, log) = (&mounted.0, &log);
            scope.spawn(move || guest.work(root, log, count).expect("the file system takes it"));
        }
    });
    let worked = log.moment();
    for guest in &guests {
        guest
            .check(&mounted.0, worked)
            .expect("nothing was lost without a power cut");
    }
    unmount(&mounted.0).expect("unmount");
    drop(mounted);

    let file = File::open(&device).expect("open the device");
    let log = log.take();
    assert_eq!(log.failed, [""; 0]);
    log.end(kind.sector_bytes).assert_is(&file, kind.size_bytes);
    drop(file);
    node.engine.detach("volume").await.expect("detach");

    let dir = room_for_images().join(format!("galleonfs-guest-{}", Uuid::new_v4()));
    fs::create_dir_all(dir.join("mnt")).expect("make a directory for images");
    Recorded {
        kind,
        log,
        mounted: began,
        guests,
        dir,
    }
}

/// In memory if there is room: each image is written once, and read back a few times.
fn room_for_images() -> PathBuf {
    let memory = Path::new("/dev/shm");
    match nix::sys::statvfs::statvfs(memory) {
        Ok(found) if found.blocks_available() * found.fragment_size() > 2 * XFS.size_bytes => memory.to_owned(),
        _ => std::env::temp_dir(),
    }
}

impl Recorded {
    /// What is wrong with the file system after this power cut.
    fn survives(&self, cut: &Cut) -> Result<(), String> {
        let (image, target) = (self.dir.join("image"), self.dir.join("mnt"));
        let kind = self.kind;
        let left = self.log.image(cut, kind.sector_bytes);
        left.write_to(&image, kind.size_bytes);
        if self.kind.name == "btrfs" {
            // The kernel remembers an image by its name in the file system, and refuses one that is older.
            attempt("btrfs", &["device", "scan", "--forget"])?;
        }
        let options = format!("loop,{}", self.kind.mount);
        attempt(
            "mount",
            &["-t", self.kind.name, "-o", &options, &text(&image), &text(&target)],
        )?;
        let found = self
            .guests
            .iter()
            .try_for_each(|guest| guest.check(&target, cut.moment));
        unmount(&target)?;
        found?;
        let image = text(&image);
        let verify = [&self.kind.verify[1..], &[&*image]].concat();
        attempt(self.kind.verify[0], &verify)
    }
}

/// Unmounts at once, and not later: the file system is complete on its device after this.
fn unmount(target: &Path) -> Result<(), String> {
    let mut ended = Ok(());
    // A program that another test is about to start has a copy of our descriptors for a moment.
    wait_until("a file system is unmounted", || {
        ended = nix::mount::umount2(target, nix::mount::MntFlags::empty());
        ended != Err(nix::errno::Errno::EBUSY)
    });
    ended.map_err(|error| format!("unmount {}: {error}", target.display()))
}

fn attempt(program: &str, arguments: &[&str]) -> Result<(), String> {
    let output = Command::new(program)
        .args(arguments)
        .output()
        .expect("the program is installed");
    if output.status.success() {
        return Ok(());
    }
    Err(format!(
        "{program} {arguments:?}: {}\n{}{}",
        output.status,
        String::from_utf8_lossy(&output.stdout),
        String::from_utf8_lossy(&output.stderr)
    ))
}

fn number(knob: &str) -> Option<usize> {
    let text = std::env::var(knob).ok()?;
    Some(
        text.parse()
            .unwrap_or_else(|_| panic!("{knob} is a number, not {text}")),
    )
}

/// Tries `share` of a hundred of the marks that are asked for.
async fn whole_after_every_cut(kind: &'static Kind, share: usize) {
    let marks = (number("MARKS").unwrap_or(200) * share).div_ceil(100);
    let seed = number("FIRST").unwrap_or(1) as u64;
    let began = Instant::now();
    let recorded = record(kind, None, seed, 40.max(marks / 2)).await;
    let recording = began.elapsed();
    for (index, cut) in recorded.log.cuts(recorded.mounted, marks, seed).iter().enumerate() {
        if let Err(why) = recorded.survives(cut) {
            panic!("{} with seed {seed}, cut {index} of {marks}, {cut:?}: {why}", kind.name);
        }
    }
    println!(
        "{}, seed {seed}: {marks} cuts among {} flushes in {:.1} s, after {:.1} s of recording",
        kind.name,
        recorded.log.marks(recorded.mounted).len(),
        (began.elapsed() - recording).as_secs_f64(),
        recording.as_secs_f64()
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn ext4_is_whole_after_a_power_cut_at_any_flush() {
    whole_after_every_cut(&EXT4, 34).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn xfs_is_whole_after_a_power_cut_at_any_flush() {
    whole_after_every_cut(&XFS, 33).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn btrfs_is_whole_after_a_power_cut_at_any_flush() {
    whole_after_every_cut(&BTRFS, 33).await;
}

/// The check itself is checked: of a front end that breaks its promise it must not say that all is well. Whether one
/// life of a file system shows a fault depends on what its writers happened to do at the same time, so a few are lived.
#[tokio::test(flavor = "multi_thread")]
async fn a_front_end_that_breaks_the_promise_of_a_flush_is_found_out() {
    const LIVES: u64 = 10;
    for fault in [Fault::LosesFlushes, Fault::WritesPassFlushes] {
        let mut found = None;
        for seed in 1..=LIVES {
            let recorded = record(&EXT4, Some(fault), seed, 40).await;
            let count = recorded.log.marks(recorded.mounted).len() - 1;
            let cuts = recorded.log.cuts(recorded.mounted, count.min(80), seed);
            found = cuts.iter().find_map(|cut| recorded.survives(cut).err());
            if found.is_some() {
                break;
            }
        }
        println!("{fault:?}: {}", found.expect("a cut shows the fault"));
    }
}
