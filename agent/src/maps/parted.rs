//! Forgets which backend UDP's flows and sockets have, where that is no backend of their Service any more but still one of
//! another: by the backend alone the programs can't tell.

use std::collections::HashSet;
use std::ops::ControlFlow;

use anyhow::{Context, Result};
use aya::Pod;
use aya::maps::{HashMap, Map, MapData};
use bytemuck::{AnyBitPattern, must_cast};
use xebec_dataplane_common::UDP;
use xebec_dataplane_common::service::{ASKED, SocketKey, SocketValue};

use super::batch;
use super::flow_table::FlowTable;
use crate::bpf_maps;

/// Numbers of a Service's port and of a backend.
pub(crate) type Pairs = HashSet<(u32, u32)>;

/// What was forgotten.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Parted {
    /// Entries of flows; one that is translated has two.
    pub flows: usize,
    /// Cookies of sockets that got such a backend.
    pub sockets: HashSet<u64>,
}

/// Forgets all of these now. The maps must not name the backends for the Services any more.
pub(crate) fn part(pairs: &Pairs) -> Result<Parted> {
    part_in(&FlowTable::open()?, bpf_maps::open("SOCKETS")?, pairs)
}

fn part_in(flows: &FlowTable, sockets: MapData, pairs: &Pairs) -> Result<Parted> {
    let flows = flows.retain(|key, flow| {
        key.protocol != UDP || flow.backend == 0 || !pairs.contains(&(flow.service, flow.backend))
    });
    let mut cookies = HashSet::new();
    forget(sockets, |key: &[u8; 32], value: &[u8; 32]| {
        let (key, value): (SocketKey, SocketValue) = (must_cast(*key), must_cast(*value));
        let meant =
            value.protocol == u16::from(UDP) && pairs.contains(&(value.service, value.backend));
        if meant {
            cookies.insert(key.cookie);
        }
        // What came from the backend still bears the Service's name to the socket.
        meant && key.side == ASKED
    })
    .context("could not forget what sockets were given")?;
    Ok(Parted {
        flows,
        sockets: cookies,
    })
}

/// Removes the entries of a map that are meant; how many.
fn forget<K: Pod + AnyBitPattern, V: Pod + AnyBitPattern>(
    map: MapData,
    mut meant: impl FnMut(&K, &V) -> bool,
) -> Result<usize> {
    let mut keys = Vec::new();
    batch::entries::<K, V>(&map, |key, value| {
        if meant(key, value) {
            keys.push(*key);
        }
        ControlFlow::Continue(())
    })?;
    let mut map: HashMap<MapData, K, V> = HashMap::try_from(Map::LruHashMap(map))?;
    // What went meanwhile is forgotten as well.
    Ok(keys.iter().filter(|key| map.remove(key).is_ok()).count())
}

#[cfg(test)]
mod tests {
    use bytemuck::Zeroable;
    use xebec_dataplane_common::flow::{Flow, FlowKey};
    use xebec_dataplane_common::service::GIVEN;
    use xebec_dataplane_common::{TCP, UDP};

    use super::*;

    /// A map of the kernel that nobody else has, and a handle to read it with.
    fn map<K: Pod, V: Pod>(capacity: u32) -> (MapData, HashMap<MapData, K, V>) {
        let map: HashMap<MapData, K, V> = HashMap::create(capacity, 0).unwrap();
        let held = bpf_maps::held().unwrap();
        let one = held.iter().find(|map| map.capacity == u64::from(capacity));
        (one.unwrap().open().unwrap(), map)
    }

    #[test]
    fn only_datagrams_of_the_pair_are_forgotten() {
        if !nix::unistd::geteuid().is_root() {
            println!("skipped: it needs root");
            return;
        }
        let flows = FlowTable::alone(4_811);
        for (number, (protocol, service, backend)) in [
            (UDP, 1, 7),
            (UDP, 1, 7),
            (UDP, 1, 8),
            (UDP, 2, 7),
            (TCP, 1, 7),
            (UDP, 0, 0),
        ]
        .into_iter()
        .enumerate()
        {
            let mut key = FlowKey::zeroed();
            (key.low_port, key.protocol) = (number as u16, protocol);
            let mut flow = Flow::zeroed();
            (flow.service, flow.backend) = (service, backend);
            assert!(flows.set(&key, flow));
        }
        let (sockets, mut given) = map::<[u8; 32], [u8; 32]>(4_812);
        for (cookie, side, protocol, service) in [
            (11, ASKED, UDP, 1),
            (11, GIVEN, UDP, 1),
            (12, GIVEN, UDP, 1),
            (13, GIVEN, TCP, 1),
            (14, ASKED, UDP, 2),
        ] {
            let mut key = SocketKey::zeroed();
            (key.cookie, key.side) = (cookie, side);
            let mut value = SocketValue::zeroed();
            (value.protocol, value.service, value.backend) = (protocol.into(), service, 7);
            let (key, value): ([u8; 32], [u8; 32]) = (must_cast(key), must_cast(value));
            given.insert(key, value, 0).unwrap();
        }
        let parted = part_in(&flows, sockets, &Pairs::from([(1, 7), (3, 8)])).unwrap();
        let wanted = Parted {
            flows: 2,
            sockets: HashSet::from([11, 12]),
        };
        assert_eq!(parted, wanted);
        let mut left = 0;
        flows.each(|_, _| {
            left += 1;
            ControlFlow::Continue(())
        });
        assert_eq!((left, given.keys().count()), (4, 4));
    }
}
