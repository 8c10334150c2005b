//! Validation of Services.

use std::collections::HashSet;
use std::net::IpAddr;

use serde_json::{Value, json};

use super::at::{At, Errors};
use super::{address, metadata, names};
use crate::Object;
use crate::strategy::service::{has_health_port, is_external};

const KINDS: &[&str] = &["ClusterIP", "ExternalName", "LoadBalancer", "NodePort"];
const FOR_BALANCERS: &str = "may only be used when `type` is 'LoadBalancer'";
const SOURCE_RANGES: &str = "service.beta.kubernetes.io/load-balancer-source-ranges";
/// The port of kubelets, which no Service may put in front of the nodes' own.
const KUBELET: i64 = 10_250;

/// What is wrong with a Service.
pub(super) fn validate(object: &Object, errors: &mut Errors) {
    let object = At::object(object);
    let spec = object.field("spec");
    let kind = spec.field("type");
    let headless = is_headless(spec.value);
    let ports = spec.field("ports");
    if ports.len() == 0 && !headless && kind.text() != "ExternalName" {
        ports.missing("", errors);
    }
    match kind.text() {
        "LoadBalancer" => {
            for port in ports.items() {
                if port.field("port").number() == KUBELET {
                    let detail = "may not expose port 10250 externally since it is used by kubelet";
                    port.invalid_as(KUBELET, detail, errors);
                }
            }
            not_headless(&spec, errors);
        }
        "NodePort" => not_headless(&spec, errors),
        "ExternalName" => external_name(&spec, errors),
        _ => {}
    }
    for_each_port(&ports, errors);
    metadata::labels(&spec.field("selector"), errors);
    affinity(&spec, errors);
    families(&spec, errors);
    external_addresses(&spec, errors);
    kind.one_of(KINDS, errors);
    distinct_ports(&ports, kind.text(), errors);
    source_ranges(&object, errors);
    balancer(&spec, errors);
    traffic(&spec, errors);
}

/// What nodes or balancers answer for needs an address of its own.
fn not_headless(spec: &At<'_, '_>, errors: &mut Errors) {
    if is_headless(spec.value) {
        let detail = format!(
            "may not be set to 'None' for {} services",
            spec.field("type").text()
        );
        let first = spec.field("clusterIPs[0]");
        first.invalid_as(json!("None"), &detail, errors);
    }
}

/// A name elsewhere: it has no address here.
fn external_name(spec: &At<'_, '_>, errors: &mut Errors) {
    for field in ["clusterIPs", "ipFamilies", "ipFamilyPolicy"] {
        let field = spec.field(field);
        if field.len() > 0 || !field.text().is_empty() {
            field.forbidden("may not be set for ExternalName services", errors);
        }
    }
    let name = spec.field("externalName");
    let shown = name.text().strip_suffix('.').unwrap_or(name.text());
    if shown.is_empty() {
        name.missing("", errors);
        return;
    }
    for message in names::dns1123_subdomain(shown) {
        name.invalid_as(json!(shown), &message, errors);
    }
}

