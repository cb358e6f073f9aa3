use super::*;
use crate::fixtures::{deleting, pool, replica, reserved, settled, volume};
use galleonfs_api::{
    MediaType, condition, condition_type, reason,
    size::{GIB, MIB, reserved_bytes},
};

const ROOM_FOR_ONE: i64 = 2 * GIB;

fn wish<'a>(selector: &'a PoolSelector, topology: &'a TopologyWish) -> Wish<'a> {
    Wish {
        size_bytes: GIB,
        selector,
        topology,
        volume_uid: None,
        avoid: &[],
        replicas: 1,
        taken: &[],
        barred: &[],
        min_zones: 1,
        replacing: false,
    }
}

fn well(_: &str) -> Standing {
    Standing::default()
}

fn choose<'a>(
    pools: &'a [StoragePool],
    replicas: &[GalleonReplica],
    standing: impl Fn(&str) -> Standing,
    wish: &Wish<'_>,
) -> Result<&'a StoragePool> {
    choose_all(pools, replicas, standing, wish).map(|chosen| chosen[0])
}

fn chosen(pools: &[StoragePool], replicas: &[GalleonReplica], wish: &Wish<'_>) -> Result<String> {
    choose(pools, replicas, well, wish).map(|pool| pool.spec.node_name.clone())
}

fn nodes(
    pools: &[StoragePool],
    replicas: &[GalleonReplica],
    standing: impl Fn(&str) -> Standing,
    wish: &Wish<'_>,
) -> Result<Vec<String>> {
    let chosen = choose_all(pools, replicas, standing, wish)?;
    Ok(chosen.iter().map(|pool| pool.spec.node_name.clone()).collect())
}

/// A node's name begins with its zone.
fn zoned(node: &str) -> Standing {
    Standing {
        trouble: None,
        since: None,
        zone: node.split_once('-').map(|(zone, _)| zone.to_string()),
    }
}

fn only(node: &str) -> TopologyWish {
    TopologyWish {
        requisite: Some(vec![node.to_string()]),
        preferred: vec![node.to_string()],
    }
}

#[test]
fn without_a_wish_the_emptiest_pool_wins() {
    let pools = [pool("a", 10 * GIB), pool("b", 12 * GIB), pool("c", 11 * GIB)];
    let (anything, anywhere) = (PoolSelector::default(), TopologyWish::default());
    assert_eq!(chosen(&pools, &[], &wish(&anything, &anywhere)).expect("room"), "b");
    let replicas = [replica("v", "b", 3 * GIB)];
    assert_eq!(
        chosen(&pools, &replicas, &wish(&anything, &anywhere)).expect("room"),
        "c"
    );
}

#[test]
fn the_first_preferred_node_with_room_wins() {
    let pools = [pool("a", 10 * GIB), pool("b", ROOM_FOR_ONE), pool("c", GIB)];
    let topology = TopologyWish {
        requisite: None,
        preferred: vec!["c".into(), "b".into(), "a".into()],
    };
    assert_eq!(
        chosen(&pools, &[], &wish(&PoolSelector::default(), &topology)).expect("room"),
        "b"
    );
}

#[test]
fn a_node_outside_the_requisite_topology_is_never_chosen() {
    let pools = [pool("a", 100 * GIB), pool("b", GIB)];
    let error = chosen(&pools, &[], &wish(&PoolSelector::default(), &only("b"))).expect_err("b is full");
    assert_eq!(error.kind, Kind::NoRoom);
    assert!(!error.text.contains("default.a"), "{}", error.text);
}

#[test]
fn a_refusal_names_pools_and_figures() {
    let mut sick = pool("b", 50 * GIB);
    let why = condition::Condition::new(
        condition_type::READY,
        false,
        reason::PATH_MISSING,
        "/mnt/b does not exist",
    );
    condition::set(&mut sick.status.as_mut().expect("a status").conditions, why);
    let pools = [pool("a", GIB), sick];
    let (anything, anywhere) = (PoolSelector::default(), TopologyWish::default());
    let text = chosen(&pools, &[], &wish(&anything, &anywhere))
        .expect_err("no room")
        .text;
    for part in [
        "1 GiB",
        "default.a has 1 GiB free of 1 GiB",
        "default.b is not ready (PathMissing: /mnt/b does not exist)",
    ] {
        assert!(text.contains(part), "{text:?} lacks {part:?}");
    }
    let text = chosen(&[], &[], &wish(&anything, &anywhere))
        .expect_err("no pools")
        .text;
    assert!(text.contains("there is no StoragePool"), "{text}");
    let text = chosen(&pools, &[], &wish(&anything, &only("z")))
        .expect_err("nothing there")
        .text;
    assert!(text.contains("is on node z"), "{text}");
}

