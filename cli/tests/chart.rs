//! The chart as it is rendered: what must be in it, what must never be, and which values it refuses.

mod support;

use std::{collections::BTreeMap, fs, process::Command};

use galleonfs_api::{ClassParameters, DRIVER_NAME};
use serde_json::{Value, json};
use support::{Objects, chart, flag, helm_template, lab_program, project, rendered, strings};

/// The containers of a workload, with what is needed of the pod around them.
fn pod(workload: &Value) -> &Value {
    &workload["spec"]["template"]["spec"]
}

#[test]
fn the_definitions_in_the_chart_are_those_of_the_code() {
    let directory = chart().join("files/crds");
    let wanted: BTreeMap<String, String> = galleonfs_cli::crd_yaml()
        .expect("the definitions are YAML")
        .into_iter()
        .collect();
    let found: BTreeMap<String, String> = fs::read_dir(&directory)
        .expect("the chart has definitions")
        .map(|entry| {
            let entry = entry.expect("the directory can be read");
            let text = fs::read_to_string(entry.path()).expect("a definition can be read");
            (entry.file_name().into_string().expect("a plain name"), text)
        })
        .collect();
    assert_eq!(
        found.keys().collect::<Vec<_>>(),
        wanted.keys().collect::<Vec<_>>(),
        "run `cargo run -p galleonfs -- crds --output charts/galleonfs/files/crds`, and remove what is no more"
    );
    for (name, text) in wanted {
        assert!(
            found[&name] == text,
            "{name} is not what the code says: run `cargo run -p galleonfs -- crds --output charts/galleonfs/files/crds`"
        );
    }
}

#[test]
fn definitions_are_rendered_unchanged_but_for_outliving_the_release() {
    let objects = rendered(&[]);
    for crd in galleonfs_api::crds() {
        let mut wanted = serde_json::to_value(&crd).expect("a definition is JSON");
        wanted["metadata"]["annotations"] = json!({"helm.sh/resource-policy": "keep"});
        let name = wanted["metadata"]["name"].as_str().expect("named").to_owned();
        assert!(
            objects.get("CustomResourceDefinition", &name) == &wanted,
            "{name} is not rendered as the code says"
        );
    }
    assert!(
        rendered(&["crds.install=false"])
            .names("CustomResourceDefinition")
            .is_empty()
    );
}

#[test]
fn helm_finds_nothing_to_complain_about() {
    let output = Command::new(lab_program("helm"))
        .args(["lint", "--strict"])
        .arg(chart())
        .output()
        .expect("helm starts");
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stdout));
}

#[test]
fn a_node_runs_one_container_of_ours_and_nothing_else() {
    let objects = rendered(&[]);
    assert_eq!(objects.names("DaemonSet"), ["galleonfs-node"]);
    let pod = pod(objects.get("DaemonSet", "galleonfs-node"));
    assert_eq!(pod["containers"].as_array().map(Vec::len), Some(1));
    assert_eq!(pod["initContainers"], Value::Null);
    assert_eq!(pod["hostNetwork"], Value::Null);
    assert_eq!(pod["hostPID"], Value::Null);
    assert_eq!(pod["priorityClassName"], "system-node-critical");
}

