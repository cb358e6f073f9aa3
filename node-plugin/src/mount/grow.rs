//! Growing a mounted file system to its device, when there is something to grow.
//!
//! Whether there is, the superblock tells: it is read from the device, which costs one block, where starting the growing
//! tool at every mount would cost a process and, for ext4, a lock on the file system.

use std::path::Path;
use std::sync::LazyLock;
use std::time::Duration;

use super::{FsType, MountError, Tools};

/// ext4 writes group descriptors for all that is new.
const GROW_DEADLINE: Duration = Duration::from_secs(3600);
const READ_DEADLINE: Duration = Duration::from_secs(60);

/// How much of the device's end a file system may leave unused: ext4 drops a last group too small to hold its tables,
/// xfs a last allocation group below its minimum.
const SLACK_BYTES: u64 = 16 << 20;

/// Grows the file system of `device`, mounted writable at `target`, to fill the device. True when something was done.
pub async fn grow_mounted(
    tools: &Tools,
    device: &Path,
    device_bytes: u64,
    target: &Path,
    fs: FsType,
) -> Result<bool, MountError> {
    if !is_smaller(tools, device, device_bytes, fs).await? {
        return Ok(false);
    }
    if !can_grow_mounted(fs) {
        return Err(MountError::Refused(format!(
            "a mounted {fs} can only be grown by a process with CAP_SYS_RESOURCE, which this node plugin was not given. \
             The device has its new size already; the file system follows when no pod uses the volume and the next one starts"
        )));
    }
    let finished = match fs {
        FsType::Ext4 => tools.run("resize2fs", [device], GROW_DEADLINE).await?,
        FsType::Xfs => {
            tools
                .run("xfs_growfs", ["-d".as_ref(), target.as_os_str()], GROW_DEADLINE)
                .await?
        }
    };
    finished.success().map(|_| true)
}

/// Grows the file system of a device that is not mounted, where that is the only time at which we may.
pub async fn grow_unmounted(tools: &Tools, device: &Path, device_bytes: u64, fs: FsType) -> Result<(), MountError> {
    if can_grow_mounted(fs) || !is_smaller(tools, device, device_bytes, fs).await? {
        return Ok(());
    }
    // resize2fs insists on a full check of a file system that it changes offline.
    let checked = tools
        .run(
            "e2fsck",
            ["-f".as_ref(), "-p".as_ref(), device.as_os_str()],
            GROW_DEADLINE,
        )
        .await?;
    if checked.code >= 4 {
        return Err(checked.failure());
    }
    tools
        .run("resize2fs", [device], GROW_DEADLINE)
        .await?
        .success()
        .map(drop)
}

/// ext4 asks for CAP_SYS_RESOURCE (a privileged container has it, unless its node took it away); xfs is content with what
/// a mount needs.
fn can_grow_mounted(fs: FsType) -> bool {
    const CAP_SYS_RESOURCE: u32 = 24;
    static HELD: LazyLock<bool> = LazyLock::new(|| {
        let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
        let effective = status.lines().find_map(|line| line.strip_prefix("CapEff:"));
        effective
            .and_then(|set| u64::from_str_radix(set.trim(), 16).ok())
            .is_some_and(|set| set >> CAP_SYS_RESOURCE & 1 == 1)
    });
    fs == FsType::Xfs || *HELD
}

async fn is_smaller(tools: &Tools, device: &Path, device_bytes: u64, fs: FsType) -> Result<bool, MountError> {
    Ok(device_bytes.saturating_sub(size_bytes(tools, device, fs).await?) >= SLACK_BYTES)
}

/// The size that the superblock on `device` states.
async fn size_bytes(tools: &Tools, device: &Path, fs: FsType) -> Result<u64, MountError> {
    let mut input = std::ffi::OsString::from("if=");
    input.push(device);
    let args = [input, "bs=4096".into(), "count=1".into(), "status=none".into()];
    let block = tools.run("dd", args, READ_DEADLINE).await?.success()?;
    parse(&block, fs).ok_or_else(|| MountError::Refused(format!("{} carries no {fs} superblock", device.display())))
}

fn parse(block: &[u8], fs: FsType) -> Option<u64> {
    let bytes = |at: usize| block.get(at..at + 4)?.try_into().ok();
    match fs {
        FsType::Ext4 => {
            // The superblock starts at byte 1024; little-endian.
            if block.get(1024 + 0x38..1024 + 0x3a)? != [0x53, 0xef] {
                return None;
            }
            let word = |at: usize| bytes(1024 + at).map(u32::from_le_bytes);
            // The high half of the block count is only meaningful with the feature "64bit".
            let high = if word(0x60)? & 0x80 != 0 { word(0x150)? } else { 0 };
            let blocks = (u64::from(high) << 32) | u64::from(word(0x4)?);
            blocks.checked_mul(1024u64.checked_shl(word(0x18)?)?)
        }
        FsType::Xfs => {
            // Big-endian, from byte 0.
            if block.get(..4)? != b"XFSB" {
                return None;
            }
            let word = |at: usize| bytes(at).map(u32::from_be_bytes);
            let blocks = (u64::from(word(8)?) << 32) | u64::from(word(12)?);
            blocks.checked_mul(u64::from(word(4)?))
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn the_size_in_the_superblock_is_the_size_of_the_file_system() {
        let dir = crate::testing::temp_dir("grow");
        let tools = super::super::HungChildren::default().tools("v");
        for (fs, program, size) in [
            (FsType::Ext4, "mkfs.ext4", 32 << 20),
            (FsType::Ext4, "mkfs.ext4", 8 << 20),
            (FsType::Xfs, "mkfs.xfs", 320 << 20),
        ] {
            let path = dir.path().join(format!("{fs}-{size}"));
            std::fs::File::create(&path).unwrap().set_len(size).unwrap();
            std::process::Command::new(program)
                .arg("-q")
                .arg(&path)
                .output()
                .unwrap();
            assert_eq!(size_bytes(&tools, &path, fs).await.unwrap(), size, "{fs}");
        }
    }

    #[test]
    fn a_block_without_a_superblock_has_no_size() {
        assert_eq!(parse(&[0; 4096], FsType::Ext4), None);
        assert_eq!(parse(&[0; 4096], FsType::Xfs), None);
        assert_eq!(parse(b"XFSB", FsType::Xfs), None);
    }
}
