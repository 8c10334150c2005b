//! Random pods.

use std::net::IpAddr;

use rand::Rng;
use rand::rngs::StdRng;
use serde_json::{Value, json};

use super::NODES;
use super::words::{HOMES, NAMED_PORTS, free_name, labels, one};
use crate::{Cluster, ends};

/// The last parts of pods' addresses, near the borders of blocks: as many as there may be pods, so that one is free.
const HOSTS: [u8; super::MOST_PODS] = [1, 2, 3, 4, 126, 127, 128, 129, 253, 254];

/// Adds a pod: mostly one with addresses of both families, sometimes one with hostNetwork or one that has ended. The
/// address of one that has ended may go to another.
pub fn add(random: &mut StdRng, cluster: &mut Cluster) {
    let node = random.random_range(0..NODES.len());
    let is_host = random.random_bool(0.1);
    let phase = if random.random_bool(0.1) {
        *one(random, &["Succeeded", "Failed"])
    } else {
        "Running"
    };
    let addresses = if is_host {
        vec![
            format!("192.168.0.{}", node + 1),
            format!("fd01::{}", node + 1),
        ]
    } else {
        free_addresses(random, cluster, node + 1)
    };
    let addresses: Vec<Value> = addresses.iter().map(|ip| json!({"ip": ip})).collect();
    let mut spec = json!({
        "nodeName": NODES[node],
        "serviceAccountName": *one(random, &["default", "robot"]),
        "containers": [{"name": "main", "ports": ports(random)}],
    });
    if is_host {
        spec["hostNetwork"] = json!(true);
    }
    if random.random_bool(0.3) {
        // The ports of a sidecar are the pod's; those of a container that has ended aren't.
        spec["initContainers"] = json!([
            {"name": "first", "ports": ports(random)},
            {"name": "sidecar", "restartPolicy": "Always", "ports": ports(random)},
        ]);
    }
    let name = free_name(&cluster.pods, "pod");
    cluster.pods.push(json!({
        "apiVersion": "v1",
        "kind": "Pod",
        "metadata": {
            "namespace": *one(random, &HOMES),
            "name": name,
            "labels": labels(random, &["app", "tier"]),
        },
        "spec": spec,
        "status": {"phase": phase, "podIPs": addresses},
    }));
}

fn free_addresses(random: &mut StdRng, cluster: &Cluster, node: usize) -> Vec<String> {
    let living = cluster.pods.iter().filter(|one| !ends::is_finished(one));
    let taken: Vec<IpAddr> = living.flat_map(ends::pod_addresses).collect();
    loop {
        let host = *one(random, &HOSTS);
        let both = [
            format!("10.1.{node}.{host}"),
            format!("fd00:1:0:{node}::{host:x}"),
        ];
        let is_taken = |text: &String| text.parse().is_ok_and(|address| taken.contains(&address));
        if both.iter().any(is_taken) {
            continue;
        }
        return match random.random_range(0..12) {
            0 => both[..1].to_vec(),
            1 => both[1..].to_vec(),
            _ => both.to_vec(),
        };
    }
}

fn ports(random: &mut StdRng) -> Vec<Value> {
    let mut ports = Vec::new();
    for (name, protocol, port) in NAMED_PORTS {
        if random.random_bool(0.3) {
            let mut one = json!({"name": name, "containerPort": port});
            // TCP goes without saying.
            if protocol != "TCP" || random.random_bool(0.5) {
                one["protocol"] = json!(protocol);
            }
            ports.push(one);
        }
    }
    ports
}
