//! From a pod's spec to what CRI wants: sandbox and container configurations.

use std::collections::HashMap;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use k8s_openapi::api::core::v1::{Container, Pod, ResourceRequirements};
use xebec_cri_api::v1;
use xebec_schema::quantity::Quantity;

use crate::config::Config;
use crate::env::expand;
use crate::runtime::{CONTAINER_NAME, POD_NAME, POD_NAMESPACE, POD_UID, RESTARTS};
use crate::subpath::Bound;
use crate::volumes::Mounts;

/// Upstream's masks for containers that are not privileged.
const MASKED: &[&str] = &[
    "/proc/asound",
    "/proc/acpi",
    "/proc/interrupts",
    "/proc/kcore",
    "/proc/keys",
    "/proc/latency_stats",
    "/proc/timer_list",
    "/proc/timer_stats",
    "/proc/sched_debug",
    "/proc/scsi",
    "/sys/firmware",
    "/sys/devices/virtual/powercap",
];
const READ_ONLY: &[&str] = &[
    "/proc/bus",
    "/proc/fs",
    "/proc/irq",
    "/proc/sys",
    "/proc/sysrq-trigger",
];

fn labels(pod: &Pod) -> HashMap<String, String> {
    let metadata = &pod.metadata;
    let mut labels: HashMap<String, String> = metadata
        .labels
        .clone()
        .unwrap_or_default()
        .into_iter()
        .collect();
    for (key, value) in [
        (POD_NAME, &metadata.name),
        (POD_NAMESPACE, &metadata.namespace),
        (POD_UID, &metadata.uid),
    ] {
        labels.insert(key.to_owned(), value.clone().unwrap_or_default());
    }
    labels
}

fn namespaces(pod: &Pod) -> v1::NamespaceOption {
    let spec = pod.spec.as_ref();
    let mode = |host: Option<bool>, otherwise: v1::NamespaceMode| {
        if host == Some(true) {
            v1::NamespaceMode::Node as i32
        } else {
            otherwise as i32
        }
    };
    let shared = spec.and_then(|s| s.share_process_namespace) == Some(true);
    v1::NamespaceOption {
        network: mode(spec.and_then(|s| s.host_network), v1::NamespaceMode::Pod),
        pid: mode(
            spec.and_then(|s| s.host_pid),
            if shared {
                v1::NamespaceMode::Pod
            } else {
                v1::NamespaceMode::Container
            },
        ),
        ipc: mode(spec.and_then(|s| s.host_ipc), v1::NamespaceMode::Pod),
        ..Default::default()
    }
}

/// Pods of the three classes lie in cgroups of their own, as upstream's do.
fn cgroup_parent(config: &Config, pod: &Pod) -> String {
    let uid = pod.metadata.uid.as_deref().unwrap_or_default();
    let class = match pod
        .status
        .as_ref()
        .and_then(|status| status.qos_class.as_deref())
    {
        Some("Guaranteed") => String::new(),
        Some("Burstable") => "/burstable".into(),
        _ => "/besteffort".into(),
    };
    format!("{}{class}/pod{uid}", config.cgroup_parent)
}

fn dns(config: &Config, pod: &Pod) -> v1::DnsConfig {
    let spec = pod.spec.as_ref();
    let policy = spec
        .and_then(|s| s.dns_policy.as_deref())
        .unwrap_or("ClusterFirst");
    let host_network = spec.and_then(|s| s.host_network) == Some(true);
    let mut dns = v1::DnsConfig::default();
    let cluster = policy == "ClusterFirstWithHostNet" || policy == "ClusterFirst" && !host_network;
    if cluster && !config.cluster_dns.is_empty() {
        let namespace = pod.metadata.namespace.as_deref().unwrap_or_default();
        let domain = &config.cluster_domain;
        dns.servers = config.cluster_dns.iter().map(ToString::to_string).collect();
        dns.searches = vec![
            format!("{namespace}.svc.{domain}"),
            format!("svc.{domain}"),
            domain.clone(),
        ];
        dns.options = vec!["ndots:5".into()];
    } else if policy != "None" {
        for line in std::fs::read_to_string("/etc/resolv.conf")
            .unwrap_or_default()
            .lines()
        {
            let mut words = line.split_whitespace();
            match words.next() {
                Some("nameserver") => dns.servers.extend(words.next().map(str::to_owned)),
                Some("search") => dns.searches = words.map(str::to_owned).collect(),
                Some("options") => dns.options = words.map(str::to_owned).collect(),
                _ => {}
            }
        }
    }
    if let Some(extra) = spec.and_then(|s| s.dns_config.as_ref()) {
        dns.servers
            .extend(extra.nameservers.iter().flatten().cloned());
        dns.searches
            .extend(extra.searches.iter().flatten().cloned());
        for option in extra.options.iter().flatten() {
            let name = option.name.clone().unwrap_or_default();
            dns.options.push(
                option
                    .value
                    .as_ref()
                    .map_or(name.clone(), |value| format!("{name}:{value}")),
            );
        }
    }
    dns
}

