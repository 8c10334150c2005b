//! CRI status messages out of records.

use std::collections::HashMap;

use xebec_cri_api::v1;

use crate::records::{Container, Phase, Sandbox};

/// A sandbox's state.
pub fn sandbox_state(sandbox: &Sandbox) -> v1::PodSandboxState {
    if sandbox.record().ready {
        v1::PodSandboxState::SandboxReady
    } else {
        v1::PodSandboxState::SandboxNotready
    }
}

/// A sandbox's status.
pub fn sandbox(sandbox: &Sandbox) -> v1::PodSandboxStatus {
    let record = sandbox.record();
    let mut ips = record
        .attachment
        .as_ref()
        .filter(|_| record.ready)
        .map(|a| a.addresses())
        .unwrap_or_default()
        .into_iter();
    let network = v1::PodSandboxNetworkStatus {
        ip: ips.next().unwrap_or_default(),
        additional_ips: ips.map(|ip| v1::PodIp { ip }).collect(),
    };
    let options = sandbox
        .config
        .linux
        .as_ref()
        .and_then(|l| l.security_context.as_ref())
        .and_then(|s| s.namespace_options.clone())
        .unwrap_or_default();
    v1::PodSandboxStatus {
        id: sandbox.id.clone(),
        metadata: sandbox.config.metadata.clone(),
        state: sandbox_state(sandbox) as i32,
        created_at: record.created_at,
        network: Some(network),
        linux: Some(v1::LinuxPodSandboxStatus {
            namespaces: Some(v1::Namespace {
                options: Some(options),
            }),
        }),
        labels: sandbox.config.labels.clone(),
        annotations: sandbox.config.annotations.clone(),
        runtime_handler: record.runtime_handler,
    }
}

/// A sandbox in a list.
pub fn sandbox_item(sandbox: &Sandbox) -> v1::PodSandbox {
    let record = sandbox.record();
    v1::PodSandbox {
        id: sandbox.id.clone(),
        metadata: sandbox.config.metadata.clone(),
        state: sandbox_state(sandbox) as i32,
        created_at: record.created_at,
        labels: sandbox.config.labels.clone(),
        annotations: sandbox.config.annotations.clone(),
        runtime_handler: record.runtime_handler,
    }
}

/// A container's state.
pub fn container_state(phase: Phase) -> v1::ContainerState {
    match phase {
        Phase::Created => v1::ContainerState::ContainerCreated,
        Phase::Running => v1::ContainerState::ContainerRunning,
        Phase::Exited => v1::ContainerState::ContainerExited,
    }
}

/// A container's status.
pub fn container(container: &Container, sandbox: &Sandbox) -> v1::ContainerStatus {
    let record = container.record();
    v1::ContainerStatus {
        id: container.id.clone(),
        metadata: container.config.metadata.clone(),
        state: container_state(record.phase) as i32,
        created_at: record.created_at,
        started_at: record.started_at,
        finished_at: record.finished_at,
        exit_code: record.exit_code,
        image: container.config.image.clone(),
        image_ref: record.image_ref,
        reason: record.reason,
        message: record.message,
        labels: container.config.labels.clone(),
        annotations: container.config.annotations.clone(),
        mounts: container.config.mounts.clone(),
        log_path: log_path(container, sandbox).unwrap_or_default(),
        resources: container.resources().map(|linux| v1::ContainerResources {
            linux: Some(linux),
            windows: None,
        }),
        image_id: record.image,
        user: Some(v1::ContainerUser {
            linux: Some(v1::LinuxContainerUser {
                uid: record.uid.into(),
                gid: record.gid.into(),
                supplemental_groups: record.groups.iter().map(|g| i64::from(*g)).collect(),
            }),
        }),
        stop_signal: container.config.stop_signal,
    }
}

/// A container in a list.
pub fn container_item(container: &Container) -> v1::Container {
    let record = container.record();
    v1::Container {
        id: container.id.clone(),
        pod_sandbox_id: record.sandbox,
        metadata: container.config.metadata.clone(),
        image: container.config.image.clone(),
        image_ref: record.image_ref,
        state: container_state(record.phase) as i32,
        created_at: record.created_at,
        labels: container.config.labels.clone(),
        annotations: container.config.annotations.clone(),
        image_id: record.image,
    }
}

/// Where a container's log goes; `None` if the kubelet wants none.
pub fn log_path(container: &Container, sandbox: &Sandbox) -> Option<String> {
    if container.config.log_path.is_empty() || sandbox.config.log_directory.is_empty() {
        return None;
    }
    Some(format!(
        "{}/{}",
        sandbox.config.log_directory.trim_end_matches('/'),
        container.config.log_path
    ))
}

/// Whether all of `wanted` is in `labels`.
pub fn selected(labels: &HashMap<String, String>, wanted: &HashMap<String, String>) -> bool {
    wanted.iter().all(|(k, v)| labels.get(k) == Some(v))
}
