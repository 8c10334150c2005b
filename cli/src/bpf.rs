//! `xebec bpf`: the kernel's maps as they are: their sizes, and what is in those of Services and flows.

use std::net::IpAddr;

use anyhow::{Context, Result, bail};
use clap::{Args, Subcommand, ValueEnum};
use http_body_util::BodyExt;
use serde_json::Value;

use crate::paths::Layout;
use crate::tables::{self, ListArgs};
use crate::{text, unix_http};

/// `bpf <what>`.
#[derive(Subcommand)]
pub enum Bpf {
    /// Maps, with their sizes
    Maps(ListArgs),
    /// Load balancing: frontends and their backends
    #[command(subcommand)]
    Lb(Dump),
    /// Flows: connections that were judged, and what was decided
    #[command(subcommand)]
    Flow(Dump),
    /// Translations: flows whose packets get other addresses
    #[command(subcommand)]
    Nat(Dump),
}

/// `<map> list`.
#[derive(Subcommand)]
pub enum Dump {
    /// List the entries
    #[command(visible_alias = "ls")]
    List(DumpArgs),
}

/// Which entries, and how.
#[derive(Args)]
pub struct DumpArgs {
    /// Only entries with this address
    #[arg(long)]
    address: Option<IpAddr>,
    /// Only entries with this port, of the same end as the address
    #[arg(long)]
    port: Option<u16>,
    /// Only this node
    #[arg(long)]
    node: Option<String>,
    /// Output form
    #[arg(short, long, value_enum, default_value = "table")]
    output: Output,
}

#[derive(Clone, Copy, PartialEq, ValueEnum)]
enum Output {
    Table,
    Json,
}

impl Bpf {
    /// Asks the agents and prints.
    pub async fn run(self, layout: &Layout) -> Result<()> {
        let (map, Dump::List(args)) = match self {
            Self::Maps(args) => return tables::list(layout, "/tables/maps", &args).await,
            Self::Lb(dump) => ("lb", dump),
            Self::Flow(dump) => ("flow", dump),
            Self::Nat(dump) => ("nat", dump),
        };
        let mut rows = args.rows(layout, map).await?;
        if args.output == Output::Json {
            let text = serde_json::to_string_pretty(&rows).context("could not write JSON")?;
            println!("{text}");
            return Ok(());
        }
        // The kernel's order is that of its hash.
        rows.sort_by_cached_key(|row| {
            let key = |name: &str| row[name].as_str().map(str::to_owned);
            (key("frontend"), key("source"), key("destination"))
        });
        let several = rows.iter().any(|row| row.get("node").is_some());
        let mut grid = match map {
            "lb" => services(&rows),
            "flow" => flows(&rows),
            _ => translations(&rows),
        };
        if several {
            let nodes = std::iter::once("NODE").chain(rows.iter().map(|row| string(&row["node"])));
            for (line, node) in grid.iter_mut().zip(nodes) {
                line.push(node.to_owned());
            }
        }
        text::write_grid(&mut std::io::stdout(), &grid)
    }
}

impl DumpArgs {
    /// The path that is asked for.
    fn path(&self, map: &str) -> String {
        let mut query = form_urlencoded::Serializer::new(String::new());
        if let Some(address) = self.address {
            query.append_pair("address", &address.to_string());
        }
        if let Some(port) = self.port {
            query.append_pair("port", &port.to_string());
        }
        match query.finish() {
            query if query.is_empty() => format!("/bpf/{map}"),
            query => format!("/bpf/{map}?{query}"),
        }
    }

    async fn rows(&self, layout: &Layout, map: &str) -> Result<Vec<Value>> {
        let agents = unix_http::agents(layout, self.node.as_deref())?;
        let several = agents.len() > 1;
        let mut rows = Vec::new();
        for (node, socket) in agents {
            let body = unix_http::get(&socket, &self.path(map)).await?;
            let body = body
                .collect()
                .await
                .context("the agent's answer broke off")?;
            for row in parse(&body.to_bytes()) {
                let mut row = row?;
                if let (true, Some(row)) = (several, row.as_object_mut()) {
                    row.insert("node".into(), node.clone().into());
                }
                rows.push(row);
            }
        }
        Ok(rows)
    }
}

/// Lines of JSON; one with an error ends them.
fn parse(text: &[u8]) -> impl Iterator<Item = Result<Value>> {
    let lines = text.split(|byte| *byte == b'\n');
    lines.filter(|line| !line.is_empty()).map(|line| {
        let row: Value = serde_json::from_slice(line).context("the agent's answer is no JSON")?;
        if let Some(error) = row["error"].as_str() {
            bail!("the agent could not read its maps: {error}");
        }
        Ok(row)
    })
}

fn string(value: &Value) -> &str {
    value.as_str().unwrap_or_default()
}

fn header<const N: usize>(names: [&str; N]) -> Vec<Vec<String>> {
    vec![names.iter().map(|name| (*name).to_owned()).collect()]
}