fn is_headless(spec: &Value) -> bool {
    spec["clusterIPs"] == json!(["None"])
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

/// What is wrong with addresses, families and their policy, each by itself and together. A policy that is not set is
/// fine: it is chosen when the addresses are.
pub(super) fn families(spec: &At<'_, '_>, errors: &mut Errors) {
    if spec.field("type").text() == "ExternalName" {
        return;
    }
    let (first, all) = (spec.field("clusterIP"), spec.field("clusterIPs"));
    let families = spec.field("ipFamilies");
    if first.text().is_empty() {
        if all.len() > 0 {
            all.invalid("must be empty when `clusterIP` is not specified", errors);
        }
    } else if all.len() == 0 {
        all.missing("", errors);
    } else if all.value[0] != first.text() {
        all.invalid("first value must match `clusterIP`", errors);
    }
    let mut seen = HashSet::new();
    for family in families.items() {
        if !["IPv4", "IPv6"].contains(&family.text()) {
            family.not_supported(&["IPv4", "IPv6"], errors);
        }
        if !seen.insert(family.text()) {
            family.duplicate(family.value, errors);
        }
    }
    let policies = ["PreferDualStack", "RequireDualStack", "SingleStack"];
    spec.field("ipFamilyPolicy")
        .one_of_if_set(&policies, errors);
    let mut sound = true;
    for (index, ip) in all.items().enumerate() {
        if index == 0 && ip.text() == "None" {
            if all.len() > 1 {
                sound = false;
                all.invalid("'None' must be the first and only value", errors);
            }
            continue;
        }
        let before = errors.len();
        ip.follows(names::address, errors);
        sound &= errors.len() == before;
    }
    if all.len() > 2 {
        all.invalid("may only hold up to 2 values", errors);
    }
    if sound {
        one_of_each_family(&all, &families, errors);
    }
}

/// Addresses that are well formed: at most one of each family, and each of the family that is said.
fn one_of_each_family(all: &At<'_, '_>, families: &At<'_, '_>, errors: &mut Errors) {
    let of = |ip: &str| {
        let ip: Option<IpAddr> = ip.parse().ok();
        ip.map(|ip| if ip.is_ipv4() { "IPv4" } else { "IPv6" })
    };
    let found: Vec<_> = all.items().filter_map(|ip| of(ip.text())).collect();
    if all.len() > 1 && !(found.contains(&"IPv4") && found.contains(&"IPv6")) {
        let detail = "may specify no more than one IP for each IP family";
        all.invalid(detail, errors);
    }
    for (index, (ip, family)) in all.items().zip(families.items()).enumerate() {
        let known = ["IPv4", "IPv6"].contains(&family.text());
        if known && of(ip.text()).is_some_and(|actual| actual != family.text()) {
            let wanted = family.text();
            let detail =
                format!("expected an {wanted} value as indicated by `ipFamilies[{index}]`");
            ip.invalid(&detail, errors);
        }
    }
}

fn external_addresses(spec: &At<'_, '_>, errors: &mut Errors) {
    for ip in spec.field("externalIPs").items() {
        let before = errors.len();
        ip.follows(names::address, errors);
        if errors.len() == before {
            address::not_special(&ip, errors);
        }
    }
}

/// Whom a load balancer answers: the field, or where that is not set the annotation from before there was one.
fn source_ranges(object: &At<'_, '_>, errors: &mut Errors) {
    let spec = object.field("spec");
    let is_balancer = spec.field("type").text() == "LoadBalancer";
    let ranges = spec.field("LoadBalancerSourceRanges");
    let ranges = ranges.showing(spec.field("loadBalancerSourceRanges").value);
    if ranges.len() > 0 {
        if !is_balancer {
            ranges.forbidden(FOR_BALANCERS, errors);
        }
        for range in ranges.items() {
            address::range(&range, false, errors);
        }
        return;
    }
    let metadata = object.field("metadata");
    let annotations = metadata.field("annotations");
    let annotation = annotations.key(SOURCE_RANGES);
    if !annotation.is_set() {
        return;
    }
    if !is_balancer {
        annotation.forbidden(FOR_BALANCERS, errors);
        return;
    }
    let all = annotation.text().trim();
    for range in all.split(',').filter(|_| !all.is_empty()) {
        address::range(&annotation.showing(&json!(range.trim())), false, errors);
    }
}

/// What only load balancers have.
fn balancer(spec: &At<'_, '_>, errors: &mut Errors) {
    let is_balancer = spec.field("type").text() == "LoadBalancer";
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
    if has_health_port(spec.value) {
        if health.number() == 0 {
            health.missing("", errors);
        } else {
            health.port(errors);
        }
    } else if health.number() != 0 {
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
    let addressed = !is(&old, "ExternalName") && !is(&new, "ExternalName");
    let (was, stays) = (is_headless(old.value), is_headless(new.value));
    if addressed && !(was && stays) {
        kept_addresses(&old, &new, errors);
    }
    if addressed && !was && !stays {
        kept_families(&old, &new, errors);
    }
    let (before, after) = (
        old.field("loadBalancerClass"),
        new.field("loadBalancerClass"),
    );
    let stays = is(&old, "LoadBalancer") && is(&new, "LoadBalancer");
    if stays && before.value != after.value {
        after.invalid(ONCE, errors);
    }
    let (before, after) = (
        old.field("healthCheckNodePort"),
        new.field("healthCheckNodePort"),
    );
    let stays = has_health_port(old.value) && has_health_port(new.value);
    if stays && before.number() != after.number() {
        after.forbidden("field is immutable", errors);
    }
}

const ONCE: &str = "may not change once set";

/// The first address stays; the second may come, and go with a policy that says so.
fn kept_addresses(old: &At<'_, '_>, new: &At<'_, '_>, errors: &mut Errors) {
    let (before, after) = (old.field("clusterIPs"), new.field("clusterIPs"));
    if before.len() == after.len() {
        for (index, ip) in before.items().enumerate() {
            if *ip.value != after.value[index] {
                let path = format!("clusterIPs[{index}]");
                new.field(&path).invalid_as(after.value, ONCE, errors);
            }
        }
        return;
    }
    let first = new.field("clusterIPs[0]");
    if after.len() == 0 {
        let detail = "primary clusterIP can not be unset";
        first.invalid_as(after.value, detail, errors);
    } else if before.len() > 0 && before.value[0] != after.value[0] {
        first.invalid_as(after.value, ONCE, errors);
    }
    let policy = new.field("ipFamilyPolicy");
    if before.len() > after.len() && after.len() == 1 && policy.text() != "SingleStack" {
        let detail = "must be set to 'SingleStack' when releasing the secondary clusterIP";
        policy.invalid(detail, errors);
    }
}

/// As with the addresses.
fn kept_families(old: &At<'_, '_>, new: &At<'_, '_>, errors: &mut Errors) {
    let (before, after) = (old.field("ipFamilies"), new.field("ipFamilies"));
    let first = new.field("ipFamilies[0]");
    if before.len() == after.len() {
        for (index, family) in before.items().enumerate() {
            if *family.value != after.value[index] {
                first.invalid_as(after.value, ONCE, errors);
            }
        }
        return;
    }
    if before.len() > after.len() && new.field("clusterIPs").len() == 0 {
        let detail = "primary ipFamily can not be unset";
        first.invalid_as(after.value, detail, errors);
    }
    if before.len() > 0 && after.len() > 0 && before.value[0] != after.value[0] {
        first.invalid_as(new.field("clusterIPs").value, ONCE, errors);
    }
    let policy = new.field("ipFamilyPolicy");
    if before.len() > after.len() && after.len() == 1 && policy.text() != "SingleStack" {
        let detail = "must be set to 'SingleStack' when releasing the secondary ipFamily";
        policy.invalid(detail, errors);
    }
}

/// What is wrong with what a load balancer's maker says of it.
pub(super) fn status(object: &Object, errors: &mut Errors) {
    let object = At::object(object);
    let (status, spec) = (object.field("status"), object.field("spec"));
    let balancer = status.field("loadBalancer");
    let all = balancer.field("ingress");
    if all.len() > 0 && spec.field("type").text() != "LoadBalancer" {
        let detail = "may only be used when `spec.type` is \"LoadBalancer\"";
        all.forbidden(detail, errors);
        return;
    }
    for one in all.items() {
        let (ip, mode, name) = (one.field("ip"), one.field("ipMode"), one.field("hostname"));
        ip.follows_if_set(names::address, errors);
        if !ip.text().is_empty() && !mode.is_set() {
            mode.missing("must be specified when `ip` is set", errors);
        } else if mode.is_set() && ip.text().is_empty() {
            mode.forbidden("may not be specified when `ip` is not set", errors);
        } else {
            mode.one_of_if_set(&["Proxy", "VIP"], errors);
        }
        name.follows_if_set(names::dns1123_subdomain, errors);
        if name.text().parse::<IpAddr>().is_ok() {
            name.invalid("must be a DNS name, not an IP address", errors);
        }
    }
}
