//! Which copies may be damaged so that nothing is lost.
//!
//! A volume survives damage as long as one clean copy of each block is left on a replica that is in sync. Whoever injects
//! faults, in a simulation or into the files of real replicas, keeps an [`Atlas`] beside the volume and asks before each
//! one: then every error that a guest sees is a fault of ours. It knows nothing of disks and replicas but what it is told.
//!
//! A copy counts when its replica is in sync, is not down, and has it clean on stable storage: what a power cut may still
//! take is no copy to rely on.

use std::collections::{BTreeMap, BTreeSet};

/// A replica, as whoever asks calls it.
pub type Replica = u64;

/// What is known of the copies of a volume.
#[derive(Clone, Debug, Default)]
pub struct Atlas {
    in_sync: BTreeSet<Replica>,
    down: BTreeSet<Replica>,
    /// For each block that was ever written, who has its newest version clean and durable.
    clean: BTreeMap<u64, BTreeSet<Replica>>,
}

impl Atlas {
    /// A new volume: these replicas are in sync, and all blocks are zeros.
    pub fn new(in_sync: impl IntoIterator<Item = Replica>) -> Self {
        Self {
            in_sync: in_sync.into_iter().collect(),
            ..Self::default()
        }
    }

    /// A block is being written: no copy of it can be relied upon until it is [`durable`](Self::durable) somewhere.
    pub fn written(&mut self, block: u64) {
        self.clean.insert(block, BTreeSet::new());
    }

    /// A replica has the newest version of a block on stable storage; because it was flushed, copied or mended.
    pub fn durable(&mut self, replica: Replica, block: u64) {
        self.clean.entry(block).or_default().insert(replica);
    }

    /// A replica is in sync again, with everything that the others have.
    pub fn joined(&mut self, replica: Replica) {
        self.in_sync.insert(replica);
    }

    /// A replica is recorded as out. What it has counts no more, and it may be damaged at will.
    pub fn left(&mut self, replica: Replica) {
        self.in_sync.remove(&replica);
        for clean in self.clean.values_mut() {
            clean.remove(&replica);
        }
    }

    /// A replica does not answer for now, but has lost nothing durable.
    pub fn went_down(&mut self, replica: Replica) {
        self.down.insert(replica);
    }

    pub fn came_back(&mut self, replica: Replica) {
        self.down.remove(&replica);
    }

    /// Whether a clean copy of this block can be read.
    pub fn is_readable(&self, block: u64) -> bool {
        self.others(block, None)
    }

    /// Whether a clean copy is left if this replica's is damaged.
    pub fn may_damage(&self, replica: Replica, block: u64) -> bool {
        !self.in_sync.contains(&replica) || self.others(block, Some(replica))
    }

    /// Whether every block has a clean copy elsewhere, so that this replica may go down.
    pub fn may_take_down(&self, replica: Replica) -> bool {
        let up = self.in_sync.iter().any(|&it| it != replica && !self.down.contains(&it));
        let relied_upon = |(block, clean): (&u64, &BTreeSet<Replica>)| {
            clean.contains(&replica) && !self.others(*block, Some(replica))
        };
        up && !self.clean.iter().any(relied_upon)
    }

    /// A replica's copy of a block is damaged from now on.
    ///
    /// # Panics
    ///
    /// If that is the last clean copy: ask [`may_damage`](Self::may_damage) first, or say with
    /// [`damage_all`](Self::damage_all) that errors are expected.
    pub fn damage(&mut self, replica: Replica, block: u64) {
        assert!(
            self.may_damage(replica, block),
            "replica {replica} has the last clean copy of block {block}"
        );
        self.forget(replica, block);
    }

    /// All copies of a block are damaged from now on, and reading it fails.
    pub fn damage_all(&mut self, block: u64) {
        self.clean.insert(block, BTreeSet::new());
    }

    /// The replicas whose copy of this block may be damaged now, one of them.
    pub fn candidates(&self, block: u64) -> impl Iterator<Item = Replica> {
        self.in_sync
            .iter()
            .copied()
            .filter(move |&replica| self.holds(replica, block) && self.may_damage(replica, block))
    }

    /// Zeros that were never written are on no disk, so nobody can damage them.
    fn holds(&self, replica: Replica, block: u64) -> bool {
        self.clean.get(&block).is_some_and(|clean| clean.contains(&replica))
    }

