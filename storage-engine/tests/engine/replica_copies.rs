//! Copies, joins, promises and ends, one by one: what each means, and what it refuses.

use std::collections::BTreeMap;

use galleonfs_storage_engine::request::RequestError;
use galleonfs_storage_engine::store::check::check;
use galleonfs_storage_engine::store::{Copies, Event, OpenError, Row, Rows, Stored, WriteEntry};
use galleonfs_storage_engine::types::{BlockSize, Epoch, Lba, Seq, Version};

use crate::harness::options;
use crate::replica_rig::{Content, Replica, VACANT, assert_check_passes, end, format, told, version};
use crate::sim_disk::Cut;

fn block(lba: u64, at: Version) -> (Lba, Lba, Content) {
    (Lba(lba), Lba(lba + 1), (at, false))
}

fn zeros(start: u64, end: u64, at: Version) -> (Lba, Lba, Content) {
    (Lba(start), Lba(end), (at, true))
}

fn copy_in(replica: &mut Replica, rows: &[(Lba, Lba, Content)]) -> Result<Copies, RequestError> {
    let (token, copies) = (replica.token(), replica.copies(rows));
    replica.store.copy_in(token, copies);
    replica.settle();
    copied(replica, token)
}

fn copied(replica: &mut Replica, token: u64) -> Result<Copies, RequestError> {
    replica.take(|event| match event {
        Event::CopiedIn(found, result) if *found == token => Some(result.clone()),
        _ => None,
    })
}

fn rows(replica: &mut Replica, after: Version, rows_max: usize) -> Vec<Row> {
    let (mut all, mut from) = (Vec::new(), Lba(0));
    loop {
        let token = replica.token();
        replica.store.rows(token, from, after, rows_max);
        replica.settle();
        let Rows { rows, next } = replica.take(|event| match event {
            Event::Rows(found, result) if *found == token => Some(result.clone().unwrap()),
            _ => None,
        });
        assert!(rows.len() <= rows_max);
        all.extend(rows);
        match next {
            Some(next) => {
                assert!(next > from, "it goes on");
                from = next;
            }
            None => return all,
        }
    }
}

#[test]
fn a_new_replica_joins_at_any_epoch_and_takes_copies_of_older_ones() {
    let mut replica = Replica::fresh(500, 17);
    replica.store.join(Seq(900));
    replica.settle();
    assert_eq!(replica.store.last(), version(17, 900));
    let rows = [
        block(3, version(2, 5)),
        zeros(10, 400, version(9, 1)),
        block(450, version(17, 900)),
    ];
    let copies = copy_in(&mut replica, &rows).unwrap();
    assert_eq!((copies.applied, copies.superseded), (392, 0));
    replica.write(901, 3, 1, false);
    let contents = replica.contents();
    assert_eq!(contents[3], (version(17, 901), false));
    assert_eq!(contents[450], (version(17, 900), false));
    assert!(
        contents[10..400]
            .iter()
            .all(|content| *content == (version(9, 1), true))
    );
    replica.sync();
    assert!(replica.store.copies_are_durable());
    let (mut again, report) = Replica::open(replica.disk.cut(Cut::None), told(17, &[])).unwrap();
    assert_eq!((report.cut, again.store.last()), (false, version(17, 901)));
    assert_eq!(again.contents(), contents);
}

#[test]
fn a_copy_never_replaces_what_is_newer_wherever_that_is() {
    let mut replica = Replica::fresh(500, 5);
    replica.store.gate(Some(Version::MAX));
    // In the map, in memory, and on its way to the log.
    replica.write(1, 10, 1, false);
    replica.write(2, 20, 5, true);
    replica.pass_time(20_000);
    replica.write(3, 30, 1, false);
    let (lba, blocks, zero) = (Lba(40), 1, false);
    assert!(replica.append(4, &[WriteEntry { lba, blocks, zero }]));
    let token = replica.token();
    let older = [10, 22, 30, 40, 50].map(|lba| block(lba, version(4, 7)));
    let copies = replica.copies(&older);
    replica.store.copy_in(token, copies);
    replica.settle();
    let copies = copied(&mut replica, token).unwrap();
    assert_eq!((copies.applied, copies.superseded), (1, 4));
    let contents = replica.contents();
    let at = |lba: usize| contents[lba].0;
    assert_eq!(
        [at(10), at(22), at(30), at(40)],
        [1, 2, 3, 4].map(|seq| version(5, seq))
    );
    assert_eq!(at(50), version(4, 7));
}

