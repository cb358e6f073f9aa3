//! How other threads reach a shard, and the shard itself: a queue, and an eventfd that wakes it if it sleeps.

use std::io;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd, RawFd};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc;

#[derive(Debug)]
struct Bell {
    fd: OwnedFd,
    /// Whoever sends rings: the shard has looked into its queue, and is about to sleep or does.
    asleep: AtomicBool,
}

/// The sending end. Cheap to clone.
#[derive(Debug)]
pub(super) struct Outbox<T> {
    queue: mpsc::Sender<T>,
    bell: Arc<Bell>,
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
    /// Taken while looking whether there is something.
    first: Option<T>,
    bell: Arc<Bell>,
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
    let fd = unsafe { OwnedFd::from_raw_fd(fd) };
    let asleep = AtomicBool::new(false);
    let bell = Arc::new(Bell { fd, asleep });
    let (sender, receiver) = mpsc::channel();
    Ok((
        Outbox {
            queue: sender,
            bell: bell.clone(),
        },
        Inbox {
            queue: receiver,
            first: None,
            bell,
        },
    ))
}

impl<T> Outbox<T> {
    pub fn send(&self, message: T) -> Result<(), Gone> {
        self.queue.send(message).map_err(|_| Gone)?;
        // Behind the message: a shard that goes to sleep afterwards finds it.
        if self.bell.asleep.swap(false, Ordering::SeqCst) {
            // It fails only when the counter is full, and then the shard is being woken already.
            let _ = nix::unistd::write(&self.bell.fd, &1u64.to_ne_bytes());
        }
        Ok(())
    }
}

impl<T> Inbox<T> {
    pub fn descriptor(&self) -> RawFd {
        self.bell.fd.as_raw_fd()
    }

    /// Silences the bell, which rang.
    pub fn silence(&self) {
        let mut counter = [0; 8];
        // Nothing to read means that the bell is silent.
        let _ = nix::unistd::read(&self.bell.fd, &mut counter);
    }

    /// From now on the bell rings when something comes. False if something is there: then there is no sleep.
    pub fn sleep(&mut self) -> bool {
        self.bell.asleep.store(true, Ordering::SeqCst);
        if self.first.is_none() {
            self.first = self.queue.try_recv().ok();
        }
        let sleeps = self.first.is_none();
        if !sleeps {
            self.awake();
        }
        sleeps
    }

    /// The bell need not ring: the queue will be looked at.
    pub fn awake(&self) {
        self.bell.asleep.store(false, Ordering::SeqCst);
    }

    pub fn next(&mut self) -> Option<T> {
        self.first.take().or_else(|| self.queue.try_recv().ok())
    }
}

#[cfg(test)]
mod tests {
    use std::os::fd::AsFd;

    use nix::poll::{PollFd, PollFlags, PollTimeout, poll};

    use super::*;

    fn rings_within(inbox: &Inbox<u32>, ms: u16) -> bool {
        let fd = PollFd::new(inbox.bell.fd.as_fd(), PollFlags::POLLIN);
        poll(&mut [fd], PollTimeout::from(ms)).expect("a descriptor can be polled") > 0
    }

    fn rings(inbox: &Inbox<u32>) -> bool {
        rings_within(inbox, 0)
    }

    #[test]
    fn the_bell_rings_for_who_sleeps_and_only_once() {
        let (outbox, mut inbox) = inbox().expect("an inbox");
        outbox.send(1).expect("it is there");
        assert!(!rings(&inbox), "nobody sleeps");
        assert!(!inbox.sleep(), "there is a message");
        outbox.send(2).expect("it is there");
        assert!(!rings(&inbox) && inbox.next() == Some(1) && inbox.next() == Some(2));
        assert!(inbox.sleep());
        outbox.send(3).expect("it is there");
        assert!(rings(&inbox));
        inbox.silence();
        outbox.send(4).expect("it is there");
        assert!(!rings(&inbox), "whoever was woken looks at everything");
        assert!(inbox.next() == Some(3) && inbox.next() == Some(4) && inbox.next().is_none());
    }

    #[test]
    fn no_message_is_slept_over() {
        const MESSAGES: u32 = 20_000;
        let (outbox, mut inbox) = inbox().expect("an inbox");
        let sender = std::thread::spawn(move || {
            for number in 0..MESSAGES {
                outbox.send(number).expect("it is there");
                if number % 7 == 0 {
                    std::thread::yield_now();
                }
            }
        });
        let mut expected = 0;
        while expected < MESSAGES {
            if inbox.sleep() {
                assert!(rings_within(&inbox, 10_000), "message {expected} was slept over");
                inbox.awake();
                inbox.silence();
            }
            while let Some(number) = inbox.next() {
                assert_eq!(number, expected);
                expected += 1;
            }
        }
        sender.join().expect("it does not panic");
    }
}
