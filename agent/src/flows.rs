//! Flows: events of the kernel, named and kept, for those who ask who talked to whom.

use std::collections::VecDeque;
use std::net::IpAddr;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use anyhow::{Context, Result};
use aya::maps::{MapData, PerCpuArray, RingBuf};
use k8s_openapi::jiff::Timestamp;
use serde_json::{Value, json};
use tokio::io::unix::AsyncFd;
use tokio::sync::{broadcast, oneshot};
use tokio_util::sync::CancellationToken;
use xebec_dataplane_common::flow::{
    AUDITED, Counters, DROPPED, EGRESS, Event, REASON_CHECKSUM, REASON_FRAGMENT, REASON_INVALID,
    REASON_NO_MAPPING, REASON_NO_ROUTE, REASON_NO_SERVICE, REASON_POLICY, REASON_RULE,
    REASON_SOURCE, REASON_TOO_BIG, REASON_TTL,
};
use xebec_dataplane_common::{ICMP, ICMP6, SCTP, TCP, UDP};
use xebec_policy::names::{Names, Peer};
use xebec_policy::rule::{PolicyRef, RuleId};

use crate::maps::{FlowMaps, next_event};

/// How many flows are kept: as many as Hubble keeps by default.
const KEPT: usize = 4_095;
/// How long events gather before they are read.
const GATHER: Duration = Duration::from_millis(50);
/// How many events are taken while names and flows are held: a millisecond at most, also of a busy CPU.
const AT_ONCE: usize = 256;
/// How far this gives way to others: it has a tenth of their share of a busy CPU.
const NICE: i32 = 10;
/// How far a follower may fall behind.
const BEHIND: usize = 1_024;

/// One event, with the names that held when it happened.
#[derive(Clone, Debug)]
pub struct Seen {
    event: Event,
    /// Wall-clock time, in ns since 1970.
    time: i64,
    source: Arc<Peer>,
    destination: Arc<Peer>,
    rule: Option<Arc<RuleId>>,
    denied_by: Option<Arc<Vec<Arc<PolicyRef>>>>,
}

/// Gives this thread a smaller share of a busy CPU: who reads what others did must not slow them down.
fn give_way() {
    // SAFETY: the function takes numbers alone; on Linux 0 is the calling thread (setpriority(2)).
    if unsafe { libc::setpriority(libc::PRIO_PROCESS, 0, NICE) } != 0 {
        let error = std::io::Error::last_os_error();
        tracing::warn!(%error, "events of flows are read with the priority of all else");
    }
}

/// All flows of the node; cheap to clone.
#[derive(Clone)]
pub struct Flows {
    kept: Arc<Mutex<VecDeque<Seen>>>,
    news: broadcast::Sender<Arc<Seen>>,
    names: Names,
    node_name: Arc<str>,
    counters: Option<Arc<PerCpuArray<MapData, [u8; size_of::<Counters>()]>>>,
}

impl Flows {
    /// No flows yet.
    pub fn new(names: Names, node_name: &str) -> Self {
        Self {
            kept: Arc::default(),
            news: broadcast::channel(BEHIND).0,
            names,
            node_name: node_name.into(),
            counters: None,
        }
    }

    /// Takes the kernel's events until `shutdown`; woken by them, it never asks by itself. It has a thread of its own,
    /// which gives way to whom it observes.
    pub(crate) fn follow(
        &mut self,
        maps: FlowMaps,
        shutdown: CancellationToken,
    ) -> Result<impl Future<Output = Result<()>> + use<>> {
        let (events, counters) = maps.split();
        self.counters = Some(Arc::new(counters));
        let flows = self.clone();
        let (ends, ended) = oneshot::channel();
        std::thread::Builder::new()
            .name("flows".to_owned())
            .spawn(move || {
                give_way();
                let runtime = tokio::runtime::Builder::new_current_thread()
                    .enable_all()
                    .build()
                    .context("could not start a runtime for events of flows");
                // Nobody waits any more when the agent stops.
                let _ =
                    ends.send(runtime.and_then(|one| one.block_on(flows.run(events, shutdown))));
            })
            .context("could not start a thread for events of flows")?;
        Ok(async { ended.await.context("reading events of flows panicked")? })
    }

