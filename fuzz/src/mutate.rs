//! Changing an input by chance, where nothing tells which change reaches new code.

use crate::sim_disk::Random;

/// Numbers at which decoders turn.
const INTERESTING: [u64; 14] = [
    0,
    1,
    2,
    7,
    8,
    127,
    128,
    255,
    4095,
    4096,
    0x7fff_ffff,
    0xffff_ffff,
    0x7fff_ffff_ffff_ffff,
    u64::MAX,
];

/// Input number `seed`: one of the corpus, or a piece of two, with one to sixteen changes.
pub fn mutated(seed: u64, corpus: &[Vec<u8>], bytes_max: usize) -> Vec<u8> {
    let mut random = Random(seed);
    let pick = |random: &mut Random| match corpus.len() as u64 {
        0 => Vec::new(),
        count => corpus[random.below(count) as usize].clone(),
    };
    let mut bytes = pick(&mut random);
    if random.chance(15) {
        let other = pick(&mut random);
        let (cut, from) = (below(&mut random, bytes.len() + 1), below(&mut random, other.len() + 1));
        bytes.truncate(cut);
        bytes.extend_from_slice(&other[from..]);
    }
    let most = 1 << random.below(5);
    for _ in 0..1 + random.below(most) {
        change(&mut random, &mut bytes);
    }
    bytes.truncate(bytes_max);
    bytes
}

fn below(random: &mut Random, end: usize) -> usize {
    random.below(end.max(1) as u64) as usize
}

fn change(random: &mut Random, bytes: &mut Vec<u8>) {
    // Most of a structure is at its start.
    let near = [16, 64, 256, usize::MAX][below(random, 4)].min(bytes.len());
    let at = below(random, near);
    match random.below(10) {
        0..3 if !bytes.is_empty() => bytes[at] ^= 1 << random.below(8),
        3 if !bytes.is_empty() => bytes[at] = random.next() as u8,
        4..7 if !bytes.is_empty() => {
            let width = (1usize << random.below(4)).min(bytes.len() - at);
            let value = match random.below(3) {
                0 => random.next(),
                1 => random.below(300),
                _ => INTERESTING[below(random, INTERESTING.len())].wrapping_sub(random.below(2)),
            };
            bytes[at..at + width].copy_from_slice(&value.to_le_bytes()[..width]);
        }
        7 => {
            let some: Vec<u8> = (0..1 + random.below(16)).map(|_| random.next() as u8).collect();
            bytes.splice(at..at, some);
        }
        8 if !bytes.is_empty() => {
            let end = at + 1 + below(random, (bytes.len() - at).min(64));
            if random.chance(50) {
                bytes.drain(at..end.min(bytes.len()));
            } else {
                let part = bytes[at..end.min(bytes.len())].to_vec();
                let to = below(random, bytes.len());
                bytes.splice(to..to, part);
            }
        }
        _ => bytes.truncate(below(random, bytes.len() + 1)),
    }
}
