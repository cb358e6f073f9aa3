//! Mending: what does not pass its check on one replica is written there anew as another one has it.
//!
//! A read of the guest finds damage, or the scrub of a replica does, which then names it with every beat until it is
//! mended. Nothing here has to arrive: whatever is lost is named again.

use std::collections::{BTreeMap, BTreeSet};

use super::super::ReplicaId;
use super::super::message::{Ask, Stored};
use super::super::timing::MEMBER_TIMEOUT_MS;
use super::Primary;
use super::reads::Read;
use crate::types::Lba;

/// A block that could not be mended is tried again after so long.
const TRY_AGAIN_MS: u64 = 2 * MEMBER_TIMEOUT_MS;
/// Orders to mend whose end is waited for; the oldest are forgotten.
const ORDERS_MAX: usize = 256;

/// What is being mended.
#[derive(Debug, Default)]
pub(super) struct Mends {
    /// Blocks that a replica named, and since when they are looked for elsewhere.
    named: BTreeMap<(ReplicaId, Lba), u64>,
    /// Orders, and where they went.
    orders: BTreeMap<u64, ReplicaId>,
    mended: u64,
}

impl Primary {
    /// Blocks that were written anew on some replica, because they did not pass their check there.
    pub fn mended(&self) -> u64 {
        self.mends.mended
    }

    /// A replica has found damage.
    pub(super) fn damaged(&mut self, from: ReplicaId, blocks: &[Lba]) {
        let now_ms = self.now_ms;
        if !self.is_serving() {
            return;
        }
        let named = &mut self.mends.named;
        named.retain(|_, since_ms| now_ms < *since_ms + TRY_AGAIN_MS);
        for lba in blocks {
            named.entry((from, *lba)).or_insert_with(|| {
                self.reads.waiting.push(Read::to_mend(*lba, from));
                now_ms
            });
        }
    }

    /// What passed its check here is written where it did not, in the same version (I15).
    pub(super) fn mend(&mut self, good: &Stored, damaged_at: BTreeSet<ReplicaId>) {
        for replica in damaged_at {
            let id = self.id();
            let blocks = vec![good.clone()];
            let repair = true;
            self.ask(replica, Ask::Copy { id, repair, blocks });
            self.mends.orders.insert(id, replica);
            if self.mends.orders.len() > ORDERS_MAX {
                self.mends.orders.pop_first();
            }
        }
    }

    /// An order to copy ended.
    pub(super) fn mend_ended(&mut self, from: ReplicaId, order: u64, done: &Result<(), String>) {
        if self.mends.orders.get(&order) == Some(&from) {
            self.mends.orders.remove(&order);
            self.mends.mended += u64::from(done.is_ok());
        }
    }
}
