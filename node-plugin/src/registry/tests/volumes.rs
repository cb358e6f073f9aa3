//! Volumes: attached under new epochs, released, found again, and never started without the API server's word.

use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use galleonfs_api::{ReplicaPhase, reason};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::Time;
use kube::Resource;

use super::*;
use crate::engine::EngineConfig;
use crate::registry::objects::ObjectError;
use crate::served::{Presence, RealDisks, RealEngine, Trouble};

#[tokio::test]
async fn an_attached_volume_comes_up_under_a_new_epoch_and_then_nothing_is_written_any_more() {
    let bench = Bench::new();
    bench.attach_to(Some("n1"));
    assert_eq!(bench.run().await, Ok(AT_REST));

    let pool = bench.api.with(|world| world.pools[POOL].clone());
    assert!(pool.is_ready() && pool.status.unwrap().usable_bytes.unwrap() > 0);
    let replica = bench.replica();
    assert_eq!(replica.phase(), ReplicaPhase::Ready);
    assert_eq!(replica.status.unwrap().observed_size_bytes, Some(16 * MIB));
    let volume = bench.volume();
    let config = volume.config().unwrap();
    assert_eq!((config.epoch, config.primary.as_deref()), (1, Some("n1")));
    let device = bench.device().unwrap();
    let told = volume.status.as_ref().unwrap().device.clone().unwrap();
    assert_eq!(
        (told.node_name.as_str(), Path::new(&told.path), told.ready),
        ("n1", device.path.as_path(), true)
    );
    assert!(bench.attached().is_true());
    assert_eq!(bench.registry.served.device("v"), Some(device));
    let spec = bench.engine.attached().pop().unwrap();
    assert_eq!(
        (spec.epoch, spec.replica_dir, spec.volume_uid),
        (1, bench.replica_path(), uid_of("v"))
    );

    let writes = bench.api.with(|world| world.writes);
    for _ in 0..3 {
        bench.run().await.unwrap();
    }
    assert_eq!(
        bench.api.with(|world| world.writes),
        writes,
        "an idle node writes nothing"
    );
    assert_eq!(bench.api.with(|world| world.notices.len()), 0);
}

#[tokio::test]
async fn a_volume_is_released_only_when_it_is_not_mounted_and_closed() {
    let bench = Bench::new();
    bench.attach_to(Some("n1"));
    bench.run().await.unwrap();
    bench.stage().await;
    bench.attach_to(None);
    assert_eq!(bench.run().await, Ok(Next::Wait));
    assert!(bench.device().is_some());
    assert_eq!(bench.volume().primary(), Some("n1"));

    bench.unstage().await;
    assert_eq!(bench.run().await, Ok(Next::Gone));
    assert_eq!(bench.device(), None);
    let volume = bench.volume();
    let config = volume.config().unwrap();
    assert_eq!((config.epoch, &config.primary, &config.incarnation), (1, &None, &None));
    assert_eq!(volume.status.as_ref().unwrap().device, None);
    assert_eq!(bench.attached().reason, reason::DETACHED);
    assert!(bench.replica_path().exists());

    bench.attach_to(Some("n1"));
    bench.run().await.unwrap();
    assert_eq!(bench.volume().config().unwrap().epoch, 2);
}

#[tokio::test]
async fn after_a_restart_the_epoch_rises_and_the_mounts_are_made_again() {
    let mut bench = Bench::new();
    bench.attach_to(Some("n1"));
    bench.run().await.unwrap();
    bench.stage().await;
    let file = bench.staged().path.join("file");
    std::fs::write(&file, b"bytes").unwrap();
    assert!(
        std::process::Command::new("sync")
            .arg("-f")
            .arg(&file)
            .status()
            .unwrap()
            .success()
    );

    let dead = bench.restart();
    assert_eq!(bench.run().await, Ok(AT_REST));
    assert_eq!(bench.volume().config().unwrap().epoch, 2);
    assert_eq!(std::fs::read(&file).unwrap(), b"bytes");
    std::fs::write(&file, b"more").unwrap();
    let table = crate::mount::mounts::read_table().await.unwrap();
    let number = crate::mount::table::device_number(&bench.device().unwrap().path).unwrap();
    assert_eq!(table.at(&bench.staged().path).unwrap().device, number);
    drop(dead);
}

