//! The custom resources of GalleonFS as plain Rust types.
//!
//! The object is the message: controller and node plugin never call each other, they read and write what is defined
//! here. So this crate is the one contract between them, and between a release and its successor. It holds the shapes,
//! the rules the API server enforces on them (CEL), the words used in conditions, and the few pure functions both sides
//! must agree on: names, sizes, StorageClass parameters. It does no I/O and knows no gRPC.

#![expect(
    clippy::duplicated_attributes,
    reason = "every printer column of kube's derive is written with the same fields"
)]

pub mod class;
pub mod condition;
pub mod identity;
pub mod name;
pub mod pool;
pub mod replica;
pub mod schema;
pub mod size;
pub mod volume;
pub mod words;

pub use class::{ClassError, ClassParameters};
pub use condition::Condition;
pub use identity::NodeIdentity;
pub use pool::{Endpoint, MediaType, Reservation, StoragePool, StoragePoolSpec, StoragePoolStatus};
pub use replica::{GalleonReplica, GalleonReplicaSpec, GalleonReplicaStatus, ReplicaPhase};
pub use volume::{
    AttachTo, Capability, Compression, Device, GalleonVolume, GalleonVolumeSpec, GalleonVolumeStatus, OutReplica,
    PoolSelector, VolumeConfig, VolumeMode, WriteConcern,
};
pub use words::*;

use k8s_openapi::apiextensions_apiserver::pkg::apis::apiextensions::v1::CustomResourceDefinition;
use kube::CustomResourceExt;

/// Every CustomResourceDefinition of this release, in the order in which the chart lists them.
pub fn crds() -> Vec<CustomResourceDefinition> {
    vec![GalleonVolume::crd(), GalleonReplica::crd(), StoragePool::crd()]
}

#[cfg(test)]
mod tests {
    use super::*;

    fn schema_of(crd: &CustomResourceDefinition) -> String {
        serde_json::to_string(&crd.spec.versions[0].schema).expect("plain data")
    }

    #[test]
    fn every_resource_is_namespaced_in_one_group_with_a_short_name_columns_and_a_status() {
        for crd in crds() {
            let name = crd.metadata.name.as_deref().expect("a definition has a name");
            let version = &crd.spec.versions[0];
            assert_eq!(
                (crd.spec.group.as_str(), crd.spec.scope.as_str()),
                (GROUP, "Namespaced"),
                "{name}"
            );
            assert_eq!(crd.spec.versions.len(), 1, "{name}");
            assert_eq!(version.name, VERSION, "{name}");
            assert!(crd.spec.names.short_names.is_some(), "{name} has no short name");
            assert!(version.additional_printer_columns.is_some(), "{name} has no columns");
            assert!(
                version.subresources.as_ref().is_some_and(|sub| sub.status.is_some()),
                "{name} has no status"
            );
        }
    }

    #[test]
    fn a_node_can_select_what_names_it() {
        let paths = |crd: &CustomResourceDefinition| -> Vec<String> {
            crd.spec.versions[0]
                .selectable_fields
                .iter()
                .flatten()
                .map(|field| field.json_path.clone())
                .collect()
        };
        let crds = crds();
        assert_eq!(paths(&crds[0]), [".spec.attachTo.nodeName"]);
        assert!(paths(&crds[1]).contains(&".spec.nodeName".to_string()));
        assert_eq!(paths(&crds[2]), [".spec.nodeName"]);
    }

    #[test]
    fn every_field_says_what_it_is() {
        fn undescribed(path: &str, schema: &serde_json::Value, found: &mut Vec<String>) {
            for (name, property) in schema["properties"].as_object().into_iter().flatten() {
                let path = format!("{path}.{name}");
                if property["description"].as_str().is_none_or(str::is_empty) {
                    found.push(path.clone());
                }
                undescribed(&path, property, found);
                undescribed(&path, &property["items"], found);
                undescribed(&path, &property["additionalProperties"], found);
            }
        }
        for crd in crds() {
            let schema = serde_json::to_value(&crd.spec.versions[0].schema).expect("plain data");
            let properties = &schema["openAPIV3Schema"]["properties"];
            let mut found = vec![];
            undescribed("spec", &properties["spec"], &mut found);
            undescribed("status", &properties["status"], &mut found);
            assert!(
                found.is_empty(),
                "{:?} lacks descriptions: {found:?}",
                crd.metadata.name
            );
        }
    }

    #[test]
    fn what_must_never_happen_is_refused_by_rules_in_the_schema() {
        let volume = schema_of(&GalleonVolume::crd());
        for message in [
            "epoch must not go back",
            "an epoch has one primary and one incarnation",
            "a new epoch may only keep replicas that were in sync",
            "inSync must name at least one replica",
            "sizeBytes must not shrink",
            "attachTo must be cleared before it can name another node",
        ] {
            assert!(volume.contains(message), "no rule says: {message}");
        }
    }
}
