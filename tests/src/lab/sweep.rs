//! Removing what a lab leaves: its processes, mounts, devices, namespaces and files, however it ended.
//!
//! The order matters. Pods' programs go first and GalleonFS itself last, because taking a volume's server away under
//! a mounted file system makes its unmount slow and noisy. Everything removed is recognised by the lab's own marks
//! (records, environment, cgroup names, mount namespaces), never by a program's name.

use std::collections::BTreeSet;
use std::fs;
use std::path::Path;
use std::time::Duration;

use anyhow::{Context, Result};
use nix::mount::{MntFlags, umount2};
use nix::sys::signal::Signal;

use super::cgroups;
use super::layout::Layout;
use super::network;
use super::processes::{self, Process, Processes, all_pids};
use super::run;

/// Unmounting may hang on a device whose server is gone; then the namespaces' end has to do.
const UNMOUNT_PATIENCE: &str = "10";

/// Ends and removes everything of the lab except its logs.
pub fn sweep(layout: &Layout) -> Result<()> {
    let processes = Processes::new(layout);
    let names = processes.names();
    let of_kind = |kind: &str| {
        names
            .iter()
            .filter(|name| name.ends_with(kind))
            .cloned()
            .collect::<Vec<_>>()
    };

    // The kubelets first, or they would start again what is ended below.
    processes.stop_all(&of_kind("kubelet"), Duration::from_secs(3));
    let cgroup_prefix = format!("{}-node", layout.prefix());
    let node_cgroups = cgroups::names(&cgroup_prefix);
    let in_pods = || {
        node_cgroups
            .iter()
            .flat_map(|name| cgroups::processes(name, ""))
            .collect::<Vec<_>>()
    };
    let fuse_devices = fuse_devices(&in_pods().into_iter().chain(processes.descendants()).collect::<Vec<_>>());

    let (servers, guests): (Vec<_>, Vec<_>) = in_pods().into_iter().partition(|process| is_galleonfs(*process));
    processes::end(&guests, Duration::from_millis(500));
    for holder in of_kind("holder").iter().filter_map(|name| processes.find(name)) {
        unmount_volumes(holder);
    }
    processes::end(&servers, Duration::from_secs(5));
    detach_loops(&layout.dir(), &fuse_devices);

    processes.stop_all(&of_kind("containerd"), Duration::from_secs(3));
    // Followers before the API server, and that before etcd.
    for name in ["kube-scheduler", "kube-controller-manager", "kube-apiserver", "etcd"] {
        processes.stop(name, Duration::from_secs(5));
    }
    // What is left has lost its parent: containerd's shims, and whatever a crash left.
    for process in in_pods() {
        process.signal(Signal::SIGKILL);
    }
    processes::end(&processes.descendants(), Duration::from_millis(200));
    for name in names {
        processes.stop(&name, Duration::from_secs(1));
    }

    unmount_below(&layout.dir());
    // Once more for the nodes' own disks, which were in use until now.
    detach_loops(&layout.dir(), &fuse_devices);
    network::remove(&layout.prefix());
    for name in node_cgroups {
        cgroups::remove(&name);
    }
    remove_files(layout)
}

/// The program of ours that serves volumes, as opposed to the pods that use them.
fn is_galleonfs(process: Process) -> bool {
    fs::read_to_string(format!("/proc/{}/comm", process.pid)).is_ok_and(|name| name.trim() == "galleonfs")
}

/// Unmounts what pods had mounted from volumes, inside the node.
fn unmount_volumes(holder: Process) {
    let Ok(mounts) = fs::read_to_string(format!("/proc/{}/mountinfo", holder.pid)) else {
        return;
    };
    // Later mounts may lie on earlier ones.
    for point in mounts
        .lines()
        .rev()
        .filter_map(mount_point)
        .filter(|point| point.contains("kubernetes.io~csi") || point.contains("/globalmount"))
    {
        let pid = holder.pid.to_string();
        let arguments = [
            UNMOUNT_PATIENCE,
            "nsenter",
            "--mount",
            "--target",
            &pid,
            "--",
            "umount",
            point,
        ];
        run::ignore(&mut run::command("timeout", arguments));
    }
}

