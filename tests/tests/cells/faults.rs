//! The agents are killed, and the whole cluster: whoever talks does not notice. What the store has meanwhile become
//! that no API server would let in is named, and the rest works.

use std::collections::BTreeMap;
use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;
use std::time::Duration;

use anyhow::{Context, Result, anyhow, ensure};
use nix::sys::signal::Signal;
use serde_json::{Value, json};
use xebec_store::{Embedded, Op, Options, Store, Txn};
use xebec_tests::place::{PROTOCOLS, Place, Protocol};
use xebec_tests::{eventually, kill, pids_of, xebec_bin};

use super::bad_input::told_of;
use super::kept::Kept;
use super::world::{
    EXTERNAL, FAMILIES, MINUTE, NAMESPACE, PORT, World, ip, of, service, slices, spread,
};

const LASTING_PORT: u16 = 30_016;
const TWIN_PORT: u16 = 30_017;
/// Between two questions.
const PAUSE: Duration = Duration::from_millis(5);

/// Somebody who asks again and again: how often, or the first question without an answer.
struct Exchange {
    what: String,
    thread: JoinHandle<Result<u64>>,
}

impl Exchange {
    /// On one socket, always answered by the same; or, if `fresh`, each time on a new one.
    fn start(
        place: &Place,
        protocol: Protocol,
        to: SocketAddr,
        fresh: bool,
        stop: &Arc<AtomicBool>,
    ) -> Result<Self> {
        let kind = if fresh { "new ones" } else { "one" };
        let what = format!("{}, {protocol:?} to {to}, {kind}", place.name);
        let mut talk = place.talk(protocol, to).with_context(|| what.clone())?;
        let first = talk.ask().with_context(|| what.clone())?;
        let (place, stop) = (place.clone(), stop.clone());
        let thread = std::thread::spawn(move || {
            let mut count = 0;
            while !stop.load(Ordering::Relaxed) {
                std::thread::sleep(PAUSE);
                if fresh {
                    talk = place.talk(protocol, to)?;
                }
                let answer = talk.ask();
                let answer = answer.with_context(|| format!("question {count}"))?;
                let same = answer.name == first.name;
                ensure!(fresh || same, "{} instead of {}", answer.name, first.name);
                count += 1;
            }
            Ok(count)
        });
        Ok(Self { what, thread })
    }
}

/// The processes of the nodes, by their names.
fn node_processes(world: &World) -> Result<BTreeMap<String, i32>> {
    let parent = format!("PPid:\t{}", world.cluster.pid()?);
    let mut found = BTreeMap::new();
    for pid in pids_of(&xebec_bin()) {
        let read = |name: &str| std::fs::read_to_string(format!("/proc/{pid}/{name}"));
        let (status, line) = (read("status"), read("cmdline"));
        let (Ok(status), Ok(line)) = (status, line) else {
            continue;
        };
        let node = world
            .nodes
            .keys()
            .find(|node| line.ends_with(&format!("\0node\0{node}\0")));
        if let (Some(node), true) = (node, status.lines().any(|line| line == parent)) {
            found.insert(node.clone(), pid);
        }
    }
    Ok(found)
}

/// The key of an object and how it is changed.
type Edit<'a> = (String, &'a dyn Fn(&mut Value));

