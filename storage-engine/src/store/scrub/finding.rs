//! What a scrub found, and what became of it.

use std::collections::BTreeMap;
use std::fmt;

use super::super::page::TreeId;
use crate::io::SegmentId;
use crate::types::{Lba, Location, SnapshotId, Version};

/// Findings that are listed; more are only counted.
const LISTED_MAX: usize = 256;

/// Something stored that does not pass its check.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Damage {
    pub thing: DamagedThing,
    /// Of the write that made it; for a page, the newest below it.
    pub version: Version,
    /// Where it lies.
    pub segment: SegmentId,
    /// Bytes from the start of the segment.
    pub offset: u64,
    pub why: String,
}

/// What it is, in words of the volume.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum DamagedThing {
    /// A block, as the volume has it or as this snapshot keeps it.
    Block { lba: Lba, snapshot: Option<SnapshotId> },
    /// A page of the map: blocks from `first` on cannot be found.
    Page {
        first: Lba,
        level: u8,
        snapshot: Option<SnapshotId>,
    },
    /// A page of the list of segments or of snapshots. The next checkpoint writes these anew.
    List,
}

impl fmt::Display for Damage {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let snapshot = match self.thing {
            DamagedThing::Block { lba, snapshot } => {
                write!(f, "block {} version {}", lba.0, self.version)?;
                snapshot
            }
            DamagedThing::Page { first, level, snapshot } => {
                write!(f, "the page of level {level} from block {} on", first.0)?;
                snapshot
            }
            DamagedThing::List => {
                write!(f, "a list of segments or snapshots")?;
                None
            }
        };
        if let Some(id) = snapshot {
            write!(f, " of snapshot {id}")?;
        }
        write!(f, " at segment {} offset {}: {}", self.segment.0, self.offset, self.why)
    }
}

pub(super) fn snapshot_of(tree: TreeId) -> Option<SnapshotId> {
    (tree != TreeId::HEAD).then_some(SnapshotId(tree.0))
}

/// What is known to be damaged.
#[derive(Debug, Default)]
pub(super) struct Findings {
    listed: BTreeMap<(DamagedThing, SegmentId, u64), Found>,
    /// Found in this pass, and not listed.
    more: u64,
}

#[derive(Debug)]
struct Found {
    damage: Damage,
    /// The pass that saw it last.
    pass: u64,
}

impl Findings {
    pub fn is_empty(&self) -> bool {
        self.listed.is_empty()
    }

    pub fn count(&self) -> u64 {
        self.listed.len() as u64 + self.more
    }

    pub fn list(&self) -> Vec<Damage> {
        self.listed.values().map(|found| found.damage.clone()).collect()
    }

    /// True if it is news.
    pub fn add(&mut self, damage: Damage, pass: u64) -> bool {
        let key = (damage.thing, damage.segment, damage.offset);
        if let Some(known) = self.listed.get_mut(&key) {
            known.pass = pass;
            return false;
        }
        if self.listed.len() == LISTED_MAX {
            self.more += 1;
        } else {
            self.listed.insert(key, Found { damage, pass });
        }
        true
    }

    /// It was read, and passed.
    pub fn sound(&mut self, thing: DamagedThing, at: Location) {
        if !self.listed.is_empty() {
            self.listed.remove(&(thing, at.segment(), at.offset()));
        }
    }

    /// The guest has written these blocks anew.
    pub fn replaced(&mut self, start: Lba, end: Lba) {
        self.listed.retain(|(thing, ..), _| {
            !matches!(thing, DamagedThing::Block { lba, snapshot: None } if (start..end).contains(lba))
        });
    }

    /// What a whole pass did not see again is not needed any more.
    pub fn end_pass(&mut self, pass: u64) {
        self.listed.retain(|_, found| found.pass == pass);
        if self.listed.len() < LISTED_MAX {
            self.more = 0;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn damage(lba: u64) -> Damage {
        Damage {
            thing: DamagedThing::Block {
                lba: Lba(lba),
                snapshot: None,
            },
            version: Version::default(),
            segment: SegmentId(1),
            offset: lba * 4096,
            why: "it is a test".into(),
        }
    }

    #[test]
    fn a_finding_is_news_once_and_goes_with_the_next_write() {
        let mut findings = Findings::default();
        assert!(findings.add(damage(7), 1));
        assert!(!findings.add(damage(7), 2));
        findings.replaced(Lba(8), Lba(20));
        assert_eq!(findings.count(), 1);
        findings.replaced(Lba(0), Lba(8));
        assert_eq!(findings.count(), 0);
    }

    #[test]
    fn what_a_pass_does_not_see_again_is_forgotten() {
        let mut findings = Findings::default();
        for lba in 0..3 {
            findings.add(damage(lba), 1);
        }
        findings.add(damage(1), 2);
        findings.end_pass(2);
        assert_eq!(findings.list(), [damage(1)]);
    }

    #[test]
    fn more_than_can_be_listed_are_counted() {
        let mut findings = Findings::default();
        for lba in 0..LISTED_MAX as u64 + 5 {
            findings.add(damage(lba), 1);
        }
        assert_eq!(
            (findings.list().len(), findings.count()),
            (LISTED_MAX, LISTED_MAX as u64 + 5)
        );
    }
}
