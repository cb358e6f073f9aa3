//! A node's corner of the cgroup tree, on machines with cgroup v1 and v2 alike.
//!
//! Each node's kubelet puts its pods below `/<prefix>-<node>`, which makes that name also the list of all processes
//! that the node's pods run.

use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};

use super::processes::Process;

const ROOT: &str = "/sys/fs/cgroup";

/// The mount points of all cgroup hierarchies.
fn hierarchies() -> Result<Vec<PathBuf>> {
    let mounts = fs::read_to_string("/proc/self/mountinfo").context("could not read the mounts")?;
    let found: Vec<PathBuf> = mounts
        .lines()
        .filter_map(|line| {
            let (left, right) = line.split_once(" - ")?;
            let kind = right.split(' ').next()?;
            let at = Path::new(left.split(' ').nth(4)?);
            (kind.starts_with("cgroup") && at.starts_with(ROOT)).then(|| at.to_path_buf())
        })
        .collect();
    Ok(found)
}

/// Makes the node's cgroup in every hierarchy; the kubelet insists that it exists.
pub fn create(name: &str) -> Result<()> {
    for hierarchy in hierarchies()? {
        let directory = hierarchy.join(name);
        if hierarchy == Path::new(ROOT) {
            let controllers = fs::read_to_string(hierarchy.join("cgroup.controllers")).unwrap_or_default();
            for controller in controllers.split_whitespace() {
                // One by one: a controller that cannot be handed down must not keep the others back.
                let _ = fs::write(hierarchy.join("cgroup.subtree_control"), format!("+{controller}"));
            }
        }
        fs::create_dir_all(&directory).with_context(|| format!("could not create {}", directory.display()))?;
        // On v1 a new cpuset is empty, and nothing can run in it.
        for file in ["cpuset.cpus", "cpuset.mems"] {
            let (from, to) = (hierarchy.join(file), directory.join(file));
            if let (Ok(value), true) = (fs::read_to_string(from), to.exists()) {
                let _ = fs::write(to, value.trim());
            }
        }
    }
    Ok(())
}

/// All cgroups of `name` whose path satisfies `wanted`, deepest first.
fn directories(name: &str, wanted: &dyn Fn(&str) -> bool) -> Vec<PathBuf> {
    fn collect(directory: &Path, found: &mut Vec<PathBuf>) {
        for entry in fs::read_dir(directory).into_iter().flatten().flatten() {
            if entry.file_type().is_ok_and(|kind| kind.is_dir()) {
                collect(&entry.path(), found);
            }
        }
        found.push(directory.to_path_buf());
    }
    let mut found = Vec::new();
    for hierarchy in hierarchies().unwrap_or_default() {
        let root = hierarchy.join(name);
        if root.is_dir() {
            collect(&root, &mut found);
        }
    }
    found.retain(|path| wanted(&path.to_string_lossy()));
    found
}

/// The processes of the node's pods, or of those whose cgroup's path contains `part` (a container's or pod's id).
pub fn processes(name: &str, part: &str) -> Vec<Process> {
    let mut pids: Vec<i32> = directories(name, &|path| path.contains(part))
        .into_iter()
        .filter_map(|directory| fs::read_to_string(directory.join("cgroup.procs")).ok())
        .flat_map(|text| text.lines().filter_map(|line| line.parse().ok()).collect::<Vec<i32>>())
        .collect();
    pids.sort_unstable();
    pids.dedup();
    pids.into_iter().filter_map(Process::of).collect()
}

/// The names of cgroups that start with `prefix`, whichever lab left them.
pub fn names(prefix: &str) -> Vec<String> {
    let mut names: Vec<String> = hierarchies()
        .unwrap_or_default()
        .into_iter()
        .flat_map(|hierarchy| fs::read_dir(hierarchy).into_iter().flatten().flatten())
        .filter_map(|entry| entry.file_name().into_string().ok())
        .filter(|name| name.starts_with(prefix))
        .collect();
    names.sort();
    names.dedup();
    names
}

pub fn remove(name: &str) {
    for directory in directories(name, &|_| true) {
        let _ = fs::remove_dir(directory);
    }
}
