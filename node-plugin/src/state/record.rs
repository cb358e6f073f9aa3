//! One volume's record.

use std::collections::BTreeMap;
use std::path::PathBuf;

use serde::{Deserialize, Serialize};

use crate::mount::FsType;
use crate::mount::flags::MountFlags;

const VERSION: u32 = 1;

/// What this node must not forget about a volume.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct Record {
    version: u32,
    /// The volume's uid, so that a later volume of the same name inherits nothing.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub volume_uid: Option<String>,
    /// Set durably before formatting begins and cleared before the first mount: while it is set, what is on the device
    /// is our own half-made file system, and formatting again loses nothing.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub formatting: Option<FsType>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub staged: Option<Staged>,
}

/// How a volume is staged, and where it is published.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct Staged {
    pub path: PathBuf,
    pub kind: Kind,
    pub access: Access,
    pub read_only: bool,
    #[serde(default)]
    pub targets: BTreeMap<PathBuf, Target>,
}

impl Staged {
    /// True when both were asked for in the same way; targets do not matter.
    pub fn same_request(&self, other: &Staged) -> bool {
        let Staged {
            path,
            kind,
            access,
            read_only,
            targets: _,
        } = self;
        (path, kind, access, read_only) == (&other.path, &other.kind, &other.access, &other.read_only)
    }
}

/// What pods see.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub enum Kind {
    Block,
    Filesystem { fs: FsType, flags: MountFlags },
}

/// Who may use the volume at once, on this one node.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub enum Access {
    /// One target only.
    SingleWriter,
    /// Any number of pods of this node.
    MultiWriter,
    ReadOnly,
}

/// One place where a pod sees the volume.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct Target {
    pub read_only: bool,
}

impl Default for Record {
    fn default() -> Record {
        Record {
            version: VERSION,
            volume_uid: None,
            formatting: None,
            staged: None,
        }
    }
}

impl Record {
    /// True when there is nothing to remember.
    pub fn is_empty(&self) -> bool {
        self.formatting.is_none() && self.staged.is_none()
    }

    pub(super) fn check_version(&self) -> Result<(), String> {
        match self.version {
            VERSION => Ok(()),
            other => Err(format!(
                "it is of version {other}, and this release reads version {VERSION}"
            )),
        }
    }
}
