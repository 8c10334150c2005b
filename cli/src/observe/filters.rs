//! Filters as `hubble observe` takes them: flags, each of which may stand several times, and `--not` before one.

use std::collections::BTreeSet;

use anyhow::{Context, Result, bail, ensure};
use clap::builder::PossibleValuesParser;
use clap::{Arg, ArgAction, ArgMatches, Command};
use xebec_hubble::event;
use xebec_hubble::flow::{
    DropReason, EventTypeFilter, FlowFilter, HttpHeader, IpVersion, NetworkInterface, TcpFlags,
    TrafficDirection, Verdict, Workload,
};

/// What a flag takes.
enum Takes {
    /// Text, called so in the help.
    Text(&'static str),
    /// One of these.
    OneOf(fn() -> Vec<&'static str>),
    /// Nothing.
    Nothing,
}
use Takes::{Nothing, OneOf, Text};

struct Flag(&'static str, Option<char>, Takes, &'static str);

/// Flags of filters, in the order of the help.
const FLAGS: &[Flag] = &[
    Flag(
        "namespace",
        Some('n'),
        Text("NAMESPACE"),
        "Flows from or to pods of this namespace",
    ),
    Flag(
        "from-namespace",
        None,
        Text("NAMESPACE"),
        "Flows from pods of this namespace",
    ),
    Flag(
        "to-namespace",
        None,
        Text("NAMESPACE"),
        "Flows to pods of this namespace",
    ),
    Flag(
        "all-namespaces",
        Some('A'),
        Nothing,
        "Flows from or to pods of any namespace",
    ),
    Flag(
        "from-all-namespaces",
        None,
        Nothing,
        "Flows from pods of any namespace",
    ),
    Flag(
        "to-all-namespaces",
        None,
        Nothing,
        "Flows to pods of any namespace",
    ),
    Flag(
        "pod",
        None,
        Text("POD"),
        "Flows from or to pods whose names begin so: [namespace/]name, of `default` if no namespace is named",
    ),
    Flag("from-pod", None, Text("POD"), "Flows from such pods"),
    Flag("to-pod", None, Text("POD"), "Flows to such pods"),
    Flag(
        "label",
        Some('l'),
        Text("SELECTOR"),
        "Flows from or to whom this label selector selects, such as app=web or reserved:world",
    ),
    Flag(
        "from-label",
        None,
        Text("SELECTOR"),
        "Flows from whom it selects",
    ),
    Flag(
        "to-label",
        None,
        Text("SELECTOR"),
        "Flows to whom it selects",
    ),
    Flag(
        "workload",
        None,
        Text("WORKLOAD"),
        "Flows from or to pods of this workload: [kind/]name",
    ),
    Flag(
        "from-workload",
        None,
        Text("WORKLOAD"),
        "Flows from pods of this workload",
    ),
    Flag(
        "to-workload",
        None,
        Text("WORKLOAD"),
        "Flows to pods of this workload",
    ),
    Flag(
        "service",
        None,
        Text("SERVICE"),
        "Flows from or to Services whose names begin so: [namespace/]name",
    ),
    Flag(
        "from-service",
        None,
        Text("SERVICE"),
        "Flows from such Services",
    ),
    Flag(
        "to-service",
        None,
        Text("SERVICE"),
        "Flows to such Services",
    ),
    Flag(
        "identity",
        None,
        Text("IDENTITY"),
        "Flows from or to this identity: a number, or a name such as world",
    ),
    Flag(
        "from-identity",
        None,
        Text("IDENTITY"),
        "Flows from this identity",
    ),
    Flag(
        "to-identity",
        None,
        Text("IDENTITY"),
        "Flows to this identity",
    ),
    Flag(
        "ip",
        None,
        Text("IP"),
        "Flows from or to this address or range, such as 192.0.2.1 or 192.0.2.0/24",
    ),
    Flag(
        "from-ip",
        None,
        Text("IP"),
        "Flows from this address or range",
    ),
    Flag("to-ip", None, Text("IP"), "Flows to this address or range"),
    Flag(
        "snat-ip",
        None,
        Text("IP"),
        "Flows whose source became this address or range",
    ),
    Flag("ipv4", Some('4'), Nothing, "Only IPv4"),
    Flag("ipv6", Some('6'), Nothing, "Only IPv6"),
    Flag(
        "ip-version",
        None,
        OneOf(|| vec!["v4", "v6", "none"]),
        "Only this version of IP",
    ),
    Flag(
        "fqdn",
        None,
        Text("DOMAIN"),
        "Flows from or to this domain, such as *.example.com",
    ),
    Flag("from-fqdn", None, Text("DOMAIN"), "Flows from this domain"),
    Flag("to-fqdn", None, Text("DOMAIN"), "Flows to this domain"),
    Flag("port", None, Text("PORT"), "Flows from or to this port"),
    Flag("from-port", None, Text("PORT"), "Flows from this port"),
    Flag("to-port", None, Text("PORT"), "Flows to this port"),
    Flag(
        "protocol",
        None,
        OneOf(|| {
            vec![
                "tcp", "udp", "sctp", "icmp", "icmpv4", "icmpv6", "http", "dns",
            ]
        }),
        "Only this protocol",
    ),
    Flag(
        "tcp-flags",
        None,
        Text("FLAGS"),
        "Only packets with these TCP flags, such as syn or syn,ack",
    ),
    Flag(
        "verdict",
        None,
        OneOf(verdicts),
        "Only flows with this verdict",
    ),
    Flag(
        "drop-reason-desc",
        None,
        OneOf(reasons),
        "Only flows dropped for this reason",
    ),
    Flag(
        "type",
        Some('t'),
        Text("TYPE"),
        "Only events of this type: drop, policy-verdict, trace[:from-endpoint and the like], trace-sock, l7, capture",
    ),
    Flag(
        "traffic-direction",
        None,
        OneOf(|| vec!["ingress", "egress"]),
        "Only flows into pods, or out of them",
    ),
    Flag("reply", None, Nothing, "Only replies (with --not: none)"),
    Flag(
        "http-status",
        None,
        Text("CODE"),
        "Only HTTP answers with this code, such as 404, or 4+ for all from 400 to 499",
    ),
    Flag(
        "http-method",
        None,
        Text("METHOD"),
        "Only HTTP requests with this method",
    ),
    Flag(
        "http-path",
        None,
        Text("REGEX"),
        "Only HTTP requests for a path like this regular expression",
    ),
    Flag(
        "http-url",
        None,
        Text("REGEX"),
        "Only HTTP requests for a URL like this regular expression",
    ),
    Flag(
        "http-header",
        None,
        Text("KEY:VALUE"),
        "Only HTTP requests with this header",
    ),
    Flag(
        "dns-query",
        None,
        Text("REGEX"),
        "Only DNS questions for names like this regular expression",
    ),
    Flag(
        "node-name",
        None,
        Text("NODE"),
        "Only flows of these nodes, such as node1 or node*",
    ),
    Flag(
        "node-label",
        None,
        Text("SELECTOR"),
        "Only flows of nodes that this label selector selects",
    ),
    Flag(
        "interface",
        None,
        Text("DEVICE"),
        "Only flows seen at this device",
    ),
    Flag(
        "cluster",
        None,
        Text("CLUSTER"),
        "Flows from or to pods of this cluster",
    ),
    Flag(
        "from-cluster",
        None,
        Text("CLUSTER"),
        "Flows from pods of this cluster",
    ),
    Flag(
        "to-cluster",
        None,
        Text("CLUSTER"),
        "Flows to pods of this cluster",
    ),
    Flag("encrypted", None, Nothing, "Only encrypted flows"),
    Flag(
        "unencrypted",
        None,
        Nothing,
        "Only flows that are not encrypted",
    ),
    Flag("uuid", None, Text("UUID"), "Only the flow of this name"),
    Flag("trace-id", None, Text("ID"), "Only flows of this trace"),
    Flag(
        "cel-expression",
        None,
        Text("CEL"),
        "Only flows of which this CEL expression is true",
    ),
];

/// Of which no two may stand together: they say different things of the same end.
const CONFLICTS: &[&[&str]] = &[
    &[
        "from-fqdn",
        "from-ip",
        "ip",
        "fqdn",
        "from-namespace",
        "namespace",
        "from-all-namespaces",
        "all-namespaces",
    ],
    &["from-fqdn", "from-ip", "ip", "fqdn", "from-pod", "pod"],
    &[
        "to-fqdn",
        "to-ip",
        "ip",
        "fqdn",
        "to-namespace",
        "namespace",
        "to-all-namespaces",
        "all-namespaces",
    ],
    &["to-fqdn", "to-ip", "ip", "fqdn", "to-pod", "pod"],
    &["to-pod", "namespace", "all-namespaces"],
    &["from-pod", "namespace", "all-namespaces"],
    &["to-service", "namespace", "all-namespaces"],
    &["from-service", "namespace", "all-namespaces"],
    &["label", "from-label"],
    &["label", "to-label"],
    &["service", "from-service"],
    &["service", "to-service"],
    &["port", "from-port"],
    &["port", "to-port"],
    &["identity", "from-identity"],
    &["identity", "to-identity"],
    &["workload", "from-workload"],
    &["workload", "to-workload"],
    &["encrypted", "unencrypted"],
];

fn verdicts() -> Vec<&'static str> {
    (1..)
        .map_while(|number| Verdict::try_from(number).ok())
        .map(|verdict| verdict.as_str_name())
        .collect()
}

fn reasons() -> Vec<&'static str> {
    (1..256)
        .filter_map(|number| DropReason::try_from(number).ok())
        .map(|reason| reason.as_str_name())
        .collect()
}

