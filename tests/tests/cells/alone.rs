//! The agent alone, by its own command, on a node whose kubelet is no part of Xebec: what a DaemonSet does on any
//! Kubernetes, and the way back.

use std::collections::BTreeSet;
use std::net::{IpAddr, SocketAddr};

use anyhow::{Context, Result, bail, ensure};
use nix::sys::signal::Signal;
use serde_json::{Value, json};
use xebec_tests::place::{PROTOCOLS, Protocol, Server};
use xebec_tests::{eventually, succeed};

use super::machine::{ADDRESSES, NODE, OTHER, Third};
use super::world::{FAMILIES, MINUTE, NAMESPACE, PORT, TARGET, World, ip, of, service, spread};

/// Its pods'.
const RANGES: [&str; 2] = ["10.244.60.0/24", "fd00:10:244:60::/64"];
/// The machine's address at the nodes' switch, where the API server is.
const API: &str = "10.245.0.1";
const NODE_PORT: u16 = 30_029;
const ALL: [&str; 3] = ["a1", "a2", "b1"];

/// The Node, as its kubelet would register it.
fn register(world: &World, third: &Third) -> Result<()> {
    let kubeconfig = ["config", "view", "--raw", "--minify", "--output", "json"];
    let mut kubeconfig: Value = serde_json::from_str(&world.cluster.k(&kubeconfig)?)?;
    let server = &mut kubeconfig["clusters"][0]["cluster"]["server"];
    let port = server.as_str().and_then(|server| server.rsplit(':').next());
    *server = format!("https://{API}:{}", port.context("no port")?).into();
    std::fs::write(third.path("kubeconfig"), kubeconfig.to_string())
        .context("could not write the kubeconfig")?;
    world.apply(&[json!({
        "apiVersion": "v1", "kind": "Node",
        "metadata": {"name": NODE, "labels": {"kubernetes.io/hostname": NODE}},
        "spec": {"podCIDR": RANGES[0], "podCIDRs": RANGES},
    })])?;
    let addresses = ADDRESSES.map(|address| json!({"type": "InternalIP", "address": address}));
    let status = json!({"status": {
        "addresses": addresses, "conditions": [{"type": "Ready", "status": "True"}],
    }});
    patch(world, &["node", NODE], &status)
}

fn patch(world: &World, what: &[&str], status: &Value) -> Result<()> {
    let patch = status.to_string();
    let rest = ["--subresource=status", "--type=merge", "-p", &patch];
    world
        .cluster
        .k(&[&["patch"], what, &rest].concat())
        .map(drop)
}

/// The pod, as that kubelet would tell of it.
fn run_pod(world: &World, third: &Third) -> Result<[IpAddr; 2]> {
    world.apply(&[json!({
        "apiVersion": "v1", "kind": "Pod",
        "metadata": {"name": "c1", "namespace": NAMESPACE, "labels": {"app": NODE}},
        "spec": {
            "nodeName": NODE, "terminationGracePeriodSeconds": 0,
            "containers": [{"name": "c", "image": "none"}],
        },
    })])?;
    let addresses = third.add_pod()?;
    let ips = addresses.map(|ip| json!({"ip": ip}));
    let status = json!({"status": {
        "phase": "Running", "podIP": addresses[0], "podIPs": ips,
        "conditions": [{"type": "Ready", "status": "True"}],
    }});
    patch(world, &["pod", "c1", "-n", NAMESPACE], &status)?;
    Ok(addresses)
}

/// Whom each reaches by Services: pods and processes of this node, of others, and machines outside.
fn reaches(world: &World, third: &Third) -> Result<()> {
    let (web, own) = (
        world.cluster_ips("alone-web")?,
        world.cluster_ips("alone-own")?,
    );
    for v4 in FAMILIES {
        let [web, own] = [web, own].map(|ips| SocketAddr::new(of(ips, v4), PORT));
        let near = SocketAddr::new(ip(of(ADDRESSES, v4))?, NODE_PORT);
        let far = SocketAddr::new(of(world.node("node1")?.addresses, v4), NODE_PORT);
        for protocol in PROTOCOLS {
            for place in [&third.pod, &third.pod.without_sockets(), &third.node] {
                spread(place, protocol, web, &ALL)?;
                for to in [own, near] {
                    spread(place, protocol, to, &["c1"])?;
                }
            }
            for pod in ["a1", "late"] {
                let place = &world.pod(pod)?.place;
                spread(place, protocol, own, &["c1"])?;
                spread(&place.without_sockets(), protocol, own, &["c1"])?;
            }
            for to in [near, far] {
                spread(&world.outside, protocol, to, &["c1"])?;
            }
        }
    }
    Ok(())
}

/// A policy about the pod holds, and no longer when it is gone.
fn obeys_policies(world: &World, third: &Third, pod: [IpAddr; 2]) -> Result<()> {
    let rows = |count: u64| {
        eventually("the agent knows the policies", MINUTE, || {
            let rows = third.ask("/tables/policies")?;
            Ok(rows.as_array().map(Vec::len) == Some(usize::try_from(count)?))
        })
    };
    world.apply(&[json!({
        "apiVersion": "networking.k8s.io/v1", "kind": "NetworkPolicy",
        "metadata": {"name": "alone", "namespace": NAMESPACE},
        "spec": {
            "podSelector": {"matchLabels": {"app": NODE}},
            "ingress": [{"from": [{"podSelector": {"matchLabels": {"app": "web"}}}]}],
        },
    })])?;
    rows(1)?;
    for v4 in FAMILIES {
        let to = SocketAddr::new(of(pod, v4), TARGET);
        eventually("the policy holds", MINUTE, || {
            world.pod("late")?.place.is_silent(Protocol::Tcp, to)
        })?;
        spread(&world.pod("a1")?.place, Protocol::Tcp, to, &["c1"])?;
    }
    world
        .cluster
        .k(&["delete", "networkpolicy", "alone", "-n", NAMESPACE])?;
    rows(0)?;
    let to = SocketAddr::new(pod[0], TARGET);
    eventually("the policy is gone", MINUTE, || {
        Ok(world.pod("late")?.place.ask(Protocol::Tcp, to).is_ok())
    })
}

