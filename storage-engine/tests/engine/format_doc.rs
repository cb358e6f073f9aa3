//! `docs/disk-format.md` and the code say the same.
//!
//! Each table of the page is read as a layout. For each field of a structure a sample is encoded twice, with two values
//! that differ in every byte: exactly the documented bytes may change, and the check. The checks themselves are computed
//! anew, by the page's own words, with a CRC-32C that shares nothing with the engine.

use std::collections::{BTreeMap, BTreeSet};
use std::ops::Range;
use std::path::Path;

use galleonfs_storage_engine::compress::{Codec, Compressor};
use galleonfs_storage_engine::io::SegmentId;
use galleonfs_storage_engine::seal::{EpochSalt, KeyCheck, KeyId, KeyRow, Tag};
use galleonfs_storage_engine::store::layout::{
    Checkpoint, CopiedZeros, Entry, EpochEnd, FANOUT, Geometry, KEY_ROW_BYTES, LogPosition, MovedBlock, Origin, Page,
    PageKind, PageName, SegmentHeader, SegmentKind, Snapshot, StreamPosition, TreeId, Used, encode_row, row,
};
use galleonfs_storage_engine::store::{Body, ControlOp, Header, Seals, Superblock, WriteEntry};
use galleonfs_storage_engine::types::{BlockSize, Check, Epoch, Identity, Lba, Location, Seq, SnapshotId, Version};

const BLOCK: usize = 4096;
const SALT: u64 = 0x0807_0605_0403_0201;
const IDENTITY: Identity = Identity {
    cluster: [0x11; 16],
    volume: [0x22; 16],
    replica: [0x33; 16],
};

// ---- the page ---------------------------------------------------------------------------------------------------

/// A table with the columns `| offset | bytes | field |`, or `| bit | bits | field |`.
struct Layout {
    name: String,
    rows: Vec<(String, Range<usize>)>,
}

impl Layout {
    /// Where a field lies. Fields named `zeros` have no name of their own.
    fn at(&self, field: &str) -> Range<usize> {
        let found: Vec<_> = self.rows.iter().filter(|(name, _)| name == field).collect();
        assert_eq!(found.len(), 1, "{}: the page names `{field}` once", self.name);
        found[0].1.clone()
    }

    /// Fields that a sample has to show by changing them.
    fn fields(&self) -> BTreeSet<&str> {
        self.rows
            .iter()
            .map(|(name, _)| name.as_str())
            .filter(|name| *name != "zeros")
            .collect()
    }
}

/// The tables of the page by the heading above each.
fn page() -> BTreeMap<String, Layout> {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../docs/disk-format.md");
    let text = std::fs::read_to_string(&path).unwrap_or_else(|error| panic!("{}: {error}", path.display()));
    let mut layouts: BTreeMap<String, Layout> = BTreeMap::new();
    let (mut heading, mut inside) = (String::new(), false);
    for line in text.lines() {
        if let Some(title) = line.strip_prefix('#') {
            heading = title.trim_start_matches('#').trim().to_owned();
        }
        let cells: Vec<&str> = line.split('|').map(str::trim).collect();
        if cells.len() < 5 {
            inside = false;
            continue;
        }
        if ["offset", "bit"].contains(&cells[1]) {
            let layout = Layout {
                name: heading.clone(),
                rows: Vec::new(),
            };
            assert!(
                layouts.insert(heading.clone(), layout).is_none(),
                "{heading}: one layout under a heading"
            );
            inside = true;
        } else if inside && !cells[1].starts_with("---") {
            let number = |cell: &str| cell.parse::<usize>().unwrap_or_else(|_| panic!("{heading}: {line}"));
            let (offset, bytes) = (number(cells[1]), number(cells[2]));
            let rows = &mut layouts.get_mut(&heading).expect("it was just added").rows;
            let before = rows.last().map_or(0, |(_, range)| range.end);
            assert_eq!(
                offset, before,
                "{heading}: no gap and no overlap before this row: {line}"
            );
            rows.push((cells[3].trim_matches('`').to_owned(), offset..offset + bytes));
        }
    }
    layouts
}

fn layout(name: &str, bytes: usize) -> Layout {
    let layout = page()
        .remove(name)
        .unwrap_or_else(|| panic!("the page has a layout under \"{name}\""));
    assert_eq!(
        layout.rows.last().map(|(_, range)| range.end),
        Some(bytes),
        "{name}: the table covers everything"
    );
    layout
}

// ---- comparing --------------------------------------------------------------------------------------------------

/// Bytes that differ.
fn changed(a: &[u8], b: &[u8]) -> BTreeSet<usize> {
    assert_eq!(a.len(), b.len());
    (0..a.len()).filter(|n| a[*n] != b[*n]).collect()
}

/// Holds one structure to its table.
struct Comparison<T> {
    layout: Layout,
    base: T,
    encode: fn(&T) -> Vec<u8>,
    /// Where the structure lies in what `encode` gives.
    from: usize,
    /// The check, and whatever else follows every change.
    follows: Range<usize>,
    seen: BTreeSet<String>,
}

