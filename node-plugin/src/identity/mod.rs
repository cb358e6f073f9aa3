//! Who this node is, and who the others are: keys, certificates and what is trusted.
//!
//! ```text
//! enrol: key pair ─► CertificateSigningRequest ─► the controller signs ─► certificate ─┐
//!        ConfigMap of the authority ────────────────────────────────────► trusted ─────┴─► Wallet ─► new connections
//! ```
//!
//! Nodes talk to each other over TLS 1.3 with certificates on both sides, and in no other way: there is no setting that
//! turns it off, and nothing that falls back. A certificate lives for days and is renewed long before its end. The new one
//! is put in the [`Wallet`], from which every new connection takes what is there then; nobody restarts.

mod certificate;
mod enrol;
mod tls;

use std::sync::{Arc, PoisonError, RwLock};

pub use certificate::{Certified, certified};
pub use enrol::{EnrolError, Enrolment, Progress, node_uid};
pub use tls::{Credentials, CredentialsError};

/// The credentials in use now, if there are any yet. Cheap to clone; all clones are one.
#[derive(Clone, Debug, Default)]
pub struct Wallet(Arc<RwLock<Option<Arc<Credentials>>>>);

impl Wallet {
    pub fn current(&self) -> Option<Arc<Credentials>> {
        self.0.read().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// From now on new connections take these.
    pub fn put(&self, credentials: Credentials) {
        *self.0.write().unwrap_or_else(PoisonError::into_inner) = Some(Arc::new(credentials));
    }
}
