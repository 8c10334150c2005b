//! A kernel that is plain memory, and a node that has it: what the programs ask their maps, asked here.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::net::IpAddr;
use std::sync::{Arc, Mutex};

use anyhow::{Result, ensure};
use ipnet::IpNet;
use serde_json::Value;
use xebec_dataplane_common::policy::{
    ALLOW, Chain, Chains, DENY, Decision, IDENTITY_HELD, IDENTITY_WORLD, NO_SHAPE, RuleKey,
    SET_DENIES, SET_FIRST, SHAPE_CLASS, SHAPE_IDENTITY, SHAPE_PORT, SHAPE_PROTOCOL, Set,
    VERDICT_ACTION, port_bits,
};
use xebec_policy::domains::{self, Told};
use xebec_policy::engine::Engine;
use xebec_policy::kernel::{Endpoint, PolicyKernel, Room};
use xebec_policy::kind::{Kind, Relevant};
use xebec_policy::names::Names;
use xebec_policy::rule::{Name, Source};
use xebec_policy::selector::Labels;
use xebec_policy::services::ServiceView;
use xebec_policy_oracle::{Cluster, End, Packet, Protocol};

/// The kernel's maps.
pub struct Plain {
    pub endpoints: HashMap<IpAddr, Endpoint>,
    /// The node's own sets.
    pub host: Chains,
    pub identities: HashMap<IpAddr, u32>,
    pub rules: HashMap<RuleKey, Decision>,
    pub blocks: BTreeMap<(u32, IpNet), u32>,
    pub sets: HashMap<u32, Set>,
    pub generation: u32,
    pub room: Room,
    /// How many entries were written.
    pub written: usize,
    /// Whether endpoints can't be removed.
    pub keeps_endpoints: bool,
}

#[derive(Clone)]
pub struct Kernel(Arc<Mutex<Plain>>);

impl Kernel {
    pub fn new() -> Self {
        Self(Arc::new(Mutex::new(Plain {
            endpoints: HashMap::new(),
            host: Chains::default(),
            identities: HashMap::new(),
            rules: HashMap::new(),
            blocks: BTreeMap::new(),
            sets: HashMap::new(),
            generation: 0,
            room: Room {
                rules: 1 << 20,
                blocks: 1 << 20,
                sets: 1 << 20,
            },
            written: 0,
            keeps_endpoints: false,
        })))
    }

    pub fn with<T>(&self, look: impl FnOnce(&mut Plain) -> T) -> T {
        look(&mut self.0.lock().unwrap())
    }
}

fn chains(chains: &Chains) -> [Chain; 4] {
    [
        chains.ingress,
        chains.egress,
        chains.ingress_audit,
        chains.egress_audit,
    ]
}

impl PolicyKernel for Kernel {
    fn room(&self) -> Room {
        self.with(|plain| plain.room)
    }

    fn set_endpoint(&mut self, address: IpAddr, endpoint: Endpoint) -> Result<()> {
        self.with(|plain| {
            for set in chains(&endpoint.chains).as_flattened() {
                let there = *set == 0 || plain.sets.contains_key(set);
                assert!(there, "set {set} is not in force");
            }
            plain.endpoints.insert(address, endpoint);
        });
        Ok(())
    }

    fn set_host(&mut self, own: Chains) -> Result<()> {
        self.with(|plain| {
            for set in chains(&own).as_flattened() {
                let there = *set == 0 || plain.sets.contains_key(set);
                assert!(there, "set {set} is not in force");
            }
            plain.host = own;
        });
        Ok(())
    }

    fn remove_endpoint(&mut self, address: IpAddr) -> Result<()> {
        self.with(|plain| {
            ensure!(!plain.keeps_endpoints, "endpoints stay");
            plain.endpoints.remove(&address);
            Ok(())
        })
    }

    fn set_identity(&mut self, address: IpAddr, identity: u32) -> Result<()> {
        self.with(|plain| plain.identities.insert(address, identity));
        Ok(())
    }

    fn remove_identity(&mut self, address: IpAddr) -> Result<()> {
        self.with(|plain| plain.identities.remove(&address));
        Ok(())
    }

