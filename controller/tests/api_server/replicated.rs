//! Volumes of several replicas, with a real API server behind the socket.

use std::{collections::BTreeSet, time::Duration};

use galleonfs_api::{
    ANNOTATION_REPLACES, Condition, GalleonReplica, GalleonVolume, MEMBER_FINALIZER, OutReplica, REPLICA_FINALIZER,
    StoragePool, VolumeConfig, WriteConcern, condition, condition_type, reason,
    size::{GIB, MIB, reserved_bytes},
};
use galleonfs_controller::Delay;
use galleonfs_csi_proto::csi::{
    CapacityRange, ControllerExpandVolumeRequest, CreateVolumeRequest, GetCapacityRequest, TopologyRequirement,
};
use kube::{
    ResourceExt,
    api::{ListParams, PostParams},
    runtime::{conditions, wait::await_condition},
};
use tonic::{Code, Request, Status};

use crate::{
    fake_node::{Behaviour, FakeNode},
    lab::{Lab, Running},
    scenarios::{
        create, create_request, delete, place, pool, pools, promised, publish_request, replicas, unpublish_request,
        volume_becomes, volumes, within,
    },
};

fn several(name: &str, size_bytes: i64, replica_count: usize) -> CreateVolumeRequest {
    CreateVolumeRequest {
        parameters: [("replicaCount".to_string(), replica_count.to_string())].into(),
        ..create_request(name, size_bytes)
    }
}

async fn nodes_with(lab: &Lab, usable: &[(&str, i64)]) -> Vec<FakeNode> {
    let mut nodes = vec![];
    for (node, usable_bytes) in usable {
        nodes.push(pool(lab, node, *usable_bytes, Behaviour::default()).await);
    }
    nodes
}

async fn made(lab: &Lab) -> Vec<GalleonReplica> {
    replicas(lab)
        .list(&ListParams::default())
        .await
        .expect("replicas")
        .items
}

async fn volume(lab: &Lab, name: &str) -> GalleonVolume {
    volumes(lab).get(name).await.expect("the volume")
}

fn config(volume: &GalleonVolume) -> VolumeConfig {
    volume.config().expect("a configuration").clone()
}

async fn expand(controller: &mut Running, name: &str, bytes: i64) -> Result<i64, Status> {
    let request = ControllerExpandVolumeRequest {
        volume_id: name.to_string(),
        capacity_range: Some(CapacityRange {
            required_bytes: bytes,
            limit_bytes: 0,
        }),
        ..Default::default()
    };
    let answer = controller.controller.controller_expand_volume(request).await?;
    Ok(answer.into_inner().capacity_bytes)
}