#[test]
fn a_refusal_begins_with_the_pools_that_the_class_means() {
    let many = ["a", "b", "c", "d", "e", "f", "g", "h", "i"].map(|node| pool(node, 10 * GIB));
    let mut small = pool("z", GIB);
    small.spec.pool = "archive".to_string();
    small.metadata.name = Some("archive.z".to_string());
    let named = PoolSelector {
        media: None,
        name: Some("archive".to_string()),
    };
    let pools = [&many[..], &[small]].concat();
    let text = chosen(&pools, &[], &wish(&named, &TopologyWish::default()))
        .expect_err("it is too small")
        .text;
    assert!(
        text.contains(": archive.z has 1 GiB free of 1 GiB; default.a is not of pool archive;"),
        "{text}"
    );
    assert!(text.ends_with("; and 2 more"), "{text}");
}

#[test]
fn the_class_narrows_down_the_pools() {
    let mut disk = pool("b", 10 * GIB);
    disk.spec.media = MediaType::Hdd;
    let pools = [pool("a", 100 * GIB), disk];
    let anywhere = TopologyWish::default();
    let hdd = PoolSelector {
        media: Some(MediaType::Hdd),
        name: None,
    };
    assert_eq!(chosen(&pools, &[], &wish(&hdd, &anywhere)).expect("room"), "b");
    let named = PoolSelector {
        media: None,
        name: Some("fast".to_string()),
    };
    let text = chosen(&pools, &[], &wish(&named, &anywhere))
        .expect_err("no such pool")
        .text;
    assert!(text.contains("is not of pool fast"), "{text}");
}

#[test]
fn a_node_in_trouble_or_a_pool_being_deleted_gets_nothing_new() {
    let pools = [
        pool("a", 100 * GIB),
        pool("b", ROOM_FOR_ONE),
        deleting(pool("c", 100 * GIB)),
    ];
    let (anything, anywhere) = (PoolSelector::default(), TopologyWish::default());
    let trouble = |node: &str| Standing {
        trouble: (node == "a").then(|| "is not ready".to_string()),
        since: None,
        zone: None,
    };
    let chosen = choose(&pools, &[], trouble, &wish(&anything, &anywhere)).expect("room on b");
    assert_eq!(chosen.spec.node_name, "b");
}

#[test]
fn a_promise_counts_once_whether_it_is_a_reservation_a_replica_or_both() {
    let bytes = reserved_bytes(GIB);
    let replicas = [replica("v", "a", GIB)];
    assert_eq!(free_bytes(&pool("a", 10 * GIB), &replicas, None), 10 * GIB - bytes);
    assert_eq!(
        free_bytes(&reserved(pool("a", 10 * GIB), "v", bytes), &[], None),
        10 * GIB - bytes
    );
    assert_eq!(
        free_bytes(&reserved(pool("a", 10 * GIB), "v", bytes), &replicas, None),
        10 * GIB - bytes
    );
    assert_eq!(
        free_bytes(&reserved(pool("a", 10 * GIB), "v", bytes), &replicas, Some("v")),
        10 * GIB
    );
    assert_eq!(
        free_bytes(&pool("a", MIB), &replicas, None),
        0,
        "never less than nothing"
    );
}

#[test]
fn two_claims_cannot_both_win_the_last_gigabyte() {
    let bytes = reserved_bytes(GIB);
    let pools = [pool("a", bytes)];
    let (anything, anywhere) = (PoolSelector::default(), TopologyWish::default());
    let winner = choose(&pools, &[], well, &wish(&anything, &anywhere)).expect("room for one");
    let written = reserve(winner, &[], "first", "first", bytes).expect("something to write");
    // The second controller either read before that write, and its own is refused, or after it, and sees this:
    let error = chosen(&[written], &[], &wish(&anything, &anywhere)).expect_err("it is gone");
    assert_eq!(error.kind, Kind::NoRoom);
}

