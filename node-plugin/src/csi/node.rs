//! The node service.

use std::future::Future;
use std::path::Path;
use std::sync::Arc;

use futures::future::BoxFuture;
use galleonfs_csi_proto::csi::node_service_capability::rpc::Type as Rpc;
use galleonfs_csi_proto::csi::volume_usage::Unit;
use galleonfs_csi_proto::csi::{
    NodeExpandVolumeRequest, NodeExpandVolumeResponse, NodeGetCapabilitiesRequest, NodeGetCapabilitiesResponse,
    NodeGetInfoRequest, NodeGetInfoResponse, NodeGetVolumeStatsRequest, NodeGetVolumeStatsResponse,
    NodePublishVolumeRequest, NodePublishVolumeResponse, NodeServiceCapability, NodeStageVolumeRequest,
    NodeStageVolumeResponse, NodeUnpublishVolumeRequest, NodeUnpublishVolumeResponse, NodeUnstageVolumeRequest,
    NodeUnstageVolumeResponse, Topology, VolumeUsage, node_service_capability,
};
use tokio::time::Instant;
use tonic::{Request, Response, Status};

use super::check;
use super::status::{deadline, not_here, patience};
use crate::mount::paths::{check_id, is_object_name};
use crate::mount::{KubeletPath, MountError, Tools};
use crate::served::{Device, Guards, Served, Waited};
use crate::staging::Stager;
use crate::state::{Access, Kind, Staged};

/// Where the node service asks which volumes exist.
pub trait Directory: Send + Sync + 'static {
    /// The volume of this name; an error says why nobody can tell right now.
    fn find<'a>(&'a self, volume: &'a str) -> BoxFuture<'a, Result<Option<Found>, String>>;
    /// Told when a volume is no longer staged here, so that it can be released.
    fn unstaged(&self, volume: &str);
}

/// What the node service must know of a volume.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Found {
    pub uid: String,
    /// The node it is to be attached to, if any.
    pub attach_to: Option<String>,
    /// The file system it was made for; what a request that names none means.
    pub fs_type: Option<String>,
}

/// The service.
#[derive(Clone)]
pub struct Node {
    pub name: String,
    pub volumes_max: i64,
    pub stager: Stager,
    pub guards: Guards,
    pub served: Served,
    pub directory: Arc<dyn Directory>,
}

impl std::fmt::Debug for Node {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Node").field("name", &self.name).finish_non_exhaustive()
    }
}

/// Whether a new target may be added to what is staged.
fn may_publish(
    volume: &str,
    staged: &Staged,
    staging: &KubeletPath,
    target: &KubeletPath,
    wish: &check::Wish,
    read_only: bool,
) -> Result<(), Status> {
    let precondition = |text: String| Err(Status::failed_precondition(text));
    let mode_of = |kind: &Kind| match kind {
        Kind::Block => "block".to_owned(),
        Kind::Filesystem { fs, .. } => fs.to_string(),
    };
    let same_mode = match (&staged.kind, &wish.kind) {
        (Kind::Filesystem { fs, .. }, Kind::Filesystem { fs: asked, .. }) => !wish.names_fs || fs == asked,
        (Kind::Block, Kind::Block) => true,
        (Kind::Block, Kind::Filesystem { .. }) | (Kind::Filesystem { .. }, Kind::Block) => false,
    };
    if let Some(there) = staged.targets.get(target.as_path()) {
        if there.read_only == read_only && same_mode {
            return Ok(());
        }
        return Err(Status::already_exists(format!(
            "volume {volume} is already published at {target} with another capability or read-only flag"
        )));
    }
    if staged.path != staging.as_path() {
        return precondition(format!(
            "volume {volume} is staged at {}, not at {staging}",
            staged.path.display()
        ));
    }
    if !same_mode {
        let (is, asked) = (mode_of(&staged.kind), mode_of(&wish.kind));
        return precondition(format!(
            "volume {volume} is staged as {is}, and cannot be published as {asked}"
        ));
    }
    let single = staged.access == Access::SingleWriter || wish.access == Access::SingleWriter;
    if let (true, Some(other)) = (single, staged.targets.keys().next()) {
        return precondition(format!(
            "volume {volume} is for a single writer (ReadWriteOncePod) and already published at {}",
            other.display()
        ));
    }
    Ok(())
}

