//! The cluster that all cases share: two nodes, nine pods that answer and ask, each with a Service.

use std::collections::{BTreeMap, BTreeSet};
use std::net::{IpAddr, SocketAddr};
use std::path::PathBuf;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use k8s_openapi::api::core::v1::{Namespace, Node, Pod as ApiPod, Service};
use k8s_openapi::api::networking::v1::NetworkPolicy;
use serde_json::{Value, json};
use xebec_tests::api::{Api, Objects};
use xebec_tests::{Cluster, eventually};

use super::case::{Action, Labels, labels};
use super::model::{Model, PROTOCOLS, Pair, address, namespace, own_labels, pod, standing, word};
use super::sockets::Talker;
use super::table::Way;
use super::{Facts, NAMESPACES, Name, PORTS, of};

const MINUTE: Duration = Duration::from_secs(60);
/// What agents need to hear of a change of which they do not tell.
const MOMENT: Duration = Duration::from_millis(150);
const NODES: [&str; 2] = ["node1", "node2"];
const ARGS: [&str; 4] = [
    "--nodes",
    "2",
    "--pod-cidr",
    "10.244.0.0/16,fd00:10:244::/56",
];

/// A pod that runs.
pub struct Pod {
    /// Its answer.
    pub number: u32,
    pub node: String,
    pub talker: Talker,
    addresses: [IpAddr; 2],
    service: [IpAddr; 2],
}

pub struct World {
    // Gone before the cluster is.
    pods: BTreeMap<Name, Pod>,
    pub cluster: Cluster,
    /// What should be.
    pub model: Model,
    api: Api,
    next: u32,
}

impl World {
    /// Starts the cluster and its pods.
    pub fn up() -> Result<Self> {
        let cluster = Cluster::up("policies", &ARGS)?;
        let api = Api::of(&cluster)?;
        let mut world = Self {
            pods: BTreeMap::new(),
            cluster,
            model: Model::default(),
            api,
            next: 0,
        };
        world.model.nodes = world.api.cluster::<Node>().list()?;
        for name in NAMESPACES {
            world.act(&[Action::CreateNamespace(
                name.to_owned(),
                labels(&[("ns", name)]),
            )])?;
        }
        let pods = standing().into_iter();
        let create = pods.map(|(name, _)| Action::CreatePod(name.clone(), own_labels(&name)));
        world.act(&create.collect::<Vec<_>>())?;
        Ok(world)
    }

    /// Does all of these, and waits until the agents have heard of it.
    pub fn act(&mut self, actions: &[Action]) -> Result<()> {
        for action in actions {
            self.begin(action)
                .with_context(|| format!("could not do {action:?}"))?;
            self.model.apply(action)?;
        }
        for action in actions {
            if let Action::CreatePod(name, labels) = action {
                self.take_in(name, labels)?;
            }
        }
        self.settle(actions)
    }

    fn begin(&mut self, action: &Action) -> Result<()> {
        let namespaces = self.api.cluster::<Namespace>();
        match action {
            Action::Create(policy) => self.policies(policy).create(policy),
            Action::Update(policy) => {
                let name = policy["metadata"]["name"].as_str().context("no name")?;
                self.policies(policy).replace(name, policy)
            }
            Action::Delete(name) => {
                let (policies, name) = self.api.beside::<NetworkPolicy>(name);
                policies.delete(name)
            }
            Action::CreateNamespace(name, labels) => namespaces.create(&namespace(name, labels)),
            Action::LabelNamespace(name, labels) => {
                let before = self.model.namespaces.get(name);
                let before = before.context("no such namespace")?;
                namespaces.patch(name, &relabelled(before, &namespace(name, labels)))
            }
            Action::DeleteNamespace(name) => {
                self.pods.retain(|pod, _| pod.0 != *name);
                namespaces.delete(name)
            }
            Action::CreatePod(name, labels) => {
                let mut standing = standing().into_iter();
                let node = standing.find_map(|(own, node)| (own == *name).then_some(node));
                let node = node.unwrap_or(NODES[self.next as usize % NODES.len()]);
                self.next += 1;
                self.api
                    .namespace::<Service>(&name.0)
                    .create(&service(name))?;
                self.api
                    .namespace::<ApiPod>(&name.0)
                    .create(&pod(name, labels, node))
            }
            Action::LabelPod(name, labels) => {
                let before = self.model.pods.get(name).context("no such pod")?;
                let patch = relabelled(before, &pod(name, labels, ""));
                let (pods, name) = self.api.beside::<ApiPod>(name);
                pods.patch(name, &patch)
            }
            Action::DeletePod(name) => {
                self.pods.remove(name);
                let (services, own) = self.api.beside::<Service>(name);
                services.delete(own)?;
                let (pods, own) = self.api.beside::<ApiPod>(name);
                pods.delete(own)
            }
        }
    }

