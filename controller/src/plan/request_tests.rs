use galleonfs_csi_proto::csi::{
    VolumeContentSource,
    volume_capability::{AccessMode, BlockVolume, MountVolume},
};

use super::*;
use galleonfs_api::size::{GIB, MIB, TIB};

fn mount(fs_type: &str, mode: Mode) -> VolumeCapability {
    VolumeCapability {
        access_type: Some(AccessType::Mount(MountVolume {
            fs_type: fs_type.to_string(),
            ..Default::default()
        })),
        access_mode: Some(AccessMode { mode: mode.into() }),
    }
}

fn block(mode: Mode) -> VolumeCapability {
    VolumeCapability {
        access_type: Some(AccessType::Block(BlockVolume {})),
        access_mode: Some(AccessMode { mode: mode.into() }),
    }
}

fn request() -> CreateVolumeRequest {
    CreateVolumeRequest {
        name: "pvc-1".to_string(),
        volume_capabilities: vec![mount("", Mode::SingleNodeWriter)],
        ..Default::default()
    }
}

fn with_parameters<const N: usize>(parameters: [(&str, &str); N]) -> CreateVolumeRequest {
    let parameters = parameters
        .into_iter()
        .map(|(key, value)| (key.to_string(), value.to_string()))
        .collect();
    CreateVolumeRequest {
        parameters,
        ..request()
    }
}

fn place(node: &str) -> Topology {
    Topology {
        segments: [(TOPOLOGY_KEY.to_string(), node.to_string())].into(),
    }
}

fn kind_of<T: std::fmt::Debug>(result: Result<T>) -> Kind {
    result.expect_err("refused").kind
}

fn range(required_bytes: i64, limit_bytes: i64) -> Result<SizeRange> {
    size_range(Some(&CapacityRange {
        required_bytes,
        limit_bytes,
    }))
}

#[test]
fn a_required_field_that_is_empty_is_invalid() {
    assert_eq!(
        kind_of(create(&CreateVolumeRequest {
            name: String::new(),
            ..request()
        })),
        Kind::Invalid
    );
    assert_eq!(
        kind_of(create(&CreateVolumeRequest {
            volume_capabilities: vec![],
            ..request()
        })),
        Kind::Invalid
    );
    assert_eq!(kind_of(volume_id("")), Kind::Invalid);
    assert_eq!(
        kind_of(expand(&ControllerExpandVolumeRequest::default())),
        Kind::Invalid
    );
    let no_range = ControllerExpandVolumeRequest {
        volume_id: "a".into(),
        ..Default::default()
    };
    assert_eq!(kind_of(expand(&no_range)), Kind::Invalid);
    let publish_request = ControllerPublishVolumeRequest {
        volume_id: "a".into(),
        node_id: "n".into(),
        volume_capability: Some(mount("", Mode::SingleNodeWriter)),
        ..Default::default()
    };
    assert!(publish(&publish_request).is_ok());
    let no_volume = ControllerPublishVolumeRequest {
        volume_id: String::new(),
        ..publish_request.clone()
    };
    let no_node = ControllerPublishVolumeRequest {
        node_id: String::new(),
        ..publish_request.clone()
    };
    let no_capability = ControllerPublishVolumeRequest {
        volume_capability: None,
        ..publish_request
    };
    for bad in [no_volume, no_node, no_capability] {
        assert_eq!(kind_of(publish(&bad)), Kind::Invalid);
    }
    assert_eq!(
        kind_of(unpublish(&ControllerUnpublishVolumeRequest::default())),
        Kind::Invalid
    );
    let validate_request = ValidateVolumeCapabilitiesRequest {
        volume_id: "a".into(),
        ..Default::default()
    };
    assert_eq!(kind_of(validate(&validate_request)), Kind::Invalid);
}

#[test]
fn an_empty_node_id_unpublishes_from_everywhere() {
    let request = ControllerUnpublishVolumeRequest {
        volume_id: "a".into(),
        ..Default::default()
    };
    assert_eq!(unpublish(&request).expect("allowed").node_id, None);
}

#[test]
fn strings_and_maps_beyond_the_bounds_of_the_specification_are_invalid() {
    assert!(
        create(&CreateVolumeRequest {
            name: "n".repeat(128),
            ..request()
        })
        .is_ok()
    );
    assert_eq!(
        kind_of(create(&CreateVolumeRequest {
            name: "n".repeat(129),
            ..request()
        })),
        Kind::Invalid
    );
    assert_eq!(kind_of(volume_id(&"v".repeat(129))), Kind::Invalid);
    assert_eq!(kind_of(volume_id("a\0b")), Kind::Invalid);
    assert_eq!(
        kind_of(create(&with_parameters([("pool", "p".repeat(5000).as_str())]))),
        Kind::Invalid
    );
}

