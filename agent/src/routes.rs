//! Routes to the pods of other nodes: each range goes to its node's own address, with no overlay between.

use std::collections::BTreeMap;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use anyhow::{Context, Result, bail};
use futures::TryStreamExt;
use ipnet::IpNet;
use rtnetlink::packet_route::route::{
    RouteAddress, RouteAttribute, RouteMessage, RouteProtocol, RouteType,
};
use rtnetlink::{Handle, RouteMessageBuilder};
use tokio::sync::watch::Receiver;
use tokio_util::sync::CancellationToken;
use tracing::{debug, info, warn};

use crate::link;
use crate::nodes::Nodes;

/// Marks our routes in the kernel's table (`ip route` shows `proto 88`): what an agent before this one left is
/// known by it, and nobody else's route is touched.
pub(crate) const PROTOCOL: RouteProtocol = RouteProtocol::Other(88);

/// A range of pods, and the node that it is reached through.
type Table = BTreeMap<IpNet, IpAddr>;

/// Keeps the routes in step with the nodes until `shutdown`; then they stay, as the pods do.
pub async fn run(
    node: String,
    own_ranges: Vec<IpNet>,
    mut nodes: Receiver<Nodes>,
    shutdown: CancellationToken,
) -> Result<()> {
    let handle = link::handle()?;
    let mut table: Option<Table> = None;
    loop {
        tokio::select! {
            () = shutdown.cancelled() => return Ok(()),
            changed = nodes.changed() => if changed.is_err() { return Ok(()) },
        }
        let Some(wanted) = wanted(&nodes.borrow_and_update(), &node, &own_ranges) else {
            continue;
        };
        let mut before = match table.take() {
            Some(table) => table,
            None => list(&handle).await?,
        };
        for (range, gone) in before.clone() {
            if wanted.contains_key(&range) {
                continue;
            }
            match delete(&handle, range, gone).await {
                Ok(()) => info!(%range, node = %gone, "route removed"),
                Err(error) => warn!(error = format!("{error:#}"), "a route stays"),
            }
            before.remove(&range);
        }
        for (range, gateway) in wanted {
            if before.get(&range) == Some(&gateway) {
                continue;
            }
            match add(&handle, range, gateway).await {
                Ok(()) => {
                    info!(%range, node = %gateway, "route added");
                    before.insert(range, gateway);
                }
                // It is tried again with the next change.
                Err(error) => warn!(
                    error = format!("{error:#}"),
                    "pods of another node can't be reached (are the nodes on one network?)"
                ),
            }
        }
        table = Some(before);
    }
}

/// The routes that there should be; none while the nodes are not known.
fn wanted(nodes: &Nodes, own: &str, own_ranges: &[IpNet]) -> Option<Table> {
    let nodes = nodes.as_ref()?;
    let all_addresses: Vec<IpAddr> = nodes
        .values()
        .flat_map(|view| view.addresses.iter().copied())
        .collect();
    let mut table = Table::new();
    for (name, view) in nodes.iter().filter(|(name, _)| *name != own) {
        for range in &view.pod_ranges {
            let v4 = range.addr().is_ipv4();
            // Pods here have no addresses to speak from to those of another family.
            if !own_ranges.iter().any(|own| own.addr().is_ipv4() == v4) {
                continue;
            }
            let same = |address: &&IpAddr| address.is_ipv4() == v4;
            let Some(gateway) = view.addresses.iter().find(same) else {
                debug!(node = name, %range, "the node has no address of its pod range's family yet");
                continue;
            };
            // Nobody may take this node's pods or a node itself away by claiming their addresses.
            let taken = own_ranges
                .iter()
                .any(|own| range.contains(own) || own.contains(range));
            let a_nodes = all_addresses.iter().any(|address| range.contains(address));
            if taken || a_nodes || table.contains_key(&range.trunc()) {
                warn!(node = name, %range, "the node's pod range is another's already; it is not routed");
                continue;
            }
            table.insert(range.trunc(), *gateway);
        }
    }
    Some(table)
}

/// Both are of one family.
fn route(range: IpNet, gateway: IpAddr) -> Result<RouteMessage> {
    Ok(match (range, gateway) {
        (IpNet::V4(range), IpAddr::V4(gateway)) => RouteMessageBuilder::<Ipv4Addr>::new()
            .destination_prefix(range.network(), range.prefix_len())
            .gateway(gateway)
            .protocol(PROTOCOL)
            .build(),
        (IpNet::V6(range), IpAddr::V6(gateway)) => RouteMessageBuilder::<Ipv6Addr>::new()
            .destination_prefix(range.network(), range.prefix_len())
            .gateway(gateway)
            .protocol(PROTOCOL)
            .build(),
        _ => bail!("{range} and {gateway} are not of one family"),
    })
}