/// The pod's sandbox.
pub(crate) fn sandbox(config: &Config, pod: &Pod, attempt: u32) -> v1::PodSandboxConfig {
    let metadata = &pod.metadata;
    let text = |value: &Option<String>| value.clone().unwrap_or_default();
    let spec = pod.spec.as_ref();
    let ports = spec
        .into_iter()
        .flat_map(|s| &s.containers)
        .flat_map(|c| c.ports.iter().flatten());
    let security = spec.and_then(|s| s.security_context.as_ref());
    let hostname = spec
        .and_then(|s| s.hostname.clone())
        .unwrap_or_else(|| text(&metadata.name));
    let host_network = spec.and_then(|s| s.host_network) == Some(true);
    v1::PodSandboxConfig {
        metadata: Some(v1::PodSandboxMetadata {
            name: text(&metadata.name),
            uid: text(&metadata.uid),
            namespace: text(&metadata.namespace),
            attempt,
        }),
        // A pod on the host's network has the host's name.
        hostname: if host_network {
            String::new()
        } else {
            hostname.chars().take(63).collect()
        },
        log_directory: config.log_dir(metadata).to_string_lossy().into_owned(),
        dns_config: Some(dns(config, pod)),
        port_mappings: ports
            .filter(|port| port.host_port.is_some_and(|number| number > 0))
            .map(|port| v1::PortMapping {
                protocol: match port.protocol.as_deref() {
                    Some("UDP") => v1::Protocol::Udp,
                    Some("SCTP") => v1::Protocol::Sctp,
                    _ => v1::Protocol::Tcp,
                } as i32,
                container_port: port.container_port,
                host_port: port.host_port.unwrap_or(0),
                host_ip: text(&port.host_ip),
            })
            .collect(),
        labels: labels(pod),
        annotations: metadata
            .annotations
            .clone()
            .unwrap_or_default()
            .into_iter()
            .collect(),
        linux: Some(v1::LinuxPodSandboxConfig {
            cgroup_parent: cgroup_parent(config, pod),
            security_context: Some(v1::LinuxSandboxSecurityContext {
                namespace_options: Some(namespaces(pod)),
                run_as_user: security
                    .and_then(|s| s.run_as_user)
                    .map(|value| v1::Int64Value { value }),
                run_as_group: security
                    .and_then(|s| s.run_as_group)
                    .map(|value| v1::Int64Value { value }),
                supplemental_groups: security
                    .and_then(|s| s.supplemental_groups.clone())
                    .unwrap_or_default(),
                ..Default::default()
            }),
            sysctls: security
                .iter()
                .flat_map(|s| s.sysctls.iter().flatten())
                .map(|s| (s.name.clone(), s.value.clone()))
                .collect(),
            ..Default::default()
        }),
        ..Default::default()
    }
}

/// CPU shares, quota and memory limit from requests and limits.
fn resources(requirements: Option<&ResourceRequirements>) -> v1::LinuxContainerResources {
    let amount = |list: Option<
        &std::collections::BTreeMap<
            String,
            k8s_openapi::apimachinery::pkg::api::resource::Quantity,
        >,
    >,
                  name: &str| {
        list.and_then(|list| list.get(name))
            .and_then(|q| Quantity::parse(&q.0).ok())
    };
    let limits = requirements.and_then(|r| r.limits.as_ref());
    let requests = requirements.and_then(|r| r.requests.as_ref());
    let milli = amount(requests, "cpu")
        .or_else(|| amount(limits, "cpu"))
        .map_or(0, |q| q.milli_value());
    let quota = amount(limits, "cpu").map_or(0, |q| q.milli_value());
    v1::LinuxContainerResources {
        cpu_period: 100_000,
        // A thousandth of a core is the least that the kernel takes.
        cpu_quota: if quota > 0 {
            quota.saturating_mul(100).max(1000)
        } else {
            0
        },
        cpu_shares: (milli.saturating_mul(1024) / 1000).max(2),
        memory_limit_in_bytes: amount(limits, "memory").map_or(0, |q| q.value()),
        ..Default::default()
    }
}

