//! The ways that packets take: with direct server return past the node that was asked, and around a node's stack or
//! through it.

use std::io::{BufRead, Write};
use std::net::{IpAddr, SocketAddr};

use anyhow::{Context, Result, bail, ensure};
use serde_json::json;
use xebec_tests::place::{Answer, PROTOCOLS, Place, Protocol, Server, Talk};
use xebec_tests::sctp::End;

use super::policies::seen_as;
use super::routes::Routes;
use super::sctp::{associated, with_sctp};
use super::world::{BEYOND, FAMILIES, OUTSIDE, PORT, TARGET, World, ip, of, service};

const DIRECT_PORT: u16 = 30_019;
const SCTP_PORT: u16 = 30_020;

/// A Service of all protocols with its only backend on the second node.
fn far(world: &World) -> Result<()> {
    let spec = json!({"type": "NodePort", "selector": {"name": "a2"}, "nodePort": DIRECT_PORT});
    world.apply(&[
        service("direct", spec),
        with_sctp("direct-sctp", "a2", SCTP_PORT),
    ])?;
    world.settled("direct", 1)?;
    world.settled("direct-sctp", 1)
}

fn gone(world: &World) -> Result<()> {
    world.delete(&["direct", "direct-sctp"])
}

/// A question that needs several packets, and its answers; the connection goes on.
pub fn asks_much(place: &Place, to: SocketAddr, server: &str, client: IpAddr) -> Result<Talk> {
    const QUESTIONS: usize = 2_000;
    let Talk::Tcp(mut stream) = place.talk(Protocol::Tcp, to)? else {
        bail!("no connection");
    };
    stream.get_mut().write_all(&b"?\n".repeat(QUESTIONS))?;
    let mut line = String::new();
    for count in 0..QUESTIONS {
        line.clear();
        stream
            .read_line(&mut line)
            .with_context(|| format!("{} to {to}: {count} answers", place.name))?;
        let answer = Answer::read(&line)?;
        ensure!(
            answer.name == server && answer.client.ip() == client,
            "{} to {to}: {answer:?}, not {server} that sees {client}",
            place.name
        );
    }
    Ok(Talk::Tcp(stream))
}

/// A datagram from a socket that is connected to nobody: the answer tells who sends it.
fn asks_loosely(place: &Place, to: SocketAddr) -> Result<()> {
    let socket = place.datagrams(to.is_ipv4())?;
    socket.send_to(b"?", to)?;
    let (_, from) = socket.recv_from(&mut [0; 256])?;
    ensure!(from == to, "{} asked {to}, {from} answered", place.name);
    Ok(())
}

/// With `--lb-mode dsr`: a client outside asks a node for a backend of another one, which sees the client; its answers
/// don't pass the node that was asked, and bear its address.
pub fn direct(world: &mut World) -> Result<()> {
    far(world)?;
    let outside = &world.outside;
    let node1 = world.node("node1")?.addresses;
    for v4 in FAMILIES {
        // From here on, everybody knows everybody's hardware address.
        let to = SocketAddr::new(of(node1, v4), DIRECT_PORT);
        seen_as(outside, Protocol::Udp, to, "a2", ip(of(OUTSIDE, v4))?)?;
    }
    let nowhere = OUTSIDE.map(|to| format!("blackhole {to}"));
    let _closed = Routes::add(world, "node1", nowhere.into())?;
    for v4 in FAMILIES {
        let client = ip(of(OUTSIDE, v4))?;
        let to = SocketAddr::new(of(node1, v4), DIRECT_PORT);
        for protocol in PROTOCOLS {
            for _ in 0..10 {
                seen_as(outside, protocol, to, "a2", client)?;
            }
        }
        asks_much(outside, to, "a2", client)?;
        asks_loosely(outside, to)?;
        let a2 = world.pod("a2")?;
        let backend = End::open(&a2.place, of(a2.addresses, v4))?;
        let client = End::open(outside, client)?;
        let to = SocketAddr::new(to.ip(), SCTP_PORT);
        associated(&client, to, &backend, client.at)?;
    }
    gone(world)
}

/// With `--lb-mode hybrid`: so it is with TCP and SCTP; of UDP the backend sees the node that was asked.
pub fn hybrid(world: &mut World) -> Result<()> {
    far(world)?;
    let outside = &world.outside;
    for v4 in FAMILIES {
        let (node, client) = (of(world.node("node1")?.addresses, v4), ip(of(OUTSIDE, v4))?);
        let to = SocketAddr::new(node, DIRECT_PORT);
        for _ in 0..3 {
            seen_as(outside, Protocol::Tcp, to, "a2", client)?;
            seen_as(outside, Protocol::Udp, to, "a2", node)?;
        }
        let a2 = world.pod("a2")?;
        let backend = End::open(&a2.place, of(a2.addresses, v4))?;
        let client = End::open(outside, client)?;
        let to = SocketAddr::new(node, SCTP_PORT);
        associated(&client, to, &backend, client.at)?;
    }
    gone(world)
}

