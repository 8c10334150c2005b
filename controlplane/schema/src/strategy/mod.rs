//! What happens to an object around its storing: initial status, status kept apart from spec, generation.

pub mod service;

use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use serde_json::{Value, json};

use crate::Object;
use crate::defaults::TEMPLATE_GENERATION;
use crate::table::Resource;

/// Whether the resource keeps spec and status apart through a `status` subresource.
fn has_status(resource: &Resource) -> bool {
    resource.subresource("status").is_some()
}

/// Whether `metadata.generation` counts changes of the desired state.
fn has_generation(resource: &Resource) -> bool {
    match (resource.group, resource.kind) {
        ("", "Pod" | "PodTemplate" | "ReplicationController") => true,
        (
            ""
            | "coordination.k8s.io"
            | "rbac.authorization.k8s.io"
            | "node.k8s.io"
            | "certificates.k8s.io"
            | "events.k8s.io"
            | "authentication.k8s.io"
            | "authorization.k8s.io",
            _,
        ) => false,
        ("discovery.k8s.io", _) => true,
        ("networking.k8s.io", kind) => matches!(kind, "Ingress" | "NetworkPolicy" | "IngressClass"),
        ("autoscaling", _) => false,
        ("scheduling.k8s.io", _) => true,
        ("apps", kind) => kind != "ControllerRevision",
        (
            "batch"
            | "policy"
            | "flowcontrol.apiserver.k8s.io"
            | "admissionregistration.k8s.io"
            | "apiextensions.k8s.io",
            _,
        ) => true,
        ("resource.k8s.io", kind) => !kind.starts_with("ResourceClaim"),
        _ => false,
    }
}

fn remove(object: &mut Object, key: &str) {
    if let Some(map) = object.as_object_mut() {
        map.remove(key);
    }
}

/// Fields of features that are still off by default are dropped where no object has them yet.
fn drop_disabled(resource: &Resource, object: &mut Object, old: Option<&Object>) {
    let unused = |path: &dyn Fn(&Object) -> bool| old.is_none_or(|old| !path(old));
    match (resource.group, resource.kind) {
        ("coordination.k8s.io", "Lease") => {
            for field in ["preferredHolder", "strategy"] {
                if unused(&|old| !old["spec"][field].is_null()) {
                    if let Some(spec) = object["spec"].as_object_mut() {
                        spec.remove(field);
                    }
                }
            }
        }
        ("", "Pod") if unused(&has_stop_signal) => {
            for list in ["containers", "initContainers"] {
                let containers = object["spec"].get_mut(list);
                let containers = containers.and_then(Value::as_array_mut);
                containers.into_iter().flatten().for_each(drop_stop_signal);
            }
        }
        _ => {}
    }
}

fn has_stop_signal(pod: &Object) -> bool {
    let lists = ["containers", "initContainers"].into_iter();
    lists
        .flat_map(|list| pod["spec"][list].as_array().into_iter().flatten())
        .any(|container| !container["lifecycle"]["stopSignal"].is_null())
}

fn drop_stop_signal(container: &mut Value) {
    let Some(map) = container.as_object_mut() else {
        return;
    };
    if let Some(Value::Object(lifecycle)) = map.get_mut("lifecycle") {
        let had = lifecycle.remove("stopSignal").is_some();
        if had && lifecycle.is_empty() {
            map.remove("lifecycle");
        }
    }
}

