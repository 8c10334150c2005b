//! Routes to the pods of other nodes: each range goes to its node's own address, with no overlay between.

use std::collections::BTreeMap;
use std::net::{IpAddr, Ipv4Addr};

use anyhow::{Context, Result};
use futures::TryStreamExt;
use ipnet::{IpNet, Ipv4Net};
use rtnetlink::packet_route::route::{
    RouteAddress, RouteAttribute, RouteMessage, RouteProtocol, RouteType,
};
use rtnetlink::{Handle, RouteMessageBuilder};
use tokio::sync::watch::Receiver;
use tokio_util::sync::CancellationToken;
use tracing::{info, warn};

use crate::link;
use crate::nodes::Nodes;

/// Marks our routes in the kernel's table (`ip route` shows `proto 88`): what an agent before this one left is
/// known by it, and nobody else's route is touched.
const PROTOCOL: RouteProtocol = RouteProtocol::Other(88);

/// A range of pods, and the node that it is reached through.
type Table = BTreeMap<Ipv4Net, Ipv4Addr>;

/// Keeps the routes in step with the nodes until `shutdown`; then they stay, as the pods do.
pub(crate) async fn run(
    node: String,
    range: Ipv4Net,
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
        let Some(wanted) = wanted(&nodes.borrow_and_update(), &node, range) else {
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
fn wanted(nodes: &Nodes, own: &str, own_range: Ipv4Net) -> Option<Table> {
    let nodes = nodes.as_ref()?;
    let mut table = Table::new();
    for (name, view) in nodes.iter().filter(|(name, _)| *name != own) {
        let gateway = view.addresses.iter().find_map(|one| match one {
            IpAddr::V4(address) => Some(address),
            IpAddr::V6(_) => None,
        });
        let Some(gateway) = gateway else {
            continue;
        };
        let ranges = view.pod_ranges.iter().filter_map(|one| match one {
            IpNet::V4(range) => Some(range),
            IpNet::V6(_) => None,
        });
        for range in ranges {
            // Nobody may take this node's pods or the node itself away by claiming their addresses.
            let taken = range.contains(&own_range) || own_range.contains(range);
            if taken || range.contains(gateway) || table.contains_key(&range.trunc()) {
                warn!(node = name, %range, "the node's pod range is another's already; it is not routed");
                continue;
            }
            table.insert(range.trunc(), *gateway);
        }
    }
    Some(table)
}

fn route(range: Ipv4Net, gateway: Ipv4Addr) -> RouteMessage {
    RouteMessageBuilder::<Ipv4Addr>::new()
        .destination_prefix(range.network(), range.prefix_len())
        .gateway(gateway)
        .protocol(PROTOCOL)
        .build()
}

async fn add(handle: &Handle, range: Ipv4Net, gateway: Ipv4Addr) -> Result<()> {
    handle
        .route()
        .add(route(range, gateway))
        .replace()
        .execute()
        .await
        .with_context(|| format!("could not route {range} through {gateway}"))
}

async fn delete(handle: &Handle, range: Ipv4Net, gateway: Ipv4Addr) -> Result<()> {
    match handle.route().del(route(range, gateway)).execute().await {
        // It went with its device meanwhile.
        Err(rtnetlink::Error::NetlinkError(error)) if error.raw_code() == -libc::ESRCH => Ok(()),
        other => {
            other.with_context(|| format!("could not remove the route to {range} by {gateway}"))
        }
    }
}

/// Our routes that the kernel has.
async fn list(handle: &Handle) -> Result<Table> {
    let all = RouteMessageBuilder::<Ipv4Addr>::new()
        .protocol(RouteProtocol::Unspec)
        .build();
    let mut routes = handle.route().get(all).execute();
    let mut table = Table::new();
    while let Some(route) = routes.try_next().await.context("could not list routes")? {
        if route.header.protocol != PROTOCOL || route.header.kind != RouteType::Unicast {
            continue;
        }
        let (mut to, mut by) = (None, None);
        for attribute in &route.attributes {
            match attribute {
                RouteAttribute::Destination(RouteAddress::Inet(ip)) => to = Some(*ip),
                RouteAttribute::Gateway(RouteAddress::Inet(ip)) => by = Some(*ip),
                _ => {}
            }
        }
        if let (Some(to), Some(by)) = (to, by) {
            let range = Ipv4Net::new(to, route.header.destination_prefix_length)
                .context("the kernel told of a route with a bad prefix")?;
            table.insert(range, by);
        }
    }
    Ok(table)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::nodes::NodeView;

    fn nodes(all: &[(&str, &str, &str)]) -> Nodes {
        let view = |address: &str, range: &str| NodeView {
            addresses: vec![address.parse().unwrap()],
            pod_ranges: vec![range.parse().unwrap()],
            ..NodeView::default()
        };
        Some(
            all.iter()
                .map(|(name, address, range)| ((*name).to_owned(), view(address, range)))
                .collect(),
        )
    }

    #[test]
    fn each_other_node_has_a_route() {
        let own = "10.244.0.0/24".parse().unwrap();
        let all = nodes(&[
            ("a", "10.0.0.1", "10.244.0.0/24"),
            ("b", "10.0.0.2", "10.244.1.0/24"),
            ("c", "10.0.0.3", "10.244.2.0/24"),
        ]);
        let table = wanted(&all, "a", own).unwrap();
        assert_eq!(
            table,
            Table::from([
                ("10.244.1.0/24".parse().unwrap(), [10, 0, 0, 2].into()),
                ("10.244.2.0/24".parse().unwrap(), [10, 0, 0, 3].into()),
            ])
        );
        assert!(wanted(&None, "a", own).is_none());
    }

    #[test]
    fn no_node_takes_anothers_range() {
        let own = "10.244.0.0/24".parse().unwrap();
        let all = nodes(&[
            ("b", "10.0.0.2", "10.244.0.128/25"),
            ("c", "10.0.0.3", "10.0.0.0/8"),
            ("d", "10.0.0.4", "10.244.2.0/24"),
            ("e", "10.0.0.5", "10.244.2.0/24"),
        ]);
        let table = wanted(&all, "a", own).unwrap();
        assert_eq!(
            table,
            Table::from([("10.244.2.0/24".parse().unwrap(), [10, 0, 0, 4].into())])
        );
    }
}
