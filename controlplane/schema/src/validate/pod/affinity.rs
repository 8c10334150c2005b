//! Validation of where a pod may run: affinity to nodes and pods, and spreading.

use std::collections::HashSet;

use serde_json::json;

use super::super::at::{At, Errors};
use super::super::{metadata, names};

const REQUIRED: &str = "requiredDuringSchedulingIgnoredDuringExecution";
const PREFERRED: &str = "preferredDuringSchedulingIgnoredDuringExecution";

/// `affinity` of a pod.
pub(super) fn affinity(affinity: &At<'_, '_>, errors: &mut Errors) {
    let nodes = affinity.field("nodeAffinity");
    let required = nodes.field(REQUIRED);
    if required.is_set() {
        node_selector(&required, errors);
    }
    for preferred in nodes.field(PREFERRED).items() {
        weight(&preferred, errors);
        node_term(&preferred.field("preference"), errors);
    }
    for kind in ["podAffinity", "podAntiAffinity"] {
        let pods = affinity.field(kind);
        for term in pods.field(REQUIRED).items() {
            pod_term(&term, errors);
        }
        for preferred in pods.field(PREFERRED).items() {
            weight(&preferred, errors);
            pod_term(&preferred.field("podAffinityTerm"), errors);
        }
    }
}

fn weight(preferred: &At<'_, '_>, errors: &mut Errors) {
    let weight = preferred.field("weight");
    if !(1..=100).contains(&weight.number()) {
        weight.invalid_as(weight.number(), "must be in the range 1-100", errors);
    }
}

/// `core/v1` NodeSelector.
fn node_selector(selector: &At<'_, '_>, errors: &mut Errors) {
    let terms = selector.field("nodeSelectorTerms");
    if terms.len() == 0 {
        terms.missing("must have at least one node selector term", errors);
    }
    for term in terms.items() {
        node_term(&term, errors);
    }
}

fn node_term(term: &At<'_, '_>, errors: &mut Errors) {
    for expression in term.field("matchExpressions").items() {
        let (operator, values) = (expression.field("operator"), expression.field("values"));
        match operator.text() {
            "In" | "NotIn" if values.len() == 0 => values.missing(
                "must be specified when `operator` is 'In' or 'NotIn'",
                errors,
            ),
            "Exists" | "DoesNotExist" if values.len() > 0 => values.forbidden(
                "may not be specified when `operator` is 'Exists' or 'DoesNotExist'",
                errors,
            ),
            "Gt" | "Lt" if values.len() != 1 => values.missing(
                "must be specified single value when `operator` is 'Lt' or 'Gt'",
                errors,
            ),
            "In" | "NotIn" | "Exists" | "DoesNotExist" | "Gt" | "Lt" => {}
            _ => operator.invalid_as(
                json!(operator.text()),
                "not a valid selector operator",
                errors,
            ),
        }
        expression
            .field("key")
            .follows(names::qualified_name, errors);
        for value in values.items() {
            value.follows(names::label_value, errors);
        }
    }
    for requirement in term.field("matchFields").items() {
        let (operator, values) = (requirement.field("operator"), requirement.field("values"));
        if !matches!(operator.text(), "In" | "NotIn") {
            operator.invalid("not a valid selector operator", errors);
        } else if values.len() != 1 {
            let detail =
                "must be only one value when `operator` is 'In' or 'NotIn' for node field selector";
            values.missing(detail, errors);
        }
        let key = requirement.field("key");
        if key.text() != "metadata.name" {
            key.invalid("not a valid field selector key", errors);
            continue;
        }
        for value in values.items() {
            value.follows(names::dns1123_subdomain, errors);
        }
    }
}

fn topology_key(key: &At<'_, '_>, errors: &mut Errors) {
    if key.text().is_empty() {
        key.missing("can not be empty", errors);
    } else {
        key.follows(names::qualified_name, errors);
    }
}

fn pod_term(term: &At<'_, '_>, errors: &mut Errors) {
    metadata::label_selector(&term.field("labelSelector"), errors);
    metadata::label_selector(&term.field("namespaceSelector"), errors);
    let told = term.field("namespace");
    for name in term.field("namespaces").items() {
        for message in names::dns1123_label(name.text()) {
            told.invalid_as(name.value, &message, errors);
        }
    }
    topology_key(&term.field("topologyKey"), errors);
}

/// `topologySpreadConstraints` of a pod.
pub(super) fn spread(constraints: &At<'_, '_>, errors: &mut Errors) {
    let mut seen = HashSet::new();
    for constraint in constraints.items() {
        let skew = constraint.field("maxSkew");
        if skew.number() <= 0 {
            skew.invalid_as(skew.number(), "must be greater than 0", errors);
        }
        let key = constraint.field("topologyKey");
        if key.text().is_empty() {
            key.missing("can not be empty", errors);
        }
        let otherwise = constraint.field("whenUnsatisfiable");
        otherwise.one_of(&["DoNotSchedule", "ScheduleAnyway"], errors);
        let pair = format!("{{{}, {}}}", key.text(), otherwise.text());
        if !seen.insert(pair.clone()) {
            let both = constraint.field("{topologyKey, whenUnsatisfiable}");
            both.duplicate(json!(pair), errors);
        }
        let domains = constraint.field("minDomains");
        domains.positive_if_set(errors);
        if domains.is_set() && otherwise.text() != "DoNotSchedule" {
            let detail = format!(
                "can only use minDomains if whenUnsatisfiable=DoNotSchedule, not {}",
                otherwise.text()
            );
            domains.invalid(&detail, errors);
        }
        for name in ["nodeAffinityPolicy", "nodeTaintsPolicy"] {
            let policy = constraint.field(name);
            policy.one_of_if_set(&["Honor", "Ignore"], errors);
        }
        metadata::label_selector(&constraint.field("labelSelector"), errors);
    }
}
