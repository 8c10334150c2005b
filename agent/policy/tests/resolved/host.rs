//! The node itself: its addresses, and the policies that are for it.

use std::collections::BTreeSet;
use std::net::IpAddr;

use serde_json::{Value, json};
use xebec_dataplane_common::policy::{Chains, IDENTITY_HOST, IDENTITY_REMOTE_NODE, SEATS};
use xebec_policy::kind::Kind;
use xebec_policy::rule::Source;
use xebec_policy::selector::Labels;

use crate::plain::Node;

fn ip(text: &str) -> IpAddr {
    text.parse().unwrap()
}

fn set_node(node: &mut Node, name: &str, zone: &str, addresses: &[&str]) {
    let labels = Labels::from([("zone".to_owned(), zone.to_owned())]);
    let addresses = addresses.iter().map(|one| ip(one)).collect();
    node.engine.set_node(name, labels, addresses);
    node.engine.refresh().unwrap();
}

#[test]
fn addresses_of_its_devices_are_the_nodes() {
    let mut node = Node::new("n1", Kind::hash);
    set_node(&mut node, "n1", "a", &["192.168.0.1"]);
    set_node(&mut node, "n2", "a", &["192.168.0.2"]);
    let told = |node: &mut Node, all: &[&str]| {
        let all: BTreeSet<IpAddr> = all.iter().map(|one| ip(one)).collect();
        node.engine.set_local_addresses(all);
        node.engine.refresh().unwrap();
        node.kernel.with(|plain| {
            let mut all: Vec<(IpAddr, u32)> = plain
                .identities
                .iter()
                .map(|(one, identity)| (*one, *identity))
                .collect();
            all.sort_unstable();
            all
        })
    };
    let (first, other) = (
        (ip("192.168.0.1"), IDENTITY_HOST),
        (ip("192.168.0.2"), IDENTITY_REMOTE_NODE),
    );
    let bridge = (ip("172.17.0.1"), IDENTITY_HOST);
    let near = (ip("fe80::1"), IDENTITY_HOST);
    // An address that another node's object has is that one's.
    let all = told(
        &mut node,
        &["192.168.0.1", "192.168.0.2", "172.17.0.1", "fe80::1"],
    );
    assert_eq!(all, [bridge, first, other, near]);
    assert_eq!(told(&mut node, &["172.17.0.1"]), [bridge, first, other]);
    // What its object has no more may still be on its devices.
    told(&mut node, &["192.168.0.1"]);
    set_node(&mut node, "n1", "a", &["192.168.0.9"]);
    let now = (ip("192.168.0.9"), IDENTITY_HOST);
    assert_eq!(told(&mut node, &["192.168.0.1"]), [first, other, now]);
    assert_eq!(told(&mut node, &[]), [other, now]);
}

fn host(node: &Node) -> Chains {
    node.kernel.with(|plain| plain.host)
}

#[test]
fn policies_for_nodes_follow_labels_and_go_when_they_go() {
    let mut node = Node::new("n1", Kind::hash);
    set_node(&mut node, "n1", "a", &["192.168.0.1"]);
    let policy = |audit: bool| -> Value {
        json!({
            "metadata": {"name": "p", "annotations": {"policy.xebec.io/audit": audit.to_string()}},
            "spec": {"nodeSelector": {"matchLabels": {"zone": "b"}}, "ingress": [{"fromEntities": ["cluster"]}]},
        })
    };
    let source = Source::CiliumClusterwideNetworkPolicy;
    let id = node.engine.set_object(source, &policy(false));
    node.engine.refresh().unwrap();
    assert_eq!(host(&node), Chains::default());
    assert_eq!(node.engine.policy_rows()[0]["node"], false);
    assert_eq!(node.engine.host_row(), None);
    set_node(&mut node, "n1", "b", &["192.168.0.1"]);
    let guarded = host(&node);
    assert_ne!(guarded.ingress, [0; SEATS]);
    assert_eq!(
        (guarded.egress, guarded.ingress_audit),
        ([0; SEATS], [0; SEATS])
    );
    assert_eq!(node.engine.policy_rows()[0]["node"], true);
    let row = node.engine.host_row().unwrap();
    assert_eq!(
        (&row["ingress_enforced"], &row["egress_enforced"]),
        (&json!(true), &json!(false))
    );
    assert_eq!(row["labels"], json!(["zone=b"]));
    // A node object that is gone for a while opens nothing.
    node.engine.set_node("n1", Labels::new(), Vec::new());
    node.engine.refresh().unwrap();
    assert_eq!(host(&node), guarded);
    node.engine.set_object(source, &policy(true));
    node.engine.refresh().unwrap();
    assert_eq!(host(&node).ingress, [0; SEATS]);
    assert_ne!(host(&node).ingress_audit, [0; SEATS]);
    node.engine.remove_object(&id);
    node.engine.refresh().unwrap();
    assert_eq!(host(&node), Chains::default());
    node.sweep();
    node.kernel
        .with(|plain| assert_eq!((plain.sets.len(), plain.rules.len()), (0, 0)));
}
