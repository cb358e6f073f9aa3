//! A replica in sync that is to leave, because its disk is not to be trusted any more.
//!
//! First one more, then one fewer: it counts like any other until the one that was added in its place is in sync, too, and
//! only then it is recorded as out. What becomes of it there is for whoever asked.

use super::super::{Change, ReplicaId};
use super::Primary;

impl Primary {
    /// This replica is to leave when there is one more in sync than are wanted; `None`: all may stay.
    pub fn leave(&mut self, replica: Option<ReplicaId>) {
        self.leaving = replica;
        self.go_on();
    }

    /// With so many in sync nobody else is brought up to date.
    pub(super) fn wanted_in_sync(&self) -> usize {
        let leaves = self.leaving.is_some_and(|id| self.config.in_sync.contains(&id));
        self.options.replicas.saturating_add(usize::from(leaves))
    }

    pub(super) fn let_leave(&mut self) {
        let Some(id) = self.leaving.filter(|id| self.config.in_sync.contains(id)) else {
            return;
        };
        let gone = [id].into();
        let spare = self.config.in_sync.len() > self.options.replicas && self.enough_without(&gone);
        if spare && self.may_change() {
            let have = self.agreed;
            self.make(Change::Drop(gone, have));
        }
    }
}
