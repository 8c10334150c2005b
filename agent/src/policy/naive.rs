//! What NetworkPolicy means, read off the objects rule by rule and as slowly as can be: the tests' judge.

use std::collections::BTreeMap;
use std::net::{IpAddr, Ipv4Addr};

use k8s_openapi::api::networking::v1::{NetworkPolicyPeer, NetworkPolicyPort, NetworkPolicySpec};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::LabelSelector;
use k8s_openapi::apimachinery::pkg::util::intstr::IntOrString;
use rand::Rng;
use rand::rngs::StdRng;
use serde_json::{Value, json};

use super::compile::{Direction, Kind, Name, RuleId};
use super::selector::{Labels, matches};

/// A cluster as the tests know it.
#[derive(Default)]
pub struct World {
    pub namespaces: BTreeMap<String, Labels>,
    pub policies: BTreeMap<Name, NetworkPolicySpec>,
}

/// The other end.
#[derive(Clone, Copy)]
pub struct Other<'a> {
    /// None for who is no pod.
    pub kind: Option<&'a Kind>,
    pub address: IpAddr,
}

/// The rules that allow; none if no policy isolates the pod in this direction.
pub fn allowing(
    world: &World,
    pod: &Kind,
    direction: Direction,
    other: Other<'_>,
    protocol: &str,
    port: u16,
) -> Option<Vec<RuleId>> {
    let mut isolated = false;
    let mut rules = Vec::new();
    for (name, spec) in &world.policies {
        let everything = LabelSelector::default();
        let selector = spec.pod_selector.as_ref().unwrap_or(&everything);
        if name.0 != pod.namespace || !matches(selector, &pod.labels) {
            continue;
        }
        let types = spec.policy_types.clone().unwrap_or_default();
        let egress_rules = spec.egress.clone().unwrap_or_default();
        let isolates = match direction {
            Direction::Ingress => types.is_empty() || types.contains(&"Ingress".to_owned()),
            Direction::Egress if types.is_empty() => !egress_rules.is_empty(),
            Direction::Egress => types.contains(&"Egress".to_owned()),
        };
        if !isolates {
            continue;
        }
        isolated = true;
        let listed: Vec<(Vec<NetworkPolicyPeer>, Vec<NetworkPolicyPort>)> = match direction {
            Direction::Ingress => spec
                .ingress
                .iter()
                .flatten()
                .map(|rule| {
                    (
                        rule.from.clone().unwrap_or_default(),
                        rule.ports.clone().unwrap_or_default(),
                    )
                })
                .collect(),
            Direction::Egress => egress_rules
                .into_iter()
                .map(|rule| (rule.to.unwrap_or_default(), rule.ports.unwrap_or_default()))
                .collect(),
        };
        for (index, (peers, ports)) in listed.into_iter().enumerate() {
            let named = match direction {
                Direction::Ingress => Some(pod),
                Direction::Egress => other.kind,
            };
            let port_fits = |named: Option<&Kind>| {
                ports.is_empty() || ports.iter().any(|one| has_port(one, named, protocol, port))
            };
            let fits = if peers.is_empty() {
                port_fits(named)
            } else {
                peers.iter().any(|one| {
                    // A block of addresses has no pods whose names of ports would count.
                    let named = match (direction, &one.ip_block) {
                        (Direction::Egress, Some(_)) => None,
                        _ => named,
                    };
                    is_peer(world, one, &pod.namespace, other) && port_fits(named)
                })
            };
            if fits {
                rules.push(RuleId {
                    policy: name.clone(),
                    direction,
                    index,
                });
            }
        }
    }
    isolated.then_some(rules)
}

fn has_port(one: &NetworkPolicyPort, named: Option<&Kind>, protocol: &str, port: u16) -> bool {
    if one.protocol.as_deref().unwrap_or("TCP") != protocol {
        return false;
    }
    match &one.port {
        None => true,
        Some(IntOrString::Int(first)) => {
            let last = one.end_port.unwrap_or(*first);
            (*first..=last).contains(&i32::from(port))
        }
        Some(IntOrString::String(name)) => named.is_some_and(|kind| {
            kind.ports.iter().any(|(own, number, own_port)| {
                own == name && *number == number_of(protocol) && *own_port == port
            })
        }),
    }
}

fn is_peer(world: &World, one: &NetworkPolicyPeer, own: &str, other: Other<'_>) -> bool {
    if let Some(block) = &one.ip_block {
        let holds = |text: &str| {
            text.parse::<ipnet::IpNet>()
                .is_ok_and(|block| block.contains(&other.address))
        };
        return holds(&block.cidr) && !block.except.iter().flatten().any(|hole| holds(hole));
    }
    let Some(kind) = other.kind else {
        return false;
    };
    let namespace = match &one.namespace_selector {
        None => kind.namespace == own,
        Some(selector) => world
            .namespaces
            .get(&kind.namespace)
            .is_some_and(|labels| matches(selector, labels)),
    };
    let everything = LabelSelector::default();
    namespace
        && matches(
            one.pod_selector.as_ref().unwrap_or(&everything),
            &kind.labels,
        )
}

/// IP protocol number.
pub fn number_of(protocol: &str) -> u8 {
    match protocol {
        "TCP" => 6,
        "UDP" => 17,
        "SCTP" => 132,
        other => panic!("{other} is no protocol of the tests"),
    }
}

