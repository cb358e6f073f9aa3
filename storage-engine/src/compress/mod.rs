//! Compression of single blocks into whole 4 KiB pages.
//!
//! A block that saves at least one page is stored shorter; any other is stored as it is, so compression never takes
//! space. It pays from blocks of 8 KiB on. Blocks are compressed before they are sealed: sealed bytes do not shrink.
//!
//! ```text
//! plain   ┌─────────── block_bytes ───────────┐          stored length = block_bytes
//! shorter ┌ codec, length ┬ compressed ┬ zeros ┐         stored length = whole pages, fewer than the block's
//! ```
//!
//! So the stored length alone tells a compressed block from a plain one, and the codec is in the block: a volume may
//! change its codec at any time. Reading gives exactly a block or fails: nothing that is stored makes it write, or take
//! memory, beyond that.

use crate::buffer::PAGE_BYTES;
use crate::store::format::{Get, Put};

/// Bytes in front of the compressed ones.
const HEADER_BYTES: usize = 8;
/// Of zstd's levels the fastest whose ratio is still clearly better than LZ4's; see docs/rfd/0008-sealing.md.
const ZSTD_LEVEL: i32 = 1;

/// How blocks are compressed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Codec {
    /// Fast; the default of a volume that compresses.
    Lz4,
    /// Smaller, at several times the CPU.
    Zstd,
}

impl Codec {
    fn code(self) -> u8 {
        match self {
            Codec::Lz4 => 1,
            Codec::Zstd => 2,
        }
    }

    fn from_code(code: u8) -> Option<Codec> {
        [Codec::Lz4, Codec::Zstd].into_iter().find(|codec| codec.code() == code)
    }
}

/// Why stored bytes are no compressed block.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum CompressError {
    #[error("it names codec {0}, which this version does not know")]
    UnknownCodec(u8),
    #[error("its header does not make sense")]
    Header,
    #[error("it does not decompress to exactly one block")]
    Content,
}

/// Compresses and decompresses; keeps the tables of the codecs it has used (a few hundred KiB for zstd).
#[derive(Default)]
pub struct Compressor {
    scratch: Vec<u8>,
    zstd: Option<zstd::bulk::Compressor<'static>>,
    unzstd: Option<zstd::bulk::Decompressor<'static>>,
}

impl std::fmt::Debug for Compressor {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Compressor")
    }
}

impl Compressor {
    /// Takes no memory until it is used.
    pub fn new() -> Compressor {
        Compressor::default()
    }

    /// Compresses `block` into `out`, which is as long. Gives the stored length in bytes, a multiple of 4096 and at least
    /// one page shorter than the block; `None` if it does not shrink by that. What lies behind it in `out` is undefined.
    pub fn compress(&mut self, codec: Codec, block: &[u8], out: &mut [u8]) -> Option<usize> {
        assert_eq!(block.len(), out.len(), "a block is compressed into room for a block");
        let most = block.len().checked_sub(PAGE_BYTES).filter(|most| *most >= PAGE_BYTES)?;
        let room = &mut out[HEADER_BYTES..most];
        let len = match codec {
            Codec::Lz4 => self.lz4(block, room)?,
            // It gives up when it finds no room.
            Codec::Zstd => self.zstd()?.compress_to_buffer(block, room).ok()?,
        };
        let stored = (HEADER_BYTES + len).next_multiple_of(PAGE_BYTES);
        Put::new(out).u8(codec.code()).u8(0).u16(0).u32(len as u32);
        out[HEADER_BYTES + len..stored].fill(0);
        Some(stored)
    }

