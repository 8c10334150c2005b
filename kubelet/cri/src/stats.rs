//! What containers and pods use, from their cgroups; and new limits for them.

use std::path::{Path, PathBuf};

use anyhow::{Context, bail};
use xebec_cri_api::v1;
use xebec_shim::log_file::now_nanos;

use crate::container::cgroup_dirs;
use crate::records::{Container, Sandbox};
use crate::runtime::Runtime;

fn value(value: u64) -> Option<v1::UInt64Value> {
    Some(v1::UInt64Value { value })
}

/// A file in a cgroup, in whichever hierarchy has it.
struct Group(Vec<PathBuf>);

impl Group {
    fn text(&self, file: &str) -> Option<String> {
        self.0
            .iter()
            .find_map(|dir| std::fs::read_to_string(dir.join(file)).ok())
    }

    fn number(&self, file: &str) -> Option<u64> {
        self.text(file)?.trim().parse().ok()
    }

    fn field(&self, file: &str, key: &str) -> Option<u64> {
        self.text(file)?
            .lines()
            .find_map(|l| l.strip_prefix(key)?.strip_prefix(' ')?.trim().parse().ok())
    }

    fn cpu(&self) -> Option<v1::CpuUsage> {
        let nanos = self
            .number("cpuacct.usage")
            .or_else(|| Some(self.field("cpu.stat", "usage_usec")? * 1000))?;
        Some(v1::CpuUsage {
            timestamp: now_nanos(),
            usage_core_nano_seconds: value(nanos),
            ..v1::CpuUsage::default()
        })
    }

    fn memory(&self) -> Option<v1::MemoryUsage> {
        let usage = self
            .number("memory.usage_in_bytes")
            .or_else(|| self.number("memory.current"))?;
        let stat = |v1: &str, v2: &str| {
            self.field("memory.stat", v1)
                .or_else(|| self.field("memory.stat", v2))
        };
        let inactive = stat("total_inactive_file", "inactive_file").unwrap_or(0);
        let limit = self
            .number("memory.limit_in_bytes")
            .or_else(|| self.number("memory.max"))
            // The kernel's way to say "none" in v1 is a number near 2^63.
            .filter(|limit| *limit < 1 << 60);
        let working_set = usage.saturating_sub(inactive);
        Some(v1::MemoryUsage {
            timestamp: now_nanos(),
            working_set_bytes: value(working_set),
            available_bytes: limit.and_then(|l| value(l.saturating_sub(working_set))),
            usage_bytes: value(usage),
            rss_bytes: stat("total_rss", "anon").and_then(value),
            page_faults: stat("total_pgfault", "pgfault").and_then(value),
            major_page_faults: stat("total_pgmajfault", "pgmajfault").and_then(value),
            ..v1::MemoryUsage::default()
        })
    }
}

/// A container's usage.
pub fn container(container: &Container) -> v1::ContainerStats {
    let group = Group(cgroup_dirs(&container.record().cgroup));
    v1::ContainerStats {
        attributes: Some(v1::ContainerAttributes {
            id: container.id.clone(),
            metadata: container.config.metadata.clone(),
            labels: container.config.labels.clone(),
            annotations: container.config.annotations.clone(),
        }),
        cpu: group.cpu(),
        memory: group.memory(),
        writable_layer: Some(directory(&container.dir.join("upper"))),
        ..v1::ContainerStats::default()
    }
}

/// A pod's usage: its cgroup and its network.
pub fn sandbox(runtime: &Runtime, sandbox: &Sandbox) -> v1::PodSandboxStats {
    let record = sandbox.record();
    let group = Group(cgroup_dirs(&record.cgroup_parent));
    let network = record
        .netns
        .as_ref()
        .and_then(|path| crate::netns::within(path, || Ok(interface("eth0"))).ok())
        .flatten();
    v1::PodSandboxStats {
        attributes: Some(v1::PodSandboxAttributes {
            id: sandbox.id.clone(),
            metadata: sandbox.config.metadata.clone(),
            labels: sandbox.config.labels.clone(),
            annotations: sandbox.config.annotations.clone(),
        }),
        linux: Some(v1::LinuxPodSandboxStats {
            cpu: group.cpu(),
            memory: group.memory(),
            network: network.map(|usage| v1::NetworkUsage {
                timestamp: now_nanos(),
                default_interface: Some(usage),
                interfaces: Vec::new(),
            }),
            process: group.number("pids.current").map(|count| v1::ProcessUsage {
                timestamp: now_nanos(),
                process_count: value(count),
            }),
            containers: runtime
                .registry
                .containers_of(&sandbox.id)
                .iter()
                .map(|c| self::container(c))
                .collect(),
            ..v1::LinuxPodSandboxStats::default()
        }),
        windows: None,
    }
}

