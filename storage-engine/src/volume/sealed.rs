//! Sealing what a volume writes and opening what it reads: the store below sees ciphertext only.

use super::Volume;
use crate::buffer::{Buf, BufMut};
use crate::request::{Answer, Piece, Reply, RequestError};
use crate::seal::{KeyError, Keyring, Sealer};
use crate::store::{ReadPart, Seals, Store};
use crate::types::{BLOCK_BYTES, Check, Lba, Version};

impl Volume {
    /// Serves a sealed `store`, which was opened for a new epoch, with the keys of `ring`.
    pub fn sealed(store: Store, ring: Keyring) -> Result<Volume, KeyError> {
        if !store.is_sealed() {
            return Err(KeyError::NotSealed);
        }
        let (volume, epoch) = (store.identity().volume, store.epoch());
        let sealer = Sealer::new(ring, store.key_rows(), volume, epoch, BLOCK_BYTES as u32)?;
        Ok(Volume::with(store, Some(Box::new(sealer))))
    }

    /// What seals and opens, for audits.
    pub fn sealer(&mut self) -> Option<&mut Sealer> {
        self.sealer.as_deref_mut()
    }

    /// Opens what a read found, in place.
    pub(super) fn open_parts(&mut self, parts: Vec<ReadPart>) -> Answer {
        let volume = self.store.identity().volume;
        let sealer = self.sealer.as_mut().expect("a sealed store has a sealed volume");
        let mut pieces = Vec::with_capacity(parts.len());
        for part in parts {
            let (lba, entries, mut bytes) = match part {
                ReadPart::Zeros(blocks) => {
                    pieces.push(Piece::Zeros((blocks * BLOCK_BYTES) as usize));
                    continue;
                }
                ReadPart::Sealed { lba, entries, bytes } => (lba, entries, bytes),
            };
            let blocks = bytes.as_mut().chunks_mut(BLOCK_BYTES as usize);
            for (n, (entry, block)) in entries.iter().zip(blocks).enumerate() {
                let at = Lba(lba.0 + n as u64);
                if let Err(error) = sealer.open(&volume, at, entry.version, entry.check.tag, block) {
                    let text = format!(
                        "block {} version {} at {:?}: {error}",
                        at.0, entry.version, entry.location
                    );
                    // Blocks of this read that were opened go with it.
                    bytes.as_mut().fill(0);
                    return Err(RequestError::Corrupt(text));
                }
            }
            pieces.push(Piece::Bytes(bytes.freeze()));
        }
        Ok(Reply::Data(pieces))
    }
}

/// Turns what a write brought into its stored form, and makes the check of each block: sealed, if the volume is.
pub(super) fn store_form(
    sealer: Option<&mut Sealer>,
    seals: &Seals,
    lba: Lba,
    version: Version,
    data: &mut Buf,
    checks: &mut Vec<Check>,
) {
    let lbas = (lba.0..).map(Lba);
    let Some(sealer) = sealer else {
        let blocks = data.as_ref().chunks_exact(BLOCK_BYTES as usize).zip(lbas);
        checks.extend(blocks.map(|(block, lba)| Check::from(seals.block(lba, version, block))));
        return;
    };
    // Block by block, so that each is copied, sealed and checked while it is in the nearest cache.
    let mut sealed = BufMut::for_reading(data.len());
    let plain = data.as_ref().chunks_exact(BLOCK_BYTES as usize);
    let blocks = sealed.as_mut().chunks_exact_mut(BLOCK_BYTES as usize);
    for ((plain, block), lba) in plain.zip(blocks).zip(lbas) {
        block.copy_from_slice(plain);
        let tag = sealer.seal(lba, version, block);
        let crc = seals.block(lba, version, block);
        checks.push(Check { crc, tag });
    }
    *data = sealed.freeze();
}
