//! Validation of pods and pod templates.

use std::collections::HashSet;

use serde_json::{Value, json};

use super::{label_selector, names, non_negative, port_number};
use crate::Object;
use crate::field_error::FieldError;
use crate::quantity::Quantity;

/// `ValidatePodSpec`, as far as this server goes.
pub(super) fn spec(path: &str, spec: &Value, errors: &mut Vec<FieldError>) {
    let at = |field: &str| format!("{path}.{field}");
    let volumes = volumes(&at("volumes"), &spec["volumes"], errors);
    let mut seen = HashSet::new();
    if spec["containers"].as_array().is_none_or(Vec::is_empty) {
        errors.push(FieldError::required(at("containers"), ""));
    }
    for list in ["initContainers", "containers"] {
        for (index, one) in spec[list].as_array().into_iter().flatten().enumerate() {
            container(
                &format!("{path}.{list}[{index}]"),
                one,
                &volumes,
                &mut seen,
                errors,
            );
        }
    }
    one_of(
        &at("restartPolicy"),
        &spec["restartPolicy"],
        &["Always", "OnFailure", "Never"],
        errors,
    );
    one_of(
        &at("dnsPolicy"),
        &spec["dnsPolicy"],
        &["ClusterFirstWithHostNet", "ClusterFirst", "Default", "None"],
        errors,
    );
    non_negative(
        &at("terminationGracePeriodSeconds"),
        &spec["terminationGracePeriodSeconds"],
        errors,
    );
    super::labels(&at("nodeSelector"), &spec["nodeSelector"], errors);
    for field in ["serviceAccountName", "nodeName", "priorityClassName"] {
        let value = spec[field].as_str().unwrap_or_default();
        if !value.is_empty() {
            errors.extend(
                names::dns1123_subdomain(value)
                    .iter()
                    .map(|m| FieldError::invalid(at(field), &json!(value), m)),
            );
        }
    }
    for field in ["hostname", "subdomain"] {
        let value = spec[field].as_str().unwrap_or_default();
        if !value.is_empty() {
            errors.extend(
                names::dns1123_label(value)
                    .iter()
                    .map(|m| FieldError::invalid(at(field), &json!(value), m)),
            );
        }
    }
    if spec["activeDeadlineSeconds"]
        .as_i64()
        .is_some_and(|seconds| seconds < 1)
    {
        errors.push(FieldError::invalid(
            at("activeDeadlineSeconds"),
            &spec["activeDeadlineSeconds"],
            "must be between 1 and 2147483647, inclusive",
        ));
    }
    for (index, toleration) in spec["tolerations"]
        .as_array()
        .into_iter()
        .flatten()
        .enumerate()
    {
        let path = format!("{path}.tolerations[{index}]");
        let operator = toleration["operator"].as_str().unwrap_or_default();
        if toleration["key"].as_str().unwrap_or_default().is_empty() && operator != "Exists" {
            errors.push(FieldError::invalid(
                format!("{path}.operator"),
                &json!(operator),
                "operator must be Exists when `key` is empty, which means \"match all values and all keys\"",
            ));
        }
    }
    for (index, constraint) in spec["topologySpreadConstraints"]
        .as_array()
        .into_iter()
        .flatten()
        .enumerate()
    {
        label_selector(
            &format!("{path}.topologySpreadConstraints[{index}].labelSelector"),
            &constraint["labelSelector"],
            errors,
        );
    }
}

fn one_of(path: &str, value: &Value, known: &[&str], errors: &mut Vec<FieldError>) {
    match value.as_str().unwrap_or_default() {
        "" => errors.push(FieldError::required(path, "")),
        text if known.contains(&text) => {}
        _ => errors.push(FieldError::not_supported(path, value, known)),
    }
}

