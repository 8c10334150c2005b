//! The life of a backend: what becomes of those who talk to it when it ends or is gone.

use std::io::{self, ErrorKind};
use std::net::{IpAddr, SocketAddr, UdpSocket};

use anyhow::{Context, Result, ensure};
use serde_json::{Value, json};
use xebec_tests::eventually;
use xebec_tests::place::{Answer, PROTOCOLS, Place, Protocol, Talk};

use super::world::{FAMILIES, MINUTE, PORT, World, of, service, slices, spread};

const LIFE_PORT: u16 = 30_014;
const ENDING_PORT: u16 = 30_015;
const OTHERS_PORT: u16 = 30_017;
/// What a socket hears whose backend is gone.
const ENDED: [ErrorKind; 2] = [ErrorKind::ConnectionAborted, ErrorKind::ConnectionReset];

/// A Service of node ports whose slices the test writes.
pub fn by_hand(name: &str, port: u16) -> Value {
    service(name, json!({"type": "NodePort", "nodePort": port}))
}

/// Writes the slices of a Service and waits until both nodes have these pods behind it.
fn write(world: &World, name: &str, endpoints: &[(&str, Value)], wanted: &[&str]) -> Result<()> {
    let mut all = Vec::new();
    for (pod, conditions) in endpoints {
        let conditions = json!({"conditions": conditions});
        all.push((world.pod(pod)?.addresses, conditions));
    }
    world.apply(&slices(name, &all))?;
    world.settled_on(name, wanted)
}

/// A socket that is connected to nobody, and where it sends to.
pub struct Loose {
    place: Place,
    socket: UdpSocket,
    to: SocketAddr,
}

impl Loose {
    pub fn new(place: &Place, to: SocketAddr) -> Result<Self> {
        let (place, socket) = (place.clone(), place.datagrams(to.is_ipv4())?);
        Ok(Self { place, socket, to })
    }

    pub fn ask(&mut self) -> io::Result<Answer> {
        let sent = self.place.run(|| self.socket.send_to(b"?", self.to));
        sent.map_err(io::Error::other)??;
        let mut buffer = [0; 256];
        let (length, from) = self.socket.recv_from(&mut buffer)?;
        if from != self.to {
            let what = format!("{} asked, {from} answered", self.to);
            return Err(io::Error::other(what));
        }
        Answer::read(&String::from_utf8_lossy(&buffer[..length]))
    }
}

/// Fails unless this one answers.
pub fn is(what: &str, answer: io::Result<Answer>, wanted: &str) -> Result<()> {
    let answer = answer.with_context(|| what.to_owned())?;
    ensure!(answer.name == wanted, "{what}: {answer:?}, not {wanted}");
    Ok(())
}

/// A backend is gone: datagrams go to another from the very next on, and who is connected to it learns of its end.
pub fn removed(world: &mut World) -> Result<()> {
    leaves(world, false)
}

/// A backend leaves a Service and is another's: so do datagrams, and connections go on.
pub fn parted(world: &mut World) -> Result<()> {
    world.apply(&[by_hand("others", OTHERS_PORT)])?;
    write(world, "others", &[("a1", ready())], &["a1"])?;
    leaves(world, true)?;
    world.delete(&["others"])
}

fn ready() -> Value {
    json!({"ready": true})
}

fn leaves(world: &mut World, stays_anothers: bool) -> Result<()> {
    world.apply(&[by_hand("life", LIFE_PORT)])?;
    write(world, "life", &[("a1", ready())], &["a1"])?;
    let ips = world.cluster_ips("life")?;
    let (pod, node1) = (&world.pod("late")?.place, world.node("node1")?);
    let packets = pod.without_sockets();
    let (mut loose, mut moving, mut ending) = (Vec::new(), Vec::new(), Vec::new());
    for v4 in FAMILIES {
        let inside = SocketAddr::new(of(ips, v4), PORT);
        let port = SocketAddr::new(of(node1.addresses, v4), LIFE_PORT);
        for place in [pod, &packets, &node1.place] {
            loose.push((place.name.clone(), Loose::new(place, inside)?));
        }
        for (place, to) in [
            (&packets, inside),
            (&world.outside, port),
            (&world.machine, port),
        ] {
            let talk = place.talk(Protocol::Udp, to)?;
            moving.push((format!("{} to {to}", place.name), talk));
        }
        for protocol in PROTOCOLS {
            for place in [pod, &node1.place] {
                let talk = place.talk(protocol, inside)?;
                ensure!(talk.peer()? == inside, "{}: {:?}", place.name, talk.peer());
                let what = format!("{}, {protocol:?} to {inside}", place.name);
                ending.push((what, protocol, talk));
            }
        }
    }
    for (what, socket) in &mut loose {
        is(what, socket.ask(), "a1")?;
    }
    for (what, talk) in &mut moving {
        is(what, talk.ask(), "a1")?;
    }
    for (what, _, talk) in &mut ending {
        is(what, talk.ask(), "a1")?;
    }
    write(world, "life", &[("a2", ready())], &["a2"])?;
    if stays_anothers {
        // All flows are looked through for that: it takes a moment.
        for (what, socket) in &mut loose {
            eventually(&format!("{what}: parted"), MINUTE, || {
                Ok(socket.ask().is_ok_and(|answer| answer.name == "a2"))
            })?;
        }
        for (what, talk) in &mut moving {
            eventually(&format!("{what}: parted"), MINUTE, || {
                Ok(talk.ask().is_ok_and(|answer| answer.name == "a2"))
            })?;
        }
    }
    for (what, socket) in &mut loose {
        is(what, socket.ask(), "a2")?;
    }
    for (what, talk) in &mut moving {
        is(what, talk.ask(), "a2")?;
    }
    for (what, protocol, talk) in &mut ending {
        if stays_anothers && *protocol == Protocol::Tcp {
            is(what, talk.ask(), "a1")?;
            continue;
        }
        let fate = talk.fate();
        let told = fate.is_some_and(|fate| ENDED.contains(&fate));
        ensure!(told, "{what}: {fate:?} instead of an end");
    }
    // With nobody left, datagrams are refused, too.
    write(world, "life", &[], &[])?;
    for (what, talk) in &mut moving {
        eventually(&format!("{what}: refused"), MINUTE, || {
            let kind = talk.ask().err().map(|error| error.kind());
            Ok(kind == Some(ErrorKind::ConnectionRefused))
        })?;
    }
    world.delete(&["life"])
}

