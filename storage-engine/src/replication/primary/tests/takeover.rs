//! How far the epochs before went, where what decides it cannot be read.

use super::super::super::concern::Concern;
use super::super::super::message::{Ask, Reply, Row, Rows};
use super::super::super::{Config, ReplicaId};
use super::{Rig, id};
use crate::types::{Epoch, Lba, Seq, Version};

fn of_four(seq: u64) -> Version {
    let (epoch, seq) = (Epoch(4), Seq(seq));
    Version { epoch, seq }
}

/// Epoch 5 begins with replicas that nobody answers for.
fn beginning(replicas: &[u8]) -> Rig {
    let ids = || replicas.iter().map(|n| id(*n));
    let config = Config {
        epoch: Epoch(4),
        ..Config::new(ids())
    };
    let mut rig = Rig::new(config, Concern::replicated(1));
    rig.silent = ids().collect();
    rig.run();
    rig.read_as_it_is();
    rig
}

/// They say how far their logs go.
fn promise(rig: &mut Rig, lasts: &[u64]) {
    promise_agreed(rig, lasts, 0);
}

/// The same, and the first says up to where all had everything on stable storage.
fn promise_agreed(rig: &mut Rig, lasts: &[u64], agreed: u64) {
    for (n, last) in (1..).zip(lasts) {
        let last = of_four(*last);
        let agreed = if n == 1 { of_four(agreed) } else { Version::default() };
        let ends = Vec::new();
        rig.says(n, Reply::Promised { last, ends, agreed });
    }
}

/// All are to cut off what is behind this write, and do.
fn trim(rig: &mut Rig, end: u64) {
    let replicas = rig.silent.len() as u8;
    for n in 1..=replicas {
        let told = rig.asked.iter().rev().find_map(|(to, ask)| match ask {
            Ask::Trim { ends } if *to == id(n) => ends.iter().find(|row| row.covers(Epoch(4))).map(|row| row.end),
            _ => None,
        });
        assert_eq!(told, Some(Seq(end)), "replica {n}");
    }
    for n in 1..=replicas {
        rig.says(n, Reply::Trimmed);
    }
}

fn settle(rig: &mut Rig) {
    for n in 1..=rig.silent.len() as u8 {
        rig.says(n, Reply::Settled);
    }
    assert!(rig.primary.is_serving(), "{:?}", rig.primary);
}

/// What the first has that the others lack: this write of block 0, if any.
fn list(rig: &mut Rig, lacking: Option<u64>) {
    let row = |seq| Row {
        start: Lba(0),
        end: Lba(1),
        version: of_four(seq),
        zero: false,
    };
    let first_has: Vec<Row> = lacking.map(row).into_iter().collect();
    let asked = |(to, ask): &(ReplicaId, Ask)| match ask {
        Ask::Rows { id, .. } => Some((*to, *id)),
        _ => None,
    };
    let lists: Vec<(ReplicaId, u64)> = rig.asked.iter().filter_map(asked).collect();
    rig.asked.clear();
    for (replica, list) in lists {
        let rows = if replica == id(1) {
            first_has.clone()
        } else {
            Vec::new()
        };
        let found = Ok(Rows { rows, next: None });
        rig.says(replica.0[0], Reply::Rows { id: list, found });
    }
}

/// The first is asked for what others lack, and cannot read it.
fn cannot_read(rig: &mut Rig) {
    let read = rig.asked.iter().find_map(|(to, ask)| match ask {
        Ask::Read { id, .. } => Some((*to, *id)),
        _ => None,
    });
    let (from, read) = read.expect("it is to be copied");
    assert_eq!(from, id(1));
    let found = Err("block 0 does not pass its check".to_owned());
    rig.says(1, Reply::Blocks { id: read, found });
}

/// Only the first has writes 6 to 10. It cannot read what 8 wrote; 7 and 8 came in one record.
#[test]
fn what_one_member_alone_has_and_cannot_read_ends_the_epochs_before() {
    let mut rig = beginning(&[1, 2]);
    promise(&mut rig, &[10, 5]);
    trim(&mut rig, 10);
    list(&mut rig, Some(8));
    cannot_read(&mut rig);
    promise(&mut rig, &[10, 5]);
    trim(&mut rig, 7);
    // Its log ends with a record.
    promise(&mut rig, &[6, 5]);
    trim(&mut rig, 6);
    list(&mut rig, None);
    settle(&mut rig);
    assert!(rig.primary.counts(of_four(6)) && !rig.primary.counts(of_four(7)));
    assert_eq!(rig.given_up, [(id(1), of_four(8))]);
}

#[test]
fn what_another_member_has_too_comes_from_there_and_is_not_given_up() {
    let mut rig = beginning(&[1, 2, 3]);
    promise(&mut rig, &[10, 10, 5]);
    trim(&mut rig, 10);
    list(&mut rig, Some(8));
    cannot_read(&mut rig);
    promise(&mut rig, &[10, 10, 5]);
    trim(&mut rig, 10);
    list(&mut rig, None);
    settle(&mut rig);
    assert!(rig.primary.counts(of_four(10)));
    assert_eq!(rig.given_up, []);
}

/// An administrator put its directory back, or its disk lost what it had confirmed.
#[test]
fn a_member_that_lacks_what_it_had_on_stable_storage_does_not_count_and_both_positions_are_named() {
    let mut rig = beginning(&[1, 2]);
    promise_agreed(&mut rig, &[10, 3], 5);
    let waits = rig.primary.waits_for().expect("it waits");
    assert!(
        waits.contains("up to 4.5 on stable storage, and has those up to 4.3"),
        "{waits}"
    );
    rig.after(3_000);
    let (_, config) = rig.proposed.last().expect("it is recorded as out");
    assert_eq!(
        (config.in_sync.contains(&id(1)), config.out.get(&id(2))),
        (true, Some(&of_four(5)))
    );
}

/// The others are out. What is recorded of them says how far all were.
#[test]
fn the_only_member_that_was_put_back_to_an_older_copy_is_not_served_from() {
    let mut config = Config {
        epoch: Epoch(4),
        ..Config::new([id(1)])
    };
    config.out.insert(id(2), of_four(5));
    let mut rig = Rig::new(config, Concern::replicated(1));
    rig.silent = vec![id(1), id(2)];
    rig.run();
    rig.read_as_it_is();
    promise(&mut rig, &[3]);
    rig.after(10_000);
    let waits = rig.primary.waits_for().expect("it waits");
    assert!(waits.contains("up to 4.5") && waits.contains("up to 4.3"), "{waits}");
    assert!(!rig.primary.is_serving() && rig.proposed.is_empty());
}
