//! The loop of the transport: it waits for all connections in one place, makes them, takes what arrives, and notices
//! when somebody is gone.
//!
//! A round goes: wait; read where there is something; look at the clock; give the users what has happened, all of it at
//! once. Nothing in a round blocks.

use std::collections::{BTreeMap, HashMap};
use std::io;
use std::net::{SocketAddr, TcpListener};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant, SystemTime};

use nix::errno::Errno;
use nix::sys::epoll::{Epoll, EpollCreateFlags, EpollEvent, EpollFlags, EpollTimeout};
use nix::sys::eventfd::{EfdFlags, EventFd};
use slab::Slab;
use uuid::Uuid;

use super::connect::{Dial, wait};
use super::counters::Counters;
use super::frame::{Frame, Kind};
use super::limits::{FAREWELL, GOOD_AFTER, READ_BYTES_MAX};
use super::link::{Link, Lost};
use super::session::{self, Session, Side};
use super::{Event, Incoming, Sink, TransportConfig};
use crate::identity::Wallet;

/// What other threads want of this one.
#[derive(Debug)]
pub(super) enum Order {
    /// Have a connection to this node, at one of these addresses.
    Dial(Uuid, Vec<SocketAddr>),
    /// Have none.
    Forget(Uuid),
    /// Something about this connection has changed.
    Look(u64),
    /// There is room for what it sends.
    Read(u64),
    /// There is room in its queue for somebody who was told that there is none.
    Room(u64),
    Stop,
}

/// Takes orders, and wakes the thread.
#[derive(Debug)]
pub(super) struct Bell {
    orders: Mutex<Vec<Order>>,
    bell: EventFd,
}

impl Bell {
    pub fn new() -> io::Result<Bell> {
        Ok(Bell {
            orders: Mutex::default(),
            bell: EventFd::from_flags(EfdFlags::EFD_CLOEXEC | EfdFlags::EFD_NONBLOCK)?,
        })
    }

    pub fn ring(&self, order: Order) {
        let mut orders = self.orders.lock().unwrap_or_else(PoisonError::into_inner);
        orders.push(order);
        if orders.len() == 1 {
            // It fails only when the counter is full, and then the thread is being woken already.
            let _ = self.bell.write(1);
        }
    }

    fn take(&self) -> Vec<Order> {
        let mut orders = self.orders.lock().unwrap_or_else(PoisonError::into_inner);
        let _ = self.bell.read();
        std::mem::take(&mut orders)
    }
}

const BELL: u64 = u64::MAX;
pub(super) const LISTENER: u64 = u64::MAX - 1;

/// Events taken from the kernel at a time.
const EVENTS_MAX: usize = 128;

pub(super) struct Conn {
    pub token: u64,
    /// The node that was dialled.
    pub dialled: Option<Uuid>,
    pub since: Instant,
    pub state: State,
    /// It has ended here, and the peer has until then to take our reason.
    pub farewell: Option<Instant>,
}

pub(super) enum State {
    Opening(Box<Link>),
    Up(Session),
}

impl Conn {
    fn with_link<T>(&mut self, work: impl FnOnce(&mut Link) -> T) -> T {
        match &mut self.state {
            State::Opening(link) => work(link),
            State::Up(session) => session.with_link(work),
        }
    }
}

pub(super) struct Wire {
    pub config: TransportConfig,
    pub wallet: Wallet,
    pub boot: Uuid,
    pub sink: Arc<dyn Sink>,
    pub counters: Arc<Counters>,
    pub listener: Option<TcpListener>,
    pub listen_again: Option<Instant>,
    pub poller: Arc<Epoll>,
    pub bell: Arc<Bell>,
    pub conns: Slab<Conn>,
    pub made: u32,
    pub numbers: u64,
    pub dials: BTreeMap<Uuid, Dial>,
    /// The one connection that each peer has dialled.
    pub accepted: HashMap<Uuid, usize>,
    pub events: Vec<Event>,
    /// Where the kernel puts what is ready.
    ready: Box<[EpollEvent]>,
    pub staging: Vec<u8>,
    pub frames: Vec<Frame>,
    pub next_pass: Instant,
    pub chance: u64,
}

/// What a wire is made of.
pub(super) struct Parts {
    pub config: TransportConfig,
    pub wallet: Wallet,
    pub boot: Uuid,
    pub sink: Arc<dyn Sink>,
    pub counters: Arc<Counters>,
    pub listener: Option<TcpListener>,
    pub bell: Arc<Bell>,
}

