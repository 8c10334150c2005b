//! Metrics of flows, under Hubble's names, so that its dashboards show them.

mod context;

use std::borrow::Cow;
use std::sync::atomic::AtomicU64;
use std::sync::atomic::Ordering::Relaxed;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail};
use hashbrown::HashMap;
use prometheus_client::collector::Collector;
use prometheus_client::encoding::{DescriptorEncoder, EncodeMetric, MetricEncoder};
use prometheus_client::metrics::MetricType;
use prometheus_client::metrics::counter::ConstCounter;
use prometheus_client::metrics::histogram::Histogram;
use prometheus_client::registry::Registry;
use smallvec::{SmallVec, smallvec};
use xebec_dataplane_common::flow::{EGRESS, REASON_POLICY};
use xebec_dataplane_common::policy::{IDENTITY_HOST, IDENTITY_WORLD};
use xebec_dataplane_common::{ICMP, ICMP6, SCTP, TCP, UDP};
use xebec_hubble::event;
use xebec_hubble::flow::layer7::Record;
use xebec_hubble::flow::{self, DropReason, Layer7, Verdict};

use super::{Kind, Seen, layer7, message};
use context::{Context, Value, Values};

/// What is counted where nothing else is asked for.
pub const DEFAULT: &str = "dns drop tcp flow icmp http policy flows-to-world port-distribution";
/// How many series one metric may have: those beyond are counted together, with `other` as the value of each label.
const MOST: usize = 10_000;
/// Of a metric with so many, what was not counted for so long is forgotten.
const IDLE: Duration = Duration::from_secs(600);
/// How often that is looked for.
const SWEEP: Duration = Duration::from_secs(60);