pub async fn a_volume_of_several_lives_from_creation_to_deletion(lab: Lab) {
    let room = [
        ("node-a", 10 * GIB),
        ("node-b", 10 * GIB),
        ("node-c", 11 * GIB),
        ("node-d", 12 * GIB),
    ];
    let _nodes = nodes_with(&lab, &room).await;
    let mut controller = lab.controller("c", false).await;
    let request = CreateVolumeRequest {
        // As the provisioner asks when it was told to offer the scheduler's choice and nothing else.
        accessibility_requirements: Some(TopologyRequirement {
            requisite: vec![place("node-b")],
            preferred: vec![place("node-b")],
        }),
        ..several("v", GIB, 3)
    };
    let answer = create(&mut controller, request.clone()).await.expect("created");
    assert_eq!(answer.accessible_topology, [], "it can be used everywhere");
    assert_eq!(create(&mut controller, request).await.expect("the same again"), answer);

    let own = made(&lab).await;
    let nodes: BTreeSet<&str> = own.iter().map(|replica| replica.spec.node_name.as_str()).collect();
    // Two zones of two nodes each: the preferred node, then the emptiest of the other zone, then either.
    assert!(
        own.len() == 3 && nodes.len() == 3 && nodes.contains("node-b") && nodes.contains("node-d"),
        "{nodes:?}"
    );
    for replica in &own {
        assert!(replica.spec.replicated);
        assert_eq!(replica.finalizers(), [REPLICA_FINALIZER, MEMBER_FINALIZER]);
        assert_eq!(replica.spec.reserved_bytes, reserved_bytes(GIB));
    }
    let settled = volume(&lab, "v").await;
    assert_eq!(settled.spec.write_concern, WriteConcern::Replicated);
    let names: BTreeSet<String> = own.iter().map(ResourceExt::name_any).collect();
    assert_eq!(config(&settled).in_sync.into_iter().collect::<BTreeSet<_>>(), names);
    assert_eq!(config(&settled).epoch, 0);

    let elsewhere = ["node-a", "node-b", "node-c", "node-d"]
        .into_iter()
        .find(|node| !nodes.contains(node));
    let elsewhere = elsewhere.expect("four nodes, three replicas");
    let publish = Request::new(publish_request("v", elsewhere));
    controller
        .controller
        .controller_publish_volume(publish)
        .await
        .expect("attached without a replica");
    volume_becomes(&lab, "v", |volume| volume.primary() == Some(elsewhere)).await;

    assert_eq!(
        expand(&mut controller, "v", 2 * GIB).await.expect("room everywhere"),
        2 * GIB
    );
    volume_becomes(&lab, "v", |volume| {
        volume
            .status
            .as_ref()
            .is_some_and(|status| status.observed_size_bytes == Some(2 * GIB))
    })
    .await;
    assert!(
        made(&lab)
            .await
            .iter()
            .all(|replica| replica.spec.size_bytes == 2 * GIB)
    );

    let unpublish = within(30, unpublish_request("v", elsewhere));
    controller
        .controller
        .controller_unpublish_volume(unpublish)
        .await
        .expect("detached");
    assert_eq!(volume(&lab, "v").await.primary(), None, "in order, as the node is well");
    delete(&mut controller, "v").await.expect("deleted");
    assert!(volumes(&lab).get_opt("v").await.expect("a read").is_none());
    assert!(made(&lab).await.is_empty());
    assert_eq!(promised(&lab).await, Vec::<String>::new());
    controller.stop().await;
}

pub async fn too_few_nodes_leave_nothing_behind_and_a_failed_one_is_passed_over(lab: Lab) {
    let _small = nodes_with(
        &lab,
        &[("node-a", 10 * GIB), ("node-b", 10 * GIB), ("node-c", 10 * MIB)],
    )
    .await;
    let mut controller = lab.controller("c", false).await;
    let status = create(&mut controller, several("v", GIB, 3))
        .await
        .expect_err("node-c is full");
    assert_eq!(status.code(), Code::ResourceExhausted);
    for part in [
        "3 replicas need 3 nodes",
        "beside node-a, node-b there is no other",
        "default.node-c has 10 MiB free",
    ] {
        assert!(status.message().contains(part), "{} lacks {part:?}", status.message());
    }
    assert!(volumes(&lab).get_opt("v").await.expect("a read").is_none());
    assert!(made(&lab).await.is_empty() && promised(&lab).await.is_empty());
    let request = GetCapacityRequest {
        parameters: several("v", GIB, 3).parameters,
        accessible_topology: Some(place("node-a")),
        ..Default::default()
    };
    let room = controller
        .controller
        .get_capacity(request)
        .await
        .expect("an answer")
        .into_inner();
    assert!(room.maximum_volume_size.expect("a largest size") < GIB, "{room:?}");

    // The emptiest of all, so it is tried first; and it fails.
    let fails = Behaviour {
        fails: true,
        ..Behaviour::default()
    };
    let _bad = pool(&lab, "node-d", 90 * GIB, fails).await;
    let status = create(&mut controller, several("w", GIB, 2))
        .await
        .expect_err("node-d fails");
    assert!(
        status.code() == Code::ResourceExhausted && status.message().contains("ReadOnly"),
        "{status}"
    );
    let tried = made(&lab).await;
    assert_eq!(tried.len(), 2);
    create(&mut controller, several("w", GIB, 2))
        .await
        .expect("there is another");
    let config = config(&volume(&lab, "w").await);
    let failed = tried
        .iter()
        .find(|replica| replica.spec.node_name == "node-d")
        .expect("it was tried");
    assert!(
        config.in_sync.len() == 2 && !config.in_sync.contains(&failed.name_any()),
        "{config:?}"
    );
    let uid = failed.uid().expect("a uid");
    let gone = conditions::is_deleted(&uid);
    await_condition(replicas(&lab), &failed.name_any(), gone)
        .await
        .expect("a watch");
    delete(&mut controller, "w").await.expect("deleted");
    controller.stop().await;
}

