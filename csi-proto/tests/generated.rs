//! The committed code is what the committed protocols give.

#[path = "../examples/gen.rs"]
#[allow(dead_code, reason = "the example's main is not called here")]
mod generator;

use std::{collections::BTreeMap, fs, path::Path};

fn contents(directory: &Path) -> BTreeMap<String, String> {
    let entries = fs::read_dir(directory).unwrap_or_else(|error| panic!("reading {}: {error}", directory.display()));
    entries
        .map(|entry| {
            let path = entry.expect("a directory entry").path();
            let name = path
                .file_name()
                .expect("a file has a name")
                .to_string_lossy()
                .into_owned();
            (name, fs::read_to_string(&path).expect("generated code is text"))
        })
        .collect()
}

#[test]
fn generated_code_is_current() {
    let home = Path::new(env!("CARGO_MANIFEST_DIR"));
    let fresh_dir = Path::new(env!("CARGO_TARGET_TMPDIR")).join("generated");
    if fresh_dir.exists() {
        fs::remove_dir_all(&fresh_dir).expect("an earlier run's directory can be removed");
    }
    generator::generate(home, &fresh_dir).expect("the protocols compile");

    let (fresh, committed) = (contents(&fresh_dir), contents(&home.join("src/generated")));
    assert_eq!(fresh.keys().collect::<Vec<_>>(), committed.keys().collect::<Vec<_>>());
    for (name, text) in &fresh {
        assert!(
            committed.get(name) == Some(text),
            "src/generated/{name} is stale; run `cargo run -p galleonfs-csi-proto --example gen`"
        );
    }
}
