//! Certificates of nodes: who gets one, and who signs it.
mod authority;
mod judge;

pub use authority::{Authority, AuthorityError, validity};
pub use judge::{Approved, Known, Request, USAGES, judge};
