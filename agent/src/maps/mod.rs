//! The kernel's maps, as the agent writes and reads them.

pub(crate) mod batch;
pub(crate) mod dump;
mod endpoints;
pub mod flow_table;
mod growing;
mod memory;
pub(crate) mod parted;
mod policy;
mod present;
mod services;
mod table;
pub(crate) mod usage;

use std::net::IpAddr;

use anyhow::{Context, Result};
use aya::maps::lpm_trie::{Key, LpmTrie};
use aya::maps::{Array, Map, MapData, MapError, PerCpuArray, RingBuf};
use bytemuck::must_cast;
use ipnet::IpNet;
use xebec_dataplane_common::flow::{Counters, Event};
use xebec_dataplane_common::ip::Ip;
use xebec_dataplane_common::nat::Settings;

pub use policy::PolicyMaps;
pub use services::{Hits, Room, ServiceKernel, ServiceMaps, SocketMap};

/// Takes a map out of the loaded object by its name.
pub(crate) fn take<T: TryFrom<Map, Error = MapError>>(
    ebpf: &mut aya::Ebpf,
    name: &str,
) -> Result<T> {
    let map = ebpf
        .take_map(name)
        .with_context(|| format!("the eBPF object has no map {name}"))?;
    T::try_from(map).with_context(|| format!("the eBPF map {name} is of another kind"))
}

/// What is not there need not be removed.
pub(crate) fn gone(outcome: Result<(), MapError>, what: &'static str) -> Result<()> {
    match outcome {
        Ok(()) | Err(MapError::KeyNotFound) => Ok(()),
        Err(MapError::SyscallError(error))
            if error.io_error.raw_os_error() == Some(libc::ENOENT) =>
        {
            Ok(())
        }
        Err(error) => Err(error).with_context(|| format!("could not remove {what}")),
    }
}

/// An address as the maps hold it.
fn key(address: IpAddr) -> [u8; 16] {
    must_cast(Ip::from(address))
}

/// A block as the maps hold it.
fn block_key(block: IpNet) -> Key<[u8; 16]> {
    let address = Ip::from(block.network());
    Key::new(address.prefix_bits(block.prefix_len()), must_cast(address))
}

/// Translation: settings, and who needs none.
pub struct NetworkMaps {
    settings: Array<MapData, [u8; size_of::<Settings>()]>,
    native: LpmTrie<MapData, [u8; 16], [u8; 16]>,
}

impl NetworkMaps {
    pub(crate) fn new(ebpf: &mut aya::Ebpf) -> Result<Self> {
        Ok(Self {
            settings: take(ebpf, "SETTINGS")?,
            native: take(ebpf, "NATIVE")?,
        })
    }

    /// Tells the programs of the node.
    pub fn set_settings(&mut self, settings: Settings) -> Result<()> {
        self.settings
            .set(0, must_cast::<_, [u8; size_of::<Settings>()]>(settings), 0)
            .context("could not write the settings of translation")
    }

    /// From here on packets to this block keep their source; `home` is the node that has it, if one does.
    pub fn set_native(&mut self, block: IpNet, home: Option<IpAddr>) -> Result<()> {
        let home = home.map_or(Ip::NONE, Ip::from);
        self.native
            .insert(&block_key(block), must_cast::<_, [u8; 16]>(home), 0)
            .context("the map of native address blocks is full")
    }

    /// Packets to this block bear the node's address again.
    pub fn remove_native(&mut self, block: IpNet) -> Result<()> {
        gone(
            self.native.remove(&block_key(block)),
            "a native address block",
        )
    }
}

/// The oldest event of a ring.
pub(crate) fn next_event(ring: &mut RingBuf<MapData>) -> Option<Event> {
    loop {
        let item = ring.next()?;
        if item.len() == size_of::<Event>() {
            return Some(bytemuck::pod_read_unaligned(&item));
        }
    }
}

/// Events of flows and their counters.
pub struct FlowMaps {
    pub(crate) events: RingBuf<MapData>,
    counters: PerCpuArray<MapData, [u8; size_of::<Counters>()]>,
}

impl FlowMaps {
    pub(crate) fn new(ebpf: &mut aya::Ebpf) -> Result<Self> {
        Ok(Self {
            events: take(ebpf, "EVENTS")?,
            counters: take(ebpf, "COUNTERS")?,
        })
    }

    /// The counters of all CPUs together.
    pub(crate) fn counters(
        counters: &PerCpuArray<MapData, [u8; size_of::<Counters>()]>,
    ) -> Result<Counters> {
        let values = counters.get(&0, 0).context("could not read the counters")?;
        Ok(values.iter().fold(Counters::default(), |sum, one| {
            let one: Counters = must_cast(*one);
            Counters {
                produced: sum.produced + one.produced,
                lost: sum.lost + one.lost,
                forwarded: sum.forwarded + one.forwarded,
                dropped: sum.dropped + one.dropped,
                translated: sum.translated + one.translated,
                translated_early: sum.translated_early + one.translated_early,
                refused: sum.refused + one.refused,
                no_port: sum.no_port + one.no_port,
                held: sum.held + one.held,
                unheld: sum.unheld + one.unheld,
            }
        }))
    }

    /// The oldest event that was not taken yet.
    pub fn next_event(&mut self) -> Option<Event> {
        next_event(&mut self.events)
    }

    /// The counters of all CPUs together.
    pub fn count(&self) -> Result<Counters> {
        Self::counters(&self.counters)
    }

    /// Its two parts.
    pub(crate) fn split(
        self,
    ) -> (
        RingBuf<MapData>,
        PerCpuArray<MapData, [u8; size_of::<Counters>()]>,
    ) {
        (self.events, self.counters)
    }
}
