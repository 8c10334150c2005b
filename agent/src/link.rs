//! The wires of a pod: a veth pair without a bridge, its addresses, routes and neighbours.

use std::fs::File;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::os::fd::AsRawFd;
use std::path::Path;

use anyhow::{Context, Result};
use futures::TryStreamExt;
use rtnetlink::packet_route::address::{AddressAttribute, AddressFlags};
use rtnetlink::packet_route::link::LinkAttribute;
use rtnetlink::packet_route::route::{RouteMessage, RouteScope};
use rtnetlink::{Handle, LinkUnspec, LinkVeth, RouteMessageBuilder};

/// The gateway that every pod sees; it is nobody's address, only a neighbour entry for the host's end of the veth.
const GATEWAY: Ipv4Addr = Ipv4Addr::new(169, 254, 1, 1);
/// The same for IPv6, where the host's end of every veth has it: a link's own address is no other link's matter.
const GATEWAY6: Ipv6Addr = Ipv6Addr::new(0xfe80, 0, 0, 0, 0, 0, 0, 1);

/// A netlink handle in this process's network namespace.
pub fn handle() -> Result<Handle> {
    let (connection, handle, _) = rtnetlink::new_connection().context("could not open netlink")?;
    tokio::spawn(connection);
    Ok(handle)
}

/// Index and hardware address of a device, if it is there.
pub async fn find(handle: &Handle, name: &str) -> Result<Option<(u32, Vec<u8>)>> {
    let mut links = handle.link().get().match_name(name.to_owned()).execute();
    match links.try_next().await {
        Ok(Some(link)) => {
            let mac = link
                .attributes
                .iter()
                .find_map(|attribute| match attribute {
                    LinkAttribute::Address(mac) => Some(mac.clone()),
                    _ => None,
                });
            Ok(Some((link.header.index, mac.unwrap_or_default())))
        }
        Ok(None) => Ok(None),
        // ENODEV: there is none of this name.
        Err(rtnetlink::Error::NetlinkError(error)) if error.raw_code() == -libc::ENODEV => Ok(None),
        Err(error) => Err(error).with_context(|| format!("could not look for the device {name}")),
    }
}

async fn must_find(handle: &Handle, name: &str) -> Result<(u32, Vec<u8>)> {
    find(handle, name)
        .await?
        .with_context(|| format!("there is no device {name}"))
}

/// What the dataplane needs to know of a veth pair.
#[derive(Clone, Copy, Debug)]
pub struct Wires {
    /// Index of the host's end.
    pub ifindex: u32,
    /// Hardware address of the pod's end.
    pub mac: [u8; 6],
}

/// Connects a pod: `host` is the name of this end, `inner` that of the pod's end in `netns`. The node speaks to it
/// from `source6`, if it has that.
pub async fn connect(
    handle: &Handle,
    host: &str,
    netns: &Path,
    inner: &str,
    addresses: &[IpAddr],
    source6: Option<Ipv6Addr>,
) -> Result<Wires> {
    // What a failed try left is of no use: the pair is made anew.
    remove(handle, host).await?;
    let namespace = File::open(netns)
        .with_context(|| format!("could not open the network namespace {}", netns.display()))?;
    let temporary = format!("{host}p");
    handle
        .link()
        .add(LinkVeth::new(host, &temporary).build())
        .execute()
        .await
        .with_context(|| format!("could not make the veth pair {host}"))?;
    let (index, host_mac) = must_find(handle, host).await?;
    let (peer, pod_mac) = must_find(handle, &temporary).await?;
    handle
        .link()
        .set(
            LinkUnspec::new_with_index(peer)
                .name(inner)
                .setns_by_fd(namespace.as_raw_fd())
                .build(),
        )
        .execute()
        .await
        .with_context(|| format!("could not move {inner} into {}", netns.display()))?;
    let v6 = addresses.iter().any(IpAddr::is_ipv6);
    if v6 {
        // Its only address is the gateway's.
        prepare_v6(host, &[("addr_gen_mode", "1")])?;
    }
    up(handle, index, host).await?;
    // The pod's address is not of this device's network, so a strict check of sources would drop its packets.
    set_sysctl("ipv4", host, "rp_filter", "0")?;
    if v6 {
        add_v6(handle, index, GATEWAY6, 64)
            .await
            .with_context(|| format!("could not give {host} the gateway's address"))?;
    }
    let (inner_name, own) = (inner.to_owned(), addresses.to_vec());
    in_namespace(namespace, move |handle| {
        Box::pin(async move { configure_inside(&handle, &inner_name, &own, &host_mac).await })
    })
    .await?;
    for address in addresses {
        add_route(handle, host_route(*address, index, source6))
            .await
            .with_context(|| format!("could not route {address} to {host}"))?;
        add_neighbour(handle, index, *address, &pod_mac)
            .await
            .with_context(|| format!("could not name {address} a neighbour"))?;
    }
    let mac = pod_mac
        .try_into()
        .map_err(|mac| anyhow::anyhow!("{inner} has no Ethernet address but {mac:?}"))?;
    Ok(Wires {
        ifindex: index,
        mac,
    })
}