    fn policies(&self, policy: &Value) -> Objects<'_, NetworkPolicy> {
        let namespace = policy["metadata"]["namespace"].as_str();
        self.api.namespace(namespace.unwrap_or_default())
    }

    /// Waits until a pod runs, and opens its sockets.
    fn take_in(&mut self, name: &Name, labels: &Labels) -> Result<()> {
        let (pods, own_name) = self.api.beside::<ApiPod>(name);
        let mut found = None;
        eventually(&format!("{name:?} runs"), MINUTE, || {
            let own = pods.get(own_name)?;
            let ready = own["status"]["phase"] == "Running";
            let addresses = [address(&own, true), address(&own, false)];
            if let ([Ok(four), Ok(six)], true) = (addresses, ready) {
                found = Some((own, [four, six]));
            }
            Ok(found.is_some())
        })?;
        let (own, addresses) = found.context("the pod is gone")?;
        let node = own["spec"]["nodeName"].as_str().context("no node")?;
        let netns = self.netns(node, name)?;
        let (services, own_name) = self.api.beside::<Service>(name);
        let service = services.get(own_name)?;
        let ips = service["spec"]["clusterIPs"].as_array();
        let ips = ips.into_iter().flatten();
        let ips = ips.filter_map(|ip| ip.as_str()?.parse::<IpAddr>().ok());
        let ips: Vec<IpAddr> = ips.collect();
        let of_family = |v4: bool| ips.iter().find(|ip| ip.is_ipv4() == v4).copied();
        let service = of_family(true).zip(of_family(false));
        let (four, six) = service.with_context(|| format!("{name:?}'s Service lacks a family"))?;
        self.next += 1;
        let mut object = pod(name, labels, node);
        object["status"] =
            json!({"phase": "Running", "podIPs": addresses.map(|ip| json!({"ip": ip}))});
        self.model.pods.insert(name.clone(), object);
        let pod = Pod {
            number: self.next,
            node: node.to_owned(),
            talker: Talker::start(netns, addresses, self.next)?,
            addresses,
            service: [four, six],
        };
        self.pods.insert(name.clone(), pod);
        Ok(())
    }

    fn netns(&self, node: &str, pod: &Name) -> Result<PathBuf> {
        let endpoints = self.cluster.ask_agent(node, "/tables/endpoints")?;
        let own = endpoints.as_array().into_iter().flatten();
        let own = own.filter(|one| one["namespace"] == *pod.0 && one["pod"] == *pod.1);
        let sandbox = own.filter_map(|one| one["container"].as_str()).next_back();
        let sandbox = sandbox.with_context(|| format!("{pod:?} is not connected"))?;
        let path = format!("nodes/{node}/cri/netns/{sandbox}");
        Ok(self.cluster.run_dir().join(path))
    }

    /// Waits until both agents have exactly these policies in force.
    fn settle(&self, actions: &[Action]) -> Result<()> {
        let untold = |action: &&Action| !matches!(action, Action::Create(_) | Action::Delete(_));
        if actions.iter().any(|action| untold(&action)) {
            std::thread::sleep(MOMENT);
        }
        let wanted: BTreeSet<(&str, &str, &str)> = self
            .model
            .policies
            .keys()
            .map(|(namespace, name)| (namespace.as_str(), name.as_str(), "in force"))
            .collect();
        let deadline = std::time::Instant::now() + Duration::from_secs(15);
        for node in NODES {
            loop {
                let rows = self.cluster.ask_agent(node, "/tables/policies")?;
                let rows = rows.as_array().context("the table is no list")?;
                let text = |row: &'_ Value, field: &str| {
                    row[field].as_str().unwrap_or_default().to_owned()
                };
                let known: Vec<_> = rows
                    .iter()
                    .map(|row| ["namespace", "policy", "state"].map(|field| text(row, field)))
                    .collect();
                let known: BTreeSet<(&str, &str, &str)> = known
                    .iter()
                    .map(|[namespace, name, state]| {
                        (namespace.as_str(), name.as_str(), state.as_str())
                    })
                    .collect();
                if known == wanted {
                    break;
                }
                ensure!(
                    std::time::Instant::now() < deadline,
                    "{node} has {known:?}, not {wanted:?}"
                );
                std::thread::sleep(Duration::from_millis(5));
            }
        }
        Ok(())
    }

    /// Undoes what a case did.
    pub fn reset(&mut self) -> Result<()> {
        let mut actions: Vec<Action> = Vec::new();
        let (standing, own) = (standing(), |name: &str| NAMESPACES.contains(&name));
        let stays = |name: &Name| standing.iter().any(|(pod, _)| pod == name);
        for name in self.model.policies.keys().filter(|name| own(&name.0)) {
            actions.push(Action::Delete(name.clone()));
        }
        for (name, pod) in &self.model.pods {
            let labels = super::model::pod_labels(name, &own_labels(name));
            if !stays(name) && own(&name.0) {
                actions.push(Action::DeletePod(name.clone()));
            } else if stays(name) && pod["metadata"]["labels"] != json!(labels) {
                actions.push(Action::LabelPod(name.clone(), own_labels(name)));
            }
        }
        for (name, object) in &self.model.namespaces {
            let labels = labels(&[("ns", name)]);
            if !own(name) {
                actions.push(Action::DeleteNamespace(name.clone()));
            } else if *object != namespace(name, &labels) {
                actions.push(Action::LabelNamespace(name.clone(), labels));
            }
        }
        self.act(&actions)
    }

    /// A pod that runs.
    pub fn pod(&self, name: &Name) -> Result<&Pod> {
        self.pods
            .get(name)
            .with_context(|| format!("no pod {name:?}"))
    }

    /// Where a pair's second pod is asked.
    pub fn target(&self, way: Way, pair: &Pair) -> Result<SocketAddr> {
        let to = self.pod(&pair.to)?;
        let address = match way {
            Way::Pod => to.addresses,
            Way::Service | Way::Socket => to.service,
        };
        Ok(SocketAddr::new(of(address, pair.v4), pair.port))
    }

    /// What cases need to know.
    pub fn facts(&self, v4: bool) -> Result<Facts> {
        facts(&self.model, v4)
    }

    pub fn down(mut self) -> Result<()> {
        self.pods.clear();
        self.cluster.down()
    }
}

