//! FUSE over io_uring: requests arrive in slots of memory that the kernel was given beforehand.
//!
//! Each slot is one entry of one of the connection's queues, and the kernel has a queue per processor. A slot goes round
//! like this, and each arrow to the right is one command on the shard's ring:
//!
//! ```text
//! Idle ──register──► Kernel ──► Arrived ──► Serving ──commit and fetch──► Kernel ──► …
//!                      └──► Gone, when the connection has ended
//! ```
//!
//! A payload stays in its slot until the engine has written it to the disk, so a slot is handed back to the kernel only
//! when nobody else holds its payload: the kernel writes the next request there. The memory is a file of its own (a
//! memfd), because a successor of this process can only go on with what it can map, too.
//!
//! Source: `fs/fuse/dev_uring.c` and `include/uapi/linux/fuse.h` of Linux 6.14 to 6.18,
//! `Documentation/filesystems/fuse/fuse-io-uring.rst`.

use std::collections::VecDeque;
use std::fs::File;
use std::os::fd::AsRawFd;
use std::ptr::NonNull;
use std::sync::Arc;
use std::{fs, io};

use galleonfs_storage_engine::buffer::{Buf, BufMut, Lent, LentMut, PAGE_BYTES};
use galleonfs_storage_engine::request::Piece;

use super::abi;
use super::buffers::PAYLOAD_BYTES_MAX;

/// Slots of one volume, unless its node has very many processors: the depth of the loop device's queue.
const SLOTS: usize = 128;

/// Slots of one queue: fewer make the guest wait for a slot, more only take addresses.
const SLOTS_PER_QUEUE_MIN: usize = 8;
const SLOTS_PER_QUEUE_MAX: usize = 64;

/// Where a processor's switch for the module is. Root may write it, and it is off when the kernel starts.
const SWITCH: &str = "/sys/module/fuse/parameters/enable_uring";
const POSSIBLE_CPUS: &str = "/sys/devices/system/cpu/possible";

/// Bytes of a header's place.
const HEADER_BYTES: usize = 512;
const _: () = assert!(size_of::<abi::RingHeader>() <= HEADER_BYTES);

/// Lets connections use io_uring, for all that are made from now on. False if this kernel cannot, or may not.
pub fn switch_on() -> bool {
    match fs::read_to_string(SWITCH) {
        Ok(value) if value.trim() == "Y" => true,
        // Before Linux 6.14 there is no such switch.
        Err(_) => false,
        Ok(_) => match fs::write(SWITCH, "Y") {
            Ok(()) => true,
            Err(error) => {
                tracing::warn!(%error, "FUSE over io_uring is switched off and cannot be switched on ({SWITCH}); volumes are served through /dev/fuse, which is slower");
                false
            }
        },
    }
}

/// What the shard's ring is to carry out for a session.
#[derive(Debug)]
pub struct Command {
    pub slot: u32,
    /// `/dev/fuse`.
    pub dev: i32,
    /// `FUSE_IO_URING_CMD_…`.
    pub operation: u32,
    /// What follows the command in the submission.
    pub request: abi::RingCommand,
    /// Where the slot's header and payload are, for a registration: two vectors.
    pub vectors: *const libc::iovec,
}

/// Number of vectors of a registration.
pub const COMMAND_VECTORS: u32 = 2;

/// The memory of all slots: first the headers, then the payloads.
#[derive(Debug)]
struct Memory {
    base: NonNull<u8>,
    len: usize,
    file: File,
}

// SAFETY: the memory belongs to this value alone; who may touch which part of it when is what `Slots` looks after.
unsafe impl Send for Memory {}
// SAFETY: as above.
unsafe impl Sync for Memory {}

impl Memory {
    fn new(len: usize) -> io::Result<Memory> {
        let file = File::from(nix::sys::memfd::memfd_create(
            c"galleonfs-slots",
            nix::sys::memfd::MFdFlags::MFD_CLOEXEC,
        )?);
        file.set_len(len as u64)?;
        // SAFETY: a new mapping of a file that nobody else has; the kernel chooses the address.
        let base = unsafe {
            libc::mmap(
                std::ptr::null_mut(),
                len,
                libc::PROT_READ | libc::PROT_WRITE,
                libc::MAP_SHARED,
                file.as_raw_fd(),
                0,
            )
        };
        if base == libc::MAP_FAILED {
            return Err(io::Error::last_os_error());
        }
        let base = NonNull::new(base.cast()).expect("a mapping is not at address zero");
        Ok(Memory { base, len, file })
    }

