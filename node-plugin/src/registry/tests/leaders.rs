//! Who leads a volume, looked up before another node is obeyed.

use galleonfs_storage_engine::replication::Incarnation;
use galleonfs_storage_engine::types::Epoch;

use super::*;
use crate::engine::{Leader, Leaders, Leadership};
use crate::registry::leaders::LookUps;
use crate::registry::objects::ObjectError;

async fn look_up(leaders: &Arc<dyn Leaders>, peer: Uuid) -> Option<Leadership> {
    let (done, found) = tokio::sync::oneshot::channel();
    leaders.look_up(peer, Box::new(move |leadership| drop(done.send(leadership))));
    found.await.unwrap()
}

/// A volume that was claimed, and whoever looks up who leads it.
fn claimed() -> (Bench, Arc<dyn Leaders>) {
    let bench = Bench::of_three();
    bench.edit_config(|config| {
        config.epoch = 3;
        config.primary = Some("n2".into());
        config.incarnation = Some(uid_of("start").to_string());
    });
    let leaders = LookUps::new(bench.api.clone()).of("v", uid_of("v"));
    (bench, leaders)
}

fn led_by_n2(node: Option<Uuid>) -> Leadership {
    Leadership {
        epoch: Epoch(3),
        leader: Some(Leader {
            incarnation: Incarnation(uid_of("start").into_bytes()),
            name: "n2".into(),
            node,
        }),
    }
}

#[tokio::test]
async fn the_object_says_who_leads_and_the_node_of_that_name_which_certificate_that_is() {
    let (bench, leaders) = claimed();
    let found = look_up(&leaders, uid_of("n2")).await;
    assert_eq!(found, Some(led_by_n2(Some(uid_of("n2")))));
    assert_eq!(look_up(&leaders, uid_of("n1")).await, found, "whoever asks");

    bench.edit_config(|config| (config.primary, config.incarnation) = (None, None));
    let nobody = Leadership {
        epoch: Epoch(3),
        leader: None,
    };
    assert_eq!(look_up(&leaders, uid_of("n2")).await, Some(nobody));
}

#[tokio::test]
async fn a_node_that_joined_again_under_its_name_is_another_one() {
    let (bench, leaders) = claimed();
    assert_eq!(
        look_up(&leaders, uid_of("n2")).await,
        Some(led_by_n2(Some(uid_of("n2"))))
    );
    let again = uid_of("n2 again");
    bench.api.with(|world| world.nodes.insert("n2".into(), Some(again)));
    for peer in [uid_of("n2"), again, uid_of("n2")] {
        assert_eq!(look_up(&leaders, peer).await, Some(led_by_n2(Some(again))));
    }
    bench.api.with(|world| world.nodes.insert("n2".into(), None));
    assert_eq!(look_up(&leaders, uid_of("n2")).await, Some(led_by_n2(None)));
}

#[tokio::test]
async fn a_wrong_guess_is_asked_again_and_a_right_one_is_not() {
    let (bench, leaders) = claimed();
    let reads = || bench.api.with(|world| std::mem::take(&mut world.node_reads));
    look_up(&leaders, uid_of("n2")).await.unwrap();
    assert_eq!(reads(), 1, "nothing to guess by");
    look_up(&leaders, uid_of("n2")).await.unwrap();
    assert_eq!(reads(), 1, "beside the volume");
    bench.edit_config(|config| (config.epoch, config.primary) = (4, Some("n3".into())));
    let found = look_up(&leaders, uid_of("n2")).await.unwrap().leader.unwrap();
    assert_eq!((found.name.as_str(), found.node), ("n3", Some(uid_of("n3"))));
    assert_eq!(reads(), 2);
}

#[tokio::test]
async fn what_cannot_be_read_names_nobody_and_is_not_told_at_once() {
    let (bench, _) = claimed();
    let leaders = LookUps::with_deadline(bench.api.clone(), Duration::from_millis(10)).of("v", uid_of("v"));
    let before = tokio::time::Instant::now();
    bench
        .api
        .with(|world| world.failing = Some(ObjectError::Away("503".into())));
    assert_eq!(look_up(&leaders, uid_of("n2")).await, None);
    assert!(before.elapsed() >= Duration::from_millis(500));
    bench.api.with(|world| (world.failing, world.hanging) = (None, true));
    assert_eq!(look_up(&leaders, uid_of("n2")).await, None, "one that hangs");
    bench.api.with(|world| world.hanging = false);
    assert!(look_up(&leaders, uid_of("n2")).await.is_some());
}

#[tokio::test]
async fn a_volume_that_is_gone_or_another_of_its_name_is_led_by_nobody() {
    let (bench, _) = claimed();
    let nobody = Some(Leadership {
        epoch: Epoch(0),
        leader: None,
    });
    let earlier = LookUps::new(bench.api.clone()).of("v", uid_of("an earlier v"));
    assert_eq!(look_up(&earlier, uid_of("n2")).await, nobody);
    let gone = LookUps::new(bench.api.clone()).of("w", uid_of("w"));
    assert_eq!(look_up(&gone, uid_of("n2")).await, nobody);
}