pub const PROTOCOLS: [&str; 3] = ["TCP", "UDP", "SCTP"];
pub const NAMESPACES: [&str; 3] = ["x", "y", "z"];

fn one<'a, T>(random: &mut StdRng, of: &'a [T]) -> &'a T {
    &of[random.random_range(0..of.len())]
}

/// Labels from a few, so that selectors often match.
pub fn labels(random: &mut StdRng) -> Labels {
    let mut labels = Labels::new();
    for key in ["app", "tier"] {
        if random.random_bool(0.7) {
            labels.insert(key.into(), (*one(random, &["a", "b", "c"])).into());
        }
    }
    labels
}

fn selector(random: &mut StdRng) -> Value {
    let key = *one(random, &["app", "tier"]);
    let value = *one(random, &["a", "b", "c"]);
    match random.random_range(0..6) {
        0 => json!({}),
        1..=2 => json!({"matchLabels": {key: value}}),
        3 => {
            let operator = *one(random, &["In", "NotIn"]);
            json!({"matchExpressions": [{"key": key, "operator": operator, "values": [value, "b"]}]})
        }
        4 => {
            let operator = *one(random, &["Exists", "DoesNotExist"]);
            json!({"matchExpressions": [{"key": key, "operator": operator}]})
        }
        _ => {
            json!({"matchLabels": {key: value}, "matchExpressions": [{"key": "app", "operator": "Exists"}]})
        }
    }
}

/// Ports near which ranges begin and end.
pub const PORTS: [u16; 12] = [
    1, 79, 80, 81, 443, 1023, 1024, 8079, 8080, 8081, 32768, 65535,
];

fn port(random: &mut StdRng) -> Value {
    let protocol = *one(random, &PROTOCOLS);
    let (first, other) = (*one(random, &PORTS), *one(random, &PORTS));
    match random.random_range(0..8) {
        0 => json!({}),
        1 => json!({"protocol": protocol}),
        2 => json!({"port": "web"}),
        3 => json!({"port": "dns", "protocol": protocol}),
        4 => json!({"port": first.min(other), "endPort": first.max(other), "protocol": protocol}),
        5 => json!({"port": first}),
        _ => json!({"port": first, "protocol": protocol}),
    }
}

fn peer(random: &mut StdRng) -> Value {
    match random.random_range(0..6) {
        0 => json!({"podSelector": selector(random)}),
        1 => json!({"namespaceSelector": selector(random)}),
        2..=3 => json!({"namespaceSelector": selector(random), "podSelector": selector(random)}),
        _ => {
            let cidr = *one(
                random,
                &[
                    "0.0.0.0/0",
                    "10.0.0.0/8",
                    "10.1.0.0/16",
                    "10.1.2.0/24",
                    "10.1.2.3/32",
                ],
            );
            let holes: Vec<&str> = ["10.1.0.0/16", "10.1.2.0/24", "10.1.2.3/32", "10.1.2.128/25"]
                .into_iter()
                .filter(|_| random.random_bool(0.3))
                .collect();
            json!({"ipBlock": {"cidr": cidr, "except": holes}})
        }
    }
}

/// A policy with rules of every form.
pub fn policy(random: &mut StdRng) -> NetworkPolicySpec {
    let mut spec = json!({"podSelector": selector(random)});
    let types = [
        json!(null),
        json!([]),
        json!(["Ingress"]),
        json!(["Egress"]),
        json!(["Ingress", "Egress"]),
    ];
    spec["policyTypes"] = one(random, &types).clone();
    for (direction, peers) in [("ingress", "from"), ("egress", "to")] {
        if random.random_bool(0.3) {
            continue;
        }
        let rules: Vec<Value> = (0..random.random_range(0..4))
            .map(|_| {
                let peer_list: Vec<Value> = (0..random.random_range(0..3))
                    .map(|_| peer(random))
                    .collect();
                let port_list: Vec<Value> = (0..random.random_range(0..3))
                    .map(|_| port(random))
                    .collect();
                json!({peers: peer_list, "ports": port_list})
            })
            .collect();
        spec[direction] = json!(rules);
    }
    serde_json::from_value(spec).unwrap()
}

/// The ports that pods name.
pub fn named_ports(random: &mut StdRng) -> std::collections::BTreeSet<(String, u8, u16)> {
    [
        ("web", 6, 80),
        ("web", 6, 8080),
        ("dns", 17, 53),
        ("dns", 6, 443),
        ("dns", 132, 1024),
    ]
    .into_iter()
    .filter(|_| random.random_bool(0.4))
    .map(|(name, protocol, port)| (name.to_owned(), protocol, port))
    .collect()
}

/// Addresses near which blocks begin and end.
pub const ADDRESSES: [IpAddr; 8] = [
    IpAddr::V4(Ipv4Addr::new(9, 255, 255, 255)),
    IpAddr::V4(Ipv4Addr::new(10, 0, 0, 0)),
    IpAddr::V4(Ipv4Addr::new(10, 1, 1, 255)),
    IpAddr::V4(Ipv4Addr::new(10, 1, 2, 3)),
    IpAddr::V4(Ipv4Addr::new(10, 1, 2, 4)),
    IpAddr::V4(Ipv4Addr::new(10, 1, 2, 128)),
    IpAddr::V4(Ipv4Addr::new(10, 1, 3, 0)),
    IpAddr::V4(Ipv4Addr::new(11, 0, 0, 0)),
];
