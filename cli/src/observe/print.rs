//! Flows as `hubble observe` prints them.

use std::io::{IsTerminal, Write};

use anyhow::{Context, Result};
use clap::ValueEnum;
use k8s_openapi::jiff::Timestamp;
use xebec_agent::flows::RULE_LABEL;
use xebec_hubble::event;
use xebec_hubble::flow::layer4::Protocol;
use xebec_hubble::flow::layer7::Record;
use xebec_hubble::flow::{
    DropReason, Flow, L7FlowType, LostEvent, Policy, SocketTranslationPoint, TrafficDirection,
    Verdict,
};
use xebec_hubble::observer::GetFlowsResponse;
use xebec_hubble::observer::get_flows_response::ResponseTypes;
use xebec_hubble::relay::{NodeState, NodeStatusEvent};

use super::time::Format;

/// The form of the output.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Output {
    /// One line a flow
    Compact,
    /// A line for each of its parts
    Dict,
    /// One JSON object a line: GetFlowsResponse of Hubble's API
    Json,
    /// The same as json
    Jsonpb,
    /// Columns; not with --follow
    #[value(alias = "tab")]
    Table,
}

/// When there are colours.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Color {
    /// On a terminal, unless NO_COLOR is set
    Auto,
    /// Always
    Always,
    /// Never
    Never,
}

/// How flows are printed.
#[derive(Clone, Copy, Debug)]
pub struct Style {
    pub output: Output,
    pub color: Color,
    /// Whether ends are called by their names.
    pub names: bool,
    pub node_name: bool,
    pub policy_names: bool,
    pub time: Format,
}

impl Style {
    /// Whether whole messages are printed.
    pub fn is_json(&self) -> bool {
        matches!(self.output, Output::Json | Output::Jsonpb)
    }
}

/// Prints to one place, and what is no flow to another.
pub struct Printer<O, E> {
    style: Style,
    paint: Paint,
    out: O,
    errors: E,
    /// Whether something was printed.
    began: bool,
    /// Rows of a table, which is as wide as its widest.
    rows: Vec<Vec<String>>,
}

impl Printer<std::io::Stdout, std::io::Stderr> {
    /// Prints to the terminal.
    pub fn to_terminal(style: Style) -> Self {
        Self::new(style, std::io::stdout(), std::io::stderr())
    }
}

impl<O: Write, E: Write> Printer<O, E> {
    fn new(style: Style, out: O, errors: E) -> Self {
        let on = match style.color {
            Color::Always => true,
            Color::Never => false,
            Color::Auto => {
                std::io::stdout().is_terminal() && std::env::var_os("NO_COLOR").is_none()
            }
        };
        // Columns are measured with their colours.
        let on = on && matches!(style.output, Output::Compact | Output::Dict);
        Self {
            style,
            paint: Paint { on },
            out,
            errors,
            began: false,
            rows: Vec::new(),
        }
    }

    /// Prints one answer; false when nobody reads any more.
    pub fn print(&mut self, answer: &GetFlowsResponse) -> Result<bool> {
        let written = if self.style.is_json() {
            let line = serde_json::to_string(answer).context("could not write JSON")?;
            let out: &mut dyn Write = match answer.response_types {
                Some(ResponseTypes::NodeStatus(_)) => &mut self.errors,
                _ => &mut self.out,
            };
            writeln!(out, "{line}").and_then(|()| out.flush())
        } else {
            match &answer.response_types {
                Some(ResponseTypes::Flow(flow)) => self.flow(flow),
                Some(ResponseTypes::LostEvents(lost)) => self.lost(answer, lost),
                Some(ResponseTypes::NodeStatus(status)) => self.status(answer, status),
                None => Ok(()),
            }
        };
        match written {
            Ok(()) => Ok(true),
            Err(error) if error.kind() == std::io::ErrorKind::BrokenPipe => Ok(false),
            Err(error) => Err(error).context("could not write"),
        }
    }

    /// Prints what waits for the end.
    pub fn finish(mut self) -> Result<()> {
        crate::text::write_grid(&mut self.out, &std::mem::take(&mut self.rows))
    }

    fn time(&self, time: Option<&xebec_hubble::wkt::Timestamp>) -> String {
        time.and_then(|time| Timestamp::try_from(*time).ok())
            .map_or_else(|| "N/A".to_owned(), |time| self.style.time.write(time))
    }

