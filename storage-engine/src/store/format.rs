//! How numbers become bytes: little-endian, in the order of the calls, with a check over all but the check itself.
//!
//! `docs/disk-format.md` draws what is built from these; a test holds the drawing true.

use crc_fast::{CrcAlgorithm, Digest};

/// Version of every structure on the disk. A higher one is refused with a clear text, never guessed at.
pub const FORMAT_VERSION: u16 = 1;

/// Writes fields one after the other.
pub struct Put<'a> {
    bytes: &'a mut [u8],
    at: usize,
}

impl<'a> Put<'a> {
    pub fn new(bytes: &'a mut [u8]) -> Self {
        Put { bytes, at: 0 }
    }

    pub fn bytes(&mut self, value: &[u8]) -> &mut Self {
        self.bytes[self.at..self.at + value.len()].copy_from_slice(value);
        self.at += value.len();
        self
    }

    pub fn u8(&mut self, value: u8) -> &mut Self {
        self.bytes(&[value])
    }

    pub fn u16(&mut self, value: u16) -> &mut Self {
        self.bytes(&value.to_le_bytes())
    }

    pub fn u32(&mut self, value: u32) -> &mut Self {
        self.bytes(&value.to_le_bytes())
    }

    pub fn u64(&mut self, value: u64) -> &mut Self {
        self.bytes(&value.to_le_bytes())
    }

    /// Goes on at byte `at`, which is not behind the current one.
    pub fn seek(&mut self, at: usize) -> &mut Self {
        debug_assert!(at >= self.at);
        self.at = at;
        self
    }
}

/// Reads fields one after the other. The caller has checked that the bytes are long enough.
pub struct Get<'a> {
    bytes: &'a [u8],
    at: usize,
}

impl<'a> Get<'a> {
    pub fn new(bytes: &'a [u8]) -> Self {
        Get { bytes, at: 0 }
    }

    pub fn array<const N: usize>(&mut self) -> [u8; N] {
        let value = self.bytes[self.at..self.at + N]
            .try_into()
            .expect("the slice has N bytes");
        self.at += N;
        value
    }

    pub fn u8(&mut self) -> u8 {
        self.array::<1>()[0]
    }

    pub fn u16(&mut self) -> u16 {
        u16::from_le_bytes(self.array())
    }

    pub fn u32(&mut self) -> u32 {
        u32::from_le_bytes(self.array())
    }

    pub fn u64(&mut self) -> u64 {
        u64::from_le_bytes(self.array())
    }

    /// Goes on at byte `at`.
    pub fn seek(&mut self, at: usize) -> &mut Self {
        self.at = at;
        self
    }
}

/// CRC-32C (Castagnoli) of `parts`, one after the other. `seed` is the CRC-32C of what comes before them; 0 for nothing.
///
/// `crc-fast` because it folds with the widest carry-less multiplication that the processor has: 4 KiB with its address
/// took 350 ns where the `crc32c` crate took 650 (Cascade Lake, busy; 1 MiB: 57 us and 70 us), and processors with
/// VPCLMULQDQ gain more.
pub fn crc(seed: u32, parts: &[&[u8]]) -> u32 {
    let mut digest = Digest::new_with_init_state(CrcAlgorithm::Crc32Iscsi, u64::from(!seed));
    parts.iter().for_each(|part| digest.update(part));
    digest.finalize() as u32
}

/// CRC-32C of `bytes` without the four at `hole`, which hold the check, seeded with `seed`.
pub fn check_around(seed: u32, bytes: &[u8], hole: usize) -> u32 {
    crc(seed, &[&bytes[..hole], &bytes[hole + 4..]])
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_check_is_crc_32c() {
        // RFC 3720, B.4, and the usual one.
        assert_eq!(crc(0, &[&[0; 32]]), 0x8a91_36aa);
        assert_eq!(crc(0, &[&[0xff; 32]]), 0x62a8_ab43);
        assert_eq!(crc(0, &[b"123456789"]), 0xe306_9283);
    }

    #[test]
    fn a_check_goes_on_from_the_one_before() {
        let bytes: Vec<u8> = (0..4096 + 20u32).map(|n| (n * 7) as u8).collect();
        for cut in [0, 1, 20, 100, 4096] {
            let (first, rest) = bytes.split_at(cut);
            assert_eq!(crc(crc(0, &[first]), &[rest]), crc(0, &[&bytes]));
            assert_eq!(crc(0, &[first, rest]), crc(0, &[&bytes]));
        }
    }
}
