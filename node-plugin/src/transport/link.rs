//! One connection: a socket, TLS over it, frames inside, and who is at the other end.
//!
//! ```text
//!          dialling end                               accepting end
//! Opening  TLS ─► hello ─────────────────────────────► judged: hello back, or a refusal
//!          judged ◄──────────────────────────── hello
//! Up       frames ◄─────────────────────────────────► frames
//! Lost     the reason, once; nothing goes in or out any more
//! ```
//!
//! A link never waits: it takes what the socket has and gives what the socket takes. When to try again is for the poller
//! to say.

use std::io::{self, Read};
use std::net::{Shutdown, SocketAddr, TcpStream};
use std::sync::Arc;
use std::time::{Instant, SystemTime};

use nix::sys::epoll::{Epoll, EpollEvent, EpollFlags};
use uuid::Uuid;

use super::frame::{Decoder, Expect, Frame, FrameError, HEADER_BYTES, Kind, Kinds};
use super::hello::{HELLO_VERSION, Hello, refusal, words_of};
use super::records::Records;
use crate::identity::certified;

/// Why a connection has ended, or was never made.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Lost {
    #[error("{0}")]
    Network(String),
    #[error("the peer closed the connection")]
    Closed,
    #[error("nothing was heard of it for {0} ms")]
    Silent(u128),
    #[error("it did not say who it is within {0} ms")]
    Late(u128),
    #[error("TLS: {0}")]
    Tls(String),
    #[error("it sent nonsense: {0}")]
    Nonsense(#[from] FrameError),
    /// We do not talk to it.
    #[error("refused: {0}")]
    Refused(String),
    /// It does not talk to us.
    #[error("it refused: {0}")]
    RefusedByPeer(String),
    /// We were asked to.
    #[error("closed here: {0}")]
    Here(String),
}

/// Who is at the other end.
#[derive(Clone, Debug)]
pub(super) struct Theirs {
    pub hello: Hello,
    pub version: u16,
    /// When the first of both certificates ends.
    pub until: SystemTime,
}

pub(super) struct Link {
    socket: TcpStream,
    address: SocketAddr,
    records: Records,
    decoder: Decoder,
    ours: Hello,
    /// The node that was dialled.
    expected: Option<Uuid>,
    own_until: SystemTime,
    theirs: Option<Theirs>,
    poller: Arc<Epoll>,
    token: u64,
    watched: EpollFlags,
    /// False while whoever takes the frames has enough of them.
    pub reading: bool,
    pub heard: Instant,
    pub sent: Instant,
    pub lost: Option<Lost>,
}

impl std::fmt::Debug for Link {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Link")
            .field("address", &self.address)
            .field("theirs", &self.theirs)
            .finish_non_exhaustive()
    }
}

/// What a link is made of.
pub(super) struct Parts {
    pub socket: TcpStream,
    pub address: SocketAddr,
    pub records: Records,
    pub ours: Hello,
    /// The node that was dialled; `None` at the accepting end.
    pub expected: Option<Uuid>,
    /// When our certificate ends.
    pub own_until: SystemTime,
    pub poller: Arc<Epoll>,
    pub token: u64,
}

impl Link {
    /// Takes over a socket, connected or about to be, and begins.
    pub fn new(parts: Parts) -> io::Result<Link> {
        let now = Instant::now();
        let mut link = Link {
            socket: parts.socket,
            address: parts.address,
            records: parts.records,
            decoder: Decoder::new(Expect::OPENING),
            ours: parts.ours,
            expected: parts.expected,
            own_until: parts.own_until,
            theirs: None,
            poller: parts.poller,
            token: parts.token,
            watched: EpollFlags::EPOLLIN,
            reading: true,
            heard: now,
            sent: now,
            lost: None,
        };
        link.poller
            .add(&link.socket, EpollEvent::new(link.watched, link.token))?;
        if link.expected.is_some() {
            // It waits inside TLS until the other end has shown its certificate.
            link.seal(std::slice::from_ref(&link.ours.frame()));
        }
        link.flush();
        Ok(link)
    }

    pub fn address(&self) -> SocketAddr {
        self.address
    }

    /// Who is there, once that is agreed on.
    pub fn theirs(&self) -> Option<&Theirs> {
        self.theirs.as_ref()
    }

    /// True while the socket has not taken everything that was sealed.
    pub fn is_full(&self) -> bool {
        self.records.wants_write()
    }

    /// Seals frames. They go out with the next [`Link::flush`].
    pub fn seal(&mut self, frames: &[Frame]) {
        if self.lost.is_some() {
            return;
        }
        let version = |kind| match kind {
            Kind::HELLO | Kind::REFUSAL => HELLO_VERSION,
            _ => self.theirs.as_ref().map_or(HELLO_VERSION, |theirs| theirs.version),
        };
        let headers: Vec<[u8; HEADER_BYTES]> = frames
            .iter()
            .map(|frame| frame.header(version(frame.kind), self.ours.cluster))
            .collect();
        let mut pieces = Vec::with_capacity(frames.len() * 3);
        for (header, frame) in headers.iter().zip(frames) {
            pieces.push(io::IoSlice::new(header));
            if !frame.body.is_empty() {
                pieces.push(io::IoSlice::new(&frame.body));
            }
            pieces.extend(frame.payload.iter().map(|part| io::IoSlice::new(part.as_ref())));
        }
        if let Err(error) = self.records.seal(&pieces) {
            self.lose(Lost::Tls(error.to_string()));
        }
    }

    /// Gives the socket what it takes.
    pub fn flush(&mut self) {
        while self.lost.is_none() && self.records.wants_write() {
            match self.records.send(&mut self.socket) {
                Ok(_) => self.sent = Instant::now(),
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => break,
                Err(error) => self.lose(Lost::Network(error.to_string())),
            }
        }
        self.watch();
    }

