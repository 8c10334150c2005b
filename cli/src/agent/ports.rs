//! Flags that kube-proxy has, too: where metrics and health are served, and where node ports are reached.

use std::net::{IpAddr, SocketAddr};

use anyhow::{Context, Result};
use clap::Args;
use ipnet::IpNet;

/// Common to `up` and `agent`.
#[derive(Args, Clone, Debug)]
pub struct Ports {
    /// Where metrics are served, as kube-proxy's; empty for nowhere
    #[arg(long, default_value = "127.0.0.1:10249", value_parser = address(10_249))]
    metrics_bind_address: Bind,
    /// Where load balancers ask for the node's health, as kube-proxy's; empty for nowhere
    #[arg(long, default_value = "0.0.0.0:10256", value_parser = address(10_256))]
    healthz_bind_address: Bind,
    /// Of the node's addresses, only those in these blocks are reached at node ports; `primary` is the node's own
    /// address of each family. All of them by default
    #[arg(long, value_delimiter = ',', value_parser = block)]
    nodeport_addresses: Vec<Block>,
}

/// An address to listen on, or none.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Bind(Option<SocketAddr>);

/// Some of a node's addresses.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Block {
    /// Those that the Node object names first.
    Primary,
    /// Those in a block.
    Net(IpNet),
}

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

fn block(text: &str) -> Result<Block> {
    if text == "primary" {
        return Ok(Block::Primary);
    }
    let block = text.parse::<IpNet>();
    let block = block.context("it is neither `primary` nor a block, as 192.0.2.0/24 is")?;
    Ok(Block::Net(block.trunc()))
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

    /// The blocks of addresses with node ports, of a node with these addresses; none for all addresses.
    pub fn nodeport_addresses(&self, node: &[IpAddr]) -> Vec<IpNet> {
        let mut blocks = Vec::new();
        for block in &self.nodeport_addresses {
            match block {
                Block::Net(block) => blocks.push(*block),
                Block::Primary => {
                    let first = |v4| node.iter().find(|one| one.is_ipv4() == v4).copied();
                    blocks.extend(
                        [first(true), first(false)]
                            .into_iter()
                            .flatten()
                            .map(IpNet::from),
                    );
                }
            }
        }
        blocks
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
        let node = ["192.0.2.1", "192.0.2.2", "fd00::1"].map(|one| one.parse().unwrap());
        let of = |args: &[&str]| -> Vec<String> {
            let blocks = ports(args).unwrap().nodeport_addresses(&node);
            blocks.iter().map(IpNet::to_string).collect()
        };
        assert!(of(&[]).is_empty());
        assert_eq!(
            of(&["--nodeport-addresses", "primary,203.0.113.7/24"]),
            ["192.0.2.1/32", "fd00::1/128", "203.0.113.0/24"]
        );
        assert!(ports(&["--nodeport-addresses", "eth0"]).is_err());
    }
}
