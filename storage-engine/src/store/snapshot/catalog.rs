//! The list of snapshots: in memory, and as pages that a checkpoint writes.

use super::super::checkpoint::listed_page;
use super::super::format::{Get, Put};
use super::super::page::{Entry, FANOUT, HEIGHT_MAX, Page, PageKind, TreeId};
use super::super::record::Seals;
use super::super::superblock::Geometry;
use crate::types::{Epoch, Seq, SnapshotId, Version};

/// Most snapshots of a volume, deleted ones that still have something to give back included.
pub const SNAPSHOTS_MAX: usize = 1000;
/// Bytes of a row.
pub const ROW_BYTES: usize = 96;
/// Snapshots in a page of the catalog.
pub const ROWS_PER_PAGE: usize = FANOUT * 24 / ROW_BYTES;
const _: () = assert!(ROWS_PER_PAGE == 42);
const KIND_SNAPSHOT: u8 = 1;
const KIND_ORIGIN: u8 = 2;
/// Most volumes that blocks of a replica come from: a clone of a clone has two, and so on.
pub const ORIGINS_MAX: usize = 8;

/// A snapshot.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Snapshot {
    pub id: SnapshotId,
    /// The write that took it: it holds every one before.
    pub version: Version,
    /// Blocks of the volume then; nothing behind them belongs to it.
    pub size_blocks: u64,
    /// When, as the caller said.
    pub time_ms: u64,
    /// Its table: what was replaced between this snapshot and the next.
    pub root: Entry,
    /// Levels of the table.
    pub height: u8,
    /// Pages of 4 KiB that the blocks in the table are stored in.
    pub pages: u64,
    /// Nobody can see it any more; its table is being given back.
    pub deleting: bool,
}

impl Snapshot {
    pub fn new(id: SnapshotId, version: Version, size_blocks: u64, time_ms: u64) -> Snapshot {
        Snapshot {
            id,
            version,
            size_blocks,
            time_ms,
            root: Entry::default(),
            height: 1,
            pages: 0,
            deleting: false,
        }
    }

    fn put(&self, put: &mut Put<'_>) {
        put.u8(KIND_SNAPSHOT)
            .u8(self.height)
            .u8(u8::from(self.deleting))
            .u8(0)
            .u32(self.version.epoch.0)
            .u64(self.version.seq.0)
            .bytes(&self.id.0)
            .u64(self.size_blocks)
            .u64(self.time_ms)
            .u64(self.pages);
        self.root.put(put);
        put.bytes(&[0; 16]);
    }

    /// Its row in the catalog.
    pub fn encode(&self) -> [u8; ROW_BYTES] {
        let mut bytes = [0; ROW_BYTES];
        self.put(&mut Put::new(&mut bytes));
        bytes
    }

    /// `None` for a row that is no snapshot.
    fn get(get: &mut Get<'_>) -> Option<Snapshot> {
        let (kind, height, deleting, _) = (get.u8(), get.u8(), get.u8(), get.u8());
        let version = Version {
            epoch: Epoch(get.u32()),
            seq: Seq(get.u64()),
        };
        let snapshot = Snapshot {
            version,
            id: SnapshotId(get.array()),
            size_blocks: get.u64(),
            time_ms: get.u64(),
            pages: get.u64(),
            root: Entry::get(get),
            height,
            deleting: deleting == 1,
        };
        get.array::<16>();
        (kind == KIND_SNAPSHOT && height > 0).then_some(snapshot)
    }
}

/// A volume whose blocks a clone shares.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Origin {
    pub volume: [u8; 16],
    /// The salt of the replica that wrote them.
    pub salt: u64,
}

impl Origin {
    /// The seals of its blocks and record headers in a replica like this.
    pub fn seals(&self, geometry: &Geometry) -> Seals {
        Seals::of_origin(geometry, self.volume, self.salt)
    }

    /// Its row in the catalog.
    pub fn encode(&self) -> [u8; ROW_BYTES] {
        let mut bytes = [0; ROW_BYTES];
        Put::new(&mut bytes)
            .u8(KIND_ORIGIN)
            .seek(8)
            .bytes(&self.volume)
            .u64(self.salt);
        bytes
    }

