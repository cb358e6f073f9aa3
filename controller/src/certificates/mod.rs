//! Certificates of nodes: who gets one, who signs it, and who signs in the future.
//!
//! Nodes talk to each other over TLS with a certificate on each side. A node plugin asks for its own through a
//! CertificateSigningRequest, as kubelets do; the leader looks at who asks ([`judge`]) and signs with the cluster's
//! authority ([`Authority`], [`Generations`]), whose key no other program can read.

mod authority;
mod generations;
mod issue;
mod judge;
#[cfg(test)]
mod tests;

pub use authority::{Authority, AuthorityError, validity};
pub use generations::{Generations, Times};
pub use judge::{Approved, Known, Request, judge};

pub(crate) use issue::Issuer;
