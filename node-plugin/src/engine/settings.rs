//! What a volume's class says about how it is served, and the key of a sealed one.

use std::fmt;
use std::sync::Arc;

use galleonfs_storage_engine::compress::Codec;
use galleonfs_storage_engine::seal::{DATA_KEY_BYTES, DataKey, EpochSalt, KeyError, KeyId, KeyProof, Keyring};
use galleonfs_storage_engine::types::Epoch;
use galleonfs_storage_engine::volume::WhenFull;
use uuid::Uuid;
use zeroize::Zeroizing;

/// How a volume is served. May change from one attach to the next, but for the sectors: file systems are made for them.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Settings {
    /// Bytes per logical sector of the device: 512 or 4096.
    pub sector_bytes: u32,
    /// How what is written is compressed, if it is.
    pub compression: Option<Codec>,
    /// What becomes of writes that find no room in the pool.
    pub when_full: WhenFull,
    /// Every write is answered only when it is on stable storage.
    pub writes_through: bool,
}

impl Default for Settings {
    fn default() -> Settings {
        Settings {
            sector_bytes: 4096,
            compression: None,
            when_full: WhenFull::Wait,
            writes_through: false,
        }
    }
}

/// The data key of a sealed volume. Its memory is wiped with the last clone, and nothing prints it.
#[derive(Clone)]
pub struct VolumeKey {
    id: KeyId,
    bytes: Arc<Zeroizing<[u8; DATA_KEY_BYTES]>>,
}

impl VolumeKey {
    /// Key number `id` of the volume, of 32 bytes. The caller wipes what it was read from.
    pub fn new(id: u32, bytes: &[u8]) -> Result<VolumeKey, KeyError> {
        let bytes = bytes.try_into().map_err(|_| KeyError::Length(bytes.len()))?;
        Ok(VolumeKey {
            id: KeyId(id),
            bytes: Arc::new(Zeroizing::new(bytes)),
        })
    }

    /// A ring with this key for `volume`.
    pub(crate) fn ring(&self, volume: Uuid) -> Keyring {
        let key = DataKey::from_slice(&self.bytes[..]).expect("it has the length of a key");
        Keyring::new(volume.into_bytes(), self.id, key)
    }

    /// What a replica of `volume` is shown so that `epoch` may begin.
    pub(crate) fn prove(&self, volume: Uuid, epoch: Epoch) -> KeyProof {
        self.ring(volume)
            .prove(volume.into_bytes(), epoch, self.id, epoch_salt())
            .expect("the ring has the key")
    }
}

impl fmt::Debug for VolumeKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "VolumeKey({}, secret)", self.id.0)
    }
}

/// 244 random bits; 12 bits of the 32 bytes are those that mark a random UUID.
fn epoch_salt() -> EpochSalt {
    let mut salt = [0; 32];
    salt[..16].copy_from_slice(Uuid::new_v4().as_bytes());
    salt[16..].copy_from_slice(Uuid::new_v4().as_bytes());
    EpochSalt(salt)
}
