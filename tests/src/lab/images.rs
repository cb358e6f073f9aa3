//! The images that pods of the lab run. There is no registry: they are made here from Debian's packages and our own
//! programs, and every node imports them.

use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail};

use super::archive::{Layer, Start, file_digest, layer, write_image};
use super::binaries::Binaries;
use super::layout::{Layout, sha256};
use super::run::{self, step};

/// What holds a pod's namespaces. The name is what this containerd and Kubernetes' own test suite ask for.
pub const PAUSE: &str = "registry.k8s.io/pause:3.10.2";
pub const BUSYBOX: &str = "galleonfs.io/lab/busybox:dev";
/// The name that `deploy/examples` use: what they show must also run outside the lab.
const BUSYBOX_OF_EXAMPLES: &str = "docker.io/library/busybox:1.37";
/// fio beside busybox, for pods that verify what they wrote.
pub const FIO: &str = "galleonfs.io/lab/fio:dev";
/// What the image under test stands on. Nodes that have it import a new build of ours quickly.
pub const DEBIAN: &str = "galleonfs.io/lab/debian:dev";
/// The image under test, as the chart names it.
pub const GALLEONFS: &str = "galleonfs.io/galleonfs:dev";

/// What the GalleonFS image has beside our binary: tools that make, check and mount file systems.
const GALLEONFS_PACKAGES: &str = "e2fsprogs,xfsprogs,util-linux,mount,fuse3";

/// Raise this when the recipe of a layer changes without any of its inputs changing.
const RECIPE: &[u8] = b"1";

/// An image archive, ready to be imported.
#[derive(Clone, Debug)]
pub struct Image {
    pub archive: PathBuf,
    /// Changes when the content does: a node imports an image anew when it has not seen this.
    pub version: String,
}

/// Makes the images that every lab needs.
pub fn ensure_base(layout: &Layout, binaries: &Binaries) -> Result<Vec<Image>> {
    let store = Store::open(layout)?;
    let mut images = vec![store.pause()?, store.busybox()?, store.fio()?];
    images.push(store.image("debian", &[DEBIAN.into()], &[store.debian()?], &Start::default())?);
    for (name, tag) in binaries.sidecars() {
        images.push(store.sidecar(name, tag, &binaries.path(name))?);
    }
    Ok(images)
}

/// Makes the image of GalleonFS from a binary that is built already.
pub fn ensure_galleonfs(layout: &Layout, binary: &Path) -> Result<Image> {
    let store = Store::open(layout)?;
    let base = store.debian()?;
    let content = file_digest(binary).context("GalleonFS is not built")?;
    let own = layer(&store.layers, &format!("galleonfs-{}", &content[..16]), |layer| {
        layer.directory("usr/local/bin", 0o755)?;
        layer.file("usr/local/bin/galleonfs", binary, 0o755)
    })?;
    // As in deploy/Dockerfile: only the node plugin runs as root, and the chart says so.
    let start = Start {
        entrypoint: vec!["/usr/local/bin/galleonfs".into()],
        user: "65532:65532".into(),
        ..Start::default()
    };
    let image = store.image("galleonfs", &[GALLEONFS.into()], &[base, own], &start)?;
    // Each build of ours leaves a layer: only the newest is of use, and it is in the archive.
    store.forget_others("galleonfs-", &content[..16])?;
    Ok(image)
}

struct Store {
    layers: PathBuf,
    archives: PathBuf,
}

impl Store {
    fn open(layout: &Layout) -> Result<Self> {
        let store = Self {
            layers: layout.cache().join("layers"),
            archives: layout.cache().join("archives"),
        };
        for directory in [&store.layers, &store.archives] {
            fs::create_dir_all(directory).with_context(|| format!("could not create {}", directory.display()))?;
        }
        Ok(store)
    }

    fn pause(&self) -> Result<Image> {
        let source = Path::new(env!("CARGO_MANIFEST_DIR")).join("lab/pause.c");
        let key = sha256(&[RECIPE, &fs::read(&source)?]);
        let layer = layer(&self.layers, &format!("pause-{}", &key[..16]), |layer| {
            let program = self.layers.join(".pause");
            let mut compiler = run::command("cc", ["-static", "-Os", "-s", "-o"]);
            run::output(compiler.arg(&program).arg(&source))?;
            layer.file("pause", &program, 0o755)?;
            Ok(fs::remove_file(&program)?)
        })?;
        let start = Start {
            entrypoint: vec!["/pause".into()],
            ..Start::default()
        };
        self.image("pause", &[PAUSE.into()], &[layer], &start)
    }

