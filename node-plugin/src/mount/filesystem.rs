//! From a device to a file system that may be mounted: probe, format if blank, check.

use std::fmt;
use std::path::Path;
use std::str::FromStr;
use std::time::Duration;

use super::probe::{Content, probe};
use super::{MountError, Tools};

/// Making a file system writes little (nothing is zeroed twice, nothing discarded), on any size.
const MKFS_DEADLINE: Duration = Duration::from_secs(600);

/// Replaying a journal is short; a full check of a large damaged file system is not. The caller does not wait that long,
/// but the work goes on and its retry finds it done.
const FSCK_DEADLINE: Duration = Duration::from_secs(3600);

/// The file systems we make and mount.
#[derive(Debug, Clone, Copy, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum FsType {
    Ext4,
    Xfs,
}

impl FsType {
    pub fn name(self) -> &'static str {
        match self {
            FsType::Ext4 => "ext4",
            FsType::Xfs => "xfs",
        }
    }

    /// The options we mount with unless the StorageClass says otherwise.
    pub fn default_options(self, device_read_only: bool) -> &'static [&'static str] {
        match (self, device_read_only) {
            // A file system that met an error must not go on writing on top of it.
            (FsType::Ext4, false) => &["errors=remount-ro"],
            // Without `noload` and `norecovery` the journal would be replayed onto a device that refuses writes.
            (FsType::Ext4, true) => &["errors=remount-ro", "noload"],
            // The UUID may still be mounted: by a dead predecessor of this mount that a pod holds, or by a clone.
            (FsType::Xfs, false) => &["nouuid"],
            (FsType::Xfs, true) => &["nouuid", "norecovery"],
        }
    }
}

impl fmt::Display for FsType {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

impl FromStr for FsType {
    type Err = MountError;

    /// The empty name is ext4: the default of the StorageClasses.
    fn from_str(name: &str) -> Result<FsType, MountError> {
        match name {
            "" | "ext4" => Ok(FsType::Ext4),
            "xfs" => Ok(FsType::Xfs),
            other => Err(MountError::Invalid(format!(
                "file system {other:?} is not supported; these are: ext4, xfs"
            ))),
        }
    }
}

/// What has to happen before the mount.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Preparation {
    Format,
    Check,
}

/// Decides. `unfinished` is set when we ourselves began to format this very volume and never finished: what is on it
/// then is our own half-made file system, which nobody has ever mounted.
pub fn decide(content: &Content, wanted: FsType, read_only: bool, unfinished: bool) -> Result<Preparation, MountError> {
    match content {
        _ if unfinished && !read_only => Ok(Preparation::Format),
        Content::Known(found) if *found == wanted => Ok(Preparation::Check),
        Content::Known(found) => Err(MountError::Refused(format!(
            "the volume carries {found}, but {wanted} was asked for: it is not formatted over. Use a StorageClass with \
             fsType {found}, or a new volume"
        ))),
        Content::Blank if read_only => Err(MountError::Refused(format!(
            "the volume is blank and read-only, so no {wanted} can be made on it: mount it writable once"
        ))),
        Content::Blank => Ok(Preparation::Format),
        Content::Foreign(what) => Err(MountError::Refused(format!(
            "the volume carries {what}, which is not {wanted}: it is not formatted over. Use it as a raw block volume to \
             look at it, or use a new volume"
        ))),
    }
}

/// Looks and decides.
pub async fn inspect(
    tools: &Tools,
    device: &Path,
    size_bytes: u64,
    wanted: FsType,
    read_only: bool,
    unfinished: bool,
) -> Result<Preparation, MountError> {
    decide(&probe(tools, device, size_bytes).await?, wanted, read_only, unfinished)
}

/// Makes the file system. The caller has recorded durably that it does, and records that it is done before the first mount.
pub async fn format(tools: &Tools, device: &Path, fs: FsType) -> Result<(), MountError> {
    let (program, args): (&str, &[&str]) = match fs {
        // -F: a whole device is what we mean. -m0: no blocks kept back for root, a volume has one tenant.
        // lazy_itable_init: the kernel zeroes the inode tables later; through us that is a tombstone, not data.
        // nodiscard (and -K below): the device is blank and thin, so there is nothing to give back, and discarding
        // all of it would only write tombstones for every block.
        FsType::Ext4 => ("mkfs.ext4", &["-q", "-F", "-m0", "-E", "lazy_itable_init=1,nodiscard"]),
        // -f: what an interrupted attempt of ours left is ours to overwrite.
        FsType::Xfs => ("mkfs.xfs", &["-q", "-f", "-K"]),
    };
    let args = args.iter().map(|arg| arg.as_ref()).chain([device.as_os_str()]);
    tools.run(program, args, MKFS_DEADLINE).await?.success().map(drop)
}

