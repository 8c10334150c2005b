//! Policies in few words.

use std::net::IpAddr;

use serde_json::{Value, json};

use super::case::Action;

/// Selects everything.
pub fn all() -> Value {
    json!({})
}

/// Selects what has this label.
pub fn with(key: &str, value: &str) -> Value {
    json!({"matchLabels": {key: value}})
}

/// Selects pods of this name.
pub fn pod(name: &str) -> Value {
    with("pod", name)
}

/// Selects by one expression.
pub fn expression(key: &str, operator: &str, values: &[&str]) -> Value {
    json!({"matchExpressions": [{"key": key, "operator": operator, "values": values}]})
}

/// Selects what has one of these values.
pub fn one_of(key: &str, values: &[&str]) -> Value {
    expression(key, "In", values)
}

/// Selects what has none of these values.
pub fn none_of(key: &str, values: &[&str]) -> Value {
    expression(key, "NotIn", values)
}

/// A peer: pods of the policy's own namespace.
pub fn pods(selector: Value) -> Value {
    json!({"podSelector": selector})
}

/// A peer: all pods of some namespaces.
pub fn namespaces(selector: Value) -> Value {
    json!({"namespaceSelector": selector})
}

/// A peer: some pods of some namespaces.
pub fn pods_of(namespaces: Value, pods: Value) -> Value {
    json!({"namespaceSelector": namespaces, "podSelector": pods})
}

/// A peer: a block of addresses, without some.
pub fn block(cidr: &str, except: &[String]) -> Value {
    match except {
        [] => json!({"ipBlock": {"cidr": cidr}}),
        _ => json!({"ipBlock": {"cidr": cidr, "except": except}}),
    }
}

/// The block around an address in which so many last bits are free.
pub fn around(address: IpAddr, free: u32) -> String {
    match address {
        IpAddr::V4(address) => {
            let mask = u32::MAX.checked_shl(free).unwrap_or(0);
            let first = std::net::Ipv4Addr::from(u32::from(address) & mask);
            format!("{first}/{}", 32 - free)
        }
        IpAddr::V6(address) => {
            let mask = u128::MAX.checked_shl(free).unwrap_or(0);
            let first = std::net::Ipv6Addr::from(u128::from(address) & mask);
            format!("{first}/{}", 128 - free)
        }
    }
}

/// The block of all addresses but so many first bits.
pub fn wide(address: IpAddr, fixed: u32) -> String {
    let bits = if address.is_ipv4() { 32 } else { 128 };
    around(address, bits - fixed)
}

/// A port of TCP by its number or name.
pub fn port(port: impl Into<Value>) -> Value {
    json!({"port": port.into()})
}

/// A port with its protocol.
pub fn port_of(protocol: &str, port: impl Into<Value>) -> Value {
    json!({"protocol": protocol, "port": port.into()})
}

/// All ports of a protocol.
pub fn protocol(protocol: &str) -> Value {
    json!({"protocol": protocol})
}

/// A rule; what is `None` is not in it.
#[derive(Clone, Debug, Default)]
pub struct Rule {
    pub peers: Option<Vec<Value>>,
    pub ports: Option<Vec<Value>>,
}

impl Rule {
    /// One that allows everything.
    pub fn any() -> Self {
        Self::default()
    }

    /// One for peers at all ports.
    pub fn peers(peers: impl IntoIterator<Item = Value>) -> Self {
        Self {
            peers: Some(peers.into_iter().collect()),
            ports: None,
        }
    }

    /// One for everybody at some ports.
    pub fn ports(ports: impl IntoIterator<Item = Value>) -> Self {
        Self::any().at(ports)
    }

    /// The same at some ports.
    #[must_use]
    pub fn at(mut self, ports: impl IntoIterator<Item = Value>) -> Self {
        self.ports = Some(ports.into_iter().collect());
        self
    }

