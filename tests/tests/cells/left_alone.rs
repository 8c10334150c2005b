//! Services that are no matter of the agents': headless ones, `ExternalName`, and those of another proxy.

use std::net::SocketAddr;

use anyhow::{Result, ensure};
use serde_json::{Value, json};
use xebec_tests::place::PROTOCOLS;

use super::told::{Metrics, printed};
use super::world::{FAMILIES, NAMESPACE, TARGET, World, of, service, slices};

const ALONE: [&str; 4] = ["headless", "headless-by-hand", "away", "foreign"];

/// Flows of a node that one end of is `at`.
fn flows(world: &World, node: &str, at: SocketAddr) -> Result<Vec<Value>> {
    let (address, port) = (at.ip().to_string(), at.port().to_string());
    let list = [
        "bpf",
        "flow",
        "list",
        "--node",
        node,
        "--address",
        &address,
        "--port",
        &port,
    ];
    printed(world, &list)
}

/// What each node's agent counts of what it could not write, or had no room for.
fn failures(world: &World) -> Result<Vec<f64>> {
    let mut all = Vec::new();
    for node in world.nodes.values() {
        let metrics = Metrics::of(node)?;
        for name in [
            "xebec_services_write_failures_total",
            "xebec_services_lacking_room",
        ] {
            all.push(metrics.value(name)?);
        }
    }
    Ok(all)
}

/// No agent makes frontends of them, or anything of their endpoints; who asks an endpoint by its own address reaches it as
/// if there were no Service, and is seen; and nobody complains of them.
pub fn left_alone(world: &mut World) -> Result<()> {
    let web = json!({"app": "web"});
    let away = json!({
        "apiVersion": "v1",
        "kind": "Service",
        "metadata": {"name": "away", "namespace": NAMESPACE},
        "spec": {"type": "ExternalName", "externalName": "away.example"},
    });
    let mut foreign = service("foreign", json!({"selector": web}));
    foreign["metadata"]["labels"] = json!({"service.kubernetes.io/service-proxy-name": "another"});
    let mut objects = vec![
        service("headless", json!({"clusterIP": "None", "selector": web})),
        service("headless-by-hand", json!({"clusterIP": "None"})),
        away,
        foreign,
    ];
    let a2 = world.pod("a2")?;
    objects.extend(slices("headless-by-hand", &[(a2.addresses, json!({}))]));
    let said = world.cluster.log().len();
    let failed = failures(world)?;
    world.apply(&objects)?;
    // Whoever knows of the next one has heard of those before.
    world.apply(&[service("beside", json!({"selector": web}))])?;
    world.settled("beside", 3)?;
    for node in world.nodes.keys() {
        for name in ALONE {
            let rows = world.rows(node, name)?;
            ensure!(rows.is_empty(), "{node} has {rows:?}");
        }
    }
    let b1 = world.pod("b1")?;
    for v4 in FAMILIES {
        let to = SocketAddr::new(of(a2.addresses, v4), TARGET);
        for place in [&b1.place, &b1.place.without_sockets()] {
            for protocol in PROTOCOLS {
                let what = format!("{} to {protocol:?} {to}", place.name);
                let mut talk = place.talk(protocol, to)?;
                let (answer, peer) = (talk.ask()?, talk.peer()?);
                let right = answer.name == "a2" && answer.client.ip() == of(b1.addresses, v4);
                ensure!(right && peer == to, "{what}: {answer:?} by {peer}");
                for node in world.nodes.keys() {
                    let all = flows(world, node, answer.client)?;
                    ensure!(!all.is_empty(), "{what}: {node} knows no flow");
                    let turned = all.iter().any(|flow| flow.get("translation").is_some());
                    ensure!(!turned, "{what}: {all:?}");
                }
            }
        }
    }
    let events = world.cluster.get(&["events", "-n", NAMESPACE])?;
    let events = events["items"].as_array().into_iter().flatten();
    let mut about = events.filter_map(|event| event["involvedObject"]["name"].as_str());
    ensure!(
        !about.any(|name| ALONE.contains(&name)),
        "Events tell of them"
    );
    let log = world.cluster.log();
    let new = log.get(said..).unwrap_or_default().lines();
    let complaints: Vec<&str> = new
        .filter(|line| line.contains("WARN") || line.contains("ERROR"))
        .collect();
    ensure!(complaints.is_empty(), "{complaints:#?}");
    let now = failures(world)?;
    ensure!(now == failed, "{now:?} failures, {failed:?} before");
    world.delete(&ALONE)?;
    world.delete(&["beside"])
}
