//! What every cluster test needs: a namespace, claims and pods, and a way to look behind them.

use std::cell::RefCell;
use std::collections::BTreeMap;
use std::io::{Read, Write};
use std::net::TcpStream;
use std::path::Path;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use galleonfs_tests::lab::run::wait_for;
use galleonfs_tests::lab::{Kubectl, Lab, Node, images, install};
use serde_json::{Value, json};

/// Generous: the machine may be busy with other tests.
pub const SOON: Duration = Duration::from_secs(120);

/// For everything that a test leaves.
const REMOVED: Duration = Duration::from_secs(300);

/// Where the chart has the node plugin serve its pages.
const METRICS_PORT: u16 = 9808;
const METRICS_PATIENCE: Duration = Duration::from_secs(10);

pub const DRIVER: &str = "csi.galleonfs.io";
pub const CLASS: &str = "galleonfs";

pub struct World<'a> {
    pub lab: &'a Lab,
    /// The program under test, on this machine.
    pub program: &'a Path,
    /// In the test's own namespace.
    pub kubectl: Kubectl,
    /// In the namespace where GalleonFS is installed.
    pub system: Kubectl,
    namespace: String,
    /// Objects outside the namespace, to be removed with it.
    strays: RefCell<Vec<(String, String)>>,
}

impl<'a> World<'a> {
    pub fn create(lab: &'a Lab, program: &'a Path, index: usize) -> Result<Self> {
        let kubectl = lab.kubectl();
        // A number of its own: the last run's namespace may still be on its way out.
        let namespace = format!("t{index}-{}", std::process::id());
        kubectl.run(&["create", "namespace", &namespace])?;
        wait_for("the namespace's service account", SOON, || {
            kubectl
                .in_namespace(&namespace)
                .run(&["get", "serviceaccount", "default"])
                .map(Some)
        })?;
        let system = kubectl.in_namespace(install::NAMESPACE);
        Ok(Self {
            lab,
            program,
            kubectl: kubectl.in_namespace(&namespace),
            system,
            namespace,
            strays: RefCell::default(),
        })
    }

    /// Removes the namespace and waits until its volumes are gone too.
    pub fn remove(self) -> Result<()> {
        for kind in ["pods", "persistentvolumeclaims"] {
            // Fifty of them at once may take the API server longer than it lets a request take.
            wait_for(&format!("all {kind} to be deleted"), REMOVED, || {
                let delete = ["delete", kind, "--all", "--wait", "--timeout=120s"];
                self.kubectl.run(&delete).map(Some)
            })?;
        }
        for (kind, name) in self.strays.borrow().iter() {
            self.kubectl.delete(kind, name, SOON)?;
        }
        self.kubectl.delete("namespace", &self.namespace, SOON)
    }

    /// A class of the test's own, gone with the test.
    pub fn class(&self, suffix: &str, binding: &str, reclaim: &str, parameters: Value) -> Result<String> {
        let name = format!("{}-{suffix}", self.namespace);
        let class = json!({
            "apiVersion": "storage.k8s.io/v1",
            "kind": "StorageClass",
            "metadata": {"name": name},
            "provisioner": DRIVER,
            "volumeBindingMode": binding,
            "reclaimPolicy": reclaim,
            "allowVolumeExpansion": true,
            "parameters": parameters,
        });
        self.kubectl.apply(&class.to_string())?;
        self.stray("storageclass", &name);
        Ok(name)
    }

    pub fn stray(&self, kind: &str, name: &str) {
        self.strays.borrow_mut().push((kind.to_string(), name.to_string()));
    }

    pub fn claim(&self, name: &str, class: &str, size: &str, mode: &str) -> Result<()> {
        self.kubectl
            .apply(&claim(name, class, size, mode).to_string())
            .map(drop)
    }

    /// Starts a pod that waits to be told what to do, with the claim at /data (or as /dev/volume).
    pub fn pod(&self, name: &str, claim: &str, image: &str) -> Result<()> {
        self.kubectl
            .apply(&pod(name, &[claim], image, false, None).to_string())
            .map(drop)
    }

    pub fn block_pod(&self, name: &str, claim: &str) -> Result<()> {
        self.kubectl
            .apply(&pod(name, &[claim], images::BUSYBOX, true, None).to_string())
            .map(drop)
    }

