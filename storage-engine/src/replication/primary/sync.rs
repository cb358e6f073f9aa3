//! Bringing a replica up to date that was out, or is new, and letting it join.
//!
//! ```text
//! Promise ─► Settle (what it has beyond the ends is cut off) ─► recorded as syncing ─► all new writes go there
//!   ─► everything before them is durable on all members ─► copy what it lacks ─► once more: nothing is lacking ─► flush
//!   ─► its word counts ─► recorded as in sync
//! ```
//!
//! Nothing that it is given can be undone later: writes of the stream are cut off with everybody else's, and what is
//! copied is older than the stream and durable on all members by then.

use super::super::limits::REPLAY_RECORDS_MAX;
use super::super::message::Ask;
use super::super::mutant::Mutant;
use super::super::timing::{ASK_AGAIN_MS, MEMBER_TIMEOUT_MS};
use super::super::{Change, ReplicaId};
use super::copier::{Copier, Progress};
use super::member::{Member, Standing};
use super::{Phase, Primary};
use crate::types::{Seq, Version};

/// A replica on its way into the in-sync set.
#[derive(Debug)]
pub(super) struct Sync {
    pub id: ReplicaId,
    stage: Stage,
    since_ms: u64,
}

#[derive(Debug)]
enum Stage {
    /// It is asked to promise, and told where epochs ended.
    Promise,
    /// It is recorded as syncing.
    Record,
    /// The stream is taken up there behind this write.
    Join(Seq),
    /// That write is made durable on all members.
    Barrier(Seq),
    Copy(Seq, Box<Copier>),
    /// Everything up to here is to be on its stable storage, and what was copied, by this order to flush. That everything up
    /// to here is there does not mean that copies are: it may have been before they came.
    Flush(Version, u64),
    /// It is recorded as in sync.
    Enter,
}

impl Sync {
    pub(super) fn copier_mut(&mut self) -> Option<&mut Copier> {
        match &mut self.stage {
            Stage::Copy(_, copier) => Some(copier),
            _ => None,
        }
    }

    pub(super) fn copier(&self) -> Option<&Copier> {
        match &self.stage {
            Stage::Copy(_, copier) => Some(copier),
            _ => None,
        }
    }
}

/// One that failed is tried again after so long.
const TRY_AGAIN_MS: u64 = MEMBER_TIMEOUT_MS;
/// It has so long to be reached, and to cut its log off.
const REACH_MS: u64 = 5 * MEMBER_TIMEOUT_MS;

impl Primary {
    /// Takes the next replica that is out, or goes on with the one that was taken.
    pub(super) fn bring_up_to_date(&mut self) {
        if self.sync.is_none() {
            if self.config.in_sync.len() >= self.wanted_in_sync() {
                return;
            }
            let now_ms = self.now_ms;
            let due = |id: &&ReplicaId| self.sync_again_ms.get(*id).is_none_or(|at| *at <= now_ms);
            let Some(id) = self.config.out.keys().find(due).copied() else {
                return;
            };
            // The next time another one has its turn first.
            self.sync_again_ms.insert(id, now_ms + TRY_AGAIN_MS);
            self.members.insert(id, Member::new(now_ms));
            self.sync = Some(Sync {
                id,
                stage: Stage::Promise,
                since_ms: now_ms,
            });
            self.ask_to_promise(id);
        }
        let Some(mut sync) = self.sync.take() else { return };
        if self.step_sync(&mut sync) {
            self.sync = Some(sync);
        } else {
            self.give_up(sync.id);
        }
    }

    /// False if it does not work out.
    fn step_sync(&mut self, sync: &mut Sync) -> bool {
        let id = sync.id;
        let now_ms = self.now_ms;
        let Some(member) = self.members.get(&id) else {
            return false;
        };
        if member.failed.is_some() {
            return false;
        }
        let standing = member.standing;
        match &mut sync.stage {
            Stage::Promise => {
                if now_ms > sync.since_ms + REACH_MS {
                    return false;
                }
                match standing {
                    Standing::Promised => self.ask_to_settle(id, false),
                    Standing::Settled if self.may_change() => {
                        sync.stage = Stage::Record;
                        self.make(Change::Sync(id));
                    }
                    _ => {}
                }
            }
            Stage::Record => {
                // Becomes Join in `recorded_as_syncing`.
            }
            Stage::Join(base) => {
                let base = *base;
                if member.has_stream && member.acked >= base {
                    sync.stage = Stage::Barrier(base);
                } else if now_ms > sync.since_ms + MEMBER_TIMEOUT_MS {
                    return false;
                } else if now_ms >= member.asked_ms + ASK_AGAIN_MS {
                    self.members.get_mut(&id).expect("it is there").asked_ms = now_ms;
                    self.ask(id, Ask::Join { base });
                }
            }
            Stage::Barrier(base) => {
                let base = *base;
                let until = self.version(base);
                if self.agreed < until && base > Seq(0) {
                    if self.written >= base {
                        self.flush_to = self.flush_to.max(until);
                    }
                } else if let Some(copier) = self.copier_for(id, base, None) {
                    sync.stage = Stage::Copy(base, Box::new(copier));
                }
            }
            Stage::Copy(base, copier) => {
                let base = *base;
                match self.run_copier(copier) {
                    Progress::Going => {}
                    Progress::TargetFailed => return false,
                    // Once more: from another source, or to see that nothing is lacking now.
                    progress if progress != Progress::Done || copier.lacked > 0 => {
                        let failed = (progress != Progress::Done).then_some(copier.source);
                        let Some(again) = self.copier_for(id, base, failed) else {
                            return false;
                        };
                        **copier = again;
                    }
                    _ => {
                        // What was overwritten before it could be copied comes with the stream. Until it has come the target
                        // has neither, and whoever overwrote it may yet be cut off.
                        let upto = self.version(self.written).max(copier.overwritten);
                        self.flush_to = self.flush_to.max(upto);
                        self.members.get_mut(&id).expect("it is there").asked_ms = now_ms;
                        sync.stage = Stage::Flush(upto, self.ask_to_flush(id, upto));
                    }
                }
            }
            Stage::Flush(upto, order) => {
                let copied = member.flush_done >= *order;
                if !copied && now_ms >= member.asked_ms + ASK_AGAIN_MS {
                    let upto = *upto;
                    self.members.get_mut(&id).expect("it is there").asked_ms = now_ms;
                    self.ask_to_flush(id, upto);
                    return true;
                }
                let flushed = member.flushed >= *upto && copied || self.mutant(Mutant::JoinBeforeFlush);
                // Only with everything that was completed may its word count.
                if flushed && member.acked >= self.written && member.streams() && self.may_change() {
                    sync.stage = Stage::Enter;
                    self.make(Change::Join(id));
                }
            }
            Stage::Enter => {}
        }
        self.replay.len() <= 2 * REPLAY_RECORDS_MAX
    }

