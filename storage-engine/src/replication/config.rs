//! Who serves a volume and which replicas have all of it: the one thing that is decided by compare-and-swap.
//!
//! A [`Change`] says what is to become of a configuration. It can be applied again to a newer state of the object, and
//! whether it is in effect can be seen in any state; so an attempt with an unknown outcome is looked at and repeated, and
//! never taken for a success or a failure.

use std::collections::{BTreeMap, BTreeSet};

use super::{Incarnation, ReplicaId};
use crate::types::{Epoch, Version};

/// The linearized part of a volume's object.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Config {
    /// Raised each time a primary starts.
    pub epoch: Epoch,
    /// Who serves this epoch; nobody after an orderly end.
    pub incarnation: Option<Incarnation>,
    /// Have every completed write. Never empty.
    pub in_sync: BTreeSet<ReplicaId>,
    /// Get all new writes and are catching up on old ones.
    pub syncing: BTreeSet<ReplicaId>,
    /// Missed a write, or are new. Each surely has every write up to its version; 0.0: nothing is known.
    pub out: BTreeMap<ReplicaId, Version>,
}

/// What is to become of a configuration.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Change {
    /// A new epoch begins, and this one serves it.
    Claim(Incarnation),
    /// These members missed a write, or did not answer when the epoch began; all they surely have is up to the version.
    Drop(BTreeSet<ReplicaId>, Version),
    /// This replica gets all new writes from now on.
    Sync(ReplicaId),
    /// This replica has everything.
    Join(ReplicaId),
    /// The epoch ends in order.
    Release,
}

/// A rule that a change would break. Each is also a rule of the object itself.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ConfigError {
    #[error("I1: an epoch never goes back")]
    EpochFell,
    #[error("I3: an epoch has one incarnation")]
    OtherIncarnation,
    #[error("I8: a new epoch starts with replicas that were in sync")]
    PromotedByDecree,
    #[error("I8: at least one replica is in sync")]
    NobodyInSync,
    #[error("a replica is in sync, or out, not both")]
    InTwoPlaces,
}

impl Config {
    /// Of a new volume: all of its empty replicas are equal.
    pub fn new(in_sync: impl IntoIterator<Item = ReplicaId>) -> Config {
        Config {
            epoch: Epoch(0),
            incarnation: None,
            in_sync: in_sync.into_iter().collect(),
            syncing: BTreeSet::new(),
            out: BTreeMap::new(),
        }
    }

    /// What this change makes of it.
    pub fn with(&self, change: &Change) -> Config {
        let mut config = self.clone();
        match change {
            Change::Claim(incarnation) => {
                config.epoch = Epoch(self.epoch.0 + 1);
                config.incarnation = Some(*incarnation);
                // Whoever was catching up starts again, from where it was known to be.
                config.syncing.clear();
            }
            Change::Drop(gone, have) => {
                for id in gone {
                    if config.in_sync.remove(id) {
                        config.out.insert(*id, *have);
                    }
                    config.syncing.remove(id);
                }
            }
            Change::Sync(id) => {
                config.out.entry(*id).or_default();
                config.syncing.insert(*id);
            }
            Change::Join(id) => {
                config.syncing.remove(id);
                config.out.remove(id);
                config.in_sync.insert(*id);
            }
            Change::Release => config.incarnation = None,
        }
        config
    }

    /// True if nothing is left to do for this change.
    pub fn has(&self, change: &Change) -> bool {
        match change {
            Change::Claim(incarnation) => self.incarnation == Some(*incarnation),
            Change::Drop(gone, _) => gone.is_disjoint(&self.in_sync) && gone.is_disjoint(&self.syncing),
            Change::Sync(id) => self.syncing.contains(id),
            Change::Join(id) => self.in_sync.contains(id),
            Change::Release => self.incarnation.is_none(),
        }
    }

    /// Whether this may come after `old`; the rules that the API server enforces too.
    pub fn follows(&self, old: &Config) -> Result<(), ConfigError> {
        if self.epoch < old.epoch {
            return Err(ConfigError::EpochFell);
        }
        let both = self.incarnation.is_some() && old.incarnation.is_some();
        if self.epoch == old.epoch && both && self.incarnation != old.incarnation {
            return Err(ConfigError::OtherIncarnation);
        }
        if self.epoch > old.epoch && !self.in_sync.is_subset(&old.in_sync) {
            return Err(ConfigError::PromotedByDecree);
        }
        if self.in_sync.is_empty() {
            return Err(ConfigError::NobodyInSync);
        }
        let out = |id| self.out.contains_key(id);
        if self.in_sync.iter().any(|id| out(id) || self.syncing.contains(id)) {
            return Err(ConfigError::InTwoPlaces);
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::types::Seq;

    fn id(n: u8) -> ReplicaId {
        ReplicaId([n; 16])
    }

    const FIRST: Incarnation = Incarnation([1; 16]);
    const SECOND: Incarnation = Incarnation([2; 16]);

    #[test]
    fn every_change_is_in_effect_once_it_was_made_and_repeating_it_changes_nothing() {
        let have = Version {
            epoch: Epoch(1),
            seq: Seq(7),
        };
        let mut config = Config::new([id(1), id(2), id(3)]);
        let changes = [
            Change::Claim(FIRST),
            Change::Drop([id(2)].into(), have),
            Change::Sync(id(2)),
            Change::Join(id(2)),
            Change::Release,
        ];
        for change in changes {
            assert!(!config.has(&change), "{change:?}");
            let next = config.with(&change);
            assert_eq!(next.follows(&config), Ok(()), "{change:?}");
            assert!(next.has(&change), "{change:?}");
            if !matches!(change, Change::Claim(_)) {
                assert_eq!(next.with(&change), next, "{change:?}");
            }
            config = next;
        }
        assert_eq!(config.in_sync.len(), 3);
        assert!(config.out.is_empty() && config.syncing.is_empty());
    }

    #[test]
    fn what_a_replica_was_known_to_have_is_not_forgotten_while_it_catches_up() {
        let have = Version {
            epoch: Epoch(1),
            seq: Seq(7),
        };
        let config = Config::new([id(1), id(2)]).with(&Change::Claim(FIRST));
        let config = config.with(&Change::Drop([id(2)].into(), have));
        let config = config.with(&Change::Sync(id(2)));
        assert_eq!(config.out.get(&id(2)), Some(&have));
        let config = config.with(&Change::Claim(SECOND));
        assert_eq!((config.syncing.len(), config.out.get(&id(2))), (0, Some(&have)));
    }

    #[test]
    fn what_must_never_be_is_refused() {
        let old = Config::new([id(1), id(2)]).with(&Change::Claim(FIRST));
        let other = Config {
            incarnation: Some(SECOND),
            ..old.clone()
        };
        assert_eq!(other.follows(&old), Err(ConfigError::OtherIncarnation));
        let fell = Config {
            epoch: Epoch(0),
            ..old.clone()
        };
        assert_eq!(fell.follows(&old), Err(ConfigError::EpochFell));
        let decreed = Config {
            epoch: Epoch(2),
            in_sync: [id(1), id(3)].into(),
            ..old.clone()
        };
        assert_eq!(decreed.follows(&old), Err(ConfigError::PromotedByDecree));
        let nobody = Config {
            in_sync: BTreeSet::new(),
            ..old.clone()
        };
        assert_eq!(nobody.follows(&old), Err(ConfigError::NobodyInSync));
        let twice = Config {
            out: [(id(1), Version::default())].into(),
            ..old.clone()
        };
        assert_eq!(twice.follows(&old), Err(ConfigError::InTwoPlaces));
    }
}
