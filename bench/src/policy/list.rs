//! The cluster and the policies of the benchmarks, as data: the API gets them, and so do the generators of other engines'
//! rules.
//!
//! Fifty apps have twenty pods each on other nodes, and the pods of the measured node are dealt out to them. Every policy
//! is for the pods of one app; it lets two apps speak with them over two ports, them with two apps over two ports, and
//! every fifth one a block of addresses with an exception, too. So each app has a fiftieth of the policies, no two
//! policies say the same, and a node with fifty pods and more has sets of rules of all of them.

use std::net::Ipv4Addr;

use ipnet::Ipv4Net;
use serde_json::{Value, json};

use crate::services::{TARGET_PORT, agent, backend};

/// The namespace of all that policies are for.
pub const NAMESPACE: &str = "policed";
/// How many apps there are.
pub const APPS: usize = 50;
/// How many pods each has on other nodes.
const EACH: usize = 20;
/// Every one in so many policies names a block of addresses.
const SELDOM: usize = 5;
/// The pod that answers, on another node.
pub const SERVER: &str = "server";
/// The pod of the first app that asks.
pub const ASKER: &str = "asker";
/// The policy that changes.
pub const MOVING: &str = "moving";
/// The port of UDP that nobody is let through to, while the policy that changes lets through to another.
const CLOSED: u16 = TARGET_PORT - 1;

/// Ports of one protocol.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Ports {
    /// Over UDP, else over TCP.
    pub udp: bool,
    /// Which.
    pub numbers: Vec<u16>,
}

/// Who may speak, or be spoken to.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Peer {
    /// The pods of an app.
    App(String),
    /// A block of addresses without a part of it.
    Block {
        /// The block.
        block: Ipv4Net,
        /// What is left out.
        except: Ipv4Net,
    },
    /// All pods of the cluster.
    Everybody,
}

/// What a policy lets through: any of these peers, over any of these ports.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Rule {
    /// The peers.
    pub peers: Vec<Peer>,
    /// The ports.
    pub ports: Vec<Ports>,
}

/// A NetworkPolicy.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Policy {
    /// Its name.
    pub name: String,
    /// The app that it is for; none for all pods of the namespace.
    pub app: Option<String>,
    /// What may come in, if it has a say in that.
    pub ingress: Option<Vec<Rule>>,
    /// What may go out, if it has a say in that.
    pub egress: Option<Vec<Rule>>,
}

/// What an app is called.
pub fn app(number: usize) -> String {
    format!("a{}", number % APPS)
}

/// What pod number `number` of the measured node is called; it is of the app of this number.
pub fn local(number: usize) -> String {
    format!("l{number}")
}

/// Addresses of an app's pods on other nodes.
pub fn addresses(app: usize) -> Vec<Ipv4Addr> {
    (0..EACH)
        .map(|one| Ipv4Addr::new(10, 245, app as u8, one as u8 + 1))
        .collect()
}

fn tcp(numbers: &[u16]) -> Ports {
    Ports {
        udp: false,
        numbers: numbers.to_vec(),
    }
}

/// Policy number `number`: none is for the pod that asks to speak with the one that answers.
fn policy(number: usize) -> Policy {
    let turn = (number / APPS) as u16;
    let to = |step: usize| Peer::App(app(number * 7 + step));
    let ports = |base: u16| vec![tcp(&[base + 2 * turn, base + 2 * turn + 1])];
    let mut peers = vec![to(1), to(2)];
    if number.is_multiple_of(SELDOM) {
        peers.push(block((number / SELDOM) as u16));
    }
    Policy {
        name: format!("p{number}"),
        app: Some(app(number)),
        ingress: Some(vec![Rule {
            peers,
            ports: ports(20_000),
        }]),
        egress: Some(vec![Rule {
            peers: vec![to(3), to(4)],
            ports: ports(22_000),
        }]),
    }
}

/// Block number `number`, of those that are for benchmarks (RFC 2544), without a quarter.
fn block(number: u16) -> Peer {
    let [high, low] = (number % 512).to_be_bytes();
    let net = |last, bits| Ipv4Net::new_assert(Ipv4Addr::new(198, 18 + high, low, last), bits);
    Peer::Block {
        block: net(0, 24),
        except: net(64, 26),
    }
}

/// So many policies.
pub fn policies(numbers: std::ops::Range<usize>) -> Vec<Policy> {
    numbers.map(policy).collect()
}

/// The policy that lets the pod that asks speak with the one that answers, over TCP always, over UDP while it is `open`.
pub fn moving(open: bool) -> Policy {
    let udp = Ports {
        udp: true,
        numbers: vec![if open { TARGET_PORT } else { CLOSED }],
    };
    Policy {
        name: MOVING.to_owned(),
        app: Some(app(0)),
        ingress: None,
        egress: Some(vec![Rule {
            peers: vec![Peer::App(SERVER.to_owned())],
            ports: vec![tcp(&[TARGET_PORT]), udp],
        }]),
    }
}

/// The policy that lets all pods speak with those of the namespace over one port of UDP.
pub fn switch(port: u16) -> Policy {
    Policy {
        name: "switch".to_owned(),
        app: None,
        ingress: Some(vec![Rule {
            peers: vec![Peer::Everybody],
            ports: vec![Ports {
                udp: true,
                numbers: vec![port],
            }],
        }]),
        egress: None,
    }
}