/// Nothing of the agent is left where it was.
fn is_clean(third: &Third) -> Result<()> {
    ensure!(
        third.names("net.d") == BTreeSet::from([OTHER.to_owned()]),
        "{:?}",
        third.names("net.d")
    );
    // The BPF filesystem has files of the kernel's own.
    ensure!(!third.names("bpf").contains("xebec"), "pins are left");
    for folder in ["bin", "run/nodes", "data/nodes"] {
        ensure!(
            third.names(folder).is_empty(),
            "{folder}: {:?}",
            third.names(folder)
        );
    }
    let links: Value = serde_json::from_str(&third.ip("-json link show")?)?;
    let names = links.as_array().into_iter().flatten();
    let names: BTreeSet<_> = names.filter_map(|link| link["ifname"].as_str()).collect();
    ensure!(names == BTreeSet::from(["eth0", "lo"]), "{names:?}");
    for family in ["-4", "-6"] {
        let routes = third.ip(&format!("{family} route show"))?;
        ensure!(!routes.contains("244"), "{routes}");
    }
    Ok(())
}

/// A node with the agent alone beside two whole ones: Services, node ports and policies of the same cluster; it is killed,
/// started again and ended, and nobody notices; then it is taken away.
pub fn agent_alone(world: &mut World) -> Result<()> {
    let mut third = Third::new()?;
    register(world, &third)?;
    world.apply(&[
        service("alone-web", json!({"selector": {"app": "web"}})),
        service(
            "alone-own",
            json!({"type": "NodePort", "selector": {"app": NODE}, "nodePort": NODE_PORT}),
        ),
    ])?;
    third.start()?;
    let aside = format!("{OTHER}.xebec_bak");
    ensure!(
        third.names("net.d") == BTreeSet::from(["05-xebec.conflist".to_owned(), aside]),
        "{:?}",
        third.names("net.d")
    );
    let pod = run_pod(world, &third)?;
    let server = Server::start(&third.pod.without_sockets(), "c1", TARGET)?;
    world.settled("alone-web", 3)?;
    world.settled("alone-own", 1)?;
    eventually("the agent knows its own pod", MINUTE, || {
        let rows = third.ask("/tables/services")?.to_string();
        Ok(pod
            .iter()
            .all(|ip| rows.contains(&SocketAddr::new(*ip, TARGET).to_string())))
    })?;
    reaches(world, &third)?;
    obeys_policies(world, &third, pod)?;
    let (status, _, body) = third
        .node
        .http_get("127.0.0.1:10249".parse()?, "/proxyMode")?;
    ensure!((status, body.as_str()) == (200, "xebec"), "{status} {body}");

    // Who talks notices neither a crash nor an end.
    let web = world.cluster_ips("alone-web")?;
    let mut talks = Vec::new();
    for v4 in FAMILIES {
        let web = SocketAddr::new(of(web, v4), PORT);
        let near = SocketAddr::new(ip(of(ADDRESSES, v4))?, NODE_PORT);
        for protocol in PROTOCOLS {
            for (place, to) in [
                (&third.pod, web),
                (&third.pod.without_sockets(), web),
                (&third.node, web),
                (&world.outside, near),
            ] {
                let what = format!("{}, {protocol:?} to {to}", place.name);
                let mut talk = place.talk(protocol, to).with_context(|| what.clone())?;
                let name = talk.ask().with_context(|| what.clone())?.name;
                talks.push((what, talk, name));
            }
        }
    }
    let mut go_on = |when: &str| -> Result<()> {
        for (what, talk, name) in &mut talks {
            let answer = talk.ask().with_context(|| format!("{when}: {what}"))?;
            ensure!(
                answer.name == *name,
                "{when}: {what}: {answer:?}, not {name}"
            );
        }
        Ok(())
    };
    third.end(Signal::SIGKILL)?;
    go_on("killed")?;
    reaches(world, &third).context("killed")?;
    third.start()?;
    go_on("started again")?;
    reaches(world, &third).context("started again")?;
    ensure!(third.end(Signal::SIGTERM)?, "it ended badly");
    go_on("ended")?;
    reaches(world, &third).context("ended")?;

    // The way back is refused while the agent runs, and may be gone twice.
    third.start()?;
    let output = third.command(&["cleanup"]).output()?;
    let text = String::from_utf8_lossy(&output.stderr).into_owned();
    ensure!(
        !output.status.success() && text.contains("runs on this node still"),
        "{text}"
    );
    third.end(Signal::SIGTERM)?;
    drop(server);
    for _ in 0..2 {
        let said = succeed("cleanup", third.command(&["cleanup"]).output()?)?;
        ensure!(said.contains("third: links, maps"), "{said}");
        is_clean(&third)?;
    }
    let to = SocketAddr::new(web[0], PORT);
    if let Ok(answer) = third.node.ask(Protocol::Tcp, to) {
        bail!("sockets are translated still: {answer:?}");
    }
    let pod = [
        "delete",
        "pod",
        "c1",
        "-n",
        NAMESPACE,
        "--force",
        "--grace-period=0",
    ];
    world.cluster.k(&pod)?;
    world.cluster.k(&["delete", "node", NODE])?;
    world.delete(&["alone-web", "alone-own"])
}
