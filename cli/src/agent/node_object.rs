//! Waits for this node's Node object, which tells its addresses and its pods' ranges.

use std::net::IpAddr;
use std::time::Duration;

use anyhow::{Context, Result, bail};
use futures::TryStreamExt;
use ipnet::IpNet;
use k8s_openapi::api::core::v1::Node;
use kube::runtime::{WatchStreamExt, watcher};
use tracing::{info, warn};
use xebec_agent::nodes::NodeView;

/// How long a Node may be without what it takes: ranges are given shortly after it was registered.
const PATIENCE: Duration = Duration::from_secs(60);

/// What the agent needs to know of its node.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Found {
    /// Its addresses, the internal ones first.
    pub addresses: Vec<IpAddr>,
    /// Ranges of its pods.
    pub pod_ranges: Vec<IpNet>,
}

/// What a Node says, where flags do not; an error names what is missing and what to do.
fn found(node: &Node, node_ips: &[IpAddr], pod_cidrs: &[IpNet]) -> Result<Found> {
    let NodeView {
        mut addresses,
        mut pod_ranges,
        ..
    } = NodeView::from(node);
    if !node_ips.is_empty() {
        addresses = node_ips.to_vec();
    }
    if !pod_cidrs.is_empty() {
        pod_ranges = pod_cidrs.to_vec();
    }
    let name = node.metadata.name.as_deref().unwrap_or_default();
    if addresses.is_empty() {
        bail!("the Node {name} has no InternalIP or ExternalIP: name its address with --node-ip");
    }
    if pod_ranges.is_empty() {
        bail!(
            "the Node {name} has no range of pods (spec.podCIDR): let the controller manager give out ranges (--allocate-node-cidrs and --cluster-cidr; kubeadm: --pod-network-cidr), or name this node's with --pod-cidr"
        );
    }
    Ok(Found {
        addresses,
        pod_ranges,
    })
}

/// Waits for the Node of this name, however long that takes, and then a minute for what it must say.
pub async fn wait(
    client: kube::Client,
    name: &str,
    node_ips: &[IpAddr],
    pod_cidrs: &[IpNet],
) -> Result<Found> {
    let only = watcher::Config::default().fields(&format!("metadata.name={name}"));
    let changes = watcher(kube::Api::<Node>::all(client), only).default_backoff();
    let mut changes = std::pin::pin!(changes);
    let (mut missing, mut deadline) = (None, None);
    loop {
        let event = match deadline {
            None => changes.try_next().await,
            Some(deadline) => match tokio::time::timeout_at(deadline, changes.try_next()).await {
                Ok(event) => event,
                Err(_) => return Err(missing.context("a node lacks nothing")?),
            },
        };
        match event {
            Ok(Some(watcher::Event::InitApply(node) | watcher::Event::Apply(node))) => {
                match found(&node, node_ips, pod_cidrs) {
                    Ok(found) => return Ok(found),
                    Err(error) => {
                        if missing.is_none() {
                            info!(
                                error = format!("{error:#}"),
                                "waiting for the Node to be complete"
                            );
                        }
                        missing = Some(error);
                        deadline.get_or_insert(tokio::time::Instant::now() + PATIENCE);
                    }
                }
            }
            Ok(Some(watcher::Event::InitDone)) if missing.is_none() => {
                warn!(
                    node = name,
                    "there is no such Node yet; waiting for it (its name is told by --node-name or NODE_NAME)"
                );
            }
            Ok(Some(_)) => {}
            Ok(None) => bail!("the watch of the Node {name} ended"),
            Err(error) => warn!(%error, "could not ask the API server for this Node; trying again"),
        }
    }
}

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};

    use super::*;

    fn ask(spec: Value, addresses: Value, ips: &[&str], ranges: &[&str]) -> Result<Found> {
        let node =
            json!({"metadata": {"name": "a"}, "spec": spec, "status": {"addresses": addresses}});
        let node: Node = serde_json::from_value(node).unwrap();
        let ips: Vec<IpAddr> = ips.iter().map(|one| one.parse().unwrap()).collect();
        let ranges: Vec<IpNet> = ranges.iter().map(|one| one.parse().unwrap()).collect();
        found(&node, &ips, &ranges)
    }

    #[test]
    fn a_node_tells_what_flags_do_not() {
        let addresses = json!([{"type": "InternalIP", "address": "192.0.2.1"}]);
        let spec = json!({"podCIDR": "10.1.0.0/24", "podCIDRs": ["10.1.0.0/24", "fd00::/64"]});
        let found = ask(spec.clone(), addresses.clone(), &[], &[]).unwrap();
        assert_eq!(found.addresses, ["192.0.2.1".parse::<IpAddr>().unwrap()]);
        assert_eq!(found.pod_ranges.len(), 2);
        let found = ask(spec, json!([]), &["192.0.2.7"], &["10.9.0.0/24"]).unwrap();
        assert_eq!(found.addresses, ["192.0.2.7".parse::<IpAddr>().unwrap()]);
        assert_eq!(found.pod_ranges, ["10.9.0.0/24".parse::<IpNet>().unwrap()]);
    }

    #[test]
    fn what_is_missing_is_named() {
        let addresses = json!([{"type": "Hostname", "address": "a"}]);
        let error = ask(json!({}), addresses, &[], &["10.9.0.0/24"]).unwrap_err();
        assert!(error.to_string().contains("--node-ip"), "{error}");
        let error = ask(json!({}), json!([]), &["192.0.2.1"], &[]).unwrap_err();
        assert!(error.to_string().contains("--pod-cidr"), "{error}");
    }
}
