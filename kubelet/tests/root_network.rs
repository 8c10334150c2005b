//! A node whose network is not there yet: what it says, and that pods wait for it.
#![allow(clippy::unwrap_used, reason = "a test may panic")]

mod harness;

use std::os::unix::fs::PermissionsExt;
use std::time::{Duration, Instant};

use k8s_openapi::api::core::v1 as core;
use kube::Api;
use serde_json::json;

use harness::{NODE, Node, is_running, not_root};

/// A plugin whose network comes with a file; it notes what it was asked.
const PLUGIN: &str = r#"#!/bin/sh
cat > /dev/null
echo "$CNI_COMMAND" >> "$0.calls"
case $CNI_COMMAND in
STATUS) [ -e "$0.up" ] || { echo '{"cniVersion":"1.1.0","code":50,"msg":"no agent yet"}'; exit 1; } ;;
ADD) echo '{"cniVersion":"1.1.0","ips":[{"address":"192.0.2.7/24"}]}' ;;
esac
"#;
const CONFIG: &str = r#"{"cniVersion":"1.1.0","name":"late","plugins":[{"type":"late"}]}"#;

/// Waits until the Node's condition Ready has this status, and gives its reason and message.
async fn until_ready(node: &Node, status: &str) -> (String, String) {
    let nodes = Api::<core::Node>::all(node.client.clone());
    let started = Instant::now();
    loop {
        let found = nodes.get_opt(NODE).await.unwrap();
        let conditions = found.and_then(|n| n.status?.conditions).unwrap_or_default();
        let ready = conditions.into_iter().find(|c| c.type_ == "Ready");
        if let Some(ready) = ready.as_ref().filter(|ready| ready.status == status) {
            let (reason, message) = (ready.reason.clone(), ready.message.clone());
            return (reason.unwrap_or_default(), message.unwrap_or_default());
        }
        assert!(started.elapsed() < Duration::from_secs(20), "{ready:?}");
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn pods_wait_for_the_network() {
    if not_root() {
        return;
    }
    let node = Node::start(21081).await;
    let plugin = node.path("cni-bin/late");
    std::fs::write(&plugin, PLUGIN).unwrap();
    std::fs::set_permissions(&plugin, PermissionsExt::from_mode(0o755)).unwrap();
    let why = "container runtime network not ready: NetworkReady=false reason:NetworkPluginNotReady \
               message:Network plugin returns error: ";
    let (reason, message) = until_ready(&node, "False").await;
    assert_eq!(reason, "KubeletNotReady");
    assert!(message.starts_with(why), "{message}");
    assert!(message.contains("no network config found"), "{message}");
    std::fs::write(node.path("cni/10-late.conflist"), CONFIG).unwrap();

    let sleeps = json!({"command": ["sleep", "300"]});
    let own = json!({"hostNetwork": false});
    node.pod("own", sleeps.clone(), own).await;
    node.pod("hosts", sleeps, json!({})).await;
    node.until("hosts", "running", is_running).await;
    let started = Instant::now();
    let event = node.until_said("own", |_| true).await;
    let says = format!(
        "{why}cni plugin not initialized: plugin type=\"late\" failed (status): no agent yet"
    );
    assert_eq!(
        event,
        format!("NetworkNotReady: network is not ready: {says}")
    );
    assert_eq!(until_ready(&node, "False").await.1, says);

    std::fs::write(node.path("cni-bin/late.up"), "").unwrap();
    let up = Instant::now();
    until_ready(&node, "True").await;
    let pod = node.until("own", "running", is_running).await;
    assert!(up.elapsed() < Duration::from_secs(5), "{:?}", up.elapsed());
    let address = pod.status.and_then(|status| status.pod_ip);
    assert_eq!(address.as_deref(), Some("192.0.2.7"));
    let calls = std::fs::read_to_string(node.path("cni-bin/late.calls")).unwrap();
    let mut asked = calls.lines().filter(|call| *call != "STATUS");
    assert_eq!((asked.next(), asked.next()), (Some("ADD"), None), "{calls}");
    // Asked again and again while there is none, but not all the time.
    let waited = started.elapsed().as_millis() / 100 + 10;
    let times = calls.lines().count();
    assert!(times < waited as usize, "{times} times");
    node.end().await;
}
