use std::os::unix::fs::FileExt;
use std::sync::atomic::{AtomicUsize, Ordering};

use galleonfs_storage_engine::buffer::BufMut;

use super::*;

fn page(fill: u8) -> BufMut {
    BufMut::copy_of(&[fill; 4096])
}

#[tokio::test(flavor = "multi_thread")]
async fn a_file_system_lives_on_a_volume() {
    for paths in ALL_PATHS {
        let node = Node::with(1, paths);
        for volume in ["ram", "file"] {
            let device = node.attach(volume, 64 * MIB).await;
            let mounted = Mounted::ext4(&device, node.dir.join("mnt"));
            let bytes: Vec<u8> = (0..5_000_000u32).map(|n| (n.wrapping_mul(7919) >> 8) as u8).collect();
            fs::write(mounted.0.join("data"), &bytes).expect("write");
            run("sync", &["-f", &text(&mounted.0)]);
            drop(mounted);
            // Detaching waits for a lazy unmount to come through.
            node.engine.detach(volume).await.expect("detach");
            if volume == "file" {
                let device = node.attach(volume, 64 * MIB).await;
                run("e2fsck", &["-fn", &text(&device)]);
                run("mount", &[&text(&device), &text(&node.dir.join("mnt"))]);
                let mounted = Mounted(node.dir.join("mnt"));
                assert_eq!(fs::read(mounted.0.join("data")).expect("read"), bytes);
                let stats = node.stats(volume);
                assert_eq!((Some(stats.path), stats.guest_path), (paths.disk, paths.guest));
                drop(mounted);
                node.engine.detach(volume).await.expect("detach");
            }
        }
        assert!(node.engine.stats().is_empty());
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn every_sync_of_the_guest_is_one_flush_of_the_engine() {
    let node = Node::new(1);
    let device = node.attach("ram", 16 * MIB).await;
    let file = open_direct(&device);
    // The kernel syncs once when it makes the loop device.
    let before = node.control.lock().flushes;
    for round in 0..20u64 {
        file.write_all_at(page(1).as_ref(), round * 4096).expect("write");
        file.sync_data().expect("sync");
        assert_eq!(node.control.lock().flushes, before + round + 1);
    }
    assert_eq!(node.stats("ram").flushes, before + 20);
    assert_eq!(node.stats("ram").written_bytes, 20 * 4096);
    drop(file);
    node.engine.detach("ram").await.expect("detach");
}

#[tokio::test(flavor = "multi_thread")]
async fn discards_and_zeroes_reach_the_engine_as_ranges() {
    let node = Node::new(1);
    let device = node.attach("ram", 64 * MIB).await;
    run("blkdiscard", &["-o", "1048576", "-l", "8388608", &text(&device)]);
    assert_eq!(std::mem::take(&mut node.control.lock().zeroed), [(MIB, 8 * MIB)]);
    run("blkdiscard", &["-z", "-o", "4096", "-l", "16777216", &text(&device)]);
    let zeroed = std::mem::take(&mut node.control.lock().zeroed);
    assert_eq!(zeroed.iter().map(|(_, len)| len).sum::<u64>(), 16 * MIB);
    assert_eq!(node.control.lock().written_bytes, 0, "no zeros were written");

    let file = open_direct(&device);
    file.write_all_at(page(9).as_ref(), 8192).expect("write");
    run("blkdiscard", &[&text(&device)]);
    let mut read = page(1);
    file.read_exact_at(read.as_mut(), 8192).expect("read");
    assert_eq!(read.as_ref(), [0; 4096]);
    drop(file);
    node.engine.detach("ram").await.expect("detach");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_request_that_hangs_does_not_hold_up_the_others() {
    let node = Node::new(1);
    let device = node.attach("ram", 16 * MIB).await;
    node.control.lock().hold = 0..4096;
    let done = AtomicUsize::new(0);
    std::thread::scope(|scope| {
        let held = scope.spawn(|| open_direct(&device).write_all_at(page(1).as_ref(), 0));
        wait_until("one request is held", || node.control.lock().held == 1);
        for n in 1..=32 {
            let (device, done) = (&device, &done);
            scope.spawn(move || {
                let file = open_direct(device);
                for round in 0..50 {
                    let at = (n * 50 + round) * 4096;
                    file.write_all_at(page(n as u8).as_ref(), at).expect("write");
                    let mut read = page(0);
                    file.read_exact_at(read.as_mut(), at).expect("read");
                    assert_eq!(read.as_ref(), page(n as u8).as_ref());
                }
                done.fetch_add(1, Ordering::Relaxed);
            });
        }
        wait_until("the others are done", || done.load(Ordering::Relaxed) == 32);
        assert!(!held.is_finished());
        assert_eq!(node.stats("ram").inflight, 1);
        node.control.lock().hold = 0..0;
        held.join().expect("no panic").expect("the held request ends");
    });
    node.engine.detach("ram").await.expect("detach");
}

/// The hanging disk is a file system on a volume of the same shard, so a shard that waited for it would never wake.
#[tokio::test(flavor = "multi_thread")]
async fn a_hanging_disk_holds_up_its_own_volume_only() {
    for paths in ALL_PATHS {
        let node = Node::with(1, paths);
        let below = node.attach("ram-below", 64 * MIB).await;
        let pool = Mounted::ext4(&below, node.dir.join("pool"));
        let hanging = node
            .engine
            .attach(node.spec_in("hanging", 16 * MIB, &pool.0))
            .await
            .expect("attach")
            .path;
        let fine = node.attach("fine", 16 * MIB).await;
        let file = open_direct(&hanging);
        file.write_all_at(page(1).as_ref(), 0).expect("write");

        node.control.lock().hold = 0..u64::MAX;
        std::thread::scope(|scope| {
            let held = scope.spawn(|| {
                file.write_all_at(page(2).as_ref(), 4096)?;
                file.sync_data()
            });
            wait_until("the disk below holds something", || node.control.lock().held > 0);
            let other = open_direct(&fine);
            for round in 0..200 {
                other.write_all_at(page(3).as_ref(), round * 4096).expect("write");
            }
            other.sync_data().expect("sync");
            assert!(!held.is_finished());
            node.control.lock().hold = 0..0;
            held.join().expect("no panic").expect("the disk answers in the end");
        });
        drop(file);
        node.engine.detach("hanging").await.expect("detach");
        node.engine.detach("fine").await.expect("detach");
        drop(pool);
        node.engine.detach("ram-below").await.expect("detach");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_volume_grows_while_it_is_in_use() {
    let node = Node::new(1);
    let device = node.attach("ram", 16 * MIB).await;
    let file = open_direct(&device);
    file.write_all_at(page(1).as_ref(), 20 * MIB)
        .expect_err("behind the end");
    let grown = node.engine.grow("ram", 32 * MIB).await.expect("grow");
    assert_eq!((grown.path, grown.size_bytes), (device, 32 * MIB));
    file.write_all_at(page(1).as_ref(), 20 * MIB).expect("write");
    assert_eq!(
        node.engine
            .grow("ram", 16 * MIB)
            .await
            .expect("a smaller size is reached already")
            .size_bytes,
        32 * MIB
    );
    drop(file);
    node.engine.detach("ram").await.expect("detach");
    assert_eq!(
        node.engine.grow("ram", 64 * MIB).await.expect_err("detached").kind(),
        ErrorKind::NotFound
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn large_and_odd_requests_arrive_whole() {
    for paths in ALL_PATHS {
        let node = Node::with(1, paths);
        let device = node.attach("file", 64 * MIB).await;
        let file = open_direct(&device);
        let mut at = 0;
        for pages in [1, 3, 15, 16, 17, 255, 256, 257, 1000, 2048] {
            let mut bytes = BufMut::zeroed(pages * 4096);
            for (index, byte) in bytes.as_mut().iter_mut().enumerate() {
                *byte = (index * 31 + index / 4096 + pages) as u8;
            }
            file.write_all_at(bytes.as_ref(), at).expect("write");
            let mut read = BufMut::zeroed(pages * 4096);
            file.read_exact_at(read.as_mut(), at).expect("read");
            assert_eq!(read.as_ref(), bytes.as_ref(), "{pages} pages");
            at += (pages * 4096) as u64;
        }
        drop(file);
        node.engine.detach("file").await.expect("detach");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_read_only_volume_refuses_writes() {
    let node = Node::new(1);
    let spec = AttachSpec {
        read_only: true,
        ..node.spec("ram", 16 * MIB)
    };
    let device = node.engine.attach(spec).await.expect("attach").path;
    OpenOptions::new()
        .write(true)
        .open(&device)
        .and_then(|file| file.write_all_at(&[1], 0))
        .expect_err("read only");
    File::open(&device)
        .expect("open")
        .read_exact_at(&mut [0; 512], 0)
        .expect("read");
    node.engine.detach("ram").await.expect("detach");
}

#[tokio::test(flavor = "multi_thread")]
async fn attaching_and_detaching_twice_changes_nothing() {
    let node = Node::new(2);
    let device = node.attach("ram", 16 * MIB).await;
    let spec = node.spec("ram", 16 * MIB);
    assert_eq!(
        node.engine.attach(spec.clone()).await.expect("attach again").path,
        device
    );
    let later = AttachSpec { epoch: 2, ..spec };
    assert_eq!(
        node.engine.attach(later).await.expect_err("another epoch").kind(),
        ErrorKind::Retry
    );

    let user = File::open(&device).expect("open");
    assert_eq!(
        node.engine.detach("ram").await.expect_err("in use").kind(),
        ErrorKind::Retry
    );
    let mut first = [1; 512];
    user.read_exact_at(&mut first, 0).expect("still served");
    drop(user);
    node.engine.detach("ram").await.expect("detach");
    node.engine.detach("ram").await.expect("detach again");
    assert_eq!(node.engine.device("ram"), None);
    assert_eq!(
        fs::read_dir(node.dir.join("run")).expect("list").count(),
        0,
        "no mount point is left"
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn an_engine_that_stopped_answers_errors_and_says_why() {
    let node = Node::new(1);
    let device = node.attach("ram", 16 * MIB).await;
    let file = open_direct(&device);
    file.write_all_at(page(1).as_ref(), 0).expect("write");
    node.control.lock().stopped = Some("the sync failed".to_owned());
    assert_eq!(file.sync_data().expect_err("stopped").raw_os_error(), Some(libc::EIO));
    file.read_exact_at(page(0).as_mut(), 0).expect_err("stopped");
    let stats = node.stats("ram");
    assert_eq!(stats.last_error.as_deref(), Some("the disk failed: the sync failed"));
    assert!(stats.errors >= 2);
    drop(file);
    node.engine
        .detach("ram")
        .await
        .expect("an engine that stopped can be detached");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_replica_that_cannot_be_opened_leaves_no_device() {
    let node = Node::new(1);
    let spec = AttachSpec {
        replica_dir: node.dir.join("absent"),
        ..node.spec("ram", MIB)
    };
    assert_eq!(
        node.engine.attach(spec).await.expect_err("absent").kind(),
        ErrorKind::NotFound
    );
    let spec = node.spec("ram", 16 * MIB);
    let locked = FileDisk::open(&spec.replica_dir).expect("open");
    assert_eq!(
        node.engine.attach(spec.clone()).await.expect_err("locked").kind(),
        ErrorKind::Retry
    );
    drop(locked);
    node.engine.attach(spec).await.expect("attach");
    node.engine.detach("ram").await.expect("detach");
}
