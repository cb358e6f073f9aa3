//! `galleonfs-lab`: a Kubernetes of several nodes on this machine, with GalleonFS in it.

use std::path::PathBuf;
use std::process::ExitCode;

use anyhow::Result;
use clap::{Args, Parser, Subcommand};
use galleonfs_tests::lab::layout::Layout;
use galleonfs_tests::lab::run::say;
use galleonfs_tests::lab::{Lab, Options, binaries, demo, images, install, prerequisites, volatile};

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
    /// Build GalleonFS and install it into a running cluster, or replace what is installed there.
    Install(Install),
    /// Start a cluster with GalleonFS, and show that data outlives a pod.
    Demo(Demo),
    /// End the demo.
    DemoDown,
    /// Stop a cluster and remove all of it but its logs.
    Down(Name),
    /// Say what runs.
    Status(Name),
    /// Print the path of the cluster's kubeconfig.
    Kubeconfig(Name),
    /// Serve a node's disk whose power can be cut. The lab starts this by itself.
    #[command(hide = true)]
    Disk { image: PathBuf, at: PathBuf },
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

#[derive(Args)]
struct Install {
    #[command(flatten)]
    name: Name,
    /// Use this program instead of building one.
    #[arg(long)]
    program: Option<PathBuf>,
}

#[derive(Args)]
struct Demo {
    /// How many nodes.
    #[arg(long, default_value_t = 3)]
    nodes: usize,
    /// Install into this cluster instead of starting one.
    #[arg(long, env = "KUBECONFIG")]
    kubeconfig: Option<PathBuf>,
    /// The image for such a cluster, as repository:tag.
    #[arg(long)]
    image: Option<String>,
    /// Use this program instead of building one.
    #[arg(long)]
    program: Option<PathBuf>,
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
        Command::Install(Install {
            name: Name { name },
            program,
        }) => {
            let lab = Lab::attach(&name)?;
            let program = install::build_program(lab.layout(), program.as_deref())?;
            install::into_lab(&lab, &program)?;
        }
        Command::Demo(Demo {
            nodes,
            kubeconfig,
            image,
            program,
        }) => {
            // An empty variable is how many people unset one.
            let kubeconfig = kubeconfig.filter(|path| !path.as_os_str().is_empty());
            demo::run(&demo::Demo {
                nodes,
                kubeconfig,
                image,
                program,
            })?;
        }
        Command::DemoDown => demo::down()?,
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
        Command::Disk { image, at } => volatile::serve(&image, &at)?,
        Command::Kubeconfig(Name { name }) => println!("{}", Lab::attach(&name)?.kubeconfig().display()),
    }
    Ok(())
}
