//! What goes wrong, and the end of it.

use galleonfs_storage_engine::replication::{Replica, ReplicaId, ReplicaStore};
use galleonfs_storage_engine::types::{Lba, Version};

use super::backend::Backend;
use super::{Event, MS, Node, World};

/// Something that goes wrong.
#[derive(Clone, Copy, Debug)]
pub(super) enum Fault {
    Partition,
    Kill,
    Power,
    Pause,
    ApiOut,
    ApiTouch,
    Move,
    Rot,
    SlowDisk,
    Administer,
}

impl<B: Backend> World<B> {
    pub(super) fn strike(&mut self, fault: Fault) {
        if self.calm {
            return;
        }
        self.outcome.faults += 1;
        let node = self.rng.below(self.nodes.len() as u64) as usize;
        let pause_ms = match fault {
            Fault::Partition => {
                let lasts = self.rng.between(50, 15_000) * MS;
                let partition = self.net.cut(&mut self.rng);
                self.at(lasts, Event::Heal(partition));
                self.connections_break();
                self.swarm.partition_ms
            }
            Fault::Kill => {
                self.take_down(node, false);
                self.swarm.kill_ms
            }
            Fault::Power => {
                self.take_down(node, true);
                // A whole rack now and then.
                if self.rng.percent(20) {
                    (0..self.nodes.len()).for_each(|node| self.take_down(node, true));
                    self.sometimes("all nodes lose power at once");
                }
                self.swarm.power_ms
            }
            Fault::Pause => {
                let lasts = self.rng.between(50, 12_000) * MS;
                self.nodes[node].paused_until_us = self.now_us + lasts;
                self.swarm.pause_ms
            }
            Fault::ApiOut => {
                self.api_out_until_us = self.now_us + self.rng.between(50, 15_000) * MS;
                self.swarm.api_out_ms
            }
            Fault::ApiTouch => {
                self.api.touch();
                self.swarm.api_touch_ms
            }
            Fault::Move => {
                if self.rng.percent(30)
                    && let Some(serving) = &mut self.nodes[node].serving
                {
                    serving.guest.leave();
                    serving.primary.release();
                    self.drain_primary(node);
                } else {
                    self.attach();
                }
                self.swarm.move_ms
            }
            Fault::Rot => {
                self.rot(node);
                self.swarm.rot_ms
            }
            Fault::SlowDisk => {
                self.nodes[node].disk_slow_until_us = self.now_us + self.rng.between(50, 8_000) * MS;
                self.swarm.slow_disk_ms
            }
            Fault::Administer => {
                self.administer();
                self.swarm.administer_ms
            }
        };
        let pause = self.rng.between(1, 2 * pause_ms) * MS;
        self.at(pause, Event::Fault(fault));
    }

    /// Some primaries hear that some connections are gone; it is a hint, and may be wrong.
    fn connections_break(&mut self) {
        for node in 0..self.nodes.len() {
            let lost = self.rng.below(self.nodes.len() as u64) as usize;
            let lost = self.nodes[lost].id;
            if self.rng.percent(50)
                && let Some(serving) = &mut self.nodes[node].serving
            {
                serving.primary.connection_lost(lost);
                self.drain_primary(node);
            }
        }
    }

    /// A partition ends, and nodes are connected again.
    pub(super) fn heal(&mut self, partition: u64) {
        self.net.heal(partition);
        let ids: Vec<ReplicaId> = self.nodes.iter().map(|node| node.id).collect();
        for node in 0..self.nodes.len() {
            let now_ms = self.nodes[node].now_ms(self.now_us);
            if self.nodes[node].paused_until_us <= self.now_us
                && let Some(serving) = &mut self.nodes[node].serving
            {
                serving.primary.tick(now_ms);
                ids.iter().for_each(|id| serving.primary.connected(*id));
                self.drain_primary(node);
            }
        }
    }

    /// The node's process ends, and with `power` the machine.
    fn take_down(&mut self, node: usize, power: bool) {
        let it = &mut self.nodes[node];
        it.serving = None;
        if let Some(mut replica) = it.replica.take() {
            if let Some(store) = replica.take_store() {
                let mut rng = self.rng.fork();
                it.disk = Some(if power {
                    store.cut_power(&mut rng)
                } else {
                    store.kill(&mut rng)
                });
            }
            self.power_cut |= power;
        }
        let back = if self.rng.percent(70) { 3_000 } else { 20_000 };
        let back = self.rng.between(10, back) * MS;
        self.at(back, Event::Boot(node));
    }

    /// A block rots on one node, where all that are in sync have it, and no other node ever lost it.
    fn rot(&mut self, node: usize) {
        let lba = Lba(self.rng.below(self.blocks));
        let in_sync = |it: &&Node<B>| self.api.config.in_sync.contains(&it.id);
        let store = |it: &Node<B>| {
            it.replica
                .as_ref()
                .and_then(Replica::store)
                .and_then(|store| store.block(lba))
        };
        let mut versions: Vec<_> = self.nodes.iter().filter(in_sync).map(store).collect();
        versions.dedup();
        // And all have it on stable storage: so no power cut makes the one that rots the only one.
        let agreed = self.nodes[node]
            .replica
            .as_ref()
            .and_then(Replica::store)
            .map(ReplicaStore::agreed);
        let same = versions.len() == 1
            && versions[0].is_some_and(|version| version > Version::default() && Some(version) <= agreed);
        let only = self.damaged.get(&lba).is_none_or(|at| *at == node);
        if self.min_in_sync < 2 || !same || !only || !in_sync(&&self.nodes[node]) {
            return;
        }
        if let Some(store) = self.nodes[node].replica.as_mut().and_then(Replica::store_mut)
            && store.damage(lba)
        {
            self.damaged.insert(lba, node);
            self.sometimes("a block rots");
        }
    }

    /// No more faults.
    pub(super) fn calm_down(&mut self) {
        self.calm = true;
        self.net.heal_all();
        self.api_out_until_us = 0;
        for node in 0..self.nodes.len() {
            self.nodes[node].paused_until_us = 0;
            self.nodes[node].disk_slow_until_us = 0;
            self.boot(node);
        }
    }
}
