//! The built-in plugins, under upstream's names.

mod default_binder;
mod node_affinity;
mod node_resources;
mod node_state;
mod scheduling_gates;
mod taint_toleration;

use std::sync::Arc;

use crate::framework::Profile;

pub use default_binder::DefaultBinder;
pub use node_affinity::NodeAffinity;
pub use node_resources::NodeResourcesFit;
pub use node_state::{NodeName, NodePorts, NodeUnschedulable};
pub use scheduling_gates::SchedulingGates;
pub use taint_toleration::TaintToleration;

/// The profile `default-scheduler` with upstream's plugin order and weights, as far as they exist here.
pub fn default_profile(client: kube::Client) -> Profile {
    let (affinity, taints, fit) = (
        Arc::new(NodeAffinity),
        Arc::new(TaintToleration),
        Arc::new(NodeResourcesFit),
    );
    Profile {
        scheduler_name: "default-scheduler".into(),
        pre_enqueue: vec![Arc::new(SchedulingGates)],
        pre_filter: vec![affinity.clone()],
        filter: vec![
            Arc::new(NodeUnschedulable),
            Arc::new(NodeName),
            taints.clone(),
            affinity.clone(),
            Arc::new(NodePorts),
            fit.clone(),
        ],
        score: vec![(taints, 3), (affinity, 2), (fit, 1)],
        bind: vec![Arc::new(DefaultBinder::new(client))],
        ..Profile::default()
    }
}
