//! The first inputs of each corpus: what the engine itself writes, and what a kernel or a person would send.

use galleonfs_storage_engine::compress::{Codec, Compressor};

use crate::disk::{Kind, read};
use crate::targets::replica;

/// Target, file name, bytes.
pub fn seeds() -> Vec<(&'static str, String, Vec<u8>)> {
    let mut seeds = Vec::new();
    for number in 0..replica::BASES {
        seeds.push(("replica", format!("replica-{number}"), vec![number; 11]));
        let (mut disk, places) = replica::structures_of(number);
        let mut superblocks = Vec::new();
        // Of each kind the first and the last: what was there from the beginning, and what is newest.
        for kind in [
            Kind::Superblock,
            Kind::SegmentHeader,
            Kind::Record,
            Kind::Page,
            Kind::KeyRow,
        ] {
            let of_kind: Vec<_> = places.iter().filter(|place| place.kind == kind).collect();
            let mut picked: Vec<_> = of_kind.iter().step_by((of_kind.len() / 4).max(1)).copied().collect();
            picked.extend(of_kind.last().copied());
            // And one of each page that has rows in place of entries, of a snapshot's table, and with tags.
            for sort in (2..=5).filter(|_| kind == Kind::Page) {
                let found = of_kind
                    .iter()
                    .find(|place| read(&mut disk, place.file, place.offset, 8)[6] == sort);
                picked.extend(found.copied());
            }
            for (index, place) in picked.into_iter().enumerate() {
                let bytes = read(&mut disk, place.file, place.offset, place.len);
                let target = match kind {
                    Kind::Superblock => {
                        superblocks.extend_from_slice(&bytes);
                        continue;
                    }
                    Kind::SegmentHeader => "segment_header",
                    Kind::Record => "record_header",
                    Kind::Page => "page",
                    Kind::KeyRow => "key_row",
                };
                let flags = if kind == Kind::Record && replica::is_sealed(number) {
                    3
                } else {
                    1
                };
                seeds.push((target, format!("replica-{number}-{index}"), input(flags, &bytes)));
                if kind == Kind::Page && bytes[6] == 4 {
                    seeds.push(("rows", format!("catalog-{number}-{index}"), input(0, &bytes[64..160])));
                }
                if kind == Kind::Page && bytes[6] == 2 {
                    seeds.push(("rows", format!("table-{number}-{index}"), input(1, &bytes[64..88])));
                    seeds.push(("location", format!("table-{number}-{index}"), bytes[64..72].to_vec()));
                }
            }
        }
        superblocks.truncate(8192);
        seeds.push(("superblocks", format!("replica-{number}"), input(3, &superblocks)));
    }
    let block: Vec<u8> = (0..16384u32).flat_map(|n| (n / 40).to_le_bytes()).take(16384).collect();
    for (codec, name) in [(Codec::Lz4, "lz4"), (Codec::Zstd, "zstd")] {
        let mut stored = vec![0; block.len()];
        if let Some(len) = Compressor::new().compress(codec, &block, &mut stored) {
            seeds.push(("compressed_block", name.to_owned(), input(1, &stored[..len])));
        }
    }
    seeds.push(("compressed_block", "to-compress".to_owned(), input(5, &block[..600])));
    seeds.push(("sealed_block", "unchanged".to_owned(), vec![0; 60]));
    seeds.push(("sealed_block", "another-address".to_owned(), vec![1]));
    seeds.extend(requests());
    #[cfg(feature = "node")]
    seeds.extend(frames());
    for (name, text) in [
        (
            "whole",
            r#"{"format": 1, "clusterId": "6f1c2f0e-0d5c-4a3c-8a53-0c8a8e1d7f10", "poolUid": "6f1c2f0e-0d5c-4a3c-8a53-0c8a8e1d7f11"}"#,
        ),
        ("newer", r#"{"format": 9, "something": ["else"]}"#),
        ("torn", r#"{"format": 1, "clusterId": "6f1c"#),
    ] {
        seeds.push(("pool_label", name.to_owned(), text.as_bytes().to_vec()));
    }
    for (name, text) in [
        (
            "all",
            "replicaCount=1\nblockSize=4096\nmediaType=ssd\npool=fast\nfsType=ext4\nwriteConcern=durable\nencryption=false\n",
        ),
        (
            "others-words",
            "replication=1\nblock_size=4096\ndisk_type=nvme\nfs_type=xfs\nwrite_concern=replicated\ncsi.storage.k8s.io/pvc/name=a\n",
        ),
        ("twice", "replicaCount=1\nreplication=2\nnonsense=\n"),
    ] {
        seeds.push(("class_parameters", name.to_owned(), text.as_bytes().to_vec()));
    }
    seeds
}

/// A first byte and a structure, without the zeros at its end.
fn input(flags: u8, bytes: &[u8]) -> Vec<u8> {
    let len = bytes.iter().rposition(|byte| *byte != 0).map_or(0, |last| last + 1);
    [&[flags], &bytes[..len]].concat()
}

/// Frames as another node sends them: one of each shape, and several in a row.
#[cfg(feature = "node")]
fn frames() -> Vec<(&'static str, String, Vec<u8>)> {
    use crate::targets::wire::{CLUSTER, VERSION};
    use galleonfs_node_plugin::transport::{Frame, Kind};
    use galleonfs_storage_engine::buffer::BufMut;
    use galleonfs_storage_engine::types::Epoch;
    use uuid::Uuid;

    let frame = |kind: u16, body: &[u8], payload: usize| {
        let memory = BufMut::zeroed(4096).freeze();
        let frame = Frame {
            kind: Kind(kind),
            flags: 1,
            volume: Uuid::from_u128(2),
            replica: Uuid::from_u128(3),
            epoch: Epoch(4),
            request: 5,
            body: body.to_vec().into(),
            payload: vec![memory.slice(0..payload)],
        };
        // Hellos and refusals are of version 0.
        let version = if kind < 3 { 0 } else { VERSION };
        let mut bytes = frame.header(version, CLUSTER).to_vec();
        bytes.extend_from_slice(body);
        bytes.resize(bytes.len() + payload, 0);
        bytes
    };
    let (hello, refusal) = (frame(1, &[1; 68], 0), frame(2, b"not you", 0));
    let (empty, body, payload) = (
        frame(3, &[], 0),
        frame(16, b"what it says", 0),
        frame(17, b"a block", 512),
    );
    let several = [&body[..], &payload, &empty, &refusal].concat();
    [
        ("hello", 3, hello),
        ("refusal", 1, refusal),
        ("heartbeat", 1, empty),
        ("body", 1, body),
        ("payload", 1, payload),
        ("several", 0, several),
    ]
    .map(|(name, flags, bytes)| ("wire_frame", name.to_owned(), [&[flags, 4], &bytes[..]].concat()))
    .into()
}

/// One input for each kind of request, and one with several.
fn requests() -> Vec<(&'static str, String, Vec<u8>)> {
    let message = |opcode: u32, node: u64, body: &[u8]| {
        let mut message = Vec::new();
        message.extend_from_slice(&(40 + body.len() as u32).to_le_bytes());
        message.extend_from_slice(&opcode.to_le_bytes());
        message.extend_from_slice(&77u64.to_le_bytes());
        message.extend_from_slice(&node.to_le_bytes());
        message.resize(40, 0);
        message.extend_from_slice(body);
        let len = message.len() as u16 | 0x8000;
        [&len.to_le_bytes()[..], &message].concat()
    };
    let data = |offset: u64, size: u32, payload: usize| {
        let mut body = vec![0; 40 + payload];
        body[8..16].copy_from_slice(&offset.to_le_bytes());
        body[16..20].copy_from_slice(&size.to_le_bytes());
        body
    };
    let mut hole = [0u64.to_le_bytes(), 8192u64.to_le_bytes(), 16384u64.to_le_bytes()].concat();
    hole.extend_from_slice(&3u64.to_le_bytes());
    let mut hello = vec![0; 64];
    hello[..4].copy_from_slice(&7u32.to_le_bytes());
    hello[4..8].copy_from_slice(&42u32.to_le_bytes());
    hello[12..20].copy_from_slice(&[0xff; 8]);
    let list = vec![
        ("init", message(26, 0, &hello)),
        ("lookup", message(1, 1, b"volume\0")),
        ("getattr", message(3, 2, &[0; 16])),
        ("setattr", message(4, 2, &[0; 88])),
        ("open", message(14, 2, &[0; 8])),
        ("readdir", message(28, 1, &data(0, 4096, 0))),
        ("read", message(15, 2, &data(4096, 8192, 0))),
        ("write", message(16, 2, &data(8192, 4096, 4096))),
        ("sync", message(20, 2, &[0; 16])),
        ("hole", message(43, 2, &hole)),
        ("statfs", message(17, 1, &[])),
        ("forget", message(2, 2, &[1; 8])),
    ];
    let all: Vec<u8> = list.iter().flat_map(|(_, bytes)| bytes.clone()).collect();
    let mut seeds: Vec<_> = list
        .into_iter()
        .map(|(name, bytes)| ("fuse_request", name.to_owned(), [&[0], &bytes[..]].concat()))
        .collect();
    seeds.push(("fuse_request", "all".to_owned(), [&[0], &all[..]].concat()));
    seeds
}
