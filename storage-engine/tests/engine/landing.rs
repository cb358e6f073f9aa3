//! Reads whose answer goes to memory that somebody lent.

use std::sync::Arc;

use bytes::BytesMut;
use galleonfs_storage_engine::BlockEngine;
use galleonfs_storage_engine::buffer::{BufMut, Lent, LentMut, PAGE_BYTES};
use galleonfs_storage_engine::request::{Piece, Reply, Request, RequestId};
use galleonfs_storage_engine::types::BLOCK_BYTES;

use crate::harness::{Rig, stamp_of};

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
