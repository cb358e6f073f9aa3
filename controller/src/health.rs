//! A small HTTP server beside CSI, for the kubelet and for Prometheus.
//!
//! `/healthz` says that the process lives; it stays well while the API server is away, because a restart would not bring
//! that back. `/readyz` says what Probe says. `/metrics` has the figures.

use std::{convert::Infallible, future::Future, net::SocketAddr, sync::Arc, time::Duration};

use anyhow::Context;
use http_body_util::Full;
use hyper::{Request, Response, StatusCode, body::Bytes, header, server::conn::http1, service::service_fn};
use hyper_util::rt::{TokioIo, TokioTimer};
use tokio::{net::TcpListener, sync::Semaphore};

use crate::{csi, metrics::Metrics, operate::World};

/// Connections served at once. The kubelet and a scraper need two; more would be somebody else.
const CONNECTIONS_MAX: usize = 32;
/// A connection that has not sent its request by then is closed.
const HEADER_MAX: Duration = Duration::from_secs(5);

/// Serves until `stop` is done.
pub async fn serve(
    address: SocketAddr,
    world: Arc<World>,
    metrics: Metrics,
    stop: impl Future<Output = ()>,
) -> anyhow::Result<()> {
    let listener = TcpListener::bind(address)
        .await
        .with_context(|| format!("listening on {address}"))?;
    tracing::info!(%address, "serving health and metrics");
    let slots = Arc::new(Semaphore::new(CONNECTIONS_MAX));
    tokio::pin!(stop);
    loop {
        let slot = slots
            .clone()
            .acquire_owned()
            .await
            .context("the semaphore is never closed")?;
        let stream = tokio::select! {
            () = &mut stop => return Ok(()),
            accepted = listener.accept() => match accepted {
                Ok((stream, _)) => stream,
                Err(error) => {
                    tracing::debug!(%error, "a connection was lost before it began");
                    continue;
                }
            },
        };
        let (world, metrics) = (world.clone(), metrics.clone());
        tokio::spawn(async move {
            let _slot = slot;
            let serve = service_fn(move |request| answer(request, world.clone(), metrics.clone()));
            let mut server = http1::Builder::new();
            server
                .timer(TokioTimer::new())
                .header_read_timeout(HEADER_MAX)
                .keep_alive(false);
            if let Err(error) = server.serve_connection(TokioIo::new(stream), serve).await {
                tracing::debug!(%error, "a health connection broke");
            }
        });
    }
}

async fn answer<B>(
    request: Request<B>,
    world: Arc<World>,
    metrics: Metrics,
) -> Result<Response<Full<Bytes>>, Infallible> {
    let (status, text) = match request.uri().path() {
        "/healthz" => (StatusCode::OK, "ok\n".to_string()),
        "/readyz" => match csi::probe(&world).await {
            Ok(()) => (StatusCode::OK, "ok\n".to_string()),
            Err(why) => (StatusCode::SERVICE_UNAVAILABLE, format!("{why}\n")),
        },
        "/metrics" => (StatusCode::OK, metrics.text()),
        _ => (
            StatusCode::NOT_FOUND,
            "there are /healthz, /readyz and /metrics\n".to_string(),
        ),
    };
    let mut response = Response::new(Full::new(Bytes::from(text)));
    *response.status_mut() = status;
    let plain = header::HeaderValue::from_static("text/plain; version=0.0.4; charset=utf-8");
    response.headers_mut().insert(header::CONTENT_TYPE, plain);
    Ok(response)
}
