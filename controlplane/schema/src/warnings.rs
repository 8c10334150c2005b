//! What an object that is accepted is warned about: deprecated fields, and values that are probably mistakes.

use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use serde_json::Value;

use crate::Object;
use crate::quantity::Quantity;
use crate::table::Resource;

/// What every request to a deprecated kind is warned of.
pub fn deprecated(resource: &Resource) -> Option<&'static str> {
    match (resource.group, resource.kind) {
        ("", "ComponentStatus") => Some("v1 ComponentStatus is deprecated in v1.19+"),
        ("", "Endpoints") => {
            Some("v1 Endpoints is deprecated in v1.33+; use discovery.k8s.io/v1 EndpointSlice")
        }
        _ => None,
    }
}

/// Warnings about a new object, or a changed one where `old` is given.
pub fn of(resource: &Resource, object: &Object, old: Option<&Object>) -> Vec<String> {
    let mut warnings = Vec::new();
    let spec = &object["spec"];
    let old_spec = old.map_or(&Value::Null, |old| &old["spec"]);
    match (resource.group, resource.kind) {
        ("", "Pod") if old.is_none() => pod_spec(spec, "spec", &mut warnings),
        ("", "Service") => service(spec, old_spec, &mut warnings),
        ("", "PersistentVolume") if spec["persistentVolumeReclaimPolicy"] == "Recycle" => {
            warnings.push("spec.persistentVolumeReclaimPolicy: The Recycle reclaim policy is deprecated. Instead, the recommended approach is to use dynamic provisioning.".into());
        }
        ("apps", "Deployment" | "ReplicaSet" | "DaemonSet" | "StatefulSet")
        | ("", "ReplicationController")
        | ("batch", "Job") => {
            let template = &spec["template"]["spec"];
            if old.is_none() || old_spec["template"] != spec["template"] {
                pod_spec(template, "spec.template.spec", &mut warnings);
            }
        }
        ("batch", "CronJob") => {
            let template = &spec["jobTemplate"]["spec"]["template"]["spec"];
            if old.is_none() || old_spec["jobTemplate"] != spec["jobTemplate"] {
                let path = "spec.jobTemplate.spec.template.spec";
                pod_spec(template, path, &mut warnings);
            }
        }
        ("discovery.k8s.io", "EndpointSlice")
            if old.is_none() && object["addressType"] == "FQDN" =>
        {
            warnings.push("spec.addressType: FQDN endpoints are deprecated".into());
        }
        ("storage.k8s.io", "CSIDriver") => {
            let requests = spec["tokenRequests"].as_array();
            if requests.is_some_and(|all| !all.is_empty())
                && spec["serviceAccountTokenInSecrets"].is_null()
            {
                warnings.push("spec.serviceAccountTokenInSecrets is unset; if supported by this CSI driver, set to true to prevent possible logging of tokens in volume attributes".into());
            }
        }
        ("", "Secret") if object["type"] == "kubernetes.io/tls" => {
            let pem = |key: &str| {
                let bytes = STANDARD.decode(object["data"][key].as_str().unwrap_or_default());
                bytes.is_ok_and(|bytes| bytes.windows(10).any(|part| part == b"-----BEGIN"))
            };
            if old.is_none_or(|old| old["data"] != object["data"]) {
                if !pem("tls.crt") {
                    warnings.push("tls: failed to find any PEM data in certificate input".into());
                } else if !pem("tls.key") {
                    warnings.push("tls: failed to find any PEM data in key input".into());
                }
            }
        }
        ("networking.k8s.io", "Ingress") => {
            let annotation = "kubernetes.io/ingress.class";
            if old.is_none() && !object["metadata"]["annotations"][annotation].is_null() {
                warnings.push(format!("annotation {annotation:?} is deprecated, please use 'spec.ingressClassName' instead"));
            }
        }
        _ => {}
    }
    warnings
}

fn service(spec: &Value, old: &Value, warnings: &mut Vec<String>) {
    let external = spec["externalIPs"].as_array();
    if external.is_some_and(|all| !all.is_empty()) && old["externalIPs"] != spec["externalIPs"] {
        warnings.push(
            "spec.externalIPs is deprecated and may no longer be implemented in some clusters"
                .into(),
        );
    }
    if spec["trafficDistribution"] == "PreferClose"
        && old["trafficDistribution"] != spec["trafficDistribution"]
    {
        warnings.push(
            "spec.trafficDistribution: \"PreferClose\" is deprecated; use \"PreferSameZone\""
                .into(),
        );
    }
}

fn pod_spec(spec: &Value, path: &str, warnings: &mut Vec<String>) {
    for list in ["initContainers", "containers"] {
        let containers = spec[list].as_array().into_iter().flatten();
        for (index, container) in containers.enumerate() {
            let path = format!("{path}.{list}[{index}]");
            repeated_names(&container["env"], &format!("{path}.env"), warnings);
            for kind in ["limits", "requests"] {
                for name in ["memory", "ephemeral-storage"] {
                    let Some(text) = container["resources"][kind][name].as_str() else {
                        continue;
                    };
                    let nano = Quantity::parse(text).map_or(0, |quantity| quantity.nano_value());
                    if nano % 1_000_000_000 != 0 {
                        warnings.push(format!("{path}.resources.{kind}[{name}]: fractional byte value \"{text}\" is invalid, must be an integer"));
                    }
                }
            }
        }
    }
    let secrets = spec["imagePullSecrets"].as_array().into_iter().flatten();
    for (index, secret) in secrets.enumerate() {
        if secret["name"].as_str().unwrap_or_default().is_empty() {
            warnings.push(format!(
                "{path}.imagePullSecrets[{index}].name: invalid empty name \"\""
            ));
        }
    }
}

fn repeated_names(list: &Value, path: &str, warnings: &mut Vec<String>) {
    let mut seen: Vec<&Value> = Vec::new();
    for (index, item) in list.as_array().into_iter().flatten().enumerate() {
        let name = &item["name"];
        if seen.contains(&name) {
            let name = name.as_str().unwrap_or_default();
            warnings.push(format!(
                "{path}[{index}]: hides previous definition of \"{name}\", which may be dropped when using apply"
            ));
        }
        seen.push(name);
    }
}