impl Wire {
    pub fn new(parts: Parts) -> io::Result<Wire> {
        let poller = Epoll::new(EpollCreateFlags::EPOLL_CLOEXEC)?;
        poller.add(&parts.bell.bell, EpollEvent::new(EpollFlags::EPOLLIN, BELL))?;
        if let Some(listener) = &parts.listener {
            listener.set_nonblocking(true)?;
            poller.add(listener, EpollEvent::new(EpollFlags::EPOLLIN, LISTENER))?;
        }
        let chance = u64::from_le_bytes(Uuid::new_v4().as_bytes()[..8].try_into().expect("eight bytes")) | 1;
        Ok(Wire {
            config: parts.config,
            wallet: parts.wallet,
            boot: parts.boot,
            sink: parts.sink,
            counters: parts.counters,
            listener: parts.listener,
            listen_again: None,
            poller: Arc::new(poller),
            bell: parts.bell,
            conns: Slab::new(),
            made: 0,
            numbers: 0,
            dials: BTreeMap::new(),
            accepted: HashMap::new(),
            events: Vec::new(),
            ready: vec![EpollEvent::empty(); EVENTS_MAX].into(),
            staging: vec![0; READ_BYTES_MAX],
            frames: Vec::new(),
            next_pass: Instant::now(),
            chance,
        })
    }

    /// Runs on the calling thread until it is told to stop.
    pub fn run(&mut self) {
        loop {
            let until = self.next_pass.saturating_duration_since(Instant::now());
            let timeout = EpollTimeout::try_from(until.as_micros().div_ceil(1000).min(60_000) as i32)
                .expect("a minute fits into a timeout");
            if !self.round(timeout) {
                return;
            }
        }
    }

    /// One round, which begins with a wait. False if it was told to stop, and has.
    pub fn round(&mut self, timeout: EpollTimeout) -> bool {
        let count = match self.poller.wait(&mut self.ready, timeout) {
            Ok(count) => count,
            Err(Errno::EINTR) => 0,
            Err(error) => panic!("the transport cannot wait for its own sockets: {error}"),
        };
        for index in 0..count {
            let event = self.ready[index];
            match event.data() {
                BELL => {
                    for order in self.bell.take() {
                        if matches!(order, Order::Stop) {
                            self.end();
                            return false;
                        }
                        self.order(order);
                    }
                }
                LISTENER => self.accept(),
                token => self.ready(token, event.events()),
            }
        }
        // Behind what was read: a thread that was held up must not take its peers for dead.
        let now = Instant::now();
        if now >= self.next_pass {
            self.pass(now);
        }
        self.tell();
        true
    }

    fn tell(&mut self) {
        if !self.events.is_empty() {
            self.sink.deliver(&mut self.events);
            self.events.clear();
        }
    }

    /// Where a token's connection is, unless it has gone.
    fn key_of(&self, token: u64) -> Option<usize> {
        let key = token as u32 as usize;
        (self.conns.get(key)?.token == token).then_some(key)
    }

    fn order(&mut self, order: Order) {
        match order {
            Order::Dial(node, addresses) => {
                let dial = self.dials.entry(node).or_insert_with(|| Dial {
                    addresses: Vec::new(),
                    failures: 0,
                    conn: None,
                    next: Instant::now(),
                });
                if dial.addresses != addresses {
                    dial.addresses = addresses;
                    dial.failures = 0;
                    dial.next = Instant::now();
                }
                self.next_pass = Instant::now();
            }
            Order::Forget(node) => {
                if let Some(key) = self.dials.remove(&node).and_then(|dial| dial.conn) {
                    let why = Lost::Here("it is not needed any more".to_owned());
                    self.conns[key].with_link(|link| link.refuse(why));
                    self.settle(key);
                }
            }
            Order::Look(token) => {
                if let Some(key) = self.key_of(token) {
                    self.settle(key);
                }
            }
            Order::Read(token) => {
                if let Some(key) = self.key_of(token) {
                    self.conns[key].with_link(|link| {
                        link.reading = true;
                        // Nothing was heard because nobody listened.
                        link.heard = Instant::now();
                        link.watch();
                    });
                }
            }
            Order::Room(token) => {
                if let Some(key) = self.key_of(token)
                    && let State::Up(session) = &self.conns[key].state
                {
                    self.events.push(Event::Room(session.clone()));
                }
            }
            Order::Stop => unreachable!("looked at by whoever runs"),
        }
    }

