//! The objects of this node as the watches last saw them.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, PoisonError};

use galleonfs_api::{GalleonReplica, GalleonVolume, StoragePool};
use kube::ResourceExt;

/// All three kinds.
#[derive(Debug, Default)]
pub struct Cache {
    pub volumes: Store<GalleonVolume>,
    pub replicas: Store<GalleonReplica>,
    pub pools: Store<StoragePool>,
}

/// One kind, by name.
#[derive(Debug)]
pub struct Store<K>(Mutex<BTreeMap<String, Arc<K>>>);

impl<K> Default for Store<K> {
    fn default() -> Store<K> {
        Store(Mutex::default())
    }
}

impl<K: ResourceExt> Store<K> {
    pub fn get(&self, name: &str) -> Option<Arc<K>> {
        self.rows().get(name).cloned()
    }

    pub fn list(&self) -> Vec<Arc<K>> {
        self.rows().values().cloned().collect()
    }

    pub fn names(&self) -> Vec<String> {
        self.rows().keys().cloned().collect()
    }

    pub fn put(&self, object: K) -> String {
        let name = object.name_any();
        self.rows().insert(name.clone(), Arc::new(object));
        name
    }

    pub fn remove(&self, name: &str) {
        self.rows().remove(name);
    }

    /// Puts a whole listing in the place of what was there, and returns the names of all that may have changed.
    pub fn replace(&self, objects: Vec<K>) -> Vec<String> {
        let new = objects
            .into_iter()
            .map(|object| (object.name_any(), Arc::new(object)))
            .collect();
        let old: BTreeMap<String, Arc<K>> = std::mem::replace(&mut *self.rows(), new);
        let mut names: Vec<String> = old.into_keys().chain(self.names()).collect();
        names.sort();
        names.dedup();
        names
    }

    fn rows(&self) -> std::sync::MutexGuard<'_, BTreeMap<String, Arc<K>>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
