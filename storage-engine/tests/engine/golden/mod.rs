//! Golden images: small replicas as programs of each format version wrote them, kept for ever, and what is in them.
//!
//! `tests/golden/v<version>/<name>.image` is a replica's directory, compressed; `<name>.txt` beside it says what a guest
//! must find: a line for each block that holds data, with a hash of its bytes. Nothing here is ever made anew. When the
//! format's version rises, [`every_version_has_its_images`] fails until the images of the new one are made and committed:
//!
//! ```sh
//! cargo test -p galleonfs-storage-engine --test engine -- --ignored make_the_golden_images_of_this_version
//! ```
//!
//! That has to be done with the program that first writes the version to disks of users; it refuses to overwrite.

#![expect(
    clippy::disallowed_methods,
    reason = "the engine has no files; its golden images are some"
)]

mod image;
mod make;

use std::collections::BTreeMap;
use std::fmt::Write;
use std::fs;
use std::path::PathBuf;

use galleonfs_storage_engine::io::{Disk, FileId};
use galleonfs_storage_engine::request::{Control, Piece, Reply, Request};
use galleonfs_storage_engine::store::inspect;
use galleonfs_storage_engine::types::{BLOCK_BYTES, SnapshotId};
use ring::digest::{SHA256, digest};

use crate::harness::{Rig, assert_check_passes, format, open_as, snapshot_id};
use crate::sim_disk::SimDisk;

fn folder() -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("tests/golden")
}

/// The version of the format that a disk says it has.
fn version_of(disk: &mut SimDisk) -> u16 {
    let mut bytes = [0; 4096];
    disk.read(FileId::Superblock(0), 0, &mut bytes)
        .expect("a replica has a superblock");
    u16::from_le_bytes([bytes[8], bytes[9]])
}

fn this_version() -> u16 {
    let mut disk = SimDisk::default();
    format(&mut disk, 100);
    version_of(&mut disk)
}

/// Block → hash of its bytes; blocks of zeros are left out.
type Blocks = BTreeMap<u64, String>;

/// What a guest finds.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
struct Contents {
    size_blocks: u64,
    head: Blocks,
    /// Oldest first.
    snapshots: Vec<(SnapshotId, u64, Blocks)>,
}

fn read(rig: &mut Rig, at: Option<SnapshotId>, size_blocks: u64) -> Blocks {
    let mut blocks = Blocks::new();
    for lba in (0..size_blocks).step_by(64) {
        let (offset, len) = (lba * BLOCK_BYTES, 64.min(size_blocks - lba) * BLOCK_BYTES);
        let answer = match at {
            None => rig.run(Request::Read { offset, len }),
            Some(id) => rig.control(Control::Read { id, offset, len }),
        };
        let Ok(Reply::Data(pieces)) = answer else {
            panic!("block {lba} at {at:?}: {answer:?}");
        };
        let bytes: Vec<u8> = pieces
            .iter()
            .flat_map(|piece| match piece {
                Piece::Zeros(len) => vec![0; *len],
                Piece::Bytes(bytes) => bytes.as_ref().to_vec(),
            })
            .collect();
        for (lba, block) in (lba..).zip(bytes.chunks(BLOCK_BYTES as usize)) {
            if block.iter().any(|byte| *byte != 0) {
                let hash = digest(&SHA256, block);
                let hex = hash.as_ref()[..6].iter().map(|byte| format!("{byte:02x}")).collect();
                blocks.insert(lba, hex);
            }
        }
    }
    blocks
}

impl Contents {
    fn of(rig: &mut Rig) -> Contents {
        let size_blocks = rig.engine.size_bytes() / BLOCK_BYTES;
        let held = rig.engine.snapshots();
        let snapshots = held.iter().map(|held| {
            let blocks = held.size_bytes / BLOCK_BYTES;
            (held.id, blocks, read(rig, Some(held.id), blocks))
        });
        let snapshots = snapshots.collect();
        Contents {
            size_blocks,
            head: read(rig, None, size_blocks),
            snapshots,
        }
    }

    /// The text of a manifest.
    fn text(&self) -> String {
        let mut text = String::new();
        let mut add = |title: String, blocks: &Blocks| {
            text.push_str(&title);
            for (lba, hash) in blocks {
                let _ = writeln!(text, "{lba} {hash}");
            }
        };
        add(format!("volume of {} blocks\n", self.size_blocks), &self.head);
        for (id, size_blocks, blocks) in &self.snapshots {
            add(format!("snapshot {id} of {size_blocks} blocks\n"), blocks);
        }
        text
    }
}

