//! Whether a repeated request is the same request.
//!
//! CSI asks by name: the same name with the same wishes finds the first one's volume, with other wishes it is refused.

use galleonfs_api::{AttachTo, GalleonReplica, GalleonVolume};
use kube::ResourceExt;

use super::request::Create;
use crate::error::{Error, Kind, Result};

fn differs(volume: &GalleonVolume, what: String) -> Error {
    Error::new(
        Kind::Exists,
        format!("volume {} exists already and {what}", volume.name_any()),
    )
}

/// Refuses a request whose name stands for a volume that is not what the request asks for.
pub fn volume(existing: &GalleonVolume, create: &Create) -> Result<()> {
    let spec = &existing.spec;
    if spec.csi_name != create.csi_name {
        return Err(differs(existing, format!("was made for the name {:?}", spec.csi_name)));
    }
    if !create.range.contains(spec.size_bytes) {
        let (required, limit) = (create.range.required_bytes, create.range.limit_bytes);
        let asked = match limit {
            0 => format!("at least {required}"),
            limit => format!("{required} to {limit}"),
        };
        return Err(differs(
            existing,
            format!("has {} bytes; {asked} were asked for", spec.size_bytes),
        ));
    }
    if spec.parameters != *create.class.normal() {
        let (had, asked) = (&spec.parameters, create.class.normal());
        return Err(differs(
            existing,
            format!("has the parameters {had:?}; asked for: {asked:?}"),
        ));
    }
    if spec.capability != create.capability {
        let (had, asked) = (&spec.capability, &create.capability);
        return Err(differs(
            existing,
            format!(
                "is {:?} {:?}; asked for: {:?} {:?}",
                had.mode, had.fs_type, asked.mode, asked.fs_type
            ),
        ));
    }
    Ok(())
}

/// Refuses a request whose volume is settled on a node that the request does not allow.
pub fn place(existing: &GalleonVolume, replica: &GalleonReplica, create: &Create) -> Result<()> {
    match create.topology.allows(&replica.spec.node_name) {
        true => Ok(()),
        false => Err(differs(
            existing,
            format!("is on node {}, which the request excludes", replica.spec.node_name),
        )),
    }
}

/// What a publish request means for a volume.
#[derive(Debug, Eq, PartialEq)]
pub enum Attach {
    /// It is attached in exactly this way.
    Already,
    /// It may be attached.
    Free,
}

/// Compares a publish request with where the volume is.
pub fn attachment(volume: &GalleonVolume, asked: &AttachTo) -> Result<Attach> {
    let name = volume.name_any();
    if volume.is_deleting() {
        return Err(Error::new(
            Kind::Precondition,
            format!("volume {name} is being deleted"),
        ));
    }
    if volume.spec.capability.mode != asked.mode {
        return Err(Error::new(
            Kind::Invalid,
            format!(
                "volume {name} is {:?}, it cannot be published as {:?}",
                volume.spec.capability.mode, asked.mode
            ),
        ));
    }
    match &volume.spec.attach_to {
        Some(attached) if attached.node_name != asked.node_name => Err(Error::new(
            Kind::Precondition,
            format!(
                "volume {name} is published on node {}; unpublish it there first",
                attached.node_name
            ),
        )),
        Some(attached) if attached == asked => Ok(Attach::Already),
        Some(attached) => Err(Error::new(
            Kind::Exists,
            format!(
                "volume {name} is published on node {} as {} (read-only: {}); asked for: {} (read-only: {})",
                attached.node_name, attached.access_mode, attached.read_only, asked.access_mode, asked.read_only
            ),
        )),
        None => match volume.primary() {
            // With several replicas the epoch shuts a former primary out, and it may never come back to let go.
            Some(primary) if primary != asked.node_name && !volume.spec.is_replicated() => Err(Error::new(
                Kind::Precondition,
                format!("volume {name} is still being released by node {primary}"),
            )),
            _ => Ok(Attach::Free),
        },
    }
}

#[cfg(test)]
#[path = "same_tests.rs"]
mod tests;
