//! Data keys of volumes, and what may be known of them: their numbers, their checks, the salts of epochs.

use std::fmt;

use ring::hkdf::{HKDF_SHA256, KeyType, Salt};
use zeroize::{Zeroize, ZeroizeOnDrop};

use crate::types::Epoch;

/// Bytes of a data key.
pub const DATA_KEY_BYTES: usize = 32;
const CHECK_INFO: &[u8] = b"galleon/v1/check";

/// Uid of a volume: part of every key that is derived.
pub type VolumeUid = [u8; 16];

/// Number of a data key of a volume; a rotation brings the next one.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct KeyId(pub u32);

/// The secret of a volume: from it all keys that seal its blocks are derived. Its memory is wiped when it goes.
#[derive(Zeroize, ZeroizeOnDrop)]
pub struct DataKey([u8; DATA_KEY_BYTES]);

impl DataKey {
    /// Takes the key's bytes; `bytes` should be wiped by its owner then.
    pub fn from_slice(bytes: &[u8]) -> Result<DataKey, KeyError> {
        let mut key = DataKey([0; DATA_KEY_BYTES]);
        if bytes.len() != DATA_KEY_BYTES {
            return Err(KeyError::Length(bytes.len()));
        }
        key.0.copy_from_slice(bytes);
        Ok(key)
    }

    /// HKDF-SHA256 of the key; `len` says what for.
    pub(super) fn derive<L: KeyType, T>(
        &self,
        salt: &[u8],
        info: &[&[u8]],
        len: L,
        take: impl FnOnce(ring::hkdf::Okm<'_, L>) -> T,
    ) -> T {
        let secret = Salt::new(HKDF_SHA256, salt).extract(&self.0);
        take(secret.expand(info, len).expect("the length is far below HKDF's limit"))
    }

    /// Tells this key from another one, and nothing about either.
    pub fn check(&self, volume: &VolumeUid, id: KeyId) -> KeyCheck {
        let mut check = [0; KeyCheck::BYTES];
        self.derive(
            &[],
            &[CHECK_INFO, volume, &id.0.to_le_bytes()],
            CheckLength,
            |material| material.fill(&mut check).expect("it has the length that was asked for"),
        );
        KeyCheck(check)
    }
}

impl fmt::Debug for DataKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("DataKey(secret)")
    }
}

struct CheckLength;

impl KeyType for CheckLength {
    fn len(&self) -> usize {
        KeyCheck::BYTES
    }
}

/// Random bytes that are drawn for each epoch. Not secret.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct EpochSalt(pub [u8; 32]);

/// Tells whether a key is the right one. Not secret: it is derived from the key, one way.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct KeyCheck(pub [u8; KeyCheck::BYTES]);

impl KeyCheck {
    /// Bytes of a check.
    pub const BYTES: usize = 8;
}

/// What a replica keeps for each epoch whose blocks it may hold. With the data key it gives the epoch's key.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct KeyRow {
    /// The volume whose coordinator sealed: another one's where blocks are shared with it.
    pub volume: VolumeUid,
    /// The engine start.
    pub epoch: Epoch,
    /// Which data key of the volume.
    pub key: KeyId,
    /// Drawn for this epoch.
    pub salt: EpochSalt,
    /// The data key's check.
    pub check: KeyCheck,
}

/// What a replica is shown when it is made or opened. Nothing in it is secret.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct KeyProof {
    /// For the epoch that begins.
    pub row: KeyRow,
    /// Of all keys that are at hand.
    checks: Vec<(VolumeUid, KeyId, KeyCheck)>,
}

impl KeyProof {
    /// Whether the key that sealed this epoch is at hand.
    pub fn covers(&self, row: &KeyRow) -> Result<(), KeyError> {
        let mut checks = self
            .checks
            .iter()
            .filter(|(volume, id, _)| *volume == row.volume && *id == row.key);
        match checks.next() {
            None => Err(KeyError::Missing(row.key)),
            Some((_, _, check)) if *check != row.check => Err(KeyError::Wrong(row.key)),
            Some(_) => Ok(()),
        }
    }
}

/// Why keys do not serve.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum KeyError {
    #[error("a data key has {DATA_KEY_BYTES} bytes, not {0}")]
    Length(usize),
    #[error("the volume is sealed with key {}, which was not given", .0.0)]
    Missing(KeyId),
    #[error("key {} is not the one that the volume was sealed with", .0.0)]
    Wrong(KeyId),
    #[error("the replica keeps no salt for epoch {}", .0.0)]
    NoSalt(Epoch),
    #[error("the volume is sealed, and no key was given for it")]
    NotGiven,
    #[error("the volume is not sealed, and a key was given for it")]
    NotSealed,
}

