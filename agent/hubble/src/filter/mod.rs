//! Filters: a flow passes one if it has one of the values of each field that has any.

mod labels;
mod names;

use std::net::IpAddr;

use anyhow::{Context, Result, bail, ensure};
use regex::Regex;

use crate::event;
use crate::flow::layer4::Protocol;
use crate::flow::layer7::Record;
use crate::flow::{Endpoint, Flow, FlowFilter, Http, Service, TcpFlags, Verdict};
use labels::Selector;
use names::{NamePrefix, domains, nodes};

type Test = Box<dyn Fn(&Flow) -> bool + Send + Sync>;

/// Which flows are wanted: all that one of `allow` passes, or all where there is none, without those that one of
/// `deny` passes.
pub struct Filters {
    allow: Vec<Vec<Test>>,
    deny: Vec<Vec<Test>>,
}

impl std::fmt::Debug for Filters {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(
            f,
            "{} to allow, {} to deny",
            self.allow.len(),
            self.deny.len()
        )
    }
}

impl Filters {
    /// Reads filters.
    ///
    /// # Errors
    /// Says which field of which filter can't be read, and why.
    pub fn new(allow: &[FlowFilter], deny: &[FlowFilter]) -> Result<Self> {
        let read = |filters: &[FlowFilter]| filters.iter().map(tests).collect::<Result<Vec<_>>>();
        Ok(Self {
            allow: read(allow)?,
            deny: read(deny)?,
        })
    }

    /// Whether a flow is wanted.
    #[must_use]
    pub fn pass(&self, flow: &Flow) -> bool {
        let one = |filters: &[Vec<Test>]| {
            filters
                .iter()
                .any(|tests| tests.iter().all(|test| test(flow)))
        };
        (self.allow.is_empty() || one(&self.allow)) && !one(&self.deny)
    }

    /// Whether every flow is wanted.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.allow.is_empty() && self.deny.is_empty()
    }
}

/// The tests of one filter, the cheap ones first.
fn tests(filter: &FlowFilter) -> Result<Vec<Test>> {
    let mut tests = Vec::new();
    headers(filter, &mut tests)?;
    ends(filter, &mut tests)?;
    node(filter, &mut tests)?;
    layer7(filter, &mut tests)?;
    let experimental = filter.experimental.as_ref();
    let unknown = experimental.map_or(0, |one| one.cel_expression.len());
    ensure!(unknown == 0, "cel_expression: not supported here");
    for (what, none) in [
        ("trace_id", filter.trace_id.is_empty()),
        ("ip_trace_id", filter.ip_trace_id.is_empty()),
    ] {
        ensure!(none, "{what}: no flow here has one");
    }
    Ok(tests)
}

/// Adds a test if there is anything to ask for.
fn add<T: Send + Sync + 'static>(
    tests: &mut Vec<Test>,
    wanted: Vec<T>,
    has: impl Fn(&Flow, &T) -> bool + Send + Sync + 'static,
) {
    if !wanted.is_empty() {
        tests.push(Box::new(move |flow| {
            wanted.iter().any(|one| has(flow, one))
        }));
    }
}

