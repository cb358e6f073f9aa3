//! Who does a transport's work: a thread of its own, or a loop that somebody has already.

use std::io;
use std::os::fd::{AsRawFd, RawFd};
use std::sync::{Arc, OnceLock, mpsc};
use std::thread::{JoinHandle, ThreadId};
use std::time::Instant;

use nix::sys::epoll::EpollTimeout;

use super::Sink;
use super::wire::Wire;

/// What a transport has to do, for a loop that waits for other things, too. All connections end when it is dropped.
pub struct Work {
    wire: Wire,
    ended: bool,
    worker: Arc<OnceLock<ThreadId>>,
    /// Closed when this is dropped, for whoever waits for that.
    _done: mpsc::Sender<()>,
}

impl std::fmt::Debug for Work {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Work")
    }
}

impl Work {
    /// Readable when there is something to do.
    pub fn descriptor(&self) -> RawFd {
        self.wire.poller.0.as_raw_fd()
    }

    /// When there is something to do though nothing has come.
    pub fn due(&self) -> Instant {
        self.wire.next_pass
    }

    /// Does what there is to do, without waiting. False if the transport was stopped: nothing will come any more.
    pub fn turn(&mut self) -> bool {
        self.worker.get_or_init(|| std::thread::current().id());
        self.ended = self.ended || !self.wire.round(EpollTimeout::ZERO);
        !self.ended
    }
}

impl Drop for Work {
    fn drop(&mut self) {
        if !self.ended {
            self.wire.end();
        }
    }
}

/// Who does the work.
pub(super) enum Runner {
    Thread(JoinHandle<()>),
    Adopted {
        worker: Arc<OnceLock<ThreadId>>,
        done: mpsc::Receiver<()>,
    },
}

impl Runner {
    /// Gives the work to the sink, or else to a thread.
    pub fn start(wire: Wire, sink: &dyn Sink) -> io::Result<Runner> {
        let worker = Arc::new(OnceLock::new());
        let (sender, done) = mpsc::channel();
        let work = Work {
            wire,
            ended: false,
            worker: worker.clone(),
            _done: sender,
        };
        let Some(mut work) = sink.adopt(work) else {
            return Ok(Runner::Adopted { worker, done });
        };
        let run = move || {
            work.wire.run();
            work.ended = true;
        };
        let thread = std::thread::Builder::new().name("wire".to_owned()).spawn(run)?;
        Ok(Runner::Thread(thread))
    }

    /// Waits for the end of the work, which was told to end. On the thread that does it, at the end of a sink that held the
    /// last clone of the transport, there is nothing to wait for.
    pub fn join(self) {
        let here = std::thread::current().id();
        match self {
            Runner::Thread(thread) if thread.thread().id() != here => {
                let ended = thread.join();
                // A second panic would hide the first.
                assert!(
                    ended.is_ok() || std::thread::panicking(),
                    "the transport's thread ends when it is told, and does not panic"
                );
            }
            Runner::Adopted { worker, done } if worker.get() != Some(&here) => {
                // Nothing is ever sent: it fails when the work was dropped.
                let _ = done.recv();
            }
            Runner::Thread(_) | Runner::Adopted { .. } => {}
        }
    }
}
