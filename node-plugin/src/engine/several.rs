//! The part of a shard that is about volumes of several replicas: whom it leads, whom it hosts, and how they reach each
//! other.
//!
//! A volume and its replica on the same node are on the same shard, and hand their messages over directly; there is no
//! other difference between that replica and one on another node.
//!
//! The time is told to a machine again whenever something from outside has come for it: an answer that is judged by the
//! time of before it came could be one that was given when its lease had ended.

use std::sync::mpsc::Sender;

use galleonfs_storage_engine::replication::ReplicaId;
use galleonfs_storage_engine::replication::message::{FromReplica, ToReplica};
use galleonfs_storage_engine::replication::primary::PrimaryOutput;
use galleonfs_storage_engine::volume::Led;
use rustc_hash::FxHashMap;
use uuid::Uuid;

use super::disk_queue::DiskQueue;
use super::hosted::{Asker, HostedReplica, Letter, NewHosted};
use super::leading::ConfigNews;
use super::post::{Arrived, Post};
use super::shard::{Message, Shard};
use super::{EngineError, clock};
use crate::transport::{Event, Session, Side};

/// What a shard knows of such volumes, besides the volumes themselves.
pub(super) struct Several {
    pub post: Post,
    pub replicas: FxHashMap<u32, HostedReplica>,
    /// Where to find them: by the replica's uid, and the led volumes by the volume's.
    hosts: FxHashMap<ReplicaId, u32>,
    leads: FxHashMap<Uuid, u32>,
    letters: Vec<Letter>,
}

impl Several {
    pub fn new(post: Post) -> Several {
        Several {
            post,
            replicas: FxHashMap::default(),
            hosts: FxHashMap::default(),
            leads: FxHashMap::default(),
            letters: Vec::new(),
        }
    }

    /// A volume under this key is led from now on.
    pub fn led(&mut self, volume: Uuid, key: u32) {
        self.leads.insert(volume, key);
        self.post.subscribe(volume);
    }

    /// It is led no longer.
    pub fn left(&mut self, volume: Uuid) {
        if self.leads.remove(&volume).is_some() {
            self.post.unsubscribe(volume);
        }
    }
}

impl Shard {
    /// Takes a replica into service.
    pub(super) fn host(&mut self, new: NewHosted, done: &Sender<Result<(), EngineError>>) {
        let helper = match self.helper(new.key, &new.spec.replica, new.dir.clone()) {
            Ok(helper) => helper,
            Err(error) => {
                // Whoever asked waits without a limit.
                let _ = done.send(Err(error));
                return;
            }
        };
        let key = new.key;
        let disk = DiskQueue::new(key, helper, self.budget.clone());
        let replica = HostedReplica::new(new, disk, self.outbox.clone());
        self.several.hosts.insert(replica.id(), key);
        self.several.post.subscribe(replica.volume());
        self.several.replicas.insert(key, replica);
        self.touch(key);
        let _ = done.send(Ok(()));
    }

    /// What came from other nodes for a volume, and which connections came and went.
    pub(super) fn wire(&mut self, volume: Uuid, events: Vec<Event>) {
        let lead = self.several.leads.get(&volume).copied();
        for event in events {
            match event {
                Event::Incoming(incoming) => match self.several.post.arrived(incoming) {
                    Some(Arrived::Order(order, session)) => {
                        if let Some(key) = self.several.hosts.get(&order.replica).copied() {
                            let replica = self.several.replicas.get_mut(&key).expect("it is hosted");
                            let taken = replica.received(order, session.clone());
                            if let Err(why) = taken {
                                self.several.post.refuse(&session, &why.to_string());
                            }
                            self.touch(key);
                        }
                    }
                    // Only its own node answers for a replica: what it says it has is counted on.
                    Some(Arrived::Answer(answer, session)) => match lead {
                        Some(key) if self.several.post.is_at(answer.replica, session.peer()) => {
                            self.answered(key, answer);
                        }
                        Some(_) => self
                            .several
                            .post
                            .refuse(&session, "it answers for a replica of another node"),
                        None => {}
                    },
                    None => {}
                },
                Event::Up(session) => {
                    self.several.post.up(session.clone());
                    self.connection(volume, lead, &session, true);
                }
                Event::Down { session, .. } => {
                    self.several.post.down(&session);
                    self.connection(volume, lead, &session, false);
                }
                Event::Room(_) | Event::DialFailed { .. } => {}
            }
        }
    }

