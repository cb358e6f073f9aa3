//! The node service against real file systems on real loop devices, in a kubelet's directory of its own.

use std::collections::HashMap;
use std::path::Path;
use std::process::Command;
use std::sync::{Arc, Mutex};

use futures::FutureExt;
use futures::future::BoxFuture;
use galleonfs_csi_proto::csi::node_server::Node as _;
use galleonfs_csi_proto::csi::volume_capability::access_mode::Mode;
use galleonfs_csi_proto::csi::volume_capability::{AccessMode, AccessType, BlockVolume, MountVolume};
use galleonfs_csi_proto::csi::{
    CapacityRange, NodeExpandVolumeRequest, NodeGetInfoRequest, NodeGetVolumeStatsRequest, NodePublishVolumeRequest,
    NodeStageVolumeRequest, NodeUnpublishVolumeRequest, NodeUnstageVolumeRequest, VolumeCapability,
};
use tonic::{Code, Request, Status};
use uuid::Uuid;

use super::{Directory, Found, Node};
use crate::mount::mounts::read_table;
use crate::mount::{HungChildren, Kubelet};
use crate::served::{AttachSpec, FakeEngine, Guards, NodeEngine, Presence, Served};
use crate::staging::Stager;
use crate::state::Records;
use crate::testing::{TempDir, temp_dir};

const MIB: u64 = 1 << 20;

/// Volumes that exist, by name.
#[derive(Default)]
struct Catalog(Mutex<HashMap<String, Option<Found>>>);

impl Directory for Catalog {
    fn find<'a>(&'a self, volume: &'a str) -> BoxFuture<'a, Result<Option<Found>, String>> {
        let found = match self.0.lock().unwrap().get(volume) {
            Some(Some(found)) => Ok(Some(found.clone())),
            Some(None) => Err("the API server is away".to_owned()),
            None => Ok(None),
        };
        async move { found }.boxed()
    }

    fn unstaged(&self, _: &str) {}
}

/// A node with a kubelet's directory below a temporary one. What is mounted there goes with it.
struct Bench {
    dir: TempDir,
    engine: Arc<FakeEngine>,
    catalog: Arc<Catalog>,
    node: Node,
}

impl Drop for Bench {
    fn drop(&mut self) {
        let table = std::fs::read_to_string("/proc/self/mountinfo").unwrap();
        let dir = self.dir.path().to_str().unwrap();
        for target in table
            .lines()
            .rev()
            .filter_map(|line| line.split(' ').nth(4))
            .filter(|at| at.starts_with(dir))
        {
            let _ = nix::mount::umount2(target, nix::mount::MntFlags::MNT_DETACH);
        }
    }
}

impl Bench {
    fn new() -> Bench {
        let dir = temp_dir("csi");
        let (engine, catalog) = (Arc::<FakeEngine>::default(), Arc::<Catalog>::default());
        let node = Self::node(dir.path(), catalog.clone());
        Bench {
            dir,
            engine,
            catalog,
            node,
        }
    }

    /// The process as it is after a start: it knows what is on disk, and no device yet.
    fn node(dir: &Path, catalog: Arc<Catalog>) -> Node {
        let own = dir.join("kubelet/plugins/csi.galleonfs.io");
        let records = Records::open(own.join("state")).unwrap();
        Node {
            name: "n1".into(),
            volumes_max: 100,
            stager: Stager::new(records, Kubelet::new(dir.join("kubelet"), own)),
            guards: Guards::new(HungChildren::default()),
            served: Served::default(),
            directory: catalog,
        }
    }

    fn path(&self, path: &str) -> String {
        self.dir.path().join("kubelet").join(path).to_str().unwrap().to_owned()
    }

    /// A volume that is attached here and has its device.
    async fn volume(&self, name: &str, size_bytes: u64) {
        self.exists(name, Some("n1"));
        let replica_dir = self.dir.path().join(name);
        std::fs::create_dir_all(&replica_dir).unwrap();
        let spec = AttachSpec {
            volume: name.into(),
            volume_uid: Uuid::nil(),
            replica_uid: Uuid::nil(),
            cluster_id: Uuid::nil(),
            replica_dir,
            epoch: 1,
            size_bytes,
            read_only: false,
        };
        let device = self.engine.attach(spec).await.unwrap();
        self.node.served.set(name, Some(Presence::Here(device)));
    }