impl Peer {
    fn object(&self) -> Value {
        match self {
            Self::App(app) => json!({"podSelector": {"matchLabels": {"app": app}}}),
            Self::Block { block, except } => {
                json!({"ipBlock": {"cidr": block, "except": [except]}})
            }
            Self::Everybody => json!({"namespaceSelector": {}}),
        }
    }
}

impl Rule {
    fn object(&self, peers: &str) -> Value {
        let ports = self.ports.iter().flat_map(|ports| {
            let protocol = if ports.udp { "UDP" } else { "TCP" };
            let numbers = ports.numbers.iter();
            numbers.map(move |port| json!({"protocol": protocol, "port": port}))
        });
        json!({
            peers: self.peers.iter().map(Peer::object).collect::<Vec<_>>(),
            "ports": ports.collect::<Vec<_>>(),
        })
    }
}

impl Policy {
    /// As the API takes it.
    pub fn object(&self) -> Value {
        let selector = match &self.app {
            Some(app) => json!({"matchLabels": {"app": app}}),
            None => json!({}),
        };
        let mut spec = json!({"podSelector": selector, "policyTypes": []});
        for (rules, kind, list, peers) in [
            (&self.ingress, "Ingress", "ingress", "from"),
            (&self.egress, "Egress", "egress", "to"),
        ] {
            if let Some(rules) = rules {
                let rules: Vec<Value> = rules.iter().map(|rule| rule.object(peers)).collect();
                spec[list] = rules.into();
                if let Some(kinds) = spec["policyTypes"].as_array_mut() {
                    kinds.push(kind.into());
                }
            }
        }
        json!({
            "apiVersion": "networking.k8s.io/v1", "kind": "NetworkPolicy",
            "metadata": {"namespace": NAMESPACE, "name": self.name},
            "spec": spec,
        })
    }
}

fn pod(name: &str, app: &str, node: &str, address: Option<Ipv4Addr>) -> Value {
    let mut pod = json!({
        "kind": "Pod",
        "metadata": {"namespace": NAMESPACE, "name": name, "labels": {"app": app}},
        "spec": {
            "automountServiceAccountToken": false,
            "nodeName": node,
            "containers": [{"name": "c", "image": "c"}],
        },
    });
    if let Some(address) = address {
        pod["status"] = json!({
            "phase": "Running", "podIP": address, "podIPs": [{"ip": address}],
        });
    }
    pod
}

/// The namespace, the pods of other nodes, the one that answers among them, and so many pods of the measured node besides
/// the one that asks.
pub fn cluster(pods: usize) -> Vec<Value> {
    let mut all = vec![
        json!({"kind": "Namespace", "metadata": {"name": NAMESPACE}}),
        json!({"kind": "ServiceAccount", "metadata": {"namespace": NAMESPACE, "name": "default"}}),
        pod(SERVER, SERVER, "other", Some(backend(2))),
        pod(ASKER, &app(0), agent::NODE, None),
    ];
    for number in 0..APPS {
        for (one, address) in addresses(number).into_iter().enumerate() {
            let name = format!("r{number}-{one}");
            all.push(pod(&name, &app(number), "other", Some(address)));
        }
    }
    all.extend((0..pods).map(|one| pod(&local(one), &app(one), agent::NODE, None)));
    all
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "tests may panic")]
    use std::collections::BTreeSet;

    use k8s_openapi::api::networking::v1::NetworkPolicy;

    use super::*;

    #[test]
    fn policies_are_dealt_out_to_all_apps_and_none_is_there_twice() {
        let all = policies(0..2_500);
        let mut of_apps = std::collections::BTreeMap::<_, usize>::new();
        for one in &all {
            *of_apps.entry(one.app.clone().unwrap()).or_default() += 1;
        }
        assert_eq!(of_apps.len(), APPS);
        assert!(of_apps.values().all(|count| *count == 2_500 / APPS));
        let said: BTreeSet<String> = all
            .iter()
            .map(|one| one.object()["spec"].to_string())
            .collect();
        assert_eq!(said.len(), all.len());
        // Nobody but the policy that changes lets the one pod speak with the other.
        let to_server = |one: &Policy| format!("{:?}", one.egress).contains(SERVER);
        assert!(!all.iter().any(to_server) && to_server(&moving(true)));
        // Ports stay ports.
        assert!(
            all.iter()
                .flat_map(|one| &one.egress)
                .flatten()
                .all(|rule| {
                    rule.ports
                        .iter()
                        .flat_map(|ports| &ports.numbers)
                        .all(|port| (22_000..23_000).contains(port))
                })
        );
    }

    #[test]
    fn objects_are_what_the_api_takes() {
        let all = policies(0..60).into_iter();
        for one in all.chain([moving(true), switch(7_001)]) {
            let object: NetworkPolicy = serde_json::from_value(one.object()).unwrap();
            let spec = object.spec.unwrap();
            let types = usize::from(one.ingress.is_some()) + usize::from(one.egress.is_some());
            assert_eq!(spec.policy_types.unwrap().len(), types);
            assert_eq!(spec.egress.is_some(), one.egress.is_some());
        }
        let (open, closed) = (moving(true), moving(false));
        assert_ne!(open.object()["spec"], closed.object()["spec"]);
        let numbers: BTreeSet<Ipv4Addr> = (0..APPS).flat_map(addresses).collect();
        assert_eq!(numbers.len(), APPS * EACH);
    }
}