    fn set_rules(&mut self, rules: &[(RuleKey, Decision)]) -> Result<()> {
        self.with(|plain| {
            for (key, decision) in rules {
                let full = plain.rules.len() >= plain.room.rules;
                assert!(
                    !full || plain.rules.contains_key(key),
                    "it was known how many rules there is room for"
                );
                // Pods that are judged by a set must not see it change, but for peers that nobody has met.
                let known = plain.identities.values().any(|one| *one == key.peer);
                assert!(
                    !plain.sets.contains_key(&key.set) || !known || key.shape & SHAPE_CLASS != 0,
                    "set {} was in force when it got {key:?}",
                    key.set
                );
                plain.rules.insert(*key, *decision);
                plain.written += 1;
            }
            Ok(())
        })
    }

    fn remove_rules(&mut self, rules: &[RuleKey]) -> Result<()> {
        self.with(|plain| {
            rules.iter().for_each(|key| {
                plain.rules.remove(key);
            })
        });
        Ok(())
    }

    fn set_block(&mut self, set: u32, block: IpNet, class: u32) -> Result<()> {
        self.with(|plain| {
            ensure!(plain.blocks.len() < plain.room.blocks, "no room for blocks");
            plain.blocks.insert((set, block), class);
            Ok(())
        })
    }

    fn remove_block(&mut self, set: u32, block: IpNet) -> Result<()> {
        self.with(|plain| plain.blocks.remove(&(set, block)));
        Ok(())
    }

    fn set_set(&mut self, set: u32, value: Set) -> Result<()> {
        self.with(|plain| plain.sets.insert(set, value));
        Ok(())
    }

    fn remove_set(&mut self, set: u32) -> Result<()> {
        self.with(|plain| {
            for (address, endpoint) in &plain.endpoints {
                let used = chains(&endpoint.chains).as_flattened().contains(&set);
                assert!(!used, "{address} is under set {set} that goes");
            }
            plain.sets.remove(&set);
        });
        Ok(())
    }

    fn set_generation(&mut self, generation: u32) -> Result<()> {
        self.with(|plain| plain.generation = generation);
        Ok(())
    }
}

/// What is asked of a chain.
#[derive(Clone, Copy)]
pub struct Asked {
    pub address: IpAddr,
    pub identity: u32,
    pub protocol: u8,
    pub port: u16,
}

impl Plain {
    /// Whether a chain lets it through, and by which rule.
    fn judge(&self, chain: Chain, asked: Asked) -> (bool, u32) {
        let [first, wide, network, last] = chain;
        for tier in [&[first][..], &[wide, network], &[last]] {
            let sets: Vec<u32> = tier.iter().copied().filter(|set| *set != 0).collect();
            if asked.identity == IDENTITY_HELD && !sets.is_empty() {
                return (false, 0);
            }
            let found = sets.iter();
            let found = found.filter_map(|set| self.decide(*set, &self.sets[set], asked));
            let denies = sets
                .iter()
                .any(|set| self.sets[set].flags & SET_DENIES != 0);
            match found.min_by_key(|found| found.verdict) {
                Some(found) if found.verdict & VERDICT_ACTION == ALLOW => {
                    return (true, found.rule);
                }
                Some(found) if found.verdict & VERDICT_ACTION == DENY => {
                    return (false, found.rule);
                }
                Some(_) => {}
                None if denies => return (false, 0),
                None => {}
            }
        }
        (true, 0)
    }

    fn decide(&self, set: u32, value: &Set, asked: Asked) -> Option<Decision> {
        let class = self
            .blocks
            .iter()
            .filter(|((of, block), _)| *of == set && block.contains(&asked.address))
            .max_by_key(|((_, block), _)| block.prefix_len())
            .map_or(0, |(_, class)| *class);
        let mut best: Option<Decision> = None;
        for shape in value.shapes {
            if shape == NO_SHAPE {
                break;
            }
            let peer = match (shape & SHAPE_IDENTITY != 0, shape & SHAPE_CLASS != 0) {
                (false, false) => 0,
                (true, false) => asked.identity,
                (outside, true) => {
                    if class == 0 || outside && asked.identity != IDENTITY_WORLD {
                        continue;
                    }
                    class
                }
            };
            let protocol = match shape & SHAPE_PROTOCOL {
                0 => 0,
                _ => asked.protocol,
            };
            let port = port_bits(asked.port.to_be(), shape & SHAPE_PORT);
            let key = RuleKey {
                set,
                peer,
                port,
                protocol,
                shape,
            };
            if let Some(found) = self.rules.get(&key) {
                if best.is_none_or(|best| found.verdict < best.verdict) {
                    best = Some(*found);
                }
                if value.flags & SET_FIRST != 0 {
                    break;
                }
            }
        }
        best
    }
}

