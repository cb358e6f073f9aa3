//! What a node plugin's credentials can do, asked of a real API server: the chart is applied to one (etcd and
//! kube-apiserver, nothing else), and requests are made under the identity that the kubelet's token would give.

mod support;

use std::{
    cell::RefCell,
    env, fs,
    net::TcpListener,
    path::PathBuf,
    process::{Child, Command, Stdio},
    thread,
    time::{Duration, Instant},
};

use serde_json::{Value, json};
use support::{NAMESPACE, helm_template, lab_program};

/// A claim that the token carries once it is bound to a pod on a node.
const NODE_CLAIM: &str = "authentication.kubernetes.io/node-name";

/// An API server of its own for one test; both programs end with it.
struct ApiServer {
    directory: PathBuf,
    address: String,
    programs: RefCell<Vec<Child>>,
}

impl ApiServer {
    fn start(name: &str) -> Self {
        let directory = env::temp_dir().join(format!("galleonfs-{name}-{}", std::process::id()));
        let _ = fs::remove_dir_all(&directory);
        fs::create_dir_all(&directory).expect("a directory for the API server");
        fs::write(directory.join("tokens.csv"), "admin,admin,admin,system:masters\n").expect("the admin's token");
        let key = rcgen::KeyPair::generate().expect("a key");
        fs::write(directory.join("accounts.key"), key.serialize_pem()).expect("the key that signs tokens");
        fs::write(directory.join("accounts.pub"), key.public_key_pem()).expect("the key that checks tokens");

        let [client, peer, secure] = free_ports();
        let server = Self {
            directory,
            address: format!("https://127.0.0.1:{secure}"),
            programs: RefCell::default(),
        };
        let (client, peer) = (format!("http://127.0.0.1:{client}"), format!("http://127.0.0.1:{peer}"));
        server.spawn(
            "etcd",
            &[
                "--unsafe-no-fsync=true",
                "--log-level=error",
                &format!("--data-dir={}", server.file("etcd")),
                &format!("--listen-client-urls={client}"),
                &format!("--advertise-client-urls={client}"),
                &format!("--listen-peer-urls={peer}"),
                &format!("--initial-advertise-peer-urls={peer}"),
                &format!("--initial-cluster=default={peer}"),
            ],
        );
        server.spawn(
            "kube-apiserver",
            &[
                "--bind-address=127.0.0.1",
                "--authorization-mode=Node,RBAC",
                "--allow-privileged=true",
                "--service-cluster-ip-range=10.99.0.0/24",
                "--service-account-issuer=https://kubernetes.default.svc",
                &format!("--secure-port={secure}"),
                &format!("--etcd-servers={client}"),
                &format!("--cert-dir={}", server.file("certificates")),
                &format!("--token-auth-file={}", server.file("tokens.csv")),
                &format!("--service-account-key-file={}", server.file("accounts.pub")),
                &format!("--service-account-signing-key-file={}", server.file("accounts.key")),
            ],
        );
        server.wait("the API server", || server.admin(&["get", "--raw", "/readyz"]).is_ok());
        server
    }

    fn file(&self, name: &str) -> String {
        self.directory.join(name).display().to_string()
    }

    fn spawn(&self, name: &str, arguments: &[&str]) {
        let log = fs::File::create(self.directory.join(format!("{name}.log"))).expect("a log");
        let child = Command::new(lab_program(name))
            .args(arguments)
            .stdin(Stdio::null())
            .stdout(log.try_clone().expect("a second handle"))
            .stderr(log)
            .spawn();
        self.programs
            .borrow_mut()
            .push(child.unwrap_or_else(|error| panic!("{name} does not start: {error}")));
    }

    /// Looks again until it is so; fails with the API server's own last words.
    fn wait(&self, what: &str, is_so: impl Fn() -> bool) {
        let deadline = Instant::now() + Duration::from_secs(120);
        while !is_so() {
            let alive = self
                .programs
                .borrow_mut()
                .iter_mut()
                .all(|program| matches!(program.try_wait(), Ok(None)));
            if !alive || Instant::now() > deadline {
                let log = fs::read_to_string(self.file("kube-apiserver.log")).unwrap_or_default();
                let tail: Vec<&str> = log.lines().rev().take(10).collect();
                panic!("{what} is not ready: {tail:#?}");
            }
            thread::sleep(Duration::from_millis(200));
        }
    }