/// What every call begins with: until when its caller waits, and which volume it is about.
fn opened<R>(request: Request<R>, id: impl Fn(&R) -> &String) -> Result<(Instant, String, R), Status> {
    let until = deadline(request.metadata());
    let request = request.into_inner();
    let volume = id(&request).clone();
    check_id("volume_id", &volume)?;
    Ok((until, volume, request))
}

impl Node {
    /// A path that the kubelet may name; `field` is where it did.
    fn place(&self, field: &str, path: &str) -> Result<KubeletPath, MountError> {
        self.stager.kubelet().check(field, path)
    }

    /// How the volume is staged here, if it is.
    fn staged(&self, volume: &str) -> Option<Staged> {
        is_object_name(volume).then(|| self.stager.records().staged(volume))?
    }

    /// A volume that must exist.
    async fn find(&self, volume: &str) -> Result<Found, Status> {
        let missing = || Status::not_found(format!("volume {volume} does not exist"));
        if !is_object_name(volume) {
            return Err(missing());
        }
        let found = self.directory.find(volume).await;
        let unknown = |why| Status::unavailable(format!("whether volume {volume} exists cannot be told: {why}"));
        found.map_err(unknown)?.ok_or_else(missing)
    }

    async fn device(&self, volume: &str, until: Instant, enough: impl Fn(&Device) -> bool) -> Result<Device, Status> {
        match self.served.wait(volume, patience(until), enough).await {
            Waited::Device(device) => Ok(device),
            other => Err(not_here(volume, other)),
        }
    }

    /// Runs `work` under the volume's guard, on a task that outlives the call.
    async fn guarded<T, F>(
        &self,
        volume: &str,
        what: &str,
        until: Instant,
        work: impl FnOnce(Node, Tools) -> F,
    ) -> Result<T, Status>
    where
        T: Send + 'static,
        F: Future<Output = Result<T, Status>> + Send + 'static,
    {
        let work = work(self.clone(), self.guards.hung().tools(volume));
        let outcome = self.guards.run(volume, what, until, work).await?;
        if let Err(status) = &outcome {
            tracing::warn!(%volume, code = ?status.code(), why = status.message(), "{what} failed");
        }
        outcome
    }

    /// How the volume is staged, if `path` is one of its places.
    fn at(&self, volume: &str, field: &str, path: &str) -> Result<(Staged, KubeletPath), Status> {
        if path.is_empty() {
            self.place(field, path)?;
        }
        let missing = |why: String| Err(Status::not_found(why));
        let Some(staged) = self.staged(volume) else {
            return missing(format!("volume {volume} is not staged on this node"));
        };
        // A path is compared with what is on record and touched only then, so one that makes no sense is just not there.
        let place = Path::new(path);
        if staged.path != place && !staged.targets.contains_key(place) {
            return missing(format!("volume {volume} is not at {path}"));
        }
        let path = self.place(field, path)?;
        Ok((staged, path))
    }
}

#[tonic::async_trait]
impl galleonfs_csi_proto::csi::node_server::Node for Node {
    async fn node_stage_volume(
        &self,
        request: Request<NodeStageVolumeRequest>,
    ) -> Result<Response<NodeStageVolumeResponse>, Status> {
        let (until, volume, request) = opened(request, |request| &request.volume_id)?;
        let path = self.place("staging_target_path", &request.staging_target_path)?;
        let mut wish = check::capability(request.volume_capability.as_ref(), "")?;
        check::map("publish_context", &request.publish_context)?;
        check::map("volume_context", &request.volume_context)?;
        let found = self.find(&volume).await?;
        if let (Kind::Filesystem { .. }, Some(fs), false) = (&wish.kind, &found.fs_type, wish.names_fs) {
            wish = check::capability(request.volume_capability.as_ref(), fs)?;
        }
        if let Some(other) = found.attach_to.filter(|node| *node != self.name) {
            return Err(Status::failed_precondition(format!(
                "volume {volume} is attached to node {other}"
            )));
        }
        let wanted = Staged {
            path: path.as_path().to_owned(),
            kind: wish.kind,
            access: wish.access,
            read_only: wish.read_only,
            targets: Default::default(),
        };
        let key = volume.clone();
        self.guarded(&key, "staging", until, move |node, tools| async move {
            if let Some(staged) = node.stager.records().staged(&volume)
                && !staged.same_request(&wanted)
            {
                return Err(if staged.path == wanted.path {
                    Status::already_exists(format!("volume {volume} is already staged with another capability"))
                } else {
                    Status::failed_precondition(format!("volume {volume} is staged at {}", staged.path.display()))
                });
            }
            let device = node.device(&volume, until, |_| true).await?;
            Ok(node.stager.stage(&tools, &found.uid, wanted, &device).await?)
        })
        .await?;
        Ok(Response::new(NodeStageVolumeResponse {}))
    }

