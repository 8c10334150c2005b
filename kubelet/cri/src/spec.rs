//! Turns a CRI container config into an OCI runtime specification.

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};

use anyhow::{Context, bail};
use serde_json::{Value, json};
use xebec_cri_api::v1;

use crate::images::store::ExecutionConfig;
use crate::users::Identity;

/// Capabilities of a container that asks for nothing, as with other runtimes.
const DEFAULT_CAPABILITIES: [&str; 14] = [
    "CAP_CHOWN",
    "CAP_DAC_OVERRIDE",
    "CAP_FSETID",
    "CAP_FOWNER",
    "CAP_MKNOD",
    "CAP_NET_RAW",
    "CAP_SETGID",
    "CAP_SETUID",
    "CAP_SETFCAP",
    "CAP_SETPCAP",
    "CAP_NET_BIND_SERVICE",
    "CAP_SYS_CHROOT",
    "CAP_KILL",
    "CAP_AUDIT_WRITE",
];

/// All capabilities, by number.
const CAPABILITIES: [&str; 41] = [
    "CAP_CHOWN",
    "CAP_DAC_OVERRIDE",
    "CAP_DAC_READ_SEARCH",
    "CAP_FOWNER",
    "CAP_FSETID",
    "CAP_KILL",
    "CAP_SETGID",
    "CAP_SETUID",
    "CAP_SETPCAP",
    "CAP_LINUX_IMMUTABLE",
    "CAP_NET_BIND_SERVICE",
    "CAP_NET_BROADCAST",
    "CAP_NET_ADMIN",
    "CAP_NET_RAW",
    "CAP_IPC_LOCK",
    "CAP_IPC_OWNER",
    "CAP_SYS_MODULE",
    "CAP_SYS_RAWIO",
    "CAP_SYS_CHROOT",
    "CAP_SYS_PTRACE",
    "CAP_SYS_PACCT",
    "CAP_SYS_ADMIN",
    "CAP_SYS_BOOT",
    "CAP_SYS_NICE",
    "CAP_SYS_RESOURCE",
    "CAP_SYS_TIME",
    "CAP_SYS_TTY_CONFIG",
    "CAP_MKNOD",
    "CAP_LEASE",
    "CAP_AUDIT_WRITE",
    "CAP_AUDIT_CONTROL",
    "CAP_SETFCAP",
    "CAP_MAC_OVERRIDE",
    "CAP_MAC_ADMIN",
    "CAP_SYSLOG",
    "CAP_WAKE_ALARM",
    "CAP_BLOCK_SUSPEND",
    "CAP_AUDIT_READ",
    "CAP_PERFMON",
    "CAP_BPF",
    "CAP_CHECKPOINT_RESTORE",
];

/// What a container's specification is made of.
pub struct Input<'a> {
    /// The container as asked for.
    pub config: &'a v1::ContainerConfig,
    /// The pod as asked for.
    pub pod: &'a v1::PodSandboxConfig,
    /// What the image says.
    pub image: &'a ExecutionConfig,
    /// Who it runs as.
    pub identity: &'a Identity,
    /// Its mounted root file system.
    pub rootfs: &'a Path,
    /// Path of its cgroup from the hierarchies' roots.
    pub cgroup: &'a str,
    /// Paths of the namespaces it joins.
    pub namespaces: Namespaces,
    /// Files of the sandbox: `resolv.conf`, `hostname`, `shm`.
    pub sandbox_dir: &'a Path,
    /// The pod's `/dev/shm`.
    pub shm: &'a Path,
}

/// Namespaces to join; `None` means the host's, but for `pid` see there.
#[derive(Clone, Debug, Default)]
pub struct Namespaces {
    /// Network namespace.
    pub network: Option<PathBuf>,
    /// IPC namespace.
    pub ipc: Option<PathBuf>,
    /// UTS namespace.
    pub uts: Option<PathBuf>,
    /// PID namespace.
    pub pid: PidNamespace,
}

/// Which PID namespace a container gets.
#[derive(Clone, Debug, Default)]
pub enum PidNamespace {
    /// A new one.
    #[default]
    Own,
    /// The host's.
    Host,
    /// This one.
    Join(PathBuf),
}

