//! NodeName, NodeUnschedulable and NodePorts: plain yes-or-no looks at a node.

use crate::framework::{Filter, Plugin, Refusal};
use crate::plugins::taint_toleration::tolerates;
use crate::view::{NodeInfo, PodView};
use k8s_openapi::api::core::v1::Taint;

/// A pod that names its node goes there or nowhere.
pub struct NodeName;
/// A cordoned node takes no new pods, unless they tolerate it.
pub struct NodeUnschedulable;
/// A host port can be given once.
pub struct NodePorts;

impl Plugin for NodeName {
    fn name(&self) -> &'static str {
        "NodeName"
    }
}

impl Filter for NodeName {
    fn filter(&self, pod: &PodView, node: &NodeInfo) -> Result<(), Refusal> {
        match &pod.node_name {
            Some(name) if *name != node.node.name => Err(Refusal::unresolvable(
                "node(s) didn't match the requested node name",
            )),
            _ => Ok(()),
        }
    }
}

impl Plugin for NodeUnschedulable {
    fn name(&self) -> &'static str {
        "NodeUnschedulable"
    }
}

impl Filter for NodeUnschedulable {
    fn filter(&self, pod: &PodView, node: &NodeInfo) -> Result<(), Refusal> {
        let taint = Taint {
            key: "node.kubernetes.io/unschedulable".into(),
            effect: "NoSchedule".into(),
            ..Taint::default()
        };
        if node.node.unschedulable && !tolerates(&pod.tolerations, &taint) {
            return Err(Refusal::unresolvable("node(s) were unschedulable"));
        }
        Ok(())
    }
}

impl Plugin for NodePorts {
    fn name(&self) -> &'static str {
        "NodePorts"
    }
}

impl Filter for NodePorts {
    fn filter(&self, pod: &PodView, node: &NodeInfo) -> Result<(), Refusal> {
        let clash = |wanted: &(String, String, i32)| {
            node.host_ports.iter().any(|used| {
                let same_address =
                    used.1 == wanted.1 || used.1 == "0.0.0.0" || wanted.1 == "0.0.0.0";
                used.0 == wanted.0 && used.2 == wanted.2 && same_address
            })
        };
        if pod.host_ports.iter().any(clash) {
            return Err(Refusal::new(
                "node(s) didn't have free ports for the requested pod ports",
            ));
        }
        Ok(())
    }
}
