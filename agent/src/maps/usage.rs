//! What flows and affinities take up: ports of the node, and entries of tables that forget the oldest.

use std::collections::{HashMap, HashSet};
use std::net::IpAddr;
use std::ops::ControlFlow;

use anyhow::{Context, Result};
use aya::maps::MapData;
use bytemuck::must_cast;
use xebec_dataplane_common::flow::{Flow, SECOND, TURN_FORTH, ticks};
use xebec_dataplane_common::ip::Ip;
use xebec_dataplane_common::nat::Settings;
use xebec_dataplane_common::service::{Affinity, AffinityKey, Frontend, FrontendKey};

use super::batch;
use super::flow_table::FlowTable;
use crate::bpf_maps;

/// Ports that translated flows have at the node.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Ports {
    /// How many flows hold one. Flows to different ends may hold the same.
    pub used: u64,
    /// How many of them lead to the one far end with the most.
    pub busiest: u64,
    /// How many there are for each far end.
    pub available: u64,
}

/// A table that forgets what was not asked for longest when it is full.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Table {
    /// The map's name.
    pub name: &'static str,
    /// Entries that no timeout has ended.
    pub in_use: u64,
    /// Entries that there is room for.
    pub capacity: u64,
}

impl Table {
    /// The part that is in use, 1 for all of it.
    pub fn pressure(&self) -> f64 {
        self.in_use as f64 / self.capacity.max(1) as f64
    }
}

/// What is taken up at a moment.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Usage {
    /// Of the node's ports.
    pub ports: Ports,
    /// Of the tables of flows and of affinities.
    pub tables: [Table; 2],
}

/// Now, in ns of the monotonic clock.
pub(super) fn clock() -> Result<u64> {
    let clock = nix::time::clock_gettime(nix::time::ClockId::CLOCK_MONOTONIC)
        .context("could not read the clock")?;
    Ok(std::time::Duration::from(clock).as_nanos() as u64)
}

/// The addresses of all ends of flows that go on. The table is read whole.
pub(crate) fn addresses() -> Result<HashSet<IpAddr>> {
    Ok(ends(&FlowTable::open()?, ticks(clock()?)))
}

fn ends(flows: &FlowTable, now: u32) -> HashSet<IpAddr> {
    let mut found = HashSet::new();
    flows.each(|key, flow| {
        if !flow.is_replaceable(key.protocol, now) {
            found.extend([IpAddr::from(key.low), IpAddr::from(key.high)]);
        }
        ControlFlow::Continue(())
    });
    found
}

/// Counts it now. The tables are read whole, which takes some ten milliseconds.
pub(crate) fn count() -> Result<Usage> {
    let now = clock()?;
    let settings: Vec<[u8; size_of::<Settings>()]> =
        batch::range(&bpf_maps::open("SETTINGS")?, 0, 1)?;
    let settings = settings
        .first()
        .context("the map of settings has no entry")?;
    let (ports, flows) = flows(&FlowTable::open()?, &must_cast(*settings), ticks(now));
    let (frontends, affinities) = (bpf_maps::open("FRONTENDS")?, bpf_maps::open("AFFINITIES")?);
    Ok(Usage {
        ports,
        tables: [flows, affinities_of(&affinities, &frontends, now)?],
    })
}

fn capacity(map: &MapData) -> Result<u64> {
    let info = map.info().context("could not ask for a map's size")?;
    Ok(info.max_entries().into())
}

fn flows(flows: &FlowTable, settings: &Settings, now: u32) -> (Ports, Table) {
    let mut ends: HashMap<(Ip, u16, u8), u64> = HashMap::new();
    let mut in_use = 0;
    flows.each(|key, flow| {
        if !flow.is_replaceable(key.protocol, now) {
            in_use += 1;
            if holds_port(flow, settings) {
                let end = (flow.to.destination, flow.to.destination_port, key.protocol);
                *ends.entry(end).or_default() += 1;
            }
        }
        ControlFlow::Continue(())
    });
    let ports = Ports {
        used: ends.values().sum(),
        busiest: ends.values().copied().max().unwrap_or_default(),
        available: settings.ports.into(),
    };
    let table = Table {
        name: "FLOWS",
        in_use,
        capacity: flows.capacity(),
    };
    (ports, table)
}

/// How long affinities last, their Services say.
fn affinities_of(affinities: &MapData, frontends: &MapData, now: u64) -> Result<Table> {
    const KEY: usize = size_of::<FrontendKey>();
    const VALUE: usize = size_of::<Frontend>();
    let mut idle: Vec<(u32, u64)> = Vec::new();
    batch::entries::<[u8; 24], [u8; 16]>(affinities, |key, affinity| {
        let (key, affinity): (AffinityKey, Affinity) = (must_cast(*key), must_cast(*affinity));
        idle.push((key.service, now.saturating_sub(affinity.seen)));
        ControlFlow::Continue(())
    })?;
    let mut lasts: HashMap<u32, u64> = HashMap::new();
    // Of Services there may be very many, and most nodes have no affinities.
    if !idle.is_empty() {
        batch::entries::<[u8; KEY], [u8; VALUE]>(frontends, |_, frontend| {
            let frontend: Frontend = must_cast(*frontend);
            if frontend.affinity != 0 {
                lasts.insert(frontend.service, u64::from(frontend.affinity) * SECOND);
            }
            ControlFlow::Continue(())
        })?;
    }
    let is_in_use =
        |(service, idle): &&(u32, u64)| lasts.get(service).is_some_and(|lasts| idle <= lasts);
    let in_use = idle.iter().filter(is_in_use).count() as u64;
    Ok(Table {
        name: "AFFINITIES",
        in_use,
        capacity: capacity(affinities)?,
    })
}

