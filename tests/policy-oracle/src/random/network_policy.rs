//! Random NetworkPolicies.

use rand::Rng;
use rand::rngs::StdRng;
use serde_json::{Value, json};

use super::words::{HOMES, PORTS, block, namespace_selector, one, pod_selector, subject};

/// A NetworkPolicy without a name.
pub fn policy(random: &mut StdRng) -> Value {
    let mut spec = json!({"podSelector": subject(random)});
    let types = [
        json!(null),
        json!([]),
        json!(["Ingress"]),
        json!(["Egress"]),
        json!(["Ingress", "Egress"]),
    ];
    let types = one(random, &types);
    if !types.is_null() {
        spec["policyTypes"] = types.clone();
    }
    for (direction, peers) in [("ingress", "from"), ("egress", "to")] {
        if random.random_bool(0.3) {
            continue;
        }
        let rules = (0..random.random_range(0..4)).map(|_| rule(random, peers));
        spec[direction] = rules.collect();
    }
    json!({
        "apiVersion": "networking.k8s.io/v1",
        "kind": "NetworkPolicy",
        "metadata": {"namespace": *one(random, &HOMES)},
        "spec": spec,
    })
}

fn rule(random: &mut StdRng, peers: &str) -> Value {
    let mut rule = json!({});
    if random.random_bool(0.85) {
        rule[peers] = (0..random.random_range(0..4))
            .map(|_| peer(random))
            .collect();
    }
    if random.random_bool(0.7) {
        rule["ports"] = (0..random.random_range(0..3))
            .map(|_| port(random))
            .collect();
    }
    rule
}

fn peer(random: &mut StdRng) -> Value {
    match random.random_range(0..6) {
        0..=1 => json!({"podSelector": pod_selector(random)}),
        2 => json!({"namespaceSelector": namespace_selector(random)}),
        3 => {
            json!({"namespaceSelector": namespace_selector(random), "podSelector": pod_selector(random)})
        }
        _ => {
            let (cidr, holes) = block(random);
            let mut block = json!({"cidr": cidr});
            if !holes.is_empty() {
                block["except"] = json!(holes);
            }
            json!({"ipBlock": block})
        }
    }
}

fn port(random: &mut StdRng) -> Value {
    let protocol = *one(random, &["TCP", "UDP", "SCTP"]);
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
