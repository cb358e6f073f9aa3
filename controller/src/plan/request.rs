//! From a CSI request to a command: everything that can be refused by looking at the request alone is refused here,
//! once, and what remains carries the proof in its type.

use std::collections::BTreeMap;

use galleonfs_api::{
    AttachTo, Capability, ClassParameters, TOPOLOGY_KEY, VolumeMode,
    class::{FS_TYPE_DEFAULT, FS_TYPES},
    name,
    size::{self, VOLUME_DEFAULT_BYTES, VOLUME_MAX_BYTES, VOLUME_MIN_BYTES, VOLUME_STEP_BYTES},
};
use galleonfs_csi_proto::csi::{
    CapacityRange, ControllerExpandVolumeRequest, ControllerPublishVolumeRequest, ControllerUnpublishVolumeRequest,
    CreateVolumeRequest, GetCapacityRequest, ListVolumesRequest, Topology, TopologyRequirement,
    ValidateVolumeCapabilitiesRequest, VolumeCapability,
    volume_capability::{AccessType, access_mode::Mode},
};

use crate::error::{Error, Kind, Result};

/// The specification's bound on strings and on maps (keys and values together).
const STRING_BYTES_MAX: usize = 128;
const MAP_BYTES_MAX: usize = 4096;
/// Node ids have a bound of their own.
const NODE_ID_BYTES_MAX: usize = 256;
/// What a page token starts with; the rest is the last name of the page before.
const TOKEN_PREFIX: &str = "after:";

/// Make a volume.
#[derive(Clone, Debug)]
pub struct Create {
    pub csi_name: String,
    pub volume_name: String,
    pub range: SizeRange,
    pub class: ClassParameters,
    pub capability: Capability,
    pub topology: TopologyWish,
}

/// A size that suits, and the bounds it was chosen from (0: no bound).
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct SizeRange {
    pub size_bytes: i64,
    pub required_bytes: i64,
    pub limit_bytes: i64,
}

impl SizeRange {
    /// Whether a volume of this size is what was asked for.
    pub fn contains(&self, size_bytes: i64) -> bool {
        size_bytes >= self.required_bytes && (self.limit_bytes == 0 || size_bytes <= self.limit_bytes)
    }
}

/// Where a volume must and should be reachable, as node names.
#[derive(Clone, Debug, Default, Eq, PartialEq)]
pub struct TopologyWish {
    /// One of these. `None`: anywhere.
    pub requisite: Option<Vec<String>>,
    /// These first, in this order.
    pub preferred: Vec<String>,
}

impl TopologyWish {
    /// Whether a volume on this node is reachable where it must be.
    pub fn allows(&self, node: &str) -> bool {
        self.requisite
            .as_ref()
            .is_none_or(|nodes| nodes.iter().any(|allowed| allowed == node))
    }
}

/// Bring a volume up on a node.
#[derive(Clone, Debug)]
pub struct Publish {
    pub volume_id: String,
    pub attach_to: AttachTo,
}

/// Take a volume away from a node, or from wherever it is.
#[derive(Clone, Debug)]
pub struct Unpublish {
    pub volume_id: String,
    pub node_id: Option<String>,
}

/// Make a volume larger.
#[derive(Clone, Debug)]
pub struct Expand {
    pub volume_id: String,
    pub range: SizeRange,
}

/// How much room there is.
#[derive(Clone, Debug)]
pub struct Capacity {
    pub class: ClassParameters,
    pub node: Option<String>,
}

/// One page of volumes.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct Page {
    pub entries_max: usize,
    pub after: Option<String>,
}

fn invalid(text: impl Into<String>) -> Error {
    Error::new(Kind::Invalid, text)
}

/// A required string.
fn string<'a>(field: &str, value: &'a str, bytes_max: usize) -> Result<&'a str> {
    if value.is_empty() {
        return Err(invalid(format!("{field} is required")));
    }
    if value.len() > bytes_max {
        return Err(invalid(format!(
            "{field} is {} bytes long; at most {bytes_max} are allowed",
            value.len()
        )));
    }
    if value.contains('\0') {
        return Err(invalid(format!("{field} contains a NUL character")));
    }
    Ok(value)
}

