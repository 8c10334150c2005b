//! Address families of a Service: which it has when it does not say, and what goes together.

use std::net::IpAddr;

use ipnet::IpNet;
use serde_json::{Value, json};
use xebec_schema::Object;
use xebec_schema::field_error::FieldError;
use xebec_schema::strategy::service::has_health_port;
use xebec_schema::validate::service_families;

use super::{kind, list, text};

const POLICY: &str = "spec.ipFamilyPolicy";

pub(super) fn of_range(range: &IpNet) -> &'static str {
    of_address(range.network())
}

pub(super) fn of_address(ip: IpAddr) -> &'static str {
    if ip.is_ipv4() { "IPv4" } else { "IPv6" }
}

fn other(family: &Value) -> Value {
    if *family == "IPv4" { "IPv6" } else { "IPv4" }.into()
}

/// Lists that are not set are as good as empty ones.
fn same(a: &Value, b: &Value, field: &str) -> bool {
    list(&a[field]) == list(&b[field])
}

fn unset(spec: &mut Value, field: &str) {
    if let Some(spec) = spec.as_object_mut() {
        spec.remove(field);
    }
}

/// What was chosen for a Service stays although a client leaves it out, and `clusterIP` and `clusterIPs` go together
/// for clients that know only one of them.
pub(super) fn keep_allocated(old: Option<&Value>, spec: &mut Value) {
    let Some(old) = old else {
        if text(&spec["clusterIP"]).is_some() && list(&spec["clusterIPs"]).is_empty() {
            spec["clusterIPs"] = json!([spec["clusterIP"]]);
        }
        return;
    };
    if kind(old) != "ExternalName" && kind(spec) != "ExternalName" {
        if text(&spec["clusterIP"]).is_none() && text(&old["clusterIP"]).is_some() {
            spec["clusterIP"] = old["clusterIP"].clone();
        }
        if list(&spec["clusterIPs"]).is_empty() && !list(&old["clusterIPs"]).is_empty() {
            spec["clusterIPs"] = old["clusterIPs"].clone();
        }
    }
    keep_node_ports(old, spec);
    if has_health_port(old) && has_health_port(spec) {
        const FIELD: &str = "healthCheckNodePort";
        if spec[FIELD].as_u64().unwrap_or(0) == 0 && !old[FIELD].is_null() {
            spec[FIELD] = old[FIELD].clone();
        }
    }
    let (before, after) = (text(&old["clusterIP"]), text(&spec["clusterIP"]));
    if before != after && same(old, spec, "clusterIPs") {
        match after {
            Some(ip) => spec["clusterIPs"] = json!([ip]),
            None => unset(spec, "clusterIPs"),
        }
    }
}

/// A port of the same name keeps its port at the nodes, unless another port has taken that over.
fn keep_node_ports(old: &Value, spec: &mut Value) {
    let needs = |spec: &Value| match kind(spec) {
        "NodePort" => true,
        "LoadBalancer" => spec["allocateLoadBalancerNodePorts"] != false,
        _ => false,
    };
    if !needs(old) || !needs(spec) {
        return;
    }
    let number = |port: &Value| port["nodePort"].as_u64().unwrap_or(0);
    let name = |port: &Value| text(&port["name"]).map(str::to_owned);
    let said: Vec<u64> = list(&spec["ports"]).iter().map(number).collect();
    for port in spec["ports"].as_array_mut().into_iter().flatten() {
        let mut before = list(&old["ports"]).iter();
        let before = before
            .rfind(|before| name(before) == name(port))
            .map(number);
        if let Some(before) = before.filter(|before| *before != 0) {
            if number(port) == 0 && !said.contains(&before) {
                port["nodePort"] = before.into();
            }
        }
    }
}

/// One that prefers both families is neither given the second one nor loses it because the cluster's ranges
/// changed; somebody must ask for it.
fn stays_as_it_is(old: &Value, spec: &Value) -> bool {
    let prefers = |spec: &Value| spec["ipFamilyPolicy"] == "PreferDualStack";
    kind(old) == kind(spec)
        && ["ClusterIP", "NodePort", "LoadBalancer"].contains(&kind(spec))
        && prefers(spec)
        && (prefers(old) || old["ipFamilyPolicy"].is_null())
        && same(old, spec, "clusterIPs")
        && same(old, spec, "ipFamilies")
}

