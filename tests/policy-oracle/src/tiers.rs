//! Which policies come first, and what is so without them.

use serde_json::Value;

use crate::admin::{self, Action, AdminPolicy, Tier};
use crate::cilium::{self, CiliumPolicy};
use crate::ends::{Party, Pod, PortProtocol};
use crate::network_policy::NetworkPolicy;
use crate::services::{self, Service};
use crate::{Cluster, Direction, Packet, RuleRef, Side, names, object};

/// All policies of a cluster, read.
pub struct Policies {
    network: Vec<NetworkPolicy>,
    admin: Vec<AdminPolicy>,
    cilium: Vec<CiliumPolicy>,
    groups: cilium::Groups,
    services: Vec<Service>,
}

/// A packet seen from the pod whose policies are asked.
pub struct View<'a> {
    pub packet: &'a Packet,
    pub direction: Direction,
    /// The pod that policies must select; of a node, what it has of one.
    pub subject: &'a Pod,
    /// Whether it is a node.
    pub is_node: bool,
    /// The other end.
    pub peer: &'a Party,
    /// Whom the packet is for.
    pub destination: &'a Party,
    /// The names that resolvers gave the other end, where it is outside.
    pub names: Vec<String>,
    /// The Services that there are.
    pub services: &'a [Service],
}

impl View<'_> {
    /// The other end's address.
    pub fn peer_address(&self) -> std::net::IpAddr {
        match self.direction {
            Direction::Ingress => self.packet.from_address,
            Direction::Egress => self.packet.to_address,
        }
    }

    /// Whether the packet is for one of these ports.
    pub fn is_for(&self, protocol: PortProtocol, first: u16, last: u16) -> bool {
        protocol.is(self.packet.protocol) && (first..=last).contains(&self.packet.port)
    }

    /// Whether the packet is for a port that the pod that receives it names so.
    pub fn is_for_named(&self, name: &str) -> bool {
        let pod = self.destination.pod();
        pod.is_some_and(|pod| pod.names_port(name, self.packet.protocol, self.packet.port))
    }
}

/// What the rules of the NetworkPolicies' tier say of a packet.
#[derive(Default)]
pub struct Found {
    /// Whether some policy isolates the pod in this direction.
    pub isolated: bool,
    /// Rules that allow the packet.
    pub allow: Vec<RuleRef>,
    /// Rules that forbid it, which beat those.
    pub deny: Vec<RuleRef>,
}

impl Policies {
    /// Reads a cluster's policies.
    pub fn of(cluster: &Cluster) -> Self {
        let mut all = Self {
            network: Vec::new(),
            admin: Vec::new(),
            cilium: Vec::new(),
            groups: cilium::Groups::new(),
            services: services::all(cluster),
        };
        for policy in &cluster.policies {
            all.add(policy);
        }
        all
    }

    fn add(&mut self, policy: &Value) {
        match (object::version(policy), object::kind(policy)) {
            ("networking.k8s.io/v1", "NetworkPolicy") => {
                self.network.push(NetworkPolicy::of(policy));
            }
            ("policy.networking.k8s.io/v1alpha2", "ClusterNetworkPolicy")
            | (
                "policy.networking.k8s.io/v1alpha1",
                "AdminNetworkPolicy" | "BaselineAdminNetworkPolicy",
            ) => self.admin.push(AdminPolicy::of(policy)),
            ("cilium.io/v2", "CiliumNetworkPolicy" | "CiliumClusterwideNetworkPolicy") => {
                self.cilium.push(CiliumPolicy::of(policy));
            }
            ("cilium.io/v2" | "cilium.io/v2alpha1", "CiliumCIDRGroup") => {
                self.groups.extend([cilium::group(policy)]);
            }
            (version, kind) => panic!("{version} {kind} is no policy that is known here"),
        }
    }
}

/// What one end's policies say of a packet.
pub fn side(
    cluster: &Cluster,
    policies: &Policies,
    packet: &Packet,
    from: &Party,
    to: &Party,
    direction: Direction,
) -> Side {
    let (own, peer) = match direction {
        Direction::Ingress => (to, from),
        Direction::Egress => (from, to),
    };
    // Cilium's policies may be for nodes; nobody's are for the outside.
    let of_node;
    let (subject, is_node) = match own {
        Party::Pod(pod) => (pod, false),
        Party::Node(node) => {
            of_node = Pod {
                namespace: String::new(),
                namespace_labels: object::Labels::new(),
                name: String::new(),
                labels: node.labels.clone(),
                node: node.name.clone(),
                ports: Vec::new(),
                service_account: String::new(),
            };
            (&of_node, true)
        }
        Party::Outside => {
            return Side {
                allowed: true,
                isolated: false,
                by: Vec::new(),
            };
        }
    };
    let address = match direction {
        Direction::Ingress => packet.from_address,
        Direction::Egress => packet.to_address,
    };
    let names = match peer {
        Party::Outside => names::of(cluster, address),
        _ => Vec::new(),
    };
    let view = View {
        names,
        services: &policies.services,
        packet,
        direction,
        subject,
        is_node,
        peer,
        destination: to,
    };
    let mut found = Found::default();
    for policy in policies.network.iter().filter(|_| !is_node) {
        policy.ask(&view, &mut found);
    }
    for policy in &policies.cilium {
        policy.ask(&policies.groups, &view, &mut found);
    }
    let (allowed, mut by) = if is_always_allowed(&view) {
        (true, Vec::new())
    } else {
        decide(policies, &view, &found)
    };
    by.sort();
    Side {
        allowed,
        isolated: found.isolated,
        by,
    }
}

/// A pod can't be kept from itself, nor its own node from it: that is where probes come from. Nor can a node from itself.
fn is_always_allowed(view: &View<'_>) -> bool {
    match view.peer {
        Party::Pod(peer) if view.is_node => {
            view.direction == Direction::Egress && peer.node == view.subject.node
        }
        Party::Node(node) if view.is_node => node.name == view.subject.node,
        Party::Pod(peer) => {
            peer.namespace == view.subject.namespace && peer.name == view.subject.name
        }
        Party::Node(node) => view.direction == Direction::Ingress && node.name == view.subject.node,
        Party::Outside => false,
    }
}

/// Whether a packet is allowed, and by which rules. A tier that has no rule for it, or passes it on, leaves it to the
/// next one; after the last, all is allowed.
fn decide(policies: &Policies, view: &View<'_>, found: &Found) -> (bool, Vec<RuleRef>) {
    let admin = match view.is_node {
        true => &[][..],
        false => &policies.admin[..],
    };
    match admin::first(admin, Tier::Admin, view) {
        Some((Action::Accept | Action::Allow, rule)) => return (true, vec![rule]),
        Some((Action::Deny, rule)) => return (false, vec![rule]),
        Some((Action::Pass, _)) | None => {}
    }
    if !found.deny.is_empty() {
        return (false, found.deny.clone());
    }
    if !found.allow.is_empty() {
        return (true, found.allow.clone());
    }
    if found.isolated {
        return (false, Vec::new());
    }
    match admin::first(admin, Tier::Baseline, view) {
        Some((Action::Deny, rule)) => (false, vec![rule]),
        Some((Action::Accept | Action::Allow, rule)) => (true, vec![rule]),
        Some((Action::Pass, _)) | None => (true, Vec::new()),
    }
}
