//! Sets of replicas, and sets of such sets, as bits.

/// Replicas there can be.
pub const REPLICAS: usize = 3;

/// Some of the replicas.
#[derive(Clone, Copy, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Set(pub u8);

impl Set {
    /// The first `count` replicas.
    pub fn first(count: usize) -> Self {
        Self((1 << count) - 1)
    }

    pub fn contains(self, replica: usize) -> bool {
        self.0 & 1 << replica != 0
    }

    #[must_use]
    pub fn with(self, replica: usize) -> Self {
        Self(self.0 | 1 << replica)
    }

    #[must_use]
    pub fn without(self, replica: usize) -> Self {
        Self(self.0 & !(1 << replica))
    }

    #[must_use]
    pub fn union(self, other: Self) -> Self {
        Self(self.0 | other.0)
    }

    #[must_use]
    pub fn intersection(self, other: Self) -> Self {
        Self(self.0 & other.0)
    }

    pub fn is_subset(self, other: Self) -> bool {
        self.0 & !other.0 == 0
    }

    pub fn is_empty(self) -> bool {
        self.0 == 0
    }

    pub fn len(self) -> usize {
        self.0.count_ones() as usize
    }

    pub fn iter(self) -> impl Iterator<Item = usize> {
        (0..REPLICAS).filter(move |&replica| self.contains(replica))
    }

    /// What `order` calls its first is replica 0 of the result, and so on.
    #[must_use]
    pub fn renamed(self, order: [usize; REPLICAS]) -> Self {
        Self(
            order
                .iter()
                .enumerate()
                .fold(0, |bits, (new, &old)| bits | u8::from(self.contains(old)) << new),
        )
    }
}

impl std::fmt::Debug for Set {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_set().entries(self.iter()).finish()
    }
}

/// Some of the in-sync sets there can be: one bit for each of the eight.
#[derive(Clone, Copy, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Sets(pub u8);

impl Sets {
    pub fn contains(self, set: Set) -> bool {
        self.0 & 1 << set.0 != 0
    }

    #[must_use]
    pub fn with(self, set: Set) -> Self {
        Self(self.0 | 1 << set.0)
    }

    pub fn is_empty(self) -> bool {
        self.0 == 0
    }

    pub fn len(self) -> usize {
        self.0.count_ones() as usize
    }

    pub fn iter(self) -> impl Iterator<Item = Set> {
        (0..1 << REPLICAS).map(Set).filter(move |&set| self.contains(set))
    }

    /// Whoever is in one of them.
    pub fn union(self) -> Set {
        self.iter().fold(Set::default(), Set::union)
    }

    #[must_use]
    pub fn renamed(self, order: [usize; REPLICAS]) -> Self {
        self.iter()
            .fold(Self::default(), |sets, set| sets.with(set.renamed(order)))
    }
}

impl std::fmt::Debug for Sets {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_set().entries(self.iter()).finish()
    }
}
