//! The node's way to others: which devices lead there, which addresses know the way to pods, which ports
//! translated flows use.

use std::collections::{BTreeMap, BTreeSet};
use std::hash::BuildHasher;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::sync::{Arc, OnceLock};

use anyhow::{Context, Result, bail};
use futures::TryStreamExt;
use ipnet::IpNet;
use rtnetlink::packet_route::address::AddressAttribute;
use rtnetlink::packet_route::link::{LinkAttribute, LinkMessage};
use rtnetlink::packet_route::route::{RouteAttribute, RouteMessage, RouteType};
use rtnetlink::{Handle, RouteMessageBuilder};
use tokio::sync::oneshot;
use tokio::sync::watch::Receiver;
use tokio_util::sync::CancellationToken;
use xebec_dataplane_common::ip::Ip;
use xebec_dataplane_common::nat::{DIRECT_TCP, DIRECT_UDP, Settings};

use crate::link;
use crate::loader::By;
use crate::maps::NetworkMaps;
use crate::nodes::{NodeView, Nodes};

/// A device that leads to other nodes or the outside.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Device {
    /// Its name.
    pub name: String,
    /// Its index.
    pub index: u32,
    /// The bus that it is on, if it is hardware (or its hypervisor says so).
    pub bus: Option<String>,
}

impl Device {
    /// As netlink tells of it, which unlike /sys knows of this process's network namespace.
    fn new(told: LinkMessage) -> Option<Self> {
        let (mut name, mut parent, mut bus) = (None, false, None);
        for attribute in told.attributes {
            match attribute {
                LinkAttribute::IfName(told) => name = Some(told),
                LinkAttribute::ParentDevName(_) => parent = true,
                LinkAttribute::ParentDevBusName(told) => bus = Some(told),
                _ => {}
            }
        }
        Some(Self {
            name: name?,
            index: told.header.index,
            bus: if parent { bus } else { None },
        })
    }
}

/// The devices that lead to other nodes and the outside.
pub(crate) async fn devices(named: &[String], node_ips: &[IpAddr]) -> Result<Vec<Device>> {
    let handle = link::handle()?;
    let mut devices = Vec::new();
    if !named.is_empty() {
        for name in named {
            let mut links = handle.link().get().match_name(name.clone()).execute();
            let told = links
                .try_next()
                .await
                .with_context(|| format!("there is no device {name}"))?;
            devices.extend(told.and_then(Device::new));
        }
        return Ok(devices);
    }
    let mut found = BTreeSet::new();
    let mut missing: BTreeSet<IpAddr> = node_ips.iter().copied().collect();
    let mut addresses = handle.address().get().execute();
    while let Some(one) = addresses
        .try_next()
        .await
        .context("could not list addresses")?
    {
        for attribute in &one.attributes {
            if let AddressAttribute::Address(address) = attribute {
                if node_ips.contains(address) {
                    missing.remove(address);
                    found.insert(one.header.index);
                }
            }
        }
    }
    if let Some(address) = missing.first() {
        bail!(
            "no device has the node's address {address}: name the devices that lead to other nodes"
        );
    }
    let families = [
        RouteMessageBuilder::<Ipv4Addr>::new().build(),
        RouteMessageBuilder::<Ipv6Addr>::new().build(),
    ];
    for (request, v4) in families.into_iter().zip([true, false]) {
        // A family that the node has no address of has its ways out for itself.
        if node_ips.iter().any(|address| address.is_ipv4() == v4) {
            found.extend(ways_out(&handle, request).await?);
        }
    }
    for index in found {
        let mut links = handle.link().get().match_index(index).execute();
        let told = links
            .try_next()
            .await
            .context("could not look for a device")?;
        devices.extend(told.and_then(Device::new));
    }
    Ok(devices)
}

/// The devices of the default routes of a family.
async fn ways_out(handle: &Handle, request: RouteMessage) -> Result<BTreeSet<u32>> {
    let mut found = BTreeSet::new();
    let mut routes = handle.route().get(request).execute();
    while let Some(route) = routes.try_next().await.context("could not list routes")? {
        // One that leads nowhere has a device as well.
        let header = &route.header;
        if header.destination_prefix_length == 0 && header.kind == RouteType::Unicast {
            let devices = route
                .attributes
                .iter()
                .filter_map(|attribute| match attribute {
                    RouteAttribute::Oif(index) => Some(*index),
                    _ => None,
                });
            found.extend(devices);
        }
    }
    Ok(found)
}

/// Which hooks serve which devices, in a few words for the command line.
#[derive(Clone, Default)]
pub struct Served(Arc<OnceLock<String>>);

impl Served {
    /// Tells it, once.
    pub(crate) fn set(&self, devices: &[Device], by: &[By]) {
        let words: Vec<String> = devices
            .iter()
            .zip(by)
            .map(|(device, by)| format!("{} by {by}", device.name))
            .collect();
        // The devices are asked for once, when the agent starts.
        let _ = self.0.set(words.join(" and "));
    }

    /// The words; none before the devices have their hooks.
    pub fn words(&self) -> &str {
        self.0.get().map_or("", String::as_str)
    }
}

/// How flows from outside reach backends of other nodes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum LbMode {
    /// Masqueraded: backends see this node, and answers come back through it.
    #[default]
    Snat,
    /// Backends see the client, and their nodes answer it directly.
    Dsr,
    /// That for TCP and SCTP, and UDP is masqueraded.
    Hybrid,
}

