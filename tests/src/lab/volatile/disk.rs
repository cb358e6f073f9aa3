//! What the disk holds: durably, and only until the power goes.
//!
//! Nothing is written to the image while the disk is in use. A server that writes to a file system can be made to wait
//! until dirty pages are written, and those may be the very pages that it is there to take.

use std::collections::BTreeMap;
use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;

use nix::fcntl::{FallocateFlags, fallocate};

pub const BLOCK: usize = 4096;

/// `None` where the block was discarded.
type Content = Option<Box<[u8; BLOCK]>>;

#[derive(Debug)]
pub struct Disk {
    image: File,
    size_bytes: u64,
    /// Synced since the image was opened.
    durable: BTreeMap<u64, Content>,
    unsynced: BTreeMap<u64, Content>,
}

/// What a power cut did to the unsynced blocks.
#[derive(Debug, PartialEq, Eq)]
pub struct Loss {
    pub lost: usize,
    pub kept: usize,
}

impl Disk {
    pub fn open(image: File) -> io::Result<Self> {
        Ok(Self {
            size_bytes: image.metadata()?.len(),
            image,
            durable: BTreeMap::new(),
            unsynced: BTreeMap::new(),
        })
    }

    pub fn size_bytes(&self) -> u64 {
        self.size_bytes
    }

    pub fn unsynced_blocks(&self) -> usize {
        self.unsynced.len()
    }

    pub fn read(&self, offset: u64, length: usize) -> io::Result<Vec<u8>> {
        let length = length.min(usize::try_from(self.size_bytes.saturating_sub(offset)).unwrap_or(usize::MAX));
        let mut bytes = vec![0; length];
        for part in parts(offset, length) {
            let block = self.block(part.block)?;
            bytes[part.outside.clone()].copy_from_slice(&block[part.inside]);
        }
        Ok(bytes)
    }

    pub fn write(&mut self, offset: u64, bytes: &[u8]) -> io::Result<()> {
        if offset + bytes.len() as u64 > self.size_bytes {
            return Err(io::ErrorKind::StorageFull.into());
        }
        for part in parts(offset, bytes.len()) {
            let mut block = self.block(part.block)?;
            block[part.inside].copy_from_slice(&bytes[part.outside]);
            self.unsynced.insert(part.block, Some(block));
        }
        Ok(())
    }

    /// Reads as zeroes from now on.
    pub fn discard(&mut self, offset: u64, length: u64) -> io::Result<()> {
        let end = (offset + length).min(self.size_bytes);
        let (first, last) = (offset.div_ceil(BLOCK as u64), end / BLOCK as u64);
        for block in first..last {
            self.unsynced.insert(block, None);
        }
        // The ends, where they are not whole blocks.
        let zeroes = [0; BLOCK];
        let head = (first * BLOCK as u64).min(end).saturating_sub(offset);
        self.write(offset, &zeroes[..usize::try_from(head).expect("less than a block")])?;
        if last >= first && end > last * BLOCK as u64 {
            let tail = usize::try_from(end - last * BLOCK as u64).expect("less than a block");
            self.write(last * BLOCK as u64, &zeroes[..tail])?;
        }
        Ok(())
    }

    /// Everything written so far survives a power cut from now on.
    pub fn sync(&mut self) {
        self.durable.extend(std::mem::take(&mut self.unsynced));
    }

    /// The power goes. `survives` is asked for each unsynced block. Afterwards the image is what a machine finds that
    /// starts again.
    pub fn cut(mut self, mut survives: impl FnMut() -> bool) -> io::Result<Loss> {
        let before = self.unsynced.len();
        self.unsynced.retain(|_, _| survives());
        let kept = self.unsynced.len();
        self.sync();
        self.store()?;
        let lost = before - kept;
        Ok(Loss { lost, kept })
    }

    /// Writes all that is durable to the image.
    pub fn store(&mut self) -> io::Result<()> {
        for (block, content) in std::mem::take(&mut self.durable) {
            let offset = block * BLOCK as u64;
            match content {
                Some(bytes) => self.image.write_all_at(&bytes[..], offset)?,
                None => {
                    let punch = FallocateFlags::FALLOC_FL_PUNCH_HOLE | FallocateFlags::FALLOC_FL_KEEP_SIZE;
                    fallocate(
                        &self.image,
                        punch,
                        i64::try_from(offset).expect("a file's offset"),
                        BLOCK as i64,
                    )?;
                }
            }
        }
        Ok(())
    }

