//! The cluster that all scenarios share: two nodes, a few pods that answer, a machine outside, and Services.

use std::collections::{BTreeMap, BTreeSet};
use std::net::{IpAddr, SocketAddr};
use std::path::PathBuf;
use std::process::Command;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use serde_json::{Value, json};
use xebec_tests::api::demo_pod;
use xebec_tests::ethtool::{self, Offload};
pub use xebec_tests::place::cgroups;
use xebec_tests::place::{Place, Protocol, Server, addresses_of, cgroup_of, pods_of};
use xebec_tests::{Cluster, eventually, shop, succeed};

pub const MINUTE: Duration = Duration::from_secs(60);
pub const NAMESPACE: &str = "cells";
/// Where pods answer.
pub const TARGET: u16 = 9000;
/// Where `a1` answers what comes by its host port. A backend that is a Service's, too, would not be gone with the
/// Service's endpoint.
pub const HOST_TARGET: u16 = 9001;
/// The port that Services have.
pub const PORT: u16 = 80;
/// The port of the pod `a1` at its node.
pub const HOST_PORT: u16 = 8111;
/// Whether IPv4.
pub const FAMILIES: [bool; 2] = [true, false];
/// Pods and their nodes: `a1` and `b1` and `a2` take requests; `late` is never ready.
const PODS: [(&str, &str); 4] = [
    ("a1", "node1"),
    ("b1", "node1"),
    ("a2", "node2"),
    ("late", "node2"),
];
/// Addresses of the machine outside, which is at the nodes' switch.
pub const OUTSIDE: [&str; 2] = ["10.245.0.200", "fd00:10:245::c8"];
/// Others of its.
pub const OUTSIDE_TOO: [&str; 2] = ["10.245.0.199", "fd00:10:245::c7"];
/// Addresses that the machine outside sends to the first node.
pub const EXTERNAL: [&str; 2] = ["198.51.100.20", "2001:db8:51::20"];
/// Addresses of the machine outside, which the nodes reach by it; not of those to which pods go by their own address.
pub const BEYOND: [&str; 2] = ["192.175.48.77", "2001:db8:51::77"];
/// How the cluster is started in all modes.
const ARGS: [&str; 6] = [
    "--nodes",
    "2",
    "--pod-cidr",
    "10.244.0.0/16,fd00:10:244::/56",
    "--load-balancer-cidr",
    "10.245.0.201-10.245.0.219,fd00:10:245::d0-fd00:10:245::df",
];
pub const NETNS: &str = "xebec-test-cells";
const CABLE: &str = "xbcells0";

/// One of a pair, by family.
pub fn of<T: Copy>(pair: [T; 2], v4: bool) -> T {
    pair[usize::from(!v4)]
}

pub fn ip(text: &str) -> Result<IpAddr> {
    text.parse()
        .with_context(|| format!("{text:?} is no address"))
}

/// Runs `ip` where the thread is.
pub fn ip_command(line: &str) -> Result<()> {
    let output = Command::new("ip").args(line.split(' ')).output();
    succeed(&format!("ip {line}"), output.context("could not start ip")?).map(drop)
}

/// A machine with a cable to this one.
pub struct Outside;

impl Outside {
    pub fn new() -> Result<Self> {
        let outside = Self;
        outside.remove();
        ip_command(&format!("netns add {NETNS}"))?;
        ip_command(&format!(
            "link add {CABLE} type veth peer name eth0 netns {NETNS}"
        ))?;
        // No link-local address, which would come a moment later.
        ip_command(&format!("link set {CABLE} addrgenmode none"))?;
        ip_command(&format!("link set {CABLE} up"))?;
        for (own, length) in [(0, 24), (1, 64)] {
            let dad = if own == 1 { " nodad" } else { "" };
            let (first, second) = (OUTSIDE[own], OUTSIDE_TOO[own]);
            for address in [
                format!("{first}/{length} dev eth0{dad}"),
                // What does not ask for it is not sent from it.
                format!("{second}/{length} dev eth0{dad} preferred_lft 0"),
                format!("{} dev lo{dad}", BEYOND[own]),
            ] {
                ip_command(&format!("-n {NETNS} addr add {address}"))?;
            }
        }
        for device in ["eth0", "lo"] {
            ip_command(&format!("-n {NETNS} link set {device} up"))?;
        }
        Ok(outside)
    }