/// Checks volumes, and gives their names.
fn volumes(path: &str, volumes: &Value, errors: &mut Vec<FieldError>) -> HashSet<String> {
    let mut found = HashSet::new();
    for (index, volume) in volumes.as_array().into_iter().flatten().enumerate() {
        let path = format!("{path}[{index}]");
        let name = volume["name"].as_str().unwrap_or_default();
        if name.is_empty() {
            errors.push(FieldError::required(format!("{path}.name"), ""));
        } else {
            let messages = names::dns1123_label(name);
            errors.extend(
                messages
                    .iter()
                    .map(|m| FieldError::invalid(format!("{path}.name"), &json!(name), m)),
            );
            if !found.insert(name.to_owned()) {
                errors.push(FieldError::duplicate(format!("{path}.name"), &json!(name)));
            }
        }
        let sources = volume
            .as_object()
            .map_or(0, |map| map.keys().filter(|key| *key != "name").count());
        if sources == 0 {
            errors.push(FieldError::required(
                path.clone(),
                "must specify a volume type",
            ));
        }
        if sources > 1 {
            let extra = volume
                .as_object()
                .into_iter()
                .flatten()
                .map(|(key, _)| key)
                .filter(|key| *key != "name")
                .nth(1);
            errors.push(FieldError::forbidden(
                format!("{path}.{}", extra.map_or("", String::as_str)),
                "may not specify more than 1 volume type",
            ));
        }
        if volume["hostPath"].is_object() {
            if volume["hostPath"]["path"]
                .as_str()
                .unwrap_or_default()
                .is_empty()
            {
                errors.push(FieldError::required(format!("{path}.hostPath.path"), ""));
            }
        }
        if volume["configMap"].is_object()
            && volume["configMap"]["name"]
                .as_str()
                .unwrap_or_default()
                .is_empty()
        {
            errors.push(FieldError::required(format!("{path}.configMap.name"), ""));
        }
        if volume["secret"].is_object()
            && volume["secret"]["secretName"]
                .as_str()
                .unwrap_or_default()
                .is_empty()
        {
            errors.push(FieldError::required(
                format!("{path}.secret.secretName"),
                "",
            ));
        }
    }
    found
}

fn container(
    path: &str,
    container: &Value,
    volumes: &HashSet<String>,
    seen: &mut HashSet<String>,
    errors: &mut Vec<FieldError>,
) {
    let at = |field: &str| format!("{path}.{field}");
    let name = container["name"].as_str().unwrap_or_default();
    if name.is_empty() {
        errors.push(FieldError::required(at("name"), ""));
    } else {
        errors.extend(
            names::dns1123_label(name)
                .iter()
                .map(|m| FieldError::invalid(at("name"), &json!(name), m)),
        );
        if !seen.insert(name.to_owned()) {
            errors.push(FieldError::duplicate(at("name"), &json!(name)));
        }
    }
    let image = container["image"].as_str().unwrap_or_default();
    if image.is_empty() {
        errors.push(FieldError::required(at("image"), ""));
    } else if image.trim() != image {
        errors.push(FieldError::invalid(
            at("image"),
            &json!(image),
            "must not have leading or trailing whitespace",
        ));
    }
    one_of(
        &at("imagePullPolicy"),
        &container["imagePullPolicy"],
        &["Always", "IfNotPresent", "Never"],
        errors,
    );
    one_of(
        &at("terminationMessagePolicy"),
        &container["terminationMessagePolicy"],
        &["FallbackToLogsOnError", "File"],
        errors,
    );
    let mut port_names = HashSet::new();
    for (index, port) in container["ports"]
        .as_array()
        .into_iter()
        .flatten()
        .enumerate()
    {
        let path = format!("{path}.ports[{index}]");
        if port["containerPort"].as_i64().unwrap_or(0) == 0 {
            errors.push(FieldError::required(format!("{path}.containerPort"), ""));
        } else {
            port_number(
                &format!("{path}.containerPort"),
                &port["containerPort"],
                errors,
            );
        }
        if port["hostPort"].as_i64().unwrap_or(0) != 0 {
            port_number(&format!("{path}.hostPort"), &port["hostPort"], errors);
        }
        one_of(
            &format!("{path}.protocol"),
            &port["protocol"],
            &["SCTP", "TCP", "UDP"],
            errors,
        );
        let name = port["name"].as_str().unwrap_or_default();
        if !name.is_empty() && !port_names.insert(name.to_owned()) {
            errors.push(FieldError::duplicate(format!("{path}.name"), &json!(name)));
        }
    }
    for (index, env) in container["env"]
        .as_array()
        .into_iter()
        .flatten()
        .enumerate()
    {
        if env["name"].as_str().unwrap_or_default().is_empty() {
            errors.push(FieldError::required(
                format!("{path}.env[{index}].name"),
                "",
            ));
        }
        if !env["value"].as_str().unwrap_or_default().is_empty() && env["valueFrom"].is_object() {
            errors.push(FieldError::invalid(
                format!("{path}.env[{index}].valueFrom"),
                &json!(""),
                "may not be specified when `value` is not empty",
            ));
        }
    }
    let mut mounted = HashSet::new();
    for (index, mount) in container["volumeMounts"]
        .as_array()
        .into_iter()
        .flatten()
        .enumerate()
    {
        let path = format!("{path}.volumeMounts[{index}]");
        let name = mount["name"].as_str().unwrap_or_default();
        if name.is_empty() {
            errors.push(FieldError::required(format!("{path}.name"), ""));
        } else if !volumes.contains(name) {
            errors.push(FieldError {
                reason: "FieldValueNotFound",
                field: format!("{path}.name"),
                message: format!("Not found: {name:?}"),
            });
        }
        let target = mount["mountPath"].as_str().unwrap_or_default();
        if target.is_empty() {
            errors.push(FieldError::required(format!("{path}.mountPath"), ""));
        } else if !mounted.insert(target.to_owned()) {
            errors.push(FieldError::invalid(
                format!("{path}.mountPath"),
                &json!(target),
                "must be unique",
            ));
        }
    }
    resources(&at("resources"), &container["resources"], errors);
    for probe in ["livenessProbe", "readinessProbe", "startupProbe"] {
        if container[probe].is_object() {
            self::probe(&at(probe), &container[probe], errors);
        }
    }
}

