//! Names of domains: rules know their addresses once a resolver has told of them, and as long as they hold.

use serde_json::{Value, json};
use xebec_policy::domains::Told;
use xebec_policy::explain::{Asked, Party};
use xebec_policy::kind::Kind;
use xebec_policy::rule::Source;
use xebec_policy_oracle::Cluster;

use super::{reaches, world};
use crate::plain::Node;

/// A node with these rules.
fn node(cluster: &Cluster) -> Node {
    let mut node = Node::new("n1", Kind::hash);
    node.learn(cluster, 0);
    node
}

/// Has the node learn of addresses until a moment.
fn learn(node: &mut Node, name: &str, addresses: &[&str], until: u64) {
    let told: Vec<Told> = addresses
        .iter()
        .map(|address| Told {
            address: address.parse().unwrap(),
            until,
        })
        .collect();
    node.engine.learn(name, &told);
}

fn written(node: &Node) -> (usize, usize) {
    node.kernel.with(|plain| (plain.written, plain.sets.len()))
}

#[test]
fn names_are_known_at_once_and_as_long_as_they_hold() {
    let cluster = world(json!([[
        {"toFQDNs": [{"matchName": "a.example"}, {"matchPattern": "*.b.example"}]},
        {"toCIDRSet": [{"cidr": "192.0.2.0/24", "except": ["192.0.2.7/32"]}]},
    ], null]));
    let mut node = node(&cluster);
    let endpoint = "10.1.1.1".parse().unwrap();
    assert!(node.kernel.with(|plain| plain.endpoints[&endpoint].learns));
    let before = written(&node);
    assert!(!reaches(&mut node, &cluster, "203.0.113.1"));
    learn(
        &mut node,
        "a.example",
        &["203.0.113.1", "192.0.2.1", "192.0.2.7"],
        10,
    );
    learn(&mut node, "b.example", &["203.0.113.2"], 10);
    // No set is made anew, and of what rules say each is written once.
    assert_eq!(written(&node), (before.0 + 2, before.1));
    for (address, wanted) in [
        ("203.0.113.1", true),
        ("203.0.113.2", false),
        ("192.0.2.1", true),
        ("192.0.2.2", true),
        ("192.0.2.7", true),
    ] {
        assert_eq!(reaches(&mut node, &cluster, address), wanted, "{address}");
    }
    learn(
        &mut node,
        "x.b.example",
        &["203.0.113.2", "203.0.113.1"],
        20,
    );
    learn(&mut node, "x.y.b.example", &["203.0.113.3"], 20);
    assert!(reaches(&mut node, &cluster, "203.0.113.2"));
    assert!(!reaches(&mut node, &cluster, "203.0.113.3"));
    // What ends goes, where no other name has it and nobody uses it.
    let used: std::net::IpAddr = "192.0.2.7".parse().unwrap();
    node.engine.expire_domains(11, |address| address == used);
    for (address, wanted) in [
        ("203.0.113.1", true),
        ("192.0.2.1", true),
        ("192.0.2.7", true),
    ] {
        assert_eq!(reaches(&mut node, &cluster, address), wanted, "{address}");
    }
    node.engine.expire_domains(21, |_| false);
    for (address, wanted) in [
        ("203.0.113.1", false),
        ("203.0.113.2", false),
        ("192.0.2.1", true),
        ("192.0.2.7", false),
    ] {
        assert_eq!(reaches(&mut node, &cluster, address), wanted, "{address}");
    }
}

#[test]
fn names_that_were_known_before_the_rules_are_known_to_them() {
    let cluster = world(
        json!([[{"toFQDNs": [{"matchPattern": "*"}], "toPorts": [{"ports": [{"port": "443"}]}]}], null]),
    );
    let mut node = Node::new("n1", Kind::hash);
    learn(&mut node, "a.example", &["203.0.113.1"], 10);
    node.learn(
        &Cluster {
            now: 5,
            ..cluster.clone()
        },
        0,
    );
    assert!(reaches(&mut node, &cluster, "203.0.113.1"));
    // A pod under other rules gets its answers without delay.
    let id = node.engine.policy_ids().remove(0);
    node.engine.remove_object(&id);
    node.engine.refresh().unwrap();
    let endpoint = "10.1.1.1".parse().unwrap();
    assert!(!node.kernel.with(|plain| plain.endpoints[&endpoint].learns));
}

