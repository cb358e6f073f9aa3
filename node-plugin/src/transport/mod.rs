//! How nodes talk to each other: frames over TCP and TLS, with certificates on both sides.
//!
//! ```text
//!  shard ── Session::send ──► sealed and written by whoever sends ──► socket ─ ─ ─► the other node's wire
//!  shard ◄── Sink::deliver ◄── wire: reads, opens, checks ◄── socket ◄─ ─ ─ sealed there
//! ```
//!
//! The wire is a loop on a thread of its own, or part of a loop that somebody has already: see [`Sink::adopt`].
//!
//! Frames are carried without being understood: who sends what to whom is for the replication protocol to say. What this
//! room promises is that both ends are who their certificates say they are, that frames arrive once and in order or the
//! [`Session`] ends, that what waits is bounded in bytes and frames, and that a peer which is gone is noticed within
//! [`limits::DEAD_AFTER`]. What was sent and not received when a session ends is lost; whoever sent it knows what that
//! was, and there is a new session as soon as the peer can be reached.
//!
//! Why threads, and who writes: `docs/rfd/0009`. The bytes: `docs/replication.md`.

mod connect;
mod counters;
pub mod exchange;
pub mod frame;
mod hello;
pub mod limits;
mod link;
#[cfg(any(test, feature = "plain-wire-for-comparison"))]
mod plain;
mod records;
mod session;
#[cfg(test)]
pub(crate) mod tests;
mod wire;
mod work;

use std::io;
use std::net::{SocketAddr, TcpListener};
use std::ops::RangeInclusive;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use uuid::Uuid;

pub use counters::Counts;
pub use frame::{Frame, Kind};
pub use hello::VERSIONS;
pub use link::Lost;
pub use session::{Hold, Limits, SendError, Session, Side};
pub use work::Work;

use crate::identity::Wallet;
use counters::Counters;
use wire::{Bell, Order, Wire};
use work::Runner;

/// True where connections without TLS can be made: never in `galleonfs`, which does not compile then.
pub const HAS_PLAIN_WIRE: bool = cfg!(feature = "plain-wire-for-comparison");

/// How a transport is set up.
#[derive(Clone, Debug)]
pub struct TransportConfig {
    pub cluster: Uuid,
    /// This node.
    pub node: Uuid,
    /// Versions that this node speaks.
    pub versions: RangeInclusive<u16>,
    pub limits: Limits,
    pub heartbeat_every: Duration,
    pub dead_after: Duration,
    pub open_within: Duration,
    pub redial_first: Duration,
    pub redial_max: Duration,
    /// Without TLS, to measure what it costs.
    #[cfg(any(test, feature = "plain-wire-for-comparison"))]
    pub plain: bool,
}

impl TransportConfig {
    pub fn new(cluster: Uuid, node: Uuid) -> TransportConfig {
        TransportConfig {
            cluster,
            node,
            versions: VERSIONS,
            limits: Limits {
                queue_bytes_max: limits::QUEUE_BYTES_MAX,
                queue_frames_max: limits::QUEUE_FRAMES_MAX,
                held_bytes_max: limits::HELD_BYTES_MAX,
            },
            heartbeat_every: limits::HEARTBEAT_EVERY,
            dead_after: limits::DEAD_AFTER,
            open_within: limits::OPEN_WITHIN,
            redial_first: limits::REDIAL_FIRST,
            redial_max: limits::REDIAL_MAX,
            #[cfg(any(test, feature = "plain-wire-for-comparison"))]
            plain: false,
        }
    }
}

/// A frame that has arrived.
#[derive(Debug)]
pub struct Incoming {
    pub session: Session,
    pub frame: Frame,
    /// To be kept as long as the frame's memory is: what is held of one peer is bounded.
    pub hold: Hold,
}

/// Something has happened. Of one session first comes `Up`, last `Down`, each once.
#[derive(Debug)]
pub enum Event {
    Up(Session),
    Incoming(Incoming),
    /// A frame found the queue full before, and would be taken now.
    Room(Session),
    Down {
        session: Session,
        why: Lost,
    },
    /// A node that is to be talked to could not be reached. It will be tried again.
    DialFailed {
        peer: Uuid,
        address: SocketAddr,
        why: Lost,
    },
}

/// Where events go.
pub trait Sink: Send + Sync + 'static {
    /// Takes all events of a round, in order. Called on the thread that does the transport's work, and must not wait.
    fn deliver(&self, events: &mut Vec<Event>);

    /// Takes over the transport's work, if there is a loop that it can be done in; otherwise gives it back, and a thread is
    /// started for it. Whoever waits for what arrives and does the work himself need not be woken by another thread.
    fn adopt(&self, work: Work) -> Option<Work> {
        Some(work)
    }
}

/// This node's connections. Cheap to clone; they end with [`Transport::stop`], or with the last clone.
#[derive(Clone)]
pub struct Transport(Arc<Inner>);

struct Inner {
    bell: Arc<Bell>,
    boot: Uuid,
    address: Option<SocketAddr>,
    counters: Arc<Counters>,
    runner: Mutex<Option<Runner>>,
}

impl std::fmt::Debug for Transport {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Transport")
            .field("address", &self.0.address)
            .finish_non_exhaustive()
    }
}

impl Transport {
    /// Begins to work. Without a listener this node only dials.
    pub fn start(
        config: TransportConfig,
        wallet: Wallet,
        listener: Option<TcpListener>,
        sink: Arc<dyn Sink>,
    ) -> io::Result<Transport> {
        let (bell, counters) = (Arc::new(Bell::new()?), Arc::new(Counters::default()));
        let boot = Uuid::new_v4();
        let address = listener.as_ref().map(TcpListener::local_addr).transpose()?;
        let wire = Wire::new(wire::Parts {
            config,
            wallet,
            boot,
            sink: sink.clone(),
            counters: counters.clone(),
            listener,
            bell: bell.clone(),
        })?;
        let runner = Runner::start(wire, sink.as_ref())?;
        Ok(Transport(Arc::new(Inner {
            bell,
            boot,
            address,
            counters,
            runner: Mutex::new(Some(runner)),
        })))
    }

    /// Has a connection to a node from now on, made again whenever it ends. Addresses are tried in turn; the ones given
    /// last count.
    pub fn dial(&self, node: Uuid, addresses: Vec<SocketAddr>) {
        self.0.bell.ring(Order::Dial(node, addresses));
    }

    /// Has none any more. What the node itself has dialled stays.
    pub fn forget(&self, node: Uuid) {
        self.0.bell.ring(Order::Forget(node));
    }

    /// Where other nodes reach this one.
    pub fn address(&self) -> Option<SocketAddr> {
        self.0.address
    }

    /// This start of this process, as peers see it.
    pub fn boot(&self) -> Uuid {
        self.0.boot
    }

    pub fn counts(&self) -> Counts {
        self.0.counters.read()
    }

    /// Ends all connections, with a word to everybody, and waits until that is done.
    pub fn stop(&self) {
        self.0.stop();
    }
}

impl Inner {
    fn stop(&self) {
        self.bell.ring(Order::Stop);
        let runner = self.runner.lock().unwrap_or_else(PoisonError::into_inner).take();
        if let Some(runner) = runner {
            runner.join();
        }
    }
}

impl Drop for Inner {
    fn drop(&mut self) {
        self.stop();
    }
}
