//! With the real store behind the device.

use super::*;
use crate::disk::{FormatSpec, format_replica, remove_replica, used_bytes};

struct Real {
    dir: PathBuf,
    engine: Engine,
}

impl Real {
    fn new() -> Real {
        let dir = std::env::temp_dir().join(format!("galleonfs-node-{}", Uuid::new_v4()));
        fs::create_dir_all(&dir).expect("make a directory for the test");
        let config = EngineConfig {
            shards: 1,
            map_budget_bytes: 32 << 20,
            runtime_dir: dir.join("run"),
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
            salt: 5,
        }
    }

    fn format(&self, spec: &AttachSpec) {
        let format = FormatSpec {
            volume_uid: spec.volume_uid,
            replica_uid: spec.replica_uid,
            cluster_id: spec.cluster_id,
            size_bytes: spec.size_bytes,
            salt: spec.salt,
        };
        format_replica(&spec.replica_dir, &format).expect("format");
        format_replica(&spec.replica_dir, &format).expect("formatting twice changes nothing");
    }
}

impl Drop for Real {
    fn drop(&mut self) {
        drop(fs::remove_dir_all(&self.dir));
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
    real.engine.detach("volume").await.expect("detach");
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
