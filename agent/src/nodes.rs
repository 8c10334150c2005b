//! The cluster's Nodes, as far as the network depends on them.

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;

use anyhow::Result;
use futures::{StreamExt, TryStreamExt};
use ipnet::IpNet;
use k8s_openapi::api::core::v1::Node;
use kube::Api;
use kube::runtime::watcher::{self, Event};
use kube::runtime::{WatchStreamExt, watcher as watch};
use tokio::sync::watch::Sender;
use tokio_util::sync::CancellationToken;
use tracing::warn;

/// What of a Node the network needs.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct NodeView {
    /// Its own addresses: internal, then external ones.
    pub addresses: Vec<IpAddr>,
    /// Its ranges of pod addresses.
    pub pod_ranges: Vec<IpNet>,
    /// Its labels.
    pub labels: BTreeMap<String, String>,
}

impl NodeView {
    /// Its zone (`topology.kubernetes.io/zone`).
    pub fn zone(&self) -> Option<&str> {
        let zone = self.labels.get("topology.kubernetes.io/zone");
        zone.map(String::as_str)
    }
}

/// All nodes by name; none until the API has told of all of them once.
pub type Nodes = Option<BTreeMap<String, NodeView>>;

impl From<&Node> for NodeView {
    fn from(node: &Node) -> Self {
        let listed = || {
            node.status
                .iter()
                .flat_map(|status| status.addresses.iter().flatten())
        };
        let of = |kind: &'static str| {
            listed()
                .filter(move |one| one.type_ == kind)
                .filter_map(|one| one.address.parse().ok())
        };
        let spec = node.spec.as_ref();
        // `podCIDRs` holds `podCIDR` as its first.
        let ranges = spec.into_iter().flat_map(|spec| {
            let all = spec.pod_cidrs.iter().flatten();
            let first = spec.pod_cidr.iter().filter(|_| spec.pod_cidrs.is_none());
            all.chain(first).filter_map(|range| range.parse().ok())
        });
        Self {
            addresses: of("InternalIP").chain(of("ExternalIP")).collect(),
            pod_ranges: ranges.collect(),
            labels: node.metadata.labels.clone().unwrap_or_default(),
        }
    }
}

/// Tells of the nodes whenever something of them changed that matters here, until `shutdown`.
pub(crate) async fn run(
    client: kube::Client,
    nodes: Sender<Nodes>,
    shutdown: CancellationToken,
) -> Result<()> {
    let mut events = watch(Api::<Node>::all(client), watcher::Config::default())
        .default_backoff()
        .boxed();
    let mut known = BTreeMap::<String, NodeView>::new();
    let mut seen = BTreeSet::<String>::new();
    let mut listed = false;
    let name = |node: &Node| node.metadata.name.clone().unwrap_or_default();
    loop {
        let event = tokio::select! {
            () = shutdown.cancelled() => return Ok(()),
            event = events.try_next() => event,
        };
        match event {
            Ok(Some(Event::Init)) => seen.clear(),
            Ok(Some(Event::InitApply(node))) => {
                seen.insert(name(&node));
                known.insert(name(&node), NodeView::from(&node));
            }
            Ok(Some(Event::InitDone)) => {
                known.retain(|name, _| seen.contains(name));
                listed = true;
            }
            Ok(Some(Event::Apply(node))) => {
                known.insert(name(&node), NodeView::from(&node));
            }
            Ok(Some(Event::Delete(node))) => {
                known.remove(&name(&node));
            }
            Ok(None) => anyhow::bail!("the watch of nodes ended"),
            Err(error) => warn!(%error, "the watch of nodes failed; trying again"),
        }
        nodes.send_if_modified(|told| {
            // Heartbeats change nothing of interest.
            let news = listed && told.as_ref() != Some(&known);
            if news {
                *told = Some(known.clone());
            }
            news
        });
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn addresses_and_ranges_of_a_node() {
        let node: Node = serde_json::from_value(serde_json::json!({
            "metadata": {"name": "a", "labels": {"topology.kubernetes.io/zone": "z"}},
            "spec": {"podCIDR": "10.244.1.0/24", "podCIDRs": ["10.244.1.0/24", "fd00::/64"]},
            "status": {"addresses": [
                {"type": "Hostname", "address": "10.0.0.9"},
                {"type": "ExternalIP", "address": "203.0.113.5"},
                {"type": "InternalIP", "address": "10.0.0.1"},
                {"type": "InternalIP", "address": "fd00::1"},
            ]},
        }))
        .unwrap();
        let view = NodeView::from(&node);
        assert_eq!(view.zone(), Some("z"));
        assert_eq!(
            view.addresses,
            ["10.0.0.1", "fd00::1", "203.0.113.5"].map(|text| text.parse::<IpAddr>().unwrap())
        );
        assert_eq!(
            view.pod_ranges,
            ["10.244.1.0/24", "fd00::/64"].map(|text| text.parse().unwrap())
        );
    }
}
