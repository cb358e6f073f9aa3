//! The real store on a simulated disk: what is written is in the kernel's hands when the operation ends, on stable storage
//! when a sync does, and of the rest a power cut keeps any part, torn between sectors.

use std::collections::BTreeMap;
use std::sync::Arc;

use galleonfs_storage_engine::buffer::Buf;
use galleonfs_storage_engine::io::{Disk, FileId, Io, IoFailure, IoId, perform};
use galleonfs_storage_engine::replication::message::{Batch, Stored};
use galleonfs_storage_engine::replication::{CopyMode, ReplicaEvent, ReplicaStore};
use galleonfs_storage_engine::seal::KeyRow;
use galleonfs_storage_engine::store::layout::EpochEnd;
use galleonfs_storage_engine::store::{
    Event, FormatOptions, OpenOptions, Room, ScrubOrder, Seals, Settle, Store, format_joining_replica, inspect,
    open_replica,
};
use galleonfs_storage_engine::types::{BlockSize, Check, Epoch, Identity, Lba, SECTOR_BYTES, Seq, Version};

use super::backend::{Backend, Contents};
use super::rng::Rng;
use super::store::write_id;

const CLUSTER: [u8; 16] = *b"a simulated one.";
/// Room for the largest record, so that segments change often.
const SEGMENT_BYTES: u64 = (1 << 20) + (64 << 10);
/// Rows that make a checkpoint due: few, so that there are many.
const MEMTABLE_ROWS: usize = 96;

/// A write that no sync has covered.
#[derive(Clone, Debug)]
struct Unsynced {
    offset: usize,
    old: Vec<u8>,
    new: Vec<u8>,
}

#[derive(Clone, Debug, Default)]
struct SimFile {
    bytes: Vec<u8>,
    unsynced: Vec<Unsynced>,
}

/// The files of a replica's directory.
#[derive(Clone, Debug, Default)]
pub struct Files(BTreeMap<FileId, SimFile>);

impl Files {
    /// True if anything is lost that was written.
    fn cut_power(&mut self, rng: &mut Rng) -> bool {
        let mut loses = false;
        for file in self.0.values_mut() {
            let unsynced = std::mem::take(&mut file.unsynced);
            for write in unsynced.iter().rev() {
                file.bytes[write.offset..write.offset + write.old.len()].copy_from_slice(&write.old);
            }
            // None of it, all of it, or any part of it.
            let mode = rng.below(3);
            for write in unsynced {
                let sectors = write.new.len() / SECTOR_BYTES as usize;
                let kept = match mode {
                    0 => 0,
                    1 => sectors,
                    _ if rng.percent(50) => sectors,
                    _ if rng.percent(50) => rng.below(sectors as u64 + 1) as usize,
                    _ => 0,
                };
                let bytes = kept * SECTOR_BYTES as usize;
                file.bytes[write.offset..write.offset + bytes].copy_from_slice(&write.new[..bytes]);
                loses |= kept < sectors;
            }
        }
        loses
    }
}

impl Disk for Files {
    fn read(&mut self, file: FileId, offset: u64, buf: &mut [u8]) -> Result<(), IoFailure> {
        let bytes = &self.0.get(&file).ok_or(IoFailure::NotFound)?.bytes;
        let range = offset as usize..offset as usize + buf.len();
        let found = bytes.get(range).ok_or(IoFailure::Failed("behind the end".into()))?;
        buf.copy_from_slice(found);
        Ok(())
    }

    fn write(&mut self, file: FileId, offset: u64, parts: &[Buf]) -> Result<(), IoFailure> {
        let file = self.0.entry(file).or_default();
        let new: Vec<u8> = parts.iter().flat_map(|part| part.as_ref()).copied().collect();
        let offset = offset as usize;
        if file.bytes.len() < offset + new.len() {
            file.bytes.resize(offset + new.len(), 0);
        }
        let old = file.bytes[offset..offset + new.len()].to_vec();
        file.bytes[offset..offset + new.len()].copy_from_slice(&new);
        file.unsynced.push(Unsynced { offset, old, new });
        Ok(())
    }

    fn sync(&mut self, file: FileId) -> Result<(), IoFailure> {
        self.0.get_mut(&file).ok_or(IoFailure::NotFound)?.unsynced.clear();
        Ok(())
    }

    fn create(&mut self, file: FileId, len: u64) -> Result<(), IoFailure> {
        self.0.entry(file).or_default().bytes.resize(len as usize, 0);
        Ok(())
    }

