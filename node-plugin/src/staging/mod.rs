//! Staging and publishing: where a volume's file system or device is put for pods, and how it is put there again.
//!
//! The same steps serve the kubelet's calls and the recovery after our own death, so each of them first looks at what is
//! there. The one rule for a mount that is found: **it lives if it is on the volume's present device, else it is dead.** A
//! dead mount is never touched, only taken out of the tree.
//!
//! The record is written before the mount is made and removed after the mount is gone; so whatever is mounted is on
//! record, and a record without its mount is only a wish that recovery fulfils. All of this runs under the volume's guard.

mod target;

use std::path::Path;

use crate::mount::filesystem::{self, Preparation};
use crate::mount::grow;
use crate::mount::mounts::{self, Usage, blocking, read_table};
use crate::mount::paths::Standing;
use crate::mount::table::{MountTable, device_number};
use crate::mount::{Kubelet, KubeletPath, MountError, Tools};
use crate::served::Device;
use crate::state::{Kind, Records, Staged};

/// Puts volumes where pods find them. Cheap to clone.
#[derive(Debug, Clone)]
pub struct Stager {
    records: Records,
    kubelet: Kubelet,
}

impl Stager {
    pub fn new(records: Records, kubelet: Kubelet) -> Stager {
        Stager { records, kubelet }
    }

    pub fn records(&self) -> &Records {
        &self.records
    }

    pub fn kubelet(&self) -> &Kubelet {
        &self.kubelet
    }

    /// Stages the volume as asked. Repeating it with the same request changes nothing.
    pub async fn stage(&self, tools: &Tools, uid: &str, wanted: Staged, device: &Device) -> Result<(), MountError> {
        let volume = tools.volume();
        let path = self
            .kubelet
            .check("staging_target_path", &wanted.path.to_string_lossy())?;
        if self.standing(&path).await? == Standing::File && wanted.kind != Kind::Block {
            return Err(MountError::Invalid(format!(
                "staging_target_path {path} is a file, not a directory"
            )));
        }
        let known = self
            .records
            .staged(volume)
            .is_some_and(|staged| staged.same_request(&wanted));
        self.records
            .change(volume, |record| {
                if record.volume_uid.as_deref() != Some(uid) {
                    *record = Default::default();
                    record.volume_uid = Some(uid.to_owned());
                }
                let targets = record.staged.take().map(|staged| staged.targets).unwrap_or_default();
                record.staged = Some(Staged {
                    targets,
                    ..wanted.clone()
                });
            })
            .await?;
        let done = self.mount(tools, &wanted, device).await;
        if done.is_err() && !known && read_table().await?.at(&wanted.path).is_none() {
            // Nothing came of it, so nothing is to be recovered. A mark that we were formatting stays.
            self.records.change(volume, |record| record.staged = None).await?;
        }
        done
    }

    /// Takes the staging down. Not being staged is fine.
    pub async fn unstage(&self, tools: &Tools, path: &KubeletPath, device: Option<&Device>) -> Result<(), MountError> {
        let volume = tools.volume();
        let table = read_table().await?;
        let Some(staged) = self.records.staged(volume) else {
            return self.take_down_unrecorded(tools, path, device, &table).await;
        };
        if staged.path != path.as_path() {
            return match table.at(path.as_path()) {
                None => Ok(()),
                Some(_) => {
                    let what = format!("volume {volume} is staged at {}, not at {path}", staged.path.display());
                    Err(MountError::Refused(what))
                }
            };
        }
        if let Some(target) = staged.targets.keys().find(|target| table.at(target).is_some()) {
            let what = format!(
                "volume {volume} is still published at {}: unpublish it first",
                target.display()
            );
            return Err(MountError::Refused(what));
        }
        self.take_down(tools, path.as_path(), device, &table).await?;
        self.records.change(volume, |record| record.staged = None).await
    }

    /// Puts everything on record in its place again, on a device that may be new. What is there already stays.
    pub async fn restore(&self, tools: &Tools, device: &Device) -> Result<(), MountError> {
        let volume = tools.volume();
        let Some(staged) = self.records.staged(volume) else {
            return Ok(());
        };
        self.mount(tools, &staged, device).await?;
        for (path, target) in &staged.targets {
            let path = self.kubelet.check("target_path", &path.to_string_lossy())?;
            let parent = path
                .as_path()
                .parent()
                .expect("a KubeletPath lies below the kubelet's directory")
                .to_owned();
            if tokio::fs::try_exists(&parent).await.unwrap_or(true) {
                self.bind(tools, &staged, &path, target.read_only, device).await?;
            } else {
                // The pod went away while we did, and the kubelet cleaned up: nobody will ask for this target again.
                self.records
                    .change(volume, |record| forget_target(&mut record.staged, path.as_path()))
                    .await?;
            }
        }
        Ok(())
    }

    /// Lets the file system fill a device that has grown.
    pub async fn grow(&self, tools: &Tools, device: &Device) -> Result<(), MountError> {
        let Some(staged) = self.records.staged(tools.volume()) else {
            return Ok(());
        };
        match &staged.kind {
            Kind::Filesystem { fs, .. } if !staged.read_only => {
                grow::grow_mounted(tools, &device.path, device.size_bytes, &staged.path, *fs)
                    .await
                    .map(drop)
            }
            Kind::Filesystem { .. } | Kind::Block => Ok(()),
        }
    }

    /// Space and inodes of a staged file system.
    pub async fn usage(&self, tools: &Tools, path: &Path) -> Result<Usage, MountError> {
        mounts::usage(tools, path).await
    }

