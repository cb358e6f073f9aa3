//! How connections begin: dialled, when their time has come, or taken of whoever knocks.

use std::io;
use std::net::{SocketAddr, TcpStream};
use std::os::fd::{AsRawFd, OwnedFd};
use std::time::{Duration, Instant};

use nix::errno::Errno;
use nix::sys::epoll::{EpollEvent, EpollFlags};
use nix::sys::socket::{
    AddressFamily, SockFlag, SockType, SockaddrStorage, connect, setsockopt, socket,
    sockopt::{TcpNoDelay, TcpUserTimeout},
};
use uuid::Uuid;

use super::TransportConfig;
use super::hello::Hello;
use super::limits::{OPENING_MAX, UNACKNOWLEDGED_MAX};
use super::link::{self, Link, Lost};
use super::records::Records;
use super::wire::{Conn, LISTENER, State, Wire};
use crate::identity::Credentials;

/// How long to let the listener be when the process has no descriptor left.
const ACCEPT_AGAIN_AFTER: Duration = Duration::from_millis(100);

/// A node that a connection to is wanted.
pub(super) struct Dial {
    pub addresses: Vec<SocketAddr>,
    /// Failures in a row.
    pub failures: u32,
    pub conn: Option<usize>,
    pub next: Instant,
}

impl Wire {
    fn token(&mut self) -> (usize, u64) {
        let key = self.conns.vacant_key();
        // Never one of the two that are not connections.
        self.made = self.made.wrapping_add(1) % (u32::MAX - 1);
        (key, u64::from(self.made) << 32 | key as u64)
    }

    fn hello(&self, called: Uuid) -> Hello {
        Hello {
            versions: self.config.versions.clone(),
            cluster: self.config.cluster,
            node: self.config.node,
            boot: self.boot,
            called,
        }
    }

    fn records(&self, credentials: &Credentials, dialled: Option<Uuid>) -> Result<Records, rustls::Error> {
        #[cfg(any(test, feature = "plain-wire-for-comparison"))]
        if self.config.plain {
            return Ok(Records::Plain(Default::default()));
        }
        Ok(Records::tls(match dialled {
            Some(_) => credentials.dial()?.into(),
            None => credentials.accept()?.into(),
        }))
    }

    fn link(
        &mut self,
        socket: TcpStream,
        address: SocketAddr,
        dialled: Option<Uuid>,
        now: Instant,
    ) -> Result<usize, String> {
        let credentials = self.wallet.current().ok_or("this node has no certificate yet")?;
        socket.set_nonblocking(true).map_err(|error| error.to_string())?;
        setsockopt(&socket, TcpNoDelay, &true).map_err(|error| error.to_string())?;
        setsockopt(&socket, TcpUserTimeout, &(UNACKNOWLEDGED_MAX.as_millis() as u32))
            .map_err(|error| error.to_string())?;
        let records = self.records(&credentials, dialled).map_err(|error| error.to_string())?;
        let (key, token) = self.token();
        let parts = link::Parts {
            socket,
            address,
            records,
            ours: self.hello(dialled.unwrap_or_default()),
            expected: dialled,
            own_until: credentials.own().not_after,
            poller: self.poller.clone(),
            token,
        };
        let link = Link::new(parts).map_err(|error| error.to_string())?;
        let conn = Conn {
            token,
            dialled,
            since: now,
            state: State::Opening(Box::new(link)),
            farewell: None,
        };
        assert_eq!(self.conns.insert(conn), key);
        self.next_pass = self.next_pass.min(now + self.config.open_within);
        Ok(key)
    }