/// The data keys that a coordinator holds: of its volume and, where blocks are shared, of those it was cloned from.
#[derive(Debug, Default)]
pub struct Keyring {
    keys: Vec<(VolumeUid, KeyId, DataKey)>,
}

impl Keyring {
    /// A ring with one key.
    pub fn new(volume: VolumeUid, id: KeyId, key: DataKey) -> Keyring {
        let keys = vec![(volume, id, key)];
        Keyring { keys }
    }

    /// Adds a key; one of the same name is replaced.
    pub fn add(&mut self, volume: VolumeUid, id: KeyId, key: DataKey) {
        self.keys.retain(|(v, i, _)| (*v, *i) != (volume, id));
        self.keys.push((volume, id, key));
    }

    /// The key of this name.
    pub fn get(&self, volume: &VolumeUid, id: KeyId) -> Option<&DataKey> {
        let found = self.keys.iter().find(|(v, i, _)| v == volume && *i == id);
        found.map(|(_, _, key)| key)
    }

    /// What a replica is shown so that `epoch` of `volume` may begin, sealed with key `id`. The salt is fresh and random.
    pub fn prove(&self, volume: VolumeUid, epoch: Epoch, id: KeyId, salt: EpochSalt) -> Result<KeyProof, KeyError> {
        let key = self.get(&volume, id).ok_or(KeyError::Missing(id))?;
        let check = key.check(&volume, id);
        let checks = self
            .keys
            .iter()
            .map(|(volume, id, key)| (*volume, *id, key.check(volume, *id)))
            .collect();
        let row = KeyRow {
            volume,
            epoch,
            key: id,
            salt,
            check,
        };
        Ok(KeyProof { row, checks })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const VOLUME: VolumeUid = [2; 16];

    fn key(byte: u8) -> DataKey {
        DataKey::from_slice(&[byte; 32]).unwrap()
    }

    fn proof(ring: &Keyring, id: u32) -> KeyProof {
        ring.prove(VOLUME, Epoch(3), KeyId(id), EpochSalt([9; 32])).unwrap()
    }

    #[test]
    fn a_key_of_another_length_is_refused_by_its_length() {
        let error = DataKey::from_slice(&[7; 31]).unwrap_err();
        assert_eq!(error.to_string(), "a data key has 32 bytes, not 31");
    }

    #[test]
    fn no_key_material_is_in_any_debug_output_or_message() {
        let ring = Keyring::new(VOLUME, KeyId(1), key(0xa7));
        let text = format!(
            "{:?} {:?} {:?} {}",
            ring,
            key(0xa7),
            proof(&ring, 1),
            KeyError::Wrong(KeyId(1))
        );
        for trace in ["167", "a7a7", "A7A7"] {
            assert!(!text.contains(trace), "{text}");
        }
        assert!(text.contains("DataKey(secret)"));
    }

    #[test]
    fn a_missing_and_a_wrong_key_are_told_apart() {
        let row = proof(&Keyring::new(VOLUME, KeyId(1), key(1)), 1).row;
        assert_eq!(proof(&Keyring::new(VOLUME, KeyId(1), key(1)), 1).covers(&row), Ok(()));
        let wrong = proof(&Keyring::new(VOLUME, KeyId(1), key(2)), 1);
        assert_eq!(wrong.covers(&row), Err(KeyError::Wrong(KeyId(1))));
        let other = proof(&Keyring::new(VOLUME, KeyId(2), key(1)), 2);
        assert_eq!(other.covers(&row), Err(KeyError::Missing(KeyId(1))));
        let foreign = KeyRow { volume: [3; 16], ..row };
        assert_eq!(
            proof(&Keyring::new(VOLUME, KeyId(1), key(1)), 1).covers(&foreign),
            Err(KeyError::Missing(KeyId(1)))
        );
    }

    #[test]
    fn the_check_of_a_key_depends_on_its_volume_and_number() {
        let check = key(1).check(&VOLUME, KeyId(1));
        assert_eq!(check, key(1).check(&VOLUME, KeyId(1)));
        assert_ne!(check, key(1).check(&[3; 16], KeyId(1)));
        assert_ne!(check, key(1).check(&VOLUME, KeyId(2)));
    }

    #[test]
    fn the_check_is_what_hkdf_says_elsewhere() {
        // Computed with the HKDF of Python's `cryptography`.
        assert_eq!(key(1).check(&VOLUME, KeyId(7)).0, CHECK_VECTOR);
    }

    const CHECK_VECTOR: [u8; 8] = [0x7f, 0x15, 0xf5, 0xa3, 0xf9, 0x7c, 0xcf, 0x51];
}
