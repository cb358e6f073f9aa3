//! A large replica that was never written: a whole map, made with the engine's own encoders, on a disk that makes the
//! leaves up whenever they are read. Blocks have places, but no bytes.

use std::collections::BTreeMap;

use galleonfs_storage_engine::buffer::Buf;
use galleonfs_storage_engine::io::{Disk, FileId, IoFailure, SegmentId};
use galleonfs_storage_engine::store::layout::{
    Entry, FANOUT, Page, PageKind, PageName, SegmentKind, StreamPosition, TreeId, Used, row,
};
use galleonfs_storage_engine::store::{FormatOptions, format_replica, inspect};
use galleonfs_storage_engine::types::{BlockSize, Epoch, Identity, Location, Seq, Version};

const PAGE: u64 = 4096;
/// Of every eight neighbours so many are mapped.
const MAPPED_OF_EIGHT: usize = 3;
const PER_LEAF: u64 = (FANOUT / 8 * MAPPED_OF_EIGHT) as u64;
const FIRST_DATA: u32 = 1_000;

pub const IDENTITY: Identity = Identity {
    cluster: [1; 16],
    volume: [2; 16],
    replica: [3; 16],
};

/// The disk of such a replica.
pub struct Synthetic {
    pages: BTreeMap<(FileId, u64), Buf>,
    files: BTreeMap<FileId, u64>,
    leaves: u64,
    first_leaf_segment: u32,
    pages_per_segment: u64,
    /// Operations since the start.
    pub reads: u64,
    pub read_bytes: u64,
}

impl Synthetic {
    /// A volume of so many blocks, of which three in eight are mapped.
    pub fn new(size_blocks: u64) -> Synthetic {
        let leaves = size_blocks / FANOUT as u64;
        let mut disk = Synthetic {
            pages: BTreeMap::new(),
            files: BTreeMap::new(),
            leaves,
            first_leaf_segment: 0,
            pages_per_segment: 0,
            reads: 0,
            read_bytes: 0,
        };
        let options = FormatOptions {
            identity: IDENTITY,
            block_size: BlockSize::K4,
            size_blocks: leaves * FANOUT as u64,
            segment_bytes: None,
            salt: 7,
        };
        format_replica(&mut disk, &options).expect("an empty disk can be formatted");
        let mut superblock = inspect(&mut disk).expect("it was just made");
        let segment_bytes = superblock.geometry.segment_bytes;
        disk.pages_per_segment = segment_bytes / PAGE - 1;
        let data_segments = disk.mapped_blocks().div_ceil(disk.pages_per_segment) as u32;
        disk.first_leaf_segment = FIRST_DATA + data_segments;

        // Level by level up to the root; every page has the next place.
        let mut place = 0;
        let mut next_place = |disk: &Synthetic| {
            place += 1;
            disk.place(disk.first_leaf_segment, place - 1)
        };
        let mut below: Vec<Entry> = Vec::with_capacity(leaves as usize);
        for index in 0..leaves {
            let (page, location) = (disk.leaf(index), next_place(&disk));
            below.push(entry(location, (index + 1) * PER_LEAF, &page));
        }
        for level in 1..superblock.checkpoint.height {
            let mut pointers = Vec::with_capacity(below.len() / FANOUT + 1);
            for (index, chunk) in below.chunks(FANOUT).enumerate() {
                let (tree, index) = (TreeId::HEAD, index as u64);
                let page = Page::encode(
                    PageKind::Map,
                    PageName { tree, level, index },
                    IDENTITY.replica,
                    1,
                    chunk,
                );
                let location = next_place(&disk);
                disk.keep(location, &page);
                let newest = chunk.iter().map(|entry| entry.version.seq.0).max().unwrap_or(0);
                pointers.push(entry(location, newest, &page));
            }
            below = pointers;
        }
        assert_eq!(below.len(), 1, "one root");
        let meta_segments = (leaves + leaves / 100 + 10_000).div_ceil(disk.pages_per_segment) as u32;
        let used = |kind| Used {
            kind,
            live: disk.pages_per_segment as u32,
            log_index: 0,
            open: false,
        };
        let data = (0..data_segments).map(|n| row(SegmentId(FIRST_DATA + n), &used(SegmentKind::Moved)));
        let meta = (0..meta_segments).map(|n| row(SegmentId(disk.first_leaf_segment + n), &used(SegmentKind::Meta)));
        let mut rows: Vec<Entry> = data.chain(meta).collect();
        for kind in [PageKind::Table, PageKind::TableIndex] {
            let mut pointers = Vec::new();
            for (index, chunk) in rows.chunks(FANOUT).enumerate() {
                let (tree, index) = (TreeId::HEAD, index as u64);
                let page = Page::encode(kind, PageName { tree, level: 0, index }, IDENTITY.replica, 1, chunk);
                let location = next_place(&disk);
                disk.keep(location, &page);
                pointers.push(entry(location, 0, &page));
            }
            rows = pointers;
        }
        let end = next_place(&disk);
        for n in 0..data_segments + meta_segments {
            disk.files
                .insert(FileId::Segment(SegmentId(FIRST_DATA + n)), segment_bytes);
        }
        superblock.generation += 1;
        superblock.epoch = Epoch(1);
        superblock.checkpoint.number = 1;
        superblock.checkpoint.root = below[0];
        superblock.checkpoint.table = rows;
        superblock.checkpoint.meta = Some(StreamPosition {
            segment: end.segment(),
            offset: end.offset(),
        });
        for slot in 0..2 {
            let bytes = superblock.encode();
            disk.write(FileId::Superblock(slot), 0, &[bytes]).expect("it is memory");
        }
        (disk.reads, disk.read_bytes) = (0, 0);
        disk
    }

