//! What this process listens on: the CSI socket, the registration socket, and the health and metrics pages.

mod authority;
mod health;
mod metrics;
mod registration;
mod socket;

#[cfg(test)]
mod tests;

pub use health::{Page, serve_pages};
pub use metrics::render;
pub use registration::{Registration, register};
pub use socket::{bind, serve_csi};