/// An interface's counters, in the calling thread's network namespace.
fn interface(name: &str) -> Option<v1::NetworkInterfaceUsage> {
    let text = std::fs::read_to_string("/proc/thread-self/net/dev").ok()?;
    let fields: Vec<u64> = text
        .lines()
        .find_map(|l| l.trim_start().strip_prefix(name)?.strip_prefix(':'))?
        .split_whitespace()
        .filter_map(|f| f.parse().ok())
        .collect();
    let field = |at: usize| fields.get(at).copied().and_then(value);
    Some(v1::NetworkInterfaceUsage {
        name: name.to_owned(),
        rx_bytes: field(0),
        rx_errors: field(2),
        tx_bytes: field(8),
        tx_errors: field(10),
    })
}

/// How much a directory tree takes.
pub fn directory(dir: &Path) -> v1::FilesystemUsage {
    use std::os::unix::fs::MetadataExt;
    // Other file systems mounted below (containers' roots) don't count.
    fn walk(dir: &Path, device: u64, bytes: &mut u64, inodes: &mut u64) {
        for entry in std::fs::read_dir(dir).into_iter().flatten().flatten() {
            if let Ok(meta) = entry.metadata()
                && meta.dev() == device
            {
                *inodes += 1;
                *bytes += meta.blocks() * 512;
                if meta.is_dir() {
                    walk(&entry.path(), device, bytes, inodes);
                }
            }
        }
    }
    let (mut bytes, mut inodes) = (0, 0);
    if let Ok(meta) = dir.metadata() {
        walk(dir, meta.dev(), &mut bytes, &mut inodes);
    }
    v1::FilesystemUsage {
        timestamp: now_nanos(),
        fs_id: Some(v1::FilesystemIdentifier {
            mountpoint: dir.to_string_lossy().into_owned(),
        }),
        used_bytes: value(bytes),
        inodes_used: value(inodes),
    }
}

/// Writes new limits into a running container's cgroup.
pub fn update(container: &Container, asked: &v1::LinuxContainerResources) -> anyhow::Result<()> {
    let dirs = cgroup_dirs(&container.record().cgroup);
    // Each limit in the file of whichever hierarchy has it.
    let write = |files: &[(&str, String)]| -> anyhow::Result<()> {
        for (file, text) in files {
            if let Some(dir) = dirs.iter().find(|d| d.join(file).exists()) {
                return std::fs::write(dir.join(file), text)
                    .with_context(|| format!("cannot write {text} to {file}"));
            }
        }
        let names: Vec<&str> = files.iter().map(|(file, _)| *file).collect();
        bail!("the container's cgroup has no {}", names.join(" or "))
    };
    if asked.cpu_shares > 0 {
        // The mapping of shares [2, 262144] to weights [1, 10000].
        let weight = 1 + (asked.cpu_shares.clamp(2, 262_144) - 2) * 9999 / 262_142;
        write(&[
            ("cpu.shares", asked.cpu_shares.to_string()),
            ("cpu.weight", weight.to_string()),
        ])?;
    }
    if asked.cpu_period > 0 || asked.cpu_quota != 0 {
        // cgroup2 takes both at once: what is not asked for stays as it is.
        let known = container.resources().unwrap_or_default();
        let period = match (asked.cpu_period, known.cpu_period) {
            (asked, _) if asked > 0 => asked,
            (_, known) if known > 0 => known,
            _ => 100_000,
        };
        let quota = match (asked.cpu_quota, known.cpu_quota) {
            (0, 0) => -1,
            (0, known) => known,
            (asked, _) => asked,
        };
        let max = if quota < 0 {
            "max".to_owned()
        } else {
            quota.to_string()
        };
        if asked.cpu_period > 0 {
            write(&[
                ("cpu.cfs_period_us", period.to_string()),
                ("cpu.max", format!("{max} {period}")),
            ])?;
        }
        write(&[
            ("cpu.cfs_quota_us", quota.to_string()),
            ("cpu.max", format!("{max} {period}")),
        ])?;
    }
    if asked.memory_limit_in_bytes > 0 {
        write(&[
            (
                "memory.limit_in_bytes",
                asked.memory_limit_in_bytes.to_string(),
            ),
            ("memory.max", asked.memory_limit_in_bytes.to_string()),
        ])?;
    }
    if !asked.cpuset_cpus.is_empty() {
        write(&[("cpuset.cpus", asked.cpuset_cpus.clone())])?;
    }
    if !asked.cpuset_mems.is_empty() {
        write(&[("cpuset.mems", asked.cpuset_mems.clone())])?;
    }
    Ok(())
}
