//! One structure of the disk at a time. The first byte of an input that carries a check says whether it is made to fit.

use galleonfs_storage_engine::buffer::BufMut;
use galleonfs_storage_engine::compress::{Codec, CompressError, Compressor};
use galleonfs_storage_engine::io::{Disk, FileId};
use galleonfs_storage_engine::seal::{Sealer, Tag};
use galleonfs_storage_engine::store::layout::{
    Catalog, Entry, Origin, Page, PageKind, PageName, SegmentHeader, Snapshot, TreeId, decode_row, encode_row,
    from_row, row,
};
use galleonfs_storage_engine::store::{OpenError, Seals, Superblock, inspect};
use galleonfs_storage_engine::types::{BlockSize, Check, Epoch, Lba, Location, Seq, Version};

use crate::disk::fit;
use crate::harness::{IDENTITY, keyring, proof};
use crate::sim_disk::SimDisk;

const SALT: u64 = 0x5a17;

/// The first byte, and the rest in a structure of `len` bytes: an input may leave zeros at the end out.
fn padded(data: &[u8], len: usize) -> (u8, Vec<u8>) {
    let (first, rest) = data.split_first().unwrap_or((&0, &[]));
    let mut bytes = rest.to_vec();
    bytes.resize(len, 0);
    (*first, bytes)
}

/// The twins as opening reads them.
pub fn superblocks(data: &[u8]) {
    let (flags, bytes) = padded(data, 8192);
    let mut disk = SimDisk::default();
    let mut valid = Vec::new();
    for (slot, mut copy) in (0..).zip(bytes.chunks(4096).map(<[u8]>::to_vec)) {
        if flags & 1 << slot != 0 {
            fit(&[], &mut copy, 12);
        }
        let decoded = Superblock::decode(&copy);
        if let Ok(superblock) = decoded {
            // What is taken in can be given out, and means the same.
            let again = Superblock::decode(superblock.encode().as_ref());
            assert_eq!(again.as_ref(), Ok(&superblock));
            valid.push(superblock);
        }
        disk.create(FileId::Superblock(slot), 4096).expect("there is room");
        let written = disk.write(FileId::Superblock(slot), 0, &[BufMut::copy_of(&copy).freeze()]);
        written.expect("a disk in memory takes it");
    }
    match inspect(&mut disk) {
        Ok(found) => {
            assert!(valid.contains(&found));
            assert!(valid.iter().all(|other| other.generation <= found.generation));
        }
        Err(OpenError::NewerFormat(_)) => {}
        Err(_) => assert!(valid.is_empty()),
    }
}

pub fn segment_header(data: &[u8]) {
    let (flags, mut bytes) = padded(data, 4096);
    if flags & 1 != 0 {
        fit(&[], &mut bytes, 8);
    }
    if let Some(header) = SegmentHeader::decode(&bytes, &IDENTITY) {
        let again = header.encode(&IDENTITY);
        assert_eq!(SegmentHeader::decode(again.as_ref(), &IDENTITY), Some(header));
    }
}

pub fn record_header(data: &[u8]) {
    let (flags, mut bytes) = padded(data, 8192);
    let sealed = flags & 2 != 0;
    let mut seals = Seals::new(&IDENTITY, SALT);
    let large = flags & 8 != 0;
    if sealed || large {
        let mut geometry = crate::disk::geometry();
        geometry.sealed = sealed;
        if large {
            geometry.block_size = BlockSize::K16;
        }
        seals = Seals::of(&geometry);
    }
    if flags & 1 != 0 {
        let before = [&IDENTITY.volume[..], &SALT.to_le_bytes()].concat();
        let covered = match (bytes[6], bytes[13]) {
            (3, _) => 512,
            (_, 0x20) => 8192,
            _ => 4096,
        };
        fit(&before, &mut bytes[..covered], 8);
    }
    let there = if flags & 4 != 0 { 4096 } else { 8192 };
    let Some((header, _)) = seals.decode(&bytes[..there]) else {
        return;
    };
    // Who replays it asks for these.
    let _ = header.body.numbers();
    let (again, check) = seals.encode(&header);
    assert_eq!(seals.decode(again.as_ref()), Some((header, check)));
}

