//! Page-aligned buffers that travel between the guest and the disk without being copied.
//!
//! A [`BufMut`] has one owner and may be filled; [`BufMut::freeze`] turns it into a [`Buf`], which is shared and read
//! only, and can be cut into smaller ones. Memory is made of whole 4 KiB pages, as direct I/O wants it; what a guest
//! brings or is given may be any number of sectors of it.

use std::cell::RefCell;
use std::fmt;
use std::ops::Range;
use std::sync::Arc;

/// Bytes in a page: the unit of alignment of every buffer and of every disk operation.
pub const PAGE_BYTES: usize = 4096;
/// Buffers are cut between sectors.
const SECTOR_BYTES: usize = crate::types::SECTOR_BYTES as usize;

#[derive(Clone, Copy, bytemuck::Pod, bytemuck::Zeroable)]
#[repr(C, align(4096))]
struct Page([u8; PAGE_BYTES]);

/// The memory behind a buffer and its parts. The reference count stays with it when it is used again, so that neither
/// making a buffer nor sharing it allocates while the thread has spare ones.
type Memory = Arc<Box<[Page]>>;

fn pages_of(len: usize) -> usize {
    assert!(
        len.is_multiple_of(PAGE_BYTES),
        "a buffer is made of whole pages, not of {len} bytes"
    );
    len / PAGE_BYTES
}

const HAS_MEMORY: &str = "a buffer has its memory until it is dropped";
const ONE_OWNER: &str = "a buffer that may be filled has one owner";

/// A buffer with one owner.
pub struct BufMut {
    all: AllMut,
}

/// Where the pages are. Nobody else has a reference.
enum AllMut {
    /// So many pages of it. Taken only when the buffer is frozen or dropped.
    Own(Option<Memory>, usize),
    Lent(Arc<dyn LentMut>),
}

/// Most pages that a thread keeps for reuse by itself; what is more goes where every thread can take it. A thread that
/// receives what another one lets go of would otherwise get fresh memory for each message.
const OWN_PAGES_MAX: usize = 1024;
/// Most pages that wait there: 16 MiB, what a guest that reads ahead has in flight.
const COMMON_PAGES_MAX: usize = 4096;
/// Pages of the memory that is kept: a buffer takes the next larger one, so that lengths which are never asked for again
/// do not pile up. The last one is the longest record.
const CLASSES: [usize; 14] = [1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 64, 128, 256, 257];

/// The class of buffers of so many pages; larger ones are not kept.
fn class_of(pages: usize) -> Option<usize> {
    (pages > 0)
        .then_some(CLASSES.partition_point(|class| *class < pages))
        .filter(|class| *class < CLASSES.len())
}

thread_local! {
    /// Memory that was let go: getting it from the system, aligned and cleared, for each read and each header cost a
    /// quarter of the CPU.
    static SPARES: RefCell<Spares> = const { RefCell::new(Spares::new(OWN_PAGES_MAX)) };
}

struct Spares {
    by_class: [Vec<Memory>; CLASSES.len()],
    pages: usize,
    pages_max: usize,
}

impl Spares {
    const fn new(pages_max: usize) -> Spares {
        Spares {
            by_class: [const { Vec::new() }; CLASSES.len()],
            pages: 0,
            pages_max,
        }
    }

    fn take(&mut self, class: usize) -> Option<Memory> {
        let memory = self.by_class[class].pop()?;
        self.pages -= memory.len();
        Some(memory)
    }

    /// Keeps `memory`, to which nobody else has a reference. Gives it back if there is no room for it, or no use.
    fn keep(&mut self, memory: Memory) -> Option<Memory> {
        let pages = memory.len();
        match class_of(pages) {
            Some(class) if CLASSES[class] == pages && self.pages + pages <= self.pages_max => {
                self.pages += pages;
                self.by_class[class].push(memory);
                None
            }
            _ => Some(memory),
        }
    }
}

#[expect(
    clippy::disallowed_types,
    reason = "no state: memory that is nobody's, on its way from one thread to another"
)]
mod common {
    use std::sync::{Mutex, PoisonError};

    use super::{COMMON_PAGES_MAX, Spares};

