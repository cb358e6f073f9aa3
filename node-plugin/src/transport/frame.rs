//! What goes over the wire: frames, byte by byte.
//!
//! ```text
//! header (96 bytes) │ body │ payload
//! ```
//!
//! The header says whose the frame is, in full, each time: a frame that reaches the wrong volume, replica or cluster is
//! noticed by whoever receives it and needs no memory for it. One check covers header and body. The payload has none
//! here, because it carries its own: what a replica appends is checked against its address and version by the store.
//! Between two nodes all of it is inside TLS, so the check is against our own mistakes, not against others.
//!
//! All numbers are little-endian. `docs/replication.md` has the same table, and a test holds golden bytes.

use std::fmt;

use bytes::Bytes;
use crc_fast::{CrcAlgorithm, Digest};
use galleonfs_storage_engine::buffer::{Buf, BufMut, PAGE_BYTES};
use galleonfs_storage_engine::types::{Epoch, SECTOR_BYTES};
use uuid::Uuid;

/// Bytes of a header.
pub const HEADER_BYTES: usize = 96;
/// The longest body. What describes a record of a megabyte takes a tenth of that.
pub const BODY_BYTES_MAX: usize = 256 << 10;
/// The longest payload: the longest record of the store, 257 pages, twice.
pub const PAYLOAD_BYTES_MAX: usize = 514 * PAGE_BYTES;

pub(super) const MAGIC: [u8; 4] = *b"GFSW";

// Each offset follows from the one before.
const MAGIC_AT: usize = 0;
const VERSION_AT: usize = MAGIC_AT + 4;
const KIND_AT: usize = VERSION_AT + 2;
const FLAGS_AT: usize = KIND_AT + 2;
const EPOCH_AT: usize = FLAGS_AT + 4;
const CLUSTER_AT: usize = EPOCH_AT + 4;
const VOLUME_AT: usize = CLUSTER_AT + 16;
const REPLICA_AT: usize = VOLUME_AT + 16;
const REQUEST_AT: usize = REPLICA_AT + 16;
const BODY_LEN_AT: usize = REQUEST_AT + 8;
const PAYLOAD_LEN_AT: usize = BODY_LEN_AT + 4;
const CHECK_AT: usize = PAYLOAD_LEN_AT + 4;
const ZEROS_AT: usize = CHECK_AT + 4;
const _: () = assert!(ZEROS_AT + 12 == HEADER_BYTES);

/// What a frame is about. Below [`Kind::FIRST_OF_OTHERS`] are those of the transport itself; the rest belongs to whoever
/// uses it, and means nothing here.
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Kind(pub u16);

impl Kind {
    /// Who I am: the first frame in each direction.
    pub const HELLO: Kind = Kind(1);
    /// Why I do not talk to you: the last frame.
    pub const REFUSAL: Kind = Kind(2);
    /// I am still here.
    pub const HEARTBEAT: Kind = Kind(3);
    /// The first number that the transport leaves to others.
    pub const FIRST_OF_OTHERS: Kind = Kind(16);
}

impl fmt::Debug for Kind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "kind {}", self.0)
    }
}

/// One message. To send to several, clone it: neither body nor payload is copied.
#[derive(Clone, Debug)]
pub struct Frame {
    pub kind: Kind,
    /// Means what the kind says.
    pub flags: u32,
    pub volume: Uuid,
    pub replica: Uuid,
    pub epoch: Epoch,
    /// Number of a request or a stream, to tell answers apart.
    pub request: u64,
    pub body: Bytes,
    /// Whole sectors. Parts are sent one behind the other and arrive as one.
    pub payload: Vec<Buf>,
}

impl Frame {
    /// A frame of the transport itself.
    pub(super) fn own(kind: Kind, body: Vec<u8>) -> Frame {
        Frame {
            kind,
            flags: 0,
            volume: Uuid::nil(),
            replica: Uuid::nil(),
            epoch: Epoch(0),
            request: 0,
            body: Bytes::from(body),
            payload: Vec::new(),
        }
    }

    pub fn payload_len(&self) -> usize {
        self.payload.iter().map(Buf::len).sum()
    }

    /// Bytes on the wire, before TLS.
    pub fn len_on_wire(&self) -> usize {
        HEADER_BYTES + self.body.len() + self.payload_len()
    }

