//! The units of the engine: blocks, epochs, sequence numbers and places on the disk are different types.

use std::fmt;

use crate::io::SegmentId;
use crate::seal::Tag;

/// Bytes in a page: everything on the disk is made of whole ones.
pub const PAGE_BYTES: u64 = 4096;

/// Bytes in a block of the smallest size, which is what a volume has unless somebody says otherwise.
pub const BLOCK_BYTES: u64 = BlockSize::K4.bytes();

/// Bytes in a sector: what a guest addresses.
pub const SECTOR_BYTES: u64 = 512;

/// How large the blocks of a volume are: a block is the unit that is versioned, checked, compressed and sealed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Default)]
pub enum BlockSize {
    /// 4 KiB.
    #[default]
    K4,
    /// 8 KiB.
    K8,
    /// 16 KiB.
    K16,
    /// 64 KiB.
    K64,
}

impl BlockSize {
    /// All there are, the smallest first.
    pub const ALL: [BlockSize; 4] = [BlockSize::K4, BlockSize::K8, BlockSize::K16, BlockSize::K64];

    /// Bytes in a block.
    pub const fn bytes(self) -> u64 {
        self.pages() as u64 * PAGE_BYTES
    }

    /// Pages in a block.
    pub const fn pages(self) -> u8 {
        match self {
            BlockSize::K4 => 1,
            BlockSize::K8 => 2,
            BlockSize::K16 => 4,
            BlockSize::K64 => 16,
        }
    }
}

/// No size that blocks can have.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("blocks of {0} bytes; expected 4096, 8192, 16384 or 65536")]
pub struct BlockSizeError(pub u64);

impl TryFrom<u64> for BlockSize {
    type Error = BlockSizeError;

    fn try_from(bytes: u64) -> Result<BlockSize, BlockSizeError> {
        let found = BlockSize::ALL.into_iter().find(|size| size.bytes() == bytes);
        found.ok_or(BlockSizeError(bytes))
    }
}

/// Number of a block of the volume, counted from 0.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Lba(pub u64);

/// Number of an engine start: raised by compare-and-swap before the engine serves, never used twice. 0 is "before the first".
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Default)]
pub struct Epoch(pub u32);

/// Number of a write within its epoch, counted from 1 without gaps. 0 is "before the first".
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Default)]
pub struct Seq(pub u64);

impl Seq {
    /// The number after this one.
    pub fn next(self) -> Seq {
        Seq(self.0 + 1)
    }
}

/// When a block was written: versions order all writes of a volume. The default comes before every write.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Default)]
pub struct Version {
    /// The engine start that made the write.
    pub epoch: Epoch,
    /// The write within it.
    pub seq: Seq,
}

impl Version {
    /// Behind every write.
    pub const MAX: Version = Version {
        epoch: Epoch(u32::MAX),
        seq: Seq(u64::MAX),
    };
}

impl fmt::Display for Version {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}.{}", self.epoch.0, self.seq.0)
    }
}

/// Shows a name or a uid.
pub(crate) struct Hex<'a>(pub &'a [u8; 16]);

impl fmt::Display for Hex<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.iter().try_for_each(|byte| write!(f, "{byte:02x}"))
    }
}

/// Names a snapshot of a volume. Whoever asks for one draws it; all zeros is no name.
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct SnapshotId(pub [u8; 16]);

impl fmt::Display for SnapshotId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        Hex(&self.0).fmt(f)
    }
}

impl fmt::Debug for SnapshotId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "snapshot {self}")
    }
}

/// How stored bytes are told from any others.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
pub struct Check {
    /// CRC-32C with address and version. Over what is stored: for it nobody needs a key.
    pub crc: u32,
    /// The seal of a sealed block; zeros where nothing is sealed.
    pub tag: Tag,
}

impl From<u32> for Check {
    fn from(crc: u32) -> Check {
        let tag = Tag::default();
        Check { crc, tag }
    }
}

/// Whose bytes these are. Every file says so, and a file of another volume is refused.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Identity {
    /// The cluster.
    pub cluster: [u8; 16],
    /// The volume: the uid of its object.
    pub volume: [u8; 16],
    /// The replica: the uid of its object.
    pub replica: [u8; 16],
}

/// A place in the log: segment, first sector and number of sectors, packed into 64 bits.
///
/// Sectors are 512 bytes; what is stored has whole pages, and lies on the boundary of one. A length of 0 is "nowhere":
/// the block reads as zeros.
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Default)]
pub struct Location(u64);

