use super::*;
use crate::fixtures::{attach_to, deleting, failed, one_of_several, ready, replica, replicated, settled, volume};
use galleonfs_api::{condition, size::GIB};

fn three() -> [GalleonReplica; 3] {
    ["a", "b", "c"].map(|node| ready(one_of_several("v", node, GIB)))
}

fn refs(replicas: &[GalleonReplica]) -> Vec<&GalleonReplica> {
    replicas.iter().collect()
}

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

#[test]
fn the_first_configuration_of_several_waits_for_all_and_takes_one_of_each_node() {
    let [a, b, c] = three();
    let volume = replicated("v", 3);
    assert_eq!(next(&volume, &[&a, &b]), None);
    let pending = one_of_several("v", "c", GIB);
    assert_eq!(next(&volume, &[&a, &b, &pending]), None);
    let mut twin = b.clone();
    twin.metadata.name = Some("v-b-too".to_string());
    assert_eq!(
        next(&volume, &[&a, &b, &twin]),
        None,
        "two copies on one node are lost together"
    );
    let Some(Step::WriteConfig(config)) = next(&volume, &[&twin, &c, &b, &a]) else {
        panic!("a configuration")
    };
    assert_eq!((config.epoch, config.primary), (0, None));
    assert_eq!(config.in_sync, ["v-a", "v-b", "v-c"]);
    assert!(config.out.is_empty() && config.syncing.is_empty());
}

#[test]
fn a_replica_that_is_deleted_is_let_go_only_when_nobody_names_it() {
    let [a, b, c] = three();
    let leaving = deleting(one_of_several("v", "c", GIB));
    let named = settled(replicated("v", 3), &["v-a", "v-b", "v-c"]);
    assert_eq!(
        next(&named, &[&a, &b, &leaving]),
        None,
        "a person did that, and the volume needs it"
    );
    let unnamed = settled(replicated("v", 3), &["v-a", "v-b", "v-d"]);
    assert_eq!(next(&unnamed, &[&a, &b, &leaving]), Some(Step::LetGo));
    assert_eq!(next(&replicated("v", 3), &[&a, &b, &leaving]), Some(Step::LetGo));
    let mut free = leaving;
    free.metadata.finalizers = Some(vec![galleonfs_api::REPLICA_FINALIZER.to_string()]);
    assert_eq!(next(&unnamed, &[&a, &b, &free]), None, "its node is at it");
    let syncing = {
        let mut volume = settled(replicated("v", 3), &["v-a", "v-b"]);
        let config = volume.status.as_mut().and_then(|status| status.config.as_mut());
        config.expect("a configuration").syncing = vec!["v-c".to_string()];
        volume
    };
    assert_eq!(next(&syncing, &[&a, &b, &deleting(c)]), None);
}

#[test]
fn a_deleted_volume_of_several_lets_go_of_all_its_replicas_though_its_primary_died() {
    let own = three();
    let mut volume = deleting(settled(replicated("v", 3), &["v-a", "v-b", "v-c"]));
    volume.spec.attach_to = Some(attach_to("z"));
    assert_eq!(next(&volume, &refs(&own)), None);
    volume.spec.attach_to = None;
    let config = volume.status.as_mut().and_then(|status| status.config.as_mut());
    config.expect("a configuration").primary = Some("z".to_string());
    let names = ["v-a", "v-b", "v-c"].map(str::to_string).to_vec();
    assert_eq!(next(&volume, &refs(&own)), Some(Step::DeleteReplicas(names)));
    let leaving = own.map(deleting);
    assert_eq!(next(&volume, &refs(&leaving)), Some(Step::LetGo));
    let free = leaving.map(|mut replica| {
        replica.metadata.finalizers = Some(vec![galleonfs_api::REPLICA_FINALIZER.to_string()]);
        replica
    });
    assert_eq!(next(&volume, &refs(&free)), None, "the nodes are at it");
    assert_eq!(next(&volume, &[]), Some(Step::DropFinalizer));
}
