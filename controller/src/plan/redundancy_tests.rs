use super::*;
use crate::{
    fixtures::{deleting, one_of_several, ready, replicated, settled},
    plan::placement::Standing,
};
use galleonfs_api::{ANNOTATION_OUT_SINCE, size::GIB};
use std::time::Duration;

const OUT_SINCE: &str = "2026-03-01T10:00:00Z";

fn at(text: &str) -> Timestamp {
    text.parse().expect("a time")
}

fn three() -> [GalleonReplica; 3] {
    ["a", "b", "c"].map(|node| ready(one_of_several("v", node, GIB)))
}

fn told(volume: &GalleonVolume, replicas: &[GalleonReplica], away: Option<&str>, stuck: Option<&str>) -> Condition {
    told_with(volume, replicas, away, stuck, None)
}

fn told_with(
    volume: &GalleonVolume,
    replicas: &[GalleonReplica],
    away: Option<&str>,
    stuck: Option<&str>,
    failing: Option<&str>,
) -> Condition {
    let standing = |node: &str| Standing {
        trouble: (away == Some(node)).then(|| "is not ready".to_string()),
        since: Some(at("2026-03-01T10:01:00Z")),
        zone: None,
    };
    let circumstances = Circumstances {
        now: at("2026-03-01T10:05:00Z"),
        delay: Duration::from_secs(600),
        standing: &standing,
        failing: &|pool| failing == Some(pool),
        unchanged_since: at("2026-03-01T10:02:00Z"),
    };
    let own: Vec<&GalleonReplica> = replicas.iter().collect();
    let config = volume.config().expect("it is settled");
    condition(volume, config, &own, &circumstances, stuck)
}

fn one_out(primary: Option<&str>) -> (GalleonVolume, [GalleonReplica; 3]) {
    let mut volume = settled(replicated("v", 3), &["v-a", "v-b"]);
    let config = volume.status.as_mut().and_then(|status| status.config.as_mut());
    let config = config.expect("it is settled");
    config.primary = primary.map(str::to_string);
    let had = OutReplica {
        epoch: 4,
        flushed_seq: 1733,
    };
    config.out.insert("v-c".to_string(), had);
    let mut own = three();
    own[2]
        .annotations_mut()
        .insert(ANNOTATION_OUT_SINCE.to_string(), OUT_SINCE.to_string());
    (volume, own)
}

#[test]
fn a_whole_volume_says_where_a_completed_write_is() {
    let whole = told(
        &settled(replicated("v", 3), &["v-a", "v-b", "v-c"]),
        &three(),
        None,
        None,
    );
    assert!(whole.is_true());
    assert_eq!(whole.reason, reason::ALL_IN_SYNC);
    assert_eq!(whole.message, "a completed write is on 3 of 3 replicas: a, b, c");
}

#[test]
fn what_a_completed_write_is_on_depends_on_the_write_concern() {
    let mut volume = settled(replicated("v", 3), &["v-a", "v-b", "v-c"]);
    let mut own = three();
    for (replica, zone) in own.iter_mut().zip(["x", "x", "y"]) {
        replica.spec.zone = Some(zone.to_string());
    }
    let mut says = |concern, own: &[GalleonReplica]| {
        volume.spec.write_concern = concern;
        told(&volume, own, None, None)
    };
    assert_eq!(
        says(WriteConcern::Acknowledged, &own).message,
        "a completed write is on the first replica that has it, and the others follow; what was flushed is on 3 of 3 \
         replicas: a, b, c"
    );
    assert_eq!(
        says(WriteConcern::Durable, &own).message,
        "a completed write is on stable storage of 3 of 3 replicas: a, b, c"
    );
    let apart = says(WriteConcern::Distributed, &own);
    assert!(apart.is_true());
    assert_eq!(
        apart.message,
        "a completed write is on 3 of 3 replicas: a, b, c, in 2 zones: x, y"
    );
    own[2].spec.zone = None;
    let together = says(WriteConcern::Distributed, &own);
    assert!(!together.is_true());
    assert_eq!(together.reason, reason::TOO_FEW_ZONES);
    assert!(together.message.contains("in 1 zones: x"), "{}", together.message);
    assert!(together.message.ends_with("writes wait"), "{}", together.message);
}

