//! The cluster as it should be: objects that actions change, and who may reach whom by them.

use std::collections::BTreeMap;
use std::net::IpAddr;

use anyhow::{Context, Result, ensure};
use serde_json::{Value, json};
use xebec_policy_oracle::{Cluster, End, Packet, Protocol, judge};
use xebec_tests::api::demo_pod;

use super::case::{Action, Expected, Labels};
use super::{NAMESPACES, Name, PODS, PORTS};

/// The protocols that ports have.
pub const PROTOCOLS: [Protocol; 3] = [Protocol::Tcp, Protocol::Udp, Protocol::Sctp];

/// The objects.
#[derive(Clone, Default)]
pub struct Model {
    pub namespaces: BTreeMap<String, Value>,
    pub pods: BTreeMap<Name, Value>,
    pub policies: BTreeMap<Name, Value>,
    pub nodes: Vec<Value>,
}

/// Who is asked by whom, and where.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Pair {
    pub from: Name,
    pub to: Name,
    pub v4: bool,
    pub protocol: Protocol,
    pub port: u16,
}

/// A word for a protocol.
pub fn word(protocol: Protocol) -> &'static str {
    match protocol {
        Protocol::Tcp => "TCP",
        Protocol::Udp => "UDP",
        Protocol::Sctp => "SCTP",
        Protocol::Icmp => "ICMP",
    }
}

/// A namespace. The API adds the label with its name.
pub fn namespace(name: &str, labels: &Labels) -> Value {
    let mut labels = labels.clone();
    labels.insert("kubernetes.io/metadata.name".to_owned(), name.to_owned());
    json!({
        "apiVersion": "v1",
        "kind": "Namespace",
        "metadata": {"name": name, "labels": labels},
    })
}

/// A pod's labels: those that cases speak of, and one by which its Service finds it.
pub fn pod_labels(pod: &Name, labels: &Labels) -> Labels {
    let mut labels = labels.clone();
    labels.insert("served-as".to_owned(), pod.1.clone());
    labels
}

/// A pod on a node, with names for its ports.
pub fn pod(name: &Name, labels: &Labels, node: &str) -> Value {
    let port = |protocol: Protocol, number: u16| {
        let protocol = word(protocol);
        let name = format!("serve-{number}-{}", protocol.to_lowercase());
        json!({"name": name, "containerPort": number, "protocol": protocol})
    };
    let ports = PORTS
        .into_iter()
        .flat_map(|number| PROTOCOLS.map(|protocol| port(protocol, number)));
    let mut pod = demo_pod(&name.0, &name.1, node, &json!(pod_labels(name, labels)));
    pod["spec"]["containers"][0]["ports"] = ports.collect();
    pod
}

/// A pod's labels where no case has changed them.
pub fn own_labels(pod: &Name) -> Labels {
    super::case::labels(&[("pod", &pod.1)])
}

/// All pods that are there from the beginning to the end, and their nodes.
pub fn standing() -> Vec<(Name, &'static str)> {
    let names = NAMESPACES
        .into_iter()
        .flat_map(|namespace| PODS.map(|pod| super::case::name(namespace, pod)));
    let nodes = ["node1", "node2"].into_iter().cycle();
    names.zip(nodes).collect()
}

/// A pod's address of a family.
pub fn address(pod: &Value, v4: bool) -> Result<IpAddr> {
    let all = pod["status"]["podIPs"].as_array().into_iter().flatten();
    let mut all = all.filter_map(|one| one["ip"].as_str()?.parse::<IpAddr>().ok());
    let found = all.find(|one| one.is_ipv4() == v4);
    found.with_context(|| format!("{} lacks an address", pod["metadata"]["name"]))
}

impl Model {
    /// One whose pods run nowhere.
    pub fn made_up() -> Self {
        let mut model = Self::default();
        for name in NAMESPACES {
            let labels = super::case::labels(&[("ns", name)]);
            model
                .namespaces
                .insert(name.to_owned(), namespace(name, &labels));
        }
        for (at, (name, node)) in standing().into_iter().enumerate() {
            let mut pod = pod(&name, &own_labels(&name), node);
            let (four, six) = (format!("10.244.{}.{}", at % 2, at + 2), at + 2);
            let six = format!("fd00:10:244:{:x}::{six:x}", at % 2);
            pod["status"] = json!({"phase": "Running", "podIPs": [{"ip": four}, {"ip": six}]});
            model.pods.insert(name, pod);
        }
        model
    }

