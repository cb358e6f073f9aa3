//! One node: a set of namespaces on this machine, with containerd and a kubelet in it.
//!
//! A *holder* process keeps the node's mount namespace. In it `/run`, `/var/lib/kubelet`, `/var/lib/containerd` and
//! `/var/log` are the node's own, and `/var/lib/galleonfs` is a disk of its own; everything else, `/dev` with its loop
//! devices too, is the machine's. Everything is shared *within* the node, because CSI hands mounts from pod to pod that way.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use anyhow::{Context, Result};
use nix::sys::signal::Signal;
use nix::sys::statfs::{OVERLAYFS_SUPER_MAGIC, statfs};
use serde_json::json;

use super::binaries::Binaries;
use super::certificates::{Authority, Subject};
use super::cgroups;
use super::images::{Image, PAUSE};
use super::layout::{Layout, write_file};
use super::network::{DNS_SERVICE, Network};
use super::processes::{Process, Processes};
use super::run::{self, wait_for};
use super::seed::Seed;
use super::sweep;
use super::volatile::{VolatileDisk, has_loop_device};

/// The directories of the machine that each node has for itself.
const OWN_DIRECTORIES: [(&str, &str); 3] = [
    ("kubelet", "/var/lib/kubelet"),
    ("containerd", "/var/lib/containerd"),
    ("log", "/var/log"),
];

/// Where GalleonFS keeps its pools. A disk of the node's own, so that one node's full disk is not every node's.
const POOL: &str = "/var/lib/galleonfs";
/// Sparse: it takes only what is written, and gives back what is discarded.
const POOL_DISK: &str = "16G";

/// What the kubelet waits for when it is asked to end.
const PATIENCE: Duration = Duration::from_secs(5);

#[derive(Clone, Debug)]
pub struct Node {
    name: String,
    index: usize,
    layout: Layout,
    binaries: Binaries,
    network: Network,
    processes: Processes,
}

impl Node {
    pub fn new(index: usize, layout: &Layout, binaries: &Binaries, network: &Network) -> Self {
        Self {
            name: format!("node{index}"),
            index,
            layout: layout.clone(),
            binaries: binaries.clone(),
            network: network.clone(),
            processes: Processes::new(layout),
        }
    }

    pub fn name(&self) -> &str {
        &self.name
    }

    /// Its number in the lab, from 1.
    pub fn index(&self) -> usize {
        self.index
    }

    pub fn address(&self) -> String {
        self.network.node_address(self.index)
    }

    /// What the node sees as `/var/lib/galleonfs`, seen from the machine.
    pub fn pool_directory(&self) -> Result<PathBuf> {
        Ok(PathBuf::from(format!("/proc/{}/root{POOL}", self.holder()?.pid)))
    }

    fn directory(&self) -> PathBuf {
        self.layout.node(&self.name)
    }

    pub fn cgroup(&self) -> String {
        format!("{}-{}", self.layout.prefix(), self.name)
    }

    fn record(&self, program: &str) -> String {
        format!("{}-{program}", self.name)
    }

    /// Its long-running programs, in the order in which they start.
    pub fn records(&self) -> [String; 3] {
        ["holder", "containerd", "kubelet"].map(|program| self.record(program))
    }