fn mount_point(line: &str) -> Option<&str> {
    line.split(' ').nth(4)
}

/// The device numbers of FUSE file systems that are mounted where these processes live.
pub(super) fn fuse_devices(processes: &[Process]) -> BTreeSet<String> {
    processes
        .iter()
        .filter_map(|process| fs::read_to_string(format!("/proc/{}/mountinfo", process.pid)).ok())
        .flat_map(|mounts| fuse_devices_in(&mounts))
        .collect()
}

fn fuse_devices_in(mounts: &str) -> Vec<String> {
    let fuse = |line: &&str| {
        line.split_once(" - ")
            .is_some_and(|(_, right)| right.starts_with("fuse"))
    };
    mounts
        .lines()
        .filter(fuse)
        .filter_map(|line| line.split(' ').nth(2))
        .map(str::to_string)
        .collect()
}

/// Takes down loop devices whose file lies below the lab's directory, was served by this lab's GalleonFS, or by one that
/// no longer exists anywhere.
pub(super) fn detach_loops(directory: &Path, ours: &BTreeSet<String>) {
    let Ok(listed) = run::output(&mut run::command(
        "losetup",
        [
            "--list",
            "--noheadings",
            "--raw",
            "--output",
            "NAME,BACK-MAJ:MIN,BACK-FILE",
        ],
    )) else {
        return;
    };
    let everywhere: BTreeSet<String> = all_pids()
        .into_iter()
        .filter_map(|pid| fs::read_to_string(format!("/proc/{pid}/mountinfo")).ok())
        .flat_map(|mounts| fuse_devices_in(&mounts))
        .collect();
    for line in listed.lines() {
        let mut fields = line.splitn(3, ' ');
        let (Some(device), Some(number), Some(file)) = (fields.next(), fields.next(), fields.next()) else {
            continue;
        };
        let orphan =
            file.contains("galleonfs") && number.starts_with("0:") && !everywhere.contains(number) && !answers(device);
        let disk = Path::new(file).starts_with(directory);
        if ours.contains(number) || orphan || disk {
            run::ignore(&mut run::command(
                "timeout",
                [UNMOUNT_PATIENCE, "losetup", "--detach", device],
            ));
        }
    }
}

/// Whether somebody still serves the device: a server may have hidden its mount, and must not lose its device to us.
fn answers(device: &str) -> bool {
    let input = format!("if={device}");
    let arguments = [
        UNMOUNT_PATIENCE,
        "dd",
        &input,
        "of=/dev/null",
        "iflag=direct",
        "bs=4096",
        "count=1",
    ];
    run::output(&mut run::command("timeout", arguments)).is_ok()
}

/// Mounts on this machine's side, e.g. of a lab whose nodes shared theirs.
fn unmount_below(directory: &Path) {
    let mounts = fs::read_to_string("/proc/self/mountinfo").unwrap_or_default();
    for point in mounts
        .lines()
        .rev()
        .filter_map(mount_point)
        .filter(|point| Path::new(point).starts_with(directory))
    {
        let _ = umount2(point, MntFlags::MNT_DETACH);
    }
}

fn remove_files(layout: &Layout) -> Result<()> {
    let Ok(entries) = fs::read_dir(layout.dir()) else {
        return Ok(());
    };
    for entry in entries {
        let path = entry?.path();
        if path == layout.logs() {
            continue;
        }
        let removed = if path.is_dir() {
            fs::remove_dir_all(&path)
        } else {
            fs::remove_file(&path)
        };
        removed.with_context(|| format!("could not remove {}", path.display()))?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn fuse_file_systems_are_found_by_their_device_number() {
        let mounts =
            "22 27 0:21 / /proc rw - proc proc rw\n90 27 0:55 / /run/x rw,nosuid shared:3 - fuse.galleonfs v rw\n";
        assert_eq!(fuse_devices_in(mounts), ["0:55"]);
    }
}
