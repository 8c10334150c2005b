//! Who may come, by what node, and what the server sees of them: traffic policies, source ranges and the health of a
//! node's endpoints.

use std::io::ErrorKind;
use std::net::{IpAddr, SocketAddr};

use anyhow::{Context, Result, ensure};
use serde_json::{Value, json};
use xebec_tests::eventually;
use xebec_tests::place::{PROTOCOLS, Place, Protocol, SILENCE};

use super::world::{
    FAMILIES, MINUTE, NAMESPACE, OUTSIDE, OUTSIDE_TOO, PORT, World, ip, of, service, spread,
};

const LOCAL_PORT: u16 = 30_011;
const FENCED_PORT: u16 = 30_012;

/// Asks once, and fails unless this one answers and sees this client.
pub fn seen_as(
    place: &Place,
    protocol: Protocol,
    to: SocketAddr,
    server: &str,
    client: IpAddr,
) -> Result<()> {
    let what = format!("{} to {protocol:?} {to}", place.name);
    let answer = place.ask(protocol, to).with_context(|| what.clone())?;
    let right = answer.name == server && answer.client.ip() == client;
    ensure!(right, "{what}: {answer:?}, not {server} that sees {client}");
    Ok(())
}

/// The `healthCheckNodePort` of a Service.
pub fn health_port(world: &World, service: &str) -> Result<u16> {
    let object = world.cluster.get(&["service", service, "-n", NAMESPACE])?;
    let port = object["spec"]["healthCheckNodePort"].as_u64();
    let port = port.and_then(|port| u16::try_from(port).ok());
    port.with_context(|| format!("{service} has no healthCheckNodePort"))
}

/// Fails unless the node says to both families at a Service's `healthCheckNodePort` that it has so many endpoints.
pub fn says(world: &World, node: &str, service: &str, port: u16, count: u64) -> Result<()> {
    for v4 in FAMILIES {
        let at = SocketAddr::new(of(world.node(node)?.addresses, v4), port);
        let (status, head, body) = world.outside.http_get(at, "/healthz")?;
        ensure!(
            status == if count > 0 { 200 } else { 503 },
            "{at}: {status}"
        );
        ensure!(
            head.contains(&format!("x-load-balancing-endpoint-weight: {count}")),
            "{at}: {head}"
        );
        ensure!(head.contains("content-type: application/json"), "{head}");
        let wanted = json!({
            "service": {"namespace": NAMESPACE, "name": service},
            "localEndpoints": count,
            "serviceProxyHealthy": true,
        });
        let body: Value = serde_json::from_str(&body).with_context(|| body.clone())?;
        ensure!(body == wanted, "{at}: {body}");
    }
    Ok(())
}

/// `externalTrafficPolicy`: with Local a node serves outsiders by its own endpoints alone, which see who asks, and
/// drops what it has none for; load balancers learn which nodes have some. With Cluster the server sees a node.
pub fn external_traffic(world: &mut World) -> Result<()> {
    let spec = |policy: &str, name: &str, port: u16| {
        json!({
            "type": "LoadBalancer", "externalTrafficPolicy": policy, "selector": {"name": name}, "nodePort": port,
        })
    };
    world.apply(&[
        service("local", spec("Local", "a1", LOCAL_PORT)),
        service("far", spec("Cluster", "a2", LOCAL_PORT + 10)),
    ])?;
    world.settled("local", 1)?;
    world.settled("far", 1)?;
    let balancer = world.balancer("local")?;
    let at = SocketAddr::new;
    let (node1, node2) = (world.node("node1")?, world.node("node2")?);
    for v4 in FAMILIES {
        let outside = ip(of(OUTSIDE, v4))?;
        let [by1, by2] = [node1, node2].map(|node| of(node.addresses, v4));
        let balanced = at(of(balancer, v4), PORT);
        eventually("a node announces the address", MINUTE, || {
            Ok(world.outside.ask(Protocol::Tcp, balanced).is_ok())
        })?;
        for protocol in PROTOCOLS {
            let from = &world.outside;
            seen_as(from, protocol, at(by1, LOCAL_PORT), "a1", outside)?;
            seen_as(from, protocol, balanced, "a1", outside)?;
            let none = from.is_silent(protocol, at(by2, LOCAL_PORT))?;
            ensure!(none, "{protocol:?}: node2 has no endpoint, and answers");
            // Who is in the cluster may come by any node.
            for pod in ["b1", "late"] {
                let place = &world.pod(pod)?.place;
                for to in [at(by2, LOCAL_PORT), balanced] {
                    spread(place, protocol, to, &["a1"])?;
                    spread(&place.without_sockets(), protocol, to, &["a1"])?;
                }
            }
            spread(&node2.place, protocol, at(by2, LOCAL_PORT), &["a1"])?;
            // The other policy: any node will do, and is what the server sees.
            seen_as(from, protocol, at(by1, LOCAL_PORT + 10), "a2", by1)?;
        }
    }
    let port = health_port(world, "local")?;
    says(world, "node1", "local", port, 1)?;
    says(world, "node2", "local", port, 0)?;
    let patch = r#"{"spec":{"selector":{"name":"a2"}}}"#;
    let patch = ["patch", "service", "local", "-n", NAMESPACE, "-p", patch];
    world.cluster.k(&patch)?;
    eventually("the endpoint is the other node's", MINUTE, || {
        says(world, "node1", "local", port, 0)?;
        says(world, "node2", "local", port, 1)?;
        Ok(true)
    })?;
    let to = at(node1.addresses[0], LOCAL_PORT);
    ensure!(world.outside.is_silent(Protocol::Tcp, to)?, "node1 answers");
    for v4 in FAMILIES {
        let balanced = at(of(balancer, v4), PORT);
        eventually("the other node announces the address", MINUTE, || {
            let answer = world.outside.ask(Protocol::Tcp, balanced);
            Ok(answer.is_ok_and(|answer| answer.name == "a2"))
        })?;
    }
    world.delete(&["local", "far"])
}

