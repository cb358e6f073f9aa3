//! Replication without luck: everything that can be shown of it in one thread and from one seed.
//!
//! - [`atlas`]: which copies may be damaged so that nothing is lost.
//! - [`history`]: whether a disk could have answered its guests as a run says.
//! - [`model`]: the protocol as a few bytes of state, every order of events tried within bounds.
//! - [`world`]: the real primary and replicas on a network, disks, clocks and an API server that misbehave.

pub mod atlas;
pub mod history;
pub mod model;
pub mod world;
