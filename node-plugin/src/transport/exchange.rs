//! Brings frames to whoever serves their volume, and knows which sessions there are.
//!
//! ```text
//! wire ─► Exchange ─┬─► subscriber of volume a: its frames of this round, in one call
//!                          ├─► subscriber of volume b
//!                          └─► every subscriber: sessions that came and went
//! ```
//!
//! A subscriber is told once for each round of the wire, however many frames there are for it, so that a shard is
//! woken once.

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, OnceLock, PoisonError};

use rustc_hash::FxHashMap;
use uuid::Uuid;

use super::{Event, Lost, Session, Side, Sink, Work};

/// Takes what concerns one volume.
pub trait Subscriber: Send + Sync + 'static {
    /// Frames of the volume, and all sessions that came and went, in order. Must not wait.
    fn deliver(&self, events: Vec<Event>);
}

/// Sorts what the transport brings. Cheap to clone; all clones are one.
#[derive(Clone, Default)]
pub struct Exchange(Arc<Inner>);

#[derive(Default)]
struct Inner {
    state: Mutex<State>,
    unclaimed: AtomicU64,
    refused: AtomicU64,
    worker: OnceLock<Box<Adopt>>,
}

/// Takes over a transport's work.
type Adopt = dyn Fn(Work) + Send + Sync;

#[derive(Default)]
struct State {
    subscribers: FxHashMap<Uuid, Arc<dyn Subscriber>>,
    sessions: BTreeMap<(Uuid, Side), Session>,
    /// Why the last attempt to reach a node has failed.
    failed: BTreeMap<Uuid, String>,
}

impl std::fmt::Debug for Exchange {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Exchange").finish_non_exhaustive()
    }
}

impl Exchange {
    /// Has the work of the transport done by `adopt` if it begins after this.
    pub fn work_at(&self, adopt: impl Fn(Work) + Send + Sync + 'static) {
        let first = self.0.worker.set(Box::new(adopt));
        assert!(first.is_ok(), "one engine works at the exchange");
    }

    /// From now on `subscriber` is told of `volume`. Gives the sessions that there are already: those it is not told of.
    pub fn subscribe(&self, volume: Uuid, subscriber: Arc<dyn Subscriber>) -> Vec<Session> {
        let mut state = self.state();
        let before = state.subscribers.insert(volume, subscriber);
        assert!(before.is_none(), "volume {volume} is served once on a node");
        state.sessions.values().cloned().collect()
    }

    /// Frames of the volume are dropped from now on.
    pub fn unsubscribe(&self, volume: Uuid) {
        self.state().subscribers.remove(&volume);
    }

    /// The connection to a node that this one has dialled, or that the node has.
    pub fn session(&self, node: Uuid, side: Side) -> Option<Session> {
        self.state().sessions.get(&(node, side)).cloned()
    }

    /// Why a node cannot be reached at present.
    pub fn trouble(&self, node: Uuid) -> Option<String> {
        self.state().failed.get(&node).cloned()
    }

    /// Frames that were for a volume that nobody serves here.
    pub fn unclaimed(&self) -> u64 {
        self.0.unclaimed.load(Ordering::Relaxed)
    }

    /// Counts a frame that is no message, or asks for what cannot be. Gives how many there were before.
    pub fn refuse(&self) -> u64 {
        self.0.refused.fetch_add(1, Ordering::Relaxed)
    }

    /// Frames that were refused by whoever got them.
    pub fn refused(&self) -> u64 {
        self.0.refused.load(Ordering::Relaxed)
    }

    fn state(&self) -> std::sync::MutexGuard<'_, State> {
        self.0.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Sink for Exchange {
    fn deliver(&self, events: &mut Vec<Event>) {
        let mut for_all: Vec<(Arc<dyn Subscriber>, Vec<Event>)> = Vec::new();
        {
            let mut state = self.state();
            let mut places: FxHashMap<Uuid, usize> = FxHashMap::default();
            let State {
                subscribers,
                sessions,
                failed,
            } = &mut *state;
            let mut place = |volume: Uuid, subscriber: &Arc<dyn Subscriber>| {
                *places.entry(volume).or_insert_with(|| {
                    for_all.push((subscriber.clone(), Vec::new()));
                    for_all.len() - 1
                })
            };
            let mut sorted: Vec<(usize, Event)> = Vec::with_capacity(events.len());
            for event in events.drain(..) {
                let everybody: &dyn Fn() -> Event = match &event {
                    Event::Incoming(incoming) => {
                        let volume = incoming.frame.volume;
                        match subscribers.get(&volume) {
                            Some(subscriber) => sorted.push((place(volume, subscriber), event)),
                            None => {
                                self.0.unclaimed.fetch_add(1, Ordering::Relaxed);
                            }
                        }
                        continue;
                    }
                    Event::Up(session) => {
                        sessions.insert((session.peer(), session.side()), session.clone());
                        failed.remove(&session.peer());
                        &|| Event::Up(session.clone())
                    }
                    Event::Room(session) => &|| Event::Room(session.clone()),
                    Event::Down { session, why } => {
                        let key = (session.peer(), session.side());
                        // Another one may have taken its place.
                        if sessions.get(&key) == Some(session) {
                            sessions.remove(&key);
                        }
                        &|| Event::Down {
                            session: session.clone(),
                            why: why.clone(),
                        }
                    }
                    Event::DialFailed { peer, address, why } => {
                        told_once(failed, *peer, why);
                        &|| Event::DialFailed {
                            peer: *peer,
                            address: *address,
                            why: why.clone(),
                        }
                    }
                };
                for (volume, subscriber) in subscribers.iter() {
                    sorted.push((place(*volume, subscriber), everybody()));
                }
            }
            for (at, event) in sorted {
                for_all[at].1.push(event);
            }
        }
        // Outside the lock: whoever is told may ask for a session at once.
        for (subscriber, events) in for_all {
            subscriber.deliver(events);
        }
    }

    fn adopt(&self, work: Work) -> Option<Work> {
        match self.0.worker.get() {
            Some(adopt) => {
                adopt(work);
                None
            }
            None => Some(work),
        }
    }
}

/// Keeps why a node cannot be reached, and logs it when that is news.
fn told_once(failed: &mut BTreeMap<Uuid, String>, peer: Uuid, why: &Lost) {
    let why = why.to_string();
    if failed.get(&peer) != Some(&why) {
        tracing::warn!(%peer, why, "a node cannot be reached");
        failed.insert(peer, why);
    }
}
