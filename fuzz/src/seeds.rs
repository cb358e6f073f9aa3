//! The first inputs of each corpus: what the engine itself writes, and what a kernel or a person would send.

use galleonfs_storage_engine::buffer::BufMut;
use galleonfs_storage_engine::compress::{Codec, Compressor};
use galleonfs_storage_engine::replication::message::{Batch, Refusal, Row, Rows, Stored, StoredBlock};
use galleonfs_storage_engine::replication::wire::{KIND_FIRST, Packed, pack_ask, pack_reply};
use galleonfs_storage_engine::replication::{Ask, FromReplica, Incarnation, Reply, ToReplica};
use galleonfs_storage_engine::seal::{EpochSalt, KeyCheck, KeyId, KeyRow};
use galleonfs_storage_engine::store::WriteEntry;
use galleonfs_storage_engine::store::layout::EpochEnd;
use galleonfs_storage_engine::types::{Check, Epoch, Lba, Seq, Version};

use crate::disk::{Kind, read};
use crate::targets::{replica, replication};

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
    seeds.extend(messages());
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

/// Messages of replication: one of each kind.
fn messages() -> Vec<(&'static str, String, Vec<u8>)> {
    let message = |answer: u8, name: &str, packed: Packed| {
        let mut bytes = vec![answer, (packed.kind - KIND_FIRST) as u8];
        bytes.extend_from_slice(&(packed.body.len() as u16).to_le_bytes());
        bytes.extend_from_slice(&packed.body);
        packed
            .payload
            .iter()
            .for_each(|part| bytes.extend_from_slice(part.as_ref()));
        assert!(replication::is_message(&bytes), "{name} is a message");
        ("replication_message", name.to_owned(), bytes)
    };
    let ask = |(name, ask): (&str, Ask)| {
        let (volume, replica, epoch) = (replication::VOLUME, replication::REPLICA, replication::EPOCH);
        let (incarnation, round, boot) = (Incarnation([3; 16]), 1, 2);
        message(
            0,
            name,
            pack_ask(&ToReplica {
                volume,
                replica,
                epoch,
                incarnation,
                round,
                boot,
                ask,
            }),
        )
    };
    let reply = |(name, reply): (&str, Reply)| {
        let (volume, replica, epoch) = (replication::VOLUME, replication::REPLICA, replication::EPOCH);
        let (incarnation, round, boot) = (Incarnation([3; 16]), 1, 2);
        message(
            1,
            name,
            pack_reply(&FromReplica {
                volume,
                replica,
                epoch,
                incarnation,
                round,
                boot,
                reply,
            }),
        )
    };
    let version = |epoch, seq| Version {
        epoch: Epoch(epoch),
        seq: Seq(seq),
    };
    let ends = || {
        vec![
            EpochEnd {
                first: Epoch(1),
                last: Epoch(3),
                end: Seq(0),
            },
            EpochEnd {
                first: Epoch(4),
                last: Epoch(4),
                end: Seq(90),
            },
        ]
    };
    let page = || BufMut::zeroed(4096).freeze();
    let stored = || {
        let (lba, version, check, pages, bytes) = (Lba(9), version(4, 7), Check::default(), 1, page());
        let (start, end) = (Lba(10), Lba(70));
        vec![
            Stored::Block(StoredBlock {
                lba,
                version,
                check,
                pages,
                bytes,
            }),
            Stored::Zeros { start, end, version },
        ]
    };
    let writes = vec![
        WriteEntry {
            lba: Lba(3),
            blocks: 1,
            zero: false,
        },
        WriteEntry {
            lba: Lba(5),
            blocks: 8,
            zero: true,
        },
    ];
    let (checks, pages, payload) = (vec![Check::default()], Vec::new(), vec![page()]);
    let batch = Batch {
        first_seq: Seq(11),
        writes,
        checks,
        pages,
        payload,
    };
    let rows = vec![Row {
        start: Lba(1),
        end: Lba(4),
        version: version(4, 8),
        zero: true,
    }];
    let row = KeyRow {
        volume: replication::VOLUME,
        epoch: replication::EPOCH,
        key: KeyId(1),
        salt: EpochSalt([4; 32]),
        check: KeyCheck([5; KeyCheck::BYTES]),
    };
    let asks = [
        ("promise", Ask::Promise { row: Some(row) }),
        ("trim", Ask::Trim { ends: ends() }),
        (
            "settle",
            Ask::Settle {
                ends: ends(),
                whole: true,
            },
        ),
        ("join", Ask::Join { base: Seq(4) }),
        ("write", Ask::Write(batch.into())),
        (
            "flush",
            Ask::Flush {
                upto: version(5, 4),
                id: 8,
            },
        ),
        (
            "beat",
            Ask::Beat {
                sent_ms: 77,
                durable: version(5, 3),
            },
        ),
        (
            "read",
            Ask::Read {
                id: 1,
                lba: Lba(4),
                blocks: 3,
            },
        ),
        (
            "rows",
            Ask::Rows {
                id: 2,
                from: Lba(0),
                after: version(4, 1),
                rows_max: 64,
            },
        ),
        (
            "copy",
            Ask::Copy {
                id: 3,
                repair: true,
                blocks: stored(),
            },
        ),
        ("release", Ask::Release),
    ];
    let replies = [
        ("promising", Reply::Promising),
        (
            "promised",
            Reply::Promised {
                last: version(4, 90),
                ends: ends(),
                agreed: version(4, 80),
            },
        ),
        (
            "refused",
            Reply::Refused {
                promised: Epoch(6),
                why: Refusal::Fenced,
            },
        ),
        ("trimmed", Reply::Trimmed),
        ("settled", Reply::Settled),
        ("written", Reply::Written { upto: Seq(12) }),
        ("gap", Reply::Gap { last: Seq(2) }),
        (
            "flushed",
            Reply::Flushed {
                upto: version(5, 12),
                id: 9,
            },
        ),
        ("beaten", Reply::Beaten { sent_ms: 77 }),
        (
            "blocks",
            Reply::Blocks {
                id: 1,
                found: Ok(stored()),
            },
        ),
        (
            "no-blocks",
            Reply::Blocks {
                id: 1,
                found: Err("it is damaged".into()),
            },
        ),
        (
            "listed",
            Reply::Rows {
                id: 2,
                found: Ok(Rows {
                    rows,
                    next: Some(Lba(9)),
                }),
            },
        ),
        ("copied", Reply::Copied { id: 3, done: Ok(()) }),
        (
            "damaged",
            Reply::Damaged {
                blocks: vec![Lba(3), Lba(4)],
            },
        ),
        ("wants", Reply::Wants { durable: version(5, 9) }),
        (
            "failed",
            Reply::Failed {
                why: "the disk is gone".into(),
            },
        ),
    ];
    asks.into_iter()
        .map(ask)
        .chain(replies.into_iter().map(reply))
        .collect()
}

/// Frames as another node sends them: one of each shape, and several in a row.
#[cfg(feature = "node")]
fn frames() -> Vec<(&'static str, String, Vec<u8>)> {
    use crate::targets::wire::{CLUSTER, VERSION};
    use galleonfs_node_plugin::transport::{Frame, Kind};
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
