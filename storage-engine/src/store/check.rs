//! Verifying a replica offline, with the code that the engine itself reads it by. Nothing is written.

use std::collections::BTreeMap;

use ring::digest;

use super::keys;
use super::log::Op;
use super::page::{Entry, PageKind, PageName, TreeId, span};
use super::record::{ControlOp, Seals};
use super::recovery::{
    Found, OpenError, makes_sense, read_catalog, read_page, read_superblocks, read_table, replay, segment_files,
};
use super::segment::Used;
use super::snapshot::{Catalog, Origins, Snapshot};
use super::superblock::Superblock;
use crate::buffer::BufMut;
use crate::io::{Disk, FileId, SegmentId};
use crate::types::{Lba, Location, SnapshotId, Version};

/// What a check found.
#[derive(Debug, Default)]
pub struct CheckReport {
    /// What is wrong, one sentence each. Empty means that every byte that matters passed.
    pub problems: Vec<String>,
    /// What is worth knowing, and harms nothing.
    pub notes: Vec<String>,
    /// Blocks of the volume that hold data and were read and verified.
    pub blocks: u64,
    /// Pages of the map that were verified.
    pub pages: u64,
    /// Records behind the checkpoint.
    pub replayed_records: u64,
    /// Used segments.
    pub segments: u64,
    /// Snapshots, deleted ones that still have something to give back not counted.
    pub snapshots: u64,
    /// SHA-256 of the volume's size and of every block that holds data: where it is, its version, and the bytes that it is
    /// stored in. Replicas of one volume that have all of it have the same. `None` if there is a problem.
    pub digest: Option<[u8; 32]>,
}

/// Verifies the whole replica: superblocks, segment table, map, what snapshots keep, every block that is needed, and the
/// tail of the log. Fails only if the replica cannot be read at all.
pub fn check(on: &mut dyn Disk) -> Result<CheckReport, OpenError> {
    let Found { superblock, other, .. } = read_superblocks(on)?;
    let mut report = CheckReport::default();
    if let Some(wrong) = other {
        report
            .problems
            .push(format!("{wrong} (the other one is valid and is used)"));
    }
    if superblock.geometry.sealed {
        match keys::read(on, &superblock.geometry.identity.replica) {
            Ok(keys) => report.problems.extend(
                keys.damaged
                    .map(|wrong| format!("{wrong} (the other one is whole and is used)")),
            ),
            Err(error) => report.problems.push(error.to_string()),
        }
    }
    let files = segment_files(on)?;
    let (used, mut listed_pages) = read_table(on, &superblock)?;
    let (catalog, catalog_pages) = read_catalog(on, &superblock)?;
    listed_pages.extend(catalog_pages);
    report.segments = used.len() as u64;
    report.snapshots = catalog.held().count() as u64;
    for id in used.keys().filter(|id| !files.contains_key(id)) {
        report.problems.push(format!("segment {} is missing", id.0));
    }
    let mut walk = Walk {
        on,
        superblock: &superblock,
        report,
        live: BTreeMap::new(),
        rows: Rows::default(),
    };
    for location in listed_pages {
        *walk.live.entry(location.segment()).or_default() += 1;
    }
    let checkpoint = &superblock.checkpoint;
    let head = walk.tree(TreeId::HEAD, checkpoint.root, checkpoint.height);
    let tables = catalog.all().iter();
    let tables = tables
        .map(|kept| walk.tree(kept.id.into(), kept.root, kept.height))
        .collect();
    let Walk { mut report, live, .. } = walk;
    compare_live(&mut report, &used, &live);
    let mut volume = Blocks { catalog, head, tables };
    volume.compare(&mut report);

    match replay(on, &superblock, &files, &used) {
        Ok(tail) if let Err(error) = makes_sense(&tail.ops, &volume.catalog) => {
            report.problems.push(error.to_string());
        }
        Ok(tail) => {
            tail.ops.iter().for_each(|op| volume.apply(op));
            report.replayed_records = tail.report.replayed_records;
            if let Some((segment, offset)) = tail.report.torn_at {
                report.notes.push(format!(
                    "the replica was not closed in order; its log ends at segment {segment} offset {offset}"
                ));
            }
        }
        Err(error) => report.problems.push(error.to_string()),
    }
    match Origins::new(&superblock.geometry, &volume.catalog, &used) {
        Ok(origins) => {
            let digest = verify_blocks(on, &superblock, &origins, &volume, &mut report);
            report.digest = report.problems.is_empty().then_some(digest);
        }
        Err(error) => report.problems.push(error.to_string()),
    }
    Ok(report)
}