/// A volume id as the CO hands it back. Whether there is such a volume is for the API server to say.
pub fn volume_id(value: &str) -> Result<String> {
    string("volume_id", value, STRING_BYTES_MAX).map(str::to_string)
}

fn map(field: &str, value: &BTreeMap<String, String>) -> Result<()> {
    let bytes: usize = value.iter().map(|(key, value)| key.len() + value.len()).sum();
    if bytes > MAP_BYTES_MAX {
        return Err(invalid(format!(
            "{field} is {bytes} bytes long; at most {MAP_BYTES_MAX} are allowed"
        )));
    }
    Ok(())
}

fn class(parameters: &BTreeMap<String, String>) -> Result<ClassParameters> {
    map("parameters", parameters)?;
    ClassParameters::parse(parameters.iter().map(|(key, value)| (key.as_str(), value.as_str())))
        .map_err(|error| invalid(error.to_string()))
}

/// Reads a CreateVolume request.
pub fn create(request: &CreateVolumeRequest) -> Result<Create> {
    let csi_name = string("name", &request.name, STRING_BYTES_MAX)?;
    let capability = capabilities(&request.volume_capabilities)?;
    let class = class(&request.parameters)?;
    if !request.mutable_parameters.is_empty() {
        return Err(invalid(
            "mutable_parameters: this release has no parameters that can be modified",
        ));
    }
    if request.volume_content_source.is_some() {
        return Err(invalid(
            "volume_content_source: this release cannot create volumes from snapshots or volumes",
        ));
    }
    Ok(Create {
        csi_name: csi_name.to_string(),
        volume_name: name::volume(csi_name),
        range: size_range(request.capacity_range.as_ref())?,
        capability: Capability {
            fs_type: fs_type(&capability, &class)?,
            mode: capability.mode,
        },
        topology: topology(request.accessibility_requirements.as_ref())?,
        class,
    })
}

/// One way of using a volume, checked.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct Usage {
    pub mode: VolumeMode,
    /// As given; empty leaves it to the class.
    pub fs_type: String,
    pub access_mode: Mode,
}

/// Reads one capability.
pub fn usage(capability: &VolumeCapability) -> Result<Usage> {
    let (mode, fs_type) = match &capability.access_type {
        Some(AccessType::Block(_)) => (VolumeMode::Block, String::new()),
        Some(AccessType::Mount(mount)) => {
            if !mount.volume_mount_group.is_empty() {
                return Err(invalid(
                    "volume_mount_group is given, but VOLUME_MOUNT_GROUP is not declared",
                ));
            }
            if !mount.fs_type.is_empty() && !FS_TYPES.contains(&mount.fs_type.as_str()) {
                let known = FS_TYPES.join(", ");
                return Err(invalid(format!(
                    "file system {:?} cannot be made; there are: {known}",
                    mount.fs_type
                )));
            }
            (VolumeMode::Filesystem, mount.fs_type.clone())
        }
        None => return Err(invalid("a volume capability must say block or mount")),
    };
    let access_mode = capability
        .access_mode
        .map(|access_mode| access_mode.mode())
        .unwrap_or(Mode::Unknown);
    match access_mode {
        Mode::SingleNodeWriter
        | Mode::SingleNodeReaderOnly
        | Mode::SingleNodeSingleWriter
        | Mode::SingleNodeMultiWriter => Ok(Usage {
            mode,
            fs_type,
            access_mode,
        }),
        Mode::Unknown => Err(invalid("a volume capability must have an access mode")),
        Mode::MultiNodeReaderOnly | Mode::MultiNodeSingleWriter | Mode::MultiNodeMultiWriter => Err(invalid(format!(
            "access mode {} is not supported: a GalleonFS volume is used on one node at a time \
             (use ReadWriteOnce or ReadWriteOncePod)",
            access_mode.as_str_name()
        ))),
    }
}

/// Reads the capabilities of a request, which must agree on block or mount and on the file system.
fn capabilities(capabilities: &[VolumeCapability]) -> Result<Usage> {
    let usages = capabilities.iter().map(usage).collect::<Result<Vec<_>>>()?;
    let (first, others) = usages
        .split_first()
        .ok_or_else(|| invalid("volume_capabilities is required"))?;
    if others.iter().any(|other| other.mode != first.mode) {
        return Err(invalid(
            "volume_capabilities ask for both block and mount; a volume is one or the other",
        ));
    }
    if others.iter().any(|other| other.fs_type != first.fs_type) {
        return Err(invalid("volume_capabilities ask for different file systems"));
    }
    Ok(first.clone())
}

