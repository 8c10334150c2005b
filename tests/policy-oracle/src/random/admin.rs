//! Random policies of administrators.

use rand::Rng;
use rand::rngs::StdRng;
use serde_json::{Value, json};

use super::words::{BLOCKS, DOMAINS, PORTS, namespace_selector, one, pod_selector, selector};

/// One of the kinds, without a name but for the one that a BaselineAdminNetworkPolicy must have.
pub fn policy(random: &mut StdRng) -> Value {
    match random.random_range(0..8) {
        0..=4 => cluster_network_policy(random),
        5..=6 => admin_network_policy(random),
        _ => baseline_admin_network_policy(random),
    }
}

fn cluster_network_policy(random: &mut StdRng) -> Value {
    let mut spec = spec(random, &["Accept", "Deny", "Pass"], "protocols");
    spec["tier"] = json!(*one(random, &["Admin", "Admin", "Baseline"]));
    spec["priority"] = priority(random);
    json!({
        "apiVersion": "policy.networking.k8s.io/v1alpha2",
        "kind": "ClusterNetworkPolicy",
        "metadata": {},
        "spec": spec,
    })
}

fn admin_network_policy(random: &mut StdRng) -> Value {
    let mut spec = spec(random, &["Allow", "Deny", "Pass"], "ports");
    spec["priority"] = priority(random);
    json!({
        "apiVersion": "policy.networking.k8s.io/v1alpha1",
        "kind": "AdminNetworkPolicy",
        "metadata": {},
        "spec": spec,
    })
}

fn baseline_admin_network_policy(random: &mut StdRng) -> Value {
    json!({
        "apiVersion": "policy.networking.k8s.io/v1alpha1",
        "kind": "BaselineAdminNetworkPolicy",
        "metadata": {"name": "default"},
        "spec": spec(random, &["Allow", "Deny"], "ports"),
    })
}

/// From a few, so that some are the same.
fn priority(random: &mut StdRng) -> Value {
    json!(*one(random, &[0, 5, 10, 1000]))
}

fn spec(random: &mut StdRng, actions: &[&str], ports: &str) -> Value {
    let mut spec = json!({"subject": pods(random)});
    for (direction, peers) in [("ingress", "from"), ("egress", "to")] {
        if random.random_bool(0.8) {
            let rules = (0..random.random_range(0..4)).map(|_| rule(random, actions, peers, ports));
            spec[direction] = rules.collect();
        }
    }
    spec
}

fn rule(random: &mut StdRng, actions: &[&str], peers: &str, ports: &str) -> Value {
    let action = *one(random, actions);
    let mut rule = json!({"action": action});
    let mut has_pods_only = true;
    let list: Vec<Value> = (0..random.random_range(1..3))
        .map(|_| {
            if peers == "from" || random.random_bool(0.5) {
                return pods(random);
            }
            has_pods_only = false;
            match random.random_range(0..6) {
                0..=1 => json!({"nodes": selector(random, &["zone"])}),
                // Only rules that allow may have names, and only policies that come before others.
                2 if actions.len() == 3 && action == actions[0] => {
                    json!({"domainNames": [*one(random, &DOMAINS)]})
                }
                _ => {
                    let networks = (0..random.random_range(1..3)).map(|_| *one(random, &BLOCKS));
                    let networks: std::collections::BTreeSet<&str> = networks.collect();
                    json!({"networks": networks})
                }
            }
        })
        .collect();
    rule[peers] = json!(list);
    if random.random_bool(0.2) {
        rule["name"] = json!("a rule");
    }
    if random.random_bool(0.5) {
        // Names of ports go with pods alone.
        let list = (0..random.random_range(1..3)).map(|_| match ports {
            "ports" => port(random, has_pods_only),
            _ => protocol(random, has_pods_only),
        });
        rule[ports] = list.collect();
    }
    rule
}

/// A selection of pods: a subject or a peer.
fn pods(random: &mut StdRng) -> Value {
    match random.random_range(0..2) {
        0 => json!({"namespaces": namespace_selector(random)}),
        _ => {
            json!({"pods": {"namespaceSelector": namespace_selector(random), "podSelector": pod_selector(random)}})
        }
    }
}

fn range(random: &mut StdRng) -> (u16, u16) {
    loop {
        let (first, other) = (*one(random, &PORTS), *one(random, &PORTS));
        if first < other {
            return (first, other);
        }
    }
}

fn port(random: &mut StdRng, named: bool) -> Value {
    let protocol = *one(random, &["TCP", "TCP", "UDP", "SCTP"]);
    let (start, end) = range(random);
    match random.random_range(0..5) {
        0 if named => json!({"namedPort": *one(random, &["web", "dns"])}),
        1 => json!({"portNumber": {"port": start}}),
        2 => json!({"portNumber": {"port": start, "protocol": protocol}}),
        3 => json!({"portRange": {"start": start, "end": end}}),
        _ => json!({"portRange": {"start": start, "end": end, "protocol": protocol}}),
    }
}

fn protocol(random: &mut StdRng, named: bool) -> Value {
    let protocol = *one(random, &["tcp", "tcp", "udp", "sctp"]);
    let (start, end) = range(random);
    match random.random_range(0..3) {
        0 if named => json!({"destinationNamedPort": *one(random, &["web", "dns"])}),
        1 => json!({protocol: {"destinationPort": {"number": start}}}),
        _ => json!({protocol: {"destinationPort": {"range": {"start": start, "end": end}}}}),
    }
}
