//! Decisions from plain values: no clock, no network, no lock. What is decided here is performed in `operate` and
//! `reconcile`.

pub mod placement;
pub mod redundancy;
pub mod repair;
pub mod request;
pub mod same;
pub mod upkeep;
