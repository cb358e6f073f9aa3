//! A disk in memory that knows what a power cut would leave.
//!
//! Each file has what is durable, and the writes since its last sync. A crash keeps any subset of those, each possibly
//! torn at a sector of 512 bytes. Making and removing files is durable at once, as the driver promises it.

use std::collections::BTreeMap;
use std::sync::Arc;

use galleonfs_storage_engine::buffer::Buf;
use galleonfs_storage_engine::io::{Disk, FileId, IoFailure};

const PAGE: u64 = 4096;
const SECTOR: usize = 512;

/// A small deterministic generator (SplitMix64, Steele et al. 2014).
#[derive(Clone, Debug)]
pub struct Random(pub u64);

impl Random {
    pub fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    pub fn below(&mut self, end: u64) -> u64 {
        self.next() % end
    }

    pub fn chance(&mut self, percent: u64) -> bool {
        self.below(100) < percent
    }
}

#[derive(Clone, Default)]
struct Pages(BTreeMap<u64, Arc<[u8]>>);

impl Pages {
    fn write(&mut self, offset: u64, bytes: &[u8]) {
        let mut at = 0;
        while at < bytes.len() {
            let (page, inside) = ((offset + at as u64) / PAGE, ((offset + at as u64) % PAGE) as usize);
            let len = (PAGE as usize - inside).min(bytes.len() - at);
            let part = &bytes[at..at + len];
            if len == PAGE as usize {
                self.0.insert(page, part.into());
            } else {
                let mut whole = self
                    .0
                    .get(&page)
                    .map_or_else(|| vec![0; PAGE as usize], |old| old.to_vec());
                whole[inside..inside + len].copy_from_slice(part);
                self.0.insert(page, whole.into());
            }
            at += len;
        }
    }

    fn read(&self, offset: u64, buf: &mut [u8]) {
        for (n, chunk) in buf.chunks_mut(PAGE as usize).enumerate() {
            match self.0.get(&(offset / PAGE + n as u64)) {
                Some(page) => chunk.copy_from_slice(&page[..chunk.len()]),
                None => chunk.fill(0),
            }
        }
    }
}

#[derive(Clone, Default)]
struct SimFile {
    len: u64,
    durable: Pages,
    /// What a read sees.
    current: Pages,
    unsynced: Vec<(u64, Arc<[u8]>)>,
    /// It has a name in another directory too, and came from there if `linked`.
    shared: bool,
    linked: bool,
}

/// What a power cut does to the writes that no sync covered.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Cut {
    /// All are lost.
    None,
    /// All are kept.
    All,
    /// Each is kept, lost or torn by chance.
    Random(u64),
}

#[derive(Clone, Default)]
pub struct SimDisk {
    files: BTreeMap<FileId, SimFile>,
    /// What was in shared files when their names here were removed.
    unlinked: BTreeMap<FileId, SimFile>,
    /// Bytes that all files together may have; `None`: any.
    pub capacity: Option<u64>,
    /// Fails the next write or sync.
    pub fail_next: bool,
}

impl SimDisk {
    fn file(&mut self, file: FileId) -> Result<&mut SimFile, IoFailure> {
        self.files.get_mut(&file).ok_or(IoFailure::NotFound)
    }

    /// A write that is on its way: it may or may not be on the disk after a crash, and no read sees it yet.
    pub fn write_in_flight(&mut self, file: FileId, offset: u64, parts: &[Buf]) {
        if let Ok(file) = self.file(file) {
            file.unsynced.push((offset, join(parts)));
        }
    }

    /// Gives a file of another directory a name here. It is a copy, made like the original again by [`SimDisk::look_again`];
    /// writing into it is a mistake that is noticed.
    pub fn link_from(&mut self, source: &mut SimDisk, from: FileId, to: FileId) {
        let file = source
            .files
            .get_mut(&from)
            .expect("only a file that is there is linked");
        file.shared = true;
        let linked = SimFile {
            linked: true,
            durable: file.current.clone(),
            unsynced: Vec::new(),
            ..file.clone()
        };
        assert!(self.files.insert(to, linked).is_none());
    }

    /// Lets a linked file hold what the other directory's holds now, or held when it lost its name there.
    pub fn look_again(&mut self, source: &SimDisk, from: FileId, to: FileId) {
        if let Some(file) = self.files.get_mut(&to) {
            let other = source.unlinked.get(&from).or_else(|| source.files.get(&from));
            let other = other.expect("a shared file is there, or was");
            (file.current, file.durable) = (other.current.clone(), other.current.clone());
        }
    }

