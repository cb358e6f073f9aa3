//! Certificates of nodes: the node plugin's own code asks, two controllers answer, the API server says who asks.

use std::time::{Duration, SystemTime};

use galleonfs_api::{
    NodeIdentity,
    identity::{NODE_CA, NODE_CA_BUNDLE, NODE_SIGNER, NODE_USAGES},
};
use galleonfs_controller::certificates::{Generations, Times};
use galleonfs_node_plugin::identity::{Enrolment, Progress, Wallet, node_uid};
use k8s_openapi::{
    ByteString,
    api::{
        authentication::v1::TokenRequest,
        certificates::v1::{CertificateSigningRequest, CertificateSigningRequestSpec},
        core::v1::{ConfigMap, Namespace, Node, Pod, Secret, ServiceAccount},
        rbac::v1::{ClusterRole, ClusterRoleBinding, Role, RoleBinding},
    },
};
use kube::{
    Api, Client, Resource, ResourceExt,
    api::{ObjectMeta, PostParams},
};
use serde_json::json;
use uuid::Uuid;

use crate::lab::{Lab, NODE_ACCOUNT};

/// What never takes so long.
const PATIENCE: Duration = Duration::from_secs(60);

async fn until<T>(what: &str, mut look: impl FnMut() -> Option<T>) -> T {
    let looking = async {
        loop {
            if let Some(found) = look() {
                return found;
            }
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
    };
    tokio::time::timeout(PATIENCE, looking)
        .await
        .unwrap_or_else(|_| panic!("{what}: not within {PATIENCE:?}"))
}

async fn make<K>(api: Api<K>, object: serde_json::Value) -> K
where
    K: Resource + Clone + std::fmt::Debug + serde::Serialize + serde::de::DeserializeOwned,
{
    let object = serde_json::from_value(object).expect("an object");
    api.create(&PostParams::default(), &object).await.expect("created")
}

/// The rights that the chart gives to node plugins, as far as certificates need them.
async fn grant(lab: &Lab) {
    let (client, namespace) = (lab.client.clone(), lab.namespace.clone());
    let name = format!("galleonfs-node-{namespace}");
    make::<ServiceAccount>(
        Api::namespaced(client.clone(), &namespace),
        json!({"metadata": {"name": NODE_ACCOUNT}}),
    )
    .await;
    let subjects = json!([{"kind": "ServiceAccount", "name": NODE_ACCOUNT, "namespace": namespace}]);
    make::<ClusterRole>(
        Api::all(client.clone()),
        json!({"metadata": {"name": name}, "rules": [{
            "apiGroups": ["certificates.k8s.io"],
            "resources": ["certificatesigningrequests"],
            "verbs": ["get", "create"],
        }, {
            "apiGroups": ["authentication.k8s.io"],
            "resources": ["selfsubjectreviews"],
            "verbs": ["create"],
        }]}),
    )
    .await;
    make::<ClusterRoleBinding>(
        Api::all(client.clone()),
        json!({"metadata": {"name": name}, "subjects": subjects,
            "roleRef": {"apiGroup": "rbac.authorization.k8s.io", "kind": "ClusterRole", "name": name}}),
    )
    .await;
    make::<Role>(
        Api::namespaced(client.clone(), &namespace),
        json!({"metadata": {"name": name}, "rules": [{
            "apiGroups": [""], "resources": ["configmaps"], "resourceNames": [NODE_CA], "verbs": ["get"],
        }]}),
    )
    .await;
    make::<RoleBinding>(
        Api::namespaced(client, &namespace),
        json!({"metadata": {"name": name}, "subjects": subjects,
            "roleRef": {"apiGroup": "rbac.authorization.k8s.io", "kind": "Role", "name": name}}),
    )
    .await;
}

/// A client with the token that the kubelet would give to the node plugin's pod on `node`; `None`: one of no pod.
async fn plugin_on(lab: &Lab, node: Option<&str>) -> Client {
    let bound = match node {
        Some(node) => {
            let pod = make::<Pod>(
                Api::namespaced(lab.client.clone(), &lab.namespace),
                json!({"metadata": {"generateName": "galleonfs-node-"}, "spec": {
                    "nodeName": node, "serviceAccountName": NODE_ACCOUNT,
                    "containers": [{"name": "node", "image": "none"}],
                }}),
            )
            .await;
            json!({"apiVersion": "v1", "kind": "Pod", "name": pod.name_any(), "uid": pod.uid()})
        }
        None => serde_json::Value::Null,
    };
    let accounts: Api<ServiceAccount> = Api::namespaced(lab.client.clone(), &lab.namespace);
    let request: TokenRequest = serde_json::from_value(json!({"spec": {"audiences": [], "boundObjectRef": bound}}))
        .expect("a request for a token");
    let token = accounts
        .create_token_request(NODE_ACCOUNT, &PostParams::default(), &request)
        .await
        .expect("a token");
    let token = token.status.and_then(|status| status.token).expect("it was given");
    lab.client_with(&token).await
}

async fn uid_of(lab: &Lab, node: &str) -> Uuid {
    let nodes: Api<Node> = Api::all(lab.client.clone());
    let node = nodes.get(node).await.expect("the node is there");
    node.uid().and_then(|uid| uid.parse().ok()).expect("a uid")
}

async fn cluster_of(lab: &Lab) -> Uuid {
    let namespaces: Api<Namespace> = Api::all(lab.client.clone());
    let system = namespaces.get("kube-system").await.expect("every cluster has it");
    system.uid().and_then(|uid| uid.parse().ok()).expect("a uid")
}

pub async fn a_node_gets_its_certificate_and_the_next_one_and_two_controllers_make_one_authority(mut lab: Lab) {
    lab.times = Times {
        node: Duration::from_secs(8),
        ..Times::default()
    };
    grant(&lab).await;
    let cluster = cluster_of(&lab).await;
    let node = uid_of(&lab, "node-a").await;
    let client = plugin_on(&lab, Some("node-a")).await;
    assert_eq!(node_uid(&client).await.expect("the token says it"), node);

    // It asks before there is anybody to answer.
    let wallet = Wallet::default();
    let file = lab.directory().join(format!("{}-identity.pem", lab.namespace));
    let enrolment = Enrolment {
        client,
        namespace: lab.namespace.clone(),
        cluster,
        file: file.clone(),
        wallet: wallet.clone(),
        progress: Progress::default(),
    };
    let progress = enrolment.progress.clone();
    let enrolling = tokio::spawn(enrolment.clone().run(node));
    let trouble = until("the node says what it waits for", || progress.trouble()).await;
    assert!(trouble.contains(NODE_CA), "{trouble}");

    // Both believe to lead.
    let (first, second) = tokio::join!(lab.leading_controller("first"), lab.leading_controller("second"));
    let current = until("a certificate", || wallet.current()).await;
    let own = *current.own();
    assert_eq!(own.identity, NodeIdentity { cluster, node });
    assert!(own.not_after <= SystemTime::now() + Duration::from_secs(9));
    assert_eq!(progress.trouble(), None);

    let secrets: Api<Secret> = Api::namespaced(lab.client.clone(), &lab.namespace);
    let secret = secrets.get(NODE_CA).await.expect("the authority is kept");
    let generations = Generations::of_data(&secret.data.expect("data")).expect("readable");
    let maps: Api<ConfigMap> = Api::namespaced(lab.client.clone(), &lab.namespace);
    let map = maps.get(NODE_CA).await.expect("the authority is known");
    assert_eq!(map.data.expect("data")[NODE_CA_BUNDLE], generations.bundle());

    // Renewed in time, without anybody's doing.
    let renewed = until("the next certificate", || {
        wallet.current().filter(|next| next.own().not_after > own.not_after)
    })
    .await;
    assert!(SystemTime::now() < own.not_after, "before the end of the old one");
    assert_eq!(renewed.own().identity, own.identity);
    enrolling.abort();

    // Its successor goes on with what is in the file, and asks nobody.
    let requests: Api<CertificateSigningRequest> = Api::all(lab.client.clone());
    let asked = requests.list(&Default::default()).await.expect("listed").items.len();
    let successor = Enrolment {
        wallet: Wallet::default(),
        ..enrolment
    };
    let its_wallet = successor.wallet.clone();
    let enrolling = tokio::spawn(successor.run(node));
    let taken_over = until("the kept certificate", || its_wallet.current()).await;
    assert!(taken_over.own().not_after >= renewed.own().not_after);
    let now = requests.list(&Default::default()).await.expect("listed").items.len();
    // It may have been time for the next one by then.
    assert!(now == asked || taken_over.own().not_after > renewed.own().not_after);
    enrolling.abort();
    first.stop().await;
    second.stop().await;
}

/// Asks for a certificate of `identity`, and gives the answer: a certificate, or why not.
async fn ask(client: &Client, admin: &Client, identity: NodeIdentity) -> Result<String, String> {
    let key = rcgen::KeyPair::generate().expect("a key");
    let mut params = rcgen::CertificateParams::default();
    params.distinguished_name = rcgen::DistinguishedName::new();
    params.subject_alt_names = vec![rcgen::SanType::URI(identity.to_string().try_into().expect("ASCII"))];
    let pem = params
        .serialize_request(&key)
        .and_then(|request| request.pem())
        .expect("a request");
    let request = CertificateSigningRequest {
        metadata: ObjectMeta {
            generate_name: Some("test-".to_owned()),
            ..ObjectMeta::default()
        },
        spec: CertificateSigningRequestSpec {
            request: ByteString(pem.into_bytes()),
            signer_name: NODE_SIGNER.to_owned(),
            usages: Some(NODE_USAGES.map(str::to_owned).to_vec()),
            ..CertificateSigningRequestSpec::default()
        },
        status: None,
    };
    let requests: Api<CertificateSigningRequest> = Api::all(client.clone());
    let made = requests
        .create(&PostParams::default(), &request)
        .await
        .expect("anybody may ask");
    let requests: Api<CertificateSigningRequest> = Api::all(admin.clone());
    let name = made.name_any();
    let answered = async {
        loop {
            let found = requests.get(&name).await.expect("it is there");
            let status = found.status.unwrap_or_default();
            if let Some(certificate) = status.certificate {
                return Ok(String::from_utf8(certificate.0).expect("PEM"));
            }
            let mut conditions = status.conditions.unwrap_or_default().into_iter();
            if let Some(denied) = conditions.find(|condition| condition.type_ == "Denied") {
                return Err(denied.message.expect("a reason"));
            }
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
    };
    let answer = tokio::time::timeout(PATIENCE, answered).await;
    answer.unwrap_or_else(|_| panic!("no answer within {PATIENCE:?}"))
}

pub async fn nobody_gets_the_certificate_of_a_node_that_it_is_not_on(lab: Lab) {
    grant(&lab).await;
    let controller = lab.controller("only", false).await;
    let cluster = cluster_of(&lab).await;
    let (a, b) = (uid_of(&lab, "node-a").await, uid_of(&lab, "node-b").await);
    let identity = |node| NodeIdentity { cluster, node };
    let on_a = plugin_on(&lab, Some("node-a")).await;
    let nowhere = plugin_on(&lab, None).await;
    ask(&on_a, &lab.client, identity(a)).await.expect("its own");
    let elsewhere = NodeIdentity {
        cluster: Uuid::from_u128(1),
        node: a,
    };
    for (client, identity, part) in [
        (&on_a, identity(b), "whoever asks is on node node-a"),
        (&on_a, elsewhere, "asked for a node of cluster"),
        (&nowhere, identity(a), "names no node"),
        (&lab.client, identity(a), "asked for by admin"),
    ] {
        let denied = ask(client, &lab.client, identity).await.expect_err(part);
        assert!(denied.contains(part), "{denied:?} lacks {part:?}");
    }
    controller.stop().await;
}
