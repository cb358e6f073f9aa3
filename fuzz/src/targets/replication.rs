//! What a primary and its replicas send each other, inside of frames.

use galleonfs_storage_engine::buffer::{Buf, BufMut};
use galleonfs_storage_engine::replication::wire::{
    KIND_FIRST, Packed, WireError, pack_ask, pack_reply, unpack_ask, unpack_reply,
};
use galleonfs_storage_engine::replication::{Ask, FromReplica, ReplicaId, Reply, ToReplica};
use galleonfs_storage_engine::store::Stored;
use galleonfs_storage_engine::types::{Epoch, PAGE_BYTES};

/// Whose messages they are.
pub const VOLUME: [u8; 16] = [7; 16];
pub const REPLICA: ReplicaId = ReplicaId([8; 16]);
pub const EPOCH: Epoch = Epoch(5);

/// A message: whether it is an answer, its kind, the bytes of its body, the body, and what is left is payload. What is taken
/// for one must be sent as one that is taken for the same, and its parts must fit together.
pub fn replication_message(data: &[u8]) {
    is_message(data);
}

/// Whether it was taken for a message.
pub fn is_message(data: &[u8]) -> bool {
    let [answer, kind, low, high, rest @ ..] = data else {
        return false;
    };
    let len = usize::from(u16::from_le_bytes([*low, *high])).min(rest.len());
    let (body, payload) = rest.split_at(len);
    let kind = KIND_FIRST + u16::from(*kind);
    let payload = (!payload.is_empty()).then(|| BufMut::copy_of(payload).freeze());
    if answer & 1 == 0 {
        let unpack = |kind, body: &[u8], payload| unpack_ask(VOLUME, REPLICA, EPOCH, kind, body, payload);
        let Ok(message) = unpack(kind, body, payload) else {
            return false;
        };
        assert_ask_fits(&message);
        assert_same_again(pack_ask(&message), |kind, body, payload| {
            unpack(kind, body, payload).map(|message| pack_ask(&message))
        });
    } else {
        let unpack = |kind, body: &[u8], payload| unpack_reply(VOLUME, REPLICA, EPOCH, kind, body, payload);
        let Ok(message) = unpack(kind, body, payload) else {
            return false;
        };
        assert_reply_fits(&message);
        assert_same_again(pack_reply(&message), |kind, body, payload| {
            unpack(kind, body, payload).map(|message| pack_reply(&message))
        });
    }
    true
}

fn assert_same_again(sent: Packed, again: impl Fn(u16, &[u8], Option<Buf>) -> Result<Packed, WireError>) {
    let bytes =
        |packed: &Packed| -> Vec<u8> { packed.payload.iter().flat_map(|part| part.as_ref().to_vec()).collect() };
    let payload = bytes(&sent);
    let arrived = (!payload.is_empty()).then(|| BufMut::copy_of(&payload).freeze());
    let back = again(sent.kind, &sent.body, arrived).expect("what is sent is a message");
    assert_eq!((back.kind, &back.body), (sent.kind, &sent.body));
    assert_eq!(bytes(&back), payload);
}

fn assert_ask_fits(message: &ToReplica) {
    match &message.ask {
        Ask::Write(batch) => {
            let blocks: u64 = batch
                .writes
                .iter()
                .filter(|write| !write.zero)
                .map(|write| u64::from(write.blocks))
                .sum();
            assert_eq!(blocks, batch.checks.len() as u64, "a check for each block");
            let pages: usize = if batch.pages.is_empty() {
                batch.checks.len()
            } else {
                batch.pages.iter().map(|pages| usize::from(*pages)).sum()
            };
            assert_eq!(batch.payload_bytes(), pages as u64 * PAGE_BYTES);
        }
        Ask::Copy { blocks, .. } => assert_blocks_fit(blocks),
        Ask::Read { lba, blocks, .. } => assert!(lba.0.checked_add(*blocks).is_some()),
        _ => {}
    }
}

fn assert_reply_fits(message: &FromReplica) {
    if let Reply::Blocks { found: Ok(blocks), .. } = &message.reply {
        assert_blocks_fit(blocks);
    }
}

fn assert_blocks_fit(blocks: &[Stored]) {
    for stored in blocks {
        assert!(stored.start() < stored.end());
        if let Stored::Block(block) = stored {
            assert_eq!(block.bytes.len() as u64, u64::from(block.pages) * PAGE_BYTES);
        }
    }
}