    fn exists(&self, name: &str, node: Option<&str>) {
        let found = Found {
            uid: format!("uid-{name}"),
            attach_to: node.map(str::to_owned),
            fs_type: None,
        };
        self.catalog.0.lock().unwrap().insert(name.into(), Some(found));
    }

    async fn stage(&self, volume: &str, capability: VolumeCapability) -> Result<(), Status> {
        self.stage_at(volume, &self.path(&format!("staging/{volume}")), capability)
            .await
    }

    async fn stage_at(&self, volume: &str, path: &str, capability: VolumeCapability) -> Result<(), Status> {
        let mut request = Request::new(NodeStageVolumeRequest {
            volume_id: volume.into(),
            staging_target_path: path.into(),
            volume_capability: Some(capability),
            ..Default::default()
        });
        request.metadata_mut().insert("grpc-timeout", "20S".parse().unwrap());
        self.node.node_stage_volume(request).await.map(drop)
    }

    async fn unstage(&self, volume: &str) -> Result<(), Status> {
        let staging_target_path = self.path(&format!("staging/{volume}"));
        let request = NodeUnstageVolumeRequest {
            volume_id: volume.into(),
            staging_target_path,
        };
        self.node.node_unstage_volume(Request::new(request)).await.map(drop)
    }

    async fn publish(&self, volume: &str, target: &str, capability: VolumeCapability) -> Result<(), Status> {
        self.publish_with(volume, target, capability, false).await
    }

    async fn publish_with(
        &self,
        volume: &str,
        target: &str,
        capability: VolumeCapability,
        readonly: bool,
    ) -> Result<(), Status> {
        let request = NodePublishVolumeRequest {
            volume_id: volume.into(),
            staging_target_path: self.path(&format!("staging/{volume}")),
            target_path: target.into(),
            volume_capability: Some(capability),
            readonly,
            ..Default::default()
        };
        self.node.node_publish_volume(Request::new(request)).await.map(drop)
    }

    async fn unpublish(&self, volume: &str, target: &str) -> Result<(), Status> {
        let request = NodeUnpublishVolumeRequest {
            volume_id: volume.into(),
            target_path: target.into(),
        };
        self.node.node_unpublish_volume(Request::new(request)).await.map(drop)
    }

    async fn stats(&self, volume: &str, path: &str) -> Result<Vec<(i64, i64, i64)>, Status> {
        let request = NodeGetVolumeStatsRequest {
            volume_id: volume.into(),
            volume_path: path.into(),
            ..Default::default()
        };
        let usage = self
            .node
            .node_get_volume_stats(Request::new(request))
            .await?
            .into_inner()
            .usage;
        Ok(usage.into_iter().map(|of| (of.total, of.used, of.available)).collect())
    }

    async fn mounted(&self, path: &str) -> bool {
        read_table().await.unwrap().at(Path::new(path)).is_some()
    }
}

fn ext4() -> VolumeCapability {
    mount("ext4", Mode::SingleNodeMultiWriter)
}

fn mount(fs: &str, mode: Mode) -> VolumeCapability {
    let mount = MountVolume {
        fs_type: fs.into(),
        ..Default::default()
    };
    VolumeCapability {
        access_mode: Some(AccessMode { mode: mode as i32 }),
        access_type: Some(AccessType::Mount(mount)),
    }
}

fn flags(flags: &[&str]) -> VolumeCapability {
    let mount_flags = flags.iter().map(|flag| flag.to_string()).collect();
    let mount = MountVolume {
        fs_type: "ext4".into(),
        mount_flags,
        ..Default::default()
    };
    VolumeCapability {
        access_type: Some(AccessType::Mount(mount)),
        ..ext4()
    }
}

fn block() -> VolumeCapability {
    VolumeCapability {
        access_type: Some(AccessType::Block(BlockVolume {})),
        ..ext4()
    }
}

#[track_caller]
fn is(outcome: Result<(), Status>, code: Code, says: &str) {
    let status = outcome.expect_err(&format!("{code:?} was expected"));
    assert_eq!(status.code(), code, "{}", status.message());
    assert!(
        status.message().contains(says),
        "{:?} does not say {says:?}",
        status.message()
    );
}

