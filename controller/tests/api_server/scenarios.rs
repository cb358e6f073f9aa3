//! CSI over the socket, with a real API server behind it.

use std::{collections::BTreeMap, time::Duration};

use galleonfs_api::{
    GalleonReplica, GalleonVolume, MediaType, StoragePool, StoragePoolSpec, TOPOLOGY_KEY, condition, condition_type,
    size::{GIB, MIB, largest_volume, reserved_bytes},
};
use galleonfs_controller::LEASE_NAME;
use galleonfs_csi_proto::csi::{
    CapacityRange, ControllerExpandVolumeRequest, ControllerGetVolumeRequest, ControllerPublishVolumeRequest,
    ControllerUnpublishVolumeRequest, CreateVolumeRequest, DeleteVolumeRequest, GetCapacityRequest, ListVolumesRequest,
    ProbeRequest, Topology, TopologyRequirement, ValidateVolumeCapabilitiesRequest, Volume, VolumeCapability,
    volume_capability::{AccessMode, AccessType, MountVolume, access_mode::Mode},
};
use k8s_openapi::{
    api::coordination::v1::Lease, apiextensions_apiserver::pkg::apis::apiextensions::v1::CustomResourceDefinition,
};
use kube::{
    Api, ResourceExt,
    api::{ListParams, PostParams},
    runtime::{conditions, wait::await_condition},
};
use tonic::{Code, Request, Status};

use crate::{
    fake_node::{Behaviour, FakeNode},
    lab::{Lab, Running},
};

fn capability() -> VolumeCapability {
    VolumeCapability {
        access_type: Some(AccessType::Mount(MountVolume::default())),
        access_mode: Some(AccessMode {
            mode: Mode::SingleNodeMultiWriter.into(),
        }),
    }
}

pub fn place(node: &str) -> Topology {
    Topology {
        segments: [(TOPOLOGY_KEY.to_string(), node.to_string())].into(),
    }
}

pub fn create_request(name: &str, size_bytes: i64) -> CreateVolumeRequest {
    CreateVolumeRequest {
        name: name.to_string(),
        capacity_range: Some(CapacityRange {
            required_bytes: size_bytes,
            limit_bytes: 0,
        }),
        volume_capabilities: vec![capability()],
        ..Default::default()
    }
}

pub fn within<T>(seconds: u64, message: T) -> Request<T> {
    let mut request = Request::new(message);
    request.set_timeout(Duration::from_secs(seconds));
    request
}

pub fn code<T: std::fmt::Debug>(outcome: Result<T, Status>) -> Code {
    outcome.expect_err("refused").code()
}

pub async fn create(controller: &mut Running, request: CreateVolumeRequest) -> Result<Volume, Status> {
    let answer = controller.controller.create_volume(within(30, request)).await?;
    Ok(answer.into_inner().volume.expect("a volume in the answer"))
}

pub async fn delete(controller: &mut Running, id: &str) -> Result<(), Status> {
    let request = DeleteVolumeRequest {
        volume_id: id.to_string(),
        ..Default::default()
    };
    controller.controller.delete_volume(within(30, request)).await.map(drop)
}

pub fn publish_request(id: &str, node: &str) -> ControllerPublishVolumeRequest {
    ControllerPublishVolumeRequest {
        volume_id: id.to_string(),
        node_id: node.to_string(),
        volume_capability: Some(capability()),
        ..Default::default()
    }
}

pub fn unpublish_request(id: &str, node: &str) -> ControllerUnpublishVolumeRequest {
    ControllerUnpublishVolumeRequest {
        volume_id: id.to_string(),
        node_id: node.to_string(),
        secrets: BTreeMap::new(),
    }
}

pub fn volumes(lab: &Lab) -> Api<GalleonVolume> {
    Api::namespaced(lab.client.clone(), &lab.namespace)
}