pub async fn growth_beyond_one_of_the_pools_changes_none_of_them(lab: Lab) {
    let _nodes = nodes_with(&lab, &[("node-a", 20 * GIB), ("node-b", 20 * GIB), ("node-c", 4 * GIB)]).await;
    let mut controller = lab.controller("c", false).await;
    create(&mut controller, several("v", GIB, 3)).await.expect("created");
    let status = expand(&mut controller, "v", 8 * GIB)
        .await
        .expect_err("node-c is small");
    assert!(
        status.code() == Code::ResourceExhausted && status.message().contains("default.node-c"),
        "{status}"
    );
    assert_eq!(volume(&lab, "v").await.spec.size_bytes, GIB);
    let pools: Vec<StoragePool> = pools(&lab).list(&ListParams::default()).await.expect("pools").items;
    for reservation in pools
        .into_iter()
        .flat_map(|pool| pool.status.unwrap_or_default().reservations.into_values())
    {
        assert!(reservation.bytes <= reserved_bytes(GIB), "{reservation:?}");
    }
    assert_eq!(
        expand(&mut controller, "v", 2 * GIB).await.expect("room for that"),
        2 * GIB
    );
    controller.stop().await;
}

pub async fn two_controllers_do_not_share_out_room_that_is_enough_for_one(lab: Lab) {
    const ROOM_FOR: usize = 2;
    const ASKED: usize = 6;
    let usable = reserved_bytes(GIB) * ROOM_FOR as i64 + MIB;
    let _nodes = nodes_with(&lab, &[("node-a", usable), ("node-b", usable), ("node-c", usable)]).await;
    let controllers = [
        lab.controller("first", false).await,
        lab.controller("second", false).await,
    ];
    let asked = (0..ASKED).map(|index| {
        let mut client = controllers[index % 2].controller.clone();
        async move {
            loop {
                let request = within(30, several(&format!("claim-{index}"), GIB, 3));
                match client.create_volume(request).await {
                    Err(status) if status.code() == Code::Aborted => {}
                    outcome => break outcome.map(drop),
                }
            }
        }
    });
    let outcomes = futures::future::join_all(asked).await;
    let won = outcomes.iter().filter(|outcome| outcome.is_ok()).count();
    assert_eq!(won, ROOM_FOR, "{outcomes:?}");
    let refused = outcomes.iter().filter_map(|outcome| outcome.as_ref().err());
    assert!(
        refused.clone().all(|status| status.code() == Code::ResourceExhausted),
        "{outcomes:?}"
    );
    let promised: i64 = made(&lab).await.iter().map(|replica| replica.spec.reserved_bytes).sum();
    assert!(promised <= 3 * usable);
    for controller in controllers {
        controller.stop().await;
    }
}

