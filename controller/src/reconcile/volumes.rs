//! Volumes: settle what was created, grow what has grown, take apart what was deleted, and say how each fares.

use std::{collections::BTreeSet, sync::Arc};

use galleonfs_api::{GalleonReplica, GalleonVolume, StoragePool};
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
    plan::redundancy,
};

/// Volumes looked at at once.
const CONCURRENCY: u16 = 8;

pub async fn run(context: Arc<Context>) {
    let cluster = &context.world.cluster;
    let namespace = cluster.namespace.clone();
    let volume_of = move |replica: GalleonReplica| {
        Some(ObjectRef::<GalleonVolume>::new(&replica.spec.volume_name).within(&namespace))
    };
    let seen = cluster.seen.clone();
    // Room may be what a volume waits for that lacks a replica.
    let stuck = move |pool: StoragePool| {
        let here = match pool.failing() {
            Some(_) => seen.volumes_in(&pool.name_any()),
            None => BTreeSet::new(),
        };
        seen.volumes_where(|volume| {
            let waits = redundancy::is_stuck(volume) || redundancy::is_on_failing(volume);
            waits || here.contains(&volume.name_any())
        })
    };
    let results = Controller::new(cluster.volumes.clone(), watcher::Config::default())
        .watches(cluster.replicas.clone(), watcher::Config::default(), volume_of)
        .watches(cluster.pools.clone(), watcher::Config::default(), stuck)
        .with_config(Config::default().concurrency(CONCURRENCY))
        .run(reconcile, failed, context.clone());
    super::drain(results).await;
}

async fn reconcile(volume: Arc<GalleonVolume>, context: Arc<Context>) -> Result<Action, Error> {
    let name = volume.name_any();
    let again = loop {
        match upkeep::step(&context.world, &name).await? {
            Progress::Acted => {}
            Progress::Idle(outlook) => {
                upkeep::report(&context.world, &name, &outlook, &context.metrics).await?;
                break outlook.again;
            }
            Progress::Gone => {
                context.metrics.volume_gone(&name);
                break None;
            }
        }
    };
    context.succeeded("volume", &name);
    Ok(again.map_or_else(Action::await_change, Action::requeue))
}

fn failed(volume: Arc<GalleonVolume>, error: &Error, context: Arc<Context>) -> Action {
    context.failed("volume", &volume.name_any(), error)
}
