//! Validation of the kinds that make pods from a template.

use serde_json::Value;

use super::{label_selector, non_negative, pod};
use crate::Object;
use crate::field_error::FieldError;
use crate::selector::LabelSelector;
use crate::table::Resource;

/// Replicas, selector, template, strategy.
pub(super) fn validate(resource: &Resource, object: &Object, errors: &mut Vec<FieldError>) {
    let spec = &object["spec"];
    for field in [
        "replicas",
        "minReadySeconds",
        "revisionHistoryLimit",
        "progressDeadlineSeconds",
        "parallelism",
        "completions",
        "backoffLimit",
    ] {
        non_negative(&format!("spec.{field}"), &spec[field], errors);
    }
    if resource.group == "apps" {
        selector(resource.kind, spec, errors);
    }
    super::labels(
        "spec.template.metadata.labels",
        &spec["template"]["metadata"]["labels"],
        errors,
    );
    pod::spec("spec.template.spec", &spec["template"]["spec"], errors);
    let restart = &spec["template"]["spec"]["restartPolicy"];
    if resource.group == "batch" {
        if restart == "Always" {
            errors.push(FieldError::required(
                "spec.template.spec.restartPolicy",
                "valid values: \"OnFailure\", \"Never\"",
            ));
        }
    } else if restart.is_string() && restart != "Always" {
        errors.push(FieldError::not_supported(
            "spec.template.spec.restartPolicy",
            restart,
            &["Always"],
        ));
    }
    if resource.kind == "Deployment" {
        deployment_strategy(spec, errors);
    }
}

fn selector(kind: &str, spec: &Value, errors: &mut Vec<FieldError>) {
    let selector = &spec["selector"];
    let labels = &spec["template"]["metadata"]["labels"];
    let mismatch = || {
        FieldError::invalid(
            "spec.template.metadata.labels",
            labels,
            "`selector` does not match template `labels`",
        )
    };
    if selector.is_null() {
        if kind != "DaemonSet" {
            errors.push(FieldError::required("spec.selector", ""));
        }
        // No selector selects nothing.
        errors.push(mismatch());
        return;
    }
    label_selector("spec.selector", selector, errors);
    match LabelSelector::from_object(selector) {
        Ok(parsed) if parsed.is_everything() => {
            errors.push(FieldError::invalid(
                "spec.selector",
                selector,
                match kind {
                    "DaemonSet" => "empty selector is invalid for daemonset",
                    "StatefulSet" => "empty selector is invalid for statefulset",
                    _ => "empty selector is invalid for deployment",
                },
            ));
        }
        Ok(parsed) => {
            if !parsed.matches(labels.as_object()) {
                errors.push(mismatch());
            }
        }
        // The selector's own errors were told above.
        Err(_) => {}
    }
}

fn deployment_strategy(spec: &Value, errors: &mut Vec<FieldError>) {
    let strategy = &spec["strategy"];
    match strategy["type"].as_str().unwrap_or_default() {
        "Recreate" => {
            if strategy["rollingUpdate"].is_object() {
                errors.push(FieldError::forbidden(
                    "spec.strategy.rollingUpdate",
                    "may not be specified when strategy `type` is 'Recreate'",
                ));
            }
        }
        "RollingUpdate" => {
            let zero = |value: &Value| value == 0 || value == "0%" || value == "0";
            for field in ["maxUnavailable", "maxSurge"] {
                let value = &strategy["rollingUpdate"][field];
                let path = format!("spec.strategy.rollingUpdate.{field}");
                match value {
                    Value::String(text) => {
                        let number = text
                            .strip_suffix('%')
                            .and_then(|number| number.parse::<u32>().ok());
                        match number {
                            None => errors.push(FieldError::invalid(path, value, "a valid percent string must be a numeric string followed by an ending '%' (e.g. '1%',  or '93%', regex used for validation is '[0-9]+%')")),
                            Some(number) if field == "maxUnavailable" && number > 100 => {
                                errors.push(FieldError::invalid(path, value, "must not be greater than 100%"));
                            }
                            Some(_) => {}
                        }
                    }
                    value => non_negative(&path, value, errors),
                }
            }
            if zero(&strategy["rollingUpdate"]["maxUnavailable"])
                && zero(&strategy["rollingUpdate"]["maxSurge"])
            {
                errors.push(FieldError::invalid(
                    "spec.strategy.rollingUpdate.maxUnavailable",
                    &strategy["rollingUpdate"]["maxUnavailable"],
                    "may not be 0 when `maxSurge` is 0",
                ));
            }
        }
        _ => errors.push(FieldError::not_supported(
            "spec.strategy.type",
            &strategy["type"],
            &["Recreate", "RollingUpdate"],
        )),
    }
}
