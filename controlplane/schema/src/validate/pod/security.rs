//! Validation of security contexts: of containers, and of the pod as a whole.

use std::collections::HashSet;

use serde_json::Value;

use super::super::at::{At, Errors};

const MAX_ID: i64 = i32::MAX as i64;
/// Go's names of a container's security context, in its order; errors show it so.
const SHOWN: &[&str] = &[
    "Capabilities",
    "Privileged",
    "SELinuxOptions",
    "WindowsOptions",
    "RunAsUser",
    "RunAsGroup",
    "RunAsNonRoot",
    "ReadOnlyRootFilesystem",
    "AllowPrivilegeEscalation",
    "ProcMount",
    "SeccompProfile",
    "AppArmorProfile",
];
const SYSCTL: &str = "must have at most 253 characters and match regex ^([a-z0-9]([-_a-z0-9]*[a-z0-9])?[\\./])*[a-z0-9]([-_a-z0-9]*[a-z0-9])?$";

/// `securityContext` of a container.
pub(super) fn of_container(context: &At<'_, '_>, errors: &mut Errors) {
    for name in ["runAsUser", "runAsGroup"] {
        context.field(name).between(0, MAX_ID, errors);
    }
    let mount = context.field("procMount");
    mount.one_of_if_set(&["Default", "Unmasked"], errors);
    profiles(context, errors);
    if *context.field("allowPrivilegeEscalation").value != false {
        return;
    }
    let start = "cannot set `allowPrivilegeEscalation` to false and";
    if context.field("privileged").is_true() {
        let detail = format!("{start} `privileged` to true");
        context.invalid_as(shown(context.value), &detail, errors);
    }
    let capabilities = context.field("capabilities");
    let added = capabilities.field("add");
    if added.items().any(|one| one.text() == "CAP_SYS_ADMIN") {
        let detail = format!("{start} `capabilities.Add` CAP_SYS_ADMIN");
        context.invalid_as(shown(context.value), &detail, errors);
    }
}

/// A security context as Go prints it.
fn shown(context: &Value) -> String {
    let fields: Vec<String> = SHOWN
        .iter()
        .map(|name| {
            let json = match *name {
                "SELinuxOptions" => "seLinuxOptions".to_owned(),
                other => other[..1].to_lowercase() + &other[1..],
            };
            let value = &context[&json];
            match *name {
                "Capabilities" if value.is_object() => format!(
                    "\"Capabilities\":{{\"Add\":{},\"Drop\":{}}}",
                    value["add"], value["drop"]
                ),
                _ => format!("{name:?}:{value}"),
            }
        })
        .collect();
    format!("{{{}}}", fields.join(","))
}

/// `securityContext` of a pod.
pub(super) fn of_pod(spec: &At<'_, '_>, errors: &mut Errors) {
    let context = spec.field("securityContext");
    for name in ["fsGroup", "runAsUser", "runAsGroup"] {
        context.field(name).between(0, MAX_ID, errors);
    }
    for group in context.field("supplementalGroups").items() {
        group.between(0, MAX_ID, errors);
    }
    if spec.field("shareProcessNamespace").is_true() && spec.field("hostPID").is_true() {
        let share = context.field("shareProcessNamespace");
        let detail = "ShareProcessNamespace and HostPID cannot both be enabled";
        share.invalid_as(true, detail, errors);
    }
    sysctls(&context.field("sysctls"), errors);
    let policy = context.field("fsGroupChangePolicy");
    policy.one_of_if_set(&["Always", "OnRootMismatch"], errors);
    profiles(&context, errors);
    let policy = context.field("supplementalGroupsPolicy");
    policy.one_of_if_set(&["Merge", "Strict"], errors);
}

fn sysctls(sysctls: &At<'_, '_>, errors: &mut Errors) {
    let mut seen = HashSet::new();
    for sysctl in sysctls.items() {
        let name = sysctl.field("name");
        if !name.required(errors) {
            continue;
        }
        if !is_sysctl(name.text()) {
            name.invalid(SYSCTL, errors);
        } else if !seen.insert(name.text()) {
            name.duplicate(name.value, errors);
        }
    }
}

fn is_sysctl(name: &str) -> bool {
    let end = |c: Option<char>| c.is_some_and(|c| c.is_ascii_lowercase() || c.is_ascii_digit());
    let part = |part: &str| {
        let inner = |c: char| c.is_ascii_lowercase() || c.is_ascii_digit() || "-_".contains(c);
        end(part.chars().next()) && end(part.chars().last()) && part.chars().all(inner)
    };
    name.len() <= 253 && name.split(['.', '/']).all(part)
}

/// Profiles of seccomp and of AppArmor, which are written the same way.
fn profiles(context: &At<'_, '_>, errors: &mut Errors) {
    for (field, what) in [
        ("seccompProfile", "seccomp"),
        ("appArmorProfile", "AppArmor"),
    ] {
        let profile = context.field(field);
        if !profile.is_set() {
            continue;
        }
        let (kind, local) = (profile.field("type"), profile.field("localhostProfile"));
        let known = ["Localhost", "RuntimeDefault", "Unconfined"];
        if kind.text().is_empty() {
            kind.missing(&format!("type is required when {field} is set"), errors);
        } else {
            kind.one_of(&known, errors);
        }
        if kind.text() == "Localhost" {
            if local.is_set() {
                local.local_path(errors);
            } else {
                local.missing(
                    &format!("must be set when {what} type is Localhost"),
                    errors,
                );
            }
        } else if local.is_set() {
            let detail = format!("can only be set when {what} type is Localhost");
            local.invalid(&detail, errors);
        }
    }
}

/// A pod with users of its own cannot have the host's namespaces.
pub(super) fn host_users(spec: &At<'_, '_>, errors: &mut Errors) {
    if *spec.field("hostUsers").value != false {
        return;
    }
    for name in ["hostNetwork", "hostPID", "hostIPC"] {
        let host = spec.field(name);
        if host.is_true() {
            host.forbidden("when `hostUsers` is false", errors);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sysctl_names() {
        for (name, fine) in [
            ("net.ipv4.ip_forward", true),
            ("net/ipv4/conf.eth0", true),
            ("BAD!", false),
            ("a..b", false),
            ("", false),
        ] {
            assert_eq!(is_sysctl(name), fine, "{name}");
        }
    }
}
