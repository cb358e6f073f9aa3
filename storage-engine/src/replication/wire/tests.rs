use super::*;
use crate::buffer::BufMut;

const VOLUME: [u8; 16] = [1; 16];
const REPLICA: ReplicaId = ReplicaId([2; 16]);

fn version(epoch: u32, seq: u64) -> Version {
    Version {
        epoch: Epoch(epoch),
        seq: Seq(seq),
    }
}

fn pages(fill: &[u8]) -> Buf {
    let bytes: Vec<u8> = fill.iter().flat_map(|byte| [*byte; 4096]).collect();
    BufMut::copy_of(&bytes).freeze()
}

fn check(crc: u32) -> Check {
    let tag = Tag([7; 16]);
    Check { crc, tag }
}

fn stored() -> Vec<Stored> {
    let block = |lba, pages: u8, bytes| {
        Stored::Block(StoredBlock {
            lba: Lba(lba),
            version: version(3, 9),
            check: check(5),
            pages,
            bytes,
        })
    };
    vec![
        block(4, 1, pages(&[1])),
        Stored::Zeros {
            start: Lba(5),
            end: Lba(90),
            version: version(2, 1),
        },
        block(91, 2, pages(&[2, 3])),
    ]
}

fn ends() -> Vec<EpochEnd> {
    let end = |first, last, end| EpochEnd {
        first: Epoch(first),
        last: Epoch(last),
        end: Seq(end),
    };
    vec![end(1, 1, 77), end(2, 5, 0)]
}

fn asks() -> Vec<Ask> {
    let row = KeyRow {
        volume: VOLUME,
        epoch: Epoch(6),
        key: KeyId(2),
        salt: EpochSalt([8; 32]),
        check: KeyCheck([9; KeyCheck::BYTES]),
    };
    let write = |lba, blocks, zero| WriteEntry {
        lba: Lba(lba),
        blocks,
        zero,
    };
    let batch = Batch {
        first_seq: Seq(40),
        writes: vec![write(0, 2, false), write(9, 100, true), write(7, 1, false)],
        checks: vec![check(1), check(2), check(3)],
        pages: vec![1, 2, 1],
        payload: vec![pages(&[1]), pages(&[2, 3, 4])],
    };
    vec![
        Ask::Promise { row: None },
        Ask::Promise { row: Some(row) },
        Ask::Trim { ends: ends() },
        Ask::Settle {
            ends: ends(),
            whole: true,
        },
        Ask::Join { base: Seq(0) },
        Ask::Write(Arc::new(batch)),
        Ask::Flush {
            upto: version(6, 42),
            id: 78,
        },
        Ask::Beat {
            sent_ms: 12_345,
            durable: version(6, 40),
        },
        Ask::Read {
            id: 1,
            lba: Lba(5),
            blocks: 256,
        },
        Ask::Rows {
            id: 2,
            from: Lba(0),
            after: version(5, 1),
            rows_max: 1024,
        },
        Ask::Copy {
            id: 3,
            repair: true,
            blocks: stored(),
        },
        Ask::Release,
    ]
}

fn replies() -> Vec<Reply> {
    let rows = Rows {
        rows: vec![
            Row {
                start: Lba(1),
                end: Lba(2),
                version: version(1, 1),
                zero: false,
            },
            Row {
                start: Lba(2),
                end: Lba(70),
                version: version(1, 2),
                zero: true,
            },
        ],
        next: Some(Lba(70)),
    };
    vec![
        Reply::Promising,
        Reply::Promised {
            last: version(5, 0),
            ends: ends(),
            agreed: version(1, 70),
        },
        Reply::Refused {
            promised: Epoch(7),
            why: Refusal::Diverged,
        },
        Reply::Trimmed,
        Reply::Settled,
        Reply::Written { upto: Seq(3) },
        Reply::Gap { last: Seq(2) },
        Reply::Flushed {
            upto: version(6, 3),
            id: 77,
        },
        Reply::Beaten { sent_ms: 7 },
        Reply::Blocks {
            id: 1,
            found: Ok(stored()),
        },
        Reply::Blocks {
            id: 1,
            found: Err("block 4 does not pass its check".into()),
        },
        Reply::Rows { id: 2, found: Ok(rows) },
        Reply::Copied { id: 3, done: Ok(()) },
        Reply::Damaged {
            blocks: vec![Lba(3), Lba(70)],
        },
        Reply::Wants { durable: version(6, 2) },
        Reply::Failed {
            why: "the disk is full".into(),
        },
    ]
}

/// What arrives of a payload: one buffer.
fn arrived(parts: &[Buf]) -> Option<Buf> {
    let bytes: Vec<u8> = parts.iter().flat_map(|part| part.as_ref()).copied().collect();
    (!bytes.is_empty()).then(|| BufMut::copy_of(&bytes).freeze())
}

