//! What the commands say of Services is what the kernel does.

use std::collections::BTreeSet;
use std::net::{IpAddr, Ipv4Addr, SocketAddr};

use anyhow::{Context, Result, ensure};
use serde_json::{Value, json};
use xebec_tests::place::Protocol;

use super::world::{FAMILIES, NAMESPACE, Node, PORT, TARGET, World, of, service};

/// What a command prints, as JSON.
pub fn printed(world: &World, args: &[&str]) -> Result<Vec<Value>> {
    let text = world.cluster.run(&[args, &["-o", "json"]].concat())?;
    let rows = serde_json::from_str(&text);
    rows.with_context(|| format!("xebec {} printed {text:?}", args.join(" ")))
}

fn listed(world: &World, name: &str, node: &str) -> Result<Vec<Value>> {
    let list = ["service", "list", "-n", NAMESPACE, "--node", node];
    let mut rows = printed(world, &list)?;
    rows.retain(|row| row["service"] == format!("{NAMESPACE}/{name}"));
    Ok(rows)
}

/// How many flows the ClusterIPs of a Service got at a node.
pub fn hits(world: &World, name: &str, node: &str) -> Result<u64> {
    let rows = listed(world, name, node)?;
    let ours = rows.iter().filter(|row| row["type"] == "ClusterIP");
    let each = ours.map(|row| row["hits"].as_u64());
    each.sum::<Option<u64>>().context("no hits are told")
}

fn names(values: &Value) -> BTreeSet<String> {
    let all = values.as_array().into_iter().flatten();
    let text = all.filter_map(|one| one["backend"].as_str());
    text.map(str::to_owned).collect()
}

/// `service list` counts what is asked; `service trace` names those who answer; `bpf lb`, `flow` and `nat` show both.
pub fn by_commands(world: &mut World) -> Result<()> {
    const TIMES: usize = 12;
    world.apply(&[service("told", json!({"selector": {"app": "web"}}))])?;
    world.settled("told", 3)?;
    let ips = world.cluster_ips("told")?;
    let late = world.pod("late")?;
    let places = [
        late.place.clone(),
        late.place.without_sockets(),
        world.node("node2")?.place.clone(),
    ];
    for v4 in FAMILIES {
        let to = SocketAddr::new(of(ips, v4), PORT);
        let mut backends = BTreeSet::new();
        for pod in ["a1", "a2", "b1"] {
            let address = of(world.pod(pod)?.addresses, v4);
            backends.insert(SocketAddr::new(address, TARGET).to_string());
        }
        let before = hits(world, "told", "node2")?;
        for place in &places {
            place.ask_many(Protocol::Tcp, to, TIMES)?;
        }
        let counted = hits(world, "told", "node2")? - before;
        ensure!(counted == (places.len() * TIMES) as u64, "{counted} hits");
        for from in ["cells/late", "node"] {
            let target = format!("{to}/TCP");
            let trace = ["service", "trace", "--node", "node2", "--from", from];
            let answers = printed(world, &[&trace[..], &["--to", &target]].concat())?;
            ensure!(answers.len() == 1, "{from} to {target}: {answers:?}");
            let run = &answers[0]["runs"][0]["backends"];
            ensure!(names(run) == backends, "{from} to {target}: {answers:?}");
        }
        let address = to.ip().to_string();
        let of_map = |map: &str| {
            let list = ["bpf", map, "list", "--node", "node2", "--address", &address];
            printed(world, &list)
        };
        let frontend = format!("{to}/TCP");
        let lb = of_map("lb")?;
        let row = lb.iter().find(|row| row["frontend"] == frontend);
        let row = row.with_context(|| format!("{frontend} is not in {lb:?}"))?;
        ensure!(names(&row["inside"]) == backends, "{row}");
        // Of the pod's packets; its sockets and the node's sent none to the Service's address.
        let flows = of_map("flow")?;
        let begun = flows
            .iter()
            .filter(|row| row["destination"] == to.to_string());
        ensure!(begun.count() == TIMES, "{flows:?}");
        for row in of_map("nat")? {
            let turned = &row["translation"];
            let end = match turned["direction"].as_str() {
                Some("forward") => &turned["new_destination"],
                _ => &turned["source"],
            };
            let end = end.as_str().unwrap_or_default();
            ensure!(
                backends.contains(end),
                "{end} is not in {backends:?}: {row}"
            );
        }
    }
    let list = ["service", "list", "-n", NAMESPACE, "-o", "wide"];
    let table = world.cluster.run(&list)?;
    let head = table.lines().next().unwrap_or_default();
    ensure!(head.contains("HITS") && head.contains("NODE"), "{table}");
    ensure!(table.contains("cells/told"), "{table}");
    world.delete(&["told"])
}

/// Where a node's agent tells its metrics.
const METRICS: SocketAddr = SocketAddr::new(IpAddr::V4(Ipv4Addr::LOCALHOST), 10_249);

/// The metrics of a node's agent, at one moment.
pub struct Metrics(String);

impl Metrics {
    pub fn of(node: &Node) -> Result<Self> {
        let (_, _, text) = node.place.http_get(METRICS, "/metrics")?;
        Ok(Self(text))
    }

    pub fn value(&self, name: &str) -> Result<f64> {
        let lines = self.0.lines().filter_map(|line| line.split_once(' '));
        let mut values = lines.filter(|(of, _)| *of == name);
        let value = values.next().and_then(|(_, value)| value.parse().ok());
        value.with_context(|| format!("no {name} in {}", self.0))
    }
}

/// The ports that kube-proxy has at a node, with its names for what means the same.
pub fn at_ports(world: &mut World) -> Result<()> {
    world.apply(&[service("measured", json!({"selector": {"app": "web"}}))])?;
    world.settled("measured", 3)?;
    let node = world.node("node1")?;
    let (status, _, mode) = node.place.http_get(METRICS, "/proxyMode")?;
    ensure!((status, &*mode) == (200, "xebec"), "{status}: {mode}");
    // At 0.0.0.0, as kube-proxy's by default.
    let at = SocketAddr::new(of(node.addresses, true), 10_256);
    for (path, told) in [("/healthz", "nodeEligible"), ("/livez", "lastUpdated")] {
        let (status, _, body) = world.outside.http_get(at, path)?;
        ensure!(
            status == 200 && body.contains(told),
            "{at}{path}: {status}, {body}"
        );
    }
    let metrics = Metrics::of(node)?;
    for name in [
        "kubeproxy_network_programming_duration_seconds_count",
        "kubeproxy_sync_proxy_rules_duration_seconds_count",
        "kubeproxy_sync_proxy_rules_service_changes_total",
        "kubeproxy_sync_proxy_rules_endpoint_changes_total",
        "kubeproxy_sync_proxy_rules_last_timestamp_seconds",
        "kubeproxy_proxy_healthz_total{code=\"200\"}",
        "kubeproxy_proxy_livez_total{code=\"200\"}",
        "xebec_services",
    ] {
        let value = metrics.value(name)?;
        ensure!(value > 0.0, "{name} is {value}");
    }
    world.delete(&["measured"])
}
