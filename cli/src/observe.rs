//! `xebec observe`: who talked to whom, allowed or dropped, and by which rule.

use std::io::Write;

use anyhow::{Context, Result, bail};
use clap::{Args, ValueEnum};
use http_body_util::BodyExt;
use serde_json::{Value, json};
use tokio::sync::mpsc;

use crate::paths::Layout;
use crate::unix_http;

/// Filters and output of `observe`; names as in the `hubble` command line.
#[derive(Args)]
pub struct Observe {
    /// Flows to or from this namespace
    #[arg(short, long)]
    namespace: Option<String>,
    /// Flows to or from this pod, as [namespace/]name
    #[arg(long)]
    pod: Option<String>,
    /// Only flows with this verdict
    #[arg(long, value_enum, ignore_case = true)]
    verdict: Option<Verdict>,
    /// Only this protocol, such as TCP, UDP or ICMPv4
    #[arg(long)]
    protocol: Option<String>,
    /// Only flows with this source or destination port
    #[arg(long)]
    port: Option<u16>,
    /// Only flows since a time ago, such as 30s, 5m or 1h
    #[arg(long)]
    since: Option<String>,
    /// The newest N flows
    #[arg(long, default_value_t = 20)]
    last: usize,
    /// Go on showing flows as they happen
    #[arg(short, long)]
    follow: bool,
    /// Only flows of this node
    #[arg(long)]
    node: Option<String>,
    /// Output form
    #[arg(short, long, value_enum, default_value = "compact")]
    output: Output,
}

/// A flow's verdict, as `flow.proto` names it.
#[derive(Clone, Copy, ValueEnum)]
#[value(rename_all = "UPPER")]
enum Verdict {
    /// Went on its way
    Forwarded,
    /// Was dropped
    Dropped,
    /// Could not be handled
    Error,
    /// Would have been dropped, but the policy is in audit mode
    Audit,
    /// Had its address translated
    Translated,
    /// Was seen on its way
    Traced,
    /// Was sent to a proxy
    Redirected,
}

/// How flows are printed.
#[derive(Clone, Copy, PartialEq, ValueEnum)]
enum Output {
    /// One line a flow
    Compact,
    /// One JSON object a line, as Hubble's GetFlowsResponse
    Json,
    /// Columns; not with --follow
    Table,
}

impl Observe {
    fn query(&self) -> Result<String> {
        let pairs = [
            ("namespace", self.namespace.clone()),
            ("pod", self.pod.clone()),
            (
                "verdict",
                self.verdict
                    .and_then(|v| v.to_possible_value())
                    .map(|v| v.get_name().to_owned()),
            ),
            ("protocol", self.protocol.clone()),
            ("port", self.port.map(|port| port.to_string())),
            (
                "since",
                self.since
                    .as_deref()
                    .map(seconds)
                    .transpose()?
                    .map(|s| format!("{s}s")),
            ),
            ("last", Some(self.last.to_string())),
            ("follow", self.follow.then(|| "true".to_owned())),
        ];
        let mut query = form_urlencoded::Serializer::new(String::new());
        for (key, value) in pairs {
            if let Some(value) = value {
                query.append_pair(key, &value);
            }
        }
        Ok(query.finish())
    }

    /// Asks every agent of this machine and prints what they tell.
    pub async fn run(self, layout: &Layout) -> Result<()> {
        if self.follow && self.output == Output::Table {
            bail!("-o table can't follow: use -o compact or -o json with --follow");
        }
        let path = format!("/flows?{}", self.query()?);
        let (sender, mut flows) = mpsc::channel::<Result<Value>>(256);
        for (_, socket) in unix_http::agents(layout, self.node.as_deref())? {
            let (path, sender) = (path.clone(), sender.clone());
            tokio::spawn(async move {
                if let Err(error) = read_flows(&socket, &path, &sender).await {
                    let _ = sender.send(Err(error)).await;
                }
            });
        }
        drop(sender);
        let mut out = std::io::stdout();
        if self.follow {
            while let Some(flow) = flows.recv().await {
                if !print(&mut out, &flow?, self.output)? {
                    return Ok(());
                }
            }
            return Ok(());
        }
        let mut all = Vec::new();
        while let Some(flow) = flows.recv().await {
            all.push(flow?);
        }
        // Each agent gives its own in order of time; over several nodes they are merged here.
        all.sort_by(|a, b| inner(a)["time"].as_str().cmp(&inner(b)["time"].as_str()));
        let skip = all.len().saturating_sub(self.last);
        if self.output == Output::Table {
            print_table(&mut out, &all[skip..])?;
            return Ok(());
        }
        for flow in &all[skip..] {
            if !print(&mut out, flow, self.output)? {
                break;
            }
        }
        Ok(())
    }
}

