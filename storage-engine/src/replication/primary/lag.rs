//! How far members are behind what was answered, where a write is answered before all of them have it.

use super::Primary;
use crate::types::Seq;

/// How far the member is behind that is furthest behind. Nothing where all members have a write before it is answered.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Lag {
    /// Completed writes that it does not have yet.
    pub writes: u64,
    /// Bytes of their payload.
    pub bytes: u64,
    /// Milliseconds since it said something of the stream last.
    pub ms: u64,
}

impl Primary {
    /// See [`Lag`]. Looks at all records that are kept to be sent again.
    pub fn lag(&self) -> Lag {
        let slowest = self.config.in_sync.iter().min_by_key(|id| self.acked_of(id));
        let Some(id) = slowest.filter(|_| self.is_serving()) else {
            return Lag::default();
        };
        let acked = self.acked_of(id);
        if acked >= self.written {
            return Lag::default();
        }
        let behind = self.replay.iter().filter(|batch| batch.last_seq() > acked);
        let behind = behind.take_while(|batch| batch.first_seq <= self.written);
        let since = self.members.get(id).and_then(|member| member.owes_write_ms);
        Lag {
            writes: self.written.0 - acked.0,
            bytes: behind.map(|batch| batch.payload_bytes()).sum(),
            ms: since.map_or(0, |since| self.now_ms.saturating_sub(since)),
        }
    }

    /// True if a member lacks a completed write.
    pub fn lags(&self) -> bool {
        self.config.in_sync.iter().any(|id| self.acked_of(id) < self.written)
    }

    fn acked_of(&self, id: &super::ReplicaId) -> Seq {
        self.members.get(id).map_or(Seq(0), |member| member.acked)
    }
}
