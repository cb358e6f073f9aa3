//! etcd and the three programs of Kubernetes' control plane, on the machine's side of the lab's bridge.

use std::fs;
use std::path::PathBuf;
use std::process::Command;
use std::time::Duration;

use anyhow::Result;
use serde_json::json;

use super::binaries::Binaries;
use super::certificates::{Authority, Subject};
use super::kubectl::Kubectl;
use super::layout::{Layout, write_file};
use super::network::{API_SERVICE, Network, SERVICE_RANGE};
use super::processes::Processes;
use super::run::{self, wait_for};

/// In the order in which they are started.
pub const PROGRAMS: [&str; 4] = ["etcd", "kube-apiserver", "kube-controller-manager", "kube-scheduler"];

/// How long a node may be silent before it counts as gone. Kubernetes' own 50 s would make tests of node death slow.
const NODE_GRACE: &str = "20s";

pub struct ControlPlane<'a> {
    pub layout: &'a Layout,
    pub binaries: &'a Binaries,
    pub network: &'a Network,
    pub authority: &'a Authority,
    pub processes: &'a Processes,
}

impl std::fmt::Debug for ControlPlane<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("ControlPlane")
            .field("layout", self.layout)
            .finish_non_exhaustive()
    }
}

impl ControlPlane<'_> {
    /// Starts everything and waits until the API server says that it is ready.
    pub fn start(&self) -> Result<()> {
        self.start_etcd()?;
        self.start_api_server()?;
        let server = self.network.api_server();
        let group = Some("system:masters");
        let admin = Subject {
            name: "lab-admin",
            group,
            hosts: &[],
        };
        self.authority
            .kubeconfig(&self.layout.kubeconfig(), &server, self.layout.name(), "admin", admin)?;
        let kubectl = Kubectl::new(self.binaries.path("kubectl"), self.layout.kubeconfig());
        wait_for("the API server to be ready", Duration::from_secs(120), || {
            for program in ["etcd", "kube-apiserver"] {
                self.processes.check(program)?;
            }
            kubectl.run(&["get", "--raw", "/readyz"]).map(Some)
        })?;
        // Only now: they give up when the roles that let them start are not there yet.
        self.start_follower(
            "kube-controller-manager",
            &[
                "--use-service-account-credentials=true".to_string(),
                format!(
                    "--service-account-private-key-file={}",
                    self.authority.service_account_key().display()
                ),
                format!("--root-ca-file={}", self.authority.certificate().display()),
                format!("--cluster-cidr={}", self.network.pod_range()),
                "--allocate-node-cidrs=false".to_string(),
                format!("--node-monitor-grace-period={NODE_GRACE}"),
            ],
        )?;
        self.start_follower("kube-scheduler", &[])?;
        // Pods of a namespace are refused until the controller manager has made its service account.
        wait_for("the default service account", Duration::from_secs(60), || {
            kubectl
                .run(&["get", "serviceaccount", "default", "-o", "name"])
                .map(Some)
        })?;
        Ok(())
    }

    fn start_etcd(&self) -> Result<()> {
        let here = self.network.control_plane();
        let hosts = [here.clone(), "127.0.0.1".to_string()];
        let identity = self.authority.issue(
            "etcd",
            Subject {
                name: "etcd",
                group: None,
                hosts: &hosts,
            },
        )?;
        let data = self.layout.dir().join("etcd");
        fs::create_dir_all(&data)?;
        let (certificate, key) = (identity.certificate.display(), identity.key.display());
        let ca = self.authority.certificate();
        let ca = ca.display();
        let mut command = self.program("etcd");
        command.args([
            "--name=lab".to_string(),
            format!("--data-dir={}", data.display()),
            format!("--listen-client-urls=https://{here}:2379"),
            format!("--advertise-client-urls=https://{here}:2379"),
            format!("--listen-peer-urls=https://{here}:2380"),
            format!("--initial-advertise-peer-urls=https://{here}:2380"),
            format!("--initial-cluster=lab=https://{here}:2380"),
            format!("--cert-file={certificate}"),
            format!("--key-file={key}"),
            format!("--trusted-ca-file={ca}"),
            "--client-cert-auth=true".to_string(),
            format!("--peer-cert-file={certificate}"),
            format!("--peer-key-file={key}"),
            format!("--peer-trusted-ca-file={ca}"),
            "--peer-client-cert-auth=true".to_string(),
            // The lab's cluster does not outlive the machine: its disk is better left to what is being tested.
            "--unsafe-no-fsync=true".to_string(),
            "--log-level=warn".to_string(),
        ]);
        self.processes.start("etcd", &mut command)?;
        Ok(())
    }

    fn start_api_server(&self) -> Result<()> {
        let here = self.network.control_plane();
        let hosts = [
            here.clone(),
            API_SERVICE.to_string(),
            "127.0.0.1".to_string(),
            "localhost".to_string(),
            "kubernetes".to_string(),
            "kubernetes.default".to_string(),
            "kubernetes.default.svc".to_string(),
            "kubernetes.default.svc.cluster.local".to_string(),
        ];
        let own = self.authority.issue(
            "apiserver",
            Subject {
                name: "kube-apiserver",
                group: None,
                hosts: &hosts,
            },
        )?;
        let group = Some("system:masters");
        let client = Subject {
            name: "kube-apiserver-client",
            group,
            hosts: &[],
        };
        let client = self.authority.issue("apiserver-client", client)?;
        let ca = self.authority.certificate();
        let ca = ca.display();
        let mut command = self.program("kube-apiserver");
        command.args([
            format!("--bind-address={here}"),
            format!("--advertise-address={here}"),
            "--secure-port=6443".to_string(),
            format!("--etcd-servers=https://{here}:2379"),
            format!("--etcd-cafile={ca}"),
            format!("--etcd-certfile={}", client.certificate.display()),
            format!("--etcd-keyfile={}", client.key.display()),
            format!("--client-ca-file={ca}"),
            format!("--tls-cert-file={}", own.certificate.display()),
            format!("--tls-private-key-file={}", own.key.display()),
            format!("--kubelet-certificate-authority={ca}"),
            format!("--kubelet-client-certificate={}", client.certificate.display()),
            format!("--kubelet-client-key={}", client.key.display()),
            "--kubelet-preferred-address-types=InternalIP".to_string(),
            "--service-account-issuer=https://kubernetes.default.svc.cluster.local".to_string(),
            format!(
                "--service-account-key-file={}",
                self.authority.service_account_public_key().display()
            ),
            format!(
                "--service-account-signing-key-file={}",
                self.authority.service_account_key().display()
            ),
            format!("--service-cluster-ip-range={SERVICE_RANGE}"),
            "--authorization-mode=Node,RBAC".to_string(),
            "--enable-admission-plugins=NodeRestriction".to_string(),
            "--allow-privileged=true".to_string(),
            format!("--audit-policy-file={}", self.audit_policy()?.display()),
            format!("--audit-log-path={}", audit_log(self.layout).display()),
        ]);
        self.processes.start("kube-apiserver", &mut command)?;
        Ok(())
    }

    /// The controller manager and the scheduler differ in little. There is one of each, so they elect nobody.
    fn start_follower(&self, name: &str, more: &[String]) -> Result<()> {
        let kubeconfig = self.layout.pki().join(format!("{name}.kubeconfig"));
        let user = format!("system:{name}");
        let server = self.network.api_server();
        let subject = Subject {
            name: &user,
            group: None,
            hosts: &[],
        };
        self.authority
            .kubeconfig(&kubeconfig, &server, self.layout.name(), name, subject)?;
        let here = self.network.control_plane();
        let serving = Subject {
            name,
            group: None,
            hosts: &[here],
        };
        let serving = self.authority.issue(&format!("{name}-serving"), serving)?;
        let mut command = self.program(name);
        command.args([
            format!("--bind-address={}", self.network.control_plane()),
            format!("--tls-cert-file={}", serving.certificate.display()),
            format!("--tls-private-key-file={}", serving.key.display()),
            format!("--kubeconfig={}", kubeconfig.display()),
            format!("--authentication-kubeconfig={}", kubeconfig.display()),
            format!("--authorization-kubeconfig={}", kubeconfig.display()),
            "--leader-elect=false".to_string(),
        ]);
        command.args(more);
        self.processes.start(name, &mut command)?;
        Ok(())
    }

    /// Every write is recorded with who made it: the tests read there that an idle cluster makes none.
    fn audit_policy(&self) -> Result<PathBuf> {
        let policy = json!({
            "apiVersion": "audit.k8s.io/v1",
            "kind": "Policy",
            "omitStages": ["RequestReceived"],
            "rules": [
                {"level": "Metadata", "verbs": ["create", "update", "patch", "delete", "deletecollection"]},
                {"level": "None"},
            ],
        });
        let path = self.layout.dir().join("audit-policy.json");
        write_file(&path, policy.to_string())?;
        Ok(path)
    }

    fn program(&self, name: &str) -> Command {
        run::command(self.binaries.path(name), [] as [&str; 0])
    }
}

/// One JSON object per line, see [`ControlPlane::audit_policy`].
pub fn audit_log(layout: &Layout) -> PathBuf {
    layout.logs().join("audit.log")
}

/// Waits until nobody listens on the API server's address any more, so that the next lab can.
pub fn wait_until_free(network: &Network) -> Result<()> {
    let address = network.control_plane();
    wait_for("the control plane's ports to be free", Duration::from_secs(30), || {
        let listening = run::output(&mut run::command("ss", ["-Hltn", "src", &address]))?;
        Ok(listening.trim().is_empty().then_some(()))
    })
}

#[cfg(test)]
mod tests {
    use anyhow::Context;

    use super::*;

    #[test]
    fn the_api_service_is_the_first_address_of_the_service_range() -> Result<()> {
        let base = SERVICE_RANGE.split('/').next().context("a range has a base")?;
        assert_eq!(
            API_SERVICE,
            base.strip_suffix(".0").context("a /16")?.to_string() + ".1"
        );
        Ok(())
    }
}
