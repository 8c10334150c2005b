//! Validation of Services, EndpointSlices and NetworkPolicies.

use std::collections::HashSet;
use std::net::IpAddr;

use ipnet::IpNet;
use serde_json::{Value, json};

use super::{label_selector, names, port_number};
use crate::Object;
use crate::field_error::FieldError;

const BAD_ADDRESS: &str = "must be a valid IP address, (e.g. 10.9.8.7 or 2001:db8::ffff)";

fn one_of(path: &str, value: &Value, known: &[&str], errors: &mut Vec<FieldError>) {
    match value.as_str().unwrap_or_default() {
        "" => errors.push(FieldError::required(path, "")),
        text if known.contains(&text) => {}
        _ => errors.push(FieldError::not_supported(path, value, known)),
    }
}

/// `ValidateService`, as far as this server goes.
pub(super) fn service(object: &Object, errors: &mut Vec<FieldError>) {
    let spec = &object["spec"];
    let kind = spec["type"].as_str().unwrap_or_default();
    let headless = spec["clusterIP"] == "None";
    let ports = spec["ports"].as_array().map_or(0, Vec::len);
    if ports == 0 && !headless && kind != "ExternalName" {
        errors.push(FieldError::required("spec.ports", ""));
    }
    let (mut port_names, mut numbers) = (HashSet::new(), HashSet::new());
    for (index, port) in spec["ports"].as_array().into_iter().flatten().enumerate() {
        let path = format!("spec.ports[{index}]");
        let name = port["name"].as_str().unwrap_or_default();
        if name.is_empty() && ports > 1 {
            errors.push(FieldError::required(format!("{path}.name"), ""));
        } else if !name.is_empty() {
            let messages = names::dns1123_label(name);
            errors.extend(
                messages
                    .iter()
                    .map(|m| FieldError::invalid(format!("{path}.name"), &json!(name), m)),
            );
            if !port_names.insert(name) {
                errors.push(FieldError::duplicate(format!("{path}.name"), &json!(name)));
            }
        }
        port_number(&format!("{path}.port"), &port["port"], errors);
        one_of(
            &format!("{path}.protocol"),
            &port["protocol"],
            &["SCTP", "TCP", "UDP"],
            errors,
        );
        if port["targetPort"].is_number() {
            port_number(&format!("{path}.targetPort"), &port["targetPort"], errors);
        }
        if !numbers.insert((port["protocol"].as_str(), port["port"].as_i64())) {
            errors.push(FieldError::duplicate(
                path.clone(),
                &json!({"port": port["port"], "protocol": port["protocol"]}),
            ));
        }
        if kind == "ClusterIP" && port["nodePort"].as_i64().unwrap_or(0) != 0 {
            errors.push(FieldError::forbidden(
                format!("{path}.nodePort"),
                "may not be used when `type` is 'ClusterIP'",
            ));
        }
    }
    super::labels("spec.selector", &spec["selector"], errors);
    one_of(
        "spec.sessionAffinity",
        &spec["sessionAffinity"],
        &["ClientIP", "None"],
        errors,
    );
    one_of(
        "spec.type",
        &spec["type"],
        &["ClusterIP", "ExternalName", "LoadBalancer", "NodePort"],
        errors,
    );
    if kind == "ExternalName" {
        let name = spec["externalName"].as_str().unwrap_or_default();
        if name.is_empty() {
            errors.push(FieldError::required("spec.externalName", ""));
        }
    }
    for (index, address) in spec["clusterIPs"]
        .as_array()
        .into_iter()
        .flatten()
        .enumerate()
    {
        if address != "None"
            && address
                .as_str()
                .is_none_or(|text| text.parse::<IpAddr>().is_err())
        {
            errors.push(FieldError::invalid(
                format!("spec.clusterIPs[{index}]"),
                address,
                BAD_ADDRESS,
            ));
        }
    }
    for (index, address) in spec["externalIPs"]
        .as_array()
        .into_iter()
        .flatten()
        .enumerate()
    {
        if address
            .as_str()
            .is_none_or(|text| text.parse::<IpAddr>().is_err())
        {
            errors.push(FieldError::invalid(
                format!("spec.externalIPs[{index}]"),
                address,
                BAD_ADDRESS,
            ));
        }
    }
    for (index, range) in spec["loadBalancerSourceRanges"]
        .as_array()
        .into_iter()
        .flatten()
        .enumerate()
    {
        cidr(
            &format!("spec.LoadBalancerSourceRanges[{index}]"),
            range,
            errors,
        );
    }
}