    fn ready(&mut self, token: u64, what: EpollFlags) {
        let Some(key) = self.key_of(token) else { return };
        let (staging, frames) = (&mut self.staging, &mut self.frames);
        let conn = &mut self.conns[key];
        if conn.farewell.is_some() {
            if conn.with_link(|link| link.has_hung_up(staging)) {
                self.remove(key);
            }
            return;
        }
        if what.contains(EpollFlags::EPOLLOUT) {
            match &mut conn.state {
                State::Opening(link) => link.flush(),
                State::Up(session) => session.writable(),
            }
        }
        if what.intersects(EpollFlags::EPOLLIN | EpollFlags::EPOLLHUP | EpollFlags::EPOLLERR) {
            let paused = conn.with_link(|link| {
                link.fill(staging, frames);
                !link.reading
            });
            if paused && what.intersects(EpollFlags::EPOLLHUP | EpollFlags::EPOLLERR) {
                conn.with_link(|link| link.lose(Lost::Closed));
            }
        }
        self.settle(key);
    }

    /// Draws the consequences of whatever has just happened to a connection.
    pub(super) fn settle(&mut self, key: usize) {
        let Some(conn) = self.conns.get_mut(key) else { return };
        if conn.farewell.is_some() {
            return;
        }
        if matches!(&conn.state, State::Opening(link) if link.theirs().is_some()) {
            self.promote(key);
        }
        let conn = &mut self.conns[key];
        if let State::Up(session) = &conn.state
            && !self.frames.is_empty()
        {
            let (mut bytes, count) = (0, self.frames.len());
            for frame in self.frames.drain(..) {
                let len = frame.len_on_wire();
                bytes += len;
                let incoming = Incoming {
                    session: session.clone(),
                    hold: session.0.held.hold(len),
                    frame,
                };
                self.events.push(Event::Incoming(incoming));
            }
            self.counters.received(count, bytes);
            if session.0.held.is_full() {
                session.with_link(|link| {
                    link.reading = false;
                    link.watch();
                });
            }
        }
        self.frames.clear();
        let Some(why) = self.conns[key].with_link(|link| link.lost.clone()) else {
            return;
        };
        self.ended(key, why);
    }

    /// Both ends know each other now.
    fn promote(&mut self, key: usize) {
        let conn = &mut self.conns[key];
        let State::Opening(link) = &mut conn.state else { return };
        let peer = link
            .theirs()
            .expect("it is promoted because the peer is known")
            .hello
            .node;
        let side = match conn.dialled {
            Some(_) => Side::Dialled,
            None => Side::Accepted,
        };
        if side == Side::Accepted
            && let Some(older) = self.accepted.insert(peer, key)
        {
            // It dials again because it has lost the other one, whatever that looks like from here.
            let why = Lost::Here("replaced by a newer connection of the same node".to_owned());
            self.conns[older].with_link(|link| link.refuse(why));
            let frames = std::mem::take(&mut self.frames);
            self.settle(older);
            self.frames = frames;
        }
        self.numbers += 1;
        let parts = session::Parts {
            side,
            number: self.numbers,
            token: self.conns[key].token,
            limits: self.config.limits,
            bell: self.bell.clone(),
            counters: self.counters.clone(),
        };
        // Taken out for a moment, so that it can move into the session.
        let mut conn = self.conns.remove(key);
        let State::Opening(link) = conn.state else {
            unreachable!("looked at above")
        };
        let session = Session::new(parts, *link);
        conn.state = State::Up(session.clone());
        let again = self.conns.insert(conn);
        assert_eq!(again, key, "a slab gives the place that was left last");
        self.counters.session();
        tracing::info!(
            %peer, address = %session.address(), ?side, version = session.version(), "connected to a node"
        );
        self.next_pass = Instant::now();
        self.events.push(Event::Up(session));
    }

    /// A connection has ended: tells whom it concerns, and dials again if it was ours.
    fn ended(&mut self, key: usize, why: Lost) {
        let now = Instant::now();
        let conn = &mut self.conns[key];
        if matches!(
            why,
            Lost::Refused(_) | Lost::RefusedByPeer(_) | Lost::Nonsense(_) | Lost::Tls(_)
        ) {
            self.counters.refused();
        }
        // To somebody who was told why, the socket stays open until he has read it.
        let told = matches!(why, Lost::Refused(_) | Lost::Nonsense(_) | Lost::Here(_) | Lost::Tls(_));
        conn.farewell = Some(if told { now + FAREWELL } else { now });
        let (since, dialled) = (conn.since, conn.dialled);
        let address = conn.with_link(|link| link.address());
        let was_good = match &conn.state {
            State::Up(session) => {
                let session = session.clone();
                session.end();
                if self.accepted.get(&session.peer()) == Some(&key) && dialled.is_none() {
                    self.accepted.remove(&session.peer());
                }
                tracing::info!(peer = %session.peer(), side = ?session.side(), %why, "a connection to a node ended");
                self.events.push(Event::Down {
                    session,
                    why: why.clone(),
                });
                true
            }
            State::Opening(_) => {
                if dialled.is_none() {
                    tracing::debug!(%address, %why, "somebody did not get in");
                }
                false
            }
        };
        if let Some(node) = dialled
            && let Some(dial) = self.dials.get_mut(&node)
            && dial.conn == Some(key)
        {
            dial.conn = None;
            dial.failures = match was_good && now.duration_since(since) >= GOOD_AFTER {
                true => 0,
                false => dial.failures + 1,
            };
            let wait = wait(&self.config, dial.failures, &mut self.chance);
            dial.next = now + wait;
            if !was_good {
                self.failed(node, address, why);
            }
        }
        if told {
            self.next_pass = self.next_pass.min(now + FAREWELL);
        } else {
            self.remove(key);
        }
        self.next_pass = now;
    }

