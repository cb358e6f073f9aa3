//! A FUSE server for one file: the guest's requests arrive as reads, writes, syncs and holes of that file.
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
use super::{BLOCK_BYTES, Received, RequestKind, Session, Ticket, abi};

/// Requests the kernel may have with us at a time. Above the loop driver's queue of 128; a `u16` in the protocol.
const BACKGROUND_MAX: u16 = 512;

/// The header and the arguments of a read or write; a write's payload starts behind it, in memory of its own.
const HEAD_BYTES: usize = size_of::<abi::InHeader>() + size_of::<abi::WriteIn>();

const FILE_ID: u64 = 2;
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
    file_name: String,
    size_bytes: u64,
    read_only: bool,
    refusing: bool,
    head: [u8; HEAD_BYTES],
}

/// How a request that the session answers itself ends.
enum Local {
    Reply(Vec<u8>),
    Error(i32),
    /// The protocol has no answer to this one.
    Silent,
}

impl FuseSession {
    pub fn new(dev: File, file_name: String, size_bytes: u64, read_only: bool) -> FuseSession {
        FuseSession {
            dev,
            file_name,
            size_bytes,
            read_only,
            refusing: false,
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
        len: usize,
        buffers: &mut Buffers,
    ) -> Result<(Ticket, Request), DataRefusal> {
        let ticket = |kind, bytes, handed_over| Ticket {
            unique: header.unique,
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
                let end = read.offset.saturating_add(u64::from(read.size)).min(self.size_bytes);
                if read.offset >= end {
                    return Err(DataRefusal::Empty);
                }
                let bytes = end - read.offset;
                if !aligned(read.offset) || !aligned(bytes) {
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
                if self.read_only {
                    return Err(DataRefusal::Error(libc::EROFS));
                }
                if len != HEAD_BYTES + write.size as usize || bytes == 0 || !aligned(write.offset) || !aligned(bytes) {
                    return Err(malformed);
                }
                if !self.within(write.offset, bytes) {
                    return Err(DataRefusal::Error(libc::ENOSPC));
                }
                let (data, handed_over) = buffers.take(write.size as usize);
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
                if self.read_only {
                    return Err(DataRefusal::Error(libc::EROFS));
                }
                if range.length == 0 || !aligned(range.offset) || !aligned(range.length) {
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
            abi::LOOKUP => {
                let name = body.strip_suffix(&[0]).unwrap_or(body);
                if header.nodeid != abi::ROOT_ID || name != self.file_name.as_bytes() {
                    return Local::Error(libc::ENOENT);
                }
                // No attribute is cached, so that a `stat` after a change of size tells the new one.
                reply(&abi::EntryOut {
                    nodeid: FILE_ID,
                    generation: 0,
                    entry_valid: 3600,
                    attr_valid: 0,
                    entry_valid_nsec: 0,
                    attr_valid_nsec: 0,
                    attr: self.attr(FILE_ID),
                })
            }
            abi::GETATTR => match header.nodeid {
                abi::ROOT_ID | FILE_ID => self.attr_reply(header.nodeid),
                _ => Local::Error(libc::ENOENT),
            },
            abi::SETATTR => {
                let Some(start) = body.get(..size_of::<abi::SetattrInStart>()) else {
                    return Local::Error(libc::EINVAL);
                };
                let start: abi::SetattrInStart = bytemuck::pod_read_unaligned(start);
                // The size of a volume is changed by its owner only; times and modes are not kept.
                if start.valid & abi::FATTR_SIZE != 0 {
                    return Local::Error(libc::EPERM);
                }
                self.attr_reply(header.nodeid)
            }
            abi::OPEN => {
                let open_flags = abi::FOPEN_DIRECT_IO | abi::FOPEN_PARALLEL_DIRECT_WRITES | abi::FOPEN_NOFLUSH;
                reply(&abi::OpenOut {
                    fh: 0,
                    open_flags,
                    padding: 0,
                })
            }
            abi::OPENDIR => reply(&abi::OpenOut {
                fh: 0,
                open_flags: 0,
                padding: 0,
            }),
            abi::READDIR => self.read_dir(body),
            abi::STATFS => reply(&abi::StatfsOut {
                blocks: self.size_bytes / BLOCK_BYTES,
                bfree: 0,
                bavail: 0,
                files: 1,
                ffree: 0,
                // The loop device takes its discard granularity from here.
                bsize: BLOCK_BYTES as u32,
                namelen: 255,
                frsize: BLOCK_BYTES as u32,
                padding: 0,
                spare: [0; 6],
            }),
            abi::RELEASE | abi::RELEASEDIR | abi::FLUSH | abi::FSYNCDIR | abi::ACCESS | abi::DESTROY => {
                Local::Reply(Vec::new())
            }
            // Every request ends by itself; an interrupted one is just waited for.
            abi::FORGET | abi::BATCH_FORGET | abi::INTERRUPT => Local::Silent,
            // A sync of the whole file system has to go somewhere it means something; only the file's own sync does.
            abi::SYNCFS => Local::Error(libc::EOPNOTSUPP),
            // The kernel remembers this answer and does not ask again: extended attributes, locks, and the like.
            _ => Local::Error(libc::ENOSYS),
        }
    }

    fn negotiate(&self, body: &[u8]) -> Local {
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
        let flags = offered & wanted;
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

    fn read_dir(&self, body: &[u8]) -> Local {
        let from = size_of::<abi::ReadIn>();
        let Some(read) = body.get(..from) else {
            return Local::Error(libc::EINVAL);
        };
        let read: abi::ReadIn = bytemuck::pod_read_unaligned(read);
        let mut entries = Vec::new();
        let names = [(".", abi::ROOT_ID, libc::DT_DIR), ("..", abi::ROOT_ID, libc::DT_DIR)];
        let file = (self.file_name.as_str(), FILE_ID, libc::DT_REG);
        for (index, (name, ino, kind)) in names.into_iter().chain([file]).enumerate().skip(read.offset as usize) {
            let start = abi::DirentStart {
                ino,
                off: index as u64 + 1,
                namelen: name.len() as u32,
                kind: u32::from(kind),
            };
            let len = (size_of::<abi::DirentStart>() + name.len()).next_multiple_of(8);
            if entries.len() + len > read.size as usize {
                break;
            }
            let end = entries.len() + len;
            entries.extend_from_slice(bytemuck::bytes_of(&start));
            entries.extend_from_slice(name.as_bytes());
            entries.resize(end, 0);
        }
        Local::Reply(entries)
    }

    fn attr_reply(&self, nodeid: u64) -> Local {
        reply(&abi::AttrOut {
            attr_valid: 0,
            attr_valid_nsec: 0,
            dummy: 0,
            attr: self.attr(nodeid),
        })
    }

    fn attr(&self, nodeid: u64) -> abi::Attr {
        let (size, mode, nlink) = match nodeid {
            abi::ROOT_ID => (0, libc::S_IFDIR | 0o500, 2),
            _ => (
                self.size_bytes,
                libc::S_IFREG | if self.read_only { 0o400 } else { 0o600 },
                1,
            ),
        };
        abi::Attr {
            ino: nodeid,
            size,
            blocks: size / 512,
            atime: 0,
            mtime: 0,
            ctime: 0,
            atimensec: 0,
            mtimensec: 0,
            ctimensec: 0,
            mode,
            nlink,
            uid: 0,
            gid: 0,
            rdev: 0,
            blksize: BLOCK_BYTES as u32,
            flags: 0,
        }
    }

    fn within(&self, offset: u64, len: u64) -> bool {
        offset.checked_add(len).is_some_and(|end| end <= self.size_bytes)
    }

    fn send(&self, unique: u64, body: &[u8]) {
        let header = out_header(unique, 0, body.len());
        self.write(&[IoSlice::new(bytemuck::bytes_of(&header)), IoSlice::new(body)]);
    }

    /// An empty answer; a success if `error` is zero.
    fn send_error(&self, unique: u64, error: i32) {
        self.write(&[IoSlice::new(bytemuck::bytes_of(&out_header(unique, error, 0)))]);
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
                        tracing::error!(file = self.file_name, %error, "the kernel refused an answer");
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

    fn receive(&mut self, buffers: &mut Buffers) -> Received {
        let len = loop {
            let landing = buffers.landing().as_mut();
            match (&self.dev).read_vectored(&mut [IoSliceMut::new(&mut self.head), IoSliceMut::new(landing)]) {
                Ok(len) => break len,
                Err(error) => match error.raw_os_error() {
                    Some(libc::EAGAIN) => return Received::Empty,
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
        match self.data_request(&header, len, buffers) {
            Ok((ticket, request)) => return Received::Request(ticket, request),
            Err(DataRefusal::Error(error)) if is_data(header.opcode) => self.send_error(header.unique, error),
            Err(DataRefusal::Empty) => self.send_error(header.unique, 0),
            Err(DataRefusal::Error(_) | DataRefusal::NotData) => {
                let in_head = len.min(HEAD_BYTES);
                let mut body = self.head[size_of::<abi::InHeader>()..in_head].to_vec();
                body.extend_from_slice(&buffers.landing().as_ref()[..len - in_head]);
                match self.local_request(&header, &body) {
                    Local::Reply(body) => self.send(header.unique, &body),
                    Local::Error(error) => self.send_error(header.unique, error),
                    Local::Silent => {}
                }
            }
        }
        Received::Served
    }

    fn answer(&mut self, ticket: Ticket, answer: &Answer) {
        match answer {
            Err(error) => self.send_error(ticket.unique, error_number(error)),
            // By far the most frequent answer needs no list.
            Ok(Reply::Data(pieces)) if let [Piece::Bytes(buf)] = &pieces[..] => self.send(ticket.unique, buf.as_ref()),
            Ok(Reply::Data(pieces)) => {
                let len = |piece: &Piece| match piece {
                    Piece::Bytes(buf) => buf.len(),
                    Piece::Zeros(len) => *len,
                };
                let header = out_header(ticket.unique, 0, pieces.iter().map(len).sum());
                let mut parts = Vec::with_capacity(1 + pieces.len());
                parts.push(IoSlice::new(bytemuck::bytes_of(&header)));
                for piece in pieces {
                    match piece {
                        Piece::Bytes(buf) => parts.push(IoSlice::new(buf.as_ref())),
                        Piece::Zeros(len) => {
                            let (whole, rest) = (len / ZEROS.len(), len % ZEROS.len());
                            parts.extend((0..whole).map(|_| IoSlice::new(&ZEROS)));
                            parts.push(IoSlice::new(&ZEROS[..rest]));
                        }
                    }
                }
                self.write(&parts);
            }
            Ok(Reply::Done) if ticket.kind == RequestKind::Write => {
                let written = abi::WriteOut {
                    size: ticket.bytes as u32,
                    padding: 0,
                };
                self.send(ticket.unique, bytemuck::bytes_of(&written));
            }
            Ok(Reply::Done) => self.send_error(ticket.unique, 0),
        }
    }

    fn resize(&mut self, size_bytes: u64) {
        self.size_bytes = size_bytes;
    }

    fn refuse(&mut self) {
        self.refusing = true;
    }
}

fn is_data(opcode: u32) -> bool {
    matches!(opcode, abi::READ | abi::WRITE | abi::FSYNC | abi::FALLOCATE)
}

fn out_header(unique: u64, error: i32, body_bytes: usize) -> abi::OutHeader {
    abi::OutHeader {
        len: (size_of::<abi::OutHeader>() + body_bytes) as u32,
        error: -error,
        unique,
    }
}

fn reply<T: Pod>(body: &T) -> Local {
    Local::Reply(bytemuck::bytes_of(body).to_vec())
}

fn aligned(bytes: u64) -> bool {
    bytes.is_multiple_of(BLOCK_BYTES)
}

fn error_number(error: &RequestError) -> i32 {
    match error {
        RequestError::Invalid(_) => libc::EINVAL,
        RequestError::NoSpace => libc::ENOSPC,
        RequestError::Corrupt(_) | RequestError::Failed(_) | RequestError::Fenced => libc::EIO,
    }
}
