//! Validation of pods and of the pod specifications in templates.

mod affinity;
mod container;
mod env;
mod handler;
mod resources;
mod security;
mod update;
mod volume;

use std::collections::HashSet;

use serde_json::json;

use super::at::{At, Errors};
use super::{metadata, names};

pub(super) use update::{ephemeral_update, status_update, update};

const EFFECTS: &[&str] = &["NoSchedule", "PreferNoSchedule", "NoExecute"];

/// What is wrong with a new pod, and would be right in a template.
pub(super) fn create(spec: &At<'_, '_>, errors: &mut Errors) {
    images(spec, errors);
    let ephemeral = spec.field("ephemeralContainers");
    if ephemeral.len() > 0 {
        ephemeral.forbidden("cannot be set on create", errors);
    }
    let node = spec.field("nodeName");
    if spec.field("schedulingGates").len() > 0 && !node.text().is_empty() {
        let detail = "cannot be set until all schedulingGates have been cleared";
        node.forbidden(detail, errors);
    }
}

/// A pod's images are exactly named; templates were never asked to.
fn images(spec: &At<'_, '_>, errors: &mut Errors) {
    for list in ["containers", "initContainers"] {
        for container in spec.field(list).items() {
            let image = container.field("image");
            if image.text().trim() != image.text() {
                image.invalid("must not have leading or trailing whitespace", errors);
            }
        }
    }
}

/// What is wrong with a pod's specification.
pub(super) fn spec(spec: &At<'_, '_>, errors: &mut Errors) {
    let volumes = volume::volumes(&spec.field("volumes"), errors);
    container::containers(spec, &volumes, errors);
    resources::pod_level(spec, errors);
    host_network_ports(spec, errors);
    let policies = ["Always", "OnFailure", "Never"];
    spec.field("restartPolicy").one_of(&policies, errors);
    let policies = ["ClusterFirstWithHostNet", "ClusterFirst", "Default", "None"];
    spec.field("dnsPolicy").one_of(&policies, errors);
    metadata::labels(&spec.field("nodeSelector"), errors);
    security::of_pod(spec, errors);
    affinity::affinity(&spec.field("affinity"), errors);
    dns_config(spec, errors);
    for gate in spec.field("readinessGates").items() {
        let condition = gate.field("conditionType");
        condition.follows(names::qualified_name, errors);
    }
    scheduling_gates(&spec.field("schedulingGates"), errors);
    affinity::spread(&spec.field("topologySpreadConstraints"), errors);
    security::host_users(spec, errors);
    for name in ["serviceAccountName", "nodeName"] {
        let field = spec.field(name);
        field.follows_if_set(names::dns1123_subdomain, errors);
    }
    let deadline = spec.field("activeDeadlineSeconds");
    deadline.between(1, i64::from(i32::MAX), errors);
    for name in ["hostname", "subdomain"] {
        spec.field(name)
            .follows_if_set(names::dns1123_label, errors);
    }
    tolerations(&spec.field("tolerations"), errors);
    for alias in spec.field("hostAliases").items() {
        alias.field("ip").follows(names::address, errors);
        let hostnames = alias.field("hostnames");
        for name in hostnames.items() {
            for message in names::dns1123_subdomain(name.text()) {
                hostnames.invalid_as(name.value, &message, errors);
            }
        }
    }
    for name in ["priorityClassName", "runtimeClassName"] {
        let field = spec.field(name);
        field.follows_if_set(names::dns1123_subdomain, errors);
    }
    let preemption = spec.field("preemptionPolicy");
    preemption.one_of_if_set(&["PreemptLowerPriority", "Never"], errors);
    resources::amounts(&spec.field("overhead"), errors);
    let os = spec.field("os");
    if os.is_set() {
        let name = os.field("name");
        if name.text().is_empty() {
            name.missing("cannot be empty", errors);
        } else if !["linux", "windows"].contains(&name.text()) {
            let known = ["linux", "windows"];
            os.showing(name.value).not_supported(&known, errors);
        }
    }
}

