//! The identity service. Probe tells the truth: without the API server and our resources this controller can do nothing.

use std::{sync::Arc, time::Duration};

use galleonfs_api::DRIVER_NAME;
use galleonfs_csi_proto::csi::{
    GetPluginCapabilitiesRequest, GetPluginCapabilitiesResponse, GetPluginInfoRequest, GetPluginInfoResponse,
    PluginCapability, ProbeRequest, ProbeResponse, identity_server,
    plugin_capability::{self, Service, VolumeExpansion, service, volume_expansion},
};
use tonic::{Request, Response, Status};

use crate::{
    error::{Error, Kind},
    metrics::Metrics,
    operate::World,
};

/// A probe that takes longer has its answer.
const PROBE_MAX: Duration = Duration::from_secs(2);

#[derive(Debug)]
pub struct Identity {
    world: Arc<World>,
    metrics: Metrics,
}

impl Identity {
    pub fn new(world: Arc<World>, metrics: Metrics) -> Self {
        Self { world, metrics }
    }
}

/// Whether the controller can do its work; else why not.
pub async fn probe(world: &World) -> Result<(), String> {
    match tokio::time::timeout(PROBE_MAX, world.cluster.probe()).await {
        Ok(answer) => answer,
        Err(_) => Err(format!(
            "the API server does not answer within {} s",
            PROBE_MAX.as_secs()
        )),
    }
}

#[tonic::async_trait]
impl identity_server::Identity for Identity {
    async fn get_plugin_info(
        &self,
        _: Request<GetPluginInfoRequest>,
    ) -> Result<Response<GetPluginInfoResponse>, Status> {
        Ok(Response::new(GetPluginInfoResponse {
            name: DRIVER_NAME.to_string(),
            vendor_version: env!("CARGO_PKG_VERSION").to_string(),
            manifest: Default::default(),
        }))
    }

    async fn get_plugin_capabilities(
        &self,
        _: Request<GetPluginCapabilitiesRequest>,
    ) -> Result<Response<GetPluginCapabilitiesResponse>, Status> {
        let service = |type_: service::Type| plugin_capability::Type::Service(Service { r#type: type_.into() });
        let expansion = VolumeExpansion {
            r#type: volume_expansion::Type::Online.into(),
        };
        let capabilities = [
            service(service::Type::ControllerService),
            service(service::Type::VolumeAccessibilityConstraints),
            plugin_capability::Type::VolumeExpansion(expansion),
        ];
        let capabilities = capabilities
            .map(|type_| PluginCapability { r#type: Some(type_) })
            .into();
        Ok(Response::new(GetPluginCapabilitiesResponse { capabilities }))
    }

    async fn probe(&self, _: Request<ProbeRequest>) -> Result<Response<ProbeResponse>, Status> {
        self.metrics
            .call("Probe", "", async {
                probe(&self.world)
                    .await
                    .map_err(|why| Error::new(Kind::Precondition, why))?;
                Ok(ProbeResponse { ready: Some(true) })
            })
            .await
    }
}
