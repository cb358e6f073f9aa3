//! A volume's configuration, read and changed for its primary.

use galleonfs_api::{OutReplica, reason};
use galleonfs_storage_engine::replication::primary::Decision;
use galleonfs_storage_engine::replication::{Change, Config, Incarnation, ReplicaId, Stamp};
use galleonfs_storage_engine::types::{Epoch, Seq, Version};

use super::*;
use crate::engine::Configs;
use crate::registry::configs::VolumeConfigs;
use crate::registry::objects::ObjectError;

fn id(name: &str) -> ReplicaId {
    ReplicaId(uid_of(name).into_bytes())
}

fn configs(bench: &Bench) -> VolumeConfigs {
    VolumeConfigs::new(bench.api.clone(), "n1", "v", uid_of("v"))
}

async fn read(configs: &VolumeConfigs) -> Option<(Stamp, Config)> {
    let (done, read) = tokio::sync::oneshot::channel();
    configs.read(Box::new(move |found| drop(done.send(found))));
    read.await.unwrap()
}

async fn propose(configs: &VolumeConfigs, expected: Stamp, config: Config) -> Decision {
    let (done, decided) = tokio::sync::oneshot::channel();
    let tell = Box::new(move |decision| {
        let _ = done.send(decision);
    });
    configs.propose(expected, config, tell);
    decided.await.unwrap()
}

/// A bench whose volume was claimed, and a reader of its configuration.
async fn claimed() -> (Bench, VolumeConfigs, Stamp, Config) {
    let bench = Bench::of_three();
    bench.edit_config(|config| {
        config.epoch = 3;
        config.primary = Some("n1".into());
        config.incarnation = Some(uid_of("start").to_string());
    });
    let configs = configs(&bench);
    let (stamp, config) = read(&configs).await.unwrap();
    (bench, configs, stamp, config)
}

fn is_lagging() -> Version {
    Version {
        epoch: Epoch(3),
        seq: Seq(41),
    }
}

#[tokio::test]
async fn what_is_written_is_what_is_read_again_in_names_and_in_ids() {
    let (bench, configs, stamp, config) = claimed().await;
    assert_eq!(config.epoch, Epoch(3));
    assert_eq!(config.incarnation, Some(Incarnation(uid_of("start").into_bytes())));
    assert_eq!(config.in_sync, [id("v-a"), id("v-b"), id("v-c")].into());

    let without = config.with(&Change::Drop([id("v-b")].into(), is_lagging()));
    let Decision::Made(stamp) = propose(&configs, stamp, without.clone()).await else {
        panic!("nobody else changed it");
    };
    let written = bench.config();
    assert_eq!(written.in_sync, ["v-a", "v-c"]);
    assert_eq!(
        written.out["v-b"],
        OutReplica {
            epoch: 3,
            flushed_seq: 41
        }
    );
    assert_eq!(
        (written.epoch, written.primary.as_deref()),
        (3, Some("n1")),
        "the rest is as it was"
    );

    let back = without.with(&Change::Sync(id("v-b")));
    let Decision::Made(stamp) = propose(&configs, stamp, back.clone()).await else {
        panic!("the stamp is the one of the last change");
    };
    assert_eq!(bench.config().syncing, ["v-b"]);
    assert_eq!(read(&self::configs(&bench)).await.unwrap().1, back);
    assert_eq!(
        read(&configs).await,
        Some((stamp, back)),
        "the same state, the same stamp"
    );
    assert_eq!(configs.latest(), Some(bench.config()));
}

#[tokio::test]
async fn what_others_say_in_the_status_is_carried_along() {
    let (bench, _, _, _) = claimed().await;
    let condition = Condition::new(condition_type::READY, true, reason::READY, "three replicas");
    bench.edit("v", of_volumes, |volume| {
        volume.status.as_mut().unwrap().conditions.push(condition.clone());
    });
    let configs = configs(&bench);
    let (stamp, config) = read(&configs).await.unwrap();
    let without = config.with(&Change::Drop([id("v-b")].into(), is_lagging()));
    assert!(matches!(propose(&configs, stamp, without).await, Decision::Made(_)));
    let status = bench.volume().status.unwrap();
    assert_eq!(status.conditions, [condition]);
    assert_eq!(status.observed_size_bytes, Some(16 * MIB));
}

#[tokio::test]
async fn a_change_is_made_only_of_what_was_read() {
    let (bench, configs, stamp, config) = claimed().await;
    bench.edit("v", of_volumes, |volume| {
        volume.status.as_mut().unwrap().observed_size_bytes = Some(32 * MIB);
    });
    let before = bench.volume();
    let without = config.with(&Change::Drop([id("v-b")].into(), is_lagging()));
    assert_eq!(propose(&configs, stamp, without.clone()).await, Decision::Conflict);
    assert_eq!(bench.volume(), before);
    let (newer, again) = read(&configs).await.unwrap();
    assert_ne!(newer, stamp);
    assert_eq!(again, config);
    assert_eq!(propose(&configs, stamp, without.clone()).await, Decision::Conflict);
    assert!(matches!(propose(&configs, newer, without).await, Decision::Made(_)));
}