/// What stands in the packet, and what became of it.
fn headers(filter: &FlowFilter, tests: &mut Vec<Test>) -> Result<()> {
    add(tests, filter.verdict.clone(), |flow, one| {
        flow.verdict == *one
    });
    add(tests, filter.drop_reason_desc.clone(), |flow, one| {
        flow.drop_reason_desc == *one
    });
    add(tests, filter.traffic_direction.clone(), |flow, one| {
        flow.traffic_direction == *one
    });
    add(tests, filter.ip_version.clone(), |flow, one| {
        flow.ip.as_ref().map_or(0, |ip| ip.ip_version) == *one
    });
    add(tests, filter.encrypted.clone(), |flow, one| {
        flow.ip.as_ref().is_some_and(|ip| ip.encrypted) == *one
    });
    add(tests, filter.uuid.clone(), |flow, one| flow.uuid == *one);
    add(tests, filter.event_type.clone(), |flow, one| {
        flow.event_type.as_ref().is_some_and(|kind| {
            (one.r#type == 0 || kind.r#type == one.r#type)
                && (!one.match_sub_type || kind.sub_type == one.sub_type)
        })
    });
    // What is dropped has no known direction, and counts as no reply.
    add(tests, filter.reply.clone(), |flow, one| {
        let dropped = flow.verdict == i32::from(Verdict::Dropped);
        flow.is_reply.map_or(dropped && !one, |is| is.value == *one)
    });
    add(tests, filter.tcp_flags.clone(), |flow, one| {
        has_flags(flow, one)
    });
    let protocols = filter.protocol.iter().map(|name| protocol(name));
    let protocols = protocols.collect::<Result<Vec<_>>>();
    add(tests, protocols.context("protocol")?, |flow, one| one(flow));
    add(tests, filter.interface.clone(), |flow, one| {
        flow.interface.as_ref().is_some_and(|is| {
            (one.index == 0 || is.index == one.index)
                && (one.name.is_empty() || is.name == one.name)
        })
    });
    Ok(())
}

fn has_flags(flow: &Flow, wanted: &TcpFlags) -> bool {
    let Some(Protocol::Tcp(tcp)) = layer4(flow) else {
        return false;
    };
    let Some(flags) = &tcp.flags else {
        return false;
    };
    let bits = |flags: &TcpFlags| {
        [
            flags.fin, flags.syn, flags.rst, flags.psh, flags.ack, flags.urg, flags.ece, flags.cwr,
            flags.ns,
        ]
    };
    bits(wanted)
        .into_iter()
        .zip(bits(flags))
        .all(|(wanted, has)| has || !wanted)
}

fn layer4(flow: &Flow) -> Option<&Protocol> {
    flow.l4.as_ref()?.protocol.as_ref()
}

fn record(flow: &Flow) -> Option<&Record> {
    flow.l7.as_ref()?.record.as_ref()
}

/// Whether a flow is of the protocol of this name.
fn protocol(name: &str) -> Result<fn(&Flow) -> bool> {
    Ok(match name.to_ascii_lowercase().as_str() {
        "tcp" => |flow| matches!(layer4(flow), Some(Protocol::Tcp(_))),
        "udp" => |flow| matches!(layer4(flow), Some(Protocol::Udp(_))),
        "sctp" => |flow| matches!(layer4(flow), Some(Protocol::Sctp(_))),
        "icmp" => |flow| {
            matches!(
                layer4(flow),
                Some(Protocol::IcmPv4(_) | Protocol::IcmPv6(_))
            )
        },
        "icmpv4" => |flow| matches!(layer4(flow), Some(Protocol::IcmPv4(_))),
        "icmpv6" => |flow| matches!(layer4(flow), Some(Protocol::IcmPv6(_))),
        "vrrp" => |flow| matches!(layer4(flow), Some(Protocol::Vrrp(_))),
        "igmp" => |flow| matches!(layer4(flow), Some(Protocol::Igmp(_))),
        "dns" => |flow| matches!(record(flow), Some(Record::Dns(_))),
        "http" => |flow| matches!(record(flow), Some(Record::Http(_))),
        _ => bail!(
            "{name:?} is none of tcp, udp, sctp, icmp, icmpv4, icmpv6, vrrp, igmp, dns and http"
        ),
    })
}

/// An address, or a range of them.
#[derive(Clone, Copy)]
struct Range(IpAddr, u8);

impl Range {
    fn parse(text: &str) -> Result<Self> {
        let (address, length) = match text.split_once('/') {
            Some((address, length)) => (address, Some(length)),
            None => (text, None),
        };
        let address: IpAddr = address
            .parse()
            .with_context(|| format!("{text:?} is neither an address nor a range"))?;
        let whole = if address.is_ipv4() { 32 } else { 128 };
        let length = match length {
            None => whole,
            Some(length) => length
                .parse()
                .ok()
                .filter(|length| *length <= whole)
                .with_context(|| {
                    format!("{text:?}: the length of its prefix is not 0 to {whole}")
                })?,
        };
        Ok(Self(address, length))
    }

    fn has(&self, text: &str) -> bool {
        let same = |a: u128, b: u128, unused: u32| {
            a.checked_shr(unused).unwrap_or(0) == b.checked_shr(unused).unwrap_or(0)
        };
        match (self.0, text.parse()) {
            (IpAddr::V4(a), Ok(IpAddr::V4(b))) => same(
                u32::from(a).into(),
                u32::from(b).into(),
                32 - u32::from(self.1),
            ),
            (IpAddr::V6(a), Ok(IpAddr::V6(b))) => same(a.into(), b.into(), 128 - u32::from(self.1)),
            _ => false,
        }
    }
}

/// One end of flows: how its part of a filter and of a flow is reached.
struct End {
    name: &'static str,
    endpoint: fn(&Flow) -> Option<&Endpoint>,
    service: fn(&Flow) -> Option<&Service>,
    names: fn(&Flow) -> &[String],
    address: fn(&Flow) -> Option<&str>,
    port: fn(&Flow) -> Option<u32>,
}

const SOURCE: End = End {
    name: "source",
    endpoint: |flow| flow.source.as_ref(),
    service: |flow| flow.source_service.as_ref(),
    names: |flow| &flow.source_names,
    address: |flow| flow.ip.as_ref().map(|ip| ip.source.as_str()),
    port: |flow| match layer4(flow)? {
        Protocol::Tcp(tcp) => Some(tcp.source_port),
        Protocol::Udp(udp) => Some(udp.source_port),
        Protocol::Sctp(sctp) => Some(sctp.source_port),
        _ => None,
    },
};

const DESTINATION: End = End {
    name: "destination",
    endpoint: |flow| flow.destination.as_ref(),
    service: |flow| flow.destination_service.as_ref(),
    names: |flow| &flow.destination_names,
    address: |flow| flow.ip.as_ref().map(|ip| ip.destination.as_str()),
    port: |flow| match layer4(flow)? {
        Protocol::Tcp(tcp) => Some(tcp.destination_port),
        Protocol::Udp(udp) => Some(udp.destination_port),
        Protocol::Sctp(sctp) => Some(sctp.destination_port),
        _ => None,
    },
};

fn ends(filter: &FlowFilter, tests: &mut Vec<Test>) -> Result<()> {
    end(
        SOURCE,
        Wanted {
            ports: &filter.source_port,
            identities: &filter.source_identity,
            addresses: &filter.source_ip,
            pods: &filter.source_pod,
            services: &filter.source_service,
            workloads: &filter.source_workload,
            clusters: &filter.source_cluster_name,
            domains: &filter.source_fqdn,
            labels: &filter.source_label,
        },
        tests,
    )?;
    end(
        DESTINATION,
        Wanted {
            ports: &filter.destination_port,
            identities: &filter.destination_identity,
            addresses: &filter.destination_ip,
            pods: &filter.destination_pod,
            services: &filter.destination_service,
            workloads: &filter.destination_workload,
            clusters: &filter.destination_cluster_name,
            domains: &filter.destination_fqdn,
            labels: &filter.destination_label,
        },
        tests,
    )?;
    let translated = read(&filter.source_ip_xlated, Range::parse).context("source_ip_xlated")?;
    add(tests, translated, |flow, one| {
        let ip = flow.ip.as_ref();
        ip.is_some_and(|ip| one.has(&ip.source_xlated))
    });
    Ok(())
}

/// What a filter says of one end.
struct Wanted<'a> {
    ports: &'a [String],
    identities: &'a [u32],
    addresses: &'a [String],
    pods: &'a [String],
    services: &'a [String],
    workloads: &'a [crate::flow::Workload],
    clusters: &'a [String],
    domains: &'a [String],
    labels: &'a [String],
}

