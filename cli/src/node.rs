//! `galleonfs node`: flags become the node process's configuration.

use std::{
    net::{IpAddr, SocketAddr},
    path::PathBuf,
    time::Duration,
};

use clap::{Args, value_parser};
use galleonfs_node_plugin::{NodeConfig, engine::ScrubPlan};

const MIB: usize = 1 << 20;

#[derive(Args, Clone, Debug)]
pub struct NodeArguments {
    /// This node's name in the cluster.
    #[arg(long, env = "NODE_NAME", value_name = "NAME")]
    pub node_name: String,
    /// The namespace that GalleonFS is installed in: its objects are there.
    #[arg(long, env = "POD_NAMESPACE", default_value = "galleonfs-system")]
    pub namespace: String,
    /// The kubelet's --root-dir.
    #[arg(
        long,
        env = "GALLEONFS_KUBELET_DIR",
        default_value = "/var/lib/kubelet",
        value_name = "PATH"
    )]
    pub kubelet_dir: PathBuf,
    /// The CSI socket. Left out: plugins/csi.galleonfs.io/csi.sock in the kubelet's directory.
    #[arg(long, env = "GALLEONFS_CSI_SOCKET", value_name = "PATH")]
    pub csi_socket: Option<PathBuf>,
    /// The CSI socket as the kubelet sees it, where that differs.
    #[arg(long, env = "GALLEONFS_CSI_SOCKET_ON_HOST", value_name = "PATH")]
    pub csi_socket_on_host: Option<PathBuf>,
    /// Where the kubelet looks for drivers. Left out: plugins_registry in the kubelet's directory.
    #[arg(long, env = "GALLEONFS_REGISTRATION_DIR", value_name = "PATH")]
    pub registration_dir: Option<PathBuf>,
    /// Pool directories below here are made when they are missing; anywhere else a missing one is a fault of the disk.
    #[arg(long, env = "GALLEONFS_DATA_DIR", value_name = "PATH")]
    pub data_dir: Option<PathBuf>,
    /// FUSE mount points live below.
    #[arg(long, env = "GALLEONFS_RUN_DIR", value_name = "PATH")]
    pub run_dir: Option<PathBuf>,
    /// Where to serve /healthz, /readyz and /metrics.
    #[arg(long, env = "GALLEONFS_HEALTH_ADDRESS", value_name = "IP:PORT")]
    pub health_address: Option<SocketAddr>,
    /// Port on which the plugins of other nodes connect. Left out: 9811.
    #[arg(long, env = "GALLEONFS_REPLICATION_PORT", value_name = "PORT", value_parser = value_parser!(u16).range(1..))]
    pub replication_port: Option<u16>,
    /// The address under which other nodes reach this one. Left out: it is not told to them.
    #[arg(long, env = "POD_IP", value_name = "IP")]
    pub reached_at: Option<IpAddr>,
    /// Threads that serve volumes; 0 follows the number of CPUs.
    #[arg(long, env = "GALLEONFS_SHARDS", default_value_t = 0, value_name = "COUNT")]
    pub shards: usize,
    /// Memory for the maps of all volumes together, in MiB. Left out: 256.
    #[arg(long, env = "GALLEONFS_MAP_BUDGET_MIB", value_name = "MIB", value_parser = map_budget)]
    pub map_budget_mib: Option<usize>,
    /// Days between two verifications of everything that a volume stores; 0 for none. Left out: 7.
    #[arg(long, env = "GALLEONFS_SCRUB_EVERY_DAYS", value_name = "DAYS", value_parser = value_parser!(u32).range(..=3650))]
    pub scrub_every_days: Option<u32>,
    /// How fast that goes at most, in MiB per second and volume. Left out: 32.
    #[arg(long, env = "GALLEONFS_SCRUB_MIB_PER_SECOND", value_name = "MIB", value_parser = value_parser!(u32).range(1..=65_536))]
    pub scrub_mib_per_second: Option<u32>,
}

/// Below this the maps of a few busy volumes push each other out, and every read costs a second one.
const MAP_BUDGET_MIB_MIN: usize = 16;

fn map_budget(text: &str) -> Result<usize, String> {
    let budget: usize = text.parse().map_err(|_| format!("{text:?} is no number"))?;
    match budget {
        MAP_BUDGET_MIB_MIN..=0x10_0000 => Ok(budget),
        _ => Err(format!("{budget} is outside {MAP_BUDGET_MIB_MIN} MiB to 1 TiB")),
    }
}

impl From<NodeArguments> for NodeConfig {
    fn from(given: NodeArguments) -> Self {
        let mut config = Self::new(&given.node_name, &given.namespace, given.kubelet_dir);
        if let Some(socket) = given.csi_socket {
            config.socket_on_host = socket.clone();
            config.socket = socket;
        }
        config.socket_on_host = given.csi_socket_on_host.unwrap_or(config.socket_on_host);
        config.registration_dir = given.registration_dir.unwrap_or(config.registration_dir);
        config.data_dir = given.data_dir.unwrap_or(config.data_dir);
        config.runtime_dir = given.run_dir.unwrap_or(config.runtime_dir);
        config.health_address = given.health_address.unwrap_or(config.health_address);
        if let Some(port) = given.replication_port {
            config.replication_address.set_port(port);
        }
        config.reached_at = given.reached_at;
        config.shards = given.shards;
        if let Some(budget) = given.map_budget_mib {
            config.map_budget_bytes = budget * MIB;
        }
        let mut plan = ScrubPlan::default();
        if let Some(days) = given.scrub_every_days {
            plan.every = Duration::from_secs(u64::from(days) * 24 * 3600);
        }
        if let Some(pace) = given.scrub_mib_per_second {
            plan.bytes_per_second = u64::from(pace) * MIB as u64;
        }
        config.scrub = (!plan.every.is_zero()).then_some(plan);
        config
    }
}
