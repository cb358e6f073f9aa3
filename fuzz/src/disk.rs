//! Making checks fit again: after a change of a structure on a disk, in it and in what points to it.
//!
//! This knows the places of magic numbers and checks from `docs/disk-format.md`, and nothing else of the structures.

use crc_fast::{CrcAlgorithm, Digest};
use galleonfs_storage_engine::buffer::BufMut;
use galleonfs_storage_engine::io::{Disk, FileId};

use crate::sim_disk::SimDisk;

pub const BLOCK: usize = 4096;
const ROW: usize = 128;

/// CRC-32C of `parts`, one after the other.
pub fn crc(parts: &[&[u8]]) -> u32 {
    let mut digest = Digest::new(CrcAlgorithm::Crc32Iscsi);
    parts.iter().for_each(|part| digest.update(part));
    digest.finalize() as u32
}

/// Puts the check of `bytes` in its place at `at`; `before` is what is checked in front of them.
pub fn fit(before: &[u8], bytes: &mut [u8], at: usize) {
    let check = crc(&[before, &bytes[..at], &bytes[at + 4..]]);
    bytes[at..at + 4].copy_from_slice(&check.to_le_bytes());
}

/// A structure with a check, on a disk.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    Superblock,
    SegmentHeader,
    Record,
    Page,
    KeyRow,
}

#[derive(Clone, Copy, Debug)]
pub struct Place {
    pub kind: Kind,
    pub file: FileId,
    pub offset: u64,
    pub len: usize,
}

/// Finds every structure: also those that nothing leads to any more.
pub fn structures(disk: &mut SimDisk) -> Vec<Place> {
    let mut found = Vec::new();
    for file in disk.file_ids() {
        for page in disk.written_pages(file) {
            let offset = page * BLOCK as u64;
            let bytes = read(disk, file, offset, BLOCK);
            let mut add = |kind, offset, len| {
                found.push(Place {
                    kind,
                    file,
                    offset,
                    len,
                });
            };
            match (file, &bytes[..4]) {
                (FileId::Superblock(_), _) => add(Kind::Superblock, offset, BLOCK),
                (FileId::Keys(_), _) => {
                    for (row, bytes) in bytes.chunks(ROW).enumerate() {
                        if bytes.starts_with(b"GFSK") {
                            add(Kind::KeyRow, offset + (row * ROW) as u64, ROW);
                        }
                    }
                }
                (_, b"GFSS") => add(Kind::SegmentHeader, offset, BLOCK),
                (_, b"GFSR") => add(Kind::Record, offset, if bytes[13] == 0x20 { 2 * BLOCK } else { BLOCK }),
                (_, b"GFSP") => add(Kind::Page, offset, if bytes[6] == 5 { 2 * BLOCK } else { BLOCK }),
                _ => {}
            }
        }
    }
    found
}

pub fn read(disk: &mut SimDisk, file: FileId, offset: u64, len: usize) -> Vec<u8> {
    let mut bytes = vec![0; len];
    // Behind the end of a file that was cut short there is nothing.
    let _ = disk.read(file, offset, &mut bytes);
    bytes
}

/// Writes a whole block, or some of one.
pub fn write(disk: &mut SimDisk, file: FileId, offset: u64, bytes: &[u8]) {
    let start = offset / BLOCK as u64 * BLOCK as u64;
    let inside = (offset - start) as usize;
    let mut all = read(disk, file, start, (inside + bytes.len()).next_multiple_of(BLOCK));
    all[inside..inside + bytes.len()].copy_from_slice(bytes);
    // A file that was cut short takes nothing there.
    if disk.list().is_ok_and(|files| {
        files
            .iter()
            .any(|(listed, len)| *listed == file && start + all.len() as u64 <= *len)
    }) {
        let written = disk.write(file, start, &[BufMut::copy_of(&all).freeze()]);
        written.expect("a disk in memory takes it");
    }
}

/// Writes `bytes` in the place of a structure, with a check that fits, and lets what points to it expect that.
/// `before` is what checks of record headers begin with.
pub fn replace(disk: &mut SimDisk, all: &[Place], place: Place, mut bytes: Vec<u8>, before: &[u8]) {
    match place.kind {
        Kind::Superblock => fit(&[], &mut bytes, 12),
        Kind::SegmentHeader | Kind::KeyRow => fit(&[], &mut bytes, 8),
        Kind::Record if bytes[6] == 3 => {
            fit(before, &mut bytes[..512], 8);
            bytes.copy_within(..512, 512);
        }
        Kind::Record => fit(before, &mut bytes, 8),
        Kind::Page => {
            let old = [bytes[60], bytes[61], bytes[62], bytes[63]];
            fit(&[], &mut bytes, 60);
            let new = [bytes[60], bytes[61], bytes[62], bytes[63]];
            write(disk, place.file, place.offset, &bytes);
            return repoint(disk, all, place, old, new);
        }
    }
    write(disk, place.file, place.offset, &bytes);
}

/// Every entry that leads to a page gets the page's new check, and then what it is in has a new one itself.
fn repoint(disk: &mut SimDisk, all: &[Place], page: Place, old: [u8; 4], new: [u8; 4]) {
    let FileId::Segment(segment) = page.file else {
        return;
    };
    let (sector, sectors) = (page.offset / 512, page.len as u64 / 512);
    let location = (u64::from(segment.0) << 32 | sector << 8 | sectors).to_le_bytes();
    for place in all
        .iter()
        .filter(|place| matches!(place.kind, Kind::Superblock | Kind::Page))
    {
        let mut bytes = read(disk, place.file, place.offset, place.len);
        let mut changed = false;
        for at in (0..place.len - 24).step_by(4) {
            if bytes[at..at + 8] == location && bytes[at + 20..at + 24] == old && old != new {
                bytes[at + 20..at + 24].copy_from_slice(&new);
                changed = true;
            }
        }
        if changed {
            replace(disk, all, *place, bytes, &[]);
        }
    }
}

/// Of the replicas of `harness`.
pub fn geometry() -> galleonfs_storage_engine::store::layout::Geometry {
    let mut disk = SimDisk::default();
    crate::harness::format(&mut disk, 100);
    let superblock = galleonfs_storage_engine::store::inspect(&mut disk);
    superblock.expect("it was just made").geometry
}
