//! Which addresses of a node serve node ports: all of them as they come and go, or those that `--nodeport-addresses`
//! names.

use std::io::ErrorKind;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use serde_json::json;
use xebec_tests::eventually;
use xebec_tests::place::{PROTOCOLS, Place, Protocol, Server};

use super::world::{FAMILIES, MINUTE, OUTSIDE, World, ip, of, service, spread};

const NODE_PORT: u16 = 30_041;
const ALL: [&str; 3] = ["a1", "a2", "b1"];
/// Addresses that the first node has for a while; its object does not tell them.
const MORE: [&str; 2] = ["192.175.48.78", "2001:db8:51::78"];
/// The same for the flag.
pub const MORE_BLOCKS: &str = "192.175.48.78/32,2001:db8:51::78/128";

/// Runs `ip` at a place.
fn ip_at(place: &Place, line: &str) -> Result<()> {
    place
        .without_sockets()
        .run(|| super::world::ip_command(line))?
}

/// The first node has more addresses, for as long as this lives.
struct More<'a> {
    world: &'a World,
}

impl<'a> More<'a> {
    fn new(world: &'a World) -> Result<Self> {
        let more = Self { world };
        let (node1, node2) = (world.node("node1")?, world.node("node2")?);
        for v4 in FAMILIES {
            let (own, by) = (of(MORE, v4), of(node1.addresses, v4));
            // What does not ask for it is not sent from it.
            let rest = if v4 { "" } else { " nodad preferred_lft 0" };
            ip_at(&node1.place, &format!("addr add {own} dev eth0{rest}"))?;
            for place in [&node2.place, &world.outside] {
                ip_at(place, &format!("route add {own} via {by}"))?;
            }
        }
        Ok(more)
    }

    /// The node has them no more, but the machine outside.
    fn move_outside(&self) -> Result<()> {
        let (node1, node2) = (self.world.node("node1")?, self.world.node("node2")?);
        let outside = &self.world.outside;
        for v4 in FAMILIES {
            let (own, by) = (of(MORE, v4), of(OUTSIDE, v4));
            ip_at(&node1.place, &format!("addr del {own} dev eth0"))?;
            ip_at(outside, &format!("route del {own}"))?;
            let rest = if v4 { "" } else { " nodad" };
            ip_at(outside, &format!("addr add {own} dev lo{rest}"))?;
            for node in [node1, node2] {
                ip_at(&node.place, &format!("route replace {own} via {by}"))?;
            }
        }
        Ok(())
    }
}

impl Drop for More<'_> {
    fn drop(&mut self) {
        let nodes = self.world.nodes.values().map(|node| &node.place);
        for place in nodes.chain([&self.world.outside]) {
            for own in MORE {
                // What is elsewhere now, or could not be made, is not there.
                let _ = ip_at(place, &format!("addr del {own} dev eth0"));
                let _ = ip_at(place, &format!("addr del {own} dev lo"));
                let _ = ip_at(place, &format!("route del {own}"));
            }
        }
    }
}

/// Who is in the cluster: pods of both nodes with and without socket programs, and the nodes.
fn insiders(world: &World) -> Result<Vec<Place>> {
    let mut places: Vec<Place> = world
        .nodes
        .values()
        .map(|node| node.place.clone())
        .collect();
    for pod in ["b1", "late"] {
        let place = &world.pod(pod)?.place;
        places.extend([place.clone(), place.without_sockets()]);
    }
    Ok(places)
}

fn everybody(world: &World) -> Result<Vec<Place>> {
    let mut places = insiders(world)?;
    places.push(world.outside.clone());
    Ok(places)
}

/// A Service of a node port with all backends.
fn ported(world: &World) -> Result<()> {
    let spec = json!({"type": "NodePort", "selector": {"app": "web"}, "nodePort": NODE_PORT});
    world.apply(&[service("ported", spec)])?;
    world.settled("ported", 3)
}

fn port_at(address: IpAddr) -> SocketAddr {
    SocketAddr::new(address, NODE_PORT)
}

/// Fails unless all backends answer there, whoever asks.
fn serves(places: &[Place], address: IpAddr) -> Result<()> {
    for place in places {
        for protocol in PROTOCOLS {
            spread(place, protocol, port_at(address), &ALL)?;
        }
    }
    Ok(())
}

/// Fails unless all are refused there.
fn refuses(places: &[Place], address: IpAddr) -> Result<()> {
    let to = port_at(address);
    for place in places {
        for protocol in PROTOCOLS {
            let refusal = place.refusal(protocol, to);
            let refused = Some(ErrorKind::ConnectionRefused);
            let what = format!("{} to {protocol:?} {to}", place.name);
            ensure!(refusal == refused, "{what}: {refusal:?}");
        }
    }
    Ok(())
}

