//! What a coordinator seals and opens with: the key of its own epoch, and those of the epochs before it.

use std::fmt;

use rustc_hash::FxHashMap;

use super::epoch_key::{Address, EpochKey, Tag};
use super::key::{KeyError, KeyRow, Keyring, VolumeUid};
use crate::types::{Epoch, Lba, Version};

pub use super::epoch_key::NONCE_BYTES;

/// Keys of earlier epochs that are held ready. Each takes about half a KiB, and a derivation a few microseconds.
const READY_MAX: usize = 256;

/// One use of a key, for whoever audits that none repeats: the row tells the key from every other one without being it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct UsedNonce {
    /// Whose key.
    pub row: KeyRow,
    /// The nonce.
    pub nonce: [u8; NONCE_BYTES],
}

type Watch = Box<dyn FnMut(UsedNonce) + Send>;

/// Seals under one epoch, opens under all.
pub struct Sealer {
    ring: Keyring,
    /// No two volumes whose blocks are in one replica have an epoch in common: a clone begins behind the last epoch that
    /// its source promised. So the epoch alone says whose block it is, wherever the cleaner moved it.
    rows: FxHashMap<Epoch, KeyRow>,
    block_bytes: u32,
    own: KeyRow,
    key: EpochKey,
    ready: FxHashMap<Epoch, EpochKey>,
    watch: Option<Watch>,
}

impl Sealer {
    /// Serves `epoch` of `volume`. `rows` are those that the replica keeps; every one must have its key in `ring`.
    pub fn new(
        ring: Keyring,
        rows: &[KeyRow],
        volume: VolumeUid,
        epoch: Epoch,
        block_bytes: u32,
    ) -> Result<Sealer, KeyError> {
        for row in rows {
            let key = ring.get(&row.volume, row.key).ok_or(KeyError::Missing(row.key))?;
            if key.check(&row.volume, row.key) != row.check {
                return Err(KeyError::Wrong(row.key));
            }
        }
        let own = rows.iter().find(|row| (row.volume, row.epoch) == (volume, epoch));
        let own = *own.ok_or(KeyError::NoSalt(epoch))?;
        let rows: FxHashMap<_, _> = rows.iter().map(|row| (row.epoch, *row)).collect();
        let data_key = ring.get(&volume, own.key).expect("every row's key was just found");
        let key = EpochKey::new(data_key, &own, block_bytes);
        Ok(Sealer {
            ring,
            rows,
            block_bytes,
            own,
            key,
            ready: FxHashMap::default(),
            watch: None,
        })
    }

    /// Reports every use of a key from now on. For audits.
    pub fn watch(&mut self, watch: impl FnMut(UsedNonce) + Send + 'static) {
        self.watch = Some(Box::new(watch));
    }

    /// Seals one block of a write of this epoch, in place.
    pub fn seal(&mut self, lba: Lba, version: Version, bytes: &mut [u8]) -> Tag {
        assert_eq!(version.epoch, self.own.epoch, "only writes of the own epoch are sealed");
        let at = Address { lba, seq: version.seq };
        if let Some(watch) = &mut self.watch {
            watch(UsedNonce {
                row: self.own,
                nonce: EpochKey::nonce(at),
            });
        }
        self.key.seal(at, bytes)
    }

    /// Opens one block, in place: of this volume, or of one that it was cloned from. What fails is wiped.
    pub fn open(&mut self, lba: Lba, version: Version, tag: Tag, bytes: &mut [u8]) -> Result<(), OpenFailure> {
        let at = Address { lba, seq: version.seq };
        let opened = match self.key_of(version.epoch) {
            Ok(key) => key.open(at, tag, bytes).map_err(|_| OpenFailure::Tampered),
            Err(error) => {
                bytes.fill(0);
                Err(OpenFailure::Key(error))
            }
        };
        debug_assert!(opened.is_ok() || bytes.iter().all(|byte| *byte == 0));
        opened
    }

    fn key_of(&mut self, epoch: Epoch) -> Result<&EpochKey, KeyError> {
        if epoch == self.own.epoch {
            return Ok(&self.key);
        }
        if !self.ready.contains_key(&epoch) {
            let row = self.rows.get(&epoch).ok_or(KeyError::NoSalt(epoch))?;
            let data_key = self.ring.get(&row.volume, row.key).ok_or(KeyError::Missing(row.key))?;
            if self.ready.len() >= READY_MAX {
                self.ready.clear();
            }
            self.ready.insert(epoch, EpochKey::new(data_key, row, self.block_bytes));
        }
        Ok(&self.ready[&epoch])
    }
}

/// Why a block does not open.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum OpenFailure {
    #[error("its seal does not fit: it was changed, moved, or is of another time")]
    Tampered,
    #[error(transparent)]
    Key(KeyError),
}

