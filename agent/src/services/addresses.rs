//! Where node ports are reached.

use std::collections::BTreeMap;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::str::FromStr;

use anyhow::{Context, Result};
use futures::StreamExt;
use ipnet::IpNet;
use rtnetlink::MulticastGroup;
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;
use tracing::warn;
use xebec_dataplane_common::service::{OTHERS, OWN};

use crate::nodes::{NodeView, Nodes};

/// Which of a node's addresses node ports are reached at (`--nodeport-addresses`).
#[derive(Clone, Debug, Default, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub enum NodePortAddresses {
    /// All of them, and IPv4's loopback.
    #[default]
    All,
    /// The node's own address of each family, as its object tells it.
    Primary,
    /// Those in these blocks.
    Blocks(Vec<IpNet>),
}

impl FromStr for NodePortAddresses {
    type Err = anyhow::Error;

    /// Blocks with commas between, or the word `primary`; nothing for all.
    fn from_str(text: &str) -> Result<Self> {
        match text.trim() {
            "" => Ok(Self::All),
            "primary" => Ok(Self::Primary),
            blocks => {
                let block = |text: &str| {
                    text.trim().parse().with_context(|| {
                        format!(
                            "{text:?} is neither a block of addresses nor the only word \"primary\""
                        )
                    })
                };
                Ok(Self::Blocks(
                    blocks.split(',').map(block).collect::<Result<_>>()?,
                ))
            }
        }
    }
}

/// Whether others may reach a node at an address.
fn reachable(address: &IpAddr) -> bool {
    match address {
        IpAddr::V4(four) => !(four.is_loopback() || four.is_link_local()),
        IpAddr::V6(six) => !(six.is_loopback() || six.is_unicast_link_local()),
    }
}

/// The first of each family.
fn primary(addresses: &[IpAddr]) -> impl Iterator<Item = IpAddr> {
    let first = |v4: bool| addresses.iter().find(move |one| one.is_ipv4() == v4);
    [first(true), first(false)].into_iter().flatten().copied()
}

/// Addresses and whose they are: this node's own, or another's, whose node ports lead to the same.
pub fn of(
    wanted: &NodePortAddresses,
    node: &str,
    node_ips: &[IpAddr],
    local: &[IpAddr],
    nodes: &Nodes,
) -> BTreeMap<IpAddr, u8> {
    let view = nodes.as_ref().and_then(|nodes| nodes.get(node));
    let told = view.map_or(&[][..], |view| &view.addresses);
    let own: Vec<IpAddr> = node_ips.iter().chain(told).copied().collect();
    let mut all: BTreeMap<IpAddr, u8> = BTreeMap::new();
    let others = nodes.iter().flatten().filter(|(name, _)| *name != node);
    let others = others.map(|(_, view): (_, &NodeView)| &view.addresses[..]);
    let mut add = |address: IpAddr, whose: u8| {
        all.insert(address, whose);
    };
    match wanted {
        NodePortAddresses::All => {
            others.flatten().for_each(|one| add(*one, OTHERS));
            let own = own.iter().chain(local).filter(|one| reachable(one));
            own.for_each(|one| add(*one, OWN));
            add(Ipv4Addr::LOCALHOST.into(), OWN);
        }
        NodePortAddresses::Primary => {
            others.flat_map(primary).for_each(|one| add(one, OTHERS));
            primary(&own).for_each(|one| add(one, OWN));
        }
        NodePortAddresses::Blocks(blocks) => {
            let inside = |one: &&IpAddr| blocks.iter().any(|block| block.contains(*one));
            let others = others.flatten().filter(inside);
            others.for_each(|one| add(*one, OTHERS));
            own.iter()
                .chain(local)
                .filter(inside)
                .for_each(|one| add(*one, OWN));
        }
    }
    // IPv6's loopback can't be translated: its packets may not leave the device.
    all.remove(&IpAddr::V6(Ipv6Addr::LOCALHOST));
    all.retain(|address, _| !address.is_unspecified() && !address.is_multicast());
    all
}

/// Where the ports of health checks are opened.
pub fn for_health(wanted: &NodePortAddresses, all: &BTreeMap<IpAddr, u8>) -> Vec<IpAddr> {
    if *wanted == NodePortAddresses::All {
        let both = std::net::TcpListener::bind((Ipv6Addr::UNSPECIFIED, 0)).is_ok();
        let any = if both {
            Ipv6Addr::UNSPECIFIED.into()
        } else {
            Ipv4Addr::UNSPECIFIED.into()
        };
        return vec![any];
    }
    let own = all.iter().filter(|(_, whose)| **whose == OWN);
    own.map(|(address, _)| *address).collect()
}

