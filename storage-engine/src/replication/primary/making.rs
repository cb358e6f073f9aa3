//! Changing the configuration: one change at a time, until its outcome is known.

use super::super::mutant::Mutant;
use super::super::timing::ASK_AGAIN_MS;
use super::super::{Change, Config, Stamp};
use super::{Phase, Primary, PrimaryOutput};

/// What became of a proposal.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Decision {
    /// The object is now as proposed; this is its new stamp.
    Made(Stamp),
    /// Something else was changed first: nothing of it was written.
    Conflict,
    /// It may have been written, may be yet, or may never be.
    Unknown,
}

/// A change on its way.
#[derive(Debug)]
pub(super) struct Making {
    pub change: Change,
    pub since_ms: u64,
    config: Config,
    state: State,
}

#[derive(Debug, PartialEq, Eq)]
enum State {
    Proposed,
    Reading,
    /// The object could not be read: again at this time.
    Waiting(u64),
}

impl Primary {
    /// Starts a change; none may be on its way.
    pub(super) fn make(&mut self, change: Change) {
        assert!(self.may_change(), "one change at a time");
        self.propose(change, self.now_ms);
    }

    /// True if no change is on its way, and nobody is looking for those of others.
    pub(super) fn may_change(&self) -> bool {
        self.making.is_none() && !self.is_looking()
    }

    fn propose(&mut self, change: Change, since_ms: u64) {
        let config = self.config.with(&change);
        if let Err(broken) = config.follows(&self.config) {
            panic!("{broken}: {change:?} of {:?}", self.config);
        }
        self.out.push_back(PrimaryOutput::Propose {
            expected: self.stamp,
            config: config.clone(),
        });
        self.making = Some(Making {
            change,
            since_ms,
            config,
            state: State::Proposed,
        });
    }

    /// Reports what became of a proposal.
    pub fn decided(&mut self, decision: Decision) {
        let Some(making) = &mut self.making else { return };
        if making.state != State::Proposed {
            return;
        }
        let made = match decision {
            Decision::Made(stamp) => Some(stamp),
            Decision::Unknown if self.options.mutants.has(Mutant::UnknownIsMade) => Some(self.stamp),
            Decision::Conflict | Decision::Unknown => None,
        };
        let unknown = decision == Decision::Unknown;
        if let Some(stamp) = made {
            let (change, config) = (making.change.clone(), making.config.clone());
            self.made(change, stamp, config);
        } else if unknown && self.options.mutants.has(Mutant::UnknownIsNotMade) {
            self.making = None;
        } else {
            making.state = State::Reading;
            self.out.push_back(PrimaryOutput::ReadConfig);
        }
        self.go_on();
    }

    /// Reports what the object says now; none: it could not be read.
    pub fn config_read(&mut self, found: Option<(Stamp, Config)>) {
        if self.is_over() {
            return;
        }
        let Some((stamp, config)) = found else {
            self.look_failed();
            if let Some(making) = self.making.as_mut().filter(|making| making.state == State::Reading) {
                making.state = State::Waiting(self.now_ms + ASK_AGAIN_MS);
            }
            return;
        };
        let mine = config.incarnation == Some(self.options.incarnation);
        let claiming = matches!(self.phase, Phase::Claiming);
        let taken = if claiming {
            !mine && config.epoch > self.config.epoch
        } else {
            config.epoch != self.config.epoch || !mine
        };
        if taken && !self.mutant(Mutant::NeverDeposed) {
            if config.epoch < self.config.epoch {
                return self.deposed(format!(
                    "the object says epoch {}, but epoch {} was claimed: it was put back to an older state. Somebody has \
                     to decide which replica counts",
                    config.epoch.0, self.config.epoch.0
                ));
            }
            return self.deposed(format!("epoch {} was claimed by another primary", config.epoch.0));
        }
        let reading = matches!(&self.making, Some(making) if making.state == State::Reading);
        if !(reading || self.is_looking()) || !self.adopt(stamp, config) {
            return;
        }
        if let Some(making) = self.making.take_if(|_| reading) {
            if self.config.has(&making.change) {
                self.made(making.change, stamp, self.config.clone());
            } else if !self.is_pointless(&making.change) {
                // The same again: if the first attempt is still on its way, one of the two comes too late.
                self.propose(making.change, making.since_ms);
            }
        }
        self.go_on();
    }

    /// True if somebody else has given the replica up that this is about. So the object is another than the one that the
    /// change was proposed for, and it will not be made.
    fn is_pointless(&self, change: &Change) -> bool {
        match change {
            Change::Sync(id) | Change::Join(id) => !self.config.out.contains_key(id),
            Change::Claim(_) | Change::Drop(..) | Change::Release => false,
        }
    }

    /// Reads the object again after it could not be read.
    pub(super) fn make_again(&mut self) {
        let now_ms = self.now_ms;
        if let Some(making) = &mut self.making
            && matches!(making.state, State::Waiting(at) if at <= now_ms)
        {
            making.state = State::Reading;
            self.out.push_back(PrimaryOutput::ReadConfig);
        }
    }

    fn made(&mut self, change: Change, stamp: Stamp, config: Config) {
        self.making = None;
        assert!(config.epoch >= self.config.epoch, "I1: the epoch never falls");
        self.stamp = stamp;
        self.config = config;
        match change {
            Change::Claim(_) => self.claimed(),
            Change::Drop(gone, _) => {
                for id in &gone {
                    self.members.remove(id);
                }
                self.members_changed();
            }
            Change::Sync(id) => self.recorded_as_syncing(id),
            Change::Join(id) => self.joined(id),
            Change::Release => self.released(),
        }
    }
}