    fn remove(&mut self, file: FileId) -> Result<(), IoFailure> {
        self.0.remove(&file).map(drop).ok_or(IoFailure::NotFound)
    }

    fn list(&mut self) -> Result<Vec<(FileId, u64)>, IoFailure> {
        Ok(self.0.iter().map(|(id, file)| (*id, file.bytes.len() as u64)).collect())
    }
}

/// See the module.
pub struct RealStore {
    store: Store,
    files: Files,
    blocks: u64,
    out: BTreeMap<u64, (IoId, Io)>,
    next: u64,
}

impl std::fmt::Debug for RealStore {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{:?}", self.store)
    }
}

/// A replica that is down.
#[derive(Clone, Debug)]
pub struct RealDisk {
    volume: [u8; 16],
    replica: [u8; 16],
    blocks: u64,
    files: Files,
}

impl RealDisk {
    fn identity(&self) -> Identity {
        Identity {
            cluster: CLUSTER,
            volume: self.volume,
            replica: self.replica,
        }
    }
}

impl RealStore {
    fn down(self) -> RealDisk {
        let (volume, replica) = ReplicaStore::identity(&self.store);
        RealDisk {
            volume,
            replica,
            blocks: self.blocks,
            files: self.files,
        }
    }

    /// Another one, as if this one had just been killed.
    fn copy(&self) -> RealStore {
        let (volume, replica) = ReplicaStore::identity(&self.store);
        let disk = RealDisk {
            volume,
            replica,
            blocks: self.blocks,
            files: self.files.clone(),
        };
        RealStore::open(disk, None).expect("what is in the kernel's hands can be opened")
    }

    /// Of what is on its way to the disk a part arrives.
    fn end_writes(&mut self, rng: &mut Rng) {
        for (_, (_, io)) in std::mem::take(&mut self.out) {
            if rng.percent(50) && !matches!(io, Io::Read { .. }) {
                let _ = perform(&mut self.files, io);
            }
        }
    }
}

impl Backend for RealStore {
    type Disk = RealDisk;
    const SLOWER: u64 = 4;

    fn blank(volume: [u8; 16], replica: [u8; 16], blocks: u64) -> RealDisk {
        let mut disk = RealDisk {
            volume,
            replica,
            blocks,
            files: Files::default(),
        };
        let options = FormatOptions {
            identity: disk.identity(),
            block_size: BlockSize::K4,
            size_blocks: blocks,
            segment_bytes: Some(SEGMENT_BYTES),
            salt: u64::from_le_bytes(replica[..8].try_into().expect("eight bytes")),
        };
        format_joining_replica(&mut disk.files, &options, &[]).expect("an empty disk can be formatted");
        disk
    }

    fn open(mut disk: RealDisk, told: Option<&[EpochEnd]>) -> Result<RealStore, String> {
        let superblock = inspect(&mut disk.files).map_err(|error| error.to_string())?;
        let options = OpenOptions {
            settle: Settle::Told(told.unwrap_or_default().to_vec()),
            cache_pages_max: 64,
            memtable_rows_max: MEMTABLE_ROWS,
            tail_segments_max: 2,
            idle_checkpoint_ms: 500,
            ..OpenOptions::new(disk.identity(), superblock.epoch)
        };
        let blocks = disk.blocks;
        let (store, _) = open_replica(&mut disk.files, options).map_err(|error| error.to_string())?;
        Ok(RealStore {
            store,
            files: disk.files,
            blocks,
            out: BTreeMap::new(),
            next: 0,
        })
    }

    fn kill(mut self, rng: &mut Rng) -> RealDisk {
        self.end_writes(rng);
        self.down()
    }

    fn cut_power(mut self, rng: &mut Rng) -> (RealDisk, bool) {
        self.end_writes(rng);
        let loses = self.files.cut_power(rng);
        (self.down(), loses)
    }

    fn take_started(&mut self) -> Vec<u64> {
        let mut started = Vec::new();
        while let Some((id, io)) = self.store.poll_io() {
            self.out.insert(self.next, (id, io));
            started.push(self.next);
            self.next += 1;
        }
        started
    }

    fn finish(&mut self, operation: u64) {
        if let Some((id, io)) = self.out.remove(&operation) {
            let result = perform(&mut self.files, io);
            self.store.completed(id, result);
        }
    }

    fn tick(&mut self, now_ms: u64) {
        self.store.tick(now_ms);
    }