    /// Address of byte `at`.
    fn at(&self, at: usize) -> *mut u8 {
        assert!(at < self.len);
        self.base.as_ptr().wrapping_add(at)
    }

    /// Gives the pages of a range back; they are zeros when they are touched again.
    fn punch(&self, at: usize, len: usize) {
        // Memory that stays is no harm.
        let _ = nix::fcntl::fallocate(
            &self.file,
            nix::fcntl::FallocateFlags::FALLOC_FL_PUNCH_HOLE | nix::fcntl::FallocateFlags::FALLOC_FL_KEEP_SIZE,
            at as i64,
            len as i64,
        );
    }
}

impl Drop for Memory {
    fn drop(&mut self) {
        // SAFETY: nobody refers to the mapping any more: payloads hold it, and so do the slots.
        unsafe { libc::munmap(self.base.as_ptr().cast(), self.len) };
    }
}

/// The payload of one slot, as the engine sees it.
#[derive(Debug)]
struct Payload {
    memory: Arc<Memory>,
    at: usize,
}

impl AsRef<[u8]> for Payload {
    fn as_ref(&self) -> &[u8] {
        // SAFETY: the range lies inside the mapping, which lives as long as this value. Nobody writes to it while this
        // is held elsewhere: we hand the slot to the kernel, and write answers, only when it is not.
        unsafe { std::slice::from_raw_parts(self.memory.at(self.at), PAYLOAD_BYTES_MAX) }
    }
}

impl Lent for Payload {}

/// A part of a payload that the answer of a read is put in. Parts of one payload do not overlap, and while there is one
/// nobody else touches the payload.
#[derive(Debug)]
struct Landing {
    payload: Arc<Payload>,
    from: usize,
    len: usize,
}

impl Landing {
    fn start(&self) -> *mut u8 {
        self.payload.memory.at(self.payload.at + self.from)
    }
}

impl AsRef<[u8]> for Landing {
    fn as_ref(&self) -> &[u8] {
        // SAFETY: the range lies inside the payload, and nobody else has a part of it.
        unsafe { std::slice::from_raw_parts(self.start(), self.len) }
    }
}

impl AsMut<[u8]> for Landing {
    fn as_mut(&mut self) -> &mut [u8] {
        // SAFETY: as above, and this is the only reference to this part.
        unsafe { std::slice::from_raw_parts_mut(self.start(), self.len) }
    }
}

impl Lent for Landing {}

