//! What the superblocks lead to: reading it, and writing them anew.

use std::collections::BTreeMap;

use super::super::checkpoint::listed_page;
use super::super::page::{Entry, FANOUT, Page, PageKind, PageName};
use super::super::segment::{SegmentKind, Used, from_row};
use super::super::snapshot::{Catalog, ROW_BYTES, ROWS_PER_PAGE};
use super::super::superblock::{SUPERBLOCK_BYTES, Superblock, SuperblockError};
use super::{OpenError, disk};
use crate::buffer::BufMut;
use crate::io::{Disk, FileId, IoFailure, SegmentId};
use crate::types::Location;

/// Writes and syncs both, `first` first: the other one stays valid until the first is.
pub(in super::super) fn write_superblocks(
    on: &mut dyn Disk,
    superblock: &Superblock,
    first: u8,
) -> Result<(), OpenError> {
    for slot in [first, 1 - first] {
        let file = FileId::Superblock(slot);
        disk(on.write(file, 0, &[superblock.encode()]), || {
            format!("writing superblock {slot}")
        })?;
        disk(on.sync(file), || format!("syncing superblock {slot}"))?;
    }
    Ok(())
}

/// The superblock that counts.
pub(in super::super) struct Found {
    pub superblock: Superblock,
    /// The slot it stands in.
    pub slot: u8,
    /// What is wrong with the other one, if anything.
    pub other: Option<String>,
}

/// Reads both superblocks; the newer valid one counts.
pub(in super::super) fn read_superblocks(on: &mut dyn Disk) -> Result<Found, OpenError> {
    let mut good: Vec<(Superblock, u8)> = Vec::new();
    let mut bad = Vec::new();
    // Only what is missing or all zeros was never written: an interrupted format came no further than making the file.
    let mut written = false;
    for slot in 0..2 {
        let mut buf = BufMut::zeroed(SUPERBLOCK_BYTES);
        match on.read(FileId::Superblock(slot), 0, buf.as_mut()) {
            Err(IoFailure::NotFound) => bad.push(format!("superblock {slot} is missing")),
            Err(error) => {
                written = true;
                bad.push(format!("superblock {slot}: {error}"));
            }
            Ok(()) => match Superblock::decode(buf.as_ref()) {
                Ok(superblock) => good.push((superblock, slot)),
                Err(SuperblockError::Newer(version)) => return Err(OpenError::NewerFormat(version)),
                Err(error) => {
                    written |= buf.as_ref().iter().any(|byte| *byte != 0);
                    bad.push(format!("superblock {slot}: {error}"));
                }
            },
        }
    }
    match good.into_iter().max_by_key(|(superblock, _)| superblock.generation) {
        Some((superblock, slot)) => Ok(Found {
            superblock,
            slot,
            other: bad.pop(),
        }),
        None if !written => Err(OpenError::NotFormatted),
        None => Err(OpenError::Damaged(format!(
            "neither superblock is valid ({}): remove this replica if another copy exists, or restore from a backup",
            bad.join("; ")
        ))),
    }
}

/// Reads who a replica is, without opening it.
pub fn inspect(on: &mut dyn Disk) -> Result<Superblock, OpenError> {
    read_superblocks(on).map(|found| found.superblock)
}

/// The segment files that are there, with their lengths in bytes.
pub(in super::super) fn segment_files(on: &mut dyn Disk) -> Result<BTreeMap<SegmentId, u64>, OpenError> {
    let files = disk(on.list(), || "listing the replica directory".into())?;
    Ok(files
        .into_iter()
        .filter_map(|(file, len)| match file {
            FileId::Segment(id) => Some((id, len)),
            FileId::Superblock(_) | FileId::Keys(_) => None,
        })
        .collect())
}

/// The segment table of a checkpoint, and where its own pages lie.
pub(in super::super) fn read_table(
    on: &mut dyn Disk,
    superblock: &Superblock,
) -> Result<(BTreeMap<SegmentId, Used>, Vec<Location>), OpenError> {
    let mut used = BTreeMap::new();
    let mut pages = Vec::new();
    let mut read = |pointer: Entry, kind: PageKind, index: u64| -> Result<Page, OpenError> {
        pages.push(pointer.location);
        read_page(on, superblock, pointer, kind, listed_page(index as usize))
    };
    for (n, pointer) in superblock.checkpoint.table.iter().enumerate() {
        let index = read(*pointer, PageKind::TableIndex, n as u64)?;
        for (slot, pointer) in index
            .entries()
            .into_iter()
            .enumerate()
            .filter(|(_, entry)| !entry.location.is_none())
        {
            let table = read(pointer, PageKind::Table, (n * FANOUT + slot) as u64)?;
            used.extend(table.entries().into_iter().filter_map(from_row));
        }
    }
    let replay = &superblock.checkpoint.replay;
    let log = Used {
        kind: SegmentKind::Data,
        live: 0,
        log_index: replay.log_index,
        open: false,
    };
    used.entry(replay.segment).or_insert(log);
    Ok((used, pages))
}

/// Reads and checks one page.
pub(in super::super) fn read_page(
    on: &mut dyn Disk,
    superblock: &Superblock,
    pointer: Entry,
    kind: PageKind,
    name: PageName,
) -> Result<Page, OpenError> {
    let (segment, offset) = (pointer.location.segment(), pointer.location.offset());
    let doing = || format!("reading a {kind:?} page at segment {} offset {offset}", segment.0);
    if pointer.location.is_none() || !pointer.may_lead_to_page() {
        return Err(OpenError::Damaged(format!("{}: there can be none", doing())));
    }
    let mut buf = BufMut::zeroed(pointer.location.len() as usize);
    match on.read(FileId::Segment(segment), offset, buf.as_mut()) {
        Err(IoFailure::NotFound) => return Err(OpenError::Damaged(format!("{}: the segment is missing", doing()))),
        result => disk(result, doing)?,
    }
    let replica = superblock.geometry.identity.replica;
    let page = match kind {
        PageKind::Map => Page::decode_below(buf.freeze(), name, replica, pointer),
        _ => Page::decode(buf.freeze(), kind, name, replica, pointer.check),
    };
    page.map_err(|error| OpenError::Damaged(format!("{}: {error}", doing())))
}

/// The list of snapshots of a checkpoint, and where its pages lie.
pub(in super::super) fn read_catalog(
    on: &mut dyn Disk,
    superblock: &Superblock,
) -> Result<(Catalog, Vec<Location>), OpenError> {
    let mut catalog = Catalog::default();
    let mut pages = Vec::new();
    for (index, pointer) in superblock.checkpoint.catalog.iter().enumerate() {
        let page = read_page(on, superblock, *pointer, PageKind::Catalog, listed_page(index))?;
        pages.push(pointer.location);
        let (count, mut rows) = page.rows();
        for _ in 0..count.min(ROWS_PER_PAGE) {
            if !catalog.add_row(&rows.array::<ROW_BYTES>()) {
                return Err(OpenError::Damaged(
                    "the list of snapshots has a row that makes no sense".into(),
                ));
            }
        }
    }
    Ok((catalog, pages))
}
