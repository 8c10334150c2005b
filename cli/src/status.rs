//! `xebec status`: one screen that says what runs and whether it is healthy.

use std::io::{IsTerminal, Write};

use anyhow::{Context, Result};
use clap::Args;
use k8s_openapi::api::core::v1::{Node, Pod};
use kube::api::ListParams;
use serde_json::Value;

use crate::paths::Layout;
use crate::unix_http;
use crate::up::child::process_of;
use crate::up::state::UpState;

/// How `status` prints.
#[derive(Args)]
pub struct Status {
    /// Print JSON
    #[arg(long)]
    json: bool,
}

/// One line of the screen.
struct Line {
    what: String,
    healthy: bool,
    detail: String,
}

impl Status {
    /// Asks every part; exits with an error when one is not healthy.
    pub async fn run(self, layout: &Layout) -> Result<()> {
        let mut lines = Vec::new();
        match UpState::read(layout)? {
            Some(state) if state.is_running() => {
                lines.push(Line {
                    what: "Cluster".into(),
                    healthy: true,
                    detail: format!("{}, {}", process(state.pid), state.server),
                });
                // Several nodes have processes of their own.
                for node in state.nodes.iter().filter(|node| node.cable.is_some()) {
                    let pid = process_of(node);
                    lines.push(Line {
                        what: format!("Process of {}", node.name),
                        healthy: pid.is_some(),
                        detail: pid.map_or_else(|| "does not run".into(), process),
                    });
                }
                match api(layout).await {
                    Ok(found) => lines.extend(found),
                    Err(error) => lines.push(Line {
                        what: "API server".into(),
                        healthy: false,
                        detail: format!("{error:#}"),
                    }),
                }
            }
            Some(_) => lines.push(Line {
                what: "Cluster".into(),
                healthy: false,
                detail: "its process has ended; `xebec up` starts it again, `xebec down` cleans up"
                    .into(),
            }),
            // An agent alone belongs to a cluster that runs elsewhere.
            None if unix_http::agents(layout, None).is_ok() => {}
            None => lines.push(Line {
                what: "Cluster".into(),
                healthy: false,
                detail: "not running; start it with `xebec up`".into(),
            }),
        }
        for (name, socket) in unix_http::agents(layout, None).unwrap_or_default() {
            lines.push(match unix_http::get_json(&socket, "/status").await {
                Ok(status) => agent_line(&name, &status),
                Err(error) => Line {
                    what: format!("Agent {name}"),
                    healthy: false,
                    detail: format!("{error:#}"),
                },
            });
        }
        self.print(&lines)?;
        let sick = lines.iter().filter(|line| !line.healthy).count();
        anyhow::ensure!(sick == 0, "{sick} of {} parts are not healthy", lines.len());
        Ok(())
    }

    fn print(&self, lines: &[Line]) -> Result<()> {
        let mut out = std::io::stdout();
        if self.json {
            let parts: Vec<Value> = lines
                .iter()
                .map(|line| serde_json::json!({"name": line.what, "healthy": line.healthy, "detail": line.detail}))
                .collect();
            return writeln!(out, "{}", Value::from(parts)).context("could not write");
        }
        let color = out.is_terminal();
        let width = lines
            .iter()
            .map(|line| line.what.chars().count())
            .max()
            .unwrap_or(0);
        for line in lines {
            let mark = match (line.healthy, color) {
                (true, true) => "\x1b[32mOK\x1b[0m     ",
                (true, false) => "OK     ",
                (false, true) => "\x1b[31mFAILED\x1b[0m ",
                (false, false) => "FAILED ",
            };
            writeln!(out, "{:width$}  {mark}{}", line.what, line.detail)
                .context("could not write")?;
        }
        Ok(())
    }
}

/// What the API server says of itself, the nodes and the pods.
async fn api(layout: &Layout) -> Result<Vec<Line>> {
    crate::up::install_tls_provider()?;
    let path = layout.admin_kubeconfig();
    let config = kube::config::Kubeconfig::read_from(&path)
        .with_context(|| format!("could not read {} (run as root?)", path.display()))?;
    let config =
        kube::Config::from_custom_kubeconfig(config, &kube::config::KubeConfigOptions::default())
            .await?;
    let client = kube::Client::try_from(config).context("could not make an API client")?;
    let version = client
        .apiserver_version()
        .await
        .context("the API server does not answer")?;
    let mut lines = vec![Line {
        what: "API server".into(),
        healthy: true,
        detail: version.git_version,
    }];
    let nodes = kube::Api::<Node>::all(client.clone())
        .list(&ListParams::default())
        .await
        .context("could not list nodes")?;
    for node in nodes {
        lines.push(node_line(&node));
    }
    let pods = kube::Api::<Pod>::all(client)
        .list(&ListParams::default())
        .await
        .context("could not list pods")?;
    let total = pods.items.len();
    let ready = pods.items.iter().filter(|pod| pod_is_fine(pod)).count();
    lines.push(Line {
        what: "Pods".into(),
        healthy: ready == total,
        detail: format!("{ready} of {total} ready or completed"),
    });
    Ok(lines)
}

