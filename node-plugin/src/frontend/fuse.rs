//! A FUSE server for one file: the guest's requests arrive as reads, writes, syncs and holes of that file.
//!
//! They come in one of two ways: one at a time by reading `/dev/fuse`, or, where the kernel offers it and the shard has
//! an io_uring, in [`Slots`]. A connection starts with the first, whose first request agrees on the second; a few kinds
//! of requests keep coming that way.
//!
//! Only what reaches the engine is asynchronous: [`Received::Request`] goes to the shard, and the answer comes back
//! through [`Session::answer`]. Everything else (names, attributes, the handshake) is answered on the spot. What
//! always holds: a sync is a flush of the engine and is never refused as unknown, because the kernel would take that
//! as "nothing to do, ever"; no request is answered twice; a request we cannot parse is refused, not guessed.

use std::fs::File;
use std::io::{IoSlice, IoSliceMut, Read, Write};
use std::os::fd::{AsRawFd, RawFd};

use bytemuck::Pod;
use galleonfs_storage_engine::request::{Answer, Piece, Reply, Request, RequestError};

use super::buffers::{Buffers, PAYLOAD_BYTES_MAX};
use super::one_file::{FILE_ID, Local, OneFile, reply};
use super::slots::{Arrival, Body, Command, Slots};
use super::{BLOCK_BYTES, Export, GuestPath, Origin, Received, RequestKind, Session, Ticket, abi};

/// Requests the kernel may have with us at a time. Above the loop driver's queue of 128; a `u16` in the protocol.
const BACKGROUND_MAX: u16 = 512;

/// The header and the arguments of a read or write; a write's payload starts behind it, in memory of its own.
const HEAD_BYTES: usize = size_of::<abi::InHeader>() + size_of::<abi::WriteIn>();

const FALLOC_FL_KEEP_SIZE: u32 = libc::FALLOC_FL_KEEP_SIZE as u32;
const FALLOC_FL_PUNCH_HOLE: u32 = libc::FALLOC_FL_PUNCH_HOLE as u32;
const FALLOC_FL_ZERO_RANGE: u32 = libc::FALLOC_FL_ZERO_RANGE as u32;

/// What every run of zeros in an answer is made of.
static ZEROS: [u8; 64 << 10] = [0; 64 << 10];

/// One connection to the kernel.
#[derive(Debug)]
pub struct FuseSession {
    /// `/dev/fuse`, non-blocking.
    dev: File,
    file: OneFile,
    /// Offsets and lengths of requests are multiples of it.
    sector_bytes: u64,
    refusing: bool,
    /// There may be something to read.
    readable: bool,
    /// Whoever serves this session carries out its commands on a ring.
    may_use_ring: bool,
    slots: Option<Slots>,
    /// Why nothing will come any more.
    ended: Option<String>,
    head: [u8; HEAD_BYTES],
}

impl FuseSession {
    pub fn new(dev: File, name: String, export: &Export) -> FuseSession {
        FuseSession {
            dev,
            file: OneFile {
                name,
                size_bytes: export.size_bytes,
                read_only: export.read_only,
            },
            sector_bytes: u64::from(export.sector_bytes),
            refusing: false,
            readable: false,
            may_use_ring: false,
            slots: None,
            ended: None,
            head: [0; HEAD_BYTES],
        }
    }

    /// The arguments of a request whose fixed part fits the head.
    fn arguments<T: Pod>(&self, len: usize) -> Option<T> {
        let from = size_of::<abi::InHeader>();
        (len >= from + size_of::<T>()).then(|| bytemuck::pod_read_unaligned(&self.head[from..from + size_of::<T>()]))
    }

