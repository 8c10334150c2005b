//! The virtual switch of `up --nodes N`: a bridge, and for each node a network namespace that a veth pair joins to it.

use std::fs::File;
use std::net::{IpAddr, Ipv4Addr};
use std::os::fd::AsRawFd;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail};
use futures::TryStreamExt;
use ipnet::Ipv4Net;
use nix::mount::{MntFlags, MsFlags, mount, umount2};
use nix::sched::{CloneFlags, unshare};
use rtnetlink::packet_route::route::RouteType;
use rtnetlink::{Handle, LinkBridge, LinkUnspec, LinkVeth, RouteMessageBuilder};
use serde::{Deserialize, Serialize};

use super::node::NodeConfig;
use crate::paths::private_dir;

/// The bridge; the host's own address is on it.
pub const BRIDGE: &str = "xebec0";
/// The node's end of its cable.
const INNER: &str = "eth0";

/// How a node with a network namespace of its own is joined to the switch.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Cable {
    /// Where its network namespace is kept.
    pub netns: PathBuf,
    /// Its port of the switch: the host's end of the cable.
    pub port: String,
    /// The range of the switch.
    pub range: Ipv4Net,
    /// The host's address on the switch: where nodes find the API server.
    pub host: Ipv4Addr,
}

/// The address of the host on the switch, the first of its range.
pub fn host_address(range: Ipv4Net) -> Result<Ipv4Addr> {
    range
        .hosts()
        .next()
        .with_context(|| format!("--node-cidr {range} is empty"))
}

/// Address and cable of the node with this index.
pub fn plan(range: Ipv4Net, index: usize, netns: PathBuf) -> Result<(IpAddr, Cable)> {
    let cable = Cable {
        netns,
        port: format!("{BRIDGE}-n{}", index + 1),
        range,
        host: host_address(range)?,
    };
    // The first ten are kept free for the host and what may come.
    let address = range
        .hosts()
        .nth(10 + index)
        .with_context(|| format!("--node-cidr {range} has no room for {} nodes", index + 1))?;
    Ok((IpAddr::V4(address), cable))
}

/// The range must be nobody else's.
pub fn check_free(range: Ipv4Net) -> Result<()> {
    for found in nix::ifaddrs::getifaddrs().context("could not list network devices")? {
        let address = found.address.as_ref().and_then(|a| a.as_sockaddr_in());
        let mask = found.netmask.as_ref().and_then(|a| a.as_sockaddr_in());
        let (Some(address), Some(mask)) = (address, mask) else {
            continue;
        };
        let Ok(other) = Ipv4Net::with_netmask(address.ip(), mask.ip()) else {
            continue;
        };
        if found.interface_name != BRIDGE && (other.contains(&range) || range.contains(&other)) {
            bail!(
                "the nodes' range {range} overlaps {other} of the device {}; choose another with --node-cidr",
                found.interface_name
            );
        }
    }
    Ok(())
}

/// A netlink handle in this thread's network namespace.
fn netlink() -> Result<Handle> {
    let (connection, handle, _) = rtnetlink::new_connection().context("could not open netlink")?;
    tokio::spawn(connection);
    Ok(handle)
}

/// Whether a switch is there.
pub async fn exists() -> Result<bool> {
    Ok(link_index(&netlink()?, BRIDGE).await?.is_some())
}

/// Makes what is not there yet: bridge, namespaces, cables, and the host's routes to the pods. What a killed
/// predecessor left is taken over, since its pods live in it.
pub async fn ensure(nodes: &[NodeConfig]) -> Result<()> {
    let handle = netlink()?;
    for node in nodes {
        let Some(cable) = &node.cable else { continue };
        let bridge = ensure_bridge(&handle, cable).await?;
        private_dir(&node.layout.run)?;
        ensure_netns(&cable.netns)?;
        ensure_cable(&handle, bridge, cable).await?;
        let (ipnet::IpNet::V4(pods), IpAddr::V4(address)) = (node.pod_cidr, node.ip) else {
            bail!("node {} has no IPv4 range", node.name);
        };
        let route = RouteMessageBuilder::<Ipv4Addr>::new()
            .destination_prefix(pods.network(), pods.prefix_len())
            .gateway(address)
            .output_interface(bridge)
            .build();
        let route = handle.route().add(route).replace();
        route
            .execute()
            .await
            .with_context(|| format!("could not route {pods} to node {}", node.name))?;
    }
    Ok(())
}