    fn place(&self) -> Place {
        let netns = PathBuf::from("/run/netns").join(NETNS);
        Place::new("outside", Some(netns), None)
    }

    /// Puts the cable into the nodes' switch.
    fn plug(&self, nodes: &BTreeMap<String, Node>) -> Result<()> {
        ip_command(&format!("link set {CABLE} master xebec0"))?;
        let node = nodes.get("node1").context("no node1")?;
        for v4 in FAMILIES {
            let (to, by) = (of(EXTERNAL, v4), of(node.addresses, v4));
            ip_command(&format!("-n {NETNS} route add {to} via {by}"))?;
        }
        Ok(())
    }

    fn remove(&self) {
        let _ = Command::new("ip").args(["netns", "del", NETNS]).output();
        let _ = Command::new("ip").args(["link", "del", CABLE]).output();
    }
}

impl Drop for Outside {
    fn drop(&mut self) {
        self.remove();
    }
}

pub struct Node {
    pub addresses: [IpAddr; 2],
    pub place: Place,
}

pub struct Pod {
    pub node: &'static str,
    pub addresses: [IpAddr; 2],
    pub place: Place,
}

pub struct World {
    pub cluster: Cluster,
    pub nodes: BTreeMap<String, Node>,
    pub pods: BTreeMap<String, Pod>,
    pub outside: Place,
    pub machine: Place,
    servers: Vec<Server>,
}

/// The zone that a node is in, where no scenario says otherwise.
pub fn own_zone(node: &str) -> String {
    format!("zone-{node}")
}

/// Addresses of both families among these.
fn both(all: impl Iterator<Item = Option<IpAddr>>) -> Option<[IpAddr; 2]> {
    let all: Vec<IpAddr> = all.flatten().collect();
    let first = |v4: bool| all.iter().find(|one| one.is_ipv4() == v4).copied();
    Some([first(true)?, first(false)?])
}

fn parsed(value: &Value) -> Option<IpAddr> {
    value.as_str()?.parse().ok()
}

fn items(list: &Value) -> impl Iterator<Item = &Value> {
    list["items"].as_array().into_iter().flatten()
}

fn pod(name: &str, node: &str) -> Value {
    let mut pod = demo_pod(NAMESPACE, name, node, &json!({"app": "web", "name": name}));
    pod["spec"]["terminationGracePeriodSeconds"] = json!(1);
    if name == "late" {
        pod["metadata"]["labels"]["app"] = json!("late");
    }
    let container = &mut pod["spec"]["containers"][0];
    if name == "a1" {
        container["ports"] = ["TCP", "UDP", "SCTP"]
            .map(|protocol| {
                json!({"name": protocol.to_lowercase(), "containerPort": HOST_TARGET, "hostPort": HOST_PORT, "protocol": protocol})
            })
            .into_iter()
            .collect();
    }
    if name == "late" {
        container["readinessProbe"] = json!({"tcpSocket": {"port": 1}, "periodSeconds": 1});
    }
    pod
}

/// A Service with [`PORT`] by TCP and UDP, of both families.
pub fn service(name: &str, mut spec: Value) -> Value {
    let node_port = spec["nodePort"].take();
    if let Some(fields) = spec.as_object_mut() {
        fields.remove("nodePort");
        fields.insert("ipFamilyPolicy".into(), json!("RequireDualStack"));
        let ports = ["TCP", "UDP"].map(|protocol| {
            let mut port = json!({"name": protocol.to_lowercase(), "protocol": protocol, "port": PORT, "targetPort": TARGET});
            if !node_port.is_null() {
                port["nodePort"] = node_port.clone();
            }
            port
        });
        fields
            .entry("ports")
            .or_insert_with(|| ports.into_iter().collect());
    }
    json!({
        "apiVersion": "v1",
        "kind": "Service",
        "metadata": {"name": name, "namespace": NAMESPACE},
        "spec": spec,
    })
}