/// Builds `config.json`.
pub fn build(input: &Input<'_>) -> anyhow::Result<Value> {
    let linux = input.config.linux.clone().unwrap_or_default();
    let security = linux.security_context.clone().unwrap_or_default();
    let resources = linux.resources.clone().unwrap_or_default();
    let privileged = security.privileged;

    let capabilities = capabilities(&security)?;
    let mut process = json!({
        "terminal": input.config.tty,
        "user": {
            "uid": input.identity.uid,
            "gid": input.identity.gid,
            "additionalGids": input.identity.groups,
        },
        "args": arguments(input.config, input.image)?,
        "env": environment(input),
        "cwd": working_dir(input.config, input.image)?,
        "noNewPrivileges": security.no_new_privs && !privileged,
    });
    process["capabilities"] = json!({
        "bounding": capabilities,
        "effective": capabilities,
        "permitted": capabilities,
        "inheritable": [],
        "ambient": ambient(&security, &capabilities)?,
    });

    let mut namespaces = vec![json!({"type": "mount"})];
    let mut join = |kind: &str, path: &Option<PathBuf>| {
        if let Some(path) = path {
            namespaces.push(json!({"type": kind, "path": path}));
        }
    };
    join("network", &input.namespaces.network);
    join("ipc", &input.namespaces.ipc);
    join("uts", &input.namespaces.uts);
    match &input.namespaces.pid {
        PidNamespace::Own => namespaces.push(json!({"type": "pid"})),
        PidNamespace::Host => {}
        PidNamespace::Join(path) => namespaces.push(json!({"type": "pid", "path": path})),
    }

    let mut devices = Vec::new();
    let mut rules = if privileged {
        vec![json!({"allow": true, "access": "rwm"})]
    } else {
        vec![json!({"allow": false, "access": "rwm"})]
    };
    if privileged {
        devices.extend(host_devices()?);
    }
    for device in &input.config.devices {
        let (node, rule) = one_device(device)?;
        devices.push(node);
        rules.push(rule);
    }

    let sysctls = input
        .pod
        .linux
        .as_ref()
        .map(|l| l.sysctls.clone())
        .unwrap_or_default();
    let mut spec = json!({
        "ociVersion": "1.0.2",
        "process": process,
        "root": {"path": input.rootfs, "readonly": security.readonly_rootfs},
        "mounts": mounts(input, privileged)?,
        "linux": {
            "namespaces": namespaces,
            "cgroupsPath": input.cgroup,
            "resources": linux_resources(&resources, rules),
            "devices": devices,
            "sysctl": sysctls,
            "maskedPaths": security.masked_paths,
            "readonlyPaths": security.readonly_paths,
            "rootfsPropagation": root_propagation(input.config),
        },
    });
    if privileged {
        spec["linux"]["maskedPaths"] = json!([]);
        spec["linux"]["readonlyPaths"] = json!([]);
    }
    Ok(spec)
}

fn arguments(config: &v1::ContainerConfig, image: &ExecutionConfig) -> anyhow::Result<Vec<String>> {
    // Command replaces the entry point and, with it, the image's arguments.
    let mut args = Vec::new();
    if config.command.is_empty() {
        args.extend(image.entrypoint.iter().cloned());
        if config.args.is_empty() {
            args.extend(image.cmd.iter().cloned());
        }
    } else {
        args.extend(config.command.iter().cloned());
    }
    args.extend(config.args.iter().cloned());
    if args.is_empty() {
        bail!("no command specified: neither the container nor its image names one");
    }
    Ok(args)
}

fn working_dir(config: &v1::ContainerConfig, image: &ExecutionConfig) -> anyhow::Result<String> {
    let dir = [&config.working_dir, &image.working_dir]
        .into_iter()
        .find(|d| !d.is_empty());
    match dir {
        Some(dir) if !dir.starts_with('/') => bail!("working directory {dir:?} is not absolute"),
        Some(dir) => Ok(dir.clone()),
        None => Ok("/".to_owned()),
    }
}

fn environment(input: &Input<'_>) -> Vec<String> {
    let mut env: Vec<String> = Vec::new();
    let mut set = |name: &str, value: &str| {
        let line = format!("{name}={value}");
        match env
            .iter_mut()
            .find(|l| l.split_once('=').is_some_and(|(n, _)| n == name))
        {
            Some(old) => *old = line,
            None => env.push(line),
        }
    };
    set(
        "PATH",
        "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin",
    );
    if input.config.tty {
        set("TERM", "xterm");
    }
    set("HOME", input.identity.home.as_deref().unwrap_or("/"));
    if !input.pod.hostname.is_empty() {
        set("HOSTNAME", &input.pod.hostname);
    }
    for line in &input.image.env {
        let (name, value) = line.split_once('=').unwrap_or((line, ""));
        set(name, value);
    }
    for pair in &input.config.envs {
        set(&pair.key, &String::from_utf8_lossy(&pair.value));
    }
    env
}

