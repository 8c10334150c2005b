//! Validation of NetworkPolicies.

use super::at::{At, Errors};
use super::{address, metadata};
use crate::Object;

const PROTOCOLS: &[&str] = &["SCTP", "TCP", "UDP"];

/// What is wrong with a policy. `new`: ranges must be exact, which was not always asked.
pub(super) fn validate(object: &Object, new: bool, errors: &mut Errors) {
    let object = At::object(object);
    let spec = object.field("spec");
    metadata::label_selector(&spec.field("podSelector"), errors);
    for (direction, peers) in [("ingress", "from"), ("egress", "to")] {
        for rule in spec.field(direction).items() {
            for port in rule.field("ports").items() {
                self::port(&port, errors);
            }
            for peer in rule.field(peers).items() {
                self::peer(&peer, new, errors);
            }
        }
    }
    let kinds = spec.field("policyTypes");
    if kinds.len() > 2 {
        kinds.invalid("may not specify more than two policyTypes", errors);
        return;
    }
    for kind in kinds.items() {
        kind.one_of_if_set(&["Ingress", "Egress"], errors);
    }
}

fn port(port: &At<'_, '_>, errors: &mut Errors) {
    port.field("protocol").one_of_if_set(PROTOCOLS, errors);
    let (start, end) = (port.field("port"), port.field("endPort"));
    if !start.is_set() {
        if end.is_set() {
            let detail = "may not be specified when `port` is not specified";
            end.invalid(detail, errors);
        }
        return;
    }
    start.port_or_name(errors);
    if !end.is_set() {
        return;
    }
    if start.value.is_string() {
        let detail = "may not be specified when `port` is non-numeric";
        end.invalid(detail, errors);
    } else if end.number() < start.number() {
        // It is the start that is shown.
        let detail = "must be greater than or equal to `port`";
        end.invalid_as(start.value, detail, errors);
    } else {
        end.port(errors);
    }
}

fn peer(peer: &At<'_, '_>, new: bool, errors: &mut Errors) {
    let block = peer.field("ipBlock");
    let mut selects = false;
    for name in ["podSelector", "namespaceSelector"] {
        let selector = peer.field(name);
        if selector.is_set() {
            selects = true;
            metadata::label_selector(&selector, errors);
        }
    }
    if !block.is_set() {
        if !selects {
            peer.missing("must specify a peer", errors);
        }
        return;
    }
    if selects {
        peer.forbidden("may not specify both ipBlock and another peer", errors);
    }
    let whole = block.field("cidr");
    if !whole.required(errors) {
        return;
    }
    let Some(whole) = address::range(&whole, new, errors) else {
        return;
    };
    for except in block.field("except").items() {
        if let Some(part) = address::range(&except, new, errors) {
            if !whole.contains(&part) || whole.prefix_len() >= part.prefix_len() {
                except.invalid("must be a strict subset of `cidr`", errors);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn a_policy_with_a_bad_range_is_refused_with_its_place() {
        let told = |block: serde_json::Value| {
            let rule = json!({"from": [{"ipBlock": block}]});
            let policy = json!({"spec": {"podSelector": {}, "ingress": [rule]}});
            let mut errors = Errors::new();
            validate(&policy, true, &mut errors);
            errors.iter().map(ToString::to_string).collect::<Vec<_>>()
        };
        assert!(told(json!({"cidr": "10.0.0.0/8", "except": ["10.1.0.0/16"]})).is_empty());
        let found = told(json!({"cidr": "10.0.0.0/33"}));
        assert!(found[0].starts_with("spec.ingress[0].from[0].ipBlock.cidr: Invalid value"));
        assert_eq!(
            told(json!({"cidr": "10.0.0.0/8", "except": ["11.0.0.0/16"]})),
            [
                "spec.ingress[0].from[0].ipBlock.except[0]: Invalid value: \"11.0.0.0/16\": must be a strict subset of `cidr`"
            ]
        );
    }
}
