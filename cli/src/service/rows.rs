//! The agent's rows of Services.

use std::net::SocketAddr;

use anyhow::{Context, Result};
use serde::{Deserialize, Serialize};
use serde_json::Value;

use crate::paths::Layout;
use crate::unix_http;

/// One frontend. What an agent does not tell is empty.
#[derive(Clone, Debug, Default, Deserialize, Serialize)]
#[serde(default)]
pub struct Row {
    /// Name of the node whose agent tells.
    #[serde(skip_serializing_if = "String::is_empty")]
    pub agent: String,
    /// Namespace and name.
    pub service: String,
    /// Name of its port.
    pub port: String,
    /// `ClusterIP`, `NodePort` and so on.
    #[serde(rename = "type")]
    pub kind: String,
    /// Address, port and protocol.
    pub frontend: String,
    /// The kernel's number of the Service's port.
    pub number: u64,
    /// How backends are chosen.
    pub algorithm: Algorithms,
    /// For how long a client keeps its backend.
    pub affinity_seconds: u64,
    /// What holds besides.
    pub flags: Vec<String>,
    /// Backends for pods and nodes.
    pub inside: Vec<Backend>,
    /// Backends for others.
    pub outside: Vec<Backend>,
    /// `ok`, or what is wrong.
    pub state: String,
    /// How often a backend was chosen, where the agent counts.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub hits: Option<u64>,
}

/// How backends of each run are chosen.
#[derive(Clone, Debug, Default, Deserialize, Serialize)]
#[serde(default)]
pub struct Algorithms {
    /// For pods and nodes.
    pub inside: String,
    /// For others.
    pub outside: String,
}

/// A backend of a run.
#[derive(Clone, Debug, Default, Deserialize, Serialize)]
#[serde(default)]
pub struct Backend {
    /// Address and port.
    pub backend: String,
    /// The kernel's number.
    pub number: u64,
    /// `active` or `terminating`.
    pub state: String,
    /// Share of new connections, relative to the others'; 0 for none.
    pub weight: u64,
    /// Its node.
    pub node: String,
    /// Its zone.
    pub zone: String,
    /// Whether it is on the node of the agent.
    pub local: bool,
}

impl Row {
    /// The frontend's address, port and protocol.
    pub fn address(&self) -> Option<(SocketAddr, &str)> {
        let (address, protocol) = self.frontend.rsplit_once('/')?;
        Some((address.parse().ok()?, protocol))
    }

    /// Whether a flag is set.
    pub fn has(&self, flag: &str) -> bool {
        self.flags.iter().any(|one| one == flag)
    }
}

/// The table of this name of each agent, with the agents' nodes.
pub async fn table(
    layout: &Layout,
    node: Option<&str>,
    name: &str,
) -> Result<Vec<(String, Vec<Value>)>> {
    let mut tables = Vec::new();
    for (node, socket) in unix_http::agents(layout, node)? {
        let answer = unix_http::get_json(&socket, &format!("/tables/{name}")).await?;
        let Value::Array(rows) = answer else {
            anyhow::bail!("the answer of the agent of {node} is no list");
        };
        tables.push((node, rows));
    }
    Ok(tables)
}

/// All frontends; where several agents tell, each row names the one that does.
pub async fn frontends(layout: &Layout, node: Option<&str>) -> Result<Vec<Row>> {
    let tables = table(layout, node, "services").await?;
    let several = tables.len() > 1;
    let mut all = Vec::new();
    for (node, rows) in tables {
        for row in rows {
            let mut row: Row =
                serde_json::from_value(row).context("the agent's row is no Service's")?;
            if several {
                row.agent.clone_from(&node);
            }
            all.push(row);
        }
    }
    Ok(all)
}
