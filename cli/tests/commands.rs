//! The command line as the chart and a person use it.

mod support;

use std::process::Command;

use clap::Parser;
use galleonfs_cli::{Arguments, Command as Asked};
use galleonfs_controller::ControllerConfig;
use galleonfs_node_plugin::NodeConfig;
use support::{rendered, strings};

/// Reads a container's arguments as the program would, with the variables that the container would have.
fn parsed(container: &serde_json::Value) -> Arguments {
    let mut words = vec!["galleonfs"];
    words.extend(strings(&container["args"]));
    // The environment is this process's own, so what the chart passes by variable is said by flag here.
    match container["name"].as_str() {
        Some("node") => words.extend(["--node-name=node-a", "--namespace=galleonfs-system"]),
        _ => words.extend(["--identity=galleonfs-controller-0", "--namespace=galleonfs-system"]),
    }
    Arguments::try_parse_from(words).unwrap_or_else(|complaint| panic!("{complaint}"))
}

#[test]
fn the_controller_understands_what_the_chart_tells_it() {
    let objects = rendered(&["pools.default.media=nvme"]);
    let pod = &objects.get("Deployment", "galleonfs-controller")["spec"]["template"]["spec"];
    let Asked::Controller(given) = parsed(&pod["containers"][0]).command else {
        panic!("the chart runs another command");
    };
    let config = ControllerConfig::from(given);
    assert_eq!(config.csi_socket.to_str(), Some("/csi/csi.sock"));
    assert!(config.leader_election);
    assert_eq!(config.node_service_account, "galleonfs-node");
    assert_eq!(config.health_address.map(|address| address.port()), Some(9809));
    assert_eq!(config.default_pools.len(), 1);
    assert_eq!(config.default_pools[0].path, "/var/lib/galleonfs/pools/default");
    assert_eq!(config.default_pools[0].media, galleonfs_api::MediaType::Nvme);

    let objects = rendered(&["pools.default.enabled=false"]);
    let pod = &objects.get("Deployment", "galleonfs-controller")["spec"]["template"]["spec"];
    let Asked::Controller(given) = parsed(&pod["containers"][0]).command else {
        panic!("the chart runs another command");
    };
    assert!(ControllerConfig::from(given).default_pools.is_empty());
}

#[test]
fn the_node_plugin_understands_what_the_chart_tells_it() {
    let settings = [
        "node.kubeletDir=/var/lib/k0s/kubelet/",
        "node.dataDir=/srv/galleonfs",
        "pools.default.path=/srv/galleonfs/pools/default",
        "node.mapBudgetMiB=64",
        "node.shards=3",
        "node.scrub.everyDays=2",
        "node.scrub.mibPerSecond=5",
        "node.healthPort=10000",
        "node.replicationPort=10001",
    ];
    let objects = rendered(&settings);
    let pod = &objects.get("DaemonSet", "galleonfs-node")["spec"]["template"]["spec"];
    let Asked::Node(given) = parsed(&pod["containers"][0]).command else {
        panic!("the chart runs another command");
    };
    let config = NodeConfig::from(given);
    let text = |path: &std::path::Path| path.display().to_string();
    assert_eq!(text(&config.kubelet_dir), "/var/lib/k0s/kubelet");
    assert_eq!(
        text(&config.socket),
        "/var/lib/k0s/kubelet/plugins/csi.galleonfs.io/csi.sock"
    );
    assert_eq!(config.socket, config.socket_on_host);
    assert_eq!(text(&config.registration_dir), "/var/lib/k0s/kubelet/plugins_registry");
    assert_eq!(text(&config.data_dir), "/srv/galleonfs");
    assert_eq!(text(&config.runtime_dir), "/run/galleonfs");
    assert_eq!(config.health_address.port(), 10000);
    assert_eq!(config.replication_address.port(), 10001);
    assert_eq!(config.shards, 3);
    assert_eq!(config.map_budget_bytes, 64 << 20);
    let scrub = config.scrub.expect("it is on");
    assert_eq!(
        (scrub.every.as_secs(), scrub.bytes_per_second),
        (2 * 24 * 3600, 5 << 20)
    );

    let objects = rendered(&["node.scrub.everyDays=0"]);
    let pod = &objects.get("DaemonSet", "galleonfs-node")["spec"]["template"]["spec"];
    let Asked::Node(given) = parsed(&pod["containers"][0]).command else {
        panic!("the chart runs another command");
    };
    assert_eq!(NodeConfig::from(given).scrub, None);
}

#[test]
fn probes_ask_for_pages_that_are_served() {
    let objects = rendered(&[]);
    for (kind, name) in [("Deployment", "galleonfs-controller"), ("DaemonSet", "galleonfs-node")] {
        let container = &objects.get(kind, name)["spec"]["template"]["spec"]["containers"][0];
        assert_eq!(container["livenessProbe"]["httpGet"]["path"], "/healthz", "{name}");
        assert_eq!(container["readinessProbe"]["httpGet"]["path"], "/readyz", "{name}");
    }
}

#[test]
fn a_command_that_makes_no_sense_is_refused_with_what_exists() {
    for (words, part) in [
        (&["nod"][..], "node"),
        (&["node", "--node-name=a", "--map-budget-mib=1"], "16 MiB"),
        (
            &["controller", "--default-pool=name=a,path=/a,media=tape"],
            "hdd, nvme, ssd",
        ),
        (&["controller", "--health-address=9809"], "health-address"),
        (&["check"], "<DIRECTORY>"),
        (&["--log-format=xml", "version"], "json"),
    ] {
        let mut galleonfs = Command::new(env!("CARGO_BIN_EXE_galleonfs"));
        let output = galleonfs
            .args(words)
            .env_remove("NODE_NAME")
            .output()
            .expect("galleonfs starts");
        let said = String::from_utf8_lossy(&output.stderr);
        assert_eq!(output.status.code(), Some(2), "{words:?}: {said}");
        assert!(said.contains(part), "{words:?}: {said}");
    }
}

#[test]
fn a_log_filter_that_cannot_be_read_is_refused_with_an_example() {
    let mut galleonfs = Command::new(env!("CARGO_BIN_EXE_galleonfs"));
    let output = galleonfs
        .args(["--log=info,=", "controller"])
        .output()
        .expect("galleonfs starts");
    let said = String::from_utf8_lossy(&output.stderr);
    assert_eq!(output.status.code(), Some(1), "{said}");
    assert!(said.contains("info,module=debug"), "{said}");
}

#[test]
fn the_version_and_the_definitions_are_printed() {
    let run = |word: &str| {
        let output = Command::new(env!("CARGO_BIN_EXE_galleonfs"))
            .arg(word)
            .output()
            .expect("galleonfs starts");
        assert!(output.status.success());
        String::from_utf8(output.stdout).expect("UTF-8")
    };
    assert_eq!(run("version"), format!("galleonfs {}\n", env!("CARGO_PKG_VERSION")));
    let printed = support::Objects::parse(&run("crds"));
    assert_eq!(
        printed.names("CustomResourceDefinition").len(),
        galleonfs_api::crds().len()
    );
}
