//! Who talks to whom, as the page draws it: what flows of the last minutes say together.

use std::collections::{BTreeSet, HashMap, VecDeque};

use serde::Serialize;
use xebec_hubble::event;
use xebec_hubble::flow::layer4::Protocol;
use xebec_hubble::flow::layer7::Record;
use xebec_hubble::flow::{
    DropReason, Endpoint, Flow, Service, TraceObservationPoint, TrafficDirection, Verdict,
};

use crate::observe::decided_by;

/// For how long flows are on the map, s.
pub const WINDOW: i64 = 300;
/// Over how many of the last seconds rates are told.
const RATE: i64 = 30;
/// How many pairs are on the map at most.
const EDGES: usize = 2_000;
/// How many handshakes' and requests' times are kept of each.
const TIMES: usize = 128;
/// How many drops of each are told one by one.
const DROPS: usize = 8;
/// How many ports of each are named.
const PORTS: usize = 8;

/// Who talks: pods of one controller, a Service, a name of the outside, nodes, or all else.
#[derive(Clone, Debug, Default, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize)]
pub struct End {
    /// Empty for what has none.
    pub namespace: String,
    pub name: String,
    /// `workload`, `service`, `domain`, `node` or `world`.
    pub kind: &'static str,
}

/// A packet that was dropped.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Dropped {
    /// ns since 1970.
    time: i64,
    what: String,
    reason: &'static str,
    /// The rule, or the policies of which none allows it.
    by: Option<String>,
}

/// What happened in one second.
#[derive(Clone, Copy, Debug, Default)]
struct Second {
    at: i64,
    begun: u64,
    dropped: u64,
    requests: u64,
    failed: u64,
}

#[derive(Debug, Default)]
struct Edge {
    seconds: VecDeque<Second>,
    /// µs from a connection's first packet to its answer.
    handshakes: VecDeque<u64>,
    /// µs from a request, or a question to a resolver, to its answer.
    answers: VecDeque<u64>,
    ports: BTreeSet<String>,
    drops: VecDeque<Dropped>,
}

/// One pair, as the page gets it.
#[derive(Debug, Serialize)]
pub struct Shown<'a> {
    from: &'a End,
    to: &'a End,
    /// Flows that began, a second.
    rate: f64,
    /// Flows that began.
    begun: u64,
    /// Packets that were dropped.
    dropped: u64,
    /// Requests and questions that were answered, and how many of them with an error.
    requests: u64,
    failed: u64,
    /// Median and 95th percentile of handshakes and of answers, µs.
    handshake: Option<[u64; 2]>,
    answer: Option<[u64; 2]>,
    ports: &'a BTreeSet<String>,
    drops: &'a VecDeque<Dropped>,
}

/// All that is on the map.
#[derive(Debug, Serialize)]
pub struct Picture<'a> {
    /// s since 1970.
    at: i64,
    window: i64,
    /// Flows that could not be told.
    lost: u64,
    /// Pairs that there was no room for.
    beyond: u64,
    edges: Vec<Shown<'a>>,
}

/// The map.
#[derive(Debug, Default)]
pub struct Map {
    edges: HashMap<(End, End), Edge>,
    lost: u64,
    beyond: u64,
}

fn end(endpoint: Option<&Endpoint>, names: &[String], service: Option<&Service>) -> End {
    let of = |namespace: &str, name: &str, kind| End {
        namespace: namespace.to_owned(),
        name: name.to_owned(),
        kind,
    };
    let unknown = Endpoint::default();
    let endpoint = endpoint.unwrap_or(&unknown);
    if !endpoint.pod_name.is_empty() {
        let workload = endpoint.workloads.first();
        let name = workload.map_or(&endpoint.pod_name, |one| &one.name);
        return of(&endpoint.namespace, name, "workload");
    }
    if let Some(service) = service.filter(|service| !service.name.is_empty()) {
        return of(&service.namespace, &service.name, "service");
    }
    if let Some(name) = names.first() {
        return of("", name, "domain");
    }
    let label = |prefix: &str| {
        let mut labels = endpoint.labels.iter();
        labels.find_map(|label| label.strip_prefix(prefix))
    };
    match label("k8s:kubernetes.io/hostname=") {
        Some(node) => of("", node, "node"),
        None => of("", label("reserved:").unwrap_or("unknown"), "world"),
    }
}

