//! Mending: a damaged block is written anew as others have it, in its own version, and nothing else is.

use galleonfs_storage_engine::io::{Disk, FileId};
use galleonfs_storage_engine::replication::{ReplicaEvent, ReplicaStore};
use galleonfs_storage_engine::store::{Copies, DamagedThing, Event, ScrubOrder};
use galleonfs_storage_engine::types::{Lba, Version};

use crate::replica_rig::{Replica, assert_check_passes, stored, told, version};
use crate::sim_disk::Cut;

fn replica() -> Replica {
    let mut replica = Replica::fresh(500, 5);
    replica.store.gate(Some(Version::MAX));
    replica.now.mends = true;
    replica
}

/// Flips a bit of every place where this block lies in this version; says how many there are.
fn rot(replica: &mut Replica, lba: u64, at: Version) -> usize {
    let wanted = stored(replica.store.seals(), Lba(lba), at).bytes;
    let mut places = 0;
    for file in replica.disk.file_ids() {
        for page in replica.disk.written_pages(file) {
            let mut found = vec![0; 4096];
            let read = matches!(file, FileId::Segment(_)) && replica.disk.read(file, page * 4096, &mut found).is_ok();
            if read && found == wanted.as_ref() {
                replica.disk.flip(file, page * 4096 + 77, 3);
                places += 1;
            }
        }
    }
    places
}

fn mend(replica: &mut Replica, lba: u64, at: Version) -> Copies {
    let token = replica.token();
    let copies = replica.copies(&[(Lba(lba), Lba(lba + 1), (at, false))]);
    replica.store.repair_in(token, copies);
    replica.settle();
    replica
        .take(|event| match event {
            Event::CopiedIn(found, result) if *found == token => Some(result.clone()),
            _ => None,
        })
        .unwrap()
}

fn reads(replica: &mut Replica, lba: u64) -> bool {
    let token = replica.token();
    replica.store.read_stored(token, Lba(lba), 1);
    replica.settle();
    replica.take(|event| match event {
        Event::Stored(found, result) if *found == token => Some(result.is_ok()),
        _ => None,
    })
}

/// Everything is there, and all of it passes its check, in memory, in the map and after a power cut.
fn assert_whole(mut replica: Replica) {
    let contents = replica.contents();
    replica.sync();
    let (mut again, report) = Replica::open(replica.disk.cut(Cut::None), told(5, &[])).unwrap();
    assert_eq!((report.cut, report.damaged_blocks), (false, Vec::new()));
    assert_eq!(again.contents(), contents);
    replica.pass_time(20_000);
    replica.store.scrub(ScrubOrder::Start { bytes_per_second: 0 });
    replica.settle();
    let progress = replica.store.scrub_progress();
    assert!(!progress.running);
    assert_eq!(progress.damaged, []);
    assert_eq!(replica.contents(), contents);
    replica.pass_time(20_000);
    let (mut again, report) = Replica::open(replica.disk.cut(Cut::None), told(5, &[])).unwrap();
    assert_eq!((report.cut, report.damaged_blocks), (false, Vec::new()));
    assert_eq!(again.contents(), contents);
    assert_check_passes(&replica.disk.cut(Cut::None));
}

#[test]
fn a_damaged_block_of_the_map_is_written_anew_in_its_version() {
    let mut replica = replica();
    replica.write(1, 10, 4, false);
    replica.sync();
    replica.pass_time(20_000);
    assert_eq!(rot(&mut replica, 12, version(5, 1)), 1);
    assert!(!reads(&mut replica, 12));
    assert_eq!(mend(&mut replica, 12, version(5, 1)).applied, 1);
    assert!(reads(&mut replica, 12));
    assert_whole(replica);
}

#[test]
fn a_damaged_block_of_the_log_is_written_anew_in_its_version() {
    let mut replica = replica();
    replica.write(1, 10, 4, false);
    replica.sync();
    replica.write(2, 300, 1, false);
    assert_eq!(rot(&mut replica, 11, version(5, 1)), 1);
    assert!(!reads(&mut replica, 11));
    assert_eq!(mend(&mut replica, 11, version(5, 1)).applied, 1);
    assert!(reads(&mut replica, 11));
    replica.write(3, 301, 1, false);
    assert_whole(replica);
}