fn capabilities(security: &v1::LinuxContainerSecurityContext) -> anyhow::Result<Vec<String>> {
    let permitted = permitted_capabilities();
    let mut set: BTreeSet<String> = if security.privileged {
        permitted.clone()
    } else {
        DEFAULT_CAPABILITIES
            .iter()
            .map(|c| (*c).to_owned())
            .collect()
    };
    let asked = security.capabilities.clone().unwrap_or_default();
    let names = |list: &[String]| -> anyhow::Result<(bool, Vec<String>)> {
        let mut all = false;
        let mut out = Vec::new();
        for name in list {
            if name.eq_ignore_ascii_case("ALL") {
                all = true;
            } else {
                out.push(capability(name)?);
            }
        }
        Ok((all, out))
    };
    let (add_all, add) = names(&asked.add_capabilities)?;
    let (drop_all, drop) = names(&asked.drop_capabilities)?;
    if add_all {
        set = permitted.clone();
    }
    if drop_all {
        set.clear();
    }
    if !add_all {
        set.extend(add);
    }
    for name in drop {
        set.remove(&name);
    }
    let missing: Vec<&String> = set.difference(&permitted).collect();
    if !missing.is_empty() {
        tracing::warn!("this machine grants no {missing:?}; the container goes without");
    }
    Ok(set.intersection(&permitted).cloned().collect())
}

fn ambient(
    security: &v1::LinuxContainerSecurityContext,
    have: &[String],
) -> anyhow::Result<Vec<String>> {
    let asked = security.capabilities.clone().unwrap_or_default();
    let mut out = Vec::new();
    for name in &asked.add_ambient_capabilities {
        let name = capability(name)?;
        if have.contains(&name) {
            out.push(name);
        }
    }
    Ok(out)
}

fn capability(name: &str) -> anyhow::Result<String> {
    let upper = name.to_ascii_uppercase();
    let full = if upper.starts_with("CAP_") {
        upper
    } else {
        format!("CAP_{upper}")
    };
    if !CAPABILITIES.contains(&full.as_str()) {
        bail!("unknown capability {name:?}");
    }
    Ok(full)
}

/// What this process may pass on: containers can't get more.
fn permitted_capabilities() -> BTreeSet<String> {
    let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
    let bits = |field: &str| {
        status
            .lines()
            .find_map(|l| l.strip_prefix(field))
            .and_then(|v| u64::from_str_radix(v.trim(), 16).ok())
            .unwrap_or(0)
    };
    let have = bits("CapBnd:") & bits("CapPrm:");
    CAPABILITIES
        .iter()
        .enumerate()
        .filter(|(bit, _)| have & (1 << bit) != 0)
        .map(|(_, name)| (*name).to_owned())
        .collect()
}

fn mounts(input: &Input<'_>, privileged: bool) -> anyhow::Result<Vec<Value>> {
    let mode = if privileged { "rw" } else { "ro" };
    let mut list = vec![
        json!({"destination": "/proc", "type": "proc", "source": "proc", "options": ["nosuid", "noexec", "nodev"]}),
        json!({"destination": "/dev", "type": "tmpfs", "source": "tmpfs", "options": ["nosuid", "strictatime", "mode=755", "size=65536k"]}),
        json!({"destination": "/dev/pts", "type": "devpts", "source": "devpts", "options": ["nosuid", "noexec", "newinstance", "ptmxmode=0666", "mode=0620", "gid=5"]}),
        json!({"destination": "/dev/mqueue", "type": "mqueue", "source": "mqueue", "options": ["nosuid", "noexec", "nodev"]}),
    ];
    // Without a network namespace of its own, a container may not mount sysfs anew.
    if input.namespaces.network.is_some() {
        list.push(json!({"destination": "/sys", "type": "sysfs", "source": "sysfs", "options": ["nosuid", "noexec", "nodev", mode]}));
    } else {
        list.push(json!({"destination": "/sys", "type": "none", "source": "/sys", "options": ["rbind", "nosuid", "noexec", "nodev", mode]}));
    }
    list.push(json!({"destination": "/sys/fs/cgroup", "type": "cgroup", "source": "cgroup", "options": ["nosuid", "noexec", "nodev", "relatime", mode]}));
    list.push(json!({"destination": "/dev/shm", "type": "bind", "source": input.shm, "options": ["rbind", "rprivate", "nosuid", "noexec", "nodev", "rw"]}));

    let asked = |path: &str| {
        input
            .config
            .mounts
            .iter()
            .any(|m| m.container_path.trim_end_matches('/') == path)
    };
    let root_mode = match &input.config.linux {
        Some(l)
            if l.security_context
                .as_ref()
                .is_some_and(|s| s.readonly_rootfs) =>
        {
            "ro"
        }
        _ => "rw",
    };
    for (name, path) in [
        ("resolv.conf", "/etc/resolv.conf"),
        ("hostname", "/etc/hostname"),
        ("hosts", "/etc/hosts"),
    ] {
        if !asked(path) {
            list.push(json!({"destination": path, "type": "bind", "source": input.sandbox_dir.join(name), "options": ["rbind", "rprivate", root_mode]}));
        }
    }
    list.retain(|m| {
        m["destination"]
            .as_str()
            .is_none_or(|d| d == "/proc" || !asked(d))
    });
    let mut own: Vec<&v1::Mount> = input.config.mounts.iter().collect();
    // A mount point below another comes after it.
    own.sort_by_key(|m| Path::new(&m.container_path).components().count());
    for mount in own {
        list.push(one_mount(mount)?);
    }
    Ok(list)
}

