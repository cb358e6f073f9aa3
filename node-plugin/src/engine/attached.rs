//! A volume that a shard serves, and by what right.

use std::path::PathBuf;
use std::sync::Arc;

use uuid::Uuid;

use super::claims::Claim;
use super::stats::Counters;
use super::{EngineError, ErrorKind, limits};
use crate::frontend::{Device, Export};

/// The name of a volume, claimed for one operation.
pub(super) type Reservation<'a> = Claim<'a, String, Attached>;

/// By what right a volume is served here.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Grant {
    pub epoch: u64,
    /// The only replica, or the start that leads several.
    pub holder: Uuid,
    pub read_only: bool,
}

/// A volume that a shard serves.
#[derive(Clone)]
pub(super) struct Attached {
    pub key: u32,
    pub shard: usize,
    pub grant: Grant,
    /// None of a volume that is led.
    pub replica_dir: Option<PathBuf>,
    pub export: Export,
    pub counters: Arc<Counters>,
    /// `None` once it was taken down, while the engine is still ending.
    pub device: Option<Device>,
}

impl Attached {
    /// The device, if it is the same that is asked for once more.
    pub fn again(self, grant: &Grant) -> Result<Device, EngineError> {
        match self.device {
            Some(device) if self.grant == *grant => Ok(device),
            _ => {
                let text = format!(
                    "volume {} is attached in epoch {}; detach it before it is attached in epoch {}",
                    self.export.volume, self.grant.epoch, grant.epoch
                );
                Err(EngineError::new(ErrorKind::Retry, text))
            }
        }
    }

    /// Why it is not closed yet.
    pub fn hangs(&self) -> String {
        let (volume, seconds) = (&self.export.volume, limits::CLOSE_WAIT_MAX.as_secs());
        match &self.replica_dir {
            Some(dir) => format!(
                "close volume {volume}: its disk has not answered for {seconds} s; the replica in {} stays locked until \
                 it does",
                dir.display()
            ),
            None => format!(
                "close volume {volume}: its replicas, or the API server, have not answered for {seconds} s; it goes on \
                 ending until they do"
            ),
        }
    }
}
