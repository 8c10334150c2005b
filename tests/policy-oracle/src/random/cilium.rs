//! Random policies of Cilium.

use rand::Rng;
use rand::rngs::StdRng;
use serde_json::{Value, json};

use super::NAMESPACES;
use super::words::{BLOCKS, HOMES, NAMES, PATTERNS, PORTS, SERVICES, VALUES, block, one, selector};

/// Names of CiliumCIDRGroups; a policy may name one that isn't there.
const GROUPS: [&str; 3] = ["group-a", "group-b", "group-c"];

const ENTITIES: [&str; 10] = [
    "all",
    "cluster",
    "health",
    "host",
    "ingress",
    "init",
    "none",
    "remote-node",
    "unmanaged",
    "world",
];

/// A policy without a name, or a group with one.
pub fn policy(random: &mut StdRng) -> Value {
    match random.random_range(0..8) {
        0 => group(random),
        1..=3 => network_policy(random, false),
        _ => network_policy(random, true),
    }
}

fn group(random: &mut StdRng) -> Value {
    let blocks: Vec<&str> = (0..random.random_range(0..4))
        .map(|_| *one(random, &BLOCKS))
        .collect();
    json!({
        "apiVersion": "cilium.io/v2",
        "kind": "CiliumCIDRGroup",
        "metadata": {"name": *one(random, &GROUPS[..2])},
        "spec": {"externalCIDRs": blocks},
    })
}

fn network_policy(random: &mut StdRng, namespaced: bool) -> Value {
    let (kind, metadata) = if namespaced {
        let namespace = *one(random, &HOMES);
        ("CiliumNetworkPolicy", json!({"namespace": namespace}))
    } else {
        ("CiliumClusterwideNetworkPolicy", json!({}))
    };
    let mut policy = json!({"apiVersion": "cilium.io/v2", "kind": kind, "metadata": metadata});
    let form = random.random_range(0..8);
    if form != 0 {
        policy["spec"] = spec(random, namespaced);
    }
    if form < 2 {
        policy["specs"] = (0..2).map(|_| spec(random, namespaced)).collect();
    }
    policy
}

fn spec(random: &mut StdRng, namespaced: bool) -> Value {
    let for_nodes = !namespaced && random.random_bool(0.25);
    let mut spec = match for_nodes {
        true => {
            let plain = selector(random, &["zone"]);
            json!({"nodeSelector": with_sources(random, plain)})
        }
        false => json!({"endpointSelector": subject(random, namespaced)}),
    };
    for (direction, deny, side) in [
        ("ingress", "ingressDeny", "from"),
        ("egress", "egressDeny", "to"),
    ] {
        if random.random_bool(0.6) {
            // Names are for rules of pods.
            let list = if for_nodes { "nodes" } else { direction };
            let rules = (0..random.random_range(0..3)).map(|_| rule(random, side, list));
            spec[direction] = rules.collect();
        }
        if random.random_bool(0.25) {
            let rules = (0..random.random_range(0..3)).map(|_| rule(random, side, deny));
            spec[deny] = rules.collect();
        }
    }
    let lists = ["ingress", "ingressDeny", "egress", "egressDeny"];
    if !lists.iter().any(|list| spec[*list][0].is_object()) {
        // The API wants a rule in each.
        spec["ingress"] = json!([rule(random, "from", "ingress")]);
    }
    if random.random_bool(0.3) {
        let mut said = json!({});
        for direction in ["ingress", "egress"] {
            if random.random_bool(0.6) {
                said[direction] = json!(random.random_bool(0.3));
            }
        }
        spec["enableDefaultDeny"] = said;
    }
    if random.random_bool(0.1) {
        spec["description"] = json!("a policy");
    }
    spec
}

/// A key of a label, with or without its source.
fn key(random: &mut StdRng, key: &str) -> String {
    let source = *one(random, &["", "", "k8s:", "any:"]);
    format!("{source}{key}")
}

fn with_sources(random: &mut StdRng, mut selector: Value) -> Value {
    if let Some(labels) = selector
        .get_mut("matchLabels")
        .and_then(Value::as_object_mut)
    {
        let old = std::mem::take(labels);
        labels.extend(
            old.into_iter()
                .map(|(name, value)| (key(random, &name), value)),
        );
    }
    for one in selector
        .get_mut("matchExpressions")
        .and_then(Value::as_array_mut)
        .into_iter()
        .flatten()
    {
        let name = one["key"].as_str().unwrap_or_default().to_owned();
        one["key"] = json!(key(random, &name));
    }
    selector
}

fn labels(random: &mut StdRng) -> Value {
    let plain = selector(random, &["app", "tier"]);
    with_sources(random, plain)
}

fn subject(random: &mut StdRng, namespaced: bool) -> Value {
    if random.random_bool(0.3) {
        return json!({});
    }
    let mut subject = labels(random);
    match random.random_range(0..8) {
        0 if !namespaced => {
            let name = key(random, "io.kubernetes.pod.namespace");
            subject["matchLabels"][name] = json!(*one(random, &NAMESPACES));
        }
        1 if !namespaced => {
            let name = key(random, "io.cilium.k8s.namespace.labels.env");
            subject["matchLabels"][name] = json!(*one(random, &VALUES));
        }
        2 => {
            let name = key(random, "io.cilium.k8s.policy.serviceaccount");
            subject["matchLabels"][name] = json!(*one(random, &["default", "robot"]));
        }
        _ => {}
    }
    subject
}