    fn block(&self, block: u64) -> io::Result<Box<[u8; BLOCK]>> {
        let mut bytes = Box::new([0; BLOCK]);
        match self.unsynced.get(&block).or_else(|| self.durable.get(&block)) {
            Some(Some(content)) => bytes.copy_from_slice(&content[..]),
            Some(None) => {}
            None => self.image.read_exact_at(&mut bytes[..], block * BLOCK as u64)?,
        }
        Ok(bytes)
    }
}

/// The part of a request that lies in one block.
struct Part {
    block: u64,
    inside: std::ops::Range<usize>,
    outside: std::ops::Range<usize>,
}

fn parts(offset: u64, length: usize) -> impl Iterator<Item = Part> {
    let mut done = 0;
    std::iter::from_fn(move || {
        if done == length {
            return None;
        }
        let at = offset + done as u64;
        let start = usize::try_from(at % BLOCK as u64).expect("less than a block");
        let count = (BLOCK - start).min(length - done);
        let part = Part {
            block: at / BLOCK as u64,
            inside: start..start + count,
            outside: done..done + count,
        };
        done += count;
        Some(part)
    })
}

#[cfg(test)]
mod tests {
    use nix::sys::memfd::{MFdFlags, memfd_create};

    use super::*;

    fn disk(blocks: usize) -> (Disk, File) {
        let image = File::from(memfd_create(c"disk", MFdFlags::empty()).unwrap());
        image.set_len((blocks * BLOCK) as u64).unwrap();
        let again = image.try_clone().unwrap();
        (Disk::open(image).unwrap(), again)
    }

    #[test]
    fn a_power_cut_takes_what_was_not_synced_and_nothing_else() {
        let (mut disk, image) = disk(4);
        disk.write(0, &[1; 3 * BLOCK]).unwrap();
        disk.sync();
        disk.write(100, &[2; BLOCK]).unwrap();
        disk.discard(2 * BLOCK as u64, BLOCK as u64).unwrap();
        assert_eq!(disk.read(99, 3).unwrap(), [1, 2, 2]);
        assert_eq!(disk.read(2 * BLOCK as u64, 2).unwrap(), [0, 0]);
        assert_eq!(disk.cut(|| false).unwrap(), Loss { lost: 3, kept: 0 });
        let disk = Disk::open(image).unwrap();
        assert_eq!(
            disk.read(0, 4 * BLOCK).unwrap(),
            [vec![1; 3 * BLOCK], vec![0; BLOCK]].concat()
        );
    }

    #[test]
    fn each_unsynced_block_survives_by_itself() {
        let (mut disk, image) = disk(3);
        disk.write(0, &[7; 3 * BLOCK]).unwrap();
        let mut answers = [true, false, true].into_iter();
        assert_eq!(disk.cut(|| answers.next().unwrap()).unwrap(), Loss { lost: 1, kept: 2 });
        let disk = Disk::open(image).unwrap();
        let expected = [vec![7; BLOCK], vec![0; BLOCK], vec![7; BLOCK]].concat();
        assert_eq!(disk.read(0, 3 * BLOCK).unwrap(), expected);
    }

    #[test]
    fn discarding_parts_of_blocks_leaves_their_rest() {
        for (offset, length) in [(10, 20), (10, 5000), (0, 4096), (4000, 8300), (4096, 4096), (5, 12283)] {
            let (mut disk, _image) = disk(3);
            disk.write(0, &[9; 3 * BLOCK]).unwrap();
            disk.discard(offset as u64, length as u64).unwrap();
            let mut expected = vec![9; 3 * BLOCK];
            // (4000, 8300) asks for more than there is.
            let end = (offset + length).min(expected.len());
            expected[offset..end].fill(0);
            assert_eq!(disk.read(0, 3 * BLOCK).unwrap(), expected, "{offset}+{length}");
        }
    }
}
