//! Associations of SCTP through Services, with raw sockets at both ends: this works where the kernel has none of SCTP.

use std::io::ErrorKind;
use std::net::{IpAddr, SocketAddr};
use std::sync::atomic::{AtomicU16, Ordering};
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use serde_json::{Value, json};
use xebec_tests::eventually;
use xebec_tests::place::{PATIENCE, Place, Protocol, SILENCE};
use xebec_tests::sctp::{ABORT, End, Packet, init, init_ack};

use super::world::{
    BEYOND, EXTERNAL, FAMILIES, HOST_PORT, HOST_TARGET, MINUTE, OUTSIDE, PORT, TARGET, World, ip,
    of, service,
};

const NODE_PORT: u16 = 30_018;
const LOCAL_PORT: u16 = 30_042;

/// A Service of TCP and SCTP at the same ports.
pub fn with_sctp(name: &str, pod: &str, node_port: u16) -> Value {
    let spec = json!({"type": "NodePort", "selector": {"name": pod}});
    with_sctp_as(name, node_port, spec)
}

/// One with what else is to be said of it.
fn with_sctp_as(name: &str, node_port: u16, mut spec: Value) -> Value {
    let ports = ["TCP", "SCTP"].map(|protocol| {
        json!({
            "name": protocol.to_lowercase(), "protocol": protocol, "port": PORT, "targetPort": TARGET,
            "nodePort": node_port,
        })
    });
    spec["ports"] = ports.into_iter().collect();
    service(name, spec)
}

/// Begins an association and ends it. Fails unless each end gets each packet whole, and the backend sees this address
/// and the client the Service's.
pub fn associated(client: &End, to: SocketAddr, backend: &End, seen: IpAddr) -> Result<()> {
    associated_at(client, to, (backend, TARGET), seen)
}

/// The same with a backend of this port.
fn associated_at(client: &End, to: SocketAddr, backend: (&End, u16), seen: IpAddr) -> Result<()> {
    let (port, seen) = meets(client, to, backend, seen)
        .with_context(|| format!("SCTP from {} to {to}", client.at))?;
    ensure!(
        seen.ip() != client.at || seen.port() == port,
        "{} became port {}",
        port,
        seen.port()
    );
    Ok(())
}

/// A client's port that nobody has used.
fn fresh_port() -> u16 {
    static PORTS: AtomicU16 = AtomicU16::new(40_000);
    PORTS.fetch_add(1, Ordering::Relaxed)
}

/// The client's port, and what the backend sees.
fn meets(
    client: &End,
    to: SocketAddr,
    (backend, target): (&End, u16),
    seen: IpAddr,
) -> Result<(u16, SocketAddr)> {
    let port = fresh_port();
    let (own, others) = (0x1000_0000 | u32::from(port), 0x2000_0000 | u32::from(port));
    let sent = |tag: u32, chunk: Vec<u8>| Packet {
        source_port: port,
        destination_port: to.port(),
        tag,
        chunk,
    };
    let begins = sent(0, init(own));
    client.send(to.ip(), &begins)?;
    let (from, got) = backend.receive()?;
    ensure!(from == seen, "the backend sees {from}, not {seen}");
    let by = got.source_port;
    let forth = |packet: Packet| Packet {
        source_port: by,
        destination_port: target,
        ..packet
    };
    ensure!(got == forth(begins), "the backend got {got:?}");
    let answer = Packet {
        source_port: target,
        destination_port: by,
        tag: own,
        chunk: init_ack(others),
    };
    backend.send(from, &answer)?;
    let (answers, got) = client.receive()?;
    ensure!(answers == to.ip(), "{answers} answers");
    let back = Packet {
        source_port: to.port(),
        destination_port: port,
        ..answer
    };
    ensure!(got == back, "the client got {got:?}");
    let ends = sent(others, ABORT.into());
    client.send(to.ip(), &ends)?;
    let (from, got) = backend.receive()?;
    ensure!(
        from == seen && got == forth(ends),
        "{from} sent the backend {got:?}"
    );
    Ok((port, SocketAddr::new(from, by)))
}