/// A node: its engine, its kernel, and the pods that it has connected.
pub struct Node {
    pub name: String,
    pub engine: Engine<Kernel>,
    pub kernel: Kernel,
    pub names: Names,
    connected: BTreeMap<IpAddr, Name>,
}

fn text(value: &Value, path: &str) -> String {
    value
        .pointer(path)
        .and_then(Value::as_str)
        .unwrap_or_default()
        .to_owned()
}

fn name_of(object: &Value) -> Name {
    (
        text(object, "/metadata/namespace"),
        text(object, "/metadata/name"),
    )
}

fn labels_of(object: &Value) -> Labels {
    let labels = object.pointer("/metadata/labels").cloned();
    serde_json::from_value(labels.unwrap_or_default()).unwrap_or_default()
}

pub fn addresses_of(pod: &Value) -> Vec<IpAddr> {
    let all = pod.pointer("/status/podIPs").and_then(Value::as_array);
    let all = all.into_iter().flatten();
    all.map(|one| one["ip"].as_str().unwrap().parse().unwrap())
        .collect()
}

pub fn number(protocol: Protocol, v4: bool) -> u8 {
    match protocol {
        Protocol::Tcp => 6,
        Protocol::Udp => 17,
        Protocol::Sctp => 132,
        Protocol::Icmp if v4 => 1,
        Protocol::Icmp => 58,
    }
}

/// The kind of an object.
pub fn source(object: &Value) -> Source {
    let (api, kind) = (text(object, "/apiVersion"), text(object, "/kind"));
    Source::of(&api, &kind).unwrap_or_else(|| panic!("{api} {kind} is no policy"))
}

impl Node {
    pub fn new(name: &str, hash: fn(&Kind) -> u32) -> Self {
        let (kernel, names) = (Kernel::new(), Names::default());
        let engine = Engine::new(kernel.clone(), names.clone(), name, 1).with_hash(hash);
        Self {
            name: name.to_owned(),
            engine,
            kernel,
            names,
            connected: BTreeMap::new(),
        }
    }

    /// One on which only labels with these beginnings count.
    pub fn with_labels(name: &str, labels: &[&str]) -> Self {
        let mut node = Self::new(name, Kind::hash);
        let engine = Engine::new(node.kernel.clone(), node.names.clone(), name, 1);
        node.engine = engine.with_labels(Relevant::read(labels.iter().copied()).unwrap());
        node
    }

    /// Whether a pod runs here, in a network of its own.
    fn has(&self, pod: &Value) -> bool {
        let host = pod.pointer("/spec/hostNetwork") == Some(&Value::Bool(true));
        let phase = text(pod, "/status/phase");
        let ended = phase == "Succeeded" || phase == "Failed";
        text(pod, "/spec/nodeName") == self.name && !host && !ended
    }

