//! Replication without luck: everything that can be shown of it in one thread and from one seed.
//!
//! - [`model`]: the protocol as a few bytes of state, every order of events tried within bounds.
//! - [`world`]: the real primary and replicas on a network, disks, clocks and an API server that misbehave.

pub mod model;
pub mod world;