#[test]
fn parameters_that_do_not_exist_or_have_bad_values_are_invalid() {
    for bad in [
        ("colour", "blue"),
        ("replicaCount", "0"),
        ("replicaCount", "8"),
        ("replicaCount", "many"),
    ] {
        assert_eq!(kind_of(create(&with_parameters([bad]))), Kind::Invalid, "{bad:?}");
    }
    let error = create(&with_parameters([("colour", "blue")])).expect_err("refused");
    assert!(error.text.contains("mediaType"), "{}", error.text);
}

#[test]
fn what_a_later_release_brings_is_refused_with_a_clear_text() {
    let error = create(&with_parameters([("encryption", "true")])).expect_err("refused");
    assert!(
        error.kind == Kind::Invalid && error.text.contains("encryption comes later"),
        "{}",
        error.text
    );
}

#[test]
fn asking_for_block_and_mount_at_once_is_invalid() {
    let both = vec![mount("", Mode::SingleNodeWriter), block(Mode::SingleNodeWriter)];
    assert_eq!(
        kind_of(create(&CreateVolumeRequest {
            volume_capabilities: both,
            ..request()
        })),
        Kind::Invalid
    );
    let neither = VolumeCapability {
        access_type: None,
        ..block(Mode::SingleNodeWriter)
    };
    assert_eq!(kind_of(usage(&neither)), Kind::Invalid);
}

#[test]
fn only_modes_of_a_single_node_are_accepted() {
    for good in [
        Mode::SingleNodeWriter,
        Mode::SingleNodeReaderOnly,
        Mode::SingleNodeSingleWriter,
        Mode::SingleNodeMultiWriter,
    ] {
        assert!(usage(&mount("ext4", good)).is_ok(), "{good:?}");
    }
    for bad in [
        Mode::MultiNodeReaderOnly,
        Mode::MultiNodeSingleWriter,
        Mode::MultiNodeMultiWriter,
    ] {
        let error = usage(&mount("ext4", bad)).expect_err("refused");
        assert!(
            error.kind == Kind::Invalid && error.text.contains("one node at a time"),
            "{}",
            error.text
        );
    }
    assert_eq!(kind_of(usage(&mount("ext4", Mode::Unknown))), Kind::Invalid);
    let unset = VolumeCapability {
        access_mode: None,
        ..mount("ext4", Mode::SingleNodeWriter)
    };
    assert_eq!(kind_of(usage(&unset)), Kind::Invalid);
}

#[test]
fn the_file_system_comes_from_the_capability_the_class_or_the_default() {
    let fs_type = |asked: &str, parameters: &[(&str, &str)]| {
        let parameters = parameters
            .iter()
            .map(|(key, value)| (key.to_string(), value.to_string()))
            .collect();
        let volume_capabilities = vec![mount(asked, Mode::SingleNodeWriter)];
        create(&CreateVolumeRequest {
            parameters,
            volume_capabilities,
            ..request()
        })
        .map(|create| create.capability.fs_type)
    };
    assert_eq!(fs_type("", &[]).expect("the default").as_deref(), Some("ext4"));
    assert_eq!(fs_type("xfs", &[]).expect("asked").as_deref(), Some("xfs"));
    assert_eq!(
        fs_type("", &[("fs_type", "xfs")]).expect("given").as_deref(),
        Some("xfs")
    );
    assert_eq!(
        fs_type("xfs", &[("fsType", "xfs")]).expect("both").as_deref(),
        Some("xfs")
    );
    assert_eq!(kind_of(fs_type("ext4", &[("fsType", "xfs")])), Kind::Invalid);
    assert_eq!(kind_of(fs_type("btrfs", &[])), Kind::Invalid);
}

#[test]
fn sizes_are_rounded_up_and_the_result_is_what_is_reported() {
    assert_eq!(size_range(None).expect("no wish").size_bytes, GIB);
    assert_eq!(range(GIB + 1, 0).expect("rounded").size_bytes, GIB + MIB);
    assert_eq!(range(1, 0).expect("rounded").size_bytes, VOLUME_MIN_BYTES);
    assert_eq!(range(0, 500 * MIB + 7).expect("below the limit").size_bytes, 500 * MIB);
    assert_eq!(range(0, 5 * GIB).expect("below the limit").size_bytes, GIB);
    assert_eq!(range(2 * GIB, 2 * GIB).expect("exactly").size_bytes, 2 * GIB);
}

#[test]
fn sizes_that_cannot_be_are_out_of_range() {
    for (required, limit) in [
        (-1, 0),
        (0, -1),
        (2 * GIB, GIB),
        (17 * TIB, 0),
        (i64::MAX, 0),
        (i64::MAX, i64::MAX),
        (0, 1),
        (GIB + 1, GIB + 2),
    ] {
        assert_eq!(kind_of(range(required, limit)), Kind::OutOfRange, "{required}..{limit}");
    }
}