    fn damage(&mut self, _lba: Lba, _version: Version, write: u64) -> bool {
        let mut any = false;
        let segments = self.files.0.iter_mut();
        for (_, file) in segments.filter(|(id, _)| matches!(id, FileId::Segment(_))) {
            for page in file.bytes.chunks_exact_mut(4096) {
                let id = write.to_le_bytes();
                if page[..8] == id && page[4088..] == id {
                    page[2000] ^= 4;
                    any = true;
                }
            }
        }
        any
    }

    fn scrub(&mut self) {
        self.store.scrub(ScrubOrder::Start { bytes_per_second: 0 });
    }

    fn damaged(&self) -> Vec<Lba> {
        let mut copy = self.copy();
        for lba in 0..self.blocks {
            copy.store.read_stored(lba, Lba(lba), 1);
        }
        copy.store.drive(&mut copy.files);
        let mut damaged = Vec::new();
        while let Some(event) = copy.store.poll_event() {
            if let Event::Stored(lba, Err(_)) = event {
                damaged.push(Lba(lba));
            }
        }
        damaged
    }

    fn contents(&self) -> Contents {
        let mut copy = self.copy();
        copy.store.read_stored(0, Lba(0), self.blocks);
        copy.store.drive(&mut copy.files);
        let mut contents = Contents::new();
        while let Some(event) = copy.store.poll_event() {
            let Event::Stored(_, found) = event else { continue };
            for stored in found.expect("nothing is damaged") {
                match stored {
                    Stored::Block(block) => {
                        contents.insert(block.lba, (block.version, Some(write_id(&block.bytes))));
                    }
                    Stored::Zeros { start, end, version } => {
                        for lba in (start.0..end.0).map(Lba) {
                            if version > Version::default() {
                                contents.insert(lba, (version, None));
                            }
                        }
                    }
                }
            }
        }
        contents
    }

    fn check(volume: [u8; 16], lba: Lba, version: Version, bytes: &Buf) -> Check {
        let identity = Identity {
            cluster: CLUSTER,
            volume,
            replica: [0; 16],
        };
        Seals::new(&identity, 0).block(lba, version, bytes.as_ref()).into()
    }
}

impl ReplicaStore for RealStore {
    fn identity(&self) -> ([u8; 16], [u8; 16]) {
        ReplicaStore::identity(&self.store)
    }
    fn promised(&self) -> Epoch {
        self.store.promised()
    }
    fn last(&self) -> (Version, Version) {
        ReplicaStore::last(&self.store)
    }
    fn durable(&self) -> Version {
        ReplicaStore::durable(&self.store)
    }
    fn copies_durable(&self) -> bool {
        self.store.copies_durable()
    }
    fn ends(&self) -> Vec<EpochEnd> {
        self.store.ends()
    }
    fn agreed(&self) -> Version {
        self.store.agreed()
    }
    fn agree(&mut self, upto: Version) {
        self.store.agree(upto);
    }
    fn promise(&mut self, epoch: Epoch, row: Option<KeyRow>) {
        ReplicaStore::promise(&mut self.store, epoch, row);
    }
    fn settle(&mut self, ends: &[EpochEnd]) {
        ReplicaStore::settle(&mut self.store, ends);
    }
    fn is_behind(&self, ends: &[EpochEnd]) -> bool {
        self.store.is_behind(ends)
    }
    fn join(&mut self, base: Seq) {
        ReplicaStore::join(&mut self.store, base);
    }
    fn room(&mut self, pages: usize) -> Room {
        ReplicaStore::room(&mut self.store, pages)
    }
    fn append(&mut self, batch: Arc<Batch>) {
        ReplicaStore::append(&mut self.store, batch);
    }
    fn sync(&mut self) {
        ReplicaStore::sync(&mut self.store);
    }
    fn read_stored(&mut self, token: u64, lba: Lba, blocks: u64) {
        ReplicaStore::read_stored(&mut self.store, token, lba, blocks);
    }
    fn rows(&mut self, token: u64, from: Lba, after: Version, rows_max: usize) {
        ReplicaStore::rows(&mut self.store, token, from, after, rows_max);
    }
    fn copy_in(&mut self, token: u64, blocks: Vec<Stored>, mode: CopyMode) {
        ReplicaStore::copy_in(&mut self.store, token, blocks, mode);
    }
    fn gate_wanted(&self) -> Option<Version> {
        ReplicaStore::gate_wanted(&self.store)
    }
    fn poll_event(&mut self) -> Option<ReplicaEvent> {
        ReplicaStore::poll_event(&mut self.store)
    }
}
