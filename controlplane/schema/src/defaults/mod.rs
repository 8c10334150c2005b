//! Defaults: what the API server fills in where the user was silent (upstream's versioned `SetDefaults` functions).

mod kinds;
mod pod;

use serde_json::{Map, Value, json};

use crate::Object;
use crate::table::Resource;

/// Counts the changes of a DaemonSet's template.
pub(crate) const TEMPLATE_GENERATION: &str = "deprecated.daemonset.template.generation";

/// Sets `map[key]` where it is absent or null.
fn set(map: &mut Value, key: &str, value: impl Into<Value>) {
    if let Some(map) = map.as_object_mut() {
        let slot = map.entry(key).or_insert(Value::Null);
        if slot.is_null() {
            *slot = value.into();
        }
    }
}

/// The struct at `key`, made if need be.
fn within<'a>(map: &'a mut Value, key: &str) -> &'a mut Value {
    if map.get(key).is_none_or(Value::is_null) {
        map[key] = json!({});
    }
    &mut map[key]
}

/// The items of a list, none where it is absent.
fn items<'a>(map: &'a mut Value, key: &str) -> impl Iterator<Item = &'a mut Value> {
    map.get_mut(key)
        .and_then(Value::as_array_mut)
        .into_iter()
        .flatten()
}

/// Fills in the defaults of an object; doing it again changes nothing.
pub fn set_defaults(resource: &Resource, object: &mut Object) {
    match (resource.group, resource.kind) {
        ("", "Pod") => pod::pod(within(object, "spec")),
        ("", "PodTemplate") => template(object),
        ("", "Service") => service(object),
        ("", "Secret") => set(object, "type", "Opaque"),
        ("", "Namespace") => {
            let name = object["metadata"]["name"].clone();
            if let Some(name) = name.as_str().filter(|name| !name.is_empty()) {
                let labels = within(within(object, "metadata"), "labels");
                labels["kubernetes.io/metadata.name"] = name.into();
            }
        }
        ("", "ReplicationController") => {
            labels_from_template(object);
            let labels = object["spec"]["template"]["metadata"]["labels"].clone();
            let spec = within(object, "spec");
            set(spec, "replicas", 1);
            if !labels.is_null() {
                set(spec, "selector", labels);
            }
            template(spec);
        }
        ("", "Endpoints") => {
            for subset in items(object, "subsets") {
                items(subset, "ports").for_each(|port| set(port, "protocol", "TCP"));
            }
        }
        ("", "PersistentVolume") => {
            let spec = within(object, "spec");
            set(spec, "persistentVolumeReclaimPolicy", "Retain");
            set(spec, "volumeMode", "Filesystem");
            pod::host_path(spec);
        }
        ("", "PersistentVolumeClaim") => set(within(object, "spec"), "volumeMode", "Filesystem"),
        ("apps", "Deployment") => {
            let spec = within(object, "spec");
            set(spec, "replicas", 1);
            set(spec, "revisionHistoryLimit", 10);
            set(spec, "progressDeadlineSeconds", 600);
            let strategy = within(spec, "strategy");
            set(strategy, "type", "RollingUpdate");
            if strategy["type"] == "RollingUpdate" {
                let rolling = within(strategy, "rollingUpdate");
                set(rolling, "maxUnavailable", "25%");
                set(rolling, "maxSurge", "25%");
            }
            template(spec);
        }
        ("apps", "ReplicaSet") => {
            let spec = within(object, "spec");
            set(spec, "replicas", 1);
            template(spec);
        }
        ("apps", "DaemonSet") => {
            // What was a field before v1 lives on as an annotation.
            let annotations = within(within(object, "metadata"), "annotations");
            set(annotations, TEMPLATE_GENERATION, "0");
            let spec = within(object, "spec");
            set(spec, "revisionHistoryLimit", 10);
            let strategy = within(spec, "updateStrategy");
            set(strategy, "type", "RollingUpdate");
            if strategy["type"] == "RollingUpdate" {
                let rolling = within(strategy, "rollingUpdate");
                set(rolling, "maxUnavailable", 1);
                set(rolling, "maxSurge", 0);
            }
            template(spec);
        }
        ("apps", "StatefulSet") => {
            let spec = within(object, "spec");
            set(spec, "podManagementPolicy", "OrderedReady");
            set(spec, "replicas", 1);
            set(spec, "revisionHistoryLimit", 10);
            let retention = within(spec, "persistentVolumeClaimRetentionPolicy");
            set(retention, "whenDeleted", "Retain");
            set(retention, "whenScaled", "Retain");
            let strategy = within(spec, "updateStrategy");
            set(strategy, "type", "RollingUpdate");
            if strategy["type"] == "RollingUpdate" {
                set(within(strategy, "rollingUpdate"), "partition", 0);
            }
            for claim in items(spec, "volumeClaimTemplates") {
                set(claim, "apiVersion", "v1");
                set(claim, "kind", "PersistentVolumeClaim");
                set(within(claim, "spec"), "volumeMode", "Filesystem");
                set(within(claim, "status"), "phase", "Pending");
            }
            template(spec);
        }
        ("batch", "Job") => {
            labels_from_template(object);
            job_spec(within(object, "spec"), true);
        }
        ("batch", "CronJob") => {
            let spec = within(object, "spec");
            set(spec, "concurrencyPolicy", "Allow");
            set(spec, "suspend", false);
            set(spec, "successfulJobsHistoryLimit", 3);
            set(spec, "failedJobsHistoryLimit", 1);
            job_spec(within(within(spec, "jobTemplate"), "spec"), false);
        }
        ("networking.k8s.io", "NetworkPolicy") => network_policy(object),
        ("discovery.k8s.io", "EndpointSlice") => {
            for port in items(object, "ports") {
                set(port, "name", "");
                set(port, "protocol", "TCP");
            }
        }
        ("rbac.authorization.k8s.io", "RoleBinding" | "ClusterRoleBinding") => {
            set(
                within(object, "roleRef"),
                "apiGroup",
                "rbac.authorization.k8s.io",
            );
            for subject in items(object, "subjects") {
                if matches!(subject["kind"].as_str(), Some("User" | "Group")) {
                    set(subject, "apiGroup", "rbac.authorization.k8s.io");
                }
            }
        }
        ("storage.k8s.io", "StorageClass") => {
            set(object, "reclaimPolicy", "Delete");
            set(object, "volumeBindingMode", "Immediate");
        }
        ("scheduling.k8s.io", "PriorityClass") => {
            set(object, "preemptionPolicy", "PreemptLowerPriority")
        }
        ("autoscaling", "HorizontalPodAutoscaler") => {
            let spec = within(object, "spec");
            set(spec, "minReplicas", 1);
            if resource.version == "v1" {
                set(spec, "targetCPUUtilizationPercentage", 80);
            } else if spec["metrics"].as_array().is_none_or(Vec::is_empty) {
                spec["metrics"] = json!([{"type": "Resource", "resource": {
                    "name": "cpu", "target": {"type": "Utilization", "averageUtilization": 80}}}]);
            }
        }
        _ => kinds::set_defaults(resource, object),
    }
}

