//! `galleonfs check`, as a person runs it.

use std::{
    fs,
    path::{Path, PathBuf},
    process::{Command, Output},
};

use galleonfs_node_plugin::disk::{BlockSize, FormatSpec, format_replica};
use serde_json::Value;
use uuid::Uuid;

/// A place for one test, gone with it.
struct Place(PathBuf);

impl Place {
    fn new(name: &str) -> Self {
        let path = Path::new(env!("CARGO_TARGET_TMPDIR")).join(format!("check-{name}-{}", std::process::id()));
        let _ = fs::remove_dir_all(&path);
        fs::create_dir_all(&path).expect("a directory for the test");
        Self(path)
    }

    fn replica(&self) -> PathBuf {
        let directory = self.0.join("replica");
        let spec = FormatSpec {
            volume_uid: VOLUME,
            replica_uid: Uuid::from_u128(2),
            cluster_id: Uuid::from_u128(3),
            block_size: BlockSize::default(),
            size_bytes: 16 << 20,
            salt: 4,
            key: None,
        };
        format_replica(&directory, &spec).expect("a replica is made");
        directory
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(&self.0);
    }
}

const VOLUME: Uuid = Uuid::from_u128(1);

fn galleonfs(arguments: &[&str]) -> Output {
    Command::new(env!("CARGO_BIN_EXE_galleonfs"))
        .args(arguments)
        .output()
        .expect("galleonfs starts")
}

fn check(directory: &Path, more: &[&str]) -> Output {
    let directory = directory.to_str().expect("a plain path");
    galleonfs(&[&["check", directory], more].concat())
}

fn said(output: &Output) -> String {
    String::from_utf8_lossy(&output.stdout).into_owned() + &String::from_utf8_lossy(&output.stderr)
}

#[test]
fn a_new_replica_is_good() {
    let place = Place::new("new");
    let replica = place.replica();
    let output = check(&replica, &[]);
    assert!(output.status.success(), "{}", said(&output));
    assert!(said(&output).contains("good"), "{}", said(&output));

    let output = check(&replica, &["--json"]);
    let found: Value = serde_json::from_slice(&output.stdout).expect("the output is JSON");
    assert_eq!(found["good"], true);
    assert_eq!(found["volume"], VOLUME.to_string());
    assert_eq!(found["sizeBytes"], 16 << 20);
    let digest = found["digest"].as_str().expect("a digest of what it holds");
    assert_eq!(digest.len(), 64);
    assert!(said(&check(&replica, &[])).contains(digest));
}

#[test]
fn a_check_changes_nothing() {
    let place = Place::new("unchanged");
    let replica = place.replica();
    let listed = |directory: &Path| {
        let mut files: Vec<(PathBuf, Vec<u8>)> = [directory.to_owned(), directory.join("segments")]
            .iter()
            .flat_map(|folder| fs::read_dir(folder).expect("a folder").flatten())
            .filter(|entry| entry.path().is_file())
            .map(|entry| (entry.path(), fs::read(entry.path()).expect("a file")))
            .collect();
        files.sort();
        files
    };
    let before = listed(&replica);
    assert!(check(&replica, &[]).status.success());
    assert!(before == listed(&replica));
}

#[test]
fn one_damaged_superblock_is_a_problem_and_two_are_a_refusal() {
    let place = Place::new("damaged");
    let replica = place.replica();
    let damage = |name: &str| {
        let path = replica.join(name);
        let mut bytes = fs::read(&path).expect("a superblock");
        bytes[100] ^= 1;
        fs::write(path, bytes).expect("a damaged superblock");
    };
    damage("superblock.0");
    let output = check(&replica, &["--json"]);
    assert_eq!(output.status.code(), Some(1), "{}", said(&output));
    let found: Value = serde_json::from_slice(&output.stdout).expect("the output is JSON");
    assert_eq!(found["good"], false);
    assert_eq!(found["problems"].as_array().map(Vec::len), Some(1), "{found:#}");
    assert!(found["digest"].is_null(), "what is damaged is not compared: {found:#}");

    damage("superblock.1");
    let output = check(&replica, &[]);
    assert_eq!(output.status.code(), Some(1));
    assert!(said(&output).contains("damaged"), "{}", said(&output));
    assert!(said(&output).contains("keep a copy"), "{}", said(&output));
}

#[test]
fn a_replica_in_use_is_refused() {
    let place = Place::new("in-use");
    let replica = place.replica();
    let lock = fs::File::create(replica.join("lock")).expect("the lock file");
    lock.lock().expect("nobody else has it");
    let output = check(&replica, &[]);
    assert_eq!(output.status.code(), Some(1));
    assert!(said(&output).contains("in use by a node plugin"), "{}", said(&output));
}

#[test]
fn what_is_no_replica_is_refused_with_where_to_look_and_left_alone() {
    let place = Place::new("other");
    let output = check(&place.0, &[]);
    assert_eq!(output.status.code(), Some(1));
    assert!(said(&output).contains("<pool>/replicas/<uid>"), "{}", said(&output));
    assert_eq!(fs::read_dir(&place.0).expect("the directory").count(), 0);

    let output = check(&place.0.join("absent"), &[]);
    assert_eq!(output.status.code(), Some(1));
    assert!(said(&output).contains("absent"), "{}", said(&output));
}
