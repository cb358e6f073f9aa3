//! etcd and kube-apiserver on loopback, and controllers that talk to them.

use std::{
    fs,
    net::TcpListener,
    path::{Path, PathBuf},
    process::Stdio,
    sync::Arc,
    time::Duration,
};

use anyhow::{Context, Result};
use galleonfs_api::{DRIVER_NAME, MediaType};
use galleonfs_controller::{ControllerConfig, DefaultPool, Delay, certificates::Times, run_until};
use galleonfs_csi_proto::csi::{controller_client::ControllerClient, identity_client::IdentityClient};
use k8s_openapi::api::{
    core::v1::{Namespace, Node},
    storage::v1::CSINode,
};
use kube::{Api, Client, api::PostParams, config::Kubeconfig};
use tokio::{
    process::{Child, Command},
    sync::{Mutex, oneshot},
    task::JoinHandle,
};
use tonic::transport::{Channel, Endpoint};

const START_MAX: Duration = Duration::from_secs(60);
/// What node plugins run as, in each scenario's namespace.
pub const NODE_ACCOUNT: &str = "galleonfs-node";
const TOKEN: &str = "only-for-this-run-on-loopback";

/// A running API server; each scenario gets a namespace of its own.
#[derive(Clone)]
pub struct Lab {
    pub client: Client,
    pub namespace: String,
    /// How long certificates last in this scenario.
    pub times: Times,
    /// How long a replica may stay away in this scenario.
    pub replacement_delay: Delay,
    directory: PathBuf,
    kubeconfig: PathBuf,
    children: Arc<Mutex<Vec<Child>>>,
}

impl Lab {
    pub async fn start(programs: &Path) -> Result<Self> {
        let directory = Path::new(env!("CARGO_TARGET_TMPDIR")).join(format!("api-server-{}", std::process::id()));
        fs::create_dir_all(&directory)?;
        let [client_port, peer_port, api_port] = free_ports()?;

        let etcd_url = format!("http://127.0.0.1:{client_port}");
        let peer_url = format!("http://127.0.0.1:{peer_port}");
        let etcd_program = ["etcd", "server"]
            .map(|name| programs.join(name))
            .into_iter()
            .find(|path| path.exists());
        let etcd_program = etcd_program.with_context(|| format!("there is no etcd in {}", programs.display()))?;
        let mut etcd = Command::new(etcd_program);
        etcd.arg("--data-dir")
            .arg(directory.join("etcd"))
            .args(["--name", "lab", "--unsafe-no-fsync"]);
        etcd.args(["--listen-client-urls", &etcd_url, "--advertise-client-urls", &etcd_url]);
        etcd.args([
            "--listen-peer-urls",
            &peer_url,
            "--initial-advertise-peer-urls",
            &peer_url,
        ]);
        etcd.args(["--initial-cluster", &format!("lab={peer_url}")]);
        let etcd = spawn(etcd, &directory.join("etcd.log"))?;

        let key = rcgen::KeyPair::generate()?;
        let (key_file, public_key_file) = (
            directory.join("service-accounts.key"),
            directory.join("service-accounts.pub"),
        );
        fs::write(&key_file, key.serialize_pem())?;
        fs::write(&public_key_file, key.public_key_pem())?;
        let token_file = directory.join("tokens.csv");
        fs::write(&token_file, format!("{TOKEN},admin,admin,system:masters\n"))?;
        let mut api_server = Command::new(programs.join("kube-apiserver"));
        api_server.args(["--etcd-servers", &etcd_url, "--bind-address=127.0.0.1"]);
        api_server.args([
            "--endpoint-reconciler-type=none",
            "--secure-port",
            &api_port.to_string(),
        ]);
        api_server.arg("--cert-dir").arg(directory.join("certificates"));
        api_server.arg("--token-auth-file").arg(&token_file);
        api_server.arg("--service-account-key-file").arg(&public_key_file);
        api_server.arg("--service-account-signing-key-file").arg(&key_file);
        api_server.args([
            "--service-account-issuer=https://lab.invalid",
            "--authorization-mode=RBAC",
        ]);
        api_server.args([
            "--service-cluster-ip-range=10.96.0.0/16",
            "--disable-admission-plugins=ServiceAccount",
        ]);
        let api_server = spawn(api_server, &directory.join("kube-apiserver.log"))?;

        let kubeconfig = directory.join("kubeconfig");
        fs::write(&kubeconfig, kubeconfig_text(api_port))?;
        let client = client(&kubeconfig).await?;
        let lab = Self {
            client,
            namespace: String::new(),
            times: Times::default(),
            replacement_delay: Delay(Duration::from_secs(600)),
            directory,
            kubeconfig,
            children: Arc::new(Mutex::new(vec![api_server, etcd])),
        };
        lab.await_ready().await?;
        for (node, zone) in [
            ("node-a", "one"),
            ("node-b", "one"),
            ("node-c", "two"),
            ("node-d", "two"),
        ] {
            lab.make_node(node, zone).await?;
        }
        Ok(lab)
    }

