//! The engine against a disk that misbehaves on purpose.

mod bits;
mod crash;
mod format_doc;
mod harness;
mod landing;
mod model;
mod purity;
mod sealed;
mod sim_disk;
mod snapshots;
mod space;
mod torn;
