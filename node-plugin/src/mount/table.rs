//! The mount table of this process: `/proc/self/mountinfo`, parsed.
//!
//! Reading it touches no mounted file system, so it is the one safe way to ask what is mounted where when what is
//! mounted may be dead.

use std::ffi::OsString;
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::path::{Path, PathBuf};

use super::MountError;

/// One line of the table.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Mount {
    /// The mounted file system's device number, `(major, minor)`: for ext4 and xfs, that of the volume's device.
    pub device: (u32, u32),
    /// Which part of that file system is mounted: `/` or, for a bind mount, the path inside it.
    pub root: PathBuf,
    /// Where it is mounted.
    pub target: PathBuf,
    /// Per-mount options, as in `rw,relatime`.
    pub options: String,
    pub fs_type: String,
    pub source: String,
}

impl Mount {
    /// True when this mount refuses writes, whatever the file system below says.
    pub fn read_only(&self) -> bool {
        self.options.split(',').any(|option| option == "ro")
    }
}

/// All mounts, bottom first.
#[derive(Debug, Default)]
pub struct MountTable(Vec<Mount>);

impl MountTable {
    /// The table as it is now.
    pub fn read() -> Result<MountTable, MountError> {
        let bytes = std::fs::read("/proc/self/mountinfo").map_err(MountError::io("reading /proc/self/mountinfo"))?;
        Ok(MountTable::parse(&bytes))
    }

    /// Lines that do not look like the documented format are skipped: a later kernel may add some.
    pub fn parse(bytes: &[u8]) -> MountTable {
        MountTable(bytes.split(|&b| b == b'\n').filter_map(parse_line).collect())
    }

    /// What a path lookup of `target` ends in: the mount last made there.
    pub fn at(&self, target: &Path) -> Option<&Mount> {
        self.0.iter().rev().find(|mount| mount.target == target)
    }

    /// How many mounts lie upon each other at `target`.
    pub fn depth(&self, target: &Path) -> usize {
        self.0.iter().filter(|mount| mount.target == target).count()
    }

    /// Every mount of the file system on this device.
    pub fn of_device(&self, device: (u32, u32)) -> impl Iterator<Item = &Mount> {
        self.0.iter().filter(move |mount| mount.device == device)
    }
}

/// `36 35 98:0 /root /target rw,noatime shared:1 - ext4 /dev/loop0 rw,errors=continue`
fn parse_line(line: &[u8]) -> Option<Mount> {
    let mut fields = line.split(|&b| b == b' ').filter(|field| !field.is_empty());
    let (major, minor) = std::str::from_utf8(fields.by_ref().nth(2)?).ok()?.split_once(':')?;
    let device = (major.parse().ok()?, minor.parse().ok()?);
    let root = PathBuf::from(unescape(fields.next()?));
    let target = PathBuf::from(unescape(fields.next()?));
    let options = String::from_utf8_lossy(fields.next()?).into_owned();
    fields.by_ref().find(|field| *field == b"-")?;
    let fs_type = String::from_utf8_lossy(fields.next()?).into_owned();
    let source = unescape(fields.next().unwrap_or_default())
        .to_string_lossy()
        .into_owned();
    Some(Mount {
        device,
        root,
        target,
        options,
        fs_type,
        source,
    })
}

/// The kernel writes space, tab, newline and backslash as `\ooo`.
fn unescape(field: &[u8]) -> OsString {
    let mut out = Vec::with_capacity(field.len());
    let mut rest = field;
    while let Some((&first, tail)) = rest.split_first() {
        let octal = tail
            .get(..3)
            .filter(|digits| first == b'\\' && digits.iter().all(|d| (b'0'..=b'7').contains(d)));
        match octal {
            Some(digits) => {
                out.push(
                    digits
                        .iter()
                        .fold(0u8, |value, digit| value.wrapping_mul(8).wrapping_add(digit - b'0')),
                );
                rest = &tail[3..];
            }
            None => {
                out.push(first);
                rest = tail;
            }
        }
    }
    OsString::from_vec(out)
}

/// The device number behind a device node. Touches only the node, not the device.
pub fn device_number(path: &Path) -> Result<(u32, u32), MountError> {
    use std::os::unix::fs::{FileTypeExt, MetadataExt};
    let doing = || format!("looking at {}", path.display());
    let meta = std::fs::symlink_metadata(path).map_err(|source| MountError::Io { doing: doing(), source })?;
    if !meta.file_type().is_block_device() {
        return Err(MountError::Refused(format!("{} is not a block device", path.display())));
    }
    Ok((
        nix::sys::stat::major(meta.rdev()) as u32,
        nix::sys::stat::minor(meta.rdev()) as u32,
    ))
}

/// True when `mount` is the device node `device` bound onto a file, as a raw block volume is published.
pub fn is_node_of(mount: &Mount, device: &Path) -> bool {
    let name = |path: &Path| path.file_name().map(|name| name.as_bytes().to_owned());
    matches!(mount.fs_type.as_str(), "devtmpfs" | "tmpfs") && name(&mount.root) == name(device)
}

#[cfg(test)]
mod tests {
    use super::*;

    const TABLE: &[u8] = b"\
22 28 0:21 / /proc rw,nosuid,relatime shared:5 - proc proc rw\n\
40 28 7:3 / /var/lib/kubelet/a\\040b rw,noatime shared:1 master:2 - ext4 /dev/loop3 rw,errors=remount-ro\n\
41 28 7:3 / /var/lib/kubelet/pods/p ro,relatime - ext4 /dev/loop3 rw\n\
42 28 0:5 /loop4 /var/lib/kubelet/block rw - devtmpfs devtmpfs rw\n\
nonsense\n\
43 28 7:9 / /var/lib/kubelet/pods/p rw - xfs /dev/loop9 rw\n";

    #[test]
    fn escaped_paths_and_optional_fields_are_understood() {
        let table = MountTable::parse(TABLE);
        let mount = table.at(Path::new("/var/lib/kubelet/a b")).unwrap();
        assert_eq!(
            (mount.device, mount.fs_type.as_str(), mount.read_only()),
            ((7, 3), "ext4", false)
        );
    }

    #[test]
    fn the_last_mount_on_a_path_is_the_one_that_counts() {
        let table = MountTable::parse(TABLE);
        let target = Path::new("/var/lib/kubelet/pods/p");
        assert_eq!(table.at(target).unwrap().device, (7, 9));
        assert_eq!(table.depth(target), 2);
        assert_eq!(table.of_device((7, 3)).count(), 2);
    }

    #[test]
    fn a_bound_device_node_is_recognised_by_its_name() {
        let table = MountTable::parse(TABLE);
        let mount = table.at(Path::new("/var/lib/kubelet/block")).unwrap();
        assert!(is_node_of(mount, Path::new("/dev/loop4")));
        assert!(!is_node_of(mount, Path::new("/dev/loop5")));
    }

    #[test]
    fn our_own_table_can_be_read() {
        assert!(MountTable::read().unwrap().at(Path::new("/proc")).is_some());
    }

    #[test]
    fn a_file_is_not_a_device() {
        assert!(matches!(
            device_number(Path::new("/proc/self/status")),
            Err(MountError::Refused(_))
        ));
    }
}