    /// Writes what the node's programs read.
    pub fn configure(&self, authority: &Authority, seed: &Seed) -> Result<()> {
        let directory = self.directory();
        for (own, _) in OWN_DIRECTORIES {
            fs::create_dir_all(directory.join(own))?;
        }
        let disk = self.disk_image();
        run::output(run::command("truncate", ["--size", POOL_DISK]).arg(&disk))?;
        run::output(run::command("mkfs.ext4", ["-q", "-E", "nodiscard,lazy_itable_init=1"]).arg(&disk))?;
        let containerd = containerd_config(
            Path::new("/var/lib/containerd"),
            snapshotter(&directory)?,
            &directory.join("cni"),
        )?;
        write_file(&directory.join("containerd.toml"), containerd)?;
        seed.plant(&directory.join("containerd"))?;
        for image in seed.images() {
            write_file(&directory.join("images").join(&image.version), "")?;
        }
        write_file(&directory.join("cni/10-lab.conflist"), self.cni_config())?;
        write_file(&directory.join("resolv.conf"), "")?;

        let user = format!("system:node:{}", self.name);
        let subject = Subject {
            name: &user,
            group: Some("system:nodes"),
            hosts: &[],
        };
        let server = self.network.api_server();
        let kubeconfig = directory.join("kubelet.kubeconfig");
        authority.kubeconfig(
            &kubeconfig,
            &server,
            self.layout.name(),
            &self.record("kubelet"),
            subject,
        )?;
        let hosts = [self.address(), self.name.clone()];
        let serving = Subject {
            name: &user,
            group: Some("system:nodes"),
            hosts: &hosts,
        };
        let serving = authority.issue(&self.record("serving"), serving)?;
        let config = json!({
            "apiVersion": "kubelet.config.k8s.io/v1beta1",
            "kind": "KubeletConfiguration",
            "authentication": {
                "anonymous": {"enabled": false},
                "webhook": {"enabled": true},
                "x509": {"clientCAFile": authority.certificate()},
            },
            "authorization": {"mode": "Webhook"},
            "tlsCertFile": serving.certificate,
            "tlsPrivateKeyFile": serving.key,
            "containerRuntimeEndpoint": "unix:///run/containerd/containerd.sock",
            "cgroupDriver": "cgroupfs",
            "cgroupRoot": format!("/{}", self.cgroup()),
            "failCgroupV1": false,
            "failSwapOn": false,
            "clusterDNS": [DNS_SERVICE],
            "clusterDomain": "cluster.local",
            "resolvConf": directory.join("resolv.conf"),
            // A volume is mounted when the node's status says that it is in use; by default it is written every 10 s.
            "nodeStatusUpdateFrequency": "1s",
            "nodeStatusReportFrequency": "5m",
            // A claim that has grown is noticed when its pod is looked at again; by default that is every minute.
            "syncFrequency": "10s",
            // Tests kill the same container again and again.
            "crashLoopBackOff": {"maxContainerRestartPeriod": "2s"},
            // Not every machine lets root lower this.
            "oomScoreAdj": 0,
            // Images cannot be pulled again, and a developer's disk may be quite full.
            "imageGCHighThresholdPercent": 100,
            "evictionHard": {"memory.available": "64Mi", "nodefs.available": "1%", "imagefs.available": "1%"},
        });
        write_file(&directory.join("kubelet.json"), format!("{config:#}\n"))
    }

    fn cni_config(&self) -> String {
        let config = json!({
            "cniVersion": "1.0.0",
            "name": "lab",
            "plugins": [{
                "type": "bridge",
                "bridge": "cni0",
                "isGateway": true,
                "hairpinMode": true,
                "ipam": {
                    "type": "host-local",
                    "dataDir": "/run/cni",
                    "ranges": [[{"subnet": self.network.node_pods(self.index)}]],
                    "routes": [{"dst": "0.0.0.0/0"}],
                },
            }],
        });
        format!("{config:#}\n")
    }

    /// Starts the holder and containerd. Needs no API server.
    pub fn start_runtime(&self) -> Result<()> {
        cgroups::create(&self.cgroup())?;
        self.start_holder()?;
        let mut command = self.command(self.binaries.path("containerd"));
        command
            .arg("--config")
            .arg(self.directory().join("containerd.toml"))
            .args(["--log-level", "warn"]);
        self.processes.start(&self.record("containerd"), &mut command)?;
        wait_for(&format!("containerd of {}", self.name), Duration::from_secs(60), || {
            self.processes.check(&self.record("containerd"))?;
            self.ctr(&["version"]).map(Some)
        })?;
        Ok(())
    }

    fn start_holder(&self) -> Result<()> {
        let mut script = String::from("set -e\nmount -t tmpfs -o mode=755 tmpfs /run\nmkdir /run/lock\n");
        for (own, machine) in OWN_DIRECTORIES {
            fs::create_dir_all(machine).with_context(|| format!("could not create {machine}"))?;
            script.push_str(&format!(
                "mount --bind '{}' {machine}\n",
                self.directory().join(own).display()
            ));
        }
        fs::create_dir_all(POOL).with_context(|| format!("could not create {POOL}"))?;
        let volatile = self.volatile_disk();
        if volatile.chosen() {
            volatile.start()?;
        }
        script.push_str(&format!("mount -o loop,discard '{}' {POOL}\n", self.disk().display()));
        // Only now: a bind mount made of a shared mount would tell its source of every mount below it.
        script.push_str("mount --make-rshared /\necho ready > /run/lab-ready\nexec sleep infinity\n");
        let mut command = run::command(
            "nsenter",
            [format!("--net={}", self.network.namespace(self.index).display())],
        );
        command.args(["unshare", "--mount", "--propagation", "private", "sh", "-c", &script]);
        let holder = self.record("holder");
        let process = self.processes.start(&holder, &mut command)?;
        wait_for(
            &format!("the namespaces of {}", self.name),
            Duration::from_secs(20),
            || {
                self.processes.check(&holder)?;
                // Looked at from outside: entering too early would be entering the machine's own namespace.
                Ok(Path::new(&format!("/proc/{}/root/run/lab-ready", process.pid))
                    .exists()
                    .then_some(()))
            },
        )
    }