    async fn node_unstage_volume(
        &self,
        request: Request<NodeUnstageVolumeRequest>,
    ) -> Result<Response<NodeUnstageVolumeResponse>, Status> {
        let (until, volume, request) = opened(request, |request| &request.volume_id)?;
        let path = self.place("staging_target_path", &request.staging_target_path)?;
        let key = volume.clone();
        if is_object_name(&volume) {
            self.guarded(&key, "unstaging", until, move |node, tools| async move {
                let device = node.served.device(&volume);
                node.stager.unstage(&tools, &path, device.as_ref()).await?;
                node.directory.unstaged(&volume);
                Ok(())
            })
            .await?;
        }
        Ok(Response::new(NodeUnstageVolumeResponse {}))
    }

    async fn node_publish_volume(
        &self,
        request: Request<NodePublishVolumeRequest>,
    ) -> Result<Response<NodePublishVolumeResponse>, Status> {
        let (until, volume, request) = opened(request, |request| &request.volume_id)?;
        let target = self.place("target_path", &request.target_path)?;
        let wish = check::capability(request.volume_capability.as_ref(), "")?;
        check::map("publish_context", &request.publish_context)?;
        check::map("volume_context", &request.volume_context)?;
        if request.staging_target_path.is_empty() {
            return Err(Status::failed_precondition(
                "staging_target_path is missing: volumes are staged first",
            ));
        }
        let staging = self.place("staging_target_path", &request.staging_target_path)?;
        let read_only = request.readonly || wish.read_only;
        let key = volume.clone();
        self.guarded(&key, "publishing", until, move |node, tools| async move {
            let Some(staged) = node.staged(&volume) else {
                node.find(&volume).await?;
                return Err(Status::failed_precondition(format!(
                    "volume {volume} is not staged on this node"
                )));
            };
            may_publish(&volume, &staged, &staging, &target, &wish, read_only)?;
            let device = node.device(&volume, until, |_| true).await?;
            Ok(node.stager.publish(&tools, &target, read_only, &device).await?)
        })
        .await?;
        Ok(Response::new(NodePublishVolumeResponse {}))
    }

    async fn node_unpublish_volume(
        &self,
        request: Request<NodeUnpublishVolumeRequest>,
    ) -> Result<Response<NodeUnpublishVolumeResponse>, Status> {
        let (until, volume, request) = opened(request, |request| &request.volume_id)?;
        let target = self.place("target_path", &request.target_path)?;
        let key = volume.clone();
        if is_object_name(&volume) {
            self.guarded(&key, "unpublishing", until, move |node, tools| async move {
                let device = node.served.device(&volume);
                Ok(node.stager.unpublish(&tools, &target, device.as_ref()).await?)
            })
            .await?;
        }
        Ok(Response::new(NodeUnpublishVolumeResponse {}))
    }

