//! The policies Local where what a node has of a Service ends: those that end and still serve take what is new as long as
//! no other of the node's is ready (KEP-1669), and load balancers are told that there is none.

use std::io::ErrorKind;
use std::net::{IpAddr, SocketAddr};

use anyhow::{Context, Result, ensure};
use serde_json::{Value, json};
use xebec_tests::eventually;
use xebec_tests::place::{PROTOCOLS, Place, Protocol};

use super::policies::{health_port, nobody, says, seen_as};
use super::world::{FAMILIES, MINUTE, OUTSIDE, PORT, World, ip, of, service, slices, spread};

const NAME: &str = "local-ending";
const LOCAL_PORT: u16 = 30_046;

/// What becomes of who asks a node.
#[derive(Clone, Copy)]
enum Fate {
    /// This pod answers; it sees who asks from outside.
    By(&'static str),
    /// Others have endpoints: what comes is dropped.
    Dropped,
    /// Nobody has any.
    Refused,
}

fn refused(place: &Place, protocol: Protocol, to: SocketAddr) -> Result<()> {
    let refusal = place.refusal(protocol, to);
    let right = refusal == Some(ErrorKind::ConnectionRefused);
    ensure!(right, "{} to {protocol:?} {to}: {refusal:?}", place.name);
    Ok(())
}

/// Writes the Service's endpoints, each with where it is.
fn write(world: &World, endpoints: &[(&str, &Value)]) -> Result<()> {
    let mut all = Vec::new();
    for (name, conditions) in endpoints {
        let pod = world.pod(name)?;
        let more = json!({"conditions": conditions, "nodeName": pod.node});
        all.push((pod.addresses, more));
    }
    world.apply(&slices(NAME, &all))
}

/// Fails unless this becomes of who asks this node: from outside by its port, from its pods and itself by the ClusterIP.
/// Pods that ask the port are sent `anywhere`.
fn fates(world: &World, node: &str, fate: Fate, anywhere: &[&str]) -> Result<()> {
    let new: &[&str] = match &fate {
        Fate::By(pod) => &[*pod],
        _ => &[],
    };
    world.chosen(node, NAME, new)?;
    let pod = if node == "node1" { "b1" } else { "late" };
    let (pod, node) = (&world.pod(pod)?.place, world.node(node)?);
    let ips: [IpAddr; 2] = world.cluster_ips(NAME)?;
    for v4 in FAMILIES {
        let port = SocketAddr::new(of(node.addresses, v4), LOCAL_PORT);
        let inside = SocketAddr::new(of(ips, v4), PORT);
        let outside = &world.outside;
        for protocol in PROTOCOLS {
            match fate {
                Fate::By(pod) => {
                    let client = ip(of(OUTSIDE, v4))?;
                    for _ in 0..6 {
                        seen_as(outside, protocol, port, pod, client)?;
                    }
                }
                Fate::Dropped => {
                    let silent = outside.is_silent(protocol, port)?;
                    ensure!(silent, "outside to {protocol:?} {port}: not dropped");
                }
                Fate::Refused => refused(outside, protocol, port)?,
            }
            for place in [pod, &pod.without_sockets(), &node.place] {
                match fate {
                    Fate::By(pod) => spread(place, protocol, inside, &[pod])?,
                    Fate::Dropped => nobody(place, protocol, inside)?,
                    Fate::Refused => refused(place, protocol, inside)?,
                }
                match anywhere {
                    [] => refused(place, protocol, port)?,
                    all => spread(place, protocol, port, all)?,
                }
            }
        }
    }
    Ok(())
}

/// `externalTrafficPolicy: Local` and `internalTrafficPolicy: Local` while a node's endpoints end, are replaced and gone.
pub fn ending(world: &mut World) -> Result<()> {
    use Fate::{By, Dropped, Refused};
    let spec = json!({
        "type": "LoadBalancer", "externalTrafficPolicy": "Local", "internalTrafficPolicy": "Local",
        "nodePort": LOCAL_PORT,
    });
    world.apply(&[service(NAME, spec)])?;
    let balancer = world.balancer(NAME)?;
    let (ready, ends, ended) = (
        &json!({"ready": true, "serving": true, "terminating": false}),
        &json!({"ready": false, "serving": true, "terminating": true}),
        &json!({"ready": false, "serving": false, "terminating": true}),
    );
    // Endpoints; what each node does; whom pods reach by any node's port; how many each node says that it has.
    type Step<'a> = (
        &'a str,
        &'a [(&'a str, &'a Value)],
        [Fate; 2],
        &'a [&'a str],
        [u64; 2],
    );
    let steps: &[Step<'_>] = &[
        (
            "all are ready",
            &[("a1", ready), ("a2", ready)],
            [By("a1"), By("a2")],
            &["a1", "a2"],
            [1, 1],
        ),
        (
            "the first node's ends",
            &[("a1", ends), ("a2", ready)],
            [By("a1"), By("a2")],
            &["a2"],
            [0, 1],
        ),
        (
            "it has another one",
            &[("a1", ends), ("b1", ready)],
            [By("b1"), Dropped],
            &["b1"],
            [1, 0],
        ),
        (
            "it serves no more",
            &[("a1", ended), ("a2", ready)],
            [Dropped, By("a2")],
            &["a2"],
            [0, 1],
        ),
        (
            "one that ends is all that is left",
            &[("a1", ends), ("a2", ended)],
            [By("a1"), Dropped],
            &["a1"],
            [0, 0],
        ),
        (
            "nobody serves",
            &[("a1", ended), ("a2", ended)],
            [Refused, Refused],
            &[],
            [0, 0],
        ),
    ];
    let health = health_port(world, NAME)?;
    for (what, endpoints, by_node, anywhere, counts) in steps {
        write(world, endpoints)?;
        for ((node, fate), count) in ["node1", "node2"].into_iter().zip(by_node).zip(counts) {
            let what = || format!("{what}: {node}");
            fates(world, node, *fate, anywhere).with_context(what)?;
            eventually("the health check has heard of it", MINUTE, || {
                says(world, node, NAME, health, *count)?;
                Ok(true)
            })
            .with_context(what)?;
        }
        // The load balancer's address goes where one is ready.
        if let [0, 1] = counts {
            for v4 in FAMILIES {
                let to = SocketAddr::new(of(balancer, v4), PORT);
                eventually("the second node announces the address", MINUTE, || {
                    let answer = world.outside.ask(Protocol::Tcp, to);
                    Ok(answer.is_ok_and(|answer| answer.name == "a2"))
                })
                .with_context(|| (*what).to_owned())?;
            }
        }
    }
    world.delete(&[NAME])
}
