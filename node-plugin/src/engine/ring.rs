//! One io_uring: the place where a shard waits for everything, and the way its disk operations go.
//!
//! The kernel holds addresses of buffers while an operation is out, so a [`DiskOp`] keeps its buffers, and its file, in
//! a slot of its own until the completion arrives; what a buffer points to does not move when the slot does.

use std::fs::File;
use std::io;
use std::os::fd::{AsRawFd, RawFd};
use std::sync::Arc;
use std::time::Duration;

use galleonfs_storage_engine::buffer::{Buf, BufMut};
use galleonfs_storage_engine::io::{FileId, IoDone, IoId};
use io_uring::{IoUring, cqueue, opcode, squeue, types};
use slab::Slab;

use super::limits::{RING_COMPLETIONS, RING_ENTRIES, RING_SUBMIT_EVERY, RING_WORKERS_MAX};
use super::reactor::{Event, Source};
use crate::disk::failure;
use crate::frontend::{COMMAND_VECTORS, Command};

/// The most parts of one vectored write (`IOV_MAX`).
const PARTS_MAX: usize = 1024;

/// A disk operation for the ring.
#[derive(Debug)]
pub(super) struct DiskOp {
    pub volume: u32,
    pub id: IoId,
    pub file: FileId,
    pub handle: Arc<File>,
    pub work: Work,
}

/// What to do with the file.
#[derive(Debug)]
pub(super) enum Work {
    Read { offset: u64, buf: BufMut },
    Write { offset: u64, parts: Vec<Buf> },
    Sync,
}

/// An operation that is out.
#[derive(Debug)]
struct Slot {
    op: DiskOp,
    /// Bytes that are done. A short transfer is continued from here.
    done: usize,
    /// Where the kernel finds the parts of a write; the first `skipped` of them are done.
    vectors: Vec<libc::iovec>,
    skipped: usize,
}

/// What a completion belongs to: the kind in the upper byte, a volume or a slot in the lower half, and for a command
/// the session's slot between them.
mod tag {
    pub const IGNORED: u64 = 0;
    pub const INBOX: u64 = 1 << KIND_AT;
    pub const VOLUME: u64 = 2 << KIND_AT;
    pub const DISK: u64 = 3 << KIND_AT;
    pub const COMMAND: u64 = 4 << KIND_AT;
    pub const WIRE: u64 = 5 << KIND_AT;
    const KIND_AT: u32 = 56;
    pub const KIND: u64 = !0 << KIND_AT;
    pub const COMMAND_SLOT_AT: u32 = 32;

    pub fn command(volume: u32, slot: u32) -> u64 {
        assert!(slot >> (KIND_AT - COMMAND_SLOT_AT) == 0);
        COMMAND | u64::from(slot) << COMMAND_SLOT_AT | u64::from(volume)
    }
}

/// An entry with room for a command of a device.
type Entry = squeue::Entry128;

pub(super) struct Ring {
    ring: IoUring<Entry, cqueue::Entry>,
    slots: Slab<Slot>,
    /// Submissions that the kernel has not been told of.
    untold: usize,
    /// Completions taken from the ring, and not looked at yet.
    taken: Vec<(u64, i32)>,
    /// Vectors of writes that ended, for the next ones.
    spare_vectors: Vec<Vec<libc::iovec>>,
}

impl std::fmt::Debug for Ring {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Ring")
            .field("out", &self.slots.len())
            .finish_non_exhaustive()
    }
}

impl Ring {
    /// To be called on the thread that will use it: newer kernels make good use of there being only one.
    pub fn new() -> io::Result<Ring> {
        let builder = || {
            let mut builder = IoUring::<Entry, cqueue::Entry>::builder();
            builder.setup_cqsize(RING_COMPLETIONS);
            builder
        };
        // Both came with Linux 6.1; entries of this size with 5.19.
        let newer = builder()
            .setup_single_issuer()
            .setup_defer_taskrun()
            .build(RING_ENTRIES);
        let ring = newer.or_else(|_| builder().build(RING_ENTRIES))?;
        if !ring.params().is_feature_ext_arg() || !ring.params().is_feature_nodrop() {
            return Err(io::Error::new(
                io::ErrorKind::Unsupported,
                "this kernel's io_uring is too old",
            ));
        }
        // An older kernel keeps its own bound.
        let _ = ring.submitter().register_iowq_max_workers(&mut [RING_WORKERS_MAX, 0]);
        Ok(Ring {
            ring,
            slots: Slab::new(),
            untold: 0,
            taken: Vec::new(),
            spare_vectors: Vec::new(),
        })
    }

