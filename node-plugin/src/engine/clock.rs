//! The shards' clock: milliseconds since the machine was started, the time that it slept included. Leases between nodes
//! run out while one of them sleeps, so a clock that stops then would let it believe in one that is over.

use nix::time::{ClockId, clock_gettime};

/// The time.
pub(super) fn now_ms() -> u64 {
    let now = clock_gettime(ClockId::CLOCK_BOOTTIME).expect("Linux has this clock");
    let (seconds, nanoseconds) = (now.tv_sec(), now.tv_nsec());
    u64::try_from(seconds * 1000 + nanoseconds / 1_000_000).expect("time is not negative")
}