/// The filters of a command line.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct FilterArgs {
    /// A flow passes one of these.
    pub allow: Vec<FlowFilter>,
    /// And none of these.
    pub deny: Vec<FlowFilter>,
}

impl clap::Args for FilterArgs {
    fn augment_args(mut command: Command) -> Command {
        const HEADING: &str = "Filters: a flow passes with one of the values of each flag";
        for Flag(name, short, takes, help) in FLAGS {
            let mut arg = Arg::new(*name)
                .long(*name)
                .help(*help)
                .help_heading(HEADING)
                .action(ArgAction::Append);
            if let Some(short) = short {
                arg = arg.short(*short);
            }
            arg = match takes {
                Text(what) => arg.value_name(*what),
                OneOf(values) => arg
                    .ignore_case(true)
                    .hide_possible_values(values().len() > 8)
                    .value_parser(PossibleValuesParser::new(values())),
                Nothing => switch(arg),
            };
            command = command.arg(arg);
        }
        let not = Arg::new("not")
            .long("not")
            .help("Flows that do not pass the next flag")
            .help_heading(HEADING);
        command.arg(switch(not))
    }

    fn augment_args_for_update(command: Command) -> Command {
        Self::augment_args(command)
    }
}

/// A flag without a value that may stand several times, each at its place.
fn switch(arg: Arg) -> Arg {
    arg.action(ArgAction::Append)
        .num_args(0)
        .default_missing_value("true")
}