pub fn page(data: &[u8]) {
    let (flags, mut bytes) = padded(data, 8192);
    bytes.truncate(Page::bytes_of(&bytes));
    if flags & 1 != 0 {
        fit(&[], &mut bytes, 60);
    }
    let said = Check::from(u32::from_le_bytes([bytes[60], bytes[61], bytes[62], bytes[63]]));
    // An entry may also say that the page has another length.
    let len = match flags >> 1 {
        0 => bytes.len(),
        sectors => (usize::from(sectors) * 512).min(bytes.len()),
    };
    let bytes = BufMut::copy_of(&bytes[..len]).freeze();
    if let Some((page, kind, name)) = Page::decode_unreferenced(bytes.clone()) {
        let replica = bytes.as_ref()[16..32].try_into().expect("sixteen bytes");
        let again = Page::decode(bytes.clone(), kind, name, replica, page.check());
        assert!(again.is_ok(), "what says what it is, is that: {again:?}");
        for entry in page.entries() {
            let _ = (
                from_row(entry),
                format!("{entry:?}"),
                entry.is_vacant(),
                entry.unmarked(),
            );
        }
        for slot in 0..page.entries().len() {
            let _ = name.lba_of(slot);
        }
    }
    let name = PageName {
        tree: TreeId::HEAD,
        level: 0,
        index: 0,
    };
    let _ = Page::decode(bytes, PageKind::Map, name, IDENTITY.replica, said);
}

/// Rows of the segment table and of the catalog.
pub fn rows(data: &[u8]) {
    let (_, bytes) = padded(data, 96);
    let mut entry = Entry {
        location: Location::from_bits(u64::from_le_bytes(bytes[..8].try_into().expect("eight bytes"))),
        version: Version {
            epoch: Epoch(u32::from_le_bytes(bytes[8..12].try_into().expect("four bytes"))),
            seq: Seq(u64::from_le_bytes(bytes[12..20].try_into().expect("eight bytes"))),
        },
        check: u32::from_le_bytes(bytes[20..24].try_into().expect("four bytes")).into(),
    };
    if data.first().is_some_and(|flags| flags & 1 != 0) {
        entry.check = 1.into();
    }
    if let Some((id, used)) = from_row(entry) {
        assert_eq!(from_row(row(id, &used)), Some((id, used)));
    }
    let mut catalog = Catalog::default();
    let bytes: [u8; 96] = bytes.try_into().expect("a row has 96 bytes");
    if catalog.add_row(&bytes) {
        let origins: Vec<[u8; 96]> = catalog.origins().iter().map(Origin::encode).collect();
        let snapshots: Vec<[u8; 96]> = catalog.all().iter().map(Snapshot::encode).collect();
        assert_eq!(origins.len() + snapshots.len(), 1);
        let mut again = Catalog::default();
        assert!(again.add_row(origins.first().or(snapshots.first()).expect("one of them")));
        assert_eq!(again, catalog);
        // The same once more is no later snapshot.
        assert_eq!(catalog.add_row(&bytes), snapshots.is_empty());
    }
}

pub fn key_row(data: &[u8]) {
    let (flags, mut bytes) = padded(data, 128);
    if flags & 1 != 0 {
        fit(&[], &mut bytes, 8);
    }
    let index = u32::from(flags >> 1);
    if let Some(row) = decode_row(&bytes, index, &IDENTITY.replica) {
        let again = encode_row(index, &IDENTITY.replica, &row);
        assert_eq!(decode_row(&again, index, &IDENTITY.replica), Some(row));
    }
}