impl<T: Clone> Comparison<T> {
    fn new(layout: Layout, base: T, from: usize, follows: Range<usize>, encode: fn(&T) -> Vec<u8>) -> Self {
        Comparison {
            layout,
            base,
            encode,
            from,
            follows,
            seen: BTreeSet::new(),
        }
    }

    /// Changing this field changes exactly its bytes, each of them.
    fn moves(&mut self, field: &str, change: impl FnOnce(&mut T)) {
        let mut other = self.base.clone();
        change(&mut other);
        let mut changed = changed(&(self.encode)(&self.base), &(self.encode)(&other));
        changed.retain(|byte| !self.follows.contains(byte));
        let at = self.layout.at(field);
        let expected: BTreeSet<usize> = (at.start + self.from..at.end + self.from).collect();
        assert_eq!(changed, expected, "{}: `{field}`", self.layout.name);
        self.seen.insert(field.to_owned());
    }

    /// This field has this value in the base sample.
    fn holds(&mut self, field: &str, bytes: &[u8]) {
        let at = self.layout.at(field);
        let encoded = (self.encode)(&self.base);
        assert_eq!(
            &encoded[at.start + self.from..at.end + self.from],
            bytes,
            "{}: `{field}`",
            self.layout.name
        );
        self.seen.insert(field.to_owned());
    }

    /// Every field was looked at, and what the page calls zeros is zeros.
    fn assert_complete(self) {
        let seen: BTreeSet<&str> = self.seen.iter().map(String::as_str).collect();
        assert_eq!(
            self.layout.fields(),
            seen,
            "{}: every field of the page is shown",
            self.layout.name
        );
        let encoded = (self.encode)(&self.base);
        for (_, at) in self.layout.rows.iter().filter(|(name, _)| name == "zeros") {
            assert!(
                encoded[at.start + self.from..at.end + self.from]
                    .iter()
                    .all(|byte| *byte == 0),
                "{}: {at:?}",
                self.layout.name
            );
        }
    }
}

/// CRC-32C, bit by bit.
fn crc(parts: &[&[u8]]) -> [u8; 4] {
    let mut crc = u32::MAX;
    for byte in parts.iter().flat_map(|part| part.iter()) {
        crc ^= u32::from(*byte);
        for _ in 0..8 {
            crc = if crc & 1 == 1 { crc >> 1 ^ 0x82f6_3b78 } else { crc >> 1 };
        }
    }
    (!crc).to_le_bytes()
}

/// The bytes of a structure around its check.
fn around(bytes: &[u8], check: &Range<usize>) -> Vec<u8> {
    [&bytes[..check.start], &bytes[check.end..]].concat()
}

// ---- samples: every byte of `A` differs from every byte of `B` ---------------------------------------------------

const A: u64 = 0x0101_0101_0101_0101;
const B: u64 = 0x0202_0202_0202_0202;

fn entry(n: u64) -> Entry {
    let location = Location::from_bits(n);
    Entry {
        location,
        version: Version {
            epoch: Epoch(n as u32),
            seq: Seq(n),
        },
        check: (n as u32).into(),
    }
}

fn superblock() -> Superblock {
    let stream = StreamPosition {
        segment: SegmentId(A as u32),
        offset: A,
    };
    Superblock {
        generation: A,
        geometry: Geometry {
            identity: IDENTITY,
            segment_bytes: A,
            salt: A,
            sealed: false,
            block_size: BlockSize::K4,
        },
        epoch: Epoch(A as u32),
        clean: false,
        told: false,
        checkpoint: Checkpoint {
            number: A,
            size_blocks: A,
            height: 1,
            root: entry(A),
            replay: LogPosition {
                segment: SegmentId(A as u32),
                offset: A,
                log_index: A,
                last: Version {
                    epoch: Epoch(A as u32),
                    seq: Seq(A),
                },
                chain: A as u32,
            },
            table: vec![entry(A)],
            catalog: vec![entry(A)],
            meta: Some(stream),
            moved: Some(stream),
        },
        epoch_ends: vec![EpochEnd {
            first: Epoch(A as u32),
            last: Epoch(A as u32),
            end: Seq(A),
        }],
    }
}

fn encode_superblock(superblock: &Superblock) -> Vec<u8> {
    superblock.encode().as_ref().to_vec()
}