fn cidr(path: &str, value: &Value, errors: &mut Vec<FieldError>) -> Option<IpNet> {
    let parsed = value
        .as_str()
        .and_then(|text| text.trim().parse::<IpNet>().ok());
    if parsed.is_none() {
        errors.push(FieldError::invalid(
            path,
            value,
            "must be a valid CIDR value, (e.g. 10.9.8.0/24 or 2001:db8::/64)",
        ));
    }
    parsed
}

/// What of a Service may not change.
pub(super) fn service_update(old: &Object, new: &Object, errors: &mut Vec<FieldError>) {
    let (before, after) = (&old["spec"]["clusterIP"], &new["spec"]["clusterIP"]);
    let external = |object: &Object| object["spec"]["type"] == "ExternalName";
    if before.is_string() && before != "" && before != after && !external(old) && !external(new) {
        errors.push(FieldError::invalid(
            "spec.clusterIPs[0]",
            &json!([after]),
            "may not change once set",
        ));
    }
}

/// `ValidateNetworkPolicy`.
pub(super) fn policy(object: &Object, errors: &mut Vec<FieldError>) {
    let spec = &object["spec"];
    label_selector("spec.podSelector", &spec["podSelector"], errors);
    for (direction, peers) in [("ingress", "from"), ("egress", "to")] {
        for (index, rule) in spec[direction].as_array().into_iter().flatten().enumerate() {
            for (at, port) in rule["ports"].as_array().into_iter().flatten().enumerate() {
                policy_port(
                    &format!("spec.{direction}[{index}].ports[{at}]"),
                    port,
                    errors,
                );
            }
            for (at, peer) in rule[peers].as_array().into_iter().flatten().enumerate() {
                policy_peer(
                    &format!("spec.{direction}[{index}].{peers}[{at}]"),
                    peer,
                    errors,
                );
            }
        }
    }
    for (index, kind) in spec["policyTypes"]
        .as_array()
        .into_iter()
        .flatten()
        .enumerate()
    {
        if kind != "Ingress" && kind != "Egress" {
            errors.push(FieldError::not_supported(
                format!("spec.policyTypes[{index}]"),
                kind,
                &["Egress", "Ingress"],
            ));
        }
    }
}

fn policy_port(path: &str, port: &Value, errors: &mut Vec<FieldError>) {
    let protocol = &port["protocol"];
    if protocol.is_string() && !matches!(protocol.as_str(), Some("TCP" | "UDP" | "SCTP")) {
        errors.push(FieldError::not_supported(
            format!("{path}.protocol"),
            protocol,
            &["SCTP", "TCP", "UDP"],
        ));
    }
    if port["port"].is_number() {
        port_number(&format!("{path}.port"), &port["port"], errors);
    }
    if let Some(end) = port["endPort"].as_i64() {
        match port["port"].as_i64() {
            Some(start) if end < start => {
                errors.push(FieldError::invalid(
                    format!("{path}.endPort"),
                    &port["endPort"],
                    "must be greater than or equal to `port`",
                ));
            }
            Some(_) => port_number(&format!("{path}.endPort"), &port["endPort"], errors),
            None if port["port"].is_string() => {
                errors.push(FieldError::invalid(
                    format!("{path}.endPort"),
                    &port["endPort"],
                    "may not be specified when `port` is non-numeric",
                ));
            }
            None => errors.push(FieldError::invalid(
                format!("{path}.endPort"),
                &port["endPort"],
                "may not be specified when `port` is not specified",
            )),
        }
    }
}