async fn ensure_bridge(handle: &Handle, cable: &Cable) -> Result<u32> {
    let bridge = match link_index(handle, BRIDGE).await? {
        Some(index) => index,
        None => {
            let link = LinkBridge::new(BRIDGE).up().build();
            let made = handle.link().add(link).execute().await;
            made.with_context(|| format!("could not make the bridge {BRIDGE}"))?;
            must_find(handle, BRIDGE).await?
        }
    };
    handle
        .address()
        .add(bridge, cable.host.into(), cable.range.prefix_len())
        .replace()
        .execute()
        .await
        .with_context(|| format!("could not give {BRIDGE} its address"))?;
    up(handle, bridge, BRIDGE).await?;
    Ok(bridge)
}

async fn ensure_cable(handle: &Handle, bridge: u32, cable: &Cable) -> Result<()> {
    let port = &cable.port;
    if link_index(handle, port).await?.is_some() {
        if is_plugged(cable).await? {
            return Ok(());
        }
        delete_link(handle, port).await?;
    }
    let peer = format!("{port}p");
    let made = handle.link().add(LinkVeth::new(port, &peer).build());
    made.execute()
        .await
        .with_context(|| format!("could not make the veth pair {port}"))?;
    let (plug, inner) = (
        must_find(handle, port).await?,
        must_find(handle, &peer).await?,
    );
    let link = LinkUnspec::new_with_index(plug)
        .controller(bridge)
        .up()
        .build();
    handle
        .link()
        .set(link)
        .execute()
        .await
        .with_context(|| format!("could not plug {port} into {BRIDGE}"))?;
    let namespace = open(&cable.netns)?;
    let link = LinkUnspec::new_with_index(inner)
        .name(INNER)
        .setns_by_fd(namespace.as_raw_fd())
        .build();
    handle
        .link()
        .set(link)
        .execute()
        .await
        .with_context(|| format!("could not move {peer} into its namespace"))
}

/// Whether the other end of a node's cable is in its namespace.
async fn is_plugged(cable: &Cable) -> Result<bool> {
    let cable = cable.clone();
    let thread = std::thread::spawn(move || -> Result<bool> {
        enter(&cable.netns)?;
        Ok(nix::net::if_::if_nametoindex(INNER).is_ok())
    });
    join(thread)
}

/// Within a node's namespace: loopback, address, the ways to the host and to nobody.
pub async fn configure_inside(node: &NodeConfig) -> Result<()> {
    let (Some(cable), ipnet::IpNet::V4(pods)) = (&node.cable, node.pod_cidr) else {
        return Ok(());
    };
    let handle = netlink()?;
    let lo = must_find(&handle, "lo").await?;
    up(&handle, lo, "lo").await?;
    let index = must_find(&handle, INNER).await?;
    up(&handle, index, INNER).await?;
    handle
        .address()
        .add(index, node.ip, cable.range.prefix_len())
        .replace()
        .execute()
        .await
        .with_context(|| format!("could not give the node its address {}", node.ip))?;
    let default = RouteMessageBuilder::<Ipv4Addr>::new()
        .gateway(cable.host)
        .output_interface(index)
        .build();
    let default = handle.route().add(default).replace();
    default
        .execute()
        .await
        .context("could not set the node's default route")?;
    // What is sent to a pod that is not there would otherwise go to the host and come back.
    let nobody = RouteMessageBuilder::<Ipv4Addr>::new()
        .destination_prefix(pods.network(), pods.prefix_len())
        .kind(RouteType::Unreachable)
        .build();
    let nobody = handle.route().add(nobody).replace();
    nobody
        .execute()
        .await
        .with_context(|| format!("could not close the route to {pods}"))
}

/// Takes it all away again, as far as it is there.
pub async fn remove(nodes: &[NodeConfig]) -> Result<()> {
    let handle = netlink()?;
    let mut any = false;
    for cable in nodes.iter().filter_map(|node| node.cable.as_ref()) {
        any = true;
        delete_link(&handle, &cable.port).await?;
        remove_netns(&cable.netns)?;
    }
    if any {
        delete_link(&handle, BRIDGE).await?;
    }
    Ok(())
}