    async fn node_expand_volume(
        &self,
        request: Request<NodeExpandVolumeRequest>,
    ) -> Result<Response<NodeExpandVolumeResponse>, Status> {
        let (until, volume, request) = opened(request, |request| &request.volume_id)?;
        if request.volume_path.is_empty() {
            return Err(MountError::Invalid("volume_path is missing".into()).into());
        }
        let range = check::capacity(request.capacity_range)?;
        self.find(&volume).await?;
        let staged = self.staged(&volume);
        if staged.is_some_and(|staged| staged.kind == Kind::Block) {
            // For a raw block volume the kubelet names one of several paths of its own; there is nothing to grow at any.
            self.place("volume_path", &request.volume_path)?;
        } else {
            self.at(&volume, "volume_path", &request.volume_path)?;
        }
        let key = volume.clone();
        let capacity = self
            .guarded(&key, "expanding", until, move |node, tools| async move {
                let enough = |device: &Device| device.size_bytes >= range.required_bytes;
                let device = match node.served.wait(&volume, patience(until), enough).await {
                    Waited::Device(device) => device,
                    Waited::StillComing => {
                        let now = node.served.device(&volume).map_or(Waited::StillComing, Waited::Device);
                        return Err(not_here(&volume, now));
                    }
                    other => return Err(not_here(&volume, other)),
                };
                if let Some(limit) = range.limit_bytes.filter(|limit| device.size_bytes > *limit) {
                    let size = device.size_bytes;
                    return Err(Status::out_of_range(format!(
                        "volume {volume} already has {size} bytes, more than the limit of {limit}"
                    )));
                }
                node.stager.grow(&tools, &device).await?;
                Ok(device.size_bytes)
            })
            .await?;
        Ok(Response::new(NodeExpandVolumeResponse {
            capacity_bytes: capacity as i64,
        }))
    }

    async fn node_get_volume_stats(
        &self,
        request: Request<NodeGetVolumeStatsRequest>,
    ) -> Result<Response<NodeGetVolumeStatsResponse>, Status> {
        let (until, volume, request) = opened(request, |request| &request.volume_id)?;
        let (staged, path) = self.at(&volume, "volume_path", &request.volume_path)?;
        if let Some(hangs) = self.guards.hung().of(&volume) {
            return Err(Status::aborted(hangs));
        }
        let device = self.device(&volume, Instant::now(), |_| true).await?;
        if staged.kind == Kind::Block {
            let total = VolumeUsage {
                total: device.size_bytes as i64,
                unit: Unit::Bytes as i32,
                ..Default::default()
            };
            return Ok(Response::new(NodeGetVolumeStatsResponse { usage: vec![total] }));
        }
        // Looking changes nothing, so it gets a guard of its own: it neither waits for a stage nor keeps one out.
        let (stager, tools) = (self.stager.clone(), self.guards.hung().tools(&volume));
        let look = async move { stager.usage(&tools, path.as_path()).await };
        let usage = self
            .guards
            .run(&format!("{volume}/stats"), "measuring", until, look)
            .await??;
        let of = |available: u64, total: u64, used: u64, unit: Unit| VolumeUsage {
            available: available as i64,
            total: total as i64,
            used: used as i64,
            unit: unit as i32,
        };
        let inodes_used = usage.inodes - usage.inodes_free;
        Ok(Response::new(NodeGetVolumeStatsResponse {
            usage: vec![
                of(usage.available_bytes, usage.total_bytes, usage.used_bytes, Unit::Bytes),
                of(usage.inodes_free, usage.inodes, inodes_used, Unit::Inodes),
            ],
        }))
    }

    async fn node_get_capabilities(
        &self,
        _: Request<NodeGetCapabilitiesRequest>,
    ) -> Result<Response<NodeGetCapabilitiesResponse>, Status> {
        let all = [
            Rpc::StageUnstageVolume,
            Rpc::GetVolumeStats,
            Rpc::ExpandVolume,
            Rpc::SingleNodeMultiWriter,
        ];
        let capability = |rpc: Rpc| NodeServiceCapability {
            r#type: Some(node_service_capability::Type::Rpc(node_service_capability::Rpc {
                r#type: rpc as i32,
            })),
        };
        Ok(Response::new(NodeGetCapabilitiesResponse {
            capabilities: all.map(capability).into(),
        }))
    }

    async fn node_get_info(&self, _: Request<NodeGetInfoRequest>) -> Result<Response<NodeGetInfoResponse>, Status> {
        let segments = [(galleonfs_api::TOPOLOGY_KEY.to_owned(), self.name.clone())].into();
        Ok(Response::new(NodeGetInfoResponse {
            node_id: self.name.clone(),
            max_volumes_per_node: self.volumes_max,
            accessible_topology: Some(Topology { segments }),
        }))
    }
}
