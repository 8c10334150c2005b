//! A small cluster that unit tests ask about.

use std::net::IpAddr;

use serde_json::{Value, json};

use crate::{Cluster, End, Packet, Protocol, RuleRef, Side, judge};

/// Namespaces default (project=mine), other (project=other); pods default/db (role=db), default/front and other/front
/// (role=front), default/far (role=far) on another node, default/host with hostNetwork; nodes n1, n2.
pub fn cluster(policies: impl IntoIterator<Item = Value>) -> Cluster {
    let namespace = |name: &str, project: &str| json!({"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": name, "labels": {"kubernetes.io/metadata.name": name, "project": project}}});
    let node = |name: &str, zone: &str, address: &str| json!({"apiVersion": "v1", "kind": "Node", "metadata": {"name": name, "labels": {"zone": zone}}, "status": {"addresses": [{"type": "InternalIP", "address": address}]}});
    Cluster {
        namespaces: vec![namespace("default", "mine"), namespace("other", "other")],
        pods: vec![
            pod("default", "db", "n1", "10.1.1.1"),
            pod("default", "front", "n1", "10.1.1.2"),
            pod("other", "front", "n2", "10.1.2.3"),
            pod("default", "far", "n2", "10.1.2.4"),
            host_pod(),
        ],
        nodes: vec![
            node("n1", "east", "192.168.0.1"),
            node("n2", "west", "192.168.0.2"),
        ],
        policies: policies.into_iter().collect(),
        ..Cluster::default()
    }
}

fn pod(namespace: &str, name: &str, node: &str, address: &str) -> Value {
    json!({
        "apiVersion": "v1",
        "kind": "Pod",
        "metadata": {"namespace": namespace, "name": name, "labels": {"role": name}},
        "spec": {
            "nodeName": node,
            "serviceAccountName": format!("{name}-account"),
            "containers": [
                {"name": "one", "ports": [{"name": "web", "containerPort": 8080}, {"containerPort": 9000}]},
                {"name": "two", "ports": [{"name": "dns", "containerPort": 53, "protocol": "UDP"}]},
            ],
            "initContainers": [
                {"name": "setup", "ports": [{"name": "setup", "containerPort": 7000}]},
                {"name": "proxy", "restartPolicy": "Always", "ports": [{"name": "proxy", "containerPort": 7001}]},
            ],
        },
        "status": {"phase": "Running", "podIPs": [{"ip": address}, {"ip": address.replace("10.1.", "fd00::1:").replace('.', ":")}]},
    })
}

fn host_pod() -> Value {
    let mut pod = pod("default", "host", "n1", "192.168.0.1");
    pod["spec"]["hostNetwork"] = json!(true);
    pod
}

/// An end and its address: "namespace/pod", a node's name, or an address.
fn end(cluster: &Cluster, text: &str) -> (End, IpAddr) {
    if let Ok(address) = text.parse() {
        return (End::Address, address);
    }
    match text.split_once('/') {
        Some((namespace, name)) => {
            let is = |one: &&Value| {
                one["metadata"]["namespace"] == namespace && one["metadata"]["name"] == name
            };
            let pod = cluster.pods.iter().find(is).unwrap();
            let end = End::Pod {
                namespace: namespace.into(),
                name: name.into(),
            };
            (end, crate::ends::pod_addresses(pod)[0])
        }
        None => {
            let is = |one: &&Value| one["metadata"]["name"] == text;
            let node = cluster.nodes.iter().find(is).unwrap();
            (End::Node(text.into()), crate::ends::node_addresses(node)[0])
        }
    }
}

/// A packet: ends as "default/db", "n1" or "1.2.3.4", and what it carries as "tcp:80" or "icmp:8".
pub fn packet(cluster: &Cluster, from: &str, to: &str, what: &str) -> Packet {
    let (from, from_address) = end(cluster, from);
    let (to, to_address) = end(cluster, to);
    let (protocol, number) = what.split_once(':').unwrap();
    let number: u16 = number.parse().unwrap();
    let (protocol, port) = match protocol {
        "tcp" => (Protocol::Tcp, number),
        "udp" => (Protocol::Udp, number),
        "sctp" => (Protocol::Sctp, number),
        "icmp" => (Protocol::Icmp, number << 8),
        other => panic!("{other}"),
    };
    Packet {
        from,
        from_address,
        to,
        to_address,
        protocol,
        port,
    }
}

/// What the receiver's policies say.
pub fn ingress(cluster: &Cluster, from: &str, to: &str, what: &str) -> Side {
    judge(cluster, &packet(cluster, from, to, what)).ingress
}

/// What the sender's policies say.
pub fn egress(cluster: &Cluster, from: &str, to: &str, what: &str) -> Side {
    judge(cluster, &packet(cluster, from, to, what)).egress
}

/// Lists and places of the rules that decided.
pub fn places(by: &[RuleRef]) -> Vec<(&str, &str, usize)> {
    by.iter()
        .map(|one| (one.name.as_str(), one.list.as_str(), one.index))
        .collect()
}
