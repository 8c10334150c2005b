//! Validation of addresses and ranges of Services as objects of their own.

use std::net::IpAddr;

use serde_json::json;

use super::at::{At, Errors};
use super::{address, names};
use crate::Object;

/// What is wrong with an IPAddress: its name is the address, and it has a parent.
pub(super) fn ip_address(object: &Object, errors: &mut Errors) {
    let object = At::object(object);
    let metadata = object.field("metadata");
    let name = metadata.field("name");
    if let Ok(ip) = name.text().parse::<IpAddr>()
        && ip.to_string() != name.text()
    {
        let detail = format!("must be in canonical form (\"{ip}\")");
        name.invalid(&detail, errors);
    }
    let spec = object.field("spec");
    let parent = spec.field("parentRef");
    if !parent.is_set() {
        parent.missing("", errors);
        return;
    }
    let group = parent.field("group");
    group.follows_if_set(names::dns1123_subdomain, errors);
    for field in ["resource", "name"] {
        let field = parent.field(field);
        if field.required(errors) {
            field.follows(names::path_segment, errors);
        }
    }
    let namespace = parent.field("namespace");
    namespace.follows_if_set(names::path_segment, errors);
}

/// What is wrong with a ServiceCIDR: it has one range, or one of each family.
pub(super) fn service_cidr(object: &Object, errors: &mut Errors) {
    let object = At::object(object);
    let spec = object.field("spec");
    let ranges = spec.field("cidrs");
    if ranges.len() == 0 {
        ranges.missing("at least one CIDR required", errors);
        return;
    }
    if ranges.len() > 2 {
        let shown = json!({"CIDRs": ranges.value});
        ranges.invalid_as(shown, "may only hold up to 2 values", errors);
        return;
    }
    let mut families = Vec::new();
    for range in ranges.items() {
        let range = address::range(&range, true, errors);
        families.extend(range.map(|range| range.addr().is_ipv4()));
    }
    if families.len() == 2 && families[0] == families[1] {
        let detail = "may specify no more than one IP for each IP family, i.e 192.168.0.0/24 and 2001:db8::/64";
        ranges.invalid(detail, errors);
    }
}

/// What of a ServiceCIDR may not change: a second range may come, but none may go or become another.
pub(super) fn service_cidr_update(old: &Object, new: &Object, errors: &mut Errors) {
    let (old, new) = (At::object(old), At::object(new));
    let (old, new) = (old.field("spec"), new.field("spec"));
    let (before, after) = (old.field("cidrs"), new.field("cidrs"));
    for (index, range) in before.items().enumerate() {
        if after.value[index] != *range.value {
            let path = format!("cidrs[{index}]");
            let now = new.field(&path);
            now.invalid_as(&after.value[index], "field is immutable", errors);
        }
    }
}
