//! What a shard waits in: an io_uring, or `poll(2)` where that is forbidden.

use std::io;
use std::os::fd::RawFd;
use std::time::Duration;

use galleonfs_storage_engine::io::{IoId, IoResult};

use super::ring::Ring;
use super::stats::DiskPath;
use crate::frontend::Command;

/// A descriptor that can be watched.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Source {
    /// The shard's own inbox.
    Inbox,
    /// The connections to other nodes.
    Wire,
    /// The requests of this volume.
    Volume(u32),
}

/// Something that a shard reacts to.
#[derive(Debug)]
pub(super) enum Event {
    /// A watch has ended: there is something to read, or the descriptor has come to its end.
    Readable(Source),
    /// A command of a volume's session has ended.
    Command { volume: u32, slot: u32, result: i32 },
    /// A disk operation has ended.
    Disk { volume: u32, id: IoId, result: IoResult },
}

#[derive(Debug)]
pub(super) enum Reactor {
    Ring(Box<Ring>),
    Poll(Vec<(Source, RawFd)>),
}

impl Reactor {
    /// Takes the ring if the kernel gives one and `path` does not say otherwise.
    pub fn new(path: Option<DiskPath>) -> Reactor {
        match path {
            Some(DiskPath::Threads) => Reactor::Poll(Vec::new()),
            Some(DiskPath::Ring) | None => match Ring::new() {
                Ok(ring) => Reactor::Ring(Box::new(ring)),
                Err(error) => {
                    tracing::warn!(%error, "no io_uring here; disks are served by threads, which is slower");
                    Reactor::Poll(Vec::new())
                }
            },
        }
    }

    pub fn path(&self) -> DiskPath {
        match self {
            Reactor::Ring(_) => DiskPath::Ring,
            Reactor::Poll(_) => DiskPath::Threads,
        }
    }

    /// Reports once when `fd` is readable. The descriptor stays open until then.
    pub fn watch(&mut self, source: Source, fd: RawFd) {
        match self {
            Reactor::Ring(ring) => ring.watch(source, fd),
            Reactor::Poll(watched) => watched.push((source, fd)),
        }
    }

    /// Ends a watch. True if it is over at once; otherwise it still reports.
    pub fn unwatch(&mut self, source: Source) -> bool {
        match self {
            Reactor::Ring(ring) => {
                ring.unwatch(source);
                false
            }
            Reactor::Poll(watched) => {
                watched.retain(|(other, _)| *other != source);
                true
            }
        }
    }

    /// Starts a command of a volume's session.
    pub fn command(&mut self, volume: u32, command: &Command) {
        match self {
            Reactor::Ring(ring) => ring.command(volume, command),
            Reactor::Poll(_) => unreachable!("a session is told that there is a ring before it gives commands"),
        }
    }

    /// Waits until there is something to report, or until `timeout`.
    pub fn wait(&mut self, timeout: Option<Duration>, events: &mut Vec<Event>) {
        match self {
            Reactor::Ring(ring) => ring.wait(timeout, events),
            Reactor::Poll(watched) => poll(watched, timeout, events),
        }
    }
}

fn poll(watched: &mut Vec<(Source, RawFd)>, timeout: Option<Duration>, events: &mut Vec<Event>) {
    let mut fds: Vec<libc::pollfd> = watched
        .iter()
        .map(|&(_, fd)| libc::pollfd {
            fd,
            events: libc::POLLIN,
            revents: 0,
        })
        .collect();
    // Rounded up, so that we do not wake just before the time and find nothing to do.
    let timeout = timeout.map_or(-1, |timeout| {
        timeout.as_micros().div_ceil(1000).min(i32::MAX as u128) as i32
    });
    // SAFETY: `fds` is a live array of that many entries.
    if unsafe { libc::poll(fds.as_mut_ptr(), fds.len() as libc::nfds_t, timeout) } < 0 {
        let error = io::Error::last_os_error();
        assert_eq!(
            error.kind(),
            io::ErrorKind::Interrupted,
            "poll(2) of a shard's own descriptors: {error}"
        );
        return;
    }
    let mut index = 0;
    watched.retain(|&(source, _)| {
        let ready = fds[index].revents != 0;
        index += 1;
        if ready {
            events.push(Event::Readable(source));
        }
        !ready
    });
}
