//! Whether a guest saw what a disk would have shown.
//!
//! The simulator knows in which order the writes of a block were put: by version. So a history is linearizable if every
//! read finds the version of a write that was really made, no older than what was complete, or had been seen, when it
//! began; and if no write completes in an order that time contradicts. When an epoch begins it is decided once how much of
//! the older ones there is: everything that was completed, or, when power was cut under all members, everything that a
//! flush covered. What is behind that is never seen again. Of a volume whose writes are answered by the first copy the
//! tail may go with that copy, but nothing in between.

use std::collections::BTreeMap;

use galleonfs_storage_engine::types::{Epoch, Lba, Version};

/// Something that must not happen.
pub type Violation = String;

/// What is known of one block.
#[derive(Clone, Debug, Default)]
struct Block {
    /// What every write wrote; none: zeros.
    writes: BTreeMap<Version, Option<u64>>,
    /// What a read that begins now may find at the oldest.
    floor: Version,
    /// The same for writes alone.
    completed: Version,
    /// What a power cut may leave at the oldest.
    flushed: Version,
}

/// See the module.
#[derive(Debug, Default)]
pub struct Oracle {
    blocks: BTreeMap<Lba, Block>,
    /// The newest one that was served.
    epoch: Epoch,
    /// Writes complete when one member has them.
    first_copy: bool,
    /// Reads that were checked.
    pub reads: u64,
    /// Writes that completed.
    pub writes: u64,
    /// Flushes that completed.
    pub flushes: u64,
}

/// What was true of some blocks at a time.
pub type Floors = BTreeMap<Lba, Version>;

impl Oracle {
    /// Of a volume that nobody wrote to; `first_copy`: its writes complete when one member has them.
    pub fn new(first_copy: bool) -> Oracle {
        Oracle {
            first_copy,
            ..Oracle::default()
        }
    }

    /// A write begins; what comes back is to be handed in when it completes.
    pub fn write_begins(&mut self, lba: Lba, version: Version, id: Option<u64>) -> Version {
        let block = self.blocks.entry(lba).or_default();
        let other = block.writes.insert(version, id);
        assert!(other.is_none(), "I3: write {version} of block {} was made twice", lba.0);
        block.floor
    }

    /// A write completed that began when `floor` was the oldest that could be read.
    pub fn write_completes(&mut self, lba: Lba, version: Version, floor: Version) -> Result<(), Violation> {
        self.writes += 1;
        if self.first_copy && version.epoch < self.epoch {
            return Err(format!(
                "I3: block {}: write {version} completed although epoch {} had begun without it",
                lba.0, self.epoch.0
            ));
        }
        let block = self.blocks.entry(lba).or_default();
        if version < floor {
            return Err(format!(
                "block {}: write {version} completed although {floor} was there when it began",
                lba.0
            ));
        }
        block.floor = block.floor.max(version);
        block.completed = block.completed.max(version);
        Ok(())
    }

    /// What a read of these blocks may find at the oldest, if it begins now.
    pub fn floors(&self, start: Lba, blocks: u64) -> Floors {
        let floor = |lba: Lba| self.blocks.get(&lba).map_or(Version::default(), |block| block.floor);
        (start.0..start.0 + blocks)
            .map(|lba| (Lba(lba), floor(Lba(lba))))
            .collect()
    }

    /// A read ended.
    pub fn read_ends(&mut self, floors: &Floors, lba: Lba, version: Version, id: Option<u64>) -> Result<(), Violation> {
        self.reads += 1;
        let floor = floors.get(&lba).copied().unwrap_or_default();
        let block = self.blocks.entry(lba).or_default();
        if version < floor {
            return Err(format!(
                "block {}: a read found {version} although {floor} was there",
                lba.0
            ));
        }
        if version > Version::default() {
            match block.writes.get(&version) {
                None => return Err(format!("block {}: a read found {version}, which nobody wrote", lba.0)),
                Some(wrote) if *wrote != id => {
                    return Err(format!(
                        "I10: block {}: a read found {id:?} as {version}, which wrote {wrote:?}",
                        lba.0
                    ));
                }
                Some(_) => {}
            }
        }
        block.floor = block.floor.max(version);
        Ok(())
    }

    /// The newest write of each block that completed.
    pub fn completed(&self) -> Floors {
        self.blocks.iter().map(|(lba, block)| (*lba, block.completed)).collect()
    }

    /// The write that this block is of on all that are in sync, if that is known: the newest one is completed.
    pub fn newest(&self, lba: Lba) -> Option<(Version, u64)> {
        let block = self.blocks.get(&lba)?;
        let (version, id) = block.writes.last_key_value()?;
        (block.completed == *version).then_some((*version, (*id)?))
    }

    /// A flush completed.
    pub fn flush_completes(&mut self, covers: &Floors) {
        self.flushes += 1;
        for (lba, version) in covers {
            let block = self.blocks.entry(*lba).or_default();
            block.flushed = block.flushed.max(*version);
        }
    }

    /// An epoch is served, and of the writes of older ones only these count. Some that were completed may be missing only
    /// if `may_lose`, and never one that a flush covered. True if any is.
    pub fn epoch_begins(
        &mut self,
        epoch: Epoch,
        counts: impl Fn(Version) -> bool,
        may_lose: bool,
    ) -> Result<bool, Violation> {
        let mut lost = false;
        self.epoch = epoch;
        for (lba, block) in &mut self.blocks {
            block
                .writes
                .retain(|version, _| version.epoch >= epoch || counts(*version));
            let older = block.writes.keys().rev().find(|version| version.epoch < epoch);
            let kept = older.copied().unwrap_or_default();
            let missing = if kept < block.flushed {
                Some(("a flush covered", block.flushed))
            } else {
                (kept < block.floor && !may_lose).then_some(("there was", block.floor))
            };
            if let Some((what, version)) = missing {
                return Err(format!(
                    "I8: block {}: epoch {} begins with {kept} although {what} {version}",
                    lba.0, epoch.0
                ));
            }
            lost |= kept < block.completed;
            (block.floor, block.completed) = (kept, kept);
        }
        Ok(lost)
    }

    /// The newest epoch that was served.
    pub fn epoch(&self) -> Epoch {
        self.epoch
    }

    /// Whether a copy has what it must have.
    pub fn check_copy(&self, contents: &BTreeMap<Lba, (Version, Option<u64>)>) -> Result<(), Violation> {
        for (lba, block) in &self.blocks {
            let (version, id) = contents.get(lba).copied().unwrap_or_default();
            if version < block.floor {
                return Err(format!(
                    "block {}: a copy in sync has {version} although {} was there",
                    lba.0, block.floor
                ));
            }
            if version > Version::default() && block.writes.get(&version) != Some(&id) {
                return Err(format!("block {}: a copy in sync has {id:?} as {version}", lba.0));
            }
        }
        Ok(())
    }
}
