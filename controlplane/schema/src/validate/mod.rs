//! Validation: object metadata of every kind, and the specs of the kinds that the cluster itself runs on.

pub mod names;
mod network;
mod pod;
mod policy;
mod status;
mod workload;

use serde_json::{Value, json};

use crate::Object;
use crate::field_error::FieldError;
use crate::table::Resource;

/// Bytes that all annotations of an object may have together.
const ANNOTATIONS_LIMIT: usize = 256 * 1024;
/// Bytes that a ConfigMap's or Secret's values may have together.
const DATA_LIMIT: usize = 1024 * 1024;

/// The rule for names of this resource.
fn name_rule(resource: &Resource) -> fn(&str) -> Vec<String> {
    match (resource.group, resource.plural) {
        ("", "namespaces") => names::dns1123_label,
        ("", "services") => names::dns1123_label,
        ("rbac.authorization.k8s.io", _) => names::path_segment,
        ("certificates.k8s.io", _) => names::dns1123_subdomain,
        _ => names::dns1123_subdomain,
    }
}

/// What is wrong with a new object.
pub fn validate_create(resource: &Resource, object: &Object) -> Vec<FieldError> {
    let mut errors = Vec::new();
    metadata(resource, object, &mut errors);
    spec(resource, object, &mut errors);
    errors
}

/// What is wrong with a changed object, also against what it was.
pub fn validate_update(resource: &Resource, old: &Object, new: &Object) -> Vec<FieldError> {
    let mut errors = Vec::new();
    // The real server looks at what may not change for every kind, and again for each.
    metadata_update(old, new, &mut errors);
    metadata(resource, new, &mut errors);
    metadata_update(old, new, &mut errors);
    spec(resource, new, &mut errors);
    match (resource.group, resource.kind) {
        ("", "Pod") => pod::update(old, new, &mut errors),
        ("", "Service") => network::service_update(old, new, &mut errors),
        ("apps", "Deployment" | "ReplicaSet" | "DaemonSet" | "StatefulSet") => {
            immutable(old, new, &["spec", "selector"], &mut errors);
        }
        ("apps", "ControllerRevision") => immutable(old, new, &["data"], &mut errors),
        ("batch", "Job") => immutable(old, new, &["spec", "completionMode"], &mut errors),
        ("", "ConfigMap" | "Secret") => {
            if old["immutable"] == true {
                let changed = |key: &str| old[key] != new[key];
                if new["immutable"] != true {
                    errors.push(FieldError::forbidden(
                        "immutable",
                        "field is immutable when `immutable` is set",
                    ));
                }
                for key in ["data", "binaryData"] {
                    if changed(key) {
                        errors.push(FieldError::forbidden(
                            key,
                            "field is immutable when `immutable` is set",
                        ));
                    }
                }
            }
            if resource.kind == "Secret" {
                immutable(old, new, &["type"], &mut errors);
            }
        }
        ("rbac.authorization.k8s.io", "RoleBinding" | "ClusterRoleBinding")
            if old["roleRef"] != new["roleRef"] =>
        {
            errors.push(FieldError::invalid(
                "roleRef",
                &new["roleRef"],
                "cannot change roleRef",
            ));
        }
        ("discovery.k8s.io", "EndpointSlice") => immutable(old, new, &["addressType"], &mut errors),
        _ => {}
    }
    errors
}

/// What is wrong with a changed status.
pub fn validate_status_update(resource: &Resource, old: &Object, new: &Object) -> Vec<FieldError> {
    let mut errors = Vec::new();
    metadata_update(old, new, &mut errors);
    metadata_update(old, new, &mut errors);
    status::validate(resource, new, &mut errors);
    errors
}

fn immutable(old: &Object, new: &Object, path: &[&str], errors: &mut Vec<FieldError>) {
    let find = |object: &Object| {
        path.iter()
            .fold(object.clone(), |value, key| value[*key].clone())
    };
    let (before, after) = (find(old), find(new));
    if before != after {
        errors.push(FieldError::invalid(
            path.join("."),
            &after,
            "field is immutable",
        ));
    }
}

