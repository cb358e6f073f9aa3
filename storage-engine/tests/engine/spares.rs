//! Memory that one thread gets and another one lets go of.

use galleonfs_storage_engine::buffer::{BufMut, PAGE_BYTES};

/// More than a thread keeps for itself.
const BUFFERS: usize = 16;
const LEN: usize = 256 * PAGE_BYTES;

#[expect(clippy::disallowed_methods, reason = "it is about two threads")]
#[test]
fn a_thread_that_has_too_much_leaves_memory_to_the_others() {
    let take = || (0..BUFFERS).map(|_| BufMut::for_reading(LEN)).collect::<Vec<BufMut>>();
    let place = |buf: &BufMut| buf.as_ref().as_ptr().addr();
    let buffers = take();
    let before: Vec<usize> = buffers.iter().map(place).collect();
    let dropped = std::thread::spawn(move || {
        drop(buffers);
        // The thread that let go of them is still there, and so are those that it kept.
        before
    });
    let before = dropped.join().expect("it only drops");
    let again = take();
    assert!(again.iter().any(|buf| before.contains(&place(buf))));
}
