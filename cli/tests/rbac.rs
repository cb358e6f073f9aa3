//! What each program of GalleonFS may do in a cluster, word for word. A right that is added to the chart fails here
//! until somebody adds it to this table too, with its reason in docs/chart.md.

mod support;

use std::collections::{BTreeMap, BTreeSet};

use serde_json::Value;
use support::{NAMESPACE, rendered, strings};

/// API group, resources, the only object names it is for (none: any), verbs.
type Rule = (
    &'static str,
    &'static [&'static str],
    &'static [&'static str],
    &'static [&'static str],
);

const READ: &[&str] = &["get", "list", "watch"];

/// Kind and name of the role, the account that holds it, its rules.
const GRANTS: &[(&str, &str, &str, &[Rule])] = &[
    (
        "ClusterRole",
        "galleonfs-controller",
        "galleonfs-controller",
        &[
            ("", &["namespaces"], &["kube-system"], &["get"]),
            ("", &["nodes"], &[], READ),
            ("storage.k8s.io", &["csinodes"], &[], &["list", "watch"]),
        ],
    ),
    (
        "Role",
        "galleonfs-controller",
        "galleonfs-controller",
        &[
            (
                "galleonfs.io",
                &["galleonvolumes", "galleonreplicas", "storagepools"],
                &[],
                &["get", "list", "watch", "create", "update", "delete"],
            ),
            ("galleonfs.io", &["galleonvolumes/status"], &[], &["update", "patch"]),
            ("galleonfs.io", &["storagepools/status"], &[], &["update"]),
            ("coordination.k8s.io", &["leases"], &[], &["create"]),
            (
                "coordination.k8s.io",
                &["leases"],
                &["galleonfs-controller"],
                &["get", "update"],
            ),
            ("", &["secrets", "configmaps"], &[], &["create"]),
            (
                "",
                &["secrets", "configmaps"],
                &["galleonfs-node-ca"],
                &["get", "update"],
            ),
        ],
    ),
    (
        "ClusterRole",
        "galleonfs-certificates",
        "galleonfs-controller",
        &[
            ("certificates.k8s.io", &["certificatesigningrequests"], &[], READ),
            (
                "certificates.k8s.io",
                &[
                    "certificatesigningrequests/approval",
                    "certificatesigningrequests/status",
                ],
                &[],
                &["update"],
            ),
            (
                "certificates.k8s.io",
                &["signers"],
                &["galleonfs.io/node"],
                &["approve", "sign"],
            ),
        ],
    ),
    (
        "Role",
        "galleonfs-sidecars",
        "galleonfs-controller",
        &[
            (
                "coordination.k8s.io",
                &["leases"],
                &[
                    "csi-galleonfs-io",
                    "external-attacher-leader-csi-galleonfs-io",
                    "external-resizer-csi-galleonfs-io",
                ],
                &["get", "update"],
            ),
            (
                "storage.k8s.io",
                &["csistoragecapacities"],
                &[],
                &["list", "watch", "create", "update", "delete"],
            ),
            ("", &["pods"], &[], &["get"]),
            ("apps", &["replicasets"], &[], &["get"]),
        ],
    ),
    (
        "ClusterRole",
        "galleonfs-provisioner",
        "galleonfs-controller",
        &[
            (
                "",
                &["persistentvolumes"],
                &[],
                &["list", "watch", "create", "patch", "delete"],
            ),
            ("", &["persistentvolumeclaims"], &[], &["list", "watch", "update"]),
            ("", &["nodes"], &[], &["list", "watch"]),
            (
                "storage.k8s.io",
                &["storageclasses", "csinodes", "volumeattachments"],
                &[],
                &["list", "watch"],
            ),
            ("", &["events"], &[], &["create", "patch"]),
        ],
    ),
    (
        "ClusterRole",
        "galleonfs-attacher",
        "galleonfs-controller",
        &[
            ("", &["persistentvolumes"], &[], &["list", "watch", "patch"]),
            ("storage.k8s.io", &["csinodes"], &[], &["list", "watch"]),
            (
                "storage.k8s.io",
                &["volumeattachments"],
                &[],
                &["list", "watch", "patch"],
            ),
            ("storage.k8s.io", &["volumeattachments/status"], &[], &["patch"]),
        ],
    ),
    (
        "ClusterRole",
        "galleonfs-resizer",
        "galleonfs-controller",
        &[
            ("", &["persistentvolumes"], &[], &["list", "watch", "patch"]),
            ("", &["persistentvolumeclaims"], &[], &["list", "watch"]),
            ("", &["persistentvolumeclaims/status"], &[], &["patch"]),
            ("", &["events"], &[], &["create", "patch"]),
        ],
    ),
    (
        "ClusterRole",
        "galleonfs-node",
        "galleonfs-node",
        &[
            ("", &["namespaces"], &["kube-system"], &["get"]),
            ("", &["nodes"], &[], &["get"]),
            (
                "certificates.k8s.io",
                &["certificatesigningrequests"],
                &[],
                &["get", "create"],
            ),
            ("authentication.k8s.io", &["selfsubjectreviews"], &[], &["create"]),
        ],
    ),
    (
        "Role",
        "galleonfs-node",
        "galleonfs-node",
        &[
            (
                "galleonfs.io",
                &["galleonvolumes", "galleonreplicas", "storagepools"],
                &[],
                READ,
            ),
            ("galleonfs.io", &["galleonreplicas"], &[], &["patch"]),
            (
                "galleonfs.io",
                &["galleonvolumes/status", "galleonreplicas/status", "storagepools/status"],
                &[],
                &["update"],
            ),
            ("events.k8s.io", &["events"], &[], &["create", "patch"]),
            ("", &["configmaps"], &["galleonfs-node-ca"], &["get"]),
        ],
    ),
];