/// In the host's network a port is the host's port.
fn host_network_ports(spec: &At<'_, '_>, errors: &mut Errors) {
    if !spec.field("hostNetwork").is_true() {
        return;
    }
    for container in spec.field("containers").items() {
        for port in container.field("ports").items() {
            let host = port.field("hostPort");
            if host.number() != port.field("containerPort").number() {
                let detail = "must match `containerPort` when `hostNetwork` is true";
                host.invalid_as(host.number(), detail, errors);
            }
        }
    }
}

fn dns_config(spec: &At<'_, '_>, errors: &mut Errors) {
    let config = spec.field("dnsConfig");
    let servers = config.field("nameservers");
    if spec.field("dnsPolicy").text() == "None" {
        if !config.is_set() {
            let detail = "must provide `dnsConfig` when `dnsPolicy` is None";
            config.missing(detail, errors);
            return;
        }
        if servers.len() == 0 {
            let detail = "must provide at least one DNS nameserver when `dnsPolicy` is None";
            servers.missing(detail, errors);
        }
    }
    if servers.len() > 3 {
        servers.invalid("must not have more than 3 nameservers", errors);
    }
    for server in servers.items() {
        server.follows(names::address, errors);
    }
    let searches = config.field("searches");
    if searches.len() > 32 {
        searches.invalid("must not have more than 32 search paths", errors);
    }
    for search in searches.items() {
        // The root's dot may stand last; underscores are found in service records.
        let path = search.text().trim_end_matches('.').replace('_', "-");
        for message in names::dns1123_subdomain(&path) {
            if search.text() != "." {
                search.invalid(&message, errors);
            }
        }
    }
    for option in config.field("options").items() {
        let name = option.field("name");
        if name.text().is_empty() {
            name.missing("must not be empty", errors);
        }
    }
}

fn scheduling_gates(gates: &At<'_, '_>, errors: &mut Errors) {
    let mut seen = HashSet::new();
    for gate in gates.items() {
        let name = gate.field("name");
        for message in names::qualified_name(name.text()) {
            gate.invalid_as(json!(name.text()), &message, errors);
        }
        if !seen.insert(name.text()) {
            gate.duplicate(name.value, errors);
        }
    }
}

/// The effect of a taint or a toleration.
pub(super) fn effect(effect: &At<'_, '_>, errors: &mut Errors) {
    if !EFFECTS.contains(&effect.text()) {
        effect.not_supported(EFFECTS, errors);
    }
}

fn tolerations(tolerations: &At<'_, '_>, errors: &mut Errors) {
    for toleration in tolerations.items() {
        let (key, value) = (toleration.field("key"), toleration.field("value"));
        let operator = toleration.field("operator");
        key.follows_if_set(names::qualified_name, errors);
        if key.text().is_empty() && operator.text() != "Exists" {
            operator.invalid_as(
                json!(operator.text()),
                "operator must be Exists when `key` is empty, which means \"match all values and all keys\"",
                errors,
            );
        }
        let effect = toleration.field("effect");
        let limited = toleration.field("tolerationSeconds").is_set();
        if limited && effect.text() != "NoExecute" {
            effect.invalid_as(
                json!(effect.text()),
                "effect must be 'NoExecute' when `tolerationSeconds` is set",
                errors,
            );
        }
        match operator.text() {
            "" | "Equal" => {
                for message in names::label_value(value.text()) {
                    operator.invalid_as(value.value, &message, errors);
                }
            }
            "Exists" if !value.text().is_empty() => {
                let detail = "value must be empty when `operator` is 'Exists'";
                operator.invalid_as(toleration.value, detail, errors);
            }
            "Exists" => {}
            _ => operator.not_supported(&["Equal", "Exists"], errors),
        }
        if !effect.text().is_empty() {
            self::effect(&effect, errors);
        }
    }
}
