//! Flags that kube-proxy has, too: where metrics and health are served, and where node ports are reached.

use std::net::{IpAddr, SocketAddr};
use std::str::FromStr;

use anyhow::{Context, Result};
use clap::Args;
use xebec_agent::services::NodePortAddresses;

/// Common to `up` and `agent`.
#[derive(Args, Clone, Debug)]
pub struct Ports {
    /// Where metrics are served, as kube-proxy's; empty for nowhere
    #[arg(long, default_value = "127.0.0.1:10249", value_parser = address(10_249))]
    metrics_bind_address: Bind,
    /// Where load balancers ask for the node's health, as kube-proxy's; empty for nowhere
    #[arg(long, default_value = "0.0.0.0:10256", value_parser = address(10_256))]
    healthz_bind_address: Bind,
    /// Of the node's addresses, only those in these blocks (with commas between) are reached at node ports; the word
    /// `primary` is for the node's own address of each family. All of them by default
    #[arg(long, value_delimiter = ',', value_parser = word)]
    nodeport_addresses: Vec<String>,
}

/// An address to listen on, or none.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Bind(Option<SocketAddr>);

/// An address with a port or, as kube-proxy takes it, without.
fn address(port: u16) -> impl Fn(&str) -> Result<Bind> + Clone {
    move |text| {
        if text.is_empty() {
            return Ok(Bind(None));
        }
        let whole = text.parse::<SocketAddr>();
        let alone = || text.parse().map(|address: IpAddr| (address, port).into());
        let address = whole.or_else(|_| alone());
        let address = address.context("it is no IP address with a port, as 127.0.0.1:10249 is")?;
        Ok(Bind(Some(address)))
    }
}

/// A block of addresses, or the word that stands for some.
fn word(text: &str) -> Result<String> {
    NodePortAddresses::from_str(text).map(|_| text.to_owned())
}

impl Ports {
    /// Where metrics are served.
    pub fn metrics(&self) -> Option<SocketAddr> {
        self.metrics_bind_address.0
    }

    /// Where the node's health is told.
    pub fn healthz(&self) -> Option<SocketAddr> {
        self.healthz_bind_address.0
    }

    /// Where node ports are reached.
    pub fn node_ports(&self) -> Result<NodePortAddresses> {
        let all = self.nodeport_addresses.join(",");
        all.parse().context("--nodeport-addresses")
    }
}

#[cfg(test)]
mod tests {
    use clap::Parser;

    use super::*;

    #[derive(Parser)]
    struct Cli {
        #[command(flatten)]
        ports: Ports,
    }

    fn ports(args: &[&str]) -> Result<Ports> {
        Ok(Cli::try_parse_from([&["xebec"], args].concat())?.ports)
    }

    #[test]
    fn addresses_as_kube_proxy_takes_them() {
        let found = ports(&[]).unwrap();
        assert_eq!(found.metrics().unwrap().to_string(), "127.0.0.1:10249");
        assert_eq!(found.healthz().unwrap().to_string(), "0.0.0.0:10256");
        let found = ports(&["--metrics-bind-address=::", "--healthz-bind-address="]).unwrap();
        assert_eq!(found.metrics().unwrap().to_string(), "[::]:10249");
        assert_eq!(found.healthz(), None);
        assert!(ports(&["--metrics-bind-address=localhost:1"]).is_err());
        assert!(ports(&["--masquerade-all"]).is_err());
    }

    #[test]
    fn blocks_of_node_ports() {
        let of = |args: &[&str]| ports(args).and_then(|ports| ports.node_ports());
        assert_eq!(of(&[]).unwrap(), NodePortAddresses::All);
        assert_eq!(
            of(&["--nodeport-addresses", "primary"]).unwrap(),
            NodePortAddresses::Primary
        );
        let blocks = ["192.0.2.0/24", "fd00::/64"].map(|one| one.parse().unwrap());
        assert_eq!(
            of(&["--nodeport-addresses", "192.0.2.0/24,fd00::/64"]).unwrap(),
            NodePortAddresses::Blocks(blocks.to_vec())
        );
        for bad in ["eth0", "primary,192.0.2.0/24"] {
            assert!(of(&["--nodeport-addresses", bad]).is_err(), "{bad}");
        }
    }
}