/// Whether a flow's packets leave with a port that was chosen for it, which no other flow to the same end may have.
fn holds_port(flow: &Flow, settings: &Settings) -> bool {
    let port = u16::from_be(flow.to.source_port);
    let ours = [settings.node4, settings.node6].contains(&flow.to.source);
    flow.turn & TURN_FORTH != 0
        && ours
        && flow.to.source.is_some()
        && port.wrapping_sub(settings.first_port) < settings.ports
}

#[cfg(test)]
mod tests {
    use bytemuck::Zeroable;
    use xebec_dataplane_common::flow::FlowKey;
    use xebec_dataplane_common::nat::Tuple;
    use xebec_dataplane_common::{TCP, UDP};

    use super::*;

    fn ip(text: &str) -> Ip {
        text.parse::<std::net::IpAddr>().unwrap().into()
    }

    #[test]
    fn only_flows_that_last_and_were_given_a_port_count() {
        if !nix::unistd::geteuid().is_root() {
            println!("skipped: it needs root");
            return;
        }
        let settings = Settings {
            node4: ip("192.0.2.1"),
            first_port: 61_000,
            ports: 100,
            ..Settings::zeroed()
        };
        let table = FlowTable::alone(4_807);
        let add = |number: u16, protocol: u8, change: &dyn Fn(&mut Flow)| {
            let tuple = Tuple {
                source: ip("10.244.0.5"),
                destination: ip("198.51.100.7"),
                source_port: number.to_be(),
                destination_port: 443_u16.to_be(),
                protocol,
                pad: [0; 3],
            };
            let (key, up) = FlowKey::new(&tuple);
            let mut flow = Flow::zeroed();
            flow.from_low = up.into();
            flow.turn = TURN_FORTH;
            flow.seen = 1_000;
            flow.to = tuple;
            flow.to.source = settings.node4;
            flow.to.source_port = (61_000 + number % 100).to_be();
            change(&mut flow);
            assert!(table.set(&key, flow));
        };
        for number in 1..=5 {
            add(number, TCP, &|_| {});
        }
        add(6, TCP, &|flow| {
            flow.to.destination_port = 80_u16.to_be();
        });
        // Closed just now, the port is still held.
        add(7, TCP, &|flow| flow.closed = 1);
        for (number, change) in [
            (11, &(|flow: &mut Flow| flow.turn = 0) as &dyn Fn(&mut Flow)),
            (12, &|flow| flow.to.source = ip("10.244.0.5")),
            (13, &|flow| flow.to.source_port = 30_000_u16.to_be()),
            (14, &|flow| flow.to.source_port = 61_100_u16.to_be()),
            (15, &|flow| {
                flow.closed = 1;
                flow.seen = 500;
            }),
        ] {
            add(number, TCP, change);
        }
        add(16, UDP, &|flow| flow.seen = 900);
        let found = flows(&table, &settings, 1_010);
        let wanted = Ports {
            used: 7,
            busiest: 6,
            available: 100,
        };
        // Those without a port of the node last, too: all but those that are over.
        let table = Table {
            name: "FLOWS",
            in_use: 11,
            capacity: 4_815,
        };
        assert_eq!(found, (wanted, table));
    }

    #[test]
    fn affinities_last_as_long_as_their_services_say() {
        if !nix::unistd::geteuid().is_root() {
            println!("skipped: it needs root");
            return;
        }
        const FRONTENDS: u32 = 4_809;
        const CAPACITY: u32 = 4_811;
        let mut frontends: aya::maps::HashMap<
            MapData,
            [u8; size_of::<FrontendKey>()],
            [u8; size_of::<Frontend>()],
        > = aya::maps::HashMap::create(FRONTENDS, 1).unwrap();
        for (service, affinity) in [(1, 10), (2, 0), (3, 10_800)] {
            let mut key = FrontendKey::zeroed();
            key.port = service as u16;
            let frontend = Frontend {
                service,
                affinity,
                ..Frontend::zeroed()
            };
            frontends
                .insert(
                    must_cast::<_, [u8; size_of::<FrontendKey>()]>(key),
                    must_cast::<_, [u8; size_of::<Frontend>()]>(frontend),
                    0,
                )
                .unwrap();
        }
        let mut affinities: aya::maps::HashMap<MapData, [u8; 24], [u8; 16]> =
            aya::maps::HashMap::create(CAPACITY, 1).unwrap();
        // The first and the third are in use.
        for (client, service, age) in [(1, 1, 9), (2, 1, 11), (1, 3, 9_000), (1, 2, 0), (1, 4, 0)] {
            let key = AffinityKey {
                client: Ip([0, 0, 0, client]),
                service,
                namespace: 0,
            };
            let affinity = Affinity {
                seen: (20_000 - age) * SECOND,
                ..Affinity::zeroed()
            };
            affinities
                .insert(
                    must_cast::<_, [u8; 24]>(key),
                    must_cast::<_, [u8; 16]>(affinity),
                    0,
                )
                .unwrap();
        }
        let held = bpf_maps::held().unwrap();
        let open = |capacity: u32| {
            let map = held.iter().find(|map| map.capacity == u64::from(capacity));
            map.unwrap().open().unwrap()
        };
        let found = affinities_of(&open(CAPACITY), &open(FRONTENDS), 20_000 * SECOND).unwrap();
        assert_eq!((found.in_use, found.capacity), (2, CAPACITY.into()));
        assert!(found.pressure() > 0.0 && found.pressure() < 0.001);
    }
}
