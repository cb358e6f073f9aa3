//! Mounting and unmounting our FUSE file systems without ever touching one that may be dead.
//!
//! A `stat` on a FUSE mount whose server hangs does not return. So what is mounted where is read from `mountinfo`, and
//! unmounting is always lazy and never follows a link.

use std::ffi::OsString;
use std::fs::{self, File, OpenOptions};
use std::io;
use std::os::fd::AsRawFd;
use std::os::unix::ffi::OsStringExt;
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};

use nix::mount::{MntFlags, MsFlags, mount, umount2};

use super::buffers::PAYLOAD_BYTES_MAX;

/// The type that our mounts show in `mountinfo`.
const FS_TYPE: &str = "fuse.galleonfs";

/// Opens a connection and mounts it at `target`, an existing directory. The kernel sends its first request at once;
/// this call does not wait for the answer.
pub fn mount_fuse(target: &Path, source: &str, read_only: bool) -> io::Result<File> {
    let dev = OpenOptions::new()
        .read(true)
        .write(true)
        .custom_flags(libc::O_NONBLOCK)
        .open("/dev/fuse")?;
    // No allow_other: nobody but root's loop device has business in there.
    let options = format!(
        "fd={},rootmode=40000,user_id=0,group_id=0,max_read={PAYLOAD_BYTES_MAX}",
        dev.as_raw_fd()
    );
    let mut flags = MsFlags::MS_NOSUID | MsFlags::MS_NODEV | MsFlags::MS_NOEXEC;
    if read_only {
        flags |= MsFlags::MS_RDONLY;
    }
    mount(Some(source), target, Some(FS_TYPE), flags, Some(options.as_str()))?;
    Ok(dev)
}

/// Unmounts everything that is mounted at `target`, at once for new users and later for present ones.
pub fn unmount(target: &Path) {
    unmount_all(target, MntFlags::MNT_DETACH);
}

/// Ends the connections of everything that is mounted at `target`, and unmounts it. Whoever still has something open
/// there gets errors, and our own server gets its slots back, so this is for a device that is down.
pub fn end(target: &Path) {
    // Forcing ends a connection, detaching unmounts whatever is open.
    unmount_all(target, MntFlags::MNT_FORCE | MntFlags::MNT_DETACH);
}

fn unmount_all(target: &Path, flags: MntFlags) {
    // Mounts may lie on top of each other; the bound only stops a surprise from becoming a loop.
    for _ in 0..16 {
        if umount2(target, flags | MntFlags::UMOUNT_NOFOLLOW).is_err() {
            return;
        }
    }
}

/// Our own FUSE mounts at or below `dir`.
pub fn fuse_mounts_below(dir: &Path) -> io::Result<Vec<PathBuf>> {
    Ok(parse(&fs::read("/proc/self/mountinfo")?)
        .filter(|target| target.starts_with(dir))
        .collect())
}

/// Whether nobody serves the file system at `target` any more. May take as long as a living server likes.
pub fn is_dead(target: &Path) -> bool {
    matches!(
        nix::sys::statfs::statfs(target),
        Err(nix::errno::Errno::ENOTCONN | nix::errno::Errno::ECONNABORTED)
    )
}

/// The mount points of our type in the text of a `mountinfo` file.
fn parse(mountinfo: &[u8]) -> impl Iterator<Item = PathBuf> {
    mountinfo.split(|&byte| byte == b'\n').filter_map(|line| {
        let mut fields = line.split(|&byte| byte == b' ');
        let target = fields.nth(4)?;
        // Optional fields end with a lone dash; the type follows it.
        let fs_type = fields.skip_while(|field| *field != b"-").nth(1)?;
        (fs_type == FS_TYPE.as_bytes()).then(|| unescape(target))
    })
}

/// Undoes the octal escapes of `mountinfo`.
fn unescape(field: &[u8]) -> PathBuf {
    let mut bytes = Vec::with_capacity(field.len());
    let mut rest = field;
    while let [first, tail @ ..] = rest {
        let octal = tail
            .get(..3)
            .and_then(|digits| u8::from_str_radix(std::str::from_utf8(digits).ok()?, 8).ok());
        match (first, octal) {
            (b'\\', Some(byte)) => {
                bytes.push(byte);
                rest = &tail[3..];
            }
            _ => {
                bytes.push(*first);
                rest = tail;
            }
        }
    }
    OsString::from_vec(bytes).into()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn our_mounts_are_found_in_mountinfo_whatever_their_names_hold() {
        let text = b"36 35 98:0 / /mnt rw,noatime master:1 - ext3 /dev/root rw\n\
            40 35 0:50 / /run/a\\040b/vol rw shared:7 - fuse.galleonfs galleonfs:vol rw,user_id=0\n\
            41 35 0:51 / /run/plain rw - fuse.galleonfs x rw\n\
            42 35 0:52 / /run/other rw - fuse.sshfs x rw\n";
        let found: Vec<_> = parse(text).collect();
        assert_eq!(found, [PathBuf::from("/run/a b/vol"), PathBuf::from("/run/plain")]);
    }
}
