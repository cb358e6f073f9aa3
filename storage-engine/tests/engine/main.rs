//! The engine against a disk that misbehaves on purpose.

mod bits;
mod clones;
mod compressed;
mod crash;
#[path = "../../benches/driven.rs"]
mod driven;
mod format_doc;
mod golden;
mod harness;
mod landing;
mod latency;
mod lean_disk;
mod model;
mod purity;
mod replica_copies;
mod replica_model;
mod replica_repair;
mod replica_rig;
mod scale;
mod scrub;
mod sealed;
mod sectors;
mod sim_disk;
mod snapshot_model;
mod snapshots;
mod space;
mod spares;
mod steady;
#[path = "../../benches/synthetic.rs"]
mod synthetic;
mod torn;
mod turns;