    fn object(&self, peers: &str) -> Value {
        let mut rule = json!({});
        if let Some(all) = &self.peers {
            rule[peers] = json!(all);
        }
        if let Some(all) = &self.ports {
            rule["ports"] = json!(all);
        }
        rule
    }
}

/// A policy: `None` for a direction in which it isolates nobody.
#[derive(Clone, Debug)]
pub struct Policy {
    pub namespace: String,
    pub name: String,
    pub pods: Value,
    pub ingress: Option<Vec<Rule>>,
    pub egress: Option<Vec<Rule>>,
}

impl Policy {
    /// One that says nothing yet.
    pub fn new(namespace: &str, name: &str, pods: Value) -> Self {
        Self {
            namespace: namespace.to_owned(),
            name: name.to_owned(),
            pods,
            ingress: None,
            egress: None,
        }
    }

    /// Allows to come in what these allow.
    #[must_use]
    pub fn ingress(mut self, rules: impl IntoIterator<Item = Rule>) -> Self {
        self.ingress = Some(rules.into_iter().collect());
        self
    }

    /// Allows to go out what these allow.
    #[must_use]
    pub fn egress(mut self, rules: impl IntoIterator<Item = Rule>) -> Self {
        self.egress = Some(rules.into_iter().collect());
        self
    }

    /// The first rule of a direction.
    pub fn first(&mut self, ingress: bool) -> &mut Rule {
        let rules = match ingress {
            true => &mut self.ingress,
            false => &mut self.egress,
        };
        let rules = rules.get_or_insert_default();
        if rules.is_empty() {
            rules.push(Rule::any());
        }
        &mut rules[0]
    }

    /// As the API takes it.
    pub fn object(&self) -> Value {
        let mut spec = json!({"podSelector": self.pods, "policyTypes": []});
        for (rules, field, kind, peers) in [
            (&self.ingress, "ingress", "Ingress", "from"),
            (&self.egress, "egress", "Egress", "to"),
        ] {
            if let (Some(rules), Some(types)) = (rules, spec["policyTypes"].as_array_mut()) {
                types.push(json!(kind));
                spec[field] = rules.iter().map(|rule| rule.object(peers)).collect();
            }
        }
        json!({
            "apiVersion": "networking.k8s.io/v1",
            "kind": "NetworkPolicy",
            "metadata": {"name": self.name, "namespace": self.namespace},
            "spec": spec,
        })
    }
}

impl From<Policy> for Action {
    fn from(policy: Policy) -> Self {
        Self::Create(policy.object())
    }
}

/// The policy that most cases vary: `x/a` may be asked by `b` and `c` of x and y, and may ask `a` and `b` of y and z, at
/// port 80 of TCP alone; it may ask for names.
pub fn base() -> Policy {
    let (b_and_c, a_and_b) = (one_of("pod", &["b", "c"]), one_of("pod", &["a", "b"]));
    let names = ["UDP", "TCP"].map(|protocol| port_of(protocol, 53));
    Policy::new("x", "base", pod("a"))
        .ingress([
            Rule::peers([pods_of(one_of("ns", &["x", "y"]), b_and_c)]).at([port_of("TCP", 80)])
        ])
        .egress([
            Rule::peers([pods_of(one_of("ns", &["y", "z"]), a_and_b)]).at([port_of("TCP", 80)]),
            Rule::ports(names),
        ])
}

/// Both directions, by their names.
pub const DIRECTIONS: [(bool, &str); 2] = [(true, "in"), (false, "out")];

/// The base policy with another list of peers in one direction.
pub fn base_with_peers(ingress: bool, peers: Vec<Value>) -> Policy {
    let mut policy = base();
    policy.first(ingress).peers = Some(peers);
    policy
}

/// The base policy with another list of ports in one direction.
pub fn base_with_ports(ingress: bool, ports: Vec<Value>) -> Policy {
    let mut policy = base();
    policy.first(ingress).ports = Some(ports);
    policy
}