    /// The header of this frame. Panics if it is longer than frames may be: whoever made it is wrong.
    pub fn header(&self, version: u16, cluster: Uuid) -> [u8; HEADER_BYTES] {
        let payload = self.payload_len();
        assert!(self.body.len() <= BODY_BYTES_MAX, "a body of {} bytes", self.body.len());
        assert!(payload <= PAYLOAD_BYTES_MAX, "a payload of {payload} bytes");
        let mut header = [0; HEADER_BYTES];
        let mut put = |at: usize, bytes: &[u8]| header[at..at + bytes.len()].copy_from_slice(bytes);
        put(MAGIC_AT, &MAGIC);
        put(VERSION_AT, &version.to_le_bytes());
        put(KIND_AT, &self.kind.0.to_le_bytes());
        put(FLAGS_AT, &self.flags.to_le_bytes());
        put(EPOCH_AT, &self.epoch.0.to_le_bytes());
        put(CLUSTER_AT, cluster.as_bytes());
        put(VOLUME_AT, self.volume.as_bytes());
        put(REPLICA_AT, self.replica.as_bytes());
        put(REQUEST_AT, &self.request.to_le_bytes());
        put(BODY_LEN_AT, &(self.body.len() as u32).to_le_bytes());
        put(PAYLOAD_LEN_AT, &(payload as u32).to_le_bytes());
        let check = check(&header, &self.body);
        header[CHECK_AT..ZEROS_AT].copy_from_slice(&check.to_le_bytes());
        header
    }
}

/// CRC-32C of header and body, without the check itself.
fn check(header: &[u8; HEADER_BYTES], body: &[u8]) -> u32 {
    let mut digest = Digest::new(CrcAlgorithm::Crc32Iscsi);
    for part in [&header[..CHECK_AT], &header[ZEROS_AT..], body] {
        digest.update(part);
    }
    digest.finalize() as u32
}

/// Why bytes are no frame that may come here. The connection ends with any of them: behind it nothing can be trusted.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum FrameError {
    #[error("no frame begins with {0:02x?}")]
    Magic([u8; 4]),
    #[error("a frame of version {found} where {expected} is spoken")]
    Version { found: u16, expected: u16 },
    #[error("a frame of cluster {found} in cluster {expected}")]
    Cluster { found: Uuid, expected: Uuid },
    #[error("{0:?} has no place here")]
    Kind(Kind),
    #[error("a body of {len} bytes; at most {max} may come here")]
    Body { len: usize, max: usize },
    #[error("a payload of {len} bytes; whole sectors and at most {max} may come here")]
    Payload { len: usize, max: usize },
    #[error("the check of header and body does not fit")]
    Check,
}

/// What may come at this point of a connection.
#[derive(Clone, Copy, Debug)]
pub struct Expect {
    pub version: u16,
    /// `None` while it is still to be said.
    pub cluster: Option<Uuid>,
    pub kinds: Kinds,
}

/// Kinds of frames that may come.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kinds {
    /// A hello or a refusal, short and without payload: whoever sends it has not said yet who it is.
    Opening,
    /// Everything but those.
    Session,
}

/// A hello is short.
const OPENING_BODY_BYTES_MAX: usize = 4096;

impl Expect {
    /// What comes before anything is agreed on.
    pub const OPENING: Expect = Expect {
        version: super::hello::HELLO_VERSION,
        cluster: None,
        kinds: Kinds::Opening,
    };

    fn limits(&self) -> (usize, usize) {
        match self.kinds {
            Kinds::Opening => (OPENING_BODY_BYTES_MAX, 0),
            Kinds::Session => (BODY_BYTES_MAX, PAYLOAD_BYTES_MAX),
        }
    }

    fn takes(&self, kind: Kind) -> bool {
        match self.kinds {
            Kinds::Opening => matches!(kind, Kind::HELLO | Kind::REFUSAL),
            Kinds::Session => kind >= Kind::FIRST_OF_OTHERS || matches!(kind, Kind::HEARTBEAT | Kind::REFUSAL),
        }
    }
}

/// Makes frames of a stream of bytes, however it is cut. It asks for memory only for what a header with a fitting
/// magic, version, cluster and length announces, and stops for good at the first thing that is wrong.
#[derive(Debug)]
pub struct Decoder {
    expect: Expect,
    header: [u8; HEADER_BYTES],
    header_len: usize,
    /// What the header announced, once it is whole.
    frame: Option<Announced>,
}

#[derive(Debug)]
struct Announced {
    body: Vec<u8>,
    body_len: usize,
    payload: Option<BufMut>,
    payload_len: usize,
    payload_done: usize,
}

impl Decoder {
    pub fn new(expect: Expect) -> Decoder {
        Decoder {
            expect,
            header: [0; HEADER_BYTES],
            header_len: 0,
            frame: None,
        }
    }

    /// Says what may come from the next frame on. To be called between frames.
    pub fn expect(&mut self, expect: Expect) {
        assert_eq!(self.header_len, 0, "a frame is under way");
        self.expect = expect;
    }

    /// True when no frame is half there.
    pub fn is_between_frames(&self) -> bool {
        self.header_len == 0
    }

