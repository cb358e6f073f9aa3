//! Container images as files, written without any container tool: layers are tar files, and an image is a
//! `docker save` archive of them, which containerd imports.
//!
//! Layers are cached under what they were made from; two images that share a layer share the file. Everything in a
//! layer has a fixed time and order, so that the same input is the same layer on every machine.

use std::fs::{self, File};
use std::io::{BufWriter, Read, Write};
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use ring::digest;
use serde_json::json;
use tar::{Builder, EntryType, Header};

use super::layout::{hex, write_file};

/// One layer: a tar file and the SHA-256 of its bytes.
#[derive(Clone, Debug)]
pub struct Layer {
    pub path: PathBuf,
    pub digest: String,
}

/// What a container made from the image runs.
#[derive(Clone, Debug, Default)]
pub struct Start {
    pub entrypoint: Vec<String>,
    pub command: Vec<String>,
    /// `uid:gid`; empty for root.
    pub user: String,
}

/// Gives the layer that is cached as `key`, or has `fill` write it.
pub fn layer(directory: &Path, key: &str, fill: impl FnOnce(&mut LayerWriter) -> Result<()>) -> Result<Layer> {
    let path = directory.join(format!("{key}.tar"));
    let digest_path = directory.join(format!("{key}.sha256"));
    // The digest is written last: where it exists, the layer is whole.
    if let Ok(digest) = fs::read_to_string(&digest_path) {
        return Ok(Layer { path, digest });
    }
    fs::create_dir_all(directory)?;
    let unfinished = directory.join(format!(".{key}.tar"));
    let file = File::create(&unfinished).with_context(|| format!("could not create {}", unfinished.display()))?;
    let mut writer = LayerWriter {
        tar: Builder::new(BufWriter::new(file)),
    };
    fill(&mut writer)?;
    writer.tar.into_inner()?.flush()?;
    let digest = file_digest(&unfinished)?;
    fs::rename(&unfinished, &path)?;
    write_file(&digest_path, &digest)?;
    Ok(Layer { path, digest })
}

pub fn file_digest(path: &Path) -> Result<String> {
    let mut file = File::open(path).with_context(|| format!("could not open {}", path.display()))?;
    let mut context = digest::Context::new(&digest::SHA256);
    let mut buffer = vec![0; 1 << 20];
    loop {
        let length = file.read(&mut buffer)?;
        if length == 0 {
            return Ok(hex(context.finish().as_ref()));
        }
        context.update(&buffer[..length]);
    }
}

/// Fills a layer. Paths inside it are relative to the image's root.
pub struct LayerWriter {
    tar: Builder<BufWriter<File>>,
}

impl std::fmt::Debug for LayerWriter {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("LayerWriter").finish_non_exhaustive()
    }
}

impl LayerWriter {
    pub fn directory(&mut self, path: &str, mode: u32) -> Result<()> {
        let mut header = header(EntryType::Directory, mode);
        self.tar
            .append_data(&mut header, format!("{path}/"), std::io::empty())?;
        Ok(())
    }

    pub fn file(&mut self, path: &str, source: &Path, mode: u32) -> Result<()> {
        let file = File::open(source).with_context(|| format!("could not open {}", source.display()))?;
        let mut header = header(EntryType::Regular, mode);
        header.set_size(file.metadata()?.len());
        self.tar.append_data(&mut header, path, file)?;
        Ok(())
    }

    pub fn text(&mut self, path: &str, content: &str, mode: u32) -> Result<()> {
        let mut header = header(EntryType::Regular, mode);
        header.set_size(content.len() as u64);
        self.tar.append_data(&mut header, path, content.as_bytes())?;
        Ok(())
    }

    pub fn symlink(&mut self, path: &str, target: &str) -> Result<()> {
        let mut header = header(EntryType::Symlink, 0o777);
        self.tar.append_link(&mut header, path, target)?;
        Ok(())
    }

    /// A whole root file system. Device nodes and sockets stay behind: a container gets its own `/dev`.
    pub fn tree(&mut self, root: &Path) -> Result<()> {
        self.subtree(root, Path::new(""))
    }

    fn subtree(&mut self, root: &Path, relative: &Path) -> Result<()> {
        let directory = root.join(relative);
        let mut names = Vec::new();
        for entry in fs::read_dir(&directory).with_context(|| format!("could not read {}", directory.display()))? {
            names.push(entry?.file_name());
        }
        names.sort();
        for name in names {
            let inside = relative.join(&name);
            let outside = root.join(&inside);
            let metadata = fs::symlink_metadata(&outside)?;
            let kind = metadata.file_type();
            let mut header = header(EntryType::Regular, metadata.mode() & 0o7777);
            header.set_uid(metadata.uid().into());
            header.set_gid(metadata.gid().into());
            if kind.is_dir() {
                header.set_entry_type(EntryType::Directory);
                self.tar.append_data(&mut header, inside.join(""), std::io::empty())?;
                self.subtree(root, &inside)?;
            } else if kind.is_symlink() {
                header.set_entry_type(EntryType::Symlink);
                self.tar.append_link(&mut header, &inside, fs::read_link(&outside)?)?;
            } else if kind.is_file() {
                header.set_size(metadata.len());
                self.tar.append_data(&mut header, &inside, File::open(&outside)?)?;
            } else {
                debug_assert!(kind.is_char_device() || kind.is_block_device() || kind.is_fifo() || kind.is_socket());
            }
        }
        Ok(())
    }
}

fn header(kind: EntryType, mode: u32) -> Header {
    let mut header = Header::new_gnu();
    header.set_entry_type(kind);
    header.set_mode(mode);
    header.set_uid(0);
    header.set_gid(0);
    header.set_mtime(0);
    header.set_size(0);
    header
}

/// Writes an image archive that carries all of `names`.
pub fn write_image(path: &Path, names: &[String], layers: &[Layer], start: &Start) -> Result<()> {
    let config = json!({
        "architecture": match std::env::consts::ARCH { "x86_64" => "amd64", "aarch64" => "arm64", other => other },
        "os": "linux",
        "config": {
            "Env": ["PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"],
            "Entrypoint": start.entrypoint,
            "Cmd": start.command,
            "User": start.user,
            "WorkingDir": "/",
        },
        "rootfs": {
            "type": "layers",
            "diff_ids": layers.iter().map(|layer| format!("sha256:{}", layer.digest)).collect::<Vec<_>>(),
        },
    })
    .to_string();
    let config_name = format!(
        "{}.json",
        hex(digest::digest(&digest::SHA256, config.as_bytes()).as_ref())
    );
    let manifest = json!([{
        "Config": config_name,
        "RepoTags": names,
        "Layers": layers.iter().map(|layer| format!("{}.tar", layer.digest)).collect::<Vec<_>>(),
    }])
    .to_string();

    let unfinished = path.with_extension("unfinished");
    let file = File::create(&unfinished).with_context(|| format!("could not create {}", unfinished.display()))?;
    let mut writer = LayerWriter {
        tar: Builder::new(BufWriter::new(file)),
    };
    for layer in layers {
        writer.file(&format!("{}.tar", layer.digest), &layer.path, 0o644)?;
    }
    writer.text(&config_name, &config, 0o644)?;
    writer.text("manifest.json", &manifest, 0o644)?;
    writer.tar.into_inner()?.flush()?;
    fs::rename(&unfinished, path)?;
    Ok(())
}