/// (group, resource, object name or "", verb): rules that grant the same are equal however they are written.
type Atom = (String, String, String, String);

fn atoms(groups: &[&str], resources: &[&str], names: &[&str], verbs: &[&str]) -> BTreeSet<Atom> {
    let names = if names.is_empty() { &[""] } else { names };
    let mut atoms = BTreeSet::new();
    for group in groups {
        for resource in resources {
            for name in names {
                for verb in verbs {
                    atoms.insert((
                        group.to_string(),
                        resource.to_string(),
                        name.to_string(),
                        verb.to_string(),
                    ));
                }
            }
        }
    }
    atoms
}

fn atoms_of_rule(rule: &Value) -> BTreeSet<Atom> {
    let known = ["apiGroups", "resources", "resourceNames", "verbs"];
    let unknown: Vec<_> = rule
        .as_object()
        .expect("a rule is an object")
        .keys()
        .filter(|k| !known.contains(&k.as_str()))
        .collect();
    assert!(
        unknown.is_empty(),
        "a rule grants something this test cannot read: {unknown:?}"
    );
    atoms(
        &strings(&rule["apiGroups"]),
        &strings(&rule["resources"]),
        &strings(&rule["resourceNames"]),
        &strings(&rule["verbs"]),
    )
}

#[test]
fn the_rights_in_the_chart_are_exactly_those_in_this_table() {
    let objects = rendered(&[]);
    let mut found = BTreeMap::new();
    for kind in ["Role", "ClusterRole"] {
        for role in objects.of_kind(kind) {
            assert_eq!(
                role["aggregationRule"],
                Value::Null,
                "an aggregated role takes rights from elsewhere"
            );
            let rules = role["rules"].as_array().expect("a role has rules");
            let atoms: BTreeSet<Atom> = rules.iter().flat_map(atoms_of_rule).collect();
            found.insert(
                (
                    kind.to_owned(),
                    role["metadata"]["name"].as_str().expect("named").to_owned(),
                ),
                atoms,
            );
        }
    }
    let wanted: BTreeMap<_, BTreeSet<Atom>> = GRANTS
        .iter()
        .map(|(kind, name, _, rules)| {
            let atoms = rules
                .iter()
                .flat_map(|(group, resources, names, verbs)| atoms(&[group], resources, names, verbs))
                .collect();
            ((kind.to_string(), name.to_string()), atoms)
        })
        .collect();
    assert_eq!(found.keys().collect::<Vec<_>>(), wanted.keys().collect::<Vec<_>>());
    for (role, wanted) in &wanted {
        let found = &found[role];
        let widened: Vec<_> = found.difference(wanted).collect();
        let missing: Vec<_> = wanted.difference(found).collect();
        assert!(
            widened.is_empty() && missing.is_empty(),
            "{} {}: granted beyond the table: {widened:?}; in the table but not granted: {missing:?}",
            role.0,
            role.1
        );
    }
}

