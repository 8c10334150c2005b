//! Validation of events, which are asked for more in their newer version than in the old one.

use serde_json::json;

use super::at::{At, Errors};
use super::names;
use crate::Object;

/// Bytes that a field of this name may have.
const LIMITS: &[(&str, usize)] = &[("reportingInstance", 128), ("action", 128), ("reason", 128)];
const NOTE_LIMIT: usize = 1024;

/// What is wrong with an event, in the fields of the old version.
pub(super) fn validate(object: &Object, errors: &mut Errors) {
    let event = At::object(object);
    let about = event.field("involvedObject");
    let namespace = about.field("namespace");
    let metadata = event.field("metadata");
    let own = metadata.field("namespace").text();
    // What has no namespace is told of in the default one.
    let fits = match namespace.text() {
        "" => own.is_empty() || own == "default",
        given => given == own,
    };
    if !fits {
        let shown = json!(namespace.text());
        namespace.invalid_as(shown, "does not match event.namespace", errors);
    }
    if event.field("eventTime").is_set() {
        reported(&event, errors);
    }
}

/// Who reports what was done; asked for only of reporters that give a time.
fn reported(event: &At<'_, '_>, errors: &mut Errors) {
    let controller = event.field("reportingController");
    let controller = controller.showing(event.field("reportingComponent").value);
    controller.required(errors);
    controller.follows(names::qualified_name, errors);
    for (name, limit) in LIMITS {
        let field = event.field(name);
        field.required(errors);
        if field.text().len() > *limit {
            let detail = format!("can have at most {limit} characters");
            field.invalid_as("\"\"", &detail, errors);
        }
    }
    let note = event.field("message");
    if note.text().len() > NOTE_LIMIT {
        let detail = format!("can have at most {NOTE_LIMIT} characters");
        note.invalid_as("\"\"", &detail, errors);
    }
}

/// What a new event of the newer version has to have besides, and may not have.
pub(super) fn newer(object: &Object, errors: &mut Errors) {
    let event = At::object(object);
    let time = event.field("eventTime");
    if !time.is_set() {
        time.missing("", errors);
    }
    let kind = event.field("type");
    if !["Normal", "Warning"].contains(&kind.text()) {
        let detail = format!("has invalid value: {}", kind.text());
        kind.invalid_as("\"\"", &detail, errors);
    }
    for name in ["firstTimestamp", "lastTimestamp", "count", "source"] {
        let field = event.field(name);
        if field.is_set()
            && *field.value != 0
            && field.value.as_object().is_none_or(|map| !map.is_empty())
        {
            field.invalid_as("\"\"", "needs to be unset", errors);
        }
    }
}

/// What of an event that is changed in its newer version may not change.
pub(super) fn newer_update(old: &Object, new: &Object, errors: &mut Errors) {
    let event = At::object(new);
    for name in [
        "involvedObject",
        "reason",
        // Twice, as the real server tells it.
        "reason",
        "message",
        "source",
        "firstTimestamp",
        "lastTimestamp",
        "count",
        "type",
        "eventTime",
        "action",
        "related",
        "reportingComponent",
        "reportingInstance",
    ] {
        let field = event.field(name);
        if old[name] != *field.value {
            field.invalid("field is immutable", errors);
        }
    }
}
