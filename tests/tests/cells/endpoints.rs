//! Which endpoints are chosen: unready ones, near ones, the same ones again, and those that somebody wrote by hand.

use std::collections::BTreeSet;
use std::net::{IpAddr, SocketAddr};
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use serde_json::{Value, json};
use xebec_tests::eventually;
use xebec_tests::place::{PROTOCOLS, Place, Protocol, Server};

use super::world::{
    BEYOND, FAMILIES, MINUTE, NAMESPACE, OUTSIDE, PORT, TARGET, World, ip, of, service, slices,
    spread,
};

const STICKY_PORT: u16 = 30_013;

/// `publishNotReadyAddresses`: a pod that is not ready is asked all the same.
pub fn not_ready(world: &mut World) -> Result<()> {
    let spec = |published: bool| json!({"selector": {"app": "late"}, "publishNotReadyAddresses": published});
    world.apply(&[
        service("early", spec(true)),
        service("patient", spec(false)),
    ])?;
    world.settled("early", 1)?;
    world.settled("patient", 0)?;
    let (early, patient) = (world.cluster_ips("early")?, world.cluster_ips("patient")?);
    for v4 in FAMILIES {
        for protocol in PROTOCOLS {
            for pod in ["a1", "a2"] {
                let place = &world.pod(pod)?.place;
                let to = |pair| SocketAddr::new(of(pair, v4), PORT);
                spread(place, protocol, to(early), &["late"])?;
                let refusal = place.refusal(protocol, to(patient));
                let refused = Some(std::io::ErrorKind::ConnectionRefused);
                ensure!(refusal == refused, "{pod}, {protocol:?}: {refusal:?}");
            }
        }
    }
    world.delete(&["early", "patient"])
}

/// `trafficDistribution`: endpoints of the own node or zone, as long as there are any.
pub fn near_ones(world: &mut World) -> Result<()> {
    let web = json!({"app": "web"});
    let modes = [
        ("node", "PreferSameNode"),
        ("zone", "PreferSameZone"),
        ("close", "PreferClose"),
    ];
    let spec =
        |mode: &str, selector: &Value| json!({"selector": selector, "trafficDistribution": mode});
    let mut objects: Vec<Value> = modes
        .iter()
        .map(|(name, mode)| service(&format!("near-{name}"), spec(mode, &web)))
        .collect();
    objects.push(service(
        "near-none",
        spec("PreferSameNode", &json!({"name": "a1"})),
    ));
    world.apply(&objects)?;
    let cases = [
        ("node1", "b1", &["a1", "b1"][..]),
        ("node2", "late", &["a2"]),
    ];
    for (node, pod, servers) in cases {
        let (node, pod) = (world.node(node)?, &world.pod(pod)?.place);
        for (name, _) in modes {
            let name = format!("near-{name}");
            eventually(
                &format!("{} knows who is near", node.place.name),
                MINUTE,
                || {
                    let rows = world.rows(&node.place.name, &name)?;
                    let count = |row: &Value| row["inside"].as_array().map(Vec::len);
                    Ok(rows.len() == 4 && rows.iter().all(|row| count(row) == Some(servers.len())))
                },
            )?;
            let ips = world.cluster_ips(&name)?;
            for place in [pod, &pod.without_sockets(), &node.place] {
                for v4 in FAMILIES {
                    spread(
                        place,
                        Protocol::Tcp,
                        SocketAddr::new(of(ips, v4), PORT),
                        servers,
                    )?;
                }
            }
        }
    }
    // None is near: others are as good.
    world.settled("near-none", 1)?;
    let ips = world.cluster_ips("near-none")?;
    for v4 in FAMILIES {
        let to = SocketAddr::new(of(ips, v4), PORT);
        spread(&world.pod("late")?.place, Protocol::Tcp, to, &["a1"])?;
    }
    world.delete(&["near-node", "near-zone", "near-close", "near-none"])
}

/// Asks so often that chance would not choose the same one again and again.
pub fn keeps(place: &Place, protocol: Protocol, to: SocketAddr) -> Result<String> {
    let by_name = place.ask_many(protocol, to, 25)?;
    let what = format!("{} to {protocol:?} {to}: {by_name:?}", place.name);
    ensure!(by_name.len() == 1, "{what}: not one alone");
    by_name.into_keys().next().context(what)
}