#[test]
fn mounts_of_a_node_plugin_reach_the_host_and_survive_it() {
    let objects = rendered(&[
        "node.extraPoolDirs={/mnt/nvme0}",
        "node.kubeletDir=/var/lib/k0s/kubelet",
    ]);
    let pod = pod(objects.get("DaemonSet", "galleonfs-node"));
    let mounts: BTreeMap<&str, &str> = pod["containers"][0]["volumeMounts"]
        .as_array()
        .into_iter()
        .flatten()
        .map(|mount| {
            let propagation = mount["mountPropagation"].as_str().unwrap_or("None");
            (mount["mountPath"].as_str().expect("a path"), propagation)
        })
        .collect();
    let wanted = [
        ("/dev", "None"),
        ("/mnt/nvme0", "HostToContainer"),
        ("/run/galleonfs", "Bidirectional"),
        ("/var/lib/galleonfs", "HostToContainer"),
        ("/var/lib/k0s/kubelet", "Bidirectional"),
    ];
    assert_eq!(mounts, wanted.into());
    let hosts: Vec<&str> = pod["volumes"]
        .as_array()
        .into_iter()
        .flatten()
        .filter_map(|v| v["hostPath"]["path"].as_str())
        .collect();
    let mut inside: Vec<&str> = mounts.into_keys().collect();
    inside.sort_unstable();
    let mut outside = hosts;
    outside.sort_unstable();
    assert_eq!(
        inside, outside,
        "a path means the same inside and outside the container"
    );
}

/// The rows of Pod Security `restricted`.
fn assert_restricted(pod: &Value, what: &str) {
    for forbidden in ["hostNetwork", "hostPID", "hostIPC"] {
        assert_eq!(pod[forbidden], Value::Null, "{what}: {forbidden}");
    }
    assert_eq!(pod["securityContext"]["runAsNonRoot"], true, "{what}");
    assert_ne!(pod["securityContext"]["runAsUser"], 0, "{what}");
    assert_eq!(
        pod["securityContext"]["seccompProfile"]["type"], "RuntimeDefault",
        "{what}"
    );
    for volume in pod["volumes"].as_array().into_iter().flatten() {
        assert_eq!(volume["hostPath"], Value::Null, "{what}: {volume}");
    }
    for container in pod["containers"].as_array().into_iter().flatten() {
        let context = &container["securityContext"];
        assert_eq!(
            context["allowPrivilegeEscalation"], false,
            "{what}: {}",
            container["name"]
        );
        assert_eq!(
            context["capabilities"]["drop"],
            json!(["ALL"]),
            "{what}: {}",
            container["name"]
        );
        assert_eq!(
            context["capabilities"]["add"],
            Value::Null,
            "{what}: {}",
            container["name"]
        );
        assert_eq!(context["privileged"], Value::Null, "{what}: {}", container["name"]);
        assert_eq!(context["readOnlyRootFilesystem"], true, "{what}: {}", container["name"]);
        for port in container["ports"].as_array().into_iter().flatten() {
            assert_eq!(port["hostPort"], Value::Null, "{what}: {}", container["name"]);
        }
    }
}

#[test]
fn only_the_node_plugin_needs_more_than_pod_security_restricted() {
    let objects = rendered(&[]);
    assert_restricted(pod(objects.get("Deployment", "galleonfs-controller")), "the controller");
    for test in objects.of_kind("Pod") {
        assert_restricted(&test["spec"], "a test's pod");
    }
    let node = pod(objects.get("DaemonSet", "galleonfs-node"));
    assert_eq!(node["containers"][0]["securityContext"]["privileged"], true);
}

#[test]
fn the_controllers_pod_is_the_controller_and_three_sidecars_that_elect_a_leader() {
    let objects = rendered(&[]);
    let pod = pod(objects.get("Deployment", "galleonfs-controller"));
    let containers = pod["containers"].as_array().expect("containers");
    let names: Vec<&str> = containers.iter().filter_map(|c| c["name"].as_str()).collect();
    assert_eq!(names, ["controller", "csi-provisioner", "csi-attacher", "csi-resizer"]);
    for sidecar in &containers[1..] {
        assert!(strings(&sidecar["args"]).contains(&"--leader-election"), "{sidecar:#}");
        assert_eq!(flag(sidecar, "--csi-address"), flag(&containers[0], "--csi-socket"));
    }
    let provisioner = strings(&containers[1]["args"]);
    for wanted in [
        "--enable-capacity",
        "--capacity-ownerref-level=2",
        "--extra-create-metadata",
        "--strict-topology",
        "--immediate-topology=false",
    ] {
        assert!(provisioner.contains(&wanted), "{wanted} is not among {provisioner:?}");
    }
    let environment: Vec<&str> = containers[1]["env"]
        .as_array()
        .into_iter()
        .flatten()
        .filter_map(|e| e["name"].as_str())
        .collect();
    assert_eq!(environment, ["POD_NAME", "NAMESPACE", "POD_NAMESPACE"]);
}