    /// Turns a request for data into one for the engine, or into an error number.
    fn data_request(
        &self,
        header: &abi::InHeader,
        origin: Origin,
        buffers: &mut Buffers,
    ) -> Result<(Ticket, Request), DataRefusal> {
        let len = header.len as usize;
        let ticket = |kind, bytes, handed_over| Ticket {
            unique: header.unique,
            origin,
            kind,
            bytes,
            handed_over,
        };
        if header.nodeid != FILE_ID {
            return Err(DataRefusal::Error(libc::EISDIR));
        }
        if self.refusing {
            return Err(DataRefusal::Error(libc::EIO));
        }
        let malformed = DataRefusal::Error(libc::EINVAL);
        match header.opcode {
            abi::READ => {
                let Some(read) = self.arguments::<abi::ReadIn>(len) else {
                    return Err(malformed);
                };
                let end = read
                    .offset
                    .saturating_add(u64::from(read.size))
                    .min(self.file.size_bytes);
                if read.offset >= end {
                    return Err(DataRefusal::Empty);
                }
                let bytes = end - read.offset;
                if !self.aligned(read.offset, bytes) {
                    return Err(malformed);
                }
                Ok((
                    ticket(RequestKind::Read, bytes, false),
                    Request::Read {
                        offset: read.offset,
                        len: bytes,
                    },
                ))
            }
            abi::WRITE => {
                let Some(write) = self.arguments::<abi::WriteIn>(len) else {
                    return Err(malformed);
                };
                let bytes = u64::from(write.size);
                if self.file.read_only {
                    return Err(DataRefusal::Error(libc::EROFS));
                }
                if len != HEAD_BYTES + write.size as usize || bytes == 0 || !self.aligned(write.offset, bytes) {
                    return Err(malformed);
                }
                if !self.within(write.offset, bytes) {
                    return Err(DataRefusal::Error(libc::ENOSPC));
                }
                let (data, handed_over) = match (origin, &self.slots) {
                    (Origin::Slot(key), Some(slots)) => (slots.payload(key, write.size as usize), false),
                    _ => buffers.take(write.size as usize),
                };
                // The loop device has no FUA of its own: the block layer sends a flush behind the write instead.
                let request = Request::Write {
                    offset: write.offset,
                    data,
                    fua: false,
                };
                Ok((ticket(RequestKind::Write, bytes, handed_over), request))
            }
            abi::FSYNC => Ok((ticket(RequestKind::Flush, 0, false), Request::Flush)),
            abi::FALLOCATE => {
                let Some(range) = self.arguments::<abi::FallocateIn>(len) else {
                    return Err(malformed);
                };
                // Both leave a range that reads as zeros; neither may change the size of a device.
                const PUNCH: u32 = FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE;
                const ZERO: u32 = FALLOC_FL_ZERO_RANGE | FALLOC_FL_KEEP_SIZE;
                if !matches!(range.mode, PUNCH | ZERO | FALLOC_FL_ZERO_RANGE) {
                    return Err(DataRefusal::Error(libc::EOPNOTSUPP));
                }
                if self.file.read_only {
                    return Err(DataRefusal::Error(libc::EROFS));
                }
                if range.length == 0 || !self.aligned(range.offset, range.length) {
                    return Err(malformed);
                }
                if !self.within(range.offset, range.length) {
                    return Err(DataRefusal::Error(libc::ENOSPC));
                }
                let request = Request::Zero {
                    offset: range.offset,
                    len: range.length,
                    fua: false,
                };
                Ok((ticket(RequestKind::Zero, range.length, false), request))
            }
            _ => Err(DataRefusal::NotData),
        }
    }

    /// Answers what does not concern the engine. `body` is what follows the header.
    fn local_request(&mut self, header: &abi::InHeader, body: &[u8]) -> Local {
        match header.opcode {
            abi::INIT => self.negotiate(body),
            _ => self.file.answer(header, body),
        }
    }

