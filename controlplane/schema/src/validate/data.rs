//! Validation of ConfigMaps and Secrets.

use serde_json::json;

use super::at::{At, Errors};
use super::names;
use crate::Object;
use crate::field_error::FieldError;

/// Bytes that the values of one object may have together.
const LIMIT: usize = 1024 * 1024;
const IMMUTABLE: &str = "field is immutable when `immutable` is set";

/// What is wrong with a ConfigMap.
pub(super) fn config_map(object: &Object, errors: &mut Errors) {
    let object = At::object(object);
    let (texts, binaries) = (object.field("data"), object.field("binaryData"));
    keys(&texts, errors);
    for (name, value) in binaries.entries() {
        key(name, &value, errors);
        if !texts.value[name].is_null() {
            let detail = "duplicate of key present in data";
            value.invalid_as(json!(name), detail, errors);
        }
    }
    let text = texts.entries().map(|(_, value)| value.text().len());
    let total = text.sum::<usize>() + decoded(&binaries);
    if total > LIMIT {
        // The object itself has no name in a path.
        errors.push(FieldError::too_long("[]", LIMIT));
    }
}

/// What is wrong with a Secret.
pub(super) fn secret(object: &Object, errors: &mut Errors) {
    let object = At::object(object);
    let data = object.field("data");
    keys(&data, errors);
    if decoded(&data) > LIMIT {
        errors.push(FieldError::too_long("data", LIMIT));
    }
    let missing = |key: &str| data.value[key].is_null();
    let needed: &[&str] = match object.field("type").text() {
        "kubernetes.io/service-account-token" => {
            let metadata = object.field("metadata");
            let annotations = metadata.field("annotations");
            let account = annotations.key("kubernetes.io/service-account.name");
            account.required(errors);
            &[]
        }
        "kubernetes.io/dockercfg" => &[".dockercfg"],
        "kubernetes.io/dockerconfigjson" => &[".dockerconfigjson"],
        "kubernetes.io/basic-auth" if missing("username") && missing("password") => {
            &["username", "password"]
        }
        "kubernetes.io/ssh-auth" => &["ssh-privatekey"],
        "kubernetes.io/tls" => &["tls.crt", "tls.key"],
        _ => &[],
    };
    for name in needed {
        if missing(name) {
            data.key(name).missing("", errors);
        }
    }
}

fn keys(data: &At<'_, '_>, errors: &mut Errors) {
    for (name, value) in data.entries() {
        key(name, &value, errors);
    }
}

fn key(name: &str, value: &At<'_, '_>, errors: &mut Errors) {
    for message in names::config_key(name) {
        value.invalid_as(json!(name), &message, errors);
    }
}

/// Bytes that base64 texts stand for.
fn decoded(data: &At<'_, '_>) -> usize {
    let bytes = |text: &str| text.trim_end_matches('=').len() * 3 / 4;
    data.entries().map(|(_, value)| bytes(value.text())).sum()
}

/// What of either may not change: all, once it is said to be immutable.
pub(super) fn update(old: &Object, new: &Object, errors: &mut Errors) {
    if old["immutable"] != true {
        return;
    }
    if new["immutable"] != true {
        errors.push(FieldError::forbidden("immutable", IMMUTABLE));
    }
    for field in ["data", "binaryData"] {
        if old[field] != new[field] {
            errors.push(FieldError::forbidden(field, IMMUTABLE));
        }
    }
}