    /// Memory that threads have too much of.
    static COMMON: Mutex<Spares> = Mutex::new(Spares::new(COMMON_PAGES_MAX));

    pub(super) fn with<T>(work: impl FnOnce(&mut Spares) -> T) -> T {
        work(&mut COMMON.lock().unwrap_or_else(PoisonError::into_inner))
    }
}

/// Keeps the memory for reuse if this was the last reference to it.
fn let_go(memory: &mut Option<Memory>) {
    if let Some(mut memory) = memory.take()
        && Arc::get_mut(&mut memory).is_some()
    {
        // While a thread ends its spares may be gone already; then the memory just goes back.
        let left = SPARES.try_with(|spares| spares.borrow_mut().keep(memory));
        if let Ok(Some(memory)) = left {
            // Outside the lock: freeing it may take a while.
            let left = common::with(|common| common.keep(memory));
            drop(left);
        }
    }
}

/// Gives the memory back that this thread keeps for reuse, and what is there for all.
pub fn free_spares() {
    let _ = SPARES.try_with(|spares| spares.replace(Spares::new(OWN_PAGES_MAX)));
    let all = common::with(|common| std::mem::replace(common, Spares::new(COMMON_PAGES_MAX)));
    drop(all);
}

impl Drop for BufMut {
    fn drop(&mut self) {
        if let AllMut::Own(memory, _) = &mut self.all {
            let_go(memory);
        }
    }
}

impl BufMut {
    /// A buffer of `len` zero bytes. `len` is a multiple of [`PAGE_BYTES`].
    pub fn zeroed(len: usize) -> Self {
        match BufMut::spare(len) {
            Some(mut buf) => {
                buf.as_mut().fill(0);
                buf
            }
            None => BufMut::new(len),
        }
    }

    /// A buffer of `len` bytes that somebody is about to fill: it may hold anything until then.
    pub fn for_reading(len: usize) -> Self {
        BufMut::spare(len).unwrap_or_else(|| BufMut::new(len))
    }

    fn spare(len: usize) -> Option<BufMut> {
        let pages = pages_of(len);
        let class = class_of(pages)?;
        let own = SPARES.try_with(|spares| spares.borrow_mut().take(class)).ok()?;
        let memory = own.or_else(|| common::with(|common| common.take(class)))?;
        Some(BufMut::of(memory, pages))
    }

    fn new(len: usize) -> BufMut {
        let pages = pages_of(len);
        let memory = bytemuck::zeroed_slice_box(class_of(pages).map_or(pages, |class| CLASSES[class]));
        BufMut::of(Arc::new(memory), pages)
    }

    fn of(memory: Memory, pages: usize) -> BufMut {
        BufMut {
            all: AllMut::Own(Some(memory), pages),
        }
    }

    /// All of some lent memory, of which nobody else has a part.
    pub fn lent(memory: Arc<dyn LentMut>) -> BufMut {
        assert_whole_sectors((*memory).as_ref());
        BufMut {
            all: AllMut::Lent(memory),
        }
    }

    /// Cuts the first `len` bytes off lent memory, a multiple of [`PAGE_BYTES`] and less than all.
    pub fn split_front(&mut self, len: usize) -> BufMut {
        assert!(
            len.is_multiple_of(PAGE_BYTES) && len < self.len(),
            "{len} bytes of {}",
            self.len()
        );
        let AllMut::Lent(memory) = &mut self.all else {
            panic!("only lent memory is cut before it is filled")
        };
        let front = Arc::get_mut(memory).expect(ONE_OWNER).split_front(len);
        BufMut::lent(front)
    }

    /// A buffer that holds a copy of `bytes`, followed by zeros up to the end of the last page.
    pub fn copy_of(bytes: &[u8]) -> Self {
        let mut buf = BufMut::for_reading(bytes.len().next_multiple_of(PAGE_BYTES));
        let (filled, rest) = buf.as_mut().split_at_mut(bytes.len());
        filled.copy_from_slice(bytes);
        rest.fill(0);
        buf
    }

