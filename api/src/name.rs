//! Names of objects: how a CSI name becomes a GalleonVolume, and a GalleonVolume its replicas.
//!
//! Names are functions of what they name. A repeated request then finds what the first one made, and two controllers
//! that both believe to be in charge collide on the name instead of making two of the same thing.

use sha2::{Digest, Sha256};

/// Longest name a label value or a DNS label may have.
pub const LABEL_LENGTH_MAX: usize = 63;

/// Name of the GalleonVolume for a CSI `CreateVolume` name; it is also the volume id. A name that can be an object's name
/// is taken as it is, any other is hashed.
pub fn volume(csi_name: &str) -> String {
    // A name that looks like a hashed one is hashed too, or two CSI names could lead to one object.
    if is_dns_label(csi_name) && !is_hashed(csi_name) {
        return csi_name.to_string();
    }
    format!("gv-{}", &sha256_hex(csi_name)[..40])
}

fn is_hashed(name: &str) -> bool {
    name.strip_prefix("gv-")
        .is_some_and(|rest| rest.len() == 40 && rest.bytes().all(|byte| byte.is_ascii_hexdigit()))
}

/// Name of the replica in slot `slot` (from 0) of a volume. The uid makes the replicas of a later volume of the same name
/// different objects.
pub fn replica(volume_name: &str, volume_uid: &str, slot: u32) -> String {
    format!("{volume_name}-{}", &sha256_hex(&format!("{volume_uid}/{slot}"))[..5])
}

/// RFC 1123: letters, digits and dashes, not at the ends, at most 63 of them.
pub fn is_dns_label(name: &str) -> bool {
    let inner = |byte: u8| byte.is_ascii_lowercase() || byte.is_ascii_digit();
    let bytes = name.as_bytes();
    match (bytes.first(), bytes.last()) {
        (Some(&first), Some(&last)) => {
            bytes.len() <= LABEL_LENGTH_MAX
                && inner(first)
                && inner(last)
                && bytes.iter().all(|&byte| inner(byte) || byte == b'-')
        }
        _ => false,
    }
}

/// Dot-separated labels, at most 253 characters: what a Node may be called.
pub fn is_dns_subdomain(name: &str) -> bool {
    name.len() <= 253 && name.split('.').all(is_dns_label)
}

fn sha256_hex(text: &str) -> String {
    Sha256::digest(text.as_bytes())
        .iter()
        .map(|byte| format!("{byte:02x}"))
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_csi_name_that_can_be_an_object_name_is_kept() {
        assert_eq!(
            volume("pvc-0b7c2a9e-8a5e-4f3c-9d39-0e9d7d1c1f00"),
            "pvc-0b7c2a9e-8a5e-4f3c-9d39-0e9d7d1c1f00"
        );
        assert_eq!(volume(&"a".repeat(63)), "a".repeat(63));
    }

    #[test]
    fn any_other_csi_name_is_hashed_into_one() {
        for name in [
            "Sanity Volume",
            "a".repeat(64).as_str(),
            "-a",
            "a-",
            "ä",
            "a.b",
            "..",
            "a/b",
            "a\0b",
        ] {
            let hashed = volume(name);
            assert!(
                hashed.starts_with("gv-") && hashed.len() == 43 && is_dns_label(&hashed),
                "{name:?} became {hashed}"
            );
        }
        assert_eq!(volume("Sanity"), volume("Sanity"));
        assert_ne!(volume("Sanity"), volume("sanity"));
    }

    #[test]
    fn two_csi_names_never_lead_to_one_object() {
        let hashed = volume("Not A Label");
        assert_ne!(volume(&hashed), hashed);
    }

    #[test]
    fn replicas_are_named_after_the_volume_its_uid_and_their_slot() {
        let first = replica("data", "uid-1", 0);
        assert_eq!(first, replica("data", "uid-1", 0));
        assert!(first.starts_with("data-") && first.len() == "data-".len() + 5);
        assert_ne!(first, replica("data", "uid-1", 1));
        assert_ne!(first, replica("data", "uid-2", 0));
    }

    #[test]
    fn node_names_may_have_dots() {
        assert!(is_dns_subdomain("node-1.example.org"));
        assert!(!is_dns_subdomain("node-1..org") && !is_dns_subdomain("") && !is_dns_subdomain("Node"));
    }
}
