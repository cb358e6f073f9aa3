//! How messages of replication find their way: to another volume or replica on the same shard, or to another node.
//!
//! A shard subscribes to the frames of each volume that it leads or hosts a replica of. What it sends is queued, and goes
//! out once at the end of the round, however many messages there are for a node.

use std::net::SocketAddr;
use std::sync::{Arc, OnceLock};

use bytes::Bytes;
use galleonfs_storage_engine::buffer::{Buf, Lent};
use galleonfs_storage_engine::replication::ReplicaId;
use galleonfs_storage_engine::replication::message::{FromReplica, ToReplica};
use galleonfs_storage_engine::replication::wire::{self, Packed, WireError};
use galleonfs_storage_engine::types::Epoch;
use rustc_hash::FxHashMap;
use uuid::Uuid;

use super::inbox::Outbox;
use super::shard::Message;
use super::spec::Route;
use crate::transport::exchange::{Exchange, Subscriber};
use crate::transport::{Event, Frame, Hold, Incoming, Kind, Session, Side, Transport};

/// Makes connections to other nodes.
pub trait Dial: Send + Sync {
    /// Has a connection to a node from now on.
    fn dial(&self, node: Uuid, addresses: Vec<SocketAddr>);
    /// Has none any more.
    fn forget(&self, node: Uuid);
}

impl Dial for Transport {
    fn dial(&self, node: Uuid, addresses: Vec<SocketAddr>) {
        Transport::dial(self, node, addresses);
    }

    fn forget(&self, node: Uuid) {
        Transport::forget(self, node);
    }
}

/// A transport that begins when the engine runs, which does its work then.
impl Dial for OnceLock<Transport> {
    fn dial(&self, node: Uuid, addresses: Vec<SocketAddr>) {
        if let Some(transport) = self.get() {
            transport.dial(node, addresses);
        }
    }

    fn forget(&self, node: Uuid) {
        if let Some(transport) = self.get() {
            transport.forget(node);
        }
    }
}

/// A frame's payload, and what stands for its memory.
struct Held {
    bytes: Buf,
    _hold: Hold,
}

impl AsRef<[u8]> for Held {
    fn as_ref(&self) -> &[u8] {
        self.bytes.as_ref()
    }
}

impl Lent for Held {}

/// Brings the frames of one volume to its shard.
struct ToShard {
    volume: Uuid,
    outbox: Outbox<Message>,
}

impl Subscriber for ToShard {
    fn deliver(&self, events: Vec<Event>) {
        let volume = self.volume;
        // The process ends if nobody is there.
        let _ = self.outbox.send(Message::Wire { volume, events });
    }
}

/// A message that has arrived.
#[derive(Debug)]
pub(super) enum Arrived {
    Order(ToReplica, Session),
    Answer(FromReplica, Session),
}

pub(super) struct Post {
    exchange: Exchange,
    outbox: Outbox<Message>,
    /// Volumes whose frames come here, and how many on this shard want them.
    subscribed: FxHashMap<Uuid, usize>,
    /// Connections that this node has made, by peer.
    sessions: FxHashMap<Uuid, Session>,
    /// Where replicas are, and of which volume.
    routes: FxHashMap<Uuid, Vec<Route>>,
    nodes: FxHashMap<ReplicaId, Uuid>,
    unsent: Vec<Session>,
}

impl Post {
    pub fn new(exchange: Exchange, outbox: Outbox<Message>) -> Post {
        Post {
            exchange,
            outbox,
            subscribed: FxHashMap::default(),
            sessions: FxHashMap::default(),
            routes: FxHashMap::default(),
            nodes: FxHashMap::default(),
            unsent: Vec::new(),
        }
    }

    /// One more on this shard wants the frames of a volume.
    pub fn subscribe(&mut self, volume: Uuid) {
        let wanted = self.subscribed.entry(volume).or_default();
        *wanted += 1;
        if *wanted == 1 {
            let outbox = self.outbox.clone();
            for session in self.exchange.subscribe(volume, Arc::new(ToShard { volume, outbox })) {
                self.up(session);
            }
        }
    }

    /// One fewer does.
    pub fn unsubscribe(&mut self, volume: Uuid) {
        let wanted = self.subscribed.get_mut(&volume).expect("it subscribed before");
        *wanted -= 1;
        if *wanted == 0 {
            self.subscribed.remove(&volume);
            self.exchange.unsubscribe(volume);
        }
    }

