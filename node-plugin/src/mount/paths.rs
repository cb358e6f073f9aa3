//! Paths that a caller gave us, checked once.
//!
//! The kubelet tells us where to mount, and we are root on the node: a path that escapes the kubelet's directory, through
//! `..` or a symbolic link, would let a caller mount over anything. A [`KubeletPath`] is the proof that a path was looked at.

use std::fmt;
use std::io::ErrorKind;
use std::os::unix::ffi::OsStrExt;
use std::path::{Component, Path, PathBuf};

use super::MountError;
use super::table::MountTable;

/// `PATH_MAX` of Linux, without its terminating zero.
const PATH_BYTES_MAX: usize = 4095;

/// The kubelet's directory, and the part of it that is ours and therefore no mount target.
#[derive(Debug, Clone)]
pub struct Kubelet {
    root: PathBuf,
    reserved: PathBuf,
}

/// An absolute, normal path strictly below the kubelet's directory, outside of our own.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct KubeletPath(PathBuf);

impl KubeletPath {
    pub fn as_path(&self) -> &Path {
        &self.0
    }
}

impl fmt::Display for KubeletPath {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.display().fmt(f)
    }
}

/// What stands at a path.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Standing {
    /// Something is mounted there, and was not looked at.
    Mounted,
    Nothing,
    Directory,
    File,
}

impl Kubelet {
    /// `root` is the kubelet's directory as the kubelet names it; `reserved` is where our socket and records live.
    pub fn new(root: PathBuf, reserved: PathBuf) -> Kubelet {
        Kubelet { root, reserved }
    }

    /// Checks the text of a path. Touches nothing.
    pub fn check(&self, field: &str, path: &str) -> Result<KubeletPath, MountError> {
        let refuse = |why: String| Err(MountError::Invalid(format!("{field} {path:?} {why}")));
        if path.is_empty() {
            return Err(MountError::Invalid(format!("{field} is missing")));
        }
        if path.contains('\0') {
            return refuse("contains a zero byte".into());
        }
        if path.len() > PATH_BYTES_MAX {
            return Err(MountError::Invalid(format!(
                "{field} is longer than {PATH_BYTES_MAX} bytes"
            )));
        }
        let path_buf = Path::new(path);
        if !path_buf.is_absolute() {
            return refuse("is not absolute".into());
        }
        // `components` drops `.` in the middle and doubled slashes; a caller that means well sends neither.
        if path.split('/').any(|part| part == "." || part == "..") {
            return refuse("contains . or ..".into());
        }
        let normal: PathBuf = path_buf.components().collect();
        match normal.strip_prefix(&self.root) {
            Ok(below) if below.as_os_str().is_empty() => refuse("is the kubelet's directory itself".into()),
            Ok(_) if normal.starts_with(&self.reserved) => refuse("belongs to this plugin".into()),
            Ok(_) => Ok(KubeletPath(normal)),
            Err(_) => refuse(format!("is outside of the kubelet's directory {}", self.root.display())),
        }
    }

    /// Looks at the path itself, component by component from the kubelet's directory down: none may be a symbolic
    /// link. Where something is mounted at the end, we do not look at it (it may be dead) and a mount point is no link.
    pub fn inspect(&self, path: &KubeletPath, table: &MountTable) -> Result<Standing, MountError> {
        let below = path
            .0
            .strip_prefix(&self.root)
            .expect("a KubeletPath is below the kubelet's directory");
        let mut at = self.root.clone();
        let mut standing = Standing::Directory;
        for part in below.components() {
            let Component::Normal(name) = part else {
                unreachable!("a KubeletPath has only normal components")
            };
            at.push(name);
            if table.at(&at).is_some() {
                standing = Standing::Mounted;
                continue;
            }
            let meta = match std::fs::symlink_metadata(&at) {
                Ok(meta) => meta,
                Err(error) if error.kind() == ErrorKind::NotFound => return Ok(Standing::Nothing),
                Err(error) => return Err(MountError::io(format!("looking at {}", at.display()))(error)),
            };
            standing = if meta.is_symlink() {
                let what = format!("{} is a symbolic link: refusing to go through it", at.display());
                return Err(MountError::Invalid(what));
            } else if meta.is_dir() {
                Standing::Directory
            } else {
                Standing::File
            };
        }
        Ok(standing)
    }
}

/// The CSI limit for a string without another limit of its own.
const ID_BYTES_MAX: usize = 128;