    fn admin(&self, arguments: &[&str]) -> Result<String, String> {
        self.kubectl("admin", json!({"token": "admin"}), arguments, None)
    }

    /// As the node plugin of a node.
    fn node(&self, node: Option<&str>, arguments: &[&str]) -> Result<String, String> {
        self.kubectl(node.unwrap_or("unbound"), node_user(node), arguments, None)
    }

    fn node_with(&self, node: Option<&str>, arguments: &[&str], input: &str) -> Result<String, String> {
        self.kubectl(node.unwrap_or("unbound"), node_user(node), arguments, Some(input))
    }

    fn apply(&self, objects: &str) {
        let arguments = ["apply", "--server-side", "-f", "-"];
        if let Err(complaint) = self.kubectl("admin", json!({"token": "admin"}), &arguments, Some(objects)) {
            panic!("{complaint}");
        }
    }

    fn kubectl(&self, who: &str, user: Value, arguments: &[&str], input: Option<&str>) -> Result<String, String> {
        let path = self.directory.join(format!("{who}.kubeconfig"));
        let config = json!({
            "apiVersion": "v1",
            "kind": "Config",
            "current-context": "here",
            "clusters": [{"name": "here", "cluster": {"server": self.address, "insecure-skip-tls-verify": true}}],
            "users": [{"name": "me", "user": user}],
            "contexts": [{"name": "here", "context": {"cluster": "here", "user": "me", "namespace": NAMESPACE}}],
        });
        fs::write(&path, config.to_string()).expect("a kubeconfig");
        let stdin = match input {
            Some(text) => {
                let path = self.directory.join("input.yaml");
                fs::write(&path, text).expect("kubectl's input");
                Stdio::from(fs::File::open(path).expect("kubectl's input"))
            }
            None => Stdio::null(),
        };
        let mut kubectl = Command::new(lab_program("kubectl"));
        let home = self.directory.join("home");
        let output = kubectl
            .env("KUBECONFIG", path)
            .env("HOME", home)
            .args(arguments)
            .stdin(stdin)
            .output()
            .expect("kubectl starts");
        if output.status.success() {
            Ok(String::from_utf8_lossy(&output.stdout).into_owned())
        } else {
            Err(String::from_utf8_lossy(&output.stderr).into_owned())
        }
    }
}

impl Drop for ApiServer {
    fn drop(&mut self) {
        for program in self.programs.get_mut().iter_mut().rev() {
            let _ = program.kill();
            let _ = program.wait();
        }
        if !thread::panicking() {
            let _ = fs::remove_dir_all(&self.directory);
        }
    }
}

/// The identity of a node's plugin; of its account without a node when the token is not bound to a pod.
fn node_user(node: Option<&str>) -> Value {
    let mut user = json!({
        "token": "admin",
        "as": format!("system:serviceaccount:{NAMESPACE}:galleonfs-node"),
        "as-groups": ["system:serviceaccounts", format!("system:serviceaccounts:{NAMESPACE}"), "system:authenticated"],
    });
    if let Some(node) = node {
        user["as-user-extra"] = json!({NODE_CLAIM: [node]});
    }
    user
}

/// Changes what is named, removes what is null, leaves the rest.
fn merge(into: &mut Value, change: &Value) {
    let Some(change) = change.as_object() else {
        *into = change.clone();
        return;
    };
    if !into.is_object() {
        *into = json!({});
    }
    for (key, value) in change {
        if value.is_null() {
            into.as_object_mut().expect("an object").remove(key);
        } else {
            merge(&mut into[key], value);
        }
    }
}

/// Ports that nobody listens on now. All are taken before any is let go, so that they differ.
fn free_ports<const N: usize>() -> [u16; N] {
    let taken: [TcpListener; N] = std::array::from_fn(|_| TcpListener::bind("127.0.0.1:0").expect("a free port"));
    std::array::from_fn(|i| taken[i].local_addr().expect("an address").port())
}

