//! Volumes: settle what was created, grow what has grown, take apart what was deleted, and say how each fares.

use std::sync::Arc;

use galleonfs_api::{GalleonReplica, GalleonVolume};
use kube::{
    ResourceExt,
    runtime::{
        controller::{Action, Config, Controller},
        reflector::ObjectRef,
        watcher,
    },
};

use super::Context;
use crate::{
    error::Error,
    operate::upkeep::{self, Progress},
};

/// Volumes looked at at once.
const CONCURRENCY: u16 = 8;

pub async fn run(context: Arc<Context>) {
    let cluster = &context.world.cluster;
    let namespace = cluster.namespace.clone();
    let volume_of = move |replica: GalleonReplica| {
        Some(ObjectRef::<GalleonVolume>::new(&replica.spec.volume_name).within(&namespace))
    };
    let results = Controller::new(cluster.volumes.clone(), watcher::Config::default())
        .watches(cluster.replicas.clone(), watcher::Config::default(), volume_of)
        .with_config(Config::default().concurrency(CONCURRENCY))
        .run(reconcile, failed, context.clone());
    super::drain(results).await;
}

async fn reconcile(volume: Arc<GalleonVolume>, context: Arc<Context>) -> Result<Action, Error> {
    let name = volume.name_any();
    loop {
        match upkeep::step(&context.world, &name).await? {
            Progress::Acted => {}
            Progress::Idle => {
                upkeep::report(&context.world, &name).await?;
                break;
            }
            Progress::Gone => break,
        }
    }
    context.succeeded("volume", &name);
    Ok(Action::await_change())
}

fn failed(volume: Arc<GalleonVolume>, error: &Error, context: Arc<Context>) -> Action {
    context.failed("volume", &volume.name_any(), error)
}
