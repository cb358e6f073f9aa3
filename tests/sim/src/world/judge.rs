//! Whether everything is well again in the end, and all copies are the same.

use galleonfs_storage_engine::replication::Replica;
use galleonfs_storage_engine::types::Lba;

use super::backend::{Backend, Contents};
use super::{MS, Serving, WELL_AFTER_MS, World};

/// Looking at every block of every replica takes long.
const LOOK_AGAIN_US: u64 = 2_000 * MS;

impl<B: Backend> World<B> {
    fn holder(&self) -> Option<&Serving> {
        let holder = self.api.config.incarnation?;
        let serving = self.nodes.iter().filter_map(|node| node.serving.as_ref());
        serving.into_iter().find(|serving| serving.incarnation == holder)
    }

    /// True when nothing is left to be done.
    pub(super) fn is_well(&mut self) -> bool {
        let mut wanted = self.nodes.iter().filter(|node| !node.given_up);
        let whole = wanted.all(|node| self.api.config.in_sync.contains(&node.id));
        let served = self
            .holder()
            .is_some_and(|serving| serving.primary.is_serving() && serving.guest.is_done() && !serving.primary.lags());
        // To look at every block takes its time.
        if !whole || !served || !self.damaged.is_empty() && self.now_us < self.looked_us + LOOK_AGAIN_US {
            return false;
        }
        self.looked_us = self.now_us;
        self.damaged.is_empty() || self.still_damaged().is_empty()
    }

    /// Blocks that nobody has mended yet.
    fn still_damaged(&self) -> Vec<(usize, Lba)> {
        let nodes = self.nodes.iter().enumerate().filter(|(_, node)| !node.given_up);
        let damaged = nodes.flat_map(|(n, node)| {
            let store = node.replica.as_ref().and_then(Replica::store);
            let damaged = store.map(Backend::damaged).unwrap_or_default();
            damaged.into_iter().map(move |lba| (n, lba))
        });
        damaged.collect()
    }

    /// The end: everything is well, and all copies are the same.
    pub(super) fn judge(&mut self) {
        self.looked_us = 0;
        if !self.is_well() {
            let damaged = self.still_damaged();
            let config = self.api.config.clone();
            let text = format!(
                "I23: not well {WELL_AFTER_MS} ms after the faults stopped: {config:?}; damaged: {damaged:?}; {:?}",
                self.holder().map(|serving| (&serving.primary, &serving.guest))
            );
            return self.violated(text);
        }
        let mut first: Option<Contents> = None;
        for node in (0..self.nodes.len()).filter(|node| !self.nodes[*node].given_up) {
            let Some(store) = self.nodes[node].replica.as_ref().and_then(Replica::store) else {
                return self.violated("a replica is not there in the end".into());
            };
            let contents = store.contents();
            if let Err(violation) = self.oracle.check_copy(&contents) {
                return self.violated(format!("node {node}: {violation}"));
            }
            match &first {
                None => first = Some(contents),
                Some(first) if *first != contents => {
                    let other = contents.iter().find(|(lba, block)| first.get(lba) != Some(block));
                    let other = other.or_else(|| first.iter().find(|(lba, block)| contents.get(lba) != Some(block)));
                    let text = format!("I10: the first node and node {node} differ in {other:?}");
                    return self.violated(text);
                }
                Some(_) => {}
            }
        }
    }
}
