//! The controller service. Each handler validates, takes the volume's guard, calls one thing and maps what comes back.

use std::{collections::BTreeMap, sync::Arc};

use galleonfs_api::{TOPOLOGY_KEY, size::VOLUME_MIN_BYTES};
use galleonfs_csi_proto::csi::{
    ControllerExpandVolumeRequest, ControllerExpandVolumeResponse, ControllerGetCapabilitiesRequest,
    ControllerGetCapabilitiesResponse, ControllerGetVolumeRequest, ControllerGetVolumeResponse,
    ControllerPublishVolumeRequest, ControllerPublishVolumeResponse, ControllerServiceCapability,
    ControllerUnpublishVolumeRequest, ControllerUnpublishVolumeResponse, CreateVolumeRequest, CreateVolumeResponse,
    DeleteVolumeRequest, DeleteVolumeResponse, GetCapacityRequest, GetCapacityResponse, ListVolumesRequest,
    ListVolumesResponse, Topology, ValidateVolumeCapabilitiesRequest, ValidateVolumeCapabilitiesResponse, Volume,
    controller_get_volume_response, controller_server,
    controller_service_capability::{Rpc, Type, rpc},
    list_volumes_response, validate_volume_capabilities_response,
};
use kube::ResourceExt;
use tonic::{Request, Response, Status};

use super::{deadline, guard::Guards};
use crate::{
    error::Error,
    metrics::Metrics,
    operate::{World, attach, create, delete, describe, expand},
    plan::{placement::Room, request, upkeep},
};

/// What this release can do beyond the mandatory calls.
const CAPABILITIES: [rpc::Type; 8] = [
    rpc::Type::CreateDeleteVolume,
    rpc::Type::PublishUnpublishVolume,
    rpc::Type::ListVolumes,
    rpc::Type::ListVolumesPublishedNodes,
    rpc::Type::GetCapacity,
    rpc::Type::ExpandVolume,
    rpc::Type::GetVolume,
    rpc::Type::SingleNodeMultiWriter,
];

#[derive(Debug)]
pub struct Controller {
    world: Arc<World>,
    metrics: Metrics,
    guards: Guards,
}

impl Controller {
    pub fn new(world: Arc<World>, metrics: Metrics) -> Self {
        Self {
            world,
            metrics,
            guards: Guards::default(),
        }
    }
}

#[tonic::async_trait]
impl controller_server::Controller for Controller {
    async fn create_volume(
        &self,
        request: Request<CreateVolumeRequest>,
    ) -> Result<Response<CreateVolumeResponse>, Status> {
        let deadline = deadline::of(request.metadata());
        let request = request.get_ref();
        self.metrics
            .call("CreateVolume", &request.name, async {
                let command = request::create(request)?;
                let _guard = self.guards.take(&command.volume_name)?;
                let create::Created { volume, nodes } = create::create(&self.world, &command, deadline).await?;
                let volume = describe::Described { volume, nodes };
                Ok(CreateVolumeResponse {
                    volume: Some(csi_volume(&volume)),
                })
            })
            .await
    }

    async fn delete_volume(
        &self,
        request: Request<DeleteVolumeRequest>,
    ) -> Result<Response<DeleteVolumeResponse>, Status> {
        let deadline = deadline::of(request.metadata());
        let id = &request.get_ref().volume_id;
        self.metrics
            .call("DeleteVolume", id, async {
                let id = request::volume_id(id)?;
                let _guard = self.guards.take(&id)?;
                delete::delete(&self.world, &id, deadline).await?;
                Ok(DeleteVolumeResponse {})
            })
            .await
    }

    async fn controller_publish_volume(
        &self,
        request: Request<ControllerPublishVolumeRequest>,
    ) -> Result<Response<ControllerPublishVolumeResponse>, Status> {
        let request = request.get_ref();
        self.metrics
            .call("ControllerPublishVolume", &request.volume_id, async {
                let command = request::publish(request)?;
                let _guard = self.guards.take(&command.volume_id)?;
                attach::publish(&self.world, &command).await?;
                Ok(ControllerPublishVolumeResponse::default())
            })
            .await
    }

    async fn controller_unpublish_volume(
        &self,
        request: Request<ControllerUnpublishVolumeRequest>,
    ) -> Result<Response<ControllerUnpublishVolumeResponse>, Status> {
        let deadline = deadline::of(request.metadata());
        let request = request.get_ref();
        self.metrics
            .call("ControllerUnpublishVolume", &request.volume_id, async {
                let command = request::unpublish(request)?;
                let _guard = self.guards.take(&command.volume_id)?;
                attach::unpublish(&self.world, &command, deadline).await?;
                Ok(ControllerUnpublishVolumeResponse {})
            })
            .await
    }

    async fn validate_volume_capabilities(
        &self,
        request: Request<ValidateVolumeCapabilitiesRequest>,
    ) -> Result<Response<ValidateVolumeCapabilitiesResponse>, Status> {
        let request = request.into_inner();
        self.metrics
            .call("ValidateVolumeCapabilities", &request.volume_id, async {
                let (id, verdict) = request::validate(&request)?;
                let volume = self.world.cluster.existing_volume(&id).await?;
                let mode = volume.spec.capability.mode;
                let verdict = verdict.and_then(|usage| match usage.mode == mode {
                    true => Ok(()),
                    false => Err(format!("volume {id} is {mode:?}, not {:?}", usage.mode)),
                });
                Ok(match verdict {
                    Ok(()) => ValidateVolumeCapabilitiesResponse {
                        confirmed: Some(validate_volume_capabilities_response::Confirmed {
                            volume_context: request.volume_context.clone(),
                            volume_capabilities: request.volume_capabilities.clone(),
                            parameters: request.parameters.clone(),
                            mutable_parameters: BTreeMap::new(),
                        }),
                        message: String::new(),
                    },
                    Err(message) => ValidateVolumeCapabilitiesResponse {
                        confirmed: None,
                        message,
                    },
                })
            })
            .await
    }

