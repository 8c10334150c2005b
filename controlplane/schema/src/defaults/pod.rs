//! Defaults of pods: of the specification that pods and templates share, and of pods alone.

use serde_json::{Map, Value, json};

use super::{items, set, within};

/// The defaults of a pod, which has some that a template has not.
pub(super) fn pod(spec: &mut Value) {
    pod_spec(spec);
    set(spec, "enableServiceLinks", true);
    let host_network = spec["hostNetwork"] == true;
    for list in ["initContainers", "containers"] {
        for container in items(spec, list) {
            if host_network {
                host_ports(container);
            }
            requests_from_limits(container);
        }
    }
}

/// In the host's network a container's port is the host's.
fn host_ports(container: &mut Value) {
    for port in items(container, "ports") {
        if port["hostPort"].as_i64().unwrap_or(0) == 0 {
            port["hostPort"] = port["containerPort"].clone();
        }
    }
}

/// A limit without a request is its own request.
fn requests_from_limits(container: &mut Value) {
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

/// The defaults of `PodSpec`, for pods and templates alike.
pub fn pod_spec(spec: &mut Value) {
    set(spec, "dnsPolicy", "ClusterFirst");
    set(spec, "restartPolicy", "Always");
    set(spec, "securityContext", json!({}));
    set(spec, "terminationGracePeriodSeconds", 30);
    set(spec, "schedulerName", "default-scheduler");
    for list in ["initContainers", "containers", "ephemeralContainers"] {
        items(spec, list).for_each(container);
    }
    items(spec, "volumes").for_each(volume);
    // The old name of the field goes along with the new one.
    if let Some(name) = spec["serviceAccountName"].as_str().map(str::to_owned) {
        set(spec, "serviceAccount", name);
    } else if let Some(name) = spec["serviceAccount"].as_str().map(str::to_owned) {
        set(spec, "serviceAccountName", name);
    }
}

fn container(container: &mut Value) {
    let image = container["image"].as_str().unwrap_or_default().to_owned();
    set(container, "imagePullPolicy", pull_policy(&image));
    set(container, "terminationMessagePath", "/dev/termination-log");
    set(container, "terminationMessagePolicy", "File");
    set(container, "resources", json!({}));
    for port in items(container, "ports") {
        set(port, "protocol", "TCP");
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
}

fn pull_policy(image: &str) -> &'static str {
    if pulls_always(image) {
        "Always"
    } else {
        "IfNotPresent"
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

pub(super) fn host_path(owner: &mut Value) {
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
    if let Some(image) = volume.get_mut("image").filter(|image| image.is_object()) {
        let reference = image["reference"].as_str().unwrap_or_default().to_owned();
        set(image, "pullPolicy", pull_policy(&reference));
    }
    if let Some(spec) = volume
        .get_mut("ephemeral")
        .and_then(|source| source.get_mut("volumeClaimTemplate"))
        .and_then(|template| template.get_mut("spec"))
        .filter(|spec| spec.is_object())
    {
        set(spec, "volumeMode", "Filesystem");
    }
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

#[cfg(test)]
mod tests {
    use super::*;

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