    /// A connection to a node has come or gone: what was on its way there may be lost.
    fn connection(&mut self, volume: Uuid, lead: Option<u32>, session: &Session, up: bool) {
        let Some(key) = lead.filter(|_| session.side() == Side::Dialled) else {
            return;
        };
        let replicas = self.several.post.replicas_at(volume, session.peer());
        if let Some(served) = self.volumes.get_mut(&key) {
            served.tick_now(clock::now_ms());
            if let Some(led) = served.led() {
                for replica in replicas {
                    match up {
                        true => led.connected(replica),
                        false => led.connection_lost(replica),
                    }
                }
            }
            self.touch(key);
        }
    }

    /// A replica's answer for the volume under this key.
    fn answered(&mut self, key: u32, answer: FromReplica) {
        if let Some(led) = self.volumes.get_mut(&key).and_then(|volume| {
            volume.tick_now(clock::now_ms());
            volume.led()
        }) {
            led.received(answer);
            self.touch(key);
        }
    }

    /// News of a volume's configuration.
    pub(super) fn config(&mut self, key: u32, news: ConfigNews) {
        let Some(volume) = self.volumes.get_mut(&key) else {
            return;
        };
        volume.tick_now(clock::now_ms());
        let zones = match (&news, &volume.leading) {
            (ConfigNews::Read(Some(_)), Some(leading)) => Some(leading.configs.zones()),
            _ => None,
        };
        if let Some(led) = volume.led() {
            if let Some(zones) = zones {
                led.stand(zones);
            }
            match news {
                ConfigNews::Decided(decision) => led.decided(decision),
                ConfigNews::Read(found) => led.config_read(found),
                ConfigNews::Look => led.look(),
                ConfigNews::Leave(replica) => led.leave(replica),
            }
        }
    }

    /// Has everything done that a volume which leads has asked for since.
    pub(super) fn follow(&mut self, key: u32) {
        let Some(volume) = self.volumes.get_mut(&key) else {
            return;
        };
        while let Some(output) = volume.led().and_then(Led::poll_output) {
            match output {
                PrimaryOutput::Send(replica, message) => match self.several.hosts.get(&replica).copied() {
                    Some(host) => {
                        order_here(&mut self.several, host, key, message);
                        touch_replica(&mut self.touched, &mut self.several, host);
                    }
                    None => self.several.post.order(replica, &message),
                },
                PrimaryOutput::Propose { expected, config } => {
                    let outbox = self.outbox.clone();
                    let decided = move |decision| {
                        // The process ends if nobody is there.
                        let _ = outbox.send(Message::Config(key, ConfigNews::Decided(decision)));
                    };
                    let leading = volume.leading.as_ref().expect("only who leads proposes");
                    leading.configs.propose(expected, config, Box::new(decided));
                }
                PrimaryOutput::ReadConfig => {
                    let outbox = self.outbox.clone();
                    let read = move |found| {
                        let _ = outbox.send(Message::Config(key, ConfigNews::Read(found)));
                    };
                    let leading = volume.leading.as_ref().expect("only who leads reads");
                    leading.configs.read(Box::new(read));
                }
            }
        }
    }

    /// Lets a replica work, and brings its answers to whom they are for. True if it was one.
    pub(super) fn pump_replica(&mut self, key: u32) -> bool {
        let Some(replica) = self.several.replicas.get_mut(&key) else {
            return false;
        };
        replica.touched = false;
        let mut letters = std::mem::take(&mut self.several.letters);
        replica.pump(&mut self.reactor, &mut letters);
        if replica.may_go() {
            let replica = self.several.replicas.remove(&key).expect("it was just there");
            self.several.hosts.remove(&replica.id());
            self.several.post.unsubscribe(replica.volume());
            replica.go();
        }
        for Letter { to, answer } in letters.drain(..) {
            match to {
                Asker::Here(volume) => self.answered(volume, answer),
                Asker::There(session) => self.several.post.answer(&session, &answer),
            }
        }
        self.several.letters = letters;
        true
    }
}

fn order_here(several: &mut Several, host: u32, from: u32, message: ToReplica) {
    let replica = several.replicas.get_mut(&host).expect("it is hosted");
    replica.received_here(message, from);
}

fn touch_replica(touched: &mut Vec<u32>, several: &mut Several, key: u32) {
    if let Some(replica) = several.replicas.get_mut(&key)
        && !replica.touched
    {
        replica.touched = true;
        touched.push(key);
    }
}

impl Shard {
    /// Something has happened to the volume or the replica under this key.
    pub(super) fn touch(&mut self, key: u32) {
        match self.volumes.get_mut(&key) {
            Some(volume) if !volume.touched => {
                volume.touched = true;
                self.touched.push(key);
            }
            Some(_) => {}
            None => touch_replica(&mut self.touched, &mut self.several, key),
        }
    }
}