    fn remove(&mut self, key: usize) {
        self.conns[key].with_link(Link::forget);
        self.conns.remove(key);
    }

    pub(super) fn failed(&mut self, node: Uuid, address: SocketAddr, why: Lost) {
        self.counters.failed_dial();
        tracing::debug!(%node, %address, %why, "a node could not be dialled");
        self.events.push(Event::DialFailed {
            peer: node,
            address,
            why,
        });
    }

    /// Looks at the clock for everything that waits, and says when to look again.
    fn pass(&mut self, now: Instant) {
        let mut next = now + Duration::from_secs(60);
        if let Some(again) = self.listen_again {
            if again <= now {
                self.listen_again = None;
                self.listen(EpollFlags::EPOLLIN);
            } else {
                next = next.min(again);
            }
        }
        // We may have been stopped ourselves, with the whole machine or alone: that was nobody's silence.
        let held_up = now.saturating_duration_since(self.next_pass);
        let keys: Vec<usize> = self.conns.iter().map(|(key, _)| key).collect();
        for key in keys {
            if held_up > self.config.heartbeat_every {
                self.conns[key].with_link(|link| link.heard = now.min(link.heard + held_up));
            }
            if let Some(due) = self.look(key, now) {
                next = next.min(due);
            }
        }
        let due: Vec<Uuid> = self.dials.keys().copied().collect();
        for node in due {
            let dial = &self.dials[&node];
            if dial.conn.is_none() && dial.next <= now {
                self.dial(node, now);
            }
            let dial = &self.dials[&node];
            next = next.min(match dial.conn {
                None => dial.next,
                Some(_) => now + self.config.open_within,
            });
        }
        // What the round itself brought about may be due already.
        self.next_pass = next;
    }

    /// Looks at the clock for one connection; gives when to look again.
    fn look(&mut self, key: usize, now: Instant) -> Option<Instant> {
        let config = &self.config;
        let (heartbeat_every, dead_after, open_within) =
            (config.heartbeat_every, config.dead_after, config.open_within);
        let conn = self.conns.get_mut(key)?;
        if let Some(until) = conn.farewell {
            if until <= now {
                self.remove(key);
                return None;
            }
            return Some(until);
        }
        let due = match &mut conn.state {
            State::Opening(link) => {
                let late = conn.since + open_within;
                if late <= now {
                    link.lose(Lost::Late(open_within.as_millis()));
                }
                late
            }
            State::Up(session) => {
                let over = session.0.until <= SystemTime::now();
                session.with_link(|link| {
                    if over {
                        link.refuse(Lost::Here("a certificate of this connection has ended".to_owned()));
                    }
                    let silent = now.saturating_duration_since(link.heard);
                    if link.reading && silent >= dead_after {
                        link.lose(Lost::Silent(silent.as_millis()));
                    }
                    if now.saturating_duration_since(link.sent) >= heartbeat_every && !link.is_full() {
                        link.seal(&[Frame::own(Kind::HEARTBEAT, Vec::new())]);
                        link.flush();
                    }
                    // Where the socket takes nothing the peer is silent, too, or our kernel ends it.
                    let beat = if link.is_full() { now } else { link.sent } + heartbeat_every;
                    let dead = if link.reading { link.heard } else { now } + dead_after;
                    beat.min(dead)
                })
            }
        };
        self.settle(key);
        Some(due)
    }

    /// Says farewell to everybody.
    pub fn end(&mut self) {
        let keys: Vec<usize> = self.conns.iter().map(|(key, _)| key).collect();
        self.dials.clear();
        for key in keys {
            self.conns[key].with_link(|link| link.refuse(Lost::Here("the node plugin is ending".to_owned())));
            self.settle(key);
            if let Some(conn) = self.conns.get_mut(key) {
                // What is unread would turn the end into a reset, and our words would be lost.
                let staging = &mut self.staging;
                conn.with_link(|link| link.has_hung_up(staging));
            }
        }
        self.tell();
    }
}
