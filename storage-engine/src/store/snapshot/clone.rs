//! Clones: a new volume that begins as a snapshot of another and shares its blocks.
//!
//! A clone is a replica of its own. The source's segments are linked into its directory (one file, two names), its map
//! is written from what the snapshot holds, and each linked segment remembers its origin: the seals of its blocks are
//! those of the volume that wrote them. Nobody writes into a file that has two names: whoever needs a linked segment no
//! more only takes its own name away. The cleaner makes blocks that it moves the clone's own.
//!
//! ```text
//! hold the source ─► plan_clone ─► the caller links the files ─► write_clone, superblocks last ─► let go of the source
//! ```
//!
//! The clone of a sealed volume is sealed with a key of its own, and opens what it shares with the keys of the volumes that
//! wrote it. It has their salts; the epoch of a block says whose it is, also after the cleaner moved it.
//!
//! Versions stay in order because a clone begins with the highest epoch that the source ever promised, and serves under
//! higher ones only.

use std::collections::BTreeMap;

use super::super::keys;
use super::super::page::{Entry, FANOUT, Page, PageKind, PageName, TreeId, height_for};
use super::super::record::Seals;
use super::super::recovery::{
    Blank, Found, OpenError, check_first_salt, disk, make_blank, read_catalog, read_page, read_superblocks, read_table,
    write_superblocks,
};
use super::super::segment::{LINKED, SEGMENT_HEADER_BYTES, SegmentHeader, SegmentKind, Used, row};
use super::super::superblock::{Geometry, StreamPosition, Superblock};
use super::super::{FormatOptions, checkpoint::listed_page};
use super::catalog::{Catalog, ORIGINS_MAX, Origin};
use crate::buffer::Buf;
use crate::io::{Disk, FileId, SegmentId};
use crate::seal::{KeyError, KeyProof, KeyRow};
use crate::types::{Epoch, Location, PAGE_BYTES, SnapshotId, Version};

/// Pages written at a time.
const PAGES_PER_WRITE: usize = 64;

/// What a clone will be made of.
#[derive(Debug)]
pub struct ClonePlan {
    superblock: Superblock,
    catalog: Catalog,
    snapshot: usize,
    /// Source segment → its number in the clone, and its origin there.
    segments: BTreeMap<SegmentId, (SegmentId, usize)>,
    origins: Vec<Origin>,
    /// Salts of a sealed source, those of its own sources included.
    key_rows: Vec<KeyRow>,
}

impl ClonePlan {
    /// The files to link before [`write_clone`]: each file of the source's directory, and its name in the clone's. Links
    /// must be durable before that.
    pub fn links(&self) -> impl Iterator<Item = (FileId, FileId)> {
        let segments = self.segments.iter();
        segments.map(|(source, (target, _))| (FileId::Segment(*source), FileId::Segment(*target)))
    }

    /// Blocks of the snapshot: a clone has at least as many.
    pub fn size_blocks(&self) -> u64 {
        self.catalog.all()[self.snapshot].size_blocks
    }
}