#[test]
fn the_same_copy_twice_is_taken_once() {
    let mut replica = Replica::fresh(500, 5);
    replica.store.join(Seq(10));
    let rows = [block(3, version(2, 5)), zeros(10, 90, version(2, 6))];
    assert_eq!(copy_in(&mut replica, &rows).unwrap().applied, 81);
    let again = copy_in(&mut replica, &rows).unwrap();
    assert_eq!((again.applied, again.superseded), (0, 81));
    replica.store.gate(Some(Version::MAX));
    replica.pass_time(20_000);
    let again = copy_in(&mut replica, &rows).unwrap();
    assert_eq!(
        (again.applied, again.superseded),
        (0, 81),
        "also when they are in the map"
    );
}

#[test]
fn replicas_that_hold_the_same_have_one_digest_however_they_got_it() {
    let mut streamed = Replica::fresh(500, 5);
    streamed.write(1, 10, 3, false);
    streamed.write(2, 11, 1, false);
    streamed.write(3, 40, 20, true);
    streamed.sync();
    let mut copied = Replica::fresh(500, 5);
    copied.store.join(Seq(3));
    let rows = [(10, 1), (11, 2), (12, 1)].map(|(lba, seq)| block(lba, version(5, seq)));
    assert_eq!(copy_in(&mut copied, &rows).unwrap().applied, 3);
    copied.sync();
    assert_eq!(streamed.store.stats().copied_bytes, 0);
    assert_eq!(copied.store.stats().copied_bytes, 3 * 4096);
    assert_eq!(digest(&copied), digest(&streamed));
    copied.write(4, 12, 1, false);
    copied.sync();
    assert_ne!(digest(&copied), digest(&streamed), "one block has another version");
}

fn digest(replica: &Replica) -> [u8; 32] {
    let report = check(&mut replica.disk.clone()).expect("the replica can be read");
    report.digest.expect("it is whole")
}

#[test]
fn a_copy_that_is_ahead_of_the_stream_is_left_to_the_stream() {
    let mut replica = Replica::fresh(500, 5);
    replica.store.join(Seq(10));
    let copies = copy_in(&mut replica, &[block(3, version(5, 12)), zeros(7, 9, version(5, 11))]).unwrap();
    assert_eq!((copies.applied, copies.superseded), (0, 3));
    replica.write(11, 7, 2, true);
    replica.write(12, 3, 1, false);
    assert_eq!(replica.contents()[3], (version(5, 12), false));
}

#[test]
fn a_tombstone_is_not_undone_by_an_older_copy_and_a_zeroed_range_is_cut_where_blocks_are_newer() {
    let mut replica = Replica::fresh(60_000, 5);
    replica.store.gate(Some(Version::MAX));
    replica.write(1, 0, 60_000, true);
    replica.pass_time(20_000);
    let copies = copy_in(&mut replica, &[block(3, version(4, 9)), block(40_000, version(4, 9))]).unwrap();
    assert_eq!(copies.applied, 0);
    // Newer blocks in the map and in memory, more than one record has room for.
    let mut seq = 2;
    for lba in (0..60_000).step_by(1_000) {
        replica.write(seq, lba, 1, false);
        seq += 1;
        if lba == 30_000 {
            replica.pass_time(20_000);
        }
    }
    replica.promise(6);
    replica.settle_ends(&[end(5, seq - 1)]);
    replica.store.join(Seq(100));
    let newest = replica.contents();
    let copies = copy_in(&mut replica, &[zeros(0, 60_000, version(5, 1))]).unwrap();
    assert_eq!(copies.applied, 0, "it has that");
    replica.page_reads = 0;
    let copies = copy_in(&mut replica, &[zeros(1, 60_000, version(6, 50))]).unwrap();
    assert_eq!((copies.applied, copies.superseded), (59_999, 0));
    assert!(
        replica.page_reads < 20,
        "{} pages for what is older as a whole",
        replica.page_reads
    );
    let contents = replica.contents();
    assert_eq!(contents[0], newest[0]);
    assert!(contents[1..].iter().all(|content| *content == (version(6, 50), true)));
}

