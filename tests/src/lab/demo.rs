//! `make demo`: what a newcomer sees first. A claim becomes a volume, a pod writes to it, dies, and another pod reads
//! the same bytes; then everything is left running to be played with.

use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context, Result, bail};

use super::install::{self, Installation, NAMESPACE};
use super::kubectl::Kubectl;
use super::layout::Layout;
use super::run::{say, step};
use super::{Lab, Options, binaries, prerequisites};

/// The lab that the demo runs in.
pub const NAME: &str = "demo";

/// Provisioning, attaching, formatting and mounting; and once more for the second pod.
const POD_READY: Duration = Duration::from_secs(120);

#[derive(Clone, Debug, Default)]
pub struct Demo {
    pub nodes: usize,
    /// A cluster that exists: the demo installs there instead of starting its own.
    pub kubeconfig: Option<PathBuf>,
    /// The image that such a cluster can pull.
    pub image: Option<String>,
    /// A program to use instead of building one.
    pub program: Option<PathBuf>,
}

pub fn run(demo: &Demo) -> Result<()> {
    let layout = Layout::new(NAME)?;
    // After the first demo people have our own kubeconfig exported: that is the lab, not somebody's cluster.
    let foreign = demo.kubeconfig.as_deref().filter(|path| !is_own(&layout, path));
    let kubectl = match foreign {
        Some(kubeconfig) => install_elsewhere(&layout, kubeconfig, demo.image.as_deref())?,
        None => {
            // What may be missing is said first, and the long build is not slowed by a cluster that waits for it.
            prerequisites::ensure()?;
            let program = install::build_program(&layout, demo.program.as_deref())?;
            let lab = Lab::up(&Options {
                name: NAME.to_string(),
                nodes: demo.nodes,
            })?;
            install::into_lab(&lab, &program)?;
            lab.kubectl()
        }
    };
    let same = write_and_read_again(&kubectl, &layout.checkout().join("deploy/examples"))?;
    say("");
    say(&format!("The second pod read what the first one wrote: sha256 {same}"));
    say("");
    tell_what_to_try(&layout, &kubectl, foreign.is_none());
    Ok(())
}

pub fn down() -> Result<()> {
    Lab::down(NAME)
}

fn is_own(layout: &Layout, kubeconfig: &Path) -> bool {
    std::path::absolute(kubeconfig).is_ok_and(|path| path == layout.kubeconfig())
}

fn install_elsewhere(layout: &Layout, kubeconfig: &Path, image: Option<&str>) -> Result<Kubectl> {
    if !kubeconfig.is_file() {
        bail!(
            "KUBECONFIG names {}, which is not a file: unset it to get a cluster of the demo's own",
            kubeconfig.display()
        );
    }
    say(&format!(
        "==> Using the cluster of {} (unset KUBECONFIG to get one of the demo's own)",
        kubeconfig.display()
    ));
    let Some(image) = image else {
        bail!(
            "an existing cluster needs an image that it can pull: build deploy/Dockerfile, push it, and say \
             `make demo IMAGE=registry/galleonfs:tag`"
        );
    };
    let (repository, tag) = image
        .rsplit_once(':')
        .with_context(|| format!("the image `{image}` needs a tag"))?;
    let binaries = binaries::ensure_some(layout, &["kubectl", "helm"])?;
    let kubectl = Kubectl::new(binaries.path("kubectl"), kubeconfig.to_path_buf());
    let installation = Installation {
        chart: layout.checkout().join("charts/galleonfs"),
        repository: repository.to_string(),
        tag: tag.to_string(),
        build: String::new(),
    };
    install::into_cluster(&binaries, &kubectl, &installation)?;
    Ok(kubectl)
}

/// Uses the examples as they are. Gives the checksum that both pods found.
fn write_and_read_again(kubectl: &Kubectl, examples: &Path) -> Result<String> {
    const FILE: &str = "/data/demo.bin";
    let checksum = |line: String| line.split_whitespace().next().unwrap_or_default().to_string();
    let wrote = step("A claim, and a pod that writes to its volume", || {
        kubectl.apply_file(&examples.join("claim.yaml"))?;
        kubectl.apply_file(&examples.join("pod.yaml"))?;
        kubectl.wait_ready("writer", POD_READY)?;
        let line = format!("head -c 4194304 /dev/urandom > {FILE} && sync && sha256sum {FILE}");
        kubectl.shell("writer", &line).map(checksum)
    })?;
    let read = step("The pod is deleted; a new one uses the same claim", || {
        kubectl.delete("pod", "writer", POD_READY)?;
        kubectl.apply_file(&examples.join("pod.yaml"))?;
        kubectl.wait_ready("writer", POD_READY)?;
        kubectl.shell("writer", &format!("sha256sum {FILE}")).map(checksum)
    })?;
    if wrote.is_empty() || wrote != read {
        bail!("the second pod read other bytes than the first one wrote: sha256 {read} instead of {wrote}");
    }
    Ok(wrote)
}

fn tell_what_to_try(layout: &Layout, kubectl: &Kubectl, own: bool) {
    let kubeconfig = kubectl.kubeconfig().display();
    if own {
        let programs = kubectl.program().parent().unwrap_or(Path::new(".")).display();
        say("To use this cluster:");
        say("");
        println!("export KUBECONFIG={kubeconfig}");
        if super::run::which("kubectl").is_none() {
            println!("export PATH=$PATH:{programs}");
        }
        say("");
    }
    let examples = layout.checkout().join("deploy/examples");
    say("What to try:");
    for line in [
        "kubectl get pods,pvc -o wide".to_string(),
        format!("kubectl get galleonvolumes,galleonreplicas,storagepools -n {NAMESPACE}"),
        "kubectl exec writer -- cat /data/starts".to_string(),
        format!("kubectl apply -f {}", examples.join("block.yaml").display()),
        format!("kubectl logs -n {NAMESPACE} daemonset/galleonfs-node"),
    ] {
        say(&format!("  {line}"));
    }
    if own {
        say("To end it: make demo-down");
    }
}
