//! What of a pod may change once it exists.

use serde_json::{Value, json};

use super::super::at::{At, Errors};
use super::super::names;
use crate::Object;

const CHANGEABLE: &str = "pod updates may not change fields other than `spec.containers[*].image`,`spec.initContainers[*].image`,`spec.activeDeadlineSeconds`,`spec.tolerations` (only additions to existing tolerations),`spec.terminationGracePeriodSeconds` (allow it to be set to 1 if it was previously negative)";

/// What is wrong with a changed pod against what it was.
pub(in super::super) fn update(old: &Object, new: &Object, errors: &mut Errors) {
    let old = At::object(old);
    let (new, old) = (At::object(new), old.field("spec"));
    let spec = new.field("spec");
    super::images(&spec, errors);
    for list in ["containers", "initContainers"] {
        let containers = spec.field(list);
        if containers.len() != old.field(list).len() {
            let detail = "pod updates may not add or remove containers";
            containers.forbidden(detail, errors);
            return;
        }
    }
    if !deadline(&old.field("activeDeadlineSeconds"), &spec, errors) {
        return;
    }
    added_tolerations(&old, &spec, errors);
    removed_gates(&old, &spec, errors);
    if fixed(old.value, old.value) != fixed(spec.value, old.value) {
        spec.forbidden(CHANGEABLE, errors);
    }
}

/// A deadline may be set and brought forward. False: it was neither, and nothing else is looked at.
fn deadline(old: &At<'_, '_>, spec: &At<'_, '_>, errors: &mut Errors) -> bool {
    let new = spec.field("activeDeadlineSeconds");
    if new.is_set() && old.is_set() && old.number() < new.number() {
        let detail = "must be less than or equal to previous value";
        new.invalid(detail, errors);
        return false;
    }
    if old.is_set() && !new.is_set() {
        let detail = "must not update from a positive integer to nil value";
        new.invalid(detail, errors);
    }
    true
}

/// Tolerations stay, though for another time perhaps; others may come.
fn added_tolerations(old: &At<'_, '_>, spec: &At<'_, '_>, errors: &mut Errors) {
    let without_time = |toleration: &Value| {
        let mut toleration = toleration.clone();
        if let Some(map) = toleration.as_object_mut() {
            map.remove("tolerationSeconds");
        }
        toleration
    };
    let tolerations = spec.field("tolerations");
    let now: Vec<Value> = tolerations
        .items()
        .map(|one| without_time(one.value))
        .collect();
    for before in old.field("tolerations").items() {
        if !now.contains(&without_time(before.value)) {
            let detail = "existing toleration can not be modified except its tolerationSeconds";
            tolerations.forbidden(detail, errors);
            return;
        }
    }
}

fn removed_gates(old: &At<'_, '_>, spec: &At<'_, '_>, errors: &mut Errors) {
    let before = old.field("schedulingGates");
    for gate in spec.field("schedulingGates").items() {
        let name = gate.field("name");
        if before
            .items()
            .all(|one| one.field("name").text() != name.text())
        {
            let found = name.text();
            let detail =
                format!("only deletion is allowed, but found new scheduling gate '{found}'");
            name.forbidden(&detail, errors);
        }
    }
}

/// What is left of a specification without what may change; `old` tells which exceptions hold.
fn fixed(spec: &Value, old: &Value) -> Value {
    let mut spec = spec.clone();
    for list in ["containers", "initContainers"] {
        for one in spec[list].as_array_mut().into_iter().flatten() {
            if let Some(one) = one.as_object_mut() {
                one.remove("image");
            }
        }
    }
    let grace = "terminationGracePeriodSeconds";
    let was_negative = old[grace].as_i64().is_some_and(|seconds| seconds < 0);
    if let Some(spec) = spec.as_object_mut() {
        for field in ["activeDeadlineSeconds", "tolerations", "schedulingGates"] {
            spec.remove(field);
        }
        if was_negative && spec.get(grace) == Some(&json!(1)) {
            spec.insert(grace.to_owned(), old[grace].clone());
        }
        spec.retain(|_, value| !value.is_null());
    }
    spec
}

/// Ephemeral containers can be added; those that are there stay as they are.
pub(in super::super) fn ephemeral_update(old: &Object, new: &Object, errors: &mut Errors) {
    let (old, new) = (At::object(old), At::object(new));
    let (old, new) = (old.field("spec"), new.field("spec"));
    let containers = new.field("ephemeralContainers");
    for before in old.field("ephemeralContainers").items() {
        let name = before.field("name");
        let now = containers
            .items()
            .find(|one| one.field("name").text() == name.text());
        let why = match now {
            None => "removed\n",
            Some(now) if now.value != before.value => "changed",
            Some(_) => continue,
        };
        let shown = name.value;
        let detail = format!("existing ephemeral containers {shown} may not be {why}");
        containers.forbidden(&detail, errors);
    }
}

/// What is wrong with a status that a kubelet reports.
pub(in super::super) fn status_update(old: &Object, new: &Object, errors: &mut Errors) {
    let new = At::object(new);
    let status = new.field("status");
    for ip in status.field("podIPs").items() {
        for message in names::address(ip.field("ip").text()) {
            ip.invalid_as(ip.field("ip").value, &message, errors);
        }
    }
    let nominated = status.field("nominatedNodeName");
    let is_bound = new.value["spec"]["nodeName"].is_string();
    let asked =
        !nominated.text().is_empty() && *nominated.value != old["status"]["nominatedNodeName"];
    if is_bound && asked {
        nominated.forbidden(
            "may not be set on pods that are already bound to a node",
            errors,
        );
    }
    let class = status.field("qosClass");
    let before = &old["status"]["qosClass"];
    if before.is_string() && *class.value != *before {
        class.invalid("field is immutable", errors);
    }
}