/// A volume that is given to node-a, with its replica and pool there.
fn objects() -> String {
    let volume = json!({
        "apiVersion": "galleonfs.io/v1alpha1",
        "kind": "GalleonVolume",
        "metadata": {"name": "v", "namespace": NAMESPACE, "finalizers": ["galleonfs.io/volume"]},
        "spec": {
            "sizeBytes": 1i64 << 30,
            "blockSize": 4096,
            "replicaCount": 1,
            "writeConcern": "durable",
            "csiName": "v",
            "capability": {"mode": "filesystem", "fsType": "ext4"},
            "attachTo": {"nodeName": "node-a", "readOnly": false, "accessMode": "SINGLE_NODE_WRITER", "mode": "filesystem"},
        },
    });
    let replica = json!({
        "apiVersion": "galleonfs.io/v1alpha1",
        "kind": "GalleonReplica",
        "metadata": {"name": "v-00001", "namespace": NAMESPACE, "finalizers": ["galleonfs.io/replica"]},
        "spec": {
            "volumeName": "v",
            "volumeUid": "00000000-0000-4000-8000-000000000000",
            "nodeName": "node-a",
            "poolName": "default.node-a",
            "sizeBytes": 1i64 << 30,
            "reservedBytes": 1i64 << 30,
        },
    });
    let pool = json!({
        "apiVersion": "galleonfs.io/v1alpha1",
        "kind": "StoragePool",
        "metadata": {"name": "default.node-a", "namespace": NAMESPACE},
        "spec": {"pool": "default", "nodeName": "node-a", "path": "/var/lib/galleonfs/pools/default", "media": "ssd"},
    });
    [volume, replica, pool].map(|object| object.to_string()).join("\n---\n")
}

const A: Option<&str> = Some("node-a");
const B: Option<&str> = Some("node-b");

