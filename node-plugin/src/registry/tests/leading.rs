//! A volume of three replicas: led where it is attached, once per grant.

use std::net::SocketAddr;

use galleonfs_api::{OutReplica, WriteConcern, reason};
use galleonfs_storage_engine::replication::{Concern, Copies, ReplicaId};

use super::*;
use crate::engine::Route;
use crate::registry::objects::ObjectError;
use crate::served::{Presence, Trouble};

const KEEPING: Next = Next::Again(Duration::from_secs(10));

fn route(replica: &str, node: &str, address: &str) -> Route {
    Route {
        replica: uid_of(replica),
        node: uid_of(node),
        addresses: vec![address.parse::<SocketAddr>().unwrap()],
    }
}

fn both() -> Vec<Route> {
    vec![route("v-b", "n2", "10.0.0.2:9811"), route("v-c", "n3", "10.0.0.3:9811")]
}

#[tokio::test]
async fn a_volume_is_led_as_its_write_concern_says_and_told_where_its_replicas_stand() {
    let replicated = Concern::replicated(2);
    let concerns = [
        (WriteConcern::Durable, replicated),
        (
            WriteConcern::Distributed,
            Concern {
                min_zones: 2,
                ..replicated
            },
        ),
        (
            WriteConcern::Acknowledged,
            Concern {
                copies: Copies::First,
                ..replicated
            },
        ),
    ];
    for (write_concern, concern) in concerns {
        let bench = Bench::of_three();
        bench.edit("v", of_volumes, |volume| volume.spec.write_concern = write_concern);
        for (replica, zone) in [("v-a", "x"), ("v-c", "y")] {
            bench.edit(replica, of_replicas, |replica| replica.spec.zone = Some(zone.into()));
        }
        bench.attach_to(Some("n1"));
        assert_eq!(bench.run().await, Ok(KEEPING));
        let spec = bench.engine.led().pop().unwrap();
        assert_eq!(spec.concern, concern);
        let id = |name: &str| ReplicaId(uid_of(name).into_bytes());
        let zones = [("v-a", "x"), ("v-c", "y")].map(|(name, zone)| (id(name), zone.to_owned()));
        assert_eq!(spec.configs.zones(), zones.into());
    }
}

#[tokio::test]
async fn a_volume_of_three_is_led_with_the_replica_here_in_front_and_then_nothing_is_written_any_more() {
    let bench = Bench::of_three();
    bench.attach_to(Some("n1"));
    assert_eq!(bench.run().await, Ok(KEEPING));
    let config = bench.config();
    assert_eq!((config.epoch, config.primary.as_deref()), (1, Some("n1")));
    let spec = bench.engine.led().pop().unwrap();
    assert_eq!(
        (spec.epoch, Some(spec.incarnation.to_string())),
        (1, config.incarnation)
    );
    assert_eq!(
        (spec.volume_uid, spec.prefer, spec.concern, spec.size_bytes),
        (uid_of("v"), Some(uid_of("v-a")), Concern::replicated(2), 16 << 20)
    );
    assert_eq!(bench.engine.routes_of(uid_of("v")), both());
    assert!(bench.attached().is_true());
    assert_eq!(bench.registry.served.device("v"), bench.device());
    assert_eq!(bench.engine.attached().len(), 0);

    let writes = bench.api.with(|world| world.writes);
    for _ in 0..3 {
        bench.run().await.unwrap();
    }
    assert_eq!(bench.api.with(|world| world.writes), writes);
    assert_eq!(bench.engine.led().len(), 1);
}

#[tokio::test]
async fn a_node_without_a_replica_leads_too() {
    let bench = Bench::of_three();
    bench.api.with(|world| world.replicas.remove("v-a"));
    bench.edit_config(|config| config.in_sync = vec!["v-b".into(), "v-c".into()]);
    bench.attach_to(Some("n1"));
    bench.run().await.unwrap();
    assert_eq!(bench.engine.led().pop().unwrap().prefer, None);
    assert_eq!(bench.engine.routes_of(uid_of("v")), both());
    assert!(bench.device().is_some());
}