/// What one metric counts.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum What {
    Drop,
    Tcp,
    Flow,
    Icmp,
    Policy,
    /// Whether the port is a label, SYNs alone count, and so does every reason for a drop.
    World {
        port: bool,
        syn_only: bool,
        any_drop: bool,
    },
    Ports,
    /// Questions, answers, or records in these.
    Dns {
        what: Dns,
        query: bool,
        ignore_aaaa: bool,
    },
    /// Requests, answers, or how long these took; in the way of `httpV2` or not.
    Http {
        what: Http,
        v2: bool,
    },
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Dns {
    Queries,
    Responses,
    Types,
    Duration,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Http {
    Requests,
    Responses,
    Duration,
}

impl What {
    /// Name (without `_total`), help, and names of labels.
    fn describe(self) -> (&'static str, &'static str, Vec<&'static str>) {
        match self {
            Self::Drop => ("hubble_drop", "Number of drops", vec!["reason", "protocol"]),
            Self::Tcp => (
                "hubble_tcp_flags",
                "TCP flag occurrences",
                vec!["flag", "family"],
            ),
            Self::Flow => (
                "hubble_flows_processed",
                "Total number of flows processed",
                vec!["protocol", "type", "subtype", "verdict"],
            ),
            Self::Icmp => (
                "hubble_icmp",
                "Number of ICMP messages",
                vec!["family", "type"],
            ),
            Self::Policy => (
                "hubble_policy_verdicts",
                "Number of verdicts of network policies",
                vec!["direction", "match", "action"],
            ),
            Self::World { port, .. } => (
                "hubble_flows_to_world",
                "Number of flows to reserved:world",
                if port {
                    vec!["protocol", "verdict", "port"]
                } else {
                    vec!["protocol", "verdict"]
                },
            ),
            Self::Ports => (
                "hubble_port_distribution",
                "Flows by destination port",
                vec!["protocol", "port"],
            ),
            Self::Dns { what, query, .. } => {
                let (name, help, mut labels) = match what {
                    Dns::Queries => (
                        "hubble_dns_queries",
                        "Number of DNS queries observed",
                        vec!["rcode", "qtypes", "ips_returned"],
                    ),
                    Dns::Responses => (
                        "hubble_dns_responses",
                        "Number of DNS responses observed",
                        vec!["rcode", "qtypes", "ips_returned"],
                    ),
                    Dns::Types => (
                        "hubble_dns_response_types",
                        "Number of records in DNS responses observed",
                        vec!["type", "qtypes"],
                    ),
                    Dns::Duration => (
                        "xebec_dns_response_duration_seconds",
                        "Time from DNS queries to their responses",
                        vec!["rcode"],
                    ),
                };
                if query && what != Dns::Duration {
                    labels.push("query");
                }
                (name, help, labels)
            }
            Self::Http { what, v2 } => match (what, v2) {
                (Http::Requests, false) => (
                    "hubble_http_requests",
                    "Count of HTTP requests",
                    vec!["method", "protocol", "reporter"],
                ),
                (Http::Requests, true) => (
                    "hubble_http_requests",
                    "Count of HTTP requests that were answered",
                    vec!["method", "protocol", "status", "reporter"],
                ),
                (Http::Responses, _) => (
                    "hubble_http_responses",
                    "Count of HTTP responses",
                    vec!["method", "status", "reporter"],
                ),
                (Http::Duration, _) => (
                    "hubble_http_request_duration_seconds",
                    "Time from HTTP requests to their responses",
                    vec!["method", "reporter"],
                ),
            },
        }
    }

    /// Whether it is about how long something took.
    const fn is_duration(self) -> bool {
        matches!(
            self,
            Self::Dns {
                what: Dns::Duration,
                ..
            } | Self::Http {
                what: Http::Duration,
                ..
            }
        )
    }

    /// The values of the labels of each series that a flow counts in.
    fn values(self, seen: &Seen, count: &mut dyn FnMut(Values)) {
        let event = &seen.event;
        let verdict = message::verdict(seen);
        let protocol = protocol(event.protocol);
        let port = || u16::from_be(event.destination_port).to_string();
        let has_ports = matches!(event.protocol, TCP | UDP | SCTP);
        let reply = event.reply != 0;
        match self {
            Self::Drop if seen.kind == Kind::Dropped => {
                let reason = DropReason::try_from(i32::from(event.reason));
                let reason = reason.unwrap_or(DropReason::Unknown).as_str_name();
                count(smallvec![reason.into(), protocol.into()]);
            }
            Self::Tcp if event.protocol == TCP && verdict == Verdict::Forwarded => {
                // Other events of the packet have the same flags.
                if !seen.is_packet() {
                    return;
                }
                let family = if event.source.is_v4() { "IPv4" } else { "IPv6" };
                let has = |bit: u8| event.tcp_flags >> bit & 1 == 1;
                let syn = if has(4) { "SYN-ACK" } else { "SYN" };
                for (bit, flag) in [(0, "FIN"), (1, syn), (2, "RST")] {
                    if has(bit) {
                        count(smallvec![flag.into(), family.into()]);
                    }
                }
            }
            Self::Flow => {
                let mut protocol = protocol;
                let (kind, below) = match seen.kind {
                    Kind::Said => {
                        protocol = match said(seen) {
                            Some((_, Record::Http(_))) => "HTTP",
                            _ => "DNS",
                        };
                        ("L7", protocol)
                    }
                    Kind::Dropped => ("Drop", ""),
                    Kind::Verdict => ("PolicyVerdict", ""),
                    Kind::Asked => ("Unknown", "7;1"),
                    Kind::Given => ("Unknown", "7;2"),
                    Kind::Passed | Kind::Translated => {
                        let number = event::sub_type(message::point(seen));
                        let mut points = event::POINTS.iter();
                        let point = points.find(|(_, one)| *one == number);
                        ("Trace", point.map_or("", |(name, _)| name))
                    }
                };
                count(smallvec![
                    protocol.into(),
                    kind.into(),
                    below.into(),
                    verdict.as_str_name().into()
                ]);
            }
            Self::Icmp if matches!(event.protocol, ICMP | ICMP6) => {
                if !seen.is_packet() {
                    return;
                }
                let family = if event.protocol == ICMP {
                    "IPv4"
                } else {
                    "IPv6"
                };
                let [kind, code] = event.source_port.to_ne_bytes();
                let name = match message::icmp(event.protocol, kind) {
                    "" => Cow::Owned(format!("{kind}({code})")),
                    name => Cow::Borrowed(name),
                };
                count(smallvec![family.into(), name]);
            }
            Self::Policy if seen.kind == Kind::Verdict => {
                if seen.source.identity == IDENTITY_HOST {
                    return;
                }
                let direction = if event.direction == EGRESS {
                    "egress"
                } else {
                    "ingress"
                };
                let by = seen
                    .rule
                    .as_ref()
                    .map_or(0, |rule| message::match_type(rule));
                let by = [
                    "none",
                    "l3-only",
                    "l3-l4",
                    "l4-only",
                    "all",
                    "l3-proto",
                    "proto-only",
                ]
                .get(by as usize)
                .copied()
                .unwrap_or("none");
                let action = match verdict {
                    Verdict::Dropped => "dropped",
                    Verdict::Audit => "audit",
                    _ => "forwarded",
                };
                count(smallvec![direction.into(), by.into(), action.into()]);
            }
            Self::World {
                port: with_port,
                syn_only,
                any_drop,
            } if seen.destination.identity == IDENTITY_WORLD => {
                let dropped = verdict == Verdict::Dropped;
                let syn = event.protocol == TCP && event.tcp_flags & 0x12 == 0x02;
                if !seen.is_packet()
                    || dropped && !any_drop && event.reason != REASON_POLICY
                    || !dropped && reply
                    || syn_only && (!syn || reply)
                {
                    return;
                }
                let mut values: Values = smallvec![protocol.into(), verdict.as_str_name().into()];
                if with_port {
                    values.push(if has_ports { port().into() } else { "".into() });
                }
                count(values);
            }
            Self::Ports if seen.is_packet() && verdict == Verdict::Forwarded && !reply => {
                let port = if has_ports { port().into() } else { "0".into() };
                count(smallvec![protocol.into(), port]);
            }
            Self::Dns {
                what,
                query,
                ignore_aaaa,
            } => {
                if let Some((said, Record::Dns(dns))) = said(seen)
                    && !(ignore_aaaa && dns.qtypes == ["AAAA"])
                {
                    what.values(said, dns, query, count);
                }
            }
            Self::Http { what, v2 } => {
                if let Some((said, Record::Http(http))) = said(seen) {
                    let reporter = if event.direction == EGRESS {
                        "client"
                    } else {
                        "server"
                    };
                    what.values(said, http, v2, reporter, count);
                }
            }
            _ => {}
        }
    }
}

/// What was said.
fn said(seen: &Seen) -> Option<(&Layer7, &Record)> {
    let said = seen.said.as_deref()?;
    Some((said, said.record.as_ref()?))
}

impl Dns {
    fn values(self, said: &Layer7, dns: &flow::Dns, query: bool, count: &mut dyn FnMut(Values)) {
        let qtypes = || Cow::Owned(dns.qtypes.join(","));
        let mut tell = |mut values: Values| {
            if query && self != Self::Duration {
                values.push(dns.query.clone().into());
            }
            count(values);
        };
        let answers = layer7::is_response(said);
        let ips = || dns.ips.len().to_string().into();
        match self {
            Self::Queries if !answers => tell(smallvec!["".into(), qtypes(), ips()]),
            Self::Responses if answers => {
                tell(smallvec![layer7::rcode(dns.rcode).into(), qtypes(), ips()]);
            }
            Self::Types if answers => {
                for kind in &dns.rrtypes {
                    tell(smallvec![kind.clone().into(), qtypes()]);
                }
            }
            // Without the question nobody knows.
            Self::Duration if answers && said.latency_ns > 0 => {
                tell(smallvec![layer7::rcode(dns.rcode).into()]);
            }
            _ => {}
        }
    }
}

impl Http {
    fn values(
        self,
        said: &Layer7,
        http: &flow::Http,
        v2: bool,
        reporter: &'static str,
        count: &mut dyn FnMut(Values),
    ) {
        let answers = layer7::is_response(said);
        let (method, protocol) = (method(&http.method), Cow::Owned(http.protocol.clone()));
        let status = || Cow::Owned(http.code.to_string());
        match self {
            Self::Requests if v2 && answers => {
                count(smallvec![method, protocol, status(), reporter.into()]);
            }
            Self::Requests if !v2 && !answers => {
                count(smallvec![method, protocol, reporter.into()]);
            }
            Self::Responses if answers => count(smallvec![method, status(), reporter.into()]),
            Self::Duration if answers && said.latency_ns > 0 => {
                count(smallvec![method, reporter.into()]);
            }
            _ => {}
        }
    }
}

/// A method as a label; whoever sends requests may invent others.
fn method(name: &str) -> Value {
    const KNOWN: [&str; 9] = [
        "GET", "HEAD", "POST", "PUT", "DELETE", "CONNECT", "OPTIONS", "TRACE", "PATCH",
    ];
    let known = KNOWN.into_iter().find(|one| *one == name);
    known
        .unwrap_or(if name.is_empty() { "" } else { "other" })
        .into()
}

fn protocol(number: u8) -> &'static str {
    match number {
        TCP => "TCP",
        UDP => "UDP",
        SCTP => "SCTP",
        ICMP => "ICMPv4",
        ICMP6 => "ICMPv6",
        _ => "Unknown L4",
    }
}