    fn negotiate(&mut self, body: &[u8]) -> Local {
        if body.len() < abi::INIT_IN_BYTES_MIN {
            return Local::Error(libc::EPROTO);
        }
        let mut padded = [0; size_of::<abi::InitIn>()];
        let known = body.len().min(padded.len());
        padded[..known].copy_from_slice(&body[..known]);
        let init: abi::InitIn = bytemuck::pod_read_unaligned(&padded);
        if init.major < abi::MAJOR || (init.major == abi::MAJOR && init.minor < abi::MINOR_MIN) {
            return Local::Error(libc::EPROTO);
        }
        let offered = u64::from(init.flags) | u64::from(init.flags2) << 32;
        let wanted = abi::ASYNC_READ
            | abi::BIG_WRITES
            | abi::ASYNC_DIO
            | abi::PARALLEL_DIROPS
            | abi::MAX_PAGES
            | abi::INIT_EXT
            | abi::HAS_RESEND;
        let mut flags = offered & wanted;
        if self.may_use_ring && offered & abi::OVER_IO_URING != 0 {
            match Slots::new(&self.dev) {
                Ok(slots) => {
                    self.slots = Some(slots);
                    flags |= abi::OVER_IO_URING;
                }
                Err(error) => {
                    tracing::warn!(file = self.file.name, %error, "no memory for FUSE over io_uring; using /dev/fuse");
                }
            }
        }
        reply(&abi::InitOut {
            major: abi::MAJOR,
            // A kernel of a later major version reads only that number, and asks again in ours.
            minor: if init.major > abi::MAJOR {
                abi::MINOR
            } else {
                init.minor.min(abi::MINOR)
            },
            max_readahead: init.max_readahead,
            flags: flags as u32,
            max_background: BACKGROUND_MAX,
            congestion_threshold: BACKGROUND_MAX / 4 * 3,
            max_write: PAYLOAD_BYTES_MAX as u32,
            time_gran: 1,
            max_pages: (PAYLOAD_BYTES_MAX as u64 / BLOCK_BYTES) as u16,
            map_alignment: 0,
            flags2: (flags >> 32) as u32,
            unused: [0; 7],
        })
    }

    fn aligned(&self, offset: u64, len: u64) -> bool {
        (offset | len).is_multiple_of(self.sector_bytes)
    }

    fn within(&self, offset: u64, len: u64) -> bool {
        offset.checked_add(len).is_some_and(|end| end <= self.file.size_bytes)
    }

    /// Takes the next request from `/dev/fuse`.
    fn receive_from_device(&mut self, buffers: &mut Buffers) -> Received {
        let len = loop {
            let landing = buffers.landing().as_mut();
            match (&self.dev).read_vectored(&mut [IoSliceMut::new(&mut self.head), IoSliceMut::new(landing)]) {
                Ok(len) => break len,
                Err(error) => match error.raw_os_error() {
                    Some(libc::EAGAIN) => {
                        self.readable = false;
                        return Received::Empty;
                    }
                    // Interrupted, or the request was given up while we took it.
                    Some(libc::EINTR | libc::ENOENT) => {}
                    _ => return Received::Ended(error.to_string()),
                },
            }
        };
        if len < size_of::<abi::InHeader>() {
            return Received::Ended(format!("the kernel sent a request of {len} bytes"));
        }
        let header: abi::InHeader = bytemuck::pod_read_unaligned(&self.head[..size_of::<abi::InHeader>()]);
        if header.len as usize != len {
            return Received::Ended(format!("the kernel sent {len} bytes of a request of {}", header.len));
        }
        self.serve(&header, Origin::Device, buffers, |session, buffers| {
            let in_head = len.min(HEAD_BYTES);
            let mut body = session.head[size_of::<abi::InHeader>()..in_head].to_vec();
            body.extend_from_slice(&buffers.landing().as_ref()[..len - in_head]);
            body
        })
    }

    /// Takes the request in a slot.
    fn receive_from_slot(&mut self, key: u32, buffers: &mut Buffers) -> Received {
        let slots = self.slots.as_ref().expect("a request arrived in a slot");
        let slot = slots.header(key);
        let (start, payload) = (size_of::<abi::InHeader>(), slot.payload_bytes as usize);
        let header: abi::InHeader = bytemuck::pod_read_unaligned(&slot.in_out[..start]);
        // The kernel does not say how long the fixed arguments are; they are what is neither header nor payload.
        let fixed = (header.len as usize).checked_sub(start + payload);
        let Some(fixed) = fixed.filter(|fixed| *fixed <= slot.operation.len() && payload <= PAYLOAD_BYTES_MAX) else {
            return Received::Ended(format!(
                "the kernel sent a request of {} bytes with a payload of {payload}",
                header.len
            ));
        };
        let in_head = fixed.min(HEAD_BYTES - start);
        self.head[start..start + in_head].copy_from_slice(&slot.operation[..in_head]);
        self.serve(&header, Origin::Slot(key), buffers, |session, _| {
            let slots = session.slots.as_ref().expect("the request is in a slot");
            [&slot.operation[..fixed], slots.bytes(key, payload)].concat()
        })
    }

