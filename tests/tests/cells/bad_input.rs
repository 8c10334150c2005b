//! What is wrong is named, and the rest works: Services that want the same, slices that disagree, too many endpoints.

use std::net::{Ipv4Addr, SocketAddr, TcpStream};
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use serde_json::{Value, json};
use xebec_tests::eventually;
use xebec_tests::place::{PROTOCOLS, Protocol};

use super::world::{
    EXTERNAL, FAMILIES, MINUTE, NAMESPACE, PORT, TARGET, World, ip, of, service, slices, spread,
};

/// Waits for an Event of the agents about a Service; one for each of these words.
pub fn told_of(world: &World, service: &str, reason: &str, words: &str) -> Result<()> {
    let what = format!("an Event {reason} about {service} says {words:?}");
    eventually(&what, MINUTE, || {
        let events = world.cluster.get(&["events", "-n", NAMESPACE])?;
        let all = events["items"].as_array().into_iter().flatten();
        let mut ours = all.filter(|event| {
            event["involvedObject"]["kind"] == "Service"
                && event["involvedObject"]["name"] == *service
                && event["reason"] == *reason
        });
        Ok(ours.any(|event| {
            event["message"]
                .as_str()
                .is_some_and(|text| text.contains(words))
        }))
    })
}

/// Two Services want the same external address: the older one has it, as long as it is there.
pub fn same_address(world: &mut World) -> Result<()> {
    let spec = |pod: &str| json!({"selector": {"name": pod}, "externalIPs": EXTERNAL});
    world.apply(&[service("first", spec("a1"))])?;
    world.settled("first", 1)?;
    // Which is older is told by seconds.
    std::thread::sleep(Duration::from_millis(1100));
    world.apply(&[service("second", spec("a2"))])?;
    world.settled("second", 1)?;
    let all = |external: &str| -> Result<()> {
        let second = world.cluster_ips("second")?;
        for v4 in FAMILIES {
            let to = SocketAddr::new(ip(of(EXTERNAL, v4))?, PORT);
            for place in [&world.outside, &world.pod("late")?.place] {
                for protocol in PROTOCOLS {
                    spread(place, protocol, to, &[external])?;
                }
            }
            let to = SocketAddr::new(of(second, v4), PORT);
            spread(&world.pod("b1")?.place, Protocol::Tcp, to, &["a2"])?;
        }
        Ok(())
    };
    all("a1")?;
    told_of(world, "second", "PortConflict", "cells/first")?;
    let rows = world.rows("node1", "second")?;
    let conflicts = rows.iter().filter(|row| row["state"] == "conflict").count();
    ensure!(conflicts == 4, "{conflicts} conflicts: {rows:?}");
    world.delete(&["first"])?;
    eventually("the second has the address", MINUTE, || {
        all("a2")?;
        Ok(true)
    })?;
    world.delete(&["second"])
}

/// Slices that say different things of an endpoint, and settings that nobody understands.
pub fn slices_that_disagree(world: &mut World) -> Result<()> {
    let mut odd = service("odd", json!({}));
    odd["metadata"]["annotations"] = json!({
        "xebec.io/lb-algorithm": "fairest",
        "xebec.io/weights": "{\"a1\": 1}",
    });
    let (a1, a2) = (world.pod("a1")?.addresses, world.pod("a2")?.addresses);
    let with = |ready: bool| json!({"conditions": {"ready": ready}});
    let mut objects = vec![odd];
    // Both know of a1, but not whether it is ready; both know of a2, which is ready for nobody.
    let second = [(a1, with(true)), (a2, with(false))];
    objects.extend(slices("odd", &[(a1, with(false)), (a2, with(false))]));
    objects.extend(slices("odd", &second).into_iter().map(|mut slice| {
        let name = slice["metadata"]["name"].as_str().unwrap_or_default();
        slice["metadata"]["name"] = json!(format!("{name}-more"));
        slice
    }));
    world.apply(&objects)?;
    for node in ["node1", "node2"] {
        eventually(&format!("{node} knows the endpoints"), MINUTE, || {
            let rows = world.rows(node, "odd")?;
            let mut rows = rows.iter().filter(|row| row["type"] == "ClusterIP");
            Ok(rows.all(|row| row["inside"].as_array().map(Vec::len) == Some(1)))
        })?;
    }
    let ips = world.cluster_ips("odd")?;
    for v4 in FAMILIES {
        for protocol in PROTOCOLS {
            let to = SocketAddr::new(of(ips, v4), PORT);
            for pod in ["b1", "late"] {
                spread(&world.pod(pod)?.place, protocol, to, &["a1"])?;
            }
        }
    }
    told_of(world, "odd", "InvalidService", "fairest")?;
    told_of(world, "odd", "InvalidService", "xebec.io/weights")?;
    let rows = world.rows("node1", "odd")?;
    let faults = rows.iter().filter(|row| {
        row["state"]
            .as_str()
            .is_some_and(|state| state.starts_with("invalid: "))
    });
    ensure!(faults.count() == 2, "the table does not tell: {rows:?}");
    world.delete(&["odd"])
}