/// Rules of a node's owner that count what its stack forwards from a pod and to it.
struct Counters<'a> {
    world: &'a World,
    node: &'a str,
    pod: IpAddr,
}

impl<'a> Counters<'a> {
    fn new(world: &'a World, node: &'a str, pod: IpAddr) -> Result<Self> {
        let counters = Self { world, node, pod };
        counters.rule(&["-I", "FORWARD", "1", "-s"], &[&pod.to_string()])?;
        counters.rule(&["-I", "FORWARD", "2", "-d"], &[&pod.to_string()])?;
        Ok(counters)
    }

    fn rule(&self, first: &[&str], then: &[&str]) -> Result<String> {
        let tool = if self.pod.is_ipv4() {
            "iptables"
        } else {
            "ip6tables"
        };
        let command = [&[tool, "-w"], first, then].concat();
        self.world.cluster.in_node(self.node, &command)
    }

    fn zero(&self) -> Result<()> {
        self.rule(&["-Z", "FORWARD"], &[]).map(drop)
    }

    /// Packets from the pod, and to it.
    fn packets(&self) -> Result<[u64; 2]> {
        let count = |number: &str| -> Result<u64> {
            let line = self.rule(&["-nvxL", "FORWARD"], &[number])?;
            let first = line.split_whitespace().next();
            let count = first.and_then(|word| word.parse().ok());
            count.with_context(|| format!("the rule is {line:?}"))
        };
        Ok([count("1")?, count("2")?])
    }
}

impl Drop for Counters<'_> {
    fn drop(&mut self) {
        for end in ["-s", "-d"] {
            // One that could not be made is not there.
            let _ = self.rule(&["-D", "FORWARD", end], &[&self.pod.to_string()]);
        }
    }
}

/// Asks from a pod a few times, and fails unless the rules have seen all packets of it, or none.
fn counted(
    counters: &[Counters<'_>],
    pod: &Place,
    to: SocketAddr,
    server: &str,
    client: IpAddr,
    all: bool,
) -> Result<()> {
    const QUESTIONS: u64 = 10;
    for protocol in PROTOCOLS {
        // The first packet to a neighbour is the stack's.
        seen_as(pod, protocol, to, server, client)?;
        for counters in counters {
            counters.zero()?;
        }
        for _ in 0..QUESTIONS {
            seen_as(pod, protocol, to, server, client)?;
        }
        // Of a connection at least what begins it, and the question or its answer.
        let least = match protocol {
            Protocol::Tcp => 2 * QUESTIONS,
            Protocol::Udp => QUESTIONS,
        };
        for counters in counters {
            let packets = counters.packets()?;
            let right = match all {
                true => packets.iter().all(|packets| *packets >= least),
                false => packets == [0, 0],
            };
            let (name, node) = (&pod.name, counters.node);
            ensure!(
                right,
                "{name} to {protocol:?} {to}: the rules of {node} have seen {packets:?} packets"
            );
        }
    }
    Ok(())
}

/// A pod asks a pod of another node by its address and through a Service, and the machine outside. With
/// `--host-legacy-routing` the rules of all nodes on the way see all packets, and without it none.
fn own_rules(world: &World, see: bool) -> Result<()> {
    world.apply(&[service("ruled", json!({"selector": {"name": "a2"}}))])?;
    world.settled("ruled", 1)?;
    let ips = world.cluster_ips("ruled")?;
    let (b1, a2) = (world.pod("b1")?, world.pod("a2")?);
    for v4 in FAMILIES {
        let own = of(b1.addresses, v4);
        let at = |ip: IpAddr, port: u16| SocketAddr::new(ip, port);
        let counters = [
            Counters::new(world, "node1", own)?,
            Counters::new(world, "node2", own)?,
        ];
        let pod = at(of(a2.addresses, v4), TARGET);
        counted(&counters, &b1.place, pod, "a2", own, see)?;
        let cluster_ip = at(of(ips, v4), PORT);
        for place in [&b1.place, &b1.place.without_sockets()] {
            counted(&counters, place, cluster_ip, "a2", own, see)?;
        }
        let beyond = at(ip(of(BEYOND, v4))?, TARGET);
        let _server = Server::start_at(&world.outside, "outside", beyond)?;
        let node = of(world.node("node1")?.addresses, v4);
        counted(&counters[..1], &b1.place, beyond, "outside", node, see)?;
    }
    world.delete(&["ruled"])
}

/// Without a flag.
pub fn around(world: &mut World) -> Result<()> {
    own_rules(world, false)
}

/// With `--host-legacy-routing`.
pub fn through(world: &mut World) -> Result<()> {
    own_rules(world, true)
}
