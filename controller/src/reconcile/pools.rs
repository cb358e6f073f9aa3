//! Pools: every node that runs the driver gets the default ones, so that a first install works with no disk to prepare;
//! and reservations that serve nobody any more are dropped.
//!
//! A node is known to run the driver when its CSINode lists it. Pools are made and never unmade here: a node that is away
//! may come back with its data.

use std::sync::Arc;

use galleonfs_api::{DRIVER_NAME, LABEL_MANAGED_BY, MANAGED_BY, StoragePool, StoragePoolSpec};
use k8s_openapi::api::storage::v1::CSINode;
use kube::{
    ResourceExt,
    api::{ListParams, PostParams},
    runtime::{
        controller::{Action, Controller},
        reflector::ObjectRef,
        watcher,
    },
};

use super::Context;
use crate::{
    DefaultPool, cluster,
    error::{Error, Result, is_already_exists},
    operate::{World, reserve},
    plan::placement,
};

pub async fn run(context: Arc<Context>) {
    let cluster = &context.world.cluster;
    let node_of = |pool: StoragePool| Some(ObjectRef::<CSINode>::new(&pool.spec.node_name));
    let results = Controller::new(cluster.csi_nodes.clone(), watcher::Config::default())
        .watches(cluster.pools.clone(), watcher::Config::default(), node_of)
        .run(reconcile, failed, context.clone());
    super::drain(results).await;
}

async fn reconcile(node: Arc<CSINode>, context: Arc<Context>) -> Result<Action> {
    let name = node.name_any();
    let world = &context.world;
    let selector = ListParams::default().fields(&format!("spec.nodeName={name}"));
    let pools = cluster::list(&world.cluster.pools, selector).await?;
    if runs_driver(&node) {
        for default_pool in &context.default_pools {
            let object_name = StoragePool::object_name(&default_pool.name, &name);
            if !pools.iter().any(|pool| pool.name_any() == object_name) {
                make(world, &name, default_pool).await?;
            }
        }
    }
    for pool in &pools {
        drop_stale(world, pool).await?;
    }
    context.succeeded("pool", &name);
    Ok(Action::await_change())
}

fn failed(node: Arc<CSINode>, error: &Error, context: Arc<Context>) -> Action {
    context.failed("pool", &node.name_any(), error)
}

fn runs_driver(node: &CSINode) -> bool {
    node.spec.drivers.iter().any(|driver| driver.name == DRIVER_NAME)
}

async fn make(world: &World, node: &str, wanted: &DefaultPool) -> Result<()> {
    let spec = StoragePoolSpec {
        pool: wanted.name.clone(),
        node_name: node.to_string(),
        path: wanted.path.clone(),
        media: wanted.media,
        reserve_bytes: None,
    };
    let name = StoragePool::object_name(&wanted.name, node);
    let mut pool = StoragePool::new(&name, spec);
    pool.labels_mut()
        .insert(LABEL_MANAGED_BY.to_string(), MANAGED_BY.to_string());
    match world.cluster.pools.create(&PostParams::default(), &pool).await {
        Ok(_) => {
            tracing::info!(pool = name, path = wanted.path, "made the default pool");
            Ok(())
        }
        Err(error) if is_already_exists(&error) => Ok(()),
        Err(error) => Err(Error::api(format!("creating StoragePool {name}"), error)),
    }
}

async fn drop_stale(world: &World, pool: &StoragePool) -> Result<()> {
    let mut stale = vec![];
    // What is reserved for a replica that replaces another serves nobody until that one is made.
    let _turn = world.placing().await;
    for (uid, reservation) in pool.status.iter().flat_map(|status| &status.reservations) {
        // A reservation is made after its volume, so a volume that is not there now has been deleted.
        let volume = world.cluster.volume(&reservation.volume_name).await?;
        let replicas = match &volume {
            Some(volume) => world.cluster.replicas_of(volume).await?,
            None => vec![],
        };
        if placement::is_stale(pool, uid, volume.as_ref(), &replicas) {
            stale.push(uid.clone());
        }
    }
    if !stale.is_empty() {
        tracing::info!(
            pool = pool.name_any(),
            ?stale,
            "dropping reservations of volumes that are not here"
        );
        reserve::release(world, &pool.name_any(), |uid| stale.iter().any(|stale| stale == uid)).await?;
    }
    Ok(())
}
