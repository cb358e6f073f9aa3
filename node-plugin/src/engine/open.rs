//! Opens the engine of a replica: the store's recovery, and its share of the node's memory.

use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use galleonfs_storage_engine::BlockEngine;
use galleonfs_storage_engine::buffer::{BufMut, PAGE_BYTES};
use galleonfs_storage_engine::io::{IoFailure, IoId, IoResult, Output};
use galleonfs_storage_engine::request::{Request, RequestId};
use galleonfs_storage_engine::store::{OpenError, OpenOptions, open_replica};
use galleonfs_storage_engine::types::{Epoch, Identity};
use galleonfs_storage_engine::volume::Volume;

use super::scrub::{self, Finding, Schedule, ScrubPlan};
use super::{AttachSpec, EngineError, ErrorKind, StoreReport, VolumeEngine};
use crate::disk::FileDisk;

/// Map memory of one volume at most: what the map of half a terabyte of busy data takes.
const SHARE_BYTES_MAX: usize = 16 << 20;

/// Map memory that every volume gets, whatever is left of the budget: less would make each request read the map from
/// the disk.
const SHARE_BYTES_MIN: usize = 512 << 10;

/// While something is damaged it is looked so often whether it still is.
const LOOK_EVERY_MS: u64 = 1000;

/// The memory that the maps of all volumes together may occupy.
///
/// A volume takes a quarter of what is left when it is opened, so the first ones get much and the last ones still get
/// something, and gives it back in the end.
#[derive(Clone, Debug)]
pub(super) struct MapBudget {
    left_bytes: Arc<AtomicUsize>,
}

/// One volume's part of the budget; given back when the last clone is dropped.
#[derive(Clone, Debug)]
pub(super) struct Share(Arc<Taken>);

#[derive(Debug)]
struct Taken {
    budget: MapBudget,
    bytes: usize,
    /// What was really taken from the budget: less than `bytes` when it was used up.
    taken_bytes: usize,
}

impl MapBudget {
    pub fn new(bytes: usize) -> MapBudget {
        MapBudget {
            left_bytes: Arc::new(AtomicUsize::new(bytes)),
        }
    }

    pub fn share(&self) -> Share {
        let bytes_of = |left: usize| (left / 4).clamp(SHARE_BYTES_MIN, SHARE_BYTES_MAX);
        let take = |left: usize| Some(left.saturating_sub(bytes_of(left)));
        let left = match self.left_bytes.fetch_update(Ordering::Relaxed, Ordering::Relaxed, take) {
            Ok(left) | Err(left) => left,
        };
        let bytes = bytes_of(left);
        Share(Arc::new(Taken {
            budget: self.clone(),
            bytes,
            taken_bytes: bytes.min(left),
        }))
    }
}

impl Share {
    /// How much map may be in memory.
    pub fn bytes(&self) -> usize {
        self.0.bytes
    }
}

impl Drop for Taken {
    fn drop(&mut self) {
        self.budget.left_bytes.fetch_add(self.taken_bytes, Ordering::Relaxed);
    }
}

/// A volume, and the memory it was promised.
struct OpenVolume {
    volume: Volume,
    scrub: Schedule,
    /// Somebody was told of damage: when to look whether it is still there.
    look_ms: Option<u64>,
    mended: bool,
    _share: Share,
}

/// Recovers the replica on `disk` and makes it serve in the epoch of `spec`.
pub(super) fn open_volume(
    spec: &AttachSpec,
    mut disk: FileDisk,
    budget: &MapBudget,
    scrub: Option<ScrubPlan>,
) -> Result<Box<dyn VolumeEngine>, EngineError> {
    let identity = Identity {
        cluster: spec.cluster_id.into_bytes(),
        volume: spec.volume_uid.into_bytes(),
        replica: spec.replica_uid.into_bytes(),
    };
    let epoch = u32::try_from(spec.epoch).map_err(|_| {
        let text = format!("open volume {}: epoch {} is out of range", spec.volume, spec.epoch);
        EngineError::new(ErrorKind::Failed, text)
    })?;
    let share = budget.share();
    let options = OpenOptions {
        cache_pages_max: share.bytes() / PAGE_BYTES,
        keys: spec.key.as_ref().map(|key| key.prove(spec.volume_uid, Epoch(epoch))),
        ..OpenOptions::new(identity, Epoch(epoch))
    };
    let (store, report) =
        open_replica(&mut disk, options).map_err(|error| explain("open", &spec.replica_dir, error))?;
    tracing::info!(volume = spec.volume, epoch, ?report, "opened a replica");
    if !report.damaged_blocks.is_empty() {
        tracing::error!(
            volume = spec.volume,
            blocks = report.damaged_blocks.len(),
            "flushed blocks are damaged; reading them fails"
        );
    }
    let volume = match &spec.key {
        None => Volume::new(store),
        Some(key) => Volume::sealed(store, key.ring(spec.volume_uid))
            .map_err(|error| explain("open", &spec.replica_dir, error.into()))?,
    };
    Ok(Box::new(OpenVolume {
        volume: volume
            .when_full(spec.settings.when_full)
            .compression(spec.settings.compression)
            .writes_through(spec.settings.writes_through),
        scrub: Schedule::new(scrub, spec.volume_uid),
        look_ms: None,
        mended: false,
        _share: share,
    }))
}