pub fn replicas(lab: &Lab) -> Api<GalleonReplica> {
    Api::namespaced(lab.client.clone(), &lab.namespace)
}

pub fn pools(lab: &Lab) -> Api<StoragePool> {
    Api::namespaced(lab.client.clone(), &lab.namespace)
}

/// A pool on a node with a fake node behind it, ready to be used.
pub async fn pool(lab: &Lab, node: &str, usable_bytes: i64, behaviour: Behaviour) -> FakeNode {
    let spec = StoragePoolSpec {
        pool: "default".to_string(),
        node_name: node.to_string(),
        path: "/var/lib/pool".to_string(),
        media: MediaType::Ssd,
        reserve_bytes: None,
    };
    let name = StoragePool::object_name("default", node);
    pools(lab)
        .create(&PostParams::default(), &StoragePool::new(&name, spec))
        .await
        .expect("a pool");
    let fake = FakeNode::start(lab, node, usable_bytes, behaviour);
    let ready = |pool: Option<&StoragePool>| pool.is_some_and(StoragePool::is_ready);
    await_condition(pools(lab), &name, ready)
        .await
        .expect("the pool gets ready");
    fake
}

/// Waits until a volume is as wanted.
pub async fn volume_becomes(lab: &Lab, name: &str, wanted: impl Fn(&GalleonVolume) -> bool) {
    let wanted = |volume: Option<&GalleonVolume>| volume.is_some_and(&wanted);
    await_condition(volumes(lab), name, wanted).await.expect("a watch");
}

pub async fn promised(lab: &Lab) -> Vec<String> {
    let pools = pools(lab).list(&ListParams::default()).await.expect("pools");
    pools
        .items
        .into_iter()
        .flat_map(|pool| pool.status.unwrap_or_default().reservations.into_keys())
        .collect()
}

pub async fn a_probe_says_what_is_missing(lab: Lab) {
    let mut alone = lab.controller_without_api_server().await;
    let status = alone.identity.probe(ProbeRequest {}).await.expect_err("no API server");
    assert_eq!(status.code(), Code::FailedPrecondition);
    assert_eq!(
        code(delete(&mut alone, "some-volume").await),
        Code::Unavailable,
        "never a made-up OK"
    );
    assert_eq!(
        code(create(&mut alone, create_request("v", GIB)).await),
        Code::Unavailable
    );
    alone.stop().await;

    let mut controller = lab.controller("c", false).await;
    let status = controller
        .identity
        .probe(ProbeRequest {})
        .await
        .expect_err("no definitions");
    assert_eq!(status.code(), Code::FailedPrecondition);
    assert!(
        status.message().contains("CustomResourceDefinitions"),
        "{}",
        status.message()
    );
    assert_eq!(
        code(delete(&mut controller, "some-volume").await),
        Code::Unavailable,
        "never a made-up OK"
    );

    let definitions: Api<CustomResourceDefinition> = Api::all(lab.client.clone());
    for definition in galleonfs_api::crds() {
        definitions
            .create(&PostParams::default(), &definition)
            .await
            .expect("the API server takes our definitions");
        let name = definition.name_any();
        let established = await_condition(definitions.clone(), &name, conditions::is_crd_established());
        let definition = established.await.expect("a watch").expect("the definition");
        let trouble: Vec<_> = definition
            .status
            .and_then(|status| status.conditions)
            .unwrap_or_default();
        let schema = trouble
            .iter()
            .find(|condition| condition.type_ == "NonStructuralSchema");
        assert!(schema.is_none(), "{schema:?}");
    }
    let ready = controller
        .identity
        .probe(ProbeRequest {})
        .await
        .expect("all is there")
        .into_inner()
        .ready;
    assert_eq!(ready, Some(true));
    controller.stop().await;
}

