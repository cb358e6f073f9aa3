//! The superblock: who the replica is, and where its last checkpoint lies.
//!
//! It stands twice, in two files of one 4 KiB block. A checkpoint writes and syncs the first, then the second, and
//! only then are the segments that the checkpoint freed used again. So a torn one leaves the other valid, and one
//! damaged later has a twin.

use super::format::{Get, Put, check_around};
use super::page::{Entry, HEIGHT_MAX, PAGE_BYTES};
use crate::buffer::{Buf, BufMut};
use crate::io::SegmentId;
use crate::types::{BlockSize, Epoch, Identity, SEGMENT_BYTES_MAX, Seq, Version};

/// Bytes of a superblock file.
pub const SUPERBLOCK_BYTES: usize = 4096;
const MAGIC: u64 = u64::from_le_bytes(*b"GALLEON\x01");
const CHECK_AT: usize = 12;
/// The version that is written. The first one knew no snapshots, the second one no blocks but those of 4 KiB, the third
/// one no other replicas; they are read and become this one.
pub const SUPERBLOCK_VERSION: u16 = 4;
const INDEX_MAX: usize = 64;
/// Most pages of the catalog of snapshots.
const CATALOG_MAX: usize = super::snapshot::SNAPSHOTS_MAX.div_ceil(super::snapshot::ROWS_PER_PAGE);
const LISTS_AT: usize = 208;
const _: () = assert!(LISTS_AT + (INDEX_MAX + CATALOG_MAX) * 24 + ENDS_MAX * 16 <= SUPERBLOCK_BYTES);
/// Most rows in the history of epochs; opening makes a checkpoint, which empties it, before it is full.
pub const ENDS_MAX: usize = 100;

/// Of epochs that no replay needs, so many are remembered for other replicas.
const ENDS_KEPT: usize = 64;

/// Far more than anybody has, and little enough that the bytes of them can be counted.
const SIZE_BLOCKS_MAX: u64 = 1 << 47;

/// What never changes in the life of a replica.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Geometry {
    /// Whose it is.
    pub identity: Identity,
    /// Bytes in a segment.
    pub segment_bytes: u64,
    /// Drawn when the replica was made; seeds the checks of headers.
    pub salt: u64,
    /// Blocks are sealed: what is stored is ciphertext with a tag for each block.
    pub sealed: bool,
    /// What a block is.
    pub block_size: BlockSize,
}

/// Where the log goes on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct LogPosition {
    /// The segment.
    pub segment: SegmentId,
    /// Bytes from its start.
    pub offset: u64,
    /// Number of this segment in the order in which the log used them.
    pub log_index: u64,
    /// The last write before this place.
    pub last: Version,
    /// The check of the data record before this place.
    pub chain: u32,
}

/// Where a stream other than the log goes on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct StreamPosition {
    pub segment: SegmentId,
    /// Bytes from its start.
    pub offset: u64,
}

/// A committed checkpoint.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Checkpoint {
    /// Counts checkpoints.
    pub number: u64,
    /// Blocks of the volume.
    pub size_blocks: u64,
    /// Levels of the map.
    pub height: u8,
    /// Points to the root page.
    pub root: Entry,
    /// Replay starts here.
    pub replay: LogPosition,
    /// Pointers to the pages that index the segment table.
    pub table: Vec<Entry>,
    /// Pointers to the pages of the list of snapshots.
    pub catalog: Vec<Entry>,
    /// The next page of the map goes here.
    pub meta: Option<StreamPosition>,
    /// The next moved block goes here.
    pub moved: Option<StreamPosition>,
}

/// The last write of each epoch in `first..=last` that the log kept; later writes of these epochs are stale.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct EpochEnd {
    pub first: Epoch,
    pub last: Epoch,
    pub end: Seq,
}

impl EpochEnd {
    /// True if it says where this epoch ended.
    pub fn covers(&self, epoch: Epoch) -> bool {
        (self.first..=self.last).contains(&epoch)
    }

    /// The epochs that it is about.
    pub fn epochs(&self) -> impl Iterator<Item = Epoch> + use<> {
        (self.first.0..=self.last.0).map(Epoch)
    }
}