/// An identifier from a request that is safe to print and to look up. It is never used as a path as it is.
pub fn check_id(field: &str, id: &str) -> Result<(), MountError> {
    if id.is_empty() {
        return Err(MountError::Invalid(format!("{field} is missing")));
    }
    if id.len() > ID_BYTES_MAX {
        return Err(MountError::Invalid(format!(
            "{field} is longer than {ID_BYTES_MAX} bytes"
        )));
    }
    let bad = |b: u8| b.is_ascii_control() || b == b'/';
    if Path::new(id).as_os_str().as_bytes().iter().copied().any(bad) || id == "." || id == ".." {
        return Err(MountError::Invalid(format!("{field} {id:?} is not an identifier")));
    }
    Ok(())
}

/// True for a name that can be an object's: lower-case letters, digits and dashes, at most 63 characters. Only such a
/// name is used as a file name.
pub fn is_object_name(id: &str) -> bool {
    let edge = |b: u8| b.is_ascii_lowercase() || b.is_ascii_digit();
    let bytes = id.as_bytes();
    (1..=63).contains(&bytes.len())
        && edge(bytes[0])
        && edge(bytes[bytes.len() - 1])
        && bytes.iter().all(|&b| edge(b) || b == b'-')
}

#[cfg(test)]
mod tests {
    use super::*;

    fn kubelet() -> Kubelet {
        Kubelet::new(
            "/var/lib/kubelet".into(),
            "/var/lib/kubelet/plugins/csi.galleonfs.io".into(),
        )
    }

    fn why(path: &str) -> String {
        match kubelet().check("target_path", path) {
            Err(MountError::Invalid(text)) => text,
            other => panic!("{path:?} gave {other:?}"),
        }
    }

    #[test]
    fn paths_that_leave_the_kubelet_directory_are_refused_with_the_reason() {
        assert!(why("").contains("missing"));
        assert!(why("pods/x").contains("not absolute"));
        assert!(why("/var/lib/kubelet/pods/../../../etc").contains(".."));
        assert!(why("/var/lib/kubelet/./x").contains("."));
        assert!(why("/var/lib/kubelet").contains("itself"));
        assert!(why("/var/lib/kubelet/").contains("itself"));
        assert!(why("/etc").contains("outside"));
        assert!(why("/var/lib/kubelet-other/x").contains("outside"));
        assert!(why("/var/lib/kubelet/a\0b").contains("zero byte"));
        assert!(why("/var/lib/kubelet/plugins/csi.galleonfs.io/state/x").contains("belongs to this plugin"));
        assert!(why(&format!("/var/lib/kubelet/{}", "x".repeat(5000))).contains("longer"));
    }

    #[test]
    fn a_normal_path_is_taken_without_its_doubled_slashes() {
        let path = kubelet().check("target_path", "/var/lib/kubelet//pods/x/").unwrap();
        assert_eq!(path.as_path(), Path::new("/var/lib/kubelet/pods/x"));
    }

    #[test]
    fn a_symbolic_link_anywhere_below_the_kubelet_directory_is_refused() {
        let dir = crate::testing::temp_dir("paths");
        let kubelet = Kubelet::new(dir.path().into(), dir.path().join("own"));
        std::fs::create_dir(dir.path().join("real")).unwrap();
        std::fs::write(dir.path().join("real/file"), b"").unwrap();
        std::os::unix::fs::symlink("real", dir.path().join("link")).unwrap();
        let inspect = |path: &str| {
            let path = kubelet.check("p", dir.path().join(path).to_str().unwrap()).unwrap();
            kubelet.inspect(&path, &MountTable::default())
        };
        assert_eq!(inspect("real").unwrap(), Standing::Directory);
        assert_eq!(inspect("real/file").unwrap(), Standing::File);
        assert_eq!(inspect("real/none").unwrap(), Standing::Nothing);
        assert_eq!(inspect("none/none").unwrap(), Standing::Nothing);
        for path in ["link", "link/file", "link/none"] {
            assert!(matches!(inspect(path), Err(MountError::Invalid(_))), "{path}");
        }
    }

    #[test]
    fn identifiers_with_slashes_zeros_or_too_many_bytes_are_refused() {
        for id in ["", "a/b", "a\0b", "..", "a\nb", &"x".repeat(129)] {
            assert!(
                matches!(check_id("volume_id", id), Err(MountError::Invalid(_))),
                "{id:?}"
            );
        }
        check_id("volume_id", "pvc-1").unwrap();
        assert!(is_object_name("pvc-1") && !is_object_name("Pvc") && !is_object_name("-a") && !is_object_name("a.b"));
    }
}
