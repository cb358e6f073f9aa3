//! The open files of one volume: the ones that are in use, up to a bound of its own and one of the whole process.
//!
//! Random reads touch all segments of a volume, and opening one costs a trip to another thread, so a volume keeps as
//! many as it may. Which one goes is decided by a second chance: files stand in a queue, and one that was used since it
//! was last at the head goes to the back once more.

use std::collections::VecDeque;
use std::fs::File;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use galleonfs_storage_engine::io::FileId;
use nix::sys::resource::{Resource, getrlimit, setrlimit};
use rustc_hash::FxHashMap;

use super::limits::{FILES_PER_VOLUME_MAX, FILES_PER_VOLUME_MIN};

/// Open files that the volumes of this process may have together. Cheap to clone.
#[derive(Clone, Debug)]
pub(super) struct FileBudget {
    open: Arc<AtomicUsize>,
    max: usize,
}

impl FileBudget {
    /// Half of what the process may have, after asking for as much as it may ask for. The other half is for devices,
    /// connections and everything else.
    pub fn of_this_process() -> FileBudget {
        let max = getrlimit(Resource::RLIMIT_NOFILE).map_or(1024, |(soft, hard)| {
            // If it is refused, the soft limit is what there is.
            if setrlimit(Resource::RLIMIT_NOFILE, hard, hard).is_ok() {
                hard
            } else {
                soft
            }
        });
        FileBudget {
            open: Arc::default(),
            max: usize::try_from(max / 2).unwrap_or(usize::MAX),
        }
    }

    fn is_used_up(&self) -> bool {
        self.open.load(Ordering::Relaxed) > self.max
    }
}

#[derive(Debug)]
struct Open {
    handle: Arc<File>,
    used: bool,
}

#[derive(Debug)]
pub(super) struct Files {
    budget: FileBudget,
    open: FxHashMap<FileId, Open>,
    /// The head goes first. May name files that were removed since.
    queue: VecDeque<FileId>,
}

impl Files {
    pub fn new(budget: FileBudget) -> Files {
        Files {
            budget,
            open: FxHashMap::default(),
            queue: VecDeque::new(),
        }
    }

    pub fn get(&mut self, file: FileId) -> Option<Arc<File>> {
        let open = self.open.get_mut(&file)?;
        open.used = true;
        Some(open.handle.clone())
    }

    /// Keeps an open file, and gives back one that has to go: an older handle of the same file, or one that was not used
    /// lately. Operations on it that are out hold it by themselves.
    pub fn insert(&mut self, file: FileId, handle: Arc<File>) -> Option<Arc<File>> {
        if let Some(old) = self.open.insert(file, Open { handle, used: true }) {
            return Some(old.handle);
        }
        self.budget.open.fetch_add(1, Ordering::Relaxed);
        let goes = match self.open.len() {
            ..=FILES_PER_VOLUME_MIN => None,
            len if len <= FILES_PER_VOLUME_MAX && !self.budget.is_used_up() => None,
            _ => self.evict(),
        };
        self.queue.push_back(file);
        goes
    }

    pub fn remove(&mut self, file: FileId) -> Option<Arc<File>> {
        let open = self.open.remove(&file)?;
        self.budget.open.fetch_sub(1, Ordering::Relaxed);
        self.queue.retain(|queued| *queued != file);
        Some(open.handle)
    }

    /// Gives all of them back.
    pub fn drain(&mut self) -> impl Iterator<Item = Arc<File>> {
        self.budget.open.fetch_sub(self.open.len(), Ordering::Relaxed);
        self.queue.clear();
        self.open.drain().map(|(_, open)| open.handle)
    }

    /// Everything but the newest file stands in the queue.
    fn evict(&mut self) -> Option<Arc<File>> {
        while let Some(file) = self.queue.pop_front() {
            if std::mem::take(&mut self.open.get_mut(&file)?.used) {
                self.queue.push_back(file);
            } else {
                return self.remove(file);
            }
        }
        None
    }
}

impl Drop for Files {
    fn drop(&mut self) {
        self.budget.open.fetch_sub(self.open.len(), Ordering::Relaxed);
    }
}

#[cfg(test)]
mod tests {
    use galleonfs_storage_engine::io::SegmentId;

    use super::*;

    fn segment(number: usize) -> FileId {
        FileId::Segment(SegmentId(number as u32))
    }

    #[test]
    fn a_file_that_was_not_used_lately_goes_first() {
        let handle = Arc::new(File::open("/dev/null").expect("open"));
        let budget = FileBudget {
            open: Arc::default(),
            max: 1 << 20,
        };
        let mut files = Files::new(budget.clone());
        for number in 0..=FILES_PER_VOLUME_MAX {
            assert_eq!(
                files.insert(segment(number), handle.clone()).is_some(),
                number == FILES_PER_VOLUME_MAX
            );
        }
        assert!(files.get(segment(0)).is_none(), "all were used, so the oldest went");
        assert!(files.get(segment(1)).is_some());
        assert!(files.insert(segment(9999), handle.clone()).is_some());
        assert!(files.get(segment(1)).is_some());
        assert!(files.get(segment(2)).is_none());
        assert_eq!(budget.open.load(Ordering::Relaxed), FILES_PER_VOLUME_MAX);
        drop(files);
        assert_eq!(budget.open.load(Ordering::Relaxed), 0);
    }

    #[test]
    fn a_volume_keeps_a_few_files_when_the_process_has_too_many() {
        let handle = Arc::new(File::open("/dev/null").expect("open"));
        let budget = FileBudget {
            open: Arc::new(AtomicUsize::new(100)),
            max: 100,
        };
        let mut files = Files::new(budget.clone());
        for number in 0..100 {
            files.insert(segment(number), handle.clone());
        }
        assert_eq!(files.open.len(), FILES_PER_VOLUME_MIN);
        assert!(files.remove(segment(99)).is_some());
        assert_eq!(files.queue.len(), files.open.len());
    }
}
