//! Small schema pieces that several resources share.

use schemars::{Schema, SchemaGenerator, json_schema};

/// RFC 3339, as Kubernetes writes times.
pub fn date_time(_: &mut SchemaGenerator) -> Schema {
    json_schema!({"type": "string", "format": "date-time"})
}

/// A bounded list of replica names. The bounds are not decoration: the API server refuses CEL rules whose worst case
/// over an unbounded list would cost too much.
pub fn replica_names(_: &mut SchemaGenerator) -> Schema {
    json_schema!({
        "type": "array",
        "maxItems": crate::volume::REPLICAS_MAX,
        "items": {"type": "string", "minLength": 1, "maxLength": 253},
        "x-kubernetes-list-type": "set",
    })
}

/// One of the block sizes that there are.
pub fn block_size(_: &mut SchemaGenerator) -> Schema {
    json_schema!({"type": "integer", "format": "int32", "enum": crate::volume::BLOCK_SIZES})
}

/// One of the sector sizes that there are.
pub fn sector_size(_: &mut SchemaGenerator) -> Schema {
    json_schema!({"type": "integer", "format": "int32", "enum": crate::volume::SECTOR_SIZES})
}