#[test]
fn each_role_is_bound_to_one_account_of_the_release_and_to_nobody_else() {
    let objects = rendered(&[]);
    let mut found = BTreeSet::new();
    for kind in ["RoleBinding", "ClusterRoleBinding"] {
        for binding in objects.of_kind(kind) {
            let role = &binding["roleRef"];
            assert_eq!(kind, format!("{}Binding", role["kind"].as_str().expect("a kind")));
            let subjects = binding["subjects"].as_array().expect("a binding has subjects");
            assert_eq!(subjects.len(), 1, "{binding:#}");
            assert_eq!(subjects[0]["kind"], "ServiceAccount");
            assert_eq!(subjects[0]["namespace"], NAMESPACE);
            let word = |value: &Value| value.as_str().expect("a name").to_owned();
            found.insert((word(&role["kind"]), word(&role["name"]), word(&subjects[0]["name"])));
        }
    }
    let wanted = GRANTS
        .iter()
        .map(|(kind, name, account, _)| (kind.to_string(), name.to_string(), account.to_string()));
    assert_eq!(found, wanted.collect());
}

#[test]
fn nobody_may_read_a_secret_but_the_controller_its_own_or_use_wildcards_or_grant_rights() {
    let settings = [
        "controller.replicas=3",
        "networkPolicy.enabled=true",
        "storageClasses.unreleased=true",
    ];
    for settings in [&[][..], &settings] {
        let objects = rendered(settings);
        for role in objects.of_kind("Role").chain(objects.of_kind("ClusterRole")) {
            for (group, resource, object, verb) in
                role["rules"].as_array().into_iter().flatten().flat_map(atoms_of_rule)
            {
                let name = &role["metadata"]["name"];
                // Creating cannot be narrowed to a name, and shows nobody anything.
                let its_own = name == "galleonfs-controller" && (object == "galleonfs-node-ca" || verb == "create");
                assert!(!resource.starts_with("secrets") || its_own, "{name} reaches secrets");
                assert!(
                    ![&group, &resource, &verb].iter().any(|word| word.contains('*')),
                    "{name} has a wildcard"
                );
                assert_ne!(group, "rbac.authorization.k8s.io", "{name} reaches roles");
                assert!(
                    !["escalate", "bind", "impersonate"].contains(&verb.as_str()),
                    "{name} may {verb}"
                );
            }
        }
    }
}

#[test]
fn what_is_ours_is_granted_in_our_namespace_only() {
    let objects = rendered(&[]);
    for role in objects.of_kind("ClusterRole") {
        let ours = role["rules"].as_array().into_iter().flatten().flat_map(atoms_of_rule);
        assert_eq!(
            ours.filter(|(group, ..)| group == "galleonfs.io").count(),
            0,
            "{role:#}"
        );
    }
    for role in objects.of_kind("Role") {
        assert_eq!(role["metadata"]["namespace"], NAMESPACE);
    }
}
