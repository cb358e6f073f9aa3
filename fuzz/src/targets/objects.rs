//! What people and other programs write into files and objects.

use galleonfs_api::ClassParameters;
use galleonfs_node_plugin::pool::{LabelFound, parse_label};

pub fn pool_label(data: &[u8]) {
    match parse_label(data) {
        LabelFound::Label(label) => assert!(std::str::from_utf8(data).is_ok(), "{label:?} is text"),
        LabelFound::Newer(format) => assert!(format > 1),
        LabelFound::Unreadable(why) => assert!(!why.is_empty()),
        LabelFound::None { .. } => panic!("a label that is there is not missing"),
    }
}

/// Lines of a key, `=`, and a value.
pub fn class_parameters(data: &[u8]) {
    let text = String::from_utf8_lossy(data);
    let given: Vec<(&str, &str)> = text.lines().filter_map(|line| line.split_once('=')).collect();
    match ClassParameters::parse(given.iter().copied()) {
        Ok(parsed) => {
            // The normal form is a request for the same.
            let normal = parsed.normal().clone();
            let again = ClassParameters::parse(normal.iter().map(|(key, value)| (&**key, &**value)));
            assert_eq!(again.expect("the normal form is taken").normal(), &normal);
        }
        Err(error) => assert!(!error.to_string().is_empty()),
    }
}