/// Changes objects behind the API server's back, while it does not run.
fn edit(world: &World, objects: &[Edit<'_>]) -> Result<()> {
    let runtime = tokio::runtime::Runtime::new().context("could not start a runtime")?;
    runtime.block_on(async {
        let store = Embedded::open(&world.cluster.data().join("store"), Options::default())?;
        for (key, change) in objects {
            let found = store.get(key.as_bytes()).await?;
            let found = found.with_context(|| format!("the store has no {key}"))?;
            let mut object = serde_json::from_slice(&found.value)?;
            change(&mut object);
            let put = Op::Put {
                key: found.key,
                value: object.to_string().into(),
            };
            store
                .txn(Txn {
                    compare: Vec::new(),
                    ops: vec![put],
                })
                .await?;
        }
        Ok(())
    })
}

fn key(group: &str, kind: &str, name: &str) -> String {
    format!("/registry/{group}/{kind}/{NAMESPACE}/{name}")
}

/// What an older or hostile API server might have let in.
fn bad_objects(world: &World) -> Result<()> {
    let twin = |number: u16, pod: &str| {
        let spec =
            json!({"type": "NodePort", "nodePort": TWIN_PORT + number, "selector": {"name": pod}});
        service(&format!("twin-{number}"), spec)
    };
    world.apply(&[twin(0, "a1")])?;
    // Which is older is told by seconds.
    std::thread::sleep(Duration::from_millis(1100));
    let mut objects = vec![
        twin(1, "a2"),
        service("bad", json!({"externalIPs": EXTERNAL})),
    ];
    objects.extend(slices("bad", &[(world.pod("a2")?.addresses, json!({}))]));
    world.apply(&objects)?;
    for name in ["twin-0", "twin-1", "bad"] {
        world.settled(name, 1)?;
    }
    Ok(())
}

fn make_them_bad(world: &World) -> Result<()> {
    let twin = |object: &mut Value| {
        for port in object["spec"]["ports"].as_array_mut().into_iter().flatten() {
            port["nodePort"] = json!(TWIN_PORT);
        }
    };
    let bad = |object: &mut Value| {
        let addresses = ["not an address", "0.0.0.0", "224.0.0.1", "127.0.0.1", "::1"];
        let spec = &mut object["spec"];
        spec["externalIPs"] = addresses.into_iter().chain(EXTERNAL).collect();
        if let Some(ports) = spec["ports"].as_array_mut() {
            ports.push(json!({"name": "odd", "port": 70000, "protocol": "TCP", "targetPort": 1}));
        }
    };
    let slice = |object: &mut Value| {
        if let Some(endpoints) = object["endpoints"].as_array_mut() {
            for address in ["nowhere", "127.0.0.1", "fd00::1"] {
                endpoints.push(json!({"addresses": [address]}));
            }
            endpoints.push(json!({"addresses": []}));
        }
    };
    edit(
        world,
        &[
            (key("core", "services", "twin-1"), &twin),
            (key("core", "services", "bad"), &bad),
            (
                key("discovery.k8s.io", "endpointslices", "bad-ipv4"),
                &slice,
            ),
        ],
    )
}

/// What is named, and what works all the same.
fn bad_objects_are_named(world: &World) -> Result<()> {
    told_of(world, "twin-1", "PortConflict", "cells/twin-0")?;
    for word in ["not an address", "224.0.0.1", "70000"] {
        told_of(world, "bad", "InvalidService", word)?;
    }
    told_of(world, "bad", "InvalidEndpoints", "nowhere")?;
    let (twin, bad) = (world.cluster_ips("twin-1")?, world.cluster_ips("bad")?);
    let pod = &world.pod("late")?.place;
    let node = world.node("node1")?.addresses;
    for v4 in FAMILIES {
        for protocol in PROTOCOLS {
            let at = SocketAddr::new;
            spread(
                &world.outside,
                protocol,
                at(of(node, v4), TWIN_PORT),
                &["a1"],
            )?;
            spread(pod, protocol, at(of(twin, v4), PORT), &["a2"])?;
            spread(pod, protocol, at(of(bad, v4), PORT), &["a2"])?;
            spread(
                &world.outside,
                protocol,
                at(ip(of(EXTERNAL, v4))?, PORT),
                &["a2"],
            )?;
        }
    }
    Ok(())
}

/// Connections, exchanges of datagrams and those who come anew, from all places: none loses a packet while the agents
/// are killed, nor while the whole cluster is, nor when it comes back.
pub fn killed(world: &mut World) -> Result<()> {
    let spec = json!({"type": "NodePort", "nodePort": LASTING_PORT, "selector": {"app": "web"}});
    world.apply(&[service("lasting", spec)])?;
    world.settled("lasting", 3)?;
    bad_objects(world)?;
    let ips: [IpAddr; 2] = world.cluster_ips("lasting")?;
    let stop = Arc::new(AtomicBool::new(false));
    let mut exchanges = Vec::new();
    for v4 in FAMILIES {
        let inside = SocketAddr::new(of(ips, v4), PORT);
        let port = SocketAddr::new(of(world.node("node2")?.addresses, v4), LASTING_PORT);
        let pod = &world.pod("late")?.place;
        let node = &world.node("node1")?.place;
        for protocol in PROTOCOLS {
            for (place, to) in [
                (pod, inside),
                (&pod.without_sockets(), inside),
                (node, inside),
                (&world.outside, port),
            ] {
                exchanges.push(Exchange::start(place, protocol, to, false, &stop)?);
            }
            for (place, to) in [(&pod.without_sockets(), inside), (&world.outside, port)] {
                exchanges.push(Exchange::start(place, protocol, to, true, &stop)?);
            }
        }
    }
    let mut kept = Kept::begin(world)?;
    let outcome = kill_all(world, &mut kept);
    stop.store(true, Ordering::Relaxed);
    let mut failed = Vec::new();
    for Exchange { what, thread } in exchanges {
        let outcome = thread.join().map_err(|_| anyhow!("{what}: panicked"))?;
        match outcome {
            Ok(count) if count > 100 => {}
            Ok(count) => failed.push(format!("{what}: only {count} questions")),
            Err(error) => failed.push(format!("{what}: {error:#}")),
        }
    }
    outcome?;
    ensure!(failed.is_empty(), "lost:\n{}", failed.join("\n"));
    kept.end(world)?;
    bad_objects_are_named(world)?;
    world.delete(&["lasting", "twin-0", "twin-1", "bad"])
}

/// Waits until the programs of the agents that run now have taken over.
fn taken_over(world: &World) -> Result<()> {
    eventually("the agents have taken over", MINUTE, || {
        world.settled("lasting", 3)?;
        let mut all = true;
        for node in world.nodes.keys() {
            let status = world.cluster.agent_status(node)?;
            all &= status["devices"]
                .as_str()
                .is_some_and(|devices| !devices.is_empty());
        }
        Ok(all)
    })
}

fn kill_all(world: &mut World, kept: &mut Kept) -> Result<()> {
    let before = node_processes(world)?;
    ensure!(before.len() == 2, "the nodes' processes are {before:?}");
    for pid in before.values() {
        kill(*pid, Signal::SIGKILL)?;
    }
    eventually("the nodes have new processes", MINUTE, || {
        let now = node_processes(world)?;
        Ok(now.len() == 2 && now.iter().all(|(node, pid)| before.get(node) != Some(pid)))
    })?;
    taken_over(world)?;
    kept.check(world)?;
    kill(world.cluster.pid()?, Signal::SIGKILL)?;
    std::thread::sleep(Duration::from_millis(500));
    make_them_bad(world)?;
    world.cluster.start()?;
    taken_over(world)?;
    kept.check(world)
}
