//! Mistakes one could make with this protocol. Each must break an invariant, or the model would not have noticed.

macro_rules! mutants {
    ($($(#[doc = $text:literal])+ $name:ident,)+) => {
        /// One rule of the protocol left out.
        #[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
        pub enum Mutant {
            $($(#[doc = $text])+ $name,)+
        }

        impl Mutant {
            pub const ALL: &[Mutant] = &[$(Mutant::$name,)+];
        }
    };
}

mutants! {
    /// A member that does not answer is left out of the count as soon as its removal is asked for.
    AckBeforeCas,
    /// A change whose answer is lost is taken for made.
    UnknownIsSuccess,
    /// A change whose answer is lost is taken for not made.
    UnknownIsFailure,
    /// It is taken for not made when the object, read again, has not changed: it may still be on its way.
    SettledByReading,
    /// Writes wait for the set as it was last known, not for everybody who may be in it.
    AckOfKnownOnly,
    /// The same for leases.
    LeaseOfKnownOnly,
    /// A replica promises from memory.
    PromiseNotDurable,
    /// A replica takes messages of older epochs.
    OlderEpochTaken,
    /// A process that starts again goes on in its predecessor's epoch, and replicas look at the epoch alone.
    EpochUsedAgain,
    /// A replica takes a write although it has not the one before.
    GapTaken,
    /// A replica confirms a flush of writes that it does not have (any more).
    FlushUnchecked,
    /// A flush covers what was completed when it ended, not when it began.
    FlushTakenLate,
    /// Writes complete with fewer members than the minimum.
    MinimumIgnored,
    /// A new primary serves as soon as all have promised.
    NotEqualised,
    /// A new primary takes whoever has the longest log, in sync or not.
    LongestLogPromoted,
    /// A new primary goes on without a silent member before that one is recorded as out.
    LeftOutBeforeCas,
    /// The guest's engine starts again from members that all lost power, although another one did not.
    ResumedFromCut,
    /// A replica promises although its lease to the older primary may still be valid.
    LeaseNotAwaited,
    /// A replica that starts again has forgotten the lease it gave, and does not wait.
    LeaseForgotten,
    /// A primary looks at its leases before it reads, not afterwards.
    LeaseCheckedEarly,
    /// A block is read from any member while a write to it is on its way.
    ReadBesideWrite,
    /// A member that lost power is read from before it has been given again what it lost.
    ReadBeforeReplay,
    /// Reads are served by a replica that is still being copied to.
    ReadWhileSyncing,
    /// A replica that comes back keeps what it wrote beyond the end of an epoch.
    DivergentKept,
    /// A copy replaces what is there, newer or not.
    CopyUnguarded,
    /// Copies are read from a member that has not got yet what came before the first live write.
    CopiedFromBehind,
    /// A replica is let in although its copies brought newer versions than its live writes have reached.
    AdmittedBehindCopies,
    /// A replica is let in before it has flushed.
    AdmittedUnflushed,
    /// A replica is let in although a guest's flush was completed after its own.
    AdmittedFlushedEarly,
    /// A replica is let in with live writes still missing that were completed without it.
    AdmittedLagging,
}