    fn busybox(&self) -> Result<Image> {
        let start = Start {
            command: vec!["sh".into()],
            ..Start::default()
        };
        self.image(
            "busybox",
            &[BUSYBOX.into(), BUSYBOX_OF_EXAMPLES.into()],
            &[self.busybox_layer()?],
            &start,
        )
    }

    fn busybox_layer(&self) -> Result<Layer> {
        let program = Path::new("/bin/busybox");
        let key = sha256(&[RECIPE, file_digest(program)?.as_bytes()]);
        layer(&self.layers, &format!("busybox-{}", &key[..16]), |layer| {
            layer.directory("bin", 0o755)?;
            layer.directory("etc", 0o755)?;
            layer.directory("root", 0o700)?;
            layer.directory("tmp", 0o1777)?;
            layer.text(
                "etc/passwd",
                "root:x:0:0:root:/root:/bin/sh\nnobody:x:65534:65534:nobody:/:/bin/false\n",
                0o644,
            )?;
            layer.text("etc/group", "root:x:0:\nnogroup:x:65534:\n", 0o644)?;
            layer.file("bin/busybox", program, 0o755)?;
            for applet in run::output(&mut run::command(program, ["--list"]))?
                .lines()
                .filter(|name| *name != "busybox")
            {
                layer.symlink(&format!("bin/{applet}"), "busybox")?;
            }
            Ok(())
        })
    }

    /// fio of this machine with all the libraries it is linked with, started through its own loader: so it runs
    /// without a Debian around it, and without the hundred megabytes that the package's dependencies would bring.
    fn fio(&self) -> Result<Image> {
        let program = run::which("fio").context("fio is missing")?;
        let key = sha256(&[RECIPE, file_digest(&program)?.as_bytes()]);
        let own = layer(&self.layers, &format!("fio-{}", &key[..16]), |layer| {
            let libraries = shared_libraries(&program)?;
            let loader = libraries
                .iter()
                .find(|path| file_name(path).starts_with("ld-"))
                .context("fio has no loader")?;
            layer.directory("opt/fio/lib", 0o755)?;
            layer.file("opt/fio/fio", &program, 0o755)?;
            for library in &libraries {
                layer.file(&format!("opt/fio/lib/{}", file_name(library)), library, 0o755)?;
            }
            let start = format!(
                "#!/bin/sh\nexec /opt/fio/lib/{} --library-path /opt/fio/lib /opt/fio/fio \"$@\"\n",
                file_name(loader)
            );
            layer.directory("usr/bin", 0o755)?;
            layer.text("usr/bin/fio", &start, 0o755)
        })?;
        let start = Start {
            command: vec!["fio".into(), "--version".into()],
            ..Start::default()
        };
        self.image("fio", &[FIO.into()], &[self.busybox_layer()?, own], &start)
    }

    /// The sidecars keep the names under which Kubernetes publishes them, so that the chart needs no special case.
    fn sidecar(&self, name: &str, tag: &str, program: &Path) -> Result<Image> {
        let key = sha256(&[RECIPE, file_digest(program)?.as_bytes()]);
        let layer = layer(&self.layers, &format!("{name}-{}", &key[..16]), |layer| {
            layer.directory("tmp", 0o1777)?;
            layer.file(name, program, 0o755)
        })?;
        let start = Start {
            entrypoint: vec![format!("/{name}")],
            ..Start::default()
        };
        self.image(
            name,
            &[format!("registry.k8s.io/sig-storage/{name}:{tag}")],
            &[layer],
            &start,
        )
    }

