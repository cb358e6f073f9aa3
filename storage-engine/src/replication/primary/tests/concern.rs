//! When a write is answered, and which members are enough for it.

use super::super::super::concern::{Concern, Copies};
use super::super::super::timing::{LEASE_MS, MEMBER_TIMEOUT_MS};
use super::super::super::{Change, ReplicaId};
use super::super::Lag;
use super::{Rig, id};
use crate::replication::primary::Decision;
use crate::replication::{Stamp, Zones};
use crate::types::Seq;

fn first_of_three() -> Rig {
    let concern = Concern {
        copies: Copies::First,
        ..Concern::replicated(2)
    };
    Rig::serving_with(&[1, 2, 3], concern)
}

/// The first two stand in one zone, the third in another.
fn zones() -> Zones {
    [(1, "a"), (2, "a"), (3, "b")]
        .map(|(n, zone)| (id(n), zone.to_owned()))
        .into()
}

fn in_two_zones(in_sync: &[u8]) -> Rig {
    let concern = Concern {
        min_zones: 2,
        ..Concern::replicated(1)
    };
    let mut rig = Rig::new_with(in_sync, concern);
    rig.primary.stand(zones());
    rig.serves();
    rig
}

#[test]
fn the_first_copy_answers_a_write_and_the_others_lag() {
    let mut rig = first_of_three();
    rig.silent = vec![id(2), id(3)];
    rig.writes();
    assert_eq!(rig.primary.written(), Seq(1));
    rig.after(100);
    let lag = rig.primary.lag();
    assert_eq!((lag.writes, lag.bytes), (1, 4096));
    assert!((100..200).contains(&lag.ms), "{lag:?}");
    rig.silent.clear();
    rig.after(1_000);
    assert_eq!(rig.primary.lag(), Lag::default());
}

#[test]
fn a_flush_is_answered_by_all_also_where_the_first_copy_answers_writes() {
    let mut rig = first_of_three();
    let durable = rig.primary.durable();
    rig.silent = vec![id(3)];
    rig.writes();
    rig.primary.sync();
    rig.after(500);
    assert_eq!((rig.primary.written(), rig.primary.durable()), (Seq(1), durable));
    rig.silent.clear();
    rig.after(1_000);
    assert_eq!(rig.primary.durable().seq, Seq(1));
}

/// Its own copy would answer for ever, also after somebody else has taken over: the others keep their word to it only for
/// the time of a lease.
#[test]
fn a_primary_that_is_cut_off_with_the_first_copy_completes_nothing_when_its_leases_are_over() {
    let mut rig = first_of_three();
    rig.after(1_000);
    rig.silent = vec![id(2), id(3)];
    rig.after(LEASE_MS + 100);
    rig.writes();
    rig.after(1_000);
    assert_eq!(rig.primary.written(), Seq(0));
    rig.silent.clear();
    rig.after(1_000);
    assert_eq!(rig.primary.written(), Seq(1));
}

#[test]
fn reads_go_to_the_copy_that_has_what_was_answered() {
    let mut rig = first_of_three();
    rig.silent = vec![id(1), id(3)];
    rig.writes();
    assert_eq!(rig.primary.written(), Seq(1));
    let read = |rig: &Rig, n| rig.was_asked(n, |ask| matches!(ask, crate::replication::Ask::Read { .. }));
    rig.primary.read(7, crate::types::Lba(0), 1);
    rig.run();
    assert_eq!((read(&rig, 1), read(&rig, 2), read(&rig, 3)), (0, 1, 0));
}

#[test]
fn writes_wait_while_members_stand_in_too_few_zones() {
    let mut rig = in_two_zones(&[1, 2]);
    rig.writes();
    assert_eq!(rig.primary.written(), Seq(0));
    let waits = rig.primary.waits_for().expect("it waits");
    assert!(waits.contains("stand in fewer than 2 zones"), "{waits}");
    // Somebody found out where the second one stands.
    let mut zones = zones();
    zones.insert(id(2), "c".into());
    rig.primary.stand(zones);
    rig.after(100);
    assert_eq!(rig.primary.written(), Seq(1));
}

#[test]
fn a_member_is_not_left_out_if_the_others_stand_in_one_zone() {
    let mut rig = in_two_zones(&[1, 2, 3]);
    rig.silent = vec![id(3)];
    rig.writes();
    rig.after(2 * MEMBER_TIMEOUT_MS);
    assert_eq!((rig.proposed.len(), rig.primary.written()), (0, Seq(0)));
    let waits = rig.primary.waits_for().expect("it waits");
    assert!(
        waits.contains("the others would stand in fewer than 2 zones"),
        "{waits}"
    );
    // One of the two that stand together may go.
    rig.silent = vec![id(2)];
    rig.after(2 * MEMBER_TIMEOUT_MS);
    let (stamp, config) = rig.proposed.last().expect("it is left out").clone();
    let gone: std::collections::BTreeSet<ReplicaId> = [id(2)].into();
    assert_eq!(config, rig.config().with(&Change::Drop(gone, rig.primary.durable())));
    rig.primary.decided(Decision::Made(Stamp(stamp.0 + 1)));
    rig.run();
    assert_eq!(rig.primary.written(), Seq(1));
}
