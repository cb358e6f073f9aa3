//! What goes wrong, and the end of it.

use galleonfs_storage_engine::replication::{Mutants, Replica, ReplicaId};
use galleonfs_storage_engine::types::{Lba, Version};

use super::backend::Backend;
use super::{Event, MS, World};

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
    Lag,
}

/// What comes after everything to and from a node took longer for a while.
#[derive(Clone, Copy, Debug)]
pub(super) enum AfterLag {
    Nothing,
    /// The node is cut off, with answers to what it asked still on their way.
    Isolation,
    /// The node loses power and is back at once.
    Power,
}

/// A power cut under a replica that lost writes with it.
pub(super) const LOST: &str = "a power cut takes writes that were not synced";
/// The same under all replicas, at once.
pub(super) const ALL_LOST: &str = "a power cut takes writes that were not synced from all replicas";

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
                self.take_down(node, false, None);
                self.swarm.kill_ms
            }
            Fault::Power => {
                let up = self.nodes.iter().filter(|node| node.replica.is_some()).count() as u64;
                let before = self.outcome.sometimes.get(LOST).copied().unwrap_or_default();
                self.take_down(node, true, None);
                // A whole rack now and then.
                if self.rng.percent(20) {
                    (0..self.nodes.len()).for_each(|node| self.take_down(node, true, None));
                    self.sometimes("all nodes lose power at once");
                }
                let lost = self.outcome.sometimes.get(LOST).copied().unwrap_or_default() - before;
                if lost >= 2 && lost == up {
                    self.sometimes(ALL_LOST);
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
            Fault::Lag => {
                self.lag(node);
                self.swarm.lag_ms
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

    /// Messages to or from a node take longer than a lease outlives the one behind it, and shorter than what makes a member
    /// late; then comes something that what is still on its way may be wrong about.
    fn lag(&mut self, node: usize) {
        let leader = self.nodes.iter().position(|node| {
            let serving = node.serving.as_ref();
            serving.is_some_and(|serving| serving.primary.is_serving())
        });
        let takes = self.rng.between(900, 1_900) * MS;
        let then = *self.rng.pick(&[
            AfterLag::Nothing,
            AfterLag::Power,
            AfterLag::Power,
            AfterLag::Isolation,
            AfterLag::Isolation,
        ]);
        let (node, to_us, from_us) = match then {
            AfterLag::Nothing => (node, takes / 2, takes / 2),
            // What a replica says. The one that it says it to goes on.
            AfterLag::Power if Some(node) == leader => return,
            AfterLag::Power => (node, 0, takes / 2),
            // What a primary is told, mostly.
            AfterLag::Isolation => (leader.filter(|_| self.rng.percent(80)).unwrap_or(node), takes, 0),
        };
        self.net.lag(node, to_us, from_us);
        let lasts = self.rng.between(500, 5_000) * MS;
        self.at(lasts, Event::LagEnds(node, then));
    }

    pub(super) fn lag_ends(&mut self, node: usize, then: AfterLag) {
        if self.calm {
            return;
        }
        match then {
            AfterLag::Nothing => self.net.lag(node, 0, 0),
            AfterLag::Isolation => {
                self.net.lag(node, 0, 0);
                let lasts = self.rng.between(5_000, 15_000) * MS;
                let partition = self.net.isolate(node);
                self.at(lasts, Event::Heal(partition));
                if self.rng.percent(40) {
                    self.nodes[node].disk_slow_until_us = self.now_us + lasts;
                }
                self.sometimes("a node is cut off while answers are on their way to it");
            }
            AfterLag::Power => {
                // What it said before is heard when it is back, and before it has again what it said that it had.
                let takes = self.rng.between(10, 250) * MS;
                self.net.lag(node, takes, 0);
                self.at(2_000 * MS, Event::LagEnds(node, AfterLag::Nothing));
                let back = self.rng.between(1, 100);
                self.take_down(node, true, Some(back));
                self.sometimes("a node loses power while its answers are on their way");
            }
        }
    }

    /// One that just joined loses power, and is back soon.
    pub(super) fn cut_joined(&mut self, node: usize) {
        if !self.calm {
            let back = self.rng.between(10, 1_500);
            self.take_down(node, true, Some(back));
            self.sometimes("a replica that has just joined loses power");
        }
    }

    /// The node's process ends, and with `power` the machine. It is back after some time, or after so many milliseconds.
    fn take_down(&mut self, node: usize, power: bool, back_ms: Option<u64>) {
        let it = &mut self.nodes[node];
        it.serving = None;
        let mut loses = false;
        if let Some(mut replica) = it.replica.take() {
            if let Some(store) = replica.take_store() {
                let mut rng = self.rng.fork();
                let disk;
                (disk, loses) = if power {
                    store.cut_power(&mut rng)
                } else {
                    (store.kill(&mut rng), false)
                };
                it.disk = Some(disk);
            }
            it.was_cut |= power;
            self.tail_at_risk |= power;
        }
        if loses {
            self.sometimes(LOST);
        }
        let most = if self.rng.percent(70) { 3_000 } else { 20_000 };
        let back_ms = back_ms.unwrap_or_else(|| self.rng.between(10, most));
        self.at(back_ms * MS, Event::Boot(node));
    }

    /// A block rots on one node, where all that are in sync have it, and no other node ever lost it.
    fn rot(&mut self, node: usize) {
        // Most blocks cannot: they are zeros, or are being written.
        for _ in 0..8 {
            let lba = Lba(self.rng.below(self.blocks));
            if let Some((version, write)) = self.oracle.newest(lba) {
                return self.rot_block(node, lba, version, write);
            }
        }
    }

    fn rot_block(&mut self, node: usize, lba: Lba, version: Version, write: u64) {
        // If all that are in sync have it on stable storage, no power cut makes the one that rots the only one. In the tail
        // behind that it may become one: then what it has is given up when an epoch begins. Mistakes are looked for
        // without that.
        let in_sync = self.api.config.in_sync.contains(&self.nodes[node].id);
        let only = self.damaged.get(&lba).is_none_or(|at| *at == node);
        let store = self.nodes[node].replica.as_mut().and_then(Replica::store_mut);
        let may = self.setup.mutants == Mutants::NONE;
        let store = store.filter(|store| in_sync && only && (may || store.agreed() >= version));
        let in_tail = store.as_ref().is_some_and(|store| store.agreed() < version);
        if self.concern.min_in_sync >= 2
            && let Some(store) = store
            && store.damage(lba, version, write)
        {
            self.damaged.insert(lba, node);
            self.tail_rots |= in_tail;
            self.sometimes("a block rots");
        }
    }

    /// A replica looks for damage.
    pub(super) fn scrub(&mut self, node: usize) {
        if let Some(store) = self.nodes[node].replica.as_mut().and_then(Replica::store_mut) {
            store.scrub();
            self.drain_replica(node);
        }
    }

    /// A primary compares the copies, now and then. Mistakes are looked for without that.
    pub(super) fn compare(&mut self, node: usize) {
        let due = self.setup.mutants == Mutants::NONE && (self.now_us / (1_000 * MS)).is_multiple_of(4);
        if let Some(serving) = self.nodes[node].serving.as_mut().filter(|_| due) {
            serving.primary.compare();
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
