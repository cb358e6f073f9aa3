//! Things that have names, and one operation at a time on each.
//!
//! Whoever begins an operation claims the name; another one is told to come back. What is known under a name stays
//! readable meanwhile, and a name without anything is forgotten when the claim ends.

use std::borrow::Borrow;
use std::collections::HashMap;
use std::hash::Hash;
use std::sync::{Mutex, MutexGuard, PoisonError};

/// What is known by name.
pub(super) struct Claims<K, T>(Mutex<HashMap<K, Slot<T>>>);

struct Slot<T> {
    /// An operation is under way.
    busy: bool,
    held: Option<T>,
}

impl<K, T> Default for Claims<K, T> {
    fn default() -> Claims<K, T> {
        Claims(Mutex::default())
    }
}

impl<K: Eq + Hash + Clone, T: Clone> Claims<K, T> {
    fn slots(&self) -> MutexGuard<'_, HashMap<K, Slot<T>>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Claims a name for one operation; `None` if one is under way.
    pub fn claim(&self, name: K) -> Option<Claim<'_, K, T>> {
        let mut slots = self.slots();
        let slot = slots.entry(name.clone()).or_insert(Slot {
            busy: false,
            held: None,
        });
        if std::mem::replace(&mut slot.busy, true) {
            return None;
        }
        drop(slots);
        Some(Claim { of: self, name })
    }

    /// What `pick` takes of what is known under a name.
    pub fn get<Q, R>(&self, name: &Q, pick: impl FnOnce(&T) -> R) -> Option<R>
    where
        K: Borrow<Q>,
        Q: Eq + Hash + ?Sized,
    {
        self.slots().get(name)?.held.as_ref().map(pick)
    }

    /// What `pick` takes of everything that is known.
    pub fn list<R>(&self, mut pick: impl FnMut(&K, &T) -> R) -> Vec<R> {
        let slots = self.slots();
        let held = slots
            .iter()
            .filter_map(|(name, slot)| Some((name, slot.held.as_ref()?)));
        held.map(|(name, held)| pick(name, held)).collect()
    }
}

/// A name, claimed for one operation; free again when this is dropped.
pub(super) struct Claim<'a, K: Eq + Hash + Clone, T: Clone> {
    of: &'a Claims<K, T>,
    name: K,
}

impl<K: Eq + Hash + Clone, T: Clone> Claim<'_, K, T> {
    pub fn held(&self) -> Option<T> {
        self.of.get(&self.name, T::clone)
    }

    pub fn set(&self, held: Option<T>) {
        if let Some(slot) = self.of.slots().get_mut(&self.name) {
            slot.held = held;
        }
    }
}

impl<K: Eq + Hash + Clone, T: Clone> Drop for Claim<'_, K, T> {
    fn drop(&mut self) {
        let mut slots = self.of.slots();
        if let Some(slot) = slots.get_mut(&self.name) {
            slot.busy = false;
            if slot.held.is_none() {
                slots.remove(&self.name);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_name_is_one_operations_at_a_time_and_forgotten_when_nothing_is_there() {
        let claims = Claims::<&str, u32>::default();
        let claim = claims.claim("a").expect("nobody has it");
        assert!(claims.claim("a").is_none() && claims.claim("b").is_some());
        claim.set(Some(7));
        assert_eq!((claim.held(), claims.get("a", |held| held + 1)), (Some(7), Some(8)));
        drop(claim);
        assert_eq!(claims.list(|name, held| (*name, *held)), [("a", 7)]);
        claims.claim("a").expect("it is free again").set(None);
        assert_eq!(claims.get("a", |held| *held), None);
        assert!(claims.slots().is_empty());
    }
}
