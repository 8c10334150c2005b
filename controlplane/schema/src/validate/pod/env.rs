//! Validation of environment variables and of references to what the pod or the cluster knows.

use super::super::at::{At, Errors};
use super::super::names;

/// Fields of a pod that a variable can show.
const FIELDS: &[&str] = &[
    "metadata.name",
    "metadata.namespace",
    "metadata.uid",
    "spec.nodeName",
    "spec.serviceAccountName",
    "status.hostIP",
    "status.hostIPs",
    "status.podIP",
    "status.podIPs",
];
/// Fields of a pod that a file can show.
const FILE_FIELDS: &[&str] = &[
    "metadata.annotations",
    "metadata.labels",
    "metadata.name",
    "metadata.namespace",
    "metadata.uid",
];
const RESOURCES: &[&str] = &[
    "limits.cpu",
    "limits.ephemeral-storage",
    "limits.memory",
    "requests.cpu",
    "requests.ephemeral-storage",
    "requests.memory",
];
const SOURCES: &[&str] = &[
    "fieldRef",
    "resourceFieldRef",
    "configMapKeyRef",
    "secretKeyRef",
    "fileKeyRef",
];

/// What a field selector understands, in places that may not offer all of it.
const KNOWN: &[&str] = &[
    "metadata.annotations",
    "metadata.labels",
    "metadata.name",
    "metadata.namespace",
    "metadata.uid",
    "spec.nodeName",
    "spec.restartPolicy",
    "spec.schedulerName",
    "spec.serviceAccountName",
    "status.hostIP",
    "status.hostIPs",
    "status.phase",
    "status.podIP",
    "status.podIPs",
];

/// A container's `env`.
pub(super) fn variables(env: &At<'_, '_>, errors: &mut Errors) {
    for variable in env.items() {
        let name = variable.field("name");
        name.required_name(names::env_name, errors);
        let from = variable.field("valueFrom");
        if from.is_set() {
            value_from(&variable, &from, errors);
        }
    }
}

fn value_from(variable: &At<'_, '_>, from: &At<'_, '_>, errors: &mut Errors) {
    let field = from.field("fieldRef");
    if field.is_set() {
        field_selector(&field, FIELDS, errors);
    }
    let resource = from.field("resourceFieldRef");
    if resource.is_set() {
        resource_selector(&resource, false, errors);
    }
    for name in ["configMapKeyRef", "secretKeyRef"] {
        let reference = from.field(name);
        if reference.is_set() {
            let name = reference.field("name");
            name.follows_if_set(names::dns1123_subdomain, errors);
            let key = reference.field("key");
            key.required_name(names::config_key, errors);
        }
    }
    let given = SOURCES
        .iter()
        .filter(|one| from.field(one).is_set())
        .count();
    let detail = if given == 0 {
        "must specify one of: `fieldRef`, `resourceFieldRef`, `configMapKeyRef`, `secretKeyRef` or `fileKeyRef`"
    } else if !variable.field("value").text().is_empty() {
        "may not be specified when `value` is not empty"
    } else if given > 1 {
        "may not have more than one field specified at a time"
    } else {
        return;
    };
    from.invalid_as("\"\"", detail, errors);
}

/// A container's `envFrom`.
pub(super) fn sources(sources: &At<'_, '_>, errors: &mut Errors) {
    for source in sources.items() {
        let prefix = source.field("prefix");
        prefix.follows_if_set(names::env_name, errors);
        let references = ["configMapRef", "secretRef"];
        for name in references {
            let reference = source.field(name);
            let name = reference.field("name");
            if reference.is_set() {
                name.follows(names::dns1123_subdomain, errors);
            }
        }
        let given = references
            .iter()
            .filter(|one| source.field(one).is_set())
            .count();
        match given {
            0 => source.invalid_as(
                "\"\"",
                "must specify one of: `configMapRef` or `secretRef`",
                errors,
            ),
            1 => {}
            _ => source.invalid_as(
                "\"\"",
                "may not have more than one field specified at a time",
                errors,
            ),
        }
    }
}

/// A file that shows a field of the pod or an amount of a container; errors of the choice are told at `told_at`.
pub(super) fn downward_file(file: &At<'_, '_>, told_at: &At<'_, '_>, errors: &mut Errors) {
    super::volume::file_path(&file.field("path"), errors);
    let (field, resource) = (file.field("fieldRef"), file.field("resourceFieldRef"));
    match (field.is_set(), resource.is_set()) {
        (true, both) => {
            field_selector(&field, FILE_FIELDS, errors);
            if both {
                let detail = "fieldRef and resourceFieldRef can not be specified simultaneously";
                told_at.invalid_as("\"resource\"", detail, errors);
            }
        }
        (false, true) => resource_selector(&resource, true, errors),
        (false, false) => {
            told_at.missing("one of fieldRef and resourceFieldRef is required", errors);
        }
    }
    super::volume::mode(&file.field("mode"), errors);
}

fn field_selector(selector: &At<'_, '_>, offered: &[&str], errors: &mut Errors) {
    if !selector.field("apiVersion").required(errors) {
        return;
    }
    let path = selector.field("fieldPath");
    if !path.required(errors) {
        return;
    }
    let (name, subscript) = match path.text().strip_suffix("']") {
        Some(rest) => match rest.split_once("['") {
            Some((name, key)) => (name, Some(key)),
            None => (path.text(), None),
        },
        None => (path.text(), None),
    };
    match subscript {
        Some(key) => match name {
            "metadata.annotations" => {
                for message in names::qualified_name(&key.to_lowercase()) {
                    path.invalid(&message, errors);
                }
            }
            "metadata.labels" => {
                for message in names::qualified_name(key) {
                    path.invalid(&message, errors);
                }
            }
            _ => path.invalid("does not support subscript", errors),
        },
        None if !KNOWN.contains(&name) => {
            let detail = format!("error converting fieldPath: field label not supported: {name}");
            path.invalid(&detail, errors);
        }
        None if !offered.contains(&name) => path.not_supported(offered, errors),
        None => {}
    }
}

fn resource_selector(selector: &At<'_, '_>, in_volume: bool, errors: &mut Errors) {
    let container = selector.field("containerName");
    if in_volume && container.text().is_empty() {
        container.missing("", errors);
        return;
    }
    let resource = selector.field("resource");
    let hugepages = ["limits.hugepages-", "requests.hugepages-"];
    let huge = hugepages
        .iter()
        .any(|start| resource.text().starts_with(start));
    if resource.required(errors) && !huge && !RESOURCES.contains(&resource.text()) {
        resource.not_supported(RESOURCES, errors);
    }
}
