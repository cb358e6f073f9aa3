//! The node process of GalleonFS.
pub mod csi;
pub mod disk;
pub mod engine;
pub mod frontend;
pub mod mount;
pub mod pool;
pub mod registry;
pub mod served;
pub mod staging;
pub mod state;
#[cfg(test)]
mod testing;
