//! The virtual switch of `up --nodes N`: a bridge, and for each node a network namespace that a veth pair joins to it.

use std::fs::File;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::os::fd::AsRawFd;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail};
use futures::TryStreamExt;
use ipnet::IpNet;
use nix::mount::{MntFlags, MsFlags, mount, umount2};
use nix::sched::{CloneFlags, unshare};
use rtnetlink::packet_route::address::{AddressAttribute, AddressFlags};
use rtnetlink::packet_route::route::{RouteMessage, RouteType};
use rtnetlink::{Handle, LinkBridge, LinkUnspec, LinkVeth, RouteMessageBuilder};
use serde::{Deserialize, Serialize};
use xebec_agent::endpoints::one_or_many;

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
    /// The ranges of the switch, at most one of a family.
    #[serde(alias = "range", deserialize_with = "one_or_many")]
    pub ranges: Vec<IpNet>,
    /// The host's address on the switch in each of them: where nodes find the API server.
    #[serde(alias = "host", deserialize_with = "one_or_many")]
    pub hosts: Vec<IpAddr>,
}

impl Cable {
    /// The host's address of this family.
    pub fn host(&self, v4: bool) -> Option<IpAddr> {
        self.hosts.iter().copied().find(|host| host.is_ipv4() == v4)
    }

    /// The length of the switch's prefix of this family.
    fn prefix_len(&self, v4: bool) -> Result<u8> {
        let range = self
            .ranges
            .iter()
            .find(|range| range.addr().is_ipv4() == v4);
        range.map(IpNet::prefix_len).with_context(|| {
            let family = family(v4);
            format!("the switch has no range of {family}; give --node-cidr one")
        })
    }
}

/// The name of a family, for people.
pub fn family(v4: bool) -> &'static str {
    if v4 { "IPv4" } else { "IPv6" }
}

/// An address of a range, counted from its first host.
fn nth(range: IpNet, index: usize) -> Option<IpAddr> {
    match range {
        IpNet::V4(range) => range.hosts().nth(index).map(IpAddr::V4),
        // The first address of all is that of any router of the range.
        IpNet::V6(range) => range.hosts().nth(index + 1).map(IpAddr::V6),
    }
}

/// Addresses and cable of the node with this index.
pub fn plan(ranges: &[IpNet], index: usize, netns: PathBuf) -> Result<(Vec<IpAddr>, Cable)> {
    let mut cable = Cable {
        netns,
        port: format!("{BRIDGE}-n{}", index + 1),
        ranges: ranges.to_vec(),
        hosts: Vec::new(),
    };
    let mut addresses = Vec::new();
    for range in ranges {
        let host = nth(*range, 0).with_context(|| format!("--node-cidr {range} is empty"))?;
        // The first ten are kept free for the host and what may come.
        let address = nth(*range, 10 + index)
            .with_context(|| format!("--node-cidr {range} has no room for {} nodes", index + 1))?;
        cable.hosts.push(host);
        addresses.push(address);
    }
    Ok((addresses, cable))
}