    pub fn start_kubelet(&self) -> Result<()> {
        let mut command = self.command(self.binaries.path("kubelet"));
        command.args([
            format!("--config={}", self.directory().join("kubelet.json").display()),
            format!("--kubeconfig={}", self.directory().join("kubelet.kubeconfig").display()),
            format!("--hostname-override={}", self.name),
            format!("--node-ip={}", self.address()),
            format!("--node-labels=topology.kubernetes.io/zone=zone{}", self.index),
        ]);
        self.processes.start(&self.record("kubelet"), &mut command)?;
        Ok(())
    }

    pub fn stop_kubelet(&self) {
        self.processes.stop(&self.record("kubelet"), PATIENCE);
    }

    pub fn restart_kubelet(&self) -> Result<()> {
        self.stop_kubelet();
        self.start_kubelet()
    }

    /// The node's pools are on a disk that can lose what is not synced, see [`VolatileDisk`]. It is used from the node's
    /// next start on, and served by `program`, which is `galleonfs-lab`.
    pub fn use_volatile_disk(&self, program: &Path) -> Result<()> {
        self.volatile_disk().choose(program)
    }

    fn volatile_disk(&self) -> VolatileDisk {
        VolatileDisk::new(&self.name, &self.directory(), &self.disk_image(), &self.processes)
    }

    fn disk_image(&self) -> PathBuf {
        self.directory().join("disk.img")
    }

    /// What the pools' file system stands on.
    fn disk(&self) -> PathBuf {
        let volatile = self.volatile_disk();
        if volatile.chosen() {
            volatile.file()
        } else {
            self.disk_image()
        }
    }

    /// Everything of the node ends at once, and of what it wrote to its volatile disk and did not sync some is lost: the
    /// disk goes first, so nothing that the kernel holds for it can be written any more. Says what was lost.
    pub fn cut_power(&self) -> Result<String> {
        let told = self.volatile_disk().cut()?;
        self.crash()?;
        Ok(told)
    }

    /// Everything of the node ends at once; the machine's kernel writes what it holds to the node's disk.
    pub fn crash(&self) -> Result<()> {
        let holder = self.holder()?;
        let devices = sweep::fuse_devices(&cgroups::processes(&self.cgroup(), ""));
        let all = self.all_processes()?;
        for process in &all {
            process.signal(Signal::SIGKILL);
        }
        holder.signal(Signal::SIGKILL);
        for process in all.iter().chain([&holder]) {
            anyhow::ensure!(
                process.wait_gone(PATIENCE),
                "process {} of {} does not end",
                process.pid,
                self.name
            );
        }
        sweep::detach_loops(&self.directory(), &devices);
        // Mounting the disk a second time while the first mount lingers would destroy it.
        let disk = self.disk();
        wait_for(
            &format!("the disk of {} to be free", self.name),
            Duration::from_secs(30),
            || Ok((!has_loop_device(&disk)?).then_some(())),
        )?;
        self.volatile_disk().stop();
        Ok(())
    }

    /// Everything that runs on the node, in its pods and beside them, but what holds its namespaces.
    fn all_processes(&self) -> Result<Vec<Process>> {
        let holder = self.holder()?;
        let namespace = |process: &Process| fs::read_link(format!("/proc/{}/ns/mnt", process.pid)).ok();
        let inside = namespace(&holder);
        let pods = cgroups::processes(&self.cgroup(), "");
        // Programs and shims of the node live in its mount namespace, pods in its cgroup.
        let programs = self
            .processes
            .descendants()
            .into_iter()
            .filter(|process| namespace(process) == inside);
        Ok(programs.chain(pods).filter(|process| *process != holder).collect())
    }

    /// Nothing on the node goes on, and nothing ends: as a machine whose hypervisor holds it.
    pub fn freeze(&self) -> Result<Frozen> {
        Ok(Frozen::new(self.all_processes()?))
    }

    /// Starts a node that has crashed.
    pub fn start(&self) -> Result<()> {
        self.start_runtime()?;
        self.start_kubelet()
    }

    pub fn check(&self) -> Result<()> {
        self.records()
            .iter()
            .try_for_each(|record| self.processes.check(record))
    }

    /// The first process of the node's mount namespace.
    pub fn holder(&self) -> Result<Process> {
        self.processes
            .find(&self.record("holder"))
            .with_context(|| format!("{} is not running", self.name))
    }