#[tokio::test]
async fn a_file_system_is_made_once_and_its_files_are_found_by_every_pod() {
    for fs in ["ext4", "xfs"] {
        let bench = Bench::new();
        bench.volume("v", 320 * MIB).await;
        let capability = || mount(fs, Mode::SingleNodeMultiWriter);
        let (a, b) = (bench.path("pods/a/mount"), bench.path("pods/b/mount"));
        for _ in 0..2 {
            bench.stage("v", capability()).await.unwrap();
            bench.publish("v", &a, capability()).await.unwrap();
            bench.publish_with("v", &b, capability(), true).await.unwrap();
        }
        std::fs::write(Path::new(&a).join("file"), b"bytes").unwrap();
        assert_eq!(std::fs::read(Path::new(&b).join("file")).unwrap(), b"bytes");
        assert!(
            std::fs::write(Path::new(&b).join("other"), b"").is_err(),
            "{fs}: b is read-only"
        );

        is(bench.unstage("v").await, Code::FailedPrecondition, "still published");
        for _ in 0..2 {
            bench.unpublish("v", &a).await.unwrap();
            bench.unpublish("v", &b).await.unwrap();
        }
        assert!(!Path::new(&a).exists() && !Path::new(&b).exists());
        for _ in 0..2 {
            bench.unstage("v").await.unwrap();
        }
        assert!(bench.node.stager.records().volumes().is_empty());

        bench.stage("v", capability()).await.unwrap();
        bench.publish("v", &a, capability()).await.unwrap();
        assert_eq!(std::fs::read(Path::new(&a).join("file")).unwrap(), b"bytes", "{fs}");
    }
}

#[tokio::test]
async fn a_raw_block_volume_is_its_device_at_a_file() {
    let bench = Bench::new();
    bench.volume("v", 16 * MIB).await;
    let target = bench.path("pods/a/dev");
    for _ in 0..2 {
        bench.stage("v", block()).await.unwrap();
        bench.publish("v", &target, block()).await.unwrap();
    }
    use std::os::unix::fs::{FileTypeExt, MetadataExt};
    let node = std::fs::metadata(&target).unwrap();
    let device = bench.node.served.device("v").unwrap();
    assert!(node.file_type().is_block_device());
    assert_eq!(node.rdev(), std::fs::metadata(&device.path).unwrap().rdev());
    assert_eq!(bench.stats("v", &target).await.unwrap(), [(16 * MIB as i64, 0, 0)]);
    bench.unpublish("v", &target).await.unwrap();
    assert!(!Path::new(&target).exists());
    bench.unstage("v").await.unwrap();
}

#[tokio::test]
async fn hostile_and_broken_paths_are_refused_and_nothing_is_touched() {
    let bench = Bench::new();
    bench.volume("v", 16 * MIB).await;
    let outside = bench.dir.path().join("outside");
    std::fs::create_dir_all(&outside).unwrap();
    std::fs::create_dir_all(bench.path("pods")).unwrap();
    std::os::unix::fs::symlink(&outside, bench.path("link")).unwrap();
    std::os::unix::fs::symlink(&outside, bench.path("pods/link")).unwrap();
    let long = bench.path(&"x".repeat(5000));
    let bad = [
        String::new(),
        "relative/path".into(),
        bench.path("../outside/x"),
        bench.path("pods/../../outside"),
        outside.to_str().unwrap().to_owned(),
        "/etc".into(),
        bench.path("a\0b"),
        bench.path(""),
        bench.path("plugins/csi.galleonfs.io/state"),
        bench.path("link"),
        bench.path("link/x"),
        bench.path("pods/link"),
        long,
    ];
    for path in &bad {
        is(bench.stage_at("v", path, ext4()).await, Code::InvalidArgument, "");
    }
    bench.stage("v", ext4()).await.unwrap();
    for path in &bad {
        is(bench.publish("v", path, ext4()).await, Code::InvalidArgument, "");
        is(bench.unpublish("v", path).await, Code::InvalidArgument, "");
    }
    assert_eq!(std::fs::read_dir(&outside).unwrap().count(), 0);
    assert!(bench.node.stager.records().staged("v").unwrap().targets.is_empty());
    assert!(Path::new(&bench.path("pods/link")).is_symlink());
}