async fn read_flows(
    socket: &std::path::Path,
    path: &str,
    sender: &mpsc::Sender<Result<Value>>,
) -> Result<()> {
    let mut body = unix_http::get(socket, path).await?;
    let mut buffer = Vec::new();
    while let Some(frame) = body.frame().await {
        let frame = frame.context("the agent's answer broke off")?;
        buffer.extend_from_slice(
            frame
                .data_ref()
                .map(|data| data.as_ref())
                .unwrap_or_default(),
        );
        while let Some(end) = buffer.iter().position(|byte| *byte == b'\n') {
            let line: Vec<u8> = buffer.drain(..=end).collect();
            if line.trim_ascii().is_empty() {
                continue;
            }
            let flow = serde_json::from_slice(&line).context("a flow is no JSON")?;
            if sender.send(Ok(flow)).await.is_err() {
                return Ok(());
            }
        }
    }
    Ok(())
}

/// The flow itself, whether or not it comes in a GetFlowsResponse.
fn inner(value: &Value) -> &Value {
    value.get("flow").unwrap_or(value)
}

/// Prints one flow; false when nobody reads any more.
fn print(out: &mut impl Write, value: &Value, output: Output) -> Result<bool> {
    let line = match output {
        Output::Json if value.get("flow").is_some() => value.to_string(),
        Output::Json => {
            json!({"flow": value, "node_name": value["node_name"], "time": value["time"]})
                .to_string()
        }
        _ => compact(inner(value)),
    };
    match writeln!(out, "{line}").and_then(|()| out.flush()) {
        Ok(()) => Ok(true),
        Err(error) if error.kind() == std::io::ErrorKind::BrokenPipe => Ok(false),
        Err(error) => Err(error).context("could not write"),
    }
}

/// One flow on one line, in the manner of `hubble observe`.
fn compact(flow: &Value) -> String {
    let arrow = if flow["is_reply"] == true { "<-" } else { "->" };
    let (mut from, mut to) = (peer(flow, "source"), peer(flow, "destination"));
    if flow["is_reply"] == true {
        std::mem::swap(&mut from, &mut to);
    }
    let mut line = format!(
        "{}: {from} {arrow} {to} {} {}",
        flow["time"].as_str().unwrap_or("-"),
        reason(flow),
        flow["verdict"].as_str().unwrap_or("-"),
    );
    if let Some(summary) = flow["Summary"].as_str().filter(|s| !s.is_empty()) {
        line.push_str(&format!(" ({summary})"));
    }
    if let Some(rule) = rule(flow) {
        line.push_str(&format!(" by {rule}"));
    }
    line
}

/// The drop reason, or where the flow was seen.
fn reason(flow: &Value) -> &str {
    if flow["verdict"] == "DROPPED" {
        return flow["drop_reason_desc"].as_str().unwrap_or("dropped");
    }
    flow["trace_observation_point"]
        .as_str()
        .or(flow["traffic_direction"].as_str())
        .unwrap_or("")
}

/// The policy that decided, as kind namespace/name.
fn rule(flow: &Value) -> Option<String> {
    [
        "ingress_denied_by",
        "egress_denied_by",
        "ingress_allowed_by",
        "egress_allowed_by",
    ]
    .iter()
    .find_map(|key| flow[*key].get(0).map(|policy| (key, policy)))
    .map(|(key, policy)| {
        let direction = key.split('_').next().unwrap_or_default();
        let kind = policy["kind"].as_str().unwrap_or("NetworkPolicy");
        let namespace = policy["namespace"]
            .as_str()
            .map(|ns| format!("{ns}/"))
            .unwrap_or_default();
        let rule = policy["rule"]
            .as_u64()
            .map(|n| format!(" rule {n}"))
            .unwrap_or_default();
        format!(
            "{kind} {namespace}{} {direction}{rule}",
            policy["name"].as_str().unwrap_or("?")
        )
    })
}

