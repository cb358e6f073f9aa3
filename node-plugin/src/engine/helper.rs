//! The threads of one volume that may block: what has no place on a shard.
//!
//! Opening, creating and removing files goes through here always, and where io_uring is forbidden so does everything
//! else. Each volume has its own, so a disk that hangs holds up nobody else.

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::sync::{Arc, Mutex, mpsc};
use std::thread::JoinHandle;

use galleonfs_storage_engine::buffer::{Buf, BufMut};
use galleonfs_storage_engine::io::{FileId, IoDone, IoFailure, IoId, IoResult};

use super::inbox::Outbox;
use super::memory::never_wait_for_writeback;
use super::shard::Message;
use crate::disk::{ReplicaDir, failure, write_parts};

/// Work that may block.
#[derive(Debug)]
pub(super) enum Job {
    Open(FileId),
    Create {
        id: IoId,
        file: FileId,
        len: u64,
    },
    /// Closes what the shard had open of it, too: freeing the blocks of a large file takes a while.
    Remove {
        id: IoId,
        file: FileId,
        open: Option<Arc<File>>,
    },
    Read {
        id: IoId,
        file: FileId,
        handle: Arc<File>,
        offset: u64,
        buf: BufMut,
    },
    Write {
        id: IoId,
        file: FileId,
        handle: Arc<File>,
        offset: u64,
        parts: Vec<Buf>,
    },
    Sync {
        id: IoId,
        file: FileId,
        handle: Arc<File>,
    },
    /// Just closes it.
    Close {
        handle: Arc<File>,
    },
}

/// What came of it.
#[derive(Debug)]
pub(super) enum Outcome {
    Opened(FileId, Result<Arc<File>, IoFailure>),
    /// With the parts of a write: the shard's thread lets go of their memory, so that it is used again there.
    Ended(IoId, IoResult, Vec<Buf>),
    /// With what is free in the pool.
    Created(IoId, FileId, Result<(Arc<File>, u64), IoFailure>),
}

/// The shard's end of a volume's helper. The threads end once it is dropped and they have nothing left to do.
#[derive(Debug)]
pub(super) struct Helper {
    jobs: mpsc::Sender<Job>,
    threads: Threads,
}

/// To wait for the threads of a helper, which hold the replica's lock.
pub(super) type Threads = Vec<JoinHandle<()>>;

impl Helper {
    pub fn start(
        volume: u32,
        name: &str,
        threads: usize,
        dir: Arc<ReplicaDir>,
        shard: Outbox<Message>,
    ) -> std::io::Result<Helper> {
        let (jobs, queue) = mpsc::channel();
        let queue = Arc::new(Mutex::new(queue));
        let mut started = Threads::new();
        for _ in 0..threads {
            let (queue, dir, shard) = (queue.clone(), dir.clone(), shard.clone());
            let thread = std::thread::Builder::new()
                .name(format!("disk {name}"))
                .stack_size(256 << 10)
                .spawn(move || {
                    never_wait_for_writeback();
                    loop {
                        let next = queue.lock().expect("nobody panics while holding it").recv();
                        let Ok(job) = next else { return };
                        let Some(outcome) = perform(&dir, job) else { continue };
                        if shard.send(Message::Helped { volume, outcome }).is_err() {
                            return;
                        }
                    }
                })?;
            started.push(thread);
        }
        Ok(Helper { jobs, threads: started })
    }

    /// Ends the threads; whoever waits for them finds the replica unlocked.
    pub fn end(self) -> Threads {
        self.threads
    }

    pub fn give(&self, job: Job) {
        self.jobs
            .send(job)
            .expect("a helper's threads live as long as the helper");
    }
}

fn perform(dir: &ReplicaDir, job: Job) -> Option<Outcome> {
    Some(match job {
        Job::Open(file) => Outcome::Opened(file, dir.open_file(file).map(Arc::new)),
        Job::Create { id, file, len } => {
            let made = dir.create_file(file, len);
            Outcome::Created(id, file, made.map(|handle| (Arc::new(handle), dir.pool_free_bytes())))
        }
        Job::Remove { id, file, open } => {
            drop(open);
            Outcome::Ended(id, dir.remove_file(file).map(|()| IoDone::Done), Vec::new())
        }
        Job::Read {
            id,
            file,
            handle,
            offset,
            mut buf,
        } => {
            let result = handle
                .read_exact_at(buf.as_mut(), offset)
                .map_err(|error| failure("read", file, error));
            Outcome::Ended(id, result.map(|()| IoDone::Read(buf)), Vec::new())
        }
        Job::Write {
            id,
            file,
            handle,
            offset,
            parts,
        } => {
            let result = write_parts(&handle, offset, &parts).map_err(|error| failure("write", file, error));
            Outcome::Ended(id, result.map(|()| IoDone::Done), parts)
        }
        Job::Sync { id, file, handle } => {
            let result = handle.sync_data().map_err(|error| failure("sync", file, error));
            Outcome::Ended(id, result.map(|()| IoDone::Done), Vec::new())
        }
        Job::Close { handle } => {
            drop(handle);
            return None;
        }
    })
}
