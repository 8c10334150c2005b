//! Validation of what every object has: names, labels, annotations, owners, finalizers.

use serde_json::{Value, json};

use super::at::{At, Errors};
use super::names;
use crate::Object;
use crate::field_error::FieldError;
use crate::table::Resource;

/// Bytes that all annotations of an object may have together.
const ANNOTATIONS_LIMIT: usize = 256 * 1024;
/// Finalizers that need no domain.
const STANDARD_FINALIZERS: &[&str] = &["kubernetes", "orphan", "foregroundDeletion"];

/// The rule for names of this resource.
fn name_rule(resource: &Resource) -> fn(&str) -> Vec<String> {
    match (resource.group, resource.plural) {
        ("", "namespaces" | "services") => names::dns1123_label,
        ("apps", "statefulsets") => names::dns1123_label,
        ("rbac.authorization.k8s.io", _) | ("", "events") | ("policy", _) => names::path_segment,
        ("networking.k8s.io", "ipaddresses") => names::address,
        _ => names::dns1123_subdomain,
    }
}

/// Whether finalizers of this kind need a domain.
fn needs_domains(resource: &Resource) -> bool {
    let free = [
        "admissionregistration.k8s.io",
        "node.k8s.io",
        "policy",
        "apiextensions.k8s.io",
    ];
    !free.contains(&resource.group) && (resource.group, resource.kind) != ("", "Event")
}

/// What is wrong with an object's metadata.
pub(super) fn validate(resource: &Resource, object: &Object, errors: &mut Errors) {
    let object = At::object(object);
    let metadata = object.field("metadata");
    let rule = name_rule(resource);
    let generate = metadata.field("generateName");
    // A name's end is still to come, so a separator may stand last here.
    let start = generate.text().trim_end_matches(['-', '.']);
    if !start.is_empty() {
        for message in rule(start) {
            generate.invalid(&message, errors);
        }
    }
    let name = metadata.field("name");
    if name.text().is_empty() {
        name.missing("name or generateName is required", errors);
    } else {
        name.follows(rule, errors);
    }
    let namespace = metadata.field("namespace");
    if resource.namespaced {
        namespace.required_name(names::dns1123_label, errors);
    } else if !namespace.text().is_empty() {
        namespace.forbidden("not allowed on this type", errors);
    }
    metadata.field("generation").non_negative(errors);
    labels(&metadata.field("labels"), errors);
    annotations(&metadata.field("annotations"), errors);
    owners(&metadata.field("ownerReferences"), errors);
    let finalizers = metadata.field("finalizers");
    for finalizer in finalizers.items() {
        for message in names::qualified_name(finalizer.text()) {
            finalizers.invalid_as(finalizer.value, &message, errors);
        }
    }
    if needs_domains(resource) {
        for finalizer in finalizers.items() {
            finalizer_domain(&finalizer, &finalizer, errors);
        }
    }
}

/// A finalizer is a known one, or says whose it is.
pub(super) fn finalizer_domain(finalizer: &At<'_, '_>, told_at: &At<'_, '_>, errors: &mut Errors) {
    let text = finalizer.text();
    if !text.contains('/') && !STANDARD_FINALIZERS.contains(&text) {
        told_at.invalid_as(
            finalizer.value,
            "name is neither a standard finalizer name nor is it fully qualified",
            errors,
        );
    }
}

/// A label map: keys and values.
pub(super) fn labels(at: &At<'_, '_>, errors: &mut Errors) {
    for (key, value) in at.value.as_object().into_iter().flatten() {
        for message in names::qualified_name(key) {
            at.invalid_as(json!(key), &message, errors);
        }
        for message in names::label_value(value.as_str().unwrap_or_default()) {
            at.invalid_as(value, &message, errors);
        }
    }
}