/// All a superblock says.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Superblock {
    /// Counts writes of the superblock; the higher of two valid ones is the newer.
    pub generation: u64,
    pub geometry: Geometry,
    /// The highest epoch this replica ever promised: lower ones are refused.
    pub epoch: Epoch,
    /// True if the replica was closed in order: nothing lies behind the replay position.
    pub clean: bool,
    /// Others decide where epochs end: what is settled says nothing about how far this log went.
    pub told: bool,
    pub checkpoint: Checkpoint,
    pub epoch_ends: Vec<EpochEnd>,
}

/// Why bytes are no usable superblock.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum SuperblockError {
    #[error("it does not begin like a superblock of GalleonFS")]
    Magic,
    #[error("it has format version {0}; this version reads up to {SUPERBLOCK_VERSION}")]
    Newer(u16),
    #[error("its check does not fit its bytes")]
    Check,
    #[error("it holds impossible values ({0})")]
    Nonsense(&'static str),
}

impl Superblock {
    pub fn encode(&self) -> Buf {
        let mut buf = BufMut::zeroed(SUPERBLOCK_BYTES);
        let bytes = buf.as_mut();
        let mut put = Put::new(bytes);
        let (geometry, checkpoint) = (&self.geometry, &self.checkpoint);
        put.u64(MAGIC)
            .u16(SUPERBLOCK_VERSION)
            .u16(0)
            .u32(0)
            .u64(self.generation);
        put.bytes(&geometry.identity.cluster)
            .bytes(&geometry.identity.volume)
            .bytes(&geometry.identity.replica);
        put.u64(geometry.segment_bytes).u64(geometry.salt);
        put.u32(self.epoch.0)
            .u8(u8::from(self.clean))
            .u8(checkpoint.height)
            .u8(u8::from(geometry.sealed))
            .u8(geometry.block_size.pages());
        put.u64(checkpoint.number).u64(checkpoint.size_blocks);
        checkpoint.root.put(&mut put);
        let replay = &checkpoint.replay;
        put.u32(replay.segment.0)
            .u32(replay.chain)
            .u64(replay.offset)
            .u64(replay.log_index);
        put.u32(replay.last.epoch.0).u64(replay.last.seq.0);
        put_stream(&mut put, checkpoint.meta);
        put_stream(&mut put, checkpoint.moved);
        put.u16(checkpoint.table.len() as u16).u16(self.epoch_ends.len() as u16);
        put.u16(checkpoint.catalog.len() as u16)
            .u8(u8::from(self.told))
            .seek(LISTS_AT);
        assert!(checkpoint.table.len() <= INDEX_MAX && self.epoch_ends.len() <= ENDS_MAX);
        assert!(checkpoint.catalog.len() <= CATALOG_MAX);
        checkpoint.table.iter().for_each(|entry| entry.put(&mut put));
        for end in &self.epoch_ends {
            put.u32(end.first.0).u32(end.last.0).u64(end.end.0);
        }
        checkpoint.catalog.iter().for_each(|entry| entry.put(&mut put));
        let check = check_around(0, bytes, CHECK_AT);
        bytes[CHECK_AT..CHECK_AT + 4].copy_from_slice(&check.to_le_bytes());
        buf.freeze()
    }