#[tokio::test]
async fn missing_and_malformed_fields_are_named() {
    let bench = Bench::new();
    bench.volume("v", 16 * MIB).await;
    let invalid = Code::InvalidArgument;
    is(bench.stage("", ext4()).await, invalid, "volume_id is missing");
    is(bench.stage("a/b", ext4()).await, invalid, "volume_id");
    is(bench.stage(&"v".repeat(129), ext4()).await, invalid, "128 bytes");
    is(
        bench
            .stage(
                "v",
                VolumeCapability {
                    access_type: None,
                    ..ext4()
                },
            )
            .await,
        invalid,
        "access_type",
    );
    is(
        bench
            .stage(
                "v",
                VolumeCapability {
                    access_mode: None,
                    ..ext4()
                },
            )
            .await,
        invalid,
        "access_mode",
    );
    is(
        bench.stage("v", mount("btrfs", Mode::SingleNodeWriter)).await,
        invalid,
        "ext4, xfs",
    );
    is(
        bench.stage("v", mount("ext4", Mode::MultiNodeMultiWriter)).await,
        invalid,
        "MULTI_NODE_MULTI_WRITER",
    );
    is(
        bench.stage("v", flags(&["noatime", "journal_path=/x"])).await,
        invalid,
        "journal_path",
    );
    let no_capability = NodeStageVolumeRequest {
        volume_id: "v".into(),
        staging_target_path: bench.path("staging/v"),
        ..Default::default()
    };
    let big = NodeStageVolumeRequest {
        volume_capability: Some(ext4()),
        volume_context: [("k".to_owned(), "x".repeat(5000))].into(),
        ..no_capability.clone()
    };
    is(
        bench
            .node
            .node_stage_volume(Request::new(no_capability))
            .await
            .map(drop),
        invalid,
        "volume_capability",
    );
    is(
        bench.node.node_stage_volume(Request::new(big)).await.map(drop),
        invalid,
        "volume_context",
    );
    let no_staging = NodePublishVolumeRequest {
        volume_id: "v".into(),
        target_path: bench.path("pods/a"),
        volume_capability: Some(ext4()),
        ..Default::default()
    };
    let publish = bench.node.node_publish_volume(Request::new(no_staging)).await.map(drop);
    is(publish, Code::FailedPrecondition, "staging_target_path");
    assert!(!Path::new(&bench.path("staging")).exists());
}

#[tokio::test]
async fn volumes_that_do_not_exist_are_not_found_and_their_absence_is_never_made_up() {
    let bench = Bench::new();
    bench.volume("v", 16 * MIB).await;
    let target = bench.path("pods/a");
    is(bench.stage("w", ext4()).await, Code::NotFound, "w does not exist");
    is(bench.stage("Not_An_Object", ext4()).await, Code::NotFound, "");
    is(bench.publish("w", &target, ext4()).await, Code::NotFound, "");
    is(
        bench.publish("v", &target, ext4()).await,
        Code::FailedPrecondition,
        "not staged",
    );
    is(bench.stats("w", &target).await.map(drop), Code::NotFound, "");
    is(bench.stats("v", &target).await.map(drop), Code::NotFound, "");
    bench.unpublish("w", &target).await.unwrap();
    bench.unstage("w").await.unwrap();
    bench.unstage("Not_An_Object").await.unwrap();
    bench.catalog.0.lock().unwrap().insert("gone".into(), None);
    is(
        bench.stage("gone", ext4()).await,
        Code::Unavailable,
        "the API server is away",
    );
    bench.exists("elsewhere", Some("n2"));
    is(
        bench.stage("elsewhere", ext4()).await,
        Code::FailedPrecondition,
        "attached to node n2",
    );
    bench.exists("failed", Some("n1"));
    bench
        .node
        .served
        .set("failed", Some(Presence::Failed("the disk is gone".into())));
    is(
        bench.stage("failed", ext4()).await,
        Code::Unavailable,
        "the disk is gone",
    );
}

#[tokio::test]
async fn a_repeat_that_asks_for_something_else_is_refused() {
    let bench = Bench::new();
    bench.volume("v", 16 * MIB).await;
    let target = bench.path("pods/a");
    bench.stage("v", ext4()).await.unwrap();
    is(
        bench.stage("v", block()).await,
        Code::AlreadyExists,
        "another capability",
    );
    is(
        bench.stage("v", flags(&["noatime"])).await,
        Code::AlreadyExists,
        "another capability",
    );
    is(
        bench.stage_at("v", &bench.path("staging/w"), ext4()).await,
        Code::FailedPrecondition,
        "is staged at",
    );
    bench.publish("v", &target, ext4()).await.unwrap();
    is(
        bench.publish_with("v", &target, ext4(), true).await,
        Code::AlreadyExists,
        "read-only",
    );
    is(
        bench.publish("v", &target, block()).await,
        Code::AlreadyExists,
        "another capability",
    );
    is(
        bench.publish("v", &bench.path("pods/b"), block()).await,
        Code::FailedPrecondition,
        "staged as ext4",
    );
}