#[test]
fn the_superblock_is_drawn_as_it_is() {
    let layout = layout("The superblock", BLOCK);
    let (check, lists) = (layout.at("check"), layout.at("lists"));
    let mut compare = Comparison::new(layout, superblock(), 0, check.clone(), encode_superblock);
    compare.holds("magic", b"GALLEON\x01");
    compare.holds("version", &[4, 0]);
    let bytes = encode_superblock(&compare.base);
    compare.holds("check", &crc(&[&around(&bytes, &check)]));
    compare.moves("generation", |s| s.generation = B);
    compare.moves("cluster", |s| s.geometry.identity.cluster = [0x44; 16]);
    compare.moves("volume", |s| s.geometry.identity.volume = [0x44; 16]);
    compare.moves("replica", |s| s.geometry.identity.replica = [0x44; 16]);
    compare.moves("segment_bytes", |s| s.geometry.segment_bytes = B);
    compare.moves("salt", |s| s.geometry.salt = B);
    compare.moves("epoch", |s| s.epoch = Epoch(B as u32));
    compare.moves("clean", |s| s.clean = true);
    compare.moves("told", |s| s.told = true);
    compare.moves("height", |s| s.checkpoint.height = 2);
    compare.moves("sealed", |s| s.geometry.sealed = true);
    compare.holds("block_pages", &[1]);
    compare.moves("block_pages", |s| s.geometry.block_size = BlockSize::K64);
    compare.moves("checkpoint", |s| s.checkpoint.number = B);
    compare.moves("size_blocks", |s| s.checkpoint.size_blocks = B);
    compare.moves("root", |s| s.checkpoint.root = entry(B));
    compare.moves("replay_segment", |s| s.checkpoint.replay.segment = SegmentId(B as u32));
    compare.moves("replay_chain", |s| s.checkpoint.replay.chain = B as u32);
    compare.moves("replay_offset", |s| s.checkpoint.replay.offset = B);
    compare.moves("replay_log_index", |s| s.checkpoint.replay.log_index = B);
    compare.moves("replay_epoch", |s| s.checkpoint.replay.last.epoch = Epoch(B as u32));
    compare.moves("replay_seq", |s| s.checkpoint.replay.last.seq = Seq(B));
    let other = StreamPosition {
        segment: SegmentId(B as u32),
        offset: A,
    };
    compare.moves("meta_segment", |s| s.checkpoint.meta = Some(other));
    compare.moves("moved_segment", |s| s.checkpoint.moved = Some(other));
    let other = StreamPosition {
        segment: SegmentId(A as u32),
        offset: B,
    };
    compare.moves("meta_offset", |s| s.checkpoint.meta = Some(other));
    compare.moves("moved_offset", |s| s.checkpoint.moved = Some(other));
    compare.holds("tables", &[1, 0]);
    compare.holds("ends", &[1, 0]);
    compare.holds("catalogs", &[1, 0]);
    // One pointer to a table index, one epoch end, one pointer to a page of the catalog, and zeros.
    let (first, end) = (lists.start, lists.start + 24 + 16 + 24);
    assert_eq!(bytes[first..end], [1; 24 + 16 + 24]);
    assert!(bytes[end..].iter().all(|byte| *byte == 0));
    compare.seen.insert("lists".to_owned());
    compare.assert_complete();

    let mut absent = superblock();
    (absent.checkpoint.meta, absent.checkpoint.moved) = (None, None);
    let bytes = encode_superblock(&absent);
    let layout = page().remove("The superblock").unwrap();
    assert_eq!(
        bytes[layout.at("meta_segment")],
        [0xff; 4],
        "a stream that is not there"
    );
    assert_eq!(bytes[layout.at("moved_segment")], [0xff; 4]);
}

#[test]
fn the_end_of_an_epoch_is_drawn_as_it_is() {
    let whole = page().remove("The superblock").unwrap();
    let from = whole.at("lists").start + 24;
    let mut compare = Comparison::new(
        layout("Epoch ends", 16),
        superblock(),
        from,
        whole.at("check"),
        encode_superblock,
    );
    compare.moves("first", |s| s.epoch_ends[0].first = Epoch(B as u32));
    compare.moves("last", |s| s.epoch_ends[0].last = Epoch(B as u32));
    compare.moves("end", |s| s.epoch_ends[0].end = Seq(B));
    compare.assert_complete();
}

#[test]
fn the_segment_header_is_drawn_as_it_is() {
    let layout = layout("The segment header", BLOCK);
    let check = layout.at("check");
    let header = SegmentHeader {
        kind: SegmentKind::Data,
        segment: SegmentId(A as u32),
        log_index: A,
        epoch: Epoch(A as u32),
    };
    let mut compare = Comparison::new(layout, (header, IDENTITY), 0, check.clone(), |(header, identity)| {
        header.encode(identity).as_ref().to_vec()
    });
    compare.holds("magic", b"GFSS");
    compare.holds("version", &[1, 0]);
    let bytes = (compare.encode)(&compare.base);
    compare.holds("check", &crc(&[&around(&bytes, &check)]));
    compare.holds("kind", &[1]);
    compare.moves("kind", |(header, _)| header.kind = SegmentKind::Moved);
    compare.moves("kind", |(header, _)| header.kind = SegmentKind::Meta);
    compare.moves("segment", |(header, _)| header.segment = SegmentId(B as u32));
    compare.moves("log_index", |(header, _)| header.log_index = B);
    compare.moves("epoch", |(header, _)| header.epoch = Epoch(B as u32));
    compare.moves("volume", |(_, identity)| identity.volume = [0x44; 16]);
    compare.moves("replica", |(_, identity)| identity.replica = [0x44; 16]);
    compare.assert_complete();
}

#[derive(Clone)]
struct Record {
    header: Header,
    identity: Identity,
}

