//! What a process that died left behind: mounted again, or taken down; what is not ours is left alone.

use super::*;

#[tokio::test]
async fn after_a_crash_everything_is_mounted_again_on_a_new_device() {
    for fs in ["ext4", "xfs"] {
        let mut bench = Bench::new();
        bench.volume("v", 320 * MIB).await;
        bench.volume("b", 16 * MIB).await;
        let capability = || mount(fs, Mode::SingleNodeMultiWriter);
        let (a, gone, dev) = (
            bench.path("pods/a/mount"),
            bench.path("pods/gone/mount"),
            bench.path("pods/a/dev"),
        );
        bench.stage("v", capability()).await.unwrap();
        bench.stage("b", block()).await.unwrap();
        bench.publish("v", &a, capability()).await.unwrap();
        bench.publish("v", &gone, capability()).await.unwrap();
        bench.publish("b", &dev, block()).await.unwrap();
        std::fs::write(Path::new(&a).join("file"), b"bytes").unwrap();
        assert!(Command::new("sync").args(["-f", &a]).status().unwrap().success());

        // The process dies. A pod still holds the old file system; the old devices stay busy and are not ours any more.
        let held = std::fs::File::open(Path::new(&a).join("file")).unwrap();
        let old = bench.node.served.device("v").unwrap().path;
        nix::mount::umount2(gone.as_str(), nix::mount::MntFlags::MNT_DETACH).unwrap();
        std::fs::remove_dir_all(bench.path("pods/gone")).unwrap();
        bench.node = Bench::node(bench.dir.path(), bench.catalog.clone());
        let dead = std::mem::take(&mut bench.engine);
        bench.volume("v", 320 * MIB).await;
        bench.volume("b", 16 * MIB).await;
        assert_ne!(bench.node.served.device("v").unwrap().path, old);

        for volume in ["v", "b"] {
            let tools = bench.node.guards.hung().tools(volume);
            let device = bench.node.served.device(volume).unwrap();
            for _ in 0..2 {
                bench.node.stager.restore(&tools, &device).await.unwrap();
            }
        }
        assert_eq!(std::fs::read(Path::new(&a).join("file")).unwrap(), b"bytes");
        std::fs::write(Path::new(&a).join("more"), b"bytes").unwrap();
        assert_eq!(read_table().await.unwrap().depth(Path::new(&a)), 1);
        assert!(!Path::new(&bench.path("pods/gone")).exists());
        let targets = bench.node.stager.records().staged("v").unwrap().targets;
        assert_eq!(targets.keys().collect::<Vec<_>>(), [Path::new(&a)]);
        use std::os::unix::fs::MetadataExt;
        let device = bench.node.served.device("b").unwrap().path;
        assert_eq!(
            std::fs::metadata(&dev).unwrap().rdev(),
            std::fs::metadata(device).unwrap().rdev()
        );

        // And the kubelet takes it down as if nothing had happened.
        bench.unpublish("v", &a).await.unwrap();
        bench.unstage("v").await.unwrap();
        drop((held, dead));
    }
}

#[tokio::test]
async fn dead_mounts_can_be_taken_down_without_their_device() {
    let bench = Bench::new();
    bench.volume("v", 16 * MIB).await;
    let target = bench.path("pods/a");
    bench.stage("v", ext4()).await.unwrap();
    bench.publish("v", &target, ext4()).await.unwrap();
    bench.node.served.set("v", None);
    bench.unpublish("v", &target).await.unwrap();
    bench.unstage("v").await.unwrap();
    assert!(!bench.mounted(&target).await && !bench.mounted(&bench.path("staging/v")).await);
}

#[tokio::test]
async fn a_mount_that_is_not_the_volumes_is_never_taken_down() {
    let bench = Bench::new();
    bench.volume("v", 16 * MIB).await;
    bench.volume("w", 16 * MIB).await;
    let (target, foreign) = (bench.path("pods/a"), bench.path("pods/tmp"));
    bench.stage("v", ext4()).await.unwrap();
    bench.publish("v", &target, ext4()).await.unwrap();
    std::fs::create_dir_all(&foreign).unwrap();
    assert!(
        Command::new("mount")
            .args(["-t", "tmpfs", "tmpfs", &foreign])
            .status()
            .unwrap()
            .success()
    );
    is(
        bench.unpublish("w", &target).await,
        Code::FailedPrecondition,
        "belongs to volume v",
    );
    is(
        bench.unpublish("w", &foreign).await,
        Code::FailedPrecondition,
        "not one of ours",
    );
    is(
        bench.publish("v", &foreign, ext4()).await,
        Code::FailedPrecondition,
        "already mounted",
    );
    assert!(bench.mounted(&target).await && bench.mounted(&foreign).await);
}