/// Reads what a clone of a snapshot needs. If an engine serves the source, it holds it from before this until
/// [`write_clone`] is done; else nobody opens the source meanwhile.
pub fn plan_clone(source: &mut dyn Disk, id: SnapshotId) -> Result<ClonePlan, OpenError> {
    let Found { superblock, .. } = read_superblocks(source)?;
    let (catalog, _) = read_catalog(source, &superblock)?;
    let held = |snapshot: &super::Snapshot| snapshot.id == id && !snapshot.deleting;
    let Some(snapshot) = catalog.all().iter().position(held) else {
        return Err(OpenError::Invalid(format!(
            "the source has no snapshot {id} in its last checkpoint; expected one that was held, or a source that was \
             closed in order"
        )));
    };
    let mut key_rows = Vec::new();
    if superblock.geometry.sealed {
        key_rows = keys::read(source, &superblock.geometry.identity.replica)?.rows;
        // Nothing was written in epoch 0, nor in one that was never promised: the clone has these for its own.
        key_rows.retain(|row| (Epoch(1)..=superblock.epoch).contains(&row.epoch));
    }
    let identity = superblock.geometry.identity;
    let mut origins = vec![Origin {
        volume: identity.volume,
        salt: superblock.geometry.salt,
    }];
    origins.extend(catalog.origins());
    if origins.len() > ORIGINS_MAX {
        return Err(OpenError::Invalid(format!(
            "the source's blocks come from {ORIGINS_MAX} volumes already; expected fewer clones of clones, or one of a \
             copy"
        )));
    }
    let (used, _) = read_table(source, &superblock)?;
    let stored = used.iter().filter(|(_, used)| used.kind != SegmentKind::Meta);
    let segments = stored.zip(0..).map(|((id, used), n)| {
        let origin = if used.kind == SegmentKind::Linked {
            used.log_index as usize + 1
        } else {
            0
        };
        (*id, (SegmentId(LINKED + n), origin))
    });
    Ok(ClonePlan {
        segments: segments.collect(),
        superblock,
        catalog,
        snapshot,
        origins,
        key_rows,
    })
}

/// Makes the clone in a directory that holds the linked files and nothing else. It serves under epochs above the one
/// that is returned.
pub fn write_clone(
    source: &mut dyn Disk,
    target: &mut dyn Disk,
    plan: &ClonePlan,
    options: &FormatOptions,
) -> Result<Epoch, OpenError> {
    if plan.superblock.geometry.sealed {
        return Err(KeyError::NotGiven.into());
    }
    make_clone(source, target, plan, options, &[])
}

/// The same of a sealed source. `proof` is for epoch 0 of the clone, in which nothing is written, and of a ring that holds
/// the keys of every volume whose blocks are shared.
pub fn write_sealed_clone(
    source: &mut dyn Disk,
    target: &mut dyn Disk,
    plan: &ClonePlan,
    options: &FormatOptions,
    proof: &KeyProof,
) -> Result<Epoch, OpenError> {
    if !plan.superblock.geometry.sealed {
        // What is shared would stay in the clear.
        return Err(KeyError::NotSealed.into());
    }
    check_first_salt(options, proof)?;
    let mut rows = vec![proof.row];
    rows.extend(&plan.key_rows);
    rows.iter().try_for_each(|row| proof.covers(row))?;
    make_clone(source, target, plan, options, &rows)
}

