//! The policies of administrators: `policy.networking.k8s.io` ClusterNetworkPolicy (v1alpha2), AdminNetworkPolicy and
//! BaselineAdminNetworkPolicy (v1alpha1).
//!
//! The first rule that matches decides: policies go by priority and then by name, rules as they stand in the list.

use ipnet::IpNet;
use serde::Deserialize;
use serde_json::Value;

use crate::ends::{Party, Pod, PortProtocol};
use crate::object;
use crate::selector::Selector;
use crate::tiers::View;
use crate::{Direction, RuleRef, names};

/// A policy of any of these kinds.
pub struct AdminPolicy {
    kind: String,
    name: String,
    tier: Tier,
    /// A BaselineAdminNetworkPolicy has none, and comes after the others of its tier.
    priority: Option<u16>,
    spec: Spec,
}

/// Before or after NetworkPolicies.
#[derive(Clone, Copy, Debug, Deserialize, PartialEq)]
pub enum Tier {
    Admin,
    Baseline,
}

/// What all kinds may have; which of it is whose is checked when one is read.
#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Spec {
    tier: Option<Tier>,
    priority: Option<u16>,
    subject: Pods,
    ingress: Option<Vec<Rule>>,
    egress: Option<Vec<Rule>>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Rule {
    #[serde(rename = "name")]
    _name: Option<String>,
    action: Action,
    from: Option<Vec<Peer>>,
    to: Option<Vec<Peer>>,
    /// Of v1alpha1.
    ports: Option<Vec<Port>>,
    /// Of v1alpha2.
    protocols: Option<Vec<PortOfProtocol>>,
}

/// What a rule does with a packet.
#[derive(Clone, Copy, Debug, Deserialize, PartialEq)]
pub enum Action {
    /// v1alpha2's word for Allow.
    Accept,
    Allow,
    Deny,
    /// On to the next tier.
    Pass,
}

