//! The node agent: connects the pods of one node.

mod api;
pub mod endpoints;
mod ipam;
pub mod link;

use std::net::IpAddr;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use anyhow::{Context, Result, bail};
use ipnet::IpNet;
use tokio_util::sync::CancellationToken;

use endpoints::Endpoints;

/// How the agent runs.
#[derive(Clone, Debug)]
pub struct Config {
    /// Name of the node.
    pub node_name: String,
    /// The node's address.
    pub node_ip: IpAddr,
    /// The node's range of pod addresses.
    pub pod_cidr: IpNet,
    /// The agent's socket.
    pub socket: PathBuf,
    /// Records of addresses and endpoints.
    pub state_dir: PathBuf,
}

/// Runs until `shutdown`; pods stay connected.
pub async fn run(config: Config, shutdown: CancellationToken) -> Result<()> {
    let IpNet::V4(range) = config.pod_cidr else {
        bail!("the pod range {} is not IPv4", config.pod_cidr)
    };
    let forward = "/proc/sys/net/ipv4/ip_forward";
    std::fs::write(forward, "1").with_context(|| format!("could not write {forward}"))?;
    let endpoints = Arc::new(Endpoints::open(&config.state_dir, range)?);
    api::run(config.socket, endpoints, shutdown).await
}

/// Removes the devices of all endpoints that are on record, and the records.
pub async fn cleanup(state_dir: &Path) -> Result<()> {
    let any = IpNet::from(ipnet::Ipv4Net::default());
    let IpNet::V4(range) = any else { return Ok(()) };
    let handle = link::handle()?;
    for endpoint in Endpoints::open(state_dir, range)?.list().await {
        link::remove(&handle, &endpoint.device).await?;
    }
    match std::fs::remove_dir_all(state_dir) {
        Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
            Err(error).with_context(|| format!("could not remove {}", state_dir.display()))
        }
        _ => Ok(()),
    }
}