/// Before an object is stored for the first time.
pub fn prepare_for_create(resource: &Resource, object: &mut Object) {
    if has_status(resource) && !(resource.group.is_empty() && resource.kind == "Node") {
        remove(object, "status");
    }
    drop_disabled(resource, object, None);
    match (resource.group, resource.kind) {
        ("", "Pod") => {
            object["status"] = json!({"phase": "Pending", "qosClass": qos_class(&object["spec"])});
            gate(object);
        }
        ("", "Namespace") => {
            object["status"] = json!({"phase": "Active"});
            let finalizers = &mut object["spec"]["finalizers"];
            if !finalizers
                .as_array()
                .is_some_and(|all| all.iter().any(|one| one == "kubernetes"))
            {
                match finalizers.as_array_mut() {
                    Some(all) => all.push("kubernetes".into()),
                    None => *finalizers = json!(["kubernetes"]),
                }
            }
        }
        ("", "PersistentVolume") => {
            let since = object["metadata"]["creationTimestamp"].clone();
            object["status"] = json!({"phase": "Pending", "lastPhaseTransitionTime": since});
        }
        ("", "PersistentVolumeClaim") => {
            object["status"] = json!({"phase": "Pending"});
            same_source(&mut object["spec"]);
        }
        ("", "Service") => object["status"] = json!({"loadBalancer": {}}),
        ("networking.k8s.io", "Ingress") => object["status"] = json!({"loadBalancer": {}}),
        ("", "ReplicationController") | ("apps", "ReplicaSet") => {
            object["status"] = json!({"replicas": 0})
        }
        ("batch", "Job") => {
            object["status"] = json!({});
            select_by_uid(object);
        }
        ("apps", "Deployment") | ("batch", "CronJob") => object["status"] = json!({}),
        ("apps", "StatefulSet") => {
            object["status"] = json!({"availableReplicas": 0, "replicas": 0})
        }
        ("apps", "DaemonSet") => {
            object["metadata"]["annotations"][TEMPLATE_GENERATION] = "1".into();
            object["status"] = json!({"currentNumberScheduled": 0, "desiredNumberScheduled": 0, "numberMisscheduled": 0, "numberReady": 0});
        }
        ("autoscaling", "HorizontalPodAutoscaler") => {
            object["status"] = json!({"currentMetrics": null, "desiredReplicas": 0})
        }
        ("policy", "PodDisruptionBudget") => {
            object["status"] = json!({"currentHealthy": 0, "desiredHealthy": 0, "disruptionsAllowed": 0, "expectedPods": 0});
        }
        ("apiextensions.k8s.io", "CustomResourceDefinition") => stored_versions(object),
        ("", "Secret") => merge_string_data(object),
        _ => {}
    }
    if let Some(metadata) = object["metadata"].as_object_mut() {
        metadata.remove("deletionTimestamp");
        metadata.remove("deletionGracePeriodSeconds");
        metadata.remove("selfLink");
    }
    if has_generation(resource) {
        object["metadata"]["generation"] = 1.into();
    }
}

/// Before a changed object replaces the stored one through the main resource.
pub fn prepare_for_update(resource: &Resource, old: &Object, new: &mut Object) {
    if has_status(resource) {
        match old.get("status") {
            Some(status) => new["status"] = status.clone(),
            None => remove(new, "status"),
        }
    }
    drop_disabled(resource, new, Some(old));
    if resource.kind == "Secret" {
        merge_string_data(new);
    }
    if resource.kind == "Service" && resource.group.is_empty() {
        service::drop_what_went_with_the_type(&old["spec"], &mut new["spec"]);
        service::drop_status_of_balancer(new);
    }
    if resource.kind == "Namespace" {
        new["spec"]["finalizers"] = old["spec"]["finalizers"].clone();
    }
    keep_generation(old, new);
    if resource.kind == "DaemonSet" && resource.group == "apps" {
        let before = &old["metadata"]["annotations"][TEMPLATE_GENERATION];
        let mut number = before
            .as_str()
            .and_then(|text| text.parse().ok())
            .unwrap_or(0_i64);
        number += i64::from(old["spec"]["template"] != new["spec"]["template"]);
        new["metadata"]["annotations"][TEMPLATE_GENERATION] = number.to_string().into();
    }
    // Deployments hand their annotations on to what they make, so these count, too.
    // So do the labels of an EndpointSlice, which say whose endpoints they are.
    let differs = |field: &str| old["metadata"][field] != new["metadata"][field];
    let handed_on = resource.kind == "Deployment" && differs("annotations")
        || resource.kind == "EndpointSlice" && differs("labels");
    if has_generation(resource) && (handed_on || desired(old) != desired(new)) {
        let next = old["metadata"]["generation"].as_i64().unwrap_or(0) + 1;
        new["metadata"]["generation"] = next.into();
    }
}

