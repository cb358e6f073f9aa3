//! What primaries and replicas want done, and tell: messages are sent, operations of the disk take their time, guests hear
//! what became of their requests.

use galleonfs_storage_engine::replication::Copies;
use galleonfs_storage_engine::replication::message::{Ask, Refusal, Reply};
use galleonfs_storage_engine::replication::primary::{PrimaryEvent, PrimaryOutput};
use galleonfs_storage_engine::replication::replica::ReplicaOutput;

use super::backend::Backend;
use super::net::{ask_over_the_wire, reply_over_the_wire};
use super::{Event, MS, Node, World};

impl<B: Backend> World<B> {
    pub(super) fn drain_replica(&mut self, node: usize) {
        loop {
            let it = &mut self.nodes[node];
            let (boot, slow) = (it.boot, it.disk_slow_until_us > self.now_us);
            let Some(replica) = &mut it.replica else { return };
            let output = replica.poll();
            let started = replica.store_mut().map(B::take_started).unwrap_or_default();
            let idle = started.is_empty() && output.is_none();
            for operation in started {
                let most = if slow { 500_000 } else { 400 };
                let takes = self.rng.between(20, most);
                self.at(takes, Event::Disk(node, boot, operation));
            }
            match output {
                None if idle => return,
                None => {}
                Some(ReplicaOutput::Reply(message)) => {
                    match &message.reply {
                        Reply::Damaged { .. } => self.sometimes("a replica names a damaged block"),
                        Reply::Wants { .. } => self.sometimes("a checkpoint waits for a flush"),
                        Reply::Gap { .. } => self.sometimes("a record does not come in its turn"),
                        Reply::Refused {
                            why: Refusal::Fenced, ..
                        } => self.sometimes("an old primary is refused"),
                        Reply::Refused {
                            why: Refusal::NoSession,
                            ..
                        } => {
                            self.sometimes("a replica was started again in the middle of an epoch");
                        }
                        _ => {}
                    }
                    let to = self.nodes.iter().position(|node| {
                        let serving = node.serving.as_ref();
                        serving.is_some_and(|serving| serving.incarnation == message.incarnation)
                    });
                    if let Some(to) = to {
                        let message = if to == node {
                            message
                        } else {
                            reply_over_the_wire(&message)
                        };
                        for delay in self.net.deliver(&mut self.rng, &self.swarm, self.calm, node, to) {
                            self.at(delay, Event::FromReplica(to, message.clone()));
                        }
                    }
                }
                Some(ReplicaOutput::Reopen(ends)) => {
                    // What is on its way to the disk ends first.
                    self.at(2_000, Event::Reopen(node, boot, ends));
                }
            }
        }
    }

    pub(super) fn drain_primary(&mut self, node: usize) {
        loop {
            let Some(serving) = &mut self.nodes[node].serving else {
                return;
            };
            let (incarnation, serves) = (serving.incarnation, serving.primary.is_serving());
            if let Some(event) = serving.primary.poll_event() {
                self.told(node, event);
                continue;
            }
            let Some(output) = serving.primary.poll() else { return };
            match output {
                PrimaryOutput::Send(replica, message) => {
                    match &message.ask {
                        Ask::Copy { repair: true, .. } => self.sometimes("a damaged block is mended from another copy"),
                        Ask::Copy { .. } if serves => self.sometimes("a block is copied beside new writes"),
                        Ask::Copy { .. } => self.sometimes("a block is copied to make members equal"),
                        _ => {}
                    }
                    let to = self.nodes.iter().position(|node| node.id == replica);
                    let to = to.expect("replicas are on nodes");
                    let message = if to == node {
                        message
                    } else {
                        ask_over_the_wire(&message)
                    };
                    for delay in self.net.deliver(&mut self.rng, &self.swarm, self.calm, node, to) {
                        self.at(delay, Event::ToReplica(to, message.clone()));
                    }
                }
                PrimaryOutput::Propose { expected, config } => self.propose(node, incarnation, expected, config),
                PrimaryOutput::ReadConfig => {
                    let takes = self.rng.between(500, 20_000);
                    let reachable = self.api_reachable(node);
                    let found = reachable.then(|| (self.api.stamp, Box::new(self.api.config.clone())));
                    self.at(takes, Event::ConfigRead(node, incarnation, found));
                }
            }
        }
    }

