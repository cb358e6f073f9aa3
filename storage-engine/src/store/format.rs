//! How numbers become bytes: little-endian, in the order of the calls, with a check over all but the check itself.
//!
//! `docs/disk-format.md` draws what is built from these; a test holds the drawing true.

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

/// CRC-32C of `bytes` without the four at `hole`, which hold the check, seeded with `seed`.
pub fn check_around(seed: u32, bytes: &[u8], hole: usize) -> u32 {
    let crc = crc32c::crc32c_append(seed, &bytes[..hole]);
    crc32c::crc32c_append(crc, &bytes[hole + 4..])
}

/// The seed that ties a check to somebody's identity.
pub fn seed(parts: &[&[u8]]) -> u32 {
    parts.iter().fold(0, |crc, part| crc32c::crc32c_append(crc, part))
}
