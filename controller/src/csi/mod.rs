//! The CSI services of the controller, on a Unix socket that the sidecars of the same pod share.
//!
//! The sidecars elect a leader among themselves and talk to the controller of their own pod, so every controller serves,
//! leader or not, and what is here must be right when two of them serve the same volume at once.

mod controller;
mod deadline;
mod guard;
mod identity;

pub use identity::probe;

use std::{
    future::Future,
    os::unix::fs::PermissionsExt,
    path::{Path, PathBuf},
    sync::Arc,
    time::Duration,
};

use anyhow::Context;
use futures::FutureExt;
use galleonfs_csi_proto::csi::{controller_server::ControllerServer, identity_server::IdentityServer};
use tokio::net::UnixListener;
use tokio_stream::wrappers::UnixListenerStream;

use crate::{metrics::Metrics, operate::World};

/// How long calls under way may go on when the controller ends. A call that waits for a node may wait much longer; its
/// caller repeats it with the successor, and it goes on from what stands in the objects.
const END_MAX: Duration = Duration::from_secs(3);

/// Serves until `stop` is done. A socket that an earlier process left is taken over.
pub async fn serve(
    socket: PathBuf,
    world: Arc<World>,
    metrics: Metrics,
    stop: impl Future<Output = ()> + Send,
) -> anyhow::Result<()> {
    let stop = stop.shared();
    let cut = stop.clone().then(|()| tokio::time::sleep(END_MAX));
    let listener = bind(&socket).with_context(|| format!("opening the CSI socket {}", socket.display()))?;
    tracing::info!(socket = %socket.display(), "serving CSI");
    let server = tonic::transport::Server::builder()
        .add_service(IdentityServer::new(identity::Identity::new(
            world.clone(),
            metrics.clone(),
        )))
        .add_service(ControllerServer::new(controller::Controller::new(world, metrics)))
        .serve_with_incoming_shutdown(UnixListenerStream::new(listener), stop);
    tokio::select! {
        served = server => served.with_context(|| format!("serving CSI on {}", socket.display()))?,
        () = cut => tracing::info!("calls under way were cut off; their callers repeat them"),
    }
    // Nobody answers there any more.
    let _ = std::fs::remove_file(&socket);
    Ok(())
}

fn bind(socket: &Path) -> std::io::Result<UnixListener> {
    if let Some(directory) = socket.parent() {
        std::fs::create_dir_all(directory)?;
    }
    match std::fs::remove_file(socket) {
        Err(error) if error.kind() != std::io::ErrorKind::NotFound => return Err(error),
        _ => {}
    }
    let listener = UnixListener::bind(socket)?;
    std::fs::set_permissions(socket, std::fs::Permissions::from_mode(0o600))?;
    Ok(listener)
}
