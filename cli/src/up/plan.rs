//! Which nodes `up` runs: names, addresses, ranges and folders of each, the same ones at each start.

use anyhow::{Result, bail};
use ipnet::IpNet;
use k8s_openapi::api::core::v1::Node;
use tracing::{info, warn};

use super::node::NodeConfig;
use super::preflight::Machine;
use super::ranges::Ranges;
use super::state::UpState;
use super::teardown::CGROUPS;
use super::{CLUSTER_DOMAIN, Up, switch};
use crate::paths::Layout;

impl Up {
    /// The nodes.
    pub(super) fn plan(
        &self,
        layout: &Layout,
        machine: &Machine,
        ranges: &Ranges,
    ) -> Result<Vec<NodeConfig>> {
        (0..usize::from(self.nodes))
            .map(|index| self.plan_node(layout, machine, ranges, index))
            .collect()
    }

    fn plan_node(
        &self,
        layout: &Layout,
        machine: &Machine,
        ranges: &Ranges,
        index: usize,
    ) -> Result<NodeConfig> {
        let several = self.nodes > 1;
        let name = match (&self.node_name, several) {
            (_, true) => format!("node{}", index + 1),
            (Some(name), false) => name.clone(),
            (None, false) => machine.hostname.clone(),
        };
        let layout = layout.node(&name);
        let pod_cgroup = machine.cgroup2.join(CGROUPS).join(&name);
        let (ips, cable) = if several {
            let (ips, cable) = switch::plan(&ranges.nodes, index, layout.netns())?;
            (ips, Some(cable))
        } else {
            (ranges.of_pods(&machine.addresses), None)
        };
        if ips.len() < ranges.pods.len() {
            bail!(
                "--pod-cidr has ranges of both families or of IPv6, but this machine has no address of each towards the outside; name one of each with --node-ip"
            );
        }
        Ok(NodeConfig {
            ips,
            cable,
            pod_cidrs: ranges.of_node(index)?,
            cluster_domain: CLUSTER_DOMAIN.into(),
            kubelet_port: 10250,
            xdp: self.xdp.into(),
            lb_mode: self.ways.lb_mode(),
            host_legacy_routing: self.ways.host_legacy_routing,
            node_ports: self.ports.node_ports()?,
            l2_announcements: !self.load_balancer_cidr.is_empty(),
            metrics: self.ports.metrics(),
            healthz: self.ports.healthz(),
            // The machine's own processes are those of its only node, but of none of several.
            cgroup_root: if several {
                pod_cgroup.clone()
            } else {
                machine.cgroup2.clone()
            },
            cgroup_parent: if several {
                format!("/{CGROUPS}/{name}")
            } else {
                format!("/{CGROUPS}")
            },
            pod_cgroup,
            layout,
            name,
        })
    }

    /// Pods of a cluster that ended without `down` are taken over, which takes the same nodes.
    pub(super) async fn check_predecessor(
        &self,
        layout: &Layout,
        nodes: &[NodeConfig],
    ) -> Result<()> {
        let before = UpState::read(layout)?;
        if let Some(before) = &before {
            let same = before.nodes.len() == nodes.len()
                && before
                    .nodes
                    .iter()
                    .zip(nodes)
                    .all(|(a, b)| a.name == b.name && a.cable == b.cable);
            if !same {
                bail!(
                    "a cluster with other nodes ({}) left its pods here: take them away with `xebec down`, or start it as it was",
                    before.node_names()
                );
            }
        }
        if before.is_some() || self.nodes == 1 {
            return Ok(());
        }
        let Some(found) = switch::find().await? else {
            return Ok(());
        };
        let whose = match &found.run {
            Some(run) => format!("`xebec down --run-dir {}` takes it away", run.display()),
            None => "`xebec down` with its --run-dir takes it away".into(),
        };
        bail!(
            "there is a device {} already: another cluster with several nodes runs on this machine, or was killed; {whose}",
            switch::BRIDGE
        );
    }
}