    /// What a primary tells its volume.
    fn told(&mut self, node: usize, event: PrimaryEvent) {
        let serving = self.nodes[node].serving.as_mut().expect("it just told something");
        let incarnation = serving.incarnation;
        match event {
            PrimaryEvent::Serving(_) => {
                self.epoch_begins(node);
                let serving = self.nodes[node].serving.as_mut().expect("it just told something");
                let idle_us = if self.rng.percent(30) {
                    self.rng.below(10_000 * MS)
                } else {
                    0
                };
                serving.guest.serving(&self.oracle, self.now_us + idle_us);
                self.sometimes("a primary serves");
                self.at(0, Event::GuestThinks(node, incarnation));
            }
            PrimaryEvent::Written(upto) => {
                let in_sync = &serving.primary.config().in_sync;
                if let Some(lack) = self.concern.lacks(in_sync, &self.zones) {
                    let text = format!("I9: write {upto:?} completed although there are too few: {lack:?}");
                    return self.violated(text);
                }
                let serving = self.nodes[node].serving.as_mut().expect("it just told something");
                let behind = serving.primary.lags();
                let done = serving.guest.written(&mut self.oracle, upto);
                if behind {
                    self.sometimes("a write completes before all members have it");
                }
                if let Err(violation) = done {
                    self.violated(violation);
                }
            }
            PrimaryEvent::Durable(upto) => serving.guest.durable(&mut self.oracle, upto),
            PrimaryEvent::Read(token, found) => {
                let done = serving.guest.read_ended(&mut self.oracle, token, found);
                if let Err(violation) = done {
                    self.violated(violation);
                }
            }
            PrimaryEvent::Compared(None) => self.sometimes("a comparison is broken off"),
            PrimaryEvent::Compared(Some(0)) => self.sometimes("all copies are compared, and are the same"),
            PrimaryEvent::Compared(Some(differing)) => {
                self.violated(format!(
                    "I10: members differ in {differing} ranges that all have on stable storage"
                ));
            }
            PrimaryEvent::GivenUp(..) => self.sometimes("writes are given up that one replica had and could not read"),
            PrimaryEvent::Released => {
                self.nodes[node].serving = None;
                self.sometimes("a primary ends in order");
            }
            PrimaryEvent::Deposed(_) => {
                let pending = serving.guest.has_writes();
                self.sometimes("a primary is deposed");
                if pending {
                    self.sometimes("a primary is deposed with a write under way");
                }
                self.nodes[node].serving = None;
            }
        }
    }

    /// One member that kept its power has every completed write, and all that an epoch begins with are given what it has.
    fn epoch_begins(&mut self, node: usize) {
        let serving = self.nodes[node].serving.as_ref().expect("it just told something");
        let primary = &serving.primary;
        let (epoch, members) = (primary.epoch(), primary.config().in_sync.clone());
        if epoch < self.oracle.epoch() {
            return; // the next one has begun already
        }
        let is_member = |node: &&Node<B>| members.contains(&node.id);
        let cut = self.nodes.iter().filter(is_member).all(|node| node.was_cut);
        let may_lose = match self.concern.copies {
            Copies::All => cut || self.tail_rots,
            Copies::First => self.tail_at_risk || self.tail_rots,
        };
        let begun = self
            .oracle
            .epoch_begins(epoch, |version| primary.counts(version), may_lose);
        for node in self.nodes.iter_mut().filter(|node| members.contains(&node.id)) {
            node.was_cut = false;
        }
        (self.tail_at_risk, self.tail_rots) = (false, false);
        match begun {
            Ok(true) if !cut && self.concern.copies == Copies::First => {
                self.sometimes("what only the first copy had is given up")
            }
            Ok(_) => {}
            Err(violation) => self.violated(violation),
        }
    }
}