/// The addresses of this network namespace's devices.
fn local() -> Result<Vec<IpAddr>> {
    let all = nix::ifaddrs::getifaddrs().context("could not list the node's addresses")?;
    let mut addresses: Vec<IpAddr> = all
        .filter_map(|one| {
            let address = one.address?;
            let four = address.as_sockaddr_in().map(|one| IpAddr::V4(one.ip()));
            four.or_else(|| address.as_sockaddr_in6().map(|one| IpAddr::V6(one.ip())))
        })
        .collect();
    addresses.sort();
    addresses.dedup();
    Ok(addresses)
}

/// Tells the addresses of this network namespace's devices whenever they change, until `shutdown`.
pub async fn follow(
    told: watch::Sender<Option<Vec<IpAddr>>>,
    shutdown: CancellationToken,
) -> Result<()> {
    let tell = || match local() {
        Ok(now) => {
            told.send_if_modified(|before| {
                let news = before.as_ref() != Some(&now);
                *before = Some(now);
                news
            });
        }
        Err(error) => {
            warn!(
                error = format!("{error:#}"),
                "node ports may be missing at some address"
            );
            told.send_if_modified(|before| {
                let news = before.is_none();
                before.get_or_insert_default();
                news
            });
        }
    };
    let groups = [MulticastGroup::Ipv4Ifaddr, MulticastGroup::Ipv6Ifaddr];
    let (connection, _handle, mut changes) =
        rtnetlink::new_multicast_connection(&groups).context("could not open netlink")?;
    let connection = tokio::spawn(connection);
    // Changes from here on are told of.
    tell();
    loop {
        tokio::select! {
            () = shutdown.cancelled() => break,
            change = changes.next() => match change {
                Some(_) => {
                    // They come in bursts.
                    tokio::time::sleep(std::time::Duration::from_millis(50)).await;
                    while futures::FutureExt::now_or_never(changes.next()).flatten().is_some() {}
                    tell();
                }
                None => {
                    warn!("the kernel tells no more of addresses; node ports stay at those that were known");
                    shutdown.cancelled().await;
                }
            }
        }
    }
    connection.abort();
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn addresses_of_node_ports() {
        let ip = |text: &str| text.parse::<IpAddr>().unwrap();
        let view = |all: &[&str]| NodeView {
            addresses: all.iter().map(|one| ip(one)).collect(),
            ..NodeView::default()
        };
        let nodes = Some(BTreeMap::from([
            (
                "a".to_owned(),
                view(&["10.0.0.1", "fd00::1", "203.0.113.1"]),
            ),
            (
                "b".to_owned(),
                view(&["10.0.0.2", "203.0.113.2", "fd00::2"]),
            ),
        ]));
        let local = [
            "127.0.0.1",
            "10.0.0.1",
            "192.168.7.1",
            "fe80::1",
            "::1",
            "fd00::1",
        ]
        .map(ip);
        let texts = |wanted: &str| -> Vec<String> {
            let wanted = wanted.parse().unwrap();
            let all = of(&wanted, "a", &[ip("10.0.0.1")], &local, &nodes);
            all.iter()
                .map(|(one, whose)| format!("{one} {whose}"))
                .collect()
        };
        assert_eq!(
            texts(""),
            [
                "10.0.0.1 1",
                "10.0.0.2 2",
                "127.0.0.1 1",
                "192.168.7.1 1",
                "203.0.113.1 1",
                "203.0.113.2 2",
                "fd00::1 1",
                "fd00::2 2",
            ]
        );
        assert_eq!(
            texts("primary"),
            ["10.0.0.1 1", "10.0.0.2 2", "fd00::1 1", "fd00::2 2"]
        );
        assert_eq!(
            texts("127.0.0.0/8, 192.168.0.0/16,fd00::/8"),
            ["127.0.0.1 1", "192.168.7.1 1", "fd00::1 1", "fd00::2 2"]
        );
        assert!("primary,10.0.0.0/8".parse::<NodePortAddresses>().is_err());
        assert!(super::local().unwrap().contains(&ip("127.0.0.1")));
    }
}