    /// Length in bytes.
    #[expect(
        clippy::len_without_is_empty,
        reason = "an empty buffer has no use; asking for the length has"
    )]
    pub fn len(&self) -> usize {
        match &self.all {
            AllMut::Own(_, pages) => pages * PAGE_BYTES,
            AllMut::Lent(memory) => (**memory).as_ref().len(),
        }
    }

    /// Ends writing and allows sharing.
    pub fn freeze(mut self) -> Buf {
        let bytes = 0..self.len();
        let all = match &mut self.all {
            AllMut::Own(memory, _) => All::Own(memory.take()),
            AllMut::Lent(memory) => All::Lent(memory.clone()),
        };
        Buf { all, bytes }
    }
}

impl AsRef<[u8]> for BufMut {
    fn as_ref(&self) -> &[u8] {
        match &self.all {
            AllMut::Own(memory, pages) => bytemuck::cast_slice(&memory.as_ref().expect(HAS_MEMORY)[..*pages]),
            AllMut::Lent(memory) => (**memory).as_ref(),
        }
    }
}

impl AsMut<[u8]> for BufMut {
    fn as_mut(&mut self) -> &mut [u8] {
        match &mut self.all {
            AllMut::Own(memory, pages) => {
                let memory = memory.as_mut().expect(HAS_MEMORY);
                bytemuck::cast_slice_mut(&mut Arc::get_mut(memory).expect(ONE_OWNER)[..*pages])
            }
            AllMut::Lent(memory) => Arc::get_mut(memory).expect(ONE_OWNER).as_mut(),
        }
    }
}

impl fmt::Debug for BufMut {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "BufMut({} bytes)", self.len())
    }
}

/// Memory that its owner lends to [`Buf`]s, such as a place where the kernel put a guest's payload. It begins on a page
/// boundary, is made of whole sectors, and does not change while anybody but its owner holds it.
pub trait Lent: AsRef<[u8]> + Send + Sync {}

/// Lent memory for somebody to fill: nobody else refers to any part of it until he lets go.
pub trait LentMut: Lent + AsMut<[u8]> {
    /// Cuts the first `len` bytes off.
    fn split_front(&mut self, len: usize) -> Arc<dyn LentMut>;
}

fn assert_whole_sectors(bytes: &[u8]) {
    let aligned = bytes.as_ptr().addr().is_multiple_of(PAGE_BYTES);
    assert!(
        aligned && bytes.len().is_multiple_of(SECTOR_BYTES),
        "{} bytes that were lent are no whole sectors from a page boundary on",
        bytes.len()
    );
}

/// A shared, read-only run of sectors. Cloning and cutting it copies nothing.
#[derive(Clone)]
pub struct Buf {
    all: All,
    bytes: Range<usize>,
}

/// Where the pages are.
#[derive(Clone)]
enum All {
    /// Taken only when the buffer is given back or dropped.
    Own(Option<Memory>),
    Lent(Arc<dyn Lent>),
}

impl Buf {
    /// The first `len` bytes of lent memory, whole sectors; `memory` is held until the last clone and slice is gone.
    pub fn lent(memory: Arc<dyn Lent>, len: usize) -> Buf {
        assert_whole_sectors(&(*memory).as_ref()[..len]);
        Buf {
            all: All::Lent(memory),
            bytes: 0..len,
        }
    }

    /// Length in bytes.
    #[expect(
        clippy::len_without_is_empty,
        reason = "an empty buffer has no use; asking for the length has"
    )]
    pub fn len(&self) -> usize {
        self.bytes.len()
    }

    /// True if it is somebody else's memory, who waits to have it back.
    pub fn is_lent(&self) -> bool {
        matches!(self.all, All::Lent(_))
    }

    /// True if it is made of whole pages, as disk operations want it.
    pub fn is_whole_pages(&self) -> bool {
        self.bytes.start.is_multiple_of(PAGE_BYTES) && self.bytes.end.is_multiple_of(PAGE_BYTES)
    }

    /// The part `range` of this buffer, in bytes; both ends are between sectors.
    pub fn slice(&self, range: Range<usize>) -> Buf {
        assert!(range.start.is_multiple_of(SECTOR_BYTES) && range.end.is_multiple_of(SECTOR_BYTES));
        assert!(
            range.start <= range.end && range.end <= self.len(),
            "{range:?} of {} bytes",
            self.len()
        );
        let first = self.bytes.start;
        Buf {
            all: self.all.clone(),
            bytes: first + range.start..first + range.end,
        }
    }

    /// Gives the buffer back for reuse, if nobody else holds a part of it. Lent memory just goes back to its owner.
    pub fn try_reclaim(mut self) -> Option<BufMut> {
        let All::Own(memory) = &mut self.all else { return None };
        let pages = Arc::get_mut(memory.as_mut()?)?.len();
        memory.take().map(|memory| BufMut::of(memory, pages))
    }
}

