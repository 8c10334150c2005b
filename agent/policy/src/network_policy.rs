//! `networking.k8s.io/v1 NetworkPolicy`.

use std::collections::BTreeSet;
use std::sync::Arc;

use ipnet::IpNet;
use k8s_openapi::api::networking::v1::{
    IPBlock, NetworkPolicy, NetworkPolicyPeer, NetworkPolicyPort, NetworkPolicySpec,
};
use k8s_openapi::apimachinery::pkg::util::intstr::IntOrString;
use xebec_dataplane_common::{SCTP, TCP, UDP};

use crate::object::AUDIT;
use crate::rule::{Action, Block, Direction, Peer, Policy, PolicyRef, Ports, Rule, Source, Tier};
use crate::selector::{Key, Selector, Test, requirements};

/// Where a NetworkPolicy is.
pub fn id(policy: &NetworkPolicy) -> PolicyRef {
    PolicyRef {
        source: Source::NetworkPolicy,
        namespace: policy.metadata.namespace.clone().unwrap_or_default(),
        name: policy.metadata.name.clone().unwrap_or_default(),
    }
}

/// Reads a NetworkPolicy. What can't be understood is an error, and what stands in for it meanwhile: the same policy
/// without the rules that are wrong, so that it lets less through, not more.
pub fn read(policy: &NetworkPolicy) -> (Policy, Vec<String>) {
    let id = Arc::new(id(policy));
    let spec = policy.spec.clone().unwrap_or_default();
    let mut errors = Vec::new();
    let subject = match selector(spec.pod_selector.as_ref(), &id.namespace) {
        Ok(selector) => selector,
        Err(error) => {
            errors.push(format!("spec.podSelector: {error}"));
            // It is not known for whom it is: for everybody in the namespace.
            own(&id.namespace).into_iter().collect()
        }
    };
    let mut rules = Vec::new();
    for (direction, list, index, peers, ports) in listed(&spec) {
        match rule(&id.namespace, direction, peers, ports) {
            Ok((peers, ports)) => rules.push(Rule {
                direction,
                list,
                index,
                action: Action::Allow,
                peers,
                ports,
            }),
            Err(error) => errors.push(format!("spec.{list}[{index}]{error}")),
        }
    }
    let audit = policy.metadata.annotations.as_ref();
    let policy = Policy {
        id,
        tier: Tier::Network,
        priority: 0,
        subject: Arc::new(Selector::from_iter(subject)),
        for_nodes: false,
        isolates: Direction::ALL.map(|direction| isolates(&spec, direction)),
        audit: audit.is_some_and(|all| all.get(AUDIT).is_some_and(|value| value == "true")),
        rules,
    };
    (policy, errors)
}

/// Whether a policy isolates in a direction (`spec.policyTypes` and its default).
fn isolates(spec: &NetworkPolicySpec, direction: Direction) -> bool {
    match &spec.policy_types {
        Some(types) if !types.is_empty() => types.iter().any(|one| one == direction.name()),
        _ => {
            direction == Direction::Ingress
                || spec.egress.as_ref().is_some_and(|all| !all.is_empty())
        }
    }
}

type Listed<'a> = (
    Direction,
    &'static str,
    usize,
    &'a [NetworkPolicyPeer],
    &'a [NetworkPolicyPort],
);

/// All rules of the directions in which it isolates.
fn listed(spec: &NetworkPolicySpec) -> Vec<Listed<'_>> {
    let mut all = Vec::new();
    if isolates(spec, Direction::Ingress) {
        for (index, rule) in spec.ingress.iter().flatten().enumerate() {
            let (peers, ports) = (rule.from.as_deref(), rule.ports.as_deref());
            let (peers, ports) = (peers.unwrap_or_default(), ports.unwrap_or_default());
            all.push((Direction::Ingress, "ingress", index, peers, ports));
        }
    }
    if isolates(spec, Direction::Egress) {
        for (index, rule) in spec.egress.iter().flatten().enumerate() {
            let (peers, ports) = (rule.to.as_deref(), rule.ports.as_deref());
            let (peers, ports) = (peers.unwrap_or_default(), ports.unwrap_or_default());
            all.push((Direction::Egress, "egress", index, peers, ports));
        }
    }
    all
}