async fn add(handle: &Handle, range: IpNet, gateway: IpAddr) -> Result<()> {
    handle
        .route()
        .add(route(range, gateway)?)
        .replace()
        .execute()
        .await
        .with_context(|| format!("could not route {range} through {gateway}"))
}

async fn delete(handle: &Handle, range: IpNet, gateway: IpAddr) -> Result<()> {
    match handle.route().del(route(range, gateway)?).execute().await {
        // It went with its device meanwhile.
        Err(rtnetlink::Error::NetlinkError(error)) if error.raw_code() == -libc::ESRCH => Ok(()),
        other => {
            other.with_context(|| format!("could not remove the route to {range} by {gateway}"))
        }
    }
}

/// Our routes that the kernel has.
async fn list(handle: &Handle) -> Result<Table> {
    let families = [
        RouteMessageBuilder::<Ipv4Addr>::new()
            .protocol(RouteProtocol::Unspec)
            .build(),
        RouteMessageBuilder::<Ipv6Addr>::new()
            .protocol(RouteProtocol::Unspec)
            .build(),
    ];
    let mut table = Table::new();
    for request in families {
        let mut routes = handle.route().get(request).execute();
        while let Some(route) = routes.try_next().await.context("could not list routes")? {
            if route.header.protocol != PROTOCOL || route.header.kind != RouteType::Unicast {
                continue;
            }
            let (mut to, mut by) = (None, None);
            for attribute in &route.attributes {
                match attribute {
                    RouteAttribute::Destination(address) => to = ip(address),
                    RouteAttribute::Gateway(address) => by = ip(address),
                    _ => {}
                }
            }
            if let (Some(to), Some(by)) = (to, by) {
                let range = IpNet::new(to, route.header.destination_prefix_length)
                    .context("the kernel told of a route with a bad prefix")?;
                table.insert(range, by);
            }
        }
    }
    Ok(table)
}

fn ip(address: &RouteAddress) -> Option<IpAddr> {
    match address {
        RouteAddress::Inet(ip) => Some((*ip).into()),
        RouteAddress::Inet6(ip) => Some((*ip).into()),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::nodes::NodeView;

    /// Nodes with lists of addresses and of ranges.
    fn nodes(all: &[(&str, &str, &str)]) -> Nodes {
        let view = |addresses: &str, ranges: &str| NodeView {
            addresses: addresses
                .split(',')
                .map(|one| one.parse().unwrap())
                .collect(),
            pod_ranges: ranges.split(',').map(|one| one.parse().unwrap()).collect(),
            ..NodeView::default()
        };
        Some(
            all.iter()
                .map(|(name, address, range)| ((*name).to_owned(), view(address, range)))
                .collect(),
        )
    }

    fn table(all: &[(&str, &str)]) -> Table {
        all.iter()
            .map(|(range, gateway)| (range.parse().unwrap(), gateway.parse().unwrap()))
            .collect()
    }

    #[test]
    fn each_other_node_has_a_route_of_each_family() {
        let own = [
            "10.244.0.0/24".parse().unwrap(),
            "fd00:1::/64".parse().unwrap(),
        ];
        let all = nodes(&[
            ("a", "10.0.0.1,fd00::1", "10.244.0.0/24,fd00:1::/64"),
            ("b", "fd00::2,10.0.0.2", "10.244.1.0/24,fd00:1:0:1::/64"),
            ("c", "10.0.0.3", "10.244.2.0/24,fd00:1:0:2::/64"),
        ]);
        assert_eq!(
            wanted(&all, "a", &own).unwrap(),
            table(&[
                ("10.244.1.0/24", "10.0.0.2"),
                ("10.244.2.0/24", "10.0.0.3"),
                ("fd00:1:0:1::/64", "fd00::2"),
            ])
        );
        assert!(wanted(&None, "a", &own).is_none());
    }

    #[test]
    fn no_node_takes_anothers_range() {
        let own = [
            "10.244.0.0/24".parse().unwrap(),
            "fd00:1::/64".parse().unwrap(),
        ];
        let all = nodes(&[
            ("a", "10.1.0.1,fd00:9::1", "10.244.0.0/24,fd00:1::/64"),
            ("b", "10.0.0.2", "10.244.0.128/25"),
            ("c", "10.0.0.3", "10.0.0.0/8"),
            ("d", "10.0.0.4", "10.244.2.0/24"),
            ("e", "10.0.0.5", "10.244.2.0/24"),
            ("f", "10.0.0.6,fd00:8::6", "10.1.0.0/24,fd00:1::/48"),
            ("g", "fd00:8::7", "fd00:9::/64"),
        ]);
        assert_eq!(
            wanted(&all, "a", &own).unwrap(),
            table(&[("10.244.2.0/24", "10.0.0.4")])
        );
    }
}