pub fn location(data: &[u8]) {
    let mut bits = [0; 8];
    let len = data.len().min(8);
    bits[..len].copy_from_slice(&data[..len]);
    let location = Location::from_bits(u64::from_le_bytes(bits));
    assert_eq!(location.bits(), u64::from_le_bytes(bits));
    assert_eq!(location.is_none(), location.len() == 0);
    let _ = format!("{location:?}");
    if !location.is_none() {
        let again = Location::new(location.segment(), location.offset(), location.len());
        assert_eq!(again, location);
    }
}

/// The first byte chooses the block's size and the stored length, and whether the rest is compressed first.
pub fn compressed_block(data: &[u8]) {
    let (flags, rest) = data.split_first().unwrap_or((&0, &[]));
    let block_bytes = [8 << 10, 16 << 10, 64 << 10][usize::from(flags & 3) % 3];
    let mut compressor = Compressor::new();
    let mut block = vec![0; block_bytes];
    if flags & 4 != 0 {
        let len = rest.len().min(block_bytes);
        block[..len].copy_from_slice(&rest[..len]);
        for codec in [Codec::Lz4, Codec::Zstd] {
            let mut stored = vec![0xee; block_bytes];
            if let Some(len) = compressor.compress(codec, &block, &mut stored) {
                assert!(len.is_multiple_of(4096) && len < block_bytes);
                let mut back = vec![0; block_bytes];
                let opened = compressor.decompress(&stored[..len], &mut back);
                assert_eq!(opened, Ok(()));
                assert!(back == block, "{codec:?} gives something else back");
            }
        }
        return;
    }
    let pages = rest.len().div_ceil(4096) + usize::from(flags >> 6);
    let mut stored = rest.to_vec();
    stored.resize(pages * 4096, 0);
    // The block ends where a page that nobody gave us begins.
    let mut out = vec![0xee; block_bytes + 4096];
    let opened = compressor.decompress(&stored, &mut out[..block_bytes]);
    assert!(out[block_bytes..].iter().all(|byte| *byte == 0xee));
    if stored.is_empty() || stored.len() >= block_bytes {
        assert_eq!(opened, Err(CompressError::Header));
    }
}

/// A sealed block, and changes of it: of its address (8 bytes), version (12), tag (16) and bytes, each XORed with the
/// input. It opens if nothing was changed, and never else.
pub fn sealed_block(data: &[u8]) {
    let ring = keyring();
    let rows = [proof(&ring, 3).row, proof(&ring, 4).row];
    let mut sealer = Sealer::new(ring, &rows, IDENTITY.volume, Epoch(4), 4096).expect("the key is there");
    let (lba, version) = (
        Lba(77),
        Version {
            epoch: Epoch(4),
            seq: Seq(5),
        },
    );
    let plain: Vec<u8> = (0..4096u32).map(|n| (n * 7) as u8).collect();
    let mut bytes = plain.clone();
    let tag = sealer.seal(lba, version, &mut bytes);
    let mut all = [
        &lba.0.to_le_bytes()[..],
        &version.epoch.0.to_le_bytes(),
        &version.seq.0.to_le_bytes(),
        &tag.0,
        &bytes,
    ]
    .concat();
    all.iter_mut().zip(data).for_each(|(byte, change)| *byte ^= change);
    let u64_at = |at: usize| u64::from_le_bytes(all[at..at + 8].try_into().expect("eight bytes"));
    let found_lba = Lba(u64_at(0));
    let found_version = Version {
        epoch: Epoch(u64_at(8) as u32),
        seq: Seq(u64_at(12)),
    };
    let found_tag = Tag(all[20..36].try_into().expect("sixteen bytes"));
    let mut found = all[36..].to_vec();
    let opened = sealer.open(found_lba, found_version, found_tag, &mut found);
    if data.iter().take(all.len()).all(|change| *change == 0) {
        assert_eq!(opened, Ok(()));
        assert!(found == plain);
    } else {
        assert!(opened.is_err(), "a changed block opens");
        assert!(found.iter().all(|byte| *byte == 0), "what fails is wiped");
    }
}
