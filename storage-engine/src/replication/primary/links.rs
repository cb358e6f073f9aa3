//! What the connections to other nodes tell: hints, nothing is decided by them. Whoever cannot be reached is late after
//! as long as one that can be reached and says nothing.

use super::super::ReplicaId;
use super::{Phase, Primary};

impl Primary {
    /// The connection to this replica is new: what was on its way in an earlier one may be lost, and is sent again at
    /// once.
    pub fn connected(&mut self, replica: ReplicaId) {
        if self.is_over() {
            return;
        }
        if let Some(member) = self.members.get_mut(&replica) {
            (member.asked_ms, member.beat_ms, member.flush_asked_ms) = (0, 0, 0);
            member.gap = None;
            if member.streams() && member.acked >= member.base {
                member.sent = member.acked;
                self.pump(replica);
            }
        }
        if let Phase::Equalising(copiers) = &mut self.phase {
            copiers.iter_mut().for_each(|copier| copier.ask_soon(replica));
        }
        self.sync_soon(replica);
        self.reads_lost(replica);
        self.go_on();
    }

    /// The connection to this replica is gone, and with it what was on its way: reads go elsewhere.
    pub fn connection_lost(&mut self, replica: ReplicaId) {
        if self.is_over() {
            return;
        }
        self.reads_lost(replica);
        self.go_on();
    }
}
