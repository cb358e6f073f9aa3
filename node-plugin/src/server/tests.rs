//! The sockets, as the kubelet uses them.

use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::sync::Arc;

use galleonfs_csi_proto::csi::identity_client::IdentityClient;
use galleonfs_csi_proto::csi::node_client::NodeClient;
use galleonfs_csi_proto::csi::{GetPluginCapabilitiesRequest, GetPluginInfoRequest, NodeGetInfoRequest, ProbeRequest};
use galleonfs_csi_proto::registration::registration_client::RegistrationClient;
use galleonfs_csi_proto::registration::{InfoRequest, RegistrationStatus};
use tokio::sync::watch;
use tonic::Code;
use tonic::transport::{Channel, Endpoint};

use super::*;
use crate::csi::{Directory, Found, Health, Identity, Node};
use crate::mount::{HungChildren, Kubelet};
use crate::served::{FakeEngine, Guards, Served};
use crate::staging::Stager;
use crate::state::Records;
use crate::testing::temp_dir;

struct Nothing;

impl Directory for Nothing {
    fn find<'a>(&'a self, _: &'a str) -> futures::future::BoxFuture<'a, Result<Option<Found>, String>> {
        Box::pin(async { Ok(None) })
    }

    fn unstaged(&self, _: &str) {}
}

async fn connect(path: &Path) -> Channel {
    let uri = format!("unix:{}", path.display());
    Endpoint::from_shared(uri).unwrap().connect().await.unwrap()
}

#[tokio::test]
async fn the_kubelet_finds_us_through_the_registration_socket_and_loses_us_when_we_stop() {
    let dir = temp_dir("server");
    let (stop, stopped) = watch::channel(false);
    let path = dir.path().join("csi.galleonfs.io-reg.sock");
    std::fs::write(&path, b"left by a predecessor").unwrap();
    let task = {
        let (path, registration) = (path.clone(), Registration::new("/host/csi.sock".into()));
        tokio::spawn(async move { register(&path, registration, stopped).await })
    };
    while std::os::unix::net::UnixStream::connect(&path).is_err() {
        tokio::task::yield_now().await;
    }
    assert_eq!(std::fs::metadata(&path).unwrap().permissions().mode() & 0o777, 0o600);
    let mut client = RegistrationClient::new(connect(&path).await);
    let info = client.get_info(InfoRequest {}).await.unwrap().into_inner();
    assert_eq!(
        (info.r#type.as_str(), info.name.as_str()),
        ("CSIPlugin", "csi.galleonfs.io")
    );
    assert_eq!(
        (info.endpoint.as_str(), info.supported_versions),
        ("/host/csi.sock", vec!["1.0.0".to_owned()])
    );
    let status = RegistrationStatus {
        plugin_registered: true,
        error: String::new(),
    };
    client.notify_registration_status(status).await.unwrap();
    stop.send_replace(true);
    while path.exists() {
        tokio::task::yield_now().await;
    }
    drop(client);
    task.await.unwrap().unwrap();
}

#[tokio::test]
async fn the_csi_socket_is_private_answers_and_is_never_taken_from_a_living_process() {
    let dir = temp_dir("server");
    let path = dir.path().join("csi.sock");
    let listener = bind(&path).unwrap();
    assert_eq!(std::fs::metadata(&path).unwrap().permissions().mode() & 0o777, 0o600);
    let records = Records::open(dir.path().join("state")).unwrap();
    let health = Health::new(Arc::new(FakeEngine::default()));
    let node = Node {
        name: "n1".into(),
        volumes_max: 7,
        stager: Stager::new(records, Kubelet::new(dir.path().into(), dir.path().join("state"))),
        guards: Guards::new(HungChildren::default()),
        served: Served::default(),
        directory: Arc::new(Nothing),
    };
    let (stop, mut stopped) = watch::channel(false);
    let identity = Identity::new(health.clone());
    let task = tokio::spawn(serve_csi(listener, identity, node, async move {
        let _ = stopped.wait_for(|stop| *stop).await;
    }));
    let channel = connect(&path).await;
    assert!(bind(&path).unwrap_err().to_string().contains("another process"));

    let mut identity = IdentityClient::new(channel.clone());
    let info = identity
        .get_plugin_info(GetPluginInfoRequest {})
        .await
        .unwrap()
        .into_inner();
    assert_eq!(info.name, "csi.galleonfs.io");
    let capabilities = identity
        .get_plugin_capabilities(GetPluginCapabilitiesRequest {})
        .await
        .unwrap()
        .into_inner();
    assert_eq!(capabilities.capabilities.len(), 3);
    assert_eq!(
        identity.probe(ProbeRequest {}).await.unwrap().into_inner().ready,
        Some(false)
    );
    health.saw_api();
    assert_eq!(
        identity.probe(ProbeRequest {}).await.unwrap().into_inner().ready,
        Some(true)
    );
    let mut node = NodeClient::new(channel.clone());
    let info = node.node_get_info(NodeGetInfoRequest {}).await.unwrap().into_inner();
    assert_eq!((info.node_id.as_str(), info.max_volumes_per_node), ("n1", 7));

    // A volume id that is not UTF-8: bytes in the place of a string.
    let mut raw = tonic::client::Grpc::new(channel);
    raw.ready().await.unwrap();
    let method = tonic::codegen::http::uri::PathAndQuery::from_static("/csi.v1.Node/NodeUnstageVolume");
    // The registration message has the same shape as far as field 1 is concerned.
    let codec = tonic_prost::ProstCodec::<NotUtf8, ProbeRequest>::default();
    let refused = raw
        .unary(tonic::Request::new(NotUtf8 { id: vec![0xff, 0xfe] }), method, codec)
        .await
        .unwrap_err();
    assert_eq!(refused.code(), Code::InvalidArgument, "{}", refused.message());

    stop.send_replace(true);
    drop((identity, node, raw));
    task.await.unwrap().unwrap();
}

/// A request whose first field is bytes.
#[derive(Clone, PartialEq, prost::Message)]
struct NotUtf8 {
    #[prost(bytes = "vec", tag = "1")]
    id: Vec<u8>,
}
