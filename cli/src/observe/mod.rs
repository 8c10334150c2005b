//! `xebec observe`: who talked to whom, allowed or dropped, and by which rule; flags and output as in `hubble observe`.

mod filters;
mod print;
pub mod source;
mod time;

use std::path::PathBuf;

use anyhow::{Context, Result, bail, ensure};
use clap::Args;
use k8s_openapi::jiff::Timestamp;
use xebec_hubble::client::Server;
use xebec_hubble::flow::FlowFilter;
use xebec_hubble::mask::Mask;
use xebec_hubble::observer::{GetFlowsRequest, GetFlowsResponse};
use xebec_hubble::order::{Ended, Following};
use xebec_hubble::wkt::FieldMask;

use crate::paths::Layout;
pub use filters::FilterArgs;
use print::{Color, Output, Printer, Style};
pub use print::{decided_by, ends, kind};
pub use source::Tls;
use time::Format;

/// How many flows are shown where nothing else is asked for.
const LAST: u64 = 20;

/// What is shown of a flow where it is no JSON.
const SHOWN: [&str; 24] = [
    "time",
    "verdict",
    "IP",
    "l4",
    "l7",
    "source.identity",
    "source.namespace",
    "source.pod_name",
    "destination.identity",
    "destination.namespace",
    "destination.pod_name",
    "source_names",
    "destination_names",
    "source_service",
    "destination_service",
    "node_name",
    "event_type",
    "is_reply",
    "traffic_direction",
    "policy_match_type",
    "sock_xlate_point",
    "Summary",
    "ingress_denied_by",
    "egress_denied_by",
];
/// The same, of what was let through.
const ALLOWED: [&str; 2] = ["ingress_allowed_by", "egress_allowed_by"];

/// Filters and output of `observe`; names as in the `hubble` command line.
#[derive(Args)]
pub struct Observe {
    /// All flows that are kept
    #[arg(long, conflicts_with_all = ["first", "last"])]
    all: bool,
    /// The oldest N flows that are kept, of each node
    #[arg(long, value_name = "N", conflicts_with_all = ["last", "follow"])]
    first: Option<u64>,
    /// The newest N flows, of each node [default: 20]
    #[arg(long, value_name = "N")]
    last: Option<u64>,
    /// Go on showing flows as they happen
    #[arg(short, long)]
    follow: bool,
    /// Only flows since a time, such as 30s (ago), 1h30m (ago), 2006-01-02 or 2006-01-02T15:04:05Z
    #[arg(long, value_name = "TIME", value_parser = parse_time)]
    since: Option<Timestamp>,
    /// Only flows until a time
    #[arg(long, value_name = "TIME", value_parser = parse_time)]
    until: Option<Timestamp>,
    #[command(flatten)]
    filters: FilterArgs,
    /// A filter as JSON (FlowFilter of Hubble's API): flows pass one of them
    #[arg(long, value_name = "JSON", value_parser = parse_filter)]
    allowlist: Vec<FlowFilter>,
    /// A filter as JSON: flows pass none of them
    #[arg(long, value_name = "JSON", value_parser = parse_filter)]
    denylist: Vec<FlowFilter>,
    /// Print the filters as JSON, and ask for nothing
    #[arg(long)]
    print_raw_filters: bool,
    /// Output form
    #[arg(short, long, value_enum, default_value = "compact")]
    output: Output,
    /// When compact and dict are in colour
    #[arg(long, value_enum, default_value = "auto")]
    color: Color,
    /// Call all by their addresses, not by their names
    #[arg(long)]
    numeric: bool,
    /// Call ends by their names
    #[arg(long, default_value_t = true, action = clap::ArgAction::Set, value_name = "BOOL")]
    ip_translation: bool,
    /// Show the node of each flow
    #[arg(long)]
    print_node_name: bool,
    /// Show policies as `hubble` does, behind the verdict, and not their rules
    #[arg(long)]
    print_policy_names: bool,
    /// How times are printed, but for json
    #[arg(
        long,
        value_enum,
        default_value = "StampMilli",
        ignore_case = true,
        value_name = "FORMAT"
    )]
    time_format: Format,
    /// Only these parts of flows, such as source.pod_name; with -o json
    #[arg(long, value_name = "FIELD", value_delimiter = ',')]
    field_mask: Vec<String>,
    /// Read flows from a file that -o json wrote, or `-`
    #[arg(long, value_name = "FILE", conflicts_with_all = ["follow", "server", "node"])]
    input_file: Option<PathBuf>,
    /// Only flows of this node
    #[arg(long)]
    node: Option<String>,
    /// A server of Hubble's API (HOST:PORT, tls://HOST:PORT or unix:///PATH), instead of the agents of this machine
    #[arg(long, env = "HUBBLE_SERVER", value_parser = parse_server, conflicts_with = "node")]
    server: Option<Server>,
    #[command(flatten)]
    tls: Tls,
}

fn parse_time(text: &str) -> Result<Timestamp, String> {
    time::parse(text).map_err(|error| format!("{error:#}"))
}