/// Checks what must be checked before a mount. XFS does it by itself: the mount replays its log and verifies what it
/// reads, and `xfs_repair` is a decision for a person.
pub async fn check(tools: &Tools, device: &Path, fs: FsType) -> Result<(), MountError> {
    if fs == FsType::Xfs {
        return Ok(());
    }
    let checked = tools
        .run("e2fsck", ["-p".as_ref(), device.as_os_str()], FSCK_DEADLINE)
        .await?;
    match fsck_verdict(checked.code) {
        FsckVerdict::Clean => Ok(()),
        FsckVerdict::Damaged => Err(MountError::Refused(format!(
            "the file system is damaged and e2fsck -p does not repair it by itself: {}. Nothing was changed that a person \
             should decide; run `e2fsck -f {}` on this node, or restore the volume",
            checked.said(),
            device.display()
        ))),
        FsckVerdict::NotChecked => Err(checked.failure()),
    }
}

#[derive(Debug, PartialEq, Eq)]
enum FsckVerdict {
    Clean,
    Damaged,
    NotChecked,
}

/// The exit code of e2fsck is a set of bits: 1 corrected, 2 corrected and (only for a mounted root) reboot, 4 left
/// uncorrected, 8 and above: the check itself went wrong.
fn fsck_verdict(code: i32) -> FsckVerdict {
    match code {
        0..=3 => FsckVerdict::Clean,
        4..=7 => FsckVerdict::Damaged,
        _ => FsckVerdict::NotChecked,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_a_blank_device_is_formatted() {
        use FsType::{Ext4, Xfs};
        assert_eq!(
            decide(&Content::Blank, Ext4, false, false).unwrap(),
            Preparation::Format
        );
        assert_eq!(
            decide(&Content::Known(Ext4), Ext4, false, false).unwrap(),
            Preparation::Check
        );
        assert_eq!(
            decide(&Content::Known(Xfs), Xfs, true, false).unwrap(),
            Preparation::Check
        );
        for (content, wanted, read_only) in [
            (Content::Known(Xfs), Ext4, false),
            (Content::Known(Ext4), Xfs, false),
            (Content::Foreign("a partition table of type gpt".into()), Ext4, false),
            (Content::Foreign("data".into()), Xfs, true),
            (Content::Blank, Ext4, true),
        ] {
            let refused = decide(&content, wanted, read_only, false);
            assert!(
                matches!(refused, Err(MountError::Refused(_))),
                "{content:?} {wanted} gave {refused:?}"
            );
        }
    }

    #[test]
    fn our_own_unfinished_format_is_done_again() {
        let half = Content::Foreign("data that no known format explains".into());
        assert_eq!(decide(&half, FsType::Ext4, false, true).unwrap(), Preparation::Format);
        assert_eq!(
            decide(&Content::Known(FsType::Ext4), FsType::Ext4, false, true).unwrap(),
            Preparation::Format
        );
        assert!(decide(&half, FsType::Ext4, true, true).is_err());
    }

    #[test]
    fn exit_codes_of_e2fsck_are_told_apart() {
        assert_eq!([0, 1, 2, 3].map(fsck_verdict), [const { FsckVerdict::Clean }; 4]);
        assert_eq!([4, 5, 6].map(fsck_verdict), [const { FsckVerdict::Damaged }; 3]);
        assert_eq!(
            [8, 12, 16, 137].map(fsck_verdict),
            [const { FsckVerdict::NotChecked }; 4]
        );
    }

    #[test]
    fn file_systems_that_we_do_not_make_are_refused_with_the_list() {
        assert_eq!("".parse::<FsType>().unwrap(), FsType::Ext4);
        assert!("btrfs".parse::<FsType>().unwrap_err().to_string().contains("ext4, xfs"));
    }
}
