//! What others may change of the configuration while it is this primary's, and how it learns of it.
//!
//! An administrator adds a new replica to those that are out, which then is brought up to date like any other, or takes one
//! away that is given up. All the rest is the primary's: that somebody else changed it means that nobody knows who has
//! what, and then nothing is completed any more.

use super::super::mutant::Mutant;
use super::super::timing::ASK_AGAIN_MS;
use super::super::{Config, ReplicaId, Stamp};
use super::{Phase, Primary, PrimaryOutput};

/// A look at the configuration.
#[derive(Debug)]
pub(super) enum Look {
    /// It is to be read, not before that.
    Wanted(u64),
    /// It is being read.
    Reading {
        /// Somebody changed it since it was asked for, perhaps.
        again: bool,
    },
}

impl Primary {
    /// Somebody else may have changed the configuration. It is read as soon as no change is on its way.
    pub fn look(&mut self) {
        if self.is_over() {
            return;
        }
        match &mut self.look {
            Some(Look::Reading { again }) => *again = true,
            look => *look = Some(Look::Wanted(self.now_ms)),
        }
        self.go_on();
    }

    pub(super) fn is_looking(&self) -> bool {
        matches!(self.look, Some(Look::Reading { .. }))
    }

    pub(super) fn look_when_free(&mut self) {
        let due = matches!(self.look, Some(Look::Wanted(at_ms)) if at_ms <= self.now_ms);
        if due && self.making.is_none() && !self.is_over() {
            self.look = Some(Look::Reading { again: false });
            self.out.push_back(PrimaryOutput::ReadConfig);
        }
    }

    /// The object could not be read.
    pub(super) fn look_failed(&mut self) {
        if self.is_looking() {
            self.look = Some(Look::Wanted(self.now_ms + ASK_AGAIN_MS));
        }
    }

    /// Takes what the object says now, in the epoch that is ours or that is being claimed; false if that cannot be.
    pub(super) fn adopt(&mut self, stamp: Stamp, mut config: Config) -> bool {
        if let Some(Look::Reading { again }) = self.look {
            self.look = again.then_some(Look::Wanted(self.now_ms));
        }
        // Whoever was taken away is not catching up.
        config.syncing.retain(|id| config.out.contains_key(id));
        if !matches!(self.phase, Phase::Claiming) && !self.mutant(Mutant::NeverDeposed) {
            let as_it_was = config.in_sync == self.config.in_sync;
            let as_proposed = self.making.as_ref().is_some_and(|making| {
                let proposed = self.config.with(&making.change);
                config.in_sync == proposed.in_sync
            });
            if !as_it_was && !as_proposed {
                self.deposed(format!(
                    "somebody else changed which replicas are in sync, from {:?} to {:?}: nobody knows who has what",
                    self.config.in_sync, config.in_sync
                ));
                return false;
            }
        }
        if let Err(broken) = config.follows(&self.config) {
            self.deposed(format!(
                "somebody else changed the configuration to one that must not be: {broken}"
            ));
            return false;
        }
        self.stamp = stamp;
        self.config = config;
        let given_up = |id: &&ReplicaId| !self.config.in_sync.contains(id) && !self.config.out.contains_key(id);
        let given_up: Vec<ReplicaId> = self.members.keys().filter(given_up).copied().collect();
        for id in given_up {
            self.forget_replica(id);
        }
        true
    }
}