/// Removes the Nodes of an earlier `up` that this one does not run: they will not come back by themselves, and their
/// pods are to run elsewhere. A node whose range of pods is another one now is registered anew.
pub(super) async fn forget_nodes(layout: &Layout, client: kube::Client, nodes: &[NodeConfig]) {
    let api = kube::Api::<Node>::all(client);
    for name in layout.known_nodes() {
        let outcome = async {
            let Some(found) = api.get_opt(&name).await? else {
                return Ok(());
            };
            let spec = found.spec.unwrap_or_default();
            let had = spec.pod_cidrs.unwrap_or_default();
            let has = |node: &NodeConfig| -> Vec<String> {
                node.pod_cidrs.iter().map(IpNet::to_string).collect()
            };
            let stays = nodes
                .iter()
                .any(|node| node.name == name && has(node) == had);
            if !stays {
                api.delete(&name, &kube::api::DeleteParams::default())
                    .await?;
                info!(node = name, "a node that does not run any more was removed");
            }
            Ok::<(), kube::Error>(())
        };
        match outcome.await {
            Ok(()) => {}
            Err(kube::Error::Api(status)) if status.code == 404 => {}
            Err(error) => warn!(node = name, %error, "could not remove a node that does not run"),
        }
    }
}

#[cfg(test)]
mod tests {
    use std::path::PathBuf;

    use clap::Parser;

    use super::*;

    #[derive(Parser)]
    struct Cli {
        #[command(flatten)]
        up: Up,
    }

    fn plan(args: &[&str]) -> Result<Vec<NodeConfig>> {
        let addresses = &["192.0.2.1", "2001:db8::1"];
        plan_at(addresses, args)
    }

    fn plan_at(addresses: &[&str], args: &[&str]) -> Result<Vec<NodeConfig>> {
        let up = Cli::try_parse_from([&["xebec"], args].concat())?.up;
        let ranges = up.ranges()?;
        let layout = Layout {
            data: PathBuf::from("/d"),
            run: PathBuf::from("/r"),
        };
        let machine = Machine {
            hostname: "machine".into(),
            addresses: addresses.iter().map(|one| one.parse().unwrap()).collect(),
            cgroup2: PathBuf::from("/c"),
        };
        up.plan(&layout, &machine, &ranges)
    }

    #[test]
    fn one_node_is_the_machine() {
        let nodes = plan(&[]).unwrap();
        let [node] = nodes.as_slice() else {
            panic!("{nodes:?}")
        };
        assert_eq!(node.name, "machine");
        assert!(node.cable.is_none());
        assert_eq!(node.cgroup_root, PathBuf::from("/c"));
        assert_eq!(node.cgroup_parent, "/xebec");
        assert_eq!(texts(&node.pod_cidrs), ["10.244.0.0/24"]);
        assert_eq!(texts(&node.ips), ["192.0.2.1"]);
    }

    fn texts<T: ToString>(all: &[T]) -> Vec<String> {
        all.iter().map(ToString::to_string).collect()
    }

    #[test]
    fn nodes_have_the_families_that_pods_have() {
        let both = "10.1.0.0/16,fd00:1::/56";
        let nodes = plan(&["--nodes", "2", "--cluster-cidr", both]).unwrap();
        let [_, node] = nodes.as_slice() else {
            panic!("{nodes:?}")
        };
        assert_eq!(texts(&node.pod_cidrs), ["10.1.1.0/24", "fd00:1:0:1::/64"]);
        assert_eq!(texts(&node.ips), ["10.245.0.12", "fd00:10:245::c"]);
        let six_first = ["--pod-cidr", "fd00:1::/56,10.1.0.0/16"];
        let alone = &plan(&six_first).unwrap()[0];
        assert_eq!(texts(&alone.ips), ["2001:db8::1", "192.0.2.1"]);
        let own = ["--node-cidr", "10.9.0.0/24,fd00:9::/64", "--nodes", "2"];
        let own = &plan(&[&six_first[..], &own].concat()).unwrap()[0];
        assert_eq!(texts(&own.ips), ["fd00:9::b", "10.9.0.11"]);
        let six = plan(&["--nodes", "2", "--cluster-cidr", "fd00:1::/56"]).unwrap();
        assert_eq!(texts(&six[0].ips), ["fd00:10:245::b"]);
    }

