//! Defaults: what the API server fills in where the user was silent (upstream's versioned `SetDefaults` functions).

use serde_json::{Map, Value, json};

use crate::Object;
use crate::table::Resource;

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
        ("", "Pod") => pod_spec(within(object, "spec")),
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
            host_path(spec);
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
            labels_from_template(object);
            let spec = within(object, "spec");
            set(spec, "replicas", 1);
            template(spec);
        }
        ("apps", "DaemonSet") => {
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
        ("batch", "Job") => job_spec(within(object, "spec"), true),
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
        ("autoscaling", "HorizontalPodAutoscaler") => set(within(object, "spec"), "minReplicas", 1),
        _ => {}
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
    pod_spec(within(template, "spec"));
}

fn job_spec(spec: &mut Value, whole: bool) {
    if whole {
        if spec["completions"].is_null() && spec["parallelism"].is_null() {
            set(spec, "completions", 1);
        }
        set(spec, "parallelism", 1);
        set(spec, "backoffLimit", 6);
        set(spec, "completionMode", "NonIndexed");
        set(spec, "suspend", false);
        set(spec, "podReplacementPolicy", "TerminatingOrFailed");
    }
    template(spec);
}

/// The defaults of `PodSpec`, for pods and templates alike.
pub fn pod_spec(spec: &mut Value) {
    set(spec, "dnsPolicy", "ClusterFirst");
    set(spec, "restartPolicy", "Always");
    set(spec, "securityContext", json!({}));
    set(spec, "terminationGracePeriodSeconds", 30);
    set(spec, "schedulerName", "default-scheduler");
    let host_network = spec["hostNetwork"] == true;
    for list in ["initContainers", "containers", "ephemeralContainers"] {
        items(spec, list).for_each(|one| container(one, host_network));
    }
    items(spec, "volumes").for_each(volume);
    // The old name of the field goes along with the new one.
    if let Some(name) = spec["serviceAccountName"].as_str().map(str::to_owned) {
        set(spec, "serviceAccount", name);
    } else if let Some(name) = spec["serviceAccount"].as_str().map(str::to_owned) {
        set(spec, "serviceAccountName", name);
    }
}

fn container(container: &mut Value, host_network: bool) {
    let image = container["image"].as_str().unwrap_or_default().to_owned();
    set(
        container,
        "imagePullPolicy",
        if pulls_always(&image) {
            "Always"
        } else {
            "IfNotPresent"
        },
    );
    set(container, "terminationMessagePath", "/dev/termination-log");
    set(container, "terminationMessagePolicy", "File");
    set(container, "resources", json!({}));
    for port in items(container, "ports") {
        set(port, "protocol", "TCP");
        if host_network {
            let number = port["containerPort"].clone();
            if port["hostPort"].as_i64().unwrap_or(0) == 0 {
                port["hostPort"] = number;
            }
        }
    }
    for env in items(container, "env") {
        if let Some(field) = env
            .get_mut("valueFrom")
            .and_then(|from| from.get_mut("fieldRef"))
        {
            set(field, "apiVersion", "v1");
        }
    }
    for name in ["livenessProbe", "readinessProbe", "startupProbe"] {
        if let Some(probe) = container.get_mut(name).filter(|probe| probe.is_object()) {
            set(probe, "timeoutSeconds", 1);
            set(probe, "periodSeconds", 10);
            set(probe, "successThreshold", 1);
            set(probe, "failureThreshold", 3);
            if let Some(get) = probe.get_mut("httpGet").filter(|get| get.is_object()) {
                set(get, "path", "/");
                set(get, "scheme", "HTTP");
            }
            if let Some(grpc) = probe.get_mut("grpc").filter(|grpc| grpc.is_object()) {
                set(grpc, "service", "");
            }
        }
    }
    for hook in ["postStart", "preStop"] {
        let get = container
            .get_mut("lifecycle")
            .and_then(|l| l.get_mut(hook))
            .and_then(|h| h.get_mut("httpGet"));
        if let Some(get) = get.filter(|get| get.is_object()) {
            set(get, "path", "/");
            set(get, "scheme", "HTTP");
        }
    }
    // A limit without a request is its own request.
    let limits = container["resources"]["limits"]
        .as_object()
        .cloned()
        .unwrap_or_default();
    if !limits.is_empty() {
        let requests = within(within(container, "resources"), "requests");
        for (name, limit) in limits {
            set(requests, &name, limit);
        }
    }
}

/// An image without a tag, or tagged `latest`, is pulled each time.
fn pulls_always(image: &str) -> bool {
    if image.contains('@') {
        return false;
    }
    let name = image.rsplit('/').next().unwrap_or(image);
    name.rsplit_once(':').is_none_or(|(_, tag)| tag == "latest")
}

fn host_path(owner: &mut Value) {
    if let Some(path) = owner.get_mut("hostPath").filter(|path| path.is_object()) {
        set(path, "type", "");
    }
}

fn volume(volume: &mut Value) {
    let sources = volume.as_object().map_or(0, Map::len);
    if sources <= 1 {
        set(volume, "emptyDir", json!({}));
    }
    for source in ["configMap", "secret", "downwardAPI", "projected"] {
        if let Some(source) = volume.get_mut(source).filter(|source| source.is_object()) {
            set(source, "defaultMode", 0o644);
        }
    }
    host_path(volume);
    let field_refs = |source: &mut Value| {
        for item in items(source, "items") {
            if let Some(field) = item.get_mut("fieldRef").filter(|field| field.is_object()) {
                set(field, "apiVersion", "v1");
            }
        }
    };
    if let Some(source) = volume.get_mut("downwardAPI") {
        field_refs(source);
    }
    if let Some(projected) = volume.get_mut("projected") {
        for source in items(projected, "sources") {
            if let Some(token) = source
                .get_mut("serviceAccountToken")
                .filter(|token| token.is_object())
            {
                set(token, "expirationSeconds", 3600);
            }
            if let Some(downward) = source.get_mut("downwardAPI") {
                field_refs(downward);
            }
        }
    }
    for claim in ["iscsi", "rbd"] {
        if let Some(source) = volume.get_mut(claim).filter(|source| source.is_object()) {
            match claim {
                "iscsi" => set(source, "iscsiInterface", "default"),
                _ => {
                    set(source, "pool", "rbd");
                    set(source, "user", "admin");
                    set(source, "keyring", "/etc/ceph/keyring");
                }
            }
        }
    }
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
    if matches!(kind.as_str(), "NodePort" | "LoadBalancer") {
        set(spec, "externalTrafficPolicy", "Cluster");
    }
    if kind == "LoadBalancer" {
        set(spec, "allocateLoadBalancerNodePorts", true);
    }
    if kind != "ExternalName" {
        set(spec, "internalTrafficPolicy", "Cluster");
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
                "dnsPolicy": "ClusterFirst", "restartPolicy": "Always", "schedulerName": "default-scheduler",
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

    #[test]
    fn pull_policy_follows_the_tag() {
        for (image, always) in [
            ("a", true),
            ("a:latest", true),
            ("a:1", false),
            ("host:5000/a", true),
            ("host:5000/a:2", false),
            ("a@sha256:00", false),
        ] {
            assert_eq!(pulls_always(image), always, "{image}");
        }
    }
}
