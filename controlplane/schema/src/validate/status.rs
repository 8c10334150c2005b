//! Validation of what controllers report: counts are not negative, and parts are not more than the whole.

use super::at::At;
use crate::Object;
use crate::field_error::FieldError;
use crate::table::Resource;

/// The counts of a kind's status, and which of them is the whole of the others that follow.
fn counts(
    resource: &Resource,
) -> (
    &'static [&'static str],
    &'static str,
    &'static [&'static str],
) {
    match (resource.group, resource.kind) {
        ("apps", "Deployment") => (
            &[
                "observedGeneration",
                "replicas",
                "updatedReplicas",
                "terminatingReplicas",
                "readyReplicas",
                "availableReplicas",
                "unavailableReplicas",
                "collisionCount",
            ],
            "replicas",
            &["updatedReplicas", "readyReplicas", "availableReplicas"],
        ),
        ("apps", "ReplicaSet") | ("", "ReplicationController") => (
            &[
                "replicas",
                "fullyLabeledReplicas",
                "readyReplicas",
                "availableReplicas",
                "observedGeneration",
            ],
            "replicas",
            &["fullyLabeledReplicas", "readyReplicas", "availableReplicas"],
        ),
        ("apps", "StatefulSet") => (
            &[
                "replicas",
                "readyReplicas",
                "currentReplicas",
                "updatedReplicas",
                "availableReplicas",
                "observedGeneration",
                "collisionCount",
            ],
            "replicas",
            &[
                "readyReplicas",
                "currentReplicas",
                "updatedReplicas",
                "availableReplicas",
            ],
        ),
        ("apps", "DaemonSet") => (
            &[
                "currentNumberScheduled",
                "numberMisscheduled",
                "desiredNumberScheduled",
                "numberReady",
                "observedGeneration",
                "updatedNumberScheduled",
                "numberAvailable",
                "numberUnavailable",
                "collisionCount",
            ],
            "",
            &[],
        ),
        _ => (&[], "", &[]),
    }
}

fn whole_name(resource: &Resource) -> &'static str {
    if resource.kind == "Deployment" || resource.kind == "StatefulSet" {
        "cannot be greater than status.replicas"
    } else {
        "cannot be greater than replicas"
    }
}

pub(super) fn validate(resource: &Resource, object: &Object, errors: &mut Vec<FieldError>) {
    let status = &object["status"];
    let (numbers, whole, parts) = counts(resource);
    for field in numbers {
        At::named("status", status)
            .field(field)
            .non_negative(errors);
    }
    if whole.is_empty() {
        return;
    }
    let number = |field: &str| status[field].as_i64().unwrap_or(0);
    for field in parts {
        if number(field) > number(whole) {
            errors.push(FieldError::invalid(
                format!("status.{field}"),
                &status[*field],
                whole_name(resource),
            ));
        }
    }
    if parts.contains(&"readyReplicas") && number("availableReplicas") > number("readyReplicas") {
        errors.push(FieldError::invalid(
            "status.availableReplicas",
            &status["availableReplicas"],
            if resource.group == "apps" && resource.kind != "ReplicaSet" {
                "cannot be greater than status.readyReplicas"
            } else {
                "cannot be greater than readyReplicas"
            },
        ));
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::table;
    use serde_json::json;

    #[test]
    fn no_more_pods_are_ready_than_there_are() {
        let deployments = table::resource("apps", "v1", "deployments").unwrap();
        let found = |status: serde_json::Value| {
            let mut errors = Vec::new();
            validate(deployments, &json!({"status": status}), &mut errors);
            errors.iter().map(ToString::to_string).collect::<Vec<_>>()
        };
        assert!(
            found(json!({"replicas": 2, "readyReplicas": 2, "availableReplicas": 1})).is_empty()
        );
        assert_eq!(
            found(json!({"replicas": 1, "readyReplicas": 2})),
            ["status.readyReplicas: Invalid value: 2: cannot be greater than status.replicas"]
        );
        assert_eq!(found(json!({"updatedReplicas": -1})).len(), 1);
    }
}
