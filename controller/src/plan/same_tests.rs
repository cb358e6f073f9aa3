use super::*;
use crate::fixtures::{attach_to, deleting, replica, settled, volume};
use crate::plan::request::{self, TopologyWish};
use galleonfs_api::{ClassParameters, VolumeMode, size::GIB};
use galleonfs_csi_proto::csi::CapacityRange;

fn asked(required_bytes: i64, limit_bytes: i64, parameters: &[(&str, &str)]) -> Create {
    Create {
        csi_name: "v".to_string(),
        volume_name: "v".to_string(),
        range: request::size_range(Some(&CapacityRange {
            required_bytes,
            limit_bytes,
        }))
        .expect("a valid range"),
        class: ClassParameters::parse(parameters.iter().copied()).expect("valid parameters"),
        capability: volume("v").spec.capability,
        topology: TopologyWish::default(),
    }
}

fn kind<T: std::fmt::Debug>(result: Result<T>) -> Kind {
    result.expect_err("refused").kind
}

#[test]
fn the_same_request_finds_the_volume_of_the_first_one() {
    assert!(super::volume(&volume("v"), &asked(GIB, 0, &[])).is_ok());
    assert!(
        super::volume(&volume("v"), &asked(GIB - 7, 2 * GIB, &[])).is_ok(),
        "any size in the range will do"
    );
}

#[test]
fn the_same_name_with_another_size_class_or_use_exists_already() {
    assert_eq!(kind(super::volume(&volume("v"), &asked(2 * GIB, 0, &[]))), Kind::Exists);
    assert_eq!(
        kind(super::volume(&volume("v"), &asked(GIB / 2, GIB / 2, &[]))),
        Kind::Exists
    );
    assert_eq!(
        kind(super::volume(&volume("v"), &asked(GIB, 0, &[("mediaType", "hdd")]))),
        Kind::Exists
    );
    let mut block = asked(GIB, 0, &[]);
    block.capability.mode = VolumeMode::Block;
    assert_eq!(kind(super::volume(&volume("v"), &block)), Kind::Exists);
    let mut name = asked(GIB, 0, &[]);
    name.csi_name = "V".to_string();
    assert_eq!(kind(super::volume(&volume("v"), &name)), Kind::Exists);
}

#[test]
fn a_volume_settled_on_a_node_that_the_request_excludes_exists_already() {
    let mut create = asked(GIB, 0, &[]);
    assert!(place(&volume("v"), &replica("v", "a", GIB), &create).is_ok());
    create.topology.requisite = Some(vec!["b".to_string()]);
    assert_eq!(
        kind(place(&volume("v"), &replica("v", "a", GIB), &create)),
        Kind::Exists
    );
}

#[test]
fn publishing_to_a_second_node_names_the_first() {
    let mut published = volume("v");
    published.spec.attach_to = Some(attach_to("a"));
    let error = attachment(&published, &attach_to("b")).expect_err("it is on a");
    assert_eq!(error.kind, Kind::Precondition);
    assert!(error.text.contains("node a"), "{}", error.text);
}

#[test]
fn publishing_again_in_the_same_way_is_fine_and_in_another_way_exists_already() {
    let mut published = volume("v");
    published.spec.attach_to = Some(attach_to("a"));
    assert_eq!(
        attachment(&published, &attach_to("a")).expect("the same"),
        Attach::Already
    );
    let read_only = AttachTo {
        read_only: true,
        ..attach_to("a")
    };
    assert_eq!(kind(attachment(&published, &read_only)), Kind::Exists);
    let other_mode = AttachTo {
        access_mode: "SINGLE_NODE_MULTI_WRITER".to_string(),
        ..attach_to("a")
    };
    assert_eq!(kind(attachment(&published, &other_mode)), Kind::Exists);
}

#[test]
fn a_volume_that_another_node_still_releases_cannot_be_published_yet() {
    let mut releasing = settled(volume("v"), &["v-a"]);
    releasing
        .status
        .as_mut()
        .and_then(|status| status.config.as_mut())
        .expect("a configuration")
        .primary = Some("a".to_string());
    let error = attachment(&releasing, &attach_to("b")).expect_err("a is not done");
    assert!(
        error.kind == Kind::Precondition && error.text.contains("node a"),
        "{}",
        error.text
    );
    assert_eq!(
        attachment(&releasing, &attach_to("a")).expect("back to the same node"),
        Attach::Free
    );
}

#[test]
fn what_is_being_deleted_or_of_another_mode_cannot_be_published() {
    assert_eq!(
        kind(attachment(&deleting(volume("v")), &attach_to("a"))),
        Kind::Precondition
    );
    let block = AttachTo {
        mode: VolumeMode::Block,
        ..attach_to("a")
    };
    assert_eq!(kind(attachment(&volume("v"), &block)), Kind::Invalid);
}

#[test]
fn a_primary_that_never_lets_go_holds_up_a_volume_of_one_replica_only() {
    let left_behind = |mut volume: GalleonVolume| {
        let status = volume.status.get_or_insert_default();
        status.config.get_or_insert_default().primary = Some("dead".to_string());
        volume
    };
    assert_eq!(
        kind(attachment(&left_behind(volume("v")), &attach_to("b"))),
        Kind::Precondition
    );
    let several = left_behind(crate::fixtures::replicated("v", 3));
    assert_eq!(
        attachment(&several, &attach_to("b")).expect("its epoch is over"),
        Attach::Free
    );
    let mut ordered = several;
    ordered.spec.attach_to = Some(attach_to("dead"));
    assert_eq!(kind(attachment(&ordered, &attach_to("b"))), Kind::Precondition);
}
