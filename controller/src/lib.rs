//! The controller: speaks CSI to the sidecars of its pod and keeps the custom resources in order.
//!
//! ```text
//! sidecars ──▶ csi/ ──▶ plan/ (decides) ──▶ operate/ (look, plan, perform) ──▶ cluster/ ──▶ API server
//!                                              ▲
//!              changes ──▶ reconcile/ ─────────┘        (only in the leader: election/)
//! ```
//!
//! The object is the message: nothing here calls a node. All state is in the API server, every write is conditional on
//! what was read, and every operation may be cut off at any await and done again by this process or another one. Writes
//! follow changes, never a timer, but for the renewal of the leader's Lease.

pub mod certificates;
mod cluster;
mod config;
mod csi;
mod election;
mod error;
#[cfg(test)]
mod fixtures;
mod health;
mod metrics;
mod operate;
mod plan;
mod reconcile;

use std::sync::Arc;

use anyhow::Context;
use kube::{
    Client, Config,
    config::{KubeConfigOptions, Kubeconfig},
};
use tokio::{
    signal::unix::{SignalKind, signal},
    sync::watch,
};

pub use config::{ControllerConfig, DefaultPool, Delay};
pub use election::LEASE_NAME;

use crate::{certificates::Issuer, cluster::Cluster, election::Election, metrics::Metrics, operate::World};

/// Runs the controller until the process is asked to end (SIGTERM, SIGINT).
pub async fn run(config: ControllerConfig) -> anyhow::Result<()> {
    let mut terminate = signal(SignalKind::terminate()).context("listening for SIGTERM")?;
    let mut interrupt = signal(SignalKind::interrupt()).context("listening for SIGINT")?;
    let asked_to_end = async move {
        tokio::select! {
            _ = terminate.recv() => {}
            _ = interrupt.recv() => {}
        }
        tracing::info!("asked to end");
    };
    run_until(config, asked_to_end).await
}

/// Runs the controller until `stop` is done, or until one of its parts cannot go on.
pub async fn run_until(config: ControllerConfig, stop: impl Future<Output = ()>) -> anyhow::Result<()> {
    let client = client(&config).await?;
    let (cluster, seen) = Cluster::new(client.clone(), &config.namespace);
    let world = Arc::new(World::new(cluster, config.replacement_delay.0));
    let metrics = Metrics::default();
    let (stopping, stopped) = watch::channel(false);
    let when_stopped = || {
        let mut stopped = stopped.clone();
        async move {
            // An error means that the sender is gone, and then it is time to stop, too.
            let _ = stopped.wait_for(|stopped| *stopped).await;
        }
    };

    let work = {
        let (world, metrics, default_pools) = (world.clone(), metrics.clone(), config.default_pools.clone());
        let (client, namespace) = (client.clone(), config.namespace.clone());
        let (account, times) = (config.node_service_account.clone(), config.certificate_times);
        move || {
            let issuer = Issuer::new(client.clone(), &namespace, &account, times, metrics.clone());
            let loops = reconcile::run(world.clone(), metrics.clone(), default_pools.clone());
            async move {
                tokio::join!(loops, issuer.run());
            }
        }
    };
    let identity = format!("{}_{}", config.identity, uuid::Uuid::new_v4());
    let leading = {
        let (stop, metrics) = (when_stopped(), metrics.clone());
        let election = Election::new(client, &config.namespace, identity, metrics.clone());
        async move {
            if config.leader_election {
                election.run(work, stop).await;
            } else {
                metrics.set_leader(true);
                tokio::select! {
                    () = work() => {}
                    () = stop => {}
                }
            }
        }
    };
    let serving = csi::serve(
        config.csi_socket.clone(),
        world.clone(),
        metrics.clone(),
        when_stopped(),
    );
    let health = {
        let stop = when_stopped();
        async move {
            match config.health_address {
                Some(address) => health::serve(address, world, metrics, stop).await,
                None => {
                    stop.await;
                    Ok(())
                }
            }
        }
    };

    let mut parts = tokio::task::JoinSet::new();
    parts.spawn(serving);
    parts.spawn(health);
    parts.spawn(async move {
        leading.await;
        Ok(())
    });
    let watching = tokio::spawn(seen);
    tokio::pin!(stop);
    let first = tokio::select! {
        () = &mut stop => None,
        part = parts.join_next() => part,
    };
    // Whether asked to or because a part has failed: the others end in good order, the Lease is given back.
    stopping.send_replace(true);
    let mut outcome = match first {
        Some(ended) => ended
            .context("a part of the controller panicked")
            .and_then(|result| result),
        None => Ok(()),
    };
    while let Some(ended) = parts.join_next().await {
        let ended = ended
            .context("a part of the controller panicked")
            .and_then(|result| result);
        outcome = outcome.and(ended);
    }
    watching.abort();
    outcome
}

async fn client(config: &ControllerConfig) -> anyhow::Result<Client> {
    let kube_config = match &config.kubeconfig {
        Some(path) => {
            let file = Kubeconfig::read_from(path).with_context(|| format!("reading {}", path.display()))?;
            let options = KubeConfigOptions::default();
            Config::from_custom_kubeconfig(file, &options)
                .await
                .with_context(|| format!("using {}", path.display()))?
        }
        None => Config::infer()
            .await
            .context("finding out how to reach the API server")?,
    };
    Client::try_from(kube_config).context("making a client for the API server")
}
