//! A whole cluster: started, found again, stopped.

use std::fs::{self, File};
use std::path::PathBuf;
use std::thread;
use std::time::Duration;

use anyhow::{Context, Result, bail};
use nix::fcntl::{Flock, FlockArg};
use serde::{Deserialize, Serialize};

use super::binaries::{self, Binaries};
use super::certificates::Authority;
use super::control_plane::{self, ControlPlane};
use super::images::{self, Image};
use super::kubectl::{Kubectl, condition};
use super::layout::{Layout, write_file};
use super::network::Network;
use super::node::Node;
use super::prerequisites;
use super::processes::Processes;
use super::run::{say, step, wait_for};
use super::seed::Seed;
use super::sweep::sweep;

/// Node addresses and pod ranges have room for these, and no machine for more.
const NODES_MAX: usize = 50;

#[derive(Clone, Debug)]
pub struct Options {
    pub name: String,
    pub nodes: usize,
}

/// What is written down about a running lab, so that another process finds it.
#[derive(Clone, Debug, Serialize, Deserialize, PartialEq, Eq)]
pub struct Shape {
    nodes: usize,
    network: Network,
}

/// A cluster that runs.
#[derive(Clone, Debug)]
pub struct Lab {
    layout: Layout,
    binaries: Binaries,
    shape: Shape,
    pub(super) processes: Processes,
}

impl Lab {
    /// Gives the running lab of this name, or starts it. Whatever a crashed one left is removed first.
    pub fn up(options: &Options) -> Result<Self> {
        if !(1..=NODES_MAX).contains(&options.nodes) {
            bail!("a lab has 1 to {NODES_MAX} nodes, not {}", options.nodes);
        }
        let layout = Layout::new(&options.name)?;
        prerequisites::ensure()?;
        let _lock = lock(&layout)?;
        let binaries = binaries::ensure(&layout)?;
        let images = images::ensure_base(&layout, &binaries)?;
        if let Ok(lab) = Self::find(&layout, &binaries) {
            if lab.shape.nodes == options.nodes && lab.check().is_ok() {
                lab.import(&images)?;
                return Ok(lab);
            }
            say(&format!(
                "    the lab `{}` is not what was asked for, or not healthy: it is made anew",
                layout.name()
            ));
        }
        sweep(&layout)?;
        let seed = Seed::ensure(&layout, &binaries, &images)?;
        step(&format!("Starting Kubernetes with {} nodes", options.nodes), || {
            Self::start(&layout, &binaries, options.nodes, &seed)
        })
    }

    /// A lab that was started before, also by another process.
    pub fn attach(name: &str) -> Result<Self> {
        let layout = Layout::new(name)?;
        let binaries = binaries::ensure(&layout)?;
        Self::find(&layout, &binaries)
    }

    fn find(layout: &Layout, binaries: &Binaries) -> Result<Self> {
        let text =
            fs::read_to_string(layout.shape()).with_context(|| format!("no lab `{}` is running", layout.name()))?;
        let shape = serde_json::from_str(&text).context("the lab's own description is damaged; `down` removes it")?;
        Ok(Self {
            layout: layout.clone(),
            binaries: binaries.clone(),
            shape,
            processes: Processes::new(layout),
        })
    }

    fn start(layout: &Layout, binaries: &Binaries, nodes: usize, seed: &Seed) -> Result<Self> {
        let _ = fs::remove_dir_all(layout.logs());
        fs::create_dir_all(layout.logs())?;
        let network = Network::choose(&layout.prefix())?;
        let shape = Shape { nodes, network };
        write_file(&layout.shape(), serde_json::to_string(&shape)?)?;
        let lab = Self {
            layout: layout.clone(),
            binaries: binaries.clone(),
            shape,
            processes: Processes::new(layout),
        };
        lab.shape.network.create(nodes)?;
        let authority = Authority::create(&layout.pki())?;
        let control_plane = ControlPlane {
            layout,
            binaries,
            network: &lab.shape.network,
            authority: &authority,
            processes: &lab.processes,
        };
        // Nodes bring up their runtime and images while the API server makes itself ready.
        thread::scope(|scope| -> Result<()> {
            let authority = &authority;
            let runtimes: Vec<_> = lab
                .nodes()
                .into_iter()
                .map(|node| {
                    scope.spawn(move || -> Result<()> {
                        node.configure(authority, seed)?;
                        node.start_runtime()
                    })
                })
                .collect();
            control_plane.start()?;
            for runtime in runtimes {
                runtime.join().expect("a node's start does not panic")?;
            }
            Ok(())
        })?;
        for node in lab.nodes() {
            node.start_kubelet()?;
        }
        lab.wait_nodes_ready(Duration::from_secs(120))?;
        Ok(lab)
    }

