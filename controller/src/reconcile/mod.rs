//! The loops that carry on what no request carries on: run by the leader, woken by changes, idle otherwise.

mod pools;
mod volumes;

use std::{
    collections::HashMap,
    fmt::Debug,
    sync::{Arc, Mutex, PoisonError},
    time::Duration,
};

use futures::{Stream, StreamExt};
use kube::runtime::controller::{self, Action};

use crate::{DefaultPool, error::Error, metrics::Metrics, operate::World};

/// How long an error that only a change can cure waits at most; a change wakes it up earlier.
const NO_HURRY: Duration = Duration::from_secs(3600);

/// What a loop works with.
#[derive(Debug)]
struct Context {
    world: Arc<World>,
    metrics: Metrics,
    default_pools: Vec<DefaultPool>,
    /// Failures in a row, by object.
    failures: Mutex<HashMap<String, u32>>,
}

impl Context {
    fn succeeded(&self, kind: &'static str, name: &str) {
        self.metrics.reconciled(kind, "ok");
        self.failures().remove(name);
    }

    /// When to try again after an error, which is logged here and nowhere else.
    fn failed(&self, kind: &'static str, name: &str, error: &Error) -> Action {
        self.metrics.reconciled(kind, "error");
        let failures = {
            let mut failures = self.failures();
            let count = failures.entry(name.to_string()).or_default();
            *count += 1;
            *count - 1
        };
        let wait = error.retry_after(failures).unwrap_or(NO_HURRY);
        tracing::warn!(kind, name, error = error.full_text(), again_in = ?wait, "reconciling failed");
        Action::requeue(wait)
    }

    fn failures(&self) -> std::sync::MutexGuard<'_, HashMap<String, u32>> {
        self.failures.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Runs all loops until dropped.
pub async fn run(world: Arc<World>, metrics: Metrics, default_pools: Vec<DefaultPool>) {
    let context = || {
        let (world, metrics, default_pools) = (world.clone(), metrics.clone(), default_pools.clone());
        Arc::new(Context {
            world,
            metrics,
            default_pools,
            failures: Mutex::default(),
        })
    };
    tokio::join!(volumes::run(context()), pools::run(context()));
}

/// Drains a loop's results; errors of reconciling have been dealt with, the rest is about watching.
async fn drain<K, S, E>(results: S)
where
    S: Stream<Item = Result<(kube::runtime::reflector::ObjectRef<K>, Action), controller::Error<Error, E>>>,
    K: kube::runtime::reflector::Lookup,
    K::DynamicType: Debug + Clone + std::hash::Hash + Eq,
    E: std::error::Error + 'static,
{
    results
        .for_each(|result| async {
            match result {
                // Gone between the event and the look: nothing left to do.
                Ok(_) | Err(controller::Error::ObjectNotFound(_) | controller::Error::ReconcilerFailed(..)) => {}
                Err(error) => tracing::warn!(%error, "a watch failed; trying again"),
            }
        })
        .await;
}