    /// A claim of the chart's class with a pod that uses it, ready.
    pub fn claim_and_pod(&self, name: &str, size: &str) -> Result<Value> {
        self.claim(name, CLASS, size, "Filesystem")?;
        self.pod(name, name, images::BUSYBOX)?;
        self.kubectl.wait_ready(name, SOON)
    }

    /// Deletes a pod and makes another one of the same name and image.
    pub fn replace_pod(&self, name: &str, claim: &str, image: &str) -> Result<Value> {
        self.kubectl.delete("pod", name, SOON)?;
        self.pod(name, claim, image)?;
        self.kubectl.wait_ready(name, SOON)
    }

    pub fn node_of(&self, pod: &Value) -> Result<Node> {
        self.lab
            .node(pod["spec"]["nodeName"].as_str().context("the pod runs nowhere")?)
    }

    /// The persistent volume that the claim is bound to.
    pub fn volume_of(&self, claim: &str) -> Result<Value> {
        let claim = self.kubectl.json(&["get", "pvc", claim])?;
        let name = claim["spec"]["volumeName"].as_str().context("the claim is not bound")?;
        self.kubectl.json(&["get", "pv", name])
    }

    /// Our own object behind the claim.
    pub fn galleon_volume_of(&self, claim: &str) -> Result<Value> {
        let volume = self.volume_of(claim)?;
        let handle = volume["spec"]["csi"]["volumeHandle"]
            .as_str()
            .context("the volume has no handle")?;
        self.system.json(&["get", "galleonvolume", handle])
    }

    pub fn replicas_of(&self, galleon_volume: &str) -> Result<Vec<Value>> {
        let all = self.system.json(&["get", "galleonreplicas"])?;
        let items = all["items"].as_array().cloned().unwrap_or_default();
        Ok(items
            .into_iter()
            .filter(|replica| replica["spec"]["volumeName"] == galleon_volume)
            .collect())
    }

    /// The pod of our DaemonSet on this node.
    pub fn plugin_on(&self, node: &Node) -> Result<Value> {
        let selector = format!("spec.nodeName={}", node.name());
        let label = "app.kubernetes.io/component=node";
        let pods = self
            .system
            .json(&["get", "pods", "-l", label, "--field-selector", &selector])?;
        let running = pods["items"]
            .as_array()
            .into_iter()
            .flatten()
            .find(|pod| pod["metadata"]["deletionTimestamp"].is_null());
        running
            .cloned()
            .with_context(|| format!("no node plugin runs on {}", node.name()))
    }

    /// The container of a node's plugin, as its cgroup is named.
    pub fn plugin_container(&self, node: &Node) -> Result<String> {
        let plugin = self.plugin_on(node)?;
        let id = plugin["status"]["containerStatuses"][0]["containerID"].as_str();
        let id = id.context("the plugin runs no container")?;
        Ok(id.trim_start_matches("containerd://").to_string())
    }

    /// What the node plugin counts: the value behind each name with its labels.
    pub fn metrics_of(&self, node: &Node) -> Result<BTreeMap<String, f64>> {
        let plugin = self.plugin_on(node)?;
        let address = plugin["status"]["podIP"]
            .as_str()
            .context("the plugin has no address")?;
        let mut stream = TcpStream::connect((address, METRICS_PORT)).context("connecting to the metrics page")?;
        stream.set_read_timeout(Some(METRICS_PATIENCE))?;
        write!(
            stream,
            "GET /metrics HTTP/1.1\r\nHost: {address}\r\nConnection: close\r\n\r\n"
        )?;
        let mut page = String::new();
        stream.read_to_string(&mut page).context("reading the metrics page")?;
        let lines = page.lines().filter(|line| line.starts_with("galleonfs_"));
        let values = lines.filter_map(|line| line.rsplit_once(' '));
        Ok(values
            .filter_map(|(name, value)| Some((name.to_string(), value.parse().ok()?)))
            .collect())
    }

    /// Kills the node plugin as the kernel would, and waits until its successor is ready.
    pub fn kill_plugin(&self, node: &Node) -> Result<Duration> {
        let id = self.plugin_container(node)?;
        node.kill_container(&id)?;
        let start = Instant::now();
        wait_for("the node plugin's successor", SOON, || {
            let plugin = self.plugin_on(node)?;
            let status = &plugin["status"]["containerStatuses"][0];
            let other = status["containerID"].as_str().is_some_and(|now| !now.ends_with(&id));
            Ok((other && status["ready"] == true).then_some(()))
        })?;
        Ok(start.elapsed())
    }

