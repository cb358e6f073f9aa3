//! Where the payload of a guest's write lands that comes through `/dev/fuse`.
//!
//! The kernel copies a request to where we tell it to *before* we know what it is, so every request is received into
//! one landing buffer of the largest size. A small payload is then copied to a buffer of its own size; a large one
//! takes the landing buffer with it, and another one takes its place. Memory that is let go of on this thread is used
//! again for the next buffer (see the engine's `buffer`): a fresh page costs more, zeroing and page faults, than copying
//! four kilobytes.

use galleonfs_storage_engine::buffer::{Buf, BufMut, PAGE_BYTES, free_spares};

/// The largest payload of a request: what FUSE allows with its default limit of 256 pages.
pub const PAYLOAD_BYTES_MAX: usize = 1 << 20;

/// From here on a payload is handed over, not copied. Copying less costs under ten microseconds.
const HANDOVER_BYTES_MIN: usize = 64 << 10;

/// Large buffers that may be with the engine at a time. Each occupies [`PAYLOAD_BYTES_MAX`], also for a payload of a
/// sixteenth of that; beyond the bound payloads are copied to their own size.
const HANDED_OVER_MAX: usize = 16;

/// The buffers of one shard.
#[derive(Debug, Default)]
pub struct Buffers {
    landing: Option<BufMut>,
    handed_over: usize,
    /// Engines have worked on this thread since the last trim, and have left spare memory.
    used: bool,
}

impl Buffers {
    /// The memory for the next payload.
    pub(super) fn landing(&mut self) -> &mut BufMut {
        self.landing
            .get_or_insert_with(|| BufMut::for_reading(PAYLOAD_BYTES_MAX))
    }

    /// Takes the first `len` bytes of the landing buffer, and says whether the buffer itself went with them.
    pub(super) fn take(&mut self, len: usize) -> (Buf, bool) {
        if len >= HANDOVER_BYTES_MIN && self.handed_over < HANDED_OVER_MAX {
            self.landing();
            let full = self.landing.take().expect("the landing buffer was made above");
            self.handed_over += 1;
            return (full.freeze().slice(0..len), true);
        }
        let mut copy = BufMut::for_reading(len.next_multiple_of(PAGE_BYTES));
        copy.as_mut()[..len].copy_from_slice(&self.landing().as_ref()[..len]);
        (copy.freeze().slice(0..len), false)
    }

    /// Engines are about to work on this thread.
    pub fn used(&mut self) {
        self.used = true;
    }

    /// A handed-over request was answered.
    pub fn answered(&mut self) {
        self.handed_over = self
            .handed_over
            .checked_sub(1)
            .expect("no more are answered than were handed over");
    }

    /// True while there may be memory that [`Buffers::trim`] would free.
    pub fn is_warm(&self) -> bool {
        self.landing.is_some() || self.used
    }

    /// Frees everything that is not in use, also what engines have used on this thread: a shard that has been idle for a
    /// while needs none of it.
    pub fn trim(&mut self) {
        self.landing = None;
        self.used = false;
        free_spares();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_small_payload_is_copied_and_its_memory_used_again() {
        let mut buffers = Buffers::default();
        buffers.landing().as_mut()[..2].copy_from_slice(b"ab");
        let (first, handed_over) = buffers.take(12288);
        assert!(!handed_over);
        assert_eq!(&first.as_ref()[..2], b"ab");
        assert_eq!(first.len(), 12288);
        let address = first.as_ref().as_ptr();
        let held = first.clone();
        drop(first);
        let (other, _) = buffers.take(12288);
        assert_ne!(other.as_ref().as_ptr(), address, "somebody else still holds it");
        drop(held);
        let (second, _) = buffers.take(12288);
        assert_eq!(second.as_ref().as_ptr(), address);
    }

    #[test]
    fn a_large_payload_takes_its_buffer_along_within_a_bound() {
        let mut buffers = Buffers::default();
        let mut taken = Vec::new();
        for _ in 0..HANDED_OVER_MAX {
            let address = buffers.landing().as_ref().as_ptr();
            let (payload, handed_over) = buffers.take(HANDOVER_BYTES_MIN);
            assert!(handed_over);
            assert_eq!(payload.as_ref().as_ptr(), address);
            taken.push(payload);
        }
        assert!(!buffers.take(PAYLOAD_BYTES_MAX).1, "the next one is copied");
        drop(taken.pop());
        buffers.answered();
        assert!(buffers.take(PAYLOAD_BYTES_MAX).1);
        buffers.trim();
        assert!(!buffers.is_warm());
    }
}
