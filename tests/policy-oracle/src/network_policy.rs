//! `networking.k8s.io/v1` NetworkPolicy.

use ipnet::IpNet;
use serde::Deserialize;
use serde_json::Value;

use crate::ends::{Party, PortProtocol};
use crate::object;
use crate::selector::Selector;
use crate::tiers::{Found, View};
use crate::{Direction, RuleRef};

/// A NetworkPolicy.
pub struct NetworkPolicy {
    namespace: String,
    name: String,
    spec: Spec,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields, rename_all = "camelCase")]
struct Spec {
    pod_selector: Option<Selector>,
    policy_types: Option<Vec<PolicyType>>,
    ingress: Option<Vec<IngressRule>>,
    egress: Option<Vec<EgressRule>>,
}

#[derive(Clone, Copy, Deserialize, PartialEq)]
enum PolicyType {
    Ingress,
    Egress,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct IngressRule {
    from: Option<Vec<Peer>>,
    ports: Option<Vec<Port>>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct EgressRule {
    to: Option<Vec<Peer>>,
    ports: Option<Vec<Port>>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields, rename_all = "camelCase")]
struct Peer {
    pod_selector: Option<Selector>,
    namespace_selector: Option<Selector>,
    ip_block: Option<Block>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Block {
    cidr: IpNet,
    except: Option<Vec<IpNet>>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields, rename_all = "camelCase")]
struct Port {
    protocol: Option<PortProtocol>,
    port: Option<NumberOrName>,
    end_port: Option<u16>,
}

#[derive(Deserialize)]
#[serde(untagged)]
enum NumberOrName {
    Number(u16),
    Name(String),
}

/// A rule of either direction; lists that are empty or missing match everything.
struct Rule<'a> {
    peers: &'a [Peer],
    ports: &'a [Port],
}

impl<'a> Rule<'a> {
    fn of(peers: &'a Option<Vec<Peer>>, ports: &'a Option<Vec<Port>>) -> Self {
        Self {
            peers: peers.as_deref().unwrap_or_default(),
            ports: ports.as_deref().unwrap_or_default(),
        }
    }
}

impl Spec {
    fn rules(&self, direction: Direction) -> Vec<Rule<'_>> {
        match direction {
            Direction::Ingress => {
                let rules = self.ingress.iter().flatten();
                rules.map(|one| Rule::of(&one.from, &one.ports)).collect()
            }
            Direction::Egress => {
                let rules = self.egress.iter().flatten();
                rules.map(|one| Rule::of(&one.to, &one.ports)).collect()
            }
        }
    }
}

impl NetworkPolicy {
    /// Reads one.
    pub fn of(policy: &Value) -> Self {
        let metadata = object::metadata(policy);
        let spec: Spec = object::read(policy, "spec");
        let (ingress, egress) = (
            spec.rules(Direction::Ingress),
            spec.rules(Direction::Egress),
        );
        for rule in ingress.iter().chain(&egress) {
            for peer in rule.peers {
                let selects = peer.pod_selector.is_some() || peer.namespace_selector.is_some();
                if selects == peer.ip_block.is_some() {
                    panic!("a peer must be either a block or selectors: {policy}");
                }
            }
            for port in rule.ports {
                if port.end_port.is_some() && !matches!(port.port, Some(NumberOrName::Number(_))) {
                    panic!("endPort goes with a port's number: {policy}");
                }
            }
        }
        Self {
            namespace: metadata.namespace,
            name: metadata.name,
            spec,
        }
    }

    /// Adds what its rules say of a packet.
    pub fn ask(&self, view: &View<'_>, found: &mut Found) {
        let subject = view.subject;
        let selects = self
            .spec
            .pod_selector
            .as_ref()
            .is_none_or(|one| one.matches(&subject.labels));
        if self.namespace != subject.namespace || !selects || !self.is_about(view.direction) {
            return;
        }
        found.isolated = true;
        let list = match view.direction {
            Direction::Ingress => "ingress",
            Direction::Egress => "egress",
        };
        for (index, rule) in self.spec.rules(view.direction).iter().enumerate() {
            let mut peers = rule.peers.iter();
            let mut ports = rule.ports.iter();
            let is_peer = rule.peers.is_empty() || peers.any(|one| one.is(view, &self.namespace));
            let is_port = rule.ports.is_empty() || ports.any(|one| one.is(view));
            if is_peer && is_port {
                found.allow.push(RuleRef {
                    kind: "NetworkPolicy".into(),
                    namespace: self.namespace.clone(),
                    name: self.name.clone(),
                    list: list.into(),
                    index,
                });
            }
        }
    }

    /// Whether it isolates its pods in a direction. Without types, it does for ingress, and for egress if it has such
    /// rules.
    fn is_about(&self, direction: Direction) -> bool {
        let types = self.spec.policy_types.as_deref().unwrap_or_default();
        match direction {
            Direction::Ingress => types.is_empty() || types.contains(&PolicyType::Ingress),
            Direction::Egress if types.is_empty() => self
                .spec
                .egress
                .as_ref()
                .is_some_and(|rules| !rules.is_empty()),
            Direction::Egress => types.contains(&PolicyType::Egress),
        }
    }
}

impl Peer {
    /// Whether the other end is this peer. A block is of addresses, whosever they are; selectors are of pods, those of
    /// the policy's own namespace where no namespaces are selected.
    fn is(&self, view: &View<'_>, namespace: &str) -> bool {
        if let Some(block) = &self.ip_block {
            let address = view.peer_address();
            let mut holes = block.except.iter().flatten();
            return block.cidr.contains(&address) && !holes.any(|one| one.contains(&address));
        }
        let Party::Pod(pod) = view.peer else {
            return false;
        };
        let in_namespace = match &self.namespace_selector {
            Some(selector) => selector.matches(&pod.namespace_labels),
            None => pod.namespace == namespace,
        };
        let selects = self.pod_selector.as_ref();
        in_namespace && selects.is_none_or(|one| one.matches(&pod.labels))
    }
}

impl Port {
    /// Whether the packet is for this port. A name is one of the pod that receives it.
    fn is(&self, view: &View<'_>) -> bool {
        let protocol = self.protocol.unwrap_or_default();
        match &self.port {
            None => protocol.is(view.packet.protocol),
            Some(NumberOrName::Number(first)) => {
                view.is_for(protocol, *first, self.end_port.unwrap_or(*first))
            }
            Some(NumberOrName::Name(name)) => {
                protocol.is(view.packet.protocol) && view.is_for_named(name)
            }
        }
    }
}

#[cfg(test)]
mod tests;
