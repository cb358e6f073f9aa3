//! Opening: what is refused, and torn told from corrupt.

use galleonfs_storage_engine::io::{Disk, FileId};
use galleonfs_storage_engine::store::{FormatOptions, OpenError, OpenOptions, format_replica, open_replica};
use galleonfs_storage_engine::types::{BlockSize, Epoch, Identity};

use galleonfs_storage_engine::buffer::{Buf, BufMut};
use galleonfs_storage_engine::io::IoFailure;
use galleonfs_storage_engine::store::check::check;

use crate::harness::{IDENTITY, Rig, SEGMENT_BYTES, format, open, options, segment};
use crate::sim_disk::{Cut, SimDisk};

/// The first record of a fresh replica lies behind the header of its first segment.
const FIRST_RECORD: u64 = 4096;

fn three_writes(flushed: bool) -> SimDisk {
    let mut rig = Rig::fresh(500);
    rig.write(1, 1, 10).unwrap();
    rig.write(2, 1, 20).unwrap();
    if flushed {
        rig.flush().unwrap();
    }
    rig.write(3, 1, 30).unwrap();
    rig.disk
}

#[test]
fn an_unreadable_record_that_no_flush_covers_is_a_torn_tail() {
    let mut disk = three_writes(false).cut(Cut::All);
    disk.flip(segment(0), FIRST_RECORD + 8192, 0);
    let (engine, report) = open(&mut disk, 2).unwrap();
    assert_eq!(report.torn_at, Some((0, FIRST_RECORD + 8192)));
    let mut rig = Rig::new(disk, engine);
    assert_eq!(
        rig.read(1, 3).unwrap(),
        [10, 0, 0],
        "the log is cut there, and what is behind it is gone"
    );
}

#[test]
fn an_unreadable_record_that_a_flush_covers_is_damage_and_nothing_is_cut() {
    let mut disk = three_writes(true).cut(Cut::All);
    disk.flip(segment(0), FIRST_RECORD + 8192, 0);
    let before = disk.clone();
    let error = open(&mut disk, 2).unwrap_err();
    assert!(
        matches!(&error, OpenError::Damaged(text) if text.contains("was flushed")),
        "{error}"
    );
    assert_eq!(before.file_ids(), disk.file_ids());
    assert!(open(&mut disk, 2).is_err(), "and it is refused again");
}

#[test]
fn a_flushed_block_with_a_bad_check_stays_and_fails_when_it_is_read() {
    let mut disk = three_writes(true).cut(Cut::All);
    disk.flip(segment(0), FIRST_RECORD + 8192 + 4096, 3);
    let (engine, report) = open(&mut disk, 2).unwrap();
    assert_eq!(report.damaged_blocks, [2]);
    let mut rig = Rig::new(disk, engine);
    assert!(rig.read(2, 1).is_err());
    assert_eq!(rig.read(1, 1).unwrap(), [10]);
    assert_eq!(rig.read(3, 1).unwrap(), [30]);
}

#[test]
fn a_flushed_block_with_a_bad_check_that_was_written_again_is_no_damage() {
    let mut rig = Rig::fresh(500);
    rig.write(1, 1, 10).unwrap();
    rig.write(1, 1, 20).unwrap();
    rig.flush().unwrap();
    rig.write(3, 1, 30).unwrap();
    let mut disk = rig.disk.cut(Cut::All);
    disk.flip(segment(0), FIRST_RECORD + 4096, 3);
    let (engine, report) = open(&mut disk, 2).unwrap();
    assert_eq!(report.damaged_blocks, Vec::<u64>::new());
    assert_eq!(Rig::new(disk, engine).read(1, 3).unwrap(), [20, 0, 30]);
}

#[test]
fn what_was_cut_off_never_comes_back() {
    let mut disk = three_writes(false).cut(Cut::All);
    disk.flip(segment(0), FIRST_RECORD + 8192, 0);
    let (_, report) = open(&mut disk, 2).unwrap();
    assert!(report.torn_at.is_some());
    // The damage heals, as a flaky cable would have it; the cut-off writes are still not taken for valid.
    disk.flip(segment(0), FIRST_RECORD + 8192, 0);
    let (engine, _) = open(&mut disk, 3).unwrap();
    let mut rig = Rig::new(disk, engine);
    assert_eq!(rig.read(1, 3).unwrap(), [10, 0, 0]);
}

#[test]
fn one_damaged_superblock_is_noticed_and_written_anew() {
    for slot in 0..2 {
        let mut disk = three_writes(true).cut(Cut::All);
        disk.flip(FileId::Superblock(slot), 100, 1);
        let (_, report) = open(&mut disk, 2).unwrap();
        assert!(
            report
                .superblock_repaired
                .unwrap()
                .contains(&format!("superblock {slot}"))
        );
        let (_, report) = open(&mut disk, 3).unwrap();
        assert_eq!(report.superblock_repaired, None);
    }
}

