//! A real Kubernetes of several nodes on one machine, for the tests and for a person who wants to try GalleonFS.
//!
//! Everything is real: etcd, API server, scheduler, controller manager, and for each node a kubelet, containerd and
//! the CSI sidecars, all built from their modules' source. Only the machines are missing: a node is a set of
//! namespaces. Nothing is fetched while a cluster starts, and nothing is left when it ends.
//!
//! [`Lab`] is the door. `layout` says where things are, `binaries` and `images` make what a cluster is made from,
//! `network`, `control_plane` and `node` run it, `install` puts GalleonFS into it, `partition` takes the network between
//! nodes away, `outage` the API server, `volatile` is a disk whose power can be cut, `sweep` removes it all.

pub mod archive;
pub mod binaries;
pub mod certificates;
pub mod cgroups;
pub mod cluster;
pub mod control_plane;
pub mod demo;
pub mod images;
pub mod install;
pub mod kubectl;
pub mod layout;
pub mod network;
pub mod node;
pub mod outage;
pub mod partition;
pub mod prerequisites;
pub mod processes;
pub mod run;
pub mod seed;
pub mod sweep;
pub mod volatile;

pub use cluster::{Lab, Options};
pub use kubectl::Kubectl;
pub use node::{Frozen, Node};
pub use outage::Outage;
pub use partition::Partition;