/// Every message with everything that is in it, bytes of payloads too.
fn all() -> Vec<(Packed, bool)> {
    let ask = |ask| {
        pack_ask(&ToReplica {
            volume: VOLUME,
            replica: REPLICA,
            epoch: Epoch(6),
            incarnation: Incarnation([3; 16]),
            round: 4,
            boot: 5,
            ask,
        })
    };
    let reply = |reply| {
        pack_reply(&FromReplica {
            volume: VOLUME,
            replica: REPLICA,
            epoch: Epoch(6),
            incarnation: Incarnation([3; 16]),
            round: 4,
            boot: 5,
            reply,
        })
    };
    let asks = asks().into_iter().map(|message| (ask(message), true));
    asks.chain(replies().into_iter().map(|message| (reply(message), false)))
        .collect()
}

fn again(packed: &Packed, asks: bool, body: &[u8], payload: Option<Buf>) -> Result<Packed, WireError> {
    if asks {
        unpack_ask(VOLUME, REPLICA, Epoch(6), packed.kind, body, payload).map(|message| pack_ask(&message))
    } else {
        unpack_reply(VOLUME, REPLICA, Epoch(6), packed.kind, body, payload).map(|message| pack_reply(&message))
    }
}

#[test]
fn every_message_arrives_as_it_was_sent() {
    let mut kinds = Vec::new();
    for (packed, asks) in all() {
        let payload = arrived(&packed.payload);
        let back = again(&packed, asks, &packed.body, payload.clone()).expect("it is a message");
        assert_eq!((back.kind, &back.body), (packed.kind, &packed.body));
        let back = arrived(&back.payload);
        assert_eq!(back.as_ref().map(Buf::as_ref), payload.as_ref().map(Buf::as_ref));
        kinds.push(packed.kind);
    }
    kinds.dedup();
    assert_eq!(kinds.len(), 11 + 15, "one of each kind");
}

#[test]
fn a_message_that_is_cut_off_or_has_more_behind_it_is_refused() {
    for (packed, asks) in all() {
        let payload = arrived(&packed.payload);
        for len in 0..packed.body.len() {
            assert!(
                again(&packed, asks, &packed.body[..len], payload.clone()).is_err(),
                "{len}"
            );
        }
        let mut longer = packed.body.clone();
        longer.push(0);
        assert!(again(&packed, asks, &longer, payload.clone()).is_err());
        if let Some(payload) = payload {
            let short = payload.slice(0..payload.len() - 4096);
            assert!(again(&packed, asks, &packed.body, Some(short)).is_err());
            assert!(again(&packed, asks, &packed.body, None).is_err());
        }
    }
}

#[test]
fn counts_that_promise_more_than_there_is_take_no_memory() {
    for (packed, asks) in all() {
        for at in 32..packed.body.len().saturating_sub(4) {
            let mut body = packed.body.clone();
            body[at..at + 4].copy_from_slice(&u32::MAX.to_le_bytes());
            // An error or another message, and never a panic.
            let _ = again(&packed, asks, &body, arrived(&packed.payload));
        }
    }
}

#[test]
fn the_bytes_of_a_message_stay_what_they_are() {
    let beat = ToReplica {
        volume: VOLUME,
        replica: REPLICA,
        epoch: Epoch(6),
        incarnation: Incarnation([3; 16]),
        round: 4,
        boot: 5,
        ask: Ask::Beat {
            sent_ms: 0x0102_0304,
            durable: version(6, 40),
        },
    };
    let packed = pack_ask(&beat);
    let mut want = vec![3; 16];
    want.extend([4, 0, 0, 0, 0, 0, 0, 0, 5, 0, 0, 0, 0, 0, 0, 0]);
    want.extend([4, 3, 2, 1, 0, 0, 0, 0, 6, 0, 0, 0, 40, 0, 0, 0, 0, 0, 0, 0]);
    assert_eq!((packed.kind, packed.body), (22, want));
}

#[test]
fn what_says_that_an_epoch_is_over_which_has_not_begun_is_refused() {
    let promised = |last, ends, agreed| FromReplica {
        volume: VOLUME,
        replica: REPLICA,
        epoch: Epoch(6),
        incarnation: Incarnation([3; 16]),
        round: 4,
        boot: 5,
        reply: Reply::Promised { last, ends, agreed },
    };
    let end = |first, last| EpochEnd {
        first: Epoch(first),
        last: Epoch(last),
        end: Seq(0),
    };
    let read = |message: &FromReplica| {
        let packed = pack_reply(message);
        unpack_reply(VOLUME, REPLICA, Epoch(6), packed.kind, &packed.body, None)
    };
    let fine = promised(version(6, 3), vec![end(1, 5)], version(5, 9));
    read(&fine).expect("a replica may say that");
    for forged in [
        promised(version(6, 3), vec![end(1, 6)], version(5, 9)),
        promised(version(6, 3), vec![end(1, u32::MAX - 1)], version(5, 9)),
        promised(version(7, 0), Vec::new(), version(5, 9)),
        promised(version(6, 3), Vec::new(), version(7, 1)),
    ] {
        read(&forged).expect_err("nobody can know that");
    }
}