/// A node that is short of something takes no pods, however ready it is.
fn node_line(node: &Node) -> Line {
    let conditions = || {
        let status = node.status.iter();
        status.flat_map(|status| status.conditions.iter().flatten())
    };
    let ready = conditions().find(|condition| condition.type_ == "Ready");
    let short = conditions().find(|condition| {
        ["MemoryPressure", "DiskPressure", "PIDPressure"].contains(&condition.type_.as_str())
            && condition.status == "True"
    });
    let is_ready = ready.is_some_and(|condition| condition.status == "True");
    let told = if is_ready { short.or(ready) } else { ready };
    Line {
        what: format!("Node {}", node.metadata.name.as_deref().unwrap_or_default()),
        healthy: is_ready && short.is_none(),
        detail: told
            .and_then(|condition| condition.message.clone())
            .unwrap_or_else(|| "no Ready condition".into()),
    }
}

fn pod_is_fine(pod: &Pod) -> bool {
    let Some(status) = &pod.status else {
        return false;
    };
    status.phase.as_deref() == Some("Succeeded")
        || status
            .conditions
            .iter()
            .flatten()
            .any(|condition| condition.type_ == "Ready" && condition.status == "True")
}

/// The agent's own summary: healthy unless a part of it says otherwise.
fn agent_line(name: &str, status: &Value) -> Line {
    let healthy = status["healthy"].as_bool().unwrap_or(false);
    let numbers: Vec<String> = status
        .as_object()
        .into_iter()
        .flatten()
        .filter(|(key, value)| *key != "healthy" && (value.is_number() || value.is_string()))
        .map(|(key, value)| {
            format!(
                "{key} {}",
                value
                    .as_str()
                    .map_or_else(|| value.to_string(), str::to_owned)
            )
        })
        .collect();
    Line {
        what: format!("Agent {name}"),
        healthy,
        detail: numbers.join(", "),
    }
}

/// A process, for people.
fn process(pid: i32) -> String {
    match resident_bytes(pid) {
        Some(bytes) => format!("pid {pid}, {:.0} MB", bytes as f64 / 1e6),
        None => format!("pid {pid}"),
    }
}

/// Resident memory of a process (proc(5) statm, second field, pages).
fn resident_bytes(pid: i32) -> Option<u64> {
    let statm = std::fs::read_to_string(format!("/proc/{pid}/statm")).ok()?;
    let pages: u64 = statm.split_whitespace().nth(1)?.parse().ok()?;
    let page = nix::unistd::sysconf(nix::unistd::SysconfVar::PAGE_SIZE).ok()??;
    Some(pages * page as u64)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn node(conditions: &[(&str, &str, &str)]) -> Node {
        let conditions: Vec<_> = conditions
            .iter()
            .map(|(kind, status, message)| {
                serde_json::json!({"type": kind, "status": status, "message": message})
            })
            .collect();
        serde_json::from_value(serde_json::json!({
            "metadata": {"name": "node1"},
            "status": {"conditions": conditions},
        }))
        .expect("a node")
    }

    #[test]
    fn a_node_that_is_short_of_something_is_not_healthy() {
        let line = |conditions: &[(&str, &str, &str)]| {
            let line = node_line(&node(conditions));
            (line.healthy, line.detail)
        };
        let ready = ("Ready", "True", "is ready");
        let full = ("DiskPressure", "True", "has disk pressure");
        assert_eq!(line(&[ready]), (true, "is ready".into()));
        assert_eq!(
            line(&[("DiskPressure", "False", "has none"), ready]),
            (true, "is ready".into())
        );
        assert_eq!(line(&[full, ready]), (false, "has disk pressure".into()));
        assert_eq!(
            line(&[full, ("Ready", "False", "no network")]),
            (false, "no network".into())
        );
        assert_eq!(line(&[]), (false, "no Ready condition".into()));
    }
}