pub async fn a_dead_primary_keeps_nobody_from_moving_or_deleting_its_volume(lab: Lab) {
    let _nodes = nodes_with(&lab, &[("node-a", 9 * GIB), ("node-b", 9 * GIB), ("node-c", 9 * GIB)]).await;
    let mut controller = lab.controller("c", false).await;
    create(&mut controller, several("v", GIB, 3)).await.expect("created");
    // It served the volume, and there is no such node any more.
    as_primary(&lab, "v", |config| {
        (config.epoch, config.primary, config.incarnation) = (4, Some("node-x".into()), Some("its-last".into()));
    })
    .await;

    let mut client = controller.controller.clone();
    let unpublish = within(5, unpublish_request("v", "node-x"));
    client
        .controller_unpublish_volume(unpublish)
        .await
        .expect("nobody is waited for");
    let publish = Request::new(publish_request("v", "node-b"));
    client
        .controller_publish_volume(publish)
        .await
        .expect("attached elsewhere");
    volume_becomes(&lab, "v", |volume| volume.primary() == Some("node-b")).await;
    assert_eq!(volume(&lab, "v").await.config().expect("a configuration").epoch, 5);
    let unpublish = within(30, unpublish_request("v", "node-b"));
    client
        .controller_unpublish_volume(unpublish)
        .await
        .expect("released in order");
    delete(&mut controller, "v").await.expect("deleted");
    controller.stop().await;
}

fn redundant(volume: &GalleonVolume) -> Option<&Condition> {
    let conditions = &volume.status.as_ref()?.conditions;
    condition::get(conditions, condition_type::REDUNDANT)
}

/// Does to the configuration what a primary would, however often somebody else writes first.
async fn as_primary(lab: &Lab, name: &str, change: impl Fn(&mut VolumeConfig)) {
    loop {
        let mut found = volume(lab, name).await;
        let config = found.status.as_mut().and_then(|status| status.config.as_mut());
        change(config.expect("a configuration"));
        match volumes(lab).replace_status(name, &PostParams::default(), &found).await {
            Err(kube::Error::Api(status)) if status.code == 409 => {}
            written => return drop(written.expect("a status")),
        }
    }
}

fn replica_on(replicas: &[GalleonReplica], node: &str) -> GalleonReplica {
    let found = replicas.iter().find(|replica| replica.spec.node_name == node);
    found.unwrap_or_else(|| panic!("no replica is on {node}")).clone()
}

pub async fn what_a_person_deletes_stays_while_it_is_in_sync(lab: Lab) {
    let _nodes = nodes_with(&lab, &[("node-a", 9 * GIB), ("node-b", 9 * GIB), ("node-c", 9 * GIB)]).await;
    let mut controller = lab.controller("c", false).await;
    create(&mut controller, several("v", GIB, 2)).await.expect("created");
    let victim = made(&lab).await.remove(0);
    replicas(&lab)
        .delete(&victim.name_any(), &Default::default())
        .await
        .expect("marked");
    volume_becomes(&lab, "v", |volume| {
        redundant(volume).is_some_and(|said| said.message.contains("was deleted by somebody"))
    })
    .await;
    let kept = replicas(&lab).get(&victim.name_any()).await.expect("it is still there");
    assert_eq!(kept.finalizers(), [REPLICA_FINALIZER, MEMBER_FINALIZER]);

    // When it falls out for another reason, it is replaced without delay, and its node may remove it.
    as_primary(&lab, "v", |config| {
        config.in_sync.retain(|name| *name != victim.name_any());
        config.out.insert(victim.name_any(), OutReplica::default());
    })
    .await;
    let new = |config: &VolumeConfig| config.out.keys().find(|name| **name != victim.name_any()).cloned();
    volume_becomes(&lab, "v", |volume| new(&config(volume)).is_some()).await;
    let new = new(&config(&volume(&lab, "v").await)).expect("it was there");
    as_primary(&lab, "v", |config| {
        config.out.remove(&new);
        config.in_sync.push(new.clone());
    })
    .await;
    let uid = victim.uid().expect("a uid");
    let gone = conditions::is_deleted(&uid);
    await_condition(replicas(&lab), &victim.name_any(), gone)
        .await
        .expect("a watch");
    delete(&mut controller, "v").await.expect("deleted");
    controller.stop().await;
}