#[test]
fn a_zeroed_range_between_many_newer_blocks_takes_the_gaps() {
    let mut replica = Replica::fresh(20_000, 5);
    replica.store.gate(Some(Version::MAX));
    replica.store.join(Seq(10));
    replica.settle();
    for (seq, lba) in (11..).zip((0..20_000).step_by(50)) {
        replica.write(seq, lba, 1, false);
    }
    replica.pass_time(20_000);
    let copies = copy_in(&mut replica, &[zeros(0, 20_000, version(5, 9))]).unwrap();
    assert_eq!((copies.applied, copies.superseded), (19_600, 400));
    let contents = replica.contents();
    for (lba, content) in contents.iter().enumerate() {
        let expected = if lba % 50 == 0 {
            (version(5, 11 + lba as u64 / 50), false)
        } else {
            (version(5, 9), true)
        };
        assert_eq!(*content, expected, "block {lba}");
    }
    replica.pass_time(20_000);
    assert_eq!(replica.contents(), contents, "also when it is in the map");
    assert_check_passes(&replica.disk.kill());
}

#[test]
fn copies_that_are_wrong_or_cannot_be_are_refused_as_a_whole() {
    let mut replica = Replica::fresh(500, 5);
    let good = block(3, version(4, 9));
    let refused = copy_in(&mut replica, &[good, block(9, version(5, 1))]);
    assert!(
        matches!(refused, Err(RequestError::Invalid(_))),
        "of a stream that was not joined: {refused:?}"
    );
    replica.store.join(Seq(10));
    for wrong in [
        vec![good, block(2, version(4, 9))],
        vec![good, good],
        vec![good, block(500, version(4, 9))],
        vec![good, zeros(400, 501, version(4, 9))],
        vec![good, zeros(400, 400, version(4, 9))],
        vec![good, block(9, version(6, 1))],
        vec![good, block(9, Version::default())],
    ] {
        let refused = copy_in(&mut replica, &wrong);
        assert!(
            matches!(refused, Err(RequestError::Invalid(_))),
            "{wrong:?}: {refused:?}"
        );
    }
    let mut copies = replica.copies(&[good, block(9, version(4, 9))]);
    if let Stored::Block(block) = &mut copies[1] {
        block.version.seq = Seq(8); // an old one under a newer number, or the other way round
    }
    let token = replica.token();
    replica.store.copy_in(token, copies);
    replica.settle();
    assert!(matches!(copied(&mut replica, token), Err(RequestError::Corrupt(_))));
    assert_eq!(
        replica.contents(),
        vec![VACANT; 500],
        "nothing of any of them was taken"
    );
}

#[test]
fn a_promise_is_durable_when_it_is_reported_and_fences_at_once() {
    let mut replica = Replica::fresh(500, 5);
    replica.write(1, 3, 1, false);
    replica.store.promise(Epoch(8), &[]);
    replica.poll();
    while !replica.events.iter().any(|event| matches!(event, Event::Promised(_))) {
        assert!(replica.store.is_promising());
        assert_eq!(replica.store.epoch(), Epoch(5));
        replica.complete(0);
    }
    for cut in [Cut::None, Cut::All, Cut::Random(7)] {
        let lower = Replica::open(replica.disk_in_flight().cut(cut), told(7, &[]));
        assert!(matches!(lower, Err(OpenError::Fenced { promised: 8, asked: 7 })));
        let (mut again, _) = Replica::open(replica.disk_in_flight().cut(cut), told(8, &[])).unwrap();
        assert_eq!(again.store.last(), version(5, 1), "a promise makes the log durable");
        assert_eq!(again.contents()[3], (version(5, 1), false));
    }
    assert_eq!(replica.store.epoch(), Epoch(8));
}

#[test]
#[should_panic(expected = "the epoch is being raised")]
fn a_write_of_the_old_epoch_behind_a_promise_is_a_mistake() {
    let mut replica = Replica::fresh(500, 5);
    replica.store.promise(Epoch(8), &[]);
    let (lba, blocks, zero) = (Lba(3), 1, false);
    replica.append(1, &[WriteEntry { lba, blocks, zero }]);
}

