//! Publishing: the bind mounts through which single pods see a staged volume.

use super::{Stager, forget_target, number_of};
use crate::mount::mounts::{self, read_table};
use crate::mount::paths::Standing;
use crate::mount::table::{MountTable, is_node_of};
use crate::mount::{KubeletPath, MountError, Tools};
use crate::served::Device;
use crate::state::{Kind, Staged, Target};

impl Stager {
    /// Publishes a staged volume at `target`. Repeating it changes nothing.
    pub async fn publish(
        &self,
        tools: &Tools,
        target: &KubeletPath,
        read_only: bool,
        device: &Device,
    ) -> Result<(), MountError> {
        let volume = tools.volume();
        let Some(staged) = self.records.staged(volume) else {
            return Err(MountError::Refused(format!(
                "volume {volume} is not staged on this node"
            )));
        };
        match (&staged.kind, self.standing(target).await?) {
            (Kind::Filesystem { .. }, Standing::File) => {
                return Err(MountError::Invalid(format!(
                    "target_path {target} is a file, not a directory"
                )));
            }
            (Kind::Block, Standing::Directory) => {
                return Err(MountError::Invalid(format!(
                    "target_path {target} is a directory, not a file"
                )));
            }
            _ => {}
        }
        let known = staged.targets.contains_key(target.as_path());
        let table = read_table().await?;
        if let Some(mount) = table.at(target.as_path())
            && !known
        {
            let what = format!(
                "{} ({}) is already mounted at target_path {target}",
                mount.source, mount.fs_type
            );
            return Err(MountError::Refused(what));
        }
        self.records
            .change(volume, |record| {
                let staged = record
                    .staged
                    .as_mut()
                    .expect("the guard is held, so the volume is still staged");
                staged.targets.insert(target.as_path().to_owned(), Target { read_only });
            })
            .await?;
        // The staging mount may have died with a device that was replaced since.
        let done = match self.mount(tools, &staged, device).await {
            Ok(()) => self.bind(tools, &staged, target, read_only, device).await,
            Err(error) => Err(error),
        };
        if done.is_err() && !known && read_table().await?.at(target.as_path()).is_none() {
            self.records
                .change(volume, |record| forget_target(&mut record.staged, target.as_path()))
                .await?;
        }
        done
    }

    /// Takes one publication down and removes its mount point. Not being published there is fine.
    pub async fn unpublish(
        &self,
        tools: &Tools,
        target: &KubeletPath,
        device: Option<&Device>,
    ) -> Result<(), MountError> {
        let volume = tools.volume();
        let table = read_table().await?;
        let known = self
            .records
            .staged(volume)
            .is_some_and(|staged| staged.targets.contains_key(target.as_path()));
        if known {
            self.take_down(tools, target.as_path(), device, &table).await?;
        } else {
            self.standing(target).await?;
            self.take_down_unrecorded(tools, target, device, &table).await?;
        }
        if known || table.at(target.as_path()).is_some() {
            mounts::remove_mount_point(target.as_path()).await?;
        }
        self.records
            .change(volume, |record| forget_target(&mut record.staged, target.as_path()))
            .await
    }

    /// The bind mount at `target`: made unless it is there, lives and is as writable as asked.
    pub(super) async fn bind(
        &self,
        tools: &Tools,
        staged: &Staged,
        target: &KubeletPath,
        read_only: bool,
        device: &Device,
    ) -> Result<(), MountError> {
        let table = read_table().await?;
        if bound(staged, target, read_only, device, &table).await? {
            return Ok(());
        }
        if table.at(target.as_path()).is_some() {
            mounts::unmount_lazily(tools, target.as_path()).await?;
        }
        match &staged.kind {
            Kind::Filesystem { .. } => {
                mounts::make_directory(target.as_path()).await?;
                mounts::bind(tools, &staged.path, target.as_path(), read_only).await
            }
            // Binding cannot make a device read-only; the kubelet gives the container a read-only device instead.
            Kind::Block => {
                mounts::make_file(target.as_path()).await?;
                mounts::bind(tools, &device.path, target.as_path(), false).await
            }
        }
    }
}

async fn bound(
    staged: &Staged,
    target: &KubeletPath,
    read_only: bool,
    device: &Device,
    table: &MountTable,
) -> Result<bool, MountError> {
    let Some(mount) = table.at(target.as_path()) else {
        return Ok(false);
    };
    Ok(match &staged.kind {
        Kind::Filesystem { .. } => mount.device == number_of(device).await? && mount.read_only() == read_only,
        Kind::Block => is_node_of(mount, &device.path),
    })
}