    /// Says where the replicas of a volume are.
    pub fn route(&mut self, volume: Uuid, routes: Vec<Route>) {
        for gone in self.routes.remove(&volume).unwrap_or_default() {
            self.nodes.remove(&ReplicaId(gone.replica.into_bytes()));
        }
        for route in &routes {
            self.nodes.insert(ReplicaId(route.replica.into_bytes()), route.node);
        }
        if !routes.is_empty() {
            self.routes.insert(volume, routes);
        }
    }

    /// The replicas of a volume that are on a node.
    pub fn replicas_at(&self, volume: Uuid, node: Uuid) -> Vec<ReplicaId> {
        let routes = self.routes.get(&volume).map(Vec::as_slice).unwrap_or_default();
        let there = routes.iter().filter(|route| route.node == node);
        there.map(|route| ReplicaId(route.replica.into_bytes())).collect()
    }

    /// Whether a replica is on this node.
    pub fn is_at(&self, replica: ReplicaId, node: Uuid) -> bool {
        self.nodes.get(&replica) == Some(&node)
    }

    /// A connection has come.
    pub fn up(&mut self, session: Session) {
        if session.side() == Side::Dialled {
            self.sessions.insert(session.peer(), session);
        }
    }

    /// A connection has ended.
    pub fn down(&mut self, session: &Session) {
        // Another one may have taken its place.
        if self.sessions.get(&session.peer()) == Some(session) {
            self.sessions.remove(&session.peer());
        }
    }

    /// Sends an order to a replica on another node. It is lost if there is no connection: it is repeated then.
    pub fn order(&mut self, replica: ReplicaId, message: &ToReplica) {
        let node = self.nodes.get(&replica);
        if let Some(session) = node.and_then(|node| self.sessions.get(node)).cloned() {
            let frame = frame(wire::pack_ask(message), message.volume, message.replica, message.epoch);
            self.send(&session, frame);
        }
    }

    /// Sends an answer back the way the order came.
    pub fn answer(&mut self, session: &Session, message: &FromReplica) {
        let frame = frame(
            wire::pack_reply(message),
            message.volume,
            message.replica,
            message.epoch,
        );
        self.send(session, frame);
    }

    fn send(&mut self, session: &Session, frame: Frame) {
        // What finds no place, or no peer any more, is lost like on a bad line, and said again.
        if session.queue(frame).is_ok() && !self.unsent.contains(session) {
            self.unsent.push(session.clone());
        }
    }

    /// Lets what was queued go out.
    pub fn flush(&mut self) {
        for session in self.unsent.drain(..) {
            session.flush();
        }
    }

    /// Reads a frame. What is no message is counted, and told once for each connection.
    pub fn arrived(&self, incoming: Incoming) -> Option<Arrived> {
        let Incoming { session, frame, hold } = incoming;
        let (volume, replica) = (frame.volume.into_bytes(), ReplicaId(frame.replica.into_bytes()));
        let (epoch, kind) = (frame.epoch, frame.kind.0);
        let payload = frame.payload.into_iter().next().map(|bytes| {
            let len = bytes.len();
            Buf::lent(Arc::new(Held { bytes, _hold: hold }), len)
        });
        let read: Result<Arrived, WireError> = if wire::is_reply(kind) {
            wire::unpack_reply(volume, replica, epoch, kind, &frame.body, payload)
                .map(|answer| Arrived::Answer(answer, session.clone()))
        } else {
            wire::unpack_ask(volume, replica, epoch, kind, &frame.body, payload)
                .map(|order| Arrived::Order(order, session.clone()))
        };
        match read {
            Ok(arrived) => Some(arrived),
            Err(error) => {
                self.refuse(&session, &error.to_string());
                None
            }
        }
    }

    /// Counts what is not taken.
    pub fn refuse(&self, session: &Session, why: &str) {
        let before = self.exchange.refuse();
        // Whoever sends one such message sends many.
        if before.is_power_of_two() || before == 0 {
            tracing::warn!(peer = %session.peer(), address = %session.address(), why, "a message was refused");
        }
    }
}

pub(super) fn frame(packed: Packed, volume: [u8; 16], replica: ReplicaId, epoch: Epoch) -> Frame {
    Frame {
        kind: Kind(packed.kind),
        flags: 0,
        volume: Uuid::from_bytes(volume),
        replica: Uuid::from_bytes(replica.0),
        epoch,
        request: 0,
        body: Bytes::from(packed.body),
        payload: packed.payload,
    }
}