#[tokio::test]
async fn a_volume_released_while_we_were_down_gets_its_primary_cleared() {
    let mut bench = Bench::new();
    bench.attach_to(Some("n1"));
    bench.run().await.unwrap();
    bench.attach_to(None);
    let _dead = bench.restart();
    assert_eq!(bench.run().await, Ok(Next::Gone));
    assert_eq!(bench.volume().primary(), None);
    assert_eq!(bench.device(), None);
}

#[tokio::test]
async fn without_the_api_server_no_engine_is_started_and_none_is_stopped() {
    let bench = Bench::new();
    bench.run().await.unwrap();
    bench.attach_to(Some("n1"));
    bench.see();
    let away = ObjectError::Away("no route".into());
    bench.api.with(|world| world.failing = Some(away.clone()));
    let key = Key::Volume("v".into());
    assert!(matches!(bench.registry.reconcile(&key).await, Err(Retry::Later(_))));
    assert_eq!(bench.engine.attached().len(), 0);

    bench.api.with(|world| world.failing = None);
    bench.run().await.unwrap();
    bench.api.with(|world| world.failing = Some(away));
    assert_eq!(bench.registry.reconcile(&key).await, Ok(AT_REST));
    assert!(bench.device().is_some());
    // It is closed when it is released, and the primary is cleared when that can be said again.
    bench.registry.cache.volumes.replace(vec![]);
    assert!(matches!(bench.registry.reconcile(&key).await, Err(Retry::Later(_))));
    assert_eq!(bench.device(), None);
    bench.api.with(|world| world.failing = None);
    bench.attach_to(None);
    bench.run().await.unwrap();
    assert_eq!(bench.volume().primary(), None);
}

#[tokio::test]
async fn a_node_that_was_superseded_stops_serving() {
    let bench = Bench::new();
    bench.attach_to(Some("n1"));
    bench.run().await.unwrap();
    bench.edit(
        "v",
        |world| &mut world.volumes,
        |volume| {
            let config = volume.status.as_mut().unwrap().config.as_mut().unwrap();
            config.epoch = 5;
            config.incarnation = Some(Uuid::new_v4().to_string());
        },
    );
    bench.see();
    assert_eq!(
        bench.registry.reconcile(&Key::Volume("v".into())).await,
        Ok(Next::Again(Duration::ZERO))
    );
    assert_eq!(bench.device(), None);
    assert!(matches!(bench.registry.served.get("v"), Some(Presence::Failed(_))));
    bench.run().await.unwrap();
    assert_eq!(bench.volume().config().unwrap().epoch, 6);
}

#[tokio::test]
async fn a_failed_attach_says_why_once_and_heals() {
    let bench = Bench::new();
    bench.engine.fail_attach("v", Some("superblock 0 and 1 are damaged"));
    bench.attach_to(Some("n1"));
    for _ in 0..3 {
        assert!(matches!(bench.run().await, Err(Retry::Later(_))));
    }
    assert_eq!(bench.attached().reason, reason::ATTACH_FAILED);
    assert!(bench.attached().message.contains("superblock"));
    assert_eq!(bench.replica().phase(), ReplicaPhase::Failed);
    let told = bench.api.with(|world| world.notices.clone());
    assert_eq!(told.iter().filter(|(name, _)| name == "v").count(), 1, "{told:?}");
    assert_eq!(bench.volume().config().unwrap().epoch, 1, "a retry needs no new epoch");

    bench.engine.fail_attach("v", None);
    bench.run().await.unwrap();
    assert!(bench.attached().is_true());
    assert_eq!(bench.replica().phase(), ReplicaPhase::Ready);
}

#[tokio::test]
async fn a_take_over_whose_answer_was_lost_is_undone_when_the_volume_is_wanted_no_longer() {
    let bench = Bench::new();
    bench.run().await.unwrap();
    bench.attach_to(Some("n1"));
    bench.see();
    bench.api.with(|world| world.lost = true);
    let key = Key::Volume("v".into());
    assert!(matches!(bench.registry.reconcile(&key).await, Err(Retry::Later(_))));
    assert_eq!(bench.volume().primary(), Some("n1"));
    assert_eq!(
        bench.engine.attached().len(),
        0,
        "an epoch that was not confirmed opens nothing"
    );
    bench.attach_to(None);
    bench.run().await.unwrap();
    assert_eq!(bench.volume().primary(), None);
}

