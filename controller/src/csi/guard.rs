//! One call per volume at a time.
//!
//! The specification lets a plugin answer ABORTED to a second call for the same volume, and that is kinder than a queue:
//! the caller comes back later with its newest wish.

use std::{
    collections::HashSet,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};

use crate::error::{Error, Kind, Result};

/// The volumes that have a call under way in this process.
#[derive(Clone, Debug, Default)]
pub struct Guards {
    busy: Arc<Mutex<HashSet<String>>>,
}

/// Permission to work on one volume, given back when dropped.
#[derive(Debug)]
pub struct Guard {
    guards: Guards,
    volume: String,
}

impl Guards {
    pub fn take(&self, volume: &str) -> Result<Guard> {
        if !self.lock().insert(volume.to_string()) {
            let text = format!("another call for volume {volume} is under way; try again");
            return Err(Error::new(Kind::Busy, text));
        }
        Ok(Guard {
            guards: self.clone(),
            volume: volume.to_string(),
        })
    }

    fn lock(&self) -> MutexGuard<'_, HashSet<String>> {
        // Each critical section is one call on the set, so a panic in between cannot leave it half-changed.
        self.busy.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Drop for Guard {
    fn drop(&mut self) {
        self.guards.lock().remove(&self.volume);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_second_concurrent_call_for_the_same_volume_is_aborted() {
        let guards = Guards::default();
        let first = guards.take("v").expect("nobody else");
        assert_eq!(guards.take("v").expect_err("one is under way").kind, Kind::Busy);
        assert!(guards.take("w").is_ok(), "another volume is not concerned");
        drop(first);
        assert!(guards.take("v").is_ok());
    }
}
