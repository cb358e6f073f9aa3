//! Compressed volumes: smaller on the disk, the same to a guest, and never wrong.

use galleonfs_storage_engine::buffer::{Buf, BufMut};
use galleonfs_storage_engine::compress::Codec;
use galleonfs_storage_engine::io::Disk;
use galleonfs_storage_engine::request::{Piece, Reply, Request, RequestError};
use galleonfs_storage_engine::store::{Body, Seals, check::check, inspect, open_replica};
use galleonfs_storage_engine::types::{BlockSize, Check, Version};
use galleonfs_storage_engine::volume::Volume;

use crate::harness::{Rig, Shape, assert_check_passes, options, segment};
use crate::sim_disk::{Cut, SimDisk};

const K16: Shape = Shape {
    block_size: BlockSize::K16,
    sealed: false,
};
const BLOCK: usize = 16 << 10;

fn serve(mut disk: SimDisk, epoch: u32, codec: Option<Codec>) -> Rig {
    let (store, _) = open_replica(&mut disk, options(epoch)).unwrap();
    Rig::new(disk, Volume::new(store).compression(codec))
}

fn fresh(size_blocks: u64, codec: Option<Codec>) -> Rig {
    let mut disk = SimDisk::default();
    K16.format(&mut disk, size_blocks);
    serve(disk, 1, codec)
}

/// Lines that are alike, and differ from block to block.
fn text(n: u64) -> Vec<u8> {
    let lines = (0..).map(|line| format!("block {n} line {line}: the ship sails at dawn\n"));
    let bytes: Vec<u8> = lines.flat_map(String::into_bytes).take(BLOCK).collect();
    bytes
}

fn write(rig: &mut Rig, lba: u64, bytes: &[u8]) {
    let offset = lba * BLOCK as u64;
    let data = BufMut::copy_of(bytes).freeze();
    rig.run(Request::Write {
        offset,
        data,
        fua: false,
    })
    .unwrap();
}

fn read(rig: &mut Rig, lba: u64, blocks: u64) -> Result<Vec<u8>, RequestError> {
    let (offset, len) = (lba * BLOCK as u64, blocks * BLOCK as u64);
    let Reply::Data(pieces) = rig.run(Request::Read { offset, len })? else {
        panic!("a read gives data")
    };
    let bytes = pieces.iter().flat_map(|piece| match piece {
        Piece::Bytes(bytes) => bytes.as_ref().to_vec(),
        Piece::Zeros(len) => vec![0; *len],
    });
    Ok(bytes.collect())
}

#[test]
fn text_takes_less_room_and_the_figures_say_how_much() {
    for codec in [Codec::Lz4, Codec::Zstd] {
        let mut rig = fresh(200, Some(codec));
        for lba in 0..100 {
            write(&mut rig, lba, &text(lba));
        }
        rig.close();
        let stats = rig.engine.store_stats();
        assert_eq!(stats.written_bytes, 100 * BLOCK as u64);
        assert!(stats.stored_bytes * 3 <= stats.written_bytes, "{codec:?}: {stats:?}");
        assert_eq!(
            stats.live_bytes, stats.stored_bytes,
            "what is live is counted as it is stored"
        );
        assert_check_passes(&mut rig.disk);
        let mut rig = serve(rig.disk, 2, None);
        let expected: Vec<u8> = (10..60).flat_map(text).collect();
        assert_eq!(read(&mut rig, 10, 50).unwrap(), expected, "{codec:?}");
    }
}