    pub fn decode(bytes: &[u8]) -> Result<Superblock, SuperblockError> {
        let mut get = Get::new(bytes);
        if bytes.len() != SUPERBLOCK_BYTES || get.u64() != MAGIC {
            return Err(SuperblockError::Magic);
        }
        // The version is read before the check: a newer format may check itself in another way.
        let version = get.u16();
        if version > SUPERBLOCK_VERSION {
            // Unless everything else is right: then it is this field that was damaged, and the twin counts.
            let mut ours = bytes.to_vec();
            let check = Get::new(bytes).seek(CHECK_AT).u32();
            let damaged = (1..=SUPERBLOCK_VERSION).any(|version| {
                ours[8..10].copy_from_slice(&version.to_le_bytes());
                check_around(0, &ours, CHECK_AT) == check
            });
            if damaged {
                return Err(SuperblockError::Check);
            }
            return Err(SuperblockError::Newer(version));
        }
        let (_, check, generation) = (get.u16(), get.u32(), get.u64());
        if check_around(0, bytes, CHECK_AT) != check {
            return Err(SuperblockError::Check);
        }
        let identity = Identity {
            cluster: get.array(),
            volume: get.array(),
            replica: get.array(),
        };
        let mut geometry = Geometry {
            identity,
            segment_bytes: get.u64(),
            salt: get.u64(),
            sealed: false,
            block_size: BlockSize::K4,
        };
        let (epoch, clean, height) = (Epoch(get.u32()), get.u8() == 1, get.u8());
        geometry.sealed = get.u8() == 1;
        let block_pages = get.u8();
        if version > 2 {
            let known = BlockSize::ALL.into_iter().find(|size| size.pages() == block_pages);
            geometry.block_size = known.ok_or(SuperblockError::Nonsense("a block size that there is not"))?;
        }
        let (number, size_blocks) = (get.u64(), get.u64());
        let root = Entry::get(&mut get);
        let (segment, chain) = (SegmentId(get.u32()), get.u32());
        let (offset, log_index) = (get.u64(), get.u64());
        let last = Version {
            epoch: Epoch(get.u32()),
            seq: Seq(get.u64()),
        };
        let (meta, moved) = (get_stream(&mut get), get_stream(&mut get));
        let (tables, ends) = (get.u16() as usize, get.u16() as usize);
        let catalogs = if version == 1 { 0 } else { get.u16() as usize };
        let told = version > 3 && get.u8() == 1;
        if version > 1 {
            get.seek(LISTS_AT);
        }
        let stream_fits = |at: Option<StreamPosition>| at.is_none_or(|at| at.offset <= geometry.segment_bytes);
        if !geometry.segment_bytes.is_multiple_of(PAGE_BYTES as u64)
            || geometry.segment_bytes > SEGMENT_BYTES_MAX
            || !offset.is_multiple_of(PAGE_BYTES as u64)
            || !stream_fits(meta)
            || !stream_fits(moved)
            || !(1..=HEIGHT_MAX).contains(&height)
            || size_blocks > SIZE_BLOCKS_MAX
            || !root.may_lead_to_page()
        {
            return Err(SuperblockError::Nonsense("sizes or positions out of range"));
        }
        if tables > INDEX_MAX
            || ends > ENDS_MAX
            || catalogs > CATALOG_MAX
            || size_blocks == 0
            || offset > geometry.segment_bytes
        {
            return Err(SuperblockError::Nonsense("counts, size or position out of range"));
        }
        let table = (0..tables).map(|_| Entry::get(&mut get)).collect();
        let epoch_ends = (0..ends)
            .map(|_| EpochEnd {
                first: Epoch(get.u32()),
                last: Epoch(get.u32()),
                end: Seq(get.u64()),
            })
            .collect();
        let catalog = (0..catalogs).map(|_| Entry::get(&mut get)).collect();
        let replay = LogPosition {
            segment,
            offset,
            log_index,
            last,
            chain,
        };
        let checkpoint = Checkpoint {
            number,
            size_blocks,
            height,
            root,
            replay,
            table,
            catalog,
            meta,
            moved,
        };
        Ok(Superblock {
            generation,
            geometry,
            epoch,
            clean,
            told,
            checkpoint,
            epoch_ends,
        })
    }

    /// Bytes of the volume.
    pub fn size_bytes(&self) -> u64 {
        self.checkpoint.size_blocks * self.geometry.block_size.bytes()
    }

    /// Where the log of `epoch` ends, if that is settled; writes behind it are stale.
    pub fn end_of(&self, epoch: Epoch) -> Option<Seq> {
        self.epoch_ends.iter().find(|end| end.covers(epoch)).map(|end| end.end)
    }

    /// Replay starts behind the epochs that ended before the checkpoint. Where there are other replicas, somebody may still
    /// ask what became of them: the newest are kept.
    pub fn forget_ends_before_replay(&mut self) {
        if self.told {
            return self.forget_old_ends();
        }
        let replay_epoch = self.checkpoint.replay.last.epoch;
        self.epoch_ends.retain(|end| end.last >= replay_epoch);
    }

    /// Keeps as many as there is room for, and those that the replay needs.
    pub fn forget_old_ends(&mut self) {
        let replay_epoch = self.checkpoint.replay.last.epoch;
        let surplus = self.epoch_ends.len().saturating_sub(ENDS_KEPT);
        let mut index = 0;
        self.epoch_ends.retain(|end| {
            index += 1;
            index > surplus || end.last >= replay_epoch
        });
    }

