//! Validation of the kinds that make pods from a template.

use super::at::{At, Errors};
use super::{metadata, pod};
use crate::Object;
use crate::field_error::FieldError;
use crate::selector::LabelSelector;
use crate::table::Resource;

const PERCENT: &str = "a valid percent string must be a numeric string followed by an ending '%' (e.g. '1%',  or '93%', regex used for validation is '[0-9]+%')";

/// A template of pods.
pub(super) fn template(template: &At<'_, '_>, errors: &mut Errors) {
    let of_pods = template.field("metadata");
    // Errors of labels and annotations are told of the template itself.
    for name in ["labels", "annotations"] {
        let told = template.field(name);
        let told = told.showing(of_pods.field(name).value);
        if name == "labels" {
            metadata::labels(&told, errors);
        } else {
            metadata::annotations(&told, errors);
        }
    }
    let spec = template.field("spec");
    pod::spec(&spec, errors);
    let ephemeral = spec.field("ephemeralContainers");
    if ephemeral.len() > 0 {
        ephemeral.forbidden("ephemeral containers not allowed in pod template", errors);
    }
}

/// Replicas, selector, template, strategy.
pub(super) fn validate(resource: &Resource, object: &Object, errors: &mut Errors) {
    let object = At::object(object);
    let spec = object.field("spec");
    for name in ["replicas", "parallelism", "completions", "backoffLimit"] {
        spec.field(name).non_negative(errors);
    }
    let sound = resource.group != "apps" || selector(resource.kind, &spec, errors);
    if sound {
        pods(resource, &spec, errors);
    }
    match resource.kind {
        "Deployment" => deployment_strategy(&spec, errors),
        "DaemonSet" => daemon_strategy(&spec, errors),
        _ => {}
    }
    let ready = spec.field("minReadySeconds");
    ready.non_negative(errors);
    spec.field("revisionHistoryLimit").non_negative(errors);
    let deadline = spec.field("progressDeadlineSeconds");
    deadline.non_negative(errors);
    if deadline.is_set() && deadline.number() <= ready.number() {
        deadline.invalid("must be greater than minReadySeconds", errors);
    }
}

/// The template, and what of it these kinds do not have.
fn pods(resource: &Resource, spec: &At<'_, '_>, errors: &mut Errors) {
    let template = spec.field("template");
    self::template(&template, errors);
    let of_pod = template.field("spec");
    let restart = of_pod.field("restartPolicy");
    if resource.group == "batch" {
        if restart.text() == "Always" {
            restart.missing("valid values: \"OnFailure\", \"Never\"", errors);
        }
        return;
    }
    if restart.is_set() && restart.text() != "Always" {
        restart.not_supported(&["Always"], errors);
    }
    let deadline = of_pod.field("activeDeadlineSeconds");
    if deadline.is_set() {
        let kind = match resource.kind {
            "Deployment" => "ReplicaSet",
            other => other,
        };
        let detail = format!("activeDeadlineSeconds in {kind} is not Supported");
        deadline.forbidden(&detail, errors);
    }
}

/// The selector, and that it selects what the template makes. False: it cannot be used.
fn selector(kind: &str, spec: &At<'_, '_>, errors: &mut Errors) -> bool {
    let selector = spec.field("selector");
    let labels = &spec.value["template"]["metadata"]["labels"];
    let mismatch = FieldError::invalid(
        "spec.template.metadata.labels",
        labels,
        "`selector` does not match template `labels`",
    );
    if !selector.is_set() {
        if kind != "DaemonSet" {
            selector.missing("", errors);
        }
        // No selector selects nothing.
        errors.push(mismatch);
        return true;
    }
    let sound = metadata::label_selector(&selector, errors);
    match LabelSelector::from_object(selector.value) {
        Ok(parsed) if sound => {
            if parsed.is_everything() {
                let of = match kind {
                    "DaemonSet" => "daemonset",
                    "StatefulSet" => "statefulset",
                    _ => "deployment",
                };
                let detail = format!("empty selector is invalid for {of}");
                selector.invalid(&detail, errors);
            } else if !parsed.matches(labels.as_object()) {
                errors.push(mismatch);
            }
            true
        }
        _ => {
            selector.invalid("invalid label selector", errors);
            false
        }
    }
}

/// A count, or a share in percent.
fn count_or_percent(at: &At<'_, '_>, errors: &mut Errors) {
    match at.value.as_str() {
        Some(_) if percent(at).is_none() => at.invalid(PERCENT, errors),
        Some(_) => {}
        None => at.non_negative(errors),
    }
}

fn percent(at: &At<'_, '_>) -> Option<u32> {
    at.text().strip_suffix('%')?.parse().ok()
}

fn is_zero(at: &At<'_, '_>) -> bool {
    percent(at) == Some(0) || !at.value.is_string() && at.number() == 0
}

fn at_most_all(at: &At<'_, '_>, errors: &mut Errors) {
    if percent(at).is_some_and(|share| share > 100) {
        at.invalid("must not be greater than 100%", errors);
    }
}

fn deployment_strategy(spec: &At<'_, '_>, errors: &mut Errors) {
    let strategy = spec.field("strategy");
    let rolling = strategy.field("rollingUpdate");
    match strategy.field("type").text() {
        "Recreate" if rolling.is_set() => rolling.forbidden(
            "may not be specified when strategy `type` is 'Recreate'",
            errors,
        ),
        "Recreate" => {}
        "RollingUpdate" => {
            let (fewer, more) = (rolling.field("maxUnavailable"), rolling.field("maxSurge"));
            count_or_percent(&fewer, errors);
            count_or_percent(&more, errors);
            if is_zero(&fewer) && is_zero(&more) {
                fewer.invalid("may not be 0 when `maxSurge` is 0", errors);
            }
            at_most_all(&fewer, errors);
        }
        _ => strategy
            .field("type")
            .not_supported(&["Recreate", "RollingUpdate"], errors),
    }
}

fn daemon_strategy(spec: &At<'_, '_>, errors: &mut Errors) {
    let strategy = spec.field("updateStrategy");
    let rolling = strategy.field("rollingUpdate");
    let kind = strategy.field("type");
    match kind.text() {
        "OnDelete" => {}
        "RollingUpdate" => {
            let (fewer, more) = (rolling.field("maxUnavailable"), rolling.field("maxSurge"));
            count_or_percent(&fewer, errors);
            count_or_percent(&more, errors);
            at_most_all(&fewer, errors);
            at_most_all(&more, errors);
            if is_zero(&fewer) && is_zero(&more) {
                fewer.missing("cannot be 0 when maxSurge is 0", errors);
            } else if !is_zero(&fewer) && !is_zero(&more) {
                let detail = "may not be set when maxUnavailable is non-zero";
                more.invalid(detail, errors);
            }
        }
        _ => {
            let shown = format!(
                "{{\"Type\":{},\"RollingUpdate\":{}}}",
                kind.value, rolling.value
            );
            let known = ["RollingUpdate", "OnDelete"];
            errors.push(FieldError::not_supported(strategy.path(), shown, &known));
        }
    }
}