const SECTOR_BITS: u32 = 24;
const LENGTH_BITS: u32 = 8;

/// The largest segment that a [`Location`] can point into, in bytes.
pub const SEGMENT_BYTES_MAX: u64 = SECTOR_BYTES << SECTOR_BITS;

impl Location {
    /// No place: reads as zeros.
    pub const NONE: Location = Location(0);

    /// `len` bytes at `offset` of `segment`; both are multiples of 512, and `len` is at most 127.5 KiB.
    pub fn new(segment: SegmentId, offset: u64, len: u64) -> Location {
        debug_assert!(offset.is_multiple_of(SECTOR_BYTES) && len.is_multiple_of(SECTOR_BYTES));
        let (sector, sectors) = (offset / SECTOR_BYTES, len / SECTOR_BYTES);
        assert!(sector < 1 << SECTOR_BITS && sectors > 0 && sectors < 1 << LENGTH_BITS);
        Location(u64::from(segment.0) << (SECTOR_BITS + LENGTH_BITS) | sector << LENGTH_BITS | sectors)
    }

    /// So many pages.
    pub fn pages_at(segment: SegmentId, offset: u64, pages: u8) -> Location {
        Location::new(segment, offset, u64::from(pages) * PAGE_BYTES)
    }

    /// One page.
    pub fn page_at(segment: SegmentId, offset: u64) -> Location {
        Location::pages_at(segment, offset, 1)
    }

    /// Takes a stored value as it is.
    pub fn from_bits(bits: u64) -> Location {
        Location(bits)
    }

    /// The stored value.
    pub fn bits(self) -> u64 {
        self.0
    }

    /// True for [`Location::NONE`] and every other place without a length.
    pub fn is_none(self) -> bool {
        self.0 & ((1 << LENGTH_BITS) - 1) == 0
    }

    /// The segment.
    pub fn segment(self) -> SegmentId {
        SegmentId((self.0 >> (SECTOR_BITS + LENGTH_BITS)) as u32)
    }

    /// Bytes from the start of the segment.
    pub fn offset(self) -> u64 {
        (self.0 >> LENGTH_BITS & ((1 << SECTOR_BITS) - 1)) * SECTOR_BYTES
    }

    /// Bytes from the start of the segment to behind the last one.
    pub fn end(self) -> u64 {
        self.offset() + self.len()
    }

    /// Length in pages.
    pub fn pages(self) -> u64 {
        self.len() / PAGE_BYTES
    }

    /// Length in bytes.
    #[expect(clippy::len_without_is_empty, reason = "`is_none` is its name here")]
    pub fn len(self) -> u64 {
        (self.0 & ((1 << LENGTH_BITS) - 1)) * SECTOR_BYTES
    }
}

impl fmt::Debug for Location {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.is_none() {
            return write!(f, "nowhere");
        }
        write!(f, "segment {} offset {}", self.segment().0, self.offset())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_location_gives_back_what_it_was_made_of() {
        for pages in BlockSize::ALL.map(BlockSize::pages) {
            let len = u64::from(pages) * PAGE_BYTES;
            let location = Location::pages_at(SegmentId(u32::MAX), SEGMENT_BYTES_MAX - len, pages);
            assert_eq!(location.segment(), SegmentId(u32::MAX));
            assert_eq!(location.offset(), SEGMENT_BYTES_MAX - len);
            assert_eq!((location.len(), location.end()), (len, SEGMENT_BYTES_MAX));
            assert_eq!(location.pages(), u64::from(pages));
            assert!(!location.is_none());
        }
        assert!(Location::NONE.is_none());
    }

    #[test]
    fn a_block_size_is_known_by_its_bytes() {
        for size in BlockSize::ALL {
            assert_eq!(BlockSize::try_from(size.bytes()), Ok(size));
        }
        for bytes in [0, 512, 4095, 32_768, 131_072] {
            let refused = BlockSize::try_from(bytes).unwrap_err();
            assert!(refused.to_string().contains(&bytes.to_string()));
        }
        assert_eq!(BlockSize::default().bytes(), BLOCK_BYTES);
    }

    #[test]
    fn versions_order_by_epoch_before_sequence() {
        let v = |epoch, seq| Version {
            epoch: Epoch(epoch),
            seq: Seq(seq),
        };
        assert!(v(2, 1) > v(1, 900));
        assert!(v(2, 2) > v(2, 1));
        assert!(v(1, 1) > Version::default());
    }
}