#[tokio::test]
async fn after_the_death_of_the_primarys_node_a_new_epoch_begins_and_who_was_catching_up_starts_again() {
    let bench = Bench::of_three();
    bench.edit_config(|config| {
        config.epoch = 4;
        config.primary = Some("n2".into());
        config.incarnation = Some(Uuid::new_v4().to_string());
        config.in_sync = vec!["v-a".into(), "v-b".into()];
        config.syncing = vec!["v-c".into()];
        config.out = [(
            "v-c".into(),
            OutReplica {
                epoch: 3,
                flushed_seq: 9,
            },
        )]
        .into();
    });
    bench.attach_to(Some("n1"));
    bench.run().await.unwrap();
    let config = bench.config();
    assert_eq!((config.epoch, config.primary.as_deref()), (5, Some("n1")));
    assert_eq!(config.in_sync, ["v-a", "v-b"]);
    assert!(config.syncing.is_empty());
    assert_eq!(
        config.out["v-c"],
        OutReplica {
            epoch: 3,
            flushed_seq: 9
        }
    );
    assert!(bench.device().is_some());
}

#[tokio::test]
async fn a_volume_of_three_waits_for_the_word_that_its_replicas_have_its_size() {
    let bench = Bench::of_three();
    bench.edit("v", of_volumes, |volume| {
        volume.status.as_mut().unwrap().observed_size_bytes = None;
    });
    bench.attach_to(Some("n1"));
    assert_eq!(bench.run().await, Ok(Next::Wait));
    assert_eq!((bench.config().epoch, bench.engine.led().len()), (0, 0));
}

#[tokio::test]
async fn a_grant_serves_for_one_attempt() {
    let bench = Bench::of_three();
    bench.engine.fail_attach("v", Some("one of three replicas answers"));
    bench.attach_to(Some("n1"));
    bench.run().await.unwrap();
    assert_eq!(bench.engine.led().len(), 1);
    assert_eq!(bench.attached().reason, reason::ATTACH_FAILED);
    assert!(bench.attached().message.contains("one of three replicas answers"));
    assert!(matches!(bench.registry.served.get("v"), Some(Presence::Failed(_))));
    let config = bench.config();
    assert_eq!(
        (config.epoch, config.primary, config.incarnation),
        (1, None, None),
        "the epoch was ended"
    );
    assert_eq!(bench.engine.routes_of(uid_of("v")), []);

    bench.engine.fail_attach("v", None);
    bench.run().await.unwrap();
    assert_eq!(bench.engine.led().len(), 1, "not at once");
    bench.lose_patience();
    bench.run().await.unwrap();
    let epochs: Vec<u64> = bench.engine.led().iter().map(|spec| spec.epoch).collect();
    assert_eq!(epochs, [1, 2]);
    let incarnations: Vec<Uuid> = bench.engine.led().iter().map(|spec| spec.incarnation).collect();
    assert_ne!(incarnations[0], incarnations[1]);
    assert!(bench.attached().is_true());
}

#[tokio::test]
async fn what_a_failed_attempt_left_is_ended_before_the_next_one() {
    let bench = Bench::of_three();
    bench.run().await.unwrap();
    bench.engine.fail_attach("v", Some("no"));
    bench.attach_to(Some("n1"));
    bench.see();
    let key = Key::Volume("v".into());
    bench.registry.reconcile(&key).await.unwrap();
    bench.see();
    let held = bench.engine.hold_leading().await;
    let (looked, ()) = tokio::join!(bench.registry.reconcile(&key), async {
        while bench.engine.led().is_empty() {
            tokio::task::yield_now().await;
        }
        bench
            .api
            .with(|world| world.refusing = Some(ObjectError::Away("no answer".into())));
        drop(held);
    });
    assert!(matches!(looked, Err(Retry::Later(_))));
    bench.engine.fail_attach("v", None);
    bench.lose_patience();
    bench.see();
    assert!(matches!(bench.registry.reconcile(&key).await, Err(Retry::Later(_))));
    assert_eq!(bench.engine.led().len(), 1);
    bench.api.with(|world| world.refusing = None);
    bench.run().await.unwrap();
    assert_eq!((bench.config().epoch, bench.engine.led().len()), (2, 2));
}