fn fs_type(usage: &Usage, class: &ClassParameters) -> Result<Option<String>> {
    match (usage.mode, usage.fs_type.as_str(), class.fs_type.as_deref()) {
        (VolumeMode::Block, _, _) => Ok(None),
        (VolumeMode::Filesystem, "", given) => Ok(Some(given.unwrap_or(FS_TYPE_DEFAULT).to_string())),
        (VolumeMode::Filesystem, asked, None) => Ok(Some(asked.to_string())),
        (VolumeMode::Filesystem, asked, Some(given)) if asked == given => Ok(Some(asked.to_string())),
        (VolumeMode::Filesystem, asked, Some(given)) => Err(invalid(format!(
            "the volume capability asks for file system {asked:?} and the StorageClass parameters for {given:?}; \
             set only csi.storage.k8s.io/fstype in the StorageClass"
        ))),
    }
}

/// Chooses a size from a range.
pub fn size_range(range: Option<&CapacityRange>) -> Result<SizeRange> {
    let (required, limit) = range.map_or((0, 0), |range| (range.required_bytes, range.limit_bytes));
    let out_of_range = |text: String| Err(Error::new(Kind::OutOfRange, text));
    if required < 0 || limit < 0 {
        return out_of_range(format!(
            "capacity_range is negative: required {required}, limit {limit}"
        ));
    }
    if limit > 0 && limit < required {
        return out_of_range(format!(
            "capacity_range asks for {required} bytes and allows only {limit}"
        ));
    }
    let size_bytes = match (required, limit) {
        (0, limit) if limit > 0 && limit < VOLUME_DEFAULT_BYTES => limit / VOLUME_STEP_BYTES * VOLUME_STEP_BYTES,
        (0, _) => VOLUME_DEFAULT_BYTES,
        (required, _) => match size::round_up(required) {
            Some(size_bytes) => size_bytes,
            None => {
                let most = size::human(VOLUME_MAX_BYTES);
                return out_of_range(format!("a volume has at most {most}, {required} bytes were asked for"));
            }
        },
    };
    if size_bytes < VOLUME_MIN_BYTES {
        let least = size::human(VOLUME_MIN_BYTES);
        return out_of_range(format!(
            "a volume has at least {least}, at most {limit} bytes were allowed"
        ));
    }
    if limit > 0 && size_bytes > limit {
        return out_of_range(format!(
            "volumes are multiples of {}, so {required} bytes would become {size_bytes}, and only {limit} are allowed",
            size::human(VOLUME_STEP_BYTES)
        ));
    }
    Ok(SizeRange {
        size_bytes,
        required_bytes: required,
        limit_bytes: limit,
    })
}

/// Reads a topology requirement. A place that does not name our key is one we cannot be at.
fn topology(requirement: Option<&TopologyRequirement>) -> Result<TopologyWish> {
    let Some(requirement) = requirement else {
        return Ok(TopologyWish::default());
    };
    for place in requirement.requisite.iter().chain(&requirement.preferred) {
        map("topology segments", &place.segments)?;
    }
    let nodes = |places: &[Topology]| -> Vec<String> { places.iter().filter_map(node_of).collect() };
    let anywhere =
        requirement.requisite.is_empty() || requirement.requisite.iter().any(|place| place.segments.is_empty());
    Ok(TopologyWish {
        requisite: (!anywhere).then(|| nodes(&requirement.requisite)),
        preferred: nodes(&requirement.preferred),
    })
}

fn node_of(place: &Topology) -> Option<String> {
    place.segments.get(TOPOLOGY_KEY).cloned()
}

/// Reads a ControllerPublishVolume request.
pub fn publish(request: &ControllerPublishVolumeRequest) -> Result<Publish> {
    let volume_id = volume_id(&request.volume_id)?;
    let node_name = string("node_id", &request.node_id, NODE_ID_BYTES_MAX)?.to_string();
    let capability = request
        .volume_capability
        .as_ref()
        .ok_or_else(|| invalid("volume_capability is required"))?;
    map("volume_context", &request.volume_context)?;
    let usage = usage(capability)?;
    Ok(Publish {
        volume_id,
        attach_to: AttachTo {
            node_name,
            read_only: request.readonly,
            access_mode: usage.access_mode.as_str_name().to_string(),
            mode: usage.mode,
        },
    })
}

