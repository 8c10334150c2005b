//! What packets and sockets made outlives the agents: affinities, sockets that were translated, how often a Service was
//! asked.

use std::io::ErrorKind;
use std::net::SocketAddr;

use anyhow::{Context, Result, ensure};
use serde_json::{Value, json};
use xebec_tests::eventually;
use xebec_tests::place::{PROTOCOLS, Place, Protocol, Server, Talk};

use super::endpoints::keeps;
use super::life::{Loose, by_hand, is};
use super::told::hits;
use super::world::{FAMILIES, MINUTE, PORT, World, of, service, slices};

const STICKY_PORT: u16 = 30_020;
const ENDS_PORT: u16 = 30_021;
const STICKY: &str = "sticky-kept";
const ENDS: &str = "kept";

/// Where servers answer that are no other Service's: their backends are gone with the Service's endpoints.
const ALONE: u16 = 9_002;

/// Puts one pod behind the Service whose sockets end, and waits until both nodes know.
fn answers(world: &World, pod: &str) -> Result<()> {
    let addresses = world.pod(pod)?.addresses;
    let mut objects = slices(ENDS, &[(addresses, json!({"conditions": {"ready": true}}))]);
    for port in objects
        .iter_mut()
        .flat_map(|one| one["ports"].as_array_mut())
    {
        port.iter_mut().for_each(|port| port["port"] = ALONE.into());
    }
    world.apply(&objects)?;
    for node in world.nodes.keys() {
        eventually(&format!("{node} knows that {pod} answers"), MINUTE, || {
            let rows = world.rows(node, ENDS)?;
            let mut ours = rows.iter().filter(|row| row["type"] == "ClusterIP");
            let is = |row: &Value| {
                let backend = row["inside"][0]["backend"].as_str();
                let backend = backend.and_then(|text| text.parse::<SocketAddr>().ok());
                backend.is_some_and(|one| one.port() == ALONE && addresses.contains(&one.ip()))
            };
            Ok(ours.clone().count() == 4 && ours.all(is))
        })?;
    }
    Ok(())
}

/// What was there before the agents were killed.
pub struct Kept {
    /// Clients of a Service with affinity, and who answered them.
    sticky: Vec<(Place, Protocol, SocketAddr, String)>,
    /// Sockets that are connected to nobody.
    loose: Vec<(String, Loose)>,
    /// Connected sockets, and whom they asked for.
    talks: Vec<(String, SocketAddr, Talk)>,
    /// How often the Service with affinity was asked by pods and processes of the second node.
    hits: u64,
    _servers: [Server; 2],
}

impl Kept {
    pub fn begin(world: &World) -> Result<Self> {
        let spec = json!({
            "type": "NodePort", "selector": {"app": "web"}, "nodePort": STICKY_PORT, "sessionAffinity": "ClientIP",
        });
        let mut sticky = service(STICKY, spec);
        // A hash would choose the same one for a client of the outside again.
        sticky["metadata"]["annotations"] = json!({"xebec.io/lb-algorithm": "random"});
        world.apply(&[sticky, by_hand(ENDS, ENDS_PORT)])?;
        world.settled(STICKY, 3)?;
        let server = |pod: &str| {
            let place = world.pod(pod)?.place.without_sockets();
            Server::start(&place, pod, ALONE)
        };
        let servers = [server("a1")?, server("a2")?];
        answers(world, "a1")?;
        let ips = [world.cluster_ips(STICKY)?, world.cluster_ips(ENDS)?];
        let (pod, node) = (&world.pod("late")?.place, world.node("node1")?);
        let mut kept = Self {
            sticky: Vec::new(),
            loose: Vec::new(),
            talks: Vec::new(),
            hits: 0,
            _servers: servers,
        };
        for v4 in FAMILIES {
            let [inside, ends] = ips.map(|ips| SocketAddr::new(of(ips, v4), PORT));
            let port = SocketAddr::new(of(node.addresses, v4), STICKY_PORT);
            for protocol in PROTOCOLS {
                for (place, to) in [
                    (pod, inside),
                    (&pod.without_sockets(), inside),
                    (&node.place, inside),
                    (&world.outside, port),
                ] {
                    let name = keeps(place, protocol, to)?;
                    kept.sticky.push((place.clone(), protocol, to, name));
                }
                for place in [pod, &node.place] {
                    let what = format!("{}, {protocol:?} to {ends}", place.name);
                    let talk = place.talk(protocol, ends).with_context(|| what.clone())?;
                    kept.talks.push((what, ends, talk));
                }
            }
            for place in [pod, &node.place] {
                let what = format!("{}, a socket without a connection", place.name);
                kept.loose.push((what, Loose::new(place, ends)?));
            }
        }
        kept.hits = hits(world, STICKY, "node2")?;
        ensure!(kept.hits > 0, "no hits were counted");
        kept.check(world)?;
        Ok(kept)
    }

    /// Fails where something is not as it was.
    pub fn check(&mut self, world: &World) -> Result<()> {
        let now = hits(world, STICKY, "node2")?;
        ensure!(now >= self.hits, "{now} hits, {} before", self.hits);
        self.hits = now;
        for (place, protocol, to, before) in &self.sticky {
            let name = keeps(place, *protocol, *to)?;
            let what = format!("{}, {protocol:?} to {to}", place.name);
            ensure!(name == *before, "{what}: {name} now, {before} before");
        }
        for (what, socket) in &mut self.loose {
            is(what, socket.ask(), "a1")?;
        }
        for (what, asked, talk) in &mut self.talks {
            is(what, talk.ask(), "a1")?;
            let peer = talk.peer()?;
            ensure!(peer == *asked, "{what}: connected to {peer}");
        }
        Ok(())
    }

    /// The backend goes: its sockets of before are ended, and datagrams go to the next.
    pub fn end(mut self, world: &World) -> Result<()> {
        answers(world, "a2")?;
        for (what, socket) in &mut self.loose {
            is(what, socket.ask(), "a2")?;
        }
        for (what, _, talk) in &mut self.talks {
            let fate = talk.fate();
            let ended = [ErrorKind::ConnectionAborted, ErrorKind::ConnectionReset];
            let told = fate.is_some_and(|fate| ended.contains(&fate));
            ensure!(told, "{what}: {fate:?} instead of an end");
        }
        world.delete(&[STICKY, ENDS])
    }
}