/// What a container is made from besides its spec.
pub(crate) struct Given<'a> {
    pub image: &'a v1::Image,
    pub env: Vec<(String, String)>,
    pub mounts: &'a Mounts,
    pub restarts: i32,
    pub pod_dir: &'a Path,
    pub pod_ips: &'a [String],
}

/// One container; what is bound must stay so until the container has been started.
pub(crate) fn container(
    pod: &Pod,
    spec: &Container,
    given: Given<'_>,
) -> Result<(v1::ContainerConfig, Bound)> {
    must_not_be_root(pod, spec, given.image)?;
    let variables = given.env.iter().cloned().collect();
    let words = |words: &Option<Vec<String>>| {
        words
            .iter()
            .flatten()
            .map(|word| expand(word, &variables))
            .collect()
    };
    let mut all_labels = labels(pod);
    all_labels.retain(|key, _| key.starts_with("io.kubernetes."));
    all_labels.insert(CONTAINER_NAME.into(), spec.name.clone());
    let mut mounts = Vec::new();
    let mut bound = Bound::default();
    for (index, mount) in spec.volume_mounts.iter().flatten().enumerate() {
        let host = given
            .mounts
            .get(&mount.name)
            .with_context(|| format!("volume {:?} is not mounted", mount.name))?;
        let sub = mount
            .sub_path_expr
            .as_ref()
            .map(|path| expand(path, &variables))
            .or_else(|| mount.sub_path.clone())
            .unwrap_or_default();
        let host = if sub.is_empty() {
            host.clone()
        } else {
            let target = given
                .pod_dir
                .join("volume-subpaths")
                .join(&mount.name)
                .join(&spec.name)
                .join(index.to_string());
            bound.bind(host, &sub, &target).with_context(|| {
                format!(
                    "failed to prepare subPath for volumeMount {:?} of container {:?}",
                    mount.name, spec.name
                )
            })?;
            target
        };
        mounts.push(v1::Mount {
            container_path: mount.mount_path.clone(),
            host_path: host.to_string_lossy().into_owned(),
            readonly: mount.read_only.unwrap_or(false),
            propagation: match mount.mount_propagation.as_deref() {
                Some("Bidirectional") => v1::MountPropagation::PropagationBidirectional,
                Some("HostToContainer") => v1::MountPropagation::PropagationHostToContainer,
                _ => v1::MountPropagation::PropagationPrivate,
            } as i32,
            ..Default::default()
        });
    }
    let host_network = pod.spec.as_ref().and_then(|s| s.host_network) == Some(true);
    if !host_network
        && !mounts
            .iter()
            .any(|mount| mount.container_path == "/etc/hosts")
    {
        mounts.push(v1::Mount {
            container_path: "/etc/hosts".into(),
            host_path: hosts_file(pod, given.pod_dir, given.pod_ips)?,
            ..Default::default()
        });
    }
    let termination = spec
        .termination_message_path
        .as_deref()
        .filter(|path| !path.is_empty());
    if let Some(path) = termination {
        let file = termination_file(given.pod_dir, &spec.name, given.restarts);
        if let Some(dir) = file.parent() {
            std::fs::create_dir_all(dir)
                .with_context(|| format!("could not make {}", dir.display()))?;
        }
        // Whoever the container runs as may write it; its folder is root's alone.
        std::fs::write(&file, b"")
            .and_then(|()| std::fs::set_permissions(&file, std::fs::Permissions::from_mode(0o666)))
            .with_context(|| format!("could not make {}", file.display()))?;
        mounts.push(v1::Mount {
            container_path: path.to_owned(),
            host_path: file.to_string_lossy().into_owned(),
            ..Default::default()
        });
    }
    let config = v1::ContainerConfig {
        metadata: Some(v1::ContainerMetadata {
            name: spec.name.clone(),
            attempt: given.restarts as u32,
        }),
        image: Some(v1::ImageSpec {
            // By its id, so that it is the very one whose user was looked at.
            image: given.image.id.clone(),
            user_specified_image: spec.image.clone().unwrap_or_default(),
            ..Default::default()
        }),
        command: words(&spec.command),
        args: words(&spec.args),
        working_dir: spec.working_dir.clone().unwrap_or_default(),
        envs: given
            .env
            .into_iter()
            .map(|(key, value)| v1::KeyValue {
                key,
                value: value.into(),
            })
            .collect(),
        mounts,
        labels: all_labels,
        annotations: [(RESTARTS.to_owned(), given.restarts.to_string())].into(),
        log_path: format!("{}/{}.log", spec.name, given.restarts),
        stdin: spec.stdin.unwrap_or(false),
        stdin_once: spec.stdin_once.unwrap_or(false),
        tty: spec.tty.unwrap_or(false),
        linux: Some(v1::LinuxContainerConfig {
            resources: Some(resources(spec.resources.as_ref())),
            security_context: Some(security(pod, spec)),
        }),
        ..Default::default()
    };
    Ok((config, bound))
}

