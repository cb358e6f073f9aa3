//! Replicas: made once, grown, removed only when their object says so.

use galleonfs_api::{ReplicaPhase, reason};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::Time;
use kube::Resource;

use super::*;

#[tokio::test]
async fn a_replica_that_held_data_is_never_made_a_second_time() {
    let bench = Bench::new();
    bench.run().await.unwrap();
    std::fs::remove_dir_all(bench.replica_path()).unwrap();
    bench.run().await.unwrap();
    let replica = bench.replica();
    assert_eq!(replica.phase(), ReplicaPhase::Failed);
    assert_eq!(replica.trouble().unwrap().reason, reason::DATA_MISSING);
    assert!(!bench.replica_path().exists());
}

#[tokio::test]
async fn a_deleted_replica_is_removed_after_its_volume_is_closed_and_not_before() {
    let bench = Bench::new();
    bench.attach_to(Some("n1"));
    bench.run().await.unwrap();
    bench.edit(
        "v-a",
        |world| &mut world.replicas,
        |replica| {
            let now = k8s_openapi::jiff::Timestamp::now();
            replica.meta_mut().deletion_timestamp = Some(Time(now));
        },
    );
    bench.run().await.unwrap();
    assert!(bench.replica_path().exists());
    assert_eq!(bench.replica().phase(), ReplicaPhase::Removing);
    bench.attach_to(None);
    bench.run().await.unwrap();
    assert!(!bench.replica_path().exists());
    assert!(bench.api.with(|world| world.replicas.is_empty()));
}

#[tokio::test]
async fn an_object_that_is_missing_costs_no_data() {
    let bench = Bench::new();
    bench.run().await.unwrap();
    bench.api.with(|world| {
        world.volumes.clear();
        world.replicas.clear();
    });
    bench.run().await.unwrap();
    assert!(bench.replica_path().exists());
}

#[tokio::test]
async fn a_volume_grows_when_its_replica_may() {
    let bench = Bench::new();
    bench.attach_to(Some("n1"));
    bench.run().await.unwrap();
    bench.edit(
        "v",
        |world| &mut world.volumes,
        |volume| volume.spec.size_bytes = 32 * MIB,
    );
    bench.run().await.unwrap();
    assert_eq!(
        bench.device().unwrap().size_bytes,
        16 << 20,
        "the replica has no room yet"
    );
    bench.edit(
        "v-a",
        |world| &mut world.replicas,
        |replica| replica.spec.size_bytes = 32 * MIB,
    );
    bench.run().await.unwrap();
    assert_eq!(bench.registry.served.device("v").unwrap().size_bytes, 32 << 20);
    assert_eq!(bench.replica().status.unwrap().observed_size_bytes, Some(32 * MIB));
}
