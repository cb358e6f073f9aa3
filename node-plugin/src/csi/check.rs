//! Requests, checked once: a raw capability becomes a [`Wish`] that the rest can rely on.

use std::collections::BTreeMap;

use galleonfs_csi_proto::csi::VolumeCapability;
use galleonfs_csi_proto::csi::volume_capability::AccessType;
use galleonfs_csi_proto::csi::volume_capability::access_mode::Mode;

use crate::mount::MountError;
use crate::mount::flags::MountFlags;
use crate::state::{Access, Kind};

/// The CSI limit for a map.
const MAP_BYTES_MAX: usize = 4096;

/// How the volume is to be used.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Wish {
    pub kind: Kind,
    /// The caller said which file system.
    pub names_fs: bool,
    pub access: Access,
    pub read_only: bool,
}

/// Looks at a capability. `fs_default` is what an empty file system type means; empty itself, it means ext4.
pub fn capability(capability: Option<&VolumeCapability>, fs_default: &str) -> Result<Wish, MountError> {
    let invalid = |text: &str| Err(MountError::Invalid(text.to_owned()));
    let Some(capability) = capability else {
        return invalid("volume_capability is missing");
    };
    let kind = match &capability.access_type {
        None => return invalid("volume_capability.access_type is missing: it is block or mount"),
        Some(AccessType::Block(_)) => Kind::Block,
        Some(AccessType::Mount(mount)) => {
            if !mount.volume_mount_group.is_empty() {
                return invalid("volume_mount_group is not supported: the kubelet applies fsGroup");
            }
            let fs = if mount.fs_type.is_empty() {
                fs_default
            } else {
                &mount.fs_type
            };
            let fs = fs.parse()?;
            Kind::Filesystem {
                fs,
                flags: MountFlags::parse(fs, &mount.mount_flags)?,
            }
        }
    };
    let Some(mode) = capability.access_mode else {
        return invalid("volume_capability.access_mode is missing");
    };
    let access = match Mode::try_from(mode.mode) {
        Ok(Mode::SingleNodeSingleWriter) => Access::SingleWriter,
        // The older mode does not say how many pods of the node may write; all may, as with ReadWriteOnce.
        Ok(Mode::SingleNodeWriter | Mode::SingleNodeMultiWriter) => Access::MultiWriter,
        Ok(Mode::SingleNodeReaderOnly) => Access::ReadOnly,
        Ok(mode @ (Mode::MultiNodeReaderOnly | Mode::MultiNodeSingleWriter | Mode::MultiNodeMultiWriter)) => {
            return Err(MountError::Invalid(format!(
                "access mode {} is not supported: a volume is attached to one node",
                mode.as_str_name()
            )));
        }
        Ok(Mode::Unknown) | Err(_) => return invalid("volume_capability.access_mode is not a known mode"),
    };
    let flagged = matches!(&kind, Kind::Filesystem { flags, .. } if flags.read_only());
    let names_fs = matches!(&capability.access_type, Some(AccessType::Mount(mount)) if !mount.fs_type.is_empty());
    Ok(Wish {
        kind,
        names_fs,
        access,
        read_only: flagged || access == Access::ReadOnly,
    })
}

/// A map that is not larger than CSI allows.
pub fn map(field: &str, map: &BTreeMap<String, String>) -> Result<(), MountError> {
    let bytes: usize = map.iter().map(|(key, value)| key.len() + value.len()).sum();
    if bytes > MAP_BYTES_MAX {
        return Err(MountError::Invalid(format!(
            "{field} is larger than {MAP_BYTES_MAX} bytes"
        )));
    }
    Ok(())
}

/// Sizes that a caller accepts.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Capacity {
    pub required_bytes: u64,
    pub limit_bytes: Option<u64>,
}

/// Looks at a capacity range; a missing one accepts everything.
pub fn capacity(range: Option<galleonfs_csi_proto::csi::CapacityRange>) -> Result<Capacity, tonic::Status> {
    let range = range.unwrap_or_default();
    let of = |field: &str, bytes: i64| {
        u64::try_from(bytes).map_err(|_| tonic::Status::out_of_range(format!("capacity_range.{field} is negative")))
    };
    let required_bytes = of("required_bytes", range.required_bytes)?;
    let limit_bytes = Some(of("limit_bytes", range.limit_bytes)?).filter(|limit| *limit != 0);
    if let Some(limit) = limit_bytes.filter(|limit| *limit < required_bytes) {
        return Err(tonic::Status::out_of_range(format!(
            "capacity_range asks for at least {required_bytes} and at most {limit} bytes"
        )));
    }
    Ok(Capacity {
        required_bytes,
        limit_bytes,
    })
}