    /// Takes events out of the ring until `shutdown`.
    async fn run(self, events: RingBuf<MapData>, shutdown: CancellationToken) -> Result<()> {
        let world = Arc::new(Peer::world());
        // SAFETY: the ring owns its map's descriptor, gives the same one always, and lives in the `AsyncFd`.
        let ring = unsafe { AsyncFd::register(events) };
        let mut ring = ring.context("could not wait for events of flows")?;
        let mut batch = Vec::with_capacity(AT_ONCE);
        loop {
            let mut ready = tokio::select! {
                () = shutdown.cancelled() => return Ok(()),
                ready = ring.readable_mut() => ready.context("could not wait for events of flows")?,
            };
            // The kernel wakes us only when we have read all: while we wait, events cost their writers nothing
            // more. At 400,000 events a second the ring is not full before we read on.
            tokio::select! {
                () = shutdown.cancelled() => return Ok(()),
                () = tokio::time::sleep(GATHER) => {}
            }
            let offset = wall_clock_offset();
            let ring = ready.get_inner_mut();
            while !shutdown.is_cancelled() {
                batch.extend(std::iter::from_fn(|| next_event(ring)).take(AT_ONCE));
                if batch.is_empty() {
                    break;
                }
                self.take(&batch, offset, &world);
                batch.clear();
            }
            ready.clear_ready();
        }
    }

    /// Names events and keeps them. There may be hundreds of thousands in a second, so what can be is done once for all.
    fn take(&self, events: &[Event], offset: i64, world: &Arc<Peer>) {
        let names = self.names.now();
        let mut kept = self.kept.lock().unwrap_or_else(PoisonError::into_inner);
        // Who follows begins under the lock, and what is new is sent under it: see `read`.
        let followed = self.news.receiver_count() != 0;
        for event in events {
            let seen = Seen {
                event: *event,
                time: offset.saturating_add_unsigned(event.time),
                source: names.peer(event.source.into()).unwrap_or(world).clone(),
                destination: names
                    .peer(event.destination.into())
                    .unwrap_or(world)
                    .clone(),
                rule: match event.rule {
                    0 => None,
                    rule => names.rule(rule).cloned(),
                },
                denied_by: match event.reason {
                    REASON_POLICY => names.policies(event.set).cloned(),
                    _ => None,
                },
            };
            if kept.len() == KEPT {
                kept.pop_front();
            }
            if followed {
                // All may have left by now.
                let _ = self.news.send(Arc::new(seen.clone()));
            }
            kept.push_back(seen);
        }
    }

    /// The newest flows that pass a filter, oldest first, and those to come.
    pub fn read(&self, filter: &Filter) -> (Vec<Seen>, broadcast::Receiver<Arc<Seen>>) {
        let kept = self.kept.lock().unwrap_or_else(PoisonError::into_inner);
        // Taken under the lock, so that no flow is lost or told twice between the two.
        let news = self.news.subscribe();
        let mut newest: Vec<Seen> = kept
            .iter()
            .rev()
            .filter(|seen| filter.passes(seen))
            .take(filter.last)
            .cloned()
            .collect();
        newest.reverse();
        (newest, news)
    }

    /// The kernel's counters.
    pub fn counters(&self) -> Result<Counters> {
        self.counters.as_ref().map_or_else(
            || Ok(Counters::default()),
            |counters| FlowMaps::counters(counters),
        )
    }

    /// A flow as Hubble's observer API writes it in JSON (`GetFlowsResponse`).
    pub fn to_json(&self, seen: &Seen) -> Value {
        let event = &seen.event;
        let time = Timestamp::from_nanosecond(seen.time.into())
            .unwrap_or_default()
            .to_string();
        let mut flow = json!({
            "time": time,
            "verdict": verdict(event),
            "IP": {
                "source": IpAddr::from(event.source),
                "destination": IpAddr::from(event.destination),
                "ipVersion": if event.source.is_v4() { "IPv4" } else { "IPv6" },
            },
            "l4": l4(event),
            "source": endpoint(&seen.source),
            "destination": endpoint(&seen.destination),
            "Type": "L3_L4",
            "node_name": &*self.node_name,
            "is_reply": event.reply != 0,
            "event_type": {"type": if event.verdict == DROPPED { 1 } else { 4 }},
            "traffic_direction": if event.direction == EGRESS { "EGRESS" } else { "INGRESS" },
            "Summary": summary(event),
        });
        let direction = if event.direction == EGRESS {
            "egress"
        } else {
            "ingress"
        };
        if event.verdict == DROPPED {
            flow["drop_reason"] = event.reason.into();
            flow["drop_reason_desc"] = reason(event.reason).into();
        }
        if event.reason != 0 {
            // Either a rule says so, or none of these policies allows it.
            let by: Option<Value> = match (&seen.rule, &seen.denied_by) {
                (Some(rule), _) => Some(json!([rule_value(rule)])),
                (None, Some(policies)) => Some(policies.iter().map(|one| policy(one)).collect()),
                (None, None) => None,
            };
            if let Some(by) = by {
                flow[format!("{direction}_denied_by")] = by;
            }
        }
        if event.verdict != DROPPED {
            flow["trace_observation_point"] = if event.direction == EGRESS {
                "FROM_ENDPOINT"
            } else {
                "TO_ENDPOINT"
            }
            .into();
            if let Some(rule) = seen.rule.as_ref().filter(|_| event.reason == 0) {
                let direction = rule.direction().name().to_ascii_lowercase();
                flow[format!("{direction}_allowed_by")] = json!([rule_value(rule)]);
            }
        }
        json!({"flow": flow, "node_name": &*self.node_name, "time": time})
    }
}

