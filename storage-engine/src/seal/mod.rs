//! Sealing: what leaves the coordinator of a volume is ciphertext, and what comes back is proven to be what was sealed.
//!
//! AES-256-GCM, one call for each block. Replicas, their cleaner, their scrub and the offline checker see ciphertext and
//! tags only; they hold no key and need none, because the keyless check (CRC-32C) is made over the ciphertext.
//!
//! ```text
//! data key (32 bytes, of the volume, from outside)
//!    │  HKDF-SHA256, salt = 32 random bytes of this epoch, info = "galleon/v1/data" | volume | epoch
//!    ▼
//! epoch key ── nonce = low 32 bits of the block's address | number of the write:64
//!           └─ bound data = format | volume | address | epoch | number of the write | key id | block size
//! ```
//!
//! What always holds:
//! - No (key, nonce) pair is used twice. A write has a number that its epoch never uses again, covers each address once,
//!   and is shorter than 2³² blocks, so the low bits of the address tell its blocks apart. No epoch is started twice,
//!   and if one were (a registry restored from an old backup), its salt would be another one, and so its key.
//! - Plaintext is not released before its tag was checked; bytes that fail are wiped.
//! - A block that was swapped, moved, relabelled, or taken from another time or volume does not open.
//! - No key is in a message, in a `Debug` output or on the disk. Salts and key checks are on the disk and not secret.
//!
//! What this does not notice: a whole replica (map and blocks together) set back to an older state by somebody who can
//! write to its disk. Versions known outside the replica do.

mod epoch_key;
mod key;
mod sealer;

pub use epoch_key::{Address, EpochKey, TAG_BYTES, Tag, Tampered};
pub use key::{DATA_KEY_BYTES, DataKey, EpochSalt, KeyCheck, KeyError, KeyId, KeyProof, KeyRow, Keyring, VolumeUid};
pub use sealer::{NONCE_BYTES, OpenFailure, Sealer, UsedNonce};

/// Version of what is bound to a block beside its bytes. It changes when the rules on this page do.
pub const SEAL_VERSION: u16 = 1;