#[test]
#[should_panic(expected = "may be behind the end of its epoch")]
fn an_epoch_does_not_begin_before_the_one_before_it_is_settled() {
    let mut replica = Replica::fresh(500, 5);
    replica.write(1, 3, 1, false);
    replica.promise(6);
    replica.store.join(Seq(0));
}

#[test]
fn promises_and_ends_take_their_turns_with_a_checkpoint() {
    let mut replica = Replica::fresh(500, 5);
    replica.store.gate(Some(Version::MAX));

    for round in 0..12u32 {
        for n in 0..40 {
            replica.write(n + 1, (u64::from(round) * 7 + n * 11) % 500, 1, false);
        }
        // A checkpoint is due: let it come to some point, then promise.
        replica.now_ms += 20_000;
        replica.store.tick(replica.now_ms);
        replica.poll();
        for _ in 0..round {
            if !replica.outstanding.is_empty() {
                replica.complete(0);
            }
        }
        let epoch = 5 + round;
        replica.store.promise(Epoch(epoch + 1), &[]);
        replica.store.settle(&[end(epoch, 40)]);
        replica.settle();
        let ends: Vec<_> = (5..=epoch).map(|epoch| end(epoch, 40)).collect();
        assert_eq!(replica.store.epoch_ends(), ends);
        let contents = replica.contents();
        let (mut again, _) = Replica::open(replica.disk.cut(Cut::None), told(epoch + 1, &[])).unwrap();
        assert_eq!(again.contents(), contents);
        assert_eq!(again.store.epoch_ends(), ends);
        assert_check_passes(&replica.disk.kill());
    }
}

#[test]
fn what_is_behind_the_end_of_its_epoch_is_dropped_and_everything_before_is_kept() {
    let mut replica = Replica::fresh(500, 5);
    for seq in 1..=6 {
        replica.write(seq, seq, 1, false);
    }
    // One record of several writes is cut in the middle.
    let write = |lba| WriteEntry {
        lba: Lba(lba),
        blocks: 2,
        zero: false,
    };
    assert!(replica.append(7, &[write(7), write(9), write(11)]));
    replica.settle();
    replica.sync();
    replica.pass_time(100_000);
    assert_eq!(replica.store.gate_wanted(), Some(version(5, 9)), "a checkpoint waits");
    for last in 0..=9 {
        let mut disk = replica.disk.cut(Cut::None);
        for round in 0..2 {
            let (mut again, report) = Replica::open(disk, told(6 + round, &[end(5, last)])).unwrap();
            assert_eq!(
                (report.cut, again.store.last()),
                (last < 9, version(5, last).max_of_epoch()),
                "{last}"
            );
            let ends = BTreeMap::from([(5, last)]);
            assert_eq!(again.contents(), replica.state(&ends).blocks, "end {last}");
            disk = again.disk.cut(Cut::None);
        }
        // The next epoch takes the place of what was cut.
        let (mut again, _) = Replica::open(disk, told(8, &[])).unwrap();
        again.write(1, 400, 1, false);
        let contents = again.contents();
        again.sync();
        let (mut once_more, _) = Replica::open(again.disk.cut(Cut::None), told(9, &[])).unwrap();
        assert_eq!(once_more.contents(), contents);
        assert_check_passes(&once_more.disk.kill());
    }
}

trait MaxOfEpoch {
    fn max_of_epoch(self) -> Self;
}

impl MaxOfEpoch for Version {
    /// Nothing of an epoch is no version of it.
    fn max_of_epoch(self) -> Version {
        if self.seq == Seq(0) { Version::default() } else { self }
    }
}

#[test]
fn copies_of_writes_that_never_happened_are_dropped() {
    let mut replica = Replica::fresh(500, 6);
    replica.store.join(Seq(0));
    copy_in(
        &mut replica,
        &[
            block(3, version(5, 8)),
            block(4, version(5, 9)),
            zeros(7, 9, version(5, 9)),
        ],
    )
    .unwrap();
    replica.sync();
    let disk = replica.disk.cut(Cut::None);
    let (mut again, report) = Replica::open(disk, told(6, &[end(5, 8)])).unwrap();
    assert!(report.cut);
    let contents = again.contents();
    assert_eq!(
        [contents[3], contents[4], contents[7]],
        [(version(5, 8), false), VACANT, VACANT]
    );
}