/// The range must be nobody else's.
pub fn check_free(range: IpNet) -> Result<()> {
    for found in nix::ifaddrs::getifaddrs().context("could not list network devices")? {
        let (Some(address), Some(mask)) = (&found.address, &found.netmask) else {
            continue;
        };
        let v4 = (address.as_sockaddr_in(), mask.as_sockaddr_in());
        let v6 = (address.as_sockaddr_in6(), mask.as_sockaddr_in6());
        let other = match (v4, v6) {
            ((Some(address), Some(mask)), _) => {
                IpNet::with_netmask(address.ip().into(), mask.ip().into())
            }
            (_, (Some(address), Some(mask))) => {
                IpNet::with_netmask(address.ip().into(), mask.ip().into())
            }
            _ => continue,
        };
        let Ok(other) = other else { continue };
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

/// A switch that is there already.
pub struct Found {
    /// The run folder of the cluster that made it, if it said so.
    pub run: Option<PathBuf>,
}

/// The switch that is there, whoever made it.
pub async fn find() -> Result<Option<Found>> {
    if link_index(&netlink()?, BRIDGE).await?.is_none() {
        return Ok(None);
    }
    let alias = std::fs::read_to_string(alias()).unwrap_or_default();
    let run = Some(alias.trim()).filter(|alias| alias.starts_with('/'));
    Ok(Some(Found {
        run: run.map(PathBuf::from),
    }))
}

/// Where the kernel keeps what is said of the bridge: the run folder of its cluster.
fn alias() -> String {
    format!("/sys/class/net/{BRIDGE}/ifalias")
}

/// Says for whoever finds the bridge which cluster's it is.
pub fn sign(run: &Path) -> Result<()> {
    let path = alias();
    // The kernel takes 255 bytes; a longer path is left unsaid.
    let run = run.as_os_str().as_encoded_bytes();
    if run.len() > 255 {
        return Ok(());
    }
    std::fs::write(&path, run).with_context(|| format!("could not write {path}"))
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
        for pods in &node.pod_cidrs {
            let v4 = pods.addr().is_ipv4();
            let address = node.ips.iter().find(|address| address.is_ipv4() == v4);
            let address = address.with_context(|| {
                format!(
                    "node {} has a range of {} but no address",
                    node.name,
                    family(v4)
                )
            })?;
            let route = way(*pods, Way::By(*address, bridge))?;
            let route = handle.route().add(route).replace();
            route
                .execute()
                .await
                .with_context(|| format!("could not route {pods} to node {}", node.name))?;
        }
    }
    Ok(())
}

/// Where packets go.
enum Way {
    /// To a router at a device.
    By(IpAddr, u32),
    /// Nowhere.
    Nobody,
}

/// A route; range and router are of one family.
fn way(to: IpNet, way: Way) -> Result<RouteMessage> {
    Ok(match to {
        IpNet::V4(to) => {
            let route = RouteMessageBuilder::<Ipv4Addr>::new()
                .destination_prefix(to.network(), to.prefix_len());
            match way {
                Way::By(IpAddr::V4(router), device) => {
                    route.gateway(router).output_interface(device)
                }
                Way::Nobody => route.kind(RouteType::Unreachable),
                Way::By(router, _) => bail!("{router} can't be the way to {to}"),
            }
            .build()
        }
        IpNet::V6(to) => {
            let route = RouteMessageBuilder::<Ipv6Addr>::new()
                .destination_prefix(to.network(), to.prefix_len());
            match way {
                Way::By(IpAddr::V6(router), device) => {
                    route.gateway(router).output_interface(device)
                }
                Way::Nobody => route.kind(RouteType::Unreachable),
                Way::By(router, _) => bail!("{router} can't be the way to {to}"),
            }
            .build()
        }
    })
}

/// Gives a device an address that is planned to be nobody else's: with IPv6 nobody is asked first.
async fn give(handle: &Handle, device: u32, address: IpAddr, length: u8) -> Result<()> {
    let mut add = handle.address().add(device, address, length).replace();
    if address.is_ipv6() {
        let flags = AddressAttribute::Flags(AddressFlags::Nodad);
        add.message_mut().attributes.push(flags);
    }
    add.execute()
        .await
        .with_context(|| format!("could not give a device the address {address}"))
}

/// Makes a device that is down ready for IPv6, if the switch has a range of it: its link's own address, which it
/// looks for others with, is usable at once, and nobody's advertisements change its routes.
fn prepare_v6(cable: &Cable, device: &str) -> Result<()> {
    if cable.host(false).is_none() {
        return Ok(());
    }
    for (name, value) in [
        ("disable_ipv6", "0"),
        ("accept_dad", "0"),
        ("accept_ra", "0"),
    ] {
        let path = format!("/proc/sys/net/ipv6/conf/{device}/{name}");
        std::fs::write(&path, value)
            .with_context(|| format!("could not write {path} (is IPv6 off in the kernel?)"))?;
    }
    Ok(())
}

async fn ensure_bridge(handle: &Handle, cable: &Cable) -> Result<u32> {
    let bridge = match link_index(handle, BRIDGE).await? {
        Some(index) => index,
        None => {
            let link = LinkBridge::new(BRIDGE).build();
            let made = handle.link().add(link).execute().await;
            made.with_context(|| format!("could not make the bridge {BRIDGE}"))?;
            must_find(handle, BRIDGE).await?
        }
    };
    prepare_v6(cable, BRIDGE)?;
    for host in &cable.hosts {
        give(handle, bridge, *host, cable.prefix_len(host.is_ipv4())?).await?;
    }
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
    let Some(cable) = &node.cable else {
        return Ok(());
    };
    let handle = netlink()?;
    let lo = must_find(&handle, "lo").await?;
    up(&handle, lo, "lo").await?;
    let index = must_find(&handle, INNER).await?;
    prepare_v6(cable, INNER)?;
    up(&handle, index, INNER).await?;
    for address in &node.ips {
        give(
            &handle,
            index,
            *address,
            cable.prefix_len(address.is_ipv4())?,
        )
        .await?;
    }
    for host in &cable.hosts {
        let everywhere = if host.is_ipv4() {
            IpNet::from(ipnet::Ipv4Net::default())
        } else {
            IpNet::from(ipnet::Ipv6Net::default())
        };
        let default = way(everywhere, Way::By(*host, index))?;
        let default = handle.route().add(default).replace();
        default
            .execute()
            .await
            .with_context(|| format!("could not set the node's default route by {host}"))?;
    }
    for pods in &node.pod_cidrs {
        // What is sent to a pod that is not there would otherwise go to the host and come back.
        let nobody = way(*pods, Way::Nobody)?;
        let nobody = handle.route().add(nobody).replace();
        nobody
            .execute()
            .await
            .with_context(|| format!("could not close the route to {pods}"))?;
    }
    Ok(())
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

    fn range(text: &str) -> IpNet {
        text.parse().unwrap()
    }

    fn ip(text: &str) -> IpAddr {
        text.parse().unwrap()
    }

    #[test]
    fn nodes_have_addresses_and_ports_of_their_own() {
        let both = [range("10.245.0.0/24"), range("fd00:10:245::/64")];
        let (first, cable) = plan(&both, 0, "/n1".into()).unwrap();
        assert_eq!(first, [ip("10.245.0.11"), ip("fd00:10:245::b")]);
        assert_eq!(cable.hosts, [ip("10.245.0.1"), ip("fd00:10:245::1")]);
        assert_eq!(cable.host(false), Some(ip("fd00:10:245::1")));
        let (last, cable) = plan(&both[..1], 98, "/n99".into()).unwrap();
        assert_eq!(last, [ip("10.245.0.109")]);
        assert!(cable.port.len() < 15, "a device name has 15 bytes at most");
        for small in ["10.245.0.0/28", "fd00::/124"] {
            let error = plan(&[range(small)], 7, "/n8".into())
                .unwrap_err()
                .to_string();
            assert!(error.contains("--node-cidr"), "{error}");
        }
    }

    #[test]
    fn a_range_in_use_is_refused() {
        let error = check_free(range("127.0.0.0/16")).unwrap_err();
        assert!(error.to_string().contains("--node-cidr"), "{error}");
        check_free(range("198.51.100.0/24")).unwrap();
        check_free(range("2001:db8:77::/64")).unwrap();
    }

    #[test]
    fn what_was_written_of_a_cable_of_one_family_is_read() {
        let old = r#"{"netns": "/n1", "port": "xebec0-n1", "range": "10.245.0.0/24", "host": "10.245.0.1"}"#;
        let read: Cable = serde_json::from_str(old).unwrap();
        let (_, planned) = plan(&[range("10.245.0.0/24")], 0, "/n1".into()).unwrap();
        assert_eq!(read, planned);
    }
}
