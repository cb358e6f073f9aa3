//! Pools, on real file systems: what cannot be used says why and takes no replicas.

use std::path::{Path, PathBuf};

use galleonfs_api::{ReplicaPhase, Reservation, reason};
use nix::mount::{MntFlags, MsFlags, mount, umount2};

use super::*;

/// A small file system of its own at the pool's path, gone with the test.
struct Disk(PathBuf);

impl Disk {
    fn mount(at: &Path) -> Self {
        std::fs::create_dir_all(at).unwrap();
        mount(Some("tmpfs"), at, Some("tmpfs"), MsFlags::empty(), Some("size=128m")).unwrap();
        Self(at.to_owned())
    }

    fn remount(&self, flags: MsFlags) {
        let none = None::<&Path>;
        mount(none, &self.0, none, MsFlags::MS_REMOUNT | flags, none).unwrap();
    }

    /// Writes until nothing more fits.
    fn fill(&self) -> PathBuf {
        let file = self.0.join("filler");
        let filled = std::fs::write(&file, vec![1; 129 << 20]);
        assert_eq!(filled.unwrap_err().kind(), std::io::ErrorKind::StorageFull);
        file
    }
}

impl Drop for Disk {
    fn drop(&mut self) {
        let _ = umount2(&self.0, MntFlags::MNT_DETACH);
    }
}

impl<E: NodeEngine> Bench<E> {
    fn pool_condition(&self) -> Condition {
        self.api.with(|world| world.pools[POOL].ready().unwrap().clone())
    }
}

#[tokio::test]
async fn a_pool_says_where_its_node_is_reached_once_that_is_known_and_says_it_once() {
    let bench = Bench::new();
    bench.run().await.unwrap();
    let told = |bench: &Bench| {
        bench
            .api
            .with(|world| world.pools[POOL].status.clone().unwrap().endpoint)
    };
    assert_eq!(told(&bench), None);
    let endpoint = galleonfs_api::Endpoint {
        address: "192.0.2.7:9811".into(),
        node_uid: Uuid::from_u128(7).to_string(),
    };
    bench.registry.endpoint.set(endpoint.clone()).unwrap();
    bench.run().await.unwrap();
    assert_eq!(told(&bench), Some(endpoint));
    let writes = bench.api.with(|world| world.writes);
    bench.run().await.unwrap();
    assert_eq!(bench.api.with(|world| world.writes), writes);
}

#[tokio::test]
async fn a_new_pool_on_a_full_disk_waits_for_room_and_then_is_made() {
    let bench = Bench::new();
    let disk = Disk::mount(bench.pool_path().parent().unwrap());
    std::fs::create_dir(bench.pool_path()).unwrap();
    let filler = disk.fill();
    bench.run().await.unwrap();
    let ready = bench.pool_condition();
    assert!(!ready.is_true() && ready.reason == reason::DISK_FULL, "{ready:?}");
    assert!(ready.message.contains("make room or grow it"), "{ready:?}");
    assert_eq!(std::fs::read_dir(bench.pool_path()).unwrap().count(), 0);
    assert_eq!(bench.replica().trouble().unwrap().reason, reason::POOL_NOT_READY);
    std::fs::remove_file(filler).unwrap();
    bench.run().await.unwrap();
    assert!(bench.pool_condition().is_true());
    assert_eq!(bench.replica().phase(), ReplicaPhase::Ready);
}

#[tokio::test]
async fn a_pool_that_has_filled_up_says_so_until_there_is_room_again() {
    let bench = Bench::new();
    let disk = Disk::mount(&bench.pool_path());
    bench.run().await.unwrap();
    let filler = disk.fill();
    bench.run().await.unwrap();
    let ready = bench.pool_condition();
    assert!(!ready.is_true() && ready.reason == reason::DISK_FULL, "{ready:?}");
    let usable = bench
        .api
        .with(|world| world.pools[POOL].status.clone())
        .unwrap()
        .usable_bytes;
    // What our replica has taken already may still be counted.
    assert!(usable.unwrap() < 32 * MIB, "{usable:?}");
    std::fs::remove_file(filler).unwrap();
    bench.run().await.unwrap();
    assert!(bench.pool_condition().is_true());
}