/// Slices of both families for a Service without a selector; each endpoint with what else is to be said of it.
pub fn slices(service: &str, endpoints: &[([IpAddr; 2], Value)]) -> Vec<Value> {
    let slice = |v4: bool| {
        let family = if v4 { "IPv4" } else { "IPv6" };
        let one = |(addresses, more): &([IpAddr; 2], Value)| {
            let mut endpoint = more.clone();
            endpoint["addresses"] = json!([of(*addresses, v4)]);
            endpoint
        };
        json!({
            "apiVersion": "discovery.k8s.io/v1",
            "kind": "EndpointSlice",
            "metadata": {
                "name": format!("{service}-{}", family.to_lowercase()),
                "namespace": NAMESPACE,
                "labels": {"kubernetes.io/service-name": service},
            },
            "addressType": family,
            "endpoints": endpoints.iter().map(one).collect::<Vec<_>>(),
            "ports": [
                {"name": "tcp", "port": TARGET},
                {"name": "udp", "port": TARGET, "protocol": "UDP"},
            ],
        })
    };
    FAMILIES.map(slice).into()
}

impl World {
    pub fn up(outside: &Outside) -> Result<Self> {
        let cluster = Cluster::up("cells", &ARGS)?;
        cluster.k(&["create", "namespace", NAMESPACE])?;
        let objects: Vec<Value> = PODS.iter().map(|(name, node)| pod(name, node)).collect();
        shop::apply_objects(&cluster, &objects)?;
        let mut world = Self {
            cluster,
            nodes: BTreeMap::new(),
            pods: BTreeMap::new(),
            outside: outside.place(),
            machine: Place::new("machine", None, None),
            servers: Vec::new(),
        };
        world.find_nodes()?;
        outside.plug(&world.nodes)?;
        for node in world.nodes.keys() {
            for (to, by) in BEYOND.iter().zip(OUTSIDE) {
                let route = ["ip", "route", "add", to, "via", by];
                world.cluster.in_node(node, &route)?;
            }
            world.put_in_zone(node, &own_zone(node))?;
        }
        eventually("the pods run", MINUTE, || {
            Ok(world.cluster.ready_pods(NAMESPACE, "app=web")?.len() == 3)
        })?;
        eventually("the pods have addresses", MINUTE, || world.find_pods())?;
        let a1 = &world.pod("a1")?.place.without_sockets();
        let host = Server::start(a1, "a1", HOST_TARGET)?;
        world.servers.push(host);
        for (name, pod) in &world.pods {
            world
                .servers
                .push(Server::start(&pod.place.without_sockets(), name, TARGET)?);
        }
        Ok(world)
    }

    /// Has the cluster run with these arguments more, with the same pods.
    pub fn switch(&mut self, more: &[&str]) -> Result<()> {
        self.cluster.restart(&[&ARGS, more].concat())?;
        for node in self.nodes.keys() {
            eventually(
                &format!("the agent of {node} has taken over"),
                MINUTE,
                || {
                    let status = self.cluster.agent_status(node)?;
                    Ok(status["devices"].as_str().is_some_and(|by| !by.is_empty()))
                },
            )?;
        }
        if more.contains(&"--xdp") {
            self.make_frames_whole()?;
        }
        Ok(())
    }

    /// Has the switch's ports do what hardware does for XDP, which does not see that a frame's checksum is still to be
    /// filled in; and what XDP sends out of a veth device, the other end takes by the queue that GRO has.
    fn make_frames_whole(&self) -> Result<()> {
        for port in 1..=self.nodes.len() {
            let port = format!("xebec0-n{port}");
            ethtool::set(None, &port, Offload::TxChecksums, false)?;
            ethtool::set(None, &port, Offload::Gro, true)?;
        }
        Ok(())
    }

    /// Puts a node in another zone.
    pub fn put_in_zone(&self, node: &str, zone: &str) -> Result<()> {
        let zone = format!("topology.kubernetes.io/zone={zone}");
        let label = ["label", "node", "--overwrite", node, &zone];
        self.cluster.k(&label).map(drop)
    }

