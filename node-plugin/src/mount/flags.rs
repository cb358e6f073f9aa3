//! Mount options that a StorageClass may ask for.
//!
//! An allow-list: `mount` understands options that name files, commands and users of the host, and whoever writes a
//! StorageClass is not always root on the nodes. What is missing here is refused by name, with the list of what exists.

use super::{FsType, MountError};

/// Options of every file system.
const COMMON: &[&str] = &[
    "ro",
    "rw",
    "noatime",
    "relatime",
    "strictatime",
    "nodiratime",
    "lazytime",
    "nolazytime",
    "nosuid",
    "nodev",
    "noexec",
    "sync",
    "dirsync",
    "discard",
    "nodiscard",
];
const EXT4: &[&str] = &[
    "data=ordered",
    "data=journal",
    "errors=remount-ro",
    "auto_da_alloc",
    "noauto_da_alloc",
];
const XFS: &[&str] = &["nouuid", "inode64", "largeio", "nolargeio", "swalloc", "wsync"];
/// Options whose value is a plain number, with an optional k, m or g behind it.
const EXT4_NUMBERS: &[&str] = &["commit", "stripe", "max_batch_time", "min_batch_time"];
const XFS_NUMBERS: &[&str] = &["allocsize", "logbsize", "logbufs"];
/// What the kubelet adds on a node with SELinux.
const CONTEXT: &str = "context";

/// Options that were looked at.
#[derive(Debug, Clone, Default, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub struct MountFlags(Vec<String>);

impl MountFlags {
    /// Each element may hold several options, as in `noatime,discard`.
    pub fn parse<S: AsRef<str>>(fs: FsType, flags: &[S]) -> Result<MountFlags, MountError> {
        let mut kept: Vec<String> = Vec::new();
        for flag in flags.iter().flat_map(|flags| split(flags.as_ref())) {
            if !allowed(fs, &flag) {
                let (own, numbers) = tables(fs);
                let numbers = numbers.iter().map(|name| format!("{name}=<number>"));
                let known: Vec<String> = COMMON.iter().chain(own).map(|s| s.to_string()).chain(numbers).collect();
                let known = known.join(", ");
                return Err(MountError::Invalid(format!(
                    "mount option {flag:?} is not allowed for {fs}; these are: {known}"
                )));
            }
            if !kept.contains(&flag) {
                kept.push(flag);
            }
        }
        Ok(MountFlags(kept))
    }

    /// True when the options ask for a read-only mount.
    pub fn read_only(&self) -> bool {
        self.0
            .iter()
            .rev()
            .find(|flag| *flag == "ro" || *flag == "rw")
            .is_some_and(|flag| flag == "ro")
    }

    /// The argument of `mount -o`: ours first, so that a stated wish comes later and wins; `read_only` last of all.
    pub fn to_option(&self, ours: &[&str], read_only: bool) -> String {
        let wished = self
            .0
            .iter()
            .map(String::as_str)
            .filter(|flag| *flag != "ro" && *flag != "rw");
        let access = if read_only { "ro" } else { "rw" };
        ours.iter()
            .copied()
            .filter(|flag| !self.0.iter().any(|own| own == flag))
            .chain(wished)
            .chain([access])
            .collect::<Vec<_>>()
            .join(",")
    }
}

fn tables(fs: FsType) -> (&'static [&'static str], &'static [&'static str]) {
    match fs {
        FsType::Ext4 => (EXT4, EXT4_NUMBERS),
        FsType::Xfs => (XFS, XFS_NUMBERS),
    }
}

/// Splits at commas outside of quotation marks: SELinux categories contain commas.
fn split(flags: &str) -> Vec<String> {
    let mut parts = vec![String::new()];
    let mut quoted = false;
    for c in flags.chars() {
        match c {
            ',' if !quoted => parts.push(String::new()),
            c => {
                quoted ^= c == '"';
                parts.last_mut().expect("there is always a last part").push(c);
            }
        }
    }
    parts.retain(|part| !part.is_empty());
    parts
}

fn allowed(fs: FsType, flag: &str) -> bool {
    let (own, numbers) = tables(fs);
    if COMMON.contains(&flag) || own.contains(&flag) {
        return true;
    }
    let Some((name, value)) = flag.split_once('=') else {
        return false;
    };
    if name == CONTEXT {
        let inner = value
            .strip_prefix('"')
            .and_then(|value| value.strip_suffix('"'))
            .unwrap_or(value);
        return !inner.is_empty()
            && inner
                .bytes()
                .all(|b| b.is_ascii_alphanumeric() || b"_:.,-".contains(&b));
    }
    let digits = value.strip_suffix(['k', 'm', 'g']).unwrap_or(value);
    numbers.contains(&name) && (1..=12).contains(&digits.len()) && digits.bytes().all(|b| b.is_ascii_digit())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn known_options_pass_and_ours_come_before_them() {
        let flags = MountFlags::parse(FsType::Ext4, &["noatime,commit=30", "data=journal"]).unwrap();
        let option = flags.to_option(&["errors=remount-ro"], false);
        assert_eq!(option, "errors=remount-ro,noatime,commit=30,data=journal,rw");
        assert!(!flags.read_only());
    }

    #[test]
    fn a_read_only_wish_is_heard() {
        let flags = MountFlags::parse(FsType::Xfs, &["ro", "nouuid"]).unwrap();
        assert!(flags.read_only());
        assert_eq!(flags.to_option(&["nouuid"], true), "nouuid,ro");
    }

    #[test]
    fn options_that_could_reach_the_host_are_refused_by_name() {
        for flag in [
            "loop",
            "offset=512",
            "journal_path=/etc/shadow",
            "logdev=/dev/sda",
            "usrquota",
            "commit=x",
            "bind",
            "uid=0",
            "barrier=0",
        ] {
            for fs in [FsType::Ext4, FsType::Xfs] {
                match MountFlags::parse(fs, &[flag]) {
                    Err(MountError::Invalid(text)) => {
                        assert!(text.contains(flag) && text.contains("noatime"), "{text}")
                    }
                    other => panic!("{flag} gave {other:?}"),
                }
            }
        }
        assert!(MountFlags::parse(FsType::Ext4, &["logbufs=8"]).is_err());
    }

    #[test]
    fn a_selinux_context_keeps_its_commas_and_nothing_else() {
        let wish = "context=\"system_u:object_r:container_file_t:s0:c1,c2\"";
        let flags = MountFlags::parse(FsType::Ext4, &[wish, "noatime"]).unwrap();
        assert_eq!(flags.to_option(&[], false), format!("{wish},noatime,rw"));
        assert!(MountFlags::parse(FsType::Ext4, &["context=\"a b\""]).is_err());
    }
}