/// Before a pod with other ephemeral containers replaces the stored one: everything else stays as it was.
pub fn prepare_for_ephemeral_update(old: &Object, new: &mut Object) {
    let ephemeral = new["spec"]["ephemeralContainers"].take();
    new["spec"] = old["spec"].clone();
    match old.get("status") {
        Some(status) => new["status"] = status.clone(),
        None => remove(new, "status"),
    }
    if let Some(spec) = new["spec"].as_object_mut() {
        match ephemeral {
            Value::Null => drop(spec.remove("ephemeralContainers")),
            given => drop(spec.insert("ephemeralContainers".into(), given)),
        }
    }
    for field in ["labels", "annotations", "ownerReferences", "finalizers"] {
        if let Some(metadata) = new["metadata"].as_object_mut() {
            match old["metadata"].get(field) {
                Some(value) => drop(metadata.insert(field.to_owned(), value.clone())),
                None => drop(metadata.remove(field)),
            }
        }
    }
    keep_generation(old, new);
    if desired(old) != desired(new) {
        let next = old["metadata"]["generation"].as_i64().unwrap_or(0) + 1;
        new["metadata"]["generation"] = next.into();
    }
}

/// Before a changed status replaces the stored one: everything else stays as it was.
pub fn prepare_for_status_update(resource: &Resource, old: &Object, new: &mut Object) {
    let status = new.get("status").cloned();
    let metadata = new["metadata"].clone();
    let mut result = old.clone();
    match status {
        Some(status) => result["status"] = status,
        None => remove(&mut result, "status"),
    }
    // Labels, annotations and the like may be changed here too, by those who may write status.
    result["metadata"] = metadata;
    if resource.group == "resource.k8s.io" {
        let managers = result["metadata"].get("managedFields").cloned();
        result["metadata"] = old["metadata"].clone();
        match managers {
            Some(managers) => result["metadata"]["managedFields"] = managers,
            None => remove(&mut result["metadata"], "managedFields"),
        }
    }
    if (resource.group, resource.kind) == ("apps", "Deployment") {
        match old["metadata"].get("labels") {
            Some(labels) => result["metadata"]["labels"] = labels.clone(),
            None => remove(&mut result["metadata"], "labels"),
        }
    }
    keep_generation(old, &mut result);
    if resource.kind == "Pod" && result["status"]["qosClass"].is_null() {
        result["status"]["qosClass"] = old["status"]["qosClass"].clone();
    }
    *new = result;
}

/// The two fields for what a claim is filled from say the same, unless the source is in another namespace.
fn same_source(spec: &mut Value) {
    let (old, new) = (spec["dataSource"].clone(), spec["dataSourceRef"].clone());
    match (old.is_object(), new.is_object()) {
        (true, false) => spec["dataSourceRef"] = old,
        (false, true) if new["namespace"].as_str().unwrap_or_default().is_empty() => {
            spec["dataSource"] = new;
        }
        _ => {}
    }
    if let Some(map) = spec.as_object_mut() {
        map.retain(|field, value| !(field.starts_with("dataSource") && value.is_null()));
    }
}

/// A pod with scheduling gates says so from its first moment.
fn gate(pod: &mut Object) {
    let gates = pod["spec"]["schedulingGates"].as_array();
    if gates.is_some_and(|gates| !gates.is_empty()) {
        let since = pod["metadata"]["creationTimestamp"].clone();
        pod["status"]["conditions"] = json!([{
            "type": "PodScheduled", "status": "False", "reason": "SchedulingGated",
            "message": "Scheduling is blocked due to non-empty scheduling gates",
            "lastProbeTime": null, "lastTransitionTime": since,
        }]);
    }
}

/// A Job owns the pods that have its UID as a label, unless it brings a selector of its own.
fn select_by_uid(job: &mut Object) {
    if job["spec"]["manualSelector"] == true {
        return;
    }
    let (uid, name) = (
        job["metadata"]["uid"].clone(),
        job["metadata"]["name"].clone(),
    );
    let template = &mut job["spec"]["template"]["metadata"]["labels"];
    for (label, value) in [
        ("batch.kubernetes.io/controller-uid", &uid),
        ("batch.kubernetes.io/job-name", &name),
        ("controller-uid", &uid),
        ("job-name", &name),
    ] {
        template[label] = value.clone();
    }
    job["spec"]["selector"]["matchLabels"]["batch.kubernetes.io/controller-uid"] = uid;
}