/// One Service with 20,000 endpoints, of which three exist, with so much weight that some are hit.
pub fn crowd(world: &mut World) -> Result<()> {
    const ENDPOINTS: usize = 20_000;
    const SLICE: usize = 1_000;
    let real: Vec<String> = ["a1", "a2", "b1"]
        .iter()
        .map(|name| Ok(world.pod(name)?.addresses[0].to_string()))
        .collect::<Result<_>>()?;
    let weights: Value = real.iter().map(|ip| (ip.clone(), json!(1000))).collect();
    let ports = json!([{"name": "tcp", "port": PORT, "targetPort": TARGET}]);
    let mut crowd = service("crowd", json!({"ports": ports}));
    crowd["metadata"]["annotations"] = json!({"xebec.io/weights": weights.to_string()});
    let mut objects = vec![crowd];
    let nobody = (0..).map(|number: u32| {
        Ipv4Addr::from_bits(Ipv4Addr::new(10, 77, 0, 1).to_bits() + number).to_string()
    });
    let all: Vec<String> = real.iter().cloned().chain(nobody).take(ENDPOINTS).collect();
    for (number, part) in all.chunks(SLICE).enumerate() {
        let endpoints: Vec<Value> = part.iter().map(|ip| json!({"addresses": [ip]})).collect();
        objects.push(json!({
            "apiVersion": "discovery.k8s.io/v1",
            "kind": "EndpointSlice",
            "metadata": {
                "name": format!("crowd-{number}"),
                "namespace": NAMESPACE,
                "labels": {"kubernetes.io/service-name": "crowd"},
            },
            "addressType": "IPv4",
            "endpoints": endpoints,
            "ports": [{"name": "tcp", "port": TARGET}],
        }));
    }
    world.apply(&objects)?;
    let count = |node: &str| -> Result<usize> {
        let rows = world.rows(node, "crowd")?;
        let row = rows
            .iter()
            .find(|row| row["frontend"].to_string().contains('.'));
        let row = row.context("the Service is not known")?;
        ensure!(row["state"] == "ok", "the Service is {}", row["state"]);
        Ok(row["inside"].as_array().map_or(0, Vec::len))
    };
    for node in ["node1", "node2"] {
        let what = format!("{node} has {ENDPOINTS} endpoints");
        eventually(&what, MINUTE, || Ok(count(node)? == ENDPOINTS))?;
    }
    let to = SocketAddr::new(world.cluster_ips("crowd")?[0], PORT);
    for place in [
        &world.pod("late")?.place,
        &world.pod("late")?.place.without_sockets(),
    ] {
        let connecting: Vec<TcpStream> = (0..150)
            .map(|_| place.begin(to))
            .collect::<std::io::Result<_>>()?;
        eventually("some of the connections are answered", MINUTE, || {
            Ok(connecting.iter().any(|stream| stream.peer_addr().is_ok()))
        })?;
    }
    // Others get on meanwhile.
    world.apply(&[service("beside", json!({"selector": {"app": "web"}}))])?;
    world.settled("beside", 3)?;
    let ips = world.cluster_ips("beside")?;
    for v4 in FAMILIES {
        let to = SocketAddr::new(of(ips, v4), PORT);
        spread(
            &world.pod("late")?.place,
            Protocol::Tcp,
            to,
            &["a1", "a2", "b1"],
        )?;
    }
    world.delete(&["beside", "crowd"])?;
    eventually("nothing is left of it", MINUTE, || {
        Ok(world.rows("node1", "crowd")?.is_empty() && world.rows("node2", "crowd")?.is_empty())
    })
}