fn read<T>(texts: &[String], one: impl Fn(&str) -> Result<T>) -> Result<Vec<T>> {
    texts.iter().map(|text| one(text)).collect()
}

fn end(end: End, wanted: Wanted<'_>, tests: &mut Vec<Test>) -> Result<()> {
    let name = end.name;
    let ports = read(wanted.ports, |text| {
        text.parse::<u16>()
            .with_context(|| format!("{text:?} is no port"))
    });
    let ports = ports.with_context(|| format!("{name}_port"))?;
    add(tests, ports, move |flow, one| {
        (end.port)(flow) == Some(u32::from(*one))
    });
    add(tests, wanted.identities.to_vec(), move |flow, one| {
        (end.endpoint)(flow).is_some_and(|end| end.identity == *one)
    });
    let pods = read(wanted.pods, NamePrefix::parse).with_context(|| format!("{name}_pod"))?;
    add(tests, pods, move |flow, one| {
        (end.endpoint)(flow).is_some_and(|end| one.is_of(&end.namespace, &end.pod_name))
    });
    let services =
        read(wanted.services, NamePrefix::parse).with_context(|| format!("{name}_service"))?;
    add(tests, services, move |flow, one| {
        (end.service)(flow).is_some_and(|end| one.is_of(&end.namespace, &end.name))
    });
    add(tests, wanted.workloads.to_vec(), move |flow, one| {
        (end.endpoint)(flow).is_some_and(|end| {
            end.workloads.iter().any(|has| {
                (one.name.is_empty() || one.name == has.name)
                    && (one.kind.is_empty() || one.kind == has.kind)
            })
        })
    });
    ensure!(
        wanted.clusters.iter().all(|one| !one.is_empty()),
        "{name}_cluster_name: an empty name"
    );
    add(tests, wanted.clusters.to_vec(), move |flow, one| {
        (end.endpoint)(flow).is_some_and(|end| end.cluster_name == *one)
    });
    let addresses = read(wanted.addresses, Range::parse).with_context(|| format!("{name}_ip"))?;
    add(tests, addresses, move |flow, one| {
        (end.address)(flow).is_some_and(|address| one.has(address))
    });
    let domains = read(wanted.domains, domains).with_context(|| format!("{name}_fqdn"))?;
    add(tests, domains, move |flow, one| {
        (end.names)(flow).iter().any(|name| one.is_match(name))
    });
    let labels = read(wanted.labels, Selector::parse).with_context(|| format!("{name}_label"))?;
    add(tests, labels, move |flow, one| {
        one.selects((end.endpoint)(flow).map_or(&[], |end| &end.labels))
    });
    Ok(())
}