    /// A row of a table, under the header that all have.
    fn row(&mut self, node: &str, time: String, row: [String; 5]) {
        let node_name = self.style.node_name;
        let whole = |time: String, node: String, row: [String; 5]| {
            let node = node_name.then_some(node);
            [time].into_iter().chain(node).chain(row).collect()
        };
        if self.rows.is_empty() {
            let header = ["SOURCE", "DESTINATION", "TYPE", "VERDICT", "SUMMARY"];
            let header = header.map(str::to_owned);
            self.rows
                .push(whole("TIMESTAMP".to_owned(), "NODE".to_owned(), header));
        }
        self.rows.push(whole(time, node.to_owned(), row));
    }

    /// Lines of names and values.
    fn dict(&mut self, lines: &[(&str, String)]) -> std::io::Result<()> {
        if std::mem::replace(&mut self.began, true) {
            writeln!(self.out, "------------")?;
        }
        for (name, value) in lines {
            writeln!(self.out, "{name:>11}: {value}")?;
        }
        self.out.flush()
    }

    fn flow(&mut self, flow: &Flow) -> std::io::Result<()> {
        let time = self.time(flow.time.as_ref());
        let [from, to] = self.ends(flow);
        let (kind, verdict) = (kind(flow), self.verdict(flow));
        let mut summary = flow.summary.clone();
        if !self.style.policy_names
            && let Some(by) = decided_by(flow)
        {
            summary = format!("{summary}; by {by}");
        }
        match self.style.output {
            Output::Table => {
                self.row(&flow.node_name, time, [from, to, kind, verdict, summary]);
                Ok(())
            }
            Output::Dict => {
                let node = ("NODE", flow.node_name.clone());
                let node = self.style.node_name.then_some(node);
                let lines: Vec<_> = [("TIMESTAMP", time)]
                    .into_iter()
                    .chain(node)
                    .chain([
                        ("SOURCE", from),
                        ("DESTINATION", to),
                        ("TYPE", kind),
                        ("VERDICT", verdict),
                        ("SUMMARY", summary),
                    ])
                    .collect();
                self.dict(&lines)
            }
            _ => {
                let node = if self.style.node_name {
                    format!(" [{}]", flow.node_name)
                } else {
                    String::new()
                };
                let identity = |end: Option<&xebec_hubble::flow::Endpoint>| {
                    let number = end.map_or(0, |end| end.identity);
                    let text = match event::reserved_identity(number) {
                        Some(name) => format!("({name})"),
                        None => format!("(ID:{number})"),
                    };
                    self.paint.magenta(&text)
                };
                let ends = [
                    (from, identity(flow.source.as_ref())),
                    (to, identity(flow.destination.as_ref())),
                ];
                let [one, other] = ends;
                let (left, arrow, right) = match flow.is_reply.as_ref().map(|reply| reply.value) {
                    Some(true) => (other, "<-", one),
                    Some(false) => (one, "->", other),
                    None => (one, "<>", other),
                };
                let line = format!(
                    "{time}{node}: {} {} {arrow} {} {} {kind} {verdict} ({summary})",
                    left.0, left.1, right.0, right.1
                );
                writeln!(self.out, "{line}").and_then(|()| self.out.flush())
            }
        }
    }

    /// Source and destination, as they are called.
    fn ends(&self, flow: &Flow) -> [String; 2] {
        let ports = match flow.l4.as_ref().and_then(|l4| l4.protocol.as_ref()) {
            Some(Protocol::Tcp(tcp)) => [tcp.source_port, tcp.destination_port],
            Some(Protocol::Udp(udp)) => [udp.source_port, udp.destination_port],
            Some(Protocol::Sctp(sctp)) => [sctp.source_port, sctp.destination_port],
            _ => [0, 0],
        };
        let ip = flow.ip.as_ref();
        let ends = [
            (
                ip.map(|ip| &ip.source),
                &flow.source,
                &flow.source_service,
                &flow.source_names,
                ports[0],
            ),
            (
                ip.map(|ip| &ip.destination),
                &flow.destination,
                &flow.destination_service,
                &flow.destination_names,
                ports[1],
            ),
        ];
        ends.map(|(address, endpoint, service, names, port)| {
            let pod = endpoint.as_ref().filter(|end| !end.pod_name.is_empty());
            let service = service.as_ref().filter(|service| !service.name.is_empty());
            let mut host = match (self.style.names, pod, service) {
                (true, Some(pod), _) => join(&pod.namespace, &pod.pod_name),
                (true, None, Some(service)) => join(&service.namespace, &service.name),
                (true, None, None) if !names.is_empty() => names.join(","),
                _ => address.cloned().unwrap_or_default(),
            };
            if port != 0 {
                // An address of IPv6 stands in brackets before a port.
                if host.contains(':') {
                    host = format!("[{host}]");
                }
                host = format!("{host}:{}", self.paint.yellow(&port.to_string()));
            }
            self.paint.cyan(&host)
        })
    }