fn record(body: Body) -> Record {
    Record {
        header: Header {
            epoch: Epoch(A as u32),
            flushed: Seq(A),
            chain: A as u32,
            body,
        },
        identity: IDENTITY,
    }
}

fn encode_record(record: &Record) -> Vec<u8> {
    let seals = Seals::new(&record.identity, SALT);
    let (block, check) = seals.encode(&record.header);
    let at = page().remove("Records").unwrap().at("check");
    assert_eq!(
        block.as_ref()[at],
        check.to_le_bytes(),
        "the check that the next record will name is the stored one"
    );
    block.as_ref().to_vec()
}

fn data(lba: u64, blocks: u32, zero: bool) -> Body {
    let checks = if zero {
        Vec::new()
    } else {
        vec![Check::from(A as u32); blocks as usize]
    };
    Body::Data {
        first_seq: Seq(A),
        writes: vec![WriteEntry {
            lba: Lba(lba),
            blocks,
            zero,
        }],
        checks,
        pages: Vec::new(),
    }
}

fn moved(lba: u64, version: Version, check: u32) -> Body {
    Body::Moved {
        blocks: vec![MovedBlock {
            lba: Lba(lba),
            version,
            check: check.into(),
            pages: 1,
        }],
    }
}

fn check_of_header(bytes: &[u8], covered: usize) -> [u8; 4] {
    let check = page().remove("Records").unwrap().at("check");
    crc(&[
        &IDENTITY.volume,
        &SALT.to_le_bytes(),
        &around(&bytes[..covered], &check),
    ])
}

#[test]
fn the_header_of_a_record_is_drawn_as_it_is() {
    let layout = layout("Records", BLOCK);
    let (check, body) = (layout.at("check"), layout.at("body"));
    let mut compare = Comparison::new(layout, record(data(A, 2, false)), 0, check, encode_record);
    compare.holds("magic", b"GFSR");
    compare.holds("version", &[1, 0]);
    compare.holds("kind", &[1]);
    compare.holds("rows", &[0]);
    let bytes = encode_record(&compare.base);
    compare.holds("check", &check_of_header(&bytes, BLOCK));
    compare.holds("header_bytes", &(BLOCK as u32).to_le_bytes());
    compare.holds("payload_blocks", &[2, 0, 0, 0]);
    compare.holds("writes", &[1, 0, 0, 0]);
    compare.moves("volume", |record| record.identity.volume = [0x44; 16]);
    compare.moves("epoch", |record| record.header.epoch = Epoch(B as u32));
    compare.moves("first_seq", |record| match &mut record.header.body {
        Body::Data { first_seq, .. } => *first_seq = Seq(B),
        _ => unreachable!("the sample is a data record"),
    });
    compare.moves("flushed", |record| record.header.flushed = Seq(B));
    compare.moves("chain", |record| record.header.chain = B as u32);
    // The row of the write, the checks of its blocks, and zeros.
    assert_eq!(bytes[body.start + 16..body.start + 24], [1; 8]);
    assert!(bytes[body.start + 24..].iter().all(|byte| *byte == 0));
    compare.seen.extend(["body".to_owned(), "next".to_owned()]);
    compare.assert_complete();

    let mut compare = Comparison::new(
        page().remove("Records").unwrap(),
        record(Body::Next { next: A as u32 }),
        0,
        8..12,
        encode_record,
    );
    compare.holds("kind", &[2]);
    compare.holds("first_seq", &[0; 8]);
    compare.moves("next", |record| record.header.body = Body::Next { next: B as u32 });

    // The replica is not in a record: its salt is.
    let mut other = record(data(A, 2, false));
    other.identity.replica = [0x44; 16];
    assert_eq!(encode_record(&other), encode_record(&record(data(A, 2, false))));
}

#[test]
fn the_rows_of_a_record_are_drawn_as_they_are() {
    let whole = page().remove("Records").unwrap();
    let (check, body) = (whole.at("check"), whole.at("body"));
    let zeroes = record(data(A, A as u32, true));
    let mut compare = Comparison::new(
        layout("Write rows", 16),
        zeroes,
        body.start,
        check.clone(),
        encode_record,
    );
    compare.moves("lba", |record| record.header.body = data(B, A as u32, true));
    compare.moves("blocks", |record| record.header.body = data(A, B as u32, true));
    compare.holds("zero", &[1, 0, 0, 0]);
    compare.assert_complete();

    let version = |epoch: u64, seq| Version {
        epoch: Epoch(epoch as u32),
        seq: Seq(seq),
    };
    let base = record(moved(A, version(A, A), A as u32));
    let mut compare = Comparison::new(layout("Moved rows", 24), base.clone(), body.start, check, encode_record);
    compare.moves("lba", |record| record.header.body = moved(B, version(A, A), A as u32));
    compare.moves("epoch", |record| record.header.body = moved(A, version(B, A), A as u32));
    compare.moves("seq", |record| record.header.body = moved(A, version(A, B), A as u32));
    compare.moves("check", |record| record.header.body = moved(A, version(A, A), B as u32));
    compare.assert_complete();
    assert_eq!(encode_record(&base)[whole.at("kind")], [4]);
    assert_eq!(encode_record(&base)[whole.at("payload_blocks")], [1, 0, 0, 0]);
}