#[test]
fn the_driver_object_says_what_the_driver_does() {
    let objects = rendered(&[]);
    assert_eq!(
        objects.get("CSIDriver", DRIVER_NAME)["spec"],
        json!({
            "attachRequired": true,
            "podInfoOnMount": true,
            "storageCapacity": true,
            "fsGroupPolicy": "File",
            "seLinuxMount": true,
            "requiresRepublish": false,
            "volumeLifecycleModes": ["Persistent"],
            "nodeAllocatableUpdatePeriodSeconds": 60,
        })
    );
}

#[test]
fn classes_that_this_release_refuses_are_rendered_only_when_asked_for() {
    let ready = ["distributed", "fast-local-ssd", "galleonfs", "local-hdd"];
    let names = |objects: &Objects| {
        let mut names: Vec<String> = objects.names("StorageClass").into_iter().map(str::to_owned).collect();
        names.sort_unstable();
        names
    };
    assert_eq!(names(&rendered(&[])), ready);
    assert_eq!(
        names(&rendered(&["storageClasses.unreleased=true"])),
        [
            "distributed",
            "encrypted-storage",
            "fast-local-ssd",
            "galleonfs",
            "local-hdd"
        ]
    );
    assert!(names(&rendered(&["storageClasses.create=false"])).is_empty());
}

#[test]
fn ready_classes_are_accepted_by_the_controller_and_the_others_are_refused_as_not_there_yet() {
    for class in rendered(&["storageClasses.unreleased=true"]).of_kind("StorageClass") {
        let parameters: BTreeMap<String, String> =
            serde_json::from_value(class["parameters"].clone()).expect("parameters are strings");
        let name = class["metadata"]["name"].as_str().expect("named");
        let parsed = ClassParameters::parse(parameters.iter().map(|(key, value)| (key.as_str(), value.as_str())));
        match (parsed, name) {
            (Ok(class), "distributed") => assert_eq!(class.replica_count, 3),
            (Ok(class), "galleonfs" | "fast-local-ssd" | "local-hdd") => assert_eq!(class.replica_count, 1),
            (Err(refusal), "encrypted-storage") => {
                assert!(refusal.to_string().contains("this release"), "{name}: {refusal}");
            }
            (parsed, _) => panic!("{name}: {parsed:?}"),
        }
    }
}

#[test]
fn classes_bind_where_the_pod_goes_and_are_nobodys_default_unless_chosen() {
    let default_of = |objects: &Objects| -> Vec<String> {
        let chosen = objects
            .of_kind("StorageClass")
            .filter(|class| class["metadata"]["annotations"]["storageclass.kubernetes.io/is-default-class"] == "true");
        chosen
            .map(|class| class["metadata"]["name"].as_str().expect("named").to_owned())
            .collect()
    };
    let objects = rendered(&["storageClasses.unreleased=true"]);
    for class in objects.of_kind("StorageClass") {
        assert_eq!(class["provisioner"], DRIVER_NAME);
        assert_eq!(class["volumeBindingMode"], "WaitForFirstConsumer");
        assert_eq!(class["allowVolumeExpansion"], true);
        assert_eq!(class["reclaimPolicy"], "Delete");
    }
    assert!(default_of(&objects).is_empty());
    assert_eq!(
        default_of(&rendered(&["storageClasses.default=galleonfs"])),
        ["galleonfs"]
    );
    let retained = rendered(&["storageClasses.reclaimPolicy=Retain"]);
    assert!(
        retained
            .of_kind("StorageClass")
            .all(|class| class["reclaimPolicy"] == "Retain")
    );
}