    /// Decompresses `stored`, which is shorter than a block, into the block `out`. On failure `out` holds anything.
    pub fn decompress(&mut self, stored: &[u8], out: &mut [u8]) -> Result<(), CompressError> {
        if stored.len() < PAGE_BYTES || stored.len() >= out.len() {
            return Err(CompressError::Header);
        }
        let mut get = Get::new(stored);
        let (code, zeros, more_zeros, len) = (get.u8(), get.u8(), get.u16(), get.u32() as usize);
        let codec = Codec::from_code(code).ok_or(CompressError::UnknownCodec(code))?;
        if zeros != 0 || more_zeros != 0 || len > stored.len() - HEADER_BYTES {
            return Err(CompressError::Header);
        }
        let compressed = &stored[HEADER_BYTES..HEADER_BYTES + len];
        let written = match codec {
            Codec::Lz4 => lz4_flex::block::decompress_into(compressed, out).ok(),
            Codec::Zstd => self
                .unzstd()
                .and_then(|unzstd| unzstd.decompress_to_buffer(compressed, &mut *out).ok()),
        };
        if written != Some(out.len()) {
            return Err(CompressError::Content);
        }
        Ok(())
    }

    /// The codec wants room for the worst case before it begins.
    fn lz4(&mut self, block: &[u8], room: &mut [u8]) -> Option<usize> {
        let worst = lz4_flex::block::get_maximum_output_size(block.len());
        self.scratch.resize(worst.max(self.scratch.len()), 0);
        let len = lz4_flex::block::compress_into(block, &mut self.scratch).ok()?;
        room.get_mut(..len)?.copy_from_slice(&self.scratch[..len]);
        Some(len)
    }

