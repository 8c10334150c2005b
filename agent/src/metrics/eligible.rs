//! Watches the node's own object: a node that is being taken away gets no new connections.

use std::time::Duration;

use anyhow::{Result, bail};
use futures::TryStreamExt;
use k8s_openapi::api::core::v1::Node;
use kube::Api;
use kube::runtime::watcher::{self, Event};
use kube::runtime::{WatchStreamExt, watcher as watch};
use tokio_util::sync::CancellationToken;
use tracing::{info, warn};

use super::Health;

/// Set by the cluster autoscaler on nodes that it is about to delete.
const AUTOSCALER_TAINT: &str = "ToBeDeletedByClusterAutoscaler";

/// Whether new connections may be sent to a node.
fn is_eligible(node: &Node) -> bool {
    let leaves = node
        .spec
        .iter()
        .flat_map(|spec| spec.taints.iter().flatten())
        .any(|taint| taint.key == AUTOSCALER_TAINT);
    node.metadata.deletion_timestamp.is_none() && !leaves
}

/// Follows the node until `shutdown`.
pub(super) async fn run(
    client: kube::Client,
    name: &str,
    health: &Health,
    shutdown: CancellationToken,
) -> Result<()> {
    let only = watcher::Config::default().fields(&format!("metadata.name={name}"));
    let mut changes = std::pin::pin!(watch(Api::<Node>::all(client), only).default_backoff());
    let mut before = true;
    loop {
        let event = tokio::select! {
            () = shutdown.cancelled() => return Ok(()),
            event = changes.try_next() => event,
        };
        let now = match event {
            Ok(Some(Event::InitApply(node) | Event::Apply(node))) => is_eligible(&node),
            Ok(Some(Event::Delete(_))) => false,
            Ok(Some(Event::Init | Event::InitDone)) => continue,
            Ok(None) => bail!("the watch of the node {name} ended"),
            Err(error) => {
                warn!(%error, "the watch of this node failed; trying again");
                // The stream waits by itself, but not before its first retry.
                tokio::time::sleep(Duration::from_millis(100)).await;
                continue;
            }
        };
        if now != before {
            info!(
                eligible = now,
                "load balancers are told anew about this node"
            );
            before = now;
        }
        health.set_eligible(now);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn nodes_that_go_are_not_eligible() {
        let node = |metadata: serde_json::Value, spec: serde_json::Value| -> Node {
            serde_json::from_value(serde_json::json!({"metadata": metadata, "spec": spec})).unwrap()
        };
        use serde_json::json;
        assert!(is_eligible(&node(json!({}), json!({}))));
        let other =
            json!({"taints": [{"key": "node.kubernetes.io/not-ready", "effect": "NoSchedule"}]});
        assert!(is_eligible(&node(json!({}), other)));
        let deleted = json!({"deletionTimestamp": "2026-01-01T00:00:00Z"});
        assert!(!is_eligible(&node(deleted, json!({}))));
        let scaled =
            json!({"taints": [{"key": AUTOSCALER_TAINT, "value": "1", "effect": "NoSchedule"}]});
        assert!(!is_eligible(&node(json!({}), scaled)));
    }
}
