//! The way out for nodes whose network ends at this machine: what they send to the outside bears its address.

use std::net::IpAddr;
use std::path::PathBuf;

use anyhow::{Context, Result};
use ipnet::IpNet;
use xebec_policy::kernel::{Endpoint, PolicyKernel};

use crate::forwarding;
use crate::loader::{self, Xdp};
use crate::network;

/// What the way out needs to know.
#[derive(Clone, Debug)]
pub struct Config {
    /// This machine's addresses towards the outside, at most one of a family.
    pub addresses: Vec<IpAddr>,
    /// The nodes behind it, which have translated their pods' addresses to theirs already.
    pub nodes: Vec<IpAddr>,
    /// Addresses that know the way to nodes and pods.
    pub native: Vec<IpNet>,
    /// Where a BPF filesystem for pinned links is mounted: unmounted, the way out is closed.
    pub bpf_dir: PathBuf,
}

/// Opens the way out; it stays open without a process. One that was left open is taken over with its connections.
pub async fn open(config: &Config) -> Result<()> {
    let of = |v4: bool| config.addresses.iter().any(|ip| ip.is_ipv4() == v4);
    forwarding::turn_on(of(true), of(false))?;
    let mut programs = loader::Loaded::new(&config.bpf_dir)?;
    let mut maps = programs.maps()?;
    for block in &config.native {
        maps.network.set_native(*block, None)?;
    }
    // To the programs, the nodes are here what pods are on a node.
    for node in &config.nodes {
        maps.policy.set_endpoint(*node, Endpoint::default())?;
    }
    maps.network
        .set_settings(network::settings_of(&config.addresses)?)?;
    let devices = network::devices(&[], &config.addresses).await?;
    // What comes back here goes on through the stack, for which XDP is of no use.
    programs
        .attach_network(&devices, Xdp::Off)
        .await
        .context("could not open the nodes' way to the outside")?;
    Ok(())
}