/// `ValidateObjectMeta`.
fn metadata(resource: &Resource, object: &Object, errors: &mut Vec<FieldError>) {
    let metadata = &object["metadata"];
    let text = |key: &str| metadata[key].as_str().unwrap_or_default();
    let rule = name_rule(resource);
    let generate = text("generateName");
    if !generate.is_empty() {
        // A name's end is still to come, so a separator may stand last here.
        for message in rule(generate.trim_end_matches(['-', '.']))
            .into_iter()
            .filter(|_| !generate.trim_end_matches(['-', '.']).is_empty())
        {
            errors.push(FieldError::invalid(
                "metadata.generateName",
                &json!(generate),
                &message,
            ));
        }
    }
    let name = text("name");
    if name.is_empty() {
        errors.push(FieldError::required(
            "metadata.name",
            "name or generateName is required",
        ));
    } else {
        errors.extend(
            rule(name)
                .iter()
                .map(|message| FieldError::invalid("metadata.name", &json!(name), message)),
        );
    }
    let namespace = text("namespace");
    if resource.namespaced && namespace.is_empty() {
        errors.push(FieldError::required("metadata.namespace", ""));
    } else if resource.namespaced {
        let messages = names::dns1123_label(namespace);
        errors.extend(
            messages
                .iter()
                .map(|m| FieldError::invalid("metadata.namespace", &json!(namespace), m)),
        );
    } else if !namespace.is_empty() {
        errors.push(FieldError::forbidden(
            "metadata.namespace",
            "not allowed on this type",
        ));
    }
    labels("metadata.labels", &metadata["labels"], errors);
    let mut total = 0;
    for (key, value) in metadata["annotations"].as_object().into_iter().flatten() {
        total += key.len() + value.as_str().map_or(0, str::len);
        for message in names::qualified_name(&key.to_lowercase()) {
            errors.push(FieldError::invalid(
                "metadata.annotations",
                &json!(key),
                &message,
            ));
        }
    }
    if total > ANNOTATIONS_LIMIT {
        errors.push(FieldError::too_long(
            "metadata.annotations",
            ANNOTATIONS_LIMIT,
        ));
    }
    let mut controllers = 0;
    for (index, owner) in metadata["ownerReferences"]
        .as_array()
        .into_iter()
        .flatten()
        .enumerate()
    {
        let path = |field: &str| format!("metadata.ownerReferences[{index}].{field}");
        for field in ["apiVersion", "kind", "name", "uid"] {
            if owner[field].as_str().unwrap_or_default().is_empty() {
                errors.push(FieldError::invalid(
                    path(field),
                    &owner[field],
                    "must not be empty",
                ));
            }
        }
        controllers += usize::from(owner["controller"] == true);
    }
    if controllers > 1 {
        errors.push(FieldError::invalid(
            "metadata.ownerReferences",
            &metadata["ownerReferences"],
            "Only one reference can have Controller set to true",
        ));
    }
    for finalizer in metadata["finalizers"].as_array().into_iter().flatten() {
        for message in names::qualified_name(finalizer.as_str().unwrap_or_default()) {
            errors.push(FieldError::invalid(
                "metadata.finalizers",
                finalizer,
                &message,
            ));
        }
    }
}

/// A label map: keys and values.
fn labels(path: &str, labels: &Value, errors: &mut Vec<FieldError>) {
    for (key, value) in labels.as_object().into_iter().flatten() {
        for message in names::qualified_name(key) {
            errors.push(FieldError::invalid(path, &json!(key), &message));
        }
        for message in names::label_value(value.as_str().unwrap_or_default()) {
            errors.push(FieldError::invalid(path, value, &message));
        }
    }
}

/// `ValidateObjectMetaUpdate`.
fn metadata_update(old: &Object, new: &Object, errors: &mut Vec<FieldError>) {
    for field in [
        "name",
        "namespace",
        "uid",
        "creationTimestamp",
        "deletionTimestamp",
        "deletionGracePeriodSeconds",
    ] {
        let (before, after) = (&old["metadata"][field], &new["metadata"][field]);
        if before != after {
            errors.push(FieldError::invalid(
                format!("metadata.{field}"),
                after,
                "field is immutable",
            ));
        }
    }
    if !old["metadata"]["deletionTimestamp"].is_null() {
        let before = old["metadata"]["finalizers"]
            .as_array()
            .cloned()
            .unwrap_or_default();
        let added: Vec<String> = new["metadata"]["finalizers"]
            .as_array()
            .into_iter()
            .flatten()
            .filter(|one| !before.contains(one))
            .map(Value::to_string)
            .collect();
        if !added.is_empty() {
            errors.push(FieldError::forbidden(
                "metadata.finalizers",
                &format!(
                    "no new finalizers can be added if the object is being deleted, found new finalizers []string{{{}}}",
                    added.join(", ")
                ),
            ));
        }
    }
}

