//! Validation of Services.

use std::collections::HashSet;

use serde_json::json;

use super::at::{At, Errors};
use super::{address, metadata, names};
use crate::Object;
use crate::strategy::service::{has_health_port, is_external};

const KINDS: &[&str] = &["ClusterIP", "ExternalName", "LoadBalancer", "NodePort"];
const FOR_BALANCERS: &str = "may only be used when `type` is 'LoadBalancer'";

/// What is wrong with a Service.
pub(super) fn validate(object: &Object, errors: &mut Errors) {
    let object = At::object(object);
    let spec = object.field("spec");
    let kind = spec.field("type");
    let headless = spec.field("clusterIP").text() == "None";
    let ports = spec.field("ports");
    if ports.len() == 0 && !headless && kind.text() != "ExternalName" {
        ports.missing("", errors);
    }
    if kind.text() == "ExternalName" {
        let name = spec.field("externalName");
        if name.required(errors) {
            let shown = name.text().trim_end_matches('.');
            for message in names::dns1123_subdomain(shown) {
                name.invalid_as(json!(shown), &message, errors);
            }
        }
    }
    for_each_port(&ports, errors);
    metadata::labels(&spec.field("selector"), errors);
    affinity(&spec, errors);
    addresses(&spec, errors);
    kind.one_of(KINDS, errors);
    distinct_ports(&ports, kind.text(), errors);
    balancer(&spec, errors);
    traffic(&spec, errors);
}

fn for_each_port(ports: &At<'_, '_>, errors: &mut Errors) {
    let mut seen = HashSet::new();
    for port in ports.items() {
        let name = port.field("name");
        if name.text().is_empty() {
            if ports.len() > 1 {
                name.missing("", errors);
            }
        } else {
            name.follows(names::dns1123_label, errors);
            if !seen.insert(name.text()) {
                name.duplicate(name.value, errors);
            }
        }
        port.field("port").port(errors);
        let protocol = port.field("protocol");
        protocol.one_of(&["SCTP", "TCP", "UDP"], errors);
        let target = port.field("targetPort");
        if target.is_set() {
            target.port_or_name(errors);
        }
        let application = port.field("appProtocol");
        application.follows_if_set(names::qualified_name, errors);
    }
}

/// No two ports are the same, neither within nor at the nodes.
fn distinct_ports(ports: &At<'_, '_>, kind: &str, errors: &mut Errors) {
    if kind == "ClusterIP" {
        for port in ports.items() {
            let node = port.field("nodePort");
            if node.number() != 0 {
                node.forbidden("may not be used when `type` is 'ClusterIP'", errors);
            }
        }
    }
    let mut seen = HashSet::new();
    for port in ports.items() {
        let node = port.field("nodePort");
        let key = (port.field("protocol").text(), node.number());
        if node.number() != 0 && !seen.insert(key) {
            node.duplicate(node.value, errors);
        }
    }
    let mut seen = HashSet::new();
    for port in ports.items() {
        let (protocol, number) = (port.field("protocol"), port.field("port"));
        if !seen.insert((protocol.text(), number.number())) {
            let pair = json!({"port": number.value, "protocol": protocol.value});
            port.duplicate(pair, errors);
        }
    }
}

fn affinity(spec: &At<'_, '_>, errors: &mut Errors) {
    let kind = spec.field("sessionAffinity");
    kind.one_of(&["ClientIP", "None"], errors);
    let config = spec.field("sessionAffinityConfig");
    match kind.text() {
        "ClientIP" => {
            let client = config.field("clientIP");
            let timeout = client.field("timeoutSeconds");
            if !timeout.is_set() {
                config.missing("when session affinity type is ClientIP", errors);
            } else if !(1..=86400).contains(&timeout.number()) {
                timeout.invalid("must be greater than 0 and less than 86400", errors);
            }
        }
        "None" if config.is_set() => {
            config.forbidden("must not be set when session affinity is None", errors);
        }
        _ => {}
    }
}

fn addresses(spec: &At<'_, '_>, errors: &mut Errors) {
    let policies = ["PreferDualStack", "RequireDualStack", "SingleStack"];
    spec.field("ipFamilyPolicy")
        .one_of_if_set(&policies, errors);
    let mut seen = HashSet::new();
    for family in spec.field("ipFamilies").items() {
        if !["IPv4", "IPv6"].contains(&family.text()) {
            family.not_supported(&["IPv4", "IPv6"], errors);
        } else if !seen.insert(family.text()) {
            family.duplicate(family.value, errors);
        }
    }
    for ip in spec.field("clusterIPs").items() {
        if ip.text() != "None" {
            ip.follows(names::address, errors);
        }
    }
    for ip in spec.field("externalIPs").items() {
        let before = errors.len();
        ip.follows(names::address, errors);
        if errors.len() == before {
            address::not_special(&ip, errors);
        }
    }
}

/// What only load balancers have.
fn balancer(spec: &At<'_, '_>, errors: &mut Errors) {
    let is_balancer = spec.field("type").text() == "LoadBalancer";
    let ranges = spec.field("LoadBalancerSourceRanges");
    let ranges = ranges.showing(spec.field("loadBalancerSourceRanges").value);
    if ranges.len() > 0 && !is_balancer {
        ranges.forbidden(FOR_BALANCERS, errors);
    }
    for range in ranges.items() {
        address::range(&range, false, errors);
    }
    let ports = spec.field("allocateLoadBalancerNodePorts");
    if ports.is_set() && !is_balancer {
        ports.forbidden(FOR_BALANCERS, errors);
    }
    let class = spec.field("loadBalancerClass");
    if class.is_set() {
        if is_balancer {
            class.follows(names::qualified_name, errors);
        } else {
            class.forbidden(FOR_BALANCERS, errors);
        }
    }
}

fn traffic(spec: &At<'_, '_>, errors: &mut Errors) {
    let external = spec.field("externalTrafficPolicy");
    if is_external(spec.value) {
        external.one_of(&["Cluster", "Local"], errors);
    } else if !external.text().is_empty() {
        let detail = "may only be set for externally-accessible services";
        external.invalid(detail, errors);
    }
    let health = spec.field("healthCheckNodePort");
    if health.number() != 0 && !has_health_port(spec.value) {
        let detail =
            "may only be set when `type` is 'LoadBalancer' and `externalTrafficPolicy` is 'Local'";
        health.invalid(detail, errors);
    }
    let internal = spec.field("internalTrafficPolicy");
    internal.one_of_if_set(&["Cluster", "Local"], errors);
    let distribution = spec.field("trafficDistribution");
    let known = ["PreferClose", "PreferSameZone", "PreferSameNode"];
    distribution.one_of_if_set(&known, errors);
}

/// What of a Service may not change.
pub(super) fn update(old: &Object, new: &Object, errors: &mut Errors) {
    let (old, new) = (At::object(old), At::object(new));
    let (old, new) = (old.field("spec"), new.field("spec"));
    let is = |spec: &At<'_, '_>, kind: &str| spec.field("type").text() == kind;
    let (before, after) = (old.field("clusterIP"), new.field("clusterIP"));
    let named = is(&old, "ExternalName") || is(&new, "ExternalName");
    if !named && !before.text().is_empty() && before.value != after.value {
        let first = new.field("clusterIPs[0]");
        first.invalid_as(json!([after.value]), "may not change once set", errors);
    }
    let (before, after) = (
        old.field("loadBalancerClass"),
        new.field("loadBalancerClass"),
    );
    let stays = is(&old, "LoadBalancer") && is(&new, "LoadBalancer");
    if stays && before.value != after.value {
        after.invalid("may not change once set", errors);
    }
}