#[tokio::test]
async fn a_single_writer_gets_one_target_and_the_next_after_it_is_gone() {
    let bench = Bench::new();
    bench.volume("v", 16 * MIB).await;
    let one = || mount("ext4", Mode::SingleNodeSingleWriter);
    let (a, b) = (bench.path("pods/a"), bench.path("pods/b"));
    bench.stage("v", one()).await.unwrap();
    bench.publish("v", &a, one()).await.unwrap();
    bench.publish("v", &a, one()).await.unwrap();
    is(
        bench.publish("v", &b, one()).await,
        Code::FailedPrecondition,
        "single writer",
    );
    bench.unpublish("v", &a).await.unwrap();
    bench.publish("v", &b, one()).await.unwrap();
}

#[tokio::test]
async fn what_is_on_a_device_is_never_formatted_over() {
    let bench = Bench::new();
    for (name, program) in [("xfs", "mkfs.xfs"), ("swap", "mkswap")] {
        bench.volume(name, 320 * MIB).await;
        let device = bench.node.served.device(name).unwrap().path;
        assert!(Command::new(program).arg(&device).output().unwrap().status.success());
        is(bench.stage(name, ext4()).await, Code::FailedPrecondition, name);
    }
    bench.volume("junk", 16 * MIB).await;
    let device = bench.node.served.device("junk").unwrap().path;
    std::fs::OpenOptions::new()
        .write(true)
        .open(&device)
        .and_then(|mut f| std::io::Write::write_all(&mut f, b"precious"))
        .unwrap();
    is(
        bench.stage("junk", ext4()).await,
        Code::FailedPrecondition,
        "not formatted over",
    );
    let mut found = [0; 8];
    std::fs::File::open(&device)
        .and_then(|mut f| std::io::Read::read_exact(&mut f, &mut found))
        .unwrap();
    assert_eq!(&found, b"precious");
    assert!(bench.node.stager.records().volumes().is_empty());
    // As a raw block volume its owner can still look at it.
    bench.stage("junk", block()).await.unwrap();
}

#[tokio::test]
async fn a_format_that_was_cut_short_is_done_again() {
    let bench = Bench::new();
    bench.volume("v", 16 * MIB).await;
    let device = bench.node.served.device("v").unwrap().path;
    std::fs::OpenOptions::new()
        .write(true)
        .open(&device)
        .and_then(|mut f| std::io::Write::write_all(&mut f, b"half"))
        .unwrap();
    let records = bench.node.stager.records();
    let mark = |record: &mut crate::state::Record| {
        record.volume_uid = Some("uid-v".into());
        record.formatting = Some(crate::mount::FsType::Ext4);
    };
    records.change("v", mark).await.unwrap();
    bench.stage("v", ext4()).await.unwrap();
    assert_eq!(records.get("v").unwrap().formatting, None);
}

#[tokio::test]
async fn the_mark_of_an_earlier_volume_of_the_same_name_permits_nothing() {
    let bench = Bench::new();
    bench.volume("v", 16 * MIB).await;
    let device = bench.node.served.device("v").unwrap().path;
    std::fs::OpenOptions::new()
        .write(true)
        .open(&device)
        .and_then(|mut f| std::io::Write::write_all(&mut f, b"data"))
        .unwrap();
    let mark = |record: &mut crate::state::Record| {
        record.volume_uid = Some("another".into());
        record.formatting = Some(crate::mount::FsType::Ext4);
    };
    bench.node.stager.records().change("v", mark).await.unwrap();
    is(
        bench.stage("v", ext4()).await,
        Code::FailedPrecondition,
        "not formatted over",
    );
}

