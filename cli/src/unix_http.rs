//! A small HTTP/1.1 client over UNIX sockets: how the command line talks to the agents.

use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail};
use bytes::Bytes;
use http_body_util::{BodyExt, Empty};
use hyper::body::Incoming;
use hyper_util::rt::TokioIo;
use serde_json::Value;
use tokio::net::UnixStream;

use crate::paths::Layout;

/// Sends a GET and gives the answer's body once the status is 200.
pub async fn get(socket: &Path, path_and_query: &str) -> Result<Incoming> {
    let stream = UnixStream::connect(socket).await.with_context(|| {
        format!(
            "could not connect to {} (is the node running? see `xebec status`)",
            socket.display()
        )
    })?;
    let (mut sender, connection) = hyper::client::conn::http1::handshake(TokioIo::new(stream))
        .await
        .context("the agent's socket speaks no HTTP")?;
    tokio::spawn(connection);
    let request = http::Request::get(path_and_query)
        .header(http::header::HOST, "agent")
        .body(Empty::<Bytes>::new())
        .context("could not build the request")?;
    let response = sender
        .send_request(request)
        .await
        .context("the agent did not answer")?;
    if !response.status().is_success() {
        let status = response.status();
        let body = response
            .into_body()
            .collect()
            .await
            .map(|b| b.to_bytes())
            .unwrap_or_default();
        bail!(
            "the agent answered {status}: {}",
            String::from_utf8_lossy(&body).trim()
        );
    }
    Ok(response.into_body())
}

/// Sends a GET and parses the JSON answer.
pub async fn get_json(socket: &Path, path: &str) -> Result<Value> {
    let body = get(socket, path)
        .await?
        .collect()
        .await
        .context("the agent's answer broke off")?;
    serde_json::from_slice(&body.to_bytes()).context("the agent's answer is no JSON")
}

/// The agents' sockets of this machine with their nodes' names; `node` picks one.
pub fn agents(layout: &Layout, node: Option<&str>) -> Result<Vec<(String, PathBuf)>> {
    let all: Vec<_> = layout
        .nodes()
        .into_iter()
        .filter(|name| node.is_none_or(|wanted| wanted == name))
        .map(|name| {
            let socket = layout.node(&name).agent_socket();
            (name, socket)
        })
        .filter(|(_, socket)| socket.exists())
        .collect();
    match (all.is_empty(), node) {
        (true, Some(node)) => bail!("no agent of a node {node:?} runs here (see `xebec status`)"),
        (true, None) => bail!("no agent runs here; start a cluster with `xebec up`"),
        _ => Ok(all),
    }
}
