//! Requests that make no sense, and volumes that are not there: refused by name, with nothing touched.

use super::*;

#[tokio::test]
async fn hostile_and_broken_paths_are_refused_and_nothing_is_touched() {
    let bench = Bench::new();
    bench.volume("v", 16 * MIB).await;
    let outside = bench.dir.path().join("outside");
    std::fs::create_dir_all(&outside).unwrap();
    std::fs::create_dir_all(bench.path("pods")).unwrap();
    std::os::unix::fs::symlink(&outside, bench.path("link")).unwrap();
    std::os::unix::fs::symlink(&outside, bench.path("pods/link")).unwrap();
    let long = bench.path(&"x".repeat(5000));
    let bad = [
        String::new(),
        "relative/path".into(),
        bench.path("../outside/x"),
        bench.path("pods/../../outside"),
        outside.to_str().unwrap().to_owned(),
        "/etc".into(),
        bench.path("a\0b"),
        bench.path(""),
        bench.path("plugins/csi.galleonfs.io/state"),
        bench.path("link"),
        bench.path("link/x"),
        bench.path("pods/link"),
        long,
    ];
    for path in &bad {
        is(bench.stage_at("v", path, ext4()).await, Code::InvalidArgument, "");
    }
    bench.stage("v", ext4()).await.unwrap();
    for path in &bad {
        is(bench.publish("v", path, ext4()).await, Code::InvalidArgument, "");
        is(bench.unpublish("v", path).await, Code::InvalidArgument, "");
    }
    assert_eq!(std::fs::read_dir(&outside).unwrap().count(), 0);
    assert!(bench.node.stager.records().staged("v").unwrap().targets.is_empty());
    assert!(Path::new(&bench.path("pods/link")).is_symlink());
}

#[tokio::test]
async fn missing_and_malformed_fields_are_named() {
    let bench = Bench::new();
    bench.volume("v", 16 * MIB).await;
    let invalid = Code::InvalidArgument;
    is(bench.stage("", ext4()).await, invalid, "volume_id is missing");
    is(bench.stage("a/b", ext4()).await, invalid, "volume_id");
    is(bench.stage(&"v".repeat(129), ext4()).await, invalid, "128 bytes");
    is(
        bench
            .stage(
                "v",
                VolumeCapability {
                    access_type: None,
                    ..ext4()
                },
            )
            .await,
        invalid,
        "access_type",
    );
    is(
        bench
            .stage(
                "v",
                VolumeCapability {
                    access_mode: None,
                    ..ext4()
                },
            )
            .await,
        invalid,
        "access_mode",
    );
    is(
        bench.stage("v", mount("btrfs", Mode::SingleNodeWriter)).await,
        invalid,
        "ext4, xfs",
    );
    is(
        bench.stage("v", mount("ext4", Mode::MultiNodeMultiWriter)).await,
        invalid,
        "MULTI_NODE_MULTI_WRITER",
    );
    is(
        bench.stage("v", flags(&["noatime", "journal_path=/x"])).await,
        invalid,
        "journal_path",
    );
    let no_capability = NodeStageVolumeRequest {
        volume_id: "v".into(),
        staging_target_path: bench.path("staging/v"),
        ..Default::default()
    };
    let big = NodeStageVolumeRequest {
        volume_capability: Some(ext4()),
        volume_context: [("k".to_owned(), "x".repeat(5000))].into(),
        ..no_capability.clone()
    };
    is(
        bench
            .node
            .node_stage_volume(Request::new(no_capability))
            .await
            .map(drop),
        invalid,
        "volume_capability",
    );
    is(
        bench.node.node_stage_volume(Request::new(big)).await.map(drop),
        invalid,
        "volume_context",
    );
    let no_staging = NodePublishVolumeRequest {
        volume_id: "v".into(),
        target_path: bench.path("pods/a"),
        volume_capability: Some(ext4()),
        ..Default::default()
    };
    let publish = bench.node.node_publish_volume(Request::new(no_staging)).await.map(drop);
    is(publish, Code::FailedPrecondition, "staging_target_path");
    assert!(!Path::new(&bench.path("staging")).exists());
}

#[tokio::test]
async fn volumes_that_do_not_exist_are_not_found_and_their_absence_is_never_made_up() {
    let bench = Bench::new();
    bench.volume("v", 16 * MIB).await;
    let target = bench.path("pods/a");
    is(bench.stage("w", ext4()).await, Code::NotFound, "w does not exist");
    is(bench.stage("Not_An_Object", ext4()).await, Code::NotFound, "");
    is(bench.publish("w", &target, ext4()).await, Code::NotFound, "");
    is(
        bench.publish("v", &target, ext4()).await,
        Code::FailedPrecondition,
        "not staged",
    );
    is(bench.stats("w", &target).await.map(drop), Code::NotFound, "");
    is(bench.stats("v", &target).await.map(drop), Code::NotFound, "");
    bench.unpublish("w", &target).await.unwrap();
    bench.unstage("w").await.unwrap();
    bench.unstage("Not_An_Object").await.unwrap();
    bench.catalog.0.lock().unwrap().insert("gone".into(), None);
    is(
        bench.stage("gone", ext4()).await,
        Code::Unavailable,
        "the API server is away",
    );
    bench.exists("elsewhere", Some("n2"));
    is(
        bench.stage("elsewhere", ext4()).await,
        Code::FailedPrecondition,
        "attached to node n2",
    );
    bench.exists("failed", Some("n1"));
    bench
        .node
        .served
        .set("failed", Some(Presence::Failed("the disk is gone".into())));
    is(
        bench.stage("failed", ext4()).await,
        Code::Unavailable,
        "the disk is gone",
    );
}
