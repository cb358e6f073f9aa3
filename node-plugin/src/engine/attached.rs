//! What is known of volumes by name: one operation at a time on each, and what became of it.

use std::path::PathBuf;
use std::sync::Arc;

use uuid::Uuid;

use super::stats::Counters;
use super::{EngineError, ErrorKind, Inner, limits};
use crate::frontend::{Device, Export};

/// What is known of a volume's name.
#[derive(Default)]
pub(super) struct Slot {
    /// An operation is under way.
    pub busy: bool,
    pub attached: Option<Attached>,
}

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

/// A volume's name, claimed for one operation; free again when this is dropped.
pub(super) struct Reservation<'a> {
    pub inner: &'a Inner,
    pub volume: String,
}

impl Reservation<'_> {
    pub fn attached(&self) -> Option<Attached> {
        self.inner
            .volumes()
            .get(&self.volume)
            .and_then(|slot| slot.attached.clone())
    }

    pub fn set(&self, attached: Option<Attached>) {
        if let Some(slot) = self.inner.volumes().get_mut(&self.volume) {
            slot.attached = attached;
        }
    }
}

impl Drop for Reservation<'_> {
    fn drop(&mut self) {
        let mut volumes = self.inner.volumes();
        if let Some(slot) = volumes.get_mut(&self.volume) {
            slot.busy = false;
            if slot.attached.is_none() {
                volumes.remove(&self.volume);
            }
        }
    }
}