#[tokio::test]
async fn a_damaged_file_system_is_refused_with_the_words_of_e2fsck() {
    let bench = Bench::new();
    bench.volume("v", 16 * MIB).await;
    bench.stage("v", ext4()).await.unwrap();
    std::fs::create_dir(Path::new(&bench.path("staging/v")).join("d")).unwrap();
    bench.unstage("v").await.unwrap();
    let device = bench.node.served.device("v").unwrap().path;
    // The root directory's inode loses its type; the superblock says that there were errors.
    for request in ["clri <2>", "ssv state 2"] {
        assert!(
            Command::new("debugfs")
                .args(["-w", "-R", request])
                .arg(&device)
                .output()
                .unwrap()
                .status
                .success()
        );
    }
    is(bench.stage("v", ext4()).await, Code::FailedPrecondition, "e2fsck");
    assert!(!bench.mounted(&bench.path("staging/v")).await);
}

impl Bench {
    async fn expand(&self, volume: &str, path: &str, required: u64, limit: u64) -> Result<i64, Status> {
        let mut request = Request::new(NodeExpandVolumeRequest {
            volume_id: volume.into(),
            volume_path: path.into(),
            capacity_range: Some(CapacityRange {
                required_bytes: required as i64,
                limit_bytes: limit as i64,
            }),
            ..Default::default()
        });
        request.metadata_mut().insert("grpc-timeout", "5S".parse().unwrap());
        Ok(self.node.node_expand_volume(request).await?.into_inner().capacity_bytes)
    }

    /// What the registry room does when the volume's object asks for more.
    async fn enlarge(&self, volume: &str, size_bytes: u64) {
        let device = self.engine.grow(volume, size_bytes).await.unwrap();
        self.node.served.set(volume, Some(Presence::Here(device)));
    }
}

#[tokio::test]
async fn an_xfs_volume_grows_under_its_mount() {
    let bench = Bench::new();
    bench.volume("v", 320 * MIB).await;
    let target = bench.path("pods/a");
    let xfs = || mount("xfs", Mode::SingleNodeWriter);
    bench.stage("v", xfs()).await.unwrap();
    bench.publish("v", &target, xfs()).await.unwrap();
    let before = bench.stats("v", &target).await.unwrap();
    let (grown, ()) = tokio::join!(bench.expand("v", &target, 640 * MIB, 0), bench.enlarge("v", 640 * MIB));
    assert_eq!(grown.unwrap(), 640 * MIB as i64);
    assert_eq!(
        bench.expand("v", &target, 640 * MIB, 0).await.unwrap(),
        640 * MIB as i64
    );
    is(
        bench.expand("v", &target, 0, 400 * MIB).await.map(drop),
        Code::OutOfRange,
        "limit",
    );
    let after = bench.stats("v", &target).await.unwrap();
    assert!(after[0].0 > before[0].0 + 250 * MIB as i64, "{before:?} {after:?}");
}

#[tokio::test]
async fn an_ext4_volume_grows_under_its_mount_or_says_when_it_will() {
    let bench = Bench::new();
    bench.volume("v", 64 * MIB).await;
    let staged = bench.path("staging/v");
    bench.stage("v", ext4()).await.unwrap();
    let before = bench.stats("v", &staged).await.unwrap();
    bench.enlarge("v", 128 * MIB).await;
    match bench.expand("v", &staged, 128 * MIB, 0).await {
        Ok(size) => assert_eq!(size, 128 * MIB as i64),
        // Not every machine that runs the tests gives us the capability.
        Err(status) => {
            is(Err(status), Code::FailedPrecondition, "CAP_SYS_RESOURCE");
            bench.unstage("v").await.unwrap();
            bench.stage("v", ext4()).await.unwrap();
        }
    }
    let after = bench.stats("v", &staged).await.unwrap();
    assert!(after[0].0 > before[0].0 + 50 * MIB as i64, "{before:?} {after:?}");
    assert!(after[1].0 > before[1].0, "inodes grow too");
}

#[tokio::test]
async fn a_volume_that_was_not_enlarged_yet_is_tried_again() {
    let bench = Bench::new();
    bench.volume("v", 16 * MIB).await;
    bench.stage("v", ext4()).await.unwrap();
    let mut request = Request::new(NodeExpandVolumeRequest {
        volume_id: "v".into(),
        volume_path: bench.path("staging/v"),
        capacity_range: Some(CapacityRange {
            required_bytes: 32 * MIB as i64,
            limit_bytes: 0,
        }),
        ..Default::default()
    });
    request.metadata_mut().insert("grpc-timeout", "300m".parse().unwrap());
    is(
        bench.node.node_expand_volume(request).await.map(drop),
        Code::Unavailable,
        "still being enlarged",
    );
}