/// The time of a flow, ns since 1970.
pub fn time(flow: &Flow) -> i64 {
    flow.time.as_ref().map_or(0, |time| time.as_nanos())
}

fn port(flow: &Flow, reply: bool) -> Option<String> {
    let of = |name: &str, source: u32, destination: u32| {
        Some(format!(
            "{name} {}",
            if reply { source } else { destination }
        ))
    };
    match flow.l4.as_ref()?.protocol.as_ref()? {
        Protocol::Tcp(one) => of("TCP", one.source_port, one.destination_port),
        Protocol::Udp(one) => of("UDP", one.source_port, one.destination_port),
        Protocol::Sctp(one) => of("SCTP", one.source_port, one.destination_port),
        Protocol::IcmPv4(_) => Some("ICMP".to_owned()),
        Protocol::IcmPv6(_) => Some("ICMPv6".to_owned()),
        _ => None,
    }
}

/// A number that Hubble has no field for.
fn extension(flow: &Flow, name: &str) -> Option<u64> {
    let told = flow.extensions.as_ref()?.as_struct()?;
    told.number(name).map(|number| number as u64)
}

/// Whether the flow begins with this packet. Of several events of it one counts, wherever it is told of: what goes to a
/// Service as it is sent on; what a pod sends as its own node sees it; the rest as it comes to a pod.
fn begins(flow: &Flow) -> bool {
    use TraceObservationPoint::{FromEndpoint, FromHost, ToEndpoint, ToNetwork};
    let from_pod = flow
        .source
        .as_ref()
        .is_some_and(|end| !end.pod_name.is_empty());
    let egress = flow.traffic_direction() == TrafficDirection::Egress;
    let counts = match (flow.trace_observation_point(), egress) {
        (FromEndpoint, _) => flow.destination_service.is_none(),
        (ToEndpoint | ToNetwork, true) => flow.destination_service.is_some(),
        (ToEndpoint, false) => !from_pod,
        (FromHost, _) => true,
        _ => false,
    };
    let first = match flow.l4.as_ref().and_then(|l4| l4.protocol.as_ref()) {
        Some(Protocol::Tcp(tcp)) => tcp.flags.is_some_and(|flags| flags.syn && !flags.ack),
        _ => extension(flow, "packets").is_none(),
    };
    counts && first
}