    /// The disk after a power cut.
    pub fn cut(&self, cut: Cut) -> SimDisk {
        let mut disk = self.clone();
        let mut random = Random(match cut {
            Cut::Random(seed) => seed,
            Cut::None | Cut::All => 0,
        });
        for file in disk.files.values_mut() {
            let mut after = file.durable.clone();
            for (offset, bytes) in std::mem::take(&mut file.unsynced) {
                match cut {
                    Cut::None => {}
                    Cut::All => after.write(offset, &bytes),
                    Cut::Random(_) => match random.below(3) {
                        0 => {}
                        1 => after.write(offset, &bytes),
                        _ => {
                            let sectors = random.below((bytes.len() / SECTOR) as u64) as usize;
                            after.write(offset, &bytes[..sectors * SECTOR]);
                        }
                    },
                }
            }
            file.durable = after.clone();
            file.current = after;
        }
        disk
    }

    /// The disk after the death of the process: everything completed is kept, even what no sync covered.
    pub fn kill(&self) -> SimDisk {
        let mut disk = self.clone();
        for file in disk.files.values_mut() {
            file.unsynced.clear();
            file.durable = file.current.clone();
        }
        disk
    }

    /// Flips one bit of a file.
    pub fn flip(&mut self, file: FileId, byte: u64, bit: u32) {
        let file = self.files.get_mut(&file).expect("the file is there");
        let mut page = [0; PAGE as usize];
        file.current.read(byte / PAGE * PAGE, &mut page);
        page[(byte % PAGE) as usize] ^= 1 << bit;
        file.current.write(byte / PAGE * PAGE, &page);
        file.durable = file.current.clone();
    }

    /// Pages of a file that were ever written.
    pub fn written_pages(&self, file: FileId) -> Vec<u64> {
        self.files[&file].current.0.keys().copied().collect()
    }

    pub fn file_ids(&self) -> Vec<FileId> {
        self.files.keys().copied().collect()
    }

    pub fn delete(&mut self, file: FileId) {
        self.files.remove(&file);
    }

    pub fn allocated(&self) -> u64 {
        self.files.values().map(|file| file.len).sum()
    }
}

fn join(parts: &[Buf]) -> Arc<[u8]> {
    parts.iter().map(Buf::as_ref).collect::<Vec<&[u8]>>().concat().into()
}

impl Disk for SimDisk {
    fn read(&mut self, file: FileId, offset: u64, buf: &mut [u8]) -> Result<(), IoFailure> {
        let file = self.file(file)?;
        if offset + buf.len() as u64 > file.len {
            return Err(IoFailure::Failed("read past the end".into()));
        }
        file.current.read(offset, buf);
        Ok(())
    }

    fn write(&mut self, file: FileId, offset: u64, parts: &[Buf]) -> Result<(), IoFailure> {
        if std::mem::take(&mut self.fail_next) {
            return Err(IoFailure::Failed("Input/output error".into()));
        }
        let file = self.file(file)?;
        assert!(!file.linked, "nobody writes into a file of another directory");
        let bytes = join(parts);
        assert!(
            offset.is_multiple_of(PAGE) && offset + bytes.len() as u64 <= file.len,
            "writes stay inside the file"
        );
        file.current.write(offset, &bytes);
        file.unsynced.push((offset, bytes));
        Ok(())
    }

    fn sync(&mut self, file: FileId) -> Result<(), IoFailure> {
        if std::mem::take(&mut self.fail_next) {
            return Err(IoFailure::Failed("Input/output error".into()));
        }
        let file = self.file(file)?;
        file.unsynced.clear();
        file.durable = file.current.clone();
        Ok(())
    }

    fn create(&mut self, file: FileId, len: u64) -> Result<(), IoFailure> {
        let have = self.files.get(&file).map_or(0, |file| file.len);
        if self
            .capacity
            .is_some_and(|capacity| self.allocated() - have + len > capacity)
        {
            return Err(IoFailure::NoSpace);
        }
        self.files.entry(file).or_default().len = len;
        Ok(())
    }

    fn remove(&mut self, file: FileId) -> Result<(), IoFailure> {
        let gone = self.files.remove(&file).ok_or(IoFailure::NotFound)?;
        if gone.shared {
            self.unlinked.insert(file, gone);
        }
        Ok(())
    }

    fn names(&mut self, file: FileId) -> Result<u64, IoFailure> {
        self.file(file).map(|file| 1 + u64::from(file.shared))
    }

    fn list(&mut self) -> Result<Vec<(FileId, u64)>, IoFailure> {
        Ok(self.files.iter().map(|(id, file)| (*id, file.len)).collect())
    }
}
