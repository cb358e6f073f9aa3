//! Two and more nodes in one process, over 127.0.0.1, with the authority that the controller has.

mod exchange;
mod hostile;
mod links;
mod plain;
mod traffic;

use std::collections::VecDeque;
use std::net::{SocketAddr, TcpListener};
use std::sync::{Arc, Condvar, Mutex};
use std::time::{Duration, Instant, SystemTime};

use bytes::Bytes;
use galleonfs_api::NodeIdentity;
use galleonfs_controller::certificates::Authority;
use galleonfs_storage_engine::buffer::{Buf, BufMut};
use galleonfs_storage_engine::types::Epoch;
use rcgen::{CertificateParams, KeyPair};
use uuid::Uuid;

use super::*;
use crate::identity::Credentials;

/// What never takes so long. A test that waits for it has failed.
const PATIENCE: Duration = Duration::from_secs(120);
const DAY: Duration = Duration::from_secs(24 * 3600);

pub fn cluster() -> Uuid {
    Uuid::from_u128(0xc1)
}

/// A node's uid.
pub fn uid(number: u128) -> Uuid {
    Uuid::from_u128(number)
}

pub fn authority() -> Authority {
    Authority::make(cluster(), SystemTime::now(), 300 * DAY).expect("an authority")
}

/// Signs a certificate for `identity`, valid from `now` on.
pub fn certificate(authority: &Authority, identity: NodeIdentity, now: SystemTime, life: Duration) -> (String, String) {
    let key = KeyPair::generate().expect("a key");
    let request = CertificateParams::default().serialize_request(&key).expect("a request");
    let request = rcgen::CertificateSigningRequestParams::from_der(request.der()).expect("a request that can be read");
    let signed = authority
        .sign(identity, &request.public_key, now, life)
        .expect("a certificate");
    (signed, key.serialize_pem())
}

pub fn credentials(authority: &Authority, trusted: &str, node: Uuid) -> Credentials {
    let identity = NodeIdentity {
        cluster: cluster(),
        node,
    };
    let (certificate, key) = certificate(authority, identity, SystemTime::now(), DAY);
    Credentials::new(&certificate, &key, trusted).expect("credentials that fit together")
}

/// Collects events for a test to look at.
#[derive(Default)]
pub struct Inbox {
    events: Mutex<VecDeque<Event>>,
    came: Condvar,
}

impl Sink for Inbox {
    fn deliver(&self, events: &mut Vec<Event>) {
        self.events.lock().expect("no panic").extend(events.drain(..));
        self.came.notify_all();
    }
}

impl Inbox {
    /// The first event for which `pick` gives something; those before it are let go.
    pub fn wait<T>(&self, what: &str, mut pick: impl FnMut(Event) -> Option<T>) -> T {
        let deadline = Instant::now() + PATIENCE;
        let mut events = self.events.lock().expect("no panic");
        loop {
            while let Some(event) = events.pop_front() {
                if let Some(found) = pick(event) {
                    return found;
                }
            }
            let left = deadline.saturating_duration_since(Instant::now());
            assert!(!left.is_zero(), "{what}: nothing of the kind within {PATIENCE:?}");
            events = self.came.wait_timeout(events, left).expect("no panic").0;
        }
    }

    /// Holds if no session ends for so long. What else comes stays to be looked at.
    pub fn nothing_ends_for(&self, time: Duration) {
        let deadline = Instant::now() + time;
        let mut events = self.events.lock().expect("no panic");
        loop {
            for event in events.iter() {
                if let Event::Down { why, .. } = event {
                    panic!("a session has ended: {why}");
                }
            }
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return;
            }
            events = self.came.wait_timeout(events, left).expect("no panic").0;
        }
    }

    pub fn up(&self) -> Session {
        self.wait("a session", |event| match event {
            Event::Up(session) => Some(session),
            _ => None,
        })
    }

    pub fn down(&self) -> (Session, Lost) {
        self.wait("the end of a session", |event| match event {
            Event::Down { session, why } => Some((session, why)),
            _ => None,
        })
    }

    pub fn frame(&self) -> Frame {
        self.incoming().frame
    }

    pub fn incoming(&self) -> Incoming {
        self.wait("a frame", |event| match event {
            Event::Incoming(incoming) => Some(incoming),
            Event::Down { why, .. } => panic!("no frame, but the end of a session: {why}"),
            _ => None,
        })
    }

    pub fn dial_failed(&self) -> Lost {
        self.wait("a dial that failed", |event| match event {
            Event::DialFailed { why, .. } => Some(why),
            _ => None,
        })
    }
}