impl clap::FromArgMatches for FilterArgs {
    fn from_arg_matches(matches: &ArgMatches) -> Result<Self, clap::Error> {
        let mut given = Vec::new();
        for name in FLAGS.iter().map(|flag| flag.0).chain(["not"]) {
            let values = matches.get_many::<String>(name).into_iter().flatten();
            let places = matches.indices_of(name).into_iter().flatten();
            given.extend(
                places
                    .zip(values)
                    .map(|(place, value)| (place, name, value.as_str())),
            );
        }
        given.sort_unstable();
        Self::read(given.into_iter().map(|(_, name, value)| (name, value))).map_err(|error| {
            clap::Error::raw(
                clap::error::ErrorKind::ValueValidation,
                format!("{error:#}\n"),
            )
        })
    }

    fn update_from_arg_matches(&mut self, matches: &ArgMatches) -> Result<(), clap::Error> {
        *self = Self::from_arg_matches(matches)?;
        Ok(())
    }
}

impl FilterArgs {
    /// Reads flags as a shell would divide them.
    ///
    /// # Errors
    /// Says what of it is no filter.
    pub fn parse(text: &str) -> Result<Self, String> {
        use clap::{Args, FromArgMatches};
        let words = shlex::split(text).ok_or_else(|| "a quotation mark has no other".to_owned())?;
        let command =
            Self::augment_args(Command::new("filter").no_binary_name(true)).disable_help_flag(true);
        let read = command
            .try_get_matches_from(words)
            .and_then(|matches| Self::from_arg_matches(&matches));
        // How to ask for help is of no use here.
        let first = |error: clap::Error| {
            let text = error.render().to_string();
            let text = text.split("\n\nUsage:").next().unwrap_or_default();
            text.trim_start_matches("error: ").trim().to_owned()
        };
        read.map_err(first)
    }

