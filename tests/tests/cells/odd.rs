//! Packets out of the ordinary: datagrams in fragments, errors about translated flows, and flows that find no port.

use std::io::ErrorKind;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, UdpSocket};

use anyhow::{Context, Result, ensure};
use serde_json::json;
use xebec_tests::place::{PROTOCOLS, Place, Protocol, Server};

use super::world::{BEYOND, FAMILIES, PORT, TARGET, World, ip, of, service};

const NEAR_PORT: u16 = 30_024;
const FAR_PORT: u16 = 30_025;
const CLOSED_PORT: u16 = 30_026;
/// Bytes of a datagram that takes three fragments.
const LONG: usize = 4_000;

/// Asks with a long datagram and is answered by one, twice: with nothing known of the flow, and with it.
fn asks(place: &Place, to: SocketAddr, wanted: &str) -> Result<()> {
    let what = || format!("{} to {to}", place.name);
    let mut talk = place.talk(Protocol::Udp, to).with_context(what)?;
    for _ in 0..2 {
        let answer = talk.ask_at_length(LONG).with_context(what)?;
        ensure!(
            answer.name == wanted,
            "{}: {answer:?}, not {wanted}",
            what()
        );
    }
    Ok(())
}

/// Datagrams of several fragments and answers of as many: through ClusterIPs and node ports to backends of the same node
/// and of the other, and to the outside.
pub fn in_fragments(world: &mut World) -> Result<()> {
    let spec = |name: &str, port: u16| json!({"type": "NodePort", "selector": {"name": name}, "nodePort": port});
    world.apply(&[
        service("near", spec("a1", NEAR_PORT)),
        service("far", spec("a2", FAR_PORT)),
    ])?;
    world.settled("near", 1)?;
    world.settled("far", 1)?;
    let beyond: [IpAddr; 2] = [ip(BEYOND[0])?, ip(BEYOND[1])?];
    let servers = beyond.map(|address| {
        Server::start_at(&world.outside, "outside", SocketAddr::new(address, TARGET))
    });
    let node1 = world.node("node1")?;
    let pod = &world.pod("b1")?.place;
    for (name, port, wanted) in [("near", NEAR_PORT, "a1"), ("far", FAR_PORT, "a2")] {
        let ips = world.cluster_ips(name)?;
        for v4 in FAMILIES {
            let inside = SocketAddr::new(of(ips, v4), PORT);
            let at_node = SocketAddr::new(of(node1.addresses, v4), port);
            for place in [pod, &pod.without_sockets(), &node1.place] {
                asks(place, inside, wanted)?;
                asks(place, at_node, wanted)?;
            }
            asks(&world.outside, at_node, wanted)?;
            asks(pod, SocketAddr::new(of(beyond, v4), TARGET), "outside")?;
        }
    }
    for server in servers {
        drop(server?);
    }
    world.delete(&["near", "far"])
}

/// A backend that has closed its port says so, by a reset or an ICMP error: whoever asked the Service hears it as its
/// answer. A kernel sends six such errors to one address at once, and then one a second.
pub fn closed(world: &mut World) -> Result<()> {
    let late = &world.pod("late")?.place;
    let nodes = [world.node("node1")?, world.node("node2")?];
    for (number, pod) in (0..).zip(["a1", "a2"]) {
        let (name, node_port) = (format!("closed-{pod}"), CLOSED_PORT + number);
        let ports = ["TCP", "UDP"].map(|protocol| {
            json!({
                "name": protocol.to_lowercase(), "protocol": protocol, "port": PORT, "targetPort": 1, "nodePort": node_port,
            })
        });
        let spec = json!({"type": "NodePort", "selector": {"name": pod}, "ports": ports});
        world.apply(&[service(&name, spec)])?;
        world.settled(&name, 1)?;
        let ips = world.cluster_ips(&name)?;
        for v4 in FAMILIES {
            let inside = SocketAddr::new(of(ips, v4), PORT);
            let mut wanted = vec![
                (late.clone(), inside),
                (late.without_sockets(), inside),
                (nodes[0].place.clone(), inside),
            ];
            for node in nodes {
                let at_node = SocketAddr::new(of(node.addresses, v4), node_port);
                wanted.push((late.without_sockets(), at_node));
                wanted.push((world.outside.clone(), at_node));
            }
            for (place, to) in wanted {
                for protocol in PROTOCOLS {
                    let refusal = place.refusal(protocol, to);
                    let what = format!("{}, {protocol:?} to {to}, {pod}", place.name);
                    let refused = Some(ErrorKind::ConnectionRefused);
                    ensure!(refusal == refused, "{what}: {refusal:?}");
                }
            }
        }
        world.delete(&[&name])?;
    }
    Ok(())
}

/// One destination takes all the ports that the node has for it: what more goes there is dropped and counted, and others
/// have as many ports as before.
pub fn crowded(world: &mut World) -> Result<()> {
    const DATAGRAMS: u16 = 6_000;
    const FIRST_PORT: u16 = 40_000;
    let no_port = || -> Result<u64> {
        let status = world.cluster.agent_status("node1")?;
        let count = status["packets"]["no_port"].as_u64();
        count.with_context(|| status.to_string())
    };
    let pod = &world.pod("b1")?.place;
    for v4 in FAMILIES {
        let address = ip(of(BEYOND, v4))?;
        let _server =
            Server::start_at(&world.outside, "outside", SocketAddr::new(address, TARGET))?;
        let before = no_port()?;
        let any: IpAddr = match v4 {
            true => Ipv4Addr::UNSPECIFIED.into(),
            false => Ipv6Addr::UNSPECIFIED.into(),
        };
        let sent = pod.run(|| -> std::io::Result<()> {
            for port in FIRST_PORT..FIRST_PORT + DATAGRAMS {
                let socket = UdpSocket::bind((any, port))?;
                // What is dropped at the device is no error of the socket's.
                socket.send_to(b"?", (address, TARGET + 1))?;
            }
            Ok(())
        })?;
        sent.context("could not send")?;
        let dropped = no_port()? - before;
        ensure!(dropped > 0, "{DATAGRAMS} flows have ports");
        for protocol in PROTOCOLS {
            for place in [pod, &world.pod("a1")?.place] {
                let to = SocketAddr::new(address, TARGET);
                let what = || format!("{}, {protocol:?} to {to}", place.name);
                place.ask(protocol, to).with_context(what)?;
            }
        }
    }
    Ok(())
}