fn resources(path: &str, resources: &Value, errors: &mut Vec<FieldError>) {
    let amount = |value: &Value| value.as_str().and_then(|text| Quantity::parse(text).ok());
    for list in ["limits", "requests"] {
        for (name, value) in resources[list].as_object().into_iter().flatten() {
            if amount(value).is_some_and(|quantity| quantity.nano_value() < 0) {
                errors.push(FieldError::invalid(
                    format!("{path}.{list}[{name}]"),
                    value,
                    "must be greater than or equal to 0",
                ));
            }
        }
    }
    for (name, request) in resources["requests"].as_object().into_iter().flatten() {
        let limit = &resources["limits"][name];
        if let (Some(asked), Some(most)) = (amount(request), amount(limit)) {
            if asked > most {
                errors.push(FieldError::invalid(
                    format!("{path}.requests"),
                    request,
                    &format!(
                        "must be less than or equal to {name} limit of {}",
                        limit.as_str().unwrap_or_default()
                    ),
                ));
            }
        }
    }
}

fn probe(path: &str, probe: &Value, errors: &mut Vec<FieldError>) {
    for field in [
        "initialDelaySeconds",
        "timeoutSeconds",
        "periodSeconds",
        "successThreshold",
        "failureThreshold",
    ] {
        non_negative(&format!("{path}.{field}"), &probe[field], errors);
    }
    let handlers = ["exec", "httpGet", "tcpSocket", "grpc"]
        .iter()
        .filter(|kind| probe[**kind].is_object())
        .count();
    if handlers == 0 {
        errors.push(FieldError::required(path, "must specify a handler type"));
    }
    if handlers > 1 {
        errors.push(FieldError::forbidden(
            path,
            "may not specify more than 1 handler type",
        ));
    }
    if !path.ends_with("readinessProbe")
        && probe["successThreshold"]
            .as_i64()
            .is_some_and(|times| times != 1)
    {
        errors.push(FieldError::invalid(
            format!("{path}.successThreshold"),
            &probe["successThreshold"],
            "must be 1",
        ));
    }
}

/// A pod's spec may change in a few places only once it exists.
pub(super) fn update(old: &Object, new: &Object, errors: &mut Vec<FieldError>) {
    let mut before = old["spec"].clone();
    let mut after = new["spec"].clone();
    for spec in [&mut before, &mut after] {
        for list in ["containers", "initContainers"] {
            for one in spec[list].as_array_mut().into_iter().flatten() {
                if let Some(one) = one.as_object_mut() {
                    one.remove("image");
                }
            }
        }
        if let Some(spec) = spec.as_object_mut() {
            for field in [
                "activeDeadlineSeconds",
                "tolerations",
                "terminationGracePeriodSeconds",
                "schedulingGates",
            ] {
                spec.remove(field);
            }
            spec.retain(|_, value| !value.is_null());
        }
    }
    if before != after {
        errors.push(FieldError::forbidden(
            "spec",
            "pod updates may not change fields other than `spec.containers[*].image`,`spec.initContainers[*].image`,`spec.activeDeadlineSeconds`,`spec.tolerations` (only additions to existing tolerations),`spec.terminationGracePeriodSeconds` (allow it to be set to 1 if it was previously negative)",
        ));
    }
}
