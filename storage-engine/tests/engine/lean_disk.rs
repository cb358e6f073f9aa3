//! A disk in memory that keeps the buffers it is given: large volumes, little memory as long as their payload is shared.
//! A page of one byte all over, as the guest of these tests writes it, is kept once.

use std::collections::BTreeMap;

use galleonfs_storage_engine::buffer::Buf;
use galleonfs_storage_engine::io::{Disk, FileId, IoFailure};

const PAGE: usize = 4096;

#[derive(Default)]
pub struct LeanDisk {
    plain: Option<Buf>,
    files: BTreeMap<FileId, Vec<Option<Buf>>>,
    /// Bytes that all segments together may have; `None`: any.
    pub capacity: Option<u64>,
    /// Segments that were not made for want of room.
    pub refused: u64,
}

impl LeanDisk {
    /// Bytes of all segments.
    pub fn allocated(&self) -> u64 {
        let segments = self.files.iter().filter(|(file, _)| matches!(file, FileId::Segment(_)));
        segments.map(|(_, pages)| (pages.len() * PAGE) as u64).sum()
    }

    fn file(&mut self, file: FileId) -> Result<&mut Vec<Option<Buf>>, IoFailure> {
        self.files.get_mut(&file).ok_or(IoFailure::NotFound)
    }
}

impl Disk for LeanDisk {
    fn read(&mut self, file: FileId, offset: u64, buf: &mut [u8]) -> Result<(), IoFailure> {
        let from = offset as usize / PAGE;
        let pages = &self.file(file)?[from..from + buf.len() / PAGE];
        for (into, page) in buf.chunks_mut(PAGE).zip(pages) {
            match page {
                Some(page) => into.copy_from_slice(page.as_ref()),
                None => into.fill(0),
            }
        }
        Ok(())
    }

    fn write(&mut self, file: FileId, offset: u64, parts: &[Buf]) -> Result<(), IoFailure> {
        let mut at = offset as usize / PAGE;
        let mut plain = self.plain.take();
        let file = self.file(file)?;
        for part in parts {
            for from in (0..part.len()).step_by(PAGE) {
                let page = part.slice(from..from + PAGE);
                let same = plain.as_ref().is_some_and(|plain| plain.as_ref() == page.as_ref());
                if !same && page.as_ref().iter().all(|byte| *byte == page.as_ref()[0]) {
                    plain = Some(page.clone());
                }
                file[at] = Some(if same {
                    plain.clone().expect("it is there")
                } else {
                    page
                });
                at += 1;
            }
        }
        self.plain = plain;
        Ok(())
    }

    fn sync(&mut self, _: FileId) -> Result<(), IoFailure> {
        Ok(())
    }

    fn create(&mut self, file: FileId, len: u64) -> Result<(), IoFailure> {
        let new = matches!(file, FileId::Segment(_)) && !self.files.contains_key(&file);
        if new && self.capacity.is_some_and(|capacity| self.allocated() + len > capacity) {
            self.refused += 1;
            return Err(IoFailure::NoSpace);
        }
        self.files.entry(file).or_default().resize(len as usize / PAGE, None);
        Ok(())
    }

    fn remove(&mut self, file: FileId) -> Result<(), IoFailure> {
        self.files.remove(&file);
        Ok(())
    }

    fn list(&mut self) -> Result<Vec<(FileId, u64)>, IoFailure> {
        let files = self.files.iter();
        Ok(files
            .map(|(file, pages)| (*file, (pages.len() * PAGE) as u64))
            .collect())
    }
}