/// A ReplicaSet or controller without labels takes its template's.
fn labels_from_template(object: &mut Value) {
    let labels = object["spec"]["template"]["metadata"]["labels"].clone();
    let own = &object["metadata"]["labels"];
    if labels.as_object().is_some_and(|labels| !labels.is_empty())
        && own.as_object().is_none_or(Map::is_empty)
    {
        within(object, "metadata")["labels"] = labels;
    }
}

fn template(owner: &mut Value) {
    let template = within(owner, "template");
    within(template, "metadata");
    pod::pod_spec(within(template, "spec"));
}

fn job_spec(spec: &mut Value, whole: bool) {
    if whole {
        if spec["completions"].is_null() && spec["parallelism"].is_null() {
            set(spec, "completions", 1);
        }
        set(spec, "parallelism", 1);
        let per_index = !spec["backoffLimitPerIndex"].is_null();
        set(spec, "backoffLimit", if per_index { i32::MAX } else { 6 });
        set(spec, "completionMode", "NonIndexed");
        set(spec, "manualSelector", false);
        set(spec, "suspend", false);
        let replacement = if spec["podFailurePolicy"].is_object() {
            "Failed"
        } else {
            "TerminatingOrFailed"
        };
        set(spec, "podReplacementPolicy", replacement);
        if let Some(policy) = spec.get_mut("podFailurePolicy") {
            for rule in items(policy, "rules") {
                items(rule, "onPodConditions").for_each(|one| set(one, "status", "True"));
            }
        }
    }
    template(spec);
}