/// `meta/v1` LabelSelector.
fn label_selector(path: &str, selector: &Value, errors: &mut Vec<FieldError>) {
    labels(
        &format!("{path}.matchLabels"),
        &selector["matchLabels"],
        errors,
    );
    for (index, expression) in selector["matchExpressions"]
        .as_array()
        .into_iter()
        .flatten()
        .enumerate()
    {
        let path = format!("{path}.matchExpressions[{index}]");
        let values = expression["values"].as_array().map_or(0, Vec::len);
        match expression["operator"].as_str().unwrap_or_default() {
            "In" | "NotIn" if values == 0 => errors.push(FieldError::required(
                format!("{path}.values"),
                "must be specified when `operator` is 'In' or 'NotIn'",
            )),
            "Exists" | "DoesNotExist" if values > 0 => errors.push(FieldError::forbidden(
                format!("{path}.values"),
                "may not be specified when `operator` is 'Exists' or 'DoesNotExist'",
            )),
            "In" | "NotIn" | "Exists" | "DoesNotExist" => {}
            _ => errors.push(FieldError::invalid(
                format!("{path}.operator"),
                &expression["operator"],
                "not a valid selector operator",
            )),
        }
        for message in names::qualified_name(expression["key"].as_str().unwrap_or_default()) {
            errors.push(FieldError::invalid(
                format!("{path}.key"),
                &expression["key"],
                &message,
            ));
        }
    }
}

/// A number that may not be negative.
fn non_negative(path: &str, value: &Value, errors: &mut Vec<FieldError>) {
    if value.as_i64().is_some_and(|number| number < 0) {
        errors.push(FieldError::invalid(
            path,
            value,
            "must be greater than or equal to 0",
        ));
    }
}

/// A port number.
fn port_number(path: &str, value: &Value, errors: &mut Vec<FieldError>) {
    if !value
        .as_i64()
        .is_some_and(|number| (1..=65535).contains(&number))
    {
        errors.push(FieldError::invalid(
            path,
            value,
            "must be between 1 and 65535, inclusive",
        ));
    }
}

fn spec(resource: &Resource, object: &Object, errors: &mut Vec<FieldError>) {
    match (resource.group, resource.kind) {
        ("", "Pod") => pod::spec("spec", &object["spec"], errors),
        ("", "PodTemplate") => pod::spec("template.spec", &object["template"]["spec"], errors),
        ("", "Service") => network::service(object, errors),
        ("", "ConfigMap") => {
            data_keys("data", &object["data"], errors);
            data_keys("binaryData", &object["binaryData"], errors);
            total_size("", &[&object["data"], &object["binaryData"]], errors);
        }
        ("", "Secret") => {
            data_keys("data", &object["data"], errors);
            total_size("data", &[&object["data"]], errors);
        }
        ("apps", "Deployment" | "ReplicaSet" | "DaemonSet" | "StatefulSet")
        | ("batch", "Job")
        | ("", "ReplicationController") => {
            workload::validate(resource, object, errors);
        }
        ("networking.k8s.io", "NetworkPolicy") => network::policy(object, errors),
        ("discovery.k8s.io", "EndpointSlice") => network::endpoint_slice(object, errors),
        ("coordination.k8s.io", "Lease") => {
            let duration = &object["spec"]["leaseDurationSeconds"];
            if duration.as_i64().is_some_and(|seconds| seconds <= 0) {
                errors.push(FieldError::invalid(
                    "spec.leaseDurationSeconds",
                    duration,
                    "must be greater than 0",
                ));
            }
        }
        _ => policy::validate(resource, object, errors),
    }
}

fn data_keys(path: &str, data: &Value, errors: &mut Vec<FieldError>) {
    for key in data.as_object().into_iter().flatten().map(|(key, _)| key) {
        let fine = !key.is_empty()
            && key
                .bytes()
                .all(|c| c.is_ascii_alphanumeric() || b"-_.".contains(&c));
        let reserved = key == "." || key == ".." || key.starts_with("../");
        if !fine || reserved || key.len() > 253 {
            errors.push(FieldError::invalid(
                format!("{path}[{key}]"),
                &json!(key),
                "a valid config key must consist of alphanumeric characters, '-', '_' or '.' (e.g. 'key.name',  or 'KEY_NAME',  or 'key-name', regex used for validation is '[-._a-zA-Z0-9]+')",
            ));
        }
    }
}

fn total_size(path: &str, maps: &[&Value], errors: &mut Vec<FieldError>) {
    let total: usize = maps
        .iter()
        .flat_map(|map| map.as_object().into_iter().flatten())
        .map(|(_, value)| value.as_str().map_or(0, str::len))
        .sum();
    if total > DATA_LIMIT {
        errors.push(FieldError::too_long(path, DATA_LIMIT));
    }
}
