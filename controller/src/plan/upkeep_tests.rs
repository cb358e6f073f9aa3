use super::*;
use crate::fixtures::{attach_to, deleting, failed, ready, replica, settled, volume};
use galleonfs_api::{condition, size::GIB};

fn condition_of(volume: &GalleonVolume, replicas: &[&GalleonReplica], type_: &str) -> Condition {
    condition::get(&conditions(volume, replicas), type_)
        .expect("the condition is reported")
        .clone()
}

#[test]
fn a_volume_without_replicas_is_left_to_whoever_creates_or_deletes_it() {
    assert_eq!(next(&volume("v"), &[]), None);
    let ready = condition_of(&volume("v"), &[], condition_type::READY);
    assert!(!ready.is_true() && ready.reason == reason::NO_REPLICA);
}

#[test]
fn the_first_configuration_waits_for_a_ready_replica() {
    let pending = replica("v", "a", GIB);
    assert_eq!(next(&volume("v"), &[&pending]), None);
    let Some(Step::WriteConfig(config)) = next(&volume("v"), &[&ready(pending)]) else {
        panic!("a configuration")
    };
    assert_eq!(
        (config.epoch, config.in_sync, config.primary),
        (0, vec!["v-a".to_string()], None)
    );
}

#[test]
fn of_two_replicas_that_raced_one_is_settled_on_and_the_other_removed() {
    let (a, b) = (ready(replica("v", "a", GIB)), ready(replica("v", "b", GIB)));
    let Some(Step::WriteConfig(config)) = next(&volume("v"), &[&b, &a]) else {
        panic!("a configuration")
    };
    assert_eq!(config.in_sync, ["v-a"]);
    let step = next(&settled(volume("v"), &["v-a"]), &[&a, &b]);
    assert_eq!(step, Some(Step::DeleteReplicas(vec!["v-b".to_string()])));
}

#[test]
fn a_replica_is_never_surplus_while_the_volume_lacks_one() {
    let (a, b) = (ready(replica("v", "a", GIB)), ready(replica("v", "b", GIB)));
    let mut wanting = settled(volume("v"), &["v-a"]);
    wanting.spec.replica_count = 2;
    assert_eq!(next(&wanting, &[&a, &b]), None);
}

#[test]
fn replicas_follow_a_volume_that_has_grown() {
    let small = ready(replica("v", "a", GIB));
    let mut grown = settled(volume("v"), &["v-a"]);
    assert_eq!(next(&grown, &[&small]), None);
    grown.spec.size_bytes = 2 * GIB;
    assert_eq!(next(&grown, &[&small]), Some(Step::GrowReplicas));
    let sized = condition_of(&grown, &[&small], condition_type::SIZED);
    assert!(
        !sized.is_true() && sized.message.contains("2147483648"),
        "{}",
        sized.message
    );
    let large = ready(replica("v", "a", 2 * GIB));
    assert_eq!(next(&grown, &[&large]), None);
    assert_eq!(observed_size_bytes(&grown, &[&large]), Some(2 * GIB));
    assert!(condition_of(&grown, &[&large], condition_type::SIZED).is_true());
}

#[test]
fn deletion_waits_for_the_node_then_for_the_replicas_then_lets_go() {
    let own = ready(replica("v", "a", GIB));
    let mut attached = deleting(settled(volume("v"), &["v-a"]));
    attached.spec.attach_to = Some(attach_to("a"));
    assert_eq!(next(&attached, &[&own]), None);
    let why = condition_of(&attached, &[&own], condition_type::READY);
    assert!(
        why.reason == reason::ATTACHED && why.message.contains("node a"),
        "{}",
        why.message
    );

    let mut releasing = deleting(settled(volume("v"), &["v-a"]));
    releasing
        .status
        .as_mut()
        .and_then(|status| status.config.as_mut())
        .expect("a configuration")
        .primary = Some("a".to_string());
    assert_eq!(next(&releasing, &[&own]), None);

    let released = deleting(settled(volume("v"), &["v-a"]));
    assert_eq!(
        next(&released, &[&own]),
        Some(Step::DeleteReplicas(vec!["v-a".to_string()]))
    );
    assert_eq!(next(&released, &[&deleting(own)]), None, "the node is at it");
    assert_eq!(next(&released, &[]), Some(Step::DropFinalizer));
}

#[test]
fn a_replica_of_an_earlier_volume_of_the_same_name_is_not_ours() {
    let mut other = replica("v", "a", GIB);
    other.spec.volume_uid = "earlier".to_string();
    assert!(own(&volume("v"), [&other]).is_empty());
    assert_eq!(
        next(&deleting(volume("v")), &own(&volume("v"), [&other])),
        Some(Step::DropFinalizer)
    );
}

#[test]
fn readiness_passes_on_what_the_node_says() {
    let sick = failed(
        replica("v", "a", GIB),
        reason::PATH_MISSING,
        "/mnt/a does not exist; mount it",
    );
    let why = condition_of(&settled(volume("v"), &["v-a"]), &[&sick], condition_type::READY);
    assert_eq!((why.is_true(), why.reason.as_str()), (false, reason::REPLICA_NOT_READY));
    assert!(
        why.message.contains("PathMissing: /mnt/a does not exist; mount it"),
        "{}",
        why.message
    );

    let gone = condition_of(&settled(volume("v"), &["v-a"]), &[], condition_type::READY);
    assert!(gone.message.contains("does not exist any more"), "{}", gone.message);

    let well = ready(replica("v", "a", GIB));
    assert!(condition_of(&settled(volume("v"), &["v-a"]), &[&well], condition_type::READY).is_true());
}
