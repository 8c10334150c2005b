//! An object of whichever kind, read.

use serde_json::Value;

use crate::places::Group;
use crate::rule::{Policy, Source};
use crate::{admin_network_policy, cilium, cluster_network_policy, network_policy};

/// What an object says.
#[derive(Debug)]
pub enum Said {
    /// Policies.
    Policies(Vec<Policy>),
    /// Address blocks that policies name.
    Group(Group),
}

/// What an object of this kind says, and what is wrong with it.
pub fn read(source: Source, object: &Value) -> (Said, Vec<String>) {
    let (policies, errors) = match source {
        Source::NetworkPolicy => match serde_json::from_value(object.clone()) {
            Err(error) => (Vec::new(), vec![error.to_string()]),
            Ok(policy) => {
                let (policy, errors) = network_policy::read(&policy);
                (vec![policy], errors)
            }
        },
        Source::ClusterNetworkPolicy => cluster_network_policy::read(object),
        Source::AdminNetworkPolicy => admin_network_policy::read(object),
        Source::BaselineAdminNetworkPolicy => admin_network_policy::read_baseline(object),
        Source::CiliumNetworkPolicy => cilium::read(object),
        Source::CiliumClusterwideNetworkPolicy => cilium::read_clusterwide(object),
        Source::CiliumCidrGroup => {
            let (group, errors) = cilium::group::read(object);
            return (Said::Group(group), errors);
        }
    };
    (Said::Policies(policies), errors)
}