impl Map {
    /// Takes a flow.
    pub fn take(&mut self, flow: &Flow) {
        let ends = [
            end(
                flow.source.as_ref(),
                &flow.source_names,
                flow.source_service.as_ref(),
            ),
            end(
                flow.destination.as_ref(),
                &flow.destination_names,
                flow.destination_service.as_ref(),
            ),
        ];
        let reply = flow.is_reply.as_ref().is_some_and(|reply| reply.value);
        let [from, to] = if reply {
            let [source, destination] = ends;
            [destination, source]
        } else {
            ends
        };
        let dropped = flow.verdict() == Verdict::Dropped
            && flow.event_type.as_ref().map(|kind| kind.r#type) == Some(event::DROP);
        let (handshake, began) = (extension(flow, "answered_in_us"), !reply && begins(flow));
        // What goes to a Service is told of again as it would have been sent on.
        if dropped
            && to.kind == "service"
            && flow.drop_reason_desc() != DropReason::ServiceBackendNotFound
        {
            return;
        }
        let said = flow.l7.as_ref().filter(|_| reply);
        if !began && !dropped && handshake.is_none() && said.is_none() {
            return;
        }
        let key = (from, to);
        if self.edges.len() >= EDGES && !self.edges.contains_key(&key) {
            self.beyond += 1;
            return;
        }
        let edge = self.edges.entry(key).or_default();
        let now = edge.second(time(flow) / 1_000_000_000);
        if let Some(second) = now {
            second.begun += u64::from(began);
            second.dropped += u64::from(dropped);
            if let Some(said) = said {
                second.requests += 1;
                second.failed += u64::from(match &said.record {
                    Some(Record::Http(http)) => http.code >= 400,
                    Some(Record::Dns(dns)) => dns.rcode != 0,
                    None => false,
                });
            }
        }
        let keep = |times: &mut VecDeque<u64>, time: u64| {
            times.push_front(time);
            times.truncate(TIMES);
        };
        if let Some(time) = handshake {
            keep(&mut edge.handshakes, time);
        }
        if let Some(said) = said.filter(|said| said.latency_ns > 0) {
            keep(&mut edge.answers, said.latency_ns / 1_000);
        }
        if edge.ports.len() < PORTS {
            edge.ports.extend(port(flow, reply));
        }
        if dropped {
            edge.drops.push_front(Dropped {
                time: time(flow),
                what: flow.summary.clone(),
                reason: flow.drop_reason_desc().as_str_name(),
                by: decided_by(flow),
            });
            edge.drops.truncate(DROPS);
        }
    }

    /// Counts flows that were lost on their way here.
    pub fn lose(&mut self, count: u64) {
        self.lost += count;
    }

    /// What there is to be seen now (s since 1970); what is over is forgotten.
    pub fn picture(&mut self, at: i64) -> Picture<'_> {
        self.edges.retain(|_, edge| {
            edge.seconds.retain(|second| second.at > at - WINDOW);
            !edge.seconds.is_empty()
        });
        let mut edges: Vec<Shown<'_>> = self
            .edges
            .iter()
            .map(|((from, to), edge)| edge.shown(from, to, at))
            .collect();
        edges.sort_by_key(|edge| (edge.from, edge.to));
        Picture {
            at,
            window: WINDOW,
            lost: self.lost,
            beyond: self.beyond,
            edges,
        }
    }
}

impl Edge {
    /// The counts of a second; flows come about in the order of time. None for one that is long over.
    fn second(&mut self, at: i64) -> Option<&mut Second> {
        if self.seconds.back().is_none_or(|last| last.at < at) {
            self.seconds.push_back(Second {
                at,
                ..Second::default()
            });
            if self.seconds.len() as i64 > WINDOW {
                self.seconds.pop_front();
            }
        }
        self.seconds.iter_mut().rev().find(|second| second.at <= at)
    }

    fn shown<'a>(&'a self, from: &'a End, to: &'a End, at: i64) -> Shown<'a> {
        let sum = |of: fn(&Second) -> u64| self.seconds.iter().map(of).sum::<u64>();
        let recent = self.seconds.iter().filter(|second| second.at > at - RATE);
        let recent: u64 = recent.map(|second| second.begun).sum();
        Shown {
            from,
            to,
            rate: recent as f64 / RATE as f64,
            begun: sum(|second| second.begun),
            dropped: sum(|second| second.dropped),
            requests: sum(|second| second.requests),
            failed: sum(|second| second.failed),
            handshake: percentiles(&self.handshakes),
            answer: percentiles(&self.answers),
            ports: &self.ports,
            drops: &self.drops,
        }
    }
}

/// Median and 95th percentile.
fn percentiles(times: &VecDeque<u64>) -> Option<[u64; 2]> {
    let mut times: Vec<u64> = times.iter().copied().collect();
    times.sort_unstable();
    let last = times.len().checked_sub(1)?;
    Some([50, 95].map(|percent| times[last * percent / 100]))
}

/// A flow, as a row of the page's table.
#[derive(Debug, Serialize)]
pub struct Row {
    /// ns since 1970.
    pub time: i64,
    pub node: String,
    pub source: String,
    pub destination: String,
    pub kind: String,
    pub verdict: &'static str,
    pub summary: String,
    pub by: Option<String>,
}

impl Row {
    /// As `observe` writes it.
    pub fn new(flow: &Flow) -> Self {
        let [source, destination] = crate::observe::ends(flow);
        Self {
            time: time(flow),
            node: flow.node_name.clone(),
            source,
            destination,
            kind: crate::observe::kind(flow),
            verdict: flow.verdict().as_str_name(),
            summary: flow.summary.clone(),
            by: decided_by(flow),
        }
    }
}

#[cfg(test)]
mod tests;