/// Fills in policy and families. `configured`: the families of the cluster, the primary one first.
pub(super) fn choose(
    old: Option<&Value>,
    service: &mut Object,
    configured: &[&str],
) -> Vec<FieldError> {
    let spec = &mut service["spec"];
    if kind(spec) == "ExternalName" || old.is_some_and(|old| stays_as_it_is(old, spec)) {
        return Vec::new();
    }
    let open = spec["clusterIP"] == "None"
        && spec["selector"]
            .as_object()
            .is_none_or(serde_json::Map::is_empty);
    if spec["ipFamilyPolicy"].is_null() {
        let before = old.map(|old| &old["ipFamilyPolicy"]);
        spec["ipFamilyPolicy"] = match before.filter(|policy| !policy.is_null()) {
            Some(policy) => policy.clone(),
            // Whoever names the endpoints of a headless Service may name them in both families.
            None if open => "RequireDualStack".into(),
            None => "SingleStack".into(),
        };
    }
    let mut errors = service_families(service);
    if !errors.is_empty() {
        return errors;
    }
    let spec = &mut service["spec"];
    if let Some(old) = old {
        shrink(old, spec, &mut errors);
    }
    agree(spec, configured, &mut errors);
    if !errors.is_empty() {
        return errors;
    }
    let single = spec["ipFamilyPolicy"] == "SingleStack";
    let primary = || json!([configured.first().copied().unwrap_or("IPv4")]);
    if open {
        if list(&spec["ipFamilies"]).is_empty() {
            spec["ipFamilies"] = primary();
        }
        add_other(spec, !single);
        return errors;
    }
    if spec["ipFamilyPolicy"] == "RequireDualStack" && configured.len() < 2 {
        let detail = "this cluster is not configured for dual-stack services";
        errors.push(FieldError::invalid(POLICY, &spec["ipFamilyPolicy"], detail));
    }
    for (index, family) in list(&spec["ipFamilies"]).iter().enumerate() {
        if !configured.iter().any(|known| family == known) {
            let path = format!("spec.ipFamilies[{index}]");
            let detail = "not configured on this cluster";
            errors.push(FieldError::invalid(path, family, detail));
        }
    }
    if !errors.is_empty() {
        return errors;
    }
    if list(&spec["ipFamilies"]).is_empty() {
        spec["ipFamilies"] = primary();
    }
    add_other(spec, !single && configured.len() == 2);
    errors
}

fn add_other(spec: &mut Value, wanted: bool) {
    if wanted && let [one] = list(&spec["ipFamilies"]) {
        spec["ipFamilies"] = json!([one, other(one)]);
    }
}

/// From two families to one: the policy alone is enough, but nothing is without it.
fn shrink(old: &Value, spec: &mut Value, errors: &mut Vec<FieldError>) {
    let single = spec["ipFamilyPolicy"] == "SingleStack";
    for (field, what) in [
        ("clusterIPs", "secondary cluster IP"),
        ("ipFamilies", "secondary IP family"),
    ] {
        let (before, after) = (list(&old[field]), list(&spec[field]));
        if single && before == after && after.len() > 1 {
            spec[field] = json!([after[0]]);
        } else if !single && !after.is_empty() && after.len() < before.len() {
            let detail = format!("must be 'SingleStack' to release the {what}");
            errors.push(FieldError::invalid(
                POLICY,
                &spec["ipFamilyPolicy"],
                &detail,
            ));
        }
    }
}

/// Policy, families and addresses say the same; families follow from addresses.
fn agree(spec: &mut Value, configured: &[&str], errors: &mut Vec<FieldError>) {
    if spec["ipFamilyPolicy"] == "SingleStack" {
        for (field, what) in [("clusterIPs", "cluster IPs"), ("ipFamilies", "IP families")] {
            if list(&spec[field]).len() == 2 {
                let detail = format!(
                    "must be 'RequireDualStack' or 'PreferDualStack' when multiple {what} are specified"
                );
                errors.push(FieldError::invalid(
                    POLICY,
                    &spec["ipFamilyPolicy"],
                    &detail,
                ));
            }
        }
    }
    let addresses = list(&spec["clusterIPs"]).to_vec();
    let mut families = list(&spec["ipFamilies"]).to_vec();
    for (index, ip) in addresses.iter().enumerate() {
        let Some(ip) = ip.as_str().and_then(|ip| ip.parse().ok()) else {
            break;
        };
        if index < families.len() {
            continue;
        }
        let family = of_address(ip);
        if configured.contains(&family) {
            families.push(family.into());
        } else {
            let path = format!("spec.clusterIPs[{index}]");
            let detail = format!("{family} is not configured on this cluster");
            errors.push(FieldError::invalid(path, &spec["clusterIPs"], &detail));
        }
    }
    if !families.is_empty() {
        spec["ipFamilies"] = families.into();
    }
}
