//! `galleonfs-lab`: a Kubernetes of several nodes on this machine, with GalleonFS in it.

use std::process::ExitCode;

use anyhow::Result;
use clap::{Args, Parser, Subcommand};
use galleonfs_tests::lab::run::say;
use galleonfs_tests::lab::{Lab, Options, binaries, images, layout::Layout, prerequisites};

/// A real Kubernetes of several nodes on this machine, to try and test GalleonFS in.
#[derive(Parser)]
#[command(name = "galleonfs-lab", version)]
struct Arguments {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Build the cluster's programs and images, and start nothing.
    Build(Name),
    /// Start a cluster, without GalleonFS.
    Up(Up),
    /// Stop a cluster and remove all of it but its logs.
    Down(Name),
    /// Say what runs.
    Status(Name),
    /// Print the path of the cluster's kubeconfig.
    Kubeconfig(Name),
}

#[derive(Args)]
struct Name {
    /// The cluster's name: up to eight letters and digits.
    #[arg(long, default_value = "lab")]
    name: String,
}

#[derive(Args)]
struct Up {
    #[command(flatten)]
    name: Name,
    /// How many nodes.
    #[arg(long, default_value_t = 3)]
    nodes: usize,
}

fn main() -> ExitCode {
    match run(Arguments::parse().command) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            say(&format!("galleonfs-lab: {error:#}"));
            ExitCode::FAILURE
        }
    }
}

fn run(command: Command) -> Result<()> {
    match command {
        Command::Build(Name { name }) => {
            let layout = Layout::new(&name)?;
            prerequisites::ensure()?;
            let binaries = binaries::ensure(&layout)?;
            images::ensure_base(&layout, &binaries)?;
            println!("{}", binaries.dir().display());
        }
        Command::Up(Up {
            name: Name { name },
            nodes,
        }) => {
            let lab = Lab::up(&Options { name, nodes })?;
            println!("export KUBECONFIG={}", lab.kubeconfig().display());
        }
        Command::Down(Name { name }) => Lab::down(&name)?,
        Command::Status(Name { name }) => {
            let lab = Lab::attach(&name)?;
            lab.check()?;
            print!("{}", lab.kubectl().run(&["get", "nodes", "-o", "wide"])?);
            print!(
                "{}",
                lab.kubectl().run(&["get", "pods", "--all-namespaces", "-o", "wide"])?
            );
        }
        Command::Kubeconfig(Name { name }) => println!("{}", Lab::attach(&name)?.kubeconfig().display()),
    }
    Ok(())
}