#[tokio::test]
async fn expanding_what_is_not_there_or_not_allowed_is_refused() {
    let bench = Bench::new();
    bench.volume("v", 16 * MIB).await;
    bench.stage("v", ext4()).await.unwrap();
    let expand = |volume: &str, path: String, required_bytes: i64| {
        let capacity_range = Some(CapacityRange {
            required_bytes,
            limit_bytes: 0,
        });
        let request = NodeExpandVolumeRequest {
            volume_id: volume.into(),
            volume_path: path,
            capacity_range,
            ..Default::default()
        };
        bench.node.node_expand_volume(Request::new(request))
    };
    is(
        expand("", bench.path("staging/v"), 0).await.map(drop),
        Code::InvalidArgument,
        "volume_id",
    );
    is(
        expand("v", String::new(), 0).await.map(drop),
        Code::InvalidArgument,
        "volume_path",
    );
    is(
        expand("w", bench.path("staging/v"), 0).await.map(drop),
        Code::NotFound,
        "w",
    );
    is(
        expand("v", bench.path("staging/w"), 0).await.map(drop),
        Code::NotFound,
        "staging/w",
    );
    is(
        expand("v", bench.path("staging/v"), -1).await.map(drop),
        Code::OutOfRange,
        "negative",
    );
}

#[tokio::test]
async fn a_second_call_for_a_volume_is_aborted_while_the_first_works_and_others_go_on() {
    let bench = Bench::new();
    bench.volume("other", 16 * MIB).await;
    bench.exists("v", Some("n1"));
    let staging = bench.stage("v", ext4());
    let meanwhile = async {
        while bench.node.guards.enter("v", "x").is_ok() {
            tokio::task::yield_now().await;
        }
        is(bench.unstage("v").await, Code::Aborted, "staging of volume v");
        bench.stage("other", ext4()).await.unwrap();
        bench.volume("v", 16 * MIB).await;
    };
    let (staged, ()) = tokio::join!(staging, meanwhile);
    staged.unwrap();
}

#[tokio::test]
async fn after_a_crash_everything_is_mounted_again_on_a_new_device() {
    for fs in ["ext4", "xfs"] {
        let mut bench = Bench::new();
        bench.volume("v", 320 * MIB).await;
        bench.volume("b", 16 * MIB).await;
        let capability = || mount(fs, Mode::SingleNodeMultiWriter);
        let (a, gone, dev) = (
            bench.path("pods/a/mount"),
            bench.path("pods/gone/mount"),
            bench.path("pods/a/dev"),
        );
        bench.stage("v", capability()).await.unwrap();
        bench.stage("b", block()).await.unwrap();
        bench.publish("v", &a, capability()).await.unwrap();
        bench.publish("v", &gone, capability()).await.unwrap();
        bench.publish("b", &dev, block()).await.unwrap();
        std::fs::write(Path::new(&a).join("file"), b"bytes").unwrap();
        assert!(Command::new("sync").args(["-f", &a]).status().unwrap().success());

        // The process dies. A pod still holds the old file system; the old devices stay busy and are not ours any more.
        let held = std::fs::File::open(Path::new(&a).join("file")).unwrap();
        let old = bench.node.served.device("v").unwrap().path;
        nix::mount::umount2(gone.as_str(), nix::mount::MntFlags::MNT_DETACH).unwrap();
        std::fs::remove_dir_all(bench.path("pods/gone")).unwrap();
        bench.node = Bench::node(bench.dir.path(), bench.catalog.clone());
        let dead = std::mem::take(&mut bench.engine);
        bench.volume("v", 320 * MIB).await;
        bench.volume("b", 16 * MIB).await;
        assert_ne!(bench.node.served.device("v").unwrap().path, old);

        for volume in ["v", "b"] {
            let tools = bench.node.guards.hung().tools(volume);
            let device = bench.node.served.device(volume).unwrap();
            for _ in 0..2 {
                bench.node.stager.restore(&tools, &device).await.unwrap();
            }
        }
        assert_eq!(std::fs::read(Path::new(&a).join("file")).unwrap(), b"bytes");
        std::fs::write(Path::new(&a).join("more"), b"bytes").unwrap();
        assert_eq!(read_table().await.unwrap().depth(Path::new(&a)), 1);
        assert!(!Path::new(&bench.path("pods/gone")).exists());
        let targets = bench.node.stager.records().staged("v").unwrap().targets;
        assert_eq!(targets.keys().collect::<Vec<_>>(), [Path::new(&a)]);
        use std::os::unix::fs::MetadataExt;
        let device = bench.node.served.device("b").unwrap().path;
        assert_eq!(
            std::fs::metadata(&dev).unwrap().rdev(),
            std::fs::metadata(device).unwrap().rdev()
        );

        // And the kubelet takes it down as if nothing had happened.
        bench.unpublish("v", &a).await.unwrap();
        bench.unstage("v").await.unwrap();
        drop((held, dead));
    }
}

