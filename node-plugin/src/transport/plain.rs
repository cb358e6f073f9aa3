//! Nothing between the frames and the socket: a wire without TLS, to measure what TLS costs. See [`records`](super::records).

use std::io::{self, IoSlice, Write};
use std::net::TcpStream;

use uuid::Uuid;

use super::hello::{HELLO_VERSION, refusal};

#[derive(Default)]
pub(super) struct Plain {
    outgoing: Vec<u8>,
    sent: usize,
    incoming: Vec<u8>,
    at: usize,
    /// The first bytes have come, and were none of TLS.
    begun: bool,
}

impl Plain {
    pub fn wants_write(&self) -> bool {
        self.sent < self.outgoing.len()
    }

    pub fn seal(&mut self, pieces: &[IoSlice<'_>]) -> io::Result<usize> {
        self.outgoing.write_vectored(pieces)
    }

    pub fn send(&mut self, socket: &mut TcpStream) -> io::Result<usize> {
        let sent = socket.write(&self.outgoing[self.sent..])?;
        self.sent += sent;
        if !self.wants_write() {
            self.outgoing.clear();
            self.sent = 0;
        }
        Ok(sent)
    }

    pub fn take(&mut self, bytes: &mut &[u8]) -> Result<(), String> {
        // Kinds 20 to 23 of its records, and the version that they all say.
        if let ([20..=23, 3, ..], false) = (*bytes, self.begun) {
            let why = "it speaks that, and this end does not";
            let frame = refusal(why);
            self.outgoing.extend(frame.header(HELLO_VERSION, Uuid::nil()));
            self.outgoing.extend_from_slice(&frame.body);
            return Err(why.to_owned());
        }
        self.begun = true;
        self.incoming.drain(..self.at);
        self.at = 0;
        self.incoming.extend_from_slice(bytes);
        *bytes = &[];
        Ok(())
    }

    pub fn opened(&self) -> io::Result<&[u8]> {
        match &self.incoming[self.at..] {
            [] => Err(io::ErrorKind::WouldBlock.into()),
            opened => Ok(opened),
        }
    }

    pub fn used(&mut self, len: usize) {
        self.at += len;
    }
}