    pub(super) fn dial(&mut self, node: Uuid, now: Instant) {
        let dial = &self.dials[&node];
        let Some(&address) = dial.addresses.get(dial.failures as usize % dial.addresses.len().max(1)) else {
            // Nobody knows where it is yet.
            self.dials.get_mut(&node).expect("it was there above").next = now + Duration::from_secs(60);
            return;
        };
        let made = begin_to_connect(address)
            .map_err(|error| error.to_string())
            .and_then(|socket| self.link(socket, address, Some(node), now));
        let dial = self.dials.get_mut(&node).expect("it was there above");
        match made {
            Ok(key) => {
                dial.conn = Some(key);
                self.settle(key);
            }
            Err(error) => {
                dial.failures += 1;
                let wait = wait(&self.config, dial.failures, &mut self.chance);
                dial.next = now + wait;
                self.failed(node, address, Lost::Network(error));
            }
        }
    }

    pub(super) fn accept(&mut self) {
        let now = Instant::now();
        loop {
            let Some(listener) = &self.listener else { return };
            match listener.accept() {
                Ok((socket, address)) => {
                    let opening = |conn: &Conn| matches!(conn.state, State::Opening(_)) && conn.dialled.is_none();
                    if self.conns.iter().filter(|(_, conn)| opening(conn)).count() >= OPENING_MAX {
                        tracing::debug!(%address, "too many connections that have not said who they are");
                        continue;
                    }
                    if let Err(error) = self.link(socket, address, None, now) {
                        tracing::debug!(%address, %error, "a connection was not taken");
                    }
                }
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return,
                Err(error)
                    if matches!(
                        error.kind(),
                        io::ErrorKind::Interrupted | io::ErrorKind::ConnectionAborted
                    ) => {}
                Err(error) => {
                    tracing::warn!(%error, "connections of other nodes cannot be taken; trying again");
                    self.listen(EpollFlags::empty());
                    self.listen_again = Some(now + ACCEPT_AGAIN_AFTER);
                    self.next_pass = self.next_pass.min(now + ACCEPT_AGAIN_AFTER);
                    return;
                }
            }
        }
    }

    pub(super) fn listen(&self, what: EpollFlags) {
        let Some(listener) = &self.listener else { return };
        self.poller
            .modify(listener, &mut EpollEvent::new(what, LISTENER))
            .expect("the listener is watched as long as there is a wire");
    }
}

/// A socket that is connecting.
fn begin_to_connect(address: SocketAddr) -> io::Result<TcpStream> {
    let family = match address {
        SocketAddr::V4(_) => AddressFamily::Inet,
        SocketAddr::V6(_) => AddressFamily::Inet6,
    };
    let flags = SockFlag::SOCK_NONBLOCK | SockFlag::SOCK_CLOEXEC;
    let socket: OwnedFd = socket(family, SockType::Stream, flags, None)?;
    match connect(socket.as_raw_fd(), &SockaddrStorage::from(address)) {
        Ok(()) | Err(Errno::EINPROGRESS) => Ok(TcpStream::from(socket)),
        Err(error) => Err(error.into()),
    }
}

/// How long to wait before the next attempt: at least half of a time that doubles, the rest by chance, so that nodes that
/// lost each other at one moment do not all come back at one.
pub(super) fn wait(config: &TransportConfig, failures: u32, chance: &mut u64) -> Duration {
    let whole = (config.redial_first * 2u32.saturating_pow(failures.min(16))).min(config.redial_max);
    // Marsaglia's xorshift: nobody gains from guessing it.
    *chance ^= *chance << 13;
    *chance ^= *chance >> 7;
    *chance ^= *chance << 17;
    let half = whole / 2;
    half + half.mul_f64((*chance >> 11) as f64 / (1u64 << 53) as f64)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_wait_before_dialling_again_doubles_up_to_a_bound_and_is_never_the_same() {
        let config = TransportConfig::new(Uuid::nil(), Uuid::nil());
        let mut chance = 1;
        let mut of = |failures| -> Vec<Duration> { (0..100).map(|_| wait(&config, failures, &mut chance)).collect() };
        let within = |waits: &[Duration], most: Duration| {
            waits.iter().all(|wait| *wait >= most / 2 && *wait <= most) && waits.iter().any(|wait| *wait != waits[0])
        };
        assert!(within(&of(0), config.redial_first));
        assert!(within(&of(2), config.redial_first * 4));
        assert!(within(&of(1000), config.redial_max));
    }
}
