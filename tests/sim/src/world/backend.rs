//! What a replica's store runs on in the simulator: a small one in memory, or the real one on a simulated disk.

use std::collections::BTreeMap;
use std::fmt::Debug;

use galleonfs_storage_engine::buffer::Buf;
use galleonfs_storage_engine::replication::ReplicaStore;
use galleonfs_storage_engine::store::layout::EpochEnd;
use galleonfs_storage_engine::types::{Check, Lba, Version};

use super::rng::Rng;

/// What a replica has, by block: since when, and the write that it is of; none: zeros.
pub type Contents = BTreeMap<Lba, (Version, Option<u64>)>;

/// A store that the world drives.
pub trait Backend: ReplicaStore + Debug + Sized {
    /// What is left of it while nobody has it open.
    type Disk: Debug;
    /// Milliseconds of faults that a run of it can afford, of those that were asked for.
    const SLOWER: u64;

    /// An empty replica of a volume of so many blocks.
    fn blank(volume: [u8; 16], replica: [u8; 16], blocks: u64) -> Self::Disk;
    /// Opens it; what is behind the told ends is cut off.
    fn open(disk: Self::Disk, told: Option<&[EpochEnd]>) -> Result<Self, String>;
    /// The process dies: what is in the kernel's hands stays, and of what was on its way a part.
    fn kill(self, rng: &mut Rng) -> Self::Disk;
    /// The power is cut: what was synced stays, and of the rest a part. True if any of that is lost.
    fn cut_power(self, rng: &mut Rng) -> (Self::Disk, bool);
    /// It is closed to be opened again.
    fn into_disk(self, rng: &mut Rng) -> Self::Disk {
        self.kill(rng)
    }
    /// Operations that were started since this was asked last: each is to be finished some time.
    fn take_started(&mut self) -> Vec<u64>;
    /// An operation ended.
    fn finish(&mut self, operation: u64);
    /// Tells the time.
    fn tick(&mut self, _now_ms: u64) {}
    /// A good moment for a checkpoint, if it does not choose its own.
    fn checkpoint(&mut self, _gated: bool) {}
    /// Everything that is there.
    fn contents(&self) -> Contents;
    /// The newest version of a block rots, which is of this write; false if it is not there.
    fn damage(&mut self, lba: Lba, version: Version, write: u64) -> bool;
    /// Looks for damage, and reports it.
    fn scrub(&mut self);
    /// Blocks that cannot be read.
    fn damaged(&self) -> Vec<Lba>;
    /// The check of a block.
    fn check(volume: [u8; 16], lba: Lba, version: Version, bytes: &Buf) -> Check;
}