    fn decode(bytes: &[u8; ROW_BYTES]) -> Option<Origin> {
        let mut get = Get::new(bytes);
        let kind = get.u8();
        get.seek(8);
        let (volume, salt) = (get.array(), get.u64());
        (kind == KIND_ORIGIN).then_some(Origin { volume, salt })
    }
}

/// The snapshots of a volume, oldest first.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Catalog {
    /// Volumes that the replica's linked segments come from. They stay for good.
    origins: Vec<Origin>,
    list: Vec<Snapshot>,
    /// How many of them are deleted: asked after every disk operation.
    deleted: usize,
}

impl Catalog {
    pub fn origins(&self) -> &[Origin] {
        &self.origins
    }

    pub fn set_origins(&mut self, origins: Vec<Origin>) {
        self.origins = origins;
    }

    /// Map pages that the list takes.
    pub fn page_count(&self) -> usize {
        (self.origins.len() + self.list.len()).div_ceil(ROWS_PER_PAGE)
    }

    /// The list as map pages: origins, then snapshots.
    pub fn list_pages(&self, replica: [u8; 16], checkpoint: u64) -> impl Iterator<Item = Page> {
        let origins = self.origins.iter().map(Origin::encode);
        let rows: Vec<[u8; ROW_BYTES]> = origins.chain(self.list.iter().map(Snapshot::encode)).collect();
        (0..self.page_count()).map(move |index| {
            let chunk = rows.chunks(ROWS_PER_PAGE).nth(index).expect("a page has rows");
            Page::encode_with(
                PageKind::Catalog,
                listed_page(index),
                replica,
                checkpoint,
                chunk.len(),
                |put| {
                    for row in chunk {
                        put.bytes(row);
                    }
                },
            )
        })
    }

    /// Takes a row of a page; `false` if it is none.
    pub fn add_row(&mut self, row: &[u8; ROW_BYTES]) -> bool {
        if let Some(origin) = Origin::decode(row) {
            self.origins.push(origin);
            return true;
        }
        let snapshot = Snapshot::get(&mut Get::new(row));
        let fits = |new: &Snapshot| {
            self.list.last().is_none_or(|last| last.version < new.version)
                && self.takes(new.id)
                && (1..=HEIGHT_MAX).contains(&new.height)
                && new.root.may_lead_to_page()
                && new.root.version <= new.version
        };
        let Some(snapshot) = snapshot.filter(fits) else {
            return false;
        };
        self.add(snapshot);
        true
    }

    /// True if a snapshot may have this name: it is one, and none has it.
    pub fn takes(&self, id: SnapshotId) -> bool {
        TreeId::from(id) != TreeId::HEAD && self.find(id).is_none()
    }

    pub fn add(&mut self, snapshot: Snapshot) {
        let last = self.list.last().map(|last| last.version);
        assert!(
            last.is_none_or(|last| last < snapshot.version),
            "snapshots come in order"
        );
        self.deleted += usize::from(snapshot.deleting);
        self.list.push(snapshot);
    }

    pub fn len(&self) -> usize {
        self.list.len()
    }

    pub fn is_empty(&self) -> bool {
        self.list.is_empty()
    }

    /// All of them, oldest first.
    pub fn all(&self) -> &[Snapshot] {
        &self.list
    }

    pub fn get_mut(&mut self, index: usize) -> &mut Snapshot {
        &mut self.list[index]
    }

    /// Those that were not deleted, oldest first.
    pub fn held(&self) -> impl Iterator<Item = &Snapshot> {
        self.list.iter().filter(|snapshot| !snapshot.deleting)
    }

    pub fn find(&self, id: SnapshotId) -> Option<&Snapshot> {
        self.list.iter().find(|snapshot| snapshot.id == id)
    }

    /// The snapshot whose table this is; none for the map.
    pub fn of_tree(&self, tree: TreeId) -> Option<usize> {
        let position = self.list.iter().position(|snapshot| tree == snapshot.id.into());
        assert!(
            position.is_some() || tree == TreeId::HEAD,
            "a tree belongs to a snapshot that is there"
        );
        position
    }

