//! The key of one epoch: seals and opens single blocks.

use std::fmt;

use ring::aead::{AES_256_GCM, Aad, LessSafeKey, Nonce, UnboundKey};

use super::key::{DataKey, KeyRow};
use super::{SEAL_VERSION, VolumeUid};
use crate::store::format::Put;
use crate::types::{Epoch, Lba, Seq};

/// Bytes of a tag: the full length, never cut.
pub const TAG_BYTES: usize = 16;
pub const NONCE_BYTES: usize = 12;
const BOUND_BYTES: usize = 2 + 16 + 8 + 4 + 8 + 4 + 4;
const DATA_INFO: &[u8] = b"galleon/v1/data";

/// Proves a block.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Default)]
pub struct Tag(pub [u8; TAG_BYTES]);

/// Which block, written when.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Address {
    pub lba: Lba,
    pub seq: Seq,
}

/// What was stored is not what was sealed under this key for this address and time.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("the seal does not fit")]
pub struct Tampered;

/// Made from the data key and the epoch's row.
pub struct EpochKey {
    key: LessSafeKey,
    /// What is bound to every block; address and write number are filled in for each.
    bound: [u8; BOUND_BYTES],
}

impl EpochKey {
    /// The key of `row`'s epoch for blocks of `block_bytes` bytes.
    pub fn new(data_key: &DataKey, row: &KeyRow, block_bytes: u32) -> EpochKey {
        let info: [&[u8]; 3] = [DATA_INFO, &row.volume, &row.epoch.0.to_le_bytes()];
        let key = data_key.derive(&row.salt.0, &info, &AES_256_GCM, |material| UnboundKey::from(material));
        EpochKey {
            key: LessSafeKey::new(key),
            bound: bound(&row.volume, row.epoch, row.key.0, block_bytes),
        }
    }

    /// The nonce of a block.
    pub fn nonce(at: Address) -> [u8; NONCE_BYTES] {
        let mut nonce = [0; NONCE_BYTES];
        Put::new(&mut nonce).u32(at.lba.0 as u32).u64(at.seq.0);
        nonce
    }

    fn bound(&self, at: Address) -> [u8; BOUND_BYTES] {
        let mut bound = self.bound;
        Put::new(&mut bound).seek(18).u64(at.lba.0).seek(30).u64(at.seq.0);
        bound
    }

    /// Turns plaintext into ciphertext in place.
    pub fn seal(&self, at: Address, bytes: &mut [u8]) -> Tag {
        let nonce = Nonce::assume_unique_for_key(Self::nonce(at));
        let tag = self
            .key
            .seal_in_place_separate_tag(nonce, Aad::from(self.bound(at)), bytes)
            .expect("a block is far below the longest message");
        Tag(tag.as_ref().try_into().expect("a tag has 16 bytes"))
    }

    /// Turns ciphertext into plaintext in place, if it is what was sealed; else wipes it.
    pub fn open(&self, at: Address, tag: Tag, bytes: &mut [u8]) -> Result<(), Tampered> {
        let nonce = Nonce::assume_unique_for_key(Self::nonce(at));
        let opened = self
            .key
            .open_in_place_separate_tag(nonce, Aad::from(self.bound(at)), tag.0.into(), bytes, 0..);
        if opened.is_err() {
            bytes.fill(0);
            return Err(Tampered);
        }
        Ok(())
    }
}

/// format | volume | address | epoch | number of the write | key id | block size
fn bound(volume: &VolumeUid, epoch: Epoch, key: u32, block_bytes: u32) -> [u8; BOUND_BYTES] {
    let mut bound = [0; BOUND_BYTES];
    let mut put = Put::new(&mut bound);
    put.u16(SEAL_VERSION).bytes(volume).u64(0).u32(epoch.0).u64(0);
    put.u32(key).u32(block_bytes);
    bound
}

