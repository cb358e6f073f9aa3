//! What the tests of the chart share: where the project and the programs of the lab are, and the chart as helm renders
//! it.

#![allow(dead_code, reason = "each test file is a program of its own and uses a part of this")]

use std::{
    env, fs,
    path::{Path, PathBuf},
    process::Command,
    time::SystemTime,
};

use serde_json::Value;

pub const NAMESPACE: &str = "galleonfs-system";

/// The checkout.
pub fn project() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR"))
        .parent()
        .expect("the crate lies in the checkout")
        .to_path_buf()
}

pub fn chart() -> PathBuf {
    project().join("charts/galleonfs")
}

/// A program that the lab builds: from `$GALLEONFS_LAB_BIN`, else from the newest build in the lab's cache.
///
/// Not skipped when it is missing: a check that is silently left out is no check.
pub fn lab_program(name: &str) -> PathBuf {
    if let Some(directory) = env::var_os("GALLEONFS_LAB_BIN") {
        let program = Path::new(&directory).join(name);
        assert!(
            program.is_file(),
            "{} is missing (GALLEONFS_LAB_BIN names that directory)",
            program.display()
        );
        return program;
    }
    let cache = cache();
    newest(&cache, name).unwrap_or_else(|| {
        panic!(
            "{name} is not in {}/*/bin: build the lab's programs first (`make lab-binaries`), or name their directory \
             in GALLEONFS_LAB_BIN",
            cache.display()
        )
    })
}

fn cache() -> PathBuf {
    let set = |name: &str| env::var_os(name).filter(|value| !value.is_empty()).map(PathBuf::from);
    let root = set("GALLEONFS_CACHE")
        .or_else(|| set("XDG_CACHE_HOME").map(|shared| shared.join("galleonfs")))
        .or_else(|| set("HOME").map(|home| home.join(".cache/galleonfs")))
        .expect("GALLEONFS_CACHE or HOME is set");
    root.join("lab")
}

fn newest(cache: &Path, name: &str) -> Option<PathBuf> {
    let built = |path: &PathBuf| {
        path.metadata()
            .and_then(|found| found.modified())
            .unwrap_or(SystemTime::UNIX_EPOCH)
    };
    fs::read_dir(cache)
        .ok()?
        .flatten()
        .map(|entry| entry.path().join("bin").join(name))
        .filter(|path| path.is_file())
        .max_by_key(built)
}

/// What `helm template` says: the text, or what it complained about.
pub fn helm_template(settings: &[&str]) -> Result<String, String> {
    let mut helm = Command::new(lab_program("helm"));
    helm.args(["template", "galleonfs"])
        .arg(chart())
        .args(["--namespace", NAMESPACE]);
    for setting in settings {
        helm.args(["--set", setting]);
    }
    let output = helm.output().expect("helm starts");
    if output.status.success() {
        Ok(String::from_utf8(output.stdout).expect("helm writes UTF-8"))
    } else {
        Err(String::from_utf8_lossy(&output.stderr).into_owned())
    }
}

/// The chart's objects under these settings.
pub fn rendered(settings: &[&str]) -> Objects {
    Objects::parse(
        &helm_template(settings).unwrap_or_else(|complaint| panic!("helm template {settings:?}: {complaint}")),
    )
}

/// Objects of a multi-document YAML text.
#[derive(Debug)]
pub struct Objects(pub Vec<Value>);

impl Objects {
    pub fn parse(text: &str) -> Self {
        use serde::Deserialize;
        let documents = serde_yaml::Deserializer::from_str(text);
        let objects = documents.map(|document| Value::deserialize(document).expect("the text is YAML"));
        Self(objects.filter(|object| !object.is_null()).collect())
    }

    pub fn of_kind<'a>(&'a self, kind: &str) -> std::vec::IntoIter<&'a Value> {
        let found: Vec<&Value> = self.0.iter().filter(|object| object["kind"] == kind).collect();
        found.into_iter()
    }

    pub fn get<'a>(&'a self, kind: &str, name: &str) -> &'a Value {
        self.of_kind(kind)
            .find(|object| object["metadata"]["name"] == name)
            .unwrap_or_else(|| panic!("there is no {kind} {name}; there are {:?}", self.names(kind)))
    }

    pub fn names<'a>(&'a self, kind: &str) -> Vec<&'a str> {
        self.of_kind(kind)
            .filter_map(|object| object["metadata"]["name"].as_str())
            .collect()
    }
}

/// The strings of a list, in order.
pub fn strings(list: &Value) -> Vec<&str> {
    list.as_array()
        .into_iter()
        .flatten()
        .filter_map(Value::as_str)
        .collect()
}

/// The value of `--flag=value` among a container's arguments.
pub fn flag<'a>(container: &'a Value, name: &str) -> Option<&'a str> {
    strings(&container["args"])
        .into_iter()
        .find_map(|argument| argument.strip_prefix(name)?.strip_prefix('='))
}