    /// Reports once when `fd` is readable.
    pub fn watch(&mut self, source: Source, fd: RawFd) {
        let entry = opcode::PollAdd::new(types::Fd(fd), libc::POLLIN as u32)
            .build()
            .user_data(tag_of(source));
        self.push(&entry.into());
    }

    /// Ends a watch. The watch still reports, so that the caller knows that the kernel has let go of the descriptor.
    pub fn unwatch(&mut self, source: Source) {
        self.push(
            &opcode::PollRemove::new(tag_of(source))
                .build()
                .user_data(tag::IGNORED)
                .into(),
        );
    }

    /// Starts a command of a volume's session; it ends as [`Event::Command`].
    pub fn command(&mut self, volume: u32, command: &Command) {
        let mut request = [0; 80];
        let bytes = bytemuck::bytes_of(&command.request);
        request[..bytes.len()].copy_from_slice(bytes);
        let vectors = (!command.vectors.is_null()).then_some(command.vectors as u64);
        let mut entry = opcode::UringCmd80::new(types::Fd(command.dev), command.operation)
            .cmd(request)
            .addr(vectors)
            .build()
            .user_data(tag::command(volume, command.slot));
        if vectors.is_some() {
            set_len(&mut entry, COMMAND_VECTORS);
        }
        self.push(&entry);
    }

    /// Starts a disk operation; it ends as [`Event::Disk`].
    pub fn start(&mut self, op: DiskOp) {
        let mut vectors = Vec::new();
        if let Work::Write { parts, .. } = &op.work
            && parts.len() > 1
        {
            vectors = self.spare_vectors.pop().unwrap_or_default();
            vectors.extend(parts.iter().map(|part| vector(part.as_ref())));
        }
        let key = self.slots.insert(Slot {
            op,
            done: 0,
            vectors,
            skipped: 0,
        });
        self.issue(key);
    }

    /// Hands the operation in slot `key`, or what is left of it, to the kernel.
    fn issue(&mut self, key: usize) {
        let slot = &mut self.slots[key];
        let fd = types::Fd(slot.op.handle.as_raw_fd());
        let done = slot.done;
        let entry = match &mut slot.op.work {
            Work::Read { offset, buf } => {
                let rest = &mut buf.as_mut()[done..];
                let at = *offset + done as u64;
                opcode::Read::new(fd, rest.as_mut_ptr(), rest.len() as u32)
                    .offset(at)
                    .build()
            }
            Work::Write { offset, parts } if slot.vectors.is_empty() => {
                let rest = &parts[0].as_ref()[done..];
                let at = *offset + done as u64;
                opcode::Write::new(fd, rest.as_ptr(), rest.len() as u32)
                    .offset(at)
                    .build()
            }
            Work::Write { offset, .. } => {
                let rest = &slot.vectors[slot.skipped..];
                let count = rest.len().min(PARTS_MAX) as u32;
                opcode::Writev::new(fd, rest.as_ptr(), count)
                    .offset(*offset + done as u64)
                    .build()
            }
            Work::Sync => opcode::Fsync::new(fd).flags(types::FsyncFlags::DATASYNC).build(),
        };
        self.push(&entry.user_data(tag::DISK | key as u64).into());
    }

    fn push(&mut self, entry: &Entry) {
        loop {
            // SAFETY: what the entry points to stays where it is until its completion was taken: buffers, vectors and
            // files are held by a slot, watched descriptors and the memory of commands by their volume, which waits for the
            // end of its watch and of its commands.
            if unsafe { self.ring.submission().push(entry) }.is_ok() {
                self.untold += 1;
                if self.untold >= RING_SUBMIT_EVERY {
                    // What it does not take now it takes with the next ones, or when we wait.
                    let _ = self.ring.submit();
                    self.untold = 0;
                }
                return;
            }
            // Full: let the kernel take what is there. It may be short of memory for a moment, or interrupted.
            if let Err(error) = self.ring.submit() {
                match error.raw_os_error() {
                    Some(libc::EINTR | libc::EAGAIN) => {}
                    Some(libc::EBUSY) => self.take_completions(),
                    _ => panic!("io_uring takes no more submissions: {error}"),
                }
            }
        }
    }