    /// Tells the engine of the cluster as it is now; `order` begins somewhere else each time.
    pub fn learn(&mut self, cluster: &Cluster, order: usize) {
        let names: BTreeSet<String> = cluster
            .namespaces
            .iter()
            .map(|one| name_of(one).1)
            .collect();
        for step in 0..3 {
            match (step + order) % 3 {
                0 => {
                    for one in &cluster.namespaces {
                        self.engine
                            .set_namespace(&name_of(one).1, Some(labels_of(one)));
                    }
                    let gone = self.engine.known().0.into_iter();
                    for name in gone.filter(|name| !names.contains(name)) {
                        self.engine.set_namespace(&name, None);
                    }
                }
                1 => self.learn_pods(cluster),
                _ => self.learn_policies(cluster),
            }
        }
        for one in &cluster.nodes {
            let all = one.pointer("/status/addresses").and_then(Value::as_array);
            let own = all
                .into_iter()
                .flatten()
                .filter(|one| one["type"] == "InternalIP");
            let own = own.map(|one| one["address"].as_str().unwrap().parse().unwrap());
            let labels = labels_of(one);
            self.engine.set_node(&name_of(one).1, labels, own.collect());
        }
        let gone = self.engine.known().1.into_iter();
        for name in gone.filter(|name| !cluster.nodes.iter().any(|one| name_of(one).1 == *name)) {
            self.engine.set_node(&name, Labels::new(), Vec::new());
        }
        self.learn_services(cluster);
        self.engine.refresh().unwrap();
        self.connect(cluster);
        for one in &cluster.answers {
            let told = Told {
                address: one.address,
                until: one.until,
            };
            self.engine.learn(&domains::plain(&one.name), &[told]);
        }
        self.engine.expire_domains(cluster.now, |_| false);
        self.engine.refresh().unwrap();
    }

    fn learn_pods(&mut self, cluster: &Cluster) {
        for pod in &cluster.pods {
            let pod = serde_json::from_value(pod.clone()).unwrap();
            self.engine.set_pod(&pod);
        }
        let there: BTreeSet<Name> = cluster.pods.iter().map(name_of).collect();
        for name in self.engine.pod_names() {
            if !there.contains(&name) {
                self.engine.remove_pod(&name);
            }
        }
    }

    fn learn_services(&mut self, cluster: &Cluster) {
        for one in &cluster.services {
            let selector = one.pointer("/spec/selector").cloned();
            let view = ServiceView {
                labels: labels_of(one),
                selector: serde_json::from_value(selector.unwrap_or_default()).unwrap_or_default(),
            };
            self.engine.set_service(&name_of(one), Some(view));
        }
        for one in &cluster.slices {
            let (namespace, name) = name_of(one);
            let service = labels_of(one)["kubernetes.io/service-name"].clone();
            let all = one.pointer("/endpoints/0/addresses").unwrap();
            let all = all.as_array().unwrap().iter();
            let addresses = all.map(|one| one.as_str().unwrap().parse().unwrap());
            let slice = ((namespace.clone(), service), addresses.collect());
            self.engine
                .set_service_slice(&(namespace, name), Some(slice));
        }
        let [services, slices] = self.engine.known_services();
        let there = |all: &[Value], name: &Name| all.iter().any(|one| name_of(one) == *name);
        for name in services
            .iter()
            .filter(|name| !there(&cluster.services, name))
        {
            self.engine.set_service(name, None);
        }
        for name in slices.iter().filter(|name| !there(&cluster.slices, name)) {
            self.engine.set_service_slice(name, None);
        }
    }

    fn learn_policies(&mut self, cluster: &Cluster) {
        let mut there = BTreeSet::new();
        for object in &cluster.policies {
            let id = self.engine.set_object(source(object), object);
            assert_eq!(self.engine.errors().get(&id), None, "{object:#}");
            there.insert(id);
        }
        for source in Source::ALL {
            for gone in self.engine.ids_of(source).difference(&there) {
                self.engine.remove_object(gone);
            }
        }
    }

    /// Connects the pods that are here now, and lets the others go.
    fn connect(&mut self, cluster: &Cluster) {
        let here: BTreeMap<IpAddr, Name> = cluster
            .pods
            .iter()
            .filter(|pod| self.has(pod))
            .flat_map(|pod| addresses_of(pod).into_iter().map(|ip| (ip, name_of(pod))))
            .collect();
        for (address, pod) in std::mem::take(&mut self.connected) {
            if here.get(&address) != Some(&pod) {
                self.engine.disconnect(address).unwrap();
            } else {
                self.connected.insert(address, pod);
            }
        }
        for (address, pod) in here {
            if self.connected.insert(address, pod.clone()).is_none() {
                self.engine.connect(&pod, address, 7, [2; 6]).unwrap();
            }
        }
        self.engine.refresh().unwrap();
    }

    /// Removes what no program knows any more.
    pub fn sweep(&mut self) {
        let retired = self.engine.retired();
        self.engine.sweep(&retired).unwrap();
    }