/// Moves this thread into a network namespace; what it starts is in it too.
pub fn enter(netns: &Path) -> Result<()> {
    nix::sched::setns(open(netns)?, CloneFlags::CLONE_NEWNET)
        .with_context(|| format!("could not enter the network namespace {}", netns.display()))
}

fn open(netns: &Path) -> Result<File> {
    File::open(netns).with_context(|| format!("could not open {}", netns.display()))
}

fn join<T>(thread: std::thread::JoinHandle<Result<T>>) -> Result<T> {
    match thread.join() {
        Ok(outcome) => outcome,
        Err(_) => bail!("a thread in a network namespace panicked"),
    }
}

/// A network namespace that stays as long as `path` is mounted.
fn ensure_netns(path: &Path) -> Result<()> {
    let there = nix::sys::statfs::statfs(path);
    if there.is_ok_and(|found| found.filesystem_type() == nix::sys::statfs::NSFS_MAGIC) {
        return Ok(());
    }
    File::create(path).with_context(|| format!("could not make {}", path.display()))?;
    let target = path.to_path_buf();
    // Unsharing is per thread: a thread of its own takes the new namespace and ends with it.
    join(std::thread::spawn(move || -> Result<()> {
        unshare(CloneFlags::CLONE_NEWNET).context("could not make a network namespace")?;
        let source = Some("/proc/thread-self/ns/net");
        mount(
            source,
            &target,
            None::<&str>,
            MsFlags::MS_BIND,
            None::<&str>,
        )
        .with_context(|| format!("could not keep the namespace at {}", target.display()))
    }))
}

/// Lets a namespace go.
fn remove_netns(path: &Path) -> Result<()> {
    while umount2(path, MntFlags::MNT_DETACH).is_ok() {}
    match std::fs::remove_file(path) {
        Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
            Err(error).with_context(|| format!("could not remove {}", path.display()))
        }
        _ => Ok(()),
    }
}

async fn up(handle: &Handle, index: u32, name: &str) -> Result<()> {
    let link = LinkUnspec::new_with_index(index).up().build();
    let set = handle.link().set(link).execute().await;
    set.with_context(|| format!("could not bring up {name}"))
}

async fn link_index(handle: &Handle, name: &str) -> Result<Option<u32>> {
    let mut links = handle.link().get().match_name(name.to_owned()).execute();
    match links.try_next().await {
        Ok(link) => Ok(link.map(|link| link.header.index)),
        // There is none of this name.
        Err(rtnetlink::Error::NetlinkError(error))
            if error.raw_code() == -(nix::errno::Errno::ENODEV as i32) =>
        {
            Ok(None)
        }
        Err(error) => Err(error).with_context(|| format!("could not look for the device {name}")),
    }
}

async fn must_find(handle: &Handle, name: &str) -> Result<u32> {
    link_index(handle, name)
        .await?
        .with_context(|| format!("there is no device {name}"))
}

async fn delete_link(handle: &Handle, name: &str) -> Result<()> {
    let Some(index) = link_index(handle, name).await? else {
        return Ok(());
    };
    let removed = handle.link().del(index).execute().await;
    removed.with_context(|| format!("could not remove the device {name}"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn nodes_have_addresses_and_ports_of_their_own() {
        let range: Ipv4Net = "10.245.0.0/24".parse().unwrap();
        let (first, cable) = plan(range, 0, "/n1".into()).unwrap();
        assert_eq!(first, IpAddr::from([10, 245, 0, 11]));
        assert_eq!(cable.host, Ipv4Addr::new(10, 245, 0, 1));
        let (last, cable) = plan(range, 98, "/n99".into()).unwrap();
        assert_eq!(last, IpAddr::from([10, 245, 0, 109]));
        assert!(cable.port.len() < 15, "a device name has 15 bytes at most");
        let small: Ipv4Net = "10.245.0.0/28".parse().unwrap();
        let error = plan(small, 7, "/n8".into()).unwrap_err().to_string();
        assert!(error.contains("--node-cidr"), "{error}");
    }

    #[test]
    fn a_range_in_use_is_refused() {
        let error = check_free("127.0.0.0/16".parse().unwrap()).unwrap_err();
        assert!(error.to_string().contains("--node-cidr"), "{error}");
        check_free("198.51.100.0/24".parse().unwrap()).unwrap();
    }
}