/// By ClusterIPs from pods of both nodes, and by node ports from there and from outside: at the backend's own node it
/// sees the client, by the other node that.
pub fn associations(world: &mut World) -> Result<()> {
    world.apply(&[with_sctp("sctp", "a1", NODE_PORT)])?;
    world.settled("sctp", 1)?;
    let ips = world.cluster_ips("sctp")?;
    for v4 in FAMILIES {
        let a1 = world.pod("a1")?;
        let backend = End::open(&a1.place, of(a1.addresses, v4))?;
        let [by1, by2] = ["node1", "node2"].map(|node| world.node(node));
        let [by1, by2] = [of(by1?.addresses, v4), of(by2?.addresses, v4)];
        let ports = [by1, by2].map(|node| SocketAddr::new(node, NODE_PORT));
        let cluster_ip = SocketAddr::new(of(ips, v4), PORT);
        for pod in ["b1", "late"] {
            let pod = world.pod(pod)?;
            let client = End::open(&pod.place, of(pod.addresses, v4))?;
            for to in [cluster_ip, ports[0], ports[1]] {
                associated(&client, to, &backend, client.at)?;
            }
        }
        let client = End::open(&world.outside, ip(of(OUTSIDE, v4))?)?;
        associated(&client, ports[0], &backend, client.at)?;
        associated(&client, ports[1], &backend, by2)?;
    }
    world.delete(&["sctp"])
}

/// By a pod's host port, from everywhere: it sees outsiders as they are. And from a pod to the outside, which sees the
/// node.
pub fn without_services(world: &mut World) -> Result<()> {
    for v4 in FAMILIES {
        let (a1, b1) = (world.pod("a1")?, world.pod("b1")?);
        let node1 = of(world.node("node1")?.addresses, v4);
        let host = End::open(&a1.place, of(a1.addresses, v4))?;
        let outside = End::open(&world.outside, ip(of(OUTSIDE, v4))?)?;
        let to = SocketAddr::new(node1, HOST_PORT);
        let pod = End::open(&b1.place, of(b1.addresses, v4))?;
        for client in [&pod, &outside] {
            associated_at(client, to, (&host, HOST_TARGET), client.at)?;
        }
        let beyond = End::open(&world.outside, ip(of(BEYOND, v4))?)?;
        let to = SocketAddr::new(beyond.at, TARGET);
        associated(&pod, to, &beyond, node1)?;
    }
    Ok(())
}

/// How beginning an association fails.
fn refusal(
    place: &Place,
    at: IpAddr,
    to: SocketAddr,
    patience: Duration,
) -> Result<Option<ErrorKind>> {
    let begins = Packet {
        source_port: fresh_port(),
        destination_port: to.port(),
        tag: 0,
        chunk: init(7),
    };
    End::open(place, at)?.refusal(to.ip(), &begins, patience)
}