fn endpoints(random: &mut StdRng) -> Value {
    let mut peer = labels(random);
    match random.random_range(0..10) {
        0 => {
            let name = key(random, "io.kubernetes.pod.namespace");
            peer["matchLabels"][name] = json!(*one(random, &NAMESPACES));
        }
        1 => {
            let name = key(random, "io.kubernetes.pod.namespace");
            let operator = *one(random, &["In", "NotIn"]);
            let values = [*one(random, &NAMESPACES), *one(random, &NAMESPACES)];
            peer["matchExpressions"] =
                json!([{"key": name, "operator": operator, "values": values}]);
        }
        2 => {
            let name = key(random, "io.kubernetes.pod.namespace");
            peer["matchExpressions"] = json!([{"key": name, "operator": "Exists"}]);
        }
        3 => {
            let name = key(random, "io.cilium.k8s.namespace.labels.env");
            peer["matchLabels"][name] = json!(*one(random, &VALUES));
        }
        4 => {
            let name = key(random, "io.cilium.k8s.policy.serviceaccount");
            peer["matchLabels"][name] = json!(*one(random, &["default", "robot"]));
        }
        5 => {
            let name = *one(random, &["host", "remote-node", "world", "init"]);
            return json!({"matchLabels": {format!("reserved:{name}"): ""}});
        }
        _ => {}
    }
    peer
}

/// A rule of a list; `side` is what its peers' names begin with.
fn rule(random: &mut StdRng, side: &str, list: &str) -> Value {
    let mut rule = json!({});
    let several = random.random_range(1..3);
    match random.random_range(0..11) {
        0..=3 => {
            rule[format!("{side}Endpoints")] = (0..several).map(|_| endpoints(random)).collect();
        }
        4..=5 => {
            let entities = (0..several).map(|_| json!(*one(random, &ENTITIES)));
            rule[format!("{side}Entities")] = entities.collect();
        }
        6 => {
            let blocks = (0..several).map(|_| json!(*one(random, &BLOCKS)));
            rule[format!("{side}CIDR")] = blocks.collect();
        }
        7 => {
            rule[format!("{side}CIDRSet")] = (0..several).map(|_| block_set(random)).collect();
        }
        8 if list == "egress" => {
            rule["toFQDNs"] = (0..several).map(|_| domain(random)).collect();
        }
        9 if side == "to" => {
            rule["toServices"] = (0..several).map(|_| service(random)).collect();
        }
        8 | 9 => {
            let list = *one(random, &["Endpoints", "Entities", "CIDR", "CIDRSet"]);
            rule[format!("{side}{list}")] = json!([]);
        }
        _ => {}
    }
    match random.random_range(0..8) {
        0..=3 => {
            let entries = (0..random.random_range(1..3)).map(|_| {
                let ports = (0..random.random_range(1..3)).map(|_| port(random));
                json!({"ports": ports.collect::<Vec<Value>>()})
            });
            rule["toPorts"] = entries.collect();
        }
        4 => {
            let fields = (0..random.random_range(1..3)).map(|_| icmp(random));
            rule["icmps"] = json!([{"fields": fields.collect::<Vec<Value>>()}]);
        }
        5 => rule[*one(random, &["toPorts", "icmps"])] = json!([]),
        _ => {}
    }
    rule
}

fn service(random: &mut StdRng) -> Value {
    let namespace = one(random, &["", "x", "y"]).to_string();
    let name = json!({"serviceName": *one(random, &SERVICES), "namespace": namespace});
    let labels = json!({"selector": labels(random)});
    match random.random_range(0..4) {
        0 => json!({"k8sServiceSelector": labels}),
        1 => json!({"k8sService": name, "k8sServiceSelector": labels}),
        _ => json!({"k8sService": name}),
    }
}

fn domain(random: &mut StdRng) -> Value {
    match random.random_range(0..3) {
        0 => json!({"matchName": *one(random, &NAMES)}),
        1 => json!({"matchPattern": *one(random, &PATTERNS)}),
        _ => {
            json!({"matchName": *one(random, &NAMES), "matchPattern": *one(random, &PATTERNS)})
        }
    }
}

fn block_set(random: &mut StdRng) -> Value {
    let (cidr, holes) = block(random);
    let mut set = match random.random_range(0..3) {
        0 => json!({"cidrGroupRef": *one(random, &GROUPS)}),
        _ => json!({"cidr": cidr}),
    };
    if set.get("cidr").is_some() && !holes.is_empty() {
        set["except"] = json!(holes);
    }
    set
}

fn port(random: &mut StdRng) -> Value {
    let (first, other) = (*one(random, &PORTS), *one(random, &PORTS));
    let mut port = match random.random_range(0..8) {
        0 => json!({"port": "0"}),
        1 => json!({"port": "web"}),
        2 => json!({"port": "dns"}),
        3..=4 => json!({"port": first.min(other).to_string(), "endPort": first.max(other)}),
        _ => json!({"port": first.to_string()}),
    };
    if random.random_bool(0.7) {
        port["protocol"] = json!(*one(random, &["ANY", "TCP", "UDP", "SCTP"]));
    }
    port
}

fn icmp(random: &mut StdRng) -> Value {
    match random.random_range(0..6) {
        0 => json!({"type": 8}),
        1 => json!({"type": "EchoRequest", "family": "IPv6"}),
        2 => json!({"type": "EchoRequest", "family": "IPv4"}),
        3 => json!({"type": "DestinationUnreachable", "family": *one(random, &["IPv4", "IPv6"])}),
        4 => json!({"type": "129", "family": "IPv6"}),
        _ => json!({"type": *one(random, &[0, 3, 128]), "family": *one(random, &["IPv4", "IPv6"])}),
    }
}
