//! `net`: TCP between two pods, directly and through a Service, beside a bare veth pair.

use std::io::Write;
use std::net::{Ipv4Addr, SocketAddrV4};
use std::process::Stdio;
use std::time::Duration;

use anyhow::{Context, Result};
use xebec_tests::{Cluster, eventually, succeed};

use crate::Effort;
use crate::cluster::BenchCluster;
use crate::netns::BareVeth;
use crate::row::{Aim, Case, Row};
use crate::traffic::{Mode, PORT, Place, SERVER_CPU, pin};

const MANIFEST: &str = include_str!("net.yaml");
const TIMEOUT: Duration = Duration::from_secs(30);
/// Each case must come this close to the bare veth.
const AIM: Aim = Aim::Ratio(0.95);
const PEER: &str = "bare veth";

/// What to measure, in words, and in which unit.
const MODES: [(Mode, &str, &str, f64); 3] = [
    (Mode::RequestResponse, "request/response", "1/s", 1.0),
    (
        Mode::ConnectRequestResponse,
        "connect/request/response",
        "1/s",
        1.0,
    ),
    (Mode::Stream, "stream", "Gbit/s", 8e-9),
];

/// The same executable asks and answers everywhere. Ours: from the `client` pod, in its network namespace and
/// cgroups, to the `server` pod's container. The peer: between two network namespaces that are wired to the host as
/// pods are, with nothing attached to their devices, in the cgroups of the same two pods: only the network differs.
/// The hooks on sockets hang on the root of the cgroups, so a connection of the peer passes them too and is left as it
/// is. Askers keep to one core and answerers to another.
pub fn run(effort: Effort) -> Result<Vec<Row>> {
    let (rounds, seconds) = effort.of((11, 2.0), (3, 0.5));
    let mut cluster = BenchCluster::up("net", &[])?;
    apply(&cluster)?;
    eventually("both pods are Ready", TIMEOUT, || {
        Ok(cluster
            .ready_pods("default", "app in (server,client)")?
            .len()
            == 2)
    })?;
    let (server, server_ip) = pod(&cluster, "server")?;
    let (client, _) = pod(&cluster, "client")?;
    pin(server.pid(), SERVER_CPU)?;
    let service = address(
        &cluster.get(&["service", "server", "-n", "default"])?["spec"]["clusterIP"],
        "the Service",
    )?;
    let bare = BareVeth::beside(&client, &server)?;
    pin(bare.server.pid(), SERVER_CPU)?;
    let bare_address = SocketAddrV4::new(bare.server_ip, PORT);
    let mut rows = Vec::new();
    for (mode, words, unit, scale) in MODES {
        for (target, ip) in [("pod to pod", server_ip), ("pod to ClusterIP", service)] {
            let case = format!("{words}, {target}");
            let address = SocketAddrV4::new(ip, PORT);
            // Both ways answer, and what is made only once is made, before anything counts.
            for (place, address) in [(&client, address), (&bare.client, bare_address)] {
                eventually(&case, TIMEOUT, || {
                    place.measure(address, mode, 0.2).map(|_| true)
                })?;
            }
            let mut measured = Vec::new();
            for round in 0..rounds {
                let ours = client.measure(address, mode, seconds)? * scale;
                let peer = bare.client.measure(bare_address, mode, seconds)? * scale;
                eprintln!(
                    "bench: {case}, {}/{rounds}: {ours:.6} {unit}, bare veth {peer:.6} {unit}, ratio {:.3}",
                    round + 1,
                    ours / peer
                );
                measured.push((ours, peer));
            }
            let case = Case {
                bench: "net",
                case: &case,
                unit,
                aim: AIM,
            };
            rows.push(Row::paired(case, PEER, &measured)?);
        }
    }
    drop(bare);
    cluster.down()?;
    Ok(rows)
}

fn apply(cluster: &Cluster) -> Result<()> {
    let mut kubectl = cluster
        .kubectl(&["apply", "-f", "-"])
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .context("could not start kubectl")?;
    // Taking it closes the pipe when the manifest is written.
    if let Some(mut stdin) = kubectl.stdin.take() {
        stdin
            .write_all(MANIFEST.as_bytes())
            .context("kubectl read no manifest")?;
    }
    let output = kubectl
        .wait_with_output()
        .context("could not wait for kubectl")?;
    succeed("kubectl apply", output).map(drop)
}

/// The process of a pod's container, and the pod's address.
fn pod(cluster: &Cluster, name: &str) -> Result<(Place, Ipv4Addr)> {
    let pod = cluster.get(&["pod", name, "-n", "default"])?;
    let uid = pod["metadata"]["uid"]
        .as_str()
        .with_context(|| format!("the pod {name} has no uid"))?;
    Ok((Place::of_pod(uid)?, address(&pod["status"]["podIP"], name)?))
}

fn address(value: &serde_json::Value, whose: &str) -> Result<Ipv4Addr> {
    value
        .as_str()
        .unwrap_or_default()
        .parse()
        .with_context(|| format!("{whose} has no IPv4 address but {value}"))
}
