//! A connection on which both ends know each other, as its users see it.
//!
//! Whoever sends seals and writes itself, on its own thread, if nobody else is at the connection; otherwise whoever is
//! there takes the frames along when it is done. So a frame that a shard sends wakes no thread on this side, and one
//! thread never waits for another. What the socket does not take stays in the queue, and the transport's thread goes on
//! with it.

use std::collections::VecDeque;
use std::fmt;
use std::net::SocketAddr;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering, fence};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, TryLockError};
use std::time::SystemTime;

use uuid::Uuid;

use super::counters::Counters;
use super::frame::Frame;
use super::limits::SEAL_BYTES_MAX;
use super::link::{Link, Lost};
use super::wire::{Bell, Order};

/// Who made a connection. Each node dials the nodes that it wants something of, so two nodes may have two connections,
/// and neither has to decide which one stays.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Side {
    /// We have dialled.
    Dialled,
    /// The peer has.
    Accepted,
}

/// Why a frame was not taken. It comes back.
#[derive(Debug)]
pub enum SendError {
    /// As much as may wait is waiting. [`super::Event::Room`] says when it is worth trying again.
    Full(Frame),
    /// The connection has ended; [`super::Event::Down`] says why.
    Down(Frame),
}

/// A connection to a peer, from its hello to its end. Cheap to clone; all clones are one. There is a new one after each
/// interruption, so nothing that was meant for one connection goes out on the next.
#[derive(Clone)]
pub struct Session(pub(super) Arc<Inner>);

pub(super) struct Inner {
    pub peer: Uuid,
    pub side: Side,
    pub number: u64,
    pub boot: Uuid,
    pub version: u16,
    pub address: SocketAddr,
    /// When it ends because a certificate does.
    pub until: SystemTime,
    pub token: u64,
    pub limits: Limits,
    queue: Mutex<Queue>,
    link: Mutex<Link>,
    /// Something is to be sent that nobody at the connection may have seen.
    pending: AtomicBool,
    pub held: Arc<Held>,
    pub counters: Arc<Counters>,
}

/// What may wait in one session.
#[derive(Clone, Copy, Debug)]
pub struct Limits {
    pub queue_bytes_max: usize,
    pub queue_frames_max: usize,
    pub held_bytes_max: usize,
}

#[derive(Default)]
struct Queue {
    frames: VecDeque<Frame>,
    bytes: usize,
    /// Somebody was told that there is no room.
    was_full: bool,
    ended: bool,
}

impl fmt::Debug for Session {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Session({} with {}, {:?})", self.0.number, self.0.peer, self.0.side)
    }
}

impl PartialEq for Session {
    fn eq(&self, other: &Session) -> bool {
        Arc::ptr_eq(&self.0, &other.0)
    }
}

impl Eq for Session {}

impl Session {
    pub(super) fn new(parts: Parts, link: Link) -> Session {
        let theirs = link.theirs().expect("a session begins when the peer is known");
        Session(Arc::new(Inner {
            peer: theirs.hello.node,
            side: parts.side,
            number: parts.number,
            boot: theirs.hello.boot,
            version: theirs.version,
            address: link.address(),
            until: theirs.until,
            token: parts.token,
            limits: parts.limits,
            queue: Mutex::default(),
            link: Mutex::new(link),
            pending: AtomicBool::new(false),
            held: Arc::new(Held {
                bytes: AtomicUsize::new(0),
                full: AtomicBool::new(false),
                bytes_max: parts.limits.held_bytes_max,
                token: parts.token,
                bell: parts.bell,
            }),
            counters: parts.counters,
        }))
    }

    /// The node at the other end: the uid of its Node object, which its certificate bears.
    pub fn peer(&self) -> Uuid {
        self.0.peer
    }

    pub fn side(&self) -> Side {
        self.0.side
    }

    /// Counts up with each connection of this process.
    pub fn number(&self) -> u64 {
        self.0.number
    }

    /// Which start of its process the peer is in.
    pub fn boot(&self) -> Uuid {
        self.0.boot
    }

    /// The protocol version that both speak.
    pub fn version(&self) -> u16 {
        self.0.version
    }

    pub fn address(&self) -> SocketAddr {
        self.0.address
    }

    /// Sends one frame. Whoever has several uses [`Session::queue`], and [`Session::flush`] once.
    pub fn send(&self, frame: Frame) -> Result<(), SendError> {
        self.queue(frame)?;
        self.flush();
        Ok(())
    }

    /// Puts a frame behind those that wait. It goes out with the next flush, of whomever.
    pub fn queue(&self, frame: Frame) -> Result<(), SendError> {
        let mut queue = self.lock_queue();
        if queue.ended {
            return Err(SendError::Down(frame));
        }
        let len = frame.len_on_wire();
        let limits = &self.0.limits;
        if queue.bytes + len > limits.queue_bytes_max || queue.frames.len() >= limits.queue_frames_max {
            queue.was_full = true;
            self.0.counters.full();
            return Err(SendError::Full(frame));
        }
        queue.bytes += len;
        queue.frames.push_back(frame);
        Ok(())
    }

    /// Sends what waits, as far as the network takes it. Never blocks.
    pub fn flush(&self) {
        self.0.pending.store(true, Ordering::SeqCst);
        self.go_on();
    }

