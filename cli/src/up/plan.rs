//! Which nodes `up` runs: names, addresses, ranges and folders of each, the same ones at each start.

use anyhow::{Context, Result, bail};
use ipnet::{IpNet, Ipv4Net};
use k8s_openapi::api::core::v1::Node;
use tracing::{info, warn};

use super::node::NodeConfig;
use super::preflight::Machine;
use super::state::UpState;
use super::teardown::CGROUPS;
use super::{CLUSTER_DOMAIN, Up, switch};
use crate::paths::Layout;

impl Up {
    /// Ranges must not overlap.
    pub(super) fn check_ranges(&self) -> Result<()> {
        let mut ranges = vec![("--pod-cidr", IpNet::V4(self.pod_cidr))];
        ranges.extend(self.service_cidr.iter().map(|one| ("--service-cidr", *one)));
        for balancers in &self.load_balancer_cidr {
            // They may well lie in the nodes' range, but nobody's pods or Services have them.
            let taken = ranges.iter().find(|(_, range)| balancers.touches(range));
            if let Some((flag, range)) = taken {
                bail!("{flag} {range} and --load-balancer-cidr {balancers} overlap");
            }
        }
        if self.nodes > 1 {
            ranges.push(("--node-cidr", IpNet::V4(self.node_cidr)));
            switch::check_free(self.node_cidr)?;
            if self.node_name.is_some() {
                bail!("--node-name names one node; several are node1, node2, ...");
            }
        }
        for (index, (flag, range)) in ranges.iter().enumerate() {
            for (other, taken) in &ranges[..index] {
                if range.contains(taken) || taken.contains(range) {
                    bail!("{other} {taken} and {flag} {range} overlap");
                }
            }
        }
        Ok(())
    }

    /// The nodes.
    pub(super) fn plan(&self, layout: &Layout, machine: &Machine) -> Result<Vec<NodeConfig>> {
        (0..usize::from(self.nodes))
            .map(|index| self.plan_node(layout, machine, index))
            .collect()
    }

    fn plan_node(&self, layout: &Layout, machine: &Machine, index: usize) -> Result<NodeConfig> {
        let several = self.nodes > 1;
        let name = match (&self.node_name, several) {
            (_, true) => format!("node{}", index + 1),
            (Some(name), false) => name.clone(),
            (None, false) => machine.hostname.clone(),
        };
        let layout = layout.node(&name);
        let pod_cgroup = machine.cgroup2.join(CGROUPS).join(&name);
        let (ip, cable) = if several {
            let (ip, cable) = switch::plan(self.node_cidr, index, layout.netns())?;
            (ip, Some(cable))
        } else {
            (machine.address, None)
        };
        Ok(NodeConfig {
            ip,
            cable,
            pod_cidr: IpNet::V4(self.pod_range(index)?),
            cluster_domain: CLUSTER_DOMAIN.into(),
            kubelet_port: 10250,
            xdp: self.xdp.into(),
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

    /// A node's /24 of the pod range.
    fn pod_range(&self, index: usize) -> Result<Ipv4Net> {
        let mut subnets = self
            .pod_cidr
            .subnets(24)
            .with_context(|| format!("--pod-cidr {} must be a /24 or larger", self.pod_cidr))?;
        subnets.nth(index).with_context(|| {
            format!(
                "--pod-cidr {} has no /24 for each of {} nodes",
                self.pod_cidr, self.nodes
            )
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
        if before.is_none() && self.nodes > 1 && switch::exists().await? {
            bail!(
                "there is a device {} already: another cluster with several nodes runs on this machine, or was killed (`xebec down` with its --run-dir takes it away)",
                switch::BRIDGE
            );
        }
        Ok(())
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
            let stays = nodes
                .iter()
                .any(|node| node.name == name && spec.pod_cidr == Some(node.pod_cidr.to_string()));
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
        let up = Cli::try_parse_from([&["xebec"], args].concat())?.up;
        up.check_ranges()?;
        let layout = Layout {
            data: PathBuf::from("/d"),
            run: PathBuf::from("/r"),
        };
        let machine = Machine {
            hostname: "machine".into(),
            address: [192, 0, 2, 1].into(),
            cgroup2: PathBuf::from("/c"),
        };
        up.plan(&layout, &machine)
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
        assert_eq!(node.pod_cidr.to_string(), "10.244.0.0/24");
    }

    #[test]
    fn several_nodes_share_nothing() {
        let nodes = plan(&["--nodes", "3"]).unwrap();
        let all = |what: &dyn Fn(&NodeConfig) -> String| -> Vec<String> {
            nodes.iter().map(what).collect()
        };
        assert_eq!(all(&|node| node.name.clone()), ["node1", "node2", "node3"]);
        assert_eq!(
            all(&|node| node.pod_cidr.to_string()),
            ["10.244.0.0/24", "10.244.1.0/24", "10.244.2.0/24"]
        );
        assert_eq!(
            all(&|node| node.cgroup_root.display().to_string()),
            ["/c/xebec/node1", "/c/xebec/node2", "/c/xebec/node3"]
        );
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
        ] {
            let error = format!("{:#}", plan(args).unwrap_err());
            assert!(error.contains(says), "{args:?}: {error}");
        }
    }
}