fn rule(
    namespace: &str,
    direction: Direction,
    peers: &[NetworkPolicyPeer],
    ports: &[NetworkPolicyPort],
) -> Result<(Vec<Peer>, Vec<Ports>), String> {
    let word = match direction {
        Direction::Ingress => "from",
        Direction::Egress => "to",
    };
    let mut whom = Vec::new();
    for (at, one) in peers.iter().enumerate() {
        whom.push(peer(one, namespace).map_err(|error| format!(".{word}[{at}]: {error}"))?);
    }
    if whom.is_empty() {
        whom.push(Peer::Anybody);
    }
    let mut what = Vec::new();
    for (at, one) in ports.iter().enumerate() {
        what.push(port(one).map_err(|error| format!(".ports[{at}]: {error}"))?);
    }
    if what.is_empty() {
        what.push(Ports::All);
    }
    Ok((whom, what))
}

fn own(namespace: &str) -> [(Key, Test); 1] {
    let names = BTreeSet::from([namespace.to_owned()]);
    [(Key::Namespace, Test::In(names))]
}

/// A selector of pods in a namespace.
fn selector(
    pods: Option<&k8s_openapi::apimachinery::pkg::apis::meta::v1::LabelSelector>,
    namespace: &str,
) -> Result<BTreeSet<(Key, Test)>, String> {
    let mut all = BTreeSet::from(own(namespace));
    if let Some(pods) = pods {
        all.extend(requirements(pods, |key| Key::Label(key.to_owned()))?);
    }
    Ok(all)
}

fn peer(peer: &NetworkPolicyPeer, own: &str) -> Result<Peer, String> {
    let selects = peer.pod_selector.is_some() || peer.namespace_selector.is_some();
    match (&peer.ip_block, selects) {
        (Some(_), true) => Err("ipBlock stands alone, without selectors".to_owned()),
        (None, false) => {
            Err("has neither podSelector nor namespaceSelector nor ipBlock".to_owned())
        }
        (Some(one), false) => block(one).map(Peer::Block),
        (None, true) => {
            let Some(namespaces) = &peer.namespace_selector else {
                let all = selector(peer.pod_selector.as_ref(), own)?;
                return Ok(Peer::Pods(Arc::new(Selector::from_iter(all))));
            };
            let mut all: BTreeSet<(Key, Test)> =
                requirements(namespaces, |key| Key::NamespaceLabel(key.to_owned()))?
                    .into_iter()
                    .collect();
            if let Some(pods) = &peer.pod_selector {
                all.extend(requirements(pods, |key| Key::Label(key.to_owned()))?);
            }
            Ok(Peer::Pods(Arc::new(Selector::from_iter(all))))
        }
    }
}

fn block(block: &IPBlock) -> Result<Block, String> {
    let cidr = cidr(&block.cidr)?;
    let except = block.except.iter().flatten();
    let except: Vec<IpNet> = except
        .map(|one| self::cidr(one))
        .collect::<Result<_, _>>()?;
    if let Some(stray) = except.iter().find(|one| !cidr.contains(*one)) {
        return Err(format!("except {stray} is no part of {cidr}"));
    }
    Ok(Block {
        cidr,
        except,
        outside: false,
    })
}

/// Reads an address block; bits beyond its length do not matter.
pub fn cidr(text: &str) -> Result<IpNet, String> {
    text.parse::<IpNet>()
        .map(|block| block.trunc())
        .map_err(|_| format!("{text:?} is no address block (such as 192.0.2.0/24)"))
}

/// The number of a protocol that has ports.
pub fn protocol(name: Option<&str>) -> Result<u8, String> {
    match name {
        None | Some("TCP") => Ok(TCP),
        Some("UDP") => Ok(UDP),
        Some("SCTP") => Ok(SCTP),
        Some(other) => Err(format!(
            "protocol {other:?} is not known; use TCP, UDP or SCTP"
        )),
    }
}

