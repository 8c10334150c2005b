//! Ways that are narrower than their ends: who sends through a Service hears that a packet was too big, be it said by a
//! router beyond or by a node, sends smaller ones, and what it sends arrives whole. Else it would stall: a kernel that
//! is told nothing sends the same packets again.

use std::net::{IpAddr, SocketAddr};
use std::path::PathBuf;
use std::process::Command;
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};
use serde_json::json;
use xebec_tests::place::{Place, Protocol, Server, Talk};
use xebec_tests::succeed;

use super::routes::Routes;
use super::ways::asks_much;
use super::world::{
    FAMILIES, NETNS, OUTSIDE, PORT, TARGET, World, ip, ip_command, of, service, slices,
};

const NEAR_PORT: u16 = 30_050;
const FAR_PORT: u16 = 30_051;
const BEHIND_PORT: u16 = 30_052;
const NARROW_PORT: u16 = 30_053;
/// What fits the narrow part of a way.
const NARROW: u32 = 1_300;
/// Bytes of a datagram that fits a cable, but not that.
const LONG: usize = 1_400;
/// A datagram that was too big is lost, and the next one goes in pieces.
const TRIES: usize = 5;
const PATIENCE: Duration = Duration::from_millis(500);
/// A machine behind the machine outside, which is its router; not one of those to which pods go by their own address.
const BEHIND: [&str; 2] = ["192.175.48.82", "2001:db8:51:1::2"];
/// Its router's side of the cable.
const ROUTER: [&str; 2] = ["192.175.48.81", "2001:db8:51:1::1"];
const LENGTHS: [u8; 2] = [30, 64];
const BEHIND_NETNS: &str = "xebec-test-cells-behind";
const CABLE: &str = "behind";

/// A machine whose cable takes long packets from it, but none to it; it goes at the end.
struct Behind<'a> {
    world: &'a World,
    addresses: [IpAddr; 2],
    place: Place,
}

impl<'a> Behind<'a> {
    fn new(world: &'a World) -> Result<Self> {
        let netns = PathBuf::from("/run/netns").join(BEHIND_NETNS);
        let behind = Self {
            world,
            addresses: [ip(BEHIND[0])?, ip(BEHIND[1])?],
            place: Place::new("behind", Some(netns), None),
        };
        behind.remove();
        ip_command(&format!("netns add {BEHIND_NETNS}"))?;
        ip_command(&format!(
            "-n {NETNS} link add {CABLE} type veth peer name eth0 netns {BEHIND_NETNS}"
        ))?;
        for (netns, device, own) in [(NETNS, CABLE, ROUTER), (BEHIND_NETNS, "eth0", BEHIND)] {
            for v4 in FAMILIES {
                let (address, length) = (of(own, v4), of(LENGTHS, v4));
                let dad = if v4 { "" } else { " nodad" };
                ip_command(&format!(
                    "-n {netns} addr add {address}/{length} dev {device}{dad}"
                ))?;
            }
            ip_command(&format!("-n {netns} link set {device} up"))?;
        }
        for v4 in FAMILIES {
            // By the route: a veth device with a smaller MTU would also refuse what comes from there.
            let to = of(BEHIND, v4);
            ip_command(&format!(
                "-n {NETNS} route add {to} dev {CABLE} mtu lock {NARROW}"
            ))?;
            let by = of(ROUTER, v4);
            ip_command(&format!("-n {BEHIND_NETNS} route add default via {by}"))?;
            for node in world.nodes.keys() {
                behind.route(node, "add", v4)?;
            }
        }
        behind.forwards(true)?;
        Ok(behind)
    }

    fn route(&self, node: &str, what: &str, v4: bool) -> Result<()> {
        let (to, by) = (of(BEHIND, v4), of(OUTSIDE, v4));
        let route = ["ip", "route", what, to, "via", by];
        self.world.cluster.in_node(node, &route).map(drop)
    }

    /// Whether the machine outside is a router.
    fn forwards(&self, on: bool) -> Result<()> {
        let written = self.world.outside.run(|| {
            let text = if on { "1" } else { "0" };
            std::fs::write("/proc/sys/net/ipv4/ip_forward", text)?;
            std::fs::write("/proc/sys/net/ipv6/conf/all/forwarding", text)
        })?;
        written.context("could not turn forwarding on or off")
    }

