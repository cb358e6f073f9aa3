//! Page-aligned buffers that travel between the guest and the disk without being copied.
//!
//! A [`BufMut`] has one owner and may be filled; [`BufMut::freeze`] turns it into a [`Buf`], which is shared and read
//! only, and can be cut into smaller ones. Both are made of whole 4 KiB pages, as direct I/O wants them.

use std::cell::RefCell;
use std::collections::BTreeMap;
use std::fmt;
use std::ops::Range;
use std::sync::Arc;

/// Bytes in a page: the unit of alignment of every buffer and of every disk operation.
pub const PAGE_BYTES: usize = 4096;

#[derive(Clone, Copy, bytemuck::Pod, bytemuck::Zeroable)]
#[repr(C, align(4096))]
struct Page([u8; PAGE_BYTES]);

/// A buffer with one owner.
pub struct BufMut {
    pages: Box<[Page]>,
}

/// Most pages that a thread keeps for reuse: 4 MiB.
const SPARE_PAGES_MAX: usize = 1024;

thread_local! {
    /// Buffers that were let go, by number of pages: clearing memory for each read cost a seventh of the CPU.
    static SPARES: RefCell<Spares> = RefCell::default();
}

#[derive(Default)]
struct Spares {
    by_pages: BTreeMap<usize, Vec<Box<[Page]>>>,
    pages: usize,
}

impl Drop for BufMut {
    fn drop(&mut self) {
        let pages = std::mem::take(&mut self.pages);
        // While a thread ends its spares may be gone already; then the memory just goes back.
        let _ = SPARES.try_with(|spares| {
            let mut spares = spares.borrow_mut();
            if !pages.is_empty() && spares.pages + pages.len() <= SPARE_PAGES_MAX {
                spares.pages += pages.len();
                spares.by_pages.entry(pages.len()).or_default().push(pages);
            }
        });
    }
}

impl BufMut {
    /// A buffer of `len` zero bytes. `len` is a multiple of [`PAGE_BYTES`].
    pub fn zeroed(len: usize) -> Self {
        assert!(
            len.is_multiple_of(PAGE_BYTES),
            "a buffer is made of whole pages, not of {len} bytes"
        );
        BufMut {
            pages: bytemuck::zeroed_slice_box(len / PAGE_BYTES),
        }
    }

    /// A buffer of `len` bytes that a read is about to fill: it may hold anything until then.
    pub fn for_reading(len: usize) -> Self {
        assert!(
            len.is_multiple_of(PAGE_BYTES),
            "a buffer is made of whole pages, not of {len} bytes"
        );
        let spare = SPARES.try_with(|spares| {
            let mut spares = spares.borrow_mut();
            let spare = spares.by_pages.get_mut(&(len / PAGE_BYTES)).and_then(Vec::pop)?;
            spares.pages -= spare.len();
            Some(spare)
        });
        match spare {
            Ok(Some(pages)) => BufMut { pages },
            _ => BufMut::zeroed(len),
        }
    }

    /// A buffer that holds a copy of `bytes`, followed by zeros up to the end of the last page.
    pub fn copy_of(bytes: &[u8]) -> Self {
        let mut buf = BufMut::zeroed(bytes.len().next_multiple_of(PAGE_BYTES));
        buf.as_mut()[..bytes.len()].copy_from_slice(bytes);
        buf
    }

    /// Length in bytes.
    #[expect(
        clippy::len_without_is_empty,
        reason = "an empty buffer has no use; asking for the length has"
    )]
    pub fn len(&self) -> usize {
        self.pages.len() * PAGE_BYTES
    }

    /// Ends writing and allows sharing.
    pub fn freeze(self) -> Buf {
        let pages = 0..self.pages.len();
        Buf {
            all: All::Own(Arc::new(self)),
            pages,
        }
    }
}

impl AsRef<[u8]> for BufMut {
    fn as_ref(&self) -> &[u8] {
        bytemuck::cast_slice(&self.pages)
    }
}

impl AsMut<[u8]> for BufMut {
    fn as_mut(&mut self) -> &mut [u8] {
        bytemuck::cast_slice_mut(&mut self.pages)
    }
}

impl fmt::Debug for BufMut {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "BufMut({} bytes)", self.len())
    }
}

/// Memory that its owner lends to [`Buf`]s, such as a place where the kernel put a guest's payload. It begins on a page
/// boundary, is made of whole pages, and does not change while anybody but its owner holds it.
pub trait Lent: AsRef<[u8]> + Send + Sync {}

/// A shared, read-only run of pages. Cloning and cutting it copies nothing.
#[derive(Clone)]
pub struct Buf {
    all: All,
    pages: Range<usize>,
}

/// Where the pages are.
#[derive(Clone)]
enum All {
    Own(Arc<BufMut>),
    Lent(Arc<dyn Lent>),
}

impl Buf {
    /// The first `len` bytes of lent memory, a multiple of [`PAGE_BYTES`]; `memory` is held until the last clone and
    /// slice is gone.
    pub fn lent(memory: Arc<dyn Lent>, len: usize) -> Buf {
        let bytes = (*memory).as_ref();
        assert!(
            len.is_multiple_of(PAGE_BYTES) && len <= bytes.len() && bytes.as_ptr().addr().is_multiple_of(PAGE_BYTES),
            "{len} bytes of {} that were lent are no whole pages",
            bytes.len()
        );
        Buf {
            all: All::Lent(memory),
            pages: 0..len / PAGE_BYTES,
        }
    }

    /// Length in bytes.
    #[expect(
        clippy::len_without_is_empty,
        reason = "an empty buffer has no use; asking for the length has"
    )]
    pub fn len(&self) -> usize {
        self.pages.len() * PAGE_BYTES
    }

    /// The part `range` of this buffer, in bytes; both ends are multiples of [`PAGE_BYTES`].
    pub fn slice(&self, range: Range<usize>) -> Buf {
        assert!(range.start.is_multiple_of(PAGE_BYTES) && range.end.is_multiple_of(PAGE_BYTES));
        assert!(
            range.start <= range.end && range.end <= self.len(),
            "{range:?} of {} bytes",
            self.len()
        );
        let first = self.pages.start;
        Buf {
            all: self.all.clone(),
            pages: first + range.start / PAGE_BYTES..first + range.end / PAGE_BYTES,
        }
    }

    /// Gives the buffer back for reuse, if nobody else holds a part of it. Lent memory just goes back to its owner.
    pub fn try_reclaim(self) -> Option<BufMut> {
        match self.all {
            All::Own(own) => Arc::into_inner(own),
            All::Lent(_) => None,
        }
    }
}

impl AsRef<[u8]> for Buf {
    fn as_ref(&self) -> &[u8] {
        let all = match &self.all {
            All::Own(own) => (**own).as_ref(),
            All::Lent(memory) => (**memory).as_ref(),
        };
        &all[self.pages.start * PAGE_BYTES..self.pages.end * PAGE_BYTES]
    }
}

impl fmt::Debug for Buf {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Buf({} bytes)", self.len())
    }
}