    fn find_nodes(&mut self) -> Result<()> {
        for node in items(&self.cluster.get(&["nodes"])?) {
            let name = node["metadata"]["name"]
                .as_str()
                .context("a nameless node")?;
            let addresses = node["status"]["addresses"].as_array().into_iter().flatten();
            let own = addresses.filter(|one| one["type"] == "InternalIP");
            let addresses = both(own.map(|one| parsed(&one["address"])));
            let addresses = addresses.with_context(|| format!("{name} lacks a family"))?;
            let place = Place::new(name, Some(self.cluster.netns(name)), Some(cgroup_of(name)?));
            self.nodes
                .insert(name.to_owned(), Node { addresses, place });
        }
        Ok(())
    }

    /// Whether all pods have addresses.
    fn find_pods(&mut self) -> Result<bool> {
        let pods = self.cluster.get(&["pods", "-n", NAMESPACE])?;
        let mut found = BTreeMap::new();
        for node in self.nodes.keys() {
            found.extend(pods_of(&self.cluster, node)?);
        }
        for pod in items(&pods) {
            let name = pod["metadata"]["name"].as_str().unwrap_or_default();
            let addresses = addresses_of(pod);
            let node = PODS.iter().find(|(pod, _)| *pod == name);
            if let (Some(addresses), Some(place), Some((_, node))) =
                (addresses, found.remove(name), node)
            {
                let pod = Pod {
                    node,
                    addresses,
                    place,
                };
                self.pods.insert(name.to_owned(), pod);
            }
        }
        Ok(self.pods.len() == PODS.len())
    }

    pub fn pod(&self, name: &str) -> Result<&Pod> {
        self.pods
            .get(name)
            .with_context(|| format!("no pod {name}"))
    }

    pub fn node(&self, name: &str) -> Result<&Node> {
        self.nodes
            .get(name)
            .with_context(|| format!("no node {name}"))
    }

    pub fn apply(&self, objects: &[Value]) -> Result<()> {
        shop::apply_objects(&self.cluster, objects)
    }

    /// Takes Services away, with their slices.
    pub fn delete(&self, services: &[&str]) -> Result<()> {
        let delete = ["delete", "service", "-n", NAMESPACE, "--wait=false"];
        self.cluster.k(&[&delete[..], services].concat()).map(drop)
    }

    /// The ClusterIPs of a Service.
    pub fn cluster_ips(&self, name: &str) -> Result<[IpAddr; 2]> {
        let service = self.cluster.get(&["service", name, "-n", NAMESPACE])?;
        let ips = service["spec"]["clusterIPs"]
            .as_array()
            .into_iter()
            .flatten();
        both(ips.map(parsed)).with_context(|| format!("{name} lacks a family"))
    }

    /// The addresses that a load balancer has given to a Service.
    pub fn balancer(&self, name: &str) -> Result<[IpAddr; 2]> {
        let mut found = None;
        eventually(&format!("{name} has addresses"), MINUTE, || {
            let service = self.cluster.get(&["service", name, "-n", NAMESPACE])?;
            let all = service["status"]["loadBalancer"]["ingress"].as_array();
            found = both(all.into_iter().flatten().map(|one| parsed(&one["ip"])));
            Ok(found.is_some())
        })?;
        found.context("no address")
    }

    /// Rows of an agent's table for a Service.
    pub fn rows(&self, node: &str, service: &str) -> Result<Vec<Value>> {
        let name = format!("{NAMESPACE}/{service}");
        let rows = self.cluster.ask_agent(node, "/tables/services")?;
        let rows = rows.as_array().context("the table is no list")?;
        let ours = rows.iter().filter(|row| row["service"] == *name);
        Ok(ours.cloned().collect())
    }

