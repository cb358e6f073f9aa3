//! How other threads reach a shard: a queue, and an eventfd that wakes it.

use std::io;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd, RawFd};
use std::sync::Arc;
use std::sync::mpsc;

/// The sending end. Cheap to clone.
#[derive(Debug)]
pub(super) struct Outbox<T> {
    queue: mpsc::Sender<T>,
    bell: Arc<OwnedFd>,
}

impl<T> Clone for Outbox<T> {
    fn clone(&self) -> Self {
        Outbox {
            queue: self.queue.clone(),
            bell: self.bell.clone(),
        }
    }
}

/// The receiving end.
#[derive(Debug)]
pub(super) struct Inbox<T> {
    queue: mpsc::Receiver<T>,
    bell: Arc<OwnedFd>,
}

/// The shard has ended.
#[derive(Debug)]
pub(super) struct Gone;

pub(super) fn inbox<T>() -> io::Result<(Outbox<T>, Inbox<T>)> {
    // SAFETY: eventfd takes no pointers.
    let fd = unsafe { libc::eventfd(0, libc::EFD_CLOEXEC | libc::EFD_NONBLOCK) };
    if fd < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: the descriptor is new and nobody else's.
    let bell = Arc::new(unsafe { OwnedFd::from_raw_fd(fd) });
    let (sender, receiver) = mpsc::channel();
    Ok((
        Outbox {
            queue: sender,
            bell: bell.clone(),
        },
        Inbox { queue: receiver, bell },
    ))
}

impl<T> Outbox<T> {
    pub fn send(&self, message: T) -> Result<(), Gone> {
        self.queue.send(message).map_err(|_| Gone)?;
        // It fails only when the counter is full, and then the shard is being woken already.
        let _ = nix::unistd::write(&self.bell, &1u64.to_ne_bytes());
        Ok(())
    }
}

impl<T> Inbox<T> {
    pub fn descriptor(&self) -> RawFd {
        self.bell.as_raw_fd()
    }

    /// Silences the bell. To be called before [`Inbox::next`] is drained, so that no message is slept over.
    pub fn woken(&self) {
        let mut counter = [0; 8];
        // Nothing to read means that the bell is silent.
        let _ = nix::unistd::read(&self.bell, &mut counter);
    }

    pub fn next(&self) -> Option<T> {
        self.queue.try_recv().ok()
    }
}
