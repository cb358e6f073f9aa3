use super::super::format::check_around;
use super::*;
use crate::seal::Tag;
use crate::types::Identity;

fn seals() -> Seals {
    Seals::new(
        &Identity {
            cluster: [1; 16],
            volume: [2; 16],
            replica: [3; 16],
        },
        99,
    )
}

fn sample(body: Body) -> Header {
    Header {
        epoch: Epoch(7),
        flushed: Seq(40),
        chain: 0xdead_beef,
        body,
    }
}

fn bodies() -> [Body; 9] {
    let write = |lba, blocks, zero| WriteEntry {
        lba: Lba(lba),
        blocks,
        zero,
    };
    let moved = MovedBlock {
        lba: Lba(4),
        version: Version {
            epoch: Epoch(2),
            seq: Seq(9),
        },
        check: 77.into(),
        pages: 1,
    };
    [
        Body::Data {
            first_seq: Seq(41),
            writes: vec![write(5, 2, false), write(9, 900, true)],
            checks: vec![1.into(), 2.into()],
            pages: Vec::new(),
        },
        Body::Next { next: 12 },
        Body::FlushMark,
        Body::Moved { blocks: vec![moved; 3] },
        Body::Control {
            seq: Seq(41),
            op: ControlOp::Snapshot {
                id: SnapshotId([7; 16]),
                time_ms: 1_700_000_000_000,
                size_blocks: 1 << 28,
            },
        },
        Body::Control {
            seq: Seq(42),
            op: ControlOp::Delete {
                id: SnapshotId([8; 16]),
            },
        },
        Body::Control {
            seq: Seq(43),
            op: ControlOp::Revert {
                id: SnapshotId([9; 16]),
            },
        },
        Body::Copied {
            blocks: vec![moved; 3],
            zeros: vec![
                CopiedZeros {
                    start: Lba(9),
                    end: Lba(1 << 40),
                    version: moved.version,
                };
                2
            ],
        },
        Body::Join { base: Seq(1 << 40) },
    ]
}

#[test]
fn a_header_gives_back_what_it_was_made_of() {
    for body in bodies() {
        let header = sample(body);
        let (block, check) = seals().encode(&header);
        assert_eq!(seals().decode(block.as_ref()), Some((header, check)));
    }
}

#[test]
fn every_flipped_bit_of_a_header_is_noticed() {
    for body in bodies() {
        let header = sample(body);
        let (block, check) = seals().encode(&header);
        for bit in 0..HEADER_BYTES * 8 {
            let mut bytes = block.as_ref().to_vec();
            bytes[bit / 8] ^= 1 << (bit % 8);
            match seals().decode(&bytes) {
                None => {}
                // A flush mark is whole as long as one of its copies is.
                Some(found) => assert_eq!(found, (sample(Body::FlushMark), check), "bit {bit}"),
            }
        }
    }
}

#[test]
fn a_header_made_without_the_salt_is_no_header() {
    let (block, _) = seals().encode(&sample(Body::FlushMark));
    let other = Seals::new(
        &Identity {
            cluster: [1; 16],
            volume: [2; 16],
            replica: [3; 16],
        },
        98,
    );
    assert_eq!(other.decode(block.as_ref()), None);
}

#[test]
fn the_check_of_a_block_depends_on_its_address_and_version() {
    let version = Version {
        epoch: Epoch(1),
        seq: Seq(1),
    };
    let bytes = [5; 4096];
    let check = seals().block(Lba(1), version, &bytes);
    assert_ne!(check, seals().block(Lba(2), version, &bytes));
    assert_ne!(check, seals().block(Lba(1), Version { seq: Seq(2), ..version }, &bytes));
}

fn tagged() -> Seals {
    Seals {
        tagged: true,
        ..seals()
    }
}

/// Records of sealed blocks: whose header is one block, and whose is two.
fn sealed_bodies() -> Vec<Body> {
    let check = |n: usize| Check {
        crc: n as u32,
        tag: Tag([n as u8; TAG_BYTES]),
    };
    let data = |blocks: usize| Body::Data {
        first_seq: Seq(41),
        writes: vec![WriteEntry {
            lba: Lba(5),
            blocks: blocks as u32,
            zero: false,
        }],
        checks: (1..=blocks).map(check).collect(),
        pages: Vec::new(),
    };
    let moved = |blocks: usize| Body::Moved {
        blocks: (1..=blocks)
            .map(|n| MovedBlock {
                lba: Lba(n as u64),
                version: Version {
                    epoch: Epoch(2),
                    seq: Seq(9),
                },
                check: check(n),
                pages: 1,
            })
            .collect(),
    };
    let copied = |blocks: usize, ranges| Body::Copied {
        blocks: sample(moved(blocks)).payload(),
        zeros: zeros(ranges),
    };
    vec![
        data(1),
        data(PAGES_MAX),
        moved(1),
        moved(MOVED_MAX),
        Body::FlushMark,
        copied(0, COPIED_ZEROS_MAX),
        copied(COPIED_MAX, COPIED_ZEROS_MAX),
    ]
}