    /// Reads flags and values in the order in which they were given.
    fn read<'a>(given: impl Iterator<Item = (&'a str, &'a str)>) -> Result<Self> {
        let (mut allow, mut deny) = (Half::default(), Half::default());
        let mut not = false;
        for (name, value) in given {
            if name == "not" {
                ensure!(!not, "--not stands before another --not");
                not = true;
                continue;
            }
            let half = if not { &mut deny } else { &mut allow };
            not = false;
            half.set(name, value)
                .with_context(|| format!("--{name} {value}"))?;
        }
        ensure!(!not, "--not stands before no filter");
        Ok(Self {
            allow: allow.filters()?,
            deny: deny.filters()?,
        })
    }
}

/// What passes, or what does not: flags for either end ask for one filter of each end.
#[derive(Default)]
struct Half {
    given: BTreeSet<String>,
    /// With what flags for either end ask of the source.
    left: FlowFilter,
    /// With what they ask of the destination.
    right: FlowFilter,
    namespaces: Vec<String>,
    from_namespaces: Vec<String>,
    to_namespaces: Vec<String>,
}

impl Half {
    fn both(&mut self, change: impl Fn(&mut FlowFilter)) {
        change(&mut self.left);
        change(&mut self.right);
    }

    fn set(&mut self, name: &str, value: &str) -> Result<()> {
        self.given.insert(name.to_owned());
        for group in CONFLICTS.iter().filter(|group| group.contains(&name)) {
            if let Some(other) = group
                .iter()
                .find(|other| **other != name && self.given.contains(**other))
            {
                bail!("--{name} and --{other} can't stand together");
            }
        }
        let text = || value.to_owned();
        let workload = || {
            let (kind, name) = value.split_once('/').unwrap_or(("", value));
            Workload {
                name: name.to_owned(),
                kind: kind.to_owned(),
            }
        };
        let (mut end, mut other) = (End::Source, Some(End::Destination));
        let mut what = name;
        if let Some(rest) = name.strip_prefix("from-") {
            (other, what) = (None, rest);
        } else if let Some(rest) = name.strip_prefix("to-") {
            (end, other, what) = (End::Destination, None, rest);
        }
        let mut of_end = |change: &dyn Fn(&mut FlowFilter, End)| match other {
            Some(other) => {
                change(&mut self.left, end);
                change(&mut self.right, other);
            }
            None => self.both(|filter| change(filter, end)),
        };
        match what {
            "pod" => of_end(&|f, end| end.pods(f).push(text())),
            "service" => of_end(&|f, end| end.services(f).push(text())),
            "label" => of_end(&|f, end| end.labels(f).push(text())),
            "ip" => of_end(&|f, end| end.addresses(f).push(text())),
            "fqdn" => of_end(&|f, end| end.domains(f).push(text())),
            "port" => of_end(&|f, end| end.ports(f).push(text())),
            "cluster" => of_end(&|f, end| end.clusters(f).push(text())),
            "workload" => of_end(&|f, end| end.workloads(f).push(workload())),
            "identity" => {
                let number = identity(value)?;
                of_end(&|f, end| end.identities(f).push(number));
            }
            "namespace" | "all-namespaces" => {
                let namespace = if what == "namespace" {
                    text()
                } else {
                    String::new()
                };
                match (end, other) {
                    (_, Some(_)) => self.namespaces.push(namespace),
                    (End::Source, None) => self.from_namespaces.push(namespace),
                    (End::Destination, None) => self.to_namespaces.push(namespace),
                }
            }
            _ => self.set_whole(what, value)?,
        }
        Ok(())
    }