    /// Takes what the socket has, up to the length of `staging`, and gives the frames in it.
    pub fn fill(&mut self, staging: &mut [u8], frames: &mut Vec<Frame>) {
        if self.lost.is_some() || !self.reading {
            return;
        }
        let len = match self.socket.read(staging) {
            Ok(0) => return self.lose(Lost::Closed),
            Ok(len) => len,
            Err(error) if matches!(error.kind(), io::ErrorKind::WouldBlock | io::ErrorKind::Interrupted) => return,
            Err(error) => return self.lose(Lost::Network(error.to_string())),
        };
        self.heard = Instant::now();
        let mut rest = &staging[..len];
        while !rest.is_empty() && self.lost.is_none() {
            match self.records.take(&mut rest) {
                Ok(true) => self.open(frames),
                // It has said that nothing more will come.
                Ok(false) => break,
                Err(error) => {
                    // TLS has a word for the other end, if the socket takes it.
                    let _ = self.records.send(&mut self.socket);
                    let _ = self.socket.shutdown(Shutdown::Write);
                    self.lost = Some(Lost::Tls(error));
                    return self.watch();
                }
            }
        }
        if self.records.wants_write() {
            self.flush();
        }
    }

    /// Makes frames of what TLS has opened.
    fn open(&mut self, frames: &mut Vec<Frame>) {
        while self.lost.is_none() {
            let taken = match self.records.opened() {
                Ok([]) => return self.lose(Lost::Closed),
                Ok(plain) => self.decoder.take(plain),
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return,
                Err(error) => return self.lose(Lost::Tls(error.to_string())),
            };
            match taken {
                Ok((len, frame)) => {
                    self.records.used(len);
                    match frame {
                        Some(frame) if frame.kind < Kind::FIRST_OF_OTHERS => self.own(&frame),
                        Some(frame) => frames.push(frame),
                        None => {}
                    }
                }
                Err(error) => self.refuse(Lost::Nonsense(error)),
            }
        }
    }

    /// Takes a frame of the transport itself.
    fn own(&mut self, frame: &Frame) {
        match frame.kind {
            Kind::HELLO => match self.judge(&frame.body) {
                Ok(theirs) => {
                    self.decoder.expect(Expect {
                        version: theirs.version,
                        cluster: Some(self.ours.cluster),
                        kinds: Kinds::Session,
                    });
                    if self.expected.is_none() {
                        self.ours.called = theirs.hello.node;
                        self.seal(std::slice::from_ref(&self.ours.frame()));
                    }
                    self.theirs = Some(theirs);
                }
                Err(words) => self.refuse(Lost::Refused(words)),
            },
            Kind::REFUSAL => self.lose(Lost::RefusedByPeer(words_of(&frame.body))),
            _ => {}
        }
    }

    fn judge(&self, body: &[u8]) -> Result<Theirs, String> {
        let hello = Hello::of_body(body).ok_or("its hello is too short")?;
        let (proven, until) = match &self.records {
            Records::Tls(tls) => {
                let certificate = tls.peer_certificates().and_then(|chain| chain.first());
                let certified = certified(certificate.ok_or("it has shown no certificate")?)?;
                (certified.identity, certified.not_after.min(self.own_until))
            }
            #[cfg(any(test, feature = "plain-wire-for-comparison"))]
            Records::Plain(_) => (hello.identity(), self.own_until),
        };
        let version = self.ours.judge(&hello, proven, self.expected)?;
        Ok(Theirs { hello, version, until })
    }

    /// Tells the other end why, and ends.
    pub fn refuse(&mut self, why: Lost) {
        if self.lost.is_some() {
            return;
        }
        let words = match &why {
            Lost::Refused(words) | Lost::Here(words) => words.clone(),
            other => other.to_string(),
        };
        self.seal(std::slice::from_ref(&refusal(&words)));
        self.records.send_end();
        self.flush();
        if self.lost.is_none() {
            // Not both ways: what the peer still sends would be answered with a reset, which takes our words along.
            let _ = self.socket.shutdown(Shutdown::Write);
            self.lost = Some(why);
        }
        self.watch();
    }

    /// Ends without a word.
    pub fn lose(&mut self, why: Lost) {
        if self.lost.is_none() {
            self.lost = Some(why);
        }
        // The poller notices, whoever found it out.
        let _ = self.socket.shutdown(Shutdown::Both);
    }

    /// After a refusal: true once the peer has hung up, too.
    pub fn has_hung_up(&mut self, staging: &mut [u8]) -> bool {
        match self.socket.read(staging) {
            Ok(0) => true,
            Ok(_) => false,
            Err(error) => !matches!(error.kind(), io::ErrorKind::WouldBlock | io::ErrorKind::Interrupted),
        }
    }

    /// Sets what the poller reports.
    pub fn watch(&mut self) {
        let mut wanted = EpollFlags::empty();
        wanted.set(EpollFlags::EPOLLIN, self.reading);
        wanted.set(EpollFlags::EPOLLOUT, self.lost.is_none() && self.records.wants_write());
        if wanted != self.watched {
            let mut event = EpollEvent::new(wanted, self.token);
            match self.poller.modify(&self.socket, &mut event) {
                Ok(()) => self.watched = wanted,
                Err(error) => self.lose(Lost::Network(format!("watching a socket: {error}"))),
            }
        }
    }
}

impl Link {
    /// The end of the end: the poller forgets the socket, which may stay open for as long as somebody has the session.
    pub fn forget(&mut self) {
        self.lose(Lost::Closed);
        let _ = self.poller.delete(&self.socket);
    }
}
