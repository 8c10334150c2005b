//! Kinds of frontends: cluster addresses, node ports, external addresses and host ports, from everywhere.

use std::net::{IpAddr, SocketAddr};

use anyhow::Result;
use serde_json::json;
use xebec_tests::place::{PROTOCOLS, Place};

use super::world::{EXTERNAL, FAMILIES, PORT, World, ip, of, service, spread};

const NODE_PORT: u16 = 30_100;
const ALL: [&str; 3] = ["a1", "a2", "b1"];

/// ClusterIPs, external addresses and node ports of both nodes, by TCP and UDP of both families: from pods (one of them
/// a backend itself) with and without socket programs, from both nodes, and what is not for the cluster alone from
/// outside and from the machine that carries the nodes.
pub fn every_frontend(world: &mut World) -> Result<()> {
    let spec = json!({
        "type": "NodePort", "selector": {"app": "web"}, "nodePort": NODE_PORT, "externalIPs": EXTERNAL,
    });
    world.apply(&[service("plain", spec)])?;
    world.settled("plain", 3)?;
    let cluster_ips = world.cluster_ips("plain")?;
    let (a1, b1, late) = (world.pod("a1")?, world.pod("b1")?, world.pod("late")?);
    let nodes = [world.node("node1")?, world.node("node2")?];
    let inside = [
        a1.place.clone(),
        a1.place.without_sockets(),
        b1.place.clone(),
        b1.place.without_sockets(),
        late.place.clone(),
        late.place.without_sockets(),
        nodes[0].place.clone(),
        nodes[1].place.clone(),
    ];
    for v4 in FAMILIES {
        let at = |ip: IpAddr, port: u16| SocketAddr::new(ip, port);
        let cluster_ip = at(of(cluster_ips, v4), PORT);
        let external = at(ip(of(EXTERNAL, v4))?, PORT);
        let ports = nodes.map(|node| at(of(node.addresses, v4), NODE_PORT));
        let mut wanted: Vec<(&Place, SocketAddr)> = Vec::new();
        for place in &inside {
            wanted.extend([cluster_ip, external, ports[0], ports[1]].map(|to| (place, to)));
        }
        wanted.extend([external, ports[0], ports[1]].map(|to| (&world.outside, to)));
        wanted.extend(ports.map(|to| (&world.machine, to)));
        for (place, to) in wanted {
            for protocol in PROTOCOLS {
                spread(place, protocol, to, &ALL)?;
            }
        }
    }
    Ok(())
}
