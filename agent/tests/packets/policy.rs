//! Random clusters, their policies and changes, in the maps of the kernel: what the programs make of packets, of flows
//! that begin and of those that go on, is what the objects say. `XEBEC_SEED` repeats a history.

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;
use std::sync::Arc;

use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};
use serde_json::Value;
use xebec_agent::loader::{Loaded, Sizes};
use xebec_agent::maps::{FlowMaps, PolicyMaps};
use xebec_policy::engine::Engine;
use xebec_policy::names::Names;
use xebec_policy::rule::{Name, Source};
use xebec_policy::selector::Labels;
use xebec_policy_oracle::random::{
    Options, change, cluster, packets, seeds, without_names_in_blocks,
};
use xebec_policy_oracle::{Cluster, End, Packet as Question, Protocol, judge};

use super::kernel::test_run;
use super::packet::{ACK, SYN};
use super::{Packet, REDIRECT, SHOT, echo, icmp, sctp, tcp, udp};

/// How many histories.
const HISTORIES: u64 = 30;
/// How many changes each has.
const CHANGES: usize = 20;
/// How many flows begin after each.
const BEGUN: usize = 30;
/// How many go on at most.
const KEPT: usize = 60;
/// The node whose programs these are.
const HERE: &str = "n1";
/// A device by which packets of others come.
const OUTSIDE: u32 = 5;

/// A flow that was let through.
#[derive(Clone)]
struct Flow {
    question: Question,
    first: Packet,
}

struct Node {
    loaded: Loaded,
    engine: Engine<PolicyMaps>,
    flows: FlowMaps,
    names: Names,
    connected: BTreeMap<IpAddr, Name>,
    room: Vec<u8>,
    /// Ports that no flow had yet.
    port: u16,
}

fn text(value: &Value, path: &str) -> String {
    let found = value.pointer(path).and_then(Value::as_str);
    found.unwrap_or_default().to_owned()
}

fn name_of(object: &Value) -> Name {
    let name = text(object, "/metadata/name");
    (text(object, "/metadata/namespace"), name)
}

fn addresses(pod: &Value) -> Vec<IpAddr> {
    let all = pod.pointer("/status/podIPs").and_then(Value::as_array);
    let all = all.into_iter().flatten();
    all.map(|one| one["ip"].as_str().unwrap().parse().unwrap())
        .collect()
}

/// A pod that has a network of its own, and that address.
fn pod_of<'a>(cluster: &'a Cluster, end: &End, address: IpAddr) -> Option<&'a Value> {
    let End::Pod { namespace, name } = end else {
        return None;
    };
    let mut pods = cluster.pods.iter();
    let pod = pods.find(|pod| name_of(pod) == (namespace.clone(), name.clone()))?;
    let ended = matches!(text(pod, "/status/phase").as_str(), "Succeeded" | "Failed");
    let host = pod.pointer("/spec/hostNetwork") == Some(&Value::Bool(true));
    (!ended && !host && addresses(pod).contains(&address)).then_some(pod)
}

fn is_here(pod: &Value) -> bool {
    text(pod, "/spec/nodeName") == HERE
}

/// Whether an end is this node, or a pod of its network.
fn is_node(cluster: &Cluster, end: &End, address: IpAddr) -> bool {
    let mut nodes = cluster.nodes.iter().filter(|node| name_of(node).1 == HERE);
    nodes.any(|node| {
        let all = node.pointer("/status/addresses").and_then(Value::as_array);
        let all = all.into_iter().flatten();
        all.map(|one| text(one, "/address"))
            .any(|own| own == address.to_string())
    }) && !matches!(end, End::Address)
}

impl Node {
    fn new() -> Self {
        let folder = tempfile::tempdir().unwrap();
        let sizes = Sizes {
            flows: 1 << 16,
            ..Sizes::default()
        };
        let mut loaded = Loaded::with_sizes(folder.path(), sizes).unwrap();
        let maps = loaded.maps().unwrap();
        let names = Names::default();
        Self {
            engine: Engine::new(maps.policy, names.clone(), HERE, 1),
            flows: maps.flows,
            loaded,
            names,
            connected: BTreeMap::new(),
            room: vec![0; 2_048],
            port: 10_000,
        }
    }