#[tokio::test]
async fn dead_mounts_can_be_taken_down_without_their_device() {
    let bench = Bench::new();
    bench.volume("v", 16 * MIB).await;
    let target = bench.path("pods/a");
    bench.stage("v", ext4()).await.unwrap();
    bench.publish("v", &target, ext4()).await.unwrap();
    bench.node.served.set("v", None);
    bench.unpublish("v", &target).await.unwrap();
    bench.unstage("v").await.unwrap();
    assert!(!bench.mounted(&target).await && !bench.mounted(&bench.path("staging/v")).await);
}

#[tokio::test]
async fn a_mount_that_is_not_the_volumes_is_never_taken_down() {
    let bench = Bench::new();
    bench.volume("v", 16 * MIB).await;
    bench.volume("w", 16 * MIB).await;
    let (target, foreign) = (bench.path("pods/a"), bench.path("pods/tmp"));
    bench.stage("v", ext4()).await.unwrap();
    bench.publish("v", &target, ext4()).await.unwrap();
    std::fs::create_dir_all(&foreign).unwrap();
    assert!(
        Command::new("mount")
            .args(["-t", "tmpfs", "tmpfs", &foreign])
            .status()
            .unwrap()
            .success()
    );
    is(
        bench.unpublish("w", &target).await,
        Code::FailedPrecondition,
        "belongs to volume v",
    );
    is(
        bench.unpublish("w", &foreign).await,
        Code::FailedPrecondition,
        "not one of ours",
    );
    is(
        bench.publish("v", &foreign, ext4()).await,
        Code::FailedPrecondition,
        "already mounted",
    );
    assert!(bench.mounted(&target).await && bench.mounted(&foreign).await);
}

#[tokio::test]
async fn info_names_the_node_its_topology_and_its_limit() {
    let bench = Bench::new();
    let info = bench
        .node
        .node_get_info(Request::new(NodeGetInfoRequest {}))
        .await
        .unwrap()
        .into_inner();
    assert_eq!((info.node_id.as_str(), info.max_volumes_per_node), ("n1", 100));
    let segments = info.accessible_topology.unwrap().segments;
    assert_eq!(
        segments.get("topology.galleonfs.io/node").map(String::as_str),
        Some("n1")
    );
}

#[tokio::test]
async fn a_request_that_names_no_file_system_gets_the_one_the_volume_was_made_for() {
    let bench = Bench::new();
    bench.volume("v", 320 * MIB).await;
    let found = Found {
        uid: "uid-v".into(),
        attach_to: Some("n1".into()),
        fs_type: Some("xfs".into()),
    };
    bench.catalog.0.lock().unwrap().insert("v".into(), Some(found));
    let unnamed = || mount("", Mode::SingleNodeWriter);
    bench.stage("v", unnamed()).await.unwrap();
    bench.stage("v", mount("xfs", Mode::SingleNodeWriter)).await.unwrap();
    bench.publish("v", &bench.path("pods/a"), unnamed()).await.unwrap();
    assert_eq!(
        read_table()
            .await
            .unwrap()
            .at(Path::new(&bench.path("pods/a")))
            .unwrap()
            .fs_type,
        "xfs"
    );
    is(
        bench.publish("v", &bench.path("pods/b"), ext4()).await,
        Code::FailedPrecondition,
        "staged as xfs",
    );
}

#[tokio::test]
async fn a_raw_block_volume_grows_by_whatever_path_the_kubelet_names() {
    let bench = Bench::new();
    bench.volume("v", 16 * MIB).await;
    bench.stage("v", block()).await.unwrap();
    bench.enlarge("v", 32 * MIB).await;
    let path = bench.path("plugins/kubernetes.io/csi/volumeDevices/v/dev");
    assert_eq!(bench.expand("v", &path, 32 * MIB, 0).await.unwrap(), 32 * MIB as i64);
}