    fn verdict(&self, flow: &Flow) -> String {
        let of_policy =
            flow.event_type.as_ref().map(|kind| kind.r#type) == Some(event::POLICY_VERDICT);
        let name = |plain: &'static str, policy: &'static str| {
            if of_policy { policy } else { plain }
        };
        let verdict = flow.verdict();
        let plain = verdict.as_str_name();
        match verdict {
            Verdict::Forwarded | Verdict::Redirected => {
                let names = self.policies(flow, of_policy, false);
                self.paint
                    .green(&format!("{}{names}", name(plain, "ALLOWED")))
            }
            Verdict::Dropped | Verdict::Error => {
                let names = self.policies(flow, of_policy, true);
                self.paint.red(&format!("{}{names}", name(plain, "DENIED")))
            }
            Verdict::Audit => self.paint.yellow(name(plain, "AUDITED")),
            Verdict::Traced | Verdict::Translated => self.paint.yellow(plain),
            Verdict::Unknown => plain.to_owned(),
        }
    }

    /// Names of the policies behind a verdict, as `--print-policy-names` has them.
    fn policies(&self, flow: &Flow, of_policy: bool, denied: bool) -> String {
        if !self.style.policy_names || !of_policy {
            return String::new();
        }
        let policies = match (flow.traffic_direction(), denied) {
            (TrafficDirection::Egress, false) => &flow.egress_allowed_by,
            (TrafficDirection::Egress, true) => &flow.egress_denied_by,
            (_, false) => &flow.ingress_allowed_by,
            (_, true) => &flow.ingress_denied_by,
        };
        let names = policies
            .iter()
            .map(|one| format!("{} ({})", one.name, one.kind));
        let names: Vec<String> = names.collect();
        if names.is_empty() {
            return String::new();
        }
        format!(" BY {}", names.join(", "))
    }

    fn lost(&mut self, answer: &GetFlowsResponse, lost: &LostEvent) -> std::io::Result<()> {
        let time = self.time(answer.time.as_ref());
        let source = lost.source().as_str_name().to_owned();
        let cpu = lost
            .cpu
            .as_ref()
            .map(|cpu| format!("CPU({}) - ", cpu.value));
        let summary = format!("{}{}", cpu.unwrap_or_default(), lost.num_events_lost);
        let node = &answer.node_name;
        match self.style.output {
            Output::Table => {
                let none = || "-".to_owned();
                let row = [source, none(), "EVENTS LOST".to_owned(), none(), summary];
                self.row(node, time, row);
                Ok(())
            }
            Output::Dict => {
                let node = self.style.node_name.then(|| ("NODE", node.clone()));
                let lines: Vec<_> = [("TIMESTAMP", time)]
                    .into_iter()
                    .chain(node)
                    .chain([
                        ("SOURCE", source),
                        ("TYPE", "EVENTS LOST".to_owned()),
                        ("SUMMARY", summary),
                    ])
                    .collect();
                self.dict(&lines)
            }
            _ => {
                let node = if self.style.node_name {
                    format!(" [{node}]")
                } else {
                    String::new()
                };
                writeln!(self.out, "{time}{node}: EVENTS LOST: {source} {summary}")
                    .and_then(|()| self.out.flush())
            }
        }
    }

    /// What is wrong with nodes; that all is well is not told.
    fn status(
        &mut self,
        answer: &GetFlowsResponse,
        status: &NodeStatusEvent,
    ) -> std::io::Result<()> {
        let nodes = status.node_names.join(", ");
        let what = match status.state_change() {
            NodeState::NodeUnavailable => format!("nodes that do not answer: {nodes}"),
            NodeState::NodeError => format!("{:?} on nodes {nodes}", status.message),
            _ => return Ok(()),
        };
        let time = self.time(answer.time.as_ref());
        writeln!(self.errors, "{time} [{}]: {what}", answer.node_name)
    }
}

/// Source and destination, by their names where they have any.
pub fn ends(flow: &Flow) -> [String; 2] {
    let style = Style {
        output: Output::Compact,
        color: Color::Never,
        names: true,
        node_name: false,
        policy_names: false,
        time: Format::StampMilli,
    };
    Printer::new(style, std::io::sink(), std::io::sink()).ends(flow)
}

fn join(namespace: &str, name: &str) -> String {
    if namespace.is_empty() {
        name.to_owned()
    } else {
        format!("{namespace}/{name}")
    }
}

/// What kind of event it is.
pub fn kind(flow: &Flow) -> String {
    if let Some(l7) = &flow.l7 {
        let what = match l7.r#type() {
            L7FlowType::Request => "request",
            L7FlowType::Response => "response",
            L7FlowType::Sample => "sample",
            L7FlowType::UnknownL7Type => "unknown_l7_type",
        };
        return match &l7.record {
            Some(Record::Dns(dns)) => format!("dns-{what} {}", dns.observation_source),
            Some(Record::Http(_)) => format!("http-{what}"),
            None => format!("l7-{what}"),
        };
    }
    let Some(kind) = &flow.event_type else {
        return "UNKNOWN".to_owned();
    };
    match kind.r#type {
        event::TRACE => {
            let point = event::POINTS
                .iter()
                .find(|(_, number)| *number == kind.sub_type);
            point.map_or_else(|| kind.sub_type.to_string(), |(name, _)| (*name).to_owned())
        }
        event::DROP => DropReason::try_from(kind.sub_type).map_or_else(
            |_| kind.sub_type.to_string(),
            |reason| reason.as_str_name().to_owned(),
        ),
        event::POLICY_VERDICT => {
            const MATCHES: [&str; 7] = [
                "none",
                "L3-Only",
                "L3-L4",
                "L4-Only",
                "all",
                "L3-Proto",
                "Proto-Only",
            ];
            let by = usize::try_from(flow.policy_match_type).ok();
            let by = by.and_then(|by| MATCHES.get(by)).unwrap_or(&"unknown");
            format!(
                "policy-verdict:{by} {}",
                flow.traffic_direction().as_str_name()
            )
        }
        event::CAPTURE => flow.debug_capture_point().as_str_name().to_owned(),
        event::TRACE_SOCK => match flow.sock_xlate_point() {
            SocketTranslationPoint::SockXlatePointPreDirectionFwd => "pre-xlate-fwd",
            SocketTranslationPoint::SockXlatePointPostDirectionFwd => "post-xlate-fwd",
            SocketTranslationPoint::SockXlatePointPreDirectionRev => "pre-xlate-rev",
            SocketTranslationPoint::SockXlatePointPostDirectionRev => "post-xlate-rev",
            other => other.as_str_name(),
        }
        .to_owned(),
        _ => "UNKNOWN".to_owned(),
    }
}