#[test]
fn what_does_not_fit_is_told_and_tried_again() {
    let cluster = world(json!([[{"toFQDNs": [{"matchPattern": "*"}]}], null]));
    let mut node = node(&cluster);
    node.kernel.with(|plain| plain.room.blocks = 1);
    learn(&mut node, "a.example", &["203.0.113.1", "203.0.113.2"], 10);
    node.engine.refresh().unwrap();
    let why = node.engine.problems().next().unwrap().why.clone();
    assert!(why.contains("address blocks do not fit"), "{why}");
    // The first one is known.
    assert!(reaches(&mut node, &cluster, "203.0.113.1"));
    assert!(!reaches(&mut node, &cluster, "203.0.113.2"));
    node.kernel.with(|plain| plain.room.blocks = 9);
    assert!(reaches(&mut node, &cluster, "203.0.113.2"));
    assert_eq!(node.engine.problems().count(), 0);
}

#[test]
fn names_are_explained_and_listed() {
    let cluster = world(
        json!([[{"toFQDNs": [{"matchName": "a.example"}], "toPorts": [{"ports": [{"port": "443", "protocol": "TCP"}]}]}], null]),
    );
    let mut node = node(&cluster);
    let asked = |name: &str, port: u16| Asked {
        from: Party::Pod(("x".to_owned(), "p".to_owned())),
        to: Party::Domain(name.to_owned()),
        protocol: 6,
        port,
        v4: None,
    };
    let error = node.engine.explain(&asked("a.example", 443)).unwrap_err();
    assert!(error.to_string().contains("of a.example"), "{error}");
    learn(&mut node, "a.example", &["203.0.113.1"], 10);
    learn(&mut node, "b.example", &["203.0.113.2"], 10);
    let said = node.engine.explain(&asked("A.example.", 443)).unwrap();
    assert!(said.allowed, "{said:#?}");
    assert_eq!(
        said.egress.rule.as_deref(),
        Some("CiliumNetworkPolicy x/p egress[0]")
    );
    let said = node.engine.explain(&asked("a.example", 80)).unwrap();
    let remedy = said.egress.remedies.join(" ");
    assert!(!said.allowed && remedy.contains("is about this peer, but not port 80/TCP"));
    let said = node.engine.explain(&asked("b.example", 443)).unwrap();
    assert!(
        !said.allowed && said.to.contains("b.example (203.0.113.2)"),
        "{}",
        said.to
    );
    let rows = node.engine.domain_rows(4);
    assert_eq!(
        rows[0],
        json!({"domain": "a.example", "address": "203.0.113.1", "seconds_left": 6, "policies": ["CiliumNetworkPolicy x/p"]})
    );
    assert_eq!(rows[1]["policies"], json!([]));
}

#[test]
fn who_is_believed() {
    let mut node = Node::new("n1", Kind::hash);
    let pod = |name: &str, namespace: &str, label: &str, address: &str| -> Value {
        json!({
            "metadata": {"namespace": namespace, "name": name, "labels": {"k8s-app": label}},
            "spec": {"nodeName": "n2", "containers": [{"name": "c", "ports": [
                {"name": "dns", "protocol": "UDP", "containerPort": 1053},
                {"name": "metrics", "containerPort": 9153},
            ]}]},
            "status": {"phase": "Running", "podIPs": [{"ip": address}]},
        })
    };
    let cluster = Cluster {
        nodes: vec![
            json!({"metadata": {"name": "n2"}, "status": {"addresses": [{"type": "InternalIP", "address": "192.168.0.2"}]}}),
        ],
        pods: vec![
            pod("dns", "kube-system", "kube-dns", "10.1.2.1"),
            pod("false", "x", "kube-dns", "10.1.2.2"),
            pod("other", "kube-system", "other", "10.1.2.3"),
        ],
        ..Cluster::default()
    };
    node.learn(&cluster, 0);
    for (address, believed) in [
        ("10.1.2.1", true),
        ("10.1.2.2", false),
        ("10.1.2.3", false),
        ("192.168.0.2", true),
        ("203.0.113.1", false),
    ] {
        assert_eq!(
            node.engine.is_resolver(address.parse().unwrap()),
            believed,
            "{address}"
        );
    }
    assert_eq!(node.engine.resolver_ports(), [1053].into());
}

#[test]
fn rules_that_deny_have_no_names() {
    let mut node = Node::new("n1", Kind::hash);
    let object = json!({"metadata": {"namespace": "x", "name": "p"}, "spec": {"endpointSelector": {}, "egressDeny": [
        {"toFQDNs": [{"matchName": "a.example"}]},
    ]}});
    let id = node.engine.set_object(Source::CiliumNetworkPolicy, &object);
    let error = &node.engine.errors()[&id][0];
    assert!(error.starts_with("spec.egressDeny[0].toFQDNs: "), "{error}");
    assert!(error.contains("denies everything until then"), "{error}");
}