#[tokio::test]
async fn a_read_only_pool_takes_nothing_and_says_so() {
    for label_first in [false, true] {
        let bench = Bench::new();
        let disk = Disk::mount(&bench.pool_path());
        if label_first {
            bench.run().await.unwrap();
        }
        let before = std::fs::read_dir(bench.pool_path()).unwrap().count();
        disk.remount(MsFlags::MS_RDONLY);
        bench.run().await.unwrap();
        let ready = bench.pool_condition();
        assert!(!ready.is_true() && ready.reason == reason::READ_ONLY, "{ready:?}");
        assert!(ready.message.contains("mount it writable"), "{ready:?}");
        assert_eq!(std::fs::read_dir(bench.pool_path()).unwrap().count(), before);
        disk.remount(MsFlags::empty());
        bench.run().await.unwrap();
        assert!(bench.pool_condition().is_true());
        assert_eq!(bench.replica().phase(), ReplicaPhase::Ready);
    }
}

#[tokio::test]
async fn a_pool_whose_disk_is_gone_fails_its_replicas_and_makes_nothing_in_its_place() {
    let bench = Bench::new();
    bench.run().await.unwrap();
    std::fs::rename(bench.pool_path(), bench.dir.path().join("unplugged")).unwrap();
    bench.run().await.unwrap();
    assert!(!bench.pool_path().exists());
    assert_eq!(bench.replica().trouble().unwrap().reason, reason::POOL_NOT_READY);
    std::fs::create_dir(bench.pool_path()).unwrap();
    bench.run().await.unwrap();
    assert_eq!(std::fs::read_dir(bench.pool_path()).unwrap().count(), 0);
    std::fs::remove_dir(bench.pool_path()).unwrap();
    std::fs::rename(bench.dir.path().join("unplugged"), bench.pool_path()).unwrap();
    bench.run().await.unwrap();
    assert_eq!(bench.replica().phase(), ReplicaPhase::Ready);
}

#[tokio::test]
async fn a_pool_of_another_cluster_is_left_alone() {
    let bench = Bench::new();
    let label = crate::pool::Label {
        format: 1,
        cluster_id: Uuid::new_v4(),
        pool_uid: Uuid::new_v4(),
    };
    std::fs::create_dir_all(bench.pool_path()).unwrap();
    crate::pool::write_label(&bench.pool_path(), &label).unwrap();
    bench.attach_to(Some("n1"));
    let outcome = bench.run().await;
    assert!(matches!(outcome, Err(Retry::Later(text)) if text.contains("cluster")));
    let pool = bench.api.with(|world| world.pools[POOL].clone());
    assert_eq!(pool.ready().unwrap().reason, reason::OTHER_CLUSTER);
    assert!(
        bench
            .api
            .with(|world| world.notices.iter().any(|(name, _)| name == POOL))
    );
    assert!(!bench.pool_path().join(REPLICAS).exists());
}

#[tokio::test]
async fn the_controllers_reservations_in_a_pool_survive_our_writes() {
    let bench = Bench::new();
    bench.edit(
        "default.n1",
        |world| &mut world.pools,
        |pool| {
            let reservation = Reservation {
                volume_name: "w".into(),
                bytes: 1,
            };
            pool.status
                .get_or_insert_default()
                .reservations
                .insert("uid".into(), reservation);
        },
    );
    bench.run().await.unwrap();
    let status = bench.api.with(|world| world.pools[POOL].status.clone()).unwrap();
    assert!(status.pool_uid.is_some());
    assert_eq!(status.reservations["uid"].volume_name, "w");
}