/// One metric, and its series.
#[derive(Debug)]
struct Metric {
    what: What,
    context: Context,
    series: Mutex<Series>,
}

/// What one series has.
#[derive(Debug)]
enum Tally {
    Count(u64),
    Durations(Histogram),
}

/// Upper bounds of durations, in seconds: those of Go's client, which Hubble has, and shorter ones.
const BOUNDS: [f64; 14] = [
    0.000_25, 0.000_5, 0.001, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0,
];

impl Tally {
    fn new(duration: Option<f64>) -> Self {
        match duration {
            None => Self::Count(0),
            Some(_) => Self::Durations(Histogram::new(BOUNDS)),
        }
    }

    fn add(&mut self, duration: Option<f64>) {
        match self {
            Self::Count(count) => *count += 1,
            Self::Durations(all) => all.observe(duration.unwrap_or_default()),
        }
    }

    fn encode(&self, encoder: MetricEncoder<'_>) -> std::fmt::Result {
        match self {
            Self::Count(count) => ConstCounter::new(*count).encode(encoder),
            Self::Durations(all) => all.encode(encoder),
        }
    }
}

#[derive(Debug, Default)]
struct Series {
    counts: HashMap<Values, (Tally, Instant)>,
    /// What is counted together.
    others: Option<Tally>,
    swept: Option<Instant>,
}

