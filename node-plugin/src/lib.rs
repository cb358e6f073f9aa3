//! The node process of GalleonFS: it carries out what the engine thinks, and serves volumes to the pods of one node.
//!
//! ```text
//! kubelet ── csi ──► staging ──► mount            API server ── registry ──► pool, disk
//!                       │                                          │
//!                       └────────────► served ◄────────────────────┘
//!                                        │
//!                             engine ── frontend ──► block devices
//! ```
//!
//! Orders come from two sides, the kubelet's calls and the API server's objects, and meet in one table ([`served`]). What
//! must survive this process is in the objects, in the replicas and in one small record per mounted volume ([`state`]).

pub mod csi;
pub mod disk;
pub mod engine;
pub mod frontend;
pub mod identity;
pub mod mount;
mod node;
pub mod peers;
pub mod pool;
pub mod registry;
pub mod served;
pub mod server;
pub mod staging;
pub mod state;
#[cfg(test)]
mod testing;
pub mod transport;

pub use node::{NodeConfig, run};