impl LentMut for Landing {
    fn split_front(&mut self, len: usize) -> Arc<dyn LentMut> {
        assert!(len < self.len);
        let front = Landing {
            payload: self.payload.clone(),
            from: self.from,
            len,
        };
        self.from += len;
        self.len -= len;
        Arc::new(front)
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum State {
    /// The kernel does not know it yet.
    Idle,
    /// The kernel has it and may write to it.
    Kernel,
    /// A request is in it that nobody looked at.
    Arrived,
    /// A request is in it that is being served.
    Serving,
    /// The connection has ended.
    Gone,
}

/// One entry of a queue.
#[derive(Debug)]
struct Slot {
    state: State,
    queue: u16,
    /// Names the request in the commit.
    commit_id: u64,
    payload: Arc<Payload>,
    vectors: [libc::iovec; COMMAND_VECTORS as usize],
    /// The answer, while its payload is still held by somebody.
    waiting: Option<Waiting>,
}

/// An answer that cannot be written yet.
#[derive(Debug)]
struct Waiting {
    unique: u64,
    error: i32,
    body: Vec<u8>,
}

impl Slot {
    /// True if nobody else looks at the payload, nor will.
    fn is_ours(&mut self) -> bool {
        Arc::get_mut(&mut self.payload).is_some()
    }

    /// Where the payload is.
    fn start(&self) -> *mut u8 {
        self.vectors[1].iov_base.cast()
    }

    /// How long an answer is, and which of its pieces are not where they belong. The others are let go of.
    fn sort_out(&self, pieces: Vec<Piece>) -> (usize, Vec<(usize, Piece)>) {
        let (mut len, mut elsewhere) = (0, Vec::new());
        for piece in pieces {
            let at = len;
            len += match &piece {
                Piece::Bytes(buf) => buf.len(),
                Piece::Zeros(zeros) => *zeros,
            };
            match piece {
                Piece::Bytes(buf) if std::ptr::eq(buf.as_ref().as_ptr(), self.start().wrapping_add(at)) => {}
                piece => elsewhere.push((at, piece)),
            }
        }
        assert!(
            len <= PAYLOAD_BYTES_MAX,
            "an answer is not longer than what was asked for"
        );
        (len, elsewhere)
    }

    /// Writes an answer to the slot, which is ours.
    fn fill(&mut self, unique: u64, error: i32, body: Body<'_>) {
        let to = self.start();
        let len = match body {
            Body::Bytes(bytes) => {
                assert!(self.is_ours() && bytes.len() <= PAYLOAD_BYTES_MAX);
                // SAFETY: the place is inside the payload, which is no part of `bytes`, as it is ours.
                unsafe { to.copy_from_nonoverlapping(bytes.as_ptr(), bytes.len()) };
                bytes.len()
            }
            Body::Pieces(pieces) => {
                let (len, elsewhere) = self.sort_out(pieces);
                assert!(self.is_ours(), "nobody looks at a payload that is written to");
                for (at, piece) in elsewhere {
                    let to = to.wrapping_add(at);
                    match piece {
                        Piece::Bytes(buf) => {
                            // SAFETY: as above, and the whole answer is inside the payload.
                            unsafe { to.copy_from_nonoverlapping(buf.as_ref().as_ptr(), buf.len()) };
                        }
                        // SAFETY: as above.
                        Piece::Zeros(zeros) => unsafe { to.write_bytes(0, zeros) },
                    }
                }
                len
            }
        };
        let out = abi::OutHeader {
            len: (size_of::<abi::OutHeader>() + len) as u32,
            error: -error,
            unique,
        };
        let header = self.vectors[0].iov_base.cast::<abi::RingHeader>();
        // SAFETY: the vector was made for this type, in memory of ours that the kernel does not touch now.
        unsafe {
            (&raw mut (*header).in_out)
                .cast::<abi::OutHeader>()
                .write_unaligned(out);
            (&raw mut (*header).payload_bytes).write_unaligned(len as u32);
        }
    }
}

/// What an arrival was.
#[derive(Debug, PartialEq, Eq)]
pub enum Arrival {
    /// A request is waiting in the slot, or the command will be given again.
    Fine,
    /// The kernel does not take the slots: it goes on through `/dev/fuse`.
    Refused,
    /// The connection has ended.
    Ended,
}

/// The slots of one connection.
#[derive(Debug)]
pub struct Slots {
    dev: i32,
    memory: Arc<Memory>,
    slots: Box<[Slot]>,
    /// To be given to the kernel.
    ready: VecDeque<u32>,
    arrived: VecDeque<u32>,
    /// Answered, and held by somebody.
    held: Vec<u32>,
    /// Commands that are out.
    out: usize,
    /// The kernel took a registration.
    accepted: bool,
    /// Payloads may have pages.
    warm: bool,
}

// SAFETY: the vectors point into `memory`, which is `Send`.
unsafe impl Send for Slots {}

impl Slots {
    /// Slots for the connection `dev`, for each queue that the kernel has.
    pub fn new(dev: &File) -> io::Result<Slots> {
        Slots::with_queues(dev, possible_cpus(&fs::read_to_string(POSSIBLE_CPUS)?))
    }

    fn with_queues(dev: &File, queues: usize) -> io::Result<Slots> {
        let per_queue = (SLOTS / queues).clamp(SLOTS_PER_QUEUE_MIN, SLOTS_PER_QUEUE_MAX);
        let count = queues * per_queue;
        let headers = (count * HEADER_BYTES).next_multiple_of(PAGE_BYTES);
        let memory = Arc::new(Memory::new(headers + count * PAYLOAD_BYTES_MAX)?);
        let slots = (0..count).map(|n| {
            let at = headers + n * PAYLOAD_BYTES_MAX;
            let vector = |at: usize, len| libc::iovec {
                iov_base: memory.at(at).cast(),
                iov_len: len,
            };
            Slot {
                state: State::Idle,
                // Neighbours in different queues, so that a few registrations already make every queue usable.
                queue: (n % queues) as u16,
                commit_id: 0,
                payload: Arc::new(Payload {
                    memory: memory.clone(),
                    at,
                }),
                vectors: [
                    vector(n * HEADER_BYTES, size_of::<abi::RingHeader>()),
                    vector(at, PAYLOAD_BYTES_MAX),
                ],
                waiting: None,
            }
        });
        Ok(Slots {
            dev: dev.as_raw_fd(),
            slots: slots.collect(),
            ready: (0..count as u32).collect(),
            memory,
            arrived: VecDeque::new(),
            held: Vec::new(),
            out: 0,
            accepted: false,
            warm: false,
        })
    }

    /// The next command for the ring.
    pub fn command(&mut self) -> Option<Command> {
        if !self.held.is_empty() {
            self.settle_held();
        }
        let key = self.ready.pop_front()?;
        let slot = &mut self.slots[key as usize];
        assert!(slot.is_ours(), "nobody looks at a payload that the kernel may write");
        let (operation, vectors) = match slot.state {
            State::Idle => (abi::RING_REGISTER, slot.vectors.as_ptr()),
            State::Serving => (abi::RING_COMMIT_AND_FETCH, std::ptr::null()),
            state => unreachable!("a slot that is {state:?} is not ready for the kernel"),
        };
        slot.state = State::Kernel;
        self.out += 1;
        Some(Command {
            slot: key,
            dev: self.dev,
            operation,
            request: abi::RingCommand {
                flags: 0,
                commit_id: slot.commit_id,
                qid: slot.queue,
                padding: [0; 3],
            },
            vectors,
        })
    }

    /// Answers what waited for a payload that nobody holds any more.
    fn settle_held(&mut self) {
        let (slots, ready) = (&mut self.slots, &mut self.ready);
        self.held.retain(|&key| {
            let slot = &mut slots[key as usize];
            if !slot.is_ours() {
                return true;
            }
            let waiting = slot.waiting.take().expect("a held slot has its answer");
            slot.fill(waiting.unique, waiting.error, Body::Bytes(&waiting.body));
            ready.push_back(key);
            false
        });
    }

    /// A command has ended.
    pub fn commanded(&mut self, key: u32, result: i32) -> Arrival {
        self.out -= 1;
        let slot = &mut self.slots[key as usize];
        assert_eq!(slot.state, State::Kernel, "a command was out for this slot");
        match result {
            0 => {
                slot.state = State::Arrived;
                self.arrived.push_back(key);
                self.accepted = true;
                self.warm = true;
                Arrival::Fine
            }
            // Not yet: the kernel is still looking at our answer to its first request.
            _ if result == -libc::EAGAIN && !self.accepted => {
                slot.state = State::Idle;
                self.ready.push_back(key);
                Arrival::Fine
            }
            _ => {
                slot.state = State::Gone;
                if self.accepted || matches!(-result, libc::ENOTCONN | libc::ECONNABORTED | libc::ECANCELED) {
                    Arrival::Ended
                } else {
                    Arrival::Refused
                }
            }
        }
    }

    /// Commands that the kernel has not ended.
    pub fn out(&self) -> usize {
        self.out
    }

    /// True once the kernel has used a slot.
    pub fn is_accepted(&self) -> bool {
        self.accepted
    }

    /// True if [`Slots::next`] has something.
    pub fn has_arrived(&self) -> bool {
        !self.arrived.is_empty()
    }

    /// A slot with a request that nobody looked at.
    pub fn next(&mut self) -> Option<u32> {
        let key = self.arrived.pop_front()?;
        let header = self.header(key);
        let slot = &mut self.slots[key as usize];
        slot.state = State::Serving;
        slot.commit_id = header.commit_id;
        Some(key)
    }

    /// The header of the request in slot `key`.
    pub fn header(&self, key: u32) -> abi::RingHeader {
        let slot = &self.slots[key as usize];
        assert!(matches!(slot.state, State::Arrived | State::Serving));
        // SAFETY: the vector was made for this type, in memory of ours that the kernel does not touch now.
        unsafe { slot.vectors[0].iov_base.cast::<abi::RingHeader>().read_unaligned() }
    }

    /// The first `len` bytes of the payload in slot `key`, a whole number of pages, in place.
    pub fn payload(&self, key: u32, len: usize) -> Buf {
        Buf::lent(self.slots[key as usize].payload.clone(), len)
    }

    /// Memory for the answer of a read of `len` bytes, a whole number of pages.
    pub fn landing(&self, key: u32, len: usize) -> BufMut {
        let payload = self.slots[key as usize].payload.clone();
        assert!(len <= PAYLOAD_BYTES_MAX);
        BufMut::lent(Arc::new(Landing { payload, from: 0, len }))
    }

    /// The first `len` bytes of the payload in slot `key`.
    pub fn bytes(&self, key: u32, len: usize) -> &[u8] {
        &(*self.slots[key as usize].payload).as_ref()[..len]
    }

    /// Answers the request in slot `key` with `error` (positive, zero for success) and `body`. A write whose payload
    /// somebody still holds waits for that: the answer is written over it.
    pub fn answer(&mut self, key: u32, unique: u64, error: i32, body: Body<'_>) {
        let slot = &mut self.slots[key as usize];
        assert_eq!(slot.state, State::Serving, "a request is answered once");
        match body {
            Body::Bytes(bytes) if !slot.is_ours() => {
                slot.waiting = Some(Waiting {
                    unique,
                    error,
                    body: bytes.to_vec(),
                });
                self.held.push(key);
            }
            body => {
                slot.fill(unique, error, body);
                self.ready.push_back(key);
            }
        }
    }

    /// Gives the memory of payloads back that are not in use. To be called when nothing happens for a while.
    pub fn trim(&mut self) {
        if !std::mem::take(&mut self.warm) {
            return;
        }
        for slot in &mut self.slots {
            // The kernel writes only when it carries out our own thread's commands, so not now.
            if slot.state == State::Kernel && slot.is_ours() {
                self.memory.punch(slot.payload.at, PAYLOAD_BYTES_MAX);
            }
        }
    }

    /// True while [`Slots::trim`] may give something back.
    pub fn is_warm(&self) -> bool {
        self.warm
    }
}

/// The body of an answer.
#[derive(Debug)]
pub enum Body<'a> {
    Bytes(&'a [u8]),
    /// Those that landed in the slot are not copied.
    Pieces(Vec<Piece>),
}

/// How many processors the text of [`POSSIBLE_CPUS`] names: `0-3,8-11`.
fn possible_cpus(text: &str) -> usize {
    let ranges = text.trim().split(',').map(|range| {
        let (first, last) = range.split_once('-').unwrap_or((range, range));
        match (first.parse::<usize>(), last.parse::<usize>()) {
            (Ok(first), Ok(last)) if first <= last => last - first + 1,
            _ => 1,
        }
    });
    ranges.sum::<usize>().max(1)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn processors_are_counted_in_ranges() {
        for (text, count) in [("0", 1), ("0-1\n", 2), ("0-3,8-11", 8), ("0,2", 2), ("", 1)] {
            assert_eq!(possible_cpus(text), count, "{text:?}");
        }
    }

    impl Slots {
        fn payload_bytes(&self, key: u32) -> u32 {
            let header = self.slots[key as usize].vectors[0].iov_base.cast::<abi::RingHeader>();
            // SAFETY: the vector was made for this type.
            unsafe { header.read_unaligned() }.payload_bytes
        }
    }

    /// A slot with a request, as if the kernel had put it there.
    fn arrive(slots: &mut Slots, unique: u64) -> u32 {
        let command = slots.command().expect("a slot is ready");
        // SAFETY: the vectors of a registration point to a header and a payload of ours.
        unsafe {
            let vectors = std::slice::from_raw_parts(command.vectors, 2);
            let header = abi::RingHeader {
                commit_id: unique,
                payload_bytes: 4096,
                ..bytemuck::Zeroable::zeroed()
            };
            vectors[0].iov_base.cast::<abi::RingHeader>().write_unaligned(header);
            vectors[1].iov_base.cast::<u8>().write_bytes(unique as u8, 4096);
        }
        assert_eq!(slots.commanded(command.slot, 0), Arrival::Fine);
        assert_eq!(slots.next(), Some(command.slot));
        command.slot
    }

    fn slots() -> Slots {
        let dev = File::open("/dev/null").expect("there is one");
        let mut slots = Slots::with_queues(&dev, 2).expect("memory");
        // Registered one at a time by the tests.
        slots.ready.truncate(2);
        slots
    }

    #[test]
    fn a_slot_goes_back_to_the_kernel_only_when_nobody_holds_its_payload() {
        let mut slots = slots();
        let (first, second) = (arrive(&mut slots, 7), arrive(&mut slots, 8));
        let payload = slots.payload(first, 4096);
        let part = payload.slice(0..4096);
        drop(payload);
        slots.answer(first, 7, 0, Body::Bytes(&[1; 8]));
        slots.answer(second, 8, 0, Body::Bytes(&[2; 8]));
        let command = slots.command().expect("the second goes back");
        assert_eq!((command.slot, command.operation), (second, abi::RING_COMMIT_AND_FETCH));
        assert_eq!(command.request.commit_id, 8);
        assert!(slots.command().is_none());
        assert_eq!(part.as_ref(), [7; 4096]);
        drop(part);
        assert_eq!(slots.command().expect("the first goes back").slot, first);
        assert_eq!(slots.bytes(first, 8), [1; 8]);
        assert_eq!(slots.out(), 2);
    }

    #[test]
    fn an_answer_that_landed_in_its_slot_is_completed_around_it() {
        let mut slots = slots();
        let key = arrive(&mut slots, 5);
        let mut rest = slots.landing(key, 4 * 4096);
        let mut first = rest.split_front(4096);
        drop(rest.split_front(4096));
        let own = BufMut::copy_of(&[3; 4096]).freeze();
        drop(rest.split_front(4096));
        first.as_mut().fill(1);
        rest.as_mut().fill(4);
        let pieces = vec![
            Piece::Bytes(first.freeze()),
            Piece::Zeros(4096),
            Piece::Bytes(own),
            Piece::Bytes(rest.freeze()),
        ];
        slots.answer(key, 5, 0, Body::Pieces(pieces));
        while slots.command().is_some_and(|command| command.slot != key) {}
        let expected: Vec<u8> = [1, 0, 3, 4].into_iter().flat_map(|fill| [fill; 4096]).collect();
        assert_eq!(slots.bytes(key, 4 * 4096), expected);
        assert_eq!(slots.payload_bytes(key), 4 * 4096);
    }

    #[test]
    fn what_is_given_back_while_idle_comes_as_zeros() {
        let mut slots = slots();
        let key = arrive(&mut slots, 9);
        slots.answer(key, 9, libc::EIO, Body::Bytes(&[]));
        while let Some(command) = slots.command() {
            assert!(command.slot == key || command.operation == abi::RING_REGISTER);
        }
        assert!(slots.is_warm());
        slots.trim();
        assert!(!slots.is_warm());
        assert_eq!(slots.bytes(key, 4096), [0; 4096]);
    }

    #[test]
    fn a_kernel_that_takes_no_slots_is_told_from_one_that_is_not_ready() {
        let mut slots = slots();
        let command = slots.command().expect("a slot is ready");
        assert_eq!(slots.commanded(command.slot, -libc::EAGAIN), Arrival::Fine);
        assert!(slots.next().is_none());
        let again = slots.command().expect("it is tried again");
        assert_eq!(slots.commanded(again.slot, -libc::EINVAL), Arrival::Refused);
    }
}
