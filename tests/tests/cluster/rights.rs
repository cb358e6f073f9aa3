//! What a node plugin's credentials are good for, tried out with a real token.

use anyhow::{Context, Result, bail, ensure};
use galleonfs_tests::lab::Kubectl;
use galleonfs_tests::lab::layout::write_file;
use serde_json::{Value, json};

use super::world::World;

pub fn a_nodes_token_cannot_touch_another_nodes_objects(world: &World) -> Result<()> {
    let node = as_node_plugin(world, "node1")?;
    // Its own objects it may read and report on.
    let own = node.json(&["get", "storagepool", "default.node1"])?;
    let changed = |pool: &Value| {
        let mut pool = pool.clone();
        pool["status"]["usableBytes"] = json!(pool["status"]["usableBytes"].as_i64().unwrap_or_default() + 4096);
        pool.to_string()
    };
    replace_status(&node, &changed(&own)).context("a node could not report on its own pool")?;

    let other = world.system.json(&["get", "storagepool", "default.node2"])?;
    refused(replace_status(&node, &changed(&other)), "not an object of node node1")?;

    // A volume that is attached to another node cannot be taken over, nor its data declared elsewhere.
    let user = super::world::pod(
        "user",
        &["data"],
        galleonfs_tests::lab::images::BUSYBOX,
        false,
        Some("node2"),
    );
    world.claim("data", super::world::CLASS, "64Mi", "Filesystem")?;
    world.kubectl.apply(&user.to_string())?;
    world.kubectl.wait_ready("user", super::world::SOON)?;
    let mut volume = world.galleon_volume_of("data")?;
    let epoch = volume["status"]["config"]["epoch"]
        .as_i64()
        .context("the volume has no epoch")?;
    ensure!(
        volume["status"]["config"]["primary"] == "node2",
        "the primary is {}",
        volume["status"]["config"]["primary"]
    );
    volume["status"]["config"]["epoch"] = json!(epoch + 1);
    volume["status"]["config"]["primary"] = json!("node1");
    refused(
        replace_status(&node, &volume.to_string()),
        "not an object of node node1",
    )?;

    // What no node plugin ever does.
    refused(node.run(&["delete", "storagepool", "default.node1"]), "forbidden")?;
    refused(
        node.run(&[
            "delete",
            "galleonvolume",
            volume["metadata"]["name"].as_str().unwrap_or_default(),
        ]),
        "forbidden",
    )?;
    refused(node.run(&["get", "secrets", "--all-namespaces"]), "forbidden")?;
    refused(node.run(&["get", "nodes"]), "forbidden")?;
    refused(node.run(&["get", "pods", "--all-namespaces"]), "forbidden")
}

/// kubectl with a token as the kubelet gives it to the node plugin's pod: bound to the pod, and so to its node.
fn as_node_plugin(world: &World, node: &str) -> Result<Kubectl> {
    let plugin = world.plugin_on(&world.lab.node(node)?)?;
    let (name, uid) = (&plugin["metadata"]["name"], &plugin["metadata"]["uid"]);
    let (name, uid) = (name.as_str().context("no name")?, uid.as_str().context("no uid")?);
    let account = plugin["spec"]["serviceAccountName"]
        .as_str()
        .context("no service account")?;
    let bound = [
        "--bound-object-kind",
        "Pod",
        "--bound-object-name",
        name,
        "--bound-object-uid",
        uid,
    ];
    let token = world
        .system
        .run(&[&["create", "token", account], bound.as_slice()].concat())?;

    let admin: Value = serde_json::from_str(&std::fs::read_to_string(world.lab.kubeconfig())?)?;
    let config = json!({
        "apiVersion": "v1",
        "kind": "Config",
        "clusters": admin["clusters"],
        "users": [{"name": node, "user": {"token": token.trim()}}],
        "contexts": [{"name": "node", "context": {"cluster": admin["clusters"][0]["name"], "user": node}}],
        "current-context": "node",
    });
    let path = world.lab.layout().dir().join(format!("{node}-plugin.kubeconfig"));
    write_file(&path, config.to_string())?;
    let kubectl = Kubectl::new(world.lab.binaries().path("kubectl"), path);
    Ok(kubectl.in_namespace(galleonfs_tests::lab::install::NAMESPACE))
}

/// A PUT on the status: the way in which node plugins report.
fn replace_status(kubectl: &Kubectl, object: &str) -> Result<String> {
    let mut command = kubectl.command(&["replace", "--subresource=status", "-f", "-"]);
    galleonfs_tests::lab::run::output_with_input(&mut command, object.as_bytes())
}

fn refused(result: Result<String>, because: &str) -> Result<()> {
    match result {
        Ok(said) => bail!("this was allowed, and must be refused because it is {because:?}: {said}"),
        Err(error) => {
            let text = format!("{error:#}");
            ensure!(
                text.to_lowercase().contains(because),
                "refused, but not because it is {because:?}: {text}"
            );
            Ok(())
        }
    }
}