/// As Hubble names verdicts.
fn verdict(event: &Event) -> &'static str {
    match event.verdict {
        DROPPED => "DROPPED",
        AUDITED => "AUDIT",
        _ => "FORWARDED",
    }
}

fn policy(policy: &PolicyRef) -> Value {
    json!({"kind": policy.source.kind(), "namespace": policy.namespace, "name": policy.name})
}

fn rule_value(rule: &RuleId) -> Value {
    let mut value = policy(&rule.policy);
    value["rule"] = rule.index.into();
    value
}

fn endpoint(peer: &Peer) -> Value {
    let mut value = json!({"identity": peer.identity, "labels": peer.labels});
    if !peer.pod.1.is_empty() {
        value["namespace"] = peer.pod.0.clone().into();
        value["pod_name"] = peer.pod.1.clone().into();
    }
    if let Some((kind, name)) = &peer.workload {
        value["workloads"] = json!([{"kind": kind, "name": name}]);
    }
    value
}

const FLAGS: [&str; 6] = ["FIN", "SYN", "RST", "PSH", "ACK", "URG"];

fn l4(event: &Event) -> Value {
    let (from, to) = (
        u16::from_be(event.source_port),
        u16::from_be(event.destination_port),
    );
    match event.protocol {
        TCP => {
            let flags: serde_json::Map<String, Value> = (0..)
                .zip(FLAGS)
                .filter(|(bit, _)| event.tcp_flags >> bit & 1 == 1)
                .map(|(_, name)| (name.to_owned(), true.into()))
                .collect();
            json!({"TCP": {"source_port": from, "destination_port": to, "flags": flags}})
        }
        UDP => json!({"UDP": {"source_port": from, "destination_port": to}}),
        SCTP => json!({"SCTP": {"source_port": from, "destination_port": to}}),
        ICMP => {
            let [kind, code] = event.source_port.to_ne_bytes();
            json!({"ICMPv4": {"type": kind, "code": code}})
        }
        ICMP6 => {
            let [kind, code] = event.source_port.to_ne_bytes();
            json!({"ICMPv6": {"type": kind, "code": code}})
        }
        _ => json!({}),
    }
}

/// Whether there are no ports.
fn is_icmp(seen: &Seen) -> bool {
    matches!(seen.event.protocol, ICMP | ICMP6)
}

/// The protocol's name in flows and filters.
fn protocol(number: u8) -> &'static str {
    match number {
        TCP => "TCP",
        UDP => "UDP",
        SCTP => "SCTP",
        ICMP => "ICMPv4",
        ICMP6 => "ICMPv6",
        _ => "UNKNOWN",
    }
}

fn summary(event: &Event) -> String {
    match event.protocol {
        TCP => {
            // Hubble lists SYN and ACK first.
            let order = [1_u8, 4, 0, 2, 3, 5];
            let set: Vec<&str> = order
                .iter()
                .filter(|bit| event.tcp_flags >> **bit & 1 == 1)
                .filter_map(|bit| FLAGS.get(usize::from(*bit)).copied())
                .collect();
            format!("TCP Flags: {}", set.join(", "))
        }
        ICMP => match event.source_port.to_ne_bytes() {
            [8, _] => "ICMPv4 EchoRequest".to_owned(),
            [0, _] => "ICMPv4 EchoReply".to_owned(),
            [kind, code] => format!("ICMPv4 type {kind} code {code}"),
        },
        other => protocol(other).to_owned(),
    }
}

