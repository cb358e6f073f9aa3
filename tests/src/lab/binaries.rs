//! The programs of a Kubernetes cluster, built from their modules' source and kept in the cache.
//!
//! `tests/lab/go` holds two Go modules that name them and pin every version. The build runs in a copy of those
//! modules, so that it never touches the checkout, and its results are filed under a hash of all that went into it.
//! A build that was interrupted goes on where it stopped.

use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result};
use nix::fcntl::{Flock, FlockArg};

use super::layout::{Layout, sha256};
use super::{prerequisites, run};

struct Program {
    name: &'static str,
    module: &'static str,
    package: &'static str,
}

const fn program(name: &'static str, module: &'static str, package: &'static str) -> Program {
    Program { name, module, package }
}

const PROGRAMS: &[Program] = &[
    program("kube-apiserver", "kubernetes", "k8s.io/kubernetes/cmd/kube-apiserver"),
    program(
        "kube-controller-manager",
        "kubernetes",
        "k8s.io/kubernetes/cmd/kube-controller-manager",
    ),
    program("kube-scheduler", "kubernetes", "k8s.io/kubernetes/cmd/kube-scheduler"),
    program("kubelet", "kubernetes", "k8s.io/kubernetes/cmd/kubelet"),
    program("kubectl", "kubernetes", "k8s.io/kubernetes/cmd/kubectl"),
    program("etcd", "kubernetes", "go.etcd.io/etcd/server/v3"),
    program(
        "containerd",
        "kubernetes",
        "github.com/containerd/containerd/v2/cmd/containerd",
    ),
    program(
        "containerd-shim-runc-v2",
        "kubernetes",
        "github.com/containerd/containerd/v2/cmd/containerd-shim-runc-v2",
    ),
    program("ctr", "kubernetes", "github.com/containerd/containerd/v2/cmd/ctr"),
    program("helm", "kubernetes", "helm.sh/helm/v4/cmd/helm"),
    program(
        "csi-sanity",
        "kubernetes",
        "github.com/kubernetes-csi/csi-test/v5/cmd/csi-sanity",
    ),
    program(
        "csi-attacher",
        "kubernetes",
        "github.com/kubernetes-csi/external-attacher/v4/cmd/csi-attacher",
    ),
    program(
        "csi-resizer",
        "kubernetes",
        "github.com/kubernetes-csi/external-resizer/v2/cmd/csi-resizer",
    ),
    program(
        "csi-provisioner",
        "provisioner",
        "github.com/kubernetes-csi/external-provisioner/v6/cmd/csi-provisioner",
    ),
];

const MODULES: [&str; 2] = ["kubernetes", "provisioner"];
const MODULE_FILES: [&str; 3] = ["go.mod", "go.sum", "tools.go"];

/// Where the built programs are.
#[derive(Clone, Debug)]
pub struct Binaries {
    dir: PathBuf,
    provisioner_tag: String,
    attacher_tag: String,
    resizer_tag: String,
}

impl Binaries {
    pub fn path(&self, name: &str) -> PathBuf {
        self.dir.join(name)
    }

    pub fn dir(&self) -> &Path {
        &self.dir
    }