/// `sessionAffinity: ClientIP`: a client is always sent to the same one, until it has been away for the timeout.
pub fn same_ones(world: &mut World) -> Result<()> {
    const TIMEOUT: u64 = 2;
    let spec = json!({
        "type": "NodePort", "selector": {"app": "web"}, "nodePort": STICKY_PORT, "sessionAffinity": "ClientIP",
        "sessionAffinityConfig": {"clientIP": {"timeoutSeconds": TIMEOUT}},
    });
    let mut sticky = service("sticky", spec);
    // A hash would choose the same one for a client of the outside again.
    sticky["metadata"]["annotations"] = json!({"xebec.io/lb-algorithm": "random"});
    world.apply(&[sticky])?;
    world.settled("sticky", 3)?;
    let ips = world.cluster_ips("sticky")?;
    let (pod, node) = (&world.pod("late")?.place, world.node("node1")?);
    let mut clients = Vec::new();
    for v4 in FAMILIES {
        let inside = SocketAddr::new(of(ips, v4), PORT);
        let port = SocketAddr::new(of(node.addresses, v4), STICKY_PORT);
        for protocol in PROTOCOLS {
            clients.push((pod.clone(), protocol, inside));
            clients.push((world.pod("a1")?.place.without_sockets(), protocol, inside));
            clients.push((node.place.clone(), protocol, inside));
            clients.push((world.outside.clone(), protocol, port));
        }
    }
    let mut last = Vec::new();
    for (place, protocol, to) in &clients {
        last.push(keeps(place, *protocol, *to)?);
    }
    // Chance may choose the same one some times, but not for ever.
    for _ in 0..12 {
        std::thread::sleep(Duration::from_secs(TIMEOUT) + Duration::from_millis(300));
        let mut rest = Vec::new();
        for ((place, protocol, to), last) in clients.drain(..).zip(last.drain(..)) {
            if place.ask(protocol, to)?.name == last {
                rest.push(((place, protocol, to), last));
            }
        }
        (clients, last) = rest.into_iter().unzip();
        if clients.is_empty() {
            return world.delete(&["sticky"]);
        }
    }
    let who: Vec<_> = clients
        .iter()
        .map(|(place, protocol, to)| (&place.name, protocol, to))
        .collect();
    anyhow::bail!("never sent to another after the timeout: {who:?}")
}

/// Maglev, which is what clients of the outside get by default: whichever node they ask, the same backend answers the same
/// address and port, and others answer other ports.
pub fn hashed(world: &mut World) -> Result<()> {
    const HASHED_PORT: u16 = 30_022;
    const FIRST_PORT: u16 = 21_000;
    const PATIENCE: Duration = Duration::from_secs(3);
    let spec = json!({"type": "NodePort", "selector": {"app": "web"}, "nodePort": HASHED_PORT});
    world.apply(&[service("hashed", spec)])?;
    world.settled("hashed", 3)?;
    let nodes = [world.node("node1")?, world.node("node2")?];
    for v4 in FAMILIES {
        let client = ip(of(OUTSIDE, v4))?;
        for protocol in PROTOCOLS {
            let mut all = BTreeSet::new();
            for number in 0..24 {
                let from = SocketAddr::new(client, FIRST_PORT + number);
                let mut names = BTreeSet::new();
                for node in nodes {
                    let to = SocketAddr::new(of(node.addresses, v4), HASHED_PORT);
                    let talk = world.outside.talk_from(protocol, Some(from), to, PATIENCE);
                    let what = || format!("{protocol:?} from {from} to {to}");
                    let answer = talk.and_then(|mut talk| talk.ask()).with_context(what)?;
                    names.insert(answer.name);
                }
                ensure!(names.len() == 1, "{protocol:?} from {from}: {names:?}");
                all.extend(names);
            }
            ensure!(all.len() > 1, "{protocol:?}: {all:?} alone");
        }
    }
    world.delete(&["hashed"])
}

/// Services without a selector: slices, or the older Endpoints, that somebody wrote; their backend may be no pod.
pub fn written_by_hand(world: &mut World) -> Result<()> {
    let addresses: [IpAddr; 2] = [ip(BEYOND[0])?, ip(BEYOND[1])?];
    let at = addresses.map(|address| SocketAddr::new(address, TARGET));
    let outside = at.map(|at| Server::start_at(&world.outside, "outside", at));
    let a2 = world.pod("a2")?.addresses;
    let mut objects = vec![service("manual", json!({})), service("older", json!({}))];
    let other = json!({"conditions": {"ready": true}});
    objects.extend(slices("manual", &[(addresses, other), (a2, json!({}))]));
    let address = |ip: IpAddr| json!({"ip": ip});
    objects.push(json!({
        "apiVersion": "v1",
        "kind": "Endpoints",
        "metadata": {"name": "older", "namespace": NAMESPACE},
        "subsets": [{
            "addresses": [address(a2[0]), address(a2[1])],
            "ports": [{"name": "tcp", "port": TARGET}, {"name": "udp", "port": TARGET, "protocol": "UDP"}],
        }],
    }));
    world.apply(&objects)?;
    world.settled("manual", 2)?;
    world.settled("older", 1)?;
    let (manual, older) = (world.cluster_ips("manual")?, world.cluster_ips("older")?);
    let pod = &world.pod("b1")?.place;
    for place in [pod, &pod.without_sockets(), &world.node("node1")?.place] {
        for v4 in FAMILIES {
            for protocol in PROTOCOLS {
                let to = |pair| SocketAddr::new(of(pair, v4), PORT);
                spread(place, protocol, to(manual), &["a2", "outside"])?;
                spread(place, protocol, to(older), &["a2"])?;
            }
        }
    }
    for server in outside {
        drop(server?);
    }
    world.delete(&["manual", "older"])
}