/// What cases need to know of a model.
pub fn facts(model: &Model, v4: bool) -> Result<Facts> {
    let of = |namespace: &str, pod: &str| {
        let name = super::case::name(namespace, pod);
        let pod = model.pods.get(&name).context("no such pod")?;
        address(pod, v4)
    };
    Ok(Facts {
        v4,
        xb: of("x", "b")?,
        yb: of("y", "b")?,
        zc: of("z", "c")?,
    })
}

/// A pod's Service, of both families at all ports.
fn service(pod: &Name) -> Value {
    let ports = PORTS.into_iter().flat_map(|port| {
        PROTOCOLS.map(|protocol| {
            let protocol = word(protocol);
            let name = format!("{}-{port}", protocol.to_lowercase());
            json!({"name": name, "port": port, "protocol": protocol})
        })
    });
    json!({
        "apiVersion": "v1",
        "kind": "Service",
        "metadata": {"namespace": pod.0, "name": pod.1},
        "spec": {
            "selector": {"served-as": pod.1},
            "ipFamilyPolicy": "RequireDualStack",
            "ports": ports.collect::<Vec<_>>(),
        },
    })
}

/// A merge patch from some labels to others.
fn relabelled(before: &Value, after: &Value) -> Value {
    let of = |object: &Value| -> Labels {
        serde_json::from_value(object["metadata"]["labels"].clone()).unwrap_or_default()
    };
    let (before, after) = (of(before), of(after));
    let mut labels = json!(after);
    for gone in before.keys().filter(|key| !after.contains_key(*key)) {
        labels[gone] = Value::Null;
    }
    json!({"metadata": {"labels": labels}})
}