fn service(object: &mut Value) {
    let spec = within(object, "spec");
    set(spec, "type", "ClusterIP");
    set(spec, "sessionAffinity", "None");
    if spec["sessionAffinity"] == "ClientIP" {
        set(
            within(within(spec, "sessionAffinityConfig"), "clientIP"),
            "timeoutSeconds",
            10_800,
        );
    }
    let kind = spec["type"].as_str().unwrap_or_default().to_owned();
    for port in items(spec, "ports") {
        set(port, "protocol", "TCP");
        let number = port["port"].clone();
        if port["targetPort"].is_null() || port["targetPort"] == 0 || port["targetPort"] == "" {
            port["targetPort"] = number;
        }
    }
    let external = spec["externalIPs"]
        .as_array()
        .is_some_and(|all| !all.is_empty());
    if matches!(kind.as_str(), "NodePort" | "LoadBalancer") || kind == "ClusterIP" && external {
        set(spec, "externalTrafficPolicy", "Cluster");
    }
    if kind == "LoadBalancer" {
        set(spec, "allocateLoadBalancerNodePorts", true);
    }
    if kind != "ExternalName" {
        set(spec, "internalTrafficPolicy", "Cluster");
    }
    let balancer = object.pointer_mut("/status/loadBalancer");
    if let Some(balancer) = balancer.filter(|_| kind == "LoadBalancer") {
        for one in items(balancer, "ingress").filter(|one| !one["ip"].is_null()) {
            set(one, "ipMode", "VIP");
        }
    }
}

fn network_policy(object: &mut Value) {
    let spec = within(object, "spec");
    set(spec, "podSelector", json!({}));
    let has_egress = spec["egress"]
        .as_array()
        .is_some_and(|egress| !egress.is_empty());
    if spec["policyTypes"].as_array().is_none_or(Vec::is_empty) {
        spec["policyTypes"] = if has_egress {
            json!(["Ingress", "Egress"])
        } else {
            json!(["Ingress"])
        };
    }
    for direction in ["ingress", "egress"] {
        for rule in items(spec, direction) {
            items(rule, "ports").for_each(|port| set(port, "protocol", "TCP"));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::table;

    fn defaulted(group: &str, plural: &str, mut object: Value) -> Value {
        let resource = table::resource(group, "v1", plural).unwrap();
        set_defaults(resource, &mut object);
        let once = object.clone();
        set_defaults(resource, &mut object);
        assert_eq!(once, object, "defaults are idempotent");
        object
    }

    #[test]
    fn a_minimal_pod_is_filled_in_as_by_the_real_server() {
        let pod = defaulted(
            "",
            "pods",
            json!({"spec": {"containers": [{"name": "a", "image": "nginx"}], "volumes": [{"name": "v"}]}}),
        );
        assert_eq!(
            pod["spec"],
            json!({
                "containers": [{"name": "a", "image": "nginx", "imagePullPolicy": "Always", "resources": {},
                    "terminationMessagePath": "/dev/termination-log", "terminationMessagePolicy": "File"}],
                "dnsPolicy": "ClusterFirst", "enableServiceLinks": true, "restartPolicy": "Always",
                "schedulerName": "default-scheduler",
                "securityContext": {}, "terminationGracePeriodSeconds": 30,
                "volumes": [{"name": "v", "emptyDir": {}}],
            })
        );
    }

    #[test]
    fn services_and_policies() {
        let service = defaulted(
            "",
            "services",
            json!({"spec": {"type": "NodePort", "ports": [{"port": 80}]}}),
        );
        assert_eq!(
            service["spec"]["ports"][0],
            json!({"port": 80, "protocol": "TCP", "targetPort": 80})
        );
        assert_eq!(service["spec"]["externalTrafficPolicy"], "Cluster");
        let policy = defaulted(
            "networking.k8s.io",
            "networkpolicies",
            json!({"spec": {"podSelector": {}, "egress": [{"ports": [{"port": 53}]}]}}),
        );
        assert_eq!(policy["spec"]["policyTypes"], json!(["Ingress", "Egress"]));
        assert_eq!(policy["spec"]["egress"][0]["ports"][0]["protocol"], "TCP");
    }
}
