//! One operation at a time per volume, and none on a volume on which something hangs.
//!
//! An operation runs as a task of its own that holds the guard: a caller that gives up (its deadline passed, its
//! connection broke) does not stop a half-made file system, and its retry is told what is still going on. The guard
//! itself is never held for ever, because everything that can hang inside has a deadline; what does not even die is
//! remembered in [`HungChildren`] and refuses the volume here, until the kernel lets it go. No other volume notices.

use std::collections::HashMap;
use std::future::Future;
use std::sync::{Arc, Mutex, PoisonError};

use tokio::time::Instant;

use crate::mount::HungChildren;

/// The guards of all volumes. Cheap to clone.
#[derive(Debug, Clone, Default)]
pub struct Guards {
    busy: Arc<Mutex<HashMap<String, (String, Instant)>>>,
    hung: HungChildren,
}

/// Held while an operation works on a volume.
#[derive(Debug)]
#[must_use = "the volume is free again as soon as this is dropped"]
pub struct Guard {
    busy: Arc<Mutex<HashMap<String, (String, Instant)>>>,
    volume: String,
}

impl Drop for Guard {
    fn drop(&mut self) {
        self.busy
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .remove(&self.volume);
    }
}

/// Why an operation gave no result of its own.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Unguarded {
    /// Something else is at work on the volume, or hangs; the text says what.
    Busy(String),
    /// The deadline passed; the operation goes on.
    GoesOn(String),
    /// The operation panicked.
    Broke(String),
}

impl Guards {
    pub fn new(hung: HungChildren) -> Guards {
        Guards {
            busy: Arc::default(),
            hung,
        }
    }

    pub fn hung(&self) -> &HungChildren {
        &self.hung
    }

    /// Takes the volume, or says who has it.
    pub fn enter(&self, volume: &str, what: &str) -> Result<Guard, String> {
        if let Some(hangs) = self.hung.of(volume) {
            return Err(hangs);
        }
        let mut busy = self.busy.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some((other, since)) = busy.get(volume) {
            return Err(format!(
                "{other} of volume {volume} has been going on for {} s",
                since.elapsed().as_secs()
            ));
        }
        busy.insert(volume.to_owned(), (what.to_owned(), Instant::now()));
        Ok(Guard {
            busy: self.busy.clone(),
            volume: volume.to_owned(),
        })
    }

    /// Runs an operation under the guard, and waits for it until the deadline.
    pub async fn run<T: Send + 'static>(
        &self,
        volume: &str,
        what: &str,
        deadline: Instant,
        operation: impl Future<Output = T> + Send + 'static,
    ) -> Result<T, Unguarded> {
        let guard = self.enter(volume, what).map_err(Unguarded::Busy)?;
        let task = tokio::spawn(async move {
            let outcome = operation.await;
            drop(guard);
            outcome
        });
        match tokio::time::timeout_at(deadline, task).await {
            Ok(Ok(outcome)) => Ok(outcome),
            Ok(Err(join)) => Err(Unguarded::Broke(format!("{what} of volume {volume} broke off: {join}"))),
            Err(_) => {
                let hangs = self
                    .hung
                    .of(volume)
                    .map(|hangs| format!(": {hangs}"))
                    .unwrap_or_default();
                Err(Unguarded::GoesOn(format!(
                    "{what} of volume {volume} takes longer than this call; it goes on{hangs}"
                )))
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    #[tokio::test]
    async fn a_second_operation_on_a_volume_is_told_what_goes_on_and_others_are_free() {
        let guards = Guards::default();
        let guard = guards.enter("v", "staging").unwrap();
        let busy = guards.enter("v", "publishing").unwrap_err();
        assert!(busy.contains("staging of volume v"), "{busy}");
        let _other = guards.enter("w", "staging").unwrap();
        drop(guard);
        let _again = guards.enter("v", "publishing").unwrap();
    }

    #[tokio::test]
    async fn an_operation_outlives_its_caller_and_keeps_the_guard_until_it_ends() {
        let guards = Guards::default();
        let (go, gone) = tokio::sync::oneshot::channel::<()>();
        let operation = async move { gone.await.unwrap() };
        let gave_up = guards
            .run("v", "staging", Instant::now() + Duration::from_millis(10), operation)
            .await;
        assert!(matches!(gave_up, Err(Unguarded::GoesOn(_))), "{gave_up:?}");
        assert!(guards.enter("v", "x").is_err());
        go.send(()).unwrap();
        while guards.enter("v", "x").is_err() {
            tokio::task::yield_now().await;
        }
    }

    #[tokio::test]
    async fn an_operation_that_panics_gives_the_volume_back() {
        let guards = Guards::default();
        let deadline = Instant::now() + Duration::from_secs(60);
        let broke = guards
            .run("v", "staging", deadline, async { panic!("on purpose") })
            .await;
        assert!(matches!(broke, Err::<(), _>(Unguarded::Broke(_))));
        let _free = guards.enter("v", "x").unwrap();
    }
}
