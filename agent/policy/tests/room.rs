//! What the engine does where maps are small, and how much it writes for a change.
#![allow(clippy::unwrap_used, reason = "tests")]

#[allow(dead_code, reason = "shared with other tests")]
mod plain;

use std::net::IpAddr;

use plain::{Node, Side};
use serde_json::{Value, json};
use xebec_dataplane_common::policy::IDENTITY_HELD;
use xebec_policy::kind::Kind;
use xebec_policy_oracle::{Cluster, End, Packet, Protocol};

fn pod(name: &str, labels: Value, address: &str, node: &str) -> Value {
    json!({
        "apiVersion": "v1", "kind": "Pod",
        "metadata": {"namespace": "shop", "name": name, "labels": labels},
        "spec": {"nodeName": node, "containers": [{"name": "main"}]},
        "status": {"phase": "Running", "podIPs": [{"ip": address}]},
    })
}

fn policy(name: &str, ingress: Value) -> Value {
    json!({
        "apiVersion": "networking.k8s.io/v1", "kind": "NetworkPolicy",
        "metadata": {"namespace": "shop", "name": name},
        "spec": {"podSelector": {"matchLabels": {"app": "web"}}, "ingress": ingress},
    })
}

fn ports(ports: std::ops::Range<u16>) -> Value {
    let all: Vec<Value> = ports.map(|port| json!({"port": port})).collect();
    json!([{"ports": all}])
}

/// One pod `web` on the node `n1`, one pod `api` elsewhere.
fn cluster() -> Cluster {
    Cluster {
        namespaces: vec![json!({"metadata": {"name": "shop", "labels": {}}})],
        pods: vec![
            pod("web", json!({"app": "web"}), "10.0.0.1", "n1"),
            pod("api", json!({"app": "api"}), "10.0.1.1", "n2"),
        ],
        nodes: Vec::new(),
        policies: Vec::new(),
        ..Cluster::default()
    }
}

/// Whether `web` lets a connection in.
fn lets_in(node: &Node, from: &str, port: u16) -> bool {
    let own: IpAddr = "10.0.0.1".parse().unwrap();
    let from: IpAddr = from.parse().unwrap();
    let packet = Packet {
        from: End::Address,
        from_address: from,
        to: End::Address,
        to_address: own,
        protocol: Protocol::Tcp,
        port,
    };
    let side = Side {
        is_node: false,
        home: node.name.clone(),
        ingress: true,
        own: &packet.to,
        own_address: own,
        peer_address: from,
    };
    node.judge(&side, &packet).0
}

const API: &str = "10.0.1.1";

#[test]
fn what_does_not_fit_leaves_the_rules_before_and_is_told() {
    let mut node = Node::new("n1", Kind::hash);
    node.kernel.with(|plain| plain.room.rules = 12);
    let mut world = cluster();
    world.policies = vec![policy("few", ports(1..4))];
    node.learn(&world, 0);
    assert!(lets_in(&node, API, 3) && !lets_in(&node, API, 4));
    // Another version with more than there is room for beside the one in force.
    world.policies = vec![policy("few", ports(1..20))];
    node.learn(&world, 0);
    assert!(lets_in(&node, API, 3) && !lets_in(&node, API, 4));
    let problem = node.engine.problems().next().unwrap().clone();
    assert_eq!(
        problem.why,
        "19 entries do not fit, there is room for 9; 19 are of NetworkPolicy shop/few ingress[0]"
    );
    assert_eq!(problem.pods, [("shop".to_owned(), "web".to_owned())]);
    assert_eq!(problem.policies[0].name, "few");
    let row = &node.engine.policy_rows()[0];
    assert!(
        row["state"]
            .as_str()
            .unwrap()
            .starts_with("as before: 19 entries"),
        "{row}"
    );
    // What fits takes its place.
    world.policies = vec![policy("few", ports(2..6))];
    node.learn(&world, 0);
    assert!(lets_in(&node, API, 5) && !lets_in(&node, API, 1));
    assert_eq!(node.engine.problems().count(), 0);
    assert_eq!(node.engine.policy_rows()[0]["state"], "in force");
    // Nothing of what did not fit was left.
    node.sweep();
    assert_eq!(node.kernel.with(|plain| plain.rules.len()), 4);
}

