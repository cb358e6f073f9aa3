//! `galleonfs controller`: flags become the controller's configuration.

use std::{net::SocketAddr, path::PathBuf};

use clap::Args;
use galleonfs_controller::{ControllerConfig, DefaultPool, Delay, certificates::Times};

#[derive(Args, Clone, Debug)]
pub struct ControllerArguments {
    /// The socket on which the sidecars find CSI.
    #[arg(
        long,
        env = "GALLEONFS_CSI_SOCKET",
        default_value = "/csi/csi.sock",
        value_name = "PATH"
    )]
    pub csi_socket: PathBuf,
    /// The namespace that GalleonFS is installed in: its objects and its Lease are there.
    #[arg(long, env = "POD_NAMESPACE", default_value = "galleonfs-system")]
    pub namespace: String,
    /// A pool to make on every node: name=default,path=/var/lib/galleonfs/pools/default,media=ssd. May be repeated.
    #[arg(long = "default-pool", value_name = "POOL")]
    pub default_pools: Vec<DefaultPool>,
    /// Lead without an election. Only where it is certain that there is no second controller.
    #[arg(long, env = "GALLEONFS_NO_LEADER_ELECTION")]
    pub no_leader_election: bool,
    /// The name under which this process stands for election.
    #[arg(long, env = "POD_NAME", default_value = "galleonfs-controller", value_name = "NAME")]
    pub identity: String,
    /// Where to serve /healthz, /readyz and /metrics. Nowhere when left out.
    #[arg(long, env = "GALLEONFS_HEALTH_ADDRESS", value_name = "IP:PORT")]
    pub health_address: Option<SocketAddr>,
    /// The service account that node plugins run as: only it may have certificates of nodes.
    #[arg(
        long,
        env = "GALLEONFS_NODE_SERVICE_ACCOUNT",
        default_value = "galleonfs-node",
        value_name = "NAME"
    )]
    pub node_service_account: String,
    /// How long a replica may stay away before another is made in its place: 90s, 10m, 1h30m.
    #[arg(
        long,
        env = "GALLEONFS_REPLACEMENT_DELAY",
        default_value = "10m",
        value_name = "TIME"
    )]
    pub replacement_delay: Delay,
    /// A kubeconfig file. Left out: the pod's service account, else $KUBECONFIG, else ~/.kube/config.
    #[arg(long, value_name = "PATH")]
    pub kubeconfig: Option<PathBuf>,
}

impl From<ControllerArguments> for ControllerConfig {
    fn from(given: ControllerArguments) -> Self {
        Self {
            csi_socket: given.csi_socket,
            namespace: given.namespace,
            default_pools: given.default_pools,
            leader_election: !given.no_leader_election,
            identity: given.identity,
            health_address: given.health_address,
            node_service_account: given.node_service_account,
            certificate_times: Times::default(),
            replacement_delay: given.replacement_delay,
            kubeconfig: given.kubeconfig,
        }
    }
}
