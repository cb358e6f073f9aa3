//! Putting GalleonFS into a cluster the way a user does: with Helm and the chart of this checkout.

use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use anyhow::{Context, Result, bail};

use super::binaries::Binaries;
use super::images::{self, Image};
use super::kubectl::Kubectl;
use super::layout::Layout;
use super::{Lab, prerequisites, run};

pub const NAMESPACE: &str = "galleonfs-system";
pub const RELEASE: &str = "galleonfs";

/// How long a new node plugin or controller may take until it is ready.
const ROLLOUT: Duration = Duration::from_secs(120);

/// Where and with what to install.
#[derive(Clone, Debug)]
pub struct Installation {
    pub chart: PathBuf,
    pub repository: String,
    pub tag: String,
    /// Changes with the image's content, and makes Kubernetes replace pods that run another one. Empty: left alone.
    pub build: String,
}

/// Builds the program as it is released, unless one is given.
pub fn build_program(layout: &Layout, given: Option<&Path>) -> Result<PathBuf> {
    if let Some(program) = given {
        return Ok(program.to_path_buf());
    }
    let cargo = prerequisites::cargo()?;
    run::step("Building GalleonFS (release)", || {
        let mut command = Command::new(cargo);
        command
            .current_dir(layout.checkout())
            .args(["build", "--release", "--locked", "-p", "galleonfs"]);
        run::visible(&mut command)
    })?;
    Ok(layout.target().join("release/galleonfs"))
}

/// Installs the program into a lab, or replaces what is installed there.
pub fn into_lab(lab: &Lab, program: &Path) -> Result<Image> {
    let image = images::ensure_galleonfs(lab.layout(), program)?;
    run::step("Bringing the image to every node", || {
        lab.import(std::slice::from_ref(&image))
    })?;
    let (repository, tag) = images::GALLEONFS
        .rsplit_once(':')
        .context("the image's name has a tag")?;
    let installation = Installation {
        chart: lab.layout().checkout().join("charts/galleonfs"),
        repository: repository.to_string(),
        tag: tag.to_string(),
        build: image.version.clone(),
    };
    into_cluster(lab.binaries(), &lab.kubectl(), &installation)?;
    Ok(image)
}

/// Installs into any cluster, and waits until every part is ready.
pub fn into_cluster(binaries: &Binaries, kubectl: &Kubectl, installation: &Installation) -> Result<()> {
    run::step("Installing the chart with Helm", || {
        let mut settings = vec![
            format!("image.repository={}", installation.repository),
            format!("image.tag={}", installation.tag),
        ];
        if !installation.build.is_empty() {
            for part in ["node", "controller"] {
                settings.push(format!(
                    "{part}.podAnnotations.galleonfs\\.io/build={}",
                    installation.build
                ));
            }
        }
        let chart = installation.chart.to_string_lossy();
        let mut arguments = vec![
            "upgrade",
            "--install",
            RELEASE,
            &chart,
            "--namespace",
            NAMESPACE,
            "--create-namespace",
        ];
        for setting in &settings {
            arguments.extend(["--set-string", setting]);
        }
        helm(binaries, kubectl.kubeconfig(), &arguments)?;
        wait_ready(&kubectl.in_namespace(NAMESPACE))
    })
}

/// Waits for the node plugins and the controller; what their pods say goes into the error.
pub fn wait_ready(kubectl: &Kubectl) -> Result<()> {
    let timeout = format!("--timeout={}s", ROLLOUT.as_secs());
    for workload in ["daemonset/galleonfs-node", "deployment/galleonfs-controller"] {
        if let Err(error) = kubectl.run(&["rollout", "status", workload, &timeout]) {
            let pods = kubectl.run(&["get", "pods", "-o", "wide"]).unwrap_or_default();
            let logs = kubectl.run(&["logs", workload, "--all-containers", "--prefix", "--tail=15"]);
            let logs = logs.unwrap_or_else(|error| format!("{error:#}"));
            let events = kubectl
                .run(&["get", "events", "--field-selector=type=Warning"])
                .unwrap_or_default();
            bail!("{workload} did not become ready: {error:#}\n{pods}\n{events}\n{logs}");
        }
    }
    Ok(())
}

/// Helm keeps caches in the user's home; what we do must not depend on what is there.
pub fn helm(binaries: &Binaries, kubeconfig: &Path, arguments: &[&str]) -> Result<String> {
    let mut command = run::command(binaries.path("helm"), arguments);
    let home = binaries.dir().with_file_name("helm");
    for variable in ["HELM_CACHE_HOME", "HELM_CONFIG_HOME", "HELM_DATA_HOME"] {
        command.env(variable, &home);
    }
    run::output(command.env("KUBECONFIG", kubeconfig))
}