    /// Takes bytes up to the end of a frame. Gives how many it took, and the frame if that ends it.
    pub fn take(&mut self, bytes: &[u8]) -> Result<(usize, Option<Frame>), FrameError> {
        let mut taken = 0;
        if self.frame.is_none() {
            taken = bytes.len().min(HEADER_BYTES - self.header_len);
            self.header[self.header_len..self.header_len + taken].copy_from_slice(&bytes[..taken]);
            self.header_len += taken;
            if self.header_len < HEADER_BYTES {
                // What is no frame is told as soon as it shows: a peer that speaks something else may send no more.
                let magic = self.header_len.min(MAGIC.len());
                if self.header[..magic] != MAGIC[..magic] {
                    return Err(self.no_magic());
                }
                return Ok((taken, None));
            }
            self.frame = Some(self.announced()?);
        }
        let frame = self.frame.as_mut().expect("the header is whole");
        let body = (bytes.len() - taken).min(frame.body_len - frame.body.len());
        frame.body.extend_from_slice(&bytes[taken..taken + body]);
        taken += body;
        if frame.body.len() < frame.body_len {
            return Ok((taken, None));
        }
        // As soon as it can be: no payload is taken for a header that is damaged.
        if frame.payload_done == 0 && u32_at(&self.header, CHECK_AT) != check(&self.header, &frame.body) {
            return Err(FrameError::Check);
        }
        let payload = (bytes.len() - taken).min(frame.payload_len - frame.payload_done);
        if payload > 0 {
            let whole_pages = frame.payload_len.next_multiple_of(PAGE_BYTES);
            let memory = frame.payload.get_or_insert_with(|| BufMut::for_reading(whole_pages));
            memory.as_mut()[frame.payload_done..frame.payload_done + payload]
                .copy_from_slice(&bytes[taken..taken + payload]);
            frame.payload_done += payload;
            taken += payload;
        }
        if frame.payload_done < frame.payload_len {
            return Ok((taken, None));
        }
        let frame = self.frame.take().expect("it was there above");
        self.header_len = 0;
        Ok((taken, Some(self.frame_of(frame))))
    }

    fn no_magic(&self) -> FrameError {
        FrameError::Magic(self.header[..4].try_into().expect("four bytes"))
    }

    /// Looks at a whole header.
    fn announced(&self) -> Result<Announced, FrameError> {
        let header = &self.header;
        if header[..4] != MAGIC {
            return Err(self.no_magic());
        }
        let kind = Kind(u16_at(header, KIND_AT));
        let found = u16_at(header, VERSION_AT);
        // A refusal may come before or behind the agreement on a version.
        let expected = match kind {
            Kind::REFUSAL => super::hello::HELLO_VERSION,
            _ => self.expect.version,
        };
        if found != expected {
            return Err(FrameError::Version { found, expected });
        }
        if let Some(expected) = self.expect.cluster {
            let found = uuid_at(header, CLUSTER_AT);
            if found != expected {
                return Err(FrameError::Cluster { found, expected });
            }
        }
        if !self.expect.takes(kind) {
            return Err(FrameError::Kind(kind));
        }
        let (body_max, payload_max) = self.expect.limits();
        let (body_len, payload_len) = (
            u32_at(header, BODY_LEN_AT) as usize,
            u32_at(header, PAYLOAD_LEN_AT) as usize,
        );
        if body_len > body_max {
            return Err(FrameError::Body {
                len: body_len,
                max: body_max,
            });
        }
        if payload_len > payload_max || !payload_len.is_multiple_of(SECTOR_BYTES as usize) {
            return Err(FrameError::Payload {
                len: payload_len,
                max: payload_max,
            });
        }
        Ok(Announced {
            body: Vec::with_capacity(body_len),
            body_len,
            payload: None,
            payload_len,
            payload_done: 0,
        })
    }

    fn frame_of(&self, found: Announced) -> Frame {
        let header = &self.header;
        let payload = found.payload.map(|memory| memory.freeze().slice(0..found.payload_len));
        Frame {
            kind: Kind(u16_at(header, KIND_AT)),
            flags: u32_at(header, FLAGS_AT),
            volume: uuid_at(header, VOLUME_AT),
            replica: uuid_at(header, REPLICA_AT),
            epoch: Epoch(u32_at(header, EPOCH_AT)),
            request: u64::from_le_bytes(header[REQUEST_AT..BODY_LEN_AT].try_into().expect("eight bytes")),
            body: Bytes::from(found.body),
            payload: payload.into_iter().collect(),
        }
    }
}

fn u16_at(header: &[u8; HEADER_BYTES], at: usize) -> u16 {
    u16::from_le_bytes(header[at..at + 2].try_into().expect("two bytes"))
}

fn u32_at(header: &[u8; HEADER_BYTES], at: usize) -> u32 {
    u32::from_le_bytes(header[at..at + 4].try_into().expect("four bytes"))
}

fn uuid_at(header: &[u8; HEADER_BYTES], at: usize) -> Uuid {
    Uuid::from_bytes(header[at..at + 16].try_into().expect("sixteen bytes"))
}

/// Lets the check of a header fit again, for tests that change what it covers. `bytes` begin with a header, and as much
/// of its body as there is is behind it.
pub fn make_check_fit(bytes: &mut [u8]) {
    let Some((header, rest)) = bytes.split_first_chunk_mut::<HEADER_BYTES>() else {
        return;
    };
    let body = rest.len().min(u32_at(header, BODY_LEN_AT) as usize);
    let fitting = check(header, &rest[..body]);
    header[CHECK_AT..ZEROS_AT].copy_from_slice(&fitting.to_le_bytes());
}
