//! The node's way to others: which devices lead there, which addresses know the way to pods, which ports
//! translated flows use.

use std::collections::BTreeSet;
use std::net::{IpAddr, Ipv4Addr};

use anyhow::{Context, Result, bail};
use futures::TryStreamExt;
use ipnet::Ipv4Net;
use rtnetlink::RouteMessageBuilder;
use rtnetlink::packet_route::address::AddressAttribute;
use rtnetlink::packet_route::link::LinkAttribute;
use rtnetlink::packet_route::route::RouteAttribute;
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;
use xebec_dataplane_common::nat::Settings;

use crate::maps::{NetworkMaps, be};
use crate::nodes::{NodeView, Nodes};
use crate::{Config, link};

/// The names of the devices that lead to other nodes and the outside.
pub(crate) async fn devices(config: &Config) -> Result<Vec<String>> {
    if !config.devices.is_empty() {
        return Ok(config.devices.clone());
    }
    let handle = link::handle()?;
    let mut found = BTreeSet::new();
    let mut addresses = handle.address().get().execute();
    while let Some(one) = addresses
        .try_next()
        .await
        .context("could not list addresses")?
    {
        let own = one.attributes.iter().any(|attribute| {
            matches!(attribute, AddressAttribute::Address(address) if *address == config.node_ip)
        });
        if own {
            found.insert(one.header.index);
        }
    }
    if found.is_empty() {
        bail!(
            "no device has the node's address {}: name the devices that lead to other nodes",
            config.node_ip
        );
    }
    let request = RouteMessageBuilder::<Ipv4Addr>::new().build();
    let mut routes = handle.route().get(request).execute();
    while let Some(route) = routes.try_next().await.context("could not list routes")? {
        if route.header.destination_prefix_length != 0 {
            continue;
        }
        found.extend(
            route
                .attributes
                .iter()
                .filter_map(|attribute| match attribute {
                    RouteAttribute::Oif(index) => Some(*index),
                    _ => None,
                }),
        );
    }
    let mut names = Vec::new();
    for index in found {
        let mut links = handle.link().get().match_index(index).execute();
        let Some(link) = links
            .try_next()
            .await
            .context("could not look for a device")?
        else {
            continue;
        };
        names.extend(
            link.attributes
                .into_iter()
                .find_map(|attribute| match attribute {
                    LinkAttribute::IfName(name) => Some(name),
                    _ => None,
                }),
        );
    }
    Ok(names)
}

/// The ports that no socket of the node gets by itself: those beyond the range that the kernel gives out.
fn settings(node: Ipv4Addr, local_range: &str) -> Result<Settings> {
    let mut words = local_range.split_whitespace().map(str::parse::<u16>);
    let (Some(Ok(first)), Some(Ok(last))) = (words.next(), words.next()) else {
        bail!("net.ipv4.ip_local_port_range is {local_range:?}, which are no two ports");
    };
    /// Below are well-known ports, and node ports up to 32767.
    const FLOOR: u16 = 32_768;
    /// Fewer would soon be used up.
    const LEAST: u16 = 1_024;
    let above = (last.saturating_add(1).max(FLOOR), u16::MAX);
    let below = (FLOOR, first.saturating_sub(1).max(FLOOR - 1));
    let (first_port, last_port) = if above.1 - above.0 >= below.1.saturating_sub(below.0) {
        above
    } else {
        below
    };
    let ports = last_port.saturating_sub(first_port).saturating_add(1);
    if ports < LEAST {
        bail!(
            "net.ipv4.ip_local_port_range is {local_range:?} and leaves no {LEAST} ports above {FLOOR} for pods' traffic to the outside; set it to \"32768 60999\", for example"
        );
    }
    Ok(Settings {
        node: be(node),
        first_port,
        ports,
    })
}

/// Keeps the maps in step with the nodes until `shutdown`.
pub(crate) async fn run(
    mut maps: NetworkMaps,
    node_ip: IpAddr,
    mut nodes: watch::Receiver<Nodes>,
    shutdown: CancellationToken,
) -> Result<()> {
    let IpAddr::V4(node) = node_ip else {
        bail!("the node's address {node_ip} is not IPv4");
    };
    let range = "/proc/sys/net/ipv4/ip_local_port_range";
    let range =
        std::fs::read_to_string(range).with_context(|| format!("could not read {range}"))?;
    let settings = settings(node, range.trim())?;
    let mut native = BTreeSet::new();
    let mut begun = false;
    loop {
        let told = nodes.borrow_and_update().clone();
        if let Some(told) = told {
            let wanted: BTreeSet<Ipv4Net> = told.values().flat_map(blocks).collect();
            for block in wanted.difference(&native) {
                maps.set_native(*block)?;
            }
            for block in native.difference(&wanted) {
                maps.remove_native(*block)?;
            }
            native = wanted;
            // Translation begins when it is known for whom not.
            if !begun {
                maps.set_settings(settings)?;
                begun = true;
            }
        }
        tokio::select! {
            () = shutdown.cancelled() => return Ok(()),
            changed = nodes.changed() => if changed.is_err() { return Ok(()) },
        }
    }
}

/// The addresses of a node and of its pods.
fn blocks(node: &NodeView) -> impl Iterator<Item = Ipv4Net> {
    let addresses = node.addresses.iter().copied().map(Ipv4Net::from);
    addresses.chain(node.pod_ranges.iter().map(Ipv4Net::trunc))
}

#[cfg(test)]
mod tests {
    use super::*;

    const NODE: Ipv4Addr = Ipv4Addr::new(192, 0, 2, 1);

    #[test]
    fn translated_flows_use_ports_that_no_socket_gets_by_itself() {
        let ports =
            |range: &str| settings(NODE, range).map(|found| (found.first_port, found.ports));
        assert_eq!(ports("32768\t60999").unwrap(), (61_000, 4_536));
        assert_eq!(ports("50000 65535").unwrap(), (32_768, 17_232));
        assert_eq!(ports("1024 30000").unwrap(), (32_768, 32_768));
        assert!(format!("{:#}", ports("1024 65535").unwrap_err()).contains("32768 60999"));
        assert!(ports("a b").is_err());
    }
}
