//! The records below the frames: what makes bytes that go out unreadable to others, and bytes that come in trustworthy.
//!
//! That is TLS. There is a second kind that does nothing, to measure what TLS costs. It is compiled for the benchmark and
//! for tests of this crate only (`plain-wire-for-comparison`), no configuration names it, and `galleonfs` does not compile
//! with it. An end of one kind does not understand an end of the other, and says so: neither falls back.

use std::io::{self, BufRead, IoSlice, Write};
use std::net::TcpStream;

use super::frame::MAGIC;
#[cfg(any(test, feature = "plain-wire-for-comparison"))]
use super::plain::Plain;

/// Bytes on their way between a socket and the frames.
pub(super) enum Records {
    Tls(Box<rustls::Connection>),
    #[cfg(any(test, feature = "plain-wire-for-comparison"))]
    Plain(Plain),
}

impl Records {
    pub fn tls(connection: rustls::Connection) -> Records {
        let mut connection = Box::new(connection);
        // How much may wait here is bounded by whoever gives it to us.
        connection.set_buffer_limit(None);
        Records::Tls(connection)
    }

    /// There is something for the socket.
    pub fn wants_write(&self) -> bool {
        match self {
            Records::Tls(tls) => tls.wants_write(),
            #[cfg(any(test, feature = "plain-wire-for-comparison"))]
            Records::Plain(plain) => plain.wants_write(),
        }
    }

    /// Takes all of it, to go out with the next [`Records::send`]. All in one go: TLS copies the pieces into full records of
    /// its own, and seals those.
    pub fn seal(&mut self, pieces: &[IoSlice<'_>]) -> io::Result<()> {
        let taken = match self {
            Records::Tls(tls) => tls.writer().write_vectored(pieces)?,
            #[cfg(any(test, feature = "plain-wire-for-comparison"))]
            Records::Plain(plain) => plain.seal(pieces)?,
        };
        let len: usize = pieces.iter().map(|piece| piece.len()).sum();
        assert_eq!(taken, len, "without a limit everything is taken");
        Ok(())
    }

    /// Gives the socket some of what it should have.
    pub fn send(&mut self, socket: &mut TcpStream) -> io::Result<usize> {
        match self {
            Records::Tls(tls) => tls.write_tls(socket),
            #[cfg(any(test, feature = "plain-wire-for-comparison"))]
            Records::Plain(plain) => plain.send(socket),
        }
    }

    /// Nothing more comes from this end.
    pub fn send_end(&mut self) {
        match self {
            Records::Tls(tls) => tls.send_close_notify(),
            #[cfg(any(test, feature = "plain-wire-for-comparison"))]
            Records::Plain(_) => {}
        }
    }

    /// Takes some of what the socket gave; false if the other end has said that nothing more will come. Behind an error
    /// there may be a word to [send](Records::send).
    pub fn take(&mut self, bytes: &mut &[u8]) -> Result<bool, String> {
        match self {
            Records::Tls(tls) => {
                let is_plain = tls.is_handshaking() && bytes.starts_with(&MAGIC);
                let taken = tls.read_tls(bytes).map_err(|error| error.to_string())?;
                if taken > 0 {
                    tls.process_new_packets().map_err(|error| match is_plain {
                        true => "it speaks without".to_owned(),
                        false => error.to_string(),
                    })?;
                }
                Ok(taken > 0)
            }
            #[cfg(any(test, feature = "plain-wire-for-comparison"))]
            Records::Plain(plain) => {
                plain.take(bytes)?;
                Ok(true)
            }
        }
    }

    /// What was opened and not [used](Records::used) yet. Empty at the end; `WouldBlock` while there is nothing.
    pub fn opened(&mut self) -> io::Result<&[u8]> {
        match self {
            Records::Tls(tls) => tls.reader().into_first_chunk(),
            #[cfg(any(test, feature = "plain-wire-for-comparison"))]
            Records::Plain(plain) => plain.opened(),
        }
    }

    pub fn used(&mut self, len: usize) {
        match self {
            Records::Tls(tls) => tls.reader().consume(len),
            #[cfg(any(test, feature = "plain-wire-for-comparison"))]
            Records::Plain(plain) => plain.used(len),
        }
    }
}