    fn forget(&mut self, replica: Replica, block: u64) {
        if let Some(clean) = self.clean.get_mut(&block) {
            clean.remove(&replica);
        }
    }

    /// Whether a clean copy can be read from somebody else than this one.
    fn others(&self, block: u64, but: Option<Replica>) -> bool {
        let counts =
            |replica: &Replica| Some(*replica) != but && self.in_sync.contains(replica) && !self.down.contains(replica);
        match self.clean.get(&block) {
            Some(clean) => clean.iter().any(counts),
            None => self.in_sync.iter().any(counts),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Three replicas have a block on stable storage.
    fn three() -> Atlas {
        let mut atlas = Atlas::new([1, 2, 3]);
        atlas.written(7);
        (1..=3).for_each(|replica| atlas.durable(replica, 7));
        atlas
    }

    #[test]
    fn all_copies_but_one_may_be_damaged() {
        let mut atlas = three();
        atlas.damage(2, 7);
        atlas.damage(1, 7);
        assert_eq!(atlas.candidates(7).count(), 0);
        assert!(atlas.is_readable(7) && !atlas.may_damage(3, 7));
        atlas.durable(1, 7);
        assert_eq!(
            atlas.candidates(7).collect::<Vec<_>>(),
            [1, 3],
            "a copy that was mended counts"
        );
    }

    #[test]
    #[should_panic(expected = "replica 3 has the last clean copy of block 7")]
    fn the_last_copy_is_not_damaged_by_mistake() {
        let mut atlas = three();
        (1..=3).for_each(|replica| atlas.damage(replica, 7));
    }

    #[test]
    fn a_replica_that_is_out_or_down_is_no_copy_to_rely_on() {
        let mut atlas = three();
        atlas.left(1);
        atlas.went_down(2);
        assert!(!atlas.may_damage(3, 7) && !atlas.may_take_down(3));
        assert!(atlas.may_damage(1, 7), "nobody needs what it has");
        atlas.came_back(2);
        assert!(atlas.may_damage(3, 7) && atlas.may_take_down(3));
        atlas.joined(1);
        atlas.damage(3, 7);
        assert!(
            !atlas.may_damage(2, 7),
            "replica 1 is in sync again, but was not seen to have it"
        );
    }

    #[test]
    fn what_is_not_flushed_may_not_be_damaged_at_all() {
        let mut atlas = three();
        atlas.written(7);
        assert!((1..=3).all(|replica| !atlas.may_damage(replica, 7)));
        atlas.durable(2, 7);
        assert!(atlas.may_damage(1, 7) && !atlas.may_damage(2, 7));
    }

    #[test]
    fn a_replica_may_go_down_when_others_have_all_that_it_has() {
        let mut atlas = three();
        atlas.damage(1, 7);
        assert!(atlas.may_take_down(2));
        atlas.written(8);
        atlas.durable(2, 8);
        assert!(!atlas.may_take_down(2), "it alone has block 8");
        assert!(Atlas::new([1, 2]).may_take_down(1));
        assert!(!Atlas::new([1]).may_take_down(1), "somebody must be left");
    }

    #[test]
    fn whatever_is_asked_for_a_clean_copy_is_left() {
        let mut seed = 1u64;
        let mut below = |limit: u64| {
            seed = seed.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
            (seed >> 33) % limit
        };
        let mut atlas = Atlas::new([0, 1, 2]);
        let mut damaged = 0;
        for block in 0..4 {
            atlas.written(block);
            (0..3).for_each(|replica| atlas.durable(replica, block));
        }
        for _ in 0..100_000 {
            let (replica, block) = (below(3), below(4));
            match below(6) {
                0 if atlas.may_damage(replica, block) => {
                    atlas.damage(replica, block);
                    damaged += 1;
                }
                1 => atlas.durable(replica, block),
                2 if atlas.may_take_down(replica) => atlas.went_down(replica),
                3 => atlas.came_back(replica),
                4 if atlas.may_take_down(replica) => atlas.left(replica),
                5 => atlas.joined(replica),
                _ => {}
            }
            assert!((0..4).all(|block| atlas.is_readable(block)), "{atlas:?}");
        }
        assert!(damaged > 1_000);
    }
}