/// The images of a version by their names.
fn images(version: u16) -> Vec<(String, PathBuf)> {
    let dir = folder().join(format!("v{version}"));
    let mut found: Vec<(String, PathBuf)> = fs::read_dir(&dir)
        .unwrap_or_else(|error| panic!("{}: {error}; how to make images is in golden/mod.rs", dir.display()))
        .map(|entry| entry.expect("list the images").path())
        .filter(|path| path.extension().is_some_and(|end| end == "image"))
        .map(|path| {
            let name = path
                .file_stem()
                .expect("an image has a name")
                .to_string_lossy()
                .into_owned();
            (name, path)
        })
        .collect();
    found.sort();
    found
}

#[test]
fn every_version_has_its_images() {
    for version in 1..=this_version() {
        for (name, path) in images(version) {
            let mut disk = image::load(&path);
            assert_eq!(version_of(&mut disk), version, "{name} is as it was written");
        }
        assert!(!images(version).is_empty(), "version {version} has images");
    }
    let bytes: u64 = (1..=this_version())
        .flat_map(images)
        .flat_map(|(_, path)| [path.with_extension("txt"), path])
        .map(|path| fs::metadata(&path).expect("an image has a manifest").len())
        .sum();
    assert!(bytes < 500 << 10, "images stay small: {bytes} bytes");
}

#[test]
fn replicas_of_every_version_are_read_and_written_on() {
    for version in 1..=this_version() {
        for (name, path) in images(version) {
            let expected = fs::read_to_string(path.with_extension("txt")).expect("an image has a manifest");
            let disk = image::load(&path);
            lives_on(&format!("v{version}/{name}"), disk, &expected);
        }
    }
}

/// Checks a replica, reads all of it, writes, takes a snapshot, ends in order or by a kill, and reads it again.
fn lives_on(name: &str, mut disk: SimDisk, expected: &str) {
    assert_check_passes(&mut disk.clone());
    let superblock = inspect(&mut disk).expect("the replica can be read");
    let (identity, mut epoch) = (superblock.geometry.identity, superblock.epoch.0);
    for round in 0..3u64 {
        epoch += 1;
        let (engine, report) = open_as(&mut disk, identity, epoch).unwrap_or_else(|error| panic!("{name}: {error}"));
        assert!(
            report.damaged_blocks.is_empty() && report.superblock_repaired.is_none(),
            "{name}"
        );
        let mut rig = Rig::new(disk, engine);
        let found = Contents::of(&mut rig);
        if round == 0 {
            assert_eq!(found.text(), expected, "{name}");
            assert_eq!(
                version_of(&mut rig.disk),
                this_version(),
                "{name} becomes one of this version"
            );
        }
        let id = snapshot_id(1000 + round);
        rig.snapshot(id);
        make::write_some(&mut rig, 7 + round, 40, make::BLOCKS_MAX);
        rig.flush().expect("the disk syncs");
        let mut after = Contents::of(&mut rig);
        let (kept, size_blocks, blocks) = after.snapshots.pop().expect("it was just taken");
        assert_eq!((kept, size_blocks), (id, found.size_blocks), "{name}");
        assert_eq!(blocks, found.head, "{name}: the snapshot holds what was there");
        assert_eq!(
            after.snapshots, found.snapshots,
            "{name}: older snapshots stay as they were"
        );
        if round == 1 {
            rig.disk = rig.disk.kill();
        } else {
            rig.close();
        }
        after.snapshots.push((kept, size_blocks, blocks));
        disk = rig.disk;
        assert_check_passes(&mut disk.clone());
        let (engine, _) = open_as(&mut disk.clone(), identity, epoch + 1).expect("it opens again");
        let mut again = Rig::new(disk.clone(), engine);
        assert_eq!(Contents::of(&mut again), after, "{name}: round {round}");
    }
}

#[test]
#[ignore = "writes into the repository; see golden/mod.rs"]
fn make_the_golden_images_of_this_version() {
    let dir = folder().join(format!("v{}", this_version()));
    fs::create_dir_all(&dir).expect("make the folder of a version");
    for (name, mut disk) in make::replicas() {
        let path = dir.join(format!("{name}.image"));
        assert!(
            !path.exists(),
            "{} is there: images are never made anew",
            path.display()
        );
        let superblock = inspect(&mut disk).expect("the replica can be read");
        let (identity, epoch) = (superblock.geometry.identity, superblock.epoch.0 + 1);
        let (engine, _) = open_as(&mut disk.clone(), identity, epoch).expect("it opens");
        let contents = Contents::of(&mut Rig::new(disk.clone(), engine));
        image::save(&mut disk, &path);
        fs::write(path.with_extension("txt"), contents.text()).expect("write a manifest");
    }
}