fn port(port: &NetworkPolicyPort) -> Result<Ports, String> {
    let protocol = protocol(port.protocol.as_deref())?;
    let number = |value: i32| {
        let port = u16::try_from(value).ok().filter(|port| *port > 0);
        port.ok_or_else(|| format!("port {value} is not between 1 and 65535"))
    };
    match (&port.port, port.end_port) {
        (None, None) => Ok(Ports::Protocol(protocol)),
        (Some(IntOrString::Int(first)), last) => {
            let first = number(*first)?;
            let last = last.map_or(Ok(first), number)?;
            if last < first {
                return Err(format!("endPort {last} is below port {first}"));
            }
            Ok(Ports::Range {
                protocol,
                first,
                last,
            })
        }
        (Some(IntOrString::String(name)), None) => Ok(Ports::Named {
            protocol,
            name: name.as_str().into(),
        }),
        (None | Some(IntOrString::String(_)), Some(_)) => {
            Err("endPort needs a port that is a number".to_owned())
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::{Value, json};

    fn read(spec: Value) -> (Policy, Vec<String>) {
        let policy = json!({"metadata": {"namespace": "shop", "name": "p"}, "spec": spec});
        super::read(&serde_json::from_value(policy).unwrap())
    }

    #[test]
    fn directions_and_their_defaults() {
        let isolates = |spec| read(spec).0.isolates;
        assert_eq!(isolates(json!({})), [true, false]);
        assert_eq!(isolates(json!({"egress": [{}]})), [true, true]);
        assert_eq!(isolates(json!({"egress": []})), [true, false]);
        assert_eq!(isolates(json!({"policyTypes": ["Egress"]})), [false, true]);
        // Rules of a direction that is not named say nothing.
        let (policy, errors) = read(json!({"policyTypes": ["Egress"], "ingress": [{}]}));
        assert_eq!((policy.rules.len(), errors.len()), (0, 0));
    }

    #[test]
    fn what_is_wrong_is_told_and_allows_nothing() {
        let bad = [
            (json!({"ports": [{"port": 70000}]}), "ports[0]: port 70000"),
            (json!({"ports": [{"port": 9, "endPort": 8}]}), "endPort 8"),
            (
                json!({"ports": [{"port": "web", "endPort": 8}]}),
                "endPort needs",
            ),
            (
                json!({"ports": [{"protocol": "GRE"}]}),
                "\"GRE\" is not known",
            ),
            (json!({"from": [{}]}), "from[0]: has neither"),
            (
                json!({"from": [{"ipBlock": {"cidr": "10.0.0.0"}}]}),
                "no address block",
            ),
            (
                json!({"from": [{"ipBlock": {"cidr": "10.0.0.0/8", "except": ["11.0.0.0/9"]}}]}),
                "except 11.0.0.0/9 is no part of 10.0.0.0/8",
            ),
            (
                json!({"from": [{"ipBlock": {"cidr": "10.0.0.0/8"}, "podSelector": {}}]}),
                "stands alone",
            ),
            (
                json!({"from": [{"podSelector": {"matchExpressions": [{"key": "a", "operator": "Gt"}]}}]}),
                "\"Gt\" is no operator",
            ),
        ];
        for (rule, words) in bad {
            let (policy, errors) = read(json!({"ingress": [{}, rule]}));
            assert_eq!(policy.rules.len(), 1, "{words}");
            assert_eq!(errors.len(), 1, "{words}");
            assert!(errors[0].starts_with("spec.ingress[1]"), "{errors:?}");
            assert!(errors[0].contains(words), "{errors:?}");
        }
        let (policy, errors) = read(
            json!({"podSelector": {"matchExpressions": [{"key": "a", "operator": "In"}]}, "ingress": [{}]}),
        );
        assert_eq!(policy.subject.namespace(), Some("shop"));
        assert!(errors[0].contains("a In needs values"), "{errors:?}");
    }
}
