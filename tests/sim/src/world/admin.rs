//! Whoever decides which replicas a volume is to have: now and then one is added, or one that is out is given up.

use galleonfs_storage_engine::replication::{Config, Incarnation, ReplicaId};
use galleonfs_storage_engine::types::Version;

use super::backend::Backend;
use super::{Event, MS, Node, World};

/// So many replicas come in addition in one run.
pub(super) const ADDED_MAX: usize = 3;

impl<B: Backend> World<B> {
    /// Adds a replica or gives one up. It is done with one write of the object, so nothing can come between.
    pub(super) fn administer(&mut self) {
        if self.api_out_until_us > self.now_us {
            return;
        }
        let mut config = self.api.config.clone();
        let out: Vec<_> = config.out.keys().copied().collect();
        if !out.is_empty() && self.rng.percent(40) {
            let gone = *self.rng.pick(&out);
            config.out.remove(&gone);
            let node = self.nodes.iter().position(|node| node.id == gone);
            let node = node.expect("replicas are on nodes");
            self.nodes[node].given_up = true;
            self.sometimes("a replica is given up");
            if config.syncing.remove(&gone) {
                self.sometimes("a replica is given up while it is brought up to date");
            }
            // Until its object is gone it goes on answering.
            let takes = self.rng.between(1, 5_000) * MS;
            self.at(takes, Event::Remove(node));
        } else if self.nodes.len() < self.nodes_max {
            let node = Node::new(&mut self.rng, &self.swarm, self.volume, self.blocks);
            config.out.insert(node.id, Version::default());
            self.zones.insert(node.id, super::zone(self.nodes.len()));
            self.nodes.push(node);
            let node = self.nodes.len() - 1;
            self.boot(node);
            self.at(self.swarm.checkpoint_ms * MS, Event::Checkpoint(node));
            self.sometimes("a new replica is added");
        } else {
            return;
        }
        match self.api.put(self.api.stamp, config) {
            Ok(made) => assert!(made.is_some(), "the object is as it was just read"),
            Err(broken) => return self.violated(broken),
        }
        for node in 0..self.nodes.len() {
            if let Some(serving) = &self.nodes[node].serving {
                let incarnation = serving.incarnation;
                let takes = self.rng.between(1, 2_000) * MS;
                self.at(takes, Event::Look(node, incarnation));
            }
        }
    }

    /// A primary hears that somebody changed the object, as soon as its node can watch it.
    pub(super) fn look(&mut self, node: usize, incarnation: Incarnation) {
        if !self.api_reachable(node) {
            return self.at(500 * MS, Event::Look(node, incarnation));
        }
        if let Some(serving) = self.serving_mut(node, incarnation) {
            serving.primary.look();
            self.drain_primary(node);
        }
    }

    pub(super) fn note_joined(&mut self, before: &Config, after: &Config) {
        let added = &self.nodes[self.nodes_max - ADDED_MAX..];
        let is_new = |id: &ReplicaId| added.iter().any(|node| node.id == *id);
        if after.in_sync.difference(&before.in_sync).any(is_new) {
            self.sometimes("a new replica joins");
        }
    }
}
