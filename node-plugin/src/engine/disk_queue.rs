//! One replica's way to its disk: files that are open, operations that are out, and those that wait for their turn.
//!
//! ```text
//! Io ─► file open? ─► ring or helper ─► ended
//!          └ no: the helper opens it first
//! ```

use std::collections::VecDeque;
use std::fs::File;
use std::sync::Arc;

use galleonfs_storage_engine::io::{FileId, Io, IoDone, IoId, IoResult};
use rustc_hash::FxHashMap;

use super::files::{FileBudget, Files};
use super::helper::{Helper, Job, Outcome, Threads};
use super::limits::DISK_OPS_PER_VOLUME_MAX;
use super::reactor::Reactor;
use super::ring::{DiskOp, Work};

/// Operations that ended together.
pub(super) type Ended = Vec<(IoId, IoResult)>;

pub(super) struct DiskQueue {
    key: u32,
    helper: Helper,
    files: Files,
    /// Operations that wait for a file to be opened.
    opening: FxHashMap<FileId, Vec<(IoId, Io)>>,
    /// Operations that wait until fewer are out.
    backlog: VecDeque<(IoId, Io)>,
    out: usize,
}

impl DiskQueue {
    /// Operations come back from the ring under `key`.
    pub fn new(key: u32, helper: Helper, budget: FileBudget) -> DiskQueue {
        DiskQueue {
            key,
            helper,
            files: Files::new(budget),
            opening: FxHashMap::default(),
            backlog: VecDeque::new(),
            out: 0,
        }
    }

    /// Has an operation carried out, behind those that wait.
    pub fn start(&mut self, id: IoId, io: Io, reactor: &mut Reactor) {
        if self.out < DISK_OPS_PER_VOLUME_MAX && self.backlog.is_empty() {
            self.begin(id, io, reactor);
        } else {
            self.backlog.push_back((id, io));
        }
    }

    /// Starts what waits, as far as there is room.
    pub fn refill(&mut self, reactor: &mut Reactor) {
        while self.out < DISK_OPS_PER_VOLUME_MAX
            && let Some((id, io)) = self.backlog.pop_front()
        {
            self.begin(id, io, reactor);
        }
    }

    /// An operation of the ring's has ended.
    pub fn ended(&mut self) {
        self.out -= 1;
    }

    /// The helper has done something: which operations have ended by that.
    pub fn helped(&mut self, outcome: Outcome, reactor: &mut Reactor) -> Ended {
        let ended: Ended = match outcome {
            Outcome::Ended(id, result, _parts) => vec![(id, result)],
            Outcome::Created(id, file, Ok((handle, pool_free_bytes))) => {
                self.keep_open(file, handle);
                vec![(id, Ok(IoDone::Created { pool_free_bytes }))]
            }
            Outcome::Created(id, _, Err(error)) => vec![(id, Err(error))],
            Outcome::Opened(file, Ok(handle)) => {
                self.keep_open(file, handle.clone());
                for (id, io) in self.opening.remove(&file).unwrap_or_default() {
                    self.begin_open(id, io, file, handle.clone(), reactor);
                }
                Ended::new()
            }
            Outcome::Opened(file, Err(error)) => {
                let waiting = self.opening.remove(&file).unwrap_or_default();
                waiting.into_iter().map(|(id, _)| (id, Err(error.clone()))).collect()
            }
        };
        self.out -= ended.len();
        ended
    }

    /// Lets go of what was not begun: whoever asked for it is gone.
    pub fn give_up_waiting(&mut self) {
        self.backlog.clear();
    }

    /// Operations that are out.
    pub fn out(&self) -> usize {
        self.out
    }

    /// True if nothing is out and nothing waits.
    pub fn is_idle(&self) -> bool {
        self.out == 0 && self.backlog.is_empty()
    }

    /// Has the helper close every file.
    pub fn close_files(&mut self) {
        assert_eq!(self.out, 0, "files are closed when nothing is out");
        for handle in self.files.drain() {
            self.helper.give(Job::Close { handle });
        }
    }

    /// Lets go of everything; whoever waits for the threads finds the replica unlocked.
    pub fn end(mut self) -> Threads {
        self.close_files();
        self.helper.end()
    }

    /// Hands an operation on to where it is carried out.
    fn begin(&mut self, id: IoId, io: Io, reactor: &mut Reactor) {
        self.out += 1;
        let file = match io {
            Io::Create { file, len } => return self.helper.give(Job::Create { id, file, len }),
            Io::Remove { file } => {
                let open = self.files.remove(file);
                return self.helper.give(Job::Remove { id, file, open });
            }
            Io::Read { file, .. } | Io::Write { file, .. } | Io::Sync { file } => file,
        };
        if let Some(waiting) = self.opening.get_mut(&file) {
            waiting.push((id, io));
        } else if let Some(handle) = self.files.get(file) {
            self.begin_open(id, io, file, handle, reactor);
        } else {
            self.opening.insert(file, vec![(id, io)]);
            self.helper.give(Job::Open(file));
        }
    }

    fn begin_open(&mut self, id: IoId, io: Io, file: FileId, handle: Arc<File>, reactor: &mut Reactor) {
        match reactor {
            Reactor::Ring(ring) => {
                let work = match io {
                    Io::Read { offset, buf, .. } => Work::Read { offset, buf },
                    Io::Write { offset, parts, .. } => Work::Write { offset, parts },
                    Io::Sync { .. } => Work::Sync,
                    Io::Create { .. } | Io::Remove { .. } => unreachable!("these do not wait for an open file"),
                };
                ring.start(DiskOp {
                    volume: self.key,
                    id,
                    file,
                    handle,
                    work,
                });
            }
            Reactor::Poll(_) => self.helper.give(match io {
                Io::Read { offset, buf, .. } => Job::Read {
                    id,
                    file,
                    handle,
                    offset,
                    buf,
                },
                Io::Write { offset, parts, .. } => Job::Write {
                    id,
                    file,
                    handle,
                    offset,
                    parts,
                },
                Io::Sync { .. } => Job::Sync { id, file, handle },
                Io::Create { .. } | Io::Remove { .. } => unreachable!("these do not wait for an open file"),
            }),
        }
    }

    fn keep_open(&mut self, file: FileId, handle: Arc<File>) {
        if let Some(handle) = self.files.insert(file, handle) {
            self.helper.give(Job::Close { handle });
        }
    }
}
