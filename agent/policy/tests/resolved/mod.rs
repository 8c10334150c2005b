//! The API server and groups of address blocks come, change and go: the kernel follows.

use std::net::IpAddr;

use serde_json::{Value, json};
use xebec_policy::kind::Kind;
use xebec_policy::rule::Source;
use xebec_policy_oracle::{Cluster, End, Packet, Protocol};

use crate::plain::{Node, sides};

mod host;
mod names;

fn world(egress: Value) -> Cluster {
    Cluster {
        namespaces: vec![json!({"metadata": {"name": "x"}})],
        pods: vec![json!({
            "metadata": {"namespace": "x", "name": "p"},
            "spec": {"nodeName": "n1", "containers": []},
            "status": {"phase": "Running", "podIPs": [{"ip": "10.1.1.1"}]},
        })],
        nodes: vec![json!({"metadata": {"name": "n1"}})],
        policies: vec![json!({
            "apiVersion": "cilium.io/v2",
            "kind": "CiliumNetworkPolicy",
            "metadata": {"namespace": "x", "name": "p"},
            "spec": {"endpointSelector": {}, "egress": egress[0], "egressDeny": egress[1]},
        })],
        ..Cluster::default()
    }
}

/// Whether the pod may speak with an address, after the engine knows of all.
fn reaches(node: &mut Node, cluster: &Cluster, to: &str) -> bool {
    node.engine.refresh().unwrap();
    node.sweep();
    let packet = Packet {
        from: End::Pod {
            namespace: "x".to_owned(),
            name: "p".to_owned(),
        },
        from_address: "10.1.1.1".parse().unwrap(),
        to: End::Address,
        to_address: to.parse().unwrap(),
        protocol: Protocol::Tcp,
        port: 443,
    };
    node.judge(&sides(cluster, &packet)[0], &packet).0
}

#[test]
fn the_api_server_moves() {
    for entity in ["kube-apiserver", "cluster"] {
        let cluster = world(json!([[{"toEntities": [entity]}], null]));
        let mut node = Node::new("n1", Kind::hash);
        node.learn(&cluster, 0);
        let address: IpAddr = "192.0.2.1".parse().unwrap();
        assert!(!reaches(&mut node, &cluster, "192.0.2.1"));
        node.engine.set_api_server([address].into());
        assert!(reaches(&mut node, &cluster, "192.0.2.1"));
        assert!(!reaches(&mut node, &cluster, "192.0.2.2"));
        node.engine.set_api_server([].into());
        assert!(!reaches(&mut node, &cluster, "192.0.2.1"));
    }
}

#[test]
fn a_group_that_is_broken_is_denied_with_the_whole_world() {
    let cluster =
        world(json!([[{"toEntities": ["world"]}], [{"toCIDRSet": [{"cidrGroupRef": "g"}]}]]));
    let mut node = Node::new("n1", Kind::hash);
    node.learn(&cluster, 0);
    let set = |node: &mut Node, blocks: Value| {
        let object = json!({"metadata": {"name": "g"}, "spec": {"externalCIDRs": blocks}});
        let id = node.engine.set_object(Source::CiliumCidrGroup, &object);
        node.engine.errors().contains_key(&id)
    };
    assert!(reaches(&mut node, &cluster, "192.0.2.1"));
    assert!(!set(&mut node, json!(["192.0.2.0/24"])));
    assert!(!reaches(&mut node, &cluster, "192.0.2.1"));
    assert!(reaches(&mut node, &cluster, "203.0.113.1"));
    assert!(set(&mut node, json!(["192.0.2.0/24", "what"])));
    assert!(!reaches(&mut node, &cluster, "203.0.113.1"));
    // Groups are no policies.
    assert_eq!(node.engine.policy_ids().len(), 1);
    assert!(!set(&mut node, json!(["192.0.2.0/24"])));
    assert!(reaches(&mut node, &cluster, "203.0.113.1"));
}

#[test]
fn a_policy_of_which_nothing_is_understood_is_told_of() {
    let mut node = Node::new("n1", Kind::hash);
    let object = json!({"metadata": {"namespace": "x", "name": "p"}, "spec": {"nodeSelector": {}, "ingress": [{}]}});
    let id = node.engine.set_object(Source::CiliumNetworkPolicy, &object);
    let rows = node.engine.policy_rows();
    let state = rows[0]["state"].as_str().unwrap();
    assert!(
        state.starts_with("not whole: spec.nodeSelector: "),
        "{state}"
    );
    node.engine.remove_object(&id);
    assert_eq!(node.engine.policy_rows(), Vec::<Value>::new());
}
