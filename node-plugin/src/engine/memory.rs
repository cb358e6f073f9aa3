//! Memory of threads that serve block devices.
//!
//! A busy volume frees and allocates page-aligned buffers many thousand times a second. By default the C library gives
//! the top of its heap back to the kernel again and again, and maps each large buffer anew: then every buffer is paid
//! for with page faults and zeroed twice. So it is told to keep what it has, and told to give it back when a shard has
//! been idle for a while.

/// Keep freed memory up to so much at the top of a heap.
#[cfg(target_env = "gnu")]
const KEPT_BYTES_MAX: libc::c_int = 64 << 20;

/// Take buffers up to this size from the heap: everything that a request needs.
#[cfg(target_env = "gnu")]
const HEAP_BYTES_MAX: libc::c_int = 4 << 20;

/// To be called once, before there is much to free.
pub(super) fn keep_freed_memory() {
    #[cfg(target_env = "gnu")]
    // SAFETY: mallopt takes no pointers, and glibc allows it at any time.
    unsafe {
        libc::mallopt(libc::M_TRIM_THRESHOLD, KEPT_BYTES_MAX);
        libc::mallopt(libc::M_MMAP_THRESHOLD, HEAP_BYTES_MAX);
    }
}

/// Gives what is free back to the kernel. Takes a while; for moments when nobody waits.
pub(crate) fn give_back_freed_memory() {
    #[cfg(target_env = "gnu")]
    // SAFETY: malloc_trim takes no pointers and is safe in any thread.
    unsafe {
        libc::malloc_trim(0);
    }
}

/// Tells the kernel that the calling thread serves a block device: when it needs memory, it must not wait for dirty
/// pages to be written, because those may be waiting for this very thread.
///
/// Wants CAP_SYS_RESOURCE. Without it everything works until memory is very short, so it is no reason to refuse service.
pub(super) fn never_wait_for_writeback() {
    const PR_SET_IO_FLUSHER: libc::c_int = 57;
    // SAFETY: this request takes numbers only.
    if unsafe { libc::prctl(PR_SET_IO_FLUSHER, 1, 0, 0, 0) } != 0 {
        tracing::debug!(error = %std::io::Error::last_os_error(), "cannot mark a thread as one that serves a device");
    }
}
