//! Mistakes that can be switched on, so that it can be seen that the simulator would catch them.
//!
//! A check that has never failed proves little. Each mutant is one line of the protocol done wrong, as others did it wrong
//! before; a production build never has one on, and asking costs one test of a bit.

/// One mistake.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
#[repr(u8)]
pub enum Mutant {
    /// A write completes before the member that missed it is recorded as out.
    CompleteBeforeRecord,
    /// A change with an unknown outcome counts as made.
    UnknownIsMade,
    /// A change with an unknown outcome counts as not made.
    UnknownIsNotMade,
    /// What an earlier start of a replica said counts for a later one.
    BootIgnored,
    /// A replica joins before what was copied is on its stable storage.
    JoinBeforeFlush,
    /// A replica appends behind a gap.
    GapAllowed,
    /// A copied block replaces a newer one.
    CopyWithoutVersions,
    /// Zeroes are not copied.
    ZeroesNotCopied,
    /// A flush is answered, and nobody is asked to flush.
    FlushTooEarly,
    /// Members are not made equal when an epoch begins.
    NotEqualised,
    /// The lease counts from when the answer came.
    LeaseFromAnswer,
    /// Reads are answered whatever the leases say.
    LeaseNotLookedAt,
    /// The lease is not waited for before a promise.
    LeaseIgnored,
    /// Writes that overlap one that is under way are read around.
    ReadBesideWrite,
    /// Reads are served by a replica that is catching up.
    ReadFromSyncing,
    /// A member that is left behind is kept although what it missed is gone from memory.
    ReplayForgotten,
    /// The end of an epoch is not settled on the members.
    EndNotSettled,
    /// Checkpoints do not wait until what they hold is durable everywhere.
    NoGate,
    /// A deposed primary goes on.
    NeverDeposed,
    /// Fewer members than the volume wants complete a write.
    BelowMinimum,
    /// A write that the first member has is completed whatever the leases say.
    FirstUnbound,
}

impl Mutant {
    /// All there are.
    pub const ALL: [Mutant; 21] = [
        Mutant::CompleteBeforeRecord,
        Mutant::UnknownIsMade,
        Mutant::UnknownIsNotMade,
        Mutant::BootIgnored,
        Mutant::JoinBeforeFlush,
        Mutant::GapAllowed,
        Mutant::CopyWithoutVersions,
        Mutant::ZeroesNotCopied,
        Mutant::FlushTooEarly,
        Mutant::NotEqualised,
        Mutant::LeaseFromAnswer,
        Mutant::LeaseNotLookedAt,
        Mutant::LeaseIgnored,
        Mutant::ReadBesideWrite,
        Mutant::ReadFromSyncing,
        Mutant::ReplayForgotten,
        Mutant::EndNotSettled,
        Mutant::NoGate,
        Mutant::NeverDeposed,
        Mutant::BelowMinimum,
        Mutant::FirstUnbound,
    ];
}

/// Those that are on. None, but in tests of the tests.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Mutants(u32);

impl Mutants {
    /// None is on.
    pub const NONE: Mutants = Mutants(0);

    /// Only this one.
    pub fn only(mutant: Mutant) -> Mutants {
        Mutants(1 << mutant as u8)
    }

    /// True if it is on.
    pub fn has(self, mutant: Mutant) -> bool {
        self.0 & 1 << mutant as u8 != 0
    }
}