fn peer(flow: &Value, side: &str) -> String {
    let endpoint = &flow[side];
    let name = match (
        endpoint["namespace"].as_str(),
        endpoint["pod_name"].as_str(),
    ) {
        (Some(namespace), Some(pod)) if !pod.is_empty() => format!("{namespace}/{pod}"),
        _ => flow["IP"][side].as_str().unwrap_or("-").to_owned(),
    };
    let port = flow["l4"]
        .as_object()
        .and_then(|l4| {
            l4.values()
                .find_map(|l4| l4[format!("{side}_port")].as_u64())
        })
        .map(|port| format!(":{port}"))
        .unwrap_or_default();
    let identity = match endpoint["identity"].as_u64() {
        Some(identity) => match reserved(endpoint) {
            Some(name) => format!(" ({name})"),
            None => format!(" (ID:{identity})"),
        },
        None => String::new(),
    };
    format!("{name}{port}{identity}")
}

/// `host`, `world` and the like, from a `reserved:` label.
fn reserved(endpoint: &Value) -> Option<&str> {
    endpoint["labels"]
        .as_array()?
        .iter()
        .filter_map(Value::as_str)
        .find_map(|label| label.strip_prefix("reserved:"))
}

fn print_table(out: &mut impl Write, flows: &[Value]) -> Result<()> {
    let rows: Vec<[String; 6]> = flows
        .iter()
        .map(|value| {
            let flow = inner(value);
            [
                flow["time"].as_str().unwrap_or("-").to_owned(),
                peer(flow, "source"),
                peer(flow, "destination"),
                reason(flow).to_owned(),
                flow["verdict"].as_str().unwrap_or("-").to_owned(),
                rule(flow)
                    .or_else(|| flow["Summary"].as_str().map(str::to_owned))
                    .unwrap_or_default(),
            ]
        })
        .collect();
    let header = [
        "TIMESTAMP",
        "SOURCE",
        "DESTINATION",
        "TYPE",
        "VERDICT",
        "SUMMARY",
    ];
    crate::text::write_table(out, &header, &rows)
}

/// A span such as `90`, `30s`, `5m`, `1h`, `2d` in whole seconds.
fn seconds(text: &str) -> Result<u64> {
    let (number, unit) = match text.find(|c: char| !c.is_ascii_digit()) {
        Some(at) => text.split_at(at),
        None => (text, "s"),
    };
    let factor = match unit {
        "s" => 1,
        "m" => 60,
        "h" => 3_600,
        "d" => 86_400,
        _ => bail!("--since {text:?}: use a number and s, m, h or d, such as 5m"),
    };
    let number: u64 = number
        .parse()
        .with_context(|| format!("--since {text:?}: use a number and s, m, h or d, such as 5m"))?;
    number
        .checked_mul(factor)
        .with_context(|| format!("--since {text:?} is too long ago"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn spans_are_read_and_nonsense_is_refused() {
        assert_eq!(seconds("90").unwrap(), 90);
        assert_eq!(seconds("5m").unwrap(), 300);
        assert!(seconds("m").is_err());
        assert!(seconds("5 parsecs").is_err());
        assert!(seconds("99999999999999999999s").is_err());
    }

    #[test]
    fn a_dropped_flow_names_reason_and_policy() {
        let flow = json!({
            "time": "2026-01-02T03:04:05.000Z", "verdict": "DROPPED", "drop_reason_desc": "POLICY_DENY",
            "IP": {"source": "10.244.0.5", "destination": "10.244.0.6"},
            "l4": {"TCP": {"source_port": 4000, "destination_port": 8080}},
            "source": {"namespace": "shop", "pod_name": "stranger", "identity": 7},
            "destination": {"namespace": "shop", "pod_name": "api-1", "identity": 8},
            "Summary": "TCP Flags: SYN",
            "ingress_denied_by": [{"kind": "NetworkPolicy", "namespace": "shop", "name": "api"}],
        });
        assert_eq!(
            compact(&flow),
            "2026-01-02T03:04:05.000Z: shop/stranger:4000 (ID:7) -> shop/api-1:8080 (ID:8) POLICY_DENY DROPPED (TCP Flags: SYN) by NetworkPolicy shop/api ingress"
        );
    }
}
