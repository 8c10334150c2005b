//! What XDP does for clients outside: nearly everything.

use std::net::SocketAddr;

use anyhow::{Context, Result, ensure};
use serde_json::json;
use xebec_tests::eventually;
use xebec_tests::place::{PROTOCOLS, Protocol};
use xebec_tests::sctp::End;

use super::sctp::{associated, with_sctp};
use super::world::{EXTERNAL, FAMILIES, MINUTE, OUTSIDE, PORT, World, answered, ip, of, service};

const EXPRESS_PORT: u16 = 30_040;

/// How many packets from the network XDP and tc have translated, on all nodes.
fn translated(world: &World) -> Result<[u64; 2]> {
    let mut all = [0; 2];
    for node in world.nodes.keys() {
        let status = world.cluster.agent_status(node)?;
        for (sum, hook) in all.iter_mut().zip(["xdp", "tc"]) {
            let count = status["translated"][hook].as_u64();
            *sum += count.with_context(|| format!("the agent of {node} says {status}"))?;
        }
    }
    Ok(all)
}

/// Fails unless XDP has translated so many packets since then, and tc next to none.
fn nearly_all_by_xdp(world: &World, what: &str, before: [u64; 2], least: u64) -> Result<()> {
    let now = translated(world)?;
    let (by_xdp, by_tc) = (now[0] - before[0], now[1] - before[1]);
    // tc gets those whose way has no neighbour yet.
    ensure!(
        by_xdp >= least && by_tc <= by_xdp / 50,
        "{what}: {by_xdp} packets by XDP, {by_tc} by tc"
    );
    Ok(())
}

/// Node ports of both nodes, an external address and a load balancer's, with backends on both nodes: of 1,000 requests
/// from outside by each protocol of each family none is lost, and XDP translates nearly all their packets.
fn outsiders(world: &World, hook: &str) -> Result<()> {
    const REQUESTS: usize = 250;
    // It fails, since one of the pods is never ready.
    let told = world.cluster.xebec(&["status"]).output();
    let told = told.context("could not start xebec")?.stdout;
    let told = String::from_utf8_lossy(&told);
    for node in world.nodes.keys() {
        let status = world.cluster.agent_status(node)?;
        let by = format!("eth0 by {hook}");
        ensure!(status["devices"] == by, "{node}: {status}");
        ensure!(told.contains(&format!("devices {by},")), "{told}");
    }
    let spec = json!({
        "type": "LoadBalancer", "selector": {"app": "web"}, "nodePort": EXPRESS_PORT, "externalIPs": EXTERNAL,
    });
    world.apply(&[service("express", spec)])?;
    world.settled("express", 3)?;
    let balancer = world.balancer("express")?;
    for v4 in FAMILIES {
        let at = SocketAddr::new;
        let node_port = |name: &str| -> Result<SocketAddr> {
            let addresses = world.node(name)?.addresses;
            Ok(at(of(addresses, v4), EXPRESS_PORT))
        };
        let balanced = at(of(balancer, v4), PORT);
        eventually("a node announces the address", MINUTE, || {
            Ok(world.outside.ask(Protocol::Tcp, balanced).is_ok())
        })?;
        let ways = [
            node_port("node1")?,
            node_port("node2")?,
            at(ip(of(EXTERNAL, v4))?, PORT),
            balanced,
        ];
        for protocol in PROTOCOLS {
            let before = translated(world)?;
            for to in ways {
                let by_name = world.outside.ask_many(protocol, to, REQUESTS)?;
                answered(&format!("{protocol:?} {to}"), &by_name, &["a1", "a2", "b1"])?;
            }
            // Of a connection at least what begins, asks and ends it.
            let each = match protocol {
                Protocol::Tcp => 4,
                Protocol::Udp => 1,
            };
            let least = each * (REQUESTS * ways.len()) as u64;
            let what = format!("{protocol:?} to {ways:?}");
            nearly_all_by_xdp(world, &what, before, least)?;
        }
    }
    world.delete(&["express"])
}

/// With `--xdp native`.
pub fn by_driver(world: &mut World) -> Result<()> {
    outsiders(world, "xdp")
}

/// With `--xdp generic`.
pub fn by_stack(world: &mut World) -> Result<()> {
    outsiders(world, "xdpgeneric")
}

/// With `--xdp native`: so it is with SCTP.
pub fn associations(world: &mut World) -> Result<()> {
    const ASSOCIATIONS: u64 = 100;
    world.apply(&[with_sctp("express-sctp", "a2", EXPRESS_PORT)])?;
    world.settled("express-sctp", 1)?;
    let (node, a2) = (world.node("node1")?.addresses, world.pod("a2")?);
    for v4 in FAMILIES {
        let backend = End::open(&a2.place, of(a2.addresses, v4))?;
        let client = End::open(&world.outside, ip(of(OUTSIDE, v4))?)?;
        let to = SocketAddr::new(of(node, v4), EXPRESS_PORT);
        // From here on, everybody knows everybody's hardware address.
        associated(&client, to, &backend, of(node, v4))?;
        let before = translated(world)?;
        for _ in 0..ASSOCIATIONS {
            associated(&client, to, &backend, of(node, v4))?;
        }
        // Two packets of the client, and one back.
        nearly_all_by_xdp(world, &format!("SCTP to {to}"), before, 3 * ASSOCIATIONS)?;
    }
    world.delete(&["express-sctp"])
}