    /// Bytes that wait to be sent.
    pub fn queued_bytes(&self) -> usize {
        self.lock_queue().bytes
    }

    /// Ends the connection, and tells the peer why. [`super::Event::Down`] follows.
    pub fn close(&self, why: &str) {
        self.with_link(|link| link.refuse(Lost::Here(why.to_owned())));
        self.0.held.bell.ring(Order::Look(self.0.token));
    }

    /// Sends as long as there is something and nobody else is at it.
    fn go_on(&self) {
        // Pairs with the one after unlocking: either we get the lock, or whoever has it sees what is pending.
        fence(Ordering::SeqCst);
        while self.0.pending.load(Ordering::SeqCst) {
            let mut link = match self.0.link.try_lock() {
                Ok(link) => link,
                Err(TryLockError::WouldBlock) => return,
                Err(TryLockError::Poisoned(poisoned)) => poisoned.into_inner(),
            };
            self.0.pending.store(false, Ordering::SeqCst);
            self.write(&mut link);
            drop(link);
            fence(Ordering::SeqCst);
        }
    }

    /// Works at the connection, and takes along what others wanted to send meanwhile.
    pub(super) fn with_link<T>(&self, work: impl FnOnce(&mut Link) -> T) -> T {
        let mut link = self.0.link.lock().unwrap_or_else(PoisonError::into_inner);
        let done = work(&mut link);
        // The work may have flushed what the socket did not take before: then nobody is told any more that there is room
        // for what waits in the queue.
        if !link.is_full() {
            self.write(&mut link);
        }
        drop(link);
        self.go_on();
        done
    }

    /// Goes on with what the socket did not take before.
    pub(super) fn writable(&self) {
        self.with_link(Link::flush);
    }

    fn write(&self, link: &mut Link) {
        loop {
            link.flush();
            if link.lost.is_some() || link.is_full() {
                return;
            }
            let (batch, room) = self.take_batch();
            if room {
                self.0.held.bell.ring(Order::Room(self.0.token));
            }
            if batch.is_empty() {
                return;
            }
            let bytes = batch.iter().map(Frame::len_on_wire).sum::<usize>();
            self.0.counters.sent(batch.len(), bytes);
            link.seal(&batch);
        }
    }

    /// The frames to seal next, and whether there is room again for somebody who was told that there is none.
    fn take_batch(&self) -> (Vec<Frame>, bool) {
        let mut queue = self.lock_queue();
        let mut bytes = 0;
        let fit = queue.frames.iter().take_while(|frame| {
            bytes += frame.len_on_wire();
            bytes <= SEAL_BYTES_MAX
        });
        // The first goes in any case.
        let count = fit.count().max(1).min(queue.frames.len());
        let batch: Vec<Frame> = queue.frames.drain(..count).collect();
        queue.bytes -= batch.iter().map(Frame::len_on_wire).sum::<usize>();
        let limits = &self.0.limits;
        let room = queue.was_full
            && queue.bytes <= limits.queue_bytes_max / 2
            && queue.frames.len() <= limits.queue_frames_max / 2;
        queue.was_full &= !room;
        (batch, room)
    }

    /// Nothing is taken any more, and what waits is let go.
    pub(super) fn end(&self) {
        let mut queue = self.lock_queue();
        queue.ended = true;
        queue.bytes = 0;
        let frames = std::mem::take(&mut queue.frames);
        drop(queue);
        drop(frames);
    }

    fn lock_queue(&self) -> MutexGuard<'_, Queue> {
        self.0.queue.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// What a session is made of, besides its link.
pub(super) struct Parts {
    pub side: Side,
    pub number: u64,
    pub token: u64,
    pub limits: Limits,
    pub bell: Arc<Bell>,
    pub counters: Arc<Counters>,
}

/// Counts what was received and is still in somebody's hands.
#[derive(Debug)]
pub(super) struct Held {
    bytes: AtomicUsize,
    full: AtomicBool,
    bytes_max: usize,
    token: u64,
    bell: Arc<Bell>,
}

impl Held {
    pub fn hold(self: &Arc<Held>, bytes: usize) -> Hold {
        self.bytes.fetch_add(bytes, Ordering::SeqCst);
        Hold {
            held: self.clone(),
            bytes,
        }
    }

    /// True if nothing more is to be read. Then [`Order::Read`] comes when there is room again.
    pub fn is_full(&self) -> bool {
        if self.bytes.load(Ordering::SeqCst) <= self.bytes_max {
            return false;
        }
        self.full.store(true, Ordering::SeqCst);
        // Somebody may have let go before he could see that we wait.
        if self.bytes.load(Ordering::SeqCst) <= self.bytes_max / 2 && self.full.swap(false, Ordering::SeqCst) {
            return false;
        }
        true
    }
}

/// Stands for what one received frame occupies. Dropped when its memory is not needed any more.
#[derive(Debug)]
pub struct Hold {
    held: Arc<Held>,
    bytes: usize,
}

impl Drop for Hold {
    fn drop(&mut self) {
        let held = &self.held;
        let left = held.bytes.fetch_sub(self.bytes, Ordering::SeqCst) - self.bytes;
        if left <= held.bytes_max / 2 && held.full.swap(false, Ordering::SeqCst) {
            held.bell.ring(Order::Read(held.token));
        }
    }
}
