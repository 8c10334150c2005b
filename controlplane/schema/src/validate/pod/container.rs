//! Validation of containers and init containers.

use std::collections::{HashMap, HashSet};

use serde_json::{Value, json};

use super::super::at::{At, Errors};
use super::super::names;
use super::{env, handler, resources, security};

const PROTOCOLS: &[&str] = &["SCTP", "TCP", "UDP"];
const NOT_FOR_INIT: &str = "may not be set for init containers without restartPolicy=Always";

/// Volumes that containers can mount, by name.
pub(super) type Volumes<'v> = HashMap<&'v str, &'v Value>;

/// All containers of a pod: those that run, those that prepare, those that look on.
pub(super) fn containers<'v>(spec: &At<'_, 'v>, volumes: &Volumes<'v>, errors: &mut Errors) {
    let containers = spec.field("containers");
    if containers.len() == 0 {
        containers.missing("", errors);
    }
    let grace = spec.field("terminationGracePeriodSeconds").number();
    let mut names = HashSet::new();
    for container in containers.items() {
        common(&container, spec, volumes, errors);
        unique_name(&container, &mut names, errors);
        hooks(&container, grace, errors);
        restart_policy(&container, errors);
    }
    host_ports(containers.items(), errors);
    for container in spec.field("initContainers").items() {
        common(&container, spec, volumes, errors);
        restart_policy(&container, errors);
        unique_name(&container, &mut names, errors);
        host_ports(std::iter::once(container), errors);
        if container.field("restartPolicy").text() == "Always" {
            hooks(&container, grace, errors);
            continue;
        }
        for name in [
            "lifecycle",
            "livenessProbe",
            "readinessProbe",
            "startupProbe",
        ] {
            let field = container.field(name);
            if field.is_set() {
                field.forbidden(NOT_FOR_INIT, errors);
            }
        }
    }
    ephemeral(spec, volumes, &mut names, errors);
}

/// Containers that are added to a running pod to look into it.
fn ephemeral<'v>(
    spec: &At<'_, 'v>,
    volumes: &Volumes<'v>,
    names: &mut HashSet<&'v str>,
    errors: &mut Errors,
) {
    const NOT_HERE: &str = "cannot be set for an Ephemeral Container";
    let others = names.clone();
    for container in spec.field("ephemeralContainers").items() {
        common(&container, spec, volumes, errors);
        unique_name(&container, names, errors);
        let target = container.field("targetContainerName");
        if !target.text().is_empty() && !others.contains(target.text()) {
            target.not_found("", errors);
        }
        for name in [
            "ports",
            "resources",
            "resizePolicy",
            "livenessProbe",
            "readinessProbe",
            "startupProbe",
            "lifecycle",
        ] {
            let field = container.field(name);
            let is_empty = matches!(field.value, Value::Object(map) if map.is_empty());
            if field.is_set() && !is_empty {
                field.forbidden(NOT_HERE, errors);
            }
        }
        for mount in container.field("volumeMounts").items() {
            for name in ["subPath", "subPathExpr"] {
                let sub = mount.field(name);
                if !sub.text().is_empty() {
                    sub.forbidden(NOT_HERE, errors);
                }
            }
        }
    }
}

fn unique_name<'v>(container: &At<'_, 'v>, seen: &mut HashSet<&'v str>, errors: &mut Errors) {
    let name = container.field("name");
    if !name.text().is_empty() && !seen.insert(name.text()) {
        name.duplicate(name.value, errors);
    }
}

fn restart_policy(container: &At<'_, '_>, errors: &mut Errors) {
    let policies = ["Always", "Never", "OnFailure"];
    let policy = container.field("restartPolicy");
    policy.one_of_if_set(&policies, errors);
}

fn hooks(container: &At<'_, '_>, grace: i64, errors: &mut Errors) {
    handler::lifecycle(&container.field("lifecycle"), grace, errors);
    for name in ["livenessProbe", "readinessProbe", "startupProbe"] {
        handler::probe(&container.field(name), name, grace, errors);
    }
}

/// What holds for every container.
fn common<'v>(
    container: &At<'_, 'v>,
    spec: &At<'_, 'v>,
    volumes: &Volumes<'v>,
    errors: &mut Errors,
) {
    let name = container.field("name");
    name.required_name(names::dns1123_label, errors);
    container.field("image").required(errors);
    let policy = container.field("terminationMessagePolicy");
    policy.one_of(&["File", "FallbackToLogsOnError"], errors);
    ports(&container.field("ports"), errors);
    env::variables(&container.field("env"), errors);
    env::sources(&container.field("envFrom"), errors);
    mounts(container, volumes, errors);
    devices(container, volumes, errors);
    let policy = container.field("imagePullPolicy");
    policy.one_of(&["Always", "IfNotPresent", "Never"], errors);
    let claims = spec.field("resourceClaims");
    resources::of_container(&container.field("resources"), &claims, errors);
    for policy in container.field("resizePolicy").items() {
        let resource = policy.field("resourceName");
        resource.one_of(&["cpu", "memory"], errors);
        let restart = policy.field("restartPolicy");
        restart.one_of(&["NotRequired", "RestartContainer"], errors);
    }
    security::of_container(&container.field("securityContext"), errors);
}

