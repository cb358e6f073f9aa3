//! A network between nodes that loses everything, in one direction or in both.
//!
//! ```text
//!   node 1 ── packets to node 2 ──► node 2: FORWARD, INPUT ─► chain CUT: drop what comes from node 1 and its pods
//!                                           OUTPUT, FORWARD ─► chain CUT: drop what leaves, for a node without any network
//! ```
//!
//! Dropped, not refused: nobody hears that a packet was lost. The API server is reached as before, unless a node is
//! isolated or it is hidden from it.

use anyhow::Result;

use super::node::Node;
use super::run::{self, say};
use super::{Lab, network::Network};

const CHAIN: &str = "CUT";

/// While this lives, something is cut.
#[derive(Debug)]
pub struct Partition {
    network: Network,
    /// Number of a node, and what is dropped there.
    rules: Vec<(usize, String)>,
}

impl Lab {
    /// Nothing that the first node of a pair sends reaches the second one.
    pub fn drop_from_to(&self, ways: &[(&Node, &Node)]) -> Result<Partition> {
        let ways: Vec<_> = ways.iter().map(|(from, to)| (from.index(), to.index())).collect();
        Partition::of_ways(self.network(), &ways)
    }

    /// Neither of two groups of nodes reaches the other.
    pub fn split(&self, one: &[&Node], other: &[&Node]) -> Result<Partition> {
        let pairs = one.iter().flat_map(|a| other.iter().map(move |b| (*a, *b)));
        let ways: Vec<(&Node, &Node)> = pairs.flat_map(|(a, b)| [(a, b), (b, a)]).collect();
        self.drop_from_to(&ways)
    }

    /// The node reaches nobody and nobody reaches it, the API server included.
    pub fn isolate(&self, node: &Node) -> Result<Partition> {
        let mut partition = Partition::new(self.network());
        for way in ["--in-interface eth0", "--out-interface eth0"] {
            partition.rule(node.index(), way)?;
        }
        Ok(partition)
    }

    /// The node and the API server do not reach each other.
    pub fn hide_api_server(&self, node: &Node) -> Result<Partition> {
        let mut partition = Partition::new(self.network());
        let server = self.network().control_plane();
        for way in ["--source", "--destination"] {
            partition.rule(node.index(), &format!("{way} {server}"))?;
        }
        Ok(partition)
    }
}

impl Partition {
    fn new(network: &Network) -> Self {
        Self {
            network: network.clone(),
            rules: Vec::new(),
        }
    }

    /// Nothing that the first node of a pair sends reaches the second one; by their numbers.
    pub fn of_ways(network: &Network, ways: &[(usize, usize)]) -> Result<Self> {
        let mut partition = Self::new(network);
        for (from, to) in ways {
            for source in [network.node_address(*from), network.node_pods(*from)] {
                partition.rule(*to, &format!("--source {source}"))?;
            }
        }
        Ok(partition)
    }

    fn inside(&self, node: usize, line: &str) -> Result<String> {
        let namespace = self.network.namespace(node);
        run::words(&format!("nsenter --net={} iptables -w {line}", namespace.display()))
    }

    fn rule(&mut self, node: usize, what: &str) -> Result<()> {
        if self.inside(node, &format!("-n -L {CHAIN}")).is_err() {
            self.inside(node, &format!("-N {CHAIN}"))?;
            for chain in ["INPUT", "FORWARD", "OUTPUT"] {
                self.inside(node, &format!("-I {chain} -j {CHAIN}"))?;
            }
        }
        self.inside(node, &format!("-A {CHAIN} {what} -j DROP"))?;
        self.rules.push((node, what.to_string()));
        Ok(())
    }

    /// These packets arrive again.
    pub fn heal(mut self) -> Result<()> {
        self.remove()
    }

    fn remove(&mut self) -> Result<()> {
        while let Some((node, what)) = self.rules.pop() {
            self.inside(node, &format!("-D {CHAIN} {what} -j DROP"))?;
        }
        Ok(())
    }
}

/// A test that failed must not leave a network of pieces to the next one.
impl Drop for Partition {
    fn drop(&mut self) {
        if let Err(error) = self.remove() {
            say(&format!("    the network could not be healed: {error:#}"));
        }
    }
}
