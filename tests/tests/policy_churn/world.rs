//! The cluster that all parts share: two nodes, pods that answer and ask, and the policies that stand.

use std::collections::BTreeMap;
use std::net::{IpAddr, SocketAddr};
use std::time::Duration;

use anyhow::{Context, Result};
use k8s_openapi::api::core::v1::{Namespace, Pod as ApiPod, Service};
use k8s_openapi::api::networking::v1::NetworkPolicy;
use serde_json::{Value, json};
use xebec_tests::api::{Api, demo_pod};
use xebec_tests::place::{Place, Server, addresses_of, pods_of};
use xebec_tests::{Cluster, eventually};

pub const MINUTE: Duration = Duration::from_secs(60);
/// Where pods answer.
pub const TARGET: u16 = 9000;
/// The Service's port.
pub const PORT: u16 = 80;
/// Where policies, labels and pods change.
pub const BUSY: &str = "busy";
/// Which no policy selects.
pub const OPEN: &str = "open";
/// Where connections are cut.
pub const CUT: &str = "cut";
pub const NODES: [&str; 2] = ["node1", "node2"];
pub const ARGS: [&str; 4] = [
    "--nodes",
    "2",
    "--pod-cidr",
    "10.244.0.0/16,fd00:10:244::/56",
];

/// A pod's namespace, name, node and label. Those with `role: caged` answer the friend alone; those with `toy` are what
/// changes.
type Spec = (
    &'static str,
    &'static str,
    &'static str,
    (&'static str, &'static str),
);

const PODS: [Spec; 9] = [
    (BUSY, "caged1", "node1", ("role", "caged")),
    (BUSY, "caged2", "node2", ("role", "caged")),
    (BUSY, "friend", "node1", ("friend", "yes")),
    (BUSY, "stranger1", "node1", ("friend", "no")),
    (BUSY, "stranger2", "node2", ("friend", "no")),
    (OPEN, "open1", "node1", ("role", "open")),
    (OPEN, "open2", "node2", ("role", "open")),
    (CUT, "cut1", "node1", ("role", "client")),
    (CUT, "cut2", "node2", ("role", "server")),
];
/// Pods that come and go, and their nodes.
pub const TOYS: [(&str, &str); 2] = [("toy1", "node1"), ("toy2", "node2")];
/// What their label says.
pub const COLOURS: [&str; 3] = ["red", "green", "blue"];

pub struct Pod {
    pub addresses: [IpAddr; 2],
    pub place: Place,
}

pub struct World {
    // Gone before the cluster is.
    _servers: Vec<Server>,
    pub api: Api,
    pub pods: BTreeMap<&'static str, Pod>,
    /// The addresses of the Service before the caged pods.
    pub service: [IpAddr; 2],
    pub cluster: Cluster,
}

/// A pod as the API takes it.
pub fn pod(namespace: &str, name: &str, node: &str, (key, value): (&str, &str)) -> Value {
    demo_pod(namespace, name, node, &json!({key: value}))
}

/// A policy as the API takes it.
pub fn policy(namespace: &str, name: &str, spec: &Value) -> Value {
    json!({"metadata": {"name": name, "namespace": namespace}, "spec": spec})
}

/// Both protocols at [`TARGET`].
pub fn ports() -> Value {
    json!([{"port": TARGET}, {"port": TARGET, "protocol": "UDP"}])
}

