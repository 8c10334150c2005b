//! The kubelet with the real container runtime against the real API server: restarts, probes, ends.
#![allow(clippy::unwrap_used, reason = "a test may panic")]

mod harness;

use k8s_openapi::api::core::v1::{ContainerStatus, Pod};
use serde_json::{Value, json};

use harness::{Node, not_root};

fn shell(script: &str) -> Value {
    json!({"command": ["sh", "-c", script]})
}

fn container(pod: &Pod) -> ContainerStatus {
    let statuses = pod
        .status
        .as_ref()
        .and_then(|s| s.container_statuses.as_ref());
    statuses
        .and_then(|all| all.first())
        .cloned()
        .unwrap_or_default()
}

fn phase(pod: &Pod) -> &str {
    pod.status
        .as_ref()
        .and_then(|s| s.phase.as_deref())
        .unwrap_or_default()
}

#[tokio::test(flavor = "multi_thread")]
async fn restart_policies() {
    if not_root() {
        return;
    }
    let node = Node::start(21051).await;
    let never = json!({"restartPolicy": "Never"});
    node.pod("done", shell("exit 0"), never.clone()).await;
    node.pod("failed", shell("exit 3"), never).await;
    let on_failure = json!({"restartPolicy": "OnFailure"});
    node.pod("again", shell("echo try; exit 4"), on_failure)
        .await;
    node.pod("always", shell("sleep 0.2; exit 0"), json!({}))
        .await;
    node.until("done", "Succeeded", |pod| phase(pod) == "Succeeded")
        .await;
    let failed = node
        .until("failed", "Failed", |pod| phase(pod) == "Failed")
        .await;
    let ended = container(&failed).state.unwrap().terminated.unwrap();
    assert_eq!(
        (ended.exit_code, ended.reason.as_deref()),
        (3, Some("Error"))
    );
    for name in ["again", "always"] {
        let pod = node
            .until(name, "in CrashLoopBackOff", |pod| {
                let waiting = container(pod).state.and_then(|s| s.waiting);
                waiting.and_then(|w| w.reason).as_deref() == Some("CrashLoopBackOff")
            })
            .await;
        assert_eq!(
            (phase(&pod), container(&pod).restart_count),
            ("Running", 1),
            "{name}"
        );
        let last = container(&pod).last_state.unwrap().terminated.unwrap();
        assert_eq!(last.exit_code, if name == "again" { 4 } else { 0 });
    }
    node.end().await;
}
