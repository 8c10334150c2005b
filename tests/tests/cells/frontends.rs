//! Kinds of frontends: cluster addresses, node ports, external addresses and host ports, from everywhere.

use std::io::ErrorKind;
use std::net::{IpAddr, SocketAddr};

use anyhow::{Result, anyhow, ensure};
use serde_json::json;
use xebec_tests::eventually;
use xebec_tests::place::{PROTOCOLS, Place, Protocol};

use super::life::Loose;
use super::world::{
    EXTERNAL, FAMILIES, HOST_PORT, MINUTE, OUTSIDE, PORT, World, ip, of, service, spread,
};

const NODE_PORT: u16 = 30_010;
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
    world.delete(&["plain"])
}

/// Sockets of IPv6 that talk IPv4, as runtimes make them that know both: they are translated, and see whom they asked.
pub fn mapped(world: &mut World) -> Result<()> {
    let spec = json!({"type": "NodePort", "selector": {"app": "web"}, "nodePort": NODE_PORT + 13});
    world.apply(&[service("mapped", spec)])?;
    world.settled("mapped", 3)?;
    let node = world.node("node2")?;
    let to = |ip: IpAddr, port: u16| match ip {
        IpAddr::V4(ip) => SocketAddr::new(ip.to_ipv6_mapped().into(), port),
        ip => SocketAddr::new(ip, port),
    };
    let cluster_ip = to(of(world.cluster_ips("mapped")?, true), PORT);
    let node_port = to(of(node.addresses, true), NODE_PORT + 13);
    let late = &world.pod("late")?.place;
    for place in [late, &late.without_sockets(), &node.place] {
        for to in [cluster_ip, node_port] {
            for protocol in PROTOCOLS {
                spread(place, protocol, to, &ALL)?;
                let mut talk = place.talk(protocol, to)?;
                talk.ask()?;
                let peer = talk.peer()?;
                ensure!(peer == to, "{}, {protocol:?}: {peer}, not {to}", place.name);
            }
            Loose::new(place, to)?.ask()?;
        }
    }
    world.delete(&["mapped"])
}

/// Ports of a pod at its node, which are at no other node; the pod sees who asks from outside.
pub fn host_ports(world: &mut World) -> Result<()> {
    let (node1, node2) = (world.node("node1")?, world.node("node2")?);
    for v4 in FAMILIES {
        let to = SocketAddr::new(of(node1.addresses, v4), HOST_PORT);
        let nobody = SocketAddr::new(of(node2.addresses, v4), HOST_PORT);
        for protocol in PROTOCOLS {
            for pod in ["a1", "b1", "late"] {
                let place = &world.pod(pod)?.place;
                spread(place, protocol, to, &["a1"])?;
                spread(&place.without_sockets(), protocol, to, &["a1"])?;
            }
            for place in [&node1.place, &node2.place, &world.machine, &world.outside] {
                spread(place, protocol, to, &["a1"])?;
                let refusal = place.refusal(protocol, nobody);
                let refused = Some(ErrorKind::ConnectionRefused);
                let what = format!("{} to {protocol:?} {nobody}", place.name);
                ensure!(refusal == refused, "{what}: {refusal:?}");
            }
            let seen = world.outside.ask(protocol, to)?.client.ip();
            ensure!(seen == ip(of(OUTSIDE, v4))?, "{protocol:?}: seen as {seen}");
        }
    }
    Ok(())
}

/// A pod that reaches itself through its Service.
pub fn hairpin(world: &mut World) -> Result<()> {
    let spec = json!({"type": "NodePort", "selector": {"name": "a1"}, "nodePort": NODE_PORT + 20});
    world.apply(&[service("self", spec)])?;
    world.settled("self", 1)?;
    let (ips, place) = (world.cluster_ips("self")?, &world.pod("a1")?.place);
    for v4 in FAMILIES {
        let nodes = ["node1", "node2"].map(|node| world.node(node));
        for protocol in PROTOCOLS {
            for place in [place, &place.without_sockets()] {
                spread(place, protocol, SocketAddr::new(of(ips, v4), PORT), &["a1"])?;
                for node in &nodes {
                    let node = node.as_ref().map_err(|error| anyhow!("{error:#}"))?;
                    let to = SocketAddr::new(of(node.addresses, v4), NODE_PORT + 20);
                    spread(place, protocol, to, &["a1"])?;
                }
            }
        }
    }
    world.delete(&["self"])
}

/// A Service without endpoints refuses at once, by a reset or an ICMP error, whoever asks: by its ClusterIP, an external
/// address, a load balancer's or a node port, whatever its policies.
pub fn nobody_there(world: &mut World) -> Result<()> {
    let spec = |policy: &str, port: u16| {
        json!({
            "type": "LoadBalancer", "nodePort": port, "selector": {"app": "nobody"}, "externalTrafficPolicy": policy,
            "internalTrafficPolicy": policy,
        })
    };
    let mut open = spec("Cluster", NODE_PORT + 21);
    open["externalIPs"] = json!(EXTERNAL);
    // No node announces the address of this one.
    let local = spec("Local", NODE_PORT + 37);
    world.apply(&[service("none", open), service("none-local", local)])?;
    world.settled("none", 0)?;
    world.settled("none-local", 0)?;
    let at = SocketAddr::new;
    let balancers = [world.balancer("none")?, world.balancer("none-local")?];
    let ips = [world.cluster_ips("none")?, world.cluster_ips("none-local")?];
    for v4 in FAMILIES {
        let external = at(ip(of(EXTERNAL, v4))?, PORT);
        let balanced = balancers.map(|all| at(of(all, v4), PORT));
        let refused = Some(ErrorKind::ConnectionRefused);
        eventually("a node announces the address", MINUTE, || {
            Ok(world.outside.refusal(Protocol::Tcp, balanced[0]) == refused)
        })?;
        let everywhere = [at(of(ips[0], v4), PORT), at(of(ips[1], v4), PORT), external];
        let mut wanted = vec![
            (world.outside.clone(), external),
            (world.outside.clone(), balanced[0]),
            (world.machine.clone(), balanced[0]),
        ];
        let ports: Vec<SocketAddr> = world
            .nodes
            .values()
            .flat_map(|node| {
                [NODE_PORT + 21, NODE_PORT + 37].map(|port| at(of(node.addresses, v4), port))
            })
            .collect();
        for pod in ["a1", "a2"] {
            let place = &world.pod(pod)?.place;
            for place in [place, &place.without_sockets()] {
                let all = everywhere.iter().chain(&balanced).chain(&ports);
                wanted.extend(all.map(|to| (place.clone(), *to)));
            }
        }
        for node in world.nodes.values() {
            let all = everywhere.iter().chain(&balanced).chain(&ports);
            wanted.extend(all.map(|to| (node.place.clone(), *to)));
        }
        for place in [&world.outside, &world.machine] {
            wanted.extend(ports.iter().map(|to| (place.clone(), *to)));
        }
        for (place, to) in wanted {
            for protocol in PROTOCOLS {
                let refusal = place.refusal(protocol, to);
                let what = format!("{} to {protocol:?} {to}", place.name);
                ensure!(refusal == refused, "{what}: {refusal:?}");
            }
        }
    }
    world.delete(&["none", "none-local"])
}
