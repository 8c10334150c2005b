//! Cells of the kinds that this cluster keeps for others.

use serde_json::Value;

use super::{containers, join_or, selector, text};
use crate::Object;
use crate::table::Resource;

fn or(value: &Value, none: &str) -> Value {
    match value {
        Value::Null => none.into(),
        Value::String(text) if text.is_empty() => none.into(),
        Value::String(text) => text.as_str().into(),
        other => other.to_string().into(),
    }
}

/// `True` or `False`, as a truth value is told in words.
fn truth(value: &Value) -> Value {
    if *value == true { "True" } else { "False" }.into()
}

/// The cells of one object, in the columns' order.
pub(super) fn cells(resource: &Resource, object: &Object, age: Value, now: i64) -> Vec<Value> {
    let name = object["metadata"]["name"].clone();
    let (spec, status) = (&object["spec"], &object["status"]);
    match (resource.group, resource.kind) {
        ("rbac.authorization.k8s.io", "RoleBinding" | "ClusterRoleBinding") => {
            let role = &object["roleRef"];
            let role = [&role["kind"], &role["name"]].map(|part| part.as_str().unwrap_or_default());
            vec![
                name,
                role.join("/").into(),
                age,
                subjects(object, "User"),
                subjects(object, "Group"),
                subjects(object, "ServiceAccount"),
            ]
        }
        ("networking.k8s.io", "ServiceCIDR") => {
            let ranges = spec["cidrs"].as_array().into_iter().flatten();
            let ranges = ranges.filter_map(|range| range.as_str().map(str::to_owned));
            vec![name, join_or(ranges.collect(), "").into(), age]
        }
        ("networking.k8s.io", "IngressClass") => {
            let parameters = &spec["parameters"];
            let shown = match parameters["apiGroup"].as_str() {
                _ if parameters.is_null() => "<none>".to_owned(),
                Some(group) => {
                    let [kind, name] = [&parameters["kind"], &parameters["name"]]
                        .map(|part| part.as_str().unwrap_or_default());
                    format!("{kind}.{group}/{name}")
                }
                None => [&parameters["kind"], &parameters["name"]]
                    .map(|part| part.as_str().unwrap_or_default())
                    .join("/"),
            };
            vec![name, text(&spec["controller"]), shown.into(), age]
        }
        ("node.k8s.io", "RuntimeClass") => vec![name, text(&object["handler"]), age],
        ("storage.k8s.io", "StorageClass") => {
            let default = "storageclass.kubernetes.io/is-default-class";
            let shown = match object["metadata"]["annotations"][default].as_str() {
                Some("true") => format!("{} (default)", name.as_str().unwrap_or_default()).into(),
                _ => name,
            };
            vec![
                shown,
                text(&object["provisioner"]),
                or(&object["reclaimPolicy"], "Delete"),
                or(&object["volumeBindingMode"], "Immediate"),
                (object["allowVolumeExpansion"] == true).into(),
                age,
            ]
        }
        ("batch", "CronJob") => {
            let last = match status["lastScheduleTime"].as_str() {
                Some(_) => super::age(&status["lastScheduleTime"], now).into(),
                None => "<none>".into(),
            };
            let job = &spec["jobTemplate"]["spec"];
            let template = &job["template"]["spec"];
            vec![
                name,
                text(&spec["schedule"]),
                or(&spec["timeZone"], "<none>"),
                truth(&spec["suspend"]),
                status["active"].as_array().map_or(0, Vec::len).into(),
                last,
                age,
                containers(template, "name"),
                containers(template, "image"),
                selector(&job["selector"]).into(),
            ]
        }
        ("policy", "PodDisruptionBudget") => vec![
            name,
            or(&spec["minAvailable"], "N/A"),
            or(&spec["maxUnavailable"], "N/A"),
            status["disruptionsAllowed"].as_i64().unwrap_or(0).into(),
            age,
        ],
        _ => vec![name, object["metadata"]["creationTimestamp"].clone()],
    }
}

/// The names of a binding's subjects of one kind.
fn subjects(binding: &Object, kind: &str) -> Value {
    let all = binding["subjects"].as_array().into_iter().flatten();
    let names = all
        .filter(|subject| subject["kind"] == kind)
        .map(|subject| {
            let name = subject["name"].as_str().unwrap_or_default();
            match kind {
                "ServiceAccount" => {
                    format!(
                        "{}/{name}",
                        subject["namespace"].as_str().unwrap_or_default()
                    )
                }
                _ => name.to_owned(),
            }
        });
    names.collect::<Vec<_>>().join(", ").into()
}