/// Names of `DropReason` (Hubble's flow.proto).
fn reason(number: u8) -> &'static str {
    match number {
        REASON_SOURCE => "INVALID_SOURCE_IP",
        REASON_POLICY => "POLICY_DENIED",
        REASON_RULE => "POLICY_DENY",
        REASON_INVALID => "INVALID_PACKET_DROPPED",
        REASON_CHECKSUM => "ERROR_WHILE_CORRECTING_L4_CHECKSUM",
        REASON_NO_SERVICE => "SERVICE_BACKEND_NOT_FOUND",
        REASON_NO_MAPPING => "NO_MAPPING_FOR_NAT_MASQUERADE",
        REASON_TOO_BIG => "FRAGMENTATION_NEEDED",
        REASON_NO_ROUTE => "FIB_LOOKUP_FAILED",
        REASON_TTL => "TTL_EXCEEDED",
        REASON_FRAGMENT => "FIRST_LOGICAL_DATAGRAM_FRAGMENT_NOT_FOUND",
        _ => "DROP_REASON_UNKNOWN",
    }
}

/// What to add to the monotonic clock to get the time of day, ns.
fn wall_clock_offset() -> i64 {
    use nix::time::{ClockId, clock_gettime};
    let nanos = |clock| {
        clock_gettime(clock).map_or(0, |time| time.tv_sec() * 1_000_000_000 + time.tv_nsec())
    };
    nanos(ClockId::CLOCK_REALTIME) - nanos(ClockId::CLOCK_MONOTONIC)
}

/// Which flows are wanted.
#[derive(Clone, Debug, Default)]
pub struct Filter {
    /// Either end in this namespace.
    pub namespace: Option<String>,
    /// Either end this pod; its namespace may be left open.
    pub pod: Option<(Option<String>, String)>,
    /// This verdict.
    pub verdict: Option<String>,
    /// This protocol.
    pub protocol: Option<String>,
    /// Either end has this port.
    pub port: Option<u16>,
    /// Not older than this.
    pub since: Option<Timestamp>,
    /// The newest so many.
    pub last: usize,
    /// Those to come, too.
    pub follow: bool,
}

impl Filter {
    /// From the pairs of a query; what is not known is an error.
    pub fn parse(query: &str) -> Result<Self> {
        let mut filter = Self {
            last: 20,
            ..Self::default()
        };
        for (key, value) in form_urlencoded::parse(query.as_bytes()) {
            let value = value.into_owned();
            let number = || {
                value
                    .parse::<u64>()
                    .with_context(|| format!("{key}={value:?} is no number"))
            };
            match &*key {
                "namespace" => filter.namespace = Some(value),
                "pod" => {
                    filter.pod = Some(match value.split_once('/') {
                        Some((namespace, pod)) => (Some(namespace.to_owned()), pod.to_owned()),
                        None => (None, value),
                    })
                }
                "verdict" => filter.verdict = Some(value.to_ascii_uppercase()),
                "protocol" => filter.protocol = Some(value.to_ascii_lowercase()),
                "port" => {
                    filter.port = Some(
                        u16::try_from(number()?)
                            .with_context(|| format!("port={value} is no port"))?,
                    )
                }
                "since" => {
                    let seconds = value
                        .trim_end_matches('s')
                        .parse::<u64>()
                        .with_context(|| format!("since={value:?} is not in seconds"))?;
                    let ago = std::time::Duration::from_secs(seconds);
                    filter.since = Some(
                        Timestamp::now()
                            .checked_sub(ago)
                            .context("since is too long ago")?,
                    );
                }
                "last" => filter.last = usize::try_from(number()?).unwrap_or(usize::MAX),
                "follow" => filter.follow = value == "true",
                other => anyhow::bail!("flows can't be filtered by {other:?}"),
            }
        }
        Ok(filter)
    }

    /// Whether a flow is wanted.
    pub fn passes(&self, seen: &Seen) -> bool {
        let ends = [&seen.source, &seen.destination];
        let verdict = verdict(&seen.event);
        let ports = [seen.event.source_port, seen.event.destination_port].map(u16::from_be);
        self.namespace
            .as_ref()
            .is_none_or(|wanted| ends.iter().any(|end| end.pod.0 == *wanted))
            && self.pod.as_ref().is_none_or(|(namespace, pod)| {
                ends.iter().any(|end| {
                    end.pod.1.starts_with(pod.as_str())
                        && namespace.as_ref().is_none_or(|wanted| end.pod.0 == *wanted)
                })
            })
            && self.verdict.as_ref().is_none_or(|wanted| wanted == verdict)
            && self.protocol.as_ref().is_none_or(|wanted| {
                let name = protocol(seen.event.protocol).to_ascii_lowercase();
                name == *wanted || wanted == "icmp" && is_icmp(seen)
            })
            && self
                .port
                .is_none_or(|wanted| !is_icmp(seen) && ports.contains(&wanted))
            && self
                .since
                .is_none_or(|since| i128::from(seen.time) >= since.as_nanosecond())
    }
}

#[cfg(test)]
mod tests;