impl fmt::Debug for Sealer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Sealer")
            .field("epoch", &self.own.epoch)
            .field("key", &self.own.key)
            .finish_non_exhaustive()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::seal::{DataKey, EpochSalt, KeyId};
    use crate::types::Seq;

    const VOLUME: VolumeUid = [2; 16];
    const PARENT: VolumeUid = [4; 16];

    fn key(byte: u8) -> DataKey {
        DataKey::from_slice(&[byte; 32]).unwrap()
    }

    fn ring() -> Keyring {
        let mut ring = Keyring::new(VOLUME, KeyId(1), key(1));
        ring.add(VOLUME, KeyId(2), key(2));
        ring.add(PARENT, KeyId(1), key(3));
        ring
    }

    fn row(volume: VolumeUid, epoch: u32, id: u32) -> KeyRow {
        let salt = EpochSalt([epoch as u8; 32]);
        ring().prove(volume, Epoch(epoch), KeyId(id), salt).unwrap().row
    }

    fn version(epoch: u32, seq: u64) -> Version {
        Version {
            epoch: Epoch(epoch),
            seq: Seq(seq),
        }
    }

    fn sealer(rows: &[KeyRow], volume: VolumeUid, epoch: u32) -> Sealer {
        Sealer::new(ring(), rows, volume, Epoch(epoch), 4096).unwrap()
    }

    #[test]
    fn blocks_of_every_epoch_and_key_and_of_the_parent_open() {
        let mut parent = sealer(&[row(PARENT, 5, 1)], PARENT, 5);
        let mut theirs = vec![1; 4096];
        let their_tag = parent.seal(Lba(8), version(5, 1), &mut theirs);
        let rows = [row(VOLUME, 6, 1), row(VOLUME, 7, 2), row(PARENT, 5, 1)];
        let mut old = vec![2; 4096];
        let old_tag = sealer(&rows, VOLUME, 6).seal(Lba(8), version(6, 1), &mut old);
        let mut now = sealer(&rows, VOLUME, 7);
        let mut new = vec![3; 4096];
        let new_tag = now.seal(Lba(8), version(7, 1), &mut new);

        now.open(Lba(8), version(7, 1), new_tag, &mut new).unwrap();
        now.open(Lba(8), version(6, 1), old_tag, &mut old).unwrap();
        now.open(Lba(8), version(5, 1), their_tag, &mut theirs).unwrap();
        assert_eq!((theirs, old, new), (vec![1; 4096], vec![2; 4096], vec![3; 4096]));
    }

    #[test]
    fn a_wrong_or_missing_key_is_refused_before_a_byte_is_opened() {
        let rows = [row(VOLUME, 1, 1), row(VOLUME, 2, 2)];
        let one = |byte| Keyring::new(VOLUME, KeyId(2), key(byte));
        let refused = |ring, rows: &[KeyRow]| Sealer::new(ring, rows, VOLUME, Epoch(2), 4096).unwrap_err();
        assert_eq!(
            refused(one(2), &rows),
            KeyError::Missing(KeyId(1)),
            "of an earlier epoch"
        );
        assert_eq!(refused(one(9), &rows[1..]), KeyError::Wrong(KeyId(2)));
        assert_eq!(refused(ring(), &rows[..1]), KeyError::NoSalt(Epoch(2)));
    }

    #[test]
    fn an_epoch_that_nobody_knows_opens_nothing() {
        let mut sealer = sealer(&[row(VOLUME, 1, 1)], VOLUME, 1);
        let mut bytes = vec![7; 4096];
        let failed = sealer.open(Lba(0), version(9, 1), Tag::default(), &mut bytes);
        assert_eq!(failed, Err(OpenFailure::Key(KeyError::NoSalt(Epoch(9)))));
        assert_eq!(bytes, vec![0; 4096]);
    }

    #[test]
    fn blocks_of_one_write_and_one_block_of_many_writes_get_different_nonces() {
        let mut seen = std::collections::BTreeSet::new();
        for seq in 1..100 {
            // Across the place where the low bits of the address begin again.
            for lba in 0xffff_ffc0..0x1_0000_0040 {
                let at = Address {
                    lba: Lba(lba),
                    seq: Seq(seq),
                };
                assert!(seen.insert(EpochKey::nonce(at)), "block {lba} of write {seq}");
            }
        }
    }

    #[test]
    fn a_watch_sees_every_use_of_the_key() {
        let mut sealer = sealer(&[row(VOLUME, 1, 1)], VOLUME, 1);
        let (send, seen) = std::sync::mpsc::channel();
        sealer.watch(move |used| send.send(used).unwrap());
        sealer.seal(Lba(3), version(1, 9), &mut [0; 64]);
        let used = seen.recv().unwrap();
        assert_eq!(
            (used.row, used.nonce),
            (row(VOLUME, 1, 1), [3, 0, 0, 0, 9, 0, 0, 0, 0, 0, 0, 0])
        );
    }
}