impl World {
    pub fn up() -> Result<Self> {
        let cluster = Cluster::up("policy-churn", &ARGS)?;
        let api = Api::of(&cluster)?;
        for name in [BUSY, OPEN, CUT] {
            let namespace = json!({"metadata": {"name": name}});
            api.cluster::<Namespace>().create(&namespace)?;
        }
        let standing = json!({
            "podSelector": {"matchLabels": {"role": "caged"}},
            "policyTypes": ["Ingress"],
            "ingress": [{
                "from": [{"podSelector": {"matchLabels": {"friend": "yes"}}}],
                "ports": ports(),
            }],
        });
        api.namespace::<NetworkPolicy>(BUSY)
            .create(&policy(BUSY, "standing", &standing))?;
        for (namespace, name, node, label) in PODS {
            let pod = pod(namespace, name, node, label);
            api.namespace::<ApiPod>(namespace).create(&pod)?;
        }
        let port = |protocol: &str| {
            let name = protocol.to_lowercase();
            json!({"name": name, "protocol": protocol, "port": PORT, "targetPort": TARGET})
        };
        let caged = json!({
            "metadata": {"name": "caged", "namespace": BUSY},
            "spec": {
                "ipFamilyPolicy": "RequireDualStack",
                "selector": {"role": "caged"},
                "ports": [port("TCP"), port("UDP")],
            },
        });
        let services = api.namespace::<Service>(BUSY);
        services.create(&caged)?;
        let caged = services.get("caged")?;
        let ips = caged["spec"]["clusterIPs"].as_array().into_iter().flatten();
        let ips: Vec<IpAddr> = ips.filter_map(|ip| ip.as_str()?.parse().ok()).collect();
        let service = <[IpAddr; 2]>::try_from(ips)
            .ok()
            .context("no two addresses")?;
        let mut pods = BTreeMap::new();
        eventually("all pods run", MINUTE, || {
            pods = find(&cluster, &api)?;
            Ok(pods.len() == PODS.len())
        })?;
        let servers = pods
            .iter()
            .map(|(name, pod): (&&str, &Pod)| Server::start(&pod.place, name, TARGET));
        let world = Self {
            _servers: servers.collect::<Result<_>>()?,
            api,
            service,
            cluster,
            pods,
        };
        let friend = world.pod("friend")?.place.clone();
        eventually("the Service has its endpoints", MINUTE, || {
            let mut who = std::collections::BTreeSet::new();
            for _ in 0..20 {
                let to = SocketAddr::new(world.service[0], PORT);
                who.insert(friend.ask(xebec_tests::place::Protocol::Tcp, to)?.name);
            }
            Ok(who.len() == 2)
        })?;
        Ok(world)
    }

    pub fn pod(&self, name: &str) -> Result<&Pod> {
        self.pods
            .get(name)
            .with_context(|| format!("no pod {name}"))
    }

    /// Where a pod answers.
    pub fn at(&self, name: &str, v4: bool) -> Result<SocketAddr> {
        let addresses = self.pod(name)?.addresses;
        Ok(SocketAddr::new(addresses[usize::from(!v4)], TARGET))
    }

    /// What the agents of both nodes say of a namespace's policies: how many there are, and how many are in force.
    pub fn policies_of(&self, namespace: &str) -> Result<[(usize, usize); 2]> {
        let mut counts = [(0, 0); 2];
        for (node, count) in NODES.iter().zip(&mut counts) {
            let rows = self.cluster.ask_agent(node, "/tables/policies")?;
            for row in rows.as_array().into_iter().flatten() {
                if row["namespace"] == namespace {
                    count.0 += 1;
                    count.1 += usize::from(row["state"] == "in force");
                }
            }
        }
        Ok(counts)
    }
}

/// The pods that have addresses and a network. Their sockets meet no socket programs: packets alone are translated.
fn find(cluster: &Cluster, api: &Api) -> Result<BTreeMap<&'static str, Pod>> {
    let mut places = BTreeMap::new();
    for node in NODES {
        places.extend(pods_of(cluster, node)?);
    }
    let mut found = BTreeMap::new();
    for object in api.cluster::<ApiPod>().list()? {
        let own = PODS
            .iter()
            .find(|(_, name, ..)| object["metadata"]["name"] == *name);
        let Some((_, name, ..)) = own else { continue };
        if let (Some(addresses), Some(place)) = (addresses_of(&object), places.get(*name)) {
            let place = place.without_sockets();
            found.insert(*name, Pod { addresses, place });
        }
    }
    Ok(found)
}