impl Series {
    /// Counts one; of a metric of durations, with how long it took.
    fn count(&mut self, values: Values, duration: Option<f64>, most: usize, now: Instant) {
        if let Some((tally, last)) = self.counts.get_mut(&values) {
            tally.add(duration);
            *last = now;
            return;
        }
        if self.counts.len() >= most && self.swept.is_none_or(|swept| now >= swept + SWEEP) {
            self.swept = Some(now);
            self.counts.retain(|_, (_, last)| now < *last + IDLE);
        }
        let new = || Tally::new(duration);
        if self.counts.len() < most {
            let mut tally = new();
            tally.add(duration);
            self.counts.insert(values, (tally, now));
        } else {
            self.others.get_or_insert_with(new).add(duration);
        }
    }
}

/// The metrics that are kept; cheap to clone.
#[derive(Clone, Debug)]
pub struct FlowMetrics {
    metrics: Arc<Vec<Metric>>,
    lost: Arc<Mutex<[u64; 3]>>,
    unanswered: Arc<AtomicU64>,
    most: usize,
}

impl Default for FlowMetrics {
    /// None.
    fn default() -> Self {
        Self {
            metrics: Arc::default(),
            lost: Arc::default(),
            unanswered: Arc::default(),
            most: MOST,
        }
    }
}

impl FlowMetrics {
    /// Reads what is to be counted, as Cilium's `--hubble-metrics` has it: names with options, divided by blanks, as
    /// `drop flow:sourceContext=pod;labelsContext=traffic_direction`.
    ///
    /// # Errors
    /// Says which metric or option there is not.
    pub fn parse(text: &str) -> Result<Self> {
        let mut metrics: Vec<Metric> = Vec::new();
        for one in text.split_whitespace() {
            let (name, options) = one.split_once(':').unwrap_or((one, ""));
            let (mut port, mut syn_only, mut any_drop) = (false, false, false);
            let (mut query, mut ignore_aaaa) = (false, false);
            let mut context = Context::default();
            for option in options.split(';').filter(|option| !option.is_empty()) {
                let (key, value) = option.split_once('=').unwrap_or((option, ""));
                match (name, key) {
                    ("flows-to-world", "port") => port = true,
                    ("flows-to-world", "syn-only") => syn_only = true,
                    ("flows-to-world", "any-drop") => any_drop = true,
                    ("dns", "query") => query = true,
                    ("dns", key) if key.eq_ignore_ascii_case("ignoreAAAA") => ignore_aaaa = true,
                    _ => context
                        .set(key, value)
                        .with_context(|| format!("metric {name}"))?,
                }
            }
            let http = |v2| move |what| What::Http { what, v2 };
            let whats: SmallVec<[What; 4]> = match name {
                "dns" => [Dns::Queries, Dns::Responses, Dns::Types, Dns::Duration]
                    .map(|what| What::Dns {
                        what,
                        query,
                        ignore_aaaa,
                    })
                    .into(),
                "drop" => smallvec![What::Drop],
                "tcp" => smallvec![What::Tcp],
                "flow" => smallvec![What::Flow],
                "http" => [Http::Requests, Http::Responses, Http::Duration]
                    .into_iter()
                    .map(http(false))
                    .collect(),
                "httpV2" => [Http::Requests, Http::Duration]
                    .into_iter()
                    .map(http(true))
                    .collect(),
                "icmp" => smallvec![What::Icmp],
                "policy" => smallvec![What::Policy],
                "flows-to-world" => smallvec![What::World {
                    port,
                    syn_only,
                    any_drop,
                }],
                "port-distribution" => smallvec![What::Ports],
                _ => bail!(
                    "no metric {name:?}: there are dns, drop, tcp, flow, http, httpV2, icmp, policy, flows-to-world and port-distribution"
                ),
            };
            for what in whats {
                let name = what.describe().0;
                if metrics.iter().any(|other| other.what.describe().0 == name) {
                    bail!("metric {one:?} is asked for twice");
                }
                metrics.push(Metric {
                    what,
                    context: context.clone(),
                    series: Mutex::default(),
                });
            }
        }
        Ok(Self {
            metrics: Arc::new(metrics),
            ..Self::default()
        })
    }