/// By an external address and a load balancer's from outside; with `externalTrafficPolicy: Local` the backend sees the
/// client, and a node without one is silent.
pub fn from_outside(world: &mut World) -> Result<()> {
    let far = json!({"type": "LoadBalancer", "selector": {"name": "a2"}, "externalIPs": EXTERNAL});
    let local = json!({"type": "LoadBalancer", "selector": {"name": "a1"}, "externalTrafficPolicy": "Local"});
    world.apply(&[
        with_sctp_as("sctp-far", NODE_PORT, far),
        with_sctp_as("sctp-local", LOCAL_PORT, local),
    ])?;
    world.settled("sctp-far", 1)?;
    world.settled("sctp-local", 1)?;
    let (far, local) = (world.balancer("sctp-far")?, world.balancer("sctp-local")?);
    let [node1, node2] = ["node1", "node2"].map(|node| world.node(node));
    let (node1, node2) = (node1?.addresses, node2?.addresses);
    let (a1, a2) = (world.pod("a1")?, world.pod("a2")?);
    let outside = &world.outside;
    for v4 in FAMILIES {
        let at = SocketAddr::new;
        let (far, local) = (at(of(far, v4), PORT), at(of(local, v4), PORT));
        let mut seen = None;
        for to in [far, local] {
            eventually(&format!("a node announces {to}"), MINUTE, || {
                let answer = outside.ask(Protocol::Tcp, to)?;
                // Of the first one, whichever node it is.
                seen.get_or_insert(answer.client.ip());
                Ok(true)
            })?;
        }
        let own = ip(of(OUTSIDE, v4))?;
        let backend = End::open(&a1.place, of(a1.addresses, v4))?;
        // What the backend should not get would be in the way of what comes next.
        let to = at(of(node2, v4), LOCAL_PORT);
        let silent = refusal(outside, own, to, SILENCE)?;
        ensure!(silent == Some(ErrorKind::WouldBlock), "{to}: {silent:?}");
        let client = End::open(outside, own)?;
        for to in [at(of(node1, v4), LOCAL_PORT), local] {
            associated(&client, to, &backend, own)?;
        }
        let backend = End::open(&a2.place, of(a2.addresses, v4))?;
        let external = at(ip(of(EXTERNAL, v4))?, PORT);
        associated(&client, external, &backend, of(node1, v4))?;
        let seen = seen.context("nobody has answered")?;
        associated(&client, far, &backend, seen)?;
    }
    world.delete(&["sctp-far", "sctp-local"])
}

/// A pod that reaches itself through its Service: it takes its node for the other end.
pub fn hairpin(world: &mut World) -> Result<()> {
    world.apply(&[with_sctp("sctp-self", "a1", NODE_PORT)])?;
    world.settled("sctp-self", 1)?;
    let (ips, a1) = (world.cluster_ips("sctp-self")?, world.pod("a1")?);
    for v4 in FAMILIES {
        let both = End::open(&a1.place, of(a1.addresses, v4))?;
        let node = of(world.node("node1")?.addresses, v4);
        let other = of(world.node("node2")?.addresses, v4);
        for to in [(of(ips, v4), PORT), (node, NODE_PORT), (other, NODE_PORT)] {
            associated(&both, to.into(), &both, node)?;
        }
    }
    world.delete(&["sctp-self"])
}

/// A Service without endpoints: who begins an association learns that the port is unreachable.
pub fn nobody_there(world: &mut World) -> Result<()> {
    let spec = json!({"type": "NodePort", "selector": {"app": "nobody"}, "externalIPs": EXTERNAL});
    world.apply(&[with_sctp_as("sctp-none", NODE_PORT, spec)])?;
    world.settled("sctp-none", 0)?;
    let ips = world.cluster_ips("sctp-none")?;
    for v4 in FAMILIES {
        let at = SocketAddr::new;
        let external = at(ip(of(EXTERNAL, v4))?, PORT);
        let mut wanted = vec![(&world.outside, ip(of(OUTSIDE, v4))?, external)];
        for pod in ["a1", "a2"] {
            let pod = world.pod(pod)?;
            let own = of(pod.addresses, v4);
            wanted.push((&pod.place, own, at(of(ips, v4), PORT)));
            wanted.push((&pod.place, own, external));
        }
        for node in world.nodes.values() {
            let to = at(of(node.addresses, v4), NODE_PORT);
            wanted.push((&world.outside, ip(of(OUTSIDE, v4))?, to));
            for pod in ["b1", "late"] {
                let pod = world.pod(pod)?;
                wanted.push((&pod.place, of(pod.addresses, v4), to));
            }
        }
        for (place, own, to) in wanted {
            let refusal = refusal(place, own, to, PATIENCE)?;
            let refused = Some(ErrorKind::ConnectionRefused);
            ensure!(refusal == refused, "{} to {to}: {refusal:?}", place.name);
        }
    }
    world.delete(&["sctp-none"])
}
