//! Volumes of three replicas on three nodes: what a user is promised when one of them, or the network, or the API server
//! is not there.
//!
//! `volume` is what all of these tests begin with, `load` is a guest that notices each error and each pause, `copies`
//! compares what the replicas hold in the end.

pub mod api;
pub mod concerns;

mod copies;
pub mod failover;
mod load;
pub mod moves;
pub mod network;
pub mod replicas;
mod volume;

use std::time::Duration;

/// The chart's class with three replicas.
const CLASS: &str = "distributed";

/// The longest that any request may take because a replica is lost: it is left behind after two seconds.
const STALL_MAX: Duration = Duration::from_secs(3);

/// A replica that was away is back in sync; what it lacks is a few MiB.
const MENDED: Duration = Duration::from_secs(90);
