//! With the real store behind the device.

use std::os::unix::fs::FileExt;
use std::process::Stdio;

use galleonfs_storage_engine::buffer::BufMut;
use galleonfs_storage_engine::compress::Codec;

use super::*;
use crate::disk::{BlockSize, FormatSpec, format_replica, remove_replica, used_bytes};

struct Real {
    dir: PathBuf,
    engine: Engine,
}

impl Real {
    fn new() -> Real {
        Real::at(std::env::temp_dir().join(format!("galleonfs-node-{}", Uuid::new_v4())))
    }

    fn at(dir: PathBuf) -> Real {
        Real::scrubbing(dir, None)
    }

    fn scrubbing(dir: PathBuf, scrub: Option<ScrubPlan>) -> Real {
        fs::create_dir_all(&dir).expect("make a directory for the test");
        let config = EngineConfig {
            shards: 1,
            map_budget_bytes: 32 << 20,
            scrub,
            runtime_dir: dir.join("run"),
            network: crate::engine::Network::default(),
        };
        Real {
            dir,
            engine: Engine::start(config).expect("start the engine"),
        }
    }

    fn spec(&self, volume: &str, epoch: u64) -> AttachSpec {
        AttachSpec {
            volume: volume.to_owned(),
            volume_uid: Uuid::from_u128(2),
            replica_uid: Uuid::from_u128(3),
            cluster_id: Uuid::from_u128(4),
            replica_dir: self.dir.join("replicas").join(volume),
            epoch,
            size_bytes: 128 * MIB,
            read_only: false,
            settings: Settings::default(),
            key: None,
        }
    }

    fn format(&self, spec: &AttachSpec) {
        self.format_in(spec, BlockSize::default());
    }

    fn format_in(&self, spec: &AttachSpec, block_size: BlockSize) {
        let format = FormatSpec {
            volume_uid: spec.volume_uid,
            replica_uid: spec.replica_uid,
            cluster_id: spec.cluster_id,
            block_size,
            size_bytes: spec.size_bytes,
            salt: 5,
            key: spec.key.clone(),
        };
        format_replica(&spec.replica_dir, &format).expect("format");
        format_replica(&spec.replica_dir, &format).expect("formatting twice changes nothing");
    }
}

