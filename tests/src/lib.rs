//! What more than one crate is needed for: the Kubernetes lab, and the tests that run in it.

#[cfg(feature = "bench")]
pub mod bench;
pub mod lab;
