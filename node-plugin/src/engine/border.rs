//! The border of a replica: orders of other nodes pass only if they come from the node that leads the volume.
//!
//! ```text
//! promise of an epoch that nobody here knows ─► held ─► the object is looked up ─┬─ it names this peer ─► obeyed
//!                                                                                └─ it does not ───────► refused
//! any other order ─┬─ of whoever is known to lead ─► obeyed
//!                  └─ of anybody else ─► "no session": the promise comes first
//! ```
//!
//! A certificate proves which node a peer is. That this node leads the volume, in this epoch and by this start of its
//! engine, only the volume's object can tell: epochs are claimed there and nowhere else. The machine behind the border knows
//! nothing of nodes, and obeys whoever passes.
//!
//! A replica that was let through to one leader takes no order of anybody else, because a session begins with a promise,
//! and promises are looked at here. So what is not a promise never waits, and never costs a look-up.
//!
//! What always holds, whatever peers send: at most one look-up is out, at most [`HELD_MAX`] promises are held, one of each
//! peer, so that nobody can push another's away; and a peer that was refused causes few look-ups more for a while.

use galleonfs_storage_engine::replication::Incarnation;
use galleonfs_storage_engine::replication::message::Refusal;
use galleonfs_storage_engine::types::Epoch;
use uuid::Uuid;

use super::spec::{Leader, Leadership};

/// Peers whose promises are held during one look-up. Two nodes may compete for a volume in good faith; the rest is room
/// for those that do not.
const HELD_MAX: usize = 8;

/// Peers that are remembered as refused. More nodes than that with stolen keys cause more look-ups, one at a time.
const OFFENDERS_MAX: usize = 16;

/// For so long a refused peer is not looked up again for the same epoch or a lower one, as long as the object is not
/// known to have changed.
const QUIET_MS: u64 = 10_000;

/// In that time it may be refused so often for epochs that are higher each time: a node that has just lost a volume to
/// another may be given it back at once. One that makes epochs up is stopped by this.
const REFUSED_MAX: u32 = 2;

/// A border says no more often than this that it refuses orders.
const TOLD_EVERY_MS: u64 = 10_000;

/// Who says that it leads.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Claimant {
    /// The node that the session's certificate names.
    pub peer: Uuid,
    pub epoch: Epoch,
    pub incarnation: Incarnation,
}

/// What becomes of an order.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Verdict {
    /// It comes from whoever leads.
    Obey,
    /// It can have no effect, and is answered with this.
    Answer(Refusal),
    /// It waits for the object, or is lost: it is asked again. True: look it up.
    Wait(bool),
    /// The volume's object says something else.
    Refuse,
}

/// What became of the promises that were held, each with what came with it.
#[derive(Debug)]
pub(super) struct Judged<T> {
    pub obeyed: Vec<(Claimant, T)>,
    pub refused: Vec<(Claimant, T)>,
    /// A promise of this peer came after the object was read: it is to be looked up again.
    pub look_up: Option<Uuid>,
}

#[derive(Debug)]
struct Held<T> {
    claimant: Claimant,
    /// The look-up that is out began after it came.
    asked: bool,
    /// It is the second one on which a promise of this peer waits. There is no third: a peer that sends another promise
    /// during each would keep the API server busy for ever.
    again: bool,
    order: T,
}

#[derive(Debug)]
struct Offender {
    peer: Uuid,
    /// The highest epoch that it was refused for, how often, and when first.
    epoch: Epoch,
    times: u32,
    since_ms: u64,
}

/// See the module. `T` is what is held of a promise besides who sent it.
#[derive(Debug)]
pub(super) struct Border<T> {
    /// What the object said last.
    known: Option<Leadership>,
    looking_up: bool,
    held: Vec<Held<T>>,
    offenders: Vec<Offender>,
    told_ms: Option<u64>,
    untold: u64,
}

impl<T> Default for Border<T> {
    fn default() -> Border<T> {
        Border {
            known: None,
            looking_up: false,
            held: Vec::new(),
            offenders: Vec::new(),
            told_ms: None,
            untold: 0,
        }
    }
}

impl Leader {
    fn is(&self, claimant: &Claimant) -> bool {
        self.node == Some(claimant.peer) && self.incarnation == claimant.incarnation
    }
}

impl<T> Border<T> {
    /// What the object said last.
    pub fn known(&self) -> Option<&Leadership> {
        self.known.as_ref()
    }

