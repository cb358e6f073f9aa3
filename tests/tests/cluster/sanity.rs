//! The CSI community's own conformance test, against the controller and the node plugin as they run in the cluster.

use std::collections::BTreeSet;
use std::fs;

use anyhow::{Context, Result, bail, ensure};
use galleonfs_tests::lab::layout::write_file;
use serde_json::{Value, json};

use super::world::{DRIVER, World};
use galleonfs_tests::lab::run::{self, wait_for};

/// Sizes that fit a node's disk beside everything else.
const VOLUME_BYTES: u64 = 64 << 20;
const EXPANDED_BYTES: u64 = 128 << 20;

pub fn csi_sanity_has_nothing_to_complain_about(world: &World) -> Result<()> {
    let pods = world
        .system
        .json(&["get", "pods", "-l", "app.kubernetes.io/component=controller"])?;
    let controller = pods["items"]
        .as_array()
        .and_then(|pods| pods.first())
        .context("there is no controller")?;
    let node = world.node_of(controller)?;
    let uid = controller["metadata"]["uid"]
        .as_str()
        .context("the controller has no uid")?;
    let controller = format!("/var/lib/kubelet/pods/{uid}/volumes/kubernetes.io~empty-dir/csi/csi.sock");
    let plugin = format!("/var/lib/kubelet/plugins/{DRIVER}/csi.sock");

    // The test knows nothing of topology: a pool that exists on one node alone keeps its volumes there.
    let path = "/var/lib/galleonfs/pools/sanity";
    node.shell(&format!("mkdir -p {path} /var/lib/kubelet/sanity"))?;
    let name = format!("sanity.{}", node.name());
    let pool = json!({
        "apiVersion": "galleonfs.io/v1alpha1",
        "kind": "StoragePool",
        "metadata": {"name": name},
        "spec": {"pool": "sanity", "nodeName": node.name(), "path": path, "media": "ssd"},
    });
    world.system.apply(&pool.to_string())?;
    wait_for("the pool to be ready", super::world::SOON, || {
        let pool: Value = world.system.json(&["get", "storagepool", &name])?;
        Ok(galleonfs_tests::lab::kubectl::condition(&pool, "Ready").then_some(()))
    })?;
    let parameters = world.lab.layout().dir().join("sanity.yaml");
    write_file(&parameters, "pool: sanity\n")?;
    let report = world.lab.layout().logs().join("sanity.json");

    let mut command = node.command(world.lab.binaries().path("csi-sanity"));
    command.args([
        format!("--csi.endpoint=unix://{plugin}"),
        format!("--csi.controllerendpoint=unix://{controller}"),
        "--csi.mountdir=/var/lib/kubelet/sanity/target".to_string(),
        "--csi.stagingdir=/var/lib/kubelet/sanity/staging".to_string(),
        format!("--csi.testvolumeparameters={}", parameters.display()),
        format!("--csi.testvolumesize={VOLUME_BYTES}"),
        format!("--csi.testvolumeexpandsize={EXPANDED_BYTES}"),
        "--ginkgo.no-color".to_string(),
        format!("--ginkgo.json-report={}", report.display()),
    ]);
    let said = run::output(&mut command);
    world.system.delete("storagepool", &name, super::world::SOON)?;
    let said = said?;
    let Some(summary) = said
        .lines()
        .rev()
        .find(|line| line.contains("Passed") && line.contains("Failed"))
    else {
        bail!("csi-sanity did not say how it went:\n{said}");
    };
    println!("    {}", summary.trim());

    let report: Value = serde_json::from_str(&fs::read_to_string(&report)?).context("csi-sanity's report")?;
    let page = fs::read_to_string(world.lab.layout().checkout().join("docs/testing.md"))?;
    let (skipped, explained) = (skipped(&report), explained(&page));
    let unexplained: Vec<_> = skipped.difference(&explained).collect();
    let outdated: Vec<_> = explained.difference(&skipped).collect();
    ensure!(
        unexplained.is_empty() && outdated.is_empty(),
        "docs/testing.md does not explain why csi-sanity skipped {unexplained:#?}; it explains {outdated:#?}, which was \
         not skipped"
    );
    Ok(())
}

/// Group and name of a test of csi-sanity.
type Skip = (String, String);

fn skipped(report: &Value) -> BTreeSet<Skip> {
    let specs = |suite: &Value| suite["SpecReports"].as_array().cloned().unwrap_or_default();
    let suites = report.as_array().into_iter().flatten();
    suites
        .flat_map(specs)
        .filter(|spec| spec["State"] == "skipped")
        .map(|spec| {
            let groups = spec["ContainerHierarchyTexts"].as_array().into_iter().flatten();
            let groups: Vec<&str> = groups.filter_map(Value::as_str).collect();
            let name = spec["LeafNodeText"].as_str().unwrap_or_default();
            (groups.join(" "), name.to_string())
        })
        .collect()
}

/// The rows of the page's only table of three columns below the heading `csi-sanity`.
fn explained(page: &str) -> BTreeSet<Skip> {
    page.lines()
        .skip_while(|line| *line != "### csi-sanity")
        .skip(1)
        .take_while(|line| !line.starts_with('#'))
        .filter_map(|line| {
            let cells: Vec<&str> = line.strip_prefix("| ")?.strip_suffix(" |")?.split(" | ").collect();
            match cells[..] {
                [_, group, name] if group != "csi-sanity's group" => Some((group.to_string(), name.to_string())),
                _ => None,
            }
        })
        .collect()
}