/// Fails unless an address of a node is like any other: its own process answers at the port, and nobody without it.
fn is_plain(world: &World, node: &str, address: IpAddr) -> Result<()> {
    let places = everybody(world)?;
    let server = Server::start_at(&world.node(node)?.place, node, port_at(address))?;
    for place in &places {
        for protocol in PROTOCOLS {
            spread(place, protocol, port_at(address), &[node])?;
        }
    }
    drop(server);
    refuses(&places, address)
}

/// Without the flag: an address that a node gets serves its node ports, and one that it loses is whose it is then; so
/// does IPv4's loopback at the node itself.
pub fn come_and_go(world: &mut World) -> Result<()> {
    ported(world)?;
    let more = More::new(world)?;
    let (everybody, insiders) = (everybody(world)?, insiders(world)?);
    let addresses = [ip(MORE[0])?, ip(MORE[1])?];
    for address in addresses {
        eventually("the new address serves", MINUTE, || {
            let answer = world.outside.ask(Protocol::Tcp, port_at(address));
            Ok(answer.is_ok_and(|answer| ALL.contains(&&*answer.name)))
        })?;
        serves(&everybody, address)?;
    }
    more.move_outside()?;
    for address in addresses {
        let _server = Server::start_at(&world.outside, "outside", port_at(address))?;
        for place in &insiders {
            let what = format!("{} asks the machine outside", place.name);
            eventually(&what, MINUTE, || {
                let answer = place.ask(Protocol::Tcp, port_at(address));
                Ok(answer.with_context(|| what.clone())?.name == "outside")
            })?;
            for protocol in PROTOCOLS {
                spread(place, protocol, port_at(address), &["outside"])?;
            }
        }
    }
    drop(more);
    let nodes = world.nodes.values().map(|node| node.place.clone());
    let nodes: Vec<Place> = nodes.collect();
    serves(&nodes, Ipv4Addr::LOCALHOST.into())?;
    refuses(&nodes, Ipv6Addr::LOCALHOST.into())?;
    // A pod's loopback is its own.
    for pod in ["a1", "late"] {
        let place = &world.pod(pod)?.place;
        let own = [place.clone(), place.without_sockets()];
        refuses(&own, Ipv4Addr::LOCALHOST.into())?;
    }
    world.delete(&["ported"])
}

/// With `--nodeport-addresses primary`: the addresses that the nodes' objects tell first serve, and no other.
pub fn primary(world: &mut World) -> Result<()> {
    let _more = More::new(world)?;
    // An agent that would take the address has it by then.
    std::thread::sleep(Duration::from_millis(500));
    ported(world)?;
    let everybody = everybody(world)?;
    for v4 in FAMILIES {
        for node in world.nodes.values() {
            serves(&everybody, of(node.addresses, v4))?;
        }
        is_plain(world, "node1", ip(of(MORE, v4))?)?;
    }
    let node = world.node("node1")?.place.clone();
    refuses(&[node], Ipv4Addr::LOCALHOST.into())?;
    world.delete(&["ported"])
}

/// With [`MORE_BLOCKS`]: addresses in these blocks serve, and no other.
pub fn blocks(world: &mut World) -> Result<()> {
    ported(world)?;
    let _more = More::new(world)?;
    let everybody = everybody(world)?;
    for v4 in FAMILIES {
        let address = ip(of(MORE, v4))?;
        eventually("the new address serves", MINUTE, || {
            Ok(world.outside.ask(Protocol::Tcp, port_at(address)).is_ok())
        })?;
        serves(&everybody, address)?;
        for (name, node) in &world.nodes {
            is_plain(world, name, of(node.addresses, v4))?;
        }
    }
    let node = world.node("node1")?.place.clone();
    refuses(&[node], Ipv4Addr::LOCALHOST.into())?;
    world.delete(&["ported"])
}

/// Datagrams of pods of the second node to an address that the first one alone takes for its own, which the second
/// masquerades; then others', which the second sends to the same backends by the same ports: each is answered to who
/// has sent it.
pub fn ports_used_again(world: &mut World) -> Result<()> {
    const DATAGRAMS: usize = 600;
    ported(world)?;
    let _more = More::new(world)?;
    let late = &world.pod("late")?.place;
    for v4 in FAMILIES {
        let more = port_at(ip(of(MORE, v4))?);
        eventually("the new address serves", MINUTE, || {
            Ok(world.outside.ask(Protocol::Tcp, more).is_ok())
        })?;
        late.ask_many(Protocol::Udp, more, DATAGRAMS)?;
        let to = port_at(of(world.node("node2")?.addresses, v4));
        world.outside.ask_many(Protocol::Udp, to, DATAGRAMS)?;
    }
    world.delete(&["ported"])
}