fn one_mount(mount: &v1::Mount) -> anyhow::Result<Value> {
    if !mount.container_path.starts_with('/') {
        bail!("mount path {:?} is not absolute", mount.container_path);
    }
    if mount.image.is_some() && mount.host_path.is_empty() {
        bail!(
            "image volumes are not supported yet (mount {:?})",
            mount.container_path
        );
    }
    // The source of a bind mount may be a link, as the kubelet's volumes are.
    let source = std::fs::canonicalize(&mount.host_path).or_else(|err| {
        if err.kind() != std::io::ErrorKind::NotFound {
            return Err(err);
        }
        std::fs::create_dir_all(&mount.host_path)?;
        std::fs::canonicalize(&mount.host_path)
    });
    let source =
        source.with_context(|| format!("failed to mount {:?}: its source", mount.host_path))?;
    let mut options = vec!["rbind"];
    options.push(match mount.propagation() {
        v1::MountPropagation::PropagationPrivate => "rprivate",
        v1::MountPropagation::PropagationHostToContainer => "rslave",
        v1::MountPropagation::PropagationBidirectional => "rshared",
    });
    options.push(match (mount.readonly, mount.recursive_read_only) {
        (_, true) => "rro",
        (true, false) => "ro",
        (false, false) => "rw",
    });
    Ok(
        json!({"destination": mount.container_path, "type": "bind", "source": source, "options": options}),
    )
}

/// Mounts that are to propagate need a root that lets them.
fn root_propagation(config: &v1::ContainerConfig) -> &'static str {
    let has = |kind: v1::MountPropagation| config.mounts.iter().any(|m| m.propagation() == kind);
    if has(v1::MountPropagation::PropagationBidirectional) {
        "shared"
    } else if has(v1::MountPropagation::PropagationHostToContainer) {
        "slave"
    } else {
        "private"
    }
}

fn linux_resources(asked: &v1::LinuxContainerResources, rules: Vec<Value>) -> Value {
    let mut out = json!({"devices": rules});
    let mut cpu = json!({});
    if asked.cpu_shares > 0 {
        cpu["shares"] = json!(asked.cpu_shares);
    }
    if asked.cpu_quota != 0 {
        cpu["quota"] = json!(asked.cpu_quota);
    }
    if asked.cpu_period > 0 {
        cpu["period"] = json!(asked.cpu_period);
    }
    if !asked.cpuset_cpus.is_empty() {
        cpu["cpus"] = json!(asked.cpuset_cpus);
    }
    if !asked.cpuset_mems.is_empty() {
        cpu["mems"] = json!(asked.cpuset_mems);
    }
    if cpu != json!({}) {
        out["cpu"] = cpu;
    }
    if asked.memory_limit_in_bytes > 0 {
        out["memory"] = json!({"limit": asked.memory_limit_in_bytes});
        if asked.memory_swap_limit_in_bytes > 0 && has_swap_limit() {
            out["memory"]["swap"] = json!(asked.memory_swap_limit_in_bytes);
        }
    }
    if let Some(pids) = asked
        .unified
        .get("pids.max")
        .and_then(|p| p.parse::<i64>().ok())
    {
        out["pids"] = json!({"limit": pids});
    }
    if Path::new("/sys/fs/cgroup/cgroup.controllers").exists() && !asked.unified.is_empty() {
        out["unified"] = json!(asked.unified);
    }
    out
}