    async fn list_volumes(
        &self,
        request: Request<ListVolumesRequest>,
    ) -> Result<Response<ListVolumesResponse>, Status> {
        self.metrics
            .call("ListVolumes", "", async {
                let page = request::list(request.get_ref())?;
                let (volumes, next_token) = describe::volumes(&self.world, &page).await?;
                let entry = |described: &describe::Described| list_volumes_response::Entry {
                    volume: Some(csi_volume(described)),
                    status: Some(list_volumes_response::VolumeStatus {
                        published_node_ids: published(described),
                    }),
                };
                Ok(ListVolumesResponse {
                    entries: volumes.iter().map(entry).collect(),
                    next_token,
                })
            })
            .await
    }

    async fn get_capacity(
        &self,
        request: Request<GetCapacityRequest>,
    ) -> Result<Response<GetCapacityResponse>, Status> {
        self.metrics
            .call("GetCapacity", "", async {
                let room = match request::capacity(request.get_ref())? {
                    Some(asked) => describe::room(&self.world, &asked)?,
                    None => Room::default(),
                };
                Ok(GetCapacityResponse {
                    available_capacity: room.available_bytes,
                    maximum_volume_size: Some(room.largest_bytes),
                    minimum_volume_size: Some(VOLUME_MIN_BYTES),
                })
            })
            .await
    }

    async fn controller_get_capabilities(
        &self,
        _: Request<ControllerGetCapabilitiesRequest>,
    ) -> Result<Response<ControllerGetCapabilitiesResponse>, Status> {
        let capability = |type_: rpc::Type| ControllerServiceCapability {
            r#type: Some(Type::Rpc(Rpc { r#type: type_.into() })),
        };
        let capabilities = CAPABILITIES.map(capability).into();
        Ok(Response::new(ControllerGetCapabilitiesResponse { capabilities }))
    }

    async fn controller_expand_volume(
        &self,
        request: Request<ControllerExpandVolumeRequest>,
    ) -> Result<Response<ControllerExpandVolumeResponse>, Status> {
        let request = request.get_ref();
        self.metrics
            .call("ControllerExpandVolume", &request.volume_id, async {
                let command = request::expand(request)?;
                let _guard = self.guards.take(&command.volume_id)?;
                let capacity_bytes = expand::expand(&self.world, &command).await?;
                // The device and the file system on it follow on the node; so does a raw device.
                Ok(ControllerExpandVolumeResponse {
                    capacity_bytes,
                    node_expansion_required: true,
                })
            })
            .await
    }

    async fn controller_get_volume(
        &self,
        request: Request<ControllerGetVolumeRequest>,
    ) -> Result<Response<ControllerGetVolumeResponse>, Status> {
        let id = &request.get_ref().volume_id;
        self.metrics
            .call("ControllerGetVolume", id, async {
                let described = describe::volume(&self.world, &request::volume_id(id)?).await?;
                let published_node_ids = published(&described);
                Ok::<_, Error>(ControllerGetVolumeResponse {
                    volume: Some(csi_volume(&described)),
                    status: Some(controller_get_volume_response::VolumeStatus { published_node_ids }),
                })
            })
            .await
    }
}

fn csi_volume(described: &describe::Described) -> Volume {
    let place = |node: &String| Topology {
        segments: [(TOPOLOGY_KEY.to_string(), node.clone())].into(),
    };
    Volume {
        capacity_bytes: described.volume.spec.size_bytes,
        volume_id: described.volume.name_any(),
        volume_context: BTreeMap::new(),
        content_source: None,
        accessible_topology: described.nodes.iter().map(place).collect(),
    }
}

/// Where a volume is published: where it is ordered to, or, that withdrawn, where it still is.
fn published(described: &describe::Described) -> Vec<String> {
    let holder = upkeep::holder(&described.volume);
    holder.map(str::to_string).into_iter().collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::fixtures::{attach_to, settled, volume};

    fn described(node: &str) -> describe::Described {
        describe::Described {
            volume: settled(volume("v"), &["v-a"]),
            nodes: vec![node.to_string()],
        }
    }

    #[test]
    fn a_volume_is_reported_with_its_real_size_and_place() {
        let reported = csi_volume(&described("a"));
        assert_eq!((reported.volume_id.as_str(), reported.capacity_bytes), ("v", 1 << 30));
        assert_eq!(reported.accessible_topology[0].segments[TOPOLOGY_KEY], "a");
    }

    #[test]
    fn a_volume_counts_as_published_until_its_node_has_let_go() {
        let mut described = described("a");
        assert!(published(&described).is_empty());
        described.volume.spec.attach_to = Some(attach_to("a"));
        assert_eq!(published(&described), ["a"]);
        described.volume.spec.attach_to = None;
        let status = described
            .volume
            .status
            .as_mut()
            .and_then(|status| status.config.as_mut());
        status.expect("a configuration").primary = Some("a".to_string());
        assert_eq!(published(&described), ["a"]);
    }
}