fn compare_live(report: &mut CheckReport, used: &BTreeMap<SegmentId, Used>, live: &BTreeMap<SegmentId, u64>) {
    for (id, counted) in live {
        let noted = used.get(id).map(|row| u64::from(row.live));
        if noted != Some(*counted) {
            let noted = noted.map_or("is not in the segment table".into(), |noted| {
                format!("is noted with {noted}")
            });
            report
                .problems
                .push(format!("segment {} holds {counted} needed pages and {noted}", id.0));
        }
    }
    for (id, row) in used.iter().filter(|(id, row)| row.live > 0 && !live.contains_key(id)) {
        report.problems.push(format!(
            "segment {} is noted with {} needed pages and holds none",
            id.0, row.live
        ));
    }
}

struct Walk<'a> {
    on: &'a mut dyn Disk,
    superblock: &'a Superblock,
    report: CheckReport,
    live: BTreeMap<SegmentId, u64>,
    rows: Rows,
}

impl Walk<'_> {
    fn tree(&mut self, tree: TreeId, root: Entry, height: u8) -> Rows {
        self.page(PageName::of(tree, height - 1, Lba(0)), root);
        std::mem::take(&mut self.rows)
    }

    fn page(&mut self, name: PageName, pointer: Entry) {
        if pointer.location.is_none() {
            if !pointer.is_vacant() {
                self.rows.insert(name.first(), (span(name.level), pointer));
            }
            return;
        }
        *self.live.entry(pointer.location.segment()).or_default() += pointer.location.pages();
        let page = match read_page(self.on, self.superblock, pointer, PageKind::Map, name) {
            Ok(page) => page,
            Err(error) => {
                let last = name.first().0.saturating_add(span(name.level) - 1);
                self.report
                    .problems
                    .push(format!("blocks {} to {last} cannot be found: {error}", name.first().0));
                return;
            }
        };
        self.report.pages += 1;
        for (slot, entry) in page.entries().into_iter().enumerate() {
            if name.level > 0 {
                self.page(name.child(slot), entry);
            } else if !entry.is_vacant() {
                if !entry.location.is_none() {
                    *self.live.entry(entry.location.segment()).or_default() += entry.location.pages();
                }
                self.rows.insert(name.lba_of(slot), (1, entry));
            }
        }
    }
}

/// Rows of a tree: first block, number of blocks, entry.
type Rows = BTreeMap<Lba, (u64, Entry)>;

/// Who needs which block: the volume and its snapshots, told by other code than the engine's.
struct Blocks {
    catalog: Catalog,
    head: Rows,
    /// What each snapshot keeps.
    tables: Vec<Rows>,
}

impl Blocks {
    /// Every stored block has one referrer, and each table holds what it should.
    fn compare(&self, report: &mut CheckReport) {
        let mut places: BTreeMap<Location, Lba> = BTreeMap::new();
        let rows = self.head.iter().chain(self.tables.iter().flatten());
        for (lba, (_, entry)) in rows.filter(|(_, (_, entry))| !entry.location.is_none()) {
            if let Some(other) = places.insert(entry.location, *lba) {
                report.problems.push(format!(
                    "blocks {} and {} have one place, {:?}",
                    other.0, lba.0, entry.location
                ));
            }
        }
        for (index, (kept, rows)) in self.catalog.all().iter().zip(&self.tables).enumerate() {
            let pages: u64 = rows.values().map(|(_, entry)| entry.location.pages()).sum();
            if pages != kept.pages {
                report.problems.push(format!(
                    "snapshot {} keeps {pages} pages and is noted with {}",
                    kept.id, kept.pages
                ));
            }
            for (lba, (_, entry)) in rows {
                let mut older = self.catalog.before(entry.version)..index;
                let twice = older.any(|older| covers(&self.tables[older], *lba));
                if twice || entry.version > kept.version {
                    report.problems.push(format!(
                        "snapshot {} of version {} should not keep block {} of version {}",
                        kept.id, kept.version, lba.0, entry.version
                    ));
                }
            }
        }
    }

    fn apply(&mut self, op: &Op) {
        match *op {
            Op::Block(lba, entry) => {
                self.replace(lba, entry.version, true);
                self.head.insert(lba, (1, entry));
            }
            Op::Zero(start, end, version) => {
                let covered: Vec<Lba> = self.head.range(start..end).map(|(lba, _)| *lba).collect();
                covered.into_iter().for_each(|lba| self.replace(lba, version, false));
            }
            Op::Control(op, version) => match op {
                ControlOp::Snapshot {
                    id,
                    time_ms,
                    size_blocks,
                } => {
                    self.catalog.add(Snapshot::new(id, version, size_blocks, time_ms));
                    self.tables.push(Rows::new());
                }
                ControlOp::Delete { id } => self.catalog.let_go(id),
                ControlOp::Revert { id } => self.revert(id),
            },
        }
    }