fn make_clone(
    source: &mut dyn Disk,
    target: &mut dyn Disk,
    plan: &ClonePlan,
    options: &FormatOptions,
    keys: &[KeyRow],
) -> Result<Epoch, OpenError> {
    let segment_bytes = plan.superblock.geometry.segment_bytes;
    if options.size_blocks < plan.size_blocks() {
        return Err(OpenError::Invalid(format!(
            "a clone of {} blocks from a snapshot of {}; expected at least as many",
            options.size_blocks,
            plan.size_blocks()
        )));
    }
    if options.segment_bytes.is_some_and(|bytes| bytes != segment_bytes) {
        return Err(OpenError::Invalid(format!(
            "a clone shares its source's segments of {segment_bytes} bytes; expected no other length"
        )));
    }
    let block_size = plan.superblock.geometry.block_size;
    if options.block_size != block_size {
        return Err(OpenError::Invalid(format!(
            "a clone shares its source's blocks of {} bytes; expected no other size",
            block_size.bytes()
        )));
    }
    if options.identity.volume == plan.superblock.geometry.identity.volume {
        return Err(OpenError::Invalid("a clone is another volume than its source".into()));
    }
    let options = FormatOptions {
        segment_bytes: Some(segment_bytes),
        ..options.clone()
    };
    let Blank {
        mut superblock,
        next_segment,
    } = make_blank(target, &options, keys)?;
    let sources = plan.sources();
    let height = sources.iter().map(|tree| tree.height).max().unwrap_or(1);
    let height = height.max(height_for(options.size_blocks));
    let mut writer = Writer {
        source,
        target,
        plan,
        superblock: &superblock,
        stream: None,
        next_segment,
        metas: Vec::new(),
        waiting: Vec::new(),
        live: BTreeMap::new(),
    };
    let top = PageName {
        tree: TreeId::HEAD,
        level: height - 1,
        index: 0,
    };
    let root = writer.build(top, &sources)?;
    let catalog = writer.write_catalog()?;
    let table = writer.write_tables(superblock.checkpoint.replay.segment)?;
    let (meta, metas) = (writer.stream, std::mem::take(&mut writer.metas));
    for segment in metas {
        disk(target.sync(FileId::Segment(segment)), || {
            format!("syncing segment {} of the clone", segment.0)
        })?;
    }
    let epoch = plan.superblock.epoch;
    superblock.epoch = epoch;
    let checkpoint = &mut superblock.checkpoint;
    checkpoint.number = 1;
    checkpoint.height = height;
    checkpoint.root = root;
    checkpoint.table = table;
    checkpoint.catalog = catalog;
    checkpoint.meta = meta;
    checkpoint.replay.last = Version {
        epoch,
        ..Version::default()
    };
    write_superblocks(target, &superblock, 0)?;
    Ok(epoch)
}

/// A tree to be laid over others, or what is left of it further down.
#[derive(Clone, Copy, Debug)]
struct Overlay {
    tree: TreeId,
    height: u8,
    pointer: Entry,
}

impl ClonePlan {
    /// The head first, then the tables from the newest snapshot's to this one's: what comes later counts.
    fn sources(&self) -> Vec<Overlay> {
        let checkpoint = &self.superblock.checkpoint;
        let head = Overlay {
            tree: TreeId::HEAD,
            height: checkpoint.height,
            pointer: checkpoint.root,
        };
        let tables = self.catalog.all()[self.snapshot..].iter().rev();
        let tables = tables.map(|kept| Overlay {
            tree: kept.id.into(),
            height: kept.height,
            pointer: kept.root,
        });
        std::iter::once(head).chain(tables).collect()
    }

    fn here(&self, entry: Entry) -> Entry {
        let entry = entry.unmarked();
        if entry.location.is_none() {
            return entry;
        }
        let at = entry.location;
        let (segment, _) = self.segments[&at.segment()];
        Entry {
            location: Location::new(segment, at.offset(), at.len()),
            ..entry
        }
    }
}

struct Writer<'a> {
    source: &'a mut dyn Disk,
    target: &'a mut dyn Disk,
    plan: &'a ClonePlan,
    superblock: &'a Superblock,
    stream: Option<StreamPosition>,
    next_segment: u32,
    metas: Vec<SegmentId>,
    waiting: Vec<Buf>,
    live: BTreeMap<SegmentId, u32>,
}

