//! What must be true of a write before it is answered.
//!
//! The protocol is the same for all volumes: the stream goes to all members in one order, a flush is answered when all of
//! them have everything on stable storage, and whoever takes over begins with the longest log. They differ in when a
//! *write* is answered, and in which members are enough for that.

use std::collections::{BTreeMap, BTreeSet};

use super::ReplicaId;

/// See the module.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Concern {
    /// With fewer members no write completes; counts as 1 at least.
    pub min_in_sync: usize,
    /// Members must stand in so many zones, or no write completes. 0 or 1: wherever they stand.
    pub min_zones: usize,
    /// Who must have a write in its log.
    pub copies: Copies,
}

/// Who must have a write in its log before it is answered.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Copies {
    /// Every member. So nothing that was answered is lost while one of them lives.
    All,
    /// One member; the others follow. What no flush covered may be lost with the member that was first and the primary
    /// together: then the volume goes on as it was a moment before, with nothing missing in between.
    ///
    /// Nobody else's word stands between a primary that was cut off and its guest, so it completes a write only while all
    /// members are bound to its epoch, like a read.
    First,
}

/// Where replicas stand. One of which it is not known stands in no zone that counts.
pub type Zones = BTreeMap<ReplicaId, String>;

impl Concern {
    /// Every member has a write before it is answered, wherever they stand.
    pub fn replicated(min_in_sync: usize) -> Concern {
        Concern {
            min_in_sync,
            min_zones: 1,
            copies: Copies::All,
        }
    }

    /// How many members it takes.
    pub fn least(&self) -> usize {
        self.min_in_sync.max(1)
    }

    /// Why these are not enough members, if they are not.
    pub fn lacks(&self, members: &BTreeSet<ReplicaId>, zones: &Zones) -> Option<Lack> {
        if members.len() < self.least() {
            return Some(Lack::Members(self.least()));
        }
        let stand: BTreeSet<&String> = members.iter().filter_map(|id| zones.get(id)).collect();
        (self.min_zones > 1 && stand.len() < self.min_zones).then_some(Lack::Zones(self.min_zones))
    }
}

/// What is missing for a write to be answered.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Lack {
    /// There are fewer members than this.
    Members(usize),
    /// They stand in fewer zones than this.
    Zones(usize),
}

#[cfg(test)]
mod tests {
    use super::*;

    fn ids(ids: &[u8]) -> BTreeSet<ReplicaId> {
        ids.iter().map(|n| ReplicaId([*n; 16])).collect()
    }

    #[test]
    fn members_are_enough_if_there_are_as_many_and_in_as_many_known_zones_as_asked_for() {
        let zones = [(1, "a"), (2, "a"), (3, "b")];
        let zones: Zones = zones.map(|(n, zone)| (ReplicaId([n; 16]), zone.into())).into();
        let concern = Concern {
            min_zones: 2,
            ..Concern::replicated(2)
        };
        assert_eq!(concern.lacks(&ids(&[1, 3]), &zones), None);
        assert_eq!(concern.lacks(&ids(&[3]), &zones), Some(Lack::Members(2)));
        assert_eq!(concern.lacks(&ids(&[1, 2]), &zones), Some(Lack::Zones(2)));
        // Nobody knows where the fourth one stands: it may be beside the first.
        assert_eq!(concern.lacks(&ids(&[1, 4]), &zones), Some(Lack::Zones(2)));
        assert_eq!(Concern::replicated(2).lacks(&ids(&[1, 4]), &Zones::new()), None);
        assert_eq!(Concern::replicated(0).lacks(&ids(&[]), &zones), Some(Lack::Members(1)));
    }
}