    /// How many were taken before `version`.
    pub fn before(&self, version: Version) -> usize {
        self.list.partition_point(|snapshot| snapshot.version < version)
    }

    /// Whose table takes an entry of version `old` that was replaced at `new`: the newest snapshot in between. None: nobody
    /// needs it any more.
    pub fn keeper(&self, old: Version, new: Version) -> Option<usize> {
        let newest = self.list[..self.before(new)]
            .iter()
            .rposition(|snapshot| !snapshot.deleting)?;
        (self.list[newest].version >= old).then_some(newest)
    }

    /// The newest snapshot before the one at `index` that was not deleted.
    pub fn held_before(&self, index: usize) -> Option<usize> {
        self.list[..index].iter().rposition(|snapshot| !snapshot.deleting)
    }

    /// The snapshot is deleted; its table is given back in time.
    pub fn let_go(&mut self, id: SnapshotId) {
        let snapshot = self.list.iter_mut().find(|snapshot| snapshot.id == id);
        snapshot.expect("only a snapshot that is there is deleted").deleting = true;
        self.deleted += 1;
    }

    /// Some were deleted and their tables are not given back yet.
    pub fn has_deleted(&self) -> bool {
        self.deleted > 0
    }

    /// Pages that the blocks in all tables are stored in: needed beside those of the map.
    pub fn pages(&self) -> u64 {
        self.list.iter().map(|snapshot| snapshot.pages).sum()
    }

    pub fn retain(&mut self, keep: impl FnMut(&Snapshot) -> bool) {
        self.list.retain(keep);
        self.deleted = self.list.iter().filter(|snapshot| snapshot.deleting).count();
    }

    /// Takes over what a checkpoint that was frozen at `frozen` made of the tables.
    pub fn committed(&mut self, frozen: Version, committed: &Catalog) {
        self.list.retain_mut(|snapshot| {
            let Ok(index) = committed
                .list
                .binary_search_by_key(&snapshot.version, |other| other.version)
            else {
                return snapshot.version > frozen;
            };
            let after = &committed.list[index];
            (snapshot.root, snapshot.height, snapshot.pages) = (after.root, after.height, after.pages);
            true
        });
        self.retain(|_| true);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn version(seq: u64) -> Version {
        Version {
            epoch: Epoch(1),
            seq: Seq(seq),
        }
    }

    fn catalog(versions: &[u64]) -> Catalog {
        let mut catalog = Catalog::default();
        for seq in versions {
            catalog.add(Snapshot::new(SnapshotId([*seq as u8; 16]), version(*seq), 100, 0));
        }
        catalog
    }

    #[test]
    fn a_snapshot_gives_back_what_it_was_made_of() {
        let mut snapshot = Snapshot::new(SnapshotId([3; 16]), version(77), 1 << 28, 12);
        (snapshot.height, snapshot.pages, snapshot.deleting) = (4, 900, true);
        assert_eq!(Snapshot::get(&mut Get::new(&snapshot.encode())), Some(snapshot));
        assert_eq!(Snapshot::get(&mut Get::new(&[0; ROW_BYTES])), None);
    }

    #[test]
    fn the_newest_snapshot_between_two_versions_keeps_the_older_one() {
        let mut snapshots = catalog(&[10, 20, 30]);
        let keeper = |catalog: &Catalog, old, new| catalog.keeper(version(old), version(new));
        assert_eq!(keeper(&snapshots, 5, 8), None, "older than every snapshot");
        assert_eq!(keeper(&snapshots, 5, 15), Some(0));
        assert_eq!(keeper(&snapshots, 5, 35), Some(2), "one referrer: the newest");
        assert_eq!(keeper(&snapshots, 22, 28), None);
        snapshots.let_go(SnapshotId([30; 16]));
        assert_eq!(keeper(&snapshots, 15, 35), Some(1), "a deleted one keeps nothing more");
        assert_eq!(keeper(&snapshots, 25, 35), None);
    }
}
