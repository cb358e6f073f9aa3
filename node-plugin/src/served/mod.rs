//! The volumes that this node serves, and how the rooms learn of them.
//!
//! The registry room brings volumes up and down by its objects; the CSI room waits for a device and says what it has
//! mounted. They meet in [`Served`], a table with one row per volume, and nowhere else. The engine behind it is reached
//! through the small trait [`NodeEngine`], so that everything above it runs in tests without the real one.

mod engine;
mod fake;
mod guard;
mod real;
mod rest;
mod table;

pub use engine::{NodeEngine, ReplicaDisks, Trouble, VolumeMetrics, salt};
pub use fake::{FakeDisks, FakeEngine};
pub use guard::{Guard, Guards, Unguarded};
pub use real::{RealDisks, RealEngine};
pub use rest::give_memory_back;
pub use table::{Presence, Served, Waited};

pub use crate::disk::FormatSpec;
pub use crate::engine::{AttachSpec, Device};