    /// Writes out what is dirty, at an orderly end.
    pub async fn sync(&self, tools: &Tools) -> Result<(), MountError> {
        match self.records.staged(tools.volume()) {
            Some(Staged {
                kind: Kind::Filesystem { .. },
                path,
                ..
            }) => mounts::sync(tools, &path).await,
            _ => Ok(()),
        }
    }

    /// The staging mount of `staged` on `device`: made unless it is there and lives.
    async fn mount(&self, tools: &Tools, staged: &Staged, device: &Device) -> Result<(), MountError> {
        let Kind::Filesystem { fs, flags } = &staged.kind else {
            return Ok(());
        };
        let number = number_of(device).await?;
        match read_table().await?.at(&staged.path).map(|mount| mount.device == number) {
            Some(true) => return Ok(()),
            Some(false) => mounts::unmount_lazily(tools, &staged.path).await?,
            None => {}
        }
        self.mount_fresh(tools, staged, device, *fs, flags).await?;
        // The device may have grown while nothing was mounted. A file system that stays smaller is still a good one.
        if let Err(error) = self.grow(tools, device).await {
            tracing::warn!(volume = tools.volume(), why = %error.text(), "the file system does not fill its device yet");
        }
        Ok(())
    }

    async fn mount_fresh(
        &self,
        tools: &Tools,
        staged: &Staged,
        device: &Device,
        fs: filesystem::FsType,
        flags: &crate::mount::flags::MountFlags,
    ) -> Result<(), MountError> {
        let volume = tools.volume();
        let device_read_only = is_read_only(device).await?;
        let unfinished = self.records.get(volume).and_then(|record| record.formatting) == Some(fs);
        let size = device.size_bytes;
        match filesystem::inspect(tools, &device.path, size, fs, device_read_only, unfinished).await? {
            Preparation::Format => {
                self.records
                    .change(volume, |record| record.formatting = Some(fs))
                    .await?;
                filesystem::format(tools, &device.path, fs).await?;
                // Before the first mount: from here on the file system may hold data.
                self.records.change(volume, |record| record.formatting = None).await?;
            }
            Preparation::Check if device_read_only => {}
            Preparation::Check => {
                filesystem::check(tools, &device.path, fs).await?;
                if !staged.read_only {
                    grow::grow_unmounted(tools, &device.path, size, fs).await?;
                }
            }
        }
        mounts::make_directory(&staged.path).await?;
        let read_only = staged.read_only || device_read_only;
        mounts::mount_device(
            tools,
            &device.path,
            &staged.path,
            fs,
            flags,
            read_only,
            device_read_only,
        )
        .await
    }

    /// Unmounts one place: properly if what is mounted lives, lazily if it is dead.
    async fn take_down(
        &self,
        tools: &Tools,
        path: &Path,
        device: Option<&Device>,
        table: &MountTable,
    ) -> Result<(), MountError> {
        let Some(mount) = table.at(path) else { return Ok(()) };
        let lives = match device {
            Some(device) => {
                mount.device == number_of(device).await? || crate::mount::table::is_node_of(mount, &device.path)
            }
            None => false,
        };
        if lives {
            mounts::unmount(tools, path).await
        } else {
            mounts::unmount_lazily(tools, path).await
        }
    }

    /// A place that is not on record for this volume: if something is mounted there, it must look like ours and belong
    /// to no other volume before we take it down.
    async fn take_down_unrecorded(
        &self,
        tools: &Tools,
        path: &KubeletPath,
        device: Option<&Device>,
        table: &MountTable,
    ) -> Result<(), MountError> {
        let Some(mount) = table.at(path.as_path()) else {
            return Ok(());
        };
        let owner = self.records.volumes().into_iter().find(|volume| {
            let holds = |staged: Staged| staged.path == path.as_path() || staged.targets.contains_key(path.as_path());
            self.records.staged(volume).is_some_and(holds)
        });
        if let Some(owner) = owner {
            let what = format!("{path} belongs to volume {owner}, not to {}", tools.volume());
            return Err(MountError::Refused(what));
        }
        let node = mount
            .root
            .file_name()
            .is_some_and(|name| name.to_string_lossy().starts_with("loop"));
        if mount.device.0 != LOOP_MAJOR && !(mount.fs_type == "devtmpfs" && node) {
            let what = format!(
                "{path} is a mount of {} ({}), not one of ours: it stays",
                mount.source, mount.fs_type
            );
            return Err(MountError::Refused(what));
        }
        self.take_down(tools, path.as_path(), device, table).await
    }

    async fn standing(&self, path: &KubeletPath) -> Result<Standing, MountError> {
        let (kubelet, path) = (self.kubelet.clone(), path.clone());
        blocking("looking at a mount point", move || {
            kubelet.inspect(&path, &MountTable::read()?)
        })
        .await
    }
}

/// The kernel's number for loop devices.
const LOOP_MAJOR: u32 = 7;

fn forget_target(staged: &mut Option<Staged>, path: &Path) {
    if let Some(staged) = staged {
        staged.targets.remove(path);
    }
}

async fn number_of(device: &Device) -> Result<(u32, u32), MountError> {
    let path = device.path.clone();
    blocking("looking at a device", move || device_number(&path)).await
}

/// Whether the device refuses writes, by what the kernel says of it.
async fn is_read_only(device: &Device) -> Result<bool, MountError> {
    let (major, minor) = number_of(device).await?;
    let path = format!("/sys/dev/block/{major}:{minor}/ro");
    blocking("looking at a device", move || {
        let said = std::fs::read_to_string(&path).map_err(MountError::io(format!("reading {path}")))?;
        Ok(said.trim() == "1")
    })
    .await
}