/// Reads the address of a server.
pub fn parse_server(text: &str) -> Result<Server, String> {
    Server::parse(text).map_err(|error| format!("{error:#}"))
}

fn parse_filter(text: &str) -> Result<FlowFilter, String> {
    serde_json::from_str(text).map_err(|error| format!("no FlowFilter: {error}"))
}

/// The servers to ask: the one that is named, or the agents of this machine, or of a node of it.
pub fn servers(
    layout: &Layout,
    node: Option<&str>,
    server: Option<&Server>,
) -> Result<Vec<Server>> {
    if let Some(server) = server {
        return Ok(vec![server.clone()]);
    }
    let agents = crate::unix_http::agents(layout, node)?.into_iter();
    let socket = |socket: PathBuf| socket.with_file_name(xebec_agent::HUBBLE_SOCKET);
    Ok(agents
        .map(|(_, agent)| Server::Unix(socket(agent)))
        .collect())
}

impl Observe {
    fn request(&self, style: &Style) -> Result<GetFlowsRequest> {
        let number = match (self.first, self.last, self.all) {
            (Some(number), _, _) | (None, Some(number), _) => number,
            (None, None, true) => u64::MAX,
            (None, None, false) => {
                let bounded = self.follow || self.since.is_some() || self.until.is_some();
                if bounded || self.input_file.is_some() {
                    0
                } else {
                    LAST
                }
            }
        };
        let both = |filters: &[FlowFilter], raw: &[FlowFilter]| [filters, raw].concat();
        let mask: Vec<String> = if style.is_json() {
            self.field_mask.clone()
        } else {
            SHOWN
                .iter()
                .chain(&ALLOWED)
                .map(|&path| path.to_owned())
                .collect()
        };
        Mask::new(&mask).context("--field-mask")?;
        Ok(GetFlowsRequest {
            number,
            first: self.first.is_some(),
            follow: self.follow,
            whitelist: both(&self.filters.allow, &self.allowlist),
            blacklist: both(&self.filters.deny, &self.denylist),
            since: self.since.map(Into::into),
            until: self.until.filter(|_| !self.follow).map(Into::into),
            field_mask: (!mask.is_empty()).then_some(FieldMask { paths: mask }),
            extensions: None,
        })
    }

    fn style(&self) -> Result<Style> {
        let style = Style {
            output: self.output,
            color: self.color,
            names: self.ip_translation && !self.numeric,
            node_name: self.print_node_name,
            policy_names: self.print_policy_names,
            time: self.time_format,
        };
        if self.follow && self.output == Output::Table {
            bail!("-o table can't follow: use -o compact or -o json with --follow");
        }
        ensure!(
            self.field_mask.is_empty() || style.is_json(),
            "--field-mask is for -o json: other forms show what they always show"
        );
        Ok(style)
    }

    /// Asks for flows and prints what is told.
    pub async fn run(self, layout: &Layout) -> Result<()> {
        let style = self.style()?;
        let asked = self.request(&style)?;
        if self.print_raw_filters {
            for (name, filters) in [
                ("allowlist", &asked.whitelist),
                ("denylist", &asked.blacklist),
            ] {
                println!("{name}:");
                for filter in filters {
                    let text = serde_json::to_string(filter).context("could not write JSON")?;
                    println!("    - '{text}'");
                }
            }
            return Ok(());
        }
        let mut printer = Printer::to_terminal(style);
        if let Some(path) = &self.input_file {
            for answer in source::file(path, &asked)? {
                if !printer.print(&masked(answer, &asked)?)? {
                    break;
                }
            }
            return printer.finish();
        }
        let servers = servers(layout, self.node.as_deref(), self.server.as_ref())?;
        let (nodes, mut failures) = source::ask(&servers, &self.tls, &asked);
        if self.follow {
            let mut flows = Following::default();
            nodes.into_iter().for_each(|node| flows.push(node));
            loop {
                let answer = tokio::select! {
                    biased;
                    // One node that fails ends it: what comes after would be without that node's flows.
                    Some(failure) = failures.recv() => return Err(failure),
                    answer = flows.next() => answer,
                };
                match answer {
                    Some(answer) if printer.print(&answer)? => {}
                    _ => return Ok(()),
                }
            }
        }
        let mut flows = Ended::new(nodes);
        while let Some(answer) = flows.next().await {
            if !printer.print(&answer)? {
                return Ok(());
            }
        }
        printer.finish()?;
        match failures.try_recv() {
            Ok(failure) => Err(failure),
            Err(_) => Ok(()),
        }
    }
}

/// What a server would have left of an answer.
fn masked(mut answer: GetFlowsResponse, asked: &GetFlowsRequest) -> Result<GetFlowsResponse> {
    use xebec_hubble::observer::get_flows_response::ResponseTypes;
    let paths = asked
        .field_mask
        .as_ref()
        .map_or(&[][..], |mask| &mask.paths);
    if let (Some(mask), Some(ResponseTypes::Flow(flow))) =
        (Mask::new(paths)?, &mut answer.response_types)
    {
        *flow = mask.apply(flow);
    }
    Ok(answer)
}