fn ports(ports: &At<'_, '_>, errors: &mut Errors) {
    let mut seen = HashSet::new();
    for port in ports.items() {
        let name = port.field("name");
        if !name.text().is_empty() {
            let messages = names::port_name(name.text());
            for message in &messages {
                name.invalid(message, errors);
            }
            if messages.is_empty() && !seen.insert(name.text()) {
                name.duplicate(name.value, errors);
            }
        }
        let number = port.field("containerPort");
        if number.number() == 0 {
            number.missing("", errors);
        } else {
            number.port(errors);
        }
        let host = port.field("hostPort");
        if host.number() != 0 {
            host.port(errors);
        }
        port.field("protocol").one_of(PROTOCOLS, errors);
    }
}

/// A port of the host belongs to one container.
fn host_ports<'p, 'v: 'p>(containers: impl Iterator<Item = At<'p, 'v>>, errors: &mut Errors) {
    let mut seen = HashSet::new();
    for container in containers {
        for port in container.field("ports").items() {
            let host = port.field("hostPort");
            if host.number() == 0 {
                continue;
            }
            let (protocol, ip) = (port.field("protocol").text(), port.field("hostIP").text());
            let taken = format!("{protocol}/{ip}/{}", host.number());
            if !seen.insert(taken.clone()) {
                host.duplicate(json!(taken), errors);
            }
        }
    }
}

fn mounts<'v>(container: &At<'_, 'v>, volumes: &Volumes<'v>, errors: &mut Errors) {
    let devices = container.field("volumeDevices");
    let mut paths = HashSet::new();
    for mount in container.field("volumeMounts").items() {
        let (name, path) = (mount.field("name"), mount.field("mountPath"));
        name.required(errors);
        if !volumes.contains_key(name.text()) {
            let shown = if name.is_set() { name.value } else { EMPTY };
            name.showing(shown).not_found("", errors);
        }
        path.required(errors);
        if !paths.insert(path.text()) {
            path.invalid("must be unique", errors);
        }
        if devices
            .items()
            .any(|one| one.field("name").text() == name.text())
        {
            name.invalid("must not already exist in volumeDevices", errors);
        }
        if devices
            .items()
            .any(|one| one.field("devicePath").text() == path.text())
        {
            path.invalid("must not already exist as a path in volumeDevices", errors);
        }
        let (sub, expression) = (mount.field("subPath"), mount.field("subPathExpr"));
        sub.local_path(errors);
        if !expression.text().is_empty() {
            if !sub.text().is_empty() {
                let detail = "subPathExpr and subPath are mutually exclusive";
                expression.invalid(detail, errors);
            }
            expression.local_path(errors);
        }
        let propagation = mount.field("mountPropagation");
        let known = ["Bidirectional", "HostToContainer", "None"];
        propagation.one_of_if_set(&known, errors);
        let security = container.field("securityContext");
        let privileged = security.field("privileged").is_true();
        if propagation.text() == "Bidirectional" && !privileged {
            let detail =
                "Bidirectional mount propagation is available only to privileged containers";
            propagation.forbidden(detail, errors);
        }
    }
}

/// What an absent text is shown as.
static EMPTY: &Value = &Value::String(String::new());

fn devices<'v>(container: &At<'_, 'v>, volumes: &Volumes<'v>, errors: &mut Errors) {
    let (mut names, mut paths) = (HashSet::new(), HashSet::new());
    for device in container.field("volumeDevices").items() {
        let (name, path) = (device.field("name"), device.field("devicePath"));
        name.required(errors);
        path.required(errors);
        if !paths.insert(path.text()) {
            path.invalid("must be unique", errors);
        }
        if path.text().split('/').any(|part| part == "..") {
            path.invalid("can not contain backsteps ('..')", errors);
        }
        if !names.insert(name.text()) {
            name.invalid("must be unique", errors);
        }
        match volumes.get(name.text()) {
            None => name.not_found("", errors),
            Some(volume)
                if volume["persistentVolumeClaim"].is_null() && volume["ephemeral"].is_null() =>
            {
                let detail = "can only use volume source type of PersistentVolumeClaim or Ephemeral for block mode";
                name.invalid(detail, errors);
            }
            Some(_) => {}
        }
    }
}
