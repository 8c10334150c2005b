//! The node agent: connects the pods of one node, and translates Services to their endpoints by eBPF.

mod api;
pub mod endpoints;
mod ipam;
pub mod link;
pub mod loader;
pub mod services;

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
    /// Where a BPF filesystem for pinned links is mounted.
    pub bpf_dir: PathBuf,
    /// The cgroup v2 folder whose processes reach Services.
    pub cgroup_root: PathBuf,
}

/// Runs until `shutdown`; pods stay connected, and Services stay translated as they were.
pub async fn run(client: kube::Client, config: Config, shutdown: CancellationToken) -> Result<()> {
    let endpoints = connect(&config)?;
    loader::mount(&config.bpf_dir)?;
    let mut programs = loader::Loaded::new()?;
    let maps = programs.service_maps()?;
    let shown = services::Shown::default();
    let attach = {
        let (cgroup, pins) = (config.cgroup_root.clone(), config.bpf_dir.join("links"));
        move || programs.attach(&cgroup, &pins)
    };
    let services = services::run(
        client,
        maps,
        config.node_ip,
        shown.clone(),
        attach,
        shutdown.clone(),
    );
    let api = api::run(config.socket.clone(), endpoints, shown, shutdown);
    tokio::try_join!(services, api).map(drop)
}

/// Serves the socket alone, for taking pods away where no API server runs.
pub async fn run_detached(config: Config, shutdown: CancellationToken) -> Result<()> {
    let endpoints = connect(&config)?;
    api::run(
        config.socket,
        endpoints,
        services::Shown::default(),
        shutdown,
    )
    .await
}

fn connect(config: &Config) -> Result<Arc<Endpoints>> {
    let IpNet::V4(range) = config.pod_cidr else {
        bail!("the pod range {} is not IPv4", config.pod_cidr)
    };
    let forward = "/proc/sys/net/ipv4/ip_forward";
    std::fs::write(forward, "1").with_context(|| format!("could not write {forward}"))?;
    Ok(Arc::new(Endpoints::open(&config.state_dir, range)?))
}

/// Removes the devices of all endpoints that are on record, and the records.
pub async fn cleanup(state_dir: &Path) -> Result<()> {
    let range = ipnet::Ipv4Net::default();
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
