//! Who the two ends of a packet are.

use std::net::IpAddr;

use serde::Deserialize;
use serde_json::Value;

use crate::object::{self, Labels, Metadata};
use crate::{Cluster, End, Protocol};

/// Who an end is to policies.
pub enum Party {
    /// A pod with an address of its own.
    Pod(Pod),
    /// A node, or a pod with hostNetwork, which is its node.
    Node(Node),
    /// Anybody else.
    Outside,
}

/// A pod.
pub struct Pod {
    pub namespace: String,
    pub namespace_labels: Labels,
    pub name: String,
    pub labels: Labels,
    /// The node it runs on.
    pub node: String,
    /// Its containers' ports, those of init sidecars among them.
    pub ports: Vec<ContainerPort>,
    pub service_account: String,
}

/// A node.
pub struct Node {
    pub name: String,
    pub labels: Labels,
    /// Those in its status.
    pub addresses: Vec<IpAddr>,
}

/// A port that a container names.
#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct ContainerPort {
    name: Option<String>,
    #[serde(default)]
    protocol: PortProtocol,
    container_port: u16,
}

/// A protocol that has ports.
#[derive(Clone, Copy, Default, Deserialize, PartialEq)]
#[serde(rename_all = "UPPERCASE")]
pub enum PortProtocol {
    #[default]
    Tcp,
    Udp,
    Sctp,
}

impl PortProtocol {
    /// Whether a packet is of this protocol.
    pub fn is(self, protocol: Protocol) -> bool {
        match self {
            Self::Tcp => protocol == Protocol::Tcp,
            Self::Udp => protocol == Protocol::Udp,
            Self::Sctp => protocol == Protocol::Sctp,
        }
    }
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct PodSpec {
    node_name: Option<String>,
    #[serde(default)]
    host_network: bool,
    service_account_name: Option<String>,
    containers: Option<Vec<Container>>,
    init_containers: Option<Vec<Container>>,
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct Container {
    ports: Option<Vec<ContainerPort>>,
    restart_policy: Option<String>,
}

/// Whether a pod has ended, and so has no address any more.
pub fn is_finished(pod: &Value) -> bool {
    matches!(
        pod["status"]["phase"].as_str(),
        Some("Succeeded" | "Failed")
    )
}

/// Whether a pod is its node.
pub fn is_host_network(pod: &Value) -> bool {
    pod["spec"]["hostNetwork"] == true
}

/// The addresses in a pod's status.
pub fn pod_addresses(pod: &Value) -> Vec<IpAddr> {
    addresses(&pod["status"]["podIPs"], "ip")
}

/// The addresses in a node's status.
pub fn node_addresses(node: &Value) -> Vec<IpAddr> {
    addresses(&node["status"]["addresses"], "address")
}

fn addresses(list: &Value, field: &str) -> Vec<IpAddr> {
    let list = list.as_array().into_iter().flatten();
    list.filter_map(|one| one[field].as_str()?.parse().ok())
        .collect()
}

impl Party {
    /// Looks an end up.
    pub fn of(cluster: &Cluster, end: &End) -> Self {
        match end {
            End::Address => Self::Outside,
            End::Node(name) => Self::Node(Node::of(cluster, name)),
            End::Pod { namespace, name } => {
                let pod = find(&cluster.pods, namespace, name)
                    .unwrap_or_else(|| panic!("no pod {namespace}/{name}"));
                if is_finished(pod) {
                    return Self::Outside;
                }
                let spec: PodSpec = object::read(pod, "spec");
                let node = spec.node_name.unwrap_or_else(|| {
                    panic!("pod {namespace}/{name} is on no node, so no packet is its")
                });
                if spec.host_network {
                    return Self::Node(Node::of(cluster, &node));
                }
                let home = find(&cluster.namespaces, "", namespace)
                    .unwrap_or_else(|| panic!("no namespace {namespace}, of pod {name}"));
                let sidecars = spec.init_containers.into_iter().flatten();
                let sidecars =
                    sidecars.filter(|one| one.restart_policy.as_deref() == Some("Always"));
                let containers = spec.containers.into_iter().flatten().chain(sidecars);
                let Metadata { labels, .. } = object::metadata(pod);
                Self::Pod(Pod {
                    namespace: namespace.clone(),
                    namespace_labels: object::metadata(home).labels.unwrap_or_default(),
                    name: name.clone(),
                    labels: labels.unwrap_or_default(),
                    node,
                    ports: containers
                        .flat_map(|one| one.ports.unwrap_or_default())
                        .collect(),
                    service_account: spec.service_account_name.unwrap_or("default".into()),
                })
            }
        }
    }

    /// The pod, if it is one.
    pub fn pod(&self) -> Option<&Pod> {
        match self {
            Self::Pod(pod) => Some(pod),
            _ => None,
        }
    }
}

impl Node {
    fn of(cluster: &Cluster, name: &str) -> Self {
        let node = find(&cluster.nodes, "", name).unwrap_or_else(|| panic!("no node {name}"));
        Self {
            name: name.to_owned(),
            labels: object::metadata(node).labels.unwrap_or_default(),
            addresses: node_addresses(node),
        }
    }
}

/// Whether a cluster has an end.
pub fn is_in(cluster: &Cluster, end: &End) -> bool {
    match end {
        End::Pod { namespace, name } => find(&cluster.pods, namespace, name).is_some(),
        End::Node(name) => find(&cluster.nodes, "", name).is_some(),
        End::Address => true,
    }
}

fn find<'a>(objects: &'a [Value], namespace: &str, name: &str) -> Option<&'a Value> {
    objects.iter().find(|one| {
        let metadata = object::metadata(one);
        metadata.namespace == namespace && metadata.name == name
    })
}

impl Pod {
    /// Whether a port is named so for its protocol.
    pub fn names_port(&self, name: &str, protocol: Protocol, port: u16) -> bool {
        self.ports.iter().any(|one| {
            one.name.as_deref() == Some(name)
                && one.protocol.is(protocol)
                && one.container_port == port
        })
    }
}
