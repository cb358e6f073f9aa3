//! What the primary knows of one replica.

use super::super::timing::MEMBER_TIMEOUT_MS;
use super::Primary;
use crate::replication::ReplicaId;
use crate::store::layout::EpochEnd;
use crate::types::{Seq, Version};

/// How far a replica is with an epoch.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Standing {
    /// It was asked to promise.
    Asked,
    /// It promised, and said what it has.
    Promised,
    /// It was told to cut off what is behind where the epochs before ended.
    Trimming,
    /// It has nothing there.
    Trimmed,
    /// It was told to write down where they ended.
    Settling,
    /// It knows: records may go there.
    Settled,
    /// Records go there.
    Streaming,
}

#[derive(Debug)]
pub(super) struct Member {
    pub standing: Standing,
    /// What it said it has: every write up to here, if it is in sync.
    pub last: Version,
    /// Where it was told that epochs ended.
    pub ends: Vec<EpochEnd>,
    /// The start that it promised in.
    pub boot: Option<u64>,
    /// Every write of this epoch up to here is in its log.
    pub acked: Seq,
    /// Every one up to here was sent.
    pub sent: Seq,
    /// Behind which write it said that a record is missing, and when that was sent again last. Every record that overtook
    /// the missing one makes it say so.
    pub gap: Option<Seq>,
    pub gap_ms: u64,
    /// Its stream begins behind this one: it gets what is before another way.
    pub base: Seq,
    /// Everything up to here is on its stable storage.
    pub flushed: Version,
    /// The last order to flush that it carried out.
    pub flush_done: u64,
    /// What it was asked to have there, and when. One flush is asked for at a time: the next one covers all that came
    /// meanwhile.
    pub flush_asked: Version,
    pub flush_asked_ms: u64,
    /// It grants that nobody else reads or writes before that.
    pub lease_until_ms: u64,
    /// When something was last asked that is asked again if nothing comes.
    pub asked_ms: u64,
    /// When it said that it will promise.
    pub promising_ms: Option<u64>,
    pub beat_ms: u64,
    /// Since when it owes an answer to writes, to a flush, to a beat, to be in session at all.
    pub owes_write_ms: Option<u64>,
    pub owes_flush_ms: Option<u64>,
    pub owes_beat_ms: Option<u64>,
    pub owes_session_ms: Option<u64>,
    /// Its store takes no more writes, or lost some.
    pub failed: Option<String>,
    /// It said how far its stream is since it was taken up.
    pub has_stream: bool,
    /// It is not waited for any longer while the epoch begins.
    pub given_up: bool,
}

impl Member {
    pub fn new(now_ms: u64) -> Member {
        Member {
            standing: Standing::Asked,
            last: Version::default(),
            ends: Vec::new(),
            boot: None,
            acked: Seq(0),
            sent: Seq(0),
            gap: None,
            gap_ms: 0,
            base: Seq(0),
            flushed: Version::default(),
            flush_done: 0,
            flush_asked: Version::default(),
            flush_asked_ms: 0,
            lease_until_ms: 0,
            asked_ms: now_ms,
            promising_ms: None,
            beat_ms: 0,
            owes_write_ms: None,
            owes_flush_ms: None,
            owes_beat_ms: None,
            owes_session_ms: Some(now_ms),
            failed: None,
            has_stream: false,
            given_up: false,
        }
    }

    /// It was started again: what it had only in memory is gone, and what was not on stable storage may be.
    pub fn lost_session(&mut self, now_ms: u64) {
        self.standing = Standing::Asked;
        self.asked_ms = 0;
        self.owes_session_ms.get_or_insert(now_ms);
    }

    /// True if it has answered everything, and can go on.
    pub fn owes_nothing(&self) -> bool {
        let owes = [
            self.owes_write_ms,
            self.owes_flush_ms,
            self.owes_beat_ms,
            self.owes_session_ms,
        ];
        owes.iter().all(Option::is_none) && self.failed.is_none() && self.acked >= self.sent
    }

    /// True if it owes something for too long, or can do nothing any more.
    pub fn is_late(&self, now_ms: u64) -> bool {
        let owes = [
            self.owes_write_ms,
            self.owes_flush_ms,
            self.owes_beat_ms,
            self.owes_session_ms,
        ];
        let late = |since: u64| now_ms >= since + MEMBER_TIMEOUT_MS;
        self.failed.is_some() || owes.into_iter().flatten().any(late)
    }

    pub fn streams(&self) -> bool {
        self.standing == Standing::Streaming
    }
}

impl Primary {
    /// Those whose word counts: in sync in any configuration that may be the current one.
    pub(super) fn ack_set(&self) -> impl Iterator<Item = ReplicaId> + '_ {
        // What is being made may be in effect already.
        let joining = self.making.as_ref().and_then(|making| match making.change {
            super::Change::Join(id) => Some(id),
            _ => None,
        });
        let joining = joining.filter(|id| !self.config.in_sync.contains(id));
        self.config.in_sync.iter().copied().chain(joining)
    }
}
