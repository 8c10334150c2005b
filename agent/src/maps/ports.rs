//! Counts the node's ports that translated flows hold, from the table of flows.

use std::collections::HashMap;
use std::ops::ControlFlow;

use anyhow::{Context, Result};
use aya::maps::MapData;
use bytemuck::must_cast;
use xebec_dataplane_common::flow::{Flow, FlowKey, TURN_FORTH, ticks};
use xebec_dataplane_common::ip::Ip;
use xebec_dataplane_common::nat::Settings;

use super::batch;
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

/// Counts them now.
pub(crate) fn used() -> Result<Ports> {
    let clock = nix::time::clock_gettime(nix::time::ClockId::CLOCK_MONOTONIC)
        .context("could not read the clock")?;
    let now = ticks(std::time::Duration::from(clock).as_nanos() as u64);
    let settings: Vec<[u8; size_of::<Settings>()]> =
        batch::range(&bpf_maps::open("SETTINGS")?, 0, 1)?;
    let settings = settings
        .first()
        .context("the map of settings has no entry")?;
    count(&bpf_maps::open("FLOWS")?, &must_cast(*settings), now)
}

fn count(flows: &MapData, settings: &Settings, now: u32) -> Result<Ports> {
    let mut ends: HashMap<(Ip, u16, u8), u64> = HashMap::new();
    batch::entries::<[u8; 40], [u8; 76]>(flows, |key, flow| {
        let (key, flow): (FlowKey, Flow) = (must_cast(*key), must_cast(*flow));
        if holds_port(&key, &flow, settings, now) {
            let end = (flow.to.destination, flow.to.destination_port, key.protocol);
            *ends.entry(end).or_default() += 1;
        }
        ControlFlow::Continue(())
    })?;
    Ok(Ports {
        used: ends.values().sum(),
        busiest: ends.values().copied().max().unwrap_or_default(),
        available: settings.ports.into(),
    })
}

/// Whether a flow's packets leave with a port that was chosen for it, which no other flow to the same end may have.
fn holds_port(key: &FlowKey, flow: &Flow, settings: &Settings, now: u32) -> bool {
    let port = u16::from_be(flow.to.source_port);
    let ours = [settings.node4, settings.node6].contains(&flow.to.source);
    flow.turn & TURN_FORTH != 0
        && ours
        && flow.to.source.is_some()
        && port.wrapping_sub(settings.first_port) < settings.ports
        && !flow.is_replaceable(key.protocol, now)
}

#[cfg(test)]
mod tests {
    use bytemuck::Zeroable;
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
        const CAPACITY: u32 = 4_807;
        let mut map: aya::maps::HashMap<MapData, [u8; 40], [u8; 76]> =
            aya::maps::HashMap::create(CAPACITY, 1).unwrap();
        let mut add = |number: u16, protocol: u8, change: &dyn Fn(&mut Flow)| {
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
            let (key, flow): ([u8; 40], [u8; 76]) = (must_cast(key), must_cast(flow));
            map.insert(key, flow, 0).unwrap();
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
        let held = bpf_maps::held().unwrap();
        let map = held.iter().find(|map| map.capacity == u64::from(CAPACITY));
        let found = count(&map.unwrap().open().unwrap(), &settings, 1_010).unwrap();
        let wanted = Ports {
            used: 7,
            busiest: 6,
            available: 100,
        };
        assert_eq!(found, wanted);
    }
}
