//! Whole replicas with damage that somebody signed: changed at random places, with every check made to fit again.
//!
//! A replica is opened, all of it is read, and it is checked offline. None of that may panic. What is read is zeros, or
//! was written to that very block at some time (its check is bound to the address and was not changed), or is an error:
//! a pointer that was changed and signed may lead to an older version, and no check can tell.

use std::collections::BTreeSet;
use std::sync::OnceLock;

use galleonfs_storage_engine::buffer::BufMut;
use galleonfs_storage_engine::io::{Disk, FileId};
use galleonfs_storage_engine::request::{Control, Reply, Request};
use galleonfs_storage_engine::store::check::check;
use galleonfs_storage_engine::store::{OpenOptions, inspect, open_replica};
use galleonfs_storage_engine::types::{BLOCK_BYTES, Epoch};
use galleonfs_storage_engine::volume::Volume;

use crate::disk::{BLOCK, Kind, Place, read, replace, structures, write};
use crate::harness::{IDENTITY, Rig, SEGMENT_BYTES, keyring, proof, snapshot_id, stamps};
use crate::sim_disk::{Cut, Random, SimDisk};

/// A map of two levels.
const SIZE_BLOCKS: u64 = 600;
const EPOCH: u32 = 9;
const SALT: u64 = 0x5a17;
/// Bytes of one change in an input.
const CHANGE_BYTES: usize = 10;

/// A replica to damage, and what was ever written in it: block and stamp.
struct Base {
    disk: SimDisk,
    places: Vec<Place>,
    written: BTreeSet<(u64, u64)>,
}

/// Kinds of replicas: closed in order or not, sealed or not.
pub const BASES: u8 = 4;

pub fn is_sealed(number: u8) -> bool {
    number & 2 != 0
}

fn base(number: u8) -> &'static Base {
    static MADE: [OnceLock<Base>; BASES as usize] = [const { OnceLock::new() }; BASES as usize];
    let number = number % BASES;
    MADE[usize::from(number)].get_or_init(|| make(number & 1 != 0, is_sealed(number)))
}

/// A replica before it is damaged, and what it is made of.
pub fn structures_of(number: u8) -> (SimDisk, &'static [Place]) {
    let base = base(number);
    (base.disk.clone(), &base.places)
}

/// Overwrites, zeroes, snapshots of which one was deleted, several segments, and a tail behind the checkpoint unless it
/// was closed in order.
fn make(clean: bool, sealed: bool) -> Base {
    let mut rig = Rig::fresh_as(SIZE_BLOCKS, sealed);
    let mut random = Random(3);
    let mut written = BTreeSet::new();
    let mut stamp = 1;
    for n in 0..140 {
        if n % 40 == 30 {
            rig.snapshot(snapshot_id(n));
        }
        if n == 120 {
            let id = snapshot_id(30);
            rig.control(Control::Delete { id }).expect("the snapshot is there");
        }
        let (lba, blocks) = (random.below(SIZE_BLOCKS - 16), 1 + random.below(16));
        if n % 9 == 8 {
            let (offset, len) = (lba * BLOCK_BYTES, blocks * BLOCK_BYTES);
            let zeroed = rig.run(Request::Zero {
                offset,
                len,
                fua: false,
            });
            zeroed.expect("there is room");
            continue;
        }
        rig.write(lba, blocks, stamp).expect("there is room");
        written.extend((0..blocks).map(|n| (lba + n, stamp + n)));
        stamp += blocks;
    }
    rig.flush().expect("the disk syncs");
    rig.pass_time(100);
    if clean {
        rig.close();
    } else {
        rig.write(0, 8, stamp).expect("there is room");
        written.extend((0..8).map(|n| (n, stamp + n)));
    }
    let mut disk = rig.disk.cut(Cut::All);
    let places = structures(&mut disk);
    Base { disk, places, written }
}

/// One change: what kind, where, at which byte, and to what.
struct Change {
    kind: u8,
    place: usize,
    at: usize,
    value: [u8; 4],
}

impl Change {
    fn new(bytes: &[u8; CHANGE_BYTES]) -> Change {
        Change {
            kind: bytes[0],
            place: usize::from(u16::from_le_bytes([bytes[1], bytes[2]])),
            at: usize::from(u16::from_le_bytes([bytes[3], bytes[4]])),
            value: [bytes[5], bytes[6], bytes[7], bytes[8]],
        }
    }