fn node(filter: &FlowFilter, tests: &mut Vec<Test>) -> Result<()> {
    let names = read(&filter.node_name, nodes).context("node_name")?;
    add(tests, names, |flow, one| {
        let name = flow.node_name.as_str();
        let whole = if name.contains('/') {
            name.to_owned()
        } else {
            format!("{}/{name}", crate::DEFAULT_CLUSTER)
        };
        !name.is_empty() && one.is_match(&whole)
    });
    let labels = read(&filter.node_labels, Selector::parse).context("node_labels")?;
    add(tests, labels, |flow, one| one.selects(&flow.node_labels));
    Ok(())
}

fn http(flow: &Flow) -> Option<&Http> {
    match record(flow)? {
        Record::Http(http) => Some(http),
        Record::Dns(_) => None,
    }
}

fn pattern(text: &str) -> Result<Regex> {
    Regex::new(text).with_context(|| format!("{text:?} is no regular expression"))
}

/// The path of a URL or of a request's target.
fn path(url: &str) -> &str {
    let rest = match url.split_once("://") {
        Some((_, rest)) => rest.find('/').map_or("", |at| &rest[at..]),
        None => url,
    };
    rest.split(['?', '#']).next().unwrap_or_default()
}

fn layer7(filter: &FlowFilter, tests: &mut Vec<Test>) -> Result<()> {
    let queries = read(&filter.dns_query, pattern).context("dns_query")?;
    add(tests, queries, |flow, one| match record(flow) {
        Some(Record::Dns(dns)) => one.is_match(&dns.query),
        _ => false,
    });
    let asks = [
        ("http_status_code", filter.http_status_code.is_empty()),
        ("http_method", filter.http_method.is_empty()),
        ("http_path", filter.http_path.is_empty()),
        ("http_url", filter.http_url.is_empty()),
        ("http_header", filter.http_header.is_empty()),
    ];
    let others = |kinds: &[crate::flow::EventTypeFilter]| {
        !kinds.is_empty() && kinds.iter().all(|kind| kind.r#type != event::L7)
    };
    if let Some((what, _)) = asks.iter().find(|(_, none)| !none)
        && others(&filter.event_type)
    {
        bail!("{what}: only events of the type l7 have one, and others are asked for");
    }
    let codes = read(&filter.http_status_code, Codes::parse).context("http_status_code")?;
    add(tests, codes, |flow, one| {
        http(flow).is_some_and(|http| one.has(http.code))
    });
    add(tests, filter.http_method.clone(), |flow, one| {
        http(flow).is_some_and(|http| http.method.eq_ignore_ascii_case(one))
    });
    let urls = read(&filter.http_url, pattern).context("http_url")?;
    add(tests, urls, |flow, one| {
        http(flow).is_some_and(|http| one.is_match(&http.url))
    });
    let paths = read(&filter.http_path, pattern).context("http_path")?;
    add(tests, paths, |flow, one| {
        http(flow).is_some_and(|http| !http.url.is_empty() && one.is_match(path(&http.url)))
    });
    add(tests, filter.http_header.clone(), |flow, one| {
        http(flow).is_some_and(|http| http.headers.contains(one))
    });
    Ok(())
}

/// Codes of answers: `404`, or all with a beginning: `5+`, `40+`.
struct Codes {
    from: u32,
    below: u32,
}

impl Codes {
    fn parse(text: &str) -> Result<Self> {
        let digits = text.strip_suffix('+').unwrap_or(text);
        let is_whole = digits.len() == text.len();
        let scale = match (digits.len(), is_whole) {
            (3, true) => 1,
            (2, false) => 10,
            (1, false) => 100,
            _ => 0,
        };
        let number = digits
            .bytes()
            .all(|digit| digit.is_ascii_digit())
            .then(|| digits.parse::<u32>().ok())
            .flatten()
            .filter(|_| scale != 0 && matches!(digits.as_bytes().first(), Some(b'1'..=b'5')))
            .with_context(|| format!("{text:?} is neither a code such as 404 nor 4+ or 40+"))?;
        Ok(Self {
            from: number * scale,
            below: (number + 1) * scale,
        })
    }

    fn has(&self, code: u32) -> bool {
        (self.from..self.below).contains(&code)
    }
}

#[cfg(test)]
mod tests;
