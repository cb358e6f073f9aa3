//! Registration with the kubelet: a socket in a folder that it watches.
//!
//! The kubelet connects, asks who we are, calls our CSI socket at once and then says whether it took us. The socket
//! stays: a kubelet that restarts reads the folder again. Removing it is how a driver deregisters, so it goes when we do.

use std::path::{Path, PathBuf};
use std::sync::{Arc, OnceLock};
use std::time::Duration;

use anyhow::Result;
use galleonfs_csi_proto::registration::registration_server::{Registration as Service, RegistrationServer};
use galleonfs_csi_proto::registration::{
    InfoRequest, PluginInfo, RegistrationStatus, RegistrationStatusResponse, TYPE_CSI_PLUGIN,
};
use tokio::sync::{Notify, watch};
use tokio_stream::StreamExt;
use tokio_stream::wrappers::UnixListenerStream;
use tonic::transport::Server;
use tonic::{Request, Response, Status};

use super::authority::with_plain_authority;
use super::bind;

/// After a refusal the kubelet only looks again at a socket that is new.
const AGAIN_AFTER: Duration = Duration::from_secs(5);

/// What we tell the kubelet.
#[derive(Debug, Clone)]
pub struct Registration {
    /// The CSI socket by the path that the host knows it by.
    pub endpoint: PathBuf,
    refused: Arc<Notify>,
}

impl Registration {
    pub fn new(endpoint: PathBuf) -> Registration {
        Registration {
            endpoint,
            refused: Arc::default(),
        }
    }
}

#[tonic::async_trait]
impl Service for Registration {
    async fn get_info(&self, _: Request<InfoRequest>) -> Result<Response<PluginInfo>, Status> {
        Ok(Response::new(PluginInfo {
            r#type: TYPE_CSI_PLUGIN.into(),
            name: galleonfs_api::DRIVER_NAME.into(),
            endpoint: self.endpoint.to_string_lossy().into_owned(),
            supported_versions: vec!["1.0.0".into()],
        }))
    }

    async fn notify_registration_status(
        &self,
        status: Request<RegistrationStatus>,
    ) -> Result<Response<RegistrationStatusResponse>, Status> {
        let status = status.into_inner();
        if status.plugin_registered {
            tracing::info!("registered with the kubelet");
        } else {
            tracing::error!(why = %status.error, "the kubelet refused to register this driver");
            self.refused.notify_one();
        }
        Ok(Response::new(RegistrationStatusResponse {}))
    }
}

/// Keeps this driver registered until told to stop, then deregisters it.
pub async fn register(path: &Path, registration: Registration, mut stop: watch::Receiver<bool>) -> Result<()> {
    loop {
        let listener = bind(path)?;
        let refused = registration.refused.clone();
        let mut stopping = stop.clone();
        let removed = Arc::new(OnceLock::new());
        let end = {
            let (path, removed) = (path.to_owned(), removed.clone());
            async move {
                tokio::select! {
                    // An error means that whoever says "stop" is gone: that is a stop too.
                    _ = stopping.wait_for(|stop| *stop) => {}
                    () = refused.notified() => {}
                }
                // At once: the server may have to wait for connections that are slow to close.
                let _ = removed.set(std::fs::remove_file(path));
            }
        };
        let clients = UnixListenerStream::new(listener).map(|client| client.map(with_plain_authority));
        let served = Server::builder()
            .add_service(RegistrationServer::new(registration.clone()))
            .serve_with_incoming_shutdown(clients, end)
            .await;
        served?;
        if let Some(Err(error)) = removed.get() {
            anyhow::bail!("removing {}: {error}", path.display());
        }
        if *stop.borrow()
            || tokio::time::timeout(AGAIN_AFTER, stop.wait_for(|stop| *stop))
                .await
                .is_ok()
        {
            return Ok(());
        }
    }
}