    /// What is not about one of the ends.
    fn set_whole(&mut self, name: &str, value: &str) -> Result<()> {
        let text = || value.to_owned();
        let upper = value.to_ascii_uppercase();
        match name {
            "snat-ip" => self.both(|f| f.source_ip_xlated.push(text())),
            "ipv4" => self.both(|f| f.ip_version.push(IpVersion::IPv4.into())),
            "ipv6" => self.both(|f| f.ip_version.push(IpVersion::IPv6.into())),
            "ip-version" => {
                let version = match value {
                    "v4" => IpVersion::IPv4,
                    "v6" => IpVersion::IPv6,
                    _ => IpVersion::IpNotUsed,
                };
                self.both(|f| f.ip_version.push(version.into()));
            }
            "protocol" => self.both(|f| f.protocol.push(text())),
            "tcp-flags" => {
                let flags = tcp_flags(value)?;
                self.both(|f| f.tcp_flags.push(flags));
            }
            "verdict" => {
                let verdict = Verdict::from_str_name(&upper).context("no verdict")?;
                self.both(|f| f.verdict.push(verdict.into()));
            }
            "drop-reason-desc" => {
                let reason = DropReason::from_str_name(&upper).context("no reason")?;
                self.both(|f| f.drop_reason_desc.push(reason.into()));
            }
            "type" => {
                let kind = event_type(value)?;
                self.both(|f| f.event_type.push(kind));
            }
            "traffic-direction" => {
                let direction = TrafficDirection::from_str_name(&upper).context("no direction")?;
                self.both(|f| f.traffic_direction.push(direction.into()));
            }
            "reply" => self.both(|f| f.reply.push(true)),
            "http-status" => self.both(|f| f.http_status_code.push(text())),
            "http-method" => self.both(|f| f.http_method.push(text())),
            "http-path" => self.both(|f| f.http_path.push(text())),
            "http-url" => self.both(|f| f.http_url.push(text())),
            "http-header" => {
                let (key, value) = value.split_once(':').context("it is KEY:VALUE")?;
                self.both(|f| {
                    f.http_header.push(HttpHeader {
                        key: key.to_owned(),
                        value: value.to_owned(),
                    });
                });
            }
            "dns-query" => self.both(|f| f.dns_query.push(text())),
            "node-name" => self.both(|f| f.node_name.push(text())),
            "node-label" => self.both(|f| f.node_labels.push(text())),
            "interface" => self.both(|f| {
                f.interface.push(NetworkInterface {
                    index: 0,
                    name: text(),
                });
            }),
            "encrypted" => self.both(|f| f.encrypted.push(true)),
            "unencrypted" => self.both(|f| f.encrypted.push(false)),
            "uuid" => self.both(|f| f.uuid.push(text())),
            "trace-id" => self.both(|f| f.trace_id.push(text())),
            "cel-expression" => self.both(|f| {
                let experimental = f.experimental.get_or_insert_default();
                experimental.cel_expression.push(text());
            }),
            other => bail!("--{other} is no filter"),
        }
        Ok(())
    }

    /// The filters: one where both ends are asked for the same.
    fn filters(mut self) -> Result<Vec<FlowFilter>> {
        if self.given.is_empty() {
            return Ok(Vec::new());
        }
        for filter in [&mut self.left, &mut self.right] {
            End::Source.is_in_one_namespace(filter)?;
            End::Destination.is_in_one_namespace(filter)?;
        }
        for (filter, mine) in [
            (&mut self.left, End::Source),
            (&mut self.right, End::Destination),
        ] {
            for (end, namespaces) in [
                (End::Destination, &self.to_namespaces),
                (End::Source, &self.from_namespaces),
                (mine, &self.namespaces),
            ] {
                end.put_into(filter, namespaces)?;
            }
        }
        Ok(if self.left == self.right {
            vec![self.left]
        } else {
            vec![self.left, self.right]
        })
    }
}

#[derive(Clone, Copy)]
enum End {
    Source,
    Destination,
}

/// The part of a filter that is about one end.
macro_rules! part {
    ($name:ident: $of:ty = $source:ident, $destination:ident) => {
        fn $name(self, filter: &mut FlowFilter) -> &mut Vec<$of> {
            match self {
                Self::Source => &mut filter.$source,
                Self::Destination => &mut filter.$destination,
            }
        }
    };
}

impl End {
    part!(pods: String = source_pod, destination_pod);
    part!(services: String = source_service, destination_service);
    part!(labels: String = source_label, destination_label);
    part!(addresses: String = source_ip, destination_ip);
    part!(domains: String = source_fqdn, destination_fqdn);
    part!(ports: String = source_port, destination_port);
    part!(clusters: String = source_cluster_name, destination_cluster_name);
    part!(workloads: Workload = source_workload, destination_workload);
    part!(identities: u32 = source_identity, destination_identity);

