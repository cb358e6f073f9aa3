//! Waits between attempts that grow: for what fails again as soon as it is tried again.
//!
//! The queue's own waits end when an object changes, and our attempts change objects.

use tokio::time::{Duration, Instant};

/// The first wait; it doubles with each further failure.
const WAIT_MIN: Duration = Duration::from_secs(1);
/// The longest wait.
const WAIT_MAX: Duration = Duration::from_secs(60);

/// How often something failed lately, and when it may be tried again.
#[derive(Debug, Clone, Copy)]
pub struct Patience {
    wait: Duration,
    until: Instant,
}

impl Patience {
    /// After a failure; `before` is what was there of earlier ones.
    pub fn after_failure(before: Option<Patience>) -> Patience {
        let wait = before.map_or(WAIT_MIN, |before| (before.wait * 2).min(WAIT_MAX));
        Patience {
            wait,
            until: Instant::now() + wait,
        }
    }

    /// How long it is still to be waited.
    pub fn remaining(&self) -> Option<Duration> {
        let left = self.until.saturating_duration_since(Instant::now());
        (left > Duration::ZERO).then_some(left)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn waits_double_up_to_a_minute() {
        let mut last = Patience::after_failure(None);
        assert!(last.remaining().is_some_and(|left| left <= WAIT_MIN));
        for _ in 0..10 {
            let next = Patience::after_failure(Some(last));
            assert!(next.wait == WAIT_MAX || next.wait == last.wait * 2);
            last = next;
        }
        assert_eq!(last.wait, WAIT_MAX);
    }
}