    /// There is nobody else any more: what others settled beyond this log ends where it does.
    pub fn own_ends(&mut self, reached: Version) {
        self.epoch_ends.retain(|end| end.first <= reached.epoch);
        if let Some(row) = self.epoch_ends.last_mut().filter(|end| end.last >= reached.epoch) {
            row.last = reached.epoch;
            row.end = row.end.min(reached.seq);
        }
    }

    /// Settles that the log of every epoch in `first..=last` ends at `end`. Empty epochs in a row share one row.
    pub fn settle(&mut self, first: Epoch, last: Epoch, end: Seq) {
        match self.epoch_ends.last_mut() {
            Some(row) if row.end == end && end == Seq(0) && row.last.0 + 1 == first.0 => row.last = last,
            _ => self.epoch_ends.push(EpochEnd { first, last, end }),
        }
    }
}

/// An absent stream has a segment number that no segment has.
fn put_stream(put: &mut Put<'_>, at: Option<StreamPosition>) {
    put.u32(at.map_or(u32::MAX, |at| at.segment.0))
        .u64(at.map_or(0, |at| at.offset));
}

fn get_stream(get: &mut Get<'_>) -> Option<StreamPosition> {
    let (segment, offset) = (get.u32(), get.u64());
    (segment != u32::MAX).then_some(StreamPosition {
        segment: SegmentId(segment),
        offset,
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::types::Location;

    fn sample() -> Superblock {
        let entry = |n: u64| Entry {
            location: Location::page_at(SegmentId(n as u32), 4096 * n),
            version: Version {
                epoch: Epoch(1),
                seq: Seq(n),
            },
            check: (n as u32).into(),
        };
        Superblock {
            generation: 12,
            geometry: Geometry {
                identity: Identity {
                    cluster: [1; 16],
                    volume: [2; 16],
                    replica: [3; 16],
                },
                segment_bytes: 4 << 20,
                salt: 5,
                sealed: true,
                block_size: BlockSize::K16,
            },
            epoch: Epoch(9),
            clean: true,
            told: true,
            checkpoint: Checkpoint {
                number: 4,
                size_blocks: 1000,
                height: 2,
                root: entry(3),
                replay: LogPosition {
                    segment: SegmentId(8),
                    offset: 8192,
                    log_index: 77,
                    last: Version {
                        epoch: Epoch(8),
                        seq: Seq(6),
                    },
                    chain: 1,
                },
                table: (0..INDEX_MAX as u64).map(entry).collect(),
                catalog: (0..CATALOG_MAX as u64).map(entry).collect(),
                meta: Some(StreamPosition {
                    segment: SegmentId(4),
                    offset: 4096,
                }),
                moved: None,
            },
            epoch_ends: (0..ENDS_MAX as u32)
                .map(|n| EpochEnd {
                    first: Epoch(n),
                    last: Epoch(n),
                    end: Seq(u64::from(n)),
                })
                .collect(),
        }
    }

    #[test]
    fn a_full_superblock_fits_and_gives_back_what_it_was_made_of() {
        let superblock = sample();
        assert_eq!(Superblock::decode(superblock.encode().as_ref()), Ok(superblock));
    }

    #[test]
    fn every_flipped_bit_of_a_superblock_is_noticed() {
        let bytes = sample().encode().as_ref().to_vec();
        for bit in 0..SUPERBLOCK_BYTES * 8 {
            let mut flipped = bytes.clone();
            flipped[bit / 8] ^= 1 << (bit % 8);
            assert!(Superblock::decode(&flipped).is_err(), "bit {bit}");
        }
    }

    #[test]
    fn a_newer_format_is_named_before_its_check_is_looked_at() {
        let mut bytes = sample().encode().as_ref().to_vec();
        (bytes[8], bytes[300]) = (5, bytes[300] ^ 1);
        assert_eq!(Superblock::decode(&bytes), Err(SuperblockError::Newer(5)));
    }

    #[test]
    fn a_superblock_of_the_first_version_is_read() {
        let mut superblock = sample();
        superblock.checkpoint.catalog.clear();
        superblock.geometry.block_size = BlockSize::K4;
        superblock.told = false;
        let mut bytes = superblock.encode().as_ref().to_vec();
        // The first version had no number of catalog pages, and its lists came eight bytes earlier.
        bytes[8] = 1;
        bytes[BLOCK_PAGES_AT] = 0;
        bytes.copy_within(LISTS_AT.., LISTS_AT - 8);
        check_anew(&mut bytes);
        assert_eq!(Superblock::decode(&bytes), Ok(superblock));
    }

    /// Where the number of pages in a block is.
    const BLOCK_PAGES_AT: usize = 95;

    fn check_anew(bytes: &mut [u8]) {
        let check = check_around(0, bytes, CHECK_AT);
        bytes[CHECK_AT..CHECK_AT + 4].copy_from_slice(&check.to_le_bytes());
    }

    #[test]
    fn a_superblock_of_the_second_version_has_blocks_of_4_kib() {
        let mut superblock = sample();
        (superblock.geometry.block_size, superblock.told) = (BlockSize::K4, false);
        let mut bytes = superblock.encode().as_ref().to_vec();
        (bytes[8], bytes[BLOCK_PAGES_AT]) = (2, 0);
        check_anew(&mut bytes);
        assert_eq!(Superblock::decode(&bytes), Ok(superblock));
    }

    #[test]
    fn a_block_size_that_there_is_not_is_refused() {
        for size in BlockSize::ALL {
            let mut superblock = sample();
            superblock.geometry.block_size = size;
            let bytes = superblock.encode();
            assert_eq!(Superblock::decode(bytes.as_ref()), Ok(superblock));
        }
        for pages in [0, 3, 8, 17, 255] {
            let mut bytes = sample().encode().as_ref().to_vec();
            bytes[BLOCK_PAGES_AT] = pages;
            check_anew(&mut bytes);
            let refused = Superblock::decode(&bytes);
            assert!(matches!(refused, Err(SuperblockError::Nonsense(_))), "{pages} pages");
        }
    }

    fn end(first: u32, last: u32, end: u64) -> EpochEnd {
        EpochEnd {
            first: Epoch(first),
            last: Epoch(last),
            end: Seq(end),
        }
    }

    #[test]
    fn ends_that_others_settle_take_their_places_among_those_that_are_known() {
        let mut superblock = sample();
        superblock.epoch_ends = vec![end(3, 3, 7), end(5, 6, 0)];
        for row in [end(4, 8, 0), end(1, 1, 9), end(3, 3, 7), end(9, 9, 4)] {
            assert!(superblock.agrees_with(&row));
            superblock.settle_told(&row);
        }
        let expected = [end(1, 1, 9), end(3, 3, 7), end(4, 8, 0), end(9, 9, 4)];
        assert_eq!(superblock.epoch_ends, expected);
        for row in [end(3, 3, 8), end(2, 3, 1), end(8, 9, 0)] {
            assert!(!superblock.agrees_with(&row), "{row:?}");
        }
    }

    #[test]
    fn the_newest_ends_are_remembered_for_others_and_those_that_the_replay_needs() {
        let mut superblock = sample();
        superblock.epoch_ends = (1..=80).map(|n| end(n, n, u64::from(n))).collect();
        superblock.checkpoint.replay.last.epoch = Epoch(78);
        superblock.forget_ends_before_replay();
        assert_eq!(superblock.epoch_ends.first(), Some(&end(17, 17, 17)));
        superblock.epoch_ends = (1..=80).map(|n| end(n, n, u64::from(n))).collect();
        superblock.checkpoint.replay.last.epoch = Epoch(3);
        superblock.forget_ends_before_replay();
        assert_eq!(superblock.epoch_ends.first(), Some(&end(3, 3, 3)));
        superblock.told = false;
        superblock.checkpoint.replay.last.epoch = Epoch(79);
        superblock.forget_ends_before_replay();
        assert_eq!(superblock.epoch_ends, [end(79, 79, 79), end(80, 80, 80)]);
    }

    #[test]
    fn empty_epochs_in_a_row_share_one_row() {
        let mut superblock = sample();
        superblock.epoch_ends.clear();
        superblock.settle(Epoch(1), Epoch(1), Seq(5));
        superblock.settle(Epoch(2), Epoch(2), Seq(0));
        superblock.settle(Epoch(3), Epoch(3), Seq(0));
        assert_eq!(superblock.epoch_ends.len(), 2);
        assert_eq!(
            (superblock.end_of(Epoch(1)), superblock.end_of(Epoch(3))),
            (Some(Seq(5)), Some(Seq(0)))
        );
        assert_eq!(superblock.end_of(Epoch(4)), None);
    }
}