#[test]
fn a_header_of_sealed_blocks_gives_back_their_tags() {
    let lengths: Vec<usize> = sealed_bodies()
        .into_iter()
        .map(|body| {
            let header = sample(body);
            let (bytes, check) = tagged().encode(&header);
            assert_eq!(bytes.len(), tagged().header_bytes(&header.body));
            assert_eq!(tagged().decode(bytes.as_ref()), Some((header.clone(), check)));
            // Whatever follows a header does not matter.
            let mut longer = bytes.as_ref().to_vec();
            longer.resize(HEADER_BYTES_MAX, 0xee);
            assert_eq!(tagged().decode(&longer), Some((header, check)));
            bytes.len()
        })
        .collect();
    assert_eq!(lengths, [4096, 8192, 4096, 8192, 4096, 4096, 8192]);
}

#[test]
fn a_record_with_tags_is_none_where_nothing_is_sealed_and_the_other_way_round() {
    let sealed = sample(sealed_bodies().remove(0));
    assert_eq!(seals().decode(tagged().encode(&sealed).0.as_ref()), None);
    assert_eq!(tagged().decode(seals().encode(&sealed).0.as_ref()), None);
}

fn large(tagged: bool) -> Seals {
    Seals {
        tagged,
        block_size: BlockSize::K16,
        ..seals()
    }
}

/// Records of blocks of 16 KiB, stored in so many pages each.
fn large_bodies(tagged: bool, pages: &[u8]) -> [Body; 3] {
    let check = |n: usize| Check {
        crc: n as u32,
        tag: Tag([if tagged { n as u8 } else { 0 }; TAG_BYTES]),
    };
    let data = Body::Data {
        first_seq: Seq(41),
        writes: vec![WriteEntry {
            lba: Lba(5),
            blocks: pages.len() as u32,
            zero: false,
        }],
        checks: (1..=pages.len()).map(check).collect(),
        pages: pages.to_vec(),
    };
    let blocks = sample(data.clone()).payload();
    let blocks: Vec<MovedBlock> = blocks.into_iter().take(MOVED_MAX).collect();
    let copied = Body::Copied {
        blocks: blocks.clone(),
        zeros: zeros(2),
    };
    [data, Body::Moved { blocks }, copied]
}

fn zeros(count: usize) -> Vec<CopiedZeros> {
    let range = |n: usize| CopiedZeros {
        start: Lba(n as u64),
        end: Lba(n as u64 + 1),
        version: Version {
            epoch: Epoch(3),
            seq: Seq(n as u64),
        },
    };
    (0..count).map(range).collect()
}

#[test]
fn a_header_gives_back_what_each_block_is_stored_in() {
    for tagged in [false, true] {
        for pages in [vec![4], vec![1, 4, 2, 3], vec![1; PAGES_MAX], vec![4; PAGES_MAX / 4]] {
            for body in large_bodies(tagged, &pages) {
                let taken = pages.iter().take(body.payload_blocks());
                let total: usize = taken.map(|pages| usize::from(*pages)).sum();
                assert_eq!(body.payload_pages(), total);
                let header = sample(body);
                let (bytes, check) = large(tagged).encode(&header);
                assert_eq!(bytes.len(), large(tagged).header_bytes(&header.body));
                assert_eq!(large(tagged).decode(bytes.as_ref()), Some((header, check)));
            }
        }
    }
}

#[test]
fn a_length_that_no_block_has_makes_no_header() {
    let [data, moved, copied] = large_bodies(false, &[4, 2]);
    for (body, at) in [
        (data, FIXED_BYTES + WRITE_BYTES + 2 * CHECK_BYTES),
        (moved, FIXED_BYTES + 2 * MOVED_BYTES),
        (copied, FIXED_BYTES + 2 * ZEROS_BYTES + 2 * MOVED_BYTES),
    ] {
        let (bytes, _) = large(false).encode(&sample(body));
        for wrong in [0, 5, 255] {
            let mut other = bytes.as_ref().to_vec();
            assert_eq!(other[at..at + 2], [4, 2]);
            other[at] = wrong;
            let check = check_around(large(false).header, &other, CHECK_AT);
            other[CHECK_AT..CHECK_AT + 4].copy_from_slice(&check.to_le_bytes());
            assert_eq!(large(false).decode(&other), None, "{wrong} pages");
        }
    }
}

#[test]
fn a_record_of_another_block_size_is_none() {
    let [data, ..] = large_bodies(false, &[1, 1]);
    assert_eq!(seals().decode(large(false).encode(&sample(data)).0.as_ref()), None);
    let [small, ..] = bodies();
    assert_eq!(large(false).decode(seals().encode(&sample(small)).0.as_ref()), None);
}

#[test]
fn every_flipped_bit_of_a_long_header_is_noticed() {
    let (bytes, _) = tagged().encode(&sample(sealed_bodies().remove(1)));
    for bit in 0..HEADER_BYTES_MAX * 8 {
        let mut flipped = bytes.as_ref().to_vec();
        flipped[bit / 8] ^= 1 << (bit % 8);
        assert_eq!(tagged().decode(&flipped), None, "bit {bit}");
    }
    assert_eq!(
        tagged().decode(&bytes.as_ref()[..HEADER_BYTES]),
        None,
        "half of it is none"
    );
}