/// Tells a store's refusal in terms of what to do next.
pub(crate) fn explain(doing: &str, dir: &Path, error: OpenError) -> EngineError {
    let kind = match &error {
        OpenError::NotFormatted => ErrorKind::NotFound,
        OpenError::NewerFormat(_) => ErrorKind::Unsupported,
        OpenError::WrongIdentity { .. } => ErrorKind::WrongIdentity,
        OpenError::Damaged(_) | OpenError::Diverged(_) => ErrorKind::Corrupt,
        // Somebody was made primary after us: what we were told is old, and the next look tells more.
        OpenError::Fenced { .. } => ErrorKind::Retry,
        OpenError::NoSpace => ErrorKind::NoSpace,
        OpenError::Disk {
            cause: IoFailure::NotFound,
            ..
        } => ErrorKind::NotFound,
        OpenError::AlreadyFormatted | OpenError::Invalid(_) | OpenError::Key(_) | OpenError::Disk { .. } => {
            ErrorKind::Failed
        }
    };
    EngineError::new(kind, format!("{doing} the replica in {}", dir.display())).because(error)
}

impl BlockEngine for OpenVolume {
    fn submit(&mut self, id: RequestId, request: Request) {
        self.volume.submit(id, request);
    }

    fn read_into(&mut self, id: RequestId, offset: u64, into: BufMut) {
        self.volume.read_into(id, offset, into);
    }

    fn completed(&mut self, id: IoId, result: IoResult) {
        self.volume.completed(id, result);
    }

    fn tick(&mut self, now_ms: u64) {
        self.volume.tick(now_ms);
        self.scrub.tick(now_ms, &mut self.volume);
        if self.look_ms.is_some_and(|due| due <= now_ms) {
            self.mended = self.volume.scrub_progress().damaged_count == 0;
            self.look_ms = (!self.mended).then_some(now_ms + LOOK_EVERY_MS);
        }
    }

    fn next_tick_ms(&self) -> Option<u64> {
        [self.volume.next_tick_ms(), self.scrub.next_tick_ms(), self.look_ms]
            .into_iter()
            .flatten()
            .min()
    }

    fn poll(&mut self) -> Option<Output> {
        self.volume.poll()
    }

    fn close(&mut self) {
        self.volume.close();
    }

    fn is_closed(&self) -> bool {
        self.volume.is_closed()
    }
}

impl VolumeEngine for OpenVolume {
    fn size_bytes(&self) -> u64 {
        self.volume.size_bytes()
    }

    fn stopped(&self) -> Option<String> {
        self.volume.stopped().map(str::to_owned)
    }

    fn waits_for_space(&self) -> bool {
        self.volume.waits_for_space()
    }

    fn store(&self) -> StoreReport {
        StoreReport {
            stats: self.volume.store_stats(),
            scrub: self.volume.scrub_progress(),
        }
    }

    fn finding(&mut self) -> Option<Finding> {
        let found = self.volume.take_new_damage();
        // Nothing in nearly every round, and then nothing more is asked.
        if !found.is_empty() {
            self.look_ms = Some(0);
            return scrub::told(&found, &self.volume.scrub_progress()).map(Finding::Damaged);
        }
        std::mem::take(&mut self.mended).then_some(Finding::Mended)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_volume_gets_some_of_the_budget_and_gives_it_back() {
        let budget = MapBudget::new(32 << 20);
        let shares: Vec<Share> = (0..100).map(|_| budget.share()).collect();
        assert_eq!(shares[0].bytes(), 8 << 20);
        assert!(shares.iter().all(|share| share.bytes() >= SHARE_BYTES_MIN));
        assert_eq!(budget.left_bytes.load(Ordering::Relaxed), 0);
        drop(shares);
        assert_eq!(budget.left_bytes.load(Ordering::Relaxed), 32 << 20);
    }
}