    /// Those of [`DEFAULT`].
    #[must_use]
    pub fn usual() -> Self {
        Self::parse(DEFAULT).unwrap_or_default()
    }

    /// Counts a flow.
    pub(super) fn count(&self, seen: &Seen, now: Instant) {
        for metric in self.metrics.iter() {
            let said = seen.said.as_deref().filter(|_| metric.what.is_duration());
            let duration = said.map(|said| Duration::from_nanos(said.latency_ns).as_secs_f64());
            metric.what.values(seen, &mut |mut values| {
                metric.context.values(seen, &mut values);
                let mut series = metric.series.lock().unwrap_or_else(PoisonError::into_inner);
                series.count(values, duration, self.most, now);
            });
        }
    }

    /// Counts questions to resolvers that nobody answered.
    pub(super) fn count_unanswered(&self, count: u64) {
        self.unanswered.fetch_add(count, Relaxed);
    }

    /// Counts what was lost.
    pub(super) fn count_lost(&self, at: Lost, count: u64) {
        let mut lost = self.lost.lock().unwrap_or_else(PoisonError::into_inner);
        lost[at as usize] += count;
    }
}

/// Where flows were lost.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Lost {
    /// The kernel had no room for them.
    Kernel,
    /// They were forgotten before a reader came to them.
    Store,
    /// They could not be written to a file.
    Export,
}

impl crate::metrics::Register for FlowMetrics {
    fn register(&self, registry: &mut Registry) {
        registry.register_collector(Box::new(self.clone()));
    }
}

impl Collector for FlowMetrics {
    fn encode(&self, mut encoder: DescriptorEncoder) -> std::fmt::Result {
        for metric in self.metrics.iter() {
            let (name, help, mut names) = metric.what.describe();
            names.extend(metric.context.names());
            let series = metric.series.lock().unwrap_or_else(PoisonError::into_inner);
            let kind = if metric.what.is_duration() {
                MetricType::Histogram
            } else {
                MetricType::Counter
            };
            let mut family = encoder.encode_descriptor(name, help, None, kind)?;
            for (values, (tally, _)) in &series.counts {
                let labels: Vec<(&str, &str)> = names
                    .iter()
                    .copied()
                    .zip(values.iter().map(|value| &**value))
                    .collect();
                tally.encode(family.encode_family(&labels)?)?;
            }
            if let Some(others) = &series.others {
                let labels: Vec<(&str, &str)> = names.iter().map(|name| (*name, "other")).collect();
                others.encode(family.encode_family(&labels)?)?;
            }
        }
        let help = "Number of lost events";
        let mut family =
            encoder.encode_descriptor("hubble_lost_events", help, None, MetricType::Counter)?;
        let lost = *self.lost.lock().unwrap_or_else(PoisonError::into_inner);
        const SOURCES: [&str; 3] = ["perf_event_ring_buffer", "hubble_ring_buffer", "export"];
        for (source, count) in SOURCES.into_iter().zip(lost) {
            ConstCounter::new(count).encode(family.encode_family(&[("source", source)])?)?;
        }
        let help = "Number of DNS queries that got no response";
        let name = "xebec_dns_unanswered_queries";
        let family = encoder.encode_descriptor(name, help, None, MetricType::Counter)?;
        ConstCounter::new(self.unanswered.load(Relaxed)).encode(family)?;
        Ok(())
    }
}

#[cfg(test)]
mod tests;