#[test]
fn a_half_made_volume_goes_where_its_reservation_is() {
    let bytes = reserved_bytes(GIB);
    let pools = [pool("a", 100 * GIB), reserved(pool("b", bytes), "v", bytes)];
    let (anything, anywhere) = (PoolSelector::default(), TopologyWish::default());
    let asked = Wish {
        volume_uid: Some("v"),
        ..wish(&anything, &anywhere)
    };
    assert_eq!(chosen(&pools, &[], &asked).expect("its own room"), "b");
    assert!(
        reserve(&pools[1], &[], "v", "v", bytes).is_none(),
        "nothing to write again"
    );
    // Where the request no longer allows that place, it does not hold the volume back.
    let topology = only("a");
    let moved = Wish {
        topology: &topology,
        ..asked
    };
    assert_eq!(chosen(&pools, &[], &moved).expect("room"), "a");
}

#[test]
fn a_pool_where_it_failed_before_is_the_last_resort() {
    let pools = [pool("a", 100 * GIB), pool("b", 10 * GIB)];
    let (anything, anywhere) = (PoolSelector::default(), TopologyWish::default());
    let avoid = ["default.a".to_string()];
    let asked = Wish {
        avoid: &avoid,
        ..wish(&anything, &anywhere)
    };
    assert_eq!(chosen(&pools, &[], &asked).expect("room"), "b");
    assert_eq!(chosen(&pools[..1], &[], &asked).expect("room"), "a");
}

#[test]
fn reserving_drops_what_replicas_have_taken_over() {
    let bytes = reserved_bytes(GIB);
    let pool = reserved(reserved(pool("a", 100 * GIB), "made", bytes), "coming", bytes);
    let written = reserve(&pool, &[replica("made", "a", GIB)], "new", "new", bytes).expect("something to write");
    let names: Vec<String> = written.status.expect("a status").reservations.into_keys().collect();
    assert_eq!(names, ["coming", "new"]);
}

#[test]
fn growing_reserves_the_whole_new_size_and_only_that() {
    let replicas = [replica("v", "a", GIB)];
    let pool = pool("a", reserved_bytes(3 * GIB));
    let written = reserve(&pool, &replicas, "v", "v", reserved_bytes(3 * GIB)).expect("something to write");
    assert_eq!(free_bytes(&written, &replicas, None), 0);
    assert!(
        reserve(&pool, &replicas, "v", "v", reserved_bytes(GIB)).is_none(),
        "the replica holds that already"
    );
}

#[test]
fn a_reservation_is_stale_when_its_volume_is_gone_or_complete_elsewhere() {
    let pool = reserved(pool("a", 10 * GIB), "v", GIB);
    assert!(is_stale(&pool, "v", None, &[]));
    assert!(is_stale(&pool, "v", Some(&volume("of-another-uid")), &[]));
    assert!(
        !is_stale(&pool, "v", Some(&volume("v")), &[]),
        "its replica may be about to be made"
    );
    assert!(!is_stale(
        &pool,
        "v",
        Some(&settled(volume("v"), &["v-a"])),
        &[replica("v", "a", GIB)]
    ));
    assert!(is_stale(
        &pool,
        "v",
        Some(&settled(volume("v"), &["v-b"])),
        &[replica("v", "b", GIB)]
    ));
}

#[test]
fn capacity_is_what_create_would_accept() {
    let pools = [pool("a", 10 * GIB), pool("b", 5 * GIB), pool("c", 10 * MIB)];
    let replicas = [replica("v", "a", GIB)];
    let anything = PoolSelector::default();
    let all = room(&pools, &replicas, well, &anything, 1, None);
    let at_b = room(&pools, &replicas, well, &anything, 1, Some("b"));
    assert_eq!(at_b.available_bytes, at_b.largest_bytes);
    assert!(all.largest_bytes > at_b.largest_bytes && all.available_bytes == all.largest_bytes + at_b.largest_bytes);
    assert_eq!(
        room(&pools, &replicas, well, &anything, 1, Some("nowhere")),
        Room::default()
    );

    let anywhere = TopologyWish::default();
    let largest = Wish {
        size_bytes: all.largest_bytes,
        ..wish(&anything, &anywhere)
    };
    assert!(chosen(&pools, &replicas, &largest).is_ok());
}

