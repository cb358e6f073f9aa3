//! How much of its pool a replica may take.
//!
//! Placement promises each replica a quarter more than its volume ([`promised_bytes`]), and no more than the pool has.
//! A replica that has just that cleans segments of which more than four fifths are needed, and writes four to five bytes for
//! each that a guest overwrites at random; a sixth more space takes a third off. What is promised to nobody, or not yet
//! taken, lies idle. So a replica may have some of it beyond its promise, for as long as it is free:
//!
//! ```text
//! │ promised to this replica │ beyond that │ free │ the other replicas, likewise │ has to stay free │
//!                              at most 2  :  1
//! ```
//!
//! The driver says how much is free with each file that it makes, and a replica that has more than its promise asks after
//! each checkpoint and each second. That is all it knows of the others, and enough: it is the rule by which switches share
//! memory among queues (Choudhury and Hahne 1998). *n* replicas that want more than there is have two parts of 2*n* + 1
//! each, and one part stays free. A new replica begins with that part at once. What it takes is missing in what is free, so the others come down, and stand at what they were
//! promised when it has all that it was. Nothing turns over at a threshold: a little less free is a little less beyond.
//!
//! Files that are not ours count like replicas. When they, or what all replicas were promised, leave nothing free, a replica
//! gives a third of what it has beyond back each time that it asks.
//!
//! Up it goes at once. Down go free segments that nobody is about to use at once, and then half of what each checkpoint
//! frees: the other half is for the guest, so it goes on, however much there is to be given back. While a replica has more
//! than it should the cleaner does not wait for the guest to pay for it.

use super::Store;
use crate::types::PAGE_BYTES;

/// A replica may have so many times as much beyond its promise as it leaves free. More would leave a new replica less to
/// begin with, less would leave one that is alone in its pool half of what lies idle.
const BEYOND_PER_FREE: u64 = 2;
/// Of what is promised, one segment may be on its way, and a checkpoint and the cleaner each may hold one more while the
/// reserve is made anew.
const SEGMENTS_IN_HAND: u64 = 3;
/// A replica that has more than its promise looks so often whether it is still free.
const ASK_AFTER_MS: u64 = 1_000;

/// What a replica has beyond what was promised.
#[derive(Debug, Default)]
pub(super) struct Share {
    /// What it should have, by what was free when that was said last. `None`: nobody has said.
    fair_bytes: Option<u64>,
    /// What it may have: more than that while it comes down.
    bytes: u64,
    asked_ms: u64,
}

/// What placement sets aside for a replica of a volume of this size. The `size` of the API says the same.
pub fn promised_bytes(size: u64) -> u64 {
    size + size / 4 + (80 << 20)
}

/// What a replica should have beyond its promise that has so much of it, with so much free besides.
fn fair_bytes(beyond: u64, free: u64) -> u64 {
    beyond.saturating_add(free) / (BEYOND_PER_FREE + 1) * BEYOND_PER_FREE
}

impl Store {
    /// Bytes that the replica's own segments may take whatever the others do.
    fn promised_limit_bytes(&self) -> u64 {
        let in_hand = SEGMENTS_IN_HAND * self.superblock.geometry.segment_bytes;
        promised_bytes(self.placed_bytes()).saturating_sub(in_hand)
    }

    /// Bytes that the replica's own segments may take now. As long as nobody has said what is free, it keeps what it has.
    pub(super) fn limit_bytes(&self) -> u64 {
        let promised = self.promised_limit_bytes();
        match self.share.fair_bytes {
            Some(_) => promised.saturating_add(self.share.bytes),
            None => promised.max(self.own_bytes()),
        }
    }

    /// Bytes that they should take: others want the rest.
    pub(super) fn fair_limit_bytes(&self) -> u64 {
        match self.share.fair_bytes {
            Some(fair) => self.promised_limit_bytes().saturating_add(fair),
            None => self.limit_bytes(),
        }
    }

    /// Bytes that may be there with good reason: those of the volume, and what snapshots keep.
    fn placed_bytes(&self) -> u64 {
        self.size_bytes() + self.recent.catalog.pages() * PAGE_BYTES
    }

    /// Bytes of files that no other replica has.
    pub(super) fn own_bytes(&self) -> u64 {
        (self.segments.file_count() - self.segments.linked_count()) as u64 * self.superblock.geometry.segment_bytes
    }

    fn beyond_bytes(&self) -> u64 {
        self.own_bytes().saturating_sub(self.promised_limit_bytes())
    }

    /// So much of the pool is free for everybody.
    pub(super) fn pool_has(&mut self, free_bytes: u64) {
        let beyond = self.beyond_bytes();
        let fair = fair_bytes(beyond, free_bytes);
        let spare = self.segments_to_spare().saturating_sub(self.target() as u64);
        let needed = beyond.saturating_sub(spare * self.superblock.geometry.segment_bytes);
        // What it did not take, or does not use, is not missed.
        self.share.bytes = match self.share.fair_bytes {
            Some(_) => self.share.bytes.min(needed),
            None => needed,
        }
        .max(fair);
        self.share.fair_bytes = Some(fair);
        self.share.asked_ms = self.now_ms;
    }

    /// A checkpoint freed something: a step towards what is fair.
    pub(super) fn come_down(&mut self) {
        let step = self.segments_to_spare() / 2 * self.superblock.geometry.segment_bytes;
        if let Some(fair) = self.share.fair_bytes {
            let bytes = self.share.bytes.min(self.beyond_bytes());
            self.share.bytes = bytes.saturating_sub(step).max(fair);
        }
    }

    fn segments_to_spare(&self) -> u64 {
        self.segments.free_count().saturating_sub(self.reserve_target()) as u64
    }

    /// Asks if that was long ago and there is something to give back.
    pub(super) fn keep_to_share(&mut self) {
        if self.now_ms >= self.share.asked_ms + ASK_AFTER_MS && self.beyond_bytes() > 0 && !self.is_quiet() {
            self.ask_for_pool();
        }
    }

    /// Making a file tells what is free. A replica that makes none, because it has all that it may or finds enough to use
    /// again, makes one once more that is there.
    pub(super) fn ask_for_pool(&mut self) {
        let near = self.own_bytes() + self.superblock.geometry.segment_bytes > self.promised_limit_bytes();
        if near
            && !self.closing
            && self.segments.creating_count() == 0
            && self.segments.free_count() > self.supply.reserve + 1
            && let Some(id) = self.segments.begin_ask()
        {
            self.create_segment(id);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// So many replicas that want all they can get, one after the other, until nothing changes.
    fn shared(replicas: usize, idle: u64) -> Vec<u64> {
        let mut beyond = vec![0; replicas];
        for _ in 0..50 {
            for n in 0..replicas {
                beyond[n] = fair_bytes(beyond[n], idle.saturating_sub(beyond.iter().sum()));
            }
        }
        beyond
    }

    #[test]
    fn greedy_replicas_share_evenly_and_leave_half_of_a_share() {
        for replicas in [1, 2, 3, 10] {
            let idle = 1 << 40;
            let part = idle / (2 * replicas as u64 + 1);
            for beyond in shared(replicas, idle) {
                assert!(beyond.abs_diff(2 * part) < part / 50, "{replicas} replicas: {beyond}");
            }
        }
    }

    #[test]
    fn with_nothing_free_a_third_is_given_back_each_time() {
        assert_eq!(
            [fair_bytes(900, 0), fair_bytes(600, 0), fair_bytes(0, 0)],
            [600, 400, 0]
        );
        assert!(fair_bytes(u64::MAX, u64::MAX) > u64::MAX / 2);
    }
}