pub async fn a_volume_lives_from_creation_to_deletion(lab: Lab) {
    let _node = pool(&lab, "node-a", 10 * GIB, Behaviour::default()).await;
    let mut controller = lab.controller("c", false).await;
    let request = CreateVolumeRequest {
        accessibility_requirements: Some(TopologyRequirement {
            requisite: vec![place("node-a"), place("node-b")],
            preferred: vec![place("node-b"), place("node-a")],
        }),
        ..create_request("pvc-1", GIB - 5)
    };
    let volume = create(&mut controller, request.clone()).await.expect("created");
    assert_eq!(
        (volume.volume_id.as_str(), volume.capacity_bytes),
        ("pvc-1", GIB),
        "rounded up, and reported so"
    );
    assert_eq!(volume.accessible_topology, [place("node-a")]);
    assert_eq!(create(&mut controller, request).await.expect("the same again"), volume);
    assert_eq!(
        code(create(&mut controller, create_request("pvc-1", 2 * GIB)).await),
        Code::AlreadyExists
    );

    let get = ControllerGetVolumeRequest {
        volume_id: "pvc-1".to_string(),
    };
    let got = controller
        .controller
        .controller_get_volume(get.clone())
        .await
        .expect("described")
        .into_inner();
    assert!(got.status.expect("a status").published_node_ids.is_empty());
    let unknown = ControllerGetVolumeRequest {
        volume_id: "../etc".to_string(),
    };
    assert_eq!(
        code(controller.controller.controller_get_volume(unknown).await),
        Code::NotFound
    );
    let validate = ValidateVolumeCapabilitiesRequest {
        volume_id: "pvc-1".to_string(),
        volume_capabilities: vec![capability()],
        ..Default::default()
    };
    let confirmed = controller
        .controller
        .validate_volume_capabilities(validate)
        .await
        .expect("an answer");
    assert!(confirmed.into_inner().confirmed.is_some());

    let mut client = controller.controller.clone();
    let publish = |id: &str, node: &str| Request::new(publish_request(id, node));
    assert_eq!(
        code(client.controller_publish_volume(publish("nothing", "node-a")).await),
        Code::NotFound
    );
    assert_eq!(
        code(client.controller_publish_volume(publish("pvc-1", "node-z")).await),
        Code::NotFound
    );
    let elsewhere = client
        .controller_publish_volume(publish("pvc-1", "node-b"))
        .await
        .expect_err("no replica there");
    assert!(
        elsewhere.code() == Code::FailedPrecondition && elsewhere.message().contains("node-a"),
        "{elsewhere}"
    );
    for _ in 0..2 {
        client
            .controller_publish_volume(publish("pvc-1", "node-a"))
            .await
            .expect("published");
    }
    let read_only = ControllerPublishVolumeRequest {
        readonly: true,
        ..publish_request("pvc-1", "node-a")
    };
    assert_eq!(
        code(client.controller_publish_volume(read_only).await),
        Code::AlreadyExists
    );
    let second = client
        .controller_publish_volume(publish("pvc-1", "node-b"))
        .await
        .expect_err("it is on node-a");
    assert!(
        second.code() == Code::FailedPrecondition && second.message().contains("node-a"),
        "{second}"
    );
    volume_becomes(&lab, "pvc-1", |volume| volume.primary() == Some("node-a")).await;
    assert_eq!(code(delete(&mut controller, "pvc-1").await), Code::FailedPrecondition);

    let listed = client
        .list_volumes(ListVolumesRequest::default())
        .await
        .expect("a list")
        .into_inner();
    assert_eq!(listed.entries[0].volume, Some(volume));
    assert_eq!(
        listed.entries[0].status.as_ref().expect("a status").published_node_ids,
        ["node-a"]
    );
    let bad_token = ListVolumesRequest {
        max_entries: 0,
        starting_token: "nonsense".to_string(),
    };
    assert_eq!(code(client.list_volumes(bad_token).await), Code::Aborted);

    let expand = ControllerExpandVolumeRequest {
        volume_id: "pvc-1".to_string(),
        capacity_range: Some(CapacityRange {
            required_bytes: 2 * GIB + 1,
            limit_bytes: 0,
        }),
        ..Default::default()
    };
    let grown = client
        .controller_expand_volume(expand)
        .await
        .expect("grown")
        .into_inner();
    assert_eq!(
        (grown.capacity_bytes, grown.node_expansion_required),
        (2 * GIB + MIB, true)
    );
    volume_becomes(&lab, "pvc-1", |volume| {
        volume
            .status
            .as_ref()
            .is_some_and(|status| status.observed_size_bytes == Some(2 * GIB + MIB))
    })
    .await;

    for node in ["node-b", "node-a", "node-a", ""] {
        let request = within(30, unpublish_request("pvc-1", node));
        client
            .controller_unpublish_volume(request)
            .await
            .expect("not published there (any more)");
    }
    let released = volumes(&lab).get("pvc-1").await.expect("the volume");
    assert_eq!((released.attached_node(), released.primary()), (None, None));

    for _ in 0..2 {
        delete(&mut controller, "pvc-1").await.expect("deleted");
    }
    assert!(volumes(&lab).get_opt("pvc-1").await.expect("a read").is_none());
    assert!(
        replicas(&lab)
            .list(&ListParams::default())
            .await
            .expect("a list")
            .items
            .is_empty()
    );
    assert_eq!(promised(&lab).await, Vec::<String>::new());
    controller.stop().await;
}