    /// What one side of a flow says by the kernel's maps: whether it lets it through, and the number of the rule.
    pub fn judge(&self, side: &Side<'_>, packet: &Packet) -> (bool, u32) {
        self.judge_by(side, packet, |chains, ingress| match ingress {
            true => chains.ingress,
            false => chains.egress,
        })
    }

    /// What it would say, were no policy in audit mode.
    pub fn judge_audit(&self, side: &Side<'_>, packet: &Packet) -> (bool, u32) {
        self.judge_by(side, packet, |chains, ingress| {
            let (audit, enforced) = match ingress {
                true => (chains.ingress_audit, chains.ingress),
                false => (chains.egress_audit, chains.egress),
            };
            if audit == Chain::default() {
                enforced
            } else {
                audit
            }
        })
    }

    fn judge_by(
        &self,
        side: &Side<'_>,
        packet: &Packet,
        chain: impl Fn(&Chains, bool) -> Chain,
    ) -> (bool, u32) {
        self.kernel.with(|plain| {
            let endpoint = plain.endpoints.get(&side.own_address);
            let chains = match endpoint {
                Some(endpoint) => endpoint.chains,
                None if side.is_node => plain.host,
                None => return (true, 0),
            };
            let identity = plain.identities.get(&side.peer_address).copied();
            let asked = Asked {
                address: side.peer_address,
                identity: identity.unwrap_or(IDENTITY_WORLD),
                protocol: number(packet.protocol, side.own_address.is_ipv4()),
                port: packet.port,
            };
            plain.judge(chain(&chains, side.ingress), asked)
        })
    }
}

/// A side of a flow that the programs judge.
pub struct Side<'a> {
    /// The node that does.
    pub home: String,
    pub ingress: bool,
    /// Whose policies are asked.
    pub own: &'a End,
    pub own_address: IpAddr,
    pub peer_address: IpAddr,
    /// Whether it is the node itself.
    pub is_node: bool,
}

/// The sides of a packet that are judged.
pub fn sides<'a>(cluster: &Cluster, packet: &'a Packet) -> Vec<Side<'a>> {
    let (from, to) = (
        (&packet.from, packet.from_address),
        (&packet.to, packet.to_address),
    );
    // What a pod sends to itself leaves it not.
    let ways = match packet.from == packet.to {
        true => vec![],
        false => vec![(false, from, to), (true, to, from)],
    };
    let judged = ways.into_iter().filter_map(|(ingress, own, peer)| {
        let home = node_of(cluster, own.0)?;
        let is_node = pod_of(cluster, own.0).is_none();
        let peer_is_node = pod_of(cluster, peer.0).is_none();
        // The programs know a packet of the node to its pods by the device that it comes by, and what the node sends to
        // itself meets none.
        let near = node_of(cluster, peer.0).as_ref() == Some(&home);
        let always = match (is_node, peer_is_node) {
            (true, true) => near,
            (true, false) => near && !ingress,
            (false, true) => near && ingress,
            (false, false) => false,
        };
        (!always).then_some(Side {
            home,
            ingress,
            own: own.0,
            own_address: own.1,
            peer_address: peer.1,
            is_node,
        })
    });
    judged.collect()
}

/// The pod of an end, if it has a network of its own.
pub fn pod_of<'a>(cluster: &'a Cluster, end: &End) -> Option<&'a Value> {
    let End::Pod { namespace, name } = end else {
        return None;
    };
    let mut pods = cluster.pods.iter();
    pods.find(|pod| name_of(pod) == (namespace.clone(), name.clone()))
        .filter(|pod| pod.pointer("/spec/hostNetwork") != Some(&Value::Bool(true)))
}

/// The node that a pod runs on, or that an end is.
pub fn node_of(cluster: &Cluster, end: &End) -> Option<String> {
    match end {
        End::Node(name) => Some(name.clone()),
        End::Pod { namespace, name } => {
            let mut pods = cluster.pods.iter();
            pods.find(|pod| name_of(pod) == (namespace.clone(), name.clone()))
                .map(|pod| text(pod, "/spec/nodeName"))
        }
        End::Address => None,
    }
}
