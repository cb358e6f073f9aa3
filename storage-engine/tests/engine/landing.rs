//! Reads whose answer goes to memory that somebody lent.

use std::sync::Arc;

use bytes::BytesMut;
use galleonfs_storage_engine::BlockEngine;
use galleonfs_storage_engine::buffer::{BufMut, Lent, LentMut, PAGE_BYTES};
use galleonfs_storage_engine::compress::Codec;
use galleonfs_storage_engine::request::{Piece, Reply, Request, RequestId};
use galleonfs_storage_engine::store::open_replica;
use galleonfs_storage_engine::types::{BLOCK_BYTES, BlockSize};
use galleonfs_storage_engine::volume::Volume;

use crate::harness::{Rig, Shape, options, stamp_of};
use crate::sim_disk::SimDisk;

/// Memory that can be cut up while it stays in one piece.
struct Memory(BytesMut);

impl Memory {
    fn new(len: usize) -> Memory {
        let mut bytes = BytesMut::zeroed(len + PAGE_BYTES);
        let skipped = bytes.as_ptr().align_offset(PAGE_BYTES);
        drop(bytes.split_to(skipped));
        bytes.truncate(len);
        Memory(bytes)
    }
}

impl AsRef<[u8]> for Memory {
    fn as_ref(&self) -> &[u8] {
        &self.0
    }
}

impl AsMut<[u8]> for Memory {
    fn as_mut(&mut self) -> &mut [u8] {
        &mut self.0
    }
}

impl Lent for Memory {}

impl LentMut for Memory {
    fn split_front(&mut self, len: usize) -> Arc<dyn LentMut> {
        Arc::new(Memory(self.0.split_to(len)))
    }
}

/// Reads into lent memory; tells whether all that came back is part of it.
fn lands(rig: &mut Rig, offset: u64, len: usize) -> bool {
    let mut memory = Memory::new(len + PAGE_BYTES);
    // As long as some of it is held nothing else can come to lie in its place.
    let _held = memory.0.split_off(len);
    let start = memory.as_ref().as_ptr();
    let id = RequestId(1 << 40);
    rig.engine.read_into(id, offset, BufMut::lent(Arc::new(memory)));
    rig.settle();
    let Some(Ok(Reply::Data(pieces))) = rig.answers.remove(&id) else {
        panic!("the read is answered with data")
    };
    let mut at = 0;
    let inside = pieces.iter().all(|piece| match piece {
        Piece::Bytes(buf) => {
            let here = start.wrapping_add(at);
            at += buf.len();
            buf.as_ref().as_ptr() == here
        }
        Piece::Zeros(_) => false,
    });
    assert!(!inside || at == len);
    inside
}

#[test]
fn large_blocks_land_in_place_unless_they_are_compressed_or_asked_for_in_part() {
    let shape = Shape {
        block_size: BlockSize::K16,
        sealed: false,
    };
    for codec in [None, Some(Codec::Lz4)] {
        let mut disk = SimDisk::default();
        shape.format(&mut disk, 64);
        let (store, _) = open_replica(&mut disk, options(1)).unwrap();
        let mut rig = Rig::new(disk, Volume::new(store).compression(codec));
        let data = BufMut::copy_of(&[7; 4 << 14]).freeze();
        let (offset, fua) = (0, false);
        rig.run(Request::Write { offset, data, fua }).unwrap();
        assert_eq!(lands(&mut rig, 1 << 14, 2 << 14), codec.is_none());
        assert!(!lands(&mut rig, 1 << 14, 4096), "a part of a block");
        assert!(!lands(&mut rig, 512, 512), "a sector");
    }
}

#[test]
fn every_stored_part_of_an_answer_lands_where_it_belongs() {
    let mut rig = Rig::fresh(64);
    rig.write(0, 16, 100).unwrap();
    rig.write(3, 1, 200).unwrap();
    let (offset, len) = (5 * BLOCK_BYTES, 2 * BLOCK_BYTES);
    rig.run(Request::Zero {
        offset,
        len,
        fua: false,
    })
    .unwrap();
    let expected = rig.read(1, 15).unwrap();
    assert_eq!(expected[2], 200);
    assert_eq!(expected[4..6], [0, 0]);

    let memory = Memory::new(15 * PAGE_BYTES);
    let start = memory.as_ref().as_ptr();
    let id = RequestId(1 << 40);
    rig.engine.read_into(id, BLOCK_BYTES, BufMut::lent(Arc::new(memory)));
    rig.settle();
    let Some(Ok(Reply::Data(pieces))) = rig.answers.remove(&id) else {
        panic!("the read is answered with data")
    };
    let mut at = 0;
    for piece in &pieces {
        match piece {
            Piece::Bytes(buf) => {
                assert_eq!(buf.as_ref().as_ptr(), start.wrapping_add(at));
                for (n, block) in buf.as_ref().chunks(PAGE_BYTES).enumerate() {
                    assert_eq!(stamp_of(block).unwrap(), expected[at / PAGE_BYTES + n]);
                }
                at += buf.len();
            }
            Piece::Zeros(zeros) => at += zeros,
        }
    }
    assert_eq!(at, 15 * PAGE_BYTES);
    assert_eq!(
        pieces.len(),
        5,
        "two of what was written first, around a newer block and zeros"
    );
}
