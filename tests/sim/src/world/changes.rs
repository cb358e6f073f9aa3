//! Changes of the object on their way: from a node to the API server, and what the node hears of it.

use galleonfs_storage_engine::replication::primary::Decision;
use galleonfs_storage_engine::replication::{Config, Incarnation, Stamp};

use super::backend::Backend;
use super::{Event, MS, Node, World};

impl<B: Backend> World<B> {
    pub(super) fn api_reachable(&self, node: usize) -> bool {
        self.calm || self.api_out_until_us <= self.now_us && self.net.reaches_api(node)
    }

    /// A proposal leaves a node. It may never arrive, and whether it did may never be heard.
    pub(super) fn propose(&mut self, node: usize, incarnation: Incarnation, expected: Stamp, config: Config) {
        let unknown = !self.calm && self.rng.ppm(self.swarm.api_unknown_ppm);
        let late = !self.calm && self.rng.ppm(self.swarm.api_late_ppm);
        if !self.api_reachable(node) || unknown || late {
            self.at(1_000 * MS, Event::Decided(node, incarnation, Decision::Unknown));
            let arrives = late || unknown && self.rng.percent(50);
            if arrives {
                let most = if late { 10_000 * MS } else { 900 * MS };
                let takes = self.rng.between(500, most);
                self.at(takes, Event::Put(node, incarnation, expected, Box::new(config), false));
            }
            return;
        }
        let takes = self.rng.between(500, 20_000);
        self.at(takes, Event::Put(node, incarnation, expected, Box::new(config), true));
    }

    pub(super) fn put(&mut self, node: usize, incarnation: Incarnation, stamp: Stamp, config: Config, heard: bool) {
        let (before, after) = (self.api.config.clone(), config.clone());
        let outcome = self.api.put(stamp, config);
        let made = match outcome {
            Ok(made) => made,
            Err(broken) => return self.violated(broken),
        };
        if made.is_some() && after.epoch == before.epoch {
            if after.in_sync.len() > before.in_sync.len() {
                self.sometimes("a replica joins");
            }
            self.note_joined(&before, &after);
            let joined = self.nodes.iter().position(|node| {
                let was_in_sync = before.in_sync.contains(&node.id);
                after.in_sync.contains(&node.id) && !was_in_sync
            });
            if let Some(joined) = joined
                && self.rng.percent(self.swarm.cut_joined_percent)
            {
                let most = *self.rng.pick(&[3, 100, 1_500]);
                let takes = self.rng.between(0, most * MS);
                self.at(takes, Event::CutJoined(joined));
            }
            let catches_up = |node: &Node<B>| after.syncing.contains(&node.id) && !before.syncing.contains(&node.id);
            if let Some(target) = self.nodes.iter().position(catches_up)
                && self.rng.percent(self.swarm.slow_copies_percent)
            {
                let lasts = self.rng.between(100, 5_000) * MS;
                self.nodes[target].disk_slow_until_us = self.now_us + lasts;
            }
            if after.in_sync.len() < before.in_sync.len() {
                self.tail_at_risk = true;
                self.sometimes("a member is recorded as out");
            }
            if after.in_sync.len() < before.in_sync.len() && !before.syncing.is_empty() {
                self.sometimes("a member is lost while another replica is brought up to date");
            }
        }
        if made.is_some() && !heard {
            self.sometimes("a change that nobody heard of was made");
        }
        if heard {
            let decision = made.map_or(Decision::Conflict, Decision::Made);
            let takes = self.rng.between(500, 20_000);
            self.at(takes, Event::Decided(node, incarnation, decision));
        }
    }
}