#[tokio::test]
async fn a_state_that_was_read_long_ago_is_no_base_for_a_change() {
    let (bench, configs, stamp, config) = claimed().await;
    for size in 17..40 {
        bench.edit("v", of_volumes, |volume| {
            volume.status.as_mut().unwrap().observed_size_bytes = Some(size * MIB);
        });
        read(&configs).await.unwrap();
    }
    let without = config.with(&Change::Drop([id("v-b")].into(), is_lagging()));
    assert_eq!(propose(&configs, stamp, without).await, Decision::Conflict);
    assert_eq!(bench.config().in_sync.len(), 3);
}

#[tokio::test]
async fn an_answer_that_was_lost_is_not_taken_for_a_yes_or_a_no() {
    let (bench, configs, stamp, config) = claimed().await;
    bench.api.with(|world| world.lost = true);
    let without = config.with(&Change::Drop([id("v-b")].into(), is_lagging()));
    assert_eq!(propose(&configs, stamp, without.clone()).await, Decision::Unknown);
    assert_eq!(read(&configs).await.unwrap().1, without, "it was made");

    bench
        .api
        .with(|world| world.failing = Some(ObjectError::Away("503".into())));
    assert_eq!(read(&configs).await, None);
    assert_eq!(propose(&configs, stamp, without).await, Decision::Unknown);
}

#[tokio::test]
async fn an_api_server_that_hangs_gives_no_answer_in_time() {
    let (bench, _, _, _) = claimed().await;
    let configs = VolumeConfigs::with_deadline(bench.api.clone(), "n1", "v", uid_of("v"), Duration::from_millis(10));
    let (stamp, config) = read(&configs).await.unwrap();
    bench.api.with(|world| world.hanging = true);
    assert_eq!(read(&configs).await, None);
    assert_eq!(propose(&configs, stamp, config).await, Decision::Unknown);
    bench.api.with(|world| world.hanging = false);
    assert!(read(&configs).await.is_some(), "one that hung holds up nobody after it");
}

#[tokio::test]
async fn a_refused_change_was_not_made() {
    let (bench, configs, stamp, config) = claimed().await;
    let refused = ObjectError::Refused("status.config: Invalid value".into());
    bench.api.with(|world| world.refusing = Some(refused));
    let without = config.with(&Change::Drop([id("v-b")].into(), is_lagging()));
    assert_eq!(propose(&configs, stamp, without).await, Decision::Conflict);
    assert_eq!(read(&configs).await, Some((stamp, config)));
}

#[tokio::test]
async fn the_end_of_an_epoch_says_that_the_volume_is_attached_no_longer() {
    let bench = Bench::of_three();
    bench.attach_to(Some("n1"));
    bench.run().await.unwrap();
    assert!(bench.attached().is_true());
    let configs = configs(&bench);
    let (stamp, config) = read(&configs).await.unwrap();
    let released = config.with(&Change::Release);
    assert!(matches!(propose(&configs, stamp, released).await, Decision::Made(_)));
    let volume = bench.volume();
    let written = volume.config().unwrap();
    assert_eq!(
        (&written.primary, &written.incarnation, written.epoch),
        (&None, &None, 1)
    );
    assert_eq!(volume.status.as_ref().unwrap().device, None);
    assert_eq!(bench.attached().reason, reason::DETACHED);
}

#[tokio::test]
async fn a_member_that_nobody_knows_makes_a_configuration_unreadable_until_it_is_known() {
    let (bench, _, _, _) = claimed().await;
    let gone = bench.api.with(|world| world.replicas.remove("v-c")).unwrap();
    let configs = configs(&bench);
    assert_eq!(read(&configs).await, None);
    bench.api.with(|world| world.replicas.insert("v-c".into(), gone));
    assert!(read(&configs).await.is_some());
    let other = VolumeConfigs::new(bench.api.clone(), "n1", "v", uid_of("an earlier v"));
    assert_eq!(read(&other).await, None, "that is another volume");
}

#[tokio::test]
async fn one_that_is_out_and_has_no_object_is_passed_over_and_stays_on_record() {
    let (bench, _, _, _) = claimed().await;
    let had = OutReplica {
        epoch: 2,
        flushed_seq: 5,
    };
    bench.edit_config(|config| config.out = [("v-x".into(), had)].into());
    let configs = configs(&bench);
    let (stamp, config) = read(&configs).await.unwrap();
    assert!(config.out.is_empty());
    let without = config.with(&Change::Drop([id("v-b")].into(), is_lagging()));
    assert!(matches!(propose(&configs, stamp, without).await, Decision::Made(_)));
    let written = bench.config();
    assert_eq!(written.out["v-x"], had);
    assert_eq!(written.out.len(), 2);
}