fn has_swap_limit() -> bool {
    Path::new("/sys/fs/cgroup/memory/memory.memsw.limit_in_bytes").exists()
        || Path::new("/sys/fs/cgroup/cgroup.controllers").exists()
}

fn one_device(device: &v1::Device) -> anyhow::Result<(Value, Value)> {
    let mut node = device_node(Path::new(&device.host_path))
        .with_context(|| format!("device {:?}", device.host_path))?;
    node["path"] = json!(device.container_path);
    let rule = json!({"allow": true, "type": node["type"], "major": node["major"], "minor": node["minor"], "access": device.permissions});
    Ok((node, rule))
}

fn device_node(path: &Path) -> anyhow::Result<Value> {
    use std::os::unix::fs::{FileTypeExt, MetadataExt};
    let meta = std::fs::metadata(path)?;
    let kind = if meta.file_type().is_block_device() {
        "b"
    } else if meta.file_type().is_char_device() {
        "c"
    } else {
        bail!("{} is not a device", path.display());
    };
    Ok(json!({
        "path": path,
        "type": kind,
        "major": libc::major(meta.rdev()),
        "minor": libc::minor(meta.rdev()),
        "fileMode": meta.mode() & 0o7777,
        "uid": meta.uid(),
        "gid": meta.gid(),
    }))
}

/// What a privileged container finds in `/dev`.
fn host_devices() -> anyhow::Result<Vec<Value>> {
    let mut out = Vec::new();
    for entry in std::fs::read_dir("/dev").context("cannot read /dev")? {
        let path = entry?.path();
        let name = path.file_name().and_then(|n| n.to_str()).unwrap_or("");
        // The runtime makes these itself.
        if [
            "null", "zero", "full", "random", "urandom", "tty", "ptmx", "console",
        ]
        .contains(&name)
        {
            continue;
        }
        // A link (stdin, fd) is no device of its own.
        if !path.is_symlink()
            && let Ok(node) = device_node(&path)
        {
            out.push(node);
        }
    }
    Ok(out)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn security(add: &[&str], drop: &[&str]) -> v1::LinuxContainerSecurityContext {
        v1::LinuxContainerSecurityContext {
            capabilities: Some(v1::Capability {
                add_capabilities: add.iter().map(|s| (*s).to_owned()).collect(),
                drop_capabilities: drop.iter().map(|s| (*s).to_owned()).collect(),
                ..v1::Capability::default()
            }),
            ..v1::LinuxContainerSecurityContext::default()
        }
    }

    #[test]
    fn capabilities_are_added_dropped_and_checked() {
        assert!(capabilities(&security(&[], &["ALL"])).unwrap().is_empty());
        let names = capabilities(&security(&["net_bind_service"], &["all"])).unwrap();
        // As an ordinary user the process has none to pass on.
        assert!(names.is_empty() || names == ["CAP_NET_BIND_SERVICE"]);
        assert!(
            !capabilities(&security(&[], &["KILL"]))
                .unwrap()
                .contains(&"CAP_KILL".to_owned())
        );
        assert!(capabilities(&security(&["FLY"], &[])).is_err());
    }

    #[test]
    fn command_and_args_follow_kubernetes() {
        let image = ExecutionConfig {
            entrypoint: vec!["/ep".into()],
            cmd: vec!["c1".into()],
            ..ExecutionConfig::default()
        };
        let of = |command: &[&str], args: &[&str]| {
            arguments(
                &v1::ContainerConfig {
                    command: command.iter().map(|s| (*s).to_owned()).collect(),
                    args: args.iter().map(|s| (*s).to_owned()).collect(),
                    ..v1::ContainerConfig::default()
                },
                &image,
            )
            .unwrap()
        };
        assert_eq!(of(&[], &[]), ["/ep", "c1"]);
        assert_eq!(of(&["/x"], &[]), ["/x"]);
        assert_eq!(of(&[], &["a"]), ["/ep", "a"]);
        assert_eq!(of(&["/x"], &["a"]), ["/x", "a"]);
        assert!(arguments(&v1::ContainerConfig::default(), &ExecutionConfig::default()).is_err());
    }
}