    /// The head lets go of a block; the newest snapshot since it was written takes it.
    fn replace(&mut self, lba: Lba, version: Version, hole_too: bool) {
        let stored = self.head.get(&lba).filter(|(_, entry)| !entry.location.is_none());
        let (old, stored) = (stored.map_or(Entry::default(), |(_, entry)| *entry), stored.is_some());
        if stored {
            self.head.remove(&lba);
        } else if !hole_too {
            return;
        }
        if let Some(keeper) = self.catalog.keeper(old.version, version)
            && !covers(&self.tables[keeper], lba)
        {
            self.tables[keeper].insert(lba, (1, old));
        }
    }

    fn revert(&mut self, id: SnapshotId) {
        let to = self
            .catalog
            .find(id)
            .expect("a revert goes to a snapshot that is there")
            .version;
        while let Some(index) = self.tables.len().checked_sub(1) {
            let kept = self.catalog.all()[index];
            if kept.version < to {
                break;
            }
            for (lba, (blocks, entry)) in std::mem::take(&mut self.tables[index]) {
                let end = Lba(lba.0.saturating_add(blocks));
                let covered: Vec<Lba> = self.head.range(lba..end).map(|(lba, _)| *lba).collect();
                for lba in covered {
                    self.head.remove(&lba);
                }
                self.head.insert(lba, (blocks, entry));
            }
            if kept.version == to {
                break;
            }
            self.tables.pop();
            self.catalog.retain(|other| other.version != kept.version);
        }
    }

    /// Whether this is what the volume itself shows there, and not only a snapshot.
    fn shows(&self, lba: Lba, entry: Entry) -> bool {
        self.head.get(&lba).is_some_and(|(_, shown)| *shown == entry)
    }

    /// Every block that the volume or a snapshot needs.
    fn needed(&self) -> Vec<(Lba, Entry)> {
        let mut needed: Vec<(Lba, Entry)> = self.head.iter().map(|(lba, (_, entry))| (*lba, *entry)).collect();
        for (index, (kept, rows)) in self.catalog.all().iter().zip(&self.tables).enumerate() {
            // Of a deleted one only what an older one that is held needs.
            let holder = if kept.deleting {
                self.catalog.held_before(index)
            } else {
                Some(index)
            };
            let Some(holder) = holder else { continue };
            let version = self.catalog.all()[holder].version;
            let rows = rows.iter().filter(|(_, (_, entry))| entry.version <= version);
            needed.extend(rows.map(|(lba, (_, entry))| (*lba, *entry)));
        }
        needed.retain(|(_, entry)| !entry.location.is_none());
        needed.sort_by_key(|(lba, entry)| (*lba, entry.version));
        needed
    }
}

/// True if a row says something about `lba`.
fn covers(rows: &Rows, lba: Lba) -> bool {
    let before = rows.range(..=lba).next_back();
    before.is_some_and(|(first, (blocks, _))| lba.0 - first.0 < *blocks)
}

/// Gives what becomes [`CheckReport::digest`] if all is well.
fn verify_blocks(
    on: &mut dyn Disk,
    superblock: &Superblock,
    origins: &Origins,
    volume: &Blocks,
    report: &mut CheckReport,
) -> [u8; 32] {
    let mut digest = digest::Context::new(&digest::SHA256);
    digest.update(&superblock.size_bytes().to_le_bytes());
    let seals = Seals::of(&superblock.geometry);
    let block_bytes = superblock.geometry.block_size.bytes();
    let mut buf = BufMut::zeroed(block_bytes as usize);
    for (lba, entry) in &volume.needed() {
        report.blocks += 1;
        let (segment, offset) = (entry.location.segment(), entry.location.offset());
        let place = format!(
            "block {} (version {}) at segment {} offset {offset}",
            lba.0, entry.version, segment.0
        );
        if lba.0 >= superblock.checkpoint.size_blocks {
            report.problems.push(format!("{place} lies outside the volume"));
        }
        if entry.location.len() > block_bytes {
            report.problems.push(format!("{place} is longer than a block"));
            continue;
        }
        let stored = &mut buf.as_mut()[..entry.location.len() as usize];
        match on.read(FileId::Segment(segment), offset, stored) {
            Err(error) => report.problems.push(format!("{place}: {error}")),
            Ok(()) => {
                let seals = origins.seals(segment).unwrap_or(seals);
                if seals.block(*lba, entry.version, stored) != entry.check.crc {
                    report.problems.push(format!("{place} does not pass its check"));
                }
                if volume.shows(*lba, *entry) {
                    let Version { epoch, seq } = entry.version;
                    for number in [lba.0, u64::from(epoch.0), seq.0, entry.location.len()] {
                        digest.update(&number.to_le_bytes());
                    }
                    digest.update(stored);
                }
            }
        }
    }
    digest.finish().as_ref().try_into().expect("SHA-256 has 32 bytes")
}
