//! The ranges of addresses that a cluster has: of pods, Services and nodes, each of one family or of both.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use anyhow::{Context, Result, bail};
use ipnet::{IpNet, Ipv4Net, Ipv6Net};

use super::switch::family;
use super::{Up, switch};

/// All ranges; the families of pods and nodes are in the same order.
pub struct Ranges {
    /// Of pods, the primary one first.
    pub pods: Vec<IpNet>,
    /// Of Services, the primary one first.
    pub services: Vec<IpNet>,
    /// Of several nodes; none of one.
    pub nodes: Vec<IpNet>,
}

/// What a node takes of the pods' ranges.
const NODE_MASK: (u8, u8) = (24, 64);

/// A default range of a family.
fn default(v4: bool, range4: [u8; 3], length4: u8, group6: u16, length6: u8) -> IpNet {
    if v4 {
        let [a, b, c] = range4;
        Ipv4Net::new_assert(Ipv4Addr::new(a, b, c, 0), length4).into()
    } else {
        let address = Ipv6Addr::new(0xfd00, 0x10, group6, 0, 0, 0, 0, 0);
        Ipv6Net::new_assert(address, length6).into()
    }
}

fn is_v4(range: &IpNet) -> bool {
    range.addr().is_ipv4()
}

impl Up {
    /// The ranges, of which none may overlap.
    pub(super) fn ranges(&self) -> Result<Ranges> {
        let families: Vec<bool> = self.pod_cidr.iter().map(is_v4).collect();
        let several = self.nodes > 1;
        let mut ranges = Ranges {
            pods: self.pod_cidr.clone(),
            services: self.service_cidr.clone(),
            nodes: Vec::new(),
        };
        if ranges.services.is_empty() {
            ranges.services = families
                .iter()
                .map(|v4| default(*v4, [10, 96, 0], 16, 0x96, 112))
                .collect();
        }
        if several {
            if self.node_name.is_some() {
                bail!("--node-name names one node; several are node1, node2, ...");
            }
            for v4 in &families {
                let given = self.node_cidr.iter().find(|range| is_v4(range) == *v4);
                let range = match given {
                    Some(range) => *range,
                    None if self.node_cidr.is_empty() => default(*v4, [10, 245, 0], 24, 0x245, 64),
                    None => bail!(
                        "pods have {0}, so nodes need it, too: give --node-cidr a range of {0}",
                        family(*v4)
                    ),
                };
                switch::check_free(range)?;
                ranges.nodes.push(range);
            }
        }
        let all = [
            ("--pod-cidr", &ranges.pods),
            ("--service-cidr", &ranges.services),
            (
                "--node-cidr",
                if several {
                    &self.node_cidr
                } else {
                    &ranges.nodes
                },
            ),
        ];
        for (flag, list) in all {
            let of = |v4: bool| list.iter().filter(|range| is_v4(range) == v4).count();
            if of(true) > 1 || of(false) > 1 {
                bail!(
                    "{flag} has several ranges of one family; give it at most one of IPv4 and one of IPv6"
                );
            }
        }
        let foreign = ranges
            .services
            .iter()
            .find(|range| !families.contains(&is_v4(range)));
        if let Some(range) = foreign {
            bail!(
                "--service-cidr {range} is {0}, of which pods have no addresses: give --pod-cidr a range of {0}",
                family(is_v4(range))
            );
        }
        ranges.check_overlaps()?;
        let taken = [
            ("--pod-cidr", &ranges.pods),
            ("--service-cidr", &ranges.services),
        ];
        for balancers in &self.load_balancer_cidr {
            // They may well lie in the nodes' range, but nobody's pods or Services have them.
            for (flag, list) in taken {
                if let Some(range) = list.iter().find(|range| balancers.touches(range)) {
                    bail!("{flag} {range} and --load-balancer-cidr {balancers} overlap");
                }
            }
        }
        Ok(ranges)
    }
}

impl Ranges {
    fn check_overlaps(&self) -> Result<()> {
        let of = |flag: &'static str, list: &[IpNet]| -> Vec<(&'static str, IpNet)> {
            list.iter().map(|range| (flag, *range)).collect()
        };
        let all = [
            of("--pod-cidr", &self.pods),
            of("--service-cidr", &self.services),
            of("--node-cidr", &self.nodes),
        ]
        .concat();
        for (index, (flag, range)) in all.iter().enumerate() {
            for (other, taken) in &all[..index] {
                if range.contains(taken) || taken.contains(range) {
                    bail!("{other} {taken} and {flag} {range} overlap");
                }
            }
        }
        Ok(())
    }

    /// A node's part of the pods' ranges.
    pub fn of_node(&self, index: usize) -> Result<Vec<IpNet>> {
        let part = |range: &IpNet| {
            let mask = if is_v4(range) {
                NODE_MASK.0
            } else {
                NODE_MASK.1
            };
            let mut subnets = range
                .subnets(mask)
                .with_context(|| format!("--pod-cidr {range} must be a /{mask} or larger"))?;
            subnets.nth(index).with_context(|| {
                format!(
                    "--pod-cidr {range} has no /{mask} for each of {} nodes",
                    index + 1
                )
            })
        };
        self.pods.iter().map(part).collect()
    }

    /// Those of some addresses whose families pods have, in the order of these.
    pub fn of_pods(&self, addresses: &[IpAddr]) -> Vec<IpAddr> {
        let of = |range: &IpNet| {
            let v4 = is_v4(range);
            addresses.iter().copied().find(|one| one.is_ipv4() == v4)
        };
        self.pods.iter().filter_map(of).collect()
    }

    /// Whether Services have IPv4 first.
    pub fn services_v4(&self) -> bool {
        self.services.first().is_none_or(is_v4)
    }

    /// All addresses of this machine; those of IPv6 stand for IPv4's, too.
    pub fn everywhere(&self) -> IpAddr {
        if self.pods.iter().all(is_v4) {
            Ipv4Addr::UNSPECIFIED.into()
        } else {
            Ipv6Addr::UNSPECIFIED.into()
        }
    }
}
