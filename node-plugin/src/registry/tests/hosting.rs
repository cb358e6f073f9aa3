//! Replicas of a volume of three: they take part in it as long as they are there, wherever it is attached.

use galleonfs_api::{MEMBER_FINALIZER, ReplicaPhase, reason};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::Time;
use kube::Resource;

use super::*;
use crate::registry::objects::ObjectError;

fn is_hosted(bench: &Bench) -> bool {
    let hosted = bench.engine.hosted(uid_of("v-a"));
    hosted.is_some_and(|hosted| hosted.stopped.is_none())
}

fn ready_text(bench: &Bench) -> String {
    let status = bench.replica().status.unwrap();
    let ready = condition::get(&status.conditions, condition_type::READY).unwrap();
    format!("{}: {}", ready.reason, ready.message)
}

async fn look(bench: &Bench) -> Result<Next, Retry> {
    bench.see();
    bench.registry.reconcile(&Key::Replica("v-a".into())).await
}

#[tokio::test]
async fn a_replica_of_three_is_ready_when_it_is_hosted_and_is_hosted_again_by_the_next_process() {
    let mut bench = Bench::of_three();
    bench.run().await.unwrap();
    assert!(is_hosted(&bench));
    assert_eq!(bench.replica().phase(), ReplicaPhase::Ready);
    assert_eq!(bench.replica().status.unwrap().observed_size_bytes, Some(16 * MIB));
    assert_eq!(bench.engine.led().len(), 0, "the volume is attached nowhere");

    let writes = bench.api.with(|world| world.writes);
    let _dead = bench.restart();
    assert!(!is_hosted(&bench));
    bench.run().await.unwrap();
    assert!(is_hosted(&bench));
    assert_eq!(
        bench.api.with(|world| world.writes),
        writes,
        "nothing new is to be told"
    );
    bench
        .api
        .with(|world| world.failing = Some(ObjectError::Away("no route".into())));
    assert_eq!(look(&bench).await, Ok(Next::Again(Duration::from_secs(10))));
}

#[tokio::test]
async fn a_replica_that_cannot_be_opened_is_failed_and_tried_again_but_not_at_once() {
    let bench = Bench::of_three();
    bench.engine.fail_host(uid_of("v-a"), Some("superblocks are damaged"));
    bench.run().await.unwrap();
    assert_eq!(bench.replica().phase(), ReplicaPhase::Failed);
    assert_eq!(
        ready_text(&bench),
        "IoError: it could not be opened: superblocks are damaged"
    );
    bench.engine.fail_host(uid_of("v-a"), None);
    bench.run().await.unwrap();
    assert!(!is_hosted(&bench), "its disk gets a moment");
    bench.lose_patience();
    bench.run().await.unwrap();
    assert!(is_hosted(&bench));
    assert_eq!(bench.replica().phase(), ReplicaPhase::Ready);
}

#[tokio::test]
async fn a_replica_that_stopped_is_closed_reported_and_opened_again() {
    let bench = Bench::of_three();
    bench.run().await.unwrap();
    bench.engine.stop_hosted(uid_of("v-a"), "a sync failed");
    look(&bench).await.unwrap();
    assert_eq!(bench.engine.hosted(uid_of("v-a")), None);
    assert_eq!(bench.replica().phase(), ReplicaPhase::Failed);
    assert!(ready_text(&bench).contains("a sync failed"));
    bench.lose_patience();
    bench.run().await.unwrap();
    assert!(is_hosted(&bench));
    assert_eq!(bench.replica().phase(), ReplicaPhase::Ready);
    assert_eq!(ready_text(&bench), "Ready: on node n1");
}

#[tokio::test]
async fn a_replica_of_three_grows_before_its_volume_does() {
    let bench = Bench::of_three();
    bench.attach_to(Some("n1"));
    bench.run().await.unwrap();
    bench.edit("v", of_volumes, |volume| volume.spec.size_bytes = 32 * MIB);
    bench.edit("v-a", of_replicas, |replica| replica.spec.size_bytes = 32 * MIB);
    bench.run().await.unwrap();
    assert_eq!(bench.replica().status.unwrap().observed_size_bytes, Some(32 * MIB));
    assert_eq!(
        bench.device().unwrap().size_bytes,
        16 << 20,
        "nobody has said that the others have grown"
    );
    bench.edit("v", of_volumes, |volume| {
        volume.status.as_mut().unwrap().observed_size_bytes = Some(32 * MIB);
    });
    bench.run().await.unwrap();
    assert_eq!(bench.device().unwrap().size_bytes, 32 << 20);
}

#[tokio::test]
async fn a_replica_that_was_given_up_is_closed_and_removed_while_its_volume_is_in_use() {
    let bench = Bench::of_three();
    bench.attach_to(Some("n1"));
    bench.run().await.unwrap();
    bench.edit_config(|config| config.in_sync = vec!["v-b".into(), "v-c".into()]);
    bench.edit("v-a", of_replicas, |replica| {
        replica.meta_mut().deletion_timestamp = Some(Time(k8s_openapi::jiff::Timestamp::now()));
    });
    bench.run().await.unwrap();
    assert!(!is_hosted(&bench) && !bench.replica_path().exists());
    assert!(!bench.api.with(|world| world.replicas.contains_key("v-a")));
    assert!(bench.device().is_some());
}

#[tokio::test]
async fn a_replica_that_its_volume_may_still_name_goes_on_whoever_deletes_it() {
    let bench = Bench::of_three();
    bench.run().await.unwrap();
    bench.edit("v-a", of_replicas, |replica| {
        replica.finalizers_mut().push(MEMBER_FINALIZER.into());
        replica.meta_mut().deletion_timestamp = Some(Time(k8s_openapi::jiff::Timestamp::now()));
    });
    bench.run().await.unwrap();
    assert!(is_hosted(&bench) && bench.replica_path().exists());
    assert_eq!(bench.replica().phase(), ReplicaPhase::Ready);
    bench.edit("v-a", of_replicas, |replica| {
        replica.finalizers_mut().retain(|name| name != MEMBER_FINALIZER);
    });
    bench.run().await.unwrap();
    assert!(!is_hosted(&bench) && !bench.replica_path().exists());
}

#[tokio::test]
async fn a_replica_without_an_object_is_closed_and_keeps_its_data() {
    let bench = Bench::of_three();
    bench.run().await.unwrap();
    bench.api.with(|world| world.replicas.remove("v-a"));
    assert_eq!(look(&bench).await, Ok(Next::Gone));
    assert!(!is_hosted(&bench) && bench.replica_path().exists());
}

#[tokio::test]
async fn data_that_is_gone_is_not_made_again_for_a_replica_of_three() {
    let mut bench = Bench::of_three();
    bench.run().await.unwrap();
    let _dead = bench.restart();
    std::fs::remove_dir_all(bench.replica_path()).unwrap();
    bench.run().await.unwrap();
    assert_eq!(bench.replica().phase(), ReplicaPhase::Failed);
    assert_eq!(bench.replica().trouble().unwrap().reason, reason::DATA_MISSING);
    assert!(!is_hosted(&bench) && !bench.replica_path().exists());
}
