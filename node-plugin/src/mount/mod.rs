//! File systems and mounts of volumes: prepare a device, mount it, bind it for pods, take it all down again.
//!
//! What always holds:
//!
//! - Whatever touches a volume's device or file system runs in a program of its own ([`child`]), so a volume that hangs
//!   holds neither our threads nor another volume.
//! - A device is formatted only when it is proven blank ([`probe`]); everything else on it is somebody's data.
//! - What is mounted is read from the mount table ([`table`]), never found out by touching a path that may be dead.
//! - A path comes from outside, so it is checked once and carried as a [`paths::KubeletPath`].

pub mod child;
pub mod error;
pub mod filesystem;
pub mod flags;
pub mod grow;
pub mod mounts;
pub mod paths;
pub mod probe;
pub mod table;

pub use child::{HungChildren, Tools};
pub use error::MountError;
pub use filesystem::FsType;
pub use paths::{Kubelet, KubeletPath};