    /// Serves a request whose head is there; `body` gives all that follows the header.
    fn serve(
        &mut self,
        header: &abi::InHeader,
        origin: Origin,
        buffers: &mut Buffers,
        body: impl FnOnce(&mut FuseSession, &mut Buffers) -> Vec<u8>,
    ) -> Received {
        let (error, reply) = match self.data_request(header, origin, buffers) {
            Ok((ticket, Request::Read { offset, len }))
                if let (Origin::Slot(key), Some(slots)) = (origin, &self.slots) =>
            {
                return Received::Read(ticket, offset, slots.landing(key, len as usize));
            }
            Ok((ticket, request)) => return Received::Request(ticket, request),
            Err(DataRefusal::Error(error)) if is_data(header.opcode) => (error, Vec::new()),
            Err(DataRefusal::Empty) => (0, Vec::new()),
            Err(DataRefusal::Error(_) | DataRefusal::NotData) => {
                let body = body(self, buffers);
                match self.local_request(header, &body) {
                    Local::Reply(reply) => (0, reply),
                    Local::Error(error) => (error, Vec::new()),
                    Local::Silent if origin == Origin::Device => return Received::Served,
                    // Every slot is answered; this has none that the kernel would look at.
                    Local::Silent => (0, Vec::new()),
                }
            }
        };
        self.respond(origin, header.unique, error, Body::Bytes(&reply));
        Received::Served
    }

    /// Answers a request: with a success and `body`, or with an error and nothing.
    fn respond(&mut self, origin: Origin, unique: u64, error: i32, body: Body<'_>) {
        match (origin, &mut self.slots) {
            (Origin::Slot(key), Some(slots)) => slots.answer(key, unique, error, body),
            (Origin::Slot(_), None) => unreachable!("slots stay as long as the session"),
            (Origin::Device, _) => match body {
                Body::Bytes(bytes) => self.send(unique, error, &[IoSlice::new(bytes)]),
                Body::Pieces(pieces) => {
                    // By far the most frequent answer needs no list.
                    if let [Piece::Bytes(buf)] = &pieces[..] {
                        self.send(unique, error, &[IoSlice::new(buf.as_ref())]);
                        return;
                    }
                    let mut parts = Vec::with_capacity(pieces.len());
                    for piece in &pieces {
                        match piece {
                            Piece::Bytes(buf) => parts.push(IoSlice::new(buf.as_ref())),
                            Piece::Zeros(len) => {
                                let (whole, rest) = (len / ZEROS.len(), len % ZEROS.len());
                                parts.extend((0..whole).map(|_| IoSlice::new(&ZEROS)));
                                parts.push(IoSlice::new(&ZEROS[..rest]));
                            }
                        }
                    }
                    self.send(unique, error, &parts);
                }
            },
        }
    }