    /// Tells the engine of the cluster as it is now.
    fn learn(&mut self, cluster: &Cluster) {
        let engine = &mut self.engine;
        for one in &cluster.namespaces {
            let labels = one.pointer("/metadata/labels").cloned().unwrap_or_default();
            engine.set_namespace(
                &name_of(one).1,
                Some(serde_json::from_value(labels).unwrap_or_default()),
            );
        }
        for pod in &cluster.pods {
            engine.set_pod(&serde_json::from_value(pod.clone()).unwrap());
        }
        let there: BTreeSet<Name> = cluster.pods.iter().map(name_of).collect();
        for name in engine.pod_names() {
            if !there.contains(&name) {
                engine.remove_pod(&name);
            }
        }
        let mut ids = BTreeSet::new();
        for policy in &cluster.policies {
            ids.insert(engine.set_object(Source::NetworkPolicy, policy));
        }
        for gone in engine.ids_of(Source::NetworkPolicy).difference(&ids) {
            engine.remove_object(gone);
        }
        for one in &cluster.nodes {
            let all = one.pointer("/status/addresses").and_then(Value::as_array);
            let all = all
                .into_iter()
                .flatten()
                .filter(|one| one["type"] == "InternalIP");
            let all = all.map(|one| text(one, "/address").parse().unwrap());
            engine.set_node(&name_of(one).1, Labels::new(), all.collect());
        }
        engine.refresh().unwrap();
        let here: BTreeMap<IpAddr, Name> = cluster
            .pods
            .iter()
            .flat_map(|pod| addresses(pod).into_iter().map(move |ip| (pod, ip)))
            .filter(|(pod, ip)| {
                let (namespace, name) = name_of(pod);
                is_here(pod) && pod_of(cluster, &End::Pod { namespace, name }, *ip).is_some()
            })
            .map(|(pod, ip)| (ip, name_of(pod)))
            .collect();
        for (address, pod) in std::mem::take(&mut self.connected) {
            if here.get(&address) == Some(&pod) {
                self.connected.insert(address, pod);
            } else {
                engine.disconnect(address).unwrap();
            }
        }
        for (address, pod) in here {
            if self.connected.insert(address, pod.clone()).is_none() {
                engine.connect(&pod, address, 1, [2; 6]).unwrap();
            }
        }
        engine.refresh().unwrap();
        let retired = engine.retired();
        engine.sweep(&retired).unwrap();
    }

    /// Whether a packet is let through by the hook of a pod; `received` is the device by which it came, or 0.
    fn passes(&mut self, program: &str, received: u32, packet: &Packet) -> bool {
        let mut context = [0_u8; 192];
        context[36..40].copy_from_slice(&received.to_ne_bytes());
        context[40..44].copy_from_slice(&1_u32.to_ne_bytes());
        let (verdict, ..) = test_run(
            &mut self.loaded,
            program,
            &context,
            &packet.bytes(),
            &mut self.room,
        )
        .unwrap();
        assert!(verdict == SHOT || verdict == 0 || verdict == REDIRECT);
        verdict != SHOT
    }

    /// The packet of a flow that is new.
    fn first(&mut self, question: &Question) -> Packet {
        self.port += 1;
        let (from, to) = (question.from_address, question.to_address);
        let (own, port) = (self.port, question.port);
        match question.protocol {
            Protocol::Tcp => tcp(from, to, own, port, "S"),
            Protocol::Udp => udp(from, to, own, port),
            Protocol::Sctp => sctp(from, to, own, port, 1),
            Protocol::Icmp => echo(from, to, own),
        }
    }

    /// Whether a packet of a flow, in either direction, is let through where it is judged here; none where it is not.
    fn send(
        &mut self,
        cluster: &Cluster,
        question: &Question,
        packet: &Packet,
        back: bool,
    ) -> Option<bool> {
        let from = pod_of(cluster, &question.from, question.from_address);
        let to = pod_of(cluster, &question.to, question.to_address);
        let (from, to) = (from.is_some_and(is_here), to.is_some_and(is_here));
        let (sender, receiver) = if back { (to, from) } else { (from, to) };
        if sender {
            return Some(self.passes("xebec_from_pod", 0, packet));
        }
        if !receiver {
            return None;
        }
        let (end, address) = match back {
            true => (&question.to, question.to_address),
            false => (&question.from, question.from_address),
        };
        let received = if is_node(cluster, end, address) {
            0
        } else {
            OUTSIDE
        };
        Some(self.passes("xebec_to_pod", received, packet))
    }
}

/// What the objects say of a flow, as far as it is judged here.
fn right(cluster: &Cluster, question: &Question) -> bool {
    let verdict = judge(cluster, question);
    let here = |end, address| pod_of(cluster, end, address).is_some_and(is_here);
    let own = is_node(cluster, &question.from, question.from_address);
    (!here(&question.from, question.from_address) || verdict.egress.allowed)
        && (own || !here(&question.to, question.to_address) || verdict.ingress.allowed)
}

