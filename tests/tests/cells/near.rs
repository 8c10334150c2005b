//! Who is near: `trafficDistribution` where the nodes share a zone, so that its values differ, and hints that somebody
//! wrote by hand.

use std::net::{IpAddr, SocketAddr};

use anyhow::{Context, Result};
use serde_json::{Value, json};
use xebec_tests::place::{Protocol, Server};

use super::world::{
    BEYOND, FAMILIES, NAMESPACE, PORT, TARGET, World, ip, of, own_zone, service, slices, spread,
};

const SHARED_PORT: u16 = 30_040;
const HINTED_PORT: u16 = 30_043;
/// A zone without a node of the cluster.
const ELSEWHERE: &str = "elsewhere";

/// All nodes are in one zone, for as long as this lives.
struct OneZone<'a>(&'a World);

impl<'a> OneZone<'a> {
    fn new(world: &'a World) -> Result<Self> {
        let one = Self(world);
        for node in world.nodes.keys() {
            world.put_in_zone(node, "shared")?;
        }
        Ok(one)
    }
}

impl Drop for OneZone<'_> {
    fn drop(&mut self) {
        for node in self.0.nodes.keys() {
            if let Err(error) = self.0.put_in_zone(node, &own_zone(node)) {
                eprintln!("{error:#}");
            }
        }
    }
}

/// Servers at the machine outside that backends of no node stand for.
fn beyond(world: &World) -> Result<([IpAddr; 2], Vec<Server>)> {
    let addresses: [IpAddr; 2] = [ip(BEYOND[0])?, ip(BEYOND[1])?];
    let servers = addresses.map(|address| {
        Server::start_at(&world.outside, "outside", SocketAddr::new(address, TARGET))
    });
    Ok((addresses, servers.into_iter().collect::<Result<_>>()?))
}

/// Fails unless exactly these answer: a pod of the node with and without socket programs, the node itself, and the machine
/// outside by the node's port.
fn asked(world: &World, node: &str, name: &str, port: u16, wanted: &[&str]) -> Result<()> {
    world.chosen(node, name, wanted)?;
    let pod = if node == "node1" { "b1" } else { "late" };
    let (pod, node) = (&world.pod(pod)?.place, world.node(node)?);
    let ips = world.cluster_ips(name)?;
    for v4 in FAMILIES {
        let inside = SocketAddr::new(of(ips, v4), PORT);
        for place in [pod, &pod.without_sockets(), &node.place] {
            spread(place, Protocol::Tcp, inside, wanted)?;
        }
        let at_node = SocketAddr::new(of(node.addresses, v4), port);
        spread(&world.outside, Protocol::Tcp, at_node, wanted)?;
    }
    Ok(())
}

/// `trafficDistribution`: of one zone's nodes, each keeps to its own endpoints or takes all of the zone; what is in another
/// zone gets nothing as long as the own one has any.
pub fn one_zone(world: &mut World) -> Result<()> {
    let (far, _servers) = beyond(world)?;
    let elsewhere = json!([{"name": ELSEWHERE}]);
    let hints = json!({
        "zone": ELSEWHERE, "hints": {"forZones": elsewhere, "forNodes": elsewhere},
    });
    let web = json!({"app": "web"});
    let all = [
        ("shared-node", "PreferSameNode", &web),
        ("shared-zone", "PreferSameZone", &web),
        ("shared-close", "PreferClose", &web),
        ("shared-one", "PreferSameNode", &json!({"name": "a1"})),
    ];
    let names = all.map(|(name, ..)| name);
    let mut objects = Vec::new();
    for (port, (name, mode, selector)) in (SHARED_PORT..).zip(all) {
        objects.push(service(
            name,
            json!({
                "type": "NodePort", "nodePort": port, "selector": selector, "trafficDistribution": mode,
            }),
        ));
        // The controller's slices are not all that a Service may have.
        objects.extend(slices(name, &[(far, hints.clone())]));
    }
    let check = |node: &str, wanted: [&[&str]; 4]| -> Result<()> {
        for ((port, name), wanted) in (SHARED_PORT..).zip(names).zip(wanted) {
            asked(world, node, name, port, wanted)?;
        }
        Ok(())
    };
    let (both, own) = (&["a1", "a2", "b1"], [&["a1", "b1"][..], &["a2"]]);
    {
        let _one = OneZone::new(world)?;
        world.apply(&objects)?;
        check("node1", [own[0], both, both, &["a1"]])?;
        check("node2", [own[1], both, both, &["a1"]])?;
    }
    // The nodes are parted again, and both the controller and the agents have heard of it.
    check("node1", [own[0], own[0], own[0], &["a1"]])?;
    check("node2", [own[1], own[1], own[1], &["a1", "outside"]])?;
    world.delete(&names)
}