#[test]
fn a_pod_whose_rules_do_not_fit_is_not_connected() {
    let mut node = Node::new("n1", Kind::hash);
    node.kernel.with(|plain| plain.room.rules = 2);
    let mut world = cluster();
    world.policies = vec![policy("many", ports(1..20))];
    let web = world.pods.remove(0);
    node.learn(&world, 0);
    node.engine.set_pod(&serde_json::from_value(web).unwrap());
    let name = ("shop".to_owned(), "web".to_owned());
    let error = node
        .engine
        .connect(&name, "10.0.0.1".parse().unwrap(), 7, [2; 6])
        .unwrap_err();
    assert!(
        error.to_string().contains("19 entries do not fit"),
        "{error:#}"
    );
    assert_eq!(node.kernel.with(|plain| plain.endpoints.len()), 0);
}

#[test]
fn ten_thousand_blocks_that_do_not_fit_disturb_nobody() {
    let mut node = Node::new("n1", Kind::hash);
    node.kernel.with(|plain| plain.room.blocks = 9_999);
    let mut world = cluster();
    world.policies = vec![policy("open", ports(80..81))];
    node.learn(&world, 0);
    let blocks: Vec<Value> = (0..10_000_u32)
        .map(|at| json!({"ipBlock": {"cidr": format!("172.{}.{}.0/25", 16 + at / 256, at % 256)}}))
        .collect();
    world
        .policies
        .push(policy("wide", json!([{"from": blocks}])));
    node.learn(&world, 0);
    assert!(lets_in(&node, API, 80) && !lets_in(&node, "172.16.1.1", 81));
    let why = &node.engine.problems().next().unwrap().why;
    assert!(
        why.contains("10000 address blocks do not fit, there is room for 9999; 10000 are of NetworkPolicy shop/wide"),
        "{why}"
    );
    node.kernel.with(|plain| plain.room.blocks = 10_000);
    node.learn(&world, 0);
    assert!(lets_in(&node, "172.16.1.1", 81) && !lets_in(&node, "172.16.1.200", 81));
    // All of them are of one rule: one class, one entry.
    let rules = node.kernel.with(|plain| plain.rules.len());
    assert!(rules <= 3, "{rules}");
}

#[test]
fn a_policy_for_many_kinds_of_pods_changes_by_itself() {
    const KINDS: usize = 12;
    const OWN: usize = 20;
    // For all pods of the namespace, or for those with a label that all have.
    for selector in [json!({}), json!({"matchLabels": {"team": "shop"}})] {
        let mut node = Node::new("n1", Kind::hash);
        let mut world = cluster();
        world.pods = (0..KINDS)
            .map(|at| {
                let labels = json!({"app": format!("app{at}"), "team": "shop"});
                pod(&format!("w{at}"), labels, &format!("10.0.0.{at}"), "n1")
            })
            .collect();
        // Each kind has policies of its own.
        let own = (0..KINDS).map(|at| {
            let first = 1_000 + 100 * at as u16;
            let mut own = policy(&format!("own{at}"), ports(first..first + OWN as u16));
            own["spec"]["podSelector"]["matchLabels"]["app"] = format!("app{at}").into();
            own
        });
        world.policies = own.collect();
        let everybodys = |port: u16| {
            let mut all = policy("all", ports(port..port + 1));
            all["spec"]["podSelector"] = selector.clone();
            all
        };
        node.learn(&world, 0);
        for port in 1..4 {
            world.policies.truncate(KINDS);
            world.policies.push(everybodys(port));
            let (before, sets) = node.kernel.with(|plain| (plain.written, plain.sets.len()));
            node.learn(&world, 0);
            node.sweep();
            let (after, now) = node.kernel.with(|plain| (plain.written, plain.sets.len()));
            assert_eq!(after - before, 1, "{selector}: one entry of one set");
            assert_eq!(now, sets + usize::from(port == 1));
            assert!(lets_in(&node, API, port) && !lets_in(&node, API, port + 1));
            assert!(lets_in(&node, API, 1_000 + 100));
        }
    }
}

