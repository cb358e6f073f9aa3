//! What the controller does for a request or a change: look, plan, perform.
//!
//! Every function here may be stopped at any await and called again by anybody, also in another process at the same
//! time. What it has done by then stands in the objects, and the next call goes on from there.

pub mod attach;
pub mod create;
pub mod delete;
pub mod describe;
pub mod expand;
pub mod members;
pub mod repair;
pub mod reserve;
pub mod settle;
pub mod upkeep;

use std::time::Duration;

use crate::cluster::Cluster;

/// What every operation works with.
#[derive(Debug)]
pub struct World {
    pub cluster: Cluster,
    /// Placement in this process takes turns. Correctness does not hang on it (that is what the compare-and-swap on the
    /// pool is for), it only keeps one process from losing races against itself.
    placing: tokio::sync::Mutex<()>,
    /// How long a replica may stay away before it is replaced.
    replacement_delay: Duration,
    unchanged: repair::Unchanged,
}

impl World {
    pub fn new(cluster: Cluster, replacement_delay: Duration) -> Self {
        Self {
            cluster,
            placing: tokio::sync::Mutex::new(()),
            replacement_delay,
            unchanged: repair::Unchanged::default(),
        }
    }

    /// For whoever must not see the promises of pools while a placement is between two of its writes.
    pub async fn placing(&self) -> tokio::sync::MutexGuard<'_, ()> {
        self.placing.lock().await
    }
}

/// How often a lost race is tried again before the caller is asked to.
const TRIES_MAX: usize = 20;

fn contended(object: &str) -> crate::error::Error {
    crate::error::Error::new(
        crate::error::Kind::Busy,
        format!("{object} changes faster than it can be written; try again"),
    )
}