    /// Stops the lab and removes everything but its logs. Fine when there is none.
    pub fn down(name: &str) -> Result<()> {
        let layout = Layout::new(name)?;
        if !layout.dir().exists() {
            return Ok(());
        }
        let _lock = lock(&layout)?;
        let network = fs::read_to_string(layout.shape())
            .ok()
            .and_then(|text| serde_json::from_str::<Shape>(&text).ok());
        step(&format!("Stopping the lab `{name}`"), || {
            sweep(&layout)?;
            match network {
                Some(shape) => control_plane::wait_until_free(&shape.network),
                None => Ok(()),
            }
        })
    }

    pub fn layout(&self) -> &Layout {
        &self.layout
    }

    pub fn binaries(&self) -> &Binaries {
        &self.binaries
    }

    pub fn kubeconfig(&self) -> PathBuf {
        self.layout.kubeconfig()
    }

    pub fn kubectl(&self) -> Kubectl {
        Kubectl::new(self.binaries.path("kubectl"), self.kubeconfig())
    }

    pub fn nodes(&self) -> Vec<Node> {
        (1..=self.shape.nodes).map(|index| self.node_at(index)).collect()
    }

    fn node_at(&self, index: usize) -> Node {
        Node::new(index, &self.layout, &self.binaries, &self.shape.network)
    }

    pub fn node(&self, name: &str) -> Result<Node> {
        self.nodes()
            .into_iter()
            .find(|node| node.name() == name)
            .with_context(|| format!("the lab has no node {name}"))
    }

    /// Whether every program of the cluster runs and the API server answers.
    pub fn check(&self) -> Result<()> {
        for program in control_plane::PROGRAMS {
            self.processes.check(program)?;
        }
        for node in self.nodes() {
            node.check()?;
        }
        self.kubectl().run(&["get", "--raw", "/readyz"]).map(drop)
    }

    pub fn wait_nodes_ready(&self, limit: Duration) -> Result<()> {
        wait_for("the nodes to be ready", limit, || {
            self.check()?;
            let nodes = self.kubectl().json(&["get", "nodes"])?;
            let ready = nodes["items"]
                .as_array()
                .into_iter()
                .flatten()
                .filter(|node| condition(node, "Ready"))
                .count();
            Ok((ready == self.shape.nodes).then_some(()))
        })
    }

    /// Brings images to every node, several nodes at a time. `true` if a node lacked one.
    pub fn import(&self, images: &[Image]) -> Result<bool> {
        thread::scope(|scope| {
            let imports: Vec<_> = self
                .nodes()
                .into_iter()
                .map(|node| scope.spawn(move || node.import(images)))
                .collect();
            let mut changed = false;
            for import in imports {
                changed |= import.join().expect("an import does not panic")?;
            }
            Ok(changed)
        })
    }

    pub(super) fn network(&self) -> &Network {
        &self.shape.network
    }

    /// Where the API server records each write.
    pub fn audit_log(&self) -> PathBuf {
        control_plane::audit_log(&self.layout)
    }
}

/// Only one process at a time starts or stops a lab.
fn lock(layout: &Layout) -> Result<Flock<File>> {
    let path = layout.lock();
    fs::create_dir_all(path.parent().context("the lock lies in a directory")?)?;
    let file = File::create(&path).with_context(|| format!("could not create {}", path.display()))?;
    match Flock::lock(file, FlockArg::LockExclusiveNonblock) {
        Ok(lock) => Ok(lock),
        Err((file, _)) => {
            say("    waiting for another process that starts or stops this lab");
            Flock::lock(file, FlockArg::LockExclusive).map_err(|(_, error)| error.into())
        }
    }
}
