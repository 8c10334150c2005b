//! Random packets of a cluster.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use ipnet::IpNet;
use rand::Rng;
use rand::rngs::StdRng;
use serde_json::Value;

use super::words::{ADDRESSES, NAMED_PORTS, PORTS, one};
use crate::{Cluster, End, Packet, Protocol, ends, object};

/// Types of ICMP and of ICMPv6, with codes.
const MESSAGES: [(u8, u8); 8] = [
    (0, 0),
    (3, 1),
    (3, 4),
    (8, 0),
    (8, 1),
    (128, 0),
    (129, 0),
    (1, 4),
];

/// Somebody, with all addresses.
#[derive(Clone)]
struct Somebody {
    end: End,
    addresses: Vec<IpAddr>,
}

/// Packets that begin flows. One end is a pod, the other mostly too; none is of a pod that has ended, though one may be
/// of its address. A pod may send to itself, as it does through a Service.
pub fn packets(random: &mut StdRng, cluster: &Cluster, count: usize) -> Vec<Packet> {
    let pods = pods(cluster);
    let nodes = nodes(cluster);
    let outside = outside(cluster, &pods, &nodes);
    let ports = ports(cluster);
    let mut packets = Vec::new();
    while packets.len() < count {
        let near = if pods.is_empty() {
            one(random, &nodes).clone()
        } else {
            one(random, &pods).clone()
        };
        let far = match random.random_range(0..10) {
            0..=5 if !pods.is_empty() => one(random, &pods),
            6 => one(random, &nodes),
            _ => one(random, &outside),
        };
        let far = far.clone();
        let address = *one(random, &near.addresses);
        let fitting = far
            .addresses
            .iter()
            .filter(|ip| ip.is_ipv4() == address.is_ipv4());
        let Some(far_address) = fitting.copied().next() else {
            continue;
        };
        let (from, to) = ((near.end, address), (far.end, far_address));
        let (from, to) = if random.random_bool(0.5) {
            (from, to)
        } else {
            (to, from)
        };
        let (protocol, port) = what(random, &ports);
        packets.push(Packet {
            from: from.0,
            from_address: from.1,
            to: to.0,
            to_address: to.1,
            protocol,
            port,
        });
    }
    packets
}

fn what(random: &mut StdRng, ports: &[u16]) -> (Protocol, u16) {
    if random.random_bool(0.1) {
        let (kind, code) = *one(random, &MESSAGES);
        return (Protocol::Icmp, u16::from_be_bytes([kind, code]));
    }
    let protocols = [Protocol::Tcp, Protocol::Tcp, Protocol::Udp, Protocol::Sctp];
    let protocol = *one(random, &protocols);
    let port = match random.random_range(0..8) {
        0..=1 => one(random, &NAMED_PORTS).2,
        2 => *one(random, &PORTS),
        3 => one(random, ports).saturating_add(1),
        4 => one(random, ports).saturating_sub(1).max(1),
        _ => *one(random, ports),
    };
    (protocol, port)
}

/// The numbers of ports in policies, and one more.
fn ports(cluster: &Cluster) -> Vec<u16> {
    let mut ports = vec![80];
    for policy in &cluster.policies {
        walk(policy, "", &mut |key, value| {
            if matches!(key, "port" | "endPort" | "number" | "start" | "end") {
                let number = value.as_u64().and_then(|number| number.try_into().ok());
                let text = value.as_str().and_then(|text| text.parse().ok());
                ports.extend(number.or(text).filter(|port: &u16| *port > 0));
            }
        });
    }
    ports
}

/// The blocks of addresses in policies, and some others.
fn blocks(cluster: &Cluster) -> Vec<IpNet> {
    let some = ["10.0.0.0/8", "10.1.1.0/25", "fd00:1:0:2::80/121"];
    let mut blocks: Vec<IpNet> = some.iter().filter_map(|text| text.parse().ok()).collect();
    for policy in &cluster.policies {
        walk(policy, "", &mut |_, value| {
            let block: Option<IpNet> = value.as_str().and_then(|text| text.parse().ok());
            blocks.extend(block);
        });
    }
    blocks
}

/// Shows all values, with their keys, to a function.
fn walk(value: &Value, key: &str, see: &mut impl FnMut(&str, &Value)) {
    see(key, value);
    match value {
        Value::Array(list) => list.iter().for_each(|one| walk(one, key, see)),
        Value::Object(map) => map.iter().for_each(|(key, one)| walk(one, key, see)),
        _ => {}
    }
}

fn pods(cluster: &Cluster) -> Vec<Somebody> {
    let living = cluster.pods.iter().filter(|one| !ends::is_finished(one));
    living
        .map(|pod| {
            let metadata = object::metadata(pod);
            Somebody {
                end: End::Pod {
                    namespace: metadata.namespace,
                    name: metadata.name,
                },
                addresses: ends::pod_addresses(pod),
            }
        })
        .filter(|one| !one.addresses.is_empty())
        .collect()
}

fn nodes(cluster: &Cluster) -> Vec<Somebody> {
    let nodes = cluster.nodes.iter();
    nodes
        .map(|node| Somebody {
            end: End::Node(object::metadata(node).name),
            addresses: ends::node_addresses(node),
        })
        .collect()
}

/// Those just inside and outside of blocks, and those of pods that have ended, without the addresses of others.
fn outside(cluster: &Cluster, pods: &[Somebody], nodes: &[Somebody]) -> Vec<Somebody> {
    let blocks = blocks(cluster).into_iter();
    let borders = blocks.filter(|one| one.prefix_len() > 0).flat_map(borders);
    let ended = cluster.pods.iter().filter(|one| ends::is_finished(one));
    let ended = ended.filter(|one| !ends::is_host_network(one));
    let answered = cluster.answers.iter().map(|one| one.address);
    let endpoints = ADDRESSES.iter().filter_map(|one| one.parse().ok());
    borders
        .chain(answered)
        .chain(endpoints.take(cluster.slices.len()))
        .chain(ended.flat_map(ends::pod_addresses))
        .chain([
            IpAddr::V4(Ipv4Addr::new(203, 0, 113, 7)),
            IpAddr::V6(Ipv6Addr::new(0x2001, 0xdb8, 0, 0, 0, 0, 0, 7)),
        ])
        .filter(|ip| {
            !pods
                .iter()
                .chain(nodes)
                .any(|one| one.addresses.contains(ip))
        })
        .map(|ip| Somebody {
            end: End::Address,
            addresses: vec![ip],
        })
        .collect()
}

fn borders(block: IpNet) -> Vec<IpAddr> {
    match block {
        IpNet::V4(block) => {
            let (first, last) = (block.network().to_bits(), block.broadcast().to_bits());
            let all = [
                Some(first),
                Some(last),
                first.checked_sub(1),
                last.checked_add(1),
            ];
            let all = all.into_iter().flatten();
            all.map(|bits| Ipv4Addr::from_bits(bits).into()).collect()
        }
        IpNet::V6(block) => {
            let (first, last) = (block.network().to_bits(), block.broadcast().to_bits());
            let all = [
                Some(first),
                Some(last),
                first.checked_sub(1),
                last.checked_add(1),
            ];
            let all = all.into_iter().flatten();
            all.map(|bits| Ipv6Addr::from_bits(bits).into()).collect()
        }
    }
}
