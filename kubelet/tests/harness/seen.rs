//! What a Pod object says of its first container and of itself.

use k8s_openapi::api::core::v1::{ContainerStatus, Pod};

pub fn container(pod: &Pod) -> ContainerStatus {
    let statuses = pod
        .status
        .as_ref()
        .and_then(|s| s.container_statuses.as_ref());
    statuses
        .and_then(|all| all.first())
        .cloned()
        .unwrap_or_default()
}

pub fn is_running(pod: &Pod) -> bool {
    container(pod).state.is_some_and(|s| s.running.is_some())
}

/// Reason and message of what the container waits for.
pub fn waiting(pod: &Pod) -> (String, String) {
    let waiting = container(pod)
        .state
        .and_then(|s| s.waiting)
        .unwrap_or_default();
    (
        waiting.reason.unwrap_or_default(),
        waiting.message.unwrap_or_default(),
    )
}

pub fn phase(pod: &Pod) -> &str {
    pod.status
        .as_ref()
        .and_then(|s| s.phase.as_deref())
        .unwrap_or_default()
}

/// The status of one of the pod's conditions.
pub fn condition(pod: &Pod, kind: &str) -> String {
    let conditions = pod.status.as_ref().and_then(|s| s.conditions.as_ref());
    let found = conditions.and_then(|all| all.iter().find(|c| c.type_ == kind));
    found.map(|c| c.status.clone()).unwrap_or_default()
}