    /// How often the router has said that a packet is too big.
    fn said(&self, v4: bool) -> Result<u64> {
        let (file, head) = if v4 {
            ("snmp", "Icmp:")
        } else {
            ("snmp6", "Icmp6OutPktTooBigs")
        };
        let path = format!("/proc/thread-self/net/{file}");
        let text = self.world.outside.run(|| std::fs::read_to_string(&path))?;
        let text = text.with_context(|| format!("could not read {path}"))?;
        let mut lines = text.lines().filter(|line| line.starts_with(head));
        let words = |line: Option<&str>| -> Vec<String> {
            let words = line.unwrap_or_default().split_whitespace();
            words.map(str::to_owned).collect()
        };
        let first = words(lines.next());
        let value = if v4 {
            let at = first.iter().position(|name| name == "OutDestUnreachs");
            at.and_then(|at| words(lines.next()).get(at).cloned())
        } else {
            first.get(1).cloned()
        };
        let value = value.and_then(|value| value.parse().ok());
        value.with_context(|| format!("{path} has no {head}"))
    }

    /// Is answered more than a packet holds, and the router said so. A server may also send its answers one by one.
    fn is_answered_much(&self, to: SocketAddr, server: &str, seen: IpAddr) -> Result<()> {
        let v4 = to.is_ipv4();
        for _ in 0..TRIES {
            let before = self.said(v4)?;
            asks_much(&self.place, to, server, seen)?;
            if self.said(v4)? > before {
                return Ok(());
            }
        }
        bail!("{server} answers behind {to}: nothing was too big")
    }

    fn remove(&self) {
        let netns = ["netns", "del", BEHIND_NETNS];
        let _ = Command::new("ip").args(netns).output();
    }
}

impl Drop for Behind<'_> {
    fn drop(&mut self) {
        self.remove();
        let _ = self.forwards(false);
        for node in self.world.nodes.keys() {
            for v4 in FAMILIES {
                // One that could not be made is not there.
                let _ = self.route(node, "del", v4);
            }
        }
        let _ = forget(self.world);
    }
}

/// Has all kernels forget what they have learned of ways.
fn forget(world: &World) -> Result<()> {
    let pods = world.pods.values().map(|pod| &pod.place);
    let nodes = world.nodes.values().map(|node| &node.place);
    for place in pods.chain(nodes).chain([&world.outside, &world.machine]) {
        for family in ["-4", "-6"] {
            let flush = [family, "route", "flush", "cache"];
            let output = place.run(|| Command::new("ip").args(flush).output())?;
            let what = format!("ip {}", flush.join(" "));
            succeed(&what, output.context("could not start ip")?)?;
        }
    }
    Ok(())
}

/// Long datagrams, until one is answered by one as long. The first is not: where nothing is too big, nothing is shown.
fn asks_at_length(place: &Place, to: SocketAddr, server: &str, client: IpAddr) -> Result<Talk> {
    let what = format!("{}, datagrams to {to}", place.name);
    let mut talk = place.talk(Protocol::Udp, to)?;
    talk.set_patience(PATIENCE)?;
    let mut failed = Vec::new();
    while failed.len() < TRIES {
        match talk.ask_at_length(LONG) {
            Ok(answer) => {
                ensure!(!failed.is_empty(), "{what}: nothing was too big");
                ensure!(
                    answer.name == server && answer.client.ip() == client,
                    "{what}: {answer:?}, not {server} that sees {client}"
                );
                return Ok(talk);
            }
            Err(error) => failed.push(error.to_string()),
        }
    }
    bail!("{what}: no answer as long as the question: {failed:?}")
}