impl Bench {
    /// Asks the stores for damage at once.
    async fn look_for_damage(&self) {
        self.registry.own(|own| own.asked_for_damage = None);
        self.run().await.unwrap();
    }

    fn failing(&self) -> Option<Condition> {
        self.api.with(|world| {
            let status = world.pools[POOL].status.clone().unwrap();
            condition::get(&status.conditions, condition_type::FAILING).cloned()
        })
    }
}

#[tokio::test]
async fn a_disk_with_too_much_damage_is_said_to_fail_until_a_person_trusts_it() {
    let mut bench = Bench::of_three();
    bench.run().await.unwrap();
    bench.engine.damage("v-a", 16);
    bench.look_for_damage().await;
    assert!(bench.pool_condition().is_true() && bench.failing().is_none());
    bench.engine.damage("v-a", 17);
    bench.run().await.unwrap();
    assert!(bench.failing().is_none(), "the stores are not asked all the time");
    bench.look_for_damage().await;
    let failing = bench.failing().unwrap();
    assert!(
        failing.is_true() && failing.reason == reason::TOO_MANY_REPAIRS,
        "{failing:?}"
    );
    assert!(
        failing
            .message
            .contains("17 blocks were found damaged within 60 minutes, of v-a (17)")
    );
    let ready = bench.pool_condition();
    assert!(
        !ready.is_true() && ready.reason == reason::TOO_MANY_REPAIRS,
        "{ready:?}"
    );
    assert!(ready.message.starts_with("one replica is still here. "), "{ready:?}");
    assert_eq!(
        bench.replica().phase(),
        ReplicaPhase::Ready,
        "it goes on until it is replaced"
    );

    // The next process has seen nothing, and goes by the object.
    let _dead = bench.restart();
    let writes = bench.api.with(|world| world.writes);
    bench.look_for_damage().await;
    assert_eq!((bench.failing(), bench.pool_condition()), (Some(failing), ready));
    assert_eq!(
        bench.api.with(|world| world.writes),
        writes,
        "nothing new is to be told"
    );

    let trust = |bench: &Bench, when: &str| {
        bench.edit(POOL, of_pools, |pool| {
            let mark = galleonfs_api::ANNOTATION_DISK_TRUSTED_AT.to_string();
            pool.annotations_mut().insert(mark, when.to_string());
        });
    };
    for no_time in ["yes", "2020-01-01T00:00:00Z"] {
        trust(&bench, no_time);
        bench.run().await.unwrap();
        assert!(bench.failing().unwrap().is_true(), "{no_time}");
    }
    trust(&bench, "2199-01-01T00:00:00Z");
    bench.run().await.unwrap();
    let trusted = bench.failing().unwrap();
    assert!(
        !trusted.is_true() && trusted.reason == reason::DISK_TRUSTED,
        "{trusted:?}"
    );
    assert!(bench.pool_condition().is_true());
}

#[tokio::test]
async fn damage_of_a_volume_of_one_replica_counts_for_its_pool() {
    let bench = Bench::new();
    bench.attach_to(Some("n1"));
    bench.run().await.unwrap();
    bench.engine.damage("v", 20);
    bench.look_for_damage().await;
    assert!(bench.failing().unwrap().message.contains("of v-a (20)"));
}

#[tokio::test]
async fn a_pool_that_is_made_again_begins_anew() {
    let bench = Bench::of_three();
    bench.run().await.unwrap();
    bench.engine.damage("v-a", 17);
    bench.look_for_damage().await;
    assert!(bench.failing().unwrap().is_true());
    let mut pool = bench.api.with(|world| world.pools.remove(POOL)).unwrap();
    bench.run().await.unwrap();
    pool.status = None;
    bench.add(pool, of_pools);
    bench.engine.damage("v-a", 0);
    bench.look_for_damage().await;
    assert!(bench.failing().is_none() && bench.pool_condition().is_true());
}
