//! The API server, as far as a volume's configuration is concerned: one object with compare-and-swap.

use galleonfs_storage_engine::replication::{Config, Stamp};

/// See the module.
#[derive(Debug)]
pub struct Api {
    /// The object.
    pub config: Config,
    /// Its state.
    pub stamp: Stamp,
}

impl Api {
    /// Of a new volume.
    pub fn new(config: Config) -> Api {
        Api {
            config,
            stamp: Stamp(1),
        }
    }

    /// Writes the object if it is still as it was; its new stamp. A change that breaks a rule is a bug of whoever asked.
    pub fn put(&mut self, expected: Stamp, config: Config) -> Result<Option<Stamp>, String> {
        if expected != self.stamp {
            return Ok(None);
        }
        config
            .follows(&self.config)
            .map_err(|broken| format!("{broken}: {config:?} after {:?}", self.config))?;
        self.config = config;
        self.stamp = Stamp(self.stamp.0 + 1);
        Ok(Some(self.stamp))
    }

    /// Somebody writes something else of the object.
    pub fn touch(&mut self) {
        self.stamp = Stamp(self.stamp.0 + 1);
    }
}