/// Many talks, of which each is with this one.
pub fn talks_with(
    place: &Place,
    protocol: Protocol,
    to: SocketAddr,
    wanted: &str,
) -> Result<(String, Talk)> {
    let what = format!("{}, {protocol:?} to {to}", place.name);
    for _ in 0..64 {
        let mut talk = place.talk(protocol, to)?;
        let answer = talk.ask().with_context(|| what.clone())?;
        if answer.name == wanted {
            return Ok((what, talk));
        }
    }
    anyhow::bail!("{what}: {wanted} is never chosen")
}

/// A backend ends: it keeps whom it has, and gets nobody new while another is ready; where none is, it goes on.
pub fn terminating(world: &mut World) -> Result<()> {
    world.apply(&[by_hand("ending", ENDING_PORT)])?;
    let (ready, ends, ended) = (
        json!({"ready": true}),
        json!({"ready": false, "serving": true, "terminating": true}),
        json!({"ready": false, "serving": false, "terminating": true}),
    );
    let endpoints = [("a1", ready.clone()), ("a2", ready.clone())];
    write(world, "ending", &endpoints, &["a1", "a2"])?;
    let ips: [IpAddr; 2] = world.cluster_ips("ending")?;
    let (pod, node1) = (world.pod("late")?.place.clone(), world.node("node1")?);
    let (mut ways, mut talks) = (Vec::new(), Vec::new());
    for v4 in FAMILIES {
        let inside = SocketAddr::new(of(ips, v4), PORT);
        let port = SocketAddr::new(of(node1.addresses, v4), ENDING_PORT);
        ways.push((pod.clone(), inside));
        ways.push((pod.without_sockets(), inside));
        ways.push((node1.place.clone(), inside));
        ways.push((world.outside.clone(), port));
    }
    for (place, to) in &ways {
        for protocol in PROTOCOLS {
            talks.push(talks_with(place, protocol, *to, "a1")?);
        }
    }
    let mut go_on = |when: &str| -> Result<()> {
        for (what, talk) in &mut talks {
            is(&format!("{what}, {when}"), talk.ask(), "a1")?;
        }
        Ok(())
    };
    let all = |wanted: &str| -> Result<()> {
        for (place, to) in &ways {
            for protocol in PROTOCOLS {
                // So many that one which is not meant would be chosen.
                for _ in 0..3 {
                    spread(place, protocol, *to, &[wanted])?;
                }
            }
        }
        Ok(())
    };
    write(
        world,
        "ending",
        &[("a1", ends.clone()), ("a2", ready)],
        &["a1", "a2"],
    )?;
    all("a2")?;
    go_on("when it ends")?;
    write(world, "ending", &[("a1", ends)], &["a1"])?;
    all("a1")?;
    go_on("when it alone is left")?;
    // What answers no more keeps its connections as long as it is there; new ones are refused, and so are datagrams.
    let a1 = world.pod("a1")?.addresses;
    world.apply(&slices("ending", &[(a1, json!({"conditions": ended}))]))?;
    for node in world.nodes.keys() {
        world.chosen(node, "ending", &[])?;
    }
    for (place, to) in &ways {
        let refusal = place.refusal(Protocol::Tcp, *to);
        let refused = Some(ErrorKind::ConnectionRefused);
        ensure!(refusal == refused, "{} to {to}: {refusal:?}", place.name);
    }
    for (what, talk) in &mut talks {
        if matches!(talk, Talk::Tcp(_)) {
            is(what, talk.ask(), "a1")?;
            continue;
        }
        // A packet is refused; a socket that was translated is ended.
        eventually(&format!("{what}: told"), MINUTE, || {
            let asked = talk.ask().err().map(|error| error.kind());
            let refused = asked == Some(ErrorKind::ConnectionRefused);
            Ok(refused || talk.fate().is_some_and(|fate| ENDED.contains(&fate)))
        })?;
    }
    world.delete(&["ending"])
}
