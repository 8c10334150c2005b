//! Says what policies allow, read off the API objects rule by rule, as plainly and slowly as can be.
//!
//! Tests compare the real compiler with it, so it is written from the APIs' documentation alone and shares no code with
//! the rest of Xebec. It is strict: an object that it can't read, a field that it doesn't know among them, is a panic.
//!
//! | kinds | what is not understood yet |
//! |---|---|
//! | NetworkPolicy | |
//! | ClusterNetworkPolicy, AdminNetworkPolicy, BaselineAdminNetworkPolicy | |
//! | CiliumNetworkPolicy, CiliumClusterwideNetworkPolicy, CiliumCIDRGroup | fromNodes, toNodes, fromGroups, toGroups, cidrGroupSelector, the entity kube-apiserver, authentication, and all that is about what connections carry (rules, serverNames, TLS, listener): a policy that has any of them is a panic |

use std::net::IpAddr;

use serde_json::Value;

mod admin;
mod cilium;
mod ends;
mod names;
mod network_policy;
mod object;
pub mod random;
mod selector;
mod services;
pub mod shrink;
#[cfg(test)]
mod testing;
mod tiers;

/// A cluster: API objects, each with apiVersion and kind.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Cluster {
    /// Namespaces; each namespace of a pod must be there.
    pub namespaces: Vec<Value>,
    /// Pods, with their status.
    pub pods: Vec<Value>,
    /// Nodes, with their status.
    pub nodes: Vec<Value>,
    /// Policies of every kind.
    pub policies: Vec<Value>,
    /// Services.
    pub services: Vec<Value>,
    /// EndpointSlices, of Services without a selector.
    pub slices: Vec<Value>,
    /// What resolvers answered.
    pub answers: Vec<Answer>,
    /// The time, as answers have it.
    pub now: u64,
}

/// An address that a resolver gave a name.
#[derive(Clone, Debug, PartialEq)]
pub struct Answer {
    /// The name that was asked for.
    pub name: String,
    /// One of its addresses.
    pub address: IpAddr,
    /// The last moment at which it holds.
    pub until: u64,
}

/// Who sends or receives.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum End {
    /// A pod; one with hostNetwork is its node.
    Pod {
        /// Its namespace.
        namespace: String,
        /// Its name.
        name: String,
    },
    /// A node, by name.
    Node(String),
    /// Nobody the cluster knows.
    Address,
}

/// What a packet carries.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Protocol {
    /// TCP.
    Tcp,
    /// UDP.
    Udp,
    /// SCTP.
    Sctp,
    /// ICMP, or ICMPv6 where addresses are IPv6.
    Icmp,
}

/// A packet that begins a flow.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Packet {
    /// Who sends it.
    pub from: End,
    /// The sender's address.
    pub from_address: IpAddr,
    /// Who receives it, after a Service's address became a backend's.
    pub to: End,
    /// The receiver's address.
    pub to_address: IpAddr,
    /// What it carries.
    pub protocol: Protocol,
    /// The destination's port; for ICMP type << 8 | code.
    pub port: u16,
}

impl Packet {
    /// Whether the cluster has both ends, so that it can be judged.
    pub fn is_in(&self, cluster: &Cluster) -> bool {
        [&self.from, &self.to]
            .into_iter()
            .all(|end| ends::is_in(cluster, end))
    }
}

/// Which way a packet goes, seen from the pod that a policy is about.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
enum Direction {
    Ingress,
    Egress,
}

/// What one end's policies say.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Side {
    /// Whether they let the packet pass.
    pub allowed: bool,
    /// Whether what no rule of the NetworkPolicies' tier allows is forbidden in this direction, whichever tier decided.
    pub isolated: bool,
    /// The rules that decided, sorted; none where no rule matched.
    pub by: Vec<RuleRef>,
}

/// Where a rule stands.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct RuleRef {
    /// The policy's kind.
    pub kind: String,
    /// The policy's namespace; empty for one of the whole cluster.
    pub namespace: String,
    /// The policy's name.
    pub name: String,
    /// The list: ingress, egress, ingressDeny or egressDeny.
    pub list: String,
    /// The place in the list, from 0; Cilium's `specs` go on counting where those before them end.
    pub index: usize,
}

/// What becomes of a packet.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Verdict {
    /// Whether both sides allow it.
    pub allowed: bool,
    /// What the sender's policies say.
    pub egress: Side,
    /// What the receiver's policies say.
    pub ingress: Side,
}

/// Whether a packet that begins a flow is allowed.
///
/// # Panics
/// If an object can't be read, or an end isn't in the cluster.
pub fn judge(cluster: &Cluster, packet: &Packet) -> Verdict {
    let from = ends::Party::of(cluster, &packet.from);
    let to = ends::Party::of(cluster, &packet.to);
    let policies = tiers::Policies::of(cluster);
    let egress = tiers::side(cluster, &policies, packet, &from, &to, Direction::Egress);
    let ingress = tiers::side(cluster, &policies, packet, &from, &to, Direction::Ingress);
    Verdict {
        allowed: egress.allowed && ingress.allowed,
        egress,
        ingress,
    }
}