#[test]
fn a_control_record_is_drawn_as_it_is() {
    let whole = page().remove("Records").unwrap();
    let (check, body) = (whole.at("check"), whole.at("body"));
    let control = |op| record(Body::Control { seq: Seq(A), op });
    let take = |id: u64, time_ms, size_blocks| ControlOp::Snapshot {
        id: SnapshotId([id as u8; 16]),
        time_ms,
        size_blocks,
    };
    let base = control(take(A, A, A));
    let mut compare = Comparison::new(
        layout("Control rows", 36),
        base.clone(),
        body.start,
        check.clone(),
        encode_record,
    );
    compare.holds("op", &[1, 0, 0, 0]);
    let set = |op| move |record: &mut Record| record.header.body = Body::Control { seq: Seq(A), op };
    compare.moves("id", set(take(B, A, A)));
    compare.moves("time_ms", set(take(A, B, A)));
    compare.moves("size_blocks", set(take(A, A, B)));
    compare.assert_complete();
    let id = SnapshotId([7; 16]);
    for (code, op) in [(2, ControlOp::Delete { id }), (3, ControlOp::Revert { id })] {
        let bytes = encode_record(&control(op));
        assert_eq!(bytes[body.start..body.start + 4], [code, 0, 0, 0]);
        assert_eq!(bytes[body.start + 4..body.start + 20], [7; 16]);
        assert!(bytes[body.start + 20..].iter().all(|byte| *byte == 0));
    }
    let mut compare = Comparison::new(whole, base, 0, check, encode_record);
    compare.holds("kind", &[5]);
    compare.holds("payload_blocks", &[0; 4]);
    compare.holds("writes", &[0; 4]);
    compare.moves("first_seq", |record| {
        let op = take(A, A, A);
        record.header.body = Body::Control { seq: Seq(B), op };
    });
}

#[test]
fn records_of_copies_and_of_joining_are_drawn_as_they_are() {
    let whole = page().remove("Records").unwrap();
    let (check, body) = (whole.at("check"), whole.at("body"));
    let version = |epoch: u64, seq| Version {
        epoch: Epoch(epoch as u32),
        seq: Seq(seq),
    };
    let block = MovedBlock {
        lba: Lba(B),
        version: version(B, B),
        check: Check::from(B as u32),
        pages: 1,
    };
    let copied = move |start, end, version| {
        let zeros = CopiedZeros {
            start: Lba(start),
            end: Lba(end),
            version,
        };
        record(Body::Copied {
            blocks: vec![block],
            zeros: vec![zeros],
        })
    };
    let base = copied(A, A, version(A, A));
    let mut compare = Comparison::new(
        layout("Zeroed rows", 28),
        base.clone(),
        body.start,
        check.clone(),
        encode_record,
    );
    compare.moves("start", |record| *record = copied(B, A, version(A, A)));
    compare.moves("end", |record| *record = copied(A, B, version(A, A)));
    compare.moves("epoch", |record| *record = copied(A, A, version(B, A)));
    compare.moves("seq", |record| *record = copied(A, A, version(A, B)));
    compare.assert_complete();
    let bytes = encode_record(&base);
    assert_eq!(bytes[whole.at("kind")], [6]);
    assert_eq!(bytes[whole.at("payload_blocks")], [1, 0, 0, 0]);
    assert_eq!(bytes[whole.at("writes")], [1, 0, 0, 0]);
    assert_eq!(bytes[whole.at("first_seq")], [0; 8]);
    // The row of the block is that of a moved one.
    let moved = encode_record(&record(Body::Moved { blocks: vec![block] }));
    assert_eq!(
        bytes[body.start + 28..body.start + 52],
        moved[body.start..body.start + 24]
    );
    assert!(bytes[body.start + 52..].iter().all(|byte| *byte == 0));

    let join = |base| record(Body::Join { base: Seq(base) });
    let mut compare = Comparison::new(whole, join(A), 0, check, encode_record);
    compare.holds("kind", &[7]);
    compare.holds("payload_blocks", &[0; 4]);
    compare.holds("writes", &[0; 4]);
    compare.moves("first_seq", |record| *record = join(B));
    assert!(encode_record(&join(A))[body].iter().all(|byte| *byte == 0));
}