    /// Takes note of what an action does. A pod that it creates comes here when it has addresses.
    pub fn apply(&mut self, action: &Action) -> Result<()> {
        let object_name = |object: &Value| -> Result<Name> {
            let text = |field: &str| object["metadata"][field].as_str().map(str::to_owned);
            let names = text("namespace").zip(text("name"));
            names.context("a nameless object")
        };
        match action {
            Action::Create(policy) | Action::Update(policy) => {
                let before = self.policies.insert(object_name(policy)?, policy.clone());
                let update = matches!(action, Action::Update(_));
                ensure!(before.is_some() == update, "{policy} is there: {before:?}");
            }
            Action::Delete(name) => {
                let gone = self.policies.remove(name);
                gone.with_context(|| format!("no policy {name:?}"))?;
            }
            Action::CreateNamespace(name, labels) | Action::LabelNamespace(name, labels) => {
                self.namespaces
                    .insert(name.clone(), namespace(name, labels));
            }
            Action::DeleteNamespace(name) => {
                self.namespaces.remove(name);
                self.pods.retain(|pod, _| pod.0 != *name);
                self.policies.retain(|policy, _| policy.0 != *name);
            }
            Action::CreatePod(..) => {}
            Action::LabelPod(name, labels) => {
                let pod = self.pods.get_mut(name).context("no such pod")?;
                pod["metadata"]["labels"] = json!(pod_labels(name, labels));
            }
            Action::DeletePod(name) => drop(self.pods.remove(name)),
        }
        Ok(())
    }

    /// Who should be asked, and whether they should answer.
    pub fn expect(
        &self,
        expected: &Expected,
        family: Option<bool>,
    ) -> Result<BTreeMap<Pair, bool>> {
        let cluster = self.cluster();
        let mut all = BTreeMap::new();
        let mut add = |protocol, port, lines: Option<&[&str]>| -> Result<()> {
            // What is written down about addresses of one family is not said of the other.
            let families = [true, false]
                .into_iter()
                .filter(|v4| lines.is_none() || family.is_none_or(|family| family == *v4));
            for v4 in families {
                for pair in self.pairs(v4, protocol, port) {
                    let allowed = match lines {
                        Some(lines) => stated(lines, &pair)?,
                        None => self.judged(&cluster, &pair)?,
                    };
                    all.insert(pair, allowed);
                }
            }
            Ok(())
        };
        match expected {
            Expected::Judged(Some((protocol, port))) => add(*protocol, *port, None)?,
            Expected::Judged(None) => {
                for protocol in PROTOCOLS {
                    for port in PORTS {
                        add(protocol, port, None)?;
                    }
                }
            }
            Expected::Stated(ports) => {
                for (protocol, port, lines) in ports {
                    add(*protocol, *port, Some(lines))?;
                }
            }
        }
        Ok(all)
    }

    /// All pods with all others: nobody is kept from oneself.
    fn pairs(&self, v4: bool, protocol: Protocol, port: u16) -> Vec<Pair> {
        let pair = |from: &Name, to: &Name| Pair {
            from: from.clone(),
            to: to.clone(),
            v4,
            protocol,
            port,
        };
        let to_all = |from| self.pods.keys().map(move |to| pair(from, to));
        let all = self.pods.keys().flat_map(to_all);
        all.filter(|pair| pair.from != pair.to).collect()
    }

    /// As the evaluator takes it.
    pub fn cluster(&self) -> Cluster {
        let all = |objects: &BTreeMap<_, Value>| objects.values().cloned().collect();
        Cluster {
            namespaces: self.namespaces.values().cloned().collect(),
            pods: all(&self.pods),
            nodes: self.nodes.clone(),
            policies: all(&self.policies),
            ..Cluster::default()
        }
    }

    /// What the evaluator says.
    pub fn judged(&self, cluster: &Cluster, pair: &Pair) -> Result<bool> {
        let side = |name: &Name| -> Result<(End, IpAddr)> {
            let end = End::Pod {
                namespace: name.0.clone(),
                name: name.1.clone(),
            };
            let pod = self.pods.get(name).context("no such pod")?;
            Ok((end, address(pod, pair.v4)?))
        };
        let ((from, from_address), (to, to_address)) = (side(&pair.from)?, side(&pair.to)?);
        let packet = Packet {
            from,
            from_address,
            to,
            to_address,
            protocol: pair.protocol,
            port: pair.port,
        };
        Ok(judge(cluster, &packet).allowed)
    }
}

/// What is written down.
fn stated(lines: &[&str], pair: &Pair) -> Result<bool> {
    let is = |pattern: &str, name: &Name| match pattern.split_once('/') {
        _ if pattern == "*" => true,
        Some((namespace, pod)) => namespace == name.0 && pod == name.1,
        None => pattern == name.0,
    };
    let mut allowed = true;
    for line in lines {
        let (word, who) = line.split_once(' ').context("a line of one word")?;
        let (from, to) = who.split_once('>').context("a line without a pair")?;
        ensure!(word == "yes" || word == "no", "a line with {word:?}");
        if is(from, &pair.from) && is(to, &pair.to) {
            allowed = word == "yes";
        }
    }
    Ok(allowed)
}