#[test]
fn one_that_is_out_is_named_with_its_node_its_last_write_and_what_happens_when() {
    let (volume, own) = one_out(Some("a"));
    let lacking = told(&volume, &own, Some("c"), None);
    assert!(!lacking.is_true());
    assert_eq!(lacking.reason, reason::REPLICA_OUT);
    assert_eq!(
        lacking.message,
        "a completed write is on 2 of 3 replicas: a, b; replica v-c on node c is out since 2026-03-01T10:00:00Z and \
         surely has every write up to 4.1733; its node is not ready; it is replaced from 2026-03-01T10:11:00Z on if it \
         stays away"
    );
    let (detached, own) = one_out(None);
    let message = told(&detached, &own, None, None).message;
    assert!(
        message.ends_with("it catches up when the volume is attached"),
        "{message}"
    );
}

#[test]
fn the_text_does_not_change_with_the_clock() {
    let (volume, own) = one_out(Some("a"));
    let (first, second) = (
        told(&volume, &own, Some("c"), None),
        told(&volume, &own, Some("c"), None),
    );
    assert_eq!(first.message, second.message);
    assert!(!first.message.contains("10:05"), "{}", first.message);
}

#[test]
fn catching_up_being_replaced_and_having_no_place_to_go_are_told_apart() {
    let (mut volume, own) = one_out(Some("a"));
    let stuck = told(&volume, &own, Some("c"), Some("default.d is full"));
    assert_eq!(stuck.reason, reason::NO_OTHER_NODE);
    assert!(
        stuck
            .message
            .ends_with("no other node can take a replica: default.d is full"),
        "{}",
        stuck.message
    );

    let mut with_new = own.to_vec();
    let mut new = one_of_several("v", "d", GIB);
    new.annotations_mut()
        .insert(ANNOTATION_REPLACES.to_string(), "v-c".to_string());
    with_new.push(new);
    let replacing = told(&volume, &with_new, Some("c"), None);
    assert_eq!(replacing.reason, reason::REPLACING);
    assert!(
        replacing
            .message
            .contains("replica v-d on node d is being made in the place of v-c"),
        "{}",
        replacing.message
    );

    let config = volume.status.as_mut().and_then(|status| status.config.as_mut());
    config.expect("it is settled").syncing = vec!["v-c".to_string()];
    let syncing = told(&volume, &own, None, None);
    assert_eq!(syncing.reason, reason::SYNCING);
    assert!(
        syncing.message.ends_with("replica v-c on node c is catching up"),
        "{}",
        syncing.message
    );
}

#[test]
fn a_replica_that_somebody_deleted_is_said_to_stay() {
    let [a, b, c] = three();
    let volume = settled(replicated("v", 3), &["v-a", "v-b", "v-c"]);
    let told = told(&volume, &[a, b, deleting(c)], None, None);
    assert!(told.is_true());
    assert!(
        told.message.ends_with("it stays as long as it is in sync"),
        "{}",
        told.message
    );
}

#[test]
fn a_copy_on_a_disk_that_fails_is_named_with_what_happens_next() {
    let mut whole = settled(replicated("v", 3), &["v-a", "v-b", "v-c"]);
    let failing = Some("default.c");
    let said = told_with(&whole, &three(), None, None, failing);
    assert!(said.is_true() && said.reason == reason::POOL_FAILING, "{said:?}");
    assert!(
        said.message.ends_with(
            "replica v-c on node c is on a disk that is not to be trusted (StoragePool default.c); it leaves when another \
             one is in sync, for which the volume must be attached"
        ),
        "{}",
        said.message
    );
    let said = told_with(&whole, &three(), None, Some("no pool has room"), failing);
    assert!(said.is_true() && said.reason == reason::NO_OTHER_NODE, "{said:?}");
    assert!(
        said.message
            .contains("it stays, because there is nowhere to go; no other node can take a replica: no pool")
    );
    // It is looked at again when there is room, or when the disk is trusted.
    whole.status.get_or_insert_default().conditions = vec![said];
    assert!(is_stuck(&whole));
}

#[test]
fn the_only_copy_on_a_disk_that_fails_is_for_a_person() {
    let mut alone = settled(crate::fixtures::volume("v"), &["v-a"]);
    let replica = ready(crate::fixtures::replica("v", "a", GIB));
    assert_eq!(of_one(&alone, &[&replica], |_| false), None);
    let said = of_one(&alone, &[&replica], |pool| pool == "default.a").expect("something to say");
    assert!(!said.is_true() && said.reason == reason::POOL_FAILING);
    assert!(
        said.message
            .contains("the only copy of the volume is replica v-a on node a"),
        "{said:?}"
    );
    alone.status.get_or_insert_default().conditions = vec![said];
    assert!(is_on_failing(&alone));
    let well = of_one(&alone, &[&replica], |_| false).expect("it was told before");
    assert!(well.is_true());
}
