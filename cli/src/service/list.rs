//! `xebec service list`.

use std::net::IpAddr;

use anyhow::{Context, Result};
use clap::{Args, ValueEnum};

use super::rows::{self, Backend, Row};
use crate::paths::Layout;

/// Which frontends are listed, and how.
#[derive(Args)]
pub struct List {
    /// Only Services of this namespace
    #[arg(short, long)]
    namespace: Option<String>,
    /// Only frontends and backends with this address
    #[arg(long)]
    address: Option<IpAddr>,
    /// Only frontends and backends with this port
    #[arg(long)]
    port: Option<u16>,
    /// Only what this node's agent has
    #[arg(long)]
    node: Option<String>,
    /// Output form
    #[arg(short, long, value_enum, default_value = "table")]
    output: Output,
}

#[derive(Clone, Copy, PartialEq, ValueEnum)]
enum Output {
    Table,
    Wide,
    Json,
    Yaml,
}

/// How many backends a cell has, unless all are asked for.
const SOME: usize = 3;

impl List {
    /// Asks the agents and prints.
    pub async fn run(self, layout: &Layout) -> Result<()> {
        let mut found = rows::frontends(layout, self.node.as_deref()).await?;
        found.retain(|row| self.passes(row));
        match self.output {
            Output::Json => println!(
                "{}",
                serde_json::to_string_pretty(&found).context("could not write JSON")?
            ),
            Output::Yaml => print!(
                "{}",
                serde_yaml_ng::to_string(&found).context("could not write YAML")?
            ),
            _ if found.is_empty() => eprintln!("No Services found"),
            output => {
                let grid = grid(&found, output == Output::Wide);
                crate::text::write_grid(&mut std::io::stdout(), &grid)?;
            }
        }
        Ok(())
    }

    fn passes(&self, row: &Row) -> bool {
        let namespace = row.service.split('/').next();
        if self.namespace.is_some() && self.namespace.as_deref() != namespace {
            return false;
        }
        if self.address.is_none() && self.port.is_none() {
            return true;
        }
        let backends = row.inside.iter().chain(&row.outside);
        let backends = backends.filter_map(|one| one.backend.parse().ok());
        let frontend = row.address().map(|(address, _)| address);
        frontend.into_iter().chain(backends).any(|one| {
            self.address
                .is_none_or(|wanted| wanted.to_canonical() == one.ip())
                && self.port.is_none_or(|wanted| wanted == one.port())
        })
    }
}

/// Backends as kubectl shows endpoints.
fn backends(run: &[Backend], all: bool) -> String {
    if run.is_empty() {
        return "<none>".into();
    }
    let most = if all { run.len() } else { SOME };
    let name = |one: &Backend| {
        let mut text = one.backend.clone();
        if one.state == "terminating" {
            text.push_str(" (terminating)");
        }
        if all && one.weight > 1 {
            text.push_str(&format!(" x{}", one.weight));
        }
        text
    };
    let mut text = run
        .iter()
        .take(most)
        .map(name)
        .collect::<Vec<_>>()
        .join(",");
    if run.len() > most {
        text.push_str(&format!(" + {} more...", run.len() - most));
    }
    text
}

fn grid(found: &[Row], wide: bool) -> Vec<Vec<String>> {
    let several = found.iter().any(|row| !row.agent.is_empty());
    let counted = wide && found.iter().any(|row| row.hits.is_some());
    let mut header = vec!["SERVICE", "PORT", "TYPE", "FRONTEND", "BACKENDS", "STATE"];
    if wide {
        header.extend(["OUTSIDE", "ALGORITHM", "AFFINITY", "FLAGS", "NUMBER"]);
    }
    if counted {
        header.push("HITS");
    }
    if several {
        header.push("NODE");
    }
    let mut grid = vec![header.into_iter().map(str::to_owned).collect::<Vec<_>>()];
    let or_none = |text: &str| {
        if text.is_empty() {
            "<none>".to_owned()
        } else {
            text.to_owned()
        }
    };
    for row in found {
        let mut line = vec![
            or_none(&row.service),
            or_none(&row.port),
            or_none(&row.kind),
            or_none(&row.frontend),
            backends(&row.inside, wide),
            or_none(&row.state),
        ];
        if wide {
            let same =
                serde_json::to_value(&row.inside).ok() == serde_json::to_value(&row.outside).ok();
            line.push(if same {
                "<same>".into()
            } else {
                backends(&row.outside, true)
            });
            let algorithm = &row.algorithm;
            line.push(if algorithm.inside == algorithm.outside {
                or_none(&algorithm.inside)
            } else {
                format!(
                    "{}/{}",
                    or_none(&algorithm.inside),
                    or_none(&algorithm.outside)
                )
            });
            line.push(match row.affinity_seconds {
                0 => "<none>".into(),
                seconds => format!("{seconds}s"),
            });
            line.push(or_none(&row.flags.join(",")));
            line.push(row.number.to_string());
        }
        if counted {
            line.push(
                row.hits
                    .map_or_else(|| "<none>".into(), |hits| hits.to_string()),
            );
        }
        if several {
            line.push(row.agent.clone());
        }
        grid.push(line);
    }
    grid
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn row() -> Row {
        let backend = |last: u8, state: &str, weight: u8| json!({"backend": format!("10.244.0.{last}:80"), "state": state, "weight": weight});
        let inside: Vec<_> = (5..9)
            .map(|last| {
                backend(
                    last,
                    if last == 6 { "terminating" } else { "active" },
                    last / 5,
                )
            })
            .collect();
        serde_json::from_value(json!({
            "service": "shop/cart", "port": "http", "type": "NodePort", "frontend": "0.0.0.0:30080/TCP", "number": 4,
            "algorithm": {"inside": "random", "outside": "maglev"}, "affinity_seconds": 60, "flags": ["external"],
            "inside": inside, "outside": [backend(5, "active", 2)], "state": "ok", "hits": 12,
        }))
        .unwrap()
    }

    #[test]
    fn a_frontend_on_one_line() {
        let short = grid(&[row()], false);
        assert_eq!(
            short[1],
            [
                "shop/cart",
                "http",
                "NodePort",
                "0.0.0.0:30080/TCP",
                "10.244.0.5:80,10.244.0.6:80 (terminating),10.244.0.7:80 + 1 more...",
                "ok",
            ]
        );
        let wide = grid(&[row()], true);
        assert_eq!(
            wide[1][6..],
            [
                "10.244.0.5:80 x2",
                "random/maglev",
                "60s",
                "external",
                "4",
                "12"
            ]
        );
        assert_eq!(wide[0].len(), wide[1].len());
        // What an agent does not tell has a place all the same.
        let empty = grid(&[Row::default()], true);
        assert_eq!(empty[1][..3], ["<none>", "<none>", "<none>"]);
        assert_eq!(empty[1][6], "<same>");
    }

    #[test]
    fn filters_look_at_frontends_and_backends() {
        let list = |namespace: Option<&str>, address: Option<&str>, port| List {
            namespace: namespace.map(str::to_owned),
            address: address.map(|address| address.parse().unwrap()),
            port,
            node: None,
            output: Output::Table,
        };
        for (filter, passes) in [
            (list(None, None, None), true),
            (list(Some("shop"), None, Some(30_080)), true),
            (list(Some("default"), None, None), false),
            (list(None, Some("10.244.0.8"), Some(80)), true),
            (list(None, Some("10.244.0.8"), Some(30_080)), false),
        ] {
            assert_eq!(filter.passes(&row()), passes);
        }
    }
}