    /// The CSI sidecars with the version that their module is pinned to, e.g. `("csi-provisioner", "v6.3.0")`.
    pub fn sidecars(&self) -> [(&'static str, &str); 3] {
        [
            ("csi-provisioner", &self.provisioner_tag),
            ("csi-attacher", &self.attacher_tag),
            ("csi-resizer", &self.resizer_tag),
        ]
    }

    /// The same programs first on the PATH: containerd finds its shim there.
    pub fn path_variable(&self) -> std::ffi::OsString {
        let mut path = self.dir.clone().into_os_string();
        path.push(":/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin");
        path
    }
}

/// Builds what is not in the cache yet.
pub fn ensure(layout: &Layout) -> Result<Binaries> {
    ensure_some(layout, &PROGRAMS.iter().map(|program| program.name).collect::<Vec<_>>())
}

/// As [`ensure`], for a few of the programs: a cluster of somebody else's needs only its clients.
pub fn ensure_some(layout: &Layout, names: &[&str]) -> Result<Binaries> {
    let modules = layout.checkout().join("tests/lab/go");
    let kubernetes =
        fs::read_to_string(modules.join("kubernetes/go.mod")).context("could not read the lab's go.mod")?;
    let provisioner =
        fs::read_to_string(modules.join("provisioner/go.mod")).context("could not read the lab's go.mod")?;
    let ldflags = linker_flags(required_version(&kubernetes, "k8s.io/kubernetes")?)?;

    let mut inputs = vec![ldflags.clone().into_bytes(), std::env::consts::ARCH.into()];
    for module in MODULES {
        for file in ["go.mod", "go.sum"] {
            inputs.push(fs::read(modules.join(module).join(file))?);
        }
    }
    let hash = sha256(&inputs.iter().map(Vec::as_slice).collect::<Vec<_>>());
    let root = layout.cache().join(&hash[..16]);
    let binaries = Binaries {
        dir: root.join("bin"),
        provisioner_tag: required_version(&provisioner, "github.com/kubernetes-csi/external-provisioner/v6")?
            .to_string(),
        attacher_tag: required_version(&kubernetes, "github.com/kubernetes-csi/external-attacher/v4")?.to_string(),
        resizer_tag: required_version(&kubernetes, "github.com/kubernetes-csi/external-resizer/v2")?.to_string(),
    };
    fs::create_dir_all(binaries.dir()).with_context(|| format!("could not create {}", binaries.dir().display()))?;
    if missing(&binaries, names).is_empty() {
        return Ok(binaries);
    }

    let lock = File::create(root.join("lock"))?;
    let _lock = Flock::lock(lock, FlockArg::LockExclusive).map_err(|(_, error)| error)?;
    let missing = missing(&binaries, names);
    let go = if missing.is_empty() {
        PathBuf::new()
    } else {
        prerequisites::go()?
    };
    for (index, program) in missing.iter().enumerate() {
        let title = format!(
            "Building {} ({} of {}, once; minutes each)",
            program.name,
            index + 1,
            missing.len()
        );
        run::step(&title, || {
            // A new machine fetches hundreds of modules first, and one of them may not come at the first try. What has
            // been fetched and compiled is kept.
            build(&go, &root, &modules, program, &ldflags).or_else(|error| {
                run::say(&format!("    once more, after {error:#}"));
                build(&go, &root, &modules, program, &ldflags)
            })
        })?;
    }
    Ok(binaries)
}

fn missing(binaries: &Binaries, names: &[&str]) -> Vec<&'static Program> {
    let wanted = PROGRAMS.iter().filter(|program| names.contains(&program.name));
    wanted
        .filter(|program| !binaries.path(program.name).is_file())
        .collect()
}

fn build(go: &Path, root: &Path, modules: &Path, program: &Program, ldflags: &str) -> Result<()> {
    let work = root.join("build").join(program.module);
    fs::create_dir_all(&work)?;
    for file in MODULE_FILES {
        fs::copy(modules.join(program.module).join(file), work.join(file))?;
    }
    let unfinished = root.join("bin").join(format!(".{}", program.name));
    let mut command = Command::new(go);
    command
        .current_dir(&work)
        .env("CGO_ENABLED", "0")
        .env("GOWORK", "off")
        .env("GOFLAGS", "-mod=mod -buildvcs=false")
        .args(["build", "-trimpath", "-ldflags", ldflags, "-o"])
        .arg(&unfinished)
        .arg(program.package);
    run::output(&mut command)?;
    fs::rename(&unfinished, root.join("bin").join(program.name))?;
    Ok(())
}

/// Without these the API server calls itself v0.0.0, and clients refuse it.
fn linker_flags(version: &str) -> Result<String> {
    let mut numbers = version.trim_start_matches('v').split('.');
    let major = numbers.next().context("a version has a major number")?;
    let minor = numbers.next().context("a version has a minor number")?;
    let variable = "-X k8s.io/component-base/version.git";
    Ok(format!(
        "-s -w {variable}Version={version} {variable}Major={major} {variable}Minor={minor}"
    ))
}

/// The version of `module` that a go.mod requires.
fn required_version<'a>(go_mod: &'a str, module: &str) -> Result<&'a str> {
    go_mod
        .lines()
        .map(|line| line.trim().trim_start_matches("require ").split_whitespace())
        .find_map(|mut words| {
            if words.next() == Some(module) {
                words.next()
            } else {
                None
            }
        })
        .filter(|version| version.starts_with('v'))
        .with_context(|| format!("the lab's go.mod does not require {module}"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_version_is_read_from_both_forms_of_require() {
        let go_mod = "module x\n\nrequire a.b/c v1.2.3\nrequire (\n\td.e/f v4.5.6\n)\n";
        assert_eq!(required_version(go_mod, "a.b/c").unwrap(), "v1.2.3");
        assert_eq!(required_version(go_mod, "d.e/f").unwrap(), "v4.5.6");
        assert!(required_version(go_mod, "a.b").is_err());
    }

    #[test]
    fn the_programs_are_those_that_the_go_modules_name() {
        let modules = Path::new(env!("CARGO_MANIFEST_DIR")).join("lab/go");
        for module in MODULES {
            let tools = fs::read_to_string(modules.join(module).join("tools.go")).unwrap();
            let named = tools.lines().filter(|line| line.contains("_ \"")).count();
            let ours: Vec<_> = PROGRAMS.iter().filter(|program| program.module == module).collect();
            assert_eq!(named, ours.len(), "{module}/tools.go and PROGRAMS differ");
            for program in ours {
                assert!(
                    tools.contains(&format!("_ \"{}\"", program.package)),
                    "{} is not in tools.go",
                    program.package
                );
            }
        }
    }
}