/// Annotations: keys, and their size together.
pub(super) fn annotations(at: &At<'_, '_>, errors: &mut Errors) {
    let mut total = 0;
    for (key, value) in at.value.as_object().into_iter().flatten() {
        total += key.len() + value.as_str().map_or(0, str::len);
        for message in names::qualified_name(&key.to_lowercase()) {
            at.invalid_as(json!(key), &message, errors);
        }
    }
    if total > ANNOTATIONS_LIMIT {
        errors.push(FieldError::too_long(at.path(), ANNOTATIONS_LIMIT));
    }
}

fn owners(owners: &At<'_, '_>, errors: &mut Errors) {
    let mut controller: Option<String> = None;
    for owner in owners.value.as_array().into_iter().flatten() {
        // Errors of one reference do not say which of them it is.
        let owner = owners.showing(owner);
        let version = owner.field("apiVersion");
        if version.text().is_empty() {
            version.invalid_as("\"\"", "version must not be empty", errors);
        }
        for name in ["kind", "name", "uid"] {
            let field = owner.field(name);
            if field.text().is_empty() {
                field.invalid_as("\"\"", "must not be empty", errors);
            }
        }
        if owner.value["apiVersion"] == "v1" && owner.value["kind"] == "Event" {
            let detail = "/v1, Kind=Event is disallowed from being an owner";
            owner.invalid_as(owner_text(owner.value), detail, errors);
        }
        if owner.field("controller").is_true() {
            let name = format!(
                "{}/{}",
                owner.field("kind").text(),
                owner.field("name").text()
            );
            match &controller {
                None => controller = Some(name),
                Some(first) => {
                    let all: Vec<String> = owners
                        .items()
                        .map(|owner| owner_text(owner.value))
                        .collect();
                    let detail = format!(
                        "Only one reference can have Controller set to true. Found \"true\" in references for {first} and {name}"
                    );
                    owners.invalid_as(format!("[{}]", all.join(",")), &detail, errors);
                }
            }
        }
    }
}

/// A reference with its fields in the order in which they are shown.
fn owner_text(owner: &Value) -> String {
    let fields = [
        "apiVersion",
        "kind",
        "name",
        "uid",
        "controller",
        "blockOwnerDeletion",
    ];
    let text: Vec<String> = fields
        .iter()
        .filter(|field| !owner[**field].is_null())
        .map(|field| format!("{field:?}:{}", owner[*field]))
        .collect();
    format!("{{{}}}", text.join(","))
}

/// What is wrong with an object's metadata after a change.
pub(super) fn validate_update(old: &Object, new: &Object, errors: &mut Errors) {
    let new = At::object(new);
    let metadata = new.field("metadata");
    for name in [
        "name",
        "namespace",
        "uid",
        "creationTimestamp",
        "deletionTimestamp",
        "deletionGracePeriodSeconds",
    ] {
        let field = metadata.field(name);
        if *field.value != old["metadata"][name] {
            field.invalid("field is immutable", errors);
        }
    }
    if old["metadata"]["deletionTimestamp"].is_null() {
        return;
    }
    let before = old["metadata"]["finalizers"].as_array();
    let finalizers = metadata.field("finalizers");
    let added: Vec<String> = finalizers
        .items()
        .filter(|one| before.is_none_or(|before| !before.contains(one.value)))
        .map(|one| one.value.to_string())
        .collect();
    if !added.is_empty() {
        let detail = format!(
            "no new finalizers can be added if the object is being deleted, found new finalizers []string{{{}}}",
            added.join(", ")
        );
        finalizers.forbidden(&detail, errors);
    }
}

/// A selector of labels. True: it can be used.
pub(super) fn label_selector(selector: &At<'_, '_>, errors: &mut Errors) -> bool {
    let before = errors.len();
    labels(&selector.field("matchLabels"), errors);
    for expression in selector.field("matchExpressions").items() {
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
            "In" | "NotIn" | "Exists" | "DoesNotExist" => {}
            _ => operator.invalid("not a valid selector operator", errors),
        }
        expression
            .field("key")
            .follows(names::qualified_name, errors);
        for value in values.items() {
            value.follows(names::label_value, errors);
        }
    }
    errors.len() == before
}
