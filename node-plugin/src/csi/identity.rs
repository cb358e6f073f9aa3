//! The identity service, and the one answer to "are you well?" that it shares with the health pages.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use galleonfs_csi_proto::csi::plugin_capability::service::Type as Service;
use galleonfs_csi_proto::csi::plugin_capability::volume_expansion::Type as Expansion;
use galleonfs_csi_proto::csi::{
    GetPluginCapabilitiesRequest, GetPluginCapabilitiesResponse, GetPluginInfoRequest, GetPluginInfoResponse,
    PluginCapability, ProbeRequest, ProbeResponse, plugin_capability,
};
use tonic::{Request, Response, Status};

use crate::served::NodeEngine;

/// Whether this process does its work.
///
/// It is *alive* while its engine runs, and *ready* once it has also seen the API server. An API server that goes away
/// later changes neither: volumes are served without it, and restarting us would only take them down.
#[derive(Clone)]
pub struct Health {
    engine: Arc<dyn NodeEngine>,
    api_seen: Arc<AtomicBool>,
}

impl std::fmt::Debug for Health {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Health")
            .field("api_seen", &self.api_seen)
            .finish_non_exhaustive()
    }
}

impl Health {
    pub fn new(engine: Arc<dyn NodeEngine>) -> Health {
        Health {
            engine,
            api_seen: Arc::default(),
        }
    }

    /// To be called when the API server has answered: the objects of this node are known.
    pub fn saw_api(&self) {
        self.api_seen.store(true, Ordering::Relaxed);
    }

    /// Alive? The text says what is wrong.
    pub fn alive(&self) -> Result<(), String> {
        self.engine.alive()
    }

    /// Alive, and able to take new work?
    pub fn ready(&self) -> Result<bool, String> {
        self.alive().map(|()| self.api_seen.load(Ordering::Relaxed))
    }
}

/// The service.
#[derive(Debug)]
pub struct Identity {
    health: Health,
}

impl Identity {
    pub fn new(health: Health) -> Identity {
        Identity { health }
    }
}

#[tonic::async_trait]
impl galleonfs_csi_proto::csi::identity_server::Identity for Identity {
    async fn get_plugin_info(
        &self,
        _: Request<GetPluginInfoRequest>,
    ) -> Result<Response<GetPluginInfoResponse>, Status> {
        Ok(Response::new(GetPluginInfoResponse {
            name: galleonfs_api::DRIVER_NAME.into(),
            vendor_version: env!("CARGO_PKG_VERSION").into(),
            manifest: Default::default(),
        }))
    }

    async fn get_plugin_capabilities(
        &self,
        _: Request<GetPluginCapabilitiesRequest>,
    ) -> Result<Response<GetPluginCapabilitiesResponse>, Status> {
        let service =
            |service: Service| plugin_capability::Type::Service(plugin_capability::Service { r#type: service as i32 });
        let expansion = plugin_capability::VolumeExpansion {
            r#type: Expansion::Online as i32,
        };
        let all = [
            service(Service::ControllerService),
            service(Service::VolumeAccessibilityConstraints),
            plugin_capability::Type::VolumeExpansion(expansion),
        ];
        let capabilities = all
            .into_iter()
            .map(|one| PluginCapability { r#type: Some(one) })
            .collect();
        Ok(Response::new(GetPluginCapabilitiesResponse { capabilities }))
    }

    async fn probe(&self, _: Request<ProbeRequest>) -> Result<Response<ProbeResponse>, Status> {
        let ready = self.health.ready().map_err(Status::failed_precondition)?;
        Ok(Response::new(ProbeResponse { ready: Some(ready) }))
    }
}