/// One API server for all of it: starting one costs more than every question asked of it.
#[test]
fn a_node_plugin_can_change_what_is_its_nodes_and_nothing_else() {
    let server = ApiServer::start("admission");
    server
        .admin(&["create", "namespace", NAMESPACE])
        .expect("the namespace");
    let chart = helm_template(&[]).expect("the chart is rendered");
    let parts: Vec<&str> = chart.split("\n---\n").collect();
    // Definitions first: the objects of this test are of their kinds.
    let is_definition = |part: &&&str| part.contains("kind: CustomResourceDefinition");
    let definitions: Vec<&str> = parts.iter().filter(is_definition).copied().collect();
    server.apply(&definitions.join("\n---\n"));
    let others = parts
        .iter()
        .filter(|part| !is_definition(part) && !part.contains("helm.sh/hook: test"));
    server.apply(&others.copied().collect::<Vec<_>>().join("\n---\n"));
    server.wait("the definitions", || {
        server
            .admin(&["get", "galleonvolumes,galleonreplicas,storagepools"])
            .is_ok()
    });
    server.apply(&objects());

    // As the node plugin does it: the object that was read is put back with another status.
    let status = |node: Option<&str>, object: &str, change: Value| {
        let read = server.admin(&["get", object, "-o", "json"]).expect("the object");
        let mut wanted: Value = serde_json::from_str(&read).expect("JSON");
        merge(&mut wanted["status"], &change);
        server.node_with(
            node,
            &["replace", "--subresource=status", "-f", "-"],
            &wanted.to_string(),
        )
    };
    let whole = |node, object: &str, patch: Value| {
        let patch = patch.to_string();
        let mut arguments = vec!["patch"];
        arguments.extend(object.split('/'));
        arguments.extend(["--type=merge", "--patch", &patch]);
        server.node(node, &arguments)
    };
    let refused = |what: &str, answer: Result<String, String>, why: &str| match answer {
        Ok(said) => panic!("{what} was allowed: {said}"),
        Err(complaint) => assert!(complaint.contains(why), "{what}: {complaint}"),
    };
    let allowed = |what: &str, answer: Result<String, String>| {
        answer.unwrap_or_else(|complaint| panic!("{what}: {complaint}"));
    };
    let config = |epoch: i64, primary: &str| {
        let incarnation = format!("00000000-0000-4000-8000-{epoch:012}");
        json!({"config": {"epoch": epoch, "primary": primary, "incarnation": incarnation}})
    };
    let (volume, replica, pool) = (
        "galleonvolume/v",
        "galleonreplica/v-00001",
        "storagepool/default.node-a",
    );

    let start = json!({"status": {"config": {"epoch": 0, "inSync": ["v-00001"]}}}).to_string();
    let start = [
        "patch",
        "galleonvolume",
        "v",
        "--subresource=status",
        "--type=merge",
        "--patch",
        &start,
    ];
    server.admin(&start).expect("the controller's part");

    // The policy takes effect some moments after it is stored: the first refusal shows that it has.
    server.wait("the policy", || {
        status(B, pool, json!({"usableBytes": 1}))
            .is_err_and(|complaint| complaint.contains("is not an object of node node-b"))
    });

    // Another node's.
    let foreign = "is not an object of node node-b";
    refused(
        "another node's volume",
        status(B, volume, json!({"observedSizeBytes": 1})),
        foreign,
    );
    refused("another node's epoch", status(B, volume, config(1, "node-b")), foreign);
    refused(
        "another node's replica",
        status(B, replica, json!({"phase": "Ready"})),
        foreign,
    );
    refused(
        "a token without a node",
        status(None, pool, json!({"usableBytes": 1})),
        "the token names no node",
    );

    // One's own.
    allowed("one's own pool", status(A, pool, json!({"usableBytes": 1i64 << 40})));
    allowed("one's own replica", status(A, replica, json!({"phase": "Ready"})));
    refused(
        "naming another primary",
        status(A, volume, config(1, "node-b")),
        "make only itself the primary",
    );
    allowed("taking an attached volume over", status(A, volume, config(1, "node-a")));

    // Never, also not of one's own.
    let grow = json!({"spec": {"sizeBytes": 2i64 << 30}});
    refused(
        "a volume's spec",
        whole(A, volume, grow.clone()),
        "cannot patch resource \"galleonvolumes\"",
    );
    refused(
        "a pool's spec",
        whole(A, pool, json!({"spec": {"reserveBytes": 1}})),
        "cannot patch resource \"storagepools\"",
    );
    refused("a replica's spec", whole(A, replica, grow), "may not change a spec");
    refused(
        "labels",
        whole(A, replica, json!({"metadata": {"labels": {"a": "b"}}})),
        "may not change labels",
    );
    refused(
        "the finalizer of a replica that is wanted",
        whole(A, replica, json!({"metadata": {"finalizers": []}})),
        "from a replica that is being deleted",
    );
    let promise = json!({"reservations": {"u": {"volumeName": "v", "bytes": 1}}});
    refused(
        "a pool's reservations",
        status(A, pool, promise),
        "may not change the reservations",
    );
    refused(
        "deleting",
        server.node(A, &["delete", "galleonreplica", "v-00001"]),
        "cannot delete",
    );
    refused(
        "secrets",
        server.node(A, &["get", "secrets"]),
        "cannot list resource \"secrets\"",
    );

    // Released: the node may let go, and no more.
    let release = json!([{"op": "remove", "path": "/spec/attachTo"}]).to_string();
    server
        .admin(&["patch", "galleonvolume", "v", "--type=json", "--patch", &release])
        .expect("the controller's part");
    refused(
        "an epoch after release",
        status(A, volume, config(2, "node-a")),
        "only the node that spec.attachTo names",
    );
    let gone = json!({"config": {"primary": null, "incarnation": null}});
    refused("another's release", status(B, volume, gone.clone()), foreign);
    allowed("release", status(A, volume, gone));
    refused(
        "a volume that was released",
        status(A, volume, config(1, "node-a")),
        "is not an object of node node-a",
    );

    // Deleted: its finalizer is the node's to drop.
    server
        .admin(&["delete", "galleonreplica", "v-00001", "--wait=false"])
        .expect("the controller's part");
    let dropped = json!({"metadata": {"finalizers": []}});
    refused("another node's finalizer", whole(B, replica, dropped.clone()), foreign);
    allowed("its finalizer", whole(A, replica, dropped));
    let left = server.admin(&["get", "galleonreplicas", "-o", "name"]).expect("a list");
    assert_eq!(left, "", "the replica is gone");
}