    /// A small Debian of the release that this machine runs, because our binary is linked with its C library.
    fn debian(&self) -> Result<Layer> {
        let release = host_release()?;
        let key = sha256(&[
            RECIPE,
            release.as_bytes(),
            GALLEONFS_PACKAGES.as_bytes(),
            std::env::consts::ARCH.as_bytes(),
        ]);
        let name = format!("debian-{}", &key[..16]);
        if self.layers.join(format!("{name}.sha256")).exists() {
            return layer(&self.layers, &name, |_| Ok(()));
        }
        step(&format!("Making the image's Debian ({release}, once)"), || {
            let root = self.layers.join(format!(".{name}.root"));
            remove_tree(&root)?;
            // In a mount namespace of its own, so that an interrupted run leaves no /proc mounted.
            let mut command = run::command("unshare", ["--mount", "debootstrap", "--variant=minbase"]);
            command
                .arg(format!("--include={GALLEONFS_PACKAGES}"))
                .arg(&release)
                .arg(&root);
            if let Some(mirror) = mirror(&release) {
                command.arg(mirror);
            }
            run::output(&mut command)?;
            for useless in [
                "var/cache/apt",
                "var/lib/apt/lists",
                "usr/share/doc",
                "usr/share/man",
                "usr/share/locale",
            ] {
                remove_tree(&root.join(useless))?;
            }
            let layer = layer(&self.layers, &name, |layer| layer.tree(&root))?;
            remove_tree(&root)?;
            Ok(layer)
        })
    }

    fn image(&self, title: &str, names: &[String], layers: &[Layer], start: &Start) -> Result<Image> {
        let text = format!("{names:?} {layers:?} {start:?}");
        let version = sha256(&[RECIPE, text.as_bytes()])[..16].to_string();
        let archive = self.archives.join(format!("{title}-{version}.tar"));
        if !archive.exists() {
            write_image(&archive, names, layers, start)?;
            let old = format!("{title}-");
            for entry in fs::read_dir(&self.archives)? {
                let path = entry?.path();
                let version_of = file_name(&path).strip_prefix(&old).map(str::len);
                // Exactly a version behind the title: `csi-` must not take `csi-attacher-…` along.
                if path != archive && version_of == Some(version.len() + ".tar".len()) {
                    fs::remove_file(&path)?;
                }
            }
        }
        Ok(Image { archive, version })
    }

    fn forget_others(&self, prefix: &str, keep: &str) -> Result<()> {
        for entry in fs::read_dir(&self.layers)? {
            let path = entry?.path();
            if file_name(&path).starts_with(prefix) && !file_name(&path).contains(keep) {
                fs::remove_file(&path)?;
            }
        }
        Ok(())
    }
}

fn file_name(path: &Path) -> &str {
    path.file_name().and_then(|name| name.to_str()).unwrap_or_default()
}

fn remove_tree(path: &Path) -> Result<()> {
    match fs::remove_dir_all(path) {
        Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
            Err(error).with_context(|| format!("could not remove {}", path.display()))
        }
        _ => Ok(()),
    }
}

/// What `ldd` says: lines like `libaio.so.1 => /lib/x86_64-linux-gnu/libaio.so.1 (0x…)`, and the loader alone.
fn shared_libraries(program: &Path) -> Result<BTreeSet<PathBuf>> {
    let said = run::output(run::command("ldd", [program]).env("LC_ALL", "C"))?;
    if let Some(line) = said.lines().find(|line| line.contains("not found")) {
        bail!("{} lacks a library: {}", program.display(), line.trim());
    }
    Ok(said
        .split_whitespace()
        .filter(|word| word.starts_with('/'))
        .map(PathBuf::from)
        .collect())
}

fn host_release() -> Result<String> {
    let text = fs::read_to_string("/etc/os-release").context("could not read /etc/os-release")?;
    text.lines()
        .find_map(|line| line.strip_prefix("VERSION_CODENAME="))
        .map(|name| name.trim_matches('"').to_string())
        .context("/etc/os-release has no VERSION_CODENAME: the lab needs a Debian")
}

/// The mirror that this machine's own apt uses; debootstrap knows a default when there is none.
fn mirror(release: &str) -> Option<String> {
    let mut command = run::command("apt-get", ["indextargets", "--format", "$(SITE) $(RELEASE)"]);
    let said = run::output(&mut command).ok()?;
    said.lines()
        .find_map(|line| line.strip_suffix(release)?.strip_suffix(' '))
        .map(str::to_string)
}