#[test]
fn copies_that_wait_while_an_epoch_ends_are_held_against_its_end() {
    let mut replica = Replica::fresh(500, 5);
    replica.write(1, 3, 1, false);
    let (token, copies) = (
        replica.token(),
        replica.copies(&[block(4, version(5, 7)), block(5, version(5, 8))]),
    );
    // One that is not there yet is ahead of the stream, and so left to it; but the stream ends.
    replica.store.promise(Epoch(6), &[]);
    replica.store.copy_in(token, copies);
    replica.store.settle(&[end(5, 7)]);
    replica.settle();
    let copies = copied(&mut replica, token).unwrap();
    assert_eq!((copies.applied, copies.superseded), (1, 1));
    let contents = replica.contents();
    assert_eq!([contents[4], contents[5]], [(version(5, 7), false), VACANT]);
}

#[test]
fn a_checkpoint_waits_for_the_gate_and_a_settled_end_is_no_proof() {
    let mut replica = Replica::fresh(500, 5);
    replica.write(1, 3, 1, false);
    replica.pass_time(100_000);
    assert_eq!(replica.store.stats().checkpoints, 0);
    assert_eq!(replica.store.gate_wanted(), Some(version(5, 1)));
    replica.store.gate(Some(version(5, 1)));
    replica.settle();
    assert_eq!(
        (replica.store.stats().checkpoints, replica.store.gate_wanted()),
        (1, None)
    );
    replica.write(2, 4, 1, false);
    replica.pass_time(100_000);
    assert_eq!(replica.store.stats().checkpoints, 1);
    replica.promise(6);
    replica.settle_ends(&[end(5, 2)]);
    assert_eq!(
        replica.store.stats().checkpoints,
        1,
        "the epoch that settled it may never begin"
    );
    assert_eq!(replica.store.gate_wanted(), Some(version(5, 2)));
    replica.store.gate(Some(version(6, 0)));
    replica.settle();
    assert_eq!(replica.store.stats().checkpoints, 2);
    // What a checkpoint holds cannot be dropped any more; it would be a mistake of the others to want that.
    let diverged = Replica::open(replica.disk.kill(), told(6, &[end(5, 1)]));
    assert!(matches!(diverged, Err(OpenError::Diverged(_))));
}

#[test]
fn a_replica_is_closed_although_its_gate_is_shut() {
    let mut replica = Replica::fresh(500, 5);
    replica.write(1, 3, 1, false);
    replica.store.close();
    replica.settle();
    assert!(replica.store.is_closed());
    let (mut again, _) = Replica::open(replica.disk.kill(), told(5, &[end(4, 0)])).unwrap();
    assert_eq!(again.contents()[3], (version(5, 1), false));
    let (mut cut, _) = Replica::open(replica.disk.kill(), told(6, &[end(5, 0)])).unwrap();
    assert_eq!(cut.contents()[3], VACANT, "closing made nothing irrevocable");
}

#[test]
fn an_end_that_was_settled_gives_way_to_what_is_told_at_opening_as_long_as_the_log_can_be_cut() {
    let mut replica = Replica::fresh(500, 5);
    replica.write(1, 3, 1, false);
    replica.write(2, 4, 1, false);
    replica.promise(6);
    assert_eq!(replica.store.beyond(&[end(5, 1)]), Some(version(5, 2)));
    replica.settle_ends(&[end(5, 7)]);
    // Who settled that was gone before the epoch began. The next one knew less.
    let (mut other, report) = Replica::open(replica.disk.kill(), told(7, &[end(5, 1), end(6, 0)])).unwrap();
    assert!(report.cut);
    let contents = other.contents();
    assert_eq!([contents[3], contents[4]], [(version(5, 1), false), VACANT]);
    assert_eq!(other.store.epoch_ends(), [end(5, 1), end(6, 0)]);
    // Others settled further than this log goes. That is no damage, also not to somebody who checks it.
    assert_check_passes(&replica.disk.kill());
    let (again, report) = Replica::open(replica.disk.kill(), told(6, &[end(5, 7)])).unwrap();
    assert_eq!((report.cut, again.store.last()), (false, version(5, 2)));
}

#[test]
#[should_panic(expected = "the end of an epoch never changes")]
fn an_open_store_does_not_change_its_mind_about_an_end() {
    let mut replica = Replica::fresh(500, 5);
    replica.promise(6);
    replica.settle_ends(&[end(5, 7)]);
    replica.store.settle(&[end(5, 8)]);
}

