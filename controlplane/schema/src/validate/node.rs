//! Validation of nodes.

use std::collections::HashSet;

use serde_json::json;

use super::at::{At, Errors};
use super::{address, names, pod};
use crate::Object;
use crate::quantity::Quantity;

/// What is wrong with a node.
pub(super) fn validate(object: &Object, errors: &mut Errors) {
    let object = At::object(object);
    let spec = object.field("spec");
    // Errors of taints are told as if they were metadata, and always were.
    let metadata = object.field("metadata");
    let taints = metadata.field("taints");
    let taints = taints.showing(spec.field("taints").value);
    let mut seen = HashSet::new();
    for taint in taints.items() {
        let (key, effect) = (taint.field("key"), taint.field("effect"));
        key.follows(names::qualified_name, errors);
        let value = taint.field("value");
        value.follows(names::label_value, errors);
        pod::effect(&effect, errors);
        if !seen.insert((key.text(), effect.text())) {
            taint.duplicate(taint.value, errors);
        }
    }
    for range in spec.field("podCIDRs").items() {
        address::range(&range, false, errors);
    }
}

/// What of a node may not change.
pub(super) fn update(old: &Object, new: &Object, errors: &mut Errors) {
    let new = At::object(new);
    let spec = new.field("spec");
    for (field, name) in [("podCIDRs", "podCIDR"), ("providerID", "providerID")] {
        let (before, after) = (&old["spec"][field], spec.field(field));
        let was_set = before.as_array().is_some_and(|all| !all.is_empty())
            || before.as_str().is_some_and(|text| !text.is_empty());
        if was_set && before != after.value {
            let detail = format!("node updates may not change {name} except from \"\" to valid");
            after.forbidden(&detail, errors);
        }
    }
}

/// What is wrong with what a node reports.
pub(super) fn status(object: &Object, errors: &mut Errors) {
    let object = At::object(object);
    let status = object.field("status");
    for name in ["capacity", "allocatable"] {
        let amounts = status.field(name);
        for (name, amount) in amounts.entries() {
            let negative = Quantity::parse(amount.text()).is_ok_and(|one| one.nano_value() < 0);
            if negative {
                let at = amounts.field(name);
                at.invalid_as(
                    json!(amount.text()),
                    "must be greater than or equal to 0",
                    errors,
                );
            }
        }
    }
}
