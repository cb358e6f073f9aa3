//! Finding what a block was at a snapshot, and who needs a stored block.
//!
//! Both go from the head back in time, from one version of the block to the one before: the version that the head has
//! was written after some snapshots and before others, and the newest of those before has a row with what it replaced,
//! and so on. So the cost is the number of versions of this block that are kept, not the number of snapshots.

use super::super::Store;
use super::super::map::Found;
use super::super::page::{Entry, PageName, TreeId};
use super::Snapshot;
use crate::types::{Lba, Location, Version};

/// Who needs a block or page at a place.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Holder {
    /// The map, or the table of the snapshot of this name.
    Tree(TreeId),
    /// Nobody.
    Nobody,
    /// This page has to be read first.
    NeedPage(PageName, Entry),
}

impl Store {
    fn find_kept(&mut self, snapshot: Snapshot, lba: Lba) -> Found {
        self.map
            .find_in(snapshot.id.into(), snapshot.root, snapshot.height, lba)
    }

    /// What `lba` was just after write `at`, which took a snapshot.
    pub(in super::super) fn find_at(&mut self, at: Version, lba: Lba) -> Found {
        let recent = self.recent.tables().rev();
        let frozen = self.frozen.iter().flat_map(|frozen| frozen.tables.iter().rev());
        let known = recent.chain(frozen).filter_map(|table| table.get(lba));
        if let Some(entry) = known.into_iter().find(|entry| entry.version <= at) {
            return Found::Entry(entry);
        }
        self.find_merged(lba, at)
    }

    /// The newest version of `lba` in the trees that is not newer than `at`: the head's, or what a snapshot from `at` on
    /// kept.
    fn find_merged(&mut self, lba: Lba, at: Version) -> Found {
        let mut entry = match self.map.find(lba) {
            Found::Entry(entry) => entry,
            need => return need,
        };
        let mut below = self.recent.catalog.before(entry.version);
        while entry.version > at && below > 0 {
            let snapshot = self.recent.catalog.all()[below - 1];
            if snapshot.version < at {
                break;
            }
            match self.find_kept(snapshot, lba) {
                // A deleted snapshot may have given its row away.
                Found::Entry(row) if row.is_vacant() => below -= 1,
                Found::Entry(row) => {
                    assert!(row.version <= snapshot.version, "a table holds what is older than it");
                    entry = row.unmarked();
                    below = (below - 1).min(self.recent.catalog.before(entry.version));
                }
                need => return need,
            }
        }
        Found::Entry(entry)
    }

    /// Who needs the block `lba` of `version` that lies at `location`, as of the last checkpoint and what the log has
    /// since.
    pub(in super::super) fn holder(&mut self, lba: Lba, version: Version, location: Location) -> Holder {
        let mut entry = match self.map.find(lba) {
            Found::Entry(entry) => entry,
            Found::NeedPage(name, pointer) => return Holder::NeedPage(name, pointer),
        };
        if entry.location == location {
            // The next checkpoint lets go of it if it was replaced and no snapshot lies in between.
            let replaced = self.recent.tables().find_map(|table| table.get(lba));
            let needed = replaced.is_none_or(|row| self.recent.catalog.keeper(version, row.version).is_some());
            return if needed {
                Holder::Tree(TreeId::HEAD)
            } else {
                Holder::Nobody
            };
        }
        let mut below = self.recent.catalog.before(entry.version);
        while entry.version > version && below > 0 {
            let snapshot = self.recent.catalog.all()[below - 1];
            if snapshot.version < version {
                break;
            }
            match self.find_kept(snapshot, lba) {
                Found::Entry(row) if row.location == location => return Holder::Tree(snapshot.id.into()),
                Found::Entry(row) if row.is_vacant() => below -= 1,
                Found::Entry(row) => {
                    entry = row;
                    below = (below - 1).min(self.recent.catalog.before(entry.version));
                }
                Found::NeedPage(name, pointer) => return Holder::NeedPage(name, pointer),
            }
        }
        Holder::Nobody
    }

    /// Who needs the page `name` that lies at `location`.
    pub(in super::super) fn page_holder(&mut self, name: PageName, location: Location) -> Holder {
        let (root, height) = if name.tree == TreeId::HEAD {
            (self.map.root, self.map.height)
        } else {
            let snapshots = self.recent.catalog.all();
            match snapshots.iter().find(|snapshot| name.tree == snapshot.id.into()) {
                Some(snapshot) => (snapshot.root, snapshot.height),
                None => return Holder::Nobody,
            }
        };
        if name.level >= height {
            return Holder::Nobody;
        }
        match self.map.find_page(name, root, height) {
            Found::Entry(entry) if entry.location == location => Holder::Tree(name.tree),
            Found::Entry(_) => Holder::Nobody,
            Found::NeedPage(name, pointer) => Holder::NeedPage(name, pointer),
        }
    }
}