#[test]
fn a_volume_changes_its_codec_at_any_start_and_reads_what_the_others_wrote() {
    let mut disk = SimDisk::default();
    K16.format(&mut disk, 200);
    let codecs = [None, Some(Codec::Lz4), Some(Codec::Zstd)];
    for epoch in 1..=9_u32 {
        let mut rig = serve(disk, epoch, codecs[epoch as usize % 3]);
        for lba in 0..10 {
            write(&mut rig, u64::from(epoch) * 10 + lba, &text(lba));
        }
        rig.flush().unwrap();
        disk = rig.disk.cut(Cut::None);
    }
    let mut rig = serve(disk, 10, None);
    let expected: Vec<u8> = (0..10).flat_map(text).collect();
    for epoch in 1..=9 {
        assert_eq!(read(&mut rig, epoch * 10, 10).unwrap(), expected, "epoch {epoch}");
    }
}

#[test]
fn the_space_of_compressed_blocks_comes_back() {
    let mut rig = fresh(2_000, Some(Codec::Lz4));
    for round in 0..12 {
        for lba in 0..500 {
            write(&mut rig, lba, &text(lba + round));
        }
    }
    for _ in 0..20 {
        rig.pass_time(20_000);
    }
    let stats = rig.engine.store_stats();
    assert!(stats.live_bytes <= 500 * 8192, "{stats:?}");
    assert!(stats.allocated_bytes < 16 << 20, "{stats:?}");
    let expected: Vec<u8> = (0..50).map(|lba| lba + 11).flat_map(text).collect();
    assert_eq!(read(&mut rig, 0, 50).unwrap(), expected);
    rig.close();
    assert_check_passes(&mut rig.disk);
}

/// Whoever can write to the disk can make checks fit, too. What decompresses to no block is still never returned.
#[test]
fn compressed_bytes_that_make_no_block_are_an_error_although_their_check_fits() {
    for (byte, value) in [(0, 77), (1, 9), (4, 0xff), (8, 0xff), (40, 0xee)] {
        let mut rig = fresh(100, Some(Codec::Zstd));
        write(&mut rig, 5, &text(5));
        rig.flush().unwrap();
        let mut disk = rig.disk;
        let seals = Seals::of(&inspect(&mut disk).unwrap().geometry);
        let mut record = BufMut::zeroed(8192);
        disk.read(segment(0), 4096, record.as_mut()).unwrap();
        let (mut header, _) = seals.decode(&record.as_ref()[..4096]).expect("a record is there");
        let stored = &mut record.as_mut()[4096..];
        stored[byte] = value;
        let version = Version {
            epoch: header.epoch,
            seq: galleonfs_storage_engine::types::Seq(1),
        };
        let Body::Data {
            writes, checks, pages, ..
        } = &mut header.body
        else {
            panic!("a record of data")
        };
        assert_eq!(pages[..], [1]);
        checks[0] = Check::from(seals.block(writes[0].lba, version, stored));
        let block: Buf = record.freeze().slice(4096..8192);
        let (header, _) = seals.encode(&header);
        disk.write(segment(0), 4096, &[header, block]).unwrap();
        assert_eq!(check(&mut disk.clone()).unwrap().problems, Vec::<String>::new());
        let mut rig = serve(disk, 2, None);
        match read(&mut rig, 5, 1) {
            Err(RequestError::Corrupt(_)) => {}
            Err(other) => panic!("byte {byte}: {other}"),
            Ok(found) => panic!("byte {byte}: {} bytes were returned", found.len()),
        }
        assert!(matches!(read(&mut rig, 0, 20), Err(RequestError::Corrupt(_))));
        assert_eq!(read(&mut rig, 6, 1).unwrap(), vec![0; BLOCK]);
    }
}

#[test]
fn blocks_of_4_kib_are_never_compressed() {
    let mut disk = SimDisk::default();
    Shape::PLAIN.format(&mut disk, 100);
    let mut rig = serve(disk, 1, Some(Codec::Lz4));
    let data = BufMut::zeroed(40 * 4096).freeze();
    rig.run(Request::Write {
        offset: 0,
        data,
        fua: false,
    })
    .unwrap();
    let stats = rig.engine.store_stats();
    assert_eq!((stats.written_bytes, stats.stored_bytes), (40 * 4096, 40 * 4096));
}
