//! Validation of hooks and probes: what is run, asked or connected to.

use serde_json::json;

use super::super::at::{At, Errors};
use super::super::names;

/// What runs after a container's start and before its end.
pub(super) fn lifecycle(lifecycle: &At<'_, '_>, grace: i64, errors: &mut Errors) {
    for name in ["postStart", "preStop"] {
        let hook = lifecycle.field(name);
        if hook.is_set() {
            handler(&hook, grace, errors);
        }
    }
}

/// A probe of this kind, if there is one.
pub(super) fn probe(probe: &At<'_, '_>, kind: &str, grace: i64, errors: &mut Errors) {
    if !probe.is_set() {
        return;
    }
    handler(probe, grace, errors);
    for name in [
        "initialDelaySeconds",
        "timeoutSeconds",
        "periodSeconds",
        "successThreshold",
        "failureThreshold",
    ] {
        probe.field(name).non_negative(errors);
    }
    let own_grace = probe.field("terminationGracePeriodSeconds");
    own_grace.positive_if_set(errors);
    let successes = probe.field("successThreshold");
    if kind == "readinessProbe" {
        if own_grace.is_set() {
            own_grace.invalid("must not be set for readinessProbes", errors);
        }
    } else if successes.number() != 1 {
        successes.invalid_as(successes.number(), "must be 1", errors);
    }
}

fn handler(handler: &At<'_, '_>, grace: i64, errors: &mut Errors) {
    let mut one = false;
    for name in ["exec", "httpGet", "tcpSocket", "grpc", "sleep"] {
        let action = handler.field(name);
        if !action.is_set() {
            continue;
        }
        if one {
            action.forbidden("may not specify more than 1 handler type", errors);
            continue;
        }
        one = true;
        match name {
            "exec" => {
                let command = action.field("command");
                if command.len() == 0 {
                    command.missing("", errors);
                }
            }
            "httpGet" => http(&action, errors),
            "tcpSocket" => action.field("port").port_or_name(errors),
            "grpc" => action.field("port").port(errors),
            _ => sleep(&action, grace, errors),
        }
    }
    if !one {
        handler.missing("must specify a handler type", errors);
    }
}

fn http(action: &At<'_, '_>, errors: &mut Errors) {
    action.field("path").required(errors);
    action.field("port").port_or_name(errors);
    action.field("scheme").one_of(&["HTTP", "HTTPS"], errors);
    let headers = action.field("httpHeaders");
    for header in headers.items() {
        let name = header.field("name").text();
        for message in names::header_name(name) {
            headers.invalid_as(json!(name), &message, errors);
        }
    }
}

fn sleep(action: &At<'_, '_>, grace: i64, errors: &mut Errors) {
    let seconds = action.field("seconds").number();
    if !(0..=grace).contains(&seconds) {
        let detail =
            format!("must be non-negative and less than terminationGracePeriodSeconds ({grace})");
        action.invalid_as(seconds, &detail, errors);
    }
}