pub async fn a_replica_that_stays_away_is_replaced_once_though_two_controllers_lead(mut lab: Lab) {
    lab.replacement_delay = Delay(Duration::from_secs(1));
    let mut nodes = nodes_with(&lab, &[("node-a", 9 * GIB), ("node-b", 9 * GIB), ("node-c", 9 * GIB)]).await;
    let mut controller = lab.leading_controller("first").await;
    let second = lab.leading_controller("second").await;
    create(&mut controller, several("v", GIB, 3)).await.expect("created");
    let publish = Request::new(publish_request("v", "node-a"));
    controller
        .controller
        .controller_publish_volume(publish)
        .await
        .expect("attached");
    volume_becomes(&lab, "v", |volume| {
        volume.primary() == Some("node-a") && redundant(volume).is_some_and(Condition::is_true)
    })
    .await;

    let lost = replica_on(&made(&lab).await, "node-c");
    drop(nodes.pop());
    lab.set_ready("node-c", false).await;
    as_primary(&lab, "v", |config| {
        config.in_sync.retain(|name| *name != lost.name_any());
        let had = OutReplica {
            epoch: 1,
            flushed_seq: 7,
        };
        config.out.insert(lost.name_any(), had);
    })
    .await;
    volume_becomes(&lab, "v", |volume| {
        redundant(volume).is_some_and(|said| !said.is_true() && said.reason == reason::NO_OTHER_NODE)
            && volume
                .status
                .as_ref()
                .is_some_and(|status| status.in_sync_count == Some(2))
    })
    .await;
    assert_eq!(made(&lab).await.len(), 3);

    // A node with room appears.
    nodes.push(pool(&lab, "node-d", 9 * GIB, Behaviour::default()).await);
    volume_becomes(&lab, "v", |volume| config(volume).out.len() == 2).await;
    let all = made(&lab).await;
    assert_eq!(all.len(), 4, "two who lead made one");
    let new = replica_on(&all, "node-d");
    assert_eq!(new.annotations().get(ANNOTATION_REPLACES), Some(&lost.name_any()));
    let added = config(&volume(&lab, "v").await);
    assert_eq!(added.out.get(&new.name_any()), Some(&OutReplica::default()));
    assert_eq!(added.in_sync.len(), 2, "who is in sync is for the primary to say");

    as_primary(&lab, "v", |config| {
        config.out.remove(&new.name_any());
        config.in_sync.push(new.name_any());
    })
    .await;
    volume_becomes(&lab, "v", |volume| {
        config(volume).out.is_empty() && redundant(volume).is_some_and(Condition::is_true)
    })
    .await;
    let free = |replica: Option<&GalleonReplica>| {
        replica.is_some_and(|replica| {
            replica.metadata.deletion_timestamp.is_some() && replica.finalizers() == [REPLICA_FINALIZER]
        })
    };
    await_condition(replicas(&lab), &lost.name_any(), free)
        .await
        .expect("its node may remove it");
    let new_again = replicas(&lab).get(&new.name_any()).await.expect("the new one");
    assert!(new_again.metadata.deletion_timestamp.is_none());

    // The node is back and removes what it has of the volume.
    lab.set_ready("node-c", true).await;
    nodes.push(FakeNode::start(&lab, "node-c", 9 * GIB, Behaviour::default()));
    let uid = lost.uid().expect("a uid");
    await_condition(replicas(&lab), &lost.name_any(), conditions::is_deleted(&uid))
        .await
        .expect("a watch");
    assert_eq!(made(&lab).await.len(), 3);
    let unpublish = within(30, unpublish_request("v", "node-a"));
    controller
        .controller
        .controller_unpublish_volume(unpublish)
        .await
        .expect("detached");
    delete(&mut controller, "v").await.expect("deleted");
    assert_eq!(promised(&lab).await, Vec::<String>::new());
    controller.stop().await;
    second.stop().await;
}