impl Drop for Buf {
    fn drop(&mut self) {
        if let All::Own(memory) = &mut self.all {
            let_go(memory);
        }
    }
}

impl AsRef<[u8]> for Buf {
    fn as_ref(&self) -> &[u8] {
        let all = match &self.all {
            All::Own(memory) => bytemuck::cast_slice(memory.as_ref().expect(HAS_MEMORY)),
            All::Lent(memory) => (**memory).as_ref(),
        };
        &all[self.bytes.clone()]
    }
}

impl fmt::Debug for Buf {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Buf({} bytes)", self.len())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn memory_comes_back_only_when_its_last_part_is_gone() {
        let buf = BufMut::copy_of(&[7; 3 * PAGE_BYTES]).freeze();
        let (first, all) = (buf.slice(0..PAGE_BYTES), buf.as_ref().as_ptr());
        drop(buf);
        let other = BufMut::for_reading(3 * PAGE_BYTES);
        assert_ne!(other.as_ref().as_ptr(), all, "a part of it is still held");
        assert_eq!(first.as_ref(), [7; PAGE_BYTES]);
        drop((first, other));
        let again = [BufMut::for_reading(3 * PAGE_BYTES), BufMut::for_reading(3 * PAGE_BYTES)];
        assert!(again.iter().any(|buf| buf.as_ref().as_ptr() == all));
    }

    #[test]
    fn a_buffer_is_cut_between_sectors_and_knows_whether_it_is_whole_pages() {
        let mut buf = BufMut::zeroed(2 * PAGE_BYTES);
        (0..2 * PAGE_BYTES).for_each(|n| buf.as_mut()[n] = (n / SECTOR_BYTES) as u8);
        let part = buf.freeze().slice(SECTOR_BYTES..PAGE_BYTES + SECTOR_BYTES);
        assert_eq!((part.as_ref()[0], part.len()), (1, PAGE_BYTES));
        assert!(!part.is_whole_pages(), "it begins inside a page");
        let rest = part.slice(PAGE_BYTES - SECTOR_BYTES..PAGE_BYTES);
        assert_eq!(rest.as_ref(), [8; SECTOR_BYTES]);
        assert!(BufMut::zeroed(PAGE_BYTES).freeze().is_whole_pages());
    }

    #[test]
    fn memory_that_is_used_again_is_cleared_where_zeros_were_asked_for() {
        drop(BufMut::copy_of(&[7; PAGE_BYTES]));
        assert_eq!(BufMut::zeroed(PAGE_BYTES).as_ref(), [0; PAGE_BYTES]);
    }

    #[test]
    fn a_buffer_is_reclaimed_by_its_only_holder() {
        let buf = BufMut::zeroed(2 * PAGE_BYTES).freeze();
        let part = buf.slice(PAGE_BYTES..2 * PAGE_BYTES);
        assert!(buf.try_reclaim().is_none());
        assert_eq!(part.try_reclaim().map(|whole| whole.len()), Some(2 * PAGE_BYTES));
    }

    #[test]
    fn a_buffer_is_as_long_as_was_asked_for_and_shares_memory_with_its_class() {
        let odd = BufMut::zeroed(200 * PAGE_BYTES);
        assert_eq!((odd.len(), odd.as_ref().len()), (200 * PAGE_BYTES, 200 * PAGE_BYTES));
        let at = odd.as_ref().as_ptr();
        drop(odd);
        let next = BufMut::for_reading(256 * PAGE_BYTES);
        assert_eq!((next.as_ref().as_ptr(), next.len()), (at, 256 * PAGE_BYTES));
        assert_eq!(BufMut::zeroed(0).len(), 0);
        assert_eq!(BufMut::zeroed(1000 * PAGE_BYTES).as_ref().len(), 1000 * PAGE_BYTES);
    }
}