/// A node: its transport, and what it hears.
pub struct Node {
    pub uid: Uuid,
    pub transport: Transport,
    pub inbox: Arc<Inbox>,
    pub wallet: Wallet,
}

impl Node {
    pub fn start(authority: &Authority, number: u128) -> Node {
        Node::with(authority, number, |_| {})
    }

    pub fn with(authority: &Authority, number: u128, change: impl FnOnce(&mut TransportConfig)) -> Node {
        let wallet = Wallet::default();
        wallet.put(credentials(authority, authority.certificate(), uid(number)));
        Node::of(wallet, number, change)
    }

    pub fn of(wallet: Wallet, number: u128, change: impl FnOnce(&mut TransportConfig)) -> Node {
        let mut config = TransportConfig::new(cluster(), uid(number));
        config.redial_first = Duration::from_millis(5);
        config.redial_max = Duration::from_millis(20);
        change(&mut config);
        let inbox = Arc::new(Inbox::default());
        let listener = TcpListener::bind("127.0.0.1:0").expect("a port");
        let transport =
            Transport::start(config, wallet.clone(), Some(listener), inbox.clone()).expect("the transport starts");
        Node {
            uid: uid(number),
            transport,
            inbox,
            wallet,
        }
    }

    pub fn address(&self) -> SocketAddr {
        self.transport.address().expect("it listens")
    }

    pub fn dial(&self, other: &Node) {
        self.transport.dial(other.uid, vec![other.address()]);
    }

    /// A session to `other`, and the same as `other` sees it.
    pub fn connect(&self, other: &Node) -> (Session, Session) {
        self.dial(other);
        (self.inbox.up(), other.inbox.up())
    }
}

/// A frame with a payload of `len` bytes that tells its number.
pub fn frame(request: u64, len: usize) -> Frame {
    let mut payload = Vec::new();
    if len > 0 {
        let mut memory = BufMut::for_reading(len.next_multiple_of(4096));
        memory
            .as_mut()
            .iter_mut()
            .enumerate()
            .for_each(|(n, byte)| *byte = pattern(request, n));
        payload.push(memory.freeze().slice(0..len));
    }
    Frame {
        kind: Kind(20),
        flags: 7,
        volume: Uuid::from_u128(0x11),
        replica: Uuid::from_u128(0x22),
        epoch: Epoch(5),
        request,
        body: Bytes::from(request.to_le_bytes().repeat(3)),
        payload,
    }
}

fn pattern(request: u64, at: usize) -> u8 {
    (request as usize * 31 + at / 7) as u8
}

/// What [`frame`] made, whole and in one aligned piece.
pub fn assert_is(found: &Frame, request: u64, len: usize) {
    assert_eq!(found.request, request);
    assert_eq!(found.body, request.to_le_bytes().repeat(3));
    assert_eq!((found.kind, found.flags, found.epoch), (Kind(20), 7, Epoch(5)));
    assert_eq!(
        (found.volume, found.replica),
        (Uuid::from_u128(0x11), Uuid::from_u128(0x22))
    );
    assert_eq!(found.payload_len(), len);
    if len > 0 {
        let [payload] = found.payload.as_slice() else {
            panic!("{} parts", found.payload.len())
        };
        let bytes: &[u8] = Buf::as_ref(payload);
        assert!(bytes.as_ptr().addr().is_multiple_of(4096), "fit for direct I/O");
        assert!(bytes.iter().enumerate().all(|(n, byte)| *byte == pattern(request, n)));
    }
}
