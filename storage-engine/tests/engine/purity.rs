//! The core stays pure: no file, clock, thread, task, socket or randomness of its own.

use std::path::Path;

/// What the engine may depend on; anything else is a decision to be argued for here.
/// ring, lz4_flex, zstd: pure functions of their arguments as used here (docs/rfd/0008-sealing.md); zeroize wipes keys.
/// slab and smallvec keep requests from allocating.
const DEPENDENCIES: [&str; 10] = [
    "bytemuck",
    "crc-fast",
    "lz4_flex",
    "ring",
    "rustc-hash",
    "slab",
    "smallvec",
    "thiserror",
    "zeroize",
    "zstd",
];
const FORBIDDEN: [&str; 14] = [
    "std::fs",
    "std::net",
    "std::thread",
    "std::time",
    "std::process",
    "std::env",
    "std::io",
    "Instant",
    "SystemTime",
    "tokio",
    "async fn",
    "rand::",
    "HashMap<",
    "HashSet<",
];

#[test]
fn the_engine_has_no_file_no_clock_no_task_and_no_randomness_of_its_own() {
    let mut files = 0;
    visit(&Path::new(env!("CARGO_MANIFEST_DIR")).join("src"), &mut |path, text| {
        files += 1;
        for word in FORBIDDEN {
            // FxHashMap has a fixed hasher: the same run visits it in the same order.
            let found = text.replace("FxHashMap<", "").contains(word);
            assert!(
                !found,
                "{} uses {word}: make it an effect or an argument",
                path.display()
            );
        }
    });
    assert!(files > 10, "the sources were found");
}

fn visit(folder: &Path, look: &mut dyn FnMut(&Path, &str)) {
    for entry in std::fs::read_dir(folder).unwrap() {
        let path = entry.unwrap().path();
        if path.is_dir() {
            visit(&path, look);
        } else {
            look(&path, &std::fs::read_to_string(&path).unwrap());
        }
    }
}

#[test]
fn the_engine_depends_on_little() {
    let manifest = std::fs::read_to_string(Path::new(env!("CARGO_MANIFEST_DIR")).join("Cargo.toml")).unwrap();
    let listed = manifest
        .split("[dependencies]")
        .nth(1)
        .unwrap()
        .split('[')
        .next()
        .unwrap();
    for line in listed.lines().filter(|line| !line.trim().is_empty()) {
        let name = line.split(['.', ' ', '=']).next().unwrap();
        assert!(DEPENDENCIES.contains(&name), "the engine grew a dependency on {name}");
    }
}