#[test]
fn a_damaged_place_is_counted_once_whoever_reads_it_and_its_successor_is_another() {
    let mut replica = replica();
    replica.write(1, 10, 4, false);
    replica.sync();
    replica.pass_time(20_000);
    let counted = |replica: &Replica| replica.store.stats().damaged_places;
    assert_eq!(counted(&replica), 0);
    rot(&mut replica, 11, version(5, 1));
    rot(&mut replica, 12, version(5, 1));
    for _ in 0..3 {
        assert!(!reads(&mut replica, 12));
        assert_eq!(counted(&replica), 1);
    }
    replica.store.scrub(ScrubOrder::Start { bytes_per_second: 0 });
    replica.settle();
    assert_eq!(
        counted(&replica),
        2,
        "the scrub finds the other one, and this one again"
    );
    assert_eq!(mend(&mut replica, 12, version(5, 1)).applied, 1);
    assert!(reads(&mut replica, 12));
    assert_eq!(counted(&replica), 2, "what was mended stays counted");
    replica.pass_time(20_000);
    rot(&mut replica, 12, version(5, 1));
    assert!(!reads(&mut replica, 12));
    assert_eq!(counted(&replica), 3, "it rots again, somewhere else");
}

#[test]
fn what_is_sound_or_newer_is_not_touched() {
    let mut replica = replica();
    replica.write(1, 10, 4, false);
    replica.write(2, 11, 1, false);
    replica.pass_time(20_000);
    let sound = mend(&mut replica, 10, version(5, 1));
    assert_eq!((sound.applied, sound.superseded), (0, 1));
    assert_eq!(rot(&mut replica, 11, version(5, 2)), 1);
    let older = mend(&mut replica, 11, version(5, 1));
    assert_eq!((older.applied, older.superseded), (0, 1));
    assert!(!reads(&mut replica, 11), "an older version is no cure");
    assert_eq!(mend(&mut replica, 11, version(5, 2)).applied, 1);
    let again = mend(&mut replica, 11, version(5, 2));
    assert_eq!((again.applied, again.superseded), (0, 1));
    assert_whole(replica);
}

#[test]
fn a_write_that_comes_while_a_block_is_mended_stays() {
    let mut replica = replica();
    replica.write(1, 10, 4, false);
    replica.sync();
    replica.pass_time(20_000);
    rot(&mut replica, 12, version(5, 1));
    let token = replica.token();
    let copies = replica.copies(&[(Lba(12), Lba(13), (version(5, 1), false))]);
    replica.store.repair_in(token, copies);
    // The order has just read what is there.
    replica.poll();
    replica.write(2, 12, 1, false);
    let contents = replica.contents();
    assert_eq!(contents[12], (version(5, 2), false));
    assert_whole(replica);
}

#[test]
fn damage_is_told_when_the_log_is_replayed_and_by_every_scrub_until_it_is_mended() {
    let mut replica = replica();
    replica.write(1, 10, 4, false);
    replica.sync();
    replica.promise(6);
    rot(&mut replica, 11, version(5, 1));
    let (mut again, report) = Replica::open(replica.disk.cut(Cut::None), told(6, &[])).unwrap();
    assert_eq!(report.damaged_blocks, [11]);
    let told_at_once = ReplicaStore::poll_event(&mut again.store);
    assert!(
        matches!(told_at_once, Some(ReplicaEvent::Damaged(Lba(11)))),
        "{told_at_once:?}"
    );
    again.store.gate(Some(Version::MAX));
    again.now.mends = true;
    again.pass_time(20_000);
    for _ in 0..2 {
        again.store.scrub(ScrubOrder::Start { bytes_per_second: 0 });
        again.settle();
        let thing = again.take(|event| match event {
            Event::Damaged(damage) => Some(damage.thing),
            _ => None,
        });
        let (lba, snapshot) = (Lba(11), None);
        assert_eq!(thing, DamagedThing::Block { lba, snapshot });
    }
}