impl LbMode {
    /// As the programs are told it.
    pub(crate) const fn direct(self) -> u32 {
        match self {
            Self::Snat => 0,
            Self::Dsr => DIRECT_TCP | DIRECT_UDP,
            Self::Hybrid => DIRECT_TCP,
        }
    }
}

/// The ports that no socket of the node gets by itself: those beyond the range that the kernel gives out.
fn settings(node: &[IpAddr], local_range: &str) -> Result<Settings> {
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
    let of = |v4: bool| {
        let first = node.iter().find(|address| address.is_ipv4() == v4);
        first.map_or(Ip::NONE, |address| Ip::from(*address))
    };
    Ok(Settings {
        node4: of(true),
        node6: of(false),
        first_port,
        ports,
        first_node_port: NODE_PORTS.0,
        last_node_port: NODE_PORTS.1,
        errors: ERRORS,
        direct: 0,
        around: 0,
        seed: seed(),
    })
}

/// A number that nobody can guess.
fn seed() -> u32 {
    std::hash::RandomState::new().hash_one(()) as u32
}

/// How many ICMP errors each CPU may send in a second, as Linux does (`net.ipv4.icmp_msgs_per_sec`).
const ERRORS: u32 = 1_000;

/// The first and the last port that Services may have at nodes (`--service-node-port-range`).
const NODE_PORTS: (u16, u16) = (30_000, 32_767);

/// The settings of a node with these addresses, at most one of a family, and this machine's ports.
pub(crate) fn settings_of(node: &[IpAddr]) -> Result<Settings> {
    let range = "/proc/sys/net/ipv4/ip_local_port_range";
    let range =
        std::fs::read_to_string(range).with_context(|| format!("could not read {range}"))?;
    settings(node, range.trim())
}

/// Keeps the maps in step with the nodes until `shutdown`, and tells when they are for the first time; `native` are
/// addresses besides theirs that know the way to pods, and `kept` those that see pods' own addresses because somebody
/// says so.
pub(crate) async fn run(
    mut maps: NetworkMaps,
    settings: Settings,
    native: Vec<IpNet>,
    mut kept: Receiver<Vec<IpNet>>,
    mut nodes: Receiver<Nodes>,
    ready: oneshot::Sender<()>,
    shutdown: CancellationToken,
) -> Result<()> {
    let mut installed = BTreeMap::new();
    let mut ready = Some(ready);
    loop {
        tokio::select! {
            () = shutdown.cancelled() => return Ok(()),
            changed = nodes.changed() => if changed.is_err() { return Ok(()) },
            // Nobody says so any more only when nobody ever does.
            Ok(()) = kept.changed() => {}
        }
        let Some(told) = nodes.borrow_and_update().clone() else {
            continue;
        };
        let kept = kept.borrow_and_update().clone();
        let others = native.iter().chain(&kept).map(|block| (*block, None));
        let wanted: Blocks = others.chain(told.values().flat_map(blocks)).collect();
        for (block, home) in &wanted {
            if installed.get(block) != Some(home) {
                maps.set_native(*block, *home)?;
            }
        }
        for block in installed.keys() {
            if !wanted.contains_key(block) {
                maps.remove_native(*block)?;
            }
        }
        installed = wanted;
        // Translation begins when it is known for whom not.
        if let Some(ready) = ready.take() {
            maps.set_settings(settings)?;
            // Nobody waits any more when the agent stops.
            let _ = ready.send(());
        }
    }
}

/// Blocks of addresses, and the address of the node that has them.
type Blocks = BTreeMap<IpNet, Option<IpAddr>>;

/// The addresses of a node and of its pods.
fn blocks(node: &NodeView) -> impl Iterator<Item = (IpNet, Option<IpAddr>)> {
    let addresses = node.addresses.iter();
    let addresses = addresses.map(|address| (IpNet::from(*address), Some(*address)));
    let home = |range: &IpNet| {
        let v4 = range.addr().is_ipv4();
        let mut all = node.addresses.iter().copied();
        all.find(|address| address.is_ipv4() == v4)
    };
    let ranges = node.pod_ranges.iter();
    addresses.chain(ranges.map(move |range| (range.trunc(), home(range))))
}

#[cfg(test)]
mod tests {
    use super::*;

    const NODE: IpAddr = IpAddr::V4(Ipv4Addr::new(192, 0, 2, 1));

    #[test]
    fn translated_flows_use_ports_that_no_socket_gets_by_itself() {
        let ports =
            |range: &str| settings(&[NODE], range).map(|found| (found.first_port, found.ports));
        assert_eq!(ports("32768\t60999").unwrap(), (61_000, 4_536));
        assert_eq!(ports("50000 65535").unwrap(), (32_768, 17_232));
        assert_eq!(ports("1024 30000").unwrap(), (32_768, 32_768));
        assert!(format!("{:#}", ports("1024 65535").unwrap_err()).contains("32768 60999"));
        assert!(ports("a b").is_err());
    }

    #[test]
    fn a_node_is_its_addresses_and_its_ranges() {
        let node = NodeView {
            addresses: vec![[192, 0, 2, 7].into()],
            pod_ranges: ["10.244.1.0/24", "fd00:1::/64"]
                .map(|range| range.parse().unwrap())
                .to_vec(),
            ..NodeView::default()
        };
        let found: Vec<String> = blocks(&node)
            .map(|(block, home)| format!("{block} {home:?}"))
            .collect();
        assert_eq!(
            found,
            [
                "192.0.2.7/32 Some(192.0.2.7)",
                "10.244.1.0/24 Some(192.0.2.7)",
                "fd00:1::/64 None"
            ]
        );
    }
}