impl Drop for Real {
    fn drop(&mut self) {
        clean_up(&self.dir);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_file_system_on_a_replica_survives_detaching_and_growing() {
    let real = Real::new();
    let spec = real.spec("volume", 1);
    real.format(&spec);
    let device = real.engine.attach(spec.clone()).await.expect("attach").path;
    let mounted = Mounted::ext4(&device, real.dir.join("mnt"));
    let bytes: Vec<u8> = (0..20_000_000u32).map(|n| (n.wrapping_mul(7919) >> 8) as u8).collect();
    fs::write(mounted.0.join("data"), &bytes).expect("write");
    drop(mounted);
    let stores = real.engine.stores();
    let [(name, store)] = &stores[..] else {
        panic!("one volume, not {stores:?}")
    };
    assert_eq!(name, "volume");
    assert!(
        store.stats.written_bytes > 20_000_000 && store.stats.allocated_bytes > 20_000_000,
        "{store:?}"
    );
    real.engine.detach("volume").await.expect("detach");
    assert!(real.engine.stores().is_empty());
    assert!(used_bytes(&spec.replica_dir).expect("measure") > 20_000_000);

    let device = real.engine.attach(real.spec("volume", 2)).await.expect("attach").path;
    assert_eq!(
        real.engine.grow("volume", 256 * MIB).await.expect("grow").size_bytes,
        256 * MIB
    );
    run("e2fsck", &["-fp", &text(&device)]);
    run("resize2fs", &[&text(&device)]);
    run("mount", &[&text(&device), &text(&real.dir.join("mnt"))]);
    let mounted = Mounted(real.dir.join("mnt"));
    assert_eq!(fs::read(mounted.0.join("data")).expect("read"), bytes);
    run("fstrim", &[&text(&mounted.0)]);
    drop(mounted);
    real.engine.detach("volume").await.expect("detach");

    assert_eq!(
        real.engine
            .attach(real.spec("volume", 2))
            .await
            .expect_err("an old epoch")
            .kind(),
        ErrorKind::Retry
    );
    let device = real.engine.attach(real.spec("volume", 3)).await.expect("attach");
    assert_eq!(device.size_bytes, 256 * MIB, "the size is the replica's");
    real.engine.detach("volume").await.expect("detach");
    remove_replica(&spec.replica_dir).expect("remove");
    assert_eq!(
        real.engine.attach(spec).await.expect_err("removed").kind(),
        ErrorKind::NotFound
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn a_replica_that_is_not_the_right_one_is_refused_with_its_reason() {
    let real = Real::new();
    let spec = real.spec("volume", 1);
    real.format(&spec);
    let other = AttachSpec {
        cluster_id: Uuid::from_u128(9),
        ..spec.clone()
    };
    let error = real.engine.attach(other).await.expect_err("another cluster");
    assert_eq!(error.kind(), ErrorKind::WrongIdentity);
    assert!(format!("{error:?}").contains("another cluster"), "{error:?}");
    for slot in 0..2 {
        fs::write(spec.replica_dir.join(format!("superblock.{slot}")), vec![7; 4096]).expect("damage");
    }
    assert_eq!(
        real.engine.attach(spec).await.expect_err("damaged").kind(),
        ErrorKind::Corrupt
    );
    assert!(real.engine.stats().is_empty());
}

#[tokio::test(flavor = "multi_thread")]
async fn a_sealed_replica_opens_with_its_key_only_and_stores_nothing_readable() {
    const KEY: [u8; 32] = *b"thirty-two bytes that nobody saw";
    let real = Real::new();
    let sealed = AttachSpec {
        key: Some(VolumeKey::new(1, &KEY).expect("a key")),
        ..real.spec("volume", 1)
    };
    real.format(&sealed);
    let device = real.engine.attach(sealed.clone()).await.expect("attach").path;
    let file = open_direct(&device);
    let mut plain = BufMut::zeroed(64 << 10);
    plain
        .as_mut()
        .chunks_mut(16)
        .for_each(|part| part.copy_from_slice(b"nobody else's !\n"));
    file.write_all_at(plain.as_ref(), 0).expect("write");
    file.sync_data().expect("sync");
    drop(file);
    real.engine.detach("volume").await.expect("detach");

    for (key, tells) in [
        (None, "no key was given"),
        (Some(VolumeKey::new(1, &[7; 32]).expect("a key")), "not the one"),
        (Some(VolumeKey::new(2, &KEY).expect("a key")), "was not given"),
    ] {
        let spec = AttachSpec {
            key,
            epoch: 2,
            ..sealed.clone()
        };
        let error = real.engine.attach(spec).await.expect_err("refused");
        let text = format!("{error:?}");
        assert!(text.contains(tells), "{text}");
        assert!(
            !text.contains("thirty-two") && !text.contains("7, 7"),
            "no key in: {text}"
        );
    }
    for segment in fs::read_dir(sealed.replica_dir.join("segments")).expect("list") {
        let stored = fs::read(segment.expect("list").path()).expect("read");
        assert!(
            !stored.windows(13).any(|part| part == b"nobody else's"),
            "plaintext on the disk"
        );
    }
    let again = AttachSpec { epoch: 2, ..sealed };
    let device = real.engine.attach(again).await.expect("attach").path;
    let mut read = BufMut::zeroed(64 << 10);
    open_direct(&device).read_exact_at(read.as_mut(), 0).expect("read");
    assert_eq!(read.as_ref(), plain.as_ref());
    real.engine.detach("volume").await.expect("detach");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_device_with_small_sectors_takes_parts_of_large_compressed_blocks() {
    const SECTORS: usize = 4096;
    let real = Real::new();
    let spec = AttachSpec {
        settings: Settings {
            sector_bytes: 512,
            compression: Some(Codec::Lz4),
            ..Settings::default()
        },
        ..real.spec("volume", 1)
    };
    real.format_in(&spec, BlockSize::K16);
    let device = real.engine.attach(spec.clone()).await.expect("attach").path;
    let sysfs = Path::new("/sys/block")
        .join(device.file_name().expect("a name"))
        .join("queue/logical_block_size");
    assert_eq!(fs::read_to_string(sysfs).expect("read").trim(), "512");

    // Text that shrinks, in single sectors out of order, some of them over the edge of a block and some twice.
    let line = |sector: usize, round: u8| {
        let mut text = format!("sector {sector:05} in round {round}; ").into_bytes();
        text.resize(512, b'.');
        text
    };
    let file = open_direct(&device);
    let mut expected = vec![0; SECTORS * 512];
    let mut buffer = BufMut::zeroed(4096);
    for (round, step) in [(1, 7), (2, 11)] {
        for n in 0..SECTORS / 2 {
            let at = n * step % (SECTORS - 3);
            let count = 1 + n % 3;
            for sector in at..at + count {
                let bytes = line(sector, round);
                buffer.as_mut()[(sector - at) * 512..][..512].copy_from_slice(&bytes);
                expected[sector * 512..][..512].copy_from_slice(&bytes);
            }
            file.write_all_at(&buffer.as_ref()[..count * 512], at as u64 * 512)
                .expect("write");
        }
    }
    run("blkdiscard", &["-z", "-o", "1024", "-l", "512", &text(&device)]);
    expected[1024..1536].fill(0);
    file.sync_data().expect("sync");
    let compare = |device: &Path| {
        let file = open_direct(device);
        let mut all = BufMut::zeroed(SECTORS * 512);
        file.read_exact_at(all.as_mut(), 0).expect("read");
        assert!(all.as_ref() == expected, "whole");
        for at in (0..SECTORS - 3).step_by(101) {
            let mut part = BufMut::zeroed(4096);
            let part = &mut part.as_mut()[..1536];
            file.read_exact_at(part, at as u64 * 512).expect("read");
            assert!(part == &expected[at * 512..at * 512 + 1536], "from sector {at}");
        }
    };
    compare(&device);
    drop(file);
    real.engine.detach("volume").await.expect("detach");
    // Without compression from now on, and what is there is read as before.
    let again = AttachSpec {
        epoch: 2,
        settings: Settings {
            sector_bytes: 512,
            ..Settings::default()
        },
        ..spec
    };
    let device = real.engine.attach(again).await.expect("attach").path;
    compare(&device);
    let live_bytes = real.engine.stores()[0].1.stats.live_bytes;
    assert!(
        live_bytes < SECTORS as u64 * 512 / 2,
        "{live_bytes} bytes live: the text was compressed"
    );
    real.engine.detach("volume").await.expect("detach");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_scrub_finds_what_the_disk_has_changed_and_a_new_write_mends_it() {
    let dir = std::env::temp_dir().join(format!("galleonfs-node-{}", Uuid::new_v4()));
    let plan = ScrubPlan {
        every: Duration::from_secs(1),
        bytes_per_second: 0,
    };
    let real = Real::scrubbing(dir, Some(plan));
    let spec = real.spec("volume", 1);
    real.format(&spec);
    let device = real.engine.attach(spec.clone()).await.expect("attach").path;
    let file = open_direct(&device);
    let block = |fill: &[u8; 16]| {
        let mut block = BufMut::zeroed(4096);
        block
            .as_mut()
            .chunks_mut(16)
            .for_each(|part| part.copy_from_slice(fill));
        block
    };
    for at in 0..100 {
        file.write_all_at(
            block(format!("block {at:10}").as_bytes().try_into().expect("16 bytes")).as_ref(),
            at * 4096,
        )
        .expect("write");
    }
    file.sync_data().expect("sync");
    // A bit turns over on the disk.
    let wanted = block(b"block         42");
    let mut turned = 0;
    for segment in fs::read_dir(spec.replica_dir.join("segments")).expect("list") {
        let path = segment.expect("list").path();
        let stored = fs::read(&path).expect("read");
        for (index, found) in stored.chunks(4096).enumerate() {
            if found == wanted.as_ref() {
                let segment = OpenOptions::new().write(true).open(&path).expect("open");
                segment.write_all_at(b"B", index as u64 * 4096).expect("damage");
                segment.sync_all().expect("sync");
                turned += 1;
            }
        }
    }
    assert_eq!(turned, 1);

    let stats = || real.engine.stats_of("volume").expect("attached");
    wait_until("the scrub finds it", || stats().damage.is_some());
    let told = stats().damage.expect("it was told");
    assert!(
        told.contains("the scrub found one place") && told.contains("block 42 version"),
        "{told}"
    );
    let damaged = || real.engine.stores()[0].1.scrub.damaged_count;
    assert_eq!(damaged(), 1);
    file.write_all_at(block(b"block        new").as_ref(), 42 * 4096)
        .expect("write");
    wait_until("the list forgets it", || damaged() == 0);
    wait_until("the volume is well again", || stats().damage.is_none());
    assert_eq!(stats().last_error, None);
    drop(file);
    real.engine.detach("volume").await.expect("detach");
}

const DIR: &str = "GALLEONFS_TEST_KILL_DIR";

/// Runs in a process of its own, which the test below kills.
#[tokio::test(flavor = "multi_thread")]
#[ignore = "the victim of what_was_synced_before_a_kill_is_there_afterwards"]
async fn a_process_that_serves_a_replica_until_it_is_killed() {
    let real = Real::at(PathBuf::from(std::env::var_os(DIR).expect("started by the other test")));
    let spec = real.spec("volume", 1);
    real.format(&spec);
    let device = real.engine.attach(spec).await.expect("attach").path;
    fs::write(real.dir.join("device.new"), text(&device)).expect("tell the device");
    fs::rename(real.dir.join("device.new"), real.dir.join("device")).expect("tell the device");
    std::future::pending::<()>().await;
}

/// Each of a few writers has blocks of its own, stamps them with a rising number, and remembers the stamps that were
/// written before a sync that succeeded.
#[tokio::test(flavor = "multi_thread")]
async fn what_was_synced_before_a_kill_is_there_afterwards() {
    const WRITERS: u64 = 4;
    const BLOCKS: u64 = 500;
    let dir = std::env::temp_dir().join(format!("galleonfs-node-{}", Uuid::new_v4()));
    fs::create_dir_all(&dir).expect("make a directory for the test");
    let mut victim = Command::new(std::env::current_exe().expect("a test has a program"))
        .args([
            "--ignored",
            "--exact",
            "engine::tests::replica::a_process_that_serves_a_replica_until_it_is_killed",
        ])
        .env(DIR, &dir)
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .spawn()
        .expect("start the victim");
    wait_until("the victim serves", || dir.join("device").exists());
    let device = PathBuf::from(fs::read_to_string(dir.join("device")).expect("read"));

    let writer = |writer: u64, file: File| {
        let mut synced = vec![0u64; BLOCKS as usize];
        let mut written = synced.clone();
        for stamp in 1.. {
            let block = stamp * 7919 % BLOCKS;
            let mut page = BufMut::zeroed(4096);
            page.as_mut()[..8].copy_from_slice(&u64::to_le_bytes(stamp));
            if file
                .write_all_at(page.as_ref(), (block * WRITERS + writer) * 4096)
                .is_err()
            {
                break;
            }
            written[block as usize] = stamp;
            if stamp % 16 == 0 {
                if file.sync_data().is_err() {
                    break;
                }
                synced.copy_from_slice(&written);
            }
        }
        synced
    };
    let synced: Vec<Vec<u64>> = std::thread::scope(|scope| {
        let writers: Vec<_> = (0..WRITERS)
            .map(|number| {
                let file = open_direct(&device);
                scope.spawn(move || writer(number, file))
            })
            .collect();
        let sectors_written = || {
            let name = device.file_name().expect("a device has a name").to_string_lossy();
            let stat = fs::read_to_string(format!("/sys/block/{name}/stat")).expect("read");
            stat.split_whitespace()
                .nth(6)
                .and_then(|sectors| sectors.parse::<u64>().ok())
                .expect("a number")
        };
        // A device's statistics outlive its use.
        let before = sectors_written();
        wait_until("a few thousand blocks are written", || {
            sectors_written() - before > 5000 * 8
        });
        victim.kill().expect("kill");
        victim.wait().expect("wait");
        writers
            .into_iter()
            .map(|writer| writer.join().expect("no panic"))
            .collect()
    });
    assert!(synced.iter().flatten().any(|stamp| *stamp > 0));

    Engine::remove_stale(&dir.join("run")).await.expect("remove");
    let real = Real::at(dir);
    let file = open_direct(&real.engine.attach(real.spec("volume", 2)).await.expect("attach").path);
    for (writer, synced) in synced.iter().enumerate() {
        for (block, stamp) in synced.iter().enumerate() {
            let mut page = BufMut::zeroed(4096);
            let at = (block as u64 * WRITERS + writer as u64) * 4096;
            file.read_exact_at(page.as_mut(), at).expect("read");
            let found = u64::from_le_bytes(page.as_ref()[..8].try_into().expect("eight bytes"));
            assert!(
                found >= *stamp,
                "writer {writer} block {block}: found {found}, synced {stamp}"
            );
        }
    }
    drop(file);
    real.engine.detach("volume").await.expect("detach");
}