    pub fn wait_gone(&self, kubectl: &Kubectl, kind: &str, name: &str) -> Result<()> {
        wait_for(&format!("{kind} {name} to be gone"), SOON, || {
            Ok(kubectl
                .run(&["get", kind, name, "--ignore-not-found", "-o", "name"])?
                .is_empty()
                .then_some(()))
        })
    }

    pub fn wait_bound(&self, claim: &str) -> Result<Value> {
        let bound = wait_for(&format!("claim {claim} to be bound"), SOON, || {
            let object = self.kubectl.json(&["get", "pvc", claim])?;
            Ok((object["status"]["phase"] == "Bound").then_some(object))
        });
        bound.map_err(|error| error.context(self.kubectl.events(claim).unwrap_or_default()))
    }

    /// What a person would look at when a test failed.
    pub fn diagnosis(&self) -> String {
        let say = |kubectl: &Kubectl, arguments: &[&str]| {
            let text = kubectl.run(arguments).unwrap_or_else(|error| format!("{error:#}"));
            format!("--- kubectl {}\n{}\n", arguments.join(" "), text.trim_end())
        };
        [
            say(&self.kubectl, &["get", "pods,pvc", "-o", "wide"]),
            say(&self.kubectl, &["get", "events", "--sort-by=.lastTimestamp"]),
            say(
                &self.system,
                &["get", "galleonvolumes,galleonreplicas,storagepools,pods", "-o", "wide"],
            ),
            say(
                &self.system,
                &[
                    "logs",
                    "-l",
                    "app.kubernetes.io/component=node",
                    "--prefix",
                    "--tail=12",
                ],
            ),
            say(
                &self.system,
                &[
                    "logs",
                    "deployment/galleonfs-controller",
                    "-c",
                    "controller",
                    "--tail=25",
                ],
            ),
        ]
        .concat()
    }
}

pub fn claim(name: &str, class: &str, size: &str, mode: &str) -> Value {
    json!({
        "apiVersion": "v1",
        "kind": "PersistentVolumeClaim",
        "metadata": {"name": name},
        "spec": {
            "storageClassName": class,
            "accessModes": ["ReadWriteOnce"],
            "volumeMode": mode,
            "resources": {"requests": {"storage": size}},
        },
    })
}

/// A pod that sleeps until it is told to end. One claim is at `/data` or `/dev/volume`, several at `/data/<index>`.
pub fn pod(name: &str, claims: &[&str], image: &str, block: bool, node: Option<&str>) -> Value {
    let volumes: Vec<Value> = claims
        .iter()
        .enumerate()
        .map(|(index, claim)| json!({"name": format!("v{index}"), "persistentVolumeClaim": {"claimName": claim}}))
        .collect();
    let place = |index: usize| {
        if claims.len() == 1 {
            "/data".to_string()
        } else {
            format!("/data/{index}")
        }
    };
    let mounts: Vec<Value> = (0..claims.len())
        .map(|index| match block {
            true => json!({"name": format!("v{index}"), "devicePath": "/dev/volume"}),
            false => json!({"name": format!("v{index}"), "mountPath": place(index)}),
        })
        .collect();
    let mut container = json!({
        "name": "main",
        "image": image,
        "imagePullPolicy": "Never",
        "command": ["sh", "-c", "trap 'exit 0' TERM; while :; do sleep 1 & wait $!; done"],
    });
    container[if block { "volumeDevices" } else { "volumeMounts" }] = mounts.into();
    let mut spec = json!({
        "restartPolicy": "Never",
        "terminationGracePeriodSeconds": 5,
        "automountServiceAccountToken": false,
        "containers": [container],
        "volumes": volumes,
    });
    if let Some(node) = node {
        // By selector, not by nodeName: the scheduler must have its say about the volume.
        spec["nodeSelector"] = json!({"kubernetes.io/hostname": node});
    }
    json!({"apiVersion": "v1", "kind": "Pod", "metadata": {"name": name}, "spec": spec})
}

/// The first word of what a checksum program says.
pub fn checksum(said: &str) -> Result<String> {
    match said.split_whitespace().next() {
        Some(sum) if sum.len() == 64 => Ok(sum.to_string()),
        _ => bail!("no checksum in {said:?}"),
    }
}
