//! Where the payload of a guest's write lands.
//!
//! The kernel copies a request to where we tell it to *before* we know what it is, so every request is received into
//! one landing buffer of the largest size. A small payload is then copied to a buffer of its own size; a large one
//! takes the landing buffer with it, and another one takes its place. Buffers come back when the disk is done with
//! them and are used again: a fresh page costs more (zeroing, page faults) than copying four kilobytes.

use galleonfs_storage_engine::buffer::{Buf, BufMut, PAGE_BYTES, free_spares};

/// The largest payload of a request: what FUSE allows with its default limit of 256 pages.
pub const PAYLOAD_BYTES_MAX: usize = 1 << 20;

/// From here on a payload is handed over, not copied. Copying less costs under ten microseconds.
const HANDOVER_BYTES_MIN: usize = 64 << 10;

/// Large buffers that may be with the engine at a time. Each occupies [`PAYLOAD_BYTES_MAX`], also for a payload of a
/// sixteenth of that; beyond the bound payloads are copied to their own size.
const HANDED_OVER_MAX: usize = 16;

/// Bytes kept for reuse in each class of small buffers: enough for 256 writes of 4 KiB in flight.
const KEPT_BYTES_PER_CLASS_MAX: usize = 1 << 20;

/// Powers of two from one page to [`PAYLOAD_BYTES_MAX`].
const CLASSES: usize = PAYLOAD_BYTES_MAX.trailing_zeros() as usize - PAGE_BYTES.trailing_zeros() as usize + 1;

/// The large class is bounded by count instead.
const LARGE: usize = CLASSES - 1;

const _: () = assert!(PAGE_BYTES << LARGE == PAYLOAD_BYTES_MAX);

/// The buffers of one shard.
#[derive(Debug)]
pub struct Buffers {
    landing: Option<BufMut>,
    kept: [Vec<BufMut>; CLASSES],
    handed_over: usize,
}

impl Default for Buffers {
    fn default() -> Self {
        Buffers {
            landing: None,
            kept: std::array::from_fn(|_| Vec::new()),
            handed_over: 0,
        }
    }
}

impl Buffers {
    /// The memory for the next payload.
    pub(super) fn landing(&mut self) -> &mut BufMut {
        let kept = &mut self.kept[LARGE];
        self.landing
            .get_or_insert_with(|| kept.pop().unwrap_or_else(|| BufMut::zeroed(PAYLOAD_BYTES_MAX)))
    }

    /// Takes the first `len` bytes of the landing buffer, a whole number of pages, and says whether the buffer itself
    /// went with them.
    pub(super) fn take(&mut self, len: usize) -> (Buf, bool) {
        if len >= HANDOVER_BYTES_MIN && self.handed_over < HANDED_OVER_MAX {
            self.landing();
            let full = self.landing.take().expect("the landing buffer was made above");
            self.handed_over += 1;
            return (full.freeze().slice(0..len), true);
        }
        let class = class_of(len);
        let mut copy = self.kept[class]
            .pop()
            .unwrap_or_else(|| BufMut::zeroed(PAGE_BYTES << class));
        copy.as_mut()[..len].copy_from_slice(&self.landing().as_ref()[..len]);
        (copy.freeze().slice(0..len), false)
    }

    /// A handed-over request was answered.
    pub fn answered(&mut self) {
        self.handed_over = self
            .handed_over
            .checked_sub(1)
            .expect("no more are answered than were handed over");
    }

    /// Keeps the memory of `buf` for reuse, unless somebody still holds a part of it or there is enough of its kind.
    pub fn give_back(&mut self, buf: Buf) {
        let Some(buf) = buf.try_reclaim() else { return };
        let len = buf.len();
        if !len.is_power_of_two() || len > PAYLOAD_BYTES_MAX {
            return;
        }
        let class = class_of(len);
        let kept_max = if class == LARGE {
            HANDED_OVER_MAX
        } else {
            KEPT_BYTES_PER_CLASS_MAX / len
        };
        if self.kept[class].len() < kept_max {
            self.kept[class].push(buf);
        }
    }

    /// True while there is memory that [`Buffers::trim`] would free.
    pub fn is_warm(&self) -> bool {
        self.landing.is_some() || self.kept.iter().any(|kept| !kept.is_empty())
    }

    /// Frees everything that is not in use: a shard that has been idle for a while needs none of it.
    pub fn trim(&mut self) {
        self.landing = None;
        self.kept.iter_mut().for_each(|kept| *kept = Vec::new());
        // Buffers that engines made on this thread.
        free_spares();
    }
}

fn class_of(len: usize) -> usize {
    len.next_power_of_two().max(PAGE_BYTES).trailing_zeros() as usize - PAGE_BYTES.trailing_zeros() as usize
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
        buffers.give_back(first.clone());
        assert!(buffers.kept[class_of(12288)].is_empty(), "somebody else still holds it");
        buffers.give_back(first);
        let (second, _) = buffers.take(16384);
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
        buffers.give_back(taken.pop().expect("one was taken"));
        buffers.answered();
        assert!(buffers.take(PAYLOAD_BYTES_MAX).1);
        buffers.trim();
        assert!(!buffers.is_warm());
    }
}