#[test]
fn an_existing_size_within_the_range_is_the_size_asked_for() {
    let asked = range(GIB, 2 * GIB).expect("a range");
    assert!(asked.contains(GIB) && asked.contains(2 * GIB));
    assert!(!asked.contains(GIB - MIB) && !asked.contains(2 * GIB + MIB));
    assert!(range(GIB, 0).expect("a range").contains(5 * GIB));
}

#[test]
fn sources_and_mutable_parameters_are_refused_in_this_release() {
    let source = CreateVolumeRequest {
        volume_content_source: Some(VolumeContentSource::default()),
        ..request()
    };
    assert_eq!(kind_of(create(&source)), Kind::Invalid);
    let mutable = CreateVolumeRequest {
        mutable_parameters: [("a".into(), "b".into())].into(),
        ..request()
    };
    assert_eq!(kind_of(create(&mutable)), Kind::Invalid);
}

#[test]
fn topology_names_nodes_in_order_of_preference() {
    let requirement = TopologyRequirement {
        requisite: vec![place("a"), place("b"), place("c")],
        preferred: vec![place("b"), place("a")],
    };
    let wish = topology(Some(&requirement)).expect("valid");
    assert_eq!(wish.preferred, ["b", "a"]);
    assert!(wish.allows("c") && !wish.allows("d"));
    assert!(topology(None).expect("none").allows("anywhere"));

    let foreign = Topology {
        segments: [("zone".to_string(), "z".to_string())].into(),
    };
    let wish = topology(Some(&TopologyRequirement {
        requisite: vec![foreign],
        preferred: vec![],
    }))
    .expect("valid");
    assert!(!wish.allows("a"), "a place without our key is nowhere we can be");
}

#[test]
fn capabilities_that_no_volume_can_have_leave_no_capacity() {
    let asked = GetCapacityRequest {
        volume_capabilities: vec![mount("", Mode::MultiNodeMultiWriter)],
        ..Default::default()
    };
    assert!(capacity(&asked).expect("a valid question").is_none());
    let asked = GetCapacityRequest {
        accessible_topology: Some(place("a")),
        ..Default::default()
    };
    assert_eq!(
        capacity(&asked).expect("valid").expect("somewhere").node.as_deref(),
        Some("a")
    );
    let asked = GetCapacityRequest {
        parameters: [("colour".into(), "blue".into())].into(),
        ..Default::default()
    };
    assert_eq!(kind_of(capacity(&asked)), Kind::Invalid);
}

#[test]
fn validation_confirms_or_says_what_is_against_it() {
    let ask = |capability| ValidateVolumeCapabilitiesRequest {
        volume_id: "a".into(),
        volume_capabilities: vec![capability],
        ..Default::default()
    };
    assert!(
        validate(&ask(mount("xfs", Mode::SingleNodeWriter)))
            .expect("valid")
            .1
            .is_ok()
    );
    let (_, verdict) = validate(&ask(mount("xfs", Mode::MultiNodeMultiWriter))).expect("valid");
    assert!(verdict.expect_err("not confirmed").contains("one node at a time"));
}

#[test]
fn a_token_we_never_gave_out_aborts_the_list() {
    for bad in ["invalid-token", "after:", "after:../x", "7"] {
        let request = ListVolumesRequest {
            max_entries: 1,
            starting_token: bad.to_string(),
        };
        assert_eq!(kind_of(list(&request)), Kind::Busy, "{bad}");
    }
    assert_eq!(
        kind_of(list(&ListVolumesRequest {
            max_entries: -1,
            ..Default::default()
        })),
        Kind::Invalid
    );
}

#[test]
fn pages_join_into_the_whole_list_also_when_names_come_and_go_between_them() {
    let mut names: Vec<String> = ["a", "b", "c", "d", "e"].map(String::from).into();
    let turn = |names: &[String], token: &str| {
        let page = list(&ListVolumesRequest {
            max_entries: 2,
            starting_token: token.to_string(),
        })
        .expect("our token");
        let (entries, next) = cut(&page, names, |name| name);
        (entries.to_vec(), next)
    };
    let (first, token) = turn(&names, "");
    assert_eq!(first, ["a", "b"]);
    names.remove(1); // The name the token remembers goes away, and the next page still starts behind it.
    let (second, token) = turn(&names, &token);
    assert_eq!(second, ["c", "d"]);
    let (third, token) = turn(&names, &token);
    assert_eq!((third, token.as_str()), (vec!["e".to_string()], ""));
}