    pub fn mapped_blocks(&self) -> u64 {
        self.leaves * PER_LEAF
    }

    pub fn size_blocks(&self) -> u64 {
        self.leaves * FANOUT as u64
    }

    /// Pages of the map, nearly all of them leaves.
    pub fn map_pages(&self) -> u64 {
        self.leaves + self.leaves.div_ceil(FANOUT as u64)
    }

    /// A block that is not mapped, in the middle of others that are: finding that out takes a leaf.
    pub fn hole_near(lba: u64) -> u64 {
        lba / FANOUT as u64 * FANOUT as u64 + (lba % FANOUT as u64) / 8 * 8 + 7
    }

    fn place(&self, first: u32, n: u64) -> Location {
        let segment = SegmentId(first + (n / self.pages_per_segment) as u32);
        Location::new(segment, PAGE + n % self.pages_per_segment * PAGE, PAGE)
    }

    fn leaf(&self, index: u64) -> Page {
        let mut entries = [Entry::default(); FANOUT];
        let mut n = index * PER_LEAF;
        for (slot, place) in entries.iter_mut().enumerate() {
            if slot % 8 < MAPPED_OF_EIGHT {
                *place = Entry {
                    location: self.place(FIRST_DATA, n),
                    version: version(n + 1),
                    check: (n as u32).into(),
                };
                n += 1;
            }
        }
        let (tree, level) = (TreeId::HEAD, 0);
        Page::encode(
            PageKind::Map,
            PageName { tree, level, index },
            IDENTITY.replica,
            1,
            &entries,
        )
    }

    fn keep(&mut self, at: Location, page: &Page) {
        let key = (FileId::Segment(at.segment()), at.offset() / PAGE);
        self.pages.insert(key, page.bytes().clone());
    }

    /// The leaf that lies there, if one does.
    fn leaf_at(&self, file: FileId, page: u64) -> Option<Page> {
        let FileId::Segment(SegmentId(id)) = file else {
            return None;
        };
        let segment = id
            .checked_sub(self.first_leaf_segment)
            .filter(|_| self.first_leaf_segment > 0)?;
        let index = u64::from(segment) * self.pages_per_segment + page.checked_sub(1)?;
        (index < self.leaves).then(|| self.leaf(index))
    }
}

fn version(seq: u64) -> Version {
    Version {
        epoch: Epoch(1),
        seq: Seq(seq),
    }
}

fn entry(location: Location, newest: u64, page: &Page) -> Entry {
    Entry {
        location,
        version: version(newest),
        check: page.check(),
    }
}

impl Disk for Synthetic {
    fn read(&mut self, file: FileId, offset: u64, buf: &mut [u8]) -> Result<(), IoFailure> {
        if !self.files.contains_key(&file) {
            return Err(IoFailure::NotFound);
        }
        self.reads += 1;
        self.read_bytes += buf.len() as u64;
        for (page, into) in (offset / PAGE..).zip(buf.chunks_mut(PAGE as usize)) {
            match (self.pages.get(&(file, page)), self.leaf_at(file, page)) {
                (Some(kept), _) => into.copy_from_slice(kept.as_ref()),
                (None, Some(leaf)) => into.copy_from_slice(leaf.bytes().as_ref()),
                (None, None) => into.fill(0),
            }
        }
        Ok(())
    }

    fn write(&mut self, file: FileId, offset: u64, parts: &[Buf]) -> Result<(), IoFailure> {
        let mut page = offset / PAGE;
        for part in parts {
            for from in (0..part.len()).step_by(PAGE as usize) {
                self.pages.insert((file, page), part.slice(from..from + PAGE as usize));
                page += 1;
            }
        }
        Ok(())
    }

    fn sync(&mut self, _: FileId) -> Result<(), IoFailure> {
        Ok(())
    }

    fn create(&mut self, file: FileId, len: u64) -> Result<(), IoFailure> {
        self.files.insert(file, len);
        Ok(())
    }

    fn remove(&mut self, file: FileId) -> Result<(), IoFailure> {
        self.files.remove(&file);
        self.pages.retain(|(other, _), _| *other != file);
        Ok(())
    }

    fn list(&mut self) -> Result<Vec<(FileId, u64)>, IoFailure> {
        Ok(self.files.iter().map(|(file, len)| (*file, *len)).collect())
    }
}
