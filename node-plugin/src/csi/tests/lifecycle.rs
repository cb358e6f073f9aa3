//! Staged, published, used, taken down: what the kubelet does with a volume, and does twice.

use super::*;

#[tokio::test]
async fn a_file_system_is_made_once_and_its_files_are_found_by_every_pod() {
    for fs in ["ext4", "xfs"] {
        let bench = Bench::new();
        bench.volume("v", 320 * MIB).await;
        let capability = || mount(fs, Mode::SingleNodeMultiWriter);
        let (a, b) = (bench.path("pods/a/mount"), bench.path("pods/b/mount"));
        for _ in 0..2 {
            bench.stage("v", capability()).await.unwrap();
            bench.publish("v", &a, capability()).await.unwrap();
            bench.publish_with("v", &b, capability(), true).await.unwrap();
        }
        std::fs::write(Path::new(&a).join("file"), b"bytes").unwrap();
        assert_eq!(std::fs::read(Path::new(&b).join("file")).unwrap(), b"bytes");
        assert!(
            std::fs::write(Path::new(&b).join("other"), b"").is_err(),
            "{fs}: b is read-only"
        );

        is(bench.unstage("v").await, Code::FailedPrecondition, "still published");
        for _ in 0..2 {
            bench.unpublish("v", &a).await.unwrap();
            bench.unpublish("v", &b).await.unwrap();
        }
        assert!(!Path::new(&a).exists() && !Path::new(&b).exists());
        for _ in 0..2 {
            bench.unstage("v").await.unwrap();
        }
        assert!(bench.node.stager.records().volumes().is_empty());

        bench.stage("v", capability()).await.unwrap();
        bench.publish("v", &a, capability()).await.unwrap();
        assert_eq!(std::fs::read(Path::new(&a).join("file")).unwrap(), b"bytes", "{fs}");
    }
}

#[tokio::test]
async fn a_raw_block_volume_is_its_device_at_a_file() {
    let bench = Bench::new();
    bench.volume("v", 16 * MIB).await;
    let target = bench.path("pods/a/dev");
    for _ in 0..2 {
        bench.stage("v", block()).await.unwrap();
        bench.publish("v", &target, block()).await.unwrap();
    }
    use std::os::unix::fs::{FileTypeExt, MetadataExt};
    let node = std::fs::metadata(&target).unwrap();
    let device = bench.node.served.device("v").unwrap();
    assert!(node.file_type().is_block_device());
    assert_eq!(node.rdev(), std::fs::metadata(&device.path).unwrap().rdev());
    assert_eq!(bench.stats("v", &target).await.unwrap(), [(16 * MIB as i64, 0, 0)]);
    bench.unpublish("v", &target).await.unwrap();
    assert!(!Path::new(&target).exists());
    bench.unstage("v").await.unwrap();
}

#[tokio::test]
async fn a_repeat_that_asks_for_something_else_is_refused() {
    let bench = Bench::new();
    bench.volume("v", 16 * MIB).await;
    let target = bench.path("pods/a");
    bench.stage("v", ext4()).await.unwrap();
    is(
        bench.stage("v", block()).await,
        Code::AlreadyExists,
        "another capability",
    );
    is(
        bench.stage("v", flags(&["noatime"])).await,
        Code::AlreadyExists,
        "another capability",
    );
    is(
        bench.stage_at("v", &bench.path("staging/w"), ext4()).await,
        Code::FailedPrecondition,
        "is staged at",
    );
    bench.publish("v", &target, ext4()).await.unwrap();
    is(
        bench.publish_with("v", &target, ext4(), true).await,
        Code::AlreadyExists,
        "read-only",
    );
    is(
        bench.publish("v", &target, block()).await,
        Code::AlreadyExists,
        "another capability",
    );
    is(
        bench.publish("v", &bench.path("pods/b"), block()).await,
        Code::FailedPrecondition,
        "staged as ext4",
    );
}

#[tokio::test]
async fn a_single_writer_gets_one_target_and_the_next_after_it_is_gone() {
    let bench = Bench::new();
    bench.volume("v", 16 * MIB).await;
    let one = || mount("ext4", Mode::SingleNodeSingleWriter);
    let (a, b) = (bench.path("pods/a"), bench.path("pods/b"));
    bench.stage("v", one()).await.unwrap();
    bench.publish("v", &a, one()).await.unwrap();
    bench.publish("v", &a, one()).await.unwrap();
    is(
        bench.publish("v", &b, one()).await,
        Code::FailedPrecondition,
        "single writer",
    );
    bench.unpublish("v", &a).await.unwrap();
    bench.publish("v", &b, one()).await.unwrap();
}

#[tokio::test]
async fn a_second_call_for_a_volume_is_aborted_while_the_first_works_and_others_go_on() {
    let bench = Bench::new();
    bench.volume("other", 16 * MIB).await;
    bench.exists("v", Some("n1"));
    let staging = bench.stage("v", ext4());
    let meanwhile = async {
        while bench.node.guards.enter("v", "x").is_ok() {
            tokio::task::yield_now().await;
        }
        is(bench.unstage("v").await, Code::Aborted, "staging of volume v");
        bench.stage("other", ext4()).await.unwrap();
        bench.volume("v", 16 * MIB).await;
    };
    let (staged, ()) = tokio::join!(staging, meanwhile);
    staged.unwrap();
}

#[tokio::test]
async fn info_names_the_node_its_topology_and_its_limit() {
    let bench = Bench::new();
    let info = bench
        .node
        .node_get_info(Request::new(NodeGetInfoRequest {}))
        .await
        .unwrap()
        .into_inner();
    assert_eq!((info.node_id.as_str(), info.max_volumes_per_node), ("n1", 100));
    let segments = info.accessible_topology.unwrap().segments;
    assert_eq!(
        segments.get("topology.galleonfs.io/node").map(String::as_str),
        Some("n1")
    );
}

#[tokio::test]
async fn a_request_that_names_no_file_system_gets_the_one_the_volume_was_made_for() {
    let bench = Bench::new();
    bench.volume("v", 320 * MIB).await;
    let found = Found {
        uid: "uid-v".into(),
        attach_to: Some("n1".into()),
        fs_type: Some("xfs".into()),
    };
    bench.catalog.0.lock().unwrap().insert("v".into(), Some(found));
    let unnamed = || mount("", Mode::SingleNodeWriter);
    bench.stage("v", unnamed()).await.unwrap();
    bench.stage("v", mount("xfs", Mode::SingleNodeWriter)).await.unwrap();
    bench.publish("v", &bench.path("pods/a"), unnamed()).await.unwrap();
    assert_eq!(
        read_table()
            .await
            .unwrap()
            .at(Path::new(&bench.path("pods/a")))
            .unwrap()
            .fs_type,
        "xfs"
    );
    is(
        bench.publish("v", &bench.path("pods/b"), ext4()).await,
        Code::FailedPrecondition,
        "staged as xfs",
    );
}
