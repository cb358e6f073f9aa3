//! Giving memory back after a burst.
//!
//! The C library keeps what was freed for the next time, in an arena for each thread, and by itself gives back only what
//! lies at an arena's end. After a burst a node plugin held seven to ten megabytes that it did not use, for good. Asking
//! for them takes a moment in which threads that allocate wait, so it is done when the guests are at rest, and once.

use std::sync::Arc;
use std::time::Duration;

use super::NodeEngine;
use crate::engine::give_back_freed_memory;

const LOOK_EVERY: Duration = Duration::from_secs(10);

/// Looks for rest for ever.
pub async fn give_memory_back(engine: Arc<dyn NodeEngine>) {
    let mut rest = Rest::default();
    loop {
        tokio::time::sleep(LOOK_EVERY).await;
        if rest.begins(served(engine.as_ref())) {
            // A panic cannot be: there is nothing in it. Whoever is told of one could do nothing either.
            let _ = tokio::task::spawn_blocking(give_back_freed_memory).await;
        }
    }
}

/// Everything that was ever asked of the volumes that are here.
fn served(engine: &dyn NodeEngine) -> u64 {
    let all = engine.metrics();
    all.iter().map(|(_, of)| of.reads + of.writes + of.flushes).sum()
}

/// Notices that nothing is asked any more.
#[derive(Debug, Default)]
struct Rest {
    last: Option<u64>,
    known: Option<u64>,
}

impl Rest {
    /// Whether the count has come to a stop since the last time that it had.
    fn begins(&mut self, count: u64) -> bool {
        let still = self.last.replace(count) == Some(count);
        still && self.known.replace(count) != Some(count)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rest_begins_once_after_each_burst() {
        let mut rest = Rest::default();
        let looks = [0, 0, 0, 5, 9, 9, 9, 9, 10, 10].map(|count| rest.begins(count));
        assert_eq!(
            looks,
            [false, true, false, false, false, true, false, false, false, true]
        );
    }
}
