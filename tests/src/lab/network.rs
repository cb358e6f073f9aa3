//! The lab's network: a bridge on this machine with the control plane's address, and one network namespace per node.
//!
//! ```text
//!   machine            10.K.0.1 on bridge gfs-<lab>   (etcd, API server, controller manager, scheduler)
//!                        │             │
//!   node 1, netns      10.K.0.11     10.K.0.12        node 2, netns
//!                        │             │
//!   its pods           10.K.1.0/24   10.K.2.0/24      its pods (bridge cni0 inside the netns)
//! ```
//!
//! Every node has a route to every other node's pods, so nothing is masqueraded. There is no kube-proxy: the one
//! service address that pods must reach, the API server's, is a fixed translation in each node.

use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Result, bail};
use ring::digest;
use serde::{Deserialize, Serialize};

use super::run;

/// The first address of the service range always belongs to the API server.
pub const SERVICE_RANGE: &str = "10.96.0.0/16";
pub const API_SERVICE: &str = "10.96.0.1";
/// Where pods look for names. Nobody answers: the lab has no cluster DNS, and nothing in it needs one.
pub const DNS_SERVICE: &str = "10.96.0.10";
const API_PORT: u16 = 6443;
/// A subnet's number follows from the lab's name, within these.
const SUBNETS: std::ops::Range<u8> = 100..250;
/// Kubernetes' own default pod and service ranges, and ours: not to be hit by chance.
const FORBIDDEN: [u8; 2] = [96, 244];

#[derive(Clone, Debug, Serialize, Deserialize, PartialEq, Eq)]
pub struct Network {
    /// Bridge, and prefix of every other name.
    prefix: String,
    /// The K of 10.K.0.0/16.
    subnet: u8,
}

impl Network {
    /// Chooses a subnet that this machine does not use yet.
    pub fn choose(prefix: &str) -> Result<Self> {
        let used = run::words("ip -4 route show table all")?;
        let start = digest::digest(&digest::SHA256, prefix.as_bytes()).as_ref()[0];
        for step in 0..SUBNETS.len() {
            let subnet = SUBNETS.start + u8::try_from((usize::from(start) + step) % SUBNETS.len())?;
            let taken = used.contains(&format!(" 10.{subnet}.")) || used.contains(&format!("\n10.{subnet}."));
            if !FORBIDDEN.contains(&subnet) && !taken && !used.starts_with(&format!("10.{subnet}.")) {
                return Ok(Self {
                    prefix: prefix.to_string(),
                    subnet,
                });
            }
        }
        bail!(
            "all networks 10.{}.0.0/16 to 10.{}.0.0/16 are in use on this machine",
            SUBNETS.start,
            SUBNETS.end
        )
    }

    /// The control plane's address.
    pub fn control_plane(&self) -> String {
        format!("10.{}.0.1", self.subnet)
    }

    pub fn api_server(&self) -> String {
        format!("https://{}:{API_PORT}", self.control_plane())
    }

    pub fn pod_range(&self) -> String {
        format!("10.{}.0.0/16", self.subnet)
    }

    /// Nodes are numbered from 1.
    pub fn node_address(&self, index: usize) -> String {
        format!("10.{}.0.{}", self.subnet, 10 + index)
    }

    pub fn node_pods(&self, index: usize) -> String {
        format!("10.{}.{index}.0/24", self.subnet)
    }

    /// The file that names a node's network namespace.
    pub fn namespace(&self, index: usize) -> PathBuf {
        Path::new("/run/netns").join(self.node_name(index))
    }

    fn node_name(&self, index: usize) -> String {
        format!("{}-{index}", self.prefix)
    }

    pub fn create(&self, nodes: usize) -> Result<()> {
        let bridge = &self.prefix;
        let here = self.control_plane();
        run::words(&format!("ip link add {bridge} type bridge"))?;
        run::words(&format!("ip address add {here}/24 dev {bridge}"))?;
        run::words(&format!("ip link set {bridge} up"))?;
        if self.bridge_is_filtered() {
            run::words(&format!("iptables -w -I FORWARD {}", self.forward_rule()))?;
        }
        for index in 1..=nodes {
            self.create_node(index, nodes)?;
        }
        Ok(())
    }

    fn create_node(&self, index: usize, nodes: usize) -> Result<()> {
        let (bridge, name, here) = (&self.prefix, self.node_name(index), self.control_plane());
        let (address, pods) = (self.node_address(index), self.node_pods(index));
        run::words(&format!("ip netns add {name}"))?;
        run::words(&format!("ip link add {name} type veth peer name eth0 netns {name}"))?;
        run::words(&format!("ip link set {name} master {bridge} up"))?;
        let inside = |line: &str| run::words(&format!("nsenter --net={} {line}", self.namespace(index).display()));
        inside("ip link set lo up")?;
        inside(&format!("ip address add {address}/24 dev eth0"))?;
        inside("ip link set eth0 up")?;
        inside(&format!("ip route add default via {here}"))?;
        let forward = "echo 1 > /proc/sys/net/ipv4/ip_forward";
        let namespace = format!("--net={}", self.namespace(index).display());
        run::output(&mut run::command("nsenter", [namespace.as_str(), "sh", "-c", forward]))?;
        for other in (1..=nodes).filter(|other| *other != index) {
            inside(&format!(
                "ip route add {} via {}",
                self.node_pods(other),
                self.node_address(other)
            ))?;
        }
        // From pods, and from the node itself (pods in the host's network).
        for chain in ["PREROUTING", "OUTPUT"] {
            let to = format!("-j DNAT --to-destination {here}:{API_PORT}");
            inside(&format!(
                "iptables -w -t nat -A {chain} -d {API_SERVICE}/32 -p tcp --dport 443 {to}"
            ))?;
        }
        // Every other service has no way to its pods here: say so at once, as kube-proxy does for one without pods.
        for chain in ["FORWARD", "OUTPUT"] {
            inside(&format!("iptables -w -A {chain} -d {SERVICE_RANGE} -j REJECT"))?;
        }
        // The API server calls pods' addresses, and so does a person with curl.
        run::words(&format!("ip route add {pods} via {address}"))?;
        Ok(())
    }

    /// Some machines (those that run Docker) pass bridged frames through iptables and drop what they do not know.
    fn bridge_is_filtered(&self) -> bool {
        let setting = fs::read_to_string("/proc/sys/net/bridge/bridge-nf-call-iptables");
        setting.is_ok_and(|value| value.trim() == "1")
    }

    fn forward_rule(&self) -> String {
        format!("-i {0} -o {0} -j ACCEPT", self.prefix)
    }
}

/// Removes whatever a lab with this prefix left, however it ended.
pub fn remove(prefix: &str) {
    let own = |name: &str| {
        name.strip_prefix(prefix)
            .is_some_and(|rest| rest.is_empty() || rest.starts_with('-'))
    };
    for entry in fs::read_dir("/run/netns").into_iter().flatten().flatten() {
        let name = entry.file_name().to_string_lossy().into_owned();
        if own(&name) {
            run::ignore(&mut run::command("ip", ["netns", "delete", &name]));
        }
    }
    for entry in fs::read_dir("/sys/class/net").into_iter().flatten().flatten() {
        let name = entry.file_name().to_string_lossy().into_owned();
        if own(&name) {
            run::ignore(&mut run::command("ip", ["link", "delete", &name]));
        }
    }
    if run::which("iptables").is_some() {
        run::ignore(&mut run::words_command(&format!(
            "iptables -w -D FORWARD -i {prefix} -o {prefix} -j ACCEPT"
        )));
    }
}
