//! A volume of several replicas, led from this node: its engine, and what its shard needs for it besides a disk.

use std::sync::Arc;
use std::sync::mpsc::Sender;

use galleonfs_storage_engine::replication::mutant::Mutants;
use galleonfs_storage_engine::replication::primary::{Decision, PrimaryOptions};
use galleonfs_storage_engine::replication::{Config, Incarnation, ReplicaId, Stamp};
use galleonfs_storage_engine::store::ScrubOrder;
use galleonfs_storage_engine::volume::{Led, LedOptions, Volume};
use uuid::Uuid;

use super::scrub::{Schedule, Scrubbed};
use super::spec::{Configs, LeadSpec};
use super::{Finding, StoreReport, VolumeEngine, clock};

/// What a shard keeps of a volume that is led.
pub(super) struct Leading {
    pub volume: Uuid,
    pub configs: Arc<dyn Configs>,
    /// Waits until requests are served, or it is clear that they never will be.
    pub ready: Option<Sender<Result<(), String>>>,
    /// When to look again what it waits for.
    pub look_ms: u64,
    /// When the copies are compared with each other.
    pub compares: Schedule,
}

impl Scrubbed for Led {
    /// The pace is that of a resync: behind the guest.
    fn scrub(&mut self, _order: ScrubOrder) {
        self.compare();
    }

    fn is_running(&self) -> bool {
        self.primary().is_comparing()
    }
}

/// How often it is looked what a volume waits for.
pub(super) const LOOK_EVERY_MS: u64 = 500;

/// News of a configuration, for the volume that asked.
#[derive(Debug)]
pub(super) enum ConfigNews {
    Decided(Decision),
    Read(Option<(Stamp, Config)>),
    /// Somebody else may have changed it.
    Look,
    /// This replica is to leave when there is another one in its place; or all may stay.
    Leave(Option<ReplicaId>),
}

/// Begins to lead, in the epoch that `config` grants.
pub(super) fn led_volume(spec: &LeadSpec, stamp: Stamp, config: Config) -> Volume<Led> {
    let volume = spec.volume_uid.into_bytes();
    let options = LedOptions {
        cluster: spec.cluster_id.into_bytes(),
        volume,
        block_size: spec.block_size,
        size_blocks: spec.size_bytes / spec.block_size.bytes(),
    };
    let primary = PrimaryOptions {
        volume,
        incarnation: Incarnation(spec.incarnation.into_bytes()),
        replicas: spec.replicas,
        concern: spec.concern,
        prefer: spec.prefer.map(|replica| ReplicaId(replica.into_bytes())),
        row: None,
        mutants: Mutants::default(),
    };
    let mut led = Led::new(options, primary, stamp, config, clock::now_ms());
    led.stand(spec.configs.zones());
    Volume::new(led)
        .compression(spec.settings.compression)
        .writes_through(spec.settings.writes_through)
}

impl VolumeEngine for Volume<Led> {
    fn size_bytes(&self) -> u64 {
        Volume::size_bytes(self)
    }

    fn stopped(&self) -> Option<String> {
        Volume::stopped(self).map(str::to_owned)
    }

    /// Its replicas wait for room, each by itself.
    fn waits_for_space(&self) -> bool {
        false
    }

    fn store(&self) -> StoreReport {
        StoreReport::default()
    }

    fn finding(&mut self) -> Option<Finding> {
        let (replica, version) = self.backing().take_given_up()?;
        Some(Finding::Damaged(format!(
            "{replica:?} alone had write {version}, and cannot read it: this write and later ones, which no flush had \
             covered, were given up when the epoch began"
        )))
    }

    fn led(&mut self) -> Option<&mut Led> {
        Some(self.backing())
    }
}
