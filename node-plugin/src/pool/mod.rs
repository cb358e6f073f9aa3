//! The pools of this node: directories that hold replicas, and what we must know before we touch one.
//!
//! A pool directory carries a label file that says which cluster and which pool it belongs to. Replicas are made and opened
//! only below a label that is ours: a disk that was not mounted, or that came from another cluster, is noticed by its label
//! and not by the data we would have written onto the wrong disk.

mod directory;
mod judge;
pub mod wear;

use std::collections::HashMap;
use std::path::PathBuf;
use std::sync::{Arc, Mutex, PoisonError};

pub use directory::{Label, LabelFound, Look, Space, look, make_directory, parse_label, write_label};
pub use judge::{Found, Verdict, judge, reserve_bytes_default, worth_writing};

/// Where replicas live below a pool's path.
pub const REPLICAS: &str = "replicas";

/// What the rest of the node knows of one pool.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Pool {
    /// Its label is ours: replicas below it can be opened.
    Ours { path: PathBuf },
    /// It must not be touched; the reason word and a sentence.
    Refused { reason: String, message: String },
}

/// All pools of this node by object name. Cheap to clone.
#[derive(Debug, Clone, Default)]
pub struct Pools(Arc<Mutex<HashMap<String, Pool>>>);

impl Pools {
    pub fn get(&self, name: &str) -> Option<Pool> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).get(name).cloned()
    }

    /// Returns whether this is news.
    pub fn set(&self, name: &str, pool: Option<Pool>) -> bool {
        let mut pools = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let before = match pool.clone() {
            Some(pool) => pools.insert(name.to_owned(), pool),
            None => pools.remove(name),
        };
        before != pool
    }
}
