//! The wires of a pod: a veth pair without a bridge, its addresses, routes and neighbours.

use std::fs::File;
use std::net::{IpAddr, Ipv4Addr};
use std::os::fd::AsRawFd;
use std::path::Path;

use anyhow::{Context, Result};
use futures::TryStreamExt;
use rtnetlink::packet_route::link::LinkAttribute;
use rtnetlink::packet_route::route::RouteScope;
use rtnetlink::{Handle, LinkUnspec, LinkVeth, RouteMessageBuilder};

/// The gateway that every pod sees; it is nobody's address, only a neighbour entry for the host's end of the veth.
const GATEWAY: Ipv4Addr = Ipv4Addr::new(169, 254, 1, 1);

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

/// Connects a pod: `host` is the name of this end, `inner` that of the pod's end in `netns`.
pub async fn connect(
    handle: &Handle,
    host: &str,
    netns: &Path,
    inner: &str,
    address: Ipv4Addr,
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
    handle
        .link()
        .set(LinkUnspec::new_with_index(index).up().build())
        .execute()
        .await
        .with_context(|| format!("could not bring up {host}"))?;
    // The pod's address is not of this device's network, so a strict check of sources would drop its packets.
    let sysctl = format!("/proc/sys/net/ipv4/conf/{host}/rp_filter");
    std::fs::write(&sysctl, "0").with_context(|| format!("could not write {sysctl}"))?;
    let inner_name = inner.to_owned();
    in_namespace(namespace, move |handle| {
        Box::pin(async move { configure_inside(&handle, &inner_name, address, &host_mac).await })
    })
    .await?;
    let route = RouteMessageBuilder::<Ipv4Addr>::new()
        .destination_prefix(address, 32)
        .output_interface(index)
        .scope(RouteScope::Link)
        .build();
    handle
        .route()
        .add(route)
        .replace()
        .execute()
        .await
        .with_context(|| format!("could not route {address} to {host}"))?;
    handle
        .neighbours()
        .add(index, IpAddr::V4(address))
        .link_layer_address(&pod_mac)
        .replace()
        .execute()
        .await
        .with_context(|| format!("could not name {address} a neighbour"))?;
    let mac = pod_mac
        .try_into()
        .map_err(|mac| anyhow::anyhow!("{inner} has no Ethernet address but {mac:?}"))?;
    Ok(Wires {
        ifindex: index,
        mac,
    })
}

/// Within the pod: loopback, address, the way out.
async fn configure_inside(
    handle: &Handle,
    name: &str,
    address: Ipv4Addr,
    gateway_mac: &[u8],
) -> Result<()> {
    for device in ["lo", name] {
        let (index, _) = must_find(handle, device).await?;
        handle
            .link()
            .set(LinkUnspec::new_with_index(index).up().build())
            .execute()
            .await
            .with_context(|| format!("could not bring up {device}"))?;
    }
    let (index, _) = must_find(handle, name).await?;
    handle
        .address()
        .add(index, IpAddr::V4(address), 32)
        .replace()
        .execute()
        .await
        .context("could not give the pod its address")?;
    handle
        .neighbours()
        .add(index, IpAddr::V4(GATEWAY))
        .link_layer_address(gateway_mac)
        .replace()
        .execute()
        .await
        .context("could not name the pod's gateway")?;
    let to_gateway = RouteMessageBuilder::<Ipv4Addr>::new()
        .destination_prefix(GATEWAY, 32)
        .output_interface(index)
        .scope(RouteScope::Link)
        .build();
    handle
        .route()
        .add(to_gateway)
        .replace()
        .execute()
        .await
        .context("could not route the pod's gateway")?;
    let default = RouteMessageBuilder::<Ipv4Addr>::new()
        .gateway(GATEWAY)
        .output_interface(index)
        .build();
    handle
        .route()
        .add(default)
        .replace()
        .execute()
        .await
        .context("could not set the pod's default route")
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