    /// Submits what was started, waits until there is something to report, or until `timeout`, and reports it.
    pub fn wait(&mut self, timeout: Option<Duration>, events: &mut Vec<Event>) {
        self.untold = 0;
        let timespec = timeout.map(types::Timespec::from);
        // Completions that a full ring made us take early are to be reported without waiting for more.
        let wanted = usize::from(self.taken.is_empty());
        let outcome = match &timespec {
            Some(timespec) => self
                .ring
                .submitter()
                .submit_with_args(wanted, &types::SubmitArgs::new().timespec(timespec)),
            None => self.ring.submit_and_wait(wanted),
        };
        if let Err(error) = outcome {
            match error.raw_os_error() {
                Some(libc::ETIME | libc::EINTR | libc::EBUSY | libc::EAGAIN) => {}
                _ => panic!("io_uring cannot be waited for: {error}"),
            }
        }
        self.take_completions();
        let mut taken = std::mem::take(&mut self.taken);
        for (tag, result) in taken.drain(..) {
            let low = tag & !tag::KIND;
            match tag & tag::KIND {
                tag::INBOX => events.push(Event::Readable(Source::Inbox)),
                tag::WIRE => events.push(Event::Readable(Source::Wire)),
                tag::VOLUME => events.push(Event::Readable(Source::Volume(low as u32))),
                tag::DISK => events.extend(self.ended(low as usize, result)),
                tag::COMMAND => events.push(Event::Command {
                    volume: low as u32,
                    slot: (low >> tag::COMMAND_SLOT_AT) as u32,
                    result,
                }),
                _ => {}
            }
        }
        // Continuing a transfer on a full ring may have taken more.
        taken.append(&mut self.taken);
        self.taken = taken;
    }

    fn take_completions(&mut self) {
        self.taken
            .extend(self.ring.completion().map(|entry| (entry.user_data(), entry.result())));
    }

    /// Looks at a completion: continues a short transfer, or reports the end.
    fn ended(&mut self, key: usize, result: i32) -> Option<Event> {
        let slot = &mut self.slots[key];
        let (doing, len) = match &slot.op.work {
            Work::Read { buf, .. } => ("read", buf.len()),
            Work::Write { parts, .. } => ("write", parts.iter().map(Buf::len).sum()),
            Work::Sync => ("sync", 0),
        };
        let outcome = match result {
            _ if result == -libc::EINTR || result == -libc::EAGAIN => {
                self.issue(key);
                return None;
            }
            ..0 => Err(failure(doing, slot.op.file, io::Error::from_raw_os_error(-result))),
            0 if len > 0 => {
                let kind = if doing == "read" {
                    io::ErrorKind::UnexpectedEof
                } else {
                    io::ErrorKind::WriteZero
                };
                Err(failure(doing, slot.op.file, kind.into()))
            }
            _ => {
                slot.done += result as usize;
                if slot.done < len {
                    slot.advance(result as usize);
                    self.issue(key);
                    return None;
                }
                Ok(())
            }
        };
        let Slot { op, mut vectors, .. } = self.slots.remove(key);
        if vectors.capacity() > 0 {
            vectors.clear();
            self.spare_vectors.push(vectors);
        }
        let result = outcome.map(|()| match op.work {
            Work::Read { buf, .. } => IoDone::Read(buf),
            // Their memory is let go of here.
            Work::Write { .. } | Work::Sync => IoDone::Done,
        });
        Some(Event::Disk {
            volume: op.volume,
            id: op.id,
            result,
        })
    }
}

impl Drop for Ring {
    fn drop(&mut self) {
        // The kernel may still write to buffers of operations that are out; then their memory is not to be used again.
        if !self.slots.is_empty() {
            std::mem::forget(std::mem::take(&mut self.slots));
        }
    }
}

impl Slot {
    /// Steps over `bytes` more bytes of the parts.
    fn advance(&mut self, mut bytes: usize) {
        while let Some(first) = self.vectors.get_mut(self.skipped) {
            if bytes < first.iov_len {
                first.iov_base = first.iov_base.wrapping_byte_add(bytes);
                first.iov_len -= bytes;
                return;
            }
            bytes -= first.iov_len;
            self.skipped += 1;
        }
    }
}

/// Sets the field `len` of a submission, for which the builder of commands has no setter.
fn set_len(entry: &mut Entry, len: u32) {
    /// Of `len` in `struct io_uring_sqe`.
    const LEN_AT: usize = 24;
    const _: () = assert!(size_of::<Entry>() == 128);
    // SAFETY: an entry is the kernel's structure of 128 bytes, plain old data, in C's layout.
    unsafe {
        (&raw mut *entry)
            .cast::<u8>()
            .add(LEN_AT)
            .cast::<u32>()
            .write_unaligned(len)
    };
}

fn vector(bytes: &[u8]) -> libc::iovec {
    libc::iovec {
        iov_base: bytes.as_ptr().cast_mut().cast(),
        iov_len: bytes.len(),
    }
}

fn tag_of(source: Source) -> u64 {
    match source {
        Source::Inbox => tag::INBOX,
        Source::Wire => tag::WIRE,
        Source::Volume(volume) => tag::VOLUME | u64::from(volume),
    }
}