    fn bytes(&self, bytes: &mut [u8]) {
        // The fields of a structure are at its start, and entries of a page have 24 bytes.
        let at = match self.kind >> 6 {
            0 | 1 => self.at % 256,
            2 => 64 + self.at % 40 * 24 + self.at / 40 % 24,
            _ => self.at,
        } % bytes.len();
        let width = (1 << (self.kind >> 4 & 3)).min(bytes.len() - at);
        let value = match self.value[3] {
            0..64 => u64::from(u32::from_le_bytes(self.value)),
            64..96 => u64::from(self.value[0]),
            96..128 => u64::MAX - u64::from(self.value[0]),
            128..160 => 1 << (self.value[0] % 64),
            _ => {
                bytes[at] ^= 1 << (self.value[0] % 8);
                return;
            }
        };
        bytes[at..at + width].copy_from_slice(&value.to_le_bytes()[..width]);
    }

    fn apply(&self, base: &Base, disk: &mut SimDisk) {
        let before = [&IDENTITY.volume[..], &SALT.to_le_bytes()].concat();
        let place = base.places[self.place % base.places.len()];
        match self.kind & 15 {
            // A structure, signed again. Superblocks are few and matter most.
            kind @ 0..11 => {
                let superblocks = base.places.iter().filter(|place| place.kind == Kind::Superblock);
                let both: Vec<Place> = superblocks.copied().collect();
                for place in if kind < 2 { both } else { vec![place] } {
                    let mut bytes = read(disk, place.file, place.offset, place.len);
                    self.bytes(&mut bytes);
                    replace(disk, &base.places, place, bytes, &before);
                }
            }
            // Anything, unsigned.
            11 => {
                let mut bytes = read(disk, place.file, place.offset, BLOCK);
                self.bytes(&mut bytes);
                write(disk, place.file, place.offset, &bytes);
            }
            // One structure where another was.
            12 => {
                let other = base.places[self.at % base.places.len()];
                let bytes = read(disk, other.file, other.offset, other.len);
                write(disk, place.file, place.offset, &bytes);
            }
            // Nothing where something was.
            13 => write(disk, place.file, place.offset, &[0; BLOCK]),
            14 if self.at.is_multiple_of(4) => disk.delete(place.file),
            14 => {
                let len = u64::from(self.value[0]) * BLOCK as u64;
                disk.create(place.file, len).expect("there is room");
            }
            // A segment twice, under another number.
            _ => {
                let to = FileId::Segment(galleonfs_storage_engine::io::SegmentId(u32::from_le_bytes(self.value)));
                let mut bytes = BufMut::zeroed(SEGMENT_BYTES as usize);
                if disk.read(place.file, 0, bytes.as_mut()).is_ok() {
                    disk.create(to, SEGMENT_BYTES).expect("there is room");
                    disk.write(to, 0, &[bytes.freeze()]).expect("a disk in memory takes it");
                }
            }
        }
    }
}

/// The first byte chooses the replica, each ten more are a change.
pub fn replica(data: &[u8]) {
    let (first, rest) = data.split_first().unwrap_or((&0, &[]));
    let base = base(*first);
    let mut disk = base.disk.clone();
    for change in rest.chunks_exact(CHANGE_BYTES) {
        let change: &[u8; CHANGE_BYTES] = change.try_into().expect("a chunk has its length");
        Change::new(change).apply(base, &mut disk);
    }
    let report = check(&mut disk.clone());
    let sealed = inspect(&mut disk).is_ok_and(|superblock| superblock.geometry.sealed);
    let mut options = OpenOptions::new(IDENTITY, Epoch(EPOCH));
    let ring = keyring();
    if sealed {
        options.keys = Some(proof(&ring, EPOCH));
    }
    let Ok((store, _)) = open_replica(&mut disk, options) else {
        return;
    };
    assert!(report.is_ok(), "what can be opened can be checked");
    let engine = if sealed {
        let Ok(engine) = Volume::sealed(store, ring) else {
            return;
        };
        engine
    } else {
        Volume::new(store)
    };
    let mut rig = Rig::new(disk, engine);
    let size_blocks = (rig.engine.size_bytes() / BLOCK_BYTES).min(SIZE_BLOCKS * 2);
    for lba in (0..size_blocks).step_by(20) {
        let blocks = 20.min(size_blocks - lba);
        let (offset, len) = (lba * BLOCK_BYTES, blocks * BLOCK_BYTES);
        verify(base, lba, rig.run(Request::Read { offset, len }));
        for held in rig.engine.snapshots() {
            if offset + len <= held.size_bytes {
                let id = held.id;
                verify(base, lba, rig.control(Control::Read { id, offset, len }));
            }
        }
    }
}

fn verify(base: &Base, lba: u64, answer: galleonfs_storage_engine::request::Answer) {
    let Ok(Reply::Data(pieces)) = answer else {
        return;
    };
    for (lba, stamp) in (lba..).zip(stamps(BLOCK_BYTES, &pieces)) {
        assert!(
            stamp == 0 || base.written.contains(&(lba, stamp)),
            "block {lba} reads as something that was never written to it"
        );
    }
}
