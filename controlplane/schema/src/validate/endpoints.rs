//! Validation of Endpoints and EndpointSlices.

use std::collections::HashSet;
use std::net::IpAddr;

use super::at::{At, Errors};
use super::{address, names};
use crate::Object;

const PROTOCOLS: &[&str] = &["SCTP", "TCP", "UDP"];

/// What is wrong with Endpoints.
pub(super) fn endpoints(object: &Object, errors: &mut Errors) {
    let object = At::object(object);
    for subset in object.field("subsets").items() {
        let (ready, rest) = (subset.field("addresses"), subset.field("notReadyAddresses"));
        if ready.len() + rest.len() == 0 {
            let detail = "must specify `addresses` or `notReadyAddresses`";
            subset.missing(detail, errors);
        }
        for endpoint in ready.items().chain(rest.items()) {
            let ip = endpoint.field("ip");
            ip.follows(names::address, errors);
            let hostname = endpoint.field("hostname");
            hostname.follows_if_set(names::dns1123_label, errors);
            let node = endpoint.field("nodeName");
            node.follows_if_set(names::dns1123_subdomain, errors);
            address::not_special(&ip, errors);
        }
        let ports = subset.field("ports");
        for port in ports.items() {
            let name = port.field("name");
            if name.text().is_empty() && ports.len() > 1 {
                name.missing("", errors);
            }
            name.follows_if_set(names::dns1123_label, errors);
            port.field("port").port(errors);
            port.field("protocol").one_of(PROTOCOLS, errors);
            let application = port.field("appProtocol");
            application.follows_if_set(names::qualified_name, errors);
        }
    }
}

/// What is wrong with an EndpointSlice.
pub(super) fn slice(object: &Object, errors: &mut Errors) {
    let object = At::object(object);
    let kind = object.field("addressType");
    kind.one_of(&["FQDN", "IPv4", "IPv6"], errors);
    for endpoint in object.field("endpoints").items() {
        let addresses = endpoint.field("addresses");
        if addresses.len() == 0 {
            addresses.missing("must contain at least 1 address", errors);
        }
        for one in addresses.items() {
            slice_address(kind.text(), &addresses, &one, errors);
        }
        let hostname = endpoint.field("hostname");
        hostname.follows_if_set(names::dns1123_label, errors);
        let node = endpoint.field("nodeName");
        node.follows_if_set(names::dns1123_subdomain, errors);
    }
    let mut seen = HashSet::new();
    for port in object.field("ports").items() {
        let name = port.field("name");
        name.follows_if_set(names::dns1123_label, errors);
        if !seen.insert(name.text()) {
            name.duplicate(serde_json::json!(name.text()), errors);
        }
        port.field("protocol").one_of(PROTOCOLS, errors);
        let application = port.field("appProtocol");
        application.follows_if_set(names::qualified_name, errors);
    }
}

fn slice_address(kind: &str, all: &At<'_, '_>, one: &At<'_, '_>, errors: &mut Errors) {
    if kind == "FQDN" {
        one.follows(names::dns1123_subdomain, errors);
        return;
    }
    if !matches!(kind, "IPv4" | "IPv6") {
        return;
    }
    let Ok(parsed) = one.text().parse::<IpAddr>() else {
        one.follows(names::address, errors);
        return;
    };
    // Of which family it should be is told of the list.
    if kind == "IPv4" && !parsed.is_ipv4() {
        all.invalid_as(one.value, "must be an IPv4 address", errors);
    }
    if kind == "IPv6" && !parsed.is_ipv6() {
        all.invalid_as(one.value, "must be an IPv6 address", errors);
    }
    address::not_special(one, errors);
}
