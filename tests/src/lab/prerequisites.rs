//! What the machine must offer. Debian's packages are installed; what we cannot install is named, one line each.

use std::path::Path;
use std::process::Command;

use anyhow::{Result, bail};

use super::run::{self, say, step, which};

/// A thing that a Debian package brings.
struct Wanted {
    probe: Probe,
    package: &'static str,
}

enum Probe {
    Program(&'static str),
    File(&'static str),
    /// For a package whose presence cannot be told from its files: the busybox of `busybox` is not static.
    Package,
}

const WANTED: &[Wanted] = &[
    Wanted {
        probe: Probe::Program("runc"),
        package: "runc",
    },
    Wanted {
        probe: Probe::File("/usr/lib/cni/bridge"),
        package: "containernetworking-plugins",
    },
    Wanted {
        probe: Probe::Program("iptables"),
        package: "iptables",
    },
    Wanted {
        probe: Probe::Program("conntrack"),
        package: "conntrack",
    },
    Wanted {
        probe: Probe::Package,
        package: "busybox-static",
    },
    Wanted {
        probe: Probe::Program("mkfs.ext4"),
        package: "e2fsprogs",
    },
    Wanted {
        probe: Probe::Program("mkfs.xfs"),
        package: "xfsprogs",
    },
    Wanted {
        probe: Probe::Program("mkfs.btrfs"),
        package: "btrfs-progs",
    },
    Wanted {
        probe: Probe::Program("fusermount3"),
        package: "fuse3",
    },
    Wanted {
        probe: Probe::Program("fio"),
        package: "fio",
    },
    Wanted {
        probe: Probe::Program("debootstrap"),
        package: "debootstrap",
    },
    Wanted {
        probe: Probe::Program("ip"),
        package: "iproute2",
    },
    Wanted {
        probe: Probe::Program("nsenter"),
        package: "util-linux",
    },
    Wanted {
        probe: Probe::Program("losetup"),
        package: "mount",
    },
    Wanted {
        probe: Probe::Program("cc"),
        package: "gcc",
    },
    Wanted {
        probe: Probe::File("/usr/include/unistd.h"),
        package: "libc6-dev",
    },
];

/// Checks everything, installs what is missing and can be, and refuses with a list of the rest.
pub fn ensure() -> Result<()> {
    if !nix::unistd::geteuid().is_root() {
        bail!(
            "the lab makes network and mount namespaces and must run as root, e.g. `sudo env \"PATH=$PATH\" make demo`"
        );
    }
    let missing: Vec<&str> = WANTED
        .iter()
        .filter(|wanted| !wanted.is_there())
        .map(|wanted| wanted.package)
        .collect();
    if !missing.is_empty() {
        install(&missing)?;
    }
    let mut problems: Vec<String> = WANTED
        .iter()
        .filter(|wanted| !wanted.is_there())
        .map(|wanted| {
            format!(
                "the Debian package `{}` is missing: apt-get install {}",
                wanted.package, wanted.package
            )
        })
        .collect();
    for device in ["/dev/fuse", "/dev/loop-control"] {
        if !Path::new(device).exists() {
            let module = device.trim_start_matches("/dev/").trim_end_matches("-control");
            problems.push(format!(
                "{device} is missing: `modprobe {module}`, or use a kernel that has it"
            ));
        }
    }
    if !problems.is_empty() {
        bail!("this machine lacks:\n  {}", problems.join("\n  "));
    }
    Ok(())
}

/// Go is needed only while the cluster's programs are not in the cache. Its own installer puts it where neither sudo
/// nor a fresh shell looks.
pub fn go() -> Result<std::path::PathBuf> {
    let installed = Path::new("/usr/local/go/bin/go");
    match which("go").or_else(|| installed.is_file().then(|| installed.to_path_buf())) {
        Some(go) => Ok(go),
        None => bail!(
            "Go is missing (1.26 or newer): the lab builds Kubernetes with it once; see https://go.dev/doc/install, \
             if it is elsewhere than in /usr/local/go, put its `bin` on the PATH"
        ),
    }
}

pub fn cargo() -> Result<std::path::PathBuf> {
    // Under `cargo run` and `cargo test` this names the very cargo in use.
    if let Some(cargo) = std::env::var_os("CARGO") {
        return Ok(cargo.into());
    }
    match which("cargo") {
        Some(cargo) => Ok(cargo),
        None => bail!("Rust is missing: cargo is not on the PATH; see https://www.rust-lang.org/tools/install"),
    }
}

fn install(packages: &[&str]) -> Result<()> {
    let Some(apt) = which("apt-get") else {
        bail!(
            "not a Debian: please install what these Debian packages bring: {}",
            packages.join(" ")
        );
    };
    step(&format!("Installing {}", packages.join(" ")), || {
        let apt_get = |arguments: &[&str]| {
            let mut command = Command::new(&apt);
            command
                .env("DEBIAN_FRONTEND", "noninteractive")
                // A machine that has just started may be updating itself, and its network may not be steady yet.
                .args(["-q", "-y", "-o", "DPkg::Lock::Timeout=300", "-o", "Acquire::Retries=3"])
                .args(arguments);
            run::output(&mut command)
        };
        let mut arguments = vec!["install", "--no-install-recommends"];
        arguments.extend(packages);
        if apt_get(&arguments).is_err() {
            // The usual reason: package lists that are absent or too old.
            say("    refreshing the package lists");
            apt_get(&["update"])?;
            apt_get(&arguments)?;
        }
        Ok(())
    })
}

impl Wanted {
    fn is_there(&self) -> bool {
        match self.probe {
            Probe::Program(name) => which(name).is_some(),
            Probe::File(path) => Path::new(path).exists(),
            Probe::Package => {
                let status = run::output(&mut run::command("dpkg-query", ["-W", "-f=${Status}", self.package]));
                status.is_ok_and(|status| status.ends_with("ok installed"))
            }
        }
    }
}
