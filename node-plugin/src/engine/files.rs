//! The open files of one volume: the most recently used ones, up to a bound.

use std::collections::HashMap;
use std::fs::File;
use std::sync::Arc;

use galleonfs_storage_engine::io::FileId;

use super::limits::FILES_PER_VOLUME_MAX;

#[derive(Debug, Default)]
pub(super) struct Files {
    open: HashMap<FileId, (Arc<File>, u64)>,
    /// Counts uses; a file carries the count of its last one.
    clock: u64,
}

impl Files {
    pub fn get(&mut self, file: FileId) -> Option<Arc<File>> {
        self.clock += 1;
        let (handle, used) = self.open.get_mut(&file)?;
        *used = self.clock;
        Some(handle.clone())
    }

    /// Keeps an open file, and gives back one that has to go: an older handle of the same file, or the one that was
    /// not used for the longest time. Operations on it that are out hold it by themselves.
    pub fn insert(&mut self, file: FileId, handle: Arc<File>) -> Option<Arc<File>> {
        self.clock += 1;
        if let Some((old, _)) = self.open.insert(file, (handle, self.clock)) {
            return Some(old);
        }
        if self.open.len() <= FILES_PER_VOLUME_MAX {
            return None;
        }
        let oldest = *self
            .open
            .iter()
            .min_by_key(|(_, (_, used))| *used)
            .map(|(file, _)| file)?;
        self.remove(oldest)
    }

    pub fn remove(&mut self, file: FileId) -> Option<Arc<File>> {
        self.open.remove(&file).map(|(handle, _)| handle)
    }
}

#[cfg(test)]
mod tests {
    use galleonfs_storage_engine::io::SegmentId;

    use super::*;

    #[test]
    fn the_file_that_was_not_used_for_the_longest_time_goes() {
        let handle = Arc::new(File::open("/dev/null").expect("open"));
        let segment = |number| FileId::Segment(SegmentId(number));
        let mut files = Files::default();
        for number in 0..FILES_PER_VOLUME_MAX as u32 {
            assert!(files.insert(segment(number), handle.clone()).is_none());
        }
        assert!(files.get(segment(0)).is_some());
        assert!(files.insert(segment(9999), handle.clone()).is_some());
        assert!(files.get(segment(0)).is_some());
        assert!(files.get(segment(1)).is_none());
    }
}