/// A new definition's storage version is the only one that objects are stored under.
fn stored_versions(definition: &mut Object) {
    let stored: Vec<Value> = definition["spec"]["versions"]
        .as_array()
        .into_iter()
        .flatten()
        .filter(|version| version["storage"] == true)
        .map(|version| version["name"].clone())
        .collect();
    definition["status"]["storedVersions"] = stored.into();
}

/// Generation is the server's alone.
fn keep_generation(old: &Object, new: &mut Object) {
    match old["metadata"].get("generation") {
        Some(generation) => new["metadata"]["generation"] = generation.clone(),
        None => remove(&mut new["metadata"], "generation"),
    }
}

/// The object without what does not count as desired state.
fn desired(object: &Object) -> Object {
    let mut object = object.clone();
    remove(&mut object, "metadata");
    remove(&mut object, "status");
    object
}

/// `stringData` of a Secret goes into `data`, base64.
fn merge_string_data(object: &mut Object) {
    let Some(Value::Object(plain)) = object
        .as_object_mut()
        .and_then(|map| map.remove("stringData"))
    else {
        return;
    };
    for (key, value) in plain {
        object["data"][key] = STANDARD.encode(value.as_str().unwrap_or_default()).into();
    }
}

/// A pod's quality of service class, from CPU and memory of all its containers.
pub fn qos_class(spec: &Value) -> &'static str {
    let mut any = false;
    let mut guaranteed = true;
    let containers = ["containers", "initContainers"]
        .iter()
        .flat_map(|list| spec[*list].as_array().into_iter().flatten());
    for container in containers {
        for name in ["cpu", "memory"] {
            let amount = |list: &str| {
                container["resources"][list][name]
                    .as_str()
                    .and_then(|text| crate::quantity::Quantity::parse(text).ok())
                    .filter(|q| q.nano_value() > 0)
            };
            let (request, limit) = (amount("requests"), amount("limits"));
            any |= request.is_some() || limit.is_some();
            guaranteed &= limit.is_some()
                && request.is_none_or(|request| {
                    Some(request.nano_value()) == limit.map(|l| l.nano_value())
                });
        }
    }
    match (any, guaranteed) {
        (false, _) => "BestEffort",
        (true, true) => "Guaranteed",
        (true, false) => "Burstable",
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::table;

    #[test]
    fn status_is_kept_apart_and_generation_counts_spec_changes() {
        let deployments = table::resource("apps", "v1", "deployments").unwrap();
        let mut old = json!({"metadata": {"name": "d", "generation": 7}, "spec": {"replicas": 1}, "status": {"replicas": 9}});
        prepare_for_create(deployments, &mut old);
        assert_eq!(
            (&old["metadata"]["generation"], &old["status"]),
            (&json!(1), &json!({}))
        );
        let mut new =
            json!({"metadata": {"name": "d"}, "spec": {"replicas": 2}, "status": {"replicas": 5}});
        prepare_for_update(deployments, &old, &mut new);
        assert_eq!(
            (&new["metadata"]["generation"], &new["status"]),
            (&json!(2), &json!({}))
        );
        let mut status = json!({"metadata": {"name": "d", "generation": 2}, "spec": {"replicas": 99}, "status": {"replicas": 5}});
        prepare_for_status_update(deployments, &new, &mut status);
        assert_eq!(
            (&status["spec"]["replicas"], &status["status"]["replicas"]),
            (&json!(2), &json!(5))
        );
    }

    #[test]
    fn qos_classes() {
        let class =
            |resources: Value| qos_class(&json!({"containers": [{"resources": resources}]}));
        assert_eq!(class(json!({})), "BestEffort");
        assert_eq!(class(json!({"requests": {"cpu": "1"}})), "Burstable");
        assert_eq!(
            class(
                json!({"limits": {"cpu": "1", "memory": "1Gi"}, "requests": {"cpu": "1000m", "memory": "1024Mi"}})
            ),
            "Guaranteed"
        );
    }

    #[test]
    fn string_data_becomes_data() {
        let mut secret = json!({"stringData": {"a": "hello", "b": "", "c": "hi"}});
        merge_string_data(&mut secret);
        assert_eq!(
            secret,
            json!({"data": {"a": "aGVsbG8=", "b": "", "c": "aGk="}})
        );
    }
}
