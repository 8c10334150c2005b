//! Metrics of flows, under Hubble's names, so that its dashboards show them.

mod context;

use std::borrow::Cow;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail};
use hashbrown::HashMap;
use prometheus_client::collector::Collector;
use prometheus_client::encoding::{DescriptorEncoder, EncodeMetric};
use prometheus_client::metrics::MetricType;
use prometheus_client::metrics::counter::ConstCounter;
use prometheus_client::registry::Registry;
use smallvec::smallvec;
use xebec_dataplane_common::flow::{EGRESS, REASON_POLICY};
use xebec_dataplane_common::policy::{IDENTITY_HOST, IDENTITY_WORLD};
use xebec_dataplane_common::{ICMP, ICMP6, SCTP, TCP, UDP};
use xebec_hubble::event;
use xebec_hubble::flow::{DropReason, Verdict};

use super::{Kind, Seen, message};
use context::{Context, Values};

/// What is counted where nothing else is asked for.
pub const DEFAULT: &str = "drop tcp flow icmp policy flows-to-world port-distribution";
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
        }
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
                let (kind, below) = match seen.kind {
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
            _ => {}
        }
    }
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

#[derive(Debug, Default)]
struct Series {
    counts: HashMap<Values, (u64, Instant)>,
    /// What is counted together.
    others: u64,
    swept: Option<Instant>,
}

impl Series {
    fn count(&mut self, values: Values, most: usize, now: Instant) {
        if let Some((count, last)) = self.counts.get_mut(&values) {
            *count += 1;
            *last = now;
            return;
        }
        if self.counts.len() >= most && self.swept.is_none_or(|swept| now >= swept + SWEEP) {
            self.swept = Some(now);
            self.counts.retain(|_, (_, last)| now < *last + IDLE);
        }
        if self.counts.len() < most {
            self.counts.insert(values, (1, now));
        } else {
            self.others += 1;
        }
    }
}

/// The metrics that are kept; cheap to clone.
#[derive(Clone, Debug)]
pub struct FlowMetrics {
    metrics: Arc<Vec<Metric>>,
    lost: Arc<Mutex<[u64; 3]>>,
    most: usize,
}

impl Default for FlowMetrics {
    /// None.
    fn default() -> Self {
        Self {
            metrics: Arc::default(),
            lost: Arc::default(),
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
            let mut context = Context::default();
            for option in options.split(';').filter(|option| !option.is_empty()) {
                let (key, value) = option.split_once('=').unwrap_or((option, ""));
                match (name, key) {
                    ("flows-to-world", "port") => port = true,
                    ("flows-to-world", "syn-only") => syn_only = true,
                    ("flows-to-world", "any-drop") => any_drop = true,
                    _ => context
                        .set(key, value)
                        .with_context(|| format!("metric {name}"))?,
                }
            }
            let what = match name {
                "drop" => What::Drop,
                "tcp" => What::Tcp,
                "flow" => What::Flow,
                "icmp" => What::Icmp,
                "policy" => What::Policy,
                "flows-to-world" => What::World {
                    port,
                    syn_only,
                    any_drop,
                },
                "port-distribution" => What::Ports,
                _ => bail!(
                    "no metric {name:?}: there are drop, tcp, flow, icmp, policy, flows-to-world and port-distribution"
                ),
            };
            let name = what.describe().0;
            if metrics.iter().any(|other| other.what.describe().0 == name) {
                bail!("metric {one:?} is asked for twice");
            }
            metrics.push(Metric {
                what,
                context,
                series: Mutex::default(),
            });
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
            metric.what.values(seen, &mut |mut values| {
                metric.context.values(seen, &mut values);
                let mut series = metric.series.lock().unwrap_or_else(PoisonError::into_inner);
                series.count(values, self.most, now);
            });
        }
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
            let mut family = encoder.encode_descriptor(name, help, None, MetricType::Counter)?;
            for (values, (count, _)) in &series.counts {
                let labels: Vec<(&str, &str)> = names
                    .iter()
                    .copied()
                    .zip(values.iter().map(|value| &**value))
                    .collect();
                ConstCounter::new(*count).encode(family.encode_family(&labels)?)?;
            }
            if series.others != 0 {
                let labels: Vec<(&str, &str)> = names.iter().map(|name| (*name, "other")).collect();
                ConstCounter::new(series.others).encode(family.encode_family(&labels)?)?;
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
        Ok(())
    }
}

#[cfg(test)]
mod tests;