#[test]
fn a_row_of_the_catalog_is_drawn_as_it_is() {
    let encode: fn(&Snapshot) -> Vec<u8> = |snapshot| snapshot.encode().to_vec();
    let base = Snapshot {
        id: SnapshotId([1; 16]),
        version: entry(A).version,
        size_blocks: A,
        time_ms: A,
        root: entry(A),
        height: 1,
        pages: A,
        deleting: false,
    };
    let mut compare = Comparison::new(layout("The catalog", 96), base, 0, 0..0, encode);
    compare.holds("kind", &[1]);
    compare.moves("height", |row| row.height = 2);
    compare.moves("deleting", |row| row.deleting = true);
    compare.moves("epoch", |row| row.version.epoch = Epoch(B as u32));
    compare.moves("seq", |row| row.version.seq = Seq(B));
    compare.moves("id", |row| row.id = SnapshotId([2; 16]));
    compare.moves("size_blocks", |row| row.size_blocks = B);
    compare.moves("time_ms", |row| row.time_ms = B);
    compare.moves("pages", |row| row.pages = B);
    compare.moves("root", |row| row.root = entry(B));
    compare.assert_complete();

    let encode: fn(&Origin) -> Vec<u8> = |origin| origin.encode().to_vec();
    let volume = [1; 16];
    let mut compare = Comparison::new(layout("Origins", 96), Origin { volume, salt: A }, 0, 0..0, encode);
    compare.holds("kind", &[2]);
    compare.moves("volume", |row| row.volume = [2; 16]);
    compare.moves("salt", |row| row.salt = B);
    compare.assert_complete();
}

#[test]
fn a_flush_mark_stands_twice_and_checks_512_bytes() {
    let bytes = encode_record(&record(Body::FlushMark));
    let whole = page().remove("Records").unwrap();
    assert_eq!(bytes[whole.at("kind")], [3]);
    assert_eq!(bytes[..512], bytes[512..1024]);
    assert!(bytes[1024..].iter().all(|byte| *byte == 0));
    assert_eq!(bytes[whole.at("check")], check_of_header(&bytes, 512));
}

#[test]
fn a_page_and_its_entries_are_drawn_as_they_are() {
    type Sample = (PageKind, PageName, [u8; 16], u64, Vec<Entry>);
    let encode: fn(&Sample) -> Vec<u8> = |(kind, name, replica, checkpoint, entries)| {
        Page::encode(*kind, *name, *replica, *checkpoint, entries)
            .bytes()
            .as_ref()
            .to_vec()
    };
    let base: Sample = (
        PageKind::Map,
        PageName {
            tree: TreeId([0x11; 16]),
            level: 1,
            index: A,
        },
        IDENTITY.replica,
        A,
        vec![entry(A); FANOUT],
    );
    let whole = layout("Pages", BLOCK);
    let (check, slots) = (whole.at("check"), whole.at("slots"));
    assert_eq!(slots.len(), FANOUT * 24);
    let mut compare = Comparison::new(whole, base.clone(), 0, check.clone(), encode);
    compare.holds("magic", b"GFSP");
    compare.holds("version", &[1, 0]);
    compare.holds("kind", &[1]);
    compare.moves("kind", |sample| sample.0 = PageKind::Table);
    compare.moves("kind", |sample| sample.0 = PageKind::TableIndex);
    compare.moves("kind", |sample| sample.0 = PageKind::Catalog);
    compare.moves("tree", |sample| sample.1.tree = TreeId([0x22; 16]));
    compare.moves("level", |sample| sample.1.level = 2);
    compare.moves("index", |sample| sample.1.index = B);
    compare.moves("replica", |sample| sample.2 = [0x44; 16]);
    compare.moves("checkpoint", |sample| sample.3 = B);
    compare.holds("entries", &(FANOUT as u32).to_le_bytes());
    let bytes = encode(&base);
    compare.holds("check", &crc(&[&around(&bytes, &check)]));
    compare.moves("slots", |sample| sample.4 = vec![entry(B); FANOUT]);
    compare.assert_complete();

    // The last slot, to show how far the slots lie apart.
    let from = slots.end - 24;
    let last = |sample: &mut Sample, change: fn(&mut Entry)| change(sample.4.last_mut().expect("a full page"));
    let mut compare = Comparison::new(layout("Entries", 24), base.clone(), from, check.clone(), encode);
    compare.moves("location", |sample| {
        last(sample, |entry| entry.location = Location::from_bits(B))
    });
    compare.moves("epoch", |sample| {
        last(sample, |entry| entry.version.epoch = Epoch(B as u32))
    });
    compare.moves("seq", |sample| last(sample, |entry| entry.version.seq = Seq(B)));
    compare.moves("check", |sample| last(sample, |entry| entry.check = (B as u32).into()));
    compare.assert_complete();

    let of = |kind, live, log_index| Used {
        kind,
        live,
        log_index,
        open: false,
    };
    let rows = |id: u64, used: Used| vec![row(SegmentId(id as u32), &used)];
    let table: Sample = (
        PageKind::Table,
        PageName {
            tree: TreeId::HEAD,
            level: 0,
            index: 0,
        },
        IDENTITY.replica,
        A,
        rows(A, of(SegmentKind::Data, A as u32, A)),
    );
    let mut compare = Comparison::new(layout("Segment table rows", 24), table, slots.start, check, encode);
    compare.holds("kind", &[1, 0, 0, 0]);
    compare.moves("segment", |sample| {
        sample.4 = rows(B, of(SegmentKind::Data, A as u32, A))
    });
    compare.moves("live", |sample| sample.4 = rows(A, of(SegmentKind::Data, B as u32, A)));
    compare.moves("log_index", |sample| {
        sample.4 = rows(A, of(SegmentKind::Data, A as u32, B))
    });
    compare.holds("present", &[1, 0, 0, 0]);
    compare.assert_complete();
}