fn policy_peer(path: &str, peer: &Value, errors: &mut Vec<FieldError>) {
    let (mut kinds, block) = (0, &peer["ipBlock"]);
    for selector in ["podSelector", "namespaceSelector"] {
        if peer[selector].is_object() {
            kinds += 1;
            label_selector(&format!("{path}.{selector}"), &peer[selector], errors);
        }
    }
    if kinds == 0 && !block.is_object() {
        errors.push(FieldError::required(path, "must specify a peer"));
    }
    if !block.is_object() {
        return;
    }
    if kinds > 0 {
        errors.push(FieldError::forbidden(
            path,
            "may not specify both ipBlock and another peer",
        ));
    }
    if block["cidr"].as_str().unwrap_or_default().is_empty() {
        errors.push(FieldError::required(format!("{path}.ipBlock.cidr"), ""));
        return;
    }
    let Some(whole) = cidr(&format!("{path}.ipBlock.cidr"), &block["cidr"], errors) else {
        return;
    };
    for (index, except) in block["except"].as_array().into_iter().flatten().enumerate() {
        let path = format!("{path}.ipBlock.except[{index}]");
        if let Some(part) = cidr(&path, except, errors) {
            if !whole.contains(&part) || whole.prefix_len() >= part.prefix_len() {
                errors.push(FieldError::invalid(
                    path,
                    except,
                    &format!("must be a strict subset of `cidr`: {whole}"),
                ));
            }
        }
    }
}

/// `ValidateEndpointSlice`, as far as this server goes.
pub(super) fn endpoint_slice(object: &Object, errors: &mut Vec<FieldError>) {
    one_of(
        "addressType",
        &object["addressType"],
        &["FQDN", "IPv4", "IPv6"],
        errors,
    );
    for (index, endpoint) in object["endpoints"]
        .as_array()
        .into_iter()
        .flatten()
        .enumerate()
    {
        let path = format!("endpoints[{index}].addresses");
        let addresses = endpoint["addresses"]
            .as_array()
            .map(Vec::as_slice)
            .unwrap_or_default();
        if addresses.is_empty() {
            errors.push(FieldError::required(
                path.clone(),
                "must contain at least 1 address",
            ));
        }
        for (at, address) in addresses.iter().enumerate() {
            let parsed = address
                .as_str()
                .and_then(|text| text.parse::<IpAddr>().ok());
            let fits = match object["addressType"].as_str() {
                Some("IPv4") => parsed.is_some_and(|ip| ip.is_ipv4()),
                Some("IPv6") => parsed.is_some_and(|ip| ip.is_ipv6()),
                _ => true,
            };
            if !fits {
                errors.push(FieldError::invalid(
                    format!("{path}[{at}]"),
                    address,
                    BAD_ADDRESS,
                ));
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_policy_with_a_bad_cidr_is_refused_with_its_place() {
        let policy = json!({"spec": {"podSelector": {}, "ingress": [{"from": [{"ipBlock": {"cidr": "10.0.0.0/33"}}]}]}});
        let mut errors = Vec::new();
        super::policy(&policy, &mut errors);
        assert_eq!(errors.len(), 1);
        assert_eq!(errors[0].field, "spec.ingress[0].from[0].ipBlock.cidr");
        let policy = json!({"spec": {"podSelector": {}, "egress": [{"to": [{"ipBlock": {"cidr": "10.0.0.0/8", "except": ["11.0.0.0/16"]}}]}]}});
        let mut errors = Vec::new();
        super::policy(&policy, &mut errors);
        assert_eq!(
            errors[0].message,
            "Invalid value: \"11.0.0.0/16\": must be a strict subset of `cidr`: 10.0.0.0/8"
        );
    }
}