    /// What brings this one up to date as of the beginning of its stream.
    fn copier_for(&mut self, target: ReplicaId, base: Seq, failed: Option<ReplicaId>) -> Option<Copier> {
        let fit = |id: &&ReplicaId| {
            let member = self.members.get(*id);
            member.is_some_and(|member| member.streams() && member.failed.is_none() && member.acked >= base)
        };
        let mut sources: Vec<ReplicaId> = self.config.in_sync.iter().filter(fit).copied().collect();
        if sources.len() > 1 {
            sources.retain(|id| Some(*id) != failed);
        }
        let preferred = self.options.prefer.filter(|id| sources.contains(id));
        let turn = self.next_id as usize;
        let source = preferred.or_else(|| sources.get(turn % sources.len().max(1)).copied())?;
        let known = self.config.out.get(&target).copied().unwrap_or_default();
        // One that has less than it was known to have lost something: everything is compared.
        let has = self
            .members
            .get(&target)
            .map_or(Version::default(), |member| member.last);
        let after = if has < known { Version::default() } else { known };
        Some(Copier::new(source, target, after, self.version(base)).behind_the_guest())
    }

    pub(super) fn recorded_as_syncing(&mut self, id: ReplicaId) {
        let base = self.assigned;
        let waits = |sync: &&mut Sync| sync.id == id && matches!(sync.stage, Stage::Record);
        let Some(sync) = self.sync.as_mut().filter(waits) else {
            return;
        };
        (sync.stage, sync.since_ms) = (Stage::Join(base), self.now_ms);
        let Some(member) = self.members.get_mut(&id) else {
            return;
        };
        (member.standing, member.asked_ms) = (Standing::Streaming, self.now_ms);
        // What it has of this epoch from before is behind the base.
        (member.acked, member.sent, member.base) = (Seq(0), base, base);
        member.has_stream = false;
        self.ask(id, Ask::Join { base });
    }

    pub(super) fn joined(&mut self, id: ReplicaId) {
        self.sync = None;
        self.sync_again_ms.remove(&id);
    }

    /// Something happened to a replica that is on its way.
    pub(super) fn sync_lost(&mut self, id: ReplicaId) {
        if self.sync.as_ref().is_some_and(|sync| sync.id == id) && matches!(self.phase, Phase::Serving) {
            self.give_up(id);
        }
    }

    /// Somebody else gave a replica up: nothing is expected of it any more.
    pub(super) fn forget_replica(&mut self, id: ReplicaId) {
        self.members.remove(&id);
        self.sync_again_ms.remove(&id);
        if self.sync.as_ref().is_some_and(|sync| sync.id == id) {
            self.sync = None;
        }
    }

    /// It can be reached again: whoever is out is tried at once.
    pub(super) fn sync_soon(&mut self, id: ReplicaId) {
        self.sync_again_ms.remove(&id);
        if let Some(copier) = self.sync.as_mut().and_then(Sync::copier_mut) {
            copier.ask_soon(id);
        }
        if let Some(comparison) = &mut self.comparison {
            comparison.copier.ask_soon(id);
        }
    }

    /// It stays out, and is tried again later. A change that is on its way is followed to its end.
    fn give_up(&mut self, id: ReplicaId) {
        self.sync = None;
        self.sync_again_ms.insert(id, self.now_ms + TRY_AGAIN_MS);
        let entering = self
            .making
            .as_ref()
            .is_some_and(|making| making.change == Change::Join(id));
        // If it becomes a member yet, it is late or comes back like one.
        if !entering {
            self.members.remove(&id);
        }
    }
}
