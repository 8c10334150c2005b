//! Weights of backends (`xebec.io/weights`): each gets its share of what is new, and 0 is none.

use std::collections::BTreeMap;
use std::net::{IpAddr, SocketAddr};

use anyhow::{Result, ensure};
use serde_json::{Value, json};
use xebec_tests::place::{PROTOCOLS, Place, Protocol};

use super::life::{is, talks_with};
use super::world::{FAMILIES, NAMESPACE, PORT, World, of, service, spread};

const WEIGHTS_PORT: u16 = 30_048;
/// How often each place asks.
const TIMES: usize = 400;
/// The pods' weights.
const WEIGHTS: [(&str, u16); 3] = [("a1", 1), ("a2", 3), ("b1", 0)];

/// Fails unless each has answered as often as its weight says. Each question is a trial of its own, so of `n` questions
/// one with the part `p` gets `n * p` with a deviation of `sqrt(n * p * (1 - p))`. It may be off by five of these, which
/// chance does in one of 1.7 million times, and by two questions more: Maglev's table has no more exact parts.
fn shared(what: &str, by_name: &BTreeMap<String, usize>) -> Result<()> {
    let all: u16 = WEIGHTS.iter().map(|(_, weight)| weight).sum();
    for (name, weight) in WEIGHTS {
        let count = by_name.get(name).copied().unwrap_or(0) as f64;
        let part = f64::from(weight) / f64::from(all);
        let ideal = TIMES as f64 * part;
        let slack = 5.0 * (ideal * (1.0 - part)).sqrt() + 2.0;
        let right = (count - ideal).abs() <= if weight == 0 { 0.0 } else { slack };
        ensure!(right, "{what}: {by_name:?}, of {name} {ideal} ± {slack:.0}");
    }
    Ok(())
}

/// The annotation for these weights.
fn annotation(world: &World, weights: &[(&str, u16)]) -> Result<String> {
    let mut all = BTreeMap::new();
    for (name, weight) in weights {
        for address in world.pod(name)?.addresses {
            all.insert(address, *weight);
        }
    }
    Ok(json!(all).to_string())
}

/// By random choice and by Maglev, per packet, by sockets and from outside: parts of what is new are as the weights say. A
/// backend whose weight becomes 0 keeps whom it has; where all are 0, they say nothing.
pub fn weights(world: &mut World) -> Result<()> {
    let weighed = |number: u16, algorithm: &str| -> (String, Value) {
        let name = format!("weighed-{algorithm}");
        let spec = json!({
            "type": "NodePort", "selector": {"app": "web"}, "nodePort": WEIGHTS_PORT + number,
        });
        let mut object = service(&name, spec);
        object["metadata"]["annotations"] = json!({"xebec.io/lb-algorithm": algorithm});
        (name, object)
    };
    let pod = world.pod("late")?.place.clone();
    let node1 = world.node("node1")?;
    let inside = [pod.clone(), pod.without_sockets(), node1.place.clone()];
    for (number, algorithm) in (0..).zip(["random", "maglev"]) {
        let (name, object) = weighed(number, algorithm);
        world.apply(&[object])?;
        world.settled(&name, 3)?;
        let ips: [IpAddr; 2] = world.cluster_ips(&name)?;
        // Connections with the one that is to get nothing new.
        let mut talks = Vec::new();
        let mut ways: Vec<(&Place, SocketAddr)> = Vec::new();
        for v4 in FAMILIES {
            let at_node = SocketAddr::new(of(node1.addresses, v4), WEIGHTS_PORT + number);
            let to = SocketAddr::new(of(ips, v4), PORT);
            ways.extend(inside.iter().map(|place| (place, to)));
            ways.push((&world.outside, at_node));
        }
        for (place, to) in &ways {
            for protocol in PROTOCOLS {
                talks.push(talks_with(place, protocol, *to, "b1")?);
            }
        }
        let weigh = |weights: &[(&str, u16)]| -> Result<()> {
            let text = format!("xebec.io/weights={}", annotation(world, weights)?);
            let annotate = [
                "annotate",
                "--overwrite",
                "service",
                &name,
                "-n",
                NAMESPACE,
                &text,
            ];
            world.cluster.k(&annotate).map(drop)
        };
        weigh(&WEIGHTS)?;
        for node in world.nodes.keys() {
            world.chosen(node, &name, &["a1", "a2"])?;
        }
        for (place, to) in &ways {
            for protocol in PROTOCOLS {
                let by_name = place.ask_many(protocol, *to, TIMES)?;
                let what = format!("{}, {protocol:?} to {to}, {algorithm}", place.name);
                shared(&what, &by_name)?;
            }
        }
        for (what, talk) in &mut talks {
            is(what, talk.ask(), "b1")?;
        }
        weigh(&WEIGHTS.map(|(name, _)| (name, 0)))?;
        for node in world.nodes.keys() {
            world.chosen(node, &name, &["a1", "a2", "b1"])?;
        }
        for (place, to) in &ways {
            spread(place, Protocol::Tcp, *to, &["a1", "a2", "b1"])?;
        }
        world.delete(&[&name])?;
    }
    Ok(())
}
