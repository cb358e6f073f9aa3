//! Where a lab keeps its things.
//!
//! What can be made again at a price (programs, images) lives in a cache that all checkouts of a user share. What
//! belongs to one cluster lives below the checkout in `target/lab/<name>` and is gone after `down`, the logs excepted.

use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail};
use ring::digest;

/// Network interfaces have names of at most 15 bytes, and ours are `gfs-<name>-<node>`.
const NAME_LENGTH_MAX: usize = 8;

#[derive(Clone, Debug)]
pub struct Layout {
    name: String,
    checkout: PathBuf,
    cache: PathBuf,
}

impl Layout {
    pub fn new(name: &str) -> Result<Self> {
        let plain = |c: char| c.is_ascii_lowercase() || c.is_ascii_digit();
        if name.is_empty() || name.len() > NAME_LENGTH_MAX || !name.chars().all(plain) {
            bail!("the lab's name `{name}` must be 1 to {NAME_LENGTH_MAX} lower-case letters or digits");
        }
        let checkout = Path::new(env!("CARGO_MANIFEST_DIR"))
            .parent()
            .context("the crate has no parent directory")?;
        Ok(Self {
            name: name.to_string(),
            checkout: checkout.to_path_buf(),
            cache: cache_directory()?,
        })
    }

    pub fn name(&self) -> &str {
        &self.name
    }

    pub fn checkout(&self) -> &Path {
        &self.checkout
    }

    /// Programs and images, shared by every lab of this user.
    pub fn cache(&self) -> &Path {
        &self.cache
    }

    /// Cargo's own directory, where the binary under test is found.
    pub fn target(&self) -> PathBuf {
        match std::env::var_os("CARGO_TARGET_DIR") {
            Some(target) => self.checkout.join(target),
            None => self.checkout.join("target"),
        }
    }

    /// Everything of this one cluster.
    pub fn dir(&self) -> PathBuf {
        self.checkout.join("target/lab").join(&self.name)
    }

    pub fn logs(&self) -> PathBuf {
        self.dir().join("logs")
    }

    pub fn pki(&self) -> PathBuf {
        self.dir().join("pki")
    }

    pub fn pids(&self) -> PathBuf {
        self.dir().join("pids")
    }

    pub fn kubeconfig(&self) -> PathBuf {
        self.dir().join("kubeconfig")
    }

    /// What a running lab is made of, see [`super::cluster::Shape`].
    pub fn shape(&self) -> PathBuf {
        self.dir().join("lab.json")
    }

    /// Held while a lab is started or stopped. Beside the directory, which `down` empties.
    pub fn lock(&self) -> PathBuf {
        self.checkout.join("target/lab").join(format!("{}.lock", self.name))
    }

    /// Unpacked images, see [`super::seed`]. Below the checkout, because nodes link to them; shared by all its labs.
    pub fn seeds(&self) -> PathBuf {
        self.checkout.join("target/lab/.seed")
    }

    pub fn node(&self, node: &str) -> PathBuf {
        self.dir().join("nodes").join(node)
    }

    /// The prefix of bridges, interfaces, network namespaces and cgroups.
    pub fn prefix(&self) -> String {
        format!("gfs-{}", self.name)
    }
}

fn cache_directory() -> Result<PathBuf> {
    let set = |name: &str| {
        std::env::var_os(name)
            .filter(|value| !value.is_empty())
            .map(PathBuf::from)
    };
    let root = match (set("GALLEONFS_CACHE"), set("XDG_CACHE_HOME"), set("HOME")) {
        (Some(own), _, _) => own,
        (None, Some(shared), _) => shared.join("galleonfs"),
        (None, None, Some(home)) => home.join(".cache/galleonfs"),
        (None, None, None) => bail!("no place for the cache: set GALLEONFS_CACHE or HOME"),
    };
    Ok(std::path::absolute(root)?.join("lab"))
}

/// SHA-256 in hex: how cached things are named after what they are made from.
pub fn sha256(parts: &[&[u8]]) -> String {
    let mut context = digest::Context::new(&digest::SHA256);
    for part in parts {
        // The length keeps ("ab", "c") and ("a", "bc") apart.
        context.update(&(part.len() as u64).to_le_bytes());
        context.update(part);
    }
    hex(context.finish().as_ref())
}

pub fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

/// Writes a file by way of a temporary one, so that a killed lab leaves no half of it.
pub fn write_file(path: &Path, content: impl AsRef<[u8]>) -> Result<()> {
    let parent = path
        .parent()
        .with_context(|| format!("{} has no parent", path.display()))?;
    fs::create_dir_all(parent).with_context(|| format!("could not create {}", parent.display()))?;
    let temporary = path.with_extension("tmp");
    fs::write(&temporary, content).with_context(|| format!("could not write {}", temporary.display()))?;
    fs::rename(&temporary, path).with_context(|| format!("could not write {}", path.display()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_name_that_does_not_fit_an_interface_is_refused() {
        assert!(Layout::new("demo").is_ok());
        for name in ["", "toolongname", "Demo", "a-b", "../x"] {
            assert!(Layout::new(name).is_err(), "{name}");
        }
    }

    #[test]
    fn the_hash_tells_parts_apart() {
        assert_ne!(sha256(&[b"ab", b"c"]), sha256(&[b"a", b"bc"]));
    }
}