#[test]
fn a_volume_that_lost_its_other_replicas_lives_on_by_itself() {
    let mut replica = Replica::fresh(500, 5);
    replica.write(1, 3, 1, false);
    replica.promise(6);
    replica.settle_ends(&[end(5, 7)]);
    let mut disk = replica.disk.kill();
    for epoch in 7..10 {
        let (mut own, _) = Replica::open(disk, options(epoch)).unwrap();
        assert_eq!(own.contents()[3], (version(5, 1), false));
        own.write(1, 100 + u64::from(epoch), 1, false);
        if epoch == 8 {
            own.pass_time(100_000);
            assert!(own.store.stats().checkpoints > 0, "nobody else is asked");
        }
        disk = own.disk.kill();
        assert_check_passes(&disk);
    }
}

#[test]
fn what_changed_since_a_version_is_found_exactly_and_costs_what_changed() {
    let blocks = 1 << 22;
    let mut replica = Replica::fresh(blocks, 5);
    replica.store.gate(Some(Version::MAX));
    let mut seq = 0;
    let mut write = |replica: &mut Replica, lba: u64, blocks: u32, zero: bool| {
        seq += 1;
        replica.write(seq, lba, blocks, zero);
    };
    for n in 0..800 {
        write(&mut replica, n * 5_000, 1, false);
    }
    replica.pass_time(100_000);
    write(&mut replica, 1_000_000, 1, false);
    write(&mut replica, 2_000_000, 500_000, true);
    replica.pass_time(100_000);
    write(&mut replica, 2_100_000, 1, false);
    write(&mut replica, 17, 3, false);
    let row = |start: u64, end: u64, seq: u64, zero| Row {
        start: Lba(start),
        end: Lba(end),
        version: version(5, seq),
        zero,
    };
    let expected = [
        row(17, 18, 804, false),
        row(18, 19, 804, false),
        row(19, 20, 804, false),
        row(1_000_000, 1_000_001, 801, false),
        row(2_000_000, 2_100_000, 802, true),
        row(2_100_000, 2_100_001, 803, false),
        row(2_100_001, 2_500_000, 802, true),
    ];
    for rows_max in [1, 2, 100] {
        replica.page_reads = 0;
        assert_eq!(
            rows(&mut replica, version(5, 800), rows_max),
            expected,
            "{rows_max} at a time"
        );
        assert!(
            replica.page_reads < 60,
            "{} pages were read for 7 rows",
            replica.page_reads
        );
    }
    assert_eq!(rows(&mut replica, version(5, 804), 100), []);
    let all = rows(&mut replica, Version::default(), 100);
    // The zeroed range took 100 of the scattered blocks, one of which was overwritten elsewhere.
    assert_eq!(all.len(), 800 - 100 - 1 + 7);
}

#[test]
fn a_replica_that_takes_rows_and_copies_from_another_becomes_like_it() {
    for block_size in [BlockSize::K4, BlockSize::K16] {
        let (mut source, _) = Replica::open(format(3_000, block_size), told(5, &[])).unwrap();
        source.store.gate(Some(Version::MAX));
        for seq in 1..=300 {
            source.write(seq, seq * 37 % 2_900, 1 + (seq % 3) as u32, seq % 7 == 0);
            if seq % 100 == 0 {
                source.pass_time(20_000);
            }
        }
        let disk = crate::replica_rig::format_as(3_000, block_size, 77);
        let (mut target, _) = Replica::open(disk, told(5, &[])).unwrap();
        target.store.join(Seq(300));
        for row in rows(&mut source, Version::default(), 50) {
            let token = source.token();
            source.store.read_stored(token, row.start, row.end.0 - row.start.0);
            source.settle();
            let stored = source.take(|event| match event {
                Event::Stored(found, result) if *found == token => Some(result.clone().unwrap()),
                _ => None,
            });
            target.store.copy_in(token, stored);
            target.settle();
            copied(&mut target, token).unwrap();
        }
        assert_eq!(target.contents(), source.contents());
        target.sync();
        assert!(target.store.copies_are_durable());
        let (mut target, _) = Replica::open(target.disk.cut(Cut::None), told(5, &[])).unwrap();
        assert_eq!(target.contents(), source.contents());
    }
}
