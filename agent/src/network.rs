//! The node's way to others: which devices lead there, which addresses know the way to pods, which ports
//! translated flows use.

use std::collections::{BTreeMap, BTreeSet};
use std::net::{IpAddr, Ipv4Addr};

use anyhow::{Context, Result, bail};
use futures::{StreamExt, TryStreamExt};
use ipnet::Ipv4Net;
use k8s_openapi::api::core::v1::Node;
use kube::Api;
use kube::runtime::watcher::{self, Event};
use kube::runtime::{WatchStreamExt, watcher as watch};
use rtnetlink::RouteMessageBuilder;
use rtnetlink::packet_route::address::AddressAttribute;
use rtnetlink::packet_route::link::LinkAttribute;
use rtnetlink::packet_route::route::RouteAttribute;
use tokio_util::sync::CancellationToken;
use tracing::warn;
use xebec_dataplane_common::nat::Settings;

use crate::maps::{NetworkMaps, be};
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

/// Keeps the maps in step with the Nodes until `shutdown`.
pub(crate) async fn run(
    client: kube::Client,
    mut maps: NetworkMaps,
    node_ip: IpAddr,
    shutdown: CancellationToken,
) -> Result<()> {
    let IpAddr::V4(node) = node_ip else {
        bail!("the node's address {node_ip} is not IPv4");
    };
    let range = "/proc/sys/net/ipv4/ip_local_port_range";
    let range =
        std::fs::read_to_string(range).with_context(|| format!("could not read {range}"))?;
    let settings = settings(node, range.trim())?;
    let mut nodes = BTreeMap::<String, BTreeSet<Ipv4Net>>::new();
    let mut native = BTreeSet::new();
    let mut listed = BTreeSet::new();
    let (mut complete, mut begun) = (false, false);
    let mut stream = watch(Api::<Node>::all(client), watcher::Config::default())
        .default_backoff()
        .boxed();
    loop {
        let event = tokio::select! {
            () = shutdown.cancelled() => return Ok(()),
            event = stream.next() => event,
        };
        match event {
            Some(Ok(Event::Init)) => listed.clear(),
            Some(Ok(Event::InitApply(one) | Event::Apply(one))) => {
                let name = one.metadata.name.clone().unwrap_or_default();
                listed.insert(name.clone());
                nodes.insert(name, blocks(&one));
            }
            Some(Ok(Event::InitDone)) => {
                nodes.retain(|name, _| listed.contains(name));
                complete = true;
            }
            Some(Ok(Event::Delete(one))) => {
                nodes.remove(one.metadata.name.as_deref().unwrap_or_default());
            }
            Some(Err(error)) => {
                warn!(%error, "the watch of Nodes failed; trying again");
                continue;
            }
            None => bail!("the watch of Nodes ended"),
        }
        let wanted: BTreeSet<Ipv4Net> = nodes.values().flatten().copied().collect();
        for block in wanted.difference(&native) {
            maps.set_native(*block)?;
        }
        for block in native.difference(&wanted) {
            maps.remove_native(*block)?;
        }
        native = wanted;
        // Translation begins when it is known for whom not.
        if complete && !begun {
            maps.set_settings(settings)?;
            begun = true;
        }
    }
}

/// The addresses of a node and of its pods.
fn blocks(node: &Node) -> BTreeSet<Ipv4Net> {
    let status = node.status.iter();
    let addresses = status
        .flat_map(|status| status.addresses.iter().flatten())
        .filter_map(|one| one.address.parse::<Ipv4Addr>().ok())
        .map(Ipv4Net::from);
    let ranges = node
        .spec
        .iter()
        .flat_map(|spec| spec.pod_cidrs.iter().flatten().chain(&spec.pod_cidr))
        .filter_map(|range| range.parse::<Ipv4Net>().ok())
        .map(|range| range.trunc());
    addresses.chain(ranges).collect()
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

    #[test]
    fn a_node_is_its_addresses_and_its_ranges() {
        let node: Node = serde_json::from_value(serde_json::json!({
            "metadata": {"name": "a"},
            "spec": {"podCIDR": "10.244.1.0/24", "podCIDRs": ["10.244.1.0/24", "fd00::/64"]},
            "status": {"addresses": [{"type": "InternalIP", "address": "192.0.2.7"}, {"type": "Hostname", "address": "a"}]},
        }))
        .unwrap();
        let found: Vec<String> = blocks(&node).iter().map(ToString::to_string).collect();
        assert_eq!(found, ["10.244.1.0/24", "192.0.2.7/32"]);
    }
}