/// Reads a ControllerUnpublishVolume request.
pub fn unpublish(request: &ControllerUnpublishVolumeRequest) -> Result<Unpublish> {
    let volume_id = volume_id(&request.volume_id)?;
    let node_id = match request.node_id.as_str() {
        "" => None,
        node_id => Some(string("node_id", node_id, NODE_ID_BYTES_MAX)?.to_string()),
    };
    Ok(Unpublish { volume_id, node_id })
}

/// Reads a ControllerExpandVolume request.
pub fn expand(request: &ControllerExpandVolumeRequest) -> Result<Expand> {
    let volume_id = volume_id(&request.volume_id)?;
    let range = request
        .capacity_range
        .as_ref()
        .ok_or_else(|| invalid("capacity_range is required"))?;
    if range.required_bytes == 0 && range.limit_bytes == 0 {
        return Err(invalid("capacity_range must ask for something"));
    }
    if let Some(capability) = &request.volume_capability {
        usage(capability)?;
    }
    Ok(Expand {
        volume_id,
        range: size_range(Some(range))?,
    })
}

/// Reads a GetCapacity request. Capabilities that no volume of ours can have leave no room at all: `None`.
pub fn capacity(request: &GetCapacityRequest) -> Result<Option<Capacity>> {
    let class = class(&request.parameters)?;
    if request
        .volume_capabilities
        .iter()
        .any(|capability| usage(capability).is_err())
    {
        return Ok(None);
    }
    let node = match &request.accessible_topology {
        Some(place) if !place.segments.is_empty() => match node_of(place) {
            Some(node) => Some(node),
            None => return Ok(None),
        },
        _ => None,
    };
    Ok(Some(Capacity { class, node }))
}

/// Reads a ValidateVolumeCapabilities request: the volume, and either nothing against it or what is.
pub fn validate(request: &ValidateVolumeCapabilitiesRequest) -> Result<(String, Result<Usage, String>)> {
    let volume_id = volume_id(&request.volume_id)?;
    if request.volume_capabilities.is_empty() {
        return Err(invalid("volume_capabilities is required"));
    }
    map("volume_context", &request.volume_context)?;
    let verdict = capabilities(&request.volume_capabilities)
        .and_then(|usage| class(&request.parameters).map(|_| usage))
        .and_then(|usage| match request.mutable_parameters.is_empty() {
            true => Ok(usage),
            false => Err(invalid("this release has no mutable parameters")),
        });
    Ok((volume_id, verdict.map_err(|error| error.text)))
}

/// Reads a ListVolumes request. A token we never gave out is ABORTED, as the specification asks.
pub fn list(request: &ListVolumesRequest) -> Result<Page> {
    let entries_max = usize::try_from(request.max_entries).map_err(|_| invalid("max_entries is negative"))?;
    let after = match request.starting_token.as_str() {
        "" => None,
        token => match token.strip_prefix(TOKEN_PREFIX).filter(|name| name::is_dns_label(name)) {
            Some(name) => Some(name.to_string()),
            None => {
                return Err(Error::new(
                    Kind::Busy,
                    "starting_token is not one of ours; start again without one",
                ));
            }
        },
    };
    Ok(Page {
        entries_max: if entries_max == 0 { usize::MAX } else { entries_max },
        after,
    })
}

/// Cuts a page out of names in order and says how to ask for the next one.
pub fn cut<'a, T>(page: &Page, sorted: &'a [T], name: impl Fn(&T) -> &str) -> (&'a [T], String) {
    let start = match &page.after {
        Some(after) => sorted.partition_point(|item| name(item) <= after.as_str()),
        None => 0,
    };
    let rest = &sorted[start..];
    let entries = &rest[..page.entries_max.min(rest.len())];
    let next = match entries.last() {
        Some(last) if entries.len() < rest.len() => format!("{TOKEN_PREFIX}{}", name(last)),
        _ => String::new(),
    };
    (entries, next)
}

#[cfg(test)]
#[path = "request_tests.rs"]
mod tests;