/// Within the pod: loopback, addresses, the way out.
async fn configure_inside(
    handle: &Handle,
    name: &str,
    addresses: &[IpAddr],
    gateway_mac: &[u8],
) -> Result<()> {
    let v6 = addresses.iter().any(IpAddr::is_ipv6);
    if v6 {
        prepare_v6("lo", &[])?;
        prepare_v6(name, &[])?;
    }
    let (lo, _) = must_find(handle, "lo").await?;
    up(handle, lo, "lo").await?;
    let (index, _) = must_find(handle, name).await?;
    up(handle, index, name).await?;
    for address in addresses {
        let gateway = match *address {
            IpAddr::V4(own) => {
                let add = handle.address().add(index, own.into(), 32).replace();
                add.execute()
                    .await
                    .context("could not give the pod its address")?;
                IpAddr::V4(GATEWAY)
            }
            IpAddr::V6(own) => {
                add_v6(handle, index, own, 128)
                    .await
                    .context("could not give the pod its address of IPv6")?;
                IpAddr::V6(GATEWAY6)
            }
        };
        add_neighbour(handle, index, gateway, gateway_mac)
            .await
            .context("could not name the pod's gateway")?;
        if gateway.is_ipv4() {
            // IPv6's is on the link by its kind.
            add_route(handle, host_route(gateway, index, None))
                .await
                .context("could not route the pod's gateway")?;
        }
        add_route(handle, default_route(gateway, index))
            .await
            .context("could not set the pod's default route")?;
    }
    Ok(())
}

/// Makes a device that is down ready for addresses of IPv6: those that it makes for itself are usable at once, and
/// nobody's advertisements change its routes.
fn prepare_v6(device: &str, more: &[(&str, &str)]) -> Result<()> {
    let always = [
        ("disable_ipv6", "0"),
        ("accept_dad", "0"),
        ("accept_ra", "0"),
    ];
    for (name, value) in always.iter().chain(more) {
        set_sysctl("ipv6", device, name, value)?;
    }
    Ok(())
}

/// Sets what holds for one device of this thread's network namespace.
fn set_sysctl(family: &str, device: &str, name: &str, value: &str) -> Result<()> {
    let path = format!("/proc/sys/net/{family}/conf/{device}/{name}");
    std::fs::write(&path, value).with_context(|| format!("could not write {path}"))
}

async fn up(handle: &Handle, index: u32, name: &str) -> Result<()> {
    handle
        .link()
        .set(LinkUnspec::new_with_index(index).up().build())
        .execute()
        .await
        .with_context(|| format!("could not bring up {name}"))
}

/// Gives a device an address that nobody else can have, so that it is usable without asking around first.
async fn add_v6(
    handle: &Handle,
    index: u32,
    address: Ipv6Addr,
    length: u8,
) -> Result<(), rtnetlink::Error> {
    let mut request = handle
        .address()
        .add(index, address.into(), length)
        .replace();
    let flags = AddressAttribute::Flags(AddressFlags::Nodad);
    request.message_mut().attributes.push(flags);
    request.execute().await
}