    async fn await_ready(&self) -> Result<()> {
        let namespaces: Api<Namespace> = Api::all(self.client.clone());
        let logs = self.directory.display();
        let ready = async {
            while namespaces.get("default").await.is_err() {
                for child in self.children.lock().await.iter_mut() {
                    let ended = child.try_wait()?;
                    anyhow::ensure!(ended.is_none(), "it ended early; logs: {logs}");
                }
                tokio::time::sleep(Duration::from_millis(100)).await;
            }
            Ok(())
        };
        let outcome = tokio::time::timeout(START_MAX, ready).await;
        outcome.with_context(|| format!("it does not get ready; logs: {logs}"))?
    }

    /// A node that is ready and whose kubelet knows the driver.
    async fn make_node(&self, name: &str, zone: &str) -> Result<()> {
        let metadata = serde_json::json!({"name": name, "labels": {"topology.kubernetes.io/zone": zone}});
        let node = serde_json::json!({
            "metadata": metadata,
            "status": {"conditions": [{"type": "Ready", "status": "True", "reason": "Lab", "message": ""}]},
        });
        let node: Node = serde_json::from_value(node)?;
        let nodes: Api<Node> = Api::all(self.client.clone());
        let mut made = nodes.create(&PostParams::default(), &node).await?;
        made.status = node.status;
        nodes.replace_status(name, &PostParams::default(), &made).await?;
        let driver = serde_json::json!({"name": DRIVER_NAME, "nodeID": name, "topologyKeys": []});
        let csi_node = serde_json::json!({"metadata": metadata, "spec": {"drivers": [driver]}});
        let csi_nodes: Api<CSINode> = Api::all(self.client.clone());
        csi_nodes
            .create(&PostParams::default(), &serde_json::from_value(csi_node)?)
            .await?;
        Ok(())
    }

    /// Lets a node be ready or not, as its kubelet's silence would.
    pub async fn set_ready(&self, name: &str, ready: bool) {
        let nodes: Api<Node> = Api::all(self.client.clone());
        let mut node = nodes.get(name).await.expect("the node");
        let conditions = node.status.as_mut().and_then(|status| status.conditions.as_mut());
        for condition in conditions
            .into_iter()
            .flatten()
            .filter(|condition| condition.type_ == "Ready")
        {
            condition.status = if ready { "True" } else { "Unknown" }.to_string();
        }
        nodes
            .replace_status(name, &PostParams::default(), &node)
            .await
            .expect("the node's status");
    }

    pub async fn in_own_namespace(&self, index: usize) -> Self {
        let namespace = format!("scenario-{index}");
        let object = serde_json::json!({"metadata": {"name": namespace}});
        let object: Namespace = serde_json::from_value(object).expect("a namespace");
        let namespaces: Api<Namespace> = Api::all(self.client.clone());
        namespaces
            .create(&PostParams::default(), &object)
            .await
            .expect("a namespace of its own");
        Self {
            namespace,
            ..self.clone()
        }
    }

    /// Starts a controller of this namespace and returns when it serves.
    pub async fn controller(&self, name: &str, default_pools: bool) -> Running {
        let kubeconfig = self.kubeconfig.clone();
        self.controller_at(name, default_pools, kubeconfig, true).await
    }

    /// Starts a controller that leads without asking anybody, as one does that has not noticed yet that another leads.
    pub async fn leading_controller(&self, name: &str) -> Running {
        let kubeconfig = self.kubeconfig.clone();
        self.controller_at(name, false, kubeconfig, false).await
    }

    /// Where files of this run may be put.
    pub fn directory(&self) -> &Path {
        &self.directory
    }

    /// A client that shows this token.
    pub async fn client_with(&self, token: &str) -> Client {
        let text = fs::read_to_string(&self.kubeconfig).expect("the kubeconfig of this run");
        let file = Kubeconfig::from_yaml(&text.replace(TOKEN, token)).expect("a kubeconfig");
        let config = kube::Config::from_custom_kubeconfig(file, &Default::default()).await;
        Client::try_from(config.expect("a configuration")).expect("a client")
    }