#[tokio::test]
async fn a_replica_in_sync_that_nobody_knows_keeps_a_volume_down_and_is_named() {
    let bench = Bench::of_three();
    bench.api.with(|world| world.replicas.remove("v-c"));
    bench.attach_to(Some("n1"));
    bench.run().await.unwrap();
    assert!(bench.attached().message.contains("v-c"), "{}", bench.attached().message);
    assert_eq!(bench.engine.led().len(), 0);
}

#[tokio::test]
async fn a_release_ends_the_epoch_and_is_repeated_while_the_api_server_is_away() {
    let bench = Bench::of_three();
    bench.attach_to(Some("n1"));
    bench.run().await.unwrap();
    bench.attach_to(None);
    bench.see();
    bench
        .api
        .with(|world| world.refusing = Some(ObjectError::Away("no answer".into())));
    let key = Key::Volume("v".into());
    assert!(matches!(bench.registry.reconcile(&key).await, Err(Retry::Later(_))));
    assert_eq!(bench.config().primary.as_deref(), Some("n1"));
    bench.api.with(|world| world.refusing = None);
    let writes = bench.api.with(|world| world.writes);
    assert_eq!(bench.run().await, Ok(Next::Gone));
    assert_eq!(
        bench.api.with(|world| world.writes),
        writes + 1,
        "all of it in one write"
    );
    let volume = bench.volume();
    let config = volume.config().unwrap();
    assert_eq!((config.epoch, &config.primary, &config.incarnation), (1, &None, &None));
    assert_eq!(volume.status.as_ref().unwrap().device, None);
    assert_eq!(bench.attached().reason, reason::DETACHED);
    assert_eq!(bench.engine.routes_of(uid_of("v")), []);
    assert!(bench.engine.hosted(uid_of("v-a")).is_some(), "the replica stays");

    bench.attach_to(Some("n1"));
    bench.run().await.unwrap();
    assert_eq!(bench.config().epoch, 2);
}

#[tokio::test]
async fn a_primary_that_was_superseded_ends_and_leaves_the_object_alone() {
    let bench = Bench::of_three();
    bench.attach_to(Some("n1"));
    bench.run().await.unwrap();
    bench.attach_to(Some("n2"));
    bench.edit_config(|config| {
        config.epoch = 2;
        config.primary = Some("n2".into());
        config.incarnation = Some(Uuid::new_v4().to_string());
    });
    let before = bench.volume();
    assert_eq!(bench.run().await, Ok(Next::Gone));
    assert_eq!(bench.device(), None);
    assert_eq!(bench.volume(), before);
}

#[tokio::test]
async fn another_start_under_our_name_makes_this_one_yield() {
    let bench = Bench::of_three();
    bench.attach_to(Some("n1"));
    bench.run().await.unwrap();
    bench.edit_config(|config| {
        config.epoch = 2;
        config.incarnation = Some(Uuid::new_v4().to_string());
    });
    bench.see();
    let looked = bench.registry.reconcile(&Key::Volume("v".into())).await;
    assert_eq!((looked, bench.device()), (Ok(Next::Again(Duration::ZERO)), None));
    assert_eq!(bench.config().epoch, 2, "it ended nothing that was not its own");
}