/// Pods by their namespaces, or by those and their own labels.
#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
enum Pods {
    Namespaces(Selector),
    Pods(PodsOfNamespaces),
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields, rename_all = "camelCase")]
struct PodsOfNamespaces {
    namespace_selector: Option<Selector>,
    pod_selector: Selector,
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
enum Peer {
    Namespaces(Selector),
    Pods(PodsOfNamespaces),
    Nodes(Selector),
    Networks(Vec<IpNet>),
    /// Those outside with addresses by such names.
    DomainNames(Vec<String>),
}

#[derive(Deserialize)]
enum Port {
    #[serde(rename = "portNumber")]
    Number(PortNumber),
    #[serde(rename = "portRange")]
    Range(PortRange),
    #[serde(rename = "namedPort")]
    Named(String),
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct PortNumber {
    #[serde(default)]
    protocol: PortProtocol,
    port: u16,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct PortRange {
    #[serde(default)]
    protocol: PortProtocol,
    start: u16,
    end: u16,
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
enum PortOfProtocol {
    Tcp(Destination),
    Udp(Destination),
    Sctp(Destination),
    DestinationNamedPort(String),
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields, rename_all = "camelCase")]
struct Destination {
    destination_port: DestinationPort,
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
enum DestinationPort {
    Number(u16),
    Range(DestinationRange),
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct DestinationRange {
    start: u16,
    end: u16,
}

impl AdminPolicy {
    /// Reads one.
    pub fn of(policy: &Value) -> Self {
        let kind = object::kind(policy);
        let spec: Spec = object::read(policy, "spec");
        let check = |is: bool, what: &str| assert!(is, "{what}: {policy}");
        let (tier, priority) = match kind {
            "ClusterNetworkPolicy" => {
                check(spec.tier.is_some(), "there must be a tier");
                check(spec.priority.is_some(), "there must be a priority");
                (spec.tier.unwrap_or(Tier::Admin), spec.priority)
            }
            "AdminNetworkPolicy" => {
                check(spec.tier.is_none(), "there is no tier in this kind");
                check(spec.priority.is_some(), "there must be a priority");
                (Tier::Admin, spec.priority)
            }
            _ => {
                check(spec.tier.is_none(), "there is no tier in this kind");
                check(spec.priority.is_none(), "there is no priority in this kind");
                (Tier::Baseline, None)
            }
        };
        check(
            priority.is_none_or(|one| one <= 1000),
            "a priority is 0 to 1000",
        );
        let actions: &[Action] = match kind {
            "ClusterNetworkPolicy" => &[Action::Accept, Action::Deny, Action::Pass],
            "AdminNetworkPolicy" => &[Action::Allow, Action::Deny, Action::Pass],
            _ => &[Action::Allow, Action::Deny],
        };
        for direction in [Direction::Ingress, Direction::Egress] {
            for rule in spec.rules(direction) {
                let (own, other) = match direction {
                    Direction::Ingress => (&rule.from, &rule.to),
                    Direction::Egress => (&rule.to, &rule.from),
                };
                check(other.is_none(), "peers must be of the rule's direction");
                check(
                    own.as_ref().is_some_and(|one| !one.is_empty()),
                    "there must be peers",
                );
                check(
                    actions.contains(&rule.action),
                    "the action is not of this kind",
                );
                let foreign = match kind {
                    "ClusterNetworkPolicy" => rule.ports.is_some(),
                    _ => rule.protocols.is_some(),
                };
                check(!foreign, "ports must be of this kind's form");
                let no_ports = rule.ports.as_ref().is_some_and(Vec::is_empty);
                let no_protocols = rule.protocols.as_ref().is_some_and(Vec::is_empty);
                check(!no_ports && !no_protocols, "a list of ports has some");
                for peer in own.iter().flatten() {
                    match peer {
                        Peer::Namespaces(_) | Peer::Pods(_) => {}
                        _ => check(direction == Direction::Egress, "senders are pods"),
                    }
                    match peer {
                        Peer::Networks(list) => check(!list.is_empty(), "there must be networks"),
                        Peer::DomainNames(list) => {
                            check(!list.is_empty(), "there must be names");
                            check(
                                kind != "BaselineAdminNetworkPolicy",
                                "no names in this kind",
                            );
                            let allows = matches!(rule.action, Action::Accept | Action::Allow);
                            check(allows, "names are for rules that allow");
                        }
                        _ => {}
                    }
                }
            }
        }
        Self {
            kind: kind.to_owned(),
            name: object::metadata(policy).name,
            tier,
            priority,
            spec,
        }
    }

    /// The first rule that matches a packet, if it is a policy of this pod.
    fn first(&self, view: &View<'_>) -> Option<(Action, RuleRef)> {
        if !self.spec.subject.has(view.subject) {
            return None;
        }
        let rules = self.spec.rules(view.direction);
        let (index, rule) = rules.iter().enumerate().find(|(_, rule)| rule.is(view))?;
        let list = match view.direction {
            Direction::Ingress => "ingress",
            Direction::Egress => "egress",
        };
        let place = RuleRef {
            kind: self.kind.clone(),
            namespace: String::new(),
            name: self.name.clone(),
            list: list.into(),
            index,
        };
        Some((rule.action, place))
    }
}

/// The first rule of a tier that matches a packet. The API leaves open who comes first among policies of one priority;
/// here it is by name, and then by kind.
pub fn first(policies: &[AdminPolicy], tier: Tier, view: &View<'_>) -> Option<(Action, RuleRef)> {
    let mut policies: Vec<&AdminPolicy> = policies.iter().filter(|one| one.tier == tier).collect();
    policies.sort_by_key(|one| (one.priority.is_none(), one.priority, &one.name, &one.kind));
    policies.into_iter().find_map(|one| one.first(view))
}

impl Spec {
    fn rules(&self, direction: Direction) -> &[Rule] {
        let rules = match direction {
            Direction::Ingress => &self.ingress,
            Direction::Egress => &self.egress,
        };
        rules.as_deref().unwrap_or_default()
    }
}

impl Rule {
    fn is(&self, view: &View<'_>) -> bool {
        let peers = || self.from.iter().chain(&self.to).flatten();
        let is_peer = peers().any(|one| one.is(view));
        let is_port = match (&self.ports, &self.protocols) {
            (None, None) => true,
            (ports, protocols) => {
                ports.iter().flatten().any(|one| one.is(view))
                    || protocols.iter().flatten().any(|one| one.is(view))
            }
        };
        is_peer && is_port
    }
}

impl Pods {
    fn has(&self, pod: &Pod) -> bool {
        match self {
            Self::Namespaces(selector) => selector.matches(&pod.namespace_labels),
            Self::Pods(pods) => pods.has(pod),
        }
    }
}

impl PodsOfNamespaces {
    fn has(&self, pod: &Pod) -> bool {
        let namespaces = self.namespace_selector.as_ref();
        namespaces.is_none_or(|one| one.matches(&pod.namespace_labels))
            && self.pod_selector.matches(&pod.labels)
    }
}

impl Peer {
    /// Whether the other end is this peer. Networks are of addresses, whosever they are.
    fn is(&self, view: &View<'_>) -> bool {
        let address = view.peer_address();
        match (self, view.peer) {
            (Self::Namespaces(selector), Party::Pod(pod)) => {
                selector.matches(&pod.namespace_labels)
            }
            (Self::Pods(pods), Party::Pod(pod)) => pods.has(pod),
            (Self::Nodes(selector), Party::Node(node)) => {
                selector.matches(&node.labels) && node.addresses.contains(&address)
            }
            (Self::DomainNames(list), Party::Outside) => {
                let mut names = view.names.iter();
                names.any(|name| list.iter().any(|one| names::is_domain(name, one)))
            }
            (Self::Networks(list), _) => list.iter().any(|one| one.contains(&address)),
            _ => false,
        }
    }
}

impl Port {
    fn is(&self, view: &View<'_>) -> bool {
        match self {
            Self::Number(one) => view.is_for(one.protocol, one.port, one.port),
            Self::Range(one) => view.is_for(one.protocol, one.start, one.end),
            Self::Named(name) => view.is_for_named(name),
        }
    }
}

impl PortOfProtocol {
    fn is(&self, view: &View<'_>) -> bool {
        let (protocol, destination) = match self {
            Self::Tcp(one) => (PortProtocol::Tcp, one),
            Self::Udp(one) => (PortProtocol::Udp, one),
            Self::Sctp(one) => (PortProtocol::Sctp, one),
            Self::DestinationNamedPort(name) => return view.is_for_named(name),
        };
        match &destination.destination_port {
            DestinationPort::Number(port) => view.is_for(protocol, *port, *port),
            DestinationPort::Range(range) => view.is_for(protocol, range.start, range.end),
        }
    }
}

#[cfg(test)]
mod tests;