/// Says of a pool what its node would.
async fn say_of_pool(lab: &Lab, node: &str, said: Condition) {
    let name = StoragePool::object_name("default", node);
    loop {
        let mut found = pools(lab).get(&name).await.expect("a pool");
        condition::set(&mut found.status.get_or_insert_default().conditions, said.clone());
        match pools(lab).replace_status(&name, &PostParams::default(), &found).await {
            Err(kube::Error::Api(status)) if status.code == 409 => {}
            written => return drop(written.expect("a status")),
        }
    }
}

pub async fn a_disk_that_fails_is_emptied_when_there_is_room_elsewhere(lab: Lab) {
    let mut nodes = nodes_with(&lab, &[("node-a", 9 * GIB), ("node-b", 9 * GIB), ("node-c", 9 * GIB)]).await;
    let mut controller = lab.controller("c", false).await;
    create(&mut controller, several("v", GIB, 3)).await.expect("created");
    let publish = Request::new(publish_request("v", "node-a"));
    controller
        .controller
        .controller_publish_volume(publish)
        .await
        .expect("attached");
    volume_becomes(&lab, "v", |volume| {
        volume.primary() == Some("node-a") && redundant(volume).is_some_and(Condition::is_true)
    })
    .await;

    let old = replica_on(&made(&lab).await, "node-c");
    for type_ in [condition_type::FAILING, condition_type::READY] {
        let said = Condition::new(
            type_,
            type_ == condition_type::FAILING,
            reason::TOO_MANY_REPAIRS,
            "17 blocks",
        );
        say_of_pool(&lab, "node-c", said).await;
    }
    volume_becomes(&lab, "v", |volume| {
        redundant(volume).is_some_and(|said| {
            said.is_true() && said.reason == reason::NO_OTHER_NODE && said.message.contains("nowhere to go")
        })
    })
    .await;
    assert_eq!(made(&lab).await.len(), 3);
    assert_eq!(config(&volume(&lab, "v").await).in_sync.len(), 3, "nothing is removed");

    nodes.push(pool(&lab, "node-d", 9 * GIB, Behaviour::default()).await);
    volume_becomes(&lab, "v", |volume| volume.spec.leaving == Some(old.name_any())).await;
    let new = replica_on(&made(&lab).await, "node-d");
    let added = config(&volume(&lab, "v").await);
    assert!(added.out.contains_key(&new.name_any()) && added.in_sync.contains(&old.name_any()));
    as_primary(&lab, "v", |config| {
        config.out.remove(&new.name_any());
        config.in_sync.push(new.name_any());
    })
    .await;
    as_primary(&lab, "v", |config| {
        config.in_sync.retain(|name| *name != old.name_any());
        config.out.insert(old.name_any(), OutReplica::default());
    })
    .await;
    volume_becomes(&lab, "v", |volume| {
        let well = redundant(volume).is_some_and(|said| said.is_true() && said.reason == reason::ALL_IN_SYNC);
        config(volume).out.is_empty() && volume.spec.leaving.is_none() && well
    })
    .await;
    let uid = old.uid().expect("a uid");
    await_condition(replicas(&lab), &old.name_any(), conditions::is_deleted(&uid))
        .await
        .expect("a watch");
    let nodes_left: Vec<String> = made(&lab)
        .await
        .into_iter()
        .map(|replica| replica.spec.node_name)
        .collect();
    assert!(
        nodes_left.len() == 3 && !nodes_left.contains(&"node-c".to_string()),
        "{nodes_left:?}"
    );
    let unpublish = within(30, unpublish_request("v", "node-a"));
    controller
        .controller
        .controller_unpublish_volume(unpublish)
        .await
        .expect("detached");
    delete(&mut controller, "v").await.expect("deleted");
    controller.stop().await;
}
