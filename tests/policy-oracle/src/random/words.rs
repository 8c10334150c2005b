//! The few words that random clusters are made of, so that they often meet.

use ipnet::IpNet;
use rand::Rng;
use rand::rngs::StdRng;
use serde_json::{Value, json};

use crate::object;

/// Values of labels, the common ones more than once.
pub const VALUES: [&str; 5] = ["a", "a", "b", "b", "c"];

/// Namespaces of pods and policies, the same way.
pub const HOMES: [&str; 6] = ["x", "x", "x", "y", "y", "z"];

/// Ports near which ranges begin and end.
pub const PORTS: [u16; 12] = [
    1, 79, 80, 81, 443, 1023, 1024, 8079, 8080, 8081, 32768, 65535,
];

/// Ports that containers name: name, protocol, number.
pub const NAMED_PORTS: [(&str, &str, u16); 5] = [
    ("web", "TCP", 80),
    ("web", "TCP", 8080),
    ("dns", "UDP", 53),
    ("dns", "TCP", 443),
    ("dns", "SCTP", 1024),
];

/// Blocks of addresses, near whose borders packets are sent.
pub const BLOCKS: [&str; 18] = [
    "0.0.0.0/0",
    "10.0.0.0/8",
    "10.1.0.0/16",
    "10.1.0.0/23",
    "10.1.1.0/24",
    "10.1.1.0/25",
    "10.1.2.0/24",
    "10.1.2.128/25",
    "10.1.2.3/32",
    "192.168.0.0/24",
    "192.168.0.2/32",
    "::/0",
    "fd00::/8",
    "fd00:1::/32",
    "fd00:1:0:1::/64",
    "fd00:1:0:2::80/121",
    "fd00:1:0:2::3/128",
    "fd01::/64",
];

/// Services: without a selector they have the endpoints that others wrote.
pub const SERVICES: [&str; 3] = ["shop", "far", "other"];

/// Names that pods ask resolvers for.
pub const NAMES: [&str; 4] = [
    "example.com",
    "www.example.com",
    "a.b.example.com",
    "www.example.org",
];

/// Names as the network policy API has them.
pub const DOMAINS: [&str; 4] = [
    "*.example.com",
    "WWW.example.com",
    "*.com",
    "nobody.example.com",
];

/// Patterns of Cilium's.
pub const PATTERNS: [&str; 6] = [
    "*.example.com",
    "**.example.com",
    "www.*.*",
    "*",
    "*e.com",
    "w*w.example.org",
];

/// Addresses that resolvers give names: of nobody, of a node, of pods.
pub const ADDRESSES: [&str; 8] = [
    "10.9.9.9",
    "10.1.1.7",
    "10.1.2.3",
    "203.0.113.7",
    "192.168.0.2",
    "fd00:1:0:2::3",
    "fd00:9::9",
    "2001:db8::7",
];

/// One of several.
pub fn one<'a, T>(random: &mut StdRng, of: &'a [T]) -> &'a T {
    &of[random.random_range(0..of.len())]
}

/// Labels with some of these keys.
pub fn labels(random: &mut StdRng, keys: &[&str]) -> Value {
    let mut labels = json!({});
    for key in keys {
        if random.random_bool(0.7) {
            labels[*key] = json!(one(random, &VALUES));
        }
    }
    labels
}

/// A selector of labels with these keys.
pub fn selector(random: &mut StdRng, keys: &[&str]) -> Value {
    let key = *one(random, keys);
    let (value, other) = (*one(random, &VALUES), *one(random, &VALUES));
    match random.random_range(0..6) {
        0 => json!({}),
        1..=2 => json!({"matchLabels": {key: value}}),
        3 => {
            let operator = *one(random, &["In", "NotIn"]);
            json!({"matchExpressions": [{"key": key, "operator": operator, "values": [value, other]}]})
        }
        4 => {
            let operator = *one(random, &["Exists", "DoesNotExist"]);
            json!({"matchExpressions": [{"key": key, "operator": operator}]})
        }
        _ => {
            let second = *one(random, keys);
            let operator = *one(random, &["Exists", "DoesNotExist"]);
            json!({"matchLabels": {key: value}, "matchExpressions": [{"key": second, "operator": operator}]})
        }
    }
}

/// A selector of pods.
pub fn pod_selector(random: &mut StdRng) -> Value {
    selector(random, &["app", "tier"])
}

/// A selector of the pods that a policy is about: all of them more often than among peers.
pub fn subject(random: &mut StdRng) -> Value {
    if random.random_bool(0.3) {
        return json!({});
    }
    pod_selector(random)
}

/// A selector of namespaces.
pub fn namespace_selector(random: &mut StdRng) -> Value {
    if random.random_bool(0.2) {
        let name = *one(random, &super::NAMESPACES);
        return json!({"matchLabels": {"kubernetes.io/metadata.name": name}});
    }
    selector(random, &["env"])
}

/// A block, and blocks inside of it that are left out.
pub fn block(random: &mut StdRng) -> (&'static str, Vec<&'static str>) {
    let block = *one(random, &BLOCKS);
    let holes = BLOCKS.into_iter().filter(|hole| is_inside(hole, block));
    let holes = holes.filter(|_| random.random_bool(0.3)).collect();
    (block, holes)
}

fn is_inside(hole: &str, block: &str) -> bool {
    let read = |text: &str| text.parse::<IpNet>().ok();
    match (read(hole), read(block)) {
        (Some(hole), Some(block)) => hole != block && block.contains(&hole),
        _ => false,
    }
}

/// A name that none of the objects has.
pub fn free_name(objects: &[Value], prefix: &str) -> String {
    let names: Vec<String> = objects
        .iter()
        .map(|one| object::metadata(one).name)
        .collect();
    let mut number = 0;
    loop {
        let name = format!("{prefix}-{number}");
        if !names.contains(&name) {
            return name;
        }
        number += 1;
    }
}