impl Writer<'_> {
    /// Writes what the trees, laid over each other, say below `name`.
    fn build(&mut self, name: PageName, overlays: &[Overlay]) -> Result<Entry, OpenError> {
        // Nothing counts that lies under a tree which says something of all below.
        let covering = overlays.iter().rposition(|over| {
            let all = over.pointer.location.is_none() && name.level < over.height;
            all && (over.tree == TreeId::HEAD || !over.pointer.is_vacant())
        });
        let overlays = &overlays[covering.unwrap_or(0)..];
        if let [only] = overlays
            && covering.is_some()
        {
            return Ok(self.plan.here(only.pointer));
        }
        let mut pages = Vec::with_capacity(overlays.len());
        for over in overlays {
            let lies_here = !over.pointer.location.is_none() && name.level < over.height;
            let page = PageName {
                tree: over.tree,
                ..name
            };
            pages.push(if lies_here {
                let superblock = &self.plan.superblock;
                Some(read_page(self.source, superblock, over.pointer, PageKind::Map, page)?)
            } else {
                None
            });
        }
        let mut entries = vec![Entry::default(); FANOUT];
        for (slot, entry) in entries.iter_mut().enumerate() {
            let mut below: Vec<Overlay> = Vec::new();
            for (over, page) in overlays.iter().zip(&pages) {
                let over = match page {
                    Some(page) => Overlay {
                        pointer: page.entry(slot),
                        ..*over
                    },
                    // A tree that is lower than this level lies below the first slot, and says nothing of the others.
                    None if name.level >= over.height && slot > 0 => Overlay {
                        pointer: Entry::default(),
                        height: name.level,
                        ..*over
                    },
                    None => *over,
                };
                if over.tree == TreeId::HEAD || !over.pointer.is_vacant() {
                    below.push(over);
                }
            }
            *entry = if name.level == 0 {
                below
                    .last()
                    .map_or(Entry::default(), |over| self.plan.here(over.pointer))
            } else {
                self.build(name.child(slot), &below)?
            };
            if name.level == 0 && !entry.location.is_none() {
                *self.live.entry(entry.location.segment()).or_default() += entry.location.pages() as u32;
            }
        }
        let first = entries[0];
        if first.location.is_none() && entries.iter().all(|entry| *entry == first) {
            return Ok(first);
        }
        let geometry = &self.superblock.geometry;
        let page = if geometry.sealed {
            Page::encode_tagged(name, geometry.identity.replica, 1, &entries)
        } else {
            Page::encode(PageKind::Map, name, geometry.identity.replica, 1, &entries)
        };
        let version = entries.iter().map(|entry| entry.version).max();
        Ok(Entry {
            version: version.unwrap_or_default(),
            ..self.place(&page)?
        })
    }

    fn place(&mut self, page: &Page) -> Result<Entry, OpenError> {
        let segment_bytes = self.superblock.geometry.segment_bytes;
        let len = page.bytes().len() as u64;
        if self.stream.is_none_or(|at| at.offset + len > segment_bytes) {
            self.open_segment()?;
        }
        let at = self.stream.as_mut().expect("it was just made");
        let location = Location::new(at.segment, at.offset, len);
        at.offset += len;
        self.waiting.push(page.bytes().clone());
        *self.live.entry(location.segment()).or_default() += location.pages() as u32;
        if self.waiting.len() >= PAGES_PER_WRITE {
            self.flush()?;
        }
        Ok(Entry {
            location,
            check: page.check(),
            ..Entry::default()
        })
    }

    /// Goes on in a new segment.
    fn open_segment(&mut self) -> Result<(), OpenError> {
        self.flush()?;
        let segment = SegmentId(self.next_segment);
        self.next_segment += 1;
        let segment_bytes = self.superblock.geometry.segment_bytes;
        disk(self.target.create(FileId::Segment(segment), segment_bytes), || {
            format!("making segment {} of the clone", segment.0)
        })?;
        let header = SegmentHeader {
            kind: SegmentKind::Meta,
            segment,
            log_index: 0,
            epoch: self.plan.superblock.epoch,
        };
        self.waiting.push(header.encode(&self.superblock.geometry.identity));
        self.metas.push(segment);
        self.stream = Some(StreamPosition {
            segment,
            offset: SEGMENT_HEADER_BYTES,
        });
        Ok(())
    }

    fn flush(&mut self) -> Result<(), OpenError> {
        let Some(at) = self.stream else { return Ok(()) };
        let parts = std::mem::take(&mut self.waiting);
        if parts.is_empty() {
            return Ok(());
        }
        let offset = at.offset - parts.iter().map(|part| part.len() as u64).sum::<u64>();
        disk(self.target.write(FileId::Segment(at.segment), offset, &parts), || {
            format!("writing the map of the clone to segment {}", at.segment.0)
        })
    }

    fn write_catalog(&mut self) -> Result<Vec<Entry>, OpenError> {
        let mut catalog = Catalog::default();
        catalog.set_origins(self.plan.origins.clone());
        let replica = self.superblock.geometry.identity.replica;
        let pages: Vec<Page> = catalog.list_pages(replica, 1).collect();
        pages.iter().map(|page| self.place(page)).collect()
    }

    /// The segment table counts its own pages too, so they are placed before they are made.
    fn write_tables(&mut self, log: SegmentId) -> Result<Vec<Entry>, OpenError> {
        let replica = self.superblock.geometry.identity.replica;
        // A segment more than there are may be taken for these pages.
        let most = self.plan.segments.len() + self.metas.len() + 2;
        let own = most.div_ceil(FANOUT) + most.div_ceil(FANOUT).div_ceil(FANOUT);
        let segment_bytes = self.superblock.geometry.segment_bytes;
        let left = self.stream.map_or(0, |at| (segment_bytes - at.offset) / PAGE_BYTES);
        if left < own as u64 {
            self.open_segment()?;
        }
        let home = self.stream.expect("a page was placed").segment;
        let listed = self.plan.segments.len() + self.metas.len() + 1;
        let pages = listed.div_ceil(FANOUT);
        let own = (pages + pages.div_ceil(FANOUT)) as u32;
        let used = |kind, live, log_index| Used {
            kind,
            live,
            log_index,
            open: false,
        };
        let live = |id: &SegmentId| self.live.get(id).copied().unwrap_or(0);
        let mut rows = vec![row(log, &used(SegmentKind::Data, 0, 0))];
        rows.extend(self.metas.iter().map(|id| {
            let live = live(id) + if *id == home { own } else { 0 };
            row(*id, &used(SegmentKind::Meta, live, 0))
        }));
        rows.extend(
            self.plan
                .segments
                .values()
                .map(|(id, origin)| row(*id, &used(SegmentKind::Linked, live(id), *origin as u64))),
        );
        let mut write = |kind, entries: &[Entry]| -> Result<Vec<Entry>, OpenError> {
            let chunks = entries.chunks(FANOUT).enumerate();
            chunks
                .map(|(index, chunk)| self.place(&Page::encode(kind, listed_page(index), replica, 1, chunk)))
                .collect()
        };
        let pointers = write(PageKind::Table, &rows)?;
        let index = write(PageKind::TableIndex, &pointers)?;
        self.flush()?;
        Ok(index)
    }
}

