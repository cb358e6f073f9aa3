//! Unix sockets, and the CSI services on one.

use std::future::Future;
use std::io::ErrorKind;
use std::os::unix::net::UnixStream;
use std::path::Path;

use anyhow::{Context, Result, bail};
use galleonfs_csi_proto::csi::identity_server::IdentityServer;
use galleonfs_csi_proto::csi::node_server::NodeServer;
use nix::sys::stat::{Mode, umask};
use tokio::net::UnixListener;
use tokio_stream::wrappers::UnixListenerStream;
use tonic::codegen::http::{HeaderValue, Response};
use tonic::transport::Server;

use crate::csi::{Identity, Node};

/// Listens on a socket that only root may open. One that a dead predecessor left is replaced; one on which somebody
/// answers is left alone.
pub fn bind(path: &Path) -> Result<UnixListener> {
    let shown = path.display();
    match UnixStream::connect(path) {
        Ok(_) => bail!("another process serves {shown}: end it first"),
        Err(error) if error.kind() == ErrorKind::NotFound => {}
        Err(_) => std::fs::remove_file(path).with_context(|| format!("removing the stale socket {shown}"))?,
    }
    if let Some(dir) = path.parent() {
        std::fs::create_dir_all(dir).with_context(|| format!("making {}", dir.display()))?;
    }
    // The mask belongs to the whole process; for these two calls a file made elsewhere is merely more private.
    let before = umask(Mode::from_bits_truncate(0o177));
    let listener = UnixListener::bind(path);
    umask(before);
    listener.with_context(|| format!("listening on {shown}"))
}

/// Serves identity and node until told to stop.
pub async fn serve_csi(
    listener: UnixListener,
    identity: Identity,
    node: Node,
    stop: impl Future<Output = ()>,
) -> Result<()> {
    Server::builder()
        .layer(tower::util::MapResponseLayer::new(blame_the_caller))
        .add_service(IdentityServer::new(identity))
        .add_service(NodeServer::new(node))
        .serve_with_incoming_shutdown(UnixListenerStream::new(listener), stop)
        .await
        .context("serving CSI")
}

/// A message that cannot be decoded (an identifier that is not UTF-8, say) is the caller's mistake. The library calls it
/// an internal error.
fn blame_the_caller<B>(mut response: Response<B>) -> Response<B> {
    let headers = response.headers_mut();
    let is = |headers: &tonic::codegen::http::HeaderMap, name: &str, begins: &str| {
        headers
            .get(name)
            .and_then(|value| value.to_str().ok())
            .is_some_and(|value| value.starts_with(begins))
    };
    if is(headers, "grpc-status", "13") && is(headers, "grpc-message", "failed%20to%20decode") {
        headers.insert("grpc-status", HeaderValue::from_static("3"));
    }
    response
}