    fn send(&self, unique: u64, error: i32, body: &[IoSlice<'_>]) {
        let header = abi::OutHeader {
            len: (size_of::<abi::OutHeader>() + body.iter().map(|part| part.len()).sum::<usize>()) as u32,
            error: -error,
            unique,
        };
        let header = IoSlice::new(bytemuck::bytes_of(&header));
        match body {
            [only] => self.write(&[header, *only]),
            _ => self.write(&[&[header], body].concat()),
        }
    }

    fn write(&self, parts: &[IoSlice<'_>]) {
        loop {
            match (&self.dev).write_vectored(parts) {
                // An answer is taken whole or not at all.
                Ok(written) => {
                    debug_assert_eq!(written, parts.iter().map(|part| part.len()).sum::<usize>());
                    return;
                }
                Err(error) => match error.raw_os_error() {
                    Some(libc::EINTR) => {}
                    // The request was given up by who asked, or the device is gone.
                    Some(libc::ENOENT | libc::ENODEV | libc::ECONNABORTED) => return,
                    _ => {
                        tracing::error!(file = self.file.name, %error, "the kernel refused an answer");
                        return;
                    }
                },
            }
        }
    }
}

/// Why a request for data does not go to the engine.
enum DataRefusal {
    Error(i32),
    /// A read that starts at or behind the end.
    Empty,
    /// It is no request for data.
    NotData,
}

impl Session for FuseSession {
    fn descriptor(&self) -> RawFd {
        self.dev.as_raw_fd()
    }

    fn readable(&mut self) {
        self.readable = true;
    }

    fn receive(&mut self, buffers: &mut Buffers) -> Received {
        if let Some(why) = self.ended.take() {
            return Received::Ended(why);
        }
        match self.slots.as_mut().and_then(Slots::next) {
            Some(key) => self.receive_from_slot(key, buffers),
            None if self.readable => self.receive_from_device(buffers),
            None => Received::Empty,
        }
    }

    fn answer(&mut self, ticket: Ticket, answer: Answer) {
        let written = abi::WriteOut {
            size: ticket.bytes as u32,
            padding: 0,
        };
        let (error, body) = match answer {
            Err(error) => (error_number(&error), Body::Bytes(&[])),
            Ok(Reply::Data(pieces)) => (0, Body::Pieces(pieces)),
            Ok(Reply::Done) if ticket.kind == RequestKind::Write => (0, Body::Bytes(bytemuck::bytes_of(&written))),
            Ok(Reply::Done) => (0, Body::Bytes(&[])),
        };
        self.respond(ticket.origin, ticket.unique, error, body);
    }

    fn resize(&mut self, size_bytes: u64) {
        self.file.size_bytes = size_bytes;
    }

    fn refuse(&mut self) {
        self.refusing = true;
    }

    fn allow_ring(&mut self) {
        self.may_use_ring = true;
    }

    fn command(&mut self) -> Option<Command> {
        self.slots.as_mut()?.command()
    }

    fn commanded(&mut self, slot: u32, result: i32) {
        let slots = self.slots.as_mut().expect("a command was given");
        match slots.commanded(slot, result) {
            Arrival::Fine => {}
            Arrival::Refused => tracing::warn!(
                file = self.file.name,
                error = %std::io::Error::from_raw_os_error(-result),
                "the kernel takes no slots for FUSE over io_uring; using /dev/fuse"
            ),
            Arrival::Ended => self.ended = Some(std::io::Error::from_raw_os_error(-result).to_string()),
        }
    }

    fn commands_out(&self) -> usize {
        self.slots.as_ref().map_or(0, Slots::out)
    }

    fn has_arrived(&self) -> bool {
        self.slots.as_ref().is_some_and(Slots::has_arrived)
    }

    fn path(&self) -> GuestPath {
        match &self.slots {
            Some(slots) if slots.is_accepted() => GuestPath::Ring,
            _ => GuestPath::Device,
        }
    }

    fn is_warm(&self) -> bool {
        self.slots.as_ref().is_some_and(Slots::is_warm)
    }

    fn trim(&mut self) {
        if let Some(slots) = &mut self.slots {
            slots.trim();
        }
    }
}

fn is_data(opcode: u32) -> bool {
    matches!(opcode, abi::READ | abi::WRITE | abi::FSYNC | abi::FALLOCATE)
}

fn error_number(error: &RequestError) -> i32 {
    match error {
        RequestError::Invalid(_) => libc::EINVAL,
        RequestError::NoSpace => libc::ENOSPC,
        RequestError::Corrupt(_) | RequestError::Failed(_) | RequestError::Fenced => libc::EIO,
    }
}