/// A frontend a line, its backends with their places in the run.
fn services(rows: &[Value]) -> Vec<Vec<String>> {
    let run = |row: &Value, name: &str| {
        let backends = row[name].as_array().into_iter().flatten();
        let backends: Vec<String> = backends
            .map(|one| {
                let gone = if one["present"] == false {
                    " (gone)"
                } else {
                    ""
                };
                let slots = one["slots"].as_u64().unwrap_or(0);
                format!(
                    "{}#{} x{slots}{gone}",
                    string(&one["backend"]),
                    one["number"]
                )
            })
            .collect();
        match backends.is_empty() {
            true => "<none>".into(),
            false => backends.join(","),
        }
    };
    let mut grid = header([
        "FRONTEND", "NUMBER", "INSIDE", "OUTSIDE", "AFFINITY", "FLAGS",
    ]);
    for row in rows {
        let flags = row["flags"].as_array().into_iter().flatten().map(string);
        let flags: Vec<&str> = flags.collect();
        let (inside, outside) = (run(row, "inside"), run(row, "outside"));
        let outside = if outside == inside {
            "<same>".into()
        } else {
            outside
        };
        let affinity = match row["affinity_seconds"].as_u64() {
            Some(seconds) if seconds > 0 => format!("{seconds}s"),
            _ => "<none>".into(),
        };
        let flags = if flags.is_empty() {
            "<none>".into()
        } else {
            flags.join(",")
        };
        let frontend = string(&row["frontend"]).to_owned();
        let number = row["number"].to_string();
        grid.push(vec![frontend, number, inside, outside, affinity, flags]);
    }
    grid
}

fn number(value: &Value) -> String {
    match value.as_u64() {
        None | Some(0) => "<none>".into(),
        Some(number) => number.to_string(),
    }
}

fn idle(row: &Value) -> String {
    format!("{}s", row["idle_seconds"].as_u64().unwrap_or(0))
}

fn flows(rows: &[Value]) -> Vec<Vec<String>> {
    let mut grid = header([
        "PROTOCOL",
        "SOURCE",
        "DESTINATION",
        "STATE",
        "IDLE",
        "SERVICE",
        "BACKEND",
        "RULE",
        "TRANSLATED",
    ]);
    grid.extend(rows.iter().map(|row| {
        let of = |name: &str| string(&row[name]).to_owned();
        let translated = string(&row["translation"]["direction"]);
        vec![
            of("protocol"),
            of("source"),
            of("destination"),
            of("state"),
            idle(row),
            number(&row["service"]),
            number(&row["backend"]),
            number(&row["rule"]),
            if translated.is_empty() {
                "<none>"
            } else {
                translated
            }
            .to_owned(),
        ]
    }));
    grid
}

fn translations(rows: &[Value]) -> Vec<Vec<String>> {
    let mut grid = header([
        "PROTOCOL",
        "SOURCE",
        "DESTINATION",
        "NEW-SOURCE",
        "NEW-DESTINATION",
        "DIRECTION",
        "HOOK",
        "STATE",
        "IDLE",
    ]);
    grid.extend(rows.iter().map(|row| {
        let of = |name: &str| string(&row["translation"][name]).to_owned();
        vec![
            string(&row["protocol"]).to_owned(),
            of("source"),
            of("destination"),
            of("new_source"),
            of("new_destination"),
            of("direction"),
            of("hook"),
            string(&row["state"]).to_owned(),
            idle(row),
        ]
    }));
    grid
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn answers_are_read_line_by_line_and_errors_are_errors() {
        let rows: Vec<_> = parse(b"{\"a\":1}\n{\"a\":2}\n")
            .map(Result::unwrap)
            .collect();
        assert_eq!(rows, [json!({"a": 1}), json!({"a": 2})]);
        let mut rows = parse(b"{\"a\":1}\n{\"error\":\"no map\"}\n");
        assert!(rows.next().unwrap().is_ok());
        let error = rows.next().unwrap().unwrap_err().to_string();
        assert!(error.contains("no map"), "{error}");
    }

    #[test]
    fn filters_are_the_agents() {
        let mut args = DumpArgs {
            address: None,
            port: None,
            node: None,
            output: Output::Table,
        };
        assert_eq!(args.path("lb"), "/bpf/lb");
        args.address = Some("fd00::1".parse().unwrap());
        args.port = Some(53);
        assert_eq!(args.path("nat"), "/bpf/nat?address=fd00%3A%3A1&port=53");
    }

    #[test]
    fn each_line_has_a_cell_for_each_column() {
        let service = json!({
            "frontend": "10.96.0.1:443/TCP", "number": 1, "flags": [], "affinity_seconds": 0, "outside": [],
            "inside": [{"backend": "192.0.2.1:6443", "number": 2, "slots": 1, "present": true, "local": true}],
        });
        let grid = services(&[service]);
        assert_eq!(
            grid[1],
            [
                "10.96.0.1:443/TCP",
                "1",
                "192.0.2.1:6443#2 x1",
                "<none>",
                "<none>",
                "<none>"
            ]
        );
        let flow = json!({
            "protocol": "TCP", "source": "a:1", "destination": "b:2", "state": "open", "idle_seconds": 3, "rule": 0,
            "service": 7, "backend": 0,
            "translation": {"direction": "reply", "hook": "egress", "source": "b:2", "destination": "a:1",
                "new_source": "c:3", "new_destination": "a:1"},
        });
        let of_flow = flows(std::slice::from_ref(&flow));
        assert_eq!(
            of_flow[1],
            [
                "TCP", "a:1", "b:2", "open", "3s", "7", "<none>", "<none>", "reply"
            ]
        );
        let of_nat = translations(&[flow]);
        assert_eq!(
            of_nat[1],
            [
                "TCP", "b:2", "a:1", "c:3", "a:1", "reply", "egress", "open", "3s"
            ]
        );
        for grid in [grid, of_flow, of_nat] {
            assert!(grid.iter().all(|line| line.len() == grid[0].len()));
        }
    }
}