    fn zstd(&mut self) -> Option<&mut zstd::bulk::Compressor<'static>> {
        if self.zstd.is_none() {
            let mut zstd = zstd::bulk::Compressor::new(ZSTD_LEVEL).ok()?;
            // The block has checks of its own.
            zstd.include_checksum(false).ok()?;
            zstd.include_contentsize(false).ok()?;
            self.zstd = Some(zstd);
        }
        self.zstd.as_mut()
    }

    fn unzstd(&mut self) -> Option<&mut zstd::bulk::Decompressor<'static>> {
        if self.unzstd.is_none() {
            self.unzstd = zstd::bulk::Decompressor::new().ok();
        }
        self.unzstd.as_mut()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const CODECS: [Codec; 2] = [Codec::Lz4, Codec::Zstd];

    /// SplitMix64 (Steele et al. 2014).
    struct Random(u64);

    impl Random {
        fn next(&mut self) -> u64 {
            self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
            let mut z = self.0;
            z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
            z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
            z ^ (z >> 31)
        }

        fn below(&mut self, end: usize) -> usize {
            (self.next() % end as u64) as usize
        }
    }

    /// Bytes that shrink more or less, by chance: runs, repeats, words of a small alphabet, noise.
    fn block(random: &mut Random, len: usize) -> Vec<u8> {
        let mut bytes = Vec::with_capacity(len + 512);
        let noisy = random.below(4);
        while bytes.len() < len {
            let run = 1 + random.below(400);
            match random.below(4 + 2 * noisy) {
                0 => bytes.extend(vec![random.next() as u8; run]),
                1 if !bytes.is_empty() => {
                    let from = random.below(bytes.len());
                    let end = (from + run).min(bytes.len());
                    bytes.extend_from_within(from..end);
                }
                2 | 3 => bytes.extend((0..run).map(|_| b"galleon "[random.below(8)])),
                _ => bytes.extend((0..run).map(|_| random.next() as u8)),
            }
        }
        bytes.truncate(len);
        bytes
    }

    #[test]
    fn what_shrinks_comes_back_and_what_does_not_is_left_alone() {
        let mut compressor = Compressor::new();
        let mut random = Random(1);
        let (mut shorter, mut plain) = (0, 0);
        for n in 0..2_000 {
            let len = [8 << 10, 16 << 10, 64 << 10][n % 3];
            let (block, mut out) = (block(&mut random, len), vec![0xee; len]);
            for codec in CODECS {
                let Some(stored) = compressor.compress(codec, &block, &mut out) else {
                    plain += 1;
                    continue;
                };
                shorter += 1;
                assert!(stored.is_multiple_of(PAGE_BYTES) && stored + PAGE_BYTES <= len);
                let mut back = vec![0; len];
                compressor.decompress(&out[..stored], &mut back).unwrap();
                assert_eq!(back, block, "{codec:?} {len}");
            }
        }
        assert!(shorter > 500 && plain > 100, "{shorter} shrank, {plain} did not");
    }

    #[test]
    fn a_block_of_zeros_or_text_shrinks_to_one_page_and_noise_does_not_shrink() {
        let mut compressor = Compressor::new();
        let mut out = vec![0; 16384];
        let noise: Vec<u8> = {
            let mut random = Random(9);
            (0..16384).map(|_| random.next() as u8).collect()
        };
        for codec in CODECS {
            assert_eq!(compressor.compress(codec, &[0; 16384], &mut out), Some(4096));
            assert_eq!(compressor.compress(codec, &noise, &mut out), None);
        }
    }

    #[test]
    fn a_block_of_one_page_is_never_compressed() {
        for codec in CODECS {
            assert_eq!(
                Compressor::new().compress(codec, &[0; 4096], &mut [1; 4096]),
                None,
                "there is no page to save"
            );
        }
    }

    #[test]
    fn what_is_stored_depends_on_the_block_alone() {
        let block = block(&mut Random(5), 16384);
        for codec in CODECS {
            let (mut one, mut two) = (vec![0xaa; 16384], vec![0xbb; 16384]);
            let (mut fresh, mut used) = (Compressor::new(), Compressor::new());
            used.compress(codec, &vec![b'x'; 16384], &mut two);
            let stored = fresh.compress(codec, &block, &mut one);
            assert_eq!(used.compress(codec, &block, &mut two), stored);
            let stored = stored.unwrap_or(0);
            assert_eq!(one[..stored], two[..stored], "{codec:?}: nothing of the buffer shows");
        }
    }

    #[test]
    fn no_input_makes_decompression_panic_or_give_another_length() {
        let mut compressor = Compressor::new();
        let mut random = Random(3);
        let mut came_through = 0;
        for n in 0..6_000 {
            let codec = CODECS[n % 2];
            let mut out = vec![0; 16384];
            let stored = match compressor.compress(codec, &block(&mut random, 16384), &mut out) {
                Some(stored) if n % 3 > 0 => stored,
                _ => {
                    // Noise that claims to be compressed.
                    out.iter_mut().for_each(|byte| *byte = random.next() as u8);
                    let len = random.below(8192) as u32;
                    Put::new(&mut out).u8(codec.code()).u8(0).u16(0).u32(len);
                    4096 * (1 + random.below(3))
                }
            };
            let flips = random.below(6);
            for _ in 0..flips {
                let most = stored.min(256 + random.below(stored));
                let at = random.below(most);
                out[at] ^= 1 << random.below(8);
            }
            let mut back = vec![0; 16384];
            came_through += usize::from(compressor.decompress(&out[..stored], &mut back).is_ok());
        }
        assert!(came_through > 100, "some were left whole");
    }

    #[test]
    fn what_would_grow_beyond_a_block_is_refused() {
        let mut compressor = Compressor::new();
        // 64 KiB of zeros fit into one page; asked to come back as 16 KiB, or as 128, they are refused.
        for codec in CODECS {
            let mut out = vec![0; 65536];
            let stored = compressor.compress(codec, &[0; 65536], &mut out).unwrap();
            for len in [16384, 131_072] {
                let mut back = vec![0; len];
                assert_eq!(
                    compressor.decompress(&out[..stored], &mut back),
                    Err(CompressError::Content),
                    "{codec:?} {len}"
                );
            }
        }
    }

    #[test]
    fn an_unknown_codec_is_named() {
        let mut stored = vec![0; 4096];
        stored[0] = 77;
        let mut compressor = Compressor::new();
        let refused = compressor.decompress(&stored, &mut [0; 8192]).unwrap_err();
        assert_eq!(refused, CompressError::UnknownCodec(77));
        for len in [0, 7, 8192, 12288] {
            let refused = compressor.decompress(&vec![1; len], &mut [0; 8192]);
            assert_eq!(refused, Err(CompressError::Header), "{len} stored bytes");
        }
    }
}