#[test]
fn two_damaged_superblocks_are_refused_with_what_to_do() {
    let mut disk = three_writes(true);
    disk.flip(FileId::Superblock(0), 100, 1);
    disk.flip(FileId::Superblock(1), 100, 1);
    let error = open(&mut disk, 2).unwrap_err().to_string();
    assert!(
        error.contains("neither superblock is valid") && error.contains("restore from a backup"),
        "{error}"
    );
}

#[test]
fn a_newer_format_is_refused_by_its_number() {
    let mut disk = three_writes(true);
    // A newer program changed more than the number.
    disk.flip(FileId::Superblock(0), 8, 0);
    disk.flip(FileId::Superblock(0), 200, 1);
    assert!(matches!(open(&mut disk, 2), Err(OpenError::NewerFormat(5))));
}

#[test]
fn a_damaged_version_is_damage_and_the_other_superblock_counts() {
    for bit in 0..8 {
        let mut disk = three_writes(true);
        disk.flip(FileId::Superblock(0), 8, bit);
        let (engine, report) = open(&mut disk, 2).unwrap();
        assert!(report.superblock_repaired.unwrap().contains("superblock 0"));
        assert_eq!(Rig::new(disk, engine).read(1, 2).unwrap(), [10, 20]);
    }
}

#[test]
fn a_replica_of_another_volume_is_refused_with_both_names() {
    for (what, other) in [
        (
            "cluster",
            Identity {
                cluster: [9; 16],
                ..IDENTITY
            },
        ),
        (
            "volume",
            Identity {
                volume: [9; 16],
                ..IDENTITY
            },
        ),
        (
            "replica",
            Identity {
                replica: [9; 16],
                ..IDENTITY
            },
        ),
    ] {
        let mut disk = three_writes(true);
        let error = open_replica(&mut disk, OpenOptions::new(other, Epoch(2)))
            .unwrap_err()
            .to_string();
        assert!(error.contains(what) && error.contains("0909"), "{error}");
    }
}

#[test]
fn an_epoch_that_is_not_higher_is_refused() {
    let mut disk = SimDisk::default();
    format(&mut disk, 100);
    open(&mut disk, 5).unwrap();
    assert!(matches!(
        open(&mut disk, 5),
        Err(OpenError::Fenced { promised: 5, asked: 5 })
    ));
    assert!(matches!(open(&mut disk, 4), Err(OpenError::Fenced { .. })));
    open(&mut disk, 6).unwrap();
}

#[test]
fn a_missing_or_short_segment_is_named() {
    let mut disk = three_writes(true);
    disk.delete(segment(0));
    let error = open(&mut disk, 2).unwrap_err().to_string();
    assert!(error.contains("segment 0 is missing"), "{error}");
}

#[test]
fn an_interrupted_format_is_begun_again_and_a_finished_one_is_not() {
    let mut disk = SimDisk::default();
    disk.create(segment(0), SEGMENT_BYTES).unwrap();
    disk.create(FileId::Superblock(0), 4096).unwrap();
    assert!(matches!(open(&mut disk, 1), Err(OpenError::NotFormatted)));
    format(&mut disk, 100);
    let options = FormatOptions {
        identity: IDENTITY,
        block_size: BlockSize::K4,
        size_blocks: 100,
        segment_bytes: Some(SEGMENT_BYTES),
        salt: 1,
    };
    assert!(matches!(
        format_replica(&mut disk, &options),
        Err(OpenError::AlreadyFormatted)
    ));
}

#[test]
fn a_hundred_crashes_in_a_row_do_not_overflow_the_history_of_epochs() {
    let mut disk = SimDisk::default();
    format(&mut disk, 500);
    for epoch in 1..=250 {
        let (engine, _) = open(&mut disk, epoch).unwrap();
        let mut rig = Rig::new(disk, engine);
        rig.write(u64::from(epoch) % 500, 1, u64::from(epoch)).unwrap();
        rig.flush().unwrap();
        disk = rig.disk.cut(Cut::None);
    }
    let (engine, _) = open(&mut disk, 251).unwrap();
    let mut rig = Rig::new(disk, engine);
    assert_eq!(rig.read(250, 1).unwrap(), [250]);
}

/// A disk that dies in the middle of its next write to a superblock, or cannot read superblocks.
struct Failing {
    disk: SimDisk,
    tear_superblock: bool,
    dead: bool,
    superblocks_unreadable: bool,
}

impl Failing {
    fn alive(&self) -> Result<(), IoFailure> {
        if self.dead {
            Err(IoFailure::Failed("the power is off".into()))
        } else {
            Ok(())
        }
    }
}

impl Disk for Failing {
    fn read(&mut self, file: FileId, offset: u64, buf: &mut [u8]) -> Result<(), IoFailure> {
        if self.superblocks_unreadable && matches!(file, FileId::Superblock(_)) {
            return Err(IoFailure::Failed("Input/output error".into()));
        }
        self.disk.read(file, offset, buf)
    }