    #[test]
    fn a_machine_without_a_family_can_not_be_a_node_with_it() {
        let both = ["--cluster-cidr", "10.1.0.0/16,fd00:1::/56"];
        let error = plan_at(&["192.0.2.1"], &both).unwrap_err().to_string();
        assert!(error.contains("--node-ip"), "{error}");
        // Behind the switch they need none of its addresses.
        plan_at(&["192.0.2.1"], &[&both[..], &["--nodes", "2"]].concat()).unwrap();
    }

    #[test]
    fn several_nodes_share_nothing() {
        let nodes = plan(&["--nodes", "3"]).unwrap();
        let all = |what: &dyn Fn(&NodeConfig) -> String| -> Vec<String> {
            nodes.iter().map(what).collect()
        };
        assert_eq!(all(&|node| node.name.clone()), ["node1", "node2", "node3"]);
        assert_eq!(
            all(&|node| texts(&node.pod_cidrs).join(",")),
            ["10.244.0.0/24", "10.244.1.0/24", "10.244.2.0/24"]
        );
        assert_eq!(
            all(&|node| node.cgroup_root.display().to_string()),
            ["/c/xebec/node1", "/c/xebec/node2", "/c/xebec/node3"]
        );
    }

    #[test]
    fn all_nodes_have_the_same_ways() {
        use xebec_agent::network::LbMode;
        for (args, wanted) in [
            (&[][..], (LbMode::Snat, false)),
            (&["--lb-mode", "hybrid"], (LbMode::Hybrid, false)),
            (
                &["--lb-mode=dsr", "--host-legacy-routing"],
                (LbMode::Dsr, true),
            ),
        ] {
            let nodes = plan(&[&["--nodes", "2"], args].concat()).unwrap();
            assert_eq!(nodes.len(), 2);
            for node in nodes {
                // As the node's own process reads it.
                let told = serde_json::to_string(&node).unwrap();
                let told: NodeConfig = serde_json::from_str(&told).unwrap();
                let agent = told.agent();
                assert_eq!((agent.lb_mode, agent.host_legacy_routing), wanted);
            }
        }
    }

    #[test]
    fn what_can_not_be_is_refused() {
        for (args, says) in [
            (&["--nodes", "0"][..], "--nodes"),
            (&["--nodes", "2", "--node-name", "a"], "--node-name"),
            (
                &["--nodes", "2", "--node-cidr", "10.244.9.0/24"],
                "--node-cidr",
            ),
            (&["--nodes", "2", "--pod-cidr", "10.1.0.0/24"], "--pod-cidr"),
            (&["--pod-cidr", "10.96.0.0/24"], "--service-cidr"),
            (&["--pod-cidr", "10.1.0.0/16,10.2.0.0/16"], "--pod-cidr"),
            (&["--pod-cidr", "fd00::/72"], "a /64 or larger"),
            (&["--service-cidr", "fd00:1::/112"], "IPv6"),
            (&["--lb-mode", "fast"], "--lb-mode"),
            (
                &[
                    "--nodes",
                    "2",
                    "--cluster-cidr",
                    "10.1.0.0/16,fd00:1::/56",
                    "--node-cidr",
                    "10.3.0.0/24",
                ],
                "--node-cidr",
            ),
        ] {
            let error = format!("{:#}", plan(args).unwrap_err());
            assert!(error.contains(says), "{args:?}: {error}");
        }
    }
}
