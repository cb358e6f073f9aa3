//! A queue of things to look at: each at most once at a time, again when it was woken meanwhile, and again later when
//! it failed.
//!
//! Every thing that is known has a task that sleeps until it is woken, so one that hangs holds up nobody else, and an
//! idle node costs no CPU.

use std::collections::HashMap;
use std::fmt::Debug;
use std::hash::Hash;
use std::sync::{Arc, Mutex, OnceLock, PoisonError};
use std::time::Duration;

use futures::future::BoxFuture;
use tokio::sync::Notify;

/// The first wait after a failure; it doubles with each further one.
const BACKOFF_MIN: Duration = Duration::from_millis(500);
/// The longest wait. What needs a person is looked at this often without anybody asking.
const BACKOFF_MAX: Duration = Duration::from_secs(60);

/// What follows a look that succeeded.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Next {
    /// Nothing, until it is woken.
    Wait,
    /// Another look after this time, or when it is woken.
    Again(Duration),
    /// It does not exist any more.
    Gone,
}

/// A look that failed.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Retry {
    /// Somebody else was faster, or is at work: look again at once, or nearly so.
    Soon(String),
    /// Look again with growing patience.
    Later(String),
}

type Work<K> = dyn Fn(K) -> BoxFuture<'static, Result<Next, Retry>> + Send + Sync;

/// The queue. Cheap to clone.
#[derive(Clone)]
pub struct Queue<K> {
    inner: Arc<Inner<K>>,
}

struct Inner<K> {
    slots: Mutex<HashMap<K, Arc<Slot>>>,
    work: OnceLock<Box<Work<K>>>,
    stopped: std::sync::atomic::AtomicBool,
}

#[derive(Default)]
struct Slot {
    woken: std::sync::atomic::AtomicBool,
    bell: Notify,
}

impl<K> Default for Queue<K> {
    fn default() -> Queue<K> {
        Queue {
            inner: Arc::new(Inner {
                slots: Mutex::default(),
                work: OnceLock::new(),
                stopped: Default::default(),
            }),
        }
    }
}

impl<K: Debug> Debug for Queue<K> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Queue").finish_non_exhaustive()
    }
}

impl<K: Clone + Debug + Eq + Hash + Send + Sync + 'static> Queue<K> {
    /// Says what a look is. Wakes that came before are forgotten: whoever starts the queue wakes everything.
    pub fn start(&self, work: impl Fn(K) -> BoxFuture<'static, Result<Next, Retry>> + Send + Sync + 'static) {
        let first = self.inner.work.set(Box::new(work)).is_ok();
        assert!(first, "a queue is started once");
    }

    /// Has this looked at, after the look that may be under way.
    pub fn wake(&self, key: K) {
        if self.inner.work.get().is_none() {
            return;
        }
        let mut slots = self.inner.slots.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(slot) = slots.get(&key) {
            slot.wake();
            return;
        }
        let slot = Arc::new(Slot::default());
        slot.wake();
        slots.insert(key.clone(), slot.clone());
        tokio::spawn(run(self.inner.clone(), key, slot));
    }

    /// Begins no further look. One that is under way goes on.
    pub fn stop(&self) {
        self.inner.stopped.store(true, std::sync::atomic::Ordering::Release);
    }

    /// How many things are known: a metric.
    pub fn len(&self) -> usize {
        self.inner.slots.lock().unwrap_or_else(PoisonError::into_inner).len()
    }

    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }
}

impl Slot {
    fn wake(&self) {
        self.woken.store(true, std::sync::atomic::Ordering::Release);
        self.bell.notify_one();
    }

    fn take(&self) -> bool {
        self.woken.swap(false, std::sync::atomic::Ordering::AcqRel)
    }
}

async fn run<K: Clone + Debug + Eq + Hash + Send + Sync + 'static>(inner: Arc<Inner<K>>, key: K, slot: Arc<Slot>) {
    let work = inner.work.get().expect("nothing is woken before the start");
    let mut backoff = BACKOFF_MIN;
    while !inner.stopped.load(std::sync::atomic::Ordering::Acquire) {
        slot.take();
        let wait = match work(key.clone()).await {
            Ok(next) => {
                backoff = BACKOFF_MIN;
                match next {
                    Next::Wait => None,
                    Next::Again(after) => Some(after),
                    Next::Gone => {
                        let mut slots = inner.slots.lock().unwrap_or_else(PoisonError::into_inner);
                        // Under the lock, so that a wake either finds the slot woken here or makes a new one.
                        if !slot.take() {
                            slots.remove(&key);
                            return;
                        }
                        Some(Duration::ZERO)
                    }
                }
            }
            Err(Retry::Soon(why)) => {
                tracing::debug!(?key, %why, "looking again soon");
                Some(BACKOFF_MIN)
            }
            Err(Retry::Later(why)) => {
                tracing::warn!(?key, %why, again_s = backoff.as_secs_f32(), "not done yet");
                let wait = backoff;
                backoff = (backoff * 2).min(BACKOFF_MAX);
                Some(wait)
            }
        };
        match wait {
            None => slot.bell.notified().await,
            Some(wait) => drop(tokio::time::timeout(wait, slot.bell.notified()).await),
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicUsize, Ordering};

    use futures::FutureExt;

    use super::*;

    #[tokio::test]
    async fn a_wake_during_a_look_causes_another_and_one_that_is_gone_leaves_nothing() {
        let (queue, looks) = (Queue::<&str>::default(), Arc::new(AtomicUsize::new(0)));
        let (inner, count) = (queue.clone(), looks.clone());
        queue.wake("before the start");
        queue.start(move |key| {
            let look = count.fetch_add(1, Ordering::Relaxed);
            let inner = inner.clone();
            async move {
                match look {
                    0 => {
                        inner.wake(key);
                        Ok(Next::Gone)
                    }
                    1 => Err(Retry::Soon("not yet".into())),
                    _ => Ok(Next::Gone),
                }
            }
            .boxed()
        });
        assert!(queue.is_empty());
        queue.wake("a");
        tokio::time::timeout(Duration::from_secs(60), async {
            while !queue.is_empty() {
                tokio::time::sleep(Duration::from_millis(1)).await;
            }
        })
        .await
        .unwrap();
        assert_eq!(looks.load(Ordering::Relaxed), 3);
    }
}