    /// An order of another node. Promises come with what is to be held of them; `fence` is the highest epoch that the
    /// replica obeys.
    pub fn judge(&mut self, claimant: Claimant, promise: Option<T>, fence: Epoch, now_ms: u64) -> Verdict {
        let settled = self.settled(&claimant);
        if settled == Some(true) {
            return Verdict::Obey;
        }
        if claimant.epoch < fence {
            return Verdict::Answer(Refusal::Fenced);
        }
        if settled == Some(false) {
            return Verdict::Refuse;
        }
        match promise {
            None => Verdict::Answer(Refusal::NoSession),
            Some(order) => self.hold(claimant, order, now_ms),
        }
    }

    /// Whether it leads, if what is known says so for ever: an epoch never goes back, and has one leader.
    fn settled(&self, claimant: &Claimant) -> Option<bool> {
        let known = self.known.as_ref()?;
        if claimant.epoch < known.epoch {
            return Some(false);
        }
        let leader = known.leader.as_ref().filter(|_| claimant.epoch == known.epoch)?;
        Some(leader.is(claimant))
    }

    fn hold(&mut self, claimant: Claimant, order: T, now_ms: u64) -> Verdict {
        if !self.may_ask(&claimant, now_ms) {
            return Verdict::Refuse;
        }
        let mut held = Held {
            claimant,
            asked: !self.looking_up,
            again: false,
            order,
        };
        let place = self.held.iter().position(|held| held.claimant.peer == claimant.peer);
        match place {
            Some(place) => {
                let before = &mut self.held[place];
                held.asked |= before.asked && before.claimant == claimant;
                held.again = before.again;
                *before = held;
            }
            None if self.held.len() < HELD_MAX => self.held.push(held),
            // Those that wait are decided on soon, and this one is asked again.
            None => return Verdict::Wait(false),
        }
        Verdict::Wait(!std::mem::replace(&mut self.looking_up, true))
    }

    fn may_ask(&self, claimant: &Claimant, now_ms: u64) -> bool {
        let offender = self.offenders.iter().find(|offender| offender.peer == claimant.peer);
        offender.is_none_or(|offender| {
            now_ms >= offender.since_ms + QUIET_MS || (claimant.epoch > offender.epoch && offender.times < REFUSED_MAX)
        })
    }

    /// The object was read; `None`: it could not be.
    pub fn looked_up(&mut self, found: Option<Leadership>, now_ms: u64) -> Judged<T> {
        self.looking_up = false;
        let mut judged = Judged {
            obeyed: Vec::new(),
            refused: Vec::new(),
            look_up: None,
        };
        let held = std::mem::take(&mut self.held);
        let Some(found) = found else {
            // Nothing is promised to anybody. Whoever leads asks again, and nobody can become the leader meanwhile.
            return judged;
        };
        let before = self.known.as_ref().map(|known| known.epoch);
        if before.is_none_or(|before| found.epoch > before) {
            // What was refused was refused for another state of the object.
            self.offenders.clear();
        }
        // An object that went back, out of a backup, makes nobody a leader.
        if before.is_none_or(|before| found.epoch >= before) {
            self.known = Some(found);
        }
        for mut one in held {
            match self.settled(&one.claimant) {
                Some(true) => judged.obeyed.push((one.claimant, one.order)),
                // The claim may have been made after the object was read.
                None if !one.asked && !one.again => {
                    (one.asked, one.again) = (true, true);
                    self.held.push(one);
                }
                Some(false) | None => {
                    self.offended(&one.claimant, now_ms);
                    judged.refused.push((one.claimant, one.order));
                }
            }
        }
        judged.look_up = self.held.first().map(|held| held.claimant.peer);
        self.looking_up = judged.look_up.is_some();
        judged
    }

    fn offended(&mut self, claimant: &Claimant, now_ms: u64) {
        self.offenders.retain(|offender| now_ms < offender.since_ms + QUIET_MS);
        let known = self
            .offenders
            .iter_mut()
            .find(|offender| offender.peer == claimant.peer);
        if let Some(offender) = known {
            offender.epoch = offender.epoch.max(claimant.epoch);
            offender.times += 1;
        } else {
            if self.offenders.len() == OFFENDERS_MAX {
                self.offenders.remove(0);
            }
            self.offenders.push(Offender {
                peer: claimant.peer,
                epoch: claimant.epoch,
                times: 1,
                since_ms: now_ms,
            });
        }
    }

    /// Whether it is to be told that an order was refused, and how many were since that was told last.
    pub fn tells(&mut self, now_ms: u64) -> Option<u64> {
        self.untold += 1;
        if self.told_ms.is_some_and(|told| now_ms < told + TOLD_EVERY_MS) {
            return None;
        }
        self.told_ms = Some(now_ms);
        Some(std::mem::take(&mut self.untold))
    }
}

#[cfg(test)]
mod tests;
