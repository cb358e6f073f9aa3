//! The form in which blocks are stored: compressed, then sealed. The store below sees nothing else.
//!
//! ```text
//! guest's block ─► compress (if that saves a page) ─► seal (if the volume is sealed) ─► check ─► record
//! ```

use super::{Backing, Volume};
use crate::buffer::{Buf, BufMut, PAGE_BYTES};
use crate::compress::{Codec, Compressor};
use crate::request::{Piece, RequestError};
use crate::seal::{KeyError, Keyring, Sealer};
use crate::store::{ReadPart, Seals};
use crate::types::{BlockSize, Check, Lba, Version};

/// Turns blocks into what is stored, and back.
#[derive(Debug)]
pub(super) struct Form {
    seals: Seals,
    block_bytes: usize,
    pub codec: Option<Codec>,
    compressor: Compressor,
    pub sealer: Option<Box<Sealer>>,
}

impl<B: Backing> Volume<B> {
    /// Serves a sealed `store`, which was opened for a new epoch, with the keys of `ring`.
    pub fn sealed(store: B, ring: Keyring) -> Result<Self, KeyError> {
        if !store.is_sealed() {
            return Err(KeyError::NotSealed);
        }
        let (volume, epoch) = (store.identity().volume, store.epoch());
        let block_bytes = store.block_size().bytes() as u32;
        let sealer = Sealer::new(ring, store.key_rows(), volume, epoch, block_bytes)?;
        Ok(Volume::with(store, Some(Box::new(sealer))))
    }

    /// Compresses what is written from now on. It may be another codec than before, or none: each block says what it is
    /// compressed with. Blocks of 4 KiB are never compressed.
    pub fn compression(mut self, codec: Option<Codec>) -> Self {
        self.form.codec = codec.filter(|_| self.block_size() != BlockSize::K4);
        self
    }

    /// What seals and opens, for audits.
    pub fn sealer(&mut self) -> Option<&mut Sealer> {
        self.form.sealer.as_deref_mut()
    }
}

impl Form {
    pub fn new(seals: Seals, sealer: Option<Box<Sealer>>) -> Form {
        Form {
            seals,
            block_bytes: seals.block_size().bytes() as usize,
            codec: None,
            compressor: Compressor::new(),
            sealer,
        }
    }

    /// Gives what a write's blocks are stored as, and adds the check of each, and its pages where they may differ.
    pub fn store(
        &mut self,
        lba: Lba,
        version: Version,
        data: Buf,
        checks: &mut Vec<Check>,
        pages: &mut Vec<u8>,
    ) -> Buf {
        let Form { seals, block_bytes, .. } = *self;
        let plain = data.as_ref().chunks_exact(block_bytes).zip((lba.0..).map(Lba));
        let whole = self.seals.block_size().pages();
        if self.codec.is_none() && self.sealer.is_none() {
            checks.extend(plain.map(|(block, lba)| Check::from(seals.block(lba, version, block))));
            if whole > 1 {
                pages.resize(checks.len(), whole);
            }
            return data;
        }
        // Block by block, so that each is copied, sealed and checked while it is in the nearest cache.
        let mut stored = BufMut::for_reading(data.len());
        let mut at = 0;
        for (plain, lba) in plain {
            let room = &mut stored.as_mut()[at..at + block_bytes];
            let compressed = self
                .codec
                .and_then(|codec| self.compressor.compress(codec, plain, room));
            let len = compressed.unwrap_or_else(|| {
                room.copy_from_slice(plain);
                block_bytes
            });
            let block = &mut room[..len];
            let tag = self.sealer.as_mut().map(|sealer| sealer.seal(lba, version, block));
            let crc = seals.block(lba, version, block);
            checks.push(Check {
                crc,
                tag: tag.unwrap_or_default(),
            });
            if whole > 1 {
                pages.push((len / PAGE_BYTES) as u8);
            }
            at += len;
        }
        stored.freeze().slice(0..at)
    }

    /// Gives the blocks that a read found. Every one is what was written, or the whole read fails.
    pub fn open(&mut self, parts: Vec<ReadPart>) -> Result<Vec<Piece>, RequestError> {
        let mut pieces = Vec::with_capacity(parts.len());
        for part in parts {
            pieces.push(match part {
                ReadPart::Zeros(blocks) => Piece::Zeros(blocks as usize * self.block_bytes),
                ReadPart::Stored { .. } => Piece::Bytes(self.open_part(part)?),
            });
        }
        Ok(pieces)
    }

    fn open_part(&mut self, part: ReadPart) -> Result<Buf, RequestError> {
        let ReadPart::Stored { lba, blocks, mut bytes } = part else {
            unreachable!("zeros are stored nowhere")
        };
        let block_bytes = self.block_bytes;
        let mut grown = blocks
            .iter()
            .any(|block| block.len < block_bytes)
            .then(|| BufMut::for_reading(blocks.len() * block_bytes));
        let mut at = 0;
        for (n, (found, lba)) in blocks.iter().zip((lba.0..).map(Lba)).enumerate() {
            let block = &mut bytes.as_mut()[at..at + found.len];
            at += block.len();
            let opened = match &mut self.sealer {
                Some(sealer) => sealer
                    .open(lba, found.version, found.check.tag, block)
                    .map_err(|error| error.to_string()),
                None => Ok(()),
            };
            let whole = opened.and_then(|()| {
                let Some(grown) = &mut grown else { return Ok(()) };
                let room = &mut grown.as_mut()[n * block_bytes..(n + 1) * block_bytes];
                if block.len() == block_bytes {
                    room.copy_from_slice(block);
                    return Ok(());
                }
                self.compressor
                    .decompress(block, room)
                    .map_err(|error| error.to_string())
            });
            if let Err(error) = whole {
                // Blocks of this read that were opened go with it.
                bytes.as_mut().fill(0);
                grown.iter_mut().for_each(|grown| grown.as_mut().fill(0));
                return Err(RequestError::Corrupt(format!(
                    "block {} version {}: {error}",
                    lba.0, found.version
                )));
            }
        }
        Ok(grown.unwrap_or(bytes).freeze())
    }
}
