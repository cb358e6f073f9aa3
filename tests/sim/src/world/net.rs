//! The network: what is lost, doubled and late, and who cannot reach whom.

use std::collections::BTreeMap;

use galleonfs_storage_engine::buffer::{Buf, BufMut};
use galleonfs_storage_engine::replication::wire::{pack_ask, pack_reply, unpack_ask, unpack_reply};
use galleonfs_storage_engine::replication::{FromReplica, ToReplica};

use super::rng::Rng;
use super::swarm::Swarm;

/// What arrives of a message: it is sent as bytes.
pub fn ask_over_the_wire(message: &ToReplica) -> ToReplica {
    let packed = pack_ask(message);
    let (volume, replica, epoch) = (message.volume, message.replica, message.epoch);
    let payload = in_one_piece(&packed.payload);
    let arrived = unpack_ask(volume, replica, epoch, packed.kind, &packed.body, payload);
    arrived.expect("what was packed can be unpacked")
}

/// What arrives of an answer.
pub fn reply_over_the_wire(message: &FromReplica) -> FromReplica {
    let packed = pack_reply(message);
    let (volume, replica, epoch) = (message.volume, message.replica, message.epoch);
    let payload = in_one_piece(&packed.payload);
    let arrived = unpack_reply(volume, replica, epoch, packed.kind, &packed.body, payload);
    arrived.expect("what was packed can be unpacked")
}

fn in_one_piece(parts: &[Buf]) -> Option<Buf> {
    match parts {
        [] => None,
        [one] => Some(one.clone()),
        parts => {
            let mut all = BufMut::for_reading(parts.iter().map(Buf::len).sum());
            let mut rest = all.as_mut();
            for part in parts {
                let place = rest.split_off_mut(..part.len()).expect("it has room for all of them");
                place.copy_from_slice(part.as_ref());
            }
            Some(all.freeze())
        }
    }
}

/// See the module. The API server is the node behind the last one.
#[derive(Debug)]
pub struct Net {
    nodes: usize,
    next: u64,
    /// Links that are cut, by partition: from, to.
    cuts: BTreeMap<u64, Vec<(usize, usize)>>,
    /// Microseconds that everything takes longer which goes to a node, and which comes from it.
    lags: BTreeMap<usize, (u64, u64)>,
}

impl Net {
    /// A network without faults.
    pub fn new(nodes: usize) -> Net {
        Net {
            nodes,
            next: 0,
            cuts: BTreeMap::new(),
            lags: BTreeMap::new(),
        }
    }

    /// Cuts off a side from the other, or one direction of one link; it is healed by the number that comes back.
    pub fn cut(&mut self, rng: &mut Rng) -> u64 {
        let all = self.nodes + 1;
        let mut cut = Vec::new();
        if rng.percent(60) {
            let side: Vec<bool> = (0..all).map(|_| rng.percent(50)).collect();
            for from in 0..all {
                cut.extend((0..all).filter(|to| side[from] != side[*to]).map(|to| (from, to)));
            }
        } else {
            let from = rng.below(all as u64) as usize;
            let to = rng.below(all as u64) as usize;
            cut.push((from, to));
        }
        self.next += 1;
        self.cuts.insert(self.next, cut);
        self.next
    }

    /// Cuts one node off from everybody.
    pub fn isolate(&mut self, node: usize) -> u64 {
        let others = (0..=self.nodes).filter(|other| *other != node);
        let cut = others.flat_map(|other| [(node, other), (other, node)]);
        self.next += 1;
        self.cuts.insert(self.next, cut.collect());
        self.next
    }

    /// From now on everything to and from a node takes so much longer.
    pub fn lag(&mut self, node: usize, to_us: u64, from_us: u64) {
        self.lags.insert(node, (to_us, from_us));
    }

    /// Ends a partition.
    pub fn heal(&mut self, partition: u64) {
        self.cuts.remove(&partition);
    }

    /// Ends all of them.
    pub fn heal_all(&mut self) {
        self.cuts.clear();
        self.lags.clear();
    }

    fn reaches(&self, from: usize, to: usize) -> bool {
        from == to || !self.cuts.values().any(|cut| cut.contains(&(from, to)))
    }

    /// Whether a node can ask the API server and hear the answer.
    pub fn reaches_api(&self, node: usize) -> bool {
        self.reaches(node, self.nodes) && self.reaches(self.nodes, node)
    }

    /// When a message arrives, in microseconds from now: never, once, or more than once.
    pub fn deliver(&self, rng: &mut Rng, swarm: &Swarm, calm: bool, from: usize, to: usize) -> Vec<u64> {
        if from == to {
            // Within a process nothing is lost.
            return vec![rng.between(1, 20)];
        }
        if !self.reaches(from, to) || !calm && rng.ppm(swarm.lose_ppm) {
            return Vec::new();
        }
        let lag = |node| self.lags.get(&node).copied().unwrap_or_default();
        let lag_us = lag(to).0 + lag(from).1;
        // A line that is slow is not always as slow: what is sent later may overtake.
        let lag_us = rng.between(lag_us / 4 * 3, lag_us);
        let mut arrivals = vec![lag_us + rng.between(20, swarm.delay_us)];
        if !calm && rng.ppm(swarm.slow_ppm) {
            // Long after everybody has given it up.
            arrivals[0] = rng.between(1_000, 15_000_000);
        }
        if !calm && rng.ppm(swarm.repeat_ppm) {
            arrivals.push(rng.between(20, 5_000_000));
        }
        arrivals
    }
}