/// Seals of the volumes that a clone's linked segments come from.
#[derive(Debug, Default)]
pub struct Origins {
    seals: Vec<Seals>,
    of: BTreeMap<SegmentId, usize>,
}

impl Origins {
    /// What the catalog and the segment table say.
    pub fn new(geometry: &Geometry, catalog: &Catalog, used: &BTreeMap<SegmentId, Used>) -> Result<Origins, OpenError> {
        let seals: Vec<Seals> = catalog.origins().iter().map(|origin| origin.seals(geometry)).collect();
        let linked = used.iter().filter(|(_, used)| used.kind == SegmentKind::Linked);
        let of: BTreeMap<SegmentId, usize> = linked.map(|(id, used)| (*id, used.log_index as usize)).collect();
        match of.iter().find(|(_, origin)| **origin >= seals.len()) {
            Some((id, origin)) => Err(OpenError::Damaged(format!(
                "segment {} comes from volume number {origin}, and {} are known",
                id.0,
                seals.len()
            ))),
            None => Ok(Origins { seals, of }),
        }
    }

    /// The seals of the blocks in a segment, if they are not the replica's own.
    pub fn seals(&self, segment: SegmentId) -> Option<Seals> {
        if segment.0 < LINKED {
            return None;
        }
        self.of.get(&segment).map(|origin| self.seals[*origin])
    }
}