/// `runAsNonRoot`: neither the spec nor, where it says nothing, the image may choose uid 0.
fn must_not_be_root(pod: &Pod, spec: &Container, image: &v1::Image) -> Result<()> {
    let own = spec.security_context.as_ref();
    let of_pod = pod.spec.as_ref().and_then(|s| s.security_context.as_ref());
    let wanted = own
        .and_then(|s| s.run_as_non_root)
        .or(of_pod.and_then(|s| s.run_as_non_root));
    if wanted != Some(true) {
        return Ok(());
    }
    let text = |value: &Option<String>| value.clone().unwrap_or_default();
    let metadata = &pod.metadata;
    let who = format!(
        "(pod: \"{}_{}({})\", container: {})",
        text(&metadata.name),
        text(&metadata.namespace),
        text(&metadata.uid),
        spec.name
    );
    let user = own
        .and_then(|s| s.run_as_user)
        .or(of_pod.and_then(|s| s.run_as_user));
    if let Some(user) = user {
        anyhow::ensure!(
            user != 0,
            "container's runAsUser breaks non-root policy {who}"
        );
        return Ok(());
    }
    // An image that names no user runs as root.
    match (&image.uid, image.username.as_str()) {
        (Some(uid), _) if uid.value != 0 => Ok(()),
        (None, name) if !name.is_empty() => anyhow::bail!(
            "container has runAsNonRoot and image has non-numeric user ({name}), \
             cannot verify user is non-root {who}"
        ),
        _ => anyhow::bail!("container has runAsNonRoot and image will run as root {who}"),
    }
}

fn security(pod: &Pod, spec: &Container) -> v1::LinuxContainerSecurityContext {
    let own = spec.security_context.as_ref();
    let of_pod = pod.spec.as_ref().and_then(|s| s.security_context.as_ref());
    let privileged = own.and_then(|s| s.privileged).unwrap_or(false);
    let capabilities = own.and_then(|s| s.capabilities.as_ref());
    let id = |value: Option<i64>| value.map(|value| v1::Int64Value { value });
    let paths = |paths: &[&str]| {
        if privileged {
            Vec::new()
        } else {
            paths.iter().map(|path| (*path).to_owned()).collect()
        }
    };
    let mut groups = of_pod
        .and_then(|s| s.supplemental_groups.clone())
        .unwrap_or_default();
    groups.extend(of_pod.and_then(|s| s.fs_group));
    v1::LinuxContainerSecurityContext {
        capabilities: Some(v1::Capability {
            add_capabilities: capabilities.and_then(|c| c.add.clone()).unwrap_or_default(),
            drop_capabilities: capabilities
                .and_then(|c| c.drop.clone())
                .unwrap_or_default(),
            ..Default::default()
        }),
        privileged,
        namespace_options: Some(namespaces(pod)),
        run_as_user: id(own
            .and_then(|s| s.run_as_user)
            .or(of_pod.and_then(|s| s.run_as_user))),
        run_as_group: id(own
            .and_then(|s| s.run_as_group)
            .or(of_pod.and_then(|s| s.run_as_group))),
        readonly_rootfs: own
            .and_then(|s| s.read_only_root_filesystem)
            .unwrap_or(false),
        supplemental_groups: groups,
        no_new_privs: own.and_then(|s| s.allow_privilege_escalation) == Some(false),
        masked_paths: paths(MASKED),
        readonly_paths: paths(READ_ONLY),
        ..Default::default()
    }
}