#[test]
fn a_pod_that_nobody_has_met_costs_its_entries_and_no_set() {
    let mut node = Node::new("n1", Kind::hash);
    let mut world = cluster();
    let from = |app: &str| json!([{"from": [{"podSelector": {"matchLabels": {"app": app}}}], "ports": [{"port": 80}]}]);
    world.policies = (0..200)
        .map(|at| policy(&format!("p{at}"), from(&format!("app{at}"))))
        .collect();
    node.learn(&world, 0);
    let sets = node.kernel.with(|plain| plain.sets.clone());
    let before = node.kernel.with(|plain| plain.written);
    world
        .pods
        .push(pod("new", json!({"app": "app7"}), "10.0.1.9", "n2"));
    node.learn(&world, 0);
    assert!(lets_in(&node, "10.0.1.9", 80) && !lets_in(&node, API, 80));
    let after = node.kernel.with(|plain| plain.written);
    assert_eq!(after - before, 1);
    assert_eq!(
        node.kernel
            .with(|plain| plain.sets.keys().copied().collect::<Vec<_>>()),
        sets.keys().copied().collect::<Vec<_>>()
    );
    // A second one like it costs nothing.
    world
        .pods
        .push(pod("newer", json!({"app": "app7"}), "10.0.1.10", "n2"));
    node.learn(&world, 0);
    assert!(lets_in(&node, "10.0.1.10", 80));
    assert_eq!(node.kernel.with(|plain| plain.written), after);
}

#[test]
fn a_pod_whose_entries_do_not_fit_speaks_with_nobody_under_rules() {
    let mut node = Node::new("n1", Kind::hash);
    node.kernel.with(|plain| plain.room.rules = 2);
    let mut world = cluster();
    let from = json!([
        {"from": [{"podSelector": {"matchLabels": {"app": "api"}}}], "ports": [{"port": 80}, {"port": 81}]},
        {"from": [{"podSelector": {"matchLabels": {"app": "new"}}}]},
    ]);
    world.policies = vec![policy("p", from)];
    node.learn(&world, 0);
    world
        .pods
        .push(pod("new", json!({"app": "new"}), "10.0.1.9", "n2"));
    node.learn(&world, 0);
    let identity = |node: &Node| {
        let address: IpAddr = "10.0.1.9".parse().unwrap();
        node.kernel.with(|plain| plain.identities[&address])
    };
    assert_eq!(identity(&node), IDENTITY_HELD);
    assert!(!lets_in(&node, "10.0.1.9", 80) && lets_in(&node, API, 80));
    // With room it is like others.
    node.kernel.with(|plain| plain.room.rules = 3);
    node.learn(&world, 0);
    assert_ne!(identity(&node), IDENTITY_HELD);
    assert!(lets_in(&node, "10.0.1.9", 80));
}

#[test]
fn labels_that_tell_replicas_apart_make_no_kinds_unless_a_policy_asks() {
    let mut node = Node::new("n1", Kind::hash);
    let mut world = cluster();
    let hashed = |name: &str, hash: &str, address: &str| {
        pod(
            name,
            json!({"app": "api", "pod-template-hash": hash}),
            address,
            "n2",
        )
    };
    world.pods.push(hashed("api-1", "aaa", "10.0.1.2"));
    world.pods.push(hashed("api-2", "bbb", "10.0.1.3"));
    node.learn(&world, 0);
    assert_eq!(node.engine.identity_rows().len(), 2);
    let only = json!([{"from": [{"podSelector": {"matchLabels": {"pod-template-hash": "bbb"}}}]}]);
    world.policies = vec![policy("one", only)];
    node.learn(&world, 2);
    assert_eq!(node.engine.identity_rows().len(), 4);
    assert!(lets_in(&node, "10.0.1.3", 80));
    assert!(!lets_in(&node, "10.0.1.2", 80) && !lets_in(&node, API, 80));
    world.policies.clear();
    node.learn(&world, 0);
    node.sweep();
    assert_eq!(node.engine.identity_rows().len(), 2);
    assert!(lets_in(&node, "10.0.1.2", 80));
}

#[test]
fn a_pod_that_stayed_in_the_kernel_is_removed_when_that_is_asked_again() {
    let mut node = Node::new("n1", Kind::hash);
    node.learn(&cluster(), 0);
    let own: IpAddr = "10.0.0.1".parse().unwrap();
    let is_there = |node: &Node| node.kernel.with(|plain| plain.endpoints.contains_key(&own));
    node.kernel.with(|plain| plain.keeps_endpoints = true);
    assert!(node.engine.disconnect(own).is_err() && is_there(&node));
    node.kernel.with(|plain| plain.keeps_endpoints = false);
    assert!(node.engine.disconnect(own).is_ok() && !is_there(&node));
}