/// Fails unless packets are dropped; a socket that would send them is told at once.
pub fn nobody(place: &Place, protocol: Protocol, to: SocketAddr) -> Result<()> {
    let right = if place.meets_programs() {
        place.refusal(protocol, to) == Some(ErrorKind::HostUnreachable)
    } else {
        place.is_silent(protocol, to)?
    };
    ensure!(right, "{} to {protocol:?} {to}: not dropped", place.name);
    Ok(())
}

/// `internalTrafficPolicy: Local`: a node's own endpoints or none, for pods and the node itself.
pub fn internal_traffic(world: &mut World) -> Result<()> {
    let spec = |selector: Value| json!({"internalTrafficPolicy": "Local", "selector": selector});
    world.apply(&[
        service("inside", spec(json!({"app": "web"}))),
        service("inside-one", spec(json!({"name": "a1"}))),
    ])?;
    let (all, one) = (
        world.cluster_ips("inside")?,
        world.cluster_ips("inside-one")?,
    );
    for (node, pod, count, servers) in [
        ("node1", "b1", 1, &["a1", "b1"][..]),
        ("node2", "late", 0, &["a2"]),
    ] {
        let (node, pod) = (world.node(node)?, &world.pod(pod)?.place);
        eventually("the node knows them", MINUTE, || {
            let rows = world.rows(&node.place.name, "inside-one")?;
            let more = world.rows(&node.place.name, "inside")?;
            let has = |rows: &[Value], count: usize| {
                let right = |row: &Value| row["inside"].as_array().map(Vec::len) == Some(count);
                rows.len() == 4 && rows.iter().all(right)
            };
            let dropped = |row: &Value| row["flags"].to_string().contains("drop-inside");
            Ok(has(&rows, count)
                && has(&more, servers.len())
                && rows.iter().all(|row| dropped(row) == (count == 0)))
        })?;
        for place in [pod, &pod.without_sockets(), &node.place] {
            for v4 in FAMILIES {
                let to = |pair: [IpAddr; 2]| SocketAddr::new(of(pair, v4), PORT);
                for protocol in PROTOCOLS {
                    spread(place, protocol, to(all), servers)?;
                    if count > 0 {
                        spread(place, protocol, to(one), &["a1"])?;
                    } else {
                        nobody(place, protocol, to(one))?;
                    }
                }
            }
        }
    }
    world.delete(&["inside", "inside-one"])
}

/// `loadBalancerSourceRanges`: a load balancer's address is for these alone; node ports are for all.
pub fn source_ranges(world: &mut World) -> Result<()> {
    let late = world.pod("late")?;
    let mut ranges = vec![format!("{}/32", OUTSIDE[0]), format!("{}/128", OUTSIDE[1])];
    ranges.extend(
        late.addresses
            .map(|own| format!("{own}/{}", if own.is_ipv4() { 32 } else { 128 })),
    );
    let spec = json!({
        "type": "LoadBalancer", "selector": {"app": "web"}, "nodePort": FENCED_PORT,
        "loadBalancerSourceRanges": ranges,
    });
    world.apply(&[service("fenced", spec)])?;
    world.settled("fenced", 3)?;
    let balancer = world.balancer("fenced")?;
    for v4 in FAMILIES {
        let to = SocketAddr::new(of(balancer, v4), PORT);
        let node_port = SocketAddr::new(of(world.node("node1")?.addresses, v4), FENCED_PORT);
        let ask = |from: &str, protocol, to| -> Result<String> {
            let from = Some(SocketAddr::new(ip(from)?, 0));
            let mut talk = world.outside.talk_from(protocol, from, to, SILENCE)?;
            Ok(talk.ask()?.name)
        };
        eventually("a node announces the address", MINUTE, || {
            Ok(ask(of(OUTSIDE, v4), Protocol::Tcp, to).is_ok())
        })?;
        for protocol in PROTOCOLS {
            ask(of(OUTSIDE, v4), protocol, to)?;
            ask(of(OUTSIDE_TOO, v4), protocol, node_port)?;
            let other = ask(of(OUTSIDE_TOO, v4), protocol, to);
            ensure!(other.is_err(), "{protocol:?} {to}: answered by {other:?}");
            // Pods are let in by their own addresses, whichever hook translates for them.
            let stranger = world.pod("a1")?;
            for (pod, let_in) in [(late, true), (stranger, false)] {
                for place in [&pod.place, &pod.place.without_sockets()] {
                    let silent = place.is_silent(protocol, to)?;
                    ensure!(
                        silent != let_in,
                        "{protocol:?} {to} from {}: silent is {silent}",
                        place.name
                    );
                }
            }
        }
    }
    world.delete(&["fenced"])
}
