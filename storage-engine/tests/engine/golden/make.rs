//! The lives that golden images tell of.

use galleonfs_storage_engine::buffer::BufMut;
use galleonfs_storage_engine::io::{Disk, FileId};
use galleonfs_storage_engine::request::{Control, Request};
use galleonfs_storage_engine::types::{BLOCK_BYTES, BlockSize};

use super::Contents;
use crate::clones::clone_disk;
use crate::harness::{IDENTITY, Model, Rig, Shape, open, open_as, snapshot_id};
use crate::sim_disk::{Cut, Random, SimDisk};
use crate::snapshot_model::Run;

/// A map of two levels, two megabytes of blocks.
const SIZE_BLOCKS: u64 = 700;
/// In one write.
pub const BLOCKS_MAX: u64 = 8;

/// Every replica to keep, with its name.
pub fn replicas() -> Vec<(&'static str, SimDisk)> {
    vec![
        ("closed", life(Shape::PLAIN, 120, true)),
        ("cut", life(Shape::PLAIN, 120, false)),
        // What is sealed does not compress.
        ("sealed-cut", life(Shape::SEALED, 3, false)),
        // Written in parts, and each block compressed.
        ("compressed-closed", life(LARGE, 60, true)),
        ("clone", clone()),
    ]
}

/// Several segments, overwrites, zeroes, growth, snapshots of which one is deleted; closed in order, or cut off with a
/// tail behind the checkpoint whose last record is torn.
fn life(shape: Shape, writes: u64, closed: bool) -> SimDisk {
    let mut rig = rig(shape);
    let blocks_max = if shape.sealed { 2 } else { BLOCKS_MAX };
    for part in 0..3 {
        write_some(&mut rig, part, writes / 3 + 1, blocks_max);
        rig.snapshot(snapshot_id(part));
        rig.pass_time(100);
    }
    let len = (SIZE_BLOCKS + 100) * BLOCK_BYTES;
    rig.run(Request::Grow { len }).expect("there is room");
    let id = snapshot_id(1);
    rig.control(Control::Delete { id }).expect("the snapshot is there");
    write_some(&mut rig, 3, writes / 5 + 1, blocks_max);
    rig.flush().expect("the disk syncs");
    if closed {
        rig.close();
        return rig.disk;
    }
    rig.pass_time(100);
    write_some(&mut rig, 4, writes / 20 + 1, blocks_max);
    rig.flush().expect("the disk syncs");
    torn(rig)
}

const LARGE: Shape = Shape {
    block_size: BlockSize::K16,
    sealed: false,
};

fn rig(shape: Shape) -> Rig {
    Rig::shaped(SIZE_BLOCKS * BLOCK_BYTES / shape.block_size.bytes(), shape)
}

/// Power goes while a write is on its way, and tears it.
fn torn(mut rig: Rig) -> SimDisk {
    let before = Contents::of(&mut rig);
    rig.submit(write(5, 4, 999));
    rig.poll();
    let disk = rig.disk_in_flight();
    let cuts = (0..).map(|seed| disk.cut(Cut::Random(seed)));
    let torn = cuts.take(1000).find(|disk| {
        let (engine, report) = open(&mut disk.clone(), 2).expect("it opens");
        let mut again = Rig::new(disk.clone(), engine);
        let some_of_it = bytes_of(&mut disk.clone()) != bytes_of(&mut rig.disk);
        report.torn_at.is_some() && some_of_it && Contents::of(&mut again) == before
    });
    torn.expect("one in three cuts tears a record")
}

fn bytes_of(disk: &mut SimDisk) -> Vec<(FileId, Vec<u8>)> {
    let files = disk.list().expect("a disk in memory lists its files");
    let read = files.into_iter().map(|(file, len)| {
        let mut bytes = vec![0; len as usize];
        disk.read(file, 0, &mut bytes).expect("the file is there");
        (file, bytes)
    });
    read.collect()
}

/// A clone of a snapshot of a volume that lives on, with writes of its own.
fn clone() -> SimDisk {
    let mut source = Rig::fresh(SIZE_BLOCKS);
    write_some(&mut source, 0, 60, BLOCKS_MAX);
    source.snapshot(snapshot_id(1));
    write_some(&mut source, 1, 20, BLOCKS_MAX);
    let mut source = Run::with(source, Model::new(SIZE_BLOCKS), IDENTITY, 1, 0);
    let (identity, mut disk, epoch, _) = clone_disk(&mut source, snapshot_id(1), SIZE_BLOCKS, 7);
    let (engine, _) = open_as(&mut disk, identity, epoch).expect("it was just made");
    assert_ne!(identity, IDENTITY);
    let mut rig = Rig::new(disk, engine);
    write_some(&mut rig, 2, 20, BLOCKS_MAX);
    rig.snapshot(snapshot_id(2));
    write_some(&mut rig, 3, 5, BLOCKS_MAX);
    rig.close();
    rig.disk
}

/// `count` writes and zeroings by chance.
pub fn write_some(rig: &mut Rig, seed: u64, count: u64, blocks_max: u64) {
    let mut random = Random(seed);
    for n in 0..count {
        let (lba, blocks) = (random.below(SIZE_BLOCKS - blocks_max), 1 + random.below(blocks_max));
        let request = if n % 11 == 10 {
            Request::Zero {
                offset: lba * BLOCK_BYTES,
                len: blocks * BLOCK_BYTES,
                fua: false,
            }
        } else {
            write(lba, blocks, (seed << 16) + n)
        };
        rig.run(request).expect("there is room");
        if n % 20 == 0 {
            rig.flush().expect("the disk syncs");
        }
    }
}

/// Blocks of words that say where and when they were written: different everywhere, and small when compressed.
fn write(lba: u64, blocks: u64, n: u64) -> Request {
    let mut data = BufMut::zeroed((blocks * BLOCK_BYTES) as usize);
    for (lba, block) in (lba..).zip(data.as_mut().chunks_mut(BLOCK_BYTES as usize)) {
        let words = format!("block {lba}, write {n}\n").into_bytes();
        block
            .iter_mut()
            .zip(words.iter().cycle())
            .for_each(|(byte, word)| *byte = *word);
    }
    Request::Write {
        offset: lba * BLOCK_BYTES,
        data: data.freeze(),
        fua: false,
    }
}
