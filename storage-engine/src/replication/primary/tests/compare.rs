//! Members are listed against each other.

use super::super::super::ReplicaId;
use super::super::super::message::{Ask, Reply, Row, Rows};
use super::{Rig, id};
use crate::types::{Epoch, Lba, Seq, Version};

const MEMBERS: [u8; 3] = [1, 2, 3];

fn old(start: u64) -> Row {
    Row {
        start: Lba(start),
        end: Lba(start + 1),
        version: Version {
            epoch: Epoch(0),
            seq: Seq(3),
        },
        zero: true,
    }
}

/// Who was listed against whom, and who was copied to.
type Done = (Vec<(ReplicaId, ReplicaId)>, Vec<ReplicaId>);

/// Answers lists with what each has, and copies, until nothing more is asked.
fn answers(rig: &mut Rig, has: impl Fn(ReplicaId) -> Vec<Row>) -> Done {
    let (mut listed, mut copied) = (Vec::new(), Vec::new());
    for _ in 0..100 {
        for (to, ask) in std::mem::take(&mut rig.asked) {
            match ask {
                Ask::Rows { id, .. } => {
                    listed.push(to);
                    let (rows, next) = (has(to), None);
                    let found = Ok(Rows { rows, next });
                    rig.says(to.0[0], Reply::Rows { id, found });
                }
                Ask::Copy { id, .. } => {
                    copied.push(to);
                    rig.says(to.0[0], Reply::Copied { id, done: Ok(()) });
                }
                _ => {}
            }
        }
        rig.after(50);
    }
    let pairs = listed.chunks(2).map(|pair| (pair[0], pair[1]));
    (pairs.collect(), copied)
}

#[test]
fn all_members_are_listed_against_each_other_both_ways() {
    let mut rig = Rig::serving(&MEMBERS, 2);
    rig.primary.compare();
    rig.after(50);
    let (pairs, _) = answers(&mut rig, |_| vec![old(0), old(7)]);
    let expected = [(1, 2), (1, 3), (2, 1), (3, 1)].map(|(one, other)| (id(one), id(other)));
    assert_eq!(pairs, expected);
    assert_eq!((rig.compared, rig.primary.is_comparing()), (vec![Some(0)], false));
}

/// Its disk had confirmed it: what is left is older, whole and valid, and nothing else would notice.
#[test]
fn a_member_that_lost_a_confirmed_write_is_given_it_again() {
    let mut rig = Rig::serving(&MEMBERS, 2);
    rig.primary.compare();
    rig.after(50);
    let third_lacks_one = |replica| match replica == id(3) {
        true => vec![old(0)],
        false => vec![old(0), old(7)],
    };
    let (_, copied) = answers(&mut rig, third_lacks_one);
    assert_eq!(rig.compared, [Some(1)]);
    assert_eq!(copied, [id(3)]);
}

#[test]
fn a_comparison_ends_without_a_result_when_a_member_is_lost_and_takes_nobody_with_it() {
    let mut rig = Rig::serving(&MEMBERS, 2);
    rig.primary.compare();
    rig.after(50);
    rig.after(20_000);
    assert_eq!(rig.compared, [None], "nobody answered");
    assert!(rig.primary.is_serving() && rig.proposed.is_empty());
}
