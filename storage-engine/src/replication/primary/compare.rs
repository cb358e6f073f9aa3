//! Comparing what members have, as a scrub of all copies together.
//!
//! A replica verifies by itself that each block is what it says it is. That it is the *newest* one only the others know: a
//! write that a disk had confirmed and lost leaves an older block, whole and valid. So members are listed against each
//! other, by version, up to a point that all have on stable storage. There must be no difference. Where there is one, the
//! newer block is copied over the older one, and it is told: a disk that loses writes should be replaced.
//!
//! It is a resync for which nobody waits, of everything, between members: first from one to each other one, then the other
//! way. It ends without a result when a member is lost, and begins again when it is ordered again.

use std::collections::VecDeque;

use super::copier::{Copier, Progress};
use super::{Primary, PrimaryEvent};
use crate::replication::ReplicaId;
use crate::types::Version;

/// A pass over all members.
#[derive(Debug)]
pub(super) struct Comparison {
    pub copier: Copier,
    /// Who is still to be listed against whom.
    pairs: VecDeque<(ReplicaId, ReplicaId)>,
    /// Rows in which a member had something older.
    differing: u64,
}

impl Primary {
    /// Orders a comparison. It begins when nothing more urgent is under way; told by [`PrimaryEvent::Compared`].
    pub fn compare(&mut self) {
        self.compare_wanted = true;
    }

    /// True while a comparison is ordered or under way.
    pub fn is_comparing(&self) -> bool {
        self.compare_wanted || self.comparison.is_some()
    }

    pub(super) fn run_comparison(&mut self) {
        if self.comparison.is_none() && !self.begin_comparison() {
            return;
        }
        let Some(mut comparison) = self.comparison.take() else {
            return;
        };
        let Copier { source, target, .. } = comparison.copier;
        let stay = [source, target].iter().all(|id| self.is_whole(*id));
        let progress = if stay && self.sync.is_none() {
            self.run_copier(&mut comparison.copier)
        } else {
            Progress::SourceFailed
        };
        match progress {
            Progress::Going => self.comparison = Some(comparison),
            Progress::Done => {
                comparison.differing += comparison.copier.lacked;
                match comparison.pairs.pop_front() {
                    Some((source, target)) => {
                        comparison.copier = self.lists_against(source, target);
                        self.comparison = Some(comparison);
                    }
                    None => self
                        .events
                        .push_back(PrimaryEvent::Compared(Some(comparison.differing))),
                }
            }
            Progress::SourceFailed | Progress::SourceDamaged(_) | Progress::TargetFailed => {
                self.events.push_back(PrimaryEvent::Compared(None));
            }
        }
    }

    fn begin_comparison(&mut self) -> bool {
        let members: Vec<ReplicaId> = self.config.in_sync.iter().copied().collect();
        let free = self.sync.is_none() && members.len() > 1 && members.iter().all(|id| self.is_whole(*id));
        if !self.compare_wanted || !free {
            return false;
        }
        self.compare_wanted = false;
        let (first, others) = (members[0], &members[1..]);
        // What the first has and another lacks; then what any of these has and the first lacks. By then all others have what
        // the first had, so what one of them alone has comes to the rest with the next pass.
        let there = others.iter().map(|other| (first, *other));
        let back = others.iter().map(|other| (*other, first));
        let mut pairs: VecDeque<_> = there.chain(back).collect();
        let (source, target) = pairs.pop_front().expect("there are two members");
        self.comparison = Some(Comparison {
            copier: self.lists_against(source, target),
            pairs,
            differing: 0,
        });
        true
    }

    /// Everything that is on stable storage of all.
    fn lists_against(&self, source: ReplicaId, target: ReplicaId) -> Copier {
        Copier::new(source, target, Version::default(), self.agreed).behind_the_guest()
    }

    fn is_whole(&self, id: ReplicaId) -> bool {
        let member = self.members.get(&id);
        self.config.in_sync.contains(&id) && member.is_some_and(|member| member.streams() && member.failed.is_none())
    }
}
