//! The node service against real file systems on real loop devices, in a kubelet's directory of its own.

mod crash;
mod format;
mod grow;
mod lifecycle;
mod refused;

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
            settings: crate::engine::Settings::default(),
            key: None,
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