/// Whether both ends have the addresses that the question names.
fn holds(cluster: &Cluster, question: &Question) -> bool {
    let there = |end: &End, address| match end {
        End::Pod { .. } => pod_of(cluster, end, address).is_some(),
        // It may have become a pod's.
        End::Address => !cluster
            .pods
            .iter()
            .any(|pod| addresses(pod).contains(&address)),
        End::Node(_) => true,
    };
    question.from != question.to
        && question.is_in(cluster)
        && there(&question.from, question.from_address)
        && there(&question.to, question.to_address)
}

/// An answer to the first packet of a flow, or a later packet of it.
fn later(flow: &Flow, back: bool, random: &mut StdRng) -> Packet {
    let first = &flow.first;
    match (flow.question.protocol, back) {
        (Protocol::Icmp, true) => {
            let v4 = flow.question.from_address.is_ipv4();
            let kind = if v4 { 0 } else { 129 };
            let (to, from) = (flow.question.from_address, flow.question.to_address);
            // Identifier and number of the request.
            let request = first.bytes();
            let body = &request[first.transport_at() + 4..];
            icmp(from, to, kind, 0, body)
        }
        (Protocol::Tcp, true) if random.random_bool(0.3) => first.back(SYN | ACK),
        (_, true) => first.back(ACK),
        (_, false) => first.flags_if_tcp(ACK),
    }
}

fn history(seed: u64, begun: &mut [usize; 4]) {
    let mut random = StdRng::seed_from_u64(seed);
    let options = Options {
        cilium: false,
        admin: false,
    };
    let mut world = cluster(&mut random, &options);
    let mut node = Node::new();
    let mut flows: Vec<Flow> = Vec::new();
    for step in 0..CHANGES {
        if step > 0 {
            change(&mut random, &mut world);
        }
        without_names_in_blocks(&mut world);
        node.learn(&world);
        // What was let through goes on, or ends, whichever end speaks.
        flows.retain(|flow| holds(&world, &flow.question));
        let mut ended = BTreeSet::new();
        for (at, flow) in flows.iter().enumerate() {
            let back = random.random_bool(0.5);
            let packet = later(flow, back, &mut random);
            let right = right(&world, &flow.question);
            if let Some(passed) = node.send(&world, &flow.question, &packet, back) {
                begun[if passed { 0 } else { 1 }] += 1;
                assert_eq!(
                    passed, right,
                    "seed {seed}, step {step}: {:?} goes on, back is {back}: {packet:?}\n{world:#?}",
                    flow.question
                );
            }
            if !right {
                ended.insert(at);
            }
        }
        let mut at = 0..;
        flows.retain(|_| !ended.contains(&at.next().unwrap()));
        for question in packets(&mut random, &world, BEGUN) {
            if !holds(&world, &question) {
                continue;
            }
            let echo = if question.from_address.is_ipv4() {
                8
            } else {
                128
            };
            let question = match question.protocol {
                Protocol::Icmp => Question {
                    port: echo << 8,
                    ..question
                },
                _ => question,
            };
            while node.flows.next_event().is_some() {}
            let first = node.first(&question);
            let Some(passed) = node.send(&world, &question, &first, false) else {
                continue;
            };
            begun[if passed { 2 } else { 3 }] += 1;
            assert_eq!(
                passed,
                right(&world, &question),
                "seed {seed}, step {step}: {question:?} begins\n{world:#?}"
            );
            let event = std::iter::from_fn(|| node.flows.next_event()).last();
            let rule = event.map_or(0, |event| event.rule);
            let verdict = judge(&world, &question);
            let told = node.names.now().rule(rule).map(Arc::clone);
            let known = told.as_ref().is_none_or(|told| {
                let mut by = verdict.egress.by.iter().chain(&verdict.ingress.by);
                by.any(|one| (&one.name, one.index) == (&told.id.policy.name, told.id.index))
            });
            assert!(known, "seed {seed}, step {step}: {question:?} by {told:?}");
            if passed && flows.len() < KEPT {
                flows.push(Flow { question, first });
            }
        }
    }
}

#[test]
fn policies_do_to_packets_what_the_objects_say() {
    if super::left_out() {
        return;
    }
    let seeds = seeds(HISTORIES);
    let mut counts = [0; 4];
    let several = seeds.end - seeds.start > 1;
    seeds.for_each(|seed| history(seed, &mut counts));
    println!("went on, ended, begun, refused: {counts:?}");
    assert!(!several || counts.iter().all(|count| *count > 100));
}