    /// Waits until the agents of both nodes have so many backends (those that end included) behind each ClusterIP.
    pub fn settled(&self, service: &str, backends: usize) -> Result<()> {
        for node in self.nodes.keys() {
            let what = format!("{service} has {backends} backends on {node}");
            eventually(&what, MINUTE, || {
                let rows_of = self.rows(node, service)?;
                let mut rows = rows_of.iter().filter(|row| row["type"] == "ClusterIP");
                let count = |row: &Value| row["inside"].as_array().map(Vec::len);
                let all = rows.by_ref().map(|row| (count(row), row["state"].clone()));
                let all: Vec<_> = all.collect();
                ensure!(all.len() >= 4, "the frontends are {all:?}");
                let right = |one: &(Option<usize>, Value)| one.0 == Some(backends) && one.1 == "ok";
                let text = Value::from(rows_of).to_string();
                ensure!(!text.contains("\"number\":0,"), "not yet written");
                ensure!(all.iter().all(right), "the backends are {all:?}");
                Ok(true)
            })?;
        }
        Ok(())
    }

    /// Waits until the agents of both nodes have these pods behind each ClusterIP, those that end included.
    pub fn settled_on(&self, service: &str, pods: &[&str]) -> Result<()> {
        for node in self.nodes.keys() {
            for pod in pods {
                let addresses = self.pod(pod)?.addresses;
                let targets = addresses.map(|ip| SocketAddr::new(ip, TARGET).to_string());
                eventually(&format!("{service} has {pod} on {node}"), MINUTE, || {
                    let rows = Value::from(self.rows(node, service)?).to_string();
                    let has = |target: &String| rows.contains(&format!("\"{target}\""));
                    Ok(targets.iter().all(has))
                })?;
            }
        }
        self.settled(service, pods.len())
    }

    /// Waits until the agent of a node sends what is new for each ClusterIP to exactly these: pods, or the machine outside
    /// at [`BEYOND`].
    pub fn chosen(&self, node: &str, service: &str, wanted: &[&str]) -> Result<()> {
        let mut targets = BTreeSet::new();
        for (v4, name) in FAMILIES
            .into_iter()
            .flat_map(|v4| wanted.iter().map(move |name| (v4, *name)))
        {
            let ip = match name {
                "outside" => ip(of(BEYOND, v4))?,
                pod => of(self.pod(pod)?.addresses, v4),
            };
            targets.insert((v4, SocketAddr::new(ip, TARGET).to_string()));
        }
        let what = format!("{service} is {wanted:?} on {node}");
        eventually(&what, MINUTE, || {
            let rows = self.rows(node, service)?;
            let ours = rows.iter().filter(|row| row["type"] == "ClusterIP");
            let mut by_port: BTreeMap<&str, BTreeSet<(bool, String)>> = BTreeMap::new();
            for row in ours {
                ensure!(row["state"] == "ok", "{row}");
                let port = row["port"].as_str().unwrap_or_default();
                let found = by_port.entry(port).or_default();
                for one in row["inside"].as_array().into_iter().flatten() {
                    let target = one["backend"].as_str().unwrap_or_default();
                    if one["weight"] != 0 {
                        found.insert((!target.starts_with('['), target.to_owned()));
                    }
                }
            }
            ensure!(
                by_port.values().all(|found| *found == targets),
                "{by_port:?}"
            );
            Ok(by_port.len() == 2)
        })
    }

    pub fn down(mut self) -> Result<()> {
        self.servers.clear();
        self.cluster.down()
    }
}

/// Fails unless exactly these have answered.
pub fn answered(what: &str, by_name: &BTreeMap<String, usize>, wanted: &[&str]) -> Result<()> {
    let names: BTreeSet<&str> = by_name.keys().map(String::as_str).collect();
    let wanted: BTreeSet<&str> = wanted.iter().copied().collect();
    ensure!(
        names == wanted,
        "{what}: {by_name:?} answered, not {wanted:?}"
    );
    Ok(())
}

/// Asks until each of these has answered, and a few times at least; fails if another answers or one never does.
pub fn spread(place: &Place, protocol: Protocol, to: SocketAddr, wanted: &[&str]) -> Result<()> {
    const LEAST: usize = 6;
    const MOST: usize = 100;
    let mut by_name = BTreeMap::new();
    let what = format!("{} to {protocol:?} {to}", place.name);
    for count in 1..=MOST {
        let answer = place.ask(protocol, to).with_context(|| what.clone())?;
        *by_name.entry(answer.name).or_default() += 1;
        if count >= LEAST && by_name.len() >= wanted.len() {
            break;
        }
    }
    answered(&what, &by_name, wanted)
}