#[test]
fn the_admission_policy_is_on_and_refuses_when_it_cannot_decide() {
    let objects = rendered(&[]);
    let name = "galleonfs-node-keeps-to-its-own";
    let policy = objects.get("ValidatingAdmissionPolicy", name);
    assert_eq!(policy["spec"]["failurePolicy"], "Fail");
    let asked_by = policy["spec"]["matchConditions"][0]["expression"]
        .as_str()
        .expect("a condition");
    assert!(
        asked_by.contains("'system:serviceaccount:galleonfs-system:galleonfs-node'"),
        "{asked_by}"
    );
    let account = pod(objects.get("DaemonSet", "galleonfs-node"))["serviceAccountName"].as_str();
    assert_eq!(
        account,
        Some("galleonfs-node"),
        "the policy is about the account that the node plugin runs as"
    );
    let rule = &policy["spec"]["matchConstraints"]["resourceRules"][0];
    assert_eq!(rule["apiGroups"], json!(["galleonfs.io"]));
    assert_eq!(rule["operations"], json!(["CREATE", "UPDATE", "DELETE"]));
    assert_eq!(rule["resources"], json!(["*/*"]));
    let binding = objects.get("ValidatingAdmissionPolicyBinding", name);
    assert_eq!(binding["spec"]["policyName"], name);
    assert!(strings(&binding["spec"]["validationActions"]).contains(&"Deny"));
}

#[test]
fn everything_with_a_namespace_is_in_the_releases_own() {
    let settings = [
        "controller.replicas=2",
        "networkPolicy.enabled=true",
        "metrics.service.enabled=true",
    ];
    let global = [
        "CSIDriver",
        "ClusterRole",
        "ClusterRoleBinding",
        "CustomResourceDefinition",
        "StorageClass",
        "ValidatingAdmissionPolicy",
        "ValidatingAdmissionPolicyBinding",
    ];
    for object in rendered(&settings).0 {
        let kind = object["kind"].as_str().expect("a kind");
        let wanted = if global.contains(&kind) {
            Value::Null
        } else {
            json!(support::NAMESPACE)
        };
        assert_eq!(
            object["metadata"]["namespace"], wanted,
            "{kind} {}",
            object["metadata"]["name"]
        );
    }
}

#[test]
fn values_that_make_no_sense_are_refused_with_the_reason() {
    let refused = [
        ("controller.replicas=0", "replicas"),
        ("controller.replicas=two", "replicas"),
        ("controller.capacityPollInterval=soon", "capacityPollInterval"),
        ("controller.replacementDelay=600", "replacementDelay"),
        ("contoller.replicas=2", "contoller"),
        ("image.pullPolicy=Sometimes", "pullPolicy"),
        ("image.repository=", "repository"),
        ("log.format=xml", "format"),
        ("node.kubeletDir=var/lib/kubelet", "kubeletDir"),
        ("node.dataDir=/", "dataDir"),
        ("node.dataDir=/var/../etc", "dataDir"),
        ("node.healthPort=80", "healthPort"),
        ("node.replicationPort=0", "replicationPort"),
        ("node.mapBudgetMiB=1", "mapBudgetMiB"),
        ("node.scrub.everyDays=-1", "everyDays"),
        ("node.scrub.mibPerSecond=0", "mibPerSecond"),
        ("node.updateStrategy.type=Recreate", "updateStrategy"),
        ("pools.default.media=tape", "media"),
        ("pools.default.name=Default_Pool", "name"),
        ("pools.default.path=/srv/pool", "outside node.dataDir"),
        ("sidecars.attacher.image=csi-attacher", "image"),
        ("sidecars.attacher.extraArgs={worker-threads=1}", "extraArgs"),
        ("storageClasses.default=gold", "default"),
        ("storageClasses.reclaimPolicy=Recycle", "reclaimPolicy"),
        ("tests.size=64", "size"),
    ];
    for (setting, word) in refused {
        match helm_template(&[setting]) {
            Ok(_) => panic!("{setting} was accepted"),
            Err(complaint) => assert!(complaint.contains(word), "{setting}: {complaint}"),
        }
    }
}

