//! A replica's directory as one file: zstd over
//!
//! ```text
//! for each file: length of its path (1), path, bytes of the file (8), names (1), pages that are not zeros (4), then for
//! each of those its number (4) and its 4096 bytes
//! ```

use std::fs;
use std::path::Path;

use galleonfs_storage_engine::buffer::BufMut;
use galleonfs_storage_engine::io::{Disk, FileId};

use crate::sim_disk::SimDisk;

const PAGE: usize = 4096;
const BYTES_MAX: usize = 64 << 20;

pub fn save(disk: &mut SimDisk, path: &Path) {
    let mut bytes = Vec::new();
    for (file, len) in disk.list().expect("a disk in memory lists its files") {
        let name = file.path();
        let names = disk.names(file).expect("the file is there");
        bytes.push(name.len() as u8);
        bytes.extend_from_slice(name.as_bytes());
        bytes.extend_from_slice(&len.to_le_bytes());
        bytes.push(names as u8);
        let mut pages: Vec<(u32, Vec<u8>)> = Vec::new();
        for page in 0..len / PAGE as u64 {
            let mut found = vec![0; PAGE];
            let read = disk.read(file, page * PAGE as u64, &mut found);
            read.expect("the page is inside the file");
            if found.iter().any(|byte| *byte != 0) {
                pages.push((page as u32, found));
            }
        }
        bytes.extend_from_slice(&(pages.len() as u32).to_le_bytes());
        for (page, found) in pages {
            bytes.extend_from_slice(&page.to_le_bytes());
            bytes.extend_from_slice(&found);
        }
    }
    let compressed = zstd::bulk::compress(&bytes, 19).expect("compress an image");
    fs::write(path, compressed).expect("write an image");
}

pub fn load(path: &Path) -> SimDisk {
    let compressed = fs::read(path).unwrap_or_else(|error| panic!("{}: {error}", path.display()));
    let bytes = zstd::bulk::decompress(&compressed, BYTES_MAX).expect("an image decompresses");
    let mut rest = &bytes[..];
    let mut take = |len: usize| {
        let (taken, after) = rest.split_at(len);
        rest = after;
        (taken, rest.is_empty())
    };
    // Files with a second name belong to another directory, too.
    let (mut disk, mut other) = (SimDisk::default(), SimDisk::default());
    loop {
        let len = usize::from(take(1).0[0]);
        let name = std::str::from_utf8(take(len).0).expect("a path is text");
        let file = FileId::from_path(name).expect("a path of a replica");
        let len = u64::from_le_bytes(take(8).0.try_into().expect("eight bytes"));
        let names = take(1).0[0];
        let home = if names > 1 { &mut other } else { &mut disk };
        home.create(file, len).expect("there is room");
        let (count, mut end) = take(4);
        for _ in 0..u32::from_le_bytes(count.try_into().expect("four bytes")) {
            let page = u32::from_le_bytes(take(4).0.try_into().expect("four bytes"));
            let (found, last) = take(PAGE);
            let written = home.write(file, u64::from(page) * PAGE as u64, &[BufMut::copy_of(found).freeze()]);
            written.expect("a disk in memory takes it");
            end = last;
        }
        home.sync(file).expect("a disk in memory syncs");
        if names > 1 {
            disk.link_from(&mut other, file, file);
        }
        if end {
            return disk;
        }
    }
}
