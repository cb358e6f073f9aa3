//! Making a replica in an empty directory.

use super::super::keys;
use super::super::page::{Entry, height_for};
use super::super::record::{HEADER_BYTES, HEADER_BYTES_MAX, record_bytes};
use super::super::segment::{SEGMENT_HEADER_BYTES, SegmentHeader, SegmentKind};
use super::super::share::promised_bytes;
use super::super::superblock::{Checkpoint, Geometry, LogPosition, SUPERBLOCK_BYTES, Superblock};
use super::super::supply::bytes_min;
use super::super::{PAGES_MAX, RESERVE_SEGMENTS};
use super::found::{read_superblocks, write_superblocks};
use super::{MEMTABLE_ROWS_MAX, OpenError, disk};
use crate::io::{Disk, FileId, SegmentId};
use crate::seal::{KeyProof, KeyRow};
use crate::types::{BlockSize, Epoch, Identity, PAGE_BYTES, SEGMENT_BYTES_MAX, Version};

/// A volume has at least so many segments: space comes back by whole ones.
const SEGMENTS_MIN: u64 = 64;

/// What a new replica is like.
#[derive(Clone, Debug)]
pub struct FormatOptions {
    /// Whose it is.
    pub identity: Identity,
    /// What a block is. Only blocks of more than 4 KiB can be compressed.
    pub block_size: BlockSize,
    /// Size of the volume in blocks.
    pub size_blocks: u64,
    /// Bytes in a segment, a multiple of 4096; `None` chooses by the size of the volume (4 to 64 MiB).
    pub segment_bytes: Option<u64>,
    /// A fresh random number, kept secret from the guest.
    pub salt: u64,
}

/// Bytes in a segment of a volume of so many bytes, between 4 and 64 MiB: the larger, the fewer files are made, but a
/// replica has to do with what placement sets aside for it.
pub fn segment_bytes_for(size: u64, block_size: BlockSize) -> u64 {
    let rows = MEMTABLE_ROWS_MAX as u64;
    let fits = |bytes: &u64| bytes_min(size, block_size, *bytes, rows, 2) <= promised_bytes(size);
    [64 << 20, 32 << 20, 16 << 20, 8 << 20]
        .into_iter()
        .filter(|bytes| *bytes <= size / SEGMENTS_MIN)
        .find(fits)
        .unwrap_or(4 << 20)
}

/// Makes a replica in an empty directory. What an interrupted attempt left behind is taken over.
pub fn format_replica(on: &mut dyn Disk, options: &FormatOptions) -> Result<(), OpenError> {
    make_replica(on, options, None)
}

/// Makes a sealed replica. `proof` is for epoch 0, in which nothing is written: it holds the key's check.
pub fn format_sealed_replica(on: &mut dyn Disk, options: &FormatOptions, proof: &KeyProof) -> Result<(), OpenError> {
    check_first_salt(options, proof)?;
    make_replica(on, options, Some(proof))
}

/// Makes a replica of a volume that has others: it has nothing yet, and joins them at whatever epoch they are in. Of a
/// sealed volume `rows` are the salts of every epoch that anything may be sealed in, as another replica has them.
pub fn format_joining_replica(on: &mut dyn Disk, options: &FormatOptions, rows: &[KeyRow]) -> Result<(), OpenError> {
    let Blank { superblock, .. } = make_blank(on, options, rows)?;
    write_superblocks(on, &superblock, 0)
}

/// Makes sure that `proof` is for the epoch before the first.
pub(in super::super) fn check_first_salt(options: &FormatOptions, proof: &KeyProof) -> Result<(), OpenError> {
    if (proof.row.volume, proof.row.epoch) == (options.identity.volume, Epoch(0)) {
        return Ok(());
    }
    Err(OpenError::Invalid(
        "a sealed replica begins with the salt of epoch 0 of its volume".into(),
    ))
}

fn make_replica(on: &mut dyn Disk, options: &FormatOptions, keys: Option<&KeyProof>) -> Result<(), OpenError> {
    let rows: Vec<KeyRow> = keys.iter().map(|proof| proof.row).collect();
    let Blank { superblock, .. } = make_blank(on, options, &rows)?;
    write_superblocks(on, &superblock, 0)
}

/// A replica without superblocks.
pub(in super::super) struct Blank {
    pub superblock: Superblock,
    /// The first number of a segment that is not taken.
    pub next_segment: u32,
}

/// Makes everything of a replica but what is written into the superblocks. It is sealed if there are `keys`.
pub(in super::super) fn make_blank(
    on: &mut dyn Disk,
    options: &FormatOptions,
    keys: &[KeyRow],
) -> Result<Blank, OpenError> {
    let segment_bytes = options
        .segment_bytes
        .unwrap_or_else(|| segment_bytes_for(options.size_blocks * options.block_size.bytes(), options.block_size));
    let smallest = record_bytes(HEADER_BYTES_MAX, PAGES_MAX) + SEGMENT_HEADER_BYTES + HEADER_BYTES as u64;
    if options.size_blocks == 0 || !segment_bytes.is_multiple_of(PAGE_BYTES) {
        return Err(OpenError::Invalid(
            "a volume has at least one block, and segments are made of whole pages of 4096 bytes".into(),
        ));
    }
    if !(smallest..=SEGMENT_BYTES_MAX).contains(&segment_bytes) {
        return Err(OpenError::Invalid(format!(
            "a segment has {smallest} to {SEGMENT_BYTES_MAX} bytes, not {segment_bytes}"
        )));
    }
    if !matches!(read_superblocks(on), Err(OpenError::NotFormatted)) {
        return Err(OpenError::AlreadyFormatted);
    }
    let first = SegmentId(0);
    for n in 0..=(RESERVE_SEGMENTS + 1) as u32 {
        disk(on.create(FileId::Segment(SegmentId(n)), segment_bytes), || {
            format!("making segment {n}")
        })?;
    }
    let header = SegmentHeader {
        kind: SegmentKind::Data,
        segment: first,
        log_index: 0,
        epoch: Epoch(0),
    };
    let bytes = header.encode(&options.identity);
    disk(on.write(FileId::Segment(first), 0, &[bytes]), || {
        "writing the first segment".into()
    })?;
    disk(on.sync(FileId::Segment(first)), || "syncing the first segment".into())?;
    let (segment, offset) = (first, SEGMENT_HEADER_BYTES);
    let superblock = Superblock {
        generation: 1,
        geometry: Geometry {
            identity: options.identity,
            segment_bytes,
            salt: options.salt,
            sealed: !keys.is_empty(),
            block_size: options.block_size,
        },
        epoch: Epoch(0),
        clean: true,
        told: false,
        checkpoint: Checkpoint {
            number: 0,
            size_blocks: options.size_blocks,
            height: height_for(options.size_blocks),
            root: Entry::default(),
            replay: LogPosition {
                segment,
                offset,
                log_index: 0,
                last: Version::default(),
                chain: 0,
            },
            table: Vec::new(),
            catalog: Vec::new(),
            meta: None,
            moved: None,
        },
        epoch_ends: Vec::new(),
    };
    if !keys.is_empty() {
        keys::write(on, &options.identity.replica, keys)?;
    }
    for slot in 0..2 {
        disk(on.create(FileId::Superblock(slot), SUPERBLOCK_BYTES as u64), || {
            format!("making superblock {slot}")
        })?;
    }
    Ok(Blank {
        superblock,
        next_segment: (RESERVE_SEGMENTS + 2) as u32,
    })
}