/// Sends much and is answered, and knows then how narrow the way is; by datagrams as well, with nothing known again.
fn learns(
    world: &World,
    place: &Place,
    to: SocketAddr,
    server: &str,
    client: IpAddr,
) -> Result<()> {
    let knows = |what: &str, talk: Talk| -> Result<()> {
        let mtu = talk.path_mtu()?;
        let words = format!("{} to {to}, {what}", place.name);
        ensure!(mtu == NARROW, "{words}: packets of {mtu} bytes");
        Ok(())
    };
    forget(world)?;
    knows("TCP", asks_much(place, to, server, client)?)?;
    forget(world)?;
    knows("UDP", asks_at_length(place, to, server, client)?)
}

/// A router beyond says it: to pods that answer a client behind it, and to everybody who sends to a backend behind it.
pub fn said_by_a_router(world: &mut World) -> Result<()> {
    let spec = |selector, port: u16| {
        let mut spec = json!({"type": "NodePort", "nodePort": port});
        if let Some(name) = selector {
            spec["selector"] = json!({"name": name});
        }
        spec
    };
    let behind = Behind::new(world)?;
    forget(world)?;
    let mut objects = vec![
        service("router-near", spec(Some("a1"), NEAR_PORT)),
        service("router-far", spec(Some("a2"), FAR_PORT)),
        service("router-behind", spec(None, BEHIND_PORT)),
    ];
    objects.extend(slices("router-behind", &[(behind.addresses, json!({}))]));
    world.apply(&objects)?;
    for name in ["router-near", "router-far", "router-behind"] {
        world.settled(name, 1)?;
    }
    let ips = world.cluster_ips("router-behind")?;
    let (b1, node1) = (world.pod("b1")?, world.node("node1")?);
    for v4 in FAMILIES {
        let (client, node) = (of(behind.addresses, v4), of(node1.addresses, v4));
        // The pod of the node itself sees the client, one of another sees the node.
        for (port, server, seen) in [(NEAR_PORT, "a1", client), (FAR_PORT, "a2", node)] {
            let to = SocketAddr::new(node, port);
            behind.is_answered_much(to, server, seen)?;
            forget(world)?;
            asks_at_length(&behind.place, to, server, seen)?;
        }
        let at = SocketAddr::new(client, TARGET);
        let _server = Server::start_at(&behind.place, "behind", at)?;
        let inside = SocketAddr::new(of(ips, v4), PORT);
        for place in [&b1.place.without_sockets(), &b1.place, &node1.place] {
            learns(world, place, inside, "behind", node)?;
        }
        let at_node = SocketAddr::new(node, BEHIND_PORT);
        learns(world, &world.outside, at_node, "behind", node)?;
    }
    world.delete(&["router-near", "router-far", "router-behind"])
}

/// A way of the first node to this pod that is narrower than its devices.
fn narrow<'a>(world: &'a World, pod: &str) -> Result<Routes<'a>> {
    let pod = world.pod(pod)?;
    let node = world.node(pod.node)?;
    let routes = FAMILIES.map(|v4| {
        let (to, by) = (of(pod.addresses, v4), of(node.addresses, v4));
        format!("{to} via {by} mtu lock {NARROW}")
    });
    Routes::add(world, "node1", routes.into())
}

/// A node says it whose way to the backend's node is narrow: to a pod of its own that asks the ClusterIP, and to who asks
/// its port from outside.
pub fn said_by_a_node(world: &mut World) -> Result<()> {
    let spec = json!({"type": "NodePort", "selector": {"name": "a2"}, "nodePort": NARROW_PORT});
    world.apply(&[service("narrow", spec)])?;
    world.settled("narrow", 1)?;
    let ips = world.cluster_ips("narrow")?;
    let (b1, node1) = (world.pod("b1")?, world.node("node1")?);
    let narrow = narrow(world, "a2")?;
    for v4 in FAMILIES {
        let (pod, node) = (of(b1.addresses, v4), of(node1.addresses, v4));
        let inside = SocketAddr::new(of(ips, v4), PORT);
        let at_node = SocketAddr::new(node, NARROW_PORT);
        for place in [&b1.place.without_sockets(), &b1.place] {
            learns(world, place, inside, "a2", pod)?;
        }
        learns(world, &world.outside, at_node, "a2", node)?;
        learns(world, &world.machine, at_node, "a2", node)?;
    }
    drop(narrow);
    forget(world)?;
    world.delete(&["narrow"])
}
