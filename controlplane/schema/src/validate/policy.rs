//! Validation of kinds that are policy or record: claims, priority levels.

use serde_json::{Value, json};

use crate::Object;
use crate::field_error::FieldError;
use crate::table::Resource;

pub(super) fn validate(resource: &Resource, object: &Object, errors: &mut Vec<FieldError>) {
    match (resource.group, resource.kind) {
        ("", "PersistentVolumeClaim") => claim(&object["spec"], errors),
        ("flowcontrol.apiserver.k8s.io", "PriorityLevelConfiguration") => {
            priority_level(&object["spec"], errors);
        }
        _ => {}
    }
}

/// Of the API's own kinds only a claim can be cloned.
fn claim(spec: &Value, errors: &mut Vec<FieldError>) {
    for field in ["dataSource", "dataSourceRef"] {
        let source = &spec[field];
        if source.is_object() {
            let path = format!("spec.{field}");
            for part in ["name", "kind"] {
                if source[part].as_str().unwrap_or_default().is_empty() {
                    errors.push(FieldError::required(format!("{path}.{part}"), ""));
                }
            }
            let core = source["apiGroup"].as_str().unwrap_or_default().is_empty();
            if core && source["kind"] != "PersistentVolumeClaim" {
                errors.push(FieldError::invalid(
                    path,
                    &source["kind"],
                    "must be 'PersistentVolumeClaim' when referencing the default apiGroup",
                ));
            }
        }
    }
}

fn priority_level(spec: &Value, errors: &mut Vec<FieldError>) {
    if !spec["limited"].is_object() {
        return;
    }
    let response = &spec["limited"]["limitResponse"];
    let path = "spec.limited.limitResponse";
    match response["type"].as_str().unwrap_or_default() {
        "Queue" if response["queuing"].is_null() => errors.push(FieldError::required(
            format!("{path}.queuing"),
            "must not be empty if limited.limitResponse.type is Limited",
        )),
        "Reject" if !response["queuing"].is_null() => errors.push(FieldError::forbidden(
            format!("{path}.queuing"),
            "must be nil if limited.limitResponse.type is not Limited",
        )),
        "Queue" | "Reject" => {}
        other => errors.push(FieldError::not_supported(
            format!("{path}.type"),
            json!(other),
            &["Queue", "Reject"],
        )),
    }
}