/// The policies that decided, with the place of the rule where one of them says so.
pub fn decided_by(flow: &Flow) -> Option<String> {
    let lists = [
        (&flow.ingress_denied_by, "ingress"),
        (&flow.egress_denied_by, "egress"),
        (&flow.ingress_allowed_by, "ingress"),
        (&flow.egress_allowed_by, "egress"),
    ];
    let (policies, direction) = lists.into_iter().find(|(list, _)| !list.is_empty())?;
    let one = |policy: &Policy| {
        let place = policy.labels.iter().find_map(|label| {
            let (key, place) = label.split_once('=')?;
            (key == RULE_LABEL).then_some(place)
        });
        let name = join(&policy.namespace, &policy.name);
        format!("{} {name} {}", policy.kind, place.unwrap_or(direction))
    };
    let all: Vec<String> = policies.iter().map(one).collect();
    Some(all.join(", "))
}

/// Colours of a terminal.
struct Paint {
    on: bool,
}

impl Paint {
    fn with(&self, code: u8, text: &str) -> String {
        if self.on {
            format!("\x1b[{code}m{text}\x1b[0m")
        } else {
            text.to_owned()
        }
    }

    fn red(&self, text: &str) -> String {
        self.with(31, text)
    }

    fn green(&self, text: &str) -> String {
        self.with(32, text)
    }

    fn yellow(&self, text: &str) -> String {
        self.with(33, text)
    }

    fn magenta(&self, text: &str) -> String {
        self.with(35, text)
    }

    fn cyan(&self, text: &str) -> String {
        self.with(36, text)
    }
}

#[cfg(test)]
mod tests;