    fn write(&mut self, file: FileId, offset: u64, parts: &[Buf]) -> Result<(), IoFailure> {
        self.alive()?;
        if self.tear_superblock && matches!(file, FileId::Superblock(_)) {
            let mut torn = BufMut::zeroed(4096);
            self.disk.read(file, 0, torn.as_mut())?;
            torn.as_mut()[..512].copy_from_slice(&parts[0].as_ref()[..512]);
            self.disk.write(file, offset, &[torn.freeze()])?;
            self.disk.sync(file)?;
            self.dead = true;
        }
        self.alive()?;
        self.disk.write(file, offset, parts)
    }

    fn sync(&mut self, file: FileId) -> Result<(), IoFailure> {
        self.alive()?;
        self.disk.sync(file)
    }

    fn create(&mut self, file: FileId, len: u64) -> Result<(), IoFailure> {
        self.disk.create(file, len)
    }

    fn remove(&mut self, file: FileId) -> Result<(), IoFailure> {
        self.disk.remove(file)
    }

    fn list(&mut self) -> Result<Vec<(FileId, u64)>, IoFailure> {
        self.disk.list()
    }
}

#[test]
fn a_power_cut_while_opening_leaves_a_valid_superblock() {
    for damaged in 0..2 {
        // Many ends of epochs, so that a superblock reaches over more than one sector and can be torn.
        let mut disk = SimDisk::default();
        format(&mut disk, 500);
        for epoch in 1..=40 {
            let (engine, _) = open(&mut disk, epoch).unwrap();
            let mut rig = Rig::new(disk, engine);
            rig.write(u64::from(epoch), 1, u64::from(epoch)).unwrap();
            rig.flush().unwrap();
            disk = rig.disk.cut(Cut::None);
        }
        disk.flip(FileId::Superblock(damaged), 100, 1);
        let mut dying = Failing {
            disk,
            tear_superblock: true,
            dead: false,
            superblocks_unreadable: false,
        };
        open_replica(&mut dying, options(41)).unwrap_err();
        let (engine, _) = open(&mut dying.disk, 42).unwrap();
        let mut rig = Rig::new(dying.disk, engine);
        assert_eq!(rig.read(40, 1).unwrap(), [40]);
    }
}

#[test]
fn what_an_earlier_opening_served_is_never_cut_off_as_torn() {
    for byte in [0, 4096] {
        // Two writes that no flush covered survive a crash; opening finds, syncs and serves them.
        let mut rig = Rig::fresh(500);
        rig.write(1, 1, 10).unwrap();
        rig.write(2, 1, 20).unwrap();
        let mut disk = rig.disk.cut(Cut::All);
        let (engine, _) = open(&mut disk, 2).unwrap();
        let mut rig = Rig::new(disk, engine);
        assert_eq!(rig.read(1, 2).unwrap(), [10, 20]);
        let mut disk = rig.disk.cut(Cut::None);
        disk.flip(segment(0), FIRST_RECORD + 8192 + byte, 0);
        match open(&mut disk, 3) {
            Err(error) => assert!(error.to_string().contains("was served"), "{error}"),
            Ok((engine, report)) => {
                assert_eq!(report.damaged_blocks, [2]);
                assert!(Rig::new(disk, engine).read(2, 1).is_err(), "damage is said, not hidden");
            }
        }
    }
}

#[test]
fn a_replica_whose_superblocks_cannot_be_read_is_never_formatted_anew() {
    let mut rig = Rig::fresh(500);
    rig.write(1, 1, 10).unwrap();
    rig.close();
    let mut disk = Failing {
        disk: rig.disk,
        tear_superblock: false,
        dead: false,
        superblocks_unreadable: true,
    };
    assert!(matches!(
        open_replica(&mut disk, options(5)),
        Err(OpenError::Damaged(_))
    ));
    let new = FormatOptions {
        identity: IDENTITY,
        block_size: BlockSize::K4,
        size_blocks: 500,
        segment_bytes: Some(SEGMENT_BYTES),
        salt: 1,
    };
    assert!(matches!(
        format_replica(&mut disk, &new),
        Err(OpenError::AlreadyFormatted)
    ));
}

#[test]
fn the_segment_table_counts_itself_right_when_it_takes_several_pages() {
    let mut rig = Rig::fresh(256 * 200);
    let mut epoch = 1;
    for n in 0..185 {
        rig.write(n * 256, 256, n * 256 + 1).unwrap();
        if n > 160 {
            rig.close();
            assert_eq!(
                check(&mut rig.disk).unwrap().problems,
                Vec::<String>::new(),
                "after {n} segments"
            );
            epoch += 1;
            let mut disk = rig.disk;
            let (engine, _) = open(&mut disk, epoch).unwrap();
            rig = Rig::new(disk, engine);
        }
    }
}
