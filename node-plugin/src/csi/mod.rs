//! The CSI services of a node: identity and node.
//!
//! A handler checks what it was given, takes the volume's guard, calls one thing and maps the error. What that thing
//! does is in the staging room; when a volume has its device is the registry room's business.

mod check;
mod identity;
mod node;
mod status;
#[cfg(test)]
mod tests;

pub use identity::{Health, Identity};
pub use node::{Directory, Found, Node};
