//! Defaults of the kinds that are policy or configuration rather than workload.

use serde_json::{Value, json};

use super::{items, set, within};
use crate::Object;
use crate::table::Resource;

pub(super) fn set_defaults(resource: &Resource, object: &mut Object) {
    match (resource.group, resource.kind) {
        ("", "LimitRange") => {
            items(within(object, "spec"), "limits").for_each(limit);
        }
        ("", "Node") => {
            let status = within(object, "status");
            if status["capacity"].is_object() {
                let capacity = status["capacity"].clone();
                set(status, "allocatable", capacity);
            }
        }
        ("admissionregistration.k8s.io", kind) => admission(kind, object),
        ("apiextensions.k8s.io", "CustomResourceDefinition") => {
            custom_resource_definition(within(object, "spec"));
        }
        ("apiregistration.k8s.io", "APIService") => {
            if let Some(service) = present(within(object, "spec"), "service") {
                set(service, "port", 443);
            }
        }
        ("flowcontrol.apiserver.k8s.io", "FlowSchema") => {
            let spec = within(object, "spec");
            if spec["matchingPrecedence"].as_i64().unwrap_or(0) == 0 {
                spec["matchingPrecedence"] = 1000.into();
            }
        }
        ("flowcontrol.apiserver.k8s.io", "PriorityLevelConfiguration") => {
            let spec = within(object, "spec");
            if let Some(limited) = present(spec, "limited") {
                set(limited, "nominalConcurrencyShares", 30);
                set(limited, "lendablePercent", 0);
                if let Some(queuing) = present(within(limited, "limitResponse"), "queuing") {
                    set_nonzero(queuing, "handSize", 8);
                    set_nonzero(queuing, "queues", 64);
                    set_nonzero(queuing, "queueLengthLimit", 50);
                }
            }
            if let Some(exempt) = present(spec, "exempt") {
                set(exempt, "nominalConcurrencyShares", 0);
                set(exempt, "lendablePercent", 0);
            }
        }
        ("resource.k8s.io", "ResourceClaim") => claim(within(object, "spec")),
        ("resource.k8s.io", "ResourceClaimTemplate") => {
            claim(within(within(object, "spec"), "spec"));
        }
        ("storage.k8s.io", "CSIDriver") => {
            let spec = within(object, "spec");
            set(spec, "attachRequired", true);
            set(spec, "podInfoOnMount", false);
            set(spec, "storageCapacity", false);
            set(spec, "fsGroupPolicy", "ReadWriteOnceWithFSType");
            set(spec, "requiresRepublish", false);
            set(spec, "seLinuxMount", false);
            let modes = &mut spec["volumeLifecycleModes"];
            if modes.as_array().is_none_or(Vec::is_empty) {
                *modes = json!(["Persistent"]);
            }
        }
        _ => {}
    }
}

/// The struct at `key`, where there is one.
fn present<'a>(map: &'a mut Value, key: &str) -> Option<&'a mut Value> {
    map.get_mut(key).filter(|value| value.is_object())
}

/// Sets a number that is absent or 0.
fn set_nonzero(map: &mut Value, key: &str, number: i64) {
    if map[key].as_i64().unwrap_or(0) == 0 {
        map[key] = number.into();
    }
}

/// One limit of a range: the most is the default, the default or else the least is the default request.
fn limit(limit: &mut Value) {
    if limit["type"] != "Container" {
        return;
    }
    let of = |limit: &Value, key: &str| limit[key].as_object().cloned().unwrap_or_default();
    let mut default = of(limit, "default");
    for (name, most) in of(limit, "max") {
        default.entry(name).or_insert(most);
    }
    let mut request = of(limit, "defaultRequest");
    for (name, value) in &default {
        request.entry(name).or_insert_with(|| value.clone());
    }
    for (name, least) in of(limit, "min") {
        request.entry(name).or_insert(least);
    }
    for (key, map) in [("default", default), ("defaultRequest", request)] {
        if !map.is_empty() {
            limit[key] = Value::Object(map);
        }
    }
}