/// The seals of a replica like this.
fn seals_of(sealed: bool, block_size: BlockSize) -> Seals {
    let mut geometry = superblock().geometry;
    (geometry.sealed, geometry.salt, geometry.block_size) = (sealed, SALT, block_size);
    Seals::of(&geometry)
}

#[test]
fn lengths_and_tags_of_a_record_follow_its_body() {
    let (records, rows) = (page().remove("Records").unwrap(), layout("Write rows", 16));
    let (plain, large) = (BlockSize::K4, BlockSize::K16);
    for (sealed, block_size, blocks, header_bytes) in [
        (true, plain, 2, BLOCK),
        (true, plain, 199, BLOCK),
        (true, plain, 200, 2 * BLOCK),
        (true, plain, 256, 2 * BLOCK),
        (true, large, 2, BLOCK),
        (true, large, 189, BLOCK),
        (true, large, 190, 2 * BLOCK),
        (false, large, 2, BLOCK),
        (false, large, 256, BLOCK),
    ] {
        let check = |n: usize| Check {
            crc: n as u32,
            tag: Tag([if sealed { n as u8 } else { 0 }; 16]),
        };
        let checks = (1..=blocks).map(check).collect();
        let writes = vec![WriteEntry {
            lba: Lba(A),
            blocks: blocks as u32,
            zero: false,
        }];
        let first_seq = Seq(A);
        let lengths = if block_size == plain { 0 } else { blocks };
        let mut pages = vec![1; lengths];
        pages
            .iter_mut()
            .take(2)
            .for_each(|pages| *pages = if blocks > 2 { 1 } else { 3 });
        let body = Body::Data {
            first_seq,
            writes,
            checks,
            pages: pages.clone(),
        };
        let (bytes, _) = seals_of(sealed, block_size).encode(&record(body).header);
        let bytes = bytes.as_ref();
        assert_eq!(bytes.len(), header_bytes, "{blocks} blocks");
        let flags = u8::from(sealed) + if block_size == plain { 0 } else { 2 };
        assert_eq!(bytes[records.at("rows")], [flags]);
        assert_eq!(bytes[records.at("header_bytes")], (header_bytes as u32).to_le_bytes());
        assert_eq!(bytes[records.at("check")], check_of_header(bytes, header_bytes));
        let row_bytes = rows.rows.last().expect("it has rows").1.end;
        let lengths_at = records.at("body").start + row_bytes + blocks * 4;
        assert_eq!(bytes[lengths_at..lengths_at + lengths], pages);
        let tags = lengths_at + lengths;
        let tagged = if sealed { blocks } else { 0 };
        for n in 0..tagged {
            assert_eq!(bytes[tags + n * 16..tags + n * 16 + 16], [(n + 1) as u8; 16]);
        }
        assert!(bytes[tags + tagged * 16..].iter().all(|byte| *byte == 0));
    }
}

#[test]
fn the_lengths_of_moved_blocks_follow_their_rows() {
    let (records, rows) = (page().remove("Records").unwrap(), layout("Moved rows", 24));
    let blocks = [4, 2, 1].map(|pages| MovedBlock {
        lba: Lba(A),
        version: Version::default(),
        check: 0.into(),
        pages,
    });
    let body = Body::Moved {
        blocks: blocks.to_vec(),
    };
    let (bytes, _) = seals_of(false, BlockSize::K16).encode(&record(body).header);
    let bytes = bytes.as_ref();
    assert_eq!(bytes[records.at("rows")], [2]);
    let lengths = records.at("body").start + 3 * rows.rows.last().expect("it has rows").1.end;
    assert_eq!(bytes[lengths..lengths + 3], [4, 2, 1]);
    assert!(bytes[lengths + 3..].iter().all(|byte| *byte == 0));
}

#[test]
fn a_leaf_with_tags_is_drawn_as_it_is() {
    let entry = |n: u8| Entry {
        check: Check {
            tag: Tag([n; 16]),
            ..entry(A).check
        },
        ..entry(A)
    };
    let encode: fn(&Vec<Entry>) -> Vec<u8> = |entries| {
        let name = PageName {
            tree: TreeId::HEAD,
            level: 0,
            index: A,
        };
        Page::encode_tagged(name, IDENTITY.replica, A, entries)
            .bytes()
            .as_ref()
            .to_vec()
    };
    let plain = page().remove("Pages").unwrap();
    let base = vec![entry(1); FANOUT];
    let whole = layout("Leaves with tags", 2 * BLOCK);
    let mut compare = Comparison::new(whole, base.clone(), 0, plain.at("check"), encode);
    let bytes = encode(&base);
    compare.holds("page", &bytes[..BLOCK]);
    compare.moves("tags", |entries| *entries = vec![entry(2); FANOUT]);
    compare.assert_complete();
    assert_eq!(bytes[plain.at("kind")], [5]);
    assert_eq!(bytes[plain.at("slots")][..24], encode(&base)[plain.at("slots")][..24]);
    assert_eq!(bytes[plain.at("check")], crc(&[&around(&bytes, &plain.at("check"))]));
}

