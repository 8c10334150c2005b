//! What an engine says of flows, which must be what the kernels do.

use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};
use xebec_policy::explain::{Asked, Party, Side};
use xebec_policy_oracle::random::{change, cluster, packets};
use xebec_policy_oracle::{Cluster, End, Packet};

use crate::plain::{Node, number, sides};
use crate::{ALL, nodes, plainly, seeds, without_names_in_blocks};

fn party(end: &End, address: std::net::IpAddr) -> Party {
    match end {
        End::Node(name) => Party::Node(name.clone()),
        _ => Party::Address(address),
    }
}

/// What an engine says of a packet: the sender's side and the receiver's.
pub fn explain(node: &Node, packet: &Packet) -> [Side; 2] {
    let asked = Asked {
        from: party(&packet.from, packet.from_address),
        to: party(&packet.to, packet.to_address),
        protocol: number(packet.protocol, packet.to_address.is_ipv4()),
        port: packet.port,
        v4: Some(packet.to_address.is_ipv4()),
    };
    let said = node.engine.explain(&asked).unwrap();
    assert_eq!(said.allowed, said.egress.allowed && said.ingress.allowed);
    [said.egress, said.ingress]
}

/// The engines of all nodes know what the node does that judges.
fn compare(nodes: &[Node], cluster: &Cluster, packet: &Packet) {
    for side in sides(cluster, packet) {
        let home = nodes.iter().find(|node| node.name == side.home).unwrap();
        let (allowed, rule) = home.judge(&side, packet);
        let by = home.names.now().rule(rule).map(|rule| rule.id.clone());
        for node in nodes {
            let said = &explain(node, packet)[usize::from(side.ingress)];
            assert_eq!(
                (said.allowed, said.decided_by()),
                (allowed, by.as_ref()),
                "{packet:?}, ingress {}, on {}: {said:#?}\n{cluster:#?}",
                side.ingress,
                node.name
            );
            assert_eq!(said.remedies.is_empty(), allowed);
        }
    }
}

#[test]
fn engines_explain_what_kernels_do() {
    seeds().for_each(|seed| {
        let mut random = StdRng::seed_from_u64(seed);
        let mut world = cluster(&mut random, &ALL);
        without_names_in_blocks(&mut world);
        let mut nodes = nodes(&world, plainly);
        for _ in 0..4 {
            for node in &mut nodes {
                node.learn(&world, random.random_range(0..3));
            }
            for packet in packets(&mut random, &world, 40) {
                compare(&nodes, &world, &packet);
            }
            change(&mut random, &mut world);
            without_names_in_blocks(&mut world);
        }
    });
}