/// An endpoint with hints.
fn hinted(pod: &'static str, zones: &[&str], nodes: &[&str]) -> (&'static str, Value) {
    let named = |all: &[&str]| -> Value { all.iter().map(|name| json!({"name": name})).collect() };
    let mut hints = json!({});
    for (field, all) in [("forZones", zones), ("forNodes", nodes)] {
        if !all.is_empty() {
            hints[field] = named(all);
        }
    }
    (pod, json!({"hints": hints}))
}

/// Hints that somebody wrote. They say who is meant for whom, wherever that one is: here mostly for the other node, which
/// nothing but a hint would choose. They count only where every ready endpoint has one, and one is for this node or zone;
/// the annotation that once turned them on changes nothing.
pub fn hints(world: &mut World) -> Result<()> {
    let (zone1, zone2) = (own_zone("node1"), own_zone("node2"));
    let (zone1, zone2) = ([zone1.as_str()], [zone2.as_str()]);
    let (node1, node2, nobody) = (["node1"], ["node2"], [ELSEWHERE]);
    let plain = |pod, conditions| (pod, json!({"conditions": conditions}));
    let both = &["a1", "a2"];
    let cases = [
        (
            "zones",
            vec![hinted("a1", &zone2, &[]), hinted("a2", &zone1, &[])],
            [&["a2"][..], &["a1"]],
        ),
        (
            "nodes",
            vec![hinted("a1", &[], &node2), hinted("a2", &[], &node1)],
            [&["a2"], &["a1"]],
        ),
        (
            "a node goes before its zone",
            vec![hinted("a1", &zone1, &node2), hinted("a2", &zone2, &node1)],
            [&["a2"], &["a1"]],
        ),
        (
            "several zones and nodes",
            vec![
                hinted("a1", &[zone1[0], zone2[0]], &["node1", "node2"]),
                hinted("a2", &zone1, &nobody),
            ],
            [&["a1"], &["a1"]],
        ),
        (
            "a ready one has none",
            vec![
                hinted("a1", &zone2, &node2),
                plain("a2", json!({"ready": true})),
            ],
            [both, both],
        ),
        (
            "one that is not ready has none",
            vec![
                hinted("a1", &zone2, &[]),
                hinted("a2", &zone1, &[]),
                plain("b1", json!({"ready": false})),
            ],
            [&["a2"], &["a1"]],
        ),
        (
            "a ready one has none of nodes",
            vec![hinted("a1", &zone2, &node1), hinted("a2", &zone1, &[])],
            [&["a2"], &["a1"]],
        ),
        (
            "none for the node, one for its zone",
            vec![hinted("a1", &zone2, &nobody), hinted("a2", &zone1, &nobody)],
            [&["a2"], &["a1"]],
        ),
        (
            "none for the zone",
            vec![
                hinted("a1", &zone1, &[]),
                hinted("a2", &zone1, &[]),
                hinted("b1", &nobody, &[]),
            ],
            [both, &["a1", "a2", "b1"]],
        ),
        (
            "none for anybody",
            vec![
                hinted("a1", &nobody, &nobody),
                hinted("a2", &nobody, &nobody),
            ],
            [both, both],
        ),
    ];
    let names = [
        ("hinted", None),
        ("hinted-auto", Some("Auto")),
        ("hinted-off", Some("Disabled")),
    ];
    for (port, (name, mode)) in (HINTED_PORT..).zip(names) {
        let mut object = service(name, json!({"type": "NodePort", "nodePort": port}));
        if let Some(mode) = mode {
            let annotations = json!({"service.kubernetes.io/topology-mode": mode});
            object["metadata"]["annotations"] = annotations;
        }
        world.apply(&[object])?;
    }
    for (what, endpoints, wanted) in cases {
        let mut all = Vec::new();
        for (pod, more) in endpoints {
            all.push((world.pod(pod)?.addresses, more));
        }
        for (port, (name, mode)) in (HINTED_PORT..).zip(names) {
            world.apply(&slices(name, &all))?;
            for (node, wanted) in ["node1", "node2"].into_iter().zip(wanted) {
                asked(world, node, name, port, wanted)
                    .with_context(|| format!("{NAMESPACE}/{name} ({mode:?}): {what}"))?;
            }
        }
    }
    world.delete(&names.map(|(name, _)| name))
}