#[test]
fn replicas_go_to_different_nodes_and_the_first_to_the_preferred_one() {
    let pools = [
        pool("a", 10 * GIB),
        pool("b", 20 * GIB),
        pool("c", 30 * GIB),
        pool("d", 40 * GIB),
    ];
    let anything = PoolSelector::default();
    // The scheduler's choice, in the strict form: for a volume that is used from everywhere it is no more than a wish.
    let topology = only("a");
    let three = Wish {
        replicas: 3,
        ..wish(&anything, &topology)
    };
    assert_eq!(nodes(&pools, &[], well, &three).expect("room"), ["a", "d", "c"]);
    let full = [
        pool("a", MIB),
        pool("b", 20 * GIB),
        pool("c", 30 * GIB),
        pool("d", 40 * GIB),
    ];
    assert_eq!(
        nodes(&full, &[], well, &three).expect("room elsewhere"),
        ["d", "c", "b"]
    );
    let mut second = pool("d", 50 * GIB);
    second.metadata.name = Some("second.d".to_string());
    let two_on_d = [pool("d", 40 * GIB), second];
    assert!(
        nodes(&two_on_d, &[], well, &three).is_err(),
        "two pools are not two nodes"
    );
    let taken = ["d".to_string(), "a".to_string()];
    let last = Wish { taken: &taken, ..three };
    assert_eq!(nodes(&pools, &[], well, &last).expect("one more"), ["c"]);
}

#[test]
fn replicas_are_spread_over_as_many_zones_as_there_are() {
    let pools = [
        pool("x-1", 90 * GIB),
        pool("x-2", 80 * GIB),
        pool("x-3", 70 * GIB),
        pool("y-1", 20 * GIB),
        pool("z-1", 10 * GIB),
    ];
    let (anything, anywhere) = (PoolSelector::default(), TopologyWish::default());
    let asked = |replicas| Wish {
        replicas,
        ..wish(&anything, &anywhere)
    };
    let placed = |replicas| nodes(&pools, &[], zoned, &asked(replicas)).expect("room");
    assert_eq!(placed(3), ["x-1", "y-1", "z-1"]);
    assert_eq!(placed(5), ["x-1", "y-1", "z-1", "x-2", "x-3"]);
    let two_zones = nodes(&pools[..4], &[], zoned, &asked(3)).expect("room");
    assert_eq!(two_zones, ["x-1", "y-1", "x-2"], "as evenly as it can be");
    let taken = ["y-1".to_string(), "x-1".to_string()];
    let replacement = Wish {
        taken: &taken,
        ..asked(3)
    };
    assert_eq!(nodes(&pools, &[], zoned, &replacement).expect("room"), ["z-1"]);
}

#[test]
fn replicas_that_must_stand_in_two_zones_do_or_nothing_is_chosen() {
    // Nodes without a zone have the most room.
    let pools = [
        pool("bare1", 90 * GIB),
        pool("bare2", 90 * GIB),
        pool("x-1", 30 * GIB),
        pool("x-2", 20 * GIB),
        pool("y-1", 10 * GIB),
    ];
    let (anything, anywhere) = (PoolSelector::default(), TopologyWish::default());
    let asked = |replicas| Wish {
        replicas,
        min_zones: 2,
        ..wish(&anything, &anywhere)
    };
    let zoned = |node: &str| zoned(node);
    assert_eq!(nodes(&pools, &[], zoned, &asked(2)).expect("two zones"), ["x-1", "y-1"]);
    let three = nodes(&pools, &[], zoned, &asked(3)).expect("two zones");
    assert_eq!(three, ["x-1", "y-1", "x-2"], "no node without a zone before the others");
    let error = nodes(&pools[..4], &[], zoned, &asked(2)).expect_err("one zone");
    assert_eq!(error.kind, Kind::NoRoom);
    assert!(
        error.text.contains("the only zone that any of them names is x"),
        "{}",
        error.text
    );
    let error = nodes(&pools[..2], &[], zoned, &asked(2)).expect_err("no zone");
    assert!(error.text.contains("none of them says in which zone"), "{}", error.text);
    // The one in the other zone is lost: another one beside the others would not do.
    let taken = ["x-1".to_string(), "x-2".to_string()];
    let again = Wish {
        taken: &taken,
        ..asked(3)
    };
    assert_eq!(nodes(&pools, &[], zoned, &again).expect("the other zone"), ["y-1"]);
    assert!(nodes(&pools[..4], &[], zoned, &again).is_err());
}