#[test]
fn a_row_of_salts_is_drawn_as_it_is() {
    type Sample = (u32, [u8; 16], KeyRow);
    let encode: fn(&Sample) -> Vec<u8> = |(index, replica, row)| encode_row(*index, replica, row).to_vec();
    let layout = layout("Salts", KEY_ROW_BYTES);
    let check = layout.at("check");
    let base = (
        A as u32,
        [1; 16],
        KeyRow {
            volume: [1; 16],
            epoch: Epoch(A as u32),
            key: KeyId(A as u32),
            salt: EpochSalt([1; 32]),
            check: KeyCheck([1; 8]),
        },
    );
    let bytes = encode(&base);
    let mut compare = Comparison::new(layout, base, 0, check.clone(), encode);
    compare.holds("magic", b"GFSK");
    compare.holds("version", &[1, 0]);
    compare.holds("check", &crc(&[&around(&bytes, &check)]));
    compare.moves("index", |(index, ..)| *index = B as u32);
    compare.moves("replica", |(_, replica, _)| *replica = [2; 16]);
    compare.moves("volume", |(.., row)| row.volume = [2; 16]);
    compare.moves("epoch", |(.., row)| row.epoch = Epoch(B as u32));
    compare.moves("key", |(.., row)| row.key = KeyId(B as u32));
    compare.moves("salt", |(.., row)| row.salt = EpochSalt([2; 32]));
    compare.moves("key_check", |(.., row)| row.check = KeyCheck([2; 8]));
    compare.assert_complete();
}

#[test]
fn a_location_is_packed_as_it_is_drawn() {
    let layout = layout("Locations", 64);
    let bits = |field: &str, value: u64| value << layout.at(field).start;
    let location = Location::new(SegmentId(0xabcd_ef01), 0x12_3456 * 512, 0x55 * 512);
    assert_eq!(
        location.bits(),
        bits("segment", 0xabcd_ef01) | bits("sector", 0x12_3456) | bits("sectors", 0x55)
    );
    assert_eq!(
        layout.at("segment").len() + layout.at("sector").len() + layout.at("sectors").len(),
        64
    );
    let block = Location::page_at(SegmentId(1), 8192);
    assert_eq!(
        block.bits(),
        bits("segment", 1) | bits("sector", 16) | bits("sectors", 8)
    );
    assert!(
        Location::from_bits(bits("segment", 1) | bits("sector", 16)).is_none(),
        "no length: nowhere"
    );
}

#[test]
fn the_check_of_a_block_covers_what_the_page_says() {
    let bytes: Vec<u8> = (0..BLOCK).map(|n| (n * 7) as u8).collect();
    let version = Version {
        epoch: Epoch(0x0403_0201),
        seq: Seq(0x1817_1615_1413_1211),
    };
    let check = Seals::new(&IDENTITY, SALT).block(Lba(A), version, &bytes);
    let (epoch, seq) = (version.epoch.0.to_le_bytes(), version.seq.0.to_le_bytes());
    assert_eq!(
        check.to_le_bytes(),
        crc(&[&IDENTITY.volume, &A.to_le_bytes(), &epoch, &seq, &bytes])
    );
}

#[test]
fn a_compressed_block_is_drawn_as_it_is() {
    let layout = layout("Compressed blocks", 8);
    for (codec, code) in [(Codec::Lz4, 1), (Codec::Zstd, 2)] {
        let (block, mut stored) = (vec![b'x'; 4 * BLOCK], vec![0xee; 4 * BLOCK]);
        let len = Compressor::new().compress(codec, &block, &mut stored);
        assert_eq!(len, Some(BLOCK), "{codec:?}");
        assert_eq!(stored[layout.at("codec")], [code]);
        assert_eq!(stored[layout.at("zeros")], [0; 3]);
        let length = u32::from_le_bytes(stored[layout.at("length")].try_into().unwrap()) as usize;
        assert!(length > 0 && stored[8 + length..BLOCK].iter().all(|byte| *byte == 0));
        let compressed = &stored[8..8 + length];
        let mut back = vec![0; 4 * BLOCK];
        match codec {
            Codec::Lz4 => lz4_flex::block::decompress_into(compressed, &mut back).unwrap(),
            Codec::Zstd => zstd::bulk::decompress_to_buffer(compressed, &mut back).unwrap(),
        };
        assert_eq!(back, block, "{codec:?}: by the codec's own words");
    }
}

#[test]
fn every_layout_of_the_page_is_held_by_a_test() {
    let held = [
        "Compressed blocks",
        "Control rows",
        "Entries",
        "Epoch ends",
        "Leaves with tags",
        "Locations",
        "Moved rows",
        "Origins",
        "Pages",
        "Records",
        "Salts",
        "Segment table rows",
        "The catalog",
        "The segment header",
        "The superblock",
        "Write rows",
        "Zeroed rows",
    ];
    assert_eq!(page().into_keys().collect::<Vec<_>>(), held);
}