/// A neighbour that is known for ever: it is not asked for.
async fn add_neighbour(
    handle: &Handle,
    index: u32,
    address: IpAddr,
    mac: &[u8],
) -> Result<(), rtnetlink::Error> {
    let add = handle.neighbours().add(index, address);
    add.link_layer_address(mac).replace().execute().await
}

async fn add_route(handle: &Handle, route: RouteMessage) -> Result<(), rtnetlink::Error> {
    handle.route().add(route).replace().execute().await
}

/// The route to one address that is on the device's link. With IPv6 a machine often has several addresses and would
/// choose the one that is most like the pod's, which need not be the one that it is known by. (With IPv4 the kernel
/// takes such a route away with the address.)
fn host_route(address: IpAddr, index: u32, source6: Option<Ipv6Addr>) -> RouteMessage {
    match address {
        IpAddr::V4(address) => RouteMessageBuilder::<Ipv4Addr>::new()
            .destination_prefix(address, 32)
            .output_interface(index)
            .scope(RouteScope::Link)
            .build(),
        IpAddr::V6(address) => {
            let route = RouteMessageBuilder::<Ipv6Addr>::new()
                .destination_prefix(address, 128)
                .output_interface(index);
            match source6 {
                Some(source) => route.pref_source(source).build(),
                None => route.build(),
            }
        }
    }
}

fn default_route(gateway: IpAddr, index: u32) -> RouteMessage {
    match gateway {
        IpAddr::V4(gateway) => RouteMessageBuilder::<Ipv4Addr>::new()
            .gateway(gateway)
            .output_interface(index)
            .build(),
        IpAddr::V6(gateway) => RouteMessageBuilder::<Ipv6Addr>::new()
            .gateway(gateway)
            .output_interface(index)
            .build(),
    }
}

/// Runs netlink work in another network namespace, on a thread that ends with it.
async fn in_namespace<F>(namespace: File, work: F) -> Result<()>
where
    F: FnOnce(Handle) -> std::pin::Pin<Box<dyn Future<Output = Result<()>>>> + Send + 'static,
{
    let thread = tokio::task::spawn_blocking(move || {
        std::thread::spawn(move || -> Result<()> {
            nix::sched::setns(&namespace, nix::sched::CloneFlags::CLONE_NEWNET)
                .context("could not enter the pod's network namespace")?;
            let runtime = tokio::runtime::Builder::new_current_thread()
                .enable_all()
                .build()
                .context("could not start a runtime")?;
            runtime.block_on(async { work(handle()?).await })
        })
        .join()
    });
    match thread
        .await
        .context("the thread in the pod's namespace was lost")?
    {
        Ok(outcome) => outcome,
        Err(_) => anyhow::bail!("the thread in the pod's namespace panicked"),
    }
}

/// The cookie of a network namespace.
pub async fn cookie_of(netns: &Path) -> Result<u64> {
    let namespace = File::open(netns)
        .with_context(|| format!("could not open the network namespace {}", netns.display()))?;
    let (tell, told) = tokio::sync::oneshot::channel();
    in_namespace(namespace, move |_| {
        Box::pin(async move {
            // Who asked waits.
            let _ = tell.send(crate::scope::netns_cookie()?);
            Ok(())
        })
    })
    .await?;
    told.await.context("the cookie was not told")
}

/// Removes a pod's wires; the routes go with them. None there is no error.
pub async fn remove(handle: &Handle, host: &str) -> Result<()> {
    let Some((index, _)) = find(handle, host).await? else {
        return Ok(());
    };
    match handle.link().del(index).execute().await {
        // It went with its namespace meanwhile.
        Err(rtnetlink::Error::NetlinkError(error)) if error.raw_code() == -libc::ENODEV => Ok(()),
        other => other.with_context(|| format!("could not remove the device {host}")),
    }
}
