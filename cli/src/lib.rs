//! What the `galleonfs` program can do: the two long-running parts (`node`, `controller`) and the commands that a
//! person types. Flags are checked here and turned into the configuration types of the crates that do the work, so
//! nothing behind this door sees a raw string.

mod check;
mod controller;
mod crds;
mod logging;
mod node;

use std::{io, path::PathBuf, process::ExitCode};

use anyhow::{Context, Result};
use clap::{Parser, Subcommand};

pub use controller::ControllerArguments;
pub use crds::{crd_file_name, crd_yaml};
pub use logging::LogArguments;
pub use node::NodeArguments;

// Nodes talk to each other over TLS and in no other way: a build that could do otherwise is none of ours.
const _: () = assert!(
    !galleonfs_node_plugin::transport::HAS_PLAIN_WIRE,
    "galleonfs is not built with plain-wire-for-comparison"
);

/// Two, so that one call that computes for long does not hold up the answer to a probe.
const RUNTIME_THREADS: usize = 2;

/// Storage for Kubernetes pods, made from the nodes' own disks.
#[derive(Debug, Parser)]
#[command(name = "galleonfs", version, arg_required_else_help = true)]
pub struct Arguments {
    #[command(flatten)]
    pub log: LogArguments,
    #[command(subcommand)]
    pub command: Command,
}

#[derive(Debug, Subcommand)]
pub enum Command {
    /// Run the controller: CSI for the sidecars, and the upkeep of our objects. One leads, any number may stand by.
    Controller(ControllerArguments),
    /// Run a node's plugin: CSI for the kubelet, this node's replicas, and the block devices of its pods.
    Node(NodeArguments),
    /// Print the definitions of the custom resources as YAML.
    Crds {
        /// Write one file per definition into this directory instead.
        #[arg(long, value_name = "DIRECTORY")]
        output: Option<PathBuf>,
    },
    /// Verify a replica that is not in use: every block, the map and the log. Nothing is written.
    Check {
        /// The replica's directory, <pool>/replicas/<uid>.
        directory: PathBuf,
        /// Say what was found as JSON.
        #[arg(long)]
        json: bool,
    },
    /// Print the version.
    Version,
}

/// Does what the command line asks and says how the process should end.
pub fn run(arguments: Arguments) -> Result<ExitCode> {
    match arguments.command {
        Command::Controller(given) => {
            arguments.log.install()?;
            block_on(galleonfs_controller::run(given.into()))?;
        }
        Command::Node(given) => {
            arguments.log.install()?;
            block_on(galleonfs_node_plugin::run(given.into()))?;
        }
        Command::Crds {
            output: Some(directory),
        } => crds::write_files(&directory)?,
        Command::Crds { output: None } => crds::print(&mut io::stdout().lock())?,
        Command::Check { directory, json } => return check::check(&directory, json, &mut io::stdout().lock()),
        Command::Version => println!("galleonfs {}", env!("CARGO_PKG_VERSION")),
    }
    Ok(ExitCode::SUCCESS)
}

/// Runs one of the long-running parts to its end. Their own threads do what is heavy; these only wait for many things.
fn block_on(part: impl Future<Output = Result<()>>) -> Result<()> {
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(RUNTIME_THREADS)
        .enable_all()
        .build()
        .context("starting the threads of the process")?;
    runtime.block_on(part)
}