#[tokio::test]
async fn trouble_of_the_engine_is_told_once_and_stands_in_the_status() {
    let bench = Bench::new();
    bench.attach_to(Some("n1"));
    bench.run().await.unwrap();
    bench
        .engine
        .tell_trouble("v", Some(Trouble::Broken("block 7 is damaged".to_owned())));
    for _ in 0..3 {
        bench.run().await.unwrap();
    }
    let attached = bench.attached();
    assert!(attached.is_true() && attached.reason == reason::IO_ERROR);
    assert!(attached.message.contains("block 7 is damaged"), "{}", attached.message);
    let told = bench.api.with(|world| world.notices.clone());
    assert_eq!(
        told.iter()
            .filter(|(_, notice)| notice.text.contains("block 7"))
            .count(),
        1,
        "{told:?}"
    );
}

#[tokio::test]
async fn a_full_pool_is_named_while_writes_wait_and_forgotten_when_they_went_on() {
    let bench = Bench::new();
    bench.attach_to(Some("n1"));
    bench.run().await.unwrap();
    bench
        .engine
        .tell_trouble("v", Some(Trouble::PoolFull("/pools/fast".into())));
    bench.run().await.unwrap();
    let attached = bench.attached();
    assert!(attached.is_true() && attached.reason == reason::POOL_FULL);
    assert!(attached.message.contains("/pools/fast is full"), "{}", attached.message);
    bench.engine.tell_trouble("v", None);
    bench.run().await.unwrap();
    assert_eq!(bench.attached().reason, reason::READY);
}

#[tokio::test(flavor = "multi_thread")]
async fn on_the_real_engine_a_file_is_found_again_after_release_growth_and_a_new_attach() {
    let dir = temp_dir("registry");
    let config = EngineConfig {
        shards: 1,
        map_budget_bytes: 16 << 20,
        scrub: None,
        runtime_dir: dir.path().join("run"),
        network: crate::engine::Network::default(),
    };
    std::fs::create_dir_all(&config.runtime_dir).unwrap();
    let bench = Bench::with(dir, Arc::new(RealEngine::start(config).unwrap()), Arc::new(RealDisks));
    bench.attach_to(Some("n1"));
    assert_eq!(bench.run().await, Ok(AT_REST));
    bench.stage().await;
    let file = bench.staged().path.join("file");
    std::fs::write(&file, vec![7; 3 << 20]).unwrap();
    bench.edit(
        "v",
        |world| &mut world.volumes,
        |volume| volume.spec.size_bytes = 64 * MIB,
    );
    bench.edit(
        "v-a",
        |world| &mut world.replicas,
        |replica| replica.spec.size_bytes = 64 * MIB,
    );
    assert_eq!(bench.run().await, Ok(AT_REST));
    assert_eq!(bench.device().unwrap().size_bytes, 64 << 20);
    bench.unstage().await;
    bench.attach_to(None);
    assert_eq!(bench.run().await, Ok(Next::Gone));
    assert_eq!((bench.device(), bench.volume().primary()), (None, None));

    bench.attach_to(Some("n1"));
    bench.run().await.unwrap();
    assert_eq!(bench.device().unwrap().size_bytes, 64 << 20);
    bench.stage().await;
    assert_eq!(std::fs::read(&file).unwrap(), vec![7; 3 << 20]);
    bench.unstage().await;
    bench.attach_to(None);
    bench.run().await.unwrap();
    bench.edit(
        "v-a",
        |world| &mut world.replicas,
        |replica| {
            replica.meta_mut().deletion_timestamp = Some(Time(k8s_openapi::jiff::Timestamp::now()));
        },
    );
    bench.run().await.unwrap();
    assert_eq!(std::fs::read_dir(bench.pool_path().join(REPLICAS)).unwrap().count(), 0);
}