    /// Whether no Service is asked for with pods of another namespace: nothing is both.
    fn is_in_one_namespace(self, filter: &mut FlowFilter) -> Result<()> {
        let namespace = |name: &str| {
            name.split_once('/')
                .map(|(namespace, _)| namespace.to_owned())
        };
        let pods: Vec<_> = self
            .pods(filter)
            .iter()
            .filter_map(|pod| namespace(pod))
            .collect();
        for pod in pods.iter().filter(|pod| !pod.is_empty()) {
            for service in self.services(filter) {
                ensure!(
                    namespace(service).as_ref() == Some(pod),
                    "the Service {service} is not in the namespace {pod} of the pod"
                );
            }
        }
        Ok(())
    }

    /// Puts names of pods and Services that name no namespace into these, or any pod where there are none.
    fn put_into(self, filter: &mut FlowFilter, namespaces: &[String]) -> Result<()> {
        if namespaces.is_empty() {
            return Ok(());
        }
        if self.pods(filter).is_empty() && self.services(filter).is_empty() {
            self.pods(filter).push(String::new());
        }
        for services in [false, true] {
            let names = match services {
                false => self.pods(filter),
                true => self.services(filter),
            };
            let mut whole = Vec::new();
            for name in names.drain(..) {
                match name.split_once('/') {
                    Some((namespace, _)) => {
                        ensure!(
                            namespace.is_empty() || namespaces.iter().any(|one| one == namespace),
                            "{name} is in none of the namespaces {}",
                            namespaces.join(", ")
                        );
                        whole.push(name);
                    }
                    None => whole.extend(namespaces.iter().map(|one| format!("{one}/{name}"))),
                }
            }
            *names = whole;
        }
        Ok(())
    }
}

fn identity(text: &str) -> Result<u32> {
    let named = event::RESERVED_IDENTITIES
        .iter()
        .find(|(name, _)| *name == text);
    match named {
        Some((_, number)) => Ok(*number),
        None => text.parse().with_context(|| {
            let names: Vec<&str> = event::RESERVED_IDENTITIES.iter().map(|one| one.0).collect();
            format!("neither a number nor one of {}", names.join(", "))
        }),
    }
}

fn tcp_flags(text: &str) -> Result<TcpFlags> {
    let mut flags = TcpFlags::default();
    for name in text.split(',') {
        let flag = match name.to_ascii_uppercase().as_str() {
            "FIN" => &mut flags.fin,
            "SYN" => &mut flags.syn,
            "RST" => &mut flags.rst,
            "PSH" => &mut flags.psh,
            "ACK" => &mut flags.ack,
            "URG" => &mut flags.urg,
            "ECE" => &mut flags.ece,
            "CWR" => &mut flags.cwr,
            "NS" => &mut flags.ns,
            _ => bail!("{name:?} is none of FIN, SYN, RST, PSH, ACK, URG, ECE, CWR and NS"),
        };
        *flag = true;
    }
    Ok(flags)
}

fn event_type(text: &str) -> Result<EventTypeFilter> {
    let (kind, below) = match text.split_once(':') {
        Some((kind, below)) => (kind, Some(below)),
        None => (text, None),
    };
    let find = |names: &[(&str, i32)], name: &str| {
        let named = names.iter().find(|(one, _)| *one == name);
        named
            .map(|(_, number)| *number)
            .or_else(|| name.parse().ok())
    };
    let list = |names: &[(&str, i32)]| {
        let names: Vec<&str> = names.iter().map(|(name, _)| *name).collect();
        names.join(", ")
    };
    let number = find(&event::TYPES, kind)
        .with_context(|| format!("no such type; there are {}", list(&event::TYPES)))?;
    let points = if number == event::TRACE {
        &event::POINTS[..]
    } else {
        &[]
    };
    let below = below.map(|below| {
        find(points, below).with_context(|| {
            format!(
                "{kind} has no {below:?}; it has numbers and {}",
                list(points)
            )
        })
    });
    let below = below.transpose()?;
    Ok(EventTypeFilter {
        r#type: number,
        match_sub_type: below.is_some(),
        sub_type: below.unwrap_or(0),
    })
}

#[cfg(test)]
mod tests;