    /// A command inside the node, i.e. in its mount and network namespaces.
    pub fn command(&self, program: impl AsRef<std::ffi::OsStr>) -> Command {
        // A dead holder makes nsenter fail with "no such process", which names what is wrong well enough.
        let pid = self.holder().map_or(0, |process| process.pid);
        let mut command = run::command("nsenter", ["--mount", "--net", "--target", &pid.to_string(), "--"]);
        command.env("PATH", self.binaries.path_variable()).arg(program);
        command
    }

    /// Runs a shell line inside the node.
    pub fn shell(&self, line: &str) -> Result<String> {
        run::output(self.command("sh").args(["-c", line]))
    }

    pub fn ctr(&self, arguments: &[&str]) -> Result<String> {
        run::output(
            self.command(self.binaries.path("ctr"))
                .args(["--namespace", "k8s.io"])
                .args(arguments),
        )
    }

    /// Brings the images that the node does not have yet. `true` if there were any.
    pub fn import(&self, images: &[Image]) -> Result<bool> {
        let mut changed = false;
        for image in images {
            let seen = self.directory().join("images").join(&image.version);
            if seen.exists() {
                continue;
            }
            self.ctr(&["images", "import", "--local", &image.archive.to_string_lossy()])
                .with_context(|| format!("{} could not import an image", self.name))?;
            write_file(&seen, "")?;
            changed = true;
        }
        Ok(changed)
    }

    /// The processes of a pod, or of one of its containers, by the id in their cgroup's path.
    pub fn processes_of(&self, id: &str) -> Vec<Process> {
        cgroups::processes(&self.cgroup(), id)
    }

    /// Kills the main process of one container, as the kernel's OOM killer or a bug would. Gives its process.
    pub fn kill_container(&self, container_id: &str) -> Result<Vec<Process>> {
        let id = container_id.trim_start_matches("containerd://");
        let processes = self.processes_of(id);
        anyhow::ensure!(!processes.is_empty(), "{} runs no container {id}", self.name);
        for process in &processes {
            process.signal(Signal::SIGKILL);
        }
        Ok(processes)
    }
}

/// Processes that stand still while this lives.
#[derive(Debug)]
pub struct Frozen(Vec<Process>);

impl Frozen {
    pub fn new(processes: Vec<Process>) -> Self {
        processes.iter().for_each(|process| process.signal(Signal::SIGSTOP));
        Self(processes)
    }

    /// They go on where they were.
    pub fn thaw(self) {}
}

impl Drop for Frozen {
    fn drop(&mut self) {
        self.0.iter().for_each(|process| process.signal(Signal::SIGCONT));
    }
}

/// overlayfs cannot stack on itself: in a checkout inside a container, copies have to do.
pub fn snapshotter(directory: &Path) -> Result<&'static str> {
    let on_overlay = statfs(directory)?.filesystem_type() == OVERLAYFS_SUPER_MAGIC;
    Ok(if on_overlay { "native" } else { "overlayfs" })
}

pub fn containerd_config(root: &Path, snapshotter: &str, cni: &Path) -> Result<String> {
    let runc = run::which("runc").context("runc is missing")?;
    Ok(format!(
        r#"version = 3
root = "{root}"
state = "/run/containerd"
disabled_plugins = ["io.containerd.nri.v1.nri", "io.containerd.internal.v1.tracing", "io.containerd.tracing.processor.v1.otlp"]

[grpc]
  address = "/run/containerd/containerd.sock"

[plugins.'io.containerd.cri.v1.images']
  snapshotter = "{snapshotter}"
  [plugins.'io.containerd.cri.v1.images'.pinned_images]
    sandbox = "{PAUSE}"

[plugins.'io.containerd.cri.v1.runtime']
  # runc fails where it may not lower the score.
  restrict_oom_score_adj = true
  [plugins.'io.containerd.cri.v1.runtime'.containerd]
    default_runtime_name = "runc"
    [plugins.'io.containerd.cri.v1.runtime'.containerd.runtimes.runc]
      runtime_type = "io.containerd.runc.v2"
      [plugins.'io.containerd.cri.v1.runtime'.containerd.runtimes.runc.options]
        BinaryName = "{runc}"
        SystemdCgroup = false
  [plugins.'io.containerd.cri.v1.runtime'.cni]
    bin_dirs = ["/usr/lib/cni", "/opt/cni/bin"]
    conf_dir = "{cni}"
"#,
        runc = runc.display(),
        cni = cni.display(),
        root = root.display(),
    ))
}
