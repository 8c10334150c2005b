//! Associations of SCTP through Services, with raw sockets at both ends: this works where the kernel has none of SCTP.

use std::net::{IpAddr, SocketAddr};
use std::sync::atomic::{AtomicU16, Ordering};

use anyhow::{Context, Result, ensure};
use serde_json::json;
use xebec_tests::sctp::{ABORT, End, Packet, init, init_ack};

use super::world::{FAMILIES, OUTSIDE, PORT, TARGET, World, ip, of, service};

const NODE_PORT: u16 = 30_018;

/// A Service of TCP and SCTP at the same ports.
pub fn with_sctp(name: &str, pod: &str, node_port: u16) -> serde_json::Value {
    let ports = ["TCP", "SCTP"].map(|protocol| {
        json!({
            "name": protocol.to_lowercase(), "protocol": protocol, "port": PORT, "targetPort": TARGET,
            "nodePort": node_port,
        })
    });
    let spec = json!({"type": "NodePort", "selector": {"name": pod}, "ports": ports});
    service(name, spec)
}

/// Begins an association and ends it. Fails unless each end gets each packet whole, and the backend sees this address
/// and the client the Service's.
pub fn associated(client: &End, to: SocketAddr, backend: &End, seen: IpAddr) -> Result<()> {
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

/// The client's port, and what the backend sees.
fn meets(client: &End, to: SocketAddr, backend: &End, seen: IpAddr) -> Result<(u16, SocketAddr)> {
    static PORTS: AtomicU16 = AtomicU16::new(40_000);
    let port = PORTS.fetch_add(1, Ordering::Relaxed);
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
        destination_port: TARGET,
        ..packet
    };
    ensure!(got == forth(begins), "the backend got {got:?}");
    let answer = Packet {
        source_port: TARGET,
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