fn admission(kind: &str, object: &mut Object) {
    match kind {
        "ValidatingWebhookConfiguration" | "MutatingWebhookConfiguration" => {
            for webhook in items(object, "webhooks") {
                set(webhook, "failurePolicy", "Fail");
                set(webhook, "timeoutSeconds", 10);
                if kind.starts_with("Mutating") {
                    set(webhook, "reinvocationPolicy", "Never");
                }
                matching(webhook);
                items(webhook, "rules").for_each(|rule| set(rule, "scope", "*"));
                let service =
                    present(webhook, "clientConfig").and_then(|config| present(config, "service"));
                if let Some(service) = service {
                    set(service, "port", 443);
                }
            }
        }
        "ValidatingAdmissionPolicy" | "MutatingAdmissionPolicy" => {
            let spec = within(object, "spec");
            set(spec, "failurePolicy", "Fail");
            if let Some(constraints) = present(spec, "matchConstraints") {
                match_resources(constraints);
            }
        }
        "ValidatingAdmissionPolicyBinding" | "MutatingAdmissionPolicyBinding" => {
            if let Some(matches) = present(within(object, "spec"), "matchResources") {
                match_resources(matches);
            }
        }
        _ => {}
    }
}

fn matching(matches: &mut Value) {
    set(matches, "matchPolicy", "Equivalent");
    set(matches, "namespaceSelector", json!({}));
    set(matches, "objectSelector", json!({}));
}

fn match_resources(matches: &mut Value) {
    matching(matches);
    for list in ["resourceRules", "excludeResourceRules"] {
        items(matches, list).for_each(|rule| set(rule, "scope", "*"));
    }
}

fn custom_resource_definition(spec: &mut Value) {
    let kind = spec["names"]["kind"]
        .as_str()
        .unwrap_or_default()
        .to_owned();
    if !kind.is_empty() {
        let names = within(spec, "names");
        set_text(names, "singular", &kind.to_lowercase());
        set_text(names, "listKind", &format!("{kind}List"));
    }
    let conversion = within(spec, "conversion");
    set_text(conversion, "strategy", "None");
    let service = present(conversion, "webhook")
        .and_then(|webhook| present(webhook, "clientConfig"))
        .and_then(|config| present(config, "service"));
    if let Some(service) = service {
        set(service, "port", 443);
    }
}

/// Sets a text that is absent or empty.
fn set_text(map: &mut Value, key: &str, text: &str) {
    if map[key].as_str().unwrap_or_default().is_empty() {
        map[key] = text.into();
    }
}

/// Devices are counted: one of them, where nothing else is said.
fn claim(spec: &mut Value) {
    let Some(devices) = present(spec, "devices") else {
        return;
    };
    for request in items(devices, "requests") {
        if let Some(exactly) = present(request, "exactly") {
            counted(exactly);
        }
        items(request, "firstAvailable").for_each(counted);
    }
}

fn counted(request: &mut Value) {
    set_text(request, "allocationMode", "ExactCount");
    if request["allocationMode"] == "ExactCount" {
        set_nonzero(request, "count", 1);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::table;

    fn defaulted(group: &str, plural: &str, mut object: Value) -> Value {
        let resource = table::resource(group, "v1", plural).unwrap();
        super::super::set_defaults(resource, &mut object);
        let once = object.clone();
        super::super::set_defaults(resource, &mut object);
        assert_eq!(once, object, "defaults are idempotent");
        object
    }

    #[test]
    fn a_limit_is_its_default_and_the_request() {
        let range = defaulted(
            "",
            "limitranges",
            json!({"spec": {"limits": [{"type": "Container", "max": {"cpu": "2"}, "min": {"cpu": "1", "memory": "1Mi"}}]}}),
        );
        let limit = &range["spec"]["limits"][0];
        assert_eq!(limit["default"], json!({"cpu": "2"}));
        assert_eq!(
            limit["defaultRequest"],
            json!({"cpu": "2", "memory": "1Mi"})
        );
    }

    #[test]
    fn webhooks_fail_closed_by_default() {
        let group = "admissionregistration.k8s.io";
        let webhook =
            json!({"webhooks": [{"name": "w", "rules": [{}], "clientConfig": {"service": {}}}]});
        let done = defaulted(group, "validatingwebhookconfigurations", webhook);
        let webhook = &done["webhooks"][0];
        assert_eq!(webhook["failurePolicy"], "Fail");
        assert_eq!(webhook["rules"][0]["scope"], "*");
        assert_eq!(webhook["clientConfig"]["service"]["port"], 443);
    }
}