#[tokio::test]
async fn routes_follow_the_configuration_and_the_pools() {
    let bench = Bench::of_three();
    bench.attach_to(Some("n1"));
    bench.run().await.unwrap();
    bench.edit("default.n2", of_pools, |pool| {
        pool.status.as_mut().unwrap().endpoint.as_mut().unwrap().address = "10.0.0.22:9811".into();
    });
    bench.forget_reached();
    bench.run().await.unwrap();
    assert_eq!(
        bench.engine.routes_of(uid_of("v")),
        both(),
        "nobody asks while all is well"
    );

    bench
        .engine
        .tell_trouble("v", Some(Trouble::Waiting("v-b does not answer".into())));
    bench.run().await.unwrap();
    assert_eq!(
        bench.engine.routes_of(uid_of("v"))[0],
        route("v-b", "n2", "10.0.0.22:9811")
    );
    assert_eq!(bench.attached().reason, reason::WAITING_FOR_REPLICAS);

    bench.engine.tell_trouble("v", None);
    bench.add_replica("v-d", "n4", "10.0.0.4:9811");
    let looks = bench.engine.looks().len();
    bench.edit_config(|config| {
        config.in_sync = vec!["v-a".into(), "v-c".into()];
        config.out = [
            ("v-b".into(), OutReplica::default()),
            ("v-d".into(), OutReplica::default()),
        ]
        .into();
    });
    bench.run().await.unwrap();
    assert!(bench.engine.looks().len() > looks, "the primary is told to look");
    let routes = bench.engine.routes_of(uid_of("v"));
    assert!(
        routes.contains(&route("v-d", "n4", "10.0.0.4:9811")) && routes.len() == 3,
        "{routes:?}"
    );
}

#[tokio::test]
async fn what_the_primary_itself_changed_need_not_be_looked_at() {
    let bench = Bench::of_three();
    bench.attach_to(Some("n1"));
    bench.run().await.unwrap();
    let configs = bench.engine.led().pop().unwrap().configs;
    let (done, read) = tokio::sync::oneshot::channel();
    configs.read(Box::new(move |found| drop(done.send(found))));
    assert!(read.await.unwrap().is_some());
    let looks = bench.engine.looks().len();
    bench.run().await.unwrap();
    assert_eq!(bench.engine.looks().len(), looks);
}

#[tokio::test]
async fn a_volume_that_is_wanted_no_longer_is_not_waited_for() {
    let bench = Bench::of_three();
    bench.run().await.unwrap();
    let held = bench.engine.hold_leading().await;
    bench.attach_to(Some("n1"));
    bench.see();
    let key = Key::Volume("v".into());
    bench.registry.reconcile(&key).await.unwrap();
    bench.see();
    let (looked, ()) = tokio::join!(bench.registry.reconcile(&key), async {
        while bench.engine.led().is_empty() {
            tokio::task::yield_now().await;
        }
        bench.attach_to(None);
        bench.see();
    });
    assert!(matches!(looked, Err(Retry::Soon(_))), "{looked:?}");
    drop(held);
    assert_eq!(bench.run().await, Ok(Next::Gone));
    assert_eq!((bench.device(), bench.config().primary), (None, None));
}

#[tokio::test]
async fn after_a_restart_a_volume_of_three_is_led_in_a_new_epoch() {
    let mut bench = Bench::of_three();
    bench.attach_to(Some("n1"));
    bench.run().await.unwrap();
    let _dead = bench.restart();
    assert_eq!(bench.run().await, Ok(KEEPING));
    assert_eq!((bench.config().epoch, bench.engine.led().len()), (2, 1));
    assert!(bench.device().is_some() && bench.engine.hosted(uid_of("v-a")).is_some());
}

#[tokio::test]
async fn the_primary_is_told_once_who_is_to_leave() {
    let bench = Bench::of_three();
    bench.attach_to(Some("n1"));
    bench.run().await.unwrap();
    assert_eq!(bench.engine.leaving(), []);
    let told = |name: &str| Some(name.to_string());
    bench.edit("v", of_volumes, |volume| volume.spec.leaving = told("v-c"));
    for _ in 0..3 {
        bench.run().await.unwrap();
    }
    let first = ("v".to_string(), Some(uid_of("v-c")));
    assert_eq!(bench.engine.leaving(), std::slice::from_ref(&first));
    bench.edit("v", of_volumes, |volume| volume.spec.leaving = told("v-x"));
    bench.run().await.unwrap();
    assert_eq!(
        bench.engine.leaving(),
        [first, ("v".to_string(), None)],
        "there is no such replica"
    );
}