pub async fn nodes_get_their_default_pool(lab: Lab) {
    let controller = lab.controller("c", true).await;
    for node in ["node-a", "node-b"] {
        let name = StoragePool::object_name("default", node);
        let there = |pool: Option<&StoragePool>| pool.is_some();
        let pool = await_condition(pools(&lab), &name, there)
            .await
            .expect("a watch")
            .expect("the pool");
        assert_eq!(
            (pool.spec.path.as_str(), pool.spec.media),
            ("/var/lib/pool", MediaType::Ssd)
        );
    }
    controller.stop().await;
}

pub async fn two_controllers_do_not_both_win_the_last_gigabyte(lab: Lab) {
    const ROOM_FOR: usize = 3;
    const ASKED: usize = 8;
    let usable = reserved_bytes(GIB) * ROOM_FOR as i64 + MIB;
    let _node = pool(&lab, "node-a", usable, Behaviour::default()).await;
    let controllers = [
        lab.controller("first", false).await,
        lab.controller("second", false).await,
    ];
    let asked = (0..ASKED).map(|index| {
        let mut client = controllers[index % 2].controller.clone();
        async move {
            // A caller that is asked to come again does so, as the sidecars do.
            loop {
                let request = within(30, create_request(&format!("claim-{index}"), GIB));
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
    for refused in outcomes.into_iter().filter_map(Result::err) {
        assert_eq!(refused.code(), Code::ResourceExhausted);
        assert!(
            refused.message().contains("default.node-a has"),
            "{}",
            refused.message()
        );
    }
    let made = replicas(&lab).list(&ListParams::default()).await.expect("a list").items;
    assert!(made.iter().map(|replica| replica.spec.reserved_bytes).sum::<i64>() <= usable);
    for controller in controllers {
        controller.stop().await;
    }
}

pub async fn a_half_made_volume_is_finished_by_the_next_attempt(lab: Lab) {
    let mut node = pool(
        &lab,
        "node-a",
        10 * GIB,
        Behaviour {
            sleeps: true,
            ..Behaviour::default()
        },
    )
    .await;
    let mut first = lab.controller("first", false).await;
    let status = first
        .controller
        .create_volume(within(2, create_request("v", GIB)))
        .await
        .expect_err("no node answers");
    assert_eq!(status.code(), Code::Aborted);
    assert!(
        status.message().contains("waiting for the node plugin"),
        "{}",
        status.message()
    );
    // Two calls for one volume at once: one waits for the node, the other is told to come again.
    let mut client = first.controller.clone();
    let waiting = tokio::spawn(async move { client.create_volume(within(30, create_request("v", GIB))).await });
    let busy = async {
        loop {
            let status = delete(&mut first, "w").await.err();
            assert!(status.is_none(), "another volume is not concerned");
            let request = within(1, create_request("v", GIB));
            let status = first.controller.create_volume(request).await.expect_err("not yet");
            assert_eq!(status.code(), Code::Aborted);
            if status.message().contains("another call") {
                break;
            }
        }
    };
    busy.await;
    waiting.abort();
    first.kill().await;

    let left = replicas(&lab).list(&ListParams::default()).await.expect("a list").items;
    assert_eq!(left.len(), 1, "one attempt or many: one replica");
    let mut second = lab.controller("second", false).await;
    node.wake();
    let volume = create(&mut second, create_request("v", GIB)).await.expect("finished");
    assert_eq!(volume.accessible_topology, [place("node-a")]);
    let made = replicas(&lab).list(&ListParams::default()).await.expect("a list").items;
    assert_eq!(
        made.iter().map(|replica| replica.uid()).collect::<Vec<_>>(),
        [left[0].uid()]
    );
    delete(&mut second, "v").await.expect("deleted");
    second.stop().await;
}

pub async fn a_failed_replica_is_replaced_elsewhere(lab: Lab) {
    let _bad = pool(
        &lab,
        "node-a",
        20 * GIB,
        Behaviour {
            fails: true,
            ..Behaviour::default()
        },
    )
    .await;
    let _good = pool(&lab, "node-b", 10 * GIB, Behaviour::default()).await;
    let mut controller = lab.controller("c", false).await;
    let status = create(&mut controller, create_request("v", GIB))
        .await
        .expect_err("node-a fails");
    assert_eq!(status.code(), Code::ResourceExhausted);
    assert!(
        status.message().contains("ReadOnly: mounted read-only"),
        "{}",
        status.message()
    );
    let volume = create(&mut controller, create_request("v", GIB))
        .await
        .expect("node-b is well");
    assert_eq!(volume.accessible_topology, [place("node-b")]);
    delete(&mut controller, "v").await.expect("deleted");
    controller.stop().await;
}

pub async fn deletion_waits_for_the_node_and_says_so(lab: Lab) {
    let node = pool(&lab, "node-a", 10 * GIB, Behaviour::default()).await;
    let mut controller = lab.controller("c", false).await;
    create(&mut controller, create_request("v", GIB))
        .await
        .expect("created");
    drop(node);
    let request = DeleteVolumeRequest {
        volume_id: "v".to_string(),
        ..Default::default()
    };
    let status = controller
        .controller
        .delete_volume(within(2, request))
        .await
        .expect_err("the node is gone");
    assert!(
        status.code() == Code::Aborted && status.message().contains("on node node-a"),
        "{status}"
    );
    let again = controller
        .controller
        .create_volume(within(2, create_request("v", GIB)))
        .await
        .expect_err("not yet");
    assert!(
        again.code() == Code::Aborted && again.message().contains("being deleted"),
        "{again}"
    );
    volume_becomes(&lab, "v", |volume| {
        let status = volume.status.clone().unwrap_or_default();
        condition::get(&status.conditions, condition_type::READY).is_some_and(|ready| ready.reason == "Removing")
    })
    .await;
    let _back = FakeNode::start(&lab, "node-a", 10 * GIB, Behaviour::default());
    delete(&mut controller, "v").await.expect("deleted");
    controller.stop().await;
}

pub async fn growing_beyond_the_pool_changes_nothing(lab: Lab) {
    let _node = pool(&lab, "node-a", 4 * GIB, Behaviour::default()).await;
    let mut controller = lab.controller("c", false).await;
    create(&mut controller, create_request("v", GIB))
        .await
        .expect("created");
    let expand = |bytes: i64| ControllerExpandVolumeRequest {
        volume_id: "v".to_string(),
        capacity_range: Some(CapacityRange {
            required_bytes: bytes,
            limit_bytes: 0,
        }),
        ..Default::default()
    };
    let status = controller
        .controller
        .controller_expand_volume(expand(8 * GIB))
        .await
        .expect_err("no room");
    assert!(
        status.code() == Code::ResourceExhausted && status.message().contains("default.node-a"),
        "{status}"
    );
    let volume = volumes(&lab).get("v").await.expect("the volume");
    assert_eq!(volume.spec.size_bytes, GIB);

    let capacity = async |controller: &mut Running| {
        let request = GetCapacityRequest {
            accessible_topology: Some(place("node-a")),
            ..Default::default()
        };
        controller
            .controller
            .get_capacity(request)
            .await
            .expect("an answer")
            .into_inner()
    };
    let seen = capacity(&mut controller).await;
    assert_eq!(seen.maximum_volume_size, Some(seen.available_capacity));
    assert!(seen.available_capacity <= largest_volume(4 * GIB));
    let most = 3 * GIB;
    let grown = controller
        .controller
        .controller_expand_volume(expand(most))
        .await
        .expect("room")
        .into_inner();
    assert_eq!(grown.capacity_bytes, most);
    controller.stop().await;
}

pub async fn a_successor_takes_over_and_an_idle_cluster_is_not_written_to(lab: Lab) {
    let _node = pool(&lab, "node-a", 10 * GIB, Behaviour::default()).await;
    let leases: Api<Lease> = Api::namespaced(lab.client.clone(), &lab.namespace);
    let held_by = |name: &'static str| {
        move |lease: Option<&Lease>| {
            let holder = lease.and_then(|lease| lease.spec.as_ref()?.holder_identity.as_deref());
            holder.is_some_and(|holder| holder.starts_with(name))
        }
    };
    let mut first = lab.controller("first", false).await;
    await_condition(leases.clone(), LEASE_NAME, held_by("first_"))
        .await
        .expect("a watch");
    create(&mut first, create_request("v", GIB)).await.expect("created");
    let second = lab.controller("second", false).await;
    volume_becomes(&lab, "v", |volume| {
        let status = volume.status.clone().unwrap_or_default();
        condition::get(&status.conditions, condition_type::READY).is_some_and(|ready| ready.is_true())
            && status.observed_size_bytes == Some(GIB)
    })
    .await;

    let versions = async || {
        let mut versions = vec![];
        for volume in volumes(&lab).list(&ListParams::default()).await.expect("volumes") {
            versions.push((volume.name_any(), volume.resource_version()));
        }
        for replica in replicas(&lab).list(&ListParams::default()).await.expect("replicas") {
            versions.push((replica.name_any(), replica.resource_version()));
        }
        for pool in pools(&lab).list(&ListParams::default()).await.expect("pools") {
            versions.push((pool.name_any(), pool.resource_version()));
        }
        versions
    };
    let renewed_after = |before: Option<String>| {
        move |lease: Option<&Lease>| lease.is_some_and(|lease| lease.resource_version() != before)
    };
    let before = versions().await;
    for _ in 0..2 {
        let lease = leases.get(LEASE_NAME).await.expect("the Lease");
        await_condition(leases.clone(), LEASE_NAME, renewed_after(lease.resource_version()))
            .await
            .expect("a watch");
    }
    assert_eq!(
        versions().await,
        before,
        "two renewals went by and nothing else was written"
    );

    first.stop().await;
    await_condition(leases.clone(), LEASE_NAME, held_by("second_"))
        .await
        .expect("a watch");
    second.stop().await;
    let lease = leases.get(LEASE_NAME).await.expect("the Lease");
    assert_eq!(lease.spec.expect("a spec").holder_identity, None, "given back");
}
