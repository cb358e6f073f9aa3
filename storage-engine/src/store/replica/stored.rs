//! Blocks as they are stored: what travels from one replica to another, and never is opened on the way.

use super::super::Store;
use super::super::read::Asker;
use crate::buffer::Buf;
use crate::types::{Check, Lba, Version};

/// What is stored somewhere.
#[derive(Clone, Debug)]
pub enum Stored {
    Block(StoredBlock),
    /// Zeros, since this version; the default one where nothing was ever written.
    Zeros {
        start: Lba,
        /// The block behind the last one.
        end: Lba,
        version: Version,
    },
}

/// A block as it is stored, with what it takes to tell that it is the right one.
#[derive(Clone, Debug)]
pub struct StoredBlock {
    pub lba: Lba,
    pub version: Version,
    pub check: Check,
    /// What it is stored in.
    pub pages: u8,
    pub bytes: Buf,
}

impl Stored {
    /// The first block.
    pub fn start(&self) -> Lba {
        match self {
            Stored::Block(block) => block.lba,
            Stored::Zeros { start, .. } => *start,
        }
    }

    /// The block behind the last one.
    pub fn end(&self) -> Lba {
        match self {
            Stored::Block(block) => Lba(block.lba.0.saturating_add(1)),
            Stored::Zeros { end, .. } => *end,
        }
    }

    /// When it was written.
    pub fn version(&self) -> Version {
        match self {
            Stored::Block(block) => block.version,
            Stored::Zeros { version, .. } => *version,
        }
    }
}

impl Store {
    /// Reads blocks as they are stored, from `lba` on and inside the volume; reported by
    /// [`Event::Stored`](super::super::Event) with `token`. Each passed its check, for which nobody needs a key, or the
    /// whole read fails: what is damaged never travels.
    pub fn read_stored(&mut self, token: u64, lba: Lba, blocks: u64) {
        assert!(lba.0 + blocks <= self.size_blocks(), "blocks inside the volume");
        self.start_read(Asker::Stored(token), lba, blocks, None, None);
    }
}