/// Where a container leaves what it has to say at its end.
pub(crate) fn termination_file(pod_dir: &Path, container: &str, restarts: i32) -> PathBuf {
    pod_dir
        .join("containers")
        .join(container)
        .join(format!("termination-{restarts}"))
}

/// The pod's own `/etc/hosts`.
fn hosts_file(pod: &Pod, pod_dir: &Path, pod_ips: &[String]) -> Result<String> {
    let name = pod.metadata.name.as_deref().unwrap_or_default();
    let mut text = String::from(
        "# Kubernetes-managed hosts file.\n127.0.0.1\tlocalhost\n::1\tlocalhost ip6-localhost ip6-loopback\n",
    );
    for pod_ip in pod_ips {
        text.push_str(&format!("{pod_ip}\t{name}\n"));
    }
    for alias in pod
        .spec
        .iter()
        .flat_map(|s| s.host_aliases.iter().flatten())
    {
        text.push_str(&format!(
            "{}\t{}\n",
            alias.ip,
            alias.hostnames.clone().unwrap_or_default().join("\t")
        ));
    }
    std::fs::create_dir_all(pod_dir)
        .with_context(|| format!("could not make {}", pod_dir.display()))?;
    let path = pod_dir.join("etc-hosts");
    std::fs::write(&path, text).with_context(|| format!("could not write {}", path.display()))?;
    Ok(path.to_string_lossy().into_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn pod(of_pod: serde_json::Value, own: serde_json::Value) -> Pod {
        serde_json::from_value(serde_json::json!({
            "metadata": {"name": "p", "namespace": "n", "uid": "u"},
            "spec": {"securityContext": of_pod, "containers": [{"name": "c", "securityContext": own}]},
        }))
        .unwrap()
    }

    fn verdict(of_pod: serde_json::Value, own: serde_json::Value, image: v1::Image) -> String {
        let pod = pod(of_pod, own);
        let spec = &pod.spec.as_ref().unwrap().containers[0];
        match must_not_be_root(&pod, spec, &image) {
            Ok(()) => "ok".into(),
            Err(error) => error.to_string(),
        }
    }

    #[test]
    fn root_is_refused_where_the_pod_says_so() {
        use serde_json::json;
        let nobody = || v1::Image {
            uid: Some(v1::Int64Value { value: 65534 }),
            ..Default::default()
        };
        let zero = || v1::Image {
            uid: Some(v1::Int64Value { value: 0 }),
            ..Default::default()
        };
        let named = || v1::Image {
            username: "app".into(),
            ..Default::default()
        };
        let strict = || json!({"runAsNonRoot": true});
        assert_eq!(verdict(json!({}), json!({}), zero()), "ok");
        assert_eq!(verdict(strict(), json!({}), nobody()), "ok");
        assert_eq!(
            verdict(strict(), json!({"runAsNonRoot": false}), zero()),
            "ok"
        );
        assert_eq!(verdict(strict(), json!({"runAsUser": 7}), named()), "ok");
        let root =
            "container has runAsNonRoot and image will run as root (pod: \"p_n(u)\", container: c)";
        assert_eq!(verdict(strict(), json!({}), zero()), root);
        assert_eq!(verdict(json!({}), strict(), v1::Image::default()), root);
        assert_eq!(
            verdict(json!({"runAsUser": 0}), strict(), nobody()),
            "container's runAsUser breaks non-root policy (pod: \"p_n(u)\", container: c)"
        );
        assert_eq!(
            verdict(strict(), json!({}), named()),
            "container has runAsNonRoot and image has non-numeric user (app), cannot verify user is \
             non-root (pod: \"p_n(u)\", container: c)"
        );
    }
}
