//! A pool without room: writes wait for it, unless somebody would rather have them refused.
//!
//! An error here turns the file system of a guest read-only, and it stays so after somebody has made room. Waiting
//! costs nothing but time: the store asks the pool again and again, and the writes go on by themselves. Meanwhile reads
//! are served, and so are zeroes and trims, which go ahead of the writes because they give space back.

use std::collections::VecDeque;

use super::{Backing, Volume, Waiting};
use crate::request::RequestError;
use crate::store::{Room, WRITES_MAX};

/// What becomes of writes that find no room in the pool.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum WhenFull {
    /// They wait until there is room.
    #[default]
    Wait,
    /// They are refused with [`RequestError::NoSpace`] once there has been none for so long.
    RefuseAfter { ms: u64 },
}

/// What a volume does about a full pool, and since when it does.
#[derive(Debug, Default)]
pub(super) struct Full {
    policy: WhenFull,
    since_ms: Option<u64>,
}

impl<B: Backing> Volume<B> {
    /// Chooses what becomes of writes that find no room.
    pub fn when_full(mut self, policy: WhenFull) -> Self {
        self.full.policy = policy;
        self
    }

    /// True while writes wait for room in the pool.
    pub fn waits_for_space(&self) -> bool {
        self.full.since_ms.is_some() && !self.waiting.is_empty()
    }

    /// There is room for writes.
    pub(super) fn found_room(&mut self) {
        self.full.since_ms = None;
    }

    /// There is no room for the next writes. Sends what needs none, and refuses what may not wait.
    pub(super) fn no_room(&mut self) {
        let since_ms = *self.full.since_ms.get_or_insert(self.now_ms);
        let (zeroes, writes): (VecDeque<Waiting>, VecDeque<Waiting>) = std::mem::take(&mut self.waiting)
            .into_iter()
            .partition(|write| write.entry.zero);
        let refused = match self.full.policy {
            WhenFull::RefuseAfter { ms } if self.now_ms >= since_ms + ms => true,
            // Nobody is left who could wait.
            _ => self.closing,
        };
        let mut left = zeroes.len();
        self.waiting = zeroes;
        if refused {
            for write in writes {
                self.refuse(write.owner, RequestError::NoSpace);
            }
        } else {
            self.waiting.extend(writes);
        }
        while left > 0 {
            match self.store.room(0, true) {
                Room::Ready => {
                    let count = left.min(WRITES_MAX);
                    self.send_record(count, 0);
                    left -= count;
                }
                Room::Wait => return,
                Room::NoSpace => break,
            }
        }
        if refused {
            // Zeroes that found no room either.
            for write in self.waiting.drain(..left).collect::<Vec<_>>() {
                self.refuse(write.owner, RequestError::NoSpace);
            }
        }
    }
}