#[test]
fn where_there_are_too_few_nodes_nothing_is_chosen_and_each_refusal_is_named() {
    let pools = [pool("a", 10 * GIB), pool("b", GIB), pool("c", 10 * GIB)];
    let (anything, anywhere) = (PoolSelector::default(), TopologyWish::default());
    let three = Wish {
        replicas: 3,
        ..wish(&anything, &anywhere)
    };
    let sick = |node: &str| Standing {
        trouble: (node == "c").then(|| "is not ready".to_string()),
        since: None,
        zone: None,
    };
    let error = nodes(&pools, &[], sick, &three).expect_err("one is full, one is sick");
    assert_eq!(error.kind, Kind::NoRoom);
    for part in [
        "3 replicas need 3 nodes with room for 1 GiB (",
        "beside a there is no other: ",
        "default.b has 1 GiB free of 1 GiB",
        "default.c is on node c which is not ready",
    ] {
        assert!(error.text.contains(part), "{:?} lacks {part:?}", error.text);
    }
    let text = nodes(&pools[..1], &[], well, &three).expect_err("one node").text;
    assert!(
        text.contains("beside a there is no other: all 1 StoragePools are on these nodes"),
        "{text}"
    );
}

#[test]
fn half_made_replicas_are_finished_where_their_reservations_are() {
    let bytes = reserved_bytes(GIB);
    let pools = [
        pool("a", 100 * GIB),
        pool("b", 90 * GIB),
        reserved(pool("c", bytes), "v", bytes),
        reserved(pool("d", bytes), "v", bytes),
    ];
    let (anything, anywhere) = (PoolSelector::default(), TopologyWish::default());
    let asked = Wish {
        volume_uid: Some("v"),
        replicas: 3,
        ..wish(&anything, &anywhere)
    };
    assert_eq!(nodes(&pools, &[], well, &asked).expect("room"), ["c", "d", "a"]);
}

#[test]
fn capacity_for_several_replicas_is_what_that_many_nodes_have() {
    let pools = [pool("a", 100 * GIB), pool("b", 20 * GIB), pool("c", 10 * GIB)];
    let anything = PoolSelector::default();
    let largest = |bytes: i64| size::largest_volume(bytes);
    let three = room(&pools, &[], well, &anything, 3, None);
    assert_eq!(three.largest_bytes, largest(10 * GIB));
    assert_eq!(
        three.available_bytes,
        largest(10 * GIB),
        "each volume takes some of the smallest"
    );
    let two = room(&pools, &[], well, &anything, 2, None);
    assert_eq!(two.largest_bytes, largest(20 * GIB));
    assert_eq!(
        two.available_bytes,
        largest(20 * GIB) + largest(10 * GIB),
        "one replica of each is on the large node"
    );
    assert_eq!(room(&pools, &[], well, &anything, 4, None), Room::default());
    // It can be used from everywhere, also where there is no pool at all.
    assert_eq!(room(&pools, &[], well, &anything, 2, Some("nowhere")), two);

    let anywhere = TopologyWish::default();
    let fits = Wish {
        size_bytes: two.largest_bytes,
        replicas: 2,
        ..wish(&anything, &anywhere)
    };
    assert!(choose_all(&pools, &[], well, &fits).is_ok());
}

#[test]
fn a_replacement_goes_where_none_was_and_no_node_is_given_many_at_once() {
    let pools = [
        pool("a", 10 * GIB),
        pool("b", 90 * GIB),
        pool("c", 80 * GIB),
        pool("d", 20 * GIB),
    ];
    let (anything, anywhere) = (PoolSelector::default(), TopologyWish::default());
    let (taken, barred) = (["a".to_string()], ["b".to_string()]);
    let asked = Wish {
        replicas: 2,
        taken: &taken,
        barred: &barred,
        replacing: true,
        ..wish(&anything, &anywhere)
    };
    assert_eq!(nodes(&pools, &[], well, &asked).expect("room"), ["c"]);
    let filled: Vec<GalleonReplica> = ["w", "x"]
        .map(|uid| {
            let mut replica = replica(uid, "c", GIB);
            replica
                .annotations_mut()
                .insert(ANNOTATION_REPLACES.to_string(), "another".to_string());
            replica
        })
        .into();
    assert_eq!(nodes(&pools, &filled[..1], well, &asked).expect("one more"), ["c"]);
    assert_eq!(nodes(&pools, &filled, well, &asked).expect("elsewhere"), ["d"]);
    let text = nodes(&pools[..3], &filled, well, &asked).expect_err("not now").text;
    assert!(
        text.contains("default.c is on a node that is given 2 other replicas at the moment"),
        "{text}"
    );
    let new = Wish {
        replacing: false,
        ..asked
    };
    assert_eq!(nodes(&pools, &filled, well, &new).expect("it is empty"), ["c"]);
}
