//! What a store offers to replication: several replicas of a volume hold the same, and each keeps a log of its own.
//!
//! What travels between replicas is the same everywhere: writes with their numbers, and blocks with their address,
//! version, check and bytes as they are stored. Headers, chains and places are each replica's own business.
//!
//! What always holds, where one leads and others follow ([`Settle::Told`](super::Settle)):
//! - **Nothing becomes irrevocable that the others may decide never happened.** Opening cuts the log only where it is
//!   told to, and a checkpoint is committed only when all that is in it is known to be kept ([`Store::gate`]). So what lies
//!   behind the end of its epoch is always still in the log, and can be dropped. An end that was settled here is no proof:
//!   whoever settled it may have ended before the epoch began, and the next one may have known less.
//! - **An epoch begins only when the ends of those before it are settled here**, as far as this log reaches.
//! - **A promise is durable before it is reported**, and from the call on no write of the older epoch is taken.
//! - **A copy never replaces anything newer.** It is compared with what this replica has for that block at the copy's
//!   own place in the log, whatever is on its way, and what remains of it becomes one record. The writes of the
//!   stream that come later are newer than every copy: one that is ahead of the stream is left to the stream.
//! - **What is damaged is written anew in the same version**, if that is what is here, and only then
//!   ([`Store::repair_in`]).

mod amend;
mod copy;
mod copying;
mod follow;
mod newer;
mod repair;
mod rows;
mod stored;

pub use amend::Amendments;
pub use copy::Copies;
pub use copying::Copying;
pub use newer::Row;
pub use rows::{RowScans, Rows};
pub use stored::{Stored, StoredBlock};

use super::log::Then;
use super::record::{Body, HEADER_BYTES};
use super::superblock::EpochEnd;
use super::{Settle, Store};
use crate::types::{Epoch, Seq, Version};

impl Store {
    /// The last write that was appended and is in the kernel's hands.
    pub fn last(&self) -> Version {
        self.log.appended.last
    }

    /// The last write that was handed to the log; it may be on its way.
    pub fn handed(&self) -> Version {
        self.log.position.last
    }

    /// Everything up to here is known to be kept: what the gate says, and what a checkpoint held before this opening.
    pub fn kept(&self) -> Version {
        let merged = self.superblock.checkpoint.replay.last;
        self.gate.unwrap_or(merged).max(merged)
    }

    /// The newest version of anything in the log, copies too, and also what is on its way.
    pub fn highest(&self) -> Version {
        self.log.highest
    }

    /// Where epochs ended, the oldest that is known first.
    pub fn epoch_ends(&self) -> Vec<EpochEnd> {
        self.superblock.epoch_ends.clone()
    }

    /// Everything up to `kept` is durable on every replica that counts, so a checkpoint may hold it for ever. None: there
    /// is no other replica to ask. A store that was opened with [`Settle::Told`] begins with nothing allowed but what
    /// lies before settled ends.
    pub fn gate(&mut self, kept: Option<Version>) {
        self.gate = kept;
        self.background_due = true;
    }

    /// What the gate has to reach for the checkpoint that waits for it: without it the log only grows. A leader that
    /// hears of it makes all replicas sync, and raises the gate.
    pub fn gate_wanted(&self) -> Option<Version> {
        let frozen = self.frozen.as_ref().filter(|_| self.job.is_some())?;
        (!self.is_kept(frozen.highest())).then(|| frozen.highest())
    }

    /// Nobody can decide any more that this never happened.
    pub(super) fn is_kept(&self, version: Version) -> bool {
        self.gate.is_none_or(|kept| version <= kept) || version == Version::default()
    }

    /// One of several replicas: others decide where epochs end.
    pub(super) fn is_led(&self) -> bool {
        matches!(self.options.settle, Settle::Told(_))
    }

    /// An epoch begins in the log only when nothing of an earlier one can be dropped any more.
    pub(super) fn assert_may_begin(&self, epoch: Epoch) {
        let highest = self.log.highest;
        if self.is_led() && highest.epoch < epoch && highest != Version::default() {
            let end = self.superblock.end_of(highest.epoch);
            assert!(
                end.is_some_and(|end| highest.seq <= end),
                "I11: epoch {} begins, and {highest} may be behind the end of its epoch ({end:?})",
                epoch.0
            );
        }
    }

    /// Takes up the writes of this epoch behind `base`: the next one is `base` + 1. What was written up to there comes as
    /// copies. For a replica that had no part in the writes of this epoch, or not in the last ones; needs room like a
    /// record without payload, and is reported by [`Event::Appended`](super::Event) of `base`.
    pub fn join(&mut self, base: Seq) {
        let epoch = self.superblock.epoch;
        let last = self.log.position.last;
        assert!(
            last.epoch < epoch || last.seq <= base,
            "the log has writes up to {last}: it cannot join behind {}",
            base.0
        );
        self.assert_may_begin(epoch);
        self.log.position.last = Version { epoch, seq: base };
        self.append_to_chain(Body::Join { base }, Vec::new(), Then::Appended);
    }

    /// True if the stream of this epoch was taken up, by a write or by joining it.
    pub fn has_stream(&self) -> bool {
        self.log.position.last.epoch == self.superblock.epoch
    }

    /// True if every copy that was reported is on stable storage. Ask when a sync that was asked for after it is done.
    pub fn copies_are_durable(&self) -> bool {
        self.log.copies_are_durable()
    }
}

const _: () = assert!(HEADER_BYTES == 4096, "a record of no payload takes one page");