#[test]
fn every_value_is_in_the_schema_and_in_the_documentation() {
    let values: Value =
        serde_yaml::from_str(&fs::read_to_string(chart().join("values.yaml")).expect("values.yaml")).expect("YAML");
    let schema: Value =
        serde_json::from_str(&fs::read_to_string(chart().join("values.schema.json")).expect("the schema"))
            .expect("JSON");
    let documented = fs::read_to_string(project().join("docs/chart.md")).expect("docs/chart.md");
    let mut paths = Vec::new();
    leaves("", &values, &schema["properties"], &schema["definitions"], &mut paths);
    for path in paths {
        assert!(
            documented.contains(&format!("`{path}`")),
            "docs/chart.md does not explain `{path}`"
        );
    }
}

/// Walks the values as deep as the schema names keys, and collects the paths where it stops.
fn leaves(prefix: &str, values: &Value, properties: &Value, definitions: &Value, paths: &mut Vec<String>) {
    for (key, value) in values.as_object().expect("values are a tree") {
        let path = if prefix.is_empty() {
            key.clone()
        } else {
            format!("{prefix}.{key}")
        };
        let mut schema = &properties[key];
        assert!(!schema.is_null(), "values.schema.json does not know {path}");
        if let Some(name) = schema["$ref"]
            .as_str()
            .and_then(|reference| reference.strip_prefix("#/definitions/"))
        {
            schema = &definitions[name];
        }
        if value.is_object()
            && schema["properties"].is_object()
            && !path.ends_with("resources")
            && !path.ends_with("updateStrategy")
        {
            leaves(&path, value, &schema["properties"], definitions, paths);
        } else {
            paths.push(path);
        }
    }
}

#[test]
fn the_plain_manifests_are_the_chart_rendered() {
    let path = project().join("deploy/manifests/galleonfs.yaml");
    let found = fs::read_to_string(&path).expect("the manifests can be read");
    assert!(
        found == plain_manifests(),
        "{} is not what the chart renders: run `cargo test -p galleonfs --test chart -- --ignored write_the_plain_manifests`",
        path.display()
    );
}

#[test]
#[ignore = "writes deploy/manifests/galleonfs.yaml"]
fn write_the_plain_manifests() {
    fs::write(project().join("deploy/manifests/galleonfs.yaml"), plain_manifests())
        .expect("the manifests can be written");
}

/// The chart with its defaults, the namespace before it, without what only helm runs.
fn plain_manifests() -> String {
    let text = helm_template(&[]).unwrap_or_else(|complaint| panic!("{complaint}"));
    let mut manifests = String::from(concat!(
        "# GalleonFS without helm: kubectl apply --server-side -f galleonfs.yaml\n",
        "# Rendered from charts/galleonfs with its default values; a test holds the two equal.\n",
        "---\n",
        "apiVersion: v1\n",
        "kind: Namespace\n",
        "metadata:\n",
        "  name: galleonfs-system\n",
        "  labels:\n",
        "    # The node plugin mounts for the host; all other pods keep to `restricted`.\n",
        "    pod-security.kubernetes.io/enforce: privileged\n",
        "    pod-security.kubernetes.io/audit: restricted\n",
        "    pod-security.kubernetes.io/warn: restricted\n",
    ));
    for document in text
        .split("\n---\n")
        .map(|document| document.trim_start_matches("---\n").trim())
    {
        if document.is_empty() || document.contains("helm.sh/hook: test") {
            continue;
        }
        manifests.push_str("---\n");
        manifests.push_str(&document.replace(
            "app.kubernetes.io/managed-by: Helm",
            "app.kubernetes.io/managed-by: kubectl",
        ));
        manifests.push('\n');
    }
    manifests
}