impl fmt::Debug for EpochKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("EpochKey(secret)")
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::seal::{EpochSalt, KeyCheck, KeyId};

    const ROW: KeyRow = KeyRow {
        volume: [2; 16],
        epoch: Epoch(7),
        key: KeyId(5),
        salt: EpochSalt([6; 32]),
        check: KeyCheck([0; 8]),
    };
    const AT: Address = Address {
        lba: Lba(0x1_0000_0002),
        seq: Seq(3),
    };

    fn key_of(data_key: u8, row: KeyRow, block_bytes: u32) -> EpochKey {
        let data_key = DataKey::from_slice(&[data_key; 32]).unwrap();
        EpochKey::new(&data_key, &row, block_bytes)
    }

    fn plain() -> Vec<u8> {
        (0..4096_u32).map(|n| ((n * 7) >> 3) as u8).collect()
    }

    #[test]
    fn a_block_opens_to_what_was_sealed_and_its_ciphertext_is_another() {
        let key = key_of(1, ROW, 4096);
        let mut bytes = plain();
        let tag = key.seal(AT, &mut bytes);
        let same = bytes.iter().zip(plain()).filter(|(a, b)| **a == *b).count();
        assert!(same < 64, "{same} of 4096 bytes are as they were");
        key.open(AT, tag, &mut bytes).unwrap();
        assert_eq!(bytes, plain());
    }

    #[test]
    fn sealing_is_what_another_implementation_says() {
        // HKDF and AES-GCM of Python's `cryptography`, put together by the words of the module.
        let mut bytes = plain();
        let tag = key_of(1, ROW, 4096).seal(AT, &mut bytes);
        assert_eq!(tag.0, TAG_VECTOR);
        assert_eq!(bytes[..16], FIRST_VECTOR);
        assert_eq!(bytes[4080..], LAST_VECTOR);
    }

    const TAG_VECTOR: [u8; 16] = [
        0x77, 0x9d, 0x10, 0x54, 0x1d, 0xb8, 0x9f, 0x7c, 0x73, 0xb9, 0xa4, 0x84, 0x09, 0x2a, 0x72, 0xf0,
    ];
    const FIRST_VECTOR: [u8; 16] = [
        0x43, 0x75, 0xbd, 0xc3, 0xba, 0x1b, 0x42, 0xd5, 0x9a, 0x7b, 0x59, 0xdd, 0x9d, 0xc7, 0x47, 0xcf,
    ];
    const LAST_VECTOR: [u8; 16] = [
        0x58, 0x1a, 0x67, 0xbd, 0xe4, 0x51, 0x98, 0x01, 0x9d, 0x37, 0x79, 0xbe, 0x16, 0xe2, 0xd3, 0x44,
    ];

    #[test]
    fn the_published_vector_of_aes_256_gcm_holds() {
        // Test case 16 of "The Galois/Counter Mode of Operation" (McGrew, Viega).
        let hex = |text: &str| -> Vec<u8> {
            let digit = |n| u8::from_str_radix(&text[n..n + 2], 16).unwrap();
            (0..text.len()).step_by(2).map(digit).collect()
        };
        let key = hex("feffe9928665731c6d6a8f9467308308feffe9928665731c6d6a8f9467308308");
        let key = LessSafeKey::new(UnboundKey::new(&AES_256_GCM, &key).unwrap());
        let nonce: [u8; 12] = hex("cafebabefacedbaddecaf888").try_into().unwrap();
        let mut bytes = hex(
            "d9313225f88406e5a55909c5aff5269a86a7a9531534f7da2e4c303d8a318a721c3c0c95956809532fcf0e2449a6b525b16aedf5aa0de657ba637b39",
        );
        let bound = hex("feedfacedeadbeeffeedfacedeadbeefabaddad2");
        let tag = key
            .seal_in_place_separate_tag(Nonce::assume_unique_for_key(nonce), Aad::from(&bound), &mut bytes)
            .unwrap();
        assert_eq!(tag.as_ref(), hex("76fc6ece0f4e1768cddf8853bb2d551b"));
        assert_eq!(
            bytes,
            hex(
                "522dc1f099567d07f47f37a32a84427d643a8cdcbfe5c0c97598a2bd2555d1aa8cb08e48590dbb3da7b08b1056828838c5f61e6393ba7a0abcc9f662"
            )
        );
    }

    #[test]
    fn nothing_opens_under_another_key_address_time_or_place() {
        let mut sealed = plain();
        let tag = key_of(1, ROW, 4096).seal(AT, &mut sealed);
        let others = [
            ("data key", key_of(2, ROW, 4096), AT),
            (
                "salt",
                key_of(
                    1,
                    KeyRow {
                        salt: EpochSalt([7; 32]),
                        ..ROW
                    },
                    4096,
                ),
                AT,
            ),
            ("volume", key_of(1, KeyRow { volume: [3; 16], ..ROW }, 4096), AT),
            ("epoch", key_of(1, KeyRow { epoch: Epoch(8), ..ROW }, 4096), AT),
            ("key id", key_of(1, KeyRow { key: KeyId(6), ..ROW }, 4096), AT),
            ("block size", key_of(1, ROW, 16384), AT),
            ("address", key_of(1, ROW, 4096), Address { lba: Lba(2), ..AT }),
            (
                "number of the write",
                key_of(1, ROW, 4096),
                Address { seq: Seq(4), ..AT },
            ),
        ];
        for (what, key, at) in others {
            let mut bytes = sealed.clone();
            assert_eq!(key.open(at, tag, &mut bytes), Err(Tampered), "another {what}");
            assert!(bytes.iter().all(|byte| *byte == 0), "{what}: what fails is wiped");
        }
    }

    #[test]
    fn every_flipped_bit_of_block_and_tag_is_noticed() {
        let key = key_of(1, ROW, 4096);
        let mut sealed = plain();
        let tag = key.seal(AT, &mut sealed);
        let mut bytes = sealed.clone();
        for bit in 0..4096 * 8 {
            bytes.copy_from_slice(&sealed);
            bytes[bit / 8] ^= 1 << (bit % 8);
            assert!(key.open(AT, tag, &mut bytes).is_err(), "bit {bit} of the block");
        }
        for bit in 0..TAG_BYTES * 8 {
            bytes.copy_from_slice(&sealed);
            let mut other = tag;
            other.0[bit / 8] ^= 1 << (bit % 8);
            assert!(key.open(AT, other, &mut bytes).is_err(), "bit {bit} of the tag");
        }
        for len in [0, 1, 4095] {
            let mut cut = sealed[..len].to_vec();
            assert!(key.open(AT, tag, &mut cut).is_err(), "cut to {len} bytes");
        }
    }
}
