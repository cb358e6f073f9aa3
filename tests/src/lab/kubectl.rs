//! kubectl against one cluster, and the few things that every test asks it.

use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use anyhow::{Context, Result, bail};
use serde_json::Value;

use super::run::{self, Final, wait_for};

#[derive(Clone, Debug)]
pub struct Kubectl {
    program: PathBuf,
    kubeconfig: PathBuf,
    namespace: Option<String>,
}

impl Kubectl {
    pub fn new(program: PathBuf, kubeconfig: PathBuf) -> Self {
        Self {
            program,
            kubeconfig,
            namespace: None,
        }
    }

    pub fn in_namespace(&self, namespace: &str) -> Self {
        Self {
            namespace: Some(namespace.to_string()),
            ..self.clone()
        }
    }

    pub fn program(&self) -> &Path {
        &self.program
    }

    pub fn kubeconfig(&self) -> &Path {
        &self.kubeconfig
    }

    pub fn command(&self, arguments: &[&str]) -> Command {
        let mut command = run::command(&self.program, ["--kubeconfig"]);
        command.arg(&self.kubeconfig);
        if let Some(namespace) = &self.namespace {
            command.args(["--namespace", namespace]);
        }
        command.args(arguments);
        command
    }

    pub fn run(&self, arguments: &[&str]) -> Result<String> {
        run::output(&mut self.command(arguments))
    }

    pub fn json(&self, arguments: &[&str]) -> Result<Value> {
        let text = self.run(&[arguments, &["-o", "json"]].concat())?;
        serde_json::from_str(&text).context("kubectl did not answer with JSON")
    }

    /// Applies manifests given as text.
    pub fn apply(&self, manifests: &str) -> Result<String> {
        run::output_with_input(&mut self.command(&["apply", "-f", "-"]), manifests.as_bytes())
    }

    pub fn apply_file(&self, path: &Path) -> Result<String> {
        self.run(&["apply", "-f", &path.to_string_lossy()])
    }

    /// Deletes an object and waits until it is gone; one that is gone already is fine.
    pub fn delete(&self, kind: &str, name: &str, limit: Duration) -> Result<()> {
        let timeout = format!("--timeout={}s", limit.as_secs());
        self.run(&["delete", kind, name, "--ignore-not-found", "--wait", &timeout])
            .map(drop)
    }

    /// Runs a shell line in a pod's first container.
    pub fn shell(&self, pod: &str, line: &str) -> Result<String> {
        self.run(&["exec", pod, "--", "sh", "-c", line])
    }

    /// Waits until every container of the pod is ready, and says why it is not when the time is over.
    pub fn wait_ready(&self, pod: &str, limit: Duration) -> Result<Value> {
        let ready = wait_for(&format!("pod {pod} to be ready"), limit, || {
            let object = self.json(&["get", "pod", pod])?;
            let phase = object["status"]["phase"].as_str().unwrap_or_default();
            if phase == "Failed" {
                return Err(Final(format!("pod {pod} failed: {}", object["status"])).into());
            }
            Ok(condition(&object, "Ready").then_some(object))
        });
        ready.map_err(|error| {
            let events = self.events(pod).unwrap_or_default();
            error.context(format!("events of {pod}:\n{events}"))
        })
    }

    /// Waits until the pod's containers have ended well.
    pub fn wait_succeeded(&self, pod: &str, limit: Duration) -> Result<Value> {
        let done = wait_for(&format!("pod {pod} to succeed"), limit, || {
            let object = self.json(&["get", "pod", pod])?;
            match object["status"]["phase"].as_str() {
                Some("Succeeded") => Ok(Some(Ok(object))),
                Some("Failed") => Ok(Some(Err(object))),
                _ => Ok(None),
            }
        });
        match done {
            Ok(Ok(object)) => Ok(object),
            Ok(Err(_)) => bail!(
                "pod {pod} failed; it said:\n{}",
                self.run(&["logs", pod]).unwrap_or_default()
            ),
            Err(error) => Err(error.context(format!("events of {pod}:\n{}", self.events(pod).unwrap_or_default()))),
        }
    }

    /// What happened to an object, for messages.
    pub fn events(&self, name: &str) -> Result<String> {
        let selector = format!("involvedObject.name={name}");
        self.run(&[
            "get",
            "events",
            "--field-selector",
            &selector,
            "--sort-by=.lastTimestamp",
        ])
    }
}

/// Whether the condition of this type is true.
pub fn condition(object: &Value, kind: &str) -> bool {
    let conditions = object["status"]["conditions"]
        .as_array()
        .map(Vec::as_slice)
        .unwrap_or_default();
    conditions
        .iter()
        .any(|condition| condition["type"] == kind && condition["status"] == "True")
}