    async fn controller_at(
        &self,
        name: &str,
        default_pools: bool,
        kubeconfig: PathBuf,
        leader_election: bool,
    ) -> Running {
        let socket = self.directory.join(format!("{}-{name}.sock", self.namespace));
        let pool = DefaultPool {
            name: "default".into(),
            path: "/var/lib/pool".into(),
            media: MediaType::Ssd,
        };
        let config = ControllerConfig {
            csi_socket: socket.clone(),
            namespace: self.namespace.clone(),
            default_pools: default_pools.then_some(pool).into_iter().collect(),
            leader_election,
            identity: name.to_string(),
            health_address: None,
            node_service_account: NODE_ACCOUNT.to_owned(),
            certificate_times: self.times,
            replacement_delay: self.replacement_delay,
            kubeconfig: Some(kubeconfig),
        };
        let (stop, stopped) = oneshot::channel::<()>();
        let task = tokio::spawn(run_until(config, async {
            let _ = stopped.await;
        }));
        let connect = async {
            loop {
                let endpoint = Endpoint::try_from(format!("unix://{}", socket.display())).expect("a socket's address");
                match endpoint.connect().await {
                    Ok(channel) => break channel,
                    Err(_) => tokio::time::sleep(Duration::from_millis(20)).await,
                }
            }
        };
        let channel = tokio::time::timeout(START_MAX, connect)
            .await
            .expect("the controller serves");
        Running {
            controller: ControllerClient::new(channel.clone()),
            identity: IdentityClient::new(channel),
            stop: Some(stop),
            task,
        }
    }

    /// A controller whose API server does not answer.
    pub async fn controller_without_api_server(&self) -> Running {
        let [nobody] = free_ports().expect("a free port");
        let kubeconfig = self.directory.join("nobody.kubeconfig");
        fs::write(&kubeconfig, kubeconfig_text(nobody)).expect("a kubeconfig");
        self.controller_at("alone", false, kubeconfig, true).await
    }

    pub async fn stop(self) {
        for child in self.children.lock().await.iter_mut() {
            let _ = child.kill().await;
        }
        let _ = fs::remove_dir_all(self.directory.join("etcd"));
    }
}

/// A controller that runs in this process.
pub struct Running {
    pub controller: ControllerClient<Channel>,
    pub identity: IdentityClient<Channel>,
    stop: Option<oneshot::Sender<()>>,
    task: JoinHandle<Result<()>>,
}

impl Running {
    /// Ends it as SIGTERM would.
    pub async fn stop(mut self) {
        drop(self.stop.take());
        self.task.await.expect("no panic").expect("a good end");
    }

    /// Ends it as SIGKILL would: whatever it is doing stays half done.
    pub async fn kill(self) {
        self.task.abort();
        let _ = self.task.await;
    }
}

fn spawn(mut command: Command, log: &Path) -> Result<Child> {
    let log = fs::File::create(log)?;
    command
        .stdin(Stdio::null())
        .stdout(log.try_clone()?)
        .stderr(log)
        .kill_on_drop(true);
    let program = command.as_std().get_program().to_owned();
    command
        .spawn()
        .with_context(|| format!("starting {}", Path::new(&program).display()))
}

/// Ports of loopback that are free now. They are held together until all are known, so that they differ.
fn free_ports<const N: usize>() -> Result<[u16; N]> {
    let listeners = std::array::from_fn::<_, N, _>(|_| TcpListener::bind("127.0.0.1:0"));
    let mut ports = [0; N];
    for (port, listener) in ports.iter_mut().zip(listeners) {
        *port = listener?.local_addr()?.port();
    }
    Ok(ports)
}

fn kubeconfig_text(port: u16) -> String {
    format!(
        "apiVersion: v1\nkind: Config\ncurrent-context: lab\n\
         clusters: [{{name: lab, cluster: {{server: 'https://127.0.0.1:{port}', insecure-skip-tls-verify: true}}}}]\n\
         users: [{{name: admin, user: {{token: {TOKEN}}}}}]\n\
         contexts: [{{name: lab, context: {{cluster: lab, user: admin}}}}]\n"
    )
}

async fn client(kubeconfig: &Path) -> Result<Client> {
    let file = Kubeconfig::read_from(kubeconfig)?;
    let config = kube::Config::from_custom_kubeconfig(file, &Default::default()).await?;
    Ok(Client::try_from(config)?)
}
